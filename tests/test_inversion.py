"""From data to noise and back, and from one noise to another."""

import pytest
import torch
from oracle import MEAN, SPREAD, Gaussian

from flowmatch_mnist.flow.paths import PATHS
from flowmatch_mnist.networks.base import Network
from flowmatch_mnist.sampling.generate import INVERSION_SAMPLER, Flow, Sampler, generate, interpolate, invert


class Known(Network):
    """The oracle as a network; its labels change nothing."""

    def __init__(self, path, prediction):
        super().__init__(classes=10, embedding_dim=4, spans=False)
        self.oracle = Gaussian(PATHS[path], prediction)
        self.shape = (1, 4, 4)

    def forward(self, x, t, y):
        return self.oracle(x, t)


@pytest.mark.parametrize("path", PATHS)
def test_inversion_finds_the_noise_of_the_closed_form(path):
    flow = Flow(Known(path, "velocity"), path, "velocity")
    x0 = torch.randn(6, 1, 4, 4)
    found = invert(flow, MEAN + SPREAD * x0, torch.arange(6))
    torch.testing.assert_close(found, x0, atol=0.05 if path == "vp" else 1e-3, rtol=0)


def test_there_and_back_gives_the_same_images(tiny_net):
    tiny_net.label.weight.data.mul_(10)
    flow, labels = Flow(tiny_net), torch.tensor([1, 2, 3])
    for parameter in tiny_net.head.parameters():
        parameter.data.mul_(0.2)  # a random field, but smooth
    drawn = generate(flow, labels, INVERSION_SAMPLER, decode=lambda x: x)
    back = invert(flow, drawn.values, labels)
    again = generate(flow, labels, INVERSION_SAMPLER, noise=back, decode=lambda x: x)
    torch.testing.assert_close(again.values, drawn.values, atol=1e-5, rtol=0)
    # Another label is another flow.
    other = generate(flow, labels + 1, INVERSION_SAMPLER, noise=back, decode=lambda x: x)
    assert (other.values - drawn.values).abs().max() > 5e-3


def test_what_goes_one_way_only_says_so(tiny_net):
    for sampler in (Sampler(churn=1.0), Sampler(solver="dpmpp_2m")):
        with pytest.raises(ValueError, match="cannot integrate from data to noise"):
            invert(Flow(tiny_net), torch.zeros(1, 1, 28, 28), torch.tensor([1]), sampler)


def test_interpolation_stays_where_noise_lies():
    first, last = torch.randn(1, 28, 28), 1.1 * torch.randn(1, 28, 28)
    way = interpolate(first, last, 9)
    torch.testing.assert_close(way[0], first)
    torch.testing.assert_close(way[-1], last)
    lengths = way.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.lerp(first.norm(), last.norm(), torch.linspace(0, 1, 9)))
    cosines = torch.nn.functional.cosine_similarity(way[:-1].flatten(1), way[1:].flatten(1))
    torch.testing.assert_close(cosines, cosines[:1].expand(8), atol=1e-4, rtol=0)  # even steps
    torch.testing.assert_close(interpolate(first, first, 3), first.expand(3, 1, 28, 28))
