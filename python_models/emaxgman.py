"""EMaxGMan, RLFN with grouped convolutions and several heads of attention.

Team Minimalist, report section 4.25.

    conv_in         3 -> C  -----------------------------------------------.
    multi_head      four ESRs with 2, 4, 8, 16 groups on the same input,   |
                    1x1 over input and heads, + input, layer norm          |
    block_1 ... block_3     ERLFB                                          |
    conv_out        C -> C                                                 |
    +  <-------------------------------------------------------------------'
    upsampler       C -> 3 r r, pixel shuffle

    ESR     two grouped 3x3, 1x1 + input, enhanced spatial attention
    ERLFB   grouped 3x3 with 2, 4, 8 groups, 1x1 -> o; 1x1 of the mean of input, squeeze-and-excitation of o and
            enhanced spatial attention of o

Particular: LeakyReLU 0.05 follows every convolution of a block but the last 1x1.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from esr_kernels.modules import ESA
from esr_kernels.modules.arguments import positive

from .base import Network
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .table1 import TABLE1

_SLOPE = 0.05
_HEADS = (2, 4, 8, 16)


class _GroupedConv(nn.Conv2d):
    """3x3 convolution in groups with LeakyReLU."""

    def __init__(self, c: int, groups: int) -> None:
        super().__init__(c, c, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x), _SLOPE, inplace=True)


class _ESR(nn.Module):
    def __init__(self, layers: Layers, c: int, groups: int) -> None:
        super().__init__()
        self.conv1 = _GroupedConv(c, groups)
        self.conv2 = _GroupedConv(c, groups)
        self.pw = layers.conv1x1(c, c, activation="leaky_relu", negative_slope=_SLOPE)
        self.esa = layers.esa(c, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.esa(self.pw(self.conv2(self.conv1(x)), x, "pre"))


class _MultiHead(nn.Module):
    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        self.esr_list = nn.ModuleList(_ESR(layers, c, groups) for groups in _HEADS)
        self.head_mix = layers.conv1x1(c * (1 + len(_HEADS)), c)
        self.ln = nn.LayerNorm(c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head_mix([x, *(head(x) for head in self.esr_list)], x)
        return self.ln(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _SqueezeExcitation(nn.Module):
    def __init__(self, c: int, reduced: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(c, reduced, bias=False), nn.ReLU(inplace=True), nn.Linear(reduced, c, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))[:, :, None, None]


class _ERLFB(nn.Module):
    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        self.c1_r = _GroupedConv(c, 2)
        self.c2_r = _GroupedConv(c, 4)
        self.c3_r = _GroupedConv(c, 8)
        self.c4_r = layers.conv1x1(c, c, activation="leaky_relu", negative_slope=_SLOPE)
        self.c5 = layers.conv1x1(c, c)
        self.esa = layers.esa(c, 16)
        self.se = _SqueezeExcitation(c, c // 16)

    def forward(self, x: Tensor) -> Tensor:
        o = self.c4_r(self.c3_r(self.c2_r(self.c1_r(x))))
        return self.c5((x + self.se(o) + self.esa(o)) / 3)


class EMaxGMan(Network):
    """EMaxGMan (report section 4.25).

    Args:
        channels: width of the body, C, a multiple of 16.
        num_blocks: ERLFBs, at least 1.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 1], at least 15 x 15; result [N, 3, r H, r W], not clamped.
    """

    name = "emaxgman"
    minimum_size = ESA.minimum_size

    def __init__(self, *, channels: int = 64, num_blocks: int = 3, upscale: int = 4) -> None:
        super().__init__()
        positive(channels=channels, num_blocks=num_blocks, upscale=upscale)
        if channels % 16:
            raise ValueError(f"channels: must be a multiple of 16, got {channels}")
        self.scale, self.num_blocks = upscale, num_blocks
        self.conv_in = self.kit.conv3x3(3, channels)
        self.multi_head = _MultiHead(self.kit, channels)
        for i in range(1, num_blocks + 1):
            self.add_module(f"block_{i}", _ERLFB(self.kit, channels))
        self.conv_out = self.kit.conv3x3(channels, channels)
        self.upsampler = self.kit.upsampler(channels, 3, upscale)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        shallow = self.conv_in(x)
        y = self.multi_head(shallow)
        for i in range(1, self.num_blocks + 1):
            y = self.get_submodule(f"block_{i}")(y)
        return self.upsampler(self.conv_out(y, residual=shallow))


class PlainEMaxGMan(EMaxGMan):
    """`EMaxGMan` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="emaxgman",
        title="EMaxGMan",
        team="Minimalist",
        team_id=15,
        section="4.25",
        parameters=346_480,
        flops=20_646_392_832,
        table1=TABLE1[15],
    ),
    EMaxGMan,
    PlainEMaxGMan,
)
