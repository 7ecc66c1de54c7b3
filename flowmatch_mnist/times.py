"""Where in time training looks: densities of t on (0, 1), and the fixed times of validation.

A density is given by its quantile function, so that one stratified draw of uniform numbers serves them all.
"""

import torch
from torch import Tensor


class TimeDensity:
    """A density of t on (0, 1)."""

    def quantile(self, u: Tensor) -> Tensor:
        """The t below which the fraction u of the density lies: u in (0, 1) -> t in (0, 1), same shape."""
        raise NotImplementedError

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw `count` times, float32 (count,) on the generator's device.

        The draws of one batch are stratified: each is distributed as the density, and together they cover it evenly, which
        lowers the variance of the loss (Kingma et al. 2021, "Variational Diffusion Models", appendix I.1).
        """
        offset = torch.rand((), generator=generator, device=generator.device)
        u = (torch.arange(count, device=generator.device) / count + offset) % 1
        # A quantile may be infinite at 0, and at the 1 that fp32 can round up to.
        return self.quantile(u.clamp(1e-6, 1 - 1e-6))


class Uniform(TimeDensity):
    """All times alike."""

    def quantile(self, u: Tensor) -> Tensor:
        return u


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


def fixed_times(batch_index: int, positions: Tensor) -> Tensor:
    """The times of validation, the same in every epoch and run: positions (B,) in the global batch -> t (B,) in [0, 1).

    Multiples of the golden ratio modulo 1 cover [0, 1) evenly however many are taken (Weyl's sequence); another irrational
    shifts them from batch to batch. Depending on the position in the global batch alone, they do not change with the number
    of processes.
    """
    golden, root_two = 0.6180339887498949, 1.4142135623730951
    return ((positions.double() * golden + batch_index * root_two) % 1).float()
