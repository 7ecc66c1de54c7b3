"""What several processes do together: share samples, and bring them together again."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor


def is_first() -> bool:
    """Whether this process is the first of all; known before there is a trainer, from what launchers put in the environment.

    Where nobody counts all processes, Lightning counts those of one node: then the first of each has the number 0.
    """
    first: bool = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    return first and LightningEnvironment().node_rank() == 0


def gather(trainer: Trainer, share: Any) -> list[Any]:
    """The shares of all processes in the order of their ranks, in every process."""
    shares: list[Any] = [share]
    if trainer.world_size > 1:
        shares = [None] * trainer.world_size
        torch.distributed.all_gather_object(shares, share)
    return shares


def interleave(shares: Sequence[Tensor]) -> Tensor:
    """Undo the sharing of a global batch, in which the n-th sample goes to rank n modulo the number of ranks."""
    whole = torch.cat(list(shares))
    for rank, share in enumerate(shares):
        whole[rank :: len(shares)] = share
    return whole
