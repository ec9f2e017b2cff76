"""Randomness with an address: what a step draws, and which images it sees, are functions of (seed, step, row).

A row is a position in the global batch, the images of one optimiser step over all processes and accumulation steps. So
neither a restart nor another number of processes changes what a row sees.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


def derived_seed(*address: int | str) -> int:
    """A 63-bit seed that is a function of the address alone."""
    digest = hashlib.blake2b(":".join(map(str, address)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class StepNoise:
    """The random numbers of some rows of one optimiser step. Each call draws the next ones.

    Every process draws the numbers of the whole global batch and keeps its rows, so that no row depends on how the batch is
    split. (One generator for the batch is cheaper than one for each row up to about ten processes.)

    Args:
        seed, step: the address of the step.
        rows: the rows to keep.
        total: rows of the global batch.
        device: where the numbers go.
    """

    def __init__(self, seed: int, step: int, rows: range, total: int, device: torch.device | str = "cpu"):
        self.rows, self.total, self.device = rows, total, device
        self._generator = torch.Generator().manual_seed(derived_seed(seed, "step", step))

    def normal(self, *shape: int) -> torch.Tensor:
        """Draws from N(0, 1), shape (rows, *shape), float32."""
        return self._keep(torch.randn(self.total, *shape, generator=self._generator))

    def uniform(self) -> torch.Tensor:
        """Draws from U[0, 1), shape (rows,), float32."""
        return self._keep(torch.rand(self.total, generator=self._generator))

    def stratified_uniform(self) -> torch.Tensor:
        """Draws from U[0, 1), one in each of as many equal bins as there are rows in the global batch; float64 of shape (rows,), on
        the host.

        Each row is uniform; together they cover the interval evenly, which lowers the variance of a loss over timesteps.
        Kingma et al. 2021 (https://arxiv.org/abs/2107.00630), appendix I.1.
        """
        drawn = torch.rand(self.total, dtype=torch.float64, generator=self._generator)
        # Rounding can reach 1, which is no timestep's. The result stays on the host: not every device has float64.
        return ((torch.arange(self.total) + drawn) / self.total).clamp(max=1 - 2**-53)[self.rows.start : self.rows.stop]

    def _keep(self, drawn: torch.Tensor) -> torch.Tensor:
        return drawn[self.rows.start : self.rows.stop].to(self.device, non_blocking=True)


class StepSampler(Sampler[list[int]]):
    """The indices of the images of each batch, from `start_step` on: epoch after epoch, each in an order of its own.

    Batches run on over the end of an epoch, so all are full, however small the data.

    Args:
        length: number of images.
        seed: of the orders.
        batches: for each batch of an optimiser step, the rows of the global batch that this process takes.
        total: rows of the global batch.
        start_step, stop_step: the optimiser steps to yield batches for.
    """

    def __init__(self, length: int, seed: int, batches: list[range], total: int, start_step: int, stop_step: int):
        self.length, self.seed, self.batches, self.total = length, seed, batches, total
        self.start_step, self.stop_step = start_step, stop_step

    def __len__(self) -> int:
        return (self.stop_step - self.start_step) * len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        orders: dict[int, list[int]] = {}
        for step in range(self.start_step, self.stop_step):
            for rows in self.batches:
                positions = [step * self.total + row for row in rows]
                epochs = range(positions[0] // self.length, positions[-1] // self.length + 1)
                orders = {epoch: orders[epoch] if epoch in orders else self.order(epoch) for epoch in epochs}
                yield [orders[position // self.length][position % self.length] for position in positions]

    def order(self, epoch: int) -> list[int]:
        """The order of the images in an epoch, a permutation of 0 .. length - 1."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "epoch", epoch))
        return torch.randperm(self.length, generator=generator).tolist()
