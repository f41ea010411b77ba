"""Enhanced spatial attention: a gate computed at low resolution, in the three forms of the challenge's models."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import aten, conv, conv_backward, finish, masked, upcast

POOL, POOL_STRIDE = 7, 3


def _low_resolution(
    c1: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    w_max: Tensor | None,
    b_max: Tensor | None,
    w3_: Tensor | None,
    b3_: Tensor | None,
) -> tuple[Tensor, ...]:
    """Every map of the low-resolution branch in order; RFDN's form has five, the others three."""
    c2 = conv(c1, w2, b2, padding=0, stride=2)
    pooled = F.max_pool2d(c2, POOL, POOL_STRIDE)
    if w_max is None or w3_ is None:
        return c2, pooled, conv(pooled, w3, b3, padding=1)
    m = conv(pooled, w_max, b_max, padding=1)
    c3 = conv(F.relu(m), w3, b3, padding=1)
    return c2, pooled, m, c3, conv(F.relu(c3), w3_, b3_, padding=1)


def _resize(t: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(t, size=like.shape[2:], mode="bilinear", align_corners=False)


def esa(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    w4: Tensor,
    b4: Tensor | None,
    wf: Tensor | None,
    bf: Tensor | None,
    w_max: Tensor | None,
    b_max: Tensor | None,
    w3_: Tensor | None,
    b3_: Tensor | None,
) -> Tensor:
    if x.shape[0] == 0:
        return finish(x.clone(), x)
    c1 = conv(x, w1, b1, padding=0)
    low = _low_resolution(c1, w2, b2, w3, b3, w_max, b_max, w3_, b3_)[-1]
    s = _resize(low, x) + (c1 if wf is None else conv(c1, wf, bf, padding=0))
    return finish(upcast(x) * torch.sigmoid(conv(s, w4, b4, padding=0)), x)


def esa_backward(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    w4: Tensor,
    b4: Tensor | None,
    wf: Tensor | None,
    bf: Tensor | None,
    w_max: Tensor | None,
    b_max: Tensor | None,
    w3_: Tensor | None,
    b3_: Tensor | None,
    output_mask: list[bool],
) -> list[Tensor]:
    """Gradients to x and to the fourteen weights and biases in order, empty where there is no tensor."""
    parameters = (w1, b1, w2, b2, w3, b3, w4, b4, wf, bf, w_max, b_max, w3_, b3_)
    tensors = (x, *parameters)
    if x.shape[0] == 0:
        return [
            x.new_empty(0) if t is None or not wanted else torch.zeros_like(t)
            for t, wanted in zip(tensors, output_mask, strict=True)
        ]
    # Gradients to a convolution's input, and those wanted to its weight and bias, which follow each other.
    m2, m3, m4, mf, mm, m3_ = ([True, *output_mask[i : i + 2]] for i in range(3, 15, 2))
    c1 = conv(x, w1, b1, padding=0)
    maps = _low_resolution(c1, w2, b2, w3, b3, w_max, b_max, w3_, b3_)
    c2, pooled, low = maps[0], maps[1], maps[-1]
    s = _resize(low, x) + (c1 if wf is None else conv(c1, wf, bf, padding=0))
    gate = torch.sigmoid(conv(s, w4, b4, padding=0))

    grad = upcast(grad)
    gs, gw4, gb4 = conv_backward(grad * upcast(x) * gate * (1 - gate), s, w4, m4, padding=0)
    gwf = gbf = gwm = gbm = gw3_ = gb3_ = None
    gc1 = gs
    if wf is not None:
        gc1, gwf, gbf = conv_backward(gs, c1, wf, mf, padding=0)
    g = aten.upsample_bilinear2d_backward(gs, list(s.shape[2:]), list(low.shape), False, None, None)
    if w_max is not None and w3_ is not None:
        m, c3 = maps[2], maps[3]
        g, gw3_, gb3_ = conv_backward(g, F.relu(c3), w3_, m3_, padding=1)
        g, gw3, gb3 = conv_backward(aten.threshold_backward(g, c3, 0), F.relu(m), w3, m3, padding=1)
        g, gwm, gbm = conv_backward(aten.threshold_backward(g, m, 0), pooled, w_max, mm, padding=1)
    else:
        g, gw3, gb3 = conv_backward(g, pooled, w3, m3, padding=1)
    _, indices = aten.max_pool2d_with_indices(c2, [POOL, POOL], [POOL_STRIDE, POOL_STRIDE])
    g = aten.max_pool2d_with_indices_backward(
        g, c2, [POOL, POOL], [POOL_STRIDE, POOL_STRIDE], [0, 0], [1, 1], False, indices
    )
    g, gw2, gb2 = conv_backward(g, c1, w2, m2, padding=0, stride=2)
    gx, gw1, gb1 = conv_backward(gc1 + g, x, w1, output_mask[:3], padding=0)
    gx = None if gx is None else gx + grad * gate
    gradients = (gw1, gb1, gw2, gb2, gw3, gb3, gw4, gb4, gwf, gbf, gwm, gbm, gw3_, gb3_)
    return [
        masked(gx, x),
        *(x.new_empty(0) if p is None else masked(g, p) for g, p in zip(gradients, parameters, strict=True)),
    ]
