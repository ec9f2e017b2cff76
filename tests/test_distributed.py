"""The same run on one process and on several: on one machine, on two, and with sharded weights."""

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from diffusers_edu.rungs import RUNGS

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
TWO = {
    "torchrun": lambda port: [*TORCHRUN, "--master_port", port],
    "accelerate": lambda port: [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--main_process_port", port],
    "fsdp": lambda port: [
        *[*ACCELERATE, "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--num_machines", "1"],
        *["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port],
    ],
}
EVERY_RUNG = """
import sys
from accelerate.state import AcceleratorState
from diffusers_edu.cli import main
if __name__ == "__main__":
    for rung in sys.argv[2].split(","):
        main(["train", "--rung", rung, "--output_dir", f"{sys.argv[1]}/{rung}", *sys.argv[3:]])
"""
# Every way to work together, with an error of either process, also of a kind that cannot be sent.
AGREE = """
from accelerate import Accelerator
from diffusers_edu.training.launch import everywhere, on_main, one_first
accelerator = Accelerator(cpu=True)
class Odd(Exception):
    def __init__(self, first, second):
        super().__init__(first)
def fails(process, error):
    def work():
        if accelerator.process_index == process:
            raise error
    return work
for way in (on_main, everywhere, one_first):
    for process in (0, 1)[: 1 if way is on_main else 2]:
        for error in (ZeroDivisionError("by zero"), Odd("odd", 2)):
            try:
                way(accelerator, fails(process, error))
                print("nothing")
            except Exception as caught:
                print(way.__name__, process, type(caught).__name__, caught)
print(on_main(accelerator, lambda: accelerator.process_index), one_first(accelerator, lambda: accelerator.process_index))
accelerator.end_training()
"""
# What is there still when this process has done all that it does before the interpreter ends.
LEAVE = """
import atexit, os
from torch import distributed as dist
atexit.register(lambda: os.write(1, f"initialised: {dist.is_initialized()}\\n".encode()))
import sys
from diffusers_edu.cli import main
if __name__ == "__main__":
    main(sys.argv[1:])
"""
# Chance in every form: order, flips, dropout of weights and of labels.
CHANCE = ["--rung", "latent_diffusion", "--dataset_name", "digits", "--class_conditional", "--dropout", "0.2", "--random_flip"]
CHANCE += ["--lr_warmup_steps", "5", "--validation_steps", "20", "--validation_samples", "3", "--checkpointing_steps", "25"]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **changes}


def launch(launcher: list[str], *arguments: str, **changes: str) -> subprocess.CompletedProcess:
    command = [*launcher, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment(**changes))


def train(launcher: list[str], output: Path, *flags: str, **changes: str) -> Path:
    done = launch(launcher, str(ROOT / "scripts" / "train.py"), "--output_dir", str(output), *flags, **changes)
    assert done.returncode == 0, done.stderr[-3000:]
    return output


def side_by_side(*arguments: str) -> list[tuple[int, str, str]]:
    """Two processes without a launcher, which would end the one where the other has failed: status, stdout and stderr of each."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "ACCELERATE_USE_CPU": "true"}
    runs = [
        subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                         env=environment(**shared, RANK=str(rank), LOCAL_RANK=str(rank)))
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [run.communicate(timeout=120) for run in runs]
    finally:
        for run in runs:
            run.kill()
    return [(run.returncode, *texts) for run, texts in zip(runs, said, strict=True)]


def write_images(folder: Path, *shards: list[bytes | None]) -> Path:
    """Parquet files of encoded images, noise where there is None, and one to hold out."""
    import datasets
    from PIL import Image

    folder.mkdir()
    chance = np.random.default_rng(0)
    for number, shard in enumerate([*shards, [None]]):
        encoded = []
        for image in shard:
            buffer = io.BytesIO()
            Image.fromarray(chance.integers(0, 256, (8, 8), np.uint8)).save(buffer, "PNG")
            encoded.append({"bytes": image or buffer.getvalue(), "path": None})
        split = "train" if number < len(shards) else "test"
        table = datasets.Dataset.from_dict({"image": encoded}, features=datasets.Features({"image": datasets.Image()}))
        table.to_parquet(str(folder / f"{split}-{number}.parquet"))
    return folder


def losses(output: Path) -> torch.Tensor:
    return torch.tensor([json.loads(line)["loss"] for line in (output / "log.jsonl").read_text().splitlines()])


def validation(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "validation.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    flags = ["--rung", "vae", "--dataset_name", "digits", "--max_train_steps", "10", "--validation_steps", "0"]
    return train([sys.executable], tmp_path_factory.mktemp("vae") / "vae", *flags)


@pytest.fixture(scope="module")
def one(vae, tmp_path_factory):
    """50 steps on one process, batches of 32."""
    flags = [*CHANCE, "--vae_path", str(vae), "--max_train_steps", "50", "--train_batch_size", "32"]
    return train([sys.executable], tmp_path_factory.mktemp("one") / "run", *flags)


def check_same(one: Path, other: Path) -> None:
    assert len(losses(one)) == len(losses(other)) == 50
    assert (losses(one) - losses(other)).abs().max() < 1e-5
    for a, b in zip(validation(one), validation(other), strict=True):
        for kind in ("raw", "ema"):
            curves = torch.tensor([a[kind]["curve"], b[kind]["curve"]])
            assert (curves[0] - curves[1]).abs().max() < 1e-5
    a, b = (load_file(run / "unet" / "diffusion_pytorch_model.safetensors") for run in (one, other))
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-3
    samples = DiffusionPipeline.from_pretrained(other)(batch_size=2, num_inference_steps=3, output_type="np").images
    assert samples.shape == (2, 8, 8, 1)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", TWO)
def test_two_processes_see_what_one_sees(launcher, vae, one, tmp_path):
    flags = [*CHANCE, "--vae_path", str(vae), "--max_train_steps", "50", "--train_batch_size", "16"]
    run = train(TWO[launcher](free_port()), tmp_path / "run", *flags)
    state = json.loads((run / "checkpoint-50" / "state.json").read_text())
    assert state["launch"] == ("FSDP, 2 processes" if launcher == "fsdp" else "MULTI_CPU, 2 processes")
    check_same(one, run)


@pytest.mark.slow
def test_accumulated_batches_of_two_processes_are_one_batch(vae, one, tmp_path):
    flags = [*CHANCE, "--vae_path", str(vae), "--max_train_steps", "50", "--train_batch_size", "8"]
    check_same(one, train(TWO["torchrun"](free_port()), tmp_path / "run", *flags, "--gradient_accumulation_steps", "2"))


@pytest.mark.slow
def test_a_checkpoint_of_one_launch_is_good_for_another(vae, one, tmp_path):
    """Begun on two processes with sharded weights, gone on with on one."""
    flags = [*CHANCE, "--vae_path", str(vae), "--max_train_steps", "50"]
    begun = train(TWO["fsdp"](free_port()), tmp_path / "run", *flags, "--train_batch_size", "16")
    for later in ("model_index.json", "validation.jsonl"):
        (begun / later).unlink()
    flags += ["--train_batch_size", "32", "--resume_from_checkpoint", "checkpoint-25"]
    train([sys.executable], begun, *flags)
    a, b = losses(one), losses(begun)
    assert (a - b).abs().max() < 1e-5


@pytest.mark.slow
def test_two_machines_train_as_one(vae, one, tmp_path):
    flags = [*CHANCE, "--vae_path", str(vae), "--max_train_steps", "50", "--train_batch_size", "16"]
    port, runs = free_port(), []
    for rank in range(2):
        launcher = [
            *[*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--num_machines", "2", "--machine_rank", str(rank)],
            *["--main_process_ip", "127.0.0.1", "--main_process_port", port],
        ]
        # Nothing but the network is shared: each machine has a folder and a cache of its own.
        output = tmp_path / f"machine_{rank}"
        command = [*launcher, str(ROOT / "scripts" / "train.py"), "--output_dir", str(output), *flags]
        own = environment(HF_HOME=str(tmp_path / f"cache_{rank}"))
        runs.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=own))
    said = [run.communicate(timeout=600)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    check_same(one, tmp_path / "machine_0")
    assert not (tmp_path / "machine_1" / "model_index.json").exists()


@pytest.mark.slow
def test_every_rung_trains_on_two_processes_and_loads(tmp_path):
    script = tmp_path / "every_rung.py"
    script.write_text(EVERY_RUNG)
    flags = ["--dataset_name", "digits", "--train_batch_size", "8", "--max_train_steps", "3", "--validation_steps", "2"]
    done = launch(TWO["torchrun"](free_port()), str(script), str(tmp_path / "two"), ",".join(RUNGS), *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    done = launch([sys.executable], str(script), str(tmp_path / "one"), ",".join(RUNGS), *flags, "--train_batch_size", "16")
    assert done.returncode == 0, done.stderr[-3000:]
    for rung in RUNGS:
        assert (losses(tmp_path / "one" / rung) - losses(tmp_path / "two" / rung)).abs().max() < 1e-5
        DiffusionPipeline.from_pretrained(tmp_path / "two" / rung)


@pytest.mark.slow
def test_processes_that_report_to_a_tracker_have_their_last_word_and_part_before_the_interpreter_ends(tmp_path):
    """Threads of gloo that outlive Python abort one run of a hundred."""
    script, run = tmp_path / "leave.py", str(tmp_path / "run")
    script.write_text(LEAVE)
    flags = ["--dataset_name", "digits", "--train_batch_size", "8", "--max_train_steps", "3", "--report_to", "tensorboard"]
    for command in (
        ["train", "--rung", "dae", "--output_dir", run, *flags], ["evaluate", run, "--num_samples", "20"]
    ):  # fmt: skip
        done = launch(TWO["torchrun"](free_port()), str(script), *command)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("initialised: False") == 2


@pytest.mark.slow
def test_a_mistake_on_several_processes_is_said_once(tmp_path):
    flags = ["--rung", "dae", "--dataset_name", "digits", "--resume_from_checkpoint", "nowhere", "--output_dir", str(tmp_path)]
    done = launch(TWO["torchrun"](free_port()), str(ROOT / "scripts" / "train.py"), *flags)
    assert done.returncode != 0
    assert done.stderr.count("diffusers-edu: error: --resume_from_checkpoint nowhere") == 1


@pytest.mark.slow
def test_a_stream_is_the_same_to_two_processes_with_data_workers_and_accumulation_as_to_one(tmp_path):
    data = write_images(tmp_path / "data", [None] * 13, [b"no image", *[None] * 7], [None] * 9, [None] * 4)
    flags = ["--rung", "vae", "--train_data_dir", str(data), "--streaming", "--resolution", "8", "--shuffle_buffer", "5",
             "--on_bad_image", "skip", "--random_flip", "--max_train_steps", "10", "--validation_steps", "0"]  # fmt: skip
    one = train([sys.executable], tmp_path / "one", *flags, "--train_batch_size", "16")
    flags += ["--train_batch_size", "4", "--gradient_accumulation_steps", "2", "--dataloader_num_workers", "1"]
    two = train(TWO["torchrun"](free_port()), tmp_path / "two", *flags)
    assert len(losses(two)) == 10
    assert (losses(one) - losses(two)).abs().max() < 1e-5
    skipped = [json.loads((run / "log.jsonl").read_text().splitlines()[-1])["skipped_images"] for run in (one, two)]
    assert skipped[0] == skipped[1] > 0


@pytest.mark.slow
def test_an_error_of_one_process_is_raised_by_all(tmp_path):
    script = tmp_path / "agree.py"
    script.write_text(AGREE)
    ends = side_by_side(str(script))
    assert [status for status, _, _ in ends] == [0, 0], ends
    for rank, (_, said, _) in enumerate(ends):
        expected = [
            line
            for way in ("on_main", "everywhere", "one_first")
            for process in (0, 1)[: 1 if way == "on_main" else 2]
            for line in (f"{way} {process} ZeroDivisionError by zero",
                         f"{way} {process} {'Odd odd' if rank == process else 'RuntimeError Odd: odd'}")
        ]  # fmt: skip
        assert said.splitlines() == [*expected, f"0 {rank}"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_image_that_one_process_cannot_read_ends_all_of_them_with_one_line(workers, tmp_path):
    data = write_images(tmp_path / "data", [None] * 80, [*[None] * 6, b"no image"])
    flags = [
        "--train_data_dir",
        str(data),
        "--streaming",
        "--resolution",
        "8",
        "--shuffle_buffer",
        "1",
        "--train_batch_size",
        "1",
    ]
    flags += ["--dataloader_num_workers", workers, "--output_dir", str(tmp_path / "run"), "--validation_steps", "0"]
    ends = side_by_side(str(ROOT / "scripts" / "train.py"), "--rung", "dae", *flags)
    assert [status for status, _, _ in ends] == [2, 2], ends
    assert "".join(stderr for _, _, stderr in ends).count("is not an image that can be read") == 1
    assert "Traceback" not in "".join(stderr for _, _, stderr in ends)


@pytest.mark.slow
def test_data_that_is_not_there_is_said_once_on_several_processes(tmp_path):
    flags = ["--rung", "dae", "--train_data_dir", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "run")]
    done = launch(TWO["torchrun"](free_port()), str(ROOT / "scripts" / "train.py"), *flags)
    assert done.returncode != 0
    assert done.stderr.count("there is no such folder") == 1


@pytest.mark.slow
def test_a_launch_that_silently_starts_fewer_processes_is_stopped(tmp_path):
    arguments = ["--rung", "dae", "--dataset_name", "digits", "--output_dir", str(tmp_path / "run")]
    done = launch([*ACCELERATE, "--cpu", "--num_processes", "2"], str(ROOT / "scripts" / "train.py"), *arguments)
    assert done.returncode != 0
    assert "asked for 2 processes, but 1 runs" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sharding_of_the_older_kind_is_refused(tmp_path):
    arguments = ["--rung", "dae", "--dataset_name", "digits", "--output_dir", str(tmp_path / "run")]
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
    done = launch(TWO["torchrun"](free_port()), str(ROOT / "scripts" / "train.py"), *arguments, **sharded)
    assert done.returncode != 0
    assert "launch with --fsdp_version 2" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_an_evaluation_shared_out_over_processes_finds_the_same(launcher, tmp_path):
    run = str(tmp_path / "vae")
    train = ["train", "--rung", "vae", "--dataset_name", "digits", "--max_train_steps", "3", "--output_dir", run]
    launch([sys.executable, "-m", "diffusers_edu.cli"], *train, "--validation_steps", "0")
    # An odd number, so that the processes do not have as much to do.
    evaluate = ["scripts/evaluate.py", run, "--num_samples", "31"]
    alone, shared = (
        [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        for done in (launch([sys.executable], *evaluate), launch(TWO[launcher](free_port()), *evaluate))
    )
    assert [list(line) for line in shared] == [list(line) for line in alone]  # told once, by one of them
    for name in ("samples", "floor"):
        one, two = (next(line[name] for line in lines if name in line) for lines in (alone, shared))
        assert one.keys() == two.keys()
        for figure in one:
            assert two[figure]["value"] == pytest.approx(one[figure]["value"], rel=1e-5, abs=1e-6), figure
            assert two[figure]["n"] == one[figure]["n"]


SHARED_BOUNDS = """
import sys, torch
from accelerate import PartialState
from diffusers_edu import EduDDPMScheduler, VariationalAutoencoder
from diffusers_edu.evaluation.likelihood import autoencoder_bound, diffusion_bound, latent_diffusion_bound
state = PartialState(cpu=True)
torch.manual_seed(0)
images = torch.rand(7, 1, 8, 8) * 2 - 1
vae = VariationalAutoencoder(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2).eval()
scheduler = EduDDPMScheduler()
scheduler.set_timesteps(4)
model = lambda x_t, t: 0.5 * x_t
bounds = [
    autoencoder_bound(vae, images, 0.3, 0.125),
    autoencoder_bound(vae, images, 0.3, 0.125, k=3),
    diffusion_bound(model, scheduler, images, 0.125),
    latent_diffusion_bound(vae, model, scheduler, images, 0.3, 0.125),
]
if state.is_main_process:
    torch.save([[bound.nats, bound.terms] for bound in bounds], sys.argv[1])
state.destroy_process_group()
"""


@pytest.mark.slow
def test_bounds_shared_out_over_processes_are_the_same_image_by_image(tmp_path):
    script = tmp_path / "bounds.py"
    script.write_text(SHARED_BOUNDS)
    for launcher, name in (([sys.executable], "one"), (TWO["torchrun"](free_port()), "two")):
        done = launch(launcher, str(script), str(tmp_path / name))
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name) for name in ("one", "two"))
    for mine, theirs in zip(one, two, strict=True):
        assert (mine[0] - theirs[0]).abs().max() <= 1e-3
        assert mine[1] is None or (mine[1] - theirs[1]).abs().max() <= 1e-3


PUBLISHED = """
import sys
from pathlib import Path
from diffusers_edu.cli import is_first
from diffusers_edu.publishing import export_run
from diffusers_edu.rungs import configuration, train_rung
if __name__ == "__main__":
    run = Path(sys.argv[1]) / "run"
    train_rung(configuration("vae", dataset_name="digits", output_dir=str(run), max_train_steps=2, validation_steps=0))
    if is_first():
        export_run(run, Path(sys.argv[1]) / "out", "plugin", num_samples=20)
"""


@pytest.mark.slow
def test_of_the_processes_of_a_training_one_measures_and_exports(tmp_path):
    (tmp_path / "script.py").write_text(PUBLISHED)
    done = launch(TWO["torchrun"](free_port()), str(tmp_path / "script.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "frechet distance" in (tmp_path / "out" / "README.md").read_text()
