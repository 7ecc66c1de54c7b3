"""Do the digits show what was asked for? A classifier that never saw a drawn digit reads them.

    python benchmarks/label_accuracy.py                      the newest run, 2,000 digits for each way of sampling
    python benchmarks/label_accuracy.py --count 10000 --checkpoint runs/quick/version_0/checkpoints/last.ckpt

The classifier is a small convolutional network, trained here on MNIST's training images for five epochs (a few minutes on two
cores, once: its weights are kept in `runs/classifier.pt`). Its accuracy on the official test set is printed first: no figure
below it means more than that.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from flowmatch_mnist import mnist
from flowmatch_mnist.errors import exit_on_error
from flowmatch_mnist.generate import Sampler, generate, load, newest_checkpoint
from flowmatch_mnist.pictures import from_uint8

WEIGHTS = Path("runs/classifier.pt")
WAYS = [Sampler(4, "euler", 1.0), Sampler(4, "euler", 1.5), Sampler(8, "midpoint", 1.0), Sampler(8, "midpoint", 1.5)]


def layer(channels: int, out_channels: int) -> nn.Sequential:
    """A convolution, normalised and rectified."""
    return nn.Sequential(nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU())


def build() -> nn.Sequential:
    """The classifier: (B, 1, 28, 28) in [-1, 1] -> (B, 10)."""
    return nn.Sequential(
        layer(1, 24),
        nn.MaxPool2d(2),
        layer(24, 48),
        layer(48, 48),
        nn.MaxPool2d(2),
        layer(48, 96),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(96 * 9, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def train(data_dir: Path, epochs: int = 5, batch_size: int = 128) -> nn.Sequential:
    """Train the classifier on the training images, shifted by up to two pixels."""
    torch.manual_seed(1)
    images, labels = mnist.load(data_dir, "train")
    net = build()
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, steps)
    padded = F.pad(images, (2, 2, 2, 2))
    for _ in track(range(steps), "training the classifier"):
        batch = torch.randint(len(images), (batch_size,))
        dx, dy = torch.randint(5, (2,)).tolist()
        x = scale(padded[batch, dy : dy + 28, dx : dx + 28])
        F.cross_entropy(net(x), labels[batch], label_smoothing=0.05).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return net


def scale(images: Tensor) -> Tensor:
    """From grey levels (B, 28, 28) to (B, 1, 28, 28) in [-1, 1]."""
    return from_uint8(images[:, None])


@torch.inference_mode()
def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of the images that the classifier reads as their label."""
    read = torch.cat([net(scale(batch)).argmax(1) for batch in images.split(500)])
    return (read == labels).double().mean().item()


def main() -> None:
    """Train or load the classifier, then read the digits of each way of sampling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    options = parser.parse_args()
    mnist.prepare(options.data_dir)
    checkpoint = options.checkpoint or newest_checkpoint()
    flow, _ = load(checkpoint)
    if WEIGHTS.is_file():
        classifier = build()
        classifier.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    else:
        classifier = train(options.data_dir)
        WEIGHTS.parent.mkdir(exist_ok=True)
        torch.save(classifier.state_dict(), WEIGHTS)
    classifier.eval()
    print(f"classifier on the 10,000 test images: {accuracy(classifier, *mnist.load(options.data_dir, 'test')):.4f}")
    print(f"{checkpoint}, {options.count} digits each, seed {options.seed}")
    labels = torch.arange(options.count) % 10
    for way in WAYS:
        started = time.perf_counter()
        digits = generate(flow, labels, way, seed=options.seed)
        seconds = time.perf_counter() - started
        print(
            f"{way.solver:9} {way.steps:2} steps, guidance {way.guidance}: label accuracy "
            f"{accuracy(classifier, digits.values, labels):.4f}  (NFE {digits.evaluations}, {seconds:.0f} s)"
        )


if __name__ == "__main__":
    with exit_on_error():
        main()
