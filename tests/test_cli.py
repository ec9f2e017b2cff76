"""What a person can get wrong at the command line: one clear line on stderr, exit status 2, and nothing lost."""

import pytest
import torch
from PIL import Image

from diffusers_edu.cli import main

SMALL = ["--max_train_steps", "2", "--train_batch_size", "4"]


def refused(capsys, *arguments: str) -> str:
    """The one line on stderr of a command that is refused."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert [line.startswith("diffusers-edu: error: ") for line in lines if "it/s" not in line] == [True]
    return lines[-1]


def train_refused(capsys, tmp_path, *arguments: str) -> str:
    message = refused(capsys, "train", "--output_dir", str(tmp_path / "run"), *arguments)
    assert not (tmp_path / "run" / "model_index.json").exists()
    return message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--rung is missing: choose from dae"),
        (["--rung", "gan", "--dataset_name", "digits"], "--rung gan: choose from dae, stacked_dae"),
        (["--rung", "vae", "--dataset_name", "digits", "--posterior", "round"], "round"),
        (["--rung", "vae", "--dataset_name", "digits", "--max_train_steps", "many"], "max_train_steps"),
        (["--rung", "vae", "--dataset_name", "digits", "--max_train_steps", "0"], "--max_train_steps 0"),
        (["--rung", "vae", "--dataset_name", "digits", "--learning_rate", "-1"], "--learning_rate -1"),
        (["--rung", "vae", "--dataset_name", "digits", "--no_such_flag", "1"], "--no_such_flag"),
        (["--rung"], "--rung"),
        (["--rung", "vae", "--dataset_name", "digits", "--seed", "4294967296"], "--seed 4294967296"),
        (["--rung", "vae", "--dataset_name", "digits", "--adam_beta1", "1.5"], "--adam_beta1 1.5"),
        (["--rung", "vae"], "--dataset_name and --train_data_dir"),
        (["--rung", "vae", "--train_data_dir", "nowhere"], "no such folder"),
        (["--rung", "vae", "--dataset_name", "digits", "--resolution", "16"], "8x8"),
        (["--rung", "vae", "--dataset_name", "no/such/dataset"], "--dataset_name no/such/dataset cannot be loaded"),
        (["--rung", "latent_diffusion", "--dataset_name", "digits", "--vae_path", "nowhere"], "--vae_path nowhere"),
        (["--rung", "vae", "--dataset_name", "digits", "--resume_from_checkpoint", "checkpoint-9"], "no such checkpoint"),
    ],
)
def test_a_wrong_flag_is_named(arguments, says, capsys, tmp_path):
    assert says in train_refused(capsys, tmp_path, *arguments)


def image_folder(folder, size: int, count: int = 4):
    folder.mkdir()
    for i in range(count):
        Image.effect_noise((size, size), 50 + i).save(folder / f"{i}.png")
    return str(folder)


@pytest.mark.parametrize("rung", ["dae", "vae"])
def test_a_resolution_that_a_model_cannot_take_is_refused_and_the_message_says_which_it_can(rung, capsys, tmp_path):
    folder = image_folder(tmp_path / "images", 9)
    message = train_refused(capsys, tmp_path, "--rung", rung, "--train_data_dir", folder, *SMALL)
    assert "--resolution 9" in message
    assert "multiples of 4" in message


def test_a_file_that_is_not_an_image_is_named(capsys, tmp_path):
    folder = image_folder(tmp_path / "images", 8)
    (tmp_path / "images" / "broken.png").write_text("not an image")
    assert "broken.png" in train_refused(capsys, tmp_path, "--rung", "dae", "--train_data_dir", folder, *SMALL)


def test_an_empty_folder_is_refused(capsys, tmp_path):
    (tmp_path / "images").mkdir()
    assert "--train_data_dir" in train_refused(capsys, tmp_path, "--rung", "dae", "--train_data_dir", str(tmp_path / "images"))


def test_a_divergence_names_the_step(capsys, tmp_path):
    flags = ["--dataset_name", "digits", "--max_train_steps", "50", "--max_grad_norm", "1e30"]
    message = train_refused(capsys, tmp_path, "--rung", "vae", "--learning_rate", "1e30", *flags)
    assert "at step" in message
    assert "learning_rate" in message


def test_a_folder_that_cannot_be_written_is_named(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(
        capsys, "train", "--rung", "dae", "--dataset_name", "digits", "--output_dir", str(tmp_path / "file" / "run")
    )
    assert str(tmp_path / "file") in message


def test_a_model_that_is_no_vae_is_refused(capsys, tmp_path):
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    UNet2DModel(8, 1, 1, block_out_channels=(8,), norm_num_groups=4, **blocks).save_pretrained(tmp_path / "unet")
    flags = ["--rung", "latent_diffusion", "--dataset_name", "digits", "--vae_path", str(tmp_path / "unet")]
    assert "UNet2DModel has not the interface" in train_refused(capsys, tmp_path, *flags)


def test_uploading_without_a_login_is_refused_before_training(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("diffusers_edu.hub.publish.get_token", lambda: None)
    assert "logged in" in train_refused(capsys, tmp_path, "--rung", "dae", "--dataset_name", "digits", "--push_to_hub")


def test_evaluate_refuses_a_folder_without_a_run(capsys, tmp_path):
    assert "no trained run" in refused(capsys, "evaluate", str(tmp_path))


def test_an_unknown_command_lists_the_commands(capsys):
    assert "ladder" in refused(capsys, "climb")


def test_rgb_images_of_any_size_train_and_load(tmp_path):
    from diffusers import DiffusionPipeline

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        Image.merge("RGB", [Image.effect_noise((20 + i, 31), 90) for _ in range(3)]).save(folder / f"{i}.png")
    flags = ["--train_data_dir", str(folder), "--resolution", "12", *SMALL]
    for rung in ("noisy_stacked_dae", "vae", "ddpm"):
        main(["train", "--rung", rung, "--output_dir", str(tmp_path / rung), *flags])
        steps = {} if rung == "vae" else {"num_inference_steps": 2}
        images = DiffusionPipeline.from_pretrained(tmp_path / rung)(batch_size=2, output_type="np", **steps).images
        assert images.shape == (2, 12, 12, 3)
    vae = str(tmp_path / "vae")
    main(["train", "--rung", "latent_diffusion", "--vae_path", vae, "--output_dir", str(tmp_path / "latent"), *flags])
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "latent")
    images = pipeline(batch_size=1, num_inference_steps=2, output_type="pt").images
    assert images.shape == (1, 3, 12, 12)
    assert bool(torch.isfinite(images).all())
