"""Averaged weights: validation, sampling and checkpoints use them."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor

from flowmatch_mnist.sampling.generate import Flow
from flowmatch_mnist.training.internals import average_of
from flowmatch_mnist.training.module import FlowMatching


class EMA(WeightAveraging):
    """An exponential moving average (EMA) of the weights, used for validation, for sampling, and in checkpoints.

    The decay warms up: in step n, counted from 0, it is min(decay, (1 + n) / (10 + n)). A fixed decay of 0.999 would keep the
    random initial weights in the average for thousands of steps. Source: TensorFlow's `ExponentialMovingAverage`.

    Args:
        decay: the fraction of the average that each step keeps after the warm-up, in [0, 1).

    Raises:
        ValueError: if `decay` is out of its range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of EMA must lie in [0, 1), got {decay}")
        self.decay = decay
        self._step = 0  # the step of the last update; 0 means never
        super().__init__()

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after every optimizer step. The first update copies the weights.

        Buffers are averaged too, such as the statistics of batch normalisation; integers are copied. PyTorch's own update is
        not used: it reads its count of updates from the device, so the host would wait for a GPU.
        """
        average = average_of(self)
        if average is None or trainer.global_step == self._step:
            return
        n = trainer.global_step - 1
        decay = min(self.decay, (1 + n) / (10 + n)) if self._step else 0.0
        pairs = list(zip(tensors(average), tensors(pl_module), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        torch._foreach_lerp_([mean for mean, _ in floats], [now for _, now in floats], 1 - decay)
        for mean, now in pairs:
            if not mean.is_floating_point():
                mean.copy_(now)
        self._step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing, because the average is updated after each step."""

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last update."""
        return {"latest_update_step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step of the last update."""
        self._step = state_dict["latest_update_step"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the average if training resumes. Otherwise the saved weights of the module already are the average."""
        if average_of(self) is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


def tensors(module: LightningModule) -> Iterator[Tensor]:
    """Return the parameters and buffers of a module."""
    return chain(module.parameters(), module.buffers())


def averaged_flow(trainer: Trainer, module: FlowMatching) -> Flow:
    """Return the module's flow with the averaged weights, or with its own weights if there is no average."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, EMA) and isinstance(average := average_of(callback), FlowMatching):
            return replace(module.flow, net=average.net)
    return module.flow
