"""Upload an exported folder to the Hub, in one commit, and give it the name by which its card says to load it."""

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..errors import UsageError, first_line
from .card import CARD_NAME
from .export import INDEX, read_index

SUFFIXES = {".json", ".safetensors", ".py", ".md", ".png", ".txt", ".model", ".jinja"}
OPTIMIZER = "optimizer.safetensors"  # of a checkpoint
# Of the client; HTTPError is that of its own library, for a connection that broke.
CLIENT_ERRORS = (HTTPError, OSError, ValueError, RuntimeError)


def publish(folder: Path, repo_id: str, private: bool = False, only: str | None = None) -> str:
    """Upload an exported folder; return the URL.

    One commit holds all of it, so that whoever loads the repository meanwhile, or after an upload that was cut off, finds the revision
    before, whole. Code and weights of an earlier export that this one lacks are removed by it. The token is huggingface_hub's
    (`HF_TOKEN`, or the cached login).

    Args:
        folder: what `export` wrote. Links, hidden files and kinds of files that an export does not write stay where they are.
        repo_id: `name` or `namespace/name`; made where it does not exist.
        private: whether a new repository is; one that is there must be so already.
        only: a component: upload that and the index alone, into a repository that exists.

    Raises:
        UsageError: a name that is none, no login, a folder without a pipeline, or an upload that failed; the message says what to do,
            and never the token.
    """
    check_access(repo_id)
    files = shippable(folder, None if only is None else {INDEX, only})
    check_whole(folder, files, only)
    revision = revision_of(folder)
    api, before = HfApi(), None
    try:
        if only is None:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        before = api.model_info(repo_id)
        if private and not before.private:
            raise ValueError("it is there already and everybody can read it, which --private does not change")
        operations = [CommitOperationAdd(name, content(path, name, repo_id, revision)) for name, path in files.items()]
        commit = api.create_commit(
            repo_id,
            [*operations, *map(CommitOperationDelete, stale(api, before, set(files), only))],
            commit_message=f"{only or 'pipeline'} by diffusers-edu",
            parent_commit=before.sha,
        )
    except CLIENT_ERRORS as error:
        raise UsageError(f"{outcome(api, repo_id, before, error)}: {reason(error, repo_id)}") from error
    try:
        if only is None:
            api.create_tag(repo_id, tag=revision, revision=commit.oid, exist_ok=True)
    except CLIENT_ERRORS as error:
        raise UsageError(
            f"{repo_id} has the new content, but not yet the tag {revision}; publish again: {reason(error, repo_id)}"
        ) from error
    return f"{api.endpoint}/{repo_id}"


def check_access(repo_id: str) -> None:
    """Raise a `UsageError` for a name that is none, or where nobody is logged in; no request is made."""
    check_name(repo_id)
    if get_token() is None:
        raise UsageError("you are not logged in to the Hub; run 'hf auth login' or set HF_TOKEN")


def check_name(repo_id: str) -> None:
    """Raise a `UsageError` unless it can be the name of a repository."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{repo_id} is no name of a repository: {first_line(error)}") from error


def shippable(folder: Path, only: set[str] | None = None) -> dict[str, Path]:
    """The files of an export, by their path in the repository; nothing else that lies in the folder.

    Files of the known kinds, at the root and in the folders of the components that the index names, where alone weights lie; no links,
    nothing hidden.

    Raises:
        UsageError: the folder holds no pipeline.
    """
    parts = components(read_index(folder))
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        linked = any(part.is_symlink() for part in [path, *path.parents][: len(name.parts)])
        hidden = any(part.startswith(".") for part in name.parts)
        at_home = name.parts[0] in parts if len(name.parts) == 2 else len(name.parts) == 1 and path.suffix != ".safetensors"
        if path.is_file() and not linked and not hidden and at_home and path.suffix in SUFFIXES and path.name != OPTIMIZER:
            found[name.as_posix()] = path
    return found if only is None else {name: path for name, path in found.items() if name.split("/")[0] in only}


def check_whole(folder: Path, files: dict[str, Path], only: str | None) -> None:
    """Raise a `UsageError` where the files to upload are no pipeline, as where links take the place of weights."""
    index = read_index(folder)
    parts = (
        {name for name in components(index) if [type(word) for word in index[name]] == [str, str]} if only is None else {only}
    )
    patterns = {INDEX, *(f"{part}/*" for part in parts)}
    for path in folder.glob("*/*.safetensors"):
        if path.parent.name in parts and path.name != OPTIMIZER:
            patterns.add(f"{path.parent.name}/*.safetensors")
    for pattern in sorted(patterns):
        if not any(PurePosixPath(name).match(pattern) for name in files):
            raise UsageError(f"{folder} has no {pattern} that can be uploaded; links and hidden files are not")


def components(index: Any) -> set[str]:
    """The components that an index names, each a plain name of a folder."""
    entries = index.items() if isinstance(index, dict) else ()
    return {name for name, entry in entries if isinstance(entry, list) and not name.startswith("_") and name.isidentifier()}


def stale(api: HfApi, before: Any, mine: set[str], only: str | None) -> list[str]:
    """What an earlier export left in the repository and this one does not write: code, weights and configurations, which a load would
    mix with ours. What is not of a component stays."""
    theirs = {sibling.rfilename for sibling in before.siblings or []}
    folders = {name.split("/")[0] for name in mine if "/" in name}
    if only is None and INDEX in theirs:
        index = Path(api.hf_hub_download(before.id, INDEX, revision=before.sha))
        with suppress(ValueError):  # one that cannot be read is replaced
            folders |= components(json.loads(index.read_text(encoding="utf-8")))
    return sorted(
        name
        for name in theirs - mine
        if (name == "pipeline.py" and only is None)
        or ("/" in name and name.split("/")[0] in folders and PurePosixPath(name).suffix in SUFFIXES)
    )


def content(path: Path, name: str, repo_id: str, revision: str) -> Path | bytes:
    """A file to upload: as it is, but that the card calls the repository and the revision by their names."""
    if name != CARD_NAME:
        return path
    text = path.read_text(encoding="utf-8")
    tag = r"\bv-[0-9a-f]{12}\b"
    text = re.sub(rf'(from_pretrained\(")[^"]+(", revision="{tag})', rf"\g<1>{repo_id}\g<2>", text)
    text = re.sub(rf"(diffusers-edu verify )\S+( --revision {tag})", rf"\g<1>{repo_id}\g<2>", text)
    return re.sub(tag, revision, text).encode()


def revision_of(folder: Path) -> str:
    """A name for what a folder holds: a digest of its files but the card, which bears it."""
    digest = hashlib.sha256()
    for name, path in shippable(folder).items():
        if name != CARD_NAME:
            with path.open("rb") as file:
                digest.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
    return f"v-{digest.hexdigest()[:12]}"


def outcome(api: HfApi, repo_id: str, before: Any, error: Exception) -> str:
    """What a failed upload has left behind. The commit whose answer was lost may have been made, so the Hub is asked."""
    if before is None or 400 <= (status_of(error) or 0) < 500:
        return f"{repo_id} was not published"
    try:
        now = api.model_info(repo_id)
    except CLIENT_ERRORS:
        return f"it is not known whether {repo_id} was published; publish again"
    if now.sha == before.sha:
        return f"{repo_id} was not published, and is what it was"
    return f"{repo_id} has changed, by this upload or by another; publish again"


def status_of(error: Exception) -> int | None:
    """The status that the Hub refused with; None where it did not answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def reason(error: Exception, repo_id: str) -> str:
    """Why the Hub refused, in a line without secrets."""
    status = status_of(error)
    if status == 401 or isinstance(error, RepositoryNotFoundError):
        return "the Hub knows no such repository, or not your token; look at 'hf auth whoami', and log in anew with 'hf auth login'"
    if status == 403:
        return f"your token may not write to {repo_id}; make one with write access"
    if status == 412:
        return "somebody else has published to it at the same time; publish again"
    return without_secrets(" ".join(str(error).split())[:300] or type(error).__name__)


def without_secrets(text: str) -> str:
    """A text without the token, and without anything that looks like one."""
    token = get_token()
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "hf_***", text.replace(token, "***") if token else text)
