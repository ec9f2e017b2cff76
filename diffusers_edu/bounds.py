"""The likelihood of any saved pipeline: which bound it has, over which chain, beside the Parzen windows of its samples."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .evaluation.estimates import Estimate
from .evaluation.likelihood import (
    Bound,
    autoencoder_bound,
    diffusion_bound,
    in_bits,
    latent_diffusion_bound,
    unconditional,
)
from .evaluation.parzen import parzen
from .evaluation.sampling import posteriors, scaled
from .schedulers.fitting import fit_variance
from .training.configuration import TrainingConfig
from .training.data import ImageData

CODES = (1, 10, 100, 1000)  # of the bounds of a VAE
STEPS = (10, 50)  # of the chains whose bounds are measured, unless others are asked for
TUNING = 0.2  # of the training images, on which the width of Parzen windows is chosen
MOST = 1000  # images, at most, on which it is chosen, and which are explained
CENTRES = 10_000  # windows, at most
LARGEST = 1024  # values of an image that windows are measured on: their time grows with it
FITTED = 4096  # training images, at most, that a variance is fitted to


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
    if why_none(pipeline) is not None:
        return None
    vae, unet = (pipeline.components.get(name) for name in ("vae", "unet"))
    bin_width = 2 / held_out.max_value
    x = everything(held_out).to(pipeline.device)
    std = 0.0 if vae is None else vae.log_sigma_x.exp().item()
    if unet is None:
        return autoencoder_bound(vae, x, std, bin_width, codes, seed)
    scheduler.set_timesteps(min(steps, len(scheduler)))
    if vae is None:
        return diffusion_bound(unconditional(unet), scheduler, x, bin_width, seed=seed)
    return latent_diffusion_bound(vae, unconditional(unet), scheduler, x, std, bin_width, seed=seed)


def why_none(pipeline: Any) -> str | None:
    """Why a pipeline has no likelihood; None where it has one."""
    vae, unet, scheduler = (pipeline.components.get(name) for name in ("vae", "unet", "scheduler"))
    if vae is None and unet is None:
        return "denoising autoencoders give images no probability"
    if vae is not None and getattr(vae, "log_sigma_x", None) is None:
        return f"{type(vae).__name__} has no sigma_x: what it decodes to is no distribution over images"
    if unet is not None and not hasattr(scheduler, "bound_term"):
        return f"{type(scheduler).__name__} has no terms of a bound: EduDDPMScheduler.from_config(scheduler.config) has"
    return None


def chain(pipeline: Any, train: ImageData, variance: str = "analytic", seed: int = 0) -> Any:
    """The pipeline's scheduler with the variance of a `variance_type`, the analytic one fitted to images; None where it has no bound.

    Its grid is spaced `trailing`: others end too near to the image for a step without a variance of its own.
    """
    if why_none(pipeline) is not None or "scheduler" not in pipeline.components:
        return None
    scheduler = pipeline.scheduler
    if variance != "analytic":
        return scheduler.from_config(scheduler.config, variance_type=variance, timestep_spacing="trailing")
    vae = pipeline.components.get("vae")
    images = everything(train.some(FITTED))
    fitted = fit_variance(pipeline, images if vae is None else latents(vae, images, seed), seed=seed)
    return fitted.from_config(fitted.config, timestep_spacing="trailing")


def latents(vae: Any, images: torch.Tensor, seed: int) -> torch.Tensor:
    """The scaled latents of images in [-1, 1], a draw of each."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([scaled(vae, posterior.sample(generator)) for posterior in posteriors(vae, images)])


def everything(data: ImageData) -> torch.Tensor:
    """All images as the models see them, float32 (N, C, H, W) in [-1, 1]."""
    return data.batch(list(range(len(data))))["images"]


def windows(samples: torch.Tensor | None, train: ImageData, held_out: ImageData, count: int, seed: int = 0) -> Estimate:
    """The Parzen windows' bits per dimension of held-out images, by `count` samples, or by training images in their place; by 10,000 at
    most, and by no more than there are training images that the width was not chosen on.

    Args:
        samples: float (N, C, H, W) in [0, 1]; None for training images, or for as many as are not needed to choose the width.
        train, held_out: images.
        count: of samples.
        seed: of the choice of training images.
    """
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    cut = max(1, round(TUNING * len(train)))
    count = min(count, CENTRES, len(train) - cut)
    centres = everything(train.part(order[cut : cut + count])) if samples is None else samples[:count] * 2 - 1
    tuning, x = everything(train.part(order[:cut][:MOST])), everything(held_out.some(MOST))
    nats, _ = parzen(centres, tuning, x, 2 / held_out.max_value)
    return in_bits(nats, x[0].numel())


def likelihoods(
    pipeline: Any, config: TrainingConfig, train: ImageData, held_out: ImageData, seed: int, steps: Sequence[int] = STEPS
) -> Iterator[dict[str, Any]]:
    """Every bound that a run has on 1,000 held-out images at most, each with how it was made, its parts, and its intervals.

    Of a diffusion, over chains of so many `steps`, also what each timestep adds to it, the error there of the predicted x_0, and what a
    receiver of the progressive code has after each. Where there is no bound, why.
    """
    reason = why_none(pipeline)
    if config.class_conditional and config.conditioning_dropout_prob == 0:
        reason = "trained with --conditioning_dropout_prob 0, the model says nothing of an image whose class is not told"
    if reason is not None:
        yield {"none": reason}
        return
    held_out = held_out.some(MOST)
    cases: list[tuple[dict[str, Any], Any]] = [({"codes": codes}, None) for codes in CODES]
    if (unet := pipeline.components.get("unet")) is not None:
        variances = ["fixed_small", "fixed_large", "analytic", *([config.variance_type] if config.learns_variance else [])]
        chains = {variance: chain(pipeline, train, variance, seed) for variance in variances}
        asked = {} if getattr(unet.config, "num_class_embeds", None) is None else {"class": "none"}
        lengths = sorted({min(k, len(pipeline.scheduler)) for k in steps})
        cases = [({"variance": name, "steps": k, **asked}, each) for name, each in chains.items() for k in lengths]
    for case, scheduler in cases:
        sizes = {name: case[name] for name in ("codes", "steps") if name in case}
        bound = likelihood(pipeline, held_out, scheduler, seed=seed, **sizes)
        if bound is not None:
            parts = {name: bound.estimate(part).as_json() for name, part in bound.parts.items()}
            figures = {"bits_per_dim": bound.bits_per_dim().as_json(), "nats": bound.estimate().as_json(), "parts": parts}
            yield {**case, **figures, **bound.by_timestep()}
