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
# # 01 · Sampling
#
# **What you will be able to do**
#
# - turn a question into the exact tokens that a model reads, and say what goes wrong without the chat template;
# - draw a token by hand: logits, temperature, one random number;
# - compute the log-probability of a completion, and [pass@k](../docs/glossary.md#passk);
# - show with an intervention that $M_0$ can reason although it often does not;
# - choose a temperature that gives chosen *and* rejected completions.
#
# | | `smoke` | `cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook, on two cores | 1 minute | 2 minutes | as `cpu` for the seed model |
#
# **Needs**: the packages of this repository (in Colab: [`docs/colab.md`](../docs/colab.md)). **Optional sequel**: [01b · Fast
# sampling](01b_fast_sampling.ipynb).
#
# **Before this**: [00 · Start here](00_start_here.ipynb).

# %%
import os, sys
sys.path[:0] = [".", ".."]                          # for helpers_01.py and checks_01.py
sys.path += ["../scripts", "../../scripts"]         # the package `studies`
PROFILE = os.environ.get("IRPO_PROFILE", "cpu")     # "cpu", "smoke", or a GPU profile

# %% tags=["nbval-ignore-output"]
import math
from itertools import combinations

import numpy as np
import pandas as pd
import torch

import checks_01, helpers_00, helpers_01
from irpo_utils import evaluation, grading, logprobs, models, profiles, sampling, tasks
from irpo_utils.ops import run as runs
from irpo_utils.ops.cli import quiet_libraries
from irpo_utils.tasks import gsm8k
from studies import figures

quiet_libraries()
profile = profiles.get(PROFILE)
print("profile", PROFILE, "· device", models.default_device(), "· seed", profile.seed)

# %% [markdown]
# Section 7 chooses a setting by its results. The questions therefore come from the validation
# [split](../docs/glossary.md#split), not from the test split.

# %% tags=["nbval-ignore-output"]
task = tasks.get(profile.task)
questions = task.load("validation", profile.data).select(range(24 if PROFILE == "smoke" else 80))
model, tokenizer = runs.load_model(profile)
n = profile.n_samples

def draw(rows, **settings):
    """N completions per question with the settings of the profile, or with others."""
    defaults = {"n": n, "temperature": 1.0, "batch_size": profile.sampling_batch_size}
    return sampling.sample(model, tokenizer, rows, task, seed=profile.seed, progress=False,
                           max_new_tokens=profile.max_new_tokens,
                           engine=runs.engine_of(profile), **(defaults | settings))   # engine: how to compute

print(f"{len(questions)} questions of {task.name}, model {profile.model}")

# %% [markdown]
# ## 1 From a question to a prompt
#
# A model continues text, so the prompt decides what it does. The paper's prompt for the word problems of
# [GSM8K](../docs/glossary.md#gsm8k) asks for the reasoning *before* the answer, and for a fixed form of the answer
# ([appendix B.1](https://arxiv.org/html/2404.19733v3#A2)).

# %%
print(gsm8k.PROMPT)

# %% [markdown]
# The steps improve the answer, because the model can use a number that it has written down
# ([chain of thought](../docs/glossary.md#chain-of-thought), [Wei et al. 2022](https://arxiv.org/abs/2201.11903)). The
# fixed form lets a program find the answer.
#
# An instruction-tuned model was trained on conversations in one fixed format, the [chat
# template](../docs/glossary.md#chat-template). The seed model also has one, but its prompt is the question alone, without an
# instruction:

# %%
seed_tokenizer = models.load_tokenizer(models.find("seed"))
text = "Question: Mia has 3 shells. Mia finds 14 more. How many shells does Mia have now?\nSolution:"

by_hand = "<|user|>" + text + "<|end|>" + "<|assistant|>"
print(by_hand)
assert by_hand == models.render_prompt(seed_tokenizer, text)

# %% [markdown]
# The prompt stops right after `<|assistant|>`: the next token is the first of the completion. These are the
# [tokens](../docs/glossary.md#token) that the model reads.

# %%
ids = seed_tokenizer(by_hand, add_special_tokens=False).input_ids
print(len(ids), "tokens:", [seed_tokenizer.decode([i]) for i in ids])

# %% [markdown]
# Each marker is one token, and so is each digit. `add_special_tokens=False`: many tokenizers would add a start token, which a
# template may already have.
#
# **Predict**: you forget the template and give $M_0$ the bare text. Are the completions as good, slightly worse, or much
# worse?

# %% tags=["nbval-ignore-output"]
some = questions.select(range(12))
bare = [task.prompt(row) for row in some]
prompts = {"with the template": [models.render_prompt(tokenizer, text) for text in bare],
           "without": bare}
for name, texts in prompts.items():
    completions = helpers_01.greedy(model, tokenizer, texts, profile.max_new_tokens)
    correct = helpers_01.count_correct(completions, some, task)
    print(f"{name:18}", repr(completions[0]), "· correct:", correct, "of 12")

# %% [markdown]
# <details><summary>Answer</summary>
#
# With the seed model they are much worse.
#
# </details>
#
# If you cannot reproduce a published number, print the prompt with its template first.
#
# ## 2 The distribution of the next token
#
# The model maps the prompt to one [logit](../docs/glossary.md#logit) per token of its vocabulary. The softmax turns logits
# into probabilities. We take the question whose solution has the most steps.

# %% tags=["nbval-ignore-output"]
longest = max(questions, key=lambda row: (row.get("steps", 0), len(row["question"])))
prompt = models.render_prompt(tokenizer, task.prompt(longest))
prompt_ids = tokenizer(prompt, add_special_tokens=False,
                       return_tensors="pt").input_ids.to(model.device)
with torch.inference_mode():
    logits = model(input_ids=prompt_ids).logits[0, -1].float().cpu()
print(longest["question"])
print(f"\n{prompt_ids.shape[1]} tokens in, {len(logits)} logits out")

# %% [markdown]
# **Predict**: what is the most probable first token? A digit, with which the working would begin, or a word?

# %% tags=["nbval-ignore-output"]
probabilities = logits.softmax(-1)
top = probabilities.topk(6)
for p, token in zip(top.values.tolist(), top.indices.tolist()):
    print(f"{p:8.4f}  {tokenizer.decode([token])!r}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# With the seed model it is `Final`, as in "Final answer: ...": $M_0$ is about to answer without reasoning.
#
# </details>
#
# The second most probable token begins the working. Training should move probability from `Final` to such tokens.
#
# ## 3 Temperature
#
# How can we make completions more varied? The [temperature](../docs/glossary.md#temperature) $T$ divides the logits $z$. The
# softmax then gives the probabilities $p$:
#
# $$p_i = \frac{e^{z_i/T}}{\sum_j e^{z_j/T}}$$

# %% [markdown]
# ### Exercise 1.1: softmax with temperature
#
# **Goal**: write the formula above as code. **Difficulty**: 1 of 3. **Time**: 5 minutes.
#
# `with_temperature(logits, temperature)` takes a tensor of logits, of any shape, and returns a probability for each. The
# last dimension is the vocabulary.
#
# <details><summary>Hint</summary>
#
# Divide the logits, not the probabilities. Then apply `torch.softmax` to the last dimension.
#
# </details>

# %%
def with_temperature(logits, temperature):
    # SOLUTION
    return torch.softmax(logits / temperature, -1)
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_01.with_temperature(with_temperature))

# %% [markdown]
# [Worked solution](solutions/01_sampling.ipynb). $T$ below 1 sharpens the distribution, and $T$ above 1 flattens it. $T = 0$
# means greedy decoding: take the largest logit.
#
# The figure shows the six tokens above and the sum of all others. **Predict**: from $T = 1$ to $T = 2$, which gains more: the
# second token or this sum?

# %% tags=["nbval-ignore-output"]
columns = {f"T = {t:g}": (logits / t).softmax(-1)[top.indices].numpy() for t in (0.5, 1.0, 2.0)}
table = pd.DataFrame(columns, index=[repr(tokenizer.decode([i])) for i in top.indices.tolist()])
table.loc[f"{len(logits) - len(table)} others"] = 1 - table.sum()
helpers_01.next_tokens(table)

# %% [markdown]
# <details><summary>Answer</summary>
#
# The sum of all others gains more.
#
# </details>
#
# A higher temperature has two effects on $M_0$. `Final` becomes less probable, so the working begins more often. But at every
# position many incorrect tokens each become a little more probable, and one incorrect digit spoils the rest. Section 7
# measures the sum of both effects.
#
# ## 4 One random number per token
#
# How does a program draw from a distribution? Place the probabilities end to end on a line from 0 to 1, and draw a random
# number $u$ between 0 and 1. The token whose interval contains $u$ is drawn. This is
# [inverse-CDF sampling](../docs/glossary.md#inverse-cdf-sampling).

# %%
def invert(probabilities, u):
    total = 0.0
    for token, p in enumerate(probabilities):
        total += p                       # the cumulative distribution, CDF
        if u < total:
            return token

for u in (0.10, 0.49, 0.51, 0.79, 0.97):
    print(f"u = {u:.2f} draws token {invert([0.5, 0.3, 0.15, 0.05], u)}")

# %% [markdown]
# `sampling.next_tokens` does the same for a whole batch. In this package the random number of a token depends only on the
# seed, the question, the index of the completion and the position. A completion therefore does not depend on the rest of
# its batch.
#
# **Predict**: draw the same completions in small and in large batches. How many differ?

# %% tags=["nbval-ignore-output"]
few = questions.select(range(12))
small, large = draw(few, batch_size=2 * profile.n_samples), draw(few)
same = [a == b for a, b in zip(small["completion_ids"], large["completion_ids"])]
print(f"{sum(same)} of {len(same)} completions are the same, token for token")

# %% [markdown]
# <details><summary>Answer</summary>
#
# On this CPU none differ. On a GPU in 16 bits a few may differ: a batch of another size adds numbers in another order, which
# changes the rounding.
#
# </details>
#
# ## 5 How probable is a completion?
#
# Every completion has a `logprob`: the sum of the log-probabilities of its tokens under $M_t$, in
# [nats](../docs/glossary.md#nat). The loss needs this number. You can compute it with
# [teacher forcing](../docs/glossary.md#teacher-forcing): give the model the finished text, and read the probability of
# each next token.
#
# **Predict**: the completion below is drawn at $T = 1.5$. Does its `logprob` belong to the distribution at $T = 1.5$, or
# at $T = 1$?

# %% tags=["nbval-ignore-output"]
hot = draw(questions.select([0]), n=1, temperature=1.5)[0]
P, ids = len(hot["prompt_ids"]), hot["completion_ids"]
with torch.inference_mode():
    text = torch.tensor([hot["prompt_ids"] + ids], device=model.device)
    forced = model(input_ids=text).logits[0].float().cpu()

def logps_at(temperature, first=P - 1):
    """Log-probability of each token of the completion; the logits before a token predict it."""
    logps = (forced / temperature).log_softmax(-1)
    return [logps[first + i, token].item() for i, token in enumerate(ids)]

at_1, at_hot = logps_at(1.0), logps_at(1.5)
print(f"recorded {hot['logprob']:.3f}")
print(f"teacher forcing at T = 1: {sum(at_1):.3f}, at T = 1.5: {sum(at_hot):.3f}")

# %% tags=["remove-cell"]
TOLERANCE = 1e-3 if models.default_device() == "cpu" else 2    # nats: float32, or 16 bits
assert abs(sum(at_1) - hot["logprob"]) < TOLERANCE

# %% [markdown]
# <details><summary>Answer</summary>
#
# It belongs to the model at $T = 1$. The loss compares two *models* and has no sampling temperature.
#
# </details>
#
# Which tokens are improbable?

# %% tags=["nbval-ignore-output"]
helpers_01.answer_logps([tokenizer.decode([token]) for token in ids], at_1)

# %% [markdown]
# Two tokens carry most of the sum: there other tokens were also probable.
#
# Check the index. The prompt has `P` tokens, and the logits at position `P - 1 + i` predict the token at position `P + i`.
# **Predict** what happens if you are off by one.

# %% tags=["nbval-ignore-output"]
late = sum(logps_at(1.0, first=P))
[scored] = logprobs.score(model, tokenizer, [hot["prompt_ids"]], [ids])
print(f"correct position {sum(at_1):.2f}, one late {late:.2f}; logprobs.score {scored:.2f}")

# %% tags=["remove-cell"]
assert abs(scored - sum(at_1)) < TOLERANCE

# %% [markdown]
# <details><summary>Answer</summary>
#
# You get another number, and no error message.
#
# </details>
#
# ## 6 Can M_0 solve more than it shows?
#
# **Predict**: the next cell prints the share of correct completions. Is the share of questions with *at least one* correct
# completion about the same, or much higher?

# %% tags=["nbval-ignore-output"]
def correct_counts(samples):
    """How many of its N completions are correct, for every question in order."""
    return np.array(grading.grade(samples, task)["correct"]).reshape(-1, n).sum(1)

samples = draw(questions)
correct = correct_counts(samples)
print(f"correct completions: {100 * correct.mean() / n:.1f} % of {len(samples)}")
print(f"questions with at least one: {100 * (correct > 0).mean():.1f} % of {len(correct)}")
print("questions by number of correct completions:",
      dict(enumerate(np.bincount(correct, minlength=n + 1).tolist())))

# %% [markdown]
# <details><summary>Answer</summary>
#
# It is much higher. This gap supplies the chosen completions.
#
# </details>
#
# The probability that at least one of $k$ completions is correct is called [pass@k](../docs/glossary.md#passk). To estimate
# it from $n$ completions, of which $c$ are correct, pick $k$ of them in every possible way. What share of these picks
# contains a correct completion?

# %%
drawn = ["correct", "no", "no", "no"]                   # n = 4 completions, c = 1 of them correct
picks = list(combinations(drawn, 2))                           # every way to pick k = 2
good = [pick for pick in picks if "correct" in pick]
print(f"{len(good)} of {len(picks)} picks contain a correct one")
assert len(good) / len(picks) == evaluation.pass_at_k(n=4, c=1, k=2)

# %% [markdown]
# ### Exercise 1.2: pass@k without bias
#
# **Goal**: the count above as a formula, for any n, c and k. **Difficulty**: 2 of 3. **Time**: 10 minutes.
#
# Count the picks *without* a correct one. `pass_at_k(n, c, k)` returns a probability between 0 and 1. `math.comb(a, b)` is
# the number of ways to pick b of a. It is 0 if b is larger than a.
#
# <details><summary>Hint</summary>
#
# How many ways are there to pick all k from the n − c incorrect ones? Divide by the number of ways to pick k from n.
#
# </details>

# %%
def pass_at_k(n, c, k):
    # SOLUTION
    return 1 - math.comb(n - c, k) / math.comb(n, k)
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_01.pass_at_k(pass_at_k))

# %% [markdown]
# [Worked solution](solutions/01_sampling.ipynb). The formula ([Chen et al. 2021](https://arxiv.org/abs/2107.03374)) is
# *unbiased*: averaged over many draws, it gives the true pass@k. The simpler $1 - (1 - c/n)^k$ is too low on average:

# %%
p, k = 0.25, 4                                  # a model that is correct with probability 0.25
chances = [math.comb(4, c) * p**c * (1 - p)**(4 - c) for c in range(5)]      # of c correct in n = 4
print(f"true pass@4 {1 - (1 - p)**k:.3f}")
print(f"unbiased    {sum(w * evaluation.pass_at_k(4, c, k) for c, w in enumerate(chances)):.3f}")
print(f"simpler     {sum(w * (1 - (1 - c / 4)**k) for c, w in enumerate(chances)):.3f}")

# %% [markdown]
# pass@k shows that $M_0$ *sometimes* solves a question. Does it answer incorrectly *because* it skips the working? Test it
# with an intervention: decode greedily, but ban the token `Final`. One rule bans it as the first token. The other bans it
# until the completion has as many equations as the solution has steps.
#
# **Predict**: without a rule $M_0$ solves fewer than half of the 80 questions. How many under each rule?

# %% tags=["nbval-ignore-output"]
if profile.model == "seed":
    prompts = [models.render_prompt(tokenizer, task.prompt(row)) for row in questions]
    def before_all_steps(text, i):                        # an equation is missing or not finished
        return text.count("=") < questions[i]["steps"] or not text.endswith("\n")

    rules = {"without a rule": lambda text, i: False,
             "no Final as the first token": lambda text, i: text == "",
             "no Final before all steps": before_all_steps}
    solved = {}
    for name, rule in rules.items():
        texts = helpers_01.greedy_under_rule(model, tokenizer, prompts, rule, "Final",
                                             profile.max_new_tokens)
        solved[name] = helpers_01.count_correct(texts, questions, task)
    figure = helpers_01.correct_under_rules(solved, len(questions))
else:
    figure = "The seed model alone has one token that starts every bare answer."
figure

# %% [markdown]
# The weights are the same for all three bars. So $M_0$ can do the working, and skipping it causes most of its errors. The
# last rule knows the number of steps, so it is a test and not a decoding method.
# Training only needs to make the working more probable: [elicitation](../docs/glossary.md#elicitation).
#
# You now know two accuracies of $M_0$: greedy, and sampled at $T = 1$, which is lower. The 500 test questions have more steps
# on average than these 80, and both are lower there ([28.0 and 16.2 %](shipped_run/metrics.csv)).
#
# Does training add more than elicitation? If not, pass@k of $M_0$ should catch up at a large $k$. Compare it with the last
# model of a finished run at learning rate 2e-5 (32 completions per test question; 95 % bands).
#
# **Predict**: training raises pass@1. How do the two curves compare at the largest $k$?

# %% tags=["nbval-ignore-output"]
run = helpers_00.finished_run(PROFILE)
last = runs.read_profile(run).iterations
metrics = pd.read_csv(run / "metrics.csv")
curves = metrics[(metrics.metric == "pass_at_k") & metrics.iteration.isin([0, last])].copy()
curves["metric"] = [f"M_{t}" for t in curves.iteration]
figures.sweep(curves, "k", "k, completions per question", "pass@k (%)")

# %% [markdown]
# <details><summary>Answer</summary>
#
# The gap is much smaller than at $k = 1$, but the last model is still ahead.
#
# </details>
#
# For large models [Yue et al. 2025](https://arxiv.org/abs/2504.13837) report that the curves meet and then cross, with $k$ in
# the tens or hundreds. Our curves end at 32 and do not show whether they meet.
#
# ## 7 Which temperature?
#
# A question gives pairs only if it has correct *and* incorrect completions. Draw $N$ completions at six temperatures.
#
# **Predict**: which temperature gives the most correct completions? Is it the best one for training?

# %% tags=["nbval-ignore-output"]
temperatures = (0.3, 0.6, 1.0, 1.3, 1.6, 2.0)
counts = {t: correct_counts(draw(questions, temperature=t)).tolist() for t in temperatures}
for t in temperatures:
    print(f"T = {t}: {100 * np.mean(counts[t]) / n:5.1f} % correct;",
          f"the first questions: {counts[t][:12]} of {n}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# The lowest. But fewer questions give pairs there: a question whose completions are all correct, or all incorrect, gives none.
#
# </details>
#
# For this model the incorrect tokens (section 3) matter more.

# %% [markdown]
# ### Exercise 1.3: choose a temperature
#
# **Goal**: as many questions with pairs as possible. **Difficulty**: 2 of 3. **Time**: 10 minutes.
#
# `choose(counts, n)` takes a dictionary like the one above: for each temperature, the number of correct completions of each
# question, out of n. It returns the temperature at which the largest number of questions gives pairs.
#
# <details><summary>Hint</summary>
#
# When does a question with c correct completions of n have at least one of each kind? Count such questions for each
# temperature. `max(counts, key=...)` finds the best.
#
# </details>

# %%
def choose(counts, n):
    # SOLUTION
    def usable(temperature):
        return sum(0 < c < n for c in counts[temperature])
    return max(counts, key=usable)
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_01.choose(choose))

# %% [markdown]
# [Worked solution](solutions/01_sampling.ipynb). The figure shows three shares with 95 % intervals over questions.
# *Both kinds*: questions with correct and incorrect completions.

# %% tags=["nbval-ignore-output"]
def shares_of(c):
    c = np.array(c)
    return {"correct completions": c / n, f"at least one of {n} correct": c > 0,
            "both kinds": (c > 0) & (c < n)}

rows = [{"temperature": t, **evaluation.bootstrap_row(name, values)}
        for t in temperatures for name, values in shares_of(counts[t]).items()]
best = max(temperatures, key=lambda t: shares_of(counts[t])["both kinds"].mean())
print("most questions with pairs at T =", best)
at_1 = shares_of(counts[1.0])["both kinds"].astype(int)
for t in (0.3, 0.6, 1.3):
    row = evaluation.bootstrap_row("difference", at_1 - shares_of(counts[t])["both kinds"])
    print(f"both kinds, T = 1.0 minus T = {t}: {100 * row['value']:+.1f} points",
          f"({100 * row['low']:+.1f} to {100 * row['high']:+.1f})")
figures.sweep(pd.DataFrame(rows), "temperature", "Sampling temperature")

# %% [markdown]
# At low temperatures the $N$ completions often agree, and at high ones hardly any is correct. The differences are
# [paired](../docs/glossary.md#paired-comparison) by question. At 0.3 and 1.3 fewer questions give pairs than at 1.0. For 0.6
# the interval includes 0: *not resolved*.
#
# **Predict**: is the best temperature of the *last* model lower or higher than that of $M_0$?

# %% tags=["nbval-ignore-output"]
adapter = run / f"iteration_{last}" / "adapter"
if not adapter.exists() or runs.read_profile(run).model != profile.model:
    adapter, last = None, 0                                     # no trained model: M_0 twice
models.set_adapter(model, adapter)                              # weights of the last model
counts_later = {t: correct_counts(draw(questions, temperature=t)).tolist() for t in temperatures}
models.set_adapter(model, None)                                 # back to M_0

by_model = {"M_0": counts, f"M_{last} (last)": counts_later}
rows = [{"temperature": t, **evaluation.bootstrap_row(name, shares_of(by_t[t])["both kinds"])}
        for name, by_t in by_model.items() for t in temperatures]
for name, by_t in by_model.items():
    best = max(temperatures, key=lambda t: shares_of(by_t[t])["both kinds"].mean())
    print(f"{name}: most questions with pairs at T = {best}; at 0.3 {100 * np.mean(by_t[0.3]) / n:.0f} % are correct")
figures.sweep(pd.DataFrame(rows), "temperature", "Sampling temperature", "Questions with pairs (%)")

# %% [markdown]
# <details><summary>Answer</summary>
#
# In this run it is higher: 1.3 against 1.0. At low temperatures the last model makes few mistakes to learn from.
#
# </details>
#
# On GSM8K the paper samples at $T = 0.8$ in two iterations, then at 1.3 in two
# ([section 3.1](https://arxiv.org/html/2404.19733v3#S3.SS1)).
#
# ## What you have learnt
#
# - A prompt is a question, often with an instruction, in the chat template.
# - Temperature divides logits, and one random number draws a token.
# - `logprob` is a sum over tokens under the model at $T = 1$.
# - Banning one token shows that $M_0$ can do the working that it skips.
# - A good temperature leaves many questions with both kinds of completion.
#
# **Try**: run `python -m irpo_utils run --iterations 1 --temperature 0.6 --out runs/cooler`, and compare $M_1$ in the printed
# tables.
#
# <details><summary>Typical misunderstandings</summary>
#
# - *The logits at a token's place give its probability.* They give the probability of the *next* token.
# - *More correct completions are better for training.* A question without an incorrect one gives no pair.
#
# </details>
#
# **Recall** without scrolling up, then open the answers.
#
# 1. Why must the prompt end right after `<|assistant|>`?
# 2. A colleague divides probabilities by $T$ instead of logits: `softmax(z) / T`. What does the sampler do then?
# 3. n = 8, c = 2: what is pass@7?
#
# <details><summary>Answers</summary>
#
# 1. The next token must be the first token of the completion.
# 2. The numbers no longer add up to 1. After normalisation $T$ has no effect.
# 3. 1: only 6 completions are incorrect, so every pick of 7 contains a correct one.
#
# </details>
#
# **Next**: [02 · Grading](02_grading.ipynb): when is an answer correct, and what happens if the grader is wrong?
