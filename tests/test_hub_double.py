"""The double of the Hub, by the real client: what other tests may believe of it. And the environment of a stranger.

Importing is most of the time, so each subprocess does many things, and the tests read its report.
"""

import hashlib
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hub_double import LFS_GET, OTHER, READER, WRITER, HubDouble
from stranger import make_stranger, run

# The client resumes a download from the last whole piece of 10 MiB.
WEIGHTS = {"whole": b"w" * 3_000_000, "cut": b"c" * 3_000_000, "mended": b"m" * 3_000_000, "resumed": b"r" * 24_000_000}
FIRST = {"a.txt": b"first\n", "empty.safetensors": b"", "unet/model.safetensors": WEIGHTS["whole"]}

HELPERS = """
import json, sys, time
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
time.sleep = lambda seconds: None  # between the client's attempts
api, report = HfApi(), {}

def error(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        return [type(error).__name__, status]

def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes().hex() for path in Path(folder).rglob("*") if path.is_file()}

def commit(repo, name, data, **options):
    operations = [CommitOperationAdd(name, data)]
    return api.create_commit(repo, operations, commit_message="by the client", **options).oid
"""
ORDINARY = """
folder, other, wrong = sys.argv[1:]
api.create_repo("user/model", private=True)
api.create_repo("user/model", exist_ok=True)
first = api.upload_folder(repo_id="user/model", folder_path=folder).oid
report["first"], report["name"] = first, api.whoami()["name"]
report["downloaded"] = content(snapshot_download("user/model"))
report["unchanged"] = api.upload_folder(repo_id="user/model", folder_path=folder).oid
api.create_tag("user/model", tag="v1/small")
(Path(folder) / "a.txt").write_text("second")
api.upload_folder(repo_id="user/model", folder_path=folder, delete_patterns="empty.*")
Path(folder, "empty.safetensors").unlink()
report["second"] = api.upload_folder(repo_id="user/model", folder_path=folder, delete_patterns="empty.*").oid
for revision in ("main", "v1/small", first, first[:8], report["second"]):
    report["at " + revision] = Path(hf_hub_download("user/model", "a.txt", revision=revision)).read_text()
report["listed"] = api.list_repo_files("user/model", revision="v1/small")
report["listed now"] = [file.path for file in api.list_repo_tree("user/model", "unet")]
report["tags"] = {tag.name: tag.target_commit for tag in api.list_repo_refs("user/model").tags}
info = api.model_info("user/model", files_metadata=True)
report["info"] = [info.private, {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}]

errors = report["errors"] = {}
errors["exists"] = error(api.create_repo, "user/model")
errors["no file"] = error(hf_hub_download, "user/model", "none.txt")
errors["no folder"] = error(lambda: list(api.list_repo_tree("user/model", "none")))
errors["no revision"] = error(snapshot_download, "user/model", revision="none")
errors["no repository"] = error(api.model_info, "user/none")
errors["no repository, no token"] = error(api.model_info, "user/none", token=False)
errors["private, no token"] = error(api.model_info, "user/model", token=False)
errors["private file, no token"] = error(hf_hub_download, "user/model", "unet/model.safetensors", token=False)
errors["private, token of another"] = error(api.model_info, "user/model", token=other)
errors["private, wrong token"] = error(api.model_info, "user/model", token=wrong)
errors["gated, no token"] = error(hf_hub_download, "user/gated", "a.txt", token=False)
errors["gated, token of another"] = error(hf_hub_download, "user/gated", "a.txt", token=other)
errors["upload, no token"] = error(commit, "user/gated", "b.txt", b"b", token=False)
errors["upload, token of another"] = error(commit, "user/gated", "b.txt", b"b", token=other)
errors["create elsewhere"] = error(api.create_repo, "other/model")
errors["parent has moved"] = error(commit, "user/model", "a.txt", b"third", parent_commit=first)
errors["tag exists"] = error(api.create_tag, "user/model", tag="v1/small")
api.delete_tag("user/model", tag="v1/small")
errors["tag is gone"] = error(api.delete_tag, "user/model", tag="v1/small")
print(json.dumps(report))
"""
FAULTY = """
weights = {path.name: path.read_bytes() for path in Path(sys.argv[1]).iterdir()}
report["PUT cut always"] = error(commit, "user/a", "model.safetensors", weights["cut"])
report["PUT cut once"] = error(commit, "user/b", "model.safetensors", weights["mended"])
report["commit cut"] = error(commit, "user/c", "a.txt", b"second")
report["answer cut"] = error(commit, "user/d", "a.txt", b"second")
report["busy"] = error(commit, "user/e", "a.txt", b"second")
report["busy too long"] = error(commit, "user/f", "a.txt", b"second")
report["overtaken"] = error(commit, "user/g", "a.txt", b"second", parent_commit=api.model_info("user/g").sha)
report["download cut"] = Path(hf_hub_download("user/h", "model.safetensors")).read_bytes() == weights["resumed"]
print(json.dumps(report))
"""
PUSH = """
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
torch.manual_seed(0)
blocks = dict(block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, add_attention=False, **blocks)
DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=10)).push_to_hub("user/ddpm")
"""
LOAD = """
import hashlib, importlib.util, sys, torch
from diffusers import AutoencoderKL, DDPMPipeline, DiffusionPipeline, UNet2DModel
pipe = DiffusionPipeline.from_pretrained("user/ddpm", local_files_only="offline" in sys.argv)
assert type(pipe) is DDPMPipeline and type(pipe.unet) is UNet2DModel
images = pipe(generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
print(hashlib.sha256(images.tobytes()).hexdigest())
print([name for name in ("diffusers_edu", "transformers", "accelerate") if importlib.util.find_spec(name)])
try:
    import diffusers_edu
except ModuleNotFoundError as error:
    print(error)
"""


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def python(code, *arguments, env):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    """A hub after ordinary use and after requests that it refuses, and what the client reports."""
    folder = tmp_path_factory.mktemp("ordinary")
    for path, data in FIRST.items():
        (folder / "model" / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / "model" / path).write_bytes(data)
    with HubDouble() as hub:
        hub.snapshot("user/gated", {"a.txt": "for friends"})
        hub.repositories["user/gated"].gated = True
        env = hub.environment(folder / "cache", token=WRITER)
        yield hub, json.loads(python(HELPERS + ORDINARY, folder / "model", OTHER, "no-such-token", env=env))


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """A hub on which each repository meets one fault, and what the client reports."""
    with HubDouble() as hub:
        for name in "abcdefg":
            hub.snapshot(f"user/{name}", {"a.txt": "first"})
        hub.snapshot("user/h", {"model.safetensors": WEIGHTS["resumed"]})
        hub.fault(f"PUT /lfs/{sha256(WEIGHTS['cut'])}", "cut", times=math.inf)
        hub.fault(f"PUT /lfs/{sha256(WEIGHTS['mended'])}", "cut")
        hub.fault("/user/c/commit/", "cut")
        hub.fault("/user/d/commit/", "cut_answer")
        hub.fault("/user/e/preupload/", 503, times=2)
        hub.fault("/user/f/preupload/", 429, times=math.inf)
        hub.fault("/user/g/commit/", lambda: hub.snapshot("user/g", {"a.txt": "of somebody else"}))
        hub.fault(LFS_GET, "cut_answer")
        weights = tmp_path_factory.mktemp("weights")
        for name, data in WEIGHTS.items():
            (weights / name).write_bytes(data)
        env = hub.environment(tmp_path_factory.mktemp("faulty"), token=WRITER)
        yield hub, json.loads(python(HELPERS + FAULTY, weights, env=env))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What four processes print that load one pipeline: ours and a stranger's, from the hub and after its end."""
    folder = tmp_path_factory.mktemp("loaded")
    stranger = make_stranger(folder / "stranger")
    with HubDouble() as hub:
        ours, theirs = hub.environment(folder / "ours"), hub.environment(folder / "theirs")
        reports = {"ours": python(PUSH + LOAD, env={**ours, "HF_TOKEN": WRITER})}
        before = len(hub.requests)
        reports["stranger"] = run(stranger, LOAD, env=theirs)
        anonymous = hub.requests[before:]
        hub.stop()
        requests = len(hub.requests)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(python, LOAD, "offline", env=ours)
            reports["stranger, offline"] = run(stranger, LOAD, "offline", env=theirs)
            reports["ours, offline"] = waiting.result()
        assert len(hub.requests) == requests
        yield hub, anonymous, {name: report.splitlines() for name, report in reports.items()}


def test_a_folder_comes_back_byte_for_byte_and_its_weights_went_through_the_storage(ordinary):
    hub, report = ordinary
    assert report["name"] == "user"
    assert hub.files("user/model", report["first"]).items() >= FIRST.items()
    attributes = hub.files("user/model", report["first"])[".gitattributes"]
    assert report["downloaded"] == {path: data.hex() for path, data in {**FIRST, ".gitattributes": attributes}.items()}
    puts = [request for request in hub.requests if request.method == "PUT"]
    assert [(request.host, request.path, len(request.body)) for request in puts] == [
        ("storage", f"/lfs/{sha256(WEIGHTS['whole'])}", 3_000_000)
    ]
    assert report["info"] == [True, {"unet/model.safetensors": sha256(WEIGHTS["whole"])}]
    assert hub.repositories["user/model"].named == FIRST.keys()


def test_a_commit_is_a_revision_for_good_found_by_tag_and_by_long_and_short_sha(ordinary):
    hub, report = ordinary
    first, second = report["first"], report["second"]
    revisions = {"main": "second", "v1/small": "first\n", first: "first\n", first[:8]: "first\n", second: "second"}
    assert {name: report[f"at {name}"] for name in revisions} == revisions
    assert report["listed"] == [".gitattributes", *FIRST] and report["tags"] == {"v1/small": first}
    assert report["listed now"] == ["unet/model.safetensors"]
    assert [commit.sha for commit in hub.commits("user/model")[:1]] == [second]
    assert "empty.safetensors" not in hub.files("user/model") and "empty.safetensors" in hub.files("user/model", first)


def test_what_has_not_changed_makes_no_commit(ordinary):
    hub, report = ordinary
    assert report["unchanged"] == report["first"]
    sent = [request for request in hub.requests if "/user/model/commit/" in request.path and request.status == 200]
    assert len(hub.commits("user/model")) == len(sent) + 1  # the first is the repository's own, of its attributes


def test_every_refusal_reaches_the_client_as_the_error_it_knows(ordinary):
    assert ordinary[1]["errors"] == {
        "exists": ["HfHubHTTPError", 409],
        "no file": ["RemoteEntryNotFoundError", 404],
        "no folder": ["RemoteEntryNotFoundError", 404],
        "no revision": ["RevisionNotFoundError", 404],
        "no repository": ["RepositoryNotFoundError", 404],
        "no repository, no token": ["RepositoryNotFoundError", 401],
        "private, no token": ["RepositoryNotFoundError", 401],
        "private file, no token": ["RepositoryNotFoundError", 401],
        "private, token of another": ["RepositoryNotFoundError", 404],
        "private, wrong token": ["HfHubHTTPError", 401],
        "gated, no token": ["GatedRepoError", 401],
        "gated, token of another": ["GatedRepoError", 403],
        "upload, no token": ["RepositoryNotFoundError", 401],
        "upload, token of another": ["HfHubHTTPError", 403],
        "create elsewhere": ["HfHubHTTPError", 403],
        "parent has moved": ["HfHubHTTPError", 412],
        "tag exists": ["HfHubHTTPError", 409],
        "tag is gone": ["RevisionNotFoundError", 404],
    }


def test_a_request_that_breaks_off_leaves_the_branch_and_every_file_as_they_were(faulty):
    hub, report = faulty
    assert report["PUT cut always"][0] == "RuntimeError" and report["commit cut"][0] == "RemoteProtocolError"
    for name in "ac":
        assert len(hub.commits(f"user/{name}")) == 1 and hub.files(f"user/{name}") == {"a.txt": b"first"}
    assert sha256(WEIGHTS["cut"]) not in hub.store
    halves = [request for request in hub.requests if request.path.endswith(sha256(WEIGHTS["cut"]))]
    assert {(len(request.body), request.status) for request in halves} == {(1_500_000, None)}


def test_the_client_mends_a_short_fault_and_not_a_long_one(faulty):
    hub, report = faulty
    assert report["PUT cut once"] is None and hub.files("user/b")["model.safetensors"] == WEIGHTS["mended"]
    assert report["busy"] is None and hub.files("user/e") == {"a.txt": b"second"}
    assert report["busy too long"] == ["HfHubHTTPError", 429] and hub.files("user/f") == {"a.txt": b"first"}
    assert report["download cut"] is True
    assert [request.status for request in hub.requests if request.method == "GET" and request.host == "storage"] == [200, 206]


def test_a_commit_whose_answer_is_lost_has_been_made(faulty):
    hub, report = faulty
    assert report["answer cut"][0] == "RemoteProtocolError" and hub.files("user/d") == {"a.txt": b"second"}


def test_who_is_overtaken_between_look_and_commit_is_told(faulty):
    hub, report = faulty
    assert report["overtaken"] == ["HfHubHTTPError", 412] and hub.files("user/g") == {"a.txt": b"of somebody else"}


def test_a_pushed_pipeline_draws_the_same_pixels_everywhere_and_without_the_hub(loaded):
    hub, _, reports = loaded
    assert {"model_index.json", "README.md", "unet/diffusion_pytorch_model.safetensors"} <= hub.files("user/ddpm").keys()
    assert len({report[0] for report in reports.values()}) == 1 and len(reports) == 4


def test_a_stranger_has_diffusers_and_neither_this_project_nor_what_only_it_needs(loaded):
    *_, reports = loaded
    for name in ("stranger", "stranger, offline"):
        assert reports[name][1:] == ["[]", "No module named 'diffusers_edu'"]
    assert reports["ours"][1] == "['diffusers_edu', 'transformers', 'accelerate']"


def test_no_token_is_sent_to_the_storage_and_none_at_all_by_who_has_none(ordinary, loaded):
    hubs = (ordinary[0], loaded[0])
    assert not [
        request for hub in hubs for request in hub.requests if request.host == "storage" and "authorization" in request.headers
    ]
    anonymous = loaded[1]
    assert {"hub", "storage"} == {request.host for request in anonymous}
    assert not any("authorization" in request.headers for request in anonymous)
    assert any(request.headers.get("authorization") == f"Bearer {WRITER}" for request in loaded[0].requests)


def test_the_environment_of_a_subprocess_carries_no_token_of_ours(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "ours")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    with HubDouble() as hub:
        env = hub.environment(tmp_path)
        assert "ours" not in env.values() and "HTTPS_PROXY" not in env and "HF_HUB_OFFLINE" not in env
        assert env["HF_ENDPOINT"] == hub.url and env["HF_HOME"] == str(tmp_path)
        assert hub.environment(tmp_path, token=READER)["HF_TOKEN"] == READER
