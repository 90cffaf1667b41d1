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
# - pair chosen with rejected completions by hand, as the paper does;
# - say which questions give no pairs, and how N and gold solutions change that;
# - find the point where the two completions of a pair diverge, and say what the pair teaches.
#
# | | `smoke` | `cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook, on two cores | 10 seconds | 10 seconds | as `cpu` if there is a finished run |
#
# **Needs**: the packages of this repository (in Colab: [`docs/colab.md`](../docs/colab.md)). The completions come from your
# own run if there is one (`make run`), otherwise from the finished run that comes with the notebooks.
#
# **Before this**: [02 · Grading](02_grading.ipynb).

# %%
import os, sys
sys.path[:0] = [".", ".."]                          # helpers_03.py and checks_03.py are next to the notebooks
PROFILE = os.environ.get("IRPO_PROFILE", "cpu")     # the one setting: "cpu", "smoke", or a GPU profile

# %% tags=["nbval-ignore-output"]
from datasets import Dataset

import checks_03, helpers_03
from irpo_utils import models, pairs, profiles
from irpo_utils.ops.cli import quiet_libraries

quiet_libraries()
profile = profiles.get(PROFILE)
print("profile", PROFILE, "· device", models.default_device(), "· seed", profile.seed)

# %% [markdown]
# ## 1 A real pair
#
# $M_0$ wrote $N = 8$ completions per training question, and notebook 02 graded them. A
# [preference pair](../docs/glossary.md#preference-pair) joins two completions of the *same* question: a correct one,
# the **chosen** ("winning") completion, and an incorrect one, the **rejected** ("losing") completion.

# %% tags=["nbval-ignore-output"]
run, profile, graded = helpers_03.graded_completions(PROFILE, profile)
preferences, counts = pairs.build_pairs(graded, profile.k_pairs, deduplicate=profile.deduplicate)
frame = helpers_03.with_divergence(preferences)
late = helpers_03.latest(frame, "writes another equation")
print(late.prompt)
helpers_03.side_by_side(late.chosen, late.rejected)

# %% [markdown]
# The two completions start with the same lines. Then they diverge, and only one reaches the correct answer. The pair tells
# the model: at this point, prefer the chosen continuation. This notebook shows which completions form a pair, which
# questions give no pairs, and what most pairs teach.

# %% [markdown]
# ## 2 Walk through both lists
#
# Suppose a question has two correct and three incorrect completions. It gives $K$ pairs (4 in our run). Which ones? The paper
# walks through both lists in parallel. When it reaches the end of a list, it starts that list again, and only that list
# ([section 2](https://arxiv.org/html/2404.19733v3#S2), footnote 2). We call this
# [wrap-around pairing](../docs/glossary.md#wrap-around-pairing).
#
# **Predict**: completions 0 and 2 are correct, completions 1, 3 and 4 are not, and $K = 5$. Which completions are in pairs
# 3 and 4?

# %%
print(helpers_03.walk_table(chosen=[0, 2], rejected=[1, 3, 4], k=5))

# %% [markdown]
# <details><summary>Answer</summary>
#
# Pair 3 joins 0 and 4: the chosen list starts again, while the rejected list still has completion 4. Pair 4 joins 2 and 1:
# now the rejected list starts again.
#
# </details>
#
# The walk is not random. It does not need to be, because the completions were drawn independently. Within a list, the numbers
# of uses differ by at most one. The number of *different* pairs is at most the least common multiple of the two sizes: after
# that many pairs both lists start again together.

# %%
for sizes in ((2, 3), (4, 6), (1, 2)):
    print(sizes, "give", len(set(pairs.walk(*sizes, 20))), "different pairs in 20")

# %% [markdown]
# ### Exercise 3.1: wrap around
#
# **Goal**: the pairing of the paper. **Difficulty**: 1 of 3. **Time**: 10 minutes.
#
# Write `wrap_around(chosen, rejected, k)`. It takes two lists of completion numbers. It returns a list of `k` tuples
# `(chosen, rejected)`, or an empty list if either list is empty.
#
# <details><summary>Hint</summary>
#
# `i % len(chosen)` counts 0, 1, ..., and starts again at 0. It is an index. The completion number
# is `chosen[i % len(chosen)]`.
#
# </details>

# %%
def wrap_around(chosen, rejected, k):
    # SOLUTION
    if not chosen or not rejected:
        return []
    return [(chosen[i % len(chosen)], rejected[i % len(rejected)]) for i in range(k)]
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_03.wrap_around(wrap_around))

# %% [markdown]
# [Worked solution](solutions/03_pairs.ipynb).

# %% [markdown]
# ## 3 Which questions give pairs?
#
# A question needs both kinds of completion. The heat map sorts the training questions by their number of correct
# completions of $M_0$, and shows about 60 of them, evenly spaced. Each row is a question, and each column is a completion.
#
# **Predict**: most completions of $M_0$ are incorrect. What share of the questions gives pairs?

# %% tags=["nbval-ignore-output"]
helpers_03.heat_map(graded)

# %% tags=["nbval-ignore-output"]
print(f"correct completions: {sum(graded['correct']) / len(graded):.0%} of {len(graded)}")
print(f"questions that give pairs: {counts['used'] / counts['questions']:.0%} of {counts['questions']}")
print(f"without a correct completion: {counts['all_wrong']}, without an incorrect one: {counts['all_right']}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# In the shipped run more than half: one correct completion among $N$ is enough.
#
# </details>
#
# The top block of the figure gives nothing: without a correct completion there is nothing to prefer. A question with only
# correct completions gives nothing either. Iterative RPO trains on questions that the model *sometimes* solves.
#
# Which questions are left out? Sort all questions into quarters by the length of the prompt.
#
# **Predict**: which quarter loses most questions, and why?

# %% tags=["nbval-ignore-output"]
table = graded.to_pandas()
helpers_03.fates(helpers_03.quarters_by_prompt_length(table), "prompts by length")

# %% [markdown]
# <details><summary>Answer</summary>
#
# The longest prompts: they mostly need more reasoning steps.
#
# </details>
#
# Short questions are therefore over-represented in the first training set. This selection changes as the model improves: hard
# questions start to give pairs, and easy ones stop. The next figure has one bar per model that wrote the completions.

# %% tags=["nbval-ignore-output"]
history = helpers_03.counts_per_iteration(run, counts)
helpers_03.fates(history, "model that wrote the completions")

# %% tags=["nbval-ignore-output"]
history[["questions", "used", "all_wrong", "all_right", "duplicates", "repeated", "pairs"]]

# %% [markdown]
# - `used` counts questions that give pairs, `all_wrong` those with only incorrect completions, and `all_right` those with only
#   correct ones.
# - `duplicates` counts completions that repeat another one of the same question.
# - `repeated` counts pairs that occur again, because the least common multiple is below $K$.
#
# Up to $M_2$ more and more questions give pairs. At $M_3$ fewer do: more are `all_right`. On ARC the paper has about 20,000
# pairs in the first iteration, 11,000 in the second and 5,000 in the third ([section
# 3.2](https://arxiv.org/html/2404.19733v3#S3.SS2)). The authors name the fixed set of questions as one reason why their
# accuracy gains shrink ([appendix A](https://arxiv.org/html/2404.19733v3#A1)).
#
# Two details change what a question contributes.
#
# - **Gold solutions.** On GSM8K the paper adds the worked solution of the dataset to the chosen completions ([section
#   3.1](https://arxiv.org/html/2404.19733v3#S3.SS1)). Then every question has a chosen completion. But a person wrote it:
#   training then imitates a text that $M_t$ would rarely write.
# - **Duplicates.** Completions can be identical. By default `build_pairs` removes duplicates first (notebook 00 does not).
#   The paper describes no such step. With duplicates, a frequent text can be in more of the $K$ pairs.

# %% [markdown]
# **Predict**: below, `easy` has only correct completions and `hard` only incorrect ones. Which of them does a gold solution
# rescue?

# %%
rows = []
for question, correct in (("easy", True), ("hard", False)):
    for i in range(3):                                               # three completions per question
        rows.append({"id": question, "sample": i, "prompt": question, "prompt_ids": [1, 2],
                     "completion": f"{question} {i}", "completion_ids": [10 + i, 3], "correct": correct})
toy = Dataset.from_list(rows)
gold = [{"id": question, "completion": "gold", "completion_ids": [99, 3]} for question in ("easy", "hard")]
for row in pairs.build_pairs(toy, k=3, gold=gold)[0]:
    print(row["id"], "· chosen", row["chosen_sample"], "· rejected", row["rejected_sample"])

# %% [markdown]
# <details><summary>Answer</summary>
#
# It rescues only `hard`. The gold solution, with number -1, is chosen in every pair. `easy` still lacks a rejected
# completion.
#
# </details>

# %% [markdown]
# ## 4 How many samples?
#
# Suppose each completion of a question is correct with probability $p$, independently of the others. The question gives no
# pair if all $N$ completions are incorrect, or all are correct:
#
# $$P(\text{no pair}) = (1-p)^N + p^N$$
#
# The lines below show this for four values of $p$. The points are measured: they use the first $N$ of the 8 completions of
# each question. With one completion no question gives a pair.

# %% tags=["nbval-ignore-output"]
measured = {}
for n in (1, 2, 4, 8, 16, 30):
    if n <= profile.n_samples:
        share = table[table["sample"] < n].groupby("id").correct.mean()
        measured[n] = share.isin([0, 1]).mean()
helpers_03.lost_questions(measured)

# %% [markdown]
# Questions with $p$ near 0.5 need few completions. Questions with $p$ near 0 or 1 need many. Many questions here have a $p$
# near 0, so the points fall more slowly than the line of $p = 0.5$.

# %% [markdown]
# ### Exercise 3.2: how many questions are lost at N = 4, and at N = 16?
#
# **Goal**: choose $N$ before you pay for it. **Difficulty**: 2 of 3. **Time**: 15 minutes.
#
# Write `lost(chances, n)`. `chances` is a list with the probability $p$ of each question, and `n` is $N$. Return a tuple: the
# expected number of questions whose completions are all incorrect, and the expected number whose completions are all correct.
#
# <details><summary>Hint</summary>
#
# An expected number of questions is the sum of their probabilities. In the formula, $(1-p)^N$ is the probability of *all
# incorrect*, and $p^N$ that of *all correct*. Sum each of them over the questions.
#
# </details>

# %%
def lost(chances, n):
    # SOLUTION
    all_incorrect = sum((1 - p) ** n for p in chances)
    all_correct = sum(p ** n for p in chances)
    return all_incorrect, all_correct
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_03.lost(lost))

# %% [markdown]
# [Worked solution](solutions/03_pairs.ipynb). Apply your function to this run. The share of correct completions of each
# question is an estimate of $p$. A question without a correct completion has the estimate 0: the function counts it as lost
# at every $N$.

# %% tags=["nbval-ignore-output"]
chances = list(table.groupby("id").correct.mean())
for n in (4, 16):
    print(f"N = {n}:", helpers_03.numbers(lost(chances, n), "all incorrect", "all correct"))

# %% [markdown]
# ## 5 What does a pair teach?
#
# The pair in section 1 starts with the same lines on both sides. Is that typical?
#
# **Predict**: at which line do most pairs diverge, and what does the rejected completion do there?

# %% tags=["nbval-ignore-output"]
helpers_03.where_they_diverge(frame)

# %% tags=["nbval-ignore-output"]
print(helpers_03.kinds_of_divergence(frame))        # what the rejected completion does where they diverge
early = frame.loc[frame.line.idxmin()]
helpers_03.side_by_side(early.chosen, early.rejected)

# %% [markdown]
# <details><summary>Answer</summary>
#
# With the seed model most pairs diverge at the first line. The chosen completion writes an equation, and the rejected one
# gives its answer at once.
#
# </details>
#
# Pairs that diverge later mostly show the same contrast: the rejected completion gives its answer before the working is
# complete. The 1,167 pairs of the first row say *show your working*, all of it. Only pairs with another equation (108), or
# with another answer after shared lines (68, *later*), can say *calculate correctly*. In 51 pairs (32 + 19, *first line*) the
# chosen completion is itself a bare answer.
#
# The point of divergence matters for the loss of notebook [04](04_dpo_nll_training.ipynb). The
# [log-ratio](../docs/glossary.md#log-ratio) of a token is its log-probability under the model in training minus that under
# the reference. [DPO](../docs/glossary.md#dpo) sums the log-ratios of the chosen completion, and subtracts the sum for the
# rejected one. Suppose both completions start with the same three tokens.
#
# **Predict**: which terms remain in the difference?

# %%
shared = [0.31, -0.12, 0.05]                            # log-ratios of the tokens that both start with
chosen_rest, rejected_rest = [0.40, 0.22], [-0.35, 0.10, -0.08]
difference = sum(shared + chosen_rest) - sum(shared + rejected_rest)
print(f"all tokens: {difference:.2f}, from the divergence on: {sum(chosen_rest) - sum(rejected_rest):.2f}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# Only those of the tokens from the point of divergence on.
#
# </details>
#
# The NLL term is different: it averages over the *whole* chosen completion. So it is the only term that acts directly on the
# shared tokens. The next exercise measures how many there are.

# %% [markdown]
# ### Exercise 3.3: the point of divergence
#
# **Goal**: find the tokens that DPO compares. **Difficulty**: 2 of 3. **Time**: 10 minutes.
#
# Write `n_shared(chosen_ids, rejected_ids)`. It takes two lists of token ids. It returns how many tokens both have in
# common *at the beginning*, before the first difference. One list can be the beginning of the other.
#
# <details><summary>Hint</summary>
#
# Walk through both lists with `zip` and `enumerate`, and return the index of the first difference. What do you return if
# `zip` ends without one?
#
# </details>

# %%
def n_shared(chosen_ids, rejected_ids):
    # SOLUTION
    for i, (ours, theirs) in enumerate(zip(chosen_ids, rejected_ids)):
        if ours != theirs:
            return i
    return min(len(chosen_ids), len(rejected_ids))
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_03.n_shared(n_shared))

# %% [markdown]
# [Worked solution](solutions/03_pairs.ipynb). Here is the answer for the pairs of this
# run.

# %% tags=["nbval-ignore-output"]
shared = [helpers_03.n_shared(a, b) / len(a) for a, b in zip(frame.chosen_ids, frame.rejected_ids)]
print(f"{100 * sum(shared) / len(shared):.0f} % of the tokens of a chosen completion come before the divergence, on average")

# %% [markdown]
# Are shared tokens good or bad? Researchers disagree. [Step-DPO](https://arxiv.org/abs/2406.18629) builds pairs whose first
# difference is one incorrect step. [Smaug](https://arxiv.org/abs/2402.13228) shows that DPO can lower the probability of the
# chosen completion if a pair differs in few tokens. [Razin et al.](https://arxiv.org/abs/2410.08847) remove pairs of
# completions with similar embeddings. Our pairs share few initial tokens. The NLL term should prevent such a fall: notebook
# [04](04_dpo_nll_training.ipynb) measures its effect.

# %% [markdown]
# ## What you have learnt
#
# - Pairing walks through chosen and rejected completions in parallel. Each list starts again at its own end.
# - A question gives pairs only if the model answers it correctly sometimes. More completions rescue hard and easy questions.
#   Gold solutions rescue only hard ones.
# - For DPO only the tokens after the shared ones count.
# - With the seed model most pairs teach the model to show its working.
#
# **Try**: `build_pairs` returns the pairs and their counts. Call it with `pairing="random"` and look at `repeated`.
# With the walk and `k=20`, how many pairs are different?
#
# <details><summary>Typical misunderstandings</summary>
#
# - *When one list ends, both start again.* Only the list that ended starts again.
# - *$K$ pairs are $K$ different pairs.* After the least common multiple of the two sizes, the pairs repeat.
# - *The model trains on all questions.* It trains only on those with both kinds of completion.
#
# </details>
#
# **Recall** without scrolling up, then open the answers.
#
# 1. One chosen and four rejected completions, $K = 6$: which pairs?
# 2. Which questions does a gold solution rescue, and which not?
# 3. $M_0$ answers a question correctly with probability 0.02. Does the question give a pair at $N = 30$?
# 4. Which term of the loss acts on the tokens that both completions share?
#
# <details><summary>Answers</summary>
#
# 1. The chosen completion with the first, second, third and fourth rejected one, then with the first and second again. Four
#    pairs are different.
# 2. It rescues a question without correct completions. It cannot rescue one without incorrect completions.
# 3. Probably not: all 30 completions are incorrect with probability $0.98^{30} \approx 0.55$.
# 4. The NLL term.
#
# </details>
#
# **Next**: [04 · Training with DPO + NLL](04_dpo_nll_training.ipynb): what the loss does with a pair.
