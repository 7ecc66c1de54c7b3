"""The perceptron of the first lessons: as wide and deep as asked, told of time, label and span."""

import pytest
import torch
import torch.nn.functional as F

from flowmatch_mnist.networks.mlp import MLP
from flowmatch_mnist.support.devices import compile_in_place


def test_it_has_the_size_asked_for_and_its_arguments_build_it_again():
    net = MLP(dim=3, width=6, layers=2, classes=4)
    assert net.shape == (3,) and net.no_label == 4 and not net.spans
    assert [layer.weight.shape for layer in (net.first, *net.hidden, net.last)] == [(6, 3), (6, 6), (6, 6), (3, 6)]
    again = MLP(**net.arguments)
    again.load_state_dict(net.state_dict())
    x, t, y = torch.randn(5, 3), torch.rand(5), torch.arange(5)
    assert torch.equal(again(x, t, y), net(x, t, y)) and net(x, t, y).shape == (5, 3)


def test_time_label_and_span_each_change_the_field():
    net = MLP(classes=3, spans=True)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t, y, until = torch.randn(2, 2), torch.tensor([0.2, 0.4]), torch.tensor([0, 1]), torch.tensor([0.7, 0.9])
    field = net(x, t, y, until)
    others = [(x + 1, t, y, until), (x, t + 0.1, y, until + 0.1), (x, t, y + 1, until), (x, t, y, until + 0.1), (x, t, y, t)]
    for other in others:
        assert not torch.allclose(net(*other), field, atol=1e-4)
    assert torch.equal(net(x, t, y), net(x, t, y, t)), "without an end, the span is an instant"


def test_a_layer_adds_to_its_input_what_the_embedding_scales_and_shifts():
    net = MLP(layers=1, width=4)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x, t, y = torch.randn(5, 2), torch.rand(5), torch.tensor([0, 1, 0, 1, 0])
    h, modulation = net.first(x), net.modulation[0](F.silu(net.time(t) + net.label(y)))
    h = h + net.hidden[0](F.silu(h + h * modulation[:, :4] + modulation[:, 4:]))
    torch.testing.assert_close(net(x, t, y), net.last(F.silu(h)))


@pytest.mark.parametrize("name", ["dim", "width", "layers", "classes"])
def test_sizes_must_be_positive(name):
    with pytest.raises(ValueError, match="positive"):
        MLP(**{name: 0})


def test_compiled_gradients_are_sums_in_a_fixed_order():
    net, threads = MLP(classes=10, width=8, layers=1), torch.get_num_threads()
    x, t, y = torch.randn(4096, 2), torch.rand(4096), torch.randint(10, (4096,))
    compile_in_place(net, torch.device("cpu"), None)
    torch.set_num_threads(2)
    try:
        gradients = [torch.autograd.grad(net(x, t, y).square().mean(), list(net.parameters())) for _ in range(20)]
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, gradients[0], other)) for other in gradients)
