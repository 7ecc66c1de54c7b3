"""The probability path from noise to data, x_t = alpha(t) x1 + sigma(t) x0, with noise at t=0 and data at t=1.

Source: Lipman et al. 2022, "Flow Matching for Generative Modeling", section 4; Liu et al. 2022, "Flow Straight and Fast".
"""

from torch import Tensor


def match_dims(t: Tensor, x: Tensor) -> Tensor:
    """Give t (B,) or () trailing axes, so that it multiplies x (B, ...)."""
    return t.reshape(t.shape + (1,) * (x.dim() - t.dim())) if t.dim() else t


class LinearPath:
    """The straight line: alpha(t) = t, sigma(t) = 1 - t, so that the velocity x1 - x0 is constant along it.

    This is the conditional optimal-transport path of Lipman et al. 2022, equation 20 with sigma_min = 0, and rectified
    flow's interpolation of Liu et al. 2022, equation 1.
    """

    def alpha(self, t: Tensor) -> Tensor:
        """The weight of the data at t."""
        return t

    def sigma(self, t: Tensor) -> Tensor:
        """The weight of the noise at t."""
        return 1 - t

    def alpha_dot(self, t: Tensor) -> Tensor:
        """The derivative of alpha by t."""
        return t.new_ones(t.shape)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """The derivative of sigma by t."""
        return t.new_full(t.shape, -1.0)

    def point(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """x_t of the pair: x0, x1 (B, ...), t (B,) in [0, 1] -> (B, ...)."""
        return match_dims(self.alpha(t), x1) * x1 + match_dims(self.sigma(t), x0) * x0

    def velocity(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """u_t = d x_t / dt of the pair, what the network learns to predict: same shapes as `point`."""
        return match_dims(self.alpha_dot(t), x1) * x1 + match_dims(self.sigma_dot(t), x0) * x0
