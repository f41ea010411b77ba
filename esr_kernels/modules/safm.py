"""SAFMN's attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional
from .arguments import positive
from .conv import Conv1x1, DepthwiseConv


class ModulatingConv1x1(Conv1x1):
    """1x1 convolution of the concatenation of maps of several resolutions, and its activation, times x.

    A nearest resize and a 1x1 convolution commute, so that each map is convolved in its own resolution, by the columns
    of the weight that it meets; `functional.modulate` enlarges and adds.

    Args:
        in_channels: of all maps together.
        out_channels, bias, activation, negative_slope, factory: as in `Conv1x1`.

    State dict: weight [O, C, 1, 1], bias [O].
    """

    def forward(self, maps: Sequence[Tensor], x: Tensor) -> Tensor:  # type: ignore[override]
        """Maps [N, C_i, H_i, W_i], the first of the size of x [N, O, H, W] -> [N, O, H, W]."""
        if functional.decomposes():  # as published, which is what counts of operations are compared with
            size = x.shape[2:]
            return super().forward([maps[0], *(F.interpolate(t, size=size, mode="nearest") for t in maps[1:])]) * x
        products = []
        for i, (t, weight) in enumerate(zip(maps, self.weight.split([t.shape[1] for t in maps], 1), strict=True)):
            products.append(functional.conv1x1(t, weight, self.bias if i == 0 else None))
        return functional.modulate(x, products, activation=self.activation, negative_slope=self.negative_slope)


class SAFM(nn.Module):
    """Spatially-adaptive feature modulation (Sun et al., SAFMN; report section 4.21).

    A quarter of the channels each at 1, 1/4, 1/8 and 1/16 of the resolution (adaptive max-pooling), through a depthwise
    3x3 convolution and back (nearest); their concatenation through a 1x1 convolution and GELU multiplies the input.

    Args:
        channels: of input and output, a multiple of 4.
        modulating_conv1x1, depthwise_conv: make the convolutions, with the arguments of `ModulatingConv1x1` and
            `DepthwiseConv`.
        pool: `functional.adaptive_max_pool`, or what computes the same.

    State dict: `mfr.0` ... `mfr.3`, `aggr`.
    """

    minimum_size = 16

    def __init__(
        self,
        channels: int,
        *,
        modulating_conv1x1: Callable[..., Any] = ModulatingConv1x1,
        depthwise_conv: Callable[..., Any] = DepthwiseConv,
        pool: Callable[..., Tensor] = functional.adaptive_max_pool,
    ) -> None:
        super().__init__()
        positive(channels=channels)
        if channels % 4:
            raise ValueError(f"channels: must be a multiple of 4, got {channels}")
        self.mfr = nn.ModuleList(depthwise_conv(channels // 4) for _ in range(4))
        self.aggr = modulating_conv1x1(channels, channels, activation="gelu")
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape; height and width at least `minimum_size`."""
        height, width = x.shape[2:]
        least = self.minimum_size
        if height < least or width < least:
            raise ValueError(f"x: SAFM needs images of at least {least} x {least} pixels, got {height} x {width}")
        levels = []
        for i, (part, conv) in enumerate(zip(x.chunk(4, 1), self.mfr, strict=True)):
            scale = 1 if i == 0 else 2 ** (i + 1)
            levels.append(conv(part if i == 0 else self.pool(part, (height // scale, width // scale))))
        return self.aggr(levels, x)
