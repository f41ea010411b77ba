"""Depthwise convolution that keeps the size, its activation, and the gate of gated feed-forward networks."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import activate, activation_backward, conv, conv_backward, finish, masked, upcast


def _same(weight: Tensor, dilation: int) -> tuple[int, int]:
    """The padding that keeps height and width."""
    return dilation * (weight.shape[2] // 2), dilation * (weight.shape[3] // 2)


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    activation: str,
    negative_slope: float,
    gated: bool,
) -> Tensor:
    h = conv(x, weight, bias, padding=_same(weight, dilation), groups=weight.shape[0], dilation=dilation)
    if not gated:
        return finish(activate(h, activation, negative_slope), x)
    a, b = h.chunk(2, 1)
    return finish(activate(a, activation, negative_slope) * b, x)


def depthwise_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    activation: str,
    negative_slope: float,
    gated: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, weight and bias; the convolution's result is recomputed, not stored."""
    grad = upcast(grad)
    groups, padding = weight.shape[0], _same(weight, dilation)
    if gated or activation != "none":
        h = conv(x, weight, bias, padding=padding, groups=groups, dilation=dilation)
        if gated:
            a, b = h.chunk(2, 1)
            to_a = activation_backward(grad * b, a, activation, negative_slope)
            grad = torch.cat([to_a, grad * activate(a, activation, negative_slope)], 1)
        else:
            grad = activation_backward(grad, h, activation, negative_slope)
    gx, gw, gb = conv_backward(grad, x, weight, output_mask, padding=padding, groups=groups, dilation=dilation)
    return masked(gx, x), masked(gw, weight), masked(gb, weight if bias is None else bias)
