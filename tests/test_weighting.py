"""Effective weights against their closed forms, and importance sampling against the loss it stands for."""

import math

import pytest
import torch
from oracle import Gaussian

from flowmatch_mnist.flow.paths import PATHS
from flowmatch_mnist.flow.predictions import PREDICTIONS, target
from flowmatch_mnist.flow.times import Cosine, LogitNormal, Mode, Uniform
from flowmatch_mnist.flow.weighting import WEIGHTINGS, effective_weight, loss_weight

LOG_SNR = torch.linspace(-8, 8, 33, dtype=torch.float64)


def weight(prediction, path, density, log_snr=LOG_SNR):
    return effective_weight(prediction, PATHS[path], density, PATHS[path].time(log_snr))


def test_flow_matching_weighs_by_the_root_of_the_noise_to_signal_ratio():
    torch.testing.assert_close(WEIGHTINGS["flow_matching"](LOG_SNR), torch.exp(-LOG_SNR / 2) / 2)


def test_flow_matching_is_velocity_prediction_on_the_cosine_path():
    # Gao et al. 2024: the same weighting, up to a constant.
    ratio = weight("velocity", "cosine", Uniform()) / weight("velocity", "linear", Uniform())
    torch.testing.assert_close(ratio, torch.full_like(ratio, math.pi / 2))


def test_the_cosine_density_gives_the_straight_path_the_cosine_path_s_times():
    ratio = weight("noise", "cosine", Uniform()) / weight("noise", "linear", Cosine())
    torch.testing.assert_close(ratio, torch.ones_like(ratio))


def test_sd3_and_edm_against_their_closed_forms():
    # Under logit-normal times the log-SNR is N(0, 2^2); the velocity's error is 1/t times the noise's.
    normal = torch.exp(-((LOG_SNR / 2) ** 2) / 2) / (2 * math.sqrt(2 * math.pi))
    torch.testing.assert_close(WEIGHTINGS["sd3"](LOG_SNR), normal * (1 + torch.exp(-LOG_SNR / 2)) ** 2)
    # EDM, table 1: an error of the data at sigma costs (sigma^2 + 0.5^2) / (0.5 sigma)^2, with log sigma ~ N(-1.2, 1.2^2).
    sigma = torch.exp(-LOG_SNR / 2)
    density = torch.exp(-(((sigma.log() + 1.2) / 1.2) ** 2) / 2) / (1.2 * math.sqrt(2 * math.pi)) / 2
    cost = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    torch.testing.assert_close(WEIGHTINGS["edm"](LOG_SNR), density * cost * sigma**2)


def test_ddpm_weighs_the_noise_by_how_long_its_path_stays_at_a_log_snr():
    path = PATHS["vp"]
    t = torch.linspace(0.05, 0.95, 10001, dtype=torch.float64)
    # The integral of w over a stretch of log-SNR is the time spent there.
    spent = torch.trapezoid(WEIGHTINGS["ddpm"](path.log_snr(t)), path.log_snr(t))
    assert abs(spent.item() - 0.9) < 1e-4


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_ddpm_has_no_weight_where_its_path_never_is(path):
    first, last = PATHS["vp"].log_snr(torch.tensor([0.0, 1.0]).double())
    assert WEIGHTINGS["ddpm"](torch.stack([first - 0.1, last + 0.1])).tolist() == [0, 0]
    assert WEIGHTINGS["ddpm"](torch.stack([first + 0.1, last - 0.1])).min() > 0
    # An error of 1 in the noise, at every time of the path: its mean in the loss is 1, as on DDPM's own path.
    t = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    mean = loss_weight("ddpm", "noise", path, Uniform(), t).mean()
    assert math.isclose(mean, 1, rel_tol=2e-3)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_an_error_is_weighed_as_the_loss_weighs_it(path, prediction):
    # Two predictions at the same x_t: the loss between them, and the noise's error times the weight.
    t, x = torch.linspace(0.1, 0.9, 9, dtype=torch.float64), torch.randn(9, 4).double()
    one, other = Gaussian(path, prediction), Gaussian(path, prediction, mean=0.1)
    error = (one(x, t) - other(x, t)).square().mean(1)
    of_noise = (one.pair(x, t)[0] - other.pair(x, t)[0]).square().mean(1)
    weight = effective_weight(prediction, path, Uniform(), t) * path.log_snr_dot(t)
    torch.testing.assert_close(error, weight * of_noise)


@pytest.mark.parametrize("density", [LogitNormal(0.3), Mode(0.8), Cosine()], ids=lambda d: type(d).__name__)
def test_the_named_loss_has_the_named_training_s_mean_under_any_density(density):
    # Velocity of the linear path under uniform times, estimated by a network of the cosine path's data, under other times.
    linear, cosine = PATHS["linear"], PATHS["cosine"]
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000

    def loss(path, prediction, t):
        """The expected squared error of a network that believes the mean to be 0.1."""
        oracle, wrong = Gaussian(path, prediction), Gaussian(path, prediction, mean=0.1)
        x = path.alpha(t) * oracle.mean  # where the data's mean is; the error of the mean is the same everywhere
        return (oracle(x, t) - wrong(x, t)).square()

    named = loss(linear, "velocity", Uniform().quantile(u)).mean()
    t = density.quantile(u)
    weighted = loss(cosine, "data", t) * loss_weight("flow_matching", "data", cosine, density, t)
    assert math.isclose(weighted.mean(), named, rel_tol=0.01)


def test_the_natural_weight_is_none_at_all():
    t, path = torch.linspace(0.1, 0.9, 9), PATHS["vp"]
    torch.testing.assert_close(loss_weight("ddpm", "noise", path, Uniform(), t), torch.ones_like(t), atol=1e-4, rtol=1e-4)
    assert target("noise", path, torch.ones(9, 1), torch.zeros(9, 1), t).mean() == 1
