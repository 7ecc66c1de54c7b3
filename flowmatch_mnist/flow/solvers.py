"""From noise to data, and back: solvers of dx/dt = v(x, t) along the straight path.

A solver knows only a function of (x, t). Path, prediction, label, guidance and precision were bound before it.

Sources: Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", sections II.1 and II.4-5 (one-step methods);
Lu et al. 2022, "DPM-Solver++", algorithm 2 (two-step method on the data prediction); Ho et al. 2020, "DDPM", algorithm 2, and
Gao et al. 2024, "Diffusion Meets Flow Matching" (noise on the way).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from flowmatch_mnist.flow.paths import ProbabilityPath
from flowmatch_mnist.flow.predictions import LOG_SNR_LIMIT, STRAIGHT, pair
from flowmatch_mnist.support.choices import SOLVERS, SPACINGS, Spacing
from flowmatch_mnist.support.devices import widest_float

Velocity = Callable[..., Tensor]
"""v(x, t): x (B, ...), t a scalar tensor in [0, 1] -> (B, ...); for `average` also v(x, t, until), the mean from t to there."""

Step = Callable[[Velocity, Tensor, Tensor, Tensor], Tensor]
"""One step of a solver: (v, x at t, t, t_next) -> x at t_next."""

FreshNoise = Callable[[], Tensor]
"""Standard normal noise of the shape of the state, new at each call."""


def euler(v: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Follow the velocity at the start of the step. Order 1, one evaluation. On the straight path it is DDIM's step."""
    return x + (t_next - t) * v(x, t)


def midpoint(v: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Follow the velocity at the middle, reached by half an Euler step. Order 2, two evaluations."""
    t_middle = (t + t_next) / 2
    return x + (t_next - t) * v(euler(v, x, t, t_middle), t_middle)


def heun(v: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Follow the mean of the velocities at the start and at the Euler step's end. Order 2, two evaluations."""
    v_start = v(x, t)
    v_end = v(x + (t_next - t) * v_start, t_next)
    return x + (t_next - t) * (v_start + v_end) / 2


def rk4(v: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """The classical Runge-Kutta step. Order 4, four evaluations."""
    h, t_middle = t_next - t, (t + t_next) / 2
    k1 = v(x, t)
    k2 = v(x + h / 2 * k1, t_middle)
    k3 = v(x + h / 2 * k2, t_middle)
    k4 = v(x + h * k3, t_next)
    return x + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6


def average(v: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Follow the mean velocity of the whole step, which a network may have learned. Exact with the true one, in one step.

    Source: Geng et al. 2025, "Mean Flows for One-step Generative Modeling", equation 12.
    """
    return x + (t_next - t) * v(x, t, t_next)


ONE_STEP: dict[str, Step] = {"euler": euler, "midpoint": midpoint, "heun": heun, "rk4": rk4}
"""The solvers that remember nothing from one step to the next, so that noise may be added between their steps."""


def dpmpp_2m(v: Velocity, x: Tensor, times: Sequence[Tensor]) -> Iterator[Tensor]:
    """DPM-Solver++(2M): the data prediction, extrapolated along the log-SNR from the step before. Order 2, one evaluation.

    A constant prediction x1 would give x_next = r x + (alpha_next - alpha r) x1 exactly, with r = sigma_next / sigma. At the
    ends the log-SNR is infinite: the first steps from noise have nothing to extrapolate, and the last takes the prediction as
    it is.
    """
    before: Tensor | None = None
    h_before = torch.tensor(torch.inf)
    for t, t_next in pairwise(times):
        _, x1 = pair("velocity", STRAIGHT, v(x, t), x, t)
        h = STRAIGHT.log_snr(t_next) - STRAIGHT.log_snr(t)
        data = x1
        if before is not None and h.isfinite() and h_before.isfinite():
            data = x1 + h / (2 * h_before) * (x1 - before)
        sigma_ratio = STRAIGHT.sigma(t_next) / STRAIGHT.sigma(t)
        x = sigma_ratio * x + (STRAIGHT.alpha(t_next) - STRAIGHT.alpha(t) * sigma_ratio) * data
        before, h_before = x1, h
        yield x


def churned(step: Step, churn: float, fresh_noise: FreshNoise) -> Step:
    """A step of the reverse SDE: an ODE step that goes too far towards the data, and fresh noise that brings it back.

    From log-SNR l the solver goes to l_next + churn (l_next - l), and noise brings the state back to l_next. For small steps
    this is dx = (v + churn sigma^2 l'/2 score) dt + sqrt(churn sigma^2 l') dW, which has the marginals of the ODE at every
    strength. Churn 0 is the ODE. Churn 1 with Euler's step is DDPM's ancestral sampling, step by step: its step to l + d equals
    DDIM's to l + 2d with noise added back to l + d.
    """
    if churn == 0:
        return step

    def stochastic(v: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        log_snr_next = STRAIGHT.log_snr(t_next)
        excess = churn * (log_snr_next - STRAIGHT.log_snr(t))
        beyond = STRAIGHT.time(log_snr_next + excess)
        x = step(v, x, t, beyond)
        kept = STRAIGHT.alpha(t_next) / STRAIGHT.alpha(beyond)
        return kept * x + STRAIGHT.sigma(t_next) * torch.sqrt(-torch.expm1(-excess)) * fresh_noise()

    return stochastic


def time_grid(steps: int, spacing: Spacing = "uniform", path: ProbabilityPath = STRAIGHT) -> Tensor:
    """The times on the straight path that a solver stops at, float64 (steps + 1,), from exactly 0 to exactly 1.

    Args:
        steps: at least 1.
        spacing: `uniform` has equal steps of the time of `path`; `log_snr` has equal steps of the log-SNR between its limits.
        path: that the network was trained on.
    """
    if spacing == "uniform":
        log_snr = path.log_snr(torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    else:
        log_snr = torch.linspace(-LOG_SNR_LIMIT, LOG_SNR_LIMIT, steps + 1, dtype=torch.float64)
    times = STRAIGHT.time(log_snr)
    times[0], times[-1] = 0, 1
    return times


def check_solver(solver: str, steps: int, spacing: str = "uniform", churn: float = 0.0) -> None:
    """Raise ValueError for what does not exist, or cannot work together."""
    if solver not in SOLVERS:
        raise ValueError(f"there is no solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    if spacing not in SPACINGS:
        raise ValueError(f"there is no spacing {spacing!r} of the steps; choose one of {', '.join(SPACINGS)}")
    if steps < 1:
        raise ValueError(f"the steps of a solver must be at least 1, got {steps}")
    if not 0 <= churn < torch.inf:
        raise ValueError(f"churn must be a number of at least 0, got {churn}")
    if churn and solver not in ONE_STEP:
        raise ValueError(
            f"{solver} follows one smooth trajectory, which the noise of churn {churn:g} breaks; "
            f"choose one of {', '.join(ONE_STEP)}, or churn 0"
        )


def trajectory(
    v: Velocity,
    x: Tensor,
    times: Tensor | Sequence[float],
    solver: str = "midpoint",
    *,
    churn: float = 0.0,
    fresh_noise: FreshNoise | None = None,
    tolerance: float = 1e-5,
) -> Iterator[Tensor]:
    """The states at each of the times: as many tensors, the first the given x.

    Args:
        v: the velocity field on the straight path.
        x: the state at the first of the times, of any shape.
        times: (steps + 1,), as from `time_grid`; falling ones integrate from data to noise, without churn. `dopri5` chooses
            steps of its own, and reports at these.
        solver: one of `SOLVERS`.
        churn: how much noise is renewed on the way: 0 is the ODE, 1 DDPM's ancestral sampling; with a one-step solver only.
        fresh_noise: where churn's noise comes from; by default PyTorch's global generator.
        tolerance: relative and absolute tolerance of `dopri5` (Dormand and Prince 1980, as in torchdiffeq).

    Raises:
        ValueError: for an unknown solver, fewer than one step, or a solver that cannot be churned.
        FloatingPointError: if a state is not finite; it says in which step, and at which t.
    """
    check_solver(solver, len(times) - 1, churn=churn)
    # On the CPU, where asking for their values makes no GPU wait; each by itself, so that they are constants of an export.
    values = times.tolist() if isinstance(times, Tensor) else times
    moments = [torch.tensor(t, dtype=x.dtype) for t in values]
    if solver == "dopri5":
        # Imported where it is used: it brings SciPy along, and sampling should start fast.
        from torchdiffeq import odeint

        # Stopped at the last time: torchdiffeq would step over it, where no velocity is known, and interpolate.
        reported = torch.stack(moments).to(x.device)
        options = {"step_t": reported[-1:], "dtype": widest_float(x.device)}
        settings = {"rtol": tolerance, "atol": tolerance, "options": options}
        try:
            states: Iterator[Tensor] = iter(odeint(lambda t, x: v(x, t), x, reported, method="dopri5", **settings))
        except AssertionError as error:  # its way to say that no step is short enough, as where the velocity is not finite
            raise FloatingPointError(
                f"dopri5 finds no step that is short enough ({error}): the network's training diverged, or its velocity has a "
                "jump; try another solver"
            ) from error
        next(states)
    elif solver == "dpmpp_2m":
        states = dpmpp_2m(v, x, moments)
    elif solver == "average":
        states = _walk(average, v, x, moments)
    else:
        step = churned(ONE_STEP[solver], churn, fresh_noise or (lambda: torch.randn_like(x)))
        states = _walk(step, v, x, moments)
    yield x
    finite: list[Tensor] = []
    for number, state in enumerate(states, start=1):
        if not torch.compiler.is_exporting():
            finite.append(state.isfinite().all())
            if number == len(values) - 1:  # once for a solve, since a GPU is waited for here
                _require_finite(torch.stack(finite).tolist(), values[1:])
        yield state


def _require_finite(finite: list[bool], times: Sequence[float]) -> None:
    """Raise FloatingPointError for the first of the steps, which ended at the times, whose state was not finite."""
    for number, (good, t) in enumerate(zip(finite, times, strict=True), start=1):
        if not good:
            raise FloatingPointError(
                f"values that are not finite appeared at t = {t:.4g}, in step {number} of {len(times)}: the network's training "
                "diverged, or the steps are too large for it"
            )


def _walk(step: Step, v: Velocity, x: Tensor, times: Sequence[Tensor]) -> Iterator[Tensor]:
    for t, t_next in pairwise(times):
        x = step(v, x, t, t_next)
        yield x
