"""The user's own pictures of digits, prepared as the makers of MNIST prepared theirs.

They scaled each digit to fit a box of 20 by 20 pixels, and kept its proportions. Then they put its centre of mass at the centre
of a field of 28 by 28 pixels. Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits".
"""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from scipy import ndimage
from torch import Tensor

FIELD, BOX = 28, 20
"""The sides of an image, and of the box that a digit fills in its longer direction, in pixels."""

WIDTH = 2.5
"""Thinner strokes are thickened to this width, in pixels of the box. Three of four strokes in MNIST are at least as wide."""

FAINTEST = 24
"""The smallest difference between a stroke and its background, in grey levels, of 255."""

SLIGHT = 4
"""Differences of at most this many grey levels are ignored, such as JPEG artefacts around a stroke."""

MAX_SIDE = 1000
"""The longest side of a picture, in pixels. Larger pictures are first reduced to this size."""

Greys = NDArray[np.float64]
"""Grey levels (H, W), at least 0."""


def prepare(picture: Image.Image) -> tuple[Tensor, str]:
    """Return a picture of one digit in MNIST's format, a white stroke on black, uint8 (28, 28), and the changes in words.

    Raises:
        ValueError: if the picture has no stroke that differs clearly from its background.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;"):
        picture = picture.convert("I")  # Pillow does not reduce pictures of 16 bits
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    done = []
    if has_alpha(picture):
        done.append("placed on white")
        greys = on_background(picture, "white")
        if np.ptp(greys) < FAINTEST:  # a white stroke cannot be seen on white
            done[0] = "placed on black"
            greys = on_background(picture, "black")
    elif picture.mode in ("F", "I"):  # more than 256 levels
        greys = np.asarray(picture, dtype=np.float64)
        greys = 255 * (greys - greys.min()) / max(np.ptp(greys), 1e-9)
    else:
        greys = np.asarray(picture.convert("L"), dtype=np.float64)

    ink, inverted = stroke(greys)
    if inverted:
        done.append("inverted")
    rows, columns = np.nonzero(ink.any(1))[0], np.nonzero(ink.any(0))[0]
    cut = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    boxed, thickened = fit_box(cut)
    if boxed.shape != cut.shape:
        done.append("scaled from {} x {} to {} x {} pixels".format(*cut.shape[::-1], *boxed.shape[::-1]))
    if thickened:
        done.append("thickened")
    field = centred(boxed)
    if field.shape == greys.shape and np.abs(field - greys).max() <= SLIGHT:
        field, done = greys, ["used unchanged"]
    else:
        done.append("centred")
    return torch.from_numpy(field.round().astype(np.uint8)), ", ".join(done)


def has_alpha(picture: Image.Image) -> bool:
    """Return whether a part of a picture is transparent."""
    return picture.has_transparency_data and np.asarray(picture.convert("RGBA"))[..., 3].min() < 255


def on_background(picture: Image.Image, colour: str) -> Greys:
    """Return the grey levels of a picture placed on a background of this colour."""
    picture = picture.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, colour), picture).convert("L"), dtype=np.float64)


def stroke(greys: Greys) -> tuple[Greys, bool]:
    """Return the ink, and whether the stroke is darker than the background.

    The ink of a pixel is its difference from the background, scaled to 0 to 255; it is 0 on the background. The background's
    grey level is the median of the picture's edge. Differences within the edge's own variation are background too, and so are
    specks with less than 1% of the ink.

    Raises:
        ValueError: if no pixel differs clearly from the background, or more than 60% of them differ.
    """
    ring = np.ones(greys.shape, bool)
    wide = max(1, min(greys.shape) // 25)
    ring[wide:-wide, wide:-wide] = False
    level = np.median(greys[ring])
    uneven = 3 * np.quantile(np.abs(greys[ring] - level), 0.9)
    lighter, darker = (np.where(d > max(uneven, SLIGHT), d, 0) for d in (greys - level, level - greys))
    inverted = bool(darker.sum() > lighter.sum())
    ink = darker if inverted else lighter
    parts, _ = ndimage.label(ink, np.ones((3, 3)))
    share = ndimage.sum(ink, parts, np.arange(parts.max() + 1)) / max(ink.sum(), 1)
    ink = np.where(share[parts] >= 0.01, ink, 0)
    if ink.max() < FAINTEST:
        raise ValueError("nothing stands out from the background")
    if (ink > 0).mean() > 0.6:
        raise ValueError("the stroke covers most of the picture")
    return 255 * ink / ink.max(), inverted


def fit_box(ink: Greys) -> tuple[Greys, bool]:
    """Scale a stroke until its longer side fills the box: (h, w) -> (h', w'). Return also whether a thin one was thickened."""
    picture = Image.fromarray(ink.round().astype(np.uint8))
    if max(picture.size) > 10 * BOX:
        picture = resized(picture, 10 * BOX)
    inside = np.pad(np.asarray(picture) > 127, 1)
    edge = inside & ~ndimage.binary_erosion(inside)
    # A long stroke has two sides, so its width is about twice its area divided by the length of its edge.
    missing = WIDTH * max(picture.size) / BOX - 2 * inside.sum() / max(edge.sum(), 1)
    half = round(missing / 2)
    if half > 0:
        picture = ImageOps.expand(picture, half).filter(ImageFilter.MaxFilter(2 * half + 1))
    boxed = np.asarray(resized(picture, BOX), dtype=np.float64)
    return 255 * boxed / boxed.max(), half > 0


def resized(picture: Image.Image, longer: int) -> Image.Image:
    """Return a picture resized to this longer side, in pixels, with the same proportions."""
    width, height = (max(1, round(side * longer / max(picture.size))) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def centred(boxed: Greys) -> Greys:
    """Return a stroke (h, w) in the field (28, 28). Its centre of mass is in the middle, or as near as the stroke fits."""
    field = np.zeros((FIELD, FIELD))
    places = [
        slice(start := int(np.clip(round(FIELD / 2 - middle), 0, FIELD - side)), start + side)
        for middle, side in zip(ndimage.center_of_mass(boxed), boxed.shape, strict=True)
    ]
    field[tuple(places)] = boxed
    return field
