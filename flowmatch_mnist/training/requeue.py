"""Requeueing: SLURM stops a job and starts it again. A job marks its run's folder, so the same command resumes there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.environments import SLURMEnvironment

from flowmatch_mnist.support.files import save_json

MARK = "slurm.json"
"""The name of the file in a run's folder that describes the job that trains there."""


def this_job() -> dict[str, Any] | None:
    """Return this job's number and arguments, which stay the same when SLURM starts it again, or None outside SLURM."""
    if not SLURMEnvironment.detect():
        return None
    return {"job": os.environ.get("SLURM_JOB_ID"), "command": sys.argv[1:]}


def mark(folder: Path) -> None:
    """Write into a run's folder that this job trains there."""
    if (job := this_job()) is not None:
        save_json(folder / MARK, job)


def unmark(folder: Path) -> None:
    """Remove the mark of a run that has ended, so the same command starts a new run."""
    (folder / MARK).unlink(missing_ok=True)


def checkpoint_of_this_job(parent: Path) -> Path | None:
    """Return the `last.ckpt` of the unfinished run of this job, among the versions in a folder, or None if there is none."""
    job = this_job()
    if job is None:
        return None
    for path in parent.glob(f"*/{MARK}"):
        checkpoint = path.parent / "checkpoints" / "last.ckpt"
        try:
            marked = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # a damaged mark does not count
        if marked == job and checkpoint.is_file():
            return checkpoint
    return None


def requeue() -> str:
    """Ask SLURM to start this job again. Return a message with the answer."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else os.environ.get("SLURM_JOB_ID", "")
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"SLURM was not asked to start job {job} again: scontrol: {error.strerror}"
    if done.returncode:
        return f"SLURM does not start job {job} again: {' '.join(done.stderr.split())}"
    return f"SLURM starts job {job} again, and the run resumes"
