"""1x1 convolution of the channel concatenation of several tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import activate, activation_backward, conv, conv_backward, finish, masked, upcast


def conv1x1(xs: list[Tensor], weight: Tensor, bias: Tensor | None, activation: str, negative_slope: float) -> Tensor:
    x = xs[0] if len(xs) == 1 else torch.cat(xs, 1)
    return finish(activate(conv(x, weight, bias, padding=0), activation, negative_slope), xs[0])


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
    x = xs[0] if len(xs) == 1 else torch.cat(xs, 1)
    grad = upcast(grad)
    if activation != "none":
        grad = activation_backward(grad, conv(x, weight, bias, padding=0), activation, negative_slope)
    mask_xs = output_mask[: len(xs)]
    gx, gw, gb = conv_backward(grad, x, weight, [any(mask_xs), *output_mask[len(xs) :]], padding=0)
    parts: list[Tensor | None] = [None] * len(xs)
    if gx is not None:
        pieces = gx.split([t.shape[1] for t in xs], 1)
        # Fresh tensors: results may not share memory with one another.
        parts = [piece.clone() if wanted else None for piece, wanted in zip(pieces, mask_xs, strict=True)]
    gradients = [masked(part, t) for part, t in zip(parts, xs, strict=True)]
    return [*gradients, masked(gw, weight), masked(gb, weight if bias is None else bias)]
