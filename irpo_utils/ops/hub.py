"""Models and data from the hub: a time limit, and errors in plain words."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from accelerate.utils.memory import should_reduce_batch_size
from huggingface_hub import constants, get_session

from irpo_utils import UserError, models


def limit_waiting() -> None:
    """Let every request to the hub fail after HF_HUB_DOWNLOAD_TIMEOUT (10 seconds by default).

    Some calls of the library set no limit, and wait forever for a server that does not answer.
    """
    session = get_session()
    hooks = session.event_hooks
    if _limit not in hooks["request"]:
        session.event_hooks = {**hooks, "request": [*hooks["request"], _limit]}


def _limit(request) -> None:
    kinds = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = dict.fromkeys(kinds, constants.HF_HUB_DOWNLOAD_TIMEOUT)


def explained(name: str):
    """Turn errors of the libraries while a model is loaded into a `UserError` with the fix."""
    gpu = re.compile("CUDA|out of memory|driver")  # a problem of the GPU, not of the model
    return explained_by(lambda text: _explain(models.find(name), text), unless=gpu.search)


@contextlib.contextmanager
def explained_by(explain, unless):
    """Turn an error of the libraries into a `UserError` with the text `explain(its text)`.

    A `RuntimeError` stays as it is if memory ran out, or if `unless(its text)` is true.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what the libraries raise depends on the model
        text = str(error).strip() or type(error).__name__
        if isinstance(error, RuntimeError) and (should_reduce_batch_size(error) or unless(text)):
            raise
        raise UserError(explain(text)) from error


def _explain(path: str, text: str) -> str:
    first = text.splitlines()[0][:300]
    if re.search(r"gated|\b40[13]\b", text):  # as a word: ports have such digits as well
        return (
            f"The model {path} is gated: accept its licence on its hub page, make a read token "
            "there, and log in with `hf auth login` (or set HF_TOKEN)."
        )
    if "trust_remote_code" in text or "custom code" in text:
        return f"The model {path} asks to run its own code, which is refused. Use another model."
    if "PeftType" in text:  # such as a Mamba layer, whose matrices are not called as layers
        reason = first.rpartition("] ")[2].partition(". ")[0]
        return f"The model {path} cannot have a LoRA adapter: {reason}. Choose another --model."
    if Path(path).is_dir():
        return (
            f"The model folder {path} could not be loaded: {first} It needs safetensors files and "
            "a tokenizer, written by `save_pretrained`."
        )
    fix = "Without a network, give --model a local folder, or use --model seed."
    return f"The model {path} could not be loaded: {first} {fix}"
