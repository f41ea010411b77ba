"""Efficient SRGAN, the generator of ESRGAN and Real-ESRGAN (RRDBNet).

Team CEVLLowlight_Hypnotise, outside the ranking, report section 4.29; Wang et al., "ESRGAN: Enhanced Super-Resolution
Generative Adversarial Networks". Its weights were not published.

    conv_first      3 -> C  --------.
    RRDB_trunk      23 RRDBs        |   three dense blocks, 0.2 of their result added to the input
    trunk_conv      C -> C          |
    +  <----------------------------'
    twice: nearest-neighbour x2, 3x3, LeakyReLU 0.2   (upconv1, upconv2)
    HRconv          C -> C, LeakyReLU 0.2
    conv_last       C -> 3

Dense block: five 3x3 convolutions, each on the input and everything before it; the first four make G channels with
LeakyReLU 0.2, 0.2 of the fifth's result is added to the input.

Particular: 60 times the multiplications of the baseline, and the only network here that convolves at the size of the
result.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esr_kernels.modules.arguments import positive

from .base import Network
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .table1 import TABLE1


class _DenseBlock(nn.Module):
    """C -> C with four steps of G channels inside."""

    def __init__(self, b: Layers, channels: int, growth: int) -> None:
        super().__init__()
        after = {"activation": "leaky_relu", "negative_slope": 0.2}
        self.conv1 = b.conv3x3(channels, growth, **after)
        self.conv2 = b.conv3x3(channels + growth, growth, **after)
        self.conv3 = b.conv3x3(channels + 2 * growth, growth, **after)
        self.conv4 = b.conv3x3(channels + 3 * growth, growth, **after)
        self.conv5 = b.conv3x3(channels + 4 * growth, channels)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.conv1(x)
        x2 = self.conv2(torch.cat([x, x1], 1))
        x3 = self.conv3(torch.cat([x, x1, x2], 1))
        x4 = self.conv4(torch.cat([x, x1, x2, x3], 1))
        return torch.add(x, self.conv5(torch.cat([x, x1, x2, x3, x4], 1)), alpha=0.2)


class _RRDB(nn.Module):
    """Residual in residual dense block, C -> C."""

    def __init__(self, b: Layers, channels: int, growth: int) -> None:
        super().__init__()
        self.RDB1 = _DenseBlock(b, channels, growth)
        self.RDB2 = _DenseBlock(b, channels, growth)
        self.RDB3 = _DenseBlock(b, channels, growth)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.RDB3(self.RDB2(self.RDB1(x))), alpha=0.2)


class EfficientSRGAN(Network):
    """Efficient SRGAN (report section 4.29); always x4.

    Args:
        feature_channels, growth_channels: widths of the body and of a dense block's steps, C and G.
        num_blocks: RRDBs, at least 1.

    Images [N, 3, H, W] in [0, 1], any size; result [N, 3, 4 H, 4 W], not clamped.
    """

    name = "efficient_srgan"

    def __init__(self, *, feature_channels: int = 64, growth_channels: int = 32, num_blocks: int = 23) -> None:
        super().__init__()
        positive(feature_channels=feature_channels, growth_channels=growth_channels, num_blocks=num_blocks)
        b, c = self.kit, feature_channels
        # conv_first, 15 convolutions a block, trunk_conv; then 1 pixel of the doubled and 3 of the final size.
        self.receptive_radius = 1 + 15 * num_blocks + 1 + 2
        after = {"activation": "leaky_relu", "negative_slope": 0.2}
        self.conv_first = b.conv3x3(3, c)
        self.RRDB_trunk = nn.Sequential(*(_RRDB(b, c, growth_channels) for _ in range(num_blocks)))
        self.trunk_conv = b.conv3x3(c, c)
        self.upconv1 = b.conv3x3(c, c, **after)
        self.upconv2 = b.conv3x3(c, c, **after)
        self.HRconv = b.conv3x3(c, c, **after)
        self.conv_last = b.conv3x3(c, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        shallow = self.conv_first(x)
        y = self.trunk_conv(self.RRDB_trunk(shallow), residual=shallow)
        y = self.upconv1(F.interpolate(y, scale_factor=2, mode="nearest"))
        y = self.upconv2(F.interpolate(y, scale_factor=2, mode="nearest"))
        return self.conv_last(self.HRconv(y))


class PlainEfficientSRGAN(EfficientSRGAN):
    """`EfficientSRGAN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="efficient_srgan",
        title="Efficient SRGAN (RRDBNet)",
        team="CEVLLowlight_Hypnotise",
        team_id=48,
        section="4.29",
        parameters=16_697_987,
        flops=1_174_937_796_608,
        table1=TABLE1[48],
    ),
    EfficientSRGAN,
    PlainEfficientSRGAN,
)
