"""What a run will be and need, found out without training."""

import dataclasses
import json
from typing import Any

import torch
from accelerate import Accelerator

from .configuration import TrainingConfig
from .data import ImageData
from .objectives import Objective
from .randomness import StepNoise
from .trainer import global_batch_size

ROWS = 2  # of the batch that is looked at


def describe(objective: Objective, data: Any, config: TrainingConfig, accelerator: Accelerator) -> str:
    """The resolved configuration as JSON, and parameters, steps, epochs and memory in words.

    The memory of a process is counted: float32 weights, gradients, AdamW's two moments, the averages, and what autograd
    keeps of a batch, as seen in one forward pass of two images. What libraries and allocators need comes on top.
    """
    parameters = [p for p in objective.model.parameters() if p.requires_grad]
    size = sum(p.numel() * p.element_size() for p in parameters)
    averages = (2 if config.ema_sigma_rel else 1) if config.use_ema else 0
    memory = {
        "weights": size,
        "gradients": size,
        "AdamW's moments": 2 * size,
        "averages": averages * size,
        "activations of a batch": saved_for_backward(objective, data, config) * config.train_batch_size // ROWS,
        "images": data.pixels.numel() + sum(strip.numel() for strip in data.strips or []) if isinstance(data, ImageData) else 0,
    }
    total = global_batch_size(config, accelerator)
    images = total * config.max_train_steps
    epochs = f"{images / len(data):.1f} epochs of {len(data):,}" if isinstance(data, ImageData) else "streamed"
    lines = [
        json.dumps(dataclasses.asdict(config), indent=2),
        f"parameters: {sum(p.numel() for p in parameters):,}",
        f"steps: {config.max_train_steps:,} of {total:,} images ({accelerator.num_processes} processes x {config.train_batch_size} x "
        f"{config.gradient_accumulation_steps} accumulated)",
        f"images: {images:,}, {epochs}, {data.resolution}x{data.resolution}, {'RGB' if data.channels == 3 else 'grey'}",
        f"memory of a process: {mebibytes(sum(memory.values()))}",
        *(f"  {name}: {mebibytes(value)}" for name, value in memory.items()),
    ]
    return "\n".join(lines)


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def saved_for_backward(objective: Objective, data: Any, config: TrainingConfig) -> int:
    """Bytes that autograd keeps of a forward pass of two images, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in objective.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = data.head(ROWS)
    batch = images.batch([n % len(images) for n in range(ROWS)])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = objective.loss(objective.model.train(), batch, StepNoise(config.seed, 0, range(ROWS), ROWS))
    del loss
    return sum(kept.values())
