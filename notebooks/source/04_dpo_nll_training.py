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
# - write the loss of Iterative RPO from log-probabilities, and say what in it is a sum, what a mean, and over what;
# - test a loss for free: $\ln 2$ at the first step, derivatives against autograd, values against another library;
# - quantise a layer to NF4 and put a LoRA on it with your own hands, and count the memory that both save;
# - train M_1 and read the curves of winners and losers with and without the NLL term.
#
# | | `smoke` | `cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook | 25 seconds on one core | 2 minutes on one core | not measured here |
#
# **Needs**: the packages of this repository, nothing else.
#
# **Before this**: [03 · Pairs](03_pairs.ipynb), which makes what is trained on here.

# %%
import os, sys
sys.path[:0] = [".", ".."]                     # checks_04.py lies beside the notebooks; ".." serves the solutions
PROFILE = os.environ.get("IRPO_PROFILE", "cpu")     # the one setting: "cpu", "smoke", or a GPU profile such as "qwen2.5-0.5b"

# %%
# NBVAL_IGNORE_OUTPUT
import platform
from importlib.metadata import version

import torch
from irpo_utils import models, profiles
from irpo_utils.ops.cli import quiet_libraries

quiet_libraries()                              # no loading bars
torch.set_printoptions(precision=4, sci_mode=False)
profile = profiles.get(PROFILE)
print("python", platform.python_version(), *(f"· {name} {version(name)}" for name in ("torch", "transformers", "trl")))
print("profile", PROFILE, "· device", models.default_device(), "· seed", profile.seed)
assert models.default_device() in ("cpu", "cuda")

# %% [markdown]
# ## 1 The log-probability of an answer
#
# A language model gives one number for each token of its vocabulary, the logits, at each position. Here is a vocabulary of
# five tokens and an answer of three. Row 0 is the model's opinion on the first token of the answer, and so on.

# %%
vocabulary = ["3", "4", "+", "=7", "<end>"]
logits = torch.tensor([[2.0, 0.0, 1.0, 0.0, -1.0],
                       [0.0, 3.0, 0.0, 1.0, 0.0],
                       [0.0, 0.0, 0.0, 0.0, 4.0]])
answer = torch.tensor([0, 3, 4])               # "3", "=7", "<end>"
logps = torch.log_softmax(logits, dim=-1)
print(logps)

# %% [markdown]
# `log_softmax` turns logits into logarithms of probabilities, in [nats](../docs/glossary.md#nat): each row of
# `logps.exp()` adds up to 1. Of each row only the token that the answer really has is needed. `gather` picks it.

# %%
picked = logps.gather(-1, answer[:, None]).squeeze(-1)
print("per token:   ", picked)
print("whole answer:", picked.sum())

# %% [markdown]
# The probability of the whole answer is a product over its tokens, so its logarithm is this sum. Note the end token: it is
# part of the answer. A model that is never trained to end does not end
# ([a common complaint](https://github.com/huggingface/trl/issues/734)).
#
# **Predict**: the question stands before the answer in the same row of tokens. Which logits predict the answer's *first*
# token: those at its own position, or those one place before?

# %% [markdown]
# One place before: the logits at position $i$ see the tokens up to $i$ and predict token $i+1$. An answer at positions
# $P$ to $P+R-1$ therefore needs the logits of $P-1$ to $P+R-2$. Questions have different lengths, so the batch is padded:
# questions on the left, answers on the right. Then all answers begin in the same column.

# %%
from irpo_utils import logprobs

prompts, answers = [[0, 2], [1]], [[3, 0, 4], [2, 4]]
batch = logprobs.pad_batch(prompts, answers, pad_id=9)
print(batch["input_ids"])
print(batch["response_mask"])

# %% [markdown]
# Nine is the padding. The mask says which columns of the answer block are real. Now by hand, with logits that we choose:
# walk over the tokens of each answer and add up.

# %%
all_logits = torch.sin(torch.arange(2 * 5 * 10.0)).view(2, 5, 10)   # rows, positions, vocabulary
by_hand = []
for row, tokens in enumerate(answers):
    logp = torch.log_softmax(all_logits[row], -1)
    # Answers begin in column 2, so the logits of column 1 predict their first token.
    by_hand.append(sum(logp[1 + i, token] for i, token in enumerate(tokens)))
print(torch.stack(by_hand))

# %% [markdown]
# The module does the same for a real model. We hand it a stand-in that returns our logits.

# %%
from types import SimpleNamespace

def stand_in(logits_to_keep, **inputs):
    return SimpleNamespace(logits=all_logits[:, -logits_to_keep:])

by_module = logprobs.response_logps(stand_in, batch).sum(-1)
print(by_module)
assert torch.allclose(by_module, torch.stack(by_hand))

# %% [markdown]
# The tokens of the question are conditioned on and never scored: they are in no term of the loss.

# %% [markdown]
# ## 2 The DPO term
#
# $$L_\text{DPO} = -\log\sigma(h), \qquad
# h = \beta\,\big[\log M_\theta(w|x) - \log M_t(w|x)\big] - \beta\,\big[\log M_\theta(l|x) - \log M_t(l|x)\big]$$
#
# $w$ is the winner, $l$ the loser, $M_\theta$ the model being trained, and $M_t$ the
# [reference](../docs/glossary.md#reference-model): the model that wrote both
# ([section 2](https://arxiv.org/html/2404.19733v3#S2)). $h$ is the [margin](../docs/glossary.md#reward-margin). Three pairs,
# as sums of log-probabilities:

# %%
beta = 0.1
logps_chosen, ref_chosen = torch.tensor([[-12.0, -30.0, -8.0], [-13.0, -30.0, -6.0]])
logps_rejected, ref_rejected = torch.tensor([[-15.0, -20.0, -9.0], [-13.0, -20.0, -5.0]])

ratio_chosen, ratio_rejected = logps_chosen - ref_chosen, logps_rejected - ref_rejected
print("winner against reference:", ratio_chosen)
print("loser against reference: ", ratio_rejected)

# %% [markdown]
# **Predict**: in the third pair the winner has become *less* probable than it was under the reference. Is DPO unhappy about
# that? Rank the three pairs by their loss.

# %%
h = beta * (ratio_chosen - ratio_rejected)
loss_dpo = -torch.nn.functional.logsigmoid(h)
print("margin:", h)
print("loss:  ", loss_dpo)

# %% [markdown]
# It is quite content: the loser fell further, so the third pair has a lower loss than the second, where nothing moved.
# DPO looks at the *difference* only. It can be lowered while the winner sinks, as
# [users see](https://github.com/huggingface/trl/issues/800) and as [Smaug](https://arxiv.org/abs/2402.13228) shows in
# theory. This is the gap that the NLL term fills.

# %% [markdown]
# **Predict**: before the first step $M_\theta = M_t$. What is the loss then, whatever the data?

# %%
import math

h_at_start = beta * ((ref_chosen - ref_chosen) - (ref_rejected - ref_rejected))
at_start = -torch.nn.functional.logsigmoid(h_at_start)
print(at_start, "ln 2 =", round(math.log(2), 4))
assert torch.allclose(at_start, torch.full((3,), math.log(2)))

# %% [markdown]
# Both ratios are 1, so $h = 0$ and $-\log\sigma(0) = \ln 2$. It is a free test of every training run. Another number at step
# 0: the reference is not the model that you start from. *Still* that number later: nothing is being trained
# ([such a case](https://github.com/huggingface/trl/issues/1962)).

# %% [markdown]
# ## 3 The NLL term
#
# $$L_\text{NLL} = -\frac{\log M_\theta(w|x)}{|w|}$$
#
# The winner's [negative log-likelihood](../docs/glossary.md#nll-term), divided by the number of tokens of *this* winner,
# end token included. The DPO term keeps its plain sums. Averaging those, too, is a common slip
# ([and it does harm](https://github.com/huggingface/trl/issues/789)): a margin is about whole answers.

# %%
n_tokens = torch.tensor([24, 60, 8])
loss_nll = -logps_chosen / n_tokens
print(loss_nll)

# %% [markdown]
# The second winner has 60 tokens and weighs no more than the first with 24: both pay half a nat per token. The whole loss of
# a pair is $L_\text{DPO} + \alpha L_\text{NLL}$, and of a batch the mean over its pairs. The paper tries 0.25, 0.5, 1 and 2 for $\alpha$ and
# takes 1. In its first version $\alpha$ stood before the DPO term ([noted here](https://github.com/huggingface/trl/issues/1868));
# at $\alpha = 1$ that makes no difference.
#
# The module:

# %%
from irpo_utils import training

dpo, nll = training.dpo_nll_loss(logps_chosen, logps_rejected, ref_chosen, ref_rejected, n_tokens,
                                 alpha=1.0, beta=beta)
assert torch.allclose(dpo, loss_dpo) and torch.allclose(nll, loss_nll)
print("loss per pair:", dpo + 1.0 * nll)

# %% [markdown]
# ### Exercise 4.1: the loss in one piece
#
# **Goal**: write Eq. 1 as one function. **Difficulty**: 1 of 3. **Time**: 10 minutes.
#
# `my_loss` takes tensors of shape (batch,): four sums of log-probabilities and the number of tokens of each winner. It
# returns the whole loss *per pair*, DPO + α NLL, shape (batch,).
#
# <details><summary>Hint</summary>
#
# Two ratios, their difference times β, `torch.nn.functional.logsigmoid`. Then the NLL: no reference in it, and each winner
# has its own divisor.
#
# </details>

# %%
def my_loss(logps_chosen, logps_rejected, ref_chosen, ref_rejected, n_tokens, alpha, beta):
    # SOLUTION
    h = beta * ((logps_chosen - ref_chosen) - (logps_rejected - ref_rejected))
    return -torch.nn.functional.logsigmoid(h) - alpha * logps_chosen / n_tokens
    # STUB
    # return None      # your turn
    # END

# %%
import checks_04
print(checks_04.loss(my_loss))

# %% [markdown]
# The worked solution is in [solutions/04_dpo_nll_training.ipynb](solutions/04_dpo_nll_training.ipynb).

# %% [markdown]
# ## 4 Which way it pushes
#
# A loss is understood by its derivatives. With $(\log\sigma)'(h) = \sigma(-h)$:
#
# $$\frac{\partial L}{\partial \log M_\theta(w)} = -\beta\,\sigma(-h) - \frac{\alpha}{|w|}$$
#
# The first part is large while the pair is ordered wrongly, and fades once the margin is wide. The second never fades.
# Autograd agrees:

# %%
alpha, w = 1.0, logps_chosen.clone().requires_grad_()
dpo, nll = training.dpo_nll_loss(w, logps_rejected, ref_chosen, ref_rejected, n_tokens,
                                 alpha=alpha, beta=beta)
(dpo + alpha * nll).sum().backward()

formula = -beta * torch.sigmoid(-h) - alpha / n_tokens
print(w.grad, formula, sep="\n")
assert torch.allclose(w.grad, formula)

# %% [markdown]
# **Predict**: at step 0, with the paper's α = 1 and β = 0.1, which part pushes a winner of 10 tokens harder, DPO or NLL?
# And one of 200 tokens?

# %%
print("tokens   DPO    NLL")
for tokens in (5, 10, 20, 50, 200):
    print(f"{tokens:6} {0.1 * 0.5:6.3f} {1.0 / tokens:6.3f}")

# %% [markdown]
# They are equal at 20 tokens. On shorter winners the NLL rules, on longer ones DPO does, at least at the start. So the same α = 1
# is a strong pull for the short answers of a small task and a weak one for the long answers of a real model. Bear that in
# mind when two papers disagree about the NLL term.

# %% [markdown]
# ### Exercise 4.2: the push on the loser
#
# **Goal**: derive one derivative on paper and check it by machine. **Difficulty**: 2 of 3. **Time**: 10 minutes.
#
# Write `gradient_rejected`: the derivative of the loss of each pair with respect to the loser's log-probability. No
# autograd, one formula.
#
# <details><summary>Hint</summary>
#
# $L$ depends on the loser through $h$ only: $\partial L / \partial h = -\sigma(-h)$, times $\partial h / \partial \log M_\theta(l)$.
# Mind the two minus signs. A positive derivative means that training pushes the number down.
#
# </details>

# %%
def gradient_rejected(logps_chosen, logps_rejected, ref_chosen, ref_rejected, n_tokens,
                      alpha, beta):
    # SOLUTION
    h = beta * ((logps_chosen - ref_chosen) - (logps_rejected - ref_rejected))
    return beta * torch.sigmoid(-h)
    # STUB
    # return None      # your turn
    # END

# %%
print(checks_04.gradient_rejected(gradient_rejected))

# %% [markdown]
# The worked solution is in [solutions/04_dpo_nll_training.ipynb](solutions/04_dpo_nll_training.ipynb).

# %% [markdown]
# ## 5 What TRL averages instead
#
# TRL is the library under this package. It can add the same two terms, `loss_type=["sigmoid", "sft"]`, but its `sft` term is
# a mean over *all tokens of all winners of a batch*. Take two winners of 60 and 300 tokens, at 0.5 and 2 nats per token.
#
# **Predict**: Eq. 1 gives their mean, 1.25. Will the mean over tokens be higher or lower?

# %%
lengths, per_token = torch.tensor([60.0, 300.0]), torch.tensor([0.5, 2.0])
shares = lengths / lengths.sum()
print(f"per sequence: {per_token.mean():.2f}  (weights 0.50 and 0.50)")
over_tokens = (shares * per_token).sum()
print(f"per token:    {over_tokens:.2f}  (weights {shares[0]:.2f} and {shares[1]:.2f})")

# %% [markdown]
# Higher: the long winner now counts five times as much. Where long and short answers suit different questions, that is
# another training signal. The [discussion in TRL](https://github.com/huggingface/trl/pull/1705) knew and accepted it. At one
# pair per device both agree, which is why it is easily overlooked.
#
# Now with the real library. Two pairs whose winners have 60 and 300 tokens; TRL appends the end token itself.

# %%
from datasets import Dataset

question = "Question: Mia has 24 shells. Mia finds 13 more. How many shells are there?\nSolution:"
two_pairs = Dataset.from_list([
    {"prompt": question, "chosen": "24+13=37\n" * 6 + "24+13", "rejected": "Final answer: 3"},
    {"prompt": question, "chosen": "7" * 299, "rejected": "Final answer: 12"}])

# %% [markdown]
# The reference is the seed model. The model in training is a copy with a little noise on its weights, so that the DPO term
# is not just $\ln 2$.

# %%
from transformers import AutoModelForCausalLM

seed_folder = models.FOLDERS["seed"]
tokenizer = models.load_tokenizer(str(seed_folder))
reference, policy = (AutoModelForCausalLM.from_pretrained(seed_folder, dtype=torch.float32)
                     for _ in range(2))
generator = torch.Generator().manual_seed(0)
with torch.no_grad():
    for weight in policy.parameters():
        weight += 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)

# %%
import tempfile
from trl import DPOConfig, DPOTrainer

config = DPOConfig(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0], beta=0.1,
                   per_device_train_batch_size=2, max_length=None, output_dir=tempfile.mkdtemp(),
                   use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)
trainer = DPOTrainer(policy, reference, config, train_dataset=two_pairs, processing_class=tokenizer)
trl_batch = next(iter(trainer.get_train_dataloader()))
trl_loss = trainer.compute_loss(policy, trl_batch).item()
print("tokens of the two winners:", sorted(trl_batch["completion_mask"].sum(1).tolist()[:2]))

# %% [markdown]
# And ours, on the same tokens, with both ways of averaging.

# %%
# NBVAL_IGNORE_OUTPUT
def ids(text, end=(tokenizer.eos_token_id,)):
    return tokenizer(text, add_special_tokens=False).input_ids + list(end)

@torch.no_grad()
def logps_of(model, side):
    prompts, answers = [ids(q, end=()) for q in two_pairs["prompt"]], [ids(a) for a in two_pairs[side]]
    batch = logprobs.pad_batch(prompts, answers, tokenizer.pad_token_id)
    return logprobs.response_logps(model, batch).sum(-1)

scores = [logps_of(model, side) for model in (policy, reference) for side in ("chosen", "rejected")]
dpo, nll = training.dpo_nll_loss(*scores, lengths, alpha=1.0, beta=0.1)
over_tokens = (dpo.mean() - scores[0].sum() / lengths.sum()).item()
per_sequence = (dpo + nll).mean().item()
print(f"TRL {trl_loss:.4f}, ours over all tokens {over_tokens:.4f}, Eq. 1 {per_sequence:.4f}")
assert abs(trl_loss - over_tokens) < 1e-3 < abs(trl_loss - per_sequence)

# %% [markdown]
# With TRL's averaging our numbers equal TRL's, which checks the DPO term and the log-probabilities by an independent
# implementation. With the paper's averaging they differ. `training.train` therefore has a loss of its own in TRL's
# trainer; `loss="dpo_nll_per_token"` gives TRL's for comparison.

# %% [markdown]
# ### Exercise 4.3: find the bug
#
# **Goal**: read a loss with distrust. **Difficulty**: 2 of 3. **Time**: 10 minutes.
#
# `batch_nll` below was written for Eq. 1. It takes `token_logps` of shape (batch, columns) and a `mask` of the same shape, 1
# on the winner's tokens and 0 on padding, and should return one number for the batch. It runs, it falls in training, and
# it is wrong. Mend it.
#
# <details><summary>Hint</summary>
#
# Two winners in one batch: what does each of them get divided by? Which number *should* it be divided by, and where in the
# mask does that stand?
#
# </details>

# %%
def batch_nll(token_logps, mask):
    # SOLUTION
    return -((token_logps * mask).sum(-1) / mask.sum(-1)).mean()
    # STUB
    # return -(token_logps * mask).sum() / mask.sum()      # the suspect: mend this line
    # END

# %%
print(checks_04.batch_nll(batch_nll))

# %% [markdown]
# The worked solution is in [solutions/04_dpo_nll_training.ipynb](solutions/04_dpo_nll_training.ipynb).

# %% [markdown]
# ## 6 NF4: a weight in four bits
#
# The paper trains all weights of a 70-billion-parameter model on 64 large GPUs. We do it as most people must: the base
# is frozen and stored in four bits, and a small adapter is trained beside it
# ([QLoRA, Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)). Here is one layer of the seed model.

# %%
from safetensors.torch import load_file

weights = load_file(seed_folder / "model.safetensors")
weight = weights["model.layers.0.self_attn.q_proj.weight"]
print(tuple(weight.shape), weight.dtype, weight.numel() * 4, "bytes")

# %% [markdown]
# **Step 1: blocks.** Cut the weights into [blocks of 64](../docs/glossary.md#block-wise-quantisation) and divide each by its
# largest absolute value, its *absmax*. Every block then lies between -1 and 1, and an outlier spoils 64 weights, not all.

# %%
blocks = weight.view(-1, 64)
absmax = blocks.abs().amax(1)
scaled = blocks / absmax[:, None]
print(f"{len(blocks)} blocks; absmax from {absmax.min():.3f} to {absmax.max():.3f}")
assert scaled.abs().max() == 1

# %% [markdown]
# **Step 2: sixteen levels.** Four bits can name sixteen numbers. **Predict**: should these be evenly spaced from -1 to 1?
# Look where the weights are.

# %%
counts = torch.histc(scaled, bins=8, min=-1.0, max=1.0)
for i, count in enumerate(counts.tolist()):
    print(f"{i / 4 - 1:5.2f} to {(i + 1) / 4 - 1:5.2f}  {'#' * round(count / 70)}")

# %% [markdown]
# No. Most weights lie near 0, much as in a normal distribution, and levels should stand where the weights are.
# [NF4](../docs/glossary.md#nf4) takes quantiles of the normal distribution: eight steps on the positive side, seven on the
# negative one, and an exact 0 between, all divided by the largest.

# %%
from statistics import NormalDist

def quantiles(n, edge=0.9677083):        # edge: so that the outermost quantile is not infinite
    return [NormalDist().inv_cdf(edge + (0.5 - edge) * i / n) for i in range(n)]

levels = torch.tensor([-q for q in quantiles(7)] + [0.0] + quantiles(8)[::-1])
levels = levels / levels.max()
print(levels)

# %% [markdown]
# These sixteen numbers are the same for every model; bitsandbytes has them built in. Each weight is replaced by the index
# of its nearest level.

# %%
from bitsandbytes import functional as bnb

index = (scaled[..., None] - levels).abs().argmin(-1)
print("weights:", blocks[0, :6])
print("scaled: ", scaled[0, :6])
print("index:  ", index[0, :6])
print("level:  ", levels[index[0, :6]])
assert torch.allclose(levels, bnb.get_4bit_type("nf4", device="cpu"), atol=1e-6)

# %% [markdown]
# **Step 3: two in a byte.** An index needs four bits, so two of them share a byte: 16 times the first plus the second.
# bitsandbytes stores exactly these bytes.

# %%
packed = (16 * index.flatten()[0::2] + index.flatten()[1::2]).to(torch.uint8)
stored, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
print(packed[:8], len(packed), "bytes")
assert torch.equal(packed, stored.flatten())

# %% [markdown]
# **Step 4: the absmax costs, too.** 32 bits for every 64 weights is half a bit per weight.
# [Double quantisation](../docs/glossary.md#double-quantisation) stores them in 8 bits: subtract their mean, take groups of
# 256, divide each by its own absmax, and use the nearest of 256 fixed levels, which stand closer together near 0.

# %%
eight_bit_levels = bnb.create_dynamic_map()
groups = (absmax - absmax.mean()).view(-1, 256)
group_absmax = groups.abs().amax(1, keepdim=True)
nearest = ((groups / group_absmax)[..., None] - eight_bit_levels).abs().argmin(-1)
absmax_again = (eight_bit_levels[nearest] * group_absmax).flatten() + absmax.mean()
print("absmax before:", absmax[:5])
print("absmax after: ", absmax_again[:5])

# %% [markdown]
# Put together: level times absmax, and we have the weight that the model computes with. It equals what bitsandbytes
# dequantises to.

# %%
dequantised = (levels[index] * absmax_again[:, None]).view_as(weight)
module = bnb.dequantize_4bit(stored, state)
assert torch.allclose(dequantised, module, atol=1e-6)
print("weights:    ", weight[0, :5])
print("dequantised:", dequantised[0, :5])

# %% [markdown]
# **Predict**: sixteen levels a block. How far off are the weights now, on average: 1 %, 10 % or 50 % of their size?

# %%
bits = 4 + 8 / 64 + 32 / (64 * 256)
error = (dequantised - weight).abs().mean() / weight.abs().mean()
print(f"{bits:.3f} bits per weight; without double quantisation {4 + 32 / 64:.3f}; before 32")
print(f"mean error {error:.0%} of the mean weight")

# %% [markdown]
# Not small. A network bears it because such errors are many and have no common direction, and because we *sample and train
# with the same rounded weights*: M_0 here is the rounded model. What must not be done is to merge a trained adapter into
# the four bits: its small changes would be rounded away
# ([measured by users](https://github.com/huggingface/transformers/issues/31293)).

# %% [markdown]
# One honest footnote. On a CPU bitsandbytes rounds an absmax now and then to the *other* neighbour, where it lies almost midway between
# two levels. So the by-hand way, as a function, over all 28 layers:

# %%
# NBVAL_IGNORE_OUTPUT
def nf4_by_hand(weight):
    scale = weight.view(-1, 64).abs().amax(1)
    index = (weight.view(-1, 64, 1) / scale[:, None, None] - levels).abs().argmin(-1)
    groups = (scale - scale.mean()).view(-1, 256)
    top = groups.abs().amax(1, keepdim=True)
    nearest = ((groups / top)[..., None] - eight_bit_levels).abs().argmin(-1)
    scale = (eight_bit_levels[nearest] * top).flatten() + scale.mean()
    return (levels[index] * scale[:, None]).view_as(weight)

equal = []
for matrix in (weights[name] for name in weights if "proj" in name):
    packed = bnb.quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=True)
    equal.append(((nf4_by_hand(matrix) - bnb.dequantize_4bit(*packed)).abs() < 1e-6).flatten())
equal = torch.cat(equal)
print(f"{equal.sum():,} of {len(equal):,} weights equal, {equal.float().mean():.2%}")
assert equal.float().mean() > 0.99

# %% [markdown]
# ## 7 LoRA: a small change beside a frozen weight
#
# With [LoRA](../docs/glossary.md#lora) the layer becomes $y = Wx + \frac{a}{r} B A x$ with $A$ of shape $(r, \text{in})$ and $B$ of shape
# $(\text{out}, r)$ ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)). $W$ is frozen, $A$ begins random, $B$ begins at zero, and $a$ is a
# fixed number, here 32, which the libraries call `lora_alpha`. It has nothing to do with the α of the loss.

# %%
r, a = 2, 4
W, x = torch.ones(3, 4), torch.tensor([1.0, 2.0, 3.0, 4.0])
A = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]], requires_grad=True)
B = torch.zeros(3, r, requires_grad=True)
y = W @ x + a / r * B @ (A @ x)
print(y.detach())
assert torch.equal(y, W @ x)

# %% [markdown]
# With $B = 0$ the layer does what it did before: M_0 *is* the base with a zero adapter, and the reference costs no second
# copy of the model.
#
# **Predict**: at the very first step, which of $A$ and $B$ has a gradient?

# %%
y.sum().backward()
print("gradient of A:", A.grad, "gradient of B:", B.grad, sep="\n")

# %% [markdown]
# Only $B$: the gradient of $A$ has $B$ as a factor. After one step $B$ is no longer zero and both learn. If both began at
# zero, neither ever would.
#
# Now the real thing: a quantised layer of the seed model with its adapter, against our formula.

# %%
seed_model, _ = models.load("seed", device="cpu")
layer = seed_model.get_base_model().model.layers[0].self_attn.q_proj
A, B = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
B += torch.sin(torch.arange(B.numel()).float()).view_as(B)           # as if trained
x = torch.cos(torch.arange(128.0))
assert torch.allclose(layer(x), dequantised @ x + 32 / 16 * B @ (A @ x), atol=1e-4)
base = layer.base_layer.weight
print("base", tuple(base.shape), base.dtype, " A", tuple(A.shape), " B", tuple(B.shape))

# %% [markdown]
# The base weight shows as a column of bytes, two weights in each. That is QLoRA, whole: section 6 under section 7.

# %% [markdown]
# ### Exercise 4.4: count what is trained
#
# **Goal**: foresee the size of an adapter. **Difficulty**: 1 of 3. **Time**: 5 minutes.
#
# `lora_parameters(shapes, r)` takes a list of (out, in) shapes of linear layers and returns how many numbers LoRA matrices
# of rank `r` on all of them have.
#
# <details><summary>Hint</summary>
#
# One $A$ and one $B$ a layer. Their shapes stand at the head of this section.
#
# </details>

# %%
def lora_parameters(shapes, r):
    # SOLUTION
    return sum(r * (d_out + d_in) for d_out, d_in in shapes)
    # STUB
    # return None      # your turn
    # END

# %%
print(checks_04.lora_parameters(lora_parameters))

# %% [markdown]
# The worked solution is in [solutions/04_dpo_nll_training.ipynb](solutions/04_dpo_nll_training.ipynb).

# %% [markdown]
# ## 8 Memory: all weights or QLoRA
#
# Each block of a Llama or Qwen model has seven matrices. Their sizes follow from a few numbers in the model's
# `config.json`.

# %%
# name: (hidden size, blocks, feed-forward, width of keys and values, vocabulary, embedding matrices)
SIZES = {"seed": (128, 4, 384, 128, 1097, 1),
         "SmolLM2-135M": (576, 30, 1536, 192, 49152, 1),
         "Qwen2.5-0.5B": (896, 24, 4864, 128, 151936, 1),
         "Qwen2.5-1.5B": (1536, 28, 8960, 256, 151936, 1),
         "Llama-3.2-1B": (2048, 16, 8192, 512, 128256, 1),
         "Llama-3.1-8B": (4096, 32, 14336, 1024, 128256, 2),
         "Llama-2-70B": (8192, 80, 28672, 1024, 32000, 2)}

def linear_shapes(d, n_blocks, ffn, kv, *_):
    """(out, in) of all linear layers: queries, keys, values, output, gate, up, down."""
    return n_blocks * [(d, d), (kv, d), (kv, d), (d, d), (ffn, d), (ffn, d), (d, ffn)]

# %% [markdown]
# Bytes per number. **All weights**: bf16 weight 2 and gradient 2, fp32 master copy 4, two Adam moments 8, together 16; and
# 2 more for the reference. **QLoRA**: the base at the bits counted above for linear layers and 16 bits for embeddings, the adapter
# at 16 bytes; the reference is the same base, scored before training, so it needs nothing.

# %%
def gigabytes(name, r=16):
    d, _, _, _, vocabulary, copies = SIZES[name]
    linear = sum(d_out * d_in for d_out, d_in in linear_shapes(*SIZES[name]))
    adapter = sum(r * (d_out + d_in) for d_out, d_in in linear_shapes(*SIZES[name]))
    embedding = copies * vocabulary * d
    full = 18 * (linear + embedding)
    qlora = bits / 8 * linear + 2 * embedding + 16 * adapter
    return linear + embedding, adapter, full / 1e9, qlora / 1e9

print(f"{'model':14}{'weights':>16}{'adapter':>14}{'all weights':>15}{'QLoRA':>12}{'factor':>8}")
for name in SIZES:
    n_weights, n_adapter, full, qlora = gigabytes(name)
    print(f"{name:14}{n_weights:16,}{n_adapter:14,}{full:12.3f} GB{qlora:9.3f} GB", end="")
    print(f"{full / qlora:8.1f}")

# %% [markdown]
# Norms and biases are left out, about a thousandth at most. The last line tells why the paper needs many
# [GPUs of 80 GB](https://arxiv.org/html/2404.19733v3#S3) for training, and why one such card could hold the same model
# with QLoRA. What is *not* in the table: activations and logits, which grow with batch and length. `micro_batch_size` and
# `gradient_checkpointing` lower those.
#
# Is the estimate true? Count the bytes of the seed model that we have loaded.

# %%
from irpo_utils.ops import export

held, layers = 0, 0
for module in seed_model.modules():
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is not None and not hasattr(module, "lora_A"):
        layers += 1
        held += module.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
expected = bits / 8 * sum(d_out * d_in for d_out, d_in in linear_shapes(*SIZES["seed"]))
print(f"{layers} layers, {held:,} bytes, expected {expected:,.0f}")
assert abs(held / expected - 1) < 0.01
assert gigabytes("seed")[1] == export.describe(seed_model)["adapter_parameters"]

# %% [markdown]
# ## 9 Train M_1
#
# Now the model of your profile. The pairs come from your own finished run of this profile if there is one, else from the run
# that ships with the repository if it used the same model, else they are made now from 64 questions.

# %%
# NBVAL_IGNORE_OUTPUT
from pathlib import Path
from irpo_utils import grading, pairs, sampling, tasks
from irpo_utils.ops import run as runs

def fits(run):
    if not (run / "iteration_0/pairs").exists():
        return False
    settings = runs.read_profile(run)
    return (settings.model, settings.task) == (profile.model, profile.task)

root = next(up for up in (Path("."), Path(".."), Path("../..")) if (up / "irpo_utils").is_dir())
places = (root / "runs" / PROFILE, root / "notebooks/shipped_run")
run = next((place for place in places if fits(place)), None)
print("pairs from:", run.name if run else "M_0, made now")
assert run is None or fits(run)

# %%
# NBVAL_IGNORE_OUTPUT
from datasets import load_from_disk

task = tasks.get(profile.task)
model, tokenizer = runs.load_model(profile)
engine = runs.engine_of(profile)               # how this profile samples and trains
if run:
    preferences = load_from_disk(str(run / "iteration_0/pairs"))
else:
    questions = task.load("train", profile.data).select(range(64))
    samples = sampling.sample(model, tokenizer, questions, task, n=profile.n_samples,
                              temperature=profile.temperature_of(0),
                              max_new_tokens=profile.max_new_tokens,
                              batch_size=profile.sampling_batch_size, progress=False, engine=engine)
    preferences, _ = pairs.build_pairs(grading.grade(samples, task), k=profile.k_pairs)
first = preferences[0]
print(len(preferences), "pairs, for example", repr(first["chosen"]),
      "rather than", repr(first["rejected"]), sep="\n")
assert len(preferences) > 0

# %% [markdown]
# Three trainings from the same M_0 on the same pairs: **DPO + NLL** (the method), **DPO** alone (α = 0), and **SFT** on the
# chosen completions (`loss="sft"`; one round of [STaR](../docs/glossary.md#star) in the paper). A *probe*, a few fixed pairs, is scored
# every few steps in all three. The learning rate is fifteen times the profile's, so that one short training shows what
# the run does gently over several iterations.

# %%
import pandas as pd
from irpo_utils.ops.trainer import Probe
from irpo_utils.ops.warnings import CollapseWarning

STEPS, PROBE = (4, 16) if PROFILE == "smoke" else (60, 64)
RATE = 15 * profile.learning_rate
data = preferences.shuffle(seed=0).select(range(min(STEPS * profile.batch_size, len(preferences))))
signs = []                                     # of a collapse, as the trainer sees them

def train(alpha, loss="dpo_nll"):
    """The training log, and the rows of the probe."""
    models.set_adapter(model, None)                            # back to M_0
    probe = Probe(data.select(range(min(PROBE, len(data)))), tokenizer, every=max(1, STEPS // 6))
    log = training.train(
        model, tokenizer, data, alpha, profile.beta, RATE, loss=loss, seed=profile.seed,
        batch_size=profile.batch_size, micro_batch_size=profile.micro_batch_size,
        trainer=engine.trainer(model), callbacks=[probe, CollapseWarning(signs.append)],
        gradient_checkpointing=profile.gradient_checkpointing, optim=profile.optimizer,
        disable_tqdm=True)
    return log.to_pandas(), pd.DataFrame(probe.rows)

# %% [markdown]
# Accuracy is measured on validation questions, greedily, before and after.

# %%
held_out = task.load("validation", profile.data).shuffle(seed=0)
held_out = held_out.select(range(20 if PROFILE == "smoke" else 100))

def greedy_right():
    answers = sampling.sample(model, tokenizer, held_out, task, n=1, temperature=0.0,
                              max_new_tokens=profile.max_new_tokens,
                              batch_size=profile.sampling_batch_size, progress=False, engine=engine)
    return grading.grade(answers, task)["correct"][:]

right, results = {"M_0": greedy_right()}, {}

# %% [markdown]
# **Predict**: what will `loss_dpo` be in the first row of the log?

# %%
# NBVAL_IGNORE_OUTPUT
results["DPO + NLL"] = train(alpha=1.0)
right["DPO + NLL"] = greedy_right()
log, _ = results["DPO + NLL"]
rounding = 1e-3 if model.dtype == torch.float32 else 0.05      # 16-bit sums differ between two batches
assert abs(log.loss_dpo[0] - math.log(2)) < rounding and log.loss_dpo.iloc[-1] < math.log(2)
shown = log.set_index("step").drop(columns=["seconds", "epoch"])
shown.iloc[[0, 1, len(log) // 2, -1]].round(4)

# %% [markdown]
# $\ln 2$, as it must. `logps/chosen` and `logps/rejected` are sums over an answer, `nll_chosen` is per token, `rewards/margins` is $h$, and
# `rewards/accuracies` the share of pairs with $h > 0$. These rows are of *different* pairs, so they jump about; the probe does not.
#
# **Predict** the probe's curves. With DPO alone, does the winners' log-probability rise or fall? And the *losers'* under
# SFT, which has never heard of losers?

# %%
# NBVAL_IGNORE_OUTPUT
for name, (alpha, loss) in {"DPO": (0.0, "dpo_nll"), "SFT": (1.0, "sft")}.items():
    results[name] = train(alpha, loss)
    right[name] = greedy_right()
assert set(results) == {"DPO + NLL", "DPO", "SFT"} <= set(right)

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils import plots

curves = {name: probe for name, (_, probe) in results.items()}
figure = plots.training_curves(curves)
assert all(len(curve) >= 2 for curve in curves.values()) and "DPO + NLL" in plots.alt_text(figure)
figure

# %% [markdown]
# ## 10 What agrees with the paper, and what does not
#
# The paper's figures 2 and 3 show the same curves for Llama-2-70B-chat on GSM8K, with these directions
# ([section 3.1](https://arxiv.org/html/2404.19733v3#S3.SS1)). The next cell holds them against your curves.

# %%
# NBVAL_IGNORE_OUTPUT
moved = {(name, side): curve[f"logps/{side}"].iloc[-1] - curve[f"logps/{side}"].iloc[0]
         for name, curve in curves.items() for side in ("chosen", "rejected")}
statements = [("DPO + NLL raises winners (figs. 2a, 3a)", moved["DPO + NLL", "chosen"], +1),
              ("DPO + NLL lowers losers (fig. 2a)", moved["DPO + NLL", "rejected"], -1),
              ("DPO alone lowers winners (fig. 3a)", moved["DPO", "chosen"], -1),
              ("DPO alone lowers losers (fig. 3a)", moved["DPO", "rejected"], -1),
              ("SFT raises winners (fig. 2a)", moved["SFT", "chosen"], +1),
              ("SFT raises losers, too (fig. 2a)", moved["SFT", "rejected"], +1)]
for text, nats, sign in statements:
    print(f"{text:40} {'agrees' if sign * nats > 0 else 'DISAGREES':10} {nats:+7.2f} nats")
print("winners, start, highest (at step) and end:")
for name, curve in curves.items():
    chosen = curve["logps/chosen"]
    print(f"  {name:10} {chosen.iloc[0]:6.2f} {chosen.max():6.2f} ({curve['step'][chosen.idxmax()]:3}) {chosen.iloc[-1]:6.2f}")
assert moved["DPO + NLL", "chosen"] > moved["DPO + NLL", "rejected"] and moved["SFT", "chosen"] > 0

# %% [markdown]
# With the default profile all but one agree, and three remarks are due.
#
# **DPO alone** raises the winners *first*, and then lets them fall while the gap goes on growing: follow the curve and not
# only its ends. (The callback `CollapseWarning` does, and warned above during training.) With the NLL term they turn as well, but less, and end above their start. With the profile's own, gentler learning rate one epoch ends before that turn. There DPO alone raises
# winners too, and the NLL term makes little difference. So the effect is real, and it depends on how far one goes.
#
# **Losers under SFT** disagree: here they fall. A reason may be the size of the numbers. Turn the log-probabilities into
# probabilities:

# %%
# NBVAL_IGNORE_OUTPUT
for side in ("chosen", "rejected"):
    start, end = (math.exp(curves["SFT"][f"logps/{side}"].iloc[i]) for i in (0, -1))
    print(f"{side:9} geometric mean probability under SFT: {start:.2g} -> {end:.2g}")
assert end > 0

# %% [markdown]
# A winner of our small task is a likely answer, and all answers to a question share 100 %. What winners gain, others have to
# give. In the paper's figures an answer's log-probability is minus some hundreds of nats. There no single answer holds a noticeable
# share, so winners and losers, alike in style, can rise together.

# %% [markdown]
# And the accuracies, which matter more than any curve. The paper has 73.1 % for DPO + NLL, 61.8 % for DPO, 65.2 % for SFT on
# winners and 55.6 % for M_0 ([Table 1](https://arxiv.org/html/2404.19733v3#S3.T1)).

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils import evaluation

for name, correct in right.items():
    low, high = evaluation.wilson_interval(sum(correct), len(correct))
    print(f"{name:10} {sum(correct) / len(correct):6.1%}  (95 % interval {low:.1%} to {high:.1%})")
print(len(held_out), "validation questions, greedy")
assert all(len(correct) == len(held_out) for correct in right.values())

# %% [markdown]
# **SFT** is the third remark: the paper has it far behind DPO + NLL, and here, after one round, it keeps up with the others or beats them.
# Intervals of this width decide nothing between the three; a sharper, paired comparison comes in notebook
# [05](05_iterations.ipynb). But look at what there is to imitate:

# %%
# NBVAL_IGNORE_OUTPUT
for side in ("chosen", "rejected"):
    texts = [text.strip() for text in preferences[side]]
    print(f"{side:9} with at least one line of working: {sum(chr(10) in text for text in texts) / len(texts):.0%}")
assert texts

# %% [markdown]
# Nearly all winners of our task show their working, and many losers do not. Imitating winners is then enough to learn the one thing
# that counts. Knowing what to *avoid* should matter more where winners and losers look alike, as on GSM8K, where both are
# chains of thought. That is a guess; a run with a real model can test it.

# %% [markdown]
# ## 11 When DPO alone lowers the winner
#
# The effect can be made in ten lines. A model with two parameters and three possible answers: a winner, a loser that
# resembles it, and a third that nobody asked about. An answer's logit is its feature vector times the parameters.

# %%
features = torch.tensor([[1.0, 0.2], [1.2, -0.2], [-1.0, 0.5]])     # winner, loser, third answer

def toy_training(alpha, steps=60):
    theta = torch.zeros(2, requires_grad=True)
    ref = torch.log_softmax(features @ theta, -1).detach()
    for _ in range(steps):
        logp = torch.log_softmax(features @ theta, -1)
        dpo, nll = training.dpo_nll_loss(logp[0], logp[1], ref[0], ref[1], 1, alpha=alpha, beta=1.0)
        [gradient] = torch.autograd.grad(dpo + alpha * nll, theta)
        theta = (theta - 0.5 * gradient).requires_grad_()
    return torch.softmax(features @ theta, -1).tolist()

# %% [markdown]
# **Predict**: training knows the winner and the loser only. Which of the three answers ends as the most probable under DPO
# alone? (All begin at a third.)

# %%
for alpha in (0.0, 1.0):
    winner, loser, third = toy_training(alpha)
    print(f"alpha {alpha:.0f}: winner {winner:.2f}, loser {loser:.2f}, third {third:.2f}")

# %% [markdown]
# The third. Winner and loser look alike, so the direction that separates them is a poor direction for raising the winner,
# and the probability goes to whatever lies along it. [Razin et al. 2024](https://arxiv.org/abs/2410.08847) call it
# [likelihood displacement](../docs/glossary.md#likelihood-displacement) and find that it comes with similar winners and losers.
# Long chains of thought that differ in one step are similar. Winners that show their working against losers that blurt out
# a number are not.

# %% [markdown]
# The NLL term repairs it here, since it is the only one that says *raise the winner*. It is not needed everywhere:
# [Lanchantin et al. 2025](https://arxiv.org/abs/2506.21495), among them authors of this paper, find no benefit with
# Llama-3.1-8B and fresher samples, and the [Online-DPO-R1](https://github.com/RLHFlow/Online-DPO-R1) authors measure 46.2 with
# the NLL term and 47.0 without.

# %% [markdown]
# ## What you have learnt
#
# - The DPO term works with sums over an answer and looks at a difference; the NLL divides each winner by its own length.
# - $\ln 2$ at step 0 tests the reference, autograd tests the derivatives, another library tests the rest.
# - TRL's `sft` term weighs winners by their length; Eq. 1 does not.
# - NF4 is blocks, absmax and sixteen quantiles; LoRA is two thin matrices that begin as nothing; together they fit a large
#   model on one card.
# - Whether the NLL term matters depends on the data and on how far one goes. Plot winners and losers of a fixed probe, and look.

# %% [markdown]
# **Try**
#
# - `train(1.0, "dpo_nll_per_token")`: do the curves change? Do your chosen completions have similar lengths?
# - Divide `RATE` by ten. Which statements of section 10 change, and which become too small to tell?
# - Change the features of section 11 until DPO alone raises the winner.
#
# **Recall**
#
# 1. Which log-probabilities are summed, which averaged, and which tokens are in neither?
# 2. Your run's DPO loss is 0.6931 at step 200. What do you suspect?
# 3. Why does the gradient of $A$ vanish at the first step, and why is that no problem?
# 4. Why is a trained adapter not merged into a 4-bit base?
# 5. Name a setting in which DPO alone lowers the winner.
#
# **Next**: [05 · Iterations](05_iterations.ipynb) puts the five stages into a loop and watches it.
