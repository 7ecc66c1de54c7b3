"""What differs between devices: which one is here, how wide its floats are, and how exact its products."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from flowmatch_mnist.support.errors import one_line

log = logging.getLogger(__name__)


def default_device() -> str:
    """The accelerator of this machine, such as "cuda" or "mps", or "cpu" where there is none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def compile_in_place(net: nn.Module, device: torch.device, mode: str | None) -> None:
    """Compile a network's calls, which leaves the names of its weights as they are; or say why that does not work here.

    Without a C++ compiler (on a processor) or Triton (on a GPU) it does not, and training goes on uncompiled.

    Args:
        net: the network.
        device: where it is.
        mode: of `torch.compile`.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2, device=device))
    except Exception as error:  # a compiler that is missing or broken can fail in any way
        why = one_line(error).partition(" Set TORCHDYNAMO")[0][:200]
        log.warning("training without torch.compile, which is slower; it does not work here: %s", why)
    else:
        net.compile(mode=mode)


def widest_float(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no wider one."""
    return torch.float32 if device.type == "mps" else torch.float64


def memory_used(device: torch.device) -> int | None:
    """The bytes of a GPU's memory that tensors took at most so far (of an Apple GPU, take now); None of a processor."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps" and torch.backends.mps.is_available():
        return torch.mps.driver_allocated_memory()
    return None


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute products and convolutions of float32 in float32. An NVIDIA GPU may else round their factors to 10 bits (TF32)."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
