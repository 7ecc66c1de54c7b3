"""Digits as grids, animations and arrays, in memory and in files."""

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
"""The width of the grey border around each digit of a grid, in pixels before scaling."""

MARK = (255, 120, 0)
"""The colour of the frame around a marked digit: red, green and blue."""


def grid(images: Tensor, columns: int, scale: int = 4, marked: Tensor | None = None) -> Tensor:
    """Arrange images in rows of `columns`: uint8 (N, H, W) -> uint8 (rows (H+2) scale, columns (W+2) scale).

    Unused places in the last row stay black. Each pixel becomes `scale` by `scale` pixels. With `marked`, bool (N,), the
    picture has colours, (..., 3), and the marked images have orange frames.
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
    """Return the bytes of a PNG file for a picture, uint8 (H, W) or (H, W, 3)."""
    Image.fromarray(sheet.numpy()).save(file := BytesIO(), "PNG")
    return file.getvalue()


def save_gif(frames: Tensor, path: Path, milliseconds: int = 80, hold: int = 1200) -> None:
    """Write grids, uint8 (T, H, W) or (T, H, W, 3), as an endless animation. Its last frame stays for `hold` milliseconds."""
    first, *rest = (Image.fromarray(frame.numpy()) for frame in frames)
    durations = [milliseconds] * len(rest) + [hold]
    with replacing(path) as temporary:
        first.save(temporary, save_all=True, append_images=rest, duration=durations, loop=0)


def save_film(pictures: Sequence[Path], path: Path) -> None:
    """Write an animation of PNG files in the given order. It leaves out files of another size than the last one."""
    frames = []
    for picture in pictures:
        with Image.open(picture) as opened:
            frames.append(torch.from_numpy(np.array(opened.convert("RGB"))))
    save_gif(torch.stack([frame for frame in frames if frame.shape == frames[-1].shape]), path, milliseconds=500)


def save_npz(path: Path, **arrays: Tensor) -> None:
    """Write named arrays, such as `images` uint8 (N, H, W) and `labels` int64 (N,), as a compressed NumPy archive."""
    contents: dict[str, Any] = {name: array.numpy() for name, array in arrays.items()}
    # NumPy would add .npz to a path with another ending, such as .NPZ.
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **contents)
