"""What the page shows of each kind of pipeline, measured and drawn."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from markupsafe import Markup

from . import figures
from .estimates import Estimate
from .likelihood import Bound
from .mechanisms import Mismatch, StageShares
from .sampling import Step, decode, to_unit, unscaled

COLUMNS = 11  # of a strip
FRAMES = 51  # of a slider


@dataclass
class Picture:
    """A picture, its title, and what to see in it."""

    title: str
    caption: str
    html: Markup
    wide: bool = False


def visible(x: torch.Tensor) -> torch.Tensor:
    """Any (B, C, H, W) as images in [0, 1]: of what leaves [-1, 1], the bulk is scaled into it."""
    return to_unit(x / max(1.0, torch.quantile(x.abs(), 0.98).item()))


def spread(count: int, columns: int = COLUMNS) -> list[int]:
    """Indices spread evenly over 0 .. count - 1, both ends among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(columns, count))})


def forward_process(scheduler: Any, images: torch.Tensor, seed: int = 0) -> list[Picture]:
    """The forward process of a diffusion as a strip and a chart. `images`: (B, C, H, W) in [-1, 1]."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    alpha_bar, snr = scheduler.alphas_cumprod, scheduler.snr(torch.arange(len(scheduler)))
    columns = [("x<sub>0</sub>", to_unit(images))]
    for t in spread(len(alpha_bar), COLUMNS):
        x_t = scheduler.add_noise(images, noise, torch.full((len(images),), t))
        label = f"t = {t}<br>α̅ {decimal(alpha_bar[t])}<br>SNR {decimal(snr[t])}"
        columns.append((label, visible(x_t)))
    frames = [("x_0", to_unit(images))]
    for t in spread(len(alpha_bar), FRAMES):
        frames.append((f"t = {t}", visible(scheduler.add_noise(images, noise, torch.full((len(images),), t)))))
    figure, axes = figures.chart("alpha bar and signal-to-noise ratio over the timesteps")
    axes.plot(alpha_bar, color=figures.ACCENT)
    axes.plot(1 - alpha_bar, color=figures.QUIET)
    axes.text(0.02, 0.86, r"$\bar\alpha_t$: image", color=figures.ACCENT, transform=axes.transAxes)
    axes.text(0.42, 0.93, r"$1-\bar\alpha_t$: noise", color=figures.QUIET, transform=axes.transAxes)
    axes.set(xlabel="timestep t", ylabel="share of the variance", ylim=(0, 1.02))
    figure_snr, axes = figures.chart("signal-to-noise ratio over the timesteps")
    axes.semilogy(snr.clamp(min=1e-12), color=figures.ACCENT)
    axes.axhline(1, color=figures.QUIET, linestyle="--", linewidth=1)
    axes.set(xlabel="timestep t", ylabel=r"SNR = $\bar\alpha_t / (1-\bar\alpha_t)$")
    return [
        Picture(
            "A digit on its way to noise",
            "x_t = √α̅_t x₀ + √(1−α̅_t) ε. The image fades while the noise comes up.",
            figures.strip(columns, "forward process"),
            wide=True,
        ),
        Picture(
            "Timestep by timestep",
            "Move the slider, or use the arrow keys.",
            figures.slider(frames, "timestep of the forward process"),
        ),
        Picture("Image and noise", "How much of the variance of x_t is image, and how much is noise.", figures.svg(figure)),
        Picture(
            "Signal to noise",
            "The task of the network runs from trivial, on the left, to impossible, on the right.",
            figures.svg(figure_snr),
        ),
    ]


def decimal(value: float) -> str:
    """Two digits that matter, without an exponent where that is short."""
    return f"{value:.2g}" if value < 1e-3 else f"{float(f'{value:.2g}'):,g}"


def reverse_process(start: torch.Tensor, steps: list[Step], noun: str, vae: Any = None) -> list[Picture]:
    """From the noise that a call started with, by what was handed on after each of its steps, to samples: a slider, and a strip.

    Args:
        start: the noise, shape (B, C, H, W).
        steps: the record of the call.
        noun: what a step is called, "stage" or "timestep".
        vae: decodes latents for the eye.
    """

    def drawn(x: torch.Tensor, last: bool = False) -> torch.Tensor:
        if vae is not None:
            return decode(vae, unscaled(vae, x))
        return to_unit(x) if last else visible(x)

    frames = [("noise" if vae is None else "noise, decoded", drawn(start))]
    frames += [(f"{noun} {step.timestep}", drawn(step.sample, i == len(steps) - 1)) for i, step in enumerate(steps)]
    chosen = [0, *(1 + i for i in spread(len(steps)))]
    columns = [(frames[i][0] if i <= 1 else frames[i][0].removeprefix(f"{noun} "), frames[i][1]) for i in chosen]
    shown = "decoded" if vae is not None else "as it is handed on"
    caption = f"From noise to samples in {len(steps)} steps: the image after the {noun} named below it, {shown}."
    return [
        Picture(
            f"{noun.capitalize()} by {noun}",
            "Move the slider, or use the arrow keys.",
            figures.slider(frames, f"{noun} of the reverse process"),
        ),
        Picture("From noise to samples", caption, figures.strip(columns, "reverse process"), wide=True),
    ]


def stage_chart(shares: StageShares, fresh_noise: bool) -> Picture:
    """What each stage changes, and the diversity that it leaves."""
    figure, axes = figures.chart("share of the change and diversity left after each stage", height=2.8)
    names = [str(level) for level in shares.levels]
    change, diversity = ([estimate.value for estimate in each] for each in (shares.change, shares.diversity))
    figures.named_bars(axes.bar(names, change, color="#cfcabd", width=0.7, label="share of the change"))
    axes.plot(names, diversity, color=figures.ACCENT, marker="o", markersize=4, label="diversity left (data = 1)")
    axes.set_yscale("symlog", linthresh=0.01)
    ticks = [0, 0.01, 0.1, 1, 10]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(0, max(2.0, 1.5 * max(diversity)))
    axes.set(xlabel="stage, in the order of sampling")
    axes.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1, 1.02))
    labels = [
        f"stage {name}: {of_change:.1%} of all the change; diversity {left:.3g} after it"
        for name, of_change, left in zip(names, change, diversity, strict=True)
    ]
    after = "what is handed on, not clipped, fresh noise included" if fresh_noise else "what is handed on, not clipped"
    caption = (
        f"The first stage makes {change[0]:.1%} of all the change, and leaves a diversity of {diversity[0]:.2f}; the last leaves "
        f"{diversity[-1]:.2f} ({after})."
    )
    return Picture("What each stage does", caption, figures.readout(figure, labels, "stage"))


def mismatch_chart(mismatch: Mismatch, own: Estimate) -> Picture:
    """What the stages are fed, and the distance where the chain starts from real images instead; `own` is that of the samples."""
    figure, axes = figures.chart("Fréchet distance by the stage at which noised digits are put in", height=2.8)
    names = [str(level) for level in mismatch.levels]
    distances = [estimate.value for estimate in mismatch.distance_on_digits]
    fed = [0.0 if estimate is None else estimate.value for estimate in mismatch.variance_fed]
    figures.named_bars(axes.bar(names, fed, color="#cfcabd", width=0.7, label="variance of the guess it is fed (data = 1)"))
    axes.plot(names, distances, color=figures.ACCENT, marker="o", markersize=4, label="distance, started here on digits")
    axes.set(xlabel="stage, in the order of sampling", ylim=(0, 1.35 * max(*distances, *fed)))
    axes.legend(fontsize=8, loc="upper left")
    labels = [
        f"stage {name}: {'no guess' if guess is None else f'guesses of {guess.value:.0%} of the variance'}; started here on noised "
        f"digits, the stack reaches {distance:.3f}"
        for name, guess, distance in zip(names, mismatch.variance_fed, distances, strict=True)
    ]
    caption = (
        f"Started at stage {names[-1]} on noised digits, as it was trained, the stack reaches a distance of {distances[-1]:.2f}; fed "
        f"what the stages before it hand on, {own.value:.2f}. Those guesses have {fed[-1]:.0%} of the variance of digits."
    )
    return Picture("What each stage is fed", caption, figures.readout(figure, labels, "stage"))


def bound_pictures(bound: Bound) -> list[Picture]:
    """Where in time the bound of a diffusion of images comes from, how well x_0 is known there, and what a receiver gets of it."""
    found = bound.by_timestep()
    t, terms, errors = found["timesteps"], found["bits_per_dim_by_timestep"], found["denoising_loss_by_timestep"]
    rate, distortion = found["rate_by_timestep"], [value / 2 for value in found["distortion_by_timestep"]]
    figure, axes = figures.chart(
        f"the terms of the bound by timestep, from {terms[0]:.3f} to {terms[-1]:.3f} bits per dimension"
    )
    figures.named_bars(axes.bar(range(len(terms)), terms, width=1.0, color=figures.ACCENT))
    shown = spread(len(terms), 6)
    axes.set_xticks(shown, [str(t[i]) for i in shown])
    axes.set(xlabel="timestep, the noisiest first", ylabel="bits/dim")
    labels = [
        f"t = {t[i]}: {terms[i]:.4f} bits/dim; mean square error of x₀ {errors[i]:.4f}; received so far {rate[i]:.2f} bits/dim"
        for i in range(len(t))
    ]
    near, total = sum(terms[-len(terms) // 5 :]), sum(terms)
    by_timestep = Picture(
        "The bound, step by step",
        f"{bound.bits_per_dim().value:.2f} bits/dim in all, of which the {len(terms) // 5} steps next to the image take "
        f"{near / total:.0%}. (The grid is spaced `trailing`, from the last timestep; that of the samples `leading`, to the first.)",
        figures.readout(figure, labels, "timestep"),
    )
    figure, axes = figures.chart(
        f"mean square error of the predicted x_0 by timestep, from {errors[0]:.3f} to {errors[-1]:.3f}"
    )
    axes.semilogy(errors, color=figures.ACCENT, linewidth=1.6)
    axes.set_xticks(shown, [str(t[i]) for i in shown])
    axes.set(xlabel="timestep, the noisiest first", ylabel="error of x₀, squared")
    denoising = Picture(
        "The denoising loss, step by step",
        "How much of the image is still unknown to the network at each timestep.",
        figures.svg(figure),
    )
    figure, axes = figures.chart(
        f"error of the received image, from {distortion[0]:.3f} to {distortion[-1]:.3f}, by bits received"
    )
    axes.plot(rate, distortion, color=figures.ACCENT, linewidth=1.6)
    axes.set(xlabel="bits/dim received", ylabel="error (grey range 1)", ylim=(0, None))
    halved = [rate[i] for i in range(len(rate)) if distortion[i] <= distortion[0] / 2]
    half = f" Half of its error is gone after {halved[0]:.2f} bits/dim." if halved else ""
    progressive = Picture(
        "An image sent through it",
        f"A receiver of x_T, x_T-1, ... guesses the image at every step.{half}",
        figures.svg(figure),
    )
    return [by_timestep, denoising, progressive]


def trade_off(weights: list[float], found: list[dict[str, Estimate]]) -> Picture:
    """Autoencoders of growing weight of the KL term: what codes of N(0, I) and of images decode to, and what they keep."""
    figure, axes = figures.chart("Fréchet distance of autoencoders by the weight of their KL term", height=2.8)
    for name, label, colour in (
        ("frechet_distance", "codes from N(0, I)", figures.ACCENT),
        ("distance_of_codes", "digits' own codes", figures.QUIET),
    ):
        axes.plot(weights, [each[name].value for each in found], color=colour, marker="o", markersize=4, label=label)
    axes.set_xscale("log")
    axes.set_xticks(weights, [f"{weight:g}" for weight in weights])
    axes.minorticks_off()
    axes.set(xlabel="weight of the KL term", ylabel="Fréchet distance", ylim=(0, None))
    axes.legend(fontsize=8)
    told = ", ".join(f"{each['codes_told_apart'].value:.0%}" for each in found)
    errors = ", ".join(f"{each['reconstruction_error'].value:.3f}" for each in found)
    weight_names = ", ".join(f"{weight:g}" for weight in weights)
    caption = (
        f"With weights of {weight_names}, {told} of codes and draws of N(0, I) are told apart (alike: 50%), and the error "
        f"of reconstructions is {errors}. All are trained for less long than the rung itself."
    )
    return Picture("The weight of the KL term", caption, figures.svg(figure))


def latent_walk(vae: Any, ends: torch.Tensor, columns: int = COLUMNS) -> Picture:
    """From one image's code to another's along a great arc, decoded. `ends`: (2 N, C, H, W) in [-1, 1], in pairs."""
    codes = vae.encode(ends.to(vae.device, vae.dtype)).latent_dist.mode().float().cpu()
    first, last = codes[0::2], codes[1::2]
    walk = [(f"{share:.0%}", decode(vae, slerp(first, last, share))) for share in np.linspace(0, 1, columns)]
    caption = (
        "From the code of one digit to that of another: every point on the way decodes to something like a digit, or to a hole."
    )
    drawn = figures.strip([("from", to_unit(ends[0::2])), *walk, ("to", to_unit(ends[1::2]))], "walk in latent space")
    return Picture("A walk in latent space", caption, drawn, wide=True)


def slerp(first: torch.Tensor, last: torch.Tensor, share: float) -> torch.Tensor:
    """Spherical interpolation, sample by sample: the points between stay where N(0, I) has its mass (Shoemake 1985)."""
    a, b = first.flatten(1), last.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(a, b).clamp(-1 + 1e-6, 1 - 1e-6)
    angle = cosine.arccos()[:, None]
    mixed = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
    return mixed.reshape(first.shape)


@torch.no_grad()
def reconstructions(vae: Any, images: torch.Tensor, error: Estimate) -> Picture:
    """Held-out images above what their codes decode to; `error` is that of all. `images`: (N, C, H, W) in [-1, 1]."""
    rebuilt = vae(images.to(vae.device, vae.dtype)).sample
    pairs = torch.cat([to_unit(images), to_unit(rebuilt)])
    caption = (
        f"Held-out digits above, what their codes decode to below: the root-mean-square error over all is {error.value:.3f} of the "
        "grey range."
    )
    return Picture("Reconstructions", caption, figures.grid(pairs, len(images), "reconstructions"))


def nearest(samples: torch.Tensor, train: torch.Tensor, held_out: torch.Tensor, shown: int = 8) -> Picture:
    """Samples above the training images nearest to them. All (N, C, H, W) in [0, 1]."""

    def distances(images: torch.Tensor) -> torch.Tensor:
        return torch.cdist(images.flatten(1), train.flatten(1))

    closest = distances(samples[:shown]).argmin(1)
    of_samples, of_held_out = (distances(images).amin(1).median().item() for images in (samples, held_out))
    caption = (
        f"Samples above, the training digit nearest to each below. The median distance is {of_samples:.2f}; held-out digits, which "
        f"no model has seen, are {of_held_out:.2f} away. Copies would be at 0."
    )
    pairs = torch.cat([samples[:shown], train[closest]])
    return Picture("New digits, or copies?", caption, figures.grid(pairs, shown, "samples and their nearest training digits"))


def same_decoder(prior: torch.Tensor, diffused: torch.Tensor) -> list[Picture]:
    """Samples of the VAE's prior and of the diffusion, both (N, C, H, W) in [0, 1]."""
    columns = math.isqrt(len(prior) * 2)
    return [
        Picture(title, caption, figures.grid(images, columns, title))
        for title, caption, images in (
            ("Codes from N(0, I), decoded", "The VAE's own prior.", prior),
            ("Codes from the diffusion, decoded", "The same decoder.", diffused),
        )
    ]
