"""What a run will be and need, found out without training."""

import dataclasses
import json
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import convert_outputs_to_fp32

from .configuration import TrainingConfig
from .data import ImageData
from .latents import keeps_latents, moments
from .objectives import Objective
from .randomness import StepNoise
from .trainer import global_batch_size

ROWS = 2  # of the smaller of the batches that are looked at


def describe(objective: Objective, data: Any, config: TrainingConfig, accelerator: Accelerator) -> str:
    """The resolved configuration as JSON, and parameters, steps, epochs and memory in words."""
    parameters = sum(p.numel() for p in objective.model.parameters() if p.requires_grad)
    memory = memory_of(objective, data, config, accelerator)
    total = global_batch_size(config, accelerator)
    images = total * config.max_train_steps
    epochs = f"{images / len(data):.1f} epochs of {len(data):,}" if isinstance(data, ImageData) else "streamed"
    precision = "float32" if config.mixed_precision == "no" else config.mixed_precision
    shards = shards_of(accelerator)
    sharded = f"; one of {shards} shards of weights, gradients, moments and averages" if shards > 1 else ""
    notes = f"activations in {precision}{sharded}; what libraries and allocators need comes on top"
    lines = [
        json.dumps(dataclasses.asdict(config), indent=2),
        f"parameters: {parameters:,}",
        f"steps: {config.max_train_steps:,} of {total:,} images ({accelerator.num_processes} processes x {config.train_batch_size} x "
        f"{config.gradient_accumulation_steps} accumulated)",
        f"images: {images:,}, {epochs}, {data.resolution}x{data.resolution}, {'RGB' if data.channels == 3 else 'grey'}",
        f"memory of a process: {mebibytes(sum(memory.values()))} ({notes})",
        *(f"  {name}: {mebibytes(value)}" for name, value in memory.items()),
    ]
    return "\n".join(lines)


def memory_of(objective: Objective, data: Any, config: TrainingConfig, accelerator: Accelerator) -> dict[str, float]:
    """Bytes of a process, counted: float32 weights, gradients, AdamW's two moments and the averages, or its shards of them; what
    autograd keeps of a batch, in the precision of the run; a frozen VAE; and on the host, the images and their latents.
    """
    size = sum(p.numel() * p.element_size() for p in objective.model.parameters() if p.requires_grad) / shards_of(accelerator)
    averages = (2 if config.ema_sigma_rel else 1) if config.use_ema else 0
    memory = {
        "weights": size,
        "gradients": size,
        "AdamW's moments": 2 * size,
        "averages": averages * size,
        "activations of a batch": activations(objective, data, config, accelerator),
        "images": data.pixels.numel() + sum(strip.numel() for strip in data.strips or []) if isinstance(data, ImageData) else 0,
    }
    if objective.vae is not None:
        memory["weights of the VAE"] = sum(p.numel() * p.element_size() for p in objective.vae.parameters())
    if keeps_latents(objective, data):
        sides = 2 if config.random_flip else 1
        memory["latents of the images"] = sum(part[0].nbytes for part in moments_of_one(objective, data)) * len(data) * sides
    return memory


def shards_of(accelerator: Accelerator) -> int:
    """Over how many processes a model is sharded."""
    return accelerator.num_processes if accelerator.distributed_type == DistributedType.FSDP else 1


@torch.no_grad()
def moments_of_one(objective: Objective, data: ImageData) -> tuple[torch.Tensor, torch.Tensor]:
    return moments(objective.vae, data.batch([0])["images"])


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def activations(objective: Objective, data: Any, config: TrainingConfig, accelerator: Accelerator) -> float:
    """Bytes that autograd keeps of a batch: what grows with its rows, and what does not, such as weights in a lower precision."""
    few, more = (saved_for_backward(objective, data, config, accelerator, rows) for rows in (ROWS, 2 * ROWS))
    return few + (more - few) / ROWS * (config.train_batch_size - ROWS)


def saved_for_backward(objective: Objective, data: Any, config: TrainingConfig, accelerator: Accelerator, rows: int) -> int:
    """Bytes that autograd keeps of a forward pass of some images, without the weights; in the precision of the run."""
    weights = {p.untyped_storage().data_ptr() for p in objective.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model = objective.model.train()
    if accelerator.mixed_precision != "no":
        model = convert_outputs_to_fp32(accelerator.autocast()(model))  # as the accelerator prepares it
    images = data.head(rows)
    batch = images.batch([n % len(images) for n in range(rows)])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = objective.loss(model, batch, StepNoise(config.seed, 0, range(rows), rows))
    del loss
    return sum(kept.values())
