"""Randomness with an address: what a step draws, and which images it sees, are functions of (seed, step, row).

A row is a position in the global batch, the images of one optimiser step over all processes and accumulation steps. So
neither a restart nor another number of processes changes what a row sees.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

BLOCK = 16  # rows that share a generator: one for each row costs more time than the numbers


def derived_seed(*address: int | str) -> int:
    """A 63-bit seed that is a function of the address alone."""
    digest = hashlib.blake2b(":".join(map(str, address)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def uniform_at(*address: int | str) -> float:
    """A number in [0, 1) that is a function of the address alone."""
    return (derived_seed(*address) >> 10) / 2**53


class StepNoise:
    """The random numbers of some rows of one optimiser step. Each call draws the next ones.

    The rows of the global batch are drawn in blocks of 16, each with a generator of its own, so that no row depends on how the
    batch is split and a process draws little more than its own rows. Numbers that go to an accelerator are drawn there; they
    differ from those of a CPU.

    Args:
        seed, step: the address of the step.
        rows: the rows to draw for.
        total: rows of the global batch.
        device: where the numbers are wanted.
    """

    def __init__(self, seed: int, step: int | str, rows: range, total: int, device: torch.device | str = "cpu"):
        self.seed, self.step, self.rows, self.total = seed, step, rows, total
        self.device = torch.device(device)
        self._generators: dict[str, list[torch.Generator]] = {}

    def normal(self, *shape: int) -> torch.Tensor:
        """Draws from N(0, 1), shape (rows, *shape), float32."""
        return self._draw(torch.randn, shape, self.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Draws from U[0, 1), shape (rows, *shape), float32."""
        return self._draw(torch.rand, shape, self.device)

    def stratified_uniform(self) -> torch.Tensor:
        """Draws from U[0, 1), one in each of as many equal bins as there are rows in the global batch; float64 of shape (rows,), on
        the host.

        Each row is uniform; together they cover the interval evenly, which lowers the variance of a loss over timesteps.
        Kingma et al. 2021 (https://arxiv.org/abs/2107.00630), appendix I.1.
        """
        drawn = self._draw(torch.rand, (), torch.device("cpu"), dtype=torch.float64)
        # Rounding can reach 1, which is no timestep's. The result stays on the host: not every device has float64.
        return ((torch.arange(self.rows.start, self.rows.stop) + drawn) / self.total).clamp(max=1 - 2**-53)

    def _draw(self, kind: Callable, shape: tuple[int, ...], device: torch.device, **kwargs: Any) -> torch.Tensor:
        first = self.rows.start // BLOCK
        blocks = range(first, -(-self.rows.stop // BLOCK))
        if device.type not in self._generators:
            self._generators[device.type] = [
                torch.Generator(device).manual_seed(derived_seed(self.seed, "step", self.step, block)) for block in blocks
            ]
        drawn = [kind(BLOCK, *shape, generator=g, device=device, **kwargs) for g in self._generators[device.type]]
        together = drawn[0] if len(drawn) == 1 else torch.cat(drawn)
        return together[self.rows.start - first * BLOCK : self.rows.stop - first * BLOCK]


class AddressedDropout:
    """Dropout whose masks are functions of (seed, step, row, module), for every `nn.Dropout` in a model.

    torch's own draws from one stream for a whole batch, so that a row's mask depends on the process that has it. Used as
    `with dropout.of(noise): model(...)`; without that the modules do what they always did. A module draws the same mask each time it is
    called in a step, so recomputed activations (gradient checkpointing) are right.
    """

    def __init__(self, model: nn.Module):
        self.noise: StepNoise | None = None
        found = [(n, module) for n, module in model.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
        self.handles = [module.register_forward_hook(self._hook(name)) for name, module in found]
        self.in_place = [module for _, module in found if module.inplace]
        for module in self.in_place:
            module.inplace = False  # the hook needs what came in

    @contextmanager
    def of(self, noise: StepNoise) -> Iterator[None]:
        """Draw masks for the rows of `noise`, until the gradients have been computed."""
        self.noise = noise
        try:
            yield
        finally:
            self.noise = None

    def close(self) -> None:
        """Leave the model as it was."""
        for handle in self.handles:
            handle.remove()
        for module in self.in_place:
            module.inplace = True

    def _hook(self, name: str) -> Callable:
        def replace(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            noise, (x,) = self.noise, inputs
            if noise is None or not module.training:
                return None
            mine = StepNoise(noise.seed, f"{noise.step}:{name}", noise.rows, noise.total, x.device)
            return x * (mine.uniform(*x.shape[1:]) >= module.p).to(x.dtype) / (1 - module.p)

        return replace


class EpochOrder:
    """Which image is looked at when: epoch after epoch, each in an order of its own, all functions of the seed.

    Args:
        length: number of images.
        seed: of the orders.
    """

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, positions: list[int]) -> list[int]:
        """The images at ascending positions of the run, in which an epoch follows the one before without a gap."""
        epochs = range(positions[0] // self.length, positions[-1] // self.length + 1)
        self._orders = {epoch: self._orders[epoch] if epoch in self._orders else self.order(epoch).numpy() for epoch in epochs}
        return [int(self._orders[position // self.length][position % self.length]) for position in positions]

    def order(self, epoch: int) -> torch.Tensor:
        """A permutation of 0 .. length - 1."""
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "epoch", epoch))
        return torch.randperm(self.length, generator=generator)
