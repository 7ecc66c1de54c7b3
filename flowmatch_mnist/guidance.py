"""Classifier-free guidance: one network, with and without its label.

Source: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance"; for flows, Zheng et al. 2023, "Guided Flows".
"""

import torch
from torch import Tensor

from flowmatch_mnist.field import VelocityField


def drop_labels(y: Tensor, probability: float, no_label: int, generator: torch.Generator) -> Tensor:
    """Replace each label, by its own throw of the dice, by `no_label`: y (B,) -> (B,)."""
    dropped = torch.rand(y.shape, generator=generator, device=generator.device) < probability
    return y.masked_fill(dropped, no_label)


class GuidedVelocity:
    """The velocity with the labels y (B,) bound: v_uncond + scale (v_cond - v_uncond).

    Scale 1 is off, and 0 unconditional: either costs one evaluation of the network for each sample. Any other scale costs
    two, taken in one batch of twice the size.

    Attributes:
        evaluations: network evaluations for each sample so far (NFE); guidance counts twice.
    """

    def __init__(self, net: VelocityField, y: Tensor, scale: float) -> None:
        self.net = net
        self.scale = scale
        self.evaluations = 0
        nothing = torch.full_like(y, net.no_label)
        self.labels = y if scale == 1 else nothing if scale == 0 else torch.cat([y, nothing])

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        copies = len(self.labels) // len(x)
        self.evaluations += copies
        v = self.net(torch.cat([x] * copies), t.expand(len(self.labels)), self.labels)
        if copies == 1:
            return v
        with_label, without = v.chunk(2)
        return without + self.scale * (with_label - without)
