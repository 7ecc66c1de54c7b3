"""Steps against quality: score every solver with every number of evaluations and every guidance scale.

    python benchmarks/steps.py --checkpoint runs/quick/version_0/checkpoints/last.ckpt

draws the curves to `docs/steps.png` and writes all scores to `docs/steps.json`. The axis counts network evaluations for each
digit (NFE). Guidance takes two evaluations at a time. So every setting costs the same at equal NFE.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.progress import track
from scoring import Judge, scores

from flowmatch_mnist.sampling.generate import Flow, Sampler, generate
from flowmatch_mnist.sampling.weights import load_digits, with_changes
from flowmatch_mnist.support.choices import SOLVERS
from flowmatch_mnist.support.devices import default_device
from flowmatch_mnist.support.errors import UserError, exit_on_error
from flowmatch_mnist.support.files import replacing, save_json

EVALUATIONS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "dpmpp_2m": 1, "average": 1}
"""Network evaluations of each solver in one step."""


def samplers(solvers: list[str], evaluations: list[int], guidances: list[float]) -> list[Sampler]:
    """Return the settings to measure: each takes as many steps as the evaluations allow. dopri5 chooses its own steps."""
    found = []
    for solver in solvers:
        for guidance in guidances:
            if solver == "dopri5":
                found.append(Sampler(1, solver, guidance))
                continue
            each = EVALUATIONS[solver] * (1 if guidance in (0, 1) else 2)
            found += [Sampler(total // each, solver, guidance) for total in evaluations if total % each == 0]
    return found


def measure(flow: Flow, sampler: Sampler, score: Judge, count: int, seed: int) -> dict[str, Any]:
    """Draw and score digits. Return the sampler, its evaluations and the scores."""
    samples = generate(flow, score.labels(count), sampler, seed=seed)
    return {"sampler": asdict(sampler), "evaluations": samples.evaluations, **scores(score(samples))}


def draw(points: list[dict[str, Any]], path: Path, title: str) -> None:
    """Plot Frechet distance ratio and label accuracy over the evaluations, a curve for each solver and guidance scale."""
    figure = Figure(figsize=(11, 4.5), dpi=100, layout="constrained")
    axes = figure.subplots(1, 2)
    guidances = sorted({point["sampler"]["guidance"] for point in points})
    solvers = list(dict.fromkeys(point["sampler"]["solver"] for point in points))
    for number, solver in enumerate(solvers):
        for guidance, line in zip(guidances, ("-", "--", ":", "-."), strict=False):
            curve = [p for p in points if (p["sampler"]["solver"], p["sampler"]["guidance"]) == (solver, guidance)]
            x = [point["evaluations"] for point in curve]
            style = {"color": f"C{number}", "linestyle": line, "marker": "*" if solver == "dopri5" else ".", "markersize": 7}
            label = f"{solver}, guidance {guidance:g}"
            axes[0].plot(x, [point["Frechet distance ratio"] for point in curve], label=label, **style)
            axes[1].plot(x, [point["label accuracy"] for point in curve], label=label, **style)
    axes[0].set(xscale="log", yscale="log", xlabel="evaluations (NFE)", ylabel="Frechet distance, over that of real data")
    axes[1].set(xscale="log", ylim=(0.85, 1.003), xlabel="evaluations (NFE)", ylabel="label accuracy")
    for each in axes:
        each.set_xticks(ticks := [1, 2, 4, 8, 16, 32, 64], [str(tick) for tick in ticks])
        each.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    with replacing(path) as temporary:
        figure.savefig(temporary)


def main() -> None:
    """Measure all settings, print and write the scores, and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="default: last.ckpt of the newest run")
    parser.add_argument("--samples", type=int, default=2000, help="digits for each setting (default: 2000)")
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=["euler", "heun", "dpmpp_2m", "dopri5"])
    parser.add_argument("--evaluations", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0, 1.25, 1.5])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path, default=Path("docs/steps"), help="output path, without extension")
    options = parser.parse_args()
    if min(options.samples, *options.evaluations) < 1:
        raise UserError("--samples and --evaluations must be at least 1")
    checkpoint, flow, _ = load_digits(options.checkpoint, options.device)
    asked = [with_changes(flow, s, {}) for s in samplers(options.solvers, options.evaluations, options.guidance)]
    score = Judge(options.data_dir, options.device)
    points = []
    for sampler in track(asked, "measuring"):
        points.append(measure(flow, sampler, score, options.samples, options.seed))
        line = ", ".join(f"{name} {value:.3f}" for name, value in points[-1].items() if isinstance(value, float))
        print(f"{sampler.description()} (NFE {points[-1]['evaluations']}): {line}", flush=True)
    contents = {"checkpoint": str(checkpoint), "samples": options.samples, "seed": options.seed, "points": points}
    save_json(options.out.with_suffix(".json"), contents)
    draw(points, options.out.with_suffix(".png"), f"{checkpoint}, {options.samples:,} digits, seed {options.seed}")
    print(f"wrote {options.out}.png and {options.out}.json")


if __name__ == "__main__":
    with exit_on_error():
        main()
