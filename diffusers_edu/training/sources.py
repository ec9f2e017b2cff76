"""Where images come from: a named data set, a folder, parquet files; and which of their columns are which."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError, first_line
from .configuration import TrainingConfig

READ_AT_ONCE = 32  # rows of a stream
HELD_OUT_NAMES = ("test", "validation", "valid", "val")


def name_of(config: TrainingConfig) -> str:
    return f"--dataset_name {config.dataset_name}" if config.dataset_name else f"--train_data_dir {config.train_data_dir}"


def open_dataset(config: TrainingConfig) -> tuple[Any, Any]:
    """The split to train on and the held-out one, undecoded; the second is None where there is none.

    Raises:
        UsageError: there is nothing there.
    """
    import datasets

    datasets.disable_progress_bars()
    load: Any = stream if config.streaming else datasets.load_dataset
    try:
        if config.train_data_dir is None:
            loaded = load(config.dataset_name, config.dataset_config_name)
        else:
            folder = Path(config.train_data_dir)
            if not folder.is_dir():
                raise UsageError(f"--train_data_dir {folder}: there is no such folder")
            kind = "parquet" if any(folder.rglob("*.parquet")) else "imagefolder"
            loaded = load(kind, data_dir=str(folder))
    except UsageError:
        raise
    except Exception as error:  # the library raises many kinds; each means that there is nothing to train on
        raise UsageError(f"{name_of(config)} cannot be loaded: {first_line(error)}") from error
    splits = {name: split for name, split in loaded.items() if config.streaming or len(split) > 0}
    train_name = "train" if "train" in splits else next(iter(splits))
    held_out_name = next((name for name in HELD_OUT_NAMES if name in splits and name != train_name), None)
    return splits[train_name], splits.get(held_out_name)


def stream(*source: Any, **options: Any) -> Any:
    """`datasets.load_dataset(..., streaming=True)`, with parquet files read in the thread that asks for their rows.

    The library reads them through Arrow's scanner, whose threads call back into Python for the bytes of a file. Where the rows are
    not read to their end, and training reads round and round, that deadlocks at the close of files of several row groups, or aborts
    at the interpreter's exit (apache/arrow issue 45214; still so in pyarrow 26).
    """
    import datasets
    from datasets.packaged_modules.parquet.parquet import Parquet

    builder = datasets.load_dataset_builder(*source, **options)
    if isinstance(builder, Parquet):
        builder._generate_tables = partial(parquet_tables, builder)
    return builder.as_streaming_dataset()


def parquet_tables(builder: Any, files: list[str], row_groups_list: list[tuple[int, ...] | None]) -> Iterator[tuple[Any, Any]]:
    """What the library's builder yields for some files, a few rows at a time: a key and an Arrow table."""
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets.builder import Key

    for number, (file, row_groups) in enumerate(zip(files, row_groups_list, strict=True)):
        with fsspec.open(file, "rb") as opened, pq.ParquetFile(opened) as parquet:
            batches = parquet.iter_batches(READ_AT_ONCE, row_groups, builder.config.columns, use_threads=False)
            for index, batch in enumerate(batches):
                yield Key(number, index), builder._cast_table(pa.Table.from_batches([batch]))


@dataclass
class Columns:
    """Which columns of a data set are used: that of the images and, or None, those of class labels and of captions."""

    image: str
    label: str | None
    class_names: list[str]
    caption: str | None

    @classmethod
    def of(cls, features: dict[str, Any], config: TrainingConfig) -> "Columns":
        """Those named in the configuration; else the first that holds images, and the first of class labels.

        Raises:
            UsageError: there is no such column.
        """
        import datasets

        if config.caption_column is not None and config.caption_column not in features:
            raise UsageError(f"--caption_column {config.caption_column}: the columns are {', '.join(features)}")
        label = next((name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)), None)
        class_names = features[label].names if label else []
        # Folders of splits, without class folders in them, come with a column of labels all the same.
        if set(class_names) <= {"train", *HELD_OUT_NAMES}:
            label, class_names = None, []
        return cls(image_column(features, config), label, class_names, config.caption_column)

    def labels(self, values: Iterable[int | None]) -> torch.Tensor | None:
        """Class labels as int64 (N,); None where some are missing."""
        values = list(values)
        return None if None in values else torch.tensor(values, dtype=torch.int64)

    def captions(self, values: Iterable[Any]) -> list[str]:
        """Captions; the first, where a row has several, and an empty one where it has none."""
        return [str((value or [""])[0] if isinstance(value, list) else value or "") for value in values]


def check_labels(split: Any, config: TrainingConfig) -> None:
    """Raise a `UsageError` for a row without a class label, where the run is conditioned on them."""
    label = Columns.of(split.features, config).label
    if config.class_conditional and label is not None:
        for number, value in enumerate(split[label]):
            check_label(value, f"row {number} of the split {split.split}", config)


def check_label(value: int | None, row: str, config: TrainingConfig) -> None:
    """The same of one row, which `row` names."""
    if config.class_conditional and (value is None or value < 0):  # -1 is how `datasets` says that there is none
        raise UsageError(
            f"{name_of(config)}: {row} has no class label; label it or remove it, or train without --class_conditional"
        )


def image_column(features: dict[str, Any], config: TrainingConfig) -> str:
    """The column that holds images: the one named, the first of image type, or one that holds encoded bytes."""
    import datasets

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


def undecoded(split: Any, column: str, config: TrainingConfig) -> Any:
    """The split, with its images as bytes or paths."""
    import datasets

    try:
        return split.cast_column(column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UsageError(f"--image_column {column}: that column of {name_of(config)} holds no images") from error
