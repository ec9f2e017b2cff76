"""Work on many images, shared out over the processes of a launch: each does a part of it, and all get the whole."""

from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm


def my_part(count: int) -> range:
    """Which of `count` images are this process's: all of them where it is alone."""
    state = PartialState()
    first, last = ((state.process_index + i) * count // state.num_processes for i in (0, 1))
    return range(first, last)


def whole(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """The parts of all processes, in their order, as one tensor on the CPU."""
    return torch.cat(gather_object([part.cpu() for part in parts]), dim)


def progress(*args: Any, **kwargs: Any) -> tqdm:
    """A progress bar, which of several processes the main one shows."""
    quiet = {} if PartialState().is_main_process else {"disable": True}
    return tqdm(*args, leave=False, **kwargs, **quiet)
