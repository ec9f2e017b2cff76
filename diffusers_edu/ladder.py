"""The main job: train every rung, measure it, hold the story's claims against the figures, and write the page that shows it."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .errors import UsageError
from .experiment import Measured, conclude, plan, train_and_measure
from .rungs import RUNGS
from .story import SHOWN, page
from .training.configuration import TrainingConfig, write_text
from .training.data import load_data
from .training.launch import Preempted
from .training.log import LOG_NAME

# What one process does on its own, in this order; the longest first, so that none is left over at the end.
JOBS = [
    ["ddpm"], ["vae", "latent_diffusion"], ["noisy_stacked_dae"],
    ["vae_full"], ["vae_light"], ["vae_middle"], ["vae_heavy"], ["stacked_dae"], ["dae"],
]  # fmt: skip
LOOK = 0.5  # seconds between two looks at how far the processes are


def climb(output: Path, num_samples: int = 1000, seed: int = 0, seeds: int = 1, max_train_steps: int | None = None) -> None:
    """Train the six rungs on the digits into `output/<rung>`; write `output/results.json` and `output/report.html`.

    Rungs are trained and measured at the same time, one to each core. Of more than one seed, the rungs of the first lie there, those of
    the others in `output/seed-<seed>/`, and every figure is the mean over the seeds, with the interval of that.

    Args:
        output: the folder.
        num_samples: of each rung, to be measured.
        seed: the first.
        seeds: how many.
        max_train_steps: of every rung, in place of its own.

    Raises:
        UsageError: the folder holds the results of other settings, or cannot be written.
    """
    if num_samples < SHOWN:
        raise UsageError(f"--num_samples {num_samples}: at least {SHOWN} are needed")
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: at least 1 is needed")
    start = time.perf_counter()
    changes: dict[str, Any] = {} if max_train_steps is None else {"max_train_steps": max_train_steps}
    numbers = list(range(seed, seed + seeds))
    plans = [plan(output if number == seed else output / f"seed-{number}", number, changes) for number in numbers]
    for config in (config for each in plans for config in each.values()):
        config.check_folder()  # all of them before the first is trained
    train, held_out = load_data(plans[0]["dae"])
    if num_samples > len(train):
        raise UsageError(
            f"--num_samples {num_samples}: the floor is of as many training images, of which there are {len(train)}"
        )

    runs = work_through(plans, num_samples)
    ladder = conclude(train, held_out, numbers, runs)
    write_text(output / "results.json", json.dumps(ladder.as_json(), indent=2) + "\n")
    for name, found in ladder.verdicts.items():
        print(f"{name}: {RUNGS[name].title}", *(f"  {verdict.word}: {verdict.statement}" for verdict in found), sep="\n")

    print("drawing the page", flush=True)
    facts = {
        "data": f"{len(train)} digits to train on, {len(held_out)} held out, {train.resolution}x{train.resolution} grey",
        "samples measured": f"{num_samples} a rung",
        "seed" if seeds == 1 else "seeds": ", ".join(map(str, numbers)),
        "run": f"{time.perf_counter() - start:.0f} s, rungs side by side",
        "folder": str(output),
    }
    write_text(output / "report.html", page(ladder, facts))
    print(f"{output / 'report.html'}: open it in a browser ({time.perf_counter() - start:.0f} s in all)", flush=True)


# ------------------------------------------------------------------------------------------------ many processes


def work_through(plans: Sequence[dict[str, TrainingConfig]], num_samples: int) -> list[dict[str, Measured]]:
    """Train and measure all, as many at a time as there are cores; the results do not depend on it.

    Cores that share the operations of a small network wait for each other: on two cores, two rungs side by side are done in two thirds
    of the time that they take one after the other.
    """
    jobs = [(index, names) for names in JOBS for index in range(len(plans))]
    cores = torch.get_num_threads()
    workers = 1 if torch.accelerator.is_available() else min(len(jobs), cores)
    runs: list[dict[str, Measured]] = [{} for _ in plans]
    settings = {"OMP_NUM_THREADS": str(max(1, cores // workers)), "TQDM_DISABLE": "1"}
    with environment(settings), sigterm_raised(), ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        running = {}
        for index, names in jobs:
            configs = {name: plans[index][name] for name in names}
            running[pool.submit(work, configs, num_samples)] = index
        try:
            for done in watch(running, named(plans)):
                for measured in done.result():
                    runs[running[done]][measured.name] = measured
                    tqdm.write(f"{Path(measured.folder)}: {summary(measured)}")
        except BrokenProcessPool as error:
            raise UsageError("a process was ended from outside, or for want of memory; the same command goes on") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()  # each saves a checkpoint, from which the same command goes on
            raise
    return runs


def work(configs: dict[str, TrainingConfig], num_samples: int) -> list[Measured]:
    """What one process does at a time."""
    try:
        return [train_and_measure(name, config, num_samples) for name, config in configs.items()]
    except Preempted as stopped:  # its checkpoint is saved; the pool would keep the process, to wait for more work
        os._exit(stopped.status)


def watch(futures: Iterable[Future], configs: dict[str, TrainingConfig]) -> Iterator[Future]:
    """The jobs as they end, with a progress bar of all optimiser steps, read off the logs."""
    left, total = set(futures), sum(config.max_train_steps for config in configs.values())
    with tqdm(total=total, desc="training", unit="step") as bar:
        while left:
            done, left = wait(left, timeout=LOOK, return_when="FIRST_COMPLETED")
            yield from done
            taken = {name: steps_taken(Path(config.output_dir)) for name, config in configs.items()}
            bar.n = sum(taken.values())
            of = {name: f"{taken[name]}/{config.max_train_steps}" for name, config in configs.items()}
            under_way = [f"{name} {of[name]}" for name in configs if 0 < taken[name] < configs[name].max_train_steps]
            bar.set_postfix_str(", ".join(under_way) or "measuring")


def named(plans: Sequence[dict[str, TrainingConfig]]) -> dict[str, TrainingConfig]:
    """All configurations, by the name of the rung, and of its seed where there are several."""
    if len(plans) == 1:
        return plans[0]
    return {f"{name} (seed {config.seed})": config for plan in plans for name, config in plan.items()}


def steps_taken(folder: Path) -> int:
    log = folder / LOG_NAME
    return log.read_bytes().count(b"\n") if log.exists() else 0


def summary(measured: Measured) -> str:
    shown = ("frechet_distance", "precision", "recall", "diversity", "bits_per_dim")
    figures = {name: measured.figures[name] for name in shown if name in measured.figures}
    return ", ".join(f"{name.replace('_', ' ')} {estimate.value:.3f}" for name, estimate in figures.items())


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """The processes started meanwhile see these variables."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def sigterm_raised() -> Iterator[None]:
    """SIGTERM as an exception, so that the workers do not outlive this process."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # elsewhere Python allows no handler
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
