"""The accelerator of a run, whether the launch got the processes that it asked for, and what the processes agree on."""

import atexit
import os
import pickle
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
PATIENCE = timedelta(hours=6)  # one process may decode or encode a whole data set while the others wait

T = TypeVar("T")


class Preempted(Exception):
    """SIGTERM or SIGINT (Ctrl-C) came; a checkpoint was saved. The message says how to go on.

    Args:
        number: of the signal. `status` is what the process is to exit with: 128 + the number, as shells have it.
        step: the last that was taken.
        saved: the checkpoint.
    """

    def __init__(self, number: int, step: int, saved: Path):
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}; the same command goes on from {saved}")
        self.status = 128 + number
        self.arguments = number, step, saved

    def __reduce__(self) -> tuple:  # it comes back from another process too
        return type(self), self.arguments


def attempt(work: Callable[[], T]) -> tuple[Any, Exception | None]:
    """What `work` returns, or None and the error that it raises."""
    try:
        return work(), None
    except Exception as error:
        return None, error


def portable(error: Exception | None) -> Exception | None:
    """An error as it can be sent to another process."""
    copied, cannot = attempt(lambda: pickle.loads(pickle.dumps(error)))
    return copied if cannot is None else RuntimeError(f"{type(error).__name__}: {error}")


def raise_any(accelerator: Accelerator, error: Exception | None) -> None:
    """Raise this process's error, or that of another one: a process that raised alone would leave the others waiting for it."""
    errors = [error]
    if accelerator.num_processes > 1:
        errors = gather_object([portable(error)])
    found = error or next((other for other in errors if other is not None), None)
    if found is not None:
        raise found


def everywhere(accelerator: Accelerator, work: Callable[[], None]) -> None:
    """Do `work` on every process; an error of any is raised by all."""
    raise_any(accelerator, attempt(work)[1])


def one_first(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` returns, which one process of each machine does before the others; an error of any is raised by all."""
    with accelerator.local_main_process_first():
        result, error = attempt(work)
    raise_any(accelerator, error)
    return result


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """What `work` returns on the main process, on every process; an error that it raises, too."""
    result, error = attempt(work) if accelerator.is_main_process else (None, None)
    outcome: list[Any] = [result, portable(error)]
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    found = error or outcome[1]
    if found is not None:
        raise found
    return outcome[0]


class HostGroup:
    """The processes of a run, for what they agree on so often that it must not wait for a device."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if accelerator.num_processes > 1 else None
        if self.group is not None:
            end_before_python(self.group)

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers, on every process; each must ask as often as the others."""
        if self.group is None:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    def raise_any(self, error: Exception | None) -> None:
        """As the function does; where there is no error, as good as free."""
        if self.largest(int(error is not None)):
            raise_any(self.accelerator, error)


class StopSignal:
    """Whether SIGTERM or SIGINT (Ctrl-C) has come to any process. A context: their earlier meaning is put back at the end, and that
    of SIGINT once it has come, so that a second one stops the process at once. What is ignored stays ignored.
    """

    def __init__(self, accelerator: Accelerator):
        self.received = 0
        self.group = HostGroup(accelerator)
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number in self.before:
            self._put_back(number)

    def _note(self, number: int, _: object) -> None:
        self.received = max(self.received, number)
        if number == signal.SIGINT:
            self._put_back(number)

    def _put_back(self, number: int) -> None:
        signal.signal(number, self.before[number] or signal.SIG_DFL)

    def agreed(self) -> int:
        """The number of the signal that came, or 0; the same on every process, each of which must ask as often as the others."""
        return self.group.largest(self.received)


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
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
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
    check_processes(accelerator.num_processes)
    end_before_python()
    return accelerator


def launched_processes() -> PartialState:
    """The processes of a launch that trains nothing.

    Raises:
        UsageError: they are not as many as it asked for.
    """
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    check_processes(state.num_processes)
    end_before_python()
    return state


def end_before_python(group: Any = None) -> None:
    """Have the threads of a group, or of all processes, end as this process exits, before the interpreter does.

    One of gloo's that lets go of a tensor later than that is stopped by Python in the middle of C++, and aborts the process: "terminate
    called without an active exception" (https://github.com/pytorch/pytorch/pull/179291). The threads of others are left alone: ending
    them can wait for a process that has failed.
    """

    def end() -> None:
        if dist.is_initialized():
            dist.destroy_process_group(group)

    if dist.is_initialized() and dist.get_backend(group) == "gloo":
        atexit.register(end)


def check_processes(running: int) -> None:
    """Raise a `UsageError` where the launch asked for another number of processes than there are."""
    asked_for = processes_asked_for()
    if running != asked_for:
        raise UsageError(
            f"the launch asked for {asked_for} processes, but {running} runs; without GPUs use "
            f"'accelerate launch --multi_gpu --num_processes {asked_for}' or 'torchrun --nproc_per_node {asked_for}'"
        )


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
