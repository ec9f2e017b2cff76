"""The objectives against their formulas."""

import math

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DModel

from diffusers_edu import EduDDPMScheduler, StackedDenoisingAutoencoder, VariationalAutoencoder
from diffusers_edu.training.objectives import DenoisingObjective, DiffusionObjective, VariationalObjective
from diffusers_edu.training.randomness import StepNoise


def noise(rows: int = 4, step: int = 0) -> StepNoise:
    return StepNoise(0, step, range(rows), rows)


def images(rows: int = 4) -> torch.Tensor:
    return torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def tiny_unet(
    channels: int = 1, size: int = 8, num_class_embeds: int | None = None, out_channels: int | None = None
) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=out_channels or channels,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        add_attention=False,
        num_class_embeds=num_class_embeds,
    )


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def test_stages_with_fresh_noise_each_see_the_data_at_their_own_level():
    model, x = StackedDenoisingAutoencoder(num_stages=3), images()
    loss, terms = DenoisingObjective(model).loss(model, {"images": x}, noise())
    draws, expected = noise(), {}
    for level in (3, 2, 1):
        corrupted = x + model.sigmas[level] * draws.normal(1, 8, 8)
        expected[f"stage_{level}"] = (model(corrupted, level).sample - x).square().mean()
    assert terms.keys() == expected.keys()
    assert max(difference(terms[name], expected[name]) for name in expected) < 1e-6
    assert difference(loss, sum(expected.values())) < 1e-5


def test_stages_without_fresh_noise_are_fed_by_their_predecessors_and_pass_no_gradient_to_them():
    model, x = StackedDenoisingAutoencoder(num_stages=2, fresh_noise=False), images()
    _, terms = DenoisingObjective(model).loss(model, {"images": x}, noise())
    first = model(x + model.sigmas[2] * noise().normal(1, 8, 8), 2).sample
    assert difference(terms["stage_1"], (model(first, 1).sample - x).square().mean()) < 1e-6
    terms["stage_1"].backward()
    assert all(parameter.grad is None for parameter in model.stages[1].parameters())
    assert all(parameter.grad is not None for parameter in model.stages[0].parameters())


def test_the_variational_loss_is_the_negative_bound_of_torch_distributions():
    model, x = VariationalAutoencoder(), images()
    loss, terms = VariationalObjective(model).loss(model, {"images": x}, noise())
    epsilon = noise().normal(*model.latent_shape)
    posterior = model.encode(x).latent_dist
    q = torch.distributions.Normal(posterior.mean, posterior.std)
    z = posterior.mean + posterior.std * epsilon
    log_likelihood = torch.distributions.Normal(model.decode(z).sample, model.log_sigma_x.exp()).log_prob(x)
    kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0, 1))
    bound = log_likelihood.flatten(1).sum(1) - kl.flatten(1).sum(1)
    assert difference(loss, -bound.mean() / 64) < 1e-5
    assert difference(terms["kl"], kl.flatten(1).sum(1).mean() / 64) < 1e-5


def test_the_kl_weight_scales_the_kl_term_alone():
    model, x = VariationalAutoencoder(), images()
    weighted, terms = VariationalObjective(model, kl_weight=0.25).loss(model, {"images": x}, noise())
    assert difference(weighted, terms["reconstruction"] + 0.25 * terms["kl"]) < 1e-6


def test_the_latent_scale_is_that_of_draws_over_the_data():
    torch.manual_seed(0)
    model = VariationalAutoencoder()
    x = images(64)
    VariationalObjective(model).finish([{"images": x[:40]}, {"images": x[40:]}])
    with torch.no_grad():
        posterior = model.encode(x).latent_dist
        draws = torch.stack([posterior.sample(torch.Generator().manual_seed(i)) for i in range(200)])
    assert model.config.scaling_factor == pytest.approx(1 / draws.std().item(), rel=5e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_diffusion_loss_is_the_error_of_the_named_target(prediction_type):
    scheduler = EduDDPMScheduler(prediction_type=prediction_type)
    model, x = tiny_unet(), images()
    loss, _ = DiffusionObjective(model, scheduler).loss(model, {"images": x}, noise())
    draws = noise()
    epsilon = draws.normal(1, 8, 8)
    t = (draws.stratified_uniform() * 1000).long()
    alpha_bar = scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * epsilon
    velocity = alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x
    target = {"epsilon": epsilon, "sample": x, "v_prediction": velocity}[prediction_type]
    assert difference(loss, (model(x_t, t).sample - target).square().mean()) < 1e-5


def test_latents_are_drawn_and_scaled_alike_for_our_vae_and_for_the_stock_one():
    ours = VariationalAutoencoder(scaling_factor=0.5)
    stock = AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=0.5
    )
    for vae in (ours, stock):
        objective = DiffusionObjective(tiny_unet(4, 2), EduDDPMScheduler(), vae)
        posterior = vae.encode(images()).latent_dist
        expected = 0.5 * (posterior.mean + posterior.std * noise().normal(*posterior.mean.shape[1:]))
        assert difference(objective.encode(images(), noise()), expected) < 1e-6
        assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_dropped_labels_become_the_null_class_at_the_rate_asked_for():
    model = tiny_unet(num_class_embeds=11)
    labels = {"labels": torch.arange(5000) % 10}
    kept = DiffusionObjective(model, EduDDPMScheduler(), label_dropout=0.3).labels(labels, noise(5000))
    dropped = (kept == 10).float().mean().item()
    assert abs(dropped - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 5000)
    assert torch.equal(kept[kept != 10], labels["labels"][kept != 10])


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_the_hybrid_loss_is_the_simple_one_and_a_thousandth_of_the_bound(kind):
    scheduler = EduDDPMScheduler(variance_type=kind)
    objective = DiffusionObjective(tiny_unet(out_channels=2), scheduler, bin_width=1 / 8)
    loss, terms = objective.loss(objective.model, {"images": images()}, noise())
    assert difference(loss, terms["simple"] + 0.001 * terms["bound"]) < 1e-6
    # The bound leaves the first half of the channels alone, and teaches the second, which the simple loss does not know.
    last = objective.model.conv_out.weight
    simple, bound = (torch.autograd.grad(terms[name], last, retain_graph=True)[0] for name in ("simple", "bound"))
    assert simple[0].abs().max() > 0 and simple[1].abs().max() == 0
    assert bound[0].abs().max() == 0 and bound[1].abs().max() > 0 and bound.isfinite().all()


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_the_hybrid_loss_finds_the_best_variance(kind):
    """x_0 ~ N(0, 1) at every t: given x_t, which then has variance 1 too, x_s has the variance beta_t, not beta_tilde_t."""
    scheduler = EduDDPMScheduler(num_train_timesteps=20, variance_type=kind, clip_sample=False, rescale_betas_to_timesteps=True)

    class Exact(torch.nn.Module):
        """The best epsilon for that data, and a table of what is to be learned."""

        def __init__(self):
            super().__init__()
            self.head = torch.nn.Parameter(torch.zeros(20) if kind == "learned_range" else torch.full((20,), 1e-3))
            self.config = type("Config", (), {"num_class_embeds": None, "in_channels": 1, "out_channels": 2})

        def forward(self, x, t, class_labels=None):
            sigma = (1 - scheduler.alphas_cumprod[t]).sqrt().reshape(-1, 1, 1, 1)
            second = self.head[t].reshape(-1, 1, 1, 1).expand_as(x)
            return type("Output", (), {"sample": torch.cat([sigma * x, second], dim=1)})

    model = Exact()
    objective = DiffusionObjective(model, scheduler)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for step in range(400):
        x_0 = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 400)
        loss, _ = objective.loss(model, {"images": x_0}, noise(64, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    t = torch.arange(1, 20)
    x = torch.zeros(19, 1, 4, 4)
    learned = scheduler.reverse(model(x, t).sample, t, x).variance[:, 0, 0, 0].detach()
    best = scheduler.betas[1:]
    assert (learned / best - 1).abs().max() < 0.1
