"""What commonly goes wrong in training these models: each by its name, what was measured, and how it is mended.

A diagnosis looks at one thing and returns None where that is well. The thresholds are for telling the ill from the odd: what is
reported is far from what a healthy run shows.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .estimates import Estimate
from .sampling import generators, posteriors, scaled, watched_steps

ACTIVE = (
    0.01  # the variance of a code's mean over images, above which its dimension says something: Burda et al. 2016, section 5.1
)
FEW_ACTIVE = 0.1
SCALE = (0.8, 1.25)  # of the standard deviation of latents
SIGNAL_LEFT = 0.05  # alpha_bar_T: more leaves over a fifth of the image in x_T
OLD = 0.4  # of a run, the mean age of averaged weights
BEYOND, OFTEN = 0.1, 0.02  # a predicted x_0 outside its range by a tenth of it, and the share of such values
SIGNAL = 0.1  # alpha_bar_t, below which a small error of epsilon is a large one of x_0, and says little
COPIES = 0.1  # the share of samples suspiciously near to an image trained on; 0.05 where nothing is memorised


@dataclass(frozen=True)
class Diagnosis:
    """Something that is wrong: its name, what was measured, and what to do."""

    name: str
    measured: str
    mend: str

    def __str__(self) -> str:
        return f"{self.name}: {self.measured}. Mend: {self.mend}."

    as_json = asdict


def present(*diagnoses: Diagnosis | None) -> list[Diagnosis]:
    return [diagnosis for diagnosis in diagnoses if diagnosis is not None]


def posterior_collapse(vae: Any, images: torch.Tensor) -> Diagnosis | None:
    """Whether codes say nothing of their images (N, C, H, W), in [-1, 1]; Bowman et al. 2016, section 3.1. One image cannot tell."""
    if len(images) < 2:
        return None
    means = torch.cat([posterior.mean for posterior in posteriors(vae, images)]).flatten(1)
    active, count = int((means.var(0) > ACTIVE).sum()), means.shape[1]
    if active > FEW_ACTIVE * count:
        return None
    return Diagnosis(
        "posterior collapse",
        f"{active} of the code's {count} dimensions say anything of the image (variance of the posterior's mean above {ACTIVE})",
        "a lower --kl_weight, or one that is raised slowly; a weaker decoder; a smaller sigma_x to start from",
    )


def latent_scale(vae: Any, images: torch.Tensor, seed: int = 0) -> Diagnosis | None:
    """Whether the latents that a diffusion is trained on have a standard deviation near 1; Rombach et al. 2022, appendix G."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.cat([posterior.sample(generator) for posterior in posteriors(vae, images)]).float()
    std = scaled(vae, z).std().item()
    if SCALE[0] <= std <= SCALE[1]:
        return None
    return Diagnosis(
        "latent std far from 1",
        f"the scaled latents have a standard deviation of {std:.3g}, so that the noise levels mean something else than for images",
        f"vae.register_to_config(scaling_factor={vae.config.scaling_factor / std:.5g}) and save it, before the diffusion is trained",
    )


def signal_left(scheduler: Any) -> Diagnosis | None:
    """Whether x_T is noise; Lin et al. 2023 (https://arxiv.org/abs/2305.08891), section 3.1."""
    left = scheduler.alphas_cumprod[-1].item()
    if left <= SIGNAL_LEFT:
        return None
    return Diagnosis(
        "alpha_bar_T too high",
        f"alpha_bar_T is {left:.3g}: x_T still holds {left**0.5:.0%} of the image, while sampling starts from pure noise",
        "--beta_schedule squaredcos_cap_v2, which ends in noise for any T, or more --num_train_timesteps; in a scheduler, "
        "rescale_betas_to_timesteps=True",
    )


def long_average(decay_at: Callable[[int], float], steps: int) -> Diagnosis | None:
    """Whether averaged weights are younger than the run.

    Args:
        decay_at: the decay of the average at a step, from 1.
        steps: of the run.
    """
    age = 0.0  # of the average, in steps: what stays is one older, what comes is new
    for step in range(1, steps + 1):
        age = decay_at(step) * (age + 1)
    if age <= OLD * steps:
        return None
    return Diagnosis(
        "EMA longer than the run",
        f"the averaged weights are {age:.0f} steps old on average, of a run of {steps}: what is saved has not been trained to the end",
        f"--ema_max_decay {1 - 10 / max(steps, 20):.3g}, or --ema_sigma_rel 0.1, whose averages are as long as the run by themselves",
    )


def clipped(pipeline: Any, seed: int = 0, count: int = 16, **kwargs: Any) -> Diagnosis | None:
    """Whether sampling often clips the predicted x_0, beyond what a small error explains. `kwargs` go to the pipeline's call."""
    scheduler = pipeline.components.get("scheduler")
    if not getattr(getattr(scheduler, "config", None), "clip_sample", False) or not hasattr(
        scheduler, "predict_original_sample"
    ):
        return None
    beyond: list[float] = []

    def note(output: torch.Tensor, t: Any, x_t: torch.Tensor, _: torch.Tensor) -> None:
        if scheduler.alphas_cumprod[int(t)] < SIGNAL:
            return
        x_0 = scheduler.predict_original_sample(output[:, : x_t.shape[1]], t, x_t)
        beyond.append((x_0.abs() > (1 + BEYOND) * scheduler.config.clip_sample_range).float().mean().item())

    with watched_steps(scheduler, note):  # by this process alone
        pipeline(batch_size=count, generator=generators(seed, 0, count), output_type="np", **kwargs)
    often = sum(beyond) / max(1, len(beyond))
    if often <= OFTEN:
        return None
    limit = scheduler.config.clip_sample_range
    return Diagnosis(
        "x_0 clipped too often",
        f"{often:.0%} of the predicted x_0 lie more than {BEYOND:.0%} outside of [-{limit:g}, {limit:g}], to which sampling clips them",
        "clip_sample=False for latents, which have no such range; for images train longer, or thresholding=True under strong guidance",
    )


def memorisation(memorised: Estimate) -> Diagnosis | None:
    """Whether samples are copies: the whole interval of [`metrics.memorised`] lies above twice what is natural."""
    if memorised.interval[0] <= COPIES:
        return None
    return Diagnosis(
        "memorisation",
        f"{memorised.value:.0%} of {memorised.n} samples are nearer to an image trained on than all but 5 % of held-out images are",
        "more images, --random_flip, --dropout 0.1, fewer --max_train_steps or a smaller network",
    )
