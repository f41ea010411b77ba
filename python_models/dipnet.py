"""DIPNet, an RLFN without biases.

Team hajnal (VRTDIP), outside the ranking: its report has no section. Yu et al., "DIPNet: Efficiency Distillation and
Iterative Pruning for Image Super-Resolution" (winner of the 2023 challenge).

    conv_1          3 -> C  --------.
    block_1 ... block_4     RLFB    |   three 3x3 with LeakyReLU 0.05 (M channels inside), + input, 1x1, ESA
    conv_2          C -> C          |
    +  <----------------------------'
    upsampler       C -> 3 r r, pixel shuffle

Particular: narrower inside the blocks (38) than between them (44), from pruning; only the attention has biases.
"""

from __future__ import annotations

from esr_kernels.modules import RLFB

from .base import ResidualNetwork
from .layers import PLAIN
from .registry import ModelCard, register
from .table1 import TABLE1


class DIPNet(ResidualNetwork):
    """DIPNet as team hajnal entered it.

    Args:
        feature_channels, mid_channels: widths of the body and inside the blocks, C and M.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 1], at least 15 x 15; result [N, 3, r H, r W], not clamped.
    """

    name = "dipnet"
    minimum_size = RLFB.minimum_size

    def __init__(self, *, feature_channels: int = 44, mid_channels: int = 38, upscale: int = 4) -> None:
        super().__init__()
        b, c = self.kit, feature_channels
        self.scale = upscale
        self.conv_1 = b.conv3x3(3, c, bias=False)
        for i in range(1, self.num_blocks + 1):
            self.add_module(f"block_{i}", b.rlfb(c, mid_channels, bias=False))
        self.conv_2 = b.conv3x3(c, c, bias=False)
        self.upsampler = b.upsampler(c, 3, upscale, bias=False)


class PlainDIPNet(DIPNet):
    """`DIPNet` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="dipnet",
        title="DIPNet (VRTDIP)",
        team="hajnal",
        team_id=45,
        section=None,
        parameters=243_252,
        flops=14_886_406_144,
        table1=TABLE1[45],
    ),
    DIPNet,
    PlainDIPNet,
)
