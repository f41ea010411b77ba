"""Contrast-aware channel attention."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .arguments import positive


class CCA(nn.Module):
    """Contrast-aware channel attention (Hui et al., IMDN; report sections 4.4, 4.5, 4.27).

    A gate for every channel from its contrast, the standard deviation over the image, plus its mean. Plain PyTorch: the
    convolutions see one pixel.

    Args:
        channels: of input and output.
        reduced: width between the two 1x1 convolutions.

    State dict: `conv_du.0`, `conv_du.2`.
    """

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        positive(channels=channels, reduced=reduced)
        self.conv_du = nn.Sequential(
            nn.Conv2d(channels, reduced, 1), nn.ReLU(inplace=True), nn.Conv2d(reduced, channels, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape."""
        mean = F.adaptive_avg_pool2d(x, 1)
        contrast = (x - mean).square().mean((2, 3), keepdim=True).sqrt()
        return x * self.conv_du(contrast + mean)
