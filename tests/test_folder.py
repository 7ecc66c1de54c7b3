"""A run's folder: claimed once, held while it trains, and left as it was where nothing came of it."""

import errno
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from filelock import FileLock

from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.training.folder import RunFolder, check_name, create_version, folder_of, lock_folder, release_on_error


def test_the_next_number_is_claimed(tmp_path, monkeypatch):
    root = tmp_path / "runs/some"
    assert create_version(root) == root / "version_0" and (root / "version_0").is_dir()
    (root / "version_7").mkdir()
    (root / "version_10_old").mkdir()
    assert create_version(root) == root / "version_8"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "iterdir", lambda self: iter(()))  # another was quicker: its folder was not there yet
        assert create_version(root) == root / "version_1"


def test_one_run_at_a_time_holds_a_folder(tmp_path):
    lock = lock_folder(tmp_path)
    with pytest.raises(UserError, match="another run trains"):
        lock_folder(tmp_path)
    lock.release()
    lock_folder(tmp_path).release()


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (NotImplementedError(), True),
        (OSError(errno.ENOLCK, "no locks"), True),
        (OSError(errno.EACCES, "not yours"), False),
    ],
    ids=repr,
)
def test_where_there_are_no_locks_a_run_goes_without(tmp_path, monkeypatch, error, passes):
    monkeypatch.setattr(FileLock, "acquire", mock.Mock(side_effect=error))
    if passes:
        assert lock_folder(tmp_path).lock_file == str(tmp_path / ".lock")
    else:
        with pytest.raises(OSError, match="not yours"):
            lock_folder(tmp_path)


def fail(folder, lock):
    with pytest.raises(ZeroDivisionError), release_on_error(folder, lock):
        raise ZeroDivisionError


def test_a_folder_in_which_nothing_is_goes_where_a_run_does_not_begin(tmp_path, monkeypatch):
    for files, stays in (([], False), ([".lock"], False), ([".lock", "config.yaml"], True)):
        (folder := tmp_path / "version_0").mkdir(exist_ok=True)
        for name in files:
            (folder / name).touch()
        lock = mock.Mock()
        fail(folder, lock)
        assert folder.exists() == stays and lock.release.call_count == 1
    fail(None, mock.Mock())
    fail(folder, None)
    assert folder.exists(), "a folder that this run does not hold is not its to remove"
    (empty := tmp_path / "version_1").mkdir()
    monkeypatch.setattr(Path, "rmdir", mock.Mock(side_effect=OSError))
    fail(empty, mock.Mock())
    with release_on_error(folder, lock):
        pass
    assert lock.release.call_count == 1, "a run that begins keeps its lock"


def test_where_a_runs_folder_is():
    trainer = SimpleNamespace(callbacks=[mock.Mock(), RunFolder(Path("here"))], log_dir="there")
    assert folder_of(trainer) == Path("here")
    trainer.callbacks.pop()
    assert folder_of(trainer) == Path("there")
    trainer.log_dir = None
    assert folder_of(trainer) is None


def test_all_processes_learn_the_folder_and_leave_it_at_the_end():
    lock = mock.Mock()
    folder = RunFolder(Path("here"), lock)
    folder.setup(SimpleNamespace(strategy=SimpleNamespace(broadcast=lambda path: Path("first") / path)), None, "fit")
    assert folder.path == Path("first/here")
    folder.teardown(None, None, "fit")
    folder.on_exception(None, None, ValueError())
    assert lock.release.call_count == 2
    RunFolder(None).teardown(None, None, "fit")


@pytest.mark.parametrize(
    ("new", "error", "step", "stays"),
    [
        (True, UserError("a mistake"), 0, False),
        (True, UserError("a mistake"), 1, True),
        (True, ValueError("a fault"), 0, True),
        (False, UserError("a mistake"), 0, True),
    ],
)
def test_a_mistake_before_the_first_step_removes_a_new_folder_without_loggers(tmp_path, monkeypatch, new, error, step, stays):
    (path := tmp_path / "version_0").mkdir()
    (path / "events").touch()
    logger = mock.Mock()
    trainer = SimpleNamespace(global_step=step, loggers=[logger])
    RunFolder(path, mock.Mock(), new).on_exception(trainer, None, error)
    assert path.exists() == stays and trainer.loggers == ([logger] if stays else [])
    assert logger.finalize.call_args_list == ([] if stays else [mock.call("failed")])
    path.mkdir(exist_ok=True)
    monkeypatch.setattr("os.rmdir", mock.Mock(side_effect=OSError("in use")))
    RunFolder(path, mock.Mock(), new).on_exception(trainer, None, error)  # raises nothing
    assert path.exists()


@pytest.mark.parametrize("name", ["", ".", ".x", "x.", "x ", "a/b", "a\\b", "a:b", "a*", "a?", 'a"', "a<", "a>", "a|", "a\n"])
def test_what_is_no_name_of_a_folder(name):
    with pytest.raises(UserError, match="--name"):
        check_name(name)
    check_name("a.b-c_d e")
