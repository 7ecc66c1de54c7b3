"""Mean velocities: the identity on a known flow, spans, what the network starts as, and a student of a teacher."""

import pytest
import torch
from conftest import TINY, assert_one_line_error, run_here
from oracle import MEAN, SPREAD, Averaged, Gaussian
from torch import nn

from flowmatch_mnist.flow.guidance import Guided
from flowmatch_mnist.flow.loss import FlowLoss
from flowmatch_mnist.flow.meanflow import MeanFlow, derivative
from flowmatch_mnist.flow.paths import PATHS, match_dims
from flowmatch_mnist.networks.unet import UNet
from flowmatch_mnist.sampling.weights import load

STRAIGHT = PATHS["linear"]
velocity = Gaussian(STRAIGHT, "velocity")


def points(count=64):
    x0 = torch.randn(count, 1, 2, 2, dtype=torch.float64)
    x1 = MEAN + SPREAD * torch.randn(count, 1, 2, 2, dtype=torch.float64)
    t = torch.rand(count, dtype=torch.float64) * 0.9
    until = t + (1 - t) * torch.rand(count, dtype=torch.float64)
    return STRAIGHT.point(x0, x1, t), x1 - x0, t, torch.zeros(count, dtype=torch.int64), until


def test_the_identity_holds_for_a_known_flow():
    x_t, _, t, y, until = points()
    exact = velocity(x_t, t)  # in place of the pairs' velocity, whose mean it is
    assert MeanFlow(stride=0).error(Averaged(), x_t, exact, t, y, until).abs().max() < 1e-9
    assert MeanFlow(stride=0).error(Averaged(off=0.1), x_t, exact, t, y, until).abs().mean() > 0.01


def test_spans_are_the_mean_of_their_parts():
    x_t, u_t, t, y, until = points()
    net = Averaged(off=0.1)
    span = match_dims(until - t, x_t)
    h = span.clamp(max=0.3)
    velocity, stride = net(x_t, t, y, t), h.flatten()
    later = net(x_t + h * velocity, t + stride, y, until)
    found = MeanFlow(stride=0.3).error(net, x_t, u_t, t, y, until)
    torch.testing.assert_close(found, net(x_t, t, y, until) - (h * velocity + (span - h) * later) / span)
    torch.testing.assert_close(MeanFlow(stride=0.3).error(net, x_t, u_t, t, y, t), net(x_t, t, y, t) - u_t)  # an instant


def test_the_error_of_a_stride_falls_with_its_square():
    x_t, _, t, y, until = points()
    exact = velocity(x_t, t)
    errors = [MeanFlow(stride=h).error(Averaged(), x_t, exact, t, y, until).abs().mean() for h in (0.02, 0.01)]
    # Euler's step over the stride leaves an error of h^2 over the span, the same for all but the shortest.
    assert errors[0] < 0.02 and 1.7 < errors[0] / errors[1] < 5
    assert MeanFlow(stride=0.02).error(Averaged(off=0.1), x_t, exact, t, y, until).abs().mean() > errors[0]


def test_in_the_mean_over_pairs_the_data_s_own_velocity_is_averaged():
    x_t, u_t, t, y, until = points(200_000)
    errors = MeanFlow(stride=0).error(Averaged(), x_t, u_t, t, y, until)
    assert errors.mean().abs() < 5e-3 and (errors * x_t).mean().abs() < 5e-3
    assert errors.square().mean() > 0.1  # a single pair's velocity is far from their mean


def test_the_derivative_is_that_of_differences():
    net = UNet(channels=(4, 8), blocks=(1, 1), attention=(False, True), image_size=4, spans=True).double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, v = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    t, until, y = torch.tensor([0.1, 0.4, 0.7]).double(), torch.tensor([0.1, 0.9, 1.0]).double(), torch.tensor([0, 5, 10])
    # The embeddings of time are taken in 32 bits, so that the differences are too.
    h = 1e-3
    differences = (net(x + h * v, t + h, y, until) - net(x - h * v, t - h, y, until)) / (2 * h)
    found = derivative(net, x, t, y, until, v)
    assert (found - differences).norm() < 0.02 * differences.norm()


def test_spans_lie_between_t_and_the_end_in_the_shares_asked_for():
    t, u = torch.rand(100_000), torch.rand(100_000, 2)
    until = MeanFlow(instants=0.25, to_end=0.5).ends(t, u)
    assert (until >= t).all() and (until <= 1).all()
    assert abs((until == t).double().mean() - 0.25) < 0.01
    assert abs((until == 1).double().mean() - 0.75 * 0.5) < 0.01
    between = (until > t) & (until < 1)
    assert abs(((until - t) / (1 - t))[between].mean() - 0.5) < 0.01
    assert (MeanFlow("a teacher", instants=0, to_end=1).ends(t, u) == 1).all()
    half = MeanFlow("a teacher", instants=0, to_end=0).ends(torch.tensor([0.2]), torch.tensor([[0.0, 0.5]]))
    torch.testing.assert_close(half, torch.tensor([0.6]))  # a share of 0 holds nobody


def test_the_teacher_is_guided_in_its_interval_alone(tiny_net):
    mean_flow = MeanFlow(teacher="some", guidance=3, guidance_interval=(0.25, 0.5))
    mean_flow.net = tiny_net
    nothing = UNet((4,), (1,), (False,), spans=True)  # starts as the zero field
    x, t, y = torch.randn(4, 1, 28, 28), torch.tensor([0.1, 0.25, 0.5, 0.9]), torch.tensor([1, 2, 3, 4])

    with torch.no_grad():
        velocities = -mean_flow.error(nothing, x, x, t, y, t)
        for n, scale in enumerate([1.0, 3.0, 3.0, 1.0]):
            expected = Guided(tiny_net, y[n : n + 1], scale)(x[n : n + 1], t[n])
            torch.testing.assert_close(velocities[n : n + 1], expected, atol=1e-4, rtol=1e-4)


def test_the_teacher_is_guided_by_doubt(tiny_net):
    mean_flow = MeanFlow(teacher="some", guidance=3.0, guidance_interval=(0.2, 0.6), guidance_power=2.0)
    mean_flow.net = tiny_net
    nothing = UNet((4,), (1,), (False,), spans=True)
    x, t, y = torch.randn(3, 1, 28, 28), torch.tensor([0.1, 0.25, 0.5]), torch.tensor([1, 2, 3])
    with torch.no_grad():
        velocities = -mean_flow.error(nothing, x, x, t, y, t)
        for n in range(3):
            expected = Guided(tiny_net, y[n : n + 1], 3.0, (0.2, 0.6), power=2.0)(x[n : n + 1], t[n])
            torch.testing.assert_close(velocities[n : n + 1], expected, atol=1e-3, rtol=1e-3)


def test_a_teacher_without_guidance_is_asked_once(tiny_net):
    mean_flow = MeanFlow(teacher="some")
    mean_flow.net, asked = tiny_net, []
    tiny_net.register_forward_hook(lambda net, inputs, output: asked.append(len(output)))
    nothing = UNet((4,), (1,), (False,), spans=True)
    x, t, y = torch.randn(4, 1, 28, 28), torch.rand(4), torch.tensor([1, 2, 3, 4])
    velocities = -mean_flow.error(nothing, x, x, t, y, t)
    assert asked == [4] and torch.equal(velocities, tiny_net(x, t, y))


@pytest.mark.parametrize("stride", [0, 0.3])
def test_what_the_network_should_be_is_taken_as_it_is(stride):
    net = UNet((4,), (1,), (False,), image_size=4, spans=True)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, u, t, y, until = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.rand(3) / 2, torch.arange(3), torch.ones(3)
    weight = net.span.mlp[-1].weight
    (found,) = torch.autograd.grad(MeanFlow(stride=stride).error(net, x, u, t, y, until).sum(), weight)
    (expected,) = torch.autograd.grad(net(x, t, y, until).sum(), weight)
    torch.testing.assert_close(found, expected)


def test_a_network_that_spans_begins_as_the_one_without(tiny_net):
    spanning = UNet(**(tiny_net.arguments | {"spans": True}))
    spanning.load_state_dict(tiny_net.state_dict(), strict=False)
    x, t, y = torch.randn(3, 1, 28, 28), torch.rand(3), torch.tensor([1, 2, 10])
    torch.testing.assert_close(spanning(x, t, y, torch.ones(3)), tiny_net(x, t, y))
    torch.testing.assert_close(spanning(x, t, y), tiny_net(x, t, y))
    with pytest.raises(ValueError, match="no mean velocities"):
        tiny_net(x, t, y, torch.ones(3))


@pytest.mark.parametrize(
    "wrong",
    [
        {"instants": 1.1},
        {"to_end": -0.1},
        {"guidance": 1.5},
        {"stride": 1},
        {"instants": 0},
        {"guidance_power": -1},
        *({"guidance_interval": ends} for ends in ((0.6, 0.1), (0.5, 0.5), (-0.1, 0.5), (0.5, 1.1))),
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"shares|teacher|interval|power"):
        MeanFlow(**wrong)


def test_what_learns_from_a_teacher_or_from_pairs_may_do_without_instants_and_a_teacher_without_the_exact_field():
    MeanFlow(teacher="some", instants=0), MeanFlow(stride=0, instants=0)
    with pytest.raises(ValueError, match="set exact_until to 0"):
        FlowLoss(mean_flow=MeanFlow(teacher="some"), exact_until=0.3)
    FlowLoss(mean_flow=MeanFlow(), exact_until=0.3)


def test_a_student_by_the_command_line(tiny_run, tmp_path, few_digits):
    teacher = tiny_run / "runs/tiny/version_0/checkpoints/last.ckpt"
    common = ("--config", TINY, "--data.data_dir", few_digits, "--name", "student", "--trainer.max_epochs", 1)
    spans = (
        "--model.net.spans",
        "true",
        "--model.start",
        teacher,
        "--model.loss",
        "huber",
        "--model.sampler.solver",
        "average",
    )
    taught = ("--model.mean_flow.teacher", teacher, "--model.mean_flow.guidance", 1.5)
    done = run_here("train.py", *common, *spans, *taught, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    student = tmp_path / "runs/student/version_0/checkpoints/last.ckpt"
    flow, sampler = load(student)
    assert sampler.solver == "average" and flow.net.spans and flow.net.span.mlp[-1].weight.abs().max() > 0
    assert not any("mean_flow" in name for name in torch.load(student, weights_only=True)["state_dict"])
    done = run_here("sample.py", 7, "--checkpoint", student, "--steps", 1, cwd=tmp_path)
    assert done.returncode == 0 and "average, 1 step, guidance 1, 1 evaluation each" in done.stdout

    asked = ("sample.py", 7, "--checkpoint", teacher, "--solver", "average")
    assert_one_line_error(run_here(*asked, cwd=tmp_path), "average", "mean velocities")
    plain = ("--model.mean_flow.instants", 0.5)
    assert_one_line_error(run_here("train.py", *common, *plain, cwd=tmp_path), "spans")
    nobody = ("--model.net.spans", "true", "--model.mean_flow.teacher", "nobody.ckpt")
    assert_one_line_error(run_here("train.py", *common, *nobody, cwd=tmp_path), "nobody.ckpt")
