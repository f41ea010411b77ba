"""The operators that an engine computes on the tensors where they are, without a plan (csrc/cpu/direct.h)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...library import bias_gradient, feature_map, gradient, memory_format, norm_gradients
from .backward import Call, is_empty
from .engine import ACTIVATION_CODES


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """`t` in the memory format that results of `like` have; rows of pixels with gaps between them will do."""
    wanted = memory_format(like)
    if t.is_contiguous(memory_format=wanted) or (wanted == torch.contiguous_format and t.stride(3) == 1):
        return t
    return t.contiguous(memory_format=wanted)


def depthwise_conv(
    call: Call,
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
        call("depthwise_conv", x, (_laid_out(x, x), weight, bias, *settings), [out])
    return out


def depthwise_conv_backward(
    call: Call,
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
        tensors = (_laid_out(grad, x), _laid_out(x, x), weight, bias)
        call("depthwise_conv_backward", x, (*tensors, *settings), gradients)
    return tuple(gradients)


def layer_norm2d(call: Call, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    out = feature_map(x, x.shape[1])
    if x.shape[0] > 0:
        call("layer_norm2d", x, (_laid_out(x, x), weight, bias, eps), [out])
    return out


def layer_norm2d_backward(
    call: Call,
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
        call("layer_norm2d_backward", x, (_laid_out(grad, x), _laid_out(x, x), weight, eps), list(gradients))
    return gradients


_OPERATORS = (depthwise_conv, depthwise_conv_backward, layer_norm2d, layer_norm2d_backward)


def operators(call: Call) -> dict[str, Callable[..., Any]]:
    """Every such operator, computed by `call`."""
    return {f.__name__: partial(f, call) for f in _OPERATORS}
