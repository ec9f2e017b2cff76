"""Latents of a frozen VAE, computed once: the moments of q(z | x) of every image, kept in memory and on disk.

The moments are kept, not draws, so that each visit of an image draws its code anew.
"""

import hashlib
import json
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from .cache import cached
from .data import Augmentation, ImageData
from .launch import one_first


@torch.no_grad()
def moments(vae: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and the scale of q(z | x), float32.

    The scale is the standard deviation, of the mean's shape, or for a full covariance L with L L^T = Sigma, shape (B, d, d).

    Args:
        vae: with `AutoencoderKL`'s interface.
        images: float (B, C, H, W) in [-1, 1].
    """
    posterior = vae.encode(images.to(vae.dtype)).latent_dist
    full = getattr(posterior, "lower", None) is not None
    return posterior.mean.float(), (posterior.scale_tril if full else posterior.std).float()


def draw(mean: torch.Tensor, scale: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """z = mean + scale epsilon, of the mean's shape; see `moments`."""
    if scale.shape == mean.shape:
        return mean + scale * noise
    return mean + torch.einsum("bij,bj->bi", scale, noise.flatten(1)).reshape(mean.shape)


class LatentData:
    """The moments of the latents of images, in batches: `latent_mean`, `latent_scale`, and `labels` and `captions` where there are any.

    Args:
        data: the images.
        upright: the moments of the images.
        flipped: those of the images flipped from left to right, or None.
    """

    def __init__(self, data: ImageData, upright: dict[str, torch.Tensor], flipped: dict[str, torch.Tensor] | None = None):
        self.data, self.upright, self.flipped = data, upright, flipped
        self.skipped = data.skipped

    def __len__(self) -> int:
        return len(self.data)

    def head(self, count: int) -> ImageData:
        """The first images."""
        return self.data.head(count)

    def batch(self, indices: list[int], augmentation: Augmentation | None = None) -> dict[str, Any]:
        """The moments of some images, each of the flipped image where its augmentation says so."""
        found = {name: tensor[indices] for name, tensor in self.upright.items()}
        if augmentation is not None and self.flipped is not None:
            flip = torch.tensor(augmentation.flip)
            for name, tensor in self.flipped.items():
                found[name] = torch.where(flip.reshape(-1, *[1] * (tensor.ndim - 1)), tensor[indices], found[name])
        return {**found, **self.data.conditions(indices)}


def fingerprint(vae: Any) -> str:
    """A digest of a model's weights and configuration."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def keeps_latents(objective: Any, data: Any) -> bool:
    """Whether latents are computed once: where the images are in memory, and stay as they are but for flips."""
    return objective.vae is not None and isinstance(data, ImageData) and data.strips is None


def encode_data(vae: Any, data: ImageData, flip: bool, batch_size: int, accelerator: Accelerator) -> LatentData:
    """The latents of all images, from the cache if they have been computed before; each process of a machine may ask.

    The cache is keyed by the VAE's weights and configuration and by the images.
    """
    key = (fingerprint(vae), data.fingerprint())

    def encode(flipped: bool) -> dict[str, torch.Tensor]:
        parts = []
        starts = range(0, len(data), batch_size)
        for start in tqdm(starts, desc="encoding images", leave=False, disable=len(starts) < 20):
            images = data.batch(list(range(start, min(start + batch_size, len(data)))))["images"].to(accelerator.device)
            parts.append([part.cpu() for part in moments(vae, images.flip(-1) if flipped else images)])
        mean, scale = (torch.cat(part).contiguous() for part in zip(*parts, strict=True))
        return {"latent_mean": mean, "latent_scale": scale}

    upright = one_first(accelerator, lambda: cached("latents", *key, "upright", make=lambda: encode(False)))
    mirrored = one_first(accelerator, lambda: cached("latents", *key, "flipped", make=lambda: encode(True))) if flip else None
    return LatentData(data, upright, mirrored)
