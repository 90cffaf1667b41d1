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
# # 06 · Is it the method?
#
# **What you will be able to do**
#
# - tune every method of a comparison, and say how firm the choice is;
# - compare two methods with differences that are paired by seed and question;
# - give each claim of a paper one of four verdicts;
# - say where the NLL term matters in two miniature models, and where its effect is not resolved.
#
# | | `smoke` | `cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook | 10 seconds on one core | 10 seconds on one core | depends on the model |
#
# **Needs**: the packages of this repository (in Colab: [`docs/colab.md`](../docs/colab.md)). The runs took hours. Their
# results are in `figures/`, each with the command that made it, and this notebook reads them.
#
# **Before this**: [05 · Iterations](05_iterations.ipynb).

# %% tags=["nbval-ignore-output"]
import os, sys
import numpy as np
import pandas as pd
sys.path[:0] = [".", ".."]                     # checks_06.py and helpers_06.py are next to the notebooks
sys.path += ["../scripts", "../../scripts"]    # the package `studies`
import checks_06, helpers_06
from irpo_utils import evaluation, methods, models, plots, profiles
from irpo_utils.ops.cli import quiet_libraries
from studies.significance import mcnemar, seed_and_question_interval

quiet_libraries()
pd.set_option("display.max_colwidth", None)
PROFILE = os.environ.get("IRPO_PROFILE", "cpu")     # the one setting: "cpu", "smoke", or a GPU profile
print("profile", PROFILE, "· device", models.default_device(), "· seed", profiles.get(PROFILE).seed)

# %% [markdown]
# ## 1 What is compared?
#
# Notebook 05 raised the accuracy of a small model. Was it the method, or would any training have done it? To find out,
# replace one part and keep the rest. In `irpo_utils.methods` a method is one entry that says how it differs from
# Iterative RPO.

# %%
def described(name):
    method = methods.get(name)
    settings = [f"{key} = {value}" for key, value in method.settings.items() if key != "iterations"]
    return {"settings": ", ".join(settings) or "alpha = 1",
            "trains on": "completions of M_t" if method.samples else "gold solutions"}

shown = ("irpo", "iterative_dpo", "star", "sft_gold")
pd.DataFrame({helpers_06.NAMES[name]: described(name) for name in shown}).T

# %% [markdown]
# **DPO without NLL** sets α to 0. **RFT**, rejection-sampling fine-tuning, is SFT on the chosen completions. The paper's
# table calls it STaR, but [STaR](../docs/glossary.md#star) retrains from $M_0$ in each iteration and shows the model the
# answers of questions that it fails. **SFT on gold solutions** uses no completions at all.
#
# The $M_0$ of notebooks 00 to 05 makes the comparison too easy: any training that restores the working succeeds. In the
# paper, chosen and rejected completions are both chains of thought. So we use a second miniature model ([model
# card](../docs/model_card_misconceptions.md)). It always shows its working and makes typical pupils' errors, such as a
# forgotten carry.
#
# Everything else is equal: $M_0$, questions, adapter, and 20 optimiser steps per iteration. Two settings must *not* be equal:
# each loss needs its own learning rate and β.

# %% [markdown]
# ## 2 Was every method tuned?
#
# A comparison needs tuned baselines. We tuned each method on the validation accuracy of $M_4$: at least three learning rates,
# one seed. Iterative RPO also had a choice of four β, DPO of five. The table has the best β at each learning rate. Both had
# only β = 0.3 at 3e-3, and Iterative RPO also at 1e-4.
#
# **Predict**: which loss tolerates a higher learning rate, DPO without NLL or SFT?

# %%
tuning = helpers_06.tuning_of_second_model()
best_beta = tuning.loc[tuning.groupby(["method", "learning_rate"]).value.idxmax()]
best_beta.pivot(index="method", columns="learning_rate", values="value").round(1)

# %% tags=["nbval-ignore-output"]
figure = helpers_06.tuning_curves(best_beta)
figure

# %% tags=["remove-cell"]
assert "RFT" in plots.alt_text(figure)

# %% [markdown]
# SFT does: at 3e-3 DPO without NLL (β = 0.3) ends at 7.3 %, and both SFT methods are above 83 %.

# %% [markdown]
# ### Exercise 6.1: choose a learning rate
#
# **Goal**: choose on validation, and notice when the search was too narrow. **Difficulty**: 1 of 3. **Time**: 10 minutes.
#
# `accuracy` maps each learning rate to a validation accuracy, or to None if that run diverged. Return two things: the
# learning rate with the highest accuracy (the smaller one if two are equal), and whether it is the smallest or largest
# learning rate *that was tried*.
#
# <details><summary>Hint</summary>
#
# Ignore None values when you choose. Their learning rates still count as tried. `max` with a `key` that is a tuple,
# `(accuracy, -learning_rate)`, settles ties.
#
# </details>

# %%
def choose_learning_rate(accuracy):
    # SOLUTION
    finished = [rate for rate, value in accuracy.items() if value is not None]
    best = max(finished, key=lambda rate: (accuracy[rate], -rate))
    return best, best in (min(accuracy), max(accuracy))
    # STUB
    # return ...      # your turn: (learning rate, True or False)
    # END

# %%
print(checks_06.choose_learning_rate(choose_learning_rate))

# %% [markdown]
# The worked solution is in [solutions/06_baselines_and_ablations.ipynb](solutions/06_baselines_and_ablations.ipynb). How firm
# is the choice? Compare the best learning rate with all others, question by question ([McNemar's
# test](../docs/glossary.md#mcnemar-test)).

# %%
for method, tried in best_beta.groupby("method"):
    best, *others = tried.sort_values("value", ascending=False).itertuples()
    edge = best.learning_rate in (tried.learning_rate.min(), tried.learning_rate.max())
    tests = (f"{other.learning_rate:g}: p = {mcnemar(best.answers, other.answers)['p']:.2g}" for other in others)
    print(f"{method:22} {best.learning_rate:<6g} {'edge' if edge else 'inside':7} against {', '.join(tests)}")

# %% [markdown]
# No choice is at the edge. Of the second-best learning rates only DPO's differs, and barely (p = 0.047). β is no
# firmer: the choices, β = 3 for DPO and β = 0.3 for Iterative RPO, each led the second-best β by only two of 300 questions
# ([runs](../figures/lesson_runs.jsonl)).

# %% [markdown]
# ## 3 Which method is ahead?
#
# **Predict** the order of the four methods after one iteration. In the paper's
# [Table 1](https://arxiv.org/html/2404.19733v3#S3.T1) it is Iterative RPO 73.1, RFT 65.2, SFT on gold solutions 63.5 and
# DPO without NLL 61.8 %.

# %% tags=["nbval-ignore-output"]
lesson, tuned = helpers_06.of_second_model(), helpers_06.tuned_methods()
helpers_06.lesson_accuracy(lesson, tuned)

# %%
tuned.drop(columns="trial")

# %% [markdown]
# Here SFT on gold solutions is first after one iteration. The table has $M_4$ and the iteration with the best validation
# accuracy in each seed. SFT on gold solutions and Iterative RPO on $M_0$'s completions do not iterate: their $M_t$ is $M_0$
# after 20t steps. [GRPO](../docs/glossary.md#grpo), a method of reinforcement learning, has no pairs.
#
# ### Which differences are real?
#
# Most intervals above overlap, which decides nothing. All methods answer the same questions, and those with pairs start from
# the same completions of $M_0$ in each seed. So subtract question by question and seed by seed. The result is a matrix, one
# row per seed and one column per question. A new experiment would have other questions *and* other seeds, so the
# [bootstrap](../docs/glossary.md#bootstrap) draws both.
#
# **Predict**: on questions that can be solved, b gains 0.30, 0.10 and -0.06 in three seeds. Is b better?

# %%
rng = np.random.default_rng(1)
hard = rng.random(40) < 0.5                            # of 40 questions: those that neither method solves
gain_of_b = np.array([[0.30], [0.10], [-0.06]])        # in each seed
a = np.tile(np.where(hard, 0.0, 0.7), (3, 1))          # (seeds, questions)
b = np.where(hard, 0.0, 0.7 + gain_of_b)

each = [evaluation.bootstrap_mean(x.mean(0)) for x in (a, b)]
print("unpaired:                     ", *(f"{x:.2f} ({low:.2f} to {high:.2f})" for x, low, high in each), sep="  ")
print("paired, questions only:         {:+.3f} ({:+.3f} to {:+.3f})".format(*evaluation.bootstrap_mean((b - a).mean(0))))
print("paired, seeds and questions:    {:+.3f} ({:+.3f} to {:+.3f})".format(*seed_and_question_interval(b - a)))

# %% [markdown]
# Unpaired, the hard questions hide the difference. Paired by question, b is ahead *on average over these seeds*. But in one
# seed a is ahead. If the bootstrap also draws seeds, the interval includes 0: "not resolved", which does not mean equal.

# %% [markdown]
# ### Exercise 6.2: a paired difference
#
# **Goal**: a difference with its interval, and the word that it allows. **Difficulty**: 2 of 3. **Time**: 15 minutes.
#
# `paired(a, b)` takes two lists with one list per seed: the share of correct completions of each question. Return what b
# gains over a, the low and the high end of its 95 % interval over seeds and questions, and a word. The word is `"better"`
# if the whole interval is above zero, `"worse"` if it is below, and otherwise `"not resolved"`.
#
# <details><summary>Hint</summary>
#
# Make arrays with `np.array`, subtract, and give the matrix to `seed_and_question_interval`. It returns (difference, low,
# high).
#
# </details>

# %%
def paired(a, b):
    # SOLUTION
    difference, low, high = seed_and_question_interval(np.array(b) - np.array(a))
    word = "better" if low > 0 else "worse" if high < 0 else "not resolved"
    return difference, low, high, word
    # STUB
    # return ...      # your turn: (difference, low, high, word)
    # END

# %%
print(checks_06.paired(paired))

# %% [markdown]
# The worked solution is in [solutions/06_baselines_and_ablations.ipynb](solutions/06_baselines_and_ablations.ipynb). Does
# Iterative RPO beat RFT? The right panel shows the first model, where RFT has three times the learning rate of Iterative RPO.

# %% tags=["nbval-ignore-output"]
verdicts, first_model = helpers_06.claims("lesson_verdicts"), helpers_06.claims()
panels = {"Iterative RPO − RFT, second model": helpers_06.per_iteration(verdicts, "Iterative RPO beats RFT (M"),
          "Iterative RPO − RFT, first model": helpers_06.per_iteration(first_model, "Iterative RPO beats RFT (M", "600 questions")}
helpers_06.gains(panels)

# %% tags=["remove-cell"]
assert all(list(rows.iteration) == [1, 2, 3, 4] for rows in panels.values())

# %%
for name, rows in panels.items():
    for row in rows.itertuples():
        print(f"{name}, M{row.iteration}: {helpers_06.with_interval(row):24} above 0 in {row.seeds_above_zero} of {row.seeds} seeds")

# %% [markdown]
# On the second model RFT is ahead at $M_2$ and $M_3$ in every seed. At $M_1$ and $M_4$ the difference is not resolved. On the
# first model Iterative RPO is ahead at $M_1$, and later nothing is resolved.

# %% [markdown]
# ## 4 Which of the paper's claims hold?
#
# Our interval can say four things about a claim of the paper. *Agrees* and *disagrees* concern its direction, not its size:
#
# | verdict | the 95 % interval |
# |---|---|
# | agrees | excludes 0, on the paper's side |
# | disagrees | excludes 0, on the other side |
# | rules out an effect of the paper's size | includes 0, and does not reach the paper's difference |
# | not resolved | includes 0 and reaches the paper's difference |

# %% [markdown]
# ### Exercise 6.3: four verdicts
#
# **Goal**: let code judge a claim. **Difficulty**: 2 of 3. **Time**: 10 minutes.
#
# `verdict(low, high, paper)` takes the ends of an interval and the paper's difference, all in points. `paper` is never 0
# and may be negative. Return a verdict, spelled as in the table. An interval that touches 0 includes it.
#
# <details><summary>Hint</summary>
#
# If `paper` is negative, change all signs: the interval becomes `(-high, -low)`.
#
# </details>

# %%
def verdict(low, high, paper):
    # SOLUTION
    if paper < 0:
        low, high, paper = -high, -low, -paper
    if low > 0:
        return "agrees"
    if high < 0:
        return "disagrees"
    return "rules out an effect of the paper's size" if high < paper else "not resolved"
    # STUB
    # return ...      # your turn: one of the four verdicts
    # END

# %%
print(checks_06.verdict(verdict))

# %% [markdown]
# The worked solution is in [solutions/06_baselines_and_ablations.ipynb](solutions/06_baselines_and_ablations.ipynb).
#
# **Predict**: how many claims get the verdict "agrees"? The figure has the claims for which the paper has a number. Where
# `paper` is empty in the table, the claim is ours: it *holds*, *the opposite holds*, or it is not resolved.

# %% tags=["nbval-ignore-output"]
compared = verdicts[verdicts.group == "comparison"]
figure = helpers_06.forest(compared[np.isfinite(compared.paper)])
figure

# %% tags=["remove-cell"]
assert "not resolved" in plots.alt_text(figure)

# %%
print(compared.verdict[compared.verdict != ""].value_counts().to_string(), "\n")
helpers_06.claims_table(compared)

# %% [markdown]
# **The rise** agrees with the paper in three of four iterations. **New completions** beat further steps on those of $M_0$,
# also at equal settings.
#
# **RFT**: at $M_1$ the interval rules out a lead of the paper's size for Iterative RPO. A possible reason: here a correct
# step competes with *one* typical error, so raising the correct step already lowers the error. A model with several plausible
# errors per step would test this. **SFT on gold solutions** is ahead at $M_1$, which disagrees with the paper. (All settings
# were tuned for $M_4$.)
#
# **DPO without NLL** is behind at $M_1$, and the verdict reads "agrees". But β differs too: at equal β and 3e-4 the gain at
# $M_1$ is about 1 point or less (section 6).
#
# ### Does it depend on the model and the setting?
#
# Here are the paper's claims about $M_1$, and the NLL term at $M_4$, on the first model.

# %%
about_m1 = first_model.claim.str.contains(r"\(M1|NLL term helps \(M4") & (first_model.verdict != "")
helpers_06.claims_table(first_model[about_m1])

# %% [markdown]
# Yes. With 600 questions Iterative RPO is ahead of RFT at $M_1$; with 150 it is 22 points behind. RFT also leads with N = 3
# and at temperature 1.5. A possible reason: with fewer steps, RFT's higher learning rate counts more. The NLL term's interval
# at $M_1$, -1.0 to 1.2 points, rules out the paper's size; at $M_4$ it is 1 to 31. [All
# claims](../figures/lesson_claims.csv), [all methods](../docs/results/comparison.md).

# %% [markdown]
# ## 5 How did the model change?
#
# **Predict** which method moved furthest from $M_0$ (dots: $M_0$ to $M_4$, on validation).

# %% tags=["nbval-ignore-output"]
figure = helpers_06.accuracy_against_kl()
figure

# %% tags=["remove-cell"]
assert "GRPO" in plots.alt_text(figure)

# %% [markdown]
# SFT on gold solutions moved furthest. From $M_2$ on the order of RFT and Iterative RPO differs between seeds
# ([runs](../figures/lesson_runs.jsonl)).
#
# What does the rise consist of?

# %% tags=["nbval-ignore-output"]
followed = helpers_06.of_second_model("lesson_misconceptions")
figure = helpers_06.misconceptions(followed, tuned)
figure

# %% tags=["remove-cell"]
assert "forgets the carry" in plots.alt_text(figure)

# %% [markdown]
# All five errors become rarer from $M_0$ to $M_4$, mostly in the first two iterations. No label marked the incorrect
# line: the reward sees only the final answer.

# %% [markdown]
# ## 6 When does the NLL term matter?
#
# In the paper the NLL term gains 2 to 11 points. [Lanchantin et al.](https://arxiv.org/abs/2506.21495) find no benefit. So the
# question is not *whether* but *when*. First we vary learning rate and α, at β = 0.3 on the second model.
#
# **Predict**: in which corner of the map does training fail?

# %% tags=["nbval-ignore-output"]
figure = helpers_06.lesson_map()
figure

# %% tags=["remove-cell"]
assert "α = 0 at 0.003" in plots.alt_text(figure)

# %%
helpers_06.claims_table(verdicts[verdicts.group == "map"])

# %% [markdown]
# $M_0$ is at 40 %. At 3e-4 no effect of the term is resolved. At 3e-3 training ends at 5 % without it, at 37 % with α = 1,
# and at 55 % with α = 3. At 1e-3 the means also rise with α, but these differences are not resolved. RFT, which keeps only
# the NLL, is ahead of α = 3 at the two higher learning rates. So at 3e-3 the NLL term limits the damage. Whether it also
# raises the best accuracy is not resolved.
#
# Now β. **Predict**: at which β does the NLL term help?

# %% tags=["nbval-ignore-output"]
helpers_06.beta_map({f"learning rate {rate:g}": (lesson, rate) for rate in (3e-4, 1e-3)})

# %%
nll_term = verdicts[(verdicts.group == "NLL term") & ~verdicts.claim.str.contains("model")]
helpers_06.claims_table(nll_term[nll_term.claim.str.contains("M1")])

# %% [markdown]
# At $M_4$ no gain of the term is resolved at these two rates ([verdicts](../figures/lesson_verdicts.csv)). The table has
# $M_1$. At 3e-4 the mean gain of the term at $M_1$ is at most about 1 point. At 1e-3 the NLL term helps at $M_1$, by 19
# points with β = 0.1 and by 12 with β = 0.3, which agrees with the paper. With β = 1 and 3 the interval rules out a gain of
# the paper's size. At 1e-3 we also compared β = 1 and 3 with 0.1, for both methods at $M_4$. One of the four differences is
# resolved: Iterative RPO ends 26 points higher with β = 3.
#
# In [notebook 04](04_dpo_nll_training.ipynb) the DPO gradient of a pair falls to a tenth at δ ≈ 3/β. How far did $M_1$ of
# Iterative RPO get?

# %%
helpers_06.how_far(lesson)

# %% [markdown]
# At 1e-3 and β = 0.1 no pair is past 3/β = 30 nats, so β does not limit the step. With a large β the gradient of most pairs
# fades early, and no gain of the term is resolved. At 3e-4 and β up to 1 few pairs are past 3/β: the learning rate limits the
# step. A large β also makes the NLL term relatively weaker. Ten times its weight was tested only at 3e-4: there it gains 1
# point at $M_1$. [06b](06b_judges_luck_ablations.ipynb) asks whether the length of completions matters.

# %% [markdown]
# ## 7 What happens to the log-probabilities?
#
# The paper relates its table to curves: there SFT also raises rejected completions (figure 2), and DPO without NLL lowers
# *chosen* ones (figure 3). Here are both for the second model, on held-out pairs.
#
# **Predict** for RFT, which never sees rejected completions: will their log-probability fall, stay or rise?

# %% tags=["nbval-ignore-output"]
figure = helpers_06.lesson_log_probabilities(helpers_06.read("lesson_log_probabilities"))
figure

# %% tags=["remove-cell"]
assert "rejected" in plots.alt_text(figure)

# %%
helpers_06.claims_table(verdicts[verdicts.group == "log-probabilities"])

# %% [markdown]
# At 3e-4 chosen completions rise at $M_1$ with the NLL term. They also rise without it, which disagrees with figure 3. At
# 1e-3 with β = 0.1 they fall with and without the term (in figure 3 only without it). Rejected ones fall more, then go up and
# down. With RFT rejected completions *fall* in all seeds, which disagrees with figure 2. The reason may be that of section 4:
# correct and incorrect steps compete.

# %% [markdown]
# ## What you have learnt
#
# - Tune every method, also at the iteration that you compare, and look for choices at the edge.
# - Pair by seed and question. "Not resolved" does not mean equal.
# - A claim gets one of four verdicts. "Rules out an effect of the paper's size" is stronger than "not resolved".
# - On the second model gains from the NLL term (α = 1) are resolved at 1e-3 with a small β ($M_1$) and at 3e-3 ($M_4$).
# - RFT gains much without rejected completions. Whether pairs beat it depends on model and setting.
#
# **Try**: judge the claims again with `paper` divided by ten. Which verdicts change?
#
# **Recall**
#
# 1. RFT and Iterative RPO both use correct completions. What differs, and how does RFT differ from STaR?
# 2. Five seeds, difference +1.2 (−0.3 to 2.7), paper +6. What do you write? And with paper +2?
# 3. A paper tunes its method and takes the baseline's settings from elsewhere. What can its gain consist of?
# 4. On the second model RFT is ahead at $M_2$ and $M_3$. Why does this not refute the paper's table?
#
# <details><summary>Answers</summary>
#
# 1. RFT has no rejected completions in its loss. STaR retrains from $M_0$ and shows answers of failed questions.
# 2. It rules out an effect of the paper's size. With +2: not resolved.
# 3. Of the tuning alone.
# 4. The paper compares $M_1$ of a model with 70 billion parameters. Here a correct step competes with one typical error,
#    which may favour RFT.
#
# </details>
#
# **Next**: [07 · Real models on one GPU](07_real_models_on_one_gpu.ipynb) takes the method to a real model.
