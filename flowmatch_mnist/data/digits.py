"""MNIST and images in its format. They are read into memory once, and batches are cut from there."""

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
    """MNIST's official split: 60,000 digits for training and 10,000 for test. Validation digits are held out of training.

    Args:
        data_dir: folder of the four files; missing files are downloaded into it; see `mnist.prepare`.
        batch_size: number of training images per step and process.
        val_size: number of training images that are held out for validation, from 1 to 60,000 - batch_size.
        eval_batch_size: number of images per step of validation and test, divided among the processes.
        predict_per_class: number of digits of each class that `predict` draws.
        coupling: how the noise and the digits of a batch (of each process's share) are paired; see `couplings`.
        pixels: the scale of the grey levels: linear, from -1 to 1, or logit.
        dequantize: whether each grey level gets noise as wide as one level, new in each batch. Then digits have a density, as
            likelihoods need.
        seed: random seed of the noise and the data order; the command line sets it from `seed_everything`.
        num_workers: number of worker processes that cut training batches in advance; for data in memory, 0 is fastest.

    Raises:
        ValueError: if a size is out of range.
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
            raise ValueError(f"val_size must be at least 1 and leave {batch_size} of the 60,000 images, got {val_size}")
        self.data_dir = Path(data_dir)
        self.val_size = val_size

    def prepare_data(self) -> None:
        """Download missing files. Lightning calls this in one process of each machine."""
        mnist.prepare(self.data_dir)

    def read(self, split: mnist.Split) -> tuple[Tensor, Tensor]:
        """Return the images, uint8 (N, 28, 28), and the labels, int64 (N,), of an official split.

        Raises:
            UserError: if a file is missing or not genuine.
        """
        return mnist.load(self.data_dir, split)

    def setup(self, stage: str) -> None:
        """Read the splits that the stage needs into memory."""
        # A test also needs the training images, because samples are compared with them. `predict` needs no images.
        if stage != "predict" and "train" not in self.splits:
            images, labels = self.read("train")
            # All runs hold out the same digits, whatever their seeds, so their validation losses can be compared.
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
    """Other images in MNIST's format: the same four file names, 28 by 28 grey levels, labels 0 to 9. Example: Fashion-MNIST.

    The files are used as they are, raw or gzipped. The evaluator's classifiers can read only digits, so samples are scored only
    by their distances to the training images. The arguments are those of `MNISTDataModule`.
    """

    problem_class = OtherImages

    def prepare_data(self) -> None:
        """Download nothing, because the user provides the files."""

    def read(self, split: mnist.Split) -> tuple[Tensor, Tensor]:
        """Return the images, uint8 (N, 28, 28), and the labels, int64 (N,), of a split.

        Raises:
            UserError: if a file cannot be used, or there are too few training images.
        """
        images, labels = mnist.load_any(self.data_dir, split)
        if split == "train" and len(images) < self.val_size + self.batch_size:
            raise UserError(f"{self.data_dir} has {len(images):,} training images; lower val_size to leave a training batch")
        return images, labels
