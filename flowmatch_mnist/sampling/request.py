"""The work of `sample.py` after it has checked its options: draw the digits and write the file."""

import argparse
import sys
import time
from itertools import chain
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from flowmatch_mnist.images import mnist
from flowmatch_mnist.images.pictures import grid, save_gif, save_npz, save_png
from flowmatch_mnist.images.strokes import prepare
from flowmatch_mnist.sampling.generate import INVERSION_SAMPLER, Flow, draw_noise, generate, interpolate, invert
from flowmatch_mnist.sampling.weights import load_digits, with_changes
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.choices import PRETRAINED
from flowmatch_mnist.support.devices import default_device
from flowmatch_mnist.support.errors import UserError

FRAMES = 61
"""The largest number of states in an animation."""


def digit_of(file: str, label_or_index: int, data_dir: Path) -> tuple[Tensor, int]:
    """Return a picture in MNIST's format, uint8 (28, 28), and its label. Print the changes to a user's own picture.

    Args:
        file: a picture, or "test" for MNIST's test set.
        label_or_index: the label of the picture, or the index of the digit in the test set.
        data_dir: the folder of MNIST.

    Raises:
        UserError: if the file is damaged or shows no digit, or MNIST cannot be fetched.
        OSError: if the file cannot be opened.
    """
    if file == "test":
        mnist.prepare(data_dir)
        images, labels = mnist.load(data_dir, "test")
        return images[label_or_index], int(labels[label_or_index])
    try:
        with Image.open(file) as picture:
            picture.load()
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"cannot read {file}: it has too many pixels; make it smaller") from error
    except Exception as error:  # decoders can raise any error for damaged pictures
        raise UserError(f"cannot read {file}: it is no picture, or damaged; use a picture of a digit, such as a PNG") from error
    try:
        digit, done = prepare(picture)
    except ValueError as error:
        raise UserError(f"{file} shows no digit: {error}; use a picture of one digit on a plain background") from error
    print(f"{file}: {done}")
    return digit, label_or_index


def noises(options: argparse.Namespace, given: list[tuple[Tensor, int]], columns: int, rows: int, flow: Flow) -> Tensor | None:
    """Return the noise to start from, (N, 1, 28, 28), row after row of the grid, or None if `generate` should draw it.

    Args:
        options: the options of the command line.
        given: digits uint8 (28, 28) and their labels; the function computes the noise of these digits.
        columns: the number of columns of the grid.
        rows: the number of rows of the grid.
        flow: the flow that carries the noise to the digits.

    Raises:
        UserError: if there are digits, and the network learned too little to find their noise.
    """
    if given:
        with_changes(flow, INVERSION_SAMPLER, {})
    found = [invert(flow, flow.units.encode(digit[None]), torch.tensor([label]))[0] for digit, label in given]
    if not options.interpolate:
        return torch.stack(found * columns) if found else None
    ends = draw_noise(2 * rows, flow.net.shape, streams.generator("cpu", options.seed, "sampling")).unflatten(0, (rows, 2))
    for place, noise in enumerate(found):
        ends[:, place] = noise
    return torch.cat([interpolate(first, last, options.interpolate) for first, last in ends])


def grid_with_given(images: Tensor, columns: int, given: list[tuple[Tensor, int]]) -> Tensor:
    """Arrange images (N, 28, 28), and the given digits, in a grid: uint8 (height, width).

    Each row begins with the first given digit, and ends with the second, if there are any. Its noise comes from these digits.
    """
    rows = images.unflatten(0, (-1, columns))
    ends = [digit.expand(len(rows), 1, *digit.shape) for digit, _ in given]
    return grid(torch.cat([*ends[:1], rows, *ends[1:]], dim=1).flatten(0, 1), columns + len(ends))


def draw_and_write(options: argparse.Namespace, started: float) -> None:
    """Draw and write the digits. Print a summary and the time since `started`, in seconds of `time.perf_counter`."""
    given = [digit_of(file, number, options.data_dir) for file, number in options.from_image or []]
    device = options.device or default_device()
    model, flow, sampler = load_digits(PRETRAINED[options.weights] if options.weights else options.checkpoint, device)
    settings = ("steps", "solver", "guidance", "guidance_interval", "guidance_power", "spacing", "churn")
    sampler = with_changes(flow, sampler, {name: getattr(options, name) for name in settings})

    asked_labels = torch.tensor(list(chain.from_iterable(options.labels)))
    if options.interpolate:  # one row for each label
        columns, y = options.interpolate, asked_labels.repeat(options.per_class).repeat_interleave(options.interpolate)
    else:  # one column for each label
        columns, y = len(asked_labels), asked_labels.repeat(options.per_class)
    noise = noises(options, given, columns, len(y) // columns, flow)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("drawing", total=len(y))
        digits = generate(
            flow,
            y,
            sampler,
            seed=options.seed,
            noise=noise,
            batch_size=options.batch_size,
            keep_states=options.out.suffix.lower() == ".gif",
            on_batch=lambda done: progress.advance(task, done),
        )

    match options.out.suffix.lower():
        case ".png":
            save_png(grid_with_given(digits.values, columns, given), options.out)
        case ".npz":
            save_npz(options.out, images=digits.values, labels=digits.labels)
        case ".gif":
            assert digits.states is not None
            shown = torch.linspace(0, len(digits.states) - 1, min(len(digits.states), FRAMES)).round().long()
            save_gif(torch.stack([grid_with_given(frame, columns, given) for frame in digits.states[shown]]), options.out)
    evaluations = f"{digits.evaluations} evaluation{'s' * (digits.evaluations > 1)} each"
    how = f"{sampler.description()}, {evaluations}, seed {options.seed}"
    print(f"drew {len(y)} digit{'s' * (len(y) > 1)} with {model} ({how})")
    print(f"wrote {options.out} after {time.perf_counter() - started:.1f} s")
