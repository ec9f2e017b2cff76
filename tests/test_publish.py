"""Publishing and loading by the real client of the Hub and diffusers' own download, against the double of the Hub.

What loads what, in which form and by whom, is the table MATRIX. To import diffusers takes longer than all that is asked of it here, so
a few interpreters stay for the whole file: the author's, who has this project, and those of strangers, who have not.
"""

import inspect
import json
import re
import subprocess
import sys
import threading
from math import inf
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hub_double import COMMIT, LFS_PUT, OTHER, READER, WRITER, HubDouble, Refusal
from safetensors.torch import load, save
from stranger import make_stranger
from test_pipelines import build, make_latent, make_stock_vae, make_unet
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_edu import EduDDPMScheduler, StackedDAEPipeline, StackedDenoisingAutoencoder
from diffusers_edu.errors import UsageError
from diffusers_edu.hub.publish import publish
from diffusers_edu.publishing import export_run
from diffusers_edu.rungs import configuration

pytestmark = pytest.mark.slow

NO_STACK = "no class with the architecture of StackedDenoisingAutoencoder (model); diffusers has no pipeline that samples as StackedDAE"
NO_VAE = "no class with the architecture of VariationalAutoencoder (vae)"
MATRIX = {
    # The class that a publication loads as, in each form; or why the rung has no such form.
    #                                   plugin                     self-contained             portable
    "dae":                             ("StackedDAEPipeline",      "StackedDAEPipeline",      NO_STACK),
    "stacked_dae":                     ("StackedDAEPipeline",      "StackedDAEPipeline",      NO_STACK),
    "noisy_stacked_dae":               ("StackedDAEPipeline",      "StackedDAEPipeline",      NO_STACK),
    "vae":                             ("VAEPipeline",             "VAEPipeline",             NO_VAE),
    "ddpm":                            ("DDPMPipeline",            "DDPMPipeline",            "DDPMPipeline"),
    "latent_diffusion":                ("LatentDiffusionPipeline", "LatentDiffusionPipeline", NO_VAE),
    "latent_diffusion_of_a_stock_vae": ("LatentDiffusionPipeline", "LatentDiffusionPipeline", "LDMPipeline"),
}  # fmt: skip
FORMS = {
    # Who loads it; with trust_remote_code or not; how far its pixels may lie from the original's; how it fails for a stranger without.
    "plugin": ("author", False, 0.0, "diffusers_edu|module diffusers has no attribute [A-Za-z]+Pipeline"),
    "self-contained": ("stranger", True, 0.0, "trust_remote_code=True"),
    "portable": ("stranger", False, 1e-3, None),
}
PUBLISHED = [(rung, form) for rung, row in MATRIX.items() for form, cell in zip(FORMS, row, strict=True) if " " not in cell]
REFUSED = [(rung, form, cell) for rung, row in MATRIX.items() for form, cell in zip(FORMS, row, strict=True) if " " in cell]


def short(pipe, **config):
    """The pipeline with a process of 20 steps, so that sampling with all of them, as the card's snippet does, is quick."""
    pipe.scheduler = EduDDPMScheduler(num_train_timesteps=20, **config)
    return pipe


def one_stage():
    torch.manual_seed(0)
    return StackedDAEPipeline(StackedDenoisingAutoencoder(1, 8, num_stages=1, fresh_noise=False, block_out_channels=(8,)))


def latent_of_stock_vae():
    """`LDMPipeline` would not add a shift_factor, so the stock VAE has none here."""
    torch.manual_seed(0)
    vae = make_stock_vae()
    vae.register_to_config(shift_factor=None)
    return short(make_latent(vae=lambda channels: vae), clip_sample=False)


PIPELINES = {
    "dae": one_stage,
    "stacked_dae": lambda: build("stacked_dae"),
    "noisy_stacked_dae": lambda: build("noisy_stacked_dae"),
    "vae": lambda: build("vae"),
    "ddpm": lambda: short(build("ddpm")),
    "latent_diffusion": lambda: short(build("latent"), clip_sample=False),
    "latent_diffusion_of_a_stock_vae": latent_of_stock_vae,
}


def drawn(pipe, **options):
    """Two images of the global seed 0: `LDMPipeline` hands no generator on to its scheduler."""
    pipe.set_progress_bar_config(disable=True)
    if "num_inference_steps" in inspect.signature(pipe.__call__).parameters:
        options["num_inference_steps"] = 3
    if "batch_size" in inspect.signature(pipe.__call__).parameters:
        options["batch_size"] = 2
    torch.manual_seed(0)
    return pipe(output_type="np", **options).images.tolist()


PRELUDE = f"""
import inspect, os, time
import torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
time.sleep = lambda seconds: None  # between the client's attempts

{inspect.getsource(drawn)}
def failure(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"
"""
LOOP = """
import json, os, sys, tempfile, traceback
answers, prelude = os.fdopen(os.dup(1), "w"), {}
for line in sys.stdin:
    code, token, names = json.loads(line)
    os.environ.update(HF_TOKEN=token) if token else os.environ.pop("HF_TOKEN", None)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        names, failed = {"__name__": "session", **prelude, **names}, None
        try:
            exec(code, names)
        except BaseException:
            failed = traceback.format_exc()
        sys.stdout.flush(), sys.stderr.flush()
        prelude = prelude or names
        out.seek(0), err.seek(0)
        print(json.dumps([names.get("answer"), failed, out.read(), err.read()]), file=answers, flush=True)
"""
COMMAND = """
from diffusers_edu.cli import main
try:
    answer = main(arguments) or 0
except SystemExit as stop:
    answer = stop.code
"""


class Failed(Exception):
    """What a session was asked to do raised an error."""


class Session:
    """An interpreter that stays. `session(code, token, name=value)` gives what the code leaves in `answer`; all of it as JSON."""

    def __init__(self, python, environment, folder):
        self.said = []  # on stdout and stderr
        command, pipe = [str(python), "-I", "-c", LOOP], subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, cwd=folder, text=True, stdin=pipe, stdout=pipe)
        self.send(PRELUDE)  # its imports take a while, and nobody waits
        self.waiting = 1

    def send(self, code, token=None, **given):
        self.process.stdin.write(json.dumps([code, token, given]) + "\n")
        self.process.stdin.flush()

    def receive(self):
        watchdog = threading.Timer(200, self.process.kill)
        watchdog.start()
        line = self.process.stdout.readline()
        watchdog.cancel()
        if not line:
            raise Failed("the session has ended")
        answer, failed, out, err = json.loads(line)
        self.said += [out, err]
        if failed:
            raise Failed(failed)
        return answer, out, err

    def ask(self, code, token=None, **given):
        while self.waiting:
            self.waiting -= 1
            self.receive()
        self.send(code, token, **given)
        return self.receive()

    def __call__(self, code, token=None, **given):
        return self.ask(code, token, **given)[0]

    def command(self, *arguments, token=WRITER):
        """A command of ours: its exit status and what it printed, on the level of the process."""
        status, out, err = self.ask(COMMAND, token, arguments=list(map(str, arguments)))
        return SimpleNamespace(status=status, out=out, err=err)

    def close(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def hub():
    with HubDouble() as hub:
        yield hub


class People(dict):
    """Sessions by name, each begun when it is first asked for."""

    def __init__(self, who):
        self.who = who

    def __missing__(self, name):
        self[name] = Session(*self.who[name])
        return self[name]


@pytest.fixture(scope="module")
def people(hub, tmp_path_factory):
    """Who has which packages, each with a cache of their own; the last two cannot reach the Hub, and have what the first two had."""
    folder = tmp_path_factory.mktemp("people")
    with HubDouble() as gone:
        nobody = {"HF_ENDPOINT": gone.url}
    alone, with_transformers = make_stranger(folder / "alone"), make_stranger(folder / "more", "transformers")
    author, stranger, other = (hub.environment(folder / f"cache-{i}") for i in range(3))
    people = People({
        "author": (sys.executable, author, folder),
        "stranger": (alone, stranger, folder),
        "stranger with transformers": (with_transformers, other, folder),
        "author, offline": (sys.executable, {**author, **nobody}, folder),
        "stranger, offline": (alone, {**stranger, **nobody}, folder),
    })  # fmt: skip
    yield people
    for session in people.values():
        session.close()


@pytest.fixture
def author(hub, people):
    hub.faults.clear()
    return people["author"]


LOAD = """
from huggingface_hub import snapshot_download
answer = {}
for case in cases:
    names = {}
    exec(case["snippet"], names)  # of the card: it loads from the Hub, and draws
    folder = DiffusionPipeline.from_pretrained(case["folder"], trust_remote_code=case["trust"])
    answer[case["name"]] = {
        "class": type(names["pipe"]).__name__,
        "number": len(names["images"]),
        "from the Hub": drawn(names["pipe"]),
        "from the folder": drawn(folder),
    }
    if not case["found_by_name"]:
        snapshot_download(case["repository"], revision=case["revision"])  # for later, as its card says
"""
LOAD_OFFLINE = """
from huggingface_hub import snapshot_download
answer = {}
for case in cases:
    names, cached = [case["repository"]], {"revision": case["revision"], "local_files_only": True}
    if not case["found_by_name"]:
        names.append(snapshot_download(case["repository"], **cached))
    options = {"trust_remote_code": case["trust"], **cached}
    answer[case["name"]] = {"offline, by name": failure(DiffusionPipeline.from_pretrained, names[0], **options)}
    answer[case["name"]]["offline"] = drawn(DiffusionPipeline.from_pretrained(names[-1], **options))
"""
DO_NOT_LOAD = """
answer = {}
for case in cases:
    places = {"Hub": (case["repository"], {"revision": case["revision"]}), "folder": (case["folder"], {})}
    answer[case["name"]] = {
        place: failure(DiffusionPipeline.from_pretrained, name, **options) for place, (name, options) in places.items()
    }
"""


def card_of(hub, repository):
    return hub.files(repository)["README.md"].decode()


def snippet_in(card):
    return re.search("```python\n(.*?)```", card, re.DOTALL)[1]


def revision_in(card):
    return re.search('revision="([^"]+)"', card)[1]


@pytest.fixture(scope="module")
def loaded(hub, people, tmp_path_factory):
    """All of MATRIX, exported, published and loaded: the pixels of the originals, and what everyone reports."""
    root, cases, originals = tmp_path_factory.mktemp("loaded"), [], {}
    for who in ("author", "stranger", "author, offline", "stranger, offline"):
        assert people[who]  # they begin while the pipelines are made
    for rung, make in PIPELINES.items():
        pipe = make()
        pipe.save_pretrained(root / "runs" / rung)
        originals[rung] = np.array(drawn(pipe))
    for rung, form in PUBLISHED:
        name = f"{rung}-{form}"
        export_run(root / "runs" / rung, root / name, form, repository="user/another-name")
        case = {"name": name, "repository": f"user/{name}", "folder": str(root / name), "form": form, "trust": FORMS[form][1]}
        # A limit of diffusers: for a pipeline class that comes with the repository, it asks the Hub even with local_files_only.
        cases.append({**case, "found_by_name": not (root / name / "pipeline.py").exists()})
    for case in cases:
        done = people["author"].command("publish", case["folder"], "--repo_id", case["repository"])
        assert done.status == 0, done.err
        card = card_of(hub, case["repository"])
        case.update(snippet=snippet_in(card), revision=revision_in(card))
    report = {"does not load": people["stranger"](DO_NOT_LOAD, cases=[case for case in cases if FORMS[case["form"]][3]])}
    for who in ("author", "stranger"):
        theirs = [case for case in cases if FORMS[case["form"]][0] == who]
        report |= people[who](LOAD, cases=theirs)
        code = "import diffusers_edu\n" if who == "author" else ""
        for name, found in people[f"{who}, offline"](code + LOAD_OFFLINE, cases=theirs).items():
            report[name] |= found
    return originals, report, {case["name"]: case for case in cases}


@pytest.mark.parametrize("rung, form", PUBLISHED)
def test_a_publication_loads_by_the_snippet_of_its_card_and_draws_the_pixels_of_the_original(rung, form, loaded):
    originals, report, _ = loaded
    found = report[f"{rung}-{form}"]
    assert found["class"] == MATRIX[rung][list(FORMS).index(form)]
    assert found["number"] == 16
    assert np.ptp(originals[rung]) > 0.01
    tolerance = FORMS[form][2]
    for how in ("from the Hub", "from the folder", "offline"):
        assert abs(np.array(found[how]) - originals[rung]).max() <= tolerance, how


@pytest.mark.parametrize("rung, form", [case for case in PUBLISHED if FORMS[case[1]][3]])
def test_a_stranger_who_lacks_the_plugin_or_the_trust_is_told(rung, form, loaded):
    _, report, _ = loaded
    failures = report["does not load"][f"{rung}-{form}"]
    for place in ("Hub", "folder"):
        assert re.search(FORMS[form][3], failures[place])


@pytest.mark.parametrize("rung, form", PUBLISHED)
def test_offline_its_name_is_enough_unless_its_pipeline_class_lies_in_the_repository(rung, form, loaded):
    _, report, cases = loaded
    name = f"{rung}-{form}"
    assert cases[name]["found_by_name"] == (form != "self-contained" or rung == "ddpm")
    error = report[name]["offline, by name"]
    assert error is None if cases[name]["found_by_name"] else error.startswith("ConnectError: ")


@pytest.mark.parametrize("rung, form, reason", REFUSED)
def test_a_form_that_a_rung_does_not_have_is_refused_with_the_reason(rung, form, reason, tmp_path):
    PIPELINES[rung]().save_pretrained(tmp_path / "run")
    with pytest.raises(UsageError, match=re.escape(reason)):
        export_run(tmp_path / "run", tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("who", ["stranger", "stranger, offline", "stranger with transformers"])
def test_a_stranger_has_not_this_project(who, people):
    with pytest.raises(Failed, match="ModuleNotFoundError: No module named 'diffusers_edu'"):
        people[who]("import diffusers_edu")
    found = people[who]("import importlib.util; answer = importlib.util.find_spec('transformers') is not None")
    assert found == (who == "stranger with transformers")


VAE = "vae/diffusion_pytorch_model.safetensors"


def other(pipe, factor=2.0):
    """The pipeline with other weights."""
    with torch.no_grad():
        for component in pipe.components.values():
            for weight in component.parameters() if isinstance(component, torch.nn.Module) else ():
                weight.mul_(factor)
    return pipe


def exported(folder, pipe, form="plugin"):
    pipe.save_pretrained(folder / "run")
    export_run(folder / "run", folder / form, form)
    return folder / form


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def done(command):
    assert command.status == 0, command.err
    return command


def refused(command):
    """The line in which a command says what stands in its way; what a library says before it is left out."""
    assert command.status == 2
    *_, line = command.err.strip().splitlines()
    assert line.startswith("diffusers-edu: error: ")
    assert "Traceback" not in command.err
    return line.removeprefix("diffusers-edu: error: ")


def seen(author, repository, **options):
    """What the author sees who loads it."""
    code = "import diffusers_edu; answer = drawn(DiffusionPipeline.from_pretrained(repository, **options))"
    return author(code, WRITER, repository=repository, options=options)


def test_a_revision_keeps_its_pixels_and_the_same_content_its_name(hub, author, tmp_path):
    pipes, revisions = [build("vae"), other(build("vae"))], {}
    folders = [exported(tmp_path / str(i), pipe) for i, pipe in enumerate(pipes)]
    for i, folder in enumerate(folders):
        assert done(author.command("publish", folder, "--repo_id", "user/pinned")).out == f"{hub.url}/user/pinned\n"
        revisions[revision_in(card_of(hub, "user/pinned"))] = revisions[hub.commits("user/pinned")[0].sha] = drawn(pipes[i])
    assert len(revisions) == 4
    tags = dict(hub.repositories["user/pinned"].tags)
    assert set(tags) | set(tags.values()) == revisions.keys()
    done(author.command("publish", folders[1], "--repo_id", "user/pinned"))
    assert len(hub.commits("user/pinned")) == 3
    done(author.command("publish", folders[0], "--repo_id", "user/pinned"))  # as it was at first
    assert hub.repositories["user/pinned"].tags == tags
    for revision, pixels in revisions.items():
        assert seen(author, "user/pinned", revision=revision) == pixels
    assert seen(author, "user/pinned") == drawn(pipes[0])


def test_the_tag_is_that_of_what_was_uploaded_whatever_was_changed_after_the_export(hub, author, tmp_path):
    folder = exported(tmp_path, build("vae"))
    before = revision_in((folder / "README.md").read_text())
    (folder / "notes.txt").write_text("a note")
    done(author.command("publish", folder, "--repo_id", "user/edited"))
    after = revision_in(card_of(hub, "user/edited"))
    assert before != after
    assert before not in card_of(hub, "user/edited")
    assert hub.repositories["user/edited"].tags == {after: hub.commits("user/edited")[0].sha}


WRONG = "hf_" + "x" * 34


@pytest.mark.parametrize("repository, token, says", [
    ("user/new", None, "you are not logged in to the Hub"),
    ("user/new", WRONG, "user/new was not published: the Hub knows no such repository, or not your token"),
    ("user/new", READER, "user/new was not published: your token may not write to user/new"),
    ("user/mine", READER, "user/mine was not published: your token may not write to user/mine"),
    ("other/new", WRITER, "other/new was not published: your token may not write to other/new"),
    ("other/theirs", WRITER, "other/theirs was not published: your token may not write to other/theirs"),
    ("other/hidden", WRITER, "other/hidden was not published: "),
])  # fmt: skip
def test_who_may_not_publish_is_told_in_a_line(repository, token, says, hub, author, tmp_path):
    hub.snapshot("user/mine", {"a.txt": "a"})
    hub.snapshot("other/theirs", {"a.txt": "a"})
    hub.snapshot("other/hidden", {"a.txt": "a"}, private=True)
    before, asked = {name: repo.branches.copy() for name, repo in hub.repositories.items()}, len(hub.requests)
    folder = exported(tmp_path, build("vae"))
    command = author.command("publish", folder, "--repo_id", repository, token=token)
    assert refused(command).startswith(says)
    assert len(command.err.splitlines()) == 1
    assert {name: repo.branches for name, repo in hub.repositories.items()} == before
    assert token or len(hub.requests) == asked
    no_token_was_told(hub, author)


def no_token_was_told(hub, author):
    for token in (WRITER, READER, OTHER, WRONG):
        assert token not in "".join(author.said)
        assert not [request for request in hub.requests if token.encode() in request.body]
        assert not [request for request in hub.requests if request.host == "storage" and token in str(request.headers)]


def test_a_token_that_an_error_repeats_is_not_told(hub, author, tmp_path):
    def repeat():
        raise Refusal(400, f"{WRITER} and {WRONG} may not")

    folder = exported(tmp_path, build("vae"))
    hub.fault("/preupload/", repeat)
    message = refused(author.command("publish", folder, "--repo_id", "user/repeated"))
    assert message.startswith("user/repeated was not published: ")
    assert message.endswith("*** and hf_*** may not")
    no_token_was_told(hub, author)


def test_a_private_repository_is_private_from_the_beginning(hub, author, people, tmp_path):
    pipe = build("vae")
    folder = exported(tmp_path, pipe)
    done(author.command("publish", folder, "--repo_id", "user/secret", "--private"))
    assert hub.repositories["user/secret"].private
    (create,) = [request for request in hub.requests if request.path == "/api/repos/create" and b'"secret"' in request.body]
    assert json.loads(create.body)["visibility"] == "private"
    done(author.command("publish", folder, "--repo_id", "user/secret", "--private"))
    assert seen(author, "user/secret") == drawn(pipe)
    for token in (None, OTHER, WRONG):
        with pytest.raises(Failed, match=r"OSError|HfHubHTTPError"):
            people["stranger"]("DiffusionPipeline.from_pretrained('user/secret')", token)


def test_what_shall_be_private_is_not_uploaded_to_where_everybody_reads_it(hub, author, tmp_path):
    sha = hub.snapshot("user/open", {"a.txt": "a"})
    command = author.command("publish", exported(tmp_path, build("vae")), "--repo_id", "user/open", "--private")
    assert "it is there already and everybody can read it" in refused(command)
    assert [commit.sha for commit in hub.commits("user/open")] == [sha]
    assert hub.repositories["user/open"].named == set()


NOT = "user/cut was not published, and is what it was: "


@pytest.mark.parametrize("pattern, what, times, says, moved", [
    (LFS_PUT, "cut", inf, NOT, False),
    (COMMIT, "cut", 1, NOT, False),
    (COMMIT, 500, inf, NOT, False),
    ("/preupload/", "cut", inf, NOT, False),
    (COMMIT, "cut_answer", 1, "user/cut has changed, by this upload or by another; publish again: ", True),
    ("/tag/", 500, inf, "user/cut has the new content, but not yet the tag v-", True),
    ("/tag/", "cut", 1, "user/cut has the new content, but not yet the tag v-", True),
    ("^GET /api/models/user/cut$|/commit/", "cut", inf, "user/cut was not published: ", False),
    ("/api/repos/create", "cut", 1, "user/cut was not published: ", False),
], ids=str)  # fmt: skip
def test_an_upload_that_was_cut_off_leaves_what_was_there_and_says_what_became_of_it(
    pattern, what, times, says, moved, hub, author, tmp_path
):
    hub.repositories.pop("user/cut", None)
    pipes = [build("vae"), other(build("vae"), factor=2 + len(hub.requests))]  # which the Hub has not seen
    old, new = (exported(tmp_path / str(i), pipe) for i, pipe in enumerate(pipes))
    done(author.command("publish", old, "--repo_id", "user/cut"))
    before, tag = hub.commits("user/cut")[0].sha, revision_in(card_of(hub, "user/cut"))
    hub.fault(pattern, what, times=times)
    message = refused(author.command("publish", new, "--repo_id", "user/cut"))
    assert hub.faults.pop().times in (0, inf)
    assert message.startswith(says)
    assert (hub.commits("user/cut")[0].sha != before) == moved
    assert seen(author, "user/cut", revision=tag) == drawn(pipes[0])
    assert seen(author, "user/cut") == drawn(pipes[moved])
    done(author.command("publish", new, "--repo_id", "user/cut"))
    assert seen(author, "user/cut", revision=revision_in(card_of(hub, "user/cut"))) == drawn(pipes[1])
    assert len(hub.commits("user/cut")) == 3


def test_a_hub_that_dies_at_the_commit_leaves_it_unknown(hub, author, tmp_path):
    folder = exported(tmp_path, other(build("vae"), 3.0))
    hub.snapshot("user/dead", {"a.txt": "a"})
    hub.fault("^GET /api/models/user/dead$", 500, nth=2, times=inf)
    hub.fault(COMMIT, "cut_answer")
    message = refused(author.command("publish", folder, "--repo_id", "user/dead"))
    hub.faults.clear()
    assert message.startswith("it is not known whether user/dead was published; publish again: ")


def test_who_is_overtaken_is_told_and_the_others_revision_stays(hub, author, tmp_path):
    hub.snapshot("user/busy", {"a.txt": "a"})
    hub.fault(COMMIT, lambda: hub.snapshot("user/busy", {"a.txt": "of somebody else"}))
    folder = exported(tmp_path, build("vae"))
    message = refused(author.command("publish", folder, "--repo_id", "user/busy"))
    assert message == "user/busy was not published: somebody else has published to it at the same time; publish again"
    assert hub.files("user/busy") == {"a.txt": b"of somebody else"}
    done(author.command("publish", folder, "--repo_id", "user/busy"))
    assert hub.files("user/busy")["a.txt"] == b"of somebody else"


def test_without_a_connection_nothing_is_published(people, monkeypatch, tmp_path):
    folder = exported(tmp_path, build("vae"))
    offline = people["author, offline"]
    assert refused(offline.command("publish", folder, "--repo_id", "user/new")).startswith("user/new was not published: ")
    assert refused(offline.command("verify", "user/new")) == "user/new cannot be read: the Hub does not answer"
    monkeypatch.setenv("HF_TOKEN", WRITER)
    with pytest.raises(UsageError, match=r"user/new was not published: .*offline mode"):
        publish(folder, "user/new")  # HF_HUB_OFFLINE, which all tests have


def test_another_form_leaves_nothing_of_the_one_before_and_all_that_is_the_users_own(hub, author, tmp_path):
    own = dict.fromkeys(("notes.txt", "LICENSE", "tools/train.py", "pictures/a.png", "my.py", ".gitattributes"), b"mine")
    hub.snapshot("user/forms", own)
    latent, vae = short(build("latent"), clip_sample=False), build("vae")
    folders = {
        "self-contained": exported(tmp_path / "latent", latent, "self-contained"),
        "plugin": exported(tmp_path / "again", latent, "plugin"),
        "another rung": exported(tmp_path / "vae", vae, "plugin"),
    }
    for folder in folders.values():
        done(author.command("publish", folder, "--repo_id", "user/forms"))
        assert hub.files("user/forms").keys() == files_of(folder).keys() | own.keys()
        assert {name: hub.files("user/forms")[name] for name in own} == own
    assert "unet/config.json" not in hub.files("user/forms")
    assert seen(author, "user/forms") == drawn(vae)


def test_a_repository_whose_index_is_damaged_is_mended(hub, author, tmp_path):
    hub.snapshot("user/damaged", {"model_index.json": "<<<<<<< HEAD"})
    done(author.command("publish", exported(tmp_path, build("vae")), "--repo_id", "user/damaged"))
    assert seen(author, "user/damaged") == drawn(build("vae"))


def test_nothing_is_offered_but_what_the_export_wrote(hub, author, tmp_path):
    folder, outside = exported(tmp_path, build("vae"), "self-contained"), tmp_path / "outside"
    written = set(files_of(folder))
    stray = [
        ".env", ".git/config", ".cache/a.json", "vae/.hidden.json", "log.jsonl", "run.sh", "weights.bin", "model.pt", "state.pkl",
        "vae/old.bin", "vae/optimizer.pt", "vae/optimizer.safetensors", "optimizer.safetensors", "averages.safetensors",
        "checkpoint-5/model.safetensors", "checkpoint-5/state.json", "vae/checkpoint-5/model.safetensors", "vae/deep/a.json",
        "logs/events.json", "pictures/me.png", "unknown/config.json", "../outside/config.json", "../outside/a.safetensors",
    ]  # fmt: skip
    for name in stray:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(f"SECRET {WRITER}")
    for link in ("link.json", "vae/link.json", "vae/link.safetensors"):
        (folder / link).symlink_to(outside / "config.json")
    for link in ("link", "vae/link"):
        (folder / link).symlink_to(outside)
    index = json.loads((folder / "model_index.json").read_text())
    tricks = [
        "../outside",
        str(outside),
        "vae/../../outside",
        "..",
        ".",
        "/",
        "~",
        "",
        "_hidden",
        ".git",
        "checkpoint-5",
        "logs/",
    ]
    index |= {trick: ["diffusers", "UNet2DModel"] for trick in tricks} | {"pictures": "diffusers", "unknown": {"a": "b"}}
    (folder / "model_index.json").write_text(json.dumps(index))
    done(author.command("publish", folder, "--repo_id", "user/safe"))
    assert hub.repositories["user/safe"].named == written
    assert not [request for request in hub.requests if b"SECRET" in request.body]
    no_token_was_told(hub, author)


@pytest.mark.parametrize("linked", ["model_index.json", "vae", VAE])
def test_a_link_in_the_place_of_a_part_is_refused_before_any_request(linked, hub, author, tmp_path):
    folder = exported(tmp_path, build("vae"))
    (folder / linked).rename(tmp_path / "elsewhere")
    (folder / linked).symlink_to(tmp_path / "elsewhere")
    before = len(hub.requests)
    assert "that can be uploaded" in refused(author.command("publish", folder, "--repo_id", "user/links"))
    assert len(hub.requests) == before


TRICKS = ("../x", "user/../x", "a/b/c", "/etc", "user/", "/x", "user/x y", "user/x.git", "user/.x", "https://host/x", "", "user/x?y",
          "user/x#y", "user/a--b", "user/a..b", "user/%2e%2e", "user\\x", "user/x\n", "~/x", "user/" + 100 * "x")  # fmt: skip


@pytest.mark.parametrize("name", TRICKS)
def test_a_name_with_tricks_is_refused_before_any_request(name, hub, author, tmp_path):
    build("vae").save_pretrained(tmp_path)
    before = len(hub.requests)
    for command in (["publish", tmp_path], ["publish", tmp_path, "--scheduler_only"]):
        assert "no name of a repository" in refused(author.command(*command, "--repo_id", name))
    if not Path(name).exists():  # as "" and /etc do
        assert "no name of a repository" in refused(author.command("verify", name))
    assert len(hub.requests) == before


def stable_diffusion():
    """A Stable Diffusion pipeline, as small as in diffusers' own tests."""
    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    widths = {"block_out_channels": (4, 8), "norm_num_groups": 2}
    unet = UNet2DConditionModel(
        16, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, layers_per_block=1, **widths,
    )  # fmt: skip
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    return StableDiffusionPipeline(
        vae=AutoencoderKL(latent_channels=4, **blocks, **widths),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=len(words), **ends, **sizes)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(set_alpha_to_one=False, skip_prk_steps=True, **noise),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def edu_scheduler(pipe):
    """Ours, of the process that a pipeline was trained with."""
    return EduDDPMScheduler.from_config({**pipe.scheduler.config, "clip_sample": False})


@pytest.mark.parametrize("build_stock, who, options", [
    (lambda: DDPMPipeline(make_unet(1, 8), PNDMScheduler()), "stranger", {}),
    (stable_diffusion, "stranger with transformers", {"prompt": "a dog"}),
], ids=["ddpm", "stable_diffusion"])  # fmt: skip
def test_a_scheduler_is_published_into_a_pipeline_of_somebody_elses_making(
    build_stock, who, options, hub, author, people, tmp_path
):
    stock = build_stock()
    stock.save_pretrained(tmp_path / "stock")
    repository = f"user/{type(stock).__name__}"
    hub.snapshot(repository, files_of(tmp_path / "stock") | {"README.md": b"# Theirs", "notes.py": b"pass"})
    before = hub.files(repository)
    scheduler = edu_scheduler(stock)
    DDPMPipeline(make_unet(1, 8), scheduler).save_pretrained(tmp_path / "run")
    stock.scheduler = scheduler
    pixels = drawn(stock, **options)

    publish = ["publish", tmp_path / "run", "--repo_id", repository, "--scheduler_only", "--form"]
    done(author.command(*publish, "self-contained"))
    after = hub.files(repository)
    changed = {"model_index.json", "scheduler/scheduler_config.json", "scheduler/scheduling_edu_ddpm.py"}
    assert {name for name in before | after if before.get(name) != after.get(name)} == changed
    assert hub.repositories[repository].named == changed
    index = {**json.loads(before["model_index.json"]), "scheduler": ["scheduling_edu_ddpm", "EduDDPMScheduler"]}
    assert json.loads(after["model_index.json"]) == index
    load = "answer = drawn(DiffusionPipeline.from_pretrained(repository, trust_remote_code=trust), **options)"
    assert people[who](load, repository=repository, trust=True, options=options) == pixels
    with pytest.raises(Failed, match="trust_remote_code=True"):
        people[who](load, repository=repository, trust=False, options=options)

    done(author.command(*publish, "plugin"))
    assert hub.files(repository).keys() == before.keys()
    assert author(load, repository=repository, trust=False, options=options) == pixels


def test_only_the_part_that_is_named_is_uploaded_of_a_whole_pipeline(hub, author, tmp_path):
    hub.snapshot("user/part", {"unet/config.json": "theirs", "scheduler/old.py": "theirs", "pipeline.py": "theirs"})
    code = (
        "from pathlib import Path; from diffusers_edu.hub.publish import publish; publish(Path(folder), name, only='scheduler')"
    )
    author(code, WRITER, folder=str(exported(tmp_path, build("ddpm"))), name="user/part")
    assert hub.repositories["user/part"].named == {"model_index.json", "scheduler/scheduler_config.json", "scheduler/old.py"}
    assert hub.files("user/part").keys() == {
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "pipeline.py"
    }  # fmt: skip


def test_a_scheduler_for_a_repository_without_one_or_without_a_pipeline_is_refused(hub, author, tmp_path):
    build("ddpm").save_pretrained(tmp_path / "run")
    build("vae").save_pretrained(tmp_path / "vae")
    hub.snapshot("user/no-scheduler", files_of(tmp_path / "vae"))
    hub.snapshot("user/no-pipeline", {"a.txt": "a"})
    publish = ["publish", tmp_path / "run", "--scheduler_only", "--repo_id"]
    assert "has no scheduler" in refused(author.command(*publish, "user/no-scheduler"))
    assert "holds no pipeline: it has no model_index.json" in refused(author.command(*publish, "user/no-pipeline"))
    assert "user/none cannot be read: the Hub knows no such repository" in refused(author.command(*publish, "user/none"))
    for name in ("user/no-scheduler", "user/no-pipeline"):
        assert len(hub.commits(name)) == 1


def test_the_hubs_cache_is_not_written_to(hub, author, tmp_path):
    build("ddpm").save_pretrained(tmp_path / "run")
    hub.snapshot("user/cached", files_of(tmp_path / "run"))
    cached = Path(author("answer = DiffusionPipeline.download('user/cached')"))
    before = files_of(cached)
    export = ["export", tmp_path / "run", cached, "--scheduler_only", "--form", "self-contained"]
    assert "is a link" in refused(author.command(*export))
    assert files_of(cached) == before


TRAIN = ["train", "--rung", "vae", "--dataset_name", "digits", "--max_train_steps", "3", "--train_batch_size", "8"]
TRAIN += ["--lr_warmup_steps", "1", "--validation_samples", "0", "--push_to_hub", "--hub_model_id"]


@pytest.fixture(scope="module")
def trained(hub, people, tmp_path_factory):
    """The name of a repository that a training has uploaded, and the folder of the run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    command = done(people["author"].command(*TRAIN, "user/trained", "--output_dir", folder))
    assert command.out.splitlines()[-1] == f"{hub.url}/user/trained"
    return "user/trained", folder


def test_a_training_without_a_login_does_not_begin(hub, author, tmp_path):
    asked = len(hub.requests)
    command = author.command(*TRAIN, "user/never", "--output_dir", tmp_path / "run", token=None)
    assert "you are not logged in to the Hub" in refused(command)
    assert not (tmp_path / "run").exists()
    assert len(hub.requests) == asked


def test_a_training_uploads_its_pipeline_with_the_evidence_and_nothing_else(trained, hub, author):
    repository, folder = trained
    assert hub.files(repository).keys() == {
        ".gitattributes", "README.md", "model_index.json", "samples.png", "training_config.json", "vae/config.json", VAE,
    }  # fmt: skip
    assert hub.files(repository)[VAE] == (folder / VAE).read_bytes()
    assert hub.repositories[repository].named.isdisjoint({"log.jsonl", "checkpoint-3/model.safetensors"})
    texts = b"".join(data for name, data in hub.files(repository).items() if name.endswith((".json", ".md")))
    assert str(folder.parent).encode() not in texts
    no_token_was_told(hub, author)


def test_the_card_on_the_hub_is_valid_and_states_the_figures_with_their_intervals(trained, hub, author):
    repository, _ = trained
    data = author(f"""
from huggingface_hub import ModelCard
answer = ModelCard.load({repository!r}).data.to_dict()
""")
    assert (data["library_name"], data["pipeline_tag"]) == ("diffusers", "unconditional-image-generation")
    assert (data["license"], data["datasets"], data["form"]) == ("apache-2.0", ["digits"], "plugin")
    assert {"diffusers", "diffusers-edu", "vae"} <= set(data["tags"])
    (model,) = data["model-index"]
    assert model["name"] == "trained"
    metrics = {metric["type"]: metric for result in model["results"] for metric in result["metrics"]}
    assert {"frechet_distance", "kernel_distance", "precision", "recall", "diversity"} <= metrics.keys()
    for metric in metrics.values():
        low, high = metric["args"]["interval"]
        assert low <= metric["value"] <= high
        assert (metric["args"]["num_samples"], metric["args"]["held_out"]) == (1000, 540)
    assert (metrics["precision"]["args"]["n"], metrics["recall"]["args"]["n"]) == (1000, 540)
    card = card_of(hub, repository)
    validated = [json.loads(request.body) for request in hub.requests if request.path == "/api/validate-yaml"]
    assert {"content": card, "repoType": "model"} in validated
    assert f'from_pretrained("{repository}", revision="{revision_in(card)}")' in snippet_in(card)
    assert revision_in(card) in hub.repositories[repository].tags


def test_the_card_of_a_run_loads_by_its_snippet(trained, hub, author):
    repository, folder = trained
    code = "names = {}; exec(snippet, names); answer = [len(names['images']), drawn(names['pipe'])]"
    number, pixels = author(code, snippet=snippet_in(card_of(hub, repository)))
    assert number == 16
    assert pixels == author("answer = drawn(DiffusionPipeline.from_pretrained(folder))", folder=str(folder))


@pytest.mark.parametrize("form", ["self-contained", "portable"])
def test_a_stranger_loads_a_run_by_the_snippet_of_its_card(form, hub, author, people, tmp_path):
    run, repository = tmp_path / "run", f"user/measured-{form}"
    short(build("ddpm")).save_pretrained(run)
    configuration("ddpm", dataset_name="digits", num_train_timesteps=20, output_dir=str(run)).save()
    flags = ["--num_samples", "20", "--num_inference_steps", "4", "--form", form]
    done(author.command("publish", run, "--repo_id", repository, *flags))
    snippet = snippet_in(card_of(hub, repository))
    assert "pipe(batch_size=16, num_inference_steps=4)" in snippet
    assert people["stranger"]("names = {}; exec(snippet, names); answer = len(names['images'])", snippet=snippet) == 16
    trust = ["--trust_remote_code"] if form == "self-contained" else []
    done(author.command("verify", repository, *trust))
    if trust:
        assert "give --trust_remote_code" in refused(author.command("verify", repository))


def edited(repository, hub, **changes):
    """A copy of a repository with files changed by functions, or removed; its name."""
    files = hub.files(repository)
    for name, change in changes.items():
        data = files.pop(name)
        files |= {} if change is None else {name: change(data)}
    copy = f"user/edited-{len(hub.repositories)}"
    hub.snapshot(copy, files)
    return copy


def without_weights(data):
    return save({name: torch.zeros_like(weight) for name, weight in load(data).items()}, {"format": "pt"})


def flattered(card):
    """A card whose first figure is said to be a tenth of what it is."""
    text = card.decode()
    metrics = re.search(r"value: ([\d.e-]+)\n(?s:.*?)interval:\n\s+- ([\d.e-]+)\n\s+- ([\d.e-]+)\n", text)
    flattering = metrics[0]
    for number in metrics.groups():
        flattering = flattering.replace(number, f"{float(number) / 10:.6g}")
    return text.replace(metrics[0], flattering).encode()


def test_a_repository_is_verified_and_one_that_was_tampered_with_is_not(trained, hub, author):
    repository, _ = trained
    verified = author.command("verify", repository)
    assert (verified.status, "outside" in verified.out) == (0, False)
    for name, change in {VAE: without_weights, "README.md": flattered}.items():
        tampered = author.command("verify", edited(repository, hub, **{name: change}))
        assert (tampered.status, "outside" in tampered.out) == (1, True)


def test_a_revision_is_verified_whatever_has_become_of_the_repository(trained, hub, author):
    files = hub.files(trained[0])
    sha = hub.snapshot("user/moved", files)
    hub.snapshot("user/moved", {**files, VAE: without_weights(files[VAE])})
    assert author.command("verify", "user/moved").status == 1
    assert author.command("verify", "user/moved", "--revision", sha[:10]).status == 0


@pytest.mark.parametrize("name, change, says", [
    ("README.md", None, "has no README.md"),
    ("README.md", lambda card: card.split(b"---\n")[2], "its card states no figures"),
    ("README.md", lambda card: card.replace(b"num_samples: 1000", b"num_samples: many"), "metadata cannot be read"),
    ("README.md", lambda card: card.replace(b"num_samples: 1000", b"num_samples: -1"), "--num_samples -1"),
    ("training_config.json", None, "has no training_config.json"),
    ("training_config.json", lambda data: data.replace(b'"vae"', b'"gan"'), "there is no rung gan"),
    ("training_config.json", lambda data: data.replace(b'"vae"', b'["vae"]'), "no configuration of a run"),
    ("training_config.json", lambda data: data.replace(b'"num_stages": 10', b'"num_stages": "10"'), "no configuration of a run"),
    ("training_config.json", lambda data: data.replace(b'"dataset_name": "digits"', b'"dataset_name": null'), "train_data_dir"),
    ("training_config.json", lambda data: b"[]", "no configuration of a run"),
])  # fmt: skip
def test_a_repository_that_says_nothing_to_verify_is_named_in_a_line(name, change, says, trained, hub, author):
    assert says in refused(author.command("verify", edited(trained[0], hub, **{name: change})))


def test_what_is_no_repository_is_not_verified(hub, author):
    assert refused(author.command("verify", "user/none")).startswith(
        "user/none cannot be read: the Hub knows no such repository"
    )
    assert "Revision Not Found" in refused(author.command("verify", "user/trained", "--revision", "none"))


def test_what_was_loaded_with_the_code_of_a_repository_is_exported_again(loaded, hub, author, tmp_path):
    originals, *_ = loaded
    repository = "user/latent_diffusion-self-contained"
    pixels = author("""
from pathlib import Path
from diffusers_edu.hub.export import export
pipe = DiffusionPipeline.from_pretrained(repository, trust_remote_code=True)
assert {type(pipe).__module__.split(".")[0], type(pipe.vae).__module__.split(".")[0]} == {"diffusers_modules"}
answer = {}
for form in ("self-contained", "plugin"):
    export(pipe, Path(folder, form), form)
    again = DiffusionPipeline.from_pretrained(str(Path(folder, form)), trust_remote_code=form == "self-contained")
    answer[form] = drawn(again)
""", repository=repository, folder=str(tmp_path))  # fmt: skip
    for form, drawn_again in pixels.items():
        assert abs(np.array(drawn_again) - originals["latent_diffusion"]).max() == 0
        first, again = hub.files(f"user/latent_diffusion-{form}"), files_of(tmp_path / form)
        assert {name: data for name, data in again.items() if name.endswith(".py")} == {
            name: data for name, data in first.items() if name.endswith(".py")
        }
        for name in again:
            if name.endswith(".json"):
                assert json.loads(again[name]) == json.loads(first[name])
                assert b"name_or_path" not in again[name]


def test_no_path_of_the_machine_is_in_what_is_exported_of_a_loaded_pipeline(hub, author, tmp_path):
    pipe = stable_diffusion()
    pipe.scheduler = edu_scheduler(pipe)
    pipe.save_pretrained(tmp_path / "stock")
    code = "from diffusers_edu.hub.export import export; from pathlib import Path\n"
    code += "export(DiffusionPipeline.from_pretrained(folder), Path(output), 'self-contained')"
    author(code, folder=str(tmp_path / "stock"), output=str(tmp_path / "out"))
    for name, data in files_of(tmp_path / "out").items():
        if name.endswith(".json"):
            assert b"name_or_path" not in data, name
            assert str(tmp_path).encode() not in data, name
