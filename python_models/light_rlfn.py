"""LightRLFN, a narrower RLFN with the enlarged image added.

Team LVTeam, rank 11, report section 4.15.

    conv_1          3 -> C  --------.
    block_1 ... block_4     RLFB    |   three 3x3 with LeakyReLU 0.05 (M channels inside), + input, 1x1, ESA
    conv_2          C -> C          |
    +  <----------------------------'
    upsampler       C -> 3 r r, pixel shuffle
    +  the image, enlarged bilinearly

Particular: RLFN's blocks keep their inner 48 channels while the body is cut from 46 to 36; the skip from the image to
the result leaves only the detail to the network. Works in 0..1.
"""

from __future__ import annotations

from esr_kernels.modules import RLFB

from .base import ResidualNetwork
from .layers import PLAIN
from .registry import ModelCard, register
from .table1 import TABLE1


class LightRLFN(ResidualNetwork):
    """LightRLFN (report section 4.15).

    Args:
        feature_channels, mid_channels: widths of the body and inside the blocks, C and M.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 1], at least 15 x 15; result [N, 3, r H, r W], not clamped.
    """

    name = "light_rlfn"
    minimum_size = RLFB.minimum_size
    image_skip = True

    def __init__(self, *, feature_channels: int = 36, mid_channels: int = 48, upscale: int = 4) -> None:
        super().__init__()
        b, c = self.kit, feature_channels
        self.scale = upscale
        self.conv_1 = b.conv3x3(3, c)
        for i in range(1, self.num_blocks + 1):
            self.add_module(f"block_{i}", b.rlfb(c, mid_channels))
        self.conv_2 = b.conv3x3(c, c)
        self.upsampler = b.upsampler(c, 3, upscale)


class PlainLightRLFN(LightRLFN):
    """`LightRLFN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="light_rlfn",
        title="LightRLFN",
        team="LVTeam",
        team_id=16,
        section="4.15",
        parameters=265_988,
        flops=16_339_208_192,
        table1=TABLE1[16],
    ),
    LightRLFN,
    PlainLightRLFN,
)
