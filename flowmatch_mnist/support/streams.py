"""Randomness as a pure function of a key.

Each kind of draw (noise, times, label dropout, data order) has its own stream. A key such as `(seed, "noise", step)` names the
stream. A draw does not depend on other draws: neither on their number, nor on the process that made them. So a run that was
killed and resumed sees the same numbers as an uninterrupted run, and several processes together see the same numbers as one.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def seed(*key: int | str) -> int:
    """Return a hash of the key as a seed, from 0 to 2^63 - 1."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """Return a random generator on `device`, seeded with the hash of the key."""
    return torch.Generator(device).manual_seed(seed(*key))


Draw = Callable[[int, torch.Generator], Tensor]
"""A function that makes a given number of draws from a generator, along the first dimension."""


@dataclass(frozen=True)
class BatchPosition:
    """The position of a training batch in a run.

    Attributes:
        step: number of batches before this one.
        rank, ranks: this process's number, from 0, and the number of processes. They select its share of the global batch:
            every ranks-th sample, starting with sample number `rank`.
    """

    step: int
    rank: int = 0
    ranks: int = 1

    def share(self, draw: Draw, count: int, device: torch.device, *key: int | str) -> Tensor:
        """Return this process's share, (count, ...), of the draws for the whole global batch from the stream (*key, step).

        Every process draws the whole batch and keeps its share, so results do not depend on the number of processes.

        Args:
            draw: the function that makes the draws.
            count: number of samples in the share, equal in all processes.
            device: device of the generator.
            key: key of the stream, without the step.
        """
        return draw(count * self.ranks, generator(device, *key, self.step))[self.rank :: self.ranks]

    def normal(self, shape: Sequence[int], device: torch.device, *key: int | str) -> Tensor:
        """Return this process's share of standard normal noise from the stream, float32 of this shape."""
        return self.share(lambda n, g: torch.randn(n, *shape[1:], generator=g, device=device), shape[0], device, *key)

    def uniform(self, shape: Sequence[int], device: torch.device, *key: int | str) -> Tensor:
        """Return this process's share of uniform numbers in [0, 1) from the stream, float32 of this shape."""
        return self.share(lambda n, g: torch.rand(n, *shape[1:], generator=g, device=device), shape[0], device, *key)
