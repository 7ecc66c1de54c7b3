"""The ruler's eye: a small classifier of digits. Its penultimate features are the space in which samples are measured.

    python -m flowmatch_mnist.digitnet        train it anew, on the training images alone, and put its weights in the package

It is no part of the model: no run trains it, averages it, or keeps it in a checkpoint.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from flowmatch_mnist import mnist
from flowmatch_mnist.errors import UserError, exit_on_error
from flowmatch_mnist.files import load_weights, save_weights
from flowmatch_mnist.pixels import PIXELS

WEIGHTS = Path(__file__).with_name("digitnet.safetensors")


def layer(channels: int, out_channels: int) -> nn.Sequential:
    """A convolution, normalised and rectified."""
    return nn.Sequential(nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU())


class DigitNet(nn.Module):
    """Reads digits: images uint8 (B, 28, 28) -> logits float32 (B, 10).

    Attributes:
        num_features: of the penultimate layer.
    """

    num_features = 128

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            layer(1, 32),
            nn.MaxPool2d(2),
            layer(32, 64),
            layer(64, 64),
            nn.MaxPool2d(2),
            layer(64, 96),
            nn.AdaptiveAvgPool2d(3),
            nn.Flatten(),
            nn.Linear(96 * 9, self.num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.num_features, 10)

    def features(self, images: Tensor) -> Tensor:
        """The penultimate features: images uint8 (B, 28, 28) -> float32 (B, num_features)."""
        return self._look(PIXELS["linear"].forward(images[:, None]))

    def _look(self, x: Tensor) -> Tensor:
        features: Tensor = self.body(x)
        return features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def digitnet() -> DigitNet:
    """The classifier with the weights in the package, ready to measure with, on the CPU.

    Raises:
        UserError: if the file is missing or damaged.
    """
    net = DigitNet()
    try:
        net.load_state_dict(load_weights(WEIGHTS)[0])
    except (UserError, RuntimeError) as error:
        raise UserError(
            f"cannot read {WEIGHTS}: it is missing or damaged; install the package again, or train the classifier "
            "with `python -m flowmatch_mnist.digitnet`"
        ) from error
    return net.eval().requires_grad_(False)


@torch.inference_mode()
def accuracy(net: DigitNet, images: Tensor, labels: Tensor) -> float:
    """The share of images uint8 (N, 28, 28) that the classifier reads as their labels (N,), in [0, 1]."""
    read = torch.cat([net(batch).argmax(1) for batch in images.split(500)])
    return (read == labels).double().mean().item()


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, shear and shift each image a little, by its own throw of the dice: uint8 (B, 28, 28) -> (B, 1, 28, 28)."""

    def throw(width: float) -> Tensor:
        return width * (2 * torch.rand(len(images), generator=generator) - 1)

    angle, scale, shear = throw(math.radians(12)), torch.exp(throw(0.12)), throw(0.2)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([cos, shear * cos - sin, throw(0.12)], 1), torch.stack([sin, shear * sin + cos, throw(0.12)], 1)]
    places = F.affine_grid(torch.stack(rows, 1), [len(images), 1, 28, 28], align_corners=False)
    # Outside an image is zero, so black is made zero for the while.
    return F.grid_sample(PIXELS["linear"].forward(images[:, None]) + 1, places, align_corners=False) - 1


def train(images: Tensor, labels: Tensor, epochs: int, seed: int, batch_size: int = 100) -> DigitNet:
    """Train the classifier on images uint8 (N, 28, 28) with their labels (N,), distorted afresh in every epoch."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = DigitNet().to(memory_format=torch.channels_last)
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, steps)
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(epochs)])
    for batch in track(order[: steps * batch_size].split(batch_size), "training the classifier"):
        x = distort(images[batch], generator).to(memory_format=torch.channels_last)
        F.cross_entropy(net.head(net._look(x)), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net.eval()


def main() -> None:
    """Train, measure on the official test images, and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where MNIST is, or is put (default: data)")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training images (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and distortions (default: 0)")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the weights go (default: into the package)")
    options = parser.parse_args()
    mnist.prepare(options.data_dir)
    net = train(*mnist.load(options.data_dir, "train"), options.epochs, options.seed)
    measured = accuracy(net, *mnist.load(options.data_dir, "test"))
    said = {
        "command": f"python -m flowmatch_mnist.digitnet --epochs {options.epochs} --seed {options.seed}",
        "seed": str(options.seed),
        "test_accuracy": f"{measured:.4f}",
        "versions": json.dumps({"torch": torch.__version__}),
    }
    save_weights(options.out, net.state_dict(), said)
    print(f"{measured:.2%} of the 10,000 test images read right; wrote {options.out}")


if __name__ == "__main__":
    with exit_on_error():
        main()
