"""Bounds on the likelihood, held against data whose best denoiser, bound and entropy are known in closed form."""

import math
from types import SimpleNamespace

import closed_forms
import pytest
import torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from diffusers_edu import EduDDPMScheduler, VariationalAutoencoder
from diffusers_edu.evaluation.likelihood import (
    autoencoder_bound,
    diffusion_bound,
    latent_diffusion_bound,
    log_likelihood,
    unconditional,
)
from diffusers_edu.evaluation.parzen import negative_log_density, parzen
from diffusers_edu.models.modeling_vae import GaussianPosterior
from diffusers_edu.schedulers.scheduling_edu_ddpm import BETA_SCHEDULES, PREDICTION_TYPES, VARIANCE_TYPES

STD = 0.4


def gaussian(count, size=4, seed=0):
    return STD * torch.randn((count, 1, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Exact:
    """E[x_0 | x_t], in the form that the scheduler wants, for data of which `mean_of(x_t, alpha_bar)` knows it."""

    def __init__(self, scheduler, mean_of, second_half=None):
        self.scheduler, self.mean_of, self.second_half = scheduler, mean_of, second_half

    def __call__(self, x_t, t):
        alpha_bar = self.scheduler._alpha_bar[t].reshape(-1, *[1] * (x_t.ndim - 1)).to(x_t)
        x_0 = self.mean_of(x_t, alpha_bar)
        epsilon = (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x_0
        output = {"epsilon": epsilon, "sample": x_0, "v_prediction": v}[self.scheduler.config.prediction_type]
        return output if self.second_half is None else torch.cat([output, torch.full_like(output, self.second_half)], 1)


def gaussian_mean(x_t, alpha_bar):
    return alpha_bar.sqrt() * STD**2 * x_t / (alpha_bar * STD**2 + 1 - alpha_bar)


def closed_form(scheduler, data, second_half=None):
    """Every term of the bound of a pixel of `data` under the exact denoiser, L_T and those by timestep: they depend on the data by what
    the denoiser cannot know of x_0 alone, and L_T by its power."""
    alpha_bar = scheduler._alpha_bar
    first = alpha_bar[scheduler.timesteps[0]]
    prior = 0.5 * (first * (data.power - 1) - torch.log1p(-first))
    grid, terms = [*scheduler.timesteps.tolist(), None], []
    for (t, s), unknown in zip(zip(grid, grid[1:], strict=False), data.unknown(alpha_bar[scheduler.timesteps]), strict=True):
        a_t, a_s = alpha_bar[t], torch.ones((), dtype=torch.float64) if s is None else alpha_bar[s]
        beta, beta_tilde = 1 - a_t / a_s, (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
        weight = a_s.sqrt() * beta / (1 - a_t)  # of x_0 in the posterior mean
        x = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
        output = x if second_half is None else torch.cat([x, torch.full_like(x, second_half)], 1)
        variance = scheduler.reverse(output, t, x).variance.double().squeeze()
        if s is None:
            terms.append(0.5 * torch.log(2 * math.pi * variance) + 0.5 * unknown / variance)
        else:
            terms.append(0.5 * (torch.log(variance / beta_tilde) + (beta_tilde + weight**2 * unknown) / variance - 1))
    return prior, torch.stack(terms)


LEARNED = {"learned": 0.02, "learned_range": 0.3}  # what the second half of the channels says


@pytest.mark.parametrize("variance", [*VARIANCE_TYPES])
@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("kind", closed_forms.KINDS)
def test_every_term_is_its_closed_form(kind, schedule, prediction, variance):
    data, half = closed_forms.KINDS[kind], LEARNED.get(variance)
    config = {"beta_schedule": schedule, "prediction_type": prediction, "variance_type": variance, "clip_sample": False}
    scheduler = EduDDPMScheduler(**config, prediction_errors=[0.02 + 0.1 * t / 1000 for t in range(1000)])
    scheduler.set_timesteps(8)
    x_0 = data.draw(1000)
    # The schedules that end far from noise (linear betas are meant for it) have a prior term worth looking at too.
    found = diffusion_bound(Exact(scheduler, data.mean, half), scheduler, x_0, None, batch_size=1000)
    prior, terms = closed_form(scheduler, data, half)
    for value, expected in [(found.parts["prior"], prior), *zip(found.terms, terms, strict=True)]:
        error, scale = value.std() / len(value) ** 0.5, abs(16 * expected)
        assert abs(value.mean() - 16 * expected) <= 4.5 * error + 1e-5 * scale + 1e-6
    assert found.timesteps == scheduler.timesteps.tolist()
    assert (found.nats - found.parts["prior"] - found.terms.sum(0)).abs().max() <= 1e-9 * found.nats.abs().max()


def unknown_share(scheduler):
    alpha_bar = scheduler._alpha_bar
    return (STD**2 * (1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)).tolist()


@pytest.mark.parametrize("steps", [2, 10, 100])
def test_with_the_exact_denoiser_and_variance_the_bound_of_gaussian_data_is_their_entropy_in_any_number_of_steps(steps):
    config = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "timestep_spacing": "linspace"}
    scheduler = EduDDPMScheduler(
        **config, variance_type="analytic", prediction_errors=unknown_share(EduDDPMScheduler(**config))
    )
    scheduler.set_timesteps(steps)
    x_0 = gaussian(1000)
    found = diffusion_bound(Exact(scheduler, gaussian_mean), scheduler, x_0, None, seed=1)
    entropy = 16 * (0.5 * math.log(2 * math.pi * math.e) + math.log(STD))
    estimate = found.estimate()
    assert abs(estimate.value - entropy) <= 4 * (estimate.interval[1] - estimate.value) / 1.96 + 1e-3
    # Image by image it is within noise of -log p(x) itself.
    exact = -Normal(torch.zeros(()), STD).log_prob(x_0).flatten(1).sum(1)
    assert torch.corrcoef(torch.stack([found.nats, exact]))[0, 1] > 0.2


MEANS, SPREAD = torch.tensor([[-0.8, 0.5], [0.7, 0.7], [0.2, -0.9]], dtype=torch.float64), 0.15
MIXTURE = MixtureSameFamily(
    Categorical(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)),
    Independent(Normal(MEANS, torch.full_like(MEANS, SPREAD)), 1),
)


def mixture_mean(x_t, alpha_bar, spread=SPREAD, weights=(0.5, 0.3, 0.2)):
    """Of a mixture of Gaussians: the posterior means of its parts, weighted by how likely each made x_t."""
    x = x_t.reshape(len(x_t), 1, 2)
    a = alpha_bar.reshape(-1, 1, 1)
    var = a * spread**2 + 1 - a
    logits = -(x - a.sqrt() * MEANS).square().sum(-1) / (2 * var[..., 0]) + torch.tensor(weights).log()
    parts = MEANS + a.sqrt() * spread**2 / var * (x - a.sqrt() * MEANS)
    return (logits.softmax(1)[..., None] * parts).sum(1).reshape(x_t.shape)


def test_the_bound_of_a_mixture_comes_down_to_its_entropy_as_the_steps_become_many():
    torch.manual_seed(0)
    x_0 = MIXTURE.sample((2000,)).reshape(-1, 1, 1, 2)
    entropy = -MIXTURE.log_prob(x_0.reshape(-1, 2)).mean().item()
    gaps = []
    for steps in (10, 50, 250, 1000):
        scheduler = EduDDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="fixed_small", clip_sample=False)
        scheduler.set_timesteps(steps)
        found = diffusion_bound(Exact(scheduler, mixture_mean), scheduler, x_0, None, batch_size=2000)
        gaps.append(found.nats.mean().item() - entropy)
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] > -0.1
    assert gaps[3] < 0.15 * gaps[0]


def test_with_the_exact_denoiser_and_variance_the_bound_of_a_mixture_comes_down_to_its_entropy_as_t_grows():
    torch.manual_seed(0)
    x_0 = MIXTURE.sample((2000,)).reshape(-1, 1, 1, 2)
    exact = -MIXTURE.log_prob(x_0.reshape(-1, 2))
    config, gaps = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "clip_sample": False}, []
    for count in (5, 20, 100):
        scheduler = EduDDPMScheduler(count, **config)
        errors = diffusion_bound(Exact(scheduler, mixture_mean), scheduler, x_0, None, seed=1).squared_errors.mean(1)
        best = EduDDPMScheduler(count, **config, variance_type="analytic", prediction_errors=errors.flip(0).tolist())
        found = diffusion_bound(Exact(best, mixture_mean), best, x_0, None)
        assert found.timesteps == list(range(count))[::-1]
        gap = found.nats - exact
        gaps.append(gap.mean().item())
    assert gaps[0] > 2 * gaps[1] > 4 * abs(gaps[2])
    assert abs(gaps[2]) <= 4 * gap.std().item() / len(gap) ** 0.5


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
def test_the_distortion_of_the_progressive_code_is_that_of_images_clipped_as_in_sampling(prediction):
    """Far from the image a small error of epsilon is a large one of x_0; a receiver, as a sampler, clips it."""
    scheduler = EduDDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction)
    scheduler.set_timesteps(10)
    x_0, exact, wrong = gaussian(200).clamp(-1, 1), Exact(scheduler, gaussian_mean), torch.Generator().manual_seed(0)

    def nearly(x_t, t):
        output = exact(x_t, t)
        return output + 0.03 * torch.randn(output.shape, generator=wrong, dtype=output.dtype)

    rate, distortion = diffusion_bound(nearly, scheduler, x_0, 2 / 16).progressive_code()
    assert rate.diff().min() > -1e-3
    assert distortion.max() <= 2 and distortion[-1] < 0.1


def test_the_bound_of_a_finite_data_set_comes_down_to_the_logarithm_of_its_size():
    """Three images, each as likely: with grey levels the entropy is log 3, and the exact denoiser weighs the three."""
    images = torch.tensor([[-1.0, 0.0], [1.0, 1.0], [0.5, -0.5]], dtype=torch.float64)

    def mean_of(x_t, alpha_bar):
        x, a = x_t.reshape(len(x_t), 1, 2), alpha_bar.reshape(-1, 1, 1)
        logits = -(x - a.sqrt() * images).square().sum(-1) / (2 * (1 - a[..., 0]))
        return (logits.softmax(1)[..., None] * images).sum(1).reshape(x_t.shape)

    x_0 = images.repeat(600, 1).reshape(-1, 1, 1, 2)
    gaps = []
    for steps in (5, 25, 1000):
        scheduler = EduDDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="fixed_small", clip_sample=False)
        scheduler.set_timesteps(steps)
        found = diffusion_bound(Exact(scheduler, mean_of), scheduler, x_0, bin_width=0.125, batch_size=1800)
        gaps.append(found.nats.mean().item() - math.log(3))
    assert gaps[0] > gaps[1] > gaps[2]
    assert -0.05 < gaps[2] < 0.1


def test_bins_sum_to_one_and_far_ones_keep_their_digits():
    levels = torch.linspace(-1, 1, 17, dtype=torch.float64).reshape(-1, 1, 1, 1)
    for mean, std in ((0.0, 0.05), (0.93, 0.3), (-3.0, 1.0), (0.3, 1e-3)):
        logs = log_likelihood(levels, torch.full_like(levels, mean), std, 0.125)
        assert abs(logs.exp().sum() - 1) <= 1e-12
        assert logs.isfinite().all()
    # Far from the mean on either side, the same number: log of a tail that float64 cannot hold.
    near, far = (log_likelihood(torch.full((1, 1), x), torch.zeros(1, 1), 0.01, 0.125) for x in (-0.5, 0.5))
    assert near == far
    expected = torch.special.log_ndtr(torch.tensor(-(0.5 - 0.0625) / 0.01, dtype=torch.float64))
    assert abs(near.item() - expected.item()) <= 1e-6 * abs(expected.item())


def test_bins_agree_with_the_schedulers_own():
    from diffusers_edu.schedulers.scheduling_edu_ddpm import Gaussian, _log_likelihood

    x = torch.linspace(-1, 1, 17, dtype=torch.float64).repeat(3, 1)
    mean, variance = 0.2 * torch.ones_like(x), torch.tensor([[1e-4], [0.01], [1.0]], dtype=torch.float64)
    for bin_width in (0.125, None):
        theirs = _log_likelihood(x, Gaussian(mean, variance, variance.log()), bin_width).sum(1)
        ours = torch.stack(
            [log_likelihood(x[i : i + 1], mean[i : i + 1], variance[i].sqrt().item(), bin_width)[0] for i in range(3)]
        )
        assert ((ours - theirs) / theirs).abs().max() <= 1e-9


class LinearVAE:
    """x = W z + sigma_x epsilon with z ~ N(0, I): its posterior, evidence and entropy are known. `widen` makes its q wrong."""

    config = SimpleNamespace(scaling_factor=1.7, shift_factor=0.3)

    def __init__(self, sigma_x=0.3, widen=0.0, prior_std=1.0):
        torch.manual_seed(0)
        self.weight, self.sigma_x, self.widen, self.prior_std = (
            torch.randn(9, 2, dtype=torch.float64),
            sigma_x,
            widen,
            prior_std,
        )
        precision = self.weight.T @ self.weight / sigma_x**2 + torch.eye(2, dtype=torch.float64) / prior_std**2
        self.covariance = precision.inverse()
        covariance = prior_std**2 * self.weight @ self.weight.T + sigma_x**2 * torch.eye(9, dtype=torch.float64)
        self.evidence = MultivariateNormal(torch.zeros(9, dtype=torch.float64), covariance)

    def data(self, count):
        torch.manual_seed(1)
        return self.evidence.sample((count,)).reshape(-1, 1, 3, 3)

    def encode(self, x):
        mean = x.flatten(1) @ self.weight @ self.covariance / self.sigma_x**2
        root = torch.linalg.cholesky(self.covariance)
        lower = root.tril(-1).expand(len(x), 2, 2)
        log_std = root.diagonal().log().expand(len(x), 2) + self.widen
        shape = (len(x), 2, 1, 1)
        return SimpleNamespace(latent_dist=GaussianPosterior(mean.reshape(shape), log_std.reshape(shape), lower))

    def decode(self, z):
        return SimpleNamespace(sample=(z.flatten(1) @ self.weight.T).reshape(-1, 1, 3, 3))


def test_with_the_exact_posterior_the_bound_of_a_vae_is_the_evidence():
    vae = LinearVAE()
    x = vae.data(400)
    exact = -vae.evidence.log_prob(x.flatten(1))
    elbo = autoencoder_bound(vae, x, vae.sigma_x, None)
    assert abs((elbo.nats - exact).mean()) <= 4 * (elbo.nats - exact).std() / 20
    for k in (2, 7):  # every weight is p(x) itself
        bound = autoencoder_bound(vae, x, vae.sigma_x, None, k=k)
        assert (bound.nats - exact).abs().max() <= 1e-4


def test_with_a_wrong_posterior_the_gap_is_the_divergence_and_more_codes_close_it():
    vae = LinearVAE(widen=0.7)
    x = vae.data(600)
    exact = -vae.evidence.log_prob(x.flatten(1)).mean()
    bounds = [autoencoder_bound(vae, x, vae.sigma_x, None, k=k).nats.mean() - exact for k in (1, 10, 100, 1000)]
    # KL(q || p(z | x)) of two Gaussians with one mean, L and diag(e^w) L's own.
    q = vae.encode(x[:1]).latent_dist.scale_tril[0]
    ratio = torch.linalg.solve(vae.covariance, q @ q.T)
    divergence = 0.5 * (ratio.trace() - 2 - torch.logdet(ratio))
    assert abs(bounds[0] - divergence) <= 0.1 * divergence
    assert bounds[0] > bounds[1] > bounds[2] > bounds[3] > -0.01
    assert bounds[3] < 0.02 * bounds[0]


def test_the_bound_of_a_latent_diffusion_is_the_evidence_of_the_whole_model_where_all_parts_are_exact():
    """Codes N(0, STD^2) under an exact diffusion, and the posterior that belongs to that prior; the codes shifted and scaled."""
    vae = LinearVAE(prior_std=STD)
    s, m = vae.config.scaling_factor, vae.config.shift_factor
    x = vae.data(1500)

    def mean_of(y_t, alpha_bar):  # of y = s (z - m), z ~ N(0, STD^2)
        mean, var = -s * m, (s * STD) ** 2
        return mean + alpha_bar.sqrt() * var / (alpha_bar * var + 1 - alpha_bar) * (y_t - alpha_bar.sqrt() * mean)

    config = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "timestep_spacing": "linspace"}
    alpha_bar = EduDDPMScheduler(**config)._alpha_bar
    unknown = (s * STD) ** 2 * (1 - alpha_bar) / (alpha_bar * (s * STD) ** 2 + 1 - alpha_bar)
    scheduler = EduDDPMScheduler(**config, variance_type="analytic", prediction_errors=unknown.tolist())
    scheduler.set_timesteps(20)
    found = latent_diffusion_bound(vae, Exact(scheduler, mean_of), scheduler, x, vae.sigma_x, None)
    exact = -vae.evidence.log_prob(x.flatten(1))
    difference = found.nats - exact
    assert abs(difference.mean()) <= 4 * difference.std() / len(x) ** 0.5 + 1e-3
    assert found.parts.keys() == {"reconstruction", "posterior", "prior", "steps", "last", "scale"}


def test_nothing_depends_on_the_batches():
    scheduler = EduDDPMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(4)
    x_0, model = gaussian(10).float().clamp(-1, 1), Exact(scheduler, gaussian_mean)
    one, other = (diffusion_bound(model, scheduler, x_0, 0.125, batch_size=size) for size in (3, 10))
    assert (one.terms - other.terms).abs().max() <= 1e-3
    vae = VariationalAutoencoder(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2).eval()
    images = gaussian(6, 8).float().clamp(-1, 1)
    for k in (1, 3):
        one, other = (autoencoder_bound(vae, images, 0.3, 0.125, k=k, batch_size=size) for size in (6, 600))
        assert (one.nats - other.nats).abs().max() <= 1e-3


def test_more_draws_narrow_a_term_and_leave_it_where_it_is():
    scheduler = EduDDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    scheduler.set_timesteps(5)
    x_0, model = gaussian(1).expand(400, -1, -1, -1), Exact(scheduler, gaussian_mean)  # one image, so all that varies is noise
    one, ten = (diffusion_bound(model, scheduler, x_0, None, draws=draws) for draws in (1, 10))
    ratio = (one.terms.std(1) / ten.terms.std(1))[:-1]
    assert ((ratio > 2.5) & (ratio < 4)).all()
    error = (one.terms.var(1) / 400 + ten.terms.var(1) / 400).sqrt()
    assert ((one.terms.mean(1) - ten.terms.mean(1)).abs() <= 4.5 * error + 1e-6).all()


def test_units_and_intervals():
    scheduler = EduDDPMScheduler(beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(4)
    found = diffusion_bound(Exact(scheduler, gaussian_mean), scheduler, gaussian(50).float().clamp(-1, 1), 0.125)
    nats, bits = found.estimate(), found.bits_per_dim()
    assert bits.value == pytest.approx(nats.value / 16 / math.log(2))
    assert nats.interval[1] - nats.value == pytest.approx(1.96 * found.nats.std().item() / 50**0.5)
    assert bits.interval[0] < bits.value < bits.interval[1]
    assert (nats.n, found.dimensions) == (50, 16)


def test_the_progressive_code_starts_at_the_prior_and_ends_near_the_image():
    scheduler = EduDDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, variance_type="fixed_small")
    scheduler.set_timesteps(100)
    found = diffusion_bound(Exact(scheduler, gaussian_mean), scheduler, gaussian(300), None)
    rate, distortion = found.progressive_code()
    assert rate.shape == distortion.shape == (100,)
    assert rate[0] == pytest.approx(found.parts["prior"].mean().item() / 16 / math.log(2))
    assert (rate.diff() > 0).all()
    assert distortion[0] == pytest.approx(STD, rel=0.05)  # nothing is known yet: the mean is the best guess
    assert distortion[-1] < 0.05


def test_a_model_of_classes_is_asked_without_one():
    class UNet:
        config = SimpleNamespace(num_class_embeds=11)

        def __call__(self, x, t, class_labels):
            assert class_labels.tolist() == [10, 10]
            return SimpleNamespace(sample=x)

    x = torch.ones(2, 1, 2, 2)
    assert torch.equal(unconditional(UNet())(x, torch.tensor([1, 1])), x)


def test_what_is_told_by_timestep_is_the_bound_and_its_code():
    scheduler = EduDDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    scheduler.set_timesteps(6)
    found = diffusion_bound(Exact(scheduler, gaussian_mean), scheduler, gaussian(300), None)
    told = found.by_timestep()
    assert told["timesteps"] == scheduler.timesteps.tolist()
    prior = found.parts["prior"].mean().item() / 16 / math.log(2)
    assert sum(told["bits_per_dim_by_timestep"]) + prior == pytest.approx(found.bits_per_dim().value)
    assert told["denoising_loss_by_timestep"] == pytest.approx([value**2 for value in told["distortion_by_timestep"]])
    unknown = closed_forms.GAUSSIAN.unknown(scheduler._alpha_bar[scheduler.timesteps])
    assert told["denoising_loss_by_timestep"] == pytest.approx(unknown.tolist(), rel=0.1)
    vae = LinearVAE()
    assert autoencoder_bound(vae, vae.data(3), vae.sigma_x, None).by_timestep() == {}


def test_parzen_windows_are_a_distribution_over_all_images():
    levels = torch.linspace(-1, 1, 5)
    every = torch.cartesian_prod(levels, levels, levels).reshape(-1, 1, 1, 3)
    samples = torch.rand(20, 1, 1, 3) * 2 - 1
    for sigma in (0.05, 0.4):
        assert negative_log_density(samples, every, sigma, 0.5).neg().exp().sum() == pytest.approx(1, abs=1e-9)
    one = negative_log_density(samples[:1], every, 0.4, 0.5)
    assert (one + log_likelihood(every, samples[:1].expand_as(every), 0.4, 0.5)).abs().max() <= 1e-9


def test_parzen_windows_are_as_wide_as_suits_the_tuning_images_and_may_prefer_one_mean_image_to_the_data_itself():
    data = closed_forms.MIXTURE.draw(700).clamp(-1, 1).mul(8).round().div(8)
    nats, sigma = parzen(data[:300], data[300:400], data[400:], 0.125)
    near, far = (negative_log_density(data[:300], data[300:400], sigma * by, 0.125).mean() for by in (1.15, 1 / 1.15))
    best = negative_log_density(data[:300], data[300:400], sigma, 0.125).mean()
    assert best < near and best < far
    other, _ = parzen(data[:300].mean(0, keepdim=True).expand(300, -1, -1, -1), data[300:400], data[400:], 0.125)
    assert other.mean() < nats.mean()  # why they are to be mistrusted
