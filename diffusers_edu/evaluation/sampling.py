"""Samples of any pipeline, and a record of the way to them."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .sharding import my_part, progress, whole

DRAWN, ENCODED = 250, 16  # images at a time
VALUES = 2**22  # of the images of a batch, at most: 341 of 64x64 in colour


def generators(seed: int, first: int, count: int) -> list[torch.Generator]:
    """One source of randomness for each sample: sample n is the same whatever the batch it is drawn in."""
    seeds = np.random.SeedSequence([seed]).generate_state(first + count, np.uint64)[first:]
    return [torch.Generator().manual_seed(int(s >> np.uint64(1))) for s in seeds]


def fitting(most: int, values: int) -> int:
    """How many images of so many values go through a model at a time, `most` of small ones."""
    return max(1, min(most, VALUES // values))


def sample(
    pipeline: Any, count: int, seed: int = 0, batch_size: int = DRAWN, labels: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor:
    """`count` samples of a pipeline as float32 (count, C, H, W) in [0, 1], shared out over the processes of a launch.

    The global source of randomness is seeded too, and put back, for pipelines that do not hand their generators on.

    Args:
        pipeline: any that is called with a `batch_size`.
        count: how many.
        seed: sample n is a function of it and of n, whatever the batches and the processes.
        batch_size: of a call.
        labels: the class of each sample, int64 (count,), for a pipeline of classes.
        kwargs: of its call.
    """
    pipeline.set_progress_bar_config(disable=True)
    mine, batches = my_part(count), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + mine.start)
        for first in progress(range(mine.start, mine.stop, batch_size), desc="sampling"):
            size = min(batch_size, mine.stop - first)
            classes = {} if labels is None else {"class_labels": labels[first : first + size]}
            call = {"batch_size": size, "generator": generators(seed, first, size), "output_type": "np", **classes, **kwargs}
            batches.append(torch.from_numpy(pipeline(**call).images).permute(0, 3, 1, 2).float())
    return whole(batches)


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

        def note(_: Any, timestep: Any, __: Any, prev_sample: torch.Tensor) -> None:
            steps.append(Step(int(timestep), prev_sample.float().cpu()))

        with watched_steps(pipeline.scheduler, note):
            sample(pipeline, count, seed, batch_size=count, **kwargs)
    elif hasattr(pipeline, "levels"):

        def record(_, __, level: int, tensors: dict[str, torch.Tensor]) -> dict:
            steps.append(Step(int(level), tensors["latents"].float().cpu()))
            return {}

        sample(pipeline, count, seed, batch_size=count, callback_on_step_end=record, **kwargs)
    return steps


@contextmanager
def watched_steps(scheduler: Any, note: Callable[..., None]) -> Iterator[None]:
    """Call `note(model_output, timestep, sample, prev_sample)` after each `scheduler.step`, for pipelines that have no callback."""
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at the signature to see whether a generator is taken
    def watched(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = step(model_output, timestep, sample, *args, **kwargs)
        note(model_output, timestep, sample, output[0] if isinstance(output, tuple) else output.prev_sample)
        return output

    scheduler.step = watched
    try:
        yield
    finally:
        del scheduler.step


def posteriors(vae: Any, images: torch.Tensor) -> Iterator[Any]:
    """q(z | x) of images (N, C, H, W) in [-1, 1], a few at a time."""
    for x in images.split(ENCODED):
        with torch.no_grad():
            posterior = vae.encode(x.to(vae.device, vae.dtype)).latent_dist
        yield posterior


def scaled(vae: Any, z: torch.Tensor) -> torch.Tensor:
    """Codes as their diffusion sees them, y = s (z - m); Rombach et al. 2022, appendix G."""
    return (z - shift(vae)) * vae.config.scaling_factor


def unscaled(vae: Any, y: torch.Tensor) -> torch.Tensor:
    """The codes again, z = y / s + m."""
    return y / vae.config.scaling_factor + shift(vae)


def shift(vae: Any) -> float:
    """m, which not every VAE has."""
    return getattr(vae.config, "shift_factor", None) or 0.0


@torch.no_grad()
def decode(vae: Any, z: torch.Tensor) -> torch.Tensor:
    """Codes to images, float32 (B, C, H, W) in [0, 1]."""
    return to_unit(vae.decode(z.to(vae.device, vae.dtype)).sample)


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1] to [0, 1], clipped, float32 on the CPU."""
    return (images.float().cpu() / 2 + 0.5).clamp(0, 1)
