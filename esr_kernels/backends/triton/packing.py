"""Weights in the order in which the kernels read them.

An operator packs its weights on every call: a small kernel on the same stream, so that no write to a parameter is
missed, not even one through `.data`. A plan packs them once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Kernel, ceil_div, next_power_of_two
from .maps import padded

# The largest depth of a product over all taps at once.
FLAT_DEPTH = 64
_BLOCK = 1024


class Packed(NamedTuple):
    """A packed convolution weight [depth, columns].

    Attributes:
        weight: rows are (tap, input channel), columns output channels, zeros where there is none.
        channels, out_channels: of the convolution.
        taps: 3 or 1, a side.
        rows: rows per tap, or in all where `flat`.
        block_0, block_1: output channels of one program, each zero or a power of two.
        columns: all blocks together.
        flat: the taps of few channels follow each other without a gap.
    """

    weight: Tensor
    channels: int
    out_channels: int
    taps: int
    rows: int
    block_0: int
    block_1: int
    columns: int
    flat: bool


def blocks(out_channels: int) -> tuple[int, int, int]:
    """Output channels of one program as two powers of two, and the columns of all programs.

    48 is 32 + 16: a power of two alone would compute 64.
    """
    columns = padded(out_channels)
    if columns > 96:
        return 64, 0, ceil_div(out_channels, 64) * 64
    first = 1 << (columns.bit_length() - 1)
    return first, columns - first, columns


def geometry(channels: int, taps: int) -> tuple[bool, int]:
    """Whether all taps are one product, and the rows of the packed weight per product."""
    depth = max(16, next_power_of_two(channels * taps * taps))
    if taps > 1 and depth <= FLAT_DEPTH:
        return True, depth
    return False, padded(channels)


@triton.jit
def pack_kernel(
    w,
    packed,
    stride_k,
    stride_n,
    stride_y,
    stride_x,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_X: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FLAT: tl.constexpr,
    FLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """packed[row, n] = w[k, n, tap] for the row of (tap, k), TAPS in all and TAPS_X to a row of the kernel."""
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = e // COLUMNS
    n = e % COLUMNS
    if FLAT:
        tap = row // CHANNELS
        k = row % CHANNELS
        total = ROWS
    else:
        tap = row // ROWS
        k = row % ROWS
        total = TAPS * ROWS
    ok = (tap < TAPS) & (k < CHANNELS) & (n < OUT_CHANNELS)
    if FLIP:
        tap = TAPS - 1 - tap
    offsets = k * stride_k + n * stride_n + tap // TAPS_X * stride_y + tap % TAPS_X * stride_x
    value = tl.load(w + offsets, mask=ok, other=0.0)
    tl.store(packed + e, value.to(packed.dtype.element_ty), mask=row < total)


@lru_cache(maxsize=1024)
def _kernel(
    channels: int,
    out_channels: int,
    taps: tuple[int, int],
    rows: int,
    columns: int,
    flat: bool,
    flip: bool,
    dtypes: Any,
) -> Kernel:
    constants = {
        "CHANNELS": channels,
        "OUT_CHANNELS": out_channels,
        "TAPS": taps[0],
        "TAPS_X": taps[1],
        "ROWS": rows,
        "COLUMNS": columns,
        "FLAT": flat,
        "FLIP": flip,
        "BLOCK": _BLOCK,
    }
    return Kernel(pack_kernel, constants, num_warps=4)


def pack(
    weight: Tensor,
    dtype: torch.dtype,
    transpose: bool = False,
    *,
    rows: int | None = None,
    columns: int | None = None,
) -> Packed:
    """Pack a convolution's weight [O, C, t, t] for products in `dtype`.

    With `transpose` the weight of the data gradient: input and output channels change places, taps are flipped.
    `rows` and `columns` (powers of two) replace the numbers of rows per tap and of columns chosen here.
    """
    out_channels, channels, taps = weight.shape[0], weight.shape[1], weight.shape[2]
    stride_n, stride_k, stride_y, stride_x = weight.stride()
    if transpose:
        channels, out_channels, stride_k, stride_n = out_channels, channels, stride_n, stride_k
    flat, rows = geometry(channels, taps) if rows is None else (False, rows)
    block_0, block_1, columns = blocks(out_channels) if columns is None else (columns, 0, columns)
    packed = weight.new_empty((rows if flat else taps * taps * rows, columns), dtype=dtype)
    dtypes = (weight.dtype, dtype)
    kernel = _kernel(channels, out_channels, (taps * taps, taps), rows, columns, flat, transpose, dtypes)
    kernel((ceil_div(packed.numel(), _BLOCK), 1), weight, packed, stride_k, stride_n, stride_y, stride_x)
    return Packed(packed, channels, out_channels, taps, rows, block_0, block_1, columns, flat)


class PackedParts(NamedTuple):
    """The packed weight [sum of padded channels, columns] of a 1x1 convolution over several maps."""

    weight: Tensor
    channels: tuple[int, ...]
    out_channels: int
    block_0: int
    block_1: int
    columns: int


def pack_parts(
    weight: Tensor,
    channels: tuple[int, ...],
    dtype: torch.dtype,
    transpose: bool = False,
    *,
    columns: int | None = None,
) -> PackedParts:
    """Pack a 1x1 convolution's weight [O, sum of channels, 1, 1], or its transpose for one part."""
    stride_n, stride_k = weight.stride()[:2]
    out_channels = weight.shape[0]
    if transpose:
        channels, out_channels, stride_k, stride_n = (out_channels,), weight.shape[1], stride_n, stride_k
    block_0, block_1, columns = blocks(out_channels) if columns is None else (columns, 0, columns)
    packed = weight.new_empty((sum(map(padded, channels)), columns), dtype=dtype)
    dtypes = (weight.dtype, dtype)
    # Equal parts are packed in one launch, as if they were taps.
    equal = len(set(channels)) == 1
    groups = [(channels[0], len(channels))] if equal else [(c, 1) for c in channels]
    column = row = 0
    for c, count in groups:
        part = packed[row : row + count * padded(c)]
        kernel = _kernel(c, out_channels, (count, count), padded(c), columns, False, False, dtypes)
        source = weight.narrow(0 if transpose else 1, column, c * count)
        kernel((ceil_div(part.numel(), _BLOCK), 1), source, part, stride_k, stride_n, 0, c * stride_k)
        column, row = column + c * count, row + part.shape[0]
    return PackedParts(packed, channels, out_channels, block_0, block_1, columns)
