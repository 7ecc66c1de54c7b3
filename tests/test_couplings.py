"""Couplings: the best permutation, within the class, and nothing else moved."""

from itertools import permutations

import pytest
import torch

from flowmatch_mnist.flow.couplings import COUPLINGS, independent, optimal_transport, ot_within_class


def cost(x0, x1):
    return (x0 - x1).square().sum().item()


def test_transport_finds_the_best_of_all_permutations():
    x0, x1, y = torch.randn(6, 1, 2, 2), torch.randn(6, 1, 2, 2), torch.zeros(6, dtype=torch.long)
    best = min(cost(x0[list(order)], x1) for order in permutations(range(6)))
    assert abs(cost(optimal_transport(x0, x1, y), x1) - best) < 1e-4


@pytest.mark.parametrize("name", COUPLINGS)
def test_a_coupling_only_permutes_the_noise(name):
    x0, x1, y = torch.randn(40, 1, 2, 2), torch.randn(40, 1, 2, 2), torch.arange(40) % 4
    paired = COUPLINGS[name](x0, x1, y)
    assert torch.equal(paired.flatten(1).sort(0).values, x0.flatten(1).sort(0).values)
    assert cost(paired, x1) <= cost(x0, x1) + 1e-4


def test_within_a_class_the_noise_stays_and_is_transported():
    x0, y = torch.randn(400, 2), torch.arange(400) % 2
    x1 = torch.randn(400, 2) * 0.1 + (y[:, None] * 6 - 3)  # two classes, far to the left and to the right
    within, across = ot_within_class(x0, x1, y), optimal_transport(x0, x1, y)
    for label in (0, 1):
        members = y == label
        assert torch.equal(within[members].sort(0).values, x0[members].sort(0).values)
        assert torch.equal(within[members], optimal_transport(x0[members], x1[members], y[members]))
    # Across classes each gets the noise on its side, which is not what sampling starts from.
    assert across[y == 1].mean() > 0.5 > abs(within[y == 1].mean())
    assert independent(x0, x1, y) is x0
