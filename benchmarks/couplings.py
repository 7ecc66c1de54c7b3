"""What does it do to a conditional flow to pair noise with data by optimal transport, within classes and across them?

    python benchmarks/couplings.py [--steps 700]            some twenty minutes on two cores

Trains the prompted toy and a shortened `configs/quick.yaml` with each coupling, on equal numbers of batches, and measures what
each draws: points by their distance to the curve and their segment, digits by their label (see `label_accuracy.py`).
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from flowmatch_mnist.couplings import COUPLINGS
from flowmatch_mnist.errors import exit_on_error
from flowmatch_mnist.generate import Sampler, generate, load, newest_checkpoint
from flowmatch_mnist.toy import CurveDataModule

ROOT = Path(__file__).resolve().parent.parent


def train(config: str, coupling: str, *options: object) -> Path:
    """Train a config with a coupling; the checkpoint."""
    name = f"{config}_{coupling}"
    command = ["train.py", "--config", f"configs/{config}.yaml", "--name", name, "--data.coupling", coupling, *options]
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return newest_checkpoint(ROOT / "runs", name)


def main() -> None:
    """Train and measure them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700, help="of the digits' training (default: 700)")
    steps = parser.parse_args().steps
    for coupling in COUPLINGS:
        # Few points to a batch: the cost of an assignment grows with the cube of their number.
        flow, own = load(train("toy_prompted", coupling, "--data.batch_size", 250, "--trainer.max_epochs", 10))
        data = CurveDataModule(prompted=True)
        for sampler in (Sampler(4, "euler"), own):
            labels = torch.arange(10).repeat(1000)
            points = generate(flow, labels, sampler, batch_size=10_000, finish=data.finish)
            figures = data.measure(points, "test", torch.device("cpu"))
            words = ", ".join(f"{figure.name} {figure.value:.3f}" for figure in figures)
            print(f"toy, {coupling}: {sampler.description()}: {words}", flush=True)
    for coupling in COUPLINGS:
        length = ["--trainer.max_steps", steps, "--trainer.val_check_interval", steps, "--sampling.every_n_steps", 0]
        checkpoint = train("quick", coupling, *length)
        print(f"digits, {coupling}:", flush=True)
        subprocess.run([sys.executable, "benchmarks/label_accuracy.py", "--checkpoint", checkpoint], cwd=ROOT, check=True)


if __name__ == "__main__":
    with exit_on_error():
        main()
