"""Classifier-free guidance: one network, with and without its label.

Sources: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance"; for flows, Zheng et al. 2023, "Guided Flows"; the
interval, Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality".
"""

import torch
from torch import Tensor

from flowmatch_mnist.flow.paths import match_dims
from flowmatch_mnist.networks.base import Network


def drop_labels(y: Tensor, probability: float, no_label: int, u: Tensor) -> Tensor:
    """Replace each label, by its own throw of the dice u in [0, 1), by `no_label`: y (B,), u (B,) -> (B,)."""
    return y.masked_fill(u < probability, no_label)


def guide(net: Network, x: Tensor, t: Tensor, y: Tensor, scale: float | Tensor, until: Tensor | None = None) -> Tensor:
    """The guided prediction p_uncond + scale (p_cond - p_uncond): x (B, ...), t, y, until (B,) -> (B, ...).

    It is the same rule for velocity, data and noise, which are linear in each other at a given x_t. Scale 1 is off, and 0
    unconditional: either costs one evaluation of the network for each sample. Any other scale costs two, taken in one batch of
    twice the size, and so does a scale for each sample, (B,).
    """
    times = [time for time in (t, until) if time is not None]
    nothing = torch.full_like(y, net.no_label)
    if isinstance(scale, Tensor):
        scale = match_dims(scale, x)
    elif scale in (0.0, 1.0):
        return net(x, times[0], y if scale else nothing, *times[1:])
    times = [torch.cat([time, time]) for time in times]
    both = net(torch.cat([x, x]), times[0], torch.cat([y, nothing]), *times[1:])
    with_label, without = both.unflatten(0, (2, x.shape[0]))
    return without + scale * (with_label - without)


class Guided:
    """The guided prediction with the labels y (B,) bound, see `guide`.

    Args:
        net: the network.
        y: labels (B,).
        scale: of the guidance.
        interval: from and to which t, of the network's path, it acts; outside the scale is 1.

    Attributes:
        evaluations: network evaluations for each sample so far (NFE); guidance counts twice.
    """

    def __init__(self, net: Network, y: Tensor, scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> None:
        self.net = net
        self.y = y
        self.scale = scale
        self.interval = interval
        self.evaluations = 0

    def __call__(self, x: Tensor, t: Tensor, until: Tensor | None = None) -> Tensor:
        """The prediction at x (B, ...) and t (), or its mean from t to `until` (): (B, ...)."""
        start, end = self.interval
        scale = self.scale if start <= t <= end else 1.0
        self.evaluations += 1 if scale in (0.0, 1.0) else 2
        times = [None if time is None else self._spread(time, x) for time in (t, until)]
        assert times[0] is not None
        return guide(self.net, x, times[0], self.y, scale, times[1])

    @staticmethod
    def _spread(time: Tensor, x: Tensor) -> Tensor:
        """The time () for each sample of x: (B,). A time on the CPU is filled in as a number, which no GPU has to wait for."""
        if time.device == x.device or torch.compiler.is_exporting():
            return time.to(x).expand(x.shape[0])
        return x.new_full((x.shape[0],), time.item())
