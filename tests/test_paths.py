"""The paths against their definitions, autograd, and each other."""

import math

import pytest
import torch

from flowmatch_mnist.flow.paths import PATHS, match_dims

EVERY_PATH = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
T = torch.linspace(0, 1, 21, dtype=torch.float64)
INSIDE = T[1:-1]


@EVERY_PATH
@pytest.mark.parametrize("coefficient", ["alpha", "sigma", "log_snr"])
def test_coefficients_have_the_derivatives_they_claim(path, coefficient):
    t = INSIDE.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(getattr(path, coefficient)(t).sum(), t)
    torch.testing.assert_close(getattr(path, f"{coefficient}_dot")(INSIDE), derivative)


@EVERY_PATH
def test_velocity_is_the_derivative_of_the_point(path):
    x0, x1, t = torch.randn(5, 1, 2, 2).double(), torch.randn(5, 1, 2, 2).double(), INSIDE[[0, 4, 9, 14, 18]]
    _, derivative = torch.func.jvp(lambda t: path.point(x0, x1, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close(path.velocity(x0, x1, t), derivative)


@EVERY_PATH
def test_runs_from_noise_to_data(path):
    x0, x1 = torch.randn(5, 1, 2, 2), torch.randn(5, 1, 2, 2)
    # The variance-preserving path leaves out the last hundredth of the way, as DDPM does.
    torch.testing.assert_close(path.point(x0, x1, torch.zeros(5)), x0, atol=0.03, rtol=0)
    torch.testing.assert_close(path.point(x0, x1, torch.ones(5)), x1, atol=0.05, rtol=0)
    assert (path.alpha(T).diff() > 0).all() and (path.sigma(T).diff() < 0).all() and (path.log_snr_dot(INSIDE) > 0).all()


@EVERY_PATH
def test_the_velocity_determines_the_pair_at_every_time(path):
    assert (path.alpha_dot(T) * path.sigma(T) - path.alpha(T) * path.sigma_dot(T) > 0).all()


@EVERY_PATH
def test_is_safe_at_both_ends_in_single_precision(path):
    ends = torch.tensor([0.0, 1e-7, 1 - 1e-7, 1.0])
    for coefficient in (path.alpha, path.sigma, path.alpha_dot, path.sigma_dot):
        values = coefficient(ends)
        assert values.isfinite().all()
        torch.testing.assert_close(values.double(), coefficient(ends.double()), atol=1e-5, rtol=1e-5)
    assert (path.alpha(ends) >= 0).all() and (path.sigma(ends) >= 0).all()
    assert torch.equal(path.time(torch.tensor([-torch.inf, torch.inf])), torch.tensor([0.0, 1.0]))


@EVERY_PATH
def test_time_is_the_inverse_of_the_log_snr(path):
    torch.testing.assert_close(path.time(path.log_snr(INSIDE)), INSIDE)
    torch.testing.assert_close(path.time(path.log_snr(INSIDE.float())), INSIDE.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(path.log_snr(INSIDE), torch.log(path.alpha(INSIDE) ** 2 / path.sigma(INSIDE) ** 2))


def test_the_paths_are_those_of_the_papers():
    linear, cosine, vp = PATHS["linear"], PATHS["cosine"], PATHS["vp"]
    assert torch.equal(linear.alpha(T), T) and torch.equal(linear.sigma(T), 1 - T)
    angle = torch.atan2(cosine.alpha(T), cosine.sigma(T))
    torch.testing.assert_close(angle, T * math.pi / 2)
    for path in (cosine, vp):
        torch.testing.assert_close(path.alpha(T) ** 2 + path.sigma(T) ** 2, torch.ones_like(T))
    # DDPM: 1,000 betas from 1e-4 to 0.02 (Ho et al. 2020, section 4); the product of 1 - beta is alpha^2.
    products = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    for k in (1, 10, 100, 500, 1000):
        t = torch.tensor((1 - k / 1000) / (1 - 1e-3), dtype=torch.float64)
        assert math.isclose(vp.log_snr(t), torch.logit(products[k - 1]), abs_tol=0.1)


def test_a_single_time_leaves_the_precision_of_what_it_meets_alone():
    x = torch.ones(2, 1, 3, 3)
    assert (match_dims(torch.tensor(0.5, dtype=torch.float64), x) * x).dtype == torch.float32
    assert match_dims(torch.rand(2), x).shape == (2, 1, 1, 1)
