"""The reasons why a run ends: it has reached a limit, or one of its callbacks stops it."""

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason


def is_stopping(trainer: Trainer) -> bool:
    """Return whether a callback asked the run to stop and the run may stop, because `min_epochs` and `min_steps` are done."""
    enough = trainer.current_epoch >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
    return trainer.should_stop and enough


def stopped_early(trainer: Trainer) -> str | None:
    """Return the message of the `EarlyStopping` callback that stopped this run, now or before it was resumed, or None."""
    for callback in trainer.early_stopping_callbacks:
        if callback.stopping_reason is not EarlyStoppingReason.NOT_STOPPED:
            return f"EarlyStopping: {callback.stopping_reason_message or callback.monitor}".rstrip(".")
    return None


def reason(trainer: Trainer) -> str:
    """Return, in words, why the run ended and how to continue it."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if trainer.should_stop:
        left = [callback.time_remaining() for callback in callbacks if isinstance(callback, Timer)]
        if any(seconds is not None and seconds <= 0 for seconds in left):
            return "its max_time is over; to go on, give a longer --trainer.max_time"
        if (reason := stopped_early(trainer)) is not None:
            return f"{reason}; to go on, remove that callback"
        return "a callback stopped it"
    if 0 <= trainer.max_steps <= trainer.global_step:
        return f"it has done its {trainer.max_steps} steps; to go on, raise --trainer.max_steps"
    if trainer.limit_train_batches == 0:
        return "--trainer.limit_train_batches 0 leaves nothing to train on"
    return f"it has done its {trainer.max_epochs} epochs; to go on, raise --trainer.max_epochs"
