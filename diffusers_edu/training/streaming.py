"""Images that are read as they are needed, the same ones on any number of processes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from .configuration import TrainingConfig, UsageError
from .data import ImageData, augmentation
from .images import BadImageError, as_tensor, crop, fit, read_image
from .randomness import derived_seed
from .sources import Columns, name_of, undecoded

HELD_OUT = 512  # images of the held-out part, at most


class StreamedImages:
    """An unending supply of images for training, for which the data set is read again and again.

    The rows of a global batch are dealt to as many lanes as there are shards (files) among which they can be divided evenly. A lane
    reads shards of its own, each time in another order, through a shuffle buffer. So what a row sees depends on no process, and
    a process reads only the shards of its rows. Lanes whose shards are smaller come round more often.

    Args:
        split: a `datasets.IterableDataset` with its images undecoded.
        config: the run.
        columns: which are which.
        held_out: whether the data set's held-out part is a tenth of this split, chosen by the images' content; it is left out.
        channels: 1 grey or 3 RGB.
    """

    max_value = 255
    skipped = 0

    def __init__(self, split: Any, config: TrainingConfig, columns: Columns, held_out: bool, channels: int):
        self.split, self.config, self.columns, self.held_out, self.channels = split, config, columns, held_out, channels
        self.resolution = int(config.resolution or 64)
        self.class_names = columns.class_names

    def rows(self, split: Any) -> Iterator[Any]:
        """The rows to train on, once."""
        return (row for row in split if not (self.held_out and is_held_out(row[self.columns.image])))

    def lanes(self, total: int) -> int:
        """Into how many lanes the rows of a global batch are dealt."""
        shards = self.split.num_shards
        return max(count for count in range(1, min(shards, total) + 1) if total % count == 0)

    def lane(self, number: int, count: int) -> Iterator[Any]:
        """The rows of a lane, for ever."""
        shards = self.split.shard(num_shards=count, index=number) if count > 1 else self.split
        epoch = 0
        while True:
            seed = derived_seed(self.config.seed, "lane", number, epoch) % 2**32
            empty = True
            for row in self.rows(shards.shuffle(seed=seed, buffer_size=self.config.shuffle_buffer)):
                empty = False
                yield row
            if empty:
                raise UsageError(f"{name_of(self.config)}: a shard has no images to train on")
            epoch += 1

    def head(self, count: int) -> ImageData:
        """The first images, in the data set's own order and cropped at the centre."""
        return gather(self.rows(self.split), count, self.config, self.columns, self.channels)

    @property
    def images(self) -> torch.Tensor:
        """The first 1,000 images as float32 (N, C, H, W) in [0, 1], to be measured."""
        return self.head(1000).images

    def decode(self, row: Any, number: int, at: float) -> torch.Tensor | None:
        """uint8 (C, H, W) of a row, or None where it cannot be read and such are skipped."""
        try:
            array = fit(read_image(row[self.columns.image], number), self.resolution, self.config.center_crop)
        except BadImageError:
            if self.config.on_bad_image == "error":
                raise
            return None
        return crop(as_tensor(array, self.channels), self.resolution, at)


class StreamedVisits(IterableDataset):
    """The batches of a process, from `start_step` on.

    Args:
        data: the supply.
        parts: for each batch of an optimiser step, the rows of the global batch that this process takes.
        total: rows of the global batch.
        start_step, stop_step: the optimiser steps to yield batches for.
    """

    def __init__(self, data: StreamedImages, parts: list[range], total: int, start_step: int, stop_step: int):
        self.data, self.parts, self.total = data, parts, total
        self.start_step, self.stop_step = start_step, stop_step

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, mine = (worker.num_workers, worker.id) if worker else (1, 0)
        count = self.data.lanes(self.total)
        share = self.total // count
        wanted = sorted({row // share for part in self.parts for row in part})
        lanes = {number: self.data.lane(number, count) for number in wanted}
        for lane in lanes.values():  # rows that are passed over are not decoded
            for _ in range(self.start_step * share):
                next(lane)
        batches = 0
        for step in range(self.start_step, self.stop_step):
            rows = {number: [next(lane) for _ in range(share)] for number, lane in lanes.items()}
            for part in self.parts:
                if batches % workers == mine:  # the loader takes from its workers in turn
                    yield self.batch(rows, part, share, step)
                batches += 1

    def batch(self, rows: dict[int, list[Any]], part: range, share: int, step: int) -> dict[str, Any]:
        config = self.data.config
        augmented = augmentation(config.seed, [step * self.total + row for row in part], config.random_flip)
        pixels, chosen, skipped = [], [], 0
        for place, row in enumerate(part):
            at = 0.5 if config.center_crop else augmented.crop[place]
            # In place of one that cannot be read comes the next of its lane in the same step.
            lane = rows[row // share]
            for candidate in (lane[(row + shift) % share] for shift in range(share)):
                image = self.data.decode(candidate, step * self.total + row, at)
                if image is not None:
                    break
                skipped += 1
            else:
                raise UsageError(f"{name_of(config)}: step {step + 1} finds no image that can be read; mend the data")
            pixels.append(image)
            chosen.append(candidate)
        data = with_conditions(pixels, chosen, self.data.columns)
        return {**data.batch(list(range(len(part))), augmented), "skipped": skipped}


def is_held_out(row: Any) -> bool:
    """Whether an image belongs to the held-out tenth: a function of its bytes, or of its path where they are not there."""
    content = row.get("bytes") or str(row.get("path")).encode()
    return derived_seed("held out", content.hex()) % 10 == 0


def with_conditions(pixels: list[torch.Tensor], rows: list[Any], columns: Columns) -> ImageData:
    """Images with the labels and captions of the rows that they come from."""
    labels = columns.labels(row[columns.label] for row in rows) if columns.label else None
    captions = columns.captions(row[columns.caption] for row in rows) if columns.caption else None
    return ImageData(torch.stack(pixels), labels=labels, class_names=columns.class_names, captions=captions)


def gather(rows: Iterator[Any], count: int, config: TrainingConfig, columns: Columns, channels: int | None = None) -> ImageData:
    """The first images among some rows, in memory; without `channels`, grey where all are grey."""
    arrays, found = [], []
    for number, row in enumerate(rows):
        try:
            arrays.append(fit(read_image(row[columns.image], number), int(config.resolution or 64)))
            found.append(row)
        except BadImageError:
            if config.on_bad_image == "error":
                raise
        if len(arrays) == count:
            break
    if not arrays:
        raise UsageError(f"{name_of(config)} has no images that can be read")
    channels = channels or (1 if all(array.ndim == 2 for array in arrays) else 3)
    return with_conditions([as_tensor(array, channels) for array in arrays], found, columns)


def load_streams(train: Any, held_out: Any, config: TrainingConfig) -> tuple[StreamedImages, ImageData]:
    """A supply of images to train on, and up to 512 held-out images in memory.

    Whether images are grey or RGB is seen from the first 64.
    """
    columns = Columns.of(train.features or {}, config)
    train = undecoded(train, columns.image, config)
    channels = gather(iter(train), 64, config, columns).channels
    data = StreamedImages(train, config, columns, held_out is None, channels)
    if held_out is None:
        chosen = (row for row in train if is_held_out(row[columns.image]))
    else:
        chosen = iter(undecoded(held_out, columns.image, config))
    return data, gather(chosen, HELD_OUT, config, columns, channels)
