"""The first lesson: points in the plane flow from noise onto the curve y = sin x, with or without a prompt (a label).

Path, module, solvers and callbacks are the same as for digits. Only the data and the network are different: they are small
enough to understand completely.
"""

import math

import numpy as np
import torch
from torch import Tensor

from flowmatch_mnist.data.pairs import PairsDataModule
from flowmatch_mnist.evaluation.estimates import Estimate, Measurement, mean, share
from flowmatch_mnist.evaluation.problems import Labelled, Problem, Scorer
from flowmatch_mnist.flow.couplings import CouplingName
from flowmatch_mnist.sampling.generate import Samples
from flowmatch_mnist.sampling.units import UNITS
from flowmatch_mnist.support import streams

LENGTH = 4 * math.pi
"""The curve's extent in x, from 0. (The curve itself is longer.)"""


def curve(x: Tensor) -> Tensor:
    """Return the points (x, sin x) of the curve: x (N,) in [0, 4 pi] -> (N, 2)."""
    return torch.stack([x, x.sin()], dim=1)


class Curve(Problem):
    """Points in the plane, on the curve y = sin x with x from 0 to 4 pi.

    Args:
        classes: number of parts of the curve, equally wide in x; a label selects the part.
    """

    shape = (2,)
    units = UNITS["plane"]
    kind = "points"
    headlines = ("quality/distance to the curve",)

    def __init__(self, classes: int = 1) -> None:
        self.classes = classes

    def segment(self, x: Tensor) -> Tensor:
        """Return the class of the part of the curve at x: (N,) -> int64 (N,)."""
        return (x * self.classes / LENGTH).long().clamp(0, self.classes - 1)

    def scorer(self, held_out: Labelled, training: Labelled, device: torch.device) -> Scorer:
        """Return a function that measures the distance to the curve. It needs no data."""
        return self.measure

    def measure(self, samples: Samples) -> list[Measurement]:
        """Return the mean distance to the curve, and the share of points that are nearest to their own segment.

        The share exists only with several classes. 4001 points stand for the curve, one every 0.003 in x.
        """
        x = torch.linspace(0, LENGTH, 4001)
        distance, nearest = torch.cdist(samples.values, curve(x)).min(dim=1)
        measurements = [Measurement("distance to the curve", mean(distance), real=Estimate(0.0, 0.0))]
        if self.classes > 1:
            right = self.segment(x[nearest]) == samples.labels
            measurements.append(Measurement("on its segment", share(right), real=Estimate(1.0, 0.0)))
        return measurements

    def pictures(self, samples: Samples) -> dict[str, Tensor]:
        """Return a picture, uint8 (H, W, 3): noise, target and samples on the left, and some trajectories on the right."""
        # Imported here because the import of matplotlib is slow, and training on digits does not need it.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine

        colours = samples.labels.numpy() if self.classes > 1 else "tab:blue"
        styles = {"c": colours, "cmap": "tab10" if self.classes > 1 else None, "s": 4}
        # The axes have a fixed aspect ratio. Without the padding, their titles would leave the figure.
        figure = Figure(figsize=(12, 4), dpi=100, layout=ConstrainedLayoutEngine(h_pad=0.1))
        canvas = FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharex=True, sharey=True)
        x = torch.linspace(0, LENGTH, 400)
        for axes in (left, right):
            axes.plot(*curve(x).T.numpy(), color="black", linewidth=0.8, label="target")
            axes.set_aspect("equal")
        if samples.states is not None:
            noise = samples.states[0].numpy()
            left.scatter(noise[:, 0], noise[:, 1], s=2, color="lightgrey", label="noise")
            shown = samples.states[:, torch.linspace(0, len(noise) - 1, min(len(noise), 150)).long()].numpy()
            right.plot(shown[..., 0], shown[..., 1], color="grey", linewidth=0.4)
        left.scatter(*samples.values.T.numpy(), label="samples", **styles)
        right.scatter(*samples.values.T.numpy(), **styles)
        left.set_title("from noise to the curve")
        right.set_title("trajectories")
        left.legend(loc="lower left")
        canvas.draw()
        return {"curve": torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy())}


class CurveDataModule(PairsDataModule):
    """Points on the curve y = sin x, with x drawn uniformly from 0 to 4 pi.

    Args:
        prompted: whether a label 0 to 9 selects one tenth of the curve; otherwise the whole curve is one class.
        samples: number of training points; validation and test have one tenth as many points each.
        batch_size: number of points per step and process.
        eval_batch_size: number of points per step of validation and test, divided among the processes.
        predict_per_class: number of points of each class that `predict` draws.
        coupling: how the noise and the points of a batch are paired; see `couplings`.
        seed: random seed of the noise and the data order; the command line sets it from `seed_everything`.
        num_workers: number of worker processes that cut training batches in advance; for data in memory, 0 is fastest.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        prompted: bool = False,
        samples: int = 50_000,
        batch_size: int = 500,
        eval_batch_size: int = 1000,
        predict_per_class: int = 200,
        coupling: CouplingName = "independent",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        self.curve = Curve(10 if prompted else 1)
        super().__init__(self.curve, batch_size, eval_batch_size, predict_per_class, coupling, seed, num_workers)
        if samples < max(10, batch_size):
            raise ValueError(f"samples must be at least 10 and at least the batch size, {batch_size}; got {samples}")
        self.samples = samples

    def setup(self, stage: str) -> None:
        """Draw the points. They are the same in every run."""
        for split, count in (("train", self.samples), ("val", self.samples // 10), ("test", self.samples // 10)):
            x = LENGTH * torch.rand(count, generator=streams.generator("cpu", "curve", split))
            points = (curve(x), self.curve.segment(x))
            self.splits[split] = points if split == "train" else (*points, self.fixed_noise(split, count))
