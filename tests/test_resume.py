"""Runs that are cut off: killed, stopped, out of disk, damaged. The same command goes on, and ends in the same bytes."""

import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
# Imports are most of a short run: one process does them once, and forks a child for each run.
SERVER = """
import json, os, resource, signal, sys
import diffusers_edu.rungs, diffusers_edu.training.trainer, datasets, sklearn.datasets, sklearn.model_selection
from diffusers_edu.cli import main
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what was started in the background may ignore it
        os.environ.update(order["env"])
        with open(order["stderr"], "w") as file:
            os.dup2(file.fileno(), 2)
        if order["file_size"]:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_size"],) * 2)
        status = 0
        try:
            main(["train", *order["flags"]])
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            status = 70
        sys.stderr.flush()
        os._exit(status)
    print(pid, flush=True)
    if order["wait"]:
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Server:
    def __init__(self, folder: Path):
        self.stderr = folder / "stderr.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "HF_HOME": str(folder / "cache")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )

    def order(self, flags: list[str], wait: bool, env: dict[str, str] | None = None, file_size: int = 0) -> int:
        order = {"flags": flags, "wait": wait, "env": env or {}, "file_size": file_size, "stderr": str(self.stderr)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self, seconds: float = 120) -> int:
        assert select.select([self.process.stdout], [], [], seconds)[0], self.stderr.read_text()
        return int(self.process.stdout.readline())

    def run(self, flags: list[str], **options) -> int:
        """Run to the end; the exit status."""
        self.order(flags, wait=True, **options)
        return self.answer()

    def start(self, flags: list[str], processes: int = 1, **env: str) -> list[int]:
        """Start a run of some processes, as a launcher does."""
        if processes == 1:
            return [self.order(flags, wait=False, env=env)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
            **env,
        }
        ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        return [self.order(flags, wait=False, env=rank) for rank in ranks]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.process.kill()


def ended(pid: int) -> bool:
    """Whether a child of the server has ended; it stays as a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


def finish(pids: list[int]) -> None:
    wait_for(lambda: all(ended(pid) for pid in pids))


def steps_logged(output: Path) -> list[int]:
    log = output / "log.jsonl"
    return [json.loads(line)["step"] for line in log.read_text().splitlines()] if log.exists() else []


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()]


def saved(output: Path) -> dict[str, bytes]:
    """The files of weights of the pipeline."""
    return {path.parent.name: path.read_bytes() for path in output.glob("*/diffusion_pytorch_model.safetensors")}


BASE = ["--rung", "vae", "--dataset_name", "digits", "--max_train_steps", "30", "--lr_warmup_steps", "9"]
BASE += ["--checkpointing_steps", "3", "--checkpoints_total_limit", "3", "--validation_steps", "7"]
SMALL = ["--train_batch_size", "60"]  # 21 batches an epoch: the run ends in the second
RUNS = {
    "plain": (1, 10, SMALL),
    "workers_and_accumulation": (
        1, 4, ["--train_batch_size", "30", "--gradient_accumulation_steps", "2", "--dataloader_num_workers", "2", "--random_flip"],
    ),
    "power_function_averages": (1, 3, [*SMALL, "--ema_sigma_rel", "0.1", "--ema_snapshots", "10"]),
    "two_processes": (2, 3, ["--train_batch_size", "30"]),
    "two_processes_with_workers_and_accumulation": (
        2, 2, ["--train_batch_size", "15", "--gradient_accumulation_steps", "2", "--dataloader_num_workers", "1", "--random_flip"],
    ),
    "two_shards": (2, 2, ["--rung", "dae", "--train_batch_size", "30"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_random_moments_ends_in_the_same_bytes(server, name, tmp_path):
    processes, kills, flags = RUNS[name]
    env = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if name == "two_shards" else {}
    whole, killed = (
        [*BASE, *flags, "--output_dir", str(tmp_path / "whole")],
        [*BASE, *flags, "--output_dir", str(tmp_path / "killed")],
    )
    start = time.monotonic()
    finish(server.start(whole, processes, **env))
    duration = time.monotonic() - start
    expected = saved(tmp_path / "whole")
    assert expected, server.stderr.read_text()
    chance, reached = random.Random(0), set()
    for kill in range(kills):
        pids = server.start(killed, processes, **env)
        # Early ones meet the start; the others are spread over what a run takes.
        time.sleep(duration * (0.2 if kill == 0 else chance.uniform(0.3, 0.9)))
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        finish(pids)
        reached.add(max(steps_logged(tmp_path / "killed"), default=0))
    finish(server.start(killed, processes, **env))
    assert saved(tmp_path / "killed") == expected
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert (tmp_path / "killed" / "validation.jsonl").read_text() == (tmp_path / "whole" / "validation.jsonl").read_text()
    assert max(reached) > 0
    assert len(list((tmp_path / "killed").glob("checkpoint-*"))) == 3
    assert not list((tmp_path / "killed").rglob("*ing-*"))
    (state, *_) = [json.loads(path.read_text()) for path in (tmp_path / "killed").glob("checkpoint-*/state.json")]
    assert state["launch"].startswith("FSDP") == bool(env)


FAILS = """
import sys
from diffusers_edu.cli import main
from diffusers_edu.training import objectives
objectives.DenoisingObjective.loss = lambda *_: 1 / 0
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_that_fails_does_not_wait_for_its_data_workers(tmp_path):
    flags = ["--rung", "dae", "--dataset_name", "digits", "--dataloader_num_workers", "2", "--output_dir", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", FAILS, "train", *flags], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_saves_a_checkpoint_says_how_to_go_on_and_loses_nothing(server, processes, tmp_path):
    flags = [*BASE, "--train_batch_size", str(60 // processes), "--checkpointing_steps", "1000", "--max_train_steps", "60"]
    flags += ["--output_dir"]
    finish(server.start([*flags, str(tmp_path / "whole")], processes))
    pids = server.start([*flags, str(tmp_path / "stopped")], processes)
    wait_for(lambda: len(steps_logged(tmp_path / "stopped")) >= 5)
    os.kill(pids[-1], signal.SIGTERM)  # one of them
    finish(pids)
    (checkpoint,) = (tmp_path / "stopped").glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert steps_logged(tmp_path / "stopped")[-1] == step
    assert 5 <= step < 60
    if processes == 1:
        assert f"stopped by SIGTERM at step {step}; the same command goes on from" in server.stderr.read_text()
    assert not saved(tmp_path / "stopped")
    finish(server.start([*flags, str(tmp_path / "stopped")], processes))
    assert saved(tmp_path / "stopped") == saved(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_run_and_its_data_workers_saves_a_checkpoint_too(server, number, tmp_path):
    """As a job manager or a terminal sends it: to every process."""
    flags = [*BASE, *SMALL, "--max_train_steps", "100000", "--checkpointing_steps", "100000", "--output_dir", str(tmp_path)]
    pid = server.order([*flags, "--dataloader_num_workers", "2"], wait=True)
    wait_for(lambda: len(steps_logged(tmp_path)) >= 3)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) >= 2
    for process in [*map(int, children), pid]:
        os.kill(process, number)
    assert server.answer() == 128 + number
    assert f"stopped by {number.name} at step" in server.stderr.read_text()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1


def test_sigterm_ends_with_its_own_status(server, tmp_path):
    flags = [*BASE, *SMALL, "--max_train_steps", "100000", "--checkpointing_steps", "100000", "--output_dir", str(tmp_path)]
    pid = server.order(flags, wait=True)
    wait_for(lambda: len(steps_logged(tmp_path)) >= 1)
    os.kill(pid, signal.SIGTERM)
    assert server.answer() == 128 + signal.SIGTERM


def test_a_full_disk_is_one_clear_error_and_the_checkpoint_before_it_is_whole(server, tmp_path):
    flags = [*BASE, *SMALL, "--output_dir"]
    assert server.run([*flags, str(tmp_path / "whole")]) == 0
    pids = server.start([*flags, str(tmp_path / "full")])
    wait_for(lambda: (tmp_path / "full" / "checkpoint-3").exists())
    os.kill(pids[0], signal.SIGKILL)
    finish(pids)
    newest = max((tmp_path / "full").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    before = {path: path.read_bytes() for path in newest.iterdir()}
    assert server.run([*flags, str(tmp_path / "full")], file_size=100_000) == 2
    message = server.stderr.read_text()
    assert "cannot be written" in message
    assert "File too large" in message
    assert "Traceback" not in message
    assert {path: path.read_bytes() for path in newest.iterdir()} == before
    assert not list((tmp_path / "full").glob("*ing-*"))
    assert server.run([*flags, str(tmp_path / "full")]) == 0
    assert saved(tmp_path / "full") == saved(tmp_path / "whole")


@pytest.fixture(scope="module")
def with_checkpoints(server, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "run"
    assert server.run([*BASE, *SMALL, "--max_train_steps", "6", "--output_dir", str(output)]) == 0
    return output


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "model.safetensors": flip_a_byte,
    "optimizer.safetensors": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "averages.safetensors": lambda path: path.unlink(),
    "state.json": lambda path: path.write_text(path.read_text()[:40]),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_refused(server, with_checkpoints, name):
    path = with_checkpoints / "checkpoint-6" / name
    before = path.read_bytes()
    DAMAGES[name](path)
    try:
        assert server.run([*BASE, *SMALL, "--max_train_steps", "6", "--output_dir", str(with_checkpoints)]) == 2
        assert f"checkpoint-6 is damaged ({name})" in server.stderr.read_text()
        assert (with_checkpoints / "checkpoint-6").exists()
    finally:
        path.write_bytes(before)


def test_what_was_left_half_written_is_not_picked_up_and_goes(server, with_checkpoints):
    half = with_checkpoints / "saving-checkpoint-9"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    expected = saved(with_checkpoints)
    assert server.run([*BASE, *SMALL, "--max_train_steps", "6", "--output_dir", str(with_checkpoints)]) == 0
    assert saved(with_checkpoints) == expected
    assert not half.exists()


def test_a_run_writes_and_reads_no_pickles(with_checkpoints):
    names = {path.suffix for path in with_checkpoints.rglob("*") if path.is_file()}
    assert names <= {".json", ".jsonl", ".safetensors", ".png"}


def test_weights_moments_and_averages_of_a_checkpoint_are_those_of_the_step(with_checkpoints):
    folder = with_checkpoints / "checkpoint-6"
    weights, averages = load_file(folder / "model.safetensors"), load_file(folder / "averages.safetensors")
    moments = load_file(folder / "optimizer.safetensors")
    assert {f"ema/{name}" for name in weights} == averages.keys()
    assert {name.rsplit("/", 1)[0] for name in moments} == weights.keys()
    assert all(int(tensor) == 6 for name, tensor in moments.items() if name.endswith("/step"))
    final = load_file(with_checkpoints / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(final[name], averages[f"ema/{name}"]) for name in weights)


def test_what_is_refused_changes_nothing(server, with_checkpoints):
    """Not even the later checkpoints, which going on from an earlier one would have replaced."""
    damaged = with_checkpoints / "checkpoint-3" / "model.safetensors"
    before = damaged.read_bytes()
    flags = [*BASE, *SMALL, "--max_train_steps", "6", "--output_dir", str(with_checkpoints)]
    flip_a_byte(damaged)
    try:
        assert server.run([*flags, "--resume_from_checkpoint", "checkpoint-3"]) == 2
    finally:
        damaged.write_bytes(before)
    assert server.run([*flags, "--resume_from_checkpoint", "checkpoint-3", "--train_batch_size", "20"]) == 2
    assert {path.name for path in with_checkpoints.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}


def test_another_global_batch_is_refused_and_the_same_one_split_otherwise_is_not(server, with_checkpoints):
    flags = [*BASE, "--max_train_steps", "6", "--output_dir", str(with_checkpoints)]
    assert server.run([*flags, "--train_batch_size", "20"]) == 2
    assert "60 images a step, and this one has 20" in server.stderr.read_text()
    assert server.run([*flags, "--train_batch_size", "20", "--gradient_accumulation_steps", "3"]) == 0
