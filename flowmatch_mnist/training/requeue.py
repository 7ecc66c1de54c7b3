"""SLURM stops a job and starts it anew: the job marks its run's folder, and the same command then resumes there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.environments import SLURMEnvironment

from flowmatch_mnist.support.files import save_json

MARK = "slurm.json"
"""The file in a run's folder that says which job trains there."""


def this_job() -> dict[str, Any] | None:
    """What a job has in common with itself when it is started anew; None outside SLURM."""
    if not SLURMEnvironment.detect():
        return None
    return {"job": os.environ.get("SLURM_JOB_ID"), "command": sys.argv[1:]}


def mark(folder: Path) -> None:
    """Note in a run's folder that this job trains there."""
    if (job := this_job()) is not None:
        save_json(folder / MARK, job)


def unmark(folder: Path) -> None:
    """The run has come to its end: the same command starts another."""
    (folder / MARK).unlink(missing_ok=True)


def checkpoint_of_this_job(parent: Path) -> Path | None:
    """`last.ckpt` of the unfinished run that this job was training, among the versions in a folder."""
    job = this_job()
    if job is None:
        return None
    for path in parent.glob(f"*/{MARK}"):
        checkpoint = path.parent / "checkpoints" / "last.ckpt"
        try:
            marked = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # a damaged mark is no mark
        if marked == job and checkpoint.is_file():
            return checkpoint
    return None


def requeue() -> str:
    """Ask SLURM to start this job anew; say whether it will."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}" if array else os.environ.get("SLURM_JOB_ID", "")
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"SLURM was not asked to start job {job} anew: scontrol: {error.strerror}"
    if done.returncode:
        return f"SLURM does not start job {job} anew: {' '.join(done.stderr.split())}"
    return f"SLURM starts job {job} anew, and the run resumes"
