"""A small UNet for the velocity field v(x, t, y), conditioned on the time and the class of the digit.

    x ── stem ── encoder 28 ──────── skip ──────── decoder 28 ── head ── v
                     └─ encoder 14 ── skip ── decoder 14 ─┘
                              └──── middle 7 ────┘

A convolution at 28x28 costs sixteen times as much as the same convolution at 7x7. So the first stage has few channels and few
blocks, and the later stages are wider. A skip connection adds the encoder's output to the decoder's input. Concatenation
would double the operations of the decoder's first convolution. benchmarks/README.md has the measurements for both choices.

Sources: Ronneberger et al. 2015, "U-Net"; Ho et al. 2020, "DDPM", appendix B (time embedding, attention at the coarsest scale);
Dhariwal and Nichol 2021, "Diffusion Models Beat GANs", section 3 (adaptive group normalisation); Goyal et al. 2017, "Accurate,
Large Minibatch SGD" (zero-initialised last layers).
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from flowmatch_mnist.networks.base import Network


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Return a group normalisation. Its number of groups is the greatest common divisor of `groups` and `channels`."""
    return nn.GroupNorm(math.gcd(groups, channels), channels)


def zero_(layer: nn.Conv2d) -> nn.Conv2d:
    """Set the layer to zero. A block that ends with it starts as the identity, and the head starts as the zero field."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResidualBlock(nn.Module):
    """Two convolutions with a residual connection. The embedding scales and shifts the output of the second normalisation.

    Shapes: x (B, channels, H, W), embedding (B, embedding_dim) -> (B, channels, H, W).
    """

    def __init__(self, channels: int, embedding_dim: int, groups: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = group_norm(channels, groups)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding_dim, 2 * channels)
        self.norm2 = group_norm(channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        return x + self.conv2(self.dropout(F.silu(h)))


class SelfAttention(nn.Module):
    """Multi-head attention between all positions of the image, with a residual connection: (B, C, H, W) -> (B, C, H, W).

    The number of heads is `channels` / `head_dim`, rounded down, but at least 1.

    Raises:
        ValueError: if the number of heads does not divide `channels`.
    """

    def __init__(self, channels: int, groups: int = 8, head_dim: int = 32) -> None:
        super().__init__()
        self.heads = max(1, channels // head_dim)
        if channels % self.heads:
            raise ValueError(f"attention needs channels divisible by its {self.heads} heads, got {channels}")
        self.norm = group_norm(channels, groups)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, 3, self.heads, channels // self.heads, height * width)
        q, k, v = qkv.unbind(1)
        # Written out, because the backward pass of PyTorch's fused attention is slow on CPUs in bf16.
        attention_weights = F.softmax(q.mT @ k * q.shape[-2] ** -0.5, dim=-1)
        h = v @ attention_weights.mT
        return x + self.out(h.reshape(batch, channels, height, width))


class Stage(nn.Module):
    """Residual blocks at one resolution. With `attention`, self-attention follows each block.

    `block` are other arguments of `ResidualBlock`. Shapes: x (B, channels, H, W), embedding (B, embedding_dim) -> x's shape.
    """

    def __init__(self, channels: int, blocks: int, attention: bool, groups: int, **block: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(channels, groups=groups, **block) for _ in range(blocks))
        self.attention = nn.ModuleList(SelfAttention(channels, groups) if attention else nn.Identity() for _ in range(blocks))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        for block, attention in zip(self.blocks, self.attention, strict=True):
            x = attention(block(x, embedding))
        return x


class UNet(Network):
    """A class-conditioned UNet with a skip connection from every encoder stage to its decoder stage.

    Args:
        channels: number of channels of each stage, the finest (28x28) first. Each further stage halves the resolution.
        blocks: number of residual blocks at each resolution. Half of them, rounded down, are in the encoder stage, and the
            others are in the decoder stage. The blocks of the coarsest resolution are the middle stage.
        attention: for each resolution, whether self-attention follows each of its blocks.
        classes: number of labels; label `classes` itself means "no label" (for guidance).
        embedding_dim: width of the embedding of time and label.
        image_channels: number of channels of x and of v.
        image_size: height and width of x. It must be divisible by 2 once for every stage except the first.
        dropout: probability of dropping an activation inside a residual block, in [0, 1).
        spans: whether to learn mean velocities too, see `flow.meanflow`.
        groups: number of groups of channels that are normalised separately. A layer uses the greatest common divisor of this
            number and its channels. With 1 group, a training step on a CPU takes a fifth less time, see benchmarks/README.md.

    Raises:
        ValueError: if `channels`, `blocks` and `attention` have different lengths, a number is not positive, attention cannot
            divide its channels into heads, or `image_size` cannot be halved often enough.
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 48, 96),
        blocks: Sequence[int] = (1, 2, 2),
        attention: Sequence[bool] = (False, False, True),
        classes: int = 10,
        embedding_dim: int = 128,
        image_channels: int = 1,
        image_size: int = 28,
        dropout: float = 0.0,
        spans: bool = False,
        groups: int = 8,
    ) -> None:
        super().__init__(classes, embedding_dim, spans)
        if not len(channels) == len(blocks) == len(attention) or not channels:
            raise ValueError(
                "channels, blocks and attention need one entry for each stage, "
                f"got {list(channels)}, {list(blocks)} and {list(attention)}"
            )
        if min(*channels, *blocks, classes, embedding_dim, image_channels, groups) < 1:
            raise ValueError("channels, blocks, classes, embedding_dim, image_channels and groups must be positive")
        if image_size % 2 ** (len(channels) - 1):
            raise ValueError(
                f"{len(channels)} stages halve the image {len(channels) - 1} times, which image_size {image_size} does not "
                "allow; use another image_size"
            )
        self.arguments = {
            "channels": list(channels),
            "blocks": list(blocks),
            "attention": list(attention),
            "classes": classes,
            "embedding_dim": embedding_dim,
            "image_channels": image_channels,
            "image_size": image_size,
            "dropout": dropout,
            "spans": spans,
            "groups": groups,
        }
        self.shape = (image_channels, image_size, image_size)
        block: dict[str, Any] = {"groups": groups, "embedding_dim": embedding_dim, "dropout": dropout}

        self.stem = nn.Conv2d(image_channels, channels[0], 3, padding=1)
        self.encoder, self.down = nn.ModuleList(), nn.ModuleList()
        self.decoder, self.up = nn.ModuleList(), nn.ModuleList()
        *stages, coarsest = zip(channels, blocks, attention, strict=True)
        for width, depth, attend in stages:
            self.encoder.append(Stage(width, depth // 2, attend, **block))
            self.decoder.append(Stage(width, depth - depth // 2, attend, **block))
        for fine, coarse in pairwise(channels):
            self.down.append(nn.Conv2d(fine, coarse, 2, stride=2))
            self.up.append(nn.ConvTranspose2d(coarse, fine, 2, stride=2))
        self.middle = Stage(*coarsest, **block)
        self.head = nn.Sequential(
            group_norm(channels[0], groups), nn.SiLU(), zero_(nn.Conv2d(channels[0], image_channels, 3, padding=1))
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor, until: Tensor | None = None) -> Tensor:
        """Return the field at x (B, image_channels, H, W), t (B,) in [0, 1], y (B,) in 0..classes, until (B,) in [t, 1].

        It has the shape of x.
        """
        embedding = self.embed(t, y, until)
        h = self.stem(x)
        skips = []
        for stage, down in zip(self.encoder, self.down, strict=True):
            skips.append(stage(h, embedding))
            h = down(skips[-1])
        h = self.middle(h, embedding)
        for stage, up, skip in reversed(list(zip(self.decoder, self.up, skips, strict=True))):
            h = stage(up(h) + skip, embedding)
        return self.head(h)
