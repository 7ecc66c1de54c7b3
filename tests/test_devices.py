"""Every command on a device that is not here, held to the rules of CUDA and of MPS; see `stand_in.py`."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

from flowmatch_mnist.support.choices import SOLVERS

LAST = "runs/tiny/version_0/checkpoints/last.ckpt"
SMALL = ["--trainer.limit_val_batches", 1, "--trainer.limit_test_batches", 1, "--evaluation.samples", 20]
SHORT = ["--trainer.max_steps", 2, "--sampling.rows", 1, "--evaluation.every_n_epochs", 0, *SMALL]


def commands(data_dir):
    """All that a person does with a device: what each is called, and its words."""
    data = ["--data.data_dir", data_dir]
    fit = ["train.py", "fit", "--config", TINY, "--trainer.precision", "32-true"]
    pairs = ["--data", "ReflowDataModule", "--data.pairs", "pairs", "--data.real", "MNISTDataModule", "--data.val_size", 100]
    spans = ["--model.net.spans", "true", "--model.sampler.solver", "average", "--model.mean_flow.teacher", LAST]
    guided = ["--model.mean_flow.guidance", 1.5, "--model.loss", "huber"]
    weighted = ["--model.times", "Mode", "--model.weighting", "sd3", "--model.on_non_finite", "skip"]
    logit = ["--data.pixels", "logit", "--data.dequantize", "true", "--data.coupling", "ot_within_class"]
    found = {
        "fit": [
            *fit,
            *data,
            *SMALL,
            "--trainer.callbacks+=stand_in.Steps",
            "--evaluation.every_n_epochs",
            1,
            "--ema.decay",
            0.9,
        ],
        "resume": ["train.py", "--ckpt_path", "last", "--trainer.max_epochs", 3, *SMALL],
        "validate": ["train.py", "validate", "--ckpt_path", "last", *SMALL],
        "test": ["train.py", "test", "--ckpt_path", "last", *SMALL],
        "predict": ["train.py", "predict", "--ckpt_path", "last"],
        "weighting": [*fit, *data, *SHORT, *weighted, "--name", "weighted"],
        "logit": [*fit, *data, *SHORT, *logit, "--model.path", "vp", "--model.prediction", "noise", "--name", "logit"],
        "muon": [*fit, *data, *SHORT, "--model.optimizer", "flowmatch_mnist.training.muon.Muon", "--name", "muon"],
        "mean flow": [*fit, *data, *SHORT, *spans, *guided, "--name", "mean"],
        "pairs": ["flowmatch_mnist/reflow.py", "--teacher", LAST, "--pairs", 2500, "--steps", 1, "--out", "pairs"],
        "reflow": [*fit, *SHORT, *pairs, "--data.real.data_dir", data_dir, "--name", "reflow"],
        "likelihood": [
            "benchmarks/likelihood.py",
            "--checkpoint",
            LAST,
            "--images",
            2,
            "--steps",
            2,
            "--solver",
            "rk4",
            "--data-dir",
            data_dir,
        ],
        "churn": ["sample.py", "3-5", "--checkpoint", LAST, "--solver", "euler", "--churn", 0.5, "--guidance", 2],
        "gif": ["sample.py", "3", "--checkpoint", LAST, "--out", "three.gif"],
        "image": ["sample.py", "3", "--checkpoint", LAST, "--from-image", "test:0", "--data-dir", data_dir],
    }
    for solver in SOLVERS:
        weights = ["--checkpoint", "runs/mean/version_0/checkpoints/last.ckpt" if solver == "average" else LAST]
        found[solver] = ["sample.py", "0-9", *weights, "--solver", solver, "--steps", 3]
    return found


@pytest.mark.parametrize("rules", ["cuda", "mps"])
def test_every_command_keeps_the_rules_of_the_device(rules, tmp_path, data_dir):
    asked = commands(data_dir)
    del asked["test" if rules == "mps" else "validate"]  # which differ in the split, and each takes a while
    words = json.dumps([list(map(str, command)) for command in asked.values()])
    command = [sys.executable, ROOT / "tests/stand_in.py", rules, words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["statuses"] == [0] * len(asked), (dict(zip(asked, found["statuses"], strict=True)), done.stderr[-3000:])
    assert not found["faults"]
    # Every other step of the tiny config is logged. A step that is not makes the host wait for nothing.
    steps = {int(step): sum(counts.values()) for step, counts in found["waits"].items()}
    assert not {step: found["waits"][str(step)] for step in steps if step % 2}
    assert {2, 4} <= set(steps) and max(steps[2], steps[4]) <= 8
