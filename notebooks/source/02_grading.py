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
# - read the final answer of a completion and compare it with the *gold answer*, the known correct one;
# - measure a grader: [false positives](../docs/glossary.md#false-positive) and
#   [false negatives](../docs/glossary.md#false-negative);
# - show with numbers what a model learns from a lenient grader.
#
# | | `smoke` | `cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook, on two cores | 20 seconds | 20 seconds | as `cpu` |
#
# **Needs**: the packages of this repository (in Colab: [`docs/colab.md`](../docs/colab.md)). The completions come from your
# own run (`make run`) or from the run shipped with the notebooks.
#
# **Before this**: [01 · Sampling](01_sampling.ipynb).

# %%
import os, sys
sys.path[:0] = [".", ".."]                          # for helpers_02.py and checks_02.py
sys.path += ["../scripts", "../../scripts"]         # the package `studies`
PROFILE = os.environ.get("IRPO_PROFILE", "cpu")     # "cpu", "smoke", or a GPU profile

# %% tags=["nbval-ignore-output"]
import re
from fractions import Fraction

import pandas as pd

import checks_02, helpers_02
from helpers_02 import equations, is_true
from irpo_utils import grading, models, pairs, profiles, tasks
from irpo_utils.ops.cli import quiet_libraries
from irpo_utils.tasks import answers, numbers
from studies import word_choices

quiet_libraries()
profile = profiles.get(PROFILE)
print("profile", PROFILE, "· device", models.default_device(), "· seed", profile.seed)

# %% [markdown]
# ## 1 From text to 0 or 1
#
# The [reward](../docs/glossary.md#reward) of a completion is 1 if its final answer equals the gold answer, otherwise 0
# ([section 2 of the paper](https://arxiv.org/html/2404.19733v3#S2)). The grader does not judge the working. But which
# number is the final answer? The gold answer of these four completions is 24.

# %%
completions = ["5+43=48\n48/2=24\nFinal answer: 24",
               "5+43=48\n48/2=24\nFinal answer: 24 eggs, 12 in each of 2 boxes",
               "5+43=48\nFinal answer: 48\nI forgot to halve.\nFinal answer: $24.00",
               "48 eggs are halved, and 48/2 is not 24"]

# %% [markdown]
# The simplest grader takes the last run of digits.
# [Evaluation libraries](https://github.com/EleutherAI/lm-evaluation-harness/blob/main/lm_eval/tasks/gsm8k/gsm8k.yaml) can
# do this.
#
# **Predict**: completions 1 to 3 are correct, and the last one is not. For which of them does this grader err?

# %%
for completion in completions:
    last = re.findall(r"\d+", completion)[-1]
    verdict = "correct" if last == "24" else "incorrect"
    print(f"{last:>3}  {verdict:9}   {completion.splitlines()[-1]}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# It errs for all completions but the first.
#
# </details>
#
# These are two kinds of error:
#
# - a [false negative](../docs/glossary.md#false-negative): correct, but not rewarded (completions 2 and 3);
# - a [false positive](../docs/glossary.md#false-positive): incorrect, but rewarded (completion 4).
#
# A grader *extracts* the answer and *compares* it.

# %% [markdown]
# ## 2 Extract: where is the answer?
#
# The paper's prompt requests the marker "Final answer:" ([appendix B.1](https://arxiv.org/html/2404.19733v3#A2)). A model may
# correct itself, so the *last* marker counts.

# %%
def after_marker(completion):
    parts = re.split(r"final answer\s*:", completion, flags=re.IGNORECASE)
    if len(parts) == 1:
        return None                                             # there is no marker
    return parts[-1].strip().split("\n")[0] or None

[after_marker(completion) for completion in completions]

# %% [markdown]
# Real models also write `**Final answer**:` and `\boxed{24}`. One answer extractor,
# [`answers.py`](../irpo_utils/tasks/answers.py), reads these forms for all tasks:
#
# 1. **Marker and block**: find the last "Final answer", also in bold or in a heading. The block is the rest of its line, or
#    the next line if this rest is empty. It continues while a brace, formula or code fence is open.
# 2. **Wrapping**: remove boxes, math delimiters, bold type, quotes, and phrases such as "The answer is".
# 3. **Number**: the task parses the text. On multiple choice it reads a letter.

# %%
helpers_02.front_end("57*2=114\n114-2=112\n**Final answer**:\n$\\boxed{112}$ shells.")

# %%
for text in ("Final answer: **24**", "final answer: The answer is $24$.", "### Final answer\n24",
             "The answer is 24."):
    print(f"{text!r:40} -> {answers.read(text)!r}")          # read: steps 1 and 2

# %% [markdown]
# The last text has no marker and gets no reward. The reward also depends on the format.

# %% [markdown]
# ## 3 Compare: when are two texts the same number?
#
# `"$24.00"` and `"24"` are different texts and the same number. The grader brings both into one form
# ([normalisation](../docs/glossary.md#normalisation)) and compares exact fractions, so it needs no tolerance.

# %%
def numbers_in(text):
    plain = re.sub(r"[$€]", "", text)
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", plain)            # 1,080 -> 1080
    found = re.findall(r"-?\d+(?:\.\d+)?(?:/\d+)?", plain)     # sign, digits, decimals, denominator
    return [Fraction(number) for number in found]

for text in ("$24.00", "1,080.50 euros", "1/3", "0.33", "-5", "12 or 13"):
    print(f"{text:16}", *numbers_in(text))

# %% [markdown]
# **Predict**: the gold answer is 12, and some completions say "Final answer: 12 or 13". Your grader accepts either number.
# What could the model learn over four iterations?
#
# <details><summary>Answer</summary>
#
# It could learn to name two answers ([hedging](../docs/glossary.md#hedging)): such completions are rewarded more often than
# those with one answer.
#
# </details>
#
# `numbers.parse` accepts *one* number with its unit, and the right-hand side of an equation. Otherwise it returns None.

# %%
for text in ("1,080.50 euros", "3 * 8 = 24 eggs", "½", "12 or 13", "24 eggs, 12 in each of 2 boxes",
             "about a dozen"):
    print(f"{text:32}", numbers.parse(text))

# %% [markdown]
# The package also rejects completion 2 of section 1, which is correct. We allow this false negative, because the same rule
# rejects hedging.

# %% [markdown]
# ### Exercise 2.1: write the extractor
#
# **Goal**: text in, number out. **Difficulty**: 1 of 3. **Time**: 10 minutes.
#
# Write `extract_number(completion)`. It reads the first line of text after the *last* "Final answer:", in upper or lower
# case, and returns its number as a `Fraction`. It returns None if there is no marker, no number, or two *different* numbers.
#
# <details><summary>Hint</summary>
#
# `after_marker` finds the line, and `numbers_in` finds the numbers. A `set` drops repetitions. What if the line is None?
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
print(checks_02.extract_number(extract_number))

# %% [markdown]
# [Worked solution](solutions/02_grading.ipynb).

# %% [markdown]
# ## 4 Truncated completions
#
# A completion that hits the token limit (`max_new_tokens`) is cut off at an arbitrary point.
#
# **Predict**: we remove the last 4, 3, 2, 1 or 0 characters of a text. Which answer does the grader read each time?

# %%
whole, word_problems = "57*2=114\n114-2=112\nFinal answer: 112", tasks.get("word_problems")
for length in range(len(whole) - 4, len(whole) + 1):
    print(repr(whole[:length][-16:]), "->", word_problems.extract(whole[:length]))

# %% [markdown]
# <details><summary>Answer</summary>
#
# It reads none twice, then 1, 11 and 112.
#
# </details>
#
# If the gold answer were 11, one of the cuts would be a false positive. So the package never rewards a
# [truncated](../docs/glossary.md#truncated-completion) completion. `finished` is True if the model itself ended the text.

# %%
cases = [(whole, True), (whole, False),
         ("57*2=114\nFinal answer: 114", True), ("57*2=114\n114-2=112", True)]
for completion, finished in cases:
    row = {"completion": completion, "answer": "112", "finished": finished}
    print(grading.grade_one(row, word_problems))

# %% [markdown]
# How often does each reason occur for $M_0$ (none of its completions is truncated)?

# %% tags=["nbval-ignore-output"]
graded = helpers_02.graded_completions(PROFILE, profile)
helpers_02.reasons(grading.count_reasons(graded))

# %% tags=["nbval-ignore-output"]
count, endings = grading.unread(graded)
print(f"{count} without a readable answer; their most frequent last lines (# is a number):")
print(endings)

# %% [markdown]
# Read such endings before you train: frequent ones show problems with the format. Here less than 1 % are unreadable, and half
# of those repeat "answer:".

# %% [markdown]
# ## 5 Grade the grader
#
# When does a grader err? For four tasks we wrote completions in many forms and labelled them
# ([file](data/graded_forms.jsonl)): would a teacher accept the answer?

# %%
forms = helpers_02.labelled_forms()
for row in forms[forms.id.isin(["buns-09", "buns-20", "film-04"])].itertuples():
    print(f"{row.verdict}, because: {row.reason}\n    {row.question}")
    print(f"    {row.completion.splitlines()[-1]}\n")

# %% [markdown]
# We test three graders. `exact` accepts only the gold answer after the marker. `contains` accepts it anywhere in the
# last line. The third is the grader of the package.
#
# **Predict**: which of the three has the most false positives, and which the most false negatives?

# %%
rows = helpers_02.records(forms)
correct = forms.verdict == "correct"
graders = {
    "exact": lambda row: after_marker(row["completion"]) == row["answer"],
    "contains": lambda row: row["answer"] in helpers_02.last_line(row["completion"]),
    "package": lambda row: grading.grade_one(row, tasks.get(row["task"]))["correct"]}
for name, grader in graders.items():
    forms[name] = [grader(row) for row in rows]
errors = pd.DataFrame({name: {"false positives": (forms[name] & ~correct).sum(),
                              "false negatives": (~forms[name] & correct).sum()}
                       for name in graders}).T
helpers_02.grader_errors(errors, correct)

# %% [markdown]
# <details><summary>Answer</summary>
#
# `contains` has the most false positives, and `exact` the most false negatives.
#
# </details>
#
# These are not error *rates*: we chose the forms ourselves. Which false positives does the package have?

# %%
for row in forms[forms.package & ~correct].itertuples():
    print(f"{row.task}, gold answer {row.answer}: {row.completion.splitlines()[-1]}")
    print("   ", row.reason)

# %% [markdown]
# Which kind of error does more harm in training?
#
# - A *false negative* rejects a correct completion. The model learns to avoid an unusual form.
# - A *false positive* chooses an incorrect completion. The next model may write more of this kind, which is rewarded again.
#
# We expect false positives to do more harm, so the package tolerates many false negatives. Section 8 measures false positives
# only.
#
# The next table counts errors of the package on a second collection, from public bug reports. The task `jsonl` is for your
# own questions. *Debatable* means that readers may disagree about the label. This collection improved the graders, so expect
# more errors on new completions.

# %%
helpers_02.grading_cases()

# %% [markdown]
# ### Exercise 2.2: fool a grader
#
# **Goal**: find a false positive. **Difficulty**: 1 of 3. **Time**: 5 minutes.
#
# The function below reads the first whole number after "answer". The gold answer is 42. Write a completion that it rewards
# although the final answer is *not* 42.
#
# <details><summary>Hint</summary>
#
# `\d+` stops at the first character that is not a digit. What could follow?
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
# [Worked solution](solutions/02_grading.ipynb).

# %% [markdown]
# ## 6 Correct answer, incorrect working
#
# The reward sees only the final answer. Which working does it reward? `equations` finds every equation in a completion,
# and `is_true` checks it.

# %%
for equation in equations("57*2=104\n104 - 2 = $102\nFinal answer: 102"):
    left, operator, right, result = equation
    print(left, operator, right, "=", result, is_true(equation))

# %% [markdown]
# $M_0$ has three behaviours:
#
# - **no working**: it answers at once;
# - **partial working**: it shows fewer equations than the [gold solution](../docs/glossary.md#gold-solution);
# - **full working**: it shows at least as many equations as the gold solution.
#
# **Predict**: which behaviour is most frequent, and which one gets most of the rewards?

# %% tags=["nbval-ignore-output"]
def behaviour(row):
    shown = len(equations(row.completion))
    if shown == 0:
        return "no working"
    # gold_steps: equations of the gold solution
    return "partial working" if shown < row.gold_steps else "full working"

samples = helpers_02.with_questions(graded)
samples["behaviour"] = [behaviour(row) for row in samples.itertuples()]
helpers_02.behaviours(samples)

# %% [markdown]
# <details><summary>Answer</summary>
#
# No working is most frequent, and full working gets most of the rewards.
#
# </details>
#
# Answers without working are almost never correct, because there are many numbers to guess from. What goes wrong in
# incorrect completions *with* equations?

# %% tags=["nbval-ignore-output"]
incorrect = samples[~samples.correct & (samples.behaviour != "no working")]
partial = incorrect[incorrect.behaviour == "partial working"]
print(len(partial), "of", len(incorrect), "incorrect completions with equations have too few equations;")
all_true = incorrect.completion.map(lambda text: all(map(is_true, equations(text))))
print((~all_true).sum(), "have a false equation. One with true equations:\n")
example = incorrect[all_true & (incorrect.behaviour == "partial working")].iloc[0]
print(example.question, "\n" + example.completion, f"\n(the gold answer is {example.answer})")

# %% [markdown]
# Most rewarded completions have full working. Some have none, or a false equation:

# %% tags=["nbval-ignore-output"]
samples["false"] = [not all(map(is_true, equations(text))) for text in samples.completion]
odd = samples[samples.correct & (samples.false | (samples.behaviour == "no working"))]
print(len(odd), "of", samples.correct.sum(), "rewarded completions have no working or a false equation:")
examples = odd.sort_values(["false", "gold_steps"]).iloc[[0, -1]]      # one of each kind
for row in examples.itertuples():
    print(f"\n{row.question} (gold answer {row.answer})")
    print("  ->", " ; ".join(row.completion.splitlines()))

# %% [markdown]
# ### Exercise 2.3: a stricter reward
#
# **Goal**: a reward for correct answers with sound working. **Difficulty**: 3 of 3. **Time**: 15 minutes.
#
# Write `sound(completion, extracted)`. The extracted answer is a text such as `"112"`, or None. Return True if there is at
# least one equation, all equations are true, and the *last* one results in the extracted answer. Otherwise return False.
#
# <details><summary>Hint</summary>
#
# `all([])` is True in Python. The result of the last equation is `equations(completion)[-1][3]`, a `Fraction`.
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
# [Worked solution](solutions/02_grading.ipynb). The next cell applies your solution.

# %% tags=["nbval-ignore-output"]
rewarded = samples[samples.correct]
passed = [sound(row.completion, row.extracted) for row in rewarded.itertuples()]
if passed[:1] == [...]:
    print("Solve exercise 2.3 first.")
else:
    print(f"{passed.count(True)} of {len(rewarded)} rewarded completions pass your reward")

# %% [markdown]
# ## 7 Luck on multiple choice
#
# With four options a guess is often correct. The paper notes this for the multiple-choice task ARC ([section
# 3.2](https://arxiv.org/html/2404.19733v3#S3.SS2)). The task [`word_choices`](../scripts/studies/word_choices.py) gives each
# question four equally spaced options with letters, hidden from the model. The model still writes a number, and the grader
# picks the nearest option. So we can grade the *same* completions again. A completion is **lucky** if its letter is correct
# and its number is not.
#
# **Predict**: is the lucky share of the rewarded completions below 25 %, about 25 %, or above?

# %% tags=["nbval-ignore-output"]
choices = word_choices.TASK
by_letter = grading.grade(graded.map(word_choices.options), choices)
letters = by_letter.to_pandas()
letters["lucky"] = [row["correct"] and not choices.solved(row["completion"], row)
                    for row in by_letter]
chosen_of = pairs.build_pairs(by_letter, profile.k_pairs)[0].to_pandas()[["id", "chosen_sample"]]
in_pairs = chosen_of.merge(letters, left_on=["id", "chosen_sample"], right_on=["id", "sample"])
helpers_02.luck({"rewarded": letters[letters.correct], "chosen, in pairs": in_pairs})

# %% [markdown]
# <details><summary>Answer</summary>
#
# It is above 50 %: most numbers of $M_0$ are incorrect, and many of those are nearest to the correct option.
#
# </details>
#
# [Schumann and Riezler 2025](https://arxiv.org/abs/2509.25941) find correct answers with incorrect reasoning in real models.

# %% [markdown]
# ### Exercise 2.4: the share of lucky pairs
#
# **Goal**: compute a share like the lower bar above. **Difficulty**: 2 of 3. **Time**: 10 minutes.
#
# Write `lucky_pairs(questions)`. Each question is a list of labels: `"solved"`, `"lucky"` (both are rewarded) or
# `"incorrect"`. A question with a rewarded and an incorrect completion gives one pair. Its chosen completion is drawn at
# random from the rewarded ones. Return the expected share of pairs whose chosen completion is lucky.
#
# <details><summary>Hint</summary>
#
# Skip the questions that give no pair. For each other question compute the lucky share of the rewarded completions.
#
# </details>

# %%
def lucky_pairs(questions):
    # SOLUTION
    shares = []
    for labels in questions:
        lucky, solved = labels.count("lucky"), labels.count("solved")
        if 0 < lucky + solved < len(labels):
            shares.append(lucky / (lucky + solved))
    return sum(shares) / len(shares)
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_02.lucky_pairs(lucky_pairs))

# %% [markdown]
# [Worked solution](solutions/02_grading.ipynb).

# %% [markdown]
# ## 8 What does a lenient grader teach?
#
# The study [`lenient_grader.py`](../scripts/studies/lenient_grader.py) grades the *same* completions of $M_0$ with three
# graders. With each grader it then trains $M_1$ and $M_2$ (300 questions, at most 500 pairs per iteration, learning rate
# 1e-4).
#
# - **strict**: the grader of the package;
# - **within 20 %**: also accepts a number that is at most 20 % off;
# - **partial credit**: also accepts an incorrect answer after true equations.
#
# Which completions above does each grader reward?

# %% tags=["nbval-ignore-output"]
def within(row):
    if row.extracted is None:
        return False
    return abs(Fraction(row.extracted) / Fraction(row.answer) - 1) <= Fraction(1, 5)

rewards = {"strict": samples.correct,
           "within 20 %": pd.Series([within(row) for row in samples.itertuples()]),
           "partial credit": samples.correct
                             | ((samples.behaviour != "no working") & ~samples.false)}
pd.DataFrame({name: samples[reward].behaviour.value_counts() for name, reward in rewards.items()}).T

# %% [markdown]
# Accuracy is *sampled* at $T = 1$, not greedy as in notebook 00. Bands and intervals (95 %) are over three seeds and 200
# validation questions. The table gives the points of each lenient $M_2$ above the strict one.
#
# **Predict**: does a lenient grader cost accuracy? Which behaviour stays frequent with each grader?

# %%
study = helpers_02.grader_study()
helpers_02.what_graders_teach(study)

# %%
helpers_02.differences(iteration=2)

# %% [markdown]
# <details><summary>Answer</summary>
#
# Yes, both $M_2$ are over 20 points below *strict*. Under *within 20 %* many
# completions still have no working. Under *partial credit* partial working grows.
#
# </details>
#
# *Within 20 %* is worse even by its own measure: under *strict* more completions are at most 20 % off.

# %% [markdown]
# ## What you have learnt
#
# - A grader extracts and compares. Both steps cause false positives and false negatives. Count them on labelled completions.
# - On our open questions correct answers mostly come with full working. On multiple choice many are luck.
# - With a lenient grader the shortcuts that it rewards stay more frequent, and the model gains less accuracy.
#
# **Try**: add ten completions of your model to the labelled forms, and run section 5 again. Add a grader to
# [`lenient_grader.py`](../scripts/studies/lenient_grader.py) and to `helpers_02.GRADERS`, and run the script (`--seeds 3`, as
# for the others).
#
# <details><summary>Typical misunderstandings</summary>
#
# - *A good grader has few errors.* The kind of error matters, because the next model learns from it.
# - *A lenient grader only adds noise.* It rewards a shortcut, and the trained model shows it more often than under a strict
#   grader.
#
# </details>
#
# **Recall** without scrolling up, then open the answers.
#
# 1. Why does the *last* "Final answer:" count?
# 2. A completion ends in "Final answer: 36" and was cut off at the token limit. What is its reward, and why?
# 3. Why is a correct guess rare on open questions and frequent on multiple choice?
# 4. What does a model learn from partial credit?
#
# <details><summary>Answers</summary>
#
# 1. A model may correct itself.
# 2. 0. The text may be the beginning of 360.
# 3. A guess is rarely correct among hundreds of numbers, and one time in four among four letters.
# 4. It learns to leave out steps more often than under a strict grader.
#
# </details>
#
# **Next**: [03 · Pairs](03_pairs.ipynb): which chosen completion is paired with which rejected one?
