"""What the network puts out, and what follows from it: velocity, data, noise and score are one thing under four names.

All conversions go through the pair (x0, x1): a prediction at x_t fixes the noise x0 and the data x1 with x_t = alpha x1 +
sigma x0, and everything else is made of those two.

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
"""Beyond it a prediction of data (when noise is all but gone) or of noise (when data is) says nothing of the other of the
pair; DDPM's own path runs from -10.05 to 9.1."""


def target(prediction: Prediction, path: ProbabilityPath, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """What the network should put out at x_t of the pair: x0, x1 (B, ...), t (B,) -> (B, ...)."""
    return {"velocity": path.velocity(x0, x1, t), "data": x1, "noise": x0}[prediction]


def pair(prediction: Prediction, path: ProbabilityPath, output: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The (x0, x1) that the network's output at x_t stands for.

    Args:
        prediction: what the output is.
        path: on which x_t lies.
        output: (B, ...).
        x_t: (B, ...).
        t: (B,) or (). A prediction of data needs sigma > 0, one of noise alpha > 0.

    Returns:
        The noise x0 and the data x1, (B, ...) each.
    """
    alpha, sigma = match_dims(path.alpha(t), x_t), match_dims(path.sigma(t), x_t)
    if prediction == "data":
        return (x_t - alpha * output) / sigma, output
    if prediction == "noise":
        return output, (x_t - sigma * output) / alpha
    # x_t and the velocity are two linear equations for x0 and x1.
    alpha_dot, sigma_dot = match_dims(path.alpha_dot(t), x_t), match_dims(path.sigma_dot(t), x_t)
    determinant = alpha_dot * sigma - alpha * sigma_dot
    return (alpha_dot * x_t - alpha * output) / determinant, (sigma * output - sigma_dot * x_t) / determinant


def score(path: ProbabilityPath, x0: Tensor, t: Tensor) -> Tensor:
    """The gradient of log p_t at x_t, -E[x0 | x_t] / sigma (Tweedie's formula): x0 (B, ...), t (B,) or () -> (B, ...)."""
    return -x0 / match_dims(path.sigma(t), x0)


class StraightVelocity:
    """A network's velocity in straight coordinates, whatever path it was trained on and whatever it puts out.

    A point x at time t of the straight path is, but for its scale, the point of the same signal-to-noise ratio on the
    network's path. There the network is asked; the pair that it stands for has the velocity x1 - x0.

    Along these coordinates Euler's step, x + h (x1 - x0), goes from the point of (x0, x1) at t to that at t + h: it is the step
    of DDIM (Song, Meng and Ermon 2020, equation 12), for every path.

    Args:
        predict: (x (B, ...) on the network's path, t () on it) -> the network's output (B, ...); of a network of mean
            velocities, which is of the straight path, also (x, t, until).
        path: the network's path.
        prediction: what it puts out.
    """

    def __init__(self, predict: Callable[..., Tensor], path: ProbabilityPath, prediction: Prediction) -> None:
        self.predict = predict
        self.path = path
        self.prediction = prediction

    def __call__(self, x: Tensor, t: Tensor, until: Tensor | None = None) -> Tensor:
        """The velocity at x (B, ...) and t () of the straight path, or its mean from t to `until` (): (B, ...)."""
        if until is not None:
            return self.predict(x, t, until)
        if self.path is STRAIGHT and self.prediction == "velocity":
            return self.predict(x, t)
        log_snr = STRAIGHT.log_snr(t)
        if self.prediction != "velocity":
            log_snr = log_snr.clamp(-LOG_SNR_LIMIT, LOG_SNR_LIMIT)
        s = self.path.time(log_snr)
        x_s = x * torch.hypot(self.path.alpha(s), self.path.sigma(s)) / torch.hypot(STRAIGHT.alpha(t), STRAIGHT.sigma(t))
        x0, x1 = pair(self.prediction, self.path, self.predict(x_s, s), x_s, s)
        return x1 - x0
