"""Draw digits by label with a trained model.

python sample.py 7
python sample.py 0-9 --per-class 8
python sample.py 3 1 4 1 5 --out pi.gif
python sample.py 7 --interpolate 10                       from one noise to another
python sample.py 0-9 --from-image seven.jpg:7             your own seven, and its hand in every class
python sample.py 0-9 --from-image test:0                  the same with a digit of MNIST's test set
"""

import argparse
import math
import re
import time
from pathlib import Path

from flowmatch_mnist.support.choices import PRETRAINED, SOLVERS, SPACINGS
from flowmatch_mnist.support.errors import CommandParser, exit_on_error

ENDINGS = (".png", ".npz", ".gif")


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


def interval(text: str) -> tuple[float, float]:
    """Two rising times in [0, 1], such as 0.2-0.9."""
    match = re.fullmatch(r"([0-9.]+)-([0-9.]+)", text)
    start, end = (finite(match[1]), finite(match[2])) if match else (1.0, 0.0)
    if not 0 <= start <= end <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no interval of t such as 0.2-0.9")
    return start, end


def image(text: str) -> tuple[str, int]:
    """A picture's file and its label, such as seven.png:7; or test and a number, for a digit of MNIST's test set."""
    file, _, number = text.rpartition(":")
    if not file or not re.fullmatch("[0-9]+", number) or int(number) > (9999 if file == "test" else 9):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a picture and its label, FILE:0-9, nor test:0-9999")
    return file, int(number)


def parse() -> argparse.Namespace:
    """The command line, checked."""
    parser = CommandParser(prog="python sample.py", description=__doc__)
    add = parser.add_argument
    add("labels", type=labels, nargs="+", metavar="LABEL", help="digits or ranges of digits, a column of the grid each")
    add("--per-class", type=positive, default=1, metavar="N", help="rows of the grid (default: 1)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="the model (default: last.ckpt of the newest run, if there is one)")
    add("--weights", choices=PRETRAINED, help="the model: trained weights in the package (default, before there is a run)")
    add = parser.add_argument
    add("--out", type=Path, default="digits.png", metavar="FILE", help="a grid .png, arrays .npz, or the way there .gif")
    add("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    add("--batch-size", type=positive, metavar="N", help="digits drawn at a time (default: 100 on a processor, 1000 on a GPU)")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)")
    add = parser.add_argument_group("how to solve (default: the model's own way, from its config)").add_argument
    add("--steps", type=positive, metavar="N", help="solver steps")
    add("--solver", choices=SOLVERS)
    add("--spacing", choices=SPACINGS, help="of the steps: equal in time, or in log-SNR")
    add("--guidance", type=finite, metavar="SCALE", help="guidance scale; 1 is off")
    add("--guidance-interval", type=interval, metavar="FROM-TO", help="the t in which guidance acts, such as 0.2-0.9")
    add("--churn", type=finite, help="noise renewed on the way: 0 is the ODE, 1 is DDPM's ancestral sampling")
    group = parser.add_argument_group("which noise to start from (default: drawn from the seed)")
    add = group.add_argument
    add("--interpolate", type=positive, metavar="N", help="N noises in each row, along the sphere from one to another")
    add(
        "--from-image",
        type=image,
        action="append",
        metavar="FILE:LABEL",
        help="the noise of a digit, which is shown in the first column: any picture of one, or test:N of MNIST's test set",
    )
    add("--data-dir", type=Path, default="data", metavar="DIR", help="where MNIST is, for test:N (default: data)")
    options = parser.parse_args()
    if options.out.suffix.lower() not in ENDINGS:
        parser.error(f"--out {options.out} must end in one of {', '.join(ENDINGS)}")
    if len(options.from_image or []) > (2 if options.interpolate else 1):
        parser.error("--from-image is given once, or twice with --interpolate")
    if options.from_image and not options.interpolate and options.per_class > 1:
        parser.error("--from-image gives one noise, so that all rows would be the same; leave out --per-class")
    return options


def main() -> None:
    """Parse the command line, draw, write, and say what was done."""
    options = parse()
    started = time.perf_counter()
    # Imported after parsing, so that a mistake on the command line is told at once.
    from flowmatch_mnist.sampling.request import fulfil

    fulfil(options, started)


if __name__ == "__main__":
    with exit_on_error():
        main()
