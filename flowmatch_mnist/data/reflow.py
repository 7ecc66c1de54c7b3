"""Reflow: train a flow anew on its own pairs of noise and data, which lie at the two ends of one trajectory.

A teacher carries noise to data, and a student is trained on the straight lines between the two, in place of those between data
and whatever noise came along. Its marginals are the teacher's, and its trajectories are straighter: so few steps do. A student
may teach the next. Only the training data change; the training is that of every other flow. `python -m flowmatch_mnist.reflow`
draws the pairs.

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
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.support.files import digest, load_weights, save_weights

SHARD = 2500
"""Pairs in a file."""

LINE: PathName = "linear"
"""The path that the two of a pair are ends of."""


def shard_path(folder: Path, number: int) -> Path:
    """The file of the pairs from number x SHARD on."""
    return folder / f"pairs_{number:05}.safetensors"


def draw_shard(flow: Flow, sampler: Sampler, number: int, seed: int, batch_size: int | None) -> dict[str, Tensor]:
    """Noise x0 and the data x1 it is carried to, float16 (SHARD, *shape), of the classes y in turn, int64 (SHARD,).

    The noise is rounded to float16 before it is carried, so that what is kept is what was carried.
    """
    numbers = torch.arange(number * SHARD, (number + 1) * SHARD)
    labels = numbers % flow.net.no_label
    x0 = torch.randn(SHARD, *flow.net.shape, generator=streams.generator("cpu", seed, "pairs", number)).half()
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
    """What the files of a drawing say of it: the teacher, how it was sampled, the seed, and how many files there are."""
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
    """Draw pairs into a folder, as many files as hold `count`. Whole files of the same pairs that are there are kept.

    Args:
        folder: where the files go.
        flow: the teacher.
        sampler: how it carries the noise; its guidance is in the pairs, and the student needs none.
        count: of pairs, rounded up to whole files.
        seed: of the noise.
        batch_size: how many are carried at a time; by default as suits the device.

    Returns:
        How many files there are, and how many of them were drawn now.

    Raises:
        UserError: if the folder holds pairs of another drawing.
    """
    shards = -(-count // SHARD)
    said = describe(flow, sampler, seed, shards)
    missing = []
    for number in range(shards):
        path = shard_path(folder, number)
        try:
            there = load_weights(path)[1]
        except UserError:
            missing.append(number)  # not there, or damaged
            continue
        if there != {**said, "number": str(number)}:
            raise UserError(f"{path} holds pairs of another teacher, sampler, seed or number; name another --out, or remove it")
    for number in track(missing, "drawing pairs", console=Console(stderr=True), transient=True):
        shard = draw_shard(flow, sampler, number, seed, batch_size)
        save_weights(shard_path(folder, number), shard, {**said, "number": str(number)})
    return shards, len(missing)


def load_pairs(folder: Path, shape: tuple[int, ...], classes: int) -> dict[str, Tensor]:
    """All pairs of a folder: x0, x1 float16 (N, *shape), y int64 (N,).

    Args:
        folder: that `draw_pairs` wrote to.
        shape: of a sample.
        classes: that labels may name.

    Raises:
        UserError: if files are missing, damaged, of another shape or path, or not of one drawing.
    """
    first = shard_path(folder, 0)
    if not first.is_file():
        raise UserError(f"no pairs in {folder}; draw some with `python -m flowmatch_mnist.reflow --out {folder}`")
    pairs, said = load_weights(first)
    if said.get("path") != LINE:
        raise UserError(f"{first} holds no pairs of the {LINE} path, but of {said.get('path')}; draw the pairs again")
    shards = []
    for number in range(int(said["shards"])):
        path = shard_path(folder, number)
        pairs, its_own = load_weights(path) if number else (pairs, said)
        if its_own != {**said, "number": str(number)}:
            raise UserError(f"{path} is not of one drawing with {first}; draw the pairs again")
        if not fits(pairs, shape, classes):
            raise UserError(f"{path} holds no pairs of shape {shape} with labels 0 to {classes - 1}; name another folder")
        shards.append(pairs)
    return {name: torch.cat([pairs[name] for pairs in shards]) for name in ("x0", "x1", "y")}


def fits(pairs: dict[str, Tensor], shape: tuple[int, ...], classes: int) -> bool:
    """Whether these are pairs of samples of that shape, with labels of so many classes."""
    if set(pairs) != {"x0", "x1", "y"} or pairs["y"].dtype != torch.int64 or pairs["y"].dim() != 1:
        return False
    y = pairs["y"]
    whole = all(pairs[end].shape == (len(y), *shape) and bool(pairs[end].isfinite().all()) for end in ("x0", "x1"))
    return whole and len(y) > 0 and int(y.min()) >= 0 and int(y.max()) < classes


class ReflowDataModule(PairsDataModule):
    """The pairs of a teacher instead of data and independent noise. Samples are scored beside the real data.

    Args:
        pairs: the folder of the pairs.
        real: the data that the teacher learned from.
        batch_size: pairs per step and process.
        val_size: how many pairs are held out, for validation and for test.
        eval_batch_size: pairs per step of validation and test, shared between the processes.
        predict_per_class: how many samples of each class `predict` draws.
        seed: of the order; the command line sets it from `seed_everything`.
        num_workers: processes that cut training batches ahead of time; for data in memory, 0 is fastest.
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
        """Fetch what the real data lack."""
        self.teachers_data.prepare_data()

    def setup(self, stage: str) -> None:
        """Read the pairs into memory."""
        self.teachers_data.setup(stage)
        if stage == "predict" or self.splits:
            return
        pairs = load_pairs(self.folder, self.problem.shape, self.problem.classes)
        everything = (pairs["x1"], pairs["y"], pairs["x0"])
        if not 0 < self.val_size <= len(pairs["y"]) - self.batch_size:
            raise UserError(f"val_size must leave a batch of the {len(pairs['y']):,} pairs to train on, got {self.val_size}")
        # As the fixed noise of an evaluation, each one's noise comes with it, and is paired with it.
        self.splits["train"] = tuple(tensor[self.val_size :] for tensor in everything)
        self.splits["val"] = self.splits["test"] = tuple(tensor[: self.val_size] for tensor in everything)

    def encode(self, data: Tensor, u: Tensor | None = None) -> Tensor:
        """Pairs are kept as the network sees them, but for their precision."""
        return data.float()

    def real(self, split: str) -> Labelled:
        """The real data, not the teacher's."""
        return self.teachers_data.real(split)


def straightness(states: Tensor) -> Tensor:
    """How far trajectories are from straight: the mean square of (x1 - x0) - v over the time, 0 for a straight line.

    Args:
        states: (steps + 1, N, ...), at times equally far apart, many enough that the differences are the velocity.

    Returns:
        Of each trajectory, the mean over its coordinates: (N,). Liu et al. 2022, equation 9.
    """
    steps = len(states) - 1
    velocity = states.diff(dim=0) * steps
    return (states[-1] - states[0] - velocity).square().flatten(2).mean(2).mean(0)
