"""The loss: what no field can know, what each of its settings changes, and a training in ten lines without Lightning."""

import pytest
import torch
from oracle import MEAN, SPREAD, Gaussian
from torch import nn

from flowmatch_mnist.data.curve import LENGTH, Curve, curve
from flowmatch_mnist.flow.loss import FlowLoss, losses_by_time, reduce
from flowmatch_mnist.flow.meanflow import MeanFlow
from flowmatch_mnist.flow.paths import PATHS
from flowmatch_mnist.flow.predictions import PREDICTIONS
from flowmatch_mnist.flow.times import LogitNormal, Uniform
from flowmatch_mnist.flow.weighting import WEIGHTINGS, loss_weight
from flowmatch_mnist.images import mnist
from flowmatch_mnist.images.pixels import PIXELS
from flowmatch_mnist.networks.mlp import MLP
from flowmatch_mnist.networks.unet import UNet
from flowmatch_mnist.sampling.generate import Flow, Sampler, generate
from flowmatch_mnist.sampling.units import UNITS


class Perfect(nn.Module):
    """What an infinitely long training on N(MEAN, SPREAD^2) ends in, but for what is `off`; it remembers its labels."""

    no_label = 10

    def __init__(self, path="linear", prediction="velocity", off=0.0):
        super().__init__()
        self.predict, self.off = Gaussian(PATHS[path], prediction), off

    def forward(self, x, t, y, until=None):
        self.labels = y
        return self.predict(x, t) + self.off


def pairs(count=4000, shape=(1, 4, 4)):
    return torch.randn(count, *shape), MEAN + SPREAD * torch.randn(count, *shape), torch.zeros(count, dtype=torch.long)


def irreducible(path, prediction, t):
    """The variance that the target has at a point: no field can know which pair came along."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    of_data = SPREAD**2 * sigma**2 / (alpha**2 * SPREAD**2 + sigma**2)
    by_data = {"data": 1.0, "noise": -alpha / sigma, "velocity": path.alpha_dot(t) - path.sigma_dot(t) * alpha / sigma}
    return by_data[prediction] ** 2 * of_data


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_the_loss_of_a_perfect_field_is_the_irreducible_one(path, prediction):
    loss = FlowLoss(path, prediction, label_dropout=0)
    for t in (0.1, 0.5, 0.9):
        x0, x1, y = pairs()
        times = torch.full((len(y),), t)
        losses = loss(Perfect(path, prediction), x0, x1, y, times)
        expected = irreducible(PATHS[path], prediction, torch.tensor(t))
        assert losses.shape == (len(y),)
        assert (losses.mean() - expected).abs() < 4 * losses.std() / len(y) ** 0.5
        # A field that is off by 0.1 pays just that, squared.
        wrong = loss(Perfect(path, prediction, off=0.1), x0, x1, y, times)
        noise = 4 * 0.2 * (expected / x0[0].numel() / len(y)) ** 0.5
        assert abs(wrong.mean() - losses.mean() - 0.01) < noise + 1e-5


@pytest.mark.parametrize(("loss", "best"), [("squared", 0.4), ("huber", 0.4)])
def test_where_seven_in_ten_pixels_are_white_the_best_guess_is_their_mean(loss, best):
    pixels = torch.tensor([1.0] * 7 + [-1.0] * 3)
    guesses = torch.linspace(-1, 1, 201)
    losses = reduce(pixels - guesses[:, None], loss)
    assert guesses[losses.argmin()].item() == pytest.approx(best, abs=0.011)
    assert reduce(torch.zeros(2, 10), loss).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["squared", "huber"])
def test_the_loss_that_is_named_is_taken(name):
    x0, x1, y = pairs(50)
    t = torch.rand(50)
    net = Perfect()
    expected = reduce(FlowLoss().error(net, x0, x1, y, t), name)
    torch.testing.assert_close(FlowLoss(loss=name, label_dropout=0)(net, x0, x1, y, t), expected)


def test_huber_is_of_the_sample_and_bends_at_a_hundredth():
    error = torch.tensor([[0.03, 0.04]])
    size, c = (0.0025 / 2) ** 0.5, 0.01
    assert reduce(error, "huber").item() == pytest.approx((size**2 + c**2) ** 0.5 - c)
    assert FlowLoss().label_dropout == 0.1


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("density", [Uniform(), LogitNormal(-0.5)])
def test_a_weighting_multiplies_the_loss_by_its_weight_under_the_density(name, density):
    x0, x1, y = pairs(50)
    t = density.sample(50, torch.Generator().manual_seed(0))
    plain = FlowLoss(times=density)(Perfect(), x0, x1, y, t)
    weighted = FlowLoss(times=density, weighting=name)(Perfect(), x0, x1, y, t)
    weight = loss_weight(name, "velocity", PATHS["linear"], density, t)
    torch.testing.assert_close(weighted, plain * weight)
    if (name, type(density)) != ("flow_matching", Uniform):
        assert (weight - 1).abs().max() > 0.1


def test_labels_are_dropped_by_the_numbers_that_are_given():
    x0, x1, y = pairs(10)
    net = Perfect()
    asked = []

    def uniform(what, *shape):
        asked.append((what, shape))
        return torch.arange(10) / 10

    FlowLoss(label_dropout=0.35)(net, x0, x1, y + 3, torch.rand(10), uniform)
    assert asked == [("labels", (10,))] and net.labels.tolist() == [10] * 4 + [3] * 6
    for dropout, expected in ((0.0, 0), (1.0, 10)):
        FlowLoss(label_dropout=dropout)(net, x0, x1, y, torch.rand(10))
        assert net.labels.tolist() == [expected] * 10


def test_the_mean_losses_of_intervals_of_time_end_where_they_are_asked_to():
    losses, t = torch.arange(4.0), torch.tensor([0.02, 0.05, 0.15, 0.9])
    found = list(losses_by_time(losses, t, until=0.2, intervals=10))
    assert [(name, mean.item(), count) for name, mean, count in found] == [("0.0 to 0.1", 0.5, 2), ("0.1 to 0.2", 2.0, 1)]
    assert [count for *_, count in losses_by_time(losses, t)] == [3, 0, 0, 0, 1]


def test_mean_velocities_are_learned_where_they_are_asked_for():
    net = MLP(spans=True, width=8, layers=1)
    x0, x1, y = pairs(20, (2,))
    t, u = torch.rand(20), torch.rand(20, 2)
    mean_flow = MeanFlow(stride=0.1)
    loss = FlowLoss(mean_flow=mean_flow, loss="huber", label_dropout=0)
    path = PATHS["linear"]
    error = mean_flow.error(net, path.point(x0, x1, t), x1 - x0, t, y, mean_flow.ends(t, u))

    def uniform(what, *shape):
        assert shape == {"labels": (20,), "spans": (20, 2)}[what]
        return {"labels": torch.rand(shape), "spans": u}[what]

    found = loss(net, x0, x1, y, t, uniform)
    torch.testing.assert_close(found, reduce(error, "huber"))
    assert not torch.allclose(found, FlowLoss(loss="huber", label_dropout=0)(net, x0, x1, y, t))


def test_the_teacher_is_fetched_by_its_name_and_missed_where_it_is_not():
    net, teacher = MLP(spans=True), MLP()
    x0, x1, y = pairs(5, (2,))
    loss = FlowLoss(mean_flow=MeanFlow(teacher="somebody"))
    with pytest.raises(ValueError, match="somebody was not loaded"):
        loss(net, x0, x1, y, torch.rand(5))
    names = []
    loss.prepare(lambda name: names.append(name) or teacher)
    assert names == ["somebody"] and loss.mean_flow.net is teacher
    assert loss(net, x0, x1, y, torch.rand(5)).isfinite().all()
    for without in (FlowLoss(), FlowLoss(mean_flow=MeanFlow())):
        without.prepare(names.append)
    assert names == ["somebody"]


@pytest.mark.parametrize("settings", [{"label_dropout": 1.1}, {"label_dropout": -0.1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="label_dropout must"):
        FlowLoss(**settings)


@pytest.mark.parametrize("settings", [{"path": "cosine"}, {"prediction": "data"}])
def test_mean_velocities_are_of_the_linear_path_and_of_networks_with_spans(settings):
    with pytest.raises(ValueError, match="linear path"):
        FlowLoss(mean_flow=MeanFlow(), **settings)
    with pytest.raises(ValueError, match="spans"):
        FlowLoss(mean_flow=MeanFlow()).check(MLP())
    FlowLoss(mean_flow=MeanFlow()).check(MLP(spans=True))
    FlowLoss(label_dropout=0).check(MLP())
    with pytest.raises(ValueError, match="set label_dropout above 0"):
        FlowLoss(label_dropout=0).check(MLP(), guided=True)


def train(net, batch_of, steps, lr):
    """The whole of a training, without Lightning."""
    loss, optimizer = FlowLoss(), torch.optim.AdamW(net.parameters(), lr)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x1, y = batch_of(256)
        x0, t = torch.randn_like(x1), loss.density.sample(len(y), generator)
        mean = loss(net, x0, x1, y, t).mean()
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()
    return mean.item()


def test_ten_lines_train_the_toy():
    units = UNITS["plane"]

    def points(count):
        return units.encode(curve(LENGTH * torch.rand(count))), torch.zeros(count, dtype=torch.int64)

    net = MLP(width=64)
    flow, labels = Flow(net, units=units), torch.zeros(500, dtype=torch.int64)
    (before,) = Curve().measure(generate(flow, labels, Sampler(10)))
    train(net, points, 400, 4e-3)
    (after,) = Curve().measure(generate(flow, labels, Sampler(10)))
    assert before.samples.value > 1 and after.samples.value < 0.4


def test_ten_lines_train_digits(data_dir):
    images, labels = mnist.load(data_dir, "train")

    def digits(count):
        batch = torch.randint(len(images), (count,))
        return PIXELS["linear"].encode(images[batch]), labels[batch]

    net = UNet((8, 16), (1, 1), (False, False))
    assert train(net, digits, 1, 4e-3) > 1.5, "the zero field misses x1 - x0 by the variance of both"
    assert train(net, digits, 40, 4e-3) < 0.6
