"""A run's folder `<root>/<name>/version_<n>`: one run claims it before it writes, and one run at a time trains in it."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout
from lightning.pytorch import Callback, LightningModule, Trainer

from flowmatch_mnist.support.errors import UserError

FORBIDDEN = re.compile(r'[/\\:*?"<>|\x00-\x1f]|^\.|[. ]$|^$')
"""What makes a text no name of a folder, on one system or another."""

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""How a file system says that it has no locks."""


class RunFolder(Callback):
    """Tells all processes where the run's folder is, whatever the logger.

    Args:
        path: the folder; None for a run that keeps nothing. The first process decides.
        lock: that holds the folder; it is released when the run has ended.
    """

    def __init__(self, path: Path | None, lock: FileLock | None = None) -> None:
        self.path = path
        self.lock = lock

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree on the folder with the other processes."""
        self.path = trainer.strategy.broadcast(self.path)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the folder to other runs."""
        if self.lock is not None:
            self.lock.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The same."""
        self.teardown(trainer, pl_module, "fit")


def folder_of(trainer: Trainer) -> Path | None:
    """The run's folder, in every process, once callbacks are set up; None if nothing is to be kept.

    Without a `RunFolder`, as in a program of one's own, it is the trainer's `log_dir`. All processes must ask together.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, RunFolder):
            return callback.path
    return Path(trainer.log_dir) if trainer.log_dir else None


def check_name(name: str) -> None:
    """Raise UserError for what cannot be the name of a folder."""
    if FORBIDDEN.search(name):
        raise UserError(f'--name {name!r} cannot be the name of a folder; leave out / \\ : * ? " < > | and dots at its ends')


def claim(parent: Path) -> Path:
    """Make the next `version_<n>` in a folder. However many do so at once, each gets one of its own."""
    parent.mkdir(parents=True, exist_ok=True)
    numbers = [int(found[1]) for path in parent.iterdir() if (found := re.fullmatch(r"version_(\d+)", path.name))]
    for number in count(max(numbers, default=-1) + 1):
        folder = parent / f"version_{number}"
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError("there is always a next number")


def hold(folder: Path) -> FileLock:
    """Let no other process train in a folder, until this one ends, however it ends, or the lock is released.

    Raises:
        UserError: if another process trains there.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(
            f"another run trains in {folder}; wait for its end, or name a checkpoint by its path, which starts a new folder"
        ) from error
    except NotImplementedError:
        pass
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return lock


@contextmanager
def unless_it_fails(folder: Path | None, lock: FileLock | None) -> Iterator[None]:
    """Leave a folder to other runs if an error comes before the run begins; remove it if nothing is in it."""
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
