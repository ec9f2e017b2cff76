"""Samples of any pipeline, and a record of the way to them."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm


def generators(seed: int, first: int, count: int) -> list[torch.Generator]:
    """One source of randomness for each sample: sample n is the same whatever the batch it is drawn in."""
    seeds = np.random.SeedSequence([seed]).generate_state(first + count, np.uint64)[first:]
    return [torch.Generator().manual_seed(int(s >> np.uint64(1))) for s in seeds]


def sample(pipeline: Any, count: int, seed: int = 0, batch_size: int = 250, **kwargs: Any) -> torch.Tensor:
    """`count` samples of a pipeline as float32 (count, C, H, W) in [0, 1]. `kwargs` go to the pipeline's call.

    The global source of randomness is seeded too, and put back, for pipelines that do not hand their generators on.
    """
    pipeline.set_progress_bar_config(disable=True)
    batches = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for first in tqdm(range(0, count, batch_size), desc="sampling", leave=False):
            size = min(batch_size, count - first)
            images = pipeline(batch_size=size, generator=generators(seed, first, size), output_type="np", **kwargs).images
            batches.append(torch.from_numpy(images).permute(0, 3, 1, 2))
    return torch.cat(batches).float()


def initial_noise(seed: int, count: int, shape: Sequence[int]) -> torch.Tensor:
    """The first draw of the `count` samples of a seed: N(0, I), shape (count, *shape)."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators(seed, 0, count)])


@dataclass
class Step:
    """A reverse step: the timestep or noise level it started from, and what it handed on, float32 (B, C, H, W)."""

    timestep: int
    sample: torch.Tensor


def trace(pipeline: Any, count: int, seed: int = 0, **kwargs: Any) -> list[Step]:
    """The steps of one call of an iterative pipeline, the first to be taken first; [] where there are none.

    The samples are those of [`sample`] with the same seed and count up to its batch size.
    """
    steps: list[Step] = []
    if "scheduler" in pipeline.components:
        with recorded_steps(pipeline.scheduler, steps):
            sample(pipeline, count, seed, batch_size=count, **kwargs)
    elif hasattr(pipeline, "levels"):

        def record(_, __, level: int, tensors: dict[str, torch.Tensor]) -> dict:
            steps.append(Step(int(level), tensors["latents"].float().cpu()))
            return {}

        sample(pipeline, count, seed, batch_size=count, callback_on_step_end=record, **kwargs)
    return steps


@contextmanager
def recorded_steps(scheduler: Any, steps: list[Step]) -> Iterator[None]:
    """Note what `scheduler.step` returns, for pipelines that have no callback."""
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at the signature to see whether a generator is taken
    def recording(model_output: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        output = step(model_output, timestep, *args, **kwargs)
        prev_sample = output[0] if isinstance(output, tuple) else output.prev_sample
        steps.append(Step(int(timestep), prev_sample.float().cpu()))
        return output

    scheduler.step = recording
    try:
        yield
    finally:
        del scheduler.step


@torch.no_grad()
def decode(vae: Any, z: torch.Tensor) -> torch.Tensor:
    """Codes to images, float32 (B, C, H, W) in [0, 1]."""
    return to_unit(vae.decode(z.to(vae.device, vae.dtype)).sample)


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] to [0, 1], clipped, float32 on the CPU."""
    return (images.float().cpu() / 2 + 0.5).clamp(0, 1)
