"""What is done with a run that has ended, on pipelines of which the answer is known."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffusers_edu import EduDDPMScheduler
from diffusers_edu.bounds import likelihoods, windows
from diffusers_edu.cli import main
from diffusers_edu.errors import UsageError
from diffusers_edu.runs import measure_pipeline
from diffusers_edu.training.configuration import TrainingConfig
from diffusers_edu.training.data import ImageData


def sorted_by_class(each: int, seed: int) -> ImageData:
    """Images of two classes, dark and bright, one class after the other as in folders."""
    noise = torch.rand((2 * each, 1, 4, 4), generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(2 * each) // each
    return ImageData(((labels.reshape(-1, 1, 1, 1) + noise) / 2 * 255).to(torch.uint8), 255, labels, ["dark", "bright"])


class Perfect:
    """A model of classes that draws as the data does; or says `always`."""

    device = torch.device("cpu")

    def __init__(self, always=None):
        self.asked, self.always = [], always
        unet = SimpleNamespace(config=SimpleNamespace(num_class_embeds=3))
        self.components = {"unet": unet, "scheduler": EduDDPMScheduler(clip_sample=False)}
        self.scheduler = self.components["scheduler"]

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, batch_size, generator, class_labels, **_):
        self.asked.append(class_labels)
        if self.always is not None:
            return SimpleNamespace(images=np.full((batch_size, 4, 4, 1), self.always, dtype=np.float32))
        noise = torch.stack([torch.rand((4, 4, 1), generator=each) for each in generator])
        return SimpleNamespace(images=((class_labels.reshape(-1, 1, 1, 1) + noise) / 2).numpy())


@pytest.fixture
def data(monkeypatch):
    pair = sorted_by_class(150, 0), sorted_by_class(500, 1)
    monkeypatch.setattr("diffusers_edu.runs.load_data", lambda config: pair)
    return pair


CONFIG = TrainingConfig(rung="latent_diffusion", dataset_name="digits", output_dir="nowhere", class_conditional=True)


def test_fewer_samples_than_held_out_images_are_of_all_classes_though_files_are_sorted_by_them(data):
    model = Perfect()
    measured = measure_pipeline(model, CONFIG, 200, 5, seed=0)
    assert torch.cat(model.asked).double().mean() == pytest.approx(0.5, abs=0.1)
    assert measured.metrics["frechet_distance"].value < 2 * measured.floor["frechet_distance"].value
    assert measured.metrics["train_on_synthetic"].value > 0.99


def test_more_samples_than_held_out_images_have_their_classes_as_often(data):
    model = Perfect()
    measure_pipeline(model, CONFIG, 2000, 5, seed=0)
    assert torch.cat(model.asked).bincount().tolist() == [1000, 1000]


def test_a_model_that_has_diverged_is_told(data):
    with pytest.raises(UsageError, match="not finite: the model has diverged"):
        measure_pipeline(Perfect(always=float("nan")), CONFIG, 20, 5, seed=0)


def test_held_out_images_that_are_all_alike_are_told(data, monkeypatch):
    alike = ImageData(torch.full((20, 1, 4, 4), 7, dtype=torch.uint8))
    monkeypatch.setattr("diffusers_edu.runs.load_data", lambda config: (data[0], alike))
    with pytest.raises(UsageError, match="20 held-out images are all the same"):
        measure_pipeline(Perfect(), CONFIG, 20, 5, seed=0)


def test_without_dropped_classes_a_model_has_no_bound_for_an_image_alone(data):
    config = TrainingConfig(**{**vars(CONFIG), "conditioning_dropout_prob": 0.0})
    (found,) = likelihoods(Perfect(), config, *data, seed=0)
    assert "--conditioning_dropout_prob 0" in found["none"]


def test_windows_are_of_as_many_samples_as_there_are_training_images_to_stand_beside_them(data):
    train, held_out = data
    many = torch.rand(3000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    left = len(train) - round(0.2 * len(train))
    assert windows(many, train, held_out, 3000) == windows(many[:left], train, held_out, left)


@pytest.mark.slow
def test_chains_of_other_lengths_are_bounded_on_request(tmp_path, capsys):
    run = str(tmp_path / "run")
    flags = ["--max_train_steps", "2", "--num_train_timesteps", "30", "--validation_steps", "0"]
    main(["train", "--rung", "ddpm", "--dataset_name", "digits", "--output_dir", run, *flags])
    capsys.readouterr()
    asked = ["--num_samples", "10", "--num_inference_steps", "1", "--likelihood_steps", "3", "30", "1000"]
    main(["evaluate", run, *asked])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    bounds = [line["likelihood"] for line in lines if "likelihood" in line]
    assert [bound["steps"] for bound in bounds] == [3, 30] * 3
    assert all(len(bound["timesteps"]) == bound["steps"] for bound in bounds)
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", run, "--likelihood", "--likelihood_steps", "0"])
    assert stop.value.code == 2
    assert "--likelihood_steps 0: a chain has at least 1" in capsys.readouterr().err
