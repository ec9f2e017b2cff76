"""How long EduDDPMScheduler takes against diffusers' DDPMScheduler, as ratios measured in turn in one run, on the CPU.

`python scripts/bench_scheduler.py`. A step's time is net of the `randn` that both must draw. Each figure is the median of rounds in
which every candidate has its turn. At the large shapes the allocator decides: memory fresh from the system costs a page fault for every
4 KiB, several times the arithmetic, and whether freed memory is kept depends on what the process did before. So the minor page
faults per call are printed, and every shape is measured in a process of its own, once as it starts and once after 32 MiB have been
allocated and freed, which raises glibc's threshold for returning memory to its maximum, as a large model's forward pass does.
"""

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from diffusers import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor

from diffusers_edu import EduDDPMScheduler

CASES = [  # what is measured, at which shape, and the ratio aimed at
    ("step", (1, 1, 8, 8), 1 / 5),
    ("step", (1, 4, 64, 64), 1 / 5),
    ("step", (16, 3, 32, 32), 1 / 4),
    ("step", (64, 3, 64, 64), 1 / 5),
    ("add_noise", (128, 1, 8, 8), 1 / 2),
    ("add_noise", (128, 4, 64, 64), 0.4),
]


def candidates(call: str, shape: tuple[int, ...], timestep: str) -> dict[str, Callable[[], object]]:
    """Closures to be timed: `ours`, `stock`, and under a step the `randn` that is in both."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn((2, *shape), generator=generator)
    schedulers = {"ours": EduDDPMScheduler(), "stock": DDPMScheduler()}
    if call == "add_noise":
        t = torch.randint(1000, shape[:1], generator=generator)
        return {name: lambda s=s: s.add_noise(x, y, t) for name, s in schedulers.items()}
    for scheduler in schedulers.values():
        scheduler.set_timesteps(1000)
    t = 500 if timestep == "int" else torch.tensor(500)
    steps = {name: lambda s=s: s.step(y, t, x, generator=generator) for name, s in schedulers.items()}
    return {"randn": lambda: randn_tensor(shape, generator=generator, device=x.device, dtype=x.dtype), **steps}


def measure(call: str, shape: tuple[int, ...], timestep: str, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds and mean minor page faults of a call of each candidate."""
    functions = candidates(call, shape, timestep)
    calls = max(5, min(2000, int(2e6 / torch.Size(shape).numel())))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    faults: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
            for _ in range(calls):
                function()
            seconds[name].append((time.perf_counter() - start) / calls)
            faults[name].append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / calls)
    return {k: statistics.median(v) for k, v in seconds.items()}, {k: statistics.mean(v) for k, v in faults.items()}


def report(case: int, timestep: str, rounds: int, warm: bool) -> None:
    """Measure one case in this process, and print its row."""
    call, shape, target = CASES[case]
    if warm:
        torch.zeros(32 * 2**18 - 4096)  # just under glibc's largest threshold of 32 MiB; freed at once
    seconds, faults = measure(call, shape, timestep, rounds)
    common = seconds.get("randn", 0.0)
    ours, stock = (1e6 * (seconds[name] - common) for name in ("ours", "stock"))
    name = call if call == "add_noise" else f"step, {timestep}"
    print(
        f"{name:15} {shape!s:18} {'warm' if warm else 'fresh':6} {ours:9.1f} {stock:9.1f} {1e6 * common:9.1f} "
        f"{ours / stock:7.3f} {target:6.2f}  {faults['ours']:8.1f} {faults['stock']:8.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--rounds", type=int, default=15, help="in which every candidate has its turn")
    parser.add_argument("--case", help=argparse.SUPPRESS)  # a process of its own for each: case, timestep, heap
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        case, timestep, heap = args.case.split(",")
        report(int(case), timestep, args.rounds, heap == "warm")
    else:
        compare(args.threads, args.rounds)


def compare(threads: int, rounds: int) -> None:
    """Print the table, each row from a process of its own."""
    allocator = os.environ.get("LD_PRELOAD") or " ".join(platform.libc_ver())
    print(f"torch {torch.__version__}, {threads} threads; allocator: {allocator}, untuned; float32")
    print(f"{'':41} {'net microseconds':^29} {'':14}  {'page faults':^17}")
    print(
        f"{'':15} {'shape':18} {'heap':6} {'ours':>9} {'stock':>9} {'randn':>9} {'ratio':>7} {'aim':>6}  {'ours':>8} {'stock':>8}"
    )
    for case, (call, _, _) in enumerate(CASES):
        for timestep in ("tensor", "int") if call == "step" else ("tensor",):
            for heap in ("fresh", "warm"):
                flags = ["--threads", str(threads), "--rounds", str(rounds), "--case", f"{case},{timestep},{heap}"]
                subprocess.run([sys.executable, __file__, *flags], check=True)


if __name__ == "__main__":
    main()
