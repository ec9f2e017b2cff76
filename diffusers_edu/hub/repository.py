"""Reading somebody else's repository, a folder or on the Hub, as diffusers' loader finds it: its files, its classes, its code.

Nothing of it is run, no weights are downloaded, and nothing outside of it is read.
"""

import ast
import fnmatch
import importlib.util
import inspect
import json
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import diffusers
import transformers
from diffusers.pipelines import pipeline_loading_utils as loader
from diffusers.utils import constants
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from huggingface_hub import HfApi
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id

from ..errors import UsageError, first_line

INDEX = "model_index.json"
LARGEST = 16 * 2**20  # bytes of a JSON or .py file; the index of the shards of the largest models has 1 MB
LONGEST_HEADER = 100 * 2**20  # bytes; more is refused by safetensors too
DEEPEST = 3  # folders under the root; the loader looks no deeper than two
POINTER = b"version https://git-lfs"


class Unreadable(Exception):
    """What is wrong with a file: the end of a sentence that begins with its name."""


@dataclass(frozen=True)
class Repository:
    """A folder or a repository of the Hub.

    Attributes:
        name: as it is given to `from_pretrained`.
        sizes: of each file, by its name in the repository (`unet/config.json`), in bytes; None where it is not known.
        outside: files and folders that are links to elsewhere, and names that lead elsewhere.
        fetch: gives the local path of a file.
        commit: the sha on the Hub; None for a folder.
    """

    name: str
    sizes: dict[str, int | None]
    outside: frozenset[str]
    fetch: Callable[[str], Path] = field(repr=False)
    commit: str | None = None

    @property
    def is_folder(self) -> bool:
        return self.commit is None

    def path(self, file: str) -> Path:
        """Where a small file lies on this machine, downloaded if need be.

        Raises:
            Unreadable: it is no small file of this repository.
        """
        if file in self.outside:
            raise Unreadable("is a link to somewhere outside of the folder, which was not read")
        if (self.sizes[file] or 0) > LARGEST:
            raise Unreadable(f"has {self.sizes[file]} bytes, too many for what it should be")
        return self.fetch(file)

    def text(self, file: str) -> str:
        """The content of a small file, as the loader decodes it; `Unreadable` where that is not possible."""
        try:
            content = self.path(file).read_bytes()
            if content.startswith(POINTER):
                raise Unreadable("is a git-lfs pointer, not the file itself (run 'git lfs pull' in the clone)")
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Unreadable("is not text in UTF-8") from error
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror or first_line(error)})") from error

    def json(self, file: str) -> dict[str, Any]:
        """A JSON object; `Unreadable` where the file holds none."""
        text = self.text(file)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Unreadable(f"is not valid JSON ({first_line(error)})") from error
        if not isinstance(content, dict):
            raise Unreadable("is valid JSON, but not an object of names and values")
        return content

    def damage(self, file: str) -> str | None:
        """What is wrong with weights, as far as size and header tell; on the Hub, where they stay, that is the size alone."""
        size = self.sizes[file]
        if size is None or not size:
            return None if size is None else "is empty"
        if not self.is_folder:
            return None
        try:
            with self.fetch(file).open("rb") as stream:
                start = stream.read(64)
                if start.startswith(POINTER):
                    return "is a git-lfs pointer, not the weights (git lfs install; git lfs pull)"
                if not file.endswith(".safetensors"):
                    return None
                stream.seek(8)
                length = int.from_bytes(start[:8], "little")
                header = json.loads(stream.read(length) if length < min(size, LONGEST_HEADER) else b"")
            ends = [value["data_offsets"][1] for key, value in header.items() if key != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return "is damaged: it has no header of safetensors"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        return None if expected == size else f"is damaged: it has {size} bytes, and should have {expected}"


def open_repository(repository: str, revision: str | None = None, token: str | bool | None = None) -> Repository:
    """The folder of this path; where there is none, the repository of this name on the Hub.

    Raises:
        UsageError: there is neither, or it cannot be read; the message has one line, and never the token.
    """
    path = Path(repository)
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError:  # too long for a path
        is_folder = is_there = False
    if repository and is_folder:
        if revision is not None:
            raise UsageError(f"--revision {revision}: {repository} is a folder, which has no revisions")
        return in_folder(path)
    if repository and is_there:
        raise UsageError(f"{repository} is a file; give the folder that it lies in, or the name of a repository")
    if not repository or repository.startswith((".", "/", "~")) or repository.count("/") > 1:
        raise UsageError(f"{repository!r} is neither a folder nor the name of a repository (name or owner/name)")
    try:
        validate_repo_id(repository)
    except hub_errors.HFValidationError as error:
        raise UsageError(f"{repository!r} is neither a folder nor the name of a repository: {first_line(error)}") from error
    return on_hub(repository, revision, token)


def in_folder(root: Path) -> Repository:
    """A folder on this machine. Links are followed inside of it, or to the files of the Hub's cache that it belongs to."""
    home = root.resolve()
    inside = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    sizes: dict[str, int | None] = {}
    outside: set[str] = set()

    def look(folder: Path, depth: int) -> None:
        for entry in sorted(folder.iterdir()):
            name = entry.relative_to(root).as_posix()
            if entry.is_symlink() and not leads_inside(entry):
                outside.add(name)
                if entry.is_file():
                    sizes[name] = None
            elif entry.is_file():
                sizes[name] = entry.stat().st_size
            elif entry.is_dir() and not entry.name.startswith(".") and depth < DEEPEST:
                look(entry, depth + 1)

    def leads_inside(link: Path) -> bool:
        try:
            return any(link.resolve().is_relative_to(place) for place in inside)
        except RuntimeError:  # it leads to itself
            return False

    try:
        look(root, 0)
    except OSError as error:
        raise UsageError(f"{root} cannot be read ({first_line(error)})") from error
    return Repository(str(root), sizes, frozenset(outside), lambda file: root / file)


def on_hub(name: str, revision: str | None, token: str | bool | None) -> Repository:
    """A model repository on the Hub: one request for the list of files, one for each small file that is read."""
    api = HfApi(token=token)
    with one_line(name, revision, token):
        info = api.model_info(name, revision=revision, files_metadata=True, timeout=60)
    listed = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    sizes = {file: size for file, size in listed.items() if stays_inside(file)}

    def fetch(file: str) -> Path:
        with one_line(name, revision, token):
            return Path(api.hf_hub_download(name, file, revision=info.sha))

    return Repository(name, sizes, frozenset(listed.keys() - sizes.keys()), fetch, info.sha or "main")


def stays_inside(name: str) -> bool:
    """Whether a name of a file, a folder or a part of one leads nowhere else when it is joined to a path."""
    return bool(name) and not PurePosixPath(name).is_absolute() and ".." not in name.split("/") and "\\" not in name


@contextmanager
def one_line(name: str, revision: str | None, token: str | bool | None) -> Iterator[None]:
    """What can go wrong on the way to the Hub, as a `UsageError`."""
    try:
        yield
    except hub_errors.GatedRepoError as error:
        raise UsageError(f"{name} is gated: accept its conditions on the Hub, then 'hf auth login' or HF_TOKEN") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise UsageError(f"{name}: no such folder, and no such model on the Hub, or not for you: 'hf auth login'") from error
    except hub_errors.RevisionNotFoundError as error:
        raise UsageError(f"{name} has no revision {revision}") from error
    except (hub_errors.OfflineModeIsEnabled, hub_errors.LocalEntryNotFoundError) as error:
        raise UsageError(f"{name} is no folder here, and the Hub cannot be reached (offline, or HF_HUB_OFFLINE)") from error
    except Exception as error:  # of the HTTP client, whose exceptions have changed with every major version of it
        said = re.sub(r"hf_\w+", "hf_...", first_line(error))
        said = said.replace(token, "...") if isinstance(token, str) and token else said
        raise UsageError(f"{name} could not be read from the Hub ({type(error).__name__}: {said})") from error


@dataclass(frozen=True)
class Import:
    """`names` taken from `module` (`.helper`, `a.b`), or the module itself where there are none. `when`: "always", "perhaps" (under a
    `try` or an `if`) or "later" (in a function)."""

    module: str
    names: tuple[str, ...]
    when: str


class Code:
    """What can be said of a Python file without running it.

    Attributes:
        classes: of its top level, by name.
        names: everything that its top level binds; "*" where it imports all of another.
        imports: wherever in it.

    Raises:
        Unreadable: it is not valid Python.
    """

    def __init__(self, text: str):
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(text.removeprefix("\ufeff"))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = f"line {error.lineno}: " if isinstance(error, SyntaxError) and error.lineno else ""
            raise Unreadable(f"is not valid Python ({line}{getattr(error, 'msg', first_line(error))})") from error
        self.classes: dict[str, ast.ClassDef] = {}
        self.names: set[str] = set()
        self.imports: list[Import] = []
        todo: deque[tuple[ast.AST, str, bool]] = deque([(tree, "always", True)])
        while todo:
            node, when, top = todo.popleft()
            self._note(node, when, top)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                when = "later"
            elif isinstance(node, ast.Try | ast.If) and when == "always":
                when = "perhaps"
            top = top and not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            todo += [(child, when, top) for child in ast.iter_child_nodes(node)]

    def _note(self, node: ast.AST, when: str, top: bool) -> None:
        bound: list[str] = []
        if isinstance(node, ast.Import):
            self.imports += [Import(alias.name, (), when) for alias in node.names]
            bound = [alias.asname or alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            self.imports.append(Import("." * node.level + (node.module or ""), names, when))
            bound = [alias.asname or alias.name for alias in node.names]
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            bound = [node.name]
            if isinstance(node, ast.ClassDef) and top:
                self.classes[node.name] = node
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound = [node.id]
        self.names |= set(bound) if top else set()

    def ancestors(self, name: str) -> list[str]:
        """The last names of a class's bases (`ModelMixin` for `diffusers.ModelMixin`), and of theirs as far as this file has them."""
        found: list[str] = []
        todo = [name]
        while todo:
            nodes = self.classes[child].bases if (child := todo.pop()) in self.classes else []
            new = [node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in nodes]
            new = [base for base in new if base not in found]
            found += new
            todo += new
        return found

    def arguments(self, name: str) -> tuple[set[str], set[str]] | None:
        """Those that a class's own constructor requires, `*args` and `**kwargs` among them, and those with a default."""
        init = next((node.args for node in self._body(name) if getattr(node, "name", "") == "__init__"), None)
        if not isinstance(init, ast.arguments):
            return None
        names = [argument.arg for argument in [*init.posonlyargs, *init.args]]
        optional = set(names[len(names) - len(init.defaults) :])
        optional |= {argument.arg for argument, default in zip(init.kwonlyargs, init.kw_defaults, strict=True) if default}
        every = {*names[1:], *(argument.arg for argument in init.kwonlyargs)}
        every |= {extra.arg for extra in (init.vararg, init.kwarg) if extra}
        return every - optional, optional

    def words(self, name: str, attribute: str) -> set[str] | None:
        """The strings in the list that a class has as an attribute."""
        for node in self._body(name):
            if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == attribute for target in node.targets):
                return {str(part.value) for part in getattr(node.value, "elts", []) if isinstance(part, ast.Constant)}
        return None

    def names_in(self, name: str) -> set[str]:
        """What the body of a class defines by `def`."""
        return {getattr(node, "name", "") for node in self._body(name)}

    @property
    def pipelines(self) -> list[str]:
        """The classes that look like pipelines, by the names of their bases."""
        return [name for name in self.classes if any(base.endswith("Pipeline") for base in self.ancestors(name))]

    def _body(self, name: str) -> list[Any]:
        return self.classes[name].body if name in self.classes else []


@dataclass(frozen=True)
class Shipped:
    """A class in a code file of the repository, which lies in the folder `home`, "" for the root."""

    file: str
    name: str
    code: Code
    home: str


Kind = type | Shipped | None  # None: not known


def types_of(kind: Kind) -> list[type]:
    """The class, or the classes of diffusers and transformers that a shipped one descends from."""
    if not isinstance(kind, Shipped):
        return [kind] if kind else []
    names = [name for name in [kind.name, *kind.code.ancestors(kind.name)] if name not in kind.code.classes]
    found = [attribute(module, name) for name in names for module in (diffusers, transformers)]
    return [base for base in found if isinstance(base, type)]


def is_a(kind: Kind, base: type) -> bool:
    return any(issubclass(one, base) for one in types_of(kind))


def loadable(module: Any, kind: Any) -> bool:
    """Whether a class descends from a base that the loader knows, which it looks for in the same module."""
    bases = tuple(base for name in loader.ALL_IMPORTABLE_CLASSES if isinstance(base := attribute(module, name), type))
    return isinstance(kind, type) and issubclass(kind, bases)


def signature(kind: Kind) -> tuple[set[str], set[str], set[str]] | None:
    """The constructor's arguments, those required and those with a default, and the optional components; None: not known."""
    if isinstance(kind, Shipped):
        own, declared = kind.code.arguments(kind.name), kind.code.words(kind.name, "_optional_components")
        above = next((known for base in types_of(kind) if (known := signature(base))), None)
        arguments = own or (above[:2] if above else None)
        return arguments and (*arguments, (above[2] if above else set()) if declared is None else declared)
    if kind is None:
        return None
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]  # type: ignore[misc]
    required = {one.name for one in parameters if one.default is inspect.Parameter.empty}
    return required, {one.name for one in parameters} - required, {*getattr(kind, "_optional_components", [])}


def configuration_of(kind: Kind) -> str | None:
    """The JSON file that it is built from; None where it has several, or is not known."""
    if is_a(kind, transformers.PreTrainedModel):
        return "config.json"
    return next((name for one in types_of(kind) if (name := getattr(one, "config_name", None))), None)


def weights_of(kind: Kind) -> list[str]:
    """The names that its weights may have, in the order in which they are looked for."""
    if is_a(kind, transformers.PreTrainedModel):
        return ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    if is_a(kind, diffusers.ModelMixin):
        return [constants.SAFE_WEIGHTS_INDEX_NAME, constants.SAFETENSORS_WEIGHTS_NAME, constants.WEIGHTS_NAME]
    return []


def attribute(module: Any, name: str) -> Any:
    try:
        return getattr(module, name, None)
    except Exception:  # a lazy import that fails
        return None


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module.split(".")[0]) is not None  # of a top-level name: it runs nothing
    except (ValueError, ImportError):
        return False


def is_plugin(module: str) -> bool:
    """Whether an installed package, which is not run, mentions the loader's table in its source: so it registers itself."""
    spec = importlib.util.find_spec(module) if module.isidentifier() and is_installed(module) else None
    places = [Path(place) for place in spec.submodule_search_locations or []] if spec else []
    files = [file for place in places for file in place.rglob("*.py")] or [Path(spec.origin or "")] if spec else []
    sources = (file.read_text(encoding="utf-8", errors="replace") for file in files if file.suffix == ".py")
    return any("LOADABLE_CLASSES" in source for source in sources)


def helpers(repository: Repository, file: str) -> list[str]:
    """The modules that the loader copies along with a code file."""
    try:
        path = repository.path(file)
        return sorted(get_relative_imports(path))
    except (Unreadable, OSError, UnicodeDecodeError):
        return []


def beside(folder: str, module: str) -> str:
    """Where the loader looks for a module that a file in this folder imports."""
    name = module.replace(".", "/") if module.count(".") == 1 else module
    return f"{folder}/{name}.py".lstrip("/")


def downloaded(repository: Repository, index: dict[str, Any], pipeline: Kind, variant: str | None) -> set[str] | None:
    """The files that `DiffusionPipeline.download` fetches from the Hub; None where it stops before."""
    try:
        names = set(repository.sizes) - set(index.get("_ignore_files", []))
        entries = {key: value for key, value in index.items() if key != "_ignore_files"}
        custom, folders = loader._get_custom_components_and_folders(repository.name, entries, [*names])
        models = {folder for file in loader.filter_model_files(names) if (folder := file.rpartition("/")[0]) in folders}
        onnx = getattr(pipeline, "_is_onnx", False)
        ignore = loader._get_ignore_patterns([], [*models], [*names], True, True, None, onnx, False, variant)
        weights, _ = loader.variant_compatible_siblings(names, variant=variant, ignore_patterns=ignore)
    except (ValueError, IndexError, TypeError, OSError):
        return None
    allow = [
        *weights,
        *(f"{folder}/*" for folder in folders if folder not in models),
        *(f"{folder}/config.json" for folder in models),
    ]
    allow += [f"{folder}/{stem}.py" for folder, stem in custom.items()]
    allow += [INDEX, "scheduler_config.json", "config.json", "pipeline.py", *constants.TRANSFORMERS_COMPONENT_AUX_FILES]
    if isinstance(pipeline, Shipped):  # its code is fetched first, with all that it imports in turn
        allow.append(pipeline.file)
        for module in (todo := helpers(repository, pipeline.file)):
            if (file := beside("", module)) in names and file not in allow:
                allow.append(file)
                todo += helpers(repository, file)
    ignore += [f"{pattern}.index.*json" for pattern in ignore]
    kept, left = (re.compile("|".join(map(fnmatch.translate, patterns))) for patterns in (allow, ignore))
    return {file for file in names if kept.match(file) and not left.match(file)}
