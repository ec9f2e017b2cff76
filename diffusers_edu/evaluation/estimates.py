"""A measured figure with its interval, and what may be said of two of them, or of one over several seeds."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binomtest, t

LEVEL = 0.95  # of every interval


@dataclass(frozen=True)
class Estimate:
    """A measured figure: its value, a 95 % interval (each function says over what), and the number of images it is of.

    Args:
        value, interval, n: as said.
        same_images: the interval is over images that another run is measured on too, as held-out ones are. Samples are its own.
        limits: what the figure cannot pass, of a share 0 and 1.
    """

    value: float
    interval: tuple[float, float]
    n: int
    same_images: bool = False
    limits: tuple[float, float] = (-math.inf, math.inf)

    def as_json(self) -> dict:
        return {"value": self.value, "interval": list(self.interval), "n": self.n}

    def __mul__(self, factor: float) -> "Estimate":
        """In other units, or a part of it."""
        low, high = sorted(bound * factor for bound in self.interval)
        return Estimate(self.value * factor, (low, high), self.n, self.same_images)

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The difference of two figures that were measured apart: their intervals' arms add up as squares.

        Zou and Donner 2008 (https://doi.org/10.1002/sim.3095), eq. (10), which also serves intervals with arms of different lengths.

        Raises:
            ValueError: they are of different numbers of images. Distances fall as that number grows, whatever the model.
        """
        if self.n != other.n:
            raise ValueError(f"a figure of {self.n} images cannot be compared with one of {other.n}: measure both on as many")
        value = self.value - other.value
        down = np.hypot(self.value - self.interval[0], other.interval[1] - other.value)
        up = np.hypot(self.interval[1] - self.value, other.value - other.interval[0])
        return Estimate(value, (value - float(down), value + float(up)), self.n, self.same_images and other.same_images)

    def __add__(self, other: "Estimate") -> "Estimate":
        """The sum of two figures that were measured apart; as `-`."""
        return self - other * -1

    def root(self) -> "Estimate":
        """The square root, of a figure that is not negative."""
        low, high = (max(bound, 0.0) ** 0.5 for bound in self.interval)
        return Estimate(self.value**0.5, (low, high), self.n, self.same_images)


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """One figure of several runs: their mean, with Student's interval over runs, which holds the chance of training too.

    It is not narrower than what the runs' own intervals come to, though a few runs may agree by chance. What an interval over the same
    images adds does not become less with their number: the arms add up as squares. Of a single run, its own. `n` stays the number of
    images of each.

    Raises:
        ValueError: none, or of different numbers of images.
    """
    if len({estimate.n for estimate in estimates}) != 1:
        raise ValueError(f"runs of {[estimate.n for estimate in estimates]} images have no mean: measure all on as many")
    if len(estimates) == 1:
        return estimates[0]
    values = np.array([estimate.value for estimate in estimates])
    mean = float(values.mean())
    arm = float(t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    own = [np.abs(np.array(estimate.interval) - estimate.value) for estimate in estimates]  # the arms of each run
    down, up = np.mean(own, axis=0)
    if all(estimate.same_images for estimate in estimates):
        down, up = np.hypot(arm, down), np.hypot(arm, up)
    else:
        down, up = (max(arm, one / len(values) ** 0.5) for one in (down, up))
    low, high = estimates[0].limits
    return Estimate(mean, (max(low, mean - float(down)), min(high, mean + float(up))), estimates[0].n)


def mean(values: torch.Tensor, same_images: bool = False) -> Estimate:
    """The mean of one value an image, (N,), with 1.96 standard errors; `same_images`: see [`Estimate`]."""
    centre, error = values.double().mean().item(), 1.96 * values.double().std().item() / len(values) ** 0.5
    return Estimate(centre, (centre - error, centre + error), len(values), same_images)


def share(count: int, of: int, together: float = 1.0, same_images: bool = False) -> Estimate:
    """A share with its Wilson interval.

    Args:
        count: of the images.
        of: all of them.
        together: how many are counted, or not, together: the interval is as wide as of so many times fewer.
        same_images: see [`Estimate`].
    """
    interval = binomtest(round(count / together), round(of / together)).proportion_ci(LEVEL, method="wilson")
    return Estimate(count / of, (float(interval.low), float(interval.high)), of, same_images, (0.0, 1.0))


def bootstrap(samples: torch.Tensor, seed: int, resamples: int) -> Iterator[torch.Tensor]:
    """Draws of as many samples with replacement."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(resamples):
        yield samples[torch.randint(len(samples), (len(samples),), generator=generator)]


def around(value: float, draws: Sequence[float], n: int) -> Estimate:
    """The value +- 1.96 standard deviations of its draws."""
    error = 1.96 * float(np.std(draws))
    return Estimate(value, (value - error, value + error), n)
