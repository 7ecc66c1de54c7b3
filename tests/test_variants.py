"""Each variant from end to end, tiny: trained, stopped, resumed to the bit, and drawn; some inverted, measured and exported."""

import json

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, run_here
from test_runs import last

from flowmatch_mnist.data.curve import LENGTH, Curve
from flowmatch_mnist.data.reflow import load_pairs
from flowmatch_mnist.images import mnist
from flowmatch_mnist.sampling.units import UNITS
from flowmatch_mnist.sampling.weights import load

LAST = "runs/tiny/version_0/checkpoints/last.ckpt"
DIFFUSION = ["--model.path", "vp", "--model.prediction", "noise", "--model.sampler.solver", "euler"]
VARIANTS = {
    "logit": ["--data.pixels", "logit", "--data.dequantize", "true"],
    "ddpm": [*DIFFUSION, "--model.weighting", "ddpm", "--model.sampler.churn", 1],
    "cosine": ["--model.path", "cosine", "--model.prediction", "data", "--model.weighting", "edm", "--model.times", "Mode"],
    "huber": ["--model.loss", "huber", "--model.weighting", "sd3", "--data.coupling", "ot_within_class"],
    "mean flow": [
        "--model.loss",
        "huber",
        "--model.net.spans",
        "true",
        "--model.mean_flow.stride",
        0,
        "--model.sampler.solver",
        "average",
    ],
    "taught": ["--model.net.spans", "true", "--model.mean_flow.teacher", "few-step", "--model.mean_flow.guidance", 1.5],
    "no logger": ["--trainer.logger", "false"],
    "another logger": ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"],
    "guided": ["--model.sampler.guidance", 2, "--model.sampler.guidance_interval", "[0.2,0.8]", "--model.net.dropout", 0.2],
}


def command(folder, script, *arguments):
    done = run_here(script, *arguments, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def asked(options):
    """What a config should hold, by its dotted name."""
    return {name.removeprefix("--"): value for name, value in zip(options[::2], options[1::2], strict=True)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_from_end_to_end(tmp_path, few_digits, variant):
    options = VARIANTS[variant]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    train = ["--config", TINY, "--data.data_dir", few_digits, "--data.batch_size", 8, "--sampling.every_n_epochs", 0]
    train += ["--trainer.limit_train_batches", 4, "--evaluation.test_samples", 20, "--evaluation.steps", "[]", *options]
    command(whole, "train.py", "fit", *train)
    command(parts, "train.py", "fit", *train, "--trainer.callbacks", "test_runs.Stop", "--trainer.callbacks.step", 3)
    command(parts, "train.py", "fit", *train, "--ckpt_path", "last")
    alone, resumed = (last(folder, "runs/tiny/version_0")["state_dict"] for folder in (whole, parts))
    assert all(torch.equal(value, resumed[name]) for name, value in alone.items())

    config = yaml.safe_load((whole / "runs/tiny/version_0/config.yaml").read_text())
    for name, value in asked(options).items():
        found = config
        for key in name.split("."):
            found = found.get("init_args", found)[key] if key not in found else found[key]
        found = found["class_path"].rpartition(".")[2] if isinstance(found, dict) else found
        assert found == yaml.safe_load(str(value)), name

    flow, sampler = load(whole / LAST)
    printed = command(whole, "sample.py", "0-9", "--out", "drawn.npz")
    assert sampler.description() in printed
    drawn = np.load(whole / "drawn.npz")["images"]
    assert drawn.shape == (10, 28, 28) and drawn.std() > 0.1
    table = command(whole, "train.py", "test", "--ckpt_path", "last")
    assert f"20 samples with the labels of the test split, {sampler.description()}" in table and "label accuracy" in table
    if variant == "logit":
        real = mnist.load(few_digits, "test")[0][3].numpy().astype(int)
        there_and_back = ["--from-image", "test:3", "--solver", "rk4", "--steps", 64, "--guidance", 1, "--data-dir", few_digits]
        command(whole, "sample.py", "0", *there_and_back, "--out", "again.npz")
        assert abs(np.load(whole / "again.npz")["images"][0].astype(int) - real).mean() < 2
    if variant in ("logit", "mean flow"):
        command(whole, "flowmatch_mnist/export.py", "--weights", LAST, "--out", "digits.pt2")
        noise = torch.randn(3, *flow.net.shape)
        exported = torch.export.load(whole / "digits.pt2").module()(noise, torch.tensor([1, 2, 3]))
        *_, state = flow.states(flow.guided(torch.tensor([1, 2, 3]), sampler), noise, sampler)
        assert (exported.int() - flow.units.decode(state).int()).abs().max() <= 1


def test_reflow_of_a_teacher_with_labels_from_end_to_end(tmp_path):
    """Ten parts of a curve: teacher, pairs, student stopped and resumed. Each point has its label all the way."""
    fast = ["--sampling.every_n_epochs", 0, "--evaluation.every_n_epochs", 0, "--evaluation.test_samples", 500]
    fast += ["--trainer.check_val_every_n_epoch", 1, "--model.warmup_steps", 10, "--evaluation.samples", 100]
    teacher = ["--config", ROOT / "configs/toy_prompted.yaml", "--data.samples", 10_000, "--data.batch_size", 100]
    command(tmp_path, "train.py", "fit", *teacher, *fast, "--trainer.max_epochs", 5)
    command(tmp_path, "flowmatch_mnist/reflow.py", "--pairs", 2500, "--steps", 8, "--out", "pairs")

    pairs = load_pairs(tmp_path / "pairs", (2,), 10, "plane")
    points = UNITS["plane"].decode(pairs["x1"].float())
    meant = Curve(10).segment(points[:, 0].clamp(0, LENGTH)) == pairs["y"]
    assert set(pairs["y"].tolist()) == set(range(10)) and meant.double().mean() > 0.8

    student = ["--config", ROOT / "configs/toy_reflow.yaml", "--model.net.classes", 10, "--data.real.prompted", "true"]
    student += ["--data.pairs", "pairs", "--data.batch_size", 100, "--data.val_size", 100, *fast, "--trainer.max_epochs", 10]
    for name, stop in (("whole", []), ("parts", ["--trainer.callbacks", "test_runs.Stop", "--trainer.callbacks.step", 65])):
        command(tmp_path, "train.py", "fit", *student, "--name", name, *stop)
    command(tmp_path, "train.py", "fit", *student, "--name", "parts", "--ckpt_path", "last")
    alone, resumed = (last(tmp_path, f"runs/{name}/version_0")["state_dict"] for name in ("whole", "parts"))
    assert all(torch.equal(value, resumed[name]) for name, value in alone.items())

    table = command(tmp_path, "train.py", "test", "--ckpt_path", "runs/whole/version_0/checkpoints/last.ckpt")
    assert "500 samples with the labels of the test split" in table
    scores = json.loads((tmp_path / "runs/whole/version_0/checkpoints/metrics-last-test.json").read_text())["scores"]
    assert scores["on its segment"]["samples"]["value"] > 0.7
