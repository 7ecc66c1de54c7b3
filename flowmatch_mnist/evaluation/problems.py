"""Problems: what samples are, how to show them and how to score them. MNIST's digits, and other images in their format."""

from collections.abc import Callable

import torch
from torch import Tensor

from flowmatch_mnist.evaluation.classifiers import CLASSIFIERS, load_classifier
from flowmatch_mnist.evaluation.copies import Copies
from flowmatch_mnist.evaluation.estimates import Measurement
from flowmatch_mnist.evaluation.evaluator import Evaluator
from flowmatch_mnist.evaluation.metrics import classify
from flowmatch_mnist.images.pictures import grid
from flowmatch_mnist.images.pixels import PixelsName
from flowmatch_mnist.sampling.generate import Samples
from flowmatch_mnist.sampling.units import UNITS, Units

Labelled = tuple[Tensor, Tensor]
"""Data (N, ...) in their units, and labels int64 (N,)."""

Scorer = Callable[[Samples], list[Measurement]]
"""A function that scores samples. The most important measurements come first."""


def labels_like(real: Tensor, count: int) -> Tensor:
    """Return sorted labels (count,) in the proportions of the real labels (N,).

    If count is N, each class has as many labels as among the real ones.
    """
    places = (torch.arange(count) + 0.5) * len(real) / count
    return real.sort().values[places.long()]


class Problem:
    """The task that a flow learns, independent of the method. It tells callbacks what to show and what to measure.

    Attributes:
        shape: the shape of one sample as the network's input.
        classes: the number of classes.
        units: the meaning of the numbers in a sample.
        kind: a plural noun for the samples, such as "images".
        headlines: TensorBoard tags of the measurements to look at first.
    """

    shape: tuple[int, ...]
    classes: int
    units: Units
    kind: str
    headlines: tuple[str, ...] = ()

    def pictures(self, samples: Samples) -> dict[str, Tensor]:
        """Return pictures uint8 (H, W) or (H, W, 3), by name. If the samples have states, show their trajectories too."""
        raise NotImplementedError

    def scorer(self, held_out: Labelled, training: Labelled, device: torch.device) -> Scorer:
        """Return a function that scores samples, compared with held-out and training data.

        Only one process calls this, with its own device.
        """
        raise NotImplementedError


class OtherImages(Problem):
    """Images of 28 by 28 grey levels in ten classes, such as Fashion-MNIST.

    The evaluator's classifiers read only digits. So these images are only checked for copies of training images.

    Args:
        pixels: the scale of the grey levels: linear, from -1 to 1, or logit.
    """

    shape = (1, 28, 28)
    classes = 10
    kind = "images"

    def __init__(self, pixels: PixelsName = "linear") -> None:
        self.units = UNITS[pixels]

    def pictures(self, samples: Samples) -> dict[str, Tensor]:
        """Return a grid with one column for each class.

        If the samples have states, also return a strip from noise to image, with one row for each class.
        """
        pictures = {"grid": grid(samples.values, columns=self.classes, marked=self.misread(samples))}
        if samples.states is None:
            return pictures
        first_row = samples.states[:, : self.classes]  # (steps + 1, classes, H, W)
        # About ten of the states are enough to see the trajectory.
        shown = first_row[torch.linspace(0, len(first_row) - 1, min(len(first_row), 11)).round().long()]
        return pictures | {"trajectory": grid(shown.transpose(0, 1).flatten(0, 1), columns=len(shown))}

    def misread(self, samples: Samples) -> Tensor | None:
        """Return which samples the evaluator does not read as their label, bool (N,), or None if it cannot read them."""
        return None

    def scorer(self, held_out: Labelled, training: Labelled, device: torch.device) -> Scorer:
        """Return a function that checks samples for copies of training images."""
        copies = Copies(held_out[0], training[0], device)
        return lambda samples: copies.measure(samples.values)


class Digits(OtherImages):
    """MNIST's digits. The evaluator can read them, so pictures mark misread digits. The argument is that of `OtherImages`."""

    headlines = tuple(f"quality/{title}" for title in ("Frechet distance ratio", "label accuracy", "precision", "recall"))

    def misread(self, samples: Samples) -> Tensor:
        """Return which samples with a class are misread by the evaluator's first classifier, bool (N,)."""
        _, digits = classify(load_classifier(next(iter(CLASSIFIERS))), samples.values)
        return (digits != samples.labels) & (samples.labels < self.classes)

    def scorer(self, held_out: Labelled, training: Labelled, device: torch.device) -> Scorer:
        """Return a function that measures samples with `evaluator.Evaluator`."""
        evaluator = Evaluator(held_out, training, device)
        return lambda samples: evaluator.measure(samples.values, samples.labels)
