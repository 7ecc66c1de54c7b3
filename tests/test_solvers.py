"""Solvers against a flow known in closed form: order of convergence by the slope of the error, and what they report."""

import math

import pytest
import torch

from flowmatch_mnist.solvers import FIXED_STEP, SOLVERS, trajectory

MEAN, SPREAD = 0.7, 0.3


def velocity(x, t):
    """The exact marginal velocity of the linear path from N(0, 1) to N(MEAN, SPREAD^2), Lipman et al. 2022, theorem 3.

    It carries x0 along x_t = MEAN t + r(t) x0 with r^2 = SPREAD^2 t^2 + (1 - t)^2.
    """
    variance = SPREAD**2 * t**2 + (1 - t) ** 2
    return MEAN + (SPREAD**2 * t - (1 - t)) / variance * (x - MEAN * t)


X0 = torch.linspace(-2, 2, 8, dtype=torch.float64).view(2, 1, 2, 2)
X1 = MEAN + SPREAD * X0


def logistic(x, t):
    """dx/dt = (1 + 2t) x (1 - x), whose solution from 1/2 is 1 / (1 + exp(-t - t^2))."""
    return (1 + 2 * t) * x * (1 - x)


def slope(v, x0, exact, solver):
    """By which power of the step the error at t=1 falls."""

    def error(steps):
        *_, x1 = trajectory(v, x0, steps, solver)
        return (x1 - exact).abs().max().item()

    return math.log2(error(64) / error(128))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_order_of_convergence(solver, order):
    half = torch.full((1,), 0.5, dtype=torch.float64)
    assert abs(slope(logistic, half, 1 / (1 + math.exp(-2)), solver) - order) < 0.2


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 3), ("heun", 2), ("rk4", 4)])
def test_order_of_convergence_on_the_flow_of_a_gaussian(solver, order):
    # The midpoint rule gains an order here: with a = r'/r, its error term is a'' + 6 a a' + 4 a^3, which is half the third
    # derivative of r^2 over r^2, and r^2 is a parabola.
    assert abs(slope(velocity, X0, X1, solver) - order) < 0.2


def test_dopri5_reaches_the_closed_form():
    states = list(trajectory(velocity, X0, 3, "dopri5", tolerance=1e-7))
    assert len(states) == 4
    torch.testing.assert_close(states[-1], X1, atol=1e-5, rtol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_reports_the_start_and_every_step(solver):
    states = list(trajectory(velocity, X0, 5, solver))
    assert len(states) == 6
    torch.testing.assert_close(states[0], X0)


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_takes_as_many_steps_and_evaluations_as_it_says(solver, evaluations):
    times = []

    def counted(x, t):
        times.append(t.item())
        return velocity(x, t)

    list(trajectory(counted, X0, 7, solver))
    assert len(times) == 7 * evaluations
    assert min(times) == 0 and max(times) <= 1
    assert set(FIXED_STEP) | {"dopri5"} == set(SOLVERS)


def test_refuses_what_does_not_exist():
    with pytest.raises(ValueError, match="euler, midpoint, heun, rk4, dopri5"):
        list(trajectory(velocity, X0, 5, "leapfrog"))
    with pytest.raises(ValueError, match="at least 1"):
        list(trajectory(velocity, X0, 0, "euler"))
