"""Layer normalisation over the channels of every pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import finish, masked, upcast


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x with mean 0 and variance 1 over its channels, and the deviation that it had."""
    centred = x - x.mean(1, keepdim=True)
    deviation = torch.sqrt(centred.square().mean(1, keepdim=True) + eps)
    return centred / deviation, deviation


def _per_channel(values: Tensor) -> Tensor:
    return upcast(values).view(-1, 1, 1)


def layer_norm2d(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    y, _ = _normalise(upcast(x), eps)
    if weight is not None and bias is not None:
        y = torch.addcmul(_per_channel(bias), y, _per_channel(weight))
    elif weight is not None:
        y = y * _per_channel(weight)
    elif bias is not None:
        y = y + _per_channel(bias)
    return finish(y, x)


def layer_norm2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, weight and bias, empty where there is no tensor; the statistics are recomputed, not stored."""
    grad = upcast(grad)
    y, deviation = _normalise(upcast(x), eps)
    gx = gw = gb = None
    if output_mask[0]:
        g = grad if weight is None else grad * _per_channel(weight)
        gx = (g - g.mean(1, keepdim=True) - y * (g * y).mean(1, keepdim=True)) / deviation
    if output_mask[1] and weight is not None:
        gw = (grad * y).sum((0, 2, 3))
    if output_mask[2] and bias is not None:
        gb = grad.sum((0, 2, 3))
    return masked(gx, x), masked(gw, x if weight is None else weight), masked(gb, x if bias is None else bias)
