"""The exact field of a finite data set: the mean around which the targets of flow matching scatter.

Many pairs (x0, x1) pass through the same point x_t, and the network learns the mean of their targets. This mean has a formula
if the data set is finite and the noise is Gaussian and independent of the data. The formula is a softmax over the data set:

    E[x1 | x_t, y] = sum_i w_i x1_i    with    w = softmax_i -|x_t - alpha_t x1_i|^2 / (2 sigma_t^2)    over all i of class y
    E[x0 | x_t, y] = (x_t - alpha_t E[x1 | x_t, y]) / sigma_t

Velocity, data and noise are linear in the pair. So the mean of the pairs gives the mean of the targets, for each of the three.

At small t, many data points have weight, and a network should learn their mean. At large t, one data point has all the weight:
the exact field leads back to the training data. There, a network that draws new digits is better than the exact field.

Sources: Xu, Tong and Jaakkola 2023, "Stable Target Field for Reduced Variance Score Estimation in Diffusion Models" (the exact
field as the target); Bertrand et al. 2025, "On the Closed-Form of Flow Matching: Generalization Does Not Arise from Target
Stochasticity".
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmatch_mnist.flow.paths import ProbabilityPath, match_dims
from flowmatch_mnist.flow.predictions import pair
from flowmatch_mnist.support.devices import full_float32


class ExactField:
    """The exact field: the mean of all pairs that pass through a point.

    Args:
        x1: the data, in the units of the network, float32 (N, ...).
        y: their labels, int64 (N,), counted from 0.
    """

    def __init__(self, x1: Tensor, y: Tensor) -> None:
        order = y.argsort()
        self.data, self.labels = x1[order].flatten(1), y[order]
        self.squared_norms = self.data.square().sum(1)
        counts = y.bincount()
        self.counts, self.present = counts.tolist(), counts > 0

    @torch.no_grad()
    @full_float32()
    def pairs(
        self, path: ProbabilityPath, x0: Tensor, x1: Tensor, y: Tensor, t: Tensor, until: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Replace each pair with t < until by the mean of all pairs that pass through the same point on `path`.

        A pair with a label that is not in the data stays unchanged: x0, x1 (B, ...), y, t (B,), until in [0, 1] -> (B, ...)
        each.
        """
        x_t = path.point(x0, x1, t)
        early = (t < until) & (y < len(self.counts)) & self.present[y.clamp(max=len(self.counts) - 1)]
        device = x1.device.type
        # 16 bits are too coarse for the distances. Autocast is disabled only if it is on: some types of devices do not have it.
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            if device == "cpu":  # one class at a time, and only for the early points of this class
                means, start = x1.clone(), 0
                for label, count in enumerate(self.counts):
                    rows = (early & (y == label)).nonzero().flatten()
                    if len(rows):
                        means[rows] = self._mean(path, x_t[rows], t[rows], slice(start, start + count))
                    start += count
            else:  # all classes at once: to select the points of one class, the host (the CPU) would wait for the GPU
                means = self._mean(path, x_t, t, slice(None), self.labels == y[:, None])
        noise, _ = pair("data", path, means, x_t, t)
        chosen = match_dims(early, x1)
        return torch.where(chosen, noise, x0), torch.where(chosen, means, x1)

    def _mean(self, path: ProbabilityPath, x: Tensor, t: Tensor, some: slice, which: Tensor | None = None) -> Tensor:
        """Return E[x1 | x_t] for points x (B, ...) at t (B,), over the data in the slice `some`: (B, ...).

        With `which`, bool (B, N), each point has its own choice of the data. The softmax is attention: the query is the scaled
        point, and the keys and values are the data. One term of the squared distance does not depend on the data. The softmax
        cancels this term, so the code leaves it out.
        """
        ratio = (path.alpha(t) / path.sigma(t))[:, None]
        query, data = ratio / path.sigma(t)[:, None] * x.flatten(1), self.data[some]
        bias = -(ratio**2) / 2 * self.squared_norms[some]
        if which is not None:
            bias = bias.masked_fill(~which, -torch.inf)
        mean = F.scaled_dot_product_attention(query[None], data[None], data[None], attn_mask=bias[None], scale=1.0)
        return mean.view_as(x)
