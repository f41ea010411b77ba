"""SMRN, separable and mixing convolutions in turn.

Team LeESR, rank 6, report section 4.10.

    x - mean
    conv_1          3 -> C  --------.
    block_1 ... block_4     SMRB    |   BSConv, 3x3, BSConv, each with GELU; + input, 1x1, ESA
    conv_2          BSConv          |
    +  <----------------------------'
    upsampler       C -> 3 r r, pixel shuffle
    + mean

BSConv, blueprint separable convolution: 1x1, then depthwise 3x3.

Particular: RLFN's block with the outer two of its three convolutions separable; the one in the middle, dense, mixes
what they keep apart. Biases only on depthwise convolutions, the attention and the upsampler. In training form the
separable convolutions are `RBSB`s, the dense one and the upsampler's are `CollapsibleConv`s (RIMB, RepConv): the report
names these, no such weights were published.
"""

from __future__ import annotations

from torch import Tensor, nn

from esr_kernels.modules import ESA, RBSB, CollapsibleConv

from .base import Network
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .table1 import TABLE1


class _SMRB(nn.Module):
    """Separable-mixable residual block, C -> C."""

    def __init__(self, b: Layers, channels: int, deploy: bool) -> None:
        super().__init__()
        c = channels
        self.c1_r = b.rep(RBSB, c, c, activation="gelu", deploy=deploy)
        self.c2_r = b.rep(CollapsibleConv, c, c, bias=False, activation="gelu", deploy=deploy)
        self.c3_r = b.rep(RBSB, c, c, activation="gelu", deploy=deploy)
        self.c5 = b.conv1x1(c, c, bias=False)
        self.esa = b.esa(c, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.esa(self.c5(self.c3_r(self.c2_r(self.c1_r(x)), x)))


class SMRN(Network):
    """SMRN (report section 4.10).

    Args:
        feature_channels: width of the body, C.
        upscale: 1, 2, 3, 4, ...
        deploy: folded convolutions, as published, or the training form.

    Images [N, 3, H, W] in [0, 1], at least 15 x 15; result [N, 3, r H, r W], not clamped.
    """

    name = "smrn"
    minimum_size = ESA.minimum_size

    def __init__(self, *, feature_channels: int = 48, upscale: int = 4, deploy: bool = True) -> None:
        super().__init__()
        b, c = self.kit, feature_channels
        self.scale = upscale
        self.set_mean()
        self.conv_1 = b.conv3x3(3, c, bias=False)
        self.block_1 = _SMRB(b, c, deploy)
        self.block_2 = _SMRB(b, c, deploy)
        self.block_3 = _SMRB(b, c, deploy)
        self.block_4 = _SMRB(b, c, deploy)
        self.conv_2 = b.rep(RBSB, c, c, deploy=deploy)
        conv = b.rep(CollapsibleConv, c, 3 * upscale**2, deploy=deploy)
        self.upsampler = b.upsampler(c, 3, upscale, conv=conv)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        shallow = self.conv_1(x - self.mean)
        y = self.block_4(self.block_3(self.block_2(self.block_1(shallow))))
        return self.upsampler(self.conv_2(y, shallow)) + self.mean


class PlainSMRN(SMRN):
    """`SMRN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="smrn",
        title="SMRN",
        team="LeESR",
        team_id=10,
        section="4.10",
        parameters=165_344,
        flops=9_748_121_600,
        table1=TABLE1[10],
    ),
    SMRN,
    PlainSMRN,
)
