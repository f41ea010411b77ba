"""1x1 convolution of the channel concatenation of several tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...library import conv1x1_gradients, feature_map
from ._conv1x1 import multiply
from ._weight_gradient import weight_gradient
from .conv3x3 import wanted
from .launch import repeated
from .maps import Map, as_map
from .packing import pack_parts


@repeated
def conv1x1(
    xs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    negative_slope: float,
    residual: Tensor | None = None,
    residual_mode: str = "post",
) -> Tensor:
    out = feature_map(xs[0], weight.shape[0])
    if out.numel() == 0:
        return out
    packed = pack_parts(weight, tuple(x.shape[1] for x in xs), out.dtype)
    multiply(
        [as_map(x) for x in xs],
        packed,
        bias,
        as_map(out),
        activation=activation,
        slope=negative_slope,
        residual=None if residual is None else as_map(residual),
        residual_mode=residual_mode,
    )
    return out


def conv1x1_backward(
    grad: Tensor,
    xs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    negative_slope: float,
    output_mask: list[bool],
    residual: Tensor | None = None,
) -> list[Tensor]:
    """Gradients to each of xs, to weight and bias, and to a residual before the activation; `output_mask` likewise."""
    gradients = conv1x1_gradients(xs, weight, bias, output_mask, residual)
    if xs[0].shape[0] == 0:
        return [gradient.zero_() for gradient in gradients]
    gxs, (gw, gb, *gr) = gradients[: len(xs)], gradients[len(xs) :]
    to_residual = wanted(gr[0]) if gr else None
    dtype = xs[0].dtype
    channels = tuple(x.shape[1] for x in xs)
    maps, g = [as_map(x) for x in xs], as_map(grad)
    if activation != "none":
        # The gradient to the sum before the activation is the residual's as well.
        to_h = as_map(feature_map(xs[0], weight.shape[0]) if to_residual is None else to_residual)
        multiply(
            maps,
            pack_parts(weight, channels, dtype),
            bias,
            to_h,
            mode="gradient",
            activation=activation,
            slope=negative_slope,
            residual=None if residual is None else as_map(residual),
            residual_mode="pre",
            g=g,
        )
        g = to_h
    elif to_residual is not None:
        to_residual.copy_(grad)
    linear_gradients(g, maps, weight, [wanted(gx) for gx in gxs], wanted(gw), wanted(gb))
    return gradients


def linear_gradients(
    g: Map, xs: Sequence[Map], weight: Tensor, gxs: Sequence[Tensor | None], gw: Tensor | None, gb: Tensor | None
) -> None:
    """Write the wanted gradients of a 1x1 convolution of the list `xs` whose result has the gradient `g`."""
    first = 0
    for i, (x, gx) in enumerate(zip(xs, gxs, strict=True)):
        if gx is not None:
            part = weight.narrow(1, first, x.channels)
            multiply([g], pack_parts(part, (x.channels,), g.tensor.dtype, transpose=True), None, as_map(gx))
        part_gw = None if gw is None else gw.narrow(1, first, x.channels)
        weight_gradient(x, g, part_gw, gb if i == 0 else None, taps=1, pad=0)
        first += x.channels
