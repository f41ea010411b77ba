"""The operators that an engine computes on the tensors where they are, without a plan.

csrc/cpu/direct.h, csrc/cuda/direct.cu.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...library import (
    bias_gradient,
    feature_map,
    gradient,
    has_whole_pixels,
    memory_format,
    norm_gradients,
    pooled_map,
)
from .backward import Call, is_empty
from .engine import ACTIVATION_CODES

# Gives an operator's map (first) a layout that the engine reads, for a call whose x is the second.
LayOut = Callable[[Tensor, Tensor], Tensor]


def as_it_is(t: Tensor, like: Tensor) -> Tensor:
    """`t`: the engine reads any strides."""
    return t


def dense_rows(t: Tensor, like: Tensor) -> Tensor:
    """`t` in the memory format that results of `like` have; rows of pixels with gaps between them will do."""
    wanted = memory_format(like)
    if t.is_contiguous(memory_format=wanted):
        return t
    with_gaps = t.stride(3) == 1 if wanted == torch.contiguous_format else has_whole_pixels(t)
    return t if with_gaps else t.contiguous(memory_format=wanted)


def depthwise_conv(
    call: Call,
    lay_out: LayOut,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    activation: str,
    negative_slope: float,
    gated: bool,
) -> Tensor:
    out = feature_map(x, x.shape[1] // 2 if gated else x.shape[1])
    settings = (dilation, ACTIVATION_CODES[activation], negative_slope, gated)
    if x.shape[0] > 0:
        call("depthwise_conv", x, (lay_out(x, x), weight, bias, *settings), [out])
    return out


def depthwise_conv_backward(
    call: Call,
    lay_out: LayOut,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    activation: str,
    negative_slope: float,
    gated: bool,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients to x, weight and bias; the convolution's result is recomputed, not stored."""
    gradients = [
        gradient(x, output_mask[0]),
        gradient(weight, output_mask[1]),
        bias_gradient(bias, weight, output_mask[2]),
    ]
    if not is_empty(x, gradients):
        settings = (dilation, ACTIVATION_CODES[activation], negative_slope, gated)
        tensors = (lay_out(grad, x), lay_out(x, x), weight, bias)
        call("depthwise_conv_backward", x, (*tensors, *settings), gradients)
    return tuple(gradients)


def layer_norm2d(
    call: Call, lay_out: LayOut, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    out = feature_map(x, x.shape[1])
    if x.shape[0] > 0:
        call("layer_norm2d", x, (lay_out(x, x), weight, bias, eps), [out])
    return out


def layer_norm2d_backward(
    call: Call,
    lay_out: LayOut,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients to x, weight and bias; the statistics are recomputed, not stored."""
    gradients = norm_gradients(x, weight, bias, output_mask)
    if not is_empty(x, list(gradients)):
        call("layer_norm2d_backward", x, (lay_out(grad, x), lay_out(x, x), weight, eps), list(gradients))
    return gradients


def adaptive_max_pool(call: Call, lay_out: LayOut, x: Tensor, output_size: Sequence[int]) -> Tensor:
    out = pooled_map(x, output_size)
    if x.shape[0] > 0:
        call("adaptive_max_pool", x, (lay_out(x, x),), [out])
    return out


def adaptive_max_pool_backward(
    call: Call, lay_out: LayOut, grad: Tensor, x: Tensor, output_mask: list[bool]
) -> list[Tensor]:
    """The gradient to x; where the maxima are is found again, not stored."""
    gradients = [gradient(x, output_mask[0])]
    if not is_empty(x, gradients):
        call("adaptive_max_pool_backward", x, (lay_out(grad, x), lay_out(x, x)), gradients)
    return gradients


def modulate(
    call: Call,
    lay_out: LayOut,
    x: Tensor,
    maps: list[Tensor],
    mode: str,
    activation: str,
    negative_slope: float,
) -> Tensor:
    out = feature_map(x, x.shape[1])
    settings = (mode == "bilinear", ACTIVATION_CODES[activation], negative_slope)
    if x.shape[0] > 0:
        call("modulate", x, (lay_out(x, x), [lay_out(t, x) for t in maps], *settings), [out])
    return out


def modulate_backward(
    call: Call,
    lay_out: LayOut,
    grad: Tensor,
    x: Tensor,
    maps: list[Tensor],
    mode: str,
    activation: str,
    negative_slope: float,
    output_mask: list[bool],
) -> list[Tensor]:
    """Gradients to x and to each map; the sum of the maps is computed again, not stored."""
    gradients = [gradient(t, wanted) for t, wanted in zip((x, *maps), output_mask, strict=True)]
    if is_empty(x, gradients):
        return gradients
    # A map that has another memory format than x gets its gradient by a copy.
    results = [lay_out(g, x) if g.numel() else g for g in gradients]
    settings = (mode == "bilinear", ACTIVATION_CODES[activation], negative_slope)
    tensors = (lay_out(grad, x), lay_out(x, x), [lay_out(t, x) for t in maps])
    call("modulate_backward", x, (*tensors, *settings), results)
    for g, result in zip(gradients, results, strict=True):
        if result is not g:
            g.copy_(result)
    return gradients


_OPERATORS = (
    depthwise_conv,
    depthwise_conv_backward,
    layer_norm2d,
    layer_norm2d_backward,
    adaptive_max_pool,
    adaptive_max_pool_backward,
    modulate,
    modulate_backward,
)


def operators(call: Call, lay_out: LayOut) -> dict[str, Callable[..., Any]]:
    """These operators, computed by `call` on what `lay_out` returns."""
    return {f.__name__: partial(f, call, lay_out) for f in _OPERATORS}
