"""SAFMN's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .arguments import positive
from .conv import Conv1x1, DepthwiseConv


class SAFM(nn.Module):
    """Spatially-adaptive feature modulation (Sun et al., SAFMN; report section 4.21).

    A quarter of the channels each at 1, 1/4, 1/8 and 1/16 of the resolution (adaptive max-pooling), through a depthwise
    3x3 convolution and back (nearest); their concatenation through a 1x1 convolution and GELU multiplies the input.

    Args:
        channels: of input and output, a multiple of 4.
        conv1x1, depthwise_conv: make the convolutions, with the arguments of `Conv1x1` and `DepthwiseConv`.

    State dict: `mfr.0` ... `mfr.3`, `aggr`.
    """

    minimum_size = 16

    def __init__(
        self,
        channels: int,
        *,
        conv1x1: Callable[..., Any] = Conv1x1,
        depthwise_conv: Callable[..., Any] = DepthwiseConv,
    ) -> None:
        super().__init__()
        positive(channels=channels)
        if channels % 4:
            raise ValueError(f"channels: must be a multiple of 4, got {channels}")
        self.mfr = nn.ModuleList(depthwise_conv(channels // 4) for _ in range(4))
        self.aggr = conv1x1(channels, channels, activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape; height and width at least `minimum_size`."""
        height, width = x.shape[2:]
        least = self.minimum_size
        if height < least or width < least:
            raise ValueError(f"x: SAFM needs images of at least {least} x {least} pixels, got {height} x {width}")
        levels = []
        for i, (part, conv) in enumerate(zip(x.chunk(4, 1), self.mfr, strict=True)):
            if i == 0:
                levels.append(conv(part))
            else:
                scale = 2 ** (i + 1)
                pooled = F.adaptive_max_pool2d(part, (height // scale, width // scale))
                levels.append(F.interpolate(conv(pooled), size=(height, width), mode="nearest"))
        return self.aggr(levels) * x
