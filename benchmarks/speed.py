"""Compare images per second in training: Lightning, a bare PyTorch loop, and torchcfm's network.

    python benchmarks/speed.py
    pip install -e '.[rivals]' && python benchmarks/speed.py --torchcfm 2

Every `--every` steps a real `train.py` pauses. Then the same network takes as many steps in a bare PyTorch loop, with the same
precision, and compiled or not as there. Then torchcfm's conditional MNIST example takes a few steps in fp32, if `--torchcfm`
asks for them. The contenders alternate because other work may slow the machine. So the script reports ratios within a round.
The first steps of each turn do not count, because they find the memory as another contender left it.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from scoring import UNWATCHED

from flowmatch_mnist.images import mnist
from flowmatch_mnist.images.pixels import PIXELS
from flowmatch_mnist.support.devices import send
from flowmatch_mnist.training import cli
from flowmatch_mnist.training.module import FlowMatching

ROUNDS: list[list[float]] = []
"""Images per second in each round: for Lightning, for the bare loop, and for torchcfm if it takes part."""

UNTIMED = 5
"""Uncounted steps at the start of each turn. torchcfm has only one, because each of its steps takes seconds."""


class Bare:
    """A module's training without Lightning: it does not log, validate, save, show or check anything.

    Args:
        module: the module to copy.
        batch_size: images in a step.
        precision: makes Lightning's own context for the computation of the loss.
    """

    def __init__(self, module: FlowMatching, batch_size: int, precision: Callable[[], AbstractContextManager[None]]) -> None:
        self.net = copy.deepcopy(module.net)
        if module.compiles:
            self.net.compile()
        self.average = [p.detach().clone() for p in self.net.parameters()]
        self.optimizer = module.optimizer(self.net.parameters())
        self.images, self.labels = (values.to(module.device) for values in mnist.load(Path("data"), "train"))
        self.batch_size, self.objective, self.precision = batch_size, module.objective, precision
        self.generator = torch.Generator().manual_seed(0)

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw images (count, 1, 28, 28) in [-1, 1] and their labels (count,)."""
        batch = torch.randint(len(self.images), (count,), device=self.images.device)
        return PIXELS["linear"].encode(self.images[batch]), self.labels[batch]

    def step(self) -> None:
        """Take one training step."""
        x1, y = self.draw(self.batch_size)
        x0, t = torch.randn_like(x1), send(self.objective.density.sample(len(y), self.generator), x1.device)
        with self.precision():
            loss = self.objective(self.net, x0, x1, y, t).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.net.parameters()), 0.002)


def timed(step: Callable[[], object], count: int, untimed: int) -> float:
    """Take `untimed` steps, then `count` timed steps. Return the timed steps per second."""
    for _ in range(untimed):
        step()
    start = now()
    for _ in range(count):
        step()
    return count / (now() - start)


def now() -> float:
    """Return the seconds on a clock, after the GPU has finished its work, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


class Beside(Callback):
    """A callback that pauses the training and lets the other contenders take steps.

    Args:
        every: steps in a round.
        torchcfm: steps of torchcfm in a round.
    """

    def __init__(self, every: int = 25, torchcfm: int = 0) -> None:
        self.every, self.torchcfm = every, torchcfm
        self.since = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the other contenders."""
        self.batch_size = trainer.datamodule.batch_size  # type: ignore[attr-defined]
        precision = trainer.precision_plugin.forward_context
        self.bare = Bare(pl_module, self.batch_size, precision)  # type: ignore[arg-type]
        if self.torchcfm:
            from rivals import TorchCFM

            with pl_module.device:
                self.rival = TorchCFM()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Let the other contenders have their turn."""
        if batch_idx % self.every == UNTIMED:
            self.since = now()
        if batch_idx % self.every:
            return
        timed_steps = self.every - UNTIMED
        speeds = [timed_steps * self.batch_size / (now() - self.since)]
        speeds.append(timed(self.bare.step, timed_steps, UNTIMED) * self.batch_size)
        if self.torchcfm:
            drawn = partial(self.bare.draw, self.rival.batch_size)
            speeds.append(timed(lambda: self.rival.step(*drawn()), self.torchcfm, 1) * self.rival.batch_size)
        if batch_idx > self.every:  # the first round contains compiling
            ROUNDS.append(speeds)
            print(" ".join(f"{speed:8.1f}" for speed in speeds), flush=True)


def main() -> None:
    """Train with pauses, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--every", type=int, default=25, help="steps in a round (default: 25)")
    parser.add_argument("--torchcfm", type=int, default=0, metavar="STEPS", help="steps of torchcfm in a round (default: 0)")
    options = parser.parse_args()
    if options.every <= UNTIMED:
        parser.error(f"--every must be more than {UNTIMED}, the number of uncounted steps in a turn")
    steps = (options.rounds + 1) * options.every + 1
    sys.argv[1:] = ["fit", "--config", "configs/quick.yaml", "--name", "speed", "--trainer.max_steps", str(steps)]
    sys.argv += ["--trainer.callbacks+=speed.Beside", f"--trainer.callbacks.every={options.every}"]
    sys.argv += [f"--trainer.callbacks.torchcfm={options.torchcfm}", "--trainer.val_check_interval", "100000"]
    sys.argv += UNWATCHED
    print("images/s: Lightning, bare" + ", torchcfm" * bool(options.torchcfm))
    cli.main()
    rounds = sys.modules["speed"].ROUNDS
    for what, first, second in (("bare loop / Lightning", 1, 0), ("this network / torchcfm's", 0, 2)):
        if second < len(rounds[0]):
            ratios = [each[first] / each[second] for each in rounds]
            low, _, high = quantiles(ratios, n=4)
            print(f"{what}: {median(ratios):.3f} times the images/s (quartiles {low:.3f} to {high:.3f}, {len(ratios)} rounds)")


if __name__ == "__main__":
    main()
