"""Every command on a device that is not here, held to the rules of CUDA and of MPS; see `stand_in.py`."""

import ast
import json
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from unittest import mock

import pytest
import torch
import yaml
from conftest import ROOT, TINY, run, run_here
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision

from flowmatch_mnist import load
from flowmatch_mnist.data.curve import CurveDataModule
from flowmatch_mnist.flow.meanflow import derivative
from flowmatch_mnist.images.pictures import save_png
from flowmatch_mnist.networks.mlp import MLP
from flowmatch_mnist.sampling.generate import Flow, Sampler
from flowmatch_mnist.sampling.likelihood import log_likelihood
from flowmatch_mnist.support.choices import SOLVERS
from flowmatch_mnist.support.devices import full_float32, send, widest_float
from flowmatch_mnist.support.files import load_checkpoint, save_checkpoint, save_json, save_weights
from flowmatch_mnist.training.gradients import GradientWatch
from flowmatch_mnist.training.module import FlowMatching

LAST = "runs/tiny/version_0/checkpoints/last.ckpt"
SMALL = ["--trainer.limit_val_batches", 1, "--trainer.limit_test_batches", 1, "--evaluation.samples", 20]
SHORT = ["--trainer.max_steps", 2, "--sampling.rows", 1, "--evaluation.every_n_epochs", 0, *SMALL]


def commands(data_dir):
    """All that a person does with a device: what each is called, and its words."""
    data = ["--data.data_dir", data_dir]
    fit = ["train.py", "fit", "--config", TINY, "--trainer.precision", "32-true"]
    watched = ["--trainer.max_epochs", 1, "--evaluation.every_n_epochs", 1, "--trainer.callbacks+=stand_in.Steps"]
    pairs = ["--data", "ReflowDataModule", "--data.pairs", "pairs", "--data.real", "MNISTDataModule", "--data.val_size", 100]
    spans = ["--model.net.spans", "true", "--model.sampler.solver", "average", "--model.mean_flow.teacher", LAST]
    guided = ["--model.mean_flow.guidance", 1.5, "--model.loss", "huber"]
    matching = ["--model.net.spans", "true", "--model.sampler", "{steps: 1, solver: average}", "--model.start", LAST]
    matching += ["--model.matching.teacher", LAST, "--model.matching.guidance", 1.5, "--model.matching.pairs", 0.25]
    matching += ["--model.matching.pairs_first", 1]
    others = ["--model.path", "vp", "--model.prediction", "noise", "--model.times", "Mode", "--model.weighting", "sd3"]
    others += ["--data.pixels", "logit", "--data.dequantize", "true", "--data.coupling", "ot_within_class"]
    others += ["--model.on_non_finite", "skip", "--model.optimizer", "flowmatch_mnist.training.muon.Muon", "--name", "others"]
    few = ["--images", 2, "--steps", 1, "--solver", "heun"]
    found = {
        "fit": [*fit, *data, *SMALL, *watched],
        "resume": ["train.py", "--ckpt_path", "last", "--trainer.max_epochs", 2, *SMALL],
        "validate": ["train.py", "validate", "--ckpt_path", "last", *SMALL],
        "test": ["train.py", "test", "--ckpt_path", "last", *SMALL],
        "predict": ["train.py", "predict", "--ckpt_path", "last"],
        "others": [*fit, *data, *SHORT, *others],
        "mean flow": [*fit, *data, *SHORT, *spans, *guided, "--name", "mean"],
        "matching": [*fit, *data, *SHORT, *matching, "--name", "matching"],
        "pairs": ["flowmatch_mnist/reflow.py", "--teacher", LAST, "--pairs", 2500, "--steps", 1, "--out", "pairs"],
        "reflow": [*fit, *SHORT, *pairs, "--data.real.data_dir", data_dir, "--name", "reflow"],
        "likelihood": ["benchmarks/likelihood.py", "--checkpoint", LAST, *few, "--data-dir", data_dir],
        "churn": ["sample.py", "3-5", "--checkpoint", LAST, "--solver", "euler", "--churn", 0.5, "--guidance", 2],
        "gif": ["sample.py", "3", "--checkpoint", LAST, "--out", "three.gif"],
        "image": ["sample.py", "3", "--checkpoint", LAST, "--from-image", "test:0", "--data-dir", data_dir],
    }
    found["many steps"] = ["sample.py", "0-9", "--checkpoint", LAST, "--solver", "euler", "--steps", 12]
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
    waited = dict(zip(asked, found["waited"], strict=True))
    assert waited["many steps"] == waited["euler"], "a step of a solver waits for nothing either"
    assert {2, 4} <= set(steps) and max(steps[2], steps[4]) <= 8


def line(scaler):
    """The smallest training with fp16's scaler: the module after it, and the trainer."""
    module = FlowMatching(MLP(classes=1, width=8, layers=1), warmup_steps=0, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    trainer = Trainer(
        accelerator="cpu",
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        logger=False,
        max_steps=6,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, CurveDataModule(samples=100, batch_size=10))
    return module, trainer


def test_an_overflow_of_fp16_lowers_the_scale_and_does_not_end_the_run():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, backoff_factor=2.0**-120)
    module, trainer = line(scaler)
    assert trainer.global_step == 6 and scaler.get_scale() == 2.0**7
    assert all(p.isfinite().all() for p in module.parameters()) and module.net.last.weight.abs().max() > 0
    watch = GradientWatch("stop")
    infinite, finite = torch.tensor(torch.inf), torch.tensor(1.0)
    watch.check(1, infinite, finite, [], logged=True, scaled=True)
    with pytest.raises(FloatingPointError, match="step 2 is not finite: loss inf"):
        watch.check(2, infinite, infinite, [], logged=True, scaled=True)


def test_on_a_gpu_the_first_step_that_is_not_finite_is_read_when_it_is_logged_or_kept():
    watch = GradientWatch("stop")
    values = [torch.tensor(value, device="cpu") for value in (1.0, torch.nan, 2.0, torch.inf)]
    with mock.patch.object(watch, "require_finite"):  # as a GPU would have it, where no step is read at once
        for step, norm in enumerate(values, start=1):
            watch.check(step, norm, torch.tensor(0.5), [], logged=False, scaled=False)
    with pytest.raises(FloatingPointError, match=r"step 2 is not finite: loss 0.5, norm of the gradients nan"):
        watch.require_finite()
    module = FlowMatching(MLP(classes=1, width=8, layers=1))
    module.gradients = watch
    with pytest.raises(FloatingPointError, match="step 2"):  # in each checkpoint, whoever saves it
        module.on_save_checkpoint({})


def test_likelihood_and_the_derivative_of_mean_flow_are_in_full_float32():
    seen = []

    class Net(MLP):
        def forward(self, *arguments):
            seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
            return super().forward(*arguments)

    net, x = Net(spans=True), torch.randn(3, 2)
    t, y = torch.rand(3), torch.zeros(3, dtype=torch.int64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        derivative(net, x, t, y, torch.ones(3), x)
        log_likelihood(Flow(net), x, y, Sampler(1, "euler"))
        assert set(seen) == {("highest", False)}
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
        with pytest.raises(ZeroDivisionError), full_float32():
            _ = 1 / 0
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_apples_gpus_have_no_float64():
    assert widest_float(torch.device("mps")) == torch.float32
    assert widest_float(torch.device("cpu")) == widest_float(torch.device("cuda")) == torch.float64


def test_workers_that_are_not_forked_cut_the_same_batches():
    """As on macOS and Windows, and on Linux with Python 3.14: what a worker gets must pickle."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        data = CurveDataModule(samples=100, batch_size=10, num_workers=1)
        data.setup("fit")
        shares = [[batch[0] for batch in data.train_dataloader()]]
        data.num_workers = 0
        shares.append([batch[0] for batch in data.train_dataloader()])
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert all(torch.equal(a, b) for a, b in zip(*shares, strict=True))


def test_one_device_is_used_unless_more_are_asked_for(tmp_path):
    for config in sorted((ROOT / "configs").glob("*.yaml")):
        done = run_here("train.py", "--config", config, "--print_config", cwd=tmp_path)
        assert yaml.safe_load(done.stdout)["trainer"]["devices"] == 1, config


def test_without_a_compiler_the_run_goes_on_uncompiled_and_says_so_in_one_line(tmp_path, data_dir):
    asked = ("--config", TINY, "--data.data_dir", data_dir, "--trainer.max_epochs", 1, "--model.compile", "true")
    nowhere = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run("train.py", *asked, cwd=tmp_path, **nowhere)
    assert done.returncode == 0, done.stderr
    (said,) = done.stderr.splitlines()
    assert said.startswith("training without torch.compile") and "/nonexistent" in said
    assert run_here("sample.py", 7, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(("asked", "mode"), [("true", None), ("reduce-overhead", "reduce-overhead"), ("false", "never")])
def test_the_way_of_compiling_is_the_one_asked_for(asked, mode, tmp_path, monkeypatch):
    modes = []
    monkeypatch.setattr(MLP, "compile", lambda net, mode="unnamed": modes.append(mode))
    toy = ("--config", ROOT / "configs/toy.yaml", "--trainer.max_steps", 1, "--data.samples", 1000)
    quiet = ("--evaluation.every_n_epochs", 0, "--sampling.every_n_epochs", 0)
    done = run_here("train.py", *toy, *quiet, "--model.compile", asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert modes == ([] if mode == "never" else [mode])


def test_a_teacher_is_compiled_with_its_student(tmp_path, monkeypatch):
    toy = ("--config", ROOT / "configs/toy.yaml", "--trainer.max_steps", 1, "--data.samples", 1000)
    quiet = ("--evaluation.every_n_epochs", 0, "--sampling.every_n_epochs", 0)
    assert run_here("train.py", *toy, *quiet, cwd=tmp_path).returncode == 0
    compiled = []
    monkeypatch.setattr(MLP, "compile", lambda net, mode: compiled.append(net.spans))
    teacher = tmp_path / "runs/toy/version_0/checkpoints/last.ckpt"
    taught = ("--model.net.spans", "true", "--model.mean_flow.teacher", teacher, "--model.compile", "true", "--name", "taught")
    done = run_here("train.py", *toy, *quiet, *taught, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert compiled == [True, False]


def test_two_processes_train_compiled_and_the_names_of_the_weights_stay(tmp_path):
    toy = ("--config", ROOT / "configs/toy.yaml", "--model.compile", "true", "--trainer.max_epochs", 1, "--data.samples", 4000)
    two = ("--trainer.devices", 2, "--trainer.strategy", "ddp", "--evaluation.every_n_epochs", 0)
    done = run("train.py", *toy, *two, cwd=tmp_path)
    assert done.returncode == 0 and "without torch.compile" not in done.stderr, done.stderr
    assert "2 processes take 1000 samples each, 2000 a step" in done.stdout and "--data.batch_size 500" in done.stdout
    path = tmp_path / "runs/toy/version_0/checkpoints/last.ckpt"
    checkpoint, names = load_checkpoint(path), [f"net.{name}" for name in MLP().state_dict()]
    assert list(checkpoint["state_dict"]) == list(checkpoint["current_model_state"]) == names
    assert load(path)[0].net.no_label == 1


@pytest.mark.parametrize(("device", "waits"), [("cuda", False), ("cpu", False), ("mps", True), ("xpu", True)])
def test_only_a_gpu_that_copies_a_tensor_first_is_sent_one_without_waiting(device, waits):
    tensor = mock.Mock()
    assert send(tensor, torch.device(device)) is tensor.to.return_value
    tensor.to.assert_called_once_with(torch.device(device), non_blocking=not waits)


def test_files_are_flushed_as_windows_demands(tmp_path, monkeypatch):
    """There, a file that is open to be read cannot be flushed."""
    flush, flushed = os.fsync, []

    def strict(number):
        flushed.append(number)
        os.write(number, b"")  # fails on a file that is open to be read
        flush(number)

    monkeypatch.setattr(os, "fsync", strict)
    save_json(tmp_path / "a.json", {"word": "Kynkäänniemi"})
    save_checkpoint(tmp_path / "b.ckpt", {"weights": torch.zeros(2)})
    save_weights(tmp_path / "c.safetensors", {"weights": torch.zeros(2)}, {})
    save_png(torch.zeros(4, 4, dtype=torch.uint8), tmp_path / "d.png")
    assert len(flushed) == 4 and "Kynkäänniemi" in (tmp_path / "a.json").read_text(encoding="utf-8")


TEXT = ("read_text", "write_text", "open")


def test_texts_name_their_encoding():
    for path in (ROOT / "flowmatch_mnist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TEXT:
                binary = any(isinstance(word, ast.Constant) and "b" in str(word.value) for word in node.args)
                image = isinstance(node.func.value, ast.Name) and node.func.value.id in ("Image", "tarfile")
                assert binary or image or any(word.arg == "encoding" for word in node.keywords), f"{path.name}:{node.lineno}"


ASSUMPTIONS = {
    "data/curve.py": {"numpy": 6},  # samples are on the CPU when they are drawn and measured
    "data/reflow.py": {"tolist": 1},  # numbers made on the CPU
    "evaluation/estimates.py": {"item": 2, "tolist": 1},  # features and distances are brought to the CPU
    "evaluation/evaluator.py": {"item": 1, "tolist": 2, "double": 1, "numpy": 1},
    "evaluation/metrics.py": {"item": 2, "double": 1},
    "flow/couplings.py": {"numpy": 1},  # SciPy assigns on the CPU; a GPU is waited for, once a batch
    "flow/exact.py": {"tolist": 1, "type": 1, "nonzero": 1},  # when it is made; class by class on a processor alone
    "flow/guidance.py": {"item": 1},  # of a time on the CPU
    "flow/loss.py": {"nonzero": 1},  # of times on the CPU
    "flow/meanflow.py": {"type": 1},  # autocast wants the device's name
    "flow/solvers.py": {"float64": 2, "tolist": 2},  # times on the CPU; one check for a solve
    "flow/weighting.py": {"tolist": 1},  # once, on the CPU
    "images/pictures.py": {"numpy": 4},
    "images/strokes.py": {"float64": 5, "nonzero": 2},  # pictures, on the CPU
    "images/pixels.py": {"double": 1},  # images are on the CPU when they are dequantised for likelihoods
    "sampling/generate.py": {"tolist": 1},  # times on the CPU
    "sampling/likelihood.py": {"double": 1},  # on the CPU
    "sampling/weights.py": {"tolist": 1},
    "support/devices.py": {"float64": 1, "type": 6, "non_blocking": 1},
    "support/files.py": {"numpy": 1},  # on the CPU
    "training/cli.py": {"type": 1},  # said when a run begins
    "training/config.py": {"type": 2},  # said when a run begins
    "training/console.py": {"item": 1},  # in a logged step
    "training/evaluation.py": {"item": 1, "tolist": 1},
    "training/gradients.py": {"item": 3, "tolist": 1, "type": 1},  # to skip a step; in a logged step
    "training/muon.py": {"type": 1},  # few operations for a processor, few launches for a GPU
    "training/module.py": {"tolist": 2, "type": 1, "nonzero": 1},  # on the CPU; in a logged step; generators to seed
    "training/saving.py": {"item": 1},  # in a logged step, with several processes
    "training/tensorboard.py": {"numpy": 1},  # pictures are on the CPU
}
"""Where the code assumes a dtype that not every device has, reads a value from a tensor, asks what device it is on, or
copies without waiting."""


def test_every_assumption_on_dtype_and_device_is_listed():
    words = ("float64", "double", "numpy", "item", "tolist", "nonzero", "type")
    for path in sorted((ROOT / "flowmatch_mnist").rglob("*.py")):
        name = path.relative_to(ROOT / "flowmatch_mnist").as_posix()
        found = Counter()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "non_blocking":
                found[node.arg] += 1
            if isinstance(node, ast.Attribute) and node.attr in words:
                torch_device = node.attr != "type" or "device" in ast.unparse(node.value) or ast.unparse(node.value) == "found"
                found[node.attr] += torch_device
        assert +found == ASSUMPTIONS.get(name, {}), f"{name}: is it right on a GPU, and on a Mac?"
