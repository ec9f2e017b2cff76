"""What each model of the ladder learns: (batch, noise) -> loss and named terms.

An objective holds the models of one pipeline. `model` is the one that learns; `loss` gets it again as an argument, since
Accelerate may have wrapped it. A batch holds `images`, float32 (B, C, H, W) in [-1, 1], or the moments of their latents (see
[`latents.LatentData`]), and where the data has them `labels`, int64 (B,), and `captions`, B strings. `noise` is a [`StepNoise`] for
the rows of the batch. Losses are float32, whatever the precision of the network.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .latents import draw, moments
from .randomness import StepNoise

VARIANCE_WEIGHT = 0.001  # of the bound in the hybrid loss

Batch = dict[str, Any]
Terms = dict[str, torch.Tensor]


def squared_error(estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean over each image: float32 of shape (B,)."""
    return F.mse_loss(estimate.float(), target, reduction="none").flatten(1).mean(1)


class Objective:
    """The interface that the training loop knows. `to` and `finish` do nothing unless an objective needs them."""

    model: Any
    vae: Any = None  # frozen, where it is latents that are learned

    def to(self, device: torch.device) -> None:
        """Move what does not learn to the device."""

    def loss(self, model: nn.Module, batch: Batch, noise: StepNoise) -> tuple[torch.Tensor, Terms]:
        """The loss of each row, shape (B,), whose mean is to be descended, and parts of it to log: of each row, or scalars."""
        raise NotImplementedError

    def finish(self, batches: Any) -> None:
        """Measure on the training data what the saved pipeline needs, once the model has its final weights."""


class DenoisingObjective(Objective):
    """Squared error of every stage's estimate of the clean image, summed over the stages. Vincent et al. 2008.

    With fresh noise, stage k sees x_k = x_0 + sigma_k epsilon_k; without, only the first has noise to remove, and each
    other one sees what the stage before it returned.
    """

    def __init__(self, model: Any):
        self.model = model
        self.num_stages = model.config.num_stages
        self.fresh_noise = model.config.fresh_noise

    def loss(self, model: nn.Module, batch: Batch, noise: StepNoise) -> tuple[torch.Tensor, Terms]:
        clean = batch["images"]
        corrupted, losses = clean, {}
        for level in range(self.num_stages, 0, -1):
            if self.fresh_noise or level == self.num_stages:
                corrupted = self.model.corrupt(clean, noise.normal(*clean.shape[1:]), level)
            estimate = model(corrupted, level).sample
            losses[f"stage_{level}"] = squared_error(estimate, clean)
            corrupted = estimate.detach()
        return torch.stack(list(losses.values())).sum(0), losses


class VariationalObjective(Objective):
    """The negative evidence lower bound, in nats per dimension of the image. Kingma and Welling 2014, eq. (3):

        -ELBO = E_q[-log N(x; decode(z), sigma_x^2 I)] + kl_weight KL(q(z | x) || N(0, I))

    sigma_x is learned with the rest, which sets the balance of the two terms (Rybkin et al. 2021,
    https://arxiv.org/abs/2006.13202).

    Args:
        model: a `VariationalAutoencoder`.
        kl_weight: 1 for the bound; another weight is a beta-VAE (Higgins et al. 2017).
    """

    def __init__(self, model: Any, kl_weight: float = 1.0):
        self.model = model
        self.kl_weight = kl_weight

    def loss(self, model: nn.Module, batch: Batch, noise: StepNoise) -> tuple[torch.Tensor, Terms]:
        x = batch["images"]
        output = model(x, noise=noise.normal(*self.model.latent_shape))
        log_sigma_x = self.model.log_sigma_x.float()
        reconstruction = F.gaussian_nll_loss(
            output.sample.float(), x, (2 * log_sigma_x).exp().expand_as(x), full=True, reduction="none"
        )
        reconstruction = reconstruction.flatten(1).mean(1)
        kl = output.latent_dist.kl() / x[0].numel()
        terms = {"reconstruction": reconstruction, "kl": kl, "sigma_x": log_sigma_x.exp().squeeze()}
        return reconstruction + self.kl_weight * kl, terms

    @torch.no_grad()
    def finish(self, batches: Any) -> None:
        """Write scaling_factor = 1 / std of z ~ q(z | x) over the training data; Rombach et al. 2022, appendix G."""
        count, total, square = 0, 0.0, 0.0
        for batch in batches:
            posterior = self.model.encode(batch["images"]).latent_dist
            mean, var = posterior.mean.cpu().double(), posterior.var.cpu().double()  # not every device has float64
            count += mean.numel()
            total += mean.sum().item()
            square += (mean.square() + var).sum().item()
        std = (square / count - (total / count) ** 2) ** 0.5
        self.model.register_to_config(scaling_factor=1 / std)


class DiffusionObjective(Objective):
    """The simplified bound: squared error of the prediction at a random timestep; for epsilon, Ho et al. 2020, eq. (14).

    The target is the scheduler's `prediction_type`. With a `vae`, x_0 is a draw of its latents, scaled to unit variance
    (Rombach et al. 2022). Of class labels and captions some are replaced by what stands for none, so that one network learns the
    conditional and the unconditional model (Ho and Salimans 2022). A model of twice the channels learns the variance too.

    Args:
        model: a `UNet2DModel`, or any model that is called alike and returns `.sample`.
        scheduler: with `add_noise`, `get_velocity` and `config.prediction_type`; for a learned variance or `snr_gamma` an
            `EduDDPMScheduler`.
        vae: a frozen autoencoder, or None for pixels.
        text_encoder: strings -> `encoder_hidden_states` of the model, float (B, length, features), or None for no captions. An empty
            string stands for no caption.
        dropout: the share of labels and captions replaced, in [0, 1].
        snr_gamma: see `weight`; None for equal weights.
        bin_width: the distance of two grey levels of the images in [-1, 1], for a learned variance; None for latents.
    """

    def __init__(
        self,
        model: Any,
        scheduler: Any,
        vae: Any = None,
        text_encoder: Callable[[list[str]], torch.Tensor] | None = None,
        dropout: float = 0.1,
        snr_gamma: float | None = None,
        bin_width: float | None = None,
    ):
        self.model, self.scheduler, self.text_encoder = model, scheduler, text_encoder
        self.dropout, self.snr_gamma, self.bin_width = dropout, snr_gamma, bin_width
        self.vae = None if vae is None else vae.requires_grad_(False).eval()
        self.chain: Any = None
        if getattr(model.config, "out_channels", None) == 2 * getattr(model.config, "in_channels", 0):
            # The bound is that of all T timesteps, whatever grid the pipeline's scheduler samples with.
            self.chain = scheduler.from_config(scheduler.config, eta=1.0)

    def to(self, device: torch.device) -> None:
        if self.vae is not None:
            self.vae.to(device)

    def loss(self, model: nn.Module, batch: Batch, noise: StepNoise) -> tuple[torch.Tensor, Terms]:
        x_0 = self.clean(batch, noise)
        epsilon = noise.normal(*x_0.shape[1:])
        t = (noise.stratified_uniform() * len(self.scheduler)).long().to(x_0.device, non_blocking=True)
        x_t = self.scheduler.add_noise(x_0, epsilon, t)
        output = model(x_t, t, **self.condition(batch, noise)).sample.float()
        if self.chain is None:
            return self.weight(t) * squared_error(output, self.target(x_0, epsilon, t)), {}
        return self.hybrid_loss(output, x_0, epsilon, t, x_t)

    def hybrid_loss(
        self, output: torch.Tensor, x_0: torch.Tensor, epsilon: torch.Tensor, t: torch.Tensor, x_t: torch.Tensor
    ) -> tuple[torch.Tensor, Terms]:
        """L_simple + 0.001 L_vlb, in nats per dimension, of which the second teaches the variance alone.

        Nichol and Dhariwal 2021, eq. (16). L_vlb is the sum over the T timesteps; one drawn evenly stands for T of them.
        """
        prediction, variance = output.chunk(2, dim=1)
        simple = self.weight(t) * squared_error(prediction, self.target(x_0, epsilon, t))
        if self.chain.config.variance_type == "learned":
            # sigma_t^2 itself, which a network can miss below 0: it counts as the least there is, but learns as what it is.
            least = self.chain.posterior(x_0, t, x_t).log_variance.exp()
            variance = variance + (torch.maximum(variance, least) - variance).detach()
        fixed_mean = torch.cat([prediction.detach(), variance], dim=1)
        bound = self.chain.bound_term(fixed_mean, t, x_t, x_0, self.bin_width)
        bound = bound * len(self.scheduler) / x_0[0].numel()
        return simple + VARIANCE_WEIGHT * bound, {"simple": simple, "bound": bound}

    def target(self, x_0: torch.Tensor, epsilon: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            return self.scheduler.get_velocity(x_0, epsilon, t)
        return {"epsilon": epsilon, "sample": x_0}[kind]

    def weight(self, t: torch.Tensor) -> torch.Tensor | float:
        """min(SNR, gamma) of an error in x_0, in the units of what is predicted; shape (B,). Hang et al. 2023.

            |x_0 - x_0^|^2 = |epsilon - epsilon^|^2 / SNR = |v - v^|^2 / (SNR + 1)

        (https://arxiv.org/abs/2303.09556). The objectives then differ in what the network predicts, not in what is asked of it.
        """
        if self.snr_gamma is None:
            return 1.0
        snr = self.scheduler.snr(t).to(device=t.device, dtype=torch.float32)
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return (self.snr_gamma / snr).clamp(max=1)  # defined where SNR is 0
        return snr.clamp(max=self.snr_gamma) / {"sample": 1.0, "v_prediction": snr + 1}[kind]

    @torch.no_grad()
    def clean(self, batch: Batch, noise: StepNoise) -> torch.Tensor:
        """x_0: the images, or their latents z ~ q(z | x), shifted and scaled as the vae's configuration says."""
        if self.vae is None:
            return batch["images"]
        if "images" in batch:
            mean, scale = moments(self.vae, batch["images"])
        else:
            mean, scale = batch["latent_mean"], batch["latent_scale"]
        z = draw(mean, scale, noise.normal(*mean.shape[1:]))
        return (z - (getattr(self.vae.config, "shift_factor", None) or 0.0)) * self.vae.config.scaling_factor

    def condition(self, batch: Batch, noise: StepNoise) -> dict[str, Any]:
        """What the model takes besides x_t and t, with some of it dropped: a row keeps all it is conditioned on, or nothing."""
        num_classes = getattr(self.model.config, "num_class_embeds", None)
        if num_classes is None and self.text_encoder is None:
            return {}
        drop = noise.uniform() < self.dropout
        condition: dict[str, Any] = {}
        if num_classes is not None:
            condition["class_labels"] = torch.where(drop, num_classes - 1, batch["labels"])
        if self.text_encoder is not None:
            captions = ["" if gone else caption for caption, gone in zip(batch["captions"], drop.tolist(), strict=True)]
            condition["encoder_hidden_states"] = self.text_encoder(captions)
        return condition
