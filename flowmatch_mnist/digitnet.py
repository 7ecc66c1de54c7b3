"""Train the evaluator's classifier anew, on the training images alone, and put its weights in the package.

python -m flowmatch_mnist.digitnet
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from flowmatch_mnist.evaluation.digitnet import WEIGHTS, DigitNet
from flowmatch_mnist.evaluation.metrics import label_accuracy, read_digits
from flowmatch_mnist.images import mnist
from flowmatch_mnist.images.pixels import PIXELS
from flowmatch_mnist.support.errors import CommandParser, exit_on_error
from flowmatch_mnist.support.files import save_weights


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, shear and shift each image a little, by its own throw of the dice: uint8 (B, 28, 28) -> (B, 1, 28, 28)."""

    def throw(width: float) -> Tensor:
        return width * (2 * torch.rand(len(images), generator=generator) - 1)

    angle, scale, shear = throw(math.radians(12)), torch.exp(throw(0.12)), throw(0.2)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([cos, shear * cos - sin, throw(0.12)], 1), torch.stack([sin, shear * sin + cos, throw(0.12)], 1)]
    places = F.affine_grid(torch.stack(rows, 1), [len(images), 1, 28, 28], align_corners=False)
    # Outside an image is zero, so black is made zero for the while.
    return F.grid_sample(PIXELS["linear"].encode(images) + 1, places, align_corners=False) - 1


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
        F.cross_entropy(net.head(net.body(x)), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net.eval()


def main() -> None:
    """Train, measure on the official test images, and write the weights."""
    parser = CommandParser(prog="python -m flowmatch_mnist.digitnet", description=__doc__)
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("data"), help="where MNIST is, or is put (default: data)")
    add("--epochs", type=int, default=12, help="passes over the training images (default: 12)")
    add("--seed", type=int, default=0, help="of weights, order and distortions (default: 0)")
    add("--out", type=Path, default=WEIGHTS, help="where the weights go (default: into the package)")
    options = parser.parse_args()
    mnist.prepare(options.data_dir)
    net = train(*mnist.load(options.data_dir, "train"), options.epochs, options.seed)
    images, labels = mnist.load(options.data_dir, "test")
    accuracy, _ = label_accuracy(read_digits(net, images)[1], labels)
    metadata = {
        "command": f"python -m flowmatch_mnist.digitnet --epochs {options.epochs} --seed {options.seed}",
        "seed": str(options.seed),
        "test_accuracy": f"{accuracy:.4f}",
        "versions": json.dumps({"torch": torch.__version__}),
    }
    save_weights(options.out, net.state_dict(), metadata)
    print(f"{accuracy:.2%} of the 10,000 test images read right; wrote {options.out}")


if __name__ == "__main__":
    with exit_on_error():
        main()
