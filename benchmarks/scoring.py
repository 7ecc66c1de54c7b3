"""What the scripts score digits with."""

from collections.abc import Sequence
from pathlib import Path

import torch

from flowmatch_mnist.data.digits import MNISTDataModule
from flowmatch_mnist.evaluation.metrics import Measurement
from flowmatch_mnist.evaluation.problems import Scorer


def digit_scorer(data_dir: str | Path = "data", device: str = "cpu") -> Scorer:
    """What scores digits beside MNIST's test set, which is fetched if need be."""
    data = MNISTDataModule(str(data_dir))
    data.prepare_data()
    data.setup("test")
    return data.problem.scorer(data.real("test"), data.real("train"), torch.device(device))


def scores(measurements: Sequence[Measurement]) -> dict[str, float]:
    """The scores by their titles, without the groups of details."""
    return {m.title: m.score for m in measurements if m.main}
