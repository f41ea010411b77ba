"""IFADNet, blocks with attention and blocks without, in turn.

Team ECNU.MViC, rank 8, report section 4.12.

    x - mean
    fea_conv        3 -> C  -------------------------.
    B1, B3, B5      BFEB: three BSConv with GELU, + input
    B2, B4, B6      RFMB: three 3x3 with GELU, ESA, + input
    c1              1x1 over all six results, GELU   |
    +  <---------------------------------------------'
    upsampler       C -> 3 r r, pixel shuffle
    + mean

BSConv, blueprint separable convolution: 1x1, then depthwise 3x3 whose input is padded by reflection.

Particular: the attention is in every other block only, and RLFN's long skip becomes an aggregation of all blocks. (The
report has two convolutions there, the published network one.) In training form the 3x3 convolutions of the RFMBs are
`RepBlock`s: a 3x3, a 1x1 and 3x3, three edge filters and the identity.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import ClassVar

from torch import Tensor, nn

from esr_kernels.modules import ESA, RepBlock

from .base import Network
from .layers import PLAIN, Layers, pad_same
from .registry import ModelCard, register
from .table1 import TABLE1


class _BFEB(nn.Module):
    """Blueprint feature extraction block, C -> C."""

    def __init__(self, b: Layers, channels: int) -> None:
        super().__init__()

        def conv() -> nn.Sequential:
            named = {"rbr_reparam": b.bsconv(channels, channels, padding_mode="reflect", activation="gelu")}
            return nn.Sequential(OrderedDict(named))

        self.c1_r, self.c2_r, self.c4 = conv(), conv(), conv()

    def forward(self, x: Tensor) -> Tensor:
        (last,) = self.c4
        return last(self.c2_r(self.c1_r(x)), x)


class _RFMB(nn.Module):
    """Re-parameterised feature modulation block, C -> C."""

    def __init__(self, b: Layers, channels: int, deploy: bool) -> None:
        super().__init__()
        self.c1_r = b.rep(RepBlock, channels, channels, activation="gelu", deploy=deploy)
        self.c2_r = b.rep(RepBlock, channels, channels, activation="gelu", deploy=deploy)
        self.c4 = b.rep(RepBlock, channels, channels, activation="gelu", deploy=deploy)
        self.esa = b.esa(channels, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.esa(self.c4(self.c2_r(self.c1_r(x)))) + x


class IFADNet(Network):
    """IFADNet (report section 4.12).

    Args:
        feature_channels: width of the body, C.
        upscale: 1, 2, 3, 4, ...
        deploy: folded convolutions, as published, or the training form.

    Images [N, 3, H, W] in [0, 1], at least 15 x 15; result [N, 3, r H, r W], not clamped.
    """

    name = "ifadnet"
    minimum_size = ESA.minimum_size
    odd_block: ClassVar[type[nn.Module]] = _BFEB
    even_block: ClassVar[type[nn.Module]] = _RFMB

    def __init__(self, *, feature_channels: int = 36, upscale: int = 4, deploy: bool = True) -> None:
        super().__init__()
        b, c = self.kit, feature_channels
        self.scale = upscale
        self.set_mean()
        self.fea_conv = b.conv3x3(3, c)
        for i in range(1, 7):
            self.add_module(f"B{i}", self.even_block(b, c, deploy) if i % 2 == 0 else self.odd_block(b, c))
        self.c1 = b.conv1x1(6 * c, c, activation="gelu")
        self.upsampler = nn.Sequential(OrderedDict(upsampleOneStep=b.upsampler(c, 3, upscale)))

    def aggregate(self, outputs: list[Tensor], shallow: Tensor) -> Tensor:
        """One map [N, C, H, W] from those of all blocks, + `shallow`."""
        return self.c1(outputs, shallow)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        shallow = self.fea_conv(x - self.mean)
        y, outputs = shallow, []
        for i in range(1, 7):
            y = self.get_submodule(f"B{i}")(y)
            outputs.append(y)
        return self.upsampler(self.aggregate(outputs, shallow)) + self.mean


class PlainIFADNet(IFADNet):
    """`IFADNet` in plain PyTorch."""

    kit = PLAIN

    def __init__(self, *, feature_channels: int = 36, upscale: int = 4) -> None:
        super().__init__(feature_channels=feature_channels, upscale=upscale)
        pad_same(self.fea_conv)


register(
    ModelCard(
        name="ifadnet",
        title="IFADNet",
        team="ECNU.MViC",
        team_id=33,
        section="4.12",
        parameters=162_972,
        flops=9_776_555_520,
        table1=TABLE1[33],
    ),
    IFADNet,
    PlainIFADNet,
)
