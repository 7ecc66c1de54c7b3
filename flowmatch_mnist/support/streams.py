"""Randomness as a pure function of a key.

Each kind of draw (noise, times, label dropout, data order) has a stream of its own, named by a key such as
`(seed, "noise", step)`. Nothing depends on how often, or in which process, something else was drawn: a run that was killed and
resumed sees what the uninterrupted one would have, and several processes see together what one would see alone.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def seed(*key: int | str) -> int:
    """A 63-bit hash of the key."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator on `device` whose seed is the hash of the key."""
    return torch.Generator(device).manual_seed(seed(*key))


Draw = Callable[[int, torch.Generator], Tensor]
"""Makes so many draws from a generator, along the first dimension."""


@dataclass(frozen=True)
class Place:
    """Where in a run a training batch belongs.

    Attributes:
        step: how many batches went before.
        rank, ranks: which share of the global batch is this process's: every ranks-th sample, from the rank-th on.
    """

    step: int
    rank: int = 0
    ranks: int = 1

    def share(self, draw: Draw, count: int, device: torch.device, *key: int | str) -> Tensor:
        """This process's share, (count, ...), of what is drawn for the whole global batch from the stream (*key, step).

        Every process draws the whole batch and keeps its share, so results do not depend on the number of processes.

        Args:
            draw: how to draw.
            count: samples of the share, equally many in all processes.
            device: of the generator.
            key: of the stream.
        """
        return draw(count * self.ranks, generator(device, *key, self.step))[self.rank :: self.ranks]

    def normal(self, shape: Sequence[int], device: torch.device, *key: int | str) -> Tensor:
        """This process's share, float32 of this shape, of standard normal noise from the stream."""
        return self.share(lambda n, g: torch.randn(n, *shape[1:], generator=g, device=device), shape[0], device, *key)

    def uniform(self, shape: Sequence[int], device: torch.device, *key: int | str) -> Tensor:
        """This process's share, float32 of this shape, of uniform numbers in [0, 1) from the stream."""
        return self.share(lambda n, g: torch.rand(n, *shape[1:], generator=g, device=device), shape[0], device, *key)
