"""The lessons before the digits, DDPM, and the toy's own data and figures."""

import re

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line_error, run_here
from PIL import Image

from flowmatch_mnist.data.curve import LENGTH, CurveDataModule, curve
from flowmatch_mnist.sampling.generate import Samples

TOYS = {"toy": "", "toy_prompted": ", on its segment 0"}


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_trains_and_draws_its_curve(name, tmp_path):
    short = ["--trainer.max_epochs", 2, "--trainer.check_val_every_n_epoch", 1]
    short += ["--sampling.every_n_epochs", 1, "--evaluation.every_n_epochs", 1]
    done = run_here("train.py", "--config", ROOT / f"configs/{name}.yaml", *short, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    figures = re.findall(r"samples, distance to the curve ([0-9.]+)" + TOYS[name], done.stdout)
    assert len(figures) == 2 and float(figures[1]) < float(figures[0])
    version = tmp_path / f"runs/{name}/version_0"
    with Image.open(version / "samples/curve-000100.png") as picture:
        assert picture.mode == "RGB" and picture.size == (1200, 400)
        assert np.asarray(picture).std() > 10

    checkpoint = version / "checkpoints/last.ckpt"
    predicted = run_here("train.py", "predict", "--ckpt_path", checkpoint, cwd=tmp_path)
    assert predicted.returncode == 0, predicted.stdout + predicted.stderr
    with np.load(version / "predictions.npz") as archive:
        assert archive["points"].shape == (200 if name == "toy" else 2000, 2)
        assert archive["labels"].max() == (0 if name == "toy" else 9)
    assert_one_line_error(run_here("sample.py", "7", "--checkpoint", checkpoint, cwd=tmp_path), "draws no digits")


def test_ddpm_trains_and_draws_by_ancestral_sampling(tmp_path, data_dir):
    tiny = ["--model.net.channels=[4,8,8]", "--model.net.blocks=[1,2,2]", "--model.compile", "false"]
    short = ["--trainer.max_steps", 4, "--trainer.val_check_interval", 4, "--trainer.limit_val_batches", 1]
    data = ["--data.data_dir", data_dir, "--data.batch_size", 16]
    done = run_here("train.py", "--config", ROOT / "configs/ddpm.yaml", *tiny, *short, *data, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    drawn = run_here("sample.py", "7", cwd=tmp_path)
    assert "euler, 1000 steps, guidance 1, churn 1, 1000 evaluations each" in drawn.stdout, drawn.stderr
    ddim = run_here("sample.py", "7", "--churn", 0, "--steps", 10, "--out", "ddim.gif", cwd=tmp_path)
    assert "euler, 10 steps, guidance 1, 10 evaluations each" in ddim.stdout, ddim.stderr


def measure(data, points, labels):
    score = data.problem.scorer(data.real("val"), data.real("train"), torch.device("cpu"))
    measurements = score(Samples(points, labels, 0))
    assert {m.name: m.baseline for m in measurements} == {"distance to the curve": 0, "on its segment": 1}
    return {m.name: m.value for m in measurements}


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
    assert measure(data, top, torch.tensor([1])) == pytest.approx(
        {"distance to the curve": 0.3, "on its segment": 1.0}, abs=1e-3
    )


def test_the_network_sees_standard_noise_and_the_picture_the_plane():
    data = CurveDataModule(samples=1000)
    data.setup("fit")
    x0, x1, y = data.on_after_batch_transfer((curve(torch.tensor([LENGTH])), torch.tensor([0])), 0)
    assert x0.shape == x1.shape == (1, 2) and y.tolist() == [0]
    torch.testing.assert_close(data.problem.units.decode(x1), curve(torch.tensor([LENGTH])))
    torch.testing.assert_close(x1[0, 0], torch.tensor(LENGTH / 2))


def test_a_network_for_other_data_is_refused(tmp_path):
    done = run_here("train.py", "--config", ROOT / "configs/toy.yaml", "--data.prompted", "true", cwd=tmp_path)
    assert_one_line_error(done, "MLP is for 1 classes", "CurveDataModule has 10")
