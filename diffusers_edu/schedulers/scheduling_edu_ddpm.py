"""The forward and the reverse process of denoising diffusion, in discrete time.

Notation, as in Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (https://arxiv.org/abs/2006.11239):

    alpha_t = 1 - beta_t,    alpha_bar_t = prod_{s <= t} alpha_s,    alpha_bar_{-1} = 1 (the data)
    forward   q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)                                eq. (4)
    reverse   p(x_s | x_t) = N(posterior mean of q(x_s | x_t, x_0 = prediction), sigma_t^2 I)             eq. (6), (7)

Timesteps count from 0 (the least noise) to T - 1, as everywhere in diffusers. On a sub-grid of the T timesteps, s is the
grid's next timestep below t, and alpha_t, beta_t become alpha_{t|s} = alpha_bar_t / alpha_bar_s and 1 - alpha_{t|s}.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor

logger = logging.get_logger(__name__)

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
VARIANCE_TYPES = (
    "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range", "analytic"
)  # fmt: skip
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
FAR_FROM_NOISE = 0.05  # an alpha_bar_T above this leaves more than a fifth of the image, sqrt(0.05), in x_T


@dataclass
class EduDDPMSchedulerOutput(BaseOutput):
    """What `EduDDPMScheduler.step` returns.

    Args:
        prev_sample (`torch.Tensor`, shape and dtype of the sample):
            x_s, the next input of the model.
        pred_original_sample (`torch.Tensor`, shape and dtype of the sample):
            the prediction of x_0 made from x_t, after clipping or thresholding.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None

    def __post_init__(self) -> None:
        # The base class looks for its fields anew in every output, which is dear where a step takes microseconds.
        for name in ("prev_sample", "pred_original_sample"):
            if self.__dict__[name] is not None:
                OrderedDict.__setitem__(self, name, self.__dict__[name])


class Gaussian(NamedTuple):
    """N(mean, variance I): the mean has the shape of the sample, the other two broadcast over it; float32 or better."""

    mean: torch.Tensor
    variance: torch.Tensor
    log_variance: torch.Tensor


def make_betas(schedule: str, num_train_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """The T variances beta_t of a named schedule, float32 of shape (T,).

    - `linear`: Ho et al. 2020, section 4.
    - `scaled_linear`: linear in sqrt(beta); Rombach et al. 2022 (https://arxiv.org/abs/2112.10752), the released models.
    - `squaredcos_cap_v2`: Nichol and Dhariwal 2021 (https://arxiv.org/abs/2102.09672), eq. (17), beta capped at 0.999.
    - `sigmoid`: Xu et al. 2022, GeoDiff (https://arxiv.org/abs/2203.02923).
    - `laplace`: Hang and Gu 2024 (https://arxiv.org/abs/2407.03297), as diffusers discretises it.

    Raises:
        ValueError: an unknown schedule.
    """
    count = num_train_timesteps
    if schedule == "linear":
        return torch.linspace(beta_start, beta_end, count, dtype=torch.float32)
    if schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, count, dtype=torch.float32) ** 2
    if schedule == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, count, dtype=torch.float32)) * (beta_end - beta_start) + beta_start
    if schedule == "squaredcos_cap_v2":
        return _betas_from_alpha_bar(lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, count)
    if schedule == "laplace":
        return _betas_from_alpha_bar(_laplace_alpha_bar, count)
    raise ValueError(f"beta_schedule is {schedule!r}; it must be one of {', '.join(BETA_SCHEDULES)}, or give trained_betas")


def _laplace_alpha_bar(u: float) -> float:
    log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
    return math.sqrt(math.exp(log_snr) / (1 + math.exp(log_snr)))


def _betas_from_alpha_bar(alpha_bar, count: int, max_beta: float = 0.999) -> torch.Tensor:
    """beta_t = min(1 - alpha_bar((t + 1) / T) / alpha_bar(t / T), 0.999), for alpha_bar over the time in [0, 1]."""
    ratios = [alpha_bar((t + 1) / count) / alpha_bar(t / count) for t in range(count)]
    return torch.tensor([min(1 - ratio, max_beta) for ratio in ratios], dtype=torch.float32)


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Shift and scale sqrt(alpha_bar) so that it ends at exactly 0 and starts where it was.

    Lin et al. 2023 (https://arxiv.org/abs/2305.08891), algorithm 1. Shape (T,) in, shape (T,) out.
    """
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alpha_bar = ((root - last) * (first / (first - last))) ** 2
    return 1.0 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def rescale_to_timesteps(schedule: str, num_train_timesteps: int, beta_start: float, beta_end: float) -> torch.Tensor:
    """T betas whose alpha_bar runs along the schedule's own of 1,000 timesteps, so that x_T is as noisy as there.

    The named betas are meant for T = 1,000: beta_start and beta_end say how much noise one of a thousand steps adds. log alpha_bar is
    read off at t / T, linearly between two of the thousand. The schedules made from alpha_bar itself stay what they are.
    """
    if schedule in ("squaredcos_cap_v2", "laplace"):
        return make_betas(schedule, num_train_timesteps, beta_start, beta_end)
    log_alpha_bar = torch.log1p(-make_betas(schedule, 1000, beta_start, beta_end).double()).cumsum(0)
    time = np.linspace(0, 1000, num_train_timesteps + 1)
    picked = np.interp(time, np.arange(1001), np.concatenate([[0.0], log_alpha_bar.numpy()]))
    return torch.from_numpy(-np.expm1(np.diff(picked))).float()


class EduDDPMScheduler(SchedulerMixin, ConfigMixin):
    """Ancestral sampling for denoising diffusion: `DDPMScheduler`'s interface and configuration, its equations in the open.

    It takes the place of any diffusers scheduler: `EduDDPMScheduler.from_config(pipe.scheduler.config)`. Against the stock
    class: one timestep for each sample (shape (B,)) works in `step`; the coefficients are exact (float64 tables, applied
    in float32 or better whatever the dtype of the sample); `fixed_large_log` is a standard deviation; the finished image
    carries no noise under any variance type and spacing.

    Args:
        num_train_timesteps (`int`, defaults to 1000): T, the number of noise levels.
        beta_start, beta_end (`float`, default to 0.0001 and 0.02): the ends of the schedules that have ends.
        beta_schedule (`str`, defaults to `"linear"`): see [`make_betas`].
        trained_betas (array of T floats, *optional*): the betas themselves, in place of a schedule; their number is T.
        variance_type (`str`, defaults to `"fixed_small"`): sigma_t^2, the variance of a reverse step.
            `fixed_small`: beta_tilde_t, right for data at one point; `fixed_large`: beta_t, right for x_0 ~ N(0, I) (Ho et al. 2020,
            section 3.2). The names with `_log` give the same variance. `learned`: the second half of the model's
            channels is sigma_t^2; `learned_range`: it is v in [-1, 1], which interpolates between the logarithms of the two fixed
            ones (Nichol and Dhariwal 2021, eq. 15). `analytic`: the best variance for the model, from `prediction_errors`.
        clip_sample (`bool`, defaults to `True`): clip the predicted x_0 to [-clip_sample_range, clip_sample_range].
        prediction_type (`str`, defaults to `"epsilon"`): what the model predicts: the noise `epsilon`, the image x_0
            (`sample`), or `v_prediction` = sqrt(alpha_bar_t) epsilon - sqrt(1 - alpha_bar_t) x_0 (Salimans and Ho 2022,
            https://arxiv.org/abs/2202.00512).
        thresholding (`bool`, defaults to `False`): dynamic thresholding of the predicted x_0 (Saharia et al. 2022,
            https://arxiv.org/abs/2205.11487, section 2.3), in place of clipping.
        dynamic_thresholding_ratio (`float`, defaults to 0.995): the quantile of |x_0| to which an image is pulled in.
        clip_sample_range (`float`, defaults to 1.0): the bound of clipping.
        sample_max_value (`float`, defaults to 1.0): the largest threshold.
        timestep_spacing (`str`, defaults to `"leading"`): `leading`, `trailing` or `linspace` (Lin et al. 2023, table 2).
        steps_offset (`int`, defaults to 0): added to every timestep of the `leading` grid.
        rescale_betas_zero_snr (`bool`, defaults to `False`): see [`rescale_zero_terminal_snr`].
        eta (`float`, defaults to 1.0): how much fresh noise a step adds, from 0, none (DDIM, with the noise taken from the clipped
            x_0; under `analytic`, what the model cannot know of x_0 stays), to 1, all of sigma_t (DDPM). A part of the configuration
            and no argument of `step`, to which Stable Diffusion passes `eta=0.0` wherever there is one.
        rescale_betas_to_timesteps (`bool`, defaults to `False`): see [`rescale_to_timesteps`]. The betas are written into the
            configuration as `trained_betas`, so that every scheduler made from it has the same.
        prediction_errors (list of T floats, *optional*): E|x_0 - predicted x_0|^2 per dimension at every timestep, for the variance
            type `analytic`; `diffusers_edu.schedulers.fitting.fit_variance` measures them.

    Raises:
        ValueError: an unknown schedule, spacing or prediction type, fewer than one timestep, eta outside [0, 1], or a number of
            `prediction_errors` other than T.
    """

    # The two names that are not among the enumeration are distilled samplers, between which people swap all the same.
    _compatibles = [e.name for e in KarrasDiffusionSchedulers] + ["LCMScheduler", "TCDScheduler"]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"] = "linear",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: Literal[
            "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range", "analytic"
        ] = "fixed_small",
        clip_sample: bool = True,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        eta: float = 1.0,
        rescale_betas_to_timesteps: bool = False,
        prediction_errors: list[float] | None = None,
    ):
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps is {num_train_timesteps}; it must be at least 1")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}; it must lie between 0 (DDIM) and 1 (DDPM)")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {prediction_type!r}; it must be one of {', '.join(PREDICTION_TYPES)}")
        if timestep_spacing not in TIMESTEP_SPACINGS:
            raise ValueError(f"timestep_spacing is {timestep_spacing!r}; it must be one of {', '.join(TIMESTEP_SPACINGS)}")
        # DPM++ saves None. Like the stock class, this one takes any other name for the small variance; but it says so.
        if variance_type is not None and variance_type not in VARIANCE_TYPES:
            logger.warning(f"variance_type {variance_type!r} is none of {', '.join(VARIANCE_TYPES)}; taken for fixed_small")

        if trained_betas is not None:
            self.betas = torch.tensor(np.asarray(trained_betas), dtype=torch.float32)
        elif rescale_betas_to_timesteps:
            self.betas = rescale_to_timesteps(beta_schedule, num_train_timesteps, beta_start, beta_end)
            given = [key for key in self.config["_use_default_values"] if key != "trained_betas"]
            self.register_to_config(trained_betas=self.betas.tolist(), _use_default_values=given)
        else:
            self.betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        if rescale_betas_zero_snr:
            self.betas = rescale_zero_terminal_snr(self.betas)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)

        # 1 - alpha_bar_t cancels near the data: float64 here, whatever the sample's dtype later.
        self._alpha_bar = torch.cumprod(1.0 - self.betas.double(), dim=0)
        left = self._alpha_bar[-1].item()
        self._reaches_zero_snr = left == 0
        if left > FAR_FROM_NOISE:
            logger.warning(
                f"alpha_bar_T is {left:.3g} after {len(self)} timesteps: x_T is not noise but holds {left**0.5:.0%} of the image, "
                "while sampling starts from pure noise. rescale_betas_to_timesteps=True spreads the schedule over them."
            )
        if prediction_errors is not None and len(prediction_errors) != len(self):
            raise ValueError(f"there are {len(prediction_errors)} prediction_errors; there must be {len(self)}, one a timestep")

        self._tables: dict[str, torch.Tensor] = {}
        self._rows: dict[str, list[tuple]] = {}
        self._copies: dict[tuple, torch.Tensor] = {}
        signal, sigma = self._alpha_bar.sqrt(), (1 - self._alpha_bar).sqrt()
        self._set_table("forward", signal, sigma, 1 / signal, sigma / signal, factors=(0, 2))
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self._set_grid(torch.arange(len(self) - 1, -1, -1))

    def __len__(self) -> int:
        """T."""
        return len(self.betas)

    # ---------------------------------------------------------------------------------------------- forward process

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon, a draw of q(x_t | x_0). Ho et al. 2020, eq. (4).

        Args:
            original_samples: x_0, float of shape (B, ...).
            noise: epsilon ~ N(0, I), the shape of x_0.
            timesteps: t in 0 .. T-1, integers of shape (B,), or one for all.

        Returns: x_t, shape and dtype of x_0.

        Raises:
            ValueError: shapes that do not match.
        """
        signal, sigma, _, _ = self._look_up("forward", timesteps, original_samples, noise)
        return _cast(_weighted_sum((signal, _upcast(original_samples)), (sigma, _upcast(noise))), original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v_t = sqrt(alpha_bar_t) epsilon - sqrt(1 - alpha_bar_t) x_0. Salimans and Ho 2022, section 4.

        Args, shapes and errors as in `add_noise`; `sample` is x_0. Returns: v_t, shape and dtype of x_0.
        """
        signal, sigma, _, _ = self._look_up("forward", timesteps, sample, noise)
        return _cast(_weighted_sum((signal, _upcast(noise)), (-sigma, _upcast(sample))), sample.dtype)

    def snr(self, timestep: int | torch.Tensor) -> torch.Tensor:
        """The signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t) (Kingma et al. 2021, https://arxiv.org/abs/2107.00630, eq. 2).

        float64 on the host; the shape of t.
        """
        alpha_bar = self._alpha_bar[torch.as_tensor(timestep, device="cpu")]
        return alpha_bar / (1 - alpha_bar)

    # ---------------------------------------------------------------------------------------------- the timesteps visited

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Choose the grid of timesteps that sampling visits: evenly spaced, or given.

        Args:
            num_inference_steps: how many, from 1 to T; spaced by `timestep_spacing`.
            device: where `scheduler.timesteps` goes.
            timesteps: the grid itself, strictly decreasing within 0 .. T-1, in place of a number.

        Raises:
            ValueError: both or neither given, more steps than T, or a grid that does not decrease or leaves the range.
        """
        T = len(self)
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give set_timesteps either num_inference_steps or timesteps")
        if timesteps is not None:
            grid = torch.tensor([int(t) for t in timesteps], dtype=torch.int64)
            if any(int(t) != t for t in timesteps):
                raise ValueError("custom timesteps must be integers")
            if len(grid) == 0 or bool((grid[1:] >= grid[:-1]).any()):
                raise ValueError("custom timesteps must be strictly decreasing, and at least one")
            if grid[0] >= T or grid[-1] < 0:
                raise ValueError(f"custom timesteps must start before num_train_timesteps ({T}) and end at 0 or later")
        else:
            grid = torch.from_numpy(self._spaced_grid(num_inference_steps))
            if grid[0] >= T:
                raise ValueError(
                    f"steps_offset {self.config.steps_offset} leads to timestep {grid[0]}; the last one is {T - 1}"
                )
        self.num_inference_steps = len(grid)
        self._set_grid(grid, device)

    def _spaced_grid(self, count: int | None) -> np.ndarray:
        T = len(self)
        if count is None or not 1 <= count <= T:
            raise ValueError(f"num_inference_steps is {count}; this scheduler takes 1 to {T}")
        if self.config.timestep_spacing == "linspace":
            return np.linspace(0, T - 1, count).round()[::-1].astype(np.int64)
        if self.config.timestep_spacing == "leading":
            return (np.arange(count) * (T // count))[::-1].astype(np.int64) + self.config.steps_offset
        # The end is left out by number: in floating point the last subtraction can stop short of 0.
        return np.round(np.arange(T, 0, -T / count)[:count]).astype(np.int64) - 1

    def _set_grid(self, grid: torch.Tensor, device: str | torch.device | None = None) -> None:
        """Everything a reverse step needs is a function of t alone once the grid is chosen: look-ups, no searches."""
        self.timesteps = grid.to(device)
        rising = grid.flip(0)
        index = torch.searchsorted(rising, torch.arange(len(self))) - 1
        self._previous = torch.where(index >= 0, rising[index], -1)
        self._set_table("reverse", *self._reverse_coefficients(self._previous, rising), factors=(2,))
        self._is_stochastic = self.config.eta > 0 or self.config.variance_type == "analytic"
        if device is not None:
            for process in self._tables:  # now, and not within a step, where it would wait for the device
                self._copy(process, torch.empty(0, device=device))

    def _reverse_coefficients(self, s: torch.Tensor, rising_grid: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of the step x_s = a x_0 + b x_t + sigma z from every t to its s, float64 of shape (T,): a, b, the std sigma of the noise that
        is added, the variance of p(x_s | x_t), beta_tilde, and the logarithms of beta_tilde and beta.

        Song et al. 2021 (https://arxiv.org/abs/2010.02502), eq. (12) and (16): x_s is the image at level s with as much of x_t's
        noise as leaves room for the fresh noise. With eta = 1 this is Ho et al. 2020, eq. (7):
        a = sqrt(alpha_bar_s) beta / (1 - alpha_bar_t), b = sqrt(alpha) (1 - alpha_bar_s) / (1 - alpha_bar_t).
        """
        last = s < 0  # x_s is the image: it gets no noise, but a likelihood, L_0, which needs a variance
        alpha_bar_t = self._alpha_bar
        alpha_bar_s = torch.where(last, 1.0, self._alpha_bar[s.clamp(min=0)])
        beta = 1 - alpha_bar_t / alpha_bar_s
        beta_tilde = (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta
        room = (1 - alpha_bar_s - self.config.eta**2 * beta_tilde).clamp(min=0)
        b = (room / (1 - alpha_bar_t)).sqrt()
        a = alpha_bar_s.sqrt() - b * alpha_bar_t.sqrt()

        small, large = self.config.eta**2 * beta_tilde, torch.where(last, beta, self.config.eta**2 * beta)
        # From the data to itself beta_tilde is 0: for its logarithm that of the step above stands in, as in Ho et al.'s code.
        above = small[rising_grid[1]] if len(rising_grid) > 1 else large
        small_above_0 = torch.where(last, above, small)
        kind = self.config.variance_type
        if kind == "analytic":
            # The law of total variance: of the fresh noise, and of what the model cannot know of x_0.
            errors = [math.nan] if self.config.prediction_errors is None else self.config.prediction_errors
            variance = small + a**2 * torch.tensor(errors, dtype=torch.float64)
        else:
            variance = large if kind in ("fixed_large", "fixed_large_log") else small_above_0
        sigma = torch.where(last, 0.0, variance).sqrt()
        return a, b, sigma, variance, small, small_above_0.log(), large.log()

    def previous_timestep(self, timestep: int | torch.Tensor) -> int | torch.Tensor:
        """s: the next timestep of the grid below t, -1 where there is none (x_{-1} is the image). The type of t."""
        if isinstance(timestep, torch.Tensor):
            return self._previous.to(timestep.device)[timestep]
        return int(self._previous[timestep])

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """The sample as it is: x_t already has the scale that the model was trained on."""
        return sample

    # ---------------------------------------------------------------------------------------------- what a model's output means

    def predict_original_sample(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """x_0 as the model sees it, from its output at x_t, before any clipping (see `clip`); float32 or better.

        `epsilon`: (x_t - sqrt(1 - alpha_bar_t) epsilon) / sqrt(alpha_bar_t), Ho et al. 2020, eq. (15);
        `v_prediction`: sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v, Salimans and Ho 2022, section 4.

        Raises:
            ValueError: `epsilon` where alpha_bar_t is 0 (zero terminal SNR): noise alone says nothing of the image. Under
                torch.compile nothing is checked, and the result is not finite.
        """
        x_t = _upcast(sample)
        output = _upcast(model_output)
        if self.config.prediction_type == "sample":
            return output
        signal, sigma, inverse_signal, ratio = self._look_up("forward", timestep, sample)
        if self.config.prediction_type == "v_prediction":
            return _weighted_sum((signal, x_t), (-sigma, output))
        # Only a schedule that goes wrong pays for the check, which on an accelerator waits for the device.
        if self._reaches_zero_snr and not _is_traced(output) and bool(torch.as_tensor(signal == 0).any()):
            raise ValueError(
                "alpha_bar is 0 at this timestep, where a prediction of epsilon determines no image: "
                "with rescale_betas_zero_snr use prediction_type 'v_prediction' or 'sample'"
            )
        return _weighted_sum((inverse_signal, x_t), (-ratio, output))

    def clip(self, x_0: torch.Tensor) -> torch.Tensor:
        """The predicted image as a step takes it: under dynamic thresholding (Saharia et al. 2022, section 2.3), clipped, which may
        overwrite the tensor, or as it is. Any shape (B, ...)."""
        config = self.config
        if config.thresholding:
            quantile = torch.quantile(x_0.abs().flatten(1), config.dynamic_thresholding_ratio, dim=1)
            bound = quantile.clamp(1, config.sample_max_value).reshape(-1, *[1] * (x_0.ndim - 1))
            return x_0.clamp(-bound, bound) / bound
        if config.clip_sample:
            # In place, but for what belongs to the model.
            clamp = x_0.clamp if config.prediction_type == "sample" else x_0.clamp_
            return clamp(-config.clip_sample_range, config.clip_sample_range)
        return x_0

    def convert_model_output(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor, to: str
    ) -> torch.Tensor:
        """What the model said of x_t, as `epsilon`, `sample` (x_0) or `v_prediction`; float32 or better.

        With x_0 from `predict_original_sample`: epsilon = (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t), and v as in
        `get_velocity`. Shapes as in `step`.

        Raises:
            ValueError: an unknown type, or one that zero terminal SNR leaves undetermined.
        """
        if to not in PREDICTION_TYPES:
            raise ValueError(f"to is {to!r}; it must be one of {', '.join(PREDICTION_TYPES)}")
        if to == self.config.prediction_type:
            return _upcast(model_output)
        x_0 = self.predict_original_sample(model_output, timestep, sample)
        if to == "sample":
            return x_0
        signal, sigma, _, _ = self._look_up("forward", timestep, sample)
        epsilon = (_upcast(sample) - signal * x_0) / sigma
        return epsilon if to == "epsilon" else signal * epsilon - sigma * x_0

    # ---------------------------------------------------------------------------------------------- reverse process

    def posterior(self, original_samples: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor) -> Gaussian:
        """q(x_s | x_t, x_0), s the grid's next timestep below t. Ho et al. 2020, eq. (6) and (7).

        With eta below 1 it is the posterior of the process that `eta` stands for, Song et al. 2021, eq. (7).

        Args:
            original_samples: x_0, shape (B, ...).
            timestep: t, one for all or integers of shape (B,).
            sample: x_t, the shape of x_0.

        Returns: where s = -1, the mean x_0 and the variance 0, while the log-variance stays that of the step above, as in Ho et al.
        """
        a, b, _, _, beta_tilde, log_beta_tilde, _ = self._look_up("reverse", timestep, sample, original_samples)
        x_t = _upcast(sample)
        mean = _weighted_sum((a, _upcast(original_samples)), (b, x_t))
        return Gaussian(mean, *(torch.as_tensor(x, dtype=x_t.dtype, device=x_t.device) for x in (beta_tilde, log_beta_tilde)))

    def reverse(self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor) -> Gaussian:
        """p(x_s | x_t) = N(a x_0 + b x_t, sigma_t^2 I), the model's place-holder for the posterior: its x_0 is predicted.

        Args and errors as in `step`. Returns: where s = -1, the variance with which x_0 is to be scored, though `step` adds no
        noise there.
        """
        model_output, predicted = self._split(model_output, sample)
        x_0 = self.clip(self.predict_original_sample(model_output, timestep, sample))
        a, b, _, variance, _, log_small, log_large = self._look_up("reverse", timestep, sample)
        mean = _weighted_sum((a, x_0), (b, _upcast(sample)))
        if predicted is not None:
            variance = self._learned_variance(predicted, log_small, log_large)
        variance = torch.as_tensor(variance, dtype=mean.dtype, device=mean.device)
        return Gaussian(mean, variance, variance.log())

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EduDDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Draw x_s ~ p(x_s | x_t) = N(a x_0 + b x_t, sigma_t^2 I), x_0 predicted by the model. With eta = 1, Ho et al. 2020,
        eq. (6) and (7):

            a = sqrt(alpha_bar_s) beta_t / (1 - alpha_bar_t),    b = sqrt(alpha_t) (1 - alpha_bar_s) / (1 - alpha_bar_t)

        Args:
            model_output: the prediction at x_t, the shape of x_t; twice its channels under a learned variance.
            timestep: t, one for all or integers of shape (B,).
            sample: x_t, shape (B, C, ...).
            generator: the source of the fresh noise; a list has one for each sample.
            return_dict: whether to return an [`EduDDPMSchedulerOutput`] or the tuple (x_s, predicted x_0).

        Raises:
            ValueError: shapes that do not match, a timestep out of range, or a variance type that lacks what it needs.
        """
        timestep = _read(timestep)
        model_output, predicted = self._split(model_output, sample)
        x_0 = self.clip(self.predict_original_sample(model_output, timestep, sample))
        a, b, sigma, _, _, log_small, log_large = self._look_up("reverse", timestep, sample)
        x_t = _upcast(sample)

        # At t = 0 and without fresh noise the stock classes draw nothing, and leave the generator to others as it was.
        if self._is_stochastic and not (isinstance(timestep, int) and timestep == 0):
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=model_output.dtype)
            if predicted is not None:
                last = torch.as_tensor(sigma == 0, device=predicted.device)  # x_s is the image
                sigma = torch.where(last, 0.0, self._learned_variance(predicted, log_small, log_large).sqrt())
            x_s = _upcast(noise).mul_(sigma)
        else:
            x_s = torch.zeros_like(x_t)
        x_s = _add(_add(x_s, a, x_0), b, x_t)

        x_s, x_0 = _cast(x_s, sample.dtype), _cast(x_0, sample.dtype)
        return EduDDPMSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0) if return_dict else (x_s, x_0)

    def invert_step(self, epsilon: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """x_t from x_s: the step of eta = 0 from t to s, solved for where it came from; float32 or better.

            x_t = sqrt(alpha_bar_t / alpha_bar_s) (x_s - sqrt(1 - alpha_bar_s) epsilon) + sqrt(1 - alpha_bar_t) epsilon

        exact for the epsilon that the model sees at x_t (Song et al. 2021, section 4.3, take the one at x_s for it);
        `diffusers_edu.schedulers.fitting.invert` finds it. Clipping is not inverted.

        Args:
            epsilon: the noise in x_t, shape (B, ...).
            timestep: t, to be reached; s is the grid's next below it. One for all or integers of shape (B,).
            sample: x_s, the shape of epsilon.
        """
        if epsilon.shape != sample.shape:
            raise ValueError(f"epsilon has shape {tuple(epsilon.shape)}, the sample {tuple(sample.shape)}")
        t = torch.as_tensor(timestep).cpu()
        s = self._previous[t]
        alpha_bar_t, alpha_bar_s = self._alpha_bar[t], torch.where(s >= 0, self._alpha_bar[s.clamp(min=0)], 1.0)
        ratio = (alpha_bar_t / alpha_bar_s).sqrt()
        weight = (1 - alpha_bar_t).sqrt() - ratio * (1 - alpha_bar_s).sqrt()
        x_s = _upcast(sample)
        ratio, weight = (c.to(x_s).reshape(-1, *[1] * (x_s.ndim - 1)) for c in (ratio, weight))
        return ratio * x_s + weight * epsilon.to(x_s.dtype)

    # ---------------------------------------------------------------------------------------------- the variational bound

    def prior_term(self, original_samples: torch.Tensor) -> torch.Tensor:
        """L_T = KL(q(x_T | x_0) || N(0, I)) of every image, in nats, shape (B,). Ho et al. 2020, eq. (5).

        x_T is at the first timestep of the grid, where sampling starts from pure noise.
        """
        x_0 = _upcast(original_samples)
        alpha_bar = self._alpha_bar[self.timesteps[0].cpu()].to(x_0)
        terms = alpha_bar * (x_0.square() - 1) - torch.log1p(-alpha_bar)
        return 0.5 * terms.flatten(1).sum(1)

    def bound_term(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        original_samples: torch.Tensor,
        bin_width: float | None = 2 / 255,
    ) -> torch.Tensor:
        """A term of the variational bound, of every image, in nats, shape (B,). Ho et al. 2020, eq. (5):

            L_{t-1} = KL(q(x_s | x_t, x_0) || p(x_s | x_t)),    and where s = -1,    L_0 = -log p(x_0 | x_t)

        The negative log-likelihood of an image is at most `prior_term` and the sum of these over the grid, in expectation over x_t.

        Args:
            model_output: the prediction at x_t; twice its channels under a learned variance.
            timestep: t, one for all or integers of shape (B,).
            sample: x_t, shape (B, ...), drawn by `add_noise` at t.
            original_samples: x_0, the shape of x_t.
            bin_width: the distance of neighbouring grey levels of x_0 in [-1, 1], 2 / 255 for 8 bits: L_0 is the probability of the
                bin, the outermost ones being unbounded (eq. 13). None for continuous data: L_0 is a density.

        Raises:
            ValueError: shapes that do not match, or eta = 0, which leaves q no variance.
        """
        if self.config.eta == 0:
            raise ValueError("with eta = 0 the posterior has no variance; the bound needs eta > 0")
        q = self.posterior(original_samples, timestep, sample)
        p = self.reverse(model_output, timestep, sample)
        squared_error = (q.mean - p.mean).square()
        divergence = 0.5 * (
            p.log_variance - q.log_variance + (q.log_variance - p.log_variance).exp() - 1 + squared_error / p.variance
        )
        x_0 = original_samples.to(p.mean.dtype)
        last = self._previous.to(x_0.device)[torch.as_tensor(timestep, device=x_0.device)] < 0
        last = last.reshape(-1, *[1] * (x_0.ndim - 1))
        terms = torch.where(last, -_log_likelihood(x_0, p, bin_width), divergence)
        return terms.flatten(1).sum(1)

    # ---------------------------------------------------------------------------------------------- helpers

    def _split(self, model_output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The prediction, shape of the sample, and under a learned variance the second half of the channels, else None."""
        kind, predicted = self.config.variance_type, None
        if kind in ("learned", "learned_range"):
            if model_output.shape[1] != 2 * sample.shape[1]:
                raise ValueError(f"variance_type is {kind!r}, but the model's output has no second half that holds it")
            model_output, predicted = model_output.chunk(2, dim=1)
        elif model_output.shape[1] == 2 * sample.shape[1]:
            model_output = model_output.chunk(2, dim=1)[0]  # of a model that has learned a variance, where another is wanted
        if kind == "analytic" and self.config.prediction_errors is None:
            raise ValueError("variance_type is 'analytic', which needs prediction_errors: measure them with fit_variance")
        if model_output.shape != sample.shape:
            raise ValueError(f"model_output has shape {tuple(model_output.shape)}, the sample {tuple(sample.shape)}")
        return model_output, predicted

    def _learned_variance(self, predicted: torch.Tensor, log_small: Any, log_large: Any) -> torch.Tensor:
        """sigma_t^2 from the second half of the model's channels. Nichol and Dhariwal 2021, eq. (15)."""
        predicted = _upcast(predicted)
        if self.config.variance_type == "learned":
            return self.config.eta**2 * predicted.clamp(min=1e-20)  # a network can miss it below 0
        share = (predicted + 1) / 2
        return torch.exp(share * log_large + (1 - share) * log_small)

    def _get_variance(self, t: int, predicted_variance: torch.Tensor | None = None) -> torch.Tensor:
        """sigma_t^2 of the step from t, under the name by which diffusers' own tests ask for it."""
        _, _, sigma, _, _, log_small, log_large = self._look_up("reverse", t, self._alpha_bar)
        if predicted_variance is not None:
            return self._learned_variance(predicted_variance, log_small, log_large)
        return sigma**2

    def _set_table(self, process: str, *coefficients: torch.Tensor, factors: tuple[int, ...]) -> None:
        """Tables of coefficients, each of shape (T,), by process; for t on the host also as rows of numbers.

        The `factors`, by which a tensor is multiplied first, stay float32 tensors of no dimension: a number becomes one at every use.
        """
        self._tables[process] = torch.stack(coefficients)
        columns = [x.float().unbind() if i in factors else x.tolist() for i, x in enumerate(coefficients)]
        self._rows[process] = list(zip(*columns, strict=True))
        self._copies = {key: copy for key, copy in self._copies.items() if key[0] != process}

    def _look_up(
        self, process: str, timestep: int | torch.Tensor, sample: torch.Tensor, other: torch.Tensor | None = None
    ) -> Any:
        """The coefficients at t: numbers for one t on the host, else tensors that broadcast over the sample.

        A value on the host is the fastest weight there is, but reading it waits for an accelerator and breaks a traced graph.

        Raises:
            ValueError: t is out of range, or its number is not 1 or B, or the `other` tensor is not of the sample's shape.
        """
        if other is not None and other.shape != sample.shape:
            raise ValueError(f"the shapes {tuple(sample.shape)} and {tuple(other.shape)} must be the same")
        if not isinstance(timestep, int):
            timestep = _read(timestep)
        if isinstance(timestep, int):
            rows = self._rows[process]
            if not 0 <= timestep < len(rows):
                raise ValueError(f"timestep is {timestep}; it must lie within 0 .. {len(rows) - 1}")
            if sample.dtype != torch.float64:
                return rows[timestep]
            timestep = torch.tensor(timestep)
        t = timestep.to(sample.device, torch.int64).reshape(-1)
        if len(t) not in (1, len(sample)):
            raise ValueError(f"there are {len(t)} timesteps for {len(sample)} samples; give one for each, or one for all")
        try:
            columns = self._copy(process, sample).index_select(1, t)
        except (IndexError, RuntimeError) as error:
            raise ValueError(f"timesteps must lie within 0 .. {len(self) - 1}") from error
        return columns.view(len(columns), -1, *[1] * (sample.ndim - 1)).unbind()

    def _copy(self, process: str, like: torch.Tensor) -> torch.Tensor:
        """The table on the sample's device, in float32 or better; kept, unless made while tracing."""
        key = (process, like.device, torch.promote_types(like.dtype, torch.float32))
        if key in self._copies:
            return self._copies[key]
        copy = self._tables[process].to(device=key[1], dtype=key[2])
        if not _is_traced(copy):
            self._copies[key] = copy
        return copy


def _weighted_sum(first: tuple, second: tuple) -> torch.Tensor:
    """c_1 x_1 + c_2 x_2."""
    return _add(first[0] * first[1], *second)


def _add(total: torch.Tensor, c: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """total + c x, in place where its dtype holds the sum: fresh memory costs more than arithmetic."""
    if x.dtype != total.dtype:
        return total + c * x
    return total.addcmul_(x, c) if isinstance(c, torch.Tensor) else total.add_(x, alpha=c)


def _log_likelihood(x: torch.Tensor, p: Gaussian, bin_width: float | None) -> torch.Tensor:
    """log p of every element: a density, or the probability of the bin of x in [-1, 1]. Ho et al. 2020, eq. (13)."""
    std = p.variance.sqrt()
    if bin_width is None:
        return -0.5 * ((x - p.mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    upper, lower = (x - p.mean + bin_width / 2) / std, (x - p.mean - bin_width / 2) / std
    # Where the bin is far above the mean, 1 - 1 cancels: the mirror image of it is far below.
    mirrored = x > p.mean
    log_upper = torch.special.log_ndtr(torch.where(mirrored, -lower, upper))
    log_lower = torch.special.log_ndtr(torch.where(mirrored, -upper, lower))
    inner = log_upper + torch.log(-torch.expm1((log_lower - log_upper).clamp(max=-1e-12)))
    below, above = torch.special.log_ndtr(upper), torch.special.log_ndtr(-lower)
    edge = 1 - bin_width / 4
    return torch.where(x < -edge, below, torch.where(x > edge, above, inner))


def _is_traced(x: torch.Tensor) -> bool:
    """Whether x has no values yet: under torch.compile, or a fake tensor."""
    return type(x) is not torch.Tensor or torch.compiler.is_compiling()


def _read(timestep: int | torch.Tensor) -> int | torch.Tensor:
    """t as an int, the fastest there is, where that can be had without waiting for a device or breaking a traced graph."""
    if torch.compiler.is_compiling():  # where an int would be a constant: a graph for every t
        return timestep if isinstance(timestep, torch.Tensor) else torch.full((), timestep, dtype=torch.int64)
    if not isinstance(timestep, torch.Tensor):
        return int(timestep)
    if timestep.ndim == 0 and timestep.is_cpu and type(timestep) is torch.Tensor:
        return int(timestep)
    return timestep


def _upcast(x: torch.Tensor) -> torch.Tensor:
    """float32 or better."""
    return x if x.dtype == torch.float32 else x.to(torch.promote_types(x.dtype, torch.float32))


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x if x.dtype == dtype else x.to(dtype)
