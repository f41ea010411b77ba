"""SPAN's block in three launches: each convolution with what follows it, the attention in the last."""

from __future__ import annotations

from torch import Tensor

from ...library import bias_gradient, feature_map, gradient
from ._convolution import convolve
from ._weight_gradient import weight_gradient
from .conv3x3 import wanted
from .launch import repeated
from .maps import as_map
from .packing import pack


@repeated
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
    out = feature_map(x, w3.shape[0])
    mid = feature_map(x, w1.shape[0])
    if out.numel():
        second = feature_map(x, w2.shape[0])
        block, m, s = as_map(x), as_map(mid), as_map(second)
        convolve(block, pack(w1, x.dtype), b1, m, activation="silu")
        convolve(m, pack(w2, x.dtype), b2, s, activation="silu")
        convolve(s, pack(w3, x.dtype), b3, as_map(out), residual=block, residual_mode="attention")
    return out, mid if return_mid else x.new_empty(0)


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
    gx = gradient(x, output_mask[0])
    gw1, gw2, gw3 = (gradient(w, output_mask[i]) for w, i in ((w1, 1), (w2, 3), (w3, 5)))
    gb1, gb2, gb3 = (bias_gradient(b, w, output_mask[i]) for b, w, i in ((b1, w1, 2), (b2, w2, 4), (b3, w3, 6)))
    gradients = (gx, gw1, gb1, gw2, gb2, gw3, gb3)
    if x.shape[0] == 0:
        for g in gradients:
            g.zero_()
        return gradients

    dtype = x.dtype
    a1, h1, g1 = (feature_map(x, w1.shape[0]) for _ in range(3))
    a2, h2, g2 = (feature_map(x, w2.shape[0]) for _ in range(3))
    g3, to_x = (feature_map(x, w3.shape[0]) for _ in range(2))
    block, m1, m2, d1, d2, d3 = (as_map(t) for t in (x, a1, a2, g1, g2, g3))
    convolve(block, pack(w1, dtype), b1, m1, activation="silu", second=h1)
    convolve(m1, pack(w2, dtype), b2, m2, activation="silu", second=h2)
    # The last convolution's result is needed for the attention's derivative only, and never stored.
    convolve(
        m2, pack(w3, dtype), b3, d3, mode="gradient", residual=block, residual_mode="attention", g=as_map(grad),
        second=to_x,
    )  # fmt: skip
    convolve(d3, pack(w3, dtype, transpose=True), None, d2, mode="chain", activation="silu", g=as_map(h2))
    convolve(
        d2, pack(w2, dtype, transpose=True), None, d1, mode="chain", activation="silu", g=as_map(h1),
        residual=None if grad_mid is None else as_map(grad_mid), residual_mode="pre",
    )  # fmt: skip
    if output_mask[0]:
        convolve(d1, pack(w1, dtype, transpose=True), None, as_map(gx), residual=as_map(to_x), residual_mode="post")
    weight_gradient(m2, d3, wanted(gw3), wanted(gb3))
    weight_gradient(m1, d2, wanted(gw2), wanted(gb2))
    weight_gradient(block, d1, wanted(gw1), wanted(gb1))
    return gradients
