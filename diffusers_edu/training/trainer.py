"""One training loop on Accelerate, for every rung. It knows objectives; it does not know what they train."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .checkpoints import discard_later, find_checkpoint, save_checkpoint, step_of
from .configuration import TrainingConfig
from .data import ImageData
from .log import LOG_NAME, TrainingLog
from .objectives import Objective
from .randomness import StepNoise, StepSampler


def train(pipeline: Any, objective: Objective, data: ImageData, config: TrainingConfig, accelerator: Accelerator) -> None:
    """Train `objective.model` and save the pipeline that holds it in `config.output_dir`.

    Written there: the configuration before the first step, `log.jsonl`, `checkpoint-<step>/` folders, and at the end the pipeline,
    with the averaged weights where `use_ema` is on. Randomness is addressed: see [`StepNoise`].

    Args:
        pipeline: a diffusers pipeline that holds the objective's model.
        objective: what to descend.
        data: the images to train on.
        config: the run; validated.
        accelerator: see [`launch.make_accelerator`].

    Raises:
        UsageError: the folder holds another run, or there is no checkpoint to resume from.
        FloatingPointError: a loss that is not finite; the checkpoints before it are left as they were.
    """
    output = Path(config.output_dir)
    checkpoint = find_checkpoint(config)
    start_step = 0 if checkpoint is None else step_of(checkpoint)
    if accelerator.is_main_process:
        config.save()
        discard_later(output, start_step)
    accelerator.wait_for_everyone()
    set_seed(config.seed)

    bare_model = objective.model.train()
    objective.to(accelerator.device)
    optimizer, lr_scheduler = make_optimizer(bare_model, config)
    model, optimizer = accelerator.prepare(bare_model, optimizer)
    ema = make_ema(bare_model, config)
    accelerator.register_for_checkpointing(lr_scheduler, *([ema] if ema else []))

    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        if ema:
            ema.to(accelerator.device)
    if config.report_to:
        accelerator.init_trackers("diffusers_edu")
    log = TrainingLog(output / LOG_NAME, config.logging_steps, accelerator, start_step)
    steps = optimiser_steps(model, objective, optimizer, lr_scheduler, data, config, accelerator, start_step)
    shown = {"desc": config.rung, "initial": start_step, "total": config.max_train_steps, "mininterval": 0.5}
    bar = tqdm(steps, disable=not accelerator.is_main_process, **shown)
    for step, learning_rate, values in bar:
        if ema:
            ema.step(bare_model.parameters())
        log.add(step, learning_rate, values)
        if bar.format_dict["n"] % 20 == 0 and log.last:
            bar.set_postfix(loss=f"{log.last['loss']:.4f}", refresh=False)
        if step % config.checkpointing_steps == 0 or step == config.max_train_steps:
            log.flush()
            save_checkpoint(accelerator, output, step, config.checkpoints_total_limit)
    log.flush()

    if ema:
        ema.copy_to(bare_model.parameters())
    accelerator.unwrap_model(model, keep_fp32_wrapper=False).eval()
    objective.finish(batches_of(data, config.train_batch_size, accelerator.device))
    if accelerator.is_main_process:
        pipeline.save_pretrained(str(output))
    accelerator.wait_for_everyone()
    if config.report_to:
        accelerator.end_training()


def optimiser_steps(
    model: torch.nn.Module,
    objective: Objective,
    optimizer: Any,
    lr_scheduler: Any,
    data: ImageData,
    config: TrainingConfig,
    accelerator: Accelerator,
    start_step: int,
) -> Iterator[tuple[int, float, dict[str, torch.Tensor]]]:
    """Take optimiser steps; yield after each its number, from 1, its learning rate, and its loss and terms on the device."""
    per_batch = config.train_batch_size * accelerator.num_processes
    total = per_batch * config.gradient_accumulation_steps
    first = accelerator.process_index * config.train_batch_size
    rows = [range(start, start + config.train_batch_size) for start in range(first, total, per_batch)]
    sampler = StepSampler(len(data), config.seed, rows, total, start_step, config.max_train_steps)
    workers = config.dataloader_num_workers
    loader = DataLoader(
        data,
        batch_sampler=sampler,
        collate_fn=as_it_is,
        num_workers=workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    batches = iter(loader)
    for step in range(start_step, config.max_train_steps):
        collected: list[dict[str, torch.Tensor]] = []
        for part in rows:
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in next(batches).items()}
            # The noise of a step is drawn for its whole global batch, so it is the same however that is split.
            noise = StepNoise(config.seed, step, part, total, accelerator.device)
            with accelerator.accumulate(model):
                loss, terms = objective.loss(model, batch, noise)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            collected.append({"loss": loss.detach(), **{name: value.detach() for name, value in terms.items()}})
        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        yield step + 1, learning_rate, {name: torch.stack([v[name] for v in collected]).mean() for name in collected[0]}


def as_it_is(batch: Any) -> Any:
    """The collation of batches that the data set has put together itself."""
    return batch


def make_optimizer(model: torch.nn.Module, config: TrainingConfig) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW and its learning rate schedule, which counts optimiser steps.

    The schedule is not to be prepared: Accelerate would step it once for every process.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,  # one kernel for all parameters: a step of a small network is mostly overhead
    )
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    return optimizer, schedule


def make_ema(model: torch.nn.Module, config: TrainingConfig) -> EMAModel | None:
    if not config.use_ema:
        return None
    return EMAModel(
        model.parameters(),
        decay=config.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=config.ema_inv_gamma,
        power=config.ema_power,
        foreach=True,
    )


def batches_of(data: ImageData, size: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """All the data once, in order."""
    for start in range(0, len(data), size):
        batch = data.__getitems__(list(range(start, min(start + size, len(data)))))
        yield {name: value.to(device) for name, value in batch.items()}
