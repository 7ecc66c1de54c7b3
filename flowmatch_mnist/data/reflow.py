"""Reflow: train a flow again, on its own pairs of noise and data. A pair is the two ends of one trajectory.

A teacher carries noise to data. A student is trained on the straight lines between the two ends, instead of lines between data
and random noise. The student has the teacher's marginals and straighter trajectories, so a few steps are enough. A student can
be the next teacher. Only the training data change; the training is the same as for every other flow.
`python -m flowmatch_mnist.reflow` draws the pairs.

Source: Liu, Gong and Liu 2022, "Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow",
sections 2.1 and 2.2 (reflow), and equation 9 (straightness).
"""

import json
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from flowmatch_mnist.data.pairs import PairsDataModule
from flowmatch_mnist.evaluation.problems import Labelled
from flowmatch_mnist.flow.paths import PathName
from flowmatch_mnist.sampling.generate import Flow, Sampler, generate
from flowmatch_mnist.sampling.units import UnitsName
from flowmatch_mnist.sampling.weights import with_units
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.support.files import digest, load_weights, save_weights

SHARD = 2500
"""Number of pairs in a file."""

LINE: PathName = "linear"
"""The path that connects the two ends of a pair."""


def shard_path(folder: Path, shard_index: int) -> Path:
    """Return the path of file `shard_index`, counted from 0. Its first pair is pair `shard_index * SHARD` of the set."""
    return folder / f"pairs_{shard_index:05}.safetensors"


def draw_shard(flow: Flow, sampler: Sampler, shard_index: int, seed: int, batch_size: int | None) -> dict[str, Tensor]:
    """Draw the pairs of file `shard_index`: noise x0 and data x1, float16 (SHARD, *shape), and labels y, int64 (SHARD,).

    The labels are the classes in turn. The noise is rounded to float16 before the teacher carries it to data, so the stored
    noise is exactly the noise that the teacher used. `batch_size` is the number of pairs that are carried at a time.
    """
    numbers = torch.arange(shard_index * SHARD, (shard_index + 1) * SHARD)
    labels = numbers % flow.net.no_label
    x0 = torch.randn(SHARD, *flow.net.shape, generator=streams.generator("cpu", seed, "pairs", shard_index)).half()
    drawn = generate(
        flow,
        labels,
        sampler,
        seed=seed,
        noise=x0.float(),
        numbers=numbers.tolist(),
        batch_size=batch_size,
        decode=torch.Tensor.half,
    )
    return {"x0": x0, "x1": drawn.values, "y": labels}


def describe(flow: Flow, sampler: Sampler, seed: int, shards: int) -> dict[str, str]:
    """Return the metadata for the files of one set of pairs: path, teacher, sampler, seed and number of files."""
    return {
        "path": LINE,
        "teacher": digest(flow.net.state_dict(), {}),
        "flow": json.dumps(flow.describe(sampler)),
        "seed": str(seed),
        "shards": str(shards),
    }


def draw_pairs(
    folder: Path, flow: Flow, sampler: Sampler, count: int, *, seed: int = 0, batch_size: int | None = None
) -> tuple[int, int]:
    """Draw pairs into a folder, in as many files as `count` pairs need. Undamaged files of the same pairs are kept.

    Args:
        folder: the folder for the files.
        flow: the teacher.
        sampler: how the teacher carries the noise. Its guidance is part of the pairs, so the student needs no guidance.
        count: number of pairs, rounded up to whole files.
        seed: random seed of the noise.
        batch_size: number of pairs that are carried at a time; the default suits the device.

    Returns:
        The number of files, and the number of files that this call drew.

    Raises:
        UserError: if the folder holds pairs from another teacher, sampler, seed or count.
    """
    shards = -(-count // SHARD)
    metadata = describe(flow, sampler, seed, shards)
    missing = []
    for shard_index in range(shards):
        path = shard_path(folder, shard_index)
        try:
            there = load_weights(path)[1]
        except UserError:
            missing.append(shard_index)  # missing or damaged
            continue
        if there != {**metadata, "number": str(shard_index)}:
            raise UserError(f"{path} has pairs from another teacher, sampler, seed or count; use another --out, or remove it")
    for shard_index in track(missing, "drawing pairs", console=Console(stderr=True), transient=True):
        shard = draw_shard(flow, sampler, shard_index, seed, batch_size)
        save_weights(shard_path(folder, shard_index), shard, {**metadata, "number": str(shard_index)})
    return shards, len(missing)


def load_pairs(folder: Path, shape: tuple[int, ...], classes: int, units: UnitsName) -> dict[str, Tensor]:
    """Load all pairs of a folder: x0, x1 float16 (N, *shape), y int64 (N,).

    Args:
        folder: a folder that `draw_pairs` has filled.
        shape: the shape of a sample.
        classes: the number of classes; labels are smaller.
        units: the units of the samples.

    Raises:
        UserError: if files are missing or damaged, do not fit the shape, classes, units or path, or belong to different sets.
    """
    first = shard_path(folder, 0)
    if not first.is_file():
        raise UserError(f"no pairs in {folder}; draw some with `python -m flowmatch_mnist.reflow --out {folder}`")
    pairs, metadata = load_weights(first)
    if metadata.get("path") != LINE:
        raise UserError(
            f"{first} must have pairs of the {LINE} path, but has pairs of {metadata.get('path')}; draw the pairs again"
        )
    if (theirs := with_units(json.loads(metadata["flow"]))["units"]) != units:
        raise UserError(
            f"{first} has pairs in {theirs} units, but the config's data have {units} units; use the data of the pairs' teacher"
        )
    shards = []
    for shard_index in range(int(metadata["shards"])):
        path = shard_path(folder, shard_index)
        pairs, its_own = load_weights(path) if shard_index else (pairs, metadata)
        if its_own != {**metadata, "number": str(shard_index)}:
            raise UserError(f"{path} and {first} belong to different sets of pairs; draw the pairs again")
        if not fits(pairs, shape, classes):
            raise UserError(f"{path} has no pairs of shape {shape} with labels 0 to {classes - 1}; use another folder")
        shards.append(pairs)
    return {name: torch.cat([pairs[name] for pairs in shards]) for name in ("x0", "x1", "y")}


def fits(pairs: dict[str, Tensor], shape: tuple[int, ...], classes: int) -> bool:
    """Return whether these are pairs of samples with this shape, with labels from 0 to classes - 1."""
    if set(pairs) != {"x0", "x1", "y"} or pairs["y"].dtype != torch.int64 or pairs["y"].dim() != 1:
        return False
    y = pairs["y"]
    whole = all(pairs[end].shape == (len(y), *shape) and bool(pairs[end].isfinite().all()) for end in ("x0", "x1"))
    return whole and len(y) > 0 and int(y.min()) >= 0 and int(y.max()) < classes


class ReflowDataModule(PairsDataModule):
    """A teacher's pairs, instead of data and independent noise. Samples are compared with the real data.

    Args:
        pairs: the folder of the pairs.
        real: the data that the teacher learned from. Training does not use them: samples and pictures are compared with them.
        batch_size: number of pairs per step and process.
        val_size: number of pairs that are held out; validation and test use the same pairs.
        eval_batch_size: number of pairs per step of validation and test, divided among the processes.
        predict_per_class: number of samples of each class that `predict` draws.
        seed: random seed of the data order; the command line sets it from `seed_everything`.
        num_workers: number of worker processes that cut training batches in advance; for data in memory, 0 is fastest.

    Raises:
        ValueError: if a number is out of range.
    """

    path = LINE

    def __init__(
        self,
        pairs: str,
        real: PairsDataModule,
        batch_size: int = 128,
        val_size: int = 2000,
        eval_batch_size: int = 500,
        predict_per_class: int = 10,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(real.problem, batch_size, eval_batch_size, predict_per_class, "independent", seed, num_workers)
        self.folder, self.teachers_data, self.val_size = Path(pairs), real, val_size

    def prepare_data(self) -> None:
        """Download missing files of the real data."""
        self.teachers_data.prepare_data()

    def setup(self, stage: str) -> None:
        """Read the real data and the pairs into memory.

        Raises:
            UserError: if the pairs cannot be used, or are too few for `val_size` and a batch.
        """
        self.teachers_data.setup(stage)
        if stage == "predict" or self.splits:
            return
        pairs = load_pairs(self.folder, self.problem.shape, self.problem.classes, self.problem.units.name)
        everything = (pairs["x1"], pairs["y"], pairs["x0"])
        if not 0 < self.val_size <= len(pairs["y"]) - self.batch_size:
            raise UserError(
                f"val_size must be at least 1 and leave one batch out of the {len(pairs['y']):,} pairs, got {self.val_size}"
            )
        # The noise of each pair takes the position of an evaluation's fixed noise, so it stays with its data.
        self.splits["train"] = tuple(tensor[self.val_size :] for tensor in everything)
        self.splits["val"] = self.splits["test"] = tuple(tensor[: self.val_size] for tensor in everything)

    def encode(self, data: Tensor, u: Tensor | None = None) -> Tensor:
        """Return the data as float32. Pairs are stored as the network sees them, except for their precision."""
        return data.float()

    def real(self, split: str) -> Labelled:
        """Return the real data of a split, not the teacher's."""
        return self.teachers_data.real(split)


def straightness(states: Tensor) -> Tensor:
    """Return how far trajectories are from straight: the mean square of (x1 - x0) - v over time. A straight line has 0.

    Args:
        states: (steps + 1, N, ...), at equally spaced times. Use many steps: differences of states replace the velocity.

    Returns:
        For each trajectory, the mean over its coordinates: (N,). Source: Liu et al. 2022, equation 9.
    """
    steps = len(states) - 1
    velocity = states.diff(dim=0) * steps
    return (states[-1] - states[0] - velocity).square().flatten(2).mean(2).mean(0)
