"""Files are written whole or not at all, and read only if nothing in them has changed since."""

import errno
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from flowmatch_mnist.support.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it takes the place of `path` once the block ends without an error.

    Folders on the way are made. Whatever happens in between, a crash of the machine included, `path` holds either what it held
    before or all of what is new.

    Raises:
        UserError: if the folder cannot be made or written to, or the disk is full.
    """
    # The ending stays, since the writers choose their format by it.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("r+b") as file:  # to write: Windows flushes no other file
            _flush(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free some space or choose another place") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _flush(number: int) -> None:
    """Have a file on the disk, where the file system can promise that; others keep what they get in their own way."""
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise


def save_json(path: Path, contents: dict[str, Any]) -> None:
    """Write plain values as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(contents, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write tensors and plain values as PyTorch's archive, which holds a checksum of each of its parts."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # what PyTorch's writer makes of a file system's refusal
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        if not _loads(temporary):
            wrong = [str(key) for key, part in _parts(checkpoint) if not _loads(part)]
            raise UserError(
                f"cannot write {path}: it would hold what no checkpoint may, in {', '.join(wrong)}; keep tensors and plain "
                "values in the state of your callback, such as float(x) of a NumPy number"
            )


def _parts(checkpoint: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The parts of a checkpoint, and each callback's, with their names."""
    for name, part in checkpoint.items():
        yield from part.items() if name == "callbacks" else [(name, part)]


def _loads(saved: Any) -> bool:
    """Whether what is saved in a file, or would be saved of a value, can be read as tensors and plain values."""
    file = saved if isinstance(saved, Path) else io.BytesIO()
    try:
        if isinstance(file, io.BytesIO):
            torch.save(saved, file)
            file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises whatever a value happens to lead to
        return False
    return True


def damage(path: Path) -> str | None:
    """What is wrong with PyTorch's archive at `path`, as far as can be told without taking it in; None if it is whole.

    PyTorch itself does not look at the checksums, and would load a file with a flipped bit as it is.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                return "it is compressed, as no checkpoint is"  # and might hold more than the memory does
            part = archive.testzip()
    except FileNotFoundError:
        return "it is missing"
    except Exception as error:  # a damaged archive can fail in any way
        return f"it is damaged, or no checkpoint ({error})"
    return f"its part {part} has changed" if part else None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU. Only tensors and plain values are read: no file can run code.

    Raises:
        UserError: if the file is damaged, or not such a file.
    """
    if wrong := damage(path):
        raise UserError(f"cannot read {path}: {wrong}; use another checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a foreign file happens to lead to
        raise UserError(f"cannot read {path}: it is no checkpoint of this project; use another") from error
    if not isinstance(checkpoint, dict):
        raise UserError(f"cannot read {path}: it is no checkpoint of this project; use another")
    return checkpoint


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write weights as safetensors, with what is said of them, and a digest of both."""
    whole = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    with replacing(path) as temporary:
        # Its own writer would let nobody else read the file, and has its own error for a full disk.
        temporary.write_bytes(serialize(whole, {**metadata, "digest": digest(whole, metadata)}))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights that `save_weights` wrote, on the CPU, and what is said of them.

    Raises:
        UserError: if the file is missing or damaged, or not such a file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
    except Exception as error:  # safetensors raises errors of several kinds over a foreign file
        raise UserError(f"cannot read {path}: it is missing, damaged, or no safetensors file; use another") from error
    if metadata.pop("digest", None) != digest(weights, metadata):
        raise UserError(f"cannot read {path}: its content does not fit its digest; use another")
    return weights, metadata


def digest(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of the weights' names, types, shapes and values, and of what is said of them."""
    sha = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, value in sorted(weights.items()):
        sha.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        sha.update(value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
