"""Distribution matching: the step against its formula for known distributions, where it leads, and a student of a teacher."""

import shutil
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, assert_one_line_error, run, run_here
from oracle import MEAN, SPREAD, Gaussian
from torch import nn

from flowmatch_mnist.flow.loss import FlowLoss
from flowmatch_mnist.flow.matching import DistributionMatching
from flowmatch_mnist.flow.meanflow import MeanFlow
from flowmatch_mnist.flow.paths import PATHS
from flowmatch_mnist.networks.mlp import MLP
from flowmatch_mnist.sampling.generate import Sampler
from flowmatch_mnist.sampling.weights import DESCRIPTION_KEY, load
from flowmatch_mnist.training.module import FlowMatching

STRAIGHT = PATHS["linear"]


class Student(nn.Module):
    """Draws N(mean, spread^2) from noise in one step."""

    no_label = 10

    def __init__(self, mean, spread):
        super().__init__()
        self.mean, self.spread = nn.Parameter(torch.tensor(mean)), nn.Parameter(torch.tensor(spread))

    def forward(self, x, t, y, until):
        assert (t == 0).all() and (until == 1).all()
        self.drawn = self.mean + self.spread * x
        self.drawn.retain_grad()
        return self.drawn - x


def between(student, bias=None, **settings):
    """The matching of a student with the oracle's data. Its `fake` knows the samples of now; `bias` is all that can learn."""
    matching = DistributionMatching("some", **settings)
    data = Gaussian(STRAIGHT, "velocity")
    matching.net = lambda x, t, y: data(x, t)

    def fake(x, t, y):
        now = Gaussian(STRAIGHT, "velocity", student.mean.item(), student.spread.item())
        return now(x, t) + (0 if bias is None else bias)

    matching.fake = fake
    return matching


def draws(count):
    x0, noise = torch.randn(2, count, 1, 4, 4)
    return x0, noise, torch.rand(count), torch.zeros(count, dtype=torch.int64)


def test_the_step_is_the_difference_of_the_estimated_data_over_the_teachers_error():
    student, (x0, noise, t, y) = Student(0.2, 0.6), draws(50)
    between(student).losses(student, x0, noise, t, y).sum().backward()
    x = student.drawn.detach()
    x_t = STRAIGHT.point(noise, x, t)
    fake, real = (Gaussian(STRAIGHT, "data", *law)(x_t, t) for law in ((0.2, 0.6), (MEAN, SPREAD)))
    # Equations 7 and 8 of the paper.
    step = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(student.drawn.grad * 16, step, atol=1e-3, rtol=1e-3)


def test_the_fake_learns_the_velocity_of_the_samples_and_the_student_does_not_feel_it():
    student, (x0, noise, t, y) = Student(0.2, 0.6), draws(20_000)
    bias = torch.zeros((), requires_grad=True)
    between(student, bias).losses(student, x0, noise, t, y).mean().backward()
    assert abs(bias.grad) < 0.02, "the exact velocity is where its loss is least"
    found = student.mean.grad.clone()
    student.mean.grad = None
    between(student).losses(student, x0, noise, t, y).mean().backward()
    torch.testing.assert_close(student.mean.grad, found)
    off = torch.full((), 0.1, requires_grad=True)
    between(student, off).losses(student, x0, noise, t, y).mean().backward()
    assert off.grad == pytest.approx(0.2, abs=0.02), "the slope of 0.1 squared"


def test_the_student_ends_at_the_data():
    student = Student(0.0, 1.0)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        between(student).losses(student, *draws(64)).mean().backward()
        optimizer.step()
    assert student.mean.item() == pytest.approx(MEAN, abs=0.05)
    assert student.spread.item() == pytest.approx(SPREAD, abs=0.05)


def test_the_loss_takes_it_with_the_numbers_that_are_given():
    student, (x0, noise, t, y) = Student(0.2, 0.6), draws(8)
    matching = between(student)
    loss = FlowLoss(matching=matching, label_dropout=0)

    def normal(what, *shape):
        assert (what, shape) == ("points", tuple(x0.shape))
        return noise

    expected = matching.losses(student, x0, noise, t, y)
    torch.testing.assert_close(loss(student, x0, x0 + 9, y, t, normal=normal), expected)
    assert not torch.allclose(loss(student, x0, x0 + 9, y, t), expected), "other noise"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": "cosine"}, "linear path"),
        ({"prediction": "data"}, "linear path"),
        ({"exact_until": 0.2}, "set exact_until to 0"),
        ({"mean_flow": MeanFlow()}, "a loss of its own"),
        ({"weighting": "sd3"}, "a loss of its own"),
        ({"loss": "huber"}, "a loss of its own"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        FlowLoss(matching=DistributionMatching("some"), **settings)


def test_what_is_missing_is_named():
    matching, student = DistributionMatching("some"), Student(0.0, 1.0)
    with pytest.raises(ValueError, match="set `fake`"):
        matching.losses(student, *draws(2))
    matching.fake = lambda x, t, y: x
    with pytest.raises(ValueError, match="the teacher some was not loaded"):
        matching.losses(student, *draws(2))
    with pytest.raises(ValueError, match="spans"):
        FlowLoss(matching=matching).check(MLP())
    with pytest.raises(ValueError, match="set start"):
        FlowMatching(MLP(spans=True), matching=matching)
    with pytest.raises(ValueError, match="interval"):
        DistributionMatching("some", guidance_interval=(0.5, 0.4))
    for weight in (-0.1, float("inf")):
        with pytest.raises(ValueError, match="pairs must be"):
            DistributionMatching("some", pairs=weight)
    with pytest.raises(ValueError, match="pairs_first must be"):
        DistributionMatching("some", pairs_first=-1)
    for rate in (0, 1.1):
        with pytest.raises(ValueError, match="student_rate must be"):
            DistributionMatching("some", student_rate=rate)


def test_the_student_learns_at_its_share_of_the_rate():
    matching = DistributionMatching("some", student_rate=0.25)
    settings = {"optimizer": partial(torch.optim.SGD, lr=0.4), "warmup_steps": 0, "sampler": Sampler(1, "average")}
    module = FlowMatching(MLP(spans=True), matching=matching, start="some", **settings)
    module._trainer = SimpleNamespace(estimated_stepping_batches=10, training=True)
    student, fake = module.configure_optimizers()["optimizer"].param_groups
    assert (student["lr"], fake["lr"]) == (0.1, 0.4)
    assert student["params"][0] is next(module.net.parameters()) and fake["params"][0] is next(module.fake.parameters())


def test_a_sample_is_also_drawn_to_its_pair():
    student, (x0, noise, t, y) = Student(0.2, 0.6), draws(8)
    alone = between(student).losses(student, x0, noise, t, y)
    matching = between(student, pairs=0.5)
    with pytest.raises(ValueError, match="set `draw`"):
        matching.losses(student, x0, noise, t, y)
    matching.draw = lambda noise, labels: noise + labels[0] - 2
    found = matching.losses(student, x0, noise, t, y)
    # Smooth L1: far from zero, the distance is the absolute difference less half of its smooth part.
    distance = (0.2 + 0.6 * x0 - (x0 - 2)).abs()
    assert distance.min() > 0.01
    torch.testing.assert_close(found - alone, 0.5 * (distance - 0.005).flatten(1).mean(1))
    matching.draw = lambda noise, labels: noise * nn.Parameter(torch.ones(1))
    assert not matching.pair(x0, y).requires_grad, "a pair is a target, and its network learns nothing"


@pytest.mark.parametrize("pairs", [0.0, 0.5])
def test_in_the_first_steps_a_sample_is_only_drawn_to_its_pair(pairs):
    student, (x0, noise, t, y) = Student(0.2, 0.6), draws(8)
    later = between(student, pairs=pairs)
    assert between(student, pairs_first=1).pairs_alone, "no step was taken yet"
    matching = between(student, pairs=pairs, pairs_first=2)
    matching.draw = later.draw = lambda noise, labels: noise + labels[0] - 2
    matching.steps_taken = lambda: 2
    torch.testing.assert_close(matching.losses(student, x0, noise, t, y), later.losses(student, x0, noise, t, y))
    matching.steps_taken, matching.net, matching.fake = lambda: 1, None, nn.Linear(2, 2)
    found = matching.losses(student, x0, noise, t, y)
    distance = (0.2 + 0.6 * x0 - (x0 - 2)).abs()
    torch.testing.assert_close(found, (distance - 0.005).flatten(1).mean(1))
    found.sum().backward()
    assert all((p.grad == 0).all() for p in matching.fake.parameters()), "two processes wait for each gradient"
    matching.draw = None
    with pytest.raises(ValueError, match="set `draw`"):
        matching.losses(student, x0, noise, t, y)


def test_two_processes_learn_from_pairs_alone_in_the_first_optimizer_steps(tiny_run, tmp_path, data_dir):
    teacher = tiny_run / "runs/tiny/version_0/checkpoints/last.ckpt"
    common = ("--config", TINY, "--data.data_dir", data_dir, "--name", "student", "--model.net.spans", "true")
    student = ("--model.start", teacher, "--model.matching.teacher", teacher, "--model.matching.pairs_first", 3)
    student += ("--model.sampler", "{steps: 1, solver: average}", "--model.optimizer.weight_decay", 0.5)
    two = ("--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.strategy", "ddp")
    # An epoch has 6 batches, so 3 optimizer steps.
    steps = ("--trainer.accumulate_grad_batches", 2, "--trainer.max_epochs", 1)
    quiet = ("--sampling.every_n_epochs", 0, "--evaluation.every_n_epochs", 0)
    done = run("train.py", *common, *student, *two, *steps, *quiet, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    def changed(network):
        began = torch.load(teacher, weights_only=True)["state_dict"]
        now = torch.load(tmp_path / "runs/student/version_0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        return [not torch.equal(now[name.replace("net", network, 1)], weight) for name, weight in began.items()]

    assert all(changed("net")) and not any(changed("fake")), "not even its weights decay"
    done = run("train.py", "--ckpt_path", "last", "--trainer.max_epochs", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(changed("fake"))


def test_the_fake_begins_as_the_teacher_and_pairs_come_from_the_start(tiny_run, tmp_path):
    teacher = tiny_run / "runs/tiny/version_0/checkpoints/last.ckpt"
    stored = torch.load(teacher, weights_only=True)
    stored["state_dict"]["net.stem.bias"] += 1
    stored[DESCRIPTION_KEY]["sampler"] |= {"solver": "euler", "churn": 0.5}
    start = tmp_path / "start.ckpt"
    torch.save(stored, start)
    net = load(teacher)[0].net
    spans = type(net)(**net.arguments | {"spans": True})
    settings = {"sampler": Sampler(1, "average"), "start": str(start), "decay": "constant"}
    matching = DistributionMatching(str(teacher), pairs=0.5)
    module = FlowMatching(spans, matching=matching, **settings)
    module._trainer = SimpleNamespace(max_steps=1, max_epochs=1, datamodule=None)
    module.setup("fit")
    torch.testing.assert_close(module.fake.stem.bias, net.stem.bias)
    torch.testing.assert_close(module.net.stem.bias, net.stem.bias + 1)
    module.on_fit_start()
    flow, sampler = load(start)
    noise, y = torch.randn(3, *net.shape), torch.tensor([1, 2, 3])
    assert sampler.churn, "the start draws with churn, and pairs without it"
    *_, expected = flow.states(flow.guided(y, sampler), noise, replace(sampler, churn=0.0))
    torch.testing.assert_close(matching.pair(noise, y), expected)
    assert not any(p.requires_grad for p in matching.net.parameters())


def test_the_teacher_is_guided(tiny_net):
    student, (_, noise, t, y) = Student(0.0, 1.0), draws(4)
    x0, noise = torch.randn(2, 4, 1, 28, 28)
    found = []
    for guidance, interval, power in ((1, (0, 1), 0), (3, (0, 1), 0), (3, (0, 1e-3), 0), (3, (0, 1), 2)):
        matching = DistributionMatching("some", guidance, interval, power)
        matching.net, matching.fake = tiny_net, lambda x, t, y: x
        found.append(matching.losses(student, x0, noise, t, y).detach())
    torch.testing.assert_close(found[2], found[0])
    for n, other in ((1, 0), (3, 0), (3, 1)):
        assert not torch.allclose(found[n], found[other])


def test_validation_measures_the_fake_on_the_data():
    sampler = Sampler(1, "average")
    module = FlowMatching(MLP(spans=True), sampler=sampler, matching=DistributionMatching("some"), start="some")
    module.fake.forward = lambda x, t, y: torch.zeros_like(x)
    module._trainer = SimpleNamespace(world_size=1, global_rank=0)
    module.log = lambda name, value, **_: logged.setdefault(name, value)
    logged, (x0, x1) = {}, torch.randn(2, 8, 2)
    module.validation_step((x0, x1, torch.zeros(8, dtype=torch.int64)), 0)
    torch.testing.assert_close(logged["loss/val"], (x1 - x0).square().mean())


def test_a_student_by_the_command_line(tiny_run, tmp_path, few_digits):
    teacher = tiny_run / "runs/tiny/version_0/checkpoints/last.ckpt"
    common = ("--config", TINY, "--data.data_dir", few_digits, "--name", "student", "--trainer.max_epochs", 1)
    student = ("--model.net.spans", "true", "--model.matching.teacher", teacher, "--model.label_dropout", 0)
    one_step = ("--model.sampler", "{steps: 1, solver: average}")
    assert_one_line_error(run_here("train.py", *common, *student, *one_step, cwd=tmp_path), "set start")
    other = ("--model.start", teacher, "--model.matching.teacher", "mnist", "--name", "other")
    assert_one_line_error(run_here("train.py", *common, *student, *one_step, *other, cwd=tmp_path), "mnist.safetensors")
    start = shutil.copy(teacher, tmp_path / "start.ckpt")
    student += ("--model.start", start)
    done = run_here("train.py", *common, *student, *one_step, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    last = tmp_path / "runs/student/version_0/checkpoints/last.ckpt"
    stored = torch.load(last, weights_only=True)["state_dict"]
    began = torch.load(teacher, weights_only=True)["state_dict"]
    name = "stem.weight"
    three = [stored[f"net.{name}"], stored[f"fake.{name}"], began[f"net.{name}"]]
    assert not any(torch.equal(three[n], three[n - 1]) for n in range(3)), "both networks learned"
    flow, sampler = load(last)
    assert flow.one_step and (sampler.steps, sampler.solver) == (1, "average") and torch.equal(flow.net.stem.weight, three[0])
    done = run_here("sample.py", 7, "--checkpoint", last, cwd=tmp_path)
    assert done.returncode == 0 and "average, 1 step, guidance 1, 1 evaluation each" in done.stdout
    assert_one_line_error(run_here("sample.py", 7, "--checkpoint", last, "--steps", 2, cwd=tmp_path), "only one step")
    start.unlink()  # a resumed run needs it only for pairs
    done = run_here("train.py", "--ckpt_path", "last", "--trainer.max_epochs", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_here("train.py", "test", "--ckpt_path", "last", cwd=tmp_path)
    assert done.returncode == 0 and "loss/test" in done.stdout, done.stderr
