"""The evaluator: all measures of drawn digits. Each has a baseline: real digits, scored in the same way."""

import json
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from flowmatch_mnist.evaluation.classifiers import CLASSIFIERS, Classifier, load_classifier, metadata_of
from flowmatch_mnist.evaluation.copies import Copies
from flowmatch_mnist.evaluation.estimates import Estimate, Measurement, mean, share
from flowmatch_mnist.evaluation.metrics import FrechetDistance, Manifold, classify
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.errors import UserError

DRAWS = 10
"""Number of draws of real training digits. The baseline of Fréchet distance, precision and recall is the mean over them."""


def draw_like(labels: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Draw training images, as many of each digit as in `counts`: labels (N,) -> indices int64 (DRAWS, sum of counts).

    Raises:
        UserError: if there are too few training images of a digit.
    """
    draws = []
    for number in range(DRAWS):
        order = torch.randperm(len(labels), generator=streams.generator("cpu", "baseline", number))
        draws.append(torch.cat([order[labels[order] == digit][:count] for digit, count in enumerate(counts)]))
    if len(draws[0]) < sum(counts):
        raise UserError(
            f"{sum(counts)} samples are too many: the training set has fewer images of some digit; draw fewer samples"
        )
    return torch.stack(draws)


def counts_of(labels: Tensor) -> tuple[int, ...]:
    """Return the number of labels of each digit: labels (N,) -> 10 counts."""
    return tuple(torch.bincount(labels, minlength=10).tolist())


def fingerprint(images: Tensor) -> int:
    """Return a checksum that distinguishes this set of images uint8 (N, 28, 28) from others."""
    return zlib.crc32(images.cpu().numpy().tobytes())


class ClassifierMetrics:
    """The measures that use one classifier.

    Args:
        net: the classifier, on the device where it should run.
        held_out: images uint8 (M, 28, 28) and their labels (M,), to compare with.

    Attributes:
        right: which held-out images the classifier reads as their labels, bool (M,).
    """

    def __init__(self, net: Classifier, held_out: tuple[Tensor, Tensor]) -> None:
        self.net = net
        images, labels = held_out
        features, digits = classify(self.net, images)
        self.right = digits == labels
        self.frechet = FrechetDistance(features)
        self.manifold = Manifold(features.float())

    def baseline(self, images: Tensor, draws: Tensor) -> list[Estimate]:
        """Return Fréchet distance, precision and recall of real images: means over `draws`, indices of images (DRAWS, N)."""
        read, where = draws.unique(return_inverse=True)
        features, _ = classify(self.net, images[read])
        scores = []
        for some in where:
            drawn = features[some]
            shared = Manifold(drawn.float()).shared_with(self.manifold)
            scores.append([self.frechet(drawn), *(those.double().mean().item() for those in shared)])
        return [mean(each) for each in torch.tensor(scores).T]

    def measure(self, images: Tensor, labels: Tensor, baseline: list[Estimate]) -> tuple[list[Measurement], Tensor]:
        """Return the measurements of images uint8 (N, 28, 28) for labels (N,), the most important first.

        The second result is which images are read as their labels, bool (N,).
        """
        features, digits = classify(self.net, images)
        right = digits == labels
        precise, recalled = Manifold(features.float()).shared_with(self.manifold)
        distance, precision, recall = baseline
        return [
            Measurement("label accuracy", share(right), share(self.right)),
            Measurement("Frechet distance", self.frechet.estimate(features), distance, ratio=True),
            Measurement("precision", share(precise), precision),
            Measurement("recall", share(recalled), recall),
        ], right


class Evaluator:
    """Compares drawn digits with held-out real digits, with each of the two classifiers.

    The baseline of Fréchet distance, precision and recall is the mean over ten draws of real training digits. Each draw has as
    many digits of each class as the samples. The classifiers' files store this baseline for one case: the held-out images are
    the official test images, and the samples have as many digits of each class. All other baselines come from the held-out
    images: label accuracy, distance to the nearest training image, and near copies.

    Args:
        held_out: images uint8 (M, 28, 28) and their labels (M,), to compare with.
        training: images uint8 (N, 28, 28) and their labels (N,), on which the model was trained.
        device: the device that runs the classifiers and computes distances to training images.

    Raises:
        UserError: if fewer than 10 images are held out.
    """

    def __init__(
        self, held_out: tuple[Tensor, Tensor], training: tuple[Tensor, Tensor], device: torch.device | str = "cpu"
    ) -> None:
        if len(held_out[0]) < 10:
            raise UserError(f"{len(held_out[0])} held-out images are too few to compare samples with; raise val_size")
        images, self.labels = held_out
        self.training, self.training_labels = training
        self.metrics = {name: ClassifierMetrics(load_classifier(name).to(device), held_out) for name in CLASSIFIERS}
        self.copies = Copies(images, self.training, device)
        self._baselines: dict[tuple[int, ...], dict[str, list[Estimate]]] = {}
        known = {name: json.loads(metadata_of(name).get("real digits", "{}")) for name in CLASSIFIERS}
        if all(baseline.get("beside") == fingerprint(images) for baseline in known.values()):
            self._baselines[counts_of(self.labels)] = {
                name: [Estimate(*estimate) for estimate in baseline["scores"]] for name, baseline in known.items()
            }

    def measure(self, images: Tensor, labels: Tensor) -> list[Measurement]:
        """Return all measurements of digits uint8 (N, 28, 28) that were drawn for labels int64 (N,), N at least 2.

        Raises:
            UserError: if a digit has fewer training images than samples.
        """
        counts = counts_of(labels)
        if counts not in self._baselines:
            draws = draw_like(self.training_labels, counts)
            self._baselines[counts] = {name: metrics.baseline(self.training, draws) for name, metrics in self.metrics.items()}
        results = {
            name: metrics.measure(images, labels, self._baselines[counts][name]) for name, metrics in self.metrics.items()
        }
        first, *others = results
        measurements, right = results[first]
        found = [*measurements, *self.copies.measure(images)]
        for other in others:
            found += [Measurement(f"{other}/{m.name}", m.samples, m.real, m.ratio) for m in results[other][0]]
        return [*found, *self._by_digit(labels, right, self.metrics[first].right)]

    def _by_digit(self, labels: Tensor, right: Tensor, really_right: Tensor) -> Iterator[Measurement]:
        """Yield the label accuracy of each digit that was drawn."""
        for digit in labels.unique().tolist():
            drawn, real = right[labels == digit], really_right[self.labels == digit]
            if len(real):
                yield Measurement(f"label accuracy by digit/{digit}", share(drawn), share(real))
