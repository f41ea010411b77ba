"""3x3 convolution, activation and residual in one launch (and one that packs the weight)."""

from __future__ import annotations

from torch import Tensor

from ...library import bias_gradient, feature_map, gradient
from ._convolution import convolve
from ._weight_gradient import weight_gradient
from .launch import repeated
from .maps import Map, as_map
from .packing import pack


@repeated
def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    residual_mode: str,
) -> Tensor:
    out = feature_map(x, weight.shape[0])
    if out.numel() == 0:
        return out
    convolve(
        as_map(x),
        pack(weight, x.dtype),
        bias,
        as_map(out),
        activation=activation,
        slope=negative_slope,
        residual=None if residual is None else as_map(residual),
        residual_mode=residual_mode,
    )
    return out


def conv3x3_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    residual_mode: str,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, weight, bias and residual; `h` is recomputed, not stored."""
    gx, gw = gradient(x, output_mask[0]), gradient(weight, output_mask[1])
    gb = bias_gradient(bias, weight, output_mask[2])
    gr = feature_map(x, weight.shape[0]) if output_mask[3] else x.new_empty(0)
    if x.shape[0] == 0:
        return gx, gw.zero_(), gb.zero_(), gr
    g = as_map(grad)
    attention = residual is not None and residual_mode == "attention"
    if activation != "none" or attention:
        # The gradient to h, and for attention that to the residual, in the launch that recomputes h.
        to_h = as_map(feature_map(x, weight.shape[0]))
        convolve(
            as_map(x),
            pack(weight, x.dtype),
            bias,
            to_h,
            mode="gradient",
            activation=activation,
            slope=negative_slope,
            residual=None if residual is None else as_map(residual),
            residual_mode=residual_mode,
            g=g,
            second=gr if attention and output_mask[3] else None,
        )
    else:
        to_h = g
    if output_mask[3] and not attention:
        gr.copy_(to_h.tensor if residual_mode == "pre" else grad)
    convolution_gradients(to_h, as_map(x), weight, wanted(gx), wanted(gw), wanted(gb))
    return gx, gw, gb, gr


def wanted(gradient: Tensor) -> Tensor | None:
    """An unwanted gradient is an empty tensor."""
    return gradient if gradient.numel() else None


def convolution_gradients(
    g: Map, x: Map, weight: Tensor, gx: Tensor | None, gw: Tensor | None, gb: Tensor | None
) -> None:
    """Write the wanted gradients of a 3x3 convolution of `x` whose result has the gradient `g`."""
    if gx is not None:
        convolve(g, pack(weight, x.tensor.dtype, transpose=True), None, as_map(gx))
    weight_gradient(x, g, gw, gb)
