"""The evaluator's eye: a small classifier of digits. Its penultimate features are the space in which samples are measured.

It is no part of the model: no run trains it, averages it, or keeps it in a checkpoint. `python -m flowmatch_mnist.digitnet`
trains it.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from flowmatch_mnist.images.pixels import PIXELS
from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.support.files import load_weights

WEIGHTS = Path(__file__).parents[1] / "weights" / "digitnet.safetensors"


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
            nn.AvgPool2d(3, stride=2),  # 7x7 to 3x3; Apple's GPUs have no adaptive pooling of such sizes
            nn.Flatten(),
            nn.Linear(96 * 9, self.num_features),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.num_features, 10)

    def features(self, images: Tensor) -> Tensor:
        """The penultimate features: images uint8 (B, 28, 28) -> float32 (B, num_features)."""
        features: Tensor = self.body(PIXELS["linear"].encode(images))
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
    # Channels last, it is twice as fast on a processor.
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)
