"""SAFMN++, spatially-adaptive feature modulation behind a 3x3 convolution.

Team VPEG_O, rank 4, report section 4.8; after Sun et al., "Spatially-Adaptive Feature Modulation for Efficient Image
Super-Resolution".

    to_feat         3 -> C
    feats           six blocks: x + CCM(SAFM+(x))
    to_img          C -> 3 r r, pixel shuffle
    +  the image, enlarged bilinearly

    SAFM+   3x3; of its channels the first third, a, is modulated: GELU(resize(depthwise 3x3(max pool(a)))) * a;
            GELU, 1x1 over the rest and the modulated third
    CCM     3x3 to 1.5 C, GELU, 1x1 back

Particular: one modulated scale (an eighth of the size) in place of SAFMN's four, the local branch is a dense 3x3, one
residual around both halves of a block, no normalisation, no bias anywhere, no skip over the blocks.
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


class _SAFM(nn.Module):
    """SAFM+: local features, a third of them modulated by what is around, C -> C."""

    def __init__(self, b: Layers, channels: int) -> None:
        super().__init__()
        third = channels // 3
        self.split = [third, channels - third]
        self.proj = b.conv3x3(channels, channels, bias=False)
        self.dwconv = b.depthwise_conv(third, bias=False)
        self.out = b.conv1x1(channels, channels, bias=False)
        self.pool, self.modulate = b.pool, b.modulate

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        modulated, local = self.proj(x).split(self.split, 1)
        pooled = self.pool(modulated, (size[0] // _POOL, size[1] // _POOL))
        modulated = self.modulate(modulated, self.dwconv(pooled), mode="bilinear", activation="gelu")
        return self.out([F.gelu(local), F.gelu(modulated)])


class _CCM(nn.Module):
    """Convolutional channel mixer, C -> C."""

    def __init__(self, b: Layers, channels: int, ffn_scale: float) -> None:
        super().__init__()
        hidden = int(channels * ffn_scale)
        self.conv1 = b.conv3x3(channels, hidden, bias=False, activation="gelu")
        self.conv2 = b.conv1x1(hidden, channels, bias=False)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.conv2(self.conv1(x), residual)


class _AttBlock(nn.Module):
    """One residual around both, C -> C."""

    def __init__(self, b: Layers, channels: int, ffn_scale: float) -> None:
        super().__init__()
        self.conv1 = _SAFM(b, channels)
        self.conv2 = _CCM(b, channels, ffn_scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x), x)


class SAFMNPP(Network):
    """SAFMN++ (report section 4.8).

    Args:
        feature_channels: width of the body, C, at least 3.
        num_blocks: at least 1.
        ffn_scale: how many times wider than the body the channel mixer is inside.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 1], at least 8 x 8; result [N, 3, r H, r W], not clamped.
    """

    name = "safmn_pp"
    minimum_size = _POOL

    def __init__(
        self, *, feature_channels: int = 36, num_blocks: int = 6, ffn_scale: float = 1.5, upscale: int = 4
    ) -> None:
        super().__init__()
        positive(feature_channels=feature_channels, num_blocks=num_blocks, upscale=upscale)
        b, c = self.kit, feature_channels
        self.scale = upscale
        self.to_feat = b.conv3x3(3, c, bias=False)
        self.feats = nn.Sequential(*(_AttBlock(b, c, ffn_scale) for _ in range(num_blocks)))
        self.to_img = b.upsampler(c, 3, upscale, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        return self.to_img(self.feats(self.to_feat(x)), self.enlarged(x))


class PlainSAFMNPP(SAFMNPP):
    """`SAFMNPP` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="safmn_pp",
        title="SAFMN++",
        team="VPEG_O",
        team_id=23,
        section="4.8",
        parameters=211_572,
        flops=13_855_236_096,
        table1=TABLE1[23],
    ),
    SAFMNPP,
    PlainSAFMNPP,
)
