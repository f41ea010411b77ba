"""R2Net, a re-parameterised network without biases.

Team Cao Group, rank 2, report section 4.2.

    conv_1          3 -> C  --------.
    block_1 ... block_4     ReNRB   |   3x3, LeakyReLU 0.05, 3x3, ESA
    conv_2          1x1             |
    +  <----------------------------'
    upsampler       C -> 3 r r, pixel shuffle

Particular: no bias anywhere, no residual inside a block, ESA without the 1x1 convolution on its skip; the last
convolution before the long skip stays, as a cheap 1x1. In training form the 3x3 convolutions with as many channels as
they take are `RRRB`s, and `conv_2` is a widened pair of 1x1: the report names these, no such weights were published.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from esr_kernels.modules import ESA, RRRB, RepConv1x1

from .base import Network
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .table1 import TABLE1


class _ReNRB(nn.Module):
    """Two convolutions and the attention, C -> C."""

    def __init__(self, b: Layers, channels: int, deploy: bool) -> None:
        super().__init__()
        form = {"bias": False, "deploy": deploy, "deploy_name": ""}
        self.c1_r = b.rep(RRRB, channels, activation="leaky_relu", **form)
        self.c3_r = b.rep(RRRB, channels, **form)
        self.esa = b.esa(channels, 16, conv_f=False, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.esa(self.c3_r(self.c1_r(x)))


class R2Net(Network):
    """R2Net (report section 4.2).

    Args:
        feature_channels: width of the body, C.
        upscale: 1, 2, 3, 4, ...
        deploy: folded convolutions, as published, or the training form.

    Images [N, 3, H, W] in [0, 1], at least 15 x 15; result [N, 3, r H, r W], not clamped.
    """

    name = "r2net"
    minimum_size = ESA.minimum_size

    def __init__(self, *, feature_channels: int = 48, upscale: int = 4, deploy: bool = True) -> None:
        super().__init__()
        b, c = self.kit, feature_channels
        self.scale = upscale
        self.conv_1 = b.conv3x3(3, c, bias=False)
        self.block_1 = _ReNRB(b, c, deploy)
        self.block_2 = _ReNRB(b, c, deploy)
        self.block_3 = _ReNRB(b, c, deploy)
        self.block_4 = _ReNRB(b, c, deploy)
        self.conv_2 = b.rep(RepConv1x1, c, c, bias=False, deploy=deploy)
        # RRRB adds its input, so it needs as many channels of it as of pixels that are shuffled.
        square = c == 3 * upscale**2
        conv = b.rep(RRRB, c, bias=False, deploy=deploy, deploy_name="") if square else None
        self.upsampler = b.upsampler(c, 3, upscale, bias=False, conv=conv)

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        shallow = self.conv_1(x)
        y = self.block_4(self.block_3(self.block_2(self.block_1(shallow))))
        return self.upsampler(self.conv_2(y, shallow))

    @classmethod
    def fold(cls, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # RRRB's usual name is the one of ERRN's files.
        return {key.replace(".rep_conv.", "."): value for key, value in super().fold(state).items()}


class PlainR2Net(R2Net):
    """`R2Net` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="r2net",
        title="R2Net",
        team="Cao Group",
        team_id=29,
        section="4.2",
        parameters=214_800,
        flops=13_050_087_424,
        table1=TABLE1[29],
    ),
    R2Net,
    PlainR2Net,
)
