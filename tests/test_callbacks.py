"""Callbacks by themselves: what each does when it is called, with a trainer that only stands there."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import RichProgressBar, Timer, WeightAveraging
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from rich.text import Text

from flowmatch_mnist.evaluation.estimates import Estimate, Measurement
from flowmatch_mnist.sampling.generate import Sampler, Samples, draw_noise
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.support.files import save_checkpoint
from flowmatch_mnist.training import config, console, ema, evaluation
from flowmatch_mnist.training.best import KeepBest
from flowmatch_mnist.training.config import LogConfig, hyperparameters
from flowmatch_mnist.training.console import Bar, Description, Report, what_next
from flowmatch_mnist.training.distributed import gather, interleave, is_first
from flowmatch_mnist.training.drawing import DrawSamples, WriteSamples
from flowmatch_mnist.training.ema import EMA
from flowmatch_mnist.training.evaluation import Evaluate
from flowmatch_mnist.training.folder import RunFolder
from flowmatch_mnist.training.gradients import GradientWatch
from flowmatch_mnist.training.optimizer import learning_rate_factor
from flowmatch_mnist.training.options import as_list, check_options
from flowmatch_mnist.training.periodic import Periodic
from flowmatch_mnist.training.steps import is_logged, last_step
from flowmatch_mnist.training.stopping import is_stopping, reason

BATCH = (torch.zeros(3, 2), torch.zeros(5), torch.zeros(8))
"""Eight labels stand last."""


@pytest.fixture
def trainer():
    """At the end of an epoch's fourth step; it logs every other step."""
    return SimpleNamespace(
        global_step=4,
        current_epoch=2,
        log_every_n_steps=2,
        world_size=2,
        is_global_zero=True,
        sanity_checking=False,
        loggers=[mock.Mock()],
        callbacks=[],
        callback_metrics={"loss/val": torch.tensor(0.25)},
    )


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still, at `now` seconds."""
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(console, "time", clock)
    return clock


def test_the_rate_is_of_training_alone(trainer, clock, capsys):
    module, report = SimpleNamespace(last_loss=torch.tensor(0.5), device=torch.device("cpu")), Report()
    report.on_validation_end(trainer, module)
    assert capsys.readouterr().out == "", "before training begins, nothing is said"

    def step(number, begin, end):
        clock.now = begin
        report.on_train_batch_start(trainer, module, BATCH, 0)
        clock.now, trainer.global_step = end, number
        report.on_train_batch_end(trainer, module, None, BATCH, 0)

    clock.now, trainer.global_step = 1000.0, 0
    report.on_train_start(trainer, module)
    step(1, 1000.0, 1010.0)  # which compiles
    step(2, 1020.0, 1022.0)
    (logger,) = trainer.loggers
    logger.log_metrics.assert_called_once_with({"speed/samples_per_second": 8 * 2 / 2}, 1)
    step(3, 1030.0, 1032.0)
    report.on_validation_start(trainer, module)
    step(4, 1040.0, 1044.0)
    assert logger.log_metrics.call_args.args == ({"speed/samples_per_second": 8 * 2 / 4}, 3)
    step(5, 1050.0, 1051.0)
    step(6, 1053.0, 1054.0)
    assert logger.log_metrics.call_args.args == ({"speed/samples_per_second": 8 * 2 * 2 / 4}, 5)
    report.on_validation_end(trainer, module)
    assert capsys.readouterr().out == "epoch 3, step 6: train loss 0.5000, val loss 0.2500, 8 samples/s, 0 min 54 s\n"
    assert report.state_dict() == {"seconds": 54}
    for changes in ({"sanity_checking": True}, {"is_global_zero": False}):
        report.on_validation_end(SimpleNamespace(**(vars(trainer) | changes)), module)
        assert capsys.readouterr().out == ""


def test_the_rate_of_accumulated_gradients_is_logged_once_per_step(trainer, clock):
    module, report = SimpleNamespace(device=torch.device("cpu")), Report()
    trainer.global_step = 0
    report.on_train_start(trainer, module)
    for batch in range(1, 9):
        report.on_train_batch_start(trainer, module, BATCH, 0)
        clock.now, trainer.global_step = clock.now + 1, batch // 2
        report.on_train_batch_end(trainer, module, None, BATCH, 0)
    rate = {"speed/samples_per_second": 8 * 2}
    assert trainer.loggers[0].log_metrics.call_args_list == [mock.call(rate, 1), mock.call(rate, 3)]


def test_a_run_says_once_how_long_it_will_take(trainer, clock, capsys):
    module, report = SimpleNamespace(device=torch.device("cpu")), Report()
    trainer.estimated_stepping_batches, trainer.log_every_n_steps = 1000, 0
    for step in range(301, 520):
        clock.now += 100.0 if step == 301 else 0.4  # the first compiles
        for part in range(2):  # gradients are accumulated
            trainer.global_step = step - 1 + part
            report.on_train_batch_start(trainer, module, BATCH, 0)
            report.on_train_batch_end(trainer, module, None, BATCH, 0)
    assert capsys.readouterr().out == "step 400: about 4 min left\n"
    for changes in ({"estimated_stepping_batches": math.inf}, {"is_global_zero": False}, {"estimated_stepping_batches": 401}):
        quiet, other = Report(), SimpleNamespace(**(vars(trainer) | changes))
        for step in (300, 400):
            clock.now += 40.0
            other.global_step = step
            quiet.on_train_batch_start(other, module, BATCH, 0)
            quiet.on_train_batch_end(other, module, None, BATCH, 0)
        assert capsys.readouterr().out == ""


def test_the_memory_of_a_gpu_is_logged_beside_the_rate(trainer, clock, monkeypatch):
    monkeypatch.setattr(console, "memory_used", {"cuda": 3_000_000_000, "cpu": None}.__getitem__)
    for device, more in (("cuda", {"speed/gpu_memory_gb": 3.0}), ("cpu", {})):
        report, module = Report(), SimpleNamespace(device=device)
        report.on_train_batch_start(trainer, module, BATCH, 0)
        clock.now += 2
        report.on_train_batch_end(trainer, module, None, BATCH, 0)
        assert trainer.loggers[0].log_metrics.call_args.args[0] == {"speed/samples_per_second": 8.0} | more


def test_the_last_words_are_what_comes_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/some/version_3")
    draw, test = "  python sample.py 0-9 --per-class 10", "  python train.py test --ckpt_path last"
    words = [f"done; the files are in {folder}; next:", "  tensorboard --logdir runs"]
    assert what_next(folder, Path("runs"), True).splitlines() == words
    save_checkpoint(folder / "checkpoints/last.ckpt", {})
    assert what_next(folder, Path("runs"), True).splitlines()[1:3] == [draw, test]
    assert what_next(folder, Path("runs"), False).splitlines()[1] == test
    last = folder / "checkpoints/last.ckpt"
    elsewhere = what_next(folder, Path("there"), True).splitlines()
    assert elsewhere[1:] == [
        *(f"{draw} --checkpoint {last}", f"  python train.py test --ckpt_path {last}", "  tensorboard --logdir there")
    ]
    (folder / "samples").mkdir()
    (folder / "samples/learning.gif").touch()
    assert "; runs/some/version_3/samples/learning.gif shows how it learned; next:" in what_next(folder, Path("runs"), True)


def test_a_run_says_what_was_typed_and_on_which_machine(trainer, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/flowmatch-train", "test"])
    assert config.command() == "flowmatch-train test"
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py", "fit", "--name", "a b"])
    assert config.command() == "python train.py fit --name 'a b'"
    trainer.strategy, trainer.precision = SimpleNamespace(root_device=torch.device("cpu")), "32-true"
    hardware, software = config.machine(trainer).splitlines()
    assert hardware.startswith("2 x cpu in 32-true; ") and "processor cores" in hardware
    assert software.startswith("Python 3.") and f"torch {torch.__version__}" in software
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Abacus {device.index}")
    trainer.strategy.root_device = torch.device("cuda", 1)
    assert config.machine(trainer).startswith("2 x cuda Abacus 1 in 32-true; ")


def test_the_clock_of_a_run_that_goes_on_counts_on(trainer, clock, capsys):
    report = Report()
    report.load_state_dict({"seconds": 100.0})
    clock.now = 1000.0
    report.on_train_start(trainer, None)
    clock.now = 1030.0
    report.on_validation_end(trainer, SimpleNamespace(last_loss=torch.tensor(0.5)))
    assert capsys.readouterr().out == "epoch 3, step 4: train loss 0.5000, val loss 0.2500, 2 min 10 s\n"


def test_the_bar_shows_the_loss_of_the_last_logged_step(trainer, monkeypatch):
    theirs = mock.Mock()
    monkeypatch.setattr(RichProgressBar, "on_train_batch_end", theirs)
    monkeypatch.setattr(RichProgressBar, "get_metrics", lambda *_: {"v_num": 0, "loss/train": 9.0})
    bar = Bar()
    for step, loss, shown in ((1, 0.12345, 9.0), (2, 0.56789, 0.568), (3, 0.1, 0.568), (0, 0.2, 0.568)):
        trainer.global_step = step
        bar.on_train_batch_end(trainer, module := SimpleNamespace(last_loss=torch.tensor(loss)), "outputs", "batch", 7)
        theirs.assert_called_with(trainer, module, "outputs", "batch", 7)
        assert bar.get_metrics(trainer, module) == {"v_num": 0, "loss/train": pytest.approx(shown)}
    text = Description().render(SimpleNamespace(description="Epoch 3/-2"))
    assert text == Text("Epoch 3") and text.style == "progress.description"


def test_the_settings_of_a_run_have_short_names():
    flat = {
        "name": "x",
        "seed_everything": 3,
        "trainer.max_epochs": 5,
        "trainer.max_steps": -1,
        "trainer.precision": "32-true",
        "model.net.class_path": "flowmatch_mnist.networks.unet.UNet",
        "model.net.init_args.dropout": 0.1,
        "model.net.init_args.channels": [4, 8],
        "model.decay": "cosine",
        "model.channels_last": True,
        "model.start": None,
        "ema.decay": 0.999,
        "data.class_path": "flowmatch_mnist.data.digits.MNISTDataModule",
        "data.init_args.data_dir": "data",
        "data.init_args.dequantize": False,
    }
    assert hyperparameters(flat) == {
        "seed_everything": 3,
        "max_epochs": 5,
        "net": "networks.unet.UNet",
        "net.dropout": 0.1,
        "net.channels": "[4, 8]",
        "decay": "cosine",
        "ema.decay": 0.999,
        "data": "data.digits.MNISTDataModule",
        "dequantize": False,
    }


@pytest.mark.parametrize("kept", [True, False])
def test_the_whole_config_is_kept_and_logged(trainer, tmp_path, monkeypatch, kept):
    theirs, logged = mock.Mock(), mock.Mock()
    monkeypatch.setattr(SaveConfigCallback, "setup", theirs)
    monkeypatch.setattr(config, "log_run", logged)
    parser, settings = mock.Mock(), mock.Mock()
    parser.save.side_effect = lambda settings, path, **_: path.write_text("all")
    settings.as_flat.return_value = SimpleNamespace(seed_everything=3)
    trainer.datamodule = SimpleNamespace(problem=SimpleNamespace(headlines=("quality/x",)))
    trainer.callbacks = [RunFolder(tmp_path if kept else None)]
    monkeypatch.setattr(config, "machine", lambda trainer: "an abacus")
    monkeypatch.setattr(config, "command", lambda: "python train.py")
    callback = LogConfig(parser, settings, save_to_log_dir=False)
    callback.setup(trainer, "module", "fit")
    theirs.assert_called_once_with(trainer, "module", "fit")
    callback.save_config(trainer, "module", "fit")
    if kept:
        # Settings at None too: what is not said is said to be so. In one file, which may be there from an earlier part.
        parser.save.assert_called_once_with(settings, mock.ANY, skip_unset=False, overwrite=True, multifile=False)
    assert (tmp_path / "config.yaml").exists() == kept
    parser.dump.assert_called_once_with(settings, skip_unset=False)
    texts = {"command": "python train.py", "machine": "an abacus", "config": parser.dump()}
    logged.assert_called_once_with(trainer, texts, {"seed_everything": 3}, config.LISTED_SETTINGS, ("quality/x",))
    assert len(config.LISTED_SETTINGS) == 10


def test_processes_give_each_other_their_shares(trainer, monkeypatch):
    def all_gather(shares, share):
        shares[:] = [f"{share} of {rank}" for rank in range(len(shares))]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather)
    assert gather(trainer, "share") == ["share of 0", "share of 1"]
    trainer.world_size = 1
    assert gather(trainer, "share") == ["share"]
    assert interleave([torch.tensor([0, 2, 4]), torch.tensor([1, 3])]).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("rank", "node", "first"), [(0, 0, True), (1, 0, False), (0, 1, False), (1, 1, False)])
def test_the_first_process_is_that_of_the_first_node(monkeypatch, rank, node, first):
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    monkeypatch.setenv("NODE_RANK", str(node))
    assert is_first() == first


def test_before_there_is_an_average_nothing_is_averaged(trainer, monkeypatch):
    theirs = mock.Mock()
    monkeypatch.setattr(WeightAveraging, "on_load_checkpoint", theirs)
    average = EMA()
    average.on_train_batch_end(trainer, torch.nn.Linear(2, 2), None, BATCH, 0)
    average.on_load_checkpoint(trainer, "module", "checkpoint")
    theirs.assert_not_called()
    monkeypatch.setattr(ema, "average_of", lambda callback: "an average")
    average.on_load_checkpoint(trainer, "module", "checkpoint")
    theirs.assert_called_once_with(trainer, "module", "checkpoint")
    average.load_state_dict({"latest_update_step": 4})
    average.on_train_batch_end(trainer, "module", None, BATCH, 0)  # within a step that was averaged already


@pytest.mark.parametrize(
    ("make", "good", "bad"),
    [
        (Evaluate, [{"samples": 2, "test_samples": 2}, {"steps": ()}, {"steps": (1,)}], [{"samples": 1}, {"test_samples": 1}]),
        (Evaluate, [{"every_n_epochs": 0, "every_n_steps": 0}], [{"steps": (0,)}, {"steps": (2, 0)}, {"every_n_steps": -1}]),
        (DrawSamples, [{"rows": 1}, {"at_steps": [1]}], [{"rows": 0}, {"every_n_epochs": -1}, {"at_steps": [3, 0]}]),
        (Evaluate, [{"at_steps": ()}], [{"at_steps": [-1]}]),
        (KeepBest, [{"filename": "x", "save_top_k": 0}, {"filename": "x"}, {"monitor": None}], []),
        (EMA, [{"decay": 0.0}, {"decay": 0.9999}], [{"decay": 1.0}, {"decay": -0.1}]),
    ],
)
def test_settings_are_in_their_range(make, good, bad):
    for settings in good:
        make(**settings)
    for settings in bad:
        with pytest.raises(ValueError, match=make.__name__):
            make(**settings)


def test_the_best_by_quality_is_told_by_the_name_of_the_score():
    for monitor, by_quality in ((None, False), ("loss/val", False), ("quality/recall", True)):
        assert KeepBest(monitor=monitor, save_top_k=0 if monitor is None else 1).by_quality == by_quality


def test_predictions_are_written_when_all_are_there():
    writer = WriteSamples()
    assert writer.interval.on_epoch and not writer.interval.on_batch


@pytest.fixture
def measured(trainer, tmp_path, monkeypatch):
    """An `Evaluate` that draws for three seconds and measures for two, and a module of ten classes."""
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(evaluation, "time", clock)
    evaluate, splits = Evaluate(samples=20, test_samples=30, steps=(1, 3), seed=5), []
    evaluate.splits, evaluate.curves = splits, {}
    monkeypatch.setattr(evaluation, "log_curve", lambda trainer, tag, points: evaluate.curves.update({tag: points}))

    def sample(trainer, module, sampler, split, count):
        splits.append(f"labels of {split}")
        clock.now += 3.04
        return Samples(torch.zeros(count, 2), torch.arange(count) % 10, 2 * sampler.steps)

    def measure(trainer, module, samples, split):
        splits.append(split)
        clock.now += 2.06
        quarter, exact = Estimate(0.25, 0.02), Estimate(1.0, 0.0)
        return [
            Measurement("distance", Estimate(0.30000049 + samples.evaluations, 0.01), Estimate(0.15000049, 0.0), ratio=True),
            Measurement("accuracy by digit/3", Estimate(0.5, 0.03), exact),
            *(Measurement(name, quarter, exact) for name in ("accuracy", "recall", "precision", "copies")),
        ]

    monkeypatch.setattr(evaluate, "sample", sample)
    monkeypatch.setattr(evaluate, "measure", measure)
    trainer.datamodule = SimpleNamespace(problem=SimpleNamespace(headlines=("quality/distance ratio", "quality/accuracy")))
    trainer.strategy = SimpleNamespace(broadcast=lambda value: value)
    trainer.ckpt_path = tmp_path / "last.ckpt"
    trainer.callback_metrics["loss/test"] = torch.tensor(0.1250004)
    some = {"net": SimpleNamespace(no_label=10), "flow": SimpleNamespace(one_step=False)}
    return evaluate, SimpleNamespace(sampler=Sampler(4, "euler"), **some)


def test_a_report_has_all_scores_on_the_screen_and_in_its_file(trainer, measured, tmp_path, capsys):
    evaluate, module = measured
    evaluate.verbose = False
    evaluate.report(trainer, module, "test")
    assert capsys.readouterr().out == f"wrote {tmp_path / 'metrics-last-test.json'} after 3 s of drawing and 2 s of measuring\n"
    evaluate.splits.clear()
    evaluate.verbose = True
    evaluate.report(trainer, module, "test")
    lines = capsys.readouterr().out.splitlines()
    how = "euler, 4 steps, guidance 1 (NFE 8), seed 5"
    assert lines[0] == f"30 samples with the labels of the test split, {how}; compared with that split"
    assert lines[2].split() == ["distance", "8.300", "±", "0.010", "0.15", "55.33", "±", "0.07"]
    assert lines[8].split() == ["loss/test", "0.1250"]
    assert lines[9] == "20 samples with 2 network evaluations: distance ratio 15.33 ± 0.07, accuracy 0.250 ± 0.020"
    assert lines[10].startswith("and with 6 network evaluations: distance ratio 42.0")
    assert lines[11] == f"wrote {tmp_path / 'metrics-last-test.json'} after 3 s of drawing and 2 s of measuring"
    found = json.loads((tmp_path / "metrics-last-test.json").read_text())
    assert list(found) == [
        *("checkpoint", "split", "scores", "loss/test", "samples", "sampler"),
        *("evaluations", "by steps", "seed", "seconds", "versions"),
    ]
    assert (found["checkpoint"], found["split"], found["loss/test"], found["samples"]) == ("last.ckpt", "test", 0.125, 30)
    assert found["scores"]["distance"] == {
        "samples": {"value": 8.3, "error": 0.01},
        "real data": {"value": 0.15, "error": 0.0},
    }
    assert (found["sampler"]["steps"], found["evaluations"], found["seed"]) == (4, 8, 5)
    assert found["seconds"] == {"drawing": 3.0, "measuring": 2.1}
    assert [(p["steps"], p["evaluations"], p["samples"]) for p in found["by steps"]] == [(1, 2, 20), (3, 6, 20)]
    assert set(found["versions"]) == {"flowmatch-mnist", "torch", "lightning", "torchmetrics"}
    assert (
        evaluate.splits == ["labels of test", *["labels of test", "test"] * 2, "test"]
        and not trainer.loggers[0].log_metrics.called
    )
    accuracy, distance = (evaluate.curves[f"quality_by_evaluations/{title}"] for title in ("accuracy", "distance ratio"))
    assert accuracy == {2: 0.25, 6: 0.25} and distance == {2: pytest.approx(15.3, abs=0.1), 6: pytest.approx(42, abs=0.1)}


def test_curves_by_steps_are_of_headlines_and_of_solvers_that_take_steps(trainer, measured):
    evaluate, module = measured
    module.sampler = Sampler(4, "dopri5")
    assert evaluate.by_steps(trainer, module, "val") == [] and not evaluate.curves
    module.sampler, trainer.datamodule.problem.headlines = Sampler(4, "euler"), ()
    assert evaluate.by_steps(trainer, module, "val") == [] and not evaluate.curves


def test_scores_while_training_are_logged_told_and_kept(trainer, measured, capsys):
    evaluate, module = measured
    evaluate.act(trainer, module)
    quarters = [f"{name} 0.250 ± 0.020" for name in ("accuracy", "recall", "precision")]
    assert capsys.readouterr().out == f"step 4: 20 samples, distance ratio 55.33 ± 0.07, {', '.join(quarters)}\n"
    assert evaluate.splits == ["labels of val", "val"]
    (logged, step), _ = trainer.loggers[0].log_metrics.call_args
    assert step == 3 and logged["quality/recall"] == 0.25 and logged["quality_details/accuracy by digit 3"] == 0.5
    assert logged["quality_errors/recall"] == 0.02 and logged["quality_details_errors/accuracy by digit 3"] == 0.03
    assert "quality_errors/recall" not in trainer.callback_metrics
    assert trainer.callback_metrics["quality/recall"] == 0.25
    evaluate.done_at = 4
    state = evaluate.state_dict()
    assert state["done_at"] == 4 and state["scores"] == {tag: logged[tag] for tag in logged if "_errors/" not in tag}
    other, fresh = Evaluate(), SimpleNamespace(callback_metrics={})
    other.load_state_dict(state)
    other.on_train_start(fresh, module)
    assert other.done_at == 4 and fresh.callback_metrics["quality/recall"] == 0.25
    other.load_state_dict({"done_at": 2})
    assert other.state_dict() == {"done_at": 2, "scores": {}}, "an older checkpoint has no scores"


class Shown(RichProgressBar):
    """Lightning's bar, whose terminal is looked at."""

    is_enabled = True


@pytest.mark.parametrize("bar", [Shown(), None, mock.Mock()])
def test_each_process_draws_its_share_of_the_same_samples(trainer, monkeypatch, bar):
    asked = {}
    if isinstance(bar, Shown):
        bar.progress = mock.Mock()

    def generate(flow, labels, sampler, on_batch, **settings):
        on_batch(2)
        asked.update(labels=labels.tolist(), sampler=sampler, flow=flow, **settings)
        return Samples(labels[:, None].float(), labels, 6)

    monkeypatch.setattr(evaluation, "generate", generate)
    monkeypatch.setattr(evaluation, "averaged_flow", lambda trainer, module: "the averaged flow")
    other = (torch.arange(0.0, 5, 2)[:, None], 9)
    monkeypatch.setattr(evaluation, "gather", lambda trainer, share: [other, share])
    trainer.global_rank, trainer.progress_bar_callback = 1, bar
    module = SimpleNamespace(net=SimpleNamespace(no_label=4, shape=(2,)))
    trainer.datamodule = SimpleNamespace(real={"val": (None, torch.tensor([3, 0, 1, 2, 1, 0]))}.__getitem__)
    samples = Evaluate(seed=5).sample(trainer, module, "a sampler", "val", 6)
    noise = draw_noise(6, (2,), streams.generator("cpu", 5, "sampling"))
    assert torch.equal(asked.pop("noise"), noise[1::2])
    assert asked == {
        **{"flow": "the averaged flow", "sampler": "a sampler"},
        **{"labels": [0, 1, 3], "numbers": [1, 3, 5], "seed": 5},
    }
    assert samples.labels.tolist() == [0, 0, 1, 1, 2, 3] and samples.evaluations == 9
    assert samples.values.flatten().tolist() == [0, 0, 2, 1, 4, 3]
    if isinstance(bar, Shown):
        bar.progress.add_task.assert_called_once_with("Drawing", total=3)
        bar.progress.advance.assert_called_once_with(bar.progress.add_task(), 2)
        bar.progress.remove_task.assert_called_once_with(bar.progress.add_task())


def test_on_a_processor_a_step_that_is_not_finite_is_told_at_once_and_the_first_stays_the_first():
    watch, good = GradientWatch("stop"), torch.tensor(0.5)
    watch.require_finite()
    for step, norm in ((1, float("nan")), (2, float("inf"))):
        with pytest.raises(FloatingPointError, match=r"^step 1 is not finite: loss 0.5, norm of the gradients nan"):
            watch.check(step, torch.tensor(norm), good, [], logged=False, scaled=False)
    with pytest.raises(FloatingPointError, match="step 1"):
        watch.require_finite()
    watch = GradientWatch("stop")
    watch.check(1, good, good, [], logged=False, scaled=False)
    watch.require_finite()


class Acts(Periodic):
    """Notes in which steps it acts."""

    def act(self, trainer, module):
        self.seen = [*getattr(self, "seen", []), trainer.global_step]


def test_what_is_done_now_and_then_is_done_when_it_is_time_and_once(trainer):
    trainer.should_stop, trainer.is_last_batch = False, False
    acts, by_steps = Acts(3, 0), Acts(0, 1)
    for epoch in range(6):
        trainer.current_epoch, trainer.global_step = epoch, epoch + 1
        by_steps.on_train_batch_end(trainer, None, None, None, 0)
        acts.on_train_epoch_end(trainer, None)
    assert acts.seen == [3, 6] and by_steps.seen == [1, 2, 3, 4, 5, 6]
    again = Acts(3, 0)
    again.load_state_dict(acts.state_dict())
    again.on_train_epoch_end(trainer, None)
    assert not hasattr(again, "seen"), "a run that goes on does not act again in that step"
    for stopped, last, seen in ((True, False, False), (True, True, True), (False, True, True), (False, False, True)):
        trainer.should_stop, trainer.is_last_batch = stopped, last
        acts = Acts(3, 0)
        acts.on_train_epoch_end(trainer, None)
        assert hasattr(acts, "seen") == seen, "an epoch that is stopped in its middle is not over"


def stopper(message=None, monitor="loss/val", stopped=True):
    reason = EarlyStoppingReason.PATIENCE_EXHAUSTED if stopped else EarlyStoppingReason.NOT_STOPPED
    return SimpleNamespace(stopping_reason=reason, stopping_reason_message=message, monitor=monitor)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"should_stop": True}, "a callback stopped it"),
        ({"should_stop": True, "callbacks": [Timer({"hours": 1})]}, "a callback stopped it"),
        ({"should_stop": True, "early_stopping_callbacks": [stopper("Enough.")]}, "EarlyStopping: Enough; to go on, remove"),
        ({"should_stop": True, "early_stopping_callbacks": [stopper()]}, "EarlyStopping: loss/val; to go on, remove"),
        ({"should_stop": True, "early_stopping_callbacks": [stopper(stopped=False)]}, "a callback stopped it"),
        ({"max_steps": 4}, "it has done its 4 steps; to go on, raise --trainer.max_steps"),
        ({"max_steps": 5}, "it has done its 9 epochs; to go on, raise --trainer.max_epochs"),
        ({"max_steps": 0}, "it has done its 0 steps"),
        ({"limit_train_batches": 0}, "--trainer.limit_train_batches 0 leaves nothing"),
        ({}, "it has done its 9 epochs"),
    ],
)
def test_the_end_of_a_run_has_its_reason(trainer, changes, words):
    usual = {"should_stop": False, "max_steps": -1, "max_epochs": 9, "limit_train_batches": 1.0, "early_stopping_callbacks": []}
    vars(trainer).update(usual | changes)
    assert reason(trainer).startswith(words)
    late = mock.Mock(spec=Timer)
    for left, over in ((None, False), (0.5, False), (0, True), (-1.0, True)):
        late.time_remaining.return_value = left
        vars(trainer).update(usual | {"should_stop": True, "callbacks": [late]})
        assert (reason(trainer) == "its max_time is over; to go on, give a longer --trainer.max_time") == over


@pytest.mark.parametrize(
    ("least", "stops"),
    [((None, None), True), ((2, 4), True), ((3, None), False), ((None, 5), False), ((3, 4), False), ((0, 0), True)],
)
def test_a_run_stops_when_it_is_asked_and_has_done_the_least(trainer, least, stops):
    trainer.min_epochs, trainer.min_steps = least
    for asked in (True, False):
        trainer.should_stop = asked
        assert is_stopping(trainer) == (stops and asked)
    trainer.should_stop, trainer.current_epoch, trainer.global_step = True, 0, 0
    assert is_stopping(trainer) == (not any(least)), "even before the first step"


def test_the_learning_rate_rises_to_one_and_falls_to_nothing():
    def factors(decay, *steps, total=10):
        return [learning_rate_factor(step, 4, total, decay) for step in steps]

    for decay, halfway in (("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)):
        end = float(decay == "constant")
        assert factors(decay, 0, 3, 4, 7, 10, 13) == pytest.approx([0.2, 0.8, 1, halfway, end, end])
    assert factors("cosine", 6) == pytest.approx([(1 + math.cos(math.pi / 3)) / 2])
    assert factors("linear", 5, total=4) == [0], "a run that is all warm-up"


def test_steps_are_logged_every_so_often_and_counted_from_0(trainer):
    assert [is_logged(trainer, step) for step in range(1, 5)] == [False, True, False, True] and last_step(trainer) == 3
    trainer.log_every_n_steps = 0
    assert not is_logged(trainer, 4)


@pytest.mark.parametrize(
    ("option", "bad", "good"),
    [
        ("barebones", True, [False, None]),
        ("enable_checkpointing", False, [True, None]),
        ("enable_autolog_hparams", False, [True]),
        ("model_registry", "somewhere", [None]),
        ("use_distributed_sampler", False, [True]),
        ("strategy", "fsdp", ["auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"]),
    ],
)
def test_an_option_that_a_run_cannot_have_is_refused(option, bad, good):
    def asked(value):
        return Namespace(**({"strategy": "auto"} | {option: value}))

    with pytest.raises(UserError, match=f"--trainer.{option} {str(bad).lower()} is not supported"):
        check_options(asked(bad))
    for value in good:
        check_options(asked(value))
    assert [as_list(value) for value in (None, 3, [3], (3, 4))] == [[], [3], [3], [3, 4]]
