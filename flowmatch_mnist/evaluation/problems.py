"""What a problem's samples are, how they are shown, and how they are scored: MNIST's digits, and other images like them."""

from collections.abc import Callable

import torch
from torch import Tensor

from flowmatch_mnist.evaluation.copies import Copies
from flowmatch_mnist.evaluation.estimates import Measurement
from flowmatch_mnist.evaluation.evaluator import Evaluator
from flowmatch_mnist.evaluation.metrics import read_digits
from flowmatch_mnist.evaluation.readers import READERS, reader
from flowmatch_mnist.images.pictures import grid
from flowmatch_mnist.images.pixels import PixelsName
from flowmatch_mnist.sampling.generate import Samples
from flowmatch_mnist.sampling.units import UNITS, Units

Labelled = tuple[Tensor, Tensor]
"""Data (N, ...) in their units, and labels int64 (N,)."""

Scorer = Callable[[Samples], list[Measurement]]
"""Scores samples; the first measurements are the most telling."""


def labels_like(real: Tensor, count: int) -> Tensor:
    """Labels (count,) in the proportions of the real ones (N,), in order; of N, as many of each class as there are."""
    places = (torch.arange(count) + 0.5) * len(real) / count
    return real.sort().values[places.long()]


class Problem:
    """What is to be learned, apart from how. Callbacks ask it what to show and what to measure.

    Attributes:
        shape: of one sample, as the network sees it.
        classes: how many classes there are.
        units: what the numbers of a sample mean.
        kind: what the samples are, in the plural.
        headlines: the tags of the measurements to look at first.
    """

    shape: tuple[int, ...]
    classes: int
    units: Units
    kind: str
    headlines: tuple[str, ...] = ()

    def pictures(self, samples: Samples) -> dict[str, Tensor]:
        """Pictures uint8 (H, W) or (H, W, 3) by name; of the trajectories too, where the samples came with their states."""
        raise NotImplementedError

    def scorer(self, held_out: Labelled, training: Labelled, device: torch.device) -> Scorer:
        """What scores samples beside held-out and training data. One process asks for it; the device is its own."""
        raise NotImplementedError


class OtherImages(Problem):
    """Images of 28 by 28 grey levels in ten classes, such as Fashion-MNIST.

    The evaluator's classifier reads digits alone. So these are only held against copies of training images.

    Args:
        pixels: the scale of the grey levels: linear, from -1 to 1, or logit.
    """

    shape = (1, 28, 28)
    classes = 10
    kind = "images"

    def __init__(self, pixels: PixelsName = "linear") -> None:
        self.units = UNITS[pixels]

    def pictures(self, samples: Samples) -> dict[str, Tensor]:
        """A grid with a column for each class, and, with the states, a strip from noise to image, a row for each class."""
        pictures = {"grid": grid(samples.values, columns=self.classes, marked=self.misread(samples))}
        if samples.states is None:
            return pictures
        first_row = samples.states[:, : self.classes]  # (steps + 1, classes, H, W)
        # Some ten of the states are enough to see the trajectory.
        shown = first_row[torch.linspace(0, len(first_row) - 1, min(len(first_row), 11)).round().long()]
        return pictures | {"trajectory": grid(shown.transpose(0, 1).flatten(0, 1), columns=len(shown))}

    def misread(self, samples: Samples) -> Tensor | None:
        """Which samples the evaluator reads as something else than their label, bool (N,); None if it cannot read them."""
        return None

    def scorer(self, held_out: Labelled, training: Labelled, device: torch.device) -> Scorer:
        """What tells whether samples are copies of training images."""
        copies = Copies(held_out[0], training[0], device)
        return lambda samples: copies.measure(samples.values)


class Digits(OtherImages):
    """MNIST's digits, which the evaluator can read: pictures mark those that it misreads. Its argument is as above."""

    headlines = tuple(f"quality/{title}" for title in ("Frechet distance ratio", "label accuracy", "precision", "recall"))

    def misread(self, samples: Samples) -> Tensor:
        """By the first of the evaluator's classifiers."""
        _, digits = read_digits(reader(next(iter(READERS))), samples.values)
        return (digits != samples.labels) & (samples.labels < self.classes)

    def scorer(self, held_out: Labelled, training: Labelled, device: torch.device) -> Scorer:
        """The evaluator: see `evaluator.Evaluator`."""
        evaluator = Evaluator(held_out, training, device)
        return lambda samples: evaluator.measure(samples.values, samples.labels)
