"""A variational autoencoder: the code is random, and known.

    encoder  q(z | x) = N(mu(x), Sigma(x)),   decoder  p(x | z) = N(decode(z), sigma_x^2 I),   prior  p(z) = N(0, I)
    log p(x) >= E_q[log p(x | z)] - KL(q(z | x) || p(z))                          Kingma and Welling 2014, eq. (3)

(https://arxiv.org/abs/1312.6114). The covariance Sigma is diagonal, or full by its Cholesky factor.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from diffusers.utils.torch_utils import randn_tensor
from torch import nn


class GaussianPosterior:
    """q(z | x) = N(mu, L L^T) for each image of a batch, L lower triangular with a positive diagonal.

    It is used as diffusers' `DiagonalGaussianDistribution` is (`sample`, `mode`, `mean`, `std`, `var`, `kl`), and its covariance may
    be full.

    Args:
        mean: mu, shape (B, C, H, W).
        log_std: the logarithm of the diagonal of L, the shape of the mean; clamped to [-15, 10].
        lower: the strictly lower triangle of L, shape (B, d, d) with d = C H W; None where the covariance is diagonal.
    """

    def __init__(self, mean: torch.Tensor, log_std: torch.Tensor, lower: torch.Tensor | None = None):
        self.mean = mean
        self.log_std = log_std.clamp(-15.0, 10.0)
        self.lower = lower

    @property
    def scale_tril(self) -> torch.Tensor:
        """L, shape (B, d, d)."""
        diagonal = torch.diag_embed(self.log_std.exp().flatten(1))
        return diagonal if self.lower is None else diagonal + self.lower

    @property
    def var(self) -> torch.Tensor:
        """The marginal variances, the diagonal of L L^T; the shape of the mean."""
        var = (2 * self.log_std).exp()
        return var if self.lower is None else var + self.lower.square().sum(-1).reshape(var.shape)

    @property
    def std(self) -> torch.Tensor:
        """The marginal standard deviations, the shape of the mean."""
        return self.var.sqrt()

    def reparameterise(self, noise: torch.Tensor) -> torch.Tensor:
        """z = mu + L epsilon: random, with a gradient to mu and L. Kingma and Welling 2014, section 2.4.

        Args:
            noise: epsilon ~ N(0, I), the shape of the mean.
        """
        z = self.mean + self.log_std.exp() * noise
        if self.lower is not None:
            z = z + torch.einsum("bij,bj->bi", self.lower, noise.flatten(1)).reshape(z.shape)
        return z

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> torch.Tensor:
        """Draw z ~ q(z | x), the shape of the mean; a list of generators has one for each image."""
        noise = randn_tensor(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.reparameterise(noise)

    def mode(self) -> torch.Tensor:
        """mu."""
        return self.mean

    def kl(self) -> torch.Tensor:
        """KL(q(z | x) || N(0, I)) = 1/2 (|mu|^2 + |L|_F^2 - d) - sum_i log L_ii, in nats; float32 of shape (B,).

        Kingma and Welling 2014, appendix B, for any L.
        """
        lower = None if self.lower is None else self.lower.float()
        exact = GaussianPosterior(self.mean.float(), self.log_std.float(), lower)  # before any product, not after
        return 0.5 * (exact.mean.square() + exact.var - 1).flatten(1).sum(1) - exact.log_std.flatten(1).sum(1)

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """log q(z | x) in nats, for z of the mean's shape; float32 of shape (B,)."""
        residual = (z - self.mean).float().flatten(1)
        if self.lower is None:
            epsilon = residual * (-self.log_std.float().flatten(1)).exp()
        else:
            epsilon = torch.linalg.solve_triangular(self.scale_tril.float(), residual[..., None], upper=False)[..., 0]
        log_det = self.log_std.float().flatten(1).sum(1)
        return -0.5 * epsilon.square().sum(1) - log_det - 0.5 * epsilon.shape[1] * math.log(2 * math.pi)


@dataclass
class VAEDecoderOutput(BaseOutput):
    """What `decode` returns: `sample`, the mean of p(x | z), shape (B, out_channels, H, W), nominally in [-1, 1]."""

    sample: torch.Tensor


@dataclass
class VariationalAutoencoderOutput(BaseOutput):
    """What `forward` returns: `sample`, the decoded image, and `latent_dist`, the posterior that its code came from."""

    sample: torch.Tensor
    latent_dist: GaussianPosterior | None = None


class ResidualBlock(nn.Module):
    """x + f(x), with two normalised 3x3 convolutions; (B, C, H, W) to the same."""

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., torch.Tensor]  # both are set by `enable_gradient_checkpointing`

    def __init__(self, channels: int, norm_num_groups: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(norm_num_groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(norm_num_groups, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return x + self._gradient_checkpointing_func(self.layers, x)
        return x + self.layers(x)


class VariationalAutoencoder(ModelMixin, ConfigMixin):
    """A convolutional VAE with `AutoencoderKL`'s interface: `encode(x).latent_dist`, `decode(z).sample`.

    Args:
        in_channels, out_channels (`int`, default to 1): of the image, 1 grey or 3 RGB.
        sample_size (`int`, defaults to 8): height and width of the image, a multiple of 2^(len(block_out_channels) - 1).
        latent_channels (`int`, defaults to 4): channels of the code z.
        block_out_channels (`tuple[int, ...]`, defaults to (32, 64, 64)): channels of each resolution, halved between.
        layers_per_block (`int`, defaults to 1): residual blocks of each resolution.
        norm_num_groups (`int`, defaults to 8): groups of the normalisation.
        posterior (`str`, defaults to `"diagonal"`): `diagonal`, or `full`: q's covariance has a learned Cholesky factor of
            d (d + 1) / 2 entries, d the size of the code, and the encoder and decoder work at one image size.
        scaling_factor (`float`, defaults to 1.0): 1 / the standard deviation of the codes z over the training data, so that
            z * scaling_factor has variance 1. Training measures it and writes it here; 1.0 means not measured.

    Raises:
        ValueError: an unknown posterior, or a size that cannot be halved so often (the message says which can).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualBlock"]
    _group_offload_block_modules = ["to_moments", "to_lower"]  # `encode` and `decode` pass by `forward`, which would load them

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        sample_size: int = 8,
        latent_channels: int = 4,
        block_out_channels: tuple[int, ...] = (32, 64, 64),
        layers_per_block: int = 1,
        norm_num_groups: int = 8,
        posterior: Literal["diagonal", "full"] = "diagonal",
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        if posterior not in ("diagonal", "full"):
            raise ValueError(f"posterior is {posterior!r}; it must be 'diagonal' or 'full'")
        self.downsampling = 2 ** (len(block_out_channels) - 1)
        if sample_size % self.downsampling or sample_size < self.downsampling:
            raise ValueError(f"sample_size is {sample_size}; this model takes multiples of {self.downsampling}")
        self.latent_shape = (latent_channels, *[sample_size // self.downsampling] * 2)
        top = block_out_channels[-1]

        encoder: list[nn.Module] = [nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)]
        for level, channels in enumerate(block_out_channels):
            encoder += [ResidualBlock(channels, norm_num_groups) for _ in range(layers_per_block)]
            if level + 1 < len(block_out_channels):
                encoder += [nn.Conv2d(channels, block_out_channels[level + 1], 3, stride=2, padding=1)]
        self.encoder = nn.Sequential(*encoder, nn.GroupNorm(norm_num_groups, top), nn.SiLU())

        self.to_moments = nn.Conv2d(top, 2 * latent_channels, 1)
        self.to_lower: nn.Module | None = None
        if posterior == "full":
            d = math.prod(self.latent_shape)
            # Zero at the start: the full covariance begins as the diagonal one.
            self.to_lower = nn.Linear(top * d // latent_channels, d * (d - 1) // 2)
            nn.init.zeros_(self.to_lower.weight)
            nn.init.zeros_(self.to_lower.bias)

        decoder: list[nn.Module] = [nn.Conv2d(latent_channels, top, 3, padding=1)]
        for level, channels in reversed(list(enumerate(block_out_channels))):
            decoder += [ResidualBlock(channels, norm_num_groups) for _ in range(layers_per_block)]
            if level > 0:
                decoder += [nn.Upsample(scale_factor=2), nn.Conv2d(channels, block_out_channels[level - 1], 3, padding=1)]
        first = block_out_channels[0]
        self.decoder = nn.Sequential(
            *decoder, nn.GroupNorm(norm_num_groups, first), nn.SiLU(), nn.Conv2d(first, out_channels, 3, padding=1)
        )
        # sigma_x of p(x | z), learned with the rest: Rybkin et al. 2021 (https://arxiv.org/abs/2006.13202). It starts near where
        # it ends on images in [-1, 1]: a wide start weighs the KL term so much that the code is given up.
        self.log_sigma_x = nn.Parameter(torch.full((1,), -1.5))

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[GaussianPosterior]:
        """q(z | x) of images x in [-1, 1], shape (B, in_channels, H, W), as `.latent_dist`, a [`GaussianPosterior`]."""
        features = self.encoder(x)
        mean, log_std = self.to_moments(features).chunk(2, dim=1)
        lower = None
        if self.to_lower is not None:
            d = mean[0].numel()
            row, column = torch.tril_indices(d, d, offset=-1, device=x.device)
            lower = mean.new_zeros(len(x), d, d)
            lower[:, row, column] = self.to_lower(features.flatten(1))
        posterior = GaussianPosterior(mean, log_std, lower)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> VAEDecoderOutput | tuple[torch.Tensor]:
        """The mean of p(x | z) for codes z of shape (B, latent_channels, h, w); `generator` is not used, as nothing is drawn."""
        image = self.decoder(z)
        return VAEDecoderOutput(sample=image) if return_dict else (image,)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        noise: torch.Tensor | None = None,
    ) -> VariationalAutoencoderOutput | tuple[torch.Tensor]:
        """Encode and decode images in [-1, 1].

        Args:
            sample: x, shape (B, in_channels, H, W).
            sample_posterior: decode a draw z ~ q(z | x) rather than its mean.
            return_dict: whether to return a [`VariationalAutoencoderOutput`] or the tuple (image,).
            generator: the source of the draw.
            noise: the epsilon of the draw itself, the shape of z, in place of a generator.
        """
        (posterior,) = self.encode(sample, return_dict=False)
        if noise is not None:
            z = posterior.reparameterise(noise)
        else:
            z = posterior.sample(generator) if sample_posterior else posterior.mode()
        (image,) = self.decode(z, return_dict=False)
        return VariationalAutoencoderOutput(image, posterior) if return_dict else (image,)
