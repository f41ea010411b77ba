"""Normalisation over the channels of every pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional
from .arguments import positive


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of every pixel of [N, C, H, W]: `functional.layer_norm2d`.

    Args:
        channels: at least 1.
        eps: added to the (biased) variance.

    State dict: `weight` [C], `bias` [C].
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        positive(channels=channels)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = float(eps)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        return functional.layer_norm2d(x, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps:g}"


class PixelNorm(nn.LayerNorm):
    """`nn.LayerNorm` of the channels of [N, C, H, W], for networks that bring them to the end and back to normalise
    them: `functional.layer_norm2d`, which does without.

    Args:
        channels: at least 1.
        eps: added to the (biased) variance.

    State dict: `weight` [C], `bias` [C].
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        positive(channels=channels)
        super().__init__(channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        if functional.decomposes():
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()
        return functional.layer_norm2d(x, self.weight, self.bias, eps=self.eps)
