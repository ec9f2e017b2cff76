"""Checkpoints: `checkpoint-<step>` folders, each whole or not there."""

import shutil
from pathlib import Path

from accelerate import Accelerator

from .configuration import TrainingConfig, UsageError


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
        path = next(reversed(checkpoints(Path(config.output_dir))), None)
    else:
        path = Path(wanted) if Path(wanted).is_dir() else Path(config.output_dir) / wanted
    if path is None:
        return None
    if path.is_dir() and path.name.removeprefix("checkpoint-").isdigit():
        if step_of(path) > config.max_train_steps:
            raise UsageError(f"{path} lies beyond --max_train_steps {config.max_train_steps}; give more steps")
        return path
    raise UsageError(
        f"--resume_from_checkpoint {wanted}: there is no such checkpoint; give 'latest' or a checkpoint-<step> folder"
    )


def discard_later(output: Path, step: int) -> None:
    """Remove the checkpoints of an earlier attempt from beyond the step that this one starts at."""
    for path in checkpoints(output):
        if step_of(path) > step:
            shutil.rmtree(path)


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
