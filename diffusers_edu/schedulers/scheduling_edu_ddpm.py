"""The forward and the reverse process of denoising diffusion, in discrete time.

Notation, as in Ho et al. 2020, "Denoising Diffusion Probabilistic Models" (https://arxiv.org/abs/2006.11239):

    alpha_t = 1 - beta_t,    alpha_bar_t = prod_{s <= t} alpha_s,    alpha_bar_{-1} = 1 (the data)
    forward   q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)                                eq. (4)
    reverse   p(x_s | x_t) = N(posterior mean of q(x_s | x_t, x_0 = prediction), sigma_t^2 I)             eq. (6), (7)

Timesteps count from 0 (the least noise) to T - 1, as everywhere in diffusers. On a sub-grid of the T timesteps, s is the
grid's next timestep below t, and alpha_t, beta_t become alpha_{t|s} = alpha_bar_t / alpha_bar_s and 1 - alpha_{t|s}.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor

logger = logging.get_logger(__name__)

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")


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
        return torch.sigmoid(torch.linspace(-6, 6, count)) * (beta_end - beta_start) + beta_start
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
    alpha_bar = ((root - last) * first / (first - last)) ** 2
    return 1.0 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


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
            ones (Nichol and Dhariwal 2021, eq. 15).
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
            x_0), to 1, all of sigma_t (DDPM). A part of the configuration and no argument of `step`, to which Stable Diffusion
            passes `eta=0.0` wherever there is one.

    Raises:
        ValueError: an unknown schedule, spacing or prediction type, fewer than one timestep, or eta outside [0, 1].
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
            "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"
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
            self.betas = torch.as_tensor(np.asarray(trained_betas), dtype=torch.float32)
        else:
            self.betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end)
        if rescale_betas_zero_snr:
            self.betas = rescale_zero_terminal_snr(self.betas)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)

        # 1 - alpha_bar_t cancels near the data: float64 here, whatever the sample's dtype later.
        self._alpha_bar = torch.cumprod(1.0 - self.betas.double(), dim=0)
        self._tables = {"forward": torch.stack([self._alpha_bar.sqrt(), (1 - self._alpha_bar).sqrt()])}
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self._set_grid(torch.arange(len(self.betas) - 1, -1, -1))

    def __len__(self) -> int:
        """T."""
        return len(self.betas)

    # ---------------------------------------------------------------------------------------------- forward process

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Draw x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon. Ho et al. 2020, eq. (4).

        Args:
            original_samples: x_0, shape (B, ...).
            noise: epsilon ~ N(0, I), the shape of x_0.
            timesteps: t in 0 .. T-1, integers of shape (B,), or one for all.

        Returns: x_t, shape and dtype of x_0.
        """
        signal, sigma = self._look_up("forward", timesteps, original_samples)
        x_0, epsilon = _upcast(original_samples), _upcast(noise)
        return (signal * x_0 + sigma * epsilon).to(original_samples.dtype)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """v_t = sqrt(alpha_bar_t) epsilon - sqrt(1 - alpha_bar_t) x_0. Salimans and Ho 2022, section 4.

        Args and shapes as in `add_noise`; `sample` is x_0. Returns: v_t, shape and dtype of x_0.
        """
        signal, sigma = self._look_up("forward", timesteps, sample)
        x_0, epsilon = _upcast(sample), _upcast(noise)
        return (signal * epsilon - sigma * x_0).to(sample.dtype)

    # ---------------------------------------------------------------------------------------------- reverse process

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
        T = len(self.betas)
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give set_timesteps either num_inference_steps or timesteps")
        if timesteps is not None:
            grid = torch.as_tensor(timesteps, dtype=torch.int64)
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
        T = len(self.betas)
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
        every_t = torch.arange(len(self.betas))
        index = torch.searchsorted(grid.flip(0).contiguous(), every_t) - 1
        self._previous = torch.where(index >= 0, grid.flip(0)[index], -1)
        self._tables["posterior"] = self._reverse_coefficients(self._previous, eta=1.0)
        self._tables["reverse"] = self._reverse_coefficients(self._previous, eta=self.config.eta)
        self._copies: dict[tuple, torch.Tensor] = {}  # of the tables, by device and dtype

    def _reverse_coefficients(self, s: torch.Tensor, eta: float) -> torch.Tensor:
        """a, b, beta_tilde and beta of the step x_s = a x_0 + b x_t + eta sigma z from every t to its s: float64, shape (4, T).

        Song et al. 2021 (https://arxiv.org/abs/2010.02502), eq. (12) and (16): x_s is the image at level s with as much of x_t's
        noise as leaves room for the fresh noise. With eta = 1 this is Ho et al. 2020, eq. (7):
        a = sqrt(alpha_bar_s) beta / (1 - alpha_bar_t), b = sqrt(alpha) (1 - alpha_bar_s) / (1 - alpha_bar_t).
        """
        alpha_bar_t = self._alpha_bar
        alpha_bar_s = torch.where(s >= 0, self._alpha_bar[s.clamp(min=0)], 1.0)
        beta = 1 - alpha_bar_t / alpha_bar_s
        beta_tilde = (1 - alpha_bar_s) / (1 - alpha_bar_t) * beta
        b = ((1 - alpha_bar_s - eta**2 * beta_tilde).clamp(min=0) / (1 - alpha_bar_t)).sqrt()
        a = alpha_bar_s.sqrt() - b * alpha_bar_t.sqrt()
        return torch.stack([a, b, beta_tilde, torch.where(s >= 0, beta, 0.0)])

    def previous_timestep(self, timestep: int | torch.Tensor) -> int | torch.Tensor:
        """s: the next timestep of the grid below t, -1 where there is none (x_{-1} is the image). The type of t."""
        if isinstance(timestep, torch.Tensor):
            return self._previous.to(timestep.device)[timestep]
        return int(self._previous[timestep])

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """The sample as it is: x_t already has the scale that the model was trained on."""
        return sample

    def predict_original_sample(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        """x_0 as the model sees it, from its output at x_t, before any clipping; float32 or better.

        `epsilon`: (x_t - sqrt(1 - alpha_bar_t) epsilon) / sqrt(alpha_bar_t), Ho et al. 2020, eq. (15);
        `v_prediction`: sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v, Salimans and Ho 2022, section 4.

        Raises:
            ValueError: `epsilon` where alpha_bar_t is 0 (zero terminal SNR): noise alone says nothing of the image. Timesteps
                of shape (B,) on an accelerator are not checked.
        """
        signal, sigma = self._look_up("forward", timestep, sample)
        x_t, output = _upcast(sample), _upcast(model_output)
        if self.config.prediction_type == "sample":
            return output
        if self.config.prediction_type == "v_prediction":
            return signal * x_t - sigma * output
        # On an accelerator the check would wait for the device; there the result is not finite.
        if (signal == 0.0) if isinstance(signal, float) else (signal.device.type == "cpu" and bool((signal == 0).any())):
            raise ValueError(
                "alpha_bar is 0 at this timestep, where a prediction of epsilon determines no image: "
                "with rescale_betas_zero_snr use prediction_type 'v_prediction' or 'sample'"
            )
        return (x_t - sigma * output) / signal

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
        signal, sigma = self._look_up("forward", timestep, sample)
        epsilon = (_upcast(sample) - signal * x_0) / sigma
        return epsilon if to == "epsilon" else signal * epsilon - sigma * x_0

    def posterior(
        self, original_samples: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean and the variance of q(x_s | x_t, x_0), s the grid's next timestep below t. Ho et al. 2020, eq. (6) and (7).

        Args:
            original_samples: x_0, shape (B, ...).
            timestep: t, one for all or integers of shape (B,).
            sample: x_t, the shape of x_0.

        Returns: the mean, shape (B, ...), and beta_tilde, which broadcasts over it; both float32 or better. Where s = -1 these are x_0
            and 0.
        """
        a, b, beta_tilde, _ = self._look_up("posterior", timestep, sample)
        mean = a * _upcast(original_samples) + b * _upcast(sample)
        return mean, torch.as_tensor(beta_tilde, dtype=mean.dtype, device=mean.device)

    def snr(self, timestep: int | torch.Tensor) -> torch.Tensor:
        """The signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t) (Kingma et al. 2021, https://arxiv.org/abs/2107.00630, eq. 2).

        float64 on the host; the shape of t.
        """
        alpha_bar = self._alpha_bar[torch.as_tensor(timestep, device="cpu")]
        return alpha_bar / (1 - alpha_bar)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> EduDDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Draw x_s ~ p(x_s | x_t) = N(a x_0 + b x_t, eta^2 sigma_t^2 I), x_0 predicted by the model. With eta = 1, Ho et al. 2020,
        eq. (6) and (7):

            a = sqrt(alpha_bar_s) beta_t / (1 - alpha_bar_t),    b = sqrt(alpha_t) (1 - alpha_bar_s) / (1 - alpha_bar_t)

        Args:
            model_output: the prediction at x_t, the shape of x_t; twice its channels under a learned variance.
            timestep: t, one for all or integers of shape (B,).
            sample: x_t, shape (B, C, ...).
            generator: the source of the fresh noise; a list has one for each sample.
            return_dict: whether to return an [`EduDDPMSchedulerOutput`] or the tuple (x_s, predicted x_0).

        Raises:
            ValueError: shapes that do not match.
        """
        predicted_variance = None
        if self.config.variance_type in ("learned", "learned_range") and model_output.shape[1] == 2 * sample.shape[1]:
            model_output, predicted_variance = model_output.chunk(2, dim=1)
        if model_output.shape != sample.shape:
            raise ValueError(f"model_output has shape {tuple(model_output.shape)}, the sample {tuple(sample.shape)}")

        x_0 = self._bound(self.predict_original_sample(model_output, timestep, sample))
        a, b, beta_tilde, beta = self._look_up("reverse", timestep, sample)
        x_s = a * x_0 + b * _upcast(sample)

        # At t = 0 and without fresh noise the stock classes draw nothing, and leave the generator to others as it was.
        if self.config.eta > 0 and not (_is_host_scalar(timestep) and timestep == 0):
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=model_output.dtype)
            sigma = self._variance(beta_tilde, beta, predicted_variance) ** 0.5
            x_s = x_s + self.config.eta * sigma * _upcast(noise)

        x_s, x_0 = x_s.to(sample.dtype), x_0.to(sample.dtype)
        return EduDDPMSchedulerOutput(prev_sample=x_s, pred_original_sample=x_0) if return_dict else (x_s, x_0)

    def _get_variance(self, t: int, predicted_variance: torch.Tensor | None = None) -> torch.Tensor:
        """sigma_t^2 of the step from t, under the name by which diffusers' own tests ask for it."""
        _, _, beta_tilde, beta = self._look_up("reverse", t, torch.empty(0))
        return torch.as_tensor(self._variance(beta_tilde, beta, predicted_variance))

    def _variance(self, beta_tilde, beta, predicted: torch.Tensor | None):
        """sigma_t^2 by `variance_type`; 0 where s = -1, so that no noise is left in the image."""
        kind = self.config.variance_type
        if kind in ("fixed_large", "fixed_large_log"):
            return beta
        if kind not in ("learned", "learned_range"):
            return beta_tilde
        if predicted is None:
            raise ValueError(f"variance_type is {kind!r}, but the model's output has no second half that holds it")
        predicted = _upcast(predicted)
        last = torch.as_tensor(beta, device=predicted.device) == 0
        if kind == "learned":
            return torch.where(last, 0.0, predicted)
        share = (predicted + 1) / 2
        log_large, log_small = (
            torch.as_tensor(v, dtype=predicted.dtype, device=predicted.device).clamp(min=1e-20).log()
            for v in (beta, beta_tilde)
        )
        return torch.where(last, 0.0, torch.exp(share * log_large + (1 - share) * log_small))

    def _look_up(self, process: str, timestep: int | torch.Tensor, sample: torch.Tensor) -> list:
        """The coefficients at t: floats for one t on the host, else tensors that broadcast over the sample."""
        table = self._tables[process]
        if not isinstance(timestep, torch.Tensor) or _is_host_scalar(timestep):
            return table[:, int(timestep)].tolist()
        key = (process, sample.device, torch.promote_types(sample.dtype, torch.float32))
        if key not in self._copies:
            self._copies[key] = table.to(*key[1:])
        columns = self._copies[key][:, timestep.to(sample.device)]
        return list(columns.reshape(len(table), -1, *[1] * (sample.ndim - 1)))

    def _bound(self, x_0: torch.Tensor) -> torch.Tensor:
        """Dynamic thresholding (Saharia et al. 2022, section 2.3) or clipping of the predicted image, if either is on."""
        if self.config.thresholding:
            quantile = torch.quantile(x_0.abs().flatten(1), self.config.dynamic_thresholding_ratio, dim=1)
            bound = quantile.clamp(1, self.config.sample_max_value).reshape(-1, *[1] * (x_0.ndim - 1))
            return x_0.clamp(-bound, bound) / bound
        if self.config.clip_sample:
            return x_0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return x_0


def _is_host_scalar(timestep: int | torch.Tensor) -> bool:
    return not isinstance(timestep, torch.Tensor) or (timestep.ndim == 0 and timestep.device.type == "cpu")


def _upcast(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
