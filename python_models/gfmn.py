"""GFMN, a gated feature modulation network.

Team VIP of Table 1, without a section of its own in the report. SAFMN (Sun et al.) with the feature decomposition of
MogaNet (Li et al.).

    bilinear x r  ------------------------------------------------------.
    x - mean                                                            |
    to_feat         3 -> C                                              |
    feats.0 ... feats.7     t + SAFM(norm(t)), t + feed-forward(norm(t))|
    to_img          C -> 3 r r, pixel shuffle, + mean                   |
    +  <----------------------------------------------------------------'

Particular: no skip over the body. Before SAFM come a 1x1 convolution and GELU(t + sigma (t - mean of t)), with the mean
over the image; the feed-forward network multiplies its halves without GELU, and the product p becomes p + sigma (p -
GELU(1x1 of p to one channel)).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from esr_kernels.modules import GDFN, SAFM, ElementScale
from esr_kernels.modules.arguments import positive

from .base import Network
from .egfmn import FMM, safm_layers
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .table1 import TABLE1


class _Modulation(SAFM):
    """SAFM of what deviates from the image's mean."""

    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__(c, **safm_layers(layers))
        self.proj_1 = layers.conv1x1(c, c)
        self.sigma = ElementScale(c)

    def forward(self, x: Tensor) -> Tensor:
        t = self.proj_1(x)
        return super().forward(F.gelu(t + self.sigma(t - F.adaptive_avg_pool2d(t, 1))))


class _FeedForward(GDFN):
    """GDFN without GELU and with the product's part that the channels do not share amplified."""

    def __init__(self, layers: Layers, c: int, hidden: int) -> None:
        super().__init__(c, hidden, gelu=False, conv1x1=layers.conv1x1, depthwise_conv=layers.depthwise_conv)
        self.decompose = layers.conv1x1(hidden, 1, activation="gelu")
        self.sigma = ElementScale(hidden)

    def refine(self, product: Tensor) -> Tensor:
        return product + self.sigma(product - self.decompose(product))


class GFMN(Network):
    """GFMN (report, Table 1, team VIP).

    Args:
        channels: width of the body, C, a multiple of 4.
        num_blocks: feature mixing modules, at least 1.
        ffn_scale: how many times wider the feed-forward network is inside.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 1], at least 16 x 16; result [N, 3, r H, r W], not clamped.
    """

    name = "gfmn"
    minimum_size = SAFM.minimum_size

    def __init__(self, *, channels: int = 32, num_blocks: int = 8, ffn_scale: float = 1.8, upscale: int = 4) -> None:
        super().__init__()
        positive(channels=channels, num_blocks=num_blocks, upscale=upscale)
        self.scale = upscale
        self.set_mean()
        self.to_feat = self.kit.conv3x3(3, channels)
        hidden = int(channels * ffn_scale)
        self.feats = nn.Sequential(
            *(
                FMM(self.kit, channels, _Modulation(self.kit, channels), _FeedForward(self.kit, channels, hidden))
                for _ in range(num_blocks)
            )
        )
        self.to_img = self.kit.upsampler(channels, 3, upscale)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        deep = self.feats(self.to_feat(x - self.mean))
        # The mean that the end adds, added before the resize, which keeps it.
        return self.to_img(deep, residual=self.enlarged(x + self.mean))


class PlainGFMN(GFMN):
    """`GFMN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="gfmn",
        title="GFMN",
        team="VIP",
        team_id=22,
        section=None,
        parameters=88_408,
        flops=5_555_830_784,
        table1=TABLE1[22],
    ),
    GFMN,
    PlainGFMN,
)
