"""How each rung works inside: what the claims about it rest on, measured on its models, each an [`Estimate`].

Images here are in [-1, 1] as the models see them, unless it says [0, 1], in which samples are measured.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .estimates import Estimate, around, bootstrap, mean
from .metrics import frechet_distance, two_sample_accuracy
from .sampling import Step, decode, generators, posteriors, sample, to_unit

RESAMPLES = 50


def sharpness(images: torch.Tensor, reference: torch.Tensor) -> Estimate:
    """The mean absolute difference of neighbouring pixels, over that of the reference: 1 as sharp as data, less is blur.

    Both (N, C, H, W). A collapsed model's figure says how sharp its one image is.
    """

    def contrast(x: torch.Tensor) -> torch.Tensor:
        return x.diff(dim=-1).abs().flatten(1).mean(1) + x.diff(dim=-2).abs().flatten(1).mean(1)

    return mean(contrast(images)) * (1 / contrast(reference).mean().item())


def from_mean(samples: torch.Tensor, train: torch.Tensor) -> Estimate:
    """The root-mean-square distance of a sample to the mean training image, both in [0, 1]."""
    return mean((samples - train.mean(0)).square().flatten(1).mean(1).sqrt())


def operations(pipeline: Any, **kwargs: Any) -> Estimate:
    """Floating-point operations of one sample, counted, in the matrix products and convolutions. `kwargs` go to the call."""
    with FlopCounterMode(display=False) as counter:
        sample(pipeline, 1, **kwargs)
    count = float(counter.get_total_flops())
    return Estimate(count, (count, count), 1)


@dataclass
class StageShares:
    """What each stage of a stack did to one batch of samples.

    Args:
        levels: the stages, in the order of sampling.
        change: the share of stage i in the sum of all root-mean-square changes of the image; they add up to 1.
        diversity: the mean pixel standard deviation over the batch after stage i, over that of the data.
        later_change: the root-mean-square distance from what the first stage returned to the sample, over the same.
        largest_later_change: the largest such distance between two stages after the first.
    """

    levels: list[int]
    change: list[Estimate]
    diversity: list[Estimate]
    later_change: Estimate
    largest_later_change: Estimate


def stage_shares(steps: list[Step], start: torch.Tensor, data_std: float, seed: int = 0) -> StageShares:
    """Measure what each stage did, from a record of many samples; intervals by the bootstrap over them.

    Args:
        steps: the record of a call, see [`sampling.trace`].
        start: the noise that it started from.
        data_std: the data's mean pixel standard deviation.
        seed: of the bootstrap.
    """
    path = torch.stack([start, *(step.sample for step in steps)]).flatten(2)  # (1 + stages, B, d)
    changes = path.diff(dim=0).square().mean(2)  # (stages, B)
    # Noise is so large that what takes it away is nearly all of the change: what comes after is held against the data.
    later = mean((path[-1] - path[1]).square().mean(1)).root() * (1 / data_std)
    largest = max((mean(change).root() * (1 / data_std) for change in changes[1:]), key=lambda e: e.value, default=later)

    def share_of_change(of: torch.Tensor) -> torch.Tensor:
        root = of.mean(1).sqrt()
        return root / root.sum()

    def spread(of: torch.Tensor) -> torch.Tensor:
        return of.std(1).mean(1) / data_std

    def estimates(figure: Any, of: torch.Tensor) -> list[Estimate]:
        draws = torch.stack([figure(draw.transpose(0, 1)) for draw in bootstrap(of.transpose(0, 1), seed, RESAMPLES)])
        return [around(value, draws[:, i].tolist(), of.shape[1]) for i, value in enumerate(figure(of).tolist())]

    shares, spreads = estimates(share_of_change, changes), estimates(spread, path[1:])
    return StageShares([step.timestep for step in steps], shares, spreads, later, largest)


@dataclass
class Mismatch:
    """What a stack's stages are fed, and what comes of it where that is what they were trained on.

    Args:
        levels: the stages, in the order of sampling.
        variance_fed: the variance over images of the guess that stage i is fed (noised anew), over that of the data, in the chain that
            starts at the first stage; that one is fed no guess.
        distance_on_digits: the Fréchet distance of samples whose chain starts at stage i, on real images noised to its level.
    """

    levels: list[int]
    variance_fed: list[Estimate | None]
    distance_on_digits: list[Estimate]


@torch.no_grad()
def stage_mismatch(model: Any, clean: torch.Tensor, held_out: torch.Tensor, seed: int = 0) -> Mismatch:
    """Start a stack with fresh noise at each of its stages, from real images noised to its level, in place of guesses.

    Args:
        model: a `StackedDenoisingAutoencoder` with `fresh_noise`.
        clean: real images to start from, as many as samples are measured of.
        held_out: images in [0, 1] to measure against.
        seed: of the noise.
    """
    levels = list(range(model.config.num_stages, 0, -1))
    sources = generators(seed, 0, len(clean))

    def noise() -> torch.Tensor:
        return torch.stack([torch.randn(clean.shape[1:], generator=source) for source in sources]).to(model.device)

    def variance(x: torch.Tensor) -> Estimate:
        draws = [draw.var(0).mean().item() for draw in bootstrap(x.cpu(), seed, RESAMPLES)]
        return around(x.var(0).mean().item(), draws, len(x))

    distances: list[Estimate] = []
    fed: list[Estimate | None] = []
    data_variance = clean.var(0).mean().item()
    for start in levels:
        image = clean.to(model.device)
        for level in range(start, 0, -1):
            if start == levels[0]:
                fed.append(None if level == start else variance(image) * (1 / data_variance))
            image = model(model.corrupt(image, noise(), level), level).sample
        distances.append(frechet_distance(to_unit(image).flatten(1), held_out.flatten(1), seed))
    return Mismatch(levels, fed, distances)


@torch.no_grad()
def code_findings(vae: Any, train: torch.Tensor, held_out: torch.Tensor, count: int, seed: int = 0) -> dict[str, Estimate]:
    """How the codes of real images lie beside N(0, I), what they cost, and what they decode to.

    `rate`, E KL(q(z | x) || N(0, I)) in nats, which is what a code says of its image and how far the codes of all images lie from the
    prior, together (Hoffman and Johnson 2016, eq. 9; to tell the two apart takes more images than there are);
    `codes_told_apart`, the nearest neighbour's accuracy between codes and draws of N(0, I), 0.5 where they are alike;
    `distance_of_codes`, the Fréchet distance of decoded codes to held-out images; `reconstruction_error`, the root mean square over
    held-out images, of the grey range.

    Args:
        vae: see [`likelihood.autoencoder_bound`].
        train: images trained on.
        held_out: images that are not.
        count: codes to decode, as many as samples are measured of, or all there are.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train), generator=generator)
    found = [(posterior.kl().cpu(), posterior.sample(generator).cpu()) for posterior in posteriors(vae, train[order])]
    rate, codes = (torch.cat(of) for of in zip(*found, strict=True))
    codes = codes[:count]
    prior = torch.randn(codes.shape, generator=generator)
    rebuilt = vae(held_out.to(vae.device)).sample.cpu()
    return {
        "rate": mean(rate, same_images=True),
        "codes_told_apart": two_sample_accuracy(prior.flatten(1), codes.flatten(1), seed),
        "distance_of_codes": frechet_distance(decode(vae, codes).flatten(1), to_unit(held_out).flatten(1), seed),
        "reconstruction_error": mean((rebuilt - held_out).square().flatten(1).mean(1), same_images=True).root() * 0.5,
    }
