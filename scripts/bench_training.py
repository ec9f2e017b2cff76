"""How fast the trainer is: against a bare loop, against diffusers' train_unconditional.py, and to a given quality, on the CPU.

`python scripts/bench_training.py --diffusers DIR`, where DIR is a checkout of diffusers (only its examples are used; the package is the
installed one).

A  the trainer against a bare loop: forward, backward, clip and AdamW on noisy batches that are in memory already.
B  against stock, on RGB copies of the digits and on 5,000 RGB images of 32x32 in a folder: the same network, batch and data.
C  for runs of several lengths the seconds of training, and the Fréchet distance that 1,000 samples then have from the held-out digits.

For A and B every candidate is a process of its own that trains as it always does, but for a hook on the optimiser: after every few
steps it hands the turn to the next, so that one runs at a time, and all meet the same moods of the machine. Each figure is the median
over the rounds. Start-up and the first steps do not count. Beside the clock stand the processor time, all threads together, and the
minor page faults of a step: memory fresh from the system costs time, and whether freed memory is kept depends on what the process did
before.
"""

import argparse
import json
import math
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, UNet2DModel
from PIL import Image, ImageDraw
from torch.optim.optimizer import register_optimizer_step_post_hook

from diffusers_edu.evaluation.metrics import frechet_distance
from diffusers_edu.evaluation.sampling import sample
from diffusers_edu.rungs import RUNGS, configuration
from diffusers_edu.training.data import load_digits

STOCK = "examples/unconditional_image_generation/train_unconditional.py"
# C: found on a part of the training digits.
QUALITY_OURS = (
    "--train_batch_size 32 --learning_rate 2e-3 --lr_warmup_steps 20 --ema_max_decay 0.97 --adam_beta2 0.95 "
    "--prediction_type sample --snr_gamma 5"
)
QUALITY_STOCK = "--train_batch_size 16 --learning_rate 2e-3"
PARTS = {  # of a step, in every candidate that has them; what is left is the rest
    "loading": ("torch.utils.data.dataloader", "_BaseDataLoaderIter.__next__"),
    "forward": ("diffusers", "UNet2DModel.forward"),
    "backward": ("torch", "Tensor.backward"),
    "clipping": ("torch.nn", "utils.clip_grad_norm_"),
    "optimiser": ("torch.optim", "AdamW.step"),
    "average": ("diffusers.training_utils", "EMAModel.step"),
    "tracker": ("accelerate", "Accelerator.log"),
}


# ---------------------------------------------------------------- data


def digits_folder(folder: Path, part: Any) -> None:
    """The digits as RGB images: stock takes nothing else."""
    folder.mkdir(parents=True)
    for i, pixels in enumerate((part.images * 255).round().to(torch.uint8)[:, 0].numpy()):
        Image.fromarray(pixels).convert("RGB").save(folder / f"{i:04}.png")


def shapes_folder(folder: Path, count: int, size: int = 32) -> None:
    """Shapes on gradients, the same at every call."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 1, size)[None, :, None]
    for i in range(count):
        first, last = rng.integers(0, 256, (2, 1, 1, 3))
        ground = np.broadcast_to(first + (last - first) * ramp, (size, size, 3)).astype(np.uint8)
        image = Image.fromarray(ground if i % 2 else ground.transpose(1, 0, 2).copy())
        x, y, width, height = rng.integers((0, 0, 8, 8), (20, 20, 20, 20)).tolist()
        draw = ImageDraw.Draw(image)
        draw_shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        draw_shape((x, y, x + width, y + height), fill=tuple(rng.integers(0, 256, 3).tolist()))
        image.save(folder / f"{i:05}.png")


def save_unet(folder: Path, channels: int, resolution: int) -> None:
    """The configuration of the network that the ddpm rung has for such images."""
    shape = SimpleNamespace(channels=channels, resolution=resolution)
    RUNGS["ddpm"].build(configuration("ddpm", dataset_name="digits"), shape).unet.save_config(folder)


# ---------------------------------------------------------------- in the process of a candidate


class Turns:
    """After every `block` optimiser steps, report what they took, wait for the next turn, and end where there is none."""

    def __init__(self, block: int, outbox: int):
        self.block, self.outbox, self.steps = block, os.fdopen(outbox, "w"), 0
        self.parts = {name: time_calls(*where) for name, where in PARTS.items()}
        self.start()

    def start(self) -> None:
        for calls in self.parts.values():
            calls.clear()
        self.faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        self.clock, self.processor = time.perf_counter(), time.process_time()

    def __call__(self, *_: Any) -> None:
        self.steps += 1
        if self.steps % self.block:
            return
        took = {"clock": time.perf_counter() - self.clock, "processor": time.process_time() - self.processor}
        took |= {name: sum(calls) for name, calls in self.parts.items() if calls}
        took = {name: 1e3 * seconds / self.block for name, seconds in took.items()}
        took["faults"] = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - self.faults) / self.block
        print(json.dumps(took), file=self.outbox, flush=True)
        if not sys.stdin.readline():
            os._exit(0)
        self.start()


def time_calls(module: str, name: str) -> list[float]:
    """Replace a function by one that notes how long each call takes; return the list of notes."""
    holder_name, function_name = name.split(".")
    holder = getattr(__import__(module, fromlist=[holder_name]), holder_name)
    function, seconds = getattr(holder, function_name), []

    @wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(holder, function_name, timed)
    return seconds


def bare_loop(unet: str, batch: int) -> None:
    """The network's floor: nothing that a trainer does besides."""
    model = UNet2DModel.from_config(UNet2DModel.load_config(unet)).train()
    shape = (batch, model.config.in_channels, model.config.sample_size, model.config.sample_size)
    batches = [(torch.randn(shape), torch.randint(1000, (batch,)), torch.randn(shape)) for _ in range(8)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    while True:  # until there are no more turns
        for x, t, target in batches:
            torch.nn.functional.mse_loss(model(x, t).sample, target).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def candidate(spec: dict[str, Any]) -> None:
    """Be one candidate: the bare loop, or a training script with its flags."""
    ends: list[tuple[float, float]] = []
    note: Callable = lambda *_: ends.append((time.perf_counter(), time.process_time()))  # noqa: E731
    register_optimizer_step_post_hook(Turns(spec["block"], spec["outbox"]) if spec["block"] else note)
    # Allocated and freed, this raises glibc's threshold for returning memory to its largest, 32 MiB, in every candidate alike.
    torch.zeros(32 * 2**18 - 4096)
    script, *flags = spec["command"]
    if script == "bare":
        bare_loop(flags[0], int(flags[1]))
    if spec["torchvision"]:
        sys.path.append(spec["torchvision"])  # the last, so that nothing else is taken from there
    # It registers operators of its compiled part, which does not load beside another build of torch.
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
    import diffusers.utils

    diffusers.utils.check_min_version = lambda version: None  # a checkout asks for its own development version
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
    Path(spec["ends"]).write_text(json.dumps(ends))


# ---------------------------------------------------------------- in this process


def start(args: argparse.Namespace, command: list[str], **spec: Any) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    spec = {"block": 0, "outbox": -1, "ends": "", "torchvision": args.torchvision, "command": command} | spec
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115
    pipes = (spec["outbox"],) if spec["block"] else ()
    child = subprocess.Popen(
        [sys.executable, __file__, "--child", json.dumps(spec)],
        **dict(env=environment, stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT, text=True, pass_fds=pipes),
    )
    child.said = said
    return child


def failed(child: subprocess.Popen) -> None:
    child.wait()
    child.said.seek(0)
    sys.exit(f"{' '.join(map(str, child.args))}\n{child.said.read()[-3000:]}")


def take_turns(args: argparse.Namespace, commands: dict[str, list[str]]) -> dict[str, list[dict[str, float]]]:
    """Start all candidates, then give them turns; return for each what its rounds took, in milliseconds a step."""
    children, boxes = {}, {}
    for who, command in commands.items():
        reading, writing = os.pipe()
        children[who], boxes[who] = start(args, command, block=args.block, outbox=writing), os.fdopen(reading)
        os.close(writing)
    rounds: dict[str, list[dict[str, float]]] = {who: [] for who in commands}
    for number in range(args.rounds + 2):  # the first is the start-up; the second still warms up
        for who, child in children.items():
            if number:
                print(file=child.stdin, flush=True)
            line = boxes[who].readline() or failed(child)
            if number > 1:
                rounds[who].append(json.loads(line))
    for child in children.values():
        child.stdin.close()
        child.wait()
    return rounds


def ours(data: list[str], output: Path, *flags: str) -> list[str]:
    train = Path(__file__).with_name("train.py")
    quiet = ["--checkpointing_steps", "1000000", "--validation_steps", "0"]
    return [str(train), "--rung", "ddpm", *data, "--output_dir", str(output), *quiet, *flags]


def stock(args: argparse.Namespace, folder: Path, unet: Path, output: Path, *flags: str) -> list[str]:
    resolution = UNet2DModel.load_config(unet)["sample_size"]
    # It samples and saves after the first epoch and after the last: one step of sampling, not 1,000.
    quiet = ["--save_images_epochs", "1000000", "--save_model_epochs", "1000000", "--checkpointing_steps", "1000000"]
    quiet += ["--ddpm_num_inference_steps", "1", "--eval_batch_size", "1", "--cache_dir", str(folder.parent / "cache")]
    same = ["--train_data_dir", str(folder), "--model_config_name_or_path", str(unet), "--resolution", str(resolution)]
    return [str(Path(args.diffusers) / STOCK), *same, "--output_dir", str(output), *quiet, *flags]


# ---------------------------------------------------------------- the three benchmarks


def throughput(
    args: argparse.Namespace, work: Path, name: str, data: list[str], unet: Path, batch: int, folder: Path | None
) -> None:
    """A, and with the folder of the same images for stock B: a row for each candidate, and what its step is made of."""
    flags, steps = ["--train_batch_size", str(batch)], args.block * (args.rounds + 3)
    out = {who: work / f"{name}-{who}" for who in ("ours", "stock", "stock, EMA")}
    commands = {
        "bare": ["bare", str(unet), str(batch)],
        "ours": ours(data, out["ours"], *flags, "--max_train_steps", str(steps)),
    }
    images = {"bare": batch, "ours": batch}
    if folder:
        count = len(list(folder.iterdir()))
        batches = math.ceil(count / batch)  # of an epoch; the last is smaller
        for who, more in (("stock", []), ("stock, EMA", ["--use_ema"])):
            commands[who] = stock(args, folder, unet, out[who], *flags, "--num_epochs", str(math.ceil(steps / batches)), *more)
            images[who] = count / batches if steps > batches else batch
    rounds = take_turns(args, commands)
    for who, took in rounds.items():
        middle = {part: statistics.median(each[part] for each in took) for part in took[-1]}
        ratios = {}
        for of in ("clock", "processor"):
            pairs = zip(took, rounds["ours"], strict=True)
            ratios[of] = statistics.median(theirs[of] / mine[of] * images["ours"] / images[who] for theirs, mine in pairs)
        clock, processor, faults = middle.pop("clock"), middle.pop("processor"), middle.pop("faults")
        middle["rest"] = clock - sum(middle.values())
        parts = "  ".join(f"{part} {value:.1f}" for part, value in middle.items())
        print(
            f"{name:18} {batch:5} {who:10} {clock:8.1f} {processor:9.1f} {1e3 * images[who] / clock:9.0f} "
            f"{ratios['clock']:7.3f} {ratios['processor']:9.3f} {faults:8.0f}   {parts}",
            flush=True,
        )


def quality(args: argparse.Namespace, work: Path, folder: Path, unet: Path) -> None:
    """C: for runs of several lengths, each with its own course of the learning rate, the seconds of training and the distances."""
    print(f"\n{'C':6} {'steps':>6} {'seconds':>8} {'processor':>9} {'own sampler':>12} {'DPM++ 20':>9}   flags")
    runs = [("ours", f"--max_train_steps {steps} {args.ours}") for steps in args.ours_steps]
    runs += [("stock", f"--num_epochs {epochs} {args.stock}") for epochs in args.stock_epochs if args.diffusers]
    for number, (who, flags) in enumerate(runs):
        output = work / f"C-{number}"
        if who == "ours":
            command = ours(["--dataset_name", "digits"], output, *flags.split())
        else:
            command = stock(args, folder, unet, output, *flags.split())
        child = start(args, command, ends=str(output / "ends.json"))
        if child.wait():
            failed(child)
        between = np.diff(json.loads((output / "ends.json").read_text()), axis=0)
        # All the steps; the longest, which in stock holds the sampling after its first epoch, and the first, as the middle one.
        seconds, processor = np.sort(between, axis=0)[:-1].sum(0) + 2 * np.median(between, axis=0)
        found = [distance(output, solver) for solver in (False, True)]
        row = f"{who:6} {len(between) + 1:6} {seconds:8.1f} {processor:9.1f} {found[0]:12.3f} {found[1]:9.3f}   {flags}"
        print(row, flush=True)


def distance(output: Path, solver: bool) -> float:
    """From 1,000 samples to the held-out digits: by the pipeline's own sampler in 50 steps, or by DPM-Solver++ in 20."""
    pipeline = DiffusionPipeline.from_pretrained(output)
    if solver:
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    images = sample(pipeline, 1000, 0, num_inference_steps=20 if solver else 50).mean(1)
    return frechet_distance(images.flatten(1), load_digits()[1].images.flatten(1), resamples=2).value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--diffusers", help="a checkout of diffusers; without it nothing is compared with stock")
    parser.add_argument(
        "--torchvision", help="a folder that torchvision was installed into with pip's --target, if not in the environment"
    )
    parser.add_argument("--only", choices="ABC", help="one of the three")
    parser.add_argument("--rounds", type=int, default=15, help="of A and B, in which every candidate has its turn")
    parser.add_argument("--block", type=int, default=5, help="steps of a turn of A and B")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch, in every run")
    parser.add_argument("--batch", type=int, nargs=2, default=(128, 32), help="of A and B on digits, and on the folder")
    parser.add_argument("--ours", default=QUALITY_OURS, help="flags of our runs of C")
    parser.add_argument("--ours_steps", type=int, nargs="*", default=(250, 350, 450), help="their lengths")
    parser.add_argument("--stock", default=QUALITY_STOCK, help="flags of stock's runs of C")
    parser.add_argument("--stock_epochs", type=int, nargs="*", default=(16, 32), help="their lengths")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        candidate(json.loads(args.child))
        return
    if args.diffusers:
        if not (Path(args.diffusers) / STOCK).exists():
            parser.error(f"--diffusers {args.diffusers}: there is no {STOCK} in it")
        searched = [*sys.path, *([args.torchvision] if args.torchvision else [])]
        if not any((Path(folder) / "torchvision").is_dir() for folder in searched):
            parser.error(
                "stock's script imports torchvision, which is not here: pip install --no-deps --target FOLDER torchvision (the "
                "version that goes with the installed torch), and give --torchvision FOLDER"
            )
    elif args.only == "B":
        parser.error("B needs --diffusers DIR")
    with tempfile.TemporaryDirectory() as temporary:
        compare(args, Path(temporary))


def compare(args: argparse.Namespace, work: Path) -> None:
    print(f"torch {torch.__version__}, {args.threads} threads, CPU, float32")
    unets = {name: work / f"unet-{name}" for name in ("digits", "digits_rgb", "folder")}
    for folder, channels, size in zip(unets.values(), (1, 3, 3), (8, 8, 32), strict=True):
        save_unet(folder, channels, size)
    digits_folder(work / "digits", load_digits()[0])
    if args.only != "C":
        shapes_folder(work / "shapes", 5000)
        print(f"\n{'':35} {'ms a step':^18} {'':9} {'ours / this one':^17}")
        print(
            f"{'A, B':18} {'batch':>5} {'':10} {'clock':>8} {'processor':>9} {'images/s':>9} {'clock':>7} {'processor':>9} "
            f"{'faults':>8}   ms of its parts"
        )
        digits, folder = args.batch
        if args.only != "B":
            throughput(args, work, "digits", ["--dataset_name", "digits"], unets["digits"], digits, None)
        for name, images, unet, batch in (
            ("digits, RGB", work / "digits", unets["digits_rgb"], digits),
            ("folder, RGB 32x32", work / "shapes", unets["folder"], folder),
        ):
            against = images if args.diffusers and args.only != "A" else None
            if against or images.name == "shapes":
                throughput(args, work, name, ["--train_data_dir", str(images)], unet, batch, against)
    if args.only in (None, "C"):
        quality(args, work, work / "digits", unets["digits_rgb"])


if __name__ == "__main__":
    main()
