"""SlimRLFN, more but narrower RLFN blocks.

Team HiSR, rank 9, report section 4.13.

    conv_1          3 -> C  --------.
    block_list      six RLFBs       |   three 3x3 with LeakyReLU 0.05 (M channels inside), + input, 1x1, ESA
    conv_2          C -> C          |
    +  <----------------------------'
    upsampler       C -> 3 r r, pixel shuffle

Particular: ESA without the 1x1 convolution on its skip. The re-parameterised convolutions of the report come folded. A
second checkpoint of theirs went through the report's optional pruning: 28 channels inside the first five blocks. Works
in 0..255.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from esr_kernels.modules import RLFB
from esr_kernels.modules.arguments import positive

from .base import Network
from .layers import PLAIN
from .registry import ModelCard, register
from .table1 import TABLE1


class SlimRLFN(Network):
    """SlimRLFN (report section 4.13).

    Args:
        feature_channels: width of the body, C.
        mid_channels: width inside the blocks, M: one for all or one for each.
        num_blocks: RLFBs, at least 1.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 255], at least 15 x 15; result [N, 3, r H, r W], not clamped.
    """

    name = "slim_rlfn"
    data_range = 255.0
    minimum_size = RLFB.minimum_size

    def __init__(
        self,
        *,
        feature_channels: int = 30,
        mid_channels: int | Sequence[int] = 30,
        num_blocks: int = 6,
        upscale: int = 4,
    ) -> None:
        super().__init__()
        positive(num_blocks=num_blocks)
        b, c = self.kit, feature_channels
        widths = [mid_channels] * num_blocks if isinstance(mid_channels, int) else list(mid_channels)
        if len(widths) != num_blocks:
            raise ValueError(f"mid_channels: expected one width or one for each of {num_blocks} blocks, got {widths}")
        self.scale = upscale
        self.conv_1 = b.conv3x3(3, c)
        self.block_list = nn.Sequential(*(b.rlfb(c, m, esa_conv_f=False) for m in widths))
        self.conv_2 = b.conv3x3(c, c)
        self.upsampler = nn.ModuleDict({"upsample_conv": b.conv3x3_pixel_shuffle(c, 3, upscale)})

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        shallow = self.conv_1(x)
        return self.upsampler["upsample_conv"](self.conv_2(self.block_list(shallow), residual=shallow))

    @classmethod
    def infer_options(cls, state: Mapping[str, Tensor], slim: Mapping[str, Tensor]) -> dict[str, Any]:
        widths: list[int] = []
        while (weight := slim.get(f"block_list.{len(widths)}.c1_r.weight")) is not None:
            widths.append(weight.shape[0])
        return {"num_blocks": len(widths), "mid_channels": tuple(widths)} if widths else {}


class PlainSlimRLFN(SlimRLFN):
    """`SlimRLFN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="slim_rlfn",
        title="SlimRLFN",
        team="HiSR",
        team_id=21,
        section="4.13",
        parameters=207_774,
        flops=11_991_174_144,
        data_range=255.0,
        table1=TABLE1[21],
    ),
    SlimRLFN,
    PlainSlimRLFN,
)
