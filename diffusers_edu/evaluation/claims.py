"""The claims of the ladder's story, each held against what was measured."""

from dataclasses import dataclass

import torch

from .metrics import Estimate
from .pictures import StageShares

COLLAPSED = 0.1  # of the data's diversity, and less, is a collapse
NEAR = 0.05  # of the grey range, root mean square, and less, is the same image to the eye


@dataclass(frozen=True)
class Verdict:
    """A claim, whether the measurements support it, the measurements in a sentence, and why, where they do."""

    claim: str
    supported: bool
    measured: str
    why: str


def sharpness(images: torch.Tensor, reference: torch.Tensor) -> float:
    """The mean absolute difference of neighbouring pixels, over that of the reference: 1 as sharp as data, less is blur.

    Both (N, C, H, W). A collapsed model's figure says how sharp its one image is.
    """

    def contrast(x: torch.Tensor) -> float:
        return (x.diff(dim=-1).abs().mean() + x.diff(dim=-2).abs().mean()).item()

    return contrast(images) / contrast(reference)


def judge_dae(metrics: dict[str, Estimate], distance_to_mean: float) -> Verdict:
    diversity = metrics["diversity"].value
    return Verdict(
        "From pure noise, the best guess at the image is the mean of all images: every sample is the same.",
        diversity <= COLLAPSED and distance_to_mean <= NEAR,
        f"The samples have {diversity:.1%} of the data's diversity. Their average is {distance_to_mean:.3f} (root mean square, grey "
        "range 1) from the mean training digit.",
        "Squared error is least at the mean, and pure noise does not tell which digit it was.",
    )


def judge_stacked(metrics: dict[str, Estimate], shares: StageShares) -> Verdict:
    diversity, first, left = metrics["diversity"].value, shares.change[0], shares.diversity[0]
    return Verdict(
        "Without fresh noise the first stage takes all the randomness away, and the later ones have nothing left to do.",
        diversity <= COLLAPSED and left <= COLLAPSED and first >= 0.9,
        f"After the first stage {left:.1%} of the data's diversity is left, at the end {diversity:.1%}. The first stage makes "
        f"{first:.1%} of all the change, the other {len(shares.change) - 1} together {1 - first:.1%}.",
        "What it returns from pure noise is the mean image; the stages after it were trained on that, and hand it on.",
    )


def judge_noisy(metrics: dict[str, Estimate], before: dict[str, Estimate], sharp: float) -> Verdict:
    diversity, distance = metrics["diversity"].value, metrics["frechet_distance"].value
    diversity_before, distance_before = before["diversity"].value, before["frechet_distance"].value
    return Verdict(
        "Fresh noise at every stage restores diversity; the images are blurry.",
        diversity >= 0.5 and distance < distance_before and sharp < 1,
        f"Diversity is {diversity:.0%} of the data's (the rung before: {diversity_before:.1%}), the Fréchet distance {distance:.2f} "
        f"({distance_before:.2f}). Neighbouring pixels differ {sharp:.0%} as much as in real digits.",
        "Fresh noise lets each stage choose anew, but what it returns is still an average over the digits that its input allows.",
    )


def judge_vae(metrics: dict[str, Estimate], before: dict[str, Estimate], of_codes: float, sharp: float) -> Verdict:
    distance, distance_before = metrics["frechet_distance"].value, before["frechet_distance"].value
    return Verdict(
        "Codes drawn from N(0, I) decode to digits, in one step; they are blurred, and some fall into holes of the prior.",
        distance < distance_before and of_codes < distance and sharp < 1,
        f"Fréchet distance {distance:.2f}, against {distance_before:.2f} for the rung before. Codes of training digits, decoded, "
        f"reach {of_codes:.2f}. Sharpness is {sharp:.0%} of the data's.",
        "The decoder can do better than its prior lets it: the difference is the price of the holes, where no digit's code lies.",
    )


def judge_ddpm(metrics: dict[str, Estimate], earlier: list[dict[str, Estimate]], floor: float, sharp: float) -> Verdict:
    diversity, distance = metrics["diversity"].value, metrics["frechet_distance"].value
    best_before = min(m["frechet_distance"].value for m in earlier)
    return Verdict(
        "One network for all noise levels, and small Gaussian steps: sharp and diverse.",
        distance < best_before and diversity >= 0.9 and 0.9 <= sharp <= 1.1,
        f"Fréchet distance {distance:.3f}; the best rung before has {best_before:.3f}, real digits among themselves {floor:.3f}. "
        f"Diversity is {diversity:.0%}, sharpness {sharp:.0%} of the data's.",
        "A small step back is nearly Gaussian: its mean is all there is to learn, and its noise keeps the choice open.",
    )


def judge_latent(metrics: dict[str, Estimate], prior: dict[str, Estimate]) -> Verdict:
    distance, before = metrics["frechet_distance"].value, prior["frechet_distance"].value
    return Verdict(
        "Through the same decoder, learned codes are better than codes from N(0, I).",
        distance <= 0.5 * before,
        f"Fréchet distance {distance:.3f} against {before:.3f} for the VAE's own prior, {distance / before:.2f} of it.",
        "The decoder is the same, so the difference is the prior's: the diffusion has learned where the codes of digits lie.",
    )
