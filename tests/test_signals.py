"""Signals: the step is finished, the run is saved, its status is told; and SLURM starts the job anew."""

import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import run_here, unix
from lightning.pytorch import Callback
from test_runs import TOY, fit, last, losses

from flowmatch_mnist.training import requeue

pytestmark = unix
NEVER = ["--saving.every_n_minutes", 0]


class Hear(Callback):
    """A signal comes in the middle of a step: once, or never again where it was heard before."""

    def __init__(self, number: int, step: int = 7) -> None:
        self.number, self.step, self.heard = number, step, Path("heard")

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_step == self.step - 1 and not self.heard.exists():
            self.heard.touch()
            signal.raise_signal(self.number)


def hear(number):
    return ["--trainer.callbacks", "test_signals.Hear", "--trainer.callbacks.number", int(number)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint_and_nothing_is_lost(tmp_path, number):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    fit(whole, *NEVER)
    done = run_here("train.py", *TOY, *NEVER, *hear(number), cwd=parts)
    assert done.returncode == 128 + number
    words = f"stopped by {number.name} after step 7; wrote runs/toy/version_0/checkpoints/last.ckpt; resume it with"
    assert words in done.stdout and done.stderr == ""
    assert last(parts)["global_step"] == 7, "written for the signal: nothing else was due"
    fit(parts, *NEVER, "--ckpt_path", "last")
    assert losses(parts) == losses(whole)
    alone, resumed = (last(folder)["state_dict"] for folder in (whole, parts))
    assert all(torch.equal(value, resumed[name]) for name, value in alone.items())


@pytest.fixture
def job(monkeypatch):
    """The variables of a SLURM job."""
    for name, value in {"JOB_ID": 1234, "JOB_NAME": "train", "NTASKS": 1, "PROCID": 0, "LOCALID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


@pytest.fixture
def scontrol(monkeypatch):
    """In place of SLURM's program; returns what it was asked, and may be told to fail."""

    class Scontrol:
        asked, status, error = (), 0, None

        def run(self, command, **settings):
            assert settings == {"capture_output": True, "text": True, "check": False}
            self.asked = command
            if self.error is not None:
                raise self.error
            return subprocess.CompletedProcess(command, self.status, "", "job is\nnot yours")

    stand_in = Scontrol()
    monkeypatch.setattr(requeue.subprocess, "run", stand_in.run)
    return stand_in


def test_slurms_signal_has_the_job_started_anew_and_it_resumes_in_its_folder(tmp_path, job, scontrol):
    (tmp_path / "hpc_ckpt_1.ckpt").write_bytes(b"a stranger's")
    command = [*TOY, *NEVER, *hear(signal.SIGUSR1)]
    done = run_here("train.py", *command, cwd=tmp_path)
    assert done.returncode == 128 + signal.SIGUSR1
    assert "stopped by SIGUSR1 after step 7; wrote" in done.stdout and "SLURM starts job 1234 again" in done.stdout
    assert scontrol.asked == ["scontrol", "requeue", "1234"] and last(tmp_path)["global_step"] == 7

    other = run_here("train.py", *command, "--name", "other", "--trainer.max_steps", 9, cwd=tmp_path)
    assert other.returncode == 0 and "going on" not in other.stdout, "another command is another run"
    again = run_here("train.py", *command, cwd=tmp_path)
    assert again.returncode == 0 and "going on from runs/toy/version_0/checkpoints/last.ckpt" in again.stdout
    assert last(tmp_path)["global_step"] == 60 and [path.name for path in (tmp_path / "runs/toy").iterdir()] == ["version_0"]
    assert "going on" not in run_here("train.py", *command, cwd=tmp_path).stdout, "the run has come to its end"
    assert len(list((tmp_path / "runs/toy").iterdir())) == 2


def test_what_slurm_says_of_a_job_is_told(monkeypatch, job, scontrol):
    assert requeue.requeue() == "SLURM starts job 1234 again, and the run resumes"
    scontrol.status = 1
    assert requeue.requeue() == "SLURM does not start job 1234 again: job is not yours"
    scontrol.error = FileNotFoundError(2, "No such file")
    assert requeue.requeue() == "SLURM was not asked to start job 1234 again: scontrol: No such file"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeue.requeue()
    assert scontrol.asked == ["scontrol", "requeue", "77_3"]


def test_a_mark_is_of_one_job_and_one_command(tmp_path, monkeypatch, job):
    folder = tmp_path / "version_0"
    (folder / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr("sys.argv", ["train.py", "fit", "--name", "some"])
    assert requeue.this_job() == {"job": "1234", "command": ["fit", "--name", "some"]}
    requeue.unmark(folder)  # where there is no mark
    requeue.mark(folder)
    assert requeue.checkpoint_of_this_job(tmp_path) is None, "there is nothing to resume"
    (folder / "checkpoints/last.ckpt").touch()
    assert requeue.checkpoint_of_this_job(tmp_path) == folder / "checkpoints/last.ckpt"
    (folder / requeue.MARK).write_text("{")
    assert requeue.checkpoint_of_this_job(tmp_path) is None, "a damaged mark is none"
    requeue.mark(folder)
    for name, value in (("SLURM_JOB_ID", "1235"), ("SLURM_JOB_NAME", "bash")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert requeue.checkpoint_of_this_job(tmp_path) is None
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", "fit", "--name", "other"])
        assert requeue.checkpoint_of_this_job(tmp_path) is None
    requeue.unmark(folder)
    assert requeue.checkpoint_of_this_job(tmp_path) is None
