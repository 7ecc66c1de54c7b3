"""Train one of the evaluator's two classifiers again, on the training images only, and write its weights into the package.

The file also stores the classifier's scores of real digits. They are the baseline that `train.py test` compares samples with.

python -m flowmatch_mnist.digitnet
python -m flowmatch_mnist.digitnet --net resnet
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from flowmatch_mnist.evaluation.classifiers import CLASSIFIERS, Classifier, load_classifier, metadata_of, weights_of
from flowmatch_mnist.evaluation.estimates import share
from flowmatch_mnist.evaluation.evaluator import ClassifierMetrics, counts_of, draw_like, fingerprint
from flowmatch_mnist.images import mnist
from flowmatch_mnist.images.pixels import PIXELS
from flowmatch_mnist.support.commands import CommandParser
from flowmatch_mnist.support.errors import UserError, exit_on_error
from flowmatch_mnist.support.files import check_writable, save_weights


def move(images: Tensor, places: Tensor) -> Tensor:
    """Resample images uint8 (B, 28, 28), and return them in the network's units: (B, 1, 28, 28).

    `places` (B, 28, 28, 2) gives the point (x, y) of each new pixel. The images reach from -1 to 1 in x and y.
    """
    # `grid_sample` reads 0 outside an image, so black is 0 while it runs.
    return F.grid_sample(PIXELS["linear"].encode(images) + 1, places, align_corners=False) - 1


def affine_distortion(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, shear and shift each image a little, with its own random numbers: uint8 (B, 28, 28) -> (B, 1, 28, 28)."""

    def jitter(width: float) -> Tensor:
        return width * (2 * torch.rand(len(images), generator=generator) - 1)

    angle, scale, shear = jitter(math.radians(12)), torch.exp(jitter(0.12)), jitter(0.2)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = [torch.stack([cos, shear * cos - sin, jitter(0.12)], 1), torch.stack([sin, shear * sin + cos, jitter(0.12)], 1)]
    return move(images, F.affine_grid(torch.stack(rows, 1), [len(images), 1, 28, 28], align_corners=False))


def warp(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image and bend it smoothly, with its own random numbers: uint8 (B, 28, 28) -> (B, 1, 28, 28).

    Source: Simard, Steinkraus and Platt 2003, "Best Practices for Convolutional Neural Networks", section 2 (elastic
    distortions).
    """
    count = len(images)
    bend = 0.05 * torch.randn(count, 2, 5, 5, generator=generator)
    shift = 0.12 * (2 * torch.rand(count, 2, 1, 1, generator=generator) - 1)
    by = F.interpolate(bend, size=28, mode="bicubic", align_corners=False) + shift
    as_they_are = F.affine_grid(torch.eye(2, 3).expand(count, 2, 3), [count, 1, 28, 28], align_corners=False)
    return move(images, as_they_are + by.permute(0, 2, 3, 1))


@dataclass(frozen=True)
class Recipe:
    """The training settings of a classifier.

    Attributes:
        distort: the distortion of the images, new in every epoch.
        epochs: number of passes over the training images.
        rate: the highest learning rate.
        seed: random seed of weights, order and distortions.
    """

    distort: Callable[[Tensor, torch.Generator], Tensor]
    epochs: int
    rate: float
    seed: int


RECIPES = {"digitnet": Recipe(affine_distortion, 12, 0.01, seed=0), "resnet": Recipe(warp, 10, 0.004, seed=1)}
"""The training settings by classifier. The two share none of them, because they should make different mistakes."""


def train(name: str, images: Tensor, labels: Tensor, epochs: int, seed: int, batch_size: int = 100) -> Classifier:
    """Return a classifier trained on images uint8 (N, 28, 28) with labels (N,). Each epoch distorts the images in a new way."""
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = CLASSIFIERS[name]().to(memory_format=torch.channels_last)
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, steps)
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(epochs)])
    for batch in track(order[: steps * batch_size].split(batch_size), f"training {name}"):
        x = recipe.distort(images[batch], generator).to(memory_format=torch.channels_last)
        F.cross_entropy(net.head(net.body(x)), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net.eval()


def main() -> None:
    """Train a classifier, measure it on the official test images, and write its weights."""
    parser = CommandParser(prog="python -m flowmatch_mnist.digitnet", description=__doc__)
    add = parser.add_argument
    add("--net", choices=CLASSIFIERS, default="digitnet", help="which classifier (default: digitnet)")
    add("--data-dir", type=Path, default=Path("data"), help="folder of MNIST; missing files are downloaded (default: data)")
    add("--epochs", type=int, help="passes over the training images (default: 12, for resnet 10)")
    add("--seed", type=int, help="random seed of weights, order and distortions (default: 0, for resnet 1)")
    add("--out", type=Path, help="file for the weights (default: the file in the package)")
    add("--measure", action="store_true", help="do not train; measure the weights in the package again")
    options = parser.parse_args()
    recipe = RECIPES[options.net]
    epochs = recipe.epochs if options.epochs is None else options.epochs
    seed = recipe.seed if options.seed is None else options.seed
    if epochs < 1 or not 0 <= seed < 2**63:
        raise UserError("--epochs must be at least 1, and --seed must be from 0 to 2^63 - 1")
    if options.measure and (options.epochs, options.seed) != (None, None):
        raise UserError("--measure trains nothing; leave out --epochs and --seed")
    out = options.out or weights_of(options.net)
    check_writable(out)
    mnist.prepare(options.data_dir)
    training, test = mnist.load(options.data_dir, "train"), mnist.load(options.data_dir, "test")
    if options.measure:
        net, metadata = load_classifier(options.net), metadata_of(options.net)
    else:
        net = train(options.net, *training, epochs, seed)
        metadata = {
            "command": f"python -m flowmatch_mnist.digitnet --net {options.net} --epochs {epochs} --seed {seed}",
            "seed": str(seed),
            "versions": json.dumps({"torch": torch.__version__}),
        }
    metrics = ClassifierMetrics(net, test)
    accuracy = share(metrics.right).value
    # The evaluator's baseline: as many real training digits of each class, compared with the test digits.
    scores = metrics.baseline(training[0], draw_like(training[1], counts_of(test[1])))
    real = json.dumps({"beside": fingerprint(test[0]), "scores": scores})
    measured = {"test_accuracy": f"{accuracy:.4f}", "real digits": real}
    save_weights(out, net.state_dict(), metadata | measured)
    print(f"read {accuracy:.2%} of the {len(test[1]):,} test images correctly; wrote {out}")


if __name__ == "__main__":
    with exit_on_error():
        main()
