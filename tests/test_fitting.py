"""Fitting a scheduler to a model, held against data whose best denoiser is known and against the search of all grids."""

from itertools import combinations
from types import SimpleNamespace

import closed_forms
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from diffusers_edu import EduDDPMScheduler
from diffusers_edu.schedulers.fitting import fit_timesteps, fit_variance, invert, shortest_path

STD = 0.4


class GaussianDenoiser:
    """epsilon as E[epsilon | x_t] has it where every pixel is N(0, STD^2), or twice that in the lower half of the image."""

    device, dtype = torch.device("cpu"), torch.float32
    config = SimpleNamespace(sample_size=4, in_channels=1)

    def __init__(self, uneven=False, second_half=False):
        self.variance = torch.full((1, 1, 4, 4), STD**2)
        if uneven:
            self.variance[:, :, 2:] *= 4
        self.alpha_bar = EduDDPMScheduler().alphas_cumprod
        self.second_half = second_half

    def data(self, count):
        return self.variance.sqrt() * torch.randn((count, 1, 4, 4), generator=torch.Generator().manual_seed(1))

    def __call__(self, x, t):
        alpha_bar = self.alpha_bar[torch.as_tensor(t)].reshape(-1, 1, 1, 1)
        epsilon = (1 - alpha_bar).sqrt() * x / (alpha_bar * self.variance + 1 - alpha_bar)
        return SimpleNamespace(sample=torch.cat([epsilon, x], 1) if self.second_half else epsilon)


def pipeline(uneven=False, second_half=False, **config):
    return SimpleNamespace(unet=GaussianDenoiser(uneven, second_half), scheduler=EduDDPMScheduler(clip_sample=False, **config))


@pytest.mark.parametrize("second_half", [False, True])
def test_the_fitted_variance_is_what_the_exact_model_cannot_know(second_half, tmp_path):
    pipe = pipeline(second_half=second_half, variance_type="learned_range" if second_half else "fixed_large")
    scheduler = fit_variance(pipe, pipe.unet.data(5000), per_timestep=200)
    assert scheduler.config.variance_type == "analytic"
    alpha_bar = pipe.scheduler._alpha_bar
    exact = STD**2 * (1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)
    errors = torch.tensor(scheduler.config.prediction_errors)
    noise = (2 / (200 * 16)) ** 0.5
    assert ((errors / exact - 1).abs() < 5 * noise).all()
    assert abs((errors / exact).mean() - 1) < 5 * noise / 1000**0.5 + 0.01  # the samples are 5,000
    # Bao et al. 2022, eq. (7) and the size of the predicted noise give the same.
    scheduler.set_timesteps(20)
    t, s = scheduler.timesteps[7].item(), scheduler.timesteps[8].item()
    alpha, noise_power = alpha_bar[t] / alpha_bar[s], (1 - alpha_bar[t]) / (alpha_bar[t] * STD**2 + 1 - alpha_bar[t])
    beta_tilde = (1 - alpha_bar[s]) / (1 - alpha_bar[t]) * (1 - alpha)
    root = ((1 - alpha_bar[t]) / alpha).sqrt() - (1 - alpha_bar[s] - beta_tilde).sqrt()
    assert abs(scheduler._get_variance(t) / (beta_tilde + root**2 * (1 - noise_power)) - 1) < 5 * noise
    scheduler.save_pretrained(tmp_path)
    assert EduDDPMScheduler.from_pretrained(tmp_path).config.prediction_errors == scheduler.config.prediction_errors


@pytest.mark.parametrize("kind", ["mixture", "finite"])
def test_the_fitted_variance_of_other_data_is_what_their_best_denoiser_cannot_know(kind):
    data, alpha_bar = closed_forms.KINDS[kind], EduDDPMScheduler()._alpha_bar

    class Denoiser(GaussianDenoiser):
        def __call__(self, x, t):
            at = alpha_bar[torch.as_tensor(t)].reshape(-1, 1, 1, 1)
            epsilon = (x.double() - at.sqrt() * data.mean(x.double(), at)) / (1 - at).sqrt()
            return SimpleNamespace(sample=epsilon.float())

    pipe = SimpleNamespace(unet=Denoiser(), scheduler=EduDDPMScheduler(clip_sample=False))
    scheduler = fit_variance(pipe, data.draw(5000).float(), per_timestep=50)
    errors = torch.tensor(scheduler.config.prediction_errors).reshape(20, 50).mean(1)
    exact = data.unknown(alpha_bar).reshape(20, 50).mean(1)
    assert (errors - exact).abs().max() <= 0.02 * exact.max()


def test_samples_inverted_come_back_and_their_noise_is_standard_normal():
    pipe = pipeline(timestep_spacing="trailing", eta=1.0)
    x_0 = pipe.unet.data(2000)
    errors = [invert(pipe, x_0, 100, iterations).error.mean().item() for iterations in (1, 2, 5)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    found = invert(pipe, x_0, 400)
    assert (found.reconstruction - x_0).square().mean().sqrt() < 1e-3 * STD
    assert abs(found.noise.std() - 1) < 0.02
    with pytest.raises(ValueError, match="at least 1"):
        invert(pipe, x_0, 10, iterations=0)


def test_the_shortest_path_is_that_of_a_search_of_all():
    generator = torch.Generator().manual_seed(0)
    for n, steps in ((6, 1), (6, 3), (7, 4), (7, 7)):
        lengths = torch.rand((n, n + 1), generator=generator).triu(1)
        lengths[torch.ones_like(lengths).tril().bool()] = torch.inf

        def length(nodes, lengths=lengths, n=n):
            return sum(lengths[i, j].item() for i, j in zip(nodes, [*nodes[1:], n], strict=True))

        every = [[0, *rest] for rest in combinations(range(1, n), steps - 1)]
        assert shortest_path(lengths, steps) == min(every, key=length)


def test_fitted_timesteps_stray_less_from_the_flow_than_even_ones_and_serve_any_scheduler():
    pipe = pipeline(uneven=True, timestep_spacing="trailing")
    grid = fit_timesteps(pipe, 6)
    assert len(grid) == 6 and grid == sorted(set(grid), reverse=True)

    def end(scheduler, **grid):
        scheduler.set_timesteps(**grid)
        x = torch.randn((500, 1, 4, 4), generator=torch.Generator().manual_seed(5))
        for t in scheduler.timesteps:
            x = scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
        return x

    flow = EduDDPMScheduler.from_config(pipe.scheduler.config, eta=0.0)
    exact = end(flow, num_inference_steps=1000)
    miss = (end(flow, timesteps=grid) - exact).square().mean().sqrt()
    for spacing in ("leading", "trailing", "linspace"):
        even = EduDDPMScheduler.from_config(flow.config, timestep_spacing=spacing)
        assert miss < (end(even, num_inference_steps=6) - exact).square().mean().sqrt(), spacing
    solver = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert (end(solver, timesteps=grid) - exact).abs().mean() < 0.2 * STD
    assert DDIMScheduler.from_config(flow.config).alphas_cumprod.equal(flow.alphas_cumprod)
    with pytest.raises(ValueError, match="fine_steps"):
        fit_timesteps(pipe, 101)
