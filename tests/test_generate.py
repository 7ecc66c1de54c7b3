"""Sampling: the states and times on the way, batches, and whose noise is renewed."""

import torch
from test_watched import Shades

from flowmatch_mnist.flow.guidance import Guided, guide
from flowmatch_mnist.flow.paths import PATHS
from flowmatch_mnist.flow.predictions import StraightVelocity
from flowmatch_mnist.networks.mlp import MLP
from flowmatch_mnist.sampling.generate import Flow, Sampler, draw_noise, generate

EULER = Sampler(4, "euler")


def test_digits_are_drawn_so_many_at_a_time_and_each_batch_is_told():
    net, told = Shades(), []
    drawn = generate(Flow(net), torch.arange(7), Sampler(1, "euler"), batch_size=3, on_batch=told.append)
    assert [count for _, count, _ in net.seen] == told == [3, 3, 1] and len(drawn.values) == 7


def test_renewed_noise_is_told_by_the_number_of_the_sample():
    churned = Sampler(4, "euler", churn=1.0)
    flow, noise, labels = Flow(Shades(), prediction="noise"), torch.randn(6, 1, 28, 28), torch.zeros(6, dtype=torch.long)
    whole = generate(flow, labels, churned, noise=noise, decode=torch.clone).values
    some = torch.tensor([4, 1])
    parts = generate(flow, labels[some], churned, noise=noise[some], numbers=some.tolist(), decode=torch.clone).values
    torch.testing.assert_close(parts, whole[some])
    assert not torch.allclose(generate(flow, labels[some], churned, noise=noise[some], decode=torch.clone).values, parts)


def test_states_stop_at_the_times_and_take_the_noise_that_are_given():
    net = Shades()
    flow, x, y = Flow(net), torch.randn(2, 1, 28, 28), torch.tensor([0, 1])
    states = list(flow.states(flow.guided(y, EULER), x, EULER, times=[0.0, 0.5, 0.75]))
    assert len(states) == 3 and [t for *_, t in net.seen] == [0.0, 0.5]
    sampler, fresh = Sampler(2, "euler", churn=1.0), torch.ones(2, 1, 28, 28)
    ways = [flow.states(flow.guided(y, sampler), x, sampler, fresh_noise=lambda n=n: n * fresh) for n in (0, 1, 2)]
    none, once, twice = (list(states)[1].detach() for states in ways)
    assert (once - none).min() > 0.1, "the noise on the way is the given one"
    torch.testing.assert_close(twice - none, 2 * (once - none))


def test_the_mean_over_a_span_is_asked_for_through_guidance_and_straight_coordinates():
    net = MLP(classes=3, spans=True)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, y, t, until = draw_noise(4, (2,), torch.Generator()), torch.tensor([0, 1, 2, 0]), torch.tensor(0.2), torch.tensor(0.7)
    guided = Guided(net, y, 1.5)
    expected = guide(net, x, t.expand(4), y, 1.5, until.expand(4))
    torch.testing.assert_close(guided(x, t, until), expected)
    torch.testing.assert_close(StraightVelocity(guided, PATHS["linear"], "velocity")(x, t, until), expected)
    assert not torch.allclose(guided(x, t), expected, atol=1e-4)
