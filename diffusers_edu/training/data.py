"""Images for training and for measuring: decoded once, kept in memory as bytes, split once and for all."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import psutil
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..errors import UsageError
from .cache import cached
from .configuration import TrainingConfig
from .images import as_tensors, crop, decode_row, upright_size
from .randomness import EpochOrder, uniform_at
from .sources import Columns, check_labels, name_of, open_dataset, undecoded

CHUNK = 512  # images decoded between two looks at the progress bar


@dataclass
class Augmentation:
    """What is done to each image of a batch: whether it is flipped from left to right, and where it is cropped, in [0, 1)."""

    flip: list[bool]
    crop: list[float]


@dataclass
class ImageData:
    """Square images of one size, in memory.

    Args:
        pixels: uint8, shape (N, C, H, W), from 0 to `max_value`.
        max_value: the largest grey level: 255, or 16 for the digits.
        labels: int64, shape (N,), or None.
        class_names: the name of each label.
        captions: N strings, or None.
        skipped: images that could not be read and were left out.
        strips: where crops are random, the N images as they were before the crop, uint8 (C, H', W').
    """

    pixels: torch.Tensor
    max_value: int = 255
    labels: torch.Tensor | None = None
    class_names: list[str] = field(default_factory=list)
    captions: list[str] | None = None
    skipped: int = 0
    strips: list[torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices: list[int], augmentation: Augmentation | None = None) -> dict[str, Any]:
        """Some images as the models see them: `images`, float32 (B, C, H, W) in [-1, 1], and what `conditions` returns."""
        if augmentation is None or self.strips is None:
            pixels = self.pixels[indices]
        else:
            cut = [crop(self.strips[i], self.resolution, at) for i, at in zip(indices, augmentation.crop, strict=True)]
            pixels = torch.stack(cut)
        images = pixels.float() * (2 / self.max_value) - 1
        if augmentation is not None and any(augmentation.flip):
            images = torch.where(torch.tensor(augmentation.flip).reshape(-1, 1, 1, 1), images.flip(-1), images)
        return {"images": images, **self.conditions(indices)}

    def conditions(self, indices: list[int]) -> dict[str, Any]:
        """What else is known of some images: `labels`, int64 (B,), and `captions`, a list of strings."""
        found: dict[str, Any] = {}
        if self.labels is not None:
            found["labels"] = self.labels[indices]
        if self.captions is not None:
            found["captions"] = [self.captions[index] for index in indices]
        return found

    @property
    def images(self) -> torch.Tensor:
        """All images as float32 (N, C, H, W) in [0, 1], the range in which samples are measured."""
        return self.pixels.float() / self.max_value

    @property
    def channels(self) -> int:
        return self.pixels.shape[1]

    @property
    def resolution(self) -> int:
        return self.pixels.shape[2]

    def fingerprint(self) -> str:
        """A digest of the images."""
        digest = hashlib.blake2b(f"{tuple(self.pixels.shape)} {self.max_value}".encode(), digest_size=16)
        digest.update(self.pixels.contiguous().numpy().data)
        return digest.hexdigest()

    def part(self, indices: Iterable[int]) -> "ImageData":
        """Some of the images."""
        chosen = torch.as_tensor(list(indices), dtype=torch.int64)
        return replace(
            self,
            pixels=self.pixels[chosen],
            labels=None if self.labels is None else self.labels[chosen],
            captions=self.captions and [self.captions[i] for i in chosen],
            strips=self.strips and [self.strips[i] for i in chosen],
        )

    def some(self, count: int) -> "ImageData":
        """At most so many of the images, the same each time, from all over the data set, in their order."""
        if count >= len(self):
            return self
        return self.part(torch.randperm(len(self), generator=torch.Generator().manual_seed(0))[:count].sort().values)

    def head(self, count: int) -> "ImageData":
        """The first images."""
        return self if count >= len(self) else self.part(range(count))


class Visits(Dataset):
    """What a run looks at, in its order. Position p of the run is the image order(p // N)[p % N], augmented as p says.

    Args:
        data: N images, or their latents.
        seed: of the orders and the augmentations.
        flip: whether half of the images are flipped.
    """

    def __init__(self, data: Any, seed: int, flip: bool):
        self.data, self.seed, self.flip = data, seed, flip
        self.crops = getattr(data, "strips", None) is not None
        self.order = EpochOrder(len(data), seed)

    def __getitem__(self, positions: list[int]) -> dict[str, Any]:
        return self.data.batch(self.order(positions), augmentation(self.seed, positions, self.flip, self.crops))


def augmentation(seed: int, positions: list[int], flip: bool, crops: bool = True) -> Augmentation:
    """What is done to the images at some positions of a run, a function of (seed, position)."""
    return Augmentation(
        [flip and uniform_at(seed, "flip", position) < 0.5 for position in positions],
        [uniform_at(seed, "crop", position) if crops else 0.5 for position in positions],
    )


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors on a device."""
    return {name: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for name, v in batch.items()}


def load_data(config: TrainingConfig) -> tuple[Any, ImageData]:
    """The images to train on and the held-out images, on which alone anything is measured.

    `digits` has a split of its own. Another data set's held-out part is its test or validation split; where it has none, a tenth
    of its images, the same at every call. With `streaming` the first is a [`streaming.StreamedImages`], else an [`ImageData`].

    Raises:
        UsageError: nothing there, no images in it, too many for the memory, an image that cannot be read, or a row without a class
            label where one is needed (named).
    """
    if config.dataset_name == "digits":
        return load_digits(config.resolution)
    train_split, held_out_split = open_dataset(config)
    if config.streaming:
        from .streaming import load_streams

        return load_streams(train_split, held_out_split, config)
    for split in (train_split, held_out_split):
        if split is not None:
            check_labels(split, config)
    if held_out_split is None:
        if len(train_split) < 2:
            raise UsageError(f"{name_of(config)} holds one image; training needs at least two, one of them held out")
        order = np.random.default_rng(0).permutation(len(train_split))
        cut = max(1, len(train_split) // 10)
        held_out_split, train_split = (train_split.select(sorted(part)) for part in (order[:cut], order[cut:]))
    resolution = config.resolution or common_resolution(train_split, config)
    train = decode(train_split, replace(config, resolution=resolution))
    held_out = decode(held_out_split, replace(config, resolution=resolution, center_crop=True), train.channels)
    return train, held_out


def load_digits(resolution: int | None = None) -> tuple[ImageData, ImageData]:
    """scikit-learn's 1,797 handwritten digits, 8x8, grey levels 0 to 16: 1,257 to train on, 540 held out."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    if resolution not in (None, 8):
        raise UsageError(f"--resolution {resolution}: the digits are 8x8, and are not resized")
    digits = sklearn_digits()
    pixels = torch.from_numpy(digits.images.astype(np.uint8))[:, None]
    data = ImageData(pixels, 16, torch.from_numpy(digits.target).long(), [str(name) for name in digits.target_names])
    train, held_out = train_test_split(np.arange(len(data)), test_size=0.3, random_state=0, stratify=digits.target)
    return data.part(train), data.part(held_out)


def common_resolution(split: Any, config: TrainingConfig) -> int:
    """The images' own size where all share one of at most 64, else 64; from their headers."""
    columns = Columns.of(split.features, config)
    rows = undecoded(split, columns.image, config)[columns.image]
    sizes = {size for size in (upright_size(row) for row in rows) if size is not None}
    return min(*sizes.pop(), 64) if len(sizes) == 1 else 64


def decode(split: Any, config: TrainingConfig, channels: int | None = None) -> ImageData:
    """Decode every image of a split once: upright, at the resolution, grey where all are grey, else RGB.

    What comes out is kept in the cache of `datasets`: the next run, and the other processes of this one, map it into memory.

    Raises:
        UsageError: an image that cannot be read, unless such are skipped; or more images than fit into memory.
    """
    columns = Columns.of(split.features, config)
    rows = undecoded(split, columns.image, config)
    resolution = int(config.resolution or 64)
    needed, there = len(rows) * 3 * resolution**2, psutil.virtual_memory().available
    if needed > 0.7 * there:
        raise UsageError(
            f"--resolution {resolution}: {len(rows):,} images take up to {needed / 2**30:.1f} GiB, of {there / 2**30:.1f} that are "
            "free; give a lower one, or --streaming"
        )
    key = (split._fingerprint, columns.image, resolution, config.center_crop, config.on_bad_image, channels)
    parts = cached("images", *key, make=lambda: decode_rows(rows[columns.image], resolution, config, channels))
    kept = parts["kept"].tolist()
    if len(kept) < len(rows):
        rows = rows.select(kept)
    strips = list(unpack(parts["flat"], parts["sizes"])) if "flat" in parts else None
    pixels = parts["pixels"] if strips is None else torch.stack([crop(strip, resolution, 0.5) for strip in strips])
    labels = columns.labels(rows[columns.label]) if columns.label else None
    captions = columns.captions(rows[columns.caption]) if columns.caption else None
    class_names = columns.class_names if labels is not None else []
    return ImageData(pixels, 255, labels, class_names, captions, len(split) - len(kept), strips)


def decode_rows(rows: Any, resolution: int, config: TrainingConfig, channels: int | None) -> dict[str, torch.Tensor]:
    """The pixels of all rows that can be read, and which those are."""

    def decoded(numbered: tuple[int, Any]) -> np.ndarray | None:
        return decode_row(numbered[1], numbered[0], resolution, config.center_crop, config)

    arrays: list[np.ndarray] = []
    kept: list[int] = []
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=len(rows), desc="decoding images", leave=False, disable=len(rows) < 1000) as bar,
    ):
        for start in range(0, len(rows), CHUNK):
            numbers = range(start, min(start + CHUNK, len(rows)))
            for number, array in zip(numbers, pool.map(decoded, ((i, rows[i]) for i in numbers)), strict=True):
                if array is not None:
                    arrays.append(array)
                    kept.append(number)
            bar.update(len(numbers))
    if not arrays:
        raise UsageError(f"{name_of(config)}: none of its {len(rows)} images can be read")
    tensors = as_tensors(arrays, channels)
    found = {"kept": torch.tensor(kept)}
    if config.center_crop:
        return {**found, "pixels": torch.stack(tensors)}
    sizes = torch.tensor([tensor.shape for tensor in tensors])
    return {**found, "flat": torch.cat([tensor.flatten() for tensor in tensors]), "sizes": sizes}


def unpack(flat: torch.Tensor, sizes: torch.Tensor) -> Iterator[torch.Tensor]:
    """Images of different sizes, from their bytes in one row."""
    start = 0
    for shape in sizes.tolist():
        end = start + shape[0] * shape[1] * shape[2]
        yield flat[start:end].reshape(shape)
        start = end
