"""Adaptive max pooling in one launch, its gradient in two: where each maximum is, then what every pixel gets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...library import gradient, pooled_map
from ._epilogue import channel_offsets, image_start, pixel_offsets
from ._windows import Lanes, element, largest, locate, pixels_of, tile_offsets, tiles
from .configs import Config, choose
from .launch import Kernel, ceil_div, repeated
from .maps import Map, as_map, padded, precision, wide


@triton.jit
def adaptive_max_pool_kernel(
    x,
    out,  # [n, elements], the pooled maps as they lie in memory
    height, width, pooled_height, pooled_width, span_y, span_x, tiles, x_batch, out_batch,
    CHANNELS: tl.constexpr, STORED: tl.constexpr, RESULTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MODE: tl.constexpr, PLANAR: tl.constexpr, X_PITCH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """MODE "maxima": those, and zeros in channels up to STORED. "where": their pixels' numbers, of the first of equal
    ones, or of the last NaN.
    """
    AXIS: tl.constexpr = 1 if X_PITCH == 0 else 0  # of the lanes that share a window
    n = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if WIDE:
        tile = tile.to(tl.int64)
    results = tile * RESULTS + tl.arange(0, RESULTS)
    e = tl.expand_dims(results, AXIS)
    lane = tl.expand_dims(tl.arange(0, ROWS * COLUMNS), 1 - AXIS)
    known = e < out_batch
    py, px, channel = element(e, pooled_height, pooled_width, STORED, PLANAR)
    if STORED > CHANNELS:
        known = known & (channel < CHANNELS)
    y0 = py * height // pooled_height
    y1 = ((py + 1) * height + pooled_height - 1) // pooled_height
    x0 = px * width // pooled_width
    x1 = ((px + 1) * width + pooled_width - 1) // pooled_width
    x += image_start(n, x_batch, X_PITCH)
    channels = channel_offsets(channel, height * width, width, X_PITCH, 1, WIDE)
    lowest = float("-inf")
    most = tl.full((e + lane).shape, lowest, tl.float32)
    if MODE == "where":
        # Where all is -inf, the first pixel stays the one.
        where = (y0 * width + x0 + 0 * lane).to(tl.int32)
    for i in range(0, span_y, ROWS):
        y = y0 + (i + lane // COLUMNS)
        for j in range(0, span_x, COLUMNS):
            column = x0 + (j + lane % COLUMNS)
            ok = known & (y < y1) & (column < x1)
            offsets = pixel_offsets(y, column, width, X_PITCH, 1, WIDE) + channels
            value = tl.load(x + offsets, mask=ok, other=lowest).to(tl.float32)
            if MODE == "where":
                better = (value > most) | (value != value)
                most = tl.where(better, value, most)
                where = tl.where(better, (y * width + column).to(tl.int32), where)
            else:
                most = tl.maximum(most, value, propagate_nan=tl.PropagateNan.ALL)
    out += n * out_batch + results
    if MODE == "where":
        nan = most != most
        best = tl.max(tl.where(nan, lowest, most), AXIS)
        last = tl.max(tl.where(nan, where, -1), AXIS)
        first = tl.min(tl.where(most == tl.expand_dims(best, AXIS), where, 2147483647), AXIS)
        tl.store(out, tl.where(last < 0, first, last), mask=results < out_batch)
    else:
        best = largest(most, AXIS)
        if STORED > CHANNELS:
            _, _, channel = element(results, pooled_height, pooled_width, STORED, PLANAR)
            best = tl.where(channel < CHANNELS, best, 0.0)
        tl.store(out, best.to(out.dtype.element_ty), mask=results < out_batch)


@triton.jit
def adaptive_max_pool_gradient_kernel(
    g,
    where,  # [n, elements], the pixel that each maximum is
    gx,
    height, width, pooled_height, pooled_width, reach_y, reach_x, tiles_x, tiles_y, g_batch, where_batch, gx_batch,
    CHANNELS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, PLANAR: tl.constexpr, G_PITCH: tl.constexpr,
    X_PITCH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Every pixel collects from the windows that it is in and whose maximum it is."""
    n, y, e, x, channel, ok = locate(tiles_x, tiles_y, height, width, CHANNELS, TILE_H, TILE_W, PLANAR, WIDE)
    pixel = y * width + x
    wide_y = y
    wide_x = x
    if WIDE:
        wide_y = y.to(tl.int64)
        wide_x = x.to(tl.int64)
    first_y = (wide_y * pooled_height // height).to(tl.int32)
    first_x = (wide_x * pooled_width // width).to(tl.int32)
    pooled = pooled_height * pooled_width
    # `where` lies as the pooled maps would.
    PITCH: tl.constexpr = 0 if PLANAR else CHANNELS
    where += n * where_batch
    where_channels = channel_offsets(channel, pooled, pooled_width, PITCH, 1, WIDE)
    g += image_start(n, g_batch, G_PITCH)
    g_channels = channel_offsets(channel, pooled, pooled_width, G_PITCH, 1, WIDE)
    total = tl.zeros([TILE_H, TILE_W], tl.float32)
    for i in range(0, reach_y):
        py = first_y + i
        for j in range(0, reach_x):
            px = first_x + j
            there = ok & (py < pooled_height) & (px < pooled_width)
            at = pixel_offsets(py, px, pooled_width, PITCH, 1, WIDE) + where_channels
            mine = there & (tl.load(where + at, mask=there, other=-1) == pixel)
            at = pixel_offsets(py, px, pooled_width, G_PITCH, 1, WIDE) + g_channels
            total += tl.load(g + at, mask=mine, other=0.0).to(tl.float32)
    gx += image_start(n, gx_batch, X_PITCH)
    offsets = tile_offsets(y, e, x, channel, height, width, CHANNELS, PLANAR, X_PITCH, WIDE)
    tl.store(gx + offsets, total.to(gx.dtype.element_ty), mask=ok)


def longest(size: int, count: int) -> int:
    """Of `count` windows along a side of `size`, or more by one where they are of several lengths."""
    return size // count + (2 if size % count else 0)


def _is_wide(x: Map, pooled: tuple[int, int]) -> bool:
    return wide(x, largest=max(x.channels * pooled[0] * pooled[1], x.height * pooled[0], x.width * pooled[1]))


@lru_cache(maxsize=256)
def _kernel(
    channels: int,
    stored: int,
    lanes: Lanes,
    mode: str,
    planar: bool,
    pitch: int,
    dtypes: object,
    config: Config,
    is_wide: bool,
) -> Kernel:
    constants = {
        "CHANNELS": channels,
        "STORED": stored,
        "RESULTS": lanes.results,
        "ROWS": lanes.rows,
        "COLUMNS": lanes.columns,
        "MODE": mode,
        "PLANAR": planar,
        "X_PITCH": pitch,
        "WIDE": is_wide,
    }
    return Kernel(adaptive_max_pool_kernel, constants, config.warps, config.registers)


def _pool(x: Map, size: tuple[int, int], out: Tensor, planar: bool, stored: int = 0) -> None:
    """Write the maxima of `size` windows, or where they are if `out` is of int32; dense, in planes or channels last,
    there with zeros in channels up to `stored`."""
    stored = max(stored, x.channels)
    dtype = x.tensor.dtype
    sides = (x.height // size[0], x.width // size[1])
    config = choose("adaptive_max_pool", dtype, precision(dtype), pixels_of(*sides), padded(x.channels))
    lanes = Lanes.make(config, *sides)
    mode = "where" if out.dtype == torch.int32 else "maxima"
    kernel = _kernel(x.channels, stored, lanes, mode, planar, x.pitch, (dtype, out.dtype), config, _is_wide(x, size))
    elements = stored * size[0] * size[1]
    count = ceil_div(elements, lanes.results)
    kernel(
        (x.tensor.shape[0] * count, 1), x.tensor, out, x.height, x.width, *size, longest(x.height, size[0]),
        longest(x.width, size[1]), count, x.batch, elements,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _gradient_kernel(
    channels: int,
    planar: bool,
    pitches: tuple[int, int],
    dtypes: object,
    config: Config,
    is_wide: bool,
) -> Kernel:
    constants = {
        "CHANNELS": channels,
        "TILE_H": config.tile[0],
        "TILE_W": config.tile[1],
        "PLANAR": planar,
        "G_PITCH": pitches[0],
        "X_PITCH": pitches[1],
        "WIDE": is_wide,
    }
    return Kernel(adaptive_max_pool_gradient_kernel, constants, config.warps, config.registers)


def pool(x: Map, out: Map) -> None:
    """Write the maxima to a map of a plan, whose pixels follow each other, channels filled up with zeros."""
    _pool(x, (out.height, out.width), out.tensor, False, out.pitch)


@repeated
def adaptive_max_pool(x: Tensor, output_size: Sequence[int]) -> Tensor:
    out = pooled_map(x, output_size)
    if out.numel():
        _pool(as_map(x), (out.shape[2], out.shape[3]), out, as_map(out).pitch == 0)
    return out


def adaptive_max_pool_backward(grad: Tensor, x: Tensor, output_mask: list[bool]) -> list[Tensor]:
    """The gradient to x; where the maxima are is found again."""
    gx = gradient(x, output_mask[0])
    if not gx.numel():
        return [gx]
    n, channels, height, width = x.shape
    size = (grad.shape[2], grad.shape[3])
    m, g, to = as_map(x), as_map(grad), as_map(gx)
    planar = to.pitch == 0
    where = x.new_empty((n, channels * size[0] * size[1]), dtype=torch.int32)
    _pool(m, size, where, planar)
    config = choose("adaptive_max_pool_gradient", x.dtype, precision(x.dtype), 16, padded(channels))
    is_wide = _is_wide(to, size) or wide(g)
    kernel = _gradient_kernel(channels, planar, (g.pitch, to.pitch), (grad.dtype, gx.dtype), config, is_wide)
    tiles_x, tiles_y = tiles(to, config.tile, planar)
    kernel(
        (n * tiles_y * tiles_x, 1), g.tensor, where, gx, height, width, *size,
        longest(size[0], height), longest(size[1], width), tiles_x, tiles_y, g.batch, where.shape[1], to.batch,
    )  # fmt: skip
    return [gx]
