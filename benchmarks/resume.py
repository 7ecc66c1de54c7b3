"""Does a run that is killed again and again, and resumed each time, equal a run that was left alone?

    python benchmarks/resume.py                 20 kills in each of eight ways, about fifty minutes on two cores
    python benchmarks/resume.py --kills 3 --ways SIGKILL
    python benchmarks/resume.py --gpu           the same on a GPU, with deterministic algorithms

A small network with dropout trains for 300 steps, with Muon and averaged weights. Now and then it validates, draws pictures
and writes checkpoints. One run is left alone. A signal ends the others at random instants: during the start, a step, a
validation or the writing of a checkpoint. They resume with `--ckpt_path last` until they reach the end. In one way `max_time`
ends them instead of a signal. In another way EarlyStopping ends the run itself. Then the script compares bit for bit: all
weights, raw and averaged, the optimizer's state, the schedule, the counters, and every point of every curve in TensorBoard. It
ends with status 1 if anything differs.
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

from flowmatch_mnist.support.files import find_damage, load_checkpoint

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
    """A way to stop a run: the signal (None is `max_time`), whether all processes get it or only the first, and options."""

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
    """Start or resume the run in its own process group, and wait until training begins."""
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
    raise SystemExit(f"the run ended before training began, with status {process.wait()}:\n{printed}")


def last_checkpoint(folder: Path) -> Path:
    """Return the path of `last.ckpt` of the newest version."""
    return max(folder.glob("runs/killed/*/checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime)


def state(folder: Path) -> dict[str, Any]:
    """Return all that must be equal at the end: the last checkpoint's contents, and every point of every curve by its step."""
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
    """Return the names of the places where two states differ. Tensors are compared bit for bit."""
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
    """Run without a stop. Return the last state, the seconds to the first checkpoint, and the seconds from there to the end."""
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
    """Write the config into the folder of a run."""
    (folder / "config.yaml").write_text(CONFIG.replace("DATA_DIR", str(data_dir.resolve())))


def stop(process: subprocess.Popen[str], way: Way) -> str:
    """Send the signal, and wait for the end. Return a complaint if the end was wrong, else an empty text."""
    assert way.signal is not None
    if way.group:
        os.killpg(process.pid, way.signal)
    else:
        process.send_signal(way.signal)
    printed, _ = process.communicate(timeout=120)
    # The signal ended the process (before training began or after its end), or the run ended itself.
    expected = {-way.signal} if way.signal == KILL else {-way.signal, 128 + way.signal, 0}
    if process.returncode not in expected:
        return f"status {process.returncode} after {way.signal.name}: {printed}"
    if process.returncode == 128 + way.signal and not re.search("stopped by|interrupted", printed):
        return f"the run did not say that it was stopped: {printed}"
    return ""


def kill_and_resume(
    way: Way, kills: int, whole: dict[str, Any], seconds: tuple[float, float], data_dir: Path, rng: random.Random
) -> tuple[int, int, list[str]]:
    """Stop runs until `kills` kills are done, let each reach its end, and compare. Return (kills, runs, complaints)."""
    done, runs, wrong = 0, 0, []
    while done < kills:
        runs += 1
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            prepare(folder, data_dir)
            trained = 0.0
            while True:
                # One kill in five hits the start. The others are spaced to cover the whole run with so many kills.
                start, rest = seconds
                instant = rng.uniform(0, start) if rng.random() < 0.2 else start + rng.uniform(0, 2 * rest / max(kills, 4))
                patience = instant if done < kills else None
                if way.signal is None and patience is not None:
                    # max_time counts all parts together. If it is over already, the run does nothing, and says so.
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
                    if list(folder.glob("runs/*/*/checkpoints/last.ckpt")) and (hurt := find_damage(last_checkpoint(folder))):
                        wrong.append(f"last.ckpt: {hurt}")
                    continue
                if process.returncode:
                    wrong.append(f"a resumed run ended with status {process.returncode}: {printed}")
                break
            wrong += [f"differs: {what}" for what in differences(whole, state(folder))]
    return done, runs, wrong


def main() -> None:
    """Kill and compare in every way, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="number of kills in each way (default: 20)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways to stop a run (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the instants (default: 0)")
    parser.add_argument("--gpu", action="store_true", help="train on a GPU, with PyTorch's deterministic algorithms")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="folder of MNIST, which is downloaded if missing")
    options = parser.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it reports each point that it rightly leaves out
    console = Console()
    table = Table("stopped by", "kills", "runs", "equal to the bit")
    failed = False
    references: dict[tuple[str, ...], tuple[dict[str, Any], tuple[float, float]]] = {}
    device = GPU if options.gpu else []
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, cuBLAS is not deterministic
    single = options.gpu and torch.cuda.device_count() < 2
    for name in [way for way in options.ways if not (single and WAYS[way].options == TWO)]:
        way = replace(WAYS[name], options=[*WAYS[name].options, *device])
        # Workers change nothing, so runs with workers are compared with a run without.
        key = (*(WAYS[name].options if WAYS[name].options in (TWO, EARLY) else []), *device)
        if key not in references:
            references[key] = alone(list(key), options.data_dir)
        rng = random.Random(f"{options.seed} {name}")
        done, runs, wrong = kill_and_resume(way, options.kills, *references[key], options.data_dir, rng)
        table.add_row(name, str(done), str(runs), "yes" if not wrong else f"no: {len(wrong)} complaints")
        console.print(f"{name}: {done} kills in {runs} runs, {len(wrong)} complaints")
        for complaint in wrong[:10]:
            console.print(f"  {complaint[:2000]}", markup=False)
        failed |= bool(wrong)
    console.print(table)
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
