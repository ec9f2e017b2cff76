"""One training loop on Accelerate, for every rung. It knows objectives; it does not know what they train."""

import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from diffusers.optimization import get_scheduler
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from ..errors import UsageError
from .averages import Averages, discard_snapshots, save_snapshot, snapshot_steps, synthesise
from .batches import make_batches
from .checkpoints import TrainingState, check, discard_later, find_checkpoint, step_of, write_pipeline
from .configuration import TrainingConfig
from .data import ImageData, on_device
from .latents import encode_data, keeps_latents
from .launch import Preempted, StopSignal, everywhere, on_main
from .log import LOG_NAME, TrainingLog, cut_log
from .objectives import Objective
from .randomness import AddressedDropout, StepNoise, derived_seed
from .validation import VALIDATION_NAME, Validation

Steps = Generator[tuple[int, float, dict[str, torch.Tensor]], None, None]
MEASURED = 10_000  # images, at most, from which `Objective.finish` measures what the pipeline needs


def train(
    pipeline: Any,
    objective: Objective,
    data: Any,
    held_out: ImageData,
    config: TrainingConfig,
    accelerator: Accelerator,
    sampling: dict[str, Any] | None = None,
) -> None:
    """Train `objective.model` and save the pipeline that holds it in `config.output_dir`.

    Written there: the configuration before the first step, `log.jsonl`, `validation.jsonl`, `samples/`, `checkpoint-<step>/` folders,
    and at the end the pipeline, with the averaged weights where `use_ema` is on. A run that has been there goes on from its newest
    checkpoint, to the same weights, bit for bit. Randomness is addressed: see [`StepNoise`].

    Args:
        pipeline: a diffusers pipeline that holds the objective's model.
        objective: what to descend.
        data: the images to train on, an [`ImageData`] or [`StreamedImages`].
        held_out: images that are measured while the run goes on.
        config: the run; validated.
        accelerator: see [`launch.make_accelerator`].
        sampling: arguments of the pipeline's call, such as `num_inference_steps`, for samples on the way.

    Raises:
        UsageError: the folder holds another run, a checkpoint is damaged or not there, or nothing can be written.
        FloatingPointError: a loss that is not finite; the checkpoints before it are left as they were.
        Preempted: SIGTERM or SIGINT came; a checkpoint was saved.
    """
    output = Path(config.output_dir)
    total = global_batch_size(config, accelerator)
    checkpoint, saved_state = on_main(accelerator, lambda: prepare_folder(config, total))
    start_step = 0 if checkpoint is None else step_of(checkpoint)
    bare_model = objective.model.train()
    objective.to(accelerator.device)
    if keeps_latents(objective, data):
        data = encode_data(objective.vae, data, config.random_flip, config.train_batch_size, accelerator)

    check_shards(bare_model, accelerator)
    optimizer, lr_scheduler = make_optimizer(bare_model, config)
    model, optimizer = accelerator.prepare(bare_model, optimizer)
    averages = Averages(model, config)
    state = TrainingState(model, optimizer, lr_scheduler, averages, accelerator, total)
    if checkpoint is not None:
        state.load(checkpoint, saved_state)
    if config.report_to:
        # What an earlier attempt has told TensorBoard of the steps to come does not count.
        options = {"config": config.as_hyperparameters(), "init_kwargs": {"tensorboard": {"purge_step": start_step + 1}}}
        everywhere(accelerator, lambda: accelerator.init_trackers("diffusers_edu", **options))
    validation = Validation(pipeline, objective, model, held_out, averages, accelerator, config, sampling or {})
    log = TrainingLog(output / LOG_NAME, config.logging_steps, accelerator, start_step, saved_state)
    steps = optimiser_steps(model, objective, optimizer, lr_scheduler, data, config, accelerator, start_step)
    follow(steps, start_step, state, log, validation, config)
    finish(pipeline, objective, model, data, state, config, accelerator)


def follow(
    steps: Steps, start_step: int, state: TrainingState, log: TrainingLog, validation: Validation, config: TrainingConfig
) -> None:
    """Take the steps to the last, and after each do what is due: average, log, keep, measure, save; stop where a signal says so."""
    output, accelerator, kept = Path(config.output_dir), state.accelerator, snapshot_steps(config)
    shown: dict[str, Any] = {"desc": config.rung, "initial": start_step, "total": config.max_train_steps, "mininterval": 0.5}
    bar = tqdm(steps, **shown, **({} if accelerator.is_main_process else {"disable": True}))
    with StopSignal(accelerator) as stop, closing(steps):
        for step, learning_rate, values in bar:
            state.averages.step()
            log.add(step, learning_rate, values)
            if step % 20 == 0 and log.last:
                bar.set_postfix(loss=f"{log.last['loss']:.4f}", refresh=False)
            if step in kept or (config.validation_steps and step % config.validation_steps == 0):
                log.flush()  # which stops a run that diverges, before anything of it is kept
            if step in kept:
                keep_averages(state, output, step)
            if config.validation_steps and step % config.validation_steps == 0:
                validation(step)
            last, stopped = step == config.max_train_steps, stop.agreed()
            if step % config.checkpointing_steps == 0 or last or stopped:
                log.flush()
                saved = state.save(output, step, config.checkpoints_total_limit, log.so_far())
                if stopped and not last:
                    raise Preempted(stopped, step, saved)


def prepare_folder(config: TrainingConfig, total: int) -> tuple[Path | None, dict[str, Any]]:
    """Write the configuration, and clear away what an earlier attempt left beyond the step that this one starts at.

    Returns the checkpoint to go on from, if any, and its state, once that has been found to be whole and of the same global
    batch, `total`. Nothing is changed where a `UsageError` is raised.
    """
    output = Path(config.output_dir)
    config.check_folder()
    checkpoint = find_checkpoint(config)
    start_step = 0 if checkpoint is None else step_of(checkpoint)
    state = {} if checkpoint is None else check(checkpoint, total)
    before = config.saved().get("resume_from_checkpoint")
    replace(config, resume_from_checkpoint=before).write()
    discard_later(output, start_step)
    discard_snapshots(output, start_step)
    cut_log(output / VALIDATION_NAME, start_step)
    config.save()  # that the run has gone back is noted once it has; see `find_checkpoint`
    wanted = config.resume_from_checkpoint or "latest"
    if checkpoint is not None and wanted != "latest" and Path(wanted).name != checkpoint.name:
        note = f"it has gone back to {wanted} before; to do so again, remove the later checkpoints"
        print(f"{output} goes on from {checkpoint.name}: {note}", file=sys.stderr)
    return checkpoint, state


def check_shards(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Raise a `UsageError` for a model that Accelerate cannot shard, where it is to."""
    outside = [name for name, _ in model.named_parameters() if "." not in name]
    if accelerator.distributed_type == DistributedType.FSDP and outside:
        raise UsageError(f"FSDP: {', '.join(outside)} lies in no layer, and cannot be sharded; launch without --use_fsdp")


def global_batch_size(config: TrainingConfig, accelerator: Accelerator) -> int:
    """Images of an optimiser step, over all processes and accumulated batches."""
    return config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps


def optimiser_steps(
    model: torch.nn.Module,
    objective: Objective,
    optimizer: Any,
    lr_scheduler: Any,
    data: Any,
    config: TrainingConfig,
    accelerator: Accelerator,
    start_step: int,
) -> Steps:
    """Take optimiser steps; yield after each its number, from 1, its learning rate, and its loss and terms on the device."""
    per_batch = config.train_batch_size * accelerator.num_processes
    total = global_batch_size(config, accelerator)
    first = accelerator.process_index * config.train_batch_size
    parts = [range(start, start + config.train_batch_size) for start in range(first, total, per_batch)]
    reading = make_batches(data, parts, total, start_step, config, accelerator)
    parameters = list(model.parameters())  # to look for them takes a millisecond
    # The names of the dropouts are those that no wrapper has changed.
    with closing(reading) as batches, closing(AddressedDropout(objective.model)) as dropout:
        for step in range(start_step, config.max_train_steps):
            collected: list[dict[str, torch.Tensor]] = []
            skipped = getattr(data, "skipped", 0) if step == 0 and accelerator.is_main_process else 0
            for part in parts:
                batch = on_device(next(batches), accelerator.device)
                skipped += batch.pop("skipped", 0)
                noise = StepNoise(config.seed, step, part, total, accelerator.device)
                # What draws from torch's own stream, against the rules, is at least the same after a restart.
                torch.manual_seed(derived_seed(config.seed, "stray", step, part.start))
                with accelerator.accumulate(model), dropout.of(noise):
                    loss, terms = objective.loss(model, batch, noise)
                    accelerator.backward(loss.mean())
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                collected.append({name: value.detach().float().mean() for name, value in {"loss": loss, **terms}.items()})
            learning_rate = lr_scheduler.get_last_lr()[0]
            lr_scheduler.step()
            values = {name: torch.stack([v[name] for v in collected]).mean() for name in collected[0]}
            values["grad_norm"] = norm.full_tensor() if isinstance(norm, DTensor) else norm.detach()
            if config.on_bad_image == "skip":
                values["skipped_images"] = torch.tensor(float(skipped), device=accelerator.device)
            yield step + 1, learning_rate, values


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


def keep_averages(state: TrainingState, output: Path, step: int) -> None:
    """Write the averages from which others can be made after the run."""
    weights = {name: state.weights(name) for name in state.averages.members}

    def write() -> None:
        for name, tensors in weights.items():
            save_snapshot(output, step, name, tensors)

    on_main(state.accelerator, write)


def finish(
    pipeline: Any,
    objective: Objective,
    model: torch.nn.Module,
    data: Any,
    state: TrainingState,
    config: TrainingConfig,
    accelerator: Accelerator,
) -> None:
    """Give the pipeline the weights that the run ends with, and save it."""
    output = Path(config.output_dir)
    weights: dict[str, torch.Tensor] = {}
    sigma_rel = config.ema_sigma_rel if config.use_ema else None
    if sigma_rel is None:
        weights = state.weights(state.averages.shown)
    else:
        on_main(accelerator, lambda: weights.update(synthesise(output, sigma_rel)))
    state.load_weights(weights)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    def save() -> None:
        if isinstance(objective.model, FSDPModule):
            gather_model(pipeline, objective, weights)
        objective.model.eval()
        objective.finish(batches_of(data, config.train_batch_size, accelerator.device))
        write_pipeline(pipeline, output)

    on_main(accelerator, save)
    # accelerator.end_training() would also part the processes, which have more to tell each other.
    for tracker in accelerator.trackers:
        tracker.finish()


def gather_model(pipeline: Any, objective: Objective, weights: dict[str, torch.Tensor]) -> None:
    """Put a whole model in place of this process's shards of it."""
    sharded = objective.model
    original: Any = next(kind for kind in type(sharded).__mro__ if not issubclass(kind, FSDPModule))
    whole = original.from_config(sharded.config)
    whole.to(next(iter(sharded.parameters())).device).load_state_dict(weights)
    name = next(name for name, part in pipeline.components.items() if part is sharded)
    pipeline.register_modules(**{name: whole})
    objective.model = whole


def batches_of(data: Any, size: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """The first images once, in order."""
    images = data.head(MEASURED)
    for start in range(0, len(images), size):
        yield on_device(images.batch(list(range(start, min(start + size, len(images))))), device)
