"""The exact field: against closed forms, as a target, and as what validation is held against."""

import pytest
import torch
from conftest import TINY, assert_one_line_error, run_here
from lightning.pytorch import LightningModule, Trainer
from test_runs import last

from flowmatch_mnist.data.curve import CurveDataModule
from flowmatch_mnist.data.digits import MNISTDataModule
from flowmatch_mnist.flow.exact import ExactField
from flowmatch_mnist.flow.loss import FlowLoss
from flowmatch_mnist.flow.paths import PATHS
from flowmatch_mnist.flow.predictions import PREDICTIONS, target
from flowmatch_mnist.networks.base import Network
from flowmatch_mnist.training.module import EXACT_LOSS_UNTIL, FlowMatching

Y = torch.tensor([1, 0, 1, 1, 0, 2])


def some_pairs(count=40, shape=(2, 3)):
    """Data, the field of them, and pairs of noise and data with labels and times, unlike those of the field."""
    data = torch.randn(6, *shape)
    y = torch.arange(count) % 3
    return ExactField(data, Y), data, torch.randn(count, *shape), torch.randn(count, *shape), y, torch.rand(count)


@pytest.mark.parametrize("name", PATHS)
def test_the_mean_is_bayes_rule_written_out(name):
    field, data, x0, x1, y, t = some_pairs()
    path = PATHS[name]
    noise, mean = field.pairs(path, x0, x1, y, t)
    x_t = path.point(x0, x1, t)
    for i in range(len(y)):
        alpha, sigma = path.alpha(t[i]).double(), path.sigma(t[i]).double()
        of_class = data[y[i] == Y].double()
        density = torch.distributions.Normal(alpha * of_class, sigma).log_prob(x_t[i].double()).flatten(1).sum(1)
        weights = (density - density.max()).exp()
        expected = (weights[:, None, None] * of_class).sum(0) / weights.sum()
        torch.testing.assert_close(mean[i].double(), expected, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(path.point(noise, mean, t), x_t, atol=1e-4, rtol=1e-4)


def test_of_two_points_it_is_the_hyperbolic_tangent():
    field = ExactField(torch.tensor([[-1.0], [1.0]]), torch.zeros(2, dtype=torch.int64))
    x0, x1, t = torch.randn(200, 1), torch.randn(200, 1).sign(), 0.9 * torch.rand(200)
    _, mean = field.pairs(PATHS["linear"], x0, x1, torch.zeros(200, dtype=torch.int64), t)
    x_t = (t * x1[:, 0] + (1 - t) * x0[:, 0]).double()
    torch.testing.assert_close(mean[:, 0].double(), torch.tanh(t * x_t / (1 - t) ** 2), atol=1e-5, rtol=1e-4)


def test_pairs_that_come_later_or_without_a_label_stay_as_they_are():
    field, _, x0, x1, y, t = some_pairs()
    y[:10] = 3
    noise, mean = field.pairs(PATHS["linear"], x0, x1, y, t, until=0.4)
    changed = (t < 0.4) & (y < 3)
    assert 0 < changed.sum() < 30
    for before, after in ((x0, noise), (x1, mean)):
        assert torch.equal((before != after).flatten(1).any(1), changed)


class Elsewhere(torch.Tensor):
    """A tensor that says it is on a GPU. The exact field treats all classes at once there."""

    device = torch.device("cuda")


@pytest.mark.parametrize("kind", [torch.Tensor, Elsewhere])
def test_a_label_between_those_of_the_data_is_not_in_them_either(kind, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.no_grad())
    field = ExactField(torch.randn(6, 3), torch.tensor([0, 0, 2, 2, 2, 0]))
    x0, x1 = torch.randn(3, 3), torch.randn(3, 3)
    labels, t = torch.tensor([1, 2, 3]), torch.full((3,), 0.2)
    noise, mean = (x.as_subclass(torch.Tensor) for x in field.pairs(PATHS["linear"], x0, x1.as_subclass(kind), labels, t))
    assert [torch.equal(a, b) for a, b in zip(mean, x1, strict=True)] == [True, False, True]
    assert [torch.equal(a, b) for a, b in zip(noise, x0, strict=True)] == [True, False, True]


def test_all_at_once_is_the_same_as_class_by_class(monkeypatch):
    field, _, x0, x1, y, t = some_pairs()
    y[:10] = 3
    apart = field.pairs(PATHS["cosine"], x0, x1, y, t, until=0.6)

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.no_grad())
    together = field.pairs(PATHS["cosine"], x0, x1.as_subclass(Elsewhere), y, t, until=0.6)
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one, other.as_subclass(torch.Tensor), atol=1e-5, rtol=1e-5)


def test_it_is_computed_in_32_bits_whatever_training_computes_in():
    field, _, x0, x1, y, t = some_pairs()
    expected = field.pairs(PATHS["linear"], x0, x1, y, t)
    with torch.autocast("cpu", torch.bfloat16):
        found = field.pairs(PATHS["linear"], x0, x1, y, t)
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))


class Exact(Network):
    """Puts out what a field says; its one weight does nothing."""

    shape = (2,)

    def __init__(self, path, prediction, classes=3):
        super().__init__(classes, embedding_dim=4, spans=False)
        self.path, self.prediction, self.weight = PATHS[path], prediction, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t, y, until=None):
        # A pair that leads through x: no data, and noise.
        x0 = x / self.path.sigma(t)[:, None].clamp(min=1e-3)
        return target(self.prediction, self.path, *self.field.pairs(self.path, x0, 0 * x, y, t), t) + 0 * self.weight


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_early_targets_are_exact_and_later_ones_their_own(path, prediction):
    net = Exact(path, prediction)
    field, data, x0, _, _, t = some_pairs(400, (2,))
    t = 0.05 + 0.9 * t
    net.field, drawn = field, torch.randint(6, (400,))
    x1, y = data[drawn], Y[drawn]
    own = FlowLoss(path, prediction, label_dropout=0.0)(net, x0, x1, y, t)
    loss = FlowLoss(path, prediction, label_dropout=0.0, exact_until=0.5)
    with pytest.raises(ValueError, match="exact field is not known"):
        loss(net, x0, x1, y, t)
    loss.exact_field = field
    found = loss(net, x0, x1, y, t)
    assert (found[t < 0.5] < 1e-4).all() and own[t < 0.5].mean() > 1e-2
    assert torch.equal(found[t >= 0.5], own[t >= 0.5])


def test_a_sample_without_its_label_keeps_its_target():
    net = Exact("linear", "velocity")
    field, data, x0, _, _, t = some_pairs(200, (2,))
    net.field, drawn = field, torch.randint(6, (200,))
    loss = FlowLoss(label_dropout=0.5, exact_until=0.99)
    loss.exact_field = field
    drawn_numbers = {"labels": torch.rand(200), "spans": None}
    found = loss(net, x0, data[drawn], Y[drawn], 0.9 * t, lambda what, *shape: drawn_numbers[what])
    dropped = drawn_numbers["labels"] < 0.5
    assert (found[~dropped] < 1e-4).all() and found[dropped].mean() > 1e-2


@pytest.mark.parametrize("until", [-0.1, 1, 1.5])
def test_it_ends_before_the_data(until):
    with pytest.raises(ValueError, match=r"exact_until must lie in \[0, 1\)"):
        FlowLoss(exact_until=until)


def test_the_set_that_training_draws_from(data_dir):
    digits = MNISTDataModule(str(data_dir), val_size=59_000, batch_size=10)
    digits.setup("fit")
    x1, y = digits.training_set()
    assert x1.shape == (1000, 1, 28, 28) and torch.equal(y, digits.splits["train"][1])
    assert torch.equal(x1, digits.encode(digits.splits["train"][0]))
    for setting in ({"dequantize": True}, {"coupling": "ot"}, {"coupling": "ot_within_class"}):
        other = MNISTDataModule(str(data_dir), val_size=59_000, batch_size=10, **setting)
        other.setup("fit")
        assert other.training_set() is None


@pytest.mark.parametrize("path", PATHS)
def test_validation_is_also_held_against_the_exact_field(path, tmp_path):
    """The field itself has no such loss, but a common one; one that is off by 1/2 has one of 1/4."""
    data = CurveDataModule(prompted=True, samples=400, batch_size=50)
    net = Exact(path, "velocity", classes=10)
    data.setup("fit")
    net.field = ExactField(*data.training_set())
    limit = PATHS[path].time(PATHS["linear"].log_snr(torch.tensor(EXACT_LOSS_UNTIL)))
    for off in (0.0, 0.5):
        module = FlowMatching(net, path=path)
        forward = net.forward
        net.forward = lambda *a, off=off, forward=forward: forward(*a) + off
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
        (found,) = trainer.validate(module, data, verbose=False)
        exact = {name: value for name, value in found.items() if name.startswith("loss_exact/val ")}
        assert len(exact) == torch.ceil(10 * limit - 1e-3) and next(iter(exact)) == "loss_exact/val 0.0 to 0.1"
        assert all(value == pytest.approx(off**2, abs=1e-3) for value in exact.values())
        assert found["loss/val"] > 0.01


def test_where_there_is_no_exact_field_validation_does_without():
    data = CurveDataModule(prompted=True, samples=400, batch_size=50, coupling="ot_within_class")
    module: LightningModule = FlowMatching(Exact("linear", "velocity", classes=10))
    module.net.field = ExactField(torch.randn(20, 2), torch.arange(20) % 10)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    (found,) = trainer.validate(module, data, verbose=False)
    assert not any("exact" in name for name in found)


def test_by_the_command_line(few_digits, tmp_path):
    few = ["--trainer.limit_train_batches", 2, "--evaluation.every_n_epochs", 0, "--sampling.every_n_epochs", 0]
    few += ["--trainer.precision", "32-true"]  # in bf16, the small difference of the targets is lost
    train = ["train.py", "fit", "--config", TINY, "--data.data_dir", few_digits, "--trainer.max_epochs", 1, *few]
    weights = []
    for until in (0, 0.3, 0.6):
        done = run_here(*train, "--model.exact_until", until, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        weights.append(last(tmp_path, f"runs/tiny/version_{len(weights)}")["state_dict"])
    assert all(weights[0].keys() == some.keys() for some in weights), "the field is in no checkpoint"
    assert not any(torch.equal(weights[0][name], weights[1][name]) for name in list(weights[0])[-2:])
    assert not any(torch.equal(weights[1][name], weights[2][name]) for name in list(weights[0])[-2:])
    coupled = ["--model.exact_until", 0.3, "--data.coupling", "ot_within_class"]
    assert_one_line_error(run_here(*train, *coupled, cwd=tmp_path), "exact_until", "coupling independent")
