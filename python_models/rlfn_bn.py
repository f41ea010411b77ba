"""RLFN_BN, RLFN with a batch normalisation in its blocks.

Team Lanzhi, rank 13, report section 4.17.

    conv_1          3 -> C  --------.
    block_1 ... block_4     RLFB    |   three 3x3 with LeakyReLU 0.05 (M channels inside), + input, 1x1, ESA
    conv_2          C -> C          |
    +  <----------------------------'
    upsampler       C -> 3 r r, pixel shuffle

Particular: batch normalisation between the first convolution of a block and its activation (the report draws it behind
the activation). In use it is one with the convolution. The team averaged two such networks; one was published. Works
in 0..255.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esr_kernels import functional
from esr_kernels.modules import RLFB
from esr_kernels.reparam.algebra import fold_batch_norm

from .base import ResidualNetwork
from .layers import PLAIN, Layers
from .registry import ModelCard, register
from .table1 import TABLE1

_SLOPE = 0.05


class _RLFBWithNorm(nn.Module):
    """RLFB with batch normalisation, C -> C."""

    def __init__(self, b: Layers, channels: int, mid_channels: int) -> None:
        super().__init__()
        c, m = channels, mid_channels
        self.plain = b is PLAIN
        self.c1_r = b.conv3x3(c, m)
        self.bn1 = nn.BatchNorm2d(m)
        self.c2_r = b.conv3x3(m, m, activation="leaky_relu")
        self.c3_r = b.conv3x3(m, c, activation="leaky_relu")
        self.c5 = b.conv1x1(c, c)
        self.esa = b.esa(c, 16)
        self._kept: tuple[Any, Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        # fvcore's trace counts the normalisation, as it does in the published network.
        if self.plain or self.training or torch.jit.is_tracing():
            y = F.leaky_relu(self.bn1(self.c1_r(x)), _SLOPE, inplace=True)
        else:
            weight, bias = self._folded()
            y = functional.conv3x3(x, weight, bias, activation="leaky_relu", negative_slope=_SLOPE)
        return self.esa(self.c5(self.c3_r(self.c2_r(y), residual=x)))

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the first convolution and its normalisation, kept until one of them changes."""
        conv, bn = self.c1_r, self.bn1
        sources: Any = (conv.weight, conv.bias, bn.weight, bn.bias, bn.running_mean, bn.running_var)

        def fold() -> tuple[Tensor, Tensor]:
            w, b, gamma, beta, mean, variance = (t.double() for t in sources)
            folded = fold_batch_norm((w, b), mean, variance, gamma, beta, bn.eps)
            return tuple(t.to(conv.weight.dtype) for t in folded)  # type: ignore[return-value, union-attr]

        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in sources)):
            return fold()
        stamp = [(t, t.data_ptr(), None if t.is_inference() else t._version) for t in sources]
        kept = self._kept
        if kept is None or any(a[0] is not b[0] or a[1:] != b[1:] for a, b in zip(kept[0], stamp, strict=True)):
            with torch.inference_mode(False), torch.no_grad():
                kept = self._kept = (stamp, *fold())
        return kept[1], kept[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


class RLFNBN(ResidualNetwork):
    """RLFN_BN (report section 4.17).

    Args:
        feature_channels, mid_channels: widths of the body and inside the blocks, C and M.
        upscale: 1, 2, 3, 4, ...

    Images [N, 3, H, W] in [0, 255], at least 15 x 15; result [N, 3, r H, r W], not clamped.
    """

    name = "rlfn_bn"
    data_range = 255.0
    minimum_size = RLFB.minimum_size

    def __init__(self, *, feature_channels: int = 46, mid_channels: int = 48, upscale: int = 4) -> None:
        super().__init__()
        b, c = self.kit, feature_channels
        self.scale = upscale
        self.conv_1 = b.conv3x3(3, c)
        for i in range(1, self.num_blocks + 1):
            self.add_module(f"block_{i}", _RLFBWithNorm(b, c, mid_channels))
        self.conv_2 = b.conv3x3(c, c)
        self.upsampler = b.upsampler(c, 3, upscale)


class PlainRLFNBN(RLFNBN):
    """`RLFNBN` in plain PyTorch."""

    kit = PLAIN


register(
    ModelCard(
        name="rlfn_bn",
        title="RLFN_BN (RLFN_B)",
        team="Lanzhi",
        team_id=13,
        section="4.17",
        parameters=317_602,
        flops=19_700_025_344,
        data_range=255.0,
        table1=TABLE1[13],
    ),
    RLFNBN,
    PlainRLFNBN,
)
