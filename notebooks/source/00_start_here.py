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
# - describe the six steps of Iterative Reasoning Preference Optimization (Iterative RPO), and the model that each step uses;
# - carry one question through an iteration;
# - explain why a reward for the final answer can change how a model reasons.
#
# | | `smoke` | `cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook, on two cores | 30 seconds | 1 minute | as `cpu`: the model is small |
#
# **Needs**: the packages of this repository (in Colab: [`docs/colab.md`](../docs/colab.md)). The model and its questions come
# with it.
#
# **Before this**: you should know what a softmax and a gradient are. The [glossary](../docs/glossary.md) explains the terms
# that link to it.

# %%
import os, sys
sys.path[:0] = [".", ".."]                          # for helpers_00.py and checks_00.py
PROFILE = os.environ.get("IRPO_PROFILE", "cpu")     # "cpu", "smoke", or a GPU profile

# %% tags=["nbval-ignore-output"]
import json
import math

import pandas as pd
from datasets import Dataset, load_from_disk

import checks_00, helpers_00
from irpo_utils import grading, logprobs, models, pairs, profiles, sampling, tasks, training
from irpo_utils.ops import run as runs
from irpo_utils.ops.cli import quiet_libraries

quiet_libraries()
profile = profiles.get(PROFILE)
print("profile", PROFILE, "· device", models.default_device(), "· seed", profile.seed)

# %% [markdown]
# ## 1 One question, asked several times
#
# Ask a language model a difficult question several times. Some of its [completions](../docs/glossary.md#completion), the
# texts that it writes, are correct. Can the model learn from them?
#
# A *profile* is a set of settings. The `cpu` profile has word problems and a first model $M_0$, the
# [seed model](../docs/glossary.md#seed-model), with about a million parameters. It can show its *working*, the reasoning
# steps, but we [trained it](../docs/model_card_seed.md) to skip them most of the time.
#
# We draw $N$ random completions for each of 16 questions and [grade](../docs/glossary.md#reward) them: the reward is 1 if
# the final answer equals the known one, else 0. [Greedy decoding](../docs/glossary.md#greedy-decoding) gives one
# more completion: it always takes the most probable token.

# %% tags=["nbval-ignore-output"]
task = tasks.get(profile.task)
questions = task.load("validation", profile.data).select(range(16))
model, tokenizer = runs.load_model(profile)

def draw(questions, n=1, temperature=0.0):
    return sampling.sample(model, tokenizer, questions, task, n, temperature, seed=profile.seed,
                           max_new_tokens=profile.max_new_tokens, progress=False)

greedy = grading.grade(draw(questions), task)
graded = grading.grade(draw(questions, profile.n_samples, profile.temperature_of(0)), task)
print(f"{len(questions)} questions, N = {profile.n_samples}: {len(graded)} sampled completions,",
      f"{sum(graded['correct'])} are correct")

# %% [markdown]
# We follow one question through this notebook. Its greedy completion is incorrect, and some of its sampled completions
# are correct.

# %% tags=["nbval-ignore-output"]
def completions_of(question):
    return [row for row in graded if row["id"] == question["id"]]

def has_both_kinds(question):
    verdicts = [row["correct"] for row in completions_of(question)]
    return any(verdicts) and not all(verdicts)

mixed = [question for question, best in zip(questions, greedy)
         if not best["correct"] and has_both_kinds(question)]
assert mixed, "No question has an incorrect greedy completion and both kinds of samples: take more than 16."
question, completions = mixed[0], completions_of(mixed[0])
print(question["question"], "\nknown answer:", question["answer"])
print("greedy:", helpers_00.show(draw(Dataset.from_list([question]))[0]["completion"]), "\n")
for row in completions:
    print("correct  " if row["correct"] else "incorrect", helpers_00.show(row["completion"]))

# %% [markdown]
# **Predict**: the figure below counts the lines of all sampled completions. Are correct completions longer or shorter
# than incorrect ones?

# %% tags=["nbval-ignore-output"]
helpers_00.lines_by_verdict(graded)

# %% [markdown]
# <details><summary>Answer</summary>
#
# Longer, with the seed model. Completions of one or two lines skip steps and are almost never correct.
# With three or four lines most are correct.
#
# </details>
#
# The reward does not look at the reasoning, yet it prefers one *way* of answering.

# %% [markdown]
# ## 2 The algorithm
#
# Iterative RPO ([Pang et al. 2024](https://arxiv.org/abs/2404.19733)) uses this preference for training. It needs
# questions with known final answers, but no worked solutions. The figure shows the six steps for our question.

# %% tags=["nbval-ignore-output"]
helpers_00.loop_diagram(question["question"], completions, profile.k_pairs)

# %% [markdown]
# 1. **Sample.** $M_t$, the model after $t$ iterations, writes $N$ completions for every training question: a
#    [chain of thought](../docs/glossary.md#chain-of-thought) and a final answer.
# 2. **Grade.** A completion gets reward 1 if its final answer is correct, else 0.
# 3. **Pair.** Correct ("winning", **chosen**) and incorrect ("losing", **rejected**) completions of the same question
#    form $K$ [preference pairs](../docs/glossary.md#preference-pair). A question without both kinds gives no pairs.
# 4. **Train.** A copy of $M_t$ learns to prefer chosen over rejected completions *more than $M_t$ does*.
# 5. **Evaluate.** The trained model $M_{t+1}$ answers questions that training never uses.
# 6. **Repeat** with $M_{t+1}$ and new completions. The paper runs three or four iterations ([section
#    3](https://arxiv.org/html/2404.19733v3#S3)).
#
# We count iterations from 0. One model has three roles:
#
# | role in iteration $t$ | model | changes in training? |
# |---|---|---|
# | writes the completions | $M_t$ | no |
# | is the [reference](../docs/glossary.md#reference-model) | $M_t$, **not** $M_0$ | no |
# | is trained | starts as a copy of $M_t$, ends as $M_{t+1}$ | yes |

# %% [markdown]
# ## 3 Grade and pair by hand
#
# Grading reads the text after "Final answer:" and compares it with the known answer.
#
# **Predict**: the known answer is 112. The working of a completion ends in 112, and its last line is "Final answer: 11". Does
# it get the reward?

# %%
texts = ["57*2=114\n114-2=112\nFinal answer: 112", "Final answer: 134",
         "57*2=114\n114-2=112\nFinal answer: 11"]
by_hand = [text.split("Final answer:")[-1].strip() == "112" for text in texts]
word_problems = tasks.get("word_problems")
assert by_hand == [word_problems.is_correct(word_problems.extract(text), "112") for text in texts]
print(by_hand)

# %% [markdown]
# <details><summary>Answer</summary>
#
# No. Its working is correct, but its last line is not.
#
# </details>
#
# Conversely, a lucky guess gets the reward ([02](02_grading.ipynb)).
#
# Pairing walks through the correct and the incorrect completions in parallel. When a list ends, only that list starts again.
# After $K$ pairs the walk stops. This is a zip with wrap-around, not a random draw ([section
# 2](https://arxiv.org/html/2404.19733v3#S2), footnote 2).

# %% tags=["nbval-ignore-output"]
chosen = [row["sample"] for row in completions if row["correct"]]
rejected = [row["sample"] for row in completions if not row["correct"]]
by_hand = [(chosen[i % len(chosen)], rejected[i % len(rejected)])
           for i in range(profile.k_pairs)]

# our runs also remove repeated completions first; the paper describes no such step
preferences, counts = pairs.build_pairs(completions, k=profile.k_pairs, deduplicate=False)
print("indices of chosen", chosen, "· of rejected", rejected, "· pairs", by_hand)
assert by_hand == list(zip(preferences["chosen_sample"], preferences["rejected_sample"]))

# %% [markdown]
# ## 4 Train: the model changes its answer
#
# The model should prefer the chosen completion $w$ over the rejected one $l$ *more than $M_t$ does*. The
# [DPO](../docs/glossary.md#dpo) term (direct preference optimization) asks for this. It allows both probabilities to fall. So
# the [NLL term](../docs/glossary.md#nll-term) (negative log-likelihood) raises the probability of $w$. The loss of one pair
# for a question $x$ is Eq. 1 of the paper:
#
# $$L = \underbrace{-\log\sigma\Big(\beta\log\frac{M_\theta(w|x)}{M_t(w|x)} - \beta\log\frac{M_\theta(l|x)}{M_t(l|x)}\Big)}_{\text{DPO}}
# \;\underbrace{-\;\alpha\,\frac{\log M_\theta(w|x)}{|w|}}_{\text{NLL}}$$
#
# - $M_\theta(w|x)$ is the probability of the whole completion $w$ under the model in training. It is a product over
#   tokens, so its logarithm is a sum, in [nats](../docs/glossary.md#nat).
# - $\sigma(z) = 1/(1+e^{-z})$, and $\beta = 0.1$ scales both log-ratios.
# - $\alpha = 1$ weighs the NLL term. Only this term is divided by $|w|$, the number of tokens of $w$.
#
# Notebook [04](04_dpo_nll_training.ipynb) explains both terms.
#
# **Predict**: before the first step the model in training equals the reference. What is the DPO term?

# %% tags=["nbval-ignore-output"]
pair = preferences[0]
prompts = [pair["prompt_ids"], pair["prompt_ids"]]
both = [pair["chosen_ids"], pair["rejected_ids"]]             # lists of token ids
reference, _ = runs.load_model(profile)                       # M_t, here M_0
logp_w, logp_l = logprobs.score(model, tokenizer, prompts, both)
ref_w, ref_l = logprobs.score(reference, tokenizer, prompts, both)
margin = profile.beta * (logp_w - ref_w) - profile.beta * (logp_l - ref_l)
print(f"log-probability of chosen {logp_w:.2f}, of rejected {logp_l:.2f} nats")
print(f"DPO term {-math.log(1 / (1 + math.exp(-margin))):.4f},",
      f"NLL term {-logp_w / len(pair['chosen_ids']):.4f}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# The DPO term is $-\log\sigma(0) = \ln 2 \approx 0.6931$, for every model and every pair.
#
# </details>
#
# This is a free test. If the first DPO term of a run differs from 0.6931 by more than rounding, training does not start from
# the reference, or dropout is on. If it *stays* there, the model does not change, or the reference changes too.
#
# Take twenty gradient steps on these pairs. The [learning rate](../docs/glossary.md#learning-rate) is 15 times the default,
# because twenty steps are few. Training changes `model` itself: to start again, run the notebook from the top.

# %% tags=["nbval-ignore-output"]
before = draw(Dataset.from_list([question]))[0]["completion"]
log = training.train(model, tokenizer, preferences, profile.alpha, profile.beta,
                     learning_rate=3e-4, batch_size=len(preferences), num_train_epochs=20,
                     seed=profile.seed, disable_tqdm=True)
after = draw(Dataset.from_list([question]))[0]["completion"]
print("known answer: ", question["answer"])
print("greedy before:", helpers_00.show(before))
print("greedy after: ", helpers_00.show(after))

# %% [markdown]
# This is the course in one cell: the model learned from its own completions, without a worked solution. The figure averages
# log-probabilities over the pairs. It starts flat because the learning rate of the first step is 0 (warm-up).

# %% tags=["nbval-ignore-output"]
helpers_00.twenty_steps(log)

# %% [markdown]
# The rejected completions lose most of their probability, and the chosen ones gain. This proves nothing about other
# questions, because the model saw this question in all twenty steps.

# %% [markdown]
# ## 5 Why can a reward for the answer change the reasoning?
#
# Consider a toy model that can answer in two ways. A **careful** completion shows its working and is correct 19 times
# out of 20. A **hasty** one is a bare number and is correct 3 times out of 20. At first 3 completions in 10 are
# careful.
#
# **Predict**: what share of the *correct* completions is careful? More than half?

# %%
careful, accuracy_of = 0.30, {"careful": 0.95, "hasty": 0.15}
correct_and_careful = careful * accuracy_of["careful"]
correct_and_hasty = (1 - careful) * accuracy_of["hasty"]
correct = correct_and_careful + correct_and_hasty
print(f"careful among the correct ones: {correct_and_careful / correct:.2f}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# Yes: nearly three quarters.
#
# </details>
#
# Suppose this share becomes the careful share of *all* completions of $M_{t+1}$, and repeat.

# %%
shares, accuracies = [careful], []
for t in range(5):
    accuracies.append(shares[t] * accuracy_of["careful"] + (1 - shares[t]) * accuracy_of["hasty"])
    shares.append(shares[t] * accuracy_of["careful"] / accuracies[t])
print("careful ", [round(share, 2) for share in shares[:5]])
print("accuracy", [round(accuracy, 2) for accuracy in accuracies])

# %%
helpers_00.toy(shares[:5], accuracies, accuracy_of["careful"])

# %% [markdown]
# The toy model never gets better *at* careful working. It shows careful working more often. This is called
# [elicitation](../docs/glossary.md#elicitation). The toy model only imitates correct completions, while DPO also ranks them
# above rejected ones. Notebook [01](01_sampling.ipynb) asks whether training adds more than elicitation.

# %% [markdown]
# ### Exercise 0.1: Iterative RPO in a few lines
#
# **Goal**: say in code which model samples, which is the reference, and which is trained. **Difficulty**: 2 of 3.
# **Time**: 15 minutes.
#
# `model` is $M_0$, and the stages are functions: `sample(model, questions)` returns samples, `grade(samples)` grades
# them, `pair(graded)` makes pairs, and `train(model, pairs, reference)` returns a new model that started as a copy of
# `model`. Return the list of all models, $M_0$ first.
#
# <details><summary>Hint</summary>
#
# Keep a list `models = [model]`. In every iteration `models[-1]` is $M_t$. How many of the three roles does it have?
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
    # return ...      # your turn: a loop over the iterations
    # END

# %%
print(checks_00.iterative_rpo(iterative_rpo))

# %% [markdown]
# [Worked solution](solutions/00_start_here.ipynb). The real loop,
# [`irpo_utils/iteration.py`](../irpo_utils/iteration.py), also stores every result.

# %% [markdown]
# ## 6 Where the course ends
#
# **Predict**: sketch the accuracy of $M_0$ to $M_4$ on test questions, at a low and at a high learning rate. Which iteration
# gains most?

# %% tags=["nbval-ignore-output"]
figure, table = helpers_00.two_learning_rates()
figure

# %% [markdown]
# <details><summary>Answer</summary>
#
# At 1e-4 the first iteration gains most. At 2e-5 the first two gain about the same.
#
# </details>
#
# Both lines start from the same $M_0$. Only the learning rate differs. Figure and table have means over five
# [seeds](../docs/glossary.md#seed) with 95 % [intervals](../docs/glossary.md#confidence-interval).

# %%
table

# %% [markdown]
# - **The learning rate decides the shape of the curve.** At 1e-4 one iteration does most of the work. The default is 2e-5. We
#   chose it on validation questions: it has the best $M_4$ of the rates that gain over a point in every iteration
#   ([log](../figures/LOG.md)).
# - **At 1e-4 the last mean falls**, because one of five seeds falls to 74 % ([data](../figures/comparison.csv)). Notebook
#   [05](05_iterations.ipynb) says when to stop.
# - **You will meet several $M_1$.** They differ in learning rate, training questions, grader or $M_0$. Accuracy is
#   greedy (here) or sampled. Compare only numbers of the same table.
# - **Mostly the rise is elicitation.** Training restores the working. Notebook [06](06_baselines_and_ablations.ipynb) compares
#   other methods, also on a model that always shows its working and makes mistakes in it.
#
# Here is a test question that $M_0$ answers incorrectly and the last model correctly. The models come from a finished run at
# 2e-5: yours, or the one shipped with the notebooks.

# %% tags=["nbval-ignore-output"]
run = helpers_00.finished_run(PROFILE)
settings = runs.read_profile(run)
asked = tasks.get(settings.task).load(settings.eval_split, settings.data)
greedy_of = [load_from_disk(str(run / f"iteration_{t}/evaluation/greedy"))
             for t in range(settings.iterations + 1)]
learned = [i for i, (first, last) in enumerate(zip(greedy_of[0], greedy_of[-1]))
           if not first["correct"] and last["correct"]]
shown = learned[0] if learned else 0                # a very small run may have none
print(next(row["question"] for row in asked if row["id"] == greedy_of[0][shown]["id"]), "\n")
for t, completions_of_model in enumerate(greedy_of):
    row = completions_of_model[shown]
    print(f"M_{t}", "correct  " if row["correct"] else "incorrect", helpers_00.show(row["completion"]))

# %% [markdown]
# We selected this example. The figure above is the evidence.

# %% [markdown]
# ## 7 Time and cost
#
# **Predict**: which stage of a run takes longest: sampling, grading, pairing, training or evaluation?

# %% tags=["nbval-ignore-output"]
timing = pd.read_csv(run / "timing.csv")
stages = timing.groupby("stage")[["seconds", "tokens"]].sum()
stages = stages.sort_values("seconds", ascending=False).rename(helpers_00.STAGES)
stages["tokens per second"] = (stages.tokens / stages.seconds).where(stages.tokens > 0).round(0)
machine = json.loads((run / "environment.json").read_text())
print(f"{run.name}: {timing.seconds.sum() / 60:.1f} minutes, {settings.iterations} iterations,",
      machine["processor"], "· GPUs:", machine["gpus"] or "none")
stages.round(1)

# %% [markdown]
# <details><summary>Answer</summary>
#
# In the shipped run (one core, which also had other work) training and evaluation take most of the time. Grading and pairing
# take seconds.
#
# </details>
#
# Use the profile `cpu` first, even if you have a GPU: it shows mistakes in your setup within minutes. For a real model,
# `python -m irpo_utils plan --profile NAME` estimates memory, hours and cost.

# %% [markdown]
# ### Exercise 0.2: which share of the time does each stage take?
#
# **Goal**: turn seconds into shares. **Difficulty**: 1 of 3. **Time**: 5 minutes.
#
# `time_shares(timing)` takes a table with the columns `iteration`, `stage`, `seconds`, `tokens`. It returns the share of
# all seconds for each stage, as a pandas Series or a dict of numbers between 0 and 1.
#
# <details><summary>Hint</summary>
#
# `timing.groupby("stage").seconds.sum()` gives the seconds of each stage. By what do you divide them?
#
# </details>

# %%
def time_shares(timing):
    # SOLUTION
    return timing.groupby("stage").seconds.sum() / timing.seconds.sum()
    # STUB
    # return ...      # your turn: one number for each stage
    # END

# %%
print(checks_00.time_shares(time_shares))

# %% [markdown]
# [Worked solution](solutions/00_start_here.ipynb).

# %% [markdown]
# ### Exercise 0.3: how long does sampling take?
#
# **Goal**: estimate a stage before you pay for it. **Difficulty**: 2 of 3. **Time**: 10 minutes.
#
# `sampling_hours` takes the number of questions, the completions per question, the mean length of a completion in tokens,
# the number of iterations, and the tokens per second of your machine. It returns the hours of all iterations together.
#
# <details><summary>Hint</summary>
#
# Count tokens first: every question gets `n` completions in every iteration.
#
# </details>

# %%
def sampling_hours(questions, n, mean_tokens, iterations, tokens_per_second):
    # SOLUTION
    all_tokens = questions * n * mean_tokens * iterations
    return all_tokens / tokens_per_second / 3600
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_00.sampling_hours(sampling_hours))

# %% [markdown]
# [Worked solution](solutions/00_start_here.ipynb). Try your function with the paper's 7,500 questions and $N = 30$ ([section
# 3.1](https://arxiv.org/html/2404.19733v3#S3.SS1)), four iterations, a guess of 200 tokens, and the `tokens per second` of
# `sampling` above. This is the time of the *seed model*. On the same machine a model with billions of parameters is far
# slower.

# %% [markdown]
# ## What you have learnt
#
# - In each iteration $M_t$ samples, is the reference, and is the model that training starts from.
# - The reward looks at the final answer only. It still changes how the model answers.
# - Before the first step the DPO term is $\ln 2$.
# - The shape of the accuracy curve depends on the learning rate.
#
# **Try**: set `accuracy_of["hasty"]` in section 5 to 0.95, and then higher than `accuracy_of["careful"]`. Run
# `make run` in the repository's root folder. Section 7 then shows your own run.
#
# <details><summary>Typical misunderstandings</summary>
#
# - *The DPO term is $\ln 2$ because the model knows nothing yet.* It is $\ln 2$ because the model *is* its reference.
# - *The model learned arithmetic.* It mostly learned to show its working, which it could do before.
#
# </details>
#
# **Recall** without scrolling up, then open the answers.
#
# 1. Which model is the reference in iteration 3?
# 2. What happens to a question whose $N$ completions are all correct?
# 3. Your first DPO term is 0.52. What is wrong?
#
# <details><summary>Answers</summary>
#
# 1. $M_3$, the model that iteration 3 starts from.
# 2. It gives no pairs, because there is no rejected completion.
# 3. Training does not start from the reference, or dropout is on.
#
# </details>
#
# **Next**: [01 · Sampling](01_sampling.ipynb): how a program draws a completion, token by token.
