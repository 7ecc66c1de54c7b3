"""A run that is stopped and goes on is the run that was left alone; what is on disk is whole, or refused."""

import contextlib
import dataclasses
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import fuzz
import pytest
import resume
import torch
from conftest import ROOT, TINY, assert_one_line_error, run, run_here, unix
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from flowmatch_mnist.data.batches import Batches
from flowmatch_mnist.data.digits import MNISTDataModule
from flowmatch_mnist.networks.unet import UNet
from flowmatch_mnist.sampling.generate import Sampler
from flowmatch_mnist.sampling.weights import newest_checkpoint
from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.support.files import find_damage, load_checkpoint, load_weights, save_checkpoint, save_weights
from flowmatch_mnist.training.drawing import DrawSamples
from flowmatch_mnist.training.ema import EMA
from flowmatch_mnist.training.module import FlowMatching
from flowmatch_mnist.training.saving import CheckpointFiles, SaveLast


class KeepAll(CheckpointFiles):
    """Keeps a copy of each `last.ckpt`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path)
        if Path(path).name == "last.ckpt":
            shutil.copy(path, self.folder / f"{len(list(self.folder.iterdir())):02d}.ckpt")


class Seen(Callback):
    """Notes what each step was given, and when pictures were drawn."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.steps.append((trainer.current_epoch, batch_idx, batch[0].sum().item(), batch[2].tolist()))


class CountDrawings(DrawSamples):
    """Counts instead of drawing."""

    def act(self, trainer, module):
        self.drawn = [*getattr(self, "drawn", []), trainer.global_step]


def make(folder, data_dir, files, on_non_finite="stop", **settings):
    torch.manual_seed(1)
    net = UNet((4, 4), (1, 1), (False, False), dropout=0.1)
    sampler = Sampler(steps=1, solver="euler")
    module = FlowMatching(net, sampler=sampler, warmup_steps=2, decay="cosine", on_non_finite=on_non_finite)
    data = MNISTDataModule(str(data_dir), batch_size=4, val_size=32, eval_batch_size=16)
    seen, drawings = Seen(), CountDrawings(every_n_epochs=1, every_n_steps=3)
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        callbacks=[EMA(), seen, drawings, SaveLast(every_n_steps=1), ModelCheckpoint(folder, "best", "loss/val")],
        plugins=[files],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **({"max_epochs": 2, "limit_train_batches": 5, "limit_val_batches": 1, "val_check_interval": 2} | settings),
    )
    return trainer, module, data, seen, drawings


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_steps": 9, "max_epochs": 5},
        {"check_val_every_n_epoch": None, "accumulate_grad_batches": 2, "val_check_interval": 3, "max_steps": 5},
    ],
    ids=["by epochs", "by steps", "with accumulation"],
)
def test_a_run_goes_on_to_the_bit_from_every_checkpoint_it_ever_kept(settings, tmp_path, few_digits, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "kept"
    kept.mkdir()
    trainer, module, data, seen, drawings = make(tmp_path, few_digits, KeepAll(kept), **settings)
    trainer.fit(module, data)
    final = load_checkpoint(tmp_path / "checkpoints/last.ckpt")
    paths = sorted(kept.iterdir())
    assert len(paths) >= trainer.global_step
    for path in paths:
        begun = load_checkpoint(path)
        trainer, module, data, again, more = make(tmp_path, few_digits, CheckpointFiles(), **settings)
        trainer.fit(module, data, ckpt_path=path, weights_only=True)
        if not again.steps:
            assert begun["global_step"] == final["global_step"], f"{path} ends too early"
            continue
        assert again.steps == seen.steps[-len(again.steps) :], path
        ended = load_checkpoint(tmp_path / "checkpoints/last.ckpt")
        for part in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            assert not resume.differences(final[part], ended[part], part), path
        begun_at = begun["global_step"]
        assert getattr(more, "drawn", []) == [step for step in drawings.drawn if step > begun_at], path


@unix
def test_a_run_that_is_killed_ends_where_the_one_left_alone_does(data_dir):
    short = ["--trainer.max_steps", "50"]
    whole, seconds = resume.alone(short, data_dir)
    way = dataclasses.replace(resume.WAYS["SIGKILL"], options=short)
    done, _, wrong = resume.kill_and_resume(way, 1, whole, seconds, data_dir, random.Random(1))
    assert done >= 1 and not wrong


@unix
def test_sigterm_finishes_the_step_saves_says_where_and_ends_with_its_status(tmp_path, data_dir):
    arguments = ["--config", TINY, "--data.data_dir", data_dir, "--trainer.max_epochs", 100, "--sampling.every_n_epochs", 0]
    two = ["--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.strategy", "ddp"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "fit", *map(str, [*arguments, *two])],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("epoch 3"):
            process.send_signal(signal.SIGTERM)
            break
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, out + err
    assert "stopped by SIGTERM after step" in out and "runs/tiny/version_0/checkpoints/last.ckpt" in out
    assert "Traceback" not in err
    step = load_checkpoint(tmp_path / "runs/tiny/version_0/checkpoints/last.ckpt")["global_step"]
    assert f"after step {step};" in out


def test_another_global_batch_is_refused_and_another_sharing_of_it_is_exact():
    def batches(ranks, rank=0, size=20):
        return Batches(torch.arange(100), batch_size=size, rank=rank, world_size=ranks, seed=0, drop_last=True)

    whole = [batch[0] for batch in batches(1)]
    walk = batches(1)
    for _ in zip(range(2), walk, strict=False):
        pass
    shares = []
    for rank in range(2):
        share = batches(2, rank)
        share.load_state_dict(walk.state_dict())
        shares.append([batch[0] for batch in share])
    for batch, *parts in zip(whole[2:], *shares, strict=True):
        assert sorted(batch.tolist()) == sorted(torch.cat(parts).tolist())
    with pytest.raises(UserError, match="global batch 20 and cannot resume with global batch 10"):
        batches(1, size=10).load_state_dict(walk.state_dict())


def test_workers_change_nothing_and_the_place_is_that_of_what_was_taken():
    def batches(workers):
        return Batches(torch.arange(60), batch_size=10, seed=0, num_workers=workers)

    whole = [batch[0].tolist() for batch in batches(0)]
    assert [batch[0].tolist() for batch in batches(2)] == whole
    walk = batches(2)
    iterator = iter(walk)
    next(iterator), next(iterator)
    resumed = batches(2)
    resumed.load_state_dict(walk.state_dict())
    assert [batch[0].tolist() for batch in resumed] == whole[2:]
    del iterator


def spoil(run_folder: Path, name: str = "last.ckpt") -> Path:
    path = run_folder / "runs/tiny/version_0/checkpoints" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def test_a_damaged_last_checkpoint_is_passed_over_and_said(tiny_run, tmp_path, monkeypatch, caplog):
    shutil.copytree(tiny_run / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    spoil(tmp_path)
    assert newest_checkpoint() == Path("runs/tiny/version_0/checkpoints/best.ckpt")
    assert "skipping runs/tiny/version_0/checkpoints/last.ckpt: its part" in caplog.text
    spoil(tmp_path, "best.ckpt")
    with pytest.raises(UserError, match="no undamaged"):
        newest_checkpoint()


def test_a_single_flipped_bit_is_refused_by_name(tiny_run, tmp_path):
    shutil.copytree(tiny_run / "runs", tmp_path / "runs")
    path = spoil(tmp_path)
    for script, arguments in (("sample.py", ["7", "--checkpoint"]), ("train.py", ["test", "--ckpt_path"])):
        assert_one_line_error(
            run_here(script, *arguments, path.relative_to(tmp_path), cwd=tmp_path), "last.ckpt", "has changed"
        )


def test_what_a_killed_writer_left_is_cleared_away(tmp_path, few_digits, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/.123.last.ckpt").write_bytes(b"half")
    trainer, module, data, *_ = make(tmp_path, few_digits, CheckpointFiles(), max_steps=1)
    trainer.fit(module, data)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


@unix
@pytest.mark.parametrize("name", ["last.ckpt", "some.safetensors"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, name):
    import resource

    path = tmp_path / name

    def write(values):
        if name.endswith(".ckpt"):
            save_checkpoint(path, {"weights": values})
        else:
            save_weights(path, {"weights": values}, {})

    write(torch.zeros(3))
    content = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as a full disk: a file cannot grow further
    try:
        with pytest.raises(UserError, match="cannot write"):
            write(torch.zeros(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == [name]


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A file system of its own, where one can be mounted."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here; a file that cannot grow is tested apart")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@unix
def test_a_full_disk_ends_in_one_line_with_the_last_checkpoint_whole(tmp_path, data_dir):
    with small_disk(tmp_path, "2m"):
        arguments = ["--config", TINY, "--data.data_dir", data_dir, "--saving.every_n_steps", 1]
        done = run("train.py", *arguments, "--sampling.every_n_epochs", 0, cwd=tmp_path)
        assert_one_line_error(done, "cannot write", "No space left")
        checkpoints = tmp_path / "runs/tiny/version_0/checkpoints"
        assert {path.name for path in checkpoints.iterdir()} <= {"last.ckpt", "best.ckpt"}
        assert find_damage(checkpoints / "last.ckpt") is None


class Explode(Callback):
    """Makes the data infinite in one step."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 3:
            batch[1].fill_(torch.inf)


def test_a_step_that_is_not_finite_stops_the_run_with_a_checkpoint_from_before_it(tmp_path, few_digits, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer, module, data, *_ = make(tmp_path, few_digits, CheckpointFiles())
    trainer.callbacks.insert(0, Explode())
    with pytest.raises(FloatingPointError, match=r"step 4 is not finite: loss (inf|nan), norm of the gradients nan"):
        trainer.fit(module, data)
    held = load_checkpoint(tmp_path / "checkpoints/last.ckpt")
    assert held["global_step"] == 3
    assert all(value.isfinite().all() for value in held["current_model_state"].values())


def test_or_is_left_out(tmp_path, few_digits, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trainer, module, data, *_ = make(tmp_path, few_digits, CheckpointFiles(), on_non_finite="skip")
    trainer.callbacks.insert(0, Explode())
    trainer.fit(module, data)
    assert capsys.readouterr().out.count("step 4 is not finite") == 1
    assert trainer.global_step == 10 and all(p.isfinite().all() for p in module.parameters())


def test_lightnings_deterministic_mode_works(tmp_path, few_digits, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        trainer, module, data, *_ = make(tmp_path, few_digits, CheckpointFiles(), deterministic=True, max_steps=3)
        trainer.fit(module, data)
    finally:
        torch.use_deterministic_algorithms(False)
    assert trainer.global_step == 3


def test_weights_are_refused_if_anything_in_them_has_changed(tmp_path):
    path = tmp_path / "some.safetensors"
    save_weights(path, {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)}, {"seed": "0"})
    weights, metadata = load_weights(path)
    assert torch.equal(weights["a"], torch.arange(6.0).view(2, 3)) and metadata == {"seed": "0"}
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, "others may read it as they may any file"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"seed":"0"', b'"seed":"1"'))
    with pytest.raises(UserError, match="does not match its digest"):
        load_weights(path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="does not match its digest"):
        load_weights(path)


@unix
def test_damaged_files_and_malformed_commands_get_one_line(tmp_path, data_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for what, (counts, slips) in fuzz.fuzz_files(6, 1, tmp_path, data_dir.resolve()).items():
        assert not slips, slips
        assert counts["refused"] > 0, what
    counts, slips = fuzz.fuzz_commands(12, 1, tmp_path)
    assert not slips, slips
    assert counts["refused"] == 12


@unix
def test_processes_that_wait_for_each_other_end_together(tmp_path, data_dir):
    two = ["--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.strategy", "ddp"]
    arguments = ["fit", "--config", TINY, "--data.data_dir", data_dir, *two]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *map(str, arguments)], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith("training ")
    time.sleep(0.5)  # the first waits now for the second, which is still importing
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)  # which is to say, until the second is gone too
    assert process.returncode == 143


def test_a_checkpoint_that_unpacks_to_more_than_it_is_gets_refused(tmp_path):
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(UserError, match="compressed"):
        load_checkpoint(path)
