"""The main job: train every rung, measure it, and write the page that shows it."""

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .evaluation import claims, figures, pictures
from .evaluation.metrics import Estimate, measure
from .evaluation.pictures import Picture
from .evaluation.report import Section, write_page
from .evaluation.sampling import Step, decode, sample, trace
from .rungs import RUNGS, configuration, train_rung
from .training.configuration import CONFIG_NAME, TrainingConfig, UsageError
from .training.data import ImageData, load_data
from .training.trainer import LOG_NAME, read_log

SHOWN = 32  # samples of each rung on the page


@dataclass
class Measured:
    """A trained rung and what was found out about it."""

    name: str
    pipeline: Any
    train_seconds: float
    samples: torch.Tensor  # float32 (N, C, H, W) in [0, 1]
    sample_seconds: float
    metrics: dict[str, Estimate]
    losses: list[tuple[int, float]]
    num_inference_steps: int | None

    @property
    def num_parameters(self) -> int:
        modules = [part for part in self.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    def as_json(self) -> dict[str, Any]:
        figures_of_it = {name: estimate.as_json() for name, estimate in self.metrics.items()}
        return {
            "train_seconds": round(self.train_seconds, 2),
            "sample_seconds": round(self.sample_seconds, 2),
            "num_parameters": self.num_parameters,
            "num_samples": len(self.samples),
            "num_inference_steps": self.num_inference_steps,
            **figures_of_it,
            "bits_per_dim": None,
        }


def climb(output: Path, num_samples: int = 1000, seed: int = 0, max_train_steps: int | None = None) -> None:
    """Train the six rungs on the digits into `output/<rung>`; write `output/results.json` and `output/report.html`.

    Raises:
        UsageError: the folder holds the results of other settings, or cannot be written.
    """
    start = time.perf_counter()
    changes: dict[str, Any] = {} if max_train_steps is None else {"max_train_steps": max_train_steps}
    configs = {
        name: configuration(name, dataset_name="digits", output_dir=str(output / name), seed=seed, **changes) for name in RUNGS
    }
    configs["latent_diffusion"] = replace(configs["latent_diffusion"], vae_path=configs["vae"].output_dir)
    if num_samples < SHOWN:
        raise UsageError(f"--num_samples {num_samples}: at least {SHOWN} are needed")
    for config in configs.values():
        config.check_folder()  # all of them before the first is trained

    train, held_out = load_data(configs["dae"])
    measured = {}
    for number, (name, config) in enumerate(configs.items(), 1):
        print(f"[{number}/{len(configs)}] {name}: {RUNGS[name].title}", flush=True)
        measured[name] = train_and_measure(config, held_out, num_samples, seed)
        print(f"      {summary(measured[name].metrics)}", flush=True)
    floor = measure(train.images.flatten(1), held_out.images.flatten(1), seed)

    results = {
        "dataset": "digits",
        "rungs": {name: rung.as_json() for name, rung in measured.items()},
        "floor": {"num_samples": len(train), **{name: estimate.as_json() for name, estimate in floor.items()}},
    }
    aside = output / "results.tmp"
    aside.write_text(json.dumps(results, indent=2) + "\n")
    aside.replace(output / "results.json")
    print("drawing the page", flush=True)
    sections = [section(rung, measured, floor, train, held_out, seed) for rung in measured.values()]
    facts = {
        "data": f"{len(train)} digits to train on, {len(held_out)} held out, {train.resolution}x{train.resolution} grey",
        "samples measured": f"{num_samples} a rung",
        "seed": str(seed),
        "run": f"{time.perf_counter() - start:.0f} s",
        "folder": str(output),
    }
    forward = pictures.forward_process(measured["ddpm"].pipeline.scheduler, signed(held_out, 4), seed)
    write_page(output / "report.html", sections, floor, shown(held_out.images), overview(measured, floor), forward, facts)
    print(f"{output / 'report.html'}: open it in a browser ({time.perf_counter() - start:.0f} s in all)", flush=True)


def train_and_measure(config: TrainingConfig, held_out: ImageData, num_samples: int, seed: int) -> Measured:
    """Train a rung, load what was saved as anyone would, draw samples and measure them."""
    start = time.perf_counter()
    train_rung(config)
    train_seconds = time.perf_counter() - start
    pipeline = DiffusionPipeline.from_pretrained(config.output_dir)
    steps = RUNGS[config.rung].num_inference_steps
    start = time.perf_counter()
    samples = sample(pipeline, num_samples, seed, **steps_argument(steps))
    sample_seconds = time.perf_counter() - start
    metrics = measure(samples.flatten(1), held_out.images.flatten(1), seed)
    losses = [(int(line["step"]), line["loss"]) for line in read_log(Path(config.output_dir) / LOG_NAME)]
    return Measured(config.rung, pipeline, train_seconds, samples, sample_seconds, metrics, losses, steps)


def evaluate_run(run: Path, num_samples: int, num_inference_steps: int | None, seed: int) -> None:
    """Measure a saved run on the held-out part of its data; print the figures as JSON.

    Raises:
        UsageError: the folder holds no run.
    """
    try:
        saved = json.loads((run / CONFIG_NAME).read_text())
        config = TrainingConfig(**saved)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{run} holds no trained run: {CONFIG_NAME} cannot be read there") from error
    if not (run / "model_index.json").exists():
        raise UsageError(f"{run} holds no pipeline: its training has not ended")
    train, held_out = load_data(config)
    pipeline = DiffusionPipeline.from_pretrained(str(run))
    steps = RUNGS[config.rung].num_inference_steps
    samples = sample(pipeline, num_samples, seed, **steps_argument(steps and (num_inference_steps or steps)))
    for name, images in (("samples", samples), ("floor", train.images)):
        figures_of_it = measure(images.flatten(1), held_out.images.flatten(1), seed)
        print(json.dumps({name: {key: estimate.as_json() for key, estimate in figures_of_it.items()}}))


def steps_argument(steps: int | None) -> dict[str, int]:
    return {} if steps is None else {"num_inference_steps": steps}


def summary(metrics: dict[str, Estimate]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {estimate.value:.3f}" for name, estimate in metrics.items())


def signed(data: ImageData, count: int) -> torch.Tensor:
    """The first images as float32 (count, C, H, W) in [-1, 1]."""
    return data.images[:count] * 2 - 1


def shown(images: torch.Tensor) -> Any:
    return figures.grid(images[:SHOWN], SHOWN // 2, "digits")


def overview(measured: dict[str, Measured], floor: dict[str, Estimate]) -> Any:
    distances = [rung.metrics["frechet_distance"] for rung in measured.values()]
    return figures.distances(
        list(measured), [d.value for d in distances], [d.interval for d in distances], floor["frechet_distance"].value
    )


def section(
    rung: Measured, measured: dict[str, Measured], floor: dict[str, Estimate], train: ImageData, held_out: ImageData, seed: int
) -> Section:
    """The page's section of one rung."""
    table = RUNGS[rung.name]
    verdict, extra = STORIES[rung.name](rung, measured, floor, train, held_out, seed)
    facts = {
        "parameters": f"{rung.num_parameters:,}",
        "training": f"{rung.train_seconds:.0f} s, {len(rung.losses)} steps",
        "sampling": f"{1000 * rung.sample_seconds / len(rung.samples):.1f} ms an image",
        "network calls an image": str(rung.num_inference_steps or 1),
    }
    return Section(
        rung.name,
        table.title,
        table.change,
        verdict,
        rung.metrics,
        facts,
        shown(rung.samples),
        shown(held_out.images),
        figures.loss_curve(rung.losses, rung.name),
        extra,
    )


def record(rung: Measured, count: int, seed: int) -> list[Step]:
    return trace(rung.pipeline, count, seed, **steps_argument(rung.num_inference_steps))


def tell_dae(rung, measured, floor, train, held_out, seed) -> tuple[claims.Verdict, list[Picture]]:
    distance = (rung.samples.mean(0) - train.images.mean(0)).square().mean().sqrt().item()
    pair = torch.stack([train.images.mean(0), rung.samples.mean(0)])
    picture = Picture(
        "The mean of the training digits (left), and the mean of the samples (right).", figures.grid(pair, 2, "means")
    )
    return claims.judge_dae(rung.metrics, distance), [picture]


def stack_pictures(rung: Measured, held_out: ImageData, seed: int) -> tuple[pictures.StageShares, list[Picture]]:
    steps = record(rung, 250, seed)
    config = rung.pipeline.model.config
    generator = torch.Generator().manual_seed(seed)
    start = config.sigma_max * torch.randn(steps[0].sample.shape, generator=generator)
    shares = pictures.stage_shares(steps, start, 2 * held_out.images.std(0).mean().item())
    return shares, [pictures.stage_chart(shares, config.fresh_noise), pictures.reverse_process(steps, "stage")]


def tell_stacked(rung, measured, floor, train, held_out, seed) -> tuple[claims.Verdict, list[Picture]]:
    shares, drawn = stack_pictures(rung, held_out, seed)
    return claims.judge_stacked(rung.metrics, shares), drawn


def tell_noisy(rung, measured, floor, train, held_out, seed) -> tuple[claims.Verdict, list[Picture]]:
    _, drawn = stack_pictures(rung, held_out, seed)
    sharp = claims.sharpness(rung.samples, held_out.images)
    return claims.judge_noisy(rung.metrics, measured["stacked_dae"].metrics, sharp), drawn


def tell_vae(rung, measured, floor, train, held_out, seed) -> tuple[claims.Verdict, list[Picture]]:
    vae = rung.pipeline.vae
    with torch.no_grad():
        codes = vae.encode(train.images * 2 - 1).latent_dist.sample(torch.Generator().manual_seed(seed))
    of_codes = measure(decode(vae, codes).flatten(1), held_out.images.flatten(1), seed)["frechet_distance"].value
    sharp = claims.sharpness(rung.samples, held_out.images)
    drawn = [pictures.reconstructions(vae, signed(held_out, 16)), pictures.latent_walk(vae, signed(held_out, 8))]
    return claims.judge_vae(rung.metrics, measured["noisy_stacked_dae"].metrics, of_codes, sharp), drawn


def tell_ddpm(rung, measured, floor, train, held_out, seed) -> tuple[claims.Verdict, list[Picture]]:
    earlier = [measured[name].metrics for name in ("dae", "stacked_dae", "noisy_stacked_dae", "vae")]
    sharp = claims.sharpness(rung.samples, held_out.images)
    verdict = claims.judge_ddpm(rung.metrics, earlier, floor["frechet_distance"].value, sharp)
    return verdict, [pictures.reverse_process(record(rung, 8, seed), "timestep")]


def tell_latent(rung, measured, floor, train, held_out, seed) -> tuple[claims.Verdict, list[Picture]]:
    prior = measured["vae"]
    steps = pictures.reverse_process(record(rung, 8, seed), "timestep", rung.pipeline.vae)
    drawn = [*pictures.same_decoder(prior.samples[:SHOWN], rung.samples[:SHOWN]), steps]
    return claims.judge_latent(rung.metrics, prior.metrics), drawn


STORIES = {
    "dae": tell_dae,
    "stacked_dae": tell_stacked,
    "noisy_stacked_dae": tell_noisy,
    "vae": tell_vae,
    "ddpm": tell_ddpm,
    "latent_diffusion": tell_latent,
}
