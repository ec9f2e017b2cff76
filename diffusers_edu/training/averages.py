"""Exponential moving averages of the weights: with warm-up, or of power-function profiles whose length is chosen afterwards.

Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models" (https://arxiv.org/abs/2312.02696), section 3
and appendix C.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..errors import UsageError
from .configuration import TrainingConfig

SNAPSHOTS = "ema_snapshots"
TRACKED = (0.05, 0.10)  # the two lengths that are averaged in training; the paper's


def exponent(sigma_rel: float) -> float:
    """gamma of the profile (t / t_end)^gamma whose standard deviation is `sigma_rel` of the run.

    The root of sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), for sigma_rel in (0, 0.289).
    """
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class PowerAverage(EMAModel):
    """The average of all weights so far, those of step t weighted by t^gamma.

    Args:
        parameters: to follow.
        sigma_rel: the profile's standard deviation, as a share of the run so far.
        foreach: update all parameters by one call.
    """

    def __init__(self, parameters: list[nn.Parameter], sigma_rel: float, foreach: bool = True):
        super().__init__(parameters, foreach=foreach)
        self.exponent = exponent(sigma_rel)

    def get_decay(self, optimization_step: int) -> float:
        return (1 - 1 / optimization_step) ** (self.exponent + 1)


def warmed_up(parameters: list[nn.Parameter], config: TrainingConfig, foreach: bool = True) -> EMAModel:
    """The average that forgets the faster the younger the run is."""
    return EMAModel(
        parameters,
        decay=config.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=config.ema_inv_gamma,
        power=config.ema_power,
        foreach=foreach,
    )


def reshard(model: nn.Module) -> None:
    """Let a sharded model forget the whole weights that it gathered for a forward pass: it would go on with them."""
    for module in model.modules():  # each group of shards has one of its own
        if isinstance(module, FSDPModule):
            module.reshard()


class Averages:
    """The moving averages of a run: none, one with warm-up, or two of power-function profiles.

    Args:
        model: its parameters are followed; they may be sharded.
        config: `use_ema`, and the flags that begin with `ema_`.
    """

    def __init__(self, model: nn.Module, config: TrainingConfig):
        self.model, self.parameters = model, list(model.parameters())
        self.members: dict[str, EMAModel] = {}
        foreach = not isinstance(model, FSDPModule)  # shards have no such calls
        if config.use_ema and config.ema_sigma_rel is None:
            self.members["ema"] = warmed_up(self.parameters, config, foreach)
        elif config.use_ema:
            self.members = {f"{sigma:.3f}": PowerAverage(self.parameters, sigma, foreach) for sigma in TRACKED}
        # The one that stands for what will be saved while training goes on: of two, that of the nearer length.
        sigma_rel = config.ema_sigma_rel or 0.0
        nearest = sorted(self.members, key=lambda name: 0.0 if name == "ema" else abs(float(name) - sigma_rel))
        self.shown = nearest[0] if nearest else None

    def step(self) -> None:
        """Take in the weights after an optimiser step."""
        for average in self.members.values():
            average.step(self.parameters)

    @contextmanager
    def applied(self, name: str | None) -> Iterator[None]:
        """The model with the weights of an average in place of its own; with None, with its own."""
        if name is None:
            yield
            return
        reshard(self.model)
        kept = [parameter.detach().clone() for parameter in self.parameters]
        self.members[name].copy_to(self.parameters)
        try:
            yield
        finally:
            reshard(self.model)
            for parameter, tensor in zip(self.parameters, kept, strict=True):
                parameter.data.copy_(tensor)

    def restore(self, name: str, step: int) -> None:
        """Take the model's present weights as those of an average after `step` steps."""
        average = self.members[name]
        average.shadow_params = [parameter.detach().clone() for parameter in self.parameters]
        average.optimization_step = step


def snapshot_steps(config: TrainingConfig) -> set[int]:
    """The steps after which the power-function averages are kept."""
    if not config.use_ema or config.ema_sigma_rel is None:
        return set()
    count = min(config.ema_snapshots, config.max_train_steps)
    return {round((k + 1) * config.max_train_steps / count) for k in range(count)}


def save_snapshot(run: Path, step: int, name: str, weights: dict[str, torch.Tensor]) -> None:
    """Keep an average, whole or not at all, as `ema_snapshots/<step>-<sigma_rel>.safetensors`.

    Raises:
        UsageError: it cannot be written (a full disk).
    """
    folder = run / SNAPSHOTS
    aside = folder / f"saving-{step}-{name}"
    try:
        folder.mkdir(exist_ok=True)
        save_file(weights, aside)
        aside.replace(folder / f"{step}-{name}.safetensors")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{aside} cannot be written ({error}); make room, and the same command goes on") from error


def snapshots(run: Path) -> list[tuple[int, float, Path]]:
    """(step, sigma_rel, file) of the averages kept, in the order of their steps."""
    found = []
    for path in (run / SNAPSHOTS).glob("*-*.safetensors"):
        step, sigma = path.stem.split("-", 1)
        found.append((int(step), float(sigma), path))
    return sorted(found)


def discard_snapshots(run: Path, step: int) -> None:
    """Remove those of an earlier attempt from beyond the step that this one starts at, and what was left half written."""
    for half in (run / SNAPSHOTS).glob("saving-*"):
        half.unlink()
    for later, _, path in snapshots(run):
        if later > step:
            path.unlink()


def inner_product(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """The integral of the product of two profiles, each of integral 1 and ending at t_a and t_b.

    Of p(t) = (gamma + 1) t^gamma / t_end^(gamma + 1) on [0, t_end]. Arrays broadcast.
    """
    early = np.minimum(t_a, t_b)
    return (
        (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
        * (early / t_a) ** gamma_a * (early / t_b) ** gamma_b * early / (t_a * t_b)
    )  # fmt: skip


def mixture(steps: list[int], sigmas: list[float], sigma_rel: float, end: int) -> np.ndarray:
    """The weights of the snapshots whose sum is nearest, by least squares, to the profile of `sigma_rel` that ends at `end`.

    They need not be positive.
    """
    t, gamma = np.array(steps, np.float64), np.array([exponent(sigma) for sigma in sigmas])
    gram = inner_product(t[:, None], gamma[:, None], t[None, :], gamma[None, :])
    target = inner_product(t, gamma, np.array(end), np.array(exponent(sigma_rel)))
    return np.linalg.lstsq(gram, target, rcond=None)[0]


def synthesise(run: Path, sigma_rel: float) -> dict[str, torch.Tensor]:
    """The average of a run's weights with a profile of any length, from the snapshots that were kept in training.

    Args:
        run: its folder.
        sigma_rel: the profile's standard deviation, as a share of the run; 0.01 to 0.25. What lies far from the tracked 0.05 and 0.10
            is less exact, the more so the fewer snapshots there are.

    Raises:
        UsageError: no snapshots are there, or the length is out of range.
    """
    if not 0.01 <= sigma_rel <= 0.25:
        raise UsageError(f"a sigma_rel of {sigma_rel}: it must lie between 0.01 and 0.25")
    found = snapshots(run)
    if not found:
        raise UsageError(f"{run} has no averages to choose from; train it with --ema_sigma_rel")
    weights = mixture([step for step, _, _ in found], [sigma for _, sigma, _ in found], sigma_rel, found[-1][0])
    total: dict[str, torch.Tensor] = {}
    for weight, (_, _, path) in zip(weights, found, strict=True):
        try:
            snapshot = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{path} is damaged; remove it, or train again") from error
        for name, tensor in snapshot.items():
            part = tensor.double() * weight
            total[name] = total[name] + part if name in total else part
    return {name: tensor.float() for name, tensor in total.items()}
