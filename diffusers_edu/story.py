"""What the page tells of each rung: its claim, held against the measurements, and the pictures that show it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .evaluation import claims, figures, pictures
from .evaluation.likelihood import Bound
from .evaluation.metrics import Estimate, frechet_distance
from .evaluation.pictures import Picture
from .evaluation.report import Section, render
from .evaluation.sampling import Step, decode, initial_noise, trace
from .rungs import RUNGS
from .training.data import ImageData

SHOWN = 32  # samples of each rung on the page
TRACED = 250  # samples followed through the stages of a stack
WALKS = (0, 6, 3, 8, 4, 9, 1, 7)  # the digits between which the walks in latent space lead, in pairs


def as_json(metrics: dict[str, Estimate]) -> dict[str, Any]:
    return {name: estimate.as_json() for name, estimate in metrics.items()}


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
    bound: Bound | None = None  # on the likelihood of the held-out data

    @property
    def num_parameters(self) -> int:
        modules = [part for part in self.pipeline.components.values() if isinstance(part, torch.nn.Module)]
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    def as_json(self) -> dict[str, Any]:
        return {
            "train_seconds": round(self.train_seconds, 2),
            "sample_seconds": round(self.sample_seconds, 2),
            "num_parameters": self.num_parameters,
            "num_samples": len(self.samples),
            "num_inference_steps": self.num_inference_steps,
            "bits_per_dim": None,  # unless it has a likelihood
            **as_json(self.metrics),
        }


@dataclass
class Ladder:
    """All of a run: the data, the rungs in their order, and the figures of real digits."""

    train: ImageData
    held_out: ImageData
    rungs: dict[str, Measured]
    floor: dict[str, Estimate]
    seed: int

    def as_json(self) -> dict[str, Any]:
        return {
            "dataset": "digits",
            "rungs": {name: rung.as_json() for name, rung in self.rungs.items()},
            "floor": {"num_samples": len(self.train), **as_json(self.floor)},
        }


def steps_argument(steps: int | None) -> dict[str, int]:
    return {} if steps is None else {"num_inference_steps": steps}


def page(ladder: Ladder, facts: dict[str, str]) -> str:
    """The report as HTML."""
    distances = [rung.metrics["frechet_distance"] for rung in ladder.rungs.values()]
    overview = figures.distances(
        list(ladder.rungs),
        [d.value for d in distances],
        [d.interval for d in distances],
        ladder.floor["frechet_distance"].value,
    )
    forward = pictures.forward_process(ladder.rungs["ddpm"].pipeline.scheduler, signed(ladder.held_out, range(4)), ladder.seed)
    sections = [section(rung, ladder) for rung in ladder.rungs.values()]
    return render(sections, ladder.floor, figures.grid(ladder.held_out.images[:SHOWN], 16, "digits"), overview, forward, facts)


def section(rung: Measured, ladder: Ladder) -> Section:
    """The page's section of one rung."""
    verdict, extra = STORIES[rung.name](rung, ladder)
    facts = {
        "parameters": f"{rung.num_parameters:,}",
        "training": f"{len(rung.losses)} steps, {rung.train_seconds:.0f} s",
        "sampling": f"{1e3 * rung.sample_seconds / len(rung.samples):.2g} ms an image",
        "network calls an image": str(rung.num_inference_steps or 1),
    }
    return Section(
        name=rung.name,
        title=RUNGS[rung.name].title,
        change=RUNGS[rung.name].change,
        verdict=verdict,
        metrics=rung.metrics,
        facts=facts,
        row=figures.grid(rung.samples[:SHOWN], 16, f"samples of {rung.name}"),
        samples=figures.grid(rung.samples[:SHOWN], 8, f"samples of {rung.name}"),
        real=figures.grid(ladder.held_out.images[:SHOWN], 8, "held-out digits"),
        loss=figures.loss_curve(rung.losses, rung.name),
        pictures=extra,
    )


def signed(data: ImageData, indices: Iterable[int]) -> torch.Tensor:
    """Some images as the models see them, float32 (N, C, H, W) in [-1, 1]."""
    return data.batch(list(indices))["images"]


def record(rung: Measured, count: int, seed: int) -> list[Step]:
    """The steps of one call for the first `count` samples."""
    return trace(rung.pipeline, count, seed, **steps_argument(rung.num_inference_steps))


Story = tuple[claims.Verdict, list[Picture]]


def tell_dae(rung: Measured, ladder: Ladder) -> Story:
    means = torch.stack([ladder.train.images.mean(0), rung.samples.mean(0)])
    distance = (means[0] - means[1]).square().mean().sqrt().item()
    picture = Picture(
        "The mean of what it saw, and of what it makes",
        "Left the mean of the training digits, right the mean of the samples.",
        figures.grid(means, 2, "mean training digit, mean sample", gap=4),
    )
    return claims.judge_dae(rung.metrics, distance), [picture]


def stage_pictures(rung: Measured, ladder: Ladder) -> tuple[pictures.StageShares, list[Picture]]:
    """What each stage of a stack did, measured on samples of their own, and drawn."""
    config = rung.pipeline.model.config
    start = config.sigma_max * initial_noise(ladder.seed, TRACED, ladder.held_out.images.shape[1:])
    steps = record(rung, TRACED, ladder.seed)
    shares = pictures.stage_shares(steps, start, 2 * ladder.held_out.images.std(0).mean().item())
    return shares, [pictures.stage_chart(shares, config.fresh_noise), *pictures.reverse_process(start, steps, "stage")]


def tell_stacked(rung: Measured, ladder: Ladder) -> Story:
    shares, drawn = stage_pictures(rung, ladder)
    return claims.judge_stacked(rung.metrics, shares), drawn


def tell_noisy(rung: Measured, ladder: Ladder) -> Story:
    _, drawn = stage_pictures(rung, ladder)
    sharp = claims.sharpness(rung.samples, ladder.held_out.images)
    return claims.judge_noisy(rung.metrics, ladder.rungs["stacked_dae"].metrics, sharp), drawn


@torch.no_grad()
def tell_vae(rung: Measured, ladder: Ladder) -> Story:
    vae, held_out = rung.pipeline.vae, ladder.held_out
    train = signed(ladder.train, range(len(ladder.train))).to(vae.device)
    codes = vae.encode(train).latent_dist.sample(torch.Generator().manual_seed(ladder.seed))
    of_codes = frechet_distance(decode(vae, codes).flatten(1), held_out.images.flatten(1), ladder.seed)
    sharp = claims.sharpness(rung.samples, held_out.images)
    verdict = claims.judge_vae(rung.metrics, ladder.rungs["noisy_stacked_dae"].metrics, of_codes.value, sharp)
    labels = torch.as_tensor(held_out.labels)
    first_of = [int(torch.nonzero(labels == digit)[0]) for digit in WALKS]
    walk = pictures.latent_walk(vae, signed(held_out, first_of))
    return verdict, [pictures.reconstructions(vae, signed(held_out, range(8))), walk]


def tell_ddpm(rung: Measured, ladder: Ladder) -> Story:
    earlier = [ladder.rungs[name].metrics for name in ("dae", "stacked_dae", "noisy_stacked_dae", "vae")]
    sharp = claims.sharpness(rung.samples, ladder.held_out.images)
    verdict = claims.judge_ddpm(rung.metrics, earlier, ladder.floor["frechet_distance"].value, sharp)
    start = initial_noise(ladder.seed, 4, rung.samples.shape[1:])
    near = pictures.nearest(rung.samples, ladder.train.images, ladder.held_out.images)
    reverse = pictures.reverse_process(start, record(rung, 4, ladder.seed), "timestep")
    return verdict, [near, *reverse, *([] if rung.bound is None else pictures.bound_pictures(rung.bound))]


def tell_latent(rung: Measured, ladder: Ladder) -> Story:
    prior, vae = ladder.rungs["vae"], rung.pipeline.vae
    near = pictures.nearest(rung.samples, ladder.train.images, ladder.held_out.images)
    drawn = [near, *pictures.same_decoder(prior.samples[:SHOWN], rung.samples[:SHOWN])]
    start = initial_noise(ladder.seed, 4, vae.latent_shape)
    drawn += pictures.reverse_process(start, record(rung, 4, ladder.seed), "timestep", vae)
    return claims.judge_latent(rung.metrics, prior.metrics), drawn


STORIES = {
    "dae": tell_dae,
    "stacked_dae": tell_stacked,
    "noisy_stacked_dae": tell_noisy,
    "vae": tell_vae,
    "ddpm": tell_ddpm,
    "latent_diffusion": tell_latent,
}
