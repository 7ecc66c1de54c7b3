"""The uses of private attributes of Lightning and PyTorch: one function for each, and none elsewhere in the project.

The only exceptions are PyTorch's functions `torch._foreach_*`. If an upgrade breaks the project, it breaks one of the
functions below: `tests/test_internals.py` calls each, and names the one that fails. Each docstring says why no public
attribute is enough. All were tested with Lightning 2.6.1, 2.6.5 and 2.6.6, and with PyTorch 2.14.
"""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch.optim import Optimizer

Handler = Callable[[int, FrameType | None], None]
"""A function that handles a signal."""


def average_of(callback: WeightAveraging) -> LightningModule | None:
    """Return the averaged copy of the module, or None before a fit has begun. No public attribute gives it."""
    average = callback._average_model
    return None if average is None else cast(LightningModule, average.module)


def unscale_before_clipping(optimizer: Optimizer) -> None:
    """Make Lightning unscale the gradients of fp16 before their norm is computed.

    A fused optimizer offers to unscale them in its step. Then Lightning refuses to clip, even in bf16, which scales nothing.
    Only this attribute can withdraw the offer.
    """
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def validation_follows(trainer: Trainer) -> bool:
    """Return whether validation is due after the current batch.

    With public attributes, this function would have to repeat Lightning's own rules. Lightning always validates a run that was
    asked to stop; that validation does not count here.
    """
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    stop, trainer.should_stop = trainer.should_stop, False
    due = trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
    trainer.should_stop = stop
    return due


def begin_next_epoch(trainer: Trainer) -> None:
    """If a run resumes from a checkpoint at the end of an epoch, begin the next epoch.

    Lightning does so itself, except in a run that is limited by steps: that run can go back into the epoch that ended. Then the
    public setter of `restarting` does not accept False.
    """
    loop = trainer.fit_loop
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        loop._restarting = loop.epoch_loop.restarting = False
        loop.update_restart_stage()


def on_sigterm(trainer: Trainer, handler: Handler) -> None:
    """Replace Lightning's handler of SIGTERM, which would immediately wait for all other processes.

    Lightning installs its own handler when the fit begins, and has no public setting for another.
    """
    trainer._signal_connector._sigterm_notifier_fn = handler  # type: ignore[assignment]


def take_over_requeueing(trainer: Trainer) -> signal.Signals | None:
    """Return the signal by which SLURM says that the job must end and start again, or None. Keep Lightning from acting on it.

    Lightning would save in the middle of a step, and into a folder that other runs share. A strategy for one device has no
    public `cluster_environment`. SLURM's environment variables are not enough, because a plugin can overrule them.
    """
    environment: Any = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    environment.auto_requeue = False
    return environment.requeue_signal
