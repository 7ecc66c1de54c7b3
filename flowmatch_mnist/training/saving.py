"""A run that is stopped at any instant, and goes on, ends where it would have ended: what is kept, and when.

Data order, noise, times and dropout are functions of the seed and of the place in the run (see `streams`), so a checkpoint
needs no random state: weights, optimizer, schedule, averages and counters are all there is. This module writes checkpoints
atomically, at the end of a step: after validation, pictures and measurements.
"""

import signal
import time
from os import _exit, write
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from flowmatch_mnist.support.files import load_checkpoint, save_checkpoint
from flowmatch_mnist.training.folder import folder_of
from flowmatch_mnist.training.internals import (
    Handler,
    begin_next_epoch,
    on_sigterm,
    take_over_requeueing,
    validation_follows,
)
from flowmatch_mnist.training.module import FlowMatching
from flowmatch_mnist.training.requeue import mark, requeue, unmark
from flowmatch_mnist.training.steps import is_logged
from flowmatch_mnist.training.stopping import is_stopping, reason, stopped_early
from flowmatch_mnist.training.tensorboard import flush

REQUEUE = 256
"""Added to the number of SLURM's signal, so that among processes it counts for more than any other."""


class CheckpointFiles(TorchCheckpointIO):
    """Checkpoints on disk: written whole or not at all, and refused if anything in them has changed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write to a temporary name, then rename."""
        save_checkpoint(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read tensors and plain values."""
        return load_checkpoint(Path(path))


class SaveLast(Checkpoint):
    """Keeps `last.ckpt`, from which the run resumes bit for bit, whatever ended it.

    It is written at each validation and at the end of each epoch, and in between every so many steps or minutes. On SIGTERM
    or Ctrl-C the step is finished, the checkpoint written, and the process ends with status 128 + signal; a second signal ends
    it at once. On the signal by which SLURM announces a job's end, SLURM is asked to start the job anew, too. With several
    processes, those asked agree with the others in a step that is logged.

    A callback that stops the run, such as `Timer` (`max_time`) or `EarlyStopping`, may do so in the middle of an epoch. Then
    the step is finished, and no checkpoint counts the epoch as done: a run that resumes sees the rest of its batches.

    Args:
        every_n_steps: how often to save, in optimizer steps; 0 is never.
        every_n_minutes: how often to save, in minutes; 0 is never.

    Raises:
        ValueError: if a number is negative.
    """

    def __init__(self, every_n_steps: int = 0, every_n_minutes: float = 2.0) -> None:
        if every_n_steps < 0 or not every_n_minutes >= 0:
            raise ValueError("saving needs every_n_steps and every_n_minutes of at least 0")
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.path: Path | None = None
        self._requeue_signal: signal.Signals | None = None
        self._signal = 0
        self._saved_at = 0.0
        self._due = False
        self._stop_for = 0
        self._stop_after_step = False
        self._limit_val_batches: int | float | None = None
        self._step = 0
        self._saved_step = -1
        self._accumulating = False
        self._begun = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learn where to save, and listen for SLURM's signal."""
        folder = folder_of(trainer)
        self.path = None if folder is None else folder / "checkpoints" / "last.ckpt"
        self._end = end_together(trainer)
        on_sigterm(trainer, self._end)
        self._requeue_signal = take_over_requeueing(trainer)
        if stage == "fit" and self._requeue_signal is not None:
            signal.signal(self._requeue_signal, self._hear)
            if folder is not None and trainer.is_global_zero:
                mark(folder)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A run that was stopped early stays stopped: killed after its last checkpoint, it must not go further than alone."""
        trainer.should_stop = trainer.should_stop or stopped_early(trainer) is not None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, clear away what a killed run left half-written, and listen for signals."""
        self._begun = True
        self._saved_at = time.monotonic()
        self._step = trainer.global_step
        begin_next_epoch(trainer)
        if trainer.is_global_zero and self.path is not None:
            for leftover in self.path.parent.glob(".*.ckpt"):
                leftover.unlink()
        # Lightning puts back, when the run has ended, what was there before.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == self._requeue_signal:
            self._signal = REQUEUE + number
        elif self._signal in (signal.SIGINT, signal.SIGTERM):
            self._end(number, frame)
        elif not self._signal:  # after its own signal, SLURM sends others: it waits until the step is over
            self._signal = number

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Between two steps: all that the last one logged has been handed over by now."""
        self._end_of_step(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Between two epochs, the same."""
        self._end_of_step(trainer)

    def _end_of_step(self, trainer: Trainer) -> None:
        if self._stop_for:
            number = self._stop_for % REQUEUE
            if trainer.is_global_zero:
                next_step = requeue() if self._stop_for > REQUEUE else "resume it with `python train.py --ckpt_path last`"
                kept = f"wrote {self.path}; " if self.path else ""
                print(
                    f"stopped by {signal.Signals(number).name} after step {trainer.global_step}; {kept}{next_step}", flush=True
                )
            # Only one process tells how it ended: a launcher would kill the others for it.
            raise SystemExit(128 + number if trainer.is_global_zero else 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time to, unless more of this step is to come."""
        self._accumulating = trainer.global_step == self._step
        self._step = trainer.global_step
        self._finish_the_step(trainer)
        if self._accumulating:
            return  # Never save in the middle of gradient accumulation: the checkpoint holds no gradients.
        if is_stopping(trainer) and self._limit_val_batches is None and not validation_follows(trainer):
            # Lightning would validate now, as the run left alone does not: that could change which checkpoint is best.
            self._limit_val_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0
        self._due |= bool(self.every_n_steps) and trainer.global_step % self.every_n_steps == 0
        self._listen(trainer, agree=is_logged(trainer, trainer.global_step))
        if self._due and not trainer.is_last_batch and not validation_follows(trainer):
            self._save(trainer, pl_module)

    def _finish_the_step(self, trainer: Trainer) -> None:
        """Put off a stop in the middle of gradient accumulation until the step is over.

        In the last step of an epoch, put it off to the epoch's end, with its own validation, pictures and figures.
        """
        if self._accumulating or trainer.is_last_batch:
            self._stop_after_step |= trainer.should_stop
            trainer.should_stop = False
        elif self._stop_after_step:
            trainer.should_stop, self._stop_after_step = True, False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless the epoch ends here too."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._finish_the_step(trainer)
            self._listen(trainer, agree=True)
            self._due = True
            if not trainer.is_last_batch and not self._accumulating:
                self._save(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        trainer.should_stop, self._stop_after_step = trainer.should_stop or self._stop_after_step, False
        self._listen(trainer, agree=True)
        # A run stopped after a validation in mid-epoch is saved: from here, Lightning would count that step twice.
        if trainer.is_last_batch or trainer.global_step != self._saved_step:
            self._save(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Do not count an epoch as done in whose middle the run stops, as Lightning does; this is so in every checkpoint."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        for counts in (progress["current"], progress["total"]):
            if not trainer.is_last_batch and counts["processed"] == counts["started"] > 0:
                counts["processed"] -= 1
                counts["completed"] = min(counts["completed"], counts["processed"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the trainer validate again, and forget the job."""
        if self._limit_val_batches is not None:
            trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None
        if self._requeue_signal is not None and self.path is not None and trainer.is_global_zero:
            unmark(self.path.parent.parent)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why a run ended before its limits, or did not begin."""
        if not trainer.is_global_zero or (self._begun and not trainer.should_stop):
            return
        if not self._begun:
            print(f"nothing to do after step {trainer.global_step}: {reason(trainer)}", flush=True)
        else:
            kept = f"; wrote {self.path}" if self.path and not trainer.fast_dev_run else ""  # type: ignore[attr-defined]
            print(f"stopped after step {trainer.global_step}: {reason(trainer)}{kept}", flush=True)

    def _listen(self, trainer: Trainer, agree: bool) -> None:
        """Note whether it is time to save, by the clock, or to stop. Several processes `agree` on it, or leave it for later."""
        late = bool(self.every_n_minutes) and time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        wish = self._signal or int(late)
        if trainer.world_size > 1:
            if not agree:
                return
            wishes = torch.tensor(float(wish), device=trainer.strategy.root_device)
            wish = int(cast(torch.Tensor, trainer.strategy.reduce(wishes, reduce_op="max")).item())
        self._due |= wish > 0
        self._stop_for = wish if wish > 1 else 0

    def _save(self, trainer: Trainer, module: LightningModule) -> None:
        cast(FlowMatching, module).gradients.require_finite()
        if trainer.fast_dev_run or self.path is None:  # type: ignore[attr-defined]
            return
        # What was logged before the checkpoint must not be lost with the process: a run that goes on does not log it again.
        flush(trainer)
        trainer.save_checkpoint(self.path)
        self._due, self._saved_at, self._saved_step = False, time.monotonic(), trainer.global_step


def end_together(trainer: Trainer) -> Handler:
    """A handler of signals that ends this process, and those it launched, at once, with status 128 + signal.

    Before training begins there is nothing to keep, but processes that wait for one that is gone would wait for long.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if trainer.is_global_zero:
            # Not print, which this may have interrupted.
            write(2, f"stopped by {signal.Signals(number).name} at once; what was saved before stays\n".encode())
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(number)
        _exit(128 + number)

    return end
