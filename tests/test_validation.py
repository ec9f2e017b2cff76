"""What is measured while a run goes on: right, the same at every look, and without a trace in the training."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_unet

from diffusers_edu import EduDDPMScheduler, StackedDAEPipeline, StackedDenoisingAutoencoder
from diffusers_edu.rungs import configuration, train_rung
from diffusers_edu.training.averages import Averages
from diffusers_edu.training.configuration import TrainingConfig
from diffusers_edu.training.data import ImageData, load_digits
from diffusers_edu.training.objectives import DenoisingObjective, DiffusionObjective
from diffusers_edu.training.randomness import StepNoise
from diffusers_edu.training.validation import VALIDATION_NAME, Validation


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


class Look:
    """A validation of a tiny diffusion model, and what it is made of."""

    def __init__(self, output, data=None, model=None, **changes):
        flags = {"train_batch_size": 50, "validation_samples": 0, **changes}
        self.output, self.config = output, TrainingConfig(dataset_name="digits", output_dir=str(output), **flags)
        self.model = (model or tiny_unet()).train()
        self.data = data or load_digits()[1]
        self.objective = DiffusionObjective(self.model, EduDDPMScheduler(clip_sample=True))
        pipeline = DDPMPipeline(self.model, self.objective.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        self.averages = Averages(self.model, self.config)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
        self.validation = Validation(
            pipeline, self.objective, self.model, self.data, self.averages, Accelerator(cpu=True), self.config,
            {"num_inference_steps": 3},
        )  # fmt: skip

    def __call__(self, step=1):
        self.validation(step)
        return lines(self.output)[-1]


def lines(folder):
    return [json.loads(line) for line in (folder / VALIDATION_NAME).read_text().splitlines()]


def independent(look, average=None):
    """The loss of each row, one after the other, from the formula."""
    total, scheduler = look.validation.total, look.objective.scheduler
    with torch.no_grad(), look.averages.applied(average):
        look.model.eval()
        losses = []
        for row in range(total):
            noise = StepNoise(look.config.seed, "validation", range(row, row + 1), total)
            x_0 = look.data.batch([int(look.validation.order[row])])["images"]
            epsilon = noise.normal(1, 8, 8)
            t = (noise.stratified_uniform() * 1000).long()
            alpha_bar = scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
            estimate = look.model(alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * epsilon, t).sample
            losses.append((estimate - epsilon).square().mean())
        look.model.train()
    return torch.stack(losses).double()


@pytest.mark.parametrize(("count", "name"), [(7, "raw"), (540, "ema")], ids=["few_images", "digits"])
def test_the_loss_is_the_mean_over_the_rows_and_the_curve_that_of_ten_ranges_of_noise(tmp_path, count, name):
    look = Look(tmp_path, load_digits()[1].head(count))
    line = look()
    rows = independent(look, {"raw": None, "ema": "ema"}[name])
    bins = torch.arange(len(rows)) * 10 // len(rows)
    curve = [rows[bins == number].mean().item() for number in range(10)]
    assert abs(line[name]["loss"] - rows.mean().item()) < 1e-5
    assert max(abs(a - b) for a, b in zip(line[name]["curve"], curve, strict=True)) < 1e-5
    assert abs(line["raw"]["loss"] - line["ema"]["loss"]) > 1e-3


def test_the_mean_of_the_curve_is_the_loss(tmp_path):
    line = Look(tmp_path)()
    for name in ("raw", "ema"):
        assert np.mean(line[name]["curve"]) == pytest.approx(line[name]["loss"], abs=1e-6)
        assert np.std(line[name]["curve"]) > 1e-3


def test_terms_are_measured_too(tmp_path):
    config = TrainingConfig(dataset_name="digits", output_dir=str(tmp_path), validation_samples=0)
    model = StackedDenoisingAutoencoder(num_stages=2)
    objective, averages = DenoisingObjective(model), Averages(model, config)
    data, pipeline = load_digits()[1], StackedDAEPipeline(model)
    Validation(pipeline, objective, model, data, averages, Accelerator(cpu=True), config, {})(1)
    raw = lines(tmp_path)[0]["raw"]
    assert raw.keys() == {"loss", "stage_1", "stage_2", "curve"}
    assert raw["loss"] == pytest.approx(raw["stage_1"] + raw["stage_2"], rel=1e-5)


def test_every_look_at_the_same_weights_is_the_same_whatever_the_batch(tmp_path):
    look = Look(tmp_path)
    first = look(1)
    torch.rand(7)
    assert look(2) == {**first, "step": 2}
    other = Look(tmp_path, train_batch_size=64)(3)
    for name in ("raw", "ema"):
        assert other[name]["loss"] == pytest.approx(first[name]["loss"], abs=1e-6)
        assert other[name]["curve"] == pytest.approx(first[name]["curve"], abs=1e-6)
    assert Look(tmp_path, seed=1)(4)["raw"]["loss"] != first["raw"]["loss"]


@pytest.mark.parametrize(("count", "total"), [(1, 512), (7, 512), (512, 512), (540, 540), (2048, 2048), (3000, 2048)])
def test_few_images_are_looked_at_again_and_of_many_the_first(tmp_path, count, total):
    data = ImageData(torch.zeros(count, 1, 8, 8, dtype=torch.uint8), 16)
    validation = Look(tmp_path, data).validation
    assert validation.total == len(validation.order) == total
    times = torch.bincount(validation.order, minlength=min(count, total))
    assert len(times) == min(count, total)
    assert times.max() - times.min() <= 1 and times.sum() == total


def test_without_an_average_there_is_the_raw_loss_alone(tmp_path):
    assert Look(tmp_path, use_ema=False)().keys() == {"step", "raw"}


def test_of_two_profiles_the_nearer_is_measured(tmp_path):
    look = Look(tmp_path, ema_sigma_rel=0.06)
    rows = independent(look, "0.050")
    assert look()["ema"]["loss"] == pytest.approx(rows.mean().item(), abs=1e-5)


def test_the_model_is_measured_without_dropout_and_left_in_training_with_its_weights(tmp_path):
    with_dropout, without = Look(tmp_path, model=tiny_unet(dropout=0.5)), Look(tmp_path)
    before = {name: tensor.clone() for name, tensor in with_dropout.model.state_dict().items()}
    line = with_dropout()
    assert with_dropout.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in with_dropout.model.state_dict().items())
    assert line["raw"]["loss"] == pytest.approx(without(2)["raw"]["loss"], abs=1e-6)
    assert all(parameter.grad is None for parameter in with_dropout.model.parameters())


def test_the_model_is_left_in_training_when_a_look_fails(tmp_path, monkeypatch):
    look = Look(tmp_path)
    monkeypatch.setattr(look.objective, "loss", lambda *_: 1 / 0)
    before = {name: tensor.clone() for name, tensor in look.model.state_dict().items()}
    for average in (None, "ema"):
        with pytest.raises(ZeroDivisionError):
            look.validation.losses(average)
    with pytest.raises(ZeroDivisionError):
        look()
    assert look.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in look.model.state_dict().items())


def test_a_sample_is_a_function_of_the_seed_and_its_number_drawn_with_the_average(tmp_path):
    few, many = (Look(tmp_path, validation_samples=count).validation.samples() for count in (3, 7))
    assert many.shape == (7, 8, 8, 1) and many.dtype == torch.uint8
    assert (many[:3].int() - few.int()).abs().max() <= 1  # another kernel may round otherwise
    assert len(many.flatten(1).unique(dim=0)) == 7
    look = Look(tmp_path, validation_samples=3)
    with look.averages.applied("ema"):
        drawn_raw = Look(tmp_path, validation_samples=3, use_ema=False)
        drawn_raw.model.load_state_dict(look.model.state_dict())
    assert torch.equal(drawn_raw.validation.samples(), few)
    other = Look(tmp_path, validation_samples=3, seed=1).validation.samples()
    assert (other.int() - few.int()).abs().max() > 20


@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 1, 1), (7, 3, 3), (16, 4, 4)])
def test_the_samples_are_written_as_a_grid(tmp_path, count, rows, columns):
    look = Look(tmp_path, validation_samples=count)
    look(30)
    picture = np.asarray(Image.open(tmp_path / "samples" / "step-00000030.png"))
    zoom = 8
    small = picture[::zoom, ::zoom]
    assert small.shape == (rows * 9 - 1, columns * 9 - 1)
    assert np.array_equal(picture, small.repeat(zoom, 0).repeat(zoom, 1))
    expected = look.validation.samples()[..., 0].numpy()
    for number in range(rows * columns):
        top, left = number // columns * 9, number % columns * 9
        shown = small[top : top + 8, left : left + 8]
        assert np.array_equal(shown, expected[number] if number < count else np.full((8, 8), 255))


def test_coloured_samples_are_written_in_colour(tmp_path):
    look = Look(tmp_path)
    images = torch.randint(256, (4, 70, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    look.validation.show(images, 2)
    picture = np.asarray(Image.open(tmp_path / "samples" / "step-00000002.png"))
    assert picture.shape == (141, 141, 3)
    assert np.array_equal(picture[71:, :70], images[2].numpy())


FLAGS = {"dataset_name": "digits", "train_batch_size": 64, "max_train_steps": 6, "lr_warmup_steps": 2,
         "checkpointing_steps": 3, "validation_steps": 3, "validation_samples": 4}  # fmt: skip


def run(folder, **changes):
    AcceleratorState._reset_state(reset_partial_state=True)
    train_rung(configuration("vae", output_dir=str(folder), **{**FLAGS, **changes}))
    losses = [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]
    return losses, load_file(next((folder / "vae").glob("*.safetensors")))


def test_a_run_learns_the_same_with_and_without_looks(tmp_path):
    (losses, weights), (others, other_weights) = run(tmp_path / "with"), run(tmp_path / "without", validation_steps=0)
    assert losses == others
    assert all(torch.equal(tensor, other_weights[name]) for name, tensor in weights.items())
    assert [line["step"] for line in lines(tmp_path / "with")] == [3, 6]
    assert sorted(path.name for path in (tmp_path / "with" / "samples").iterdir()) == [
        f"step-0000000{step}.png" for step in (3, 6)
    ]
    assert not (tmp_path / "without" / VALIDATION_NAME).exists() and not (tmp_path / "without" / "samples").exists()


def test_a_run_that_goes_on_writes_the_looks_of_one_that_was_never_stopped(tmp_path):
    run(tmp_path, validation_samples=0)
    whole = lines(tmp_path)
    run(tmp_path, validation_samples=0, resume_from_checkpoint="checkpoint-3")
    assert lines(tmp_path) == whole
    with (tmp_path / VALIDATION_NAME).open("a") as file:
        file.write('{"step": 8, "raw": {"loss": 0')
    run(tmp_path, validation_samples=0, resume_from_checkpoint="checkpoint-3")
    assert lines(tmp_path) == whole
