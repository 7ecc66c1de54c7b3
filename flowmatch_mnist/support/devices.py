"""Differences between devices: the available device, its compiler, its widest float type, its memory, and exact products."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flowmatch_mnist.support.errors import UserError, one_line

log = logging.getLogger(__name__)


def default_device() -> str:
    """Return the type of this machine's accelerator, such as "cuda" or "mps", or "cpu" if there is none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def check_device(device: str) -> None:
    """Raise UserError if this computer cannot compute on a device of this name."""
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"there is no device {device!r} on this computer; use --device cpu") from error


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor from the CPU to a device. The host does not wait for the copy if this is safe.

    CUDA first copies the tensor to memory of its own. Other GPUs read the tensor's memory later. By then it may be free, and
    hold other values (PyTorch issue 189690).
    """
    return x.to(device, non_blocking=torch.device(device).type not in ("mps", "xpu"))


def default_batch_size(device: torch.device | str) -> int:
    """Return how many samples to draw at a time: a few fit in a CPU's caches, and many keep a GPU busy."""
    return 100 if torch.device(device).type == "cpu" else 1000


def compile_in_place(net: nn.Module, device: torch.device, mode: str | None) -> None:
    """Compile a network's calls without changing the names of its weights. If compiling does not work here, log the reason.

    Compiling needs a C++ compiler on a CPU, and Triton on a GPU. Without them, training goes on uncompiled.

    Args:
        net: the network.
        device: the network's device.
        mode: the mode of `torch.compile`.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2, device=device))
    except Exception as error:  # a missing or broken compiler can raise any error
        why = one_line(error).partition(" Set TORCHDYNAMO")[0][:200]
        log.warning("training without torch.compile, which is slower; it does not work here: %s", why)
    else:
        net.compile(mode=mode)


def widest_float(device: torch.device) -> torch.dtype:
    """Return float64, or float32 on Apple's GPUs, which have no wider float type."""
    return torch.float32 if device.type == "mps" else torch.float64


def memory_used(device: torch.device) -> int | None:
    """Return the peak memory of tensors on a GPU in bytes (on an Apple GPU, the memory in use now), or None on a CPU."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps" and torch.backends.mps.is_available():
        return torch.mps.driver_allocated_memory()
    return None


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 products and convolutions in float32. An NVIDIA GPU may otherwise round factors to 10 bits (TF32)."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
