"""EGFMN, the enhanced gated feature modulation network.

Team VPEG_E, report section 4.21. SAFMN (Sun et al.) with a gated feed-forward network.

    to_feat         3 -> C  -------------------------------------------------.
    feats.0 ... feats.6     t + SAFM(norm(t)), t + feed-forward(norm(t))     |
    +  <---------------------------------------------------------------------'
    to_img          C -> 3 r r, pixel shuffle

Particular: the feed-forward network is Restormer's (`GDFN`) with the plain product of its halves, without GELU.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from esr_kernels.modules import GDFN, SAFM
from esr_kernels.modules.arguments import positive

from .base import Network
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .table1 import TABLE1


def safm_layers(layers: Layers) -> dict[str, Any]:
    """What `SAFM` is made of."""
    return {name: getattr(layers, name) for name in ("modulating_conv1x1", "depthwise_conv", "pool")}


class FMM(nn.Module):
    """Feature mixing module: x + safm(norm(x)), then x + ffd(norm(x)); SAFM and feed-forward network may vary."""

    def __init__(self, layers: Layers, channels: int, safm: nn.Module, ffd: nn.Module) -> None:
        super().__init__()
        self.norm1 = layers.layer_norm2d(channels)
        self.safm = safm
        self.norm2 = layers.layer_norm2d(channels)
        self.ffd = ffd

    def forward(self, x: Tensor) -> Tensor:
        x = self.safm(self.norm1(x)) + x
        return self.ffd(self.norm2(x), x)


class EGFMN(Network):
    """EGFMN (report section 4.21).

    Args:
        channels: width of the body, C, a multiple of 4.
        num_blocks: feature mixing modules, at least 1.
        ffn_scale: how many times wider the feed-forward network is inside.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 1], at least 16 x 16; result [N, 3, r H, r W], not clamped.
    """

    name = "egfmn"
    minimum_size = SAFM.minimum_size

    def __init__(self, *, channels: int = 36, num_blocks: int = 7, ffn_scale: float = 2.0, upscale: int = 4) -> None:
        super().__init__()
        positive(channels=channels, num_blocks=num_blocks, upscale=upscale)
        self.scale = upscale
        self.to_feat = self.kit.conv3x3(3, channels)
        hidden = int(channels * ffn_scale)
        make = {"conv1x1": self.kit.conv1x1, "depthwise_conv": self.kit.depthwise_conv}
        safm = safm_layers(self.kit)
        self.feats = nn.Sequential(
            *(
                FMM(self.kit, channels, SAFM(channels, **safm), GDFN(channels, hidden, gelu=False, **make))
                for _ in range(num_blocks)
            )
        )
        self.to_img = self.kit.upsampler(channels, 3, upscale)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        shallow = self.to_feat(x)
        return self.to_img(self.feats(shallow) + shallow)


class PlainEGFMN(EGFMN):
    """`EGFMN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="egfmn",
        title="EGFMN",
        team="VPEG_E",
        team_id=43,
        section="4.21",
        parameters=92_964,
        flops=5_891_851_008,
        table1=TABLE1[43],
    ),
    EGFMN,
    PlainEGFMN,
)
