"""Score a trained model beside real digits, and put it into the package, where `sample.py --weights NAME` finds it.

    python benchmarks/publish.py mnist --checkpoint runs/mnist/version_0/checkpoints/last.ckpt --command 'python train.py'

The file holds the averaged weights, how to sample them, the run's config, seed and command, and the figures: of ten thousand
digits, and of few enough for a test to draw them again.
"""

import argparse
import json
from pathlib import Path

import lightning
import torch
import yaml
from rich.progress import Progress
from scoring import digit_scorer

from flowmatch_mnist.evaluation.problems import Scorer
from flowmatch_mnist.sampling.generate import Flow, Sampler, generate
from flowmatch_mnist.sampling.weights import PRETRAINED, load_digits, read_checkpoint, save, with_changes
from flowmatch_mnist.support.devices import default_device
from flowmatch_mnist.support.errors import exit_on_error

SAMPLES = (10_000, 500)
"""Of so many digits the figures are taken."""


def measure(flow: Flow, sampler: Sampler, score: Scorer, count: int) -> dict[str, list[float]]:
    """Draw and measure: each measure's value, and what real digits get in its place."""
    labels = torch.arange(count) % 10
    with Progress(transient=True) as progress:
        task = progress.add_task(f"drawing {count:,} digits", total=count)
        samples = generate(flow, labels, sampler, seed=0, on_batch=lambda drawn: progress.advance(task, drawn))
    return {m.name: [m.value, m.baseline] for m in score(samples) if m.main}


def main() -> None:
    """Measure, write, and say so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PRETRAINED)
    parser.add_argument("--checkpoint", type=Path, required=True, help="last.ckpt of a run")
    parser.add_argument("--command", required=True, help="that trained it")
    parser.add_argument("--steps", type=int, help="of its sampler (default: as in its config)")
    parser.add_argument("--guidance", type=float, help="of its sampler (default: as in its config)")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("FROM", "TO"), help="the t in which it acts")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device", default=default_device())
    options = parser.parse_args()
    checkpoint, flow, sampler = load_digits(options.checkpoint, options.device)
    sampler = with_changes(flow, sampler, {name: getattr(options, name) for name in ("steps", "guidance", "guidance_interval")})
    score = digit_scorer(options.data_dir, options.device)
    figures = {str(count): measure(flow, sampler, score, count) for count in SAMPLES}
    config = (checkpoint.parent.parent / "config.yaml").read_text()
    metadata = {
        "command": options.command,
        "config": config,
        "seed": str(yaml.safe_load(config)["seed_everything"]),
        "steps": str(read_checkpoint(checkpoint)["global_step"]),
        "figures": json.dumps(figures),
        "versions": json.dumps({"torch": torch.__version__, "lightning": lightning.__version__}),
    }
    save(PRETRAINED[options.name], flow, sampler, metadata)
    for count, measures in figures.items():
        told = ", ".join(f"{name} {value:.3f} ({real:.3f})" for name, (value, real) in measures.items())
        print(f"{int(count):,} digits, {sampler.description()} (real ones): {told}")
    size = PRETRAINED[options.name].stat().st_size / 1e6
    print(f"wrote {PRETRAINED[options.name]}, {size:.1f} MB")


if __name__ == "__main__":
    with exit_on_error():
        main()
