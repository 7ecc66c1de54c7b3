"""The UNet: its shapes at other sizes, and that each of its parts has a say."""

import pytest
import torch

from flowmatch_mnist.unet import UNet


@pytest.mark.parametrize(
    ("channels", "blocks", "attention", "size"),
    [
        ((16, 48, 96), (1, 1, 2), (False, False, True), 28),
        ((8, 12), (2, 1), (False, True), 28),
        ((6,), (1,), (True,), 7),
        ((4, 8, 8, 16), (1, 1, 1, 1), (False, False, False, True), 32),
    ],
)
def test_keeps_the_shape_of_images_at_other_widths_depths_and_sizes(channels, blocks, attention, size):
    net = UNet(channels, blocks, attention, image_channels=3, image_size=size)
    x = torch.randn(2, 3, size, size)
    assert net(x, torch.rand(2), torch.tensor([0, 10])).shape == x.shape
    assert net.shape == (3, size, size)


def test_starts_as_the_zero_field():
    net = UNet((4, 8, 8), (1, 1, 1))
    assert net(torch.randn(2, 1, 28, 28), torch.rand(2), torch.tensor([0, 10])).abs().max() == 0


@pytest.mark.parametrize("level", [0, 1, 2])
def test_each_encoder_stage_reaches_its_decoder_stage_by_a_skip(tiny_net, level):
    """With all but one skip and the way through the middle cut, the input still reaches the output."""
    x, t, y = torch.randn(1, 1, 28, 28, requires_grad=True), torch.rand(1), torch.tensor([3])

    def cut(below: bool):
        def hook(stage, inputs):
            h, embedding = inputs
            half = h.shape[1] // 2
            from_below, skip = h[:, :half], h[:, half:]
            return (torch.cat([from_below, skip * 0], 1) if below else torch.cat([from_below * 0, skip], 1)), embedding

        return hook

    for other, stage in enumerate(tiny_net.decoder):
        if other != level:
            stage.register_forward_pre_hook(cut(below=True))
    tiny_net.middle.register_forward_hook(lambda stage, inputs, output: output * 0)
    tiny_net(x, t, y).sum().backward()
    assert x.grad.abs().max() > 0
    tiny_net.decoder[level].register_forward_pre_hook(lambda stage, inputs: (inputs[0] * 0, inputs[1]))
    x.grad = None
    tiny_net(x, t, y).sum().backward()
    assert x.grad.abs().max() == 0


def test_time_label_and_attention_each_change_the_field(tiny_net):
    x, t, y = torch.randn(1, 1, 28, 28), torch.tensor([0.3]), torch.tensor([3])
    v = tiny_net(x, t, y)
    assert not torch.allclose(v, tiny_net(x, t + 0.05, y), atol=1e-4)
    assert not torch.allclose(v, tiny_net(x, t, y + 1), atol=1e-4)
    assert not torch.allclose(v, tiny_net(x, t, torch.tensor([tiny_net.no_label])), atol=1e-4)
    tiny_net.middle.attention.out.weight.data.zero_()
    assert not torch.allclose(v, tiny_net(x, t, y), atol=1e-4)


def test_its_arguments_build_it_again(tiny_net):
    again = UNet(**tiny_net.arguments)
    again.load_state_dict(tiny_net.state_dict())
    x, t, y = torch.randn(2, 1, 28, 28), torch.rand(2), torch.tensor([1, 10])
    assert torch.equal(again(x, t, y), tiny_net(x, t, y))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"channels": (8, 8), "blocks": (1, 1, 1)}, "one entry for each stage"),
        ({"channels": (8, 8, 0)}, "positive"),
        ({"image_size": 30}, "halve"),
        ({"channels": (8, 8, 100)}, "divisible by its 3 heads"),
    ],
)
def test_refuses_sizes_that_do_not_fit(arguments, words):
    with pytest.raises(ValueError, match=words):
        UNet(**arguments)
