"""RFDN, residual feature distillation, trained under a large teacher.

Team BU-ESR, rank 19, report section 4.22; Liu et al., "Residual Feature Distillation Network for Lightweight Image
Super-Resolution" (winner of the 2020 challenge).

    fea_conv        3 -> C  -----------------.
    B1 ... B4       RFDB, C -> C             |   their four results side by side:
    c               1x1, 4C -> C, LeakyReLU  |
    LR_conv         C -> C                   |
    +  <-------------------------------------'
    upsampler       C -> 3 r r, pixel shuffle

RFDB: in three steps a 1x1 keeps half of the channels ("distilled") while 3x3, + its input, LeakyReLU refines all of
them; a last 3x3 distills what is left; the four distilled maps pass a 1x1 and an ESA.

Particular: the residual is added before the activation; ESA has three convolutions at low resolution. LeakyReLU 0.05.
Works in 0..255.
"""

from __future__ import annotations

from torch import Tensor, nn

from esr_kernels.modules import ESA

from .base import Network
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .table1 import TABLE1


class _RFDB(nn.Module):
    """Residual feature distillation block, C -> C."""

    def __init__(self, b: Layers, channels: int) -> None:
        super().__init__()
        c, half = channels, channels // 2
        self.c1_d = b.conv1x1(c, half, activation="leaky_relu")
        self.c1_r = b.conv3x3(c, c, activation="leaky_relu")
        self.c2_d = b.conv1x1(c, half, activation="leaky_relu")
        self.c2_r = b.conv3x3(c, c, activation="leaky_relu")
        self.c3_d = b.conv1x1(c, half, activation="leaky_relu")
        self.c3_r = b.conv3x3(c, c, activation="leaky_relu")
        self.c4 = b.conv3x3(c, half, activation="leaky_relu")
        self.c5 = b.conv1x1(4 * half, c)
        self.esa = b.esa(c, max(1, c // 4), conv_max=True)

    def forward(self, x: Tensor) -> Tensor:
        d1, y = self.c1_d(x), self.c1_r(x, residual=x, residual_mode="pre")
        d2, y = self.c2_d(y), self.c2_r(y, residual=y, residual_mode="pre")
        d3, y = self.c3_d(y), self.c3_r(y, residual=y, residual_mode="pre")
        return self.esa(self.c5([d1, d2, d3, self.c4(y)]))


class RFDN(Network):
    """RFDN (report section 4.22).

    Args:
        feature_channels: width of the body, C, at least 2.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 255], at least 15 x 15; result [N, 3, r H, r W], not clamped.
    """

    name = "rfdn"
    data_range = 255.0
    minimum_size = ESA.minimum_size

    def __init__(self, *, feature_channels: int = 50, upscale: int = 4) -> None:
        super().__init__()
        b, c = self.kit, feature_channels
        self.scale = upscale
        self.fea_conv = b.conv3x3(3, c)
        self.B1 = _RFDB(b, c)
        self.B2 = _RFDB(b, c)
        self.B3 = _RFDB(b, c)
        self.B4 = _RFDB(b, c)
        self.c = nn.Sequential(b.conv1x1(4 * c, c, activation="leaky_relu"))
        self.LR_conv = b.conv3x3(c, c)
        self.upsampler = b.upsampler(c, 3, upscale)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        shallow = self.fea_conv(x)
        y1 = self.B1(shallow)
        y2 = self.B2(y1)
        y3 = self.B3(y2)
        y4 = self.B4(y3)
        return self.upsampler(self.LR_conv(self.c([y1, y2, y3, y4]), residual=shallow))


class PlainRFDN(RFDN):
    """`RFDN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="rfdn",
        title="RFDN (distilled)",
        team="BU-ESR",
        team_id=30,
        section="4.22",
        parameters=433_448,
        flops=27_046_231_296,
        data_range=255.0,
        table1=TABLE1[30],
    ),
    RFDN,
    PlainRFDN,
)
