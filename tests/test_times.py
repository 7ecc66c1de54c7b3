"""The densities of t against their closed forms, and the fixed times of validation."""

import pytest
import torch

from flowmatch_mnist.flow.times import Cosine, LogitNormal, Mode, TimeDensity, Uniform, fixed_times
from flowmatch_mnist.support.streams import generator

DENSITIES = [Uniform(), LogitNormal(), LogitNormal(0.5, 0.7), Mode(1.29), Mode(-1.0), Cosine()]
EVERY_DENSITY = pytest.mark.parametrize("density", DENSITIES, ids=lambda d: f"{type(d).__name__}{list(vars(d).values())}")


@EVERY_DENSITY
def test_times_have_the_density_they_claim(density):
    draws = torch.stack([density.sample(64, generator("cpu", "times", i)) for i in range(200)])
    assert draws.min() > 0 and draws.max() < 1
    # The integral of the density, by the trapezoidal rule.
    grid = torch.linspace(1e-6, 1 - 1e-6, 20001, dtype=torch.float64)
    values = density.density(grid)
    cumulative = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(values, grid)])
    assert abs(cumulative[-1].item() - 1) < 1e-2
    # Kolmogorov-Smirnov over all draws, and for the first of each batch alone, which must not always be the smallest.
    for t in (draws.flatten(), draws[:, 0]):
        u = cumulative[torch.searchsorted(grid, t.double()).clamp(max=len(grid) - 1)].sort().values
        distance = (u - torch.arange(1, len(u) + 1) / len(u)).abs().max().item()
        assert distance < 1.95 / len(u) ** 0.5


@EVERY_DENSITY
def test_the_density_is_one_over_the_slope_of_the_quantile(density):
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    torch.testing.assert_close(density.density(t), TimeDensity.density(density, t), atol=1e-6, rtol=1e-6)


def test_a_density_is_exact_in_16_digits_where_32_bits_end_and_needs_no_gradients():
    t = torch.tensor([0.001, 0.5, 0.999])
    with torch.no_grad():
        density = TimeDensity.density(LogitNormal(), t)
    assert density.dtype == torch.float32
    torch.testing.assert_close(density, LogitNormal().density(t), atol=0, rtol=1e-4)


def test_times_keep_off_the_ends():
    for location, end in ((-99.0, 1e-6), (99.0, 1 - 1e-6)):
        torch.testing.assert_close(LogitNormal(location).sample(3, generator("cpu")), torch.full((3,), end), atol=0, rtol=0)


def test_logit_normal_is_normal_in_the_logit():
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    t = LogitNormal(0.5, 0.7).quantile(u)
    torch.testing.assert_close(torch.special.ndtr((torch.logit(t) - 0.5) / 0.7), u)


def test_mode_looks_at_the_middle_or_the_ends():
    middle, end = torch.tensor(0.5), torch.tensor(0.02)
    assert Mode(1.29).density(middle) > Mode(0.0).density(middle) > Mode(-1.0).density(middle)
    assert Mode(1.29).density(end) < Mode(0.0).density(end) < Mode(-1.0).density(end)


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
    golden, root_two = (5**0.5 - 1) / 2, 2**0.5
    expected = (torch.arange(500, dtype=torch.float64) * golden + 3 * root_two) % 1
    torch.testing.assert_close(t, expected.float())


@pytest.mark.parametrize(
    "build", [lambda: LogitNormal(scale=0), lambda: LogitNormal(scale=float("nan")), lambda: Mode(2.0), lambda: Mode(-1.1)]
)
def test_a_density_refuses_a_scale_that_is_none(build):
    with pytest.raises(ValueError, match="scale"):
        build()
