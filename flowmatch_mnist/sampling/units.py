"""What the numbers of a sample mean to a person, and what they are to the network.

A network sees numbers of about the size of its noise. A person sees grey levels from 0 to 255, or places in the plane.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from flowmatch_mnist.images.pixels import PIXELS

UnitsName = Literal["linear", "logit", "plane"]


class Units(Protocol):
    """The two directions between data and the network's numbers.

    Attributes:
        name: by which configs and files call them.
    """

    @property
    def name(self) -> UnitsName: ...

    def encode(self, data: Tensor, u: Tensor | None = None) -> Tensor:
        """Data (B, ...) as the network sees them (B, *shape); with u, dequantisation's noise, where the data are levels."""

    def decode(self, x: Tensor) -> Tensor:
        """The network's x (B, *shape) as data (B, ...)."""


@dataclass(frozen=True)
class Plane:
    """Places in the plane (B, 2). The network sees the plane shrunk by `scale`, so that its noise is standard normal."""

    name: UnitsName = "plane"
    scale: float = 2.0

    def encode(self, data: Tensor, u: Tensor | None = None) -> Tensor:
        return data / self.scale

    def decode(self, x: Tensor) -> Tensor:
        return x * self.scale


UNITS: dict[UnitsName, Units] = {"linear": PIXELS["linear"], "logit": PIXELS["logit"], "plane": Plane()}
"""The units by the names that files use."""
