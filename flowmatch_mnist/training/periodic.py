"""The base class of callbacks that act at regular epochs or steps, or at given steps."""

from collections.abc import Sequence
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from flowmatch_mnist.training.module import FlowMatching


class Periodic(Callback):
    """A callback that acts during training: at regular epochs or optimizer steps, or at given steps, at most once per step.

    Args:
        every_n_epochs: number of epochs from one action to the next; 0 means never.
        every_n_steps: number of optimizer steps from one action to the next; 0 means never.
        at_steps: the numbers of additional steps, counted from 1.

    Attributes:
        done_at: the optimizer step of the last action; -1 means never.

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

    @property
    def scheduled(self) -> bool:
        """Return whether it ever acts during training."""
        return bool(self.every_n_epochs or self.every_n_steps or self.at_steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the step of the last action, because a resumed run must not act in it again."""
        return {"done_at": self.done_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step of the last action."""
        self.done_at = state_dict["done_at"]

    def act(self, trainer: Trainer, module: FlowMatching) -> None:
        """Act now. Every process calls this."""
        raise NotImplementedError

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act if an action is due at this step."""
        step = trainer.global_step  # still 0 after the first batch if gradients are accumulated
        if step in self.at_steps or (step and self.every_n_steps and step % self.every_n_steps == 0):
            self._act_once(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act if an action is due after this epoch. An epoch that a callback stopped in the middle does not count."""
        if trainer.should_stop and not trainer.is_last_batch:
            return
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._act_once(trainer, pl_module)

    def _act_once(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step != self.done_at:
            self.done_at = trainer.global_step
            self.act(trainer, cast(FlowMatching, module))
