"""The likelihood of any saved pipeline: which bound it has, over which chain, beside the Parzen windows of its samples."""

from collections.abc import Iterator
from typing import Any

import torch

from .evaluation.estimates import Estimate
from .evaluation.likelihood import (
    Bound,
    autoencoder_bound,
    diffusion_bound,
    in_bits,
    latent_diffusion_bound,
    scaled,
    unconditional,
)
from .evaluation.parzen import parzen
from .schedulers.fitting import fit_variance
from .training.configuration import TrainingConfig
from .training.data import ImageData

CODES = (1, 10, 100, 1000)  # of the bounds of a VAE
STEPS = (10, 50)  # of the chains whose bounds are measured
TUNING = 0.2  # of the training images, on which the width of Parzen windows is chosen


def likelihood(
    pipeline: Any, held_out: ImageData, scheduler: Any, steps: int = 50, codes: int = 1, seed: int = 0
) -> Bound | None:
    """The bound on -log p of the held-out images; None for a pipeline without a likelihood.

    Args:
        pipeline: of a VAE, of diffusion, or of both.
        held_out: images that are explained.
        scheduler: what `chain` made of the pipeline.
        steps: K, of a diffusion.
        codes: drawn for each image, of a VAE alone; see `autoencoder_bound`.
        seed: of the draws.
    """
    vae, unet = (pipeline.components.get(name) for name in ("vae", "unet"))
    bin_width = 2 / held_out.max_value
    x = everything(held_out).to(pipeline.device)
    std = None if vae is None else getattr(vae, "log_sigma_x", None)
    if unet is None:
        return None if std is None else autoencoder_bound(vae, x, std.exp().item(), bin_width, codes, seed)
    if scheduler is None or (vae is not None and std is None):
        return None
    scheduler.set_timesteps(min(steps, len(scheduler)))
    if std is None:
        return diffusion_bound(unconditional(unet), scheduler, x, bin_width, seed=seed)
    return latent_diffusion_bound(vae, unconditional(unet), scheduler, x, std.exp().item(), bin_width, seed=seed)


def chain(pipeline: Any, train: ImageData, variance: str = "analytic", seed: int = 0) -> Any:
    """The pipeline's scheduler with the variance of a `variance_type`, the analytic one fitted to images; None where it has no bound.

    Its grid is spaced `trailing`: others end too near to the image for a step without a variance of its own.
    """
    scheduler = pipeline.components.get("scheduler")
    if not hasattr(scheduler, "bound_term"):
        return None
    if variance != "analytic":
        return scheduler.from_config(scheduler.config, variance_type=variance, timestep_spacing="trailing")
    samples = everything(train).to(pipeline.device)
    if (vae := pipeline.components.get("vae")) is not None:
        with torch.no_grad():
            samples = scaled(vae, vae.encode(samples).latent_dist.sample(torch.Generator().manual_seed(seed)))
    fitted = fit_variance(pipeline, samples, seed=seed)
    return fitted.from_config(fitted.config, timestep_spacing="trailing")


def everything(data: ImageData) -> torch.Tensor:
    """All images as the models see them, float32 (N, C, H, W) in [-1, 1]."""
    return data.batch(list(range(len(data))))["images"]


def windows(samples: torch.Tensor | None, train: ImageData, held_out: ImageData, count: int, seed: int = 0) -> Estimate:
    """The Parzen windows' bits per dimension of held-out images, by `count` samples, or by training images in their place.

    Args:
        samples: float (N, C, H, W) in [0, 1]; None for training images, or for as many as are not needed to choose the width.
        train, held_out: images.
        count: of samples.
        seed: of the choice of training images.
    """
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    images, cut = everything(train)[order], max(1, round(TUNING * len(train)))
    centres = images[cut:] if samples is None else samples * 2 - 1
    x = everything(held_out)
    nats, _ = parzen(centres[:count], images[:cut], x, 2 / held_out.max_value)
    return in_bits(nats, x[0].numel())


def likelihoods(
    pipeline: Any, config: TrainingConfig, train: ImageData, held_out: ImageData, seed: int
) -> Iterator[dict[str, Any]]:
    """Every bound that a run has, each with how it was made, its parts, and its intervals; of a diffusion also what each timestep adds
    to it, and the error there of the predicted x_0, and what a receiver of the progressive code has after each."""
    variances = ["fixed_small", "fixed_large", "analytic", *([config.variance_type] if config.learns_variance else [])]
    cases: list[tuple[dict[str, Any], Any]] = [({"codes": codes}, None) for codes in CODES]
    if "unet" in pipeline.components:
        chains = {variance: chain(pipeline, train, variance, seed) for variance in variances}
        cases = [({"variance": name, "steps": steps}, each) for name, each in chains.items() for steps in STEPS]
    for case, scheduler in cases:
        sizes = {name: value for name, value in case.items() if name != "variance"}
        bound = likelihood(pipeline, held_out, scheduler, seed=seed, **sizes)
        if bound is not None:
            parts = {name: bound.estimate(part).as_json() for name, part in bound.parts.items()}
            figures = {"bits_per_dim": bound.bits_per_dim().as_json(), "nats": bound.estimate().as_json(), "parts": parts}
            yield {**case, **figures, **bound.by_timestep()}
