"""Intervals: against published examples, scipy's, and how often they hold the truth."""

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

from diffusers_edu.evaluation.estimates import Estimate, around, bootstrap, mean, over_seeds, share


def normal(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_difference_of_two_shares_is_newcombes():
    # Newcombe 1998 (https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<873::AID-SIM779>3.0.CO;2-I), table II, method 10.
    for first, second, low, high in (((56, 70), (48, 80), 0.0524, 0.3339), ((10, 10), (0, 10), 0.6075, 1.0)):
        a, b = (Estimate(e.value, e.interval, 1) for e in (share(*first), share(*second)))
        assert (a - b).interval == pytest.approx((low, high), abs=1e-4)


def test_the_difference_of_means_holds_the_truth_as_often_as_it_says():
    held = 0
    for seed in range(400):
        a, b = mean(normal(50, seed) + 0.3), mean(2 * normal(50, 1000 + seed))
        low, high = (a - b).interval
        held += low < 0.3 < high
    assert held / 400 == pytest.approx(0.95, abs=0.03)


def test_figures_of_different_numbers_of_images_are_not_compared():
    with pytest.raises(ValueError, match="1000 images cannot be compared with one of 500"):
        Estimate(0.1, (0.0, 0.2), 1000) - Estimate(0.1, (0.0, 0.2), 500)
    with pytest.raises(ValueError, match="measure all on as many"):
        over_seeds([Estimate(0.1, (0.0, 0.2), 1000), Estimate(0.1, (0.0, 0.2), 500)])
    with pytest.raises(ValueError, match="measure all on as many"):
        over_seeds([])


def test_over_seeds_is_students_interval_and_one_seed_keeps_its_own():
    values = [0.11, 0.14, 0.12]
    found = over_seeds([Estimate(value, (value - 0.01, value + 0.01), 10) for value in values])
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.value == pytest.approx(np.mean(values))
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.n == 10
    alone = Estimate(0.1, (0.0, 0.3), 10)
    assert over_seeds([alone]) is alone


def test_runs_that_agree_by_chance_are_no_surer_than_their_images_allow():
    none = over_seeds([share(0, 1000)] * 3)
    assert none.interval[0] == 0 and share(0, 3000).interval[1] < none.interval[1] < share(0, 1000).interval[1]
    assert over_seeds([share(count, 100) for count in (96, 99, 100)]).interval[1] == 1
    apart = over_seeds([mean(normal(400, seed)) for seed in range(3)])
    assert apart.interval[1] - apart.value >= 1.9 / 1200**0.5


def test_more_runs_do_not_take_away_the_chance_of_the_images_that_all_are_measured_on():
    held, alone, seeds = 0, 0, range(300)
    for seed in seeds:  # images of which each has its own difficulty, whatever the run; runs that differ by chance
        difficulty = normal(50, seed)
        runs = [difficulty + 0.05 * normal(1, 1000 + 10 * seed + run) for run in range(3)]
        for same in (True, False):
            low, high = over_seeds([mean(run, same_images=same) for run in runs]).interval
            held, alone = held + (same and low < 0 < high), alone + (not same and low < 0 < high)
    assert held / len(seeds) >= 0.93
    assert alone / len(seeds) < 0.8
    assert (mean(difficulty, same_images=True) * 2 - mean(difficulty, same_images=True)).same_images
    assert not (mean(difficulty, same_images=True) - mean(difficulty)).same_images


def test_scaling_turns_an_interval_round_and_roots_stay_above_0():
    assert Estimate(2.0, (1.0, 4.0), 5) * -0.5 == Estimate(-1.0, (-2.0, -0.5), 5)
    assert Estimate(4.0, (-1.0, 9.0), 5).root() == Estimate(2.0, (0.0, 3.0), 5)


def test_the_bootstraps_interval_of_a_mean_is_that_of_its_standard_error():
    x = normal(400, 0)
    found = around(x.mean().item(), [draw.mean().item() for draw in bootstrap(x, 0, 400)], len(x))
    expected = mean(x)
    width, true_width = (e.interval[1] - e.interval[0] for e in (found, expected))
    assert width == pytest.approx(true_width, rel=0.15)
