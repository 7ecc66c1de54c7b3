"""The exact field of a finite set of data: what the targets of flow matching scatter around.

Many pairs (x0, x1) lead through the same point x_t, and the network learns the mean of their targets. Where data are drawn from
a finite set, and noise is Gaussian and knows nothing of them, that mean can be written down. It is a softmax over the set:

    E[x1 | x_t, y] = sum_i w_i x1_i    with    w = softmax_i -|x_t - alpha_t x1_i|^2 / (2 sigma_t^2)    over the i of class y
    E[x0 | x_t, y] = (x_t - alpha_t E[x1 | x_t, y]) / sigma_t

Velocity, data and noise are linear in the pair. So the mean of the pairs gives the mean of the targets, whatever is predicted.

Early, many data weigh in, and the mean is what a network should learn. Late, one of them has all the weight: the exact field
leads back to the training data themselves, and a network that draws others is better than that.

Sources: Xu, Tong and Jaakkola 2023, "Stable Target Field for Reduced Variance Score Estimation in Diffusion Models" (as a
target); Bertrand et al. 2025, "On the Closed-Form of Flow Matching: Generalization Does Not Arise from Target Stochasticity".
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmatch_mnist.flow.paths import ProbabilityPath, match_dims
from flowmatch_mnist.flow.predictions import pair
from flowmatch_mnist.support.devices import full_float32


class ExactField:
    """The mean of all pairs through a point.

    Args:
        x1: the data, as the network sees them, float32 (N, ...).
        y: their labels, int64 (N,), from 0.
    """

    def __init__(self, x1: Tensor, y: Tensor) -> None:
        order = y.argsort()
        self.data, self.labels = x1[order].flatten(1), y[order]
        self.squares = self.data.square().sum(1)
        self.counts = y.bincount().tolist()

    @torch.no_grad()
    @full_float32()
    def pairs(
        self, path: ProbabilityPath, x0: Tensor, x1: Tensor, y: Tensor, t: Tensor, until: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The pairs, those before t = until replaced by the means of all pairs that lead through the same points.

        Those whose label is none of the data's stay as they are: x0, x1 (B, ...), y, t (B,) -> (B, ...) each.
        """
        x_t = path.point(x0, x1, t)
        early = (t < until) & (y < len(self.counts))
        device = x1.device.type
        # Asked first: not every kind of device knows autocast.
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            if device == "cpu":  # each class by itself, and only for the points that ask for it
                means, start = x1.clone(), 0
                for label, count in enumerate(self.counts):
                    rows = (early & (y == label)).nonzero().flatten()
                    if len(rows):
                        means[rows] = self._mean(path, x_t[rows], t[rows], slice(start, start + count))
                    start += count
            else:  # all at once: a GPU would have to be waited for to know which points ask for which class
                means = self._mean(path, x_t, t, slice(None), self.labels == y[:, None])
        noise, _ = pair("data", path, means, x_t, t)
        chosen = match_dims(early, x1)
        return torch.where(chosen, noise, x0), torch.where(chosen, means, x1)

    def _mean(self, path: ProbabilityPath, x: Tensor, t: Tensor, some: slice, which: Tensor | None = None) -> Tensor:
        """E[x1 | x_t] over some of the data, or over `which` of them (B, N), for points x (B, ...) at t (B,): (B, ...).

        It is attention. The query is the point; the keys and values are the data. Of the squared distance, what does not depend
        on the data leaves the softmax as it is.
        """
        ratio = (path.alpha(t) / path.sigma(t))[:, None]
        query, data = ratio / path.sigma(t)[:, None] * x.flatten(1), self.data[some]
        bias = -(ratio**2) / 2 * self.squares[some]
        if which is not None:
            bias = bias.masked_fill(~which, -torch.inf)
        mean = F.scaled_dot_product_attention(query[None], data[None], data[None], attn_mask=bias[None], scale=1.0)
        return mean.view_as(x)
