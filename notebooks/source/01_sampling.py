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
# - turn a question into the exact tokens that a model reads, and say what goes wrong without its chat template;
# - draw a token by hand: logits, temperature, top-p, one random number;
# - explain why text is generated with a cache, and why N answers to one prompt cost far less than N prompts;
# - compute the log-probability of an answer in two ways, and pass@k without bias;
# - choose a temperature that leaves winners *and* losers to learn from.
#
# | | `smoke` | `cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook, on one core | 25 seconds | 1 minute | not measured here |
#
# **Needs**: the packages of this repository. **Before this**: [00 · Start here](00_start_here.ipynb), for the place of
# sampling in the algorithm. Words that link to the [glossary](../docs/glossary.md) are explained there.

# %%
import os, sys
sys.path[:0] = [".", ".."]                     # checks_01.py lies beside the notebooks; ".." serves the solutions
PROFILE = os.environ.get("IRPO_PROFILE", "cpu")     # the one setting: "cpu", "smoke", or a GPU profile such as "qwen2.5-0.5b"

# %%
# NBVAL_IGNORE_OUTPUT
import platform
from importlib.metadata import version

from irpo_utils import models, profiles
from irpo_utils.ops.cli import quiet_libraries

quiet_libraries()                              # no loading bars
profile = profiles.get(PROFILE)
print("python", platform.python_version(), *(f"· {name} {version(name)}" for name in ("torch", "transformers", "trl")))
print("profile", PROFILE, "· device", models.default_device(), "· seed", profile.seed)
assert models.default_device() in ("cpu", "cuda")

# %% [markdown]
# The model is M_0 of the profile. The questions come from the validation split: this notebook chooses a setting by looking at
# results, and what is chosen by looking must not be chosen on the test split.

# %%
# NBVAL_IGNORE_OUTPUT
import torch
from irpo_utils import sampling, tasks
from irpo_utils.ops import run as runs

task = tasks.get(profile.task)
questions = task.load("validation", profile.data).select(range(24 if PROFILE == "smoke" else 80))
model, tokenizer = runs.load_model(profile)
engine = runs.engine_of(profile)               # how this profile samples; on a CPU a faster way with the same answers
ON_CPU = models.default_device() == "cpu"      # there sums are in float32, so that two ways to compute agree closely
print(f"{len(questions)} questions of {task.name}, model {profile.model}")
assert len(questions) > 0

# %% [markdown]
# ## 1 From a question to a prompt
#
# A model continues text. What it is asked for stands in the text before. The paper's prompt for GSM8K asks for the
# reasoning *before* the answer and for a fixed form of the answer
# ([appendix B.1](https://arxiv.org/html/2404.19733v3#A2)):

# %%
from irpo_utils.tasks import gsm8k

print(gsm8k.PROMPT)

# %% [markdown]
# Both halves matter. The steps make the answer better: each new token is computed from all tokens before it, so a
# number that is written down can be used, and one that is not must be worked out within a single token. This is the
# finding behind [chain-of-thought](../docs/glossary.md#chain-of-thought) prompts
# ([Wei et al. 2022](https://arxiv.org/abs/2201.11903)). The fixed form lets a program find the answer, which is the subject of notebook 02.
#
# Here is the prompt of your profile for one question. The seed model gets no instruction: it has about a million
# parameters, was trained on just this text, and would not understand one.

# %%
# NBVAL_IGNORE_OUTPUT
print(task.prompt(questions[0]))
assert questions[0]["question"] in task.prompt(questions[0])

# %% [markdown]
# ### The chat template
#
# An instruction-tuned model has seen every conversation in one fixed dress: who speaks, where a turn begins, where it
# ends. That dress is the [chat template](../docs/glossary.md#chat-template). By hand, for the seed model:

# %%
seed_tokenizer = models.load_tokenizer(models.find("seed"))
text = "Question: Mia has 3 shells. Mia finds 14 more. How many shells does Mia have now?\nSolution:"

by_hand = "<|user|>" + text + "<|end|>" + "<|assistant|>"
print(by_hand)
assert by_hand == models.render_prompt(seed_tokenizer, text)

# %% [markdown]
# It stops right after `<|assistant|>`: the next token is the first of the answer. And these are the
# [tokens](../docs/glossary.md#token) that the model sees:

# %%
ids = seed_tokenizer(by_hand, add_special_tokens=False).input_ids
print(len(ids), "tokens:", [seed_tokenizer.decode([i]) for i in ids])
assert ids.count(seed_tokenizer.eos_token_id) == 1

# %% [markdown]
# Each marker is one token, and so is each digit. `add_special_tokens=False` is needed because the template has put in all the
# markers already. Without it Llama's tokenizer adds a second beginning-of-text token: no error, no warning, slightly
# worse answers.

# %% [markdown]
# **Predict**: you forget the template and give M_0 the bare text of the prompt. The question is the same. Are the answers
# the same, a little worse, or much worse?

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils import grading

def continue_text(text):
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids.to(model.device)
    new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                         max_new_tokens=profile.max_new_tokens, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(new[0, ids.shape[1]:], skip_special_tokens=True)

dressed = [continue_text(models.render_prompt(tokenizer, task.prompt(row))) for row in questions.select(range(12))]
bare = [continue_text(task.prompt(row)) for row in questions.select(range(12))]
for row, a, b in zip(questions.select(range(3)), dressed, bare):
    print(f"known answer {row['answer']}\n  with the template {a[-200:]!r}\n  without           {b[-200:]!r}")
assert dressed != bare

# %%
# NBVAL_IGNORE_OUTPUT
def count_right(texts):
    rows = [{**row, "completion": text, "finished": True} for row, text in zip(questions, texts)]
    return sum(grading.grade_one(row, task)["correct"] for row in rows)

print(f"right with the template {count_right(dressed)}, without {count_right(bare)}, of {len(bare)}")
assert profile.model != "seed" or count_right(dressed) > count_right(bare)

# %% [markdown]
# With the seed model: much worse. It writes its own kind of answer, but garbles even the numbers that it should copy. A large
# model is hurt less, and then the mistake is harder to see: it costs some points, silently. When a published number
# does not come out, look at the rendered prompt first.

# %% [markdown]
# ## 2 One step: the distribution of the next token
#
# The model maps the prompt to one number for each token of its vocabulary, a [logit](../docs/glossary.md#logit). The softmax makes
# them probabilities. Take the question with the most steps, the one that needs its working most; of those the longest.

# %%
# NBVAL_IGNORE_OUTPUT
longest = max(questions, key=lambda row: (row.get("steps", 0), len(row["question"])))    # not every task counts steps
prompt_ids = tokenizer(models.render_prompt(tokenizer, task.prompt(longest)), add_special_tokens=False,
                       return_tensors="pt").input_ids.to(model.device)
with torch.inference_mode():
    logits = model(input_ids=prompt_ids).logits[0, -1].float().cpu()
print(longest["question"])
print(f"\n{prompt_ids.shape[1]} tokens in, {len(logits)} logits out")
assert logits.shape == (model.config.vocab_size,)

# %% [markdown]
# **Predict**: what is the most probable first token of the answer? A digit, with which the working would begin? A word?

# %%
# NBVAL_IGNORE_OUTPUT
probabilities = logits.softmax(-1)
top = probabilities.topk(6)
for p, token in zip(top.values.tolist(), top.indices.tolist()):
    print(f"{p:8.4f}  {tokenizer.decode([token])!r}")
assert abs(probabilities.sum().item() - 1) < 1e-4
assert PROFILE != "cpu" or tokenizer.decode([top.indices[0].item()]) == "Final"

# %% [markdown]
# With the seed model it is `Final`, as in "Final answer: ...": M_0 is about to blurt out a number, on the very question
# that has the most steps. But look at the next line, the first digit of the working. M_0 *can* do it, and now and then will.
# Everything that this course does is to move probability from the first line to the second.

# %% [markdown]
# ## 3 Temperature
#
# [Temperature](../docs/glossary.md#temperature) T divides the logits before the softmax:
#
# $$p_i = \frac{e^{z_i/T}}{\sum_j e^{z_j/T}}$$
#
# First without it, on four logits:

# %%
z = torch.tensor([2.0, 1.0, 0.0, -1.0])

weights = torch.exp(z)
print([round(p, 3) for p in (weights / weights.sum()).tolist()])
assert torch.allclose(weights / weights.sum(), torch.softmax(z, -1))

# %% [markdown]
# **Predict**: T = 2 halves all differences between logits. Do the probabilities become more alike or less? And what is
# left of them as T goes to 0?

# %% [markdown]
# ### Exercise 1.1: softmax with temperature
#
# **Goal**: write the formula above as code. **Difficulty**: 1 of 3. **Time**: 5 minutes.
#
# `with_temperature(logits, temperature)` takes a tensor of logits and returns a probability for each.
#
# <details><summary>Hint</summary>
#
# Divide first, then do what the cell above does. Divide the logits, not the probabilities.
#
# </details>

# %%
def with_temperature(logits, temperature):
    # SOLUTION
    return torch.softmax(logits / temperature, -1)
    # STUB
    # return None      # your turn
    # END

# %%
import checks_01
print(checks_01.with_temperature(with_temperature))

# %% [markdown]
# The worked solution is in [solutions/01_sampling.ipynb](solutions/01_sampling.ipynb). T below 1 sharpens the distribution, towards the largest logit
# alone; T above 1 flattens it, towards all tokens alike. T = 0 is a name for taking the largest: greedy.
#
# **Predict**, for M_0 and the question above: at T = 2, which gains more, the second token, or all those that are not
# shown, together?

# %%
# NBVAL_IGNORE_OUTPUT
import pandas as pd
from irpo_utils import plots

table = pd.DataFrame({f"T = {t:g}": (logits / t).softmax(-1)[top.indices].numpy() for t in (0.5, 1.0, 2.0)},
                     index=[repr(tokenizer.decode([i])) for i in top.indices.tolist()])
table.loc[f"{len(logits) - len(table)} others"] = 1 - table.sum()
assert (table.sum().round(4) == 1).all()
plots.next_tokens(table)

# %% [markdown]
# Look at the last row. Each of the others is improbable, but there are very many of them. A single one that
# slips in, say a wrong digit, spoils the rest of the answer. That is why accuracy falls with T, and in long answers faster than in short
# ones: every token is one more chance to slip.

# %% [markdown]
# ## 4 Top-p
#
# [Nucleus sampling](../docs/glossary.md#top-p), or top-p, cuts that tail off
# ([Holtzman et al. 2020](https://arxiv.org/abs/1904.09751)). Sort the tokens by probability, keep the smallest set from
# the top whose mass reaches p, set the others to zero, and divide so that the kept ones add up to 1 again.
#
# Four tokens with probabilities 0.5, 0.3, 0.15, 0.05 and p = 0.7: the first alone has 0.5, too little. With the second it is
# 0.8, enough. So two are kept, with 0.5/0.8 and 0.3/0.8.

# %%
logits_of_four = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
evenly = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1] + 0.0003         # a thousand random numbers, evenly spread

tokens = sampling.next_tokens(logits_of_four.expand(1000, -1), evenly, temperature=1.0, top_p=0.7)
print((tokens.bincount(minlength=4) / 1000).tolist())
assert tokens.bincount(minlength=4).tolist() == [625, 375, 0, 0]

# %% [markdown]
# ### Exercise 1.2: the nucleus by hand
#
# **Goal**: cut the tail as the text above says. **Difficulty**: 2 of 3. **Time**: 10 minutes.
#
# `nucleus(probabilities, top_p)` takes a list of numbers that add up to 1, in any order, and returns a list of the same
# length *in the same order*: zero for what is cut, and the others divided by their sum.
#
# <details><summary>Hint</summary>
#
# `order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])` gives the places, most probable first.
# Go through them and stop once what you have kept reaches `top_p`. The token that reaches it is kept.
#
# </details>

# %%
def nucleus(probabilities, top_p):
    # SOLUTION
    order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    kept, mass = set(), 0.0
    for i in order:
        if mass >= top_p:
            break
        kept.add(i)
        mass += probabilities[i]
    return [p / mass if i in kept else 0.0 for i, p in enumerate(probabilities)]
    # STUB
    # order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])
    # return None      # your turn
    # END

# %%
print(checks_01.nucleus(nucleus))

# %% [markdown]
# The worked solution is in [solutions/01_sampling.ipynb](solutions/01_sampling.ipynb).
#
# Does it help M_0? **Predict**: at T = 1.6, how does top-p 0.8 change the share of right answers? And does it bring back all
# that the temperature took?

# %%
# NBVAL_IGNORE_OUTPUT
def draw(rows, **settings):
    """N completions per question with the profile's settings, or with others."""
    settings = {"n": profile.n_samples, "temperature": 1.0, "seed": profile.seed, **settings}
    return sampling.sample(model, tokenizer, rows, task, max_new_tokens=profile.max_new_tokens,
                           progress=False, **{"batch_size": profile.sampling_batch_size, "engine": engine, **settings})

shares = {}
for temperature, top_p in ((1.0, 1.0), (1.6, 1.0), (1.6, 0.8)):
    graded = grading.grade(draw(questions, temperature=temperature, top_p=top_p), task)
    shares[temperature, top_p] = sum(graded["correct"]) / len(graded)
    print(f"T = {temperature}, top-p {top_p}: {100 * shares[temperature, top_p]:.1f} % of {len(graded)} samples are right")
assert profile.model != "seed" or shares[1.6, 0.8] > shares[1.6, 1.0]

# %% [markdown]
# Top-p undoes much of a high temperature. The paper does not say whether it cut the tail; a later paper by some of its authors sampled at T = 0.7
# with top-p 0.9 ([Prasad et al. 2024](https://arxiv.org/abs/2411.04109)). Our profiles leave it at 1: then the samples
# are the model's own distribution, with nothing removed.

# %% [markdown]
# ## 5 Drawing a token with one random number
#
# Lay the probabilities end to end on a line from 0 to 1. Throw a number u between 0 and 1 at it. The token whose
# piece it hits is drawn: a piece twice as long is hit twice as often. This is
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
# `sampling.next_tokens` does the same for a whole batch at once. Both on a thousand numbers:

# %%
by_hand = torch.tensor([invert([0.5, 0.3, 0.15, 0.05], u) for u in evenly.tolist()])
by_module = sampling.next_tokens(logits_of_four.expand(1000, -1), evenly, temperature=1.0, top_p=1.0)
print("how often each token was drawn:", by_hand.bincount().tolist())
assert torch.equal(by_hand, by_module)

# %% [markdown]
# Why by hand, and not `torch.multinomial`? Because here every token of every answer has a random number of its own, fixed by the seed, the question,
# the sample's number and the position. An answer then does not depend on which others share its batch, and a run that was interrupted
# continues with the very same samples.
#
# **Predict**: we draw the same answers in small batches and in one large batch. How many of them differ?

# %%
# NBVAL_IGNORE_OUTPUT
few = questions.select(range(12))
small, large = draw(few, batch_size=2 * profile.n_samples), draw(few)
same = [a == b for a, b in zip(small["completion_ids"], large["completion_ids"])]
print(f"{sum(same)} of {len(same)} answers are the same, token for token")
assert all(same) or not ON_CPU

# %% [markdown]
# On a CPU, none. On a GPU in 16 bits a few may: sums are rounded in another order in another batch, and where two tokens are
# almost equally probable, that decides.

# %% [markdown]
# ## 6 One answer, token by token
#
# Generating is a loop: run the text through the model, draw a token, append it, again. Here it is in its plainest
# form, greedy, for a question with a long answer.

# %%
# NBVAL_IGNORE_OUTPUT
greedy = draw(questions, n=1, temperature=0.0)
example = max(greedy, key=lambda row: row["n_tokens"])
start = torch.tensor([example["prompt_ids"]], device=model.device)
ends = models.end_tokens(model, tokenizer)
print(f"prompt of {start.shape[1]} tokens, answer of {example['n_tokens']}:\n{example['completion'][-300:]}")
assert example["n_tokens"] > 1

# %%
@torch.inference_mode()
def decode_plainly(ids, limit):
    """Every step runs the whole text through the model: (new tokens, positions computed)."""
    begin, positions = ids.shape[1], 0
    while ids.shape[1] - begin < limit and ids[0, -1].item() not in ends or ids.shape[1] == begin:
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        positions += ids.shape[1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[0, begin:].tolist(), positions

# %% [markdown]
# **Predict**: with a prompt of P tokens and an answer of L tokens, about how many positions does this compute? P + L? Or
# more like L times P?

# %%
# NBVAL_IGNORE_OUTPUT
plain, positions_plainly = decode_plainly(start, profile.max_new_tokens)
P, L = start.shape[1], len(plain)
print(f"P = {P}, L = {L}: {positions_plainly} positions computed")
assert positions_plainly == L * P + L * (L - 1) // 2
assert plain == example["completion_ids"] or not ON_CPU

# %% [markdown]
# L times P, and more: the prompt runs through the model again for every new token. All but the last of these positions were computed
# before, with the same result, because in these models a position sees only what stands before it. What later positions need of an earlier one
# are its *keys* and *values* in every attention layer. So keep them: the
# [KV cache](../docs/glossary.md#kv-cache).

# %%
@torch.inference_mode()
def decode_with_cache(ids, limit):
    """Every step runs only the newest token through the model; keys and values of the rest are kept."""
    new, cache, tokens, positions = ids, None, [], 0
    while len(tokens) < limit and (not tokens or tokens[-1] not in ends):
        out = model(input_ids=new, past_key_values=cache, use_cache=True)
        positions += new.shape[1]
        new, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        tokens.append(new.item())
    return tokens, positions

# %%
# NBVAL_IGNORE_OUTPUT
cached, positions_cached = decode_with_cache(start, profile.max_new_tokens)
print(f"the same answer: {cached == plain}; {positions_cached} positions instead of {positions_plainly}")
assert positions_cached == P + len(cached) - 1
assert cached == plain == example["completion_ids"] or not ON_CPU

# %% [markdown]
# The same tokens three times: from scratch, with the cache, and from `sampling.sample`.
#
# **Predict**: the cache saves nearly all the positions. Does it save as much of the *time*?

# %%
# NBVAL_IGNORE_OUTPUT
import time

def seconds(function, *arguments, repeats=3):
    """The shortest of several times, which other work on the machine disturbs least."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        function(*arguments)
        times.append(time.perf_counter() - begun)
    return min(times)

t_plain, t_cached = (seconds(decode, start, L) for decode in (decode_plainly, decode_with_cache))
print(f"positions: {positions_plainly / positions_cached:.1f} times fewer; time: {t_plain / t_cached:.1f} times less")
assert t_plain > 0 and t_cached > 0

# %% [markdown]
# Not for one answer of a small model. Each step has a fixed price (Python, launching the operations, reading the weights from memory) whether
# it computes one position or sixty. That fixed price is the reason to decode many answers at once: one step for many
# answers costs far less than many steps for one.

# %% [markdown]
# ## 7 One prompt, N answers
#
# Iterative RPO wants N answers to *the same* question; N was 30 in the paper on GSM8K and ARC, 20 on MATH. The first part of the work, running the prompt through the model
# ([prefill](../docs/glossary.md#prefill)), is the same for all N. A plain `generate(num_return_sequences=N)` copies the prompt N
# times and does it N times. Computed once, its keys and values can be copied instead:

# %%
# NBVAL_IGNORE_OUTPUT
with torch.inference_mode():
    out = model(input_ids=prompt_ids, use_cache=True)                # the prompt, once
    first = out.logits[0, -1].topk(3).indices[:, None]               # three answers that begin differently
    cache = out.past_key_values
    cache.batch_repeat_interleave(3)                                 # its keys and values, three times
    shared = model(input_ids=first, past_key_values=cache, use_cache=True).logits[:, -1].float()
    copied = model(input_ids=torch.cat([prompt_ids.repeat(3, 1), first], 1)).logits[:, -1].float()
print(f"largest difference between the logits: {(shared - copied).abs().max().item():.1e}")
assert torch.allclose(shared, copied, atol=1e-3 if ON_CPU else 0.5)

# %% [markdown]
# The same distribution for the second token of all three answers. (On a GPU in 16 bits the difference is larger, but of the size of rounding.)
#
# **Predict**: how many times longer does the prefill of 32 copies take than that of one prompt?

# %%
# NBVAL_IGNORE_OUTPUT
@torch.inference_mode()
def prefill(ids):
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits

t_once, t_copies = seconds(prefill, prompt_ids, repeats=7), seconds(prefill, prompt_ids.repeat(32, 1), repeats=7)
print(f"one prompt {1000 * t_once:.1f} ms, 32 copies {1000 * t_copies:.1f} ms: {t_copies / t_once:.1f} times as long")
assert t_copies > t_once

# %% [markdown]
# Not 32 times, again because of the fixed price, but many times. How much of the *whole* is saved depends on how long the answers are.

# %% [markdown]
# ### Exercise 1.3: what sharing the prompt saves
#
# **Goal**: count before you optimise. **Difficulty**: 2 of 3. **Time**: 10 minutes.
#
# A prompt of `prompt_tokens` tokens gets one answer for each number in the list `lengths`, of that many tokens. Without sharing, every answer needs
# all positions of the prompt and its own. With sharing, the prompt is computed once. `saved(prompt_tokens, lengths)` returns
# the share of the positions that is saved: (without − with) / without, between 0 and 1.
#
# <details><summary>Hint</summary>
#
# Write down `without` and `with_sharing` as two separate sums before you subtract them. How often does the prompt
# occur in each?
#
# </details>

# %%
def saved(prompt_tokens, lengths):
    # SOLUTION
    without = len(lengths) * prompt_tokens + sum(lengths)
    with_sharing = prompt_tokens + sum(lengths)
    return (without - with_sharing) / without
    # STUB
    # return None      # your turn
    # END

# %%
print(checks_01.saved(saved))

# %% [markdown]
# The worked solution is in [solutions/01_sampling.ipynb](solutions/01_sampling.ipynb). On real answers of M_0 to one question (if you have not solved it yet, it prints None):

# %%
# NBVAL_IGNORE_OUTPUT
samples = draw(questions)
one = [row for row in samples if row["id"] == longest["id"]]
lengths = [row["n_tokens"] for row in one]
print(f"prompt of {len(one[0]['prompt_ids'])} tokens, answers of {lengths} tokens: saved", saved(len(one[0]["prompt_ids"]), lengths))
assert len(lengths) == profile.n_samples

# %% [markdown]
# Short answers to long prompts profit most. The answers differ in length, and that is the other leak: a batch that is decoded as it
# was put together waits for its longest answer. Take the lengths of all samples above, and a batch of sixteen rows.
#
# **Predict**: of all rows computed, what share computes a token that somebody needs?

# %%
# NBVAL_IGNORE_OUTPUT
lengths, ROWS = samples["n_tokens"][:], 16

def rows_if_all_wait(lengths):
    batches = [lengths[i : i + ROWS] for i in range(0, len(lengths), ROWS)]
    return sum(len(batch) * max(batch) for batch in batches)

def rows_if_refilled(lengths):
    free_at = [0] * ROWS                                   # when each row has ended its answer
    for length in lengths:                                 # the next answer starts in the row that is free first
        free_at[free_at.index(min(free_at))] += length
    return ROWS * max(free_at)

for name, rows in (("all wait", rows_if_all_wait(lengths)), ("refilled", rows_if_refilled(lengths))):
    print(f"{name:9} {rows:6} rows computed, {sum(lengths) / rows:.0%} of them needed")
assert sum(lengths) <= rows_if_refilled(lengths) <= rows_if_all_wait(lengths)

# %% [markdown]
# Waiting wastes about half of the work. Most of that is saved if the next answer starts as soon as a row is free (what is left is the end,
# when no answer waits any more):
# [continuous batching](../docs/glossary.md#continuous-batching) (Orca, [Yu et al. 2022](https://www.usenix.org/conference/osdi22/presentation/yu)).
#
# Inference servers such as vLLM do this. The loop in [`irpo_utils/sampling.py`](../irpo_utils/sampling.py) is simpler: a row that has ended leaves the
# batch, and no new one takes its place, so later steps have fewer rows. Prompts come longest first, so that rows of similar length are next to each
# other. The engine of the CPU profiles, [`irpo_utils/engines/cpu.py`](../irpo_utils/engines/cpu.py), uses the same loop with one batch per core. For
# the small models that fit a CPU, refilling rows would cost as much time as it saves, because keys and values have to be moved. And because every
# token is drawn with its own random number (section 5), none of this changes a completion:

# %%
# NBVAL_IGNORE_OUTPUT
crowded = draw(questions.select(range(8)), n=2, batch_size=16)
lonely = draw(questions.select(range(8)), n=2, batch_size=2, engine=None)           # None: the plain loop
same = sum(a == b for a, b in zip(crowded["completion_ids"], lonely["completion_ids"]))
print(f"{same} of {len(crowded)} answers are the same, drawn sixteen at a time and, in the plain loop, two at a time")
assert same == len(crowded) or not ON_CPU

# %% [markdown]
# ## 8 How probable was that answer?
#
# Every row of samples says how probable M_t found its own answer: `logprob`, the sum of the logarithms of the probabilities of all its tokens,
# in [nats](../docs/glossary.md#nat). Training will need it. The check is
# [teacher forcing](../docs/glossary.md#teacher-forcing): give the model the finished text and read off, at each place, how probable
# the token was that came next.
#
# **Predict**: the answer below is drawn at T = 1.5. Is its `logprob` that of the distribution at T = 1.5, or that of the
# model as it is, at T = 1?

# %%
# NBVAL_IGNORE_OUTPUT
hot = draw(questions.select([0]), n=1, temperature=1.5)[0]
P, answer = len(hot["prompt_ids"]), hot["completion_ids"]
with torch.inference_mode():
    forced = model(input_ids=torch.tensor([hot["prompt_ids"] + answer], device=model.device)).logits[0].float().cpu()

at_1 = [forced.log_softmax(-1)[P - 1 + i, token].item() for i, token in enumerate(answer)]
at_hot = [(forced / 1.5).log_softmax(-1)[P - 1 + i, token].item() for i, token in enumerate(answer)]
print(f"recorded {hot['logprob']:.3f} · teacher forcing at T = 1: {sum(at_1):.3f}, at T = 1.5: {sum(at_hot):.3f}")
assert abs(sum(at_1) - hot["logprob"]) < (1e-3 if ON_CPU else 2)

# %% [markdown]
# At T = 1. The loss compares how probable an answer is under two *models*; how it came to be drawn does not enter. Where
# was this answer improbable?

# %%
# NBVAL_IGNORE_OUTPUT
for token, logp in list(zip(answer, at_1))[:24]:
    print(f"{tokenizer.decode([token])!r:14} {logp:8.3f} {'▌' * round(-3 * logp)}")
assert all(logp <= 0 for logp in at_1)

# %% [markdown]
# Most tokens cost next to nothing. A few places carry almost the whole sum: there the model could have gone another way.
#
# Mind the index. The logits at place `P - 1 + i` predict the token at place `P + i`. **Predict** what happens if you are off by one:

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils import logprobs

late = sum(forced.log_softmax(-1)[P + i, token].item() for i, token in enumerate(answer))
[module] = logprobs.score(model, tokenizer, [hot["prompt_ids"]], [answer])
print(f"right place {sum(at_1):.2f} · logprobs.score {module:.2f} · one place late {late:.2f}")
assert abs(module - sum(at_1)) < (1e-3 if ON_CPU else 2)

# %% [markdown]
# No error, only another number: every token is scored by a model that has already seen it. Such a bug trains happily. That is why the tests of this
# repository compare three independent ways to get these sums.

# %% [markdown]
# ## 9 pass@k
#
# Back to the N answers. Here is how many of them are right, question by question.
#
# **Predict**: the share of right samples is printed first. Is the share of questions with *at least one* right sample
# about the same, or much higher?

# %%
# NBVAL_IGNORE_OUTPUT
import numpy as np

def right_counts(samples):
    """How many of its N samples are right, for every question in order."""
    return np.array(grading.grade(samples, task)["correct"]).reshape(-1, profile.n_samples).sum(1)

n, right = profile.n_samples, right_counts(samples)
print(f"right samples: {100 * right.mean() / n:.1f} % of {len(samples)}")
print(f"questions with at least one right sample: {100 * (right > 0).mean():.1f} % of {len(right)}")
print("questions by number of right samples:", dict(enumerate(np.bincount(right, minlength=n + 1).tolist())))
assert right.max() <= n and (right > 0).mean() >= right.mean() / n

# %% [markdown]
# Much higher. The gap between the two is what the method lives on: for those questions M_0 has shown that it can, and that it
# mostly does not.
#
# The chance that at least one of k samples is right is called [pass@k](../docs/glossary.md#passk). If n samples were drawn
# and c of them are right, count: of all ways to pick k of the n, how many hold a right one?

# %%
from itertools import combinations
from irpo_utils import evaluation

drawn = ["right", "wrong", "wrong", "wrong"]                   # n = 4 samples, c = 1 of them right
picks = list(combinations(drawn, 2))                           # every way to pick k = 2
good = [pick for pick in picks if "right" in pick]
print(f"{len(good)} of {len(picks)} picks hold a right one")
assert len(good) / len(picks) == evaluation.pass_at_k(n=4, c=1, k=2)

# %% [markdown]
# ### Exercise 1.4: pass@k without bias
#
# **Goal**: the count above as a formula, for any n, c and k. **Difficulty**: 2 of 3. **Time**: 10 minutes.
#
# It is easier to count the picks that hold *no* right one. `pass_at_k(n, c, k)` returns the chance between 0 and 1. `math.comb(a, b)` is the number of ways to
# pick b of a; it is 0 where b is larger than a.
#
# <details><summary>Hint</summary>
#
# How many ways are there to pick all k from the n − c wrong ones? Divide by the number of all ways to pick k from n.
#
# </details>

# %%
import math

def pass_at_k(n, c, k):
    # SOLUTION
    return 1 - math.comb(n - c, k) / math.comb(n, k)
    # STUB
    # return None      # your turn
    # END

# %%
print(checks_01.pass_at_k(pass_at_k))

# %% [markdown]
# The worked solution is in [solutions/01_sampling.ipynb](solutions/01_sampling.ipynb). The formula is that of
# [Chen et al. 2021](https://arxiv.org/abs/2107.03374), and it is *unbiased*: on average over draws it is the true chance. The
# formula that comes to mind first, one minus (1 − c/n) to the power k, is not. For n = 4, c = 1 and k = 4 we *know* that a
# right one is among the four:

# %%
n_, c, k = 4, 1, 4
print("unbiased:", evaluation.pass_at_k(n_, c, k), " first thought:", round(1 - (1 - c / n_) ** k, 3))

# %% [markdown]
# Now pass@k of whole models. The curves come from a finished run: your own of this profile if there is one,
# otherwise the one that ships with the repository. They show M_0 and the last model of that run.
#
# **Predict**: training raises pass@1, that is known from notebook 00. How do the two curves compare at the largest k?

# %%
# NBVAL_IGNORE_OUTPUT
import tempfile
from pathlib import Path

def is_finished(run):
    return (run / "profile.json").exists() and (run / f"iteration_{runs.read_profile(run).iterations}/metrics.json").exists()

root = Path(models.__file__).parents[1]                        # the repository
run = next((place for place in (root / "runs" / PROFILE, root / "notebooks" / "shipped_run") if is_finished(place)), None)
if run is None:
    run = Path(tempfile.mkdtemp(), "smoke")
    runs.run(profiles.get("smoke"), run, progress=False)
last = runs.read_profile(run).iterations
print(f"{run.name}: M_0 to M_{last}")
assert is_finished(run)

# %%
# NBVAL_IGNORE_OUTPUT
metrics = pd.read_csv(run / "metrics.csv")
curves = metrics[(metrics.metric == "pass_at_k") & metrics.iteration.isin([0, last])].copy()
curves["metric"] = [f"M_{t}" for t in curves.iteration]
assert curves.value.between(0, 1).all()
plots.sweep(curves, "k", "k, samples per question", "pass@k (%)")

# %%
# NBVAL_IGNORE_OUTPUT
before, after = (curves[curves.iteration == t].set_index("k").value for t in (0, last))
reached = [k for k in before.index if before[k] >= after[1]]
print(f"M_{last} is right at its first try in {100 * after[1]:.1f} % of the questions.")
print(f"M_0 gets there with {reached[0]} tries." if reached else f"M_0 does not get there with {before.index[-1]} tries.")
print(f"With {before.index[-1]} tries: M_0 {100 * before.iloc[-1]:.1f} %, M_{last} {100 * after[before.index[-1]]:.1f} %.")
assert before.is_monotonic_increasing and after.is_monotonic_increasing

# %% [markdown]
# The gap narrows as k grows: much of what the last model finds at the first try, M_0 finds once in many. Where it does not close,
# beware of the conclusion that training taught something new. How often does M_0 go the careful way at all, with an equation for
# every step, and where does that lead?

# %%
# NBVAL_IGNORE_OUTPUT
if "steps" in questions.column_names:
    by_steps = grading.grade(samples, task).to_pandas()[["id", "completion", "correct"]].merge(questions.to_pandas()[["id", "steps"]])
    by_steps["careful"] = by_steps.completion.str.count("=") >= by_steps.steps
    for steps, group in by_steps.groupby("steps"):
        print(f"{steps} steps: careful in {100 * group.careful.mean():4.1f} % of the samples; right in "
              f"{100 * group.correct[group.careful].mean():3.0f} % of these and {100 * group.correct[~group.careful].mean():.0f} % of the others")
    assert len(by_steps) == len(samples)

# %% [markdown]
# On long questions the careful way is rare and often slips, and without it hardly anything is right. Both chances multiply, so that
# even the largest k above misses what M_0 could do. A curve of pass@k ends where the samples end, and that is not where the
# ability ends.
#
# With k in the hundreds, [Yue et al. 2025](https://arxiv.org/abs/2504.13837) saw the curves of large models trained by
# reinforcement learning meet those of their base models, and then cross: at large k the base model wins. The paper that
# we follow reports no pass@k, so what it would show there is not known.

# %% [markdown]
# ## 10 Which temperature?
#
# A question gives pairs only if it has a winner *and* a loser among its N samples. Temperature shifts the balance. We draw N samples at six
# temperatures and count the right ones of every question.
#
# **Predict**: which temperature gives the most right samples? And is it the one to train on?

# %%
# NBVAL_IGNORE_OUTPUT
temperatures = (0.3, 0.6, 1.0, 1.3, 1.6, 2.0)
counts = {t: right_counts(draw(questions, temperature=t)).tolist() for t in temperatures}
for t in temperatures:
    print(f"T = {t}: {100 * np.mean(counts[t]) / n:5.1f} % right; the first questions: {counts[t][:12]} of {n}")
assert all(len(counts[t]) == len(questions) for t in temperatures)

# %% [markdown]
# Cold sampling has the most right answers, for the reason of section 3. But look at the lists: a question whose samples are all right, or all wrong,
# gives no pair.

# %% [markdown]
# ### Exercise 1.5: choose a temperature
#
# **Goal**: enough winners and losers. **Difficulty**: 3 of 3. **Time**: 15 minutes.
#
# `choose(counts, n)` takes a dictionary like the one above, temperature to list of right samples per question, and N. It
# returns the temperature at which the most questions can give a pair.
#
# <details><summary>Hint</summary>
#
# For one question with c right samples of n: when is there at least one winner and at least one loser? Count such
# questions for each temperature; `max(counts, key=...)` finds the best.
#
# </details>

# %%
def choose(counts, n):
    # SOLUTION
    def usable(temperature):
        return sum(0 < c < n for c in counts[temperature])
    return max(counts, key=usable)
    # STUB
    # return None      # your turn
    # END

# %%
print(checks_01.choose(choose))

# %% [markdown]
# The worked solution is in [solutions/01_sampling.ipynb](solutions/01_sampling.ipynb). For M_0, in a picture:

# %%
# NBVAL_IGNORE_OUTPUT
def shares_of(c):
    c = np.array(c)
    return {"right samples": c / n, f"at least one of {n} right": c > 0, "a winner and a loser": (c > 0) & (c < n)}

rows = [{"temperature": t, **evaluation.bootstrap_row(name, values)} for t in temperatures for name, values in shares_of(counts[t]).items()]
print("most usable questions at T =", max(temperatures, key=lambda t: shares_of(counts[t])["a winner and a loser"].mean()))
assert len(rows) == 3 * len(temperatures)
plots.sweep(pd.DataFrame(rows), "temperature", "Sampling temperature")

# %% [markdown]
# Cold: the N samples agree, so some questions have no loser, and others no winner. Hot: hardly anything is right. The best place lies between. The
# bands are 95 % intervals over questions; where they overlap widely, these questions do not decide. (Where they overlap a little, a
# comparison question by question may still do so: notebook [05](05_iterations.ipynb).)
#
# As training goes on the model gets better, and the balance moves. **Predict**: for the *last* model, does the best temperature lie
# lower or higher?

# %%
# NBVAL_IGNORE_OUTPUT
adapter = run / f"iteration_{last}" / "adapter"
later = last if adapter.exists() and runs.read_profile(run).model == profile.model else 0
models.set_adapter(model, adapter if later else None)           # the run's last model, if it belongs to this base
counts_later = {t: right_counts(draw(questions, temperature=t)).tolist() for t in temperatures}
models.set_adapter(model, None)                                 # back to M_0

rows = [{"metric": name, "temperature": t, "value": np.mean([0 < c < n for c in by_t[t]])}
        for name, by_t in (("M_0", counts), (f"M_{later} (last)", counts_later)) for t in temperatures]
for name, by_t in (("M_0", counts), (f"M_{later}", counts_later)):
    print(f"{name}: most usable questions at T =", max(temperatures, key=lambda t: sum(0 < c < n for c in by_t[t])))
assert all(0 <= row["value"] <= 1 for row in rows)
plots.sweep(pd.DataFrame(rows), "temperature", "Sampling temperature", "Questions with a winner and a loser (%)")

# %% [markdown]
# With the seed model: higher. A good model has to be heated before it makes mistakes to learn from. So the paper samples
# at T = 0.8 in the first two iterations and at 1.3 in the next two, so that enough samples are wrong
# ([section 3.1](https://arxiv.org/html/2404.19733v3#S3.SS1)). Others raise it step by step, too
# ([DPO-VP](https://arxiv.org/abs/2503.12854): 0.7, 1.0, 1.2), or draw the losers separately at a high temperature
# ([Prasad et al. 2024](https://arxiv.org/abs/2411.04109)). The paper has no table that
# compares such schedules. In a profile it is the list `temperature`.

# %% [markdown]
# ## What you have learnt
#
# - A prompt is instruction plus chat template, down to the token. Without the template the same model is another one.
# - Temperature divides logits; top-p cuts the tail; one random number per token draws it.
# - The KV cache spares repeated positions, and the prompt is computed once for all N answers.
# - `logprob` is that of the model at T = 1, a sum over the answer's tokens, and teacher forcing gives it back.
# - pass@k is counted, not guessed; the gap from pass@1 to pass@N is what there is to elicit.
# - The right temperature is one that leaves winners and losers. It rises as the model gets better.
#
# **What to try.** Double N in section 10 (`draw(questions, n=...)`): does the best temperature move? Change `top_p` there. Run
# `python -m irpo_utils run --temperature 0.6 --out runs/cooler`, and see in notebook 05 whether more usable questions make a better M_1: usable
# says that there are pairs, not that they teach much.
#
# **Recall, without looking up.**
#
# 1. Why must the chat template end right before the answer?
# 2. A colleague applies the temperature to probabilities: `softmax(z) / T`. What does the sampler do then?
# 3. Why does the cache save so much more in positions than in time, and how does a batch change that?
# 4. n = 8, c = 2: what is pass@7?
# 5. All N samples of a question are right. What does it contribute to training?
#
# **Next**: [02 · Grading](02_grading.ipynb): when is an answer right, and what happens if the grader is wrong?
