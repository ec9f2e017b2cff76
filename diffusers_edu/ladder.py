"""The main job: train every rung, measure it, and write the page that shows it."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar

from .errors import UsageError
from .evaluation.metrics import Estimate, measure
from .evaluation.sampling import sample
from .rungs import RUNGS, configuration, train_rung
from .story import SHOWN, Ladder, Measured, as_json, page, steps_argument
from .training.averages import synthesise
from .training.checkpoints import write_pipeline
from .training.configuration import CONFIG_NAME, TrainingConfig, write_text
from .training.data import ImageData, load_data
from .training.log import LOG_NAME, read_log
from .training.trainer import batches_of

FEWEST = 10  # samples that figures can be made of


def climb(output: Path, num_samples: int = 1000, seed: int = 0, max_train_steps: int | None = None) -> None:
    """Train the six rungs on the digits into `output/<rung>`; write `output/results.json` and `output/report.html`.

    Raises:
        UsageError: the folder holds the results of other settings, or cannot be written.
    """
    if num_samples < SHOWN:
        raise UsageError(f"--num_samples {num_samples}: at least {SHOWN} are needed")
    start = time.perf_counter()
    changes: dict[str, Any] = {} if max_train_steps is None else {"max_train_steps": max_train_steps}
    configs = {
        name: configuration(name, dataset_name="digits", output_dir=str(output / name), seed=seed, **changes) for name in RUNGS
    }
    configs["latent_diffusion"] = replace(configs["latent_diffusion"], vae_path=str((output / "vae").resolve()))
    for config in configs.values():
        config.check_folder()  # all of them before the first is trained

    train, held_out = load_data(configs["dae"])
    rungs = {}
    for number, (name, config) in enumerate(configs.items(), 1):
        print(f"[{number}/{len(configs)}] {name}: {RUNGS[name].title}", flush=True)
        rungs[name] = train_and_measure(config, held_out, num_samples, seed)
        print(f"      {summary(rungs[name].metrics)}", flush=True)
    floor = measure(train.images.flatten(1), held_out.images.flatten(1), seed)
    ladder = Ladder(train, held_out, rungs, floor, seed)
    write_text(output / "results.json", json.dumps(ladder.as_json(), indent=2) + "\n")

    print("drawing the page", flush=True)
    facts = {
        "data": f"{len(train)} digits to train on, {len(held_out)} held out, {train.resolution}x{train.resolution} grey",
        "samples measured": f"{num_samples} a rung",
        "seed": str(seed),
        "run": f"{time.perf_counter() - start:.0f} s",
        "folder": str(output),
    }
    write_text(output / "report.html", page(ladder, facts))
    print(f"{output / 'report.html'}: open it in a browser ({time.perf_counter() - start:.0f} s in all)", flush=True)


def train_and_measure(config: TrainingConfig, held_out: ImageData, num_samples: int, seed: int) -> Measured:
    """Train a rung, load what was saved as anyone would, draw samples and measure them."""
    train_rung(config)
    pipeline = load(config.output_dir)
    steps = RUNGS[config.rung].num_inference_steps
    start = time.perf_counter()
    samples = sample(pipeline, num_samples, seed, **steps_argument(steps))
    sample_seconds = time.perf_counter() - start
    metrics = measure(samples.flatten(1), held_out.images.flatten(1), seed)
    log = read_log(Path(config.output_dir) / LOG_NAME)
    losses = [(int(line["step"]), line["loss"]) for line in log]
    return Measured(config.rung, pipeline, log[-1]["seconds"], samples, sample_seconds, metrics, losses, steps)


def evaluate_run(run: Path, num_samples: int, num_inference_steps: int | None, seed: int) -> None:
    """Measure a saved run on the held-out part of its data; print the figures as JSON.

    Raises:
        UsageError: the folder holds no run.
    """
    if num_samples < FEWEST:
        raise UsageError(f"--num_samples {num_samples}: at least {FEWEST} are needed")
    config = saved_configuration(run)
    replace(config, seed=seed).validate()  # what a training refuses as a seed, a measurement does
    train, held_out = load_data(config)
    pipeline = load(str(run))
    steps = RUNGS[config.rung].num_inference_steps
    steps = steps and (num_inference_steps or steps)
    if steps and not 1 <= steps <= (len(pipeline.scheduler) if "scheduler" in pipeline.components else steps):
        raise UsageError(f"--num_inference_steps {steps}: this pipeline takes 1 to {len(pipeline.scheduler)}")
    samples = sample(pipeline, num_samples, seed, **steps_argument(steps))
    for name, images in (("samples", samples), ("floor", train.images)):
        print(json.dumps({name: as_json(measure(images.flatten(1), held_out.images.flatten(1), seed))}))


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


def load(folder: str) -> Any:
    """A saved pipeline, on the accelerator where there is one; without a progress bar for the few files it has."""
    disable_progress_bar()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return DiffusionPipeline.from_pretrained(folder).to(device)


def summary(metrics: dict[str, Estimate]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {estimate.value:.3f}" for name, estimate in metrics.items())
