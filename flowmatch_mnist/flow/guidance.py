"""Classifier-free guidance: one network is evaluated with and without the label.

Sources: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance"; Zheng et al. 2023, "Guided Flows" (for flows);
Kynkäänniemi et al. 2024, "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality" (the interval);
Pavasovic et al. 2025, "Classifier-Free Guidance: From High-Dimensional Analysis to Generalized Guidance Forms" (the power).
"""

import torch
from torch import Tensor

from flowmatch_mnist.flow.paths import ProbabilityPath, match_dims
from flowmatch_mnist.flow.predictions import STRAIGHT, Prediction, pair
from flowmatch_mnist.networks.base import Network


def drop_labels(y: Tensor, probability: float, no_label: int, u: Tensor) -> Tensor:
    """Replace a label by `no_label` if its uniform random number u in [0, 1) is below `probability`: y (B,), u (B,) -> (B,)."""
    return y.masked_fill(u < probability, no_label)


def guide(
    net: Network,
    x: Tensor,
    t: Tensor,
    y: Tensor,
    scale: float | Tensor,
    until: Tensor | None = None,
    power: float = 0.0,
    path: ProbabilityPath = STRAIGHT,
    prediction: Prediction = "velocity",
) -> Tensor:
    """Return the guided prediction p_uncond + scale (p_cond - p_uncond): x (B, ...), t, y, until (B,) -> (B, ...).

    With `until`, the predictions are mean velocities from t to `until`, see `flow.meanflow`. The rule is the same for velocity,
    data and noise, because at a given x_t each is an affine function of every other. Scale 1 means no guidance, and scale 0
    means no label: each costs one network evaluation for each sample. Any other scale costs two, in one batch of twice the
    size. A tensor with one scale for each sample, (B,), also costs two.

    With a power above 0, guidance is strong where the label is in doubt. The doubt of a sample is the norm of the difference
    between two predictions of the noise, with and without the label. It is large as long as the sample could still become
    another class. The scale of a sample is 1 + (scale - 1) doubt^power. This is the power-law guidance of Pavasovic et al.
    2025, with predictions of the noise instead of scores. It needs the network's path and prediction target.
    """
    if not isinstance(scale, Tensor) and scale in (0.0, 1.0):
        times = [time for time in (t, until) if time is not None]
        return net(x, times[0], y if scale else torch.full_like(y, net.no_label), *times[1:])
    with_label, without = both(net, x, t, y, until)
    if power:
        noises = [pair(prediction, path, output, x, t)[0] for output in (with_label, without)]
        doubt = (noises[0] - noises[1]).flatten(1).norm(dim=1)
        scale = 1 + (scale - 1) * doubt**power
    return without + (match_dims(scale, x) if isinstance(scale, Tensor) else scale) * (with_label - without)


def both(net: Network, x: Tensor, t: Tensor, y: Tensor, until: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the predictions with and without the label, from one batch of twice the size; for the arguments see `guide`."""
    times = [torch.cat([time, time]) for time in (t, until) if time is not None]
    labels = torch.cat([y, torch.full_like(y, net.no_label)])
    with_label, without = net(torch.cat([x, x]), times[0], labels, *times[1:]).unflatten(0, (2, x.shape[0]))
    return with_label, without


class Guided:
    """The guided prediction for fixed labels y (B,), see `guide`.

    Args:
        net: the network.
        y: labels (B,).
        scale: the guidance scale. 0 means no label, with any power.
        interval: the first and the last t with this scale, in the time of the network's path. Outside it, the scale is 1.
        power: the power of the doubt, at least 0. 0 means the same scale for all samples.
        path: the network's path.
        prediction: the network's prediction target.

    Attributes:
        evaluations: network evaluations (NFE) for each sample so far; an evaluation with guidance counts as two.
    """

    def __init__(
        self,
        net: Network,
        y: Tensor,
        scale: float,
        interval: tuple[float, float] = (0.0, 1.0),
        power: float = 0.0,
        path: ProbabilityPath = STRAIGHT,
        prediction: Prediction = "velocity",
    ) -> None:
        self.net = net
        self.y = y
        self.scale = scale
        self.interval = interval
        self.power = power
        self.path = path
        self.prediction = prediction
        self.evaluations = 0

    def __call__(self, x: Tensor, t: Tensor, until: Tensor | None = None) -> Tensor:
        """Return the prediction at x (B, ...) and t (), or the mean velocity from t to `until` (): (B, ...)."""
        start, end = self.interval
        scale = self.scale if start <= t <= end else 1.0
        self.evaluations += 1 if scale in (0.0, 1.0) else 2
        at, until = self._spread(t, x), None if until is None else self._spread(until, x)
        return guide(self.net, x, at, self.y, scale, until, self.power, self.path, self.prediction)

    @staticmethod
    def _spread(time: Tensor, x: Tensor) -> Tensor:
        """Repeat the time () for each sample of x: (B,). A time on the CPU becomes a number: nothing waits for a GPU."""
        if time.device == x.device or torch.compiler.is_exporting():
            return time.to(x).expand(x.shape[0])
        return x.new_full((x.shape[0],), time.item())
