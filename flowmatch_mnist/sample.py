"""Draw digits by label with a trained model.

python sample.py 7
python sample.py 0-9 --per-class 8
python sample.py 3 1 4 1 5 --out pi.gif
python sample.py 7 --interpolate 10                       ten digits between two random noises
python sample.py 0-9 --from-image seven.jpg:7             all digits in the handwriting of your own seven
python sample.py 0-9 --from-image test:0                  the same with a digit of MNIST's test set
"""

import argparse
import math
import re
import time
from pathlib import Path

from flowmatch_mnist.support.choices import PRETRAINED, SOLVERS, SPACINGS
from flowmatch_mnist.support.commands import CommandParser, as_typed
from flowmatch_mnist.support.errors import exit_on_error

ENDINGS = (".png", ".npz", ".gif")


def labels(text: str) -> list[int]:
    """Return the digits in a text: one digit, or a range such as 0-9.

    Raises:
        argparse.ArgumentTypeError: for any other text.
    """
    match = re.fullmatch(r"([0-9])(?:-([0-9]))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a digit from 0 to 9 nor a range such as 0-9")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise argparse.ArgumentTypeError(f"the range {text!r} is empty; write {last}-{first}")
    return list(range(first, last + 1))


def positive(text: str) -> int:
    """Return the number in a text: a whole number of at least 1, and with at most nine digits.

    Raises:
        argparse.ArgumentTypeError: for any other text.
    """
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 999999999")
    return int(text)


def finite(text: str) -> float:
    """Return the number in a text: a finite number.

    Raises:
        argparse.ArgumentTypeError: for any other text.
    """
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


def interval(text: str) -> tuple[float, float]:
    """Return the interval of t in a text such as 0.2-0.9: two rising times in [0, 1].

    Raises:
        argparse.ArgumentTypeError: for any other text.
    """
    match = re.fullmatch(r"([0-9.]+)-([0-9.]+)", text)
    start, end = (finite(match[1]), finite(match[2])) if match else (1.0, 0.0)
    if not 0 <= start <= end <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an interval of t in [0, 1], such as 0.2-0.9")
    return start, end


def image(text: str) -> tuple[str, int]:
    """Return a file and its label, as in seven.png:7, or "test" and the number of a digit in MNIST's test set, as in test:0.

    Raises:
        argparse.ArgumentTypeError: for any other text.
    """
    file, _, number = text.rpartition(":")
    if not file or not re.fullmatch("[0-9]+", number) or int(number) > (9999 if file == "test" else 9):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a picture and its label, FILE:0-9, nor test:0-9999")
    return file, int(number)


def parse() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = CommandParser(prog=as_typed("sample"), description=__doc__)
    add = parser.add_argument
    add(
        "labels",
        type=labels,
        nargs="+",
        metavar="LABEL",
        help="digits or ranges of digits; each one is a column of the grid (with --interpolate, a row)",
    )
    add(
        "--per-class",
        type=positive,
        default=1,
        metavar="N",
        help="rows of the grid; with --interpolate, rows of each label (default: 1)",
    )
    add = parser.add_mutually_exclusive_group().add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="the model's checkpoint (default: last.ckpt of the newest run, if any)")
    add("--weights", choices=PRETRAINED, help="trained weights in the package as the model (default without a run: mnist)")
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("digits.png"),
        metavar="FILE",
        help="a .png (grid), .npz (arrays) or .gif (animation); default: digits.png",
    )
    add("--seed", type=int, default=0, help="random seed of the noise (default: 0)")
    add("--batch-size", type=positive, metavar="N", help="digits drawn at a time (default: 100 on a CPU, 1000 on a GPU)")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if available)")
    add = parser.add_argument_group("sampler (default: the model's own settings, from its config)").add_argument
    add("--steps", type=positive, metavar="N", help="number of solver steps")
    add("--solver", choices=SOLVERS, help="how a step follows the field")
    add("--spacing", choices=SPACINGS, help="spacing of the steps: equal in time, or in log-SNR")
    add(
        "--guidance",
        type=finite,
        metavar="SCALE",
        help="guidance scale; 1 is off; with a guidance power, use numbers just above 1, such as 1.07",
    )
    add("--guidance-interval", type=interval, metavar="FROM-TO", help="range of t with guidance, such as 0.2-0.9")
    add("--guidance-power", type=finite, metavar="P", help="0 guides all digits alike; 2 guides mostly those in doubt")
    add("--churn", type=finite, help="noise renewed during sampling: 0 is the ODE, 1 is DDPM's ancestral sampling")
    group = parser.add_argument_group("noise to start from (default: drawn from the seed)")
    add = group.add_argument
    add("--interpolate", type=positive, metavar="N", help="N digits in each row, whose noise changes from one noise to another")
    add(
        "--from-image",
        type=image,
        action="append",
        metavar="FILE:LABEL",
        help="start from the noise of this digit, and show it in the first column: a picture, or test:N of MNIST's test set",
    )
    add("--data-dir", type=Path, default="data", metavar="DIR", help="folder of MNIST, for test:N (default: data)")
    options = parser.parse_args()
    if options.out.suffix.lower() not in ENDINGS:
        parser.error(f"--out {options.out} must end in one of {', '.join(ENDINGS)}")
    if len(options.from_image or []) > (2 if options.interpolate else 1):
        parser.error("--from-image may be given once, or twice with --interpolate")
    if len(options.from_image or []) == (2 if options.interpolate else 1) and options.per_class > 1:
        parser.error("--from-image gives all noise, so all rows would be the same; leave out --per-class")
    return options


def main() -> None:
    """Parse the command line, draw the digits, write the file and print a summary."""
    with exit_on_error():
        options = parse()
        started = time.perf_counter()
        # Imported after parsing, because a mistake on the command line should be reported at once.
        from flowmatch_mnist.sampling.request import draw_and_write

        draw_and_write(options, started)


if __name__ == "__main__":
    main()
