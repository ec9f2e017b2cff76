"""`log.jsonl`: what every optimiser step gave, written as it comes."""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from .configuration import write_text
from .launch import HostGroup, attempt, on_main

LOG_NAME = "log.jsonl"


class TrainingLog:
    """`log.jsonl`: one object for each optimiser step. Losses stay on their device until they are written together.

    Args:
        path: of the file; lines of steps after `start_step` are dropped, as a resumed run takes them again.
        every: steps between lines.
        accelerator: averages over the processes.
        start_step: the steps that an earlier run has done.
        so_far: what `so_far` was after them, from the checkpoint: of steps that had no line the log does not tell.
    """

    def __init__(self, path: Path, every: int, accelerator: Accelerator, start_step: int, so_far: dict[str, Any]):
        self.path, self.every, self.accelerator, self.group = path, every, accelerator, HostGroup(accelerator)
        # On a CPU reading a loss is free; elsewhere it waits for the device.
        self.capacity = 1 if accelerator.device.type == "cpu" else 50
        self.pending: list[tuple[dict[str, float], dict[str, torch.Tensor]]] = []
        self.seconds = self.seconds_before = so_far.get("seconds", 0.0)
        self.skipped = so_far.get("skipped_images", 0.0)
        self.last: dict[str, float] = {}
        on_main(accelerator, lambda: cut_log(path, start_step))
        self.start = time.perf_counter()

    def so_far(self) -> dict[str, float]:
        """The training time and the images left out, up to the last step that was flushed."""
        return {"seconds": self.seconds, "skipped_images": self.skipped}

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
            FloatingPointError: a loss, or a norm of the gradients, that is not finite; the message names the step.
        """
        if not self.pending:
            return
        stacked = torch.stack([torch.stack(list(values.values())) for _, values in self.pending])
        averaged = self.accelerator.reduce(stacked, reduction="mean").tolist()
        lines: list[dict[str, float]] = []
        for (facts, values), row in zip(self.pending, averaged, strict=True):
            named = dict(zip(values, row, strict=True))
            # Where a loss scale is sought, as in fp16, gradients that are not finite are part of the search.
            watched = ("loss",) if self.accelerator.scaler is not None else ("loss", "grad_norm")
            wrong = next((name for name in watched if not math.isfinite(named.get(name, 0.0))), None)
            if wrong is not None:
                self.pending = []
                self._write(lines)
                what = "loss" if wrong == "loss" else "norm of the gradients"
                raise FloatingPointError(
                    f"the {what} is {named[wrong]} at step {facts['step']}: stopped, and earlier checkpoints are kept; "
                    "a lower --learning_rate or a longer --lr_warmup_steps may help"
                )
            if "skipped_images" in named:  # of the run so far; what comes in is the mean over the processes
                self.skipped += round(named["skipped_images"] * self.accelerator.num_processes)
                named["skipped_images"] = self.skipped
            self.seconds = facts["seconds"]
            self.last = {"step": facts["step"], **named, **facts}
            if facts["step"] % self.every == 0:
                lines.append(self.last)
        self.pending = []
        self._write(lines)

    def _write(self, lines: list[dict[str, float]]) -> None:
        def write() -> None:
            if self.accelerator.is_main_process:
                with self.path.open("a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
            for line in lines:
                self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=int(line["step"]))

        if lines:
            self.group.raise_any(attempt(write)[1])


def cut_log(path: Path, step: int) -> None:
    """Drop the lines of later steps, and one that was cut off in writing; in one piece."""
    if path.exists():
        write_text(path, "".join(json.dumps(line) + "\n" for line in read_log(path) if line["step"] <= step))


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a log, without a last one that was cut off in writing."""
    lines: list[dict[str, float]] = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
