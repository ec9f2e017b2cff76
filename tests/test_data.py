"""Data from every source it may come from: the pixels that arrive, the split, and what is said where there are none."""

import io

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffusers_edu.errors import UsageError
from diffusers_edu.training import images as images_module
from diffusers_edu.training.configuration import TrainingConfig
from diffusers_edu.training.data import Augmentation, ImageData, Visits, load_data


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache


def load(folder, **kwargs):
    return load_data(TrainingConfig(train_data_dir=str(folder), **kwargs))


def noise(height=8, width=8, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def flat(level, size=8):
    return np.full((size, size), level, np.uint8)


def save(folder, images, **options):
    """Write arrays or PIL images as 0.png, 1.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(folder / f"{i}.png", **options)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def rows(*images):
    """Encoded images as `datasets` stores them."""
    values = [None if image is None else {"bytes": image if isinstance(image, bytes) else png(image)} for image in images]
    return pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def gap(parts, expected):
    """The largest |a - b| between the pixels of the parts, taken together, and images (H, W) or (H, W, C) in any order."""
    actual = [image.permute(1, 2, 0).numpy() for part in parts for image in part.pixels]
    expected = [image if image.ndim == 3 else image[..., None] for image in expected]
    actual, expected = (np.stack(sorted(images, key=lambda image: image.tobytes())) for images in (actual, expected))
    assert actual.shape == expected.shape
    return abs(actual.astype(int) - expected).max()


def test_digits_are_split_as_agreed_and_scaled():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    train, held_out = load_data(TrainingConfig(dataset_name="digits"))
    assert [len(train), len(held_out), train.channels, train.resolution] == [1257, 540, 1, 8]
    digits = load_digits()
    expected = train_test_split(digits.images, digits.target, test_size=0.3, random_state=0, stratify=digits.target)
    for part, images, target in ((train, *expected[::2]), (held_out, *expected[1::2])):
        assert abs(part.pixels[:, 0].numpy() - images).max() == 0
        assert part.labels.tolist() == target.tolist()
        assert abs(np.bincount(target) / len(target) - np.bincount(digits.target) / 1797).max() < 0.002
    batch = train.batch(list(range(1257)))["images"]
    assert torch.equal(batch.unique(), torch.linspace(-1, 1, 17))
    assert torch.equal(train.images, (batch + 1) / 2)
    with pytest.raises(UsageError, match="--resolution 16"):
        load_data(TrainingConfig(dataset_name="digits", resolution=16))


def test_a_batch_has_the_images_asked_for_their_labels_and_captions():
    pixels = torch.arange(12, dtype=torch.uint8).reshape(3, 1, 2, 2)
    data = ImageData(pixels, 11, torch.tensor([4, 5, 6]), captions=["a", "b", "c"])
    batch = data.batch([2, 0])
    assert batch["labels"].tolist() == [6, 4]
    assert batch["captions"] == ["c", "a"]
    assert (batch["images"] - (pixels[[2, 0]] / 11 * 2 - 1)).abs().max() < 1e-6
    assert [batch["images"].min(), batch["images"].max()] == [-1, 1]
    flipped = data.batch([2, 0], Augmentation([False, True], [0.0, 0.0]))["images"]
    assert torch.equal(flipped, torch.stack([batch["images"][0], batch["images"][1].flip(-1)]))


def test_the_first_images_keep_what_is_known_of_them():
    data = ImageData(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), 11, torch.tensor([4, 5, 6]), ["x"], ["a", "b", "c"])
    assert data.head(3) is data
    first = data.head(2)
    assert len(first) == 2
    assert first.batch([1])["labels"].tolist() == [5]
    assert first.batch([1])["captions"] == ["b"]


def picture_cases():
    """What is saved, with which options, and what must arrive."""
    rgb, grey, exif, palette = noise(), noise(channels=1), Image.Exif(), Image.fromarray(noise()).quantize(16)
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    alpha = np.where(np.arange(8) < 4, 255, 0)[None, :, None].repeat(8, 0).astype(np.uint8)
    deep = np.where(np.eye(8) > 0, 65535, noise(channels=1).astype(np.uint16) * 257).astype(np.uint16)  # 8 bits as 16
    return {
        "grey": ([grey, flat(3)], {}, [grey, flat(3)]),
        "rgb": ([rgb, rgb[::-1].copy()], {}, [rgb, rgb[::-1]]),
        "transparent_becomes_white": ([np.dstack([rgb, alpha])], {}, [np.where(alpha > 0, rgb, 255)]),
        "transparent_grey_stays_grey": ([np.dstack([grey, alpha])], {}, [np.where(alpha[..., 0] > 0, grey, 255)]),
        "palette": ([palette], {}, [np.asarray(palette.convert("RGB"))]),
        "bilevel": ([np.eye(8) > 0], {}, [np.uint8(255 * np.eye(8))]),
        "16_bit": ([deep], {}, [np.uint8(deep // 257)]),
        "rotated_comes_upright": ([rgb], {"exif": exif}, [np.rot90(rgb, k=-1)]),
        "grey_among_rgb_becomes_rgb": ([grey, rgb], {}, [grey[..., None].repeat(3, 2), rgb]),
        "wide_is_cropped_to_its_middle": ([noise(8, 14)], {}, [noise(8, 14)[:, 3:11]]),
        "tall_is_cropped_to_its_middle": ([noise(14, 8)], {}, [noise(14, 8)[3:11]]),
        "mixed_sizes_become_64": ([flat(10), flat(200, 20)], {}, [flat(10, 64), flat(200, 64)]),
    }


@pytest.mark.parametrize("case", picture_cases())
def test_pixels_arrive_as_they_are(case, tmp_path):
    images, options, expected = picture_cases()[case]
    save(tmp_path, images * 2, **options)
    parts = load(tmp_path)
    assert gap(parts, expected * 2) == 0
    assert parts[0].labels is None


def test_resolution_resizes(tmp_path):
    save(tmp_path, [flat(10), flat(200, 20)])
    assert gap(load(tmp_path, resolution=12), [flat(10, 12), flat(200, 12)]) == 0


def test_without_a_split_a_tenth_is_held_out_the_same_at_every_call(tmp_path):
    save(tmp_path, [flat(i) for i in range(20)])
    first, second = load(tmp_path), load(tmp_path)
    assert [len(part) for part in first] == [18, 2]
    assert gap(first, [flat(i) for i in range(20)]) == 0
    assert torch.equal(first[1].pixels, second[1].pixels)


def test_class_folders_give_labels(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        save(tmp_path / name, [flat(100 * label + i) for i in range(10)])
    for part in load(tmp_path):
        assert part.class_names == ["cat", "dog"]
        assert torch.equal(part.labels, part.pixels[:, 0, 0, 0].long() // 100)


@pytest.mark.parametrize("held_out_name", ["test", "validation"])
@pytest.mark.parametrize("classes", [("",), ("cat", "dog")], ids=["no_classes", "classes"])
def test_train_and_test_folders_are_the_split(tmp_path, held_out_name, classes):
    images = {part: [flat(offset + i) for i in range(3)] for offset, part in ((0, "train"), (50, held_out_name))}
    for part in images:
        for label, name in enumerate(classes):
            save(tmp_path / part / name, [image + np.uint8(100 * label) for image in images[part]])
    for loaded, saved in zip(load(tmp_path), images.values(), strict=True):
        assert gap([loaded], [image + np.uint8(100 * label) for label in range(len(classes)) for image in saved]) == 0
        if len(classes) > 1:
            assert torch.equal(loaded.labels, loaded.pixels[:, 0, 0, 0].long() // 100)
        else:
            assert loaded.labels is None


def test_held_out_images_take_size_and_colour_of_those_to_train_on(tmp_path):
    grey, coloured = flat(100), np.full((16, 16, 3), (30, 60, 90), np.uint8)
    for name, train, test, expected in (("a", grey, coloured, flat(60)), ("b", coloured, grey, coloured * 0 + 100)):
        save(tmp_path / name / "train" / "x", [train] * 2)
        save(tmp_path / name / "test" / "x", [test] * 2)
        assert gap(load(tmp_path / name)[1:], [expected] * 2) == 0


def test_parquet_files_written_by_datasets(tmp_path):
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    columns = {"picture": [Image.fromarray(flat(100 * (i % 2) + i)) for i in range(5)], "kind": [i % 2 for i in range(5)]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "a.parquet"))
    parts = load(tmp_path)
    assert gap(parts, [flat(100 * (i % 2) + i) for i in range(5)]) == 0
    for part in parts:
        assert part.class_names == ["cat", "dog"]
        assert torch.equal(part.labels, part.pixels[:, 0, 0, 0].long() // 100)


def test_parquet_files_written_by_others(tmp_path):
    images = [noise(seed=i) for i in range(3)]
    write_parquet(tmp_path / "structs" / "a.parquet", caption=["a", "b", "c"], image=rows(*images))
    assert gap(load(tmp_path / "structs"), images) == 0
    write_parquet(tmp_path / "bytes" / "a.parquet", image=[png(image) for image in images], other=rows(*[flat(9)] * 3))
    assert gap(load(tmp_path / "bytes", image_column="image"), images) == 0
    write_parquet(tmp_path / "split" / "train-00000-of-00001.parquet", image=rows(*images[:2]))
    write_parquet(tmp_path / "split" / "test-00000-of-00001.parquet", image=rows(images[2]))
    train, held_out = load(tmp_path / "split")
    assert gap([train], images[:2]) == gap([held_out], images[2:]) == 0


def refusal(folder, **kwargs):
    """The message of the `UsageError` that loading ends in, which must be one line."""
    with pytest.raises(UsageError) as error:
        load(folder, **kwargs)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def test_a_source_without_images_is_refused_by_name(tmp_path):
    for name in ("empty", "text", "broken_parquet"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / "notes.txt").write_text("no image")
    (tmp_path / "broken_parquet" / "a.parquet").write_bytes(b"nothing")
    write_parquet(tmp_path / "empty_parquet" / "a.parquet", image=rows())
    save(tmp_path / "one_image", [noise()])
    for name in ("missing", "empty", "text", "broken_parquet", "empty_parquet", "one_image"):
        assert f"--train_data_dir {tmp_path / name}" in refusal(tmp_path / name)
    with pytest.raises(UsageError, match=r"^--dataset_name .*nowhere"):
        load_data(TrainingConfig(dataset_name=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("name, content", [
    ("text.png", b"no image"), ("empty.png", b""), ("cut_off.png", png(noise(64, 64))[:5000]), ("cut_off_early.png", png(noise())[:40]),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_a_file_that_is_no_image_is_named(tmp_path, name, content):
    save(tmp_path, [noise(64, 64)] * 2)
    (tmp_path / name).write_bytes(content)
    assert name in refusal(tmp_path)
    assert name in refusal(tmp_path, resolution=8)


def test_an_image_too_big_to_be_true_is_named(tmp_path, monkeypatch):
    save(tmp_path, [noise(), noise(32, 32)])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "1.png" in refusal(tmp_path)


@pytest.mark.parametrize("broken", [b"no image", None])
def test_a_parquet_row_that_is_no_image_is_numbered(tmp_path, broken):
    write_parquet(tmp_path / "a.parquet", image=rows(noise(), broken, noise()))
    assert "row 1" in refusal(tmp_path)


def labelled(path, labels):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    columns = {"image": [{"bytes": png(flat(n)), "path": None} for n in range(len(labels))], "label": labels}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))


@pytest.mark.parametrize(("train", "test", "says"), [
    ([0, 1, None, 0], [0], "row 2 of the split train"), ([0, 1], [1, -1], "row 1 of the split test"),
    ([0, 1], None, "row 0 of the split test"), ([0, 1, None, 0, 1, 0, 1, 1], [], "row 2 of the split train"),
])  # fmt: skip
def test_a_row_without_a_class_label_is_named_where_one_is_needed(train, test, says, tmp_path):
    labelled(tmp_path / "train-0.parquet", train)
    if test is None:  # the held-out part has no such column
        write_parquet(tmp_path / "test-0.parquet", image=rows(flat(9)))
    elif test:
        labelled(tmp_path / "test-0.parquet", test)
    message = refusal(tmp_path, class_conditional=True)
    assert f"--train_data_dir {tmp_path}: {says} has no class label" in message
    assert "without --class_conditional" in message
    assert len(load(tmp_path)) == 2


def test_a_column_that_holds_no_images_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", caption=["a", "b"], size=[1, 2])
    assert "caption, size" in refusal(tmp_path)
    assert "caption, size" in refusal(tmp_path, image_column="picture")
    assert "--image_column size" in refusal(tmp_path, image_column="size")


def test_16_bit_grey_keeps_its_intensity_and_floating_point_is_refused(tmp_path):
    for level in (0, 257, 32896, 65535):
        Image.fromarray(np.full((8, 8), level, dtype=np.uint16)).save(tmp_path / f"{level:05}.png")
    both = load(tmp_path)
    assert sorted({int(value) for part in both for value in part.pixels.unique()}) == [0, 1, 128, 255]
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(tmp_path / "half.tiff")
    assert "half.tiff" in refusal(tmp_path)


def both(parts):
    """The pixels of the two parts together."""
    return torch.cat([part.pixels for part in parts])


def as_pixels(batch):
    return ((batch["images"] + 1) * 127.5).round().byte()


@pytest.mark.parametrize("sizes", [[(8, 20)], [(20, 8)], [(8, 20), (8, 8), (30, 8), (12, 18)]], ids=["wide", "tall", "mixed"])
def test_random_crops_are_windows_of_the_whole_image_at_the_resolution(sizes, tmp_path):
    images = [noise(*sizes[i % len(sizes)], seed=i) for i in range(10)]
    save(tmp_path, images)
    train, held_out = load(tmp_path, resolution=8, center_crop=False)
    whole = [
        image if 8 in image.shape else np.asarray(Image.fromarray(image).resize((12, 8), Image.BICUBIC)) for image in images
    ]
    strips = [strip.permute(1, 2, 0).numpy() for strip in train.strips]
    assert all(any(np.array_equal(strip, image) for image in whole) for strip in strips)
    assert len(strips) == len(train) == 9 and held_out.strips is None
    assert held_out.pixels.shape == (1, 3, 8, 8)
    for index, strip in enumerate(train.strips):
        windows = strip.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 8, 8)
        count = len(windows)
        cut = as_pixels(train.batch([index] * 5, Augmentation([False] * 5, [0.0, 0.3, 0.5, 0.8, 0.999])))
        expected = [0, int(0.3 * count), count // 2, int(0.8 * count), count - 1]
        assert torch.equal(cut, windows[expected])
        assert torch.equal(train.pixels[index], windows[count // 2])


def test_random_crops_reach_every_place_evenly_and_are_functions_of_seed_and_position(tmp_path):
    ramp = np.arange(24, dtype=np.uint8)[None].repeat(8, 0)
    save(tmp_path, [ramp] * 4)
    train, _ = load(tmp_path, resolution=8, center_crop=False)

    def places(seed, positions):
        return as_pixels(Visits(train, seed, False)[positions])[:, 0, 0, 0].tolist()

    found = places(0, list(range(1700)))
    counts = np.bincount(found, minlength=17)
    assert len(counts) == 17
    assert abs(counts - 100).max() < 4.5 * 100**0.5
    assert places(0, list(range(900, 1000))) == found[900:1000]
    assert places(1, list(range(1700))) != found


def test_half_of_the_images_are_flipped_a_function_of_seed_and_position(tmp_path):
    save(tmp_path, [np.arange(8, dtype=np.uint8)[None].repeat(8, 0)] * 4)
    train, _ = load(tmp_path)

    def flipped(seed, positions):
        images = as_pixels(Visits(train, seed, True)[positions])
        there = images[:, 0, 0, 0] > 0
        assert torch.equal(images, torch.where(there.reshape(-1, 1, 1, 1), train.pixels[:1].flip(-1), train.pixels[:1]))
        return there.tolist()

    found = flipped(0, list(range(1000)))
    assert abs(sum(found) / 1000 - 1 / 2) < 4 * (1 / 4 / 1000) ** 0.5
    assert flipped(0, list(range(300, 400))) == found[300:400]
    assert flipped(1, list(range(1000))) != found


def test_bad_images_are_skipped_and_counted_and_what_is_left_keeps_its_labels_and_captions(tmp_path):
    levels = [10 * i for i in range(20)]
    images = [png(flat(level)) for level in levels]
    images[3], images[11], images[12] = b"no image", None, png(noise(64, 64))[:900]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["low", "high"]),
                                  "text": datasets.Value("string")})  # fmt: skip
    columns = {
        "image": [image and {"bytes": image, "path": None} for image in images],
        "label": [int(level >= 100) for level in levels],
        "text": [f"level {level}" for level in levels],
    }
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "train-0.parquet"))
    datasets.Dataset.from_dict({k: v[:3] for k, v in columns.items()}, features=features).to_parquet(
        str(tmp_path / "test-0.parquet")
    )
    train, held_out = load(tmp_path, on_bad_image="skip", caption_column="text", resolution=8)
    assert [len(train), train.skipped, len(held_out), held_out.skipped] == [17, 3, 3, 0]
    for part in (train, held_out):
        seen = part.pixels[:, 0, 0, 0]
        assert torch.equal(part.labels, (seen >= 100).long())
        assert part.captions == [f"level {level}" for level in seen.tolist()]
    assert "row 3" in refusal(tmp_path, resolution=8)
    again, _ = load(tmp_path, on_bad_image="skip", caption_column="text", resolution=8)
    assert [again.skipped, again.captions] == [3, train.captions]
    assert torch.equal(again.pixels, train.pixels) and torch.equal(again.labels, train.labels)


def test_nothing_but_bad_images_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", image=rows(*[b"no image"] * 4))
    assert "none of its" in refusal(tmp_path, on_bad_image="skip")


def test_captions_come_from_the_column_named_and_the_first_of_several_counts(tmp_path):
    images = [flat(i) for i in range(6)]
    texts = {"one": [f"level {i}" for i in range(5)] + [None], "many": [[f"level {i}", "other"] for i in range(5)] + [[]]}
    write_parquet(tmp_path / "a.parquet", image=rows(*images), **texts)
    for column in texts:
        for part in load(tmp_path, caption_column=column):
            assert part.captions == [f"level {i}" if i < 5 else "" for i in part.pixels[:, 0, 0, 0].tolist()]
    assert all(part.captions is None and "captions" not in part.batch([0]) for part in load(tmp_path))
    assert "--caption_column name: the columns are image, one, many" in refusal(tmp_path, caption_column="name")


def decoded_count(monkeypatch):
    """A list that grows by one with each image that is decoded."""
    decoded, read = [], images_module.read_image
    monkeypatch.setattr(images_module, "read_image", lambda row, index: decoded.append(index) or read(row, index))
    return decoded


@pytest.mark.parametrize("flags", [{}, {"center_crop": False, "resolution": 8}, {"on_bad_image": "skip"}], ids=str)
def test_images_are_decoded_once(flags, tmp_path, monkeypatch, own_cache):
    save(tmp_path, [noise(8, 10 + i, seed=i) for i in range(10)])
    first = load(tmp_path, **flags)
    monkeypatch.setattr(images_module, "read_image", lambda *_: pytest.fail("decoded again"))
    second = load(tmp_path, **flags)
    assert torch.equal(both(first), both(second))
    for one, other in zip(first[0].strips or [], second[0].strips or [], strict=True):
        assert torch.equal(one, other)
    assert len(list((own_cache / "diffusers_edu").iterdir())) == 2


def test_another_file_resolution_or_crop_is_decoded_anew(tmp_path, monkeypatch):
    save(tmp_path, [flat(i) for i in range(10)])
    decoded = decoded_count(monkeypatch)
    load(tmp_path)
    assert len(decoded) == 10
    for flags in ({"resolution": 12}, {"resolution": 8, "center_crop": False}):
        decoded.clear()
        load(tmp_path, **flags)
        assert len(decoded) >= 9
    decoded.clear()
    save(tmp_path, [flat(200)])
    assert gap(load(tmp_path), [flat(200), *(flat(i) for i in range(1, 10))]) == 0
    assert decoded
    Image.fromarray(flat(77)).save(tmp_path / "10.png")
    assert gap(load(tmp_path), [flat(200), *(flat(i) for i in range(1, 10)), flat(77)]) == 0


def test_a_changed_parquet_file_is_decoded_anew(tmp_path):
    for level in (10, 90):
        write_parquet(tmp_path / "a.parquet", image=rows(*[flat(level + i) for i in range(5)]))
        assert gap(load(tmp_path), [flat(level + i) for i in range(5)]) == 0


def test_more_images_than_fit_into_memory_are_refused_before_any_is_decoded(tmp_path, monkeypatch):
    save(tmp_path, [flat(i) for i in range(10)])
    needed = 9 * 3 * 8 * 8
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": needed / 0.69}))
    assert len(load(tmp_path)[0]) == 9
    decoded = decoded_count(monkeypatch)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": needed / 0.71}))
    message = refusal(tmp_path)
    assert "--resolution 8" in message and "--streaming" in message
    assert not decoded
