"""Normalisation over the channels of every pixel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .arguments import positive


class LayerNorm2d(nn.Module):
    """Layer normalisation over the channels of every pixel of [N, C, H, W] (report sections 4.5, 4.19, 4.21, 4.28).

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
        x = x - x.mean(1, keepdim=True)
        x = x / torch.sqrt(x.square().mean(1, keepdim=True) + self.eps)
        return torch.addcmul(self.bias.view(-1, 1, 1), x, self.weight.view(-1, 1, 1))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps:g}"
