"""The one oracle of the mathematics: data N(MEAN, SPREAD^2) in every pixel, whose flow is known in closed form.

Along any path the state is x_t = alpha m + sqrt(alpha^2 s^2 + sigma^2) z with a z that does not change.
"""

import torch

from flowmatch_mnist.flow.paths import PATHS, match_dims
from flowmatch_mnist.networks.base import Network

MEAN, SPREAD = 0.7, 0.3


class Gaussian:
    """The exact prediction of a path's network: what an infinitely long training on such data would end in."""

    def __init__(self, path, prediction, mean=MEAN, spread=SPREAD):
        self.path, self.prediction, self.mean, self.spread = path, prediction, mean, spread

    def pair(self, x, t):
        """E[x0 | x_t], E[x1 | x_t]: linear regression of jointly Gaussian variables."""
        alpha, sigma = match_dims(self.path.alpha(t), x), match_dims(self.path.sigma(t), x)
        variance = alpha**2 * self.spread**2 + sigma**2
        centred = x - alpha * self.mean
        return sigma / variance * centred, self.mean + alpha * self.spread**2 / variance * centred

    def velocity(self, x, t):
        """dx/dt = alpha' m + r'/r (x - alpha m) with r^2 = alpha^2 s^2 + sigma^2: Lipman et al. 2022, theorem 3."""
        alpha, sigma = match_dims(self.path.alpha(t), x), match_dims(self.path.sigma(t), x)
        alpha_dot, sigma_dot = match_dims(self.path.alpha_dot(t), x), match_dims(self.path.sigma_dot(t), x)
        slope = (alpha * alpha_dot * self.spread**2 + sigma * sigma_dot) / (alpha**2 * self.spread**2 + sigma**2)
        return alpha_dot * self.mean + slope * (x - alpha * self.mean)

    def score(self, x, t):
        """The gradient of log N(x; alpha m, r^2)."""
        alpha, sigma = match_dims(self.path.alpha(t), x), match_dims(self.path.sigma(t), x)
        return -(x - alpha * self.mean) / (alpha**2 * self.spread**2 + sigma**2)

    def __call__(self, x, t):
        x0, x1 = self.pair(x, t)
        return {"velocity": self.velocity(x, t), "data": x1, "noise": x0}[self.prediction]


class Averaged(Network):
    """The exact mean velocity of a Gaussian's flow, whose trajectories are x_t = t m + r(t) z with r^2 = t^2 s^2 + (1 - t)^2.

    Args:
        off: what is added to it, times the span, to be wrong.
    """

    shape = (1, 2, 2)

    def __init__(self, off=0.0):
        super().__init__(classes=10, embedding_dim=4, spans=True)
        self.off = off
        self.velocity = Gaussian(PATHS["linear"], "velocity")

    def forward(self, x, t, y, until=None):
        if until is None:
            return self.velocity(x, t)
        start, end = match_dims(t, x), match_dims(until, x)
        z = (x - start * MEAN) / torch.hypot(start * SPREAD, 1 - start)
        span = end - start
        away = end * MEAN + torch.hypot(end * SPREAD, 1 - end) * z - x
        return torch.where(span > 0, away / span.clamp(min=1e-12), self.velocity(x, t)) + self.off * span
