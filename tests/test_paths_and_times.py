"""The path against its definition and autograd; the densities of t against their closed forms."""

import pytest
import torch

from flowmatch_mnist.paths import LinearPath
from flowmatch_mnist.streams import generator
from flowmatch_mnist.times import LogitNormal, Uniform, fixed_times


def test_path_runs_from_noise_to_data_and_its_velocity_is_its_derivative():
    x0, x1 = torch.randn(5, 1, 2, 2), torch.randn(5, 1, 2, 2)
    path = LinearPath()
    torch.testing.assert_close(path.point(x0, x1, torch.zeros(5)), x0)
    torch.testing.assert_close(path.point(x0, x1, torch.ones(5)), x1)
    t = torch.rand(5)
    _, derivative = torch.func.jvp(lambda t: path.point(x0, x1, t), (t,), (torch.ones(5),))
    torch.testing.assert_close(path.velocity(x0, x1, t), derivative)


@pytest.mark.parametrize("coefficient", ["alpha", "sigma"])
def test_coefficients_have_the_derivatives_they_claim(coefficient):
    path, t = LinearPath(), torch.linspace(0, 1, 11, requires_grad=True)
    value = getattr(path, coefficient)(t)
    (derivative,) = torch.autograd.grad(value.sum(), t)
    torch.testing.assert_close(getattr(path, f"{coefficient}_dot")(t), derivative)


@pytest.mark.parametrize(
    ("density", "cumulative"),
    [
        (Uniform(), lambda t: t),
        (LogitNormal(), lambda t: torch.special.ndtr(torch.logit(t))),
        (LogitNormal(0.5, 0.7), lambda t: torch.special.ndtr((torch.logit(t) - 0.5) / 0.7)),
    ],
)
def test_times_have_the_density_they_claim(density, cumulative):
    draws = torch.stack([density.sample(64, generator("cpu", "times", i)) for i in range(200)])
    assert draws.min() > 0 and draws.max() < 1
    # Kolmogorov-Smirnov over all draws, and for the first of each batch alone, which must not always be the smallest.
    for t in (draws.flatten(), draws[:, 0]):
        u = cumulative(t.double()).sort().values
        distance = (u - torch.arange(1, len(u) + 1) / len(u)).abs().max().item()
        assert distance < 1.95 / len(u) ** 0.5


def test_draws_of_one_batch_cover_the_density_evenly():
    t = Uniform().sample(100, generator("cpu", "even"))
    assert torch.equal((t * 100).long().bincount(minlength=100).clamp(max=1).sum(), torch.tensor(100))


def test_fixed_times_cover_the_interval_and_do_not_depend_on_who_takes_them():
    t = fixed_times(3, torch.arange(500))
    assert (t * 10).long().bincount(minlength=10).min() >= 48
    shared = torch.empty(500)
    for rank in range(2):
        shared[rank::2] = fixed_times(3, torch.arange(250) * 2 + rank)
    assert torch.equal(t, shared)
    assert not torch.equal(t, fixed_times(4, torch.arange(500)))


def test_a_density_refuses_a_scale_that_is_none():
    with pytest.raises(ValueError, match="positive"):
        LogitNormal(scale=0)
