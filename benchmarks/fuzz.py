"""Does every damaged, foreign or mistyped input get one line of error, and nothing else?

    python benchmarks/fuzz.py                       1,000 corruptions of each kind of file, 300 commands, about ten minutes
    python benchmarks/fuzz.py --corruptions 50 --commands 30

The script damages files: a checkpoint, weights, data, a config, a picture. It cuts them off, flips bits, sets stretches to
zero, swaps bytes, fills in noise, or replaces the file. The package must refuse each with one line, or return exactly the
result of the undamaged file. (A damaged config may also be valid with another meaning.) Malformed commands must end with
status 2 and one line. A traceback, another status, a result from damaged content, a changed file, or half a minute without an
answer is a slip. The script ends with status 1 if there is a slip.
"""

import argparse
import contextlib
import gzip
import io
import itertools
import logging
import random
import runpy
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Trainer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from flowmatch_mnist.evaluation.classifiers import weights_of
from flowmatch_mnist.images import mnist
from flowmatch_mnist.networks.unet import UNet
from flowmatch_mnist.sampling.generate import Flow, Sampler
from flowmatch_mnist.sampling.weights import DESCRIPTION_KEY, load, save
from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.support.files import save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "tiny.yaml"


def corrupt(content: bytes, rng: random.Random) -> bytes:
    """Return the content with one random damage."""
    kind = rng.choice(["cut", "flip", "flip", "zero", "swap", "noise", "foreign"])
    start, length = rng.randrange(len(content)), rng.choice([1, 4, 64, 4096])
    stretch = slice(start, start + length)
    damaged = bytearray(content)
    match kind:
        case "cut":
            del damaged[start:]
        case "flip":
            for _ in range(rng.choice([1, 1, 8])):
                damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        case "zero":
            damaged[stretch] = bytes(len(damaged[stretch]))
        case "swap":
            other = rng.randrange(len(content))
            damaged[start], damaged[other] = damaged[other], damaged[start]
        case "noise":
            damaged[stretch] = rng.randbytes(len(damaged[stretch]))
        case "foreign":
            return rng.choice(
                [b"", b"\x80\x04K*.", b"PK\x03\x04", b"{}", rng.randbytes(length), content + rng.randbytes(length)]
            )
    return bytes(damaged)


class SlowError(Exception):
    """A call took longer than its time limit."""


@contextlib.contextmanager
def patience(seconds: int = 30) -> Iterator[None]:
    """Raise SlowError if the block takes longer."""

    def give_up(*_: Any) -> None:
        raise SlowError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def plain(value: Any) -> Any:
    """Return a form of the value that can be compared with ==. Tensors are compared by their bytes."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, value.contiguous().numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def take_checkpoint(path: Path) -> Any:
    """Return the weights and settings with which `sample.py` would draw."""
    flow, sampler = load(path)
    return plain(flow.net.state_dict()), flow.describe(sampler)


def take_picture(path: Path) -> Any:
    """Draw from the picture's noise. The drawn pixels may differ, because a PNG itself says where it ends."""
    return run_command(
        "sample.py",
        "3",
        "--checkpoint",
        path.with_name("tiny.ckpt"),
        "--from-image",
        f"{path}:3",
        "--out",
        path.with_name("o.png"),
    )


@dataclass
class Kind:
    """A kind of file: its undamaged content, its name, and the function that reads it."""

    content: bytes
    name: str
    take: Callable[[Path], Any]


def kinds(folder: Path, data_dir: Path) -> dict[str, Kind]:
    """Return all kinds of files, made from genuine ones in `folder`."""
    checkpoint = folder / "tiny.ckpt"
    torch.manual_seed(0)
    flow = Flow(UNet((4, 8, 8), (1, 2, 2)))
    weights = {f"net.{name}": value for name, value in flow.net.state_dict().items()}
    sampler, model = Sampler(steps=1, solver="euler"), folder / "tiny.safetensors"
    save(model, flow, sampler, {"seed": "0"})
    save_checkpoint(checkpoint, {"state_dict": weights, DESCRIPTION_KEY: flow.describe(sampler), "global_step": 1})
    images, labels = (mnist.genuine_content(data_dir, name) for name in mnist.FILES["test"])
    assert images is not None and labels is not None
    (folder / mnist.FILES["test"][0]).write_bytes(images)
    picture = io.BytesIO()
    Image.fromarray(mnist.load(data_dir, "test")[0][0].numpy()).save(picture, "png")

    def take_data(path: Path) -> Any:
        return plain(mnist.load(path.parent, "test"))

    return {
        "checkpoint": Kind(checkpoint.read_bytes(), "broken.ckpt", take_checkpoint),
        "weights": Kind(model.read_bytes(), "broken.safetensors", take_checkpoint),
        "data": Kind(labels, mnist.FILES["test"][1], take_data),
        "data, gzipped": Kind(gzip.compress(labels, mtime=0), mnist.FILES["test"][1] + ".gz", take_data),
        "config": Kind(TINY.read_bytes(), "broken.yaml", lambda path: run_command("train.py", "fit", "--config", path)),
        "picture": Kind(picture.getvalue(), "broken.png", take_picture),
    }


def call(script: str, *arguments: object) -> tuple[int, str, str]:
    """Run train.py or sample.py within this process, which saves the start of a new one. Return (status, stdout, stderr)."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    log = logging.getLogger("flowmatch_mnist")
    handlers, at_sigterm = list(log.handlers), signal.getsignal(signal.SIGTERM)
    with mock.patch.object(sys, "argv", [script, *map(str, arguments)]):
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as ended:
            status = int(ended.code or 0)
        finally:
            log.handlers = handlers
            signal.signal(signal.SIGTERM, at_sigterm)
    return status, out.getvalue(), err.getvalue()


def run_command(script: str, *arguments: object) -> None:
    """Run a command without the training itself.

    Raises:
        UserError: with the command's one line of error.
        AssertionError: if the command ended in any other way.
    """
    # Nothing is trained, because this script tests only what happens before.
    with mock.patch.object(Trainer, "_fit_impl"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        status, _, err = call(script, *arguments)
    if status:
        lines = err.splitlines()
        if status != 2 or len(lines) != 1 or not lines[0].startswith("error: "):
            raise AssertionError(f"status {status}: {err}")
        raise UserError(lines[0])


def slip(act: Callable[[], Any]) -> tuple[str, Any]:
    """Call `act`. Return ("refused", line), ("accepted", result) or ("slip", description)."""
    try:
        with patience():
            return "accepted", act()
    except UserError as error:
        message = str(error)
        return ("refused", message) if "\n" not in message else ("slip", f"more than one line: {message}")
    except SlowError:
        return "slip", "no answer in half a minute"
    except BaseException:
        lines = traceback.format_exc().splitlines()
        return "slip", " | ".join(line.strip() for line in [*[x for x in lines if "flowmatch_mnist/" in x][-2:], lines[-1]])


def fuzz_files(count: int, seed: int, folder: Path, data_dir: Path) -> dict[str, tuple[dict[str, int], list[str]]]:
    """Corrupt each kind of file `count` times. Return the counts of outcomes and the slips, by kind."""
    results = {}
    for what, kind in kinds(folder, data_dir).items():
        rng = random.Random(f"{seed} {what}")
        path = folder / kind.name
        path.write_bytes(kind.content)
        whole = kind.take(path)
        counts, slips = {"refused": 0, "accepted": 0, "slip": 0}, []
        for i in track(range(count), what, transient=True):
            content = corrupt(kind.content, rng)
            path.write_bytes(content)
            outcome, result = slip(lambda kind=kind, path=path: kind.take(path))
            if outcome == "accepted" and result != whole:
                outcome, result = "slip", "a result from damaged content"
            if path.read_bytes() != content:
                outcome, result = "slip", "the file was changed"
            counts[outcome] += 1
            if outcome == "slip":
                slips.append(f"{what} {i}: {result}")
        path.unlink()
        results[what] = (counts, slips)
    return results


WORDS = ["", "x", "-1", "0", "nan", "inf", "1e400", "3.5", "[1", "{}", "null", "ß", "10-3", "9-", "🦆", "--", "../..", "a: b"]


def malformed(rng: random.Random, checkpoint: Path) -> list[str]:
    """Return a random malformed command."""
    word = rng.choice(WORDS)
    number = str(-rng.randrange(1, 10**9))
    sample = [
        [rng.choice(["10", "x", "-3", "3-1", "7.0", "", "0-10", "🦆"])],
        [],
        ["3", "--per-class", rng.choice(["0", "-2", "x", "1.5", "nan", ""])],
        ["3", "--steps", rng.choice(["0", "-1", "x", "1e3"])],
        ["3", "--solver", rng.choice(["rk5", "Euler", ""])],
        ["3", "--guidance", rng.choice(["nan", "inf", "x", ""])],
        ["3", "--guidance-interval", rng.choice(["1-0", "0.2", "a-b", "0.1-1.5", "-"])],
        ["3", "--churn", rng.choice(["nan", "-1", "x"]), "--solver", "euler"],
        ["3", "--churn", "0.5", "--solver", "dpmpp_2m"],
        ["3", "--out", rng.choice(["x.jpg", "x", ".", "", "x.png/y.png", "x.npy"])],
        ["3", "--checkpoint", rng.choice(["nowhere.ckpt", ".", "/dev/null", str(TINY), str(weights_of("digitnet"))])],
        ["3", "--device", rng.choice(["gpu", "cuda:99", "x", "cpu:x"])],
        ["3", "--from-image", rng.choice(["x.png:3", "7", "test:10000", "test:-1", f"{TINY}:3", ".:3", ":"])],
        ["3", "--interpolate", rng.choice(["0", "-1", "x"])],
        ["3", "--batch-size", rng.choice(["0", "x"])],
        ["3", f"--{rng.choice(['label', 'ckpt', 'x y', 'guidence'])}", "1"],
    ]
    train = [
        [
            f"--{rng.choice(['model', 'data', 'trainer', 'ema', 'sampling', 'saving'])}.{rng.choice(['x', 'lr', 'steps_'])}",
            word,
        ],
        ["--trainer.max_epochs", rng.choice(["x", "1.5", "[1]", "-7"])],
        ["--data.batch_size", rng.choice(["0", "-3", "x", "1e99", "70000", number])],
        ["--data.val_size", rng.choice(["0", "60000", "x", number])],
        ["--data.num_workers", rng.choice(["-1", "x"])],
        ["--data.coupling", rng.choice(["OT", "x", ""])],
        ["--data", rng.choice(["x", "torch.nn.Linear", "os.system"])],
        ["--model.net", rng.choice(["x", "torch.nn.Linear", "os.system"])],
        ["--model.net.channels", rng.choice(["[4]", "[0,1,2]", "x", "[]", "[4,4,-4]"])],
        ["--model.times", rng.choice(["x", "os.system"])],
        ["--model.path", rng.choice(["x", "Linear", "[]"])],
        ["--model.prediction", rng.choice(["x", "score"])],
        ["--model.label_dropout", rng.choice(["2", "-0.1", "x"])],
        ["--model.warmup_steps", rng.choice(["-1", "x"])],
        ["--model.sampler.solver", rng.choice(["x", "rk5"])],
        ["--model.sampler.steps", rng.choice(["0", "x", "-2"])],
        ["--model.optimizer", rng.choice(["x", "os.system", "torch.nn.Linear"])],
        ["--model.on_non_finite", rng.choice(["x", "ignore"])],
        ["--ema.decay", rng.choice(["1", "-1", "x"])],
        ["--saving.every_n_minutes", rng.choice(["-1", "x"])],
        ["--sampling.rows", rng.choice(["0", "x"])],
        ["--evaluation.samples", rng.choice(["1", "x"])],
        ["--ckpt_path", rng.choice(["nowhere.ckpt", "last", "best", ".", "/dev/null", str(TINY)])],
        ["--config", rng.choice(["nowhere.yaml", ".", "/dev/null/x", str(checkpoint)])],
        ["--seed_everything", rng.choice(["x", "1.5"])],
        ["--trainer.accelerator", rng.choice(["x", "tpux"])],
        ["--trainer.precision", rng.choice(["x", "7"])],
        ["--trainer.devices", rng.choice(["x", "-3"])],
        ["--trainer.strategy", rng.choice(["x", "dpp"])],
        [f"--{word or 'x'}", "1"],
        [rng.choice(["fitt", "train", "-x"])],
    ]
    if rng.random() < 0.35:
        return ["sample.py", "--checkpoint", str(checkpoint), *rng.choice(sample)]
    return ["train.py", "fit", "--config", str(TINY), "--trainer.accelerator", "cpu", *rng.choice(train)]


def fuzz_commands(count: int, seed: int, folder: Path) -> tuple[dict[str, int], list[str]]:
    """Try `count` malformed commands. Return the counts of outcomes, and the slips."""
    rng = random.Random(f"{seed} commands")
    checkpoint = folder / "tiny.ckpt"
    counts, slips = {"refused": 0, "slip": 0}, []
    before = sorted(path.name for path in folder.iterdir())
    for _ in track(range(count), "commands", transient=True):
        command = malformed(rng, checkpoint)
        outcome, result = slip(lambda command=command: run_command(*command))
        if outcome == "accepted":
            outcome, result = "slip", "the command was accepted"
        if (after := sorted(path.name for path in folder.iterdir())) != before:
            outcome, result = "slip", f"the command left files: {set(after) - set(before)}"
            before = after
        counts[outcome] += 1
        if outcome == "slip":
            slips.append(f"{command}: {result}")
    return counts, slips


def main() -> None:
    """Try all files and commands, and print a table and the slips."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corruptions", type=int, default=1000, help="corruptions of each kind of file (default: 1000)")
    parser.add_argument("--commands", type=int, default=300, help="number of malformed commands (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the damage (default: 0)")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="folder of MNIST, which is downloaded if missing")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the networks are too small for more
    mnist.prepare(options.data_dir)
    data_dir = options.data_dir.resolve()
    # A damaged number must not allocate all of the machine's memory.
    import resource  # Windows has none

    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
    console = Console()
    table = Table("what", "tried", "refused in a line", "harmless", "slips")
    all_slips: list[str] = []
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        folder = Path(name)
        for what, (counts, slips) in fuzz_files(options.corruptions, options.seed, folder, data_dir).items():
            table.add_row(what, *map(str, (options.corruptions, counts["refused"], counts["accepted"], counts["slip"])))
            all_slips += slips
        counts, slips = fuzz_commands(options.commands, options.seed, folder)
        table.add_row("commands", *map(str, (options.commands, counts["refused"], 0, counts["slip"])))
        all_slips += slips
    for one in itertools.islice(all_slips, 20):
        console.print(one, markup=False)
    console.print(table)
    raise SystemExit(int(bool(all_slips)))


if __name__ == "__main__":
    main()
