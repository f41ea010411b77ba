"""RLFF, RLFN's blocks and gated feed-forward networks in turn.

Team Supersr, rank 14, report section 4.18.

    conv_1          3 -> C  ------------.
    block_1, 3, 5   RLFB with GELU      |   three 3x3, + input, 1x1, ESA
    block_2, 4      GDFN                |   1x1 to 2 x 127, depthwise 3x3, GELU of one half times the other, 1x1
    conv_2          C -> C              |
    +  <--------------------------------'
    upsampler       C -> 3 r r, pixel shuffle

Particular: the feed-forward networks come from Restormer, but without the residual around them and without a
normalisation. The checkpoint holds two sets of weights; the ranked ones are its entry `params`, which
`create("rlff", path, entry="params")` takes, and not the preferred `params_ema`.
"""

from __future__ import annotations

from esr_kernels.modules import GDFN, RLFB

from .base import ResidualNetwork
from .layers import PLAIN
from .registry import ModelCard, register
from .table1 import TABLE1


class RLFF(ResidualNetwork):
    """RLFF (report section 4.18).

    Args:
        feature_channels: width of the body, C.
        hidden_channels: inside a feed-forward network.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 1], at least 15 x 15; result [N, 3, r H, r W], not clamped.
    """

    name = "rlff"
    minimum_size = RLFB.minimum_size
    num_blocks = 5

    def __init__(self, *, feature_channels: int = 48, hidden_channels: int = 127, upscale: int = 4) -> None:
        super().__init__()
        b, c = self.kit, feature_channels
        self.scale = upscale
        self.conv_1 = b.conv3x3(3, c)
        self.block_1 = b.rlfb(c, activation="gelu")
        self.block_2 = GDFN(c, hidden_channels, conv1x1=b.conv1x1, depthwise_conv=b.depthwise_conv)
        self.block_3 = b.rlfb(c, activation="gelu")
        self.block_4 = GDFN(c, hidden_channels, conv1x1=b.conv1x1, depthwise_conv=b.depthwise_conv)
        self.block_5 = b.rlfb(c, activation="gelu")
        self.conv_2 = b.conv3x3(c, c)
        self.upsampler = b.upsampler(c, 3, upscale)


class PlainRLFF(RLFF):
    """`RLFF` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="rlff",
        title="RLFF (RLFN_mogai)",
        team="Supersr",
        team_id=5,
        section="4.18",
        parameters=297_708,
        flops=18_671_101_440,
        table1=TABLE1[5],
        entry="params",
    ),
    RLFF,
    PlainRLFF,
)
