"""What a training cares for: the weight of its loss at each signal-to-noise ratio.

With l = log(alpha^2 / sigma^2), every loss of this family is, whatever the path, the prediction and the density of t,

    integral of w(l) E |x0_predicted - x0|^2 dl,

and two trainings with the same w have the same optimum and differ in the noise of their gradients alone. So a training is told
apart by its w(l), drawn by `benchmarks/weightings.py`.

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
    """W at the log-SNR that `path` has at t, of the plain squared error of `prediction` under `density`: t (B,) -> (B,).

    It is the density of the log-SNR, p(t) / (dl / dt), times what an error of the noise costs when counted as an error of the
    prediction: at x_t an error e of the noise is one of -sigma / alpha e in the data, of -sigma / 2 dl/dt e in the velocity.
    """
    slope = path.log_snr_dot(t)
    cost = {
        "noise": torch.ones_like(t),
        "data": torch.exp(-path.log_snr(t)),
        "velocity": (path.sigma(t) * slope / 2) ** 2,
    }[prediction]
    return density.density(t) / slope * cost


def _of(prediction: Prediction, path: ProbabilityPath, density: TimeDensity) -> Callable[[Tensor], Tensor]:
    return lambda log_snr: effective_weight(prediction, path, density, path.time(log_snr))


def _edm(log_snr: Tensor) -> Tensor:
    """Karras et al. 2022, "Elucidating the Design Space", table 1: log sigma ~ N(-1.2, 1.2^2), data of deviation 0.5."""
    density = torch.exp(-(((log_snr - 2.4) / 2.4) ** 2) / 2) / (2.4 * math.sqrt(2 * math.pi))
    return density * (torch.exp(-log_snr) + 0.5**2) / 0.5**2


WEIGHTINGS: dict[WeightingName, Callable[[Tensor], Tensor]] = {
    # Proportional to exp(-l / 2); the same as the velocity's error along the cosine path.
    "flow_matching": _of("velocity", PATHS["linear"], Uniform()),
    "sd3": _of("velocity", PATHS["linear"], LogitNormal()),
    "edm": _edm,
    "ddpm": _of("noise", PATHS["vp"], Uniform()),
}
"""w by name, as functions of the log-SNR (B,) -> (B,). `ddpm` is L_simple of Ho et al. 2020, equation 14."""


def loss_weight(
    weighting: WeightingName, prediction: Prediction, path: ProbabilityPath, density: TimeDensity, t: Tensor
) -> Tensor:
    """What to multiply the squared error of `prediction` at t by, so that its effective weight is that of the name.

    Where t is drawn from `density` this is importance sampling: the loss has the named training's mean, whatever the density.
    t (B,) in (0, 1) -> (B,).
    """
    return WEIGHTINGS[weighting](path.log_snr(t)) / effective_weight(prediction, path, density, t)
