"""The batches of a process, from data in memory or streamed."""

import signal
from collections.abc import Generator
from typing import Any

from accelerate import Accelerator
from torch.utils.data import DataLoader

from ..errors import UsageError
from .configuration import TrainingConfig
from .data import Visits
from .launch import HostGroup, attempt
from .streaming import StreamedImages, StreamedVisits


def make_batches(
    data: Any, parts: list[range], total: int, start_step: int, config: TrainingConfig, accelerator: Accelerator
) -> Generator[dict[str, Any], None, None]:
    """The batches of this process, for each step one for each of `parts`, its rows of the global batch.

    What keeps one process from reading on, such as an image that is none, is raised by all. To be closed, as data workers are.
    """
    last = config.max_train_steps
    options = {
        "batch_size": None,  # batches come whole
        "collate_fn": as_it_is,
        "num_workers": config.dataloader_num_workers,
        "pin_memory": accelerator.device.type == "cuda",
        # What stops a job is sent to all of its processes; the training one ends its step, for which it needs the data.
        "worker_init_fn": ignore_stop_signals,
    }
    if isinstance(data, StreamedImages):
        loader = DataLoader(StreamedVisits(data, parts, total, start_step, last), **options)
    else:
        positions = ([step * total + row for row in part] for step in range(start_step, last) for part in parts)
        loader = DataLoader(Visits(data, config.seed, config.random_flip), sampler=positions, **options)
    reading: Any = iter(loader)
    group = HostGroup(accelerator)
    can_fail = isinstance(data, StreamedImages) or config.dataloader_num_workers > 0  # else it is in memory
    try:
        while True:
            batch, error = attempt(lambda: next(reading, None))
            if batch is not None and "error" in batch:
                error = UsageError(batch["error"])
            if can_fail:
                group.raise_any(error)
            elif error is not None:
                raise error
            if batch is None:
                return
            yield batch
    finally:
        if config.dataloader_num_workers > 0:
            reading._shutdown_workers()  # an error on its way out would keep them, and they ignore what ends them at the exit


def ignore_stop_signals(_: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def as_it_is(batch: Any) -> Any:
    """The collation of batches that the data set has put together itself."""
    return batch
