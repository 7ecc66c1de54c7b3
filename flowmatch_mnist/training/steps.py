"""Functions of the step number: whether a step is logged, and the number that it is logged with."""

from lightning.pytorch import Trainer


def is_logged(trainer: Trainer, step: int) -> bool:
    """Return whether the values of optimizer step number `step`, counted from 1, go to the loggers. Step 0 never does."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return min(step, every) > 0 and step % every == 0


def last_step(trainer: Trainer) -> int:
    """Return the number of the last finished step, counted from 0. Lightning logs its own values at the same number."""
    return trainer.global_step - 1
