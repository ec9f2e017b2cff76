"""Latents computed once: where they come from the cache, where they may not, and that a run learns the same from them."""

import json
import os
import socket
import subprocess
import time

import datasets
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from diffusers_edu import VariationalAutoencoder
from diffusers_edu.rungs import configuration, train_rung
from diffusers_edu.training import trainer
from diffusers_edu.training.data import Augmentation, ImageData, load_digits
from diffusers_edu.training.latents import LatentData, draw, encode_data, fingerprint, moments


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache / "diffusers_edu"


def make_vae(posterior="diagonal", **kwargs):
    torch.manual_seed(0)
    vae = VariationalAutoencoder(posterior=posterior, **kwargs)
    if vae.to_lower is not None:
        torch.nn.init.normal_(vae.to_lower.weight, std=0.05)
    return vae.requires_grad_(False).eval()


def digits(count=30):
    return load_digits()[0].head(count)


def encode(vae, data=None, flip=False, batch_size=8):
    return encode_data(vae, data or digits(), flip, batch_size, Accelerator(cpu=True))


def count_encoded(vae, monkeypatch):
    """A list that grows with the number of images of each batch that is encoded."""
    encoded, original = [], vae.encode
    monkeypatch.setattr(vae, "encode", lambda x: encoded.append(len(x)) or original(x))
    return encoded


def gap(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.mark.parametrize("posterior", ["diagonal", "full"])
def test_the_latents_are_the_moments_of_the_images_and_drawn_as_the_posterior_draws(posterior):
    vae, data = make_vae(posterior), digits()
    latents = encode(vae, data)
    images, noise = data.batch(list(range(30)))["images"], torch.randn(30, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = vae.encode(images).latent_dist
    batch = latents.batch(list(range(30)))
    assert gap(batch["latent_mean"], expected.mean) < 1e-5
    assert gap(draw(batch["latent_mean"], batch["latent_scale"], noise), expected.reparameterise(noise)) < 1e-5
    if posterior == "full":
        covariance = batch["latent_scale"] @ batch["latent_scale"].mT
        assert gap(covariance.diagonal(dim1=1, dim2=2).reshape(30, 4, 2, 2), expected.var) < 1e-5
        assert covariance.triu(1).abs().max() > 1e-3


def test_a_batch_has_the_latents_asked_for_with_their_labels_and_captions():
    pixels, labels = digits(5).pixels, torch.tensor([4, 5, 6, 7, 8])
    latents = encode(make_vae(), ImageData(pixels, 16, labels, captions=list("abcde")))
    batch = latents.batch([3, 1])
    assert len(latents) == 5
    assert batch.keys() == {"latent_mean", "latent_scale", "labels", "captions"}
    assert batch["labels"].tolist() == [7, 5] and batch["captions"] == ["d", "b"]
    assert torch.equal(batch["latent_mean"], latents.upright["latent_mean"][[3, 1]])


@pytest.mark.parametrize("posterior", ["diagonal", "full"])
def test_where_an_image_is_flipped_the_latents_are_those_of_the_flipped_image(posterior):
    vae, data = make_vae(posterior), digits(6)
    latents = encode(vae, data, flip=True)
    augmentation = Augmentation([True, False, False, True], [0.0] * 4)
    got = latents.batch([5, 0, 3, 5], augmentation)
    mean, scale = moments(vae, data.batch([5, 0, 3, 5], augmentation)["images"])
    assert gap(got["latent_mean"], mean) < 1e-5
    assert gap(got["latent_scale"], scale) < 1e-5
    assert gap(latents.batch([5])["latent_mean"], mean[3:]) > 1e-2
    assert encode(vae, data).flipped is None


def test_latents_are_computed_once(monkeypatch, own_cache):
    vae = make_vae()
    encoded = count_encoded(vae, monkeypatch)
    first = encode(vae)
    assert encoded == [8, 8, 8, 6]
    flipped = encode(vae, flip=True)
    assert encoded == [8, 8, 8, 6] * 2
    monkeypatch.setattr(vae, "encode", lambda x: pytest.fail("encoded again"))
    for again in (encode(vae), encode(vae, flip=True, batch_size=5)):
        assert torch.equal(again.upright["latent_mean"], first.upright["latent_mean"])
        assert torch.equal(again.upright["latent_scale"], first.upright["latent_scale"])
    assert torch.equal(again.flipped["latent_mean"], flipped.flipped["latent_mean"])
    assert len(list(own_cache.iterdir())) == 2


def changed_weight(vae, data):
    vae.encoder[0].weight.data[0, 0, 0, 0] += 1e-3
    return vae, data


def changed_image(vae, data):
    data.pixels[7, 0, 3, 3] += 1
    return vae, data


CHANGES = {
    "weight": changed_weight,
    "config": lambda vae, data: (make_vae(norm_num_groups=4), data),
    "image": changed_image,
    "scale_of_the_images": lambda vae, data: (vae, ImageData(data.pixels, 17)),
    "fewer_images": lambda vae, data: (vae, data.head(29)),
    "order": lambda vae, data: (vae, data.part([1, 0, *range(2, 30)])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_or_other_images_are_encoded_anew(change, monkeypatch, own_cache):
    encode(make_vae())
    vae, data = CHANGES[change](make_vae(), digits())
    encoded = count_encoded(vae, monkeypatch)
    latents = encode(vae, data)
    assert sum(encoded) == len(data)
    assert gap(latents.upright["latent_mean"], moments(vae, data.batch(list(range(len(data))))["images"])[0]) < 1e-5
    assert len(list(own_cache.iterdir())) == 2


def test_a_fingerprint_does_not_depend_on_the_order_in_which_defaults_are_listed():
    vae = make_vae(latent_channels=4)
    expected = fingerprint(vae)
    vae.register_to_config(
        _use_default_values=vae.config["_use_default_values"][::-1]
    )  # a set's order, another in each process
    assert fingerprint(vae) == expected


def test_a_moved_model_keeps_its_fingerprint(tmp_path):
    make_vae().save_pretrained(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    moved = VariationalAutoencoder.from_pretrained(tmp_path / "b")
    moved.save_pretrained(tmp_path / "c")
    assert fingerprint(moved) == fingerprint(VariationalAutoencoder.from_pretrained(tmp_path / "c"))


@pytest.mark.parametrize("damage", [lambda content: b"nothing", lambda content: content[:-100], lambda content: b""])
def test_a_damaged_file_is_made_anew(damage, monkeypatch, own_cache):
    vae = make_vae()
    first = {name: tensor.clone() for name, tensor in encode(vae).upright.items()}
    (path,) = own_cache.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    encoded = count_encoded(vae, monkeypatch)
    again = encode(vae)
    assert sum(encoded) == 30
    assert all(gap(tensor, again.upright[name]) < 1e-6 for name, tensor in first.items())
    encode(vae)
    assert sum(encoded) == 30


def test_where_no_cache_can_be_written_latents_are_computed_each_time(monkeypatch, own_cache):
    own_cache.write_text("a file where the folder should be")
    vae = make_vae()
    encoded = count_encoded(vae, monkeypatch)
    first, second = encode(vae), encode(vae)
    assert sum(encoded) == 60
    assert torch.equal(first.upright["latent_mean"], second.upright["latent_mean"])


def test_a_cache_that_becomes_unwritable_while_it_is_written_is_no_error(monkeypatch, own_cache):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusers_edu.training.cache.save_file", fails)
    assert len(encode(make_vae())) == 30
    assert not list(own_cache.iterdir())


def test_what_was_left_half_written_in_the_cache_goes_and_what_another_process_writes_does_not(own_cache):
    ended = subprocess.Popen(["true"])
    ended.wait()
    here, yesterday = socket.gethostname(), time.time() - 25 * 3600
    ours, old = [f"{ended.pid}@{here}"], ["1@elsewhere", f"{os.getpid()}@{here}", "123"]
    theirs = ["2@elsewhere", f"{os.getppid()}@{here}", "124"]
    own_cache.mkdir(parents=True)
    for writer in (*ours, *old, *theirs):
        (own_cache / f"latents-0123.{writer}.tmp").write_text("half")
    for writer in old:
        os.utime(own_cache / f"latents-0123.{writer}.tmp", (yesterday, yesterday))
    encode(make_vae())
    assert {path.name for path in own_cache.glob("*.tmp")} == {f"latents-0123.{writer}.tmp" for writer in theirs}
    assert len(list(own_cache.iterdir())) == 4


FLAGS = {"dataset_name": "digits", "train_batch_size": 32, "max_train_steps": 5, "lr_warmup_steps": 2,
         "validation_steps": 5, "validation_samples": 0}  # fmt: skip


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def run(folder, **changes):
    AcceleratorState._reset_state(reset_partial_state=True)
    train_rung(configuration("latent_diffusion", output_dir=str(folder), **{**FLAGS, **changes}))
    return torch.tensor([line["loss"] for line in lines(folder, "log.jsonl")])


@pytest.mark.parametrize("posterior", ["diagonal", "full"])
def test_a_run_with_cached_latents_has_the_losses_of_one_that_encodes_at_every_step(posterior, tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    vae = tmp_path / "vae"
    train_rung(configuration("vae", output_dir=str(vae), posterior=posterior, **{**FLAGS, "validation_steps": 0}))
    flags = {"vae_path": str(vae), "random_flip": True, "class_conditional": True}
    used = []
    monkeypatch.setattr(trainer, "encode_data", lambda *arguments: used.append(encode_data(*arguments)) or used[-1])
    cached = run(tmp_path / "cached", **flags)
    assert isinstance(used[0], LatentData) and used[0].flipped is not None
    monkeypatch.setattr(trainer, "encode_data", lambda vae, data, *_: data)
    anew = run(tmp_path / "anew", **flags)
    assert gap(cached, anew) < 1e-5
    assert cached.std() > 1e-3
    looks = [[line["raw"]["loss"] for line in lines(tmp_path / name, "validation.jsonl")] for name in ("cached", "anew")]
    assert len(looks[0]) == 1
    assert max(abs(a - b) for a, b in zip(*looks, strict=True)) < 1e-5


def test_skipped_images_are_counted_in_the_log_where_latents_are_cached(tmp_path):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(20):
        Image.effect_noise((8, 8), 20 + n).save(folder / f"{n:02}.png")
    (folder / "00.png").write_text("no image")
    flags = {
        "dataset_name": None,
        "train_data_dir": str(folder),
        "resolution": 8,
        "on_bad_image": "skip",
        "validation_steps": 0,
    }
    run(tmp_path / "run", **flags, max_train_steps=2)
    vae_count, latent_count = (lines(tmp_path / path, "log.jsonl")[-1]["skipped_images"] for path in ("run/vae_rung", "run"))
    assert vae_count == latent_count == 1
