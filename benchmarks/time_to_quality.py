"""Wall time to quality: how good the digits are, minutes after `train.py` was typed.

    python benchmarks/time_to_quality.py --config configs/quick.yaml --seeds 0 1 2
    python benchmarks/time_to_quality.py --config configs/quick.yaml older.yaml --last-only

The time runs from the start of the process to its end, with loading, compiling anew, validation and saving, without the
evaluations and pictures that the config asks for: those are turned off. On the way the averaged weights are put aside every so
often, and measured when the run is over. Writes `docs/time_to_quality.json` and `.png`.
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
"""The environment variable that tells the run when its command was typed."""


class PutAside(Callback):
    """Puts the averaged weights aside every so many minutes, each in a file named by its second.

    Args:
        every: minutes.
    """

    def __init__(self, every: float) -> None:
        self.every = every * 60
        self.due = self.every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Put aside what is due."""
        seconds = time.time() - float(os.environ[STARTED])
        if trainer.is_global_zero and seconds >= self.due and trainer.log_dir:
            path = Path(trainer.log_dir) / f"after_{seconds:05.0f}_s.safetensors"
            flow = averaged_flow(trainer, pl_module)  # type: ignore[arg-type]
            save(path, flow, pl_module.sampler, {"step": str(trainer.global_step)})  # type: ignore[arg-type]
            self.due += self.every


def train(options: argparse.Namespace, config: Path, seed: int) -> list[tuple[float, Path]]:
    """Train by `train.py`; the seconds and the files of what was put aside, and of what came out."""
    name = f"time_to_quality_{config.stem}_{seed}"
    command = [sys.executable, ROOT / "train.py", "fit", "--config", config, "--name", name, "--seed_everything", seed]
    command += ["--trainer.callbacks+=time_to_quality.PutAside", f"--trainer.callbacks.every={options.every}"]
    command += UNWATCHED
    with tempfile.TemporaryDirectory() as cache:  # a newcomer has none: what was compiled for one seed would serve the next
        start = time.time()
        environment = {STARTED: str(start), "PYTHONPATH": str(ROOT / "benchmarks"), "TORCHINDUCTOR_CACHE_DIR": cache}
        subprocess.run([*map(str, command), *options.arguments], check=True, env=os.environ | environment)
        seconds = time.time() - start
    last = newest_checkpoint(name=name)
    aside = sorted(last.parent.parent.glob("after_*_s.safetensors"))
    return [*((float(path.stem.split("_")[1]), path) for path in aside), (seconds, last)]


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The ratio of Frechet distances and the label accuracy over the minutes, a curve for each seed."""
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
    """Train for each seed, measure what was put aside, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", default=[Path("configs/quick.yaml")], help="one or several")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--every", type=float, default=2.0, metavar="MINUTES", help="between what is put aside (default: 2)")
    parser.add_argument("--samples", type=int, default=10_000, help="digits drawn for each point (default: 10000)")
    parser.add_argument("--last-only", action="store_true", help="measure only what came out in the end")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path, default=Path("docs/time_to_quality"), help="of picture and figures, without ending")
    parser.add_argument("--arguments", nargs=argparse.REMAINDER, default=[], help="more, for train.py")
    options = parser.parse_args()
    if options.samples < 1000 or options.every <= 0:
        raise UserError("--samples must be at least 1000, and --every more than 0")
    score = Judge(device=options.device)
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed, config in itertools.product(options.seeds, options.config):  # in turns, so that a slow hour meets all alike
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
