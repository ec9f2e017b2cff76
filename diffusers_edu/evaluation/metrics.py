"""How far samples are from data, on features of shape (N, d): each figure with an interval and the number of samples.

Pixels in [0, 1] are features good enough for small grey images; larger images want a network's. Whatever the features, a
figure means little without its floor: the same figure for the training images themselves, against the held-out ones.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.dummy import DummyClassifier
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from ..errors import UsageError
from .estimates import Estimate, around, bootstrap, share
from .features import INCEPTION
from .sharding import by_one, my_part, whole

MOST = 10_000  # images that samples are held against
NATURAL = 0.05  # the share of new images that are nearer to an image trained on than is usual
ROUNDING = 1e-4  # of a distance of 0; two images that differ by one grey level of 256 in one value are 0.004 apart
CHUNK = 5_000  # images between which and others distances are taken at a time


class Precomputed(nn.Module):
    """Features that are there already, in the place of a network that would make them: (N, d) to itself."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


class Reference:
    """What samples are held against: images held out and images trained on, by their features; 10,000 of each, where there are more.

    Under `accelerate launch` features are shared out over the processes, each of which must ask as often as the others.

    Args:
        train, held_out: with a length, `images`, float (N, C, H, W) in [0, 1], `labels`, int64 (N,) or None, `part(indices)` and
            `some(count)`.
        features: (N, C, H, W) in [0, 1] to (N, d); see [`features.make_features`].
        seed: of the bootstrap and the subsets.
    """

    def __init__(self, train: Any, held_out: Any, features: Callable[[torch.Tensor], torch.Tensor], seed: int = 0):
        self.features, self.seed, self.everything = features, seed, train
        train, self.data = train.some(MOST), held_out.some(MOST)
        self.train, self.held_out = self.of(train.images), self.of(self.data.images)
        self.labels, self.held_out_labels = train.labels, self.data.labels

    def of(self, images: torch.Tensor) -> torch.Tensor:
        """Their features."""
        mine = my_part(len(images))
        return whole([self.features(images[mine.start : mine.stop])] if mine else [])

    def measure(self, samples: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Estimate]:
        """Every figure of samples, float (N, C, H, W) in [0, 1].

        `train_on_synthetic` is among them where the data has classes: `labels`, int64 (N,), of samples that have one; else they are
        labelled by a judge, a classifier trained on the training images. `memorised` is of pixels, whatever the features, and of all
        training images.

        Raises:
            ValueError: samples of another shape; a `UsageError`, where they hold values that are not finite.
        """
        if not bool(samples.isfinite().all()):
            raise UsageError(
                "the samples hold values that are not finite: the model has diverged, or its precision is too low for it"
            )
        features = self.of(samples)

        def figures() -> dict[str, Estimate]:
            found = self.compared(features) | self.lesson(features, labels)
            return {**found, "memorised": memorised(samples, self.everything, self.data)}

        return by_one(figures)

    def floor(self, count: int) -> dict[str, Estimate]:
        """The figures of as many training images in the place of samples, or of all where they are fewer: what a model can hope for."""
        chosen = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(self.seed))[:count]
        real, labels = self.train[chosen], None if self.labels is None else self.labels[chosen]
        return by_one(lambda: self.compared(real) | self.lesson(real, labels))

    def compared(self, features: torch.Tensor) -> dict[str, Estimate]:
        """The figures of [`measure`]; the kernel distance on Inception's features as it is published, elsewhere standardised."""
        standardise = getattr(self.features, "name", None) != INCEPTION
        return measure(features, self.held_out, self.seed, standardise)

    def lesson(self, features: torch.Tensor, labels: torch.Tensor | None) -> dict[str, Estimate]:
        """`train_on_synthetic`, where the data has classes."""
        if self.labels is None or self.held_out_labels is None:
            return {}
        if labels is None:
            labels = torch.from_numpy(classifier(self.train, self.labels).predict(features[:MOST].numpy()))
        lesson = features[:MOST], labels[:MOST]  # its time grows with the square of their number
        return {"train_on_synthetic": train_on_synthetic(*lesson, self.held_out, self.held_out_labels)}


def measure(samples: torch.Tensor, reference: torch.Tensor, seed: int = 0, standardise: bool = True) -> dict[str, Estimate]:
    """Every figure that asks for no more than the features of samples and of held-out data, both float (N, d).

    Args:
        samples, reference: features.
        seed: of the bootstrap and the subsets.
        standardise: see [`kernel_distance`].

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    if samples.ndim != 2 or reference.ndim != 2 or samples.shape[1] != reference.shape[1]:
        raise ValueError(f"features of shapes {tuple(samples.shape)} and {tuple(reference.shape)}; both must be (N, d)")
    if not bool(samples.isfinite().all()):
        raise ValueError("the samples hold values that are not finite")
    precision, recall = precision_recall(samples, reference)
    density, coverage = density_coverage(samples, reference, seed)
    return {
        "frechet_distance": frechet_distance(samples, reference, seed),
        "kernel_distance": kernel_distance(samples, reference, seed, standardise=standardise),
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
        "diversity": diversity(samples, reference, seed),
        "two_sample_accuracy": two_sample_accuracy(samples, reference, seed),
    }


def classifier(features: torch.Tensor, labels: torch.Tensor) -> Any:
    """A support vector machine with radial kernels; of a single class, that class."""
    kind = SVC() if len(labels.unique()) > 1 else DummyClassifier(strategy="most_frequent")
    return kind.fit(features.numpy(), labels.numpy())


def train_on_synthetic(
    samples: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor, reference_labels: torch.Tensor
) -> Estimate:
    """How often a classifier that has seen samples alone is right about data, Wilson interval.

    Ravuri and Vinyals 2019 (https://arxiv.org/abs/1905.10887), section 3: samples that miss classes, or the variety within one,
    teach it less. Compare with the floor, where it has learned from as many real images.

    Args:
        samples, reference: features (N, d).
        labels, reference_labels: their classes, int64 (N,).
    """
    right = classifier(samples, labels).predict(reference.numpy()) == reference_labels.numpy()
    return share(int(right.sum()), len(reference), same_images=True)


def frechet_distance(samples: torch.Tensor, reference: torch.Tensor, seed: int = 0, resamples: int = 50) -> Estimate:
    """|mu_1 - mu_2|^2 + tr(C_1) + tr(C_2) - 2 tr((C_1 C_2)^(1/2)), the distance of two Gaussians fitted to the features.

    Heusel et al. 2017 (https://arxiv.org/abs/1706.08500), eq. (6). The value depends on N. The interval is the value +- 1.96
    standard errors by the bootstrap over samples, whose own values are biased upwards and so give no interval directly.
    """
    mean_reference, root_reference = moments(reference)

    def distance(of: torch.Tensor) -> float:
        mean, root = moments(of)
        overlap = torch.linalg.svdvals(root @ root_reference.T).sum()
        spread = root.square().sum() + root_reference.square().sum()
        return ((mean - mean_reference).square().sum() + spread - 2 * overlap).item()

    value = distance(samples)
    draws = [distance(draw) for draw in bootstrap(samples, seed, resamples)]
    return around(value, draws, len(samples))


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean, shape (d,), and a root R of the covariance, C = R^T R, shape (min(N, d), d); float64.

    With roots, tr((C_1 C_2)^(1/2)) is the sum of the singular values of R_1 R_2^T, a matrix no larger than the number of images:
    torchmetrics' FrechetInceptionDistance takes the eigenvalues of the d x d product instead, hours where d is thousands of pixels.
    """
    features = features.double()
    centred = (features - features.mean(0)) / (len(features) - 1) ** 0.5
    return features.mean(0), torch.linalg.qr(centred, mode="r").R if len(features) > features.shape[1] else centred


def kernel_distance(
    samples: torch.Tensor, reference: torch.Tensor, seed: int = 0, subsets: int = 100, standardise: bool = True
) -> Estimate:
    """Squared maximum mean discrepancy under the kernel (x . y / d + 1)^3, unbiased: 0 for equal distributions.

    Binkowski et al. 2018 (https://arxiv.org/abs/1801.01401). The mean over random subsets of half the smaller set, 1,000 at most; the
    interval is +- 1.96 standard deviations of the subsets' values, near 0 wider than the mean's own.

    Args:
        samples, reference: features (N, d).
        seed: of the subsets.
        subsets: how many.
        standardise: shift and scale both, so that the reference has mean 0 and mean square 1. The kernel's 1 sets a scale: of features
            that are small next to it, pixels for one, it sees the mean alone, and takes the mean image for all the data. What is
            biased by it falls with N, and is lost in the interval from 100 images on.
    """
    if standardise:
        mean = reference.double().mean(0)
        scale = (reference - mean).square().mean().sqrt()
        samples, reference = (samples - mean) / scale, (reference - mean) / scale
    size = min(len(samples) // 2, len(reference) // 2, 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that all features are kept in memory, where they are already
        # Every process has all of them: there is nothing to synchronise.
        options: dict[str, Any] = {"subsets": subsets, "subset_size": size, "sync_on_compute": False}
        metric = KernelInceptionDistance(Precomputed(samples.shape[1]), **options)
    metric.update(reference.double(), real=True)
    metric.update(samples.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        value, std = (x.item() for x in metric.compute())
    return Estimate(value, (value - 1.96 * std, value + 1.96 * std), len(samples))


def precision_recall(samples: torch.Tensor, reference: torch.Tensor, k: int = 3) -> tuple[Estimate, Estimate]:
    """The share of samples within the data's manifold, and of data within the samples', each a union of k-NN balls.

    Kynkäänniemi et al. 2019 (https://arxiv.org/abs/1904.06991), eq. (1) and (2). Wilson intervals.
    """
    precision, recall = within_balls(samples, reference, k).any(1), within_balls(reference, samples, k).any(1)
    return share(int(precision.sum()), len(samples)), share(int(recall.sum()), len(reference), same_images=True)


def density_coverage(samples: torch.Tensor, reference: torch.Tensor, seed: int = 0, k: int = 5) -> tuple[Estimate, Estimate]:
    """The mean number of the data's k-NN balls that a sample lies in, over k, and the share of these balls that hold a sample.

    Naeem et al. 2020 (https://arxiv.org/abs/2002.09797), eq. (5) and (6): about 1, and for equal distributions with as many samples as
    data 1 - 2^-k or so. One outlier of the data, whose ball is wide, does not make them high, as it does precision and recall.
    Density has a bootstrap interval, coverage Wilson's.
    """
    within = within_balls(samples, reference, k)
    density = within.double().sum(1) / k
    draws = [draw.mean().item() for draw in bootstrap(density, seed, resamples=50)]
    value = density.mean().item()
    coverage = share(int(within.any(0).sum()), len(reference), same_images=True)
    return around(value, draws, len(samples)), coverage


def two_sample_accuracy(samples: torch.Tensor, reference: torch.Tensor, seed: int = 0) -> Estimate:
    """How often the nearest neighbour of an image tells whether it is a sample or data, left out itself: 0.5 where they are alike.

    Lopez-Paz and Oquab 2017 (https://arxiv.org/abs/1610.06545), section 3. Of as many of each. Below 0.5, samples lie nearer to data
    than data do to each other: copies. A Wilson interval, in which two that are each other's nearest count as one: they are right
    or wrong together (Schilling 1986, https://doi.org/10.1080/01621459.1986.10478337).
    """
    count = min(len(samples), len(reference))
    generator = torch.Generator().manual_seed(seed)
    both = [x[torch.randperm(len(x), generator=generator)[:count]] for x in (samples, reference)]
    neighbours = NearestNeighbors(n_neighbors=2).fit(torch.cat(both).numpy()).kneighbors()[1][:, 0]
    everyone = np.arange(2 * count)
    is_sample = everyone < count
    right = int((is_sample == is_sample[neighbours]).sum())
    mutual = (neighbours[neighbours] == everyone).mean()
    return share(right, 2 * count, 1 + mutual)


def memorised(samples: torch.Tensor, train: Any, held_out: Any) -> Estimate:
    """The share of samples nearer to an image of the training data, pixel by pixel, than all but 5 % of held-out images are: 0.05 for
    new images of the data's kind, 1 where all is copied, and less than 0.05 for what is like no data. A Wilson interval.

    Args:
        samples: float (N, C, H, W) in [0, 1].
        train, held_out: as in [`Reference`]; all of the first are looked at.
    """
    usual, distances = (nearest(images, train) for images in (held_out.images, samples))
    return share(int((distances <= usual.quantile(NATURAL) + ROUNDING).sum()), len(samples))


def nearest(images: torch.Tensor, data: Any) -> torch.Tensor:
    """The distance of each image to the nearest of a data set, float64 (N,)."""
    points, closest = images.flatten(1).double(), torch.full((len(images),), torch.inf, dtype=torch.float64)
    for start in range(0, len(data), CHUNK):
        others = data.part(range(start, min(start + CHUNK, len(data)))).images.flatten(1).double()
        closest = torch.minimum(closest, torch.cdist(points, others).amin(1))
    return closest


def within_balls(points: torch.Tensor, manifold: torch.Tensor, k: int) -> torch.Tensor:
    """Which points lie within which image's ball, whose radius is the distance to its k-th neighbour: bool (points, manifold)."""
    radii = NearestNeighbors(n_neighbors=k).fit(manifold.numpy()).kneighbors()[0][:, -1]
    radius, everyone = torch.from_numpy(radii), manifold.double()
    return torch.cat([torch.cdist(part.double(), everyone) <= radius for part in points.split(CHUNK)])


def diversity(samples: torch.Tensor, reference: torch.Tensor, seed: int = 0, resamples: int = 50) -> Estimate:
    """The mean over features of the samples' standard deviation, over that of the data: 0 all alike, 1 as varied as data."""
    data_std = reference.std(0).mean().item()
    value = samples.std(0).mean().item() / data_std
    draws = [draw.std(0).mean().item() / data_std for draw in bootstrap(samples, seed, resamples)]
    return around(value, draws, len(samples))
