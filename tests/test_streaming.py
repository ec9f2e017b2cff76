"""Images that are read as they are needed: the same rows on any number of processes, and everything once an epoch."""

import io
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from diffusers_edu.errors import UsageError
from diffusers_edu.rungs import configuration, train_rung
from diffusers_edu.training import log
from diffusers_edu.training.configuration import TrainingConfig
from diffusers_edu.training.data import load_data
from diffusers_edu.training.objectives import VariationalObjective
from diffusers_edu.training.sources import Columns
from diffusers_edu.training.streaming import StreamedImages
from diffusers_edu.training.trainer import make_batches

NAMES = ["even", "odd"]
HOST = type("Host", (), {"device": torch.device("cpu"), "num_processes": 1})


@pytest.fixture(autouse=True)
def a_run_of_its_own(tmp_path_factory, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def flat(level, channels=1):
    return np.full((8, 8) if channels == 1 else (8, 8, channels), level, np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(folder, shards, split="train", labels={}):
    """A parquet file for each list of images, encoded or arrays. Labels (but those of some rows) and captions tell the grey level."""
    before = 0
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES), "text": datasets.Value("string")}
    for number, images in enumerate(shards):
        encoded = [image if isinstance(image, bytes) else png(image) for image in images]
        levels = [-1 if isinstance(image, bytes) else int(image.flat[0]) for image in images]
        columns = {
            "image": [{"bytes": image, "path": None} for image in encoded],
            "label": [labels.get(row, level % 2) for row, level in enumerate(levels, before)],
            "text": [f"level {level}" for level in levels],
        }
        before += len(images)
        folder.mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        table.to_parquet(str(folder / f"{split}-{number:05}-of-{len(shards):05}.parquet"))


def write_folder(folder, images, split="train"):
    for number, image in enumerate(images):
        path = folder / split / NAMES[int(image.flat[0]) % 2] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def noise_images(count):
    return [np.random.default_rng(n).integers(0, 256, (8, 14, 3), dtype=np.uint8) for n in range(count)]


@pytest.fixture(params=["folder", "shards"])
def noisy_source(request, tmp_path):
    """23 images to train on, as a folder, which has one shard, and as four parquet files of different sizes."""
    images = noise_images(23)
    if request.param == "folder":
        write_folder(tmp_path, images)
        write_folder(tmp_path, images[:2], "test")
    else:
        write_shards(tmp_path, [images[:3], images[3:10], images[10:15], images[15:]])
        write_shards(tmp_path, [images[:2]], "test")
    return tmp_path


def settings(folder, **changes):
    return TrainingConfig(train_data_dir=str(folder), streaming=True, **{"resolution": 8, "shuffle_buffer": 5, **changes})


def stream(folder, **changes):
    return load_data(settings(folder, **changes))


def batches(folder, parts, total, start=0, stop=12, **changes):
    """The batches of a process, as the loop gets them."""
    config = settings(folder, max_train_steps=stop, **changes)
    return list(make_batches(load_data(config)[0], parts, total, start, config, HOST))


def images_of(found):
    return torch.cat([batch["images"] for batch in found])


def levels_of(found):
    return ((images_of(found)[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


AUGMENTED = {"random_flip": True, "center_crop": False}


@pytest.mark.parametrize("cuts", [(0, 4, 8), (0, 2, 4, 6, 8), (0, 1, 6, 8)], ids=str)
def test_the_batches_of_processes_and_of_accumulation_make_up_those_of_one_process(noisy_source, cuts):
    one = batches(noisy_source, [range(8)], 8, **AUGMENTED)
    assert len(one) == 12
    ranges = [range(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    ranks = [batches(noisy_source, [rows], 8, **AUGMENTED) for rows in ranges]
    accumulated = batches(noisy_source, ranges, 8, **AUGMENTED)
    for step, whole in enumerate(one):
        for split in ([rank[step] for rank in ranks], accumulated[step * len(ranges) : (step + 1) * len(ranges)]):
            assert torch.equal(images_of(split), whole["images"])
            assert torch.equal(torch.cat([batch["labels"] for batch in split]), whole["labels"])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("parts", [[range(8)], [range(2), range(4, 6)]], ids=["whole", "accumulated"])
def test_data_workers_change_nothing(noisy_source, parts, workers):
    expected = batches(noisy_source, parts, 8, **AUGMENTED)
    got = batches(noisy_source, parts, 8, dataloader_num_workers=workers, **AUGMENTED)
    assert len(expected) == len(got) == 12 * len(parts)
    assert torch.equal(images_of(got), images_of(expected))


@pytest.mark.parametrize("start", [1, 5, 11])
def test_a_run_that_goes_on_sees_what_an_unbroken_one_sees(noisy_source, start):
    whole = batches(noisy_source, [range(8)], 8, **AUGMENTED)
    rest = batches(noisy_source, [range(8)], 8, start=start, **AUGMENTED)
    assert len(rest) == 12 - start
    assert torch.equal(images_of(rest), images_of(whole[start:]))


def test_the_images_are_those_that_are_decoded_into_memory(noisy_source):
    streamed = images_of(batches(noisy_source, [range(8)], 8, stop=20))
    train, held_out = load_data(TrainingConfig(train_data_dir=str(noisy_source), resolution=8))
    expected = train.batch(list(range(23)))["images"]
    assert (streamed[:, None] - expected).flatten(2).abs().amax(2).min(1).values.max() == 0
    assert (expected[:, None] - streamed).flatten(2).abs().amax(2).min(1).values.max() == 0
    _, streamed_held_out = stream(noisy_source)
    assert torch.equal(streamed_held_out.pixels, held_out.pixels)
    assert torch.equal(streamed_held_out.labels, held_out.labels)


def test_with_one_lane_every_image_comes_once_an_epoch_in_an_order_of_its_own(tmp_path):
    write_folder(tmp_path, [flat(level) for level in range(24)])
    write_folder(tmp_path, [flat(99)], "test")
    seen = levels_of(batches(tmp_path, [range(8)], 8))
    epochs = [seen[start : start + 24] for start in range(0, 96, 24)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert list(range(24)) not in epochs
    assert seen != levels_of(batches(tmp_path, [range(8)], 8, seed=1))


def test_each_lane_has_shards_of_its_own_and_shows_each_of_their_images_once_an_epoch(tmp_path):
    write_shards(tmp_path, [[flat(10 * shard + i) for i in range(6)] for shard in range(4)])
    write_shards(tmp_path, [[flat(99)]], "test")
    seen = torch.tensor(levels_of(batches(tmp_path, [range(12)], 12, stop=6))).reshape(6, 4, 3)
    lanes = [seen[:, lane].flatten().tolist() for lane in range(4)]
    shards = [{level // 10 for level in lane} for lane in lanes]
    assert sorted(shards, key=min) == [{0}, {1}, {2}, {3}]
    for lane in lanes:
        epochs = [lane[start : start + 6] for start in range(0, 18, 6)]
        assert all(len(set(epoch)) == 6 for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


def test_an_image_is_drawn_among_those_of_the_buffer(tmp_path):
    write_folder(tmp_path, [flat(level) for level in range(24)])
    write_folder(tmp_path, [flat(99)], "test")
    in_order = torch.arange(24)
    narrow, wide = (torch.tensor(levels_of(batches(tmp_path, [range(24)], 24, stop=1, shuffle_buffer=n))) for n in (1, 24))
    names = sorted(range(24), key=lambda level: (level % 2, level))
    assert narrow.tolist() == names
    assert sorted(wide.tolist()) == in_order.tolist() and wide.tolist() != names


def split_free_shards(folder):
    write_shards(folder, [[flat(60 * shard + i) for i in range(60)] for shard in range(2)])


def split_free_folder(folder):
    write_folder(folder, [flat(level) for level in range(120)])


@pytest.mark.parametrize("write", [split_free_shards, split_free_folder])
def test_without_a_split_some_images_are_held_out_always_the_same_and_never_come_in_training(write, tmp_path):
    write(tmp_path)
    first, second = (sorted(stream(tmp_path)[1].pixels[:, 0, 0, 0].tolist()) for _ in range(2))
    assert first == second
    assert 1 <= len(first) <= 30
    seen = set(levels_of(batches(tmp_path, [range(8)], 8, stop=40)))
    assert seen.isdisjoint(first)
    assert seen | set(first) == set(range(120))
    head = stream(tmp_path)[0].head(1000)
    assert sorted(head.pixels[:, 0, 0, 0].tolist()) == sorted(seen)


@pytest.mark.parametrize("write", [split_free_shards, split_free_folder])
def test_the_held_out_images_do_not_depend_on_where_the_data_lies(write, tmp_path):
    write(tmp_path / "here")
    before = sorted(stream(tmp_path / "here")[1].pixels[:, 0, 0, 0].tolist())
    (tmp_path / "here").rename(tmp_path / "there")
    assert sorted(stream(tmp_path / "there")[1].pixels[:, 0, 0, 0].tolist()) == before


def test_labels_and_captions_stay_with_their_images(tmp_path):
    write_shards(tmp_path, [[flat(20 * shard + i) for i in range(7)] for shard in range(3)])
    write_shards(tmp_path, [[flat(201), flat(202)]], "test")
    data, held_out = stream(tmp_path, caption_column="text")
    assert data.class_names == held_out.class_names == NAMES
    head = data.head(5)
    for batch in (
        *batches(tmp_path, [range(2, 6)], 6, caption_column="text"),
        held_out.batch([0, 1]),
        head.batch(list(range(5))),
    ):
        levels = levels_of([batch])
        assert batch["labels"].tolist() == [level % 2 for level in levels]
        assert batch["captions"] == [f"level {level}" for level in levels]


def test_bad_images_are_skipped_and_counted_and_what_comes_keeps_its_caption(tmp_path):
    write_shards(tmp_path, [[*(flat(level) for level in range(7)), b"no image", *(flat(level) for level in range(7, 11))]])
    write_shards(tmp_path, [[flat(99)]], "test")
    flags = {"on_bad_image": "skip", "caption_column": "text"}
    found = batches(tmp_path, [range(12)], 12, stop=5, **flags)
    assert [batch["skipped"] for batch in found] == [1] * 5  # a step is an epoch here
    for batch in found:
        levels = levels_of([batch])
        assert set(levels) == set(range(11)) and len(levels) == 12
        assert batch["captions"] == [f"level {level}" for level in levels]
    ranks = [batches(tmp_path, [rows], 12, stop=5, **flags) for rows in (range(6), range(6, 12))]
    for step, whole in enumerate(found):
        assert torch.equal(images_of([rank[step] for rank in ranks]), whole["images"])
        assert sum(rank[step]["skipped"] for rank in ranks) == 1
    with pytest.raises(UsageError, match="is not an image"):
        batches(tmp_path, [range(12)], 12, stop=1)


def test_a_row_without_a_class_label_is_named_where_one_is_needed(tmp_path):
    shards = [
        [flat(10 * shard + i) for i in range(70)] for shard in range(2)
    ]  # more than are looked at to tell grey from colour
    write_shards(tmp_path, shards, labels={133: None})
    write_shards(tmp_path, [[flat(99)]], "test")
    batches(tmp_path, [range(4)], 4, stop=40)
    for workers in (0, 1):
        with pytest.raises(UsageError, match="row 63 of shard 1 of the split train has no class label"):
            batches(tmp_path, [range(4)], 4, stop=40, class_conditional=True, dataloader_num_workers=workers)
    write_shards(tmp_path, [[flat(99), flat(98)]], "test", labels={1: -1})
    with pytest.raises(UsageError, match="row 1 of the split test has no class label"):
        stream(tmp_path, class_conditional=True)


def test_a_bad_image_is_skipped_however_few_rows_a_lane_has(tmp_path):
    write_shards(tmp_path, [[b"no image", *(flat(10 * shard + i) for i in range(3))] for shard in range(4)])
    write_shards(tmp_path, [[flat(99)]], "test")
    found = batches(tmp_path, [range(4)], 4, on_bad_image="skip")
    assert set(levels_of(found)) == {10 * shard + i for shard in range(4) for i in range(3)}


def test_a_bad_image_met_by_a_data_worker_is_named_in_one_line(tmp_path):
    write_shards(tmp_path, [[*(flat(level) for level in range(70)), b"no image"]])
    write_shards(tmp_path, [[flat(99)]], "test")
    with pytest.raises(UsageError, match="is not an image that can be read") as error:
        batches(tmp_path, [range(71)], 71, stop=1, dataloader_num_workers=1)
    assert len(str(error.value).splitlines()) == 1


def test_nothing_sleeps_between_epochs(tmp_path, monkeypatch):
    write_shards(tmp_path, [[flat(1), flat(2)], [flat(3), flat(4)], [flat(5), flat(6)]])
    write_shards(tmp_path, [[flat(99)]], "test")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"sleeps for {seconds} s"))
    assert set(levels_of(batches(tmp_path, [range(2)], 2))) == {1, 2, 3, 4, 5, 6}


def test_where_no_image_can_be_read_it_is_said_so(tmp_path):
    write_shards(tmp_path, [[b"no image"] * 4])
    write_shards(tmp_path, [[flat(1)]], "test")
    for flags in ({"on_bad_image": "skip"}, {}):
        with pytest.raises(UsageError) as error:
            batches(tmp_path, [range(4)], 4, **flags)
        assert len(str(error.value).splitlines()) == 1


def test_a_shard_without_images_is_refused_by_the_name_of_the_data(tmp_path):
    write_shards(tmp_path, [[flat(1), flat(2), flat(3)], []])
    write_shards(tmp_path, [[flat(9)]], "test")
    with pytest.raises(UsageError, match=f"--train_data_dir {tmp_path}: a shard has no images"):
        batches(tmp_path, [range(4)], 4)


def test_a_shard_without_images_is_no_matter_where_a_lane_has_another(tmp_path):
    write_shards(tmp_path, [[flat(1), flat(2), flat(3)], []])
    write_shards(tmp_path, [[flat(9)]], "test")
    assert set(levels_of(batches(tmp_path, [range(1)], 1))) == {1, 2, 3}


@pytest.mark.parametrize(
    ("shards", "total", "lanes"),
    [(1, 128, 1), (2, 128, 2), (3, 128, 2), (5, 6, 3), (7, 128, 4), (100, 128, 64), (200, 128, 128)],
)
def test_there_are_as_many_lanes_as_divide_the_batch_evenly_and_have_a_shard_each(shards, total, lanes):
    split = type("Split", (), {"num_shards": shards})
    data = StreamedImages(split, settings("nowhere"), Columns("image", None, [], None), False, 1)
    assert data.lanes(total) == lanes


def test_images_are_grey_where_all_of_the_first_are_grey_and_rgb_otherwise(tmp_path):
    kinds = {"grey": [flat(1), flat(3)], "rgb": [flat(5, 3), flat(7, 3)], "mixed": [flat(1), flat(5, 3)]}
    for name, images in kinds.items():
        write_shards(tmp_path / name, [images])
        write_shards(tmp_path / name, [[flat(9, 3 if name == "grey" else 1)]], "test")
        data, held_out = stream(tmp_path / name)
        channels = 1 if name == "grey" else 3
        assert data.channels == held_out.channels == data.head(2).channels == channels
        for batch in batches(tmp_path / name, [range(4)], 4, stop=2):
            assert batch["images"].shape == (4, channels, 8, 8)
        assert held_out.pixels.unique().tolist() == [9]


def test_a_source_without_images_is_refused(tmp_path):
    pq.write_table(pa.table({"caption": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="no column of images"):
        stream(tmp_path)
    with pytest.raises(UsageError, match="there is no such folder"):
        stream(tmp_path / "nowhere")


@pytest.mark.parametrize("end", ["rows.close()", "pass"])
def test_a_process_ends_that_did_not_read_a_parquet_file_to_its_end(end, tmp_path):
    groups = [{"image": [{"bytes": os.urandom(20_000), "path": None}] * 100}] * 10
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.table(groups[0]).schema) as writer:
        for group in groups:  # the library's own reading of several of them ends in an abort, or never
            writer.write_table(pa.table(group))
    script = f"""
from diffusers_edu.training.configuration import TrainingConfig
from diffusers_edu.training.sources import open_dataset
train, _ = open_dataset(TrainingConfig(train_data_dir={str(tmp_path)!r}, streaming=True, resolution=8))
rows = train.iter(batch_size=4)
print(len(next(rows)["image"][0]["bytes"]))
{end}
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "20000\n"), done.stderr


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(next((output / "vae").glob("*.safetensors")))


def test_a_streamed_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    write_shards(tmp_path / "data", [noise_images(9), noise_images(20)[9:]])
    flags = {"train_data_dir": str(tmp_path / "data"), "streaming": True, "resolution": 8, "train_batch_size": 4,
             "max_train_steps": 6, "lr_warmup_steps": 2, "shuffle_buffer": 5, "validation_steps": 0, **AUGMENTED}  # fmt: skip

    def run(name, **changes):
        AcceleratorState._reset_state(reset_partial_state=True)
        train_rung(configuration("vae", output_dir=str(tmp_path / name), **{**flags, **changes}))
        return weights(tmp_path / name)

    whole = run("whole")
    loss, calls = VariationalObjective.loss, []

    def stops(self, model, batch, noise):
        calls.append(noise)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return loss(self, model, batch, noise)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(VariationalObjective, "loss", stops)
        run("stopped", checkpointing_steps=3)
    stopped = run("stopped", checkpointing_steps=3)
    assert all(torch.equal(tensor, stopped[name]) for name, tensor in whole.items())
    accumulated = run("accumulated", train_batch_size=2, gradient_accumulation_steps=2)
    assert max((tensor - accumulated[name]).abs().max() for name, tensor in whole.items()) < 1e-4


def test_a_run_that_goes_on_between_two_lines_of_its_log_counts_seconds_and_skipped_images_on(tmp_path, monkeypatch):
    write_shards(tmp_path / "data", [[*noise_images(6), b"no image"]])
    write_shards(tmp_path / "data", [noise_images(2)], "test")
    flags = {"train_data_dir": str(tmp_path / "data"), "streaming": True, "resolution": 8, "train_batch_size": 7, "max_train_steps": 8,
             "validation_steps": 0, "on_bad_image": "skip", "checkpointing_steps": 3, "logging_steps": 4}  # fmt: skip

    def run(name, stop=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        clock = itertools.count()  # which stands still but for each step

        def ticks():
            if (now := next(clock)) == stop:
                raise KeyboardInterrupt
            return now

        monkeypatch.setattr(log, "time", type("Clock", (), {"perf_counter": staticmethod(ticks)}))
        train_rung(configuration("vae", output_dir=str(tmp_path / name), **flags))

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop=6)
    run("stopped")
    whole, stopped = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("whole", "stopped")
    )
    assert [(line["seconds"], line["skipped_images"]) for line in whole] == [(4, 4), (8, 8)]
    assert stopped == whole
