"""Work on many images, shared out over the processes of a launch: each does a part of it, and all get the whole."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

T = TypeVar("T")
_ALONE = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """What this process does meanwhile it does by itself, whatever the launch."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def is_shared() -> bool:
    """Whether other processes do their part of the work."""
    return PartialState().num_processes > 1 and not _ALONE.get()


def my_part(count: int) -> range:
    """Which of `count` images are this process's: all of them where it is alone."""
    if not is_shared():
        return range(count)
    state = PartialState()
    first, last = ((state.process_index + i) * count // state.num_processes for i in (0, 1))
    return range(first, last)


def whole(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """The parts of all processes, in their order, as one tensor on the CPU."""
    on_cpu = [part.cpu() for part in parts]
    return torch.cat(gather_object(on_cpu) if is_shared() else on_cpu, dim)


def by_one(work: Callable[[], T]) -> T:
    """What `work` returns, which is done once and told to all."""
    if not is_shared():
        return work()
    result = [work() if PartialState().is_main_process else None]
    broadcast_object_list(result)
    return result[0]  # type: ignore[return-value]


def progress(*args: Any, **kwargs: Any) -> tqdm:
    """A progress bar, which of several processes the main one shows."""
    quiet = {} if PartialState().is_main_process else {"disable": True}
    return tqdm(*args, leave=False, **kwargs, **quiet)
