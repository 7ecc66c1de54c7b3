"""Measures of how close drawn digits are to real ones. They compare the features that one of the `classifiers` computes.

Sources: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", equation 6 (Fréchet distance); Kynkäänniemi et al.
2019, "Improved Precision and Recall Metric for Assessing Generative Models", section 3.
"""

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from flowmatch_mnist.evaluation.classifiers import Classifier
from flowmatch_mnist.evaluation.estimates import Estimate
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.devices import default_batch_size, full_float32

CHUNK = 1000
"""Number of points in one computation of distances."""

RESAMPLES = 20
"""Number of bootstrap resamples for the error of a Fréchet distance. The relative error of that error is about one sixth."""


@torch.inference_mode()
@full_float32()
def classify(net: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features, float64 (N, D), of images uint8 (N, 28, 28), and the digits read in them, int64 (N,).

    Both are on the CPU, because some devices have no float64. The net may be on any device.
    """
    device = net.head.weight.device
    features = torch.cat([net.features(some.to(device)) for some in images.split(default_batch_size(device))])
    return features.cpu().double(), net.head(features).argmax(1).cpu()


class Features(nn.Module):
    """An identity module. torchmetrics expects a network here, but the features are already computed."""

    num_features = Classifier.num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class FrechetDistance:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), with the means and covariances of samples' features and real features.

    Args:
        real: features of real images, float64 (M, D).
    """

    def __init__(self, real: Tensor) -> None:
        self._metric = FrechetInceptionDistance(Features(), reset_real_features=False, sync_on_compute=False)
        self._metric.update(real, real=True)

    def __call__(self, features: Tensor) -> float:
        """Return the distance of features float64 (N, D) from the real features."""
        self._metric.reset()
        self._metric.update(features, real=False)
        # For two equal sets, rounding errors can make the distance slightly negative.
        return max(0.0, self._metric.compute().item())

    def estimate(self, features: Tensor) -> Estimate:
        """Return the distance and its standard error: the standard deviation of the distance over resamples.

        Each resample draws N of the N features, with replacement.

        Source: Efron 1979, "Bootstrap Methods: Another Look at the Jackknife".
        """
        generator = streams.generator("cpu", "resamples")
        again = [torch.randint(len(features), (len(features),), generator=generator) for _ in range(RESAMPLES)]
        scatter = torch.tensor([self(features[some]) for some in again]).std().item()
        return Estimate(self(features), scatter)


class Manifold:
    """The region of a set of points: the union of balls around them. Each ball reaches to the third nearest other point.

    Args:
        points: the points (N, D).
        neighbours: the rank of the neighbour that a ball reaches; 3 means the third nearest.
    """

    def __init__(self, points: Tensor, neighbours: int = 3) -> None:
        self.points = points
        # The nearest point is the point itself, so the rank is one higher.
        rank = min(neighbours + 1, len(points))
        nearest = [torch.cdist(some, points).topk(rank, largest=False).values for some in points.split(CHUNK)]
        self.radii = torch.cat(nearest)[:, -1]

    def shared_with(self, real: "Manifold") -> tuple[Tensor, Tensor]:
        """Return which points lie on the real manifold, (N,), and which real points lie on this one, (M,).

        The two shares are precision and recall.
        """
        precise, recalled = [], torch.zeros(len(real.points), dtype=torch.bool)
        for points, radii in zip(self.points.split(CHUNK), self.radii.split(CHUNK), strict=True):
            distances = torch.cdist(points, real.points)
            precise.append((distances <= real.radii).any(1))
            recalled |= (distances <= radii[:, None]).any(0)
        return torch.cat(precise), recalled
