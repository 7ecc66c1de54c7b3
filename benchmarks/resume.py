"""Is a run that is killed again and again, and goes on each time, the run that was left alone?

    python benchmarks/resume.py                 20 kills in each of eight ways, some fifty minutes on two cores
    python benchmarks/resume.py --kills 3 --ways SIGKILL
    python benchmarks/resume.py --gpu           the same on a GPU, by deterministic algorithms

A small network with dropout trains 300 steps: validation, pictures and checkpoints now and then, by Muon and an average of the
weights. One run is left alone. Others are ended by a signal at random instants, wherever in start, step, validation or the
writing of a checkpoint that may be, and go on with `--ckpt_path last`, until they come to the end. In one way it is no signal
that ends them but `max_time`; in another the run itself ends by EarlyStopping. Then all weights, raw and
averaged, the optimizer's state, the schedule, the counters, and every point of every curve in TensorBoard are compared, to the
bit. Ends with status 1 if anything differs.
"""

import argparse
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowmatch_mnist.support.files import damage, load_checkpoint

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
name: killed
seed_everything: 0
trainer:
  max_steps: 300
  max_epochs: 100
  limit_train_batches: 70
  limit_val_batches: 1
  val_check_interval: 45
  log_every_n_steps: 5
  gradient_clip_val: 1.0
  accelerator: cpu
  enable_progress_bar: false
model:
  net:
    class_path: flowmatch_mnist.networks.unet.UNet
    init_args: {channels: [4, 8, 8], blocks: [1, 2, 2], dropout: 0.1}
  optimizer: {class_path: flowmatch_mnist.training.muon.Muon, init_args: {lr: 4e-3}}
  warmup_steps: 20
  sampler: {steps: 2, solver: euler}
sampling: {every_n_epochs: 1, every_n_steps: 100, rows: 1}
saving: {every_n_steps: 7}
data:
  class_path: flowmatch_mnist.data.digits.MNISTDataModule
  init_args: {data_dir: DATA_DIR, batch_size: 16, val_size: 500, eval_batch_size: 50}
"""
GPU = ["--trainer.accelerator", "gpu", "--trainer.deterministic", "true"]
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # Windows has none
EARLY = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "loss/val"]
EARLY += ["--trainer.callbacks.min_delta", "0.05", "--trainer.callbacks.patience", "2"]
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "8"]


@dataclass
class Way:
    """A way of being stopped: by which signal (None is `max_time`), to all processes or the first, with which options."""

    signal: signal.Signals | None
    group: bool
    options: list[str]


WAYS = {
    "SIGKILL": Way(KILL, True, []),
    "SIGTERM": Way(signal.SIGTERM, False, []),
    "Ctrl-C": Way(signal.SIGINT, True, ["--data.num_workers", "2"]),
    "max_time": Way(None, False, []),
    "SIGKILL, EarlyStopping": Way(KILL, True, EARLY),
    "SIGKILL, two workers": Way(KILL, True, ["--data.num_workers", "2"]),
    "SIGKILL, two processes": Way(KILL, True, TWO),
    "SIGTERM, two processes": Way(signal.SIGTERM, False, TWO),
}


def train(folder: Path, options: list[str]) -> subprocess.Popen[str]:
    """Start the run, or go on with it, in a group of processes of its own, and wait until it begins."""
    going_on = ["--ckpt_path", "last"] if list(folder.glob("runs/*/*/checkpoints/last.ckpt")) else []
    command = [sys.executable, str(ROOT / "train.py"), "fit", "--config", str(folder / "config.yaml"), *options, *going_on]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if line.startswith("training "):
            return process
    raise SystemExit(f"the run ended before it began, with status {process.wait()}:\n{printed}")


def last_checkpoint(folder: Path) -> Path:
    """`last.ckpt` of the newest version."""
    return max(folder.glob("runs/killed/*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)


def state(folder: Path) -> dict[str, Any]:
    """All that must be equal at the end: what the last checkpoint holds, and every point of every curve, by its step."""
    path = last_checkpoint(folder)
    held = load_checkpoint(path)
    kept = {key: held[key] for key in ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step")}
    kept["best"] = load_checkpoint(path.with_name("best.ckpt"))["state_dict"]
    kept["progress"] = held["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    log = EventAccumulator(str(path.parent.parent), size_guidance={"scalars": 0, "images": 0}).Reload()
    for tag in log.Tags()["scalars"]:
        if not tag.startswith("speed/"):
            kept[tag] = [(event.step, event.value) for event in log.Scalars(tag)]
    for tag in log.Tags()["images"]:
        kept[tag] = [(event.step, event.encoded_image_string) for event in log.Images(tag)]
    return kept


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two states differ, in words; tensors are compared to the bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = [*one, *(name for name in other if name not in one)]
        return [d for name in names for d in differences(one.get(name), other.get(name), f"{where} {name}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [where.strip()]
    if isinstance(one, list) and isinstance(other, list) and not (one and isinstance(one[0], tuple)):
        if len(one) != len(other):
            return [where.strip()]
        return [d for i, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{where} {i}")]
    return [] if one == other else [where.strip()]


def alone(options: list[str], data_dir: Path) -> tuple[dict[str, Any], tuple[float, float]]:
    """The state at the end of a run that is left alone, and the seconds to its first checkpoint, and from there to its end."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, data_dir)
        process = train(folder, options)
        begun = time.monotonic()
        while process.poll() is None and not list(folder.glob("runs/*/*/checkpoints/last.ckpt")):
            time.sleep(0.05)
        saved = time.monotonic()
        printed, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"the run that was left alone ended with status {process.returncode}:\n{printed}")
        return state(folder), (saved - begun, time.monotonic() - saved)


def prepare(folder: Path, data_dir: Path) -> None:
    """Lay out a folder to train in."""
    (folder / "config.yaml").write_text(CONFIG.replace("DATA_DIR", str(data_dir.resolve())))


def stop(process: subprocess.Popen[str], way: Way) -> str:
    """Send the signal, wait for the end, and say what was wrong with it, if anything."""
    assert way.signal is not None
    if way.group:
        os.killpg(process.pid, way.signal)
    else:
        process.send_signal(way.signal)
    printed, _ = process.communicate(timeout=120)
    # Ended by the signal itself, before training began or after it was over, or by the run's own doing.
    expected = {-way.signal} if way.signal == KILL else {-way.signal, 128 + way.signal, 0}
    if process.returncode not in expected:
        return f"status {process.returncode} after {way.signal.name}: {printed}"
    if process.returncode == 128 + way.signal and not re.search("stopped by|interrupted", printed):
        return f"no word of being stopped: {printed}"
    return ""


def kill_and_resume(
    way: Way, kills: int, whole: dict[str, Any], seconds: tuple[float, float], data_dir: Path, dice: random.Random
) -> tuple[int, int, list[str]]:
    """Stop runs until so many kills are done, let each come to its end, and compare: (kills, runs, what was wrong)."""
    done, runs, wrong = 0, 0, []
    while done < kills:
        runs += 1
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepare(folder, data_dir)
            trained = 0.0
            while True:
                # Now and then before it has begun; else so that the whole run is gone through in that many kills.
                start, rest = seconds
                instant = dice.uniform(0, start) if dice.random() < 0.2 else start + dice.uniform(0, 2 * rest / max(kills, 4))
                patience = instant if done < kills else None
                if way.signal is None and patience is not None:
                    # The time of all parts together; one that is over already leaves nothing to do, and says so.
                    trained += max(patience, 0.05)
                    limit = f'{{"milliseconds": {round(1000 * trained)}}}'
                    printed, _ = (process := train(folder, [*way.options, "--trainer.max_time", limit])).communicate()
                    done += "max_time is over" in printed
                    if process.returncode or "max_time is over" not in printed:
                        wrong += [f"max_time: {printed}"] * bool(process.returncode)
                        break
                    continue
                process = train(folder, way.options)
                try:
                    printed, _ = process.communicate(timeout=patience)
                except subprocess.TimeoutExpired:
                    done += 1
                    if complaint := stop(process, way):
                        wrong.append(complaint)
                    if list(folder.glob("runs/*/*/checkpoints/last.ckpt")) and (hurt := damage(last_checkpoint(folder))):
                        wrong.append(f"last.ckpt: {hurt}")
                    continue
                if process.returncode:
                    wrong.append(f"a run that went on ended with status {process.returncode}: {printed}")
                break
            wrong += [f"differs: {what}" for what in differences(whole, state(folder))]
    return done, runs, wrong


def main() -> None:
    """Parse the command line, kill, compare, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="in each way (default: 20)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of being stopped (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the instants (default: 0)")
    parser.add_argument("--gpu", action="store_true", help="train on a GPU, by PyTorch's deterministic algorithms")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="where MNIST is, or is put")
    options = parser.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of each point that it leaves out, as it should
    console = Console()
    table = Table("stopped by", "kills", "runs", "equal to the bit")
    failed = False
    references: dict[tuple[str, ...], tuple[dict[str, Any], tuple[float, float]]] = {}
    device = GPU if options.gpu else []
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS is not deterministic
    for name in options.ways:
        way = replace(WAYS[name], options=[*WAYS[name].options, *device])
        # Workers change nothing, so those runs are compared with one that has none.
        key = (*(WAYS[name].options if WAYS[name].options in (TWO, EARLY) else []), *device)
        if key not in references:
            references[key] = alone(list(key), options.data_dir)
        dice = random.Random(f"{options.seed} {name}")
        done, runs, wrong = kill_and_resume(way, options.kills, *references[key], options.data_dir, dice)
        table.add_row(name, str(done), str(runs), "yes" if not wrong else f"no: {len(wrong)} complaints")
        console.print(f"{name}: {done} kills in {runs} runs, {len(wrong)} complaints")
        for complaint in wrong[:10]:
            console.print(f"  {complaint[:2000]}", markup=False)
        failed |= bool(wrong)
    console.print(table)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
