"""Mean velocities: what a network must know to go from noise to data in one step.

The mean velocity u(x, t, s) from t to s, along the trajectory through x at t, is the integral of v over that span, divided by
s - t: one step of this length, x + (s - t) u, lands where the trajectory does. Two ways say so without an integral.
Cut the span after a stride h, and its mean is that of its parts:

    (s - t) u(x, t, s) = h v(x, t) + (s - t - h) u(x + h v, t + h, s),   up to the error of Euler's step

or let the stride shrink to nothing, which gives the mean-flow identity:

    u(x, t, s) = v(x, t) + (s - t) du/dt,   where du/dt = du/dx v + the partial derivative of u by t

A network is trained to obey one of them, with the right-hand side taken as it is, without gradients. Where s = t, that is flow
matching.

Sources: Geng et al. 2025, "Mean Flows for One-step Generative Modeling", equations 6 to 8 (the identity; their time runs from
data to noise); Guo et al. 2025, "SplitMeanFlow: Interval Splitting Consistency in Few-Step Generative Modeling", equation 7;
Sabour et al. 2025, "Align Your Flow", section 3.2 (the velocity of a teacher); Geng et al. 2025, "Improved Mean Flows" (without
a teacher, du/dt along the network's own velocity, which is not as noisy as that of a pair).
"""

import torch
from torch import Tensor

from flowmatch_mnist.flow.guidance import guide
from flowmatch_mnist.flow.paths import match_dims
from flowmatch_mnist.networks.base import Network
from flowmatch_mnist.support.devices import full_float32


class MeanFlow:
    """How mean velocities are learned.

    Args:
        teacher: trained weights whose velocity is averaged: a file, or a name of weights in the package. Without a teacher the
            data's own velocity is averaged. This is a name alone: who trains loads the network, and hands it over as `net`.
        guidance: scale of the teacher's guidance; it becomes part of what is learned, and sampling needs none.
        guidance_interval: from and to which t it acts.
        instants: share of the samples with s = t, in [0, 1].
        to_end: share of the others whose span reaches to the data, s = 1, in [0, 1]; the rest end evenly between t and there.
        stride: after which a span is cut, in [0, 1]. 0 takes the mean-flow identity, whose derivative multiplies the network's
            errors by the span, and which may come to nothing late in training; a stride has a bias in place of that.

    Attributes:
        net: the teacher's network, which predicts the velocity of the linear path; None to average the data's own velocity.

    Raises:
        ValueError: if a number is out of its range, or there is guidance without a teacher.
    """

    def __init__(
        self,
        teacher: str | None = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        instants: float = 0.25,
        to_end: float = 0.5,
        stride: float = 0.05,
    ) -> None:
        if not all(0 <= share <= 1 for share in (instants, to_end, stride)):
            raise ValueError(f"instants, to_end and stride are shares in [0, 1], got {instants}, {to_end} and {stride}")
        if guidance != 1 and teacher is None:
            raise ValueError(f"guidance {guidance:g} needs a teacher, whose velocity it changes")
        start, end = guidance_interval
        if not 0 <= start < end <= 1:
            raise ValueError(f"the interval of guidance must rise within [0, 1], got {start} to {end}")
        self.teacher = teacher
        self.guidance = guidance
        self.guidance_interval = guidance_interval
        self.instants = instants
        self.to_end = to_end
        self.stride = stride
        self.net: Network | None = None

    def ends(self, t: Tensor, u: Tensor) -> Tensor:
        """When the spans end: t (B,), uniform numbers u in [0, 1) (B, 2) -> (B,), in [t, 1]."""
        share = (u[:, 1] / max(1 - self.to_end, 1e-9)).clamp(max=1)
        return t + (1 - t) * torch.where(u[:, 0] < self.instants, 0, share)

    def error(self, net: Network, x_t: Tensor, u_t: Tensor, t: Tensor, y: Tensor, until: Tensor) -> Tensor:
        """By how much the network misses what its spans should be: (B, ...).

        Args:
            net: the network, which spans.
            x_t: points of the path, (B, ...).
            u_t: the velocities of their pairs, whose mean at a point is the data's own velocity, (B, ...).
            t: their times, (B,).
            y: their labels, (B,).
            until: when their spans end, (B,).

        Raises:
            ValueError: if there should be a teacher, but nobody handed over its network.
        """
        if self.teacher is not None and self.net is None:
            raise ValueError(f"the teacher {self.teacher} was not loaded; set `net` to its network")
        with torch.no_grad():
            if self.net is None:
                velocity = net.forward(x_t, t, y, t)
            else:
                start, end = self.guidance_interval
                scale = torch.where((start <= t) & (t <= end), self.guidance, 1.0)
                velocity = u_t = guide(self.net, x_t, t, y, 1.0 if self.guidance == 1 else scale)
            if self.stride:
                h = (until - t).clamp(max=self.stride)
                later = net.forward(x_t + match_dims(h, x_t) * velocity, t + h, y, until)
                rest = match_dims(1 - h / (until - t).clamp(min=1e-9), x_t)  # share of the span that is left after the stride
                aim = torch.where(match_dims(until > t, x_t), velocity + rest * (later - velocity), u_t)
            else:
                aim = u_t + match_dims(until - t, x_t) * derivative(net, x_t, t, y, until, velocity)
        return net(x_t, t, y, until) - aim


def derivative(net: Network, x: Tensor, t: Tensor, y: Tensor, until: Tensor, velocity: Tensor) -> Tensor:
    """du/dt along dx/dt = velocity, by forward differentiation, in 32 bits: in 16 it would be lost among rounding errors.

    x, velocity (B, ...), t, y, until (B,) -> (B, ...).
    """
    with full_float32(), torch.autocast(x.device.type, enabled=False):
        inputs, tangents = (x, t), (velocity.to(x), torch.ones_like(t))
        return torch.func.jvp(lambda x, t: net.forward(x, t, y, until), inputs, tangents)[1]
