"""Blueprint separable convolution as one convolution.

Nothing stands between the pointwise and the depthwise convolution, so the two are one 3x3 convolution whose weight is
the product depthwise[o, tap] * pointwise[o, c], for zero and for reflection padding. On tensor cores its nine times as
many products cost less than a second pass over memory.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...library import bsconv_gradients, feature_map
from ._convolution import convolve
from ._epilogue import channel_offsets, image_start, pixel_offsets
from ._weight_gradient import weight_gradient
from .conv3x3 import wanted
from .launch import Kernel, ceil_div, repeated
from .maps import Map, as_map, padded, wide
from .packing import Packed, pack
from .recording import dense, empty


@triton.jit
def fold_kernel(pointwise, depthwise, out, size, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """out[o, c, tap] = pointwise[o, c] * depthwise[o, tap], both contiguous, rounded once."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tap = e % 9
    c = e // 9 % CHANNELS
    o = e // (9 * CHANNELS)
    ok = e < size
    p = tl.load(pointwise + o * CHANNELS + c, mask=ok, other=0.0).to(tl.float32)
    d = tl.load(depthwise + o * 9 + tap, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + e, (p * d).to(out.dtype.element_ty), mask=ok)


@triton.jit
def unfold_kernel(
    dense,
    pointwise,
    depthwise,
    gp,
    gd,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients to pointwise [o, c] and depthwise [o, tap] from the one [o, c, tap] to their product."""
    o = tl.program_id(0)
    c = tl.arange(0, BLOCK)[:, None]
    tap = tl.arange(0, 16)[None, :]
    g = tl.load(dense + (o * CHANNELS + c) * 9 + tap, mask=(c < CHANNELS) & (tap < 9), other=0.0)
    p = tl.load(pointwise + o * CHANNELS + c, mask=c < CHANNELS, other=0.0).to(tl.float32)
    d = tl.load(depthwise + o * 9 + tap, mask=tap < 9, other=0.0).to(tl.float32)
    c = tl.arange(0, BLOCK)
    tl.store(gp + o * CHANNELS + c, tl.sum(g * d, 1).to(gp.dtype.element_ty), mask=c < CHANNELS)
    tap = tl.arange(0, 16)
    tl.store(gd + o * 9 + tap, tl.sum(g * p, 0).to(gd.dtype.element_ty), mask=tap < 9)


@triton.jit
def unpad_kernel(
    g,
    out,
    height,
    width,
    size,
    tiles,
    g_batch,
    out_batch,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    G_PITCH: tl.constexpr,
    OUT_PITCH: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The adjoint of padding an image by one reflected pixel: border gradients go to where their pixels came from."""
    n = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if WIDE:
        tile = tile.to(tl.int64)
    e = tile * BLOCK + tl.arange(0, BLOCK)
    channel = e % CHANNELS
    x = e // CHANNELS % width
    y = e // CHANNELS // width
    ok = e < size
    g += image_start(n, g_batch, G_PITCH)
    out += image_start(n, out_batch, OUT_PITCH)
    channels = channel_offsets(channel, (height + 2) * (width + 2), width + 2, G_PITCH, 1, WIDE)
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range(0, 3):
        # Row y of the image is row y + 1 of the padded one; row 1 is also its row 0, the last but one its last.
        row = y + 1
        row_ok = ok
        if i == 1:
            row = 0 * y
            row_ok = ok & (y == 1)
        elif i == 2:
            row = 0 * y + height + 1
            row_ok = ok & (y == height - 2)
        for j in tl.static_range(0, 3):
            column = x + 1
            here = row_ok
            if j == 1:
                column = 0 * x
                here = row_ok & (x == 1)
            elif j == 2:
                column = 0 * x + width + 1
                here = row_ok & (x == width - 2)
            offsets = pixel_offsets(row, column, width + 2, G_PITCH, 1, WIDE) + channels
            total += tl.load(g + offsets, mask=here, other=0.0).to(tl.float32)
    offsets = pixel_offsets(y, x, width, OUT_PITCH, 1, WIDE)
    offsets = offsets + channel_offsets(channel, height * width, width, OUT_PITCH, 1, WIDE)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=ok)


_BLOCK = 1024
# What a thread needs: left to itself, the assembler of Triton 3.9 spills to keep more programs resident.
_UNPAD_REGISTERS = 128


@lru_cache(maxsize=256)
def _fold_kernel(channels: int, dtypes: Any) -> Kernel:
    return Kernel(fold_kernel, {"CHANNELS": channels, "BLOCK": _BLOCK}, 4)


@lru_cache(maxsize=256)
def _unfold_kernel(channels: int, dtypes: Any) -> Kernel:
    return Kernel(unfold_kernel, {"CHANNELS": channels, "BLOCK": max(16, triton.next_power_of_2(channels))}, 4)


@lru_cache(maxsize=256)
def _unpad_kernel(channels: int, g_pitch: int, out_pitch: int, is_wide: bool, dtypes: Any) -> Kernel:
    constants = {"CHANNELS": channels, "BLOCK": _BLOCK, "G_PITCH": g_pitch, "OUT_PITCH": out_pitch, "WIDE": is_wide}
    return Kernel(unpad_kernel, constants, 4, _UNPAD_REGISTERS)


def fold(pointwise: Tensor, depthwise: Tensor) -> Tensor:
    """The weight [O, C, 3, 3] of the one convolution."""
    out_channels, channels = pointwise.shape[:2]
    product = empty(pointwise, (out_channels, channels, 3, 3))
    kernel = _fold_kernel(channels, pointwise.dtype)
    size = product.numel()
    kernel((ceil_div(size, _BLOCK), 1), dense(pointwise), dense(depthwise), product, size)
    return product


def separable(
    x: Map,
    packed: Packed,
    bias: Tensor | None,
    out: Map,
    padding_mode: str,
    activation: str,
    slope: float,
    residual: Map | None = None,
    residual_mode: str = "post",
) -> None:
    """The operator on maps, with the packed weight of `fold`."""
    border = "reflect" if padding_mode == "reflect" else "zeros"
    epilogue: dict[str, Any] = {"activation": activation, "slope": slope, "residual_mode": residual_mode}
    convolve(x, packed, bias, out, border=border, residual=residual, **epilogue)


@repeated
def bsconv(
    x: Tensor,
    pointwise: Tensor,
    depthwise: Tensor,
    bias: Tensor | None,
    padding_mode: str,
    activation: str,
    negative_slope: float,
    residual: Tensor | None = None,
    residual_mode: str = "post",
) -> Tensor:
    out = feature_map(x, depthwise.shape[0])
    if out.numel():
        packed = pack(fold(pointwise, depthwise), x.dtype)
        r = None if residual is None else as_map(residual)
        separable(as_map(x), packed, bias, as_map(out), padding_mode, activation, negative_slope, r, residual_mode)
    return out


def bsconv_backward(
    grad: Tensor,
    x: Tensor,
    pointwise: Tensor,
    depthwise: Tensor,
    bias: Tensor | None,
    padding_mode: str,
    activation: str,
    negative_slope: float,
    output_mask: list[bool],
    residual: Tensor | None = None,
) -> list[Tensor]:
    """Gradients to x, pointwise, depthwise and bias, through the dense weight, and to a residual before the activation;
    `output_mask` likewise."""
    gradients = bsconv_gradients(x, pointwise, depthwise, bias, output_mask, residual)
    if x.shape[0] == 0:
        return [gradient.zero_() for gradient in gradients]
    gx, gp, gd, gb, *gr = gradients
    to_residual = wanted(gr[0]) if gr else None
    border = "reflect" if padding_mode == "reflect" else "zeros"
    block, g = as_map(x), as_map(grad)
    product = fold(pointwise, depthwise)
    if activation != "none":
        # The gradient to the sum before the activation is the residual's as well.
        to_h = as_map(feature_map(x, depthwise.shape[0]) if to_residual is None else to_residual)
        convolve(
            block, pack(product, x.dtype), bias, to_h, border=border, mode="gradient", activation=activation,
            slope=negative_slope, residual=None if residual is None else as_map(residual), residual_mode="pre", g=g,
        )  # fmt: skip
        g = to_h
    elif to_residual is not None:
        to_residual.copy_(grad)
    if output_mask[0]:
        packed = pack(product, x.dtype, transpose=True)
        if border == "zeros":
            convolve(g, packed, None, as_map(gx))
        else:
            _reflected_gradient(g, packed, as_map(gx))
    gw = None
    if output_mask[1] or output_mask[2]:
        gw = torch.empty_like(product, dtype=torch.float32, memory_format=torch.contiguous_format)
    weight_gradient(block, g, gw, wanted(gb), border=border)
    if gw is not None:
        out_channels, channels = pointwise.shape[:2]
        # Contiguous results of the kernel, then in the parameters' own layout.
        to_p, to_d = pointwise.new_empty((out_channels, channels)), depthwise.new_empty((out_channels, 9))
        kernel = _unfold_kernel(channels, pointwise.dtype)
        kernel((out_channels, 1), gw, dense(pointwise), dense(depthwise), to_p, to_d)
        if output_mask[1]:
            gp.copy_(to_p.view(gp.shape))
        if output_mask[2]:
            gd.copy_(to_d.view(gd.shape))
    return gradients


def _reflected_gradient(g: Map, packed: Packed, gx: Map) -> None:
    """The gradient to an image that was padded by one reflected pixel: first to the padded image, then folded back."""
    n, channels, height, width = gx.tensor.shape
    pitch = padded(channels)
    buffer = gx.tensor.new_empty((n, height + 2, width + 2, pitch))
    full = Map(buffer, pitch, (height + 2) * (width + 2), channels, height + 2, width + 2)
    convolve(g, packed, None, full, pad=2)
    kernel = _unpad_kernel(channels, pitch, gx.pitch, wide(full, gx), gx.tensor.dtype)
    size = channels * height * width
    tiles = ceil_div(size, _BLOCK)
    kernel((n * tiles, 1), buffer, gx.tensor, height, width, size, tiles, full.batch, gx.batch)
