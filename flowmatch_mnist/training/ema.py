"""Averaged weights: what is validated, sampled, and kept in checkpoints."""

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
        self._step = 0  # in which the average was last updated; 0 is never
        super().__init__()

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after every optimizer step, the first time to the weights themselves.

        Buffers are averaged too, such as the statistics of batch normalisation; whole numbers among them are copied. PyTorch's
        own update reads its count of updates from the device, for which a GPU would be waited for.
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
        """Nothing: the average is updated by steps."""

    def state_dict(self) -> dict[str, Any]:
        """The step in which the average was last updated."""
        return {"latest_update_step": self._step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from that step."""
        self._step = state_dict["latest_update_step"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the average where a run goes on; elsewhere the module's own weights, as saved, are the average."""
        if average_of(self) is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)


def tensors(module: LightningModule) -> Iterator[Tensor]:
    """Its parameters and buffers."""
    return chain(module.parameters(), module.buffers())


def averaged_flow(trainer: Trainer, module: FlowMatching) -> Flow:
    """The module's flow with the averaged weights, or as it is where nothing is averaged."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, EMA) and isinstance(average := average_of(callback), FlowMatching):
            return replace(module.flow, net=average.net)
    return module.flow
