"""Score a trained model against real digits, and put it into the package, where `sample.py --weights NAME` finds it.

    python benchmarks/publish.py one-step --checkpoint RUN/checkpoints/last.ckpt --command COMMAND --machine MACHINE
    python benchmarks/publish.py mnist few-step one-step

The file contains the averaged weights as 16-bit numbers, their sampler, the run's config, seed and command, and the scores with
their standard errors. There are scores for ten thousand digits from each of three noise seeds, and for a count that is small
enough for a test to draw them again. Without a checkpoint, the script scores weights in the package again.
"""

import argparse
import json
from pathlib import Path

import yaml
from rich.progress import Progress
from scoring import Judge

from flowmatch_mnist.sampling.generate import Flow, Sampler, generate
from flowmatch_mnist.sampling.weights import PRETRAINED, load_digits, read_checkpoint, save, with_changes
from flowmatch_mnist.support.devices import default_device
from flowmatch_mnist.support.errors import UserError, exit_on_error
from flowmatch_mnist.support.files import load_weights
from flowmatch_mnist.training.arguments import run_folder

NOISE_SEEDS = {500: [0], 10_000: [0, 1, 2]}
"""Numbers of digits to score, and the random seeds of their noise."""


def measure(flow: Flow, sampler: Sampler, score: Judge, count: int, seed: int) -> dict[str, list[float]]:
    """Draw, score and print. Return each score with its standard error, and the same for real digits."""
    labels = score.labels(count)
    with Progress(transient=True) as progress:
        task = progress.add_task(f"drawing {count:,} digits", total=count)
        samples = generate(flow, labels, sampler, seed=seed, on_batch=lambda drawn: progress.advance(task, drawn))
    measurements = score(samples)
    line = ", ".join(f"{m.title} {m.score} (real digits: {m.real})" for m in measurements)
    print(f"{count:,} digits, noise seed {seed}, {sampler.description()}: {line}", flush=True)
    return {m.name: [*m.samples, *m.real] for m in measurements}


def described(checkpoint: Path, options: argparse.Namespace) -> dict[str, str]:
    """Return the metadata of a run's checkpoint: how it was trained."""
    folder = run_folder(checkpoint)
    if folder is None:
        raise UserError(f"{checkpoint} is not in the folder of a run, which has its config; use last.ckpt of a run")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["trainer"]["default_root_dir"] = None  # a folder of one machine means nothing on another
    return {
        "command": options.command,
        "config": yaml.safe_dump(config, sort_keys=False),
        "seed": str(config["seed_everything"]),
        "steps": str(read_checkpoint(checkpoint)["global_step"]),
        "machine": options.machine,
    }


def main() -> None:
    """Score each model, and write its file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=PRETRAINED)
    parser.add_argument("--checkpoint", type=Path, help="last.ckpt of a run (default: the weights in the package)")
    parser.add_argument("--command", help="the command that trained the checkpoint")
    parser.add_argument("--machine", help="the machine and the versions of that training")
    parser.add_argument("--steps", type=int, help="steps of its sampler (default: as in its config)")
    parser.add_argument("--guidance", type=float, help="guidance scale of its sampler (default: as in its config)")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("FROM", "TO"), help="range of t with guidance")
    parser.add_argument("--guidance-power", type=float, help="power of its guidance (default: as in its config)")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device", default=default_device())
    options = parser.parse_args()
    if options.checkpoint and (len(options.names) > 1 or not options.command or not options.machine):
        raise UserError("--checkpoint needs exactly one name, and the --command and the --machine that trained it")
    score = Judge(options.data_dir, options.device)
    for name in options.names:
        checkpoint, flow, sampler = load_digits(options.checkpoint or PRETRAINED[name], options.device)
        asked = {what: getattr(options, what) for what in ("steps", "guidance", "guidance_interval", "guidance_power")}
        sampler = with_changes(flow, sampler, asked)
        metadata = described(checkpoint, options) if options.checkpoint else load_weights(checkpoint)[1]
        flow.net.half().float()  # rounded to the numbers that the file holds
        scores = {
            str(count): [measure(flow, sampler, score, count, seed) for seed in seeds] for count, seeds in NOISE_SEEDS.items()
        }
        flow.net.half()
        save(PRETRAINED[name], flow, sampler, {**metadata, "scores": json.dumps(scores)})
        print(f"wrote {PRETRAINED[name]}, {PRETRAINED[name].stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    with exit_on_error():
        main()
