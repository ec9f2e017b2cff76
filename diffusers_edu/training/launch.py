"""The accelerator of a run, and whether the launch got the processes that it asked for."""

import os
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator, DistributedType
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import ProjectConfiguration

from .configuration import TrainingConfig, UsageError

LAUNCHERS = ("accelerate", "accelerate-launch", "accelerate.commands.accelerate_cli", "accelerate.commands.launch")
LAUNCH_FILE = "accelerate/commands/launch.py"


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """The accelerator of a run, with as many processes as the launch asked for.

    Raises:
        UsageError: it has another number, or the machine cannot do the mixed precision or the tracking asked for.
    """
    tracker = [config.report_to] if config.report_to and config.report_to != "none" else None
    try:
        accelerator = Accelerator(
            # Without this, processes on a machine that has no accelerator would each believe to be alone.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=tracker,
            project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=f"{config.output_dir}/logs"),
        )
    except (ValueError, ImportError) as error:
        raise UsageError(str(error).splitlines()[0]) from error
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise UsageError(f"{accelerator.distributed_type.value} shards the weights, which this trainer does not support")
    asked_for = processes_asked_for()
    if accelerator.num_processes != asked_for:
        raise UsageError(
            f"the launch asked for {asked_for} processes, but {accelerator.num_processes} runs; without GPUs use "
            f"'accelerate launch --multi_gpu --num_processes {asked_for}' or 'torchrun --nproc_per_node {asked_for}'"
        )
    return accelerator


def processes_asked_for() -> int:
    """The number of processes that the launch was to start.

    `accelerate launch --cpu --num_processes 2` starts one process and sets no variable that says so: what was asked for is then
    read from the launcher's own command line and configuration file.
    """
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    try:
        parent = psutil.Process().parent()
        command = parent.cmdline() if parent is not None else []
    except psutil.Error:  # it has ended, or is not ours to see
        return 1
    launcher = next((i for i, word in enumerate(command) if Path(word).name in LAUNCHERS or word.endswith(LAUNCH_FILE)), None)
    if launcher is None:
        return 1
    flags = [word for word in command[launcher + 1 :] if word != "launch"]
    launch, _ = launch_command_parser().parse_known_args(flags)
    asked_for = launch.num_processes
    file = launch.config_file or (default_config_file if Path(default_config_file).is_file() else None)
    if asked_for is None and file is not None:
        asked_for = load_config_from_file(file).num_processes
    return max(1, asked_for or 1)
