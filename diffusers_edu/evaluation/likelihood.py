"""How well a model explains images that it has not seen: upper bounds on -log p(x), in nats an image or bits per dimension.

Images are discrete: p(x) is the probability of the grey levels of x, so all models that have a likelihood stand on one scale; less is
better.

    VAE                -log p(x) <= E_q[-log p(x | z)] + KL(q(z | x) || p(z))                        Kingma and Welling 2014, eq. (3)
    its k-sample bound -log p(x) <= E[-log 1/k sum_i p(x | z_i) p(z_i) / q(z_i | x)],  z_i ~ q(z | x)   Burda et al. 2016, eq. (8)
    diffusion          -log p(x) <= L_T + sum_t L_{t-1} + L_0                                        Ho et al. 2020, eq. (5)
    latent diffusion   -log p(x) <= E_q[-log p(x | z) + log q(z | x) - log p(z)],  the last by the diffusion's bound on z
                                                                                                     Vahdat et al. 2021, eq. (6)

A bound is an expectation over draws; every image has a source of randomness of its own, so nothing depends on how images are batched.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .estimates import Estimate, mean
from .sampling import fitting, generators, scaled
from .sharding import my_part, progress, whole

BLOCK = 2**16  # numbers drawn at once for an image
Model = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Bound:
    """An upper bound on -log p(x) of each of N images, in nats.

    Args:
        parts: its summands by name, float64 (N,) each; they may be negative where densities are among them.
        dimensions: of an image, C H W.
        timesteps: of a diffusion's grid, K of them, the noisiest first; or [].
        terms: L_{t-1} and last L_0, by timestep, float64 (K, N).
        squared_errors: of the predicted x_0, clipped as in sampling, mean over dimensions, by timestep, float64 (K, N).
    """

    parts: dict[str, torch.Tensor]
    dimensions: int
    timesteps: list[int] = field(default_factory=list)
    terms: torch.Tensor | None = None
    squared_errors: torch.Tensor | None = None

    @property
    def nats(self) -> torch.Tensor:
        """The bound itself, (N,)."""
        return torch.stack(list(self.parts.values())).sum(0)

    def estimate(self, of: torch.Tensor | None = None) -> Estimate:
        """The mean over images in nats, with 1.96 standard errors; `of` the bound, or of a part."""
        return mean(self.nats if of is None else of, same_images=True)

    def bits_per_dim(self, of: torch.Tensor | None = None) -> Estimate:
        """The same in bits per dimension."""
        return in_bits(self.nats if of is None else of, self.dimensions)

    def by_timestep(self) -> dict[str, list[float]]:
        """Lists over the timesteps, the noisiest first: their numbers, their terms in bits per dimension, the mean square error of the
        predicted x_0, and the rate and distortion of `progressive_code`; {} where the bound has no timesteps."""
        if self.terms is None or self.squared_errors is None:
            return {}
        rate, distortion = self.progressive_code()
        bits = self.terms.mean(1) / (self.dimensions * math.log(2))
        found = {"bits_per_dim": bits, "denoising_loss": self.squared_errors.mean(1), "rate": rate, "distortion": distortion}
        return {"timesteps": self.timesteps, **{f"{name}_by_timestep": values.tolist() for name, values in found.items()}}

    def progressive_code(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rate in bits per dimension and distortion, the root mean square error in the units of x, after each timestep: (K,) each.

        Who has received x_T .. x_t guesses x_0 by the model's prediction at x_t. Ho et al. 2020, section 4.3.
        """
        assert self.terms is not None and self.squared_errors is not None, "this bound has no timesteps"
        received = self.parts["prior"].mean() + torch.cat([torch.zeros(1), self.terms.mean(1)]).cumsum(0)[:-1]
        return received / (self.dimensions * math.log(2)), self.squared_errors.mean(1).sqrt()


def in_bits(nats: torch.Tensor, dimensions: int) -> Estimate:
    """The mean of nats of images, (N,), in bits per dimension, with 1.96 standard errors."""
    return mean(nats, same_images=True) * (1 / (dimensions * math.log(2)))


def log_likelihood(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor | float, bin_width: float | None) -> torch.Tensor:
    """log p(x) of each image under N(mean, std^2), in nats, (B,); see [`log_probability`]."""
    return log_probability(x, mean, std, bin_width).flatten(1).sum(1)


def log_probability(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor | float, bin_width: float | None) -> torch.Tensor:
    """log p of every element under N(mean, std^2), float64: the probability of the bins of x in [-1, 1], the outermost ones unbounded
    (Ho et al. 2020, eq. 13); with a `bin_width` of None the density. The shapes of x and mean broadcast."""
    normal = torch.distributions.Normal(mean.double(), torch.as_tensor(std, dtype=torch.float64, device=x.device))
    x = x.double()
    if bin_width is None:
        return normal.log_prob(x)
    upper, lower = ((x - normal.mean + side * bin_width / 2) / normal.stddev for side in (1, -1))
    # Far above the mean 1 - 1 cancels; the mirror image of the bin lies far below it.
    above_mean = x > normal.mean
    lower, upper = torch.where(above_mean, -upper, lower), torch.where(above_mean, -lower, upper)
    lowest, highest = x < -1 + bin_width / 4, x > 1 - bin_width / 4
    lower = torch.where(torch.where(above_mean, highest, lowest), -torch.inf, lower)
    upper = torch.where(torch.where(above_mean, lowest, highest), torch.inf, upper)
    log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
    return log_upper + torch.log(-torch.expm1(log_lower - log_upper))


@torch.no_grad()
def diffusion_bound(
    model: Model,
    scheduler: Any,
    samples: torch.Tensor,
    bin_width: float | None,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 256,
) -> Bound:
    """The bound of the chain that samples over the scheduler's present grid: `set_timesteps(K)` before makes it one of K steps.

    Every term is estimated on noise of its own, `draws` times.

    Args:
        model: its output at (x_t, t); see [`unconditional`].
        scheduler: an `EduDDPMScheduler`, or one with its `prior_term`, `bound_term`, `predict_original_sample` and `clip`.
        samples: x_0 as the model sees them, float (N, ...).
        bin_width: the distance of two grey levels of x_0; None for continuous data, such as latents.
        draws: of x_t, for each image and timestep.
        seed: of the draws.
        batch_size: of the model's evaluations.
    """
    timesteps = [int(t) for t in scheduler.timesteps]
    terms, errors, priors = [], [], []
    for x_0, noise in batches(samples, seed, batch_size, len(timesteps) * draws):
        of_batch, errors_of_batch = [], []
        for t in timesteps:
            term = error = torch.zeros(len(x_0), dtype=torch.float64)
            for _ in range(draws):
                epsilon = noise(x_0)
                at = torch.full((len(x_0),), t, device=x_0.device)
                x_t = scheduler.add_noise(x_0, epsilon, at)
                output = model(x_t, at)
                predicted = scheduler.clip(scheduler.predict_original_sample(output[:, : x_0.shape[1]], at, x_t))
                term = term + scheduler.bound_term(output, at, x_t, x_0, bin_width).double().cpu() / draws
                error = error + (predicted - x_0).square().flatten(1).mean(1).double().cpu() / draws
            of_batch.append(term)
            errors_of_batch.append(error)
        terms.append(torch.stack(of_batch))
        errors.append(torch.stack(errors_of_batch))
        priors.append(scheduler.prior_term(x_0).double().cpu())
    each = whole(terms, 1)
    parts = {"prior": whole(priors), "steps": each[:-1].sum(0), "last": each[-1]}
    return Bound(parts, samples[0].numel(), timesteps, each, whole(errors, 1))


@torch.no_grad()
def autoencoder_bound(
    vae: Any, images: torch.Tensor, std: float, bin_width: float | None, k: int = 1, seed: int = 0, batch_size: int = 256
) -> Bound:
    """The bound of a VAE, k = 1, of parts `reconstruction` and `kl`, or the tighter one of k codes, of the one part `importance`.

    Args:
        vae: with `decode(z).sample` and `encode(x).latent_dist`, which has `reparameterise`, `kl` and `log_prob`: a
            `VariationalAutoencoder`.
        images: x in [-1, 1], float (N, C, H, W).
        std: sigma_x of p(x | z).
        bin_width: the distance of two grey levels; None for a density.
        k: codes drawn for each image.
        seed: of the draws.
        batch_size: of the decoder's evaluations.
    """
    found: dict[str, list[torch.Tensor]] = {"reconstruction": [], "kl": []} if k == 1 else {"importance": []}
    for x, noise in batches(images, seed, batch_size, k):
        posterior = vae.encode(x).latent_dist
        weights = []
        for _ in range(k):
            z = posterior.reparameterise(noise(posterior.mean))
            likelihood = log_likelihood(x, vae.decode(z).sample, std, bin_width)
            if k == 1:
                found["reconstruction"].append(-likelihood.cpu())
                found["kl"].append(posterior.kl().double().cpu())
            else:
                prior = log_likelihood(z, torch.zeros_like(z), 1.0, None)
                weights.append(likelihood + prior - posterior.log_prob(z).double())
        if k > 1:
            found["importance"].append(math.log(k) - torch.stack(weights).logsumexp(0).cpu())
    return Bound({name: whole(values) for name, values in found.items()}, images[0].numel())


@torch.no_grad()
def latent_diffusion_bound(
    vae: Any,
    model: Model,
    scheduler: Any,
    images: torch.Tensor,
    std: float,
    bin_width: float | None,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 256,
) -> Bound:
    """The bound of the whole model: a code z ~ q(z | x), its diffusion as the prior, and the decoder.

    Its parts are `reconstruction`, E_q[-log p(x | z)]; `posterior`, E_q[log q(z | x)]; and those of the diffusion of y = s (z - m), the
    scaled code, whose density is that of z over s^d: hence the part `scale`, -d log s.

    Args:
        vae, images, std, bin_width: see `autoencoder_bound`; its `config` has `scaling_factor` s, and `shift_factor` m or none.
        model, scheduler, draws, seed, batch_size: see `diffusion_bound`.
    """
    codes, reconstruction, log_q = [], [], []
    for x, noise in batches(images, seed, batch_size, 1):
        posterior = vae.encode(x).latent_dist
        z = posterior.reparameterise(noise(posterior.mean))
        reconstruction.append(-log_likelihood(x, vae.decode(z).sample, std, bin_width).cpu())
        log_q.append(posterior.log_prob(z).double().cpu())
        codes.append(scaled(vae, z))
    y = whole(codes).to(images.device)
    prior = diffusion_bound(model, scheduler, y, None, draws, seed + 1, batch_size)
    scale = torch.full((len(y),), -y[0].numel() * math.log(vae.config.scaling_factor), dtype=torch.float64)
    parts = {"reconstruction": whole(reconstruction), "posterior": whole(log_q), **prior.parts, "scale": scale}
    return Bound(parts, images[0].numel(), prior.timesteps, prior.terms, prior.squared_errors)


def unconditional(unet: Any) -> Model:
    """A UNet as `model(x_t, t) -> output`; of one with classes the last, which stands for none."""
    num_classes = getattr(unet.config, "num_class_embeds", None)

    def model(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        labels = {} if num_classes is None else {"class_labels": torch.full_like(t, num_classes - 1)}
        return unet(x_t, t, **labels).sample

    return model


class Noise:
    """N(0, I) for the images of a batch, each from a source of its own, drawn for many evaluations at once.

    Args:
        sources: one for each image.
        evaluations: how often it will be asked.
    """

    def __init__(self, sources: list[torch.Generator], evaluations: int, count: Callable[[], object] = lambda: None):
        self.sources, self.evaluations, self.count = sources, evaluations, count
        self.ahead: list[torch.Tensor] = []

    def __call__(self, like: torch.Tensor) -> torch.Tensor:
        """A draw of the shape of `like`, (B, ...); all are of one shape."""
        if not self.ahead:
            size = min(self.evaluations, max(1, BLOCK // like[0].numel()))  # whatever the batch
            rows = [torch.randn((size, *like.shape[1:]), generator=source) for source in self.sources]
            self.ahead = list(torch.stack(rows, 1).flip(0))
        self.count()
        return self.ahead.pop().to(like.device, like.dtype)


def batches(samples: torch.Tensor, seed: int, size: int, evaluations: int) -> Iterator[tuple[torch.Tensor, Noise]]:
    """This process's batches, each with its noise; every draw of it is one evaluation in the progress bar."""
    mine, size = my_part(len(samples)), fitting(size, samples[0].numel())
    with progress(total=evaluations * -(-len(mine) // size), desc="likelihood") as bar:
        for first in range(mine.start, mine.stop, size):
            batch = samples[first : min(first + size, mine.stop)]
            yield batch, Noise(generators(seed, first, len(batch)), evaluations, bar.update)
