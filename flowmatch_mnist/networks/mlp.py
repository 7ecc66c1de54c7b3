"""A network for points in the plane. The first lessons use it: `configs/toy.yaml` and `configs/toy_prompted.yaml`."""

import torch.nn.functional as F
from torch import Tensor, nn

from flowmatch_mnist.networks.base import Network


class MLP(Network):
    """A multi-layer perceptron with residual layers, each scaled and shifted by the embedding of time and label.

    Args:
        dim: number of coordinates of a point.
        width: width of the hidden layers.
        layers: number of residual layers.
        classes: number of labels; label `classes` itself means "no label".
        spans: whether to learn mean velocities too, see `flow.meanflow`.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(self, dim: int = 2, width: int = 128, layers: int = 3, classes: int = 1, spans: bool = False) -> None:
        super().__init__(classes, width, spans)
        if min(dim, width, layers, classes) < 1:
            raise ValueError(f"dim, width, layers and classes must be positive, got {dim}, {width}, {layers} and {classes}")
        self.arguments = {"dim": dim, "width": width, "layers": layers, "classes": classes, "spans": spans}
        self.shape = (dim,)
        self.first = nn.Linear(dim, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.modulation = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.last = nn.Linear(width, dim)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, until: Tensor | None = None) -> Tensor:
        """Return the prediction at x (B, dim), t (B,) in [0, 1], y (B,) in 0..classes, until (B,) in [t, 1]: (B, dim)."""
        embedding = self.embed(t, y, until)
        h = self.first(x)
        for layer, modulation in zip(self.hidden, self.modulation, strict=True):
            scale, shift = modulation(embedding).chunk(2, dim=1)
            h = h + layer(F.silu(h * (1 + scale) + shift))
        return self.last(F.silu(h))
