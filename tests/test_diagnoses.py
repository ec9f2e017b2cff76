"""Each named mistake, made on purpose, is found and no other; what is well is left alone."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from tiny import tiny_unet

from diffusers_edu import EduDDPMScheduler, LatentDiffusionPipeline, VariationalAutoencoder
from diffusers_edu.checkup import after_training, before_training
from diffusers_edu.cli import main
from diffusers_edu.evaluation.diagnoses import (
    clipped,
    latent_scale,
    long_average,
    memorisation,
    posterior_collapse,
    present,
    signal_left,
)  # fmt: skip
from diffusers_edu.evaluation.metrics import memorised
from diffusers_edu.models.modeling_vae import GaussianPosterior
from diffusers_edu.training.averages import warmed_up
from diffusers_edu.training.configuration import TrainingConfig
from diffusers_edu.training.data import ImageData, load_digits


def codes(std, scaling_factor=1.0, active=4):
    """An autoencoder whose codes have this standard deviation, of which `active` of four numbers depend on the image."""

    def encode(x):
        mean = std * torch.randn((len(x), 4, 1, 1), generator=torch.Generator().manual_seed(0))
        mean[:, active:] = 0
        return SimpleNamespace(latent_dist=GaussianPosterior(mean, torch.full_like(mean, -6.0)))

    config = SimpleNamespace(scaling_factor=scaling_factor)
    return SimpleNamespace(encode=encode, config=config, device=torch.device("cpu"), dtype=torch.float32)


IMAGES = torch.zeros(400, 1, 8, 8)


def test_posterior_collapse():
    assert posterior_collapse(codes(1.0), IMAGES) is None
    found = posterior_collapse(codes(1.0, active=0), IMAGES)
    assert found.name == "posterior collapse" and "0 of the code's 4" in found.measured and "--kl_weight" in found.mend


@pytest.mark.parametrize(("std", "factor"), [(1.0, 1.0), (5.0, 0.2), (0.5, 2.0)])
def test_latents_of_unit_scale_are_well(std, factor):
    assert latent_scale(codes(std, factor), IMAGES) is None


def test_latents_of_another_scale_are_named_with_the_factor_that_mends_them():
    found = latent_scale(codes(5.0, 1.0), IMAGES)
    factor = float(found.mend.split("scaling_factor=")[1].split(")")[0])
    assert factor == pytest.approx(0.2, rel=0.05)
    assert latent_scale(codes(5.0, factor), IMAGES) is None


def test_a_schedule_that_does_not_end_in_noise():
    assert signal_left(EduDDPMScheduler()) is None
    found = signal_left(EduDDPMScheduler(num_train_timesteps=100))
    assert "alpha_bar_T is 0.36" in found.measured
    assert signal_left(EduDDPMScheduler(num_train_timesteps=100, rescale_betas_to_timesteps=True)) is None


def test_the_age_of_an_average_is_that_of_its_weights():
    assert long_average(lambda step: 0.9, 1000) is None
    # Of equal weights to all steps, n / 2; with a decay of 0.999 over 500 steps: sum of d^k, k = 1 .. 500.
    found = long_average(lambda step: 0.999, 500)
    age = sum(0.999**k for k in range(1, 501))
    assert f"{age:.0f} steps old" in found.measured
    assert long_average(lambda step: 1 - 1 / step, 100) is not None
    assert long_average(warmed_up([], TrainingConfig()).get_decay, 1000) is None
    as_long = TrainingConfig(ema_power=1.0, ema_max_decay=0.99999)  # of equal weights
    assert long_average(warmed_up([], as_long).get_decay, 1000) is not None
    mended = float(long_average(lambda step: 0.9999, 1000).mend.split()[1].rstrip(","))
    assert long_average(lambda step: mended, 1000) is None


def test_clipping_that_cuts_off_what_the_model_says():
    unet = tiny_unet()
    zero = DDPMPipeline(unet, EduDDPMScheduler(prediction_type="sample"))
    for parameter in unet.parameters():
        parameter.data.zero_()
    assert clipped(zero, num_inference_steps=4) is None
    unet.conv_out.bias.data.fill_(2.0)  # every x_0 is 2
    found = clipped(zero, num_inference_steps=4)
    assert "100%" in found.measured and "clip_sample=False" in found.mend
    assert clipped(DDPMPipeline(unet, EduDDPMScheduler(prediction_type="sample", clip_sample=False))) is None
    assert clipped(DDPMPipeline(unet, DDIMScheduler()), num_inference_steps=2) is None  # says nothing of its x_0
    assert clipped(SimpleNamespace(components={})) is None


def test_a_small_error_of_epsilon_is_no_reason_to_speak_of_clipping():
    """Where hardly any image is left in x_t, it is a large one of x_0, and clipping is what mends it."""
    scheduler = EduDDPMScheduler(beta_schedule="squaredcos_cap_v2")  # of epsilon
    pipeline = DDPMPipeline(tiny_unet(), scheduler)
    wrong = torch.Generator().manual_seed(0)

    def nearly(x_t, t, **_):
        alpha_bar, x_0 = scheduler.alphas_cumprod[int(t)], x_t.sign() * 0.9
        epsilon = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        return SimpleNamespace(sample=epsilon + 0.03 * torch.randn(x_t.shape, generator=wrong))

    pipeline.unet.forward = nearly
    assert clipped(pipeline, num_inference_steps=50) is None


def test_copies():
    train, held_out, fresh = (ImageData(torch.randint(256, (n, 1, 2, 2), dtype=torch.uint8)) for n in (500, 300, 1000))
    assert memorisation(memorised(fresh.images, train, held_out)) is None
    found = memorisation(memorised(train.images, train, held_out))
    assert "100% of 500" in found.measured and "--random_flip" in found.mend


def test_a_check_before_and_after_finds_what_is_wrong_and_no_more():
    train, held_out = load_digits()
    vae = VariationalAutoencoder(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2, scaling_factor=40.0).eval()
    pipeline = LatentDiffusionPipeline(vae, tiny_unet(2, 4), EduDDPMScheduler(num_train_timesteps=50, clip_sample=True))
    config = TrainingConfig(max_train_steps=50, ema_power=1.0, ema_max_decay=0.9999)
    before = [found.name for found in before_training(pipeline, config, train)]
    assert before == ["EMA longer than the run", "alpha_bar_T too high", "latent std far from 1"]
    assert before_training(DDPMPipeline(tiny_unet(), EduDDPMScheduler()), TrainingConfig(), train) == []
    after = {found.name for found in after_training(pipeline, held_out, num_inference_steps=3)}
    assert {"alpha_bar_T too high", "latent std far from 1"} <= after


def test_a_training_says_what_is_wrong_before_and_an_evaluation_after(tmp_path, capsys):
    run = str(tmp_path / "run")
    flags = ["--max_train_steps", "20", "--train_batch_size", "8", "--num_train_timesteps", "60", "--beta_schedule", "linear"]
    main(
        [
            "train",
            "--rung",
            "ddpm",
            "--dataset_name",
            "digits",
            "--output_dir",
            run,
            "--validation_steps",
            "0",
            "--ema_power",
            "1",
            *flags,
        ]
    )
    said = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("diffusers-edu: ")]
    assert any("EMA longer than the run" in line and "Mend: " in line for line in said)
    assert sum("alpha_bar_T too high" in line for line in said) == 1  # not again at the end
    main(["evaluate", run, "--num_samples", "12", "--num_inference_steps", "2"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    found = next(line["diagnoses"] for line in lines if "diagnoses" in line)
    assert "alpha_bar_T too high" in {each["name"] for each in found}
    assert all(each.keys() == {"name", "measured", "mend"} for each in found)


def test_what_is_well_is_left_out():
    assert present(None, None) == []
