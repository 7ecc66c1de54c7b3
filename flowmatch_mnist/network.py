"""What a network must offer to be trained and sampled, and what networks share."""

from typing import Any

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """A network f(x, t, y), called with x (B, *shape), t (B,) in [0, 1], y int64 (B,); returns the shape of x.

    What it puts out, velocity, data or noise, is for the training to say: see `convert.Prediction`.

    Attributes:
        arguments: plain values that build the network again; a checkpoint keeps them beside the weights.
        no_label: the label that means "no label"; the classes are 0 to no_label - 1.
        shape: of one sample; (channels, height, width) of an image.
    """

    arguments: dict[str, Any]
    no_label: int
    shape: tuple[int, ...]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The prediction at x and t, given y."""
        raise NotImplementedError


class TimeEmbedding(nn.Module):
    """Sines and cosines of t, then a two-layer perceptron: t (B,) in [0, 1] -> (B, dim).

    The angular frequencies run geometrically from 1 to `max_frequency` radians per unit of t: Vaswani et al. 2017,
    section 3.5, with t in place of the position.
    """

    frequencies: Tensor

    def __init__(self, dim: int, features: int = 64, max_frequency: float = 100.0) -> None:
        super().__init__()
        exponents = torch.linspace(0, 1, features // 2)
        self.register_buffer("frequencies", max_frequency**exponents, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None].float() * self.frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
