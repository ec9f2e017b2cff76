"""The model card: what a repository claims, how to load it, and the evidence, for people and (in its metadata) for `verify`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image

from ..errors import UsageError, first_line

CARD_NAME = "README.md"
PICTURE_NAME = "samples.png"
TEMPLATE = Path(__file__).with_name("card_template.md")
TASK = "unconditional-image-generation"
SHOWN = 32  # samples of the picture
ARGUMENTS = ("held_out", "num_samples", "num_inference_steps", "seed")  # of a measurement, as a card keeps them
TILE = 48  # pixels of a sample's side in the picture, about

HOW = {
    "plugin": "Its classes come with a package: `pip install diffusers-edu`, and import it. No code of this repository is run.",
    "self-contained": "diffusers alone loads it, with the code that lies beside the weights. `trust_remote_code=True` runs that "
    "code: read it first, and pin the revision. To load it without a connection, give it the folder that "
    "`huggingface_hub.snapshot_download` has made: for the name, diffusers asks the Hub even with `local_files_only=True`.",
    "portable": "diffusers alone loads it: all classes are its own.",
}


@dataclass(frozen=True)
class Claim:
    """A figure that a card states: its value, a 95 % interval over `n` images, and the same figure of real images, the floor."""

    name: str
    value: float
    interval: tuple[float, float]
    n: int
    floor: float


@dataclass(frozen=True)
class Evidence:
    """What was measured, and how it can be measured again.

    Args:
        claims: the figures.
        dataset: the name of the data.
        held_out: the number of its held-out images.
        num_samples: drawn; the floor is of as many real images, or of all that were trained on.
        num_inference_steps: of the sampling; None where it has no meaning.
        seed: of the samples.
        features: the name of what the figures are computed on.
    """

    claims: list[Claim]
    dataset: str
    held_out: int
    num_samples: int
    num_inference_steps: int | None
    seed: int
    features: str = "pixels"  # as cards had it that do not say


@dataclass(frozen=True)
class Subject:
    """What a card is about.

    Args:
        title: a heading.
        change: a sentence on what the model is, or "".
        form: one of `export.FORMS`.
        repository: the name that it will be loaded by.
        revision: a name for this content, which publishing makes a tag.
        pipeline: the class that loads it.
        call: how images are drawn with `pipe`, or "".
        license: the identifier of a licence.
        tags: of the Hub.
        datasets: names of the data trained on.
        command: the one that made it, or "".
        config_name: the file of the configuration.
        limits: what it is not good for, a sentence each.
    """

    title: str
    change: str
    form: str
    repository: str
    revision: str
    pipeline: str
    call: str = "pipe(batch_size=16)"
    license: str = "apache-2.0"
    tags: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    command: str = ""
    config_name: str = ""
    limits: list[str] = field(default_factory=list)


def make_card(subject: Subject, evidence: Evidence, shown: int) -> ModelCard:
    """The card; its metadata hold the figures, with how they were measured, in the Hub's `model-index`."""
    arguments = {name: getattr(evidence, name) for name in ARGUMENTS}
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=evidence.dataset,
            dataset_name=evidence.dataset,
            dataset_split="held out",
            metric_type=claim.name,
            metric_name=claim.name.replace("_", " "),
            metric_value=rounded(claim.value),
            metric_args={
                "n": claim.n,
                "interval": [rounded(bound) for bound in claim.interval],
                "floor": rounded(claim.floor),
                "features": evidence.features,
                **arguments,
            },
        )
        for claim in evidence.claims
    ]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=TASK,
        license=subject.license,
        tags=["diffusers", "diffusers-edu", *subject.tags],
        datasets=subject.datasets or None,
        model_name=subject.repository.split("/")[-1] if results else None,
        eval_results=results or None,
        form=subject.form,
    )
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        title=subject.title,
        change=subject.change,
        picture=PICTURE_NAME,
        shown=shown,
        seed=evidence.seed,
        num_samples=evidence.num_samples,
        steps=evidence.num_inference_steps,
        form=subject.form,
        how=HOW[subject.form],
        snippet=snippet(subject),
        repository=subject.repository,
        revision=subject.revision,
        figures=evidence.claims,
        held_out=evidence.held_out,
        dataset=evidence.dataset,
        features=evidence.features,
        command=subject.command,
        config_name=subject.config_name,
        limits=subject.limits,
    )


def rounded(value: float) -> float:
    return float(f"{value:.6g}")


def snippet(subject: Subject) -> str:
    """The lines that load it."""
    trust = ", trust_remote_code=True" if subject.form == "self-contained" else ""
    lines = ["import diffusers_edu  # makes its classes known to diffusers"] if subject.form == "plugin" else []
    lines += [
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("{subject.repository}", revision="{subject.revision}"{trust})',
    ]
    if subject.call:
        lines.append(f"images = {subject.call}.images")
    if subject.pipeline == "LDMPipeline":
        lines.append("# LDMPipeline hands no generator on to its scheduler: seed it with torch.manual_seed")
    return "\n".join(lines)


def picture(images: Sequence[Image.Image], columns: int = 8) -> Image.Image:
    """Samples side by side, enlarged by whole factors where they are small."""
    width, height = images[0].size
    scale = max(1, TILE // width)
    gap = 2
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (width * scale + gap) - gap, rows * (height * scale + gap) - gap), "white")
    for i, image in enumerate(images):
        tile = image.convert("RGB").resize((width * scale, height * scale), Image.Resampling.NEAREST)
        page.paste(tile, (i % columns * (width * scale + gap), i // columns * (height * scale + gap)))
    return page


def read_card(path: Path) -> tuple[str | None, Evidence | None]:
    """What a card says of itself: its form, and its figures; None for what it does not say.

    Raises:
        UsageError: its metadata cannot be read.
    """
    try:
        data = ModelCard.load(path).data
        results = data.eval_results or []
        claims = [claim_of(result) for result in results]
        evidence = None
        if results:
            stated = results[0].metric_args
            # Metadata drop what has no value: a model without steps.
            steps = stated.get("num_inference_steps")
            arguments: dict[str, Any] = {name: int(stated[name]) for name in ARGUMENTS if name != "num_inference_steps"}
            arguments["num_inference_steps"] = None if steps is None else int(steps)
            evidence = Evidence(claims, results[0].dataset_name, **arguments, features=str(stated.get("features", "pixels")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path.name}: its metadata cannot be read ({first_line(error)})") from error
    return getattr(data, "form", None), evidence


def claim_of(result: Any) -> Claim:
    """One figure of a card's metadata.

    Raises:
        KeyError, TypeError, ValueError: it lacks a number, its interval or its count.
    """
    arguments = result.metric_args
    low, high = arguments["interval"]
    return Claim(
        result.metric_type,
        float(result.metric_value),
        (float(low), float(high)),
        int(arguments["n"]),
        float(arguments["floor"]),
    )
