"""The scoring of digits that the other scripts share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmatch_mnist.data.digits import MNISTDataModule
from flowmatch_mnist.evaluation.classifiers import CLASSIFIERS
from flowmatch_mnist.evaluation.estimates import Measurement
from flowmatch_mnist.evaluation.problems import labels_like
from flowmatch_mnist.sampling.generate import Samples

UNWATCHED = [
    f"--{what}.{when}={never}"
    for what in ("evaluation", "sampling")
    for when, never in (("every_n_epochs", 0), ("every_n_steps", 0), ("at_steps", "[]"))
]
"""Options of `train.py fit` for no evaluations and no pictures during training."""


class Judge:
    """A scorer of digits against MNIST's test set, which it downloads if necessary."""

    def __init__(self, data_dir: str | Path = "data", device: str = "cpu") -> None:
        data = MNISTDataModule(str(data_dir))
        data.prepare_data()
        data.setup("test")
        self._real = data.real("test")
        self._score = data.problem.scorer(self._real, data.real("train"), torch.device(device))

    def labels(self, count: int) -> Tensor:
        """Return labels (count,) to draw digits for, in the proportions of the test set."""
        return labels_like(self._real[1], count)

    def __call__(self, samples: Samples) -> list[Measurement]:
        """Return all measurements except those of single digits."""
        return [m for m in self._score(samples) if m.main or m.name.split("/")[0] in CLASSIFIERS]


def scores(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Return the scores by their titles, and their standard errors under `errors`."""
    return {m.title: m.score.value for m in measurements} | {"errors": {m.title: m.score.error for m in measurements}}


def words(row: dict[str, Any]) -> str:
    """Return the numbers of a row as one line of text."""
    return ", ".join(f"{what} {value:.4g}" for what, value in row.items() if isinstance(value, int | float))
