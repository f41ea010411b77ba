"""DIRN, the depthwise convolution and involution residual network.

Report section 4.27.

    conv_1          3 -> C  ------------------------------.
    block_1 ... block_3, three times block_4     DIRB     |
    conv_2          C -> C                                |
    +  <--------------------------------------------------'
    upsampler       C -> 3 r r, pixel shuffle

    DIRB    three times DW or INV with LeakyReLU 0.05, gate over channels, 1x1, + input
    DW      depthwise 3x3, then 1x1
    INV     involution: every pixel makes its own 3x3 kernels, one for 16 channels, from its features

Particular: block_5 and block_6 are in the checkpoint and in the parameter count, but the published network runs block_4
three times instead. The gate (`CCA` with LeakyReLU) has a batch normalisation: training takes batches of two or more.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from esr_kernels.modules import CCA
from esr_kernels.modules.arguments import positive

from .base import Network
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .table1 import TABLE1

_SLOPE = 0.05
_GROUP = 16  # channels that share involution kernels
_BLOCKS = (("DW", "DW", "DW"), ("DW", "DW", "DW"), ("DW", "INV", "DW"), ("DW", "INV", "DW"))
_UNUSED_BLOCKS = (("INV", "DW", "INV"), ("INV", "INV", "INV"))


class _DepthwisePointwise(nn.Module):
    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        self.dw = layers.depthwise_conv(c)
        self.pw = layers.conv1x1(c, c, bias=False, activation="leaky_relu", negative_slope=_SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.pw(self.dw(x))


class _ConvModule(nn.Module):
    """1x1 convolution with the names of mmcv's ConvModule; `normalized`: without bias, then batch norm and ReLU."""

    def __init__(self, layers: Layers, cin: int, cout: int, normalized: bool) -> None:
        super().__init__()
        self.conv = layers.conv1x1(cin, cout, bias=not normalized)
        self.bn = nn.BatchNorm2d(cout) if normalized else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y if self.bn is None else F.relu(self.bn(y))


class _Involution(nn.Module):
    """Li et al., "Involution: Inverting the Inherence of Convolution for Visual Recognition"."""

    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        self.groups = c // _GROUP
        self.conv1 = _ConvModule(layers, c, c // 4, normalized=True)
        self.conv2 = _ConvModule(layers, c // 4, 9 * self.groups, normalized=False)
        self.unfolds = layers is PLAIN

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        kernels = self.conv2(self.conv1(x)).view(n, self.groups, 1, 9, height, width)
        if self.unfolds:
            taps = F.unfold(x, 3, padding=1).view(n, self.groups, _GROUP, 9, height, width)
            out = (kernels * taps).sum(3)
        else:
            # Tap by tap: nine times the feature map is never stored.
            padded = F.pad(x, (1, 1, 1, 1)).view(n, self.groups, _GROUP, height + 2, width + 2)
            out = kernels[:, :, :, 0] * padded[..., :height, :width]
            for j in range(1, 9):
                top, left = divmod(j, 3)
                out = out + kernels[:, :, :, j] * padded[..., top : top + height, left : left + width]
        return F.leaky_relu(out.view(n, c, height, width), _SLOPE)


class _Gate(CCA):
    def __init__(self, c: int) -> None:
        super().__init__(c, c // 16)
        self.conv_du[1] = nn.LeakyReLU(_SLOPE, inplace=True)
        self.conv_du.insert(3, nn.BatchNorm2d(c))


class _DIRB(nn.Module):
    def __init__(self, layers: Layers, c: int, kinds: tuple[str, str, str]) -> None:
        super().__init__()
        for i, kind in enumerate(kinds, 1):
            op = _Involution if kind == "INV" else _DepthwisePointwise
            self.add_module(f"c{i}_r", op(layers, c))
        self.cca = _Gate(c)
        self.c5 = layers.conv1x1(c, c)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in (1, 2, 3):
            y = self.get_submodule(f"c{i}_r")(y)
        return self.c5(self.cca(y), x)


class DIRN(Network):
    """DIRN (report section 4.27).

    Args:
        channels: width of the body, C, a multiple of 16.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 1], any size; result [N, 3, r H, r W], not clamped.
    """

    name = "dirn"

    def __init__(self, *, channels: int = 48, upscale: int = 4) -> None:
        super().__init__()
        positive(channels=channels, upscale=upscale)
        if channels % _GROUP:
            raise ValueError(f"channels: must be a multiple of {_GROUP}, got {channels}")
        self.scale = upscale
        self.conv_1 = self.kit.conv3x3(3, channels)
        for i, kinds in enumerate((*_BLOCKS, *_UNUSED_BLOCKS), 1):
            self.add_module(f"block_{i}", _DIRB(self.kit, channels, kinds))
        self.conv_2 = self.kit.conv3x3(channels, channels)
        self.upsampler = self.kit.upsampler(channels, 3, upscale)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        shallow = self.conv_1(x)
        y = shallow
        for i in (1, 2, 3, 4, 4, 4):
            y = self.get_submodule(f"block_{i}")(y)
        return self.upsampler(self.conv_2(y, residual=shallow))


class PlainDIRN(DIRN):
    """`DIRN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="dirn",
        title="DIRN",
        team="DIRN",
        team_id=19,
        section="4.27",
        parameters=96_915,
        flops=6_480_201_984,
        table1=TABLE1[19],
    ),
    DIRN,
    PlainDIRN,
)
