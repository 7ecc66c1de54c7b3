"""Measure wall time to quality: the scores of the digits, minutes after the start of `train.py`.

    python benchmarks/time_to_quality.py --config configs/quick.yaml --seeds 0 1 2
    python benchmarks/time_to_quality.py --config configs/quick.yaml older.yaml --last-only

The time runs from the start of the process to its end. It includes loading, compiling from nothing, validation and saving. The
evaluations and pictures of the config are turned off. During training, a callback saves the averaged weights at regular times.
The script scores them after the run. It writes `docs/time_to_quality.json` and `.png`.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from scoring import UNWATCHED, Judge, words
from steps import measure

from flowmatch_mnist.sampling.weights import load, newest_checkpoint, save
from flowmatch_mnist.support.devices import default_device
from flowmatch_mnist.support.errors import UserError, exit_on_error
from flowmatch_mnist.support.files import replacing, save_json
from flowmatch_mnist.training.ema import averaged_flow

ROOT = Path(__file__).resolve().parent.parent
STARTED = "TIME_TO_QUALITY_STARTED"
"""The environment variable with the time at which the run's command started."""


class PutAside(Callback):
    """A callback that saves the averaged weights at regular times. The seconds are part of each file's name.

    Args:
        every: minutes between two files.
    """

    def __init__(self, every: float) -> None:
        self.every = every * 60
        self.due = self.every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the weights when the next file is due."""
        seconds = time.time() - float(os.environ[STARTED])
        if trainer.is_global_zero and seconds >= self.due and trainer.log_dir:
            path = Path(trainer.log_dir) / f"after_{seconds:05.0f}_s.safetensors"
            flow = averaged_flow(trainer, pl_module)  # type: ignore[arg-type]
            save(path, flow, pl_module.sampler, {"step": str(trainer.global_step)})  # type: ignore[arg-type]
            self.due += self.every


def train(options: argparse.Namespace, config: Path, seed: int) -> list[tuple[float, Path]]:
    """Train with `train.py`. Return the seconds and the file of each intermediate state, and of the last checkpoint."""
    name = f"time_to_quality_{config.stem}_{seed}"
    command = [sys.executable, ROOT / "train.py", "fit", "--config", config, "--name", name, "--seed_everything", seed]
    command += ["--trainer.callbacks+=time_to_quality.PutAside", f"--trainer.callbacks.every={options.every}"]
    command += UNWATCHED
    with tempfile.TemporaryDirectory() as cache:  # so each seed compiles again, as for a new user
        start = time.time()
        environment = {STARTED: str(start), "PYTHONPATH": str(ROOT / "benchmarks"), "TORCHINDUCTOR_CACHE_DIR": cache}
        subprocess.run([*map(str, command), *options.arguments], check=True, env=os.environ | environment)
        seconds = time.time() - start
    last = newest_checkpoint(name=name)
    aside = sorted(last.parent.parent.glob("after_*_s.safetensors"))
    return [*((float(path.stem.split("_")[1]), path) for path in aside), (seconds, last)]


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot the Frechet distance ratio and the label accuracy over the minutes, a curve for each run."""
    figure = Figure(figsize=(11, 4.5), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    for run, points in runs.items():
        minutes = [point["seconds"] / 60 for point in points]
        left.plot(minutes, [point["Frechet distance ratio"] for point in points], marker=".", label=run)
        right.plot(minutes, [point["label accuracy"] for point in points], marker=".")
    left.set(yscale="log", xlabel="minutes", ylabel="Frechet distance, over that of real data")
    left.set_yticks(ticks := [1, 1.5, 2, 3, 5, 10], [str(tick) for tick in ticks])
    right.set(ylim=(0.9, 1.0), xlabel="minutes", ylabel="label accuracy")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary)


def main() -> None:
    """Train each config with each seed, score the saved weights, print and write the scores, and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", default=[Path("configs/quick.yaml")], help="one or several configs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--every", type=float, default=2.0, metavar="MINUTES", help="minutes between two files (default: 2)")
    parser.add_argument("--samples", type=int, default=10_000, help="digits drawn for each point (default: 10000)")
    parser.add_argument("--last-only", action="store_true", help="score only the last checkpoint")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path, default=Path("docs/time_to_quality"), help="output path, without extension")
    parser.add_argument("--arguments", nargs=argparse.REMAINDER, default=[], help="more arguments for train.py")
    options = parser.parse_args()
    if options.samples < 1000 or options.every <= 0:
        raise UserError("--samples must be at least 1000, and --every more than 0")
    score = Judge(device=options.device)
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed, config in itertools.product(options.seeds, options.config):  # alternating, so a slow hour affects all configs
        run = f"{config.stem}, seed {seed}"
        points = runs[run] = []
        for seconds, path in train(options, config, seed)[-options.last_only :]:
            flow, sampler = load(path, options.device)
            points.append({"seconds": seconds, **measure(flow, sampler, score, options.samples, seed)})
            print(f"{run}: {words(points[-1])}", flush=True)
            save_json(options.out.with_suffix(".json"), {"samples": options.samples, "runs": runs})
            draw(runs, options.out.with_suffix(".png"))


if __name__ == "__main__":
    with exit_on_error():
        main()
