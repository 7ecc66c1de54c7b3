"""Solvers against flows known in closed form: order of convergence by the slope of the error, and what they report."""

import math

import pytest
import torch
from oracle import MEAN, SPREAD, Averaged, Gaussian

from flowmatch_mnist.flow.paths import PATHS
from flowmatch_mnist.flow.solvers import ONE_STEP, SOLVERS, check_solver, time_grid, trajectory

STRAIGHT = PATHS["linear"]
velocity = Gaussian(STRAIGHT, "velocity")
X0 = torch.linspace(-2, 2, 8, dtype=torch.float64).view(2, 1, 2, 2)
X1 = MEAN + SPREAD * X0
ORDERS = [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)]


def logistic(x, t):
    """dx/dt = (1 + 2t) x (1 - x), whose solution from 1/2 is 1 / (1 + exp(-t - t^2))."""
    return (1 + 2 * t) * x * (1 - x)


def slope(v, x0, exact, solver):
    """By which power of the step the error at t=1 falls."""

    def error(steps):
        *_, x1 = trajectory(v, x0, time_grid(steps), solver)
        return (x1 - exact).abs().max().item()

    return math.log2(error(128) / error(256))


@pytest.mark.parametrize(("solver", "order"), ORDERS)
def test_order_of_convergence(solver, order):
    half = torch.full((1,), 0.5, dtype=torch.float64)
    assert abs(slope(logistic, half, 1 / (1 + math.exp(-2)), solver) - order) < 0.2


@pytest.mark.parametrize(("solver", "order"), ORDERS)
def test_order_of_convergence_on_the_flow_of_a_gaussian(solver, order):
    # The midpoint rule gains an order here: with a = r'/r, its error term is a'' + 6 a a' + 4 a^3, which is half the third
    # derivative of r^2 over r^2, and r^2 is a parabola.
    assert abs(slope(velocity, X0, X1, solver) - order - (solver == "midpoint")) < 0.2


def test_order_of_convergence_of_the_two_step_method():
    # Between log-SNRs of -4 and 4: it extrapolates along the log-SNR, whose steps do not shrink at its infinite ends.
    def error(steps):
        times = STRAIGHT.time(torch.linspace(-4, 4, steps + 1, dtype=torch.float64))
        first, last = (t * MEAN + torch.hypot(t * SPREAD, 1 - t) * X0 for t in (times[0], times[-1]))
        *_, reached = trajectory(velocity, first, times, "dpmpp_2m")
        return (reached - last).abs().max().item()

    assert abs(math.log2(error(256) / error(512)) - 2) < 0.2
    # From end to end it still beats Euler's step, at the same cost.
    *_, euler = trajectory(velocity, X0, time_grid(64), "euler")
    *_, two_step = trajectory(velocity, X0, time_grid(64), "dpmpp_2m")
    assert (two_step - X1).abs().max() < (euler - X1).abs().max() / 4


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4"])
def test_goes_back_the_way_it_came(solver):
    *_, x0 = trajectory(velocity, X1, time_grid(400).flip(0), solver)
    torch.testing.assert_close(x0, X0, atol=0.02 if solver == "euler" else 1e-4, rtol=0)


def test_dopri5_reaches_the_closed_form():
    states = list(trajectory(velocity, X0, time_grid(3), "dopri5", tolerance=1e-7))
    assert len(states) == 4
    torch.testing.assert_close(states[-1], X1, atol=1e-5, rtol=0)


def test_dopri5_chooses_its_steps_however_many_are_reported():
    asked = []

    def counted(x, t):
        asked.append(t.item())
        return velocity(x, t)

    def evaluations(steps):
        asked.clear()
        list(trajectory(counted, X0, time_grid(steps), "dopri5"))
        assert max(asked) <= 1  # never beyond, where no velocity is known
        return len(asked)

    assert evaluations(1) == evaluations(50)


def test_a_single_point_is_reached_in_one_euler_step_and_a_mixture_is_not():
    # The straight path of one point has straight trajectories: Liu et al. 2022, theorem 3.5.
    point = Gaussian(STRAIGHT, "velocity", mean=0.7, spread=0.0)
    _, x1 = trajectory(point, X0, time_grid(1), "euler")
    torch.testing.assert_close(x1, torch.full_like(X0, 0.7))
    _, x1 = trajectory(mixture, X0, time_grid(1), "euler")
    *_, exact = trajectory(mixture, X0, time_grid(2000), "rk4")
    assert (x1 - exact).abs().max() > 0.5  # it lands on the mean of the points, 0
    torch.testing.assert_close(exact, X0.sign(), atol=0.01, rtol=0)


def mixture(x, t):
    """The velocity of the straight path to the two points -1 and 1."""
    data = torch.tanh(x * t / (1 - t).clamp(min=1e-4) ** 2)
    return (data - x) / (1 - t).clamp(min=1e-4)


@pytest.mark.parametrize("solver", sorted({*SOLVERS} - {"average"}))  # which needs a field of mean velocities
def test_reports_the_start_and_every_step(solver):
    states = list(trajectory(velocity, X0, time_grid(5), solver))
    assert len(states) == 6
    torch.testing.assert_close(states[0], X0)


@pytest.mark.parametrize(("solver", "evaluations"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4), ("dpmpp_2m", 1)])
def test_takes_as_many_steps_and_evaluations_as_it_says(solver, evaluations):
    times = []

    def counted(x, t):
        times.append(t.item())
        return velocity(x, t)

    list(trajectory(counted, X0, time_grid(7), solver))
    assert len(times) == 7 * evaluations
    assert min(times) == 0 and max(times) <= 1
    assert {*ONE_STEP, "dpmpp_2m", "average", "dopri5"} == set(SOLVERS)


def test_grids_have_the_spacing_they_claim():
    torch.testing.assert_close(time_grid(4), torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64))
    for path in PATHS.values():
        times = time_grid(10, "uniform", path)
        assert times[0] == 0 and times[-1] == 1 and (times.diff() > 0).all()
        own = path.time(STRAIGHT.log_snr(times[1:-1]))
        torch.testing.assert_close(own, torch.arange(1, 10, dtype=torch.float64) / 10)
    times = time_grid(10, "log_snr")
    assert times[0] == 0 and times[-1] == 1
    torch.testing.assert_close(STRAIGHT.log_snr(times[1:-1]), torch.arange(-8, 9, 2, dtype=torch.float64))


def test_says_where_values_stopped_being_finite():
    def diverging(x, t):
        return torch.where(t < 0.5, x, x * torch.nan)

    with pytest.raises(FloatingPointError, match=r"at t = 0.75, in step 3 of 4"):
        list(trajectory(diverging, X0, time_grid(4), "euler"))


def test_refuses_what_does_not_exist_or_cannot_work():
    with pytest.raises(ValueError, match="euler, midpoint, heun, rk4, dpmpp_2m, average, dopri5"):
        list(trajectory(velocity, X0, time_grid(5), "leapfrog"))
    with pytest.raises(ValueError, match="at least 1"):
        list(trajectory(velocity, X0, torch.zeros(1), "euler"))
    for solver in ("dpmpp_2m", "dopri5"):
        with pytest.raises(ValueError, match="churn"):
            list(trajectory(velocity, X0, time_grid(5), solver, churn=1.0))
    with pytest.raises(ValueError, match="at least 0"):
        list(trajectory(velocity, X0, time_grid(5), "euler", churn=-1.0))


def test_a_step_of_the_exact_mean_velocity_is_exact():
    net = Averaged()

    def ask(x, t, until):
        return net(x, t.expand(2), None, until.expand(2))

    for steps in (1, 2, 5):
        *_, reached = trajectory(ask, X0, time_grid(steps), "average")
        torch.testing.assert_close(reached, X1, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"solver": "leapfrog"}, "no solver 'leapfrog'"),
        ({"spacing": "even"}, "no spacing 'even'"),
        ({"steps": 0}, "at least 1, got 0"),
        ({"churn": -0.1}, "churn must be"),
        ({"churn": float("inf")}, "churn must be"),
        ({"churn": 0.1, "solver": "dpmpp_2m"}, "dpmpp_2m follows one smooth trajectory"),
    ],
)
def test_what_does_not_exist_or_work_together_is_refused(settings, words):
    check_solver("euler", 1, "log_snr", 0.5)
    with pytest.raises(ValueError, match=words):
        check_solver(**{"solver": "euler", "steps": 1, **settings})
