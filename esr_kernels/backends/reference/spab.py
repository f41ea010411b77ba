"""SPAN's block: three 3x3 convolutions, SiLU between them, parameter-free attention at the end."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ._common import aten, attention, attention_backward, conv, conv_backward, finish, masked, upcast


def spab(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    return_mid: bool,
) -> tuple[Tensor, Tensor]:
    """The block's result and `mid`, the activated first convolution (empty unless asked for)."""
    mid = F.silu(conv(x, w1, b1, padding=1))
    h = conv(F.silu(conv(mid, w2, b2, padding=1)), w3, b3, padding=1)
    return finish(attention(h, upcast(x)), x), masked(mid if return_mid else None, x)


def spab_backward(
    grad: Tensor,
    grad_mid: Tensor | None,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients to x, w1, b1, w2, b2, w3, b3; the intermediate maps are recomputed, not stored."""
    h1 = conv(x, w1, b1, padding=1)
    a1 = F.silu(h1)
    h2 = conv(a1, w2, b2, padding=1)
    a2 = F.silu(h2)
    h3 = conv(a2, w3, b3, padding=1)
    mask_x, mask1, mask2, mask3 = output_mask[0], output_mask[1:3], output_mask[3:5], output_mask[5:7]
    g3, gx_attention = attention_backward(upcast(grad), h3, upcast(x))
    ga2, gw3, gb3 = conv_backward(g3, a2, w3, [True, *mask3], padding=1)
    ga1, gw2, gb2 = conv_backward(aten.silu_backward(ga2, h2), a1, w2, [True, *mask2], padding=1)
    if grad_mid is not None:
        ga1 = ga1 + upcast(grad_mid)
    gx, gw1, gb1 = conv_backward(aten.silu_backward(ga1, h1), x, w1, [mask_x, *mask1], padding=1)
    if gx is not None:
        gx = gx + gx_attention
    like: list[Tensor] = [x, w1, w1 if b1 is None else b1, w2, w2 if b2 is None else b2, w3, w3 if b3 is None else b3]
    gradients = [masked(g, t) for g, t in zip((gx, gw1, gb1, gw2, gb2, gw3, gb3), like, strict=True)]
    return tuple(gradients)
