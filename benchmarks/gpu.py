"""Measure everything on a GPU, in one run of about eleven minutes at most.

    pip install -e '.[rivals]' && python benchmarks/gpu.py        writes docs/gpu.json, and a picture of each config's digits

Each part has a time limit. If a part fails or takes longer, the script notes that, and the next part begins. It writes the file
after each part. No part begins after --seconds.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scoring import UNWATCHED, Judge, scores

from flowmatch_mnist.images.pictures import grid, save_png
from flowmatch_mnist.sampling.generate import generate
from flowmatch_mnist.sampling.weights import load_digits, newest_checkpoint
from flowmatch_mnist.support.choices import PRETRAINED
from flowmatch_mnist.support.devices import default_device
from flowmatch_mnist.support.errors import UserError, exit_on_error
from flowmatch_mnist.support.files import save_json

ROOT = Path(__file__).resolve().parent.parent


def run(seconds: int, script: str, *arguments: object) -> dict[str, Any]:
    """Run a script of this project. Return its seconds and the last lines that it printed."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        raise RuntimeError(f"{script} ended with status {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
    return {"seconds": round(time.perf_counter() - start, 1), "printed": done.stdout.splitlines()[-20:]}


def train(options: argparse.Namespace, name: str, config: str, seconds: int, *arguments: object) -> dict[str, Any]:
    """Train a config as a run of this name. Return the seconds from the command to its end, and the scores of the model."""
    quiet = [*UNWATCHED, "--name", f"gpu_{name}", *arguments]
    found = run(seconds, "train.py", "fit", "--config", ROOT / f"configs/{config}.yaml", *quiet)
    return found | draw(options, newest_checkpoint(name=f"gpu_{name}"), name)


def draw(options: argparse.Namespace, path: Path, name: str) -> dict[str, Any]:
    """Return digits per second after a warm-up, and their scores. Save some digits as a picture."""
    _, flow, sampler = load_digits(path, options.device)
    labels = options.score.labels(options.samples)
    generate(flow, labels[:100], sampler)
    start = time.perf_counter()
    digits = generate(flow, labels, sampler)
    rate = len(labels) / (time.perf_counter() - start)
    shown = torch.stack([digits.values[labels == digit][:10] for digit in range(10)], 1).flatten(0, 1)
    save_png(grid(shown, 10), options.out.with_name(f"{options.out.name}_{name}.png"))
    return {"evaluations": digits.evaluations, "digits/s": round(rate, 1), **scores(options.score(digits))}


def parts(options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the parts by their names, the most important first."""
    return {
        "quick": lambda: train(options, "quick", "quick", 150),
        "sampling": lambda: {name: draw(options, path, f"weights_{name}") for name, path in PRETRAINED.items()},
        "a step beside torchcfm's": lambda: run(90, "benchmarks/speed.py", "--rounds", 4, "--torchcfm", 5),
        "gpu": lambda: train(options, "gpu", "gpu", 150),
        "gpu, CUDA graphs": lambda: train(options, "graphs", "gpu", 150, "--model.compile", "reduce-overhead"),
        "batches and widths": lambda: run(120, "benchmarks/scale.py", "--batches", 256, 1024, "--factors", 2, "--turns", 5),
        "a run that is killed goes on": lambda: run(
            120, "benchmarks/resume.py", "--gpu", "--kills", 1, "--ways", "SIGKILL", "--data-dir", ROOT / "data"
        ),
        "mnist": lambda: train(options, "mnist", "mnist", 240),
        "two GPUs": lambda: train(options, "two", "quick", 150, "--trainer.devices", 2, "--trainer.strategy", "ddp"),
    }


def main() -> None:
    """Measure part after part, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", help="parts to run: quick, sampling, mnist, ... (default: all for which there are enough GPUs)"
    )
    parser.add_argument("--seconds", type=float, default=420, help="no part begins after so many seconds (default: 420)")
    parser.add_argument("--samples", type=int, default=2000, help="digits drawn with each model (default: 2000)")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path, default=Path("docs/gpu"), help="output path, without extension")
    options = parser.parse_args()
    options.score = Judge(device=options.device)
    count = torch.accelerator.device_count()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else options.device,
        "devices": count,
        "torch": torch.__version__,
        "samples": options.samples,
        "parts": {},
    }
    if unknown := set(options.parts or ()) - set(parts(options)):
        raise UserError(f"there is no part {', '.join(sorted(unknown))}; choose from {', '.join(parts(options))}")
    chosen = options.parts or [name for name in parts(options) if name != "two GPUs" or count > 1]
    begun = time.perf_counter()
    for name in chosen:
        if time.perf_counter() - begun > options.seconds:
            break
        try:
            found["parts"][name] = parts(options)[name]()
        except (RuntimeError, FloatingPointError, UserError, subprocess.TimeoutExpired) as error:
            found["parts"][name] = {"failed": str(error)[:600]}
        found["seconds"] = round(time.perf_counter() - begun, 1)
        save_json(options.out.with_suffix(".json"), found)
        print(f"{name}: {json.dumps(found['parts'][name])[:600]}", flush=True)


if __name__ == "__main__":
    with exit_on_error():
        main()
