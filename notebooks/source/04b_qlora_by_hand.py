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
# # 04b · QLoRA by hand (optional)
#
# **What you will be able to do**
#
# - quantise a weight matrix to NF4 and reproduce the bytes that bitsandbytes stores;
# - build a LoRA layer and say why it starts as the frozen layer;
# - compute the memory that both save.
#
# | | `smoke` | `cpu` (default) | one GPU |
# |---|---|---|---|
# | time for this notebook | 10 seconds on one core | 10 seconds on one core | as `cpu` |
#
# **Needs**: the packages of this repository (in Colab: [`docs/colab.md`](../docs/colab.md)). It always uses the seed model on
# the CPU.
#
# **Before this**: [04 · Training with DPO + NLL](04_dpo_nll_training.ipynb). No later notebook depends on this one.

# %% tags=["nbval-ignore-output"]
import os, sys
from collections import namedtuple
from statistics import NormalDist
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
sys.path[:0] = [".", ".."]                     # checks_04.py and helpers_04.py are next to the notebooks
sys.path += ["../scripts", "../../scripts"]    # the package `studies`
import checks_04, helpers_04
from irpo_utils import models
from irpo_utils.ops.cli import quiet_libraries

quiet_libraries()
PROFILE = os.environ.get("IRPO_PROFILE", "cpu")
torch.set_printoptions(precision=4, sci_mode=False)
print("profile", PROFILE, "· this notebook uses the seed model on the CPU")

# %% [markdown]
# ## 1 NF4: a weight in four bits
#
# The paper trains all weights of a model with 70 billion parameters on [64 GPUs](https://arxiv.org/html/2404.19733v3#S3.SS1).
# [QLoRA](../docs/glossary.md#qlora) ([Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)) needs far less memory. It
# stores the linear layers of the model (the *base*) in four bits, freezes them, and trains a small adapter next to them. How
# can four bits hold a weight?
#
# We take one matrix of the seed model.

# %%
weights = load_file(models.FOLDERS["seed"] / "model.safetensors")
weight = weights["model.layers.0.self_attn.q_proj.weight"]
print(tuple(weight.shape), weight.dtype, weight.numel() * 4, "bytes")

# %% [markdown]
# **Blocks.** Cut the weights into [blocks of 64](../docs/glossary.md#block-wise-quantisation) and divide each block by its
# largest absolute value, the *absmax*. All values then lie between -1 and 1. An outlier costs precision in its own block
# only.

# %%
blocks = weight.view(-1, 64)
absmax = blocks.abs().amax(1)
scaled = blocks / absmax[:, None]
print(f"{len(blocks)} blocks; absmax from {absmax.min():.3f} to {absmax.max():.3f}")
assert scaled.abs().max() == 1

# %% [markdown]
# **Levels.** Four bits can name sixteen numbers. **Predict**: should the sixteen levels be evenly spaced from -1 to 1?
#
# <details><summary>Answer</summary>
#
# No: most weights lie near 0, so most levels should lie there. [NF4](../docs/glossary.md#nf4) takes quantiles of the normal
# distribution: eight positive levels, seven negative ones, and an exact 0. All are divided by the largest.
#
# </details>

# %%
def quantiles(n, edge=0.9677083):        # edge = 1 - (1/30 + 1/32) / 2; at 1 the quantile is infinite
    return [NormalDist().inv_cdf(edge + (0.5 - edge) * i / n) for i in range(n)]

levels = torch.tensor([-q for q in quantiles(7)] + [0.0] + quantiles(8)[::-1])
levels = levels / levels.max()
print(levels)
assert torch.allclose(levels, bnb.get_4bit_type("nf4", device="cpu"), atol=1e-6)

# %% tags=["nbval-ignore-output"]
helpers_04.nf4_levels(scaled, levels)

# %% [markdown]
# The bars at -1 and 1 are high, because every block has a weight with the absmax. The sixteen levels are the same for every
# model. We replace each weight by the index of its nearest level.

# %%
index = (scaled[..., None] - levels).abs().argmin(-1)          # (256, 64, 16) -> (256, 64)
print("weights:", blocks[0, :6])
print("scaled: ", scaled[0, :6])
print("index:  ", index[0, :6])
print("level:  ", levels[index[0, :6]])

# %% [markdown]
# **Bytes.** Two indices share a byte: 16 times the first plus the second. bitsandbytes stores exactly these bytes.

# %%
packed = (16 * index.flatten()[0::2] + index.flatten()[1::2]).to(torch.uint8)
# compress_statistics: double quantisation, see below
stored, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
print(packed[:8], len(packed), "bytes")
assert torch.equal(packed, stored.flatten())

# %% [markdown]
# **Double quantisation.** A 32-bit absmax for every 64 weights costs half a bit per weight.
# [Double quantisation](../docs/glossary.md#double-quantisation) stores it in 8 bits: subtract the mean, take groups of 256,
# divide each group by its own 32-bit absmax, and use the nearest of 256 fixed levels.

# %%
eight_bit_levels = bnb.create_dynamic_map()
groups = (absmax - absmax.mean()).view(-1, 256)
group_absmax = groups.abs().amax(1, keepdim=True)
nearest = ((groups / group_absmax)[..., None] - eight_bit_levels).abs().argmin(-1)
absmax_again = (eight_bit_levels[nearest] * group_absmax).flatten() + absmax.mean()
print("absmax before:", absmax[:5])
print("absmax after: ", absmax_again[:5])

# %% [markdown]
# Level times absmax gives the weight that the model computes with.
#
# **Predict**: how large is the mean |error|, as a share of the mean |weight|: 1 %, 10 % or 50 %?

# %%
dequantised = (levels[index] * absmax_again[:, None]).view_as(weight)
assert torch.allclose(dequantised, bnb.dequantize_4bit(stored, state), atol=1e-6)
bits = 4 + 8 / 64 + 32 / (64 * 256)
error = (dequantised - weight).abs().mean() / weight.abs().mean()
print(f"{bits:.3f} bits per weight; without double quantisation {4 + 32 / 64:.3f}; before 32")
print(f"mean |error|: {error:.0%} of the mean |weight|")
torch.manual_seed(0)
inputs = torch.randn(128, 1000)
output_error = ((dequantised - weight) @ inputs).norm() / (weight @ inputs).norm()
print(f"error of the layer's output for random inputs: {output_error:.0%}")

# %% [markdown]
# The output of the layer errs as much as its weights. With such a base $M_0$ *is* the rounded model, so sampling and training
# see the same weights.

# %% [markdown]
# ## 2 LoRA: a small change next to a frozen weight
#
# How can we train a layer whose weight is frozen? [LoRA](../docs/glossary.md#lora) ([Hu et al.
# 2021](https://arxiv.org/abs/2106.09685)) adds a product of two thin matrices. The factor $a/r$ keeps its size similar when
# $r$ changes:
#
# $$y = Wx + \frac{a}{r}\, B A x$$
#
# $x$ and $y$ are the input and the output of the layer, and $r$ is the [rank](../docs/glossary.md#rank). (In notebook 04
# these letters are a question, a completion and a reward.) $A$ has shape $(r, \text{in})$ and starts at random. $B$ has shape
# $(\text{out}, r)$ and starts at zero. PEFT calls $a$ `lora_alpha`. It is not the α of the loss.

# %% tags=["nbval-ignore-output"]
helpers_04.lora_diagram(d_in=128, d_out=128, r=16)

# %% [markdown]
# ### Exercise 4b.1: build a LoRA layer
#
# **Goal**: write the module. **Difficulty**: 2 of 3. **Time**: 15 minutes.
#
# `LoRALinear(base, r, a)` wraps a `torch.nn.Linear`, the base. It freezes the base and has two trained parameters, `A` and
# `B`. At the start its output equals the output of the base.
#
# <details><summary>Hint</summary>
#
# Use `torch.nn.Parameter`, `base.in_features` and `base.out_features`. A batch of rows is multiplied as `x @ A.T @ B.T`.
#
# </details>

# %%
class LoRALinear(torch.nn.Module):
    # SOLUTION
    def __init__(self, base, r=16, a=32):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), a / r
        self.A = torch.nn.Parameter(torch.randn(r, base.in_features) / base.in_features**0.5)
        self.B = torch.nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x):
        return self.base(x) + self.scale * (x @ self.A.T @ self.B.T)
    # STUB
    # def __init__(self, base, r=16, a=32):
    #     super().__init__()
    #     self.base = base.requires_grad_(False)
    #
    # def forward(self, x):
    #     return ...      # your turn: add A, B and their scaled product
    # END

# %%
print(checks_04.lora_linear(LoRALinear))

# %% [markdown]
# [Worked solution](solutions/04b_qlora_by_hand.ipynb).
#
# **Predict**: at the first step, which of $A$ and $B$ has a gradient that is not zero?

# %%
A, B = torch.ones(2, 4, requires_grad=True), torch.zeros(3, 2, requires_grad=True)
(B @ (A @ torch.tensor([1.0, 2.0, 3.0, 4.0]))).sum().backward()
print("gradient of A:", A.grad, "gradient of B:", B.grad, sep="\n")

# %% [markdown]
# <details><summary>Answer</summary>
#
# Only $B$ has one, because the gradient of $A$ has $B$ as a factor. After one step $B$ is not zero, and both learn. If both
# started at zero, neither would ever learn.
#
# </details>
#
# Does PEFT compute the same? Take a quantised layer of the seed model with its adapter. Compare its output with our
# formula and our dequantised weight.

# %%
seed_model, _ = models.load("seed", device="cpu")
layer = seed_model.get_base_model().model.layers[0].self_attn.q_proj
A, B = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
B += torch.sin(torch.arange(B.numel()).float()).view_as(B)           # as if trained: changes the model
x, a, r = torch.cos(torch.arange(128.0)), 32, 16
assert torch.allclose(layer(x), dequantised @ x + a / r * B @ (A @ x), atol=1e-4)
base = layer.base_layer.weight
print("base", tuple(base.shape), base.dtype, " A", tuple(A.shape), " B", tuple(B.shape))

# %% [markdown]
# The assertion holds: both outputs are equal up to rounding. The base is a column of bytes with two weights each. These two
# parts make a QLoRA layer: a frozen NF4 weight (section 1) and a LoRA adapter (section 2). Never
# [merge](../docs/glossary.md#merging) a trained adapter into the four bits: rounding can remove its small changes ([a
# report](https://github.com/huggingface/transformers/issues/31293)).

# %% [markdown]
# ### Exercise 4b.2: count what is trained
#
# **Goal**: predict the size of an adapter. **Difficulty**: 1 of 3. **Time**: 5 minutes.
#
# `lora_parameters(shapes, r)` takes the (out, in) shapes of linear layers and returns how many numbers their LoRA matrices
# of rank `r` have.
#
# <details><summary>Hint</summary>
#
# Each layer has one $A$ and one $B$. Their shapes are above.
#
# </details>

# %%
def lora_parameters(shapes, r):
    # SOLUTION
    return sum(r * (d_out + d_in) for d_out, d_in in shapes)
    # STUB
    # return ...      # your turn
    # END

# %%
print(checks_04.lora_parameters(lora_parameters))

# %% [markdown]
# [Worked solution](solutions/04b_qlora_by_hand.ipynb).

# %% [markdown]
# ## 3 Memory: all weights or QLoRA
#
# How much memory does this save? Each transformer block of a Llama or Qwen model has seven matrices. Their sizes follow from
# the model's `config.json`.

# %%
Sizes = namedtuple("Sizes", "hidden blocks feed_forward keys vocabulary embeddings")
SIZES = {"seed": Sizes(128, 4, 384, 128, 1097, 1),
         "SmolLM2-135M": Sizes(576, 30, 1536, 192, 49152, 1),
         "Qwen2.5-0.5B": Sizes(896, 24, 4864, 128, 151936, 1),
         "Qwen2.5-1.5B": Sizes(1536, 28, 8960, 256, 151936, 1),
         "Llama-3.2-1B": Sizes(2048, 16, 8192, 512, 128256, 1),
         "Llama-3.1-8B": Sizes(4096, 32, 14336, 1024, 128256, 2),
         "Llama-2-70B": Sizes(8192, 80, 28672, 1024, 32000, 2)}

def linear_shapes(s):
    """(out, in) of all linear layers: queries, keys, values, output, gate, up, down."""
    d, ffn, kv = s.hidden, s.feed_forward, s.keys
    return s.blocks * [(d, d), (kv, d), (kv, d), (d, d), (ffn, d), (ffn, d), (d, ffn)]

# %% [markdown]
# If **all weights** are trained, each takes 18 bytes: 2 for the bf16 weight, 2 for the gradient, 4 for an [fp32
# copy](../docs/glossary.md#bf16), 8 for two Adam moments, and 2 for the reference. With **QLoRA** the base takes the bits
# counted above, and an embedding takes 2 bytes per number. An adapter number takes 16 bytes: weight, gradient and two moments
# in fp32. The reference is the same base with the adapter of $M_t$, so it needs almost no extra memory.

# %%
def gigabytes(name, r=16):
    """Base, embeddings, adapter and their sum with QLoRA; the same model with all weights trained."""
    sizes, shapes = SIZES[name], linear_shapes(SIZES[name])
    linear = sum(d_out * d_in for d_out, d_in in shapes)
    n_adapter = sum(r * (d_out + d_in) for d_out, d_in in shapes)
    embedding = sizes.embeddings * sizes.vocabulary * sizes.hidden
    base, embeddings, adapter = bits / 8 * linear / 1e9, 2 * embedding / 1e9, 16 * n_adapter / 1e9
    return base, embeddings, adapter, base + embeddings + adapter, 18 * (linear + embedding) / 1e9

print(f"{'GB':14}{'base':>8}{'embeddings':>12}{'adapter':>9}{'QLoRA':>9}{'all weights':>13}")
for name in SIZES:
    base, embeddings, adapter, qlora, full = gigabytes(name)
    print(f"{name:14}{base:8.3f}{embeddings:12.3f}{adapter:9.3f}{qlora:9.3f}{full:13.3f}")

# %% [markdown]
# The table leaves out activations and logits, which grow with batch size and length. A smaller `micro_batch_size` reduces
# both, and `gradient_checkpointing` reduces activations. `python -m irpo_utils plan` estimates the total for a GPU.
#
# Is our number of bits per weight correct? Count the bytes of the seed model.

# %%
held, layers = 0, 0
for module in seed_model.modules():
    if isinstance(module, Linear4bit):
        layers += 1
        state = module.weight.quant_state             # absmax in 8 bits, absmax of groups in 32
        held += module.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
expected = bits / 8 * sum(d_out * d_in for d_out, d_in in linear_shapes(SIZES["seed"]))
print(f"{layers} layers, {held:,} bytes, expected {expected:,.0f}")

# %% tags=["remove-cell"]
assert abs(held / expected - 1) < 0.01

# %% [markdown]
# ## What you have learnt
#
# - NF4 consists of blocks of 64, an absmax per block, and sixteen quantiles of the normal distribution.
# - LoRA adds two thin matrices, and the layer starts unchanged because $B = 0$.
# - Together they reduce the memory of the table more than tenfold for its real models.
#
# **Try**: in a new cell, round to sixteen evenly spaced levels. How does the mean error change?
#
# **Recall**
#
# 1. Why does the gradient of $A$ vanish at the first step, and why is that no problem?
# 2. Why is a trained adapter not merged into a 4-bit base?
#
# <details><summary>Answers</summary>
#
# 1. It has $B$ as a factor, and $B$ starts at zero. $B$ itself has a gradient, so after one step both learn.
# 2. Rounding to sixteen levels can remove its small changes.
#
# </details>
#
# **Next**: [05 · Iterations](05_iterations.ipynb).
