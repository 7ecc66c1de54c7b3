"""What a network must offer to be trained and sampled as a velocity field."""

from typing import Any

from torch import Tensor, nn


class VelocityField(nn.Module):
    """A network v(x, t, y), called with x (B, *image_shape), t (B,) in [0, 1], y int64 (B,); returns the shape of x.

    Attributes:
        arguments: plain values that build the network again; a checkpoint keeps them beside the weights.
        no_label: the label that means "no label"; the classes are 0 to no_label - 1.
        image_shape: (channels, height, width).
    """

    arguments: dict[str, Any]
    no_label: int
    image_shape: tuple[int, int, int]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The velocity at x and t, given y."""
        raise NotImplementedError
