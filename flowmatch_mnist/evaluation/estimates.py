"""Figures with their standard errors: what was measured, and how far it would move with other samples of the same kind."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A figure and its standard error, in the figure's own unit. An exact figure has an error of 0.

    As text it has the digits that its error allows, two of an error that begins with 1, 2 or 3, else one: `1.84 ± 0.07`.
    """

    value: float
    error: float

    def __truediv__(self, other: "Estimate") -> "Estimate":
        """The ratio of two figures whose errors are independent."""
        ratio = self.value / other.value
        return Estimate(ratio, math.hypot(self.error, ratio * other.error) / abs(other.value))

    def __str__(self) -> str:
        if not self.error:
            return f"{self.value:g}"
        places = max(0, -math.floor(math.log10(self.error / 3.95)))
        return f"{self.value:.{places}f} ± {self.error:.{places}f}"


def mean(values: Tensor) -> Estimate:
    """The mean of values (N,), N at least 2, and its standard error."""
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(len(values)))


def share(those: Tensor) -> Estimate:
    """The share of True among bool (N,).

    The error is the standard deviation of Beta(k + 1/2, n - k + 1/2), which is not 0 where all are alike. Source: Brown, Cai
    and DasGupta 2001, "Interval Estimation for a Binomial Proportion", section 3 (Jeffreys' prior).
    """
    n, k = those.numel(), int(those.sum())
    likely = (k + 0.5) / (n + 1)
    return Estimate(k / n, math.sqrt(likely * (1 - likely) / (n + 2)))


def median(values: Tensor) -> Estimate:
    """The median of values (N,). Its error is half of what lies between the ranks one standard deviation above and below."""
    ranks = torch.tensor([0.5, 0.5 - 0.5 / math.sqrt(len(values)), 0.5 + 0.5 / math.sqrt(len(values))])
    middle, low, high = torch.quantile(values, ranks.to(values)).tolist()
    return Estimate(middle, (high - low) / 2)


@dataclass(frozen=True)
class Measurement:
    """One measure of samples.

    Attributes:
        name: of the measure; what stands before a slash is the group that it is shown in.
        samples: what the samples got.
        real: the baseline, what real data got, scored in the same way.
        ratio: whether the measure is read as `samples / real`.
    """

    name: str
    samples: Estimate
    real: Estimate
    ratio: bool = False

    @property
    def main(self) -> bool:
        """Whether it belongs to no group of details."""
        return "/" not in self.name

    @property
    def tag(self) -> str:
        """Its name in TensorBoard."""
        return f"quality/{self.title}" if self.main else f"quality_details/{self.title.replace('/', ' ')}"

    @property
    def error_tag(self) -> str:
        """The name of its error in TensorBoard."""
        return self.tag.replace("/", "_errors/", 1)

    @property
    def title(self) -> str:
        """The name of `score`."""
        return f"{self.name} ratio" if self.ratio else self.name

    @property
    def score(self) -> Estimate:
        """The one figure to watch: the samples', or its ratio to the baseline."""
        return self.samples / self.real if self.ratio else self.samples


def table(measurements: Sequence[Measurement]) -> str:
    """The measurements as lines: the name, the samples' figure, the baseline, and their ratio where that is the score."""
    lines = [f"{'':36}{'samples':>18}{'real data':>18}{'ratio':>14}"]
    for m in measurements:
        ratio = f"{m.score!s:>14}" if m.ratio else ""
        lines.append(f"{m.name.replace('/', ' '):36}{m.samples!s:>18}{m.real!s:>18}{ratio}")
    return "\n".join(lines)
