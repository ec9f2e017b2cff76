"""The page: one self-contained HTML file from what was measured and drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .claims import Verdict
from .diagnoses import Diagnosis
from .estimates import Estimate
from .pictures import Picture

FIGURES = {
    "frechet_distance": "Fréchet distance",
    "kernel_distance": "Kernel distance",
    "precision": "Precision",
    "recall": "Recall",
    "density": "Density",
    "coverage": "Coverage",
    "diversity": "Diversity",
    "sharpness": "Sharpness",
    "train_on_synthetic": "Teaches a classifier",
    "two_sample_accuracy": "Told from data",
    "memorised": "Memorised",
    "bits_per_dim": "Bits/dim, at most",
}


@dataclass
class Section:
    """What the page says of one rung.

    Args:
        name, title, change: as in the table of rungs.
        verdicts: its claims, held against the measurements.
        metrics: of its samples.
        diagnoses: what is wrong.
        facts: short labelled facts, such as the number of parameters.
        row, samples, real, loss: pictures of a few samples in a row, of more, of held-out data, and of the training loss.
        pictures: more of them.
    """

    name: str
    title: str
    change: str
    verdicts: list[Verdict]
    metrics: dict[str, Estimate]
    diagnoses: list[Diagnosis]
    facts: dict[str, str]
    row: Markup
    samples: Markup
    real: Markup
    loss: Markup
    pictures: list[Picture] = field(default_factory=list)


def number(value: float) -> str:
    """Three digits that matter where there are so many: 1,503, 4.63, 0.117, 0.0012, 0."""
    places = next((places for least, places in ((100, 0), (1, 2), (0.01, 3)) if abs(value) >= least), 4)
    text = f"{value:,.{places}f}"
    return text if any(digit in text for digit in "123456789") else "0"


def render(
    sections: Sequence[Section],
    floor: dict[str, Estimate],
    real: Markup,
    overview: Markup,
    forward: Sequence[Picture],
    facts: dict[str, str],
    several: bool = False,
) -> str:
    """The page as HTML.

    Args:
        sections: of the rungs, in their order.
        floor: the figures of real data.
        real: a picture of held-out data in a row.
        overview: a chart of all rungs.
        forward: pictures of the forward process of diffusion.
        facts: short labelled facts of the run; `folder` is where its pipelines lie.
        several: whether figures are of several seeds.
    """
    loader = PackageLoader(__package__, "")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["number"] = number
    environment.filters["sentence"] = lambda text: text[:1].upper() + text[1:]
    template = environment.get_template("report.html")
    return template.render(
        sections=sections,
        floor=floor,
        real=real,
        overview=overview,
        forward=forward,
        facts=facts,
        figures=FIGURES,
        several=several,
    )
