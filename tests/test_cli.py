"""`train.py` as a person runs it: what it writes, how it goes on, and what it says of mistakes."""

import importlib
import inspect
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, Evil, assert_one_line_error, run, run_here, unix
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowmatch_mnist.sampling.weights import DESCRIPTION_KEY, load
from flowmatch_mnist.support.files import load_checkpoint, save_checkpoint
from flowmatch_mnist.training import cli
from flowmatch_mnist.training.arguments import with_current_class_paths


def events(version: Path) -> EventAccumulator:
    return EventAccumulator(str(version), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def test_a_run_leaves_config_checkpoints_pictures_and_events(tiny_run):
    version = tiny_run / "runs" / "tiny" / "version_0"
    assert sorted(path.name for path in (version / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    config = yaml.safe_load((version / "config.yaml").read_text())
    assert config["model"]["optimizer"]["init_args"]["lr"] == 2e-3 and config["trainer"]["precision"] is not None
    for step in ("000006", "000012"):
        with Image.open(version / "samples" / f"grid-{step}.png") as grid:
            assert grid.size == (10 * 30 * 4, 2 * 30 * 4), "one column for each digit, two rows"
        with Image.open(version / "samples" / f"trajectory-{step}.png") as strip:
            assert strip.size == (3 * 30 * 4, 10 * 30 * 4), "one row for each digit, from noise to digit in two steps"
    log = events(version)
    scalars = {
        "loss/train",
        "loss/val",
        "optimizer/learning_rate",
        "optimizer/gradient_norm",
        "speed/samples_per_second",
    }
    assert scalars < set(log.Tags()["scalars"])
    assert len([tag for tag in log.Tags()["scalars"] if tag.startswith("loss_by_time/val")]) == 5
    assert set(log.Tags()["images"]) == {"samples/grid", "samples/trajectory"}
    assert "config/text_summary" in log.Tags()["tensors"]
    assert "lr: 0.002" in log.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def test_what_it_prints_is_few_lines(tiny_run):
    lines = (tiny_run / "stdout").read_text().splitlines()
    assert lines[0].startswith("training UNet (0.04 M parameters) on 1 x ") and lines[0].endswith("runs/tiny/version_0")
    assert lines[1] == "watch it with `tensorboard --logdir runs`; pictures go to runs/tiny/version_0/samples"
    assert [line for line in lines if line.startswith("epoch 2, step 12: train loss")]
    assert lines[-4:] == [
        "done; the files are in runs/tiny/version_0; runs/tiny/version_0/samples/learning.gif shows how it learned; next:",
        "  python sample.py 0-9 --per-class 10",
        "  python train.py test --ckpt_path last",
        "  tensorboard --logdir runs",
    ]
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", "".join(lines)), "no bar leaves its marks in a file"
    with Image.open(tiny_run / "runs/tiny/version_0/samples/learning.gif") as film:
        assert film.n_frames == 2 and film.size == (1200, 240)
    assert (tiny_run / "stderr").read_text() == ""


def test_a_second_run_leaves_the_first_as_it_is_and_options_override_the_config(tiny_run, data_dir, tmp_path):
    shutil.copytree(tiny_run / "runs", tmp_path / "runs")
    before = (tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt").read_bytes()
    arguments = [
        "--config",
        TINY,
        "--data.data_dir",
        data_dir,
        "--model.optimizer.lr",
        "1e-4",
        "--trainer.max_epochs",
        1,
    ]
    arguments += ["--evaluation.every_n_epochs", 1, "--evaluation.samples", 20]
    done = run_here("train.py", "fit", *arguments, "--model.net.channels", "[4,4,4]", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scores = r"label accuracy 0\.\d+ ± [\d.]+, Frechet distance ratio [\d.]+ ± [\d.]+, precision"
    assert re.search(f"step 6: 20 samples, {scores}", done.stdout)
    log = events(tmp_path / "runs/tiny/version_1")
    assert log.Scalars("quality/Frechet distance ratio")[0].step == 5, "counted from 0, as the losses are"
    assert (
        "quality/near copies" in log.Tags()["scalars"] and "quality_details/label accuracy by digit 9" in log.Tags()["scalars"]
    )
    assert (tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt").read_bytes() == before
    config = yaml.safe_load((tmp_path / "runs/tiny/version_1/config.yaml").read_text())
    assert config["model"]["optimizer"] == {
        "class_path": "torch.optim.AdamW",
        "init_args": config["model"]["optimizer"]["init_args"],
    }
    assert config["model"]["optimizer"]["init_args"]["lr"] == 1e-4
    assert load(tmp_path / "runs/tiny/version_1/checkpoints/last.ckpt")[0].net.arguments["channels"] == [4, 4, 4]


def test_last_goes_on_in_the_same_folder_with_the_same_config(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "runs", tmp_path / "runs")
    done = run_here("train.py", "--ckpt_path", "last", "--trainer.max_epochs", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on from runs/tiny/version_0/checkpoints/last.ckpt" in done.stdout and done.stderr == ""
    assert sorted(path.name for path in (tmp_path / "runs/tiny").iterdir()) == ["version_0"]
    assert (tmp_path / "runs/tiny/version_0/samples/grid-000018.png").is_file()
    losses = events(tmp_path / "runs/tiny/version_0").Scalars("loss/val")
    assert [event.step for event in losses] == [5, 11, 17]


def test_a_run_from_before_the_folders_goes_on_as_one_of_today(tiny_run, tmp_path):
    """Its config names classes where they were; its checkpoint says pixels, and not units."""
    shutil.copytree(tiny_run / "runs", tmp_path / "runs")
    version = tmp_path / "runs/tiny/version_0"
    config = (version / "config.yaml").read_text()
    for now, before in (("networks.unet", "unet"), ("data.digits", "data")):
        assert f"flowmatch_mnist.{now}." in config
        config = config.replace(f"flowmatch_mnist.{now}.", f"flowmatch_mnist.{before}.")
    (version / "config.yaml").write_text(config)
    for name in ("last", "best"):
        checkpoint = load_checkpoint(version / f"checkpoints/{name}.ckpt")
        checkpoint[DESCRIPTION_KEY]["pixels"] = checkpoint[DESCRIPTION_KEY].pop("units")
        save_checkpoint(version / f"checkpoints/{name}.ckpt", checkpoint)
    done = run_here("train.py", "--ckpt_path", "last", "--trainer.max_epochs", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run_here("train.py", "predict", "--ckpt_path", "last", "--data.predict_per_class", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "flowmatch_mnist.networks.unet.UNet" in (version / "config.yaml").read_text()


def test_short_names_and_names_from_before_are_understood_as_options(tmp_path):
    for net, times in (("UNet", "LogitNormal"), ("flowmatch_mnist.unet.UNet", "flowmatch_mnist.times.LogitNormal")):
        options = ("--model.net", net, "--model.times", times, "--model.times.location", -0.5, "--data", "MNISTDataModule")
        done = run_here("train.py", *options, "--print_config", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        config = yaml.safe_load(done.stdout)
        assert config["model"]["net"]["class_path"] == "flowmatch_mnist.networks.unet.UNet"
        assert config["model"]["times"]["class_path"] == "flowmatch_mnist.flow.times.LogitNormal"


BEFORE = (
    "unet.UNet mlp.MLP times.Uniform meanflow.MeanFlow muon.Muon data.IDXDataModule toy.CurveDataModule reflow.ReflowDataModule"
)


@pytest.mark.parametrize("name", BEFORE.split())
def test_every_class_that_an_older_config_can_name_is_found(name):
    path = with_current_class_paths(f"flowmatch_mnist.{name}")
    module, _, kind = path.rpartition(".")
    assert inspect.isclass(getattr(importlib.import_module(module), kind))
    assert with_current_class_paths(path) == path and with_current_class_paths("mine.unet.UNet") == "mine.unet.UNet"


@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_validate_and_test_need_only_the_checkpoint(tiny_run, tmp_path, few_digits, subcommand):
    shutil.copytree(tiny_run / "runs", tmp_path / "runs")
    few = [f"--trainer.limit_{'val' if subcommand == 'validate' else 'test'}_batches", 2]
    done = run_here("train.py", subcommand, "--ckpt_path", "runs/tiny/version_0/checkpoints/last.ckpt", *few, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    split = {"validate": "val", "test": "test"}[subcommand]
    assert f"\nloss/{split} " in done.stdout and "\nFrechet distance " in done.stdout
    how = "midpoint, 2 steps, guidance 1 (NFE 4), seed 0; compared with that split"
    assert f"40 samples with the labels of the {split} split, {how}" in done.stdout
    report = json.loads((tmp_path / f"runs/tiny/version_0/checkpoints/metrics-last-{split}.json").read_text())
    assert report["checkpoint"] == "last.ckpt" and report["split"] == split
    assert report["samples"] == 40 and report["evaluations"] == 4 and report["sampler"]["solver"] == "midpoint"
    assert [(point["steps"], point["evaluations"]) for point in report["by steps"]] == [(1, 2), (3, 6)]
    assert "\n20 samples with 2 network evaluations: label accuracy " in done.stdout
    assert "\nand with 6 network evaluations: " in done.stdout
    assert report["scores"]["label accuracy"]["real data"]["value"] > 0.99
    for by in ("", "resnet/"):
        distance = report["scores"][f"{by}Frechet distance"]
        assert distance["samples"]["value"] > distance["real data"]["value"] > 5 * distance["real data"]["error"] > 0
    assert sorted(path.name for path in (tmp_path / "runs/tiny").iterdir()) == ["version_0"]


def test_two_processes_measure_what_one_does(tiny_run, tmp_path):
    # With churn, whose noise must not depend on the sharing either; 23 samples are no multiple of two.
    shutil.copytree(tiny_run / "runs", tmp_path / "runs")
    sampler = ["--model.sampler.solver", "euler", "--model.sampler.churn", 0.5]
    arguments = ["validate", "--ckpt_path", "last", *sampler, "--evaluation.test_samples", 23, "--trainer.accelerator", "cpu"]
    reports = []
    for devices in ([], ["--trainer.devices", 2, "--trainer.strategy", "ddp"]):
        done = (run if devices else run_here)("train.py", *arguments, *devices, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("wrote ") == 1
        reports.append(json.loads((tmp_path / "runs/tiny/version_0/checkpoints/metrics-last-val.json").read_text()))
    assert reports[0]["scores"] == reports[1]["scores"] and reports[0]["by steps"] == reports[1]["by steps"]
    assert reports[0]["loss/val"] == pytest.approx(reports[1]["loss/val"], abs=1e-5)


def test_predict_writes_the_digits_that_sample_draws(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "runs", tmp_path / "runs")
    done = run_here("train.py", "predict", "--ckpt_path", "best", "--data.predict_per_class", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    predicted = np.load(tmp_path / "runs/tiny/version_0/predictions.npz")
    out = tmp_path / "sampled.npz"
    best = "runs/tiny/version_0/checkpoints/best.ckpt"
    arguments = ["0-9", "--per-class", 2, "--checkpoint", best, "--steps", 2, "--out", out]
    assert run_here("sample.py", *arguments, cwd=tmp_path).returncode == 0
    sampled = np.load(out)
    assert (predicted["labels"] == sampled["labels"]).all()
    assert abs(predicted["images"].astype(int) - sampled["images"]).max() <= 1


def two_nodes(*arguments, cwd):
    """Run a script on two nodes of one process each, as a person starts them by hand."""
    nodes, port = [], find_free_network_port()
    for node in ("0", "1"):
        env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": node}
        command = [sys.executable, *map(str, arguments), "--trainer.num_nodes", "2", "--trainer.strategy", "ddp"]
        nodes.append(subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    for node in nodes:
        stdout, stderr = node.communicate(timeout=300)
        yield subprocess.CompletedProcess(node.args, node.returncode, stdout, stderr)


def test_two_nodes_share_the_steps_that_one_process_would_take(tmp_path, data_dir, monkeypatch):
    common = ("--config", TINY, "--data.data_dir", data_dir, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true")
    # Adam divides by the size of a gradient, and makes large what rounding changes in a small one. SGD does not.
    common += ("--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", 0.1)
    done, other = two_nodes(ROOT / "tests/two_ranks.py", *common, cwd=tmp_path)
    assert done.returncode == 0 and other.returncode == 0, done.stdout + done.stderr + other.stderr
    assert not other.stdout
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for batch_a, batch_b in zip(ranks[0]["batches"], ranks[1]["batches"], strict=True):
        noise = torch.corrcoef(torch.stack([batch_a[0].flatten(), batch_b[0].flatten()]))[0, 1]
        assert abs(noise) < 0.05
        assert not torch.equal(batch_a[1], batch_b[1])
    for a, b in zip(ranks[0]["weights"], ranks[1]["weights"], strict=True):
        assert torch.equal(a, b)
    assert ranks[0]["val"] == ranks[1]["val"], "validation is the mean over both"
    versions = list((tmp_path / "runs/tiny").iterdir())
    assert [version.name for version in versions] == ["version_0"]
    assert len(list(versions[0].glob("events.*"))) == 1, "one process logs"
    assert len(list((versions[0] / "samples").glob("grid-*.png"))) == 2, "and one draws"
    assert done.stdout.count("epoch 2, step 12:") == 1
    assert "2 processes take 16 samples each, 32 a step; to match one process, set --data.batch_size 8" in done.stdout

    monkeypatch.setattr(cli, "CLI", cli.CLI)  # put back afterwards: two_ranks.py replaces it
    done = run_here("tests/two_ranks.py", *common, "--data.batch_size", 32, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    alone = torch.load(tmp_path / "rank0.pt")
    for rank in range(2):
        for whole, share in zip(alone["batches"], ranks[rank]["batches"], strict=True):
            for a, b in zip(whole, share, strict=True):
                assert torch.equal(a[rank::2], b)
    for a, b in zip(alone["weights"], ranks[0]["weights"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert alone["val"] == pytest.approx(ranks[0]["val"], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["--model.widht", "3"], ["model.widht"]),
        (["--model.prediction", "score"], ["no model.prediction 'score'", "'velocity', 'data', 'noise'"]),
        (["--model.weighting", "mine"], ["no model.weighting 'mine'", "'flow_matching', 'sd3', 'edm', 'ddpm'"]),
        (["--model.sampler.churn", "-1"], ["error: churn must be", "got -1"]),
        (["--data.widht", "3"], ["data: Option 'widht' is not accepted"]),
        (["--model.label_dropout", "2"], ["label_dropout"]),
        (["--model.optimizer", "flowmatch_mnist.training.muon.Muon", "--model.optimizer.momentum", "1"], ["momentum", "1"]),
        (["--model.optimizer.lr", "-1"], ["model.optimizer", "learning rate: -1"]),
        (["--model.matching.teacher", "mnist", "--model.net.spans", "true"], ["set start"]),
        (["--model.sampler.solver", "leapfrog"], ["no solver 'leapfrog'", "midpoint"]),
        (["--ema.decay", "1.5"], ["decay"]),
        (["--trainer.accelerator", "abacus"], ["abacus"]),
        (["--trainer.precision", "transformer-engine"], ["transformer_engine"]),
        (["--ckpt_path", "nowhere.ckpt"], ["nowhere.ckpt"]),
        (["--ckpt_path", "last", "--name", "never"], ["runs/never"]),
        (["--ckpt_path", "last", "--name", ""], ["--name ''", "name of a folder"]),
        (["--ckpt_path", "last", "--name", "/tmp/x"], ["/tmp/x", "name of a folder"]),
        (["--ckpt_path", "broken.ckpt"], ["broken.ckpt", "damaged"]),
        (["--ckpt_path", "other.ckpt"], ["other.ckpt", "the config asks for"]),
        (["--config", "broken.yaml"], ["broken.yaml"]),
        (["--config", "unknown.yaml"], ["learning_rate"]),
        (["--data.data_dir", "broken.yaml/data"], ["broken.yaml/data"]),
        (["--trainer.logger", "false", "--trainer.default_root_dir", "broken.yaml/x"], ["broken.yaml"]),
    ],
)
def test_mistakes_get_one_line(tiny_run, tmp_path, data_dir, arguments, words, monkeypatch, capfd):
    whole = (tiny_run / "runs/tiny/version_0/checkpoints/last.ckpt").read_bytes()
    (tmp_path / "broken.ckpt").write_bytes(whole[: len(whole) // 2])
    other = torch.load(tiny_run / "runs/tiny/version_0/checkpoints/last.ckpt", weights_only=True)
    other["flowmatch_mnist"]["arguments"]["channels"] = [4, 4, 4]
    torch.save(other, tmp_path / "other.ckpt")
    (tmp_path / "broken.yaml").write_text("model: [")
    (tmp_path / "unknown.yaml").write_text(TINY.read_text() + "\nlearning_rate: 3\n")
    base = ["--config", TINY] if "--config" not in arguments else []
    data = ["--data.data_dir", data_dir] if "--data.data_dir" not in arguments else []
    # In this process, since there are many of them; other tests see that it is the same in one of its own.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", *map(str, [*base, *data, *arguments])])
    monkeypatch.setattr(logging.getLogger("flowmatch_mnist"), "handlers", [])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    done = subprocess.CompletedProcess(sys.argv, ended.value.code, *capfd.readouterr())
    assert_one_line_error(done, *words)


def test_evaluating_without_a_checkpoint_gets_one_line(tmp_path):
    assert_one_line_error(
        run_here("train.py", "test", "--config", TINY, cwd=tmp_path), "test needs a trained model", "--ckpt_path"
    )


def test_a_checkpoint_from_a_stranger_runs_no_code(tmp_path):
    torch.save({"state_dict": Evil(), "hyper_parameters": {"_class_path": "os.system"}}, tmp_path / "evil.ckpt")
    done = run_here("train.py", "test", "--config", TINY, "--ckpt_path", "evil.ckpt", cwd=tmp_path)
    assert_one_line_error(done, "evil.ckpt")
    assert not (tmp_path / "owned").exists()


@unix
def test_a_wrong_data_file_without_any_source_gets_one_line(tmp_path):
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"not labels")
    site = tmp_path / "site"
    site.mkdir()
    # No mirror and no npm, as on a machine without a network.
    (site / "sitecustomize.py").write_text("import torchvision\ntorchvision.datasets.MNIST.mirrors = ['http://127.0.0.1:9/']\n")
    done = run("train.py", "--config", TINY, cwd=tmp_path, PYTHONPATH=f"{site}:{ROOT}", PATH="")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: MNIST is not in data") and "train-images-idx3-ubyte" in last
    assert "t10k-labels-idx1-ubyte is not the genuine file" in done.stderr
    assert (raw / "t10k-labels-idx1-ubyte.corrupt").read_bytes() == b"not labels"


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_configs_are_complete_and_understood(config, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", str(config), "--print_config"])
    monkeypatch.setattr(logging.getLogger("flowmatch_mnist"), "handlers", [])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capfd.readouterr()
    assert not ended.value.code, printed.err
    assert yaml.safe_load(printed.out)["name"] == config.stem


def test_options_overrule_the_config_wherever_it_stands(tmp_path):
    done = run_here("train.py", "--data.batch_size", 3, "--config", TINY, "--print_config", cwd=tmp_path)
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["data"]["init_args"]["batch_size"] == 3, done.stderr


def test_an_optimizer_has_its_own_defaults(tmp_path):
    """Not those of AdamW, which is the default."""
    (tmp_path / "plain.yaml").write_text("model: {net: {class_path: MLP}}\ndata: {class_path: CurveDataModule}\n")
    for optimizer in ("SGD", "NAdam"):
        asked = ("--config", "plain.yaml", "--model.optimizer", optimizer, "--print_config")
        done = run_here("train.py", *asked, cwd=tmp_path)
        assert yaml.safe_load(done.stdout)["model"]["optimizer"]["init_args"]["weight_decay"] == 0
    done = run_here("train.py", "--config", "plain.yaml", "--trainer.max_steps", 1, "--trainer.logger", "false", cwd=tmp_path)
    assert done.returncode == 0, done.stderr  # AdamW


def test_train_alone_means_the_default_config(tmp_path):
    done = run_here("train.py", "--print_config", cwd=tmp_path)
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["name"] == "mnist"
