"""The units of samples: data as a person sees them, and the same data as numbers for the network.

A network sees numbers of about the same size as its noise. A person sees grey levels from 0 to 255, or points in the plane.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from flowmatch_mnist.images.pixels import PIXELS

UnitsName = Literal["linear", "logit", "plane"]


class Units(Protocol):
    """Converts data to the network's numbers, and these numbers back to data.

    Attributes:
        name: the units' name in configs and files.
    """

    @property
    def name(self) -> UnitsName: ...

    def encode(self, data: Tensor, u: Tensor | None = None) -> Tensor:
        """Return data (B, ...) as the network's x (B, *shape). If the data are grey levels, u is the dequantisation noise."""

    def decode(self, x: Tensor) -> Tensor:
        """Return the network's x (B, *shape) as data (B, ...)."""


@dataclass(frozen=True)
class Plane:
    """Points in the plane (B, 2). The network sees the points divided by `scale`.

    So its standard normal noise has the standard deviation `scale` in the plane.
    """

    name: UnitsName = "plane"
    scale: float = 2.0

    def encode(self, data: Tensor, u: Tensor | None = None) -> Tensor:
        return data / self.scale

    def decode(self, x: Tensor) -> Tensor:
        return x * self.scale


UNITS: dict[UnitsName, Units] = {"linear": PIXELS["linear"], "logit": PIXELS["logit"], "plane": Plane()}
"""The units by their names in files."""
