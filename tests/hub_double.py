"""A double of the Hugging Face Hub on 127.0.0.1, which the real huggingface_hub client and diffusers' downloads talk to.

    with HubDouble() as hub:
        subprocess.run([sys.executable, "-c", code], env=hub.environment(tmp_path / "cache", token=WRITER))
        assert hub.files("user/repo")["model_index.json"] == ...

As on the real Hub, files of LFS_SUFFIXES are uploaded to and downloaded from a storage of another origin, which must get no
token; each commit is an immutable snapshot; a branch moves only when the whole commit request has arrived.

What it does not prove: neither real authentication (a token is a word in a table, the storage's addresses are not signed) nor
the xet storage that the real Hub prefers (the client is told to do without). Metadata of a card is not read, `.gitignore` and
`.gitattributes` have no effect, listings come in one page, there are no pull requests and no branches but main, and limits of
size or rate are those that a test sets.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".parquet")
WRITER, READER, OTHER = "token-that-writes", "token-that-reads", "token-of-another"
# For `fault`: expressions searched in "METHOD /path".
LFS_PUT, LFS_GET, COMMIT = "^PUT /lfs/", "^GET /lfs/", "^POST /api/.*/commit/"


@dataclass(frozen=True)
class Account:
    name: str
    write: bool = True


@dataclass
class Request:
    """What arrived: `host` is "hub" or "storage", `body` what came of it, `status` None where no answer was given."""

    host: str
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes = field(default=b"", repr=False)
    status: int | None = None


@dataclass
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An answer by status; `code` is what the client tells the kinds of 401, 403 and 404 apart by."""

    def __init__(self, status: int, message: str, code: str | None = None, **more: str):
        super().__init__(message)
        headers = {"Content-Type": "application/json", "X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        if status in (429, 503):
            headers["Retry-After"] = "0"  # the client adds a second
        self.answer = Answer(json.dumps({"error": message, **more}).encode(), status, headers)


@dataclass
class Fault:
    pattern: str
    what: str | int | Callable[[], object]
    skip: int
    times: float


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    description: str
    files: Mapping[str, bytes]


@dataclass
class Repository:
    name: str
    private: bool = False
    gated: bool = False
    all_commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    named: set[str] = field(default_factory=set)  # every path that a client has named here, committed or not

    def find(self, revision: str) -> Commit:
        """By branch, tag, or seven or more digits of the sha."""
        sha = {**self.tags, **self.branches}.get(revision, revision)
        found = [commit for commit in self.all_commits.values() if len(sha) >= 7 and commit.sha.startswith(sha)]
        if len(found) != 1:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]

    def commit(self, files: Mapping[str, bytes], title: str, description: str = "", branch: str = "main") -> Commit:
        parent, content = self.branches.get(branch), sorted((path, _git_oid(data)) for path, data in files.items())
        sha = hashlib.sha1(repr((self.name, parent, len(self.all_commits), title, content)).encode()).hexdigest()
        commit = Commit(sha, parent, title, description, dict(files))
        self.all_commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit


class HubDouble:
    def __init__(self, tokens: Mapping[str, Account] | None = None):
        known = {WRITER: Account("user"), READER: Account("user", write=False), OTHER: Account("other")}
        self.tokens = dict(known if tokens is None else tokens)
        self.repositories: dict[str, Repository] = {}  # "user/model", "datasets/user/data", "spaces/user/space"
        self.store: dict[str, bytes] = {}  # the LFS objects, by SHA-256; committed or not
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._servers = [_Server(self, "hub"), _Server(self, "storage")]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """From now on nobody answers, on connections already open neither."""
        while self._servers:
            self._servers.pop().stop()

    def environment(self, cache_folder: str | os.PathLike, token: str | None = None, **more: str) -> dict[str, str]:
        """For a subprocess that shall see this Hub, a cache of its own, and of tokens only the given one."""
        ours = ("hf_", "huggingface_", "hugging_face_", "transformers_offline", "http_proxy", "https_proxy", "all_proxy")
        kept = {name: value for name, value in os.environ.items() if not name.lower().startswith(ours)}
        switches = dict.fromkeys(("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"), "1")
        login = {} if token is None else {"HF_TOKEN": token}
        return {**kept, **switches, "HF_ENDPOINT": self.url, "HF_HOME": str(cache_folder), **login, **more}

    def snapshot(self, repo: str, files: Mapping[str, bytes | str] | Path, private: bool = False) -> str:
        """Make these files (also from a folder) all that `repo` has on main; returns the sha. No request is needed."""
        if isinstance(files, Path):
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        with self.lock:
            repository = self.repositories.setdefault(repo, Repository(repo, private))
            content = {path: data.encode() if isinstance(data, str) else data for path, data in files.items()}
            self.store.update({_sha256(data): data for path, data in content.items() if _is_lfs(path, data)})
            return repository.commit(content, "snapshot").sha

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return dict(self.repositories[repo].find(revision).files)

    def commits(self, repo: str, revision: str = "main") -> list[Commit]:
        """The newest first."""
        repository = self.repositories[repo]
        commits = [repository.find(revision)]
        while commits[-1].parent:
            commits.append(repository.all_commits[commits[-1].parent])
        return commits

    def fault(self, pattern: str, what: str | int | Callable[[], object], nth: int = 1, times: float = 1):
        """Of the requests that match, the nth and those after it, `times` in all (math.inf: every one), meet this fault.

        "cut": the connection breaks when half of the request's body has arrived. "cut_answer": what is asked is done, and the
        connection breaks in the middle of the answer. A number: this status is all the answer. A function: it is called, and
        then the request is served (as when someone else commits at the worst moment).
        """
        self.faults.append(Fault(pattern, what, nth - 1, times))

    def _fault_of(self, request: Request) -> str | int | Callable[[], object] | None:
        for fault in self.faults:
            if re.search(fault.pattern, f"{request.method} {request.path}"):
                if fault.skip:
                    fault.skip -= 1
                elif fault.times:
                    fault.times -= 1
                    return fault.what
        return None

    # Who may do what; used by the endpoints below.

    def _account(self, request: Request) -> Account | None:
        token = request.headers.get("authorization")
        if token is not None and token.removeprefix("Bearer ") not in self.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return None if token is None else self.tokens[token.removeprefix("Bearer ")]

    def _repository(self, request: Request, kind: str | None, repo: str, write=False, content=False) -> Repository:
        account = self._account(request)
        found = self.repositories.get(_key(kind, repo))
        mine = account is not None and account.name == repo.split("/")[0]
        # A private repository does not exist for others. The client takes a bare 401 for that only from an https address.
        if found is None or (found.private and not mine):
            raise Refusal(404 if account else 401, "Repository not found", "RepoNotFound")
        if write and account is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if write and not (mine and account.write):
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository")
        if content and found.gated and not mine:
            raise Refusal(403 if account else 401, f"Access to {repo} is restricted", "GatedRepo")
        return found


# Content.


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _is_lfs(path: str, data: bytes) -> bool:
    return path.endswith(LFS_SUFFIXES) and len(data) > 0  # the client sends empty files with the commit


def _key(kind: str | None, repo: str) -> str:
    return repo if kind in (None, "model", "models") else f"{kind.removesuffix('s')}s/{repo}"


def _entry(path: str, data: bytes) -> dict:
    if not _is_lfs(path, data):
        return {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{_sha256(data)}\nsize {len(data)}\n".encode()
    lfs = {"oid": _sha256(data), "size": len(data), "pointerSize": len(pointer)}
    return {"type": "file", "path": path, "size": len(data), "oid": _git_oid(pointer), "lfs": lfs}


# Endpoints: the named groups of an expression, unquoted, are the function's arguments.

ROUTES: list[tuple[str, re.Pattern, Callable]] = []
_REPO = r"(?P<repo>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>models|datasets|spaces)/{_REPO}"
_PAGE = rf"/(?:(?P<kind>datasets|spaces)/)?{_REPO}"
_REVISION = r"(?P<revision>[^/]+)"


def _route(method: str, pattern: str):
    return lambda function: ROUTES.append((method, re.compile(pattern), function)) or function


def _json(data) -> Answer:
    return Answer(json.dumps(data).encode(), headers={"Content-Type": "application/json"})


@_route("GET", "/api/whoami-v2")
def _whoami(hub, request):
    account = hub._account(request)
    if account is None:
        raise Refusal(401, "Invalid username or password.")
    role = "write" if account.write else "read"
    return _json({"type": "user", "name": account.name, "orgs": [], "auth": {"accessToken": {"role": role}}})


@_route("POST", "/api/repos/create")
def _create(hub, request):
    order, account = json.loads(request.body), hub._account(request)
    if account is None:
        raise Refusal(401, "Invalid username or password.")
    namespace = order.get("organization") or account.name
    if not account.write or namespace != account.name:
        raise Refusal(403, f"You don't have the rights to create a repository under {namespace}")
    key = _key(order.get("type"), f"{namespace}/{order['name']}")
    if key in hub.repositories:
        raise Refusal(409, "You already created this repository", url=f"{hub.url}/{key}")  # the client reads the url
    repository = hub.repositories[key] = Repository(key, private=order.get("visibility") == "private")
    attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
    repository.commit({".gitattributes": attributes.encode()}, "initial commit")
    return _json({"url": f"{hub.url}/{key}"})


@_route("POST", "/api/validate-yaml")
def _validate_card(hub, request):
    missing = not json.loads(request.body)["content"].startswith("---\n")
    return _json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}] if missing else []})


@_route("GET", rf"{_API}(?:/revision/{_REVISION})?")
def _info(hub, request, kind, repo, revision):
    repository = hub._repository(request, kind, repo)
    commit, siblings = repository.find(revision or "main"), []
    for path, data in sorted(commit.files.items()):
        entry = _entry(path, data)
        lfs = {"lfs": {"sha256": entry["lfs"]["oid"], **entry["lfs"]}} if "lfs" in entry else {}
        blob = {"size": entry["size"], "blobId": entry["oid"], **lfs} if "blobs" in request.query else {}
        siblings.append({"rfilename": path, **blob})
    gated = "auto" if repository.gated else False
    return _json(
        {"id": repo, "sha": commit.sha, "private": repository.private, "gated": gated, "tags": [], "siblings": siblings}
    )


@_route("GET", rf"{_API}/tree/{_REVISION}(?:/(?P<folder>.+))?")
def _tree(hub, request, kind, repo, revision, folder):
    files = hub._repository(request, kind, repo).find(revision).files
    entries = {path: _entry(path, data) for path, data in files.items()}
    for name in {str(above) for path in files for above in PurePosixPath(path).parents} - {"."}:
        entries[name] = {"type": "directory", "path": name, "size": 0, "oid": _git_oid(name.encode())}
    above, recursive = PurePosixPath(folder or "."), request.query.get("recursive") in (["true"], ["True"])
    inside = [path for path in sorted(entries) if above in PurePosixPath(path).parents]
    if folder and not inside:
        raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    return _json([entries[path] for path in inside if recursive or PurePosixPath(path).parent == above])


@_route("GET", rf"{_API}/refs")
def _refs(hub, request, kind, repo):
    repository, tables = hub._repository(request, kind, repo), {"converts": [], "pullRequests": []}
    for name, folder, table in (("branches", "heads", repository.branches), ("tags", "tags", repository.tags)):
        tables[name] = [{"name": ref, "ref": f"refs/{folder}/{ref}", "targetCommit": sha} for ref, sha in table.items()]
    return _json(tables)


@_route("POST|DELETE", rf"{_API}/tag/(?P<name>[^/]+)")
def _tag(hub, request, kind, repo, name):
    repository = hub._repository(request, kind, repo, write=True)
    if request.method == "DELETE":
        if repository.tags.pop(name, None) is None:
            raise Refusal(404, f"No such tag: {name}", "RevisionNotFound")
        return _json({})
    tag, sha = json.loads(request.body)["tag"], repository.find(name).sha  # here the address has what the tag is put on
    if tag in repository.tags:
        raise Refusal(409, f"Tag reference exists already: {tag}")
    repository.tags[tag] = sha
    return _json({})


@_route("POST", rf"{_API}/preupload/{_REVISION}")
def _preupload(hub, request, kind, repo, revision):
    repository = hub._repository(request, kind, repo, write=True)
    files, answers = repository.find(revision).files, []
    for offer in json.loads(request.body)["files"]:
        path = offer["path"]
        repository.named.add(path)
        answers.append({"path": path, "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular", "shouldIgnore": False})
        if path in files:  # the client leaves out what has not changed
            answers[-1]["oid"] = (_sha256 if _is_lfs(path, files[path]) else _git_oid)(files[path])
    return _json({"files": answers})


@_route("POST", rf"{_PAGE}\.git/info/lfs/objects/batch")
def _lfs_batch(hub, request, kind, repo):
    hub._repository(request, kind, repo, write=True)
    wanted = [{"oid": item["oid"], "size": item["size"]} for item in json.loads(request.body)["objects"]]
    for item in wanted:
        if item["oid"] not in hub.store:
            item["actions"] = {"upload": {"href": f"{hub.storage_url}/lfs/{item['oid']}"}}
    return _json({"transfer": "basic", "objects": wanted})


@_route("POST", rf"{_API}/commit/{_REVISION}")
def _commit(hub, request, kind, repo, revision):
    repository = hub._repository(request, kind, repo, write=True)
    if "create_pr" in request.query:
        raise Refusal(501, "The double has no pull requests")
    if revision not in repository.branches:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    head, files = {}, dict(repository.find(revision).files)
    for line in request.body.splitlines():
        key, value = (item := json.loads(line))["key"], item["value"]
        path = value.get("path")
        repository.named.update([path] if path else [])
        if key == "header":
            head = value
            if not repository.branches[revision].startswith(value.get("parentCommit", "")):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        elif key == "file":
            files[path] = base64.b64decode(value["content"], validate=True)
        elif key == "lfsFile":
            if value["oid"] not in hub.store:
                raise Refusal(400, f"LFS pointer of {path} points to a file that does not exist")
            files[path] = hub.store[value["oid"]]
        else:
            folder = f"{path.rstrip('/')}/" if key == "deletedFolder" else None
            gone = [name for name in files if name == path or (folder and name.startswith(folder))]
            if not gone:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            files = {name: data for name, data in files.items() if name not in gone}
    sha = repository.commit(files, head["summary"], head["description"], revision).sha
    return _json({"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{_key(kind, repo)}/commit/{sha}"})


@_route("GET|HEAD", rf"{_PAGE}/resolve/{_REVISION}/(?P<path>.+)")
def _resolve(hub, request, kind, repo, revision, path):
    commit = hub._repository(request, kind, repo, content=True).find(revision)
    headers = {"X-Repo-Commit": commit.sha}
    if path not in commit.files:
        refusal = Refusal(404, "Entry not found", "EntryNotFound")
        refusal.answer.headers.update(headers)  # by which the client remembers that there is none
        raise refusal
    data = commit.files[path]
    if not _is_lfs(path, data):
        return Answer(data, 200, {**headers, "ETag": f'"{_git_oid(data)}"'})
    linked = {"X-Linked-Etag": f'"{_sha256(data)}"', "X-Linked-Size": str(len(data))}
    return Answer(b"", 302, {**headers, **linked, "Location": f"{hub.storage_url}/lfs/{_sha256(data)}"})


@_route("GET|HEAD|PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def _storage(hub, request, oid):
    if request.host != "storage" or "authorization" in request.headers:
        raise Refusal(400, "Only one auth mechanism allowed")  # what S3 says to a token beside a signed address
    if request.method == "PUT":
        if _sha256(request.body) != oid:
            raise Refusal(400, "The content does not have this SHA-256")
        hub.store[oid] = request.body
        return Answer()
    if oid not in hub.store:
        raise Refusal(404, "No such object")
    return Answer(hub.store[oid], 200, {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


# HTTP.


class _Server(ThreadingHTTPServer):
    request_queue_size = 64

    def __init__(self, hub: HubDouble, host: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.host, self.open = hub, host, set()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def get_request(self):
        connection, address = super().get_request()
        self.open.add(connection)
        return connection, address

    def shutdown_request(self, request):
        self.open.discard(request)
        super().shutdown_request(request)

    def stop(self):
        self.shutdown()
        self.server_close()
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        """Of a client that has gone, which tests want; what else goes wrong has been answered."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def serve(self):
        hub, url = self.server.hub, urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.server.host, self.command, url.path, parse_qs(url.query), headers)
        with hub.lock:
            hub.requests.append(request)
            fault = hub._fault_of(request)
        size = int(headers.get("content-length", 0))
        request.body = self.rfile.read(size // 2 if fault == "cut" else size)
        if fault == "cut" or len(request.body) < size:
            self.close_connection = True  # half a request does nothing
            return
        with hub.lock:
            answer = _answer(hub, request, fault)
        request.status = answer.status
        self.send(request, answer, cut=fault == "cut_answer")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def send(self, request: Request, answer: Answer, cut: bool):
        body = answer.body
        start = re.match(r"bytes=(\d+)-$", request.headers.get("range", ""))  # the only form the client uses
        if start and answer.status == 200 and int(start[1]) < len(body):
            answer.headers["Content-Range"] = f"bytes {start[1]}-{len(body) - 1}/{len(body)}"
            body, request.status = body[int(start[1]) :], 206
        self.send_response(request.status)
        for name, value in {**answer.headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if request.method != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut


def _answer(hub: HubDouble, request: Request, fault) -> Answer:
    try:
        if isinstance(fault, int):
            raise Refusal(fault, "The test wants it")
        if callable(fault):
            fault()
        if "transfer-encoding" in request.headers:
            raise Refusal(411, "The double wants a Content-Length")
        for method, pattern, function in ROUTES:
            if request.method in method.split("|") and (match := pattern.fullmatch(request.path)):
                return function(hub, request, **{name: value and unquote(value) for name, value in match.groupdict().items()})
        raise Refusal(501, f"The double does not serve {request.method} {request.path}")
    except Refusal as refusal:
        return refusal.answer
    except Exception:
        return Refusal(500, " ".join(traceback.format_exc().split())).answer
