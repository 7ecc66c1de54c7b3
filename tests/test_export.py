"""Exported models: what they draw is what this package draws, and they need nothing of it."""

import errno
import io
import logging
import subprocess
import sys
import types
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import assert_one_line_error, run_here
from test_commands import Terminal

from flowmatch_mnist import export as command
from flowmatch_mnist.sampling.export import export
from flowmatch_mnist.sampling.generate import Flow, Sampler, generate
from flowmatch_mnist.sampling.weights import PRETRAINED, load
from flowmatch_mnist.support.errors import UserError

ALONE = """
import sys, torch
draw = torch.export.load("digits.pt2").module()
for n in (1, 2, 5):
    given = torch.load(f"given{n}.pt")
    assert torch.equal(draw(given["noise"], given["labels"]), given["images"]), n
assert not any(name.startswith("flowmatch_mnist") for name in sys.modules)
"""


def drawn(flow, sampler, count):
    noise = torch.randn(count, 1, 28, 28)
    samples = generate(flow, torch.arange(count), sampler, noise=noise)
    return {"noise": noise, "labels": samples.labels, "images": samples.values}


def test_a_program_draws_the_same_digits_without_the_package(tiny_net, tmp_path):
    flow, sampler = Flow(tiny_net), Sampler(3, "dpmpp_2m", 1.5, guidance_interval=(0.0, 0.5), guidance_power=1)
    export(flow, sampler, tmp_path / "digits.pt2")
    for count in (1, 2, 5):
        torch.save(drawn(flow, sampler, count), tmp_path / f"given{count}.pt")
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_onnx_draws_the_same_digits(tiny_net, tmp_path):
    flow, sampler = Flow(tiny_net), Sampler(2, "euler", 1.5)
    export(flow, sampler, tmp_path / "digits.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "digits.onnx")
    for count in (1, 5):
        given = drawn(flow, sampler, count)
        (images,) = session.run(None, {"noise": given["noise"].numpy(), "labels": given["labels"].numpy()})
        assert images.dtype == np.uint8
        # A grey level may round to its neighbour, where another library adds up in another order.
        assert np.abs(images.astype(int) - given["images"].numpy().astype(int)).max() <= 1


def test_what_is_asked_of_pytorch(tiny_net, tmp_path, monkeypatch):
    asked = {}

    def exported(program, example, **settings):
        warnings.warn("chatter", stacklevel=1)
        assert not program.training and not torch.is_grad_enabled()
        assert program.net.middle.blocks[0].conv1.weight.is_contiguous(), (
            "another layout would be asked of whoever loads the file"
        )
        asked.update(shapes=[tensor.shape for tensor in example], **settings)
        return "a program"

    def written(program, **settings):
        asked.update(program=program, **settings)
        return types.SimpleNamespace(save=lambda path: path.write_text("written"))

    monkeypatch.setattr(torch.export, "export", exported)
    monkeypatch.setattr(torch.export, "save", lambda program, file: file.write(program.encode()))
    monkeypatch.setattr(torch.onnx, "export", written)
    for ending, content in (("pt2", "a program"), ("onnx", "written")):
        tiny_net.train().to(memory_format=torch.channels_last)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            export(Flow(tiny_net), Sampler(1), tmp_path / f"digits.{ending}")
        assert (tmp_path / f"digits.{ending}").read_text() == content
        noise, labels = asked["dynamic_shapes"]["noise"], asked["dynamic_shapes"]["labels"]
        assert noise == labels and noise[0].min == 1 and not asked["strict"], "any number of digits, from 1 on"
        assert asked["shapes"] == [(2, 1, 28, 28), (2,)]
    names = {"input_names": ["noise", "labels"], "output_names": ["images"], "verbose": False}
    assert {key: asked[key] for key in ("program", *names)} == {"program": "a program", **names}


def test_the_sampler_is_the_one_asked_for(tmp_path, monkeypatch):
    exported = []
    monkeypatch.setattr("flowmatch_mnist.sampling.export.export", lambda *arguments: exported.append(arguments))
    logging.getLogger("torch.onnx").setLevel(logging.NOTSET)
    asked = ["--weights", "few-step", "--out", "digits.onnx", "--solver", "heun", "--steps", 3, "--guidance", 2]
    asked += ["--guidance-power", 1.5]
    done = run_here("flowmatch_mnist/export.py", *asked, cwd=tmp_path)
    assert done.returncode == 0 and "wrote digits.onnx" in done.stdout and "heun, 3 steps, guidance 2" in done.stdout
    assert logging.getLogger("torch.onnx").level == logging.ERROR
    run_here("flowmatch_mnist/export.py", "--weights", "mnist", cwd=tmp_path)
    (chosen, changed, path), (flow, own, default) = exported
    assert chosen.net.spans and not flow.net.spans
    assert (changed.solver, changed.steps, changed.guidance, str(path)) == ("heun", 3, 2.0, "digits.onnx")
    assert changed.guidance_power == 1.5
    assert (flow.describe(own), str(default)) == (load(PRETRAINED["mnist"])[0].describe(own), "digits.pt2")


@pytest.mark.parametrize("screen", [Terminal, io.StringIO])
def test_a_terminal_shows_that_it_is_working_and_a_file_does_not(screen, monkeypatch):
    monkeypatch.setattr(command, "export", lambda *arguments: None)
    monkeypatch.setattr("sys.argv", ["export.py", "--weights", "few-step"])
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", screen())
    command.main()
    seen = sys.stderr.getvalue()
    assert ("exporting" in seen and seen.endswith("\x1b[2K")) if screen is Terminal else seen == ""


def test_what_cannot_be_exported_is_told(tmp_path):
    def told(*arguments):
        return run_here("flowmatch_mnist/export.py", *arguments, cwd=tmp_path)

    assert_one_line_error(told("--out", "digits.txt"), "digits.txt", ".pt2")
    assert_one_line_error(told("--solver", "dopri5"), "solver")
    assert_one_line_error(told("--solver", "average"), "mean velocities")
    assert_one_line_error(told("--solver", "euler", "--churn", 1), "--churn 0")
    assert_one_line_error(told("--weights", "nobody.ckpt"), "nobody.ckpt")
    assert_one_line_error(told("--steps", "few"), "--steps")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_told(tiny_net, tmp_path, monkeypatch):
    def save(program, file):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904  as PyTorch's writer does

    monkeypatch.setattr(torch.export, "export", lambda *_, **__: None)
    monkeypatch.setattr(torch.export, "save", save)
    with pytest.raises(UserError, match=r"cannot write .*digits\.pt2: No space left on device"):
        export(Flow(tiny_net), Sampler(1), tmp_path / "digits.pt2")
    assert not list(tmp_path.iterdir())
