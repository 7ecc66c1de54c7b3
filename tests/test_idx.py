"""Other images in MNIST's format: taken as they are, trained on and drawn; what is not of the format gets a line."""

import gzip

import pytest
import torch
from conftest import TINY, assert_one_line_error, run_here

from flowmatch_mnist.images import mnist
from flowmatch_mnist.support.errors import UserError


def idx(magic, *shape):
    return b"".join(value.to_bytes(4, "big") for value in (magic, *shape))


@pytest.fixture
def folder(tmp_path):
    """A set of 300 training and 100 test images: a bright row each, at twice its label."""
    place = tmp_path / "rows"
    place.mkdir()
    for split, count in (("train", 300), ("test", 100)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 50, (count, 28, 28), dtype=torch.uint8)
        images[torch.arange(count), 2 * labels] = 255
        names = mnist.FILES[split]
        (place / names[0]).write_bytes(idx(0x803, count, 28, 28) + images.numpy().tobytes())
        (place / f"{names[1]}.gz").write_bytes(gzip.compress(idx(0x801, count) + labels.byte().numpy().tobytes()))
    return place


def test_files_are_read_as_they_are(folder):
    images, labels = mnist.load_any(folder, "train")
    assert images.shape == (300, 28, 28) and labels[:12].tolist() == [*range(10), 0, 1]
    assert (images[torch.arange(300), 2 * labels] == 255).all()


def spoil(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("train-images-idx3-ubyte", lambda c: c[:-5], "shorter"),
        ("train-images-idx3-ubyte", lambda c: c + b"more", "longer"),
        ("train-images-idx3-ubyte", lambda c: idx(0x803, 300, 32, 32) + c[16:], "28 by 28"),
        ("train-images-idx3-ubyte", lambda c: b"", "no header"),
        ("train-labels-idx1-ubyte.gz", lambda c: c[:20], "damaged"),
        ("train-labels-idx1-ubyte.gz", lambda c: gzip.compress(idx(0x801, 300) + bytes([10]) * 300), "0 to 9"),
        ("train-labels-idx1-ubyte.gz", lambda c: gzip.compress(idx(0x801, 200) + bytes(200)), "labels have no header"),
    ],
)
def test_what_is_not_of_the_format_is_refused(folder, name, change, words):
    spoil(folder, name, change)
    with pytest.raises(UserError, match=words):
        mnist.load_any(folder, "train")


def test_one_option_trains_on_them(folder, tmp_path):
    option = ("--config", TINY, "--data", "IDXDataModule", "--data.data_dir", folder, "--name", "rows")
    small = ("--data.val_size", 50, "--evaluation.every_n_epochs", 1, "--evaluation.samples", 20)
    done = run_here("train.py", *option, *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "near copies" in done.stdout and "label accuracy" not in done.stdout
    done = run_here("sample.py", "0-9", cwd=tmp_path)
    assert done.returncode == 0 and "runs/rows/version_0" in done.stdout

    assert_one_line_error(run_here("train.py", *option, "--data.val_size", 299, cwd=tmp_path), "300", "val_size")
    (folder / "train-images-idx3-ubyte").unlink()
    assert_one_line_error(run_here("train.py", *option, *small, cwd=tmp_path), "train-images-idx3-ubyte", "data_dir")
