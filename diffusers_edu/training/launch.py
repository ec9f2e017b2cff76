"""The accelerator of a run, whether the launch got the processes that it asked for, and what the processes agree on."""

import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from torch import distributed as dist

from ..errors import UsageError
from .configuration import TrainingConfig

LAUNCHERS = ("accelerate", "accelerate-launch", "accelerate.commands.accelerate_cli", "accelerate.commands.launch")
LAUNCH_FILE = "accelerate/commands/launch.py"

T = TypeVar("T")


class Preempted(Exception):
    """SIGTERM came; a checkpoint was saved. The message says how to go on."""


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` returns on the main process, on every process; a `UsageError` that it raises, too."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except UsageError as error:
            outcome[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UsageError(outcome[1])
    return outcome[0]


def one_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` returns, which one process of each machine does before the others; a `UsageError` of any is raised by all."""
    outcome: list[Any] = []
    message = None
    with accelerator.local_main_process_first():
        try:
            outcome.append(work())
        except UsageError as error:
            message = str(error)
    messages = [m for m in gather_object([message]) if m is not None]
    if messages:
        raise UsageError(messages[0])
    return outcome[0]


class StopSignal:
    """Whether SIGTERM has come to any process. A context: the signal's earlier meaning is put back at the end."""

    def __init__(self, accelerator: Accelerator):
        self.received = False
        # On the host, so that nothing waits for a device.
        self.group = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def __enter__(self) -> "StopSignal":
        self.before = None
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGTERM, self.before)

    def _note(self, *_: object) -> None:
        self.received = True

    def agreed(self) -> bool:
        """The same answer on every process; each must ask as often as the others."""
        if self.group is None:
            return self.received
        flag = torch.tensor(int(self.received))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag)


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
            # A plugin, since the environment would overrule a number.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.gradient_accumulation_steps),
            # One process may decode or encode a whole data set while the others wait.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
            log_with=tracker,
            project_config=ProjectConfiguration(project_dir=config.output_dir, logging_dir=f"{config.output_dir}/logs"),
        )
    except (ValueError, ImportError) as error:
        raise UsageError(str(error).splitlines()[0]) from error
    if tracker and not accelerator.log_with:
        raise UsageError(f"--report_to {config.report_to}: that package is not installed")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("no", config.mixed_precision):
        raise UsageError(f"the launch asks for {launched}; give the script --mixed_precision {launched} too, which decides")
    if accelerator.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu(accelerator)
    fsdp = accelerator.state.fsdp_plugin if accelerator.distributed_type == DistributedType.FSDP else None
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise UsageError("FSDP 1 is not supported: launch with --fsdp_version 2")
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UsageError(f"{accelerator.distributed_type.value} shards the weights, which this trainer does not support")
    asked_for = processes_asked_for()
    if accelerator.num_processes != asked_for:
        raise UsageError(
            f"the launch asked for {asked_for} processes, but {accelerator.num_processes} runs; without GPUs use "
            f"'accelerate launch --multi_gpu --num_processes {asked_for}' or 'torchrun --nproc_per_node {asked_for}'"
        )
    return accelerator


def shard_on_cpu(accelerator: Accelerator) -> None:
    """Take up FSDP without a GPU, as torch can and Accelerate does not, so that a sharded run can be tried anywhere."""
    plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


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
