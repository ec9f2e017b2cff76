"""What is done with a run that has ended: load it, measure it, average its weights anew."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar

from .bounds import LARGEST, likelihoods, windows
from .checkup import after_training, of_average
from .errors import UsageError
from .evaluation.diagnoses import present
from .evaluation.estimates import Estimate
from .evaluation.features import make_features
from .evaluation.metrics import Reference
from .evaluation.sampling import DRAWN, fitting, sample
from .evaluation.sharding import by_one, is_shared
from .rungs import RUNGS
from .training.averages import synthesise
from .training.checkpoints import write_pipeline
from .training.configuration import CONFIG_NAME, TrainingConfig
from .training.data import ImageData, load_data
from .training.launch import launched_processes, one_first
from .training.trainer import batches_of

FEWEST = 10  # samples that figures can be made of
FEWEST_REAL = 6  # images of either kind: they are told by their five nearest
STREAMED = 1000  # images of a stream that stand for it


@dataclass(frozen=True)
class Measurement:
    """Samples of a pipeline, held against the held-out images of the data it was trained on.

    Args:
        samples: float32 (N, C, H, W) in [0, 1].
        metrics: the figures of the samples; see [`metrics.Reference`].
        floor: those of as many of the images trained on, or of all of them.
        features: the name of what the figures are computed on.
        train, held_out: the images.
        num_inference_steps: of the sampling; None where it has no meaning.
        seed: of the samples.
    """

    samples: torch.Tensor
    metrics: dict[str, Estimate]
    floor: dict[str, Estimate]
    features: str
    train: ImageData
    held_out: ImageData
    num_inference_steps: int | None
    seed: int


def measure_pipeline(
    pipeline: Any,
    config: TrainingConfig,
    num_samples: int,
    num_inference_steps: int | None,
    seed: int,
    features: str = "auto",
) -> Measurement:
    """Measure a pipeline on the held-out part of the data of `config`; samples of a pipeline of classes have those of the data.

    Raises:
        UsageError: too few samples, steps that the pipeline does not take, features or data that cannot be had.
    """
    if num_samples < FEWEST:
        raise UsageError(f"--num_samples {num_samples}: at least {FEWEST} are needed")
    replace(config, seed=seed).validate()  # what a training refuses as a seed, a measurement does
    train, held_out = the_data(config)
    if config.streaming:
        train = train.head(STREAMED)
    if min(len(train), len(held_out)) < FEWEST_REAL:
        raise UsageError(f"{len(train)} images to train on and {len(held_out)} held out: figures take {FEWEST_REAL} of each")
    if bool((held_out.pixels == held_out.pixels[:1]).all()):
        raise UsageError(f"the {len(held_out)} held-out images are all the same: nothing can be measured by them")
    steps = RUNGS[config.rung].num_inference_steps
    if steps is not None:
        most = len(pipeline.scheduler) if "scheduler" in pipeline.components else None
        steps = min(steps, most or steps) if num_inference_steps is None else num_inference_steps
        if steps < 1 or (most is not None and steps > most):
            raise UsageError(f"--num_inference_steps {steps}: this pipeline takes 1 to {most or 'as many as it has stages'}")
    made = make_features(features, train.channels, train.resolution, str(pipeline.device))
    reference = Reference(train, held_out, made, seed)
    labels = None
    unet = pipeline.components.get("unet")
    if getattr(getattr(unet, "config", None), "num_class_embeds", None) is not None and held_out.labels is not None:
        order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))  # files are often sorted by class
        labels = held_out.labels[order[torch.arange(num_samples) % len(held_out)]]
    batch_size = fitting(DRAWN, held_out.pixels[0].numel())
    samples = sample(pipeline, num_samples, seed, batch_size, labels, **steps_argument(steps))
    figures = reference.measure(samples, labels)
    return Measurement(samples, figures, reference.floor(num_samples), made.name, train, held_out, steps, seed)


def steps_argument(steps: int | None) -> dict[str, Any]:
    return {} if steps is None else {"num_inference_steps": steps}


def as_json(figures: dict[str, Estimate]) -> dict[str, Any]:
    return {name: estimate.as_json() for name, estimate in figures.items()}


def evaluate_runs(
    runs: Sequence[Path],
    num_samples: int,
    num_inference_steps: int | None,
    seed: int,
    features: str = "auto",
    steps: Sequence[int] = (),
) -> None:
    """Measure saved runs on the held-out part of their data; print the figures as JSON, a line each, and of each run after the first by
    how much its figures differ.

    Under `accelerate launch`, the samples, features and bounds are shared out over the processes.

    Args:
        runs: their folders.
        num_samples, num_inference_steps, seed, features: see `measure_pipeline`.
        steps: measure the likelihood too, of a diffusion over chains of so many; none, not.

    Raises:
        UsageError: a folder holds no run, or the runs have not the same data; steps that no chain has.
    """
    if steps and min(steps) < 1:
        raise UsageError(f"--likelihood_steps {min(steps)}: a chain has at least 1")
    configs = [saved_configuration(run) for run in runs]
    state = launched_processes()
    if len(runs) > 1 and len({the_data(config)[1].fingerprint() for config in configs}) > 1:
        raise UsageError("the runs were trained on different data, and figures of different data cannot be compared")
    first: tuple[str, Measurement] | None = None
    for run, config in zip(runs, configs, strict=True):
        pipeline = load(str(run))
        measured = measure_pipeline(pipeline, config, num_samples, num_inference_steps, seed, features)
        for line in lines_of(str(run), pipeline, config, measured, first, steps):
            if state.is_main_process:
                print(json.dumps(line), flush=True)
        first = first or (str(run), measured)


def the_data(config: TrainingConfig) -> tuple[Any, ImageData]:
    """As `load_data`; of several processes that share the work, one of each machine decodes, and the others read its cache."""
    return one_first(PartialState(), lambda: load_data(config)) if is_shared() else load_data(config)


def lines_of(
    run: str,
    pipeline: Any,
    config: TrainingConfig,
    measured: Measurement,
    first: tuple[str, Measurement] | None,
    steps: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """What is printed of a run; `first` is the one that it is compared with, `steps` are of the bounds, none for none."""
    setting = {"num_samples": len(measured.samples), "num_inference_steps": measured.num_inference_steps, "seed": measured.seed}
    yield {"run": run, **setting, "held_out": len(measured.held_out), "features": measured.features}
    yield {"samples": as_json(measured.metrics)}
    yield {"floor": as_json(measured.floor)}
    if first is not None:
        name_of_first, other = first
        difference = {name: value - other.metrics[name] for name, value in measured.metrics.items()}
        yield {"difference": as_json(difference), "of": f"{run} minus {name_of_first}"}
    diagnoses = after_training(pipeline, measured.held_out, measured.metrics["memorised"], measured.num_inference_steps)
    yield {"diagnoses": [each.as_json() for each in present(of_average(config), *diagnoses)]}
    if steps:
        train, held_out, count = measured.train, measured.held_out, len(measured.samples)
        for found in likelihoods(pipeline, config, train, held_out, measured.seed, steps):
            yield {"likelihood": found}
        if (values := measured.samples[0].numel()) > LARGEST:
            yield {"parzen_bits_per_dim": {"none": f"images of {values} values; windows are measured up to {LARGEST}"}}
            return
        both = {"samples": measured.samples, "training_images": None}
        estimates = by_one(lambda: {name: windows(of, train, held_out, count, measured.seed) for name, of in both.items()})
        yield {
            "parzen_bits_per_dim": {**as_json(estimates), "note": "no likelihood: see evaluation/parzen.py for what it misses"}
        }


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
    """A saved pipeline, on this process's accelerator where there is one; without a progress bar for the few files it has."""
    disable_progress_bar()
    device = PartialState(cpu=not torch.accelerator.is_available()).device
    return DiffusionPipeline.from_pretrained(repository, **kwargs).to(device)
