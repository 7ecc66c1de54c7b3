"""Distribution matching: a student learns to go from noise to data in one step, without a target for the single sample.

The student's sample is x = x0 + u(x0, 0, 1): one step with its mean velocity u from t = 0 to t = 1. Noise carries x back to a
point x_t on the path. There, two networks know a velocity. The teacher knows the velocity of real data. The second network,
`fake`, knows the velocity of the student's samples: it learns it by flow matching, while the student learns. At each noise
level, the difference between the two is the direction in which x becomes more likely among the samples, and less likely among
the data. So the student moves x the other way:

    x_t = t x + (1 - t) noise,    step = (fake(x_t, t) - teacher(x_t, t)) / mean |x - noise - teacher(x_t, t)|

On average, this step is the gradient of the Kullback-Leibler divergence D(samples || data) between both with noise, up to a
weight for each t. The denominator is the teacher's error at this point. It makes the steps at all t equally large. Both
networks learn in the same step of the optimizer, and the loss of each leaves the other unchanged. `fake` starts as a copy of
the teacher.

The student may also learn from pairs: the network that it started from draws a sample from the same noise in several steps,
and the student's sample should be near to it. Then more samples belong to their class. In the first steps of a run,
the student may learn from pairs alone. Such a step is faster.

The loss of `fake` for pairs of real data is smallest if the samples are distributed like the data. Validation logs this loss.

Sources: Yin et al. 2023, "One-step Diffusion with Distribution Matching Distillation", equations 7 and 8 (the step and its
weight, where `fake` estimates data, and not velocities) and section 3.3 (pairs, with another distance, and with the weight
0.25); Yin et al. 2024, "Improved Distribution Matching Distillation for Fast Image Synthesis" (without pairs).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from flowmatch_mnist.flow.paths import PATHS
from flowmatch_mnist.flow.teacher import Teacher
from flowmatch_mnist.networks.base import Network

SMOOTH = 0.01
"""The distance of a pair is nearly quadratic where the difference of two pixels is below this."""


class DistributionMatching(Teacher):
    """How a network learns one step by distribution matching.

    Args:
        teacher: trained weights, a file or a name of weights in the package, which know the velocity of the data. `fake` starts
            from them too, so the teacher must have the student's network.
        guidance: the guidance scale of the teacher. The student learns guided samples, so sampling needs no guidance.
        guidance_interval: the first and the last t at which the guidance acts.
        guidance_power: the power of the guidance, see `guidance.guide`; at least 0.
        student_rate: the student's learning rate, as a share of the rate of `fake`, in (0, 1]. If the student changes too fast,
            `fake` cannot follow, and the samples lose their variety (Yin et al. 2024, section 4.2).
        pairs: the weight of the distance between the student's sample and the sample that the network of `start` draws from the
            same noise, at least 0. The distance is smooth L1. 0 means no pairs.
        pairs_first: the number of optimizer steps, at least 0, in which the student learns from pairs alone, with weight 1.
            They are the first steps of the run. `fake` learns only after them.

    Attributes:
        net: the teacher's network.
        fake: the network that learns the velocity of the student's samples, or None before the training code sets it.
        draw: draws the other samples of the pairs, noise (B, ...) and labels (B,) -> data (B, ...), or None.
        steps_taken: returns the number of optimizer steps so far. Without training code, it is 0.

    Raises:
        ValueError: if a number is out of its range.
    """

    def __init__(
        self,
        teacher: str,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_power: float = 0.0,
        student_rate: float = 0.2,
        pairs: float = 0.0,
        pairs_first: int = 0,
    ) -> None:
        super().__init__(teacher, guidance, guidance_interval, guidance_power)
        if not 0 < student_rate <= 1:
            raise ValueError(f"student_rate must be above 0 and at most 1, got {student_rate}")
        if not 0 <= pairs < math.inf:
            raise ValueError(f"pairs must be at least 0, and finite, got {pairs}")
        if pairs_first < 0:
            raise ValueError(f"pairs_first must be at least 0, got {pairs_first}")
        self.student_rate = student_rate
        self.pairs = pairs
        self.pairs_first = pairs_first
        self.draw: Callable[[Tensor, Tensor], Tensor] | None = None
        self.fake: Network | None = None
        self.steps_taken: Callable[[], int] = lambda: 0

    @property
    def pairs_alone(self) -> bool:
        """Whether the student learns from pairs alone in this step."""
        return self.steps_taken() < self.pairs_first

    def losses(self, student: Network, x0: Tensor, noise: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the sum of both losses for each sample, (B,).

        Without pairs, the gradient of the student's loss with respect to x is the step, divided by the number of its
        coordinates. The loss of `fake` is that of flow matching.

        Args:
            student: the network that learns to go from noise to data, built with spans.
            x0: the noise where the student begins, (B, ...).
            noise: other noise, which carries samples back to a point on the path, (B, ...).
            t: the times of these points, (B,).
            y: labels (B,).

        Raises:
            ValueError: if `fake`, the teacher's `net` or, for pairs, `draw` is not set.
        """
        if self.fake is None:
            raise ValueError("the network of the student's samples is unknown; set `fake` to a copy of the teacher")
        x = x0 + student(x0, torch.zeros_like(t), y, torch.ones_like(t))
        if self.pairs_alone:
            # In training with several processes, each parameter must have a gradient, here 0.
            return self.distance(x, x0, y) + 0 * sum(parameter.sum() for parameter in self.fake.parameters())
        sample = x.detach()
        x_t, u_t = PATHS["linear"].point(noise, sample, t), sample - noise
        fake = self.fake(x_t, t, y)
        with torch.no_grad():
            real = self.velocity(x_t, t, y)
            own_error = (u_t - real).abs().flatten(1).mean(1)
            step = (fake - real) / own_error.view(-1, *[1] * (x.dim() - 1))
        losses = ((x - (sample - step)).square() / 2 + (fake - u_t).square()).flatten(1).mean(1)
        return losses + self.pairs * self.distance(x, x0, y) if self.pairs else losses

    def distance(self, x: Tensor, x0: Tensor, y: Tensor) -> Tensor:
        """Return the distance of each sample to the other sample of its pair: x, noise x0 (B, ...), labels y (B,) -> (B,).

        Raises:
            ValueError: if `draw` is not set.
        """
        return F.smooth_l1_loss(x, self.pair(x0, y), reduction="none", beta=SMOOTH).flatten(1).mean(1)

    @torch.no_grad()
    def pair(self, x0: Tensor, y: Tensor) -> Tensor:
        """Return the other samples of the pairs: noise (B, ...), labels (B,) -> data (B, ...).

        Raises:
            ValueError: if `draw` is not set.
        """
        if self.draw is None:
            raise ValueError("nothing draws the samples of the pairs; set `draw`, or set pairs and pairs_first to 0")
        return self.draw(x0, y)
