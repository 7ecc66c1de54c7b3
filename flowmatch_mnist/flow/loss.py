"""The flow-matching loss: the error of a network's prediction at x_t, compared with the target from the pair (x0, x1).

    L = E w(t) |f(x_t, t, y) - u_t|^2    with    x_t = alpha_t x1 + sigma_t x0    and    u_t = dx_t / dt

Training needs only this: `losses = FlowLoss()(net, x0, x1, y, t)`, and a gradient step on their mean.

Sources: Lipman et al. 2022, "Flow Matching for Generative Modeling", equation 9 (the loss); Ho and Salimans 2022,
"Classifier-Free Diffusion Guidance", algorithm 1 (label dropout). The modules `predictions`, `weighting` and `meanflow`
name the other sources.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowmatch_mnist.flow.exact import ExactField
from flowmatch_mnist.flow.guidance import drop_labels
from flowmatch_mnist.flow.matching import DistributionMatching
from flowmatch_mnist.flow.meanflow import MeanFlow
from flowmatch_mnist.flow.paths import PATHS, PathName
from flowmatch_mnist.flow.predictions import Prediction, target
from flowmatch_mnist.flow.teacher import Teacher
from flowmatch_mnist.flow.times import LogitNormal, TimeDensity
from flowmatch_mnist.flow.weighting import WeightingName, loss_weight
from flowmatch_mnist.networks.base import Network
from flowmatch_mnist.support.devices import send

LossName = Literal["squared", "huber"]

HUBER = 0.01
"""The constant c of `huber`. The loss is nearly quadratic if the root mean square of a sample's error is below it."""


@dataclass
class FlowLoss:
    """The training objective of a network.

    Args:
        path: the path from noise to data: linear, cosine or vp.
        prediction: the prediction target: velocity, data or noise.
        times: the density of the training times in (0, 1); by default `LogitNormal()`.
        weighting: the name of a published training objective, see `weighting`. The loss gets the weight of that objective at
            each signal-to-noise ratio. By default the error of the prediction gets no extra weight.
        loss: squared or huber, see `reduce`; validation always uses squared.
        mean_flow: how to learn mean velocities too, for sampling in few steps; by default the network does not learn them.
        matching: how to learn one step by distribution matching, instead of the velocity; by default the network learns the
            velocity. The data are then only the source of labels.
        label_dropout: the probability that a sample is trained without its label, in [0, 1]; guidance needs more than 0.
        exact_until: a time in [0, 1). A sample with a label and an earlier t has the exact target, see `exact`. The sample's
            own target scatters around the exact one. 0 means that no sample has the exact target. If it is above 0, the
            training code must set `exact_field`.

    Attributes:
        exact_field: the exact field of the training data; needed if `exact_until` is above 0.

    Raises:
        ValueError: if a number is out of its range, `mean_flow` or `matching` is used without the linear path and prediction
            velocity, `exact_until` is used with a teacher, or `matching` with settings of another loss.
    """

    path: PathName = "linear"
    prediction: Prediction = "velocity"
    times: TimeDensity | None = None
    weighting: WeightingName | None = None
    loss: LossName = "squared"
    mean_flow: MeanFlow | None = None
    label_dropout: float = 0.1
    exact_until: float = 0.0
    matching: DistributionMatching | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout must lie in [0, 1], got {self.label_dropout}")
        if not 0 <= self.exact_until < 1:
            raise ValueError(f"exact_until must lie in [0, 1), got {self.exact_until}")
        if (self.mean_flow or self.matching) and (self.path, self.prediction) != ("linear", "velocity"):
            raise ValueError(
                "mean velocities need the linear path and prediction velocity; set both, or leave out mean_flow and matching"
            )
        if self.teacher and self.exact_until:
            raise ValueError("a teacher gives the target, so there is no exact one; set exact_until to 0")
        if self.matching and (self.mean_flow or self.weighting or self.loss != "squared"):
            raise ValueError(
                "distribution matching has a loss of its own; leave out mean_flow, weighting and loss, or matching"
            )
        self.density: TimeDensity = self.times or LogitNormal()
        self.exact_field: ExactField | None = None

    @property
    def teacher(self) -> Teacher | None:
        """Return the teacher, if there is one."""
        teacher = self.matching or self.mean_flow
        return teacher if teacher and teacher.teacher is not None else None

    def __call__(
        self,
        net: Network,
        x0: Tensor,
        x1: Tensor,
        y: Tensor,
        t: Tensor,
        uniform: Callable[..., Tensor] | None = None,
        normal: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Return the loss of each sample: noise x0 and data x1 (B, ...), labels y and times t (B,) -> (B,).

        `uniform(what, *shape)` draws random numbers in [0, 1), where `what` is "labels" or "spans", and `normal(what, *shape)`
        draws standard normal ones for "points". The defaults are `torch.rand` and `torch.randn`.

        Raises:
            ValueError: if `exact_field` or the network of the teacher or of `matching` is needed, but not set.
        """
        draw = uniform or (lambda what, *shape: torch.rand(shape, device=t.device))
        y = drop_labels(y, self.label_dropout, net.no_label, draw("labels", len(y)))
        if self.matching:
            noise = normal("points", *x0.shape) if normal else torch.randn_like(x0)
            return self.matching.losses(net, x0, noise, t, y)
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
        """Return the prediction of the network minus its target: x0, x1 (B, ...), y and t (B,) -> (B, ...).

        For a network of mean velocities, this is the velocity at t.
        """
        x_t, u_t = self.point_and_target(x0, x1, t)
        return net(x_t, t, y) - u_t

    def exact_pairs(self, x0: Tensor, x1: Tensor, y: Tensor, t: Tensor, until: float) -> tuple[Tensor, Tensor]:
        """Replace each pair with t < until by the mean of all pairs that pass through the same point on the path.

        x0, x1 (B, ...), y, t (B,), until in [0, 1] -> (B, ...) each.

        Raises:
            ValueError: if `exact_field` is not set.
        """
        if self.exact_field is None:
            raise ValueError("the exact field is not known; set `exact_field` to the field of the training data")
        return self.exact_field.pairs(PATHS[self.path], x0, x1, y, t, until)

    def point_and_target(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the point x_t, and the target of the network at this point: x0, x1 (B, ...), t (B,) -> (B, ...) each."""
        path = PATHS[self.path]
        return path.point(x0, x1, t), target(self.prediction, path, x0, x1, t)

    def check(self, net: Network, guided: bool = False) -> None:
        """Raise ValueError if the network cannot learn this objective. `guided` means that it must learn without labels too."""
        if guided and self.label_dropout == 0:
            raise ValueError(
                "guidance needs training without labels too; set label_dropout above 0, or the guidance scale to 1"
            )
        if (self.mean_flow or self.matching) and not net.spans:
            raise ValueError("mean velocities need a network with spans; set spans of the network to true")

    def prepare(self, load: Callable[[str], Network]) -> None:
        """Load the teacher, if there is one. `load` gets the teacher's name and returns its network."""
        if self.teacher:
            self.teacher.net = load(str(self.teacher.teacher))


def reduce(error: Tensor, loss: LossName) -> Tensor:
    """Return the loss of each sample: error (B, ...) -> (B,).

    - `squared` is the mean square. It is smallest at the mean of the targets. Use it for velocities, because flow matching
      needs their mean.
    - `huber` is the pseudo-Huber distance, sqrt(mean square + c^2) - c. One sample with a large error does not outweigh many
      samples with small errors. Use it where every error should become 0. Source: Song and Dhariwal 2023, "Improved
      Techniques for Training Consistency Models", section 3.3.
    """
    squares = error.square().flatten(1).mean(1)
    return squares if loss == "squared" else torch.sqrt(squares + HUBER**2) - HUBER


INTERVALS = 5
"""The number of equal intervals of t in [0, 1]. Validation logs a loss for each of them."""


def losses_by_time(
    losses: Tensor, t: Tensor, until: float = 1.0, intervals: int = INTERVALS
) -> Iterator[tuple[str, Tensor, int]]:
    """Yield for each interval of t its name, the mean loss, (), and the number of its samples.

    The losses (B,) belong to the times t (B,). The intervals cover t from 0 to `until`; each is 1 / `intervals` wide. The times
    are on the CPU, so the host does not wait for a GPU.
    """
    for i in range(math.ceil(until * intervals)):
        inside = ((t * intervals).long() == i).nonzero().flatten()
        mean = losses[send(inside, losses.device)].sum() / max(1, len(inside))
        yield f"{i / intervals:.1f} to {(i + 1) / intervals:.1f}", mean, len(inside)
