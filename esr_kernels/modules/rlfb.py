"""RLFN's block."""

from __future__ import annotations

from torch import Tensor, nn

from .arguments import positive
from .conv import Conv1x1, Conv3x3
from .esa import ESA


class RLFB(nn.Module):
    """Residual local feature block (Kong et al., RLFN; report section 2.2).

    Three times 3x3 convolution and activation, the input added, a 1x1 convolution, enhanced spatial attention. There is
    no residual around the attention.

    Args:
        channels: of input and output.
        mid_channels: of the two inner maps; None: as many as `channels`.
        out_channels: of the result; None: as many as `channels`.
        esa_channels: of the attention's branch.
        activation, negative_slope: after each 3x3 convolution, as in `functional.conv3x3`.
        bias: whether the block's own convolutions have one.
        esa_bias: whether the attention's have one.
        esa_conv_f: see `ESA`.

    State dict: `c1_r`, `c2_r`, `c3_r`, `c5` and `esa.*`.
    """

    minimum_size = ESA.minimum_size

    def __init__(
        self,
        channels: int,
        mid_channels: int | None = None,
        out_channels: int | None = None,
        esa_channels: int = 16,
        *,
        activation: str = "leaky_relu",
        negative_slope: float = 0.05,
        bias: bool = True,
        esa_bias: bool = True,
        esa_conv_f: bool = True,
    ) -> None:
        super().__init__()
        mid = channels if mid_channels is None else mid_channels
        out = channels if out_channels is None else out_channels
        positive(channels=channels, mid_channels=mid, out_channels=out)
        self.c1_r = Conv3x3(channels, mid, bias=bias, activation=activation, negative_slope=negative_slope)
        self.c2_r = Conv3x3(mid, mid, bias=bias, activation=activation, negative_slope=negative_slope)
        self.c3_r = Conv3x3(mid, channels, bias=bias, activation=activation, negative_slope=negative_slope)
        self.c5 = Conv1x1(channels, out, bias=bias)
        self.esa = ESA(out, esa_channels, conv_f=esa_conv_f, bias=esa_bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, O, H, W]; height and width at least `minimum_size`."""
        y = self.c3_r(self.c2_r(self.c1_r(x)), residual=x)
        return self.esa(self.c5(y))
