"""EERN, a wide residual network with attention in place of residuals.

Team Lasagna, rank 20, report section 4.23.

    head            3 -> C  --------.
    recon_trunk     four ERBs       |   3x3, ReLU, 3x3, ESA
    finetune        C -> C          |
    +  <----------------------------'
    tail            C -> 3 r r, pixel shuffle

Particular: EDSR cut to four blocks of 84 channels, without the residuals inside them, with an ESA (no 1x1 convolution
on its skip) behind each; `finetune` joined, set to zero, for the last stage of training only. Works in 0..255.
"""

from __future__ import annotations

from torch import Tensor, nn

from esr_kernels.modules import ESA

from .base import Network
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .table1 import TABLE1


class _ERB(nn.Module):
    """Two convolutions and the attention, C -> C."""

    def __init__(self, b: Layers, channels: int) -> None:
        super().__init__()
        self.conv1 = b.conv3x3(channels, channels, activation="relu")
        self.conv2 = b.conv3x3(channels, channels)
        self.ESA = b.esa(channels, max(1, channels // 4), conv_f=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.ESA(self.conv2(self.conv1(x)))


class EERN(Network):
    """EERN (report section 4.23).

    Args:
        feature_channels: width of the body, C; the attention's branch has a quarter of it.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 255], at least 15 x 15; result [N, 3, r H, r W], not clamped.
    """

    name = "eern"
    data_range = 255.0
    minimum_size = ESA.minimum_size

    def __init__(self, *, feature_channels: int = 84, upscale: int = 4) -> None:
        super().__init__()
        b, c = self.kit, feature_channels
        self.scale = upscale
        self.head = b.conv3x3(3, c)
        self.recon_trunk = nn.Sequential(*(_ERB(b, c) for _ in range(4)))
        self.finetune = b.conv3x3(c, c)
        self.tail = b.conv3x3_pixel_shuffle(c, 3, upscale)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        shallow = self.head(x)
        return self.tail(self.finetune(self.recon_trunk(shallow), residual=shallow))


class PlainEERN(EERN):
    """`EERN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="eern",
        title="EERN",
        team="Lasagna",
        team_id=25,
        section="4.23",
        parameters=657_432,
        flops=41_212_605_000,
        data_range=255.0,
        table1=TABLE1[25],
    ),
    EERN,
    PlainEERN,
)
