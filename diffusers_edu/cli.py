"""`diffusers-edu train | ladder | evaluate | ...`: parses, calls, prints. A person's mistake is one line and exit status 2."""

import argparse
import errno
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

FEATURES = "of the figures: pixels, fashion-cnn, efficientnet-lite0 or inception (default: by size and colour)"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (--help lists the flags)")


def fail(message: str) -> NoReturn:
    if is_first():  # every process of a launch meets the same mistake
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
    config = configuration(**parsed)
    from .publishing import prepare_upload, publish_run

    repo_id = prepare_upload(config)  # what stands in its way is said before the training
    train_rung(config)
    if repo_id is not None and is_first():
        print(publish_run(Path(config.output_dir), repo_id))


def is_first() -> bool:
    """Whether this is the process of a launch that does what is to be done once."""
    return int(os.environ.get("RANK", 0)) == 0


def option(arguments: list[str], name: str) -> str | None:
    """The value of an option, read before the others because the defaults of the others depend on it."""
    first = Parser(prog="diffusers-edu train", add_help=False, allow_abbrev=False)
    first.add_argument(name)
    return getattr(first.parse_known_args(arguments)[0], name.lstrip("-"))


def ladder(arguments: list[str]) -> None:
    """Train all six rungs on the digits, measure them, hold their claims against the figures, and write the page."""
    parser = Parser(prog="diffusers-edu ladder", description=ladder.__doc__)
    parser.add_argument("output", nargs="?", default="runs/ladder", help="the folder to write to (default: runs/ladder)")
    parser.add_argument("--num_samples", type=int, default=1000, help="samples of each rung to measure (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the training and the samples (default: 0)")
    parser.add_argument("--seeds", type=int, default=1, help="runs, of this seed and the next ones (default: 1)")
    parser.add_argument("--max_train_steps", type=int, help="of every rung, for a quick look (default: the rung's own)")
    parsed = parser.parse_args(arguments)
    from .ladder import climb

    climb(Path(parsed.output), parsed.num_samples, parsed.seed, parsed.seeds, parsed.max_train_steps)


def evaluate(arguments: list[str]) -> None:
    """Measure saved pipelines on the held-out images of the data they were trained on, and print the figures as JSON."""
    parser = Parser(prog="diffusers-edu evaluate", description=evaluate.__doc__)
    parser.add_argument("runs", nargs="+", metavar="run", help="the folder of a trained pipeline; of several, differences too")
    parser.add_argument("--num_samples", type=int, default=1000, help="samples to draw (default: 1000)")
    parser.add_argument("--num_inference_steps", type=int, help="sampling steps (default: the rung's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--features", default="auto", help=FEATURES)
    parser.add_argument(
        "--likelihood", action="store_true", help="bounds on the likelihood too, in nats and bits per dimension"
    )
    parser.add_argument("--likelihood_steps", type=int, nargs="+", metavar="K",
                        help="--likelihood, of the diffusion's chains of so many steps (default: 10 50)")  # fmt: skip
    parsed = parser.parse_args(arguments)
    from .bounds import STEPS
    from .runs import evaluate_runs

    steps = parsed.likelihood_steps or (STEPS if parsed.likelihood else [])
    asked = parsed.num_samples, parsed.num_inference_steps, parsed.seed, parsed.features
    evaluate_runs([Path(run) for run in parsed.runs], *asked, steps)


def ema(arguments: list[str]) -> None:
    """Save a run's pipeline with a moving average of another length (for runs trained with --ema_sigma_rel)."""
    parser = Parser(prog="diffusers-edu ema", description=ema.__doc__)
    parser.add_argument("run", help="the folder of a trained pipeline")
    parser.add_argument("output", help="the folder to write to")
    parser.add_argument("--sigma_rel", type=float, required=True, help="the length, a share of the run: 0.01 to 0.25")
    parsed = parser.parse_args(arguments)
    from .runs import average_run

    average_run(Path(parsed.run), Path(parsed.output), parsed.sigma_rel)


def export(arguments: list[str]) -> None:
    """Write a trained pipeline as a folder that others can load, with a card that holds the evidence."""
    parser = export_parser("export", export.__doc__)
    parser.add_argument("output", help="the folder to write; with --scheduler_only, a saved pipeline")
    parser.add_argument("--repo_id", help="the name by which the card says to load it (default: that of the folder)")
    options = vars(parser.parse_args(arguments))
    from .publishing import export_run, export_scheduler_of

    run, output, form = Path(options.pop("run")), Path(options.pop("output")), options.pop("form") or "plugin"
    if options.pop("scheduler_only"):
        export_scheduler_of(run, output, form, options["trust_remote_code"])
    else:
        export_run(run, output, form, repository=options.pop("repo_id"), **options)
    print(f"{output}: the form {form}")


def publish(arguments: list[str]) -> None:
    """Export a trained pipeline, or take an export as it is, and upload it to the Hub."""
    parser = export_parser("publish", publish.__doc__)
    parser.add_argument("--repo_id", required=True, help="the repository: name or namespace/name")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    options = vars(parser.parse_args(arguments))
    from .publishing import publish_run, publish_scheduler_of

    run, repo_id = Path(options.pop("run")), options.pop("repo_id")
    if options.pop("scheduler_only"):
        print(publish_scheduler_of(run, repo_id, options["form"] or "plugin", options["trust_remote_code"]))
    else:
        print(publish_run(run, repo_id, **options))


def export_parser(command: str, description: str | None) -> Parser:
    """The arguments that `export` and `publish` share."""
    parser = Parser(prog=f"diffusers-edu {command}", description=description)
    parser.add_argument("run", help="the folder of a trained pipeline")
    parser.add_argument("--form", choices=["plugin", "self-contained", "portable"],
                        help="plugin: loads where diffusers-edu is imported (the default); self-contained: with the code beside the "
                        "weights; portable: as classes of diffusers")  # fmt: skip
    parser.add_argument("--scheduler_only", action="store_true", help="put the scheduler alone into a pipeline that is there")
    parser.add_argument("--num_samples", type=int, default=1000, help="samples to measure for the card (default: 1000)")
    parser.add_argument("--num_inference_steps", type=int, help="sampling steps (default: the rung's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    parser.add_argument("--features", default="auto", help=FEATURES)
    parser.add_argument("--license", default="apache-2.0", help="of the weights (default: apache-2.0)")
    parser.add_argument("--train_data_dir", help="where the data is, if not where it was in training")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that lies in the folder RUN")
    return parser


def verify(arguments: list[str]) -> None:
    """Load a repository or a folder as a stranger would and measure again what its card says; exit status 1 where it is not so."""
    parser = Parser(prog="diffusers-edu verify", description=verify.__doc__)
    parser.add_argument("repository", help="a repository on the Hub, or a folder")
    parser.add_argument("--revision", help="a branch, tag or commit of the repository")
    parser.add_argument("--train_data_dir", help="where the data is, if the card names none that can be loaded")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that lies in the repository")
    parsed = parser.parse_args(arguments)
    from .publishing import verify_card

    so = verify_card(parsed.repository, parsed.revision, parsed.trust_remote_code, parsed.train_data_dir)
    sys.exit(0 if so else 1)


def doctor(arguments: list[str]) -> None:
    """Say whether and how a repository or a folder of anyone's will load; exit status 1 where it will not."""
    parser = Parser(prog="diffusers-edu doctor", description=doctor.__doc__)
    parser.add_argument("repository", help="a repository on the Hub, or a folder")
    parser.add_argument("--revision", help="a branch, tag or commit of the repository")
    parsed = parser.parse_args(arguments)
    from .hub.doctor import examine

    diagnosis = examine(parsed.repository, parsed.revision)
    print(diagnosis)
    sys.exit(0 if diagnosis.ok else 1)


COMMANDS = {
    "train": train,
    "ladder": ladder,
    "evaluate": evaluate,
    "ema": ema,
    "export": export,
    "publish": publish,
    "verify": verify,
    "doctor": doctor,
}


def main(arguments: list[str] | None = None) -> None:
    """Run a command.

    Exit status: 0 done; 1 a repository is not what it should be; 2 a mistake in what was asked, or a training that diverged;
    130 stopped by Ctrl-C, 143 by SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog="diffusers-edu", description="From a denoising autoencoder to latent diffusion.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.__doc__, add_help=False)
    command = parser.parse_args(arguments[:1]).command
    from .errors import UsageError
    from .training.launch import Preempted

    try:
        COMMANDS[command](arguments[1:])
    except (UsageError, FloatingPointError) as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        fail(f"{error.filename or 'a file'} cannot be written ({error.strerror}); make room, and the same command goes on")
    except Preempted as stopped:
        if is_first():
            print(f"diffusers-edu: {stopped}", file=sys.stderr)
        sys.exit(stopped.status)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
