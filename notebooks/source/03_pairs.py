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
# # 03 · Pairs
#
# **What you will be able to do**
#
# - pair winners with losers by hand as the paper does, and say how many *different* pairs come out;
# - say which questions give no pairs, and what N, gold solutions and duplicates change about it;
# - look at a pair and find the step at which the winner and the loser part.
#
# | | `smoke` | `cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook | about 12 s | about 12 s | not measured here |
#
# **Needs**: the packages of this repository. Samples come from your own run if there is one (`make run`), otherwise from
# the finished run that ships with the notebooks.
#
# **Before this**: [02 · Grading](02_grading.ipynb).

# %%
import os, sys
sys.path[:0] = [".", ".."]                     # checks_03.py lies beside the notebooks; ".." serves the solutions
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
# ## 1 Two sets
#
# The model wrote N completions for one question, and each was graded. Those with reward 1 are the
# [winners](../docs/glossary.md#winner), the others the [losers](../docs/glossary.md#loser). The paper writes $G^w$ and $G^l$
# ([section 2](https://arxiv.org/html/2404.19733v3#S2)). Take five samples of one question, `w` for right and `l` for wrong.

# %%
verdicts = "wlwll"

winners = [i for i, verdict in enumerate(verdicts) if verdict == "w"]
losers = [i for i, verdict in enumerate(verdicts) if verdict == "l"]
print("winners:", winners, "losers:", losers)

# %% [markdown]
# A [preference pair](../docs/glossary.md#preference-pair) is a winner and a loser of the *same* question. The loss of the next
# notebook wants pairs, K of them per question. Two winners and three losers: which pairs?
#
# ## 2 Walk both sets
#
# The paper walks through both sets at the same time; when the end of a set is reached, it starts again at that
# set's first element (footnote 2). Only the exhausted set starts again, the other one walks on. Call it
# [wrap-around pairing](../docs/glossary.md#wrap-around-pairing).
#
# **Predict**: K = 5. Which winner meets which loser in the third pair, and in the fourth?

# %%
from itertools import cycle, islice

by_hand = list(islice(zip(cycle(winners), cycle(losers)), 5))
by_hand

# %% [markdown]
# `cycle` starts a list again without end, `zip` walks two of them in step, `islice` takes the first five. In the third pair
# the winners begin again (sample 0) while the losers still have one left (sample 4). In the fourth the losers begin again.
#
# With indices the same is one line: pair number $i$ joins winner $i \bmod |G^w|$ with loser $i \bmod |G^l|$. That line is
# the function `pairs.walk`.

# %%
from irpo_utils import pairs

walked = pairs.walk(len(winners), len(losers), 5)
print(walked)
assert [(winners[i], losers[j]) for i, j in walked] == by_hand

# %% [markdown]
# The walk is not random, and does not need to be: the samples are independent draws, so their order already is. What does
# it buy over drawing pairs by lot? Count how often each of four winners is used in eight pairs.
#
# **Predict**: by the walk each is used twice. And by lot?

# %%
import random
from collections import Counter

rng = random.Random(0)
by_lot = [rng.randrange(4) for _ in range(8)]
print("walk:", Counter(i for i, _ in pairs.walk(4, 5, 8)))
print("lot: ", Counter(by_lot))

# %% [markdown]
# The walk uses all winners equally often, up to one; so it does with the losers. By lot some are used again and again and
# some never. Whether this changes the trained model is not known: the paper does not compare. `build_pairs(pairing="random")` lets you try.

# %% [markdown]
# ### Exercise 3.1: wrap around
#
# **Goal**: the pairing of the paper. **Difficulty**: 1 of 3. **Time**: 10 minutes.
#
# Write `wrap_around(winners, losers, k)`. It takes two lists of sample numbers and returns a list of `k` tuples
# `(winner, loser)`; an empty list if either set is empty. Do it without `cycle`.
#
# <details><summary>Hint</summary>
#
# `i % len(winners)` counts 0, 1, ..., and begins again at 0. It is an index; the sample number is `winners[i % len(winners)]`.
#
# </details>

# %%
def wrap_around(winners, losers, k):
    # SOLUTION
    if not winners or not losers:
        return []
    return [(winners[i % len(winners)], losers[i % len(losers)]) for i in range(k)]
    # STUB
    # return ...      # your turn
    # END

# %%
import checks_03

print(checks_03.wrap_around(wrap_around))

# %% [markdown]
# [Solution](solutions/03_pairs.ipynb)

# %% [markdown]
# ## 3 How many different pairs?
#
# Four winners and six losers make 24 combinations.
#
# **Predict**: walk on and on. Will all 24 come up?

# %%
first_met = {}
for number, pair in enumerate(pairs.walk(4, 6, 48)):
    first_met.setdefault(pair, number)

for i in range(4):
    print(f"winner {i}  ", *(f"{first_met.get((i, j), '·'):>3}" for j in range(6)))
print(f"{len(first_met)} of 24 combinations after 48 pairs")

# %% [markdown]
# The numbers say in which pair a combination first came up; a dot never did. Only half of them: after 12 pairs both sets end
# *together*, and the walk repeats itself. 12 is the [least common multiple](../docs/glossary.md#least-common-multiple) of 4 and 6.
# So the number of different pairs is the smaller of K and the least common multiple. Here it is counted for all sets up to 30, and K up to 20:

# %%
from math import lcm

for n_winners in range(1, 31):
    for n_losers in range(1, 31):
        for k in (1, 4, 10, 15, 20):
            assert len(set(pairs.walk(n_winners, n_losers, k))) == min(k, lcm(n_winners, n_losers))

# %% [markdown]
# Did the paper train on the same pair twice? Its settings are N = 30, K = 10 for GSM8K, N = 30, K = 20 for ARC and N = 20,
# K = 15 for MATH ([section 3](https://arxiv.org/html/2404.19733v3#S3)). GSM8K has one more winner, the worked solution that comes with the question.
#
# **Predict**: for which splits into winners and losers does a pair repeat?

# %%
for name, n, k, gold in (("GSM8K", 30, 10, 1), ("ARC", 30, 20, 0), ("MATH", 20, 15, 0), ("MATH with gold", 20, 15, 1)):
    splits = [(right + gold, n - right) for right in range(n + 1) if right + gold > 0 and right < n]
    repeating = [split for split in splits if lcm(*split) < k]
    print(f"{name:15} {len(splits)} splits, repeats in", repeating or "none")

# %% [markdown]
# Hardly ever: a small least common multiple takes sets that share divisors. (Whether MATH had gold solutions among the winners,
# the paper does not say.) Among *small* sets it is different: one winner and two losers give two different pairs, whatever K.

# %% [markdown]
# ### Exercise 3.2: the number of different pairs
#
# **Goal**: count without walking. **Difficulty**: 2 of 3. **Time**: 5 minutes.
#
# Write `distinct_pairs(n_winners, n_losers, k)`: how many different pairs the walk gives. Sets may be empty. Loops are not needed.
#
# <details><summary>Hint</summary>
#
# The rule stands above the loop that counts. What is the least common multiple of 0 and 5 in Python, and does it fit?
#
# </details>

# %%
def distinct_pairs(n_winners, n_losers, k):
    # SOLUTION
    return min(k, lcm(n_winners, n_losers))      # lcm(0, n) is 0: an empty set gives no pairs
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_03.distinct_pairs(distinct_pairs))

# %% [markdown]
# [Solution](solutions/03_pairs.ipynb)

# %% [markdown]
# ## 4 What is left out, and what is put in
#
# `build_pairs` does the walk for every question and counts what it left out. Four questions with four samples each:

# %%
from datasets import Dataset

def toy(verdicts, text=lambda question, i: f"{question} sample {i}"):
    """Graded completions from strings: w a winner, l a loser."""
    return Dataset.from_list([
        {"id": question, "sample": i, "prompt": question, "prompt_ids": [1, 2], "completion": text(question, i),
         "completion_ids": [10 + i, 3], "correct": letter == "w"}
        for question, letters in verdicts.items() for i, letter in enumerate(letters)])

four = {"mixed": "wlwl", "easy": "wwww", "hard": "llll", "one": "lllw"}

# %% [markdown]
# By hand: two questions have both kinds.
#
# **Predict**: K = 3. How many pairs, and from which questions?

# %%
by_hand = []
for question, letters in four.items():
    right, wrong = ([i for i, letter in enumerate(letters) if letter == kind] for kind in "wl")
    if right and wrong:
        by_hand += [(question, right[i], wrong[j]) for i, j in pairs.walk(len(right), len(wrong), 3)]
by_hand

# %%
preferences, counts = pairs.build_pairs(toy(four), k=3)

assert list(zip(preferences["id"], preferences["chosen_sample"], preferences["rejected_sample"])) == by_hand
{name: number for name, number in counts.items() if number}

# %% [markdown]
# - `all_right`: no loser, so the winners have nobody to beat. The question has been learnt, or is too easy.
# - `all_wrong`: no winner. The question is too hard for this model, or its answers cannot be read (see [02](02_grading.ipynb)).
#
# Both are simply dropped. The training set is what the model gets right *sometimes*.

# %% [markdown]
# ### Gold solutions
#
# Some data sets come with worked solutions. On GSM8K the paper adds the [gold chain](../docs/glossary.md#gold-chain) to the winners,
# so that no set of winners is empty ([section 3.1](https://arxiv.org/html/2404.19733v3#S3.SS1)). Here it is put in front, with sample number -1.
#
# **Predict**: which winners has the question `hard` now, and what happens to `easy`?

# %%
gold = [{"id": question, "completion": f"{question} gold", "completion_ids": [99, 3]} for question in four]
preferences, counts = pairs.build_pairs(toy(four), k=3, gold=gold)

for question in four:
    print(question, [(row["chosen_sample"], row["rejected_sample"]) for row in preferences if row["id"] == question])
print("pairs whose winner is the gold chain:", counts["gold_winners"], "of", counts["pairs"])

# %% [markdown]
# `hard` is saved: its only winner is the gold chain, in each of its pairs. `easy` is still lost, for it lacks losers.
#
# There is a price. The gold chain was written by people, not drawn from M_t. The model may find it improbable, and the pair
# then says "write like this person" as much as "reason like this". ARC has no worked solutions; there the paper drops such questions.

# %% [markdown]
# ### Exercise 3.3: how much gold?
#
# **Goal**: the share of pairs that gold chains take. **Difficulty**: 2 of 3. **Time**: 10 minutes.
#
# Write `gold_pairs(n_winners, k)`: in how many of the `k` pairs of one question is the gold chain the winner, when it stands
# in front of `n_winners` sampled winners? (There is at least one loser.)
#
# <details><summary>Hint</summary>
#
# With gold there are `n_winners + 1` winners, and gold is number 0 of them. So it is used in pair 0, in pair `n_winners + 1`, and so on.
# How many multiples of `n_winners + 1` lie in `range(k)`?
#
# </details>

# %%
def gold_pairs(n_winners, k):
    # SOLUTION
    return len(range(0, k, n_winners + 1))      # k / (n_winners + 1), rounded up
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_03.gold_pairs(gold_pairs))

# %% [markdown]
# [Solution](solutions/03_pairs.ipynb)

# %% [markdown]
# ### Duplicates
#
# Samples can agree word for word, above all short ones at a low temperature. Then different sample numbers are the same text.
#
# **Predict**: six samples, K = 4; all losers say the same, and so do the winners. How many different pairs of *texts* come out?

# %%
same = toy({"q": "wlwlwl"}, text=lambda question, i: "blurted" if i % 2 else "careful")
for deduplicate in (False, True):
    preferences, counts = pairs.build_pairs(same, k=4, deduplicate=deduplicate)
    texts = list(zip(preferences["chosen"], preferences["rejected"]))
    print(f"deduplicate={deduplicate!s:5}  {len(texts)} pairs, {len(set(texts))} different; "
          f"duplicates {counts['duplicates']}, repeated {counts['repeated']}")

# %% [markdown]
# One, either way. [Deduplication](../docs/glossary.md#duplicate) leaves out texts that the same question already has on that side. It
# cannot make new pairs out of nothing: where little is left, the walk repeats itself, and `repeated` counts that.
#
# What it changes is the *weight* within a question. Without it a text that was sampled five times stands in the walk five times.
# The paper describes no such step, so without it you are closer to the paper. With it, the pairs of a question differ more. The default here is with.

# %% [markdown]
# ## 5 Pairs of a real model
#
# Now the samples of M_0, from your run or from the shipped one, or a few made on the spot.

# %%
from pathlib import Path

runs = [Path(up, "runs", PROFILE) for up in ("..", "../..")]
if profile.model == "seed":                                     # the shipped run belongs to the small model
    runs += [Path("shipped_run"), Path("../shipped_run")]
runs = [run for run in runs if (run / "iteration_0" / "pairs" / "state.json").exists()
        and (run / "iteration_0" / "graded" / "state.json").exists()]

# %%
# NBVAL_IGNORE_OUTPUT
from datasets import load_from_disk
from irpo_utils import grading, sampling, tasks
from irpo_utils.ops.run import load_model, read_profile

if runs:
    profile = read_profile(runs[0])
    graded = load_from_disk(str(runs[0] / "iteration_0" / "graded"))
else:
    task, (model, tokenizer) = tasks.get(profile.task), load_model(profile)
    questions = task.load("train", profile.data).shuffle(seed=profile.seed).select(range(100))
    samples = sampling.sample(model, tokenizer, questions, task, n=profile.n_samples, progress=False,
                              temperature=profile.temperature_of(0), top_p=profile.top_p,
                              max_new_tokens=profile.max_new_tokens, batch_size=profile.sampling_batch_size)
    graded = grading.grade(samples, task)
assert {"completion_ids", "correct"} <= set(graded.column_names)

# %% [markdown]
# **Predict**: the small M_0 is wrong in most of its samples. What share of the questions gives pairs?

# %%
# NBVAL_IGNORE_OUTPUT
preferences, counts = pairs.build_pairs(graded, k=profile.k_pairs, deduplicate=profile.deduplicate,
                                        max_length=profile.max_length)
share = sum(graded["correct"]) / len(graded)
print(f"N = {profile.n_samples}, K = {profile.k_pairs}, right samples: {share:.2f}")
print({name: number for name, number in counts.items() if number})
assert counts["used"] + counts["all_right"] + counts["all_wrong"] <= counts["questions"]

# %% [markdown]
# More than you might think: one right sample among N is enough. The questions that are left out are nearly all too
# hard, and very few too easy. Check one question against the walk by hand: texts that repeat are left out, then both sets are walked.

# %%
table = graded.to_pandas()
used = preferences[0]["id"]
mine = table[table.id == used].drop_duplicates(["completion", "correct"])
right, wrong = mine[mine.correct]["sample"].tolist(), mine[~mine.correct]["sample"].tolist()
if profile.deduplicate and profile.max_length is None:
    built = [(row["chosen_sample"], row["rejected_sample"]) for row in preferences if row["id"] == used]
    assert built == [(right[i], wrong[j]) for i, j in pairs.walk(len(right), len(wrong), profile.k_pairs)]

# %% [markdown]
# And these are the pairs on which M_1 was trained, if the run made them without gold and kept all of them:

# %%
if runs and not profile.gold and profile.max_pairs is None:
    stored = load_from_disk(str(runs[0] / "iteration_0" / "pairs"))
    assert len(stored) == len(preferences)
    assert all(stored[i] == preferences[i] for i in range(0, len(stored), 50))

# %% [markdown]
# ### Who is dropped?
#
# Long prompts mostly ask for more steps. Sort the questions into quarters by the length of their prompts.
#
# **Predict**: which quarter loses most questions, and why?

# %%
# NBVAL_IGNORE_OUTPUT
import pandas as pd

table["tokens"] = table.prompt_ids.map(len)
questions = table.groupby("id").agg(tokens=("tokens", "first"), right=("correct", "mean"))
quarters = ["shortest", "second", "third", "longest"]
questions["quarter"] = pd.qcut(questions.tokens.rank(method="first"), 4, labels=quarters)
questions["fate"] = [{0: "all wrong", 1: "all right"}.get(share, "gives pairs") for share in questions.right]
fates = pd.crosstab(questions.quarter, questions.fate, normalize="index").round(2)
print(fates.to_string())
assert fates.sum(axis=1).round(1).eq(1).all()

# %% [markdown]
# The long ones, as all their samples are wrong. So the first training set over-represents short questions. This is a
# filter that nobody chose, and it moves: as the model gets better, hard questions enter at one end and easy ones leave at the other.

# %%
# NBVAL_IGNORE_OUTPUT
files = sorted(runs[0].glob("iteration_*/pairs/counts.json")) if runs else []
history = [pd.read_json(file, typ="series") for file in files] or [pd.Series(counts)]
columns = ["questions", "used", "all_wrong", "all_right", "duplicates", "repeated", "pairs"]
print(pd.DataFrame(history)[columns].rename(index="M_{}".format).to_string())
assert all(row.used + row.all_wrong + row.all_right <= row.questions for row in history)

# %% [markdown]
# Each row is one iteration, made with the model named on the left. At first training data *grow*, as hard questions come into
# reach. Then too many are all right. On ARC the paper starts at that end: about 20,000 pairs in its first iteration, 11,000 in its second,
# 5,000 in its third ([section 3.2](https://arxiv.org/html/2404.19733v3#S3.SS2)). With a fixed set of questions the supply runs dry
# in the end. The authors see in that a reason why the gains shrink ([appendix A](https://arxiv.org/html/2404.19733v3#A1)).
#
# Look at `duplicates`, too: as the model becomes surer of itself, more and more samples say the same. [05](05_iterations.ipynb) returns to that.

# %% [markdown]
# ## 6 How many samples?
#
# A question on which each sample is right with probability $p$ is lost if all N are wrong or all are right:
#
# $$P(\text{lost}) = (1-p)^N + p^N.$$

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils import plots

curve = [{"metric": f"right with p = {p}", "n": n, "value": (1 - p) ** n + p ** n}
         for p in (0.02, 0.1, 0.5, 0.95) for n in (1, 2, 4, 8, 16, 30)]
figure = plots.sweep(pd.DataFrame(curve), "n", "Samples per question N", "Questions without a pair (%)")
assert all(0 <= point["value"] <= 1 for point in curve)
figure

# %% [markdown]
# Questions near one half are safe with very few samples. The rare ones are what many samples are for: those that the model
# hardly ever solves, and those that it hardly ever misses. Their curves fall slowly.
#
# Does this hold for real samples? Use only the first n samples of each question and count.

# %%
# NBVAL_IGNORE_OUTPUT
for n in [n for n in (1, 2, 4, 8, 16, 30) if n <= profile.n_samples]:
    share = table[table["sample"] < n].groupby("id").correct.mean()
    all_wrong, all_right = (share == 0).mean(), (share == 1).mean()
    print(f"n = {n:2}: all wrong {all_wrong:.2f}, all right {all_right:.2f}, lost {all_wrong + all_right:.2f}")
assert share.isin([0, 1]).mean() < 1

# %% [markdown]
# ### Exercise 3.4: who is lost at N = 4, and who at N = 16?
#
# **Goal**: plan N before you pay for it. **Difficulty**: 3 of 3. **Time**: 15 minutes.
#
# Write `lost(chances, n)`. `chances` is a list with one probability per question, that of a sample being right. Return a tuple:
# the expected number of questions that are all wrong, and the expected number that are all right.
#
# <details><summary>Hint</summary>
#
# The expected number of lost questions is the sum of the probabilities of losing each. Keep the two kinds apart: the first
# power above belongs to one, the second to the other.
#
# </details>

# %%
def lost(chances, n):
    # SOLUTION
    all_wrong = sum((1 - p) ** n for p in chances)
    all_right = sum(p ** n for p in chances)
    return all_wrong, all_right
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_03.lost(lost))

# %% [markdown]
# [Solution](solutions/03_pairs.ipynb)

# %% [markdown]
# ## 7 What does a pair say?
#
# A pair says: this one rather than that one. To see what it teaches, lay the two side by side and look for the first step, that is
# the first line, at which they part.

# %%
from itertools import zip_longest

def parting(winner, loser):
    """Number of the first line in which the two differ; None if they are equal."""
    steps = zip_longest(winner.split("\n"), loser.split("\n"))
    return next((i for i, (ours, theirs) in enumerate(steps) if ours != theirs), None)

winner = "57*2=114\n114-2=112\nFinal answer: 112"
for loser in ("57*2=114\n114-2=102\nFinal answer: 102", "57*2=114", winner):
    print(parting(winner, loser))

# %% [markdown]
# A model may write anything, also HTML. Text of a model is never put on a page as it is: `html.escape` makes `<` and `&`
# harmless, and what cannot be seen is spelt out (some characters turn the writing direction round).

# %%
import html

def visible(text):
    """`text` as HTML that shows just this text."""
    return html.escape("".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text))

print(visible("<img src=x onerror=alert(1)> & \u202eabc"))

# %%
LEFT = 'style="text-align:left; white-space:pre-wrap"'

def side_by_side(winner, loser):
    """An HTML table with a row for each step; the first one that differs is marked."""
    differs, rows = parting(winner, loser), []
    for i, texts in enumerate(zip_longest(winner.split("\n"), loser.split("\n"))):
        cells = "".join(f"<td {LEFT}><code>{visible(text)}</code></td>" if text is not None else "<td></td>" for text in texts)
        mark = "<td></td>"
        if i == differs:
            mark = '<td style="text-align:left; border-left:4px solid #D55E00"><b>&#9654; they part here</b></td>'
        rows.append(f"<tr><td>{i}</td>{cells}{mark}</tr>")
    return f"<table><tr><th>step</th><th {LEFT}>winner</th><th {LEFT}>loser</th><th></th></tr>{''.join(rows)}</table>"

# %%
from IPython.display import HTML

HTML(side_by_side(winner, "57*2=114\n114-2=102\nFinal answer: <b>102</b>"))

# %% [markdown]
# This pair is a good teacher: the two agree on the first step, and part where the loser makes its mistake. The rest of the
# loser follows from that.
#
# Now real pairs of M_0.
#
# **Predict**: at which step do most winners and losers part, and what does the loser do there?

# %%
# NBVAL_IGNORE_OUTPUT
frame = preferences.to_pandas()
frame["step"] = [parting(w, l) for w, l in zip(frame.chosen, frame.rejected)]
shares = frame.step.value_counts(normalize=True).sort_index().round(3)
print(shares.head(8).rename("share of pairs").to_string())
assert frame.step.notna().all()

# %%
# NBVAL_IGNORE_OUTPUT
def line(text, step):
    lines = text.split("\n")
    if step >= len(lines):
        return "nothing more"
    return "the answer" if "final answer" in lines[step].lower() else "working"

there = pd.crosstab([line(text, step) for text, step in zip(frame.chosen, frame.step)],
                    [line(text, step) for text, step in zip(frame.rejected, frame.step)],
                    rownames=["winner goes on with"], colnames=["loser goes on with"])
print(there.to_string())
assert there.to_numpy().sum() == len(frame)

# %% [markdown]
# With the small model most pairs part at the very first step: the winner begins to work, the loser blurts an answer. So the message
# of the pairs, taken together, is *show your working*; only some say *calculate better*. Here are two, one that parts at once and one
# that parts as late as any.

# %%
# NBVAL_IGNORE_OUTPUT
early, late = frame.loc[frame.step.idxmin()], frame.loc[frame.step.idxmax()]
assert early.step <= late.step
HTML(side_by_side(early.chosen, early.rejected))

# %%
# NBVAL_IGNORE_OUTPUT
assert parting(late.chosen, late.rejected) == late.step
HTML(side_by_side(late.chosen, late.rejected))

# %% [markdown]
# ### What two chains share says nothing to DPO
#
# [DPO](../docs/glossary.md#dpo) looks at the winner's log-ratio minus the loser's, each a sum over tokens (notebook [04](04_dpo_nll_training.ipynb)).
# As long as the two texts agree, their tokens have the same log-ratio, whatever the models are. Suppose they share three tokens.
#
# **Predict**: which terms remain in the difference?

# %%
shared = [0.31, -0.12, 0.05]                            # log-ratios of the tokens that both begin with
winner_rest, loser_rest = [0.40, 0.22], [-0.35, 0.10, -0.08]

whole = sum(shared + winner_rest) - sum(shared + loser_rest)
rest = sum(winner_rest) - sum(loser_rest)
print(f"{whole:.2f} {rest:.2f}")
assert abs(whole - rest) < 1e-12

# %% [markdown]
# Only those from the parting on. The NLL term is different: it is the mean over the *whole* winner, so it is the only part of the loss that
# speaks about the shared beginning. How much is shared in your pairs?

# %%
# NBVAL_IGNORE_OUTPUT
def shared_tokens(ours, theirs):
    return next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))

share = [shared_tokens(w, l) / len(w) for w, l in zip(frame.chosen_ids, frame.rejected_ids)]
print(f"tokens of the winner before the two part: {sum(share) / len(share):.2f} of all on average")
assert all(0 <= s <= 1 for s in share)

# %% [markdown]
# What follows from it is disputed. [Step-DPO](https://arxiv.org/abs/2406.18629) argues that a preference over whole answers teaches little on
# long chains, and builds pairs that differ in one step only. [Smaug](https://arxiv.org/abs/2402.13228) shows that pairs which
# differ in few tokens are those on which DPO lowers the winner's own probability, and
# [Razin et al.](https://arxiv.org/abs/2410.08847) would rather filter such pairs than add a term. The paper adds the NLL term.
# Notebook [04](04_dpo_nll_training.ipynb) measures what it does.

# %% [markdown]
# ## What you have learnt
#
# - Winners and losers are walked in parallel, each set starting again at its own end. It is not a random draw.
# - The number of different pairs is the smaller of K and the least common multiple of the sizes.
# - Questions with only winners or only losers give no pairs. More samples rescue them, gold chains rescue the hard ones.
# - Duplicates change weights within a question. The paper does not mention them.
# - For DPO only what comes after the parting counts.
#
# **What to try.** Run `pairs.build_pairs` with `pairing="random"` and look at `repeated`. Take `k=20`: how many of the pairs are
# new? Sort the pairs of a question so that winners meet losers that part from them late, and look at the table of section 7 again.
#
# **Recall, without looking up.**
#
# 1. One winner, four losers, K = 6: which pairs?
# 2. Why can nine winners and six losers never give more than 18 different pairs?
# 3. Which questions does a gold chain save, and which not?
# 4. A question is right with probability 0.02. Is it lost at N = 30?
# 5. Which part of the loss speaks about the tokens that winner and loser share?
#
# **Next**: [04 · Training with DPO + NLL](04_dpo_nll_training.ipynb): what the loss does with a pair.
