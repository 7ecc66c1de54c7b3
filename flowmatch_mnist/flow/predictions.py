"""Prediction targets and conversions: each of velocity, data, noise and score gives the other three.

All conversions use the pair (x0, x1). A prediction at x_t determines the noise x0 and the data x1, because x_t = alpha x1 +
sigma x0. The pair then determines all other quantities.

Sources: Salimans and Ho 2022, "Progressive Distillation", appendix D (predictions); Gao et al. 2024, "Diffusion Meets Flow
Matching" (one family); Song et al. 2021, "Score-Based Generative Modeling through SDEs" (the score).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from flowmatch_mnist.flow.paths import PATHS, ProbabilityPath, match_dims

Prediction = Literal["velocity", "data", "noise"]
PREDICTIONS: tuple[Prediction, ...] = ("velocity", "data", "noise")

STRAIGHT = PATHS["linear"]

LOG_SNR_LIMIT = 10.0
"""The limit for the absolute value of the log-SNR. Above +10, x_t has almost no noise, and a prediction of the data does not
determine the noise. Below -10, x_t has almost no data, and a prediction of the noise does not determine the data. The path of
DDPM itself runs from -10.05 to 9.1."""


def target(prediction: Prediction, path: ProbabilityPath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """Return the target of the network at x_t of the pair: x0, x1 (B, ...), t (B,) -> (B, ...)."""
    return {"velocity": path.velocity(x0, x1, t), "data": x1, "noise": x0}[prediction]


def pair(prediction: Prediction, path: ProbabilityPath, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pair (x0, x1) that the network's output at x_t determines.

    Args:
        prediction: the prediction target of the network.
        path: the path of x_t.
        output: the network's output, (B, ...).
        x_t: the point, (B, ...).
        t: its time, (B,) or (). A prediction of data needs sigma > 0. A prediction of noise needs alpha > 0.

    Returns:
        The noise x0 and the data x1, (B, ...) each.
    """
    alpha, sigma = match_dims(path.alpha(t), x_t), match_dims(path.sigma(t), x_t)
    if prediction == "data":
        return (x_t - alpha * output) / sigma, output
    if prediction == "noise":
        return output, (x_t - sigma * output) / alpha
    # x_t and the velocity give two linear equations for x0 and x1.
    alpha_dot, sigma_dot = match_dims(path.alpha_dot(t), x_t), match_dims(path.sigma_dot(t), x_t)
    determinant = alpha_dot * sigma - alpha * sigma_dot
    return (alpha_dot * x_t - alpha * output) / determinant, (sigma * output - sigma_dot * x_t) / determinant


def score(path: ProbabilityPath, x0: Tensor, t: Tensor) -> Tensor:
    """Return the score, the gradient of log p_t at x_t: predicted noise x0 (B, ...), t (B,) or () -> (B, ...).

    It is -E[x0 | x_t] / sigma (Tweedie's formula), with sigma > 0.
    """
    return -x0 / match_dims(path.sigma(t), x0)


class StraightVelocity:
    """A network's velocity on the straight path, `linear`, for any path and any prediction target of the network.

    Take a point x at time t of the straight path. The network's path has a point with the same signal-to-noise ratio, and the
    two points differ only in scale. The network is evaluated at the point of its own path. Its output determines a pair
    (x0, x1), and the velocity is x1 - x0.

    Euler's step on the straight path, x + h (x1 - x0), goes from the point of (x0, x1) at t to the point of the same pair at
    t + h. This is the step of DDIM (Song, Meng and Ermon 2020, equation 12), for every path of the network.

    Args:
        predict: (x (B, ...) and t () on the network's path) -> the network's output (B, ...). A network of mean velocities,
            which always has the straight path, also takes (x, t, until).
        path: the network's path.
        prediction: the network's prediction target.
    """

    def __init__(self, predict: Callable[..., Tensor], path: ProbabilityPath, prediction: Prediction) -> None:
        self.predict = predict
        self.path = path
        self.prediction = prediction

    def __call__(self, x: Tensor, t: Tensor, until: Tensor | None = None) -> Tensor:
        """Return the velocity at x (B, ...) and t () of the straight path: (B, ...).

        With `until` (), return the mean velocity from t to `until`.
        """
        if until is not None:
            return self.predict(x, t, until)
        if self.path is STRAIGHT and self.prediction == "velocity":
            return self.predict(x, t)
        log_snr = STRAIGHT.log_snr(t)
        if self.prediction != "velocity":  # a velocity determines the pair at every log-SNR
            log_snr = log_snr.clamp(-LOG_SNR_LIMIT, LOG_SNR_LIMIT)
        s = self.path.time(log_snr)
        x_s = x * torch.hypot(self.path.alpha(s), self.path.sigma(s)) / torch.hypot(STRAIGHT.alpha(t), STRAIGHT.sigma(t))
        x0, x1 = pair(self.prediction, self.path, self.predict(x_s, s), x_s, s)
        return x1 - x0
