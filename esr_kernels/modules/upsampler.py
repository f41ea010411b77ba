"""The tail of nearly every network here: 3x3 convolution and pixel shuffle (Shi et al., ESPCN)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional
from ..reparam.base import Reparameterized
from .arguments import positive


def _shuffled(x: Tensor, weight: Tensor, bias: Tensor | None, factor: int, residual: Tensor | None) -> Tensor:
    if weight.shape[2] == 1:  # after `reparam.pruning.prune_kernels`
        y = F.pixel_shuffle(functional.conv1x1(x, weight, bias), factor)
        return y if residual is None else y + residual
    return functional.conv3x3_pixel_shuffle(x, weight, bias, upscale_factor=factor, residual=residual)


class Conv3x3PixelShuffle(nn.Conv2d):
    """3x3 convolution and pixel shuffle as one fused operator.

    Args:
        in_channels: of the feature map.
        out_channels: of the image.
        upscale_factor: r, how many times larger the image is.
        bias: whether the convolution has one.
        factory: `device` and `dtype` of the parameters.

    State dict: weight [O r r, C, 3, 3], bias [O r r].
    """

    def __init__(
        self, in_channels: int, out_channels: int = 3, upscale_factor: int = 4, *, bias: bool = True, **factory: Any
    ) -> None:
        positive(in_channels=in_channels, out_channels=out_channels, upscale_factor=upscale_factor)
        super().__init__(in_channels, out_channels * upscale_factor**2, 3, padding=1, bias=bias, **factory)
        self.upscale_factor = upscale_factor

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, C, H, W] and an optional residual [N, O, H r, W r] -> [N, O, H r, W r], NCHW-contiguous."""
        return _shuffled(x, self.weight, self.bias, self.upscale_factor, residual)


class PixelShuffleUpsampler(nn.Sequential):
    """`Conv3x3PixelShuffle` under the names of the published `nn.Sequential(conv, nn.PixelShuffle(r))`.

    Args:
        in_channels, out_channels, upscale_factor, bias, factory: as of `Conv3x3PixelShuffle`.
        conv: a re-parameterised convolution [N, C, H, W] -> [N, O r r, H, W] without activation, in its place.

    State dict: `0.weight`, `0.bias`; those of `conv` below `0.`.

    Raises:
        ValueError: `conv` has other channels or an activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 3,
        upscale_factor: int = 4,
        *,
        bias: bool = True,
        conv: Reparameterized | None = None,
        **factory: Any,
    ) -> None:
        positive(in_channels=in_channels, out_channels=out_channels, upscale_factor=upscale_factor)
        channels = in_channels, out_channels * upscale_factor**2
        if conv is None:
            super().__init__(Conv3x3PixelShuffle(in_channels, out_channels, upscale_factor, bias=bias, **factory))
        elif (conv.in_channels, conv.out_channels, conv.activation) != (*channels, "none"):
            raise ValueError(f"conv: expected {channels[0]} to {channels[1]} channels and no activation, got {conv}")
        else:
            super().__init__(conv)
        self.upscale_factor = upscale_factor

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, C, H, W] and an optional residual [N, O, H r, W r] -> [N, O, H r, W r], NCHW-contiguous."""
        conv = self[0]
        if isinstance(conv, Reparameterized):
            return _shuffled(x, *conv.folded(), self.upscale_factor, residual)
        return conv(x, residual)
