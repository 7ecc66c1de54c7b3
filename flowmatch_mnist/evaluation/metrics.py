"""How near drawn digits are to real ones, beside a baseline: what real digits get when they are scored in the same way.

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

from flowmatch_mnist.evaluation.digitnet import DigitNet, digitnet
from flowmatch_mnist.sampling.generate import default_batch_size
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.devices import full_float32
from flowmatch_mnist.support.errors import UserError

CHUNK = 1000
"""How many images have their distances taken at a time."""

COPIES_AMONG = 2000
"""Of how many held-out images the distances to the training images are taken: that is what costs most."""


@dataclass(frozen=True)
class Measurement:
    """One measure of samples.

    Attributes:
        name: of the measure; what stands before a slash is the group that it is shown in.
        value: of the samples.
        baseline: of real data, scored in the same way.
        ratio: whether the measure is read as `value / baseline`.
    """

    name: str
    value: float
    baseline: float
    ratio: bool = False

    @property
    def main(self) -> bool:
        """Whether it belongs to no group of details."""
        return "/" not in self.name

    @property
    def tag(self) -> str:
        """Its name in TensorBoard."""
        return f"quality/{self.title}" if self.main else f"quality_details/{self.name.replace('/', ' ')}"

    @property
    def title(self) -> str:
        """The name of `score`."""
        return f"{self.name} ratio" if self.ratio else self.name

    @property
    def score(self) -> float:
        """The one number to watch: the value, or its ratio to the baseline."""
        return self.value / self.baseline if self.ratio else self.value


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


def label_accuracy(digits: Tensor, labels: Tensor) -> tuple[float, list[float]]:
    """The share of digits (N,) that were read as their labels (N,), over all and for each digit; NaN for one that is absent."""
    overall = MulticlassAccuracy(10, average="micro", sync_on_compute=False)
    each = MulticlassAccuracy(10, average="none", sync_on_compute=False)
    present = torch.bincount(labels, minlength=10) > 0
    by_digit = torch.where(present, each(digits, labels), torch.nan)
    return overall(digits, labels).item(), by_digit.tolist()


@torch.inference_mode()
@full_float32()
def read_digits(net: DigitNet, images: Tensor) -> tuple[Tensor, Tensor]:
    """The features, float64 (N, D), of images uint8 (N, 28, 28), and the digits read in them, int64 (N,); both on the CPU.

    The net may be anywhere. What is measured on the features is measured on the CPU, where there is float64.
    """
    device = net.head.weight.device
    features = torch.cat([net.features(some.to(device)) for some in images.split(default_batch_size(device))])
    return features.cpu().double(), net.head(features).argmax(1).cpu()


@full_float32()
def _nearest(from_: Tensor, to: Tensor, rank: int = 1) -> Tensor:
    """The distance from each of (N, D) to its nearest, or rank-th nearest, of (M, D): (N,), on the CPU."""
    distances = torch.cat([torch.cdist(some, to).topk(rank, largest=False).values[:, -1] for some in from_.split(CHUNK)])
    return distances.cpu()


class Manifold:
    """Where a set of points on the CPU lies: the union of balls around them, each reaching to the third nearest other point.

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

    def measure(self, images: Tensor) -> list[Measurement]:
        """The distance to the nearest training image, and the share that is nearer than one in a hundred held-out ones is."""
        distances = _nearest(self._flat(images), self.training)
        limit = torch.quantile(self.distances, 0.01)
        near, really_near = ((some < limit).double().mean().item() for some in (distances, self.distances))
        return [
            Measurement("distance to nearest training image", distances.median().item(), self.distances.median().item()),
            Measurement("near copies", near, really_near),
        ]

    def _flat(self, images: Tensor) -> Tensor:
        """Images as points whose distance is the root mean square of the pixels' differences, 0 to 1: (N, H W)."""
        return images.flatten(1).to(self.device).float() / (255 * images[0].numel() ** 0.5)


class Evaluator:
    """Measures digits beside real ones that were held out.

    The baseline of distances, precision and recall is that of as many real training digits of each class. The baseline of label
    accuracy and near copies is that of the held-out images.

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
        self.net = digitnet().to(device)
        self.training, self.training_labels = training
        images, labels = held_out
        self.features, digits = read_digits(self.net, images)
        self.manifold = Manifold(self.features)
        self.accuracy, self.accuracy_by_digit = label_accuracy(digits, labels)
        self.copies = Copies(images, self.training, device)
        self._baselines: dict[tuple[int, ...], list[float]] = {}

    def measure(self, images: Tensor, labels: Tensor) -> list[Measurement]:
        """All measures of digits uint8 (N, 28, 28) drawn for labels int64 (N,), N at least 2.

        Raises:
            UserError: if there are fewer training images of a digit than samples.
        """
        baseline = self._baseline(labels)
        features, digits = read_digits(self.net, images)
        accuracy, by_digit = label_accuracy(digits, labels)
        names = ("Frechet distance", "precision", "recall", "kernel distance")
        compared = zip(names, self._compare(features), baseline, strict=True)
        return [
            Measurement("label accuracy", accuracy, self.accuracy),
            *(Measurement(name, value, real, ratio=name == "Frechet distance") for name, value, real in compared),
            *self.copies.measure(images),
            *(
                Measurement(f"label accuracy by digit/{digit}", value, real)
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

    def _baseline(self, labels: Tensor) -> list[float]:
        """The scores of real training images, as many of each digit as were drawn."""
        counts = tuple(torch.bincount(labels, minlength=10).tolist())
        if counts not in self._baselines:
            order = torch.randperm(len(self.training), generator=streams.generator("cpu", "floor"))
            by_digit = [order[self.training_labels[order] == digit][:count] for digit, count in enumerate(counts)]
            if tuple(map(len, by_digit)) != counts:
                raise UserError(
                    f"{len(labels)} samples are more than there are training images of each digit to compare with; draw fewer"
                )
            self._baselines[counts] = self._compare(read_digits(self.net, self.training[torch.cat(by_digit)])[0])
        return self._baselines[counts]


def table(measurements: Sequence[Measurement]) -> str:
    """The measurements as lines: the name, the samples' value, the baseline, and their ratio where that is the score."""
    lines = [f"{'':36}{'samples':>10}{'real data':>11}{'ratio':>8}"]
    for m in measurements:
        ratio = f"{m.score:8.2f}" if m.ratio else ""
        lines.append(f"{m.name.replace('/', ' '):36}{m.value:10.4f}{m.baseline:11.4f}{ratio}")
    return "\n".join(lines)
