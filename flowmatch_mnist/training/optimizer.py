"""The optimizer of a run, and its learning rate. A resumed run may change the settings of both, but not the optimizer."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch.cli import OptimizerCallable
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from flowmatch_mnist.networks.base import Network
from flowmatch_mnist.support.errors import UserError, one_line
from flowmatch_mnist.training.internals import unscale_before_clipping

Decay = Literal["cosine", "linear", "constant"]

OPTIMIZER_KEY = "optimizer"
"""The key of the optimizer's class name in a checkpoint."""


def learning_rate_factor(step: int, warmup_steps: int, total_steps: float, decay: Decay) -> float:
    """Return the factor of the learning rate at `step`, counted from 0; it lies in [0, 1].

    It rises linearly to 1. Then it falls to 0 at `total_steps`, or stays 1 if `decay` is constant.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}[decay]


def build_optimizer(build: OptimizerCallable, shares: Mapping[Network, float], stored: str | None) -> Optimizer:
    """Return the optimizer of networks.

    Args:
        build: builds the optimizer from parameters.
        shares: the networks to optimise, and for each the share of the learning rate that it gets.
        stored: the class name of the optimizer in the checkpoint that the run resumes from, or None.

    Raises:
        UserError: if a setting of the optimizer is out of its range, or the checkpoint is from another optimizer.
    """
    try:
        optimizer = build([{"params": list(net.parameters())} for net in shares])
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"model.optimizer does not work: {one_line(error)}; correct its settings") from error
    if stored not in (None, type(optimizer).__name__):
        raise UserError(
            f"the checkpoint has the state of {stored}, but the config asks for {type(optimizer).__name__}; resume with the "
            "same model.optimizer, or start a new run from these weights with --model.start"
        )
    for group, share in zip(optimizer.param_groups, shares.values(), strict=True):
        group["lr"] *= share
    unscale_before_clipping(optimizer)
    return optimizer


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the settings of an optimizer, such as its learning rate and weight decay: a copy for each group of parameters."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def use_settings(schedule: LambdaLR, settings: list[dict[str, Any]]) -> None:
    """Give a schedule and its optimizer these settings. Call this after a checkpoint restored those of an earlier run."""
    schedule.base_lrs = [group["lr"] for group in settings]
    for group, asked, factor in zip(schedule.optimizer.param_groups, settings, schedule.lr_lambdas, strict=True):
        group.update(asked, initial_lr=asked["lr"], lr=asked["lr"] * factor(schedule.last_epoch))
