"""What watches the training: averaged weights, samples, a line for each epoch, and the files of `predict`."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, RichProgressBar, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from flowmatch_mnist import streams
from flowmatch_mnist.data import PairsDataModule
from flowmatch_mnist.files import save_json
from flowmatch_mnist.generate import Sampler, Samples, draw_noise, generate
from flowmatch_mnist.metrics import table
from flowmatch_mnist.module import FlowMatching, is_logged
from flowmatch_mnist.pictures import save_npz, save_png


class EMA(WeightAveraging):
    """An exponential moving average of the weights, used for validation, for sampling, and in checkpoints.

    The decay warms up as min(decay, (1 + n) / (10 + n)) over the steps n: a fixed decay of 0.999 would keep the random
    weights of the start in the average for thousands of steps.

    Args:
        decay: how much of the average each step keeps, once warmed up, in [0, 1).

    Raises:
        ValueError: if `decay` is out of its range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of EMA must lie in [0, 1), got {decay}")
        self.decay = decay
        self._step = 0
        super().__init__(multi_avg_fn=self._update)

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """After every optimizer step."""
        if step_idx is not None:
            self._step = step_idx
        return step_idx is not None

    @torch.no_grad()
    def _update(self, averages: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
        # The step is known on the host: reading the count of updates would make a GPU wait.
        decay = min(self.decay, (1 + self._step) / (10 + self._step))
        torch._foreach_lerp_(averages, current, 1 - decay)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take up the average where a run goes on; elsewhere the module's own weights, as saved, are the average."""
        if self._average_model is not None:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)

    @property
    def average(self) -> FlowMatching | None:
        """The averaged copy of the module, once a fit has begun."""
        return None if self._average_model is None else cast(FlowMatching, self._average_model.module)


def averaged(trainer: Trainer, module: FlowMatching) -> FlowMatching:
    """The module with its averaged weights, or as it is where nothing is averaged."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    averages = [callback.average for callback in callbacks if isinstance(callback, EMA)]
    return next((average for average in averages if average is not None), module)


def last_step(trainer: Trainer) -> int:
    """The number, from 0, of the last step that is done: where Lightning, too, puts what it logs."""
    return trainer.global_step - 1


class Periodic(Callback):
    """Does something in training every few epochs or optimizer steps, at most once in a step.

    Args:
        every_n_epochs: how often, in epochs; 0 is never.
        every_n_steps: how often, in optimizer steps; 0 is never.

    Raises:
        ValueError: if a number is negative.
    """

    def __init__(self, every_n_epochs: int, every_n_steps: int) -> None:
        if min(every_n_epochs, every_n_steps) < 0:
            raise ValueError(f"{type(self).__name__} needs every_n_epochs and every_n_steps of at least 0")
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self._done_at = -1

    def state_dict(self) -> dict[str, Any]:
        """In which step it acted last, so that a run that goes on does not do it again."""
        return {"done_at": self._done_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the step in which it acted last."""
        self._done_at = state_dict["done_at"]

    def act(self, trainer: Trainer, module: FlowMatching) -> None:
        """Do it now, in every process."""
        raise NotImplementedError

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act if it is a step for it."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._act_once(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Act if it is an epoch for it."""
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._act_once(trainer, pl_module)

    def _act_once(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.global_step != self._done_at:
            self._done_at = trainer.global_step
            self.act(trainer, cast(FlowMatching, module))


class DrawSamples(Periodic):
    """Draws, with the averaged weights, samples of every class: pictures and figures, into TensorBoard and as PNG files.

    The noise is the same every time, so that the eye can follow each sample as it forms. What the pictures show is for the data
    module to say. Files go to `samples/` in the run's folder, beside `checkpoints/`. One process draws; the others wait for it
    at their next step.

    Args:
        every_n_epochs: how often to draw, in epochs; 0 is never.
        every_n_steps: how often to draw, in optimizer steps; 0 is never.
        rows: samples of each class.
        seed: of the noise.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(self, every_n_epochs: int = 1, every_n_steps: int = 0, rows: int = 8, seed: int = 0) -> None:
        super().__init__(every_n_epochs, every_n_steps)
        if rows < 1:
            raise ValueError(f"DrawSamples needs rows of at least 1, got {rows}")
        self.rows = rows
        self.seed = seed
        self.folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learn the run's folder, which the processes agree on together: later, only one of them would ask."""
        self.folder = Path(trainer.log_dir) if trainer.log_dir else None

    def act(self, trainer: Trainer, module: FlowMatching) -> None:
        """Draw now, log the pictures, and write the files."""
        if not trainer.is_global_zero:
            return
        data: PairsDataModule = trainer.datamodule  # type: ignore[attr-defined]
        samples = generate(
            averaged(trainer, module).flow,
            torch.arange(data.classes).repeat(self.rows),
            module.sampler,
            seed=self.seed,
            keep_states=True,
            finish=data.finish,
        )
        for name, picture in data.pictures(samples).items():
            if self.folder is not None:
                save_png(picture, self.folder / "samples" / f"{name}-{trainer.global_step:06d}.png")
            if isinstance(trainer.logger, TensorBoardLogger):
                pixels = picture if picture.dim() == 3 else picture[..., None]
                trainer.logger.experiment.add_image(f"samples/{name}", pixels, last_step(trainer), dataformats="HWC")


class Evaluate(Periodic):
    """Measures samples drawn with the averaged weights, so that quality is watched, and not the loss alone.

    While training it measures a few, into TensorBoard. In `validate` and `test` it measures many: prints a table, and writes
    `metrics.json` beside the checkpoint; then a few again by other numbers of steps, as curves over the evaluations into
    TensorBoard too. What is measured is for the data module to say. Each process draws a share of the samples, the same samples
    whatever the number of processes; one of them measures all.

    Args:
        every_n_epochs: how often to measure while training, in epochs; 0 is never.
        every_n_steps: how often to measure while training, in optimizer steps; 0 is never.
        samples: how many are drawn while training, the classes in turn.
        test_samples: how many are drawn in `validate` and `test`, the classes in turn.
        steps: of the sampler, by which `validate` and `test` measure `samples` more each.
        seed: of the noise.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        every_n_epochs: int = 0,
        every_n_steps: int = 0,
        samples: int = 1000,
        test_samples: int = 10_000,
        steps: Sequence[int] = (1, 2, 4, 8, 16),
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_epochs, every_n_steps)
        if min(samples, test_samples) < 2:
            raise ValueError("Evaluate needs samples and test_samples of at least 2")
        if min(steps, default=1) < 1:
            raise ValueError(f"Evaluate needs steps of at least 1, got {list(steps)}")
        self.samples = samples
        self.test_samples = test_samples
        self.steps = sorted(set(steps))
        self.seed = seed

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure in `validate`."""
        if trainer.state.fn == "validate":
            self.judge(trainer, cast(FlowMatching, pl_module), "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure in `test`."""
        self.judge(trainer, cast(FlowMatching, pl_module), "test")

    def act(self, trainer: Trainer, module: FlowMatching) -> None:
        """Measure a few samples beside the validation data, log the figures and print the most telling."""
        samples = self.draw(trainer, module, module.sampler, self.samples)
        if not trainer.is_global_zero:
            return
        data: PairsDataModule = trainer.datamodule  # type: ignore[attr-defined]
        words = []
        for figure in data.measure(samples, "val", module.device):
            if isinstance(trainer.logger, TensorBoardLogger):
                trainer.logger.experiment.add_scalar(figure.tag, figure.telling, last_step(trainer))
            if figure.main:
                words.append(f"{figure.title} {figure.telling:.3f}")
        print(f"step {trainer.global_step}: {len(samples.labels)} samples, {', '.join(words[:4])}", flush=True)

    def judge(self, trainer: Trainer, module: FlowMatching, split: Literal["val", "test"]) -> None:
        """Measure many samples beside the split, print the table and write the file."""
        started = time.perf_counter()
        samples = self.draw(trainer, module, module.sampler, self.test_samples)
        drawn = time.perf_counter()
        by_steps = self.vary(trainer, module, split)
        if not trainer.is_global_zero:
            return
        data: PairsDataModule = trainer.datamodule  # type: ignore[attr-defined]
        begun = time.perf_counter()
        figures = data.measure(samples, split, module.device)
        seconds = {"drawing": round(drawn - started, 1), "measuring": round(time.perf_counter() - begun, 1)}
        loss = trainer.callback_metrics[f"loss/{split}"].item()
        checkpoint = Path(str(trainer.ckpt_path))
        print(
            f"{len(samples.labels):,} samples of {data.classes} class{'es' * (data.classes > 1)} in turn, "
            f"{module.sampler.description()} (NFE {samples.evaluations}), seed {self.seed}; beside the {split} split\n"
            f"{table(figures)}\n{f'loss/{split}':36}{loss:10.4f}"
        )
        for number, point in enumerate(by_steps):
            told = ", ".join(f"{title} {value:.3f}" for title, value in point["figures"].items())
            print(f"{'and' if number else f'{self.samples:,} samples'} by {point['evaluations']} evaluations: {told}")
        report = checkpoint.with_name("metrics.json")
        save_json(
            report,
            {
                "checkpoint": checkpoint.name,
                "split": split,
                "figures": {f.name: {"samples": round(f.value, 6), "real data": round(f.real, 6)} for f in figures},
                f"loss/{split}": round(loss, 6),
                "samples": len(samples.labels),
                "sampler": asdict(module.sampler),
                "evaluations": samples.evaluations,
                "by steps": by_steps,
                "seed": self.seed,
                "seconds": seconds,
                "versions": {name: version(name) for name in ("flowmatch-mnist", "torch", "lightning", "torchmetrics")},
            },
        )
        print(f"wrote {report} after {seconds['drawing']:.0f} s of drawing and {seconds['measuring']:.0f} s of measuring")

    def vary(self, trainer: Trainer, module: FlowMatching, split: Literal["val", "test"]) -> list[dict[str, Any]]:
        """Measure a few samples by each number of steps, log the headlines over the evaluations, and tell them."""
        data: PairsDataModule = trainer.datamodule  # type: ignore[attr-defined]
        if not data.headlines or module.sampler.solver == "dopri5":  # which chooses its own steps
            return []
        points = []
        for steps in self.steps:
            samples = self.draw(trainer, module, replace(module.sampler, steps=steps), self.samples)
            if not trainer.is_global_zero:
                continue
            figures = {f.title: f.telling for f in data.measure(samples, split, module.device) if f.tag in data.headlines}
            points.append({"steps": steps, "evaluations": samples.evaluations, "samples": self.samples, "figures": figures})
            if isinstance(trainer.logger, TensorBoardLogger):
                for title, value in figures.items():
                    tag = f"quality_by_evaluations/{title}"
                    trainer.logger.experiment.add_scalar(tag, value, samples.evaluations)
        return points

    def draw(self, trainer: Trainer, module: FlowMatching, sampler: Sampler, count: int) -> Samples:
        """Draw `count` samples, a share in each process, and bring them together in every process."""
        data: PairsDataModule = trainer.datamodule  # type: ignore[attr-defined]
        rank, ranks = trainer.global_rank, trainer.world_size
        labels = torch.arange(count) % data.classes
        noise = draw_noise(count, data.shape, streams.generator("cpu", self.seed, "sampling"))
        numbers = torch.arange(rank, count, ranks)
        bar = trainer.progress_bar_callback
        # The bar that Lightning shows is the only one the terminal can show at a time.
        progress = bar.progress if isinstance(bar, RichProgressBar) and bar.is_enabled else None
        task = progress.add_task("Drawing", total=len(numbers)) if progress else None
        share = generate(
            averaged(trainer, module).flow,
            labels[numbers],
            sampler,
            seed=self.seed,
            noise=noise[numbers],
            numbers=numbers.tolist(),
            finish=data.finish,
            on_batch=lambda drawn: progress.advance(task, drawn) if progress and task is not None else None,
        )
        if progress and task is not None:
            progress.remove_task(task)
        values, evaluations = zip(*gather(trainer, (share.values, share.evaluations)), strict=True)
        return Samples(interleave(values), labels, max(evaluations))


class Bar(RichProgressBar):
    """Lightning's progress bar, without the "/-2" that it shows where the passes over the data are not limited."""

    def _get_train_description(self, current_epoch: int) -> str:
        return super()._get_train_description(current_epoch).replace("/-2", "")


class Report(Callback):
    """Samples per second into TensorBoard, and one line in the terminal for each validation.

    The rate is of training alone. Its clock stops after each logged step and starts with the next batch, so that validation,
    drawing and the first step (which may compile) do not count.
    """

    def __init__(self) -> None:
        self._begun = 0.0
        self._before = 0.0  # seconds of the parts that this run goes on from
        self._mark: float | None = None
        self._samples = 0
        self._rate = ""

    def state_dict(self) -> dict[str, Any]:
        """How long the run has taken so far."""
        return {"seconds": self._seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from there."""
        self._before = state_dict["seconds"]

    @property
    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self._begun

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the whole run."""
        self._begun = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock of the rate, if it stands still."""
        if self._mark is None:
            self._mark, self._samples = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; in a step that is logged, log the rate and stop the clock."""
        assert self._mark is not None
        self._samples += len(batch[-1]) * trainer.world_size
        if trainer.global_step == 1:
            self._mark = None
        elif is_logged(trainer, trainer.global_step):
            rate = self._samples / (time.perf_counter() - self._mark)
            pl_module.log("speed/samples_per_second", rate)
            self._rate = f"{rate:.0f} samples/s, "
            self._mark = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock of the rate."""
        self._mark = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line."""
        if not trainer.is_global_zero or trainer.sanity_checking or not self._begun:
            return
        train, val = cast(FlowMatching, pl_module).last_loss, trainer.callback_metrics["loss/val"]
        minutes, seconds = divmod(round(self._seconds), 60)
        print(
            f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}: "
            f"train loss {train:.4f}, val loss {val:.4f}, {self._rate}{minutes} min {seconds:02d} s",
            flush=True,
        )


class WriteSamples(BasePredictionWriter):
    """Writes what `predict` drew, arrays as `predictions.npz` and pictures beside them, in the run's folder."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(self, trainer: Trainer, pl_module: LightningModule, predictions: Any, batch_indices: Any) -> None:
        """Gather the shares of all processes, and write them in the order of the data."""
        shares = gather(trainer, predictions)
        folder = Path(trainer.log_dir or ".")  # asked by all processes, since they agree on it together
        if not trainer.is_global_zero:
            return
        data: PairsDataModule = trainer.datamodule  # type: ignore[attr-defined]
        batches = [interleave(share) for batch in zip(*shares, strict=True) for share in zip(*batch, strict=True)]
        values, labels = data.finish(torch.cat(batches[0::2])).cpu(), torch.cat(batches[1::2]).cpu()
        written = [folder / "predictions.npz"]
        save_npz(written[0], **{data.kind: values}, labels=labels)
        for name, picture in data.pictures(Samples(values, labels, evaluations=0)).items():
            written.append(folder / f"predictions-{name}.png")
            save_png(picture, written[-1])
        print(f"wrote {len(values)} samples: {', '.join(map(str, written))}")


def gather(trainer: Trainer, share: Any) -> list[Any]:
    """The shares of all processes in the order of their ranks, in every process."""
    shares: list[Any] = [share]
    if trainer.world_size > 1:
        shares = [None] * trainer.world_size
        torch.distributed.all_gather_object(shares, share)
    return shares


def interleave(shares: Sequence[Tensor]) -> Tensor:
    """Undo the sharing of a global batch, in which the n-th sample goes to rank n modulo the number of ranks."""
    whole = torch.cat(list(shares))
    for rank, share in enumerate(shares):
        whole[rank :: len(shares)] = share
    return whole
