"""Whether and how a repository loads with `DiffusionPipeline.from_pretrained`, told from its files: none of its code is run.

It is looked at twice: with all of its files, as the loader finds them in a folder, and with those alone that the loader downloads from
the Hub.
"""

import json
import textwrap
from dataclasses import dataclass, field, replace

from diffusers.utils import logging as diffusers_logging

from .checks import CHECKS, HUB, SAVE, WEIGHTS, Case, Finding, distribution
from .repository import (
    INDEX,
    Repository,
    Unreadable,
    downloaded,
    open_repository,
)  # fmt: skip

PARTS = {  # what a repository without an index may be, by a file at its root, and the line that loads it
    "modular_model_index.json": "diffusers.ModularPipeline.from_pretrained({name})",
    "scheduler_config.json": "diffusers.{cls}.from_pretrained({name})",
    "pytorch_lora_weights.safetensors": "pipe.load_lora_weights({name})",
    "config.json": "diffusers.AutoModel.from_pretrained({name})",
}


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` found. `commit`: the sha on the Hub, None for a folder; `needs`: what a load must have ("import X",
    "trust_remote_code=True", 'variant="fp16"'); `snippet`: the lines that load it, "" where none do."""

    repository: str
    commit: str | None
    findings: list[Finding]
    needs: list[str] = field(default_factory=list)
    snippet: str = ""

    @property
    def ok(self) -> bool:
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def loads(self) -> str:
        """How: "with diffusers alone", or with what it needs ("with import X and trust_remote_code=True"); "only as a local folder,
        with ..."; "not in this environment"; "not at all"."""
        wrong = {finding.scope for finding in self.findings if finding.severity == "error"}
        if "everywhere" in wrong:
            return "not at all"
        if "here" in wrong:
            return "not in this environment"
        return ("only as a local folder, " if wrong else "") + "with " + (" and ".join(self.needs) or "diffusers alone")

    def __str__(self) -> str:
        name = f"{self.repository} at {self.commit}" if self.commit else self.repository
        order = ["error", "warning", "note"]
        found = sorted(self.findings, key=lambda finding: order.index(finding.severity))
        parts = [f"{name}\nloads: {self.loads}", "\n".join(map(str, found))]
        parts += [f"To load it:\n\n{textwrap.indent(self.snippet, '    ')}"] if self.snippet else []
        text = "\n\n".join(part for part in parts if part)
        # Names come from strangers: nothing in them may steer a terminal.
        return "".join(sign if sign.isprintable() or sign == "\n" else "?" for sign in text)


def examine(repository: str, revision: str | None = None, token: str | bool | None = None) -> Diagnosis:
    """Tell whether and how a repository loads.

    Args:
        repository: a folder, or the name of a model repository on the Hub, of which the list of files and the small files are read.
        revision: branch, tag or commit on the Hub.
        token: as in huggingface_hub; None is the one that it finds itself.

    Raises:
        UsageError: there is no such repository, or it cannot be read.
    """
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # the loader's functions that are asked here speak of a load that is none
    try:
        return diagnose(open_repository(str(repository), revision, token))
    finally:
        diffusers_logging.set_verbosity(verbosity)


def diagnose(repository: Repository) -> Diagnosis:
    if INDEX not in repository.sizes:
        finding, snippet = without_index(repository)
        return Diagnosis(repository.name, repository.commit, [finding], snippet=snippet)
    try:
        case = Case(repository, repository.json(INDEX), set(repository.sizes))
    except Unreadable as error:
        return Diagnosis(repository.name, repository.commit, [Finding("error", f"{error}, so nothing can be loaded", SAVE)])
    found = check(case)
    files = downloaded(repository, case.index, case.pipeline, case.variant or None)
    more = [] if files is None else check(Case(repository, case.index, files, case.variant or ""))
    found += [replace(finding, scope=HUB) for finding in more if finding not in found]
    needs = [f"import {module}" for module in case.imports]
    needs += ["trust_remote_code=True"] * bool(case.shipped) + [f'variant="{case.variant}"'] * bool(case.variant)
    diagnosis = Diagnosis(repository.name, repository.commit, found, needs)
    return diagnosis if diagnosis.loads.startswith("not") else replace(diagnosis, snippet=snippet_of(case, needs))


def check(case: Case) -> list[Finding]:
    return [finding for one in CHECKS for finding in one(case)]


def snippet_of(case: Case, needs: list[str]) -> str:
    pin = [f'revision="{case.repository.commit}"'] if case.shipped and not case.repository.is_folder else []
    arguments = [json.dumps(case.repository.name), *pin, *(need for need in needs if not need.startswith("import "))]
    lines = [f"import {module}  # pip install {distribution(module)}" for module in case.imports]
    lines += [
        "from diffusers import DiffusionPipeline",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({', '.join(arguments)})",
    ]
    return "\n".join(lines)


def without_index(repository: Repository) -> tuple[Finding, str]:
    """`DiffusionPipeline` reads model_index.json at the root, and nothing else; parts alone have classes of their own."""
    files = repository.sizes
    if deeper := next((file for file in sorted(files) if file.endswith(f"/{INDEX}")), None):
        inner = deeper.removesuffix(f"/{INDEX}")
        mend = f"move what is in {inner}/ to the root" + (
            f"; as it is, load the folder {inner}" if repository.is_folder else ""
        )
        return Finding("error", f"is not at the root, where the loader looks, but at {deeper}", mend), ""
    if part := next((file for file in PARTS if file in files), None):
        try:
            cls = repository.json(part).get("_class_name") if part.endswith(".json") else None
        except Unreadable:
            cls = None
        cls = cls if isinstance(cls, str) and cls.isidentifier() else None
        line = PARTS[part] if cls or part != "config.json" else PARTS[part].replace("diffusers", "transformers")
        what = f"is not there; {part} at the root says that this is no pipeline, but something else ({cls or 'see below'})"
        return Finding("error", what, "load it by itself, as below"), line.format(name=json.dumps(repository.name), cls=cls)
    if any("/" not in file and file.endswith(WEIGHTS) for file in files):
        mend = "a whole checkpoint in one file may load with from_single_file of the pipeline's class"
        return Finding("error", "is not there: these are weights without a configuration", mend), ""
    return Finding("error", "is not there, nor anything else of diffusers", "save a pipeline there with save_pretrained"), ""
