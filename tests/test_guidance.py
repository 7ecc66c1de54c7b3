"""Label dropout and classifier-free guidance."""

import pytest
import torch

from flowmatch_mnist.flow.guidance import Guided, drop_labels
from flowmatch_mnist.flow.paths import PATHS
from flowmatch_mnist.flow.predictions import PREDICTIONS, pair, target
from flowmatch_mnist.networks.base import Network


def test_labels_are_dropped_one_by_one_and_as_often_as_asked():
    y = torch.arange(10).repeat(1000)
    dropped = drop_labels(y, 0.1, 10, torch.rand(len(y)))
    share = (dropped == 10).double().mean().item()
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / len(y)) ** 0.5
    assert torch.equal(dropped[dropped != 10], y[dropped != 10])
    # By batch, not by sample, each batch of 100 would lose all its labels or none.
    by_batch = (dropped == 10).view(-1, 100).double().mean(1)
    assert by_batch.min() + by_batch.max() > 0 and by_batch.max() < 0.5
    assert by_batch.std() < 0.06


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0.0), (1.0, 1.0)])
def test_the_ends_of_label_dropout(probability, expected):
    dropped = drop_labels(torch.zeros(100, dtype=torch.long), probability, 10, torch.rand(100))
    assert (dropped == 10).double().mean() == expected
    (least,) = drop_labels(torch.zeros(1, dtype=torch.long), probability, 10, torch.zeros(1)).tolist()
    assert (least == 10) == expected, "dice may show 0, and never 1"


def test_a_time_is_spread_over_the_samples_without_a_wait():
    time = torch.tensor(0.3)
    for device, stride in (("cpu", 0), ("meta", 1)):
        spread = Guided._spread(time, torch.zeros(3, 2, device=device))
        # Where both are on one device it is one number seen three times; for another it is filled in as a number.
        assert spread.shape == (3,) and spread.device.type == device and spread.stride() == (stride,)


def test_guidance_is_the_line_through_both_predictions(tiny_net):
    x, t, y = torch.randn(3, 1, 28, 28), torch.tensor(0.4), torch.tensor([1, 2, 3])
    with torch.no_grad():
        velocities = {scale: Guided(tiny_net, y, scale)(x, t) for scale in (0.0, 1.0, 2.5)}
        with_label = tiny_net(x, t.expand(3), y)
    torch.testing.assert_close(velocities[1.0], with_label)
    assert not torch.allclose(velocities[0.0], velocities[1.0], atol=1e-3)
    line = velocities[0.0] + 2.5 * (velocities[1.0] - velocities[0.0])
    torch.testing.assert_close(velocities[2.5], line, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("scale", "evaluations"), [(0.0, 1), (1.0, 1), (1.5, 2)])
def test_an_evaluation_is_not_spent_where_guidance_is_off(tiny_net, scale, evaluations):
    velocity = Guided(tiny_net, torch.tensor([1, 2]), scale)
    seen = []
    tiny_net.register_forward_pre_hook(lambda net, inputs: seen.append(len(inputs[0])))
    with torch.no_grad():
        velocity(torch.randn(2, 1, 28, 28), torch.tensor(0.5))
    assert seen == [2 * evaluations] and velocity.evaluations == evaluations


def test_guidance_acts_in_its_interval_alone(tiny_net):
    x, y = torch.randn(2, 1, 28, 28), torch.tensor([1, 2])
    guided = Guided(tiny_net, y, 3.0, (0.25, 0.5))
    with torch.no_grad():
        for t in (0.0, 0.24, 0.51, 1.0):
            torch.testing.assert_close(guided(x, torch.tensor(t)), Guided(tiny_net, y, 1.0)(x, torch.tensor(t)))
        assert guided.evaluations == 4
        for t in (0.25, 0.4, 0.5):
            torch.testing.assert_close(guided(x, torch.tensor(t)), Guided(tiny_net, y, 3.0)(x, torch.tensor(t)))
    assert guided.evaluations == 10


class TwoMinds(Network):
    """At x_t of the pairs (x0, x1), it predicts the pairs with the label, and other pairs of the same x_t without it."""

    def __init__(self, prediction, path, x0, x1, away):
        super().__init__(2, 2, spans=False)
        self.outputs = {}
        for label, noise in (1, x0), (2, x0 + away):
            data = x1 - path.sigma(T) / path.alpha(T) * (noise - x0)
            self.outputs[label] = target(prediction, path, noise, data, T.expand(len(x0)))

    def forward(self, x, t, y, until=None):
        return torch.cat([self.outputs[label] for label in y.unique().tolist()])


T = torch.tensor(0.4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_with_a_power_guidance_grows_with_the_doubt_about_the_label(path, prediction, power):
    x0, x1 = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    doubts = torch.tensor([0.1, 1.0, 3.0])  # standard deviations of the noise between the predictions of the noise
    away = torch.nn.functional.normalize(torch.randn(3, 16)).view_as(x0) * doubts.view(-1, 1, 1, 1)
    path = PATHS[path]
    x_t = path.alpha(T) * x1 + path.sigma(T) * x0
    net = TwoMinds(prediction, path, x0, x1, away)
    guided = Guided(net, torch.ones(3, dtype=torch.long), 1.5, (0.0, 1.0), power, path, prediction)
    noise, _ = pair(prediction, path, guided(x_t, T), x_t, T)
    torch.testing.assert_close(noise, x0 - 0.5 * doubts.view(-1, 1, 1, 1) ** power * away, atol=1e-4, rtol=1e-4)
    assert guided.evaluations == 2


def test_where_guidance_is_off_its_power_changes_nothing(tiny_net):
    x, y = torch.randn(2, 1, 28, 28), torch.tensor([1, 2])
    with torch.no_grad():
        for scale, t in (1.0, 0.4), (0.0, 0.4), (3.0, 0.7):
            guided = Guided(tiny_net, y, scale, (0.2, 0.5), power=2.0)
            torch.testing.assert_close(guided(x, torch.tensor(t)), Guided(tiny_net, y, scale, (0.2, 0.5))(x, torch.tensor(t)))
            assert guided.evaluations == 1
