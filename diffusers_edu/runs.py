"""What is done with a run that has ended: load it, measure it, average its weights anew."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar

from .errors import UsageError
from .evaluation.likelihood import Bound, autoencoder_bound, diffusion_bound, latent_diffusion_bound, scaled, unconditional
from .evaluation.metrics import Estimate, measure, memorised
from .evaluation.sampling import sample
from .rungs import RUNGS
from .schedulers.fitting import fit_variance
from .story import as_json, steps_argument
from .training.averages import synthesise
from .training.checkpoints import write_pipeline
from .training.configuration import CONFIG_NAME, TrainingConfig
from .training.data import ImageData, load_data
from .training.trainer import batches_of

FEWEST = 10  # samples that figures can be made of
CODES = (1, 10, 100, 1000)  # of the bounds of a VAE
STEPS = (10, 50)  # of the chains whose bounds are measured


@dataclass(frozen=True)
class Measurement:
    """Samples of a pipeline, held against the held-out images of the data it was trained on.

    Args:
        samples: float32 (N, C, H, W) in [0, 1].
        metrics: the figures of the samples.
        floor: the same figures of as many of the images trained on, or of all of them.
        memorised: the share of samples that lie suspiciously near to an image trained on.
        held_out: the number of held-out images.
        num_inference_steps: of the sampling; None where it has no meaning.
        seed: of the samples.
    """

    samples: torch.Tensor
    metrics: dict[str, Estimate]
    floor: dict[str, Estimate]
    memorised: Estimate
    held_out: int
    num_inference_steps: int | None
    seed: int


def measure_pipeline(
    pipeline: Any, config: TrainingConfig, num_samples: int, num_inference_steps: int | None, seed: int
) -> Measurement:
    """Measure a pipeline on the held-out part of the data of `config`.

    Raises:
        UsageError: too few samples, steps that the pipeline does not take, or data that cannot be read.
    """
    if num_samples < FEWEST:
        raise UsageError(f"--num_samples {num_samples}: at least {FEWEST} are needed")
    replace(config, seed=seed).validate()  # what a training refuses as a seed, a measurement does
    train, held_out = load_data(config)
    steps = RUNGS[config.rung].num_inference_steps
    if steps is not None:
        most = len(pipeline.scheduler) if "scheduler" in pipeline.components else None
        steps = min(steps, most or steps) if num_inference_steps is None else num_inference_steps
        if steps < 1 or (most is not None and steps > most):
            raise UsageError(f"--num_inference_steps {steps}: this pipeline takes 1 to {most or 'as many as it has stages'}")
    samples = sample(pipeline, num_samples, seed, **steps_argument(steps))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    real = train.images[order[:num_samples]]
    figures, floor = (measure(x.flatten(1), held_out.images.flatten(1), seed) for x in (samples, real))
    near = memorised(*(x.flatten(1) for x in (samples, train.images, held_out.images)))
    return Measurement(samples, figures, floor, near, len(held_out), steps, seed)


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


def likelihoods(pipeline: Any, config: TrainingConfig, seed: int) -> Iterator[dict[str, Any]]:
    """Every bound that a run has, each with how it was made, its parts, and its intervals."""
    train, held_out = load_data(config)
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
            yield {**case, "bits_per_dim": bound.bits_per_dim().as_json(), "nats": bound.estimate().as_json(), "parts": parts}


def evaluate_run(run: Path, num_samples: int, num_inference_steps: int | None, seed: int, bounds: bool = False) -> None:
    """Measure a saved run on the held-out part of its data; print the figures as JSON, a line each.

    Args:
        run: its folder.
        num_samples, num_inference_steps, seed: see `measure_pipeline`.
        bounds: measure the likelihood too.

    Raises:
        UsageError: the folder holds no run.
    """
    config = saved_configuration(run)
    pipeline = load(str(run))
    measured = measure_pipeline(pipeline, config, num_samples, num_inference_steps, seed)
    for name, figures in (("samples", {**measured.metrics, "memorised": measured.memorised}), ("floor", measured.floor)):
        print(json.dumps({name: as_json(figures)}), flush=True)
    for found in likelihoods(pipeline, config, seed) if bounds else ():
        print(json.dumps({"likelihood": found}), flush=True)


def average_run(run: Path, output: Path, sigma_rel: float) -> None:
    """Save a run's pipeline with another average of its weights: a power-function profile of the length `sigma_rel`.

    Raises:
        UsageError: the folder holds no run that kept averages, or the output cannot be written.
    """
    weights = synthesise(run, sigma_rel)
    config = saved_configuration(run)
    data, _ = load_data(config)
    pipeline = load(str(run))
    objective = RUNGS[config.rung].objective(pipeline, config, data)
    objective.model.load_state_dict(weights)
    objective.finish(batches_of(data, config.train_batch_size, pipeline.device))
    replace(config, output_dir=str(output)).save()
    write_pipeline(pipeline, output)


def saved_configuration(run: Path) -> TrainingConfig:
    """The configuration of a run that has ended.

    Raises:
        UsageError: the folder holds none.
    """
    try:
        config = TrainingConfig(**json.loads((run / CONFIG_NAME).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{run} holds no trained run: {CONFIG_NAME} cannot be read there") from error
    if not (run / "model_index.json").exists():
        raise UsageError(f"{run} holds no pipeline: its training has not ended")
    return config


def load(repository: str, **kwargs: Any) -> Any:
    """A saved pipeline, on the accelerator where there is one; without a progress bar for the few files it has."""
    disable_progress_bar()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return DiffusionPipeline.from_pretrained(repository, **kwargs).to(device)
