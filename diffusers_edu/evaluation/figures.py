"""Pictures as HTML: grids and strips of images as PNG, charts as SVG, both inline."""

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from markupsafe import Markup
from PIL import Image

from .estimates import Estimate

matplotlib.use("svg")
import matplotlib.pyplot as plt

INK, ACCENT, QUIET = "#26241f", "#b4441c", "#9a958a"
TILE = 48  # pixels of a tile's side, about


def grid(images: torch.Tensor, columns: int, alt: str, gap: int = 1, scale: int | None = None) -> Markup:
    """Images (N, C, H, W) in [0, 1] as one picture of `columns` tiles a row, drawn as ink on paper where grey.

    `scale`: pixels of the picture for each of an image; by default as many as make a tile easy to see.
    """
    images = images.float().clamp(0, 1)
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    page = torch.ones(channels, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for i, image in enumerate(1 - images if channels == 1 else images):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        page[:, top : top + height, left : left + width] = image
    pixels = (page * 255).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1).numpy()
    scale = scale or max(1, TILE // width)
    enlarged = np.kron(pixels, np.ones((scale, scale, *[1] * (pixels.ndim - 2)), dtype=np.uint8))
    return png(Image.fromarray(enlarged), alt)


def png(image: Image.Image, alt: str) -> Markup:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Markup('<img src="data:image/png;base64,{}" alt="{}" width="{}" height="{}">').format(data, alt, *image.size)


def strip(columns: Sequence[tuple[str, torch.Tensor]], alt: str) -> Markup:
    """A row of columns, each a label and images (N, C, H, W) in [0, 1] one below the other."""
    cells = [
        Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(grid(images, 1, f"{alt}, {label}"), Markup(label))
        for label, images in columns
    ]
    return Markup('<div class="strip" tabindex="0" role="group" aria-label="{}">{}</div>').format(alt, Markup("").join(cells))


def slider(frames: Sequence[tuple[str, torch.Tensor]], alt: str) -> Markup:
    """Frames, each a label and images (N, C, H, W) in [0, 1] in a row, of which a slider shows one; without a script, all are shown."""
    pictures = [
        Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(
            grid(images, len(images), f"{alt}, {label}", scale=1), label
        )
        for label, images in frames
    ]
    control = Markup('<input type="range" min="0" max="{}" value="0" aria-label="{}">').format(len(frames) - 1, alt)
    return Markup('<div class="slider">{}{}</div>').format(control, Markup("").join(pictures))


def chart(alt: str, width: float = 4.4, height: float = 2.5):
    """A figure and its axes in the page's style, to draw on and hand to `svg`."""
    style: dict[str, Any] = {
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": QUIET,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "text.color": INK,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "diffusers_edu",
    }
    plt.rcParams.update(style)  # type: ignore[arg-type]  # its keys are literals there
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    figure.set_gid(alt)
    return figure, axes


def svg(figure) -> Markup:
    """The figure as inline SVG, named for those who cannot see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    drawing = buffer.getvalue()
    label = Markup('<svg role="img" aria-label="{}" ').format(figure.get_gid())
    return Markup('<div class="chart">{}</div>').format(Markup(drawing[drawing.index("<svg") :].replace("<svg ", label, 1)))


def named_bars(bars: Any) -> None:
    """Give each bar of a chart the name by which `readout` finds it."""
    for i, bar in enumerate(bars):
        bar.set_gid(f"bar-{i}")


def readout(figure, labels: Sequence[str], noun: str) -> Markup:
    """A chart with `named_bars` that tells what each bar stands for where a pointer, a finger or the slider below it is.

    Args:
        figure: of `chart`.
        labels: a sentence for each bar.
        noun: what a bar is of.
    """
    control = Markup('<input type="range" min="0" max="{}" value="0" aria-label="{} to read">').format(len(labels) - 1, noun)
    start = Markup('<div class="readout" data-labels="{}">').format(json.dumps(labels))
    drawing = Markup(str(svg(figure)).replace('id="bar-', 'data-bar="'))  # other charts of the page have such bars too
    return start + drawing + control + Markup('<output aria-live="polite">{}</output></div>').format(labels[0])


def loss_curve(losses: list[tuple[int, float]], name: str) -> Markup:
    """The training loss: every step in the background, its running median over a fiftieth of the run in front."""
    steps, values = np.array([s for s, _ in losses]), np.array([v for _, v in losses])
    window = max(1, len(values) // 50)
    smooth = [np.median(values[max(0, i - window) : i + 1]) for i in range(len(values))]
    figure, axes = chart(f"training loss of {name} over {len(values)} steps, from {smooth[0]:.3g} to {smooth[-1]:.3g}")
    axes.plot(steps, values, color=QUIET, linewidth=0.5, alpha=0.5)
    axes.plot(steps, smooth, color=ACCENT, linewidth=1.6)
    if values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.3g"))
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    else:
        # A first step far above the rest would press the curve flat.
        axes.set_ylim(values.min() - 0.05 * np.ptp(smooth), np.quantile(values, 0.99) + 0.1 * np.ptp(smooth))
    axes.set(xlabel="optimiser step", ylabel="loss")
    return svg(figure)


def distances(names: list[str], found: list[Estimate], floor: float) -> Markup:
    """The Fréchet distance of every rung, on a logarithmic scale, with the floor."""
    figure, axes = chart("Fréchet distance of each rung against the floor", width=4.6, height=3.0)
    positions = np.arange(len(names))[::-1]
    values = [estimate.value for estimate in found]
    below = [estimate.value - estimate.interval[0] for estimate in found]
    above = [estimate.interval[1] - estimate.value for estimate in found]
    axes.barh(positions, values, color=ACCENT, height=0.6, xerr=[below, above], error_kw={"ecolor": INK, "elinewidth": 1})
    axes.axvline(floor, color=INK, linestyle="--", linewidth=1)
    axes.text(floor, len(names) - 0.35, " floor: real digits", ha="left", va="bottom", fontsize=8)
    for position, estimate in zip(positions, found, strict=True):
        axes.text(estimate.interval[1] * 1.06, position, f"{estimate.value:.2f}", va="center", fontsize=8)
    axes.set_yticks(positions, names)
    axes.set_xscale("log")
    axes.set_xlim(floor / 1.5, max(values) * 1.8)
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.set_xlabel("Fréchet distance to held-out digits")
    return svg(figure)
