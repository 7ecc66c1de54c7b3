"""What a network must offer to be trained and sampled, and what networks share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SPAN_FREQUENCY = 10.0
"""The highest in the embedding of a span: mean velocities are learned by their derivative, which it multiplies."""


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


class Network(nn.Module):
    """A network f(x, t, y), called with x (B, *shape), t (B,) in [0, 1], y int64 (B,); returns the shape of x.

    What it puts out, velocity, data or noise, is for the training to say: see `flow.predictions`. One that `spans` can also
    be asked for the mean velocity on the way from x: f(x, t, y, until), with `until` (B,) in [t, 1]; see `flow.meanflow`.

    Args:
        classes: number of labels; label `classes` itself means "no label".
        embedding_dim: width of the embedding of time and label.
        spans: whether to learn mean velocities too. What takes in the span of time starts at zero, so that such a network
            begins as the one without, whose weights it can start from.

    Attributes:
        arguments: plain values that build the network again; a checkpoint keeps them beside the weights.
        no_label: the label that means "no label"; the classes are 0 to no_label - 1.
        shape: of one sample; (channels, height, width) of an image.
    """

    arguments: dict[str, Any]
    no_label: int
    shape: tuple[int, ...]

    def __init__(self, classes: int, embedding_dim: int, spans: bool) -> None:
        super().__init__()
        self.no_label = classes
        self.spans = spans
        self.time = TimeEmbedding(embedding_dim)
        self.label = nn.Embedding(classes + 1, embedding_dim)
        if spans:
            self.span = TimeEmbedding(embedding_dim, max_frequency=SPAN_FREQUENCY)
            for parameter in self.span.mlp[-1].parameters():
                nn.init.zeros_(parameter)

    def embed(self, t: Tensor, y: Tensor, until: Tensor | None) -> Tensor:
        """Time, label and span as one vector: t, y, until (B,) -> (B, embedding_dim).

        Raises:
            ValueError: if there is an `until` for a network that does not span.
        """
        h = self.time(t) + self.label(y)
        if self.spans:
            h = h + self.span(torch.zeros_like(t) if until is None else until - t)
        elif until is not None:
            raise ValueError(f"this {type(self).__name__} knows no mean velocities; make it with spans")
        return F.silu(h)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, until: Tensor | None = None) -> Tensor:
        """The prediction at x and t, given y; with `until`, the mean of the velocities from t to there, on the way from x."""
        raise NotImplementedError
