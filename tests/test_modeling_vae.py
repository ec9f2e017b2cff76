"""The VAE: its posterior against torch.distributions, its interface against AutoencoderKL."""

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from diffusers_edu import VariationalAutoencoder
from diffusers_edu.models.modeling_vae import GaussianPosterior

SHAPE = (3, 2, 2, 2)  # B, C, H, W of the codes
D = 8


def gap(a, b):
    return (a - b).abs().max().item()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def posterior(kind):
    torch.manual_seed(0)
    lower = torch.randn(SHAPE[0], D, D).tril(-1) if kind == "full" else None
    return GaussianPosterior(torch.randn(SHAPE), 0.5 * torch.randn(SHAPE), lower)


def reference(kind):
    """The same distribution by torch.distributions, over flat codes, and the prior."""
    q = posterior(kind)
    if kind == "full":
        return MultivariateNormal(q.mean.flatten(1), scale_tril=q.scale_tril), MultivariateNormal(torch.zeros(D), torch.eye(D))
    return Normal(q.mean.flatten(1), q.log_std.exp().flatten(1)), Normal(torch.zeros(D), torch.ones(D))


def tiny(channels=1, size=8, kind="diagonal", **kwargs):
    torch.manual_seed(0)
    widths = {"block_out_channels": (8, 8, 8), "latent_channels": 2, "norm_num_groups": 4}
    return VariationalAutoencoder(channels, channels, size, posterior=kind, **widths, **kwargs).eval()


def with_correlations(vae):
    """`to_lower` starts at zero; this gives it weights, as training does."""
    if vae.to_lower is not None:
        torch.nn.init.normal_(vae.to_lower.weight, std=0.05)
    return vae


both = pytest.mark.parametrize("kind", ["diagonal", "full"])


@both
def test_kl_is_that_of_torch_distributions(kind):
    divergence = kl_divergence(*reference(kind))
    expected = divergence if kind == "full" else divergence.sum(1)
    assert posterior(kind).kl().shape == (3,)
    assert gap(posterior(kind).kl(), expected) <= 1e-4


@both
def test_log_prob_is_that_of_torch_distributions(kind):
    z = torch.randn(SHAPE, generator=seeded(1))
    log_prob = reference(kind)[0].log_prob(z.flatten(1))
    assert gap(posterior(kind).log_prob(z), log_prob if kind == "full" else log_prob.sum(1)) <= 1e-3


def test_a_diagonal_posterior_is_diffusers_own():
    q = posterior("diagonal")
    stock = DiagonalGaussianDistribution(torch.cat([q.mean, 2 * q.log_std], dim=1))
    for mine, theirs in ((q.kl(), stock.kl()), (q.std, stock.std), (q.var, stock.var), (q.mode(), stock.mode())):
        assert gap(mine, theirs) <= 1e-5
    assert gap(q.sample(seeded()), stock.sample(seeded())) <= 1e-6


def test_kl_of_the_prior_is_zero_and_of_extreme_scales_finite():
    prior = GaussianPosterior(torch.zeros(SHAPE), torch.zeros(SHAPE), torch.zeros(3, D, D))
    assert gap(prior.kl(), torch.zeros(3)) == 0
    for log_std in (1e4, -1e4):
        assert GaussianPosterior(torch.zeros(SHAPE), torch.full(SHAPE, log_std)).kl().isfinite().all()


@both
def test_reparameterisation_maps_the_unit_vectors_to_the_columns_of_the_cholesky_factor(kind):
    q = posterior(kind)
    columns = [(q.reparameterise(e.expand(3, D).reshape(SHAPE)) - q.mean).flatten(1) for e in torch.eye(D)]
    L = torch.stack(columns, dim=2)
    assert gap(L, q.scale_tril) <= 1e-6
    assert gap((L @ L.mT).diagonal(dim1=1, dim2=2).reshape(SHAPE), q.var) <= 1e-4
    if kind == "full":
        assert gap(L @ L.mT, reference(kind)[0].covariance_matrix) <= 1e-4
    assert torch.equal(q.reparameterise(torch.zeros(SHAPE)), q.mean)


@both
def test_samples_are_reproducible_and_a_list_has_a_generator_for_each(kind):
    q = posterior(kind)
    assert torch.equal(q.sample(seeded()), q.sample(seeded()))
    assert not torch.equal(q.sample(seeded()), q.sample(seeded(1)))
    assert torch.equal(q.mode(), q.mean)
    rows = q.sample([seeded(i) for i in range(3)])
    for i in range(3):
        alone = GaussianPosterior(*(v if v is None else v[i : i + 1] for v in (q.mean, q.log_std, q.lower)))
        assert gap(rows[i : i + 1], alone.sample(seeded(i))) <= 1e-6


def test_a_full_covariance_starts_as_the_diagonal_one_and_learns_a_lower_triangle():
    x = torch.randn(2, 1, 8, 8)
    diagonal, full = (tiny(kind=kind).encode(x).latent_dist for kind in ("diagonal", "full"))
    assert diagonal.lower is None
    assert full.lower.shape == (2, 8, 8)
    assert gap(full.lower, torch.zeros(2, 8, 8)) == 0
    assert gap(full.mean, diagonal.mean) == gap(full.scale_tril, diagonal.scale_tril) == 0
    assert gap(full.kl(), diagonal.kl()) <= 1e-6

    lower = with_correlations(tiny(kind="full")).encode(x).latent_dist.lower
    assert gap(lower, lower.tril(-1)) == 0
    assert (lower.count_nonzero(dim=(1, 2)) == D * (D - 1) // 2).all()


@both
def test_the_gradient_of_a_draw_and_of_the_kl_reaches_mean_and_cholesky_factor(kind):
    for loss in (lambda output: output.sample.square().sum(), lambda output: output.latent_dist.kl().sum()):
        vae = with_correlations(tiny(kind=kind))
        x = torch.randn(2, 1, 8, 8, generator=seeded())
        loss(vae(x, noise=torch.randn(2, *vae.latent_shape, generator=seeded(1)))).backward()
        # Every output of the heads learns: each channel of mean and log_std, each entry of the lower triangle.
        for head in (vae.to_moments, vae.to_lower)[: 1 if kind == "diagonal" else 2]:
            assert head.weight.grad.flatten(1).abs().amax(1).min() > 0


@both
@pytest.mark.parametrize("channels, size", [(1, 8), (3, 16), (1, 28)])
def test_shapes_of_encode_decode_and_forward(channels, size, kind):
    vae, x = tiny(channels, size, kind), torch.randn(2, channels, size, size)
    codes = (2, 2, size // 4, size // 4)
    assert vae.encode(x).latent_dist.mean.shape == codes == (2, *vae.latent_shape)
    assert vae.encode(x).latent_dist.sample().shape == codes
    assert vae.decode(torch.randn(codes)).sample.shape == x.shape
    assert vae(x).sample.shape == x.shape


def test_it_is_used_like_autoencoder_kl():
    stock = AutoencoderKL(
        in_channels=1, out_channels=1, sample_size=8, latent_channels=2, norm_num_groups=4, block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
    ).eval()  # fmt: skip
    x = torch.randn(2, 1, 8, 8)
    for vae in (stock, tiny(), with_correlations(tiny(kind="full"))):
        q = vae.encode(x).latent_dist
        z = q.sample(generator=seeded())
        assert z.shape == q.mode().shape == q.mean.shape == q.std.shape == q.var.shape == (2, 2, 2, 2)
        assert gap(q.std.square(), q.var) <= 1e-6
        assert q.kl().shape == (2,)
        assert torch.equal(vae.encode(x, return_dict=False)[0].mean, q.mean)
        assert torch.equal(vae.decode(z, return_dict=False)[0], vae.decode(z, generator=None).sample)
        assert gap(vae(x).sample, vae.decode(q.mode()).sample) <= 1e-6
        drawn = vae(x, sample_posterior=True, generator=seeded()).sample
        assert gap(drawn, vae.decode(z).sample) <= 1e-6
        assert torch.equal(vae(x, return_dict=False)[0], vae(x).sample)
        assert vae.config.scaling_factor > 0
        assert vae.config.latent_channels == 2


@pytest.mark.parametrize("size", [0, 2, 6, 30])
def test_a_size_that_cannot_be_halved_is_refused_with_those_that_can(size):
    with pytest.raises(ValueError, match=f"{size}; this model takes multiples of 4"):
        tiny(size=size)


def test_an_unknown_posterior_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'square'.*'diagonal' or 'full'"):
        tiny(kind="square")


@both
def test_save_and_load_keeps_outputs_and_configuration(kind, tmp_path):
    vae, x = with_correlations(tiny(kind=kind, scaling_factor=0.7)), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        vae.log_sigma_x.fill_(-0.3)
    vae.save_pretrained(tmp_path)
    loaded = VariationalAutoencoder.from_pretrained(tmp_path)
    assert loaded.config.scaling_factor == 0.7
    assert torch.equal(loaded.log_sigma_x, vae.log_sigma_x)
    assert torch.equal(loaded.encode(x).latent_dist.scale_tril, vae.encode(x).latent_dist.scale_tril)
    assert torch.equal(loaded(x, True, generator=seeded()).sample, vae(x, True, generator=seeded()).sample)


def test_checkpointed_gradients_are_the_same():
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        vae = VariationalAutoencoder(block_out_channels=(8, 8), norm_num_groups=4).train()
        if checkpointed:
            vae.enable_gradient_checkpointing()
        vae(x).sample.square().sum().backward()
        gradients.append([p.grad for p in vae.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    for one, other in zip(*gradients, strict=True):
        assert (one - other).abs().max() <= 1e-5
