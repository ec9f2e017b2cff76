"""From a run to a repository and back: export it with the evidence, publish it, verify what its card says."""

import dataclasses
import inspect
import json
import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers.utils import numpy_to_pil
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from .errors import UsageError, first_line
from .evaluation.features import KINDS, make_features
from .evaluation.sharding import alone
from .hub.card import CARD_NAME, PICTURE_NAME, SHOWN, Claim, Evidence, Subject, make_card, picture, read_card
from .hub.export import INDEX, check_free, export, export_scheduler
from .hub.publish import CLIENT_ERRORS, check_access, check_name, publish, reason, revision_of, without_secrets
from .rungs import RUNGS, configuration
from .runs import load, measure_pipeline, saved_configuration
from .training.configuration import CONFIG_NAME, TrainingConfig

ROUNDING = 1e-4  # relative: the same samples on another machine differ in float32's last digits
STEPS = 50  # that a card proposes where nothing was measured


def export_run(
    run: Path,
    output: Path,
    form: str,
    repository: str | None = None,
    num_samples: int = 1000,
    num_inference_steps: int | None = None,
    seed: int = 0,
    license: str = "apache-2.0",
    train_data_dir: str | None = None,
    trust_remote_code: bool = False,
    features: str = "auto",
) -> None:
    """Write a run, or any saved pipeline, as a folder that others can load, with a card that holds the evidence.

    Args:
        run: the folder of a run, of an export, or of any saved pipeline; only the first two can be measured.
        output: the folder to make.
        form: `plugin`, `self-contained` or `portable`.
        repository: the name by which the card says to load it; that of the folder by default.
        num_samples: to measure.
        num_inference_steps: of the samples; the rung's own by default.
        seed: of the samples.
        license: of the weights, an identifier.
        train_data_dir: where the data is, if not where it was.
        trust_remote_code: allow the code that lies in the folder `run` to be run, which a self-contained one needs.
        features: what the figures are computed on; see [`features.make_features`].

    Raises:
        UsageError: nothing was written.
    """
    check_free(output)
    config = run_configuration(run, train_data_dir)
    pipeline = load_pipeline(str(run), trust_remote_code)
    pipeline.set_progress_bar_config(disable=True)

    def write_card(folder: Path, shipped: Any) -> None:
        subject = Subject(
            title=type(pipeline).__name__,
            change="",
            form=form,
            repository=repository or output.name,
            revision="",
            pipeline=type(shipped).__name__,
            license=license,
            call=call_of(shipped, None),
            limits=["Nothing was measured: nobody has said what data this pipeline is for."],
        )
        if config is None:
            make_card_without_figures(subject, folder)
            return
        with alone():  # of the processes of a training, one publishes
            measured = measure_pipeline(shipped, config, num_samples, num_inference_steps, seed, features)
        claims = [
            Claim(name, estimate.value, estimate.interval, estimate.n, measured.floor[name].value)
            for name, estimate in measured.metrics.items()
            if name in measured.floor
        ]
        data_name = config.dataset_name or Path(str(config.train_data_dir)).name
        held_out, steps = len(measured.held_out), measured.num_inference_steps
        evidence = Evidence(claims, data_name, held_out, num_samples, steps, seed, measured.features)
        shown = measured.samples[:SHOWN]
        picture(numpy_to_pil(shown.permute(0, 2, 3, 1).numpy())).save(folder / PICTURE_NAME)
        shareable = without_paths(config)
        (folder / CONFIG_NAME).write_text(json.dumps(dataclasses.asdict(shareable), indent=2) + "\n", encoding="utf-8")
        rung = RUNGS[config.rung]
        size = shown.shape[-1]
        subject = replace(
            subject,
            title=f"{rung.title} of {data_name}",
            change=rung.change,
            revision=revision_of(folder),
            call=call_of(shipped, measured.num_inference_steps),
            tags=[config.rung],
            datasets=[config.dataset_name] if config.dataset_name else [],
            command=command_of(shareable),
            config_name=CONFIG_NAME,
            limits=[
                rung.limit,
                f"It has seen {data_name} at {size}x{size} pixels, and makes images of that kind and size alone; what is rare or wrong "
                "in those data is rare or wrong in its samples.",
                "It was made to teach and to measure, and not tested for any other use.",
            ],
        )
        make_card(subject, evidence, len(shown)).save(folder / CARD_NAME)

    export(pipeline, output, form, write_card)


def make_card_without_figures(subject: Subject, folder: Path) -> None:
    """The card of a pipeline whose data nobody has named."""
    subject = replace(subject, revision=revision_of(folder))
    make_card(subject, Evidence([], "", 0, 0, None, 0), 0).save(folder / CARD_NAME)


def call_of(pipeline: Any, steps: int | None) -> str:
    """How the card says to draw images, with as many steps as were measured; "" for a pipeline that wants prompts."""
    parameters = inspect.signature(pipeline.__call__).parameters
    if "batch_size" not in parameters:
        return ""
    if steps is None and "num_inference_steps" in parameters and "scheduler" in pipeline.components:
        steps = min(STEPS, len(pipeline.scheduler))  # the default of a pipeline may be more than its scheduler has
    return f"pipe(batch_size=16, num_inference_steps={steps})" if steps else "pipe(batch_size=16)"


def run_configuration(run: Path, train_data_dir: str | None) -> TrainingConfig | None:
    """The configuration of a run or of an export; None for a pipeline that comes without one.

    Raises:
        UsageError: there is no pipeline, or the configuration is damaged.
    """
    if not (run / "model_index.json").is_file():
        raise UsageError(f"{run} holds no pipeline: there is no model_index.json")
    if not (run / CONFIG_NAME).exists():
        return None
    return with_data(saved_configuration(run), train_data_dir)


def with_data(config: TrainingConfig, train_data_dir: str | None) -> TrainingConfig:
    return config if train_data_dir is None else replace(config, dataset_name=None, train_data_dir=train_data_dir)


def without_paths(config: TrainingConfig) -> TrainingConfig:
    """The configuration without the places of one machine: of each path, its last name."""

    def last(path: str | None) -> str | None:
        return None if path is None else Path(path).name

    return replace(
        config,
        output_dir=Path(config.output_dir).name,
        train_data_dir=last(config.train_data_dir),
        vae_path=last(config.vae_path),
        resume_from_checkpoint=None,
    )


def command_of(config: TrainingConfig) -> str:
    """The command that trains it: the flags that differ from the rung's defaults."""
    defaults = dataclasses.asdict(configuration(config.rung, dataset_name="digits"))
    flags = [f"--rung {config.rung}"]
    for name, value in dataclasses.asdict(config).items():
        if name in ("rung", "resume_from_checkpoint", "push_to_hub", "hub_model_id") or (
            value == defaults[name] and name != "dataset_name"
        ):
            continue
        if value is True:
            flags.append(f"--{name}")
        elif value is False:
            flags.append(f"--no_{name}")
        elif value is not None:
            flags.append(f"--{name} {shlex.quote(str(value))}")
    return "accelerate launch scripts/train.py " + " \\\n    ".join(flags)


def load_pipeline(repository: str, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """A pipeline as a stranger loads it.

    Raises:
        UsageError: it does not load; the message says why.
    """
    try:
        return load(repository, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # loading meets the errors of every library
        text = without_secrets(first_line(error))
        if "trust_remote_code" in str(error):
            text = "it comes with code of its own; read it, and if you trust it, give --trust_remote_code"
        raise UsageError(f"{repository} does not load: {text} ('diffusers-edu doctor {repository}' says more)") from error


def publish_run(run: Path, repo_id: str, form: str | None = None, private: bool = False, **options: Any) -> str:
    """Export a run and upload it; what is an export already is uploaded as it is. Return the URL.

    Args:
        run: the folder of a run or of an export.
        repo_id: `name` or `namespace/name`.
        form: of the export, `plugin` by default.
        private: whether a new repository is.
        options: of `export_run`.

    Raises:
        UsageError: nothing was published.
    """
    check_access(repo_id)
    written = read_card(run / CARD_NAME)[0] if (run / CARD_NAME).is_file() else None
    if written is not None:
        if form not in (None, written):
            raise UsageError(f"{run} is an export of the form {written}; export the run itself with --form {form}")
        return publish(run, repo_id, private)
    with TemporaryDirectory() as folder:
        output = Path(folder) / repo_id.split("/")[-1]
        export_run(run, output, form or "plugin", repository=repo_id, **options)
        return publish(output, repo_id, private)


def export_scheduler_of(run: Path, output: Path, form: str, trust_remote_code: bool = False) -> None:
    """Put the scheduler of a run into the saved pipeline in `output`, in place of its own.

    Raises:
        UsageError: one of the two has no scheduler, or it has no such form.
    """
    pipeline = load_pipeline(str(run), trust_remote_code)
    if "scheduler" not in pipeline.components:
        raise UsageError(f"{run}: its pipeline has no scheduler")
    export_scheduler(pipeline.scheduler, output, form)


def publish_scheduler_of(run: Path, repo_id: str, form: str, trust_remote_code: bool = False) -> str:
    """Put the scheduler of a run into a pipeline on the Hub, in place of its own; its weights are not touched. Return the URL.

    Raises:
        UsageError: nothing was published.
    """
    check_access(repo_id)
    with TemporaryDirectory() as folder:
        index = download(repo_id, INDEX, None)
        if index is None:
            raise UsageError(f"{repo_id} holds no pipeline: it has no {INDEX}")
        Path(folder, INDEX).write_bytes(index.read_bytes())
        export_scheduler_of(run, Path(folder), form, trust_remote_code)
        return publish(Path(folder), repo_id, only="scheduler")


def prepare_upload(config: TrainingConfig) -> str | None:
    """The repository that a training is to be uploaded to; None where it is not asked for.

    Raises:
        UsageError: it could not be.
    """
    if not config.push_to_hub or config.dry_run:
        return None
    repo_id = config.hub_model_id or Path(config.output_dir).name
    check_access(repo_id)
    return repo_id


def verify_card(
    repository: str, revision: str | None = None, trust_remote_code: bool = False, train_data_dir: str | None = None
) -> bool:
    """Load a repository or a folder as a stranger would, measure it again as its card says, and print both figures side by side.

    Returns: whether it loads and every figure lies within its stated interval.

    Raises:
        UsageError: there is no such repository, its card states no figures, or the data is not at hand.
    """
    form, stated = read_card(fetch(repository, CARD_NAME, revision))
    if stated is None:
        raise UsageError(f"{repository}: its card states no figures that could be measured again")
    config_path = fetch(repository, CONFIG_NAME, revision)
    config = read_configuration(config_path, train_data_dir)
    try:
        pipeline = load_pipeline(repository, trust_remote_code, revision)
    except UsageError as error:
        if form == "self-contained" and not trust_remote_code:
            raise
        print(error)
        return False
    kind = next((kind for kind in KINDS if stated.features.startswith(kind)), stated.features)
    there = make_features(kind, 1, 1).name  # a kind by its name, whatever the images
    if there != stated.features:
        raise UsageError(f"{repository}: its figures are on {stated.features}, and there is {there} here")
    with alone():
        measured = measure_pipeline(pipeline, config, stated.num_samples, stated.num_inference_steps, stated.seed, kind)
    return compare(stated.claims, measured.metrics)


def compare(claims: Iterable[Claim], measured: dict[str, Any]) -> bool:
    """Print stated and measured figures; return whether each measured one lies within the stated interval."""
    all_within = True
    print(f"{'figure':<18} {'stated':>9} {'interval':>20} {'measured':>9}")
    for claim in claims:
        estimate = measured.get(claim.name)
        low, high = claim.interval
        slack = ROUNDING * abs(claim.value) + 1e-6
        within = estimate is not None and low - slack <= estimate.value <= high + slack
        all_within &= within
        value = "?" if estimate is None else f"{estimate.value:.4f}"
        verdict = "" if within else "  outside" if estimate is not None else "  no figure of ours"
        print(f"{claim.name:<18} {claim.value:>9.4f} {f'{low:.4f} .. {high:.4f}':>20} {value:>9}{verdict}")
    return all_within


def read_configuration(path: Path, train_data_dir: str | None) -> TrainingConfig:
    """The configuration of somebody's run.

    Raises:
        UsageError: it is none that a run could have had.
    """
    try:
        config = with_data(TrainingConfig(**json.loads(path.read_text(encoding="utf-8"))), train_data_dir)
        config.validate()
        if config.rung not in RUNGS:
            raise ValueError(f"there is no rung {config.rung}")
        return config
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{path.name} is no configuration of a run ({first_line(error)})") from error


def fetch(repository: str, name: str, revision: str | None) -> Path:
    """A file of a folder or of a repository on the Hub.

    Raises:
        UsageError: it is not there.
    """
    path = Path(repository) / name if Path(repository).is_dir() else download(repository, name, revision)
    if path is None or not path.is_file():
        raise UsageError(f"{repository} has no {name}: nothing says what to measure")
    return path


def download(repository: str, name: str, revision: str | None) -> Path | None:
    """A file of a repository on the Hub; None where it has no such file.

    Raises:
        UsageError: the repository cannot be read.
    """
    check_name(repository)
    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except LocalEntryNotFoundError as error:
        raise UsageError(f"{repository} cannot be read: the Hub does not answer") from error
    except EntryNotFoundError:
        return None
    except CLIENT_ERRORS as error:
        raise UsageError(f"{repository} cannot be read: {reason(error, repository)}") from error
