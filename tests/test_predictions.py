"""Predictions against the oracle: what each stands for, and that a network of any kind is sampled by any solver."""

import pytest
import torch
from oracle import MEAN, SPREAD, Gaussian

from flowmatch_mnist.flow.paths import PATHS
from flowmatch_mnist.flow.predictions import PREDICTIONS, StraightVelocity, pair, score, target
from flowmatch_mnist.flow.solvers import SOLVERS, time_grid, trajectory

EVERY_PATH = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
EVERY_PREDICTION = pytest.mark.parametrize("prediction", PREDICTIONS)
T = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)


@EVERY_PATH
@EVERY_PREDICTION
def test_a_prediction_stands_for_the_pair_it_was_made_of(path, prediction):
    x0, x1 = torch.randn(7, 1, 2, 2).double(), torch.randn(7, 1, 2, 2).double()
    output = target(prediction, path, x0, x1, T)
    again = pair(prediction, path, output, path.point(x0, x1, T), T)
    torch.testing.assert_close(again, (x0, x1))


@EVERY_PATH
@EVERY_PREDICTION
def test_conversions_against_the_closed_form(path, prediction):
    oracle, x = Gaussian(path, prediction), torch.randn(7, 1, 2, 2).double()
    x0, x1 = pair(prediction, path, oracle(x, T), x, T)
    torch.testing.assert_close((x0, x1), oracle.pair(x, T))
    torch.testing.assert_close(path.velocity(x0, x1, T), oracle.velocity(x, T))
    torch.testing.assert_close(score(path, x0, T), oracle.score(x, T))


@EVERY_PATH
@EVERY_PREDICTION
def test_the_straight_velocity_is_that_of_the_straight_path(path, prediction):
    # At log-SNRs that the variance-preserving path has, and within what a prediction of data or noise tells.
    straight = Gaussian(PATHS["linear"], "velocity")
    velocity = StraightVelocity(Gaussian(path, prediction), path, prediction)
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).view(3, 1, 2, 2)
    for t in T:
        torch.testing.assert_close(velocity(x, t), straight(x, t))
    # Beyond, it goes on from there: near enough to start from noise and to end at data.
    for t in torch.tensor([0.0, 1.0], dtype=torch.float64):
        near = x if t == 0 else MEAN + SPREAD * x
        torch.testing.assert_close(velocity(near, t), straight(near, t), atol=0.1, rtol=0)


def test_a_network_of_the_straight_path_is_asked_as_it_is():
    x = torch.randn(2, 3)
    velocity = StraightVelocity(lambda x, t: x, PATHS["linear"], "velocity")
    assert velocity(x, torch.tensor(0.0)) is x


@EVERY_PATH
@EVERY_PREDICTION
@pytest.mark.parametrize("solver", sorted({*SOLVERS} - {"average"}))  # which needs a field of mean velocities
def test_every_solver_samples_every_network(path, prediction, solver):
    x0 = torch.linspace(-2, 2, 8, dtype=torch.float64).view(2, 1, 2, 2)
    velocity = StraightVelocity(Gaussian(path, prediction), path, prediction)
    steps = {"euler": 400, "dopri5": 2}.get(solver, 100)
    *_, x1 = trajectory(velocity, x0, time_grid(steps, "uniform", path), solver)
    torch.testing.assert_close(x1, MEAN + SPREAD * x0, atol=0.02, rtol=0)
