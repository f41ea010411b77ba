"""PFDNLite, partial feature distillation with a local attention.

Team BSR, rank 3, report section 4.3; after Li et al., "NTIRE 2023 Challenge on Efficient Super-Resolution" (PFDN) and
Du et al., ABPN.

    head            3 -> C
    block1          PFDB
    block2, block3  pruned PFDB
    block4          PFDB
    tail            C -> 3 r r, pixel shuffle
    +  the image, enlarged by repeating its pixels

    LocalAttn       y = x * sigmoid(first channel of x) * resize(sigmoid(3x3(3x3 stride 2(max pool(1x1(x))))))
    PFDB            y = LocalAttn(x); t = 3x3 SiLU (y); its first half = 3x3 SiLU of it; 3x3 SiLU (t) + y
    pruned PFDB     y = LocalAttn(x); t = y, its first half = 3x3 SiLU (y); 3x3 SiLU (t) + y

Particular: the attention's gate of a pixel is the first channel itself, without a convolution; the attended map, not
the block's input, is the residual; the gate is squashed before it is resized. In training form the 3x3 convolutions of
a block are RepMBConvs: that of half the channels with a point-wise convolution after it (`RepMBConvPoint`), the others
with MobileNetV3's excitation (`RepMBConvSE`). The report names these, no such weights were published.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esr_kernels.modules import RepMBConvPoint, RepMBConvSE
from esr_kernels.modules.arguments import positive

from .base import Network
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .table1 import TABLE1


class _LocalAttention(nn.Module):
    """A gate from pooled maxima and the first channel, C -> C."""

    def __init__(self, b: Layers, channels: int, inner: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            b.conv1x1(channels, inner),
            nn.MaxPool2d(7, 3),
            nn.Conv2d(inner, inner, 3, stride=2, padding=1),
            b.conv3x3(inner, channels),
            nn.Sigmoid(),
        )
        self.modulate = b.modulate

    def forward(self, x: Tensor) -> Tensor:
        return self.modulate(x, self.body(x), mode="bilinear") * x[:, :1].sigmoid()


class _PFDB(nn.Module):
    """Partial feature distillation block, C -> C."""

    def __init__(self, b: Layers, channels: int, pruned: bool, deploy: bool) -> None:
        super().__init__()
        part = self.part = channels // 2
        form = {"activation": "silu", "deploy": deploy}
        self.attn = _LocalAttention(b, channels)
        self.conv1 = b.rep(RepMBConvPoint, channels, part, **form) if pruned else b.rep(RepMBConvSE, channels, **form)
        self.conv2 = None if pruned else b.rep(RepMBConvPoint, part, part, **form)
        self.conv3 = b.rep(RepMBConvSE, channels, **form)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(x)
        t = self.conv1(y)
        if self.conv2 is None:
            first, rest = t, y[:, self.part :]
        else:
            first, rest = self.conv2(t[:, : self.part]), t[:, self.part :]
        return self.conv3(torch.cat([first, rest], 1), residual=y)


class PFDNLite(Network):
    """PFDNLite (report section 4.3).

    Args:
        feature_channels: width of the body, C, at least 2.
        upscale: 1, 2, 3, 4, ...
        deploy: folded convolutions, as published, or the training form.

    Images [N, 3, H, W] in [0, 1], at least 7 x 7; result [N, 3, r H, r W], not clamped.
    """

    name = "pfdn_lite"
    minimum_size = 7  # the attention's pooling window

    def __init__(self, *, feature_channels: int = 48, upscale: int = 4, deploy: bool = True) -> None:
        super().__init__()
        positive(feature_channels=feature_channels, upscale=upscale)
        b, c = self.kit, feature_channels
        self.scale = upscale
        self.head = b.conv3x3(3, c)
        self.block1 = _PFDB(b, c, pruned=False, deploy=deploy)
        self.block2 = _PFDB(b, c, pruned=True, deploy=deploy)
        self.block3 = _PFDB(b, c, pruned=True, deploy=deploy)
        self.block4 = _PFDB(b, c, pruned=False, deploy=deploy)
        self.tail = b.upsampler(c, 3, upscale)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        y = self.block4(self.block3(self.block2(self.block1(self.head(x)))))
        return self.tail(y, self._repeated(x))

    def _repeated(self, x: Tensor) -> Tensor:
        """Every pixel `scale` times in both directions: [N, 3, H, W] -> [N, 3, scale H, scale W]."""
        n, channels, height, width = x.shape
        r = self.scale
        pixels = x[:, :, :, None, :, None].expand(-1, -1, -1, r, -1, r)
        return pixels.reshape(n, channels, height * r, width * r)


class PlainPFDNLite(PFDNLite):
    """`PFDNLite` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="pfdn_lite",
        title="PFDNLite",
        team="BSR",
        team_id=1,
        section="4.3",
        parameters=218_288,
        flops=11_952_734_208,
        table1=TABLE1[1],
    ),
    PFDNLite,
    PlainPFDNLite,
)
