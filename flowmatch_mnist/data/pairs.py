"""Pairs of noise and data. Every data module yields such pairs. The noise of each batch is drawn here."""

from itertools import count
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from flowmatch_mnist.data.batches import Batches
from flowmatch_mnist.evaluation.problems import Labelled, Problem
from flowmatch_mnist.flow.couplings import COUPLINGS, CouplingName, independent
from flowmatch_mnist.flow.paths import PathName
from flowmatch_mnist.sampling.generate import draw_noise
from flowmatch_mnist.support import streams

Pairs = tuple[Tensor, Tensor, Tensor]
"""(x0, x1, y): noise and data (B, *shape), labels int64 (B,)."""


def position_of(trainer: Trainer) -> streams.BatchPosition:
    """Return the position of the trainer's current batch.

    It is the same from the transfer to the device to the end of the step. It counts batches, so no two batches share a key of
    `streams`. `trainer.global_step` counts optimizer steps: with gradient accumulation, several batches would share a key.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return streams.BatchPosition(progress.total.processed, trainer.global_rank, trainer.world_size)


class PairsDataModule(LightningDataModule):
    """A data module that yields pairs (x0, x1, y) of noise and data.

    A subclass sets `splits` in `setup`: "train" is (data, labels), and "val" and "test" are (data, labels, fixed noise). The
    fixed noise of dequantisation, if any, comes last. "train" has noise too if each sample belongs to one noise, see
    `data/reflow.py`.

    Args:
        problem: the description of the data.
        batch_size: number of training samples per step and process.
        eval_batch_size: number of samples per step of validation and test, divided among the processes.
        predict_per_class: number of samples of each class that `predict` draws.
        coupling: how the noise and the data of a batch (of each process's share) are paired; see `couplings`.
        seed: random seed of the noise and the data order; the command line sets it from `seed_everything`.
        num_workers: number of worker processes that cut training batches in advance; for data in memory, 0 is fastest.

    Attributes:
        splits: the tensors of "train", "val" and "test", once `setup` has read them.
        path: the only path from noise to data that fits the pairs; None if every path fits.
        dequantize: whether grey levels get noise; see `pixels.Pixels`.

    Raises:
        ValueError: if a number is out of range.
    """

    path: PathName | None = None
    dequantize = False

    def __init__(
        self,
        problem: Problem,
        batch_size: int,
        eval_batch_size: int,
        predict_per_class: int,
        coupling: CouplingName = "independent",
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        if min(batch_size, eval_batch_size, predict_per_class) < 1:
            raise ValueError(
                "batch sizes and predict_per_class must be at least 1, got "
                f"batch_size {batch_size}, eval_batch_size {eval_batch_size}, predict_per_class {predict_per_class}"
            )
        self.problem = problem
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.predict_per_class = predict_per_class
        self.couple = COUPLINGS[coupling]
        self.seed = seed
        self.num_workers = num_workers
        self.splits: dict[str, tuple[Tensor, ...]] = {}
        self._batches_without_trainer = count()

    def encode(self, data: Tensor, u: Tensor | None = None) -> Tensor:
        """Return the network's x1 (B, *shape) from data in the form of the splits; u is the dequantisation noise, if any."""
        return self.problem.units.encode(data, u)

    def real(self, split: str) -> Labelled:
        """Return the real data and labels of a split, in their units. Samples are compared with them."""
        data, labels, *_ = self.splits[split]
        return data, labels

    def training_set(self) -> tuple[Tensor, Tensor] | None:
        """Return the x1 (N, *shape) and labels (N,) that training draws from; see `flow.exact`.

        Each x1 must have the same probability, whatever the noise. Otherwise return None: the noise depends on the data (a
        coupling, a teacher's pairs), or the data get noise of their own.
        """
        if self.path is not None or self.dequantize or self.couple is not independent:
            return None
        data, labels, *_ = self.splits["train"]
        return self.encode(data), labels

    def fixed_noise(self, split: str, samples: int) -> Tensor:
        """Return the noise of an evaluation, float32 (samples, *shape). It is the same in every epoch and run."""
        return torch.randn(samples, *self.problem.shape, generator=streams.generator("cpu", "fixed noise", split))

    def train_dataloader(self) -> Batches:
        """Return batches (data, labels) in an order that is a function of (seed, epoch).

        Without workers, the data are moved to the device and batches are cut there. So a step sends no data to a GPU.
        """
        rank, world_size = self._rank_and_world_size
        tensors = self.splits["train"]
        if self.trainer is not None and not self.num_workers:
            tensors = tuple(tensor.to(self.trainer.strategy.root_device) for tensor in tensors)
        return Batches(
            *tensors,
            batch_size=self.batch_size * world_size,
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            epoch=lambda: self.trainer.current_epoch if self.trainer else 0,
            same_order=self.trainer is not None and self.trainer.overfit_batches > 0,  # type: ignore[attr-defined]
            drop_last=True,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> Batches:
        """Return batches (data, labels, fixed noise), always in the same order."""
        return self._in_order(*self.splits["val"])

    def test_dataloader(self) -> Batches:
        """Return batches (data, labels, fixed noise), always in the same order."""
        return self._in_order(*self.splits["test"])

    def predict_dataloader(self) -> Batches:
        """Return batches (noise, labels, sample numbers): the classes in turn, with the same noise as in `sample.py`."""
        labels = torch.arange(self.problem.classes).repeat(self.predict_per_class)
        noise = draw_noise(len(labels), self.problem.shape, streams.generator("cpu", self.seed, "sampling"))
        return self._in_order(noise, labels, torch.arange(len(labels)))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Encode the data, pair them with noise on the batch's device, and return these `Pairs`.

        The noise of a training batch is a function of (seed, step) and of its samples' positions in the global batch. A batch
        that already has noise keeps it.
        """
        if self.trainer is not None and self.trainer.predicting:
            return batch
        data, y, *fixed = batch
        if fixed:
            return fixed[0].float(), self.encode(data, *fixed[1:]), y
        position = position_of(self.trainer) if self.trainer else streams.BatchPosition(next(self._batches_without_trainer))
        u = position.uniform(data.shape, data.device, self.seed, "dequantization") if self.dequantize else None
        x1 = self.encode(data, u)
        return self.couple(position.normal(x1.shape, x1.device, self.seed, "noise"), x1, y), x1, y

    @property
    def _rank_and_world_size(self) -> tuple[int, int]:
        """Return (rank, number of processes)."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _in_order(self, *tensors: Tensor) -> Batches:
        rank, world_size = self._rank_and_world_size
        return Batches(*tensors, batch_size=self.eval_batch_size, rank=rank, world_size=world_size)
