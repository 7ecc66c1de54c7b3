"""Does optimal transport between noise and data help a conditional flow, within classes and across them?

    python benchmarks/couplings.py [--steps 700]            about twenty minutes on two cores

The script trains the prompted toy and a shortened `configs/quick.yaml` with each coupling, on equal numbers of batches. Then it
scores the samples: points by their distance to the curve and by their segment, 2,000 digits by the evaluator.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from scoring import UNWATCHED, Judge

from flowmatch_mnist.data.curve import Curve
from flowmatch_mnist.evaluation.estimates import Measurement
from flowmatch_mnist.flow.couplings import COUPLINGS
from flowmatch_mnist.sampling.generate import Sampler, generate
from flowmatch_mnist.sampling.weights import load, newest_checkpoint
from flowmatch_mnist.support.errors import exit_on_error

ROOT = Path(__file__).resolve().parent.parent


def train(config: str, coupling: str, *options: object) -> Path:
    """Train a config with a coupling, and return the path of its checkpoint."""
    name = f"{config}_{coupling}"
    command = ["train.py", "--config", f"configs/{config}.yaml", "--name", name, "--data.coupling", coupling, *options]
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return newest_checkpoint(ROOT / "runs", name)


def tell(what: str, sampler: Sampler, measurements: Sequence[Measurement]) -> None:
    """Print the scores of one model and sampler."""
    words = ", ".join(f"{m.title} {m.score}" for m in measurements)
    print(f"{what}: {sampler.description()}: {words}", flush=True)


def main() -> None:
    """Train and score with every coupling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700, help="training steps for the digits (default: 700)")
    steps = parser.parse_args().steps
    score_points, score_digits = Curve(classes=10).measure, Judge()
    for coupling in COUPLINGS:
        # Small batches, because the cost of an assignment grows with the cube of the batch size.
        flow, own = load(train("toy_prompted", coupling, "--data.batch_size", 250, "--trainer.max_epochs", 10))
        for sampler in (Sampler(4, "euler"), own):
            labels = torch.arange(10).repeat(1000)
            points = generate(flow, labels, sampler, batch_size=10_000)
            tell(f"toy, {coupling}", sampler, score_points(points))
    for coupling in COUPLINGS:
        length = ["--trainer.max_steps", steps, "--trainer.val_check_interval", steps, *UNWATCHED]
        length += ["--model.exact_until", 0]  # the exact target needs independent noise
        flow, _ = load(train("quick", coupling, *length))
        for sampler in (Sampler(4, "euler"), Sampler(4, "euler", 1.5), Sampler(8, "midpoint")):
            tell(f"digits, {coupling}", sampler, score_digits(generate(flow, score_digits.labels(2000), sampler)))


if __name__ == "__main__":
    with exit_on_error():
        main()
