"""The figures against closed forms and cases whose answer is known."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance

from diffusers_edu.evaluation.features import INCEPTION, Features
from diffusers_edu.evaluation.mechanisms import sharpness
from diffusers_edu.evaluation.metrics import (
    Precomputed,
    Reference,
    density_coverage,
    diversity,
    frechet_distance,
    kernel_distance,
    measure,
    memorised,
    precision_recall,
    two_sample_accuracy,
)
from diffusers_edu.training.data import ImageData, load_digits


def normal(n: int, d: int = 4, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    return scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def test_frechet_distance_is_its_formula():
    x, y = normal(400, scale=1.5), normal(300, seed=1, shift=0.3)
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    difference = (x.mean(0) - y.mean(0)).square().sum().item()
    expected = difference + np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet_distance(x, y).value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("d", [16, 300])  # fewer and more features than images
def test_frechet_distance_is_that_of_torchmetrics(d):
    x, y = normal(120, d, scale=1.5), normal(90, d, seed=1, shift=0.3)
    metric = FrechetInceptionDistance(Precomputed(d))
    metric.update(x, real=False)
    metric.update(y, real=True)
    assert frechet_distance(x, y, resamples=2).value == pytest.approx(metric.compute().item(), rel=1e-4)


def test_frechet_distance_of_gaussians_is_near_the_closed_form_and_its_interval_is_as_wide_as_its_spread():
    truth = 4 * (2.0 - 1.0) ** 2 + 4 * 0.5**2  # means differ by 0.5, standard deviations are 2 and 1, in each of 4 dimensions
    reference = normal(20000, seed=99)
    estimates = [frechet_distance(normal(1000, seed=s, scale=2.0, shift=0.5), reference) for s in range(12)]
    values = [e.value for e in estimates]
    assert np.mean(values) == pytest.approx(truth, rel=0.05)
    half_width = np.mean([(e.interval[1] - e.interval[0]) / 2 for e in estimates])
    assert 0.5 < half_width / (1.96 * np.std(values, ddof=1)) < 2


def test_the_floor_of_the_digits_is_the_known_one():
    train, held_out = load_digits()
    floor = measure(train.images.flatten(1), held_out.images.flatten(1))
    assert floor["frechet_distance"].value == pytest.approx(0.073, abs=0.001)
    assert floor["diversity"].value == pytest.approx(1, abs=0.02)
    low, high = floor["kernel_distance"].interval
    assert low < 0 < high
    assert all(estimate.interval[0] <= estimate.value <= estimate.interval[1] for estimate in floor.values())


def test_kernel_distance_grows_with_the_distance_and_is_near_0_for_equal_distributions():
    reference = normal(500, seed=1)
    values = [kernel_distance(normal(500, shift=shift), reference).value for shift in (0.0, 0.5, 1.0)]
    assert abs(values[0]) < 0.05 < values[1] < values[2]


def test_kernel_distance_is_that_of_its_definition_on_standardised_features():
    samples, reference = normal(300, seed=1, scale=0.2), normal(300, seed=2, scale=0.1, shift=0.5)

    def squared_discrepancy(x, y):
        def kernel(a, b):
            return (a @ b.T / a.shape[1] + 1) ** 3

        within = [(kernel(a, a).sum() - kernel(a, a).diag().sum()) / (len(a) * (len(a) - 1)) for a in (x, y)]
        return (sum(within) - 2 * kernel(x, y).mean()).item()

    x, y = samples.double(), reference.double()
    centre, scale = y.mean(0), (y - y.mean(0)).square().mean().sqrt()
    for standardise, (a, b) in {True: ((x - centre) / scale, (y - centre) / scale), False: (x, y)}.items():
        found = kernel_distance(samples, reference, subsets=400, standardise=standardise)
        error = (found.interval[1] - found.value) / 1.96 / 400**0.5
        assert abs(found.value - squared_discrepancy(a, b)) < 5 * error


def test_kernel_distance_does_not_take_the_mean_image_for_the_data():
    train, held_out = load_digits()
    pixels, reference = train.images.flatten(1), held_out.images.flatten(1)
    mean, blurred = pixels.mean(0).expand(1000, -1), pixels[:1000] * 0.9
    assert kernel_distance(mean, reference).value > 3 * kernel_distance(blurred, reference).value
    raw = [kernel_distance(x, reference, standardise=False).value for x in (mean, blurred)]
    assert raw[0] < raw[1]  # which is why features are standardised


def test_the_kernel_distance_on_features_of_inception_is_the_published_one():
    train, held_out = load_digits()
    found = {}
    for name in ("pixels", INCEPTION):
        found[name] = Reference(train, held_out, Features(name, torch.nn.Flatten())).measure(train.images[:500])
    raw = kernel_distance(train.images[:500].flatten(1), held_out.images.flatten(1), standardise=False)
    assert found[INCEPTION]["kernel_distance"] == raw != found["pixels"]["kernel_distance"]


def test_precision_falls_with_wrong_samples_and_recall_with_missing_modes():
    reference = torch.cat([normal(200), normal(200, shift=20)])
    one_mode = normal(200, seed=2)
    precision, recall = precision_recall(one_mode, reference)
    assert precision.value > 0.9
    assert recall.value == pytest.approx(0.5, abs=0.05)
    precision, recall = precision_recall(normal(200, shift=-20), reference)
    assert precision.value == recall.value == 0
    assert precision.interval[0] == pytest.approx(0, abs=1e-9)
    assert 0 < precision.interval[1] < 0.05


def test_density_and_coverage_are_what_their_authors_derive_for_equal_distributions():
    n, k = 600, 5
    density, coverage = density_coverage(normal(n), normal(n, seed=1), k=k)
    assert density.value == pytest.approx(1, abs=0.1)
    # Naeem et al. 2020, eq. (8): the expected coverage for M = N.
    expected = 1 - np.prod([(n - i) / (2 * n - i) for i in range(k)])
    assert coverage.value == pytest.approx(expected, abs=0.03)
    assert density.interval[0] < density.value < density.interval[1]


def test_density_and_coverage_see_wrong_samples_missing_modes_and_outliers():
    reference = torch.cat([normal(200), normal(200, shift=20)])
    density, coverage = density_coverage(normal(400, seed=2), reference)
    assert density.value > 0.8
    assert 0.4 < coverage.value <= 0.5
    assert [figure.value for figure in density_coverage(normal(200, shift=-20), reference)] == [0, 0]
    # An outlier's ball reaches over empty space: precision takes what lies there for good, density hardly.
    reference[:1] = 60
    between = normal(200, seed=3, shift=40)
    assert precision_recall(between, reference)[0].value > 0.9
    assert density_coverage(between, reference)[0].value < 0.25


def test_two_samples_of_one_distribution_cannot_be_told_apart():
    same = two_sample_accuracy(normal(800), normal(500, seed=1))
    assert same.interval[0] < 0.5 < same.interval[1]
    assert same.n == 1000
    assert two_sample_accuracy(normal(300), normal(300, seed=1, shift=10)).value == 1
    data = normal(300)
    assert two_sample_accuracy(data + 1e-6, data).value == 0  # copies


def test_the_interval_of_the_two_sample_test_holds_a_half_as_often_as_it_says():
    held = 0
    for seed in range(300):  # in two dimensions most neighbours are each other's
        low, high = two_sample_accuracy(normal(150, 2, seed), normal(150, 2, 1000 + seed), seed).interval
        held += low < 0.5 < high
    assert held / 300 == pytest.approx(0.95, abs=0.03)


def grey(count: int, seed: int, size: int = 8, classes: int | None = None) -> ImageData:
    """Images of noise; with classes, which differ in their brightness."""
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = torch.rand((count, 1, size, size), generator=generator), None
    if classes:
        labels = torch.randint(classes, (count,), generator=generator)
        pixels = (labels.reshape(-1, 1, 1, 1) + pixels) / classes
    return ImageData((pixels * 255).round().to(torch.uint8), 255, labels)


def test_copies_are_found_and_other_samples_are_not(monkeypatch):
    monkeypatch.setattr("diffusers_edu.evaluation.metrics.CHUNK", 128)
    train, held_out = grey(500, 0, size=2), grey(300, 1, size=2)
    fresh = memorised(grey(2000, 2, size=2).images, train, held_out)
    assert fresh.value == pytest.approx(0.05, abs=0.03)
    copies = memorised(torch.cat([train.images[400:], grey(300, 2, size=2).images]), train, held_out)
    assert copies.value == pytest.approx(0.25 + 0.75 * 0.05, abs=0.04)
    assert memorised(train.images, train, held_out).value == 1


def test_copies_are_found_beyond_the_images_that_features_are_made_of_and_among_duplicates(monkeypatch):
    monkeypatch.setattr("diffusers_edu.evaluation.metrics.MOST", 50)
    train, held_out = grey(500, 0), grey(60, 1)
    assert Reference(train, held_out, flat).measure(train.images[::3])["memorised"].value == 1
    doubles = ImageData(torch.cat([held_out.pixels, train.pixels[:30]]))  # a third of the held-out images were trained on
    assert memorised(train.images[100:200], train, doubles).value == 1
    assert memorised(grey(100, 2).images, train, doubles).value == 0


def test_diversity_is_the_ratio_of_standard_deviations():
    reference = normal(1000)
    assert diversity(reference * 0.25, reference).value == pytest.approx(0.25, rel=1e-5)
    assert diversity(torch.ones(50, 4), reference).value == 0


def test_sharpness_falls_with_blur():
    x = normal(20, 64).reshape(20, 1, 8, 8)
    blurred = torch.nn.functional.avg_pool2d(x, 3, stride=1, padding=1)
    assert sharpness(x, x).value == pytest.approx(1)
    assert sharpness(blurred, x).value < 0.5


def test_shapes_that_do_not_fit_and_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        measure(normal(20, 4), normal(20, 5))
    with pytest.raises(ValueError, match="not finite"):
        measure(normal(20) * float("nan"), normal(20))


def images(count, seed):
    return grey(count, seed, size=4, classes=3)


def flat(x):
    return x.flatten(1)


def test_a_classifier_learns_from_good_samples_what_it_learns_from_data():
    train, held_out, samples = images(300, 0), images(200, 1), images(300, 2)
    reference = Reference(train, held_out, flat)
    floor = reference.floor(300)["train_on_synthetic"]
    labelled = reference.measure(samples.images, samples.labels)["train_on_synthetic"]
    judged = reference.measure(samples.images)["train_on_synthetic"]
    assert floor.value > 0.95 and labelled.value > 0.95 and judged.value > 0.95
    assert floor.n == labelled.n == judged.n == 200
    # Labels that have nothing to do with the image teach nothing.
    shuffled = samples.labels[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    assert reference.measure(samples.images, shuffled)["train_on_synthetic"].value < 0.6


def test_samples_of_one_class_teach_that_class():
    train, held_out = images(300, 0), images(200, 1)
    one = train.images[train.labels == 1][:50]
    found = Reference(train, held_out, flat).measure(one)["train_on_synthetic"]
    assert found.value == pytest.approx((held_out.labels == 1).double().mean().item())


def test_without_classes_no_classifier_is_taught():
    train, held_out = grey(60, 0, size=4), grey(60, 1, size=4)
    reference = Reference(train, held_out, flat)
    assert "train_on_synthetic" not in reference.measure(images(50, 2).images)
    assert "train_on_synthetic" not in reference.floor(50)


def test_the_floor_is_of_as_many_images_as_there_are_samples():
    reference = Reference(images(300, 0), images(200, 1), flat)
    assert reference.floor(120)["frechet_distance"].n == 120
    assert reference.floor(1000)["frechet_distance"].n == 300  # all there are; which cannot be compared with 1,000 samples
    with pytest.raises(ValueError, match="cannot be compared"):
        reference.measure(images(1000, 2).images)["frechet_distance"] - reference.floor(1000)["frechet_distance"]


def test_of_many_images_the_same_few_are_taken(monkeypatch):
    monkeypatch.setattr("diffusers_edu.evaluation.metrics.MOST", 50)
    data = images(300, 0)
    first, again = data.some(50), data.some(50)
    assert len(first) == len(first.labels) == 50
    assert torch.equal(first.pixels, again.pixels)
    index = (data.pixels.flatten(1) == first.pixels[7].flatten()).all(1).nonzero().item()
    assert data.labels[index] == first.labels[7]
