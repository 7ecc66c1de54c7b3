"""A teacher: a trained network that gives a student the guided velocity at any point."""

import math

import torch
from torch import Tensor

from flowmatch_mnist.flow.guidance import guide
from flowmatch_mnist.networks.base import Network


class Teacher:
    """A trained network and its guidance. The student learns the guided velocity, so its own sampling needs no guidance.

    Args:
        teacher: trained weights, a file or a name of weights in the package; None means no teacher. This argument is only a
            name: the training code loads the teacher's network and sets `net`.
        guidance: the guidance scale.
        guidance_interval: the first and the last t at which the guidance acts.
        guidance_power: the power of the guidance, see `guidance.guide`; at least 0.

    Attributes:
        net: the teacher's network, which predicts the velocity of the linear path, or None.

    Raises:
        ValueError: if a number is out of its range, or if there is guidance without a teacher.
    """

    def __init__(
        self, teacher: str | None, guidance: float, guidance_interval: tuple[float, float], guidance_power: float
    ) -> None:
        if guidance != 1 and teacher is None:
            raise ValueError(f"guidance {guidance:g} changes the velocity of a teacher; set teacher, or set guidance to 1")
        start, end = guidance_interval
        if not 0 <= start < end <= 1:
            raise ValueError(f"guidance_interval must lie in [0, 1] and rise, got {start} to {end}")
        if not 0 <= guidance_power < math.inf:
            raise ValueError(f"guidance_power must be at least 0, and finite, got {guidance_power}")
        self.teacher = teacher
        self.guidance = guidance
        self.guidance_interval = guidance_interval
        self.guidance_power = guidance_power
        self.net: Network | None = None

    def velocity(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the teacher's guided velocity: points x_t (B, ...), times t and labels y (B,) -> (B, ...).

        Raises:
            ValueError: if `net` is not set.
        """
        if self.net is None:
            raise ValueError(f"the teacher {self.teacher} was not loaded; set `net` to its network")
        start, end = self.guidance_interval
        scale = torch.where((start <= t) & (t <= end), self.guidance, 1.0)
        return guide(self.net, x_t, t, y, 1.0 if self.guidance == 1 else scale, power=self.guidance_power)
