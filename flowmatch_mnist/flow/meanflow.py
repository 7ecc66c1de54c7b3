"""Mean velocities: a network that learns them goes from noise to data in one step.

Take the trajectory through x at time t, and the span of time from t to s. The mean velocity u(x, t, s) is the integral of v
along the trajectory over this span, divided by s - t. So one step of length s - t, x + (s - t) u, ends at the point of the
trajectory at s. There are two equations for u without an integral. The first cuts the span after a stride h and adds the two
parts:

    (s - t) u(x, t, s) = h v(x, t) + (s - t - h) u(x + h v, t + h, s),   up to the error of Euler's step

In the second, the stride goes to 0. The result is the mean-flow identity:

    u(x, t, s) = v(x, t) + (s - t) du/dt,   where du/dt = du/dx v + the partial derivative of u with respect to t

The network learns to satisfy one of the two equations. The right-hand side is the target, and no gradients flow through it. For
s = t, the target is v: this is flow matching. In the code, s is `until`, and u(x, t, s) is `net(x, t, y, until)`.

Sources: Geng et al. 2025, "Mean Flows for One-step Generative Modeling", equations 6 to 8 (the identity; their time runs from
data to noise); Guo et al. 2025, "SplitMeanFlow: Interval Splitting Consistency in Few-Step Generative Modeling", equation 7;
Sabour et al. 2025, "Align Your Flow", section 3.2 (the velocity of a teacher); Geng et al. 2025, "Improved Mean Flows" (without
a teacher, du/dt along the network's own velocity, which is less noisy than the velocity of a pair).
"""

import torch
from torch import Tensor

from flowmatch_mnist.flow.paths import match_dims
from flowmatch_mnist.flow.teacher import Teacher
from flowmatch_mnist.networks.base import Network
from flowmatch_mnist.support.devices import full_float32


class MeanFlow(Teacher):
    """How a network learns mean velocities.

    Args:
        teacher: trained weights, a file or a name of weights in the package. The network learns the means of the teacher's
            velocity. Without a teacher, it learns the means of the data's own velocity. This argument is only a name: the
            training code loads the teacher's network and sets `net`.
        guidance: the guidance scale of the teacher. The network learns the guided velocity, so sampling needs no guidance.
        guidance_interval: the first and the last t at which the guidance acts.
        instants: the share of the samples with s = t, in [0, 1].
        to_end: the share of the other samples with a span up to the data, s = 1, in [0, 1]. The remaining spans end at
            uniformly distributed times between t and 1.
        stride: the length h after which a span is cut, in [0, 1). 0 means the mean-flow identity. Its derivative multiplies the
            network's errors by the span, and training may collapse late. A stride above 0 avoids this, but it has a bias.
        guidance_power: the power of the guidance, see `guidance.guide`; at least 0.

    Attributes:
        net: the teacher's network, which predicts the velocity of the linear path. None means the data's own velocity.

    Raises:
        ValueError: if a number is out of its range, if there is guidance without a teacher, or if nothing would learn from a
            teacher or the data.
    """

    def __init__(
        self,
        teacher: str | None = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        instants: float = 0.25,
        to_end: float = 0.5,
        stride: float = 0.05,
        guidance_power: float = 0.0,
    ) -> None:
        super().__init__(teacher, guidance, guidance_interval, guidance_power)
        if not all(0 <= share <= 1 for share in (instants, to_end)) or not 0 <= stride < 1:
            raise ValueError(
                "instants and to_end must be shares in [0, 1], and stride must be below 1 and not negative, "
                f"got {instants}, {to_end} and {stride}"
            )
        if teacher is None and stride > 0 and instants == 0:
            raise ValueError("without a teacher, only instants learn from the data; set instants above 0, or stride 0")
        self.instants = instants
        self.to_end = to_end
        self.stride = stride

    def ends(self, t: Tensor, random: Tensor) -> Tensor:
        """Return the ends of the spans: times t (B,), uniform numbers `random` in [0, 1) (B, 2) -> (B,), in [t, 1]."""
        share = (random[:, 1] / max(1 - self.to_end, 1e-9)).clamp(max=1)
        return t + (1 - t) * torch.where(random[:, 0] < self.instants, 0, share)

    def error(self, net: Network, x_t: Tensor, u_t: Tensor, t: Tensor, y: Tensor, until: Tensor) -> Tensor:
        """Return the mean velocities from the network minus their targets: (B, ...).

        Args:
            net: the network that learns, built with spans.
            x_t: points on the path, (B, ...).
            u_t: the velocities of their pairs, (B, ...). Their mean at a point is the data's own velocity.
            t: the times of the points, (B,).
            y: the labels of the points, (B,).
            until: the ends of their spans, (B,).

        Raises:
            ValueError: if `teacher` names a network, but `net` is not set.
        """
        with torch.no_grad():
            if self.teacher is None:
                velocity = net(x_t, t, y, t)
            else:
                velocity = u_t = self.velocity(x_t, t, y)
            if self.stride:
                h = (until - t).clamp(max=self.stride)
                later = net(x_t + match_dims(h, x_t) * velocity, t + h, y, until)
                rest = match_dims(1 - h / (until - t).clamp(min=1e-9), x_t)  # share of the span after the stride
                target = torch.where(match_dims(until > t, x_t), velocity + rest * (later - velocity), u_t)
            else:
                target = u_t + match_dims(until - t, x_t) * derivative(net, x_t, t, y, until, velocity)
        return net(x_t, t, y, until) - target


def derivative(net: Network, x: Tensor, t: Tensor, y: Tensor, until: Tensor, velocity: Tensor) -> Tensor:
    """Return du/dt of the mean velocity u along dx/dt = velocity: x, velocity (B, ...), t, y, until (B,) -> (B, ...).

    Forward differentiation computes it in 32 bits, because in 16 bits it would be lost in rounding errors.
    """
    with full_float32(), torch.autocast(x.device.type, enabled=False):
        inputs, tangents = (x, t), (velocity.to(x), torch.ones_like(t))
        return torch.func.jvp(lambda x, t: net.forward(x, t, y, until), inputs, tangents)[1]
