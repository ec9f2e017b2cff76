"""Data from every source it may come from: the pixels that arrive, the split, and what is said where there are none."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffusers_edu.training.configuration import TrainingConfig, UsageError
from diffusers_edu.training.data import ImageData, load_data


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
    batch = train.__getitems__(list(range(1257)))["images"]
    assert torch.equal(batch.unique(), torch.linspace(-1, 1, 17))
    assert torch.equal(train.images, (batch + 1) / 2)
    with pytest.raises(UsageError, match="--resolution 16"):
        load_data(TrainingConfig(dataset_name="digits", resolution=16))


def test_a_batch_is_its_items():
    data = ImageData(torch.arange(12, dtype=torch.uint8).reshape(3, 1, 2, 2), 11, torch.tensor([4, 5, 6]))
    batch = data.__getitems__([2, 0])
    assert batch["labels"].tolist() == [6, 4]
    assert torch.equal(batch["images"], torch.stack([data[2]["images"], data[0]["images"]]))
    assert [batch["images"].min(), batch["images"].max()] == [-1, 1]


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
    import datasets

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
