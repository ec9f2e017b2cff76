"""Exporting a run with its evidence, and verifying what a card says; publishing itself is in test_publish."""

import dataclasses
import json
import shlex

import numpy as np
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from test_pipelines import build

from diffusers_edu import cli
from diffusers_edu.errors import UsageError
from diffusers_edu.hub.card import Claim, Evidence, Subject, make_card, picture, read_card
from diffusers_edu.publishing import command_of, compare, export_run, export_scheduler_of, verify_card, without_paths
from diffusers_edu.rungs import configuration, train_rung
from diffusers_edu.runs import measure_pipeline

QUICK = {"dataset_name": "digits", "max_train_steps": 3, "train_batch_size": 8, "lr_warmup_steps": 1, "validation_samples": 0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of three steps."""
    folder = tmp_path_factory.mktemp("run") / "mine"
    train_rung(configuration("vae", output_dir=str(folder), **QUICK))
    return folder


@pytest.fixture
def exported(run, tmp_path):
    export_run(run, tmp_path / "out", "self-contained", num_samples=60)
    return tmp_path / "out"


def card_of(folder):
    """The metadata of a card as YAML, and its text."""
    _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_the_card_holds_the_evidence(exported):
    metadata, text = card_of(exported)
    assert metadata["library_name"] == "diffusers"
    assert (metadata["license"], metadata["datasets"], metadata["form"]) == ("apache-2.0", ["digits"], "self-contained")
    assert {"diffusers-edu", "vae"} <= set(metadata["tags"])
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"] == {"name": "digits", "type": "digits", "split": "held out"}
    by_name = {metric["type"]: metric for metric in result["metrics"]}
    assert by_name.keys() == {
        "frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage", "diversity", "two_sample_accuracy",
        "train_on_synthetic",
    }  # fmt: skip
    for metric in by_name.values():
        low, high = metric["args"]["interval"]
        assert low <= metric["value"] <= high
        assert (metric["args"]["num_samples"], metric["args"]["held_out"], metric["args"]["seed"]) == (60, 540, 0)
    assert (by_name["precision"]["args"]["n"], by_name["recall"]["args"]["n"]) == (60, 540)
    for name, metric in by_name.items():
        assert f"| {name.replace('_', ' ')} | {metric['value']:.4f} |" in text
    for heading in ("How to load it", "Measured", "How it was made", "What it is not good for"):
        assert f"## {heading}\n" in text
    assert "trust_remote_code=True" in text
    assert "--rung vae" in text


def test_the_figures_are_those_of_the_pipeline_and_the_floor_is_of_as_many_real_images(run, exported):
    config = configuration("vae", output_dir=str(run), **QUICK)
    pipeline = DiffusionPipeline.from_pretrained(run)
    measured = measure_pipeline(pipeline, config, 60, None, 0)
    _, evidence = read_card(exported / "README.md")
    for claim in evidence.claims:
        assert claim.value == pytest.approx(measured.metrics[claim.name].value, rel=1e-5, abs=1e-9)
        assert claim.floor == pytest.approx(measured.floor[claim.name].value, rel=1e-5, abs=1e-9)
    assert measured.floor["precision"].n == 60


def test_the_picture_shows_the_first_samples(run, exported):
    image = Image.open(exported / "samples.png")
    pipeline = DiffusionPipeline.from_pretrained(run)
    config = configuration("vae", output_dir=str(run), **QUICK)
    first = measure_pipeline(pipeline, config, 60, None, 0).samples[0, 0]
    corner = np.asarray(image.convert("L"))[3:48:6, 3:48:6] / 255
    assert abs(corner - first.numpy()).max() <= 1 / 255


@pytest.mark.parametrize("form", ["plugin", "self-contained"])
def test_an_export_verifies_and_one_exported_again_does_too(run, tmp_path, form, capsys):
    trust = form == "self-contained"
    export_run(run, tmp_path / "out", form, num_samples=40)
    assert verify_card(str(tmp_path / "out"), trust_remote_code=trust)
    export_run(tmp_path / "out", tmp_path / "again", form, num_samples=40, trust_remote_code=trust)
    assert verify_card(str(tmp_path / "again"), trust_remote_code=trust)
    first, second = (card_of(tmp_path / name)[0]["model-index"][0]["results"] for name in ("out", "again"))
    assert first == second
    assert "outside" not in capsys.readouterr().out


def test_a_figure_that_was_made_up_is_found(exported, capsys):
    path = exported / "README.md"
    claim = read_card(path)[1].claims[0]
    path.write_text(path.read_text().replace(f"{claim.interval[1]:.6g}", f"{claim.value * 0.9:.6g}"))
    assert not verify_card(str(exported), trust_remote_code=True)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "outside" in line]
    assert line.startswith(claim.name)


def test_other_weights_are_found(exported):
    path = exported / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: torch.zeros_like(tensor) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    assert not verify_card(str(exported), trust_remote_code=True)


def test_weights_that_are_missing_are_a_verdict(exported, capsys):
    (exported / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert not verify_card(str(exported), trust_remote_code=True)
    assert "does not load" in capsys.readouterr().out


def test_code_is_not_run_unasked(exported):
    (exported / "pipeline.py").write_text("raise RuntimeError('run')\n" + (exported / "pipeline.py").read_text())
    with pytest.raises(UsageError, match="--trust_remote_code"):
        verify_card(str(exported))


def test_figures_on_other_features_are_not_held_against_ours(exported):
    path = exported / "README.md"
    assert "features: pixels" in path.read_text()
    path.write_text(path.read_text().replace("features: pixels", "features: fashion-cnn-00000000"))
    with pytest.raises(UsageError, match="on fashion-cnn-00000000, and there is fashion-cnn-"):
        verify_card(str(exported), trust_remote_code=True)


@pytest.mark.parametrize("damage, message", [
    (lambda folder: (folder / "README.md").unlink(), "has no README.md"),
    (lambda folder: (folder / "training_config.json").unlink(), r"has no training_config\.json"),
    (lambda folder: (folder / "training_config.json").write_text("{"), "no configuration"),
    (lambda folder: (folder / "README.md").write_text("---\nlicense: mit\n---\n# A card"), "states no figures"),
    (lambda folder: (folder / "README.md").write_text("no metadata"), "states no figures"),
    (lambda folder: (folder / "README.md").write_text(
        (folder / "README.md").read_text().replace("interval:", "about:")), "metadata cannot be read"),
])  # fmt: skip
def test_a_card_that_says_nothing_to_verify_is_named(exported, damage, message):
    damage(exported)
    with pytest.raises(UsageError, match=message):
        verify_card(str(exported), trust_remote_code=True)


def test_a_name_with_tricks_is_refused_before_any_request():
    for name in ("../nowhere", "a/b/c", "/nowhere", "a--b"):
        with pytest.raises(UsageError, match="is no name of a repository"):
            verify_card(name)


def test_figures_are_compared_with_the_stated_interval(capsys):
    class Measured:
        def __init__(self, value):
            self.value = value

    claims = [Claim("a", 1.0, (0.9, 1.1), 10, 0.5), Claim("b", 0.0, (0.0, 0.0), 10, 0.5)]
    assert compare(claims, {"a": Measured(1.1), "b": Measured(5e-7)})
    assert not compare(claims, {"a": Measured(1.11), "b": Measured(0.0)})
    assert not compare(claims, {"a": Measured(1.0), "b": Measured(2e-6)})
    assert not compare(claims, {"a": Measured(1.0)})
    assert "no figure of ours" in capsys.readouterr().out


@pytest.mark.parametrize("steps", [None, 50])
def test_a_card_reads_back_what_was_written(tmp_path, steps):
    claims = [Claim("frechet_distance", 0.1234565, (-0.5, 1.5), 100, 0.07), Claim("recall", 1.0, (0.9, 1.0), 540, 0.9)]
    evidence = Evidence(claims, "my images", 540, 100, steps, 3, "fashion-cnn-12345678")
    subject = Subject("A title", "", "plugin", "me/it", "v-1", "DDPMPipeline", limits=["Nothing."])
    make_card(subject, evidence, 8).save(tmp_path / "README.md")
    form, read = read_card(tmp_path / "README.md")
    assert form == "plugin"
    assert dataclasses.replace(read, claims=[]) == dataclasses.replace(evidence, claims=[])
    assert [claim.name for claim in read.claims] == ["frechet_distance", "recall"]
    assert read.claims[0].value == pytest.approx(0.1234565, rel=1e-5)
    assert "The features are fashion-cnn-12345678: this Fréchet distance is not FID" in (tmp_path / "README.md").read_text()


def test_only_with_inception_is_the_distance_called_fid(tmp_path):
    evidence = Evidence(
        [Claim("frechet_distance", 12.3, (12.0, 12.6), 100, 2.0)], "my images", 540, 100, 50, 3, "inception-v3-compat"
    )
    make_card(Subject("A title", "", "plugin", "me/it", "v-1", "DDPMPipeline"), evidence, 8).save(tmp_path / "README.md")
    assert "with which the Fréchet distance is FID" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("mode, size", [("L", 8), ("RGB", 100)])
def test_a_picture_has_all_its_tiles(mode, size):
    images = [Image.new(mode, (size, size), "white" if mode == "L" else "red") for _ in range(3)]
    scale = max(1, 48 // size)
    assert picture(images, columns=2).size == (2 * size * scale + 2, 2 * size * scale + 2)


def test_a_pipeline_without_a_run_is_exported_without_figures(tmp_path):
    build("vae").save_pretrained(tmp_path / "any")
    export_run(tmp_path / "any", tmp_path / "out", "plugin", license="mit")
    metadata, text = card_of(tmp_path / "out")
    assert metadata["license"] == "mit"
    assert "model-index" not in metadata
    assert "Nothing was measured" in text
    assert "## Measured" not in text
    with pytest.raises(UsageError, match="states no figures"):
        verify_card(str(tmp_path / "out"))


def test_the_command_of_the_card_gives_the_same_configuration(monkeypatch):
    config = configuration(
        "ddpm", train_data_dir="some images", output_dir="out", snr_gamma=5.0, center_crop=False, random_flip=True, resolution=16,
        learning_rate=3e-4, push_to_hub=True, hub_model_id="me/it",
    )  # fmt: skip
    words = shlex.split(command_of(config).replace("\\\n", " "))
    assert words[:3] == ["accelerate", "launch", "scripts/train.py"]
    seen = []
    monkeypatch.setattr("diffusers_edu.rungs.train_rung", seen.append)
    cli.train(words[3:])
    assert seen == [dataclasses.replace(config, push_to_hub=False, hub_model_id=None)]


def test_the_shipped_configuration_names_no_places(run, exported):
    shipped = json.loads((exported / "training_config.json").read_text())
    assert shipped["output_dir"] == "mine"
    assert str(run.parent) not in "".join(path.read_text() for path in exported.rglob("*") if path.suffix in (".json", ".md"))
    config = configuration("vae", train_data_dir="/home/me/pictures", output_dir="/tmp/out", vae_path="/home/me/vae")
    bare = without_paths(config)
    assert (bare.train_data_dir, bare.output_dir, bare.vae_path) == ("pictures", "out", "vae")


@pytest.mark.parametrize("arguments, message", [
    (["export", "RUN", "OUT", "--form", "pickled"], "invalid choice: 'pickled'"),
    (["export", "nowhere", "OUT", "--form", "plugin"], "nowhere holds no pipeline"),
    (["export", "RUN", "OUT", "--form", "portable"], "no class with the architecture of VariationalAutoencoder"),
    (["export", "RUN", "OUT", "--num_samples", "2"], "--num_samples 2"),
    (["export", "RUN", "RUN", "--form", "plugin"], "is there already"),
    (["export", "RUN", "OUT", "--scheduler_only"], "has no scheduler"),
    (["export", "RUN", "OUT", "--train_data_dir", "nowhere"], "no such folder"),
    (["publish", "RUN", "--repo_id", "../x"], "../x is no name of a repository"),
    (["publish", "RUN"], "--repo_id"),
    (["publish", "RUN", "--repo_id", "me/x"], "not logged in"),
    (["verify", "RUN"], "has no README.md"),
    (["train", "--rung", "vae", "--dataset_name", "digits", "--output_dir", "OUT", "--push_to_hub"], "not logged in"),
    (["train", "--rung", "vae", "--dataset_name", "digits", "--push_to_hub", "--hub_model_id", "a/b/c"], "a/b/c is no name"),
])  # fmt: skip
def test_a_mistake_is_one_line_and_nothing_is_written(run, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("diffusers_edu.hub.publish.get_token", lambda: None)
    places = {"RUN": str(run), "OUT": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as stopped:
        cli.main([places.get(argument, argument) for argument in arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert list(tmp_path.iterdir()) == []


def test_a_chain_shorter_than_the_rungs_steps_is_measured_in_all_of_its_own():
    pipe = build("ddpm")
    pipe.scheduler = type(pipe.scheduler)(num_train_timesteps=3, beta_schedule="squaredcos_cap_v2")
    config = configuration("ddpm", dataset_name="digits", num_train_timesteps=3)
    assert measure_pipeline(pipe, config, 12, None, 0).num_inference_steps == 3
    for steps in (0, 4):
        with pytest.raises(UsageError, match="1 to 3"):
            measure_pipeline(pipe, config, 12, steps, 0)


def test_the_scheduler_of_a_run_goes_into_another_pipeline(tmp_path):
    build("ddpm").save_pretrained(tmp_path / "run")
    build("latent").save_pretrained(tmp_path / "other")
    export_scheduler_of(tmp_path / "run", tmp_path / "other", "plugin")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "other")
    assert loaded.scheduler.config.clip_sample is True
