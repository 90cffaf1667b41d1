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
# # 00 · Start here
#
# **What you will be able to do**
#
# - say in six steps what Iterative Reasoning Preference Optimization (Iterative RPO) does, and which model plays which part in each step;
# - carry one question through a whole iteration by hand, from the prompt to the loss;
# - say what your machine can run, how long it takes and what it costs;
# - read the plot that this course ends with.
#
# | | `smoke` | `cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook, on one core | 10 seconds | 10 seconds | not measured here |
#
# **Needs**: the packages of this repository, nothing else. The small model and its questions ship with it.
#
# **Before this**: you should know what a softmax and a gradient are. Nothing about reinforcement learning is needed.
# Words that link to the [glossary](../docs/glossary.md) are explained there.

# %% [markdown]
# The first code cell holds the one setting of the notebook. Leave it, or name another profile, and run all cells again.

# %%
import os, sys
sys.path[:0] = [".", ".."]                     # checks_00.py lies beside the notebooks; ".." serves the solutions
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
# ## 1 The algorithm on one page
#
# A language model can often solve a problem that it usually gets wrong. Ask it thirty times and some of the answers are
# right. Iterative RPO ([Pang et al. 2024](https://arxiv.org/abs/2404.19733)) lets the model learn from those: its own
# right answers are the good examples, its own wrong answers the bad ones. Nobody ranks anything, and nobody has to write a solution:
# all it takes is questions whose final answer is known. (Where worked solutions exist, as in GSM8K, the paper puts them among the
# good examples, too; see notebook 03.)

# %% [markdown]
# ```
#               ┌───────────────────────── M_t ◀──────────── the new model becomes the next M_t ──────────┐
#               ▼                                                                                         │
#  questions ─▶ 1 SAMPLE ──▶ 2 GRADE ──▶ 3 PAIR ──▶ 4 TRAIN ──▶ M_{t+1} ──▶ 5 EVALUATE ──▶ 6 REPEAT ──────┘
#               N answers    right or    a right    the right
#               a question   wrong       one with   one up, the
#                                        a wrong    wrong one
#                                        one, K     down, from
#                                        times      M_t
# ```
#
# 1. **Sample.** The model M_t writes N answers to every training question, each a
#    [chain of thought](../docs/glossary.md#chain-of-thought) and a final answer.
# 2. **Grade.** An answer gets [reward](../docs/glossary.md#reward) 1 if its final answer equals the known one, else 0.
#    The reasoning itself is not judged.
# 3. **Pair.** Right answers (winners) and wrong ones (losers) of the same question are put together into K
#    [preference pairs](../docs/glossary.md#preference-pair). A question with only winners or only losers is left out.
# 4. **Train.** A copy of M_t is trained until winners are more probable than losers *compared with M_t*
#    ([DPO](../docs/glossary.md#dpo)), and winners are probable at all ([NLL](../docs/glossary.md#nll-term)).
# 5. **Evaluate.** The trained model M_{t+1} answers questions that training never sees.
# 6. **Repeat** with M_{t+1} in the place of M_t. The paper does so three or four times
#    ([section 3](https://arxiv.org/html/2404.19733v3#S3)).

# %% [markdown]
# One model plays three parts, and mixing them up is the commonest mistake. In iteration $t$
#
# | part | which model | changes in training? |
# |---|---|---|
# | writes the answers | $M_t$ | no |
# | is the [reference](../docs/glossary.md#reference-model) of DPO | $M_t$, **not** $M_0$ | no |
# | is trained | starts as a copy of $M_t$, ends as $M_{t+1}$ | yes |
#
# And the pairs come from $M_t$ alone. Pairs of earlier iterations are thrown away, which the authors call a limitation
# of the method ([appendix A](https://arxiv.org/html/2404.19733v3#A1)).

# %% [markdown]
# The loss of one pair with winner $w$ and loser $l$ for a question $x$ (equation 1 of the paper, version 3):
#
# $$L = \underbrace{-\log\sigma\Big(\beta\log\frac{M_\theta(w|x)}{M_t(w|x)} - \beta\log\frac{M_\theta(l|x)}{M_t(l|x)}\Big)}_{\text{DPO}}
# \;\underbrace{-\;\alpha\,\frac{\log M_\theta(w|x)}{|w|}}_{\text{NLL}}$$
#
# $M_\theta(w|x)$ is the probability that the model being trained gives to the whole answer $w$: a product over its tokens,
# so its logarithm is a sum. Only the second part is divided by the length $|w|$. Notebook
# [04](04_dpo_nll_training.ipynb) derives both parts.

# %% [markdown]
# ### Does the NLL part matter?
#
# In the paper it does: on GSM8K one iteration reaches 73.1 % with it and 61.8 % without
# ([Table 1](https://arxiv.org/html/2404.19733v3#S3.T1)). It is not a law. Later work by some of the same authors found
# [no benefit](https://arxiv.org/abs/2506.21495) with another model and fresher samples. One question that you can
# answer for yourself at the end of this course is when it helps.

# %% [markdown]
# ## 2 Why should this raise accuracy at all?
#
# A toy model first. It knows two ways to answer. **Careful**: it writes the working down, and is right 19 times of 20.
# **Hasty**: it blurts out a number, and is right 3 times of 20. At first it is careful in 3 answers of 10.
#
# **Predict**: of the answers that turn out *right*, how many are careful ones? More than half?

# %%
careful = 0.30                      # share of careful answers
right_if = {"careful": 0.95, "hasty": 0.15}

right_and_careful = careful * right_if["careful"]
right_and_hasty = (1 - careful) * right_if["hasty"]
print(f"right answers: {right_and_careful + right_and_hasty:.2f} of all")
print(f"careful among the right ones: {right_and_careful / (right_and_careful + right_and_hasty):.2f}")

# %% [markdown]
# Nearly three quarters. The reward looks at the final answer alone, and yet it selects the *way* of answering, because
# that way leads to right answers more often. If a model learns to answer as its right answers do, careful working
# spreads. Let the toy model do just that, several times.

# %%
for t in range(4):
    accuracy = careful * right_if["careful"] + (1 - careful) * right_if["hasty"]
    print(f"M_{t}: careful {careful:.2f}, right {accuracy:.2f}")
    careful = careful * right_if["careful"] / accuracy          # M_{t+1} answers as the winners of M_t did

# %% [markdown]
# Two things to keep. The gains shrink from iteration to iteration. And the ceiling is `right_if["careful"]`: the toy
# model never gets better *at* careful working, it only does it more often. This is called
# [elicitation](../docs/glossary.md#elicitation). Whether real models trained on such rewards gain more than that is
# disputed: [Yue et al. 2025](https://arxiv.org/abs/2504.13837) argue that reinforcement learning mostly makes likely what the
# base model could do already. Notebook [01](01_sampling.ipynb) shows their measure, pass@k.

# %% [markdown]
# ## 3 What your machine can run
#
# A *profile* is a set of settings for one kind of machine: the model, the task, N, K and all the rest. First, what is here?

# %%
# NBVAL_IGNORE_OUTPUT
import torch
from irpo_utils.ops.environment import environment

device, gpu_gib = models.default_device(), 0.0
if device == "cuda":
    gpu_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    print(f"GPU: {torch.cuda.get_device_name(0)}, {gpu_gib:.0f} GiB")
print(f"CPU: {environment()['processor']}, {os.cpu_count()} cores, threads in use: {torch.get_num_threads()}")
assert os.cpu_count() >= 1 and gpu_gib >= 0

# %% [markdown]
# Which profile follows? Without a GPU it is `cpu`. With one, memory decides. The rule below is a cautious rule of thumb and
# no measurement: 8 GiB for what every run needs, and 5 GiB for each billion parameters, for the
# [4-bit weights](../docs/glossary.md#nf4), the [cache](../docs/glossary.md#kv-cache) while sampling, and training. If memory runs out all the same,
# halve `sampling_batch_size` or `micro_batch_size`; the results stay the same in kind.

# %%
import re

def billions(name):
    """Parameters of the model behind a profile, from the end of its name: "0.5b" or "135m"."""
    found = re.search(r"([\d.]+)([mb])$", name)
    return float(found[1]) / (1000 if found[2] == "m" else 1) if found else None

gib_needed = {name: 8 + 5 * billions(name) for name in profiles.names() if billions(name)}
print(*(f"{name:14} {need:5.1f} GiB" for name, need in sorted(gib_needed.items(), key=lambda pair: pair[1])), sep="\n")

# %%
# NBVAL_IGNORE_OUTPUT
fitting = [name for name, need in gib_needed.items() if need <= gpu_gib]
suggested = max(fitting, key=gib_needed.get) if fitting else "cpu"
print(f"largest profile for this machine: {suggested}; this notebook runs with: {PROFILE}")
assert suggested in profiles.names()

# %% [markdown]
# The largest is not the best one to begin with. A small model makes its mistakes in minutes. Go through the
# course with `cpu` once, also on a GPU machine; then set `PROFILE` to a real model and run the same cells again.

# %% [markdown]
# ## 4 One question through one iteration
#
# Now the six steps for a single question, with the real model M_0 of your profile. In the `cpu` profile M_0 is a
# [seed model](../docs/glossary.md#seed-model) of about a million parameters. It was
# [made](../docs/model_card_seed.md) to resemble the toy model above: it can show its working, but mostly does not.

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils import sampling, tasks
from irpo_utils.ops import export, run as runs

task = tasks.get(profile.task)
questions = task.load("validation", profile.data).select(range(16))
model, tokenizer = runs.load_model(profile)
facts = export.describe(model)
print(f"{profile.model}: {facts['parameters']:,} frozen parameters, {facts['adapter_parameters']:,} that training may change")
assert 0 < facts["adapter_parameters"] < facts["parameters"]

# %% [markdown]
# **Step 1, sample.** Every question is answered N times. Below, N completions for each of sixteen questions; then we
# keep one question for which some are right and some are wrong.

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils import grading

samples = sampling.sample(model, tokenizer, questions, task, n=profile.n_samples, temperature=profile.temperature_of(0),
                          max_new_tokens=profile.max_new_tokens, seed=profile.seed, progress=False)
graded = grading.grade(samples, task)
verdicts = {row["id"]: set() for row in questions}
for row in graded:
    verdicts[row["id"]].add(row["correct"])
chosen = next((row for row in questions if len(verdicts[row["id"]]) == 2), None)
assert chosen, "No question has both right and wrong answers: the model is too weak or too strong for these, take more."
print(chosen["question"], "\n\nknown answer:", chosen["answer"])
assert len(samples) == len(questions) * profile.n_samples

# %% [markdown]
# **Predict**: you let M_0 take the most probable token each time ([greedy decoding](../docs/glossary.md#greedy-decoding)). Does it write its working first?

# %%
# NBVAL_IGNORE_OUTPUT
from datasets import Dataset

greedy = sampling.sample(model, tokenizer, Dataset.from_list([chosen]), task, n=1, temperature=0.0,
                         max_new_tokens=profile.max_new_tokens, progress=False)
print(greedy[0]["completion"])
assert greedy[0]["id"] == chosen["id"]

# %% [markdown]
# One look at one answer says nothing about a model, so do not trust it, whatever it showed. This course measures on hundreds of
# questions and gives intervals. Here are the N sampled answers to the same question.

# %%
# NBVAL_IGNORE_OUTPUT
one = [row for row in graded if row["id"] == chosen["id"]]
for row in one:
    print(f"{row['sample']:2}  {'RIGHT' if row['correct'] else 'wrong'}  {row['completion'][-300:]!r}")
assert 0 < sum(row["correct"] for row in one) < profile.n_samples

# %% [markdown]
# Right ones and wrong ones from one model and one question: that is all the material the method has. With the seed
# model you may see that the right ones tend to be the longer ones, with equations before the final answer.

# %% [markdown]
# **Step 2, grade.** By hand on three fixed strings: read what stands after "Final answer:" and compare.
#
# **Predict**: the third completion has the right number in its working. Does it get the reward?

# %%
completions = ["57*2=114\n114-2=112\nFinal answer: 112", "Final answer: 134", "57*2=114\n114-2=112\nFinal answer: 11"]
by_hand = [text.split("Final answer:")[-1].strip() == "112" for text in completions]

word_problems = tasks.get("word_problems")
by_module = [word_problems.is_correct(word_problems.extract(text), "112") for text in completions]
print(by_hand)
assert by_hand == by_module

# %% [markdown]
# It does not. Only the final answer counts, so good working with a slip at the end is a loser and a lucky guess is a
# winner. Notebook [02](02_grading.ipynb) measures how often that happens.

# %% [markdown]
# **Step 3, pair.** Walk through winners and losers side by side; at the end of the shorter list begin it again; stop
# after K pairs. It is a zip with wrap-around, not a random draw
# ([section 2](https://arxiv.org/html/2404.19733v3#S2), footnote 2).

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils import pairs

winners = [row["sample"] for row in one if row["correct"]]
losers = [row["sample"] for row in one if not row["correct"]]
by_hand = [(winners[i % len(winners)], losers[i % len(losers)]) for i in range(profile.k_pairs)]

preferences, counts = pairs.build_pairs(one, k=profile.k_pairs, deduplicate=False)
print("winners", winners, "losers", losers, "pairs", by_hand)
assert by_hand == list(zip(preferences["chosen_sample"], preferences["rejected_sample"]))

# %% [markdown]
# **Step 4, train.** The loss wants the log-probability of the winner and of the loser, under the model being trained and
# under the reference. Training has not begun, so both are M_0.
#
# **Predict**: both ratios in the DPO part are 1. What is $-\log\sigma(0)$?

# %%
# NBVAL_IGNORE_OUTPUT
import math
from irpo_utils import logprobs

pair = preferences[0]
logp_w, logp_l = logprobs.score(model, tokenizer, [pair["prompt_ids"]] * 2, [pair["chosen_ids"], pair["rejected_ids"]])
margin = profile.beta * (logp_w - logp_w) - profile.beta * (logp_l - logp_l)
loss_dpo = -math.log(1 / (1 + math.exp(-margin)))
loss_nll = -logp_w / len(pair["chosen_ids"])
print(f"log-probability of the winner {logp_w:.2f}, of the loser {logp_l:.2f} nats")
print(f"DPO part {loss_dpo:.4f}, NLL part {loss_nll:.4f}")
assert abs(loss_dpo - math.log(2)) < 1e-12

# %% [markdown]
# It is $\ln 2 \approx 0.6931$, whatever the model and the pair. This is a free test: a training run whose first loss is
# another number has the wrong reference, and one that *stays* at 0.6931 is training nothing. The module agrees:

# %%
from irpo_utils import training

w, l, n_tokens = torch.tensor([-12.0]), torch.tensor([-9.0]), torch.tensor([24])
dpo, nll = training.dpo_nll_loss(w, l, w, l, n_tokens, alpha=1.0, beta=0.1)
print(f"before training: DPO {dpo.item():.4f}, NLL {nll.item():.4f}")
assert abs(dpo.item() - math.log(2)) < 1e-6 and nll.item() == 12 / 24

dpo, nll = training.dpo_nll_loss(w + 2, l - 3, w, l, n_tokens, alpha=1.0, beta=0.1)     # winner up 2 nats, loser down 3
print(f"after some steps: DPO {dpo.item():.4f}, NLL {nll.item():.4f}")
assert abs(dpo.item() + math.log(1 / (1 + math.exp(-0.1 * (2 + 3))))) < 1e-6

# %% [markdown]
# Steps 5 and 6 are to measure the new model on other questions and to begin again with it. You have now done by hand
# what the package does for all training questions at once.

# %% [markdown]
# ## 5 Time and cost
#
# Every run writes down how long each stage took. The next cell takes your own finished run of this profile; if there is none, the
# run that ships with the repository; and if that is missing, too, it makes a small one now.

# %%
# NBVAL_IGNORE_OUTPUT
import tempfile
from pathlib import Path

def is_finished(run):
    return (run / "profile.json").exists() and (run / f"iteration_{runs.read_profile(run).iterations}/metrics.json").exists()

root = Path(models.__file__).parents[1]                 # the repository
run = next((place for place in (root / "runs" / PROFILE, root / "notebooks" / "shipped_run") if is_finished(place)), None)
if run is None:
    run = Path(tempfile.mkdtemp(), "smoke")
    runs.run(profiles.get("smoke"), run, progress=False)
last = runs.read_profile(run).iterations
print(f"numbers below come from: {run.name}, {last} iterations")
assert is_finished(run)

# %% [markdown]
# **Predict**: which stage takes longest: sampling, grading, pairing, training (`adapter`), or evaluation?

# %%
# NBVAL_IGNORE_OUTPUT
import json
import pandas as pd

timing = pd.read_csv(run / "timing.csv")
table = timing.groupby("stage")[["seconds", "tokens"]].sum().sort_values("seconds", ascending=False)
table["tokens per second"] = (table.tokens / table.seconds).where(table.tokens > 0).round(0)
machine = json.loads((run / "environment.json").read_text())
print(f"{machine['processor']}, threads: {machine['threads']}, GPUs: {machine['gpus'] or 'none'}")
print(f"{timing.seconds.sum() / 60:.1f} minutes for {last} iterations")
assert (table.seconds >= 0).all() and timing.seconds.sum() > 0
table.round(1)

# %% [markdown]
# Grading and pairing cost next to nothing. Sampling, training and evaluation share the time. Evaluation is dear because
# many samples of every test question are drawn, for tight intervals; whoever is in a hurry draws fewer.

# %% [markdown]
# The cost follows. Put in the price of your machine per hour; on a laptop it is the electricity.

# %%
# NBVAL_IGNORE_OUTPUT
PRICE_PER_HOUR = 2.00           # of your machine, in your currency; an example, not an offer
hours = timing.seconds.sum() / 3600
print(f"{hours:.2f} hours x {PRICE_PER_HOUR:.2f} = {hours * PRICE_PER_HOUR:.2f}")
assert hours > 0

# %% [markdown]
# ### Exercise 0.1: where does the time go?
#
# **Goal**: the share of the whole time that each stage takes. **Difficulty**: 1 of 3. **Time**: 5 minutes.
#
# Write `shares(timing)`. It takes a table with the columns `iteration`, `stage`, `seconds`, `tokens` and returns, for each stage, its
# share of all seconds: a number between 0 and 1. A pandas Series or a dict will do.
#
# <details><summary>Hint</summary>
#
# `timing.groupby("stage").seconds.sum()` gives seconds by stage. What do these have to be divided by so that all shares
# add up to 1?
#
# </details>

# %%
def shares(timing):
    # SOLUTION
    return timing.groupby("stage").seconds.sum() / timing.seconds.sum()
    # STUB
    # return None      # your turn: one number for each stage
    # END

# %%
import checks_00
print(checks_00.shares(shares))

# %% [markdown]
# The worked solution is in [solutions/00_start_here.ipynb](solutions/00_start_here.ipynb).

# %% [markdown]
# ### Exercise 0.2: how long would the paper's sampling take?
#
# **Goal**: estimate a stage before you pay for it. **Difficulty**: 2 of 3. **Time**: 10 minutes.
#
# Write `sampling_hours`. The arguments: how many questions, how many samples for each, the mean length of a sample in tokens,
# how many iterations, and the tokens per second that your machine draws. It returns hours for all iterations
# together.
#
# <details><summary>Hint</summary>
#
# First count tokens: every question is answered `samples` times in every iteration. Then go from tokens to seconds, and
# from seconds to hours.
#
# </details>

# %%
def sampling_hours(questions, samples, tokens, iterations, tokens_per_second):
    # SOLUTION
    all_tokens = questions * samples * tokens * iterations
    return all_tokens / tokens_per_second / 3600
    # STUB
    # return None      # your turn
    # END

# %%
print(checks_00.sampling_hours(sampling_hours))

# %% [markdown]
# The worked solution is in [solutions/00_start_here.ipynb](solutions/00_start_here.ipynb). Try your function with the
# `tokens per second` of `samples` in the table above and with the paper's numbers: about 7,500 questions and N = 30
# ([section 3.1](https://arxiv.org/html/2404.19733v3#S3.SS1)). The paper sampled from a model of 70 billion parameters on eight GPUs.

# %% [markdown]
# ## 6 The whole loop
#
# You have seen one iteration of one question. The rest is a loop. Write it yourself: the exercise hands you the
# stages as functions, and the check watches which model you give to which stage.

# %% [markdown]
# ### Exercise 0.3: Iterative RPO in a few lines
#
# **Goal**: say with code which model samples, which is the reference, and which is trained. **Difficulty**: 3 of 3. **Time**: 15 minutes.
#
# `sample(model, questions)` returns samples, `grade(samples)` grades them, `pair(graded)` makes pairs, and
# `train(model, pairs, reference)` returns a new model that began as `model`. Return the list of all models, `M_0` first.
#
# <details><summary>Hint</summary>
#
# Keep a list `models = [model]`. In every iteration `models[-1]` is M_t. Look at the table in section 1: how many of the
# three parts does it play?
#
# </details>

# %%
def iterative_rpo(model, questions, iterations, sample, grade, pair, train):
    # SOLUTION
    models = [model]
    for t in range(iterations):
        current = models[-1]
        preferences = pair(grade(sample(current, questions)))
        models.append(train(current, preferences, reference=current))
    return models
    # STUB
    # models = [model]
    # # your turn: a loop over the iterations
    # return None
    # END

# %%
print(checks_00.iterative_rpo(iterative_rpo))

# %% [markdown]
# The worked solution is in [solutions/00_start_here.ipynb](solutions/00_start_here.ipynb). The real loop is
# [`irpo_utils/iteration.py`](../irpo_utils/iteration.py). It does the same, and besides writes every artefact to disk,
# so that a run that was stopped resumes where it was.

# %% [markdown]
# ## 7 Where the course ends
#
# **Predict**: the seed model begins low. Draw, in your mind, accuracy on test questions for M_0 to M_4. Where is the largest step?
# Does greedy decoding or sampling do better?

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils import plots

source = root / "figures" / "accuracy_per_iteration.csv"
source = source if source.exists() else run / "metrics.csv"
metrics, means = pd.read_csv(source), source.with_name("accuracy_per_iteration_mean.csv")
accuracy = metrics[metrics.metric == "greedy"].groupby("iteration").value.mean()
assert accuracy.iloc[-1] > accuracy.iloc[0]
plots.accuracy_per_iteration(metrics, pd.read_csv(means) if means.exists() else None)

# %% [markdown]
# How to read it. Each line is a mean over runs with different seeds, thin lines are single runs, and the
# band is a 95 % [interval](../docs/glossary.md#confidence-interval). Greedy lies above sampling: taking the
# most probable token each time beats drawing one. At M_0 a vote among samples beats both; later it lies between them. As in the toy
# model, each iteration makes the model write as its winners wrote. Here are the numbers of the greedy line, and how
# much each iteration added.

# %%
# NBVAL_IGNORE_OUTPUT
steps = pd.DataFrame({"greedy (%)": 100 * accuracy, "added": 100 * accuracy.diff()}).round(1)
assert len(steps) >= 2 and accuracy.between(0, 1).all()
steps

# %% [markdown]
# And the same in words: one test question that M_0 gets wrong and the last model gets right, with the greedy answer of
# every model between them.

# %%
# NBVAL_IGNORE_OUTPUT
from datasets import load_from_disk

settings = runs.read_profile(run)
asked = tasks.get(settings.task).load(settings.eval_split, settings.data)
answers = [load_from_disk(str(run / f"iteration_{t}/evaluation/greedy")) for t in range(last + 1)]
turned = [i for i in range(len(answers[0])) if not answers[0][i]["correct"] and answers[-1][i]["correct"]]
shown = turned[0] if turned else 0              # a very small run may have turned none
one_id = answers[0][shown]["id"]
print(next(row["question"] for row in asked if row["id"] == one_id), "\n")
for t, answer in enumerate(answers):
    row = answer[shown]
    print(f"M_{t} ({'right' if row['correct'] else 'wrong'}):", " ; ".join(row["completion"].splitlines()))
assert all(answer[shown]["id"] == one_id for answer in answers)

# %% [markdown]
# One question again, chosen because it makes the point. The figure is the evidence, this is the illustration.
# Notebook [05](05_iterations.ipynb) looks at all questions, also at those that went from right to wrong.

# %% [markdown]
# ## What you have learnt
#
# - An iteration samples from M_t, grades by the final answer, pairs winners with losers, and trains a copy of M_t against M_t.
# - The reward never looks at the reasoning, and yet selects the way of reasoning that leads to right answers.
# - Before the first step the DPO part is exactly $\ln 2$.
# - Sampling, training and evaluation take the time; grading and pairing are free.
#
# **What to try.** Change `right_if` in section 2: what if hasty answers were right as often as careful ones? Then: what
# if careful were *worse*? Run `make run` at the root of the repository, and come back: section 5 then shows your own run.
#
# **Recall, without looking up.**
#
# 1. Which model is the reference in iteration 3?
# 2. What happens to a question whose N samples are all right?
# 3. Your first DPO loss is 0.52. What is wrong?
# 4. Why is the ceiling of the toy model not 1?
#
# **Next**: [01 · Sampling](01_sampling.ipynb): how an answer is drawn, token by token, and why N of them cost less than you would think.
