"""One training loop on Accelerate, for every rung. It knows objectives; it does not know what they train."""

import json
import math
import shutil
import time
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

from .configuration import TrainingConfig, UsageError
from .data import ImageData
from .objectives import Objective
from .randomness import StepNoise, StepSampler

LOG_NAME = "log.jsonl"


class TrainingLog:
    """`log.jsonl`: one object for each optimiser step. Losses stay on their device until they are written together.

    Args:
        path: of the file; lines of steps after `start_step` are dropped, as a resumed run takes them again.
        every: steps between lines.
        accelerator: averages over the processes.
        start_step: the steps that an earlier run has done.
    """

    def __init__(self, path: Path, every: int, accelerator: Accelerator, start_step: int):
        self.path, self.every, self.accelerator = path, every, accelerator
        # On a CPU reading a loss is free; elsewhere it waits for the device.
        self.capacity = 1 if accelerator.device.type == "cpu" else 50
        self.pending: list[tuple[dict[str, float], dict[str, torch.Tensor]]] = []
        self.seconds_before = 0.0
        self.last: dict[str, float] = {}
        kept = [line for line in read_log(path) if line["step"] <= start_step] if start_step else []
        if kept:
            self.seconds_before = kept[-1]["seconds"]
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        self.start = time.perf_counter()

    def add(self, step: int, learning_rate: float, values: dict[str, torch.Tensor]) -> None:
        """Note the values of a step; write them when enough have come together."""
        seconds = self.seconds_before + time.perf_counter() - self.start
        facts = {"step": step, "seconds": round(seconds, 4), "learning_rate": learning_rate}
        self.pending.append((facts, values))
        if len(self.pending) >= self.capacity:
            self.flush()

    def flush(self) -> None:
        """Average over the processes and write.

        Raises:
            FloatingPointError: a loss that is not finite; the message names the step.
        """
        if not self.pending:
            return
        stacked = torch.stack([torch.stack([v.detach().float() for v in values.values()]) for _, values in self.pending])
        averaged = self.accelerator.reduce(stacked, reduction="mean").tolist()
        lines: list[dict[str, float]] = []
        for (facts, values), row in zip(self.pending, averaged, strict=True):
            named = dict(zip(values, row, strict=True))
            if not math.isfinite(named["loss"]):
                self.pending = []
                self._write(lines)
                raise FloatingPointError(
                    f"the loss is {named['loss']} at step {facts['step']}: stopped, and earlier checkpoints are kept; "
                    "a lower --learning_rate or a longer --lr_warmup_steps may help"
                )
            self.last = {"step": facts["step"], **named, **facts}
            if facts["step"] % self.every == 0:
                lines.append(self.last)
        self.pending = []
        self._write(lines)

    def _write(self, lines: list[dict[str, float]]) -> None:
        if lines and self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        for line in lines:
            self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=int(line["step"]))


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log, without a last one that was cut off in writing."""
    lines: list[dict[str, float]] = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


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
    if accelerator.is_main_process:
        config.save()
    accelerator.wait_for_everyone()
    checkpoint = find_checkpoint(config)
    set_seed(config.seed)

    bare_model = objective.model.train()
    objective.to(accelerator.device)
    optimizer = torch.optim.AdamW(
        bare_model.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,  # one kernel for all parameters: a step of a small network is mostly overhead
    )
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    # The schedule counts optimiser steps. Not prepared: Accelerate would step it once for every process.
    model, optimizer = accelerator.prepare(bare_model, optimizer)
    ema = make_ema(bare_model, config)
    accelerator.register_for_checkpointing(lr_scheduler, *([ema] if ema else []))

    start_step = 0
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        start_step = step_of(checkpoint)
        if ema:
            ema.to(accelerator.device)
    if config.report_to:
        accelerator.init_trackers("diffusers_edu")
    log = TrainingLog(output / LOG_NAME, config.logging_steps, accelerator, start_step)
    steps = optimiser_steps(model, objective, optimizer, lr_scheduler, data, config, accelerator, start_step)
    bar = tqdm(
        steps, desc=config.rung, initial=start_step, total=config.max_train_steps, disable=not accelerator.is_main_process,
        mininterval=0.5,
    )  # fmt: skip
    for step, values in bar:
        if ema:
            ema.step(bare_model.parameters())
        log.add(step, lr_scheduler.get_last_lr()[0], values)
        if bar.format_dict["n"] % 20 == 0 and log.last:
            bar.set_postfix(loss=f"{log.last['loss']:.4f}", refresh=False)
        if step % config.checkpointing_steps == 0 and step < config.max_train_steps:
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
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Take optimiser steps, and yield after each its number, from 1, and its loss and terms as scalars on the device."""
    per_batch = config.train_batch_size * accelerator.num_processes
    total = per_batch * config.gradient_accumulation_steps
    first = accelerator.process_index * config.train_batch_size
    rows = [range(start, start + config.train_batch_size) for start in range(first, total, per_batch)]
    sampler = StepSampler(len(data), config.seed, rows, total, start_step, config.max_train_steps)
    workers = config.dataloader_num_workers
    loader = DataLoader(
        data,
        batch_sampler=sampler,
        collate_fn=lambda batch: batch,
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
        lr_scheduler.step()
        yield step + 1, {name: torch.stack([values[name] for values in collected]).mean() for name in collected[0]}


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


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def checkpoints(output: Path) -> list[Path]:
    """The finished checkpoints of a run, the oldest first."""
    found = [path for path in output.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def find_checkpoint(config: TrainingConfig) -> Path | None:
    """The checkpoint to go on from, or None to start anew.

    Raises:
        UsageError: one was named that does not exist. `latest` where there is none yet is a start.
    """
    wanted = config.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted == "latest":
        return next(reversed(checkpoints(Path(config.output_dir))), None)
    path = Path(wanted) if Path(wanted).is_dir() else Path(config.output_dir) / wanted
    if path.is_dir() and path.name.removeprefix("checkpoint-").isdigit():
        return path
    raise UsageError(
        f"--resume_from_checkpoint {wanted}: there is no such checkpoint; give 'latest' or a checkpoint-<step> folder"
    )


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, limit: int | None) -> None:
    """Save the state aside and rename it, so that a checkpoint is whole or is not there; then drop the oldest over the limit."""
    aside = output / f"saving-checkpoint-{step}"
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        final = output / f"checkpoint-{step}"
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        if limit is not None:
            for old in checkpoints(output)[:-limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
