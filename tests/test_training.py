"""The training loop: what it writes, that a run goes on where it stopped, and that it is the same however it is split."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from diffusers_edu.errors import UsageError
from diffusers_edu.rungs import RUNGS, configuration, train_rung
from diffusers_edu.training import objectives, trainer
from diffusers_edu.training.launch import Preempted

TINY = {"dataset_name": "digits", "train_batch_size": 8, "max_train_steps": 6, "lr_warmup_steps": 2, "checkpointing_steps": 100}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """A process has one precision for good, as Accelerate sees it; here each test is a run of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


def run(output: Path, rung: str = "vae", **changes) -> Path:
    train_rung(configuration(rung, output_dir=str(output), **{**TINY, **changes}))
    return output


def log(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def losses(output: Path) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in log(output)])


def weights(output: Path, part: str = "vae") -> dict[str, torch.Tensor]:
    return load_file(next((output / part).glob("*.safetensors")))


def losses_taken(monkeypatch, meanwhile=lambda number: None) -> list:
    """A list that grows with each batch of the vae rung, `meanwhile` being called with its number before."""
    loss, taken = objectives.VariationalObjective.loss, []

    def counted(self, *arguments):
        taken.append(arguments)
        meanwhile(len(taken))
        return loss(self, *arguments)

    monkeypatch.setattr(objectives.VariationalObjective, "loss", counted)
    return taken


def stops_at(number: int):
    def meanwhile(now: int) -> None:
        if now == number:
            raise KeyboardInterrupt

    return meanwhile


def test_a_run_writes_its_configuration_a_line_for_each_step_and_a_pipeline(tmp_path):
    run(tmp_path)
    assert json.loads((tmp_path / "training_config.json").read_text())["rung"] == "vae"
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "seconds", "kl", "reconstruction"} <= line.keys() for line in log(tmp_path))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert pipeline.vae.config.scaling_factor != 1.0


def test_the_loss_falls(tmp_path):
    run(tmp_path, max_train_steps=60, train_batch_size=32)
    assert losses(tmp_path)[-10:].mean() < 0.8 * losses(tmp_path)[:10].mean()


def test_the_configuration_is_there_before_the_first_step_and_a_failed_run_saves_no_pipeline(tmp_path, monkeypatch):
    def fails(self, *_):
        assert (tmp_path / "training_config.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(objectives.VariationalObjective, "loss", fails)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert not (tmp_path / "model_index.json").exists()


def test_a_resumed_run_ends_in_the_weights_and_the_log_of_one_that_was_never_stopped(tmp_path, monkeypatch):
    whole, stopped = run(tmp_path / "whole"), tmp_path / "stopped"
    losses_taken(monkeypatch, stops_at(6))
    with pytest.raises(KeyboardInterrupt):
        run(stopped, checkpointing_steps=2)
    monkeypatch.undo()
    run(stopped, checkpointing_steps=2, resume_from_checkpoint="latest")
    expected, got = weights(whole), weights(stopped)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert torch.equal(losses(whole), losses(stopped))
    assert [line["step"] for line in log(stopped)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize("rung", RUNGS)
def test_accumulated_batches_are_one_large_batch(rung, tmp_path):
    steps = {"max_train_steps": 50}
    large = run(tmp_path / "large", rung, train_batch_size=16, **steps)
    split = run(tmp_path / "split", rung, train_batch_size=8, gradient_accumulation_steps=2, **steps)
    assert len(losses(large)) == 50
    assert ((losses(large) - losses(split)) / losses(large)).abs().max() < 1e-5


@pytest.mark.parametrize("stopped_at", [None, 3], ids=str)
def test_tensorboard_holds_what_the_log_holds_each_step_once(stopped_at, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = {"report_to": "tensorboard", "validation_steps": 3, "checkpointing_steps": 2}
    if stopped_at is not None:
        step, taken = trainer.optimiser_steps, []
        stops = stops_at(stopped_at)

        def cut_off(*arguments):
            for found in step(*arguments):
                yield found
                taken.append(found)
                stops(len(taken))

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(trainer, "optimiser_steps", cut_off)
            run(tmp_path, **flags)
        AcceleratorState._reset_state(reset_partial_state=True)
    run(tmp_path, **flags)
    events = EventAccumulator(str(tmp_path / "logs" / "diffusers_edu"))
    events.Reload()
    for name in ("loss", "kl", "learning_rate"):
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [1, 2, 3, 4, 5, 6]
        assert [scalar.value for scalar in scalars] == pytest.approx([line[name] for line in log(tmp_path)], rel=1e-6)
    looks = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [scalar.value for scalar in events.Scalars("validation_ema")] == pytest.approx(
        [look["ema"]["loss"] for look in looks]
    )
    assert [image.step for image in events.Images("samples")] == [3, 6]


def test_data_workers_change_nothing(tmp_path):
    assert torch.equal(losses(run(tmp_path / "0")), losses(run(tmp_path / "2", dataloader_num_workers=2)))


def test_seeds_differ_and_repeat(tmp_path):
    first, again, other = (run(tmp_path / n, seed=s) for n, s in (("a", 0), ("b", 0), ("c", 1)))
    assert torch.equal(losses(first), losses(again))
    assert not torch.equal(losses(first), losses(other))


def test_bf16_keeps_weights_and_losses_in_float32(tmp_path):
    exact = run(tmp_path / "float32", rung="ddpm")
    AcceleratorState._reset_state(reset_partial_state=True)
    mixed = run(tmp_path / "bf16", rung="ddpm", mixed_precision="bf16")
    assert all(tensor.dtype == torch.float32 for tensor in weights(mixed, "unet").values())
    difference = (losses(exact) - losses(mixed)).abs().max()
    assert 0 < difference < 0.05


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run(tmp_path, checkpointing_steps=1, checkpoints_total_limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    loss, calls = objectives.VariationalObjective.loss, []

    def diverges(self, *arguments):
        calls.append(arguments)
        value, terms = loss(self, *arguments)
        return (value * float("nan") if len(calls) == 4 else value), terms

    monkeypatch.setattr(objectives.VariationalObjective, "loss", diverges)
    with pytest.raises(FloatingPointError, match="step 4"):
        run(tmp_path, checkpointing_steps=2)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / "model_index.json").exists()
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3]


def test_gradients_that_are_not_finite_stop_the_run_before_they_are_kept(tmp_path, monkeypatch):
    loss, calls = objectives.VariationalObjective.loss, []

    def spoils(self, model, batch, noise):
        calls.append(batch)
        value, terms = loss(self, model, batch, noise)
        if len(calls) == 4:
            model.log_sigma_x.register_hook(lambda gradient: gradient * float("inf"))
        return value, terms

    monkeypatch.setattr(objectives.VariationalObjective, "loss", spoils)
    with pytest.raises(FloatingPointError, match=r"norm of the gradients is .* at step 4"):
        run(tmp_path, checkpointing_steps=2, checkpoints_total_limit=1)
    monkeypatch.undo()
    run(tmp_path, checkpointing_steps=2, checkpoints_total_limit=1)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_what_the_launcher_says_of_precision_and_accumulation_does_not_count_unnoticed(tmp_path, monkeypatch):
    expected = losses(run(tmp_path / "expected"))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert torch.equal(losses(run(tmp_path / "accumulated")), expected)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UsageError, match="give the script --mixed_precision bf16"):
        run(tmp_path / "mixed")


def test_the_folder_of_another_run_is_refused_and_left_as_it_was(tmp_path):
    run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="learning_rate"):
        run(tmp_path, learning_rate=0.5)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_going_on_from_an_earlier_checkpoint_leaves_no_later_ones_and_ends_alike(tmp_path):
    run(tmp_path, checkpointing_steps=2)
    before = weights(tmp_path)
    torch.save({}, tmp_path / "checkpoint-6" / "of_the_old_attempt")
    run(tmp_path, checkpointing_steps=3, resume_from_checkpoint="checkpoint-2")
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3", "checkpoint-6"]
    assert not (tmp_path / "checkpoint-6" / "of_the_old_attempt").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path).items())


def test_a_run_that_has_gone_back_does_not_do_so_again_when_the_same_command_is_given_after_a_kill(
    tmp_path, monkeypatch, capsys
):
    flags = {"checkpointing_steps": 2, "resume_from_checkpoint": "checkpoint-2"}
    run(tmp_path, checkpointing_steps=2)
    before = weights(tmp_path)
    with monkeypatch.context() as patch:  # cut off while it goes back, which it then has not done
        patch.setattr(trainer, "discard_later", lambda output, step: stops_at(step)(step))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, **flags)
    with monkeypatch.context() as patch:
        taken = losses_taken(patch, stops_at(4))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, **flags)
    assert len(taken) == 4  # steps 3 to 6
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert "gone back" not in capsys.readouterr().err
    with monkeypatch.context() as patch:
        taken = losses_taken(patch)
        run(tmp_path, **flags)
    assert len(taken) == 2
    assert "goes on from checkpoint-4: it has gone back to checkpoint-2 before" in capsys.readouterr().err
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path).items())


def test_a_checkpoint_named_is_that_of_the_run_and_not_one_in_the_current_directory(tmp_path, monkeypatch):
    run(tmp_path / "mine", checkpointing_steps=2)
    before = weights(tmp_path / "mine")
    run(tmp_path / "other", checkpointing_steps=2, seed=1)
    monkeypatch.chdir(tmp_path / "other")
    run(tmp_path / "mine", checkpointing_steps=2, resume_from_checkpoint="checkpoint-2")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "mine").items())


def test_a_run_can_begin_with_the_checkpoint_of_another_folder_and_goes_on_in_its_own(tmp_path, monkeypatch):
    whole = weights(run(tmp_path / "first", checkpointing_steps=2))
    flags = {"checkpointing_steps": 2, "resume_from_checkpoint": str(tmp_path / "first" / "checkpoint-2")}
    for stop, steps in ((1, 1), (4, 4)):  # before its first checkpoint, and after
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            taken = losses_taken(patch, stops_at(stop))
            run(tmp_path / "second", **flags)
        assert len(taken) == steps
    taken = losses_taken(monkeypatch)
    run(tmp_path / "second", **flags)
    assert len(taken) == 2
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(tmp_path / "second").items())


@pytest.fixture
def interruptible():
    """What is started in the background may ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupts(times: int):
    return lambda number: number == 3 and [os.kill(os.getpid(), signal.SIGINT) for _ in range(times)]


def test_ctrl_c_saves_a_checkpoint_at_the_end_of_the_step_and_says_how_to_go_on(tmp_path, monkeypatch, interruptible):
    losses_taken(monkeypatch, interrupts(1))
    with pytest.raises(Preempted, match=r"stopped by SIGINT at step 3; the same command goes on from .*checkpoint-3") as stop:
        run(tmp_path)
    assert stop.value.status == 130
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch, interruptible):
    losses_taken(monkeypatch, interrupts(2))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_signal_that_is_ignored_stays_so(tmp_path, monkeypatch, interruptible):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    losses_taken(monkeypatch, interrupts(2))
    run(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_finished_run_resumed_is_left_as_it_is_and_can_be_made_longer(tmp_path):
    run(tmp_path)
    before = weights(tmp_path)
    run(tmp_path, resume_from_checkpoint="latest")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path).items())
    run(tmp_path, resume_from_checkpoint="latest", max_train_steps=8)
    assert [line["step"] for line in log(tmp_path)] == list(range(1, 9))
    with pytest.raises(UsageError, match="beyond --max_train_steps 4"):
        run(tmp_path, resume_from_checkpoint="latest", max_train_steps=4)
    with pytest.raises(UsageError, match=r"max_train_steps 8 -> 9.*make it longer by --resume_from_checkpoint latest"):
        run(tmp_path, max_train_steps=9)


def test_a_run_that_has_never_been_resumed_can_be_made_longer(tmp_path):
    run(tmp_path)
    run(tmp_path, resume_from_checkpoint="latest", max_train_steps=8)
    assert [line["step"] for line in log(tmp_path)] == list(range(1, 9))


def test_the_logged_learning_rate_is_the_one_the_step_took(tmp_path):
    run(tmp_path, learning_rate=1e-3, lr_warmup_steps=4, lr_scheduler="constant_with_warmup")
    assert [line["learning_rate"] for line in log(tmp_path)] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such checkpoint"):
        run(tmp_path, resume_from_checkpoint="checkpoint-3")


def test_the_averaged_weights_are_saved(tmp_path):
    averaged, last = run(tmp_path / "averaged", max_train_steps=20), run(tmp_path / "last", max_train_steps=20, use_ema=False)
    assert torch.equal(losses(averaged), losses(last))
    assert any(not torch.equal(tensor, weights(last)[name]) for name, tensor in weights(averaged).items())


def test_latent_diffusion_trains_its_own_vae_where_none_is_given_and_takes_labels(tmp_path):
    run(tmp_path, rung="latent_diffusion", max_train_steps=2, class_conditional=True)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert pipeline.unet.config.num_class_embeds == 11
    assert (tmp_path / "vae_rung" / "model_index.json").exists()
    trained = weights(tmp_path / "vae_rung")
    assert all(torch.equal(tensor, trained[name]) for name, tensor in weights(tmp_path).items())
    made = (tmp_path / "vae_rung" / "log.jsonl").stat().st_mtime_ns
    run(tmp_path, rung="latent_diffusion", max_train_steps=2, class_conditional=True, resume_from_checkpoint="latest")
    assert (tmp_path / "vae_rung" / "log.jsonl").stat().st_mtime_ns == made


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_trains_loads_without_trust_and_samples_the_same_pixels(rung, tmp_path):
    config = configuration(rung, output_dir=str(tmp_path), **{**TINY, "max_train_steps": 2})
    trained = train_rung(config)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    steps = {} if RUNGS[rung].num_inference_steps is None else {"num_inference_steps": 3}
    a, b = (
        torch.from_numpy(p(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="np", **steps).images)
        for p in (trained, loaded)
    )
    assert a.shape == (2, 8, 8, 1)
    assert (a - b).abs().max() < 1e-6  # weights that lie elsewhere in memory may take another kernel, an ulp away
    assert 0 <= a.min() <= a.max() <= 1
