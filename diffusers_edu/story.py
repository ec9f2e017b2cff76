"""What the page tells of each rung: its claims with their verdicts, and the pictures that show what they are about."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .evaluation import figures, pictures
from .evaluation.pictures import Picture
from .evaluation.report import Section, number, render
from .evaluation.sampling import Step, initial_noise, trace
from .experiment import VARIANTS, Ladder, Measured, followed
from .rungs import RUNGS
from .runs import load, steps_argument
from .training.data import ImageData

SHOWN = 32  # samples of each rung on the page
FOLLOWED = 4  # of them, from noise
LIGHT_TO_HEAVY = ("vae_light", "vae_middle", "vae_heavy")  # the KL terms of autoencoders
WALKS = (0, 6, 3, 8, 4, 9, 1, 7)  # the digits between which the walks in latent space lead, in pairs


def page(ladder: Ladder, facts: dict[str, str]) -> str:
    """The report as HTML."""
    over_all = {name: ladder.figures(name) for name in RUNGS}
    overview = figures.distances(
        list(RUNGS), [of["frechet_distance"] for of in over_all.values()], ladder.floor["frechet_distance"].value
    )
    sections = [section(rung, ladder) for rung in ladder.rungs.values()]
    scheduler = load(ladder.rungs["ddpm"].folder).scheduler
    forward = pictures.forward_process(scheduler, signed(ladder.held_out, range(4)), ladder.seeds[0])
    real = figures.grid(ladder.held_out.images[:SHOWN], 16, "digits")
    return render(sections, ladder.floor, real, overview, forward, facts, len(ladder.seeds) > 1)


def section(rung: Measured, ladder: Ladder) -> Section:
    """The page's section of one rung."""
    facts = {
        "parameters": f"{rung.num_parameters:,}",
        "training": f"{len(rung.losses)} steps, {rung.train_seconds:.0f} s",
        "sampling": f"{1e3 * rung.sample_seconds / len(rung.samples):.2g} ms an image",
        "network calls an image": str(rung.num_inference_steps or 1),
        "arithmetic of an image": f"{number(rung.figures['operations'].value / 1e6)} million operations",
    }
    return Section(
        name=rung.name,
        title=RUNGS[rung.name].title,
        change=RUNGS[rung.name].change,
        verdicts=ladder.verdicts[rung.name],
        metrics=ladder.figures(rung.name),
        diagnoses=rung.diagnoses,
        facts=facts,
        row=figures.grid(rung.samples[:SHOWN], 16, f"samples of {rung.name}"),
        samples=figures.grid(rung.samples[:SHOWN], 8, f"samples of {rung.name}"),
        real=figures.grid(ladder.held_out.images[:SHOWN], 8, "held-out digits"),
        loss=figures.loss_curve(rung.losses, rung.name),
        pictures=PICTURES[rung.name](rung, load(rung.folder), ladder),
    )


def signed(data: ImageData, indices: Iterable[int]) -> torch.Tensor:
    """Some images as the models see them, float32 (N, C, H, W) in [-1, 1]."""
    return data.batch(list(indices))["images"]


def record(rung: Measured, pipeline: Any, seed: int) -> list[Step]:
    """The steps of one call for the first samples."""
    return trace(pipeline, FOLLOWED, seed, **steps_argument(rung.num_inference_steps))


def of_dae(rung: Measured, pipeline: Any, ladder: Ladder) -> list[Picture]:
    means = torch.stack([ladder.train.images.mean(0), rung.samples.mean(0)])
    shown = figures.grid(means, 2, "mean training digit, mean sample", gap=4)
    caption = "Left the mean of the training digits, right the mean of the samples."
    return [Picture("The mean of what it saw, and of what it makes", caption, shown)]


def of_stack(rung: Measured, pipeline: Any, ladder: Ladder) -> list[Picture]:
    assert rung.shares is not None
    steps, start = followed(rung, pipeline, ladder.seeds[0], FOLLOWED)
    drawn = [pictures.stage_chart(rung.shares, pipeline.model.config.fresh_noise)]
    drawn += [] if rung.mismatch is None else [pictures.mismatch_chart(rung.mismatch, rung.figures["frechet_distance"])]
    return [*drawn, *pictures.reverse_process(start, steps, "stage")]


def of_vae(rung: Measured, pipeline: Any, ladder: Ladder) -> list[Picture]:
    vae, held_out = pipeline.vae, ladder.held_out
    labels = torch.as_tensor(held_out.labels)
    first_of = [int(torch.nonzero(labels == digit)[0]) for digit in WALKS]
    weights = {name: VARIANTS[name].get("kl_weight", RUNGS["vae"].defaults["kl_weight"]) for name in LIGHT_TO_HEAVY}
    return [
        pictures.reconstructions(vae, signed(held_out, range(8)), rung.figures["reconstruction_error"]),
        pictures.trade_off(list(weights.values()), [ladder.figures(name) for name in weights]),
        pictures.latent_walk(vae, signed(held_out, first_of)),
    ]


def of_ddpm(rung: Measured, pipeline: Any, ladder: Ladder) -> list[Picture]:
    seed = ladder.seeds[0]
    near = pictures.nearest(rung.samples, ladder.train.images, ladder.held_out.images)
    start = initial_noise(seed, FOLLOWED, rung.samples.shape[1:])
    reverse = pictures.reverse_process(start, record(rung, pipeline, seed), "timestep")
    return [near, *reverse, *([] if rung.bound is None else pictures.bound_pictures(rung.bound))]


def of_latent_diffusion(rung: Measured, pipeline: Any, ladder: Ladder) -> list[Picture]:
    seed, prior = ladder.seeds[0], ladder.rungs["vae"]
    near = pictures.nearest(rung.samples, ladder.train.images, ladder.held_out.images)
    start = initial_noise(seed, FOLLOWED, pipeline.vae.latent_shape)
    reverse = pictures.reverse_process(start, record(rung, pipeline, seed), "timestep", pipeline.vae)
    return [near, *pictures.same_decoder(prior.samples[:SHOWN], rung.samples[:SHOWN]), *reverse]


PICTURES: dict[str, Callable[[Measured, Any, Ladder], list[Picture]]] = {
    "dae": of_dae,
    "stacked_dae": of_stack,
    "noisy_stacked_dae": of_stack,
    "vae": of_vae,
    "ddpm": of_ddpm,
    "latent_diffusion": of_latent_diffusion,
}
