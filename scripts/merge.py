"""Merge the adapter of a run into its model: M_t as one ordinary model, to serve or share.

    python scripts/merge.py qwen2.5-0.5b runs/qwen2.5-0.5b/iteration_4/adapter merged

W + (alpha / r) B A from the base before quantisation, rounded once. If the adapter was trained on a
4-bit base, the merged model differs a little from M_t: evaluate it again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from irpo_utils import UserError
from irpo_utils.ops import cli


def merge(model: str, adapter: str | Path, folder: str | Path, dtype: str | None = None) -> None:
    """Write the merged model (safetensors) and its tokenizer into `folder`.

    Raises `UserError` if `folder` is not empty, or if the model or the adapter cannot be loaded.
    """
    from irpo_utils import models
    from irpo_utils.ops import hub

    folder = Path(folder).expanduser()
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise UserError(f"{folder} is a file or not empty. Give the merged model a new folder.")
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise UserError(f"{adapter} has no adapter_config.json. Give RUN/iteration_T/adapter.")
    trained_on = json.loads((Path(adapter) / "adapter_config.json").read_text())
    base = trained_on["base_model_name_or_path"]
    known = model in (*models.FOLDERS, *models.HUB_NAMES)
    if known and base not in (None, model, models.HUB_NAMES.get(model)):
        raise UserError(f"{adapter} was trained on {base}, not on {model}. Give that model.")
    with hub.explained(model):
        loaded, tokenizer = models.load(model, adapter, quantize=False, device="cpu", dtype=dtype)
    loaded.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments: list[str]) -> None:
    """Merge what the options name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the model of the run, such as qwen2.5-0.5b")
    parser.add_argument("adapter", help="folder of the adapter, such as RUN/iteration_4/adapter")
    parser.add_argument("folder", help="new folder for the merged model")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="of the weights (default: float32)")
    options = parser.parse_args(arguments)
    cli.quiet_libraries()
    merge(**vars(options))
    print(f"Merged model: {options.folder}")


if __name__ == "__main__":
    sys.exit(cli.run_command(main, sys.argv[1:]))
