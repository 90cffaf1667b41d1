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
# # 06b · Judges, luck and ablations (optional)
#
# **What you will be able to do**
#
# - replace the gold answer by a vote or by the model's own likelihood, and measure how often the reward errs;
# - say when rejected completions teach something that chosen ones do not;
# - test a hypothesis about β and the length of completions;
# - read an ablation table without believing its lucky rows;
# - add a method of your own as one entry, and run it.
#
# | | `smoke` | `cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook | 30 seconds on one core | 1 minute on one core | depends on the model |
#
# **Needs**: the packages of this repository (in Colab: [`docs/colab.md`](../docs/colab.md)). No other notebook needs this
# one. Sections 1 and 6 sample and train; the other sections read files of `figures/`.
#
# **Before this**: [05 · Iterations](05_iterations.ipynb) and [06 · Is it the method?](06_baselines_and_ablations.ipynb).

# %% tags=["nbval-ignore-output"]
import contextlib, io, os, sys, tempfile
from collections import Counter
from pathlib import Path
import numpy as np
import pandas as pd
sys.path[:0] = [".", ".."]                     # checks_06.py and helpers_06.py are next to the notebooks
sys.path += ["../scripts", "../../scripts"]    # the package `studies`
import checks_06, helpers_06
from irpo_utils import UserError, methods, models, pairs, plots, profiles, tasks
from irpo_utils.ops import run as runs
from irpo_utils.ops.cli import quiet_libraries
from studies import baselines, figures, lucky

quiet_libraries()
pd.set_option("display.max_colwidth", None)
PROFILE = os.environ.get("IRPO_PROFILE", "cpu")     # the one setting: "cpu", "smoke", or a GPU profile
profile = profiles.get(PROFILE)
print("profile", PROFILE, "· device", models.default_device())

# %% [markdown]
# ## 1 Who decides which completion is chosen?
#
# So far the gold answer decided. What if there is none? Here are two questions with four completions each, and for each
# completion its log-probability under the model that wrote it.

# %%
QUESTIONS = [{"id": "a", "question": "Ann has 3 bags of 4 apples. How many apples?", "answer": "12"},
             {"id": "c", "question": "A bus holds 25 people. 7 get on and 2 get off. How many?", "answer": "30"}]
WRITTEN = [
    ("a", "Final answer: 15", -3.1), ("a", "3*4=12\nFinal answer: 12", -4.0),
    ("a", "3*5=15\nFinal answer: 15", -9.5), ("a", "3*4=", -1.5),
    ("c", "Final answer: 29", -5.8), ("c", "25+7=31\nFinal answer: 31", -4.5),
    ("c", "25+7=33\nFinal answer: 33", -9.8), ("c", "Final answer: 31", -2.9)]
eight = helpers_06.by_hand(QUESTIONS, WRITTEN, tasks.get("word_problems"))
table = eight.to_pandas()[["id", "completion", "extracted", "correct", "logprob", "n_tokens"]]
table.assign(per_token=(table.logprob / table.n_tokens).round(2))

# %% [markdown]
# **Predict** which completions each of three rewards chooses (w) and which it rejects (l), question by question:
#
# - *gold*: the final answer equals the gold answer;
# - *majority vote*: the question's most frequent answer
#   ([Prasad et al. 2024](https://arxiv.org/abs/2411.04109));
# - *own likelihood*: the half with the higher log-probability per token, a simple stand-in for the model as its own judge
#   ([Yuan et al. 2024](https://arxiv.org/abs/2401.10020)).

# %%
def letters(name):
    """w for reward 1 and l for reward 0, question by question."""
    rewards = methods.reward(eight, methods.get(name).reward)["reward"]
    text = "".join("w" if reward else "l" for reward in rewards)
    return f"{text[:4]} {text[4:]}"

for name in ("irpo", "self_consistency", "self_rewarding"):
    print(f"{helpers_06.NAMES[name]:26}{letters(name)}")

# %% tags=["remove-cell"]
assert letters("self_consistency") == "wlwl lwlw"

# %% [markdown]
# In question `a` two incorrect completions agree and outvote the correct one. In question `c` no completion is correct, and
# the vote chooses two anyway. The likelihood even chooses a completion that breaks off before its answer.

# %% [markdown]
# ### Exercise 6b.1: majority vote as reward
#
# **Goal**: a reward without gold answers (self-consistency). **Difficulty**: 1 of 3. **Time**: 10 minutes.
#
# `majority_vote(answers)` takes the extracted answers of one question's completions, each a string or None. Return a list
# of True and False: True for the completions that give the most frequent answer. None has no vote and never wins. If
# answers tie, the one that came first wins.
#
# <details><summary>Hint</summary>
#
# `Counter` counts, and `most_common(1)` gives the first of equally frequent answers. What if no completion has an answer?
#
# </details>

# %%
def majority_vote(answers):
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
print(checks_06.majority_vote(majority_vote))

# %% [markdown]
# The worked solution is in [solutions/06b_judges_luck_ablations.ipynb](solutions/06b_judges_luck_ablations.ipynb).
#
# How often do they err on what $M_0$ writes? *Random labels* shuffle the rewards of each question. **Predict** the share of
# correct completions among the chosen ones.

# %% tags=["nbval-ignore-output"]
N_QUESTIONS, N = (40, 8) if PROFILE == "smoke" else (100, 16)
task = tasks.get(profile.task)
asked, graded, tokenizer = helpers_06.graded_completions(profile, task, N_QUESTIONS, N)
print(f"{len(graded)} completions, {sum(graded['correct']) / len(graded):.0%} correct")

def quality(reward, graded=graded):
    """Completions that a reward chooses, and the share of them that is correct."""
    chosen = methods.reward(graded, reward)["reward"]
    correct = [truth for truth, value in zip(graded["correct"], chosen) if value]
    return {"chosen": len(correct), "of them correct (%)": 100 * sum(correct) / max(1, len(correct))}

judges = ("irpo", "self_consistency", "self_rewarding", "shuffled")
judged = pd.DataFrame({helpers_06.NAMES[name]: quality(methods.get(name).reward) for name in judges}).T
judged.round(1)

# %% tags=["remove-cell"]
assert judged.iloc[0]["of them correct (%)"] == 100

# %% [markdown]
# A vote improves with the number of voters:

# %% tags=["nbval-ignore-output"]
ks = [k for k in (1, 2, 4, 8, 16) if k <= N]
votes = [quality(baselines.by_majority, graded.filter(lambda row: row["sample"] < k)) for k in ks]
grown = pd.DataFrame({"k": ks, "metric": "correct", "value": [vote["of them correct (%)"] / 100 for vote in votes]})
figure = figures.sweep(grown, "k", "Completions that vote", "Correct among the chosen (%)")
figure

# %% tags=["remove-cell"]
assert len(plots.alt_text(figure)) > 40

# %% [markdown]
# With one voter every answer wins. With more voters the vote improves without any gold answer: incorrect answers
# scatter, and correct ones agree.
#
# A model can also judge itself, by likelihood or *asked in words*: is the answer correct, yes or no? `value` is how often a
# correct completion scores above an incorrect one of the same question. Guessing gives 0.5. `length` is a control: longer
# completions score higher.

# %%
marks = helpers_06.read("judges")
marks["0.5 excluded"] = np.where((marks.low > 0.5) | (marks.high < 0.5), "yes", "no")
marks.drop(columns="run").round(2)

# %% [markdown]
# Asked in words, no difference from guessing is resolved. The likelihood ranks the completions of the seed model well, and so
# does length alone. (In the first table it had to choose half of them, so at most 36 % could be correct.) For SmolLM2-135M
# nothing is resolved.
#
# ### What do these rewards teach?
#
# Each method ran on the first (seed) model at its tuned learning rate, with three seeds that Iterative RPO shares. *Gold vs.
# sampled (SPIN-style)* rejects every completion and chooses the gold solution. *GRPO* uses no pairs: it compares the reward
# of each completion with the mean reward of its question ([Shao et al. 2024](https://arxiv.org/abs/2402.03300)).

# %% tags=["nbval-ignore-output"]
means = helpers_06.read("comparison_mean").query("metric == 'greedy' and iteration == 4")
three = means[means.seeds == 3].sort_values("difference", ascending=False)
figures.differences(three, [helpers_06.NAMES[name] for name in three.method])

# %% tags=["remove-cell"]
assert set(three.against) == {"irpo"}

# %% [markdown]
# Without gold answers in training the vote's difference from Iterative RPO at $M_4$ is not resolved, nor is that of GRPO. The
# other two are worse. What is the reward worth? The control shuffles the labels within each question:

# %%
control = helpers_06.read("comparison_mean").query("metric == 'greedy' and method == 'shuffled'")
for row in control.itertuples():
    print(f"random labels, M{row.iteration}: {100 * row.value:.1f} % ({100 * row.low:.1f} to {100 * row.high:.1f}), {row.seeds} seeds")

# %% [markdown]
# At 2e-5, its tuned learning rate, mean accuracy falls in every iteration. So the gain comes from the reward, not from
# training as such.

# %% [markdown]
# ## 2 When do rejected completions teach?
#
# RFT uses chosen completions alone. If it matches Iterative RPO, the rejected ones taught nothing more. The next study tries
# cases in which they might: few samples, temperature 1.5, few questions, a late start (from $M_3$), and *luck*. In
# "lucky" one incorrect answer in four counts as correct. In "choices" the question has four options, and the grader takes the
# one nearest to the model's answer.
#
# **Predict**: in which of these cases do pairs beat RFT?

# %% tags=["nbval-ignore-output"]
regimes = helpers_06.final(helpers_06.read("regimes_mean").query("method != 'star'"))
shown = regimes.factor.replace({"usual": "no change"})
labels = [f"{name} (M{row.iteration}, {row.seeds} seeds)" for name, row in zip(shown, regimes.itertuples())]
figure = figures.differences(regimes, labels)
figure

# %% tags=["remove-cell"]
assert "lucky" in plots.alt_text(figure)

# %%
for row in regimes.itertuples():
    low, high = 100 * row.difference_low, 100 * row.difference_high
    word = "better" if low > 0 else "worse" if high < 0 else "not resolved"
    print(f"{row.factor:14} pairs − RFT {100 * row.difference:+6.1f} ({low:+.1f} to {high:+.1f})  {word}")

# %% [markdown]
# Pairs win, by a wide margin, in "lucky" and "choices" alone: there luck chooses incorrect completions. Why? Count
# completions without working on both sides of such pairs.

# %% tags=["nbval-ignore-output"]
def pairs_of(reward):
    return pairs.build_pairs(methods.reward(graded, reward), profile.k_pairs)[0]

def bare(texts):
    """Share of completions that are one line: an answer without working."""
    return np.mean([len(text.strip().splitlines()) == 1 for text in texts])

for method in (methods.get("irpo"), lucky.LUCKY["irpo_lucky"]):
    made = pairs_of(method.reward)
    print(f"{method.title:30} without working: {bare(made['chosen']):.0%} of chosen, {bare(made['rejected']):.0%} of rejected")

# %% tags=["remove-cell"]
assert len(made)

# %% [markdown]
# With luck, about half of the chosen completions are answers without working. RFT copies them. In pairs such answers are
# common on *both* sides, and more so among the rejected. So rejecting them still favours the working. With few samples or
# few questions pairs are worse than RFT. The other cases are not resolved. RFT also has the higher tuned learning rate, and
# cases with less data have fewer steps.
#
# On the second model of [notebook 06](06_baselines_and_ablations.ipynb) both methods have the same steps and the same learning
# rate. *Half* means 80 of the 160 questions. **Predict**: in which case do pairs help now?

# %%
verdicts = helpers_06.claims("lesson_verdicts")
helpers_06.claims_table(verdicts[verdicts.group == "regimes"])

# %% [markdown]
# Without luck no gain from pairs is resolved, and all means are below RFT. At 3e-4 no difference is resolved. At 1e-3 (β =
# 0.3) RFT is better in five of eight rows. With luck all means are above RFT, and no difference is resolved. So in this
# section only luck on the first model makes pairs better than RFT.

# %% [markdown]
# ## 3 What happens after four iterations?
#
# On GSM8K the paper stops at $M_4$. Its last gain is half a point. **Predict**: does accuracy stay, rise or fall?

# %% tags=["nbval-ignore-output"]
eight_more = helpers_06.read("eight_iterations")
runs_of_three = helpers_06.read("comparison").query("seed < 3")
first_four = runs_of_three[runs_of_three.method.isin(eight_more.method)]
whole = pd.concat([first_four, eight_more[eight_more.iteration >= 4]])
whole = whole.drop_duplicates(["method", "seed", "iteration", "metric", "k"]).sort_values("iteration", kind="stable")
figure = helpers_06.eight_iterations(whole)
figure

# %% tags=["remove-cell"]
assert "M_8" in plots.alt_text(figure)

# %%
kept = ["greedy", "kl_to_previous", "one_step_apart"]
table = whole[whole.metric.isin(kept)].pivot_table(index=["metric", "method"], columns="iteration", values="value")
print("means over seeds", *sorted(set(eight_more.seed)))
at_m8 = helpers_06.read("eight_iterations_mean").query("metric == 'greedy' and iteration == 8 and method != 'irpo'")
for row in at_m8.itertuples():
    ends = f"{100 * row.difference:+.1f} ({100 * row.difference_low:+.1f} to {100 * row.difference_high:+.1f})"
    print(f"M8, {helpers_06.NAMES[row.method]} minus Iterative RPO: {ends} points")
table.rename(index=helpers_06.NAMES, columns="M{}".format).round(2).astype(object).fillna("")

# %% [markdown]
# Iterative RPO falls: its $M_8$ is 19 points below RFT (9 to 29), which stays near 90 % from $M_2$ on. DPO goes down and up.
# The KL of an iteration first shrinks. Then it grows with pairs and stays small with RFT. The learning rates were tuned for
# two iterations; with pairs they may be too high for eight.
#
# `one_step_apart` is the share of pairs that differ in one line. It rises with every method. Early pairs often compare
# working with a bare answer, and later ones more often two calculations. On such pairs DPO can lower chosen and rejected
# completions together ([Pal et al. 2024](https://arxiv.org/abs/2402.13228)). Tune for the number of iterations that you need,
# and stop with patience 2 ([notebook 05](05_iterations.ipynb)).
#
# On the second model every method has the learning rate that was best after four iterations.

# %% tags=["nbval-ignore-output"]
lesson, tuned = helpers_06.of_second_model(), helpers_06.tuned_methods()
figure = helpers_06.lesson_accuracy(lesson, helpers_06.of_eight_iterations(tuned))
figure

# %% tags=["remove-cell"]
assert "M8" in plots.alt_text(figure)

# %%
helpers_06.claims_table(verdicts[verdicts.group == "eight iterations"])

# %% [markdown]
# Only DPO without NLL (β = 3) has a resolved gain from $M_4$ to $M_8$. At $M_8$ no difference between methods is resolved.

# %% [markdown]
# ## 4 Does the best β depend on the length of completions?
#
# The paper uses β = 0.1 with longer completions. The gradient of a pair falls to a tenth at δ ≈ 3/β = 30 nats. A chosen
# completion can gain at most $-\log M_0(w|x)$ nats. A short one has few nats, so δ may never get that far. The hypothesis:
# short completions need a larger β.
#
# A third model, *plain*, tests it. It has the misconceptions of the second one, and writes equations without words
# ([script](../scripts/make_misconceptions_model.py)).
#
# **Predict**: on which of the two models does a larger β help more?

# %% tags=["nbval-ignore-output"]
plain = helpers_06.of_second_model(model="plain")
panels = {"misconceptions model": lesson, "plain model": plain}
panels = {f"{name}, learning rate 1e-3\n{helpers_06.nats(means):.0f} nats per completion": (means, 1e-3)
          for name, means in panels.items()}
figure = helpers_06.beta_map(panels)
figure

# %% tags=["remove-cell"]
assert "nats" in plots.alt_text(figure)

# %%
of_beta = verdicts[(verdicts.group == "beta") & verdicts.claim.str.contains("0.001, M4")]
helpers_06.claims_table(of_beta[of_beta.claim.str.contains("misconceptions|plain|fewer nats")])

# %%
helpers_06.how_far(plain)

# %% [markdown]
# The hypothesis gets no support. The means of β = 1 and 3 are above those of 0.1 and 0.3 on both models, and whether β = 1
# helps more on one of them is not resolved. δ of $M_1$ is similar on both ([06](06_baselines_and_ablations.ipynb)). With β =
# 0.1 it even exceeds the third model's 2 nats per completion: chosen log-probabilities stop at 0, and rejected ones can fall
# without limit. On the first model (5 nats) β = 1 leads as well, which is resolved for Iterative RPO alone
# ([results](../docs/results/second_model.md)).
#
# So compare 3/β with the δ that training reaches, not with the length of completions.

# %% [markdown]
# ## 5 Which settings matter?
#
# Each row below changes *one* setting of Iterative RPO: two iterations, 300 questions, three seeds, paired with the base run.
#
# **Predict**: how many of the intervals exclude 0?

# %% tags=["nbval-ignore-output"]
ablations = helpers_06.final(helpers_06.read("ablations_mean"))
labels = [helpers_06.ablation_in_words(row.factor, row.level) for row in ablations.itertuples()]
figure = figures.differences(ablations, labels)
figure

# %% tags=["remove-cell"]
assert set(ablations.seeds) == {3}

# %%
clear = ablations[(ablations.difference_low > 0) | (ablations.difference_high < 0)]
print(f"{len(ablations)} intervals, {len(clear)} exclude 0; about {0.05 * len(ablations):.0f} would do so by luck")
for row in clear.itertuples():
    print(f"{row.factor} {row.level}: {100 * row.difference:+.1f} ({100 * row.difference_low:+.1f} to {100 * row.difference_high:+.1f})")

# %% [markdown]
# `k_pairs` = 1 has a quarter of the pairs and so a quarter of the steps. It measures the amount of training, not the quality
# of pairs. `keep_pairs` adds the pairs of earlier iterations. Its interval ends close to 0; luck may cause one such in 21
# rows. The rest is not resolved.

# %% [markdown]
# ## 6 A method of your own
#
# A reward is a function of the rows of one question (`extracted`, `correct`, `logprob`, `n_tokens` and more). It returns a
# float per row. Suppose you like short completions: the shortest correct one is chosen. **Predict** what $M_1$ learns.

# %%
def shortest_correct(rows):
    """Reward 1 for the first of the shortest correct completions, 0 for all others."""
    correct = [i for i, row in enumerate(rows) if row["correct"]]
    best = min(correct, key=lambda i: rows[i]["n_tokens"], default=None)
    return [float(i == best) for i in range(len(rows))]

methods.METHODS["shortest"] = methods.Method("Shortest correct completion", "an example", reward=shortest_correct)

# %% tags=["nbval-ignore-output"]
is_correct = {(row["id"], row["sample"]): row["correct"] for row in graded}
for name in ("irpo", "shortest"):
    made = pairs_of(methods.get(name).reward)
    tokens = np.mean([len(ids) for ids in made["chosen_ids"]])
    rejected_correct = np.mean([is_correct[key] for key in zip(made["id"], made["rejected_sample"])])
    print(f"{methods.get(name).title:28} chosen: {tokens:.1f} tokens, {bare(made['chosen']):.0%} without working; "
          f"rejected: {rejected_correct:.0%} correct")

# %% tags=["remove-cell"]
assert rejected_correct > 0

# %% [markdown]
# Chosen completions are slightly shorter, but most show working: $M_1$ probably learns to show it. Correct completions
# are *rejected*: what a reward does not choose, it rejects. Train on chosen ones alone (`settings=methods.SFT`) if you do
# not want that.

# %% [markdown]
# ### Exercise 6b.2: a clear majority
#
# **Goal**: a reward without gold answers that abstains rather than errs. **Difficulty**: 2 of 3. **Time**: 15 minutes.
#
# Write `clear_majority(rows)`: rows with the most frequent answer get 1.0 if *more than half of all completions* give it.
# Completions without an answer count among all. Every other row gets 0.0. Do not use `correct`. Then make the entry
# `CLEAR`, a `methods.Method` with a title, a source and this reward, trained like Iterative RPO.
#
# <details><summary>Hint</summary>
#
# An answer that more than half give is always the most frequent one, and ties cannot happen. `Method` takes from
# Iterative RPO what you leave out.
#
# </details>

# %%
CLEAR = None
# SOLUTION
def clear_majority(rows):
    votes = Counter(row["extracted"] for row in rows if row["extracted"] is not None)
    return [float(votes[row["extracted"]] > len(rows) / 2) for row in rows]

CLEAR = methods.Method("A clear majority is chosen", "after Prasad et al. 2024", reward=clear_majority)
# STUB
# # your turn: def clear_majority(rows), and CLEAR = methods.Method(...)
# END

# %%
print(checks_06.clear_majority_method(CLEAR))

# %% [markdown]
# The worked solution is in [solutions/06b_judges_luck_ablations.ipynb](solutions/06b_judges_luck_ablations.ipynb). Compare
# both votes on the completions of section 1.

# %% tags=["nbval-ignore-output"]
rewards = {"majority": baselines.by_majority} | ({"clear majority": CLEAR.reward} if CLEAR else {})
compared = pd.DataFrame({name: quality(reward) for name, reward in rewards.items()}).T
compared.round(1)

# %% tags=["remove-cell"]
assert len(compared) >= 1

# %% [markdown]
# Solve exercise 6b.2 to see it: a clear majority chooses fewer completions, and a larger share is correct.
#
# ### Open exercise: run it
#
# **Add** your own entry to `entries` and run one small iteration. **Predict** the length of its completions. **Argue**
# whether a difference in accuracy could be resolved with so few questions.

# %%
n = 24 if PROFILE == "smoke" else 64
small = dict(iterations=1, n_questions=n, n_samples=8, k_pairs=2, batch_size=4, learning_rate=5 * profile.learning_rate,
             eval_split="validation", n_eval_questions=n, eval_samples=2, eval_samples_ends=2, gold=False)
folder = Path(tempfile.mkdtemp())

def run_small(name, entry):
    """One small iteration of an entry, or the reason why it gives no pairs."""
    methods.METHODS[name] = entry
    try:
        with contextlib.redirect_stdout(io.StringIO()):      # without the log of the run
            rows = runs.run(profiles.get(PROFILE, method=name, **small), folder / name, progress=False)
    except UserError as error:
        return str(error).split(":")[0]
    made = pd.DataFrame(rows).set_index(["metric", "iteration"])
    tokens = made.loc["mean_tokens"].value
    m1 = 100 * made.loc[("greedy", 1), ["value", "low", "high"]].astype(float)
    return f"{tokens[0]:.1f} -> {tokens[1]:.1f} tokens; M1 {m1['value']:.0f} % ({m1['low']:.0f} to {m1['high']:.0f})"

# %% tags=["nbval-ignore-output"]
# SOLUTION
entries = {"irpo": methods.get("irpo"), "shortest": methods.get("shortest"), "clear_majority": CLEAR}
# STUB
# entries = {"irpo": methods.get("irpo")}      # your turn: add yours
# END
for name, entry in entries.items():
    print(f"{entry.title:30}{run_small(name, entry)}")

# %% tags=["remove-cell"]
assert len(entries) >= 1

# %% [markdown]
# Such a run shows that an entry works. It cannot rank methods: look at the width of the intervals. A reward that
# abstains needs many samples: with few per question it leaves few pairs or none.

# %% [markdown]
# ## What you have learnt
#
# - A reward decides what is chosen *and* what is rejected. Measure both before you train.
# - A vote finds correct answers without gold ones if incorrect answers scatter.
# - On the first model rejected completions helped where luck chose incorrect ones.
# - Among twenty ablations expect one interval that excludes 0 by luck.
#
# **Try**: the reward "longest correct completion". What does $M_1$ learn?
#
# **Recall**
#
# 1. Why can a majority vote choose completions of a question that the model cannot solve?
# 2. With random labels, why is a larger share correct among the chosen completions than overall?
# 3. Twenty ablations, one interval barely excludes 0. What do you do before you report it?
#
# <details><summary>Answers</summary>
#
# 1. Nothing contradicts the vote: some answer is always the most frequent.
# 2. Questions with many correct completions get many chosen ones.
# 3. Run it again with other seeds.
#
# </details>
#
# **Next**: [07 · Real models on one GPU](07_real_models_on_one_gpu.ipynb).
