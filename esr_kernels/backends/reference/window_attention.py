"""Attention between the pixels of a window."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import finish, masked, upcast, upcast_optional

_LEAST_NORM = 1e-12  # as F.normalize has it


def _windows(x: Tensor, window: list[int], heads: int, shift: list[int]) -> Tensor:
    """[N, C, H, W], rolled -> [N, windows, heads, tokens, C / heads]."""
    n, c, h, w = x.shape
    height, width = window
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), (2, 3))
    x = x.reshape(n, heads, c // heads, h // height, height, w // width, width).permute(0, 3, 5, 1, 4, 6, 2)
    return x.reshape(n, (h // height) * (w // width), heads, height * width, c // heads)


def _merged(windows: Tensor, like: Tensor, window: list[int], shift: list[int]) -> Tensor:
    """What `_windows` made of a map with the shape of `like`."""
    n, c, h, w = like.shape
    height, width = window
    heads = windows.shape[2]
    x = windows.reshape(n, h // height, w // width, heads, height, width, c // heads).permute(0, 3, 6, 1, 4, 2, 5)
    x = x.reshape(n, c, h, w)
    return x.roll((shift[0], shift[1]), (2, 3)) if any(shift) else x


def _roll_mask(q: Tensor, window: list[int], shift: list[int], value: float) -> Tensor:
    """`value` between pixels of a window that the roll brought together, else 0: [windows, 1, tokens, tokens]."""

    def wrapped(size: int, by: int) -> Tensor:
        return torch.arange(size, device=q.device) >= size - by

    rows, columns = wrapped(q.shape[2], shift[0]), wrapped(q.shape[3], shift[1])
    regions = 2.0 * rows[:, None] + 1.0 * columns
    tokens = _windows(regions[None, None], window, 1, [0, 0])[0, ..., 0]
    apart = tokens[..., :, None] != tokens[..., None, :]
    return torch.where(apart, value, 0.0)


def _added(q: Tensor, bias: Tensor | None, window: list[int], shift: list[int], shift_mask: float) -> Tensor | None:
    """What is added to the scores, for each window where there is a mask: [..., heads, tokens, tokens]."""
    if shift_mask == 0 or not any(shift):
        return bias
    mask = _roll_mask(q, window, shift, shift_mask)
    return mask if bias is None else bias + mask.to(bias.dtype)


def _per_head(scales: Tensor) -> Tensor:
    return scales.view(-1, 1, 1)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    residual: Tensor | None,
    window: list[int],
    heads: int,
    scale: float,
    cosine: bool,
    shift: list[int],
    shift_mask: float,
) -> Tensor:
    # PyTorch's own kernels for CUDA take half types and sum in float32.
    fused = q.is_cuda and not torch.jit.is_tracing()
    precise = (lambda t: t) if fused else upcast
    tokens_q, tokens_k, tokens_v = (_windows(precise(t), window, heads, shift) for t in (q, k, v))
    if cosine:
        tokens_q, tokens_k = (F.normalize(t, dim=-1, eps=_LEAST_NORM) for t in (tokens_q, tokens_k))
    tokens_q = tokens_q * (scale if scales is None else _per_head(precise(scales)))
    added = _added(q, None if bias is None else precise(bias), window, shift, shift_mask)
    if fused:
        every = tokens_q.shape[:3]
        if added is not None:
            added = added.to(q.dtype).expand(*every, *added.shape[-2:]).flatten(0, 1)
        y = F.scaled_dot_product_attention(
            tokens_q.flatten(0, 1), tokens_k.flatten(0, 1), tokens_v.flatten(0, 1), added, scale=1.0
        ).view_as(tokens_q)
    else:
        scores = tokens_q @ tokens_k.transpose(-2, -1)
        y = (scores if added is None else scores + added).softmax(-1) @ tokens_v
    y = _merged(y, q, window, shift)
    return finish(y if residual is None else y + precise(residual), q)


def _normalize_backward(grad: Tensor, x: Tensor) -> Tensor:
    norm = x.norm(dim=-1, keepdim=True)
    least = norm.clamp_min(_LEAST_NORM)
    unit = x / least
    along = torch.where(norm > _LEAST_NORM, (grad * unit).sum(-1, keepdim=True), 0.0)
    return (grad - unit * along) / least


def window_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scales: Tensor | None,
    window: list[int],
    heads: int,
    scale: float,
    cosine: bool,
    shift: list[int],
    shift_mask: float,
    output_mask: list[bool],
) -> list[Tensor]:
    """Gradients to q, k, v, bias and scales, empty where there is no tensor; the weights are recomputed, not stored."""
    to_q, to_k, to_v, to_bias, to_scales = output_mask
    g, raw_q, raw_k, tokens_v = (_windows(upcast(t), window, heads, shift) for t in (grad, q, k, v))
    tokens_q, tokens_k = raw_q, raw_k
    if cosine:
        tokens_q, tokens_k = (F.normalize(t, dim=-1, eps=_LEAST_NORM) for t in (raw_q, raw_k))
    factor = scale if scales is None else _per_head(upcast(scales))
    scores = (tokens_q * factor) @ tokens_k.transpose(-2, -1)
    added = _added(q, upcast_optional(bias), window, shift, shift_mask)
    weights = (scores if added is None else scores + added).softmax(-1)
    gq = gk = gv = gb = gs = None
    if to_v:
        gv = weights.transpose(-2, -1) @ g
    if to_q or to_k or to_bias or to_scales:
        to_weights = g @ tokens_v.transpose(-2, -1)
        to_scores = weights * (to_weights - (to_weights * weights).sum(-1, keepdim=True))
        if to_bias and bias is not None:
            gb = to_scores.sum((0, 1))
        if to_q or to_scales:
            gq = to_scores @ tokens_k
            if to_scales and scales is not None:
                gs = (gq * tokens_q).sum((0, 1, 3, 4))
            gq = gq * factor if to_q else None
        if to_k:
            gk = to_scores.transpose(-2, -1) @ (tokens_q * factor)
    if cosine:
        gq = None if gq is None else _normalize_backward(gq, raw_q)
        gk = None if gk is None else _normalize_backward(gk, raw_k)
    maps = [None if t is None else _merged(t, q, window, shift) for t in (gq, gk, gv)]
    return [
        *(masked(t, like) for t, like in zip(maps, (q, k, v), strict=True)),
        masked(gb, q if bias is None else bias),
        masked(gs, q if scales is None else scales),
    ]
