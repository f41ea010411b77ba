"""Gated feed-forward network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .arguments import positive
from .conv import Conv1x1, DepthwiseConv


class GDFN(nn.Module):
    """Gated-dconv feed-forward network (Zamir et al., Restormer; report sections 4.5, 4.18, 4.21, 4.28).

    1x1 to twice the hidden width, depthwise 3x3, one half times the other, 1x1 back. No biases.

    Args:
        channels: of input and output.
        hidden: width between the halves' product and the last convolution.
        gelu: whether the first half passes GELU before the product.
        conv1x1, depthwise_conv: make the convolutions, with the arguments of `Conv1x1` and `DepthwiseConv`.

    State dict: `project_in`, `dwconv`, `project_out`, weights only.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        *,
        gelu: bool = True,
        conv1x1: Callable[..., Any] = Conv1x1,
        depthwise_conv: Callable[..., Any] = DepthwiseConv,
    ) -> None:
        super().__init__()
        positive(channels=channels, hidden=hidden)
        self.project_in = conv1x1(channels, 2 * hidden, bias=False)
        self.dwconv = depthwise_conv(2 * hidden, bias=False, activation="gelu" if gelu else "none", gated=True)
        self.project_out = conv1x1(hidden, channels, bias=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, C, H, W] -> the same shape; a residual of that shape is added in the last convolution's pass."""
        return self.project_out(self.refine(self.dwconv(self.project_in(x))), residual)

    def refine(self, product: Tensor) -> Tensor:
        """What happens to the halves' product [N, hidden, H, W] before the last convolution: nothing here."""
        return product
