"""The ruler: how near drawn digits are to real ones, beside what real digits themselves would get.

All but the near copies are measured on the penultimate features of `digitnet`, and by torchmetrics where it has the measure.

Sources: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", equation 6 (Fréchet distance); Binkowski et al.
2018, "Demystifying MMD GANs", section 4 (kernel distance); Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for
Assessing Generative Models", section 3.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from flowmatch_mnist import streams
from flowmatch_mnist.digitnet import DigitNet, digitnet
from flowmatch_mnist.errors import UserError

CHUNK = 1000
"""How many images are looked at, or have their distances taken, at a time."""

COPIES_AMONG = 2000
"""Of how many held-out images the distances to the training images are taken: that is what costs most."""


@dataclass(frozen=True)
class Figure:
    """One measure of samples.

    Attributes:
        name: of the measure; what stands before a slash is the group that it is shown in.
        value: of the samples.
        real: what real data get in their place.
        ratio: whether it is the ratio of the two that tells.
    """

    name: str
    value: float
    real: float
    ratio: bool = False

    @property
    def main(self) -> bool:
        """Whether it belongs to no group of details."""
        return "/" not in self.name

    @property
    def tag(self) -> str:
        """Its place in TensorBoard."""
        return f"quality/{self.title}" if self.main else f"quality_details/{self.name.replace('/', ' ')}"

    @property
    def title(self) -> str:
        """What `telling` is called."""
        return f"{self.name} ratio" if self.ratio else self.name

    @property
    def telling(self) -> float:
        """The one number to watch: the value, or its ratio to that of real data."""
        return self.value / self.real if self.ratio else self.value


class Features(nn.Module):
    """Stands where torchmetrics expects a network, for features that were taken already."""

    num_features = DigitNet.num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the features' means and covariances: float64 (N, D), (M, D)."""
    metric = FrechetInceptionDistance(Features(), sync_on_compute=False)
    metric.update(first, real=True)
    metric.update(second, real=False)
    # Of two equal sets it may come out a rounding error below zero.
    return max(0.0, metric.compute().item())


def kernel_distance(first: Tensor, second: Tensor, subset_size: int = 1000) -> float:
    """The squared maximum mean discrepancy under a cubic kernel, unbiased, so below zero at times: float64 (N, D), (M, D).

    The mean over 30 subsets of that size, or of as many as there are; always the same ones.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer.*")
        torch.manual_seed(0)  # of the subsets
        size = min(subset_size, len(first), len(second))
        metric = KernelInceptionDistance(Features(), subsets=30, subset_size=size, sync_on_compute=False)
        metric.update(first, real=True)
        metric.update(second, real=False)
        return metric.compute()[0].item()


def label_accuracy(read: Tensor, labels: Tensor) -> tuple[float, list[float]]:
    """The share of digits read as their labels, over all and for each digit (NaN for one that is absent): int64 (N,), (N,)."""
    overall = MulticlassAccuracy(10, average="micro", sync_on_compute=False).to(labels.device)
    each = MulticlassAccuracy(10, average="none", sync_on_compute=False).to(labels.device)
    present = torch.bincount(labels, minlength=10) > 0
    by_digit = torch.where(present, each(read, labels), torch.nan)
    return overall(read, labels).item(), by_digit.tolist()


def _nearest(from_: Tensor, to: Tensor, rank: int = 1) -> Tensor:
    """The distance from each of (N, D) to its nearest, or rank-th nearest, of (M, D): (N,)."""
    return torch.cat([torch.cdist(some, to).topk(rank, largest=False).values[:, -1] for some in from_.split(CHUNK)])


class Manifold:
    """Where a set of points lies: the union of balls around them, each reaching to the third nearest other point.

    Args:
        points: (N, D).
        neighbours: to which of the nearest a ball reaches.
    """

    def __init__(self, points: Tensor, neighbours: int = 3) -> None:
        self.points = points
        # The nearest point is the point itself, which does not count.
        self.radii = _nearest(points, points, min(neighbours + 1, len(points)))

    def share(self, points: Tensor) -> float:
        """The share of other points (M, D) that lies on it: of samples on real data, precision; the other way, recall."""
        inside = [(torch.cdist(some, self.points) <= self.radii).any(1) for some in points.split(CHUNK)]
        return torch.cat(inside).double().mean().item()


class Copies:
    """Tells copies of training images: by how near images are to the nearest of them, beside how near held-out ones are.

    Args:
        held_out: images uint8 (M, H, W).
        training: images uint8 (N, H, W).
        device: where to measure.
    """

    def __init__(self, held_out: Tensor, training: Tensor, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.training = self._flat(training)
        order = torch.randperm(len(held_out), generator=streams.generator("cpu", "near copies"))
        self.distances = _nearest(self._flat(held_out[order[:COPIES_AMONG]]), self.training)

    def measure(self, images: Tensor) -> list[Figure]:
        """The distance to the nearest training image, and the share that is nearer than one in a hundred held-out ones is."""
        distances = _nearest(self._flat(images), self.training)
        limit = torch.quantile(self.distances, 0.01)
        near, really_near = ((some < limit).double().mean().item() for some in (distances, self.distances))
        return [
            Figure("distance to nearest training image", distances.median().item(), self.distances.median().item()),
            Figure("near copies", near, really_near),
        ]

    def _flat(self, images: Tensor) -> Tensor:
        """Images as points whose distance is the root mean square of the pixels' differences, 0 to 1: (N, H W)."""
        return images.flatten(1).to(self.device).float() / (255 * images[0].numel() ** 0.5)


class Ruler:
    """Measures digits beside real ones that were held out.

    What real data get is, for distances, precision and recall, what as many real training images of the same digits get in the
    place of the samples; for label accuracy and near copies, what the held-out images themselves get.

    Args:
        held_out: images uint8 (M, 28, 28) and their labels (M,), to compare with.
        training: images uint8 (N, 28, 28) and their labels (N,), that the model was trained on.
        device: where to measure.

    Raises:
        UserError: if fewer than 10 images are held out.
    """

    def __init__(
        self, held_out: tuple[Tensor, Tensor], training: tuple[Tensor, Tensor], device: torch.device | str = "cpu"
    ) -> None:
        if len(held_out[0]) < 10:
            raise UserError(f"{len(held_out[0])} held-out images are too few to measure samples beside; raise val_size")
        self.device = torch.device(device)
        self.net = digitnet().to(self.device)
        self.training, self.training_labels = training
        images, labels = held_out
        self.features, read = self.look(images)
        self.manifold = Manifold(self.features)
        self.accuracy, self.accuracy_by_digit = label_accuracy(read.cpu(), labels)
        self.copies = Copies(images, self.training, device)
        self._floors: dict[tuple[int, ...], list[float]] = {}

    @torch.inference_mode()
    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features, float64 (N, D), of images uint8 (N, 28, 28), and the digits read in them, int64 (N,)."""
        features = torch.cat([self.net.features(some.to(self.device)) for some in images.split(CHUNK)])
        return features.double(), self.net.head(features).argmax(1)

    def measure(self, images: Tensor, labels: Tensor) -> list[Figure]:
        """All figures of digits uint8 (N, 28, 28) drawn for labels int64 (N,), N at least 2.

        Raises:
            UserError: if there are fewer training images of a digit than samples.
        """
        floor = self._floor(labels)
        features, read = self.look(images)
        accuracy, by_digit = label_accuracy(read.cpu(), labels)
        names = ("Frechet distance", "precision", "recall", "kernel distance")
        beside_training = zip(names, self._compare(features), floor, strict=True)
        return [
            Figure("label accuracy", accuracy, self.accuracy),
            *(Figure(name, value, real, ratio=name == "Frechet distance") for name, value, real in beside_training),
            *self.copies.measure(images),
            *(
                Figure(f"label accuracy by digit/{digit}", value, real)
                for digit, (value, real) in enumerate(zip(by_digit, self.accuracy_by_digit, strict=True))
                if not math.isnan(value)
            ),
        ]

    def _compare(self, features: Tensor) -> list[float]:
        return [
            frechet_distance(self.features, features),
            self.manifold.share(features),
            Manifold(features).share(self.features),
            kernel_distance(self.features, features),
        ]

    def _floor(self, labels: Tensor) -> list[float]:
        """What real training images, as many of each digit as were drawn, get."""
        counts = tuple(torch.bincount(labels, minlength=10).tolist())
        if counts not in self._floors:
            order = torch.randperm(len(self.training), generator=streams.generator("cpu", "floor"))
            by_digit = [order[self.training_labels[order] == digit][:count] for digit, count in enumerate(counts)]
            if tuple(map(len, by_digit)) != counts:
                raise UserError(
                    f"{len(labels)} samples are more than there are training images of each digit to compare with; draw fewer"
                )
            self._floors[counts] = self._compare(self.look(self.training[torch.cat(by_digit)])[0])
        return self._floors[counts]


def table(figures: Sequence[Figure]) -> str:
    """The figures as lines: what, the samples' value, what real data get, and their ratio where it tells."""
    lines = [f"{'':36}{'samples':>10}{'real data':>11}{'ratio':>8}"]
    for figure in figures:
        ratio = f"{figure.telling:8.2f}" if figure.ratio else ""
        lines.append(f"{figure.name.replace('/', ' '):36}{figure.value:10.4f}{figure.real:11.4f}{ratio}")
    return "\n".join(lines)
