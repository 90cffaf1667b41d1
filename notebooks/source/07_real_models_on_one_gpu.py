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
# # 07 · Real models on one GPU
#
# **What you will be able to do**
#
# - connect to a rented machine, and resume a run after the machine has disappeared;
# - estimate memory, hours and cost of a run before you pay;
# - run a real model, and read its accuracy per iteration with paired intervals;
# - recognise a run that learns nothing, and publish a model with its own evaluation.
#
# | | `smoke` | `smollm2-135m-cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook | 1 minute on one core | 4 minutes on one core | as on the CPU; section 3 estimates your real run |
#
# **Needs**: the packages of this repository (in Colab: [`docs/colab.md`](../docs/colab.md)), and SmolLM2-135M-Instruct.
# `make lab` installs this model. Otherwise the notebook downloads it from the Hugging Face hub (0.3 GB).
#
# **Before this**: [06 · Is it the method?](06_baselines_and_ablations.ipynb). The five stages stay the same. **Optional
# sequel**: [07b · What the data must be](07b_what_the_data_must_be.ipynb).

# %% tags=["nbval-ignore-output"]
import math, os, sys, tempfile
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from bitsandbytes import functional as bnb
sys.path[:0] = [".", ".."]                     # checks_07.py and helpers_07.py are next to the notebooks
import checks_07, helpers_07
from irpo_utils import grading, models, plots, profiles, sampling, tasks
from irpo_utils.ops import plan as planning, run as runs
from irpo_utils.ops.cli import quiet_libraries

quiet_libraries()
PROFILE = os.environ.get("IRPO_PROFILE", "smollm2-135m-cpu")     # the one setting; on a GPU such as "qwen2.5-0.5b"
NAME = "smollm2-135m-cpu" if PROFILE == "smoke" else PROFILE
print("profile", PROFILE, "· device", models.default_device())

# %% [markdown]
# ## 1 Connect
#
# What should you check first on a rented machine? Check the driver first. The pinned torch brings CUDA 13, which needs
# **driver 580 or newer** and a GPU from 2018 or later. Run `nvidia-smi` *before* you install 3 GB.

# %% tags=["nbval-ignore-output"]
print(helpers_07.driver())

# %% tags=["remove-cell"]
assert models.default_device() in ("cpu", "cuda")

# %% [markdown]
# ```bash
# git clone REPOSITORY irpo && cd irpo      # the address on this repository's page
# make .venv/.ready && source .venv/bin/activate
# python -c "import torch; print(torch.cuda.get_device_name(), torch.cuda.is_bf16_supported())"
# ```
#
# With an older driver choose another image. If you cannot, install torch for CUDA 12 (driver 525 or newer) instead of
# running `make`. The versions then differ from the pinned ones:
#
# ```bash
# python3 -m venv .venv && source .venv/bin/activate
# # here the command of https://pytorch.org/get-started/locally for CUDA 12
# pip install -e ".[notebooks,gguf]" && touch .venv/.ready
# ```
#
# **JupyterLab over ssh**: the first line runs on your computer, the others on the machine. Then open the printed address.
# Programs in `tmux` keep running when the connection is lost.
#
# ```bash
# ssh -L 8888:localhost:8888 USER@MACHINE
# tmux new -s irpo                          # later: tmux attach -t irpo
# .venv/bin/jupyter lab notebooks --no-browser --port 8888
# ```
#
# **Colab**: a [set-up cell](../docs/colab.md) at the top of a notebook clones the repository and installs the packages. Copy
# `runs/` to your drive before the session ends.
#
# **Gated models** such as Llama: accept the licence on the model's page, create a *read* token, and run `hf auth login`. Put
# no other token on a rented machine.

# %% [markdown]
# ### Interruptible (spot) machines
#
# [Interruptible](../docs/glossary.md#interruptible-machine) machines are cheaper and can disappear at any minute. What
# survives? We start a small run in a separate process, kill it after sampling, and start the same command again.
#
# **Predict**: which finished stages does the second process repeat?

# %% tags=["nbval-ignore-output"]
spot = Path(tempfile.mkdtemp(), "spot")
process = helpers_07.start_run(spot)           # python -m irpo_utils run --profile smoke ...
helpers_07.wait_for_stage(process, spot / "iteration_0/samples")
process.kill()                                 # SIGKILL: no time to save anything
process.wait()
kept = helpers_07.finished_stages(spot)
status = helpers_07.start_run(spot).wait()     # the same command
complete = helpers_07.finished_stages(spot)
print("kept:    ", *kept)
print("made now:", *(stage for stage in complete if stage not in kept))

# %% tags=["remove-cell"]
assert status == 0
assert kept and all(complete[stage] == kept[stage] for stage in kept)

# %% [markdown]
# None: finished stages are kept. Within a stage, sampling stores blocks of completions and training stores
# [checkpoints](../docs/glossary.md#checkpoint). A kill costs minutes if the disk survives. Some providers delete the disk.
# Copy the files during the run, and check the price of [egress](../docs/glossary.md#egress):
#
# ```bash
# rsync -av MACHINE:irpo/runs/ runs/        # on your own computer
# ```
#
# [`sky.yaml`](../scripts/cluster/sky.yaml) automates this for several clouds ([what is
# tested](../scripts/cluster/README.md)). When you are done, *delete* the machine: you still pay for the disk of a stopped
# machine.

# %% [markdown]
# ### Exercise 7.1: what did the kill cost?
#
# **Goal**: know the price of an interruption. **Difficulty**: 1 of 3. **Time**: 10 minutes.
#
# Assume a program that keeps only finished stages. `minutes_lost(stages, killed_at)` takes its stages in order, as
# pairs of name and minutes, and the minute of the kill. It returns the minutes of work that must be done again.
#
# <details><summary>Hint</summary>
#
# Add up the stages. The last sum that does not exceed `killed_at` is safe. After the end of the run nothing can be lost.
#
# </details>

# %%
def minutes_lost(stages, killed_at):
    # SOLUTION
    safe = 0
    for _, minutes in stages:
        if safe + minutes > killed_at:
            return killed_at - safe
        safe += minutes
    return 0
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_07.minutes_lost(minutes_lost))

# %% [markdown]
# The worked solution is in [solutions/07_real_models_on_one_gpu.ipynb](solutions/07_real_models_on_one_gpu.ipynb).

# %% [markdown]
# ## 2 Choose model and GPU
#
# Does the model fit? Four parts take memory:
#
# - the base, here in 4 bits ([NF4](../docs/glossary.md#nf4)) with embeddings in 16 bits;
# - the [adapter](../docs/glossary.md#adapter): 14 bytes per weight in training: 4 each for the weight, its gradient and a
#   copy of the gradient, and 2 for the 8-bit optimiser state;
# - the [KV cache](../docs/glossary.md#kv-cache) in sampling, or the [activations](../docs/glossary.md#activation) in training;
# - the [logits](../docs/glossary.md#logit).
#
# The model's shape, the profile and the [micro-batch](../docs/glossary.md#micro-batch) determine all four.

# %%
def memory(name, pairs):
    """Bytes of each part when sampling, and when training on `pairs` at once, for the longest GSM8K prompts."""
    p, m = profiles.get(name), planning.SHAPES[name]
    length = planning.TASKS["gsm8k"].longest + p.max_new_tokens
    rows, adapter = p.sampling_batch_size, m.lora(p.lora_r)
    base = 4.127 / 8 * m.linear + 2 * (m.parameters - m.linear)       # 4.127 bits per NF4 weight
    cache = rows * length * m.layers * 2 * m.kv * 2                    # keys and values, 16 bits
    inputs = 2 * pairs * length * m.layers * m.hidden * 2              # gradient checkpointing
    one_token, all_tokens = rows * m.vocabulary, 2 * pairs * p.max_new_tokens * m.vocabulary
    # Bytes of a logit in sampling: 2, and five numbers in fp32. In training: itself and its gradient
    # in 16 bits (2 each), and both in fp32 (4 each).
    sampling = {"base": base, "adapter": 4 * adapter, "cache": cache, "logits": 22 * one_token}
    training = {"base": base, "adapter": 14 * adapter, "activations": inputs, "logits": 12 * all_tokens}
    return {f"{name}, sampling {rows} at once": sampling, f"{name}, training {pairs} at once": training}

table = pd.DataFrame(memory("qwen2.5-0.5b", 4) | memory("llama-3.1-8b", 1)).T[["base", "adapter", "cache", "activations", "logits"]]

# %% [markdown]
# **Predict**: which part is largest when the model with 0.5 billion weights trains? Which part is largest when the model
# with 8 billion weights samples?

# %%
helpers_07.memory_bars(table)

# %% [markdown]
# When the small model trains four pairs, the logits are largest: its vocabulary is that of large models. When the large
# model samples, the cache is largest. `--micro-batch-size` lowers the first, `--sampling-batch-size` the second. Smaller
# values cost time, and change results only by rounding. [Gradient checkpointing](../docs/glossary.md#gradient-checkpointing)
# keeps the activations small.
#
# On a GPU the run chooses what you leave open. It takes a base in 16 bits if there is room. Before training it chooses
# micro-batch and checkpointing from the lengths of the pairs and the free memory. If memory still runs out, it halves the
# sampling batch or the micro-batch and continues.

# %% [markdown]
# ### Exercise 7.2: the cache
#
# **Goal**: know the part that grows with every completion. **Difficulty**: 1 of 3. **Time**: 10 minutes.
#
# `kv_cache_bytes` returns the bytes of the cache for `rows` completions of `columns` positions each. Every layer has `heads`
# attention heads with `head_dim` numbers per position, and `kv_heads` heads with keys and values.
#
# <details><summary>Hint</summary>
#
# In most new models several heads share one key and one value. Which of the two numbers of heads is stored? What is stored
# besides keys?
#
# </details>

# %%
def kv_cache_bytes(layers, heads, kv_heads, head_dim, rows, columns, bytes_per_number=2):
    # SOLUTION
    return 2 * layers * kv_heads * head_dim * rows * columns * bytes_per_number
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_07.kv_cache_bytes(kv_cache_bytes))

# %% [markdown]
# The worked solution is in [solutions/07_real_models_on_one_gpu.ipynb](solutions/07_real_models_on_one_gpu.ipynb).
#
# Which GPU? `plan` estimates the hours of a whole run. An hour of an H200 costs many times as much as an hour of a T4.
# **Predict**: with the small model, how many times faster is the H200?

# %% tags=["nbval-ignore-output"]
def hours(profile, gpu):
    plan = planning.plan(profiles.get(profile), f"1x{gpu}")
    return plan.total.hours if plan.total.memory <= plan.room else np.nan

gpus = ("T4-16GB", "RTX4090-24GB", "L40S-48GB", "A100-80GB", "H100-80GB", "H200-141GB")
planned = pd.DataFrame({profile: {gpu: hours(profile, gpu) for gpu in gpus} for profile in ("qwen2.5-0.5b", "llama-3.1-8b")})
helpers_07.hours_bars(planned)

# %% tags=["remove-cell"]
assert planned.notna().any().all()

# %% [markdown]
# By this estimate, 9 times the T4. For decoding it assumes CUDA graphs, which launch all GPU programs of a step
# ([`engines/cuda_graph.py`](../irpo_utils/engines/cuda_graph.py)). Compare the *cost of the run*: hours times price. Prefer
# GPUs of 2020 or later. A T4 has no [bf16](../docs/glossary.md#bf16), so the run uses fp16 with [loss
# scaling](../docs/glossary.md#loss-scaling).

# %% [markdown]
# ## 3 Estimate
#
# What will *your* run cost? Set the three values below. **Predict**: which stage takes the most time?

# %% tags=["nbval-ignore-output"]
CHOICE, GPU, PRICE = "qwen2.5-0.5b", "RTX4090-24GB", 1.0         # price per hour, in your money
plan = planning.plan(profiles.get(CHOICE), f"1x{GPU}", PRICE)
print(planning.table(plan))

# %% tags=["remove-cell"]
assert math.isclose(plan.total.cost, PRICE * plan.total.hours)

# %% [markdown]
# Here training takes most, and evaluation least: it asks only 300 validation questions. Training needs more
# memory than its bar in section 2: this GPU has room, so the run keeps the base in 16 bits and all activations.
#
# **Predict**: what would it take to evaluate every model on the whole test split, with 32 completions per question?

# %% tags=["nbval-ignore-output"]
expensive = dict(eval_split="test", n_eval_questions=None, eval_samples=32, eval_samples_ends=32)
plan = planning.plan(profiles.get(CHOICE, **expensive), f"1x{GPU}", PRICE)
print(planning.table(plan))

# %% tags=["remove-cell"]
assert plan.stages[-1].tokens > plan.stages[0].tokens

# %% [markdown]
# Evaluation costs more than sampling. It would also mislead: the best of five test accuracies is too optimistic. So choose
# the best model on validation questions, and evaluate it on the test split once, at the end.
#
# The plan prints its assumptions. It can be off by a factor of two: compare it with your `timing.csv`.
#
# ## 4 Run
#
# Does every stage work with a real model, its tokenizer and its chat template? Find out in minutes, before you spend hours.
# The next cell makes a small run: one iteration on 24 easy questions, with gold solutions as chosen completions. Six steps on
# gold solutions change the model a lot: the run warns that $M_1$ is far from $M_0$ in
# [KL](../docs/glossary.md#kl-divergence).

# %% tags=["nbval-ignore-output"]
profile = profiles.get(NAME)
MODEL = helpers_07.two_blocks(profile.model) if PROFILE == "smoke" else profile.model
changes = dict(task="jsonl", data=helpers_07.EASY_QUESTIONS, model=MODEL, start=None, method="irpo", iterations=1, gold=True,
               n_questions=24, n_samples=2, k_pairs=1, max_new_tokens=80, batch_size=4, micro_batch_size=4, learning_rate=3e-4,
               eval_split="validation", n_eval_questions=10, eval_samples=2, eval_samples_ends=2)
if PROFILE == "smoke":
    changes |= dict(n_questions=8, max_new_tokens=12)
small = profiles.get(NAME, **changes)
out = Path(tempfile.mkdtemp()) / "small_run"
small_metrics = pd.DataFrame(runs.run(small, out, progress=False))

# %% tags=["remove-cell"]
assert set(small_metrics.iteration) == {0, 1}

# %% tags=["nbval-ignore-output"]
wanted = {"greedy": "greedy accuracy", "no_answer_rate": "no answer or cut off", "truncated_rate": "cut off", "mean_tokens": "tokens"}
shown = small_metrics[small_metrics.metric.isin(wanted)].replace({"metric": wanted})
shown[["iteration", "metric", "value", "low", "high", "n"]].round(2)

# %% tags=["remove-cell"]
assert (shown.low <= shown.value).all()

# %% [markdown]
# With ten questions the interval is too wide for any conclusion. But every stage works. Now start the real
# run. Download the model first, so that errors come early:
#
# ```bash
# export HF_HOME=$BIG_DISK/hf               # often the home folder is small
# hf download Qwen/Qwen2.5-0.5B-Instruct
# python -m irpo_utils run --profile qwen2.5-0.5b --out runs/qwen2.5-0.5b
# python scripts/evaluate.py runs/qwen2.5-0.5b --iterations best --split test
# ```
#
# After every iteration the run prints the validation accuracy and the advice of patience 2.
# `--report-to tensorboard` adds curves (first `pip install tensorboard`). With `--engine vllm` the run starts a
# [vLLM](../docs/results/speed.md#vllm) server, which writes the completions.
#
# `evaluate.py` chooses the iteration with the highest greedy validation accuracy. It evaluates this model once on the test
# split, with a [majority vote](../docs/glossary.md#majority-vote) over 32 completions. With `--iterations 0 best` it also
# evaluates $M_0$ and compares the two.
#
# **Without a GPU**, two commands train SmolLM2-135M in some hours. The [stored run](../docs/results/smollm2.md) of the next
# section was made with these settings.
#
# ```bash
# python -m irpo_utils run --profile smollm2-135m-sft --out runs/smollm2-135m-sft
# python -m irpo_utils run --profile smollm2-135m-cpu --out runs/smollm2-135m-cpu
# ```

# %% [markdown]
# ## 5 Read the curve
#
# Did it work? The next cells draw **your run**, even before it is finished. Until you have one, they draw a stored run
# on [SVAMP](../docs/glossary.md#svamp) ([data](../figures/real_curve.csv)).
#
# Its $M_0$ is not the published model, which hardly ever reaches a final answer. $M_0$ is that model after SFT on 2,447 short
# gold solutions of GSM8K. The learning rate was chosen on validation questions ([results](../docs/results/smollm2.md)).
#
# **Predict** the shape: a steep rise as with the seed model, a gentle one, or none?

# %% tags=["nbval-ignore-output"]
RUN = helpers_07.own_run(CHOICE, NAME)                           # None: no run yet
metrics, gains, described = helpers_07.result(RUN)
print(described)
figure = plots.accuracy_per_iteration(metrics)
figure

# %% tags=["remove-cell"]
assert "M_0" in plots.alt_text(figure)

# %% [markdown]
# The bands of greedy accuracy overlap. But the first and the last model answer the same questions, so compare them question by
# question.

# %% tags=["nbval-ignore-output"]
gains.round(1)

# %% tags=["remove-cell"]
assert (gains.low <= gains.high).all()

# %% [markdown]
# For the stored run: sampled accuracy gains in the first and in the third iteration, and triples from $M_0$ to $M_3$. No gain
# in greedy accuracy from $M_0$ to $M_3$ is resolved. With the other seeds sampled accuracy rises as well. A claim about
# greedy accuracy needs more seeds (`python scripts/plot.py RUN RUN ...`) and test questions. How many?

# %% [markdown]
# ### Exercise 7.3: how many test questions?
#
# **Goal**: plan an evaluation that can decide. **Difficulty**: 2 of 3. **Time**: 10 minutes.
#
# On `n` questions a gain of `gain` points has an interval of plus or minus `half_width` points. The half-width is proportional
# to $1/\sqrt n$. `questions_needed(gain, half_width, n)` returns the smallest number of questions for which the half-width is
# at most the gain. Assume that the gain stays the same.
#
# <details><summary>Hint</summary>
#
# By which factor must the half-width shrink? Which factor of questions does that take? Round up with `math.ceil`.
#
# </details>

# %%
def questions_needed(gain, half_width, n):
    # SOLUTION
    return math.ceil(n * (half_width / gain) ** 2)
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_07.questions_needed(questions_needed))

# %% [markdown]
# The worked solution is in [solutions/07_real_models_on_one_gpu.ipynb](solutions/07_real_models_on_one_gpu.ipynb). With so
# many questions a true gain of this size is resolved only half the time.
#
# ### Is it the method?
#
# The stored study also has RFT and DPO without NLL, from the same $M_0$ with the same learning rate (untuned for DPO).
#
# **Predict** the order of the three methods in sampled accuracy.

# %%
helpers_07.curve_of_methods()

# %%
helpers_07.ahead_of_others().round(1)

# %% [markdown]
# Iterative RPO has the highest mean sampled accuracy, but over all seeds no lead is resolved. DPO without NLL falls behind
# with one of two seeds. From $M_0$ to $M_3$ Iterative RPO gains 7.5 points (3.5 to 11.8) and RFT 5.3 (2.2 to 9.5)
# ([results](../docs/results/smollm2.md)).
#
# What do larger models reach? Each of these published numbers has its own prompt and grader. Compare gains, not levels:
#
# | model, questions | $M_0$ | after each iteration |
# |---|---|---|
# | [Llama-2-70B-chat](https://arxiv.org/html/2404.19733v3#S3.T1), GSM8K | 55.6 | 73.1, 78.0, 81.1, 81.6 |
# | Llama-3-8B base ([Prasad et al.](https://arxiv.org/html/2411.04109v3)), GSM8K | 41.2 | 61.4, 64.3 |

# %% [markdown]
# ## 6 Look at ten completions
#
# Would you have given the same grades? Read ten completions of your last model before you believe a number. Until you have a
# run, the cell shows the small run of section 4. Is there a final answer? Did the grader read it? Was the text cut off?

# %% tags=["nbval-ignore-output"]
ten = helpers_07.last_completions(RUN, out).select(range(10))
for row in ten:
    print(f"{row['reason']}, gold answer {row['answer']}:\n  {row['completion'].strip()[-160:]!r}")
print("\n", grading.count_reasons(ten), "unread endings:", grading.unread(ten))

# %% tags=["remove-cell"]
assert sum(grading.count_reasons(ten).values()) == 10

# %% [markdown]
# `no_answer` and `truncated` are different problems. A text without a readable answer needs another prompt, a better
# grader, or SFT. A text that was cut off needs a larger `--max-new-tokens`, unless it loops.
#
# The metrics of a run show these problems early. Below are your run (or the stored one) and a run that started from the
# *published* model without SFT ([data](../figures/smollm2_135m_svamp_no_sft.csv)). **Predict**: without SFT, what share of
# the questions gave pairs?

# %% tags=["nbval-ignore-output"]
without_sft, _ = helpers_07.stored("smollm2_135m_svamp_no_sft")
figure = helpers_07.signs({"your run" if RUN else "stored run": metrics, "run without SFT": without_sft})
figure

# %% tags=["remove-cell"]
assert "KL" in plots.alt_text(figure)

# %% [markdown]
# Two of 100. So the model hardly changed, and its greedy accuracy stayed at 0. The signs:
#
# | sign | healthy | trouble, and what to do |
# |---|---|---|
# | completions without an answer (cut off included) | few, falling | many: SFT first, or another prompt |
# | completions cut off | few | rising: the model loops, lower the learning rate |
# | questions with pairs | tens of percent | a few percent: easier questions, more samples, `--gold true` |
# | KL to the previous model | stable or falling | above 4 nats the run warns: lower the learning rate |
#
# Warnings are in `iteration_t/warnings.jsonl`. When in doubt, stop: the run can resume later.

# %% [markdown]
# ## 7 Merge, serve, push
#
# Your result is an adapter of some megabytes. Which model did you measure? That depends on its base: 16 bits or NF4
# (`quantize` in `profile.json`). The next cells load $M_1$ of the small run on an NF4 base, as a run on a small GPU does. In
# one layer, $W$ is the published weight, $\hat W$ its NF4 version, and $\Delta = \frac{a}{r} B A$ the change
# by the [LoRA](../docs/glossary.md#lora) adapter.

# %% tags=["nbval-ignore-output"]
adapter = out / "iteration_1/adapter"
m1, tokenizer = models.load(MODEL, adapter, dtype=small.dtype, pad_token=small.pad_token)      # on an NF4 base
original, _ = models.load(MODEL, quantize=False, dtype=small.dtype, pad_token=small.pad_token)
def find_layer(model):
    return next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp.up_proj"))

layer, plain = find_layer(m1), find_layer(original)
A, B = (matrix["default"].weight.data.float() for matrix in (layer.lora_A, layer.lora_B))
delta = small.lora_alpha / small.lora_r * B @ A
W = plain.base_layer.weight.data.float()
W_hat = bnb.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state).float()

# %% tags=["remove-cell"]
assert delta.shape == W.shape == W_hat.shape

# %% [markdown]
# **Predict**: which changed this layer more, training ($\Delta$) or rounding to four bits ($\hat W - W$)?

# %% tags=["nbval-ignore-output"]
print(f"rounding {(W_hat - W).norm() / W.norm():.1%}, training {delta.norm() / W.norm():.2%} of the weights' norm")

# %% [markdown]
# Rounding, by far. How much of $\Delta$ does each format keep (cosine with $\Delta$)?

# %% tags=["nbval-ignore-output"]
def change(stored, before):
    return torch.nn.functional.cosine_similarity((stored.float() - before).flatten(), delta.flatten(), dim=0).item()

nf4 = bnb.dequantize_4bit(*bnb.quantize_4bit(W_hat + delta, blocksize=64, quant_type="nf4", compress_statistics=True))
cosines = {"NF4": change(nf4, W_hat)}
for name, dtype in {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}.items():
    cosines[name] = change((W + delta).to(dtype), W)
helpers_07.survived(cosines)

# %% tags=["remove-cell"]
assert cosines["NF4"] < cosines["fp32"]

# %% [markdown]
# Never [merge](../docs/glossary.md#merging) into four bits: $\Delta$ almost disappears. $\Delta$ is so
# small that bf16 keeps only a part. The next cell loads the model without NF4, and PEFT stores $W + \Delta$ in bf16. A run
# with an NF4 base measures *another* model, $\hat W + \Delta$. **Predict**: do $M_1$ and the merged model write the same
# completions?

# %% tags=["nbval-ignore-output"]
folder = Path(tempfile.mkdtemp()) / "merged"
unquantised, _ = models.load(MODEL, adapter, quantize=False, device="cpu", dtype="bfloat16")
unquantised.merge_and_unload().save_pretrained(folder)
tokenizer.save_pretrained(folder)
merged, _ = models.load(str(folder), quantize=False, dtype=small.dtype, pad_token=small.pad_token)
task = tasks.get("jsonl")
asked = task.load("validation", helpers_07.EASY_QUESTIONS)

def greedy(model):
    return sampling.sample(model, tokenizer, asked, task, n=1, temperature=0.0, max_new_tokens=small.max_new_tokens,
                           batch_size=small.sampling_batch_size, progress=False)["completion"]

same = sum(a == b for a, b in zip(greedy(m1), greedy(merged)))
print(*sorted(file.name for file in folder.iterdir()))
print(f"{same} of {len(asked)} greedy completions are the same")

# %% tags=["remove-cell"]
assert 0 <= same <= len(asked)

# %% [markdown]
# No: these are two models. With a base in 16 bits they differ only by the rounding of the merged weights. In both
# cases evaluate the merged model on the test questions (second command). Report *its* accuracy.
#
# ```bash
# python scripts/merge.py qwen2.5-0.5b runs/qwen2.5-0.5b/iteration_4/adapter merged     # or the best iteration
# python -m irpo_utils run --profile qwen2.5-0.5b --model merged --iterations 0 --eval-split test \
#     --n-eval-questions none --eval-samples-ends 32 --quantize false --out runs/merged
# vllm serve merged                         # pip install vllm, in a separate environment
# curl localhost:8000/v1/chat/completions -H "Content-Type: application/json" \
#     -d '{"model": "merged", "temperature": 0, "messages": [{"role": "user", "content": "..."}]}'
# python llama.cpp/convert_hf_to_gguf.py merged --outfile my-model.gguf     # for llama.cpp on a laptop
# hf auth login                             # a write token, on your own computer
# hf upload YOU/my-model merged --private
# ```
#
# Send the training prompt with its instruction: `tasks.get("gsm8k").prompt(row)`. Your model card needs: the base and its
# licence, data and splits, settings (`profile.json`), versions (`environment.json`), accuracy of $M_0$ and of *this* file
# with intervals, and the number of seeds ([example](../docs/model_card_seed.md)).

# %% [markdown]
# ## What you have learnt
#
# - Check the driver first, and delete the machine last. A killed run resumes with the same command.
# - Logits and cache can need more memory than the weights.
# - Compare the cost of the run, not the price per hour.
# - A small complete run finds errors that an estimate misses.
# - Paired intervals show whether a gain is resolved. Without preference pairs Iterative RPO learns nothing.
# - $W + \Delta$ and $\hat W + \Delta$ are different models. Evaluate the one that you publish.
#
# **Try**: two seeds of your run, drawn with `python scripts/plot.py`. Is a gain resolved that was not before?
#
# **Recall**
#
# 1. Why may a sixteenfold smaller model with a larger micro-batch need almost as much memory?
# 2. The machine disappears in minute 50 of an hour of training. What do you type, and what is lost?
# 3. Greedy accuracy rises by 3 points (-1.0 to +7.5). What do you report?
# 4. After one iteration 2 % of the questions give pairs. What do you do?
# 5. You measured $\hat W + \Delta$ and upload the merged model. What is missing?
#
# <details><summary>Answers</summary>
#
# 1. The logits grow with the vocabulary and the micro-batch, not with the number of weights.
# 2. The same command. You lose the steps since the last checkpoint.
# 3. The interval, the number of questions and seeds, and "not resolved".
# 4. Stop. Try SFT first, easier questions, more samples or gold solutions.
# 5. The evaluation of the merged model.
#
# </details>
#
# **Next**: [08 · Past one GPU](08_past_one_gpu.ipynb), optional: what a second GPU can do.
