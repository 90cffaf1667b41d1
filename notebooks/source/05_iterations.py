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
# # 05 · Iterations
#
# **What you will be able to do**
#
# - write the whole loop in ten lines, kill a run in the middle and go on with it;
# - read a finished run: accuracy with intervals, majority vote, lengths, and what changed in the answers themselves;
# - compare two iterations on the same questions, and say whether a gain is more than luck;
# - watch the two numbers that announce a collapse, make one happen, and decide when to stop.
#
# | | `smoke` | `cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook | 50 seconds on one core | 1 minute 40 seconds on one core | not measured here |
#
# **Needs**: the packages of this repository. The finished run that is read here is your own (`make run`) if there is one,
# otherwise the one that ships with the notebooks.
#
# **Before this**: [04 · Training with DPO + NLL](04_dpo_nll_training.ipynb).

# %%
import os, sys
sys.path[:0] = [".", ".."]                     # checks_05.py lies beside the notebooks; ".." serves the solutions
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
# ## 1 The loop by hand
#
# You know all five stages. The loop is no more than calling them in turn, with M_t in three parts: it writes the answers, it is
# the reference, and it is where training starts ([section 2](https://arxiv.org/html/2404.19733v3#S2)). First, a size
# that ends in seconds: your profile with a few fields changed.

# %%
# NBVAL_IGNORE_OUTPUT
changes = dict(iterations=2, n_questions=24, n_samples=4, k_pairs=2, gold=False,
               learning_rate=10 * profile.learning_rate, eval_split="validation",
               n_eval_questions=16, eval_samples=2, eval_samples_ends=2)
small = profiles.get(PROFILE, **changes)
print(f"{small.n_questions} questions x {small.n_samples} samples, {small.iterations} iterations")
assert small.model == profile.model

# %%
from irpo_utils import grading, pairs, sampling, tasks, training
from irpo_utils.ops import run as runs

task = tasks.get(small.task)
questions = task.load("train", small.data).shuffle(seed=small.seed)
questions = questions.select(range(small.n_questions))
model, tokenizer = runs.load_model(small)                      # M_0
engine = runs.engine_of(small)                                 # how this profile samples and trains

def seed(t, purpose):
    """Other random numbers for each iteration and purpose, as the module has them."""
    return (small.seed * 1000 + t) * 10 + purpose

# %%
by_hand = {}
for t in range(small.iterations):
    by_hand[t] = sampling.sample(model, tokenizer, questions, task, n=small.n_samples,
                                 temperature=small.temperature_of(t), seed=seed(t, 1),
                                 max_new_tokens=small.max_new_tokens, engine=engine,
                                 batch_size=small.sampling_batch_size, progress=False)
    graded = grading.grade(by_hand[t], task)
    preferences, _ = pairs.build_pairs(graded, k=small.k_pairs, max_length=small.max_length)
    training.train(model, tokenizer, preferences, small.alpha, small.beta, small.learning_rate,
                   seed=seed(t + 1, 3), batch_size=small.batch_size, trainer=engine.trainer(model),
                   micro_batch_size=small.micro_batch_size, optim=small.optimizer,
                   gradient_checkpointing=small.gradient_checkpointing, disable_tqdm=True)

# %% [markdown]
# `train` changes the model in place, so after the loop `model` is M_2. Nothing else is needed: no reward model, no second
# copy of the weights, and no pairs of earlier iterations.

# %% [markdown]
# ## 2 A run that is killed
#
# A real run takes hours, and machines are taken away. `runs.run` does the same loop in a
# [run directory](../docs/glossary.md#run-directory): each result is written beside its place, gets a checksum, and is moved
# in whole. Let us start it as a process of its own, by the command line, and kill it without warning as soon as M_1 is there.

# %%
import subprocess, tempfile, time
from pathlib import Path
import irpo_utils

out = Path(tempfile.mkdtemp()) / "small_run"
command = [sys.executable, "-m", "irpo_utils", "run", "--profile", PROFILE, "--out", str(out), "--quiet"]
for name, value in changes.items():
    command += [f"--{name.replace('_', '-')}", str(value)]
package = str(Path(irpo_utils.__file__).resolve().parents[1])
process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": package},
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
while process.poll() is None and not (out / "iteration_1/adapter").exists():
    time.sleep(0.02)
process.kill()                                 # SIGKILL: the process cannot tidy up
print("killed, exit status", process.wait())

# %% [markdown]
# **Predict**: what lies in the directory now? And if the same command is given again, which stages are done a second time?

# %%
# NBVAL_IGNORE_OUTPUT
def stages(run):
    """Finished stages with the time at which they were finished."""
    files = sorted(run.glob("iteration_*/*/checksums.json"))
    return {str(file.parent.relative_to(run)): file.stat().st_mtime for file in files}

before = stages(out)
print(*before, sep="\n")
assert "iteration_1/adapter" in before and "iteration_2/adapter" not in before

# %%
# NBVAL_IGNORE_OUTPUT
rows = runs.run(small, out, progress=False)
after = stages(out)
print("kept:", *[name for name in after if after[name] == before.get(name)])
print("new: ", *[name for name in after if name not in before])
assert all(after[name] == before[name] for name in before) and "iteration_2/evaluation" in after

# %% [markdown]
# Nothing that was finished was done again. But is the result the same as without the kill? The run by hand was never
# interrupted, and it drew the same random numbers. So its samples in iteration 1, which M_1 wrote, must be the same.

# %%
# NBVAL_IGNORE_OUTPUT
from datasets import load_from_disk

resumed = load_from_disk(str(out / "iteration_1/samples"))["completion"][:]
same = sum(a == b for a, b in zip(by_hand[1]["completion"], resumed)) / len(resumed)
print(f"{same:.0%} of {len(resumed)} completions of M_1 are the same")
assert same == 1 if models.default_device() == "cpu" else same > 0.5

# %% [markdown]
# Now from by hand to finished: the module agrees with our loop. (On a GPU sums are added in changing order, so that
# a few completions may part.) And if the settings had changed in between?

# %%
from irpo_utils import UserError

try:
    runs.run(profiles.get(PROFILE, **{**changes, "k_pairs": 3}), out, progress=False)
except UserError as error:
    print(str(error).split(":", 1)[1].split(". Choose")[0])

# %% [markdown]
# It refuses, and names the field. Half a run with one setting and half with another is a result that nobody can explain.

# %% [markdown]
# ## 3 Read a finished run
#
# From here on a full run. `profile.json` has its settings, `environment.json` versions and machine, `metrics.csv` all numbers.

# %%
# NBVAL_IGNORE_OUTPUT
root = next(up for up in (Path("."), Path(".."), Path("../..")) if (up / "irpo_utils").is_dir())

def usable(run):
    """Finished, and made with the model and task of this profile."""
    if not (run / "profile.json").exists():
        return False
    p = runs.read_profile(run)
    finished = (run / f"iteration_{p.iterations}/metrics.json").exists()
    return finished and (p.model, p.task) == (profile.model, profile.task)

places = (root / "runs" / PROFILE, root / "notebooks/shipped_run")
run = next((place for place in places if usable(place)), out)
settings = runs.read_profile(run)
T = settings.iterations
print(f"{run.name}: {T} iterations, {settings.n_questions} questions x {settings.n_samples} samples, "
      f"evaluated on the {settings.eval_split} split")
assert usable(run)

# %%
# NBVAL_IGNORE_OUTPUT
import json
import pandas as pd

metrics = pd.read_csv(run / "metrics.csv")
print(*sorted(path.name for path in run.iterdir() if not path.name.startswith(".")))
print(*sorted(path.name for path in (run / "iteration_1").iterdir()))
assert {"iteration", "split", "metric", "k", "value", "low", "high", "n"} <= set(metrics)
metrics[metrics.metric.isin(["greedy", "sampled"])].round(3)

# %% [markdown]
# ### Exercise 5.1: what was each model trained on?
#
# **Goal**: find your way in a run directory. **Difficulty**: 1 of 3. **Time**: 10 minutes.
#
# `pairs_of_each_model(run)` returns a dict: for each trained model M_1 ... M_T, by its number t, how many pairs it was trained
# on. T stands in `profile.json`. The numbers stand in `iteration_*/pairs/counts.json`, under `pairs`.
#
# <details><summary>Hint</summary>
#
# `json.loads(path.read_text())` reads a file. In `iteration_3` lies what was made *with* M_3. Was M_3 trained on that?
#
# </details>

# %%
def pairs_of_each_model(run):
    # SOLUTION
    run, trained_on = Path(run), {}
    for t in range(json.loads((run / "profile.json").read_text())["iterations"]):
        counts = json.loads((run / f"iteration_{t}/pairs/counts.json").read_text())
        trained_on[t + 1] = counts["pairs"]
    return trained_on
    # STUB
    # return ...      # your turn
    # END

# %%
import checks_05
print(checks_05.pairs_of_each_model(pairs_of_each_model))

# %% [markdown]
# The worked solution is in [solutions/05_iterations.ipynb](solutions/05_iterations.ipynb).

# %% [markdown]
# ## 4 Accuracy, with its interval
#
# 140 right answers of 500 are 28 %. With 500 *other* questions it would not be exactly that again. Wilson's interval says
# which true rates are compatible with what was seen:
#
# $$\frac{p + \frac{z^2}{2n} \pm z\sqrt{\frac{p(1-p)}{n} + \frac{z^2}{4n^2}}}{1 + \frac{z^2}{n}}, \qquad z = 1.96$$

# %%
import math
from irpo_utils import evaluation

right, n, z = 140, 500, 1.959964
p = right / n
half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
low, high = ((p + z**2 / (2 * n) + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
print(f"{p:.1%} ({low:.1%} to {high:.1%})")
assert all(math.isclose(*both) for both in zip((low, high), evaluation.wilson_interval(right, n)))

# %% [markdown]
# Four points to each side, with 500 questions. The paper's last gain, 0.5 points on 1,319 questions
# ([Table 1](https://arxiv.org/html/2404.19733v3#S3.T1)), lies well inside such an interval.
#
# **Predict** the curve of your run: do the gains grow, stay, or shrink from iteration to iteration?

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils import plots

figure = plots.accuracy_per_iteration(metrics)
assert f"M_{T}" in plots.alt_text(figure)
figure

# %% [markdown]
# They shrink: each iteration makes likely what was possible, and less is left for the next. The paper's gains are 17.5, 4.9,
# 3.1 and 0.5 points. The greedy answer and the sampled ones differ, most of all at the start: greedy takes the most
# probable token each time, a sample takes any.

# %% [markdown]
# One run is one seed, though. Five seeds of the default profile ship with the repository; thin lines are single runs.

# %%
# NBVAL_IGNORE_OUTPUT
five = pd.read_csv(root / "figures/accuracy_per_iteration.csv")
mean = pd.read_csv(root / "figures/accuracy_per_iteration_mean.csv")
figure = plots.accuracy_per_iteration(five, mean)
assert five.seed.nunique() > 1
figure

# %% [markdown]
# ## 5 Majority vote
#
# Ask k times and take the most frequent answer ([self-consistency](https://arxiv.org/abs/2203.11171)). Answers that cannot be
# read do not vote; where answers tie, they share the credit. **Predict** the credit of these votes when 12 is right:

# %%
from collections import Counter

def majority(answers, right):
    votes = Counter(answer for answer in answers if answer is not None)
    most = [answer for answer in votes if votes[answer] == max(votes.values())]
    return (right in most) / len(most) if most else 0.0

for answers in (["12", "12", "7", None], ["12", "7", None], ["7", "7", "12", "5"], [None, None]):
    print(answers, majority(answers, "12"))
    assert majority(answers, "12") == evaluation.majority_vote(answers, lambda x: x == "12")

# %% [markdown]
# A vote helps where wrong answers scatter and right ones agree. **Predict**: does it help M_0 more, or the last model? And
# how much better than its greedy answer is a vote of M_0?

# %%
# NBVAL_IGNORE_OUTPUT
votes = metrics[metrics.metric.isin(["greedy", "sampled", "majority"])].copy()
votes["name"] = votes.metric.where(votes.metric != "majority", "majority of " + votes.k.astype(str))
table = (100 * votes.pivot_table(index="iteration", columns="name", values="value")).round(1)
assert len(table) == T + 1
table.astype(object).fillna("")

# %% [markdown]
# At the start the vote is far above the sampled answers it is made of: that knowledge was there, spread thin. At the end
# the samples agree more, and a vote among them adds less to a single one; the greedy answer is as good as the vote, or better. The paper sees the same narrowing, from 15 points
# of gain by voting at M_0 to 7 at M_4 ([Table 1](https://arxiv.org/html/2404.19733v3#S3.T1)), and there as here the last model's single answer
# beats the vote of M_0. What is spent is variety:

# %%
# NBVAL_IGNORE_OUTPUT
figure = plots.diversity(metrics)
assert "distinct answers" in plots.alt_text(figure)
figure

# %% [markdown]
# ## 6 Lengths and steps
#
# **Predict**: nobody rewards length. Do answers get longer, shorter, or neither?

# %%
# NBVAL_IGNORE_OUTPUT
figure = plots.lengths_per_iteration(metrics)
assert "tokens" in plots.alt_text(figure)
figure

# %% [markdown]
# In our task they get longer, because working is what wins. Length alone proves nothing, however. A length that runs off to the
# token limit is a warning, and so is one that falls to a few tokens: without updating the reference
# [Lanchantin et al.](https://arxiv.org/abs/2506.21495) see it collapse.
#
# **Predict**: which questions improve first, those with few steps or those with many?

# %%
# NBVAL_IGNORE_OUTPUT
by_steps = metrics[metrics.metric.str.startswith("greedy_steps_")]
draw = plots.accuracy_by_steps if len(by_steps) else plots.accuracy_per_iteration
figure = draw(metrics)
assert "M_0" in plots.alt_text(figure)
figure

# %% [markdown]
# Short ones first. Why? A question teaches only if it has a winner *and* a loser among its samples. So: the share of training
# questions that gave pairs, by steps. **Predict** how it changes for the shortest and for the longest.

# %%
# NBVAL_IGNORE_OUTPUT
trained = task.load("train", settings.data).shuffle(seed=settings.seed)
trained = trained.select(range(min(settings.n_questions or len(trained), len(trained)))).to_pandas()
needed = trained.get("steps", pd.Series("all", index=trained.index)).rename("steps needed")
gave = {f"M_{t}": trained.id.isin(load_from_disk(str(run / f"iteration_{t}/pairs"))["id"][:])
        for t in range(T) if (run / f"iteration_{t}/pairs").exists()}
shares = pd.DataFrame(gave).groupby(needed).mean()
assert shares.notna().all().all() and (shares <= 1).all().all()
shares.round(2)

# %% [markdown]
# The long ones come in late, when the habit of working has spread to them. The short ones go out at the end: every sample is right,
# there is no loser left, and nothing more to learn from. A set of questions that all go out is one reason why gains end; the paper
# keeps one fixed set, too, and names it as a limit ([appendix A](https://arxiv.org/html/2404.19733v3#A1)). Let us look at the habit itself.

# %% [markdown]
# ## 7 What changes in the answers
#
# Each line of working ends with a line break, so counting these counts the steps that an answer shows.

# %%
# NBVAL_IGNORE_OUTPUT
evaluated = [load_from_disk(str(run / f"iteration_{t}/evaluation/greedy")) for t in range(T + 1)]
greedy = [graded.to_pandas().set_index("id") for graded in evaluated]
asked = {row["id"]: row for row in task.load(settings.eval_split, settings.data)}
steps = pd.Series({i: asked[i].get("steps", "all") for i in greedy[0].index}, name="steps needed")
lines = pd.DataFrame({f"M_{t}": greedy[t].completion.str.strip().str.count("\n") for t in range(T + 1)})
shown = lines.groupby(steps).mean()
print("lines of working in the greedy answer, mean")
assert shown.shape[1] == T + 1
shown.round(2)

# %% [markdown]
# Read it by rows. Working becomes complete on the short questions first, and the habit then spreads to the long ones. That is
# the mechanism of the gain in this task: not better arithmetic, but working shown where a guess was blurted out before. How much of
# the gain is of this kind in real models is [disputed](https://arxiv.org/abs/2504.13837).

# %% [markdown]
# Now one question, from iteration to iteration: one that M_0 gets wrong and the last model right, and whose working grew in as many
# stages as possible.

# %%
# NBVAL_IGNORE_OUTPUT
def journey(i):
    """Sort key: solved at the end only, in how many stages its working grew, steps needed."""
    solved_late = greedy[T].correct[i] and not greedy[0].correct[i]
    return solved_late, lines.loc[i].nunique(), asked[i].get("steps", 0)

one = max(greedy[0].index, key=journey)
print(asked[one]["question"], "| answer:", asked[one]["answer"])
for t in range(T + 1):
    print(f"\nM_{t} {'RIGHT' if greedy[t].correct[one] else 'wrong'}")
    print(greedy[t].completion[one].strip())
assert len(journey(one)) == 3

# %% [markdown]
# It is one question, chosen because it tells the story. How many go which way between the first model and the last?

# %%
# NBVAL_IGNORE_OUTPUT
first, last = greedy[0].correct.rename("M_0 right"), greedy[T].correct.rename(f"M_{T} right")
crossed = pd.crosstab(first, last)
assert crossed.to_numpy().sum() == len(greedy[0])
crossed

# %% [markdown]
# An average would not tell gains from losses: ten questions won and nine lost look like one won. In the default run hardly any question
# is lost, which is what [elicitation](../docs/glossary.md#elicitation) looks like. Do not count on it with other models.

# %% [markdown]
# ## 8 Is a step more than luck?
#
# Two iterations answer the same questions, so compare them question by question. Those that both got right, or both wrong, say
# nothing. Of the others, the *discordant* ones, each is a coin toss if the two models are equally good. Ten questions:

# %%
a = [1, 1, 1, 0, 0, 0, 0, 0, 0, 1]
b = [1, 1, 0, 1, 1, 1, 1, 1, 0, 1]
only_a = sum(x and not y for x, y in zip(a, b))
only_b = sum(y and not x for x, y in zip(a, b))
print("only a right:", only_a, " only b right:", only_b)

# %% [markdown]
# Six discordant questions, five for b. **Predict**: is that significant at 5 %?

# %%
from irpo_utils.ops import statistics

tosses = only_a + only_b
as_uneven = sum(math.comb(tosses, i) for i in range(min(only_a, only_b) + 1)) / 2**tosses
p = min(1.0, 2 * as_uneven)                    # two-sided: a could have been the better one
print(f"p = {p:.3f}")
assert math.isclose(p, statistics.mcnemar(a, b)["p"])

# %% [markdown]
# Far from it: five or more of six heads on one side or the other comes up in more than a fifth of all tries. This is the exact
# [McNemar test](../docs/glossary.md#mcnemar-test). On your run, each model against the one before:

# %%
# NBVAL_IGNORE_OUTPUT
def compared(t):
    """What M_t gains over the previous model, and McNemar's test on the same questions."""
    before, after = (evaluation.correct_per_question(evaluated[i]) for i in (t - 1, t))
    test = statistics.mcnemar(list(before.values()), [after[i] for i in before])
    return {"step": f"M_{t - 1} to M_{t}", **evaluation.compare(evaluated[t - 1], evaluated[t]),
            "p": test["p"], "only_a": test["only_a"], "only_b": test["only_b"]}

steps_of_run = pd.DataFrame([compared(t) for t in range(1, T + 1)])
assert (steps_of_run.p <= 1).all()
steps_of_run.round(4)

# %% [markdown]
# `difference` is the gain, with its interval over questions; `only_a` counts the questions lost. Compare the intervals with those of
# section 4: paired, they are narrower, since questions that are easy or hard for both models cancel out. Even a gain of two points can
# then be told from luck, if nearly all the changes go one way.

# %% [markdown]
# ### Exercise 5.2: McNemar
#
# **Goal**: write the exact test. **Difficulty**: 2 of 3. **Time**: 15 minutes.
#
# `mcnemar_p(a, b)` takes two lists of 0 and 1 for the same questions and returns the two-sided p value.
#
# <details><summary>Hint</summary>
#
# Count the discordant questions on both sides. Add up the binomial probabilities of a split that is as uneven or more, then
# double. What if both sides are equal? A probability cannot exceed 1. And without any discordant question there is no
# evidence at all: p = 1.
#
# </details>

# %%
def mcnemar_p(a, b):
    # SOLUTION
    only_a = sum(x > y for x, y in zip(a, b))
    only_b = sum(y > x for x, y in zip(a, b))
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_05.mcnemar_p(mcnemar_p))

# %% [markdown]
# The worked solution is in [solutions/05_iterations.ipynb](solutions/05_iterations.ipynb).

# %% [markdown]
# ## 9 How far did a step go? KL from samples
#
# The [KL divergence](../docs/glossary.md#kl-divergence) $\text{KL}(M_t \| M_{t-1}) = \sum_y M_t(y) \log\frac{M_t(y)}{M_{t-1}(y)}$ measures how far
# training moved the model, in nats. The sum goes over all possible answers $y$, which nobody can list. But it is a mean over answers that $M_t$ writes,
# so drawing some will do. With four possible answers we can do both:

# %%
import numpy as np

now, previous = np.array([0.70, 0.15, 0.10, 0.05]), np.array([0.40, 0.30, 0.20, 0.10])
exact = (now * np.log(now / previous)).sum()
print(f"exact {exact:.3f} nats")

# %% [markdown]
# **Predict**: a KL divergence is never negative. Can its estimate from samples be?

# %%
rng = np.random.default_rng(0)
for n in (3, 10, 100, 10_000):
    drawn = rng.choice(4, size=n, p=now)                       # answers of the *new* model
    log_ratios = np.log(now[drawn]) - np.log(previous[drawn])
    print(f"{n:6} samples: {log_ratios.mean():+.3f} ± {log_ratios.std() / math.sqrt(n):.3f}")

# %% [markdown]
# Yes, where few samples meet a small divergence. It is unbiased all the same, and the standard error tells how far to trust it, once
# there are enough samples: the three in the first row happened to be the same answer, and an error of 0 from those is no certainty.
# Three things go wrong easily: the samples must come from the *new* model, at temperature 1, and the
# log-probabilities are sums over the whole answer.
#
# Now M_2 against M_1 of the small run, by hand, with the model that we trained in section 1.

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils import logprobs

some = task.load("validation", small.data).select(range(small.n_eval_questions))
drawn = sampling.sample(model, tokenizer, some, task, n=1, temperature=1.0, seed=seed(2, 5),
                        max_new_tokens=small.max_new_tokens, engine=engine,
                        batch_size=small.sampling_batch_size, progress=False)      # `model` is M_2
models.set_adapter(model, out / "iteration_1/adapter")                             # now it is M_1
scores = logprobs.score(model, tokenizer, drawn["prompt_ids"][:], drawn["completion_ids"][:])
kl = sum(new - old for new, old in zip(drawn["logprob"], scores)) / len(scores)
by_module, = (row["value"] for row in rows if (row["metric"], row["iteration"]) == ("kl_to_previous", 2))
print(f"by hand {kl:.4f}, by the module {by_module:.4f} nats per answer")
assert abs(kl - by_module) < (1e-3 if models.default_device() == "cpu" else 1.0)

# %% [markdown]
# ### Exercise 5.3: a KL with its error
#
# **Goal**: estimate a divergence and say how sure you are. **Difficulty**: 2 of 3. **Time**: 10 minutes.
#
# `estimate_kl(logp_now, logp_before)` takes two lists: log-probabilities of the same answers, *drawn from the new model*, under the new
# model and under the one before. It returns a pair: the estimate, and its standard error
# ([sample standard deviation](https://en.wikipedia.org/wiki/Standard_deviation) with $n-1$, divided by $\sqrt n$).
#
# <details><summary>Hint</summary>
#
# Differences of logarithms, no exponentials. The samples carry the weights already: an answer that is likely is drawn often.
# `np.std(x, ddof=1)`.
#
# </details>

# %%
def estimate_kl(logp_now, logp_before):
    # SOLUTION
    ratios = np.asarray(logp_now) - np.asarray(logp_before)
    return ratios.mean(), ratios.std(ddof=1) / math.sqrt(len(ratios))
    # STUB
    # return ...      # your turn: (estimate, standard error)
    # END

# %%
print(checks_05.estimate_kl(estimate_kl))

# %% [markdown]
# The worked solution is in [solutions/05_iterations.ipynb](solutions/05_iterations.ipynb).

# %% [markdown]
# ## 10 The two warning numbers
#
# After each iteration a run records the KL to the previous model. It also records the log-probability per token of the chosen completions before and after training, on
# 128 of the pairs that it was trained on. **Predict** the second: should training raise it, lower it, or is either fine?

# %%
# NBVAL_IGNORE_OUTPUT
figure = plots.warning_numbers(metrics)
assert "nats" in plots.alt_text(figure)
figure

# %% [markdown]
# In a healthy run the KL stays small, and training raises the winners: blue above grey at each t. (Between iterations the
# pairs change, so compare blue with grey of the same t, not along the line.)

# %% [markdown]
# ## 11 A collapse, made on purpose
#
# Take the last model but one of the run and its own pairs, and train three times: with the run's settings; with 150 times the learning
# rate and without the NLL term; and with that rate *and* the NLL term. The middle one is asking for trouble.

# %%
from irpo_utils.ops.trainer import Probe
from irpo_utils.ops.warnings import CollapseWarning

start = T - 1
STEPS, PROBE = (6, 24) if PROFILE == "smoke" else (30, 64)
data = load_from_disk(str(run / f"iteration_{start}/pairs")).shuffle(seed=0)
data = data.select(range(min(len(data), STEPS * settings.batch_size)))
adapter = run / f"iteration_{start}/adapter" if start else None
signs = []                                                     # of a collapse, as the trainer sees them

def train(rate, alpha):
    """The training log, and the rows of the probe."""
    models.set_adapter(model, adapter)                         # back to the same start
    probe = Probe(data.select(range(min(PROBE, len(data)))), tokenizer, every=max(1, STEPS // 6))
    log = training.train(
        model, tokenizer, data, alpha, settings.beta, rate, batch_size=settings.batch_size,
        micro_batch_size=settings.micro_batch_size, trainer=engine.trainer(model),
        callbacks=[probe, CollapseWarning(signs.append)], optim=settings.optimizer,
        gradient_checkpointing=settings.gradient_checkpointing, disable_tqdm=True)
    return log.to_pandas(), pd.DataFrame(probe.rows)

# %% [markdown]
# After each training a look at the model: its greedy answers, and its KL to the start.

# %%
held_out = task.load("validation", profile.data).shuffle(seed=0)
held_out = held_out.select(range(12 if PROFILE == "smoke" else 60))

def draw(temperature):
    return sampling.sample(model, tokenizer, held_out, task, n=1, temperature=temperature,
                           max_new_tokens=profile.max_new_tokens, engine=engine,
                           batch_size=profile.sampling_batch_size, progress=False)

def look():
    answers, drawn = grading.grade(draw(temperature=0.0), task), draw(temperature=1.0)
    models.set_adapter(model, adapter)
    before = logprobs.score(model, tokenizer, drawn["prompt_ids"][:], drawn["completion_ids"][:])
    return answers, np.mean(np.array(drawn["logprob"]) - np.array(before))

# %%
# NBVAL_IGNORE_OUTPUT
rate = settings.learning_rate
trials = {"as in the run": (rate, 1.0), "150 x, no NLL": (150 * rate, 0.0),
          "150 x, with NLL": (150 * rate, 1.0)}
results, looks = {}, {}
for name, (its_rate, alpha) in trials.items():
    results[name] = train(its_rate, alpha)
    looks[name] = look()
assert set(results) == set(looks) == set(trials)

# %% [markdown]
# **Predict**: the trainer's own success measure is the share of pairs with a positive margin. In the run that is ruined, will it be
# higher or lower than in the healthy one?

# %%
# NBVAL_IGNORE_OUTPUT
table = pd.DataFrame({name: {
    "pairs with positive margin (last steps)": log["rewards/accuracies"].tail(5).mean(),
    "margin (last steps)": log["rewards/margins"].tail(5).mean(),
    "winners' log-probability per token before": -probe.nll_chosen.iloc[0],
    "winners' log-probability per token after": -probe.nll_chosen.iloc[-1],
    "KL to the start (nats per answer)": looks[name][1],
    "right, greedy": np.mean(looks[name][0]["correct"]),
    "cut off at the token limit": 1 - np.mean(looks[name][0]["finished"])}
    for name, (log, probe) in results.items()})
assert looks["150 x, no NLL"][1] > looks["as in the run"][1]
table.round(3)

# %% [markdown]
# About as high, and the margin is hundreds of times wider. By the trainer's own measures the ruined model does splendidly. But its winners
# have become *less* probable than they were, in one training it has moved further than the healthy run does in all its
# iterations together, and most of its answers are wrong. With the NLL term the same rate does much less harm, since that term holds the
# winners up. It is a brake and no licence for such a rate: that model has moved far, too.

# %%
# NBVAL_IGNORE_OUTPUT
probes = {name: probe for name, (_, probe) in results.items()}
figure = plots.training_curves(probes)
assert all(name in plots.alt_text(figure) for name in trials)
figure

# %% [markdown]
# How it sounds:

# %%
# NBVAL_IGNORE_OUTPUT
for i in range(3):
    print(held_out[i]["question"], "| answer:", held_out[i]["answer"])
    for name in ("as in the run", "150 x, no NLL"):
        print(f"  {name}: {looks[name][0][i]['completion'][:160]!r}")
assert len(looks["150 x, no NLL"][0]) == len(held_out)

# %% [markdown]
# When could you have known? Below, the ruined training step by step: the trainer's measures, and the winners' log-probability of the
# probe. (The callback `CollapseWarning` also watches the chosen completions: with the default profile it warned above, during training.)

# %%
# NBVAL_IGNORE_OUTPUT
winners = -probes["150 x, no NLL"].set_index("step").nll_chosen
alarm = results["150 x, no NLL"][0].set_index("step")
alarm = alarm[["rewards/accuracies", "rewards/margins", "loss_dpo"]]
alarm = alarm.loc[winners.index[1:]].assign(**{"winners' log-probability per token": winners})
assert len(alarm) >= 2
alarm.round(3)

# %% [markdown]
# The loss and the margin say *much better than at the start*. The winners' log-probability says *stop* after a few steps. That is why the
# run logs it, and why loss and reward accuracy are no reason to trust a preference training.
#
# An honest word on how far one must go for this. At five times the profile's rate with the NLL term one run of four iterations did *not*
# collapse, though we had expected it ([the log](../figures/LOG.md)). With more seeds and more iterations such a rate does turn
# ([notebook 06](06_baselines_and_ablations.ipynb), section 8), and a larger model on a harder task may be less patient.

# %% [markdown]
# ## 12 When to stop
#
# What a collapse looks like, earliest sign first:
#
# | sign | where |
# |---|---|
# | the winners' log-probability falls in training | probe, `chosen_logp_per_token` against `..._before` |
# | the KL of one step is several times that of the steps before | `kl_to_previous` |
# | answers are cut off at the token limit, or shrink to nothing | `truncated_rate`, `mean_tokens` |
# | answers cannot be read | `no_answer_rate` |
# | accuracy falls | `greedy`, too late |
#
# A sign is a reason to look, no verdict. [Notebook 06](06_baselines_and_ablations.ipynb), section 8, has runs in which the winners
# fell a little in the very first step, which was also the best one.

# %% [markdown]
# And without a collapse: stop when a step's gain is no more than luck, or when no pairs are left to train on, since questions with only
# winners give none. Decide on the *validation* split. Picking the best iteration by its test accuracy makes that number
# too good: the paper chooses its checkpoints on held-out training questions
# ([section 3.1](https://arxiv.org/html/2404.19733v3#S3.SS1)).

# %% [markdown]
# ### Exercise 5.4: decide
#
# **Goal**: turn these rules into a decision. **Difficulty**: 3 of 3. **Time**: 15 minutes.
#
# `keep(table)` takes a list of dicts, one for each iteration t = 0, 1, ..., with `greedy`, `p` (McNemar against the previous model),
# `kl`, `logp_before` and `logp_after` (the winners', per token; all but `greedy` are None at t = 0). A step to t is *sound* if
# accuracy rose, p < 0.05, and the winners' log-probability did not fall. Return the number of the last model before the
# first step that is not sound; if all steps are sound, the last one.
#
# <details><summary>Hint</summary>
#
# Walk from t = 1. At the first unsound step return t - 1. A later step cannot mend an unsound one: do not look for the
# highest accuracy.
#
# </details>

# %%
def keep(table):
    # SOLUTION
    for t in range(1, len(table)):
        step, last = table[t], table[t - 1]
        winners_held = step["logp_after"] >= step["logp_before"]
        if not (step["greedy"] > last["greedy"] and step["p"] < 0.05 and winners_held):
            return t - 1
    return len(table) - 1
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_05.keep(keep))

# %% [markdown]
# The worked solution is in [solutions/05_iterations.ipynb](solutions/05_iterations.ipynb).
#
# The rule on the run that you read. It was evaluated on the split named in section 3; if that is the test split, take what follows as an
# illustration and not as a choice.

# %%
# NBVAL_IGNORE_OUTPUT
value = metrics.drop_duplicates(["iteration", "metric"]).pivot(
    index="iteration", columns="metric", values="value")
run_table = [{"greedy": value.greedy[t], "p": None if t == 0 else steps_of_run.p[t - 1],
              "kl": value.kl_to_previous[t], "logp_before": value.chosen_logp_per_token_before[t],
              "logp_after": value.chosen_logp_per_token[t]} for t in range(T + 1)]
decision = keep(run_table)
print("not solved yet" if decision is ... else f"keep M_{decision} of M_0 to M_{T}")
assert decision is ... or 0 <= decision <= T

# %% [markdown]
# ## What you have learnt
#
# - The loop is five calls; a run directory makes it survive a kill, and refuses to mix settings.
# - Gains shrink, votes and single answers draw together, variety is spent.
# - An average needs an interval, and two models need a paired test, which also shows what was lost.
# - A preference training can be ruined while its loss and its reward accuracy look fine. KL and the winners'
#   log-probability tell.
# - Stop on the validation split, before you are forced to.

# %% [markdown]
# **Try**
#
# - Kill the small run at another stage: wait for `iteration_1/samples` instead.
# - Find the smallest rate at which α = 0 ruins the model, and see whether α = 1 saves it there.
# - A question that the last model has *lost*: print its journey. Is the working wrong, or missing?
#
# **Recall**
#
# 1. Which three parts does M_t play in iteration t?
# 2. Why may a vote help M_0 more than M_4?
# 3. 430 questions both right, 40 both wrong, 12 only a, 18 only b. Which of these numbers enter McNemar's test?
# 4. Your KL estimate is -0.02. Is something broken?
# 5. Reward accuracy 0.97, margin rising, winners' log-probability falling. What do you do?
#
# **Next**: [06 · Baselines and ablations](06_baselines_and_ablations.ipynb) asks which part of the method earns the gain. The
# [README](../README.md) has the results over several seeds, with intervals, and the commands for runs of your own.
