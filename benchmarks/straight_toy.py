"""Compare the toy before and after reflow: its trajectories, their straightness, and the results of few steps.

    python train.py --config configs/toy.yaml
    python -m flowmatch_mnist.reflow --pairs 50000 --out pairs_toy
    python train.py --config configs/toy_reflow.yaml
    python benchmarks/straight_toy.py

The script writes `docs/straight_toy.png`. It prints the straightness of each model (Liu et al. 2022, equation 9; 0 is
straight), and the mean distance of points to the curve after a few Euler steps.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from flowmatch_mnist.data.curve import LENGTH, Curve, curve
from flowmatch_mnist.data.reflow import straightness
from flowmatch_mnist.sampling.generate import Flow, Sampler, Samples, generate
from flowmatch_mnist.sampling.weights import load, newest_checkpoint
from flowmatch_mnist.support.errors import exit_on_error
from flowmatch_mnist.support.files import replacing

POINTS = 5000
SHOWN = 200


def draw(flow: Flow, steps: int) -> Samples:
    """Draw points by Euler steps, and keep the states of their trajectories."""
    return generate(flow, torch.zeros(POINTS, dtype=torch.int64), Sampler(steps, "euler"), keep_states=True)


def main() -> None:
    """Measure both models, print the results, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="default: the newest run called toy")
    parser.add_argument("--after", type=Path, help="default: the newest run called toy_reflow")
    parser.add_argument("--out", type=Path, default=Path("docs/straight_toy.png"))
    options = parser.parse_args()
    figure = Figure(figsize=(12, 4), dpi=100, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    x = torch.linspace(0, LENGTH, 400)
    given = (("before", "toy", options.before), ("after", "toy_reflow", options.after))
    for axes, (when, name, path) in zip(panels, given, strict=True):
        flow, _ = load(path or newest_checkpoint(name=name))
        fine = draw(flow, 100)
        assert fine.states is not None
        # In the units of the network, as in the paper.
        bend = straightness(flow.units.encode(fine.states)).mean().item()
        ends = []
        for steps in (1, 2, 4):
            (near,) = Curve().measure(draw(flow, steps))
            ends.append(f"{steps} step{'s' * (steps > 1)} {near.score}")
        print(f"{when} reflow: straightness {bend:.4f}; {'; '.join(ends)}", flush=True)
        lines = fine.states[:, :SHOWN]
        for n in range(SHOWN):
            axes.plot(lines[:, n, 0], lines[:, n, 1], color="grey", linewidth=0.5)
        axes.scatter(*fine.values[:SHOWN].T, s=6)
        axes.plot(*curve(x).T, color="black", linewidth=0.8)
        axes.set(title=f"{when} reflow: straightness {bend:.3f}", aspect="equal")
    with replacing(options.out) as temporary:
        figure.savefig(temporary)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    with exit_on_error():
        main()
