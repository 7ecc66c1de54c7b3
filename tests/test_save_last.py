"""When `last.ckpt` is written, and how a run ends, step by step, with a trainer that only stands there."""

import signal
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from conftest import unix

from flowmatch_mnist.training import saving
from flowmatch_mnist.training.folder import RunFolder
from flowmatch_mnist.training.saving import REQUEUE, SaveLast


@pytest.fixture
def trainer(tmp_path):
    """In the middle of an epoch, with nothing to stop it."""
    return SimpleNamespace(
        global_step=0,
        current_epoch=0,
        should_stop=False,
        is_last_batch=False,
        is_global_zero=True,
        sanity_checking=False,
        fast_dev_run=False,
        world_size=1,
        log_every_n_steps=2,
        limit_val_batches=5,
        min_epochs=None,
        min_steps=None,
        max_steps=-1,
        max_epochs=9,
        limit_train_batches=10,
        early_stopping_callbacks=[],
        callbacks=[RunFolder(tmp_path)],
        loggers=[],
        state=SimpleNamespace(fn="fit"),
        strategy=mock.Mock(root_device=torch.device("cpu")),
        save_checkpoint=mock.Mock(),
    )


@pytest.fixture
def around(monkeypatch):
    """What surrounds a `SaveLast`: the clock, SLURM's signal, and whether validation follows."""
    around = SimpleNamespace(now=0.0, slurm=None, validates=False, handlers={}, marked=[], unmarked=[])
    around.notifier, around.next_epoch, around.flush = mock.Mock(), mock.Mock(), mock.Mock()
    monkeypatch.setattr(saving, "flush", around.flush)
    monkeypatch.setattr(saving.time, "monotonic", lambda: around.now)
    monkeypatch.setattr(saving, "validation_follows", lambda trainer: around.validates)
    monkeypatch.setattr(saving, "take_over_requeueing", lambda trainer: around.slurm)
    monkeypatch.setattr(saving, "on_sigterm", around.notifier)
    monkeypatch.setattr(saving, "begin_next_epoch", around.next_epoch)
    monkeypatch.setattr(saving, "mark", around.marked.append)
    monkeypatch.setattr(saving, "unmark", around.unmarked.append)
    monkeypatch.setattr(saving, "requeue", lambda: "SLURM starts it anew")
    monkeypatch.setattr(signal, "signal", around.handlers.__setitem__)
    return around


MODULE = mock.Mock()


def begun(trainer, **settings):
    save = SaveLast(**settings)
    save.setup(trainer, MODULE, "fit")
    save.on_fit_start(trainer, MODULE)
    save.on_train_start(trainer, MODULE)
    return save


def step(save, trainer, move=True):
    """The end of a batch: whether a checkpoint was written."""
    trainer.global_step += move
    before = trainer.save_checkpoint.call_count
    save.on_train_batch_end(trainer, MODULE, None, None, 0)
    return trainer.save_checkpoint.call_count > before


def test_the_command_that_resumes_names_the_folder_of_all_runs_unless_it_is_the_usual_one(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    resume = "resume it with `python train.py --ckpt_path last"
    assert saving.how_to_resume(Path("runs/toy/version_0/checkpoints/last.ckpt")) == f"{resume}`"
    elsewhere = saving.how_to_resume(Path("/some/where/toy/version_0/checkpoints/last.ckpt"))
    assert elsewhere == f"{resume} --trainer.default_root_dir /some/where`"
    assert saving.how_to_resume(Path("last.ckpt")) == f"{resume}`"


def test_it_saves_every_so_many_steps_but_leaves_it_to_validation_and_the_epochs_end(trainer, around, tmp_path):
    save = begun(trainer, every_n_steps=3)
    assert [step(save, trainer) for _ in range(6)] == [False, False, True, False, False, True]
    trainer.save_checkpoint.assert_called_with(tmp_path / "checkpoints/last.ckpt")
    around.flush.assert_called_with(trainer)
    step(save, trainer), step(save, trainer)
    around.validates = True
    assert not step(save, trainer)
    save.on_validation_end(trainer, MODULE)
    assert trainer.save_checkpoint.call_count == 3, "after validation"
    around.validates = False
    step(save, trainer), step(save, trainer)
    trainer.is_last_batch = True
    assert not step(save, trainer)
    save.on_validation_end(trainer, MODULE)
    assert trainer.save_checkpoint.call_count == 3
    save.on_train_epoch_end(trainer, MODULE)
    assert trainer.save_checkpoint.call_count == 4, "at the end of the epoch"
    trainer.is_last_batch = False
    assert not step(save, trainer), "what was due is done"


def test_it_saves_by_the_clock_and_not_where_it_is_told_not_to(trainer, around):
    for minutes, due in ((2.0, [False, False, True, False, True]), (0, [False] * 5)):
        around.now = 1000.0
        save, found = begun(trainer, every_n_minutes=minutes), []
        for now in (1060.0, 1119.9, 1120.0, 1230.0, 1240.0):
            around.now = now
            found.append(step(save, trainer))
            save.on_train_batch_start(trainer, MODULE, None, 0)  # which goes on: it was only time to save
        assert found == due
    for settings in ({"every_n_steps": -1}, {"every_n_minutes": -0.5}, {"every_n_minutes": float("nan")}):
        with pytest.raises(ValueError, match="at least 0"):
            SaveLast(**settings)
    SaveLast(0, 0)
    SaveLast(1, 0.5)


def test_nothing_is_saved_in_the_middle_of_a_step_of_several_batches(trainer, around):
    save = begun(trainer, every_n_steps=1)
    assert [step(save, trainer, move) for move in (0, 1, 0, 0, 1)] == [False, True, False, False, True]
    step(save, trainer, move=False)
    save.on_validation_end(trainer, MODULE)
    assert trainer.save_checkpoint.call_count == 2
    trainer.should_stop = True
    step(save, trainer, move=False)
    assert not trainer.should_stop, "a stop waits until the step is over"
    step(save, trainer)
    assert trainer.should_stop
    trainer.should_stop = False
    step(save, trainer)
    assert not trainer.should_stop, "it was told once"


def test_a_validation_in_the_middle_of_a_step_has_it_saved_at_its_end(trainer, around):
    save = begun(trainer)
    assert not step(save, trainer, move=False)
    save.on_validation_end(trainer, MODULE)
    assert not trainer.save_checkpoint.called and step(save, trainer)


def test_a_run_that_goes_on_does_not_take_its_first_step_for_a_part_of_one(trainer, around):
    trainer.global_step, trainer.current_epoch = 6, 7
    save = begun(trainer, every_n_steps=7)
    around.next_epoch.assert_called_once_with(trainer)
    assert step(save, trainer)


def test_a_stop_in_the_last_step_of_an_epoch_waits_for_its_end(trainer, around):
    save = begun(trainer)
    trainer.is_last_batch = trainer.should_stop = True
    step(save, trainer)
    assert not trainer.should_stop
    trainer.should_stop = True
    save.on_validation_end(trainer, MODULE)
    assert not trainer.should_stop
    save.on_train_epoch_end(trainer, MODULE)
    assert trainer.should_stop
    trainer.should_stop = False
    save.on_train_epoch_end(trainer, MODULE)
    assert not trainer.should_stop, "it was told once"


def test_a_stop_in_mid_epoch_brings_no_validation_of_its_own(trainer, around):
    save = begun(trainer)
    step(save, trainer)
    assert trainer.limit_val_batches == 5
    trainer.should_stop = around.validates = True
    step(save, trainer)
    assert trainer.limit_val_batches == 5, "one that is due is made"
    around.validates = False
    for _ in range(2):
        step(save, trainer)
        assert trainer.limit_val_batches == 0
    save.on_train_end(trainer, MODULE)
    assert trainer.limit_val_batches == 5
    trainer.limit_val_batches = 3
    save.on_train_end(trainer, MODULE)
    assert trainer.limit_val_batches == 3


def test_a_run_stopped_after_a_validation_in_mid_epoch_is_not_saved_twice(trainer, around):
    save = begun(trainer)
    step(save, trainer)
    save.on_validation_end(trainer, MODULE)
    save.on_train_epoch_end(trainer, MODULE)
    assert trainer.save_checkpoint.call_count == 1
    step(save, trainer)
    save.on_train_epoch_end(trainer, MODULE)
    assert trainer.save_checkpoint.call_count == 2
    trainer.is_last_batch = True
    save.on_train_epoch_end(trainer, MODULE)
    assert trainer.save_checkpoint.call_count == 3, "at an epoch's end in any case: it counts the epoch"


def test_a_run_stopped_after_its_first_step_is_saved(trainer, around):
    save = begun(trainer)
    assert not step(save, trainer)
    save.on_train_epoch_end(trainer, MODULE)
    assert trainer.save_checkpoint.call_count == 1


@pytest.mark.parametrize("changes", [{"sanity_checking": True}, {"state": SimpleNamespace(fn="validate")}])
def test_other_validations_save_nothing(trainer, around, changes):
    save = begun(trainer)
    vars(trainer).update(changes)
    save.on_validation_end(trainer, MODULE)
    assert not trainer.save_checkpoint.called and not step(save, trainer)


def test_a_quick_look_and_a_run_without_a_folder_save_nothing(trainer, around, capsys):
    trainer.fast_dev_run = True
    assert not step(begun(trainer, every_n_steps=1), trainer)
    trainer.fast_dev_run, trainer.callbacks, trainer.log_dir = False, [], None
    save = begun(trainer, every_n_steps=1)
    assert save.path is None and not step(save, trainer)
    save._on_signal(signal.SIGTERM, None)
    step(save, trainer)
    with pytest.raises(SystemExit):
        save.on_train_batch_start(trainer, MODULE, None, 0)
    assert capsys.readouterr().out == "stopped by SIGTERM after step 3\n"


@unix
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_epoch_start"])
@pytest.mark.parametrize("first", [True, False])
def test_a_signal_is_answered_after_the_step(trainer, around, tmp_path, capsys, hook, first):
    trainer.is_global_zero = first
    save = begun(trainer)
    assert all(around.handlers[number] == save._on_signal for number in (signal.SIGINT, signal.SIGTERM))
    end = getattr(save, hook)
    more = (None, 0) if hook == "on_train_batch_start" else ()
    save._on_signal(signal.SIGINT, None)
    end(trainer, MODULE, *more)
    assert step(save, trainer), "the step is finished, and saved"
    with pytest.raises(SystemExit) as ended:
        end(trainer, MODULE, *more)
    assert ended.value.code == (128 + signal.SIGINT if first else 0)
    told = f"stopped by SIGINT after step 1; wrote {tmp_path / 'checkpoints/last.ckpt'}; resume it with"
    assert capsys.readouterr().out.startswith(told) == first


@unix
def test_a_second_signal_ends_at_once_but_slurms_is_waited_for(trainer, around):
    save = begun(trainer)
    save._end = mock.Mock()
    save._on_signal(signal.SIGINT, None)
    save._end.assert_not_called()
    save._on_signal(signal.SIGTERM, "frame")
    save._end.assert_called_once_with(signal.SIGTERM, "frame")
    around.slurm = signal.SIGUSR1
    save = begun(trainer)
    save._end = mock.Mock()
    save._on_signal(signal.SIGUSR1, None)
    save._on_signal(signal.SIGTERM, None)
    save._end.assert_not_called()
    assert save._signal == REQUEUE + signal.SIGUSR1 > 2 * 128


@unix
def test_slurms_job_is_marked_started_anew_and_forgotten(trainer, around, tmp_path, capsys):
    begun(trainer).on_train_end(trainer, MODULE)
    assert not around.marked and not around.unmarked
    around.slurm = signal.SIGUSR1
    for stage, first, marked in (("validate", True, []), ("fit", False, []), ("fit", True, [tmp_path])):
        trainer.is_global_zero = first
        around.handlers.clear()
        SaveLast().setup(trainer, MODULE, stage)
        assert around.marked == marked and (signal.SIGUSR1 in around.handlers) == (stage == "fit")
    save = begun(trainer)
    assert around.notifier.call_args.args == (trainer, save._end)
    save._on_signal(signal.SIGUSR1, None)
    assert step(save, trainer)
    with pytest.raises(SystemExit) as ended:
        save.on_train_epoch_start(trainer, MODULE)
    assert ended.value.code == 128 + signal.SIGUSR1 and capsys.readouterr().out.endswith("; SLURM starts it anew\n")
    for first, forgotten in ((False, []), (True, [tmp_path])):
        trainer.is_global_zero = first
        save.on_train_end(trainer, MODULE)
        assert around.unmarked == forgotten
    trainer.callbacks, trainer.log_dir = [], None
    begun(trainer)
    assert len(around.marked) == 2, "without a folder there is nothing to mark"


def test_several_processes_agree_in_a_step_that_is_logged(trainer, around):
    trainer.world_size = 2
    trainer.strategy.reduce.side_effect = lambda wish, reduce_op: {"max": torch.maximum(wish, torch.tensor(15.0))}[reduce_op]
    save = begun(trainer)
    assert not step(save, trainer) and not trainer.strategy.reduce.called
    assert step(save, trainer) and save._stop_for == 15, "another process was asked to stop"
    for ends in (save.on_validation_end, save.on_train_epoch_end):
        save._stop_for = 0
        ends(trainer, MODULE)
        assert save._stop_for == 15


def test_a_stopped_run_stays_stopped_and_leftovers_are_cleared_away(trainer, around, tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    for name in (".1.last.ckpt", "last.ckpt", ".other"):
        (tmp_path / "checkpoints" / name).touch()
    trainer.is_global_zero = False
    begun(trainer)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3, "one process clears away"
    trainer.is_global_zero = True
    begun(trainer)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [".other", "last.ckpt"]
    assert not trainer.should_stop
    monkeypatch.setattr(saving, "stopped_early", lambda trainer: "it was enough")
    begun(trainer)
    assert trainer.should_stop
    monkeypatch.setattr(saving, "stopped_early", lambda trainer: None)
    begun(trainer)
    assert trainer.should_stop, "who else asked for it is heard too"


@pytest.mark.parametrize(
    ("last", "counts", "kept"),
    [
        (False, {"started": 3, "processed": 3, "completed": 3}, {"started": 3, "processed": 2, "completed": 2}),
        (False, {"started": 3, "processed": 3, "completed": 2}, {"started": 3, "processed": 2, "completed": 2}),
        (False, {"started": 3, "processed": 2, "completed": 2}, {"started": 3, "processed": 2, "completed": 2}),
        (False, {"started": 1, "processed": 1, "completed": 1}, {"started": 1, "processed": 0, "completed": 0}),
        (False, {"started": 0, "processed": 0, "completed": 0}, {"started": 0, "processed": 0, "completed": 0}),
        (True, {"started": 3, "processed": 3, "completed": 3}, {"started": 3, "processed": 3, "completed": 3}),
    ],
)
def test_an_epoch_that_is_not_over_is_not_counted_as_done(trainer, around, last, counts, kept):
    trainer.is_last_batch = last
    progress = {"current": counts.copy(), "total": counts.copy()}
    SaveLast().on_save_checkpoint(trainer, MODULE, {"loops": {"fit_loop": {"epoch_progress": progress}}})
    assert progress == {"current": kept, "total": kept}


def test_why_a_run_ends_is_said_once(trainer, around, tmp_path, capsys):
    save = SaveLast()
    save.setup(trainer, MODULE, "fit")
    save.on_fit_end(trainer, MODULE)
    assert capsys.readouterr().out.startswith("nothing to do after step 0: ")
    save = begun(trainer)
    save.on_fit_end(trainer, MODULE)
    assert capsys.readouterr().out == "", "a run that reaches its limits needs no words"
    trainer.should_stop = True
    save.on_fit_end(trainer, MODULE)
    assert capsys.readouterr().out == f"stopped after step 0: a callback stopped it; wrote {save.path}\n"
    trainer.fast_dev_run = True
    save.on_fit_end(trainer, MODULE)
    assert capsys.readouterr().out == "stopped after step 0: a callback stopped it\n"
    trainer.is_global_zero = False
    save.on_fit_end(trainer, MODULE)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("first", [True, False])
def test_at_once_means_with_all_processes_and_a_word(trainer, monkeypatch, first):
    written, ended = [], mock.Mock()
    monkeypatch.setattr(saving, "write", lambda file, text: written.append((file, text.decode())))
    monkeypatch.setattr(saving, "_exit", ended)
    trainer.is_global_zero = first
    saving.end_together(trainer)(signal.SIGTERM, None)
    assert written == [(2, "stopped by SIGTERM at once; the files saved before are kept\n")] * first
    trainer.strategy.launcher.kill.assert_called_once_with(signal.SIGTERM)
    trainer.strategy.launcher = None
    saving.end_together(trainer)(signal.SIGTERM, None)
    assert ended.call_args_list == [mock.call(128 + signal.SIGTERM)] * 2
