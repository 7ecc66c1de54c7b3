"""Sampling: the states and times on the way, batches, and whose noise is renewed."""

import io
from unittest import mock

import pytest
import torch
from PIL import Image
from test_watched import Shades

from flowmatch_mnist.flow.guidance import Guided, guide
from flowmatch_mnist.flow.paths import PATHS
from flowmatch_mnist.flow.predictions import StraightVelocity
from flowmatch_mnist.networks.mlp import MLP
from flowmatch_mnist.networks.unet import UNet
from flowmatch_mnist.sampling.generate import (
    INVERSION_SAMPLER,
    Flow,
    Sampler,
    Samples,
    churn_noise,
    draw_noise,
    generate,
    interpolate,
)
from flowmatch_mnist.sampling.likelihood import LIKELIHOOD_SAMPLER, log_likelihood

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


def test_the_defaults_are_those_that_the_scores_are_of():
    assert Sampler() == Sampler(8, "midpoint", 1.0, (0.0, 1.0), "uniform", 0.0, 0.0)
    assert Sampler(32, "rk4") == INVERSION_SAMPLER
    for ends in ((-0.1, 0.5), (0.5, 1.1), (0.6, 0.5)):
        with pytest.raises(ValueError, match="interval"):
            Sampler(guidance_interval=ends)
    assert Sampler(guidance_interval=(0.5, 0.5)).guidance_interval == (0.5, 0.5)
    for power in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="guidance_power must be at least 0"):
            Sampler(guidance_power=power)


@pytest.mark.parametrize(
    ("sampler", "words"),
    [
        (Sampler(1, "euler", 2.0), "euler, 1 step, guidance 2"),
        (Sampler(2, "euler", 2.0, (0.1, 1.0)), "euler, 2 steps, guidance 2 from t = 0.1 to 1"),
        (Sampler(2, "euler", 0.0, (0.1, 0.9)), "euler, 2 steps, guidance 0 from t = 0.1 to 0.9"),
        (Sampler(2, "euler", 2.0, guidance_power=1.5), "euler, 2 steps, guidance 2 with power 1.5"),
        (
            Sampler(2, "euler", 2.0, (0.1, 1.0), guidance_power=1),
            "euler, 2 steps, guidance 2 with power 1 from t = 0.1 to 1",
        ),
        (Sampler(2, "euler", 1.0, (0.1, 0.9), "log_snr", 0.5), "euler, 2 steps, guidance 1, spacing log_snr, churn 0.5"),
    ],
)
def test_a_sampler_is_described_by_what_acts(sampler, words):
    assert sampler.description() == words


def test_churn_of_no_samples_is_empty():
    assert churn_noise(0, [], (1, 2, 3), torch.device("cpu"))().shape == (0, 1, 2, 3)


def test_streams_of_noise_churn_and_probes_are_apart(stream_keys):
    flow = Flow(Shades(), prediction="noise")
    generate(flow, torch.arange(2), Sampler(2, "euler"), seed=5)
    assert stream_keys() == [(5, "sampling")]
    generate(flow, torch.arange(2), Sampler(2, "euler", churn=1.0), seed=5, numbers=[3, 8])
    assert stream_keys() == [(5, "sampling"), (5, "churn", 3), (5, "churn", 8)]
    log_likelihood(Flow(MLP()), torch.randn(2, 2), torch.zeros(2, dtype=torch.int64), Sampler(1), seed=5, numbers=[3, 8])
    assert stream_keys() == [(5, "probe", 3), (5, "probe", 8)]
    assert Sampler(24, "rk4", spacing="log_snr") == LIKELIHOOD_SAMPLER, "that of docs/results.md"


def test_states_are_kept_only_where_they_are_asked_for():
    for keep, states in ((False, 1), (True, 4)):
        decode = mock.Mock(side_effect=torch.clone)
        drawn = generate(Flow(Shades()), torch.arange(2), Sampler(3, "euler"), keep_states=keep, decode=decode)
        assert decode.call_count == states and (drawn.states is not None) == keep and drawn.evaluations == 3


def test_a_notebook_shows_digits_in_ten_columns_or_fewer_and_no_points():
    for count, size in ((3, (3, 1)), (10, (10, 1)), (12, (10, 2))):
        shown = Samples(torch.zeros(count, 28, 28, dtype=torch.uint8), torch.arange(count), 1)._repr_png_()
        with Image.open(io.BytesIO(shown)) as picture:
            assert picture.size == (120 * size[0], 120 * size[1])
    assert Samples(torch.zeros(3, 2), torch.arange(3), 1)._repr_png_() is None


def test_mean_velocities_are_asked_of_who_knows_them_alone():
    flow, sampler = Flow(Shades()), Sampler(1, "average")
    with pytest.raises(ValueError, match=r"meanflow\.yaml"):
        flow.states(flow.guided(torch.arange(2), sampler), torch.randn(2, 1, 28, 28), sampler)


def test_a_network_of_one_step_takes_one_step():
    flow = Flow(Shades(), one_step=True)
    for sampler in (Sampler(2, "euler"), Sampler(1, "heun"), Sampler(1, "dopri5")):
        with pytest.raises(ValueError, match="use 1 step of euler"):
            flow.check(sampler)
    flow.check(Sampler(1, "euler"))
    spanning = Flow(UNet(channels=(4, 8, 8), blocks=(1, 2, 2), spans=True), one_step=True)
    spanning.check(Sampler(1, "average"))
    with pytest.raises(ValueError, match="use 1 step of average"):
        spanning.check(Sampler(1, "euler"))
    assert flow.describe(Sampler(1, "euler"))["one_step"] is True and "one_step" not in Flow(Shades()).describe(Sampler())


def test_between_noises_of_one_direction_the_way_is_straight():
    for first in torch.randn(50, 1, 28, 28):
        torch.testing.assert_close(interpolate(first, first, 3), first.expand(3, 1, 28, 28))
        ways = torch.stack([first, 1.25 * first, 1.5 * first])
        torch.testing.assert_close(interpolate(first, 1.5 * first, 3), ways)
