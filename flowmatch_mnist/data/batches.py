"""Batches from memory. Their order is a function of (seed, epoch), so a run can stop and resume at any batch."""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from flowmatch_mnist.support import streams
from flowmatch_mnist.support.errors import UserError


def leave_signals_to_the_trainer(worker: int) -> None:
    """Ignore SIGINT and SIGTERM in a worker.

    Ctrl-C reaches all processes of a terminal, but the trainer needs its workers until the end of its step.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Slices:
    """Cuts slices out of tensors. Worker processes get only this object: if they are not forked, they get a pickled copy."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, samples: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor[samples] for tensor in self.tensors)


class Batches:
    """Batches from tensors in memory. Each batch is one indexed slice.

    Together, the processes see every sample of an epoch once. The n-th sample of a global batch goes to rank n modulo
    `world_size`, so the global batches are the same for any number of processes. The order is a pure function of (seed, epoch).
    The position in this order can be saved and restored.

    Args:
        tensors: tensors of equal length; a batch is a tuple of their slices.
        batch_size: number of samples in a global batch, a multiple of `world_size`.
        rank, world_size: this process's number, from 0, and the number of processes; they select its share of each batch.
        seed: random seed of the order; None keeps the order of the tensors.
        epoch: a function that returns the current epoch; called at the start of each pass.
        same_order: whether all epochs have the order of the first epoch, as in training on only a few batches.
        drop_last: whether to leave out a last batch that is not full.
        num_workers: number of worker processes that cut slices in advance; with 0, a slice is cut when it is needed.
    """

    def __init__(
        self,
        *tensors: Tensor,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
        same_order: bool = False,
        drop_last: bool = False,
        num_workers: int = 0,
    ) -> None:
        self.tensors = tensors
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = epoch
        self.same_order = same_order
        self.drop_last = drop_last
        self.num_workers = num_workers
        self._at = (0, 0)  # the epoch, and its number of finished batches
        self._resume_at: tuple[int, int] | None = None

    def __len__(self) -> int:
        samples = len(self.tensors[0])
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        # This is a generator, so it reads the epoch when the first batch is needed. By then the trainer has counted the epoch.
        epoch, samples = self.epoch(), len(self.tensors[0])
        order = torch.arange(samples)
        if self.seed is not None:
            generator = streams.generator("cpu", self.seed, "order", 0 if self.same_order else epoch)
            order = torch.randperm(samples, generator=generator)
        order = order.to(self.tensors[0].device)
        # A run that was saved at the end of an epoch resumes at the start of the next epoch.
        first = self._resume_at[1] if self._resume_at and self._resume_at[0] == epoch else 0
        self._resume_at = None
        batches = range(first, len(self))
        shares = [order[b * self.batch_size : (b + 1) * self.batch_size][self.rank :: self.world_size] for b in batches]
        cut = Slices(self.tensors)
        slices: Iterable[Sequence[Tensor]] = map(cut.__getitem__, shares)
        if self.num_workers:
            slices = DataLoader(
                cut,  # type: ignore[arg-type]
                batch_size=None,
                sampler=shares,
                num_workers=self.num_workers,
                worker_init_fn=leave_signals_to_the_trainer,
            )
        # Count each batch when the trainer takes it. Batches that workers cut in advance do not count.
        for batch, share in zip(batches, slices, strict=True):
            self._at = (epoch, batch + 1)
            yield tuple(share)

    @property
    def _order(self) -> dict[str, int | None]:
        return {"samples": len(self.tensors[0]), "global batch": self.batch_size, "seed": self.seed}

    def state_dict(self) -> dict[str, int | None]:
        """Return the epoch, its number of finished batches, and the settings that decide the order."""
        epoch, done = self._at
        return {"epoch": epoch, "done": done, **self._order}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """Begin the next pass at the position of the saved pass.

        Raises:
            UserError: if the batches differ from those of the saved pass. Then some samples would come twice and others never.
        """
        for what, here in self._order.items():
            if state.get(what) != here:
                raise UserError(
                    f"the run was trained with {what} {state.get(what)} and cannot resume with {what} {here}; "
                    "set the old value (the global batch is batch_size times the number of processes)"
                )
        self._resume_at = (int(state["epoch"] or 0), int(state["done"] or 0))
