"""The main job: train every rung, measure it, and write the page that shows it."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import UsageError
from .evaluation.metrics import Estimate, measure, memorised
from .evaluation.sampling import sample
from .rungs import RUNGS, configuration, train_rung
from .runs import chain, likelihood, load
from .story import SHOWN, Ladder, Measured, page, steps_argument
from .training.configuration import TrainingConfig, write_text
from .training.data import ImageData, load_data
from .training.log import LOG_NAME, read_log


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
        rungs[name] = train_and_measure(config, train, held_out, num_samples, seed)
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


def train_and_measure(config: TrainingConfig, train: ImageData, held_out: ImageData, num_samples: int, seed: int) -> Measured:
    """Train a rung, load what was saved as anyone would, draw samples and measure them, and its likelihood."""
    train_rung(config)
    pipeline = load(config.output_dir)
    steps = RUNGS[config.rung].num_inference_steps
    start = time.perf_counter()
    samples = sample(pipeline, num_samples, seed, **steps_argument(steps))
    sample_seconds = time.perf_counter() - start
    metrics = measure(samples.flatten(1), held_out.images.flatten(1), seed)
    metrics["memorised"] = memorised(*(x.flatten(1) for x in (samples, train.images, held_out.images)))
    bound = likelihood(pipeline, held_out, chain(pipeline, train, seed=seed), seed=seed)
    if bound is not None:
        metrics["bits_per_dim"] = bound.bits_per_dim()
    log = read_log(Path(config.output_dir) / LOG_NAME)
    losses = [(int(line["step"]), line["loss"]) for line in log]
    return Measured(config.rung, pipeline, log[-1]["seconds"], samples, sample_seconds, metrics, losses, steps, bound)


def summary(metrics: dict[str, Estimate]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {estimate.value:.3f}" for name, estimate in metrics.items())
