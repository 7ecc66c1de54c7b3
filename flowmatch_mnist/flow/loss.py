"""The flow-matching loss: how far a network's prediction at x_t is from what the pair (x0, x1) says it should be.

    L = E w(t) |f(x_t, t, y) - u_t|^2    with    x_t = alpha_t x1 + sigma_t x0    and    u_t = dx_t / dt

Training needs no more than this: `losses = FlowLoss()(net, x0, x1, y, t)`, and a step down the gradient of their mean.

Sources: Lipman et al. 2022, "Flow Matching for Generative Modeling", equation 9 (the loss); Ho and Salimans 2022,
"Classifier-Free Diffusion Guidance", algorithm 1 (labels left out); `predictions`, `weighting` and `meanflow` for the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowmatch_mnist.flow.exact import ExactField
from flowmatch_mnist.flow.guidance import drop_labels
from flowmatch_mnist.flow.meanflow import MeanFlow
from flowmatch_mnist.flow.paths import PATHS, PathName
from flowmatch_mnist.flow.predictions import Prediction, target
from flowmatch_mnist.flow.times import LogitNormal, TimeDensity
from flowmatch_mnist.flow.weighting import WeightingName, loss_weight
from flowmatch_mnist.networks.base import Network

LossName = Literal["squared", "huber", "charbonnier"]

HUBER = 0.01
"""Below this error, `huber` (of a sample's root mean square) and `charbonnier` (of a pixel) are nearly quadratic."""


@dataclass
class FlowLoss:
    """What a network is trained for.

    Args:
        path: from noise to data: linear, cosine or vp.
        prediction: what the network puts out: velocity, data or noise.
        times: where in (0, 1) training looks; by default `LogitNormal()`.
        weighting: the name of a training whose weight at each signal-to-noise ratio the loss should have, see `weighting`;
            by default the error of the prediction is taken as it is.
        loss: squared, huber or charbonnier, see `reduce`; validation's is always squared.
        mean_flow: how to learn mean velocities too, for sampling in one step; by default they are not learned.
        label_dropout: probability that a sample is trained without its label, in [0, 1]; guidance needs some.
        exact_until: until which t, in [0, 1), the target of a sample with a label is the exact one, see `exact`, in place of
            its own, which scatters around it. 0 is nowhere. Whoever trains hands over the field as `exact_field`.

    Attributes:
        exact_field: of the training data; needed if `exact_until` is above 0.

    Raises:
        ValueError: if a number is out of its range, or mean velocities are asked of another path or prediction.
    """

    path: PathName = "linear"
    prediction: Prediction = "velocity"
    times: TimeDensity | None = None
    weighting: WeightingName | None = None
    loss: LossName = "squared"
    mean_flow: MeanFlow | None = None
    label_dropout: float = 0.1
    exact_until: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout must lie in [0, 1], got {self.label_dropout}")
        if not 0 <= self.exact_until < 1:
            raise ValueError(f"exact_until must lie in [0, 1), got {self.exact_until}")
        if self.mean_flow and (self.path, self.prediction) != ("linear", "velocity"):
            raise ValueError("mean velocities need the linear path, and prediction velocity")
        self.density: TimeDensity = self.times or LogitNormal()
        self.exact_field: ExactField | None = None

    def __call__(
        self, net: Network, x0: Tensor, x1: Tensor, y: Tensor, t: Tensor, uniform: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """The loss of each sample: noise x0 and data x1 (B, ...), labels y and times t (B,) -> (B,).

        Its random numbers are `uniform(what, *shape)`, in [0, 1), for what is "labels" or "spans"; by default `torch.rand`.
        """
        draw = uniform or (lambda what, *shape: torch.rand(shape, device=t.device))
        y = drop_labels(y, self.label_dropout, net.no_label, draw("labels", len(y)))
        if self.exact_until:
            x0, x1 = self.exact_pairs(x0, x1, y, t, self.exact_until)
        if self.mean_flow is None:
            error = self.error(net, x0, x1, y, t)
        else:
            x_t, u_t = self.point_and_target(x0, x1, t)
            error = self.mean_flow.error(net, x_t, u_t, t, y, self.mean_flow.ends(t, draw("spans", len(y), 2)))
        losses = reduce(error, self.loss)
        if self.weighting is None:
            return losses
        return losses * loss_weight(self.weighting, self.prediction, PATHS[self.path], self.density, t)

    def error(self, net: Callable[..., Tensor], x0: Tensor, x1: Tensor, y: Tensor, t: Tensor) -> Tensor:
        """By how much the network's prediction is off: x0, x1 (B, ...), y and t (B,) -> (B, ...)."""
        x_t, u_t = self.point_and_target(x0, x1, t)
        return net(x_t, t, y) - u_t

    def exact_pairs(self, x0: Tensor, x1: Tensor, y: Tensor, t: Tensor, until: float) -> tuple[Tensor, Tensor]:
        """The pairs, those before t = until replaced by the means of all pairs through the same points, same shapes.

        Raises:
            ValueError: if nobody handed over the field.
        """
        if self.exact_field is None:
            raise ValueError("the exact field is not known; set `exact_field` to that of the training data")
        return self.exact_field.pairs(PATHS[self.path], x0, x1, y, t, until)

    def point_and_target(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Where the network is asked, x_t, and what it should put out there: (B, ...) each."""
        path = PATHS[self.path]
        return path.point(x0, x1, t), target(self.prediction, path, x0, x1, t)

    def check(self, net: Network) -> None:
        """Raise ValueError for a network that cannot learn this."""
        if self.mean_flow and not net.spans:
            raise ValueError("mean velocities need a network with spans")

    def prepare(self, load: Callable[[str], Network]) -> None:
        """Fetch the teacher of mean velocities, if there is one, from a function that loads a network by its name."""
        if self.mean_flow and self.mean_flow.teacher is not None:
            self.mean_flow.net = load(self.mean_flow.teacher)


def reduce(error: Tensor, loss: LossName) -> Tensor:
    """The loss of each sample: error (B, ...) -> (B,).

    - `squared` is the mean square. Its minimum is the mean: right for velocities, where the mean is asked for.
    - `huber` is the pseudo-Huber distance, sqrt(mean square + c^2) - c. One sample that is far off does not outweigh many that
      are nearly right: for errors that should vanish. Source: Song and Dhariwal 2023, "Improved Techniques for Training
      Consistency Models", section 3.3.
    - `charbonnier` is the same for each pixel, mean(sqrt(error^2 + c^2) - c). Its minimum is near the median: where ink is
      uncertain, it takes the likelier of black and white instead of a grey. Source: Lai et al. 2017, "Deep Laplacian Pyramid
      Networks for Fast and Accurate Super-Resolution", section 3.2.
    """
    squares = error.square().flatten(1)
    if loss == "huber":
        squares = squares.mean(1, keepdim=True)
    losses = squares if loss == "squared" else torch.sqrt(squares + HUBER**2) - HUBER
    return losses.mean(1)
