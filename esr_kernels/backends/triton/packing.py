"""Weights in the order in which the kernels read them.

An operator packs its weights on every call: a small kernel on the same stream, so that no write to a parameter is
missed, not even one through `.data`. A plan packs them once.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Kernel, ceil_div, next_power_of_two
from .maps import padded
from .recording import empty

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
    channels,
    out_channels,
    taps,
    taps_x,
    rows,
    columns,
    size,
    start,
    stride_k,
    stride_n,
    stride_y,
    stride_x,
    BLOCK: tl.constexpr,
):
    """packed[row, n] = w[start, k, n, tap] for row = tap * rows + k; `taps` in all, `taps_x` to a row of the kernel.

    Nothing but the types is compiled in, so that one binary packs every weight.
    """
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = e % columns
    row = e // columns
    tap = row // rows
    k = row % rows
    ok = (tap < taps) & (k < channels) & (n < out_channels)
    offsets = start + k * stride_k + n * stride_n + tap // taps_x * stride_y + tap % taps_x * stride_x
    value = tl.load(w + offsets, mask=ok, other=0.0)
    tl.store(packed + e, value.to(packed.dtype.element_ty), mask=e < size)


@lru_cache(maxsize=16)
def _kernel(dtypes: tuple[torch.dtype, torch.dtype]) -> Kernel:
    return Kernel(pack_kernel, {"BLOCK": _BLOCK}, num_warps=4)


def _launch(weight: Tensor, packed: Tensor, *args: int) -> None:
    size = packed.numel()
    _kernel((weight.dtype, packed.dtype))((ceil_div(size, _BLOCK), 1), weight, packed, *args[:6], size, *args[6:])


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
    packed = empty(weight, (rows if flat else taps * taps * rows, columns), dtype)
    start = 0
    if transpose:
        # From the last tap backwards.
        start = (taps - 1) * (stride_y + stride_x)
        stride_y, stride_x = -stride_y, -stride_x
    # Rows of a flat weight follow each other from tap to tap.
    per_tap = channels if flat else rows
    _launch(
        weight, packed, channels, out_channels, taps * taps, taps, per_tap, columns,
        start, stride_k, stride_n, stride_y, stride_x,
    )  # fmt: skip
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
    packed = empty(weight, (sum(map(padded, channels)), columns), dtype)
    # Equal parts are packed in one launch, as if they were taps.
    equal = len(set(channels)) == 1
    groups = [(channels[0], len(channels))] if equal else [(c, 1) for c in channels]
    column = row = 0
    for c, count in groups:
        rows = padded(c)
        part = packed[row : row + count * rows]
        _launch(
            weight, part, c, out_channels, count, count, rows, columns,
            column * stride_k, stride_k, stride_n, 0, c * stride_k,
        )  # fmt: skip
        column, row = column + c * count, row + count * rows
    return PackedParts(packed, channels, out_channels, block_0, block_1, columns)
