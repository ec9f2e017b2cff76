"""Images that are read as they are needed, the same ones on any number of processes."""

import hashlib
import itertools
import os
import random
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import UsageError
from .configuration import TrainingConfig
from .data import ImageData, augmentation
from .images import as_tensor, as_tensors, crop, decode_row
from .randomness import derived_seed
from .sources import READ_AT_ONCE, Columns, check_label, name_of, undecoded

HELD_OUT = 512  # images of the held-out part, at most
LOOKED_AT = 1000  # images, at most, among which one that can be read is looked for


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

    def rows(self, shards: Iterable[int]) -> Iterator[Any]:
        """The rows of some shards to train on, once."""
        for index in shards:
            shard = self.split.shard(num_shards=self.split.num_shards, index=index)
            for row in rows_of(shard, self.config, self.columns, f"shard {index} of "):
                if not (self.held_out and is_held_out(row[self.columns.image], self.config)):
                    yield row

    def lanes(self, total: int) -> int:
        """Into how many lanes the rows of a global batch are dealt."""
        shards = self.split.num_shards
        return max(count for count in range(1, min(shards, total) + 1) if total % count == 0)

    def lane(self, number: int, count: int) -> Iterator[Any]:
        """The rows of a lane, for ever. (The library's own shuffling starts threads, and depends on the worker that it runs in.)"""
        for epoch in itertools.count():
            chance = random.Random(derived_seed(self.config.seed, "lane", number, epoch))
            shards = list(range(number, self.split.num_shards, count))
            chance.shuffle(shards)
            empty = True
            for row in shuffled(self.rows(shards), self.config.shuffle_buffer, chance):
                empty = False
                yield row
            if empty:
                raise UsageError(f"{name_of(self.config)}: a shard has no images to train on")

    def head(self, count: int) -> ImageData:
        """The first images, in the data set's own order and cropped at the centre."""
        return gather(self.rows(range(self.split.num_shards)), count, self.config, self.columns, self.channels)

    def decode(self, row: Any, number: int, at: float) -> torch.Tensor | None:
        """uint8 (C, H, W) of a row, or None where it cannot be read and such are skipped."""
        array = decode_row(row[self.columns.image], number, self.resolution, self.config.center_crop, self.config)
        return None if array is None else crop(as_tensor(array, self.channels), self.resolution, at)


class Lane:
    """The rows of a lane as they are taken, and a look ahead at those to come."""

    def __init__(self, rows: Iterator[Any]):
        self.rows, self.ahead = rows, deque[Any]()

    def take(self, count: int) -> list[Any]:
        return [self.ahead.popleft() if self.ahead else next(self.rows) for _ in range(count)]

    def look(self, index: int) -> Any:
        """The row that is `index` places ahead."""
        while len(self.ahead) <= index:
            self.ahead.append(next(self.rows))
        return self.ahead[index]


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
        try:
            yield from self.batches()
        except UsageError as error:  # as a value: torch would put a traceback around one that comes from a worker
            yield {"error": str(error)}

    def batches(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        workers, mine = (worker.num_workers, worker.id) if worker else (1, 0)
        count = self.data.lanes(self.total)
        share = self.total // count
        wanted = sorted({row // share for part in self.parts for row in part})
        lanes = {number: Lane(self.data.lane(number, count)) for number in wanted}
        for lane in lanes.values():  # rows that are passed over are not decoded
            for _ in range(self.start_step):
                lane.take(share)
        batches = 0
        for step in range(self.start_step, self.stop_step):
            taken = {number: lane.take(share) for number, lane in lanes.items()}
            for part in self.parts:
                if batches % workers == mine:  # the loader takes from its workers in turn
                    rows = [(lanes[row // share], taken[row // share][row % share]) for row in part]
                    yield self.batch(rows, [step * self.total + row for row in part])
                batches += 1

    def batch(self, rows: list[tuple[Lane, Any]], positions: list[int]) -> dict[str, Any]:
        """Some rows, decoded; in place of one that cannot be read, if such are skipped, stands the next of its lane that can."""
        config = self.data.config
        augmented = augmentation(config.seed, positions, config.random_flip, not config.center_crop)
        pixels, chosen, skipped = [], [], 0
        for (lane, row), position, place in zip(rows, positions, augmented.crop, strict=True):
            image, ahead = self.data.decode(row, position, place), 0
            skipped += image is None
            while image is None:
                if ahead == LOOKED_AT:
                    raise UsageError(f"{name_of(config)}: {LOOKED_AT} images in a row cannot be read; mend the data")
                row = lane.look(ahead)
                image, ahead = self.data.decode(row, position, place), ahead + 1
            pixels.append(image)
            chosen.append(row)
        data = with_conditions(pixels, chosen, self.data.columns)
        return {**data.batch(list(range(len(rows))), augmented), "skipped": skipped}


def rows_of(split: Any, config: TrainingConfig, columns: Columns, part: str = "") -> Iterator[Any]:
    """The rows of a `datasets.IterableDataset`, whatever worker this is: its `__iter__` shares them out among torch's workers.

    Raises:
        UsageError: one has no class label, and the run is conditioned on them; named as a row of `part` of the split.
    """
    number = itertools.count()
    for batch in split.iter(batch_size=READ_AT_ONCE):
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            if columns.label is not None:
                check_label(row.get(columns.label), f"row {next(number)} of {part}the split {split.split}", config)
            yield row


def shuffled(rows: Iterator[Any], size: int, chance: random.Random) -> Iterator[Any]:
    """Rows in an order in which each is drawn from a buffer of the next ones."""
    buffer = list(itertools.islice(rows, size))
    for row in rows:
        place = chance.randrange(size)
        buffer[place], drawn = row, buffer[place]
        yield drawn
    chance.shuffle(buffer)
    yield from buffer


def is_held_out(row: Any, config: TrainingConfig) -> bool:
    """Whether an image belongs to the held-out tenth: a function of its bytes, or of its path in the folder."""
    content = row.get("bytes")
    if not content:
        root = Path(config.train_data_dir or "/").resolve()
        content = os.path.relpath(Path(str(row.get("path"))).resolve(), root).encode()
    return derived_seed("held out", hashlib.blake2b(content).hexdigest()) % 10 == 0


def with_conditions(pixels: list[torch.Tensor], rows: list[Any], columns: Columns) -> ImageData:
    """Images with the labels and captions of the rows that they come from."""
    labels = columns.labels(row.get(columns.label) for row in rows) if columns.label else None
    captions = columns.captions(row[columns.caption] for row in rows) if columns.caption else None
    return ImageData(torch.stack(pixels), labels=labels, class_names=columns.class_names, captions=captions)


def gather(rows: Iterator[Any], count: int, config: TrainingConfig, columns: Columns, channels: int | None = None) -> ImageData:
    """The first images among some rows, in memory; without `channels`, grey where all are grey."""
    arrays, found = [], []
    for number, row in enumerate(rows):
        array = decode_row(row[columns.image], number, int(config.resolution or 64), True, config)
        if array is not None:
            arrays.append(array)
            found.append(row)
        if len(arrays) == count:
            break
    if not arrays:
        raise UsageError(f"{name_of(config)} has no images that can be read")
    return with_conditions(as_tensors(arrays, channels), found, columns)


def load_streams(train: Any, held_out: Any, config: TrainingConfig) -> tuple[StreamedImages, ImageData]:
    """A supply of images to train on, and up to 512 held-out images in memory.

    Whether images are grey or RGB is seen from the first 64.
    """
    columns = Columns.of(train.features or {}, config)
    train = undecoded(train, columns.image, config)
    channels = gather(rows_of(train, config, columns), 64, config, columns).channels
    data = StreamedImages(train, config, columns, held_out is None, channels)
    if held_out is None:
        rows = rows_of(train, config, columns)
        chosen = [*itertools.islice((row for row in rows if is_held_out(row[columns.image], config)), HELD_OUT)]
        if not chosen:
            raise UsageError(f"{name_of(config)}: none of its images falls into the held-out tenth; give it a test split")
    else:
        rows = rows_of(undecoded(held_out, columns.image, config), config, columns)
        chosen = [*itertools.islice(rows, HELD_OUT)]
    return data, gather(iter(chosen), HELD_OUT, config, columns, channels)
