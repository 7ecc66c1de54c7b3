"""Digits to look at and to keep: grids, animations and arrays."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flowmatch_mnist.support.files import replacing

BORDER = 1
"""Pixels of grey around each digit of a grid, before scaling."""


def grid(images: Tensor, columns: int, scale: int = 4) -> Tensor:
    """Lay images in rows of `columns`: uint8 (N, H, W) -> uint8 (rows (H+2) scale, columns (W+2) scale).

    Places that N does not fill stay black; each pixel becomes `scale` by `scale` pixels.
    """
    rows = -(-len(images) // columns)
    cells = F.pad(images, (0, 0, 0, 0, 0, rows * columns - len(images)))
    cells = F.pad(cells, (BORDER, BORDER, BORDER, BORDER), value=64)
    height, width = cells.shape[1:]
    sheet = cells.view(rows, columns, height, width).transpose(1, 2).reshape(rows * height, columns * width)
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
    """Write grids, uint8 (T, H, W), as an endless animation that holds its last frame."""
    first, *rest = (Image.fromarray(frame.numpy()) for frame in frames)
    durations = [milliseconds] * len(rest) + [hold]
    with replacing(path) as temporary:
        first.save(temporary, save_all=True, append_images=rest, duration=durations, loop=0)


def save_npz(path: Path, **arrays: Tensor) -> None:
    """Write arrays by their names, such as `images` uint8 (N, H, W) and `labels` int64 (N,), as a compressed NumPy archive."""
    contents: dict[str, Any] = {name: array.numpy() for name, array in arrays.items()}
    with replacing(path) as temporary:
        np.savez_compressed(temporary, **contents)
