"""LSANet, IFADNet with lighter blocks.

Team MViC_SR, rank 10, report section 4.14.

    x - mean
    fea_conv        3 -> C  -------------------------.
    B1, B3, B5      LFEM: three BSConv with GELU, + input
    B2, B4, B6      RSAB: BSConv and two 3x3 with GELU, 1x1, ESA, + input
    c1              1x1 over all six results, GELU   |
    c2              BSConv                           |
    +  <---------------------------------------------'
    upsampler       C -> 3 r r, pixel shuffle
    + mean

BSConv, blueprint separable convolution: 1x1, then depthwise 3x3 whose input is padded by reflection.

Particular: the fewest multiplications among the networks with a run time near the baseline's. Against `ifadnet` the
first convolution of the attention blocks is separable too, a 1x1 stands before the attention (the report has it
behind), and the aggregation has a second convolution. In training form the 3x3 convolutions are `RepBlock`s.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from esr_kernels.modules import RepBlock

from .ifadnet import IFADNet
from .layers import PLAIN, Layers, pad_same
from .registry import ModelCard, register
from .table1 import TABLE1


class _LFEM(nn.Module):
    """Local feature extraction module, C -> C."""

    def __init__(self, b: Layers, channels: int) -> None:
        super().__init__()

        def conv() -> nn.Module:
            return b.bsconv(channels, channels, padding_mode="reflect", activation="gelu")

        self.c1_r = conv()
        self.c2_r = nn.Sequential(OrderedDict(rbr_reparam=conv()))
        self.c4 = nn.Sequential(OrderedDict(rbr_reparam=conv()))

    def forward(self, x: Tensor) -> Tensor:
        (last,) = self.c4
        return last(self.c2_r(self.c1_r(x)), x)


class _RSAB(nn.Module):
    """Re-parameterised spaced attention block, C -> C."""

    def __init__(self, b: Layers, channels: int, deploy: bool) -> None:
        super().__init__()
        self.c1_r = b.bsconv(channels, channels, padding_mode="reflect", activation="gelu")
        self.c2_r = b.rep(RepBlock, channels, channels, activation="gelu", deploy=deploy)
        self.c4 = b.rep(RepBlock, channels, channels, activation="gelu", deploy=deploy)
        self.c5 = b.conv1x1(channels, channels)
        self.esa = b.esa(channels, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.esa(self.c5(self.c4(self.c2_r(self.c1_r(x))))) + x


class LSANet(IFADNet):
    """LSANet (report section 4.14).

    Args:
        feature_channels: width of the body, C.
        upscale: 1, 2, 3, 4, ...
        deploy: folded convolutions, as published, or the training form.

    Images [N, 3, H, W] in [0, 1], at least 15 x 15; result [N, 3, r H, r W], not clamped.
    """

    name = "lsanet"
    odd_block = _LFEM
    even_block = _RSAB

    def __init__(self, *, feature_channels: int = 36, upscale: int = 4, deploy: bool = True) -> None:
        super().__init__(feature_channels=feature_channels, upscale=upscale, deploy=deploy)
        self.c2 = self.kit.bsconv(feature_channels, feature_channels, padding_mode="reflect")

    def aggregate(self, outputs: list[Tensor], shallow: Tensor) -> Tensor:
        return self.c2(self.c1(outputs), shallow)


class PlainLSANet(LSANet):
    """`LSANet` in plain PyTorch."""

    kit = PLAIN

    def __init__(self, *, feature_channels: int = 36, upscale: int = 4) -> None:
        super().__init__(feature_channels=feature_channels, upscale=upscale)
        pad_same(self.fea_conv)


register(
    ModelCard(
        name="lsanet",
        title="LSANet",
        team="MViC_SR",
        team_id=44,
        section="4.14",
        parameters=138_492,
        flops=8_162_797_056,
        table1=TABLE1[44],
    ),
    LSANet,
    PlainLSANet,
)
