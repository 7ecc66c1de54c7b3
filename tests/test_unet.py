"""The UNet: its shapes at other sizes, and that each of its parts has a say."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flowmatch_mnist.networks.base import TimeEmbedding
from flowmatch_mnist.networks.unet import ResidualBlock, SelfAttention, UNet
from flowmatch_mnist.sampling.weights import PRETRAINED, warm_start
from flowmatch_mnist.support.errors import UserError


@pytest.mark.parametrize(
    ("channels", "blocks", "attention", "size"),
    [
        ((16, 48, 96), (1, 2, 2), (False, False, True), 28),
        ((8, 12), (3, 1), (False, True), 28),
        ((6,), (1,), (True,), 7),
        ((4, 8, 8, 16), (1, 1, 2, 1), (False, False, False, True), 32),
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


@pytest.mark.parametrize("level", [0, 1])
def test_each_encoder_stage_reaches_its_decoder_stage_by_a_skip(tiny_net, level):
    """With the way through the stages below cut, what a stage found still matters."""
    x, t, y = torch.randn(1, 1, 28, 28), torch.rand(1), torch.tensor([3])
    tiny_net.up[level].register_forward_hook(lambda layer, inputs, output: output * 0)
    v = tiny_net(x, t, y)
    tiny_net.encoder[level].register_forward_hook(lambda stage, inputs, output: output * 0)
    assert not torch.allclose(v, tiny_net(x, t, y), atol=1e-4)


def test_half_of_the_blocks_are_on_the_way_down():
    net = UNet((4, 8, 8), (1, 2, 3))
    depths = [[len(stage.blocks) for stage in stages] for stages in (net.encoder, [net.middle], net.decoder)]
    assert depths == [[0, 1], [3], [1, 1]]


def test_attention_is_at_the_resolutions_that_are_asked_for():
    net = UNet((4, 8), (2, 1), (True, False))
    kinds = [[type(layer) for layer in stage.attention] for stage in (net.encoder[0], net.middle, net.decoder[0])]
    assert kinds == [[SelfAttention], [nn.Identity], [SelfAttention]]


def test_one_group_normalises_all_channels_together():
    block = ResidualBlock(8, embedding_dim=4, groups=1)
    x = torch.randn(2, 8, 3, 5) * torch.arange(1, 9.0)[:, None, None]
    torch.testing.assert_close(block.norm1(x), F.layer_norm(x, x.shape[1:]))
    net = UNet((6, 12), (1, 2), (False, True), groups=4)
    assert {layer.num_groups for layer in net.modules() if isinstance(layer, nn.GroupNorm)} == {2, 4}


def test_weights_trained_with_other_groups_are_refused_though_their_shapes_fit():
    shape = ((32, 96, 192), (1, 2, 2), (False, False, True))
    warm_start(UNet(*shape, dropout=0.1), PRETRAINED["mnist"])
    with pytest.raises(UserError, match="groups"):
        warm_start(UNet(*shape, groups=1), PRETRAINED["mnist"])


def test_classes_width_of_the_embedding_dropout_and_groups_are_as_asked():
    net = UNet((4, 8, 8), (1, 1, 1), classes=3, embedding_dim=12, dropout=0.25)
    assert net.no_label == 3 and net.label.weight.shape == (4, 12)
    assert {layer.p for layer in net.modules() if isinstance(layer, nn.Dropout)} == {0.25}
    assert ResidualBlock(8, embedding_dim=4, dropout=0.5).dropout.p == 0.5
    assert [SelfAttention(8, groups).norm.num_groups for groups in (1, 4)] == [1, 4]
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, t, y = torch.randn(1, 1, 28, 28), torch.rand(1), torch.tensor([1])
    assert not torch.equal(net(x, t, y), net(x, t, y)) and torch.equal(net.eval()(x, t, y), net(x, t, y))


def test_a_block_adds_to_its_input_what_two_convolutions_find_and_the_embedding_scales_and_shifts():
    block = ResidualBlock(8, embedding_dim=4)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, embedding = torch.randn(2, 8, 3, 5), torch.randn(2, 4)
    scale, shift = block.modulation(embedding)[:, :8, None, None], block.modulation(embedding)[:, 8:, None, None]
    normal = block.norm2(block.conv1(F.silu(block.norm1(x))))
    torch.testing.assert_close(block(x, embedding), x + block.conv2(F.silu(normal + scale * normal + shift)))


def test_a_decoder_stage_sees_the_sum_of_what_comes_up_and_of_its_skip():
    net = UNet((4, 8), (2, 1), (False, True), image_size=4, groups=2)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, t, y = torch.randn(2, 1, 4, 4), torch.rand(2), torch.tensor([3, 10])
    embedding = F.silu(net.time(t) + net.label(y))
    skip = net.encoder[0](net.stem(x), embedding)
    below = net.up[0](net.middle(net.down[0](skip), embedding))
    torch.testing.assert_close(net(x, t, y), net.head(net.decoder[0](below + skip, embedding)))
    assert {layer.num_groups for layer in net.modules() if isinstance(layer, nn.GroupNorm)} == {2}
    assert [SelfAttention(channels, head_dim=32).heads for channels in (8, 32, 64)] == [1, 1, 2]


def test_the_embedding_is_of_time_label_and_span():
    net = UNet((4,), (1,), (False,), image_size=4, spans=True)
    assert net.span.frequencies[[0, -1]].tolist() == [1, pytest.approx(10)]
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    t, y, until = torch.rand(3), torch.tensor([1, 2, 10]), torch.ones(3)
    torch.testing.assert_close(net.embed(t, y, until), F.silu(net.time(t) + net.label(y) + net.span(until - t)))


def test_attention_mixes_the_places_as_pytorch_does():
    layer = SelfAttention(8, head_dim=4)
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(2, 8, 3, 5)
    q, k, v = layer.qkv(layer.norm(x)).view(2, 3, 2, 4, 15).mT.unbind(1)
    mixed = F.scaled_dot_product_attention(q, k, v).mT.reshape(2, 8, 3, 5)
    torch.testing.assert_close(layer(x), x + layer.out(mixed))


def test_time_label_and_attention_each_change_the_field(tiny_net):
    x, t, y = torch.randn(1, 1, 28, 28), torch.tensor([0.3]), torch.tensor([3])
    v = tiny_net(x, t, y)
    assert not torch.allclose(v, tiny_net(x, t + 0.05, y), atol=1e-4)
    assert not torch.allclose(v, tiny_net(x, t, y + 1), atol=1e-4)
    assert not torch.allclose(v, tiny_net(x, t, torch.tensor([tiny_net.no_label])), atol=1e-4)
    tiny_net.middle.attention[0].out.weight.data.zero_()
    assert not torch.allclose(v, tiny_net(x, t, y), atol=1e-4)


def test_the_frequencies_of_time_run_geometrically_from_one_radian():
    embedding = TimeEmbedding(4, features=6, max_frequency=25.0)
    torch.testing.assert_close(embedding.frequencies, torch.tensor([1.0, 5.0, 25.0]))
    embedding.mlp, t = nn.Identity(), torch.tensor([0.5])
    waves = [*(math.cos(w / 2) for w in (1, 5, 25)), *(math.sin(w / 2) for w in (1, 5, 25))]
    torch.testing.assert_close(embedding(t), torch.tensor([waves]))
    assert TimeEmbedding(4).frequencies[[0, -1]].tolist() == [1, pytest.approx(100)]


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
