"""Densities of the training times t on (0, 1), and the fixed times of validation.

Each density is given by its quantile function. So one stratified draw of uniform random numbers works for all of them.
"""

import math

import torch
from torch import Tensor

from flowmatch_mnist.support.devices import widest_float


class TimeDensity:
    """A density of t on (0, 1)."""

    def quantile(self, u: Tensor) -> Tensor:
        """Return the t below which the fraction u of the density lies: u in (0, 1) -> t in (0, 1), same shape."""
        raise NotImplementedError

    def density(self, t: Tensor) -> Tensor:
        """Return the density at t in (0, 1), same shape: one over the slope of the quantile function where its value is t."""
        u = self._cumulative(t.detach()).requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.quantile(u).sum(), u)
        return (1 / slope).to(t.dtype)

    def _cumulative(self, t: Tensor) -> Tensor:
        """Return the inverse of the quantile function at t, by bisection in the widest float type of the device."""
        low, high = torch.zeros_like(t, dtype=widest_float(t.device)), torch.ones_like(t, dtype=widest_float(t.device))
        for _ in range(52):
            middle = (low + high) / 2
            below = self.quantile(middle) < t
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw `count` times in [1e-6, 1 - 1e-6], float32 (count,) on the generator's device.

        The draws of one batch are stratified: each draw follows the density, and together they cover it evenly. This lowers the
        variance of the loss (Kingma et al. 2021, "Variational Diffusion Models", appendix I.1). Apple's GPUs cannot compute the
        quantile function of `LogitNormal`.
        """
        offset = torch.rand((), generator=generator, device=generator.device)
        u = (torch.arange(count, device=generator.device) / count + offset) % 1
        return self.quantile(u).clamp(1e-6, 1 - 1e-6)  # float32 may round to 0 or 1


class Uniform(TimeDensity):
    """The uniform density: all times are equally likely."""

    def quantile(self, u: Tensor) -> Tensor:
        return u

    def density(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


class LogitNormal(TimeDensity):
    """logit(t) ~ Normal(location, scale^2): most times are in the middle, where the velocity is hardest to predict.

    Source: Esser et al. 2024 (Stable Diffusion 3), section 3.1. A higher location moves the times towards the data.

    Raises:
        ValueError: if `scale` is not positive.
    """

    def __init__(self, location: float = 0.0, scale: float = 1.0) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"the scale of LogitNormal must be positive, got {scale}")
        self.location = location
        self.scale = scale

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.location + self.scale * torch.special.ndtri(u))

    def density(self, t: Tensor) -> Tensor:
        z = (torch.logit(t) - self.location) / self.scale
        return torch.exp(-(z**2) / 2) / (math.sqrt(2 * math.pi) * self.scale * t * (1 - t))


class Mode(TimeDensity):
    """More times in the middle if scale > 0, more at the ends if scale < 0. The density is positive; scale 0 is uniform.

    Source: Esser et al. 2024 (Stable Diffusion 3), section 3.1, equation 20. Their time runs in the other direction.

    Raises:
        ValueError: if `scale` is not in [-1, 2 / (pi - 2)], which is about [-1, 1.752].
    """

    def __init__(self, scale: float = 1.29) -> None:
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise ValueError(f"the scale of Mode must lie in [-1, {2 / (math.pi - 2):.3f}], got {scale}")
        self.scale = scale

    def quantile(self, u: Tensor) -> Tensor:
        return (1 + self.scale) * u - self.scale * torch.sin(math.pi / 2 * u) ** 2


class Cosine(TimeDensity):
    """The times that give the linear path the signal-to-noise ratios of the cosine path at uniform times.

    Source: Esser et al. 2024 (Stable Diffusion 3), section 3.1, equation 21 ("CosMap").
    """

    def quantile(self, u: Tensor) -> Tensor:
        alpha, sigma = torch.sin(math.pi / 2 * u), torch.cos(math.pi / 2 * u)
        return alpha / (alpha + sigma)

    def density(self, t: Tensor) -> Tensor:
        return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


def fixed_times(batch_index: int, positions: Tensor) -> Tensor:
    """Return the times of validation, the same in every epoch and run: positions (B,) in the global batch -> t (B,) in [0, 1).

    Multiples of the golden ratio modulo 1 cover [0, 1) evenly for any number of times (Weyl's sequence). Multiples of another
    irrational number shift the times from batch to batch. Within a batch, the times depend only on the position in the global
    batch, so they do not change with the number of processes.
    """
    golden, root_two = 0.6180339887498949, 1.4142135623730951
    return ((positions.to(widest_float(positions.device)) * golden + batch_index * root_two) % 1).float()
