"""Grey levels as real numbers with a density: dequantisation, on a linear or a logit scale.

A pixel has only 256 grey levels, and a density could become infinite at these 256 points. So a level v in 0..255 stands for
the cell [v, v + 1), and gets noise u, uniform in [0, 1). The mean over u of the log-density of v + u is a lower bound of the
level's own log-probability (Theis, van den Oord and Bethge 2016, "A Note on the Evaluation of Generative Models", section
3.1). So bits per dimension can be compared between the two scales.

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
"""A tolerance for float32's rounding errors, in grey levels. At u = 0, a cell's border, they would decide the level."""


class Pixels:
    """A scale of the pixels: x1 is an increasing function of v + u, a level plus its noise.

    Levels are uint8, and noise is float in [0, 1), both of one shape. The methods compute in the type of the noise.

    Attributes:
        name: the scale's name in configs and files.
    """

    name: PixelsName

    def encode(self, images: Tensor, u: Tensor | None = None) -> Tensor:
        """Return images uint8 (B, H, W) as the network's x (B, 1, H, W). Without u, each level is in the middle of its cell."""
        return self.forward(images, 0.5 if u is None else u)[:, None]

    def decode(self, x: Tensor) -> Tensor:
        """Return the images uint8 (B, H, W) that are nearest to the network's x (B, 1, H, W)."""
        return self.inverse(x).flatten(1, 2)

    def forward(self, levels: Tensor, u: Tensor | float = 0.5) -> Tensor:
        """Return the x1 of each pixel, by default for the middle of its cell: (...) -> (...)."""
        raise NotImplementedError

    def inverse(self, x: Tensor) -> Tensor:
        """Return the level of the cell that contains x, or else the nearest level: float (...) -> uint8 (...)."""
        return (self._grey(x) + ROUNDING).floor().clamp(0, 255).to(torch.uint8)

    def log_slope(self, levels: Tensor, u: Tensor) -> Tensor:
        """Return log |d x1 / d (v + u)| of each image, summed over its pixels: (N, ...) -> (N,)."""
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

    Four of five pixels are black. On the linear scale, black fills 1/256 of the width, and no network is that steep. On
    this scale, the logit of black is -log 256 + log u, with mean -6.5 and standard deviation 1. White has the mirror image,
    with mean 6.5. So a scale of 6.5 puts black and white at -1 and 1, each with a standard deviation of 0.15. MNIST's root mean
    square is then 0.94; it is 0.96 on the linear scale.

    Args:
        alpha: keeps the logit at u = 0 finite. It is far below a cell's width, 1/256: it moves the mean of black by 0.002.
        scale: the divisor of the logits.
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
        """Return p and 1 - p. Neither is computed as a difference from 1, because that would lose most of its precision."""
        width = (1 - 2 * self.alpha) / 256
        return self.alpha + width * (levels + u), self.alpha + width * ((255 - levels) + (1 - u))

    def _grey(self, x: Tensor) -> Tensor:
        return (torch.sigmoid(self.scale * x) - self.alpha) / (1 - 2 * self.alpha) * 256


PIXELS: dict[PixelsName, Pixels] = {"linear": LinearPixels(), "logit": LogitPixels()}
"""The scales by name."""


def dequantization(seed: int, numbers: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Return uniform noise in [0, 1) for the images with these numbers, each from its own stream: float32 (images, *shape)."""
    return torch.stack([torch.rand(shape, generator=streams.generator("cpu", seed, "dequantization", n)) for n in numbers])


def dequantize(
    images: Tensor, pixels: Pixels = PIXELS["linear"], *, seed: int = 0, numbers: Iterable[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Return images of bytes as points that have a density.

    Args:
        images: uint8 (N, H, W), on the CPU.
        pixels: the scale.
        seed: random seed of the noise that each grey level gets.
        numbers: the images' numbers; 0, 1, ... by default. An image's noise depends only on the seed and its number.

    Returns:
        x1 float32 (N, 1, H, W), and `log_slope` float64 (N,) for `bits_per_dimension`.
    """
    u = dequantization(seed, range(len(images)) if numbers is None else numbers, tuple(images.shape[1:])).double()
    return pixels.encode(images, u).float(), pixels.log_slope(images, u)


def bits_per_dimension(log_p: Tensor, log_slope: Tensor, dimensions: int) -> Tensor:
    """Return bits per dimension: an upper bound of the bits that a pixel's grey level takes.

    It is an upper bound, because the mean log-density is a lower bound of the level's log-probability: see the module. The
    density of the grey levels is p(x1) times the derivative of x1 with respect to the level. On the linear scale, the
    derivative adds log2 127.5 bits.

    Args:
        log_p: log p(x1) in nats, (N,).
        log_slope: (N,), as `dequantize` returns it.
        dimensions: the dimensions of x1, which are the pixels of an image.

    Returns:
        Bits per dimension, (N,).
    """
    return -(log_p + log_slope) / (dimensions * math.log(2))
