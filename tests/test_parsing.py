"""What a command line may say, and what each command says of itself."""

import argparse
import importlib

import pytest
from conftest import assert_one_line_error, run_here

from flowmatch_mnist.sample import image, interval, labels, positive
from flowmatch_mnist.support import devices
from flowmatch_mnist.support.errors import UserError

COMMANDS = {
    "sample.py": ("python sample.py", "flowmatch_mnist.sample"),
    **{
        f"flowmatch_mnist/{name}.py": (f"python -m flowmatch_mnist.{name}", f"flowmatch_mnist.{name}")
        for name in ("reflow", "export", "digitnet")
    },
}


@pytest.mark.parametrize("script", COMMANDS)
def test_help_says_how_to_call_it_and_what_it_does(script, tmp_path):
    prog, module = COMMANDS[script]
    done = run_here(script, "--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {prog} [-h]")
    assert importlib.import_module(module).__doc__.strip() in done.stdout


@pytest.mark.parametrize(
    ("read", "texts"),
    [
        (labels, {"7": [7], "0-2": [0, 1, 2], "9-9": [9], "2-1": None, "10": None, "-1": None, "1-": None, "": None}),
        (positive, {"1": 1, "20": 20, "0": None, "-1": None, "1.5": None, "x": None, "": None}),
        (interval, {"0-1": (0, 1), "0.2-0.9": (0.2, 0.9), "0.5-0.5": (0.5, 0.5), "0.9-0.2": None, "0-1.1": None, "0.5": None}),
        (
            image,
            {
                "test:0": ("test", 0),
                "test:9999": ("test", 9999),
                "a:b.png:9": ("a:b.png", 9),
                "test:10000": None,
                "a.png:10": None,
                "a.png:-1": None,
                "a.png:x": None,
                ":7": None,
                "a.png": None,
            },
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_read_and_what_is_refused(read, texts):
    for text, value in texts.items():
        if value is None:
            with pytest.raises(argparse.ArgumentTypeError, match=repr(text)):
                read(text)
        else:
            assert read(text) == value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([7, "--weights", "nobody"], ["invalid choice", "mnist", "few-step", "--help"]),
        ([7, "--weights", "mnist", "--checkpoint", "a.ckpt"], ["not allowed with"]),
        ([7, "--interpolate", 3, *["--from-image", "a:1"] * 3], ["or twice"]),
        (["10"], ["'10'", "0-9"]),
        (["-1"], ["'-1'", "0-9"]),
        (["seven"], ["'seven'", "0-9"]),
        (["9-0"], ["'9-0'", "0-9"]),
        ([], ["LABEL"]),
        (["7", "--steps", "0"], ["--steps", "from 1 to 999999999"]),
        (["7", "--steps", "9" * 20], ["--steps", "from 1 to 999999999"]),
        (["7", "--per-class", "0"], ["--per-class"]),
        (["7", "--batch-size", "x"], ["--batch-size"]),
        (["7", "--solver", "leapfrog"], ["invalid choice", "leapfrog", "midpoint"]),
        (["7", "--guidance", "nan"], ["--guidance"]),
        (["7", "--guidance-power", "inf"], ["--guidance-power"]),
        (["7", "--seed", "1.5"], ["--seed"]),
        (["7", "--guidance-interval", "0.9-0.2"], ["0.9-0.2", "0.2-0.9"]),
        (["7", "--spacing", "even"], ["invalid choice", "even", "uniform", "log_snr"]),
        (["7", "--from-image", "seven.png"], ["seven.png", "FILE:0-9"]),
        (["7", "--from-image", "test:10000"], ["test:10000", "test:0-9999"]),
        (["7", "--from-image", "test:0", "--per-class", "2"], ["--per-class"]),
        (["7", "--from-image", "test:0", "--from-image", "test:1"], ["--interpolate"]),
        (["7", "--interpolate", "3", *["--from-image", "test:0"] * 2, "--per-class", "2"], ["--per-class"]),
        (["7", "--out", "digits.jpg"], ["digits.jpg", ".png"]),
    ],
    ids=str,
)
def test_mistakes_are_told_before_anything_is_loaded(options, words, tmp_path, monkeypatch):
    monkeypatch.setattr("flowmatch_mnist.sampling.request.draw_and_write", None)
    assert_one_line_error(run_here("sample.py", *options, cwd=tmp_path), *words)


def test_what_goes_wrong_later_is_told_in_a_line_too(tmp_path, monkeypatch):
    def draw_and_write(options, started):
        raise UserError(f"no {options.labels} today")

    monkeypatch.setattr("flowmatch_mnist.sampling.request.draw_and_write", draw_and_write)
    for script in ("sample.py", "flowmatch_mnist/sample.py"):
        assert_one_line_error(run_here(script, 7, cwd=tmp_path), "no [[7]] today")


@pytest.mark.parametrize(
    "options",
    [
        ["--interpolate", 3, *["--from-image", "a:1"] * 2],
        ["--interpolate", 3, "--from-image", "a:1", "--per-class", 2],
        ["--from-image", "a:1", "--per-class", 1],
        ["--out", "DIGITS.PNG"],
    ],
)
def test_what_goes_together_is_let_through(options, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("flowmatch_mnist.sampling.request.draw_and_write", lambda options, started: asked.append(options))
    assert run_here("sample.py", 7, *options, cwd=tmp_path).returncode == 0 and len(asked) == 1


@pytest.mark.parametrize(("option", "value"), [("--pairs", 0), ("--batch-size", 0)])
def test_pairs_are_one_at_least(option, value, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(devices, "default_device", lambda: "abacus")
    monkeypatch.setattr(devices, "check_device", lambda device: None)
    monkeypatch.setattr("flowmatch_mnist.sampling.weights.load", lambda path, device: drawn.append(device) or 1 / 0)
    assert_one_line_error(run_here("flowmatch_mnist/reflow.py", option, value, cwd=tmp_path), "at least 1")
    assert not drawn
    with pytest.raises(ZeroDivisionError):
        run_here("flowmatch_mnist/reflow.py", option, 1, cwd=tmp_path)
    assert drawn == ["abacus"]
