"""ASR_Prune, RLFN with pruned kernels and biases.

Team AdvancedSR, rank 7, report section 4.11.

    conv_1          3 -> C  --------.
    block_1 ... block_4     RLFB    |   three 3x3 with LeakyReLU 0.05 (M channels inside), + input, 1x1, ESA
    conv_2          1x1             |
    +  <----------------------------'
    upsampler       1x1, C -> 3 r r, pixel shuffle

Particular: where the centre of a 3x3 kernel did nearly all the work, a 1x1 took its place: `conv_2`, the upsampler and
the second convolution of `block_4`. Biases are left in `conv_1` and the attention only. Works in 0..255.
"""

from __future__ import annotations

from torch import Tensor, nn

from esr_kernels.modules import RLFB

from .base import Network
from .layers import PLAIN
from .registry import ModelCard, register
from .table1 import TABLE1


class ASRPrune(Network):
    """ASR_Prune (report section 4.11).

    Args:
        feature_channels, mid_channels: widths of the body and inside the blocks, C and M.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 255], at least 15 x 15; result [N, 3, r H, r W], not clamped.
    """

    name = "asr_prune"
    data_range = 255.0
    minimum_size = RLFB.minimum_size

    def __init__(self, *, feature_channels: int = 46, mid_channels: int = 48, upscale: int = 4) -> None:
        super().__init__()
        b, c, m = self.kit, feature_channels, mid_channels
        self.scale = upscale
        self.conv_1 = b.conv3x3(3, c)
        self.block_1 = b.rlfb(c, m, bias=False)
        self.block_2 = b.rlfb(c, m, bias=False)
        self.block_3 = b.rlfb(c, m, bias=False)
        self.block_4 = b.rlfb(c, m, bias=False)
        self.block_4.c2_r = b.conv1x1(m, m, bias=False, activation="leaky_relu")
        self.conv_2 = b.conv1x1(c, c, bias=False)
        self.upsampler = nn.Sequential(b.conv1x1(c, 3 * upscale**2, bias=False), nn.PixelShuffle(upscale))

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        shallow = self.conv_1(x)
        y = self.block_4(self.block_3(self.block_2(self.block_1(shallow))))
        return self.upsampler(self.conv_2(y, shallow))


class PlainASRPrune(ASRPrune):
    """`ASRPrune` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="asr_prune",
        title="RLFN kernel-pruned (ASR_Prune)",
        team="AdvancedSR",
        team_id=17,
        section="4.11",
        parameters=263_348,
        flops=16_199_878_656,
        data_range=255.0,
        table1=TABLE1[17],
    ),
    ASRPrune,
    PlainASRPrune,
)
