"""The Parzen-window estimate, by which models without a likelihood used to be compared.

    p(x) ~ 1/n sum_i N(x; s_i, sigma^2 I),  s_1 ... s_n samples of the model              Breuleux et al. 2011; Goodfellow et al. 2014

It is kept for that comparison, and is no likelihood of the model: of n samples it sees no more than n bumps of one width, so it can
rank a model that repeats a few smooth images above one that draws from the data (Theis et al. 2016, https://arxiv.org/abs/1511.01844,
section 3.2, figure 3). Training images in the place of samples say how much of a difference means anything: print them beside it.
"""

import math

import torch
from scipy.optimize import minimize_scalar

from .likelihood import log_probability

SIGMAS = (0.02, 2.0)  # between which sigma is sought, for images in [-1, 1]


def parzen(samples: torch.Tensor, tuning: torch.Tensor, images: torch.Tensor, bin_width: float) -> tuple[torch.Tensor, float]:
    """-log p of each image, the probability of its grey levels in nats, float64 (N,), and the sigma that was chosen.

    Args:
        samples: in [-1, 1], float (n, ...).
        tuning: images, neither measured nor among the samples, on which sigma is chosen.
        images: those measured.
        bin_width: the distance of two grey levels.
    """

    def tuned(log_sigma: float) -> float:
        return negative_log_density(samples, tuning, math.exp(log_sigma), bin_width).mean().item()

    bounds = [math.log(sigma) for sigma in SIGMAS]
    sigma = math.exp(minimize_scalar(tuned, bounds=bounds, method="bounded", options={"xatol": 0.1}).x)
    return negative_log_density(samples, images, sigma, bin_width), sigma


def negative_log_density(samples: torch.Tensor, images: torch.Tensor, sigma: float, bin_width: float) -> torch.Tensor:
    """-log 1/n sum_i P(x; s_i, sigma^2) of each image, float64 (N,)."""
    s, x = samples.flatten(1).double(), images.flatten(1).double()
    log_kernel = torch.zeros(len(s), len(x), dtype=torch.float64)
    for dimension in range(x.shape[1]):
        # An image has few grey levels: each costs once for every sample, however many images have it.
        levels, level_of = x[:, dimension].unique(return_inverse=True)
        log_kernel += log_probability(levels, s[:, dimension, None], sigma, bin_width)[:, level_of]
    return math.log(len(s)) - log_kernel.logsumexp(0)
