"""How near drawn digits are to real ones: distances between features of both, as a classifier of `readers` sees them.

Sources: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", equation 6 (Fréchet distance); Kynkäänniemi et al.
2019, "Improved Precision and Recall Metric for Assessing Generative Models", section 3.
"""

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from flowmatch_mnist.evaluation.estimates import Estimate
from flowmatch_mnist.evaluation.readers import Reader
from flowmatch_mnist.sampling.generate import default_batch_size
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.devices import full_float32

CHUNK = 1000
"""How many points have their distances taken at a time."""

RESAMPLES = 20
"""From how many samples of the samples the error of a Fréchet distance is taken: itself known to a sixth."""


@torch.inference_mode()
@full_float32()
def read_digits(net: Reader, images: Tensor) -> tuple[Tensor, Tensor]:
    """The features, float64 (N, D), of images uint8 (N, 28, 28), and the digits read in them, int64 (N,); both on the CPU.

    The net may be anywhere. What is measured on the features is measured on the CPU, where there is float64.
    """
    device = net.head.weight.device
    features = torch.cat([net.features(some.to(device)) for some in images.split(default_batch_size(device))])
    return features.cpu().double(), net.head(features).argmax(1).cpu()


class Features(nn.Module):
    """Stands where torchmetrics expects a network, for features that were taken already."""

    num_features = Reader.num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class FrechetDistance:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of the means and covariances of features and of real ones.

    Args:
        real: features float64 (M, D).
    """

    def __init__(self, real: Tensor) -> None:
        self._metric = FrechetInceptionDistance(Features(), reset_real_features=False, sync_on_compute=False)
        self._metric.update(real, real=True)

    def __call__(self, features: Tensor) -> float:
        """The distance of features float64 (N, D)."""
        self._metric.reset()
        self._metric.update(features, real=False)
        # Of two equal sets it may come out a rounding error below zero.
        return max(0.0, self._metric.compute().item())

    def estimate(self, features: Tensor) -> Estimate:
        """The distance with its error: how far those of as many, drawn anew from the features, scatter.

        Source: Efron 1979, "Bootstrap Methods: Another Look at the Jackknife".
        """
        dice = streams.generator("cpu", "resamples")
        again = [torch.randint(len(features), (len(features),), generator=dice) for _ in range(RESAMPLES)]
        scatter = torch.tensor([self(features[some]) for some in again]).std().item()
        return Estimate(self(features), scatter)


class Manifold:
    """Where a set of points lies: the union of balls around them, each reaching to the third nearest other point.

    Args:
        points: (N, D).
        neighbours: to which of the nearest a ball reaches.
    """

    def __init__(self, points: Tensor, neighbours: int = 3) -> None:
        self.points = points
        # The nearest point is the point itself, which does not count.
        rank = min(neighbours + 1, len(points))
        nearest = [torch.cdist(some, points).topk(rank, largest=False).values for some in points.split(CHUNK)]
        self.radii = torch.cat(nearest)[:, -1]

    def shared_with(self, real: "Manifold") -> tuple[Tensor, Tensor]:
        """Which points lie on the real manifold, (N,), and which real points on this one, (M,).

        Their shares are precision and recall.
        """
        precise, recalled = [], torch.zeros(len(real.points), dtype=torch.bool)
        for points, radii in zip(self.points.split(CHUNK), self.radii.split(CHUNK), strict=True):
            distances = torch.cdist(points, real.points)
            precise.append((distances <= real.radii).any(1))
            recalled |= (distances <= radii[:, None]).any(0)
        return torch.cat(precise), recalled
