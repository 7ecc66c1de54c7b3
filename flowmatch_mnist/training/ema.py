"""Averaged weights: what is validated, sampled, and kept in checkpoints."""

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from flowmatch_mnist.sampling.generate import Flow
from flowmatch_mnist.training.internals import average_of
from flowmatch_mnist.training.module import FlowMatching


class EMA(WeightAveraging):
    """An exponential moving average of the weights, used for validation, for sampling, and in checkpoints.

    The decay warms up as min(decay, (1 + n) / (10 + n)) over the steps n: a fixed decay of 0.999 would keep the random
    weights of the start in the average for thousands of steps.

    Args:
        decay: how much of the average each step keeps, once warmed up, in [0, 1).

    Raises:
        ValueError: if `decay` is out of its range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of EMA must lie in [0, 1), got {decay}")
        self.decay = decay
        self._step = 0
        super().__init__(multi_avg_fn=self._update)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After every optimizer step."""
        if step_idx is not None:
            self._step = step_idx
        return step_idx is not None

    @torch.no_grad()
    def _update(self, averages: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
        # The step is known on the host: reading the count of updates would make a GPU wait.
        decay = min(self.decay, (1 + self._step) / (10 + self._step))
        torch._foreach_lerp_(averages, current, 1 - decay)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the average where a run goes on; elsewhere the module's own weights, as saved, are the average."""
        if average_of(self) is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


def averaged_flow(trainer: Trainer, module: FlowMatching) -> Flow:
    """The module's flow with the averaged weights, or as it is where nothing is averaged."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, EMA) and isinstance(average := average_of(callback), FlowMatching):
            return replace(module.flow, net=average.net)
    return module.flow
