"""Pictures as people make them become digits as MNIST has them."""

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, run_here
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from flowmatch_mnist.evaluation.classifiers import load_classifier
from flowmatch_mnist.evaluation.metrics import classify
from flowmatch_mnist.images import mnist
from flowmatch_mnist.images.strokes import WIDTH, prepare

SEVEN = [(0.1, 0.05), (0.9, 0.05), (0.35, 0.95)]


def seven(size=(400, 300), corner=(120, 40), height=220, pen=24, ink=20, paper=250, mode="L"):
    """A seven by hand: as high as asked for, half as wide, anywhere on its paper."""
    picture = Image.new(mode, size, paper)
    points = [(corner[0] + x * height / 2, corner[1] + y * height) for x, y in SEVEN]
    ImageDraw.Draw(picture).line(points, fill=ink, width=pen, joint="curve")
    return picture


def on_nothing(ink):
    clear = Image.new("RGBA", (400, 300), (0, 0, 0, 0))
    clear.paste(Image.new("RGBA", clear.size, (ink, ink, ink, 255)), mask=seven(ink=255, paper=0))
    return clear


def photograph():
    """Blurred, noisy, on grey paper that is darker to the right."""
    greys = np.asarray(seven(size=(800, 600), corner=(300, 100), height=400, pen=30).filter(ImageFilter.GaussianBlur(3)))
    light = np.linspace(0.85, 0.7, greys.shape[1])
    noisy = greys * light + np.random.default_rng(0).normal(0, 4, greys.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def turned():
    """As a telephone stores an upright picture: lying, with a note that says so."""
    lying = seven().transpose(Image.Transpose.ROTATE_90)
    lying.getexif()[0x0112] = 6
    return lying


def sixteen_bits(*size):
    return Image.fromarray(np.asarray(seven(*size)).astype(np.uint16) * 256)


PICTURES = {
    "white on black": (lambda: seven(ink=255, paper=0), ""),
    "dark on white": (seven, "inverted"),
    "in a corner": (lambda: seven(corner=(5, 5)), "inverted"),
    "small": (lambda: seven(height=60, pen=7), "scaled from"),
    "pencil": (lambda: seven(pen=3), "thickened"),
    "in colours": (lambda: seven(mode="RGB", ink=(200, 30, 30), paper=(255, 250, 220)), "inverted"),
    "transparent": (lambda: on_nothing(0), "placed on white, inverted"),
    "white on nothing": (lambda: on_nothing(255), "placed on black"),
    "photograph": (photograph, "inverted"),
    "telephone": (turned, "inverted"),
    "sixteen bits": (sixteen_bits, "inverted"),
    "huge in sixteen bits": (lambda: sixteen_bits((5000, 4000), (1500, 500), 3000, 270), "scaled from"),
    "of 28 by 28": (lambda: seven((28, 28), (12, 1), 24, 2), "scaled from"),
    "huge": (lambda: seven((3000, 2400), (900, 300), 1800, 160), "scaled from"),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_any_picture_of_a_seven_becomes_the_same_seven(kind):
    picture, words = PICTURES[kind]
    digit, done = prepare(picture())
    assert words in done and done.endswith("centred"), done
    assert digit.shape == (28, 28) and digit.dtype == torch.uint8 and digit.max() == 255
    rows, columns = digit.any(1).nonzero(), digit.any(0).nonzero()
    assert rows.max() - rows.min() + 1 == 20, "in a box of 20"
    places = torch.arange(28.0)
    for axis in (0, 1):
        middle = (digit.float().sum(axis) * places).sum() / digit.sum()
        assert abs(middle - 14) <= 0.55, "with its mass in the middle"
    usual, _ = prepare(seven())
    shared = torch.minimum(digit, usual).float().sum() / torch.maximum(digit, usual).float().sum()
    assert shared > (0.4 if kind in ("pencil", "photograph", "small", "of 28 by 28") else 0.75), shared
    assert classify(load_classifier("digitnet"), digit[None])[1].item() == 7
    assert (columns.max() - columns.min() + 1) <= 20


def test_a_thin_stroke_becomes_as_wide_as_those_of_mnist():
    ink = [prepare(seven(pen=pen))[0].float().sum() / 255 for pen in (1, 3, 8, 24)]
    length = 20 * (0.4 + np.hypot(0.275, 0.9))
    assert all(0.6 * WIDTH < area / length < 1.6 * WIDTH for area in ink), ink


def test_a_digit_of_mnist_stays_as_it_is(data_dir):
    images = mnist.load(data_dir, "test")[0][:300]
    off = torch.tensor([(prepare(Image.fromarray(image.numpy()))[0].int() - image.int()).abs().max() for image in images])
    assert (off == 0).float().mean() > 0.9, off
    assert prepare(Image.fromarray(images[0].numpy()))[1] == "used unchanged"


@pytest.mark.parametrize(
    ("picture", "why"),
    [
        (Image.new("L", (50, 40), 255), "nothing stands out"),
        (Image.new("RGBA", (50, 40), (0, 0, 0, 0)), "nothing stands out"),
        (seven(ink=245), "nothing stands out"),
        (ImageOps.expand(Image.new("L", (50, 50), 0), 2, 255), "covers most"),
        (Image.new("L", (1, 1), 7), "nothing stands out"),
    ],
)
def test_a_picture_without_a_stroke_is_refused_in_a_line(tiny_run, tmp_path, picture, why):
    with pytest.raises(ValueError, match=why):
        prepare(picture)
    picture.save(tmp_path / "own.png")
    done = run_here("sample.py", "0-9", "--from-image", f"{tmp_path}/own.png:7", cwd=tiny_run)
    assert_one_line_error(done, "own.png", why, "plain background")


def test_a_picture_with_too_many_pixels_is_refused_in_a_line(tmp_path, monkeypatch):
    seven().save(tmp_path / "own.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    done = run_here("sample.py", 7, "--weights", "mnist", "--from-image", "own.png:7", cwd=tmp_path)
    assert_one_line_error(done, "own.png", "too many pixels; make it smaller")


def test_the_prepared_digit_stands_in_the_first_column(tiny_run):
    seven().save(tiny_run / "own.png")
    done = run_here("sample.py", "3", "4", "--steps", 1, "--from-image", "own.png:7", "--out", "hand.png", cwd=tiny_run)
    assert done.stdout.splitlines()[0].startswith("own.png: inverted, scaled from"), done
    digit = prepare(seven())[0]
    with Image.open(tiny_run / "hand.png") as sheet:
        assert sheet.size == (3 * 120, 120)
        first = np.asarray(sheet)[4:116:4, 4:116:4]
    assert np.array_equal(first, digit.numpy())
    asked = ("7", "--interpolate", 3, "--steps", 1, "--from-image", "own.png:7", "--from-image", "own.png:7")
    run_here("sample.py", *asked, "--out", "between.png", cwd=tiny_run)
    with Image.open(tiny_run / "between.png") as sheet:
        assert sheet.size == (5 * 120, 120)
        last = np.asarray(sheet)[4:116:4, 484:596:4]
    assert np.array_equal(last, digit.numpy())
