"""SMFAN, the self-modulation feature aggregation network.

Team VPEG_C, report section 4.6.

    to_feat         3 -> C, no bias  ----------------------------.
    feats.0 ... feats.7     FMB: t + SMFA(|t|), t + PCFN(|t|)    |
    +  <---------------------------------------------------------'
    to_img          C -> 3 r r, pixel shuffle, no bias

    SMFA    1x1 C -> 2C, split into y and v
            v * resize(GELU(1x1(dw3x3(pool(v)) + var(v))))      non-local: what an eighth of the resolution tells
            1x1(GELU(1x1(grouped 3x3(y))))                      local
            their sum through a 1x1
    PCFN    GELU(1x1), the first quarter of its channels again GELU(3x3), 1x1

Particular: |t| is the L2 norm over a pixel's channels, without weights; the pooling is by maxima, the resize nearest;
the variance is over the whole image, so an output pixel depends on all of it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from esr_kernels.modules.arguments import positive

from .base import Network
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .table1 import TABLE1

_POOL = 8


class _LocalDetail(nn.Module):
    """3x3 with two outputs per channel, 1x1, GELU, 1x1."""

    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        self.conv_0 = nn.Sequential(
            nn.Conv2d(c, 2 * c, 3, padding=1, groups=c), layers.conv1x1(2 * c, 2 * c, activation="gelu")
        )
        self.conv_1 = layers.conv1x1(2 * c, c)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.conv_1(self.conv_0(x), residual)


class _SMFA(nn.Module):
    """Self-modulation feature aggregation."""

    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__()
        self.linear_0 = layers.conv1x1(c, 2 * c)
        self.linear_1 = layers.conv1x1(c, c, activation="gelu")
        self.linear_2 = layers.conv1x1(c, c)
        self.lde = _LocalDetail(layers, c)
        self.dw_conv = layers.depthwise_conv(c)
        self.pool, self.modulate = layers.pool, layers.modulate

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        height, width = x.shape[2:]
        y, v = self.linear_0(x).chunk(2, 1)
        structure = self.dw_conv(self.pool(v, (height // _POOL, width // _POOL)))
        modulation = self.linear_1(structure + v.var((2, 3), keepdim=True))
        return self.linear_2(self.lde(y, self.modulate(v, modulation)), residual)


class _PCFN(nn.Module):
    """Feed-forward network with a 3x3 convolution of the first `p` hidden channels."""

    def __init__(self, layers: Layers, c: int, ffn_scale: float) -> None:
        super().__init__()
        hidden = int(c * ffn_scale)
        self.p = hidden // 4
        self.conv_0 = layers.conv1x1(c, hidden, activation="gelu")
        self.conv_1 = layers.conv3x3(self.p, self.p, activation="gelu")
        self.conv_2 = layers.conv1x1(hidden, c)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        t = self.conv_0(x)
        return self.conv_2([self.conv_1(t[:, : self.p]), t[:, self.p :]], residual)


class _FMB(nn.Module):
    """Feature modulation block."""

    def __init__(self, layers: Layers, c: int, ffn_scale: float) -> None:
        super().__init__()
        self.smfa = _SMFA(layers, c)
        self.pcfn = _PCFN(layers, c, ffn_scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.smfa(F.normalize(x), x)
        return self.pcfn(F.normalize(x), x)


class SMFAN(Network):
    """SMFAN (report section 4.6).

    Args:
        channels: width of the body, C.
        num_blocks: FMBs, at least 1.
        ffn_scale: how many times wider the feed-forward network is inside.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 1], at least 8 x 8; result [N, 3, r H, r W], not clamped.
    """

    name = "smfan"
    minimum_size = _POOL

    def __init__(self, *, channels: int = 24, num_blocks: int = 8, ffn_scale: float = 1.5, upscale: int = 4) -> None:
        super().__init__()
        positive(channels=channels, num_blocks=num_blocks, upscale=upscale)
        self.scale = upscale
        self.to_feat = self.kit.conv3x3(3, channels, bias=False)
        self.feats = nn.Sequential(*(_FMB(self.kit, channels, ffn_scale) for _ in range(num_blocks)))
        self.to_img = self.kit.upsampler(channels, 3, upscale, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        shallow = self.to_feat(x)
        return self.to_img(self.feats(shallow) + shallow)


class PlainSMFAN(SMFAN):
    """`SMFAN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="smfan",
        title="SMFAN",
        team="VPEG_C",
        team_id=24,
        section="4.6",
        parameters=84_408,
        flops=4_973_592_576,
        table1=TABLE1[24],
    ),
    SMFAN,
    PlainSMFAN,
)
