"""The evaluator's two small classifiers of digits. Their designs are as different as possible.

Samples are measured in the space of each classifier's penultimate features. A result that both spaces show is a property of the
samples, not of a classifier. Neither classifier is part of a model: no run trains against one, averages it, or keeps it in a
checkpoint. `python -m flowmatch_mnist.digitnet --net NAME` trains one of them again.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from flowmatch_mnist.images.pixels import PIXELS
from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.support.files import load_weights

WEIGHTS_FOLDER = Path(__file__).parents[1] / "weights"
"""The folder of the weights in the package."""


class Classifier(nn.Module):
    """A classifier of digits: images uint8 (B, 28, 28) -> logits float32 (B, 10).

    Args:
        body: a network from images float32 (B, 1, 28, 28) in [-1, 1] to features (B, num_features).

    Attributes:
        num_features: the number of features of the penultimate layer.
    """

    num_features = 128

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(self.num_features, 10)

    def features(self, images: Tensor) -> Tensor:
        """Return the penultimate features: images uint8 (B, 28, 28) -> float32 (B, num_features)."""
        features: Tensor = self.body(PIXELS["linear"].encode(images))
        return features

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def layer(channels: int, out_channels: int) -> nn.Sequential:
    """Return a convolution with batch normalisation and ReLU: (B, channels, H, W) -> (B, out_channels, H, W)."""
    return nn.Sequential(nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU())


class DigitNet(Classifier):
    """The first classifier: a plain stack of convolutions with batch normalisation. Its features depend on positions."""

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(
                layer(1, 32),
                nn.MaxPool2d(2),
                layer(32, 64),
                layer(64, 64),
                nn.MaxPool2d(2),
                layer(64, 96),
                nn.AvgPool2d(3, stride=2),  # 7x7 to 3x3; Apple's GPUs have no adaptive pooling for these sizes
                nn.Flatten(),
                nn.Linear(96 * 9, self.num_features),
                nn.ReLU(),
            )
        )


class Residual(nn.Module):
    """Adds the output of two convolutions to its input (B, C, H, W). At first it adds 0, so it needs no normalisation.

    Source: Bachlechner et al. 2020, "ReZero is All You Need: Fast Convergence at Large Depth", equation 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.change = nn.Sequential(nn.SiLU(), first, nn.SiLU(), second)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.change(x)


class ResNet(Classifier):
    """The second classifier: strides instead of pooling, residual blocks without normalisation.

    Its features are averaged over all positions.
    """

    def __init__(self) -> None:
        super().__init__(
            nn.Sequential(
                nn.Conv2d(1, 32, 5, stride=2, padding=2),
                nn.SiLU(),
                nn.Conv2d(32, 64, 3, stride=2, padding=1),
                Residual(64),
                Residual(64),
                nn.SiLU(),
                nn.Conv2d(64, self.num_features, 1),
                nn.SiLU(),
                nn.AvgPool2d(7),
                nn.Flatten(),
            )
        )


CLASSIFIERS: dict[str, Callable[[], Classifier]] = {"digitnet": DigitNet, "resnet": ResNet}
"""The classifiers, by the names of their files."""


def weights_of(name: str) -> Path:
    """Return the path of a classifier's weights."""
    return WEIGHTS_FOLDER / f"{name}.safetensors"


def metadata_of(name: str) -> dict[str, str]:
    """Return the metadata in a classifier's file: how it was trained, and the baseline of real digits.

    Raises:
        UserError: if the file is missing or damaged.
    """
    return load_weights(weights_of(name))[1]


def load_classifier(name: str) -> Classifier:
    """Return a classifier with the weights in the package, ready for measurements, on the CPU.

    Raises:
        UserError: if the file is missing or damaged.
    """
    net, path = CLASSIFIERS[name](), weights_of(name)
    try:
        net.load_state_dict(load_weights(path)[0])
    except (UserError, RuntimeError) as error:
        raise UserError(
            f"cannot read {path}: the file is missing or damaged; install the package again, or train the classifier "
            f"with `python -m flowmatch_mnist.digitnet --net {name}`"
        ) from error
    # The channels-last format makes it twice as fast on a CPU.
    return net.to(memory_format=torch.channels_last).eval().requires_grad_(False)
