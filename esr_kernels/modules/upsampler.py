"""The tail of nearly every network here."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from .arguments import positive


class PixelShuffleUpsampler(nn.Sequential):
    """3x3 convolution and pixel shuffle (Shi et al., ESPCN) as one fused operator.

    Args:
        in_channels: of the feature map.
        out_channels: of the image.
        upscale_factor: how many times larger the image is.
        bias: whether the convolution has one.

    State dict: `0.weight`, `0.bias`, as of the published `nn.Sequential(conv, nn.PixelShuffle(r))`.
    """

    def __init__(self, in_channels: int, out_channels: int = 3, upscale_factor: int = 4, *, bias: bool = True) -> None:
        positive(in_channels=in_channels, out_channels=out_channels, upscale_factor=upscale_factor)
        super().__init__(
            nn.Conv2d(in_channels, out_channels * upscale_factor**2, 3, padding=1, bias=bias),
            nn.PixelShuffle(upscale_factor),
        )
        self.upscale_factor = upscale_factor

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[N, C, H, W] and an optional residual [N, O, H r, W r] -> [N, O, H r, W r], NCHW-contiguous."""
        conv = self[0]
        assert isinstance(conv, nn.Conv2d)
        return functional.conv3x3_pixel_shuffle(
            x, conv.weight, conv.bias, upscale_factor=self.upscale_factor, residual=residual
        )
