"""The objectives against their formulas."""

import math

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny import tiny_unet

from diffusers_edu import EduDDPMScheduler, StackedDenoisingAutoencoder, VariationalAutoencoder
from diffusers_edu.training.latents import moments
from diffusers_edu.training.objectives import DenoisingObjective, DiffusionObjective, VariationalObjective
from diffusers_edu.training.randomness import StepNoise


def noise(rows: int = 4, step: int = 0) -> StepNoise:
    return StepNoise(0, step, range(rows), rows)


def images(rows: int = 4) -> torch.Tensor:
    return torch.rand(rows, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def test_stages_with_fresh_noise_each_see_the_data_at_their_own_level():
    model, x = StackedDenoisingAutoencoder(num_stages=3), images()
    loss, terms = DenoisingObjective(model).loss(model, {"images": x}, noise())
    draws, expected = noise(), {}
    for level in (3, 2, 1):
        corrupted = x + model.sigmas[level] * draws.normal(1, 8, 8)
        expected[f"stage_{level}"] = (model(corrupted, level).sample - x).square().mean((1, 2, 3))
    assert terms.keys() == expected.keys()
    assert max(difference(terms[name], expected[name]) for name in expected) < 1e-6
    assert difference(loss, sum(expected.values())) < 1e-5


def test_stages_without_fresh_noise_are_fed_by_their_predecessors_and_pass_no_gradient_to_them():
    model, x = StackedDenoisingAutoencoder(num_stages=2, fresh_noise=False), images()
    _, terms = DenoisingObjective(model).loss(model, {"images": x}, noise())
    first = model(x + model.sigmas[2] * noise().normal(1, 8, 8), 2).sample
    assert difference(terms["stage_1"], (model(first, 1).sample - x).square().mean((1, 2, 3))) < 1e-6
    terms["stage_1"].mean().backward()
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
    assert difference(loss, -bound / 64) < 1e-5
    assert difference(terms["kl"], kl.flatten(1).sum(1) / 64) < 1e-5
    assert difference(terms["sigma_x"], torch.tensor(math.exp(-1.5))) < 1e-6


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
    assert difference(loss, (model(x_t, t).sample - target).square().mean((1, 2, 3))) < 1e-5


def test_latents_are_drawn_and_scaled_alike_for_our_vae_and_for_the_stock_one():
    ours = VariationalAutoencoder(scaling_factor=0.5)
    stock = AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, latent_channels=4, scaling_factor=0.5
    )
    for vae in (ours, stock):
        objective = DiffusionObjective(tiny_unet(4, 2), EduDDPMScheduler(), vae)
        posterior = vae.encode(images()).latent_dist
        expected = 0.5 * (posterior.mean + posterior.std * noise().normal(*posterior.mean.shape[1:]))
        assert difference(objective.clean({"images": images()}, noise()), expected) < 1e-6
        assert not any(parameter.requires_grad for parameter in vae.parameters())


@pytest.mark.parametrize("posterior", ["diagonal", "full"])
def test_cached_moments_give_the_latents_that_images_give(posterior):
    torch.manual_seed(0)
    vae = VariationalAutoencoder(posterior=posterior, scaling_factor=0.7)
    if posterior == "full":
        torch.nn.init.normal_(vae.to_lower.weight, std=0.05)
    objective = DiffusionObjective(tiny_unet(4, 2), EduDDPMScheduler(), vae)
    mean, scale = moments(vae, images())
    assert scale.shape == {"diagonal": mean.shape, "full": (4, 16, 16)}[posterior]
    from_images = objective.clean({"images": images()}, noise())
    from_moments = objective.clean({"latent_mean": mean, "latent_scale": scale}, noise())
    with torch.no_grad():
        expected = 0.7 * vae.encode(images()).latent_dist.reparameterise(noise().normal(4, 2, 2))
    assert difference(from_images, expected) < 1e-6
    assert difference(from_moments, expected) < 1e-6
    assert difference(expected, 0.7 * mean) > 0.1


class Known(torch.nn.Module):
    """A network whose x_0 is off by a known error, whatever it is to predict."""

    def __init__(self, scheduler, target, error):
        super().__init__()
        self.config = type("Config", (), {})
        self.scheduler, self.target, self.error = scheduler, target, error

    def forward(self, x_t, t):
        alpha_bar = exact_alpha_bar(self.scheduler)[t].reshape(-1, 1, 1, 1)
        signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        factor = {"sample": 1.0, "epsilon": -signal / sigma, "v_prediction": -1 / sigma}
        off = (factor[self.scheduler.config.prediction_type] * self.error).float()
        return type("Output", (), {"sample": self.target(t) + off})


class EveryTimestep(StepNoise):
    """Row t of the batch has timestep t, and no noise."""

    def __init__(self, total):
        super().__init__(0, 0, range(total), total)

    def stratified_uniform(self):
        return (torch.arange(self.total) + 0.5) / self.total

    def normal(self, *shape):
        return torch.zeros(self.total, *shape)


def exact_alpha_bar(scheduler):
    return (1 - scheduler.betas.double()).cumprod(0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("terminal", [{}, {"rescale_betas_zero_snr": True}], ids=["small_snr", "zero_snr"])
def test_weighted_by_min_snr_all_predictions_are_asked_for_the_same_at_every_timestep(prediction_type, terminal):
    scheduler = EduDDPMScheduler(prediction_type=prediction_type, beta_schedule="squaredcos_cap_v2", **terminal)
    error = torch.randn(1000, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = Known(scheduler, lambda t: 0, error)
    objective = DiffusionObjective(model, scheduler, snr_gamma=5.0)
    loss, _ = objective.loss(model, {"images": torch.zeros(1000, 1, 4, 4)}, EveryTimestep(1000))
    alpha_bar = exact_alpha_bar(scheduler)
    snr = alpha_bar / (1 - alpha_bar)
    expected = snr.clamp(max=5) * error.square().mean((1, 2, 3))
    assert snr.min() < 1e-8 and snr.max() > 1e4
    assert ((loss - expected).abs() <= 1e-5 * expected).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weighs_the_error_of_the_named_target(prediction_type):
    scheduler = EduDDPMScheduler(prediction_type=prediction_type)
    x, error, draws = images(40), 0.3 * images(40).flip(0).double(), noise(40)
    epsilon, t = draws.normal(1, 8, 8), (draws.stratified_uniform() * 1000).long()
    alpha_bar = exact_alpha_bar(scheduler)[t]
    signal, sigma = (root.reshape(-1, 1, 1, 1).float() for root in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    target = {"epsilon": epsilon, "sample": x, "v_prediction": signal * epsilon - sigma * x}[prediction_type]
    model = Known(scheduler, lambda t: target, error)
    loss, _ = DiffusionObjective(model, scheduler, snr_gamma=2.0).loss(model, {"images": x}, noise(40))
    expected = (alpha_bar / (1 - alpha_bar)).clamp(max=2) * error.square().mean((1, 2, 3))
    seen = alpha_bar > 0.01
    assert seen.sum() > 20
    assert ((loss - expected).abs() <= 1e-4 * expected)[seen].all()


def test_dropped_labels_become_the_null_class_at_the_rate_asked_for():
    model = tiny_unet(num_class_embeds=11)
    labels = {"labels": torch.arange(5000) % 10}
    kept = DiffusionObjective(model, EduDDPMScheduler(), dropout=0.3).condition(labels, noise(5000))["class_labels"]
    dropped = (kept == 10).float().mean().item()
    assert abs(dropped - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 5000)
    assert torch.equal(kept[kept != 10], labels["labels"][kept != 10])


def conditional_unet(**kwargs) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        norm_num_groups=4,
        cross_attention_dim=6,
        attention_head_dim=4,
        **kwargs,
    )


class ToyTextEncoder:
    """Two vectors that are functions of the caption; what it was asked for is kept."""

    def __init__(self):
        self.asked_for: list[list[str]] = []

    def __call__(self, captions: list[str]) -> torch.Tensor:
        self.asked_for.append(captions)
        return torch.stack([torch.sin(torch.arange(12.0) * (1 + sum(map(ord, caption)))) for caption in captions]).reshape(
            -1, 2, 6
        )


def test_captions_reach_the_network_and_some_are_dropped_at_the_rate_asked_for():
    encoder, model = ToyTextEncoder(), conditional_unet()
    captions = [f"number {n}" for n in range(5000)]
    objective = DiffusionObjective(model, EduDDPMScheduler(), text_encoder=encoder, dropout=0.3)
    hidden = objective.condition({"captions": captions}, noise(5000))["encoder_hidden_states"]
    assert hidden.shape == (5000, 2, 6)
    dropped = [asked == "" for asked in encoder.asked_for[0]]
    assert abs(sum(dropped) / 5000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 5000)
    assert [asked or caption for asked, caption in zip(encoder.asked_for[0], captions, strict=True)] == captions


def test_the_loss_of_captions_is_the_error_of_the_network_given_their_encodings():
    encoder, model, x, scheduler = ToyTextEncoder(), conditional_unet(), images(), EduDDPMScheduler(prediction_type="epsilon")
    captions = ["one", "two", "three", "four"]
    losses = {}
    for dropout in (0.0, 1.0):
        objective = DiffusionObjective(model, scheduler, text_encoder=encoder, dropout=dropout)
        losses[dropout], _ = objective.loss(model, {"images": x, "captions": captions}, noise())
        draws = noise()
        epsilon, t = draws.normal(1, 8, 8), (draws.stratified_uniform() * 1000).long()
        hidden = ToyTextEncoder()([""] * 4 if dropout else captions)
        estimate = model(scheduler.add_noise(x, epsilon, t), t, hidden).sample
        assert difference(losses[dropout], (estimate - epsilon).square().mean((1, 2, 3))) < 1e-5
    assert difference(losses[0.0], losses[1.0]) > 1e-5
    losses[0.0].mean().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "attn2.to_k" in name)


def test_a_row_loses_its_label_and_its_caption_together():
    encoder, model = ToyTextEncoder(), conditional_unet(num_class_embeds=11)
    objective = DiffusionObjective(model, EduDDPMScheduler(), text_encoder=encoder, dropout=0.5)
    batch = {"labels": torch.arange(200) % 10, "captions": [f"number {n}" for n in range(200)]}
    labels = objective.condition(batch, noise(200))["class_labels"]
    dropped = [caption == "" for caption in encoder.asked_for[0]]
    assert (labels == 10).tolist() == dropped
    assert 50 < sum(dropped) < 150


def objectives():
    torch.manual_seed(0)
    return {
        "stacked": DenoisingObjective(StackedDenoisingAutoencoder(num_stages=2)),
        "vae": VariationalObjective(VariationalAutoencoder()),
        "diffusion": DiffusionObjective(tiny_unet(), EduDDPMScheduler()),
        "min_snr": DiffusionObjective(tiny_unet(), EduDDPMScheduler(), snr_gamma=5.0),
        "hybrid": DiffusionObjective(
            tiny_unet(out_channels=2), EduDDPMScheduler(variance_type="learned_range"), bin_width=1 / 8
        ),
    }


@pytest.mark.parametrize("kind", objectives())
def test_there_is_a_loss_for_each_row_that_depends_on_no_other(kind):
    objective = objectives()[kind]
    loss, terms = objective.loss(objective.model, {"images": images()}, noise())
    assert loss.shape == (4,)
    assert all(term.shape in ((4,), ()) for term in terms.values())
    last, _ = objective.loss(objective.model, {"images": images()[2:]}, StepNoise(0, 0, range(2, 4), 4))
    assert difference(loss[2:], last) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", objectives())
def test_losses_are_float32_and_near_the_exact_ones_whatever_the_precision_of_the_network(kind, dtype):
    objective, seen = objectives()[kind], []
    handle = objective.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    exact, exact_terms = objective.loss(objective.model, {"images": images()}, noise())
    with torch.autocast("cpu", dtype):
        loss, terms = objective.loss(objective.model, {"images": images()}, noise())
    handle.remove()
    assert loss.dtype == torch.float32 and all(term.dtype == torch.float32 for term in terms.values())
    assert 0 < ((loss - exact) / exact.abs().clamp(min=0.1)).abs().max() < 0.05
    assert terms.keys() == exact_terms.keys()
    (x_t, *_), (mixed_x_t, *_) = seen[0], seen[len(seen) // 2]
    assert mixed_x_t.dtype == torch.float32
    assert torch.equal(mixed_x_t, x_t)


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_the_hybrid_loss_is_the_simple_one_and_a_thousandth_of_the_bound(kind):
    scheduler = EduDDPMScheduler(variance_type=kind)
    objective = DiffusionObjective(tiny_unet(out_channels=2), scheduler, bin_width=1 / 8)
    loss, terms = objective.loss(objective.model, {"images": images()}, noise())
    assert difference(loss, terms["simple"] + 0.001 * terms["bound"]) < 1e-6
    # The bound leaves the first half of the channels alone, and teaches the second, which the simple loss does not know.
    last = objective.model.conv_out.weight
    simple, bound = (torch.autograd.grad(terms[name].sum(), last, retain_graph=True)[0] for name in ("simple", "bound"))
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
        loss.mean().backward()
        optimizer.step()
    t = torch.arange(1, 20)
    x = torch.zeros(19, 1, 4, 4)
    learned = scheduler.reverse(model(x, t).sample, t, x).variance[:, 0, 0, 0].detach()
    best = scheduler.betas[1:]
    assert (learned / best - 1).abs().max() < 0.1
