"""What a network is made of: the same wiring from fused layers, or from plain PyTorch ones.

Networks whose data flow is more than a list of convolutions are written once, with `self.layers`: `FUSED` in the
network, `PLAIN` in its twin, which then computes what the published network does in the steps it does it in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from esr_kernels.modules import ESA, BSConv, Conv1x1, Conv3x3, PixelShuffleUpsampler

from .plain_blocks import (
    PlainBSConv,
    PlainConv1x1,
    PlainConv3x3,
    PlainESA,
    PlainUpsampler,
)

Make = Callable[..., Any]


@dataclass(frozen=True)
class Layers:
    """Constructors with the arguments and the state-dict names of the fused modules."""

    conv3x3: Make
    conv1x1: Make
    bsconv: Make
    upsampler: Make
    esa: Make


FUSED = Layers(
    conv3x3=Conv3x3,
    conv1x1=Conv1x1,
    bsconv=BSConv,
    upsampler=PixelShuffleUpsampler,
    esa=ESA,
)
PLAIN = Layers(
    conv3x3=PlainConv3x3,
    conv1x1=PlainConv1x1,
    bsconv=PlainBSConv,
    upsampler=PlainUpsampler,
    esa=PlainESA,
)


def pad_same(*convs: nn.Conv2d) -> None:
    """Write the padding as "same", as some published networks do: fvcore then does not count the convolution."""
    for conv in convs:
        conv.padding = "same"
