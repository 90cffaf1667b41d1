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
# # 08 · Past one GPU (optional)
#
# **This notebook is optional.** You need it if a model or a run is too large for one GPU.
#
# **What you will be able to do**
#
# - choose between three ways to use several GPUs;
# - show that the gradient does not depend on how a batch is split;
# - derive the bytes that each way sends, and count them between two processes;
# - resume a run after one of its processes has died.
#
# | | `smoke` | `cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook | 1 minute on two cores | 1 to 2 minutes on two cores | as `cpu`: the processes use the CPU |
#
# **Needs**: the packages of this repository (in Colab: [`docs/colab.md`](../docs/colab.md)). The processes run on the CPU of
# any machine.
#
# **Before this**: [07 · Real models on one GPU](07_real_models_on_one_gpu.ipynb).

# %% tags=["nbval-ignore-output"]
import hashlib, inspect, os, sys, tempfile
from pathlib import Path
import numpy as np
import torch
sys.path[:0] = [".", ".."]                          # checks_08.py and helpers_08.py are next to the notebooks
sys.path += ["../scripts", "../../scripts"]         # the package `cluster`
import checks_08, helpers_08
from irpo_utils import models, profiles, sampling, tasks
from irpo_utils.ops.cli import quiet_libraries

quiet_libraries()
PROFILE = os.environ.get("IRPO_PROFILE", "cpu")     # the one setting: "cpu" or "smoke"
print("profile", PROFILE, "· seed", profiles.get(PROFILE).seed)

# %% [markdown]
# ## 1 What can several GPUs share?
#
# A launcher starts the same program once per GPU. Each process knows its number (the
# [rank](../docs/glossary.md#rank-of-a-process)) and the number of processes (the
# [world size](../docs/glossary.md#world-size)). The processes can share the work in three ways.
#
# | | each GPU holds | each GPU computes | what is sent |
# |---|---|---|---|
# | whole copies ([data parallel](../docs/glossary.md#data-parallel)) | the whole model | its share of the data | gradients, once per step |
# | split layers ([FSDP](../docs/glossary.md#fsdp), ZeRO-3) | a part of every layer | its share of the data | weights and gradients, in every micro-batch |
# | [tensor parallel](../docs/glossary.md#tensor-parallel) | a part of every matrix | its part of every product | activations, in every layer |
#
# The first two ways share the data. The third shares each product. Here is the third by hand, for the feed-forward part of a
# block ([Shoeybi et al. 2019](https://arxiv.org/abs/1909.08053)). The first matrix is split by its outputs, the second by
# its inputs. **Predict**: what must two GPUs send each other?

# %%
torch.manual_seed(0)
x, up, down = torch.randn(3, 8), torch.randn(8, 32), torch.randn(32, 8)        # 3 positions, hidden size 8
whole = torch.relu(x @ up) @ down
parts = [torch.relu(x @ up[:, half]) @ down[half] for half in (slice(0, 16), slice(16, 32))]
print("each GPU computes:", *(tuple(part.shape) for part in parts))
print("their sum is the whole product:", torch.allclose(sum(parts), whole, atol=1e-4))

# %% [markdown]
# They send results and add them. But a block needs two such sums, one after attention and one after the feed-forward part, and
# the next layer waits for them. This needs fast links.
#
# Sampling and evaluation only split the questions. (If the model does not fit on one GPU, a
# [vLLM](../docs/results/speed.md#vllm) server with tensor parallelism samples.) Training needs one gradient per step, so it
# uses whole copies or split layers.
#
# ## 2 Split the questions
#
# Each process takes consecutive questions. At the end the parts are joined.

# %% [markdown]
# ### Exercise 8.1: your share
#
# **Goal**: split a list among processes so that nothing is lost. **Difficulty**: 1 of 3. **Time**: 10 minutes.
#
# `share(items, rank, count)` returns the consecutive items for process `rank` (0, 1, ...) of `count` processes. Lengths differ
# by at most one, and the first parts are longer.
#
# <details><summary>Hint</summary>
#
# `divmod(len(items), count)` gives the length of a part and the number of items left over. `min(rank, left_over)` of the
# parts before `rank` have one item more.
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
print(checks_08.share(share))

# %% [markdown]
# The worked solution is in [solutions/08_past_one_gpu.ipynb](solutions/08_past_one_gpu.ipynb).
#
# ### The random numbers must not change
#
# Usually a program has one generator. Here three questions get four numbers each, in one process and in two with the same
# seed. **Predict**: what is wrong with the last line?

# %%
def one_stream(questions, seed):
    stream = np.random.default_rng(seed)
    return {question: stream.random(4).round(2).tolist() for question in questions}

questions = ["q-17", "q-4", "q-31"]
alone, split = one_stream(questions, 0), one_stream(questions[:2], 0) | one_stream(questions[2:], 0)
for question in questions:
    print(question, alone[question], split[question], "same" if alone[question] == split[question] else "different")

# %% [markdown]
# It repeats the numbers of `q-17`: two questions share their random numbers. With a seed per rank, samples would depend on
# the number of processes. So the numbers belong to the *question*: a [hash](../docs/glossary.md#hash) of the run's seed and
# the question's id starts their stream.

# %%
def numbers_of(seed, question, n, length):
    key = hashlib.blake2b(f"{seed}/{question}".encode(), digest_size=16).digest()
    sequence = np.random.SeedSequence(list(np.frombuffer(key, np.uint32)))
    streams = [np.random.Generator(np.random.Philox(child)) for child in sequence.spawn(n)]    # one per sample
    return np.stack([stream.random(length) for stream in streams])

request = sampling.Request(prompts=[[]], ids=["q-4"], n=3, temperature=1.0, top_p=1.0, max_new_tokens=5, seed=7, ends=[], pad_id=0)
assert np.array_equal(numbers_of(7, "q-4", 3, 5), request.uniforms(0))         # as the package does it
print(numbers_of(7, "q-4", 3, 5).round(2))

# %% [markdown]
# Does it work? The seed model completes four questions together, then in two parts of two questions.

# %% tags=["nbval-ignore-output"]
task = tasks.get("word_problems")
model, tokenizer = models.load("seed", device="cpu")

def draw(questions):
    return sampling.sample(model, tokenizer, questions, task, n=3, max_new_tokens=40, seed=7, progress=False)["completion"][:]

four = task.load("train").select(range(4))
together, apart = draw(four), draw(four.select([0, 1])) + draw(four.select([2, 3]))
same = sum(a == b for a, b in zip(together, apart))
print(f"{same} of {len(together)} completions are the same")

# %% tags=["remove-cell"]
assert same >= len(together) - 1          # rounding can change a token when two are almost equally probable

# %% [markdown]
# ## 3 The gradient must not depend on how the batch is split
#
# Every process must take the same step, or the copies diverge. With $B$ pairs on $P$ processes the loss is
#
# $$L = \frac 1B \sum_{i=1}^{B} \ell_i = \frac 1P \sum_{p=1}^{P} \Big( \frac PB \sum_{i \in p} \ell_i \Big)$$
#
# The bracket is the mean over the pairs of process $p$. A mean of means over *equal* parts is the mean over all. Gradients
# are linear, so the average over processes is the gradient of the batch.

# %%
torch.manual_seed(1)
weights, batch = torch.randn(3, requires_grad=True), torch.randn(8, 3)

def gradient(rows):
    loss = torch.nn.functional.softplus(-(rows @ weights)).mean()
    return torch.autograd.grad(loss, weights)[0]

for count in (2, 4, 8):
    averaged = sum(gradient(part) for part in batch.chunk(count)) / count
    print(count, "processes give the gradient of the batch:", torch.allclose(averaged, gradient(batch), atol=1e-6))

# %% [markdown]
# Now let the loss be a mean over *tokens*, as in most trainers of language models. **Predict**: two processes have two
# completions each and average their losses. Which loss changes, and in which direction?

# %%
tokens, nats = np.array([12, 20, 60, 300]), np.array([0.2, 0.4, 0.5, 2.0])     # of each completion; nats per token

def per_completion(rows):
    return nats[rows].mean()

def over_tokens(rows):
    return (tokens * nats)[rows].sum() / tokens[rows].sum()

for loss in (per_completion, over_tokens):
    halves = [(loss(a) + loss(b)) / 2 for a, b in (([0, 1], [2, 3]), ([0, 3], [1, 2]))]
    print(f"{loss.__name__}: one process {loss([0, 1, 2, 3]):.3f}, two {halves[0]:.3f}, two with other halves {halves[1]:.3f}")

# %% [markdown]
# The mean over tokens falls. In the first split the short half (32 tokens, low loss) weighs as much as the long one (360
# tokens). Micro-batches on one GPU can cause [the same error](https://huggingface.co/blog/gradient_accumulation). Either
# divide each part by the tokens of the *whole* batch and add, or use a loss per completion, as Eq. 1 of the paper does
# ([notebook 04](04_dpo_nll_training.ipynb)).

# %% [markdown]
# ### Exercise 8.2: parts of unequal size
#
# **Goal**: the correct gradient from unequal parts. **Difficulty**: 2 of 3. **Time**: 10 minutes.
#
# `combine(gradients, counts)` gets from each process the gradient of the *mean* over its items, and their number. Return
# the gradient of the mean over all items. A process without items has the gradient `nan`.
#
# <details><summary>Hint</summary>
#
# A mean times its count is a sum. Add the sums. What do you divide by? `nan` times zero is `nan`.
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
#
# ## 4 What is sent
#
# ### Whole copies: a ring
#
# $P$ GPUs have gradients of $S$ bytes, and all need the sum: an [all-reduce](../docs/glossary.md#all-reduce).
# **Predict**: if one GPU receives all gradients and sends the sum back, how much does it send?
#
# <details><summary>Answer</summary>
#
# It sends $(P-1)\,S$.
#
# </details>
#
# A ring is better ([Patarasuk and Yuan 2009](https://doi.org/10.1016/j.jpdc.2008.09.002)). Split
# each gradient into $P$ pieces. In each round every GPU sends one piece to its neighbour. The neighbour adds it in the
# first $P-1$ rounds (a [reduce-scatter](../docs/glossary.md#reduce-scatter)), and stores the finished sum in $P-1$ more
# rounds (an [all-gather](../docs/glossary.md#all-gather)).

# %%
def ring(gradients):
    """The sum on every GPU, and the bytes that each GPU sent."""
    P, sent = len(gradients), 0
    gpus = [np.array_split(gradient, P) for gradient in gradients]
    for phase, first in (("add", 0), ("store", 1)):
        for round in range(P - 1):
            moving = [gpus[i][(i + first - round) % P] for i in range(P)]      # all send at the same time
            sent += moving[0].nbytes
            for i, piece in enumerate(moving):
                neighbour, k = (i + 1) % P, (i + first - round) % P
                gpus[neighbour][k] = gpus[neighbour][k] + piece if phase == "add" else piece
    return [np.concatenate(gpu) for gpu in gpus], sent

# %%
measured = {}
for P in (2, 4, 8, 16, 64):
    gradients = list(np.random.default_rng(0).standard_normal((P, 6400)))
    sums, sent = ring(gradients)
    assert np.allclose(sums, sum(gradients)) and np.isclose(sent, 2 * (P - 1) / P * gradients[0].nbytes)
    measured[P] = sent / gradients[0].nbytes
helpers_08.ring_traffic(measured)

# %% [markdown]
# Each GPU sends $2\frac{P-1}{P}S$ bytes, less than twice the gradient for any number of GPUs. **Predict**: for
# Llama-3.1-8B, how many times smaller is $S$ with [QLoRA](../docs/glossary.md#qlora) than with all weights?

# %%
sizes = helpers_08.sizes(["smollm2-135m", "qwen2.5-0.5b", "llama-3.1-8b", "llama-2-70b-chat"])
sizes["times smaller"] = sizes["all weights, 16 bits"] / sizes["gradient of LoRA, 32 bits"]
sizes.round(2)                              # GB

# %% [markdown]
# $S$ shrinks almost a hundred times, because the frozen base has no gradient.
#
# ### Split layers
#
# Here no GPU has a whole layer. In each *micro-batch*:
#
# 1. Forward: gather each layer from all GPUs, compute it, free it.
# 2. Backward: gather each layer again.
# 3. Gather embeddings and output matrix once, and keep them until the end of the micro-batch.
# 4. Reduce-scatter the gradients.
#
# To gather or reduce-scatter $X$ bytes, each GPU sends $\frac{P-1}{P} X$.

# %% [markdown]
# ### Exercise 8.3: bytes of split layers
#
# **Goal**: derive what split layers send. **Difficulty**: 2 of 3. **Time**: 15 minutes.
#
# `sent_when_split(layers, outside, gradients, gpus, micro_batches)` returns the bytes that one GPU sends per optimiser
# step. `layers`, `outside` (embeddings and output matrix) and `gradients` are bytes of the whole model.
#
# <details><summary>Hint</summary>
#
# How often does each of the four points happen? One GPU alone sends nothing.
#
# </details>

# %%
def sent_when_split(layers, outside, gradients, gpus, micro_batches):
    # SOLUTION
    return micro_batches * (2 * layers + outside + gradients) * (gpus - 1) / gpus
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_08.sent_when_split(sent_when_split))

# %% [markdown]
# The worked solution is in [solutions/08_past_one_gpu.ipynb](solutions/08_past_one_gpu.ipynb). The layers are much larger
# than the LoRA gradient and are sent twice per micro-batch. So with QLoRA: **whole copies, unless they do not fit**.
#
# ## 5 Two processes, live
#
# Do the formulas hold? Two processes train on the same pairs in both ways. They communicate with
# [gloo](../docs/glossary.md#gloo-and-nccl), and the operating system counts the bytes. Each process runs this function.

# %%
print(inspect.getsource(helpers_08.train))

# %% [markdown]
# The `engine` shares the data, and may split the layers. `torchrun` starts the processes. **Predict**: how far are losses and
# weights of two processes from those of one?

# %% tags=["nbval-ignore-output"]
work = Path(tempfile.mkdtemp())
print("29 pairs", helpers_08.save_pairs(work))
found = helpers_08.trained(work, *((4, 1) if PROFILE == "smoke" else (8, 2)))     # bytes of a step: (of 8 steps - of 2 steps) / 6
differences = helpers_08.largest_differences(work, found)
differences.map("{:.0e}".format)

# %% tags=["remove-cell"]
assert sum(found["shares"], []) == list(range(7)) and (differences < 1e-4).all(axis=None)

# %% [markdown]
# They differ only by rounding, because the processes add the same numbers in another order. An incorrect average, a pair that
# counts twice or an incorrectly gathered layer would show here.
#
# Both processes send through one interface, so we expect twice the bytes of one GPU. **Predict**: for which of
# the two ways does the formula hold?

# %% tags=["nbval-ignore-output"]
P, micro_batches = 2, 2
layers, outside, gradients = helpers_08.seed_bytes()
derived = {"copies": P * 2 * (P - 1) / P * gradients,
           "split": micro_batches * (P - 1) * (2 * layers + outside + gradients)}      # P times exercise 8.3
missing = found["split"]["bytes"] - derived["split"]
print(f"missing in split: {missing / 1e6:.2f} MB per step; once more all gradients: {P * gradients / 1e6:.2f} MB")
helpers_08.counted_bytes(derived, found)

# %% tags=["remove-cell"]
assert derived["split"] > derived["copies"] > 0
assert found["split"]["bytes"] <= 0 or 0.9 * P * gradients < missing < 1.3 * P * gradients

# %% [markdown]
# It holds for whole copies, within a few percent. With split layers the gradients are sent twice, because gloo has no
# reduce-scatter and uses an all-reduce. NCCL, on GPUs, has a reduce-scatter. The losses do not show such a difference, but
# the bytes do.

# %% [markdown]
# ## 6 One process dies
#
# Without one process the others cannot continue, because the next sum needs all of them. We kill one of two when the samples
# of $M_0$ are finished. **Predict**: what will you see?

# %% tags=["nbval-ignore-output"]
out = work / "run"
status, messages = helpers_08.run_and_kill(out, rank=1, after="iteration_0/samples")
before = helpers_08.finished(out)
print(*messages, f"exit status {status}", "", "finished: " + ", ".join(before), sep="\n")

# %% tags=["remove-cell"]
assert status != 0 and len(messages) == 1 and "iteration_0/samples" in before and "iteration_1/adapter" not in before

# %% [markdown]
# The surviving process reports the failure once, and all processes end. **Predict**: if *one* process resumes the run, is it
# the same run?

# %% tags=["nbval-ignore-output"]
helpers_08.resume(out)
after = helpers_08.finished(out)
print("kept:", *[name for name in before if after[name] == before[name]])
print("new: ", *[name for name in after if name not in before])

# %% tags=["remove-cell"]
assert all(after[name] == before[name] for name in before) and "iteration_1/evaluation" in after

# %% [markdown]
# Yes: the finished stages are kept, and the others follow. The number of processes changes results only by
# rounding (section 5), so it is not a setting of the run.
#
# ## 7 Whole copies or split layers?
#
# How much time do more GPUs save? `python -m irpo_utils plan` estimates it from data sheets and a few measurements.
# **Predict**: is a run on 64 GPUs eight times faster than on eight?

# %%
plans = helpers_08.plans(["smollm2-135m", "llama-3.1-8b", "paper"], [1, 8, 64])
helpers_08.shares_of_time(plans)

# %% [markdown]
# No, at most twice: compare the hours above the bars. A step has 16 pairs, and a process needs at least one pair. So the plan
# assumes 16 processes, also in sampling, and 48 of 64 GPUs are idle. *The batch is the limit.*
#
# With split layers a GPU gathers the next layer while it computes the current one. If computing takes longer, the traffic
# costs no time. A pass of $n$ tokens through $W$ weights needs $2Wn$ operations. A micro-batch has three passes:
# forward, forward again (checkpointing), and backward (one pass, because the weights are frozen).

# %% [markdown]
# ### Exercise 8.4: the break-even
#
# **Goal**: find when split layers cost no time. **Difficulty**: 2 of 3. **Time**: 15 minutes.
#
# `hidden_from(gathered, link, weights, flops)` returns the tokens per micro-batch at which computing takes as long as
# sending. A GPU sends `gathered` bytes per micro-batch at `link` bytes per second, and computes `flops` operations per second.
#
# <details><summary>Hint</summary>
#
# Set the seconds of sending equal to the seconds of computing $n$ tokens in three passes.
#
# </details>

# %%
def hidden_from(gathered, link, weights, flops):
    # SOLUTION
    sending = gathered / link
    per_token = 3 * 2 * weights / flops
    return sending / per_token
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_08.hidden_from(hidden_from))

# %% [markdown]
# The worked solution is in [solutions/08_past_one_gpu.ipynb](solutions/08_past_one_gpu.ipynb). Now the paper's model of 70
# billion weights. Eight GPUs share a machine; between machines the link is slower. **Predict**: do split layers cost time on
# 8 GPUs, and on 64?

# %%
for n in (8, 64):
    run = helpers_08.traffic("paper", n)
    print(f"{n} GPUs: {run['link'] / 1e9:.0f} GB/s, hidden from {run['hidden_from']:,.0f} tokens, "
          f"a micro-batch has {run['micro_batch']:,.0f}")
helpers_08.two_ways("paper", [8, 64]).round(1)

# %% [markdown]
# On 64 GPUs: the slower link needs more tokens. Now compare the memory on eight GPUs:

# %%
helpers_08.memory_of_two_ways(["llama-3.1-8b", "paper"], 8)

# %% [markdown]
# Inside one machine, by this estimate, split layers cost no extra time. But whole copies are as fast, and with the base in
# [NF4](../docs/glossary.md#nf4) they fit. The paper trains all weights, which does not fit: it uses [64
# GPUs](https://arxiv.org/html/2404.19733v3#S3.SS1).

# %% [markdown]
# ## 8 Commands
#
# **One machine**, whole copies. `scripts/run.py` is the command `run` for several processes.
#
# ```bash
# torchrun --standalone --nproc_per_node 8 scripts/run.py --profile llama-3.1-8b --out runs/llama
# ```
#
# **Less memory per GPU** (for the paper's model 15 GB instead of 49): split layers, and a vLLM server on other GPUs for
# sampling. Only a run in one process [starts its server itself](../docs/results/speed.md#vllm). Here you start the server
# first. It must see the run directory, from which it loads the adapters.
#
# ```bash
# VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve meta-llama/Llama-2-70b-chat-hf --enable-lora --max-lora-rank 16 \
#      --enable-prefix-caching --quantization bitsandbytes --tensor-parallel-size 4 --data-parallel-size 2 --api-server-count 1
# VLLM_URL=http://SERVER:8000 torchrun --standalone --nproc_per_node 8 scripts/run.py --profile paper \
#      --shard true --engine vllm --out /shared/runs/paper
# ```
#
# **[Several machines](../scripts/cluster/README.md)**: accelerate, SkyPilot with
# [interruptible machines](../docs/glossary.md#interruptible-machine), Slurm, and containers.
#
# **Limitations.** The tests run two processes with gloo on a CPU. NCCL, several machines and clusters have not been run, so
# begin with one iteration of 64 questions. Split training writes no checkpoints: an interrupted training stage restarts.

# %% [markdown]
# ## What you have learnt
#
# - Random numbers belong to the question, so the samples do not depend on the processes.
# - The average of means over equal parts is the mean over all. Over unequal numbers of tokens it is not.
# - In a ring each GPU sends less than twice the gradient. With QLoRA that is little.
# - A step of 16 pairs has work for at most 16 GPUs.
#
# **Try**: kill rank 0 in section 6. Which process reports it?
#
# **Recall** without scrolling up, then open the answers.
#
# 1. Two processes sample with `seed=0` and one generator each. What is wrong with their samples?
# 2. Why may the loss per completion be averaged over processes, and the mean over tokens not?
# 3. You train whole copies on 16 GPUs instead of 8. How much more does each GPU send per step?
# 4. You rent 64 GPUs for steps of 16 pairs. What happens?
#
# <details><summary>Answers</summary>
#
# 1. Both draw the same random numbers.
# 2. All parts have equally many pairs, but different numbers of tokens.
# 3. 2 · 15/16 instead of 2 · 7/8 of the gradient: a fourteenth more.
# 4. The trainer refuses 64 processes, because each needs at least one pair. At most 16 can work.
#
# </details>
#
# **Next**: the [README](../README.md) has the results and the commands for your own runs.
