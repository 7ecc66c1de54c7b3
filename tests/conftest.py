"""What the tests share: real MNIST by the project's own way of getting it, and a tiny trained run."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run on all cores already, one process each

import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import fuzz
import pytest
import torch

from flowmatch_mnist.images import mnist
from flowmatch_mnist.networks.unet import UNet
from flowmatch_mnist.support import streams

ROOT = Path(__file__).resolve().parent.parent
TINY = Path(__file__).with_name("tiny.yaml")


unix = pytest.mark.skipif(os.name == "nt", reason="needs signals, limits, mounts and links as Unix has them")


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test draws what it always draws: in whatever order, and alone."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of the genuine files, fetched if need be."""
    folder = ROOT / "data"
    mnist.prepare(folder)
    return folder


@functools.cache
def first_images(folder: Path, split: mnist.Split, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = mnist.load(folder, split)
    return images[:count].clone(), labels[:count].clone()


@contextlib.contextmanager
def only_first_images(folder: Path, count: int = 1000):
    """As if MNIST had only so many images in each split: quick to train on, and to measure beside."""
    few = {split: first_images(folder, split, count) for split in mnist.FILES}
    with mock.patch.multiple(mnist, prepare=lambda folder: None, load=lambda folder, split: few[split]):
        yield


@pytest.fixture
def few_digits(data_dir: Path) -> Iterator[Path]:
    """The folder of MNIST, of which only the first images are used."""
    with only_first_images(data_dir):
        yield data_dir


@pytest.fixture
def grey_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of MNIST: 600 images of one grey level each, 20 times as bright as their label."""
    labels = torch.arange(600) % 10
    images = (20 * labels).byte()[:, None, None].expand(600, 28, 28)
    monkeypatch.setattr(mnist, "prepare", lambda folder: None)
    monkeypatch.setattr(mnist, "load", lambda folder, split: (images, labels))


@pytest.fixture
def stream_keys(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[int | str, ...]]]:
    """Gives the keys of all streams that random numbers were drawn from since the last time."""
    seen: list[tuple[int | str, ...]] = []
    hashed = streams.seed
    monkeypatch.setattr(streams, "seed", lambda *key: seen.append(key) or hashed(*key))

    def taken() -> list[tuple[int | str, ...]]:
        found = seen.copy()
        seen.clear()
        return found

    return taken


@pytest.fixture
def tiny_net() -> UNet:
    """A small network with nothing at zero, so that every part of it matters."""
    net = UNet(channels=(4, 8, 8), blocks=(1, 2, 2))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


def run(script: str, *arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run train.py or sample.py as a person would, in a process of its own."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    env = os.environ | {"COLUMNS": "200"} | environment
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False)


def run_here(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in this process, which saves the seconds that starting one takes; some tests start a real one."""
    with contextlib.chdir(cwd), mock.patch.dict(os.environ, {"COLUMNS": "200"}):
        return subprocess.CompletedProcess([script, *arguments], *fuzz.call(script, *arguments))


def assert_one_line_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The process ended with status 2 and one line on stderr that has these words in it."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[0], lines[0]


class Evil:
    """A stranger's pickle: loaded carelessly, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    """A folder in which `train.py` ran the tiny config to its end; the run is runs/tiny/version_0."""
    folder = tmp_path_factory.mktemp("tiny")
    done = run_here("train.py", "--config", TINY, "--data.data_dir", data_dir, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder
