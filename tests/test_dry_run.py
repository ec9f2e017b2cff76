"""What a dry run says: the configuration, the size and the memory; and that it does nothing else."""

import json
import re

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from diffusers import UNet2DModel
from tiny import tiny_unet

from diffusers_edu import EduDDPMScheduler, VariationalAutoencoder
from diffusers_edu.cli import main
from diffusers_edu.rungs import RUNGS, configuration, train_rung
from diffusers_edu.training import trainer
from diffusers_edu.training.configuration import TrainingConfig
from diffusers_edu.training.data import load_digits
from diffusers_edu.training.dry_run import activations, describe, memory_of
from diffusers_edu.training.latents import encode_data
from diffusers_edu.training.objectives import DiffusionObjective
from diffusers_edu.training.randomness import StepNoise


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


def described(capsys, output, rung="ddpm", *arguments):
    """The configuration and the other lines of `train --dry_run`, and the model it speaks of."""
    main(["train", "--dry_run", "--rung", rung, "--dataset_name", "digits", "--output_dir", str(output), *arguments])
    text = capsys.readouterr().out
    end = text.index("\n}") + 2
    return json.loads(text[:end]), text[end:]


def number(text, pattern):
    return float(re.search(pattern, text)[1].replace(",", ""))


def megabytes(text, name):
    return number(text, rf"{name}: ([\d.,]+) MiB")


def test_the_configuration_is_printed_as_json_with_the_defaults_of_the_rung_resolved(capsys, tmp_path):
    printed, _ = described(capsys, tmp_path / "run", "vae", "--learning_rate", "0.5", "--seed", "7")
    config = configuration(
        "vae", dataset_name="digits", output_dir=str(tmp_path / "run"), learning_rate=0.5, seed=7, dry_run=True
    )
    assert TrainingConfig(**printed) == config
    assert printed["kl_weight"] == RUNGS["vae"].defaults["kl_weight"]


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_is_described_and_nothing_is_trained_or_written(rung, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "optimiser_steps", lambda *_: pytest.fail("it trains"))
    _, text = described(capsys, tmp_path / "run", rung)
    assert list(tmp_path.iterdir()) == []
    AcceleratorState._reset_state(reset_partial_state=True)
    pipeline = train_rung(configuration(rung, dataset_name="digits", output_dir=str(tmp_path / "run"), dry_run=True))
    model = pipeline.components[{"vae": "vae", "ddpm": "unet", "latent_diffusion": "unet"}.get(rung, "model")]
    assert number(text, r"parameters: ([\d,]+)") == sum(p.numel() for p in model.parameters())
    assert list(tmp_path.iterdir()) == []


def test_the_steps_the_images_and_the_epochs_are_those_of_the_run(capsys, tmp_path):
    flags = ["--max_train_steps", "1257", "--train_batch_size", "20", "--gradient_accumulation_steps", "3"]
    _, text = described(capsys, tmp_path / "run", "ddpm", *flags)
    assert "steps: 1,257 of 60 images (1 processes x 20 x 3 accumulated)" in text
    assert "images: 75,420, 60.0 epochs of 1,257, 8x8, grey" in text


@pytest.mark.parametrize(("flags", "averages"), [(["--use_ema", "False"], 0), ([], 1), (["--ema_sigma_rel", "0.1"], 2)])
def test_the_memory_is_that_of_the_tensors_and_adds_up(flags, averages, capsys, tmp_path):
    _, text = described(capsys, tmp_path / "run", "ddpm", *flags)
    size = number(text, r"parameters: ([\d,]+)") * 4 / 2**20
    parts = {"weights": 1, "gradients": 1, "AdamW's moments": 2, "averages": averages}
    for name, times in parts.items():
        assert megabytes(text, f"  {name}") == pytest.approx(times * size, abs=0.06)
    assert megabytes(text, "  images") == pytest.approx(1257 * 64 / 2**20, abs=0.06)
    total = sum(map(float, re.findall(r"^  .*: ([\d.]+) MiB$", text, re.MULTILINE)))
    assert megabytes(text, "memory of a process") == pytest.approx(total, abs=0.4)


def test_activations_grow_linearly_with_the_batch(capsys, tmp_path):
    sizes = {}
    for batch in (32, 64, 320):
        AcceleratorState._reset_state(reset_partial_state=True)
        _, text = described(capsys, tmp_path / "run", "ddpm", "--train_batch_size", str(batch))
        sizes[batch] = megabytes(text, "  activations of a batch")
    assert sizes[64] == pytest.approx(2 * sizes[32], abs=0.2)
    assert sizes[320] == pytest.approx(10 * sizes[32], abs=1.1)


def kept_for_backward(loss, known):
    """Bytes of the storages that the graph of a loss holds, found by walking it."""
    seen, storages, nodes = set(), {}, [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_saved_"):
                value = getattr(node, name)
                for tensor in value if isinstance(value, list | tuple) else [value]:
                    if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in known:
                        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.mark.parametrize(("attention", "precision"), [(False, "no"), (True, "no"), (True, "bf16")])
def test_the_activations_are_those_that_the_graph_of_a_whole_batch_holds(attention, precision):
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D" if attention else "DownBlock2D"),
        up_block_types=("AttnUpBlock2D" if attention else "UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    objective, data = DiffusionObjective(model, EduDDPMScheduler()), load_digits()[0]
    config = TrainingConfig(dataset_name="digits", train_batch_size=64)
    batch = data.batch(list(range(64)))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss, _ = objective.loss(model, batch, StepNoise(0, 0, range(64), 64))
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    expected = kept_for_backward(loss, known)
    estimate = activations(objective, data, config, Accelerator(cpu=True, mixed_precision=precision))
    assert estimate == pytest.approx(expected, rel=0.2 if precision == "no" else 0.05)


def test_of_a_sharded_model_a_process_holds_its_part(tmp_path):
    objective, data = DiffusionObjective(tiny_unet(), EduDDPMScheduler()), load_digits()[0]
    config = TrainingConfig(dataset_name="digits", train_batch_size=4)
    kinds = {"distributed_type": DistributedType.FSDP, "num_processes": 4, "mixed_precision": "no"}
    whole = memory_of(objective, data, config, Accelerator(cpu=True))
    shard = memory_of(objective, data, config, type("Sharded", (), kinds))
    parts = {"weights", "gradients", "AdamW's moments", "averages"}
    assert {name for name in whole if shard[name] == whole[name] / 4} == parts
    assert {name for name in whole if shard[name] == whole[name]} == whole.keys() - parts
    text = describe(objective, data, config, type("Sharded", (), kinds))
    assert "one of 4 shards of weights, gradients, moments and averages" in text


@pytest.mark.parametrize(("posterior", "flip"), [("diagonal", True), ("full", False)])
def test_the_latents_that_a_run_keeps_are_counted(posterior, flip):
    vae = VariationalAutoencoder(posterior=posterior)
    objective = DiffusionObjective(tiny_unet(4, 2), EduDDPMScheduler(), vae)
    data = load_digits()[0].head(9)
    config = TrainingConfig(dataset_name="digits", random_flip=flip)
    memory = memory_of(objective, data, config, Accelerator(cpu=True))
    kept = encode_data(vae, data, flip, 4, Accelerator(cpu=True))
    sides = [kept.upright, kept.flipped] if flip else [kept.upright]
    assert memory["latents of the images"] == sum(tensor.nbytes for side in sides for tensor in side.values())
    assert memory["weights of the VAE"] == sum(p.nbytes for p in vae.parameters())


def test_the_size_of_a_streamed_source_is_described(capsys, tmp_path):
    from PIL import Image

    for part in ("train", "test"):
        (tmp_path / "images" / part).mkdir(parents=True)
        for n in range(4):
            Image.effect_noise((16, 16), 20 + n).save(tmp_path / "images" / part / f"{n}.png")
    source = ["--train_data_dir", str(tmp_path / "images"), "--streaming", "--resolution", "12"]
    main(["train", "--dry_run", "--rung", "vae", "--output_dir", str(tmp_path / "run"), *source])
    text = capsys.readouterr().out
    assert "streamed, 12x12, grey" in text
    assert megabytes(text, "  images") == 0
    assert not (tmp_path / "run").exists()


def test_a_dry_run_into_the_folder_of_another_run_is_refused_as_a_run_would_be(capsys, tmp_path):
    flags = {"dataset_name": "digits", "max_train_steps": 1, "train_batch_size": 4, "validation_steps": 0}
    train_rung(configuration("dae", output_dir=str(tmp_path), **flags))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        described(capsys, tmp_path, "vae")
    assert stop.value.code == 2
    assert "holds another run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
