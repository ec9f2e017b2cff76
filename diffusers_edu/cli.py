"""`diffusers-edu train | ladder | evaluate | ema`: parses, calls, prints. A person's mistake is one line and exit status 2."""

import argparse
import errno
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists the flags)")


def fail(message: str, local: bool = False) -> NoReturn:
    # Every process of a launch meets the same mistake, and one of them says so; but what only one has met, that one says.
    if local or int(os.environ.get("RANK", 0)) == 0:
        print(f"diffusers-edu: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def train(arguments: list[str]) -> None:
    """Train one rung."""
    from transformers import HfArgumentParser

    from .errors import UsageError
    from .rungs import RUNGS, configuration, train_rung
    from .training.configuration import TrainingConfig

    class ConfigParser(HfArgumentParser):
        error = Parser.error

    parser = ConfigParser(TrainingConfig, prog="diffusers-edu train", allow_abbrev=False)
    rung = option(arguments, "--rung")
    if rung is not None and rung not in RUNGS:
        raise UsageError(f"--rung {rung}: choose from {', '.join(RUNGS)}")
    if rung is not None:
        parser.set_defaults(**RUNGS[rung].defaults)
    parsed = vars(parser.parse_args(arguments))
    if rung is None:
        raise UsageError(f"--rung is missing: choose from {', '.join(RUNGS)}")
    train_rung(configuration(**parsed))


def option(arguments: list[str], name: str) -> str | None:
    """The value of an option, read before the others because the defaults of the others depend on it."""
    first = Parser(prog="diffusers-edu train", add_help=False, allow_abbrev=False)
    first.add_argument(name)
    return getattr(first.parse_known_args(arguments)[0], name.lstrip("-"))


def ladder(arguments: list[str]) -> None:
    """Train all six rungs on the digits, measure them and write the page."""
    parser = Parser(prog="diffusers-edu ladder", description=ladder.__doc__)
    parser.add_argument("output", nargs="?", default="runs/ladder", help="the folder to write to (default: runs/ladder)")
    parser.add_argument("--num_samples", type=int, default=1000, help="samples of each rung to measure (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the training and the samples (default: 0)")
    parser.add_argument("--max_train_steps", type=int, help="of every rung, for a quick look (default: the rung's own)")
    parsed = parser.parse_args(arguments)
    from .ladder import climb

    climb(Path(parsed.output), parsed.num_samples, parsed.seed, parsed.max_train_steps)


def evaluate(arguments: list[str]) -> None:
    """Measure a saved pipeline on the held-out images of the data it was trained on, and print the figures as JSON."""
    parser = Parser(prog="diffusers-edu evaluate", description=evaluate.__doc__)
    parser.add_argument("run", help="the folder of a trained pipeline")
    parser.add_argument("--num_samples", type=int, default=1000, help="samples to draw (default: 1000)")
    parser.add_argument("--num_inference_steps", type=int, help="sampling steps (default: the rung's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parsed = parser.parse_args(arguments)
    from .ladder import evaluate_run

    if int(os.environ.get("RANK", 0)) > 0:
        return  # one process of a launch does it all
    evaluate_run(Path(parsed.run), parsed.num_samples, parsed.num_inference_steps, parsed.seed)


def ema(arguments: list[str]) -> None:
    """Save a run's pipeline with a moving average of another length (for runs trained with --ema_sigma_rel)."""
    parser = Parser(prog="diffusers-edu ema", description=ema.__doc__)
    parser.add_argument("run", help="the folder of a trained pipeline")
    parser.add_argument("output", help="the folder to write to")
    parser.add_argument("--sigma_rel", type=float, required=True, help="the length, a share of the run: 0.01 to 0.25")
    parsed = parser.parse_args(arguments)
    from .ladder import average_run

    average_run(Path(parsed.run), Path(parsed.output), parsed.sigma_rel)


COMMANDS = {"train": train, "ladder": ladder, "evaluate": evaluate, "ema": ema}


def main(arguments: list[str] | None = None) -> None:
    """Run a command. Exit status: 0 done; 2 a mistake in what was asked, or a training that diverged; 143 stopped by SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="diffusers-edu", description="From a denoising autoencoder to latent diffusion.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.__doc__, add_help=False)
    command = parser.parse_args(arguments[:1]).command
    from .errors import LocalError, UsageError
    from .training.launch import Preempted

    try:
        COMMANDS[command](arguments[1:])
    except (UsageError, FloatingPointError) as error:
        fail(str(error), local=isinstance(error, LocalError))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        fail(f"{error.filename or 'a file'} cannot be written ({error.strerror}); make room, and the same command goes on")
    except Preempted as stopped:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"diffusers-edu: {stopped}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
