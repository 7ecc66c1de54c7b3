"""Saving and stopping: a run that is stopped at any moment and resumed ends with the same result as an uninterrupted run.

Data order, noise, times and dropout are functions of the seed and of the position in the run (see `streams`), so a checkpoint
needs no random state. It holds only weights, optimizer, schedule, averages and counters. This module writes checkpoints
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

from flowmatch_mnist.support.commands import as_typed
from flowmatch_mnist.support.files import load_checkpoint, save_checkpoint
from flowmatch_mnist.training.arguments import RUNS
from flowmatch_mnist.training.folder import folder_of
from flowmatch_mnist.training.internals import (
    Handler,
    begin_next_epoch,
    on_sigterm,
    take_over_requeueing,
    validation_follows,
)
from flowmatch_mnist.training.requeue import mark, requeue, unmark
from flowmatch_mnist.training.steps import is_logged
from flowmatch_mnist.training.stopping import is_stopping, reason, stopped_early
from flowmatch_mnist.training.tensorboard import flush

REQUEUE = 256
"""Added to the number of SLURM's signal. The processes agree on the largest number, so SLURM's signal outranks all others."""


class CheckpointFiles(TorchCheckpointIO):
    """Reads and writes checkpoints. It writes a file completely or not at all, and refuses a file that has changed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write to a temporary file, then rename it."""
        save_checkpoint(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, which holds only tensors and plain values."""
        return load_checkpoint(Path(path))


class SaveLast(Checkpoint):
    """Keeps `last.ckpt`, from which the run resumes bit for bit, whatever ended it.

    It saves at each validation, at the end of each epoch, and in between after every so many steps or minutes. On SIGTERM or
    Ctrl-C, it finishes the step and saves, and the process exits with status 128 + signal. A second signal ends the process at
    once. On the signal by which SLURM announces the end of a job, it also asks SLURM to start the job again. Several processes
    agree on this in a logged step.

    A callback that stops the run, such as `Timer` (`max_time`) or `EarlyStopping`, may do so in the middle of an epoch. Then
    the step is finished, and no checkpoint counts the epoch as done: a resumed run trains on the remaining batches.

    Args:
        every_n_steps: number of optimizer steps between two saves; 0 means never.
        every_n_minutes: number of minutes between two saves; 0 means never.

    Raises:
        ValueError: if a number is negative.
    """

    def __init__(self, every_n_steps: int = 0, every_n_minutes: float = 2.0) -> None:
        if every_n_steps < 0 or not every_n_minutes >= 0:
            raise ValueError("every_n_steps and every_n_minutes of --saving must be at least 0")
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.path: Path | None = None
        self._requeue_signal: signal.Signals | None = None
        self._signal = 0  # the signal that this process received; 0 means none
        self._saved_at = 0.0  # the time of the last save, or of the start
        self._due = False  # whether a save is due
        self._stop_for = 0  # the signal for which all processes agreed to stop; 0 means none
        self._stop_after_step = False  # whether a callback's stop is delayed, see `_finish_the_step`
        self._limit_val_batches: int | float | None = None  # the trainer's value, while 0 replaces it
        self._step = 0  # the optimizer step at the end of the last batch
        self._saved_step = -1  # the optimizer step of the last save
        self._accumulating = False  # whether the last batch ended no optimizer step
        self._begun = False  # whether training began

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder to save in, and install the handler of SLURM's signal."""
        folder = folder_of(trainer)
        self.path = None if folder is None else folder / "checkpoints" / "last.ckpt"
        self._end = end_together(trainer)
        on_sigterm(trainer, self._end)
        self._requeue_signal = take_over_requeueing(trainer)
        if stage == "fit" and self._requeue_signal is not None:
            signal.signal(self._requeue_signal, self._on_signal)
            if folder is not None and trainer.is_global_zero:
                mark(folder)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop again if early stopping has already stopped this run: it must not train longer than an uninterrupted run."""
        trainer.should_stop = trainer.should_stop or stopped_early(trainer) is not None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, remove incomplete files of a killed run, and install the handlers of signals."""
        self._begun = True
        self._saved_at = time.monotonic()
        self._step = trainer.global_step
        begin_next_epoch(trainer)
        if trainer.is_global_zero and self.path is not None:
            for leftover in self.path.parent.glob(".*.ckpt"):
                leftover.unlink()
        # Lightning restores the previous handlers when the run ends.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == self._requeue_signal:
            self._signal = REQUEUE + number
        elif self._signal in (signal.SIGINT, signal.SIGTERM):
            self._end(number, frame)
        elif not self._signal:  # after its own signal, SLURM sends others: ignore them until the step ends
            self._signal = number

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End the process here, between two steps, if it must stop. The loggers now have everything from the last step."""
        self._exit_if_stopped(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the process here, between two epochs, if it must stop."""
        self._exit_if_stopped(trainer)

    def _exit_if_stopped(self, trainer: Trainer) -> None:
        if self._stop_for:
            number = self._stop_for % REQUEUE
            if trainer.is_global_zero:
                words = [f"stopped by {signal.Signals(number).name} after step {trainer.global_step}"]
                words += [f"wrote {self.path}"] if self.path else []
                if self._stop_for > REQUEUE:
                    words.append(requeue())
                elif self.path:
                    words.append(how_to_resume(self.path))
                print("; ".join(words), flush=True)
            # Only one process exits with the signal's status, because a launcher that sees such a status kills the others.
            raise SystemExit(128 + number if trainer.is_global_zero else 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a save is due, unless this step is not finished yet."""
        self._accumulating = trainer.global_step == self._step
        self._step = trainer.global_step
        self._finish_the_step(trainer)
        if self._accumulating:
            return  # Never save in the middle of gradient accumulation: the checkpoint holds no gradients.
        if is_stopping(trainer) and self._limit_val_batches is None and not validation_follows(trainer):
            # Lightning would validate now, but an uninterrupted run would not. This could change the best checkpoint.
            self._limit_val_batches, trainer.limit_val_batches = trainer.limit_val_batches, 0
        self._due |= bool(self.every_n_steps) and trainer.global_step % self.every_n_steps == 0
        self._decide_save_or_stop(trainer, agree=is_logged(trainer, trainer.global_step))
        if self._due and not trainer.is_last_batch and not validation_follows(trainer):
            self._save(trainer)

    def _finish_the_step(self, trainer: Trainer) -> None:
        """Delay a stop in the middle of gradient accumulation until the step is finished.

        In the last step of an epoch, delay it until the end of the epoch, which has its own validation, pictures and scores.
        """
        if self._accumulating or trainer.is_last_batch:
            self._stop_after_step |= trainer.should_stop
            trainer.should_stop = False
        elif self._stop_after_step:
            trainer.should_stop, self._stop_after_step = True, False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless the epoch ends here too or the step is not finished."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._finish_the_step(trainer)
            self._decide_save_or_stop(trainer, agree=True)
            self._due = True
            if not trainer.is_last_batch and not self._accumulating:
                self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch."""
        trainer.should_stop, self._stop_after_step = trainer.should_stop or self._stop_after_step, False
        self._decide_save_or_stop(trainer, agree=True)
        # After a stop at a validation in mid-epoch, the run is already saved. If it were saved again here, Lightning would
        # count that step twice.
        if trainer.is_last_batch or trainer.global_step != self._saved_step:
            self._save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Do not count an epoch as done if the run stops in its middle. Lightning would. This applies to every checkpoint."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        for counts in (progress["current"], progress["total"]):
            if not trainer.is_last_batch and counts["processed"] == counts["started"] > 0:
                counts["processed"] -= 1
                counts["completed"] = min(counts["completed"], counts["processed"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the trainer's validation, and remove the mark of the SLURM job."""
        if self._limit_val_batches is not None:
            trainer.limit_val_batches, self._limit_val_batches = self._limit_val_batches, None
        if self._requeue_signal is not None and self.path is not None and trainer.is_global_zero:
            unmark(self.path.parent.parent)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print why a run ended before its limits, or did not begin."""
        if not trainer.is_global_zero or (self._begun and not trainer.should_stop):
            return
        if not self._begun:
            print(f"nothing to do after step {trainer.global_step}: {reason(trainer)}", flush=True)
        else:
            kept = f"; wrote {self.path}" if self.path and not trainer.fast_dev_run else ""  # type: ignore[attr-defined]
            print(f"stopped after step {trainer.global_step}: {reason(trainer)}{kept}", flush=True)

    def _decide_save_or_stop(self, trainer: Trainer, agree: bool) -> None:
        """Note whether to save, by the clock, or to stop. Several processes decide this only together, if `agree` is true."""
        late = bool(self.every_n_minutes) and time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
        wish = self._signal or int(late)
        if trainer.world_size > 1:
            if not agree:
                return
            wishes = torch.tensor(float(wish), device=trainer.strategy.root_device)
            wish = int(cast(torch.Tensor, trainer.strategy.reduce(wishes, reduce_op="max")).item())
        self._due |= wish > 0
        self._stop_for = wish if wish > 1 else 0

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run or self.path is None:  # type: ignore[attr-defined]
            return
        # Write all logs to disk first, because a resumed run does not log the steps before the checkpoint again.
        flush(trainer)
        trainer.save_checkpoint(self.path)
        self._due, self._saved_at, self._saved_step = False, time.monotonic(), trainer.global_step


def how_to_resume(last: Path) -> str:
    """Return a message with the command that resumes the run of a `last.ckpt`, wherever the folder of all runs is."""
    roots = last.parents[3:4]  # of <root>/<name>/version_<n>/checkpoints/last.ckpt
    where = "" if roots in ((), (RUNS,)) else f" --trainer.default_root_dir {roots[0]}"
    return f"resume it with `{as_typed('train')} --ckpt_path last{where}`"


def end_together(trainer: Trainer) -> Handler:
    """Return a signal handler that ends this process and those it launched, at once, with status 128 + signal.

    Before training begins there is nothing to save. The launched processes end too, because they would wait for a long time
    for a process that has ended.
    """

    def end(number: int, frame: FrameType | None) -> None:
        if trainer.is_global_zero:
            # Not `print`, because the signal may have interrupted a `print`.
            write(2, f"stopped by {signal.Signals(number).name} at once; the files saved before are kept\n".encode())
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(number)
        _exit(128 + number)

    return end
