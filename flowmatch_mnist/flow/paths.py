"""Probability paths from noise to data, x_t = alpha(t) x1 + sigma(t) x0, with noise at t=0 and data at t=1.

Two paths differ only in their speed and in their scale of x. Compare two paths at times of equal signal-to-noise ratio (SNR),
(alpha / sigma)^2: there, a point of one path is a multiple of a point of the other. So a network that was trained on any path
can be sampled along the straight path, `linear`. `predictions.StraightVelocity` does this.

Sources: Lipman et al. 2022, "Flow Matching for Generative Modeling", section 4 (Gaussian paths); Kingma et al. 2021,
"Variational Diffusion Models", section 3 and appendix G (equal signal-to-noise ratio).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def match_dims(t: Tensor, x: Tensor) -> Tensor:
    """Add trailing axes to t (B,) or (), so it can multiply x (B, ...)."""
    return t.reshape(t.shape + (1,) * (x.dim() - t.dim())) if t.dim() else t


class ProbabilityPath:
    """A path: the coefficients alpha and sigma at t in [0, 1], their derivatives, the log-SNR, and the inverse of the log-SNR.

    These functions take an input of any shape and return the same shape. Only the log-SNR and its derivative may be infinite at
    the ends t = 0 and t = 1. On all of [0, 1], alpha_dot sigma - alpha sigma_dot must be positive: then the velocity at a point
    determines the pair.
    """

    def alpha(self, t: Tensor) -> Tensor:
        """Return the weight of the data at t."""
        raise NotImplementedError

    def sigma(self, t: Tensor) -> Tensor:
        """Return the weight of the noise at t."""
        raise NotImplementedError

    def alpha_dot(self, t: Tensor) -> Tensor:
        """Return the derivative of alpha with respect to t."""
        raise NotImplementedError

    def sigma_dot(self, t: Tensor) -> Tensor:
        """Return the derivative of sigma with respect to t."""
        raise NotImplementedError

    def time(self, log_snr: Tensor) -> Tensor:
        """Return the t at which the path has this log-SNR: the inverse of `log_snr`. The log-SNR may be infinite.

        If the path does not reach this log-SNR, t is 0 or 1.
        """
        raise NotImplementedError

    def log_snr(self, t: Tensor) -> Tensor:
        """Return the logarithm of the signal-to-noise ratio, lambda = log(alpha^2 / sigma^2); it grows with t."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def log_snr_dot(self, t: Tensor) -> Tensor:
        """Return the derivative of the log-SNR with respect to t; it is positive inside (0, 1)."""
        return 2 * (self.alpha_dot(t) / self.alpha(t) - self.sigma_dot(t) / self.sigma(t))

    def point(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """Return x_t of the pair: x0, x1 (B, ...), t (B,) or () in [0, 1] -> (B, ...)."""
        return match_dims(self.alpha(t), x1) * x1 + match_dims(self.sigma(t), x0) * x0

    def velocity(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """Return u_t = d x_t / dt of the pair: shapes and range as in `point`."""
        return match_dims(self.alpha_dot(t), x1) * x1 + match_dims(self.sigma_dot(t), x0) * x0


class LinearPath(ProbabilityPath):
    """The straight line: alpha(t) = t, sigma(t) = 1 - t. The velocity x1 - x0 is constant along it.

    This is the conditional optimal-transport path of Lipman et al. 2022, equation 20 with sigma_min = 0. It is also the
    interpolation of rectified flow: Liu et al. 2022, "Flow Straight and Fast", equation 1.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(log_snr / 2)


class CosinePath(ProbabilityPath):
    """The quarter circle: alpha(t) = sin(pi t / 2), sigma(t) = cos(pi t / 2).

    If the data have variance 1, x_t has variance 1 at all t. This is the trigonometric path of Albergo and Vanden-Eijnden 2022,
    "Building Normalizing Flows with Stochastic Interpolants", equation 5. It is also the cosine schedule of Nichol and Dhariwal
    2021, "Improved DDPM", equation 17 with s = 0.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * (1 - t))  # the cosine, but exactly 0 at t=1

    def alpha_dot(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.cos(math.pi / 2 * t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * t)

    def time(self, log_snr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp(log_snr / 2))


class VariancePreservingPath(ProbabilityPath):
    """The diffusion of DDPM with linear betas, in continuous time: alpha^2 + sigma^2 = 1.

    With diffusion time s, log alpha = -s^2 (beta_max - beta_min) / 4 - s beta_min / 2: Song et al. 2021, "Score-Based
    Generative Modeling through Stochastic Differential Equations", equation 33. There, s runs from data to noise, and the slope
    of sigma is infinite at s = 0. So here s runs from 1 down to 1/1000 while t runs from 0 to 1. The noise at s = 1/1000 is
    the least noise that DDPM trains with.
    """

    beta_min, beta_max, s_min = 0.1, 20.0, 1e-3

    def _s(self, t: Tensor) -> Tensor:
        return 1 - (1 - self.s_min) * t

    def _log_alpha(self, t: Tensor) -> Tensor:
        s = self._s(t)
        return -(s**2) * (self.beta_max - self.beta_min) / 4 - s * self.beta_min / 2

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self._log_alpha(t)))

    def alpha_dot(self, t: Tensor) -> Tensor:
        beta = self.beta_min + self._s(t) * (self.beta_max - self.beta_min)
        return self.alpha(t) * beta / 2 * (1 - self.s_min)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)

    def time(self, log_snr: Tensor) -> Tensor:
        # alpha^2 = sigmoid(log_snr) is a quadratic equation for s. This form of its solution avoids cancellation.
        # The log-SNR is clamped, because for infinite noise the form would be infinity over infinity.
        squares = F.softplus(-log_snr.clamp(min=-50))  # -log alpha^2
        s = 2 * squares / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * squares))
        return ((1 - s) / (1 - self.s_min)).clamp(0, 1)


PathName = Literal["linear", "cosine", "vp"]

PATHS: dict[PathName, ProbabilityPath] = {"linear": LinearPath(), "cosine": CosinePath(), "vp": VariancePreservingPath()}
"""The paths, by their names in configs and checkpoints."""
