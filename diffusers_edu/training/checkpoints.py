"""Checkpoints: `checkpoint-<step>` folders, each whole or not there, of safetensors and JSON. Nothing in them is unpickled.

    model.safetensors      the weights
    optimizer.safetensors  AdamW's moments, as `<parameter>/<moment>`
    averages.safetensors   moving averages of the weights, as `<average>/<parameter>`
    state.json             the step, the schedule, the seconds and skipped images so far, and the digests of the files

Weights and moments are those of the whole model whatever its shards, so a checkpoint of one launch is good for any other.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from ..errors import UsageError, first_line
from .averages import Averages, reshard
from .configuration import TrainingConfig
from .launch import on_main

STATE_NAME = "state.json"
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
Tensors = dict[str, torch.Tensor]


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_checkpoint(path: Path) -> bool:
    return path.name.startswith("checkpoint-") and path.name.removeprefix("checkpoint-").isdigit()


def checkpoints(output: Path) -> list[Path]:
    """The finished checkpoints of a run, the oldest first."""
    return sorted(filter(is_checkpoint, output.glob("checkpoint-*")), key=step_of)


def find_checkpoint(config: TrainingConfig) -> Path | None:
    """The checkpoint to go on from: the one named, or the newest; None to start anew.

    One is gone back to once. The configuration that the run's folder holds then names it, and when the same command is given again,
    as after a kill, the run goes on from the newest that it has made since.

    Raises:
        UsageError: one was named that does not exist, or it lies beyond the last step.
    """
    output, wanted = Path(config.output_dir), config.resume_from_checkpoint
    found = checkpoints(output)
    if wanted not in (None, "latest"):
        # In the run's folder first; what the current directory holds may be another run's.
        named = [path for path in (output / str(wanted), Path(str(wanted))) if path.is_dir() and is_checkpoint(path)][:1]
        been_there = config.saved().get("resume_from_checkpoint") == wanted
        found = [*named, *found] if been_there else named
        if not found:
            raise UsageError(
                f"--resume_from_checkpoint {wanted}: there is no such checkpoint; give 'latest' or a checkpoint-<step> folder"
            )
    newest = max(found, key=step_of, default=None)
    if newest is not None and step_of(newest) > config.max_train_steps:
        raise UsageError(f"{newest} lies beyond --max_train_steps {config.max_train_steps}; give more steps")
    return newest


def remove(path: Path) -> None:
    """Remove a folder; if that is cut off, what is left has a name that nobody looks for."""
    aside = path.with_name(f"removing-{path.name}")
    path.rename(aside)
    shutil.rmtree(aside)


def discard_later(output: Path, step: int) -> None:
    """Remove the checkpoints of an earlier attempt from beyond the step that this one starts at, and what was left half done."""
    for path in [*output.glob("saving-*"), *output.glob("removing-*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in checkpoints(output):
        if step_of(path) > step:
            remove(path)


class TrainingState:
    """All that a step changes: the weights, AdamW's moments, the learning rate's schedule, the averages, the loss scale.

    Args:
        model, optimizer: as the accelerator prepared them.
        lr_scheduler: of the optimizer.
        averages: of the weights.
        accelerator: of the run.
        total: rows of the global batch.
    """

    def __init__(self, model: Any, optimizer: Any, lr_scheduler: Any, averages: Averages, accelerator: Accelerator, total: int):
        self.model, self.lr_scheduler, self.averages = model, lr_scheduler, averages
        self.optimizer = getattr(optimizer, "optimizer", optimizer)  # without Accelerate's wrapper
        self.accelerator, self.total = accelerator, total

    def weights(self, average: str | None = None) -> Tensors:
        """The weights of the whole model, or an average of them, on the host of the main process; {} on the others."""
        with self.averages.applied(average):
            found: Any = get_model_state_dict(self.model, options=FULL)
            if not self.accelerator.is_main_process:
                return {}
            # Without shards on a CPU they are the weights themselves, which go on to change.
            return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}

    def load_weights(self, weights: Tensors) -> None:
        """Put weights of the whole model, held by the main process, into the model of every process."""
        reshard(self.model)
        set_model_state_dict(self.model, dict(weights), options=full_from_main())

    def save(self, output: Path, step: int, limit: int | None, so_far: dict[str, float]) -> Path:
        """Write `checkpoint-<step>` aside and rename it; then drop the oldest over the limit. `so_far` is the log's.

        Raises:
            UsageError: it cannot be written (a full disk); the checkpoints before it are left as they were.
        """
        moments: Any = get_optimizer_state_dict(self.model, self.optimizer, options=FULL)
        parts: dict[str, Tensors] = {
            "model": self.weights(),
            "optimizer": {
                f"{name}/{key}": tensor for name, state in moments.get("state", {}).items() for key, tensor in state.items()
            },
            "averages": {f"{a}/{name}": w for a in self.averages.members for name, w in self.weights(a).items()},
        }
        scaler = self.accelerator.scaler
        schedule = {k: v for k, v in self.lr_scheduler.state_dict().items() if k != "lr_lambdas"}
        state = {
            "step": step,
            "global_batch_size": self.total,
            "launch": f"{self.accelerator.distributed_type.value}, {self.accelerator.num_processes} processes",
            "lr_scheduler": schedule,
            "param_groups": moments.get("param_groups"),
            "scaler": None if scaler is None else scaler.state_dict(),
            "averages": {name: average.optimization_step for name, average in self.averages.members.items()},
            **so_far,
        }
        final = output / f"checkpoint-{step}"
        on_main(self.accelerator, lambda: write(final, parts, state, limit))
        return final

    def load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Put back what `save` wrote; `state` is what `check` found."""
        parts: dict[str, Tensors] = {"model": {}, "optimizer": {}, "averages": {}}

        def read() -> None:
            for name, part in parts.items():
                part.update(load_file(checkpoint / f"{name}.safetensors"))

        on_main(self.accelerator, read)
        for name, step in state["averages"].items():
            prefix = f"{name}/"
            self.load_weights({k.removeprefix(prefix): v for k, v in parts["averages"].items() if k.startswith(prefix)})
            self.averages.restore(name, step)
        self.load_weights(parts["model"])
        set_optimizer_state_dict(
            self.model, self.optimizer, nested(parts["optimizer"], state["param_groups"]), options=full_from_main()
        )
        # The functions of the schedule are made anew from the configuration.
        self.lr_scheduler.load_state_dict({**state["lr_scheduler"], "lr_lambdas": [None] * len(self.optimizer.param_groups)})
        for group, learning_rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = learning_rate
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def full_from_main() -> StateDictOptions:
    """Options to give to all processes what the main one holds of the whole model."""
    return StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=dist.is_initialized())


def nested(moments: Tensors, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of an optimizer, from the tensors `<parameter>/<moment>`; {} where there are none."""
    state: dict[str, Tensors] = {}
    for name, tensor in moments.items():
        parameter, moment = name.rsplit("/", 1)
        state.setdefault(parameter, {})[moment] = tensor
    return {"state": state, "param_groups": groups} if state else {}


def write_pipeline(pipeline: Any, output: Path) -> None:
    """Save a pipeline aside and move its parts into the run's folder, `model_index.json`, without which none is seen, last.

    Raises:
        UsageError: it cannot be written.
    """
    aside = output / "saving-pipeline"
    index = "model_index.json"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        pipeline.save_pretrained(str(aside))
        (output / index).unlink(missing_ok=True)
        for part in sorted(aside.iterdir(), key=lambda path: path.name == index):
            if (output / part.name).is_dir():
                remove(output / part.name)
            part.replace(output / part.name)
        aside.rmdir()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UsageError(f"{output} cannot be written ({reason_of(error)}); make room, and the same command goes on") from error


def reason_of(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)


def to_disk(path: Path) -> None:
    """Have a file or folder written to the disk now, so that it outlives a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def write(final: Path, parts: dict[str, Tensors], state: dict[str, Any], limit: int | None) -> None:
    """The files of a checkpoint. The last to be written holds the digests of the others."""
    aside = final.with_name(f"saving-{final.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, tensors in parts.items():
            save_file(tensors, aside / f"{name}.safetensors")
        state = {**state, "files": {path.name: digest(path) for path in sorted(aside.iterdir())}}
        (aside / STATE_NAME).write_text(json.dumps(state, indent=2) + "\n")
        for path in [*aside.iterdir(), aside]:
            to_disk(path)
        if final.exists():
            remove(final)
        aside.rename(final)
        to_disk(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UsageError(
            f"{final} cannot be written ({reason_of(error)}): stopped, and earlier checkpoints "
            "are kept; make room, and the same command goes on"
        ) from error
    for old in checkpoints(final.parent)[:-limit] if limit is not None else []:
        remove(old)


def check(checkpoint: Path, total: int) -> dict[str, Any]:
    """The state of a checkpoint, once its files have been found to be those that were written.

    Raises:
        UsageError: a file is missing or another (the message names it), or the run had another global batch than `total` rows.
    """
    damaged = f"{checkpoint} is damaged (%s); remove it, and the same command goes on from the newest that is left"
    try:
        state = json.loads((checkpoint / STATE_NAME).read_text())
        files: dict[str, str] = state["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(damaged % STATE_NAME) from error
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file() or digest(path) != expected:
            raise UsageError(damaged % name)
    if state["global_batch_size"] != total:
        raise UsageError(
            f"{checkpoint} is of a run with {state['global_batch_size']} images a step, and this one has {total}; "
            "choose --train_batch_size and --gradient_accumulation_steps so that they are the same"
        )
    return state
