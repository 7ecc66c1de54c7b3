"""What a command line asks for, from its labels to its file: `sample.py`, once its options are checked."""

import argparse
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from flowmatch_mnist.images import mnist
from flowmatch_mnist.images.pictures import grid, save_gif, save_npz, save_png
from flowmatch_mnist.sampling.generate import Flow, draw_noise, generate, interpolate, invert
from flowmatch_mnist.sampling.weights import load_digits, with_changes
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.choices import PRETRAINED
from flowmatch_mnist.support.devices import default_device
from flowmatch_mnist.support.errors import UserError

FRAMES = 61
"""At most as many states make up an animation."""


def noise_of(file: str, number: int, flow: Flow, data_dir: Path) -> Tensor:
    """The noise that the flow carries to a picture, (1, 28, 28)."""
    if file == "test":
        mnist.prepare(data_dir)
        images, labels = mnist.load(data_dir, "test")
        pixels, label = images[number : number + 1], int(labels[number])
    else:
        try:
            with Image.open(file) as picture:
                pixels, label = torch.from_numpy(np.array(picture.convert("L").resize((28, 28))))[None], number
        except (FileNotFoundError, IsADirectoryError, PermissionError):
            raise
        except Exception as error:  # decoders raise whatever damaged or oversized pictures lead to
            raise UserError(f"{file} is no picture, or damaged; give a PNG of a white digit on black") from error
    return invert(flow, flow.units.encode(pixels), torch.tensor([label]))[0]


def noises(options: argparse.Namespace, columns: int, rows: int, flow: Flow) -> Tensor | None:
    """The noise (N, 1, 28, 28) that was asked for in place of the seed's, row after row of the grid; None for the seed's."""
    given = [noise_of(file, number, flow, options.data_dir) for file, number in options.from_image or []]
    if not options.interpolate:
        return torch.stack(given * columns) if given else None
    ends = draw_noise(2 * rows, flow.net.shape, streams.generator("cpu", options.seed, "sampling")).unflatten(0, (rows, 2))
    for place, noise in enumerate(given):
        ends[:, place] = noise
    return torch.cat([interpolate(first, last, options.interpolate) for first, last in ends])


def fulfil(options: argparse.Namespace, started: float) -> None:
    """Draw, write, and say what was done and how long it took since `started`, in seconds of `time.perf_counter`."""
    device = options.device or default_device()
    model, flow, sampler = load_digits(PRETRAINED[options.weights] if options.weights else options.checkpoint, device)
    settings = ("steps", "solver", "guidance", "guidance_interval", "spacing", "churn")
    sampler = with_changes(flow, sampler, {name: getattr(options, name) for name in settings})

    asked_labels = torch.tensor(list(chain.from_iterable(options.labels)))
    if options.interpolate:  # a row for each label
        columns, y = options.interpolate, asked_labels.repeat(options.per_class).repeat_interleave(options.interpolate)
    else:  # a column for each label
        columns, y = len(asked_labels), asked_labels.repeat(options.per_class)
    noise = noises(options, columns, len(y) // columns, flow)
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
            save_png(grid(digits.values, columns), options.out)
        case ".npz":
            save_npz(options.out, images=digits.values, labels=digits.labels)
        case ".gif":
            assert digits.states is not None
            shown = torch.linspace(0, len(digits.states) - 1, min(len(digits.states), FRAMES)).round().long()
            save_gif(torch.stack([grid(frame, columns) for frame in digits.states[shown]]), options.out)
    how = f"{sampler.description()}, {digits.evaluations} evaluations each, seed {options.seed}"
    print(f"drew {len(y)} digit{'s' * (len(y) > 1)} with {model} ({how})")
    print(f"wrote {options.out} after {time.perf_counter() - started:.1f} s")
