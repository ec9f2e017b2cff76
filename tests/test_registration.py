"""The registration with diffusers' loader, which is private API: what this file holds must be tried with every new version."""

import json
import pickle
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoModel, DDIMScheduler, DiffusionPipeline
from diffusers.pipelines import pipeline_loading_utils
from test_pipelines import BUILDERS, build, pixels

import diffusers_edu

ONE_OF_EACH_CLASS = ("noisy_stacked_dae", "vae", "ddpm", "latent")
LOAD_ELSEWHERE = """
import sys, numpy, torch, diffusers_edu
from diffusers import DDIMScheduler, DiffusionPipeline
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    steps = {} if type(pipe).__name__ == "VAEPipeline" else {"num_inference_steps": 3}
    images = pipe(generator=torch.Generator().manual_seed(0), batch_size=2, output_type="np", **steps).images
    numpy.save(folder + "/pixels.npy", images)
    print(type(pipe).__module__, type(pipe).__name__)
swapped = DiffusionPipeline.from_pretrained(sys.argv[-1], scheduler=DDIMScheduler())
print(type(swapped).__name__, type(swapped.scheduler).__name__)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of each pipeline, by name."""
    root = tmp_path_factory.mktemp("saved")
    for name in ONE_OF_EACH_CLASS:
        build(name).save_pretrained(root / name)
    return {name: root / name for name in ONE_OF_EACH_CLASS}


def test_the_private_table_that_registration_writes_to_is_still_there():
    table = getattr(pipeline_loading_utils, "LOADABLE_CLASSES", None)
    assert isinstance(table, dict), "diffusers has no LOADABLE_CLASSES any more: find the new way to register with its loader"
    assert table["diffusers_edu"].keys() == {"ModelMixin", "SchedulerMixin", "DiffusionPipeline"}
    assert "diffusers" in table, "LOADABLE_CLASSES no longer has its old form: library -> {class: [save, load]}"
    # The very dictionary that the loader reads, not a copy.
    assert diffusers.pipelines.pipeline_utils.LOADABLE_CLASSES is table
    for name in table["diffusers_edu"]:
        assert getattr(diffusers_edu, name) is getattr(diffusers, name)


def test_every_exported_class_is_found_in_diffusers():
    assert set(diffusers_edu.__all__) == {
        "EduDDPMScheduler", "StackedDenoisingAutoencoder", "VariationalAutoencoder",
        "StackedDAEPipeline", "VAEPipeline", "LatentDiffusionPipeline",
    }  # fmt: skip
    for name in diffusers_edu.__all__:
        assert getattr(diffusers, name) is getattr(diffusers_edu, name)


def test_another_process_loads_every_pipeline_without_trust_and_draws_the_same_pixels(saved):
    folders = [str(folder) for folder in saved.values()]
    run = subprocess.run([sys.executable, "-c", LOAD_ELSEWHERE, *folders], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [
        "diffusers_edu.pipelines.pipeline_stacked_dae StackedDAEPipeline",
        "diffusers_edu.pipelines.pipeline_vae VAEPipeline",
        "diffusers.pipelines.ddpm.pipeline_ddpm DDPMPipeline",
        "diffusers_edu.pipelines.pipeline_latent_diffusion LatentDiffusionPipeline",
        "LatentDiffusionPipeline DDIMScheduler",
    ]
    for name, folder in saved.items():
        assert abs(np.load(folder / "pixels.npy") - pixels(build(name), batch_size=2)).max() == 0


def test_the_check_that_a_hub_download_makes_finds_no_code_to_trust(saved):
    # Not made for local folders, so a local round trip does not show it.
    for folder in saved.values():
        index = json.loads((folder / "model_index.json").read_text())
        files = [str(path.relative_to(folder)) for path in folder.rglob("*")]
        custom, _ = pipeline_loading_utils._get_custom_components_and_folders(folder.name, index, files)
        assert custom == {}
        assert not [file for file in files if file.endswith(".py")]


@pytest.mark.parametrize("name", ["ddpm", "latent"])
def test_the_scheduler_may_be_swapped_at_loading(saved, name):
    pipe = DiffusionPipeline.from_pretrained(saved[name], scheduler=DDIMScheduler())
    assert type(pipe.scheduler) is DDIMScheduler
    assert np.isfinite(pixels(pipe)).all()


def test_a_model_alone_loads_from_its_subfolder(saved):
    vae = AutoModel.from_pretrained(str(saved["latent"]), subfolder="vae")
    assert type(vae) is diffusers_edu.VariationalAutoencoder
    z = torch.randn(1, 2, 4, 4)
    assert torch.equal(vae.decode(z).sample, build("latent").vae.decode(z).sample)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_pickled_pipeline_draws_the_same_pixels(name):
    pipe = build(name)
    assert abs(pixels(pickle.loads(pickle.dumps(pipe)), batch_size=2) - pixels(pipe, batch_size=2)).max() == 0


@pytest.mark.parametrize("name", diffusers_edu.__all__)
def test_a_class_of_the_same_name_in_diffusers_is_refused(name, monkeypatch):
    diffusers_edu._register()  # again is harmless
    monkeypatch.setattr(diffusers, name, type("Theirs", (), {}))
    with pytest.raises(ImportError, match=name):
        diffusers_edu._register()
    assert getattr(diffusers, name).__name__ == "Theirs"


@pytest.mark.parametrize("device_map", [None, "cpu", "balanced"])
@pytest.mark.parametrize("name", ONE_OF_EACH_CLASS)
def test_a_dtype_and_a_device_map_are_honoured(saved, name, device_map):
    # float16, as DDPMPipeline makes no arrays of bfloat16.
    pipe = DiffusionPipeline.from_pretrained(saved[name], dtype=torch.float16, device_map=device_map)
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert {parameter.dtype for model in models for parameter in model.parameters()} == {torch.float16}
    assert np.isfinite(pixels(pipe, batch_size=2)).all()


@pytest.mark.parametrize("name", ONE_OF_EACH_CLASS)
def test_what_was_loaded_may_be_saved_and_loaded_again(saved, name, tmp_path):
    DiffusionPipeline.from_pretrained(saved[name]).save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert abs(pixels(again, batch_size=2) - pixels(build(name), batch_size=2)).max() == 0
