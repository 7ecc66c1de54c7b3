"""Where in time training looks: densities of t on (0, 1), and the fixed times of validation.

A density is given by its quantile function, so that one stratified draw of uniform numbers serves them all.
"""

import math

import torch
from torch import Tensor

from flowmatch_mnist.support.devices import widest_float


class TimeDensity:
    """A density of t on (0, 1).

    Attributes:
        support: from where to where validation looks, evenly.
    """

    support = (0.0, 1.0)

    def quantile(self, u: Tensor) -> Tensor:
        """The t below which the fraction u of the density lies: u in (0, 1) -> t in (0, 1), same shape."""
        raise NotImplementedError

    def density(self, t: Tensor) -> Tensor:
        """The density at t in (0, 1), same shape: one over the slope of the quantile function, where that reaches t."""
        u = self._cumulative(t.detach()).requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.quantile(u).sum(), u)
        return (1 / slope).to(t.dtype)

    def _cumulative(self, t: Tensor) -> Tensor:
        """The inverse of the quantile function, by bisection in the widest float there is."""
        low, high = torch.zeros_like(t, dtype=widest_float(t.device)), torch.ones_like(t, dtype=widest_float(t.device))
        for _ in range(52):
            middle = (low + high) / 2
            below = self.quantile(middle) < t
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw `count` times, float32 (count,) on the generator's device; Apple's GPUs lack the quantile of `LogitNormal`.

        The draws of one batch are stratified: each is distributed as the density, and together they cover it evenly, which
        lowers the variance of the loss (Kingma et al. 2021, "Variational Diffusion Models", appendix I.1).
        """
        offset = torch.rand((), generator=generator, device=generator.device)
        u = (torch.arange(count, device=generator.device) / count + offset) % 1
        return self.quantile(u).clamp(1e-6, 1 - 1e-6)  # fp32 may round to an end


class Uniform(TimeDensity):
    """All times alike."""

    def quantile(self, u: Tensor) -> Tensor:
        return u

    def density(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class Start(TimeDensity):
    """No time but t = 0, where all is noise: to learn the whole way in one step of Euler's, from pairs that belong together.

    It has no density, so that the loss cannot be weighted.
    """

    support = (0.0, 0.0)

    def quantile(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u)

    def density(self, t: Tensor) -> Tensor:
        raise ValueError("there is no density of the single time 0; leave out the weighting")


class LogitNormal(TimeDensity):
    """logit(t) ~ Normal(location, scale^2): most weight at middle times, where the velocity is hardest to predict.

    Source: Esser et al. 2024 (Stable Diffusion 3), section 3.1. A higher location looks nearer to the data.
    """

    def __init__(self, location: float = 0.0, scale: float = 1.0) -> None:
        if scale <= 0:
            raise ValueError(f"the scale of LogitNormal must be positive, got {scale}")
        self.location = location
        self.scale = scale

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.location + self.scale * torch.special.ndtri(u))

    def density(self, t: Tensor) -> Tensor:
        z = (torch.logit(t) - self.location) / self.scale
        return torch.exp(-(z**2) / 2) / (math.sqrt(2 * math.pi) * self.scale * t * (1 - t))


class Mode(TimeDensity):
    """Heavier in the middle with scale > 0, at the ends with scale < 0, and positive everywhere; scale 0 is uniform.

    Source: Esser et al. 2024 (Stable Diffusion 3), section 3.1, equation 20, with their time running the other way.
    """

    def __init__(self, scale: float = 1.29) -> None:
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise ValueError(f"the scale of Mode must lie in [-1, {2 / (math.pi - 2):.3f}], got {scale}")
        self.scale = scale

    def quantile(self, u: Tensor) -> Tensor:
        return (1 + self.scale) * u - self.scale * torch.sin(math.pi / 2 * u) ** 2


class Cosine(TimeDensity):
    """The times at which the linear path has the signal-to-noise ratios that the cosine path has at uniform times.

    Source: Esser et al. 2024 (Stable Diffusion 3), section 3.1, equation 21 ("CosMap").
    """

    def quantile(self, u: Tensor) -> Tensor:
        alpha, sigma = torch.sin(math.pi / 2 * u), torch.cos(math.pi / 2 * u)
        return alpha / (alpha + sigma)

    def density(self, t: Tensor) -> Tensor:
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


def fixed_times(batch_index: int, positions: Tensor) -> Tensor:
    """The times of validation, the same in every epoch and run: positions (B,) in the global batch -> t (B,) in [0, 1).

    Multiples of the golden ratio modulo 1 cover [0, 1) evenly however many are taken (Weyl's sequence); another irrational
    shifts them from batch to batch. Depending on the position in the global batch alone, they do not change with the number
    of processes.
    """
    golden, root_two = 0.6180339887498949, 1.4142135623730951
    return ((positions.to(widest_float(positions.device)) * golden + batch_index * root_two) % 1).float()
