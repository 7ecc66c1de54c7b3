"""What a command line makes of a trainer, a module and data. Nothing is trained."""

import logging
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import TINY, assert_one_line_error, run_here
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from flowmatch_mnist.networks.unet import UNet
from flowmatch_mnist.sampling.generate import Flow, Sampler
from flowmatch_mnist.sampling.weights import DESCRIPTION_KEY
from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.support.files import save_checkpoint
from flowmatch_mnist.training import cli
from flowmatch_mnist.training.arguments import complete, find_checkpoint, find_config, option, run_folder
from flowmatch_mnist.training.best import KeepBest
from flowmatch_mnist.training.config import LogConfig
from flowmatch_mnist.training.evaluation import Evaluate
from flowmatch_mnist.training.folder import RunFolder
from flowmatch_mnist.training.saving import CheckpointFiles
from flowmatch_mnist.training.tensorboard import Board

NET = {"channels": (4, 8, 8), "blocks": (1, 2, 2)}
"""That of the tiny config."""


@pytest.fixture
def assemble(tmp_path, monkeypatch):
    """Gives what a command line makes: all that the trainer would begin with, and what was printed."""
    monkeypatch.chdir(tmp_path)
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)

    def from_(*arguments, config=TINY):
        made = SimpleNamespace()

        def begin(trainer, model, *rest, **named):
            made.trainer, made.model, made.rest, made.handlers = trainer, model, rest, dict(handlers)
            made.data = next(part for part in (*rest, *named.values()) if hasattr(part, "problem"))
            trainer.callbacks[0].teardown(trainer, model, "fit")
            logging.getLogger("flowmatch_mnist").info("a word of the project's own")

        for command in ("fit", "validate", "test", "predict"):
            monkeypatch.setattr(Trainer, f"_{command}_impl", begin)
        configs = [] if config is None else ["--config", config]
        made.done = run_here("train.py", *arguments, *configs, cwd=tmp_path)
        return made

    return from_


def keep(folder, step=7, config=True, **changes):
    """A run of the tiny config in a folder, as far as a command line looks at it."""
    described = Flow(UNet(**NET)).describe(Sampler(2)) | changes
    save_checkpoint(folder / "checkpoints/last.ckpt", {DESCRIPTION_KEY: described, "state_dict": {}, "global_step": step})
    if config:
        (folder / "config.yaml").write_text(TINY.read_text())
    return folder / "checkpoints/last.ckpt"


def of(trainer, kind):
    (found,) = [callback for callback in trainer.callbacks if isinstance(callback, kind)]
    return found


def test_a_new_run_has_its_folder_its_board_and_all_callbacks_in_order(assemble, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "native_precision", lambda accelerator: {"cpu": "bf16-mixed", "auto": "32-true"}[accelerator])
    made = assemble("fit", "--trainer.accelerator", "cpu", "--seed_everything", 3, "--checkpoint.monitor", "loss/train")
    folder = tmp_path / "runs/tiny/version_0"
    names = [type(callback).__name__ for callback in made.trainer.callbacks]
    assert names[:6] == ["RunFolder", "Report", "EMA", "DrawSamples", "Evaluate", "WriteSamples"]
    assert names[6:] == ["Bar", "LogConfig", "KeepBest", "SaveLast"], "SaveLast's checkpoint holds what the others know"
    assert of(made.trainer, RunFolder).path.resolve() == folder and not (folder / "config.yaml").exists()
    assert of(made.trainer, KeepBest).monitor == "loss/train"
    (board,) = made.trainer.loggers
    assert type(board) is Board and (tmp_path / board.log_dir) == folder and board.at is None
    assert (tmp_path / made.trainer.default_root_dir) == folder
    assert isinstance(made.trainer.strategy.checkpoint_io, CheckpointFiles) and not made.model.hparams
    assert not of(made.trainer, LogConfig).save_to_log_dir, "it keeps the config in the run's folder itself"
    assert made.handlers[signal.SIGTERM].__qualname__.startswith("end_together")
    assert made.done.stderr == "a word of the project's own\n"
    assert (made.model.seed, made.data.seed) == (3, 3) and type(made.data.seed) is int
    assert str(made.trainer.precision) == "bf16-mixed" and made.trainer.num_devices == 1
    assert made.trainer.num_sanity_val_steps == 0 and made.rest[-1] is True, "weights alone are read"
    assert made.done.stdout.splitlines()[-2:] == [
        "training UNet (0.04 M parameters) on 1 x cpu in bf16-mixed, into runs/tiny/version_0",
        "watch it with `tensorboard --logdir runs`; pictures go to runs/tiny/version_0/samples",
    ]
    assert (assemble("fit").trainer.callbacks[0].path).name == "version_1"


def test_a_run_without_a_name_is_called_mnist_and_one_without_a_seed_has_0(assemble, tmp_path):
    config = yaml.safe_load(TINY.read_text())
    del config["name"], config["seed_everything"]
    (tmp_path / "nameless.yaml").write_text(yaml.safe_dump(config))
    made = assemble(config=tmp_path / "nameless.yaml")
    assert str(made.trainer.callbacks[0].path) == "runs/mnist/version_0" and (made.model.seed, made.data.seed) == (0, 0)


def test_a_run_elsewhere_with_loggers_bars_and_callbacks_of_its_own(assemble, tmp_path):
    made = assemble(
        "--trainer.default_root_dir", "there", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"
    )
    assert str(made.trainer.callbacks[0].path) == "there/tiny/version_0" and not made.trainer.loggers
    assert not any(isinstance(callback, RichProgressBar) for callback in made.trainer.callbacks)
    made = assemble("--trainer.logger", "true", "--trainer.callbacks", "lightning.pytorch.callbacks.RichProgressBar")
    assert [type(logger) for logger in made.trainer.loggers] == [Board]
    assert type(of(made.trainer, RichProgressBar)) is RichProgressBar
    own = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"]
    assert [type(logger) for logger in assemble(*own).trainer.loggers] == [CSVLogger]


def test_the_module_learns_what_its_data_are_and_older_names_are_known(assemble, tmp_path):
    config = TINY.read_text().replace("networks.unet", "unet").replace("data.digits", "data")
    assert "flowmatch_mnist.unet.UNet" in config and "flowmatch_mnist.data.MNIST" in config
    (tmp_path / "older.yaml").write_text(config)
    made = assemble("--data.pixels", "logit", config=tmp_path / "older.yaml")
    assert made.model.flow.units.name == "logit" and type(made.model.net) is UNet


def test_a_quick_look_keeps_nothing(assemble, tmp_path):
    made = assemble("--trainer.fast_dev_run", "true")
    assert made.trainer.callbacks[0].path is None and made.done.stdout.endswith("into no folder\n")
    assert not list(tmp_path.rglob("version_*"))


def test_a_name_is_a_text_and_a_seed_a_number(assemble):
    made = assemble("--name", "007", "--seed_everything", "true")
    assert str(made.trainer.callbacks[0].path) == "runs/007/version_0"
    assert type(made.model.seed) is int and type(made.data.seed) is int


def test_the_optimizer_is_a_setting_of_the_module_alone(assemble):
    assert_one_line_error(assemble("--optimizer", "SGD").done, "unrecognized arguments: --optimizer SGD")


def test_whose_mistake_an_error_is():
    assert not cli.raised_by_lightning(ValueError())
    with pytest.raises(ValueError, match="own") as own:
        raise ValueError("own")
    assert not cli.raised_by_lightning(own.value)
    with pytest.raises(MisconfigurationException) as theirs:
        Trainer(max_epochs=-5)
    assert cli.raised_by_lightning(theirs.value)


@pytest.mark.parametrize(("processes", "lines"), [(1, 1), (2, 2)])
def test_several_processes_are_told_what_they_take_together(processes, lines, capsys):
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    trainer = SimpleNamespace(world_size=processes, strategy=strategy, precision="32-true")
    model = SimpleNamespace(net=None, parameters=lambda: [torch.zeros(10_000)])
    cli.CLI.announce(SimpleNamespace(trainer=trainer, model=model, folder=None, datamodule=SimpleNamespace(batch_size=9)))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"training NoneType (0.01 M parameters) on {processes} x cpu in 32-true, into no folder"
    assert len(printed) == lines and (lines == 1 or "9 samples each, 18 a step; to match one process, set" in printed[1])


def test_two_processes_are_told_what_they_take_together(assemble):
    printed = assemble("--trainer.devices", 2, "--trainer.accelerator", "cpu", "--trainer.strategy", "ddp").done.stdout
    assert "on 2 x cpu" in printed and "2 processes take 16 samples each, 32 a step" in printed
    assert "set --data.batch_size 8; with the larger batch" in printed and "up to 1.4 times as high" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--name", "a/b"], "--name 'a/b'"),
        (["--trainer.barebones", "true"], "--trainer.barebones"),
        (["--trainer.precision", "64-true"], "32-true, bf16-mixed"),
        (["--trainer.precision", "100"], "precision"),
        (["--model.net.channels", "[4,4]"], "one entry for each stage"),
        (["--trainer.max_epochs", "-5"], "max_epochs"),
        (["--data.batch_size", "0"], "at least 1"),
        (["--weights_only", "false"], "could then run any code"),
        (["--data.seed", "5"], "set --seed_everything"),
        (["--data.init_args.seed=5"], "set --seed_everything"),
        (["--model.label_dropout", "0", "--model.sampler.guidance", "2"], "set label_dropout above 0"),
        (
            [
                "--data.eval_batch_size",
                "1",
                "--trainer.devices",
                "2",
                "--trainer.accelerator",
                "cpu",
                "--trainer.strategy",
                "ddp",
            ],
            "raise --data.eval_batch_size",
        ),
        (["--checkpoint.save_last", "true"], "leave out --checkpoint.save_last"),
        (["--checkpoint.save_weights_only", "true"], "leave out --checkpoint.save_weights_only"),
        (["--checkpoint.save_on_exception", "true"], "leave out --checkpoint.save_on_exception"),
        (["--data.batch_size", "x"], "see `python train.py fit --help`"),
    ],
)
def test_a_mistake_leaves_no_folder(assemble, tmp_path, arguments, words):
    assert_one_line_error(assemble(*arguments).done, words)
    assert not list(tmp_path.glob("runs/*/version_*"))


@pytest.mark.parametrize(
    ("arguments", "line", "names"),
    [
        (["--data.batch_size", "x"], "data: batch_size: Expected a <class 'int'>. Got value: x;", ""),
        (["--model.sampler.steps", "{a: 1}"], "model.sampler: steps: Expected a <class 'int'>. Got value: {'a': 1};", ""),
        (["--trainer.max_epochs", "[1"], "trainer.max_epochs: Expected a <class 'int'>, got [1;", ""),
        (["--ema.decay", "a(b)"], "ema.decay: Expected a <class 'float'>. Got value: a(b);", ""),
        (["--model.nothing", "3"], "unrecognized arguments: --model.nothing 3;", ""),
        (["--model.net", "{class_path: x.y}"], "model.net: Problem with given class_path 'x.y': ", ""),
        (["--model.optimizer", "X"], "model.optimizer: Expected a dot import path string: X, got X;", ""),
        (["--model.path", "zigzag"], "there is no model.path 'zigzag'; choose one of 'linear', 'cosine', 'vp';", ""),
        (["--data.coupling", "x"], "data: there is no coupling 'x'; choose one of 'independent', 'ot_within_class', 'ot';", ""),
        (["--model.net", "X"], "there is no model.net 'X'; choose one of ", "MLP UNet"),
        (["--model.times", "X"], "there is no model.times 'X'; choose one of ", "Uniform LogitNormal Mode"),
        (["--data", "X"], "there is no data 'X'; choose one of ", "MNISTDataModule IDXDataModule"),
    ],
)
def test_what_is_wrong_with_a_setting_is_one_line(assemble, arguments, line, names):
    done = assemble(*arguments).done
    assert_one_line_error(done, *names.split(), "see `python train.py fit --help`")
    assert done.stderr.startswith(f"error: {line}"), done.stderr


@pytest.mark.parametrize("wanted", ["last", "best"])
def test_the_newest_run_goes_on_in_its_folder(assemble, tmp_path, wanted):
    path = keep(tmp_path / "runs/tiny/version_4")
    path.rename(path.with_name(f"{wanted}.ckpt"))
    made = assemble("fit", "--ckpt_path", wanted)
    assert str(made.trainer.callbacks[0].path) == "runs/tiny/version_4"
    (board,) = made.trainer.loggers
    assert (board.log_dir, board.at, board._kwargs["purge_step"]) == ("runs/tiny/version_4", None, 7)
    assert made.rest[-2] == f"runs/tiny/version_4/checkpoints/{wanted}.ckpt"
    assert made.done.stdout.splitlines()[0] == f"going on from runs/tiny/version_4/checkpoints/{wanted}.ckpt"


def test_a_run_goes_on_in_the_precision_of_the_new_hardware(assemble, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "native_precision", lambda accelerator: "32-true")
    keep(tmp_path / "runs/tiny/version_4")
    config = tmp_path / "runs/tiny/version_4/config.yaml"
    config.write_text(config.read_text().replace("trainer:", "trainer:\n  precision: bf16-mixed"))

    def precision(*arguments):
        return str(assemble(*arguments, "--ckpt_path", "last", config=None).trainer.precision)

    assert precision("fit") == precision("test") == "32-true"
    assert precision("test", "--trainer.precision", "bf16-mixed") == "bf16-mixed", "unless it is asked for"


def test_from_the_path_of_a_checkpoint_a_new_run_begins(assemble, tmp_path):
    path = keep(tmp_path / "runs/tiny/version_4")
    made = assemble("fit", "--ckpt_path", path)
    assert str(made.trainer.callbacks[0].path) == "runs/tiny/version_5" and made.model.resumes
    assert made.trainer.loggers[0]._kwargs["purge_step"] is None
    config = next(callback.config for callback in made.trainer.callbacks if type(callback).__name__ == "LogConfig")
    assert config.ckpt_path is None, "a run from its config starts afresh"


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
@pytest.mark.parametrize("config", [True, False])
def test_other_commands_write_beside_the_run(assemble, tmp_path, command, config):
    path = keep(tmp_path / "runs/tiny/version_4", config=config)
    made = assemble(command, "--ckpt_path", path)
    assert made.done.stdout == f"using {path}\n"
    folder = path.parents[1] if config else path.parent
    assert made.trainer.callbacks[0].path == folder
    if command == "predict":
        assert not made.trainer.loggers
    else:
        (board,) = made.trainer.loggers
        assert (board.log_dir, board.at) == (str(folder / command), 7)
        assert made.rest[2] is False, "Evaluate's table is the only one"
        assert of(made.trainer, Evaluate).verbose
        assert not of(assemble(command, "--ckpt_path", path, "--verbose", "false").trainer, Evaluate).verbose
    assert not any(type(callback).__name__ == "LogConfig" for callback in made.trainer.callbacks)
    assert_one_line_error(assemble(command).done, f"{command} needs a trained model", "--ckpt_path")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arguments": Flow(UNet(**NET)).net.arguments | {"groups": 4}}, "arguments"),
        ({"network": "MLP"}, "network MLP"),
        ({"path": "vp"}, "path vp"),
        ({"prediction": "noise"}, "prediction noise"),
        ({"units": "logit"}, "units logit"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(assemble, tmp_path, changes, words):
    keep(tmp_path / "runs/tiny/version_4", **changes)
    assert_one_line_error(assemble("--ckpt_path", "last").done, f"holds a model with {words}")


def test_an_older_checkpoint_may_say_less_of_its_model_but_no_nonsense(assemble, tmp_path):
    keep(tmp_path / "runs/tiny/version_4", arguments="none")
    assert_one_line_error(assemble("--ckpt_path", "last").done, "holds a model with arguments none")
    older = {key: value for key, value in Flow(UNet(**NET)).net.arguments.items() if key != "groups"}
    keep(tmp_path / "runs/tiny/version_5", arguments=older)
    assert assemble("--ckpt_path", "last").done.returncode == 0, "what an older file does not mention is as by default"
    other = assemble("--ckpt_path", "last", "--model.net.groups", 4).done
    assert_one_line_error(other, "holds a model with arguments", "'groups': 4")


def test_what_only_worries_is_not_shown(assemble):
    levels = {
        "lightning.pytorch": logging.WARNING,
        "lightning.fabric": logging.WARNING,
        "lightning.pytorch.profilers": logging.INFO,
        "torch.utils.cpp_extension": logging.ERROR,
        "flowmatch_mnist": logging.INFO,
    }
    for name in levels:
        logging.getLogger(name).setLevel(logging.NOTSET)
    torch.set_float32_matmul_precision("highest")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assemble()
        shown.clear()
        for text in (
            "treespec, LeafSpec",
            "Grad strides do not match bucket view strides.",
            "Checkpoint directory x exists and is not empty.",
        ):
            warnings.warn(text, stacklevel=1)
        assert not shown
        warnings.warn("another", stacklevel=1)
        assert len(shown) == 1
    assert {name: logging.getLogger(name).level for name in levels} == levels
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.parametrize(
    ("accelerator", "cuda", "processor", "precision"),
    [
        ("auto", True, {}, "bf16-mixed"),
        ("auto", False, {}, "32-true"),
        ("auto", None, {}, "32-true"),
        ("auto", None, {"avx512_bf16": True}, "bf16-mixed"),
        ("cpu", True, {}, "32-true"),
        ("cpu", False, {"amx_tile": True}, "bf16-mixed"),
    ],
)
def test_bf16_is_for_hardware_that_computes_in_it(monkeypatch, accelerator, cuda, processor, precision):
    def supported(including_emulation):
        assert not including_emulation
        return cuda

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: processor)
    assert cli.native_precision(accelerator) == precision


@pytest.mark.parametrize(
    ("given", "completed"),
    [
        ([], ["fit", "--config", "configs/mnist.yaml"]),
        (["-h"], ["-h"]),
        (["--help", "fit"], ["--help", "fit"]),
        (["--name", "x"], ["fit", "--config", "configs/mnist.yaml", "--name", "x"]),
        *[([command], [command, "--config", "configs/mnist.yaml"]) for command in ("fit", "validate", "test", "predict")],
        (
            ["-c", "a.yaml", "--name", "x", "--config=b.yaml"],
            ["fit", *["--config", "a.yaml", "--config", "b.yaml"], "--name", "x"],
        ),
        (["test", "--config"], ["test", "--config", ""]),
    ],
)
def test_what_may_be_left_out(given, completed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/mnist.yaml").touch()
    assert complete(given) == completed
    (tmp_path / "configs/mnist.yaml").unlink()
    there = str(TINY.parents[1] / "configs/mnist.yaml")
    assert complete(given) == [there if part == "configs/mnist.yaml" else part for part in completed]


def test_a_config_of_the_project_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = str(TINY.parents[1] / "configs/quick.yaml")
    for name in ("quick", "quick.yaml", "configs/quick.yaml"):
        assert find_config(name) == shipped
    for other in ("quicker", "mine/quick.yaml", "quick.yml", ""):
        assert find_config(other) == other
    (tmp_path / "quick.yaml").touch()
    assert find_config("quick.yaml") == "quick.yaml"  # a file of the user's comes first
    assert complete(["--config=quick"]) == ["fit", "--config", shipped]


def test_a_checkpoints_run_brings_its_config_and_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = keep(tmp_path / "runs/renamed/version_4")
    own = ["fit", "--config", "runs/renamed/version_4/config.yaml"]
    asked = ["--ckpt_path", "last"]
    assert complete(asked) == [*own, *asked, "--name", "renamed"]
    assert complete([*asked, "--name=renamed"]) == [*own, *asked, "--name=renamed"]
    assert complete(["--ckpt_path", str(path)]) == [
        "fit",
        "--config",
        str(path.parents[1] / "config.yaml"),
        "--ckpt_path",
        str(path),
    ]
    with pytest.raises(UserError, match="other"):
        complete([*asked, "--name", "other"])
    (tmp_path / "runs").rename(tmp_path / "there")
    root = [*asked, "--trainer.default_root_dir", "there"]
    assert complete(root) == ["fit", "--config", "there/renamed/version_4/config.yaml", *root, "--name", "renamed"]
    assert find_checkpoint("last", None, tmp_path / "there") == tmp_path / "there/renamed/version_4/checkpoints/last.ckpt"
    assert find_checkpoint("some.ckpt", None, tmp_path / "there").name == "some.ckpt"


def test_which_run_a_checkpoint_belongs_to(tmp_path, monkeypatch):
    path = keep(tmp_path / "renamed")
    assert run_folder(path) == tmp_path / "renamed"
    monkeypatch.chdir(path.parent)
    assert run_folder(Path("last.ckpt")) == tmp_path / "renamed", "given from its own folder"
    assert run_folder(tmp_path / "renamed/other/last.ckpt") is None
    (tmp_path / "renamed/config.yaml").unlink()
    assert run_folder(path) is None


def test_the_value_of_an_option():
    for arguments, value in (
        (["--a", "1"], "1"),
        (["--a=1"], "1"),
        (["--a"], ""),
        (["--ab", "1"], None),
        (["x", "--a=b=c"], "b=c"),
        (["--a", "1", "--a=2"], "2"),
        (["--a=1", "--a", "2"], "2"),
    ):
        assert option(arguments, "--a") == value
