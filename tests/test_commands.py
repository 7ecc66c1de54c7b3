"""Each option of `sample.py` and of `python -m flowmatch_mnist.reflow` reaches what acts on it."""

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_here
from test_watched import Shades

from flowmatch_mnist import sample
from flowmatch_mnist.data import reflow
from flowmatch_mnist.images import mnist
from flowmatch_mnist.sampling import request, weights
from flowmatch_mnist.sampling.generate import Flow, Sampler, Samples, draw_noise
from flowmatch_mnist.sampling.weights import PRETRAINED
from flowmatch_mnist.support import devices, streams

OWN = Sampler(4, "euler", 1.5, (0.1, 0.9))
"""The way of the model itself."""


@pytest.fixture
def asked(monkeypatch):
    """What a command asks of the functions that load, draw and read, none of which do so."""
    seen = {}

    def loaded(path, device):
        seen.update(path=path, device=device)
        return Path("a model"), Flow(Shades()), OWN

    def generated(flow, labels, sampler, **settings):
        seen.update(labels=labels.tolist(), sampler=sampler, **settings)
        settings["on_batch"](len(labels))
        images = (20 * labels).byte()[:, None, None].expand(-1, 28, 28)
        steps = torch.arange(seen.get("states", 3), dtype=torch.uint8)
        return Samples(images, labels, 8, steps[:, None, None, None].expand(-1, len(labels), 28, 28))

    def drawn(folder, flow, sampler, count, **settings):
        seen.update(folder=str(folder), sampler=sampler, count=count, **settings)
        return 2, 1

    monkeypatch.setattr(request, "load_digits", loaded)
    monkeypatch.setattr(request, "generate", generated)
    monkeypatch.setattr(request, "default_device", lambda: "the best")
    monkeypatch.setattr(mnist, "prepare", lambda folder: seen.update(data_dir=str(folder)))
    monkeypatch.setattr(mnist, "load", lambda folder, split: (torch.zeros(9, 28, 28, dtype=torch.uint8), torch.arange(9)))
    monkeypatch.setattr(weights, "load", lambda path, device: loaded(path, device)[1:])
    monkeypatch.setattr(weights, "newest_or_packaged", lambda: Path("the newest"))
    monkeypatch.setattr(reflow, "draw_pairs", drawn)
    monkeypatch.setattr(devices, "check_device", lambda device: None)
    return seen


def command(folder, script, *options):
    done = run_here(script, *options, cwd=folder)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def test_without_options_a_command_takes_the_model_as_it_is(tmp_path, asked):
    printed = command(tmp_path, "sample.py", 7)
    assert asked["path"] is None and asked["device"] == "the best" and asked["sampler"] == OWN and asked["labels"] == [7]
    assert (asked["seed"], asked["batch_size"], asked["noise"], asked["keep_states"]) == (0, None, None, False)
    assert "drew 1 digit with a model (euler, 4 steps, guidance 1.5 from t = 0.1 to 0.9, 8 evaluations each, seed 0)" in printed
    assert (tmp_path / "digits.png").is_file() and "wrote digits.png" in printed
    printed = command(tmp_path, "flowmatch_mnist/reflow.py")
    assert (asked["path"], asked["folder"], asked["count"], asked["sampler"]) == (Path("the newest"), "pairs", 20_000, OWN)
    assert (asked["seed"], asked["batch_size"]) == (0, None) and "pairs holds 5,000 pairs in 2 files, 1 of them" in printed


def test_pairs_are_drawn_without_churn(tmp_path, asked, monkeypatch):
    """New noise on the way would part a sample from the noise that it began with."""
    monkeypatch.setattr(weights, "load", lambda path, device: (Flow(Shades()), replace(OWN, churn=1.0)))
    command(tmp_path, "flowmatch_mnist/reflow.py")
    assert asked["sampler"] == OWN


WAYS = {
    "steps": (["--steps", 9], 9),
    "solver": (["--solver", "heun"], "heun"),
    "spacing": (["--spacing", "log_snr"], "log_snr"),
    "guidance": (["--guidance", 2.5], 2.5),
    "guidance_interval": (["--guidance-interval", "0.2-0.6"], (0.2, 0.6)),
    "guidance_power": (["--guidance-power", 2], 2.0),
    "churn": (["--churn", 0.5], 0.5),
}


@pytest.mark.parametrize("name", WAYS)
def test_one_thing_about_the_sampler_is_changed_at_a_time(tmp_path, asked, name):
    options, value = WAYS[name]
    of_pairs = ["flowmatch_mnist/reflow.py"] if name in ("steps", "solver", "guidance", "guidance_power") else []
    for script in ["sample.py", *of_pairs]:
        command(tmp_path, script, *([7] if script == "sample.py" else []), *options)
        assert vars(asked["sampler"]) == vars(OWN) | {name: value}


def test_what_is_drawn_how_much_by_which_model_and_where(tmp_path, asked):
    some = ["--per-class", 2, "--seed", 5, "--batch-size", 3, "--device", "abacus", "--checkpoint", "some.ckpt"]
    printed = command(tmp_path, "sample.py", "3-4", 1, *some, "--out", "new.npz")
    assert asked["labels"] == [3, 4, 1] * 2 and (asked["seed"], asked["batch_size"]) == (5, 3)
    assert (asked["device"], asked["path"]) == ("abacus", Path("some.ckpt"))
    assert "drew 6 digits" in printed and "seed 5" in printed and (tmp_path / "new.npz").is_file()
    command(tmp_path, "sample.py", 3, "--weights", "few-step", "--out", "way.gif")
    assert asked["path"] == PRETRAINED["few-step"] and asked["keep_states"]

    pairs = ["--teacher", "few-step", "--pairs", 70, "--out", "elsewhere", "--seed", 5, "--batch-size", 3, "--device", "abacus"]
    assert f"drawing with {PRETRAINED['few-step']}" in command(tmp_path, "flowmatch_mnist/reflow.py", *pairs)
    assert (asked["path"], asked["device"], asked["folder"]) == (PRETRAINED["few-step"], "abacus", "elsewhere")
    assert (asked["count"], asked["seed"], asked["batch_size"]) == (70, 5, 3)


def test_noises_go_from_one_to_another_or_are_a_pictures_own(tmp_path, asked, monkeypatch):
    command(tmp_path, "sample.py", 3, 8, "--interpolate", 4, "--per-class", 2, "--seed", 5)
    assert asked["labels"] == [3] * 4 + [8] * 4 + [3] * 4 + [8] * 4
    ends = draw_noise(8, (1, 28, 28), streams.generator("cpu", 5, "sampling"))
    torch.testing.assert_close(asked["noise"][0::4], ends[0::2])
    torch.testing.assert_close(asked["noise"][3::4], ends[1::2])

    inverted, invert = [], request.invert
    monkeypatch.setattr(request, "invert", lambda flow, x1, y: inverted.append((x1.shape, y.tolist())) or invert(flow, x1, y))
    one = ["--from-image", "test:2", "--data-dir", "there"]
    command(tmp_path, "sample.py", 3, 8, *one)
    own = asked["noise"]
    assert inverted == [((1, 1, 28, 28), [2])]
    assert asked["data_dir"] == "there" and own.shape == (2, 1, 28, 28) and torch.equal(own[0], own[1])
    command(tmp_path, "sample.py", 3, *one, "--from-image", "test:5", "--interpolate", 3)
    assert torch.equal(asked["noise"][0], own[0]) and not torch.equal(asked["noise"][-1], own[0])


def test_an_animation_has_61_frames_at_most(tmp_path, asked, monkeypatch):
    shown = []
    monkeypatch.setattr(request, "save_gif", lambda frames, path: shown.append(frames[:, 10, 10].tolist()))
    for states, frames in ((3, [0, 1, 2]), (61, [*range(61)]), (121, [*range(0, 121, 2)])):
        asked["states"] = states
        command(tmp_path, "sample.py", 3, "--out", "way.gif")
        assert shown.pop() == frames


class Terminal(io.StringIO):
    """A terminal's screen."""

    def isatty(self):
        return True


@pytest.mark.parametrize("screen", [Terminal, io.StringIO])
def test_a_terminal_shows_how_far_it_is_and_a_file_does_not(screen, tmp_path, asked, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["sample.py", "7", "--out", str(tmp_path / "digits.png")])
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", screen())
    sample.main()
    seen = sys.stderr.getvalue()
    if screen is Terminal:
        assert "drawing" in seen and "100%" in seen and seen.endswith("\x1b[2K"), "wiped away when it is done"
    else:
        assert seen == ""
    assert capsys.readouterr().out.startswith("drew 1 digit")
