"""Functions of the step number: the learning rate, and whether a step is logged."""

import math
from typing import Literal

from lightning.pytorch import Trainer

Decay = Literal["cosine", "linear", "constant"]


def learning_rate_factor(step: int, warmup_steps: int, total_steps: float, decay: Decay) -> float:
    """Return the factor of the learning rate at `step`, counted from 0; it lies in [0, 1].

    It rises linearly to 1. Then it falls to 0 at `total_steps`, or stays 1 if `decay` is constant.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[decay]


def is_logged(trainer: Trainer, step: int) -> bool:
    """Return whether the values of optimizer step number `step`, counted from 1, go to the loggers. Step 0 never does."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return min(step, every) > 0 and step % every == 0


def last_step(trainer: Trainer) -> int:
    """Return the number of the last finished step, counted from 0. Lightning logs its own values at the same number."""
    return trainer.global_step - 1
