"""Train the network of the features `fashion-cnn` on Fashion-MNIST, and write its weights.

`python scripts/train_features.py --train_data_dir fashion-mnist`, a folder that holds the parquet files of both splits. The same seed
makes the same weights, up to the arithmetic of the machine; the digest that is printed belongs into `FASHION_CNN_DIGEST`.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm

from diffusers_edu.cli import fail
from diffusers_edu.errors import UsageError
from diffusers_edu.evaluation.features import FASHION_CNN_FILE, FashionCNN, digest
from diffusers_edu.training.configuration import TrainingConfig
from diffusers_edu.training.data import ImageData, load_data


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Half of the images flipped, all of them shifted alike by up to 2 pixels."""
    flip = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    down, right = torch.randint(5, (2,), generator=generator).tolist()
    return pad(torch.where(flip, images.flip(-1), images), (2, 2, 2, 2))[..., down : down + 28, right : right + 28]


def train(data: ImageData, steps: int, seed: int, batch_size: int = 128) -> FashionCNN:
    """The classifier after `steps` steps of AdamW, their size falling as a cosine."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, network = data.images, FashionCNN()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(steps * batch_size // len(images) + 1)])
    with tqdm(order.split(batch_size)[:steps], desc="training") as bar:
        for chosen in bar:
            loss = cross_entropy(network(augmented(images[chosen], generator)), data.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: FashionCNN, data: ImageData) -> float:
    found = torch.cat([network(batch).argmax(1) for batch in data.images.split(500)])
    return (found == data.labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", help="any dataset of grey images with labels for `datasets.load_dataset`")
    parser.add_argument("--train_data_dir", help="a folder of such images or of parquet files")
    parser.add_argument("--max_train_steps", type=int, default=5000, help="of 128 images (default: 5000)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order (default: 0)")
    parser.add_argument("--output", type=Path, default=FASHION_CNN_FILE, help="the file to write (default: the package's own)")
    flags = vars(parser.parse_args())
    output, config = flags.pop("output"), TrainingConfig(**flags, resolution=28)
    config.validate()
    data, held_out = load_data(config)
    if len(data.class_names) != 10 or data.channels != 1:
        raise UsageError("the data must be grey images of ten labelled classes, as Fashion-MNIST is")
    network = train(data, config.max_train_steps, config.seed)
    weights = {name: x.half() if x.is_floating_point() else x for name, x in network.state_dict().items()}
    network.load_state_dict(weights)  # what is measured is what is written
    share = accuracy(network, held_out)
    name = config.dataset_name or Path(config.train_data_dir).resolve().name
    facts = {"dataset": name, "accuracy": f"{share:.4f}", "steps": config.max_train_steps, "seed": config.seed}
    output.write_bytes(save(weights, {key: str(value) for key, value in facts.items()}))
    print(f"{output}: held-out accuracy {share:.2%}, digest {digest(weights)}")


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        fail(str(error))
