"""The stack of denoising autoencoders: its levels, its corruption, its stages."""

import pytest
import torch

from diffusers_edu import StackedDenoisingAutoencoder

TINY = {"block_out_channels": (8, 8), "latent_dim": 4}
LEVELS = {"num_stages": 3, "sigma_min": 0.1, "sigma_max": 10.0}  # 0.1, 1, 10


def test_levels_increase_evenly_in_log_from_min_to_max():
    sigmas = StackedDenoisingAutoencoder(num_stages=5, sigma_min=0.05, sigma_max=20.0, **TINY).sigmas
    assert sigmas[0] == 0
    assert [sigmas[1], sigmas[-1]] == pytest.approx([0.05, 20.0])
    assert [b / a for a, b in zip(sigmas[1:-1], sigmas[2:], strict=True)] == pytest.approx([400**0.25] * 4)


def test_one_stage_is_the_denoising_autoencoder_at_the_largest_level():
    model = StackedDenoisingAutoencoder(num_stages=1, sigma_max=7.0, **TINY)
    assert model.sigmas == [0, 7.0]
    assert len(model.stages) == 1


def test_corruption_adds_the_noise_of_the_level():
    model, clean, noise = StackedDenoisingAutoencoder(**LEVELS, **TINY), torch.rand(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    assert torch.equal(model.corrupt(clean, noise, 0), clean)
    for level, sigma in enumerate((0.1, 1.0, 10.0), start=1):
        assert (model.corrupt(clean, noise, level) - (clean + sigma * noise)).abs().max() <= 1e-5


@pytest.mark.parametrize("channels, size", [(1, 8), (3, 16), (1, 28)])
def test_every_stage_returns_images_of_its_input_shape(channels, size):
    model = StackedDenoisingAutoencoder(channels, size, num_stages=2, **TINY)
    x = torch.randn(2, channels, size, size)
    for level in (1, 2):
        assert model(x, level).sample.shape == x.shape
        assert torch.equal(model(x, level, return_dict=False)[0], model(x, level).sample)


def test_a_stage_sees_its_input_scaled_to_unit_variance():
    model, noise = StackedDenoisingAutoencoder(**LEVELS, **TINY), torch.randn(2, 1, 8, 8)
    for level, sigma in enumerate((0.1, 1.0, 10.0), start=1):
        expected = model.stages[level - 1](noise)
        assert (model(noise * (1 + sigma**2) ** 0.5, level).sample - expected).abs().max() <= 1e-5


def test_stages_share_no_weights():
    model = StackedDenoisingAutoencoder(num_stages=2, **TINY)
    model(torch.randn(2, 1, 8, 8), 2).sample.sum().backward()
    assert all(p.grad is None for p in model.stages[0].parameters())
    assert all(p.grad is not None for p in model.stages[1].parameters())


@pytest.mark.parametrize("size", [0, 2, 10, 30])
def test_a_size_that_cannot_be_halved_is_refused_with_those_that_can(size):
    with pytest.raises(ValueError, match=f"{size}; this model takes multiples of 4"):
        StackedDenoisingAutoencoder(sample_size=size, **TINY)


@pytest.mark.parametrize("levels", [{"num_stages": 0}, {"sigma_min": 0.0}, {"sigma_min": 3.0, "sigma_max": 2.0}])
def test_levels_that_do_not_increase_are_refused(levels):
    with pytest.raises(ValueError, match="0 < min < max"):
        StackedDenoisingAutoencoder(**levels, **TINY)


@pytest.mark.parametrize("level", [0, 4, -1])
def test_a_level_without_a_stage_is_refused(level):
    with pytest.raises(ValueError, match="stages for 1 to 3"):
        StackedDenoisingAutoencoder(num_stages=3, **TINY)(torch.randn(1, 1, 8, 8), level)


def test_save_and_load_keeps_levels_and_outputs(tmp_path):
    model = StackedDenoisingAutoencoder(num_stages=3, sigma_max=5.0, fresh_noise=False, **TINY).eval()
    model.save_pretrained(tmp_path)
    loaded = StackedDenoisingAutoencoder.from_pretrained(tmp_path)
    x = torch.randn(2, 1, 8, 8)
    assert loaded.sigmas == model.sigmas
    assert loaded.config.fresh_noise is False
    for level in (1, 2, 3):
        assert torch.equal(loaded(x, level).sample, model(x, level).sample)
