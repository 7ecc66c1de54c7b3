"""From saved weights to digits by label. `sample.py` and the training's callbacks both call this."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowmatch_mnist import streams
from flowmatch_mnist.errors import UserError, one_line
from flowmatch_mnist.field import VelocityField
from flowmatch_mnist.guidance import GuidedVelocity
from flowmatch_mnist.pictures import to_uint8
from flowmatch_mnist.solvers import Velocity, check_solver, trajectory
from flowmatch_mnist.unet import UNet

KEY = "flowmatch_mnist"
"""Where in a checkpoint the description of its network stands."""

NETWORKS = {"UNet": UNet}
"""The networks that a checkpoint may name. A file from a stranger must not choose what is imported."""


@dataclass
class Sampler:
    """How digits are drawn.

    Args:
        steps: equal steps from noise to digit, at least 1.
        solver: euler, midpoint, heun, rk4 or dopri5; see `solvers.trajectory`.
        guidance: classifier-free guidance scale; 1 is off and 0 ignores the label.

    Raises:
        ValueError: if one of them is out of its range.
    """

    steps: int = 8
    solver: str = "midpoint"
    guidance: float = 1.0

    def __post_init__(self) -> None:
        check_solver(self.solver, self.steps)
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, got {self.guidance}")

    def states(self, velocity: Velocity, x0: Tensor) -> Iterator[Tensor]:
        """The states from the noise x0 (B, ...) to the digits: `steps` + 1 tensors of its shape."""
        return trajectory(velocity, x0, self.steps, self.solver)


def describe(net: VelocityField, sampler: Sampler) -> dict[str, Any]:
    """What a checkpoint says of its model, in plain values: the network, what builds it again, and how to sample it."""
    return {"network": type(net).__name__, "arguments": net.arguments, "sampler": asdict(sampler)}


def newest_checkpoint(runs: Path = Path("runs"), name: str = "*", file: str = "last.ckpt") -> Path:
    """The checkpoint called `file` that was written most recently, of the runs called `name` (any, by default).

    Raises:
        UserError: if there is none.
    """
    found = [path for path in runs.glob(f"{name}/version_*/checkpoints/{file}") if path.is_file()]
    if not found:
        raise UserError(f"no {file} of a run below {runs}/{name}; train a model with `python train.py`, or name a checkpoint")
    return max(found, key=lambda path: path.stat().st_mtime)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this project, on the CPU. Only tensors and plain values are read: no file can run code.

    Raises:
        UserError: if the file is missing, damaged, or not one of this project's checkpoints.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; check the path, or train one with `python train.py`")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damaged bytes happen to lead to
        raise UserError(f"cannot read {path}: it is damaged, or no checkpoint of this project; use another") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(KEY), dict) or "state_dict" not in checkpoint:
        raise UserError(f"{path} is no checkpoint of this project; use one that train.py wrote")
    return checkpoint


def load(path: Path, device: torch.device | str = "cpu") -> tuple[VelocityField, Sampler]:
    """The network of a checkpoint, with its averaged weights, ready to sample, and the sampler of its config.

    Raises:
        UserError: if the file is missing, damaged, of another shape than it says, or names an unknown network.
    """
    checkpoint = read_checkpoint(path)
    description = checkpoint[KEY]
    network = NETWORKS.get(description.get("network"))
    if network is None:
        known = ", ".join(NETWORKS)
        raise UserError(f"{path} holds a network {description.get('network')!r}; this program can build {known}")
    try:
        net = network(**description["arguments"])
        weights = {key.removeprefix("net."): value for key, value in checkpoint["state_dict"].items()}
        net.load_state_dict(weights)
        sampler = Sampler(**description["sampler"])
    except Exception as error:  # a damaged description can fail in any way a constructor can
        raise UserError(f"the weights in {path} do not fit its network: {one_line(error)[:200]}; use another") from error
    return net.to(device).eval(), sampler


def draw_noise(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard normal noise (count, *shape), one sample at a time, so that drawing it in batches gives the same stream."""
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(count)])


@dataclass
class Digits:
    """Drawn digits.

    Attributes:
        images: uint8 (N, H, W).
        labels: int64 (N,).
        evaluations: network evaluations for each digit (NFE); guidance counts twice. Of an adaptive solver, those of the
            batch that needed most.
        states: uint8 (steps + 1, N, H, W), the way from noise to digit, if it was asked for.
    """

    images: Tensor
    labels: Tensor
    evaluations: int
    states: Tensor | None = None


@torch.inference_mode()
def generate(
    net: VelocityField,
    labels: Tensor,
    sampler: Sampler,
    *,
    seed: int = 0,
    batch_size: int = 250,
    keep_states: bool = False,
    on_batch: Callable[[int], None] = lambda drawn: None,
) -> Digits:
    """Draw a digit for each label by integrating dx/dt = v(x, t, y) from noise at t=0 to t=1.

    The noise of the n-th digit depends on the seed and n alone, not on batch size or device. Memory is bounded by the batch;
    what is kept of each digit is one byte a pixel.

    Args:
        net: the velocity field; its `image_shape` is (1, H, W).
        labels: int64 (N,); `net.no_label` draws any digit.
        sampler: solver, steps and guidance.
        seed: of the noise.
        batch_size: how many digits are drawn at a time, at least 1.
        keep_states: whether to keep the states on the way too.
        on_batch: called after each batch with how many digits it drew.

    Raises:
        FloatingPointError: if the network puts out values that are not finite.
    """
    device = next(net.parameters()).device
    noise = streams.generator("cpu", seed, "sampling")
    was_training = net.training
    net.eval()
    kept = []
    evaluations = 0
    for y in labels.split(batch_size):
        velocity = GuidedVelocity(net, y.to(device), sampler.guidance)
        x0 = draw_noise(len(y), net.image_shape, noise).to(device)
        states: list[Tensor] = []
        for x in sampler.states(velocity, x0):
            # The states on the way are let go at once unless they are asked for.
            states = [*states, x] if keep_states else [x]
        if not states[-1].isfinite().all():
            raise FloatingPointError("the network puts out values that are not finite: its training diverged")
        kept.append(torch.stack([to_uint8(x).flatten(1, 2) for x in states]).cpu())
        evaluations = max(evaluations, velocity.evaluations)
        on_batch(len(y))
    net.train(was_training)
    drawn = torch.cat(kept, dim=1)
    return Digits(drawn[-1], labels, evaluations, drawn if keep_states else None)
