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
# # 07b · What the data must be (optional)
#
# **What you will be able to do**
#
# - bring your own questions, in three splits that do not mix;
# - find test questions among training questions, word for word and in disguise;
# - test whether a model has seen a benchmark before, with a control that shows what the result means.
#
# | | `smoke` | `smollm2-135m-cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook | 20 seconds on one core | 3 minutes on one core | as on the CPU |
#
# **Needs**: the packages of this repository (in Colab: [`docs/colab.md`](../docs/colab.md)), and SmolLM2-135M-Instruct as in
# notebook 07. No other notebook needs this one.
#
# **Before this**: [07 · Real models on one GPU](07_real_models_on_one_gpu.ipynb).

# %% tags=["nbval-ignore-output"]
import os, random, re, sys, tempfile, textwrap
from pathlib import Path
import numpy as np
import pandas as pd
sys.path[:0] = [".", ".."]                     # checks_07.py and helpers_07.py are next to the notebooks
import checks_07, helpers_07
from irpo_utils import UserError, evaluation, logprobs, models, plots, profiles, tasks
from irpo_utils.ops import contamination, run as runs
from irpo_utils.ops.cli import quiet_libraries

quiet_libraries()
PROFILE = os.environ.get("IRPO_PROFILE", "smollm2-135m-cpu")     # the one setting; on a GPU such as "qwen2.5-0.5b"
profile = profiles.get("smollm2-135m-cpu" if PROFILE == "smoke" else PROFILE)
print("profile", PROFILE, "· device", models.default_device())

# %% [markdown]
# ## 1 Your own questions
#
# What does a run need? The options `--task jsonl --data FILE`, and a file with one JSON object per line, each with `question`
# and `answer`. A `solution` is optional: only gold solutions need it. Here are 64 word problems that were
# written for this course.

# %%
task = tasks.get("jsonl")
splits = {name: task.load(name, helpers_07.EASY_QUESTIONS) for name in ("train", "validation", "test")}
print({name: len(rows) for name, rows in splits.items()})
for name, text in splits["train"][4].items():
    print(f"{name}: {text}")

# %% [markdown]
# A hash of each question decides its split, so a question keeps its split when you add others. The run samples and
# trains on *train*. Use *validation* for choices, and *test* for one measurement at the end
# ([notebook 05](05_iterations.ipynb), section 8).

# %% [markdown]
# ## 2 Is a test question in the training file?
#
# [Contamination](../docs/glossary.md#contamination) lets accuracy partly measure memorisation. Before every run the
# package makes three checks, from strict to loose. Here are one training question and four test questions.

# %%
train = [{"id": "t", "question": "Ann picks 12 apples and 15 pears. She gives 5 of them to Ben. How much fruit has she now?"}]
test = [
    {"id": "spaced", "question": "Ann picks 12 apples and 15 pears.\n\nShe gives 5 of them to Ben.  How much fruit has she now?"},
    {"id": "shouted", "question": "ANN PICKS 12 APPLES AND 15 PEARS; SHE GIVES 5 OF THEM TO BEN. HOW MUCH FRUIT HAS SHE NOW"},
    {"id": "longer", "question": "Ann picks 12 apples and 15 pears. She gives 5 of them to Ben and 3 to Cleo. How much is left?"},
    {"id": "renumbered", "question": "Ann picks 31 apples and 24 pears. She gives 9 of them to Ben. How much fruit has she now?"}]

# %% [markdown]
# The first check compares texts without spaces. The second also ignores case and punctuation. The third looks for 13
# consecutive words in common ([Brown et al. 2020](https://arxiv.org/abs/2005.14165), appendix C). You write the third.

# %% [markdown]
# ### Exercise 7b.1: n words in a row
#
# **Goal**: write the check that GPT-3's authors used. **Difficulty**: 2 of 3. **Time**: 15 minutes.
#
# `shared_runs(train, test, n)` takes two lists of rows with `id` and `question`. It returns the ids of those *test* rows, in
# their order, that have n words in a row in common with one training question. Words are letters and digits; case and
# punctuation do not matter.
#
# <details><summary>Hint</summary>
#
# `re.findall(r"\w+", text.casefold())` gives the words. Make a set of tuples `words[i : i + n]`. How many such tuples does a
# question with `len(words)` words have?
#
# </details>

# %%
def shared_runs(train, test, n):
    # SOLUTION
    def runs_of(question):
        words = re.findall(r"\w+", question.casefold())
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    known = {run for row in train for run in runs_of(row["question"])}
    return [row["id"] for row in test if runs_of(row["question"]) & known]
    # STUB
    # return ...      # your turn: a list of ids
    # END

# %%
print(checks_07.shared_runs(shared_runs))

# %% [markdown]
# The worked solution is in [solutions/07b_what_the_data_must_be.ipynb](solutions/07b_what_the_data_must_be.ipynb).
#
# **Predict** for each of the three checks which of the four questions it finds. The package counts them:

# %%
for row in test:
    found = contamination.find(train, [row])
    print(f"{row['id']:11} same text {found.exact}, same words {found.normalised}, 13 words in a row {found.n_gram}")

# %% [markdown]
# The first two checks find *the same question*. The third is only a hint: questions from one template also share words, and
# it never finds a question of fewer than 13 words. No check finds `renumbered`. What does a run do with the result? Here is
# a folder whose test file begins with five training questions.

# %%
folder = helpers_07.leaky_folder(splits)
try:
    runs.run(profiles.get("smoke", task="jsonl", data=str(folder)), Path(tempfile.mkdtemp(), "run"), progress=False)
except UserError as error:
    print(textwrap.fill(str(error), 100))

# %% [markdown]
# The run refuses before a model is loaded. With `--allow-overlap true` it continues and records the counts in
# `contamination.json`.
#
# **The trap of MATH.** Some files called "MATH train" contain questions of the official *test* set: a [widely used
# split](https://github.com/openai/prm800k#math-splits) moved 4,500 of its 5,000 questions into training, and kept
# [500](https://huggingface.co/datasets/HuggingFaceH4/MATH-500) for testing. Train on such a file only if you evaluate on
# those 500.

# %% [markdown]
# ### Exercise 7b.2: twins with other numbers
#
# **Goal**: write the fourth check. **Difficulty**: 2 of 3. **Time**: 15 minutes.
#
# `renumbered_twins(train, test)` takes two lists of rows with `id` and `question`. It returns the ids of those *test* rows,
# in their order, that equal a training question once every number is replaced by the same mark. Numbers may contain a comma
# or a point (1,200 or 2.5). Case and spacing do not matter.
#
# <details><summary>Hint</summary>
#
# `re.sub(r"\d[\d,.]*", "#", text)` replaces each number by one mark, and with it a full stop or comma that follows.
# Does that matter? What happens to `12` and `5` if you replace digit by digit?
#
# </details>

# %%
def renumbered_twins(train, test):
    # SOLUTION
    def masked(question):
        return "".join(re.sub(r"\d+(?:[.,]\d+)*", "#", question).casefold().split())

    seen = {masked(row["question"]) for row in train}
    return [row["id"] for row in test if masked(row["question"]) in seen]
    # STUB
    # return ...      # your turn: a list of ids
    # END

# %%
print(checks_07.renumbered_twins(renumbered_twins))

# %% [markdown]
# The worked solution is in [solutions/07b_what_the_data_must_be.ipynb](solutions/07b_what_the_data_must_be.ipynb).

# %% [markdown]
# ## 3 What no check of files can find
#
# What did the model read *before* you got it? Instruction-tuned models have probably seen GSM8K. Indirect tests exist:
#
# - **Completion**: give the first half of a test question. Does the model write the second half word for word
#   ([Golchin and Surdeanu 2023](https://arxiv.org/abs/2308.08493))?
# - **Fresh twins**: does it fail on later sets of the same kind, such as [GSM1k](https://arxiv.org/abs/2405.00332) or
#   [GSM-Symbolic](https://arxiv.org/abs/2410.05229)?
# - **Canary**: can it write the random [canary string](../docs/glossary.md#canary-string) of a benchmark? GSM8K has none.
# - **Familiarity**: does it find the original text more probable than a changed one?
#
# Contamination probably distorts the gain from $M_0$ to $M_T$ less than the accuracy of $M_T$: both models have read the same
# texts.
#
# We run the last test. Replace every number by another number with as many digits, and compare the log-probabilities. The
# difference per digit is the [memory gap](../docs/glossary.md#memory-gap).

# %%
def renumber(text, rng):
    """Every number becomes another one with as many digits."""
    def other(match):
        low = 10 ** (len(match[0]) - 1)
        new = rng.randrange(low, 10 * low - 1)
        if new >= int(match[0]):                                    # never the old number
            new += 1
        return str(new)
    return re.sub(r"\d+", other, text)

print(renumber("Columbus sailed across the Atlantic in 1492.", random.Random(0)))

# %% tags=["nbval-ignore-output"]
MODEL = helpers_07.two_blocks(profile.model) if PROFILE == "smoke" else profile.model
model, tokenizer = models.load(MODEL, dtype=profile.dtype, pad_token=profile.pad_token)
start = tokenizer("Here is a text.\n", add_special_tokens=False).input_ids

def memory_gaps(texts, copies=2):
    """Nats per digit by which the model prefers each text to its renumbered copies."""
    rng = random.Random(0)
    versions = [renumber(text, rng) if i else text for text in texts for i in range(copies + 1)]
    ids = tokenizer(versions, add_special_tokens=False).input_ids
    logps = np.array(logprobs.score(model, tokenizer, [start] * len(ids), ids)).reshape(-1, copies + 1)
    digits = np.array([sum(map(str.isdigit, text)) for text in texts])
    return (logps[:, 0] - logps[:, 1:].mean(1)) / digits


# %% tags=["remove-cell"]
assert memory_gaps(helpers_07.FACTS[:2]).shape == (2,)

# %% [markdown]
# A test needs a positive and a negative control. Facts that every model has read many times show whether the test works at
# all. The questions of this course are new to the model: they were written later. GSM8K is the unknown. The cell leaves it out
# if its files are not available.
#
# **Predict** the order of the gaps. Which two rows would you compare to find out whether the model saw GSM8K's *test*
# questions?

# %% tags=["nbval-ignore-output"]
texts = helpers_07.probed_texts(splits["train"]["question"], n=4 if PROFILE == "smoke" else 60)
values = {name: memory_gaps(found) for name, found in texts.items()}
rows = [(name, *evaluation.bootstrap_mean(gap), len(gap)) for name, gap in values.items()]
table = pd.DataFrame(rows, columns=["texts", "nats per digit", "low", "high", "n"]).set_index("texts")
print(table.round(2))
figure = helpers_07.gaps(table, values)
figure

# %% tags=["remove-cell"]
assert "known facts" in plots.alt_text(figure)

# %% [markdown]
# Facts are far above the rest, so the test detects texts that a model read often. But our own questions are also above 0,
# although the model has not read them: sensible numbers are easier to guess than random ones. So a gap alone proves nothing.
#
# Comparing GSM8K's test questions with ours is also misleading: other authors use other numbers. The control must be of the
# same kind. For GSM8K's test questions, use its *training* questions: they have the same authors, and a model has more
# probably seen them.

# %% tags=["nbval-ignore-output"]
def unpaired_difference(a, b, draws=2000):
    """Mean of a minus mean of b, with a bootstrap interval: the texts are not the same."""
    rng = np.random.default_rng(0)
    means = [rng.choice(a, len(a)).mean() - rng.choice(b, len(b)).mean() for _ in range(draws)]
    return (a.mean() - b.mean(), *np.percentile(means, (2.5, 97.5)))

first, second = ("GSM8K train", "GSM8K test") if "GSM8K train" in values else tuple(values)[:2]
difference, low, high = unpaired_difference(values[first], values[second])
print(f"{first} minus {second}: {difference:+.2f} nats per digit ({low:+.2f} to {high:+.2f})")

# %% tags=["remove-cell"]
assert low <= high

# %% [markdown]
# If the interval includes 0, it is not resolved whether the training questions are more familiar. The model may have seen
# both sets, or neither, or too rarely to tell. A difference as large as the upper end is still possible. Without GSM8K the
# cell compares the two controls.

# %% [markdown]
# ## What you have learnt
#
# - Three checks compare two files. A fourth finds twins with other numbers. A run refuses equal questions.
# - Only indirect tests can show what a model has read before. Each needs a control of the same kind.
# - Trust a gain more than a level of accuracy.
#
# **Try**: your own questions (`--task jsonl --data FILE`). What do the four checks say?
#
# **Recall**
#
# 1. A test question with ten words is in the training file with one word changed. Which of the three checks finds it?
# 2. GSM8K's test questions have a much larger memory gap than yours. What have you shown?
#
# <details><summary>Answers</summary>
#
# 1. None: ten words are too few for the third check, and the first two need equal words. 2. That their numbers are easier
#    to guess, or that the model has seen them. Without a control of the same kind you cannot tell.
#
# </details>
#
# **Next**: [08 · Past one GPU](08_past_one_gpu.ipynb), optional.
