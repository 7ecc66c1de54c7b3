"""Log-likelihoods of data under the flow: log p(x | y) by the instantaneous change of variables, and log p(x).

Along a trajectory of dx/dt = v(x, t) the density changes by d log p / dt = -div v. So from data back to noise,

    log p(x1) = log N(x0; 0, I) - integral of div v(x_t, t) from t=0 to t=1.

The divergence is integrated together with x, as one more coordinate. It is the trace of v's Jacobian J. The exact trace takes
one backward pass for each coordinate of x. The unbiased estimate e . (J^T e), with random signs e, takes one backward pass.

Sources: Chen et al. 2018, "Neural Ordinary Differential Equations", equation 8; Grathwohl et al. 2019, "FFJORD", equation 4
and section 3.1 (the estimate, with one e for the whole trajectory); Hutchinson 1990, "A Stochastic Estimator of the Trace of
the Influence Matrix" (random signs have the least variance); Lipman et al. 2022, "Flow Matching for Generative Modeling",
appendix C.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flowmatch_mnist.flow.paths import PATHS
from flowmatch_mnist.flow.predictions import StraightVelocity
from flowmatch_mnist.flow.solvers import Velocity, time_grid, trajectory
from flowmatch_mnist.sampling.generate import Flow, Sampler
from flowmatch_mnist.support import streams
from flowmatch_mnist.support.devices import full_float32

Divergence = Literal["hutchinson", "exact"]

LIKELIHOOD_SAMPLER = Sampler(steps=24, solver="rk4", spacing="log_snr")
"""The default sampler for likelihoods. Its error is 0.001 bits per dimension on MNIST. With steps of equal time,
this error takes 64 steps, because the field is steep near the data: there the network knows which pixels are black."""


@dataclass
class Likelihood:
    """The log-likelihoods of N samples, each under its given label.

    Attributes:
        log_p: log p(x | y) in nats, float64 (N,).
        evaluations: network evaluations (NFE) for each sample; an evaluation with guidance counts as two. Each has one backward
            pass, or for the exact divergence one for each coordinate. For an adaptive solver, the number is from the batch that
            needed most.
    """

    log_p: Tensor
    evaluations: int


@dataclass
class MarginalLikelihood:
    """The log-likelihoods of N samples under each label, and under labels that are all equally frequent.

    Attributes:
        log_p: log p(x) in nats, float64 (N,).
        log_p_given: log p(x | y) in nats, float64 (N, classes). The most likely label of each sample is its `argmax(1)`.
        evaluations: network evaluations (NFE) for each sample and label, as in `Likelihood`.
    """

    log_p: Tensor
    log_p_given: Tensor
    evaluations: int


class Augmented:
    """The velocity of a state that contains x and, as one more coordinate, the integral of the divergence.

    Call it under `torch.no_grad`. Then no graph stays in memory after a call, so a solver needs the memory for one evaluation.

    Args:
        velocity: the velocity of x (B, *shape). The velocity of one sample must not depend on other samples.
        shape: the shape of one sample.
        probe: signs (B, *shape), or None for the exact divergence. They are the same in every call, because a new probe would
            make the field jump between the calls, and an adaptive solver would shrink its steps without end.
    """

    def __init__(self, velocity: Velocity, shape: tuple[int, ...], probe: Tensor | None) -> None:
        self.velocity = velocity
        self.shape = shape
        self.probe = probe

    def __call__(self, state: Tensor, t: Tensor) -> Tensor:
        """Return the derivative of the state with respect to t: both (B, D + 1). The state's last column is the integral."""
        with torch.enable_grad():
            x = state[:, :-1].unflatten(1, self.shape).requires_grad_()
            v = self.velocity(x, t)
            divergence = trace(v, x) if self.probe is None else quadratic_form(v, x, self.probe)
        return torch.cat([v.flatten(1), divergence[:, None]], dim=1)


def trace(v: Tensor, x: Tensor) -> Tensor:
    """Return the trace of each sample's dv/dx, by one backward pass for each coordinate: (B, ...) -> (B,)."""
    total = x.new_zeros(len(x))
    for i, coordinate in enumerate(v.flatten(1).unbind(1)):
        (gradient,) = torch.autograd.grad(coordinate.sum(), x, retain_graph=True)
        total = total + gradient.flatten(1)[:, i]
    return total


def quadratic_form(v: Tensor, x: Tensor, probe: Tensor) -> Tensor:
    """Return each sample's e . (J^T e) with J = dv/dx and the probe e, by one backward pass: (B, ...) -> (B,)."""
    (gradient,) = torch.autograd.grad(v, x, probe)
    return (gradient * probe).flatten(1).sum(1)


def probes(seed: int, numbers: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Return random signs for the samples with these numbers, one stream for each: int64 (samples, *shape)."""
    signs = [torch.randint(2, shape, generator=streams.generator("cpu", seed, "probe", n)) for n in numbers]
    return 2 * torch.stack(signs) - 1


@torch.inference_mode(False)
@torch.no_grad()
@full_float32()
def log_likelihood(
    flow: Flow,
    x1: Tensor,
    labels: Tensor,
    sampler: Sampler = LIKELIHOOD_SAMPLER,
    *,
    divergence: Divergence = "hutchinson",
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    batch_size: int = 250,
    tolerance: float = 1e-5,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Likelihood:
    """Return log p(x | y) of each sample, by integrating from data at t=1 to noise at t=0.

    A sample's probe depends only on the seed and its number, so the batches do not change the results. The exception is
    `dopri5`: it chooses its steps for a whole batch, so different batches give different results, within its tolerance.

    A network knows its field only between the log-SNRs that it was trained on. For the variance-preserving path, or a
    prediction of data or noise, these end at about -10 and 10. `predictions.StraightVelocity` continues the flow beyond them,
    and the likelihood is from the continued flow.

    Args:
        flow: the network and the meaning of its output.
        x1: data (N, *shape), float; the computation uses this type.
        labels: int64 (N,); `net.no_label` selects the unconditional network.
        sampler: solver, steps, spacing and guidance; without churn. With guidance, the likelihood is from the guided flow.
        divergence: `hutchinson` estimates it without bias; `exact` takes as many backward passes as x has coordinates.
        seed: random seed of the probes.
        numbers: the numbers of the N samples; 0, 1, ... by default.
        batch_size: how many samples are integrated at a time, at least 1.
        tolerance: the tolerance of `dopri5`.
        on_batch: called after each batch with the number of its samples.

    Raises:
        ValueError: if the sampler has churn, or a solver that needs rising times, or the network does not support it.
        FloatingPointError: if a state is not finite.
    """
    flow.check(sampler)
    if not sampler.reversible:
        raise ValueError(f"{sampler.description()} has no likelihood; use another solver, and churn 0")
    net, path = flow.net, PATHS[flow.path]
    device = next(net.parameters()).device
    times = time_grid(sampler.steps, sampler.spacing, path).flip(0)
    was_training = net.training
    net.eval()
    kept = []
    evaluations, done = 0, 0
    for data, y in zip(x1.split(batch_size), labels.split(batch_size), strict=True):
        data = data.to(device)
        # Cloned, because a tensor made in inference mode must not be kept for a backward pass.
        guided = flow.guided(y.to(device).clone(), sampler)
        probe = None
        if divergence == "hutchinson":
            batch = range(done, done + len(y)) if numbers is None else numbers[done : done + len(y)]
            probe = probes(seed, batch, net.shape).to(data)
        field = Augmented(StraightVelocity(guided, path, flow.prediction), net.shape, probe)
        state = torch.cat([data.flatten(1), data.new_zeros(len(y), 1)], dim=1)
        # A deque of length 1 keeps only the last state in memory.
        (state,) = deque(trajectory(field, state, times, sampler.solver, tolerance=tolerance), maxlen=1)
        # The times fall, so the last column is minus the integral from 0 to 1.
        state = state.cpu().double()
        kept.append(log_standard_normal(state[:, :-1]) + state[:, -1])
        evaluations = max(evaluations, guided.evaluations)
        done += len(y)
        on_batch(len(y))
    net.train(was_training)
    return Likelihood(torch.cat(kept), evaluations)


def log_standard_normal(x: Tensor) -> Tensor:
    """Return the logarithm of N(x; 0, I): (B, D) -> (B,)."""
    return -(x.square() + math.log(2 * math.pi)).sum(1) / 2


def marginal_log_likelihood(
    flow: Flow, x1: Tensor, sampler: Sampler = LIKELIHOOD_SAMPLER, **options: Any
) -> MarginalLikelihood:
    """Return log p(x), for labels that are all equally frequent, and log p(x | y) under each label.

    By Bayes' rule, the label with the highest log p(x | y) is the most probable one. A sample has the same probe under all
    labels. So much of the estimate's error is the same too, and cancels in differences between labels.

    Args:
        flow: the network and the meaning of its output.
        x1: data (N, *shape), float.
        sampler: as in `log_likelihood`.
        options: other arguments of `log_likelihood`; `on_batch` is called for the batches of each label.

    Raises:
        ValueError, FloatingPointError: as `log_likelihood` does.
    """
    classes = flow.net.no_label
    every = [log_likelihood(flow, x1, torch.full((len(x1),), y), sampler, **options) for y in range(classes)]
    log_p_given = torch.stack([given.log_p for given in every], dim=1)
    log_p = log_p_given.logsumexp(1) - math.log(classes)
    return MarginalLikelihood(log_p, log_p_given, max(given.evaluations for given in every))
