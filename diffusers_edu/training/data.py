"""Images for training and for measuring: decoded once, kept in memory as bytes, split once and for all."""

import io
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .configuration import TrainingConfig, UsageError

GREY_MODES = {"1", "L", "LA", "I", "I;16", "I;16B", "F"}
HELD_OUT_NAMES = ("test", "validation", "valid", "val")


@dataclass
class ImageData(Dataset):
    """Square images of one size, in memory.

    Args:
        pixels: uint8, shape (N, C, H, W), from 0 to `max_value`.
        max_value: the largest grey level: 255, or 16 for the digits.
        labels: int64, shape (N,), or None.
        class_names: the name of each label.
    """

    pixels: torch.Tensor
    max_value: int = 255
    labels: torch.Tensor | None = None
    class_names: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A whole batch at once: `images`, float32 (B, C, H, W) in [-1, 1], and `labels`, where there are any."""
        batch = {"images": self.pixels[indices].float() * (2 / self.max_value) - 1}
        if self.labels is not None:
            batch["labels"] = self.labels[indices]
        return batch

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

    def part(self, indices: Iterable[int]) -> "ImageData":
        chosen = torch.as_tensor(list(indices), dtype=torch.int64)
        labels = None if self.labels is None else self.labels[chosen]
        return ImageData(self.pixels[chosen], self.max_value, labels, self.class_names)


def load_data(config: TrainingConfig) -> tuple[ImageData, ImageData]:
    """The images to train on and the held-out images, on which alone anything is measured.

    `digits` has a split of its own. Another data set's held-out part is its test or validation split; where it has none, a tenth
    of its images, the same at every call.

    Raises:
        UsageError: nothing there, no images in it, or an image that cannot be read (named).
    """
    if config.dataset_name == "digits":
        return load_digits(config.resolution)
    splits = open_dataset(config)
    train_name = "train" if "train" in splits else next(iter(splits))
    held_out_name = next((name for name in HELD_OUT_NAMES if name in splits and name != train_name), None)
    train = decode(splits[train_name], config)
    if held_out_name is not None:
        held_out = decode(splits[held_out_name], replace(config, resolution=train.resolution))
        if held_out.channels != train.channels:
            held_out.pixels = as_channels(held_out.pixels, train.channels)
        return train, held_out
    if len(train) < 2:
        raise UsageError(f"{name_of(config)} holds one image; training needs at least two, one of them held out")
    order = np.random.default_rng(0).permutation(len(train))
    cut = max(1, len(train) // 10)
    return train.part(sorted(order[cut:])), train.part(sorted(order[:cut]))


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


def name_of(config: TrainingConfig) -> str:
    return f"--dataset_name {config.dataset_name}" if config.dataset_name else f"--train_data_dir {config.train_data_dir}"


def open_dataset(config: TrainingConfig) -> dict[str, Any]:
    """The splits of a named data set or of a folder, undecoded."""
    import datasets

    datasets.disable_progress_bars()
    try:
        if config.train_data_dir is None:
            loaded = datasets.load_dataset(config.dataset_name, config.dataset_config_name)
        else:
            folder = Path(config.train_data_dir)
            if not folder.is_dir():
                raise UsageError(f"--train_data_dir {folder}: there is no such folder")
            if any(folder.rglob("*.parquet")):
                loaded = datasets.load_dataset("parquet", data_dir=str(folder))
            else:
                loaded = datasets.load_dataset("imagefolder", data_dir=str(folder))
    except UsageError:
        raise
    except Exception as error:  # the library raises many kinds; each means that there is nothing to train on
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UsageError(f"{name_of(config)} cannot be loaded: {first_line}") from error
    return {name: split for name, split in loaded.items() if len(split) > 0}


def decode(split: Any, config: TrainingConfig) -> ImageData:
    """Decode every image of a split once: upright, square, at one resolution, grey where all are grey, else RGB."""
    import datasets

    column = image_column(split, config)
    label_column = next((n for n, f in split.features.items() if isinstance(f, datasets.ClassLabel)), None)
    try:
        rows = split.cast_column(column, datasets.Image(decode=False))[column]
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UsageError(f"--image_column {column}: that column of {name_of(config)} holds no images") from error
    sizes = {open_image(row, i).size for i, row in enumerate(rows)} if config.resolution is None else set()
    width, height = sizes.pop() if len(sizes) == 1 else (64, 64)
    resolution = config.resolution or min(width, height, 64)

    arrays = []
    for i, row in enumerate(tqdm(rows, desc="decoding images", leave=False, disable=len(rows) < 1000)):
        image = open_image(row, i)
        arrays.append(np.asarray(ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC)))
    grey = all(array.ndim == 2 for array in arrays)
    stacked = np.stack([a if grey or a.ndim == 3 else np.repeat(a[..., None], 3, axis=2) for a in arrays])
    pixels = torch.from_numpy(stacked[:, None] if grey else stacked.transpose(0, 3, 1, 2).copy())
    names = split.features[label_column].names if label_column else []
    values = split[label_column] if label_column else [None]
    # Folders of splits, without class folders in them, come with a column of labels all the same.
    if None in values or set(names) <= {"train", *HELD_OUT_NAMES}:
        return ImageData(pixels)
    return ImageData(pixels, 255, torch.tensor(values, dtype=torch.int64), names)


def image_column(split: Any, config: TrainingConfig) -> str:
    """The column that holds images: the one named, the first of image type, or one that holds encoded bytes."""
    import datasets

    features = split.features
    if config.image_column is not None:
        if config.image_column not in features:
            raise UsageError(f"--image_column {config.image_column}: the columns are {', '.join(features)}")
        return config.image_column
    for name, feature in features.items():
        if isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature):
            return name
    raise UsageError(
        f"{name_of(config)} has no column of images (columns: {', '.join(features)}); name one with --image_column"
    )


def open_image(row: dict[str, Any], index: int) -> Image.Image:
    """An upright image of mode L or RGB; transparency becomes white.

    Raises:
        UsageError: it cannot be read; the message names the file, or the row where there is none.
    """
    try:
        opened = Image.open(io.BytesIO(row["bytes"]) if row.get("bytes") else row["path"])
        image: Image.Image = ImageOps.exif_transpose(opened)
        mode = image.mode
        if mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        elif mode in ("I", "I;16", "I;16B", "F"):
            array = np.asarray(image, dtype=np.float64)
            if mode == "F" or array.min() < 0 or array.max() > 65535:
                raise ValueError("its values are not those of 8 or 16 bits")
            image = Image.fromarray((array / 257).round().astype(np.uint8))  # 65535 is white
        return image.convert("L" if mode in GREY_MODES else "RGB")
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:
        name = (row.get("path") if isinstance(row, dict) else None) or f"row {index}"
        raise UsageError(f"{name} is not an image that can be read; mend or remove it") from error


def as_channels(pixels: torch.Tensor, channels: int) -> torch.Tensor:
    """Grey as RGB, or RGB as grey (the mean of the three)."""
    if channels == 3:
        return pixels.expand(-1, 3, -1, -1).contiguous()
    return pixels.float().mean(1, keepdim=True).round().to(torch.uint8)
