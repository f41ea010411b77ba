"""Blueprint separable convolution."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from ..library import PADDING_MODES
from .arguments import PaddingMode, known_activation, positive


class BSConv(nn.Module):
    """1x1 convolution without a bias, then depthwise 3x3 with one, and an activation: `functional.bsconv`.

    Args:
        in_channels, out_channels: at least 1.
        padding_mode: "zeros" (BSConv-Z; report section 4.10) or "reflect" (BSConv-R; sections 4.5, 4.12).
        stride: of the depthwise convolution. 1 is one fused operator; more is a 1x1 operator and plain PyTorch.
        activation, negative_slope: as in `functional.conv3x3`; only with stride 1.

    State dict: `pw.weight` [O, C, 1, 1], `dw.weight` [O, 1, 3, 3], `dw.bias` [O].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        padding_mode: PaddingMode = "zeros",
        stride: int = 1,
        activation: str = "none",
        negative_slope: float = 0.05,
    ) -> None:
        super().__init__()
        positive(in_channels=in_channels, out_channels=out_channels, stride=stride)
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode: expected one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
        known_activation(activation)
        if stride > 1 and activation != "none":
            raise ValueError(f'activation: stride {stride} allows only "none", got {activation!r}')
        self.pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.dw = nn.Conv2d(out_channels, out_channels, 3, stride, 1, groups=out_channels, padding_mode=padding_mode)
        self.activation, self.negative_slope = activation, float(negative_slope)

    def forward(self, x: Tensor, residual: Tensor | None = None, residual_mode: str = "post") -> Tensor:
        """[N, C, H, W] -> [N, O, H, W], or height and width divided by the stride and rounded up.

        With stride 1 also a residual [N, O, H, W], with its mode as in `functional.bsconv`.
        """
        dw = self.dw
        if dw.stride != (1, 1):
            if residual is not None:
                raise ValueError(f"residual: stride {dw.stride[0]} takes none")
            return dw(functional.conv1x1(x, self.pw.weight))
        return functional.bsconv(
            x,
            self.pw.weight,
            dw.weight,
            dw.bias,
            padding_mode=dw.padding_mode,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            residual_mode=residual_mode,
        )
