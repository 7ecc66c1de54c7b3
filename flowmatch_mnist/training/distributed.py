"""What several processes do together: share samples, and bring them together again."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor


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
