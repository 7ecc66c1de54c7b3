"""`best.ckpt`: when it is saved, where, and that it is always the best. Lightning's own part is only listened to."""

from types import SimpleNamespace
from unittest import mock

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.training.best import KeepBest
from flowmatch_mnist.training.evaluation import Evaluate
from flowmatch_mnist.training.folder import RunFolder

HOOKS = ("setup", "load_state_dict", "on_train_batch_end", "on_train_epoch_end", "on_validation_end")


@pytest.fixture
def theirs(monkeypatch):
    """Lightning's own hooks, by their names."""
    made = SimpleNamespace(**{name: mock.Mock() for name in HOOKS})
    for name in HOOKS:
        monkeypatch.setattr(ModelCheckpoint, name, getattr(made, name))
    return made


@pytest.fixture
def trainer(tmp_path):
    return SimpleNamespace(
        callbacks=[RunFolder(tmp_path), Evaluate(every_n_steps=2)],
        global_step=4,
        should_stop=False,
        is_last_batch=False,
        is_global_zero=True,
        log_dir=None,
    )


def test_it_is_in_the_runs_folder_unless_a_place_is_named(theirs, trainer, tmp_path):
    for settings, place in (({}, str(tmp_path / "checkpoints")), ({"dirpath": str(tmp_path / "x")}, str(tmp_path / "x"))):
        keep = KeepBest(**settings)
        keep.setup(trainer, "module", "fit")
        assert keep.dirpath == place and keep.folder == tmp_path
        theirs.setup.assert_called_with(trainer, "module", "fit")
    trainer.callbacks = []
    keep = KeepBest()
    keep.setup(trainer, "module", "fit")
    assert keep.dirpath is None and keep.folder is None


def test_a_run_that_was_moved_finds_its_best_again(theirs, trainer, tmp_path, monkeypatch):
    keep = KeepBest()
    keep.setup(trainer, "module", "fit")
    there = tmp_path / "checkpoints"
    saved = {
        **{"best_model_path": "/gone/best.ckpt", "last_model_path": "", "monitor": "loss/val"},
        **{"best_k_models": {"/gone/best.ckpt": 0.5, "/gone/4.ckpt": 0.6}, "dirpath": "/gone"},
    }
    keep.load_state_dict(saved)
    theirs.load_state_dict.assert_not_called()
    there.mkdir()
    (there / "best.ckpt").touch()
    keep.load_state_dict(saved)
    theirs.load_state_dict.assert_called_once_with(
        {
            **{"best_model_path": str(there / "best.ckpt"), "kth_best_model_path": "", "last_model_path": ""},
            **{"best_k_models": {str(there / "best.ckpt"): 0.5, str(there / "4.ckpt"): 0.6}, "dirpath": str(there)},
            "monitor": "loss/val",
        }
    )
    monkeypatch.chdir(there)
    placeless = KeepBest()
    placeless.load_state_dict(saved)
    assert theirs.load_state_dict.call_args.args[0]["best_model_path"] == "best.ckpt"
    assert placeless.state_key.startswith("ModelCheckpoint{"), "the name under which older checkpoints keep its state"


def test_by_the_loss_it_is_saved_when_lightning_does(theirs, trainer):
    keep = KeepBest()
    keep.setup(trainer, "module", "fit")
    copied = keep._copy = mock.Mock()
    trainer.callbacks[1].done_at = trainer.global_step
    keep.on_train_batch_end(trainer, "module", "outputs", "batch", 3)
    theirs.on_train_batch_end.assert_called_once_with(trainer, "module", "outputs", "batch", 3)
    assert copied.call_count == 1 and not theirs.on_validation_end.called
    keep.on_validation_end(trainer, "module")
    theirs.on_validation_end.assert_called_once_with(trainer, "module")
    assert copied.call_count == 2


def test_by_quality_lightning_is_told_to_wait_for_it(monkeypatch):
    init = mock.Mock(return_value=None)
    monkeypatch.setattr(ModelCheckpoint, "__init__", init)
    for monitor, told in (("quality/recall", False), ("loss/val", None)):
        KeepBest(monitor=monitor)
        assert init.call_args.kwargs.get("save_on_train_epoch_end") is told


@pytest.mark.parametrize("setting", ["every_n_train_steps", "train_time_interval", "save_on_train_epoch_end"])
def test_by_quality_nothing_else_says_when_to_save(setting):
    with pytest.raises(ValueError, match=f"leave out --checkpoint.{setting}"):
        KeepBest(monitor="quality/recall", **{setting: 1})


@pytest.mark.parametrize("schedule", ["every_n_epochs", "every_n_steps", "at_steps"])
def test_by_quality_it_must_be_measured(theirs, trainer, schedule):
    keep = KeepBest(monitor="quality/recall")
    trainer.callbacks = [RunFolder(None), Evaluate(**{schedule: [3] if schedule == "at_steps" else 3})]
    keep.setup(trainer, "module", "fit")
    trainer.callbacks = [RunFolder(None), Evaluate()]
    with pytest.raises(UserError, match=r"'quality/recall' needs measurements .* --evaluation\.every_n_epochs"):
        keep.setup(trainer, "module", "fit")
    keep.setup(trainer, "module", "test")
    KeepBest().setup(trainer, "module", "fit")


def test_by_quality_it_is_saved_when_that_is_measured(theirs, trainer):
    keep = KeepBest(monitor="quality/recall", mode="max")
    keep.setup(trainer, "module", "fit")
    keep._copy = mock.Mock()
    keep.on_validation_end(trainer, "module")
    assert not theirs.on_validation_end.called and not keep._copy.called
    end_of_step = lambda: keep.on_train_batch_end(trainer, "module", "outputs", "batch", 3)  # noqa: E731
    for end in (end_of_step, lambda: keep.on_train_epoch_end(trainer, "module")):
        for done_at, saved in ((3, 0), (4, 1)):
            theirs.on_validation_end.reset_mock()
            trainer.callbacks[1].done_at = done_at
            end()
            assert theirs.on_validation_end.call_count == saved
    trainer.callbacks = [RunFolder(None)]
    end_of_step()
    assert theirs.on_validation_end.call_count == 1, "nobody measures"


@pytest.mark.parametrize(("stopped", "last", "saved"), [(True, False, 0), (True, True, 1), (False, False, 1), (False, True, 1)])
def test_an_epoch_that_is_stopped_in_its_middle_is_not_saved_as_one(theirs, trainer, stopped, last, saved):
    keep = KeepBest()
    keep.setup(trainer, "module", "fit")
    trainer.should_stop, trainer.is_last_batch = stopped, last
    keep.on_train_epoch_end(trainer, "module")
    assert theirs.on_train_epoch_end.call_count == saved


def test_the_best_of_several_is_copied_when_it_is_another(theirs, trainer, tmp_path):
    keep = KeepBest(save_top_k=3)
    keep.setup(trainer, "module", "fit")
    (tmp_path / "checkpoints").mkdir()
    best, some, other = (tmp_path / "checkpoints" / name for name in ("best.ckpt", "4.ckpt", "8.ckpt"))

    def copy(path):
        keep.best_model_path = str(path)
        keep.on_validation_end(trainer, "module")
        return best.read_text() if best.exists() else None

    assert copy("") is None and copy(some) is None, "nothing is kept yet, or somebody has removed it"
    some.write_text("some")
    other.write_text("other")
    trainer.is_global_zero = False
    assert copy(some) is None
    trainer.is_global_zero = True
    assert copy(some) == "some" and copy(other) == "other"
    best.write_text("untouched")
    assert copy(other) == "untouched", "what has not changed is not copied again"
    other.write_text("better")
    assert copy(other) == "better" and copy(best) == "better"
    keep.folder = None
    assert copy(some) == "better"
