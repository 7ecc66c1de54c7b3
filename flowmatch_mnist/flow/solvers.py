"""Solvers of dx/dt = v(x, t) along the straight path, `linear`: from noise to data, and back.

A solver sees only a function of (x, t). This function already includes the path, the prediction target, the label, the guidance
and the precision.

Sources: Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", sections II.1 and II.4-5 (one-step methods);
Lu et al. 2022, "DPM-Solver++", algorithm 2 (two-step method on the data prediction); Ho et al. 2020, "DDPM", algorithm 2, and
Gao et al. 2024, "Diffusion Meets Flow Matching" (noise during sampling).
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
"""v(x, t): x (B, ...), t a scalar tensor in [0, 1] -> (B, ...); for `average` also v(x, t, until), the mean from t to until."""

Step = Callable[[Velocity, Tensor, Tensor, Tensor], Tensor]
"""One step of a solver: (v, x at t, t, t_next) -> x at t_next."""

FreshNoise = Callable[[], Tensor]
"""A function that returns new standard normal noise at each call, in the shape of the state."""


def euler(v: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Follow the velocity at the start of the step. Order 1, one evaluation. On the straight path this is DDIM's step."""
    return x + (t_next - t) * v(x, t)


def midpoint(v: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Follow the velocity at the middle of the step. Half an Euler step leads there. Order 2, two evaluations."""
    t_middle = (t + t_next) / 2
    return x + (t_next - t) * v(euler(v, x, t, t_middle), t_middle)


def heun(v: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Follow the mean of the velocities at the start and at the end of an Euler step. Order 2, two evaluations."""
    v_start = v(x, t)
    v_end = v(x + (t_next - t) * v_start, t_next)
    return x + (t_next - t) * (v_start + v_end) / 2


def rk4(v: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Take the classical Runge-Kutta step. Order 4, four evaluations."""
    h, t_middle = t_next - t, (t + t_next) / 2
    k1 = v(x, t)
    k2 = v(x + h / 2 * k1, t_middle)
    k3 = v(x + h / 2 * k2, t_middle)
    k4 = v(x + h * k3, t_next)
    return x + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6


def average(v: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Follow the mean velocity of the whole step, if the network has learned it. One evaluation.

    With the true mean velocity, one step is exact.

    Source: Geng et al. 2025, "Mean Flows for One-step Generative Modeling", equation 12.
    """
    return x + (t_next - t) * v(x, t, t_next)


ONE_STEP: dict[str, Step] = {"euler": euler, "midpoint": midpoint, "heun": heun, "rk4": rk4}
"""The solvers without memory of earlier steps. Noise may be added between their steps."""


def dpmpp_2m(v: Velocity, x: Tensor, times: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the states of DPM-Solver++(2M), which extrapolates the data prediction. Order 2, one evaluation.

    It extrapolates along the log-SNR, from the predictions of this step and the step before. For a constant prediction x1, the
    step x_next = r x + (alpha_next - alpha r) x1 is exact, with r = sigma_next / sigma. At the ends, the log-SNR is infinite.
    So the first two steps from noise and the last step to the data use the prediction without extrapolation.

    x, of any shape, is the state at the first time. The times () rise. One state follows for each later time.
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
    """Return a step of the reverse SDE: an ODE step goes too far towards the data, and new noise brings the state back.

    The solver goes from log-SNR l to l_next + churn (l_next - l), and noise brings the state back to l_next. For small steps
    this is dx = (v + churn sigma^2 l'/2 score) dt + sqrt(churn sigma^2 l') dW, with l' = dl/dt. It has the marginals of the ODE
    for every churn of at least 0.
    Churn 0 is the ODE. Churn 1 with Euler's step is DDPM's ancestral sampling, step by step: a step of DDPM to l + d equals a
    step of DDIM to l + 2d, followed by noise back to l + d.
    """
    if churn == 0:
        return step

    def stochastic(v: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        log_snr_next = STRAIGHT.log_snr(t_next)
        excess = churn * (log_snr_next - STRAIGHT.log_snr(t))
        t_beyond = STRAIGHT.time(log_snr_next + excess)
        x = step(v, x, t, t_beyond)
        alpha_ratio = STRAIGHT.alpha(t_next) / STRAIGHT.alpha(t_beyond)
        return alpha_ratio * x + STRAIGHT.sigma(t_next) * torch.sqrt(-torch.expm1(-excess)) * fresh_noise()

    return stochastic


def time_grid(steps: int, spacing: Spacing = "uniform", path: ProbabilityPath = STRAIGHT) -> Tensor:
    """Return the times of a solver's steps on the straight path, float64 (steps + 1,), from exactly 0 to exactly 1.

    Args:
        steps: the number of steps, at least 1.
        spacing: `uniform` means equal steps in the time of `path`. `log_snr` means equal steps in the log-SNR between its
            limits, see `LOG_SNR_LIMIT`.
        path: the path that the network was trained on.
    """
    if spacing == "uniform":
        log_snr = path.log_snr(torch.linspace(0, 1, steps + 1, dtype=torch.float64))
    else:
        log_snr = torch.linspace(-LOG_SNR_LIMIT, LOG_SNR_LIMIT, steps + 1, dtype=torch.float64)
    times = STRAIGHT.time(log_snr)
    times[0], times[-1] = 0, 1
    return times


def check_solver(solver: str, steps: int, spacing: str = "uniform", churn: float = 0.0) -> None:
    """Raise ValueError for an unknown name, a number out of its range, or settings that do not work together."""
    if solver not in SOLVERS:
        raise ValueError(f"there is no solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    if spacing not in SPACINGS:
        raise ValueError(f"there is no spacing {spacing!r}; choose one of {', '.join(SPACINGS)}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= churn < torch.inf:
        raise ValueError(f"churn must be finite and at least 0, got {churn}")
    if churn and solver not in ONE_STEP:
        raise ValueError(
            f"{solver} follows one smooth trajectory, but churn {churn:g} adds noise to it; "
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
    """Yield one state for each of the times; the first state is the given x.

    Args:
        v: the velocity field on the straight path.
        x: the state at the first time, of any shape.
        times: (steps + 1,), for example from `time_grid`. Falling times integrate from data to noise; `dpmpp_2m`, `average` and
            churn need rising times. `dopri5` chooses its own steps and reports the states at these times.
        solver: one of `SOLVERS`.
        churn: how much of the noise is renewed during sampling. 0 is the ODE, and 1 is DDPM's ancestral sampling. Only the
            solvers in `ONE_STEP` support it.
        fresh_noise: the source of the noise for churn; by default PyTorch's global generator.
        tolerance: relative and absolute tolerance of `dopri5` (Dormand and Prince 1980, as in torchdiffeq).

    Raises:
        ValueError: for an unknown solver, fewer than one step, or churn with a solver that does not support it.
        FloatingPointError: if a state is not finite; the message gives the step and t. Also if `dopri5` finds no step that is
            short enough.
    """
    check_solver(solver, len(times) - 1, churn=churn)
    # The times are on the CPU, so reading them waits for no GPU. Each is its own tensor, so it is a constant in an export.
    values = times.tolist() if isinstance(times, Tensor) else times
    moments = [torch.tensor(t, dtype=x.dtype) for t in values]
    if solver == "dopri5":
        # Imported here because it imports SciPy, and sampling should start fast.
        from torchdiffeq import odeint

        # `step_t` stops dopri5 at the last time. Otherwise dopri5 would step past this time, where v is not defined, and then
        # interpolate.
        reported = torch.stack(moments).to(x.device)
        options = {"step_t": reported[-1:], "dtype": widest_float(x.device)}
        settings = {"rtol": tolerance, "atol": tolerance, "options": options}
        try:
            states: Iterator[Tensor] = iter(odeint(lambda t, x: v(x, t), x, reported, method="dopri5", **settings))
        except AssertionError as error:  # it means: no step is short enough, for example if v is not finite
            raise FloatingPointError(
                f"dopri5 finds no step that is short enough ({error}): the network's training diverged, or its velocity "
                "has a jump; use another solver or checkpoint"
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
            if number == len(values) - 1:  # only once in a solve, because the host waits for a GPU here
                _require_finite(torch.stack(finite).tolist(), values[1:])
        yield state


def _require_finite(finite: list[bool], times: Sequence[float]) -> None:
    """Raise FloatingPointError for the first step with a state that is not finite; the steps ended at `times`."""
    for number, (good, t) in enumerate(zip(finite, times, strict=True), start=1):
        if not good:
            raise FloatingPointError(
                f"the state is not finite at t = {t:.4g}, in step {number} of {len(times)}: the network's training diverged, "
                "or the steps are too large; use another checkpoint or more steps"
            )


def _walk(step: Step, v: Velocity, x: Tensor, times: Sequence[Tensor]) -> Iterator[Tensor]:
    for t, t_next in pairwise(times):
        x = step(v, x, t, t_next)
        yield x
