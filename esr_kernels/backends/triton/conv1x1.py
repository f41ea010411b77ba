"""1x1 convolution of the channel concatenation of several tensors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...library import bias_gradient, feature_map, gradient
from ._conv1x1 import multiply
from ._weight_gradient import weight_gradient
from .conv3x3 import wanted
from .launch import repeated
from .maps import Map, as_map
from .packing import pack_parts


@repeated
def conv1x1(xs: list[Tensor], weight: Tensor, bias: Tensor | None, activation: str, negative_slope: float) -> Tensor:
    out = feature_map(xs[0], weight.shape[0])
    if out.numel() == 0:
        return out
    packed = pack_parts(weight, tuple(x.shape[1] for x in xs), out.dtype)
    multiply([as_map(x) for x in xs], packed, bias, as_map(out), activation=activation, slope=negative_slope)
    return out


def conv1x1_backward(
    grad: Tensor,
    xs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    negative_slope: float,
    output_mask: list[bool],
) -> list[Tensor]:
    """Gradients to each of xs, then to weight and bias; `output_mask` has an entry for each."""
    gxs = [gradient(x, wants) for x, wants in zip(xs, output_mask[:-2], strict=True)]
    gw = gradient(weight, output_mask[-2])
    gb = bias_gradient(bias, weight, output_mask[-1])
    if xs[0].shape[0] == 0:
        return [*gxs, gw.zero_(), gb.zero_()]
    dtype = xs[0].dtype
    channels = tuple(x.shape[1] for x in xs)
    maps, g = [as_map(x) for x in xs], as_map(grad)
    if activation != "none":
        to_h = as_map(feature_map(xs[0], weight.shape[0]))
        packed = pack_parts(weight, channels, dtype)
        multiply(maps, packed, bias, to_h, mode="gradient", activation=activation, slope=negative_slope, g=g)
        g = to_h
    linear_gradients(g, maps, weight, [wanted(gx) for gx in gxs], wanted(gw), wanted(gb))
    return [*gxs, gw, gb]


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
