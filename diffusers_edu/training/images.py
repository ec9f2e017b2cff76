"""One encoded image: read upright, as grey or RGB, at a size."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import UsageError
from .configuration import TrainingConfig

GREY_MODES = {"1", "L", "LA", "I", "I;16", "I;16B", "F"}
WHAT_PIL_RAISES = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
)
MEND = "mend or remove it, or leave such images out with --on_bad_image skip"


class BadImageError(UsageError):
    """An image that cannot be read. The message names it."""


def read_image(row: Any, index: int) -> Image.Image:
    """An upright image of mode L or RGB; transparency becomes white.

    Args:
        row: `bytes` or a `path`, as `datasets` stores an image that it has not decoded.
        index: of the row, to name an image that has no path.

    Raises:
        BadImageError: it cannot be read.
    """
    try:
        image: Image.Image = ImageOps.exif_transpose(open_image(row))
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
    except WHAT_PIL_RAISES as error:
        raise BadImageError(f"{name_of_row(row, index)} is not an image that can be read; {MEND}") from error


def open_image(row: Any) -> Image.Image:
    return Image.open(io.BytesIO(row["bytes"]) if row.get("bytes") else row["path"])


def name_of_row(row: Any, index: int) -> str:
    return (row.get("path") if isinstance(row, dict) else None) or f"row {index}"


def upright_size(row: Any) -> tuple[int, int] | None:
    """Width and height from the header alone; None where it cannot be read."""
    try:
        image = open_image(row)
        width, height = image.size
        turned = image.getexif().get(0x0112, 1) >= 5  # the orientations on their side
        return (height, width) if turned else (width, height)
    except WHAT_PIL_RAISES:
        return None


def fit(image: Image.Image, resolution: int, center_crop: bool = True) -> np.ndarray:
    """An image whose shorter side has the resolution: uint8 (H, W) grey, or (H, W, 3).

    Args:
        image: of mode L or RGB.
        resolution: of the shorter side.
        center_crop: cut the longer side to the same; else keep it all.
    """
    if center_crop:
        return np.asarray(ImageOps.fit(image, (resolution, resolution), Image.Resampling.BICUBIC))
    scale = resolution / min(image.size)
    size = (max(resolution, round(image.width * scale)), max(resolution, round(image.height * scale)))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def as_tensor(array: np.ndarray, channels: int) -> torch.Tensor:
    """uint8 (C, H, W), grey as RGB or RGB as grey (the mean of the three) where `channels` asks for it."""
    if array.ndim == 2:
        return torch.from_numpy(np.repeat(array[None], channels, axis=0))
    if channels == 1:
        return torch.from_numpy(array.mean(2, dtype=np.float32).round().astype(np.uint8)[None])
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


def decode_row(row: Any, index: int, resolution: int, center_crop: bool, config: TrainingConfig) -> np.ndarray | None:
    """An image as `fit` makes it, or None where it cannot be read and the run skips such; see `read_image`."""
    try:
        return fit(read_image(row, index), resolution, center_crop)
    except BadImageError:
        if config.on_bad_image == "error":
            raise
        return None


def as_tensors(arrays: list[np.ndarray], channels: int | None) -> list[torch.Tensor]:
    """uint8 (C, H, W) each; without `channels`, grey where all are grey, else RGB."""
    channels = channels or (1 if all(array.ndim == 2 for array in arrays) else 3)
    return [as_tensor(array, channels) for array in arrays]


def crop(strip: torch.Tensor, resolution: int, position: float) -> torch.Tensor:
    """A square of (C, H, W), whose shorter side has the resolution; `position` in [0, 1) goes along the longer one."""
    _, height, width = strip.shape
    top, left = int(position * (height - resolution + 1)), int(position * (width - resolution + 1))
    return strip[:, top : top + resolution, left : left + resolution]
