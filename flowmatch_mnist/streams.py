"""Randomness as a pure function of a key.

Each kind of draw (noise, times, label dropout, data order) has a stream of its own, named by a key such as
`(seed, "noise", step, rank)`. Nothing depends on how often, or in which process, something else was drawn: a run that was
killed and resumed sees what the uninterrupted one would have, and ranks that share a seed still differ.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def generator(device: torch.device | str, *key: int | str) -> torch.Generator:
    """A generator on `device` whose seed is a 63-bit hash of the key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def step(trainer: Trainer) -> int:
    """How many training batches this run has finished, resumed parts included.

    With gradient accumulation this counts batches where `trainer.global_step` counts optimizer steps, so that no two batches
    share a key. It is the same from the batch's transfer to the end of its training step.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return progress.total.processed
