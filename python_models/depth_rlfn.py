"""DepthRLFN, RLFN with a separable convolution in its blocks and the enlarged image added.

Team Fresh, rank 12, report section 4.16.

    conv_1          3 -> C  --------.
    block_1 ... block_4     RLFB    |   3x3, depthwise 3x3 and 1x1, 3x3, each with LeakyReLU 0.05; + input, 1x1, ESA
    conv_2          C -> C          |
    +  <----------------------------'
    upsampler       C -> 3 r r, pixel shuffle
    +  the image, enlarged bilinearly

Particular: only the second convolution of a block is separable, and has an activation between its two parts. The
report's test-time local converter changes nothing here: it replaces global pooling, of which the network has none.
"""

from __future__ import annotations

from torch import nn

from esr_kernels.modules import RLFB

from .base import ResidualNetwork
from .layers import PLAIN
from .registry import ModelCard, register
from .table1 import TABLE1


class DepthRLFN(ResidualNetwork):
    """DepthRLFN (report section 4.16).

    Args:
        feature_channels, mid_channels: widths of the body and inside the blocks, C and M.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 1], at least 15 x 15; result [N, 3, r H, r W], not clamped.
    """

    name = "depth_rlfn"
    minimum_size = RLFB.minimum_size
    image_skip = True

    def __init__(self, *, feature_channels: int = 46, mid_channels: int = 48, upscale: int = 4) -> None:
        super().__init__()
        b, c, m = self.kit, feature_channels, mid_channels
        self.scale = upscale
        self.conv_1 = b.conv3x3(3, c)
        for i in range(1, self.num_blocks + 1):
            block = b.rlfb(c, m)
            block.c2_r = nn.Sequential(
                b.depthwise_conv(m, activation="leaky_relu"),
                nn.Identity(),  # the published network has its activation here
                b.conv1x1(m, m, activation="leaky_relu"),
            )
            self.add_module(f"block_{i}", block)
        self.conv_2 = b.conv3x3(c, c)
        self.upsampler = b.upsampler(c, 3, upscale)


class PlainDepthRLFN(DepthRLFN):
    """`DepthRLFN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="depth_rlfn",
        title="DepthRLFN",
        team="Fresh",
        team_id=42,
        section="4.16",
        parameters=245_410,
        flops=14_968_850_432,
        table1=TABLE1[42],
    ),
    DepthRLFN,
    PlainDepthRLFN,
)
