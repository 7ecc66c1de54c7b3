"""Functions for several processes: find the first process, gather values, and undo the sharing of a batch."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor


def is_first() -> bool:
    """Return whether this is the first of all processes. It reads the launcher's environment variables, and needs no trainer.

    If no variable gives the rank among all processes, Lightning takes the rank within the node. Then the first process of each
    node has rank 0, so the node's rank must be 0 too.
    """
    first: bool = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    return first and LightningEnvironment().node_rank() == 0


def gather(trainer: Trainer, share: Any) -> list[Any]:
    """Return the shares of all processes, in the order of their ranks, in every process."""
    shares: list[Any] = [share]
    if trainer.world_size > 1:
        shares = [None] * trainer.world_size
        torch.distributed.all_gather_object(shares, share)
    return shares


def interleave(shares: Sequence[Tensor]) -> Tensor:
    """Return the global batch (N, ...) from its shares (n, ...), in the order of the ranks.

    Sample n of the batch is in the share of rank n modulo the number of ranks.
    """
    whole = torch.cat(list(shares))
    for rank, share in enumerate(shares):
        whole[rank :: len(shares)] = share
    return whole
