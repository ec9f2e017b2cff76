"""Randomness with an address: no row of a step depends on how the batch is split, nor on a restart."""

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusers_edu.training.configuration import TrainingConfig
from diffusers_edu.training.data import Augmentation, Visits, augmentation, load_data
from diffusers_edu.training.launch import make_accelerator
from diffusers_edu.training.objectives import Objective
from diffusers_edu.training.randomness import AddressedDropout, EpochOrder, StepNoise, derived_seed, uniform_at
from diffusers_edu.training.trainer import optimiser_steps


def take(noise):
    return [noise.normal(2, 3), noise.uniform(), noise.stratified_uniform(), noise.normal(1)]


def parts(cuts):
    return [range(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


class Positions:
    """Data whose batches are the indices and the augmentation that were asked for."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def batch(self, indices, augmented):
        return list(zip(indices, augmented.flip, augmented.crop, strict=True))


def test_a_derived_seed_is_a_function_of_the_address_alone():
    # The values themselves: another function would change what a resumed run draws.
    assert derived_seed(0, "step", 0) == 3745765051400923603
    assert derived_seed(7, "epoch", 12) == 6933386494032838895
    seeds = {derived_seed(seed, kind, i) for seed in range(5) for kind in ("step", "epoch") for i in range(5)}
    assert len(seeds) == 50
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_numbers_at_addresses_are_uniform():
    numbers = torch.tensor([uniform_at(0, "flip", position) for position in range(4000)], dtype=torch.float64)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers, 10, 0, 1)
    assert (counts - 400).abs().max() < 4.5 * (4000 * 0.1 * 0.9) ** 0.5
    assert numbers[7] == uniform_at(0, "flip", 7)


@pytest.mark.parametrize(
    "cuts",
    [(0, 20, 40), (0, 1, 3, 40), (0, 10, 20, 30, 40), (0, 16, 32, 40), (0, 15, 17, 31, 33, 40), tuple(range(41))],
)
def test_the_rows_of_a_step_are_the_same_however_the_batch_is_split(cuts):
    whole = take(StepNoise(0, 5, range(40), 40))
    split = [take(StepNoise(0, 5, rows, 40)) for rows in parts(cuts)]
    for draw, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[draw] for part in split]), expected)


def test_noise_differs_between_steps_seeds_rows_and_calls():
    def first(seed, step):
        return StepNoise(seed, step, range(40), 40).normal(3)

    noise = StepNoise(0, 0, range(40), 40)
    draws = [noise.normal(3), noise.normal(3), first(0, 1), first(1, 0), first(0, "validation")]
    rows = torch.cat(draws)
    assert len(rows.unique(dim=0)) == len(rows)


def test_the_same_draws_in_the_same_order_are_the_same():
    first, second = (take(StepNoise(3, 4, range(5, 25), 40)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_normal_and_uniform_draws_have_the_moments_of_their_names():
    count = 64 * 1000
    noise = StepNoise(0, 0, range(64), 64)
    normal, uniform = noise.normal(1000), noise.uniform(1000)
    assert [normal.dtype, uniform.dtype, normal.shape] == [torch.float32, torch.float32, (64, 1000)]
    assert abs(normal.mean()) <= 4 / count**0.5
    assert abs(normal.var() - 1) <= 4 * (2 / count) ** 0.5
    assert abs(normal.pow(4).mean() - 3) <= 4 * (96 / count) ** 0.5
    assert abs(uniform.mean() - 1 / 2) <= 4 * (1 / 12 / count) ** 0.5
    assert abs(uniform.var() - 1 / 12) <= 4 * (1 / 180 / count) ** 0.5
    assert uniform.min() >= 0 and uniform.max() < 1
    assert normal.corrcoef().fill_diagonal_(0).abs().max() < 5 / 1000**0.5


@pytest.mark.parametrize("total", [10, 40])
def test_stratified_draws_have_one_in_each_bin_and_are_uniform_within(total):
    draws = torch.stack([StepNoise(0, step, range(total), total).stratified_uniform() for step in range(5000 // total)])
    assert torch.equal((draws * total).floor(), torch.arange(float(total)).expand(5000 // total, total).double())
    within = draws * total % 1
    assert abs(within.mean() - 1 / 2) <= 4 * (1 / 12 / 5000) ** 0.5
    assert abs(within.var() - 1 / 12) <= 4 * (1 / 180 / 5000) ** 0.5


def test_stratified_draws_stay_below_one_whatever_is_drawn(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda n, **kwargs: torch.full((n,), 1 - 2**-53, dtype=torch.float64))
    drawn = StepNoise(0, 0, range(1024), 1024).stratified_uniform()
    assert drawn.max() < 1
    assert (drawn * 1000).long().max() == 999


def test_each_epoch_is_a_permutation_in_an_order_of_its_own():
    seen = EpochOrder(10, 0)(list(range(40)))
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert seen != EpochOrder(10, 1)(list(range(40)))


@pytest.mark.parametrize("size", [1, 4, 7, 23])
def test_batches_run_over_the_end_of_an_epoch_without_a_gap(size):
    whole, order = EpochOrder(10, 0)(list(range(92))), EpochOrder(10, 0)
    assert (
        sum((order(list(range(start, start + size))) for start in range(0, 92 - size + 1, size)), [])
        == whole[: 92 // size * size]
    )


@pytest.mark.parametrize("start", [1, 9, 10, 36])
def test_a_run_that_goes_on_sees_what_an_unbroken_one_sees(start):
    visits = Visits(Positions(10), 0, flip=True)
    whole = visits[list(range(60))]
    assert Visits(Positions(10), 0, flip=True)[list(range(start, 60))] == whole[start:]


def test_the_batches_of_processes_and_of_accumulation_make_up_that_of_one_step():
    whole = Visits(Positions(10), 0, flip=True)[list(range(12, 24))]
    visits = Visits(Positions(10), 0, flip=True)
    assert sum((visits[[12 + row for row in rows]] for rows in parts((0, 3, 6, 9, 12))), []) == whole


def test_augmentations_are_functions_of_the_seed_and_the_position_and_flip_half():
    positions = list(range(2000))
    found = augmentation(0, positions, flip=True)
    assert abs(sum(found.flip) / 2000 - 1 / 2) < 4 * (1 / 4 / 2000) ** 0.5
    assert augmentation(0, positions[700:], flip=True) == Augmentation(found.flip[700:], found.crop[700:])
    other = augmentation(1, positions, flip=True)
    assert found.flip != other.flip and found.crop != other.crop
    assert not any(augmentation(0, positions, flip=False).flip)
    assert abs(torch.tensor([found.flip, found.crop]).double().corrcoef()[0, 1]) < 4 / 2000**0.5


def network(p=0.25):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.Dropout(p), nn.Tanh(), nn.Linear(32, 32), nn.Dropout(p), nn.Linear(32, 1))


def rows_of(count=40):
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1))


def dropped(module, x, rows=None, step=0, total=40):
    dropout = AddressedDropout(module)
    with dropout.of(StepNoise(0, step, rows or range(len(x)), total)):
        output = module(x)
    dropout.close()
    return output


@pytest.mark.parametrize("cuts", [(0, 20, 40), (0, 10, 20, 30, 40), (0, 1, 17, 40)])
def test_a_row_is_dropped_alike_however_the_batch_is_split(cuts):
    model, x = network(), rows_of()
    whole = dropped(model, x)
    split = torch.cat([dropped(model, x[rows.start : rows.stop], rows) for rows in parts(cuts)])
    assert (split - whole).abs().max() < 1e-6
    assert (dropped(model, x, step=1) - whole).abs().max() > 1e-2


def test_dropout_has_the_mean_and_the_variance_of_torchs_own():
    p, count = 0.3, 40 * 1000
    module, ones = nn.Dropout(p), torch.ones(40, 1000)
    ours = dropped(nn.Sequential(module), ones)
    assert set(ours.unique().tolist()) == set(module(ones).unique().tolist())
    assert abs((ours == 0).float().mean() - p) < 4 * (p * (1 - p) / count) ** 0.5
    assert abs(ours.mean() - 1) < 4 * (p / (1 - p) / count) ** 0.5
    assert abs(ours.var() - p / (1 - p)) < 0.02
    assert ours.corrcoef().fill_diagonal_(0).abs().max() < 5 / 1000**0.5


def test_modules_have_masks_of_their_own():
    model = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5))
    kept = (dropped(model, torch.ones(40, 1000)) > 0).float().mean()
    assert abs(kept - 1 / 4) < 4 * (3 / 16 / 40000) ** 0.5


def test_a_dropout_that_works_in_place_drops_once():
    kept = (dropped(nn.Sequential(nn.Identity(), nn.Dropout(0.5, inplace=True)), torch.ones(40, 1000)) > 0).float().mean()
    assert abs(kept - 1 / 2) < 4 * (1 / 4 / 40000) ** 0.5


def test_evaluation_and_what_is_outside_of_a_step_are_left_alone():
    model, x = network(), rows_of()
    torch.manual_seed(5)
    torchs_own = model(x)
    dropout = AddressedDropout(model)
    torch.manual_seed(5)
    assert torch.equal(model(x), torchs_own)
    model.eval()
    expected = model(x)
    with dropout.of(StepNoise(0, 0, range(40), 40)):
        assert torch.equal(model(x), expected)


def test_removed_hooks_leave_the_model_as_it_was():
    model, x = network(), rows_of()
    dropout = AddressedDropout(model)
    assert sum(len(module._forward_hooks) for module in model.modules()) == 2
    dropout.close()
    assert not any(module._forward_hooks for module in model.modules())
    torch.manual_seed(5)
    with dropout.of(StepNoise(0, 0, range(40), 40)):
        after = model(x)
    torch.manual_seed(5)
    assert torch.equal(after, model(x))


def test_activations_that_are_computed_anew_get_the_same_masks():
    model, x = network(), rows_of()

    def gradients(forward):
        model.zero_grad()
        dropout = AddressedDropout(model)
        with dropout.of(StepNoise(0, 0, range(40), 40)):
            forward(x).square().mean().backward()
        dropout.close()
        return [parameter.grad.clone() for parameter in model.parameters()]

    kept = gradients(model)
    again = gradients(lambda x: checkpoint(model, x, use_reentrant=False))
    assert max((a - b).abs().max() for a, b in zip(kept, again, strict=True)) < 1e-7
    assert max(gradient.abs().max() for gradient in kept) > 1e-2


class DroppingObjective(Objective):
    def __init__(self, model):
        self.model = model

    def loss(self, model, batch, noise):
        return model(batch["images"].flatten(1)[:, :6]).square()[:, 0], {}


def losses_of_steps(wrap):
    config = TrainingConfig(dataset_name="digits", train_batch_size=40, max_train_steps=3)
    data, _ = load_data(config)
    objective = DroppingObjective(network())
    optimizer = torch.optim.SGD(objective.model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    accelerator = make_accelerator(config)
    steps = optimiser_steps(wrap(objective.model), objective, optimizer, schedule, data, config, accelerator, 0)
    return torch.stack([values["loss"] for _, _, values in steps])


def test_a_model_that_is_wrapped_for_several_processes_is_dropped_as_the_bare_one_is():
    expected = losses_of_steps(lambda model: model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = losses_of_steps(nn.parallel.DistributedDataParallel)
    finally:
        dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
    assert (wrapped - expected).abs().max() < 1e-6
