"""Enhanced spatial attention."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from .arguments import positive


class ESA(nn.Module):
    """Enhanced spatial attention (Liu et al., RFANet) as one fused operator, in the challenge's three forms.

    A gate for every pixel and channel, computed at about a sixth of the resolution: see `functional.esa`.

    Args:
        channels: of input and output.
        esa_channels: of the gate's branch.
        conv_f: a 1x1 convolution on the branch's skip (RLFN, report section 2.2) or none (R2Net, section 4.2).
        conv_max: three convolutions at low resolution with ReLU between them (RFDN, section 4.22) instead of one.
        bias: whether the convolutions have one.

    State dict: `conv1`, `conv2`, `conv3`, `conv4`, and `conv_f`, `conv_max`, `conv3_` in the forms that have them.
    """

    minimum_size = functional.ESA_MINIMUM

    def __init__(
        self, channels: int, esa_channels: int = 16, *, conv_f: bool = True, conv_max: bool = False, bias: bool = True
    ) -> None:
        super().__init__()
        positive(channels=channels, esa_channels=esa_channels)
        f = esa_channels
        self.conv1 = nn.Conv2d(channels, f, 1, bias=bias)
        self.conv_f = nn.Conv2d(f, f, 1, bias=bias) if conv_f else None
        self.conv_max = nn.Conv2d(f, f, 3, padding=1, bias=bias) if conv_max else None
        self.conv2 = nn.Conv2d(f, f, 3, stride=2, bias=bias)
        self.conv3 = nn.Conv2d(f, f, 3, padding=1, bias=bias)
        self.conv3_ = nn.Conv2d(f, f, 3, padding=1, bias=bias) if conv_max else None
        self.conv4 = nn.Conv2d(f, channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape; height and width at least `minimum_size`."""
        wf, bf = _parameters(self.conv_f)
        w_max, b_max = _parameters(self.conv_max)
        w3_, b3_ = _parameters(self.conv3_)
        return functional.esa(
            x,
            self.conv1.weight,
            self.conv1.bias,
            self.conv2.weight,
            self.conv2.bias,
            self.conv3.weight,
            self.conv3.bias,
            self.conv4.weight,
            self.conv4.bias,
            wf,
            bf,
            w_max=w_max,
            b_max=b_max,
            w3_=w3_,
            b3_=b3_,
        )


def _parameters(conv: nn.Conv2d | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if conv is None else (conv.weight, conv.bias)
