"""Couplings: they decide which noise is paired with which digit.

A coupling permutes the noise of a batch. The digits and their labels stay in place. A good coupling makes trajectories
straighter, so sampling needs fewer steps. But the noise of each class must stay standard normal, because sampling starts each
class from standard normal noise.

Sources: Pooladian et al. 2023, "Multisample Flow Matching", and Tong et al. 2023, "Improving and Generalizing Flow-Based
Generative Models with Minibatch Optimal Transport" (optimal transport).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

CouplingName = Literal["independent", "ot_within_class", "ot"]


def independent(x0: Tensor, x1: Tensor, y: Tensor) -> Tensor:
    """Keep each digit with the noise that was drawn for it: x0, x1 (B, ...), y (B,) -> x0 (B, ...)."""
    return x0


def optimal_transport(x0: Tensor, x1: Tensor, y: Tensor) -> Tensor:
    """Return the permutation of x0 with the least sum of squared distances to x1, over the whole batch.

    This coupling is wrong for conditional sampling. It pairs each class with the noise that is near to that class. But sampling
    starts each class from all of the noise. Use `ot_within_class` instead.

    x0, x1 (B, ...), y (B,), which has no effect -> x0 (B, ...).
    """
    # Imported here because the import of SciPy is slow.
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(x1.flatten(1), x0.flatten(1)).square()
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return x0[torch.from_numpy(columns).to(x0.device)]


def ot_within_class(x0: Tensor, x1: Tensor, y: Tensor) -> Tensor:
    """Use optimal transport within each class only, so the noise of every class stays independent of the class.

    x0, x1 (B, ...), y (B,) -> x0 (B, ...).
    """
    paired = x0.clone()
    for label in y.unique():
        members = y == label
        paired[members] = optimal_transport(x0[members], x1[members], y[members])
    return paired


COUPLINGS: dict[CouplingName, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "independent": independent,
    "ot_within_class": ot_within_class,
    "ot": optimal_transport,
}
"""The couplings, by their names in configs."""
