"""The terminal output of training: a progress bar, the remaining time, a line for each validation, and the next commands."""

import math
import time
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.progress import ProgressColumn, Task
from rich.text import Text

from flowmatch_mnist.support.commands import as_typed
from flowmatch_mnist.support.devices import memory_used
from flowmatch_mnist.training.arguments import RUNS
from flowmatch_mnist.training.drawing import FILM
from flowmatch_mnist.training.module import FlowMatching
from flowmatch_mnist.training.steps import is_logged, last_step
from flowmatch_mnist.training.tensorboard import log_scalars

STEPS_BEFORE_ESTIMATE = 100
"""Number of steps after which a run prints its remaining time."""


class Description(ProgressColumn):
    """The description of a progress bar, without the "/-2" that Lightning shows if the number of epochs is unlimited."""

    def render(self, task: Task) -> Text:
        """Return the words before the bar."""
        return Text.from_markup(task.description.replace("/-2", ""), style="progress.description")


class Bar(RichProgressBar):
    """Lightning's progress bar with other descriptions, and with the loss of the last logged step.

    This class reads the loss only in logged steps. Lightning would read it in every step, and the host would wait for the GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loss: dict[str, float] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the loss of a logged step."""
        if is_logged(trainer, trainer.global_step):
            self._loss = {"loss/train": round(cast(FlowMatching, pl_module).last_loss.item(), 3)}
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return Lightning's metrics and the loss."""
        return {**super().get_metrics(trainer, pl_module), **self._loss}

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Return Lightning's columns, with another first column."""
        _, *others = super().configure_columns(trainer)
        return [Description(), *others]


class Report(Callback):
    """Logs samples per second and the memory use of a GPU; prints the remaining time, and a line for each validation.

    The rate counts training only. Its clock stops after each logged step and starts with the next batch. So validation, drawing
    and the first step (which may compile) do not count.
    """

    def __init__(self) -> None:
        self._begun = 0.0
        self._before = 0.0  # seconds that the run took before it was resumed
        self._clock_start: float | None = None  # the start of the rate's clock; None while it is stopped
        self._samples = 0  # the samples since this start
        self._step = 0  # the last finished step
        self._rate = ""  # for the line of a validation
        self._first: tuple[int, float] | None = None  # the first step of this process: its number, and the time of its end
        self._remaining_time_printed = False

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds that the run has taken so far."""
        return {"seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the seconds of the run before it was resumed."""
        self._before = state_dict["seconds"]

    @property
    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self._begun

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the whole run."""
        self._begun, self._step = time.perf_counter(), trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock of the rate if it is stopped."""
        if self._clock_start is None:
            self._clock_start, self._samples = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch. After the last batch of a logged step, log the rate and stop the clock."""
        assert self._clock_start is not None
        self._samples += len(batch[-1]) * trainer.world_size
        finished, self._step = trainer.global_step > self._step, trainer.global_step
        if finished and trainer.global_step == 1:
            self._clock_start = None
        elif finished and is_logged(trainer, trainer.global_step):
            rate = self._samples / (time.perf_counter() - self._clock_start)
            memory = memory_used(pl_module.device)
            scalars = {"speed/samples_per_second": rate, **({} if memory is None else {"speed/gpu_memory_gb": memory / 1e9})}
            log_scalars(trainer, scalars, last_step(trainer))
            self._rate = f"{rate:.0f} samples/s, "
            self._clock_start = None
        self._print_remaining_time(trainer)

    def _print_remaining_time(self, trainer: Trainer) -> None:
        """Print the remaining time once, after the first `STEPS_BEFORE_ESTIMATE` steps since the start or the resume."""
        step, now = trainer.global_step, time.perf_counter()
        if self._first is None:
            self._first = step, now
        elif not self._remaining_time_printed and step >= self._first[0] + STEPS_BEFORE_ESTIMATE and trainer.is_global_zero:
            self._remaining_time_printed = True
            first, then = self._first
            minutes = (trainer.estimated_stepping_batches - step) * (now - then) / (step - first) / 60
            if 1 <= minutes < math.inf:
                print(f"step {step}: about {minutes:.0f} min left", flush=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of the rate."""
        self._clock_start = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of a validation."""
        if not trainer.is_global_zero or trainer.sanity_checking or not self._begun:
            return
        train, val = cast(FlowMatching, pl_module).last_loss, trainer.callback_metrics["loss/val"]
        minutes, seconds = divmod(round(self._seconds), 60)
        print(
            f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}: "
            f"train loss {train:.4f}, val loss {val:.4f}, {self._rate}{minutes} min {seconds:02d} s",
            flush=True,
        )


def what_next(folder: Path, runs: Path, drawable: bool) -> str:
    """Return the last lines that a run prints: its results, and the next commands.

    Args:
        folder: the run's folder.
        runs: the folder of all runs.
        drawable: whether `sample.py` can use the checkpoint; it can draw only digits.
    """
    last = folder / "checkpoints" / "last.ckpt"
    usual = runs == RUNS  # the commands look there by default
    film = folder / "samples" / FILM
    lines = [f"done; the files are in {folder}" + (f"; {film} shows how it learned" if film.is_file() else "") + "; next:"]
    if last.is_file():
        if drawable:
            lines.append(f"  {as_typed('sample')} 0-9 --per-class 10" + ("" if usual else f" --checkpoint {last}"))
        lines.append(f"  {as_typed('train')} test --ckpt_path {'last' if usual else last}")
    return "\n".join([*lines, f"  tensorboard --logdir {runs}"])
