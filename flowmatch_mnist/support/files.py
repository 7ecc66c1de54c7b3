"""Writing files completely or not at all, and reading them only if their contents are unchanged."""

import errno
import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from flowmatch_mnist.support.errors import UserError

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""The errors of file systems that have no locks."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`. It replaces `path` when the block ends without an error.

    Missing folders are created. Whatever happens, even a crash of the machine, `path` has either its old contents or the
    complete new contents.

    Raises:
        UserError: if the folder cannot be created or written to, or the disk is full.
    """
    # Keep the file name extension, because writers choose their format by it.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("r+b") as file:  # opened for writing, because Windows flushes no other files
            _flush(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free some space or choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def check_writable(path: Path) -> None:
    """Call this before long work, whose result would be lost if a file could not be written in the end.

    Raises:
        UserError: if the file cannot be written.
    """
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; add the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


@contextmanager
def write_errors() -> Iterator[None]:
    """Raise the OSError behind an error of PyTorch's writers, which raise RuntimeError if a file system refuses to write."""
    try:
        yield
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def _flush(number: int) -> None:
    """Force a file's contents to the disk. Some file systems do not support this; that is no error."""
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def acquire(lock: FileLock, blocking: bool) -> None:
    """Acquire a lock. On a file system without locks, do nothing.

    Raises:
        Timeout: if another process has the lock, and `blocking` is False.
    """
    try:
        lock.acquire(blocking=blocking)
    except NotImplementedError:  # filelock's error on some file systems without locks
        pass
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def save_json(path: Path, contents: dict[str, Any]) -> None:
    """Write plain values as JSON.

    Raises:
        UserError: if the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write tensors and plain values as a PyTorch archive, which holds a checksum of each of its parts.

    Raises:
        UserError: if the file cannot be written, or a value is neither a tensor nor plain.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        with write_errors():
            torch.save(checkpoint, file)
        if not _loads(temporary):
            wrong = [str(key) for key, part in _parts(checkpoint) if not _loads(part)]
            raise UserError(
                f"cannot write {path}: a checkpoint cannot hold the values in {', '.join(wrong)}; keep only tensors and plain "
                "values in the state of your callback, for example float(x) instead of a NumPy number x"
            )


def _parts(checkpoint: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the name and value of each part of a checkpoint. The state of each callback is a part of its own."""
    for name, part in checkpoint.items():
        yield from part.items() if name == "callbacks" else [(name, part)]


def _loads(saved: Any) -> bool:
    """Return whether `saved`, a file or a value to be saved, can be read again as tensors and plain values."""
    file = saved if isinstance(saved, Path) else io.BytesIO()
    try:
        if isinstance(file, io.BytesIO):
            torch.save(saved, file)
            file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # torch.load can raise any error for a value
        return False
    return True


def find_damage(path: Path) -> str | None:
    """Check the PyTorch archive at `path` without loading it. Return its damage in words, or None if none is found.

    PyTorch itself does not check the checksums: it would load a file with a flipped bit.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                return "it is compressed, but a checkpoint never is"  # its contents could be larger than the memory
            part = archive.testzip()
    except FileNotFoundError:
        return "it is missing"
    except Exception as error:  # a damaged archive can raise any error
        return f"it is damaged, or it is not a checkpoint ({error})"
    return f"its part {part} has changed" if part else None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint that `save_checkpoint` wrote, on the CPU. Only tensors and plain values load: no file can run code.

    Raises:
        UserError: if the file is damaged, or is not such a file.
    """
    if wrong := find_damage(path):
        raise UserError(f"cannot read {path}: {wrong}; use another checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load can raise any error for a foreign file
        raise UserError(f"cannot read {path}: it is no checkpoint of this project; use another checkpoint") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"cannot read {path}: it is no checkpoint of this project; use another checkpoint")
    return checkpoint


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write weights as safetensors, with their metadata, and a digest of both.

    Raises:
        UserError: if the file cannot be written.
    """
    whole = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    with replacing(path) as temporary:
        # safetensors' own writer would let no other user read the file, and raises its own error for a full disk.
        temporary.write_bytes(serialize(whole, {**metadata, "digest": digest(whole, metadata)}))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the weights that `save_weights` wrote, on the CPU, and their metadata.

    Raises:
        UserError: if the file is missing or damaged, or is not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  `file` is not a dictionary
    except Exception as error:  # safetensors raises errors of several kinds for a foreign file
        raise UserError(f"cannot read {path}: it is missing, damaged, or not a safetensors file; use another") from error
    if metadata.pop("digest", None) != digest(weights, metadata):
        raise UserError(f"cannot read {path}: its content does not match its digest; use another")
    return weights, metadata


def digest(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of the weights' names, types, shapes and values, and of their metadata."""
    sha = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, value in sorted(weights.items()):
        sha.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        sha.update(value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
