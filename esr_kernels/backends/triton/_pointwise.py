"""What a plan has between fused layers: sums and products of maps, functions of every element, some of the channels."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._epilogue import activate, channel_offsets, image_start, pixel_offsets, sigmoid
from .launch import Kernel, ceil_div
from .maps import NOTHING, Map, padded, wide

_BLOCK = 1024


@triton.jit
def apply_function(x, low, high, FUNCTION: tl.constexpr):
    """A function of float32 `x`; zeros for `low` and `high`, as where a map has no channel, give zeros for zeros."""
    if FUNCTION == "normalize":
        result = (x - low) * high
    elif FUNCTION == "leaky_relu":
        result = tl.where(x < 0, x * low, x)
    elif FUNCTION == "sigmoid":
        result = high * sigmoid(x)
    elif FUNCTION == "clamp":
        result = tl.where(x < low, low, x)  # NaN stays
        result = tl.where(result > high, high, result)
    elif FUNCTION == "hardswish":
        gate = x * 0.16666666666666666 + 0.5
        gate = tl.where(gate < 0, 0.0, gate)
        result = x * tl.where(gate > 1, 1.0, gate)
    elif FUNCTION == "mish":
        # tanh(log(1 + e)) = e (e + 2) / (e (e + 2) + 2), 1 in float32 from x = 9 on.
        e = tl.exp(tl.where(x > 20, 20.0, x))
        e = e * (e + 2.0)
        result = x * (e / (e + 2.0))
    elif FUNCTION == "rsqrt":
        root = tl.sqrt(x)
        least = tl.where(low > 1e-30, low, 1e-30)
        result = high / tl.where(root < least, least, root)  # NaN stays
    else:
        result = activate(x, 0.0, FUNCTION)
    return result


@triton.jit
def pointwise_kernel(
    x, y, table, out, pixels, size, tiles, x_batch, y_batch, out_batch,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, OPERATION: tl.constexpr,
    X_PITCH: tl.constexpr, Y_PITCH: tl.constexpr, OUT_PITCH: tl.constexpr, ONE_CHANNEL: tl.constexpr,
    ONE_PIXEL: tl.constexpr, START: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out = x + y, x * y, a function of x with table[0] and table[1], or x as it is ("slice"), from channel START of x
    on; zeros in channels up to COLUMNS.

    With ONE_CHANNEL y has a single one, for all of x, and with ONE_PIXEL a single one of these.
    """
    n = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if WIDE:
        tile = tile.to(tl.int64)
    e = tile * BLOCK + tl.arange(0, BLOCK)
    # Neighbouring elements are neighbours in memory.
    if OUT_PITCH > 0:
        channel = e % COLUMNS
        pixel = e // COLUMNS
    else:
        channel = e // pixels
        pixel = e % pixels
    ok = e < size
    known = ok & (channel < CHANNELS)
    x += image_start(n, x_batch, X_PITCH)
    offsets = pixel_offsets(0, pixel, pixels, X_PITCH, 1, WIDE)
    offsets = offsets + channel_offsets(channel + START, pixels, pixels, X_PITCH, 1, WIDE)
    value = tl.load(x + offsets, mask=known, other=0.0).to(tl.float32)
    if OPERATION == "add" or OPERATION == "multiply":
        y += image_start(n, y_batch, Y_PITCH)
        if ONE_PIXEL:
            offsets = 0 * pixel
            y_pixels = 1
        else:
            offsets = pixel_offsets(0, pixel, pixels, Y_PITCH, 1, WIDE)
            y_pixels = pixels
        if not ONE_CHANNEL:
            offsets = offsets + channel_offsets(channel, y_pixels, y_pixels, Y_PITCH, 1, WIDE)
        other = tl.load(y + offsets, mask=known, other=0.0).to(tl.float32)
        if OPERATION == "add":
            value += other
        else:
            value *= other
    elif OPERATION != "slice":
        low = tl.load(table + channel, mask=known, other=0.0)
        high = tl.load(table + CHANNELS + channel, mask=known, other=0.0)
        value = apply_function(value, low, high, OPERATION)
    out += image_start(n, out_batch, OUT_PITCH)
    offsets = pixel_offsets(0, pixel, pixels, OUT_PITCH, 1, WIDE)
    offsets = offsets + channel_offsets(channel, pixels, pixels, OUT_PITCH, 1, WIDE)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=ok)


@lru_cache(maxsize=256)
def _kernel(
    channels: int,
    operation: str,
    pitches: tuple[int, int, int],
    one_channel: bool,
    one_pixel: bool,
    start: int,
    is_wide: bool,
    dtypes: tuple[torch.dtype, ...],
) -> Kernel:
    columns = padded(channels)
    constants = {
        "CHANNELS": channels,
        "COLUMNS": columns if pitches[2] >= columns else channels,
        "BLOCK": _BLOCK,
        "OPERATION": operation,
        "X_PITCH": pitches[0],
        "Y_PITCH": pitches[1],
        "OUT_PITCH": pitches[2],
        "ONE_CHANNEL": one_channel,
        "ONE_PIXEL": one_pixel,
        "START": start,
        "WIDE": is_wide,
    }
    return Kernel(pointwise_kernel, constants, 4)


def _launch(
    operation: str, x: Map, y: Map | None, table: Tensor | None, out: Map, start: int = 0, one_pixel: bool = False
) -> None:
    second = y if y is not None else NOTHING
    dtypes = tuple(t.dtype for t in (x.tensor, second.tensor, out.tensor) if t is not None)
    one_channel = second.channels == 1 < x.channels
    pitches = (x.pitch, second.pitch, out.pitch)
    kernel = _kernel(out.channels, operation, pitches, one_channel, one_pixel, start, wide(x, y, out), dtypes)
    pixels = out.height * out.width
    size = pixels * out.stored
    tiles = ceil_div(size, _BLOCK)
    kernel(
        (out.tensor.shape[0] * tiles, 1), x.tensor, second.tensor, table, out.tensor, pixels, size, tiles,
        x.batch, second.batch, out.batch,
    )  # fmt: skip


def combine(x: Map, y: Map, operation: str, out: Map, *, one_pixel: bool = False) -> None:
    """out = x + y or x * y, as `operation` is "add" or "multiply"; y has as many channels as x, or one for all, and as
    many pixels or, with `one_pixel`, one for all."""
    _launch(operation, x, y, None, out, one_pixel=one_pixel)


def normalize(x: Map, table: Tensor, out: Map) -> None:
    """out = (x - table[0]) * table[1], float32 [2, channels]."""
    _launch("normalize", x, None, table, out)


def copy_channels(x: Map, start: int, out: Map) -> None:
    """out = the channels of x from `start` on that it has room for."""
    _launch("slice", x, None, None, out, start)


def apply(x: Map, function: str, table: Tensor, out: Map) -> None:
    """out = a function of every element of x; its low and high are table[0] and table[1], float32 [2, channels]."""
    _launch(function, x, None, table, out)
