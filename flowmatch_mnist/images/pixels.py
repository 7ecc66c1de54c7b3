"""Grey levels as real numbers with a density: dequantisation, on a linear or a logit scale.

A density may not be asked at points of which there are only 256: it could be infinite there. So a level v in 0..255 stands
for the cell [v, v + 1), and gets noise u, uniform in [0, 1). A density of v + u is, averaged over u, a lower bound of the
level's own log-probability (Theis, van den Oord and Bethge 2016, "A Note on the Evaluation of Generative Models", section
3.1), so bits per dimension on either scale can be compared.

Sources: Uria, Murray and Larochelle 2013, "RNADE", section 4.1 (uniform dequantisation); Dinh et al. 2017, "Density
Estimation Using Real NVP", section 4.1 (the logit); Papamakarios et al. 2017, "Masked Autoregressive Flow", section 4.3 and
appendix D (alpha = 1e-6 for MNIST).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flowmatch_mnist.support import streams

PixelsName = Literal["linear", "logit"]

ROUNDING = 1e-4
"""In grey levels: what float32 may lose on the way. At u = 0, on the border of two cells, it would decide the level."""


class Pixels:
    """A scale of the pixels: x1 as a rising function of v + u, a level and its noise.

    All take levels uint8 and noise float in [0, 1) of one shape, and compute in the type of the noise.

    Attributes:
        name: of the scale, in configs and files.
    """

    name: PixelsName

    def encode(self, images: Tensor, u: Tensor | None = None) -> Tensor:
        """Images uint8 (B, H, W), each level at u or in the middle of its cell, as the network sees them: (B, 1, H, W)."""
        return self.forward(images, 0.5 if u is None else u)[:, None]

    def decode(self, x: Tensor) -> Tensor:
        """The images uint8 (B, H, W) that are nearest to the network's x (B, 1, H, W)."""
        return self.inverse(x).flatten(1, 2)

    def forward(self, levels: Tensor, u: Tensor | float = 0.5) -> Tensor:
        """The x1 of each pixel, by default of the middle of its cell: (...) -> (...)."""
        raise NotImplementedError

    def inverse(self, x: Tensor) -> Tensor:
        """The level in whose cell x lies, the nearest one outside of all: float (...) -> uint8 (...)."""
        return (self._grey(x) + ROUNDING).floor().clamp(0, 255).to(torch.uint8)

    def log_slope(self, levels: Tensor, u: Tensor) -> Tensor:
        """The log |d x1 / d (v + u)| of each image, summed over its pixels: (N, ...) -> (N,)."""
        raise NotImplementedError

    def _grey(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class LinearPixels(Pixels):
    """x1 = (v + u - 1/2) / 127.5 - 1: from -1 to 1 at u = 1/2."""

    name = "linear"

    def forward(self, levels: Tensor, u: Tensor | float = 0.5) -> Tensor:
        return (levels + u - 0.5) / 127.5 - 1

    def log_slope(self, levels: Tensor, u: Tensor) -> Tensor:
        return torch.full_like(u.flatten(1), -math.log(127.5)).sum(1)

    def _grey(self, x: Tensor) -> Tensor:
        return (x + 1) * 127.5 + 0.5


@dataclass(frozen=True)
class LogitPixels(Pixels):
    """x1 = logit(p) / scale, with p = alpha + (1 - 2 alpha) (v + u) / 256.

    On the linear scale black, four pixels out of five, fills 1/256 of the width; a network cannot be so steep. Here black and
    white have the logits -log 256 + log u and its mirror image, of mean -6.5 and 6.5 and spread 1. So a scale of 6.5 puts them
    at -1 and 1, each with a spread of 0.15. MNIST's root mean square is then 0.94; it is 0.96 on the linear scale.

    Args:
        alpha: keeps the logit of u = 0 finite. It is far below the 1/256 of a cell: it moves the mean of black by 0.002.
        scale: of the logits.
    """

    name = "logit"
    alpha: float = 1e-6
    scale: float = 6.5

    def forward(self, levels: Tensor, u: Tensor | float = 0.5) -> Tensor:
        p, q = self._shares(levels, u)
        return (p.log() - q.log()) / self.scale

    def log_slope(self, levels: Tensor, u: Tensor) -> Tensor:
        p, q = self._shares(levels, u)
        slope = (1 - 2 * self.alpha) / (256 * self.scale * p * q)
        return slope.log().flatten(1).sum(1)

    def _shares(self, levels: Tensor, u: Tensor | float) -> tuple[Tensor, Tensor]:
        """The p and 1 - p, neither as a difference from 1, of which little would be left."""
        width = (1 - 2 * self.alpha) / 256
        return self.alpha + width * (levels + u), self.alpha + width * ((255 - levels) + (1 - u))

    def _grey(self, x: Tensor) -> Tensor:
        return (torch.sigmoid(self.scale * x) - self.alpha) / (1 - 2 * self.alpha) * 256


PIXELS: dict[PixelsName, Pixels] = {"linear": LinearPixels(), "logit": LogitPixels()}
"""The scales by their names."""


def dequantization(seed: int, numbers: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Uniform noise in [0, 1) for the images of these numbers, from a stream for each: float32 (images, *shape)."""
    return torch.stack([torch.rand(shape, generator=streams.generator("cpu", seed, "dequantization", n)) for n in numbers])


def dequantize(
    images: Tensor, pixels: Pixels = PIXELS["linear"], *, seed: int = 0, numbers: Iterable[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Images of bytes as points that have a density.

    Args:
        images: uint8 (N, H, W), on the CPU.
        pixels: the scale.
        seed: of the noise of each grey level.
        numbers: of the images, 0, 1, ... by default: an image's noise depends on the seed and its number alone.

    Returns:
        x1 float32 (N, 1, H, W), and `log_slope` float64 (N,) for `bits_per_dimension`.
    """
    u = dequantization(seed, range(len(images)) if numbers is None else numbers, tuple(images.shape[1:])).double()
    return pixels.encode(images, u).float(), pixels.log_slope(images, u)


def bits_per_dimension(log_p: Tensor, log_slope: Tensor, dimensions: int) -> Tensor:
    """The bits that a pixel's grey level takes: an upper bound, for the noise that made it real says nothing.

    The density of the grey levels is p(x1) times the slope of x1 by the level; on the linear scale that adds log2 127.5 bits.

    Args:
        log_p: of x1 in nats (N,).
        log_slope: (N,), as `dequantize` returns it.
        dimensions: of x1: pixels of an image.

    Returns:
        (N,).
    """
    return -(log_p + log_slope) / (dimensions * math.log(2))
