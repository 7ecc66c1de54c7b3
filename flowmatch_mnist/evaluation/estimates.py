"""Scores with their standard errors. An error says how far a score would move with other samples of the same kind."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """A number and its standard error, in the same unit. An exact number has the error 0.

    As text, the number has the digits that its error allows. The error has two digits if it begins with 1, 2 or 3, and one
    digit otherwise: `1.84 ± 0.07`.
    """

    value: float
    error: float

    def __truediv__(self, other: "Estimate") -> "Estimate":
        """Return the ratio of two numbers with independent errors."""
        ratio = self.value / other.value
        return Estimate(ratio, math.hypot(self.error, ratio * other.error) / abs(other.value))

    def __str__(self) -> str:
        if not self.error:
            return f"{self.value:g}"
        # From 3.95 on, the error is rounded to 4.0, which begins with 4.
        places = max(0, -math.floor(math.log10(self.error / 3.95)))
        return f"{self.value:.{places}f} ± {self.error:.{places}f}"


def mean(values: Tensor) -> Estimate:
    """Return the mean of values (N,), N at least 2, and its standard error."""
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(len(values)))


def share(those: Tensor) -> Estimate:
    """Return the share of True among bool (N,), and its standard error.

    The error is the standard deviation of Beta(k + 1/2, n - k + 1/2), with k of n True. It is not 0 even if all values are
    equal. Source: Brown, Cai and DasGupta 2001, "Interval Estimation for a Binomial Proportion", section 3 (Jeffreys' prior).
    """
    n, k = those.numel(), int(those.sum())
    likely = (k + 0.5) / (n + 1)
    return Estimate(k / n, math.sqrt(likely * (1 - likely) / (n + 2)))


def median(values: Tensor) -> Estimate:
    """Return the median of values (N,), and its standard error.

    The error is half of the difference between two values: those at the ranks one standard deviation above and below the
    median's rank. The number of values below the true median is binomial, with the standard deviation sqrt(N) / 2.
    """
    ranks = torch.tensor([0.5, 0.5 - 0.5 / math.sqrt(len(values)), 0.5 + 0.5 / math.sqrt(len(values))])
    middle, low, high = torch.quantile(values, ranks.to(values)).tolist()
    return Estimate(middle, (high - low) / 2)


@dataclass(frozen=True)
class Measurement:
    """One measure of samples, with its baseline.

    Attributes:
        name: the measure's name. If it contains a slash, the part before the slash is a group of details.
        samples: the score of the samples.
        real: the baseline: the score of real data, scored in the same way.
        ratio: whether the score is the ratio `samples / real`.
    """

    name: str
    samples: Estimate
    real: Estimate
    ratio: bool = False

    @property
    def main(self) -> bool:
        """Return whether the measure belongs to no group of details."""
        return "/" not in self.name

    @property
    def tag(self) -> str:
        """Return the tag of the score in TensorBoard."""
        return f"quality/{self.title}" if self.main else f"quality_details/{self.title.replace('/', ' ')}"

    @property
    def error_tag(self) -> str:
        """Return the tag of the score's error in TensorBoard."""
        return self.tag.replace("/", "_errors/", 1)

    @property
    def title(self) -> str:
        """Return the name of `score`."""
        return f"{self.name} ratio" if self.ratio else self.name

    @property
    def score(self) -> Estimate:
        """Return the main number: the samples' score, or its ratio to the baseline."""
        return self.samples / self.real if self.ratio else self.samples


def table(measurements: Sequence[Measurement]) -> str:
    """Return the measurements as lines of text: name, samples' score, baseline, and their ratio if that is the score."""
    lines = [f"{'':36}{'samples':>18}{'real data':>18}{'ratio':>14}"]
    for m in measurements:
        ratio = f"{m.score!s:>14}" if m.ratio else ""
        lines.append(f"{m.name.replace('/', ' '):36}{m.samples!s:>18}{m.real!s:>18}{ratio}")
    return "\n".join(lines)
