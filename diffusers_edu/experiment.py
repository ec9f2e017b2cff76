"""The ladder as an experiment: what is trained, what is measured of each rung, and what all of it comes to."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .bounds import chain, everything, likelihood, windows
from .checkup import after_training
from .evaluation.claims import CLAIMS, Verdict, judge
from .evaluation.diagnoses import Diagnosis
from .evaluation.estimates import Estimate, over_seeds
from .evaluation.features import make_features
from .evaluation.likelihood import Bound, in_bits
from .evaluation.mechanisms import (
    Mismatch,
    StageShares,
    code_findings,
    from_mean,
    operations,
    sharpness,
    stage_mismatch,
    stage_shares,
)
from .evaluation.metrics import NATURAL, Reference
from .evaluation.sampling import Step, initial_noise, sample, trace
from .rungs import RUNGS, configuration, train_rung
from .runs import as_json, load, steps_argument
from .training.configuration import TrainingConfig
from .training.data import ImageData, load_data
from .training.log import LOG_NAME, read_log

TRACED = 250  # samples followed through the stages of a stack
CODES = 10  # of the autoencoder's bound against which diffusion is held
# Autoencoders beside the rung's own, alike but for one thing, and trained on a sixth of the images: what the claims about it compare.
VARIANTS: dict[str, dict[str, Any]] = {
    "vae_light": {"kl_weight": 0.05},
    "vae_middle": {},  # the rung's own weight and posterior
    "vae_heavy": {"kl_weight": 1.0},
    "vae_full": {"posterior": "full"},
}


@dataclass
class Measured:
    """A trained rung and what was found out about it.

    Args:
        name: of the rung, or of its variant.
        folder: where its pipeline lies.
        num_inference_steps: of the sampling; None where it has no meaning.
        num_parameters: of its models.
        train_seconds, sample_seconds: by the clock.
        samples: float32 (N, C, H, W) in [0, 1].
        figures: of the samples, and what else its claims rest on, by name.
        losses: of the training, each with its step.
        bound: on the likelihood of the held-out images; None without one.
        tight_bound: the autoencoder's bound of ten codes, in nats, (N,).
        shares, mismatch: what the stages of a stack do, and are fed.
        diagnoses: what is wrong.
    """

    name: str
    folder: str
    num_inference_steps: int | None
    num_parameters: int
    train_seconds: float
    sample_seconds: float
    samples: torch.Tensor
    figures: dict[str, Estimate]
    losses: list[tuple[int, float]]
    bound: Bound | None = None
    tight_bound: torch.Tensor | None = None
    shares: StageShares | None = None
    mismatch: Mismatch | None = None
    diagnoses: list[Diagnosis] = field(default_factory=list)


def train_and_measure(name: str, config: TrainingConfig, num_samples: int) -> Measured:
    """Train a rung, or a variant of one, load what was saved, and measure it on the held-out images.

    Args:
        name: of the rung or the variant.
        config: of the training; its seed is that of the samples too.
        num_samples: to draw.
    """
    train_rung(config)
    train, held_out = load_data(config)
    pipeline, steps, seed = load(config.output_dir), RUNGS[config.rung].num_inference_steps, config.seed
    start = time.perf_counter()
    samples = sample(pipeline, num_samples, seed, **steps_argument(steps))
    seconds = time.perf_counter() - start

    reference = Reference(train, held_out, make_features("pixels", train.channels, train.resolution), seed)
    figures = reference.measure(samples)
    figures["sharpness"] = sharpness(samples, held_out.images)
    figures["parzen_bits_per_dim"] = windows(samples, train, held_out, num_samples, seed)
    figures["operations"] = operations(pipeline, **steps_argument(steps))
    bound = likelihood(pipeline, held_out, chain(pipeline, train, seed=seed), seed=seed)
    if bound is not None:
        figures["bits_per_dim"] = bound.bits_per_dim()
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    log = read_log(Path(config.output_dir) / LOG_NAME)
    measured = Measured(
        name=name,
        folder=config.output_dir,
        num_inference_steps=steps,
        num_parameters=sum(parameter.numel() for module in modules for parameter in module.parameters()),
        train_seconds=log[-1]["seconds"],
        sample_seconds=seconds,
        samples=samples,
        figures=figures,
        losses=[(int(line["step"]), line["loss"]) for line in log],
        bound=bound,
        diagnoses=after_training(pipeline, held_out, figures["memorised"], steps),
    )
    EXPERIMENTS.get(config.rung, lambda *_: None)(measured, pipeline, train, held_out, seed)
    return measured


Experiment = Callable[[Measured, Any, ImageData, ImageData, int], None]


def of_dae(measured: Measured, pipeline: Any, train: ImageData, held_out: ImageData, seed: int) -> None:
    measured.figures["from_mean"] = from_mean(measured.samples, train.images)


def of_stack(measured: Measured, pipeline: Any, train: ImageData, held_out: ImageData, seed: int) -> None:
    shares = stage_shares(*followed(measured, pipeline, seed, TRACED), 2 * held_out.images.std(0).mean().item(), seed)
    measured.shares = shares
    measured.figures |= {
        "diversity_after_first": shares.diversity[0],
        "later_change": shares.later_change,
        "largest_later_change": shares.largest_later_change,
    }


def followed(measured: Measured, pipeline: Any, seed: int, count: int) -> tuple[list[Step], torch.Tensor]:
    """The steps of a stack for the first samples, and the noise that they start from."""
    start = pipeline.model.config.sigma_max * initial_noise(seed, count, measured.samples.shape[1:])
    return trace(pipeline, count, seed, **steps_argument(measured.num_inference_steps)), start


def of_noisy_stack(measured: Measured, pipeline: Any, train: ImageData, held_out: ImageData, seed: int) -> None:
    of_stack(measured, pipeline, train, held_out, seed)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[: len(measured.samples)]
    mismatch = stage_mismatch(pipeline.model, everything(train)[chosen], held_out.images, seed)
    measured.mismatch = mismatch
    fed = mismatch.variance_fed[-1]
    assert fed is not None, "a stack of one stage hands nothing on"
    measured.figures |= {"variance_fed": fed, "distance_on_digits": mismatch.distance_on_digits[-1]}


def of_vae(measured: Measured, pipeline: Any, train: ImageData, held_out: ImageData, seed: int) -> None:
    images, count = (everything(train), everything(held_out)), len(measured.samples)
    measured.figures |= code_findings(pipeline.vae, *images, count, seed)
    tight = likelihood(pipeline, held_out, None, codes=CODES, seed=seed)
    measured.tight_bound = None if tight is None else tight.nats


EXPERIMENTS: dict[str, Experiment] = {
    "dae": of_dae,
    "stacked_dae": of_stack,
    "noisy_stacked_dae": of_noisy_stack,
    "vae": of_vae,
}


def plan(output: Path, seed: int, changes: dict[str, Any]) -> dict[str, TrainingConfig]:
    """What is trained for one seed: the rungs, and the variants of the autoencoder, in `output/<name>` and `output/variants/<name>`."""

    def config(rung: str, folder: Path, **more: Any) -> TrainingConfig:
        flags = {"seed": seed, "validation_steps": 0, **more, **changes}
        return configuration(rung, dataset_name="digits", output_dir=str(folder), **flags)

    configs = {name: config(name, output / name) for name in RUNGS}
    configs["latent_diffusion"] = replace(configs["latent_diffusion"], vae_path=str((output / "vae").resolve()))
    own = configs["vae"]
    shorter = {"max_train_steps": max(1, own.max_train_steps // 3), "train_batch_size": own.train_batch_size // 2}
    variants = {name: {**shorter, **more} for name, more in VARIANTS.items()}
    return configs | {name: config("vae", output / "variants" / name, **more) for name, more in variants.items()}


def conclude(train: ImageData, held_out: ImageData, seeds: list[int], runs: list[dict[str, Measured]]) -> "Ladder":
    """Hold the claims against all that was measured, and the figures of samples beside those of as many training images."""
    for run in runs:
        add_differences(run)
    found = [{name: measured.figures for name, measured in run.items()} for run in runs]
    verdicts = {name: judge(CLAIMS[name], found) for name in RUNGS}
    count = len(runs[0]["dae"].samples)
    reference = Reference(train, held_out, make_features("pixels", train.channels, train.resolution), seeds[0])
    floor = {
        **reference.floor(count),
        "sharpness": sharpness(train.images, held_out.images),
        "memorised": Estimate(NATURAL, (NATURAL, NATURAL), len(held_out)),  # by what it means
        "parzen_bits_per_dim": windows(None, train, held_out, count, seeds[0]),
    }
    return Ladder(train, held_out, seeds, runs, floor, verdicts)


def add_differences(run: dict[str, Measured]) -> None:
    """What one model explains the same images better by than another: image by image, as most of the spread is of the images."""
    vae, ddpm, latent = (run[name] for name in ("vae", "ddpm", "latent_diffusion"))
    middle, full = run["vae_middle"].bound, run["vae_full"].bound
    assert vae.bound and vae.tight_bound is not None and ddpm.bound and latent.bound and middle and full
    run["vae_full"].figures["bits_gained"] = in_bits(middle.nats - full.nats, full.dimensions)
    ddpm.figures["bits_gained"] = in_bits(vae.tight_bound - ddpm.bound.nats, ddpm.bound.dimensions)
    latent.figures["bits_gained"] = in_bits(vae.bound.nats - latent.bound.nats, latent.bound.dimensions)


@dataclass
class Ladder:
    """All that was found out: the data, the rungs and variants of every seed in their order, the floor, and the verdicts."""

    train: ImageData
    held_out: ImageData
    seeds: list[int]
    runs: list[dict[str, Measured]]
    floor: dict[str, Estimate]
    verdicts: dict[str, list[Verdict]]

    @property
    def rungs(self) -> dict[str, Measured]:
        """Those of the first seed, which the pictures are of."""
        return {name: self.runs[0][name] for name in RUNGS}

    def figures(self, name: str) -> dict[str, Estimate]:
        """The figures of a rung or variant over all seeds."""
        return {figure: over_seeds([run[name].figures[figure] for run in self.runs]) for figure in self.runs[0][name].figures}

    def as_json(self) -> dict[str, Any]:
        found = {
            "dataset": "digits",
            "features": "pixels",
            "seeds": self.seeds,
            "rungs": {name: self.rung_as_json(name) for name in RUNGS},
            "floor": as_json(self.floor),
            "variants": {name: as_json(self.figures(name)) for name in VARIANTS},
            "claims": {name: [verdict.as_json() for verdict in verdicts] for name, verdicts in self.verdicts.items()},
        }
        if len(self.seeds) > 1:
            each = [{name: as_json(measured.figures) for name, measured in run.items()} for run in self.runs]
            found["by_seed"] = dict(zip(map(str, self.seeds), each, strict=True))
        return found

    def rung_as_json(self, name: str) -> dict[str, Any]:
        first = self.runs[0][name]
        return {
            "train_seconds": round(first.train_seconds, 2),
            "sample_seconds": round(first.sample_seconds, 2),
            "num_parameters": first.num_parameters,
            "num_samples": len(first.samples),
            "num_inference_steps": first.num_inference_steps,
            "bits_per_dim": None,  # unless it has a likelihood
            **as_json(self.figures(name)),
            "diagnoses": [diagnosis.as_json() for diagnosis in first.diagnoses],
        }
