"""The data modules: real digits out of memory, and with them, for each batch, the noise they are paired with."""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from flowmatch_mnist import mnist, streams
from flowmatch_mnist.couplings import COUPLINGS, CouplingName
from flowmatch_mnist.errors import UserError
from flowmatch_mnist.generate import Samples, draw_noise, to_images
from flowmatch_mnist.metrics import Copies, Figure, Ruler
from flowmatch_mnist.pictures import grid
from flowmatch_mnist.pixels import PIXELS, PixelsName, dequantization

Pairs = tuple[Tensor, Tensor, Tensor]
"""(x0, x1, y): noise and data (B, *shape), labels int64 (B,)."""


def leave_signals_to_the_trainer(worker: int) -> None:
    """Ctrl-C reaches all processes of a terminal, but workers are needed until the trainer has ended its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


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
        drop_last: bool = False,
        num_workers: int = 0,
    ) -> None:
        self.tensors = tensors
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.epoch = epoch
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
            order = torch.randperm(samples, generator=streams.generator("cpu", self.seed, "order", epoch))
        # A run that was saved at the end of an epoch goes on with the next one, from its start.
        first = self._resume_at[1] if self._resume_at and self._resume_at[0] == epoch else 0
        self._resume_at = None
        batches = range(first, len(self))
        shares = [order[b * self.batch_size : (b + 1) * self.batch_size][self.rank :: self.world_size] for b in batches]
        slices: Iterable[Sequence[Tensor]] = map(self.__getitem__, shares)
        if self.num_workers:
            slices = DataLoader(
                self,  # type: ignore[arg-type]
                batch_size=None,
                sampler=shares,
                num_workers=self.num_workers,
                worker_init_fn=leave_signals_to_the_trainer,
            )
        # Counted as they are taken: what workers have ready does not count.
        for batch, share in zip(batches, slices, strict=True):
            self._at = (epoch, batch + 1)
            yield tuple(share)

    def __getitem__(self, samples: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor[samples] for tensor in self.tensors)

    @property
    def _whole(self) -> dict[str, int | None]:
        return {"samples": len(self.tensors[0]), "global batch": self.batch_size, "seed": self.seed}

    def state_dict(self) -> dict[str, int | None]:
        """The epoch, how many of its batches are done, and what their order depends on."""
        epoch, done = self._at
        return {"epoch": epoch, "done": done, **self._whole}

    def load_state_dict(self, state: dict[str, int | None]) -> None:
        """Begin the next pass where the saved one stood.

        Raises:
            UserError: if the batches are not those of the saved pass, so that some samples would come twice and others never.
        """
        for what, here in self._whole.items():
            if state.get(what) != here:
                raise UserError(
                    f"the run was trained with {what} {state.get(what)} and cannot go on with {what} {here}; set it as it was "
                    "(the global batch is batch_size times the number of processes)"
                )
        self._resume_at = (int(state["epoch"] or 0), int(state["done"] or 0))


class PairsDataModule(LightningDataModule):
    """Yields the pairs (x0, x1, y) of noise and data, and knows how to show what was drawn.

    A subclass says in `setup` what the splits are: "train" is (data, labels), "val" and "test" are (data, labels, fixed noise),
    and the fixed noise of dequantisation if there is any.

    Args:
        batch_size: training samples per step and process.
        eval_batch_size: samples per step of validation and test, shared between the processes.
        predict_per_class: how many samples of each class `predict` draws.
        coupling: which noise of a batch (of each process's share) is paired with which of its data; see `couplings`.
        seed: of the noise and of the data order; the command line sets it from `seed_everything`.
        num_workers: processes that cut training batches ahead of time; for data in memory, 0 is fastest.

    Attributes:
        shape: of one sample.
        classes: how many classes there are.
        kind: what the samples are, in the plural.
        headlines: the figures to look at first, as TensorBoard names them.
        pixels: the scale of images' grey levels.
        dequantize: whether levels get noise, see `pixels.Pixels`.
    """

    shape: tuple[int, ...]
    classes: int
    kind = "images"
    headlines: tuple[str, ...] = ()
    pixels: PixelsName = "linear"
    dequantize = False

    def __init__(
        self,
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
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.predict_per_class = predict_per_class
        self.couple = COUPLINGS[coupling]
        self.seed = seed
        self.num_workers = num_workers
        self.splits: dict[str, tuple[Tensor, ...]] = {}
        self._untrained_batches = count()

    def scale(self, data: Tensor, u: Tensor | None = None) -> Tensor:
        """Data as the splits hold it, with dequantisation's noise if any, as the x1 (B, *shape) that the network sees."""
        return data

    def finish(self, x: Tensor) -> Tensor:
        """States (B, *shape) as what is kept of them, to be shown and written: the inverse of `scale`, more or less."""
        return x

    def pictures(self, samples: Samples) -> dict[str, Tensor]:
        """Pictures uint8 (H, W) or (H, W, 3) by name, of the ways too where the samples came with their states."""
        raise NotImplementedError

    def measure(self, samples: Samples, split: Literal["val", "test"], device: torch.device) -> list[Figure]:
        """How good the samples are, beside the real data of a split. One process is asked; the device is its own."""
        raise NotImplementedError

    def fixed_noise(self, split: str, samples: int) -> Tensor:
        """The noise of an evaluation, the same in every epoch and run: float32 (samples, *shape)."""
        return torch.randn(samples, *self.shape, generator=streams.generator("cpu", "fixed noise", split))

    def train_dataloader(self) -> Batches:
        """Batches (data, labels) in an order that is a function of (seed, epoch)."""
        rank, world_size = self._place
        return Batches(
            *self.splits["train"],
            batch_size=self.batch_size * world_size,
            rank=rank,
            world_size=world_size,
            seed=self.seed,
            epoch=lambda: self.trainer.current_epoch if self.trainer else 0,
            drop_last=True,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> Batches:
        """Batches (data, labels, fixed noise), always in the same order."""
        return self._in_order(*self.splits["val"])

    def test_dataloader(self) -> Batches:
        """Batches (data, labels, fixed noise), always in the same order."""
        return self._in_order(*self.splits["test"])

    def predict_dataloader(self) -> Batches:
        """Batches (noise, labels, numbers): the classes in turn, with the noise that `sample.py` would give them."""
        labels = torch.arange(self.classes).repeat(self.predict_per_class)
        noise = draw_noise(len(labels), self.shape, streams.generator("cpu", self.seed, "sampling"))
        return self._in_order(noise, labels, torch.arange(len(labels)))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """On the batch's device: scale the data and pair it with noise.

        A training batch gets noise of its own, a function of (seed, step) and of the places of its samples in the global batch;
        an evaluation batch brings its fixed noise.
        """
        if self.trainer is not None and self.trainer.predicting:
            return batch
        data, y, *fixed = batch
        if fixed:
            return fixed[0], self.scale(data, *fixed[1:]), y
        place = streams.place(self.trainer) if self.trainer else streams.Place(next(self._untrained_batches))
        u = place.uniform(data.shape, data.device, self.seed, "dequantization") if self.dequantize else None
        x1 = self.scale(data, u)
        return self.couple(place.normal(x1.shape, x1.device, self.seed, "noise"), x1, y), x1, y

    @property
    def _place(self) -> tuple[int, int]:
        """(rank, number of processes)."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _in_order(self, *tensors: Tensor) -> Batches:
        rank, world_size = self._place
        return Batches(*tensors, batch_size=self.eval_batch_size, rank=rank, world_size=world_size)


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

    shape = (1, 28, 28)
    classes = 10
    headlines = tuple(f"quality/{title}" for title in ("Frechet distance ratio", "label accuracy", "precision", "recall"))

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
        super().__init__(batch_size, eval_batch_size, predict_per_class, coupling, seed, num_workers)
        self.pixels = pixels
        self.dequantize = dequantize
        if not 1 <= val_size <= 60_000 - batch_size:
            raise ValueError(f"val_size must leave a batch of {batch_size} of the 60,000 to train on, got {val_size}")
        self.data_dir = Path(data_dir)
        self.rulers: dict[str, Callable[[Samples], list[Figure]]] = {}
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

    def measure(self, samples: Samples, split: Literal["val", "test"], device: torch.device) -> list[Figure]:
        """The figures of samples, beside the images of the split; these are looked at once."""
        if split not in self.rulers:
            self.rulers[split] = self.ruler(split, device)
        return self.rulers[split](samples)

    def ruler(self, split: Literal["val", "test"], device: torch.device) -> Callable[[Samples], list[Figure]]:
        """What measures samples beside the images of a split: see `metrics.Ruler`."""
        (images, labels, *_), (training, training_labels) = self.splits[split], self.splits["train"]
        ruler = Ruler((images, labels), (training, training_labels), device)
        return lambda samples: ruler.measure(samples.values, samples.labels)

    def scale(self, data: Tensor, u: Tensor | None = None) -> Tensor:
        """Grey levels (B, 28, 28), at the middle of their cells or at u, as images (B, 1, 28, 28), mostly in [-1, 1]."""
        return PIXELS[self.pixels].forward(data, 0.5 if u is None else u)[:, None]

    def finish(self, x: Tensor) -> Tensor:
        """Images (B, 1, 28, 28) as bytes (B, 28, 28)."""
        return to_images(x, self.pixels)

    def pictures(self, samples: Samples) -> dict[str, Tensor]:
        """A grid with a column for each class, and, with the states, a strip from noise to digit, a row for each class."""
        pictures = {"grid": grid(samples.values, columns=self.classes)}
        if samples.states is None:
            return pictures
        way = samples.states[:, : self.classes]  # (steps + 1, classes, H, W): the first row of the grid
        # Some ten of the states are enough to see the way.
        shown = way[torch.linspace(0, len(way) - 1, min(len(way), 11)).round().long()]
        return pictures | {"trajectory": grid(shown.transpose(0, 1).flatten(0, 1), columns=len(shown))}


class IDXDataModule(MNISTDataModule):
    """Other images in MNIST's format: the same four names, 28 by 28 grey levels, labels 0 to 9. Fashion-MNIST is such a set.

    The files are taken as they are, raw or gzipped. The ruler's classifier knows digits alone, so that of samples only their
    distance to the training images is measured. Arguments are those of `MNISTDataModule`.
    """

    headlines = ()

    def prepare_data(self) -> None:
        """Fetch nothing: the files are the user's."""

    def read(self, split: mnist.Split) -> tuple[Tensor, Tensor]:
        """The images and labels of a split."""
        images, labels = mnist.load_any(self.data_dir, split)
        if split == "train" and len(images) < self.val_size + self.batch_size:
            raise UserError(f"{self.data_dir} has {len(images):,} training images; lower val_size to leave a batch of them")
        return images, labels

    def ruler(self, split: Literal["val", "test"], device: torch.device) -> Callable[[Samples], list[Figure]]:
        """What tells whether samples are copies of training images."""
        copies = Copies(self.splits[split][0], self.splits["train"][0], device)
        return lambda samples: copies.measure(samples.values)
