"""A learned factor for every channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .arguments import positive


class ElementScale(nn.Module):
    """Multiplies each channel with a learned factor, which starts at zero (Li et al., MogaNet).

    Args:
        channels: at least 1.

    State dict: `scale` [1, C, 1, 1].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        positive(channels=channels)
        self.scale = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        return x * self.scale
