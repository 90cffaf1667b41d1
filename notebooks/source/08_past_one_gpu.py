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
# # 08 · Past one GPU
#
# **What you will be able to do**
#
# - choose between three ways to use several GPUs, and say which stage wants which;
# - prove that a batch may be cut among processes without changing the gradient, and name the losses for which it may not;
# - derive the bytes that each way sends, and hold them against bytes counted between two processes;
# - plan a run on many GPUs, find the ones that would idle, and go on after one of the processes has died.
#
# | | `smoke` | `cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook | 1 minute on two cores | 1 to 2 minutes on two cores | the same: all that runs here runs on the CPU |
#
# **Needs**: the packages of this repository, nothing else. No GPU: the processes of this notebook share your computer's cores
# and talk over its own network.
#
# **Before this**: [07 · Real models on one GPU](07_real_models_on_one_gpu.ipynb), where memory is counted for one GPU.

# %%
import os, sys
sys.path[:0] = [".", ".."]                     # checks_08.py and helpers_08.py are next to the notebooks
PROFILE = os.environ.get("IRPO_PROFILE", "cpu")     # the one setting: "cpu" or "smoke"

# %%
# NBVAL_IGNORE_OUTPUT
import platform
from importlib.metadata import version

import helpers_08
import numpy as np
import torch
from irpo_utils import models, profiles
from irpo_utils.ops import machines, plan as planning
from irpo_utils.ops.cli import quiet_libraries

quiet_libraries()                              # no loading bars
torch.set_printoptions(precision=4, sci_mode=False)
torch.set_num_threads(1)                       # as each of the processes further below
print("python", platform.python_version(), *(f"· {name} {version(name)}" for name in ("torch", "transformers", "trl")))
print("profile", PROFILE, "· device", models.default_device(), "· seed", profiles.get(PROFILE).seed)
assert models.default_device() in ("cpu", "cuda")

# %% [markdown]
# ## 1 What a second GPU can do
#
# One program is started several times, once for each GPU. Each of these processes knows its number, its
# [rank](../docs/glossary.md#rank-of-a-process), and how many there are, the [world size](../docs/glossary.md#world-size). What
# then? There are three ways to share a model's work.
#
# | | each GPU holds | each GPU computes | what is sent |
# |---|---|---|---|
# | [data parallel](../docs/glossary.md#data-parallel), "whole copies" | the whole model | its part of the data | gradients, once a step |
# | split layers ([FSDP](../docs/glossary.md#fsdp), ZeRO-3) | a part of every layer | its part of the data, with layers put together for a moment | weights, all the time; gradients |
# | [tensor parallel](../docs/glossary.md#tensor-parallel) | a part of every matrix | its part of every product, for all data | activations, in every layer |
#
# The first two share the *data*, the third shares the *product*. The second is the first with another way of storing: nobody
# computes with half a layer.
#
# The third looks like magic, so here it is by hand: the feed-forward part of a block, on two GPUs (processes). The first matrix is cut
# by its outputs, the second by its inputs ([Shoeybi et al. 2019](https://arxiv.org/abs/1909.08053)).

# %%
torch.manual_seed(0)
x, up, down = torch.randn(3, 8), torch.randn(8, 32), torch.randn(32, 8)        # 3 positions, hidden size 8
whole = torch.relu(x @ up) @ down

parts = [torch.relu(x @ up[:, half]) @ down[half] for half in (slice(0, 16), slice(16, 32))]
print("shapes of what each card computed:", *(tuple(part.shape) for part in parts))
print("largest difference of their sum below 1e-5:", bool((sum(parts) - whole).abs().max() < 1e-5))
assert torch.allclose(sum(parts), whole, atol=1e-4)

# %% [markdown]
# **Predict**: why could the activation function be computed on each half by itself, and what has to be sent?
#
# It works number by number, so no GPU needs the other's half. What each gets in the end is a *summand* of every output. One
# sum over GPUs and the layer is done: a vector of the hidden size for each position. That is little, but it comes twice in
# every block, and nobody can go on before it has arrived. So this way needs fast links, and is kept inside one machine.
#
# Which stage wants which?
#
# - **Sampling and evaluation**: the questions have nothing to do with each other. Split them, and nothing is sent until the end.
#   If the model does not fit on one GPU, a server with tensor parallelism writes the completions (section 8): going token by
#   token, split layers would have to be put together for every single token.
# - **Training**: the pairs of a step are independent until the step itself, which needs *one* gradient. Whole copies where they
#   fit, split layers where they do not.
# - **Scoring** (the reference's log-probabilities, the KL): as sampling, but with all tokens of a text at once, so that split
#   layers will do.

# %% [markdown]
# ## 2 Split the questions
#
# Each process takes consecutive questions, as equal in number as can be. When all are done their rows are put one part after
# the other, in the order of the ranks: the table looks as if one process had written it.

# %% [markdown]
# ### Exercise 8.1: your share
#
# **Goal**: split a list among processes so that nothing is lost. **Difficulty**: 1 of 3. **Time**: 10 minutes.
#
# `share(items, rank, count)` returns the part of process `rank` (0, 1, ...) of `count`: consecutive items, in order; all parts
# one after the other are `items` again; no part is longer than another by more than one, and the first processes have the
# longer ones.
#
# <details><summary>Hint</summary>
#
# `divmod(len(items), count)` says how many items each gets and how many are left over. Where does the part of `rank` begin, if
# every rank before it has that many, and the first few one more? `min(rank, left_over)`.
#
# </details>

# %%
def share(items, rank, count):
    # SOLUTION
    each, left_over = divmod(len(items), count)
    start = rank * each + min(rank, left_over)
    return items[start : start + each + (rank < left_over)]
    # STUB
    # return ...      # your turn
    # END

# %%
import checks_08
print(checks_08.share(share))

# %% [markdown]
# The worked solution is in [solutions/08_past_one_gpu.ipynb](solutions/08_past_one_gpu.ipynb).

# %% [markdown]
# ### The same completions, however many processes
#
# Splitting is easy. That the *random numbers* do not change with it takes a thought. Usually a program has one generator, and
# every draw takes the next number. Three questions, an "answer" of four random numbers each; alone, and split over two
# processes that begin with the same seed:

# %%
questions = ["q-17", "q-4", "q-31"]

def from_one_stream(questions, seed):
    stream = np.random.default_rng(seed)
    return {question: stream.random(4).round(2).tolist() for question in questions}

alone = from_one_stream(questions, seed=0)
two = from_one_stream(questions[:2], seed=0) | from_one_stream(questions[2:], seed=0)
for question in questions:
    print(question, alone[question], two[question], "same" if alone[question] == two[question] else "other")

# %% [markdown]
# **Predict** what is wrong with the last line, beyond being another.
#
# Look at the first line: `q-31` got the very numbers of `q-17`. Processes with equal seeds draw equal numbers, and samples that
# should be independent are copies. With a seed for each rank they would be independent, but other ones for every number of
# processes.
#
# The way out: the numbers belong to the *question*. A [hash](../docs/glossary.md#hash) of the run's seed and the question's id
# starts a separate stream, for each sample another.

# %%
import hashlib

def own_numbers(seed, question, n, length):
    key = hashlib.blake2b(f"{seed}/{question}".encode(), digest_size=16).digest()
    sequence = np.random.SeedSequence(list(np.frombuffer(key, np.uint32)))
    streams = [np.random.Generator(np.random.Philox(child)) for child in sequence.spawn(n)]       # one a sample
    return np.stack([stream.random(length) for stream in streams])

for count in (1, 2, 3):
    parts = np.array_split(questions, count)                            # whoever has it: the same numbers
    print(count, *(own_numbers(0, question, 1, 2)[0].round(3) for part in parts for question in part))

# %% [markdown]
# A token is then drawn by looking up its number in the cumulative distribution ([notebook 01](01_sampling.ipynb), section 5).
# So a completion depends on the model, the seed, the question and the sample's number, and on nothing else: not on the batch,
# not on the rank. The module does the same, and a real model shows it. Four questions at once, and the last two by themselves:

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils import sampling, tasks

request = sampling.Request(prompts=[[]], ids=["q-4"], n=3, temperature=1.0, top_p=1.0, max_new_tokens=5, seed=7, ends=[], pad_id=0)
assert np.array_equal(own_numbers(7, "q-4", 3, 5), request.uniforms(0))

task = tasks.get("word_problems")
four = task.load("train").select(range(4))
model, tokenizer = models.load("seed", device="cpu")

def drawn(questions):
    return sampling.sample(model, tokenizer, questions, task, n=3, max_new_tokens=40, seed=7, progress=False)["completion"][:]

together, apart = drawn(four), drawn(four.select([0, 1])) + drawn(four.select([2, 3]))
same = sum(a == b for a, b in zip(together, apart))
print(f"{len(together)} completions, {same} of them the same")
assert same >= len(together) - 1

# %% [markdown]
# (Up to rounding: where two tokens are about equally probable, sums in another order could decide otherwise. On GPUs that
# happens now and then.) Then `processes.share` and `processes.gather` are all that sampling and evaluation need.

# %% [markdown]
# ## 3 The gradient must not depend on how the batch is cut
#
# Training is another matter: every process must take the *same* step, or the copies drift apart. With a batch of $B$ pairs on
# $P$ processes the step needs the gradient of
#
# $$L = \frac 1B \sum_{i=1}^{B} \ell_i = \frac 1P \sum_{p=1}^{P} \Big( \frac PB \sum_{i \in p} \ell_i \Big)$$
#
# The bracket is the mean over the $B/P$ pairs of process $p$: the mean of equal parts' means is the mean of all. A gradient is
# linear, so the same holds for it, and averaging gradients over processes gives the gradient of the whole batch. Let us see it
# with a model of three weights and eight pairs.

# %%
torch.manual_seed(1)
weights, pairs = torch.randn(3, requires_grad=True), torch.randn(8, 3)

def gradient(loss_of, rows):
    """Of the loss of these rows with respect to the weights."""
    return torch.autograd.grad(loss_of(rows), weights)[0]

def mean_loss(rows):
    return torch.nn.functional.softplus(-(rows @ weights)).mean()

whole = gradient(mean_loss, pairs)
for count in (2, 4, 8):
    averaged = sum(gradient(mean_loss, part) for part in pairs.chunk(count)) / count
    print(f"{count} processes: {averaged}   whole batch: {whole}")
    assert torch.allclose(averaged, whole, atol=1e-6)

# %% [markdown]
# Now the trap. Let the loss be a mean over *tokens*, as it is in most trainers of language models. Four winners, their numbers
# of tokens, and what each costs per token:

# %%
tokens = torch.tensor([12.0, 20.0, 60.0, 300.0])
per_token = torch.tensor([0.2, 0.4, 0.5, 2.0])             # nats, the mean over the winner's own tokens

def per_sequence(rows):
    return per_token[rows].mean()

def over_tokens(rows):
    return (tokens * per_token)[rows].sum() / tokens[rows].sum()

# %% [markdown]
# **Predict**: two processes have two winners each, and their losses are averaged. Which of the two losses
# changes, and which way?

# %%
for name, loss_of in (("per sequence", per_sequence), ("over tokens", over_tokens)):
    one = loss_of([0, 1, 2, 3])
    two = (loss_of([0, 1]) + loss_of([2, 3])) / 2
    other = (loss_of([0, 3]) + loss_of([1, 2])) / 2
    print(f"{name}: one process {one:.3f}, two {two:.3f}, two with the winners dealt otherwise {other:.3f}")
    assert (abs(one - two) < 1e-6) == (name == "per sequence")

# %% [markdown]
# The mean over tokens falls by more than a third, and depends on who got which winner. A token of the short pair of winners
# suddenly counts eleven times as much as one of the long pair, because its process has 32 tokens to share its half and the other
# has 360. Nothing is wrong with either half; the *average* of the two is wrong, since the parts are unequal. The same happens
# with micro-batches on one GPU, which a widely used library had wrong until late in 2024
# ([the story](https://huggingface.co/blog/gradient_accumulation)).
#
# Two remedies. Divide each part by the number of tokens of the *whole* batch, which all processes have to agree on beforehand.
# Or take a loss whose parts are equal by themselves. Eq. 1 of the paper does the latter: its NLL is divided by the length of its
# own winner and then averaged over pairs, and a part of a batch is a number of *pairs*
# ([notebook 04](04_dpo_nll_training.ipynb), section 3). The trainer here divides by the pairs of the whole batch, and
# multiplies by the number of processes, because the average over processes will divide by it once more:
#
# ```python
# return (weights * loss).sum() / in_batch * self.accelerator.num_processes
# ```
#
# What are the weights? If the pairs leave a rest for the last step, `accelerate` repeats some of them, so that all processes have
# equally many. The repeated ones weigh 0, all others 1. A batch that cannot be shared equally is refused. And the order
# of the pairs must be the same: they are sorted by length within whole batches, not within the share of a process.

# %%
from unittest import mock
from irpo_utils import UserError, training
from datasets import Dataset

nothing_much = Dataset.from_dict({"prompt_ids": [[1]], "chosen_ids": [[2]], "rejected_ids": [[3]]})
with mock.patch.object(training.DPOConfig, "world_size", 3):         # as if there were three processes
    try:
        training.train(model, tokenizer, nothing_much, batch_size=16)
    except UserError as error:
        print(error)

# %% [markdown]
# ### Exercise 8.2: parts of unequal size
#
# **Goal**: the right gradient from unequal parts. **Difficulty**: 2 of 3. **Time**: 10 minutes.
#
# `combine(gradients, counts)` gets one tensor from each process, the gradient of the *mean* over that process's own items, and
# the number of these items (pairs or tokens). Return the gradient of the mean over all items. A process may have no items: a
# mean over nothing is `nan`, and so is its gradient.
#
# <details><summary>Hint</summary>
#
# A mean times its count is a sum. Sums may be added, and then divided by what? Mind that `nan` times zero is `nan`.
#
# </details>

# %%
def combine(gradients, counts):
    # SOLUTION
    total = sum(count * gradient for gradient, count in zip(gradients, counts) if count)
    return total / sum(counts)
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_08.combine(combine))

# %% [markdown]
# The worked solution is in [solutions/08_past_one_gpu.ipynb](solutions/08_past_one_gpu.ipynb).

# %% [markdown]
# ## 4 What is sent
#
# ### Whole copies: a ring
#
# $P$ GPUs hold a gradient of $S$ bytes each, and all of them need the sum: an [all-reduce](../docs/glossary.md#all-reduce).
# **Predict**: if everybody sent everything to one GPU, and that one sent the sum back, how much would that GPU send and
# receive? And how does it grow with $P$?
#
# It would receive and send $(P-1)\,S$: the more GPUs, the slower. A ring does better
# ([Patarasuk and Yuan 2009](https://doi.org/10.1016/j.jpdc.2008.09.002)). Cut the gradient into $P$ pieces. In each round every
# GPU sends *one* piece to its neighbour on the right. In the first $P-1$ rounds the neighbour adds it to its own; then each
# GPU has one piece whose sum is complete, a [reduce-scatter](../docs/glossary.md#reduce-scatter). In $P-1$ more rounds the
# complete pieces go round, and the neighbour only keeps them, an [all-gather](../docs/glossary.md#all-gather).

# %%
def ring_all_reduce(gradients):
    """The sum, in all cards; and the bytes that each card sent."""
    P = len(gradients)
    cards, sent = [np.array_split(gradient.copy(), P) for gradient in gradients], np.zeros(P, int)
    for phase in ("add", "keep"):
        for step in range(P - 1):
            first = 0 if phase == "add" else 1                      # what card 0 begins with in this phase
            pieces = [(card + first - step) % P for card in range(P)]
            moving = [cards[card][piece].copy() for card, piece in enumerate(pieces)]       # all send at once
            for card, (piece, content) in enumerate(zip(pieces, moving)):
                right = (card + 1) % P
                cards[right][piece] = content + (cards[right][piece] if phase == "add" else 0)
                sent[card] += content.nbytes
    return [np.concatenate(card) for card in cards], sent

# %%
generator = np.random.default_rng(0)
for P in (2, 4, 8, 64):
    gradients = [generator.standard_normal(6400) for _ in range(P)]
    sums, sent = ring_all_reduce(gradients)
    S = gradients[0].nbytes
    print(f"{P:2} cards: each sent {sent.min():,} to {sent.max():,} bytes, 2 (P - 1) / P S = {2 * (P - 1) / P * S:,.0f}, S = {S:,}")
    assert all(np.allclose(one, sum(gradients)) for one in sums) and (sent == 2 * (P - 1) / P * S).all()

# %% [markdown]
# Each GPU sends $2 \frac{P-1}{P} S$ bytes, never more than twice the gradient, *however many GPUs there are*, and no GPU is
# busier than another. Half of it is the reduce-scatter, half the all-gather.
#
# Now what is $S$? **Predict**, for Llama-3.1-8B: how many times smaller is the gradient with QLoRA than if all weights were
# trained?

# %%
# NBVAL_IGNORE_OUTPUT
import pandas as pd

rows = {}
for name in ("smollm2-135m", "qwen2.5-0.5b", "llama-3.1-8b", "llama-2-70b-chat"):
    shape = machines.SHAPES[name]
    base = machines.NF4_BYTES * shape.linear + 2 * (shape.parameters - shape.linear)
    rows[name] = {"all weights, 16 bit": 2 * shape.parameters / 1e9, "LoRA r = 16, 32 bit": 4 * shape.lora(16) / 1e9,
                  "base in NF4": base / 1e9}
sizes = pd.DataFrame(rows).T
sizes["gradient: times smaller"] = sizes["all weights, 16 bit"] / sizes["LoRA r = 16, 32 bit"]
sizes["base against LoRA gradient"] = sizes["base in NF4"] / sizes["LoRA r = 16, 32 bit"]
assert (sizes["gradient: times smaller"] > 10).all()
sizes.round(2)

# %% [markdown]
# The frozen base has no gradient, and only the LoRA matrices' is sent: ten to more than a hundred times less,
# although it is in 32 bits and the other in 16. With QLoRA whole copies cost next to nothing on the wire. And the base in four
# bits is small enough that whole copies mostly fit.
#
# ### Split layers: weights on the move
#
# With split layers no GPU has a whole layer. In each *micro-batch*, on each GPU:
#
# 1. forward: before a layer is computed its parts are gathered from all GPUs, and afterwards given back;
# 2. backward: the same once more, as they were given back;
# 3. the embeddings and the output matrix, which both lie outside of the layers, are gathered once and kept until the micro-batch
#    is done;
# 4. gradients: each GPU needs the sum for its own part alone: a reduce-scatter, and no all-gather after it.
#
# A ring serves for all of these. To gather $X$ bytes, or to reduce-scatter them, each GPU sends $\frac{P-1}{P} X$.

# %% [markdown]
# ### Exercise 8.3: bytes of split layers
#
# **Goal**: derive what the alternative costs. **Difficulty**: 2 of 3. **Time**: 15 minutes.
#
# `sent_when_split(layers, outside, gradients, cards, micro_batches)`: the bytes that one GPU sends in one optimiser step.
# `layers` are the bytes of all layers, `outside` those of what lies outside of them, `gradients` those of the trained weights'
# gradients, each as a whole. A step has `micro_batches` on each GPU.
#
# <details><summary>Hint</summary>
#
# Go through the four points above: which is gathered how often in a micro-batch? All four happen in each of them. One GPU alone
# sends nothing.
#
# </details>

# %%
def sent_when_split(layers, outside, gradients, cards, micro_batches):
    # SOLUTION
    return micro_batches * (2 * layers + outside + gradients) * (cards - 1) / cards
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_08.sent_when_split(sent_when_split))

# %% [markdown]
# The worked solution is in [solutions/08_past_one_gpu.ipynb](solutions/08_past_one_gpu.ipynb).

# %% [markdown]
# The module has both formulas. For a model of eight billion weights on eight GPUs, 16 pairs a step, one pair at once (so two
# micro-batches on each GPU):

# %%
shape, P, micro_batches = machines.SHAPES["llama-3.1-8b"], 8, 2
outside = 2 * (shape.parameters - shape.linear)
layers = machines.NF4_BYTES * shape.linear + 4 * shape.lora(16)        # base and adapter both lie in parts
by_hand = {"copies": 2 * (P - 1) / P * 4 * shape.lora(16),
           "split": micro_batches * (P - 1) / P * (2 * layers + outside + 4 * shape.lora(16))}

both = helpers_08.break_even(planning.plan(profiles.get("llama-3.1-8b"), "8xA100-80GB"))
by_module = {"copies": both.copies.sent, "split": both.split.sent}
for name in by_hand:
    print(f"{name}: {by_hand[name] / 1e9:.2f} GB by hand, {by_module[name] / 1e9:.2f} GB by the module")
    assert abs(by_hand[name] / by_module[name] - 1) < 1e-9
print(f"split sends {by_hand['split'] / by_hand['copies']:.0f} times as much")

# %% [markdown]
# A large factor, from two causes: the base is much larger than the LoRA gradient, and it travels twice *per micro-batch*, while
# gradients of whole copies travel once *per step*. If all weights were trained, weights and gradients would have one size $S$, and
# the two ways would send nearly $2S$ a step against nearly $3S$ a micro-batch: no longer a question of tens. So with QLoRA the rule
# is short: **whole copies, unless they do not fit**.

# %% [markdown]
# ## 5 Two processes, live
#
# Enough of formulas. Two processes on this computer train on the same fixed pairs, first as whole copies, then with split
# layers. They talk over [gloo](../docs/glossary.md#gloo-and-nccl), which stands in for NCCL where there are no GPUs. The
# traffic between them goes through the computer's loopback interface, and the operating system counts its bytes.

# %%
TRAIN = '''
import json, sys
import psutil
from datasets import load_from_disk
from safetensors.torch import save_file
from irpo_utils import profiles, training
from irpo_utils.engines.plain import Engine
from irpo_utils.scale import fsdp, processes

def sent():
    """Bytes that went through the loopback interface so far; 0 where there is none of these names."""
    interfaces = psutil.net_io_counters(pernic=True)
    return next((interfaces[name].bytes_sent for name in ("lo", "lo0") if name in interfaces), 0)

def train(pairs, steps, engine):
    """(log, adapter, bytes) of so many steps of 8 pairs, 2 at once."""
    model, tokenizer = engine.load(profiles.get("cpu"), device="cpu")          # the seed model
    processes.wait()
    before = sent()
    log = training.train(model, tokenizer, pairs, learning_rate=1e-3, batch_size=8, micro_batch_size=2,
                         max_steps=steps, trainer=engine.trainer(model), disable_tqdm=True)
    processes.wait()
    bytes_sent = sent() - before
    return list(log), fsdp.whole_adapter(model), bytes_sent
'''

# %% [markdown]
# An engine loads the model and names the class that trains it. For several processes another engine goes around it:
# `SharedEngine` gives each process its share of the data, and inside it `ShardedEngine` splits the layers. The rest of the script writes down what happened. Each way is trained twice, with many steps and with few: the difference of the bytes, divided by that of the
# steps, leaves out what is sent once, at the beginning. And on the way we ask each process for its share of seven questions.

# %%
MAIN = '''
if __name__ == "__main__":
    folder, many, few = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    pairs = load_from_disk(folder + "/pairs")
    found = {"shares": processes.gather([processes.share(list(range(7)))])}
    engines = {"copies": processes.SharedEngine(Engine()), "split": processes.SharedEngine(fsdp.ShardedEngine(Engine()))}
    for way, engine in engines.items():
        log, adapter, bytes_of_many = train(pairs, many, engine)
        bytes_of_few = train(pairs, few, engine)[2]
        found[way] = {"log": log, "bytes": (bytes_of_many - bytes_of_few) / (many - few)}
        if processes.is_first():
            save_file({name: weight.detach().contiguous() for name, weight in adapter.items()}, f"{folder}/{way}.safetensors")
    if processes.is_first():
        open(folder + "/found.json", "w").write(json.dumps(found))
'''

# %% [markdown]
# The pairs: those of the run that ships with the repository, else a few with the known solutions as winners.

# %%
# NBVAL_IGNORE_OUTPUT
import json, subprocess, tempfile
from pathlib import Path
import irpo_utils
from datasets import load_from_disk

PAIRS = 29                                     # steps of 8, 8, 8 and 5
work = Path(tempfile.mkdtemp())
root = Path(irpo_utils.__file__).resolve().parents[1]
shipped = root / "notebooks/shipped_run/iteration_0/pairs"

def ids(text):
    return tokenizer(text, add_special_tokens=False).input_ids

if shipped.exists():
    fixed = load_from_disk(str(shipped)).select(range(PAIRS))
else:
    end = [tokenizer.eos_token_id]
    fixed = Dataset.from_list([{"prompt_ids": ids(models.render_prompt(tokenizer, task.prompt(row))), "chosen_ids":
                                ids(row["solution"]) + end, "rejected_ids": ids("Final answer: 1") + end}
                               for row in task.load("train").select(range(PAIRS))])
fixed.save_to_disk(str(work / "pairs"))
print(len(fixed), "pairs,", "shipped" if shipped.exists() else "made now")
assert len(fixed) == PAIRS

# %% [markdown]
# `torchrun` (here called by its long name) starts the processes, tells each its rank and the world size in environment
# variables, and ends all of them when one fails.

# %%
# NBVAL_IGNORE_OUTPUT
import time

MANY, FEW = (4, 1) if PROFILE == "smoke" else (8, 2)
(work / "two_processes.py").write_text(TRAIN + MAIN)
environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

def torchrun(*words, processes=2):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *map(str, words)]

started = time.perf_counter()
done = subprocess.run(torchrun(work / "two_processes.py", work, MANY, FEW), env=environment, capture_output=True, text=True)
assert done.returncode == 0, done.stderr[-2000:]
found = json.loads((work / "found.json").read_text())
print(f"{time.perf_counter() - started:.0f} seconds")
assert [len(found[way]["log"]) for way in ("copies", "split")] == [MANY, MANY]

# %%
print("shares of seven questions:", found["shares"])
assert sum(found["shares"], []) == list(range(7))

# %% [markdown]
# Consecutive parts, the first one longer, as in exercise 8.1. Now the same training in one process, this one. **Predict**: how
# far apart will the losses be after the last step, and the weights of the adapters?

# %%
# NBVAL_IGNORE_OUTPUT
from safetensors.torch import load_file

sys.path.append(str(work))
import two_processes                           # the same file

log, adapter, _ = two_processes.train(fixed, MANY, two_processes.Engine())
losses = pd.DataFrame({"one process": [row["loss"] for row in log],
                       **{f"two, {way}": [row["loss"] for row in found[way]["log"]] for way in ("copies", "split")}})
losses.index += 1
for way in ("copies", "split"):
    weights = load_file(work / f"{way}.safetensors")
    apart = max((weights[name] - value).abs().max().item() for name, value in adapter.items())
    print(f"{way}: largest difference of a loss {(losses.iloc[:, 0] - losses[f'two, {way}']).abs().max():.0e}, of a weight {apart:.0e}")
    assert apart < 1e-4 and set(weights) == set(adapter)
assert (losses.max(axis=1) - losses.min(axis=1)).max() < 1e-4
losses.round(5)

# %% [markdown]
# The same run, three times. The losses differ in digits that 32 bits do not hold, since sums were formed in
# another order. This is a strong test of everything in section 3: a loss that is averaged wrongly, a pair that is counted
# twice, a copy that has drifted off, a layer put together wrongly, each would show here. Make it the first thing that you do
# with a trainer of your own.
#
# **And the bytes?** Both processes send through the one interface, so that two times the formula should come out. The seed
# model's numbers, in 32 bits:

# %%
# NBVAL_IGNORE_OUTPUT
P, micro_batches, shape = 2, 2, machines.find_shape("seed")
gradients = 4 * shape.lora(16)
outside = 4 * (shape.parameters - shape.linear)
layers = machines.NF4_BYTES * shape.linear + gradients
derived = {"copies": P * 2 * (P - 1) / P * gradients,
           "split": P * micro_batches * (P - 1) / P * (2 * layers + outside + gradients)}

for way, expected in derived.items():
    counted = found[way]["bytes"]
    print(f"{way}: {expected / 1e6:.2f} MB a step derived,", f"{counted / 1e6:.2f} MB counted" if counted > 0 else "not counted here")
assert derived["split"] > derived["copies"] > 0

# %% [markdown]
# For whole copies the formula is right to a few percent, headers of packets included. For split layers too little was derived.
# **Predict** what is missing. The difference is a hint:

# %%
# NBVAL_IGNORE_OUTPUT
missing = found["split"]["bytes"] - derived["split"]
again = P * micro_batches * (P - 1) / P * gradients
if found["split"]["bytes"] > 0:
    print(f"missing {missing / 1e6:.2f} MB; once more all gradients, in both micro-batches: {again / 1e6:.2f} MB")
    assert missing > 0.9 * again and found["copies"]["bytes"] > 0.95 * derived["copies"]       # others may use the interface, too
else:
    print("not counted here")

# %% [markdown]
# gloo has no reduce-scatter: it makes an all-reduce, which sends twice as much, and throws away what a process does
# not need. So the gradients cost double here, and the sum is right again. NCCL, on GPUs, has a true one. The lesson is larger
# than gloo: *count the bytes once*. A library that does something else than you think gives the same losses, and only the
# counter tells.
#
# (If other programs use the loopback interface at the same time, their bytes are counted as well.)

# %% [markdown]
# ## 6 One process dies
#
# Many machines fail more often than one. Say that each has a chance of 1 % to fail within an hour. **Predict** the chance that
# of eight of them at least one does, and of 64:

# %%
for n in (1, 8, 64):
    print(f"{n:2} machines: {1 - 0.99**n:.1%} that at least one fails within the hour")

# %% [markdown]
# Of eight machines one fails about every thirteenth hour, of 64 nearly every other. And the others cannot go on without it: in the
# next sum they wait for a part that never comes. **Predict** what a user should
# see: an error from each process? Nothing, for half an hour? Let us start a small run with two processes and kill one of them
# without warning, as soon as the samples of M_0 are there.

# %%
import signal
import psutil

out = work / "run"
settings = {"iterations": 1, "n_questions": 24, "k_pairs": 4, "n_eval_questions": 20, "eval_samples": 2, "eval_samples_ends": 2,
            "learning_rate": 1e-3}
command = ["-m", "irpo_utils", "run", "--profile", "smoke", "--quiet", "--out", out]
for name, value in settings.items():
    command += [f"--{name.replace('_', '-')}", value]

with (work / "said.txt").open("w") as said:
    group = subprocess.Popen(torchrun(*command), env=environment, stdout=subprocess.DEVNULL, stderr=said)
    while group.poll() is None and not (out / "iteration_0/samples").exists():
        time.sleep(0.02)
    ranks = {child.environ().get("RANK"): child for child in psutil.Process(group.pid).children()}
    os.kill(ranks["1"].pid, signal.SIGKILL)                # it cannot tidy up, and says nothing
    group.wait(120)
print("exit status", group.returncode)
assert group.returncode != 0 and not any(child.is_running() for child in ranks.values())

# %%
# NBVAL_IGNORE_OUTPUT
def finished():
    """Stages that are there whole, with the time at which they were finished."""
    return {str(file.parent.relative_to(out)): file.stat().st_mtime_ns for file in sorted(out.glob("iteration_*/*/checksums.json"))}

before = finished()
spoke = [line for line in (work / "said.txt").read_text().splitlines() if "Another process of this run has ended" in line]
print(*(line.partition(" (")[0] for line in spoke), sep="\n")            # in brackets there is what the library said
print("\nfinished:", *before)
assert len(spoke) == 1 and "iteration_0/samples" in before and "iteration_1/adapter" not in before

# %% [markdown]
# The survivor noticed when it next waited for the other, said so once, and ended; then `torchrun` ended what was left, with a
# report that we leave out. No process hangs, and you pay for no machine that waits. (A machine that vanishes without
# closing its connections is noticed later, by a time limit of the library.) Now we go on, and because the second GPU is
# gone, with *one* process. **Predict**: is that the same run?

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils.ops import run as runs

rows = pd.DataFrame(runs.run(profiles.get("smoke", **settings), out, progress=False))
after = finished()
print("kept:", *[name for name in before if after[name] == before[name]])
print("new: ", *[name for name in after if name not in before])
assert all(after[name] == before[name] for name in before) and "iteration_1/evaluation" in after
rows[rows.metric.isin(["greedy", "sampled"])][["iteration", "metric", "value", "low", "high", "n"]].round(2)

# %% [markdown]
# It is: the number of processes is not among the settings of a run, since no result is meant to depend on it
# (sections 2 and 3). So a run may begin on eight GPUs, lose its machine, and end on two. The settings that may change are
# these (`shard` in a run that a server writes for, section 8, and with an optimiser that can be split):

# %%
from irpo_utils.ops.run_directory import MAY_CHANGE

print(MAY_CHANGE)

# %% [markdown]
# What is lost is the stage under way, less what it keeps inside ([notebook 07](07_real_models_on_one_gpu.ipynb), section 7).
# One limit: with *split layers* no checkpoints are kept inside a training. An interrupted one starts that iteration's training
# again.

# %% [markdown]
# ## 7 Where does the time go?
#
# `python -m irpo_utils plan --profile NAME --gpus 8xA100-80GB` knows all of the above. Its times are **estimates**, from the
# GPUs' data sheets and shares of them that are assumed; nothing in this section was measured on a GPU. Four models, on one
# GPU, on one node of eight, and on eight nodes:

# %%
MODELS, CARDS = ("smollm2-135m", "qwen2.5-0.5b", "llama-3.1-8b", "paper"), (1, 8, 64)
plans = {(name, n): planning.plan(profiles.get(name), f"{n}xA100-80GB", must_fit=False) for name in MODELS for n in CARDS}
hours = pd.DataFrame({key: {stage.name: stage.hours for stage in made.stages} for key, made in plans.items()}).T
shares = hours.div(hours.sum(axis=1), axis=0)
assert (abs(shares.sum(axis=1) - 1) < 1e-9).all()

# %% [markdown]
# **Predict** for the largest model: on one GPU, which of sampling, training and evaluation takes most of the time? And on 64
# GPUs, will the shares be the same?

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils import plots

COLOURS = {"sampling": plots.BLUE, "training": plots.ORANGE, "evaluation": plots.GREEN}
figure = plots.TextFigure(figsize=(9.6, 3.6), layout="constrained", facecolor=plots.PAPER)
words = []
for axes, name in zip(figure.subplots(1, len(MODELS), sharey=True), MODELS):
    bottom = np.zeros(len(CARDS))
    for stage, colour in COLOURS.items():
        heights = 100 * shares.loc[name, stage].to_numpy()
        axes.bar(range(len(CARDS)), heights, bottom=bottom, color=colour, width=0.75, label=stage, edgecolor=plots.PAPER)
        bottom += heights
    for at, n in enumerate(CARDS):
        axes.text(at, 102, f"{hours.loc[(name, n)].sum():.3g} h", ha="center", fontsize=9)
        words.append(f"{name} on {n}: {hours.loc[(name, n)].sum():.3g} hours, "
                     + ", ".join(f"{stage} {shares.loc[(name, n), stage]:.0%}" for stage in COLOURS))
    axes.set(title=f"{name}\n", xticks=range(len(CARDS)), ylim=(0, 100), xlabel="cards (A100-80GB)")
    axes.set_xticklabels(CARDS)
    axes.spines[["top", "right"]].set_visible(False)
figure.axes[0].set_ylabel("Share of the time (%)")
figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
figure.alt_text = "Shares of the planned time by stage, on 1, 8 and 64 cards. " + "; ".join(words) + "."
assert all(name in plots.alt_text(figure) for name in MODELS)
figure

# %% [markdown]
# For the largest model sampling takes more than half of the time and training a fifth, and the shares stay nearly the same on all
# GPUs. For the smallest, training grows from a tenth on one GPU to two fifths on 64. On eight GPUs sampling and evaluation take
# about an eighth of their time, because questions can be split as finely as one likes. Training shrinks less where the model is
# small: a GPU then has two pairs instead of many, and the time per layer and step that no GPU saves is most of it. And 64
# GPUs are at best twice as fast as eight. Before we come to that: the other thing that may grow is N. **Predict**, for eight
# GPUs: which stages take longer with twice as many samples a question?

# %%
# NBVAL_IGNORE_OUTPUT
def hours_for(n):
    made = planning.plan(profiles.get("llama-3.1-8b", n_samples=n), "8xA100-80GB", must_fit=False)
    return {stage.name: stage.hours for stage in made.stages}

growing = pd.DataFrame({f"N = {n}": hours_for(n) for n in (5, 10, 20, 40)}).T
growing["sampling's share (%)"] = 100 * growing.sampling / growing.sum(axis=1)
assert growing.training.nunique() == 1 and growing.sampling.is_monotonic_increasing
growing.round(2)

# %% [markdown]
# Sampling alone: K says how many pairs are trained on, and the evaluation has a separate number of samples. It is also the stage
# that is shared without sending anything.
#
# Now, why do 64 GPUs not take an eighth of the time of eight? The plan of the largest model on 64 GPUs says it:

# %%
# NBVAL_IGNORE_OUTPUT
made = plans["paper", 64]
even = helpers_08.break_even(made)
print(planning.table(made), helpers_08.break_even_table(made), sep="\n\n")
assert even.gpus < made.machine.count

# %% [markdown]
# **Only a part of the GPUs has work.** A step has 16 pairs, and one pair is the least that a process can take. A process has its
# GPU for all stages, so that 48 of 64 GPUs would have nothing to do: the plan counts on 16. With more processes than pairs the
# trainer refuses to start:

# %%
with mock.patch.object(training.DPOConfig, "world_size", 64):
    try:
        training.train(model, tokenizer, nothing_much, batch_size=16)
    except UserError as error:
        print(error)

# %% [markdown]
# A larger batch would keep them busy, but that is another training, with fewer or larger steps. This is the honest end of data
# parallelism: *the batch is the limit*. More GPUs help beyond it only by sharing the work on a single pair, as tensor
# parallelism does.
#
# ### The break-even, by hand
#
# The second table compares the two ways to train. First **memory**: with whole copies all of the frozen base lies on
# each GPU, beside what training needs whatever the base. What is left for the base?

# %%
rest = even.copies.memory - even.base                      # activations, logits, adapter and optimiser, CUDA
print(f"room {made.room / 1e9:.1f} GB, less {rest / 1e9:.1f} GB for the rest: {(made.room - rest) / 1e9:.1f} GB of base would fit,"
      f" here {even.base / 1e9:.1f} GB")
print(f"and in all stages, up to {even.largest_base / 1e9:.1f} GB: the peak of this run is {made.total.memory / 1e9:.1f} GB, in evaluation")
assert even.base < even.largest_base <= made.room - rest

# %% [markdown]
# So even the model of 70 billion weights fits as whole copies on GPUs of 80 GB, in four bits. The table's number is the one for all
# stages: with sampling batches as they are set here, evaluation fills the GPU first. Then **time**. The weights of the
# next layer travel while the present one is being computed. If computing takes longer than travelling, the travel costs nothing.
# A micro-batch of $n$ tokens takes $2 W n$ operations for each pass through the $W$ weights, in three passes (forward, forward
# again for checkpointing, backward); and $G$ bytes travel. They are equal at
#
# $$n = \frac{G}{\text{link}} \cdot \frac{\text{speed}}{3 \cdot 2 W}$$

# %%
def link(made):
    """Bytes per second from card to card: that of the node, or the slower one where the ring leaves it."""
    return made.machine.between if helpers_08.break_even(made).gpus > planning.NODE else made.machine.link

def hidden_from(made):
    shape, P, machine = made.shape, helpers_08.break_even(made).gpus, made.machine
    outside = 2 * (shape.parameters - shape.linear)
    G = (P - 1) / P * (2 * (machines.NF4_BYTES * shape.linear + 4 * shape.lora(16)) + outside)
    return G / link(made) * machine.flops["bfloat16"] / (3 * 2 * (shape.linear + shape.head))

for n in (8, 64):
    even = helpers_08.break_even(plans["paper", n])
    print(f"{even.gpus} of {n} cards, {link(plans['paper', n]) / 1e9:.0f} GB/s from card to card: hidden from"
          f" {hidden_from(plans['paper', n]):,.0f} tokens on, a micro-batch has {even.positions:,.0f};"
          f" hours: copies {even.copies.hours:.1f}, split {even.split.hours:.1f}")
    assert abs(hidden_from(plans["paper", n]) / even.hidden_from - 1) < 1e-6

# %% [markdown]
# Inside one node, over NVLink, split layers are free of charge by this estimate. (It hides all of their traffic, and none of the
# copies'.) Between nodes the link is many
# times slower, a micro-batch of one pair is too short to hide behind, and training takes longer than with whole copies. What
# makes $n$ small: fast links, slow GPUs, few bits. The size of the model hardly matters, because it is in both $G$ and $W$.
#
# ### The paper's machines
#
# [Section 3.1](https://arxiv.org/html/2404.19733v3#S3.SS1) says what the authors used: for generation one node of eight V100
# with 32 GB each, for training eight nodes of eight A100 with 80 GB each. Why so, and why so different? **Predict** by
# arithmetic: 70 billion weights, 2 bytes each for generation, and 16 bytes each for training all of them with Adam ([notebook
# 04b](04b_qlora_by_hand.ipynb), section 3).

# %%
weights = machines.SHAPES["llama-2-70b-chat"].parameters
needs = {"generation, 16 bit": 2 * weights, "training all weights": 16 * weights,
         "QLoRA: the base in NF4": helpers_08.break_even(plans["paper", 8]).base}
has = {"one V100": 32e9, "node of V100": 8 * 32e9, "one A100": 80e9, "node of A100": 8 * 80e9, "eight nodes of A100": 64 * 80e9}
print(f"{'':24}{'GB':>8}" + "".join(f"{name:>21}" for name in has))
for what, size in needs.items():
    print(f"{what:24}{size / 1e9:8,.0f}" + "".join(f"{'fits' if size < room else '-':>21}" for room in has.values()))
assert has["one V100"] < needs["generation, 16 bit"] < has["node of V100"]
assert has["node of A100"] < needs["training all weights"] < has["eight nodes of A100"]

# %% [markdown]
# Generation needs the whole node of V100 for one copy of the model, split by tensor parallelism or by layers.
# Training all weights does not fit on a node of A100 by far, and fits on eight of them with layers split. With QLoRA the same
# base fits on *one* GPU: that is also a difference in method, and this package's profile `paper` says so. (Activations, the
# cache and what an allocator wastes come on top of these numbers; the plan above counts them.)

# %% [markdown]
# ## 8 Commands
#
# **Several GPUs in one machine**, whole copies. The two lines do the same; take the launcher that you know:
#
# ```bash
# torchrun --standalone --nproc_per_node 8 -m irpo_utils run --profile llama-3.1-8b --out runs/llama
# accelerate launch --config_file scripts/cluster/accelerate_1x8.yaml -m irpo_utils run --profile llama-3.1-8b --out runs/llama
# ```
#
# The second's settings are in [accelerate_1x8.yaml](../scripts/cluster/accelerate_1x8.yaml). Do not switch on accelerate's own
# FSDP there: `--shard` does it, with the frozen base in four bits, and the run refuses both at once.
#
# **Two machines**: the same command on each but for the rank, and a run directory on a disk that both see. `HOST` is the first
# machine's address, where they meet.
#
# ```bash
# accelerate launch --config_file scripts/cluster/accelerate_2x8.yaml --main_process_ip HOST --machine_rank 0 \
#      -m irpo_utils run --profile llama-3.1-8b --out /shared/runs/llama               # on the other: --machine_rank 1
# ```
#
# Count before you start it: `--batch-size` has to be a multiple of the number of processes (section 7), and there are 16 now.
#
# **A model that does not fit on one GPU**: split layers for training, and a server that writes the completions, split by tensor
# parallelism over separate GPUs. (Profiles with an 8-bit or paged optimiser need `--optimizer adamw_torch` as well: such
# optimisers cannot keep their numbers in parts.)
#
# ```bash
# VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve meta-llama/Llama-2-70b-chat-hf --enable-lora --max-lora-rank 16 \
#      --enable-prefix-caching --quantization bitsandbytes --tensor-parallel-size 4 --data-parallel-size 2 --api-server-count 1
# VLLM_URL=http://SERVER:8000 torchrun --standalone --nproc_per_node 8 -m irpo_utils run --profile paper \
#      --shard true --engine vllm --out /shared/runs/paper
# ```
#
# `--tensor-parallel-size` cuts the matrices, `--data-parallel-size` splits the questions over copies of the whole.
# `--enable-prefix-caching` keeps a prompt's keys and values for its N samples. Before each iteration the run hands the server
# the adapter of M_t as a LoRA, by its path, so the server has to see the run directory. What a split model cannot do by itself
# is refused:

# %%
from irpo_utils.scale import fsdp

for engine, count in (("vllm", "1"), ("plain", "8")):
    with mock.patch.dict(os.environ, WORLD_SIZE=count, RANK="0", MASTER_ADDR="localhost"):
        try:
            fsdp.check(profiles.get("paper", shard=True, engine=engine))
        except UserError as error:
            print(f"- {error}")

# %% [markdown]
# **Rented or shared clusters**:
#
# | file | what for |
# |---|---|
# | [sky.yaml](../scripts/cluster/sky.yaml) | [SkyPilot](https://docs.skypilot.co): rents [interruptible](../docs/glossary.md#interruptible-machine) GPUs and keeps the run in a bucket; a machine that is taken away is replaced, and the run goes on from there |
# | [slurm.sh](../scripts/cluster/slurm.sh) | [Slurm](https://slurm.schedmd.com): shortly before its time is up, the job stops the run and queues again |
# | [Dockerfile](../scripts/cluster/Dockerfile) | a container with the pinned packages |
#
# ```bash
# sky jobs launch scripts/cluster/sky.yaml --env BUCKET=my-irpo-runs --env PROFILE=llama-3.1-8b --env NAME=llama
# sbatch scripts/cluster/slurm.sh --profile llama-3.1-8b --out /shared/runs/llama
# docker build --tag irpo --file scripts/cluster/Dockerfile .
# ```
#
# The first two rely on one thing: the same command resumes the run. Nothing in them knows about iterations. **Predict**: why
# does the SkyPilot file copy the run directory into the bucket, instead of giving `--out` a folder there? A stage is finished when
# its folder is renamed, and that only one run writes there is guarded by a lock. A mounted bucket promises neither.
#
# **What was not run here.** Say it plainly before you rely on it:
#
# - two processes on CPU cores were run, over gloo, with whole copies and with split layers. *No run was made on several GPUs*,
#   none over NCCL, none on two machines;
# - the files in [scripts/cluster](../scripts/cluster/README.md) were read by their engines' own parsers and tried with stand-ins,
#   as the page says; *none was run on a cluster, a cloud or a container engine*;
# - *no run was made with a real vLLM server*: the tests play a server that answers as vLLM's documentation says;
# - the times of section 7 are arithmetic;
# - split training keeps no checkpoints inside a training, so an interrupted one starts that iteration's training again.
#
# So begin with the smallest run that uses all of it: one iteration, 64 questions, and the comparison of section 5 between one
# GPU and two.

# %% [markdown]
# ## What you have learnt
#
# - Questions are split and nothing is sent. The random numbers belong to the question, so the samples do not depend on who drew
#   them.
# - Means of equal parts may be averaged. A mean over tokens of unequal parts may not; a loss per sequence, summed and divided by
#   the pairs of the whole batch, does not care how it is cut.
# - A ring sends $2\frac{P-1}{P}S$ per GPU, however many there are. With QLoRA $S$ is tiny, and whole copies are nearly free;
#   split layers move the base twice per micro-batch.
# - Same losses, same adapter, counted bytes: with these three tests two processes on one computer find most of what can go wrong
#   on many.
# - The batch is the limit: a step of 16 pairs has work for 16 GPUs.

# %% [markdown]
# **Further reading**
#
# - [ZeRO](https://arxiv.org/abs/1910.02054): who holds what, in three stages; split layers are the third.
#   [PyTorch FSDP](https://arxiv.org/abs/2304.11277): what it took to make that work, and
#   [its successor](https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html), which is used here.
# - [Megatron-LM](https://arxiv.org/abs/1909.08053): tensor parallelism, the cut of section 1.
# - [vLLM](https://arxiv.org/abs/2309.06180): what a server does with the cache.
#
# **Try**
#
# - Train in section 5 with `loss="dpo_nll_per_token"` (import `irpo_utils.baselines` first) and `micro_batch_size=2` against `8`,
#   in one process. Which loss moves?
# - Three processes in section 5: the first 27 pairs, steps of nine, three at once. Do losses and adapter still agree? Do the bytes?
# - Kill rank 0 instead of rank 1. Who speaks then?
#
# **Recall**
#
# 1. Two processes sample with `seed=0` and one generator each. What is wrong with their samples, although each looks random?
# 2. Why may the NLL per sequence be averaged over processes, and a mean over tokens not?
# 3. Sixteen GPUs instead of eight, whole copies: how much more does each GPU send per step?
# 4. Why do micro-batches cost nothing on the wire with whole copies, and much with split layers?
# 5. You rent 64 GPUs for steps of 16 pairs. What happens?
#
# **Next**: the [README](../README.md) has the results and the commands for runs of your own; [the log](../figures/LOG.md) says
# what came out, failures included.
