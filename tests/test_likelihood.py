"""Log-likelihoods against closed forms, and against the Jacobian of the whole flow."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
from oracle import MEAN, SPREAD, Gaussian
from torch.distributions import MultivariateNormal, Normal

from flowmatch_mnist.flow.paths import PATHS
from flowmatch_mnist.flow.predictions import PREDICTIONS, StraightVelocity
from flowmatch_mnist.flow.solvers import time_grid, trajectory
from flowmatch_mnist.images.pixels import bits_per_dimension, dequantize
from flowmatch_mnist.networks.base import Network
from flowmatch_mnist.networks.mlp import MLP
from flowmatch_mnist.networks.unet import UNet
from flowmatch_mnist.sampling.generate import INVERSION_SAMPLER, Flow, Sampler
from flowmatch_mnist.sampling.likelihood import LIKELIHOOD_SAMPLER, log_likelihood, marginal_log_likelihood

EVERY_PATH = pytest.mark.parametrize("path", PATHS)
EVERY_PREDICTION = pytest.mark.parametrize("prediction", PREDICTIONS)
EVERY_DIVERGENCE = pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
MEANS = torch.tensor([-1.0, 0.2, 0.7])


class Known(Network):
    """A field in closed form as a network: of (x, t), whatever the label."""

    def __init__(self, field, shape=(1, 2, 2)):
        super().__init__(classes=3, embedding_dim=4, spans=False)
        self.field = field
        self.shape = shape

    def forward(self, x, t, y):
        return self.field(x, t)


class Classes(Known):
    """A Gaussian of another mean for each of three labels."""

    def __init__(self, path, prediction):
        super().__init__(Gaussian(PATHS[path], prediction))

    def forward(self, x, t, y):
        self.field.mean = MEANS.to(x)[y].view(-1, 1, 1, 1)
        return self.field(x, t)


class Correlated:
    """The straight velocity to N(m, S) in four dimensions: E[x1 | x_t] - E[x0 | x_t], by linear regression."""

    def __init__(self):
        factor = torch.randn(4, 4).double()
        self.data = MultivariateNormal(torch.randn(4).double(), factor @ factor.T / 4 + 0.1 * torch.eye(4))

    def __call__(self, x, t):
        t = t[:, None, None]
        covariance = self.data.covariance_matrix
        noise = torch.eye(4).double()
        centred = x.flatten(1) - t[:, 0] * self.data.mean
        regression = (t * covariance - (1 - t) * noise) @ torch.linalg.inv(t**2 * covariance + (1 - t) ** 2 * noise)
        return (self.data.mean + (regression @ centred[:, :, None])[:, :, 0]).view_as(x)


def known(path="linear", prediction="velocity"):
    return Flow(Known(Gaussian(PATHS[path], prediction)), path, prediction)


def points(count):
    return MEAN + SPREAD * torch.randn(count, 1, 2, 2).double()


def log_normal(x, mean=MEAN):
    return Normal(torch.tensor(mean, dtype=torch.float64), SPREAD).log_prob(x).flatten(1).sum(1)


def no_labels(x):
    return torch.zeros(len(x), dtype=torch.long)


@EVERY_PATH
@EVERY_PREDICTION
@EVERY_DIVERGENCE
def test_the_closed_form_on_every_path_by_every_prediction(path, prediction, divergence):
    x = points(6)
    found = log_likelihood(known(path, prediction), x, no_labels(x), Sampler(32, "rk4"), divergence=divergence)
    assert found.log_p.dtype == torch.float64 and found.log_p.shape == (6,) and found.evaluations == 128
    # Beyond the log-SNRs that the network knows, the field is not the Gaussian's own.
    exact = path != "vp" and prediction == "velocity"
    torch.testing.assert_close(found.log_p, log_normal(x), atol=1e-3 if exact else 0.02, rtol=0)


@pytest.mark.parametrize("solver", ["heun", "midpoint", "rk4", "dopri5"])
def test_solvers_agree(solver):
    x = points(4)
    found = log_likelihood(known(), x, no_labels(x), Sampler(400, solver), tolerance=1e-8)
    torch.testing.assert_close(found.log_p, log_normal(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)])
def test_order_of_convergence(solver, order):
    x = points(4)

    def error(steps):
        found = log_likelihood(known(), x, no_labels(x), Sampler(steps, solver))
        return (found.log_p - log_normal(x)).abs().max().item()

    assert abs(math.log2(error(128) / error(256)) - order) < 0.2


def test_the_tolerance_reaches_the_solver():
    x = points(4)
    loose, tight = (log_likelihood(known(), x, no_labels(x), Sampler(1, "dopri5"), tolerance=e) for e in (1e-2, 1e-9))
    assert loose.evaluations < tight.evaluations / 2
    assert 1e-6 < (loose.log_p - log_normal(x)).abs().max() < 0.2
    torch.testing.assert_close(tight.log_p, log_normal(x), atol=1e-6, rtol=0)


def test_evaluations_are_those_of_the_batch_that_needed_most():
    flow, x = Flow(Known(lambda x, t: x**3)), torch.tensor([2.0, 0.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    moving, still = (log_likelihood(flow, one, no_labels(one), Sampler(1, "dopri5")).evaluations for one in x.split(1))
    both = log_likelihood(flow, x, no_labels(x), Sampler(1, "dopri5"), batch_size=1)
    assert both.evaluations == moving > still


def test_the_default_sampler_is_near_enough():
    x = points(4)
    found = log_likelihood(known(), x, no_labels(x))
    bits = (found.log_p - log_normal(x)) / (4 * math.log(2))
    assert bits.abs().max() < 1e-3
    assert found.evaluations == LIKELIHOOD_SAMPLER.steps * 4


def test_the_exact_divergence_sees_a_whole_jacobian_and_the_probes_estimate_it():
    field = Correlated()
    flow, x = Flow(Known(field)), field.data.sample((3,)).view(3, 1, 2, 2)
    exact = log_likelihood(flow, x, no_labels(x), INVERSION_SAMPLER, divergence="exact")
    torch.testing.assert_close(exact.log_p, field.data.log_prob(x.flatten(1)), atol=1e-4, rtol=0)
    # Of four coordinates there are sixteen probes, or eight but for the sign: two thousand draws of them.
    many = x[:1].expand(2000, 1, 2, 2)
    found = log_likelihood(flow, many, no_labels(many), Sampler(16, "rk4"), batch_size=1000).log_p
    spread = found.std().item()
    assert spread > 0.1
    assert abs(found.mean() - exact.log_p[0]) < 4 * spread / math.sqrt(2000)
    assert len(found.round(decimals=6).unique()) <= 8


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("make", [lambda: MLP(classes=3), lambda: UNet((4, 8), (1, 1), (False, True), 3, 16, image_size=4)])
def test_a_network_against_the_jacobian_of_its_whole_flow(make, guidance):
    net = make()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    flow, sampler, y = Flow(net.double()), Sampler(6, "rk4", guidance), torch.tensor([2])
    velocity = StraightVelocity(flow.guided(y, sampler), PATHS["linear"], "velocity")

    def arrive(x0):
        *_, x1 = trajectory(velocity, x0, time_grid(sampler.steps), sampler.solver)
        return x1

    x0 = torch.randn(1, *net.shape).double()
    dimensions = x0.numel()
    jacobian = torch.autograd.functional.jacobian(arrive, x0).view(dimensions, dimensions)
    log_p = -x0.square().sum() / 2 - dimensions / 2 * math.log(2 * math.pi) - torch.linalg.slogdet(jacobian).logabsdet
    assert torch.linalg.slogdet(jacobian).logabsdet.abs() > 0.01
    with torch.no_grad():
        x1 = arrive(x0)
    found = log_likelihood(flow, x1, y, sampler, divergence="exact")
    torch.testing.assert_close(found.log_p, log_p[None], atol=1e-4, rtol=0)


def test_one_probe_serves_a_whole_trajectory():
    # A fresh one in each call would make the field jump, and dopri5 take steps without end.
    field = Correlated()
    flow, x = Flow(Known(field)), field.data.sample((3,)).view(3, 1, 2, 2)
    sampler = Sampler(1, "dopri5")
    exact = log_likelihood(flow, x, no_labels(x), sampler, divergence="exact")
    estimated = log_likelihood(flow, x, no_labels(x), sampler)
    assert estimated.evaluations < 1.5 * exact.evaluations < 500


def test_a_sample_has_its_likelihood_in_any_batch():
    field = Correlated()
    flow, x = Flow(Known(field)), field.data.sample((5,)).view(5, 1, 2, 2)
    whole = log_likelihood(flow, x, no_labels(x), seed=1).log_p
    done = []
    parts = log_likelihood(flow, x, no_labels(x), seed=1, batch_size=2, on_batch=done.append).log_p
    torch.testing.assert_close(parts, whole, atol=1e-10, rtol=0)
    assert done == [2, 2, 1]
    # By their numbers, in any order.
    order = [4, 2, 0, 3]
    some = log_likelihood(flow, x[order], no_labels(x[order]), seed=1, numbers=order, batch_size=1).log_p
    torch.testing.assert_close(some, whole[order], atol=1e-10, rtol=0)
    assert not torch.allclose(log_likelihood(flow, x, no_labels(x), seed=2).log_p, whole, atol=1e-3)


@pytest.mark.parametrize(("path", "prediction", "atol"), [("linear", "velocity", 1e-4), ("cosine", "data", 0.02)])
def test_the_marginal_is_the_mixture_and_tells_the_classes_apart(path, prediction, atol):
    y = torch.arange(3).repeat(4)
    x = MEANS[y].view(-1, 1, 1, 1).double() + SPREAD * torch.randn(12, 1, 2, 2).double()
    found = marginal_log_likelihood(Flow(Classes(path, prediction), path, prediction), x, Sampler(60, "rk4"))
    given = torch.stack([log_normal(x, mean) for mean in MEANS.tolist()], dim=1)
    mixture = (given.exp().sum(1) / 3).log()
    torch.testing.assert_close(found.log_p_given, given, atol=atol, rtol=1e-3)
    torch.testing.assert_close(found.log_p, mixture, atol=atol, rtol=1e-3)
    assert torch.equal(found.log_p_given.argmax(1), given.argmax(1))
    assert (found.log_p_given.argmax(1) == y).double().mean() > 0.8
    assert found.evaluations == 240


def test_labels_have_their_probes_in_common():
    field = Correlated()
    flow, x = Flow(Known(field)), field.data.sample((3,)).view(3, 1, 2, 2)
    found = marginal_log_likelihood(flow, x, batch_size=2)
    torch.testing.assert_close(found.log_p_given, found.log_p[:, None].expand(3, 3))


def test_bits_of_a_density_whose_entropy_is_known():
    # Grey levels of spread 0.3 * 127.5 = 38, so wide that the cells do not matter: log2(38 sqrt(2 pi e)) bits each.
    x = (0.2 + SPREAD * torch.randn(400, 4, 4)).clamp(-1, 1)
    images = ((x + 1) * 127.5 + 0.5).floor().to(torch.uint8)
    x1, log_slope = dequantize(images)
    flow = Flow(Known(Gaussian(PATHS["linear"], "velocity", mean=0.2), (1, 4, 4)))
    found = log_likelihood(flow, x1, no_labels(x1))
    assert x1.dtype == torch.float32 and found.log_p.dtype == torch.float64
    bits = bits_per_dimension(found.log_p, log_slope, 16)
    expected = math.log2(SPREAD * 127.5 * math.sqrt(2 * math.pi * math.e))
    assert abs(bits.mean() - expected) < 4 * bits.std() / math.sqrt(400)
    assert bits.std() / math.sqrt(400) < 0.02


class Marker:
    """Lives as long as the graph it was put into."""


class Mark(torch.autograd.Function):
    """The identity, with a marker in the graph."""

    @staticmethod
    def forward(ctx, x, markers):
        ctx.marker = Marker()
        markers.append(weakref.ref(ctx.marker))
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@EVERY_DIVERGENCE
def test_no_graph_outlives_an_evaluation(divergence):
    markers, oracle = [], Gaussian(PATHS["linear"], "velocity")

    def field(x, t):
        assert not any(marker() for marker in markers)
        return Mark.apply(oracle(x, t), markers)

    x = points(2)
    found = log_likelihood(Flow(Known(field)), x, no_labels(x), Sampler(3, "heun"), divergence=divergence)
    assert len(markers) == 6 and not any(marker() for marker in markers)
    assert not found.log_p.requires_grad


@EVERY_DIVERGENCE
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_works_in_any_mode_and_leaves_the_network_as_it_was(divergence, mode):
    net = UNet((4, 8), (1, 1), (False, True), 3, 16, image_size=4, dropout=0.5).train()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with mode():
        x, y = torch.randn(2, 1, 4, 4), torch.tensor([0, 2])
        found, again = (log_likelihood(Flow(net), x, y, Sampler(2, "heun"), divergence=divergence) for _ in range(2))
    assert torch.equal(found.log_p, again.log_p)  # nothing was dropped out
    assert not found.log_p.requires_grad and not found.log_p.is_inference() and found.log_p.isfinite().all()
    assert found.evaluations == 4
    assert net.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize(("spacing", "expected"), [("uniform", [1, 0.75, 0.5, 0.25]), ("log_snr", None)])
def test_stops_where_the_sampler_says(spacing, expected):
    path, asked = PATHS["cosine"], []

    def field(x, t):
        asked.append(t[0].item())
        return Gaussian(path, "velocity")(x, t)

    x = points(1)
    log_likelihood(Flow(Known(field), "cosine"), x, no_labels(x), Sampler(4, "euler", spacing=spacing))
    expected = expected or [1, *path.time(torch.tensor([5.0, 0.0, -5.0])).tolist()]
    assert asked == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("sampler", [Sampler(churn=1.0), Sampler(solver="dpmpp_2m")])
def test_what_has_no_likelihood_says_so(sampler):
    with pytest.raises(ValueError, match="has no likelihood"):
        log_likelihood(known(), points(1), torch.tensor([0]), sampler)
    with pytest.raises(ValueError, match="only one step"):
        log_likelihood(replace(known(), one_step=True), points(1), torch.tensor([0]))


def test_says_where_values_stopped_being_finite():
    x = points(1)
    with pytest.raises(FloatingPointError, match=r"at t = 0.25, in step 3 of 4"):
        log_likelihood(Flow(Known(lambda x, t: x / (t.view(-1, 1, 1, 1) > 0.6))), x, no_labels(x), Sampler(4, "euler"))
