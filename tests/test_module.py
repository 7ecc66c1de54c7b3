"""The training step: randomness that repeats, what the data and the network must agree on, and the learning rate."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flowmatch_mnist.data.curve import Curve
from flowmatch_mnist.data.pairs import PairsDataModule
from flowmatch_mnist.evaluation.problems import Digits
from flowmatch_mnist.flow.times import Uniform
from flowmatch_mnist.networks.mlp import MLP
from flowmatch_mnist.networks.unet import UNet
from flowmatch_mnist.sampling.generate import Flow, Sampler
from flowmatch_mnist.sampling.units import UNITS
from flowmatch_mnist.sampling.weights import save
from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.training.module import FlowMatching
from flowmatch_mnist.training.optimizer import learning_rate_factor


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


class Points(PairsDataModule):
    """Pairs of points, of one path if asked for."""

    def __init__(self, problem, path=None):
        super().__init__(problem, 4, 4, 1)
        self.path = path


def test_the_module_takes_the_units_of_the_data_and_refuses_data_it_is_not_for():
    module = FlowMatching(MLP(classes=10), path="cosine")
    module.check_data_and_set_units(Points(Curve(classes=10)))
    assert module.flow.units is UNITS["plane"] and module.flow.describe(module.sampler)["units"] == "plane"
    for data, words in (
        (Points(Curve(classes=1)), "10 classes and samples of shape"),
        (Points(Digits()), "Points has 10 classes and samples of shape"),
        (Points(Curve(classes=10), "linear"), "set --model.path linear, not cosine"),
    ):
        with pytest.raises(UserError, match=words):
            module.check_data_and_set_units(data)
    images = FlowMatching(UNet((4,), (1,), (False,)))
    for pixels in ("linear", "logit"):
        images.check_data_and_set_units(Points(Digits(pixels)))
        assert images.flow.units is UNITS[pixels]


def test_a_warm_start_begins_with_the_weights_of_a_file(tmp_path):
    trained = MLP(classes=10)
    save(tmp_path / "trained.safetensors", Flow(trained), Sampler(), {})
    module = FlowMatching(MLP(classes=10), start=str(tmp_path / "trained.safetensors"))
    module._trainer = SimpleNamespace(max_steps=3, max_epochs=None)
    for stage, module.resumes, starts in (("test", False, False), ("fit", True, False), ("fit", False, True)):
        module.setup(stage)
        assert torch.equal(module.net.label.weight, trained.label.weight) == starts


def test_channels_last_is_the_memory_format_of_the_weights():
    for asked in (False, True):
        net = FlowMatching(UNet((4, 8), (1, 1), (False, False)), channels_last=asked).net
        assert net.middle.blocks[0].conv1.weight.is_contiguous(memory_format=torch.channels_last) == asked


def test_the_settings_of_the_loss_are_arguments_of_the_module():
    module = FlowMatching(Recorder(), path="vp", prediction="noise", times=Uniform(), loss="huber", weighting="sd3")
    objective = module.objective
    assert (objective.path, objective.prediction, objective.loss, objective.weighting) == ("vp", "noise", "huber", "sd3")
    assert isinstance(objective.density, Uniform) and (module.flow.path, module.flow.prediction) == ("vp", "noise")
    with pytest.raises(TypeError, match="widht"):
        FlowMatching(Recorder(), widht=3)
