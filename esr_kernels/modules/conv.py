"""`nn.Conv2d` with the fused operators: same parameters and state dict, activation and residual in the same pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .. import functional
from ..backends.reference._common import activate, attention
from .arguments import PaddingMode, known_activation, known_residual_mode, positive


class _Conv(nn.Conv2d):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        bias: bool,
        activation: str,
        negative_slope: float,
        factory: dict[str, Any],
    ) -> None:
        positive(in_channels=in_channels, out_channels=out_channels)
        known_activation(activation)
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias, **factory)
        self.activation = activation
        self.negative_slope = float(negative_slope)

    def extra_repr(self) -> str:
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        return super().extra_repr() + activation


class Conv3x3(_Conv):
    """3x3 convolution, stride 1, zero padding 1, with activation and residual: `functional.conv3x3`.

    Args:
        in_channels, out_channels: at least 1.
        bias: whether there is one.
        activation, negative_slope: as in `functional.conv3x3`.
        factory: `device` and `dtype` of the parameters.

    State dict: weight [O, C, 3, 3], bias [O].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bias: bool = True,
        activation: str = "none",
        negative_slope: float = 0.05,
        **factory: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, 3, bias, activation, negative_slope, factory)

    def forward(self, x: Tensor, residual: Tensor | None = None, residual_mode: str = "post") -> Tensor:
        """[N, C, H, W] -> [N, O, H, W]; residual [N, O, H, W] with its mode as in `functional.conv3x3`."""
        return functional.conv3x3(
            x,
            self.weight,
            self.bias,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            residual_mode=residual_mode,
        )


class Conv1x1(_Conv):
    """1x1 convolution of one tensor or of several concatenated, with activation and residual: `functional.conv1x1`.

    Args:
        in_channels: of all inputs together.
        out_channels, bias, activation, negative_slope, factory: as in `Conv3x3`.

    State dict: weight [O, C, 1, 1], bias [O].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bias: bool = True,
        activation: str = "none",
        negative_slope: float = 0.05,
        **factory: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, 1, bias, activation, negative_slope, factory)

    def forward(  # type: ignore[override]
        self, xs: Tensor | Sequence[Tensor], residual: Tensor | None = None, residual_mode: str = "post"
    ) -> Tensor:
        """One [N, C, H, W] or several [N, C_i, H, W] -> [N, O, H, W]; several are never concatenated.

        A residual [N, O, H, W] with its mode as in `functional.conv3x3`; "attention" is a separate pass.
        """
        if residual is not None:
            known_residual_mode(residual_mode, self.activation)
            if residual_mode == "attention":
                return attention(functional.conv1x1(xs, self.weight, self.bias), residual)
        return functional.conv1x1(
            xs,
            self.weight,
            self.bias,
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            residual_mode=residual_mode,
        )


class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of stride 1 that keeps height and width, with activation: `functional.depthwise_conv`.

    Args:
        channels: of the convolution, at least 1; even with a gate.
        kernel_size: odd, of both sides or (height, width).
        dilation, bias: as in `nn.Conv2d`.
        padding_mode: "zeros", or "reflect", which is plain PyTorch, as are kernels of more than 7 pixels.
        activation, negative_slope: as in `functional.conv3x3`.
        gated: multiply the activated first half of the channels with the second: C / 2 come out.

    State dict: weight [C, 1, KH, KW], bias [C].
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int] = 3,
        *,
        dilation: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        activation: str = "none",
        negative_slope: float = 0.05,
        gated: bool = False,
    ) -> None:
        positive(channels=channels, dilation=dilation)
        known_activation(activation)
        if gated and channels % 2:
            raise ValueError(f"channels: a gate needs an even number, got {channels}")
        height, width = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        if height % 2 == 0 or width % 2 == 0:
            raise ValueError(f"kernel_size: must be odd to keep the size, got {kernel_size}")
        super().__init__(
            channels,
            channels,
            (height, width),
            padding=(height // 2 * dilation, width // 2 * dilation),
            dilation=dilation,
            groups=channels,
            bias=bias,
            padding_mode=padding_mode,
        )
        self.activation, self.negative_slope, self.gated = activation, float(negative_slope), gated
        self._fused = padding_mode == "zeros" and max(height, width) <= max(functional.DEPTHWISE_SIDES)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape, or [N, C / 2, H, W] with a gate."""
        if self._fused:
            return functional.depthwise_conv(
                x,
                self.weight,
                self.bias,
                dilation=self.dilation[0],
                activation=self.activation,
                negative_slope=self.negative_slope,
                gated=self.gated,
            )
        h = super().forward(x)
        if not self.gated:
            return activate(h, self.activation, self.negative_slope)
        a, b = h.chunk(2, 1)
        return activate(a, self.activation, self.negative_slope) * b
