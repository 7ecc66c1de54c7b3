"""What depends on the number of the step: the learning rate, and whether a step is logged."""

import math
from typing import Literal

from lightning.pytorch import Trainer

Decay = Literal["cosine", "linear", "constant"]


def learning_rate_factor(step: int, warmup_steps: int, total_steps: float, decay: Decay) -> float:
    """What the learning rate is multiplied by at `step`: a linear rise to 1, then a fall to 0 (or none) by `total_steps`."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[decay]


def is_logged(trainer: Trainer, step: int) -> bool:
    """Whether the loggers take in what optimizer step number `step`, counted from 1, logs."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and step % every == 0


def last_step(trainer: Trainer) -> int:
    """The number, from 0, of the last step that is done: where Lightning, too, puts what it logs."""
    return trainer.global_step - 1
