"""MNIST and images in its format: read into memory once, and cut into batches from there."""

from pathlib import Path

import torch
from torch import Tensor

from flowmatch_mnist.data.pairs import PairsDataModule
from flowmatch_mnist.evaluation.problems import Digits, OtherImages
from flowmatch_mnist.flow.couplings import CouplingName
from flowmatch_mnist.images import mnist
from flowmatch_mnist.images.pixels import PixelsName, dequantization
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.errors import UserError


class MNISTDataModule(PairsDataModule):
    """MNIST's official split, 60,000 digits for training and 10,000 for test; validation is held out of training.

    Args:
        data_dir: where the four files are, or are put; see `mnist.prepare`.
        batch_size: training images per step and process.
        val_size: how many training images are held out for validation, 1 to 59,999.
        eval_batch_size: images per step of validation and test, shared between the processes.
        predict_per_class: how many digits of each class `predict` draws.
        coupling: which noise of a batch (of each process's share) is paired with which of its digits; see `couplings`.
        pixels: the scale of the grey levels: linear, from -1 to 1, or logit.
        dequantize: whether each level gets noise as wide as the level, afresh in each batch, so that digits have a density;
            likelihoods need it.
        seed: of the noise and of the data order; the command line sets it from `seed_everything`.
        num_workers: processes that cut training batches ahead of time; for data in memory, 0 is fastest.

    Raises:
        ValueError: if a size is out of its range.
    """

    problem_class: type[OtherImages] = Digits

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 128,
        val_size: int = 2000,
        eval_batch_size: int = 500,
        predict_per_class: int = 10,
        coupling: CouplingName = "independent",
        pixels: PixelsName = "linear",
        dequantize: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        problem = self.problem_class(pixels)
        super().__init__(problem, batch_size, eval_batch_size, predict_per_class, coupling, seed, num_workers)
        self.dequantize = dequantize
        if not 1 <= val_size <= 60_000 - batch_size:
            raise ValueError(f"val_size must leave a batch of {batch_size} of the 60,000 to train on, got {val_size}")
        self.data_dir = Path(data_dir)
        self.val_size = val_size

    def prepare_data(self) -> None:
        """Fetch what is missing. Lightning calls this in one process of each machine."""
        mnist.prepare(self.data_dir)

    def read(self, split: mnist.Split) -> tuple[Tensor, Tensor]:
        """The images, uint8 (N, 28, 28), and the labels, int64 (N,), of the official split."""
        return mnist.load(self.data_dir, split)

    def setup(self, stage: str) -> None:
        """Read the splits that the stage needs into memory."""
        # Also to test, since samples are measured beside what was trained on; not to predict.
        if stage != "predict" and "train" not in self.splits:
            images, labels = self.read("train")
            # The same digits are held out in every run, whatever its seed: validation losses can be compared.
            order = torch.randperm(len(images), generator=streams.generator("cpu", "validation split"))
            held_out, kept = order[: self.val_size], order[self.val_size :]
            self.splits["train"] = (images[kept], labels[kept])
            self.splits["val"] = (images[held_out], labels[held_out], *self._fixed("val", len(held_out)))
        if stage == "test" and "test" not in self.splits:
            images, labels = self.read("test")
            self.splits["test"] = (images, labels, *self._fixed("test", len(images)))

    def _fixed(self, split: str, count: int) -> list[Tensor]:
        u = [dequantization(0, range(count), (28, 28))] if self.dequantize else []
        return [self.fixed_noise(split, count), *u]


class IDXDataModule(MNISTDataModule):
    """Other images in MNIST's format: the same four names, 28 by 28 grey levels, labels 0 to 9. Fashion-MNIST is such a set.

    The files are taken as they are, raw or gzipped. The evaluator's classifier knows digits alone. So samples are scored by
    their distance to the training images alone. Arguments are those of `MNISTDataModule`.
    """

    problem_class = OtherImages

    def prepare_data(self) -> None:
        """Fetch nothing: the files are the user's."""

    def read(self, split: mnist.Split) -> tuple[Tensor, Tensor]:
        """The images and labels of a split."""
        images, labels = mnist.load_any(self.data_dir, split)
        if split == "train" and len(images) < self.val_size + self.batch_size:
            raise UserError(f"{self.data_dir} has {len(images):,} training images; lower val_size to leave a batch of them")
        return images, labels
