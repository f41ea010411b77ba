"""EFQN, QuickSRNet-Large.

Team FireWork, outside the ranking (its PSNR misses the threshold, and the report has no section on it); Berger et al.,
"QuickSRNet: Plain Single-Image Super-Resolution Architecture for Faster Inference on Mobile Platforms".

    x, four times along the channels    3 -> 12  --------.
    cnn             3x3, 12 -> C, clamp; eleven 3x3, C -> C, each clamped to [0, 1]
    conv_last       C -> 3 r r                           |
    +  anchor       1x1, 3 -> 3 r r, of x  <-------------'
    clamp to [0, 1], pixel shuffle

Particular: no block, no attention, no residual in feature space; everything is clamped to [0, 1], as 8-bit accelerators
like it. The anchor starts as nearest-neighbour enlargement and is learned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .base import Network
from .layers import PLAIN
from .registry import ModelCard, register
from .table1 import TABLE1


class EFQN(Network):
    """EFQN (QuickSRNet-Large).

    Args:
        feature_channels: width of the body, C.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 1], any size; result [N, 3, r H, r W] in [0, 1].
    """

    name = "efqn"
    receptive_radius = 13

    def __init__(self, *, feature_channels: int = 64, upscale: int = 4) -> None:
        super().__init__()
        b, c = self.kit, feature_channels
        self.scale = upscale
        layers: list[nn.Module] = [b.conv3x3(12, c), nn.Hardtanh(0.0, 1.0)]
        for _ in range(11):
            layers += [b.conv3x3(c, c), nn.Hardtanh(0.0, 1.0)]
        self.cnn = nn.Sequential(*layers)
        self.conv_last = b.conv3x3_pixel_shuffle(c, 3, upscale)
        self.anchor = nn.ModuleDict({"net": b.conv1x1(3, 3 * upscale**2)})

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        anchor = F.pixel_shuffle(self.anchor["net"](x), self.scale)
        return F.hardtanh(self.conv_last(self.cnn(torch.cat([x] * 4, 1)), residual=anchor), 0.0, 1.0)


class PlainEFQN(EFQN):
    """`EFQN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="efqn",
        title="EFQN (QuickSRNet-Large)",
        team="FireWork",
        team_id=11,
        section=None,
        parameters=441_072,
        flops=28_849_471_488,
        table1=TABLE1[11],
    ),
    EFQN,
    PlainEFQN,
)
