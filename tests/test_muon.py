"""Muon: what it does to a convolution's weight, that all else is AdamW's, and that its state is kept."""

import copy

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flowmatch_mnist.networks.unet import UNet
from flowmatch_mnist.training import muon
from flowmatch_mnist.training.muon import Muon, by_size, in_one_batch, orthogonalize


def test_orthogonalizing_pushes_singular_values_to_one_and_keeps_the_directions():
    # Wide, tall and square; with a smaller side of 8 three, of 1 two, and of 16 one.
    shapes = [(8, 30), (30, 8), (8, 8), (1, 9), (9, 1), (16, 144)]
    matrices = [100 * torch.randn(shapes[0]), *(torch.randn(shape) for shape in shapes[1:])]
    for before, found in zip(matrices, orthogonalize(matrices), strict=True):
        assert found.shape == before.shape
        u, _, vh = torch.linalg.svd(before, full_matrices=False)
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.6 and values.max() < 1.3
        # The same singular vectors: the result is diagonal in their basis.
        inside = u.mT @ found @ vh.mT
        assert (inside - inside.diagonal().diag()).abs().max() < 1e-4


def test_without_a_round_a_matrix_is_only_scaled_to_a_norm_of_one():
    wide, tall = torch.randn(3, 8), torch.randn(8, 3)
    for matrix, found in zip((wide, tall), orthogonalize([wide, tall], iterations=0), strict=True):
        torch.testing.assert_close(found, matrix / matrix.norm())


def test_a_processor_takes_them_by_size_and_a_gpu_in_one_batch(monkeypatch):
    taken = []
    monkeypatch.setattr(muon, "by_size", lambda wide, rounds: taken.append(("by size", rounds)) or wide)
    monkeypatch.setattr(muon, "in_one_batch", lambda wide, rounds: taken.append(("in one batch", rounds)) or wide)
    for device in ("cpu", "meta"):
        assert orthogonalize([torch.zeros(8, 3, device=device)], 4)[0].shape == (8, 3)
    assert taken == [("by size", 4), ("in one batch", 4)]
    assert muon.newton_schulz(torch.eye(3, dtype=torch.bfloat16)[None], 1).dtype == torch.bfloat16


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 3))


def train(net, optimizer, steps, seed=0):
    for i in range(steps):
        torch.manual_seed(seed + i)
        optimizer.zero_grad()
        net(torch.randn(5, 4, 8, 8)).square().mean().backward()
        optimizer.step()


def test_kernels_move_otherwise_than_all_else():
    one, other = net(), net()
    train(one, Muon(one.parameters(), lr=0.01), 1)
    train(other, torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.01), 1)
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7) == (a.dim() != 4), name


def test_all_but_kernels_move_as_adamw_moves_them():
    for settings, betas in (({}, (0.9, 0.999)), ({"betas": (0.5, 0.6)}, (0.5, 0.6))):
        one, other = net(), net()
        for kernel in (0, 1):  # the same convolutions in both, so that all that comes after them sees the same
            one[kernel].requires_grad_(False), other[kernel].requires_grad_(False)
        train(one, Muon(one.parameters(), lr=0.01, **settings), 3)
        train(other, torch.optim.AdamW(other.parameters(), lr=0.01, betas=betas, weight_decay=0.01), 3)
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


def test_kernels_move_as_far_as_adamw_moves_its_own():
    one, start = net(), net()
    train(one, Muon(one.parameters(), lr=0.01, weight_decay=0), 1)
    for a, b in zip(one.parameters(), start.parameters(), strict=True):
        if a.dim() == 4:
            assert 0.1 * 0.01 < (a - b).square().mean().sqrt() < 0.4 * 0.01


def test_its_state_is_saved_and_restored():
    one = net()
    optimizer = Muon(one.parameters())
    train(one, optimizer, 3)
    other = copy.deepcopy(one)
    again = Muon(other.parameters())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(one, optimizer, 3, seed=7)
    train(other, again, 3, seed=7)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


class Launches(TorchDispatchMode):
    """Counts operations that compute: on a GPU each is a launch."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_for_a_gpu_all_kernels_are_one_batch_with_the_same_results_in_fewer_launches():
    kernels = [p for p in UNet((16, 48, 96)).parameters() if p.dim() == 4]
    matrices = [torch.randn_like(p).flatten(1) for p in kernels]
    wide = [x if x.shape[0] <= x.shape[1] else x.mT for x in matrices]
    counts, results = [], []
    for way in (by_size, in_one_batch):
        with Launches() as launches:
            results.append(way(wide, 5))
        counts.append(launches.count)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=0)
    assert counts[1] < counts[0] / 3 and counts[1] < 100


def test_a_closure_takes_its_gradients_and_steps_are_counted():
    convolution = nn.Conv2d(1, 2, 3)
    optimizer = Muon(convolution.parameters())
    assert optimizer.defaults["fused"]

    def closure():
        loss = convolution(torch.ones(1, 1, 3, 3)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure) > 0
    assert {state["step"].item() for state in optimizer.state.values()} == {2}
