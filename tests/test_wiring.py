"""What is asked for arrives: settings that pass through several hands before they act."""

import json
from unittest import mock

import pytest
import torch
from conftest import assert_one_line_error, run_here
from test_reflow import Known

from flowmatch_mnist import digitnet
from flowmatch_mnist.data import batches, reflow
from flowmatch_mnist.data.curve import CurveDataModule
from flowmatch_mnist.data.digits import MNISTDataModule
from flowmatch_mnist.data.reflow import ReflowDataModule, draw_pairs
from flowmatch_mnist.evaluation.classifiers import weights_of
from flowmatch_mnist.flow.couplings import COUPLINGS
from flowmatch_mnist.flow.guidance import guide
from flowmatch_mnist.images import mnist
from flowmatch_mnist.networks.mlp import MLP
from flowmatch_mnist.sampling.generate import Flow, Sampler
from flowmatch_mnist.sampling.units import UNITS
from flowmatch_mnist.support.files import load_weights


@pytest.fixture
def modules(tmp_path, monkeypatch, grey_digits):
    """Each kind of data module, made with the settings that a test gives."""
    monkeypatch.setattr(reflow, "SHARD", 100)
    draw_pairs(tmp_path / "pairs", Flow(Known(), units=UNITS["plane"]), Sampler(2), 100)

    def make(**settings):
        curve = CurveDataModule(prompted=True, samples=100, batch_size=20)
        made = [
            CurveDataModule(prompted=True, samples=100, batch_size=20, **settings),
            MNISTDataModule(batch_size=20, val_size=100, **settings),
        ]
        if "coupling" not in settings:
            made.append(ReflowDataModule(str(tmp_path / "pairs"), curve, batch_size=20, val_size=30, **settings))
        for data in made:
            data.setup("test")
            data.setup("fit")
        return made

    return make


def test_evaluation_and_prediction_are_in_the_sizes_asked_for(modules):
    for data in modules(eval_batch_size=7, predict_per_class=3):
        for batch in (next(iter(data.val_dataloader())), next(iter(data.test_dataloader()))):
            assert len(batch[1]) == 7
        labels = torch.cat([y for _, y, _ in data.predict_dataloader()])
        assert labels.tolist() == [*range(10)] * 3


def test_the_seed_orders_the_batches_and_draws_the_noise_of_predict(modules):
    for one, same, other in zip(modules(seed=1), modules(seed=1), modules(seed=2), strict=True):
        for loader in ("train_dataloader", "predict_dataloader"):
            first, again, different = (next(iter(getattr(data, loader)())) for data in (one, same, other))
            assert torch.equal(first[0], again[0]) and not torch.equal(first[0], different[0])


def test_workers_cut_the_batches_where_they_are_asked_for(modules, monkeypatch):
    asked = []

    class Loader:
        def __init__(self, cut, sampler, num_workers, batch_size, worker_init_fn):
            asked.append((num_workers, batch_size, worker_init_fn))
            self.cut, self.sampler = cut, sampler

        def __iter__(self):
            return (self.cut[samples] for samples in self.sampler)

    monkeypatch.setattr(batches, "DataLoader", Loader)
    for alone, helped in zip(modules(), modules(num_workers=3), strict=True):
        one, other = next(iter(alone.train_dataloader())), next(iter(helped.train_dataloader()))
        assert asked.pop() == (3, None, batches.leave_signals_to_the_trainer) and not asked
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", [0, 1], ids=["curve", "digits"])
def test_the_coupling_pairs_noise_with_data(modules, kind):
    for name in COUPLINGS:
        data, plain = modules(coupling=name)[kind], modules()[kind]
        batch = next(iter(data.train_dataloader()))
        x0, x1, y = data.on_after_batch_transfer(batch, 0)
        drawn = plain.on_after_batch_transfer(batch, 0)[0]
        assert torch.equal(x0, COUPLINGS[name](drawn, x1, y))
        assert torch.equal(x0, drawn) == (name == "independent")


def test_labels_stay_with_their_images(modules):
    _, data, _ = modules()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for batch in loader:
            _, x1, y = data.on_after_batch_transfer(batch, 0)
            torch.testing.assert_close(x1.mean((1, 2, 3)), 20 * y / 127.5 - 1)


def test_pairs_keep_the_labels_they_were_drawn_for(tmp_path, monkeypatch):
    class ByLabel(Known):
        """Carries noise to the number of its label."""

        def forward(self, x, t, y, until=None):
            return (y[:, None] - x) / (1 - t[:, None])

    monkeypatch.setattr(reflow, "SHARD", 30)
    sizes = []
    generate = reflow.generate
    monkeypatch.setattr(reflow, "generate", lambda *a, **s: sizes.append(s["batch_size"]) or generate(*a, **s))
    draw_pairs(tmp_path, Flow(ByLabel()), Sampler(2, "euler"), 60, batch_size=7)
    assert sizes == [7, 7]
    pairs = reflow.load_pairs(tmp_path, (2,), 10, "linear")
    torch.testing.assert_close(pairs["x1"].float(), pairs["y"][:, None].float().expand(-1, 2), atol=1e-2, rtol=0)


def test_a_guided_span_is_that_of_both_predictions():
    net = MLP(classes=3, spans=True)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, y, until = torch.randn(4, 2), torch.rand(4) / 2, torch.tensor([0, 1, 2, 0]), torch.ones(4)
    nothing = torch.full_like(y, 3)
    expected = torch.lerp(net(x, t, nothing, until), net(x, t, y, until), 1.5)
    torch.testing.assert_close(guide(net, x, t, y, 1.5, until), expected)
    torch.testing.assert_close(guide(net, x, t, y, torch.full((4,), 1.5), until), expected)
    torch.testing.assert_close(guide(net, x, t, y, 0.0, until), net(x, t, nothing, until))


def test_the_evaluator_is_trained_as_its_options_say(tmp_path, grey_digits, monkeypatch):
    monkeypatch.setattr(digitnet, "track", lambda parts, title: sizes.append(list(map(len, parts))) or parts)
    folders, sizes = [], []
    monkeypatch.setattr(mnist, "prepare", folders.append)

    def trained(*options):
        done = run_here("flowmatch_mnist/digitnet.py", "--out", "net.safetensors", *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return load_weights(tmp_path / "net.safetensors")

    weights, metadata = trained("--epochs", 1, "--seed", 3, "--data-dir", "there")
    assert [str(folder) for folder in folders] == ["there"]
    assert (
        metadata["seed"] == "3" and "--epochs 1 --seed 3" in metadata["command"] and "torch" in json.loads(metadata["versions"])
    )
    assert_one_line_error(run_here("flowmatch_mnist/digitnet.py", "--epochs", 0, cwd=tmp_path), "--epochs must be at least 1")
    other, _ = trained("--epochs", 1, "--seed", 4)
    assert not all(torch.equal(weights[name], other[name]) for name in weights)
    digitnet.train("digitnet", *mnist.load(None, "train"), epochs=2, seed=0, batch_size=300)
    assert sizes[-1] == [300] * 4
    others, metadata = trained("--net", "resnet", "--epochs", 1)
    assert not set(others) <= set(weights) and "--net resnet --epochs 1 --seed 1" in metadata["command"]
    monkeypatch.setattr(digitnet, "train", mock.Mock(side_effect=AssertionError("nothing is to be trained")))
    again, measured = trained("--measure")
    packaged, metadata = load_weights(weights_of("digitnet"))
    assert all(torch.equal(again[name], value) for name, value in packaged.items())
    assert measured["command"] == metadata["command"] and measured["real digits"] != metadata["real digits"]
