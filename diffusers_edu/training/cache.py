"""Tensors that are dear to compute, kept in files beside the cache of `datasets`, and mapped into memory by every process."""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


def folder() -> Path:
    """Where the files lie: in the cache of `datasets`, which `HF_HOME` or `HF_DATASETS_CACHE` move."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "diffusers_edu"


def cached(kind: str, *key: object, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What `make` returns, from a file if it has been made before with the same key.

    A file that cannot be read is made anew; where none can be written, nothing is kept.

    Args:
        kind: names the file, with a digest of the key.
        key: all that the tensors depend on.
        make: computes them.
    """
    path = folder() / f"{kind}-{hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()}.safetensors"
    if path.is_file():
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            pass
    made = make()
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(made, aside)
        aside.replace(path)
    except (OSError, SafetensorError):
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    return made
