"""Draw digits by label with a trained model.

python sample.py 7
python sample.py 0-9 --per-class 8
python sample.py 3 1 4 1 5 --out pi.gif
"""

import argparse
import math
import re
import sys
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NoReturn

from flowmatch_mnist.errors import UserError, exit_on_error, one_line

ENDINGS = (".png", ".npz", ".gif")
# Written out here, since importing them would import torch before a mistake on the command line could be told.
SOLVERS = ("euler", "midpoint", "heun", "rk4", "dopri5")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(message)}; see `python {self.prog} --help`\n")


def labels(text: str) -> list[int]:
    """A digit, or a range of digits such as 0-9."""
    match = re.fullmatch(r"([0-9])(?:-([0-9]))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no digit 0-9 and no range such as 0-9")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise argparse.ArgumentTypeError(f"the range {text!r} is empty; write it as {last}-{first}")
    return list(range(first, last + 1))


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not re.fullmatch("[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def finite(text: str) -> float:
    """A finite number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


def parse() -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(prog="sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("labels", type=labels, nargs="+", metavar="LABEL", help="digits or ranges of digits, a column of the grid each")
    add("--per-class", type=positive, default=1, metavar="N", help="rows of the grid (default: 1)")
    add("--checkpoint", type=Path, metavar="FILE", help="the model (default: last.ckpt of the newest run)")
    add("--steps", type=positive, metavar="N", help="solver steps (default: the model's own, from its config)")
    add("--solver", choices=SOLVERS, help="(default: the model's own)")
    add("--guidance", type=finite, metavar="SCALE", help="guidance scale; 1 is off (default: the model's own)")
    add("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    add("--batch-size", type=positive, default=250, metavar="N", help="digits drawn at a time (default: 250)")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)")
    add("--out", type=Path, default="digits.png", metavar="FILE", help="a grid .png, arrays .npz, or the way there .gif")
    options = parser.parse_args()
    if options.out.suffix.lower() not in ENDINGS:
        parser.error(f"--out {options.out} must end in one of {', '.join(ENDINGS)}")
    return options


def main() -> None:
    """Parse the command line, draw, write, and say what was done."""
    options = parse()
    started = time.perf_counter()

    # Imported after parsing, so that a mistake on the command line is told at once.
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from flowmatch_mnist.generate import generate, load, newest_checkpoint
    from flowmatch_mnist.pictures import grid, save_gif, save_npz, save_png

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {device!r} here; use --device cpu") from error
    checkpoint = options.checkpoint or newest_checkpoint()
    net, sampler = load(checkpoint, device)
    asked = {name: getattr(options, name) for name in ("steps", "solver", "guidance")}
    sampler = replace(sampler, **{name: value for name, value in asked.items() if value is not None})

    columns = list(chain.from_iterable(options.labels))
    y = torch.tensor(columns).repeat(options.per_class)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("drawing", total=len(y))
        digits = generate(
            net,
            y,
            sampler,
            seed=options.seed,
            batch_size=options.batch_size,
            keep_states=options.out.suffix.lower() == ".gif",
            on_batch=lambda done: progress.advance(task, done),
        )

    match options.out.suffix.lower():
        case ".png":
            save_png(grid(digits.images, len(columns)), options.out)
        case ".npz":
            save_npz(digits.images, digits.labels, options.out)
        case ".gif":
            assert digits.states is not None
            save_gif(torch.stack([grid(frame, len(columns)) for frame in digits.states]), options.out)
    how = f"{sampler.solver}, {sampler.steps} steps, {digits.evaluations} evaluations each, guidance {sampler.guidance:g}"
    print(f"drew {len(y)} digit{'s' * (len(y) > 1)} with {checkpoint} ({how}, seed {options.seed})")
    print(f"wrote {options.out} after {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    with exit_on_error():
        main()
