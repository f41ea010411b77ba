"""Blueprint separable convolution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..backends.reference._common import epilogue
from ..library import PADDING_MODES
from ..reparam.base import FoldCache
from .arguments import PaddingMode, known_activation, known_residual_mode, positive


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


class BSConvS(nn.Module):
    """1x1 convolution without a bias, then depthwise 3x1 and 1x3, reflected at the border, and an activation.

    As MSN has it (report, Table 1), after MDRN. Both depthwise ones together are one of 3x3 whose weights are a
    product, on the border too: one `functional.bsconv`, with the gradients of the two. In eval mode the product is kept
    until a parameter changes, as in `Reparameterized`.

    Args:
        in_channels, out_channels: at least 1.
        stride: of both depthwise convolutions. 1 is one fused operator; more is a 1x1 operator and plain PyTorch.
        activation, negative_slope: as in `functional.conv3x3`; only with stride 1.

    State dict: `pw.weight` [O, C, 1, 1], `dw1.weight` [O, 1, 3, 1], `dw1.bias` [O], `dw2.weight` [O, 1, 1, 3],
    `dw2.bias` [O].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        activation: str = "none",
        negative_slope: float = 0.05,
    ) -> None:
        super().__init__()
        positive(in_channels=in_channels, out_channels=out_channels, stride=stride)
        known_activation(activation)
        if stride > 1 and activation != "none":
            raise ValueError(f'activation: stride {stride} allows only "none", got {activation!r}')
        c = out_channels
        self.pw = nn.Conv2d(in_channels, c, 1, bias=False)
        self.dw1 = nn.Conv2d(c, c, (3, 1), stride, (1, 0), groups=c, padding_mode="reflect")
        self.dw2 = nn.Conv2d(c, c, (1, 3), stride, (0, 1), groups=c, padding_mode="reflect")
        self.stride, self.activation, self.negative_slope = stride, activation, float(negative_slope)
        self._cache = FoldCache()

    def depthwise(self) -> tuple[Tensor, Tensor]:
        """Weight [O, 1, 3, 3] and bias [O] of the 3x3 convolution; gradients flow to the parameters."""
        parameters = {
            f"{name}.{key}": getattr(conv, key)
            for name, conv in (("dw1", self.dw1), ("dw2", self.dw2))
            for key in ("weight", "bias")
        }
        if self.training:
            return _product(parameters, torch.promote_types(self.dw1.weight.dtype, torch.float32))
        return self._cache.folded(_product, parameters)  # type: ignore[return-value]

    def forward(self, x: Tensor, residual: Tensor | None = None, residual_mode: str = "post") -> Tensor:
        """[N, C, H, W] with H, W >= 2 -> [N, O, H, W], or height and width divided by the stride and rounded up.

        With stride 1 also a residual [N, O, H, W], with its mode as in `functional.bsconv`.
        """
        if self.stride > 1 and residual is not None:
            raise ValueError(f"residual: stride {self.stride} takes none")
        if self.stride > 1 or functional.decomposes():  # as published, which counts of operations are compared with
            if residual is not None:
                known_residual_mode(residual_mode, self.activation)
            h = self.dw2(self.dw1(functional.conv1x1(x, self.pw.weight)))
            return epilogue(h, residual, self.activation, self.negative_slope, residual_mode)
        return functional.bsconv(
            x,
            self.pw.weight,
            *self.depthwise(),
            padding_mode="reflect",
            activation=self.activation,
            negative_slope=self.negative_slope,
            residual=residual,
            residual_mode=residual_mode,
        )

    def train(self, mode: bool = True) -> BSConvS:
        self._cache = FoldCache()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._cache = FoldCache()
        return super()._apply(*args, **kwargs)


def _product(parameters: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias of a 1x3 after a 3x1 depthwise convolution, computed in `dtype`."""
    result = parameters["dw1.weight"].dtype
    column, b1, row, b2 = (
        parameters[f"{name}.{key}"].to(dtype) for name in ("dw1", "dw2") for key in ("weight", "bias")
    )
    return (column * row).to(result), (b1 * row.sum((1, 2, 3)) + b2).to(result)
