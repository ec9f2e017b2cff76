"""Randomness with an address: no row of a step depends on how the batch is split, nor on a restart."""

import pytest
import torch

from diffusers_edu.training.randomness import StepNoise, StepSampler, derived_seed


def take(noise):
    return [noise.normal(2, 3), noise.uniform(), noise.stratified_uniform(), noise.normal(1)]


def batches(length, rows, total, start, stop, seed=0):
    return list(StepSampler(length, seed, rows, total, start, stop))


def test_a_derived_seed_is_a_function_of_the_address_alone():
    # The values themselves: another function would change what a resumed run draws.
    assert derived_seed(0, "step", 0) == 3745765051400923603
    assert derived_seed(7, "epoch", 12) == 6933386494032838895
    seeds = {derived_seed(seed, kind, i) for seed in range(5) for kind in ("step", "epoch") for i in range(5)}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("cuts", [(0, 4, 8), (0, 1, 3, 8), (0, 2, 4, 6, 8)])
def test_the_rows_of_a_step_are_the_same_however_the_batch_is_split(cuts):
    whole = take(StepNoise(0, 5, range(8), 8))
    parts = [take(StepNoise(0, 5, range(a, b), 8)) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    for draw, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[draw] for part in parts]), expected)


def test_noise_differs_between_steps_seeds_rows_and_calls():
    def first(seed, step):
        return StepNoise(seed, step, range(4), 4).normal(3)

    noise = StepNoise(0, 0, range(4), 4)
    draws = [noise.normal(3), noise.normal(3), first(0, 1), first(1, 0)]
    assert torch.equal(draws[0], first(0, 0))
    rows = torch.cat(draws)
    assert len(rows.unique(dim=0)) == len(rows)


def test_stratified_draws_have_one_in_each_bin_and_are_uniform_within():
    draws = torch.stack([StepNoise(0, step, range(10), 10).stratified_uniform() for step in range(500)])
    assert torch.equal((draws * 10).floor(), torch.arange(10.0).expand(500, 10))
    within = draws * 10 % 1
    assert abs(within.mean() - 1 / 2) <= 4 * (1 / 12 / 5000) ** 0.5
    assert abs(within.var() - 1 / 12) <= 4 * (1 / 180 / 5000) ** 0.5


def test_each_epoch_is_a_permutation_in_an_order_of_its_own():
    seen = sum(batches(10, [range(4)], 4, 0, 10), [])
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert seen != sum(batches(10, [range(4)], 4, 0, 10, seed=1), [])


def test_the_batches_of_two_processes_make_up_those_of_one():
    one = batches(10, [range(6)], 6, 0, 7)
    ranks = [batches(10, [rows], 6, 0, 7) for rows in (range(3), range(3, 6))]
    assert [a + b for a, b in zip(*ranks, strict=True)] == one


def test_accumulated_batches_make_up_the_batch_of_one_step():
    one = batches(10, [range(6)], 6, 0, 4)
    halves = batches(10, [range(3), range(3, 6)], 6, 0, 4)
    assert [a + b for a, b in zip(halves[::2], halves[1::2], strict=True)] == one
    assert len(StepSampler(10, 0, [range(3), range(3, 6)], 6, 0, 4)) == len(halves) == 8


@pytest.mark.parametrize("start", [1, 4, 9, 10])
def test_a_run_that_goes_on_sees_what_an_unbroken_one_sees(start):
    assert batches(10, [range(4)], 4, start, 10) == batches(10, [range(4)], 4, 0, 10)[start:]


def test_a_batch_may_be_bigger_than_the_data():
    seen = batches(3, [range(8)], 8, 0, 3)
    assert [len(batch) for batch in seen] == [8, 8, 8]
    flat = sum(seen, [])
    assert all(sorted(flat[i : i + 3]) == [0, 1, 2] for i in range(0, 24, 3))


def test_stratified_draws_stay_below_one_whatever_is_drawn(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n, **kwargs: torch.full((n,), 1 - 2**-53, dtype=torch.float64))
    drawn = StepNoise(0, 0, range(1024), 1024).stratified_uniform()
    assert drawn.max() < 1
    assert (drawn * 1000).long().max() == 999
