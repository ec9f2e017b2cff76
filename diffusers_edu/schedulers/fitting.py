"""A scheduler fitted to a model: the best variance of its reverse steps, the best timesteps, and the way from an image to its noise.

`pipeline` is any with a `unet` that is called as `unet(x_t, t).sample` and an `EduDDPMScheduler` as its `scheduler`: `DDPMPipeline`,
`LatentDiffusionPipeline` (of classes, the one that stands for none is used). `samples` are x_0 as its model sees them, float
(N, C, H, W): images in [-1, 1], or scaled latents.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

KNOTS = 250  # timesteps at which the error is measured
TINY = 1e-12  # of which the logarithm is finite: no error, or an SNR of 0


@torch.no_grad()
def fit_variance(pipeline: Any, samples: torch.Tensor, per_timestep: int = 32, batch_size: int = 256, seed: int = 0) -> Any:
    """A copy of the scheduler whose reverse steps have the variance that is best for the model: `variance_type="analytic"`.

    By the law of total variance, sigma_t^2 = eta^2 beta_tilde_t + a^2 E|x_0 - x_0^(x_t)|^2 / d, which is Bao et al. 2022
    (https://arxiv.org/abs/2201.06503), eq. (7), for the exact model. They take the second part from the size of the predicted
    noise; its error, measured here on data, is also right for a model that errs (Bao et al. 2022b, https://arxiv.org/abs/2206.07309,
    theorem 3.1). It is measured at up to 250 timesteps, and read off between them over log SNR, where it is smooth. One measurement
    serves every grid and eta. Use it as `pipeline.scheduler = fit_variance(pipeline, images)`; it is saved with the pipeline.

    Args:
        pipeline, samples: see the module; samples the model was trained on, or better a part that it was not.
        per_timestep: samples drawn at each of them; 32 of 64 pixels give the variance to a few percent.
        batch_size: of the model's evaluations.
        seed: of the draws.

    Raises:
        ValueError: no samples.
        TypeError: the scheduler is no `EduDDPMScheduler`.
    """
    if len(samples) == 0 or per_timestep < 1:
        raise ValueError(
            f"there are {len(samples)} samples, and {per_timestep} to draw for a timestep; at least 1 is needed of each"
        )
    unet, scheduler = pipeline.unet, pipeline.scheduler
    deterministic = without_noise(scheduler)
    generator = torch.Generator().manual_seed(seed)
    knots = torch.linspace(0, len(scheduler) - 1, min(KNOTS, len(scheduler))).round().long()
    errors = []
    for t in tqdm(knots.repeat_interleave(per_timestep).split(batch_size), desc="error by timestep", leave=False):
        x_0 = samples[torch.randint(len(samples), t.shape, generator=generator)].to(unet.device, unet.dtype)
        t = t.to(unet.device)
        x_t = scheduler.add_noise(x_0, randn_tensor(x_0.shape, generator, unet.device, unet.dtype), t)
        predicted = deterministic.step(prediction(unet, x_t, t), t, x_t).pred_original_sample
        errors.append((predicted.float() - x_0.float()).square().flatten(1).mean(1).double().cpu())
    measured = torch.cat(errors).reshape(-1, per_timestep).mean(1).clamp(min=TINY).log()
    everywhere, there = (-scheduler.snr(t).clamp(min=TINY).log().numpy() for t in (torch.arange(len(scheduler)), knots))
    by_timestep = np.exp(np.interp(everywhere, there, measured.numpy()))
    return scheduler.from_config(scheduler.config, variance_type="analytic", prediction_errors=by_timestep.tolist())


# What is missed at the start weighs less than a step's miss: of all errors the flow has the longest way on which to shrink it.
START_WEIGHT = 0.1


class Inversion(NamedTuple):
    """x_T and the way back from it, both (N, C, H, W), and the root mean square difference of that from the samples, (N,)."""

    noise: torch.Tensor
    reconstruction: torch.Tensor
    error: torch.Tensor


@torch.no_grad()
def invert(pipeline: Any, samples: torch.Tensor, num_inference_steps: int = 50, iterations: int = 5) -> Inversion:
    """From samples to the noise of which sampling with eta = 0 makes them, and back.

    A step of eta = 0 is undone exactly by the epsilon that the model sees at x_t, which is what is sought: a fixed point, found by
    iteration from the epsilon seen at x_s. One iteration is the inversion of Song et al. 2021 (DDIM), section 4.3.

    Args:
        pipeline, samples: see the module.
        num_inference_steps: of the grid, spaced as the scheduler says.
        iterations: evaluations of the model for each step, at least 1.

    Raises:
        ValueError: fewer than one iteration.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; it must be at least 1")
    unet = pipeline.unet
    scheduler = without_noise(pipeline.scheduler, clip_sample=False, thresholding=False)
    scheduler.set_timesteps(num_inference_steps)
    x = samples.to(unet.device, unet.dtype)
    for t in tqdm(scheduler.timesteps.flip(0), desc="inverting", leave=False):
        x_s = x
        for _ in range(iterations):
            epsilon = scheduler.convert_model_output(prediction(unet, x, t), t, x, to="epsilon")
            x = scheduler.invert_step(epsilon, t, x_s).to(x_s.dtype)
    noise = x
    for t in scheduler.timesteps:
        x = scheduler.step(prediction(unet, x, t), t, x).prev_sample
    error = (x.float() - samples.to(x.device).float()).square().flatten(1).mean(1).sqrt()
    return Inversion(noise, x, error)


@torch.no_grad()
def fit_timesteps(
    pipeline: Any, num_inference_steps: int, num_samples: int = 64, fine_steps: int = 100, seed: int = 0
) -> list[int]:
    """The K timesteps over which steps of eta = 0 stray least from a fine trajectory of the same model.

    A long step from x_t to x_s, both on the fine trajectory, misses x_s by e(t, s), mean square over samples and pixels; and to start
    at x_t from pure noise misses x_t. The grid with the least sum of misses is the shortest path from noise to image in K steps,
    found by dynamic programming as in Watson et al. 2021 (https://arxiv.org/abs/2106.03802), there over terms of the variational
    bound. The model is evaluated `fine_steps` times. It is fitted to the deterministic flow: it serves solvers of that (DPM-Solver++,
    eta = 0) rather than eta = 1.

    Args:
        pipeline: see the module.
        num_inference_steps: K, at least 1 and at most `fine_steps`.
        num_samples: trajectories.
        fine_steps: timesteps to choose from, evenly spaced over 0 .. T-1.
        seed: of the noise they start from.

    Returns: K strictly decreasing timesteps for `set_timesteps(timesteps=...)` of this and other schedulers.

    Raises:
        ValueError: K out of its range.
    """
    fine_steps = min(fine_steps, len(pipeline.scheduler))
    if not 1 <= num_inference_steps <= fine_steps:
        raise ValueError(f"num_inference_steps is {num_inference_steps}; it must lie within 1 .. {fine_steps} (fine_steps)")
    unet = pipeline.unet
    scheduler = without_noise(pipeline.scheduler)
    from_clean = without_noise(pipeline.scheduler, prediction_type="sample")
    fine = torch.linspace(len(scheduler) - 1, 0, fine_steps).round().long().tolist()
    scheduler.set_timesteps(timesteps=fine)

    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (num_samples, unet.config.in_channels, height, width)
    x = randn_tensor(shape, torch.Generator().manual_seed(seed), unet.device, unet.dtype)
    states, clean = [x], []
    for t in tqdm(fine, desc="fine trajectory", leave=False):
        output = scheduler.step(prediction(unet, x, t), t, x)
        x = output.prev_sample
        states.append(x)
        clean.append(output.pred_original_sample)

    count = len(fine)  # between them, the noise comes first and the image last
    misses = torch.full((count + 1, count + 2), torch.inf, dtype=torch.float64)
    for i, t in enumerate(tqdm(fine, desc="steps of every length", leave=False)):
        misses[0, i + 1] = START_WEIGHT * mean_square(states[0] - states[i])
        x_0 = clean[i]
        epsilon = from_clean.convert_model_output(x_0, t, states[i], to="epsilon")
        for j in range(i + 1, count + 1):
            reached = x_0 if j == count else scheduler.add_noise(x_0, epsilon, fine[j])
            misses[i + 1, j + 1] = mean_square(reached - states[j])
    return [fine[node - 1] for node in shortest_path(misses, num_inference_steps + 1)[1:]]


def mean_square(x: torch.Tensor) -> float:
    return x.float().square().mean().item()


def shortest_path(lengths: torch.Tensor, steps: int) -> list[int]:
    """The nodes left on the shortest way of `steps` edges from node 0 to node n; lengths[i, j] of the edge i to j, (n, n + 1)."""
    count = lengths.shape[1]
    best = torch.full((steps + 1, count), torch.inf, dtype=lengths.dtype)
    best[0, 0] = 0
    came_from = torch.zeros((steps + 1, count), dtype=torch.int64)
    for step in range(1, steps + 1):
        best[step], came_from[step] = (best[step - 1, :-1, None] + lengths).min(0)
    nodes = [count - 1]
    for step in range(steps, 0, -1):
        nodes.append(int(came_from[step, nodes[-1]]))
    return nodes[:0:-1]


def without_noise(scheduler: Any, **changes: Any) -> Any:
    """A copy whose steps add no noise (eta = 0), whatever the variance type.

    Raises:
        TypeError: it is of another class, which has no eta.
    """
    if "eta" not in scheduler.config:
        raise TypeError(
            f"{type(scheduler).__name__} cannot be fitted: put EduDDPMScheduler.from_config(scheduler.config) in its place"
        )
    return scheduler.from_config(scheduler.config, eta=0.0, variance_type="fixed_small", **changes)


def prediction(unet: Any, x: torch.Tensor, t: Any) -> torch.Tensor:
    """The model's output, less the second half of channels where it has learned a variance; of classes, that for none."""
    classes = getattr(unet.config, "num_class_embeds", None)
    labels = {} if classes is None else {"class_labels": torch.full((len(x),), classes - 1, device=x.device)}
    return unet(x, t, **labels).sample[:, : x.shape[1]]
