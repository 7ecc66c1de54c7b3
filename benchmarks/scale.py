"""Measure training throughput for several batch sizes, widths and numbers of processes: does an image always cost the same?

    python benchmarks/scale.py

A step is forward pass, backward pass, clipping and optimizer step. It is compiled, channels last, and has training's default
precision. The network is that of `configs/quick.yaml`, with other widths where the table says so. Machines are noisy: so the
settings alternate, and the script prints the median of their ratios to the first setting. PyTorch counts the operations of
convolutions and matrix products, forward and backward. The share of the ceiling is the rate of these operations, divided by the
rate of a product of large matrices in the same turns. Processes share the cores, as with `--trainer.devices`.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from rich.console import Console
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from flowmatch_mnist.networks.unet import UNet
from flowmatch_mnist.support.devices import default_device
from flowmatch_mnist.training.cli import native_precision
from flowmatch_mnist.training.muon import Muon

CONFIG = yaml.safe_load((Path(__file__).resolve().parent.parent / "configs" / "quick.yaml").read_text())
NETWORK: dict[str, Any] = CONFIG["model"]["net"]["init_args"]
WIDTHS: tuple[int, ...] = tuple(NETWORK["channels"])
BATCH: int = CONFIG["data"]["init_args"]["batch_size"]


def dtype(device: str) -> torch.dtype:
    """Return the data type of matrix products: bf16 where the hardware computes in it, else fp32."""
    return torch.bfloat16 if native_precision(device) == "bf16-mixed" else torch.float32


class Step:
    """A training step of a network with these widths, on batches of this size."""

    def __init__(self, widths: tuple[int, ...], batch: int, device: str, parallel: bool = False) -> None:
        self.batch, self.device, self.mixed = batch, device, dtype(device) == torch.bfloat16
        net = UNet(**{**NETWORK, "channels": widths}).to(device, memory_format=torch.channels_last)
        shape = (batch, 1, 28, 28)
        self.x, self.u = torch.randn(shape, device=device), torch.randn(shape, device=device)
        self.t, self.y = torch.rand(batch, device=device), torch.randint(0, 10, (batch,), device=device)
        with FlopCounterMode(display=False) as counter:
            net(self.x, self.t, self.y).sum().backward()
        self.operations = counter.get_total_flops()
        net.compile()
        self.net = DistributedDataParallel(net) if parallel else net
        self.optimizer = Muon(net.parameters())
        for _ in range(3):
            self.seconds()

    def seconds(self) -> float:
        """Take one step, and return its seconds."""
        start = time.perf_counter()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.mixed):
            loss = (self.net(self.x, self.t, self.y) - self.u).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - start


def product_rate(device: str) -> float:
    """Return the operations per second of a product of two matrices with 2,048 rows and columns."""
    a = torch.randn(2048, 2048, device=device, dtype=dtype(device))
    start = time.perf_counter()
    (a @ a)[0, 0].item()
    return 2 * 2048**3 / (time.perf_counter() - start)


def one_of(rank: int, processes: int, threads: int, turns: int, meeting: str, results: "mp.SimpleQueue[float]") -> None:
    """Run one process among several. The first puts the images per second of all of them into the queue `results`."""
    torch.set_num_threads(max(1, threads // processes))
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=processes)
    step = Step(WIDTHS, BATCH // processes, "cpu", parallel=True)
    if rank == 0:
        results.put(BATCH / median(step.seconds() for _ in range(turns)))
    else:
        for _ in range(turns):
            step.seconds()
    dist.destroy_process_group()


def main() -> None:
    """Measure all settings in turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="*", default=[16, 32, 128, 256])
    parser.add_argument("--factors", type=float, nargs="*", default=[0.5, 2.0], help="multiples of the widths (default: 0.5 2)")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--device", default=default_device())
    options = parser.parse_args()
    settings = [(WIDTHS, BATCH)] + [(WIDTHS, batch) for batch in options.batches]
    settings += [(tuple(round(factor * width) for width in WIDTHS), BATCH) for factor in options.factors]
    torch._dynamo.config.recompile_limit = 10 * len(settings)
    steps = [Step(widths, batch, options.device) for widths, batch in settings]
    turns = [([step.seconds() for step in steps], product_rate(options.device)) for _ in range(options.turns)]
    table = Table("widths", "batch", "images/s", "over the first", "MFLOP an image", "share of the ceiling")
    for number, ((widths, batch), step) in enumerate(zip(settings, steps, strict=True)):
        rate = median(batch / seconds[number] for seconds, _ in turns)
        ratio = median(batch / seconds[number] * seconds[0] / BATCH for seconds, _ in turns)
        share = median(step.operations / seconds[number] / ceiling for seconds, ceiling in turns)
        cost = f"{step.operations / batch / 1e6:.0f}"
        table.add_row("/".join(map(str, widths)), str(batch), f"{rate:.0f}", f"{ratio:.2f}", cost, f"{share:.0%}")
    Console().print(table)
    if options.device == "cpu":
        for processes in options.processes:
            results = mp.get_context("spawn").SimpleQueue()
            with tempfile.TemporaryDirectory() as folder:
                arguments = (processes, torch.get_num_threads(), options.turns, f"{folder}/meeting", results)
                mp.start_processes(one_of, arguments, nprocs=processes, start_method="spawn")
            print(f"{processes} processes of batch {BATCH // processes}: {results.get():.0f} images/s", flush=True)


if __name__ == "__main__":
    main()
