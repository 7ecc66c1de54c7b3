"""From files to networks: what is refused, what fits, and how a network comes out."""

import contextlib

import numpy as np
import pytest
import torch

from flowmatch_mnist import draw
from flowmatch_mnist.networks.mlp import MLP
from flowmatch_mnist.networks.unet import UNet
from flowmatch_mnist.sampling import likelihood
from flowmatch_mnist.sampling.generate import Flow, Sampler
from flowmatch_mnist.sampling.units import UNITS
from flowmatch_mnist.sampling.weights import (
    DESCRIPTION_KEY,
    draws_digits,
    load,
    load_digits,
    load_teacher,
    read_checkpoint,
    save,
    warm_start,
)
from flowmatch_mnist.support.errors import UserError
from flowmatch_mnist.support.files import save_checkpoint

SMALL = {"channels": (4, 8), "blocks": (1, 1), "attention": (False, True)}


@pytest.mark.parametrize("missing", [DESCRIPTION_KEY, "state_dict"])
def test_a_checkpoint_has_a_description_and_weights(missing, tmp_path):
    whole = {DESCRIPTION_KEY: {}, "state_dict": {}}
    save_checkpoint(tmp_path / "whole.ckpt", whole)
    assert read_checkpoint(tmp_path / "whole.ckpt")["state_dict"] == {}
    save_checkpoint(tmp_path / "part.ckpt", {name: value for name, value in whole.items() if name != missing})
    with pytest.raises(UserError, match="no checkpoint of this project"):
        read_checkpoint(tmp_path / "part.ckpt")


def written(path, net, drop=(), **changes):
    """A file of a network, in whose description or weights something is amiss."""
    flow = Flow(net)
    description = flow.describe(Sampler()) | changes
    weights = {f"net.{name}": value for name, value in net.state_dict().items() if name not in drop}
    save_checkpoint(path, {DESCRIPTION_KEY: description, "state_dict": weights})
    return path


def test_weights_go_into_a_network_that_they_fit(tmp_path):
    there, here = UNet(**SMALL), UNet(**SMALL, spans=True, dropout=0.5)
    warm_start(here, written(tmp_path / "whole.ckpt", there))
    assert all(torch.equal(value, here.state_dict()[name]) for name, value in there.state_dict().items())
    for name, file in (
        ("stem.bias", written(tmp_path / "part.ckpt", there, ["stem.bias"])),
        ("channels", written(tmp_path / "bad.ckpt", there, arguments="none")),
    ):
        with pytest.raises(UserError, match=f"do not fit.*{name}"):
            warm_start(UNet(**SMALL), file)


def test_a_network_comes_ready_to_sample(tmp_path):
    save(tmp_path / "net.safetensors", Flow(UNet(**SMALL)), Sampler(), {})
    net = load(tmp_path / "net.safetensors")[0].net
    assert not net.training and net.middle.blocks[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    teacher = load_teacher(str(tmp_path / "net.safetensors"), Flow(UNet(**SMALL)), torch.device("cpu"))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("student", "words"),
    [
        (Flow(UNet(**SMALL), units=UNITS["logit"]), "in linear units, but the student draws .* in logit units"),
        (Flow(UNet(**SMALL, classes=5)), "10 classes .* but the student draws 5 classes"),
        (Flow(UNet(**SMALL, image_size=32)), "28, 28.* but the student draws .*32, 32"),
    ],
)
def test_a_teacher_draws_what_its_student_draws(tmp_path, student, words):
    save(tmp_path / "net.safetensors", Flow(UNet(**SMALL)), Sampler(), {})
    with pytest.raises(UserError, match=words):
        load_teacher(str(tmp_path / "net.safetensors"), student, torch.device("cpu"))


def test_a_network_of_one_step_is_no_teacher(tmp_path):
    flow = Flow(UNet(**SMALL), one_step=True)
    save(tmp_path / "net.safetensors", flow, Sampler(1, "euler"), {})
    with pytest.raises(UserError, match="learned only one step"):
        load_teacher(str(tmp_path / "net.safetensors"), flow, torch.device("cpu"))


def test_who_draws_digits():
    class Own(UNet):
        pass

    assert draws_digits(UNet(**SMALL))
    for other in (MLP(), UNet(**SMALL, classes=5), UNet(**SMALL, image_size=32), Own(**SMALL)):
        assert not draws_digits(other), "sample.py would refuse it"


@pytest.mark.parametrize("one_step", [True, False])
def test_a_file_says_whether_its_network_knows_one_step_alone(tmp_path, one_step):
    save(tmp_path / "net.safetensors", Flow(UNet(**SMALL), one_step=one_step), Sampler(1, "euler"), {})
    assert load(tmp_path / "net.safetensors")[0].one_step is one_step


def test_units_are_called_by_their_names():
    assert torch.equal(UNITS["plane"].encode(torch.ones(1, 2)), torch.full((1, 2), 0.5))
    assert {name: units.name for name, units in UNITS.items()} == {name: name for name in ("linear", "logit", "plane")}


def test_digits_are_drawn_by_networks_of_ten_classes_of_their_size(tmp_path):
    for name, net in (("five", UNet(**SMALL, classes=5)), ("large", UNet(**SMALL, image_size=32)), ("digits", UNet(**SMALL))):
        save(path := tmp_path / f"{name}.safetensors", Flow(net), Sampler(), {})
        with contextlib.nullcontext() if name == "digits" else pytest.raises(UserError, match="draws no digits"):
            assert load_digits(path, "cpu")[0] == path


def test_labels_are_of_any_integers_and_within_the_classes():
    assert draw(np.arange(2, dtype=np.int32), steps=1).labels.dtype == torch.int64
    for labels in ([], [0, 10], [-1, 3]):
        with pytest.raises(ValueError, match="0 to 9"):
            draw(labels)


def test_the_evaluations_of_all_labels_are_those_of_the_dearest(monkeypatch):
    def of_one(flow, x1, y, sampler):
        return likelihood.Likelihood(-y.double(), [30, 50, 40][y[0]])

    monkeypatch.setattr(likelihood, "log_likelihood", of_one)
    found = likelihood.marginal_log_likelihood(Flow(MLP(classes=3)), torch.randn(4, 2))
    assert found.evaluations == 50 and found.log_p_given.tolist() == [[0, -1, -2]] * 4
