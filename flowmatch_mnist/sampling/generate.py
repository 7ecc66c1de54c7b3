"""Drawing samples by label with a network. `sample.py` and the training callbacks both use this module."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from flowmatch_mnist.flow.guidance import Guided
from flowmatch_mnist.flow.paths import PATHS, PathName
from flowmatch_mnist.flow.predictions import Prediction, StraightVelocity
from flowmatch_mnist.flow.solvers import FreshNoise, check_solver, time_grid, trajectory
from flowmatch_mnist.images.pictures import as_png, grid
from flowmatch_mnist.networks.base import Network
from flowmatch_mnist.sampling.units import UNITS, Units
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.choices import Spacing
from flowmatch_mnist.support.devices import default_batch_size, send


@dataclass
class Sampler:
    """The settings for drawing samples.

    Args:
        steps: number of steps from noise to data, at least 1.
        solver: euler, midpoint, heun, rk4, dpmpp_2m, average or dopri5; see `solvers.trajectory`.
        guidance: classifier-free guidance scale; 1 is off, and 0 ignores the label in the interval.
        guidance_interval: the first and the last t with guidance, in the time of the path that the network was trained on.
        spacing: spacing of the steps: uniform in the time of that path, or log_snr.
        churn: how much of the noise is renewed during sampling; 0 is none (the ODE), 1 is DDPM's ancestral sampling.
        guidance_power: 0 guides all samples alike; above 0, guidance is stronger where the label is in doubt, see `guide`.

    Raises:
        ValueError: if a setting is out of its range, or the settings do not work together.
    """

    steps: int = 8
    solver: str = "midpoint"
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    spacing: Spacing = "uniform"
    churn: float = 0.0
    guidance_power: float = 0.0

    def __post_init__(self) -> None:
        check_solver(self.solver, self.steps, self.spacing, self.churn)
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be a finite number, got {self.guidance}")
        start, end = self.guidance_interval
        self.guidance_interval = (start, end)  # a list, if it was read from a file
        if not 0 <= start <= end <= 1:
            raise ValueError(f"guidance_interval must satisfy 0 <= start <= end <= 1, got {start} to {end}")
        if not 0 <= self.guidance_power < math.inf:
            raise ValueError(f"guidance_power must be at least 0, and finite, got {self.guidance_power}")

    @property
    def reversible(self) -> bool:
        """Return whether the sampler can also integrate from data to noise."""
        return not self.churn and self.solver not in ("dpmpp_2m", "average")

    def description(self) -> str:
        """Return the solver, the steps, the guidance and other settings that are not at their defaults, in words."""
        words = [self.solver, f"{self.steps} step{'s' * (self.steps > 1)}", f"guidance {self.guidance:g}"]
        if self.guidance != 1:
            words[-1] += f" with power {self.guidance_power:g}" if self.guidance_power else ""
            words[-1] += " from t = {:g} to {:g}".format(*self.guidance_interval) if self.guidance_interval != (0, 1) else ""
        if self.spacing != "uniform":
            words.append(f"spacing {self.spacing}")
        if self.churn:
            words.append(f"churn {self.churn:g}")
        return ", ".join(words)


@dataclass
class Flow:
    """A network and the meaning of its output: together, all that sampling needs.

    Attributes:
        net: the network.
        path: the name of the path that the network was trained on.
        prediction: the network's prediction target.
        units: the units of its samples.
        one_step: whether the network learned only the one step from noise to data, as in `configs/distill.yaml`.
    """

    net: Network
    path: PathName = "linear"
    prediction: Prediction = "velocity"
    units: Units = UNITS["linear"]
    one_step: bool = False

    def check(self, sampler: Sampler) -> None:
        """Raise ValueError if the sampler needs mean velocities, or several steps, that the network did not learn."""
        if sampler.solver == "average" and not self.net.spans:
            raise ValueError("solver average needs a network of mean velocities (configs/meanflow.yaml); use another solver")
        only = "average" if self.one_step and self.net.spans else "euler"
        if self.one_step and (sampler.steps > 1 or sampler.solver != only):
            raise ValueError(f"the network learned only one step from noise to data; use 1 step of {only}, or other weights")

    def times(self, sampler: Sampler) -> list[float]:
        """Return the times of the sampler's steps on the straight path, from 0 to 1."""
        times: list[float] = time_grid(sampler.steps, sampler.spacing, PATHS[self.path]).tolist()
        return times

    def guided(self, y: Tensor, sampler: Sampler) -> Guided:
        """Return the network with fixed labels y (B,) and the sampler's guidance. It counts its evaluations."""
        how = (sampler.guidance, sampler.guidance_interval, sampler.guidance_power)
        return Guided(self.net, y, *how, path=PATHS[self.path], prediction=self.prediction)

    def states(
        self,
        guided: Guided,
        x: Tensor,
        sampler: Sampler,
        *,
        fresh_noise: FreshNoise | None = None,
        backwards: bool = False,
        times: Sequence[float] | None = None,
    ) -> Iterator[Tensor]:
        """Return the states from noise to data one by one: `sampler.steps` + 1 tensors like x (B, ...). The first is x.

        Args:
            guided: the network, from `guided`.
            x: the noise to start from, or with `backwards` the data.
            sampler: the settings.
            fresh_noise: the source of the noise for churn.
            backwards: whether to integrate from data to noise instead.
            times: the times of the steps on the straight path, from 0 to 1; by default the sampler's.

        Raises:
            ValueError: if the network does not support the sampler, or `backwards` is used with one that is not reversible.
            FloatingPointError: if a state is not finite.
        """
        self.check(sampler)
        times = self.times(sampler) if times is None else times
        if backwards:
            if not sampler.reversible:
                raise ValueError(f"{sampler.description()} cannot integrate from data to noise; use another solver, or churn 0")
            times = times[::-1]
        velocity = StraightVelocity(guided, PATHS[self.path], self.prediction)
        return trajectory(velocity, x, times, sampler.solver, churn=sampler.churn, fresh_noise=fresh_noise)

    def describe(self, sampler: Sampler) -> dict[str, Any]:
        """Return the model's description for a checkpoint, in plain values: how to build it again, and how to sample it."""
        return {
            "network": type(self.net).__name__,
            "arguments": self.net.arguments,
            "path": self.path,
            "prediction": self.prediction,
            "units": self.units.name,
            "sampler": asdict(sampler) | {"guidance_interval": list(sampler.guidance_interval)},
            **({"one_step": True} if self.one_step else {}),
        }


def draw_noise(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return standard normal noise (count, *shape). It is drawn sample by sample, so the batch size does not change it."""
    return torch.stack([torch.randn(shape, generator=generator) for _ in range(count)])


def churn_noise(seed: int, numbers: Iterable[int], shape: tuple[int, ...], device: torch.device) -> FreshNoise:
    """Return a source of noise for the samples with these numbers, one stream for each: (samples, *shape) at each call."""
    generators = [streams.generator("cpu", seed, "churn", n) for n in numbers]
    none = torch.empty(0, *shape)  # `cat` needs a tensor even if there are no samples
    return lambda: send(torch.cat([none, *(torch.randn(1, *shape, generator=g) for g in generators)]), device)


@dataclass
class Samples:
    """The samples that were drawn.

    Attributes:
        values: (N, ...), one for each label; for digits, images uint8 (N, H, W).
        labels: int64 (N,).
        evaluations: network evaluations (NFE) for each sample; an evaluation with guidance counts as two. For an adaptive
            solver, the number is from the batch that needed most.
        states: (steps + 1, N, ...), the trajectories from noise to data, or None if they were not kept.
    """

    values: Tensor
    labels: Tensor
    evaluations: int
    states: Tensor | None = None

    def _repr_png_(self) -> bytes | None:
        """Return the images for a notebook, in a grid of ten columns, or fewer for fewer images; None for other samples."""
        return as_png(grid(self.values, min(10, len(self.values)))) if self.values.dtype == torch.uint8 else None


@torch.inference_mode()
def generate(
    flow: Flow,
    labels: Tensor,
    sampler: Sampler,
    *,
    seed: int = 0,
    noise: Tensor | None = None,
    numbers: Sequence[int] | None = None,
    batch_size: int | None = None,
    keep_states: bool = False,
    decode: Callable[[Tensor], Tensor] | None = None,
    on_batch: Callable[[int], None] = lambda drawn: None,
) -> Samples:
    """Draw a sample for each label by integrating dx/dt = v(x, t, y) from noise at t=0 to data at t=1.

    The noise of the n-th sample depends only on the seed and n, not on the batch size or the device. The batch size limits the
    memory, because each finished digit takes only one byte per pixel.

    Args:
        flow: the network and the meaning of its output.
        labels: int64 (N,); `net.no_label` draws any class.
        sampler: solver, steps, guidance and the rest.
        seed: random seed of the noise.
        noise: the noise to start from, (N, *shape), instead of noise from the seed.
        numbers: the numbers of the samples in a larger set, used with `noise`; 0, 1, ... by default. A sample's number
            determines its noise for churn.
        batch_size: how many samples are drawn at a time, at least 1; the default depends on the device.
        keep_states: whether to keep all states of the trajectories.
        decode: converts states (B, *shape) to the values that are kept; by default, to data in the flow's units.
        on_batch: called after each batch with the number of its samples.

    Returns:
        The samples, on the CPU.

    Raises:
        ValueError: if the network does not support the sampler.
        FloatingPointError: if a state is not finite.
    """
    net = flow.net
    decode = decode or flow.units.decode
    device = next(net.parameters()).device
    source = streams.generator("cpu", seed, "sampling")
    was_training = net.training
    net.eval()
    kept, evaluations, done = list[Tensor](), 0, 0
    for y in labels.split(batch_size or default_batch_size(device)):
        guided = flow.guided(send(y, device), sampler)
        x0 = draw_noise(len(y), net.shape, source) if noise is None else noise[done : done + len(y)]
        batch = range(done, done + len(y)) if numbers is None else numbers[done : done + len(y)]
        fresh_noise = churn_noise(seed, batch, net.shape, device) if sampler.churn else None
        states: list[Tensor] = []
        for x in flow.states(guided, send(x0, device), sampler, fresh_noise=fresh_noise):
            # Without `keep_states`, only the newest state stays in memory.
            states = [*states, x] if keep_states else [x]
        kept.append(torch.stack([decode(x) for x in states]).cpu())
        evaluations = max(evaluations, guided.evaluations)
        done += len(y)
        on_batch(len(y))
    net.train(was_training)
    drawn = torch.cat(kept, dim=1)
    return Samples(drawn[-1], labels, evaluations, drawn if keep_states else None)


INVERSION_SAMPLER = Sampler(steps=32, solver="rk4")
"""The default sampler of `invert`. From digit to noise and back, its error is much too small to see."""


@torch.inference_mode()
def invert(flow: Flow, x1: Tensor, labels: Tensor, sampler: Sampler = INVERSION_SAMPLER) -> Tensor:
    """Return the noise that the flow carries to the given data, by integrating backwards from t=1 to t=0.

    Args:
        flow: the network and the meaning of its output.
        x1: data (N, *shape), encoded for the network.
        labels: int64 (N,), the labels of the data.
        sampler: the settings, without churn.

    Returns:
        The noise (N, *shape), on the CPU.

    Raises:
        ValueError: if the sampler has churn, or a solver that needs rising times.
        FloatingPointError: if a state is not finite.
    """
    device = next(flow.net.parameters()).device
    *_, x0 = flow.states(flow.guided(labels.to(device), sampler), x1.to(device), sampler, backwards=True)
    return x0.cpu()


def interpolate(first: Tensor, last: Tensor, count: int) -> Tensor:
    """Return `count` points from one noise to another, both included, along the great circle between them.

    A straight line would pass through points far nearer to the origin than noise ever is. The points' lengths change evenly
    from the length of the first to the length of the last. Source: White 2016, "Sampling Generative Networks", section 2.1.

    first, last (*shape) -> (count, *shape).
    """
    share = torch.linspace(0, 1, count).reshape(-1, *[1] * first.dim())
    lengths = first.norm(), last.norm()
    cosine = (first * last).sum() / (lengths[0] * lengths[1])
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle < 1e-4:
        return first + share * (last - first)
    directions = torch.sin((1 - share) * angle) * first / lengths[0] + torch.sin(share * angle) * last / lengths[1]
    return directions / torch.sin(angle) * ((1 - share) * lengths[0] + share * lengths[1])
