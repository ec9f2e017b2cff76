"""What is wrong in the stock DDPMScheduler, shown to be so, and right in EduDDPMScheduler: the table in the README."""

import logging

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_edu import EduDDPMScheduler

BOTH = (DDPMScheduler, EduDDPMScheduler)


def noise_level(scheduler, t, dtype):
    """The standard deviation that add_noise gives to noise of 1."""
    zero, one = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
    return scheduler.add_noise(zero, one, torch.tensor([t])).item()


def left_in_the_image(scheduler, steps):
    """The noise in the last step's result where the model is certain of a black image."""
    scheduler.set_timesteps(steps)
    x = torch.zeros(1, 1, 100, 100)
    return scheduler.step(x, scheduler.timesteps[-1], x, generator=torch.Generator().manual_seed(0)).prev_sample.std().item()


@pytest.mark.parametrize("schedule, silent", [("linear", 10), ("squaredcos_cap_v2", 21)])
def test_bfloat16_noise_is_missing_from_the_first_timesteps(schedule, silent):
    stock, ours = (cls(beta_schedule=schedule) for cls in BOTH)
    exact = (1 - torch.cumprod(1 - ours.betas.double(), 0)).sqrt()
    assert [noise_level(stock, t, torch.bfloat16) for t in range(silent)] == [0.0] * silent
    for t in range(1000):
        assert abs(noise_level(ours, t, torch.bfloat16) / exact[t] - 1) <= 2**-8  # half a unit in the last place


def test_fixed_large_log_is_not_a_number():
    x = torch.zeros(1, 1, 100, 100)
    stock, ours = (cls(variance_type="fixed_large_log", prediction_type="sample") for cls in BOTH)
    assert stock.step(x, 500, x).prev_sample.isnan().all()
    drawn = ours.step(x, 500, x, generator=torch.Generator().manual_seed(0)).prev_sample
    assert abs(drawn.std() / ours.betas[500].sqrt() - 1) < 0.03


@pytest.mark.parametrize("steps, left", [(10, 0.32), (20, 0.17), (50, 0.076)])
def test_noise_is_left_in_the_finished_image(steps, left):
    config = {"variance_type": "fixed_large", "timestep_spacing": "trailing", "prediction_type": "sample"}
    stock, ours = (left_in_the_image(cls(**config), steps) for cls in BOTH)
    assert stock == pytest.approx(left, rel=0.05)
    assert ours == 0


def test_epsilon_at_zero_terminal_snr_divides_by_zero():
    stock, ours = (cls(rescale_betas_zero_snr=True, clip_sample=False) for cls in BOTH)
    x = torch.ones(1, 1, 2, 2)
    assert stock.step(0.5 * x, 999, x).pred_original_sample.isinf().all()
    for t in (999, torch.tensor([999])):
        with pytest.raises(ValueError, match="v_prediction"):
            ours.step(0.5 * x, t, x)
    assert ours.step(0.5 * x, 998, x).prev_sample.isfinite().all()
    for kind in ("sample", "v_prediction"):
        scheduler = EduDDPMScheduler(rescale_betas_zero_snr=True, prediction_type=kind)
        assert scheduler.step(0.5 * x, 999, x).prev_sample.isfinite().all()


def test_a_hundred_linear_timesteps_do_not_end_in_noise(caplog):
    logger = logging.getLogger("diffusers_edu")
    stock = DDPMScheduler(100)
    assert stock.alphas_cumprod[-1] > 0.3
    logger.addHandler(caplog.handler)
    try:
        EduDDPMScheduler(100)
        assert "alpha_bar_T is 0.36" in caplog.text
        assert EduDDPMScheduler(100, rescale_betas_to_timesteps=True).alphas_cumprod[-1] < 1e-4
    finally:
        logger.removeHandler(caplog.handler)


def test_a_trailing_grid_has_a_timestep_too_many():
    stock, ours = (cls(timestep_spacing="trailing") for cls in BOTH)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(61)
    assert len(stock.timesteps) == 62 and stock.timesteps[-1] == -1
    assert len(ours.timesteps) == 61 and ours.timesteps[-1] >= 0


def test_bad_arguments_pass_unnoticed():
    x, wide = torch.zeros(1, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    stock, ours = (cls() for cls in BOTH)
    stock.set_timesteps(timesteps=[5, -3])
    assert stock.step(wide, 5, x).prev_sample.shape == wide.shape
    assert DDPMScheduler(prediction_type="score").config.prediction_type == "score"
    assert len(DDPMScheduler(trained_betas=np.array([0.1]), num_train_timesteps=0).betas) == 1
    for call, said in [
        (lambda: ours.set_timesteps(timesteps=[5, -3]), "end at 0 or later"),
        (lambda: ours.step(wide, 5, x), "model_output has shape"),
        (lambda: EduDDPMScheduler(prediction_type="score"), "epsilon, sample, v_prediction"),
        (lambda: EduDDPMScheduler(0), "at least 1"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
