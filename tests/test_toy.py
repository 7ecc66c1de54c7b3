"""The lessons before the digits, DDPM, and the toy's own data and scores."""

import json
import math
import re

import matplotlib.figure
import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line_error, run_here
from PIL import Image

from flowmatch_mnist import draw, load
from flowmatch_mnist.data.curve import LENGTH, Curve, CurveDataModule, curve
from flowmatch_mnist.networks.mlp import MLP
from flowmatch_mnist.sampling.generate import Flow, Sampler, Samples, draw_noise
from flowmatch_mnist.sampling.units import UNITS, Plane
from flowmatch_mnist.sampling.weights import DESCRIPTION_KEY, save
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.support.files import save_weights

TOYS = {"toy": "", "toy_prompted": ", on its segment 0"}


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_trains_and_draws_its_curve(name, tmp_path):
    short = ["--trainer.max_epochs", 2, "--trainer.check_val_every_n_epoch", 1]
    short += ["--sampling.every_n_epochs", 1, "--evaluation.every_n_epochs", 1]
    done = run_here("train.py", "--config", ROOT / f"configs/{name}.yaml", *short, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    distances = re.findall(r"samples, distance to the curve ([0-9.]+) ± [0-9.]+" + TOYS[name], done.stdout)
    assert len(distances) == 2 and float(distances[1]) < float(distances[0])
    version = tmp_path / f"runs/{name}/version_0"
    with Image.open(version / "samples/curve-000100.png") as picture:
        assert picture.mode == "RGB" and picture.size == (1200, 400)
        assert np.asarray(picture).std() > 10

    checkpoint = version / "checkpoints/last.ckpt"
    assert load(checkpoint)[0].units is UNITS["plane"]
    points = draw([*range(load(checkpoint)[0].net.no_label)] * 50, checkpoint)
    assert 8 < points.values[:, 0].max() - points.values[:, 0].min() < 20, "the curve is 4 pi long"
    predicted = run_here("train.py", "predict", "--ckpt_path", checkpoint, cwd=tmp_path)
    assert predicted.returncode == 0, predicted.stdout + predicted.stderr
    with np.load(version / "predictions.npz") as archive:
        assert archive["points"].shape == (200 if name == "toy" else 2000, 2)
        assert 8 < np.ptp(archive["points"][:, 0]) < 20
        assert archive["labels"].max() == (0 if name == "toy" else 9)
    assert_one_line_error(run_here("sample.py", "7", "--checkpoint", checkpoint, cwd=tmp_path), "draws no digits")


def test_points_come_out_in_the_units_of_the_plane_also_of_older_files(tmp_path):
    net = MLP()
    for parameter in net.last.parameters():
        torch.nn.init.zeros_(parameter)  # the zero field: what comes out is the noise
    noise = draw_noise(4, (2,), streams.generator("cpu", 3, "sampling"))
    flow, sampler = Flow(net, units=UNITS["plane"]), Sampler(1)
    save(tmp_path / "new.safetensors", flow, sampler, {})
    older = {key: value for key, value in flow.describe(sampler).items() if key != "units"} | {"pixels": "linear"}
    save_weights(tmp_path / "old.safetensors", net.state_dict(), {DESCRIPTION_KEY: json.dumps(older)})
    for name in ("new", "old"):
        points = draw([0] * 4, tmp_path / f"{name}.safetensors", seed=3)
        torch.testing.assert_close(points.values, 2 * noise)
    wrong = flow.describe(sampler) | {"units": "linear"}
    save_weights(tmp_path / "wrong.safetensors", net.state_dict(), {DESCRIPTION_KEY: json.dumps(wrong)})
    with pytest.raises(UserError, match="do not fit"):
        draw([0], tmp_path / "wrong.safetensors")


def test_ddpm_trains_and_draws_by_ancestral_sampling(tmp_path, few_digits):
    tiny = ["--model.net.channels=[4,8,8]", "--model.net.blocks=[1,2,2]", "--model.compile", "false"]
    short = ["--trainer.max_steps", 4, "--trainer.val_check_interval", 4, "--trainer.limit_val_batches", 1]
    data = ["--data.data_dir", few_digits, "--data.batch_size", 16, "--data.val_size", 100]
    done = run_here("train.py", "--config", ROOT / "configs/ddpm.yaml", *tiny, *short, *data, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    drawn = run_here("sample.py", "7", cwd=tmp_path)
    assert "euler, 1000 steps, guidance 1, churn 1, 1000 evaluations each" in drawn.stdout, drawn.stderr
    ddim = run_here("sample.py", "7", "--churn", 0, "--steps", 10, "--out", "ddim.gif", cwd=tmp_path)
    assert "euler, 10 steps, guidance 1, 10 evaluations each" in ddim.stdout, ddim.stderr


def measure(data, points, labels):
    score = data.problem.scorer(data.real("val"), data.real("train"), torch.device("cpu"))
    measurements = score(Samples(points, labels, 0))
    assert {m.name: m.real for m in measurements} == {"distance to the curve": (0, 0), "on its segment": (1, 0)}
    return {m.name: m.samples.value for m in measurements}


def test_points_lie_on_their_segment_of_the_curve():
    data = CurveDataModule(prompted=True, samples=2000)
    data.setup("fit")
    points, labels = data.splits["train"]
    torch.testing.assert_close(points[:, 1], points[:, 0].sin())
    assert torch.equal(labels, (points[:, 0] / (0.4 * torch.pi)).long()) and labels.bincount().min() > 150
    assert measure(data, points, labels) == pytest.approx({"distance to the curve": 0, "on its segment": 1}, abs=5e-3)
    assert measure(data, points, (labels + 1) % 10)["on its segment"] < 0.005
    # Moved along the normal where the curve is level.
    top = curve(torch.tensor([torch.pi / 2])) + torch.tensor([0.0, 0.3])
    assert measure(data, top.expand(2, 2), torch.tensor([1, 1])) == pytest.approx(
        {"distance to the curve": 0.3, "on its segment": 1.0}, abs=1e-3
    )


def test_the_curve_ends_at_4_pi_and_is_cut_into_equal_parts():
    assert pytest.approx(4 * math.pi) == LENGTH
    ends = torch.tensor([0.0, LENGTH / 2 - 0.01, LENGTH / 2 + 0.01, LENGTH])
    for classes, parts in ((1, [0, 0, 0, 0]), (2, [0, 0, 1, 1]), (10, [0, 4, 5, 9])):
        assert Curve(classes).segment(ends).tolist() == parts
    data = CurveDataModule(samples=1000)
    data.setup("fit")
    points = [data.splits[split][0] for split in ("train", "val", "test")]
    assert [len(some) for some in points] == [1000, 100, 100]
    for some in points:
        assert 0 <= some[:, 0].min() < 0.5 and LENGTH - 0.5 < some[:, 0].max() <= LENGTH
    assert [len(data.splits[split]) for split in ("train", "val", "test")] == [2, 3, 3]


@pytest.mark.parametrize("classes", [1, 2])
def test_each_point_is_scored_by_the_curve_and_where_there_are_several_by_its_segment(classes):
    problem = Curve(classes)
    far = curve(torch.tensor([0.5, LENGTH]))
    measured = {m.name: m for m in problem.measure(Samples(far, torch.tensor([0, 0]), 0))}
    assert measured["distance to the curve"].samples.value < 5e-3 and measured["distance to the curve"].real == (0, 0)
    assert set(measured) == {"distance to the curve", *["on its segment"][: classes - 1]}
    if classes > 1:
        assert measured["on its segment"].samples.value == 0.5 and measured["on its segment"].real == (1, 0)


@pytest.mark.parametrize("classes", [1, 2])
def test_the_picture_shows_noise_target_samples_and_the_ways_of_some(classes, monkeypatch):
    drawn, make = [], matplotlib.figure.Figure.subplots
    monkeypatch.setattr(matplotlib.figure.Figure, "subplots", lambda *a, **s: drawn.append(make(*a, **s)) or drawn[-1])
    states = torch.randn(4, 400, 2)
    labels = torch.arange(400) % classes
    Curve(classes).pictures(Samples(states[-1], labels, 3, states))
    left, right = drawn.pop()
    assert left.get_title() == "from noise to the curve" and right.get_title() == "trajectories"
    assert {text.get_text() for text in left.get_legend().get_texts()} == {"target", "noise", "samples"}
    noise, samples = left.collections
    (ends,) = right.collections
    np.testing.assert_allclose(noise.get_offsets(), states[0])
    for some in (samples, ends):
        np.testing.assert_allclose(some.get_offsets(), states[-1])
        assert (
            len(np.unique(some.get_facecolors(), axis=0)) == 1 if classes == 1 else some.get_array().tolist() == labels.tolist()
        )
    for axes, ways in ((left, []), (right, torch.linspace(0, 399, 150).long())):
        target, *lines = axes.lines
        np.testing.assert_allclose(np.array(target.get_data()).T[[0, -1]], curve(torch.tensor([0, LENGTH])), atol=1e-6)
        assert len(lines) == len(ways) and axes.get_aspect() == 1
        for line, point in zip(lines, ways, strict=True):
            np.testing.assert_allclose(np.array(line.get_data()).T, states[:, point])
    Curve(classes).pictures(Samples(states[-1, :7], labels[:7], 3, states[:, :7]))
    assert len(drawn.pop()[1].lines) == 8, "of few points, each one's way"
    Curve(classes).pictures(Samples(states[-1], labels, 3))
    left, right = drawn.pop()
    assert len(left.collections) == 1 and len(right.lines) == 1, "without states, no noise and no ways"


def test_the_network_sees_standard_noise_and_the_picture_the_plane():
    data = CurveDataModule(samples=1000)
    data.setup("fit")
    x0, x1, y = data.on_after_batch_transfer((curve(torch.tensor([LENGTH])), torch.tensor([0])), 0)
    assert x0.shape == x1.shape == (1, 2) and y.tolist() == [0]
    torch.testing.assert_close(data.problem.units.decode(x1), curve(torch.tensor([LENGTH])))
    torch.testing.assert_close(x1[0, 0], torch.tensor(LENGTH / 2))


def test_the_plane_is_shrunk_by_its_scale():
    points = torch.tensor([[4.0, -8.0]])
    for units, scale in ((UNITS["plane"], 2), (Plane("plane", scale=4.0), 4)):
        assert units.name == "plane" and torch.equal(units.encode(points), points / scale)
        assert torch.equal(units.decode(units.encode(points)), points)
    assert Plane("linear").name == "linear"


def test_a_network_for_other_data_is_refused(tmp_path):
    done = run_here("train.py", "--config", ROOT / "configs/toy.yaml", "--data.prompted", "true", cwd=tmp_path)
    assert_one_line_error(done, "MLP is for 1 classes", "CurveDataModule has 10")
