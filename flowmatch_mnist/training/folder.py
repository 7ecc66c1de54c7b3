"""A run's folder `<root>/<name>/version_<n>`. A run creates it before it writes, and only one run at a time trains in it."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch import Callback, LightningModule, Trainer

from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.support.files import acquire

FORBIDDEN = re.compile(r'[/\\:*?"<>|\x00-\x1f]|^\.|[. ]$|^$')
"""Matches a text that at least one operating system refuses as the name of a folder."""


class RunFolder(Callback):
    """Gives all processes the path of the run's folder. It works with every logger.

    Args:
        path: the folder; None for a run that keeps nothing. All processes use the first process's value.
        lock: the lock of the folder; it is released when the run ends.
        new: whether this run created the folder.
    """

    def __init__(self, path: Path | None, lock: FileLock | None = None, new: bool = False) -> None:
        self.path = path
        self.lock = lock
        self.new = new

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Use the folder of the first process."""
        self.path = trainer.strategy.broadcast(self.path)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Release the folder, so other runs can use it."""
        if self.lock is not None:
            self.lock.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release the folder after an error too. A new folder is removed if a mistake of the user prevents the first step."""
        self.teardown(trainer, pl_module, "fit")
        if self.path is not None and self.new and isinstance(exception, UserError) and not trainer.global_step:
            for logger in trainer.loggers:
                logger.finalize("failed")
            trainer.loggers = []  # Lightning would finalize them again, and they would write into the folder
            shutil.rmtree(self.path, ignore_errors=True)


def folder_of(trainer: Trainer) -> Path | None:
    """Return the run's folder, in every process, or None if the run keeps nothing. Call this after the setup of `RunFolder`.

    Without a `RunFolder`, as in your own program, it is the trainer's `log_dir`. All processes must call this together.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, RunFolder):
            return callback.path
    return Path(trainer.log_dir) if trainer.log_dir else None


def check_name(name: str) -> None:
    """Raise UserError if a name cannot be the name of a folder."""
    if FORBIDDEN.search(name):
        raise UserError(f'--name {name!r} cannot be the name of a folder; leave out / \\ : * ? " < > | and dots at its ends')


def create_version(parent: Path) -> Path:
    """Create the next `version_<n>` in a folder, and return its path. If several processes do so at once, each gets its own."""
    parent.mkdir(parents=True, exist_ok=True)
    numbers = [int(found[1]) for path in parent.iterdir() if (found := re.fullmatch(r"version_(\d+)", path.name))]
    for number in count(max(numbers, default=-1) + 1):
        folder = parent / f"version_{number}"
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("there is always a next number")


def lock_folder(folder: Path) -> FileLock:
    """Return a lock on a folder, so no other process trains there. The lock ends with its release, or with this process.

    Raises:
        UserError: if another process trains in the folder.
    """
    lock = FileLock(folder / ".lock")
    try:
        acquire(lock, blocking=False)
    except Timeout as error:
        raise UserError(
            f"another run trains in {folder}; wait until it ends, or give a checkpoint's path, which starts in a new folder"
        ) from error
    return lock


@contextmanager
def release_on_error(folder: Path | None, lock: FileLock | None) -> Iterator[None]:
    """Release a folder if an error comes before the run begins, and remove the folder if it is empty."""
    try:
        yield
    except BaseException:
        if folder is not None and lock is not None:
            lock.release()
            if {path.name for path in folder.iterdir()} <= {".lock"}:
                with suppress(OSError):
                    (folder / ".lock").unlink(missing_ok=True)
                    folder.rmdir()
        raise
