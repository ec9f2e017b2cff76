"""A stack of denoising autoencoders, one for each level of additive noise.

    corruption   x_k = x_0 + sigma_k epsilon,    sigma_0 = 0 < sigma_1 < ... < sigma_K       (x_K is noise to the eye)
    stage k      D_k(x_k) = the clean image, as far as it can be told from x_k

Trained by squared error on x_k, stage k learns E[x_0 | x_k] (Vincent et al. 2008, https://doi.org/10.1145/1390156.1390294). Without
fresh noise only the first stage, K, sees an x_k; each other one is trained on what the stage before it returned. With one
stage it is the classical denoising autoencoder, asked to remove all the noise at once.
"""

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn


@dataclass
class StackedDenoisingAutoencoderOutput(BaseOutput):
    """`sample`: the clean image as the stage sees it, shape (B, in_channels, H, W), nominally in [-1, 1]."""

    sample: torch.Tensor


class DenoisingStage(nn.Module):
    """One encoder-decoder: strided convolutions to a code of `latent_dim` numbers, and back; (B, C, H, W) to the same."""

    def __init__(self, in_channels: int, sample_size: int, block_out_channels: tuple[int, ...], latent_dim: int):
        super().__init__()
        widths = (in_channels, *block_out_channels)
        size = sample_size // 2 ** len(block_out_channels)
        flat = widths[-1] * size * size

        encoder: list[nn.Module] = []
        for narrow, wide in zip(widths[:-1], widths[1:], strict=True):
            encoder += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.SiLU()]
        self.encoder = nn.Sequential(*encoder, nn.Flatten(), nn.Linear(flat, latent_dim), nn.SiLU())

        decoder: list[nn.Module] = [nn.Linear(latent_dim, flat), nn.Unflatten(1, (widths[-1], size, size))]
        for wide, narrow in zip(widths[:0:-1], widths[-2::-1], strict=True):
            decoder += [nn.SiLU(), nn.ConvTranspose2d(wide, narrow, 4, stride=2, padding=1)]
        self.decoder = nn.Sequential(*decoder)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x))


class StackedDenoisingAutoencoder(ModelMixin, ConfigMixin):
    """K encoder-decoders, `stages[k - 1]` for the noise level sigma_k, and the rule that leads from one to the next.

    Args:
        in_channels (`int`, defaults to 1): of the image, 1 grey or 3 RGB.
        sample_size (`int`, defaults to 8): height and width, a multiple of 2^len(block_out_channels).
        num_stages (`int`, defaults to 10): K; 1 is the one-shot denoising autoencoder.
        sigma_min, sigma_max (`float`, default to 0.2 and 10.0): sigma_1 and sigma_K, for images in [-1, 1]; the levels between
            them are spaced evenly in log sigma. One stage works at sigma_max.
        fresh_noise (`bool`, defaults to `True`): whether new noise enters before every stage, in training and in
            sampling. Without it a stage is fed what the stage before it returned.
        block_out_channels (`tuple[int, ...]`, defaults to (32, 64)): widths of a stage's convolutions, each of stride 2.
        latent_dim (`int`, defaults to 128): the size of a stage's code.

    Raises:
        ValueError: a size that cannot be halved so often (the message says which can), or levels that do not increase.
    """

    _no_split_modules = ["DenoisingStage"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        sample_size: int = 8,
        num_stages: int = 10,
        sigma_min: float = 0.2,
        sigma_max: float = 10.0,
        fresh_noise: bool = True,
        block_out_channels: tuple[int, ...] = (32, 64),
        latent_dim: int = 128,
    ):
        super().__init__()
        divisor = 2 ** len(block_out_channels)
        if sample_size % divisor or sample_size < divisor:
            raise ValueError(f"sample_size is {sample_size}; this model takes multiples of {divisor}")
        if num_stages < 1 or not 0 < sigma_min < sigma_max:
            raise ValueError(f"{num_stages} stages from {sigma_min} to {sigma_max}: give one or more, and 0 < min < max")
        levels = torch.logspace(0, 1, num_stages, base=sigma_max / sigma_min, dtype=torch.float64) * sigma_min
        self.sigmas = [0.0, *(levels.tolist() if num_stages > 1 else [sigma_max])]
        self.stages = nn.ModuleList(
            DenoisingStage(in_channels, sample_size, block_out_channels, latent_dim) for _ in range(num_stages)
        )

    def corrupt(self, clean: torch.Tensor, noise: torch.Tensor, level: int) -> torch.Tensor:
        """x_k = x_0 + sigma_k epsilon, for k = `level` in 0 .. K; all shapes (B, C, H, W)."""
        return clean + self.sigmas[level] * noise

    def forward(
        self, sample: torch.Tensor, level: int, return_dict: bool = True
    ) -> StackedDenoisingAutoencoderOutput | tuple[torch.Tensor]:
        """Stage k: an estimate of the clean image from x_k.

        Args:
            sample: x_k, shape (B, in_channels, H, W), of clean images in [-1, 1].
            level: k, from 1 (the least noise) to K.
            return_dict: whether to return a [`StackedDenoisingAutoencoderOutput`] or a tuple.

        Raises:
            ValueError: a level that no stage has.
        """
        if not 1 <= level <= len(self.stages):
            raise ValueError(f"level is {level}; this stack has stages for 1 to {len(self.stages)}")
        # Inputs of unit scale at every level: Karras et al. 2022 (https://arxiv.org/abs/2206.00364), table 1, c_in.
        clean = self.stages[level - 1](sample / (1 + self.sigmas[level] ** 2) ** 0.5)
        return StackedDenoisingAutoencoderOutput(sample=clean) if return_dict else (clean,)
