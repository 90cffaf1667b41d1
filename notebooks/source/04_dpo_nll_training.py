# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 04 · Training with DPO + NLL
#
# **What you will be able to do**
#
# - derive the DPO loss from a preference, and say which way it pushes;
# - say why Iterative RPO adds an NLL term, and how it is normalised;
# - compute log-probabilities of completions, and train on pairs;
# - decide with an interval whether a claim about log-probabilities holds.
#
# | | `smoke` | `cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook | 30 seconds on one core | 1 minute on one core | not measured |
#
# **Needs**: the packages of this repository. **Optional sequel**: [04b · QLoRA by hand](04b_qlora_by_hand.ipynb).
#
# **Before this**: [03 · Pairs](03_pairs.ipynb), which makes the pairs.

# %% tags=["nbval-ignore-output"]
import math, os, sys
import numpy as np
import pandas as pd
import torch
sys.path[:0] = [".", ".."]                     # checks_04.py and helpers_04.py are next to the notebooks
sys.path += ["../scripts", "../../scripts"]    # the package `studies`
import checks_04, helpers_04
from irpo_utils import logprobs, models, plots, profiles, training
from irpo_utils.ops.cli import quiet_libraries
from irpo_utils.ops.drift import Probe
from irpo_utils.ops.statistics import seed_and_question_interval
from studies import figures

quiet_libraries()
PROFILE = os.environ.get("IRPO_PROFILE", "cpu")     # the one setting: "cpu", "smoke", or a GPU profile
profile = profiles.get(PROFILE)
print("profile", PROFILE, "· device", models.default_device())

# %% [markdown]
# ## 1 What does a pair teach?
#
# Notebook 03 turned graded completions into pairs. Here is one.

# %% tags=["nbval-ignore-output"]
preferences = helpers_04.first_pairs(PROFILE, profile)
helpers_04.show(preferences[8])
assert preferences[8]["chosen"] != preferences[8]["rejected"]

# %% [markdown]
# The **chosen** ("winning") completion is correct, the **rejected** ("losing") one is not. In formulas they are $y_w$
# and $y_l$, and $x$ is the question. Supervised fine-tuning uses $y_w$ alone. How can a model learn from the
# *comparison*? The next section derives [DPO](../docs/glossary.md#dpo) in four steps.

# %% [markdown]
# ## 2 From a preference to a loss
#
# **Step 1: a preference is a biased coin.** Give every completion a reward $r(x, y)$, a number that says how good it is.
# The larger the difference of two rewards, the surer the preference. The Bradley–Terry model makes this precise with
# the logistic function $\sigma(z) = 1 / (1 + e^{-z})$:
#
# $$P(y_w \text{ is preferred to } y_l) = \sigma\big(r(x, y_w) - r(x, y_l)\big)$$
#
# Only the difference counts: adding the same number to both rewards changes nothing.

# %%
for difference in (-2.0, 0.0, 2.0, 5.0):
    print(f"reward difference {difference:+.0f}: preferred with probability {1 / (1 + math.exp(-difference)):.3f}")

# %% [markdown]
# **Step 2: the best policy for a given reward.** Let $\pi$ be the model that we look for. It should earn a high reward
# and stay close to a [reference model](../docs/glossary.md#reference-model) $\pi_\text{ref}$:
#
# $$\max_\pi \; \mathbb{E}_{y \sim \pi}\big[r(x, y)\big] - \beta\, \mathrm{KL}(\pi \,\|\, \pi_\text{ref})$$
#
# β is the price of one nat of distance. The solution multiplies every probability of the reference by
# $e^{r/\beta}$ and normalises:
#
# $$\pi^*(y|x) = \frac{1}{Z(x)}\, \pi_\text{ref}(y|x)\, e^{r(x, y)/\beta}, \qquad
# Z(x) = \sum_y \pi_\text{ref}(y|x)\, e^{r(x, y)/\beta}$$
#
# *Why?* Write the KL divergence as an expectation and collect both terms under one logarithm:
#
# $$\mathbb{E}_{y \sim \pi}\Big[r - \beta \log \frac{\pi}{\pi_\text{ref}}\Big]
# = -\beta\, \mathbb{E}_{y \sim \pi}\Big[\log \frac{\pi}{\pi_\text{ref}\, e^{r/\beta}}\Big]
# = -\beta\, \mathrm{KL}(\pi \,\|\, \pi^*) + \beta \log Z(x)$$
#
# A KL divergence is never negative, and 0 only for $\pi = \pi^*$.
#
# **Predict**: three completions have rewards 0, 1 and 1. Where does the best policy go for a small β, and for a large one?

# %%
ref, reward = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.0, 1.0, 1.0])

def best_policy(beta):
    weights = ref * torch.exp(reward / beta)
    return weights / weights.sum()

for beta in (0.1, 1.0, 10.0):
    print(f"β = {beta:4}:", best_policy(beta))

# %% [markdown]
# A small β follows the reward, and a large β stays at the reference. Is it really the optimum? Try 10,000 random policies.

# %% tags=["nbval-ignore-output"]
def objective(policy, beta=1.0):
    return (policy * (reward - beta * torch.log(policy / ref))).sum(-1)

torch.manual_seed(0)
others = torch.distributions.Dirichlet(torch.ones(3)).sample((10_000,))
print(f"formula {objective(best_policy(1.0)):.4f}, best random policy {objective(others).max():.4f}")
assert objective(best_policy(1.0)) >= objective(others).max()

# %% [markdown]
# **Step 3: read the formula backwards.** Solve it for the reward:
#
# $$r(x, y) = \beta \log \frac{\pi^*(y|x)}{\pi_\text{ref}(y|x)} + \beta \log Z(x)$$
#
# So every policy is optimal for *some* reward: β times its log-ratio to the reference. $Z(x)$ is a sum over all possible
# completions, which we cannot compute. But it is the same for all completions of a question, and Bradley–Terry needs a
# difference: $Z$ cancels.

# %%
implied = 1.0 * torch.log(best_policy(1.0) / ref)      # β log-ratio, without β log Z
print("implied reward:        ", implied)
print("difference to the real:", reward - implied)
assert torch.allclose(implied[1] - implied[0], reward[1] - reward[0])

# %% [markdown]
# **Step 4: maximum likelihood.** Put the implied reward of the model in training, $\pi_\theta$, into Bradley–Terry, and
# take the negative log-likelihood of the preference that we observed:
#
# $$L_\text{DPO} = -\log\sigma(\beta\,\delta), \qquad
# \delta = \log\frac{\pi_\theta(y_w|x)}{\pi_\text{ref}(y_w|x)} - \log\frac{\pi_\theta(y_l|x)}{\pi_\text{ref}(y_l|x)}$$
#
# In Iterative RPO the reference is $M_t$, which wrote both completions, and the grader decides
# which one is preferred. $\beta\delta$ is the [reward margin](../docs/glossary.md#reward-margin).

# %% tags=["nbval-ignore-output"]
figure = helpers_04.loss_and_slope(betas=(0.05, 0.1, 0.5))
assert "ln 2 = 0.69" in plots.alt_text(figure)
figure

# %% [markdown]
# All curves pass through $\ln 2$ at $\delta = 0$. With a small β, training continues to push pairs that are well
# separated. With a large β a pair stops mattering after a few nats.
#
# **The gradient** follows from $(\log\sigma)'(z) = \sigma(-z)$:
#
# $$\frac{\partial L_\text{DPO}}{\partial \log\pi_\theta(y_w|x)} = -\beta\,\sigma(-\beta\delta), \qquad
# \frac{\partial L_\text{DPO}}{\partial \log\pi_\theta(y_l|x)} = +\beta\,\sigma(-\beta\delta)$$
#
# Gradient descent moves against it: the chosen completion up and the rejected one down, with equal force. Autograd agrees.

# %%
chosen = torch.tensor([-20.0, 0.0, 20.0], requires_grad=True)      # log-ratios, so δ = chosen - rejected
rejected = torch.zeros(3, requires_grad=True)
(-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected))).sum().backward()
print("chosen:  ", chosen.grad)
print("rejected:", rejected.grad)
assert torch.allclose(rejected.grad, 0.1 * torch.sigmoid(-0.1 * chosen))

# %% tags=["nbval-ignore-output"]
figure = helpers_04.gradient_arrows(beta=0.1)
assert "0.050 at δ = 0" in plots.alt_text(figure)
figure

# %% [markdown]
# ## 3 Why is that not enough?
#
# Training moves parameters, and completions share them. The smallest example has two parameters and three
# completions. The chosen and the rejected one have similar features.

# %%
features = torch.tensor([[1.0, 0.2], [1.2, -0.2], [-1.0, 0.5]])     # chosen, rejected, a third one

def toy_training(alpha, steps=60):
    """Probabilities of the three completions at every step, (steps, 3)."""
    theta, rows = torch.zeros(2, requires_grad=True), []
    ref = torch.log_softmax(features @ theta, -1).detach()
    for _ in range(steps):
        logp = torch.log_softmax(features @ theta, -1)
        loss_dpo = -torch.nn.functional.logsigmoid((logp[0] - ref[0]) - (logp[1] - ref[1]))
        [gradient] = torch.autograd.grad(loss_dpo - alpha * logp[0], theta)
        theta = (theta - 0.5 * gradient).requires_grad_()
        rows.append(logp.exp().detach().numpy())
    return rows

# %% [markdown]
# **Predict**: which of the three is the most probable after training with DPO alone?

# %% tags=["nbval-ignore-output"]
toy = {"DPO": np.array(toy_training(alpha=0.0)), "DPO + NLL": np.array(toy_training(alpha=1.0))}
assert toy["DPO"][-1].argmax() == 2 and toy["DPO + NLL"][-1].argmax() == 0
helpers_04.toy_probabilities(toy)

# %% [markdown]
# The third one. The direction that separates chosen from rejected lowers *both*, and DPO sees only the difference. This
# is [likelihood displacement](../docs/glossary.md#likelihood-displacement)
# ([Razin et al. 2024](https://arxiv.org/abs/2410.08847)). Iterative RPO therefore adds a term that says *raise the chosen
# completion*:
#
# $$L = L_\text{DPO} + \alpha\, L_\text{NLL}, \qquad L_\text{NLL} = -\frac{\log\pi_\theta(y_w|x)}{|y_w|}$$
#
# This is Eq. 1 of [the paper](https://arxiv.org/html/2404.19733v3#S2), which uses α = 1 and β = 0.1.
#
# ### What is a sum and what is a mean?
#
# DPO needs *sums* over tokens: a preference is about whole completions. The NLL is divided by the number of tokens of
# *this* chosen completion, and the batch takes the mean over pairs. A common error divides by the tokens of the whole
# batch instead.
#
# **Predict**: two chosen completions have 60 and 300 tokens, at 0.5 and 2 nats per token. What do both ways give?

# %%
tokens, nats_per_token = torch.tensor([60.0, 300.0]), torch.tensor([0.5, 2.0])
logps = -tokens * nats_per_token
print(f"Eq. 1:             {(-logps / tokens).mean():.2f}   weights 0.50 and 0.50")
weights = tokens / tokens.sum()
print(f"tokens of a batch: {-logps.sum() / tokens.sum():.2f}   weights {weights[0]:.2f} and {weights[1]:.2f}")

# %% [markdown]
# The long completion counts five times as much. TRL's `sft` loss averages in this way
# ([discussion](https://github.com/huggingface/trl/pull/1705)), so `irpo_utils.training` has its own loss.

# %% [markdown]
# ### Exercise 4.1: Eq. 1 in one function
#
# **Goal**: write the loss of each pair. **Difficulty**: 1 of 3. **Time**: 10 minutes.
#
# The first five arguments have shape (batch,): four sums of log-probabilities, and the tokens of each chosen
# completion. Return the loss per pair, shape (batch,).
#
# <details><summary>Hint</summary>
#
# Compute both log-ratios and their difference, then `torch.nn.functional.logsigmoid`. The NLL has no reference in it.
#
# </details>

# %%
def my_loss(logps_chosen, logps_rejected, ref_chosen, ref_rejected, n_tokens, alpha, beta):
    # SOLUTION
    delta = (logps_chosen - ref_chosen) - (logps_rejected - ref_rejected)
    return -torch.nn.functional.logsigmoid(beta * delta) - alpha * logps_chosen / n_tokens
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_04.loss(my_loss))

# %% [markdown]
# The worked solution is in [solutions/04_dpo_nll_training.ipynb](solutions/04_dpo_nll_training.ipynb).

# %% [markdown]
# ## 4 From a model to log-probabilities
#
# The loss needs $\log\pi_\theta(y|x)$, the sum over the tokens of a completion, end token included. Two details cause most
# bugs. **Shift**: the logits of a column predict the *next* column. **Mask**: rows have different lengths, and padding must
# not count. `pad_batch` pads prompts on the left and completions on the right, so that all completions begin in the same
# column.

# %% tags=["nbval-ignore-output"]
words = ["2", "+", "3", "=", "5", "<end>", "6", "so"]
prompts, completions = [[0, 1, 2, 3], [2, 3]], [[4, 5], [7, 6, 5]]
batch = logprobs.pad_batch(prompts, completions, pad_id=0)
assert batch["response_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
helpers_04.padding_grid(batch, words)

# %% [markdown]
# The prompt is read and never scored.

# %% [markdown]
# ### Exercise 4.2: shift and mask
#
# **Goal**: compute log-probabilities of completions. **Difficulty**: 2 of 3. **Time**: 15 minutes.
#
# `logits` has shape (rows, P + R, vocabulary), `input_ids` (rows, P + R), and `response_mask` (rows, R) is 1 on
# completion tokens. Return the sum of each row, shape (rows,).
#
# <details><summary>Hint</summary>
#
# Slice the logits of columns P - 1 to P + R - 2, take `log_softmax`, and pick the tokens with `gather`.
#
# </details>

# %%
def my_response_logps(logits, input_ids, response_mask):
    # SOLUTION
    R = response_mask.shape[1]
    logps = torch.log_softmax(logits[:, -R - 1 : -1], dim=-1)
    picked = logps.gather(-1, input_ids[:, -R:, None]).squeeze(-1)
    return (picked * response_mask).sum(-1)
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_04.response_logps(my_response_logps))

# %% [markdown]
# The worked solution is in [solutions/04_dpo_nll_training.ipynb](solutions/04_dpo_nll_training.ipynb). For a real model
# `logprobs.response_logps` does the same. Load M_0 and score four pairs.

# %% tags=["nbval-ignore-output"]
model, tokenizer, trainer = helpers_04.load_m0(profile)
data = preferences.shuffle(seed=0)
four = data.select(range(4))

def score():
    """Log-probabilities of the four pairs under the model as it is: two tensors (4,)."""
    sides = []
    for side in ("chosen_ids", "rejected_ids"):
        batch = logprobs.pad_batch(list(four["prompt_ids"]), list(four[side]), tokenizer.pad_token_id, model.device)
        sides.append(logprobs.response_logps(model, batch).sum(-1))
    return sides

with torch.no_grad():
    reference = score()
print("chosen  ", reference[0], "\nrejected", reference[1])
assert (torch.stack(reference) < 0).all()

# %% [markdown]
# **Predict**: before the first step the model *is* the reference. What is the DPO term, whatever the data?

# %% tags=["nbval-ignore-output"]
n_tokens = torch.tensor([len(ids) for ids in four["chosen_ids"]], device=model.device)
tolerance = 1e-4 if model.dtype == torch.float32 else 5e-3       # 16-bit numbers round
loss_dpo, loss_nll = training.dpo_nll_loss(*score(), *reference, n_tokens, alpha=1.0, beta=0.1)
print(f"DPO term {loss_dpo.mean():.4f}, ln 2 = {math.log(2):.4f}; NLL term {loss_nll.mean():.4f}")
assert (loss_dpo - math.log(2)).abs().max() < tolerance

# %% [markdown]
# $\delta = 0$, so the DPO term is $\ln 2$; the whole loss is larger by α times the NLL. In bf16 the two forward passes
# can round differently, and 0.6935 is normal. A larger distance means that training does not start from the reference.
# A DPO term that *stays* at $\ln 2$ means that nothing is trained.

# %% [markdown]
# ### Exercise 4.3: one training step
#
# **Goal**: make one step that raises the margin. **Difficulty**: 2 of 3. **Time**: 15 minutes.
#
# `score()` returns both log-probabilities with gradients, and `reference` holds those of the reference. Make one step on
# the mean loss of the pairs and return that loss.
#
# <details><summary>Hint</summary>
#
# `training.dpo_nll_loss` gives both terms per pair. Then: `zero_grad`, `backward`, `step`, `return`.
#
# </details>

# %%
def train_step(score, optimizer, reference, n_tokens, alpha, beta):
    # SOLUTION
    optimizer.zero_grad()
    loss_dpo, loss_nll = training.dpo_nll_loss(*score(), *reference, n_tokens, alpha=alpha, beta=beta)
    loss = (loss_dpo + alpha * loss_nll).mean()
    loss.backward()
    optimizer.step()
    return loss.detach()
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_04.train_step(train_step))

# %% [markdown]
# The worked solution is in [solutions/04_dpo_nll_training.ipynb](solutions/04_dpo_nll_training.ipynb). Your function
# now trains the real model, that is its LoRA adapter.

# %% tags=["nbval-ignore-output"]
adapter = [weight for name, weight in model.named_parameters() if "lora_" in name]
optimizer = torch.optim.AdamW([weight.requires_grad_() for weight in adapter], lr=1e-3)

def delta():
    with torch.no_grad():
        chosen, rejected = score()
    return (chosen - reference[0]) - (rejected - reference[1])

before = delta()
train_step(score, optimizer, reference, n_tokens, alpha=1.0, beta=0.1)
print("δ before:", before, "\nδ after: ", delta())
assert (0.1 * before).abs().max() < tolerance

# %% [markdown]
# ## 5 A short training run
#
# `training.train` does this for all pairs, with TRL's trainer. A `Probe` scores 64 pairs that are not trained on.

# %% tags=["nbval-ignore-output"]
STEPS = 4 if PROFILE == "smoke" else 40
kept = min(64, len(data) // 4)
probe_pairs, train_pairs = data.select(range(kept)), data.select(range(kept, len(data)))

def train(alpha):
    """A training from M_0: the log and the rows of the probe."""
    models.set_adapter(model, None)                                  # back to M_0
    probe = Probe(probe_pairs, tokenizer, every=max(1, STEPS // 4))
    log = training.train(
        model, tokenizer, train_pairs, alpha, profile.beta, learning_rate=5 * profile.learning_rate,
        max_steps=STEPS, batch_size=profile.batch_size, micro_batch_size=profile.micro_batch_size,
        trainer=trainer, callbacks=[probe], gradient_checkpointing=profile.gradient_checkpointing,
        optim=profile.optimizer, disable_tqdm=True)
    return log.to_pandas(), pd.DataFrame(probe.rows)

log, probed = train(alpha=1.0)
assert abs(log.loss_dpo[0] - math.log(2)) < tolerance and len(log) == STEPS
log.set_index("step")[["loss", "loss_dpo", "loss_nll", "rewards/margins"]].iloc[[0, -1]].round(3)

# %% tags=["nbval-ignore-output"]
figure = helpers_04.loss_curve(log)
assert "DPO term" in plots.alt_text(figure)
figure

# %% [markdown]
# Thin lines are single batches, thick lines a running mean. Each batch has other pairs, so the NLL term jumps; a probe
# compares the same pairs. `rewards/margins` is $\beta\delta$.
#
# ### Open exercise: choose α
#
# **Run** `train` with α = 0, 1 and another value. **Plot** the probe with `figures.training_curves`. **Argue**: which α would
# you choose, and what would change your mind? At the start the DPO term pushes a chosen completion with $\beta/2$ and
# the NLL term with $\alpha / |y_w|$.

# %% tags=["nbval-ignore-output"]
# SOLUTION
alphas = {"α = 0": train(0.0)[1], "α = 1": probed, "α = 4": train(4.0)[1]}
assert len(alphas) == 3
figures.training_curves(alphas)
# STUB
# alphas = {"α = 1": probed}      # your turn: add runs with other α
# assert len(alphas) >= 1
# figures.training_curves(alphas)
# END

# %% [markdown]
# ## 6 Does DPO alone lower the chosen completions?
#
# In the [paper's figure 3a](https://arxiv.org/html/2404.19733v3#S3.SS1) it does, for Llama-2-70B on GSM8K. One short run
# cannot settle this for our model. `scripts/studies/pair_log_probabilities.py` ran one iteration from M_0 with three
# methods, two learning rates and several seeds. It stored the log-probability of *each* of 256 held-out pairs.

# %% tags=["nbval-ignore-output"]
records = helpers_04.study()
rates = sorted({record["learning_rate"] for record in records})
pairs_per_seed = {len(record["chosen"][0]) for record in records}
assert pairs_per_seed == {256}
helpers_04.chosen_with_band(records, rates)

# %% [markdown]
# Bands are 95 % intervals over seeds and pairs. **Predict**: for DPO alone at the higher learning rate, does the interval
# exclude 0, and how many of the chosen completions rise?

# %%
print("learning rate  method     seeds  mean change of chosen (95 %)     median  rise")
for rate in rates:
    for method in ("DPO", "DPO + NLL", "SFT"):
        change = helpers_04.changes(records, method, rate, "chosen")          # (seeds, pairs), nats
        mean, low, high = seed_and_question_interval(change)
        verdict = "rises" if low > 0 else "falls" if high < 0 else "not resolved"
        print(f"{rate:<14.0e} {method:10} {len(change):<6} {mean:+.2f} ({low:+.2f} to {high:+.2f}) {verdict:13}",
              f"{np.median(change):+.2f}  {(change > 0).mean():.0%}")

# %% [markdown]
# Mean and median disagree. Look at the distribution.

# %% tags=["nbval-ignore-output"]
figure = helpers_04.change_histogram(records, max(rates))
assert "median" in plots.alt_text(figure)
figure

# %% [markdown]
# Most chosen completions rise by a nat or two. A few crash by 10 nats and more, and they carry the mean. Which ones?

# %%
held_out = helpers_04.held_out_pairs()

def shows_result(completion):
    """Does the last equation give the final answer?"""
    lines = completion.strip().split("\n")
    return len(lines) > 1 and lines[-2].split("=")[-1] == lines[-1].split(": ")[-1]

shown = np.array([shows_result(pair["chosen"]) for pair in held_out])
rejected_shown = np.mean([shows_result(pair["rejected"]) for pair in held_out])
print(f"last equation gives the answer: {shown.mean():.0%} of chosen, {rejected_shown:.0%} of rejected")
for method in ("DPO", "DPO + NLL", "SFT"):
    change = helpers_04.changes(records, method, max(rates), "chosen")
    print(f"{method:10} chosen with it {change[:, shown].mean():+6.2f} nats, without it {change[:, ~shown].mean():+6.2f}")

worst = helpers_04.changes(records, "DPO", max(rates), "chosen").mean(0).argsort()[:2]
for i in worst:
    print(repr(held_out[i]["chosen"].strip()))

# %% [markdown]
# The chosen completions that crash look like *rejected* ones: their answer does not come from their working, and it
# happens to be correct. Training lowers this style, and them with it. It is section 3's mechanism, in a small group.
# What can we claim?

# %%
def compare(text, values):
    mean, low, high = seed_and_question_interval(values)
    verdict = "yes" if low > 0 else "no, the opposite" if high < 0 else "not resolved"
    print(f"{text:52} {verdict:17} {mean:+.2f} ({low:+.2f} to {high:+.2f})")

for rate in rates:
    dpo, nll, sft = (helpers_04.changes(records, m, rate, "chosen") for m in ("DPO", "DPO + NLL", "SFT"))
    print(f"learning rate {rate:.0e}, nats:")
    compare("  DPO alone lowers chosen completions", -dpo)
    compare("  DPO alone lowers those without their working", -dpo[:, ~shown])
    compare("  the NLL term raises chosen, against DPO alone", nll - dpo)
    compare("  SFT raises chosen more than DPO + NLL", sft - nll)
    compare("  SFT lowers rejected completions", -helpers_04.changes(records, "SFT", rate, "rejected"))

# %% [markdown]
# At 1e-4 chosen completions rise with every method, and the NLL term makes no difference that we can measure. At 3e-4
# the question of this section is *not resolved*: most chosen completions rise, and a few crash. What holds at both
# learning rates is the tail. SFT lowers rejected completions; in the paper's figure 2a it raises them.
#
# The NLL term is not needed everywhere: [Lanchantin et al. 2025](https://arxiv.org/abs/2506.21495) find no benefit with
# Llama-3.1-8B.

# %% [markdown]
# ## What you have learnt
#
# - DPO is maximum likelihood under Bradley–Terry with the reward β times log-ratio; $Z$ cancels.
# - It pushes chosen up and rejected down with force $\beta\,\sigma(-\beta\delta)$. Both can still fall.
# - DPO sums over tokens; the NLL divides each chosen completion by its own length.
# - A mean can hide a heavy tail: plot every pair.
#
# **Try**: change the features in section 3 until DPO alone raises the chosen completion.
#
# **Recall**
#
# 1. Why can DPO ignore $Z(x)$?
# 2. Which log-probabilities are summed, which averaged, and which tokens are in neither?
# 3. Your DPO term is 0.6931 at step 200. What do you suspect?
# 4. When does DPO alone lower chosen completions?
#
# <details><summary>Answers</summary>
#
# 1. It depends on the question alone, and Bradley–Terry takes a difference. 2. Summed: both sides in the DPO term.
# Averaged over its own tokens: chosen in the NLL term. In neither: prompt and padding. 3. Nothing is trained, or the
# reference moves along. 4. When they resemble rejected ones.
#
# </details>
#
# <details><summary>Typical misunderstandings</summary>
#
# - "ln 2 shows that the reference is right." It shows that the reference is the start, not which model that is.
# - "The first *loss* is not ln 2, so something is broken." Only the DPO term is ln 2.
#
# </details>
#
# **Next**: [05 · Iterations](05_iterations.ipynb) puts all stages into a loop.
