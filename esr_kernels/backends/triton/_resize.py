"""Resizing without aligned corners by PyTorch's rules: what is read where, its adjoint, and enlargement by a factor."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._epilogue import channel_offsets, image_start, pixel_offsets
from ._windows import Lanes, element, locate, pixels_of, tile_offsets, tiles
from .configs import Config, choose
from .launch import Kernel, ceil_div
from .maps import Map, padded, precision, wide


@triton.jit
def ratio(size, resized):
    """The float32 quotient that PyTorch multiplies positions with; rounded otherwise, it would read other pixels."""
    return tl.div_rn(size.to(tl.float32), resized.to(tl.float32))


@triton.jit
def nearest(i, scale, size):
    """The row (or column) that position `i` reads."""
    return tl.minimum((i * scale).to(tl.int32), size - 1)


@triton.jit
def coordinates(i, scale, size):
    """Both rows (or columns) that bilinear resizing without aligned corners reads for `i`, and the second's weight."""
    source = tl.maximum((i + 0.5) * scale - 0.5, 0.0)
    first = tl.minimum(source.to(tl.int32), size - 1)
    second = tl.minimum(first + 1, size - 1)
    return first, second, source - first


@triton.jit
def resized(m, y, x, ok, height, width, low_height, low_width, PITCH: tl.constexpr, BLEND: tl.constexpr,
            WIDE: tl.constexpr):  # fmt: skip
    """The float32 values at rows `y` and columns `x` of a channel's map `m` that is resized to height x width."""
    scale_y = ratio(low_height, height)
    scale_x = ratio(low_width, width)
    if BLEND:
        y0, y1, wy = coordinates(y, scale_y, low_height)
        x0, x1, wx = coordinates(x, scale_x, low_width)
        top = tl.load(m + pixel_offsets(y0, x0, low_width, PITCH, 1, WIDE), mask=ok, other=0.0).to(tl.float32)
        right = tl.load(m + pixel_offsets(y0, x1, low_width, PITCH, 1, WIDE), mask=ok, other=0.0).to(tl.float32)
        top = top * (1.0 - wx) + right * wx
        bottom = tl.load(m + pixel_offsets(y1, x0, low_width, PITCH, 1, WIDE), mask=ok, other=0.0).to(tl.float32)
        right = tl.load(m + pixel_offsets(y1, x1, low_width, PITCH, 1, WIDE), mask=ok, other=0.0).to(tl.float32)
        bottom = bottom * (1.0 - wx) + right * wx
        value = top * (1.0 - wy) + bottom * wy
    else:
        offsets = pixel_offsets(
            nearest(y, scale_y, low_height), nearest(x, scale_x, low_width), low_width, PITCH, 1, WIDE
        )
        value = tl.load(m + offsets, mask=ok, other=0.0).to(tl.float32)
    return value


@triton.jit
def _first_reader(k, scale, size, low, BLEND: tl.constexpr):
    """The first position that reads row (or column) `k`, or the first of the two it blends: there or further on.

    Estimated, then corrected by what the two positions there do read; wrong by no more than size / 2^20.
    """
    if BLEND:
        estimate = (k + 0.5) / scale - 0.5
    else:
        estimate = k / scale
    at = tl.ceil(tl.minimum(estimate, size.to(tl.float32))).to(tl.int32)
    if BLEND:
        before, _, _ = coordinates(at - 1, scale, low)
        there, _, _ = coordinates(at, scale, low)
    else:
        before = nearest(at - 1, scale, low)
        there = nearest(at, scale, low)
    at += (before < k).to(tl.int32) + (there < k).to(tl.int32) - 1
    return tl.minimum(tl.maximum(at, 0), size)


@triton.jit
def _readers(k, scale, size, low, BLEND: tl.constexpr):
    """The positions that read row (or column) `k`: from the first one up to the second."""
    slack = size >> 20
    first = _first_reader(k - 1 if BLEND else k, scale, size, low, BLEND) - slack
    end = _first_reader(k + 1, scale, size, low, BLEND) + slack
    return tl.maximum(first, 0), tl.minimum(end, size)


@triton.jit
def _weight(i, k, scale, low, BLEND: tl.constexpr):
    """How much of row (or column) `k` is in position `i`."""
    if BLEND:
        first, second, weight = coordinates(i, scale, low)
        result = tl.where(first == k, 1.0 - weight, 0.0) + tl.where(second == k, weight, 0.0)
    else:
        result = tl.where(nearest(i, scale, low) == k, 1.0, 0.0)
    return result


@triton.jit
def resize_gradient_kernel(
    g, out, height, width, low_height, low_width, tiles, elements_size, g_batch, out_batch,
    CHANNELS: tl.constexpr, RESULTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLEND: tl.constexpr,
    PLANAR: tl.constexpr, G_PITCH: tl.constexpr, OUT_PITCH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Every pixel of the small map collects from those of the resized one that read it, each with its weight."""
    AXIS: tl.constexpr = 1 if G_PITCH == 0 else 0  # of the lanes that share a window
    n = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if WIDE:
        tile = tile.to(tl.int64)
    results = tile * RESULTS + tl.arange(0, RESULTS)
    e = tl.expand_dims(results, AXIS)
    lane = tl.expand_dims(tl.arange(0, ROWS * COLUMNS), 1 - AXIS)
    known = e < elements_size
    row, column, channel = element(e, low_height, low_width, CHANNELS, PLANAR)
    row = row.to(tl.int32)
    column = column.to(tl.int32)
    scale_y = ratio(low_height, height)
    scale_x = ratio(low_width, width)
    y0, y1 = _readers(row, scale_y, height, low_height, BLEND)
    x0, x1 = _readers(column, scale_x, width, low_width, BLEND)
    g += image_start(n, g_batch, G_PITCH)
    channels = channel_offsets(channel, height * width, width, G_PITCH, 1, WIDE)
    total = tl.zeros((e + lane).shape, tl.float32)
    for i in range(0, tl.max(tl.where(known, y1 - y0, 0)), ROWS):
        y = y0 + (i + lane // COLUMNS)
        in_row = known & (y < y1)
        weight_y = _weight(y, row, scale_y, low_height, BLEND)
        for j in range(0, tl.max(tl.where(known, x1 - x0, 0)), COLUMNS):
            x = x0 + (j + lane % COLUMNS)
            weight = weight_y * _weight(x, column, scale_x, low_width, BLEND)
            mine = in_row & (x < x1) & (weight > 0)
            offsets = pixel_offsets(y, x, width, G_PITCH, 1, WIDE) + channels
            total += weight * tl.load(g + offsets, mask=mine, other=0.0).to(tl.float32)
    total = tl.sum(total, AXIS)
    row, column, channel = element(results, low_height, low_width, CHANNELS, PLANAR)
    out += image_start(n, out_batch, OUT_PITCH)
    offsets = pixel_offsets(row, column, low_width, OUT_PITCH, 1, WIDE)
    offsets = offsets + channel_offsets(channel, low_height * low_width, low_width, OUT_PITCH, 1, WIDE)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=results < elements_size)


@lru_cache(maxsize=256)
def _kernel(
    channels: int,
    lanes: Lanes,
    blend: bool,
    pitches: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    config: Config,
    is_wide: bool,
) -> Kernel:
    constants = {
        "CHANNELS": channels,
        "RESULTS": lanes.results,
        "ROWS": lanes.rows,
        "COLUMNS": lanes.columns,
        "BLEND": blend,
        "PLANAR": pitches[1] == 0,
        "G_PITCH": pitches[0],
        "OUT_PITCH": pitches[1],
        "WIDE": is_wide,
    }
    return Kernel(resize_gradient_kernel, constants, config.warps, config.registers)


def resize_gradient(g: Map, out: Map, *, bilinear: bool) -> None:
    """Write the gradient to a map, from the one to the map resized to the size of `g`."""
    dtype = out.tensor.dtype
    # Bilinear resizing reads a pixel from one distance to the next on either side.
    sides = (g.height * (1 + bilinear) // out.height, g.width * (1 + bilinear) // out.width)
    config = choose("resize_gradient", dtype, precision(dtype), pixels_of(*sides), padded(out.channels))
    lanes = Lanes.make(config, *sides)
    dtypes = (g.tensor.dtype, dtype)
    kernel = _kernel(out.channels, lanes, bilinear, (g.pitch, out.pitch), dtypes, config, wide(g, out))
    elements = out.channels * out.height * out.width
    tiles = ceil_div(elements, lanes.results)
    kernel(
        (out.tensor.shape[0] * tiles, 1), g.tensor, out.tensor, g.height, g.width, out.height, out.width, tiles,
        elements, g.batch, out.batch,
    )  # fmt: skip


# --- enlargement by a whole factor


def tap_table(mode: str, factor: int, device: torch.device) -> Tensor:
    """The weights of what every phase of an enlargement reads, float32 [factor, 1, 2 or 4]."""
    t = (torch.arange(factor, dtype=torch.float64) + 0.5) / factor - 0.5
    t = (t - t.floor()).unsqueeze(1)
    if mode == "nearest":
        weights = torch.ones_like(t)
    elif mode == "bilinear":
        weights = torch.cat([1 - t, t], 1)
    else:  # Keys' cubic convolution with a = -3 / 4

        def near(d: Tensor) -> Tensor:
            return (1.25 * d - 2.25) * d * d + 1

        def far(d: Tensor) -> Tensor:
            return -0.75 * (((d - 5) * d + 8) * d - 4)

        weights = torch.cat([far(1 + t), near(t), near(1 - t), far(2 - t)], 1)
    return weights.to(device, torch.float32)


@triton.jit
def enlarge_kernel(
    x, table, out, height, width, low_height, low_width, tiles_x, tiles_y, x_batch, out_batch,
    CHANNELS: tl.constexpr, STORED: tl.constexpr, FACTOR: tl.constexpr, TAPS: tl.constexpr, TILE_H: tl.constexpr,
    TILE_W: tl.constexpr, PLANAR: tl.constexpr, X_PITCH: tl.constexpr, OUT_PITCH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Every element of the result from TAPS x TAPS of the map; zeros in channels up to STORED."""
    n, y, e, column, channel, stored = locate(
        tiles_x, tiles_y, height, width, STORED, TILE_H, TILE_W, PLANAR, WIDE
    )  # fmt: skip
    ok = stored & (channel < CHANNELS)
    phase_y = y % FACTOR
    phase_x = column % FACTOR
    first_y = y // FACTOR
    first_x = column // FACTOR
    if TAPS > 1:
        first_y -= (2 * phase_y + 1 < FACTOR).to(tl.int32) + (TAPS // 2 - 1)
        first_x -= (2 * phase_x + 1 < FACTOR).to(tl.int32) + (TAPS // 2 - 1)
    x += image_start(n, x_batch, X_PITCH)
    channels = channel_offsets(channel, low_height * low_width, low_width, X_PITCH, 1, WIDE)
    total = tl.zeros([TILE_H, TILE_W], tl.float32)
    for j in tl.static_range(0, TAPS):
        row = tl.minimum(tl.maximum(first_y + j, 0), low_height - 1)
        line = tl.zeros([TILE_H, TILE_W], tl.float32)
        for k in tl.static_range(0, TAPS):
            at = tl.minimum(tl.maximum(first_x + k, 0), low_width - 1)
            offsets = pixel_offsets(row, at, low_width, X_PITCH, 1, WIDE) + channels
            line += tl.load(table + phase_x * TAPS + k) * tl.load(x + offsets, mask=ok, other=0.0).to(tl.float32)
        total += tl.load(table + phase_y * TAPS + j) * line
    offsets = tile_offsets(y, e, column, channel, height, width, STORED, PLANAR, OUT_PITCH, WIDE)
    out += image_start(n, out_batch, OUT_PITCH)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=stored)


@lru_cache(maxsize=256)
def _enlarge_kernel(
    channels: int,
    stored: int,
    taps: tuple[int, int],
    pitches: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    config: Config,
    is_wide: bool,
) -> Kernel:
    constants = {
        "CHANNELS": channels,
        "STORED": stored,
        "FACTOR": taps[0],
        "TAPS": taps[1],
        "TILE_H": config.tile[0],
        "TILE_W": config.tile[1],
        "PLANAR": pitches[1] == 0,
        "X_PITCH": pitches[0],
        "OUT_PITCH": pitches[1],
        "WIDE": is_wide,
    }
    # Left to choose, the assembler spills with 16 taps.
    return Kernel(enlarge_kernel, constants, config.warps, 255)


def enlarge(x: Map, table: Tensor, out: Map) -> None:
    """Write the map enlarged by a whole factor, with the weights of `tap_table`."""
    dtype = out.tensor.dtype
    config = choose("modulate", dtype, precision(dtype), 16, padded(x.channels))  # the same work for an element
    dtypes = (x.tensor.dtype, dtype)
    kernel = _enlarge_kernel(
        x.channels, out.stored, (table.shape[0], table.shape[1]), (x.pitch, out.pitch), dtypes, config, wide(x, out)
    )
    tiles_x, tiles_y = tiles(out._replace(channels=out.stored), config.tile, out.pitch == 0)
    kernel(
        (out.tensor.shape[0] * tiles_y * tiles_x, 1), x.tensor, table, out.tensor, out.height, out.width, x.height,
        x.width, tiles_x, tiles_y, x.batch, out.batch,
    )  # fmt: skip
