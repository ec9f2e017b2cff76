"""The page: one self-contained HTML file from what was measured and drawn."""

from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .claims import Verdict
from .metrics import Estimate
from .pictures import Picture

FIGURES = {
    "frechet_distance": ("Fréchet distance", "pixels; smaller is better"),
    "kernel_distance": ("Kernel distance", "0 where the distributions are equal"),
    "precision": ("Precision", "samples that look like data"),
    "recall": ("Recall", "data that the samples cover"),
    "diversity": ("Diversity", "pixel std, data = 1"),
}


@dataclass
class Section:
    """What the page says of one rung.

    Args:
        name, title, change: as in the table of rungs.
        verdict: its claim, held against the measurements.
        metrics: of its samples.
        facts: short labelled facts, such as the number of parameters.
        samples, real, loss: pictures of its samples, of held-out data and of its training loss.
        pictures: more of them.
    """

    name: str
    title: str
    change: str
    verdict: Verdict
    metrics: dict[str, Estimate]
    facts: dict[str, str]
    samples: Markup
    real: Markup
    loss: Markup
    pictures: list[Picture] = field(default_factory=list)


def number(value: float) -> str:
    """Three digits that matter, or fewer: 4.63, 0.117, 0.004."""
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}"


def write_page(
    path: Path,
    sections: list[Section],
    floor: dict[str, Estimate],
    real: Markup,
    overview: Markup,
    forward: list[Picture],
    facts: dict[str, str],
) -> None:
    """Render the page and write it in one piece."""
    environment = Environment(
        loader=PackageLoader(__package__, ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["number"] = number
    page = environment.get_template("report.html").render(
        sections=sections, floor=floor, real=real, overview=overview, forward=forward, facts=facts, figures=FIGURES
    )
    aside = path.with_suffix(".tmp")
    aside.write_text(page, encoding="utf-8")
    aside.replace(path)
