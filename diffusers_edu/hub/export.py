"""Write a pipeline as a folder that others can load, in one of three forms.

- `plugin`: components are named by the package that registers them with diffusers when it is imported; no code is shipped.
- `self-contained`: beside the weights lies the code, `pipeline.py` at the root and one file in the folder of each component that is not
  diffusers' own; diffusers alone loads it, with `trust_remote_code=True`.
- `portable`: rewritten to classes of diffusers (see [`portable`]); diffusers alone loads it, and no code is shipped.

`save_pretrained` cannot write the second form, and of a pipeline loaded from it writes an index that nobody can read: so the index is
written here, from the classes of the parts themselves.
"""

import ast
import inspect
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
from diffusers.pipelines import pipeline_loading_utils
from safetensors import SafetensorError

from ..errors import UsageError, first_line
from .portable import is_stock, to_stock

FORMS = ("plugin", "self-contained", "portable")
INDEX = "model_index.json"
DYNAMIC = "diffusers_modules"  # the package of the classes that were loaded from code in a repository


def export(
    pipeline: Any, output: Path, form: str, write_more: Callable[[Path, Any], None] = lambda folder, pipeline: None
) -> None:
    """Write a pipeline in one of the `FORMS` to a folder that is not there yet; it is whole, or not there.

    Args:
        pipeline: of any classes; it is not changed.
        output: the folder to make.
        form: see above.
        write_more: called with the folder, before it gets its name, and the pipeline as it is shipped; writes what else belongs there
            (the card, the configuration).

    Raises:
        UsageError: an unknown form, a folder that is in use or cannot be written, or a pipeline that has no such form; the message says
            which part of it.
    """
    if form not in FORMS:
        raise UsageError(f"--form {form}: choose from {', '.join(FORMS)}")
    check_free(output)
    if form == "portable":
        pipeline = to_stock(pipeline)
    entries, code = describe_parts(pipeline, form)  # what cannot be written is known before anything is
    aside = output.with_name(output.name + ".part")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        pipeline.save_pretrained(str(aside), safe_serialization=True)
        forget_origin(aside)
        index = read_index(aside)
        write_index(aside, {**index, **{name: entry for name, entry in entries.items() if name in index}})
        for name, source in code.items():
            (aside / name).write_text(source, encoding="utf-8")
        write_more(aside, pipeline)
        if output.exists():
            output.rmdir()  # an empty one
        aside.rename(output)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{output} cannot be written ({first_line(error)})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def export_scheduler(scheduler: Any, folder: Path, form: str) -> None:
    """Put a scheduler into the folder of a saved pipeline, in place of its own; the weights are not touched.

    Args:
        scheduler: that takes the place.
        folder: of any saved pipeline that has a component `scheduler`.
        form: `plugin` or `self-contained`.

    Raises:
        UsageError: the folder holds no pipeline with a scheduler, or the scheduler has no such form.
    """
    index = read_index(folder)
    if "scheduler" not in index:
        raise UsageError(f"{folder}: its pipeline has no scheduler")
    if form == "portable":
        raise UsageError("--form portable: a stock scheduler needs no export; give plugin or self-contained")
    entry, source = describe(scheduler, form)
    target = folder / "scheduler"
    for path in (target, folder / INDEX, *target.glob("*")):
        if path.is_symlink():  # as all files in the Hub's cache
            raise UsageError(f"{path} is a link; nothing is written through it")
    target.mkdir(exist_ok=True)
    for stale in target.glob("*.py"):
        stale.unlink()
    scheduler.save_pretrained(str(target))
    if source is not None:
        (target / f"{entry[0]}.py").write_text(source, encoding="utf-8")
    write_index(folder, {**index, "scheduler": entry})


def forget_origin(folder: Path) -> None:
    """Take out of the configurations where their parts were loaded from: a path of one machine, or a cache."""
    for path in folder.rglob("*config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_free(output: Path) -> None:
    """Raise a `UsageError` where the folder to write is in use."""
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise UsageError(f"{output} is there already; choose another folder or remove it")


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a saved pipeline.

    Raises:
        UsageError: the folder has none.
    """
    try:
        index = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{folder} holds no pipeline: {INDEX} cannot be read there") from error
    if not isinstance(index, dict):
        raise UsageError(f"{folder / INDEX} is not an object")
    return index


def write_index(folder: Path, index: dict[str, Any]) -> None:
    index = {name: entry for name, entry in index.items() if name not in ("_name_or_path", "_module")}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def describe_parts(pipeline: Any, form: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The entries of the index that a form needs, and the code files it ships, as {path: source}."""
    entries: dict[str, Any] = {}
    code: dict[str, str] = {}
    if not is_stock(type(pipeline)):
        (_, name), source = describe(pipeline, form)
        # The loader looks for a plugin's pipeline by its bare name in diffusers, where the plugin has put it.
        entries["_class_name"] = name if source is None else ["pipeline", name]
        if source is not None:
            code["pipeline.py"] = source
    for part, component in pipeline.components.items():
        if component is None or is_stock(type(component)):
            continue
        entries[part], source = describe(component, form)
        if source is not None:
            code[f"{part}/{entries[part][0]}.py"] = source
    check_namespace(code)
    return entries, code


def describe(part: Any, form: str) -> tuple[list[str], str | None]:
    """`[library or file stem, class]` of one part that is not diffusers' own, and the source to ship, if any."""
    kind = type(part)
    if form == "self-contained":
        path = source_file(kind)
        return [path.stem, kind.__name__], self_sufficient(path, kind)
    known = getattr(diffusers, kind.__name__, None)  # where a plugin registers
    library = "" if known is None else known.__module__.split(".")[0]
    if library not in pipeline_loading_utils.LOADABLE_CLASSES:
        raise UsageError(
            f"{kind.__name__} is not registered with diffusers by an installed package; give --form self-contained"
        )
    return [library, kind.__name__], None


def source_file(kind: type) -> Path:
    """The file that a class was defined in.

    Raises:
        UsageError: there is none, as for a class typed into a session.
    """
    try:
        path = inspect.getsourcefile(kind)
    except (TypeError, OSError):
        path = None
    if path is None or not Path(path).is_file() or kind.__module__ == "__main__":
        raise UsageError(f"{kind.__name__} is defined in no file that can be shipped; put it into a module of its own")
    return Path(path)


def self_sufficient(path: Path, kind: type) -> str:
    """The source of a file, which must work alone: a repository's helpers are not downloaded.

    Raises:
        UsageError: it imports its neighbours or a package that strangers lack, or has more than one pipeline.
    """
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    own = kind.__module__.split(".")[0]
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        for name in names:
            if name.startswith(".") or (name.split(".")[0] == own and own != DYNAMIC):
                raise UsageError(
                    f"{path.name} imports {name}, which is not shipped with it: {kind.__name__} must stand in one file"
                )
    pipelines = [
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef) and is_pipeline(getattr(module(kind), node.name, None))
    ]
    if is_pipeline(kind) and pipelines != [kind.__name__]:
        raise UsageError(f"{path.name} has the pipelines {', '.join(pipelines)}; the loader takes one to a file")
    return source


def module(kind: type) -> Any:
    return sys.modules[kind.__module__]


def is_pipeline(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)


def check_namespace(code: dict[str, str]) -> None:
    """Raise a `UsageError` for names that the loader would mix up: it puts all files of a repository into one folder, and takes a name
    that `diffusers.pipelines` has as that."""
    seen: dict[str, str] = {}
    for path, source in code.items():
        stem = Path(path).stem
        if seen.setdefault(stem, source) != source:
            raise UsageError(f"two different files are called {stem}.py; rename one")
        if hasattr(diffusers.pipelines, stem) or not stem.isidentifier():
            raise UsageError(f"{stem}.py: the loader would take it for diffusers' own {stem}; rename the file")
