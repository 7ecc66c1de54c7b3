"""Which noise is paired with which digit.

A coupling permutes the noise of a batch; the digits and their labels stay. Straighter paths need fewer steps, but the pairing
must leave the noise of each class standard normal: that is where sampling starts.

Sources: Pooladian et al. 2023, "Multisample Flow Matching", and Tong et al. 2023, "Improving and Generalizing Flow-Based
Generative Models with Minibatch Optimal Transport" (the transport).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

CouplingName = Literal["independent", "ot_within_class", "ot"]


def independent(x0: Tensor, x1: Tensor, y: Tensor) -> Tensor:
    """Each digit with the noise that was drawn for it: x0, x1 (B, ...), y (B,) -> x0 (B, ...)."""
    return x0


def optimal_transport(x0: Tensor, x1: Tensor, y: Tensor) -> Tensor:
    """The permutation of x0 with the least sum of squared distances to x1, over the whole batch.

    For conditional sampling this is wrong: a class of the batch is handed the noise on its side of the space, whereas sampling
    starts it from all of the noise. `ot_within_class` is right.
    """
    # Imported where it is used: SciPy takes a while.
    from scipy.optimize import linear_sum_assignment

    cost = torch.cdist(x1.flatten(1), x0.flatten(1)).square()
    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return x0[torch.from_numpy(columns).to(x0.device)]


def ot_within_class(x0: Tensor, x1: Tensor, y: Tensor) -> Tensor:
    """Optimal transport within each class alone, so that every class keeps noise that knows nothing of it."""
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
"""The couplings by the names that configs use."""
