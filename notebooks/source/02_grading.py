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
# # 02 · Grading
#
# **What you will be able to do**
#
# - read a final answer out of a completion and compare it with the known one, and say where this goes wrong;
# - measure a grader on labelled completions: [false positives](../docs/glossary.md#false-positive) and
#   [false negatives](../docs/glossary.md#false-negative), and say which of them does more harm;
# - work out how many winners, and how many pairs, owe their reward to a lucky guess on multiple choice;
# - find right answers with wrong working among a model's own samples.
#
# | | `smoke` | `cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook | about 20 s | about 20 s | not measured here |
#
# **Needs**: the packages of this repository. Samples come from your own run if there is one (`make run`), otherwise from
# the finished run that ships with the notebooks.
#
# **Before this**: [01 · Sampling](01_sampling.ipynb).

# %%
import os, sys
sys.path[:0] = [".", ".."]                     # checks_02.py lies beside the notebooks; ".." serves the solutions
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
# ## 1 From text to 0 or 1
#
# A model wrote a [completion](../docs/glossary.md#completion): working, then an answer. The
# [reward](../docs/glossary.md#reward) is 1 if that answer equals the known one, and 0 if not
# ([section 2 of the paper](https://arxiv.org/html/2404.19733v3#S2)). The working is not looked at.
#
# The paper gives this half a sentence, and no code. But whoever has read a few hundred completions knows that "that
# answer" is not always easy to find. Here are four; the right answer is 24 each time.

# %%
completions = ["5+43=48\n48/2=24\nFinal answer: 24",
               "5+43=48\n48/2=24\nFinal answer: 24 eggs, 12 in each of 2 boxes",
               "5+43=48\nFinal answer: 48\nI forgot to halve.\nFinal answer: $24.00",
               "48 eggs are halved, and 48/2 is not 24"]

# %% [markdown]
# The shortest grader takes the last number of the text. It is in use: the filter `flexible-extract` that the
# [LM Evaluation Harness](https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/tasks/gsm8k/gsm8k.yaml) has
# for GSM8K does just that.
#
# **Predict**: a reader would call completions 1 to 3 right and the last one wrong. Which of the four does this
# grader get wrong?

# %%
import re

for completion in completions:
    last = re.findall(r"\d+", completion)[-1]
    print(f"{last:>3}  {'right' if last == '24' else 'wrong'}   {completion.splitlines()[-1]}")

# %% [markdown]
# All but the first. It takes the 2 of "2 boxes" and the 00 behind the point, and it rewards a completion that denies the
# right answer. Two different errors:
#
# - a [false negative](../docs/glossary.md#false-negative): right, but graded wrong (the second and the third);
# - a [false positive](../docs/glossary.md#false-positive): wrong, but graded right (the last).
#
# A grader does two things, and each can be mended by itself: it *extracts* the answer, and it *compares* it.

# %% [markdown]
# ## 2 Extract: where the answer stands
#
# The prompt asks for "Final answer: ..." ([appendix B.1](https://arxiv.org/html/2404.19733v3#A2)), so that is where to
# look. A model may correct itself: the *last* one counts. Only the rest of its line belongs to it.

# %%
def after_marker(completion):
    parts = re.split(r"final answer\s*:", completion, flags=re.IGNORECASE)
    if len(parts) == 1:
        return None                                             # the marker is not there
    return parts[-1].strip().split("\n")[0] or None

[after_marker(completion) for completion in completions]

# %% [markdown]
# The package does just that, and an assertion proves it:

# %%
from irpo_utils.tasks.answers import after_final_answer

assert [after_final_answer(text) for text in completions] == [after_marker(text) for text in completions]

# %% [markdown]
# The last completion has no answer now. It is graded wrong, and rightly so; but a clear "The answer is 24." would be
# graded wrong as well. Is that fair? The prompt asks for a format, and a reward that insists on it also teaches it. What
# it costs at the beginning is seen in section 4.

# %% [markdown]
# ## 3 Compare: when are two texts the same number?
#
# `"$24.00"` and `"24"` are different texts and the same number. So both are brought into one form first. This is
# called [normalisation](../docs/glossary.md#normalisation). A first attempt, in three steps: throw away currency signs
# and the commas between thousands, find the numbers, read each as an exact fraction.

# %%
from fractions import Fraction

def numbers_in(text):
    plain = re.sub(r"[$€]", "", text)
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", plain)
    return [Fraction(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:/\d+)?", plain)]

for text in ("$24.00", "1,080.50 euros", "1/3", "0.33", "-5", "24 eggs, 12 in each of 2 boxes"):
    print(f"{text:32}", *numbers_in(text))

# %% [markdown]
# Exact fractions matter: 0.33 is not 1/3, and no tolerance has to be chosen. And where a line holds *several* numbers?
#
# **Predict**: the known answer is 12, and a model ends with "Final answer: 12 or 13". Suppose your grader takes the
# first number of the line. What would a model learn from that, over four iterations?

# %% [markdown]
# It would learn to name two answers. A [false positive](../docs/glossary.md#false-positive) is not only noise, it is a *lesson*: training makes more of what was
# rewarded. So the package has a strict rule: the line must hold one number, with words or a unit around it, and of an
# equation the right side counts. In doubt there is no answer. `numbers.parse` returns that number, or None.

# %%
from irpo_utils.tasks import numbers

for text in ("$24.00", "1,080.50 euros", "1/3", "0.33", "-5"):
    assert [numbers.parse(text)] == numbers_in(text)                # where there is one number, ours agrees

for text in ("12 or 13", "24 eggs, 12 in each of 2 boxes", "3 * 8 = 24 eggs", "**24**", r"\boxed{24}", "½",
             "about a dozen"):
    print(f"{text:32}", numbers.parse(text))

# %% [markdown]
# For [majority votes](../docs/glossary.md#majority-vote) equal answers must also be equal as text. `numbers.show` gives each number one spelling.

# %%
{text: numbers.show(numbers.parse(text)) for text in ("24", "24.0", "$24.00", "48/2", "1/3", "2/6", "0.5", "½")}

# %% [markdown]
# ### Exercise 2.1: write the extractor
#
# **Goal**: text in, number out. **Difficulty**: 1 of 3. **Time**: 10 minutes.
#
# Write `extract_number(completion)`. It returns the number on the line after the *last* "Final answer:" (small or
# capital letters), as a `Fraction`. It returns None if there is no such line, no number on it, or two *different* numbers.
# Commas between thousands and currency signs do not matter; signs and decimals do.
#
# <details><summary>Hint</summary>
#
# Both halves stand above: `after_marker` finds the line, `numbers_in` the numbers. A `set` drops repetitions. The rest is:
# what if the line is None, and what if the set does not have exactly one element?
#
# </details>

# %%
def extract_number(completion):
    # SOLUTION
    line = after_marker(completion)
    found = set(numbers_in(line)) if line else set()
    return found.pop() if len(found) == 1 else None
    # STUB
    # return ...      # your turn
    # END

# %%
import checks_02

print(checks_02.extract_number(extract_number))

# %% [markdown]
# [Solution](solutions/02_grading.ipynb)

# %% [markdown]
# ## 4 Cut off is not finished
#
# Sampling stops at a limit of tokens (`max_new_tokens`). A completion that meets the limit ends anywhere. Take one whose
# answer is 112 and cut it after every character.
#
# **Predict**: how many different answers does the extractor read on the way?

# %%
from irpo_utils import tasks

whole, gsm8k = "57*2=114\n114-2=112\nFinal answer: 112", tasks.get("gsm8k")
for length in range(len(whole) - 4, len(whole) + 1):
    print(repr(whole[:length][-16:]), "->", gsm8k.extract(whole[:length]))

# %% [markdown]
# First none, then 1, then 11, then 112. If the known answer happened to be 11, the second cut would be a lucky winner.
# So [truncated](../docs/glossary.md#truncated-completion) completions are never right here, whatever they seem to say.
# The sampler knows which ones they are: `finished` is True only if the model itself ended the text. `grade_one` gives the
# verdict, its reason and the reward.

# %%
from irpo_utils import grading

for completion, finished in ((whole, True), (whole, False), (whole[:-1], True), ("57*2=114\n114-2=112", True)):
    print(grading.grade_one({"completion": completion, "answer": "112", "finished": finished}, gsm8k))

# %% [markdown]
# The second line is a price that we pay: the text happens to be complete, and is still not rewarded. The paper does not
# say what it does here. As a rule of thumb, when more than a few per cent of the completions are truncated, raise the
# limit. How often does each reason occur among real samples? They come from your run, or from the one that ships with the notebooks.

# %%
from pathlib import Path

runs = [Path(up, "runs", PROFILE) for up in ("..", "../..")]
if profile.model == "seed":                                     # the shipped run belongs to the small model
    runs += [Path("shipped_run"), Path("../shipped_run")]
runs = [run for run in runs if (run / "iteration_0" / "graded" / "state.json").exists()]

# %% [markdown]
# Without either, a few questions are sampled on the spot.

# %%
# NBVAL_IGNORE_OUTPUT
from datasets import load_from_disk
from irpo_utils import sampling
from irpo_utils.ops.run import load_model

task = tasks.get(profile.task)
if runs:
    graded = load_from_disk(str(runs[0] / "iteration_0" / "graded"))
else:
    model, tokenizer = load_model(profile)
    questions = task.load("train", profile.data).shuffle(seed=profile.seed).select(range(60))
    samples = sampling.sample(model, tokenizer, questions, task, n=profile.n_samples, progress=False,
                              temperature=profile.temperature_of(0), top_p=profile.top_p,
                              max_new_tokens=profile.max_new_tokens, batch_size=profile.sampling_batch_size)
    graded = grading.grade(samples, task)
assert {"completion", "reason", "correct"} <= set(graded.column_names)

# %%
# NBVAL_IGNORE_OUTPUT
reasons = grading.count_reasons(graded)
print(f"{len(graded)} completions of M_0:", reasons)
assert sum(reasons.values()) == len(graded) and reasons["ok"] == sum(graded["correct"])

# %% [markdown]
# And the grades that are stored there are the grades of the functions that you have just seen:

# %%
first = graded.select(range(100))
again = grading.grade(first, task)
assert all(list(again[name]) == list(first[name]) for name in ("extracted", "correct", "reason"))

# %% [markdown]
# ## 5 Grade the grader
#
# A grader is a measuring instrument, and an instrument is calibrated. `data/graded_forms.jsonl` holds completions that
# were written for this notebook in the forms that models use, for four tasks. Each has a `verdict` by reading, not by
# running a grader. The rule: would a teacher who reads the question and the whole completion say that the answer it
# commits to is the right one?

# %%
import pandas as pd

places = [Path(up, "data", "graded_forms.jsonl") for up in (".", "..")]
forms = pd.read_json(next(place for place in places if place.exists()), lines=True, dtype=False)
print(pd.crosstab(forms.task, forms.verdict, margins=True).to_string())

# %%
for row in forms[forms.id.isin(["buns-09", "buns-15", "film-04", "shape-03"])].itertuples():
    print(f"{row.verdict}, because: {row.reason}\n    {row.question}\n    {row.completion.splitlines()[-1]}\n")

# %% [markdown]
# Three graders take the test. `exact` wants the known answer to the letter after the marker. `contains` is content if it
# occurs anywhere in the last line. The third is the package's.

# %%
rows = forms.astype(object).where(forms.notna(), None).to_dict("records")
graders = {
    "exact": lambda row: after_marker(row["completion"]) == row["answer"],
    "contains": lambda row: row["answer"] in (row["completion"].splitlines() or [""])[-1],
    "package": lambda row: grading.grade_one(row, tasks.get(row["task"]))["correct"]}
for name, grader in graders.items():
    forms[name] = [grader(row) for row in rows]

# %% [markdown]
# **Predict**: which of the three has the most false positives, and which the most false negatives?

# %%
right = forms.verdict == "right"
errors = pd.DataFrame({name: {"false positives": (forms[name] & ~right).sum(),
                              "false negatives": (~forms[name] & right).sum()} for name in graders}).T
print(f"of {(~right).sum()} wrong and {right.sum()} right completions\n{errors.to_string()}")

# %% [markdown]
# `exact` never rewards a wrong answer here, and misses most right ones. `contains` is easily fooled, and still misses many. The
# package's grader misses fewest, and is fooled less often than `contains`, but not never.
#
# Do not read the table as error *rates*. Every form stands in the file about once; models use the first few all the time,
# and the odd ones rarely. The table says what *can* go wrong, the reasons of your own run (above) how often it does.

# %% [markdown]
# ### What the package gets wrong
#
# First the dangerous kind.

# %%
for row in forms[forms.package & ~right].itertuples():
    print(f"{row.task}, known answer {row.answer}: {row.completion.splitlines()[-1]}\n    {row.reason}")

# %% [markdown]
# It understands few words, such as a denial ("not 36"), a bound ("36 or more") and a minus in words. But units are thrown away
# unread, and the grader does not check what the number counts. Training may reward such answers, so read a few dozen
# chosen completions of every iteration. That is the cheapest test.
#
# Now the other kind, counted by form.

# %%
missed = forms[~forms.package & right]
examples = missed.groupby("form").completion.first().str.split("\n").str[-1]
by_form = pd.DataFrame({"count": missed.form.value_counts(), "example": examples})
print(by_form.sort_values("count", ascending=False, kind="stable").to_string())

# %% [markdown]
# Most of them are right answers in a form that was not asked for. Which kind of error does more harm? Follow each into
# the pairs:
#
# - a *false negative* turns a right completion into a loser. The same answer, in the form that was asked for, is a winner in
#   the next sample, so the model is pushed away from the odd form at least as much as from the answer;
# - a *false positive* turns a wrong completion into a winner. Nothing pushes back, and the next model makes more of it.
#
# That is why the package is strict in doubt. It is a choice, and others choose otherwise: graders for *evaluation* are
# often lenient, because there nothing is learnt from a false positive.

# %% [markdown]
# ### Exercise 2.2: fool a grader
#
# **Goal**: find a false positive. **Difficulty**: 1 of 3. **Time**: 5 minutes.
#
# The function below reads the first whole number after the word "answer". It is used for questions whose known answer is
# 42. Write a completion into `fooled` that it rewards although its final answer is *not* 42.
#
# <details><summary>Hint</summary>
#
# `\D*` skips everything that is no digit, line ends included, and `\d+` stops at the first character that is no digit.
# What could come before, what could come after?
#
# </details>

# %%
def naive(completion):
    match = re.search(r"answer\D*(\d+)", completion, re.IGNORECASE)
    return match[1] if match else None

# SOLUTION
fooled = "6*7=42\n42+1/2=42.5\nFinal answer: 42.5"
# STUB
# fooled = ...      # your turn
# END

# %%
print(checks_02.fooled(fooled, naive))

# %% [markdown]
# [Solution](solutions/02_grading.ipynb)

# %% [markdown]
# How often does the grader of the package err? A second collection has 681 completions in the forms of public bug
# reports, each with the verdict of a fair marker. Some verdicts are debatable, and the table counts them separately. A
# *false positive* is an incorrect completion that gets the reward, and a *false negative* is a correct one that does not.
# The graders were improved with these completions, so expect more errors on new forms.

# %%
cases = [Path(up, "figures", "grading_cases.csv") for up in ("..", "../..")]
cases = pd.read_csv(next(place for place in cases if place.exists()))
cases = cases[cases.kind == "all"].drop(columns="kind")
print(cases.replace({"sure": {True: "clear", False: "debatable"}}).rename(columns={"sure": "verdict"}).to_string(index=False))

# %% [markdown]
# ## 6 Letters
#
# On multiple choice the answer is a letter, and letters are also words. A first attempt takes the first capital from A to
# E that stands alone.
#
# **Predict**: the options are (A) a colder day, (B) a weaker force, (C) a stronger force, (D) a longer rest. What does it
# read in each of these lines?

# %%
from irpo_utils.tasks.arc_challenge import letter

choices = ["a colder day", "a weaker force", "a stronger force", "a longer rest"]
for line in ("(C)", "C) a stronger force", "a stronger force", "A stronger force", "(B) or (C)",
             "(C) a weaker force"):
    first = re.search(r"\b[A-E]\b", line)
    print(f"{line:22} first letter {first[0] if first else None}   package {letter(line, choices)}")

# %% [markdown]
# "A stronger force" is option C, but its first letter is the article. The package looks at the options' texts as well,
# and where letter and text disagree it reads nothing. On the easy lines both agree.
#
# The larger problem is another one: a letter is easily *guessed*.

# %% [markdown]
# ## 7 Luck
#
# With four options, one guess in four is right. The paper says so for ARC: about 25 % of such chains of thought end in
# the right answer by chance, and are winners all the same
# ([section 3.2](https://arxiv.org/html/2404.19733v3#S3.SS2)). How many winners does that make? A toy model shows it:
#
# - the model *knows* a share $q$ of the questions; there each sample is right with probability $a$;
# - the other questions it *guesses*: each sample is right with probability $1/c$, where $c$ is the number of options.
#
# Of all samples, $q\,a$ are right by knowledge and $(1-q)/c$ by luck. So the lucky share among winners is
#
# $$\frac{(1-q)/c}{q\,a + (1-q)/c}.$$

# %%
known, right_if_known, options = 0.7, 0.97, 4

lucky_winners = (1 - known) / options / (known * right_if_known + (1 - known) / options)
print(f"lucky among the winners: {lucky_winners:.3f}")

# %% [markdown]
# Much less than one in four, since most winners come from known questions. The formula is short enough to trust, but let
# us count as well: 20,000 questions, 30 samples each as in the paper.

# %%
import numpy as np

def simulate(known, right_if_known, options, n, questions=20_000, seed=0):
    """For each question: whether the model guesses, and how many of its n samples are right."""
    rng = np.random.default_rng(seed)
    guessed = rng.random(questions) >= known
    chance = np.where(guessed, 1 / options, right_if_known)
    return guessed, (rng.random((questions, n)) < chance[:, None]).sum(axis=1)

guessed, winners = simulate(known, right_if_known, options, n=30)
print(f"lucky among the winners: {winners[guessed].sum() / winners.sum():.3f}")
assert abs(winners[guessed].sum() / winners.sum() - lucky_winners) < 0.01

# %% [markdown]
# But the model is not trained on winners. It is trained on *pairs*: K from each question that has at least one winner
# **and** at least one loser.
#
# **Predict**: you have just seen which share of the winners is lucky. What share of the pairs has a lucky winner: less, the
# same, or more?

# %%
used = (winners > 0) & (winners < 30)
print(f"known questions that give pairs: {used[~guessed].mean():.2f}, guessed ones: {used[guessed].mean():.2f}")
print(f"pairs with a lucky winner: {guessed[used].mean():.3f}")

# %% [markdown]
# Several times as many. Known questions are often *all* right, give no loser and drop out. Guessed questions hardly ever
# drop out: among 30 guesses some are right and some are wrong, almost surely. And every question that stays gives K pairs,
# however few its winners. So pairing *concentrates* luck.
#
# **Predict**: would a model that is surer of what it knows have fewer lucky pairs, or more? And what if you drew more samples?

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils import plots

table = []
for right_if_known in (0.8, 0.9, 0.97, 0.99):
    for n in (2, 4, 8, 16, 24, 30):
        guessed, winners = simulate(known, right_if_known, options, n)
        used = (winners > 0) & (winners < n)
        table.append({"metric": f"right if known: {right_if_known}", "n": n, "value": guessed[used].mean()})
figure = plots.sweep(pd.DataFrame(table), "n", "Samples per question N", "Pairs with a lucky winner (%)")
assert all(0 < row["value"] < 1 for row in table)
figure

# %% [markdown]
# The curves show the share of pairs with a lucky winner. The surer the model is of what it knows, the *more* of its pairs come
# from questions that it guesses. More samples help, but slowly: a known question needs many before one goes wrong. A model that
# knows *more* questions is another matter: it guesses fewer, and has fewer lucky pairs (exercise 2.3 lets you try).
#
# What else helps? More options; a higher temperature (the paper samples hotter in later iterations, so that enough
# samples go wrong); asking for what cannot be guessed; or leaving out questions on which the samples look like guesses.
# [Schumann and Riezler 2025](https://arxiv.org/abs/2509.25941) find just this in real models: on multiple-choice questions
# that a model cannot solve, chains of thought with a right answer tend to be spurious.
#
# And yet the paper's accuracy on ARC rises. Noise slows learning; it does not forbid it. A lucky chain of thought is also
# paired with unlucky ones that look much the same, so that the pair says little either way.

# %% [markdown]
# ### Exercise 2.3: the share of lucky pairs
#
# **Goal**: derive what the simulation counted. **Difficulty**: 2 of 3. **Time**: 15 minutes.
#
# Write `lucky_pairs(known, right_if_known, options, n)`: the expected share, among the questions that give pairs, of those
# that the model guesses. A question gives pairs if its `n` samples are neither all right nor all wrong.
#
# <details><summary>Hint</summary>
#
# If each sample is right with probability $p$, all $n$ are right with probability $p^n$ and all are wrong with probability
# $(1-p)^n$. Work out the probability that a guessed question gives pairs, and that a known one does. Then weigh both with how
# many such questions there are.
#
# </details>

# %%
def lucky_pairs(known, right_if_known, options, n):
    # SOLUTION
    def gives_pairs(p):
        return 1 - p**n - (1 - p)**n

    from_guesses = (1 - known) * gives_pairs(1 / options)
    return from_guesses / (from_guesses + known * gives_pairs(right_if_known))
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_02.lucky_pairs(lucky_pairs))

# %% [markdown]
# [Solution](solutions/02_grading.ipynb)

# %% [markdown]
# ## 8 Right answer, wrong working
#
# Luck is not confined to multiple choice. The reward sees the final answer only, so working may be absent or false. For
# arithmetic this can be checked: find every equation that a completion shows, and calculate.

# %%
EQUATION = re.compile(r"(?<![-+*/x×=.\d])(?<![-+*/x×=]\s)"         # not in the middle of a longer sum
                      r"(\d[\d,]*\.?\d*)\s*([-+*/x×])\s*\$?(\d[\d,]*\.?\d*)\s*=\s*\$?(-?\d[\d,]*\.?\d*)")

def equations(completion):
    """[(left, operator, right, result), ...] with exact numbers."""
    return [tuple(part if part in "-+*/x×" else Fraction(part.replace(",", "").rstrip(".")) for part in match)
            for match in EQUATION.findall(completion)]

equations("57*2=104\n104 - 2 = $102.50")

# %%
def is_true(equation):
    left, operator, right, result = equation
    if operator == "/":
        return right != 0 and left == result * right
    return result == {"+": left + right, "-": left - right}.get(operator, left * right)

assert [is_true(e) for e in equations("57*2=104\n104-2=102\n7/2=3.5\n1/0=1")] == [False, True, True, False]

# %% [markdown]
# Now the winners of M_0, which you loaded above.
#
# **Predict**: how many of its right answers come without any equation, and how many with a false one?

# %%
# NBVAL_IGNORE_OUTPUT
def working(completion):
    shown = equations(completion)
    return "no equation" if not shown else "all true" if all(map(is_true, shown)) else "a false one"

samples = graded.to_pandas()
samples["working"] = samples.completion.map(working)
counts = pd.crosstab(samples.working, samples.correct).rename(columns={False: "wrong", True: "right"})
print(counts.assign(share_right=(counts.get("right", 0) / counts.sum(axis=1)).round(3)).to_string())
assert counts.to_numpy().sum() == len(samples)

# %% [markdown]
# Each row says what kind of working the completions show, how many are wrong and right, and what share is right.
#
# With the small model only a few winners have no or false working. Not because it is careful: most of its completions have little
# or no working at all. But a blurted number is hardly ever right, since there are hundreds to choose from. Compare this with
# a guess among four letters. **The more ways there are to be wrong, the purer are the winners.** This is the whole reason why
# a reward on the final answer selects the working here.
#
# A few slip through. Here are some whose working is false, or absent.

# %%
# NBVAL_IGNORE_OUTPUT
odd = samples[samples.correct & (samples.working != "all true")].sort_values("working", kind="stable")
for row in odd.head(4).itertuples():
    print(f"known answer {row.answer}, {row.working}:", " ; ".join(row.completion.splitlines()))
    for left, operator, right, result in [e for e in equations(row.completion) if not is_true(e)]:
        print(f"    false: {float(left):g}{operator}{float(right):g}={float(result):g}")
assert odd.correct.all()

# %% [markdown]
# With some luck you see one where two errors cancel, or where the last line has nothing to do with the lines before it.
#
# A reward for the outcome cannot tell. [Uesato et al. 2022](https://arxiv.org/abs/2211.14275) measured it on GSM8K: rewarding the
# outcome gives about as many right answers as rewarding each step, but not as many right *steps*. For methods that judge steps
# see [Step-DPO](https://arxiv.org/abs/2406.18629), and notebook [03](03_pairs.ipynb) for what a pair says about a step.

# %% [markdown]
# ### Exercise 2.4: a stricter reward
#
# **Goal**: a reward for right answers with sound working. **Difficulty**: 3 of 3. **Time**: 15 minutes.
#
# Write `sound(completion, extracted)`. It returns True if the completion shows at least one equation, all its equations are
# true, and the *last* one results in the extracted answer (a text such as `"112"`, or None); otherwise False.
# `equations` and `is_true` from above do the reading.
#
# <details><summary>Hint</summary>
#
# `all([])` is True in Python. The result of the last equation is a `Fraction`; make one of `extracted` before you compare.
#
# </details>

# %%
def sound(completion, extracted):
    # SOLUTION
    shown = equations(completion)
    if not shown or extracted is None:
        return False
    return all(is_true(equation) for equation in shown) and shown[-1][3] == Fraction(extracted)
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_02.sound(sound))

# %% [markdown]
# Once solved, the next cell applies your reward to the winners. Until then it says so.

# %%
# NBVAL_IGNORE_OUTPUT
won = samples[samples.correct]
if checks_02.sound(sound).startswith("Right"):
    kept = sum(sound(row.completion, row.extracted) for row in won.itertuples())
    print(f"{kept} of {len(won)} winners also have sound working")
else:
    print(f"{len(won)} winners; exercise 2.4 is not solved yet")
assert won.correct.all()

# %% [markdown]
# [Solution](solutions/02_grading.ipynb)

# %% [markdown]
# ## What you have learnt
#
# - A grader extracts and compares. Each step has [false positives](../docs/glossary.md#false-positive) and
#   [false negatives](../docs/glossary.md#false-negative), and they can be counted on labelled completions.
# - False positives are taught to the next model, so a grader for training is strict in doubt.
# - A truncated completion has no answer, whatever it seems to say.
# - On multiple choice, far more of the pairs than of the winners are lucky, and the surer the model is of what it knows, the more.
# - Where there are many ways to be wrong, right answers mostly have right working, though nobody looked at it.
#
# **What to try.** Add ten completions of your own model to the labelled set, with your verdict, and run section 5 again.
# Make `numbers_in` understand "minus 5", and look at what else it changes. In section 7 let the model be half sure of some
# questions (right with probability 0.6): where do they go?
#
# **Recall, without looking up.**
#
# 1. Why does the *last* "Final answer:" count, and not the first?
# 2. Why are fractions compared exactly?
# 3. A completion ends in "Final answer: 36" and was cut off at the token limit. What is its reward here, and why?
# 4. Which does more harm in training, a false positive or a false negative?
# 5. Why does a model that is surer of what it knows have *more* lucky pairs on multiple choice?
#
# **Next**: [03 · Pairs](03_pairs.ipynb): which winner meets which loser, and what is left out.
