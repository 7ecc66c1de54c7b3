"""How many bits does a digit take, and does the flow know its class?

    python benchmarks/likelihood.py                          the newest run, 200 test digits under every label
    python benchmarks/likelihood.py --images 1000 --solver dopri5 --tolerance 1e-4 --out runs/likelihood.json

The script measures bits per dimension of MNIST's official test set, dequantised with uniform noise, given the label and
without it. It also measures how often a digit is likeliest under its own label. It integrates the instantaneous change of
variables, with Hutchinson's estimate of the divergence. The likelihood says nothing about how good drawn digits look (Theis et
al. 2016, section 3.2).
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from flowmatch_mnist.images import mnist
from flowmatch_mnist.images.pixels import PIXELS, bits_per_dimension, dequantize
from flowmatch_mnist.sampling.generate import Sampler
from flowmatch_mnist.sampling.likelihood import LIKELIHOOD_SAMPLER, marginal_log_likelihood
from flowmatch_mnist.sampling.weights import load_digits, with_changes
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.choices import SOLVERS, SPACINGS
from flowmatch_mnist.support.devices import default_device
from flowmatch_mnist.support.errors import UserError, exit_on_error
from flowmatch_mnist.support.files import save_json


def mean(values: Tensor) -> dict[str, float]:
    """Return the mean of some values, and its standard error."""
    return {"mean": values.mean().item(), "standard_error": values.std().item() / math.sqrt(len(values))}


def in_words(estimate: dict[str, float]) -> str:
    """Return a mean and its standard error as text."""
    return "{mean:.4f} +- {standard_error:.4f}".format(**estimate)


def main() -> None:
    """Measure, print the results, and write them if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="the model (default: last.ckpt of the newest run)")
    parser.add_argument(
        "--images", type=int, default=200, help="number of test digits, 2 to 10,000, in a fixed shuffled order (default: 200)"
    )
    parser.add_argument(
        "--solver", choices=SOLVERS, default=LIKELIHOOD_SAMPLER.solver, help=f"(default: {LIKELIHOOD_SAMPLER.solver})"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=LIKELIHOOD_SAMPLER.steps,
        help=f"(default: {LIKELIHOOD_SAMPLER.steps}; dopri5 chooses its own)",
    )
    parser.add_argument("--spacing", choices=SPACINGS, default=LIKELIHOOD_SAMPLER.spacing, help="spacing of the steps")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="tolerance of dopri5 (default: 1e-5)")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale of the flow (default: 1, none)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the pixels' noise and of the probes (default: 0)")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path, help="path of a JSON file for the results")
    options = parser.parse_args()
    try:
        sampler = Sampler(options.steps, options.solver, options.guidance, spacing=options.spacing)
    except ValueError as error:
        raise UserError(error) from error
    if not 2 <= options.images <= 10_000 or options.batch_size < 1 or not 0 < options.tolerance < 1:
        raise UserError("--images must be 2 to 10000, --batch-size at least 1, and --tolerance between 0 and 1")
    if not sampler.reversible:
        raise UserError(f"{sampler.solver} cannot go from data to noise; choose another --solver")
    checkpoint, flow, _ = load_digits(options.checkpoint, options.device)
    with_changes(flow, sampler, {})
    mnist.prepare(options.data_dir)
    images, labels = mnist.load(options.data_dir, "test")
    chosen = torch.randperm(len(images), generator=streams.generator("cpu", "likelihood"))[: options.images]
    # Numbers within the test set: so a digit's noise and probe do not depend on how many digits are measured.
    numbers = chosen.tolist()
    x1, log_slope = dequantize(images[chosen], PIXELS[flow.units.name], seed=options.seed, numbers=numbers)

    started = time.perf_counter()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("integrating", total=len(x1) * flow.net.no_label)
        found = marginal_log_likelihood(
            flow,
            x1,
            sampler,
            seed=options.seed,
            numbers=numbers,
            batch_size=options.batch_size,
            tolerance=options.tolerance,
            on_batch=lambda done: progress.advance(task, done),
        )
    seconds = time.perf_counter() - started

    y = labels[chosen]
    log_p_own = found.log_p_given.gather(1, y[:, None])[:, 0]
    how = f"tolerance {options.tolerance:g}" if sampler.solver == "dopri5" else sampler.description()
    results: dict[str, Any] = {
        "bits_per_dimension_given_the_label": mean(bits_per_dimension(log_p_own, log_slope, x1[0].numel())),
        "bits_per_dimension": mean(bits_per_dimension(found.log_p, log_slope, x1[0].numel())),
        "accuracy": mean((found.log_p_given.argmax(1) == y).double()),
        "evaluations": found.evaluations,
        "seconds": seconds,
    }
    print(f"{checkpoint}, {len(x1)} test digits, {how}, {flow.units.name} pixels, seed {options.seed}")
    print(f"bits per dimension, given the label: {in_words(results['bits_per_dimension_given_the_label'])}")
    print(f"bits per dimension, over all labels: {in_words(results['bits_per_dimension'])}")
    print(f"accuracy of the likeliest label:     {in_words(results['accuracy'])}")
    print(f"{found.evaluations} evaluations for each digit and label, {seconds:.0f} s")
    if options.out:
        settings = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items() if name != "out"}
        save_json(options.out, settings | {"checkpoint": str(checkpoint)} | results)
        print(f"wrote {options.out}")


if __name__ == "__main__":
    with exit_on_error():
        main()
