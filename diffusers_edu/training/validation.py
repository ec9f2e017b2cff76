"""What is measured while a run goes on: the loss on held-out images, the same at every look, and samples."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from .averages import Averages, reshard
from .configuration import TrainingConfig
from .data import ImageData, on_device
from .launch import everywhere
from .objectives import Objective
from .randomness import StepNoise, derived_seed

VALIDATION_NAME = "validation.jsonl"
BINS = 10  # of the curve over timesteps
FEWEST, MOST = 512, 2048  # rows of a look: few images are looked at again, with other noise; of many, only the first are


class Validation:
    """The loss on held-out images, with noise that is the same at every look, and a grid of samples; shared out over the processes.

    A line of `validation.jsonl` has the `step` and, for the weights (`raw`) and their average (`ema`): `loss`, each term of the
    objective, and `curve`. The rows of a look have stratified timesteps in ascending order, so that the ten parts of `curve` are the
    loss at ten ranges of noise, the least first; where an objective has no timesteps, they are alike but for chance.

    Args:
        pipeline: makes the samples.
        objective: what is measured.
        model: the objective's model as it is trained, perhaps wrapped.
        data: held-out images.
        averages: of the weights.
        accelerator: of the run.
        config: of the run.
        sampling: arguments of the pipeline's call.
    """

    def __init__(
        self,
        pipeline: Any,
        objective: Objective,
        model: Any,
        data: ImageData,
        averages: Averages,
        accelerator: Accelerator,
        config: TrainingConfig,
        sampling: dict[str, Any],
    ):
        self.pipeline, self.objective, self.model, self.data, self.averages = pipeline, objective, model, data, averages
        self.accelerator, self.output, self.sampling = accelerator, Path(config.output_dir), sampling
        self.seed, self.batch_size, self.num_samples = config.seed, config.train_batch_size, config.validation_samples
        self.total = min(max(len(data), FEWEST), MOST)
        # Image i is row order[i]: which image has which timestep is a matter of chance, but of the same one each time.
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "validation"))
        self.order = torch.randperm(self.total, generator=generator) % len(data)

    def __call__(self, step: int) -> None:
        """Measure, draw, and write what was found."""
        with evaluating(self.model):
            line: dict[str, Any] = {"step": step, "raw": self.losses(None)}
            if self.averages.shown is not None:
                line["ema"] = self.losses(self.averages.shown)
            images = self.samples() if self.num_samples else None
        everywhere(self.accelerator, lambda: self.write(line, images, step))

    def write(self, line: dict[str, Any], images: torch.Tensor | None, step: int) -> None:
        """Write what was found, and tell the trackers."""
        found = {f"validation_{name}": values["loss"] for name, values in line.items() if name != "step"}
        self.accelerator.log(found, step=step)
        if not self.accelerator.is_main_process:
            return
        with (self.output / VALIDATION_NAME).open("a") as file:
            file.write(json.dumps(line) + "\n")
        if images is not None:
            self.show(images, step)

    @torch.no_grad()
    def losses(self, average: str | None) -> dict[str, Any]:
        """The mean loss and terms over the rows, and the curve."""
        sums: dict[str, torch.Tensor] = {}
        device = self.accelerator.device
        with self.averages.applied(average):
            for rows in self.my_batches(self.total):
                batch = on_device(self.data.batch([int(self.order[row % self.total]) for row in rows]), device)
                noise = StepNoise(self.seed, "validation", rows, self.total, device)
                loss, terms = self.objective.loss(self.model, batch, noise)
                numbers = torch.arange(rows.start, rows.stop, device=device)
                bins, counted = (numbers * BINS // self.total).clamp(max=BINS - 1), numbers < self.total
                for name, value in {"loss": loss, **terms}.items():
                    so_far = sums.setdefault(name, torch.zeros(BINS, device=device))
                    so_far.index_add_(0, bins, value.float() * counted)
        totals = self.accelerator.reduce(torch.stack(list(sums.values())), reduction="sum").double().cpu()
        of_bins = torch.bincount(torch.arange(self.total) * BINS // self.total, minlength=BINS)
        means = {name: (total.sum() / self.total).item() for name, total in zip(sums, totals, strict=True)}
        return {**means, "curve": (totals[0] / of_bins).tolist()}

    def samples(self) -> torch.Tensor:
        """Samples with the averaged weights, uint8 (N, H, W, C) on every process; sample n is the same on any number of processes."""
        mine = self.my_rows(self.num_samples)
        seeds = [derived_seed(self.seed, "sample", n) for n in mine]
        with self.averages.applied(self.averages.shown):
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            images = self.pipeline(batch_size=len(mine), generator=generators, output_type="np", **self.sampling).images
        drawn = torch.from_numpy((images * 255).round().astype(np.uint8)).to(self.accelerator.device)
        return self.accelerator.gather(drawn)[: self.num_samples]

    def my_rows(self, total: int) -> range:
        """This process's rows of some. All processes have as many, as sharded models ask for: the last may be beyond the total."""
        each = -(-total // self.accelerator.num_processes)
        first = self.accelerator.process_index * each
        return range(first, first + each)

    def my_batches(self, total: int) -> list[range]:
        mine = self.my_rows(total)
        return [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)]

    def show(self, images: torch.Tensor, step: int) -> None:
        """Write the grid as `samples/step-<step>.png`, and to the trackers that take images."""
        pixels = images.cpu().numpy()
        height, width, channels = pixels.shape[1:]
        columns = -(-len(pixels) // max(1, round(len(pixels) ** 0.5)))
        rows = -(-len(pixels) // columns)
        zoom = max(1, 64 // height)
        grid = np.full((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), 255, np.uint8)
        for n, image in enumerate(pixels):
            top, left = n // columns * (height + 1), n % columns * (width + 1)
            grid[top : top + height, left : left + width] = image
        picture = Image.fromarray(grid[..., 0] if channels == 1 else grid)
        folder = self.output / "samples"
        folder.mkdir(exist_ok=True)
        picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(
            folder / f"step-{step:08d}.png"
        )
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": pixels}, step=step, **layout)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model without dropout, for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        reshard(model)
        model.train(was_training)
