"""Tensors that are dear to compute, kept in files beside the cache of `datasets`, and mapped into memory by every process."""

import hashlib
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

UNTOUCHED = 24 * 3600  # seconds


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
    clear_away()
    path = folder() / f"{kind}-{hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()}.safetensors"
    if path.is_file():
        try:
            return load_file(path)
        except (OSError, SafetensorError):
            pass
    made = make()
    aside = path.with_suffix(f".{os.getpid()}@{socket.gethostname()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(made, aside)
        aside.replace(path)
    except (OSError, SafetensorError):
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    return made


def clear_away() -> None:
    """Remove the files whose writing was cut off: of processes of this machine that are gone, or untouched for a day.

    Other machines may share the folder, and write to it now. A file taken from one that does is no harm but to the cache.
    """
    for path in folder().glob("*.tmp"):
        process, _, machine = path.name.removesuffix(".tmp").split(".", 1)[-1].partition("@")
        with suppress(OSError):  # another process may have been faster
            gone = machine == socket.gethostname() and process.isdigit() and not psutil.pid_exists(int(process))
            if gone or time.time() - path.stat().st_mtime > UNTOUCHED:
                path.unlink()
