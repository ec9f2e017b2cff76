"""What the claims rest on, held against models whose behaviour is known in closed form."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from tiny import tiny_unet

from diffusers_edu import StackedDAEPipeline, StackedDenoisingAutoencoder, VAEPipeline, VariationalAutoencoder
from diffusers_edu.evaluation.mechanisms import code_findings, from_mean, operations, stage_mismatch, stage_shares
from diffusers_edu.evaluation.sampling import Step
from diffusers_edu.models.modeling_vae import GaussianPosterior

STD = 0.5  # of every pixel of the data


def images(count, seed=0, size=4):
    return STD * torch.randn((count, 1, size, size), generator=torch.Generator().manual_seed(seed))


def test_shares_of_the_change_add_up_and_diversity_is_relative_to_the_data():
    start = torch.randn(500, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 10
    steps = [Step(2, start / 10), Step(1, start / 20)]
    shares = stage_shares(steps, start, data_std=0.5)
    assert [share.value for share in shares.change] == pytest.approx([0.9 / 0.95, 0.05 / 0.95], rel=1e-5)
    assert [left.value for left in shares.diversity] == pytest.approx([2.0, 1.0], rel=0.02)
    assert shares.later_change.value == shares.largest_later_change.value == pytest.approx(0.5 / 0.5, rel=0.02)
    assert shares.levels == [2, 1]
    # A share is the same whatever the samples here; a spread over 64 pixels is known to 1 / sqrt(2 * 500 * 64).
    assert shares.change[0].interval == pytest.approx((0.9 / 0.95, 0.9 / 0.95), abs=1e-6)
    low, high = shares.diversity[0].interval
    assert (high - low) / 2 == pytest.approx(1.96 * 2.0 / (2 * 500 * 64) ** 0.5, rel=0.4)


def test_later_stages_that_make_digits_of_the_mean_are_seen_beside_the_noise_that_the_first_takes_away():
    noise, data = 10 * images(500), images(500, 1)
    path = [torch.zeros_like(data), 0.5 * data, data]  # what the stages hand on: the mean, and then digits
    shares = stage_shares([Step(3 - i, x) for i, x in enumerate(path)], noise, data_std=STD)
    assert shares.change[0].value > 0.9
    assert shares.later_change.value == pytest.approx(1, rel=0.03)
    assert shares.largest_later_change.value == pytest.approx(0.5, rel=0.03)
    idle = stage_shares([Step(2, path[0]), Step(1, path[0])], noise, data_std=STD)
    assert idle.later_change.value == idle.largest_later_change.value == 0


class BestStack:
    """E[x_0 | x_k] of data N(0, STD^2): a stack of the best stages there are."""

    device = torch.device("cpu")

    def __init__(self, sigmas):
        self.sigmas, self.config = [0.0, *sigmas], SimpleNamespace(num_stages=len(sigmas), fresh_noise=True)

    def corrupt(self, clean, noise, level):
        return clean + self.sigmas[level] * noise

    def __call__(self, x, level):
        return SimpleNamespace(sample=STD**2 / (STD**2 + self.sigmas[level] ** 2) * x)


def test_what_the_stages_are_fed_is_what_the_best_ones_hand_on():
    model, clean = BestStack([0.2, 0.6, 2.0]), images(4000)
    found = stage_mismatch(model, clean, images(4000, 1) / 2 + 0.5)
    assert found.levels == [3, 2, 1]
    shrink = {level: STD**2 / (STD**2 + model.sigmas[level] ** 2) for level in found.levels}

    def variances(start):  # of the guesses after each stage, begun on noised data
        variance = STD**2
        for level in range(start, 0, -1):
            variance = shrink[level] ** 2 * (variance + model.sigmas[level] ** 2)
            yield variance

    handed_on = list(variances(3))
    assert found.variance_fed[0] is None
    assert [fed.value for fed in found.variance_fed[1:]] == pytest.approx([v / STD**2 for v in handed_on[:2]], rel=0.05)
    for distance, start in zip(found.distance_on_digits, found.levels, strict=True):
        *_, last = variances(start)
        expected = 16 * (STD / 2 - last**0.5 / 2) ** 2  # images in [0, 1] have half the standard deviation; few are clipped
        assert distance.value == pytest.approx(expected, rel=0.15, abs=0.03)
    assert found.distance_on_digits[0].value > found.distance_on_digits[2].value


class LinearVAE:
    """q(z | x) = N(w x, s^2) on two pixels of data N(0, STD^2); `shift` moves the codes away from the prior's place."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(scaling_factor=1.0)

    def __init__(self, s, shift=0.0):
        self.s, self.shift, self.w = s, shift, (1 - s**2) ** 0.5 / STD  # the codes together have variance 1

    def encode(self, x):
        mean = self.w * x + self.shift
        return SimpleNamespace(latent_dist=GaussianPosterior(mean, torch.full_like(mean, math.log(self.s))))

    def decode(self, z):
        return SimpleNamespace(sample=(z - self.shift) / self.w)

    def __call__(self, x):
        return SimpleNamespace(sample=0.5 * x)


@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_what_is_found_of_codes_is_its_closed_form(shift):
    vae, s = LinearVAE(0.5, shift), 0.5
    found = code_findings(vae, images(3000, size=2)[..., :1, :], images(500, 1, size=2)[..., :1, :], 1000)
    # Of two numbers: what a code says of its pixel, 1/2 log(1 / s^2), and KL(N(shift, 1) || N(0, 1)).
    low, high = found["rate"].interval
    assert abs(found["rate"].value - 2 * (-math.log(s) + shift**2 / 2)) <= 2.5 * (high - low) / 2
    assert found["reconstruction_error"].value == pytest.approx(0.5 * STD / 2, rel=0.05)
    told_apart = found["codes_told_apart"]
    assert (told_apart.interval[0] > 0.5) == (shift > 0)
    # Decoded, the codes vary by 1 / w of what they do, half that in [0, 1].
    expected = 2 * (1 / vae.w / 2 - STD / 2) ** 2
    assert found["distance_of_codes"].value == pytest.approx(expected, abs=0.02)


def test_a_distance_from_the_mean_is_that():
    train = torch.zeros(10, 1, 2, 2)
    found = from_mean(torch.full((5, 1, 2, 2), 0.25), train)
    assert found.value == 0.25 and found.interval == (0.25, 0.25)


def test_operations_are_those_of_all_steps():
    pipeline = DDPMPipeline(tiny_unet(), DDPMScheduler())
    once, thrice = (operations(pipeline, num_inference_steps=steps).value for steps in (1, 3))
    assert thrice == 3 * once > 0
    stack = StackedDAEPipeline(StackedDenoisingAutoencoder(num_stages=2, block_out_channels=(8,), latent_dim=6))
    # A convolution of 9 weights at 4 x 4 places, to 8 channels; two matrices 128 x 6; one of 16 weights back; twice for each.
    stage = 2 * (9 * 16 * 8 + 128 * 6 + 6 * 128 + 16 * 16 * 8)
    assert operations(stack).value == 2 * stage
    assert operations(VAEPipeline(VariationalAutoencoder(block_out_channels=(8, 8), norm_num_groups=4))).value > 0
