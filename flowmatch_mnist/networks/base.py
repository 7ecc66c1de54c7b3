"""The interface that training and sampling need from a network, and the parts that all networks share."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SPAN_FREQUENCY = 10.0
"""The highest angular frequency in the embedding of a span.

It is low because mean velocities are learned from their derivative, and the frequency multiplies this derivative."""


class TimeEmbedding(nn.Module):
    """Sines and cosines of t, then a two-layer perceptron: t (B,) in [0, 1] -> (B, dim).

    `features` is the number of sines and cosines together. Their angular frequencies are a geometric sequence from 1 to
    `max_frequency` radians per unit of t. Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.5, with t instead
    of the position.
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
    """A network f(x, t, y): x (B, *shape), t (B,) in [0, 1], y int64 (B,) -> the shape of x.

    The training decides whether the output is velocity, data or noise: see `flow.predictions`. A network with `spans` can also
    return the mean velocity from t to `until` along the trajectory through x: f(x, t, y, until), with `until` (B,) in [t, 1].
    See `flow.meanflow`.

    Args:
        classes: number of labels; label `classes` itself means "no label".
        embedding_dim: width of the embedding of time and label.
        spans: whether to learn mean velocities too. The embedding of the span starts at zero. So the network can start from the
            weights of a network without spans, and it then computes the same output.

    Attributes:
        arguments: plain values that build the network again; a checkpoint stores them with the weights.
        no_label: the label that means "no label"; the classes are 0 to no_label - 1.
        shape: the shape of one sample, for an image (channels, height, width).
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
        """Return the embedding of time, label and span, one vector for each sample: t, y, until (B,) -> (B, embedding_dim).

        Raises:
            ValueError: if `until` is given, but the network was built without spans.
        """
        # Compiled, the gradient of self.label(y) is a sum in no fixed order, because threads add at the same time.
        is_label = y[:, None] == torch.arange(self.no_label + 1, device=y.device)
        h = self.time(t) + (is_label[:, :, None] * self.label.weight).sum(1)
        if self.spans:
            h = h + self.span(torch.zeros_like(t) if until is None else until - t)
        elif until is not None:
            raise ValueError(f"this {type(self).__name__} predicts no mean velocities; build it with spans=True")
        return F.silu(h)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, until: Tensor | None = None) -> Tensor:
        """Return the prediction at x and t, given y: x (B, *shape), t, y (B,) -> (B, *shape).

        With `until` (B,), return the mean velocity from t to `until` along the trajectory through x.
        """
        raise NotImplementedError
