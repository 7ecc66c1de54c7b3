"""From noise to data: solvers of dx/dt = v(x, t) from t=0 to t=1.

A solver knows only a function of (x, t). Label, guidance and precision were bound before it.

Source: Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", sections II.1 and II.4-5.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""v(x, t): x (B, ...), t a scalar tensor in [0, 1] -> (B, ...)."""

Step = Callable[[Velocity, Tensor, Tensor, Tensor], Tensor]
"""One step of a solver: (v, x at t, t, t_next) -> x at t_next."""


def euler(v: Velocity, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Follow the velocity at the start of the step. Order 1, one evaluation."""
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


FIXED_STEP: dict[str, Step] = {"euler": euler, "midpoint": midpoint, "heun": heun, "rk4": rk4}
SOLVERS = (*FIXED_STEP, "dopri5")


def check_solver(solver: str, steps: int) -> None:
    """Raise ValueError for an unknown solver, or fewer than one step."""
    if solver not in SOLVERS:
        raise ValueError(f"there is no solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    if steps < 1:
        raise ValueError(f"the steps of a solver must be at least 1, got {steps}")


def trajectory(v: Velocity, x: Tensor, steps: int, solver: str = "midpoint", tolerance: float = 1e-5) -> Iterator[Tensor]:
    """The states at t = 0, 1/steps, ..., 1: `steps` + 1 tensors, the first the given x.

    Args:
        v: the velocity field.
        x: the state at t=0, of any shape.
        steps: how many equal steps, at least 1. For `dopri5`, which chooses its own, how many states to report.
        solver: one of `SOLVERS`.
        tolerance: relative and absolute tolerance of `dopri5` (Dormand and Prince 1980, as in torchdiffeq).

    Raises:
        ValueError: for an unknown solver, or fewer than one step.
    """
    check_solver(solver, steps)
    times = torch.linspace(0, 1, steps + 1, dtype=x.dtype, device=x.device)
    if solver == "dopri5":
        # Imported where it is used: it brings SciPy along, and sampling should start fast.
        from torchdiffeq import odeint

        yield from odeint(lambda t, x: v(x, t), x, times, method="dopri5", rtol=tolerance, atol=tolerance)
        return
    yield x
    for t, t_next in pairwise(times):
        x = FIXED_STEP[solver](v, x, t, t_next)
        yield x
