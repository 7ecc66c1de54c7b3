"""The training step: the loss of a perfect field, randomness that repeats, and the learning rate."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flowmatch_mnist.module import FlowMatching, learning_rate_factor, reduce
from flowmatch_mnist.paths import match_dims
from flowmatch_mnist.times import Uniform

MEAN, SPREAD = 0.3, 0.5


class Perfect(nn.Module):
    """The exact marginal velocity from N(0, I) to N(MEAN, SPREAD^2 I)."""

    no_label = 10

    def forward(self, x, t, y):
        t = match_dims(t, x)
        variance = SPREAD**2 * t**2 + (1 - t) ** 2
        return MEAN + (SPREAD**2 * t - (1 - t)) / variance * (x - MEAN * t)


def test_the_loss_of_a_perfect_field_is_the_irreducible_one():
    """E[Var(x1 - x0 | x_t)] = s^2 / (s^2 t^2 + (1 - t)^2) for each pixel: what no field can know."""
    for t in (0.1, 0.5, 0.9):
        x0 = torch.randn(4000, 1, 4, 4)
        x1 = MEAN + SPREAD * torch.randn_like(x0)
        y = torch.zeros(4000, dtype=torch.long)
        losses = reduce(FlowMatching(Perfect()).error(x0, x1, y, torch.full((4000,), t)), "squared")
        irreducible = SPREAD**2 / (SPREAD**2 * t**2 + (1 - t) ** 2)
        error = (losses.mean() - irreducible).abs().item()
        assert error < 4 * losses.std().item() / 4000**0.5
        # and a field that is off by 0.1 pays just that, squared
        off = FlowMatching(Perfect())
        off.net.register_forward_hook(lambda net, inputs, v: v + 0.1)
        wrong = reduce(off.error(x0, x1, y, torch.full((4000,), t)), "squared")
        assert abs(wrong.mean() - losses.mean() - 0.01) < 0.005


@pytest.mark.parametrize(("loss", "best"), [("squared", 0.4), ("huber", 0.4), ("charbonnier", 1.0)])
def test_where_seven_in_ten_pixels_are_white_the_best_guess_is_their_mean_or_their_median(loss, best):
    pixels = torch.tensor([1.0] * 7 + [-1.0] * 3)
    guesses = torch.linspace(-1, 1, 201)
    losses = reduce(pixels - guesses[:, None], loss)
    assert guesses[losses.argmin()].item() == pytest.approx(best, abs=0.011)
    assert reduce(torch.zeros(2, 10), loss).tolist() == [0.0, 0.0]


class Recorder(nn.Module):
    """Remembers what it was called with."""

    no_label = 10

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((t, y))
        return self.scale * x


def step(module, number, rank=0):
    progress = SimpleNamespace(total=SimpleNamespace(processed=number))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    module._trainer = SimpleNamespace(fit_loop=loop, global_rank=rank, world_size=2)
    module._fabric = None
    module.log = lambda *arguments, **settings: None
    x = torch.zeros(64, 1, 2, 2)
    module.training_step((x, x, torch.zeros(64, dtype=torch.long)), 0)
    return module.net.calls[-1]


def test_times_and_label_dropout_are_a_function_of_seed_step_and_share():
    base = step(FlowMatching(Recorder(), label_dropout=0.5), 7)
    again = step(FlowMatching(Recorder(), label_dropout=0.5), 7)
    assert all(torch.equal(a, b) for a, b in zip(base, again, strict=True))
    others = [
        step(FlowMatching(Recorder(), label_dropout=0.5), 8),
        step(FlowMatching(Recorder(), label_dropout=0.5), 7, rank=1),
        step(FlowMatching(Recorder(), label_dropout=0.5, seed=1), 7),
    ]
    for other in others:
        assert not any(torch.equal(a, b) for a, b in zip(base, other, strict=True))


def test_training_looks_where_the_density_says():
    t, _ = step(FlowMatching(Recorder(), times=Uniform()), 0)
    assert (t * 8).long().bincount(minlength=8).tolist() == [8] * 8, "in each process's share too"


@pytest.mark.parametrize(("decay", "middle"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_the_learning_rate_rises_and_falls(decay, middle):
    rates = [learning_rate_factor(i, 10, 110, decay) for i in range(111)]
    assert 0 < rates[0] < 0.1 and rates[10] == 1
    assert rates[60] == pytest.approx(middle)
    assert rates[110] == pytest.approx(1.0 if decay == "constant" else 0.0)
    assert all(a <= b for a, b in pairwise(rates[:11]))


@pytest.mark.parametrize("settings", [{"label_dropout": 1.1}, {"warmup_steps": -1}])
def test_refuses_settings_out_of_range(settings):
    with pytest.raises(ValueError, match="must"):
        FlowMatching(Recorder(), **settings)
