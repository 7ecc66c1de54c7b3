"""Few steps: score teacher, reflowed, distilled and mean-flow networks at 1, 2, 4 and 8 evaluations against real digits.

The script also measures how straight the trajectories of each network are.

    python benchmarks/few_steps.py teacher=mnist 2-reflow=runs/reflow/version_0/checkpoints/last.ckpt ...

A model is NAME=WEIGHTS: a file, or a name of weights in the package. Each is sampled with its own solver and guidance, in as
many steps as the evaluations allow. A guided step takes two evaluations. To give several seeds of one model, repeat its NAME:
the table then has their mean and range. The script writes `docs/few_steps.json`, `docs/few_steps.png` (the same ten noises in
each row) and `docs/trajectories.png` (the trajectories of some pixels from noise to digit). It prints the table.
"""

import argparse
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from scoring import Judge
from steps import measure

from flowmatch_mnist.data.reflow import straightness
from flowmatch_mnist.images.pictures import grid, save_png
from flowmatch_mnist.sampling.generate import Flow, Sampler, generate
from flowmatch_mnist.sampling.weights import load_digits, weights_path
from flowmatch_mnist.support.devices import default_device
from flowmatch_mnist.support.errors import UserError, exit_on_error
from flowmatch_mnist.support.files import replacing, save_json

FINE = 50
"""Number of Euler steps for the measurement of straightness."""

SHOWN = {"Frechet distance ratio": ".2f", "label accuracy": ".3f", "recall": ".3f"}


def with_evaluations(flow: Flow, sampler: Sampler, evaluations: int) -> Sampler:
    """Return the sampler with as many steps as the evaluations allow, without guidance if they do not allow one guided step."""
    for steps in range(evaluations, 0, -1):
        tried = replace(sampler, steps=steps)
        if generate(flow, torch.zeros(1, dtype=torch.int64), tried).evaluations <= evaluations:
            return tried
    return replace(sampler, steps=evaluations, guidance=1.0)


def trajectories(flow: Flow, sampler: Sampler, count: int = 200) -> torch.Tensor:
    """Return the states of `count` digits at equally spaced times: (FINE + 1, count, 1, 28, 28)."""
    fine = replace(sampler, steps=FINE, solver="euler")
    drawn = generate(flow, torch.arange(count) % 10, fine, keep_states=True, decode=torch.Tensor.clone)
    assert drawn.states is not None
    return drawn.states


def draw_trajectories(found: dict[str, torch.Tensor], path: Path) -> None:
    """Draw the trajectories of some pixels, one panel for each model. All panels have the same pixels of the same noises."""
    figure = Figure(figsize=(3.2 * len(found), 3), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(found), sharex=True, sharey=True, squeeze=False)[0]
    pixels = next(iter(found.values()))[0].numel()
    chosen = torch.randint(pixels, (40,), generator=torch.Generator().manual_seed(0))
    for axes, (name, states) in zip(panels, found.items(), strict=True):
        flat = states.flatten(1)
        axes.plot(torch.linspace(0, 1, len(flat)).numpy(), flat[:, chosen].numpy(), linewidth=0.6)
        axes.set(title=f"{name}: {straightness(states).mean():.3f}", xlabel="t")
    panels[0].set_ylabel("grey level of a pixel")
    with replacing(path) as temporary:
        figure.savefig(temporary)


def main() -> None:
    """Score all models, print the table, and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=WEIGHTS")
    parser.add_argument("--evaluations", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--samples", type=int, default=10_000, help="digits for each setting (default: 10000)")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path, default=Path("docs/few_steps"), help="output path, without extension")
    options = parser.parse_args()
    models = [tuple(model.split("=", 1)) for model in options.models]
    if any(len(model) != 2 for model in models):
        raise UserError("cannot read the models: write each as NAME=WEIGHTS, such as teacher=mnist")
    score = Judge(options.data_dir, options.device)
    rows: dict[str, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    straight: dict[str, list[float]] = defaultdict(list)
    shown, states = [], {}
    for name, weights in models:
        _, flow, sampler = load_digits(weights_path(weights), options.device)
        asked = [1] if flow.one_step else options.evaluations
        samplers = {evaluations: with_evaluations(flow, sampler, evaluations) for evaluations in asked}
        if not flow.one_step:  # a network that learned only one step has no trajectories
            states.setdefault(name, found := trajectories(flow, sampler))
            straight[name].append(straightness(found).mean().item())
        if name not in rows:
            shown += [generate(flow, torch.arange(10), spending).values for spending in samplers.values()]
        for evaluations, spending in samplers.items():
            point = measure(flow, spending, score, options.samples, seed=0)
            rows[name][evaluations].append(point)
            words = ", ".join(f"{what} {point[what]:{form}}" for what, form in SHOWN.items())
            print(f"{name}, NFE {point['evaluations']}: {words}", flush=True)
            contents = {"samples": options.samples, "models": options.models, "straightness": straight, "rows": rows}
            save_json(options.out.with_suffix(".json"), contents)
    save_png(grid(torch.cat(shown), 10), options.out.with_suffix(".png"))
    if states:
        draw_trajectories(states, options.out.with_name("trajectories.png"))
    print(f"\n| | straightness | {' | '.join(f'NFE {n}' for n in options.evaluations)} |")
    print("|---" * (len(options.evaluations) + 2) + "|")
    for name, row in rows.items():
        cells = [spread(straight[name], ".3f")]
        for n in options.evaluations:
            cells.append(", ".join(spread([point[what] for point in row[n]], form) for what, form in SHOWN.items() if row[n]))
        print(f"| {name} | {' | '.join(cells)} |")


def spread(values: list[float], form: str) -> str:
    """Return the mean as text, and the range of several values; an empty text without values."""
    if not values:
        return ""
    mean = f"{sum(values) / len(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


if __name__ == "__main__":
    with exit_on_error():
        main()
