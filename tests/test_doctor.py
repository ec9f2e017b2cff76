"""What the doctor says of a repository is what the loader does with it.

Each repository below is a healthy one with one thing broken. One other process really loads all of them, from their folders and from a
double of the Hub, first as they are and then with what the doctor says they need.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
import transformers
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hub_double import READER, HubDouble
from test_pipelines import build
from tiny import tiny_unet
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_edu.errors import UsageError
from diffusers_edu.hub.doctor import diagnose, examine
from diffusers_edu.hub.repository import open_repository

ROOT = Path(__file__).parent.parent
INDEX, UNET, SAFE = "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"
MODEL = "from diffusers import UNet2DModel\n\nclass OurUNet(UNet2DModel):\n    pass\n"
ALONE, NOT, HERE, FOLDER = "with diffusers alone", "not at all", "not in this environment", "only as a local folder, with "
TRUST, GOOD, OURS = "with trust_remote_code=True", "with import good_plugin", "with import diffusers_edu"


@dataclass
class Change:
    """How a healthy repository is broken, and what shall be said of it.

    `index`: entries to replace (...: to remove). `files`: their content; None: to remove; a function of the one, or of all, before.
    """

    loads: str
    says: str = ""
    index: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)
    base: str = "stock"


def shipped(loads, says="", index={}, files={}):
    return Change(loads, says, index, files, "shipped")


def edit(**entries):
    return lambda content: json.dumps({**json.loads(content), **entries}).encode()


def pickled(content):
    stream = io.BytesIO()
    torch.save(safetensors.torch.load(content), stream)
    return stream.getvalue()


def moved(old, new, by=lambda content: content):
    return {new: lambda files: by(files[old]), old: None}


def weights(part, ending, by=lambda content: content):
    """The weights of a part under another name."""
    return moved(f"{part}/diffusion_pytorch_model.safetensors", f"{part}/diffusion_pytorch_model{ending}", by)


def pipeline(arguments="unet, scheduler", before="", inside="", after=""):
    """The code of a pipeline, with something added."""
    head = f"{before}\nfrom diffusers import DDPMPipeline\n\nclass OurPipeline(DDPMPipeline):\n    {inside}\n"
    return {"pipeline.py": f"{head}    def __init__(self, {arguments}):\n        super().__init__(unet, scheduler)\n{after}\n"}


HELPER = "from .helper import x\n"
SHARD = "diffusion_pytorch_model-00001-of-00001.safetensors"
SHARDS = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tiny_unet().state_dict(), SHARD)})
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
STOCK_UNET = {"unet": ["diffusers", "UNet2DModel"]}
STOCK_CONFIG = {UNET: edit(_class_name="UNet2DModel")}
LIST = {"_class_name": ["pipeline", "OurPipeline"]}
BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}
OUR_VAE = {"_class_name": ["pipeline", "VAEPipeline"], "vae": ["modeling_vae", "VariationalAutoencoder"]}
OUR_CODE = {
    "pipeline.py": (ROOT / "pipelines/pipeline_vae.py").read_text(),
    "vae/modeling_vae.py": (ROOT / "diffusers_edu/models/modeling_vae.py").read_text(),
}
CHANGES = {
    "healthy": Change(ALONE),
    "index_is_no_json": Change(NOT, "not valid JSON", files={INDEX: "{"}),
    "index_is_a_list": Change(NOT, "not an object", files={INDEX: "[]"}),
    "no_index": Change(NOT, "nor anything else", files={INDEX: None}),
    "index_one_folder_deeper": Change(NOT, "inner/model_index.json", files=moved(INDEX, "inner/model_index.json")),
    "index_without_class": Change(NOT, "_class_name is null", {"_class_name": ...}),
    "class_unknown": Change(NOT, "names NoPipeline", {"_class_name": "NoPipeline"}),
    "class_of_a_newer_diffusers": Change(HERE, "names NoPipeline", {"_class_name": "NoPipeline", "_diffusers_version": "99.0"}),
    "class_is_a_model": Change(NOT, "is not a pipeline", {"_class_name": "UNet2DModel"}),
    "class_needs_a_package": Change(HERE, "pip install", {"_class_name": "AudioDiffusionPipeline"}),
    "class_is_a_list_without_file": Change(NOT, "pipeline.py, which is not there", LIST),
    "written_by_a_newer_diffusers": Change(ALONE, "written by diffusers 99.0", {"_diffusers_version": "99.0"}),
    "module_of_the_author": Change(NOT, "loads nowhere else", {"unet": ["my_lab.models.unet", "OurUNet"]}),
    "module_of_diffusers": Change(FOLDER, 'write ["diffusers"', {"unet": ["diffusers.models.unets.unet_2d", "UNet2DModel"]}),
    "main": Change(NOT, "only in the process", {"unet": ["__main__", "OurUNet"]}),
    "dynamic": Change(NOT, "only in the process", {"unet": ["diffusers_modules.local.our_unet", "OurUNet"]}),
    "module_without_bases": Change(NOT, "does not register", {"unet": ["torch.nn", "Linear"]}),
    "package_not_installed": Change(HERE, "registers itself", {"unet": ["acme_diffusion", "AcmeUNet"]}),
    "package_not_registered": Change(FOLDER, "does not register", {"unet": ["plain_plugin", "PlainUNet"]}),
    "package_registered": Change(GOOD, "registers itself", {"unet": ["good_plugin", "GoodUNet"]}),
    "pipeline_of_a_package": Change(GOOD, "not tried", {"_class_name": "GoodPipeline", "unet": ["good_plugin", "GoodUNet"]}),
    "name_of_a_pipelines_folder": Change(NOT, "looked up first", {"unet": ["latent_diffusion", "OurUNet"]}),
    "file_with_a_pipelines_name": shipped(NOT, "looked up first", {"unet": ["ddpm", "OurUNet"]}, {"unet/ddpm.py": MODEL}),
    "model_unknown": Change(NOT, "names NoModel", {"unet": ["diffusers", "NoModel"]}),
    "model_unknown_to_transformers": Change(HERE, "names NoModel", {"unet": ["transformers", "NoModel"]}),
    "model_of_no_kind": Change(NOT, "of no kind", {"unet": ["diffusers", "ConfigMixin"]}),
    "component_null": Change(NOT, "loaded as a component", {"unet": None}),
    "component_empty": Change(NOT, "which the index does not have", {"unet": [None, None]}),
    "component_missing": Change(NOT, "requires scheduler", {"scheduler": ...}),
    "component_too_many": Change(ALONE, "no argument", {"vae": ["diffusers", "AutoencoderKL"]}),
    "list_of_words": Change(FOLDER, "takes for a component", {"colours": ["red", "green", "blue"]}),
    "list_empty": Change(FOLDER, "takes for a component", {"colours": []}),
    "no_folder": Change(NOT, "unet/config.json", files={UNET: None, SAFE: None}),
    "no_configuration": Change(NOT, "needs unet/config.json", files={UNET: None}),
    "configuration_no_json": Change(NOT, "not valid JSON", files={UNET: "version"}),
    "configuration_of_another": Change(ALONE, "written by AutoencoderKL", files={UNET: edit(_class_name="AutoencoderKL")}),
    "quantised": Change(HERE, "quantised with bitsandbytes", files={UNET: edit(quantization_config=BITS)}),
    "no_weights": Change(NOT, "there are none", files={SAFE: None}),
    "weights_pickled": Change(ALONE, "pickled weights are loaded for unet", files=weights("unet", ".bin", pickled)),
    "shards_pickled": Change(NOT, "does not look for", files=weights("unet", ".bin.index.json", lambda content: b"{}")),
    "checkpoint": Change(NOT, "model.ckpt", files=weights("unet", ".ckpt")),
    "weights_of_another_name": Change(NOT, "does not look for", files=moved(SAFE, "unet/model.safetensors")),
    "weights_ignored": Change(FOLDER, "_ignore_files", {"_ignore_files": [SAFE]}),
    "variant": Change('with variant="fp16"', "only as fp16", files=weights("unet", ".fp16.safetensors")),
    "shards": Change(ALONE, files={**moved(SAFE, f"unet/{SHARD}"), f"{SAFE}.index.json": SHARDS}),
    "shard_missing": Change(NOT, "names the shard", files={f"{SAFE}.index.json": SHARDS}),
    "weights_pointer": Change(NOT, "git-lfs", files={SAFE: POINTER}),
    "weights_empty": Change(NOT, "is empty", files={SAFE: ""}),
    "weights_cut_off": Change(NOT, "is damaged", files={SAFE: lambda content: content[:-9]}),
    "flat": Change(ALONE, files={**moved(UNET, "config.json"), **moved(SAFE, "diffusion_pytorch_model.safetensors")}),
    "self_contained": shipped(TRUST, "code of the authors"),
    "pipeline_shipped": shipped(TRUST, index=STOCK_UNET, files={"unet/our_unet.py": None, **STOCK_CONFIG}),
    "code_with_an_error": shipped(NOT, "not valid Python", files={"pipeline.py": "def"}),
    "code_without_the_class": shipped(NOT, "has no OurUNet", files={"unet/our_unet.py": "x = 1"}),
    "code_outside": shipped(NOT, "outside", {"unet": ["../our_unet", "OurUNet"]}, moved("unet/our_unet.py", "our_unet.py")),
    "code_needs_a_package": shipped(HERE, "imports acme", files=pipeline(before="import acme")),
    "code_may_use_a_package": shipped(TRUST, files=pipeline(before="try:\n    import acme\nexcept ImportError:\n    pass")),
    "code_for_another_diffusers": shipped(HERE, "NoModel from", files=pipeline(before="from diffusers.models import NoModel")),
    "helper_of_a_model": shipped(FOLDER, "does not download", files={"unet/our_unet.py": HELPER + MODEL, "unet/helper.py": "x = 1"}),
    "helper_of_a_scheduler": shipped(TRUST, index={"scheduler": ["ours", "DDPMScheduler"]}, files={  # all of a folder without weights
        "scheduler/ours.py": HELPER + "from diffusers import DDPMScheduler", "scheduler/helper.py": "x = 1",
    }),
    "helper_of_the_pipeline": shipped(TRUST, files={**pipeline(before=HELPER), "helper.py": "x = 1"}),
    "helper_missing": shipped(NOT, "not there", files=pipeline(before=HELPER)),
    "helper_of_a_helper": shipped(
        NOT, "copied along is only", files={**pipeline(before=HELPER), "helper.py": "from .more import x", "more.py": "x = 1"}
    ),
    "helper_by_dot": shipped(NOT, "copied along", files={**pipeline(before="from . import helper"), "helper.py": "x = 1"}),
    "helper_by_dots": shipped(NOT, "above its own folder", files={**pipeline(before="from ..helper import x"), "helper.py": "x = 1"}),
    "helper_by_its_name": shipped(NOT, "neighbour", files={**pipeline(before="from helper import x"), "helper.py": "x = 1"}),
    "two_pipelines_in_a_file": shipped(TRUST, "custom_pipeline", files=pipeline(after="class B(DDPMPipeline):\n    pass")),
    "two_files_of_one_name": shipped(
        TRUST, "name of", {"unet": ["pipeline", "OurUNet"]}, moved("unet/our_unet.py", "unet/pipeline.py")
    ),
    "helper_and_file_of_one_name": shipped(
        TRUST, "name of", files={**pipeline(before="from .our_unet import x"), "our_unet.py": "x = 1"}
    ),
    "two_helpers_of_one_name": shipped(NOT, "name of", files={
        **pipeline(before=HELPER), "helper.py": "x = 1",
        "unet/our_unet.py": "from .helper import y\n" + MODEL, "unet/helper.py": "y = 1",
    }),
    "argument_of_any_name": shipped(NOT, "no *kwargs", files=pipeline("unet, scheduler, **kwargs")),
    "argument_without_default": shipped(NOT, "loaded as a component", {"size": 8}, pipeline("unet, scheduler, size")),
    "component_with_default": shipped(NOT, "_optional_components", files=pipeline("unet, scheduler=None")),
    "component_with_default_empty": shipped(TRUST, "becomes the list", {"a": [None, None]}, pipeline("unet, scheduler, a=None")),
    "component_declared_optional": shipped(
        TRUST, files=pipeline("unet, scheduler=None", inside="_optional_components = ['scheduler']")
    ),
    "model_that_cannot_load": shipped(
        NOT, "no from_pretrained", files={"unet/our_unet.py": "import torch\n\nclass OurUNet(torch.nn.Module):\n    pass"}
    ),
    "code_not_used": shipped(ALONE, "is not used", {**STOCK_UNET, "_class_name": "DDPMPipeline"}, STOCK_CONFIG),
    "code_of_a_model_not_used": shipped(TRUST, "unet/our_unet.py: is not used", STOCK_UNET, STOCK_CONFIG),
    "transformers": Change(ALONE, base="text"),
    "transformers_without_weights": Change(NOT, "there are none", files={"text_encoder/model.safetensors": None}, base="text"),
    "transformers_pickled": Change(ALONE, "loaded for text_encoder, unet, vae", files={
        **moved("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin", pickled),
        **weights("unet", ".bin", pickled), **weights("vae", ".bin", pickled),
    }, base="text"),
    "tokenizer_without_words": Change(ALONE, "has no vocabulary", files={"tokenizer/tokenizer.json": None}, base="text"),
    "two_formats": Change(FOLDER, "another model has only .bin", files=weights("vae", ".bin", pickled), base="latent"),
    "variant_of_one": Change(f'{OURS} and variant="fp16"', "as fp16", files=weights("unet", ".fp16.safetensors"), base="latent"),
    "plugin_vae": Change(OURS, base="vae"),
    "plugin_latent": Change(OURS, base="latent"),
    "plugin_scheduler": Change(OURS, base="ddpm"),
    "plugin_class_unknown": Change(HERE, "names NoModel", {"vae": ["diffusers_edu", "NoModel"]}, base="vae"),
    "plugin_module": Change(
        FOLDER, 'write ["diffusers_edu"', {"vae": ["diffusers_edu.models.modeling_vae", "VariationalAutoencoder"]}, base="vae"
    ),
    "plugin_shipped": Change(TRUST, "code of the authors", OUR_VAE, OUR_CODE, "vae"),
    "plugin_and_code": Change(f"{OURS} and trust_remote_code=True", "", LIST, pipeline(), "ddpm"),
}  # fmt: skip

PLUGINS = {
    "plain_plugin/__init__.py": "from diffusers import ModelMixin, UNet2DModel\n\nclass PlainUNet(UNet2DModel):\n    pass\n",
    "good_plugin/__init__.py": """
import diffusers
from diffusers import DDPMPipeline, ModelMixin, UNet2DModel
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

class GoodUNet(UNet2DModel):
    pass

class GoodPipeline(DDPMPipeline):
    pass

diffusers.GoodPipeline = GoodPipeline

LOADABLE_CLASSES[__name__] = {"ModelMixin": ["save_pretrained", "from_pretrained"]}
""",
}

LOADER = """
import importlib, json, shutil, sys, warnings
from diffusers.utils import dynamic_modules_utils, logging
from diffusers import DiffusionPipeline
logging.set_verbosity(60)
logging.disable_progress_bar()
warnings.simplefilter("ignore")
def load(name, arguments):
    for module in [module for module in sys.modules if module.startswith("diffusers_modules")]:
        del sys.modules[module]
    shutil.rmtree(dynamic_modules_utils.HF_MODULES_CACHE, ignore_errors=True)
    try:
        DiffusionPipeline.from_pretrained(name, **arguments)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "loads"
*lines, last = map(json.loads, sys.stdin)
for names, modules, arguments in lines:
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            pass
    print("=" + json.dumps([load(name, arguments) for name in names]))

from diffusers_edu.errors import UsageError
from diffusers_edu.hub.doctor import examine
for question in last:
    try:
        diagnosis = examine(*question)
        answer = [diagnosis.loads, str(diagnosis)]
    except UsageError as error:
        answer = ["UsageError", str(error)]
    print("=" + json.dumps(answer))
"""


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def read(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def text_pipeline():
    """A Stable Diffusion small enough for a test."""
    vocabulary = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    text = CLIPTextConfig(vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    widths = {"block_out_channels": (8,), "norm_num_groups": 4}
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), **widths)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",), "layers_per_block": 1}
    unet = UNet2DConditionModel(8, cross_attention_dim=8, attention_head_dim=8, **blocks, **widths)
    scheduler = DDPMScheduler(clip_sample=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae, CLIPTextModel(text), CLIPTokenizer(vocabulary, []), unet, scheduler, None, None, requires_safety_checker=False
    )


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """The healthy repositories, as files."""
    root = tmp_path_factory.mktemp("bases")
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(root / "stock")
    text_pipeline().save_pretrained(root / "text")
    for name in ("vae", "latent", "ddpm"):
        build(name).save_pretrained(root / name)
    found = {folder.name: read(folder) for folder in root.iterdir()}
    index, config = edit(**LIST, unet=["our_unet", "OurUNet"]), edit(_class_name="OurUNet")
    changed = {INDEX: index(found["stock"][INDEX]), UNET: config(found["stock"][UNET])}
    code = {name: text.encode() for name, text in {**pipeline(), "unet/our_unet.py": MODEL}.items()}
    found["shipped"] = {**found["stock"], **changed, **code}
    return found


def broken(change, bases):
    files = dict(bases[change.base])
    if change.index:
        index = {**json.loads(files[INDEX]), **change.index}
        files[INDEX] = json.dumps(
            {key: value for key, value in index.items() if value is not ... and (key, value) != ("_class_name", None)}
        ).encode()
    before = dict(files)
    for name, content in change.files.items():
        if content is None:
            del files[name]
        elif callable(content):
            files[name] = content(before.get(name, before))
        else:
            files[name] = content.encode()
    return files


@pytest.fixture(scope="session")
def folders(bases, tmp_path_factory):
    root = tmp_path_factory.mktemp("broken")
    for name, change in CHANGES.items():
        write(root / name, broken(change, bases))
    write(root / "packages", PLUGINS)
    return root


@pytest.fixture(scope="session")
def diagnoses(folders):
    sys.path.insert(0, str(folders / "packages"))
    yield {name: examine(str(folders / name)) for name in CHANGES}
    sys.path.remove(str(folders / "packages"))


UNSEEN_ON_THE_HUB = ("weights_pointer", "weights_cut_off")  # it takes a look into the weights, which are not downloaded
FROM_THE_HUB = dict.fromkeys(["self_contained", *UNSEEN_ON_THE_HUB, *[*CHANGES][::2]])
MISTAKES = {
    ("user/none",): "no such", ("user/healthy", "v9"): "has no revision v9", ("other/private",): "no such",
    ("other/gated",): "is gated", ("user/down",): "could not be read", ("user/healthy", None, "hf_madeUp"): "could not be read",
}  # fmt: skip


@dataclass
class Elsewhere:
    """What another process has found, with a double of the Hub."""

    loads: dict  # [from the folder, from the Hub], by name
    answers: dict  # the doctor's, by what it was asked
    commits: dict
    output: str
    requests: list


@pytest.fixture(scope="session")
def elsewhere(folders, diagnoses, tmp_path_factory):
    """How each repository loads, with what is said that it needs, and as it is; and what the doctor says of those on the Hub."""
    plans = [("custom_pipeline", [str(folders / "healthy")], [], {
        "custom_pipeline": str(folders / "two_pipelines_in_a_file"), "trust_remote_code": True
    })]  # fmt: skip
    plans += [("name.dot", ["user/name.dot"], [], {"trust_remote_code": True})]
    for name, diagnosis in diagnoses.items():
        modules = [need.split()[1] for need in diagnosis.needs if need.startswith("import")]
        arguments = {
            need.split("=")[0]: True if "True" in need else need.split('"')[1] for need in diagnosis.needs if "=" in need
        }
        plans.append((name, [str(folders / name), f"user/{name}"], modules, arguments))
        if diagnosis.ok and diagnosis.needs:
            plans.append((f"{name} as it is", plans[-1][1], [], {}))
    plans.sort(key=lambda plan: len(plan[2]))  # an import cannot be undone
    with HubDouble() as hub:
        commits = {f"user/{name}": hub.snapshot(f"user/{name}", folders / name) for name in CHANGES}
        hub.snapshot("user/name.dot", folders / "helper_of_the_pipeline")
        hub.snapshot("user/never_loaded", {**read(folders / "healthy"), SAFE: b"weights of its own"})
        for name in ("other/private", "other/gated", "user/down"):
            hub.snapshot(name, folders / "healthy", private=name == "other/private")
        hub.repositories["other/gated"].gated = True
        hub.fault("GET /api/models/user/down", 500, times=99)
        questions = [*((f"user/{name}",) for name in FROM_THE_HUB), ("user/never_loaded",), *MISTAKES]
        script = "\n".join(map(json.dumps, [*(plan[1:] for plan in plans), questions]))
        environment = hub.environment(tmp_path_factory.mktemp("cache"), READER, PYTHONPATH=str(folders / "packages"))
        run = subprocess.run(
            [sys.executable, "-c", LOADER], input=script, env=environment, capture_output=True, text=True, timeout=500
        )
        answers = [json.loads(line[1:]) for line in run.stdout.splitlines() if line.startswith("=")]
        assert len(answers) == len(plans) + len(questions), run.stderr[-3000:]
        loads = dict(zip([plan[0] for plan in plans], answers, strict=False))
        told = dict(zip(questions, answers[len(plans) :], strict=True))
        return Elsewhere(loads, told, commits, run.stdout + run.stderr, list(hub.requests))


@pytest.mark.parametrize("name", CHANGES)
def test_the_doctor_says_what_is_wrong(name, diagnoses):
    change, diagnosis = CHANGES[name], diagnoses[name]
    assert diagnosis.loads.startswith(change.loads) and (change.loads.endswith("with ") or diagnosis.loads == change.loads), (
        diagnosis
    )
    assert diagnosis.ok == change.loads.startswith("with"), diagnosis
    assert change.says in " ".join(str(diagnosis).split()), diagnosis
    assert change.says or not [finding for finding in diagnosis.findings if finding.severity == "warning"], diagnosis


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_doctor_says_is_what_the_loader_does(name, diagnoses, elsewhere):
    loads = diagnoses[name].loads
    folder, hub = elsewhere.loads[name]
    bare = elsewhere.loads.get(f"{name} as it is", [])
    facts = f"{diagnoses[name]}\n\nfolder: {folder}\n\nhub: {hub}\n\nwithout what it needs: {bare}"
    if name == "code_outside":
        assert folder == "loads", "the loader refuses it by itself now: so may the doctor, in milder words"
        return
    assert (folder == "loads") == loads.startswith(("with", "only")), facts
    assert (hub == "loads") == loads.startswith("with"), facts
    assert "loads" not in bare, facts


def test_a_file_with_two_pipelines_does_not_load_as_custom_pipeline(elsewhere):
    assert "Multiple classes" in elsewhere.loads["custom_pipeline"][0]


def test_a_pipeline_with_helpers_does_not_load_from_a_name_with_a_dot(folders, elsewhere):
    assert elsewhere.loads["name.dot"][0].startswith("ModuleNotFoundError")
    hub = replace(open_repository(str(folders / "helper_of_the_pipeline")), name="user/name.dot", commit="0123")
    diagnosis = diagnose(hub)
    assert diagnosis.loads == f"{FOLDER}trust_remote_code=True" and "has a dot" in str(diagnosis)


def test_no_code_of_a_repository_runs_and_no_package_that_it_names_is_imported(bases, tmp_path, diagnoses):
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    write(tmp_path / "repository", {**bases["shipped"], **pipeline(before=trap), "unet/our_unet.py": trap + MODEL})
    assert examine(str(tmp_path / "repository")).loads == TRUST
    assert not (tmp_path / "ran").exists()
    assert diagnoses["package_registered"].ok
    assert not {"good_plugin", "plain_plugin"} & sys.modules.keys()


def test_the_lines_that_are_given_load_the_pipeline(diagnoses):
    for name in ("healthy", "variant", "plugin_latent"):
        found = {}
        exec(diagnoses[name].snippet, found)
        assert isinstance(found["pipe"], diffusers.DiffusionPipeline)
    assert not any(diagnosis.snippet for name, diagnosis in diagnoses.items() if CHANGES[name].loads in (NOT, HERE))


PARTS = {
    "a model": (tiny_unet, "diffusers.AutoModel.from_pretrained"),
    "a scheduler": (DDPMScheduler, "diffusers.DDPMScheduler.from_pretrained"),
    "a model of transformers": (lambda: text_pipeline().text_encoder, "transformers.AutoModel.from_pretrained"),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_alone_is_told_from_a_pipeline_and_how_it_loads(part, tmp_path):
    make, says = PARTS[part]
    made = make()
    made.save_pretrained(tmp_path)
    diagnosis = examine(str(tmp_path))
    assert (diagnosis.loads, diagnosis.ok) == (NOT, False)
    assert says in diagnosis.snippet
    assert type(eval(diagnosis.snippet.splitlines()[-1], {"diffusers": diffusers, "transformers": transformers})) is type(made)


@pytest.mark.parametrize("name, says", [
    ("modular_model_index.json", "ModularPipeline"), ("pytorch_lora_weights.safetensors", "load_lora_weights"),
    ("model.ckpt", "from_single_file"), ("README.md", "nor anything else"),
])  # fmt: skip
def test_other_kinds_of_repositories_are_named(name, says, tmp_path):
    write(tmp_path, {name: "{}"})
    assert says in str(examine(str(tmp_path)))


def test_links_are_followed_inside_and_not_outside(folders, tmp_path):
    healthy = folders / "healthy"
    copy = tmp_path / "copy"
    shutil.copytree(healthy, copy)
    (copy / SAFE).rename(copy / "weights")
    (copy / SAFE).symlink_to("../weights")
    assert not examine(str(copy)).findings
    (copy / SAFE).unlink()
    (copy / SAFE).symlink_to(healthy / SAFE)  # weights are often shared so
    diagnosis = examine(str(copy))
    assert [(finding.severity, finding.where) for finding in diagnosis.findings] == [("warning", SAFE)]
    secret = tmp_path / "secret.json"
    secret.write_text('{"_class_name": "Secret"}')
    (copy / UNET).unlink()
    (copy / UNET).symlink_to(secret)
    diagnosis = examine(str(copy))
    assert diagnosis.loads == NOT and "which was not read" in str(diagnosis) and "Secret" not in str(diagnosis)
    shutil.rmtree(copy / "unet")
    (copy / "unet").symlink_to(healthy / "unet")
    assert "was not looked into" in str(examine(str(copy)))
    (copy / INDEX).unlink()
    (copy / INDEX).symlink_to(secret)
    assert "Secret" not in str(examine(str(copy)))


def test_a_folder_of_the_hubs_cache_is_read_through_its_links(folders, tmp_path):
    """Its files are links to a folder beside it."""
    snapshot = tmp_path / "models--user--name" / "snapshots" / "0123"
    for number, (name, content) in enumerate(read(folders / "self_contained").items()):
        blob = tmp_path / "models--user--name" / "blobs" / str(number)
        write(blob.parent, {blob.name: content})
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    assert examine(str(snapshot)).loads == TRUST


def test_files_that_are_no_files_and_contents_that_are_too_much_do_not_stop_it(folders, tmp_path):
    shutil.copytree(folders / "self_contained", tmp_path / "copy")
    (tmp_path / "copy" / "loop").symlink_to("loop")
    (tmp_path / "copy" / "round").symlink_to(".")
    assert examine(str(tmp_path / "copy")).loads == TRUST
    for name in (INDEX, UNET, "pipeline.py"):
        for content in ("[" * 100_000, "-" * 100_000 + "1", "\0", "\udcff".encode(errors="surrogateescape"), "x" * (2**24 + 1)):
            write(tmp_path / "copy", {name: content})
            assert examine(str(tmp_path / "copy")).loads == NOT
        (tmp_path / "copy" / name).unlink()
        os.mkfifo(tmp_path / "copy" / name)  # to open it would wait for ever
        assert examine(str(tmp_path / "copy")).loads == NOT
        (tmp_path / "copy" / name).unlink()
        shutil.copy(folders / "self_contained" / name, tmp_path / "copy" / name)


@pytest.mark.parametrize("index", [
    {"unet": [["a"], {}]}, {"unet": ["", ""]}, {"unet": ["diffusers", ""]}, {"unet": [1, 2]}, {"unet": ["a/" * 9_000, "b"]},
    {"unet": {}}, {"unet": ["diffusers", "__doc__"]}, {"unet": [".", "A"]}, {"unet": ["..unet", "A"]}, {"_class_name": ["", ""]},
    {"_class_name": 3}, {"_class_name": []}, {"_class_name": ["pipeline", None, 3]}, {"_class_name": ["../pipeline", "A"]},
    {"_class_name": "__doc__"},
], ids=str)  # fmt: skip
def test_no_index_is_too_strange(index, bases, tmp_path):
    write(tmp_path, {**bases["shipped"], INDEX: json.dumps({**json.loads(bases["shipped"][INDEX]), **index})})
    assert examine(str(tmp_path)).loads == NOT


def test_names_of_strangers_neither_steer_the_terminal_nor_lead_outside(bases, tmp_path):
    index = {**json.loads(bases["stock"][INDEX]), "\x1b[31m../../etc": ["diffusers", "UNet2DModel"], "_ignore_files": [{}]}
    write(tmp_path, {**bases["stock"], INDEX: json.dumps(index)})
    report = str(examine(str(tmp_path)))
    assert "etc is no argument" in report and "\x1b" not in report


def test_the_index_of_shards_is_read(bases, tmp_path):
    index = "unet/diffusion_pytorch_model.safetensors.index.json"
    for content, says in (
        ("{", "not valid JSON"), ("{}", "lacks"), ('{"weight_map": {}}', "lacks"), ('{"weight_map": 3, "metadata": {}}', "lacks"),
        ('{"weight_map": {"a": "../a.safetensors"}, "metadata": {}}', "names the shard"),
    ):  # fmt: skip
        write(tmp_path, {**bases["stock"], index: content})
        diagnosis = examine(str(tmp_path))
        assert diagnosis.loads == NOT and says in str(diagnosis)
        with pytest.raises((OSError, ValueError, KeyError, AttributeError)):
            DDPMPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("name, revision, says", [
    ("", None, "neither a folder"), ("./nowhere", None, "neither a folder"), ("/nowhere", None, "neither a folder"),
    ("a/b/c", None, "neither a folder"), ("../../nowhere", None, "neither a folder"), ("user/..", None, "neither a folder"),
    ("a" * 5000, None, "neither a folder"), ("user/name\0", None, "neither a folder"),
    ("https://huggingface.co/user/name", None, "neither a folder"),
    ("FOLDER", "main", "no revisions"), (f"FOLDER/{INDEX}", None, "is a file"), ("user/name", None, "cannot be reached"),
])  # fmt: skip
def test_mistakes_are_one_line(name, revision, says, folders):
    with pytest.raises(UsageError, match=says) as error:
        examine(name.replace("FOLDER", str(folders / "healthy")), revision)
    assert "\n" not in str(error.value)


def test_from_the_hub_the_same_is_said_and_the_weights_stay_there(diagnoses, elsewhere):
    for name in FROM_THE_HUB:
        loads, report = elsewhere.answers[f"user/{name}",]
        assert loads == (ALONE if name in UNSEEN_ON_THE_HUB else diagnoses[name].loads), report
        assert f"at {elsewhere.commits[f'user/{name}']}" in report
    pinned = f'revision="{elsewhere.commits["user/self_contained"]}", trust_remote_code=True'
    assert pinned in elsewhere.answers["user/self_contained",][1]
    assert elsewhere.answers["user/never_loaded",][0] == ALONE
    weights = hashlib.sha256(b"weights of its own").hexdigest()
    assert not [request for request in elsewhere.requests if weights in request.path]


def test_mistakes_on_the_hub_are_one_line_without_the_token(elsewhere):
    for question, says in MISTAKES.items():
        kind, message = elsewhere.answers[question]
        assert kind == "UsageError" and says in message and "\n" not in message
    assert READER not in elsewhere.output and "madeUp" not in elsewhere.output
