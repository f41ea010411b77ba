"""ERRN, re-parameterised residual blocks with one gate per pixel.

Team Just Try, rank 16, report section 4.20.

    conv_1          3 -> C  --------.
    block_1 ... block_6     RepB    |   four 3x3 with LeakyReLU 0.1 between them, + input, SSA
    conv_2          C -> C          |
    +  <----------------------------'
    upsampler       C -> 3 r r, pixel shuffle

SSA, simple spatial attention: y * sigmoid(1x1 convolution of y to one channel).

Particular: no pooling, so an output pixel depends on a neighbourhood only. The published weights are the folded form;
of the training form (ERB, MBRB) neither code nor weights were published.
"""

from __future__ import annotations

from torch import Tensor, nn

from .base import ResidualNetwork
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .table1 import TABLE1


class _RepB(nn.Module):
    """Four convolutions, residual and a spatial gate, C -> C."""

    def __init__(self, b: Layers, channels: int) -> None:
        super().__init__()

        def conv(name: str, activation: str = "leaky_relu") -> nn.ModuleDict:
            return nn.ModuleDict({name: b.conv3x3(channels, channels, activation=activation, negative_slope=0.1)})

        self.rep1_1 = conv("rep_conv")
        self.rep1_2 = conv("rep_conv")
        self.rep2_1 = conv("rep_conv2")
        self.rep2_2 = conv("rep_conv2", "none")
        self.ssa = nn.ModuleDict({"sa_conv": b.conv1x1(channels, 1)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.rep1_2["rep_conv"](self.rep1_1["rep_conv"](x))
        y = self.rep2_2["rep_conv2"](self.rep2_1["rep_conv2"](y), residual=x)
        return y * self.ssa["sa_conv"](y).sigmoid()


class ERRN(ResidualNetwork):
    """ERRN (report section 4.20).

    Args:
        feature_channels: width of the body, C.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 1], any size; result [N, 3, r H, r W], not clamped.
    """

    name = "errn"
    num_blocks = 6
    receptive_radius = 1 + 4 * num_blocks + 1 + 1

    def __init__(self, *, feature_channels: int = 40, upscale: int = 4) -> None:
        super().__init__()
        b, c = self.kit, feature_channels
        self.scale = upscale
        self.conv_1 = b.conv3x3(3, c)
        for i in range(1, self.num_blocks + 1):
            self.add_module(f"block_{i}", _RepB(b, c))
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
