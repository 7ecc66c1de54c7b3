"""What lies below all: devices, errors and files."""

from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from flowmatch_mnist.support.choices import PRETRAINED
from flowmatch_mnist.support.commands import CommandParser, as_typed
from flowmatch_mnist.support.devices import compile_in_place, default_device
from flowmatch_mnist.support.errors import UserError, exit_on_error
from flowmatch_mnist.support.files import check_writable, load_checkpoint, save_checkpoint, save_json


def test_the_accelerator_that_is_there_is_taken(monkeypatch):
    for found, name in ((None, "cpu"), (torch.device("mps", 0), "mps"), (torch.device("cuda", 1), "cuda")):
        look = mock.Mock(return_value=found)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", look)
        assert default_device() == name
        look.assert_called_once_with(check_available=True)


def test_a_network_is_compiled_where_that_works(monkeypatch):
    tried = []
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: tried.append(x.device.type))
    net = nn.Linear(2, 2)
    net.compile = mock.Mock()
    compile_in_place(net, torch.device("meta"), "reduce-overhead")
    net.compile.assert_called_once_with(mode="reduce-overhead")
    assert tried == ["meta"]


def test_a_network_is_left_as_it_is_where_compiling_fails_and_the_reason_is_said(monkeypatch, caplog):
    def broken(function):
        raise RuntimeError(f"no compiler\n{'x' * 300} Set TORCHDYNAMO_VERBOSE=1 for more")

    monkeypatch.setattr(torch, "compile", broken)
    net = nn.Linear(2, 2)
    net.compile = mock.Mock()
    compile_in_place(net, torch.device("cpu"), None)
    net.compile.assert_not_called()
    (record,) = caplog.records
    assert record.getMessage().endswith(f"it does not work here: no compiler {'x' * 188}")


def ends(error, cause=None):
    """How a command ends in which an error is raised: its status, and whether it shows a traceback of its own."""
    with pytest.raises(SystemExit) as ended, exit_on_error():
        if cause is None:
            raise error
        try:
            raise cause
        except BaseException:
            raise error  # noqa: B904  as Lightning does
    return ended.value.code


@pytest.mark.parametrize(
    ("error", "cause", "status", "line"),
    [
        (UserError("a\n  mistake"), None, 2, "error: a mistake"),
        (FloatingPointError("nan"), None, 2, "error: nan"),
        (FileNotFoundError(2, "No such file", "x.png"), None, 2, "error: x.png: No such file"),
        (OSError("the disk is gone"), None, 2, "error: the disk is gone"),
        (OSError(28, "No space left"), None, 2, "error: [Errno 28] No space left"),
        (MemoryError(), None, 2, "error: there is not enough memory; use a smaller batch, or fewer samples"),
        (torch.OutOfMemoryError("..."), None, 2, "error: there is not enough memory; use a smaller batch, or fewer samples"),
        (
            RuntimeError("MPS backend out of memory"),
            None,
            2,
            "error: there is not enough memory; use a smaller batch, or fewer samples",
        ),
        (KeyboardInterrupt(), None, 130, "interrupted"),
        (SystemExit(1), KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(3), None, 3, ""),
        (SystemExit(1), ValueError(), 1, ""),
    ],
    ids=str,
)
def test_each_end_has_its_line_and_status(error, cause, status, line, capsys):
    assert ends(error, cause) == status
    out, err = capsys.readouterr()
    assert out == "" and err == (f"{line}\n" if line else "")


@pytest.mark.parametrize("kind", [torch.float16, torch.int64])
def test_a_tensor_larger_than_any_memory_gets_one_line(kind, capsys):
    with pytest.raises(SystemExit, match="2"), exit_on_error():
        torch.empty(2**55, dtype=kind)
    assert capsys.readouterr().err.startswith("error: there is not enough memory;")


def test_an_error_of_the_program_is_not_hidden():
    with pytest.raises(RuntimeError, match="shapes"), exit_on_error():
        raise RuntimeError("shapes do not match")


def test_a_mistake_on_a_command_line_is_one_line_with_where_to_look(capsys):
    parser = CommandParser(prog="tool", description="What\n    it does.")
    with pytest.raises(SystemExit, match="2"):
        parser.error("no\n  such thing")
    assert capsys.readouterr().err == "error: no such thing; see `tool --help`\n"
    assert "What\n    it does." in parser.format_help()


@pytest.mark.parametrize(
    ("running", "train", "sample"),
    [
        ("/somewhere/train.py", "python train.py", "python sample.py"),
        ("/somewhere/bin/flowmatch-train", "flowmatch-train", "flowmatch-sample"),
        ("flowmatch-sample.exe", "flowmatch-train", "flowmatch-sample"),
        ("/somewhere/bin/pytest", "python train.py", "python sample.py"),
    ],
)
def test_messages_name_commands_as_they_are_typed(running, train, sample, monkeypatch):
    monkeypatch.setattr("sys.argv", [running, "--help"])
    assert as_typed("train") == train and as_typed("sample") == sample


def test_plain_values_are_written_to_be_read(tmp_path):
    save_json(tmp_path / "new/scores.json", {"é": 1})
    assert (tmp_path / "new/scores.json").read_bytes() == b'{\n "\xc3\xa9": 1\n}\n'


def test_that_a_file_can_be_written_is_known_before(tmp_path):
    check_writable(tmp_path / "new/weights.safetensors")
    assert not list((tmp_path / "new").iterdir())
    with pytest.raises(UserError, match="it is a folder; add the name of a file"):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/weights: .*; choose another place"):
        check_writable(tmp_path / "file/weights")


def test_of_a_checkpoint_that_could_not_be_read_the_part_is_named(tmp_path):
    good = {"step": 3, "weights": {"x": torch.ones(2)}, "callbacks": {"Mine": {"best": 0.5}}}
    save_checkpoint(tmp_path / "good.ckpt", good)
    assert load_checkpoint(tmp_path / "good.ckpt")["callbacks"] == good["callbacks"]
    bad = good | {"callbacks": {"Mine": {"best": 0.5}, "Yours": {"best": np.float64(0.5)}}}
    with pytest.raises(UserError, match="the values in Yours; keep"):
        save_checkpoint(tmp_path / "bad.ckpt", bad)
    with pytest.raises(UserError, match="the values in step; keep"):
        save_checkpoint(tmp_path / "bad.ckpt", good | {"step": np.float64(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["good.ckpt"]


def test_a_checkpoint_in_which_a_bit_has_changed_is_refused(tmp_path, monkeypatch):
    save_checkpoint(path := tmp_path / "some.ckpt", {"x": torch.arange(100)})
    asked = mock.Mock(side_effect=torch.load)
    monkeypatch.setattr(torch, "load", asked)
    load_checkpoint(path)
    save_checkpoint(tmp_path / "other.ckpt", {"x": 1})
    assert [call.kwargs for call in asked.call_args_list] == [{"map_location": "cpu", "weights_only": True}] * 2
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(100).numpy().tobytes()) + 50] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"its part .*has changed"):
        load_checkpoint(path)


def test_the_weights_in_the_package_are_there():
    assert list(PRETRAINED) == ["mnist", "few-step", "one-step"]
    for name, path in PRETRAINED.items():
        assert path.is_file() and path.name == f"{name}.safetensors"
