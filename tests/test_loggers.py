"""What is handed to loggers: to TensorBoard's, to those that take pictures, and to all others."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from flowmatch_mnist.training import tensorboard
from flowmatch_mnist.training.tensorboard import Board, flush, log_curve, log_picture, log_run, log_scalars


@pytest.fixture
def loggers():
    """TensorBoard's, one with a `log_image`, and one without."""
    return mock.Mock(spec=TensorBoardLogger), mock.Mock(), mock.Mock(spec=["log_metrics", "log_hyperparams", "save"])


@pytest.fixture
def trainer(loggers):
    return SimpleNamespace(loggers=list(loggers), is_global_zero=True)


def test_scalars_go_to_all(trainer, loggers):
    log_scalars(trainer, {"loss": 0.5}, 7)
    for logger in loggers:
        logger.log_metrics.assert_called_once_with({"loss": 0.5}, 7)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3)])
def test_pictures_go_to_those_that_take_them(trainer, loggers, shape):
    picture = torch.randint(256, shape, dtype=torch.uint8)
    log_picture(trainer, "grid", picture, 7)
    (tag, shown, step), settings = loggers[0].experiment.add_image.call_args
    assert (tag, step, settings) == ("grid", 7, {"dataformats": "HWC"})
    assert torch.equal(shown, picture.reshape(4, 6, -1))
    (tag, (shown,), step), _ = loggers[1].log_image.call_args
    assert (tag, step) == ("grid", 7) and (shown == picture.numpy()).all()


def test_of_tensorboards_own_logger_no_other_method_is_asked_for_pictures(trainer):
    class Both(TensorBoardLogger):
        experiment, log_image = mock.Mock(), mock.Mock()

    trainer.loggers = [Both.__new__(Both)]
    log_picture(trainer, "grid", torch.zeros(2, 2, dtype=torch.uint8), 7)
    Both.experiment.add_image.assert_called_once()
    Both.log_image.assert_not_called()


def test_curves_over_something_else_go_to_tensorboard(trainer, loggers):
    log_curve(trainer, "curve", {2: 0.5, 4: 0.25})
    points = [mock.call("curve", 0.5, 2), mock.call("curve", 0.25, 4)]
    assert loggers[0].experiment.add_scalar.call_args_list == points
    assert not loggers[1].add_scalar.called


def test_settings_go_to_all_in_each_ones_way(trainer, loggers, monkeypatch):
    asked = []
    monkeypatch.setattr(tensorboard, "hparams", lambda settings, metrics: asked.append((settings, metrics)) or "ab")
    texts = {"command": "python train.py", "config": "one:\n  two"}
    log_run(trainer, texts, {"decay": 0.5, "lr": 0.1}, ("batch_size", "lr"), ("quality/x", "quality/y"))
    board = loggers[0].experiment
    texts_added = [mock.call("command", "    python train.py\n"), mock.call("config", "    one:\n      two\n")]
    assert board.add_text.call_args_list == texts_added
    assert asked == [({"lr": 0.1}, {"quality/x": 0.0, "quality/y": 0.0, "loss/val": 0.0})]
    assert board.file_writer.add_summary.call_args_list == [mock.call("a"), mock.call("b")]
    charts = {
        "losses": ["Multiline", ["loss/train", "loss/val"]],
        "losses by time": ["Multiline", ["loss_by_time/val.*"]],
        "x": ["Multiline", ["quality/x"]],
        "y": ["Multiline", ["quality/y"]],
        "gradient norm": ["Multiline", ["optimizer/gradient_norm"]],
        "samples per second": ["Multiline", ["speed/samples_per_second"]],
    }
    board.add_custom_scalars.assert_called_once_with({"first look": charts})
    assert not loggers[0].log_hyperparams.called
    for logger in loggers[1:]:
        logger.log_hyperparams.assert_called_once_with({"decay": 0.5, "lr": 0.1})


def test_what_was_logged_is_put_on_the_disk_by_one_process(trainer, loggers):
    trainer.is_global_zero = False
    flush(trainer)
    assert not any(logger.save.called for logger in loggers)
    trainer.is_global_zero = True
    flush(trainer)
    assert all(logger.save.call_count == 1 for logger in loggers)


def test_a_board_is_in_its_folder_and_its_scalars_at_their_step(tmp_path, monkeypatch):
    logged = mock.Mock()
    monkeypatch.setattr(TensorBoardLogger, "log_metrics", logged)
    for at, step in ((None, 3), (7, 7), (0, 0)):
        board = Board(tmp_path / "runs/x/version_2", at=at, purge_step=5)
        assert board.log_dir == str(tmp_path / "runs/x/version_2")
        board.log_metrics({"loss": 0.5, "epoch": 2}, 3)
        logged.assert_called_with({"loss": 0.5}, step)
    assert board._kwargs == {"purge_step": 5}
    board.log_hyperparams({})
    assert "hp_metric" not in str(logged.call_args_list)
