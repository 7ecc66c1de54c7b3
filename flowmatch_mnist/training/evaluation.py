"""The quality of samples, compared with real data: a quick measurement during training, and a thorough one after it."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from flowmatch_mnist.data.pairs import PairsDataModule
from flowmatch_mnist.evaluation.estimates import Estimate, Measurement, table
from flowmatch_mnist.evaluation.problems import Scorer, labels_like
from flowmatch_mnist.sampling.generate import Sampler, Samples, draw_noise, generate
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.files import save_json
from flowmatch_mnist.training.distributed import gather, interleave
from flowmatch_mnist.training.ema import averaged_flow
from flowmatch_mnist.training.module import FlowMatching
from flowmatch_mnist.training.periodic import Periodic
from flowmatch_mnist.training.steps import last_step
from flowmatch_mnist.training.tensorboard import log_curve, log_scalars

QUALITY = "quality"
"""The tags of all scores begin with this word."""


def plain(estimate: Estimate) -> dict[str, float]:
    """Return a score and its standard error in the form that files use."""
    return {"value": round(estimate.value, 6), "error": round(estimate.error, 6)}


class Evaluate(Periodic):
    """Measures samples that are drawn with the averaged weights, because the loss alone does not show their quality.

    During training it measures `samples` samples. The scores go to the loggers and into Lightning's metrics, where
    `--checkpoint.monitor`, early stopping and other callbacks can use them. In `validate` and `test` it measures `test_samples`
    samples, prints a table, and writes a file such as `metrics-last-test.json` next to `last.ckpt`. It also measures `samples`
    samples for each number of steps. These scores go into that file and, as curves over the network evaluations, into
    TensorBoard.

    The problem decides what is measured. The samples have the labels of the real data that they are compared with, in the same
    proportions. Each process draws a share of the samples, and one process measures all of them. The samples do not depend on
    the number of processes.

    Args:
        every_n_epochs: number of epochs from one measurement to the next during training; 0 means never.
        every_n_steps: number of optimizer steps from one measurement to the next during training; 0 means never.
        at_steps: additional steps at which to measure.
        samples: number of samples for each measurement during training.
        test_samples: number of samples in `validate` and `test`.
        steps: numbers of sampler steps. For each of them, `validate` and `test` draw and measure `samples` more samples. A
            network that learned only one step is measured with one step.
        seed: random seed of the noise.

    Raises:
        ValueError: if a number is out of its range.
    """

    verbose = True  # whether `validate` and `test` print the table; the command line sets it from --verbose

    def __init__(
        self,
        every_n_epochs: int = 0,
        every_n_steps: int = 0,
        at_steps: Sequence[int] = (),
        samples: int = 1000,
        test_samples: int = 10_000,
        steps: Sequence[int] = (1, 2, 4, 8, 16),
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_epochs, every_n_steps, at_steps)
        if min(samples, test_samples) < 2:
            raise ValueError("Evaluate needs samples and test_samples of at least 2")
        if min(steps, default=1) < 1:
            raise ValueError(f"Evaluate needs steps of at least 1, got {list(steps)}")
        self.samples = samples
        self.test_samples = test_samples
        self.steps = sorted(set(steps))
        self.seed = seed
        self._scorers: dict[str, Scorer] = {}
        self._scores: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the scores of the last measurement."""
        return {**super().state_dict(), "scores": self._scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the step and the scores of the last measurement."""
        super().load_state_dict(state_dict)
        self._scores = state_dict.get("scores", {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Publish the last scores, because other callbacks of a resumed run may need them."""
        self._publish(trainer)

    def _publish(self, trainer: Trainer) -> None:
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in self._scores.items()})

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure samples in `validate`."""
        if trainer.state.fn == "validate":
            self.report(trainer, cast(FlowMatching, pl_module), "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure samples in `test`."""
        self.report(trainer, cast(FlowMatching, pl_module), "test")

    def act(self, trainer: Trainer, module: FlowMatching) -> None:
        """Compare a few samples with the validation data, log all scores and print the main ones."""
        samples = self.sample(trainer, module, module.sampler, "val", self.samples)
        if trainer.is_global_zero:
            measurements = self.measure(trainer, module, samples, "val")
            self._scores = {m.tag: m.score.value for m in measurements}
            errors = {m.error_tag: m.score.error for m in measurements}
            log_scalars(trainer, self._scores | errors, last_step(trainer))
            words = [f"{m.title} {m.score}" for m in measurements if m.main]
            print(f"step {trainer.global_step}: {len(samples.labels)} samples, {', '.join(words[:4])}", flush=True)
        self._scores = trainer.strategy.broadcast(self._scores)  # all processes must make the same decisions
        self._publish(trainer)

    def report(self, trainer: Trainer, module: FlowMatching, split: Literal["val", "test"]) -> None:
        """Compare many samples with the split, print the table if `verbose` is set, and write the file."""
        started = time.perf_counter()
        samples = self.sample(trainer, module, module.sampler, split, self.test_samples)
        drawn = time.perf_counter()
        by_steps = self.by_steps(trainer, module, split)
        if not trainer.is_global_zero:
            return
        begun = time.perf_counter()
        measurements = self.measure(trainer, module, samples, split)
        seconds = {"drawing": round(drawn - started, 1), "measuring": round(time.perf_counter() - begun, 1)}
        loss = trainer.callback_metrics[f"loss/{split}"].item()
        if self.verbose:
            print(
                f"{len(samples.labels):,} samples with the labels of the {split} split, {module.sampler.description()} "
                f"(NFE {samples.evaluations}), seed {self.seed}; compared with that split\n"
                f"{table(measurements)}\n{f'loss/{split}':36}{loss:18.4f}"
            )
            for number, point in enumerate(by_steps):
                which = "and" if number else f"{self.samples:,} samples"
                words = ", ".join(f"{title} {Estimate(**score)}" for title, score in point["scores"].items())
                print(f"{which} with {point['evaluations']} network evaluations: {words}")
        checkpoint = Path(trainer.ckpt_path or "")  # "" in your own program, if it measures a network that is in memory
        report = checkpoint.parent / f"{'-'.join(filter(None, ('metrics', checkpoint.stem, split)))}.json"
        save_json(
            report,
            {
                "checkpoint": checkpoint.name,
                "split": split,
                "scores": {m.name: {"samples": plain(m.samples), "real data": plain(m.real)} for m in measurements},
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

    def by_steps(self, trainer: Trainer, module: FlowMatching, split: Literal["val", "test"]) -> list[dict[str, Any]]:
        """Measure a few samples for each number of steps, and log the headlines as curves over the network evaluations."""
        headlines: Sequence[str] = trainer.datamodule.problem.headlines  # type: ignore[attr-defined]
        if not headlines or module.sampler.solver == "dopri5":  # dopri5 chooses its own steps
            return []
        points: list[dict[str, Any]] = []
        for steps in (number for number in self.steps if number == 1 or not module.flow.one_step):
            samples = self.sample(trainer, module, replace(module.sampler, steps=steps), split, self.samples)
            if trainer.is_global_zero:
                measurements = self.measure(trainer, module, samples, split)
                scores = {m.title: plain(m.score) for m in measurements if m.tag in headlines}
                points.append({"steps": steps, "evaluations": samples.evaluations, "samples": self.samples, "scores": scores})
        for title in points[0]["scores"] if points else []:
            curve = {point["evaluations"]: point["scores"][title]["value"] for point in points}
            log_curve(trainer, f"quality_by_evaluations/{title}", curve)
        return points

    def measure(self, trainer: Trainer, module: FlowMatching, samples: Samples, split: str) -> list[Measurement]:
        """Return the measurements of samples, compared with the real data of a split. The real data are processed once."""
        data: PairsDataModule = trainer.datamodule  # type: ignore[attr-defined]
        if split not in self._scorers:
            self._scorers[split] = data.problem.scorer(data.real(split), data.real("train"), module.device)
        return self._scorers[split](samples)

    def sample(self, trainer: Trainer, module: FlowMatching, sampler: Sampler, split: str, count: int) -> Samples:
        """Draw `count` samples with the labels of a split. Each process draws a share, and every process returns all."""
        rank, ranks = trainer.global_rank, trainer.world_size
        labels = labels_like(trainer.datamodule.real(split)[1], count)  # type: ignore[attr-defined]
        noise = draw_noise(count, module.net.shape, streams.generator("cpu", self.seed, "sampling"))
        numbers = torch.arange(rank, count, ranks)
        bar = trainer.progress_bar_callback
        # The terminal can show only one live display at a time, so this uses Lightning's.
        progress = bar.progress if isinstance(bar, RichProgressBar) and bar.is_enabled else None
        task = progress.add_task("Drawing", total=len(numbers)) if progress else None
        share = generate(
            averaged_flow(trainer, module),
            labels[numbers],
            sampler,
            seed=self.seed,
            noise=noise[numbers],
            numbers=numbers.tolist(),
            on_batch=lambda drawn: progress.advance(task, drawn) if progress and task is not None else None,
        )
        if progress and task is not None:
            progress.remove_task(task)
        values, evaluations = zip(*gather(trainer, (share.values, share.evaluations)), strict=True)
        return Samples(interleave(values), labels, max(evaluations))
