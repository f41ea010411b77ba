"""1x1 convolution of the channel concatenation of several tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import activation_backward, conv, conv_backward, epilogue, finish, masked, upcast, upcast_optional


def conv1x1(
    xs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    negative_slope: float,
    residual: Tensor | None = None,
    residual_mode: str = "post",
) -> Tensor:
    x = xs[0] if len(xs) == 1 else torch.cat(xs, 1)
    h = conv(x, weight, bias, padding=0)
    return finish(epilogue(h, upcast_optional(residual), activation, negative_slope, residual_mode), xs[0])


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
    x = xs[0] if len(xs) == 1 else torch.cat(xs, 1)
    grad = upcast(grad)
    if activation != "none":
        h = conv(x, weight, bias, padding=0)
        grad = activation_backward(grad, h if residual is None else h + upcast(residual), activation, negative_slope)
    mask_xs, (to_weight, to_bias, *to_residual) = output_mask[: len(xs)], output_mask[len(xs) :]
    gx, gw, gb = conv_backward(grad, x, weight, [any(mask_xs), to_weight, to_bias], padding=0)
    parts: list[Tensor | None] = [None] * len(xs)
    if gx is not None:
        pieces = gx.split([t.shape[1] for t in xs], 1)
        # Fresh tensors: results may not share memory with one another.
        parts = [piece.clone() if wanted else None for piece, wanted in zip(pieces, mask_xs, strict=True)]
    gradients = [masked(part, t) for part, t in zip(parts, xs, strict=True)]
    gradients += [masked(gw, weight), masked(gb, weight if bias is None else bias)]
    return [*gradients, *(masked(grad.clone() if wanted else None, xs[0]) for wanted in to_residual)]
