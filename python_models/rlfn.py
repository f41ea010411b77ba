"""RLFN, the challenge's baseline.

Report section 2.2; Kong et al., "Residual Local Feature Network for Efficient Super-Resolution" (winner of the 2022
challenge), in the pruned form the organisers measured everybody against.

    conv_1          3 -> C  --------.
    block_1 ... block_4     RLFB    |   three 3x3 with LeakyReLU 0.05 (M channels inside), + input, 1x1, ESA
    conv_2          C -> C          |
    +  <----------------------------'
    upsampler       C -> 3 r r, pixel shuffle

Particular: works in 0..255 from end to end; no residual around the attention; the attention's gate is pooled from and
resized to the whole image, so an output pixel depends on all of it.
"""

from __future__ import annotations

from esr_kernels.modules import RLFB
from esr_kernels.modules.arguments import positive

from .base import ResidualNetwork
from .layers import PLAIN
from .registry import ModelCard, register
from .table1 import TABLE1


class RLFN(ResidualNetwork):
    """RLFN (report section 2.2).

    Args:
        feature_channels, mid_channels: widths of the body and inside the blocks, C and M.
        num_blocks: RLFBs, at least 1.
        esa_channels: width of the attention's branch.
        upscale: 1, 2, 3, 4, ...
        in_channels, out_channels: of the images.

    Images [N, in_channels, H, W] in [0, 255], at least 15 x 15; result [N, out_channels, r H, r W], not clamped.
    """

    name = "rlfn"
    data_range = 255.0
    minimum_size = RLFB.minimum_size

    def __init__(
        self,
        *,
        feature_channels: int = 46,
        mid_channels: int = 48,
        num_blocks: int = 4,
        esa_channels: int = 16,
        upscale: int = 4,
        in_channels: int = 3,
        out_channels: int = 3,
    ) -> None:
        super().__init__()
        positive(num_blocks=num_blocks)
        b, c = self.kit, feature_channels
        self.scale, self.in_channels, self.num_blocks = upscale, in_channels, num_blocks
        self.conv_1 = b.conv3x3(in_channels, c)
        for i in range(1, num_blocks + 1):
            self.add_module(f"block_{i}", b.rlfb(c, mid_channels, esa_channels=esa_channels))
        self.conv_2 = b.conv3x3(c, c)
        self.upsampler = b.upsampler(c, out_channels, upscale)


class PlainRLFN(RLFN):
    """`RLFN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="rlfn",
        title="RLFN",
        team="RLFN (Baseline)",
        team_id=0,
        section="2.2",
        parameters=317_218,
        flops=19_674_859_520,
        data_range=255.0,
        table1=TABLE1[0],
    ),
    RLFN,
    PlainRLFN,
)
