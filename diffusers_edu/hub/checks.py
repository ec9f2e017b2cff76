"""What can keep a repository from loading: a function for each thing that the loader does.

Each states the rule of the loader (diffusers 0.42: `pipelines/pipeline_loading_utils.py`, `pipelines/pipeline_utils.py`,
`utils/dynamic_modules_utils.py`) that it is about; `tests/test_doctor.py` holds what is said against what the loader does.
"""

import importlib
import importlib.util
import json
import re
import sys
import textwrap
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions
from typing import Any, Literal

import diffusers
import transformers
from diffusers import pipelines
from diffusers.pipelines import pipeline_loading_utils as loader
from diffusers.utils import deprecation_utils, hub_utils
from packaging.version import InvalidVersion, Version

from .repository import (
    INDEX,
    Code,
    Kind,
    Repository,
    Shipped,
    Unreadable,
    attribute,
    beside,
    configuration_of,
    helpers,
    is_a,
    is_installed,
    is_plugin,
    loadable,
    signature,
    stays_inside,
    weights_of,
)  # fmt: skip

STOCK = ("diffusers", "transformers", "onnxruntime.training")
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".flashpack", ".onnx", ".bin.index.json")
QUANTIZERS = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "quanto": "optimum", "gguf": "gguf"}
SAVE = "save the pipeline again with save_pretrained, and upload all of it"
AGAIN = "download or upload it again"
ONE_FILE = "put all into one file"
HERE: Literal["here"] = "here"
HUB: Literal["from the Hub"] = "from the Hub"


@dataclass(frozen=True)
class Finding:
    """One thing to know: what it is and why it matters, how to mend it, and the file. `scope`: whether it holds "everywhere", only
    "from the Hub", or only "here", with the packages that are installed."""

    severity: Literal["error", "warning", "note"]
    what: str
    mend: str
    where: str = INDEX
    scope: Literal["everywhere", "from the Hub", "here"] = "everywhere"

    def __str__(self) -> str:
        scope = "" if self.scope == "everywhere" else f" ({self.scope})"
        what = textwrap.fill(f"{self.severity}{scope}: {self.where}: {self.what}", 110, subsequent_indent="    ")
        return "\n".join([what, *textwrap.wrap(self.mend, 110, initial_indent="    -> ", subsequent_indent="       ")])


Findings = Iterator[Finding]


@dataclass
class Case:
    """A repository as the loader has it before it. The checks fill in, in their order, what later ones read."""

    repository: Repository
    index: dict[str, Any]
    files: set[str]
    variant: str | None = None  # None: to be found out; "": none
    pipeline: Kind = None
    entries: dict[str, list[str]] = field(default_factory=dict)  # of the components that are loaded: [library, class]
    parts: dict[str, Kind] = field(default_factory=dict)
    imports: dict[str, None] = field(default_factory=dict)

    @property
    def shipped(self) -> list[Shipped]:
        return [kind for kind in [self.pipeline, *self.parts.values()] if isinstance(kind, Shipped)]

    def folder(self, part: str) -> str:
        """A component is loaded from the folder of its name; where there is none, from the root."""
        return f"{part}/" if any(file.startswith(f"{part}/") for file in self.files) else ""

    def absent(self, file: str) -> str:
        there = file in self.repository.sizes
        return f"{file}, which the loader does not download from the Hub" if there else f"{file}, which is not there"


# What the index says.


def check_repository(case: Case) -> Findings:
    """The loader does not compare the version in the index with its own, and follows links wherever they lead."""
    if is_newer(case):
        what = f"was written by diffusers {case.index['_diffusers_version']}; this is {diffusers.__version__}"
        yield Finding("warning", what, "pip install -U diffusers, if something is missing or looks wrong", scope=HERE)
    if outside := sorted(case.repository.outside):
        what = f"leads outside of the repository, and was not read ({len(outside)} such)"
        yield Finding("warning", what, "put the files themselves there (cp -rL)", outside[0])


def check_pipeline(case: Case) -> Findings:
    """A list [file, class] names code at the root, which then wins; a string names a class of `diffusers`, and no file is looked at."""
    named = case.index.get("_class_name")
    if isinstance(named, list) and len(named) == 2 and isinstance(named[0], str) and isinstance(named[1], str | None):
        if (file := f"{named[0]}.py") in case.files:
            case.pipeline = yield from shipped_class(case, file, named[1], "")
        elif stays_inside(named[0]):
            mend = "add the file at the root, or name a class of diffusers"
            yield Finding("error", f"the pipeline is in {case.absent(file)}, so no class is found", mend)
        else:
            yield code_outside(file)
    elif not isinstance(named, str) or not named:
        mend = 'name the class: "YourPipeline", or ["pipeline", "YourPipeline"] for one in pipeline.py'
        yield Finding("error", f"_class_name is {json.dumps(named)}, so the loader cannot tell which pipeline it is", mend)
    elif attribute(diffusers, named) is None and (others := [name for name in packages(case) if is_plugin(name)]):
        what = f"{named} is no class of diffusers; whether {others[0]} brings it was not tried"
        yield Finding("warning", what, f"import {others[0]}")
    else:
        kind = yield from class_of(case, diffusers, named)
        if kind is not None and not issubclass(kind, diffusers.DiffusionPipeline):
            yield Finding("error", f"_class_name is {named}, which is not a pipeline", "name the pipeline's class")
        elif kind is not None:
            case.pipeline = kind
            if (top := kind.__module__.split(".")[0]) != "diffusers":
                case.imports[top] = None


def check_arguments(case: Case) -> Findings:
    """What the constructor requires is loaded, each from its pair [library, class]; so is what has a default and is in the class's
    `_optional_components`. Other arguments get what the index has, and what is no argument is ignored."""
    known = signature(case.pipeline)
    required, optional, declared = known or (set(), set(), set())
    name = case.pipeline.name if isinstance(case.pipeline, Shipped) else case.index.get("_class_name")
    for part, value in case.index.items():
        if part.startswith("_"):
            continue
        pair = isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)
        empty = isinstance(value, list) and value[:1] == [None]
        if known is None or part in required or part in optional & declared:
            if pair and part.isidentifier():
                case.entries[part] = value
            elif known and not empty:
                what = f"{part} is {json.dumps(value)}, but what has no default is loaded as a component"
                mend = "write [library, class] or [null, null]; give plain arguments a default in the constructor"
                yield Finding("error", what, mend)
        elif part not in optional:
            yield Finding("note", f"{part} is no argument of {name}, and is ignored", "remove it from the index")
        elif value == [None, None] or (pair and (value[0] in loader.LOADABLE_CLASSES or case.folder(part))):
            what = (
                f"{part} has a default, but is not in {name}'s _optional_components, so it becomes the list {json.dumps(value)}"
            )
            yield Finding("warning" if empty else "error", what, f"add {part!r} to _optional_components in the class")
    for part in sorted(required - declared if known else ()):
        if part not in case.index or case.index[part] == [None, None]:
            mend = f"give the constructor no *{part}" if part in ("args", "kwargs") else "save the pipeline again, with it"
            yield Finding("error", f"{name} requires {part}, which the index does not have", mend)


def check_lists(case: Case) -> Findings:
    """A download from the Hub takes every list of the index for a component: its first word must be a loadable library or a file."""
    for part, value in case.index.items():
        if isinstance(value, list) and part not in {"_class_name", "_ignore_files", *case.entries}:
            try:
                loader._get_custom_components_and_folders(case.repository.name, {part: value}, list(case.files))
            except (ValueError, IndexError):
                what = f"{part} is the list {json.dumps(value)}, which a download takes for a component, and stops"
                mend = "make the argument a string or an object in the pipeline's constructor, and save again"
                yield Finding("error", what, mend, scope=HUB)


def check_libraries(case: Case) -> Findings:
    """A component's library is, in this order: an attribute of `diffusers.pipelines`; a file in its folder; a package in
    LOADABLE_CLASSES; and for folders alone, any module that is already imported."""
    for part, (library, name) in case.entries.items():
        file = f"{part}/{library}.py"
        if not stays_inside(library):
            yield code_outside(file)
        elif (module := attribute(pipelines, library)) is not None:
            if attribute(module, name) is not None:
                case.parts[part] = yield from class_of(case, module, name)
            else:
                what = f"{part} is {name} of {library}, but diffusers.pipelines has a {library} too, which is looked up first"
                yield Finding("error", what, "rename the author's file or folder, and the library in the index")
        elif file in case.files:
            case.parts[part] = yield from shipped_class(case, file, name, part)
        elif library not in loader.LOADABLE_CLASSES:
            yield unknown_library(case, part, library, name)
        elif not is_installed(library):
            yield missing_package(f"{part} is of {library}", library, INDEX)
        else:
            module = importlib.import_module(library)
            if library == "transformers":
                name = deprecation_utils._maybe_remap_transformers_class(name) or name
            if library not in STOCK:
                case.imports[library] = None
            kind = case.parts[part] = yield from class_of(case, module, name)
            if kind is not None and not loadable(module, kind):
                yield Finding(
                    "error", f"{part} is {library}.{name}, which is of no kind that is loaded", "name the right class"
                )


def unknown_library(case: Case, part: str, library: str, name: str) -> Finding:
    """A library that is neither stock nor shipped: from the Hub a package must be registered, for a folder imported."""
    top, stem, entry = library.split(".")[0], library.rpartition(".")[2], f"{part} is {name} of {library}"
    stem = f"{part}_code" if stem == "__main__" or hasattr(pipelines, stem) else stem
    mend = f'ship its code as {part}/{stem}.py and write ["{stem}", "{name}"], or use a package that registers itself'
    if top in ("__main__", "diffusers_modules", "transformers_modules") or not all(map(str.isidentifier, library.split("."))):
        return Finding("error", f"{entry}, a module that was there only in the process that saved it", mend)
    if not is_installed(top) and "." in library:
        return Finding("error", f"{entry}, a module of the authors' own, so it loads nowhere else", mend)
    if not is_installed(top):
        what = f"{entry}, a package that is not installed; it can work only if it registers itself with diffusers"
        return Finding("error", what, f"see who publishes {library}, then install and import it; authors: {mend}", scope=HERE)
    case.imports[library] = None
    if is_plugin(library):
        what = f"{entry}, which registers itself when it is imported; whether it has {name} was not tried"
        return Finding("warning", what, f"import {library}")
    if top in loader.LOADABLE_CLASSES:
        return Finding("error", f"{entry}; the loader takes only {top} itself", f'write ["{top}", "{name}"]', scope=HUB)
    module = sys.modules.get(library)
    fails = module is not None and not loadable(module, attribute(module, name))
    what = f"{entry}, a module that does not register itself with diffusers: at best it loads from a folder, after import {library}"
    return Finding("error", what, mend, scope="everywhere" if fails else HUB)


# What lies in the folders.


def check_configurations(case: Case) -> Findings:
    """A component is built from the JSON file of its kind, in its folder; its class is the index's, whatever that file says."""
    for part, kind in case.parts.items():
        name, folder = configuration_of(kind), case.folder(part)
        file, target = f"{folder}{name}", f"{part}/{name or ''}"
        if part in case.repository.outside:
            yield Finding("error", "is a link to a folder elsewhere, which was not looked into", "copy it (cp -rL)", part)
        elif is_a(kind, transformers.PreTrainedTokenizerBase):
            if not any(
                re.fullmatch(rf"{folder}(tokenizer\.json|vocab\..*|.*\.(model|txt|tiktoken))", file) for file in case.files
            ):
                what = f"{part} has no vocabulary; transformers then makes an empty tokenizer without a word, or stops"
                yield Finding("warning", what, SAVE, target)
        elif name is None:
            if kind is not None and not folder and not case.files & {"preprocessor_config.json", "processor_config.json"}:
                yield Finding("error", f"{part} has no folder, so there is nothing to load it from", SAVE, target)
        elif file not in case.files:
            yield Finding("error", f"{part} needs {case.absent(target)}", SAVE, target)
        else:
            yield from check_configuration(case, part, kind, file)


def check_configuration(case: Case, part: str, kind: Kind, file: str) -> Findings:
    """It is a JSON object; what it says of its class is for the reader, what it says of quantised weights needs a package."""
    try:
        content = case.repository.json(file)
    except Unreadable as error:
        yield Finding("error", f"{error}; {part} is built from it", SAVE, file)
        return
    told, named = content.get("_class_name"), case.entries[part][1]
    if isinstance(told, str) and told != named and is_a(kind, diffusers.ModelMixin):
        what = f"was written by {told}, but the index makes {part} a {named}: arguments and weights may not fit"
        yield Finding("warning", what, "let both name the class that was saved", file)
    quantization = content.get("quantization_config")
    method = str(quantization.get("quant_method")) if isinstance(quantization, dict) else ""
    for word, package in QUANTIZERS.items():
        if word in method and not is_installed(package):
            yield missing_package(f"{part}'s weights are quantised with {word}", package, file)


def check_weights(case: Case) -> Findings:
    """Of a model's possible files the first that is there is read, safetensors first; other names are not seen, nor are variants
    that were not asked for. From the Hub, safetensors are downloaded only if every model has them."""
    models = {
        part: names for part, kind in case.parts.items() if part not in case.repository.outside and (names := weights_of(kind))
    }
    pickled: list[str] = []
    if case.variant is None:
        case.variant = variant_for_all(case, models)
    for part, names in models.items():
        folder, name = case.folder(part), next(name for name in names if name.endswith(".safetensors"))
        variants = [hub_utils._add_variant(name, case.variant) for name in names] if case.variant else []
        file = next((folder + name for name in [*variants, *names] if folder + name in case.files), None)
        if file is None:
            seen = sorted(name for name in case.files if folder and name.startswith(folder) and name.endswith(WEIGHTS))
            what = f"{part} needs weights, and there are none"
            if any(folder + name in case.repository.sizes for name in names):
                named = "the index names them in _ignore_files" if "_ignore_files" in case.index else ""
                what = f"{part}'s weights are not downloaded: {named or 'another model has only .bin, which is then taken for all'}"
            elif seen:
                what = f"{part} needs weights, and the loader does not look for {seen[0].rpartition('/')[2]}"
            yield Finding("error", what, SAVE, f"{part}/{name}")
        elif file.endswith(".index.json"):
            yield from check_shards(case, part, file)
        elif damage := case.repository.damage(file):
            yield Finding("error", damage, AGAIN, file)
        pickled += [part] if file and ".bin" in file else []
    if pickled:
        what = f"pickled weights are loaded for {', '.join(pickled)}: slower, and a risk where the unpickling is not restricted"
        yield Finding("warning", what, "load the pipeline and save it again: that writes .safetensors")
    if case.variant:
        yield Finding("warning", f"some weights are there only as {case.variant}", f'pass variant="{case.variant}", as below')


def check_shards(case: Case, part: str, file: str) -> Findings:
    """An index of shards has "metadata" and "weight_map", whose files lie beside it."""
    try:
        content = case.repository.json(file)
        shards = sorted({str(shard) for shard in content["weight_map"].values()})
        content["metadata"]
    except (Unreadable, KeyError, AttributeError) as error:
        what = str(error) if isinstance(error, Unreadable) else 'lacks "weight_map" or "metadata"'
        yield Finding("error", f"{what}, so {part}'s shards are not found", SAVE, file)
        return
    for shard in shards:
        path = f"{file.rpartition('/')[0]}/{shard}".lstrip("/")
        if "/" in shard or path not in case.files:
            yield Finding("error", f"names the shard {case.absent(path)}", "upload all shards, beside their index", file)
        elif damage := case.repository.damage(path):
            yield Finding("error", damage, AGAIN, path)


# Code that is shipped.


def check_code(case: Case) -> Findings:
    """A file is copied into one folder of modules, and with it what it imports by `from .name import` from beside it, but not what
    those import; then it is run. From the Hub, a model's folder has the one file; `pipeline.py` has its neighbours too."""
    for kind in case.shipped:
        direct = helpers(case.repository, kind.file)
        yield from check_imports(case, kind.file, kind.code, direct)
        for module in direct:
            helper = beside(kind.home, module)
            if module.startswith(".") or helper not in case.files:
                place = "above its own folder" if module.startswith(".") else case.absent(helper)
                mend = f"put what it needs of it into {kind.file} itself"
                yield Finding("error", f"imports from .{module}, that is from {place}", mend, kind.file)
                continue
            try:
                yield from check_imports(case, helper, Code(case.repository.text(helper)), direct)
            except Unreadable as error:
                yield Finding("error", f"{error}, and {kind.file} imports it", "mend the file", helper)
        if direct and not kind.home and "." in case.repository.name and not case.repository.is_folder:
            what = "has relative imports, which fail where the repository's name has a dot: it becomes part of a module's name"
            yield Finding("error", what, f"rename the repository, or {ONE_FILE}", kind.file, HUB)
    if files := sorted({kind.file for kind in case.shipped}):
        pin = f', and keep to what you have read: revision="{case.repository.commit}"' if case.repository.commit else ""
        what = "is code of the authors, which runs on your machine when it is loaded"
        yield Finding("note", what, f"read it first{pin}", ", ".join(files))


def check_imports(case: Case, file: str, code: Code, direct: list[str]) -> Findings:
    """What a file imports when it is run must be there: packages installed, their names in them, and neighbours copied along."""
    for one in code.imports:
        top = one.module.split(".")[0]
        if one.module.startswith("."):
            wanted = one.names if one.module == "." else (one.module.removeprefix("."),)
            if one.when != "later" and not {*wanted} <= {*direct}:
                what = (
                    f"imports {', '.join(wanted)} from {one.module!r}; copied along is only what the class's own file takes by"
                )
                yield Finding("error", f"{what} 'from .name import'", ONE_FILE, file)
        elif one.when != "always" or top in sys.stdlib_module_names:
            continue
        elif not is_installed(top) and f"{file.rpartition('/')[0]}/{top}.py".lstrip("/") in case.repository.sizes:
            what = f"imports {top}, its neighbour, but Python does not look for modules in the repository"
            yield Finding("error", what, ONE_FILE, file)
        elif not is_installed(top):
            yield missing_package(f"imports {top}", top, file)
        elif top in STOCK and (lacking := [name for name in one.names if not has_name(one.module, name)]):
            what = f"imports {', '.join(lacking)} from {one.module}, which {top} {sys.modules[top].__version__} does not have there"
            yield Finding("error", what, f"install the {top} that it was written for, or mend the import", file, HERE)


def check_classes(case: Case) -> Findings:
    """A shipped component must have `from_pretrained`; of a file that is given as custom_pipeline, the one pipeline is taken."""
    for kind in case.parts.values():
        if isinstance(kind, Shipped) and kind.name in kind.code.classes:
            bases, own = {*kind.code.ancestors(kind.name)}, kind.code.names_in(kind.name)
            if bases <= {"Module", "object"} and "from_pretrained" not in own:
                mend = "derive it from ModelMixin and ConfigMixin, or from SchedulerMixin and ConfigMixin"
                yield Finding("error", f"{kind.name} has no from_pretrained, by which it is loaded", mend, kind.file)
    if isinstance(case.pipeline, Shipped) and len(found := case.pipeline.code.pipelines) > 1:
        what = f"has the pipelines {', '.join(found)}: it loads by the index, but not as custom_pipeline"
        yield Finding("warning", what, "one pipeline to a file", case.pipeline.file)


def check_namespace(case: Case) -> Findings:
    """All shipped files become modules of one folder by their bare names, a later one in place of an earlier. What was imported
    before is not imported again, but the file of a component's class is run again."""
    seen: dict[str, tuple[str, str, bool]] = {}
    for kind in case.shipped:
        for file in [kind.file, *(beside(kind.home, module) for module in helpers(case.repository, kind.file))]:
            try:
                text = case.repository.text(file) if file in case.files else None
            except Unreadable:
                continue
            helps = bool(kind.home) and file != kind.file
            other, its_text, it_helps = seen.setdefault(file.removeprefix(f"{kind.home}/"), (file, text or "", helps))
            if text is not None and text != its_text:
                what = f"has the name of {other}, but not its content; the loader puts one in place of the other"
                severity: Literal["error", "warning"] = "error" if helps or it_helps else "warning"
                yield Finding(severity, what, "give each file of the repository a name of its own", file)


def check_unused(case: Case) -> Findings:
    """Code is looked at only where the index names it."""
    used = {kind.file for kind in case.shipped}
    used |= {beside(kind.home, module) for kind in case.shipped for module in helpers(case.repository, kind.file)}
    for file in sorted(case.files - used):
        part, _, name = file.rpartition("/")
        if file == "pipeline.py" or (part in case.entries and name.endswith(".py")):
            taken = f"{case.entries[part][1]} of {case.entries[part][0]}" if part else case.index.get("_class_name")
            mend = f'write "{part or "_class_name"}": ["{name.removesuffix(".py")}", class] if it shall be'
            yield Finding("warning", f"is not used: the index takes {taken}", mend, file)


CHECKS: list[Callable[[Case], Findings]] = [
    check_repository, check_pipeline, check_arguments, check_lists, check_libraries, check_configurations, check_weights,
    check_classes, check_code, check_namespace, check_unused,
]  # fmt: skip


def shipped_class(case: Case, file: str, name: str | None, home: str) -> Generator[Finding, None, Shipped | None]:
    """A class in a code file of the repository; where the index names none, the one pipeline in it."""
    try:
        code = Code(case.repository.text(file))
    except Unreadable as error:
        yield Finding("error", f"{error}, so its class is not found", "mend the file", file)
        return None
    if name is None and len(code.pipelines) != 1:
        yield Finding("error", f"has {len(code.pipelines)} pipelines, and the index does not say which", "name it there", file)
    elif name is not None and not {name, "*"} & code.names:
        mend = f"name one that it has: {', '.join(sorted(code.classes)) or 'there is none'}"
        yield Finding("error", f"has no {name}, which the index names", mend, file)
    return Shipped(file, name or "".join(code.pipelines[:1]), code, home)


def class_of(case: Case, module: Any, name: str) -> Generator[Finding, None, type | None]:
    """A class of an installed package; None where it cannot be used, with the reason."""
    kind = attribute(module, name)
    if type(kind).__name__ == "DummyObject":
        package = next((package for package in kind._backends if not is_installed(package)), kind._backends[0])
        yield missing_package(f"names {name}, which needs {package}", package, INDEX)
    elif not isinstance(kind, type):
        package = module.__name__.split(".")[0]
        what = f"names {name}, which {package} {getattr(sys.modules[package], '__version__', '')} does not have"
        mend = (
            f"install the {package} that it was saved with; for a class of your own, ship its code, or import what registers it"
        )
        here = package != "diffusers" or is_newer(case) or not all(map(is_installed, packages(case)))
        yield Finding("error", what, mend, scope=HERE if here else "everywhere")
    else:
        return kind
    return None


def packages(case: Case) -> list[str]:
    """What the index names as libraries and is neither stock nor shipped."""
    named = {
        value[0] for part, value in case.index.items() if part != "_class_name" and isinstance(value, list) and len(value) == 2
    }
    known = {*STOCK, *(file.rpartition("/")[2].removesuffix(".py") for file in case.files)}
    words = {name for name in named if isinstance(name, str) and name.isidentifier()}
    return sorted(name for name in words - known if attribute(pipelines, name) is None)


def is_newer(case: Case) -> bool:
    try:
        return Version(str(case.index.get("_diffusers_version"))) > Version(diffusers.__version__)
    except InvalidVersion:
        return False


def variant_for_all(case: Case, models: dict[str, list[str]]) -> str:
    """The variant without which some model has no weights, and with which every one has; or ""."""
    common: set[str] | None = None
    for part, names in models.items():
        folder = case.folder(part)
        if not any(folder + name in case.files for name in names):
            stems = "|".join({name.split(".")[0] for name in names})
            pattern = re.compile(rf"{folder}(?:{stems})\.([\w-]+?)(?:-\d{{5}}-of-\d{{5}})?\.(?:safetensors|bin)")
            found = {match[1] for file in case.files if (match := pattern.fullmatch(file))}
            common = found if common is None else common & found
    return min(common, default="") if common else ""


def has_name(module: str, name: str) -> bool:
    """Whether `from module import name` works, of a stock library."""
    try:
        return (
            name == "*" or hasattr(importlib.import_module(module), name) or bool(importlib.util.find_spec(f"{module}.{name}"))
        )
    except Exception:
        return False


def code_outside(file: str) -> Finding:
    return Finding(
        "error", f"names code outside of the repository, {file}, which a loader that trusts it would run", "do not load it"
    )


def missing_package(what: str, module: str, where: str) -> Finding:
    return Finding("error", f"{what}, which is not installed", f"pip install {distribution(module)}", where, HERE)


def distribution(module: str) -> str:
    """What to give to pip."""
    top = module.split(".")[0]
    return packages_distributions().get(top, [top])[0]
