"""A run is its own: its folder, its end, its resumption, and what Lightning's options do to them."""

import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_one_line_error, run_here
from filelock import FileLock
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import TQDMProgressBar
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowmatch_mnist.flow.solvers import trajectory
from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.support.files import load_checkpoint, save_checkpoint
from flowmatch_mnist.training.folder import RunFolder, check_name, create_version, lock_folder
from flowmatch_mnist.training.saving import SaveLast

TOY = ["fit", "--config", ROOT / "configs/toy.yaml", "--data.samples", 400, "--data.batch_size", 20, "--model.net.width", 8]
TOY += ["--evaluation.samples", 20, "--evaluation.every_n_epochs", 0, "--sampling.every_n_epochs", 0]
TOY += ["--trainer.max_epochs", 3, "--trainer.check_val_every_n_epoch", 1, "--trainer.log_every_n_steps", 1]
"""20 steps an epoch."""


class Stop(Callback):
    """Asks for the end in one step, as `Timer` does."""

    def __init__(self, step: int = 25) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.should_stop = True


class Unreadable(Callback):
    """A callback whose state no checkpoint may hold."""

    def state_dict(self):
        return {"score": np.float64(1)}


def fit(folder: Path, *options: object):
    if "--ckpt_path" in options:
        # TensorBoard reads files by their names: the second, the process, and a number as text, where 10 comes before 9.
        time.sleep(1 - time.time() % 1)
    done = run_here("train.py", *TOY, *options, cwd=folder)
    assert done.returncode == 0 and done.stderr == "", done.stdout + done.stderr
    return done.stdout


def test_a_resumed_run_takes_the_settings_of_the_optimizer_that_it_is_given(tmp_path):
    fit(tmp_path, "--trainer.max_epochs", 1)
    changed = ("--model.optimizer.lr", 0.5, "--model.optimizer.weight_decay", 0.25, "--model.warmup_steps", 0)
    changed += ("--model.decay", "constant")
    fit(tmp_path, "--ckpt_path", "last", "--trainer.max_epochs", 2, *changed)
    kept = last(tmp_path)
    (group,) = kept["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (0.5, 0.5, 0.25)
    assert kept["lr_schedulers"][0]["base_lrs"] == [0.5] and kept["optimizer"] == "AdamW"
    assert run_here("train.py", "--ckpt_path", "last", "--trainer.max_epochs", 3, cwd=tmp_path).returncode == 0
    (group,) = last(tmp_path)["optimizer_states"][0]["param_groups"]
    assert group["initial_lr"] == 0.5, "the run's config has the settings that it was given"
    other = ("--ckpt_path", "last", "--trainer.max_epochs", 4, "--model.optimizer", "torch.optim.SGD")
    done = run_here("train.py", *TOY, *other, "--model.optimizer.lr", 0.1, cwd=tmp_path)
    assert_one_line_error(done, "the state of AdamW", "asks for SGD", "--model.start")


def last(folder: Path, version: str = "runs/toy/version_0", name: str = "last"):
    return load_checkpoint(folder / version / f"checkpoints/{name}.ckpt")


def losses(folder: Path, tag: str = "loss/train"):
    log = EventAccumulator(str(folder / "runs/toy/version_0"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in log.Scalars(tag)]


@pytest.mark.parametrize(("accumulate", "every", "validate"), [(1, 1, 1.0), (2, 1, 1.0), (1, 4, 1.0), (1, 4, 5)])
def test_a_run_that_a_callback_stops_in_mid_epoch_resumes_to_the_bit(tmp_path, accumulate, every, validate):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    options = ["--trainer.accumulate_grad_batches", accumulate, "--model.decay", "constant"]
    options += ["--trainer.log_every_n_steps", every, "--trainer.val_check_interval", validate]
    fit(whole, *options)
    step = 25 // accumulate
    printed = fit(parts, *options, "--trainer.callbacks", "test_runs.Stop", "--trainer.callbacks.step", step)
    assert f"stopped after step {step}: a callback stopped it; wrote runs/toy/version_0/checkpoints/last.ckpt" in printed
    held = last(parts)
    assert held["global_step"] == step and held["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] == 1
    fit(parts, *options, "--ckpt_path", "last")
    for key in ("state_dict", "current_model_state"):
        alone, resumed = last(whole)[key], last(parts)[key]
        assert all(torch.equal(value, resumed[name]) for name, value in alone.items())
    for tag in ("loss/train", "loss/val"):
        assert losses(whole, tag) == losses(parts, tag), "each batch once, and no validation that was not due"


def test_a_checkpoint_comes_after_the_points_of_its_step(tmp_path, monkeypatch):
    def save_and_copy(saving, trainer):
        save(saving, trainer)
        if trainer.global_step == 22:
            shutil.copytree(whole, killed)  # what a run leaves that is killed in this instant

    save, whole, killed = SaveLast._save, tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    monkeypatch.setattr(SaveLast, "_save", save_and_copy)
    fit(whole, "--saving.every_n_steps", 11)
    assert losses(killed) == losses(whole)[:22]
    fit(killed, "--ckpt_path", "last")
    assert losses(killed) == losses(whole)


def test_a_stop_in_the_last_step_of_an_epoch_leaves_its_scores(tmp_path):
    options = ["--trainer.log_every_n_steps", 7, "--evaluation.every_n_epochs", 1, "--trainer.check_val_every_n_epoch", 3]
    printed = fit(tmp_path, *options, "--trainer.callbacks", "test_runs.Stop", "--trainer.callbacks.step", 40)
    assert "stopped after step 40: a callback stopped it" in printed
    assert [step for step, _ in losses(tmp_path, "quality/distance to the curve")] == [19, 39]
    assert [step for step, _ in losses(tmp_path)] == [6, 13, 20, 27, 34]


def test_max_time_says_so_and_when_there_is_nothing_left_of_it(tmp_path):
    end = ["--trainer.max_time", '{"milliseconds": 200}', "--trainer.max_epochs", 1000]
    assert "its max_time is over" in fit(tmp_path, *end)
    step = last(tmp_path)["global_step"]
    assert f"nothing to do after step {step}: its max_time is over" in fit(tmp_path, *end, "--ckpt_path", "last")
    assert "nothing to do" in fit(tmp_path, "--ckpt_path", "last", "--trainer.max_steps", step)


def test_a_run_that_early_stopping_ended_stays_ended(tmp_path):
    stop = [
        "--trainer.callbacks",
        "EarlyStopping",
        "--trainer.callbacks.monitor",
        "loss/val",
        "--trainer.callbacks.min_delta",
        9,
    ]
    stop += ["--trainer.callbacks.patience", 1]
    assert "stopped after step 40: EarlyStopping" in fit(tmp_path, *stop)
    assert "nothing to do after step 40: EarlyStopping" in fit(tmp_path, *stop, "--ckpt_path", "last")


def test_runs_that_start_at_once_get_a_folder_each_and_one_trains_in_it_at_a_time(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(create_version, [tmp_path / "x"] * 8))
    assert sorted(folder.name for folder in folders) == [f"version_{n}" for n in range(8)]
    fit(tmp_path)
    lock = FileLock(tmp_path / "runs/toy/version_0/.lock", is_singleton=False)
    with lock:
        done = run_here("train.py", *TOY, "--ckpt_path", "last", cwd=tmp_path)
        assert_one_line_error(done, "another run trains in runs/toy/version_0")
    assert create_version(tmp_path / "runs/toy").name == "version_1"


def test_a_run_that_has_ended_leaves_its_folder_to_others(tmp_path):
    for ending in ("teardown", "on_exception"):
        lock = lock_folder(tmp_path)
        with pytest.raises(UserError, match="another run trains"):
            lock_folder(tmp_path)
        getattr(RunFolder(tmp_path, lock), ending)(None, None, None)
        lock_folder(tmp_path).release()


def test_a_mistake_before_the_first_step_leaves_no_folder(tmp_path):
    by_quality = ["--checkpoint.monitor", "quality/recall"]
    for mistake, words in (
        (["--trainer.precision", "64-true"], "64-true"),
        ([*by_quality, "--evaluation.every_n_epochs", 0], "needs measurements"),
        (["--model.start", "mnist"], "mnist"),
    ):
        assert_one_line_error(run_here("train.py", *TOY, *mistake, cwd=tmp_path), words)
        assert not list((tmp_path / "runs/toy").iterdir())
    fit(tmp_path)
    last = tmp_path / "runs/toy/version_0/checkpoints/last.ckpt"
    stored = last.read_bytes()
    for again in ("last", last):
        wrong = [*by_quality, "--evaluation.every_n_epochs", 0, "--trainer.max_epochs", 9, "--ckpt_path", again]
        assert_one_line_error(run_here("train.py", *TOY, *wrong, cwd=tmp_path), "needs measurements")
        assert [path.name for path in (tmp_path / "runs/toy").iterdir()] == ["version_0"] and last.read_bytes() == stored


def test_the_best_of_several_checkpoints_is_the_best(tmp_path):
    fit(tmp_path, "--checkpoint.save_top_k", 2)
    checkpoints = tmp_path / "runs/toy/version_0/checkpoints"
    values = dict(losses(tmp_path, "loss/val"))
    best = sorted(values, key=values.get)[:2]
    assert {path.name for path in checkpoints.glob("step=*")} == {f"step={step + 1}.ckpt" for step in best}
    assert last(tmp_path, name="best")["global_step"] == best[0] + 1
    wrong = ["--checkpoint.save_top_k", 2, "--checkpoint.filename", "best"]
    assert_one_line_error(run_here("train.py", *TOY, *wrong, cwd=tmp_path), "one name for several checkpoints")


def test_the_best_by_quality_is_of_the_weights_that_were_measured(tmp_path):
    score = "quality/distance to the curve"
    fit(tmp_path, "--checkpoint.monitor", score, "--evaluation.every_n_steps", 15, "--trainer.check_val_every_n_epoch", 1)
    values = dict(losses(tmp_path, score))
    assert set(values) == {14, 29, 44, 59} and last(tmp_path, name="best")["global_step"] == min(values, key=values.get) + 1


@pytest.mark.parametrize("logger", ["false", "CSVLogger"])
def test_a_run_has_its_folder_whatever_the_logger(tmp_path, logger):
    (tmp_path / "config.yaml").write_text("mine")
    fit(tmp_path, "--trainer.logger", logger, *(["--trainer.logger.save_dir", "csv"] if logger != "false" else []))
    assert (tmp_path / "config.yaml").read_text() == "mine" and not (tmp_path / "checkpoints").exists()
    assert last(tmp_path)["global_step"] == 60 and (tmp_path / "runs/toy/version_0/config.yaml").is_file()
    fit(tmp_path, "--trainer.logger", logger, *(["--trainer.logger.save_dir", "csv"] if logger != "false" else []))
    assert last(tmp_path, "runs/toy/version_1")["global_step"] == 60


@pytest.mark.parametrize("name", ["sweep/a", "..", "", "a:b", ".hidden", "end.", "what?"])
def test_what_cannot_be_a_folder_is_no_name(name):
    with pytest.raises(UserError, match="cannot be the name of a folder"):
        check_name(name)


def test_a_name_is_taken_literally_and_a_run_may_be_renamed_and_keeps_its_best(tmp_path):
    fit(tmp_path, "--name", "lr[4e-3]")
    assert "going on from runs/lr[4e-3]/version_0" in fit(tmp_path, "--name", "lr[4e-3]", "--ckpt_path", "last")
    (tmp_path / "runs/lr[4e-3]").rename(tmp_path / "runs/new")
    (tmp_path / "runs/new/version_0").rename(tmp_path / "runs/new/kept")
    before = next(state for key, state in last(tmp_path, "runs/new/kept")["callbacks"].items() if "ModelCheckpoint" in key)
    done = run_here("train.py", "--ckpt_path", "last", "--trainer.max_epochs", 4, "--trainer.max_steps", 61, cwd=tmp_path)
    assert done.returncode == 0 and "into runs/new/kept" in done.stdout, done.stdout + done.stderr
    after = next(state for key, state in last(tmp_path, "runs/new/kept")["callbacks"].items() if "ModelCheckpoint" in key)
    assert after["best_model_score"] <= before["best_model_score"]
    assert after["best_model_path"] == "runs/new/kept/checkpoints/best.ckpt"


def test_dopri5_says_that_a_network_has_diverged():
    with pytest.raises(FloatingPointError, match=r"dopri5 finds no step|not finite"):
        list(trajectory(lambda x, t: x * torch.nan, torch.ones(2, 2), [0.0, 1.0], "dopri5"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trainer.val_check_interval", 5000, "--trainer.check_val_every_n_epoch", 1], ["val_check_interval", "5000"]),
        (["--trainer.max_epochs", -1], ["needs an end", "--model.decay constant"]),
        (["--trainer.max_epochs", -1, "--trainer.max_time", "00:00:00:01"], ["needs an end"]),
        (["--trainer.callbacks", "test_runs.Unreadable"], ["Unreadable", "plain values"]),
        (["--trainer.barebones", "true"], ["barebones", "not supported"]),
        (["--trainer.enable_checkpointing", "false"], ["enable_checkpointing", "fast_dev_run"]),
        (["--trainer.strategy", "fsdp"], ["strategy fsdp", "ddp"]),
        (["--trainer.use_distributed_sampler", "false"], ["use_distributed_sampler"]),
        (["--trainer.model_registry", "hub"], ["model_registry"]),
        (["--trainer.enable_autolog_hparams", "false"], ["enable_autolog_hparams"]),
        (["--checkpoint.save_last", "true"], ["last.ckpt"]),
        (["--name", "a/b"], ["'a/b'", "name of a folder"]),
    ],
)
def test_what_cannot_be_gets_one_line(tmp_path, options, words):
    assert_one_line_error(run_here("train.py", *TOY, *options, cwd=tmp_path), *words)


def test_an_endless_run_trains_with_a_constant_rate(tmp_path):
    end = ["--trainer.max_epochs", -1, "--trainer.max_time", '{"milliseconds": 100}', "--model.decay", "constant"]
    assert "its max_time is over" in fit(tmp_path, *end)


def test_single_plugins_and_another_bar_are_taken(tmp_path):
    environment = "lightning.pytorch.plugins.environments.LightningEnvironment"
    options = ["--trainer.plugins", environment, "--trainer.callbacks", TQDMProgressBar.__name__]
    done = run_here(
        "train.py", *TOY, *options, "--trainer.enable_progress_bar", "true", "--trainer.max_epochs", 1, cwd=tmp_path
    )
    assert done.returncode == 0 and "it/s" in done.stdout + done.stderr


def test_overfit_batches_sees_the_same_batches_in_each_epoch(tmp_path):
    fit(tmp_path, "--trainer.overfit_batches", 2, "--trainer.callbacks", "test_runs.Note")
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert len(seen) == 6 and seen[0] == seen[2] == seen[4] and seen[1] == seen[3] and seen[0] != seen[1]


class Note(Callback):
    """Writes what each batch was."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append(batch[1].sum().item())

    def on_train_end(self, trainer, module):
        Path("seen.json").write_text(json.dumps(self.seen))


def test_a_file_system_without_fsync_will_do(tmp_path, monkeypatch):
    def refuse(number):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    save_checkpoint(tmp_path / "a.ckpt", {"x": torch.ones(2)})
    assert torch.equal(load_checkpoint(tmp_path / "a.ckpt")["x"], torch.ones(2))
