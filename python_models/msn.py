"""MSN, a multi-scale distillation network with one-dimensional depthwise convolutions.

Team DASE-IDEALab of Table 1, without a section of its own in the report. AGDN's relative (both descend from MDRN, Mao
et al.).

    x - mean
    fea_conv        3 -> C  ---------------------------------.
    B1 ... B8       distillation, attentions, + input        |
    c1              1x1 of the eight outputs' sum, GELU      |
    c2              BSConv-S                                 |
    +  <-----------------------------------------------------'
    upsampler       C -> 3 r r, pixel shuffle, + mean

    BSConv-S    `BSConvS`: 1x1, depthwise 3x1, depthwise 1x3; with a stride, both have it
    attentions  t + n * `MultiscaleGate`(n) with n = layer norm of t, then `EnhancedCCA`

Particular: the blocks' outputs are summed, not concatenated; convolutions reflect at the border.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from esr_kernels.modules import Level, MultiscaleGate
from esr_kernels.modules.arguments import positive

from .base import Network
from .distillation import Distillation, EnhancedCCA
from .layers import PLAIN, Layers, pad_same
from .registry import ModelCard, register

_LEVELS = (Level(0, pool=3, padding=1), Level(1, pool=5, padding=0), Level(2, pool=7, padding=1, variance_number=3))


def _reflecting(layers: Layers, *channels: int, padding_mode: str, **options: Any) -> Any:
    assert padding_mode == "reflect"
    return layers.bsconv_s(*channels, **options)


class _MDSA(MultiscaleGate):
    """Multi-level dispersion spatial attention of the normalised input."""

    def __init__(self, layers: Layers, c: int) -> None:
        super().__init__(c, c // 4, _LEVELS, conv1x1=layers.conv1x1, conv=partial(_reflecting, layers))
        self.ln = layers.layer_norm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        n = self.ln(x)
        return n * super().forward(n) + x


class _Block(Distillation):
    def __init__(self, layers: Layers, c: int) -> None:
        last = layers.bsconv_s(c, c // 2, activation="gelu")
        super().__init__(layers, c, lambda _: layers.bsconv_s(c, c, activation="gelu"), last)
        self.esa = nn.ModuleDict({"body": nn.Sequential(_MDSA(layers, c))})
        self.cca = EnhancedCCA(layers, c)

    def refine(self, conv: nn.Module, t: Tensor) -> Tensor:
        return conv(t, t, "pre")

    def forward(self, x: Tensor) -> Tensor:
        return self.cca(self.esa["body"](self.distill(x))) + x


class MSN(Network):
    """MSN (report, Table 1, team DASE-IDEALab).

    Args:
        channels: width of the body, C, a multiple of 4.
        num_blocks: at least 1.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 1], at least 29 x 29; result [N, 3, r H, r W], not clamped.
    """

    name = "msn"
    minimum_size = 29

    def __init__(self, *, channels: int = 28, num_blocks: int = 8, upscale: int = 4) -> None:
        super().__init__()
        positive(channels=channels, num_blocks=num_blocks, upscale=upscale)
        if channels % 4:
            raise ValueError(f"channels: must be a multiple of 4, got {channels}")
        self.scale, self.num_blocks = upscale, num_blocks
        self.set_mean()
        self.fea_conv = self.kit.conv3x3(3, channels)
        for i in range(1, num_blocks + 1):
            self.add_module(f"B{i}", _Block(self.kit, channels))
        self.c1 = self.kit.conv1x1(channels, channels, activation="gelu")
        self.c2 = self.kit.bsconv_s(channels, channels)
        self.upsampler = nn.ModuleDict({"upsampleOneStep": self.kit.upsampler(channels, 3, upscale)})

    def forward(self, x: Tensor) -> Tensor:
        self.check_input(x)
        shallow = self.fea_conv(x - self.mean)
        y, total = shallow, torch.zeros_like(shallow)
        for i in range(1, self.num_blocks + 1):
            y = self.get_submodule(f"B{i}")(y)
            total = total + y
        return self.upsampler["upsampleOneStep"](self.c2(self.c1(total)) + shallow) + self.mean


class PlainMSN(MSN):
    """`MSN` in plain PyTorch."""

    kit = PLAIN

    def __init__(self, *, channels: int = 28, num_blocks: int = 8, upscale: int = 4) -> None:
        super().__init__(channels=channels, num_blocks=num_blocks, upscale=upscale)
        attentions = [m.body for m in self.modules() if isinstance(m, EnhancedCCA)]
        pad_same(self.fea_conv, *(body[i] for body in attentions for i in (0, 3)))


register(
    ModelCard(
        name="msn",
        title="MSN",
        team="DASE-IDEALab",
        team_id=28,
        section=None,
        parameters=87_612,
        flops=4_500_392_064,
        table1={
            "psnr_val": 26.89,
            "psnr_test": 27.0,
            "runtime_val_ms": 38.95,
            "runtime_test_ms": 33.42,
            "runtime_ms": 36.19,
            "params_m": 0.088,
            "flops_g": 4.5,
            "score_runtime": 468.34,
            "score_params": 1.74,
            "score_flops": 1.58,
            "score": 328.34,
            "rank": None,
        },
    ),
    MSN,
    PlainMSN,
)
