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
# # 06 · Baselines and ablations
#
# **What you will be able to do**
#
# - say by hand what STaR, SPIN, majority as reward and others make of the same graded completions;
# - read a comparison of methods with its uncertainty, and say of each difference: better, worse, or within noise;
# - let code decide which of the paper's claims hold in a miniature, which do not, and which it cannot tell;
# - say under which settings the NLL term and the losers matter, and when they do not;
# - compare two methods yourself, and add one of your own as one entry in a table.
#
# | | `smoke` | `cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook | 40 seconds on one core | 2 minutes on one core | not measured here |
#
# **Needs**: the packages of this repository. The comparisons took hours; their results lie in `figures/`, beside the command
# that made each of them, and are read from there. Sections 2, 10 and 11 draw and train on the spot.
#
# **Before this**: [05 · Iterations](05_iterations.ipynb).

# %%
import os, sys
sys.path[:0] = [".", ".."]                     # checks_06.py lies beside the notebooks; ".." serves the solutions
sys.path += ["../scripts", "../../scripts"]    # the package `studies` of this repository
PROFILE = os.environ.get("IRPO_PROFILE", "cpu")     # the one setting: "cpu", "smoke", or a GPU profile

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
# ## 1 What is compared
#
# You have one method and know each of its parts. Is any of them needed? The way to find out is to leave one out, or to put
# something else in its place, and to keep the rest. In this package a method is one entry in a table: what it says
# *otherwise* than Iterative RPO.

# %%
import pandas as pd
from irpo_utils import baselines, methods     # `baselines` adds the methods beyond the paper's tables

pd.set_option("display.max_colwidth", None)

def differs(m):
    """What an entry of the table says otherwise than Iterative RPO."""
    said = [f"{name} = {value}" for name, value in m.settings.items()]
    said += [f"{name} = {f.__name__}" for name, f in (("reward", m.reward), ("train", m.train)) if f]
    said += ["pairs of gold solutions alone"] if not (m.samples or m.train) else []
    said += [f"starts with the M_1 of {m.start}"] if m.start else []
    said += [f"K times {m.pairs_factor}"] if m.pairs_factor > 1 else []
    return ", ".join(said + [f"{m.examples} worked examples in the prompt"] * (m.examples > 0))

table = [(name, m.title, differs(m), m.source) for name, m in methods.METHODS.items()]
pd.DataFrame(table, columns=["name", "title", "what differs", "source"]).set_index("name")

# %% [markdown]
# Four questions tell them apart. *Who wins?* That is the reward. *What is learnt from chosen ("winning") and rejected ("losing") completions?* That is `loss`, and
# `alpha`, the weight of the NLL term. DPO alone is `alpha = 0`. [STaR](../docs/glossary.md#star), rejection-sampling SFT on the
# model's own correct completions, is `loss = sft`. *Where does training start?* And *how much data?*
#
# Everything else is held fixed: the same M_0, the same questions, the same size of adapter, and the very same completions of
# M_0, which are drawn once for each seed and shared. One thing must *not* be the same: the learning rate. What is right for
# one loss is too much or too little for another.

# %% [markdown]
# ### A baseline that was not tuned is not a baseline
#
# So each of nine methods got the same search: three rates, one seed, two iterations (one for those that have only one), judged on
# the validation split. The four variants among the rows, with twice the data or a start from SFT, were not searched for and take
# the rate of their next relative. The paper names the values tried for α and β of its own method; how its baselines were set it does not
# say ([section 3.1](https://arxiv.org/html/2404.19733v3#S3.SS1)).
#
# **Predict**: which loss bears a higher rate, DPO alone or SFT on the winners?

# %%
# NBVAL_IGNORE_OUTPUT
from pathlib import Path
from studies import trials

root = next(up for up in (Path("."), Path(".."), Path("../..")) if (up / "irpo_utils").is_dir())

def read(name):
    """A result file of this repository; factor and level are words, also where they look like numbers."""
    return pd.read_csv(root / f"figures/{name}.csv", dtype={"factor": str, "level": str})

tuning = read("tuning_of_methods").query("metric == 'greedy'")
last = tuning[tuning.iteration == tuning.groupby("method").iteration.transform("max")]
rates = trials.tuned_learning_rates(root / "figures")
tuned = 100 * last.pivot_table(index="method", columns="level", values="value", sort=False)
tuned = tuned[sorted(tuned, key=float)]
assert set(tuned.index) <= set(rates)
tuned.round(1).astype(object).fillna("–").assign(chosen=[f"{rates[m]:g}" for m in tuned.index])

# %% [markdown]
# Right answers in %, greedy; a dash is a run that could not go on to the last iteration. How firm is such a choice? A number
# from $n$ questions has an interval, and between rates whose intervals overlap luck may have chosen. And a method whose best rate
# lies at the edge of the three might do better still beyond it.

# %%
# NBVAL_IGNORE_OUTPUT
close, edge = [], []
for method, rows in last.groupby("method", sort=False):
    best, *others = rows.sort_values("value", ascending=False).itertuples()
    close += [method] * any(other.high > best.low for other in others)
    edge += [method] * (float(best.level) in (min(trials.LEARNING_RATES), max(trials.LEARNING_RATES)))
print(f"{tuning.n.max():.0f} validation questions, {tuning.seed.nunique()} seed")
print("second-best rate within the noise of the best:", *close or ["none"], sep="\n  ")
print("best rate at an edge of the search:", *edge or ["none"], sep="\n  ")
assert set(close + edge) <= set(rates)

# %% [markdown]
# Keep in mind what was *not* searched. N, K, β and the rest are those that were chosen for Iterative RPO
# ([the log](../figures/LOG.md)); a method that wants another β was not asked. The search is equal for all, and it is small.
# That is said here because it is part of the result.

# %% [markdown]
# ## 2 By hand: twelve completions
#
# Three questions with four completions each. The gold answers are 12, 7 and 30. A completion that ends before an answer has
# none (`None`). The last number is its log-probability under the model that wrote it.

# %%
ASKED = [("a", "Ann has 3 bags of 4 apples. How many apples?", "12", "3*4=12\nFinal answer: 12"),
         ("b", "Ben has 10 pens and loses 3. How many pens?", "7", "10-3=7\nFinal answer: 7"),
         ("c", "A bus holds 25 people. 7 get on and 2 get off. How many?", "30", "25+7=32\n32-2=30\nFinal answer: 30")]
QUESTIONS = [dict(zip(("id", "question", "answer", "solution"), row)) for row in ASKED]
WRITTEN = [
    ("a", "Final answer: 15", -3.1), ("a", "3*4=12\nFinal answer: 12", -4.0),
    ("a", "3*5=15\nFinal answer: 15", -9.5), ("a", "3*4=", -1.5),
    ("b", "10-3=7\nFinal answer: 7", -2.2), ("b", "Final answer: 7", -4.4),
    ("b", "Final answer: 8", -3.6), ("b", "10-2=8\n8-1=7\nFinal answer: 7", -12.0),
    ("c", "Final answer: 29", -5.8), ("c", "25+7=31\nFinal answer: 31", -4.5),
    ("c", "25+7=33\nFinal answer: 33", -9.8), ("c", "Final answer: 31", -2.9)]

# %% [markdown]
# From this the table that sampling and grading would give, made with the small model's tokenizer.

# %%
from datasets import Dataset
from irpo_utils import grading, pairs, sampling, tasks

words = tasks.get("word_problems")
tokenizer_by_hand = models.load_tokenizer(models.find("seed"))

def as_sampled(i, text, logprob):
    """A row as `sampling.sample` would give it."""
    question, = (row for row in QUESTIONS if row["id"] == i)
    prompt = models.render_prompt(tokenizer_by_hand, words.prompt(question))
    encode = lambda what: tokenizer_by_hand(what, add_special_tokens=False).input_ids
    tokens = encode(text) + [tokenizer_by_hand.eos_token_id]
    return {"id": i, "prompt": prompt, "prompt_ids": encode(prompt), "completion": text, "completion_ids": tokens,
            "n_tokens": len(tokens), "finished": True, "logprob": logprob, "answer": question["answer"]}

rows = [as_sampled(*written) | {"sample": number % 4} for number, written in enumerate(WRITTEN)]
twelve = grading.grade(Dataset.from_list(rows), words)
shown = twelve.to_pandas()[["id", "sample", "completion", "extracted", "correct", "logprob", "n_tokens"]]
shown.assign(per_token=(shown.logprob / shown.n_tokens).round(2))

# %% [markdown]
# **Predict** the winners, with `w` and `l` for the four completions of a, b and c. For four methods write them down before you
# go on:
#
# - Iterative RPO, DPO and STaR: the final answer is the gold answer.
# - Majority as reward: the answer that most completions of the question give, right or not.
# - Own likelihood as reward: the half with the higher log-probability *per token*, the last column.
# - SPIN: all completions lose. The gold solution is the winner, for every question.
#
# The names are short for what a row takes from a paper, in our loop and at the profile's settings; they are not these papers' whole
# methods. STaR trains M_0 anew in each iteration and shows the model the answer where it fails; here training goes on from M_{t-1}, and what fails is
# left out. Prasad et al. set the most frequent answer against the least frequent one and weigh pairs by the votes; here all of the minority
# loses, unweighted. SPIN has no NLL term; here the gold solution has it. And the loss of GRPO is a mean over all tokens of a batch, as in TRL.
#
# And two controls. *Lucky winners*: one wrong answer in four counts as right, always the same ones, as where a wrong
# calculation hits the right letter; here b's 8 and c's 29. *Random labels*: as many winners as there are correct completions, at
# random places.

# %%
by_hand = {"irpo": "lwll wwlw llll", "self_consistency": "wlwl wwlw lwlw",
           "self_rewarding": "lwlw wlwl lwlw", "spin": "llll llll llll", "irpo_lucky": "lwll wwww wlll"}

def letters_of(name, graded):
    """w and l for every completion, question by question, as the reward of the method decides."""
    rewards = methods.reward(graded, methods.get(name).reward)["reward"]
    letters = "".join("w" if reward else "l" for reward in rewards)
    return " ".join(letters[i : i + 4] for i in range(0, len(letters), 4))

for name, mine in by_hand.items():
    print(f"{name:17}{mine}   by the module: {letters_of(name, twelve)}")
    assert mine == letters_of(name, twelve)
print(f"{'shuffled':31}   by the module: {letters_of('shuffled', twelve)}")

# %% [markdown]
# Look at a and c under the majority. In a two wrong answers agree and outvote the right one; in c nothing is right, and the
# majority finds winners all the same. Nobody contradicts. The model's own likelihood even lets a completion win that breaks off
# before it has an answer. Under Iterative RPO c is left out: without a winner, no pair.
#
# With random labels every question keeps its number of winners: one in a, three in b, none in c. What is left of the method is training
# on one's own text.
#
# Now the pairs, two per question, walked as in [notebook 03](03_pairs.ipynb), by the numbers of the completions; -1 is the
# gold solution. **Predict** those of Iterative RPO and of SPIN.

# %%
pairs_by_hand = {
    "irpo": {"a": [(1, 0), (1, 2)], "b": [(0, 2), (1, 2)]},
    "star": {"a": [(1, 0), (1, 2)], "b": [(0, 2), (1, 2)]},
    "self_consistency": {"a": [(0, 1), (2, 3)], "b": [(0, 2), (1, 2)], "c": [(1, 0), (3, 2)]},
    "spin": {i: [(-1, 0), (-1, 1)] for i in "abc"}}

def pairs_of(name, graded, questions, task, tokenizer, **settings):
    """(pairs, counts) that a method makes of graded completions."""
    p = methods.apply(profiles.get("cpu", method=name, **settings))
    gold = pairs.gold_completions(questions, tokenizer) if p.gold else None
    return pairs.build_pairs(methods.reward(graded, methods.get(name).reward), p.k_pairs, gold)

for name, mine in pairs_by_hand.items():
    made, found = pairs_of(name, twelve, QUESTIONS, words, tokenizer_by_hand, k_pairs=2)[0], {}
    for row in made:
        found.setdefault(row["id"], []).append((row["chosen_sample"], row["rejected_sample"]))
    print(f"{name:17}{found}")
    assert mine == found

# %% [markdown]
# STaR has the same pairs as Iterative RPO. It does not look at the second number: its loss has the NLL of the winner and
# nothing else. DPO without NLL has the same pairs, too, and looks at both, but only at their *difference*. SPIN tells the
# model that b's completion 0, right and well worked, is a loser: what wins there is to be written by a human.

# %% [markdown]
# ### Exercise 6.1: the majority's verdict
#
# **Goal**: a reward without gold answers. **Difficulty**: 1 of 3. **Time**: 10 minutes.
#
# `majority_verdict(answers)` takes the extracted answers of one question's completions, each a string or None, and returns a
# list of as many True and False: True for the completions that give the most frequent answer. None does not vote and never
# wins. Where answers tie, the one that came first wins, with all its completions; nobody else does.
#
# <details><summary>Hint</summary>
#
# `Counter` counts, and `most_common(1)` gives the first of those that are equally frequent. And if nobody votes at all?
#
# </details>

# %%
from collections import Counter

def majority_verdict(answers):
    # SOLUTION
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return [False] * len(answers)
    most = votes.most_common(1)[0][0]
    return [answer == most for answer in answers]
    # STUB
    # return ...      # your turn: a list of True and False
    # END

# %%
import checks_06
print(checks_06.majority_verdict(majority_verdict))

# %% [markdown]
# The worked solution is in [solutions/06_baselines_and_ablations.ipynb](solutions/06_baselines_and_ablations.ipynb).

# %% [markdown]
# ### And on what M_0 really writes?
#
# Twelve completions show the rules, not how often they go wrong. So let M_0 of your profile write some.

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils.ops import run as runs

QUESTIONS_DRAWN, N_DRAWN = (40, 8) if PROFILE == "smoke" else (150, 16)
task = tasks.get(profile.task)
asked = task.load("train", profile.data).shuffle(seed=profile.seed).select(range(QUESTIONS_DRAWN))
model, tokenizer = runs.load_model(profile)
drawn = sampling.sample(model, tokenizer, asked, task, n=N_DRAWN, temperature=profile.temperature_of(0),
                        max_new_tokens=profile.max_new_tokens, seed=profile.seed,
                        batch_size=profile.sampling_batch_size, progress=False)
graded = grading.grade(drawn, task)
print(f"{len(graded)} completions, {sum(graded['correct']) / len(graded):.0%} of them right")
assert len(graded) == QUESTIONS_DRAWN * N_DRAWN

# %% [markdown]
# **Predict**: of the winners that the majority names, what share is right? Of those that the model's own likelihood names?
# (This model mostly blurts out a number. Which does it find likelier, a careful solution or a blurted number?)

# %%
# NBVAL_IGNORE_OUTPUT
def quality(name):
    """How many completions win under a method, the share of them that is right, and the questions with both sides."""
    judged = methods.reward(graded, methods.get(name).reward)["reward"][:]
    right = [truth for truth, wins in zip(graded["correct"], judged) if wins]
    of_question = pd.Series(judged).groupby(pd.Series(graded["id"][:])).mean()
    return {"winners": len(right), "of them right (%)": 100 * sum(right) / max(1, len(right)),
            "questions with both": int(of_question.between(0, 1, inclusive="neither").sum())}

judges = ("irpo", "self_consistency", "self_rewarding", "irpo_lucky", "shuffled")
judged = pd.DataFrame({name: quality(name) for name in judges}).T
assert judged.loc["irpo", "of them right (%)"] == 100
judged.round(1)

# %% [markdown]
# Iterative RPO has fewer winners and questions than most of the others, and all of its winners are correct. With random labels, the share of
# correct winners is above the overall share for one reason only: questions with many correct completions get many winners.
#
# ### Can a model judge itself?
#
# [Self-rewarding models](https://arxiv.org/abs/2401.10020) ask the model in words to rate its own answers. Whether ours could, was
# measured: among the completions of one question, how often does a right one get the better mark than a wrong one? A coin has
# 0.5. **Predict** it for the model's likelihood, and for asking it ("Is the final answer of this solution right?").

# %%
# NBVAL_IGNORE_OUTPUT
judges = read("judges")
marks = judges.pivot_table(index="judge", columns="model", values=["value", "low", "high"], sort=False)
able = judges[judges.low > 0.5]
for model_name, rows in judges.groupby("model", sort=False):
    can = able[able.model == model_name].judge.tolist()
    print(f"{model_name} ({rows.n.max()} questions with both kinds): tells right from wrong by {', '.join(can) or 'none of them'}")
assert judges.value.between(0, 1).all()
marks.swaplevel(axis=1).sort_index(axis=1).round(2)

# %% [markdown]
# Asked in words, neither model can judge, so a self-rewarding loop in the proper sense would learn noise here; that row is
# missing from our comparison for this reason. The likelihood per token is another matter: our small M_0 writes careful working
# with more confidence in each token than a blurted number. That is a property of this M_0, and the real model does not have it.
# The method "own likelihood" below lives on it.
#
# A vote gets better with more voters. How much?

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils import plots
from studies import figures

def precision(k):
    """Share of right ones among the winners that a majority of the first k completions names."""
    some = graded.filter(lambda row: row["sample"] < k)
    wins = methods.reward(some, baselines.by_majority)["reward"]
    right = [truth for truth, win in zip(some["correct"], wins) if win]
    return sum(right) / max(1, len(right))

ks = [k for k in (1, 2, 4, 8, 16) if k <= N_DRAWN]
grown = pd.DataFrame({"k": ks, "metric": "right", "value": [precision(k) for k in ks]})
figure = plots.sweep(grown, "k", "Completions that vote", "Right ones among the winners (%)")
assert len(plots.alt_text(figure)) > 40
figure

# %% [markdown]
# With one voter the answer elects itself, and the share is that of right completions. The rest is the signal that a vote
# finds without any gold answer, where wrong answers scatter. [Prasad et al.](https://arxiv.org/abs/2411.04109) train on it.

# %% [markdown]
# ## 3 The paper's table, in miniature
#
# Now the results. `figures/comparison.csv` has all rows of all runs, and `comparison_mean.csv` the means over seeds with
# intervals. First of all: what stands behind?

# %%
# NBVAL_IGNORE_OUTPUT
comparison, means = read("comparison"), read("comparison_mean")
TITLE = {name: m.title for name, m in methods.METHODS.items()} | {"zero_shot": "M0, zero-shot"}

def titled(rows):
    """The same rows with the methods by their titles."""
    return rows.assign(method=rows.method.map(TITLE))

behind = comparison[comparison.metric == "greedy"].groupby("method", sort=False)
behind = behind.agg(seeds=("seed", "nunique"), questions=("n", "max"), last_iteration=("iteration", "max"))
stopped = comparison[comparison.metric == "stopped"].groupby("method").seed.nunique()
behind["runs that stopped early"] = stopped.reindex(behind.index).fillna(0)
assert behind.seeds.min() >= 1 and set(behind.index) <= set(TITLE)
behind.astype(int)

# %% [markdown]
# A run stops early where its model no longer gives any pairs, or where training breaks down. Later means then are means over the
# survivors: remember it where the last column is not zero.
#
# **Predict** the order after one iteration. In the paper's [Table 1](https://arxiv.org/html/2404.19733v3#S3.T1) it is: Iterative
# RPO 73.1; STaR 65.2; SFT on gold solutions 63.5; DPO without NLL 61.8; M_0 55.6.

# %%
# NBVAL_IGNORE_OUTPUT
greedy = comparison[comparison.metric == "greedy"]
untrained = greedy.method.isin(["zero_shot", "few_shot"])
once = greedy[(greedy.iteration == 1) | untrained]
figure = figures.dot_plot(titled(once))
assert "Iterative RPO" in plots.alt_text(figure)
figure

# %% [markdown]
# And at the end, for the methods that iterate, with M_0 beside them:

# %%
# NBVAL_IGNORE_OUTPUT
T = int(greedy.iteration.max())
at_the_end = greedy[(greedy.iteration == T) | (greedy.method == "zero_shot")]
figure = figures.dot_plot(titled(at_the_end))
assert "Iterative RPO" in plots.alt_text(figure)
figure

# %% [markdown]
# One comparison in the paper's table is about votes: 32 samples of M_0 (70.7) do worse than one greedy answer of M_1 (73.1). Here:

# %%
# NBVAL_IGNORE_OUTPUT
own = comparison[(comparison.method == "irpo") & comparison.iteration.isin([0, 1, T])]
most = own[own.metric == "majority"].k.max()
votes = own[(own.metric == "greedy") | ((own.metric == "majority") & (own.k == most))]
figure = figures.dot_plot(titled(votes))
assert "majority" in plots.alt_text(figure)
figure

# %% [markdown]
# ### Which differences are real?
#
# The lines in these figures are too wide for that question. All methods answer the same questions, and for one seed they start
# from the same samples. So take differences question by question and seed by seed: a matrix, with a row for each seed and a
# column for each question. Its mean is the difference. How far could it be off? A new experiment would have other questions
# *and* other seeds, so both are drawn again, with replacement: that is
# `statistics.seed_and_question_interval`. (With few seeds it stretches their spread to what Student's t asks for.)
#
# A small case. Two methods, three seeds, 40 questions. **Predict**: is b better?

# %%
import numpy as np
from irpo_utils import evaluation
from irpo_utils.ops import statistics

rng = np.random.default_rng(1)
hard = rng.random(40) < 0.5                             # questions that neither can do
luck = np.array([[0.15], [0.05], [-0.03]])              # seeds that went well for b, or not
a = np.where(hard, 0.0, 0.7) * np.ones((3, 1))
b = np.where(hard, 0.0, 0.7 + 2 * luck)

each = [evaluation.bootstrap_mean(x.mean(0)) for x in (a, b)]
print("each by itself:    ", *(f"{x:.2f} ({low:.2f} to {high:.2f})" for x, low, high in each), sep="  ")
print("paired, questions:   {:+.3f} ({:+.3f} to {:+.3f})".format(*evaluation.bootstrap_mean((b - a).mean(0))))
print("paired, both:        {:+.3f} ({:+.3f} to {:+.3f})".format(*statistics.seed_and_question_interval(b - a)))

# %% [markdown]
# By themselves the two look alike, since half of the questions are hard for both and blow the intervals up. Paired by question
# b wins clearly, *for these three seeds*. But one of the three went the other way, and a fourth might as well: with the seeds
# drawn again, zero is inside. "Within noise" does not say that they are equal. It says that this experiment cannot tell.

# %% [markdown]
# ### Exercise 6.2: better, worse, or within noise
#
# **Goal**: a difference with its interval, and the word that it allows. **Difficulty**: 2 of 3. **Time**: 15 minutes.
#
# `paired(a, b)` takes two matrices, lists with one list for each seed, with the share of right answers of each question; seeds
# and questions are the same in both. Return four things: what b gains over a, the low and the high end of its 95 % interval
# over seeds and questions, and a word: `"better"` if the whole interval lies above zero, `"worse"` if it lies below, otherwise
# `"within noise"`. `statistics.seed_and_question_interval(matrix)` is yours to use.
#
# <details><summary>Hint</summary>
#
# The interval of what? Not of a, not of b, and not of their means. `np.array` makes matrices that can be subtracted.
#
# </details>

# %%
def paired(a, b):
    # SOLUTION
    difference, low, high = statistics.seed_and_question_interval(np.array(b) - np.array(a))
    word = "better" if low > 0 else "worse" if high < 0 else "within noise"
    return difference, low, high, word
    # STUB
    # return ...      # your turn: (difference, low, high, word)
    # END

# %%
print(checks_06.paired(paired))

# %% [markdown]
# The worked solution is in [solutions/06_baselines_and_ablations.ipynb](solutions/06_baselines_and_ablations.ipynb).

# %% [markdown]
# Now every method against Iterative RPO at the same iteration, on the same questions and seeds. Blue is better, orange worse,
# grey within noise.

# %%
# NBVAL_IGNORE_OUTPUT
def against_irpo(t):
    """Rows of the methods that were compared with Iterative RPO after t iterations, best first."""
    rows = means[(means.metric == "greedy") & (means.iteration == t) & means.difference.notna()]
    return rows[rows.method != "irpo"].sort_values("difference", ascending=False)

def named(rows):
    return [f"{TITLE[row.method]} ({row.seeds} seeds)" for row in rows.itertuples()]

figure = figures.differences(against_irpo(1), named(against_irpo(1)))
assert "points" in plots.alt_text(figure)
figure

# %%
# NBVAL_IGNORE_OUTPUT
figure = figures.differences(against_irpo(T), named(against_irpo(T)))
assert "points" in plots.alt_text(figure)
figure

# %%
# NBVAL_IGNORE_OUTPUT
def word(low, high):
    return "better" if low > 0 else "worse" if high < 0 else "within noise"

for t in (1, T):
    groups = {}
    for row in against_irpo(t).itertuples():
        groups.setdefault(word(row.difference_low, row.difference_high), []).append(f"{TITLE[row.method]} ({row.seeds})")
    print(f"Against Iterative RPO after {t} iteration{'s' * (t > 1)}:")
    for name in ("better", "within noise", "worse"):
        print(f"  {name}: {'; '.join(groups.get(name, ['none']))}")
assert len(against_irpo(1))

# %% [markdown]
# What to take from that. Once each method has its own rate, most of them end close together, at what M_0 could do before it became
# hasty. After one iteration Iterative RPO is clearly ahead of SFT on the winners, as in the paper, and level with DPO without NLL,
# which in the paper is far behind. Then the picture turns. SFT on the winners rises further and stays up; Iterative RPO rises a little
# for three iterations, and in its fourth one seed of five falls, which makes its interval so wide; DPO without NLL
# falls in nearly all of them. Section 6 looks into that. Mind the seeds, in brackets above: a method with three is set against the
# same three of Iterative RPO, and the one that falls is not among them; on these GRPO and Iterative RPO rise alike. So what the list
# says of a method with three, after four iterations, holds for those three, and their lines are not to be set beside those of the methods
# with five. The surprise is SFT on gold solutions, ahead of Iterative
# RPO after one iteration and of all but GRPO and SPIN, where it is within noise: M_0 hides its working, and the gold solutions show it in the very form that it
# once learnt. And the controls do their work: with random labels the model gets worse, so it is the reward that teaches;
# four examples in the prompt, a form that this small model has never seen, ruin it.

# %% [markdown]
# ### The paper's claims, one by one
#
# The paper's table makes claims by its order. Each of them can be put to our numbers. `comparison_paired.csv` has the paired
# differences of all methods at the same iteration, and of each iteration with the one before and with M_0; for other pairs
# the two intervals are added in quadrature, which is too wide, and so errs towards "cannot tell".

# %%
PAPER = {("zero_shot", 0): 55.6, ("sft_gold", 1): 63.5, ("star", 1): 65.2, ("star_2x", 1): 66.9,
         ("iterative_dpo", 1): 61.8, ("dpo_from_sft", 1): 60.3, ("irpo", 1): 73.1, ("irpo_2x", 1): 74.8,
         ("irpo_from_sft", 1): 73.1, ("irpo", 2): 78.0, ("irpo", 3): 81.1, ("irpo", 4): 81.6}      # table 1, greedy
CLAIMS = [(("irpo", 1), ("zero_shot", 0)), (("irpo", 1), ("sft_gold", 1)), (("irpo", 1), ("star", 1)),
          (("irpo", 1), ("iterative_dpo", 1)), (("irpo", 1), ("dpo_from_sft", 1)),
          (("irpo_from_sft", 1), ("irpo", 1)), (("star", 1), ("sft_gold", 1)), (("star", 1), ("iterative_dpo", 1)),
          (("iterative_dpo", 1), ("dpo_from_sft", 1)), (("star_2x", 1), ("star", 1)), (("irpo_2x", 1), ("irpo", 1)),
          (("irpo", 2), ("irpo_2x", 1)), (("irpo", 2), ("irpo", 1)), (("irpo", 3), ("irpo", 2)), (("irpo", 4), ("irpo", 3))]

# %%
# NBVAL_IGNORE_OUTPUT
numbers = means[means.metric == "greedy"].set_index(["method", "iteration"])
numbers = pd.concat([numbers, numbers.loc[[("irpo", 0)]].rename(index={"irpo": "zero_shot"})])
here = numbers[numbers.index.isin(PAPER)]
beside = (100 * here[["value", "low", "high"]]).round(1).assign(seeds=here.seeds)
beside.insert(0, "paper", [PAPER[cell] for cell in here.index])
assert len(beside) >= 3
beside.rename(index=TITLE, columns={"value": "here"}).sort_values("paper")

# %%
pairings = read("comparison_paired").set_index(["method", "iteration", "against", "against_iteration"])

def gain(one, other):
    """(difference, low, high) of two cells of the table, paired where the file has it."""
    key = (*one, *(("irpo", 0) if other == ("zero_shot", 0) else other))
    if key in pairings.index:
        return tuple(pairings.loc[key, ["difference", "low", "high"]])
    x, y = numbers.loc[one], numbers.loc[other]
    down, up = np.hypot(x.value - x.low, y.high - y.value), np.hypot(x.high - x.value, y.value - y.low)
    return x.value - y.value, x.value - y.value - down, x.value - y.value + up

# %% [markdown]
# And the paper itself? It has one run for each row, and 1,319 questions. The noise of that alone, as far as it can be had from
# two percentages without pairing, goes into a column of its own.

# %%
# NBVAL_IGNORE_OUTPUT
def judge(claimed, low, high):
    if claimed == 0:
        return "agrees: none seen" if low <= 0 <= high else "disagrees"
    ends = sorted([claimed * low, claimed * high])              # above zero: with the sign that was claimed
    return "agrees" if ends[0] > 0 else "disagrees" if ends[1] < 0 else "cannot tell"

def noise(x, y, n=1319):
    """Half of a 95 % interval for the difference of two percentages of n questions."""
    return 1.96 * np.sqrt((x * (100 - x) + y * (100 - y)) / n)

found = []
for one, other in [claim for claim in CLAIMS if all(cell in numbers.index for cell in claim)]:
    claimed, (value, low, high) = PAPER[one] - PAPER[other], gain(one, other)
    found.append({"claim": "{}, M_{} over {}, M_{}".format(TITLE[one[0]], one[1], TITLE[other[0]], other[1]),
                  "paper": claimed, "its own noise": noise(PAPER[one], PAPER[other]), "here": 100 * value,
                  "low": 100 * low, "high": 100 * high, "seeds": numbers.loc[[one, other]].seeds.min(),
                  "the miniature": judge(claimed, low, high)})
claims = pd.DataFrame(found).set_index("claim")
assert len(claims) >= 3
claims.round(1)

# %%
# NBVAL_IGNORE_OUTPUT
print("the miniature:", claims["the miniature"].value_counts().to_dict())
within = claims[claims.paper.abs() < claims["its own noise"]]
print("in the paper itself within the noise of its questions:", *within.index, sep="\n  ")
assert len(within) <= len(claims)

# %% [markdown]
# What holds is Iterative RPO over SFT on the winners and, just so, the gain of a second iteration. A start from SFT makes no
# difference that could be seen, and after one iteration none of more than two or three points.
# What fails has to do with the gold solutions, and the task explains it: those of our generator are written in M_0's own first
# style, those of GSM8K by people, in a style that Llama has to learn. And with DPO alone: in the miniature it is, after one
# iteration, as good as Iterative RPO, and better than SFT on the winners. The code says "cannot tell" of two of the largest gaps of
# the paper, those over DPO from M_0 and from SFT; as its intervals end far below them, gaps of that size are ruled out here. For the
# rest it cannot tell the small steps: twice the pairs or the data, the third and the fourth iteration. In the paper most of these
# lie within the noise of its questions as well.
#
# Read *agrees* with care, too: a small model on questions from a generator is another experiment. It can show that a claim does
# not hold everywhere. That it holds for 70 billion weights on GSM8K, it cannot.

# %% [markdown]
# ## 4 What happens to the probabilities
#
# The paper explains its table with curves (figures 2 to 4 there): the log-probabilities of winners and losers while each method
# trains. `log_probabilities.csv` has the same for 128 pairs of M_0, the same pairs for every method.
#
# **Predict** for SFT on the winners: the losers are never shown to it. Will their log-probability fall, stay, or rise?

# %%
# NBVAL_IGNORE_OUTPUT
probes = read("log_probabilities")
curves = {name: rows.groupby("step", as_index=False).mean(numeric_only=True)
          for name, rows in probes.groupby("method", sort=False)}
def draw_curves(**names):
    return plots.training_curves({short: curves[name] for name, short in names.items() if name in curves})

figure = draw_curves(star="SFT on chosen", sft_gold="SFT on gold", irpo="DPO + NLL")
assert "rejected" in plots.alt_text(figure)
figure

# %% [markdown]
# Second, DPO with the NLL term and without, from M_0. **Predict**: will the *winners* rise in both?

# %%
# NBVAL_IGNORE_OUTPUT
figure = draw_curves(iterative_dpo="DPO", irpo="DPO + NLL")
assert "chosen" in plots.alt_text(figure)
figure

# %% [markdown]
# And both from the model that SFT on the winners has made, with the same pairs:

# %%
# NBVAL_IGNORE_OUTPUT
figure = draw_curves(dpo_from_sft="DPO", irpo_from_sft="DPO + NLL")
assert "chosen" in plots.alt_text(figure)
figure

# %% [markdown]
# The paper's findings for GSM8K are directions, so the code can compare them: with SFT the losers rise, too (its figure 2);
# without the NLL term the winners *fall*, from either start (figure 3); with it they rise, and the losers fall.

# %%
# NBVAL_IGNORE_OUTPUT
SEEN = {("star", "rejected"): 1, ("iterative_dpo", "chosen"): -1, ("dpo_from_sft", "chosen"): -1, ("irpo", "chosen"): 1,
        ("irpo", "rejected"): -1, ("irpo_from_sft", "chosen"): 1}              # figures 2 and 3: rises or falls
moved = []
for (name, side), sign in SEEN.items():
    if name in curves:
        first, end = (curves[name][f"logps/{side}"].iloc[i] for i in (0, -1))
        moved.append({"method": TITLE[name], "side": side, "from": first, "to": end,
                      "paper": "rises" if sign > 0 else "falls", "here": "rises" if end > first else "falls"})
moved = pd.DataFrame(moved)
print(f"{(moved.paper == moved.here).sum()} of {len(moved)} directions are those of the paper;"
      f" {probes.seed.nunique()} seed, so no spread is known")
assert len(moved)
moved.round(2)

# %% [markdown]
# Only in part. From M_0 the winners rise with the NLL term *and* without, at the rates that the tuning chose. (These are sums over an
# answer, as in the paper. Without the term short winners gain and long ones lose, so that the mean *per token*, which section 8 watches,
# falls by a fiftieth in the same training.) From SFT on the winners,
# where they stand high already, they fall a little with both, and lower without it. And SFT pushes the losers *down* here. The
# reason is the kind of pair: early losers are mostly blurted numbers, which part from the winners at the first token, so that
# what raises the one lowers the other. In the paper winners and losers are both chains of thought that share most of their
# words. Its own figure 4 shows that this depends on the task: on ARC and MATH, too, the winners do not fall without the NLL term.

# %% [markdown]
# ## 5 What it costs
#
# A method may win because it spends more. Two measures: tokens sampled for training, and seconds. **Predict**: per iteration
# GRPO draws as many completions as Iterative RPO, throws each batch away after one step, and scores no reference. Is it faster?

# %%
# NBVAL_IGNORE_OUTPUT
COSTED = ["irpo", "iterative_dpo", "star", "grpo", "self_consistency", "self_rewarding", "spin"]
costs = comparison[comparison.method.isin(COSTED)]
figure = figures.accuracy_against_cost(titled(costs))
assert "tokens" in plots.alt_text(figure)
figure

# %%
# NBVAL_IGNORE_OUTPUT
figure = figures.accuracy_against_cost(titled(costs), x="seconds")
assert "minutes" in plots.alt_text(figure)
figure

# %% [markdown]
# A fair question is: how good is each for the *same* number of sampled tokens? Iterations of different methods cost different
# numbers, as answers grow longer or shorter. So read each curve at the budget of the thriftiest, on the straight line between two
# iterations. That is a reading aid, since no model was made there.

# %%
# NBVAL_IGNORE_OUTPUT
import json

paths = costs[costs.metric == "greedy"].groupby(["method", "iteration"], sort=False)
paths = paths[["tokens", "seconds", "value"]].mean()
ends = paths.groupby("method", sort=False).last()
budget = ends.tokens.min()
at_budget = {name: 100 * np.interp(budget, *paths.loc[name][["tokens", "value"]].to_numpy().T)
             for name in ends.index}
processors = json.loads((root / "figures/comparison.json").read_text())["processors"]
print(f"budget: {budget:,.0f} sampled tokens; seconds on one core of {' and '.join(processors)}")
assert set(at_budget) == set(ends.index)
names = {"tokens": "tokens, all", "seconds": "seconds, all", "value": "at the end (%)", "at_budget": "at the budget (%)"}
ends.assign(at_budget=pd.Series(at_budget), value=100 * ends.value).rename(index=TITLE, columns=names).round(1)

# %% [markdown]
# The seconds are of a small model on one core, where two runs shared a machine. With another model sampling and training cost
# differently, so the order by tokens travels better than the order by time. SFT is charged too much. When these runs were made, its losers went
# through the model as well, for the log alone. The trainer now leaves them out, so SFT is faster than this figure shows.

# %% [markdown]
# ### What is spent: variety
#
# Training on winners narrows what a model writes. **Predict**: do the distinct answers among eight rise or fall, and pass@8?

# %%
# NBVAL_IGNORE_OUTPUT
figure = plots.diversity(comparison[comparison.method == "irpo"])
assert "distinct answers" in plots.alt_text(figure)
figure

# %% [markdown]
# The other methods were asked for two samples a question, to save hours. What does the second one add: how many questions are
# solved by one of two, and not by a single one?

# %%
# NBVAL_IGNORE_OUTPUT
def by_iteration(metric, k, names=COSTED):
    """Means over seeds in %, a row for each method."""
    rows = comparison[(comparison.metric == metric) & (comparison.k == k) & comparison.method.isin(names)]
    return 100 * rows.pivot_table(index="method", columns="iteration", values="value", sort=False)

one, two = (by_iteration("pass_at_k", k) for k in (1, 2))
spread = pd.concat({"solved by one of two": two, "added by the second": two - one}, axis=1)
assert len(spread)
spread.rename(index=TITLE).round(1)

# %% [markdown]
# At the same number of sampled tokens SFT on chosen, GRPO and Iterative RPO lie close together (the first and the last with five
# seeds, GRPO with three). Those without a gold answer, the majority and the own likelihood, need more iterations for nearly the same
# place; DPO without NLL, which is falling by then, is below even them. GRPO gets as much from its tokens, and takes longer
# here, since it draws its small batches one after the other. And narrowing costs little. The second sample adds more at M_1 than at
# M_0, and then less with most methods, because the first is right more often, while both together solve more. The exceptions are
# SPIN, Iterative RPO in its last iteration, where one seed falls, and, much more so, DPO without NLL: as it falls, the second sample
# adds as much as before, and both together solve less. That is not variety, it is damage.

# %% [markdown]
# ## 6 When does the NLL term matter?
#
# In the paper it matters much: 73.1 against 61.8. Two later studies find no benefit. [Lanchantin et
# al.](https://arxiv.org/abs/2506.21495), with several of the same authors, train Llama-3.1-8B online on NuminaMath; and
# [RLHFlow's Online-DPO-R1](https://github.com/RLHFlow/Online-DPO-R1) reports for Qwen2.5-Math-7B 47.0 with DPO and 46.2 with
# DPO + NLL, on average over five test sets. So the question is not whether, but when. Two settings suggest themselves: α, and
# how far a training goes, for which the learning rate stands here.
#
# **Predict** the map below: in which corner does training fail?

# %%
# NBVAL_IGNORE_OUTPUT
stability, stability_means = read("stability"), read("stability_mean")
last_t = stability[stability.metric == "greedy"].iteration.max()
halted = stability[stability.metric == "stopped"]              # no model came out: count its answers as wrong
halted = halted.assign(metric="greedy", value=0.0, iteration=last_t)
cells = pd.concat([stability[stability.metric == "greedy"], halted])
grid = cells[cells.factor.str.startswith("alpha=")]
grid = grid.assign(alpha=grid.factor.str[6:].astype(float), learning_rate=grid.level.astype(float))
alphas = grid.groupby("learning_rate").alpha.transform("nunique")
grid = grid[alphas == alphas.max()]                            # rates that are there with every alpha
figure = figures.heat_map(grid)
print(f"{grid.groupby(['factor', 'level']).seed.nunique().min()} to {grid.seed.nunique()} seeds a cell,"
      f" {len(halted)} runs stopped")
assert "alpha" in plots.alt_text(figure)
figure

# %% [markdown]
# A frame means that in no seed the last iteration lies more than three points below the best one before it. Now the number that a
# run prints about each step: the KL to the previous model, in nats per completion. A separate row shows the winners alone
# (STaR), which is what remains of the loss as α grows.

# %%
# NBVAL_IGNORE_OUTPUT
def mapped(metric, scale=1.0, t=last_t):
    rows = stability[(stability.metric == metric) & (stability.iteration == t)]
    made = scale * rows.pivot_table(index="factor", columns="level", values="value", sort=False)
    return made[sorted(made, key=float)]

both = {"KL of the first step": mapped("kl_to_previous", t=1), "right, greedy (%)": mapped("greedy", 100)}
both = pd.concat(both, axis=1)
assert len(both)
both.round(2).astype(object).fillna("stopped")

# %% [markdown]
# What does the term bring at each rate? The same pairs of M_0, with it and without it, paired by question and seed.

# %%
# NBVAL_IGNORE_OUTPUT
def final(rows, metrics=("greedy",)):
    """The last iteration of every line of a study, where it was compared with another."""
    rows = rows[rows.metric.isin(metrics) & rows.difference.notna()]
    return rows[rows.iteration == rows.groupby(["method", "factor", "level"], dropna=False).iteration.transform("max")]

def label(row, text):
    """A name with what stands behind it."""
    return f"{text} (M_{row.iteration}, {row.seeds} seed{'s' * (row.seeds > 1)})"

nll = final(stability_means[stability_means.factor.str.startswith("alpha=")])
nll = nll.sort_values("level", key=lambda levels: levels.astype(float), kind="stable")
labels = [label(row, f"rate {row.level}, {row.factor} over 0") for row in nll.itertuples()]
figure = figures.differences(nll, labels)
assert "alpha" in plots.alt_text(figure)
figure

# %%
# NBVAL_IGNORE_OUTPUT
usual = nll[nll.factor == "alpha=1"]
for row in usual.itertuples():
    print(f"rate {row.level}: alpha = 1 against 0 {100 * row.difference:+.1f} points, "
          f"{word(row.difference_low, row.difference_high)} ({row.seeds} seeds)")
helps = usual[usual.difference_low > 0].level.astype(float)
print(f"The term helps from rate {helps.min():g} on." if len(helps) else "At none of these rates does the term help.")
assert len(usual) <= len(labels)

# %% [markdown]
# At 1e-4 no difference between with and without the term was seen after two iterations, and two seeds could not show one of less than about
# five points; at 2e-5 the largest α is a little ahead in the one seed, whose interval is over questions alone. Then there is an edge. At 3e-4 DPO alone gets not half as far in one
# iteration as at 1e-4, and has lost that again, to about M_0, after two. The more of the term, the later and the slower the fall; with the largest α it hardly shows, and SFT on the winners, which is what remains of the loss as α grows, has
# no edge on this map at all. The KL of the first step says it in time: for DPO alone it is several times as large on the far side of
# the edge as on the near side. And the edge is not only one of rates. In the comparison DPO without NLL
# trained at the best of its three rates, where this map still shows it well, and fell in the third or fourth iteration, in four of
# five seeds: what one long training does, several of the right length can do. So the term buys room, in step size and in number of iterations, rather
# than a higher peak.

# %% [markdown]
# **A hypothesis, not tested here.** Suppose that what the map shows is general: the term teaches little by itself, and holds
# the winners up where DPO alone would push them down together with the losers, which happens when a training goes far. The
# paper trains up to 5,000 steps on samples of one model. The two studies without a benefit draw afresh, one of them every few
# steps. On our map they would lie on the left, and the paper on the right. Then the paper's 61.8 would say that DPO alone was
# trained too far *for DPO alone*, and a lower rate or fewer steps would have brought it nearer to 73.1. The paper does not say
# how that baseline was tuned, so this cannot be decided by reading. It could be by a run.

# %% [markdown]
# ## 7 When do losers teach?
#
# Iterative RPO trains on pairs, STaR on the winners alone. Where the two end alike, the losers taught nothing that the
# winners had not. When should they? We thought of cases in which a loser may tell more: few samples, so that winners are rare;
# a high temperature, so that losers are many; few questions, so that winners are soon learnt by heart; lucky winners, so that
# winners are partly wrong; late, from M_3 on, when winners and losers are both careful; and choices, the same questions as a
# multiple-choice test, of which more below. The file has those that were run: two iterations on 300 training questions, half of
# those of section 3 (150 for "few questions"), each side at its tuned rate.
#
# **Predict**: in which of these do pairs beat winners alone?

# %%
# NBVAL_IGNORE_OUTPUT
regimes = final(read("regimes_mean").query("method != 'star'"))
regimes["factor"] = regimes.factor.replace("choices", "choices, letters")
figure = figures.differences(regimes, [label(row, row.factor) for row in regimes.itertuples()])
for row in regimes.itertuples():
    print(f"{row.factor:16} pairs {100 * row.value:.1f} %, {word(row.difference_low, row.difference_high)}"
          f" ({100 * row.difference:+.1f}; {row.seeds} seeds, {row.n} test questions)")
assert len(regimes)
figure

# %% [markdown]
# There is one kind, and there they pay much: where winners are lucky, by our rule or in a multiple-choice test. Take the rule first.
# Where one wrong answer in four counts as right, many winners are blurted numbers, and whoever trains on winners alone learns to
# blurt: it falls below M_0. Pairs go on rising. Why? Count the blurts on both sides of such pairs, made from the completions of
# section 2:

# %%
# NBVAL_IGNORE_OUTPUT
lucky = pairs_of("irpo_lucky", graded, asked, task, tokenizer)[0]
blurted = {side: np.mean([len(text.strip().splitlines()) == 1 for text in lucky[side]]) for side in ("chosen", "rejected")}
print(f"a number without working: {blurted['chosen']:.0%} of the winners, {blurted['rejected']:.0%} of the losers")
assert all(0 <= share <= 1 for share in blurted.values())

# %% [markdown]
# Blurting is common among the winners, and commoner still among the losers, so that the *difference* between the two points to the
# working all the same. That is what losers are for: they say which part of the winners is not the reason for winning. Multiple
# choice is of this kind; the paper grants that on ARC about one guessed chain of thought in four is right by chance, and there its
# pairs beat winners alone by five points.
#
# In none of the other cases do losers pay. Where samples or questions are few, winners alone even end ahead. One guess, not tested: both
# cases make fewer pairs and so fewer steps, and the winners' tuned rate is the higher one, so it gets further with them. The gap is
# larger after one iteration than after two:

# %%
# NBVAL_IGNORE_OUTPUT
steps = read("regimes_mean").query("metric == 'greedy' and iteration > 0 and factor != 'choices' and method != 'star'")
steps = steps[steps.difference.notna()].pivot_table(index="factor", columns="iteration", values="difference", sort=False)
print("tuned rates: pairs {:g}, winners alone {:g}".format(rates["irpo"], rates["star"]))
assert len(steps)
(100 * steps).round(1).astype(object).fillna("").rename(columns="pairs over winners, M_{}".format)

# %% [markdown]
# ### A test in which luck happens
#
# In *lucky winners* a rule of ours says which wrong answers win. The task `word_choices` needs no such rule: the same questions,
# with four numbers to choose from. The model does not see them (M_0 knows no prompt with options); it works out a number, and the
# option nearest to it is ticked, as by a pupil who takes what comes closest. Right is the right letter.

# %%
choices = tasks.get("word_choices")
row = choices.load("test")[1]
print(f"{row['question']}\noptions {row['choices']}, right is {row['answer']}\n")
right = int(row["choices"]["ABCD".index(row["answer"])])
for said in (right, right + 1, right + 10, right + 1000):
    completion = f"Final answer: {said}"
    letter = choices.extract(completion, row)
    print(f"{completion:22} ticks {letter}: {'right' if letter == row['answer'] else 'wrong'}"
          f"{'' if choices.solved(completion, row) else ', the number is not'}")
assert choices.solved(row["solution"], row)

# %% [markdown]
# **Predict**: of the completions of M_0 whose letter is right, how many have the right number?

# %%
# NBVAL_IGNORE_OUTPUT
options = {row["id"]: row for row in choices.load("train")}
answers = [(options[row["id"]], row["completion"]) for row in graded if row["finished"] and row["id"] in options]
ticked = [(choices.extract(text, row) == row["answer"], choices.solved(text, row), len(text.strip().splitlines()) == 1)
          for row, text in answers]
kinds = {"right number": lambda right, solved: solved, "right letter by luck": lambda right, solved: right and not solved,
         "wrong letter": lambda right, solved: not right}
of_kind = {name: [blurt for right, solved, blurt in ticked if belongs(right, solved)] for name, belongs in kinds.items()}
assert sum(map(len, of_kind.values())) == len(ticked) and not any(solved for right, solved, _ in ticked if not right)
pd.DataFrame({name: {"completions": len(blurts), "without working (%)": round(100 * np.mean(blurts or [0]), 1)}
              for name, blurts in of_kind.items()}).T

# %% [markdown]
# Two iterations of Iterative RPO and of SFT on chosen with this reward, on 300 questions, each at its rate of the search on
# the usual task. The rate of SFT on chosen is the higher one, and was chosen where winners are right; so there is a third line,
# SFT on chosen at the rate of the pairs. What the reward counts is the letters; beside them the numbers.

# %%
# NBVAL_IGNORE_OUTPUT
both = read("regimes_mean").query("factor == 'choices' and metric in ('greedy', 'solved')")
both = both.assign(counted=both.metric.map({"greedy": "right letter", "solved": "right number"}),
                   line=both.method.map(TITLE).where(both.level.isna(), both.method.map(TITLE) + " at 1e-4"))
for row in final(both, ("greedy", "solved")).itertuples():
    print(f"{row.counted}, {row.line} against {TITLE[row.against.split('_')[0]]}: {100 * row.difference:+.1f} points"
          f" ({100 * row.difference_low:+.1f} to {100 * row.difference_high:+.1f}; {row.seeds} seeds)")
assert set(both.metric) == {"greedy", "solved"}
table = both.pivot_table(index=["counted", "line"], columns="iteration", values="value", sort=False)
(100 * table).round(1).rename(columns="M_{}".format)

# %% [markdown]
# Luck that nobody arranged does the same as the rule of *lucky winners*. With pairs letters and numbers rise together. With winners
# alone both fall below M_0, and in numbers little is left, while a wrong number still hits the right letter about as often as a
# guess among four would. At the lower rate the fall is smaller after two iterations, and still clear.
#
# The table of M_0's completions says why. More than half of the right letters are luck, and most of the lucky ones are blurts. SFT on
# chosen copies them all. In a pair a lucky winner and a loser are blurts about equally often, so that they cancel; what is left is the
# winners with the right number, nearly none of which is a blurt, and these point to the working.
#
# This is the answer of the miniature to when losers teach: where a good part of the winners is right for a reason that the losers
# have as well. It is a reading of two cases of one kind, both on questions that M_0 mostly guesses at. Nor does any
# of it explain the paper's gap on GSM8K, where most winners are right for the right reason.

# %% [markdown]
# ## 8 Iterations five to eight
#
# The paper ends after four iterations, where its gain is half a point. What if one goes on? **Predict**: saturation, or a
# turn for the worse? And if it turns, which number will have said so before?

# %%
# NBVAL_IGNORE_OUTPUT
eight = read("eight_iterations")
seeds = set(eight.seed)
early = comparison[comparison.method.isin(eight.method) & comparison.seed.isin(seeds)]
whole = pd.concat([early, eight[eight.iteration >= early.iteration.max()]])     # M_4's pairs are in the second
whole = whole.drop_duplicates(["method", "seed", "iteration", "metric", "k"]).sort_values("iteration", kind="stable")
goes = whole[whole.metric == "greedy"].pivot_table(index="method", columns="iteration", values="value", sort=False)
behind = eight[eight.metric == "greedy"].groupby(["method", "iteration"]).seed.nunique()
print(f"right, greedy (%), mean over {behind.min()} to {behind.max()} seeds")
assert goes.shape[1] > 4
(100 * goes).round(1).astype(object).fillna("")

# %%
# NBVAL_IGNORE_OUTPUT
figure = plots.accuracy_per_iteration(whole[whole.method == "irpo"])
assert "M_4" in plots.alt_text(figure)
figure

# %% [markdown]
# Did it turn, and did a warning come first? Two signs from [notebook 05](05_iterations.ipynb), seed by seed: training lowers the
# winners' log-probability, or the KL of a step is more than twice that of the step before. *Turned* means more than three points
# below the best iteration before, the same limit as on the map. On so few questions a single run may fall that far by luck, so
# look for what the seeds have in common.

# %%
# NBVAL_IGNORE_OUTPUT
def first(condition):
    """The first iteration at which a series of True and False says True, or None."""
    return next((int(t) for t, value in condition.items() if value), None)

def signs(run):
    names = ["greedy", "kl_to_previous", "chosen_logp_per_token", "chosen_logp_per_token_before"]
    v = run[run.metric.isin(names)].pivot_table(index="iteration", columns="metric", values="value")
    v = v.reindex(columns=names)
    return {"best at": int(v.greedy.idxmax()), "turned at": first(v.greedy < v.greedy.cummax() - 0.03),
            "winners fell at": first(v.chosen_logp_per_token < v.chosen_logp_per_token_before),
            "KL doubled at": first(v.kl_to_previous > 2 * v.kl_to_previous.shift())}

warned = pd.DataFrame([{"method": name, "seed": seed, **signs(run)} for (name, seed), run
                       in whole.groupby(["method", "seed"], sort=False)], dtype=object)
assert warned["best at"].notna().all()
warned.where(warned.notna(), "never")

# %%
# NBVAL_IGNORE_OUTPUT
turned = warned[warned["turned at"].notna()]
print(f"{len(turned)} of {len(warned)} runs turned")
for sign in ("winners fell at", "KL doubled at"):
    in_time = (turned[sign].astype(float) <= turned["turned at"].astype(float)).sum()
    false_alarms = warned[warned["turned at"].isna()][sign].notna().sum()
    print(f"{sign.removesuffix(' at')}: by the time of the turn in {in_time} of {len(turned)}; of the"
          f" {len(warned) - len(turned)} runs that did not turn {false_alarms} showed it, too")
assert len(turned) <= len(warned)

# %% [markdown]
# Why do gains end? Look at what there is to learn from: the questions that still give pairs, and the share of these pairs that
# are *one step apart*, equal but for one line of working. Early pairs set working against a blurted number; late ones, one
# calculation against another. Those are the pairs on which DPO can lower the winner with the loser, as the two share nearly all
# of their tokens ([Pal et al.](https://arxiv.org/abs/2402.13228)).

# %%
# NBVAL_IGNORE_OUTPUT
def course(metric, scale=1.0):
    rows = whole[whole.metric == metric]
    return scale * rows.pivot_table(index="method", columns="iteration", values="value", sort=False)

material = pd.concat({"questions used": course("pairs_used"), "one step apart (%)": course("one_step_apart", 100),
                      "KL to the model before": course("kl_to_previous")})
assert len(material)
material.round(2).astype(object).fillna("")

# %% [markdown]
# It does not end in a quiet plateau. Iterative RPO, which had stood still since its second iteration, turns in the fifth to the
# seventh, in each of the three seeds that were continued (of the two that were not, one had turned in the fourth already); DPO without NLL turns earlier and then goes up and down: a model that has fallen writes losers again that
# are easy to tell, and one good training lifts it. Winners alone stay where they are, at a KL per step that goes on shrinking. With
# pairs that KL had shrunk to a fraction of a nat, too, and grows again about the turn. Of the two signs the KL came with the turn or
# after it, so that it tells in time to go back to the previous model, and no earlier. The fall of the winners came before the turn in
# four of six runs, by one to three iterations. But in two of the four it came in the first step, which took the model to nearly its
# best, and it came in a run that did not turn as well. So it is a reason to look and no proof.
#
# Mind where the rate comes from: it was the best of three *after two iterations*. For eight it is too high, once there is little left
# to learn but to tell near-equal calculations apart. The default profile, at a fifth of it, rises through all of its four
# iterations. Choose the rate by runs as long as those that you mean to make, or stop when the gain has gone.

# %% [markdown]
# ## 9 Ablations: one setting at a time
#
# The base run is Iterative RPO at its tuned rate, two iterations on 300 questions, half of those of section 3. Each dot below changes one setting of it, and is compared
# with the base on the same questions and seeds. The paper has two of these, after one iteration: without the NLL term, and twice the
# data. Of α and β it names the values that it tried, and no results for them.
#
# **Predict** which of the settings below matter, and which do not.

# %%
# NBVAL_IGNORE_OUTPUT
ablations = final(read("ablations_mean"))
figure = figures.differences(ablations, [label(row, f"{row.factor.replace('_', ' ')} {row.level}")
                                         for row in ablations.itertuples()])
assert "points" in plots.alt_text(figure)
figure

# %% [markdown]
# Many intervals at once ask for care. An interval of 95 % misses zero by luck once in twenty, so a few such "findings" come free.

# %%
# NBVAL_IGNORE_OUTPUT
clear = ablations[(ablations.difference_low > 0) | (ablations.difference_high < 0)]
print(f"{len(ablations)} levels, {ablations.seeds.min()} to {ablations.seeds.max()} seeds each; {len(clear)} intervals"
      f" without zero, of which {0.05 * len(ablations):.1f} are to be expected by luck alone")
for row in clear.sort_values("difference").itertuples():
    print(f"  {row.factor} {row.level}: {100 * row.difference:+.1f} ({100 * row.difference_low:+.1f} to"
          f" {100 * row.difference_high:+.1f})")
assert len(ablations)

# %% [markdown]
# One setting stands out, K = 1: with one pair a question instead of four there are a quarter of the steps, and the model has not got as far.
# That is a matter of how much was trained, not of which pairs are the right ones. The others matter little here, where after two iterations
# nearly everything is learnt that can be; with N = 4, K = 8, another α or β, another reference or other pairs it ends at the same place,
# as far as these few seeds can tell. Keeping the pairs of earlier iterations, which the paper leaves to later work, costs a little here if
# anything; an interval that misses zero by so little is what luck alone may give among so many. That a setting does nothing near the ceiling says nothing about the climb, and little about another
# model. What would travel, if anything, is what has a reason: which model is the reference, for instance, decides how far the model may
# go in all.
#
# A setting that shows nothing here was changed *alone* and at *one* learning rate, and the map of section 6 shows how a setting
# can matter at one rate and not at another.

# %% [markdown]
# ## 10 A comparison of your own
#
# Small enough for a short wait: one iteration, few questions, one seed, the validation split, each method at its tuned rate. The
# first run draws the completions of M_0 and the others get them: `runner.share_stages` puts them in place.

# %%
import tempfile
from studies import runner

live = Path(tempfile.mkdtemp())
changes = dict(iterations=1, n_questions=150, n_samples=8, k_pairs=4, batch_size=4, gold=False,
               eval_split="validation", n_eval_questions=200, eval_samples=2, eval_samples_ends=2)
if PROFILE == "smoke":
    changes |= dict(n_questions=24, n_samples=4, k_pairs=2, n_eval_questions=24)

def run_live(name):
    rate = profile.learning_rate
    if profile.model == "seed":                # a method that was not tuned takes the rate of Iterative RPO
        rate = rates.get(trials.TUNED_AS.get(name, name), rates["irpo"])
    p = profiles.get(PROFILE, method=name, learning_rate=rate, **changes)
    path = live / "live" / name / "seed_0"
    runner.share_stages(path, p, live)
    return runs.run(p, path, progress=False)

# %%
# NBVAL_IGNORE_OUTPUT
from datasets import load_from_disk

compared = ("irpo", "iterative_dpo", "star")
rows = {name: pd.DataFrame(run_live(name)) for name in compared}

def table_of(name, place):
    return load_from_disk(str(live / "live" / name / "seed_0" / place))

samples = {name: table_of(name, "iteration_0/samples")["completion"][:] for name in compared}
same = all(texts == samples["irpo"] for texts in samples.values())
print("the same completions of M_0 for all:", same)
assert same

# %% [markdown]
# **Predict**: with so many questions, how large would a difference have to be to be seen?

# %%
# NBVAL_IGNORE_OUTPUT
answers = {name: table_of(name, "iteration_1/evaluation/greedy") for name in compared}
answers["M_0"] = table_of("irpo", "iteration_0/evaluation/greedy")

def compared_with_test(graded_a, graded_b):
    """What b gains over a on the same questions, with the p value of McNemar's test."""
    correct = [pd.Series(evaluation.correct_per_question(graded)).sort_index() for graded in (graded_a, graded_b)]
    return evaluation.compare(graded_a, graded_b) | {"p_mcnemar": statistics.mcnemar(*correct)["p"]}

tested = pd.DataFrame({f"irpo over {name}": compared_with_test(answers[name], answers["irpo"])
                       for name in ("M_0", "iterative_dpo", "star")}).T
tested["word"] = [word(row.low, row.high) for row in tested.itertuples()]
half = 100 * (tested.high - tested.low).max() / 2
print("right, greedy (%):", {name: round(100 * float(np.mean(x["correct"])), 1) for name, x in answers.items()})
print(f"{tested.n.max():.0f} questions: the widest interval reaches {half:.0f} points to each side")
assert tested.p_mcnemar.between(0, 1).all()
tested.round(3)

# %% [markdown]
# What may you say after this? That M_1 of a method is better than M_0, if its interval says so: that effect is large. About the
# order of the methods such a run says little, for three reasons. The intervals are over questions alone, for *this* training:
# with one seed nothing is known about the next one, and "significant" would be a sentence about these adapters, not about
# methods. The rates were tuned for two iterations and batches of 16, and here it is one with batches of four. And an
# interval of no width, where two models got the very same questions right, is no certainty: the bootstrap cannot draw what it has
# not seen. Compare with the figures of section 3, and with the number of seeds behind them.

# %% [markdown]
# ## 11 A method of your own
#
# A reward is a function of one question's rows, with all columns of the question and of its graded completions (`extracted`,
# `correct`, `logprob`, `n_tokens`, ...). It returns a float for each row, here 1 or 0. Say we like short answers: only the
# shortest right completion is to win.
#
# **Predict**: what will M_1 learn from that, in *this* task?

# %%
def shortest_right(rows):
    """Reward 1 for the shortest of the right completions, the first of equals, and for no other."""
    right = [i for i, row in enumerate(rows) if row["correct"]]
    best = min(right, key=lambda i: rows[i]["n_tokens"], default=None)
    return [float(i == best) for i in range(len(rows))]

methods.METHODS["shortest"] = methods.Method("The shortest right answer wins", "an example", reward=shortest_right)
print(letters_of("shortest", twelve))
assert letters_of("shortest", twelve) == "lwll lwll llll"

# %% [markdown]
# One entry, and every part of the package knows the method. Look at b: a right answer blurted out wins against two that show
# their working. How often does that happen with what M_0 wrote in section 2?

# %%
# NBVAL_IGNORE_OUTPUT
def look(name):
    made, counts = pairs_of(name, graded, asked, task, tokenizer)
    truth = dict(zip(zip(graded["id"], graded["sample"]), graded["correct"]))
    losers = [truth[key] for key in zip(made["id"], made["rejected_sample"])]
    return {"pairs": counts["pairs"], "tokens of a winner": np.mean([len(ids) for ids in made["chosen_ids"]]),
            "losers that are right (%)": 100 * np.mean(losers)}

looked = pd.DataFrame({name: look(name) for name in ("irpo", "shortest")}).T
assert looked.loc["irpo", "losers that are right (%)"] == 0
looked.round(1)

# %% [markdown]
# Two results. The chosen completions got shorter where a question has several correct ones to choose from. In this
# task a short completion answers without reasoning. And correct completions were *rejected*: whatever the reward does not choose is rejected. Where
# you do not want that, train on the chosen completions alone (`settings=methods.SFT`). Rejected ones are not used then, which makes it
# [RAFT](https://arxiv.org/abs/2304.06767) with one chosen completion per question.
#
# The whole loop also takes the new name. The smallest of runs, to see that it goes through:

# %%
# NBVAL_IGNORE_OUTPUT
tiny = changes | dict(n_questions=24, n_samples=4, k_pairs=2, n_eval_questions=24)
methods.METHODS["shortest_raft"] = methods.Method(
    "SFT on the shortest right answer", "after Dong et al. 2023, arXiv 2304.06767", methods.SFT,
    reward=shortest_right)
for name in ("shortest", "shortest_raft"):
    p = profiles.get(PROFILE, method=name, **tiny)
    made = pd.DataFrame(runs.run(p, live / "own" / name, progress=False))
    tokens = made[made.metric == "mean_tokens"].set_index("iteration").value
    print(f"{methods.METHODS[name].title}: {tokens[0]:.1f} tokens per completion before, {tokens[1]:.1f} after")
    assert set(made.method) == {name}

# %% [markdown]
# ### Exercise 6.3: an entry of your own
#
# **Goal**: a reward without gold answers that would rather be silent than wrong. **Difficulty**: 2 of 3. **Time**: 15 minutes.
#
# A majority of two among sixteen is hardly a majority. Write a reward `clear_majority(rows)`, a list with 1.0 or 0.0 for each
# row: the most frequent answer gets 1.0 if *more than half of all completions* give it, those without an answer counted among
# all; otherwise all get 0.0, and the question gives no pairs. It must not look at `correct`. Then put it into an entry, `CLEAR`:
# a `methods.Method` with a title, a source and this reward, trained like Iterative RPO.
#
# <details><summary>Hint</summary>
#
# An answer given by more than half is the most frequent one by itself, and ties cannot happen. What `Method` is not told, it
# takes from Iterative RPO.
#
# </details>

# %%
CLEAR = None
# SOLUTION
def clear_majority(rows):
    votes = Counter(row["extracted"] for row in rows if row["extracted"] is not None)
    return [float(votes[row["extracted"]] > len(rows) / 2) for row in rows]

CLEAR = methods.Method("A clear majority wins", "after Prasad et al. 2024", reward=clear_majority)
# STUB
# # your turn: def clear_majority(rows), and CLEAR = methods.Method(...)
# END

# %%
print(checks_06.clear_majority_method(CLEAR))

# %% [markdown]
# The worked solution is in [solutions/06_baselines_and_ablations.ipynb](solutions/06_baselines_and_ablations.ipynb).
#
# Beside the plain majority, on the completions of section 2. **Predict**: fewer winners, and how many more of them right?

# %%
# NBVAL_IGNORE_OUTPUT
if CLEAR is None:
    print("not solved yet")
else:
    methods.METHODS["clear_majority"] = CLEAR
    print(pd.DataFrame({name: quality(name) for name in ("self_consistency", "clear_majority")}).T.round(1))
assert len(graded) == QUESTIONS_DRAWN * N_DRAWN

# %% [markdown]
# Precision is bought with questions, and with easy ones left over: those on which the model agrees with itself already. Prasad
# et al. do both at once: they keep the questions whose vote is clear enough, and weigh the pairs by how clear it is.

# %% [markdown]
# ## What you have learnt
#
# - A method says who wins, what is learnt from winners and losers, and where training starts. The rest must be the same for all,
#   and the learning rate must be tuned for each.
# - Compare on the same questions and seeds, with an interval over both. "Within noise" is a result, "equal" is not.
# - A claim of a paper can be put to a test by code. A miniature can show that it does not hold everywhere.
# - Whether the NLL term matters depends on how far a training goes. An ablation at one learning rate is one column of a map.
# - Of twenty ablations one will look real by luck.
# - A reward also decides who loses.

# %% [markdown]
# **Further reading**
#
# - [Zelikman et al. 2022](https://arxiv.org/abs/2203.14465), STaR; [Xu et al. 2023](https://arxiv.org/abs/2312.16682), iterated
#   preference training; [Chen et al. 2024](https://arxiv.org/abs/2401.01335), SPIN; [Prasad et al.
#   2024](https://arxiv.org/abs/2411.04109), the vote as reward; [Yuan et al. 2024](https://arxiv.org/abs/2401.10020), the model
#   as its own judge; [Shao et al. 2024](https://arxiv.org/abs/2402.03300), GRPO.
# - [Lanchantin et al. 2025](https://arxiv.org/abs/2506.21495): online and offline, with and without the NLL term.
# - [Xiong et al. 2025](https://arxiv.org/abs/2504.11343): how far winners alone go.
# - [Pal et al. 2024](https://arxiv.org/abs/2402.13228) and [Razin et al. 2024](https://arxiv.org/abs/2410.08847): why DPO can
#   lower the winner.
#
# **Try**
#
# - `shortest` against Iterative RPO, live, with `run_live` as in section 10: does M_1 blurt?
# - The live comparison with another `seed` in `changes`. Does the order stay?
# - The same comparison with `learning_rate` ten times as high for all three. Who survives?
#
# **Recall**
#
# 1. STaR and Iterative RPO have the same pairs. What differs?
# 2. Why are the completions of M_0 shared between the methods, and those of M_1 not?
# 3. Two methods, 5 seeds, difference +1.2 (-0.3 to 2.7). What do you write?
# 4. A paper tunes its method on four values of α and takes the baseline's settings from elsewhere. What may its gain be made of?
# 5. 20 ablations, one interval without zero. What do you do before you write it down?
#
# **Next**: [07 · Real models on one GPU](07_real_models_on_one_gpu.ipynb) takes the method to a real model. The commands behind
# every file of this notebook are in the JSON file next to it, and in `scripts/studies/trials.py`.
