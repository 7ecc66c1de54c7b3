"""Weightings: the effective weight of a training objective at each signal-to-noise ratio.

Let l = log(alpha^2 / sigma^2). For every path, prediction target and density of t, the squared loss is

    integral of w(l) E |x0_predicted - x0|^2 dl.

Two objectives with the same w have the same optimum. They differ only in the noise of their gradients. So w(l) distinguishes
objectives. The page `docs/diffusion.md` plots it.

Sources: Kingma and Gao 2023, "Understanding Diffusion Objectives as the ELBO with Simple Data Augmentation", section 3 and
table 1; Gao et al. 2024, "Diffusion Meets Flow Matching", section on training.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from flowmatch_mnist.flow.paths import PATHS, ProbabilityPath
from flowmatch_mnist.flow.predictions import Prediction
from flowmatch_mnist.flow.times import LogitNormal, TimeDensity, Uniform

WeightingName = Literal["flow_matching", "sd3", "edm", "ddpm"]


def effective_weight(prediction: Prediction, path: ProbabilityPath, density: TimeDensity, t: Tensor) -> Tensor:
    """Return w(l) for the squared error of `prediction`, if training draws its times from `density`: t (B,) -> (B,).

    Here l is the log-SNR of `path` at t in (0, 1). w is the density of l, p(t) / (dl / dt), times a cost: the squared error of
    the prediction for an error of 1 in the noise. At x_t, an error e in the noise is an error -sigma / alpha e in the data, and
    an error -sigma / 2 dl/dt e in the velocity.
    """
    slope = path.log_snr_dot(t)
    cost = {
        "noise": torch.ones_like(t),
        "data": torch.exp(-path.log_snr(t)),
        "velocity": (path.sigma(t) * slope / 2) ** 2,
    }[prediction]
    return density.density(t) / slope * cost


def _weight_of(prediction: Prediction, path: ProbabilityPath, density: TimeDensity) -> Callable[[Tensor], Tensor]:
    # Numbers instead of tensors, so a GPU does not wait for them. Beyond them, the objective has no weight.
    first, last = path.log_snr(torch.tensor([0.0, 1.0])).tolist()

    def weight(log_snr: Tensor) -> Tensor:
        inside = (first <= log_snr) & (log_snr <= last)
        return effective_weight(prediction, path, density, path.time(log_snr)) * inside

    return weight


def _edm(log_snr: Tensor) -> Tensor:
    """Return w of Karras et al. 2022, "Elucidating the Design Space", table 1.

    There, log sigma ~ N(-1.2, 1.2^2) with l = -2 log sigma, and the data have standard deviation 0.5.
    """
    density = torch.exp(-(((log_snr - 2.4) / 2.4) ** 2) / 2) / (2.4 * math.sqrt(2 * math.pi))
    return density * (torch.exp(-log_snr) + 0.5**2) / 0.5**2


WEIGHTINGS: dict[WeightingName, Callable[[Tensor], Tensor]] = {
    # exp(-l / 2) / 2. The weight of the velocity's error along the cosine path differs only by a constant factor.
    "flow_matching": _weight_of("velocity", PATHS["linear"], Uniform()),
    "sd3": _weight_of("velocity", PATHS["linear"], LogitNormal()),
    "edm": _edm,
    "ddpm": _weight_of("noise", PATHS["vp"], Uniform()),
}
"""The functions w by name: log-SNR (B,) -> (B,). `ddpm` is L_simple of Ho et al. 2020, equation 14."""


def loss_weight(
    weighting: WeightingName, prediction: Prediction, path: ProbabilityPath, density: TimeDensity, t: Tensor
) -> Tensor:
    """Return the factor that gives the squared error of `prediction` the effective weight of the objective `weighting`.

    t (B,) in (0, 1) -> (B,). If t is drawn from `density`, this is importance sampling: for every density, the loss has the
    mean of the named objective.
    """
    return WEIGHTINGS[weighting](path.log_snr(t)) / effective_weight(prediction, path, density, t)
