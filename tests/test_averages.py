"""Averages of the weights: each against its definition, and lengths chosen after the run against those tracked in it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import nn

from diffusers_edu.cli import main
from diffusers_edu.errors import UsageError
from diffusers_edu.rungs import configuration, train_rung
from diffusers_edu.training import averages as averages_module
from diffusers_edu.training.averages import (
    SNAPSHOTS,
    Averages,
    PowerAverage,
    discard_snapshots,
    exponent,
    mixture,
    save_snapshot,
    snapshot_steps,
    snapshots,
    synthesise,
)
from diffusers_edu.training.configuration import TrainingConfig

STEPS = 400


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


def settings(**changes):
    return TrainingConfig(dataset_name="digits", **changes)


def trajectory(steps=STEPS, size=200):
    """A random walk of weights, float64 (steps, size), that drifts."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(steps, size, generator=generator, dtype=torch.float64).cumsum(0) / 20 + torch.arange(steps)[:, None] / 100
    )


def follow(path, parameter, *followers):
    """Let averages see a trajectory; yields the step after each."""
    for step, theta in enumerate(path, 1):
        parameter.data.copy_(theta)
        for follower in followers:
            follower.step([parameter])
        yield step


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_are_the_published_ones(sigma_rel, gamma):
    assert exponent(sigma_rel) == pytest.approx(gamma, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.03, 0.1, 0.2, 0.25, 0.28])
def test_a_profile_has_the_width_asked_for(sigma_rel):
    gamma = exponent(sigma_rel)
    u = (np.arange(2_000_000) + 0.5) / 2_000_000
    profile = u**gamma / (u**gamma).sum()
    mean = (profile * u).sum()
    assert math.sqrt((profile * (u - mean) ** 2).sum()) == pytest.approx(sigma_rel, rel=1e-4)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(sigma_rel**2, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_a_power_average_is_the_weighted_mean_of_all_weights_so_far(sigma_rel):
    path, parameter, gamma = trajectory(), nn.Parameter(torch.zeros(200, dtype=torch.float64)), exponent(sigma_rel)
    average = PowerAverage([parameter], sigma_rel)
    weights = np.zeros(STEPS)
    for step in follow(path, parameter, average):
        decay = (1 - 1 / step) ** (gamma + 1)
        weights *= decay
        weights[step - 1] = 1 - decay
        if step in (1, 7, STEPS):
            expected = torch.from_numpy(weights) @ path
            assert (average.shadow_params[0] - expected).abs().max() < 1e-10
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    power = np.arange(1, STEPS + 1) ** gamma
    assert abs(weights - power / power.sum()).sum() < (gamma + 1) / STEPS


@pytest.mark.parametrize("tracked", [0, 1])
def test_a_tracked_profile_at_a_snapshot_is_made_of_that_snapshot_alone(tracked):
    steps, sigmas = [50, 50, 100, 100, 150, 150, 200, 200], [0.05, 0.10] * 4
    weights = mixture(steps, sigmas, sigmas[tracked], 200)
    expected = np.zeros(8)
    expected[6 + tracked] = 1
    assert abs(weights - expected).max() < 1e-6


def test_the_inner_product_is_the_integral_of_the_product():
    t = (np.arange(1_000_000) + 0.5) / 1_000_000 * 300
    for (t_a, gamma_a), (t_b, gamma_b) in [((300, 7.0), (300, 17.0)), ((120, 2.5), (300, 7.0)), ((300, 17.0), (40, 0.5))]:
        a, b = ((gamma + 1) * t**gamma / end ** (gamma + 1) * (t <= end) for end, gamma in ((t_a, gamma_a), (t_b, gamma_b)))
        got = averages_module.inner_product(*map(np.array, (t_a, gamma_a, t_b, gamma_b)))
        assert got == pytest.approx((a * b).mean() * 300, rel=1e-4)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A run's folder of snapshots, and averages of other lengths that were tracked while it went on."""
    run, parameter = tmp_path_factory.mktemp("run"), nn.Parameter(torch.zeros(200, dtype=torch.float64))
    config = settings(max_train_steps=STEPS, ema_sigma_rel=0.1)
    tracked = {sigma: PowerAverage([parameter], sigma) for sigma in (0.03, 0.05, 0.07, 0.1, 0.15, 0.2)}
    for step in follow(trajectory(), parameter, *tracked.values()):
        if step in snapshot_steps(config):
            for sigma in averages_module.TRACKED:
                save_snapshot(run, step, f"{sigma:.3f}", {"w": tracked[sigma].shadow_params[0].float()})
    return run, {sigma: average.shadow_params[0] for sigma, average in tracked.items()}


def distance(a, b):
    return (a.double() - b.double()).norm().item()


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.2])
def test_an_average_made_after_the_run_is_the_one_that_would_have_been_tracked(walked, sigma_rel):
    run, tracked = walked
    made = synthesise(run, sigma_rel)["w"]
    nearest = min(distance(tracked[sigma], tracked[sigma_rel]) for sigma in averages_module.TRACKED)
    assert made.dtype == torch.float32
    assert distance(made, tracked[sigma_rel]) < 0.1 * nearest


def test_a_tracked_average_is_given_back(walked):
    run, tracked = walked
    for sigma in averages_module.TRACKED:
        assert (synthesise(run, sigma)["w"] - tracked[sigma]).abs().max() < 1e-5


def test_more_snapshots_make_an_average_more_exact(walked, tmp_path):
    run, tracked = walked
    for number, (step, sigma, path) in enumerate(snapshots(run)):
        if number // 2 % 4 == 3:
            save_snapshot(tmp_path, step, f"{sigma:.3f}", load_file(path))
    assert len(snapshots(tmp_path)) == 8
    few, many = (distance(synthesise(folder, 0.03)["w"], tracked[0.03]) for folder in (tmp_path, run))
    assert many < few / 2


@pytest.mark.parametrize("sigma_rel", [0.0, 0.009, 0.26, -1, float("nan")])
def test_a_length_out_of_range_is_refused(walked, sigma_rel):
    with pytest.raises(UsageError, match=r"between 0\.01 and 0\.25"):
        synthesise(walked[0], sigma_rel)


def test_snapshots_are_kept_evenly_and_those_of_an_earlier_attempt_go(tmp_path):
    assert snapshot_steps(settings(max_train_steps=100, ema_sigma_rel=0.1, ema_snapshots=4)) == {25, 50, 75, 100}
    assert snapshot_steps(settings(max_train_steps=3, ema_sigma_rel=0.1, ema_snapshots=16)) == {1, 2, 3}
    assert snapshot_steps(settings(max_train_steps=100)) == set()
    assert snapshot_steps(settings(max_train_steps=100, ema_sigma_rel=0.1, use_ema=False)) == set()
    for step in (5, 10, 100):
        save_snapshot(tmp_path, step, "0.050", {"w": torch.zeros(1)})
    (tmp_path / SNAPSHOTS / "saving-120-0.050").write_text("cut off")
    assert [(step, sigma) for step, sigma, _ in snapshots(tmp_path)] == [(5, 0.05), (10, 0.05), (100, 0.05)]
    discard_snapshots(tmp_path, 10)
    assert [step for step, _, _ in snapshots(tmp_path)] == [5, 10]
    assert len(list((tmp_path / SNAPSHOTS).iterdir())) == 2  # what was left half written is gone too


def test_the_average_with_warm_up_is_that_of_diffusers():
    config = settings(ema_max_decay=0.9, ema_inv_gamma=2.0, ema_power=0.6)
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    ours = Averages(model, config)
    theirs = EMAModel(model.parameters(), decay=0.9, use_ema_warmup=True, inv_gamma=2.0, power=0.6)
    for _ in range(20):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.step()
        theirs.step(model.parameters())
    assert ours.shown == "ema" and list(ours.members) == ["ema"]
    for a, b in zip(ours.members["ema"].shadow_params, theirs.shadow_params, strict=True):
        assert (a - b).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("flags", "members", "shown"),
    [
        ({"use_ema": False}, [], None),
        ({}, ["ema"], "ema"),
        ({"ema_sigma_rel": 0.2}, ["0.050", "0.100"], "0.100"),
        ({"ema_sigma_rel": 0.03}, ["0.050", "0.100"], "0.050"),
    ],
)
def test_the_averages_are_those_asked_for_and_the_nearest_is_shown(flags, members, shown):
    averages = Averages(nn.Linear(2, 2), settings(**flags))
    assert list(averages.members) == members
    assert averages.shown == shown


def test_an_average_is_applied_for_a_while_and_the_weights_come_back_whatever_happens():
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    averages = Averages(model, settings())
    averages.step()
    with torch.no_grad():
        model.weight.add_(1)
        model.bias.add_(1)
    own, storage = {k: v.clone() for k, v in model.state_dict().items()}, model.weight.data_ptr()

    def same(expected):
        return all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())

    shadow = dict(zip(("weight", "bias"), averages.members["ema"].shadow_params, strict=True))
    with averages.applied("ema"):
        assert same(shadow) and not same(own)
    assert same(own)
    with averages.applied(None):
        assert same(own)
    with pytest.raises(KeyboardInterrupt), averages.applied("ema"):
        raise KeyboardInterrupt
    assert same(own) and model.weight.data_ptr() == storage


def test_a_restored_average_goes_on_as_if_never_stopped():
    path, parameter = trajectory(20, 12).float(), nn.Parameter(torch.zeros(12))
    model = nn.ParameterDict({"w": parameter})
    whole = Averages(model, settings(ema_sigma_rel=0.1))
    stopped = Averages(model, settings(ema_sigma_rel=0.1))
    for step, theta in enumerate(path, 1):
        parameter.data.copy_(theta)
        whole.step()
        stopped.step()
        if step == 9:
            kept = {name: average.shadow_params[0].clone() for name, average in stopped.members.items()}
            stopped = Averages(model, settings(ema_sigma_rel=0.1))
            for name, tensor in kept.items():
                parameter.data.copy_(tensor)
                stopped.restore(name, 9)
    for name in whole.members:
        assert torch.equal(whole.members[name].shadow_params[0], stopped.members[name].shadow_params[0])


FLAGS = {"dataset_name": "digits", "train_batch_size": 4, "max_train_steps": 20, "lr_warmup_steps": 2,
         "checkpointing_steps": 20, "validation_steps": 0}  # fmt: skip


@pytest.fixture(scope="module")
def ddpm_run(tmp_path_factory):
    AcceleratorState._reset_state(reset_partial_state=True)
    run = tmp_path_factory.mktemp("ddpm")
    train_rung(configuration("ddpm", output_dir=str(run), ema_sigma_rel=0.1, ema_snapshots=4, **FLAGS))
    return run


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next((folder / "unet").glob("*.safetensors")))


def gap(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_a_run_keeps_its_averages_and_saves_the_length_asked_for(ddpm_run):
    assert [step for step, sigma, _ in snapshots(ddpm_run) if sigma == 0.05] == [5, 10, 15, 20]
    assert gap(weights_of(ddpm_run), synthesise(ddpm_run, 0.1)) == 0
    checkpoint = ddpm_run / "checkpoint-20"
    tracked = load_file(checkpoint / "averages.safetensors")
    tracked = {name.removeprefix("0.100/"): tensor for name, tensor in tracked.items() if name.startswith("0.100/")}
    assert gap(weights_of(ddpm_run), tracked) < 1e-5
    assert gap(weights_of(ddpm_run), load_file(checkpoint / "model.safetensors")) > 1e-4


def test_the_command_saves_another_length_as_a_pipeline_and_leaves_the_run_alone(ddpm_run, tmp_path):
    before = {path: path.read_bytes() for path in ddpm_run.rglob("*") if path.is_file()}
    main(["ema", str(ddpm_run), str(tmp_path / "out"), "--sigma_rel", "0.05"])
    assert {path: path.read_bytes() for path in ddpm_run.rglob("*") if path.is_file()} == before
    made = weights_of(tmp_path / "out")
    assert gap(made, weights_of(ddpm_run)) > 1e-4
    assert gap(made, load_file(ddpm_run / SNAPSHOTS / "20-0.050.safetensors")) < 1e-5
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipeline(batch_size=1, num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["ema", *arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_what_cannot_be_averaged_is_refused_in_one_line(ddpm_run, tmp_path, capsys):
    train_rung(configuration("dae", output_dir=str(tmp_path / "dae"), **{**FLAGS, "max_train_steps": 1}))
    capsys.readouterr()
    for folder in (tmp_path / "dae", tmp_path / "nowhere"):
        assert "train it with --ema_sigma_rel" in refused(capsys, str(folder), str(tmp_path / "out"), "--sigma_rel", "0.05")
    assert "between 0.01 and 0.25" in refused(capsys, str(ddpm_run), str(tmp_path / "out"), "--sigma_rel", "0.5")
    save_snapshot(tmp_path, 5, "0.050", {"w": torch.zeros(1)})
    (tmp_path / "training_config.json").write_text((ddpm_run / "training_config.json").read_text())
    assert "its training has not ended" in refused(capsys, str(tmp_path), str(tmp_path / "out"), "--sigma_rel", "0.05")
    assert not (tmp_path / "out").exists()


def test_a_damaged_snapshot_is_named_in_one_line(ddpm_run, tmp_path, capsys):
    for step, sigma, path in snapshots(ddpm_run):
        save_snapshot(tmp_path, step, f"{sigma:.3f}", load_file(path))
    damaged = snapshots(tmp_path)[2][2]
    damaged.write_bytes(b"nothing")
    assert damaged.name in refused(capsys, str(tmp_path), str(tmp_path / "out"), "--sigma_rel", "0.05")
