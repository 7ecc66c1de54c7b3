"""Callbacks that act every so many epochs or steps, or at certain steps."""

from collections.abc import Sequence
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from flowmatch_mnist.training.module import FlowMatching


class Periodic(Callback):
    """Does something in training every few epochs or optimizer steps, or at certain steps, at most once in a step.

    Args:
        every_n_epochs: how often, in epochs; 0 is never.
        every_n_steps: how often, in optimizer steps; 0 is never.
        at_steps: the numbers of further steps, from 1.

    Attributes:
        done_at: the optimizer step in which it acted last; -1 is never.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(self, every_n_epochs: int, every_n_steps: int, at_steps: Sequence[int] = ()) -> None:
        if min(every_n_epochs, every_n_steps) < 0:
            raise ValueError(f"{type(self).__name__} needs every_n_epochs and every_n_steps of at least 0")
        if min(at_steps, default=1) < 1:
            raise ValueError(f"{type(self).__name__} needs at_steps of at least 1, got {list(at_steps)}")
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.at_steps = frozenset(at_steps)
        self.done_at = -1

    def state_dict(self) -> dict[str, Any]:
        """The step in which it acted last, so that a run that goes on does not act in it again."""
        return {"done_at": self.done_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step in which it acted last."""
        self.done_at = state_dict["done_at"]

    def act(self, trainer: Trainer, module: FlowMatching) -> None:
        """Do it now, in every process."""
        raise NotImplementedError

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act if it is a step for it."""
        step = trainer.global_step
        if step in self.at_steps or (self.every_n_steps and step % self.every_n_steps == 0):
            self._act_once(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act if it is an epoch for it. One that a callback has stopped in its middle is not over."""
        if trainer.should_stop and not trainer.is_last_batch:
            return
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._act_once(trainer, pl_module)

    def _act_once(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step != self.done_at:
            self.done_at = trainer.global_step
            self.act(trainer, cast(FlowMatching, module))
