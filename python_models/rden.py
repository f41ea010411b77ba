"""RDEN, distilled and pruned residual blocks.

Team CMVG, rank 5, report section 4.9.

    conv_1          3 -> C  --------.
    block_1 ... block_4     SRRB    |   three 3x3 with GELU, + input, ESA
    conv_2          C -> C          |
    +  <----------------------------'
    upsampler_x4    C -> 3 r r, pixel shuffle

Particular: RLFN's block without its 1x1 convolution; no biases outside the attention; 37 channels, left of 38 by
pruning. Trained with ECBs in place of the 3x3 convolutions, under a larger teacher and with a second, x2 head: what
was published is the folded student with its x4 head.
"""

from __future__ import annotations

from torch import Tensor, nn

from esr_kernels.modules import ECB, ESA

from .base import Network
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .table1 import TABLE1


class _SRRB(nn.Module):
    """Simplified re-parameterised residual block, C -> C."""

    def __init__(self, b: Layers, channels: int, deploy: bool) -> None:
        super().__init__()
        self.c1_r = b.rep(ECB, channels, channels, bias=False, activation="gelu", deploy=deploy)
        self.c2_r = b.rep(ECB, channels, channels, bias=False, activation="gelu", deploy=deploy)
        self.c3_r = b.rep(ECB, channels, channels, bias=False, activation="gelu", deploy=deploy)
        self.esa = b.esa(channels, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.esa(self.c3_r(self.c2_r(self.c1_r(x)), residual=x))


class RDEN(Network):
    """RDEN (report section 4.9).

    Args:
        feature_channels: width of the body, C.
        upscale: 1, 2, 3, 4, ...
        deploy: folded convolutions, as published, or the training form (the report's text: no such weights exist).

    Images [N, 3, H, W] in [0, 1], at least 15 x 15; result [N, 3, r H, r W], not clamped.
    """

    name = "rden"
    minimum_size = ESA.minimum_size

    def __init__(self, *, feature_channels: int = 37, upscale: int = 4, deploy: bool = True) -> None:
        super().__init__()
        b, c = self.kit, feature_channels
        self.scale = upscale
        self.conv_1 = b.conv3x3(3, c, bias=False)
        self.block_1 = _SRRB(b, c, deploy)
        self.block_2 = _SRRB(b, c, deploy)
        self.block_3 = _SRRB(b, c, deploy)
        self.block_4 = _SRRB(b, c, deploy)
        self.conv_2 = b.conv3x3(c, c, bias=False)
        self.upsampler_x4 = b.upsampler(c, 3, upscale, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        shallow = self.conv_1(x)
        y = self.block_4(self.block_3(self.block_2(self.block_1(shallow))))
        return self.upsampler_x4(self.conv_2(y, residual=shallow))


class PlainRDEN(RDEN):
    """`RDEN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="rden",
        title="RDEN",
        team="CMVG",
        team_id=26,
        section="4.9",
        parameters=201_752,
        flops=12_168_497_152,
        table1=TABLE1[26],
    ),
    RDEN,
    PlainRDEN,
)
