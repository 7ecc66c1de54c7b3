"""Batches out of memory, in an order that is a function of (seed, epoch), so that a run can stop and go on at any of them."""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from flowmatch_mnist.support import streams
from flowmatch_mnist.support.errors import UserError


def leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal, but the workers are needed until the trainer has ended its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Slices:
    """Cuts slices out of tensors. Workers get only this: where they are not forked, what they get must pickle."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, samples: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor[samples] for tensor in self.tensors)


class Batches:
    """Batches cut out of tensors that live in memory: each is one indexed slice.

    Together the processes see every sample of an epoch once: the n-th sample of a global batch goes to rank n modulo
    `world_size`, so that the global batches are the same for any number of processes. The order is a pure function of
    (seed, epoch), and the place in it can be saved and restored.

    Args:
        tensors: equally long; a batch is a tuple of their slices.
        batch_size: samples of the global batch, a multiple of `world_size`.
        rank, world_size: which share of each batch is this process's.
        seed: of the order; None keeps the order of the tensors.
        epoch: asked at the start of each pass.
        same_order: whether all epochs have the order of the first, as for training on a few batches alone.
        drop_last: whether to leave out a last batch that is not full.
        num_workers: processes that cut the slices ahead of time; with 0 it is done when a batch is asked for.
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
        self._at = (0, 0)  # epoch, and batches of it that are done
        self._resume_at: tuple[int, int] | None = None

    def __len__(self) -> int:
        samples = len(self.tensors[0])
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        # A generator: the epoch is asked when the first batch is, by which time the trainer has counted it.
        epoch, samples = self.epoch(), len(self.tensors[0])
        order = torch.arange(samples)
        if self.seed is not None:
            dice = streams.generator("cpu", self.seed, "order", 0 if self.same_order else epoch)
            order = torch.randperm(samples, generator=dice)
        order = order.to(self.tensors[0].device)
        # A run that was saved at the end of an epoch goes on with the next one, from its start.
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
        # Counted as they are taken: what workers have ready does not count.
        for batch, share in zip(batches, slices, strict=True):
            self._at = (epoch, batch + 1)
            yield tuple(share)

    @property
    def _order(self) -> dict[str, int | None]:
        return {"samples": len(self.tensors[0]), "global batch": self.batch_size, "seed": self.seed}

    def state_dict(self) -> dict[str, int | None]:
        """The epoch, how many of its batches are done, and what their order depends on."""
        epoch, done = self._at
        return {"epoch": epoch, "done": done, **self._order}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """Begin the next pass where the saved one stood.

        Raises:
            UserError: if the batches are not those of the saved pass, so that some samples would come twice and others never.
        """
        for what, here in self._order.items():
            if state.get(what) != here:
                raise UserError(
                    f"the run was trained with {what} {state.get(what)} and cannot go on with {what} {here}; set it as it was "
                    "(the global batch is batch_size times the number of processes)"
                )
        self._resume_at = (int(state["epoch"] or 0), int(state["done"] or 0))
