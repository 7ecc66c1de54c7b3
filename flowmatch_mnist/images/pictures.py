"""Digits to look at and to keep: grids, animations and arrays."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flowmatch_mnist.support.files import replacing

BORDER = 1
"""Pixels of grey around each digit of a grid, before scaling."""

MARK = (255, 120, 0)
"""The colour of a frame that marks a digit: red, green and blue."""


def grid(images: Tensor, columns: int, scale: int = 4, marked: Tensor | None = None) -> Tensor:
    """Lay images in rows of `columns`: uint8 (N, H, W) -> uint8 (rows (H+2) scale, columns (W+2) scale).

    Places that N does not fill stay black; each pixel becomes `scale` by `scale` pixels. With `marked`, bool (N,), the picture
    has colours, (..., 3), and the frames of the marked images are orange.
    """
    rows = -(-len(images) // columns)
    cells = F.pad(images, (0, 0, 0, 0, 0, rows * columns - len(images)))
    cells = F.pad(cells, (BORDER, BORDER, BORDER, BORDER), value=64)
    if marked is not None:
        inside = F.pad(torch.ones_like(images[0], dtype=torch.bool), (BORDER, BORDER, BORDER, BORDER))
        frames = F.pad(marked, (0, len(cells) - len(marked)))[:, None, None] & ~inside
        cells = torch.where(frames[..., None], torch.tensor(MARK, dtype=torch.uint8), cells[..., None])
    sheet = cells.unflatten(0, (rows, columns)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
    return sheet.repeat_interleave(scale, 0).repeat_interleave(scale, 1)


def save_png(sheet: Tensor, path: Path) -> None:
    """Write a picture, uint8 (H, W) or (H, W, 3), as a PNG."""
    with replacing(path) as temporary:
        Image.fromarray(sheet.numpy()).save(temporary)


def as_png(sheet: Tensor) -> bytes:
    """A picture, uint8 (H, W) or (H, W, 3), as the bytes of a PNG."""
    Image.fromarray(sheet.numpy()).save(file := BytesIO(), "PNG")
    return file.getvalue()


def save_gif(frames: Tensor, path: Path, milliseconds: int = 80, hold: int = 1200) -> None:
    """Write grids, uint8 (T, H, W) or (T, H, W, 3), as an endless animation that holds its last frame."""
    first, *rest = (Image.fromarray(frame.numpy()) for frame in frames)
    durations = [milliseconds] * len(rest) + [hold]
    with replacing(path) as temporary:
        first.save(temporary, save_all=True, append_images=rest, duration=durations, loop=0)


def save_film(pictures: Sequence[Path], path: Path) -> None:
    """Write an animation of PNG files in the order they are given in: those of the last one's size."""
    frames = []
    for picture in pictures:
        with Image.open(picture) as opened:
            frames.append(torch.from_numpy(np.array(opened.convert("RGB"))))
    save_gif(torch.stack([frame for frame in frames if frame.shape == frames[-1].shape]), path, milliseconds=500)


def save_npz(path: Path, **arrays: Tensor) -> None:
    """Write arrays by their names, such as `images` uint8 (N, H, W) and `labels` int64 (N,), as a compressed NumPy archive."""
    contents: dict[str, Any] = {name: array.numpy() for name, array in arrays.items()}
    with replacing(path) as temporary:
        np.savez_compressed(temporary, **contents)
