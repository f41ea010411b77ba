"""RLFN_BN, RLFN with a batch normalisation in its blocks.

Team Lanzhi, rank 13, report section 4.17.

    conv_1          3 -> C  --------.
    block_1 ... block_4     RLFB    |   three 3x3 with LeakyReLU 0.05 (M channels inside), + input, 1x1, ESA
    conv_2          C -> C          |
    +  <----------------------------'
    upsampler       C -> 3 r r, pixel shuffle

Particular: batch normalisation between the first convolution of a block and its activation (the report draws it behind
the activation). In use it is one with the convolution, and `reparam.fuse_batch_norms` removes it. The team averaged two
such networks; one was published. Works in 0..255.
"""

from __future__ import annotations

from esr_kernels.modules import RLFB

from .base import ResidualNetwork
from .layers import PLAIN
from .registry import ModelCard, register
from .table1 import TABLE1


class RLFNBN(ResidualNetwork):
    """RLFN_BN (report section 4.17).

    Args:
        feature_channels, mid_channels: widths of the body and inside the blocks, C and M.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 255], at least 15 x 15; result [N, 3, r H, r W], not clamped.
    """

    name = "rlfn_bn"
    data_range = 255.0
    minimum_size = RLFB.minimum_size

    def __init__(self, *, feature_channels: int = 46, mid_channels: int = 48, upscale: int = 4) -> None:
        super().__init__()
        b, c = self.kit, feature_channels
        self.scale = upscale
        self.conv_1 = b.conv3x3(3, c)
        for i in range(1, self.num_blocks + 1):
            self.add_module(f"block_{i}", b.rlfb(c, mid_channels, batch_norm=True))
        self.conv_2 = b.conv3x3(c, c)
        self.upsampler = b.upsampler(c, 3, upscale)


class PlainRLFNBN(RLFNBN):
    """`RLFNBN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="rlfn_bn",
        title="RLFN_BN (RLFN_B)",
        team="Lanzhi",
        team_id=13,
        section="4.17",
        parameters=317_602,
        flops=19_700_025_344,
        data_range=255.0,
        table1=TABLE1[13],
    ),
    RLFNBN,
    PlainRLFNBN,
)
