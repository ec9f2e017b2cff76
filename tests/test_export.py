"""The three forms of an exported pipeline: what is written, what loads it, what has no such form and why."""

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, LDMPipeline
from stranger import make_stranger, run
from test_pipelines import build, make_latent, make_stack, make_stock_vae, make_unet, pixels

from diffusers_edu import EduDDPMScheduler, LatentDiffusionPipeline
from diffusers_edu.errors import UsageError
from diffusers_edu.hub.export import export, export_scheduler
from diffusers_edu.hub.portable import to_stock

RUNGS = {
    "dae": lambda: seeded_stack(),
    "stacked_dae": lambda: build("stacked_dae"),
    "noisy_stacked_dae": lambda: build("noisy_stacked_dae"),
    "vae": lambda: build("vae"),
    "ddpm": lambda: build("ddpm"),
    "latent_diffusion": lambda: build("latent"),
    "latent_diffusion_of_a_stock_vae": lambda: latent_of_stock_vae(),
}
CODE = {
    "dae": ["model/modeling_stacked_dae.py", "pipeline.py"],
    "stacked_dae": ["model/modeling_stacked_dae.py", "pipeline.py"],
    "noisy_stacked_dae": ["model/modeling_stacked_dae.py", "pipeline.py"],
    "vae": ["pipeline.py", "vae/modeling_vae.py"],
    "ddpm": ["scheduler/scheduling_edu_ddpm.py"],
    "latent_diffusion": ["pipeline.py", "scheduler/scheduling_edu_ddpm.py", "vae/modeling_vae.py"],
    "latent_diffusion_of_a_stock_vae": ["pipeline.py", "scheduler/scheduling_edu_ddpm.py"],
}
NOT_PORTABLE = {
    "dae": "no class with the architecture of StackedDenoisingAutoencoder",
    "stacked_dae": "no class with the architecture of StackedDenoisingAutoencoder",
    "noisy_stacked_dae": "no pipeline that samples as StackedDAEPipeline",
    "vae": "no class with the architecture of VariationalAutoencoder",
    "latent_diffusion": "no class with the architecture of VariationalAutoencoder",
}
LOAD = """
import sys, json, numpy, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
for folder, trust in json.loads(sys.argv[1]):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=trust)
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    steps = {} if type(pipe).__name__ == "VAEPipeline" else {"num_inference_steps": 3}
    numpy.save(folder + "/pixels.npy", pipe(batch_size=2, output_type="np", **steps).images)
try:
    import diffusers_edu
except ModuleNotFoundError:
    print("alone")
"""
every_rung = pytest.mark.parametrize("rung", RUNGS)


def seeded_stack():
    torch.manual_seed(0)
    return make_stack(num_stages=1, fresh_noise=False)


def latent_of_stock_vae(**scheduler):
    torch.manual_seed(0)
    vae = make_stock_vae(shift_factor=None).eval()
    pipe = LatentDiffusionPipeline(vae, make_unet(2, 4).eval(), EduDDPMScheduler(clip_sample=False, **scheduler))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded_pixels(pipe):
    """By the global seed, as `LDMPipeline` hands no generator on."""
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    return pixels(pipe, batch_size=2, generator=None)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """The folders of all rungs in all the forms that they have: {(rung, form): folder}."""
    root, made = tmp_path_factory.mktemp("exports"), {}
    for rung, make in RUNGS.items():
        for form in ("plugin", "self-contained", *(() if rung in NOT_PORTABLE else ("portable",))):
            made[rung, form] = root / rung / form
            (root / rung).mkdir(exist_ok=True)
            export(make(), made[rung, form], form)
    return made


@every_rung
def test_a_plugin_form_names_the_package_and_ships_no_code(exports, rung):
    folder = exports[rung, "plugin"]
    assert not [name for name in files(folder) if name.endswith(".py")]
    loaded = DiffusionPipeline.from_pretrained(folder)
    assert abs(seeded_pixels(loaded) - seeded_pixels(RUNGS[rung]())).max() == 0


@every_rung
def test_a_self_contained_form_ships_the_files_of_its_own_classes_and_no_other(exports, rung):
    folder = exports[rung, "self-contained"]
    assert [name for name in files(folder) if name.endswith(".py")] == CODE[rung]
    for name in CODE[rung]:
        (source,) = Path(diffusers_root()).rglob(Path(name).name) if name != "pipeline.py" else [pipeline_file(rung)]
        assert (folder / name).read_bytes() == source.read_bytes()


def diffusers_root():
    return Path(__file__).parent.parent / "diffusers_edu"


def pipeline_file(rung):
    kind = "latent_diffusion" if rung.startswith("latent") else "vae" if rung == "vae" else "stacked_dae"
    return Path(__file__).parent.parent / "pipelines" / f"pipeline_{kind}.py"


@pytest.mark.slow
def test_a_stranger_who_has_diffusers_alone_draws_the_same_pixels(exports, tmp_path):
    folders = {key: folder for key, folder in exports.items() if key[1] != "plugin"}
    jobs = [[str(folder), form == "self-contained"] for (_, form), folder in folders.items()]
    python = make_stranger(tmp_path / "stranger")
    assert run(python, LOAD, json.dumps(jobs), env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}).split() == ["alone"]
    for (rung, form), folder in folders.items():
        difference = abs(np.load(folder / "pixels.npy") - seeded_pixels(RUNGS[rung]())).max()
        assert difference <= (1e-4 if form == "portable" else 1e-6), (rung, form)


@pytest.mark.parametrize("rung", NOT_PORTABLE)
def test_a_rung_without_a_portable_form_says_why(rung, tmp_path):
    with pytest.raises(UsageError, match=NOT_PORTABLE[rung]):
        export(RUNGS[rung](), tmp_path / "out", "portable")
    assert files(tmp_path) == []


@pytest.mark.parametrize("config, reason", [
    ({"variance_type": "analytic", "prediction_errors": [0.1] * 1000}, "analytic"),
    ({"eta": 0.5}, "eta 0.5"),
    ({"eta": 0.0, "clip_sample": True}, "eta 0.0"),
    ({"variance_type": "fixed_large", "timestep_spacing": "trailing"}, "leaves noise"),
    ({"variance_type": "fixed_large", "steps_offset": 1}, "leaves noise"),
])  # fmt: skip
def test_a_scheduler_that_no_stock_class_equals_is_named(config, reason):
    with pytest.raises(UsageError, match=reason):
        to_stock(DDPMPipeline(make_unet(1, 8), EduDDPMScheduler(**config)))


def test_classes_and_a_shift_that_ldm_does_not_know_are_named():
    with pytest.raises(UsageError, match=r"shift_factor, 0\.2"):
        to_stock(build("latent_stock_vae"))
    with pytest.raises(UsageError, match="no class labels"):
        to_stock(make_latent(1, lambda channels: make_stock_vae(channels, shift_factor=None), num_class_embeds=4))


@pytest.mark.parametrize("config", [
    {}, {"variance_type": "fixed_large_log"}, {"variance_type": "fixed_large"}, {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace", "variance_type": "fixed_large"}, {"prediction_type": "v_prediction"}, {"thresholding": True},
    {"num_train_timesteps": 100, "rescale_betas_to_timesteps": True}, {"eta": 0.0, "clip_sample": False},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
])  # fmt: skip
def test_a_portable_scheduler_takes_the_same_steps(config):
    pipe = DDPMPipeline(make_unet(1, 8).eval(), EduDDPMScheduler(**config))
    stock = to_stock(pipe)
    assert type(stock.scheduler).__name__ == ("DDIMScheduler" if config.get("eta") == 0 else "DDPMScheduler")
    assert abs(seeded_pixels(stock) - seeded_pixels(pipe)).max() <= 1e-4


def test_a_learned_variance_is_portable_too():
    unet = make_unet(1, 8, out_channels=2).eval()
    pipe = DDPMPipeline(unet, EduDDPMScheduler(variance_type="learned_range"))
    assert abs(seeded_pixels(to_stock(pipe)) - seeded_pixels(pipe)).max() <= 1e-4


def test_the_latent_rung_becomes_ldm_and_leaves_the_pipeline_as_it_was():
    pipe = latent_of_stock_vae()
    stock = to_stock(pipe)
    assert type(stock) is LDMPipeline
    assert {type(part).__module__.split(".")[0] for part in stock.components.values()} == {"diffusers"}
    assert type(pipe.scheduler) is EduDDPMScheduler


def test_images_that_differ_are_refused(monkeypatch):
    """Were a difference overlooked by the rules, the comparison would find it."""
    from diffusers_edu.hub import portable

    monkeypatch.setattr(portable, "scheduler_reasons", lambda scheduler: [])
    with pytest.raises(UsageError, match="other images"):
        to_stock(DDPMPipeline(make_unet(1, 8).eval(), EduDDPMScheduler(eta=0.5, clip_sample=False)))


@pytest.mark.parametrize("rung", ["ddpm", "latent_diffusion", "noisy_stacked_dae"])
def test_what_was_loaded_with_its_own_code_is_exported_again(exports, rung, tmp_path):
    before = exports[rung, "self-contained"]
    loaded = DiffusionPipeline.from_pretrained(before, trust_remote_code=True)
    export(loaded, tmp_path / "again", "self-contained")
    assert files(tmp_path / "again") == [name for name in files(before) if name != "pixels.npy"]
    for name in files(tmp_path / "again"):
        assert (tmp_path / "again" / name).read_bytes() == (before / name).read_bytes(), name

    export(loaded, tmp_path / "plugin", "plugin")
    folders = tmp_path / "plugin", exports[rung, "plugin"]
    index, expected = (json.loads((folder / "model_index.json").read_text()) for folder in folders)
    assert index == expected
    reloaded = DiffusionPipeline.from_pretrained(tmp_path / "plugin")
    assert abs(seeded_pixels(reloaded) - seeded_pixels(RUNGS[rung]())).max() == 0


def test_no_path_of_the_machine_is_written(tmp_path):
    build("latent").save_pretrained(tmp_path / "run")
    export(DiffusionPipeline.from_pretrained(tmp_path / "run"), tmp_path / "out", "plugin")
    for name in files(tmp_path / "out"):
        if name.endswith(".json"):
            assert str(tmp_path) not in (tmp_path / "out" / name).read_text()


def test_a_scheduler_alone_goes_into_a_stock_pipeline(tmp_path):
    torch.manual_seed(0)
    pipe = DDPMPipeline(make_unet(1, 8).eval(), DDIMScheduler())
    pipe.save_pretrained(tmp_path)
    weights = (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").stat()
    scheduler = EduDDPMScheduler(beta_schedule="squaredcos_cap_v2")
    for form, trust in (("self-contained", True), ("plugin", False)):
        export_scheduler(scheduler, tmp_path, form)
        loaded = DiffusionPipeline.from_pretrained(tmp_path, trust_remote_code=trust)
        assert type(loaded.scheduler).__name__ == "EduDDPMScheduler"
        pipe.scheduler = scheduler
        assert abs(seeded_pixels(loaded) - seeded_pixels(pipe)).max() == 0
        assert [name for name in files(tmp_path) if name.endswith(".py")] == (
            ["scheduler/scheduling_edu_ddpm.py"] if trust else []
        )
    assert (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == weights.st_mtime_ns


def test_a_scheduler_for_a_pipeline_without_one_is_refused(tmp_path):
    build("vae").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="has no scheduler"):
        export_scheduler(EduDDPMScheduler(), tmp_path, "plugin")
    with pytest.raises(UsageError, match="holds no pipeline"):
        export_scheduler(EduDDPMScheduler(), tmp_path / "vae", "plugin")


def test_a_folder_in_use_is_left_as_it_was(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="there already"):
        export(build("vae"), tmp_path / "out", "plugin")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="there already"):
        export(build("vae"), tmp_path / "link", "plugin")
    with pytest.raises(UsageError, match="choose from plugin, self-contained, portable"):
        export(build("vae"), tmp_path / "new", "pickled")
    assert files(tmp_path) == ["out/mine.txt"]


def test_what_goes_wrong_on_the_way_leaves_nothing(tmp_path):
    def full(folder, pipeline):
        raise OSError(28, "No space left on device")

    with pytest.raises(UsageError, match="No space left"):
        export(build("vae"), tmp_path / "out", "plugin", full)
    assert list(tmp_path.iterdir()) == []


SOURCES = {
    "relative": ("from .helper import anything\n", "imports .helper"),
    "neighbour": ("import third_party.helper\n", "imports third_party.helper"),
    "two": ("class Other(DiffusionPipeline):\n    pass\n", "one to a file"),
}


@pytest.mark.parametrize("fault", SOURCES)
def test_a_file_that_cannot_stand_alone_is_refused(fault, tmp_path, monkeypatch):
    """A package of somebody else's, whose pipeline's file needs its neighbours or holds two pipelines."""
    package = tmp_path / "third_party"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("anything = 1\n")
    more, reason = SOURCES[fault]
    (package / "own.py").write_text(f"from diffusers import DiffusionPipeline\n{more}class Own(DiffusionPipeline):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        import third_party.own

        with pytest.raises(UsageError, match=reason):
            export(third_party.own.Own(), tmp_path / "out", "self-contained")
        with pytest.raises(UsageError, match="not registered"):
            export(third_party.own.Own(), tmp_path / "out", "plugin")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "third_party"]:
            del sys.modules[name]


def test_a_class_without_a_file_is_refused(tmp_path):
    class Typed(diffusers.DiffusionPipeline):
        pass

    Typed.__module__ = "__main__"
    with pytest.raises(UsageError, match="in no file"):
        export(Typed(), tmp_path / "out", "self-contained")


COMMUNITY = """
import sys, torch, numpy
from diffusers import AutoModel, DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], custom_pipeline=sys.argv[2], trust_remote_code=True)
print(type(pipe).__name__, type(pipe).__module__.split(".")[0])
print(AutoModel.from_pretrained(sys.argv[1], subfolder="unet").dtype, pipe.to(torch.float16).dtype)
"""


@pytest.mark.slow
def test_a_pipeline_file_serves_as_a_community_pipeline(tmp_path):
    """`custom_pipeline` with the very file, on weights whose index names a pipeline of diffusers."""
    pipe = LDMPipeline(make_stock_vae(shift_factor=None), make_unet(2, 4), DDIMScheduler())
    pipe.save_pretrained(tmp_path / "stock")
    index = json.loads((tmp_path / "stock" / "model_index.json").read_text())
    index["vae"] = index.pop("vqvae")
    (tmp_path / "stock" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "stock" / "vqvae").rename(tmp_path / "stock" / "vae")
    file = pipeline_file("latent_diffusion")
    command = [sys.executable, "-c", COMMUNITY, str(tmp_path / "stock"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LatentDiffusionPipeline", "diffusers_modules", "torch.float32", "torch.float16"]
