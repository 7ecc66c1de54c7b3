"""The fence: every private attribute of Lightning and PyTorch that this project uses, one function each.

An upgrade that breaks the project breaks it here: `tests/test_internals.py` calls each function, and names the one that fails.
Each says why no public way serves. All were tried with Lightning 2.6.1, 2.6.5 and 2.6.6, and with PyTorch 2.14.
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
"""Handles a signal."""


def average_of(callback: WeightAveraging) -> LightningModule | None:
    """The averaged copy of the module, once a fit has begun. The callback hands it to nobody."""
    average = callback._average_model
    return None if average is None else cast(LightningModule, average.module)


def unscale_before_clipping(optimizer: Optimizer) -> None:
    """Have the gradients of fp16 unscaled before their norm is taken.

    A fused optimizer offers to unscale them in its step. Then Lightning refuses to clip, even in bf16, which scales nothing.
    The offer can only be taken back by this attribute.
    """
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def validation_follows(trainer: Trainer) -> bool:
    """Whether validation is due after the batch that ends now. Public figures tell it only by repeating Lightning's own rules.

    A run that is asked to stop is validated by Lightning in any case; that does not count here.
    """
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    stop, trainer.should_stop = trainer.should_stop, False
    due = trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
    trainer.should_stop = stop
    return due


def begin_next_epoch(trainer: Trainer) -> None:
    """If a run goes on from a checkpoint of an epoch's end, begin the next epoch.

    Lightning does so itself, but where a run is limited by steps it can go back into the epoch that ended. There the public
    setter of `restarting` takes no False.
    """
    loop = trainer.fit_loop
    if loop.restarted_on_epoch_end:
        loop.epoch_progress.increment_completed()
        loop._restarting = loop.epoch_loop.restarting = False
        loop.update_restart_stage()


def on_sigterm(trainer: Trainer, handler: Handler) -> None:
    """Put a handler in the place of Lightning's, which waits for all other processes there and then.

    Lightning sets its own as the fit begins, and asks nobody before.
    """
    trainer._signal_connector._sigterm_notifier_fn = handler  # type: ignore[assignment]


def take_over_requeueing(trainer: Trainer) -> signal.Signals | None:
    """The signal by which SLURM says that the job must end and start anew, if it does; Lightning will not act on it.

    Lightning would save in the middle of a step, and into a folder that other runs share. A strategy of one device has no
    public `cluster_environment`, and what SLURM's variables say can be overruled by a plugin.
    """
    environment: Any = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    environment.auto_requeue = False
    return environment.requeue_signal
