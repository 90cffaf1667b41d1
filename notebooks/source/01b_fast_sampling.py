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
# # 01b · Fast sampling (optional)
#
# **What you will be able to do**
#
# - remove the tail of a distribution with top-p;
# - explain why text is generated with a cache of keys and values;
# - explain why N completions of one prompt are cheap, and why a batch should refill its free rows.
#
# | | `smoke` | `cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook, on two cores | 15 seconds | 50 seconds | as `cpu` for the seed model |
#
# **Needs**: the packages of this repository (in Colab: [`docs/colab.md`](../docs/colab.md)). The course does not depend on
# this notebook.
#
# **Before this**: [01 · Sampling](01_sampling.ipynb).

# %%
import os, sys
sys.path[:0] = [".", ".."]                          # helpers_01.py and checks_01.py are next to the notebooks
PROFILE = os.environ.get("IRPO_PROFILE", "cpu")     # "cpu", "smoke", or a GPU profile

# %% tags=["nbval-ignore-output"]
import torch

import checks_01, helpers_01
from irpo_utils import grading, models, profiles, sampling, tasks
from irpo_utils.ops import run as runs
from irpo_utils.ops.cli import quiet_libraries

quiet_libraries()
profile = profiles.get(PROFILE)
print("profile", PROFILE, "· device", models.default_device(), "· seed", profile.seed)

# %% tags=["nbval-ignore-output"]
task = tasks.get(profile.task)
questions = task.load("validation", profile.data).select(range(24 if PROFILE == "smoke" else 80))
model, tokenizer = runs.load_model(profile)

def draw(rows, **settings):
    """N completions per question with the settings of the profile, or with others."""
    defaults = {"n": profile.n_samples, "temperature": 1.0, "engine": runs.engine_of(profile),
                "batch_size": profile.sampling_batch_size}
    return sampling.sample(model, tokenizer, rows, task, seed=profile.seed, progress=False,
                           max_new_tokens=profile.max_new_tokens, **(defaults | settings))

samples = draw(questions)
print(f"{len(samples)} completions of {len(questions)} questions, model {profile.model}")

# %% [markdown]
# ## 1 Top-p
#
# A high temperature gives every unlikely token a chance. [Nucleus sampling](../docs/glossary.md#top-p), or top-p, removes
# this tail ([Holtzman et al. 2020](https://arxiv.org/abs/1904.09751)). Sort the tokens by probability. Keep the smallest
# set from the top whose mass reaches $p$. Set the others to zero, and renormalise. For probabilities 0.5, 0.3, 0.15, 0.05
# and $p = 0.7$ two tokens remain, with 0.5/0.8 and 0.3/0.8.

# %%
logits_of_four = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
evenly = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000       # in place of random numbers

tokens = sampling.next_tokens(logits_of_four.expand(1000, -1), evenly, temperature=1.0, top_p=0.7)
print((tokens.bincount(minlength=4) / 1000).tolist())
assert tokens.bincount(minlength=4).tolist() == [625, 375, 0, 0]

# %% [markdown]
# ### Exercise 1b.1: the nucleus by hand
#
# **Goal**: remove the tail as the text above says. **Difficulty**: 2 of 3. **Time**: 10 minutes.
#
# `nucleus(probabilities, top_p)` takes a list of numbers that add up to 1, in any order. It returns a list of the same
# length *in the same order*: zero for the removed tokens, and the others divided by their sum.
#
# <details><summary>Hint</summary>
#
# `order = sorted(range(len(probabilities)), key=lambda i: -probabilities[i])` gives the positions, most probable first.
# Go through them and stop when the mass of the kept tokens reaches `top_p`. Keep the token that reaches it.
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
    # return ...      # your turn
    # END

# %%
print(checks_01.nucleus(nucleus))

# %% [markdown]
# [Worked solution](solutions/01b_fast_sampling.ipynb).
#
# **Predict**: at $T = 1.6$, how does top-p 0.8 change the share of correct completions?

# %% tags=["nbval-ignore-output"]
for temperature, top_p in ((1.0, 1.0), (1.6, 1.0), (1.6, 0.8)):
    graded = grading.grade(draw(questions, temperature=temperature, top_p=top_p), task)
    share = sum(graded["correct"]) / len(graded)
    print(f"T = {temperature}, top-p {top_p}: {100 * share:.1f} % of {len(graded)} completions are correct")

# %% [markdown]
# Top-p undoes much of the damage of a high temperature. The paper does not say whether it used top-p. Our profiles leave it
# off and exclude no token.
#
# ## 2 One completion, token by token
#
# Generation is a loop: run the text through the model, draw a token, append it, repeat. Here it is for one question, with
# greedy decoding.

# %% tags=["nbval-ignore-output"]
greedy = draw(questions, n=1, temperature=0.0)
example = max(greedy, key=lambda row: row["n_tokens"])
start = torch.tensor([example["prompt_ids"]], device=model.device)
ends = models.end_tokens(model, tokenizer)
print(f"prompt of {start.shape[1]} tokens, completion of {example['n_tokens']}:\n{example['completion'][-300:]}")

# %%
@torch.inference_mode()
def decode_plainly(ids, limit):
    """Every step runs the whole text. Returns the new tokens and the number of positions computed."""
    tokens, positions = [], 0
    while len(tokens) < limit and (not tokens or tokens[-1] not in ends):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        positions += ids.shape[1]
        tokens.append(logits.argmax().item())
        ids = torch.cat([ids, torch.tensor([tokens[-1:]], device=ids.device)], 1)
    return tokens, positions

# %% [markdown]
# **Predict**: with a prompt of P tokens and a completion of L tokens, about how many
# [positions](../docs/glossary.md#position) does this loop compute? P + L, or more like L times P?

# %% tags=["nbval-ignore-output"]
plain, positions_plainly = decode_plainly(start, profile.max_new_tokens)
P, L = start.shape[1], len(plain)
print(f"P = {P}, L = {L}: {positions_plainly} positions computed")
assert positions_plainly == L * P + L * (L - 1) // 2

# %% tags=["remove-cell"]
ON_CPU = models.default_device() == "cpu"            # float32: two ways to compute agree closely
assert plain == example["completion_ids"] or not ON_CPU

# %% [markdown]
# More than L times P: the prompt runs through the model again for every new token. Most of these positions were computed
# before, with the same result, because no position depends on later ones. Later positions need the *keys* and
# *values* of earlier ones, in every attention layer. The [KV cache](../docs/glossary.md#kv-cache) keeps them.

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

# %% tags=["nbval-ignore-output"]
cached, positions_cached = decode_with_cache(start, profile.max_new_tokens)
print(f"the same tokens: {cached == plain}; {positions_cached} positions instead of {positions_plainly}")
assert positions_cached == P + len(cached) - 1

# %% [markdown]
# **Predict**: the cache saves nearly all positions. Does it save as much of the *time*?

# %% tags=["nbval-ignore-output"]
t_plain = helpers_01.seconds(decode_plainly, start, L)
t_cached = helpers_01.seconds(decode_with_cache, start, L)
print(f"positions: {positions_plainly / positions_cached:.1f} times fewer; time: {t_plain / t_cached:.1f} times as fast")

# %% [markdown]
# It saves far less time for one completion of a small model. Each step has a fixed cost (Python, launching the operations,
# reading the weights), whether it computes one position or sixty. That is why you decode many completions at once: one step
# for all of them costs less than one step for each.
#
# ## 3 One prompt, N completions
#
# Iterative RPO needs N completions of *the same* prompt. Running the prompt through the model
# ([prefill](../docs/glossary.md#prefill)) gives the same result N times. Compute it once, and copy its keys and values.

# %% tags=["nbval-ignore-output"]
prompt_ids = torch.tensor([max(samples["prompt_ids"], key=len)], device=model.device)
with torch.inference_mode():
    out = model(input_ids=prompt_ids, use_cache=True)                # the prompt, once
    first = out.logits[0, -1].topk(3).indices[:, None]       # three completions that start differently
    cache = out.past_key_values
    cache.batch_repeat_interleave(3)                                 # its keys and values, three times
    shared = model(input_ids=first, past_key_values=cache, use_cache=True).logits[:, -1].float()
    copied = model(input_ids=torch.cat([prompt_ids.repeat(3, 1), first], 1)).logits[:, -1].float()
print(f"largest difference between the logits: {(shared - copied).abs().max().item():.1e}")

# %% tags=["remove-cell"]
assert torch.allclose(shared, copied, atol=1e-3 if ON_CPU else 0.5)

# %% [markdown]
# The distributions are the same up to rounding.
#
# **Predict**: how many times as long does the prefill of 32 copies take as that of one prompt?

# %% tags=["nbval-ignore-output"]
@torch.inference_mode()
def prefill(ids):
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).logits

t_once = helpers_01.seconds(prefill, prompt_ids, repeats=7)
t_copies = helpers_01.seconds(prefill, prompt_ids.repeat(32, 1), repeats=7)
print(f"one prompt {1000 * t_once:.1f} ms, 32 copies {1000 * t_copies:.1f} ms: {t_copies / t_once:.1f} times as long")

# %% [markdown]
# <details><summary>Answer</summary>
#
# Less than 32 times as long, because all copies share the fixed cost of a step. One shared prompt is still far cheaper.
#
# </details>

# %% [markdown]
# ### Exercise 1b.2: what sharing the prompt saves
#
# **Goal**: count before you optimise. **Difficulty**: 2 of 3. **Time**: 10 minutes.
#
# A prompt has `prompt_tokens` tokens. `lengths` lists the number of tokens of each of its completions. Without
# sharing, every completion needs all positions of the prompt and its own. With sharing, the prompt is computed once.
# `saved(prompt_tokens, lengths)` returns the share of the positions that is saved: (without − with) / without.
#
# <details><summary>Hint</summary>
#
# Write `without` and `with_sharing` as two separate sums. How often does the prompt occur in each?
#
# </details>

# %%
def saved(prompt_tokens, lengths):
    # SOLUTION
    without = len(lengths) * prompt_tokens + sum(lengths)
    with_sharing = prompt_tokens + sum(lengths)
    return (without - with_sharing) / without
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_01.saved(saved))

# %% [markdown]
# [Worked solution](solutions/01b_fast_sampling.ipynb).
#
# ## 4 A batch that does not wait
#
# Completions differ in length. A batch that starts together waits for its longest completion. The alternative is
# [continuous batching](../docs/glossary.md#continuous-batching) (Orca,
# [Yu et al. 2022](https://www.usenix.org/conference/osdi22/presentation/yu)): a free row takes the next completion at once.
#
# **Predict**: below, 48 completions of $M_0$ go through 8 rows. In each step a row either produces a token or is idle. What
# share of the row steps produces one, with and without waiting?

# %% tags=["nbval-ignore-output"]
lengths = samples["n_tokens"][:48]
helpers_01.gantt(lengths, n_rows=8)

# %% tags=["nbval-ignore-output"]
for name, schedule in (("all wait", helpers_01.schedule_waiting), ("refilled", helpers_01.schedule_refilled)):
    steps = max(start + length for _, start, length in schedule(lengths, 8))
    print(f"{name}: {steps} steps of 8 rows, {sum(lengths) / (8 * steps):.0%} of them produce a token")

# %% [markdown]
# Refilling moves completions between batches. A completion should not depend on that. In this package every token has its own
# random number (notebook [01](01_sampling.ipynb)), so the batch changes no completion, up to rounding. Compare two batch
# sizes:

# %% tags=["nbval-ignore-output"]
eight = questions.select(range(8))
large_batch = draw(eight, n=2, batch_size=16)
small_batch = draw(eight, n=2, batch_size=2, engine=None)                   # None: the plain loop
same = sum(a == b for a, b in zip(large_batch["completion_ids"], small_batch["completion_ids"]))
print(f"{same} of {len(large_batch)} completions are the same in batches of 16 and of 2")

# %% [markdown]
# ## What you have learnt
#
# - Top-p removes the tail that a high temperature makes likely.
# - The KV cache saves repeated positions. For one completion of a small model the time falls less.
# - The prompt is computed once for all N completions, and a batch should not wait for its longest one.
#
# **Try**: draw the figure of section 4 with 4 and with 16 rows. For which does refilling save more?
#
# **Recall** without scrolling up, then open the answers.
#
# 1. Why does the cache save far more positions than time, and how does a batch change that?
# 2. Which completions profit most from a shared prompt?
#
# <details><summary>Answers</summary>
#
# 1. A step has a fixed cost. With many completions per step, the fixed cost is shared and the positions dominate.
# 2. Short completions of long prompts.
#
# </details>
#
# **Next**: [02 · Grading](02_grading.ipynb): when is an answer correct?
