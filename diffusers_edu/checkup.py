"""What is looked at in a run before it trains, and when it has ended, so that a known mistake is named with its mend."""

import sys
from collections.abc import Iterable
from typing import Any

from .evaluation.diagnoses import (
    Diagnosis,
    clipped,
    latent_scale,
    long_average,
    memorisation,
    posterior_collapse,
    present,
    signal_left,
)
from .evaluation.estimates import Estimate
from .training.averages import warmed_up
from .training.configuration import TrainingConfig
from .training.data import ImageData

LOOKED_AT = 64  # images, at most


def before_training(pipeline: Any, config: TrainingConfig, data: Any) -> list[Diagnosis]:
    """What can be known before the first step.

    Args:
        pipeline: untrained; a VAE that is there already counts.
        config: of the run.
        data: the images to train on.
    """
    return present(of_average(config), *of_noise(pipeline, data))


def of_average(config: TrainingConfig) -> Diagnosis | None:
    """Whether a run is long enough for its average."""
    if not config.use_ema or config.ema_sigma_rel is not None:  # profiles are as long as the run by themselves
        return None
    return long_average(warmed_up([], config).get_decay, config.max_train_steps)


def after_training(
    pipeline: Any, data: Any, memorised: Estimate | None = None, num_inference_steps: int | None = None
) -> list[Diagnosis]:
    """What a trained pipeline shows.

    Args:
        pipeline: on its device.
        data: images, best those that it was not trained on.
        memorised: the share of samples suspiciously near to images trained on, where it was measured.
        num_inference_steps: of the sampling; None where it has no meaning.
    """
    steps = {} if num_inference_steps is None else {"num_inference_steps": num_inference_steps}
    vae, is_latent = pipeline.components.get("vae"), "unet" in pipeline.components
    return present(
        posterior_collapse(vae, few(data)) if vae is not None and not is_latent else None,
        *of_noise(pipeline, data),
        clipped(pipeline, **steps),
        None if memorised is None else memorisation(memorised),
    )


def of_noise(pipeline: Any, data: Any) -> Iterable[Diagnosis | None]:
    """Whether the noise levels of a diffusion mean what they should."""
    vae, scheduler = (pipeline.components.get(name) for name in ("vae", "scheduler"))
    if scheduler is not None:
        yield signal_left(scheduler)
    if scheduler is not None and vae is not None:
        yield latent_scale(vae, few(data))


def few(data: Any) -> Any:
    """Some images as the models see them, float32 (N, C, H, W) in [-1, 1]; of a stream the first."""
    chosen = data.some(LOOKED_AT) if isinstance(data, ImageData) else data.head(LOOKED_AT)
    return chosen.batch(list(range(len(chosen))))["images"]


def tell(diagnoses: Iterable[Diagnosis]) -> None:
    """Say them on stderr, a line each."""
    for diagnosis in diagnoses:
        print(f"diffusers-edu: {diagnosis}", file=sys.stderr, flush=True)
