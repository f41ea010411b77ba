"""Enhanced spatial attention in three launches (and one that folds the weights).

Between the first 1x1 convolution and the valid 3x3 convolution of stride 2 there is nothing, nor between it and the
skip convolution: each pair is one convolution of the input, and the first one's result is never stored. So

    c2   = conv(x, w2 * w1, stride 2)                 the convolution kernel
    low  = conv3x3(max_pool(c2, 7, 3), w3)            one kernel; RFDN's form: two more convolutions of this small map
    out  = x * sigmoid(w4 (resize(low) + wf w1 x))    one kernel
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...library import esa_gradients, feature_map
from ._conv1x1 import multiply
from ._convolution import convolve
from ._epilogue import channel_offsets, image_start, pixel_offsets, sigmoid
from ._resize import coordinates
from ._weight_gradient import weight_gradient
from .configs import Config, choose
from .conv3x3 import wanted
from .launch import Kernel, ceil_div, next_power_of_two, repeated
from .maps import Map, as_map, padded, precision, wide
from .packing import Packed, pack, pack_parts
from .recording import dense, empty

POOL, POOL_STRIDE = 7, 3


@triton.jit
def fold_kernel(
    w1,
    b1,
    w2,
    b2,
    wf,
    bf,
    w21,  # [hidden, channels, 9]
    b21,  # [hidden] float32
    wf1,  # [hidden, channels]
    bf1,  # [hidden] float32
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_F: tl.constexpr,
    HAS_B1: tl.constexpr,
    HAS_B2: tl.constexpr,
    HAS_WF: tl.constexpr,
    HAS_BF: tl.constexpr,
):
    """w21[o, c, tap] = sum over f of w2[o, f, tap] w1[f, c], and wf1, b21, bf1; one program per o.

    Programs beyond the hidden channels fill the padding of bf1.
    """
    o = tl.program_id(0)
    if o >= HIDDEN:
        tl.store(bf1 + o, 0.0)
        return
    c = tl.arange(0, BLOCK_C)
    f = tl.arange(0, BLOCK_F)
    known = f < HIDDEN
    matrix = tl.load(
        w1 + f[:, None] * CHANNELS + c[None, :], mask=known[:, None] & (c[None, :] < CHANNELS), other=0.0
    ).to(tl.float32)  # [F, C]
    first_bias = tl.zeros([BLOCK_F], tl.float32)
    if HAS_B1:
        first_bias = tl.load(b1 + f, mask=known, other=0.0).to(tl.float32)
    bias = tl.zeros([BLOCK_F], tl.float32)
    for tap in range(0, 9):
        w = tl.load(w2 + (o * HIDDEN + f) * 9 + tap, mask=known, other=0.0).to(tl.float32)
        row = tl.sum(w[:, None] * matrix, 0)
        tl.store(w21 + (o * CHANNELS + c) * 9 + tap, row.to(w21.dtype.element_ty), mask=c < CHANNELS)
        bias += w * first_bias
    total = tl.sum(bias, 0)
    if HAS_B2:
        total += tl.load(b2 + o).to(tl.float32)
    tl.store(b21 + o, total)
    if HAS_WF:
        w = tl.load(wf + o * HIDDEN + f, mask=known, other=0.0).to(tl.float32)
    else:
        w = tl.where(f == o, 1.0, 0.0)  # the skip is the first convolution itself
    tl.store(wf1 + o * CHANNELS + c, tl.sum(w[:, None] * matrix, 0).to(wf1.dtype.element_ty), mask=c < CHANNELS)
    total = tl.sum(w * first_bias, 0)
    if HAS_BF:
        total += tl.load(bf + o).to(tl.float32)
    tl.store(bf1 + o, total)


@triton.jit
def _add_column(left, middle, right, start, ox, j, row_ok, in_width, ROWS: tl.constexpr):
    """Reduce seven rows of the j-th of the 13 columns that three neighbouring windows read, for those that read it."""
    lowest = float("-inf")
    column = (ox - 1) * 3 + j
    # A window that sticks out belongs to a neighbour that does not exist.
    ok = row_ok & (column >= 0) & (column < in_width)
    pointers = start + column * ROWS
    most = tl.load(pointers, mask=ok, other=lowest).to(tl.float32)
    for i in tl.static_range(1, 7):
        value = tl.load(pointers + i * in_width * ROWS, mask=ok, other=lowest).to(tl.float32)
        most = tl.maximum(most, value, propagate_nan=tl.PropagateNan.ALL)
    if j < 7:
        left = tl.maximum(left, most, propagate_nan=tl.PropagateNan.ALL)
    if (j >= 3) & (j < 10):
        middle = tl.maximum(middle, most, propagate_nan=tl.PropagateNan.ALL)
    if j >= 6:
        right = tl.maximum(right, most, propagate_nan=tl.PropagateNan.ALL)
    return left, middle, right


@triton.jit
def reduce_kernel(
    x,  # [n, pool_height, pool_width, PITCH]
    w,  # packed [9 * ROWS, ROWS]
    bias,
    out,
    in_height,
    in_width,
    height,
    width,
    tiles_x,
    tiles_y,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    LOOP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """conv3x3(max_pool(x, 7, 3)) of channels-last maps; the pooled map exists in registers only.

    The three pooling windows of a row of taps overlap: each column of seven values is reduced once for all of them.
    """
    program = tl.program_id(0)
    n = (program // (tiles_x * tiles_y)).to(tl.int64)
    p = tl.arange(0, TILE_H * TILE_W)[:, None]
    oy = program // tiles_x % tiles_y * TILE_H + p // TILE_W
    ox = program % tiles_x * TILE_W + p % TILE_W
    inside = (oy < height) & (ox < width)
    f = tl.arange(0, ROWS)[None, :]
    k = tl.arange(0, ROWS)[:, None] * ROWS
    x += n * in_height * in_width * ROWS
    out += n * height * width * ROWS
    lowest = float("-inf")
    acc = tl.zeros([TILE_H * TILE_W, ROWS], tl.float32)
    for ky in tl.range(0, 3, num_stages=1):  # pipelined, its 91 loads would fill all shared memory
        py = oy + ky - 1
        row_ok = inside & (py >= 0) & (py < height)
        left = tl.full([TILE_H * TILE_W, ROWS], lowest, tl.float32)
        middle = left
        right = left
        start = x + (py * 3).to(tl.int64) * in_width * ROWS + f
        if LOOP:
            for j in tl.range(0, 13, num_stages=1):
                left, middle, right = _add_column(left, middle, right, start, ox, j, row_ok, in_width, ROWS)
        else:
            for j in tl.static_range(0, 13):
                left, middle, right = _add_column(left, middle, right, start, ox, j, row_ok, in_width, ROWS)
        left = tl.where(row_ok & (ox >= 1), left, 0.0).to(w.dtype.element_ty)
        middle = tl.where(row_ok, middle, 0.0).to(w.dtype.element_ty)
        right = tl.where(row_ok & (ox + 1 < width), right, 0.0).to(w.dtype.element_ty)
        taps = w + ky * (3 * ROWS * ROWS) + k + f
        acc = tl.dot(left, tl.load(taps), acc, input_precision=PRECISION)
        acc = tl.dot(middle, tl.load(taps + ROWS * ROWS), acc, input_precision=PRECISION)
        acc = tl.dot(right, tl.load(taps + 2 * ROWS * ROWS), acc, input_precision=PRECISION)
    if BIAS:
        acc += tl.load(bias + f, mask=f < HIDDEN, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)
    tl.store(out + (oy.to(tl.int64) * width + ox) * ROWS + f, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gate_sums(
    x, wf1, bf1, low, n, x_batch, pixel, inside, pixels, width, low_height, low_width, scale_y, scale_x,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, PIXELS: tl.constexpr,
    X_PITCH: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The [PIXELS, ROWS] float32 input of the last convolution: resized low-resolution map plus skip."""
    f = tl.arange(0, ROWS)[None, :]
    y0, y1, wy = coordinates((pixel // width).to(tl.int32), scale_y, low_height)
    x0, x1, wx = coordinates((pixel % width).to(tl.int32), scale_x, low_width)
    low += n * low_height * low_width * ROWS
    if WIDE:
        y0 = y0.to(tl.int64)
        y1 = y1.to(tl.int64)
    top = tl.load(low + (y0 * low_width + x0) * ROWS + f, mask=inside, other=0.0).to(tl.float32) * (1.0 - wx)
    top += tl.load(low + (y0 * low_width + x1) * ROWS + f, mask=inside, other=0.0).to(tl.float32) * wx
    bottom = tl.load(low + (y1 * low_width + x0) * ROWS + f, mask=inside, other=0.0).to(tl.float32) * (1.0 - wx)
    bottom += tl.load(low + (y1 * low_width + x1) * ROWS + f, mask=inside, other=0.0).to(tl.float32) * wx
    sums = top * (1.0 - wy) + bottom * wy + tl.load(bf1 + f)
    offsets = pixel
    if X_PITCH > 0:
        offsets = pixel * X_PITCH
    x += image_start(n, x_batch, X_PITCH)
    for k in tl.static_range(0, PADDED, BLOCK_C):
        channel = k + tl.arange(0, BLOCK_C)[None, :]
        pointers = x + (offsets + channel_offsets(channel, pixels, pixels, X_PITCH, 1, WIDE))
        a = tl.load(pointers, mask=inside & (channel < CHANNELS), other=0.0)
        b = tl.load(wf1 + (k + tl.arange(0, BLOCK_C))[:, None] * ROWS + f)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    return sums


@triton.jit
def gate_kernel(
    x, wf1, bf1, low, w4, b4, out, pixels, width, tiles, low_height, low_width, scale_y, scale_x, x_batch, out_batch,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, PIXELS: tl.constexpr,
    BIAS: tl.constexpr, X_PITCH: tl.constexpr, OUT_PITCH: tl.constexpr, PADDED_OUT: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = x * sigmoid(w4 (resize(low) + wf1 x + bf1) + b4), a block of channels after the other."""
    n = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)[:, None]
    inside = pixel < pixels
    if WIDE:
        pixel = pixel.to(tl.int64)
    sums = _gate_sums(
        x, wf1, bf1, low, n, x_batch, pixel, inside, pixels, width, low_height, low_width, scale_y, scale_x, CHANNELS,
        PADDED, ROWS, BLOCK_C, PIXELS, X_PITCH, WIDE, PRECISION,
    ).to(w4.dtype.element_ty)  # fmt: skip
    x += image_start(n, x_batch, X_PITCH)
    out += image_start(n, out_batch, OUT_PITCH)
    f = tl.arange(0, ROWS)[:, None]
    for k in tl.static_range(0, PADDED, BLOCK_C):
        channel = k + tl.arange(0, BLOCK_C)[None, :]
        h = tl.dot(sums, tl.load(w4 + f * PADDED + channel), input_precision=PRECISION)
        if BIAS:
            h += tl.load(b4 + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
        x_offsets = pixel_offsets(0, pixel, width, X_PITCH, 1, WIDE)
        x_offsets = x_offsets + channel_offsets(channel, pixels, pixels, X_PITCH, 1, WIDE)
        value = tl.load(x + x_offsets, mask=inside & (channel < CHANNELS), other=0.0).to(tl.float32) * sigmoid(h)
        offsets = pixel_offsets(0, pixel, width, OUT_PITCH, 1, WIDE)
        offsets = offsets + channel_offsets(channel, pixels, pixels, OUT_PITCH, 1, WIDE)
        ok = inside
        if not PADDED_OUT:
            ok = inside & (channel < CHANNELS)
        tl.store(out + offsets, value.to(out.dtype.element_ty), mask=ok)


@triton.jit
def gate_backward_kernel(
    x, wf1, bf1, low, w4, b4, w4t, g, to_x, to_h, sums_out, to_sums, pixels, width, tiles, low_height, low_width,
    scale_y, scale_x, x_batch, g_batch, to_batch,
    CHANNELS: tl.constexpr, PADDED: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    PIXELS: tl.constexpr, BIAS: tl.constexpr, X_PITCH: tl.constexpr, G_PITCH: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Recomputes the gate; stores its input's and its pre-activation's gradients and what goes to x directly.

    to_x = g * gate and to_h = g * x * gate * (1 - gate) have PADDED channels together, sums_out (the gate's input) and
    to_sums = w4^T to_h have ROWS.
    """
    n = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)[:, None]
    inside = pixel < pixels
    if WIDE:
        pixel = pixel.to(tl.int64)
    sums = _gate_sums(
        x, wf1, bf1, low, n, x_batch, pixel, inside, pixels, width, low_height, low_width, scale_y, scale_x, CHANNELS,
        PADDED, ROWS, BLOCK_C, PIXELS, X_PITCH, WIDE, PRECISION,
    ).to(w4.dtype.element_ty)  # fmt: skip
    f = tl.arange(0, ROWS)
    rows = n * to_batch * ROWS + pixel * ROWS + f[None, :]
    tl.store(sums_out + rows, sums, mask=inside)
    x += image_start(n, x_batch, X_PITCH)
    g += image_start(n, g_batch, G_PITCH)
    back = tl.zeros([PIXELS, ROWS], tl.float32)
    for k in tl.static_range(0, PADDED, BLOCK_C):
        channel = k + tl.arange(0, BLOCK_C)[None, :]
        ok = inside & (channel < CHANNELS)
        h = tl.dot(sums, tl.load(w4 + f[:, None] * PADDED + channel), input_precision=PRECISION)
        if BIAS:
            h += tl.load(b4 + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
        gate = sigmoid(h)
        x_offsets = pixel_offsets(0, pixel, width, X_PITCH, 1, WIDE)
        x_offsets = x_offsets + channel_offsets(channel, pixels, pixels, X_PITCH, 1, WIDE)
        g_offsets = pixel_offsets(0, pixel, width, G_PITCH, 1, WIDE)
        g_offsets = g_offsets + channel_offsets(channel, pixels, pixels, G_PITCH, 1, WIDE)
        direct = tl.load(g + g_offsets, mask=ok, other=0.0).to(tl.float32) * gate
        gh = direct * (1.0 - gate) * tl.load(x + x_offsets, mask=ok, other=0.0).to(tl.float32)
        at = n * to_batch * PADDED + pixel * PADDED + channel
        tl.store(to_x + at, direct.to(to_x.dtype.element_ty), mask=inside)
        gh = gh.to(w4t.dtype.element_ty)
        tl.store(to_h + at, gh, mask=inside)
        rows_t = (k + tl.arange(0, BLOCK_C))[:, None] * ROWS
        back = tl.dot(gh, tl.load(w4t + rows_t + f[None, :]), back, input_precision=PRECISION)
    tl.store(to_sums + rows, back.to(to_sums.dtype.element_ty), mask=inside)


@triton.jit
def resize_adjoint_kernel(
    g,  # [outer, length, inner]
    out,  # [outer, low, inner]
    length,
    low,
    inner,
    scale,
    reach,
    size,
    BLOCK: tl.constexpr,
):
    """The adjoint of resizing along one axis: every element collects from those that read it, each with its weight."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = e < size
    at = (e // inner % low).to(tl.int32)
    start = e // (inner * low) * length * inner + e % inner
    first = tl.maximum(((at - 0.5) / scale).to(tl.int32) - 1, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, reach):
        position = first + i
        i0, i1, weight_1 = coordinates(position, scale, low)
        weight = tl.where(i0 == at, 1.0 - weight_1, 0.0) + tl.where(i1 == at, weight_1, 0.0)
        mine = ok & (position < length) & (weight > 0)
        value = tl.load(g + start + position.to(tl.int64) * inner, mask=mine, other=0.0)
        total += weight * value.to(tl.float32)
    tl.store(out + e, total.to(out.dtype.element_ty), mask=ok)


@triton.jit
def pool_kernel(
    x, out, index, in_height, in_width, height, width, size, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """max_pool(x, 7, 3) of channels-last maps, and where in its window each maximum was first seen."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = e < size
    f = e % ROWS
    px = e // ROWS % width
    py = e // (ROWS * width) % height
    n = e // (ROWS * width * height)
    pointers = x + ((n * in_height + py * 3) * in_width + px * 3) * ROWS + f
    most = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for i in range(0, 49):
        value = tl.load(pointers + (i // 7 * in_width + i % 7) * ROWS, mask=ok, other=0.0).to(tl.float32)
        better = (value > most) | (value != value)
        most = tl.where(better, value, most)
        where = tl.where(better, i, where)
    tl.store(out + e, most.to(out.dtype.element_ty), mask=ok)
    tl.store(index + e, where, mask=ok)


@triton.jit
def pool_adjoint_kernel(
    g, index, out, in_height, in_width, height, width, size, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradient to the pooled map's input: every element collects from the windows whose maximum it was."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = e < size
    f = e % ROWS
    x = e // ROWS % in_width
    y = e // (ROWS * in_width) % in_height
    n = e // (ROWS * in_width * in_height)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, 9):
        # Windows start at multiples of 3; those of the last three rows and columns reach this element.
        py = y // 3 - i // 3
        px = x // 3 - i % 3
        inside = (y - py * 3) * 7 + (x - px * 3)
        there = ok & (py >= 0) & (py < height) & (px >= 0) & (px < width) & (y - py * 3 < 7) & (x - px * 3 < 7)
        at = ((n * height + py) * width + px) * ROWS + f
        mine = there & (tl.load(index + at, mask=there, other=-1) == inside)
        total += tl.load(g + at, mask=mine, other=0.0).to(tl.float32)
    tl.store(out + e, total.to(out.dtype.element_ty), mask=ok)


# --- forward ----------------------------------------------------------------------------------------------------------


class Folded(NamedTuple):
    """Everything `attend` reads besides the image.

    Attributes:
        reduce: the packed convolution of stride 2 with w2 * w1, and its bias [hidden] float32.
        low: packed 3x3 convolutions of the low-resolution map and their biases, one, or RFDN's three.
        skip: wf * w1 packed [padded channels, ROWS], and its bias [ROWS] float32.
        gate: w4 packed [ROWS, padded channels], and its bias or None.
    """

    reduce: tuple[Packed, Tensor]
    low: tuple[tuple[Packed, Tensor | None], ...]
    skip: tuple[Tensor, Tensor]
    gate: tuple[Tensor, Tensor | None]
    hidden: int
    rows: int


def rows_of(hidden: int) -> int:
    """Hidden channels rounded up to the one power of two that the kernels of this file take."""
    return max(16, next_power_of_two(hidden))


@lru_cache(maxsize=256)
def _fold_kernel(channels: int, hidden: int, present: tuple[bool, ...], dtype: torch.dtype) -> Kernel:
    constants = {
        "CHANNELS": channels,
        "HIDDEN": hidden,
        "BLOCK_C": max(16, next_power_of_two(channels)),
        "BLOCK_F": rows_of(hidden),
        "HAS_B1": present[0],
        "HAS_B2": present[1],
        "HAS_WF": present[2],
        "HAS_BF": present[3],
    }
    return Kernel(fold_kernel, constants, 4)


def fold(
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
) -> Folded:
    """The operator's weights, folded and packed."""
    hidden, channels = w1.shape[:2]
    rows, dtype = rows_of(hidden), w1.dtype
    w21 = empty(w1, (hidden, channels, 3, 3))
    wf1 = empty(w1, (hidden, channels, 1, 1))
    b21 = empty(w1, (hidden,), torch.float32)
    bf1 = empty(w1, (rows,), torch.float32)
    kernel = _fold_kernel(channels, hidden, tuple(t is not None for t in (b1, b2, wf, bf)), dtype)
    kernel((rows, 1), *(None if t is None else dense(t) for t in (w1, b1, w2, b2, wf, bf)), w21, b21, wf1, bf1)
    b3, b4, b_max, b3_ = (None if t is None else dense(t) for t in (b3, b4, b_max, b3_))
    low = [(pack(w3, dtype, rows=rows, columns=rows), b3)]
    if w_max is not None and w3_ is not None:
        low.insert(0, (pack(w_max, dtype, rows=rows, columns=rows), b_max))
        low.append((pack(w3_, dtype, rows=rows, columns=rows), b3_))
    reduce = pack(w21, dtype, columns=rows)
    skip = pack(wf1, dtype, rows=padded(channels), columns=rows).weight
    gate = pack(w4, dtype, rows=rows, columns=padded(channels)).weight
    return Folded((reduce, b21), tuple(low), (skip, bf1), (gate, b4), hidden, rows)


def low_sizes(height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) after the convolution of stride 2, and after the pooling."""
    h2, w2 = (height - 3) // 2 + 1, (width - 3) // 2 + 1
    return (h2, w2), ((h2 - POOL) // POOL_STRIDE + 1, (w2 - POOL) // POOL_STRIDE + 1)


def low_map(like: Tensor, hidden: int, height: int, width: int) -> Map:
    """An uninitialised channels-last map of the hidden channels, padded to `rows_of` them."""
    rows = rows_of(hidden)
    tensor = empty(like, (like.shape[0], height, width, rows))
    return Map(tensor, rows, height * width, hidden, height, width)


@lru_cache(maxsize=256)
def _reduce_kernel(
    hidden: int, bias: torch.dtype | None, relu: bool, dtype: torch.dtype, config: Config, exact: str
) -> Kernel:
    constants = {
        "HIDDEN": hidden,
        "ROWS": rows_of(hidden),
        "TILE_H": config.tile[0],
        "TILE_W": config.tile[1],
        "BIAS": bias is not None,
        "RELU": relu,
        "LOOP": config.pipeline > 1,
        "PRECISION": exact,
    }
    return Kernel(reduce_kernel, constants, config.warps, config.registers)


@lru_cache(maxsize=256)
def _gate_kernel(
    channels: int,
    hidden: int,
    bias: torch.dtype | None,
    pitches: tuple[int, int],
    dtype: torch.dtype,
    config: Config,
    is_wide: bool,
    exact: str,
) -> Kernel:
    columns = padded(channels)
    constants = {
        "CHANNELS": channels,
        "PADDED": columns,
        "ROWS": rows_of(hidden),
        "BLOCK_C": next(b for b in (64, 32, 16) if columns % b == 0),
        "PIXELS": config.pixels,
        "BIAS": bias is not None,
        "X_PITCH": pitches[0],
        "OUT_PITCH": pitches[1],
        "PADDED_OUT": pitches[1] >= columns,
        "WIDE": is_wide,
        "PRECISION": exact,
    }
    return Kernel(gate_kernel, constants, config.warps, config.registers)


def _dtype_of(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def low_resolution(x: Map, folded: Folded) -> tuple[Map, ...]:
    """The maps of the low-resolution branch: before the pooling, then the result of each 3x3 convolution."""
    (h2, w2), (h3, w3) = low_sizes(x.height, x.width)
    dtype, hidden = x.tensor.dtype, folded.hidden
    exact = precision(dtype)
    c2 = low_map(x.tensor, hidden, h2, w2)
    convolve(x, folded.reduce[0], folded.reduce[1], c2, stride=2, pad=0)
    maps = [c2]
    for i, (packed, bias) in enumerate(folded.low):
        y = low_map(x.tensor, hidden, h3, w3)
        relu = i + 1 < len(folded.low)
        if i == 0:
            config = choose("esa_reduce", dtype, exact, folded.rows, folded.rows)
            kernel = _reduce_kernel(hidden, _dtype_of(bias), relu, dtype, config, exact)
            tiles_y, tiles_x = ceil_div(h3, config.tile[0]), ceil_div(w3, config.tile[1])
            grid = (x.tensor.shape[0] * tiles_y * tiles_x, 1)
            kernel(grid, c2.tensor, packed.weight, bias, y.tensor, h2, w2, h3, w3, tiles_x, tiles_y)
        else:
            convolve(maps[-1], packed, bias, y, activation="relu" if relu else "none")
        maps.append(y)
    return tuple(maps)


def attend(x: Map, folded: Folded, out: Map) -> None:
    """The operator on maps."""
    low = low_resolution(x, folded)[-1]
    dtype = x.tensor.dtype
    exact = precision(dtype)
    config = choose("esa_gate", dtype, exact, padded(x.channels), folded.rows)
    pixels = x.height * x.width
    tiles = ceil_div(pixels, config.pixels)
    kernel = _gate_kernel(
        x.channels, folded.hidden, _dtype_of(folded.gate[1]), (x.pitch, out.pitch), dtype, config, wide(x, out), exact
    )
    kernel(
        (x.tensor.shape[0] * tiles, 1), x.tensor, *folded.skip, low.tensor, *folded.gate, out.tensor, pixels, x.width,
        tiles, low.height, low.width, low.height / x.height, low.width / x.width, x.batch, out.batch,
    )  # fmt: skip


@repeated
def esa(x: Tensor, *weights: Tensor | None) -> Tensor:
    out = feature_map(x, x.shape[1])
    if out.numel():
        attend(as_map(x), fold(*weights), as_map(out))  # type: ignore[arg-type]
    return out


# --- backward ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _gate_backward_kernel(
    channels: int,
    hidden: int,
    bias: torch.dtype | None,
    pitches: tuple[int, int],
    dtype: torch.dtype,
    config: Config,
    is_wide: bool,
    exact: str,
) -> Kernel:
    columns = padded(channels)
    constants = {
        "CHANNELS": channels,
        "PADDED": columns,
        "HIDDEN": hidden,
        "ROWS": rows_of(hidden),
        "BLOCK_C": next(b for b in (64, 32, 16) if columns % b == 0),
        "PIXELS": config.pixels,
        "BIAS": bias is not None,
        "X_PITCH": pitches[0],
        "G_PITCH": pitches[1],
        "WIDE": is_wide,
        "PRECISION": exact,
    }
    return Kernel(gate_backward_kernel, constants, config.warps, config.registers)


_BLOCK = 256


@lru_cache(maxsize=64)
def _pool_kernels(rows: int, dtype: torch.dtype) -> tuple[Kernel, Kernel]:
    constants = {"ROWS": rows, "BLOCK": _BLOCK}
    return Kernel(pool_kernel, constants, 4), Kernel(pool_adjoint_kernel, constants, 4)


@lru_cache(maxsize=64)
def _resize_adjoint_kernel(dtypes: tuple[torch.dtype, torch.dtype]) -> Kernel:
    return Kernel(resize_adjoint_kernel, {"BLOCK": _BLOCK}, 4)


def _resize_adjoint(g: Map, out: Map) -> None:
    """Gradient to the low-resolution map from the one to its resized form: columns first, then rows."""
    n, rows = g.tensor.shape[0], g.pitch
    columns = g.tensor.new_empty((n, g.height, out.width, rows), dtype=torch.float32)
    for source, target, length, low, inner in (
        (g.tensor, columns, g.width, out.width, rows),
        (columns, out.tensor, g.height, out.height, out.width * rows),
    ):
        size = target.numel()
        kernel = _resize_adjoint_kernel((source.dtype, target.dtype))
        # A low-resolution element is read from 1 / scale elements on either side.
        reach = ceil_div(2 * length, low) + 4
        kernel((ceil_div(size, _BLOCK), 1), source, target, length, low, inner, low / length, reach, size)


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
    gx, *gradients = esa_gradients([x, *parameters], output_mask)
    if x.shape[0] == 0:
        return [g.zero_() for g in (gx, *gradients)]
    gw1, gb1, gw2, gb2, gw3, gb3, gw4, gb4, gwf, gbf, gwm, gbm, gw3_, gb3_ = map(wanted, gradients)
    n, channels, height, width = x.shape
    hidden, dtype, exact = w1.shape[0], x.dtype, precision(x.dtype)
    rows, columns = rows_of(hidden), padded(channels)
    block, g = as_map(x), as_map(grad)
    folded = fold(*parameters)  # type: ignore[arg-type]
    c2, *lows = low_resolution(block, folded)
    low = lows[-1]

    # The gate: gradients to its pre-activation, its input, and x.
    to_x, to_h = (
        Map(x.new_empty((n, height, width, columns)), columns, height * width, channels, height, width)
        for _ in range(2)
    )
    sums, to_sums, c1 = (low_map(x, hidden, height, width) for _ in range(3))
    config = choose("esa_gate", dtype, exact, columns, rows)
    tiles = ceil_div(height * width, config.pixels)
    kernel = _gate_backward_kernel(
        channels, hidden, _dtype_of(folded.gate[1]), (block.pitch, g.pitch), dtype, config, wide(to_x, block, g), exact
    )
    kernel(
        (n * tiles, 1), block.tensor, *folded.skip, low.tensor, *folded.gate,
        pack(w4, dtype, transpose=True, rows=columns, columns=rows).weight, g.tensor, to_x.tensor, to_h.tensor,
        sums.tensor, to_sums.tensor, height * width, width, tiles, low.height, low.width, low.height / height,
        low.width / width, block.batch, g.batch, height * width,
    )  # fmt: skip
    weight_gradient(sums, to_h, gw4, gb4, taps=1, pad=0)

    # The skip.
    multiply([block], pack_parts(w1, (channels,), dtype, columns=rows), b1, c1)
    to_c1 = to_sums
    if wf is not None:
        to_c1 = low_map(x, hidden, height, width)
        multiply([to_sums], pack_parts(wf, (hidden,), dtype, transpose=True, columns=rows), None, to_c1)
        weight_gradient(c1, to_sums, gwf, gbf, taps=1, pad=0)

    # The low-resolution branch, from its end.
    to_low = low_map(x, hidden, low.height, low.width)
    _resize_adjoint(to_sums, to_low)
    pool, pool_adjoint = _pool_kernels(rows, dtype)
    pooled = low_map(x, hidden, low.height, low.width)
    index = torch.empty_like(pooled.tensor, dtype=torch.int32)
    size = index.numel()
    sizes = (c2.height, c2.width, low.height, low.width)
    pool((ceil_div(size, _BLOCK), 1), c2.tensor, pooled.tensor, index, *sizes, size)
    steps = [(w3, gw3, gb3)]
    if w_max is not None and w3_ is not None:
        steps = [(w_max, gwm, gbm), (w3, gw3, gb3), (w3_, gw3_, gb3_)]
    for i in reversed(range(len(steps))):
        weight, gw, gb = steps[i]
        before = pooled if i == 0 else lows[i - 1]
        weight_gradient(before, to_low, gw, gb)
        down = low_map(x, hidden, low.height, low.width)
        packed = pack(weight, dtype, transpose=True, rows=rows, columns=rows)
        if i == 0:
            convolve(to_low, packed, None, down)
        else:  # before is relu's result, positive where its input was
            convolve(to_low, packed, None, down, mode="chain", activation="relu", g=before)
        to_low = down
    to_c2 = low_map(x, hidden, c2.height, c2.width)
    size = to_c2.tensor.numel()
    pool_adjoint((ceil_div(size, _BLOCK), 1), to_low.tensor, index, to_c2.tensor, *sizes, size)
    weight_gradient(c1, to_c2, gw2, gb2, stride=2, pad=0)
    total = low_map(x, hidden, height, width)
    packed = pack(w2, dtype, transpose=True, rows=rows, columns=rows)
    convolve(to_c2, packed, None, total, pad=2, border="stuffed", residual=to_c1, residual_mode="post")

    weight_gradient(block, total, gw1, gb1, taps=1, pad=0)
    if output_mask[0]:
        packed_1 = pack_parts(w1, (channels,), dtype, transpose=True)
        multiply([total], packed_1, None, as_map(gx), residual=to_x, residual_mode="post")
    return [gx, *gradients]
