"""ERRN, re-parameterised residual blocks with one gate per pixel.

Team Just Try, rank 16, report section 4.20.

    conv_1          3 -> C  --------.
    block_1 ... block_6     RepB    |   four 3x3 with LeakyReLU 0.1 between them, + input, SSA
    conv_2          C -> C          |
    +  <----------------------------'
    upsampler       C -> 3 r r, pixel shuffle

SSA, simple spatial attention: y * sigmoid(1x1 convolution of y to one channel).

Particular: no pooling, so an output pixel depends on a neighbourhood only. In training form the first two convolutions
of a block are the `RRRB`s of an ERB, the last two are `MBRB`s: the report names these, no such weights were published.
"""

from __future__ import annotations

from torch import Tensor, nn

from esr_kernels.modules import MBRB, RRRB

from .base import ResidualNetwork
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .table1 import TABLE1


class _RepB(nn.Module):
    """Four convolutions, residual and a spatial gate, C -> C."""

    def __init__(self, b: Layers, channels: int, deploy: bool) -> None:
        super().__init__()
        leaky = {"activation": "leaky_relu", "negative_slope": 0.1}
        self.rep1_1 = b.rep(RRRB, channels, deploy=deploy, **leaky)
        self.rep1_2 = b.rep(RRRB, channels, deploy=deploy, **leaky)
        self.rep2_1 = b.rep(MBRB, channels, channels, deploy=deploy, **leaky)
        self.rep2_2 = b.rep(MBRB, channels, channels, deploy=deploy)
        self.ssa = nn.ModuleDict({"sa_conv": b.conv1x1(channels, 1)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.rep2_2(self.rep2_1(self.rep1_2(self.rep1_1(x))), residual=x)
        return y * self.ssa["sa_conv"](y).sigmoid()


class ERRN(ResidualNetwork):
    """ERRN (report section 4.20).

    Args:
        feature_channels: width of the body, C.
        upscale: 1, 2, 3, 4, ...
        deploy: folded convolutions, as published, or the training form.

    Images [N, 3, H, W] in [0, 1], any size; result [N, 3, r H, r W], not clamped.
    """

    name = "errn"
    num_blocks = 6
    receptive_radius = 1 + 4 * num_blocks + 1 + 1

    def __init__(self, *, feature_channels: int = 40, upscale: int = 4, deploy: bool = True) -> None:
        super().__init__()
        b, c = self.kit, feature_channels
        self.scale = upscale
        self.conv_1 = b.conv3x3(3, c)
        for i in range(1, self.num_blocks + 1):
            self.add_module(f"block_{i}", _RepB(b, c, deploy))
        self.conv_2 = b.conv3x3(c, c)
        self.upsampler = b.upsampler(c, 3, upscale)


class PlainERRN(ERRN):
    """`ERRN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="errn",
        title="ERRN",
        team="Just Try",
        team_id=46,
        section="4.20",
        parameters=379_694,
        flops=24_811_929_600,
        table1=TABLE1[46],
    ),
    ERRN,
    PlainERRN,
)
