"""Depthwise convolution with its activation, or with one half of the channels gating the other, in one launch.

There is nothing to multiply on tensor cores: a kernel is bound by memory and reads its input through the first-level
cache. A program computes a few rows at once, so that an input row is loaded once for all the rows it adds to.
"""

# Kernels grow tuples of blocks, a type for each length.
# mypy: disable-error-code="assignment"

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...library import bias_gradient, feature_map, gradient
from . import interpreted
from ._epilogue import activate, channel_offsets, derivative, image_start, pixel_offsets
from ._weight_gradient import reduce_parts
from .configs import Config, choose
from .conv3x3 import wanted
from .launch import Kernel, ceil_div, repeated
from .maps import NOTHING, Map, as_map, padded, precision, wide
from .recording import dense

# Output rows that one load of an input row serves, at most.
_ROWS = 4
# Sums of a program of the weight gradient, each a tile of registers: all taps of a 3x3 kernel, else a row of taps.
_SUMS = 9
# Parts of the weight gradient, and tiles for each at least; they depend on nothing but the shape.
_SPLITS = 512
_TILES = 2


@triton.jit
def _sums(
    x, w, bias, oy, ox, channel, known, height, width, w_channel, w_row, w_column,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, DILATION: tl.constexpr, ROWS: tl.constexpr, PIXELS: tl.constexpr,
    BLOCK: tl.constexpr, BIAS: tl.constexpr, X_PITCH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The convolution at ROWS rows from `oy` on, a tuple of [PIXELS, BLOCK]."""
    start = tl.zeros([PIXELS, BLOCK], tl.float32)
    if BIAS:
        start += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    sums = ()
    for _ in tl.static_range(0, ROWS):
        sums = sums + (start,)
    w += channel * w_channel
    channels = channel_offsets(channel, height * width, width, X_PITCH, 1, WIDE)
    for kx in tl.range(0, TAPS_X, num_stages=1):
        ix = ox + (kx - TAPS_X // 2) * DILATION
        column_known = (ix >= 0) & (ix < width)
        taps = ()
        for ky in tl.static_range(0, TAPS_Y):
            taps = taps + (tl.load(w + (ky * w_row + kx * w_column), mask=known, other=0.0).to(tl.float32),)
        for j in tl.static_range(0, ROWS + (TAPS_Y - 1) * DILATION):
            if j % DILATION < ROWS:
                iy = oy + (j - TAPS_Y // 2 * DILATION)
                ok = column_known & (iy >= 0) & (iy < height) & known
                offsets = pixel_offsets(iy, ix, width, X_PITCH, 1, WIDE) + channels
                value = tl.load(x + offsets, mask=ok, other=0.0).to(tl.float32)
                added = ()
                for r in tl.static_range(0, ROWS):
                    if j >= r and (j - r) % DILATION == 0 and (j - r) // DILATION < TAPS_Y:
                        added = added + (sums[r] + value * taps[(j - r) // DILATION],)
                    else:
                        added = added + (sums[r],)
                sums = added
    return sums


@triton.jit
def depthwise_kernel(
    x, w, bias, g, out, height, width, tiles_x, tiles_y, slope, w_channel, w_row, w_column, x_batch, g_batch, out_batch,
    CHANNELS: tl.constexpr, STORED: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, DILATION: tl.constexpr,
    FLIP: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    GATED: tl.constexpr, MODE: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, X_PITCH: tl.constexpr,
    G_PITCH: tl.constexpr, OUT_PITCH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of pixels and BLOCK channels; a thread has ROWS rows of it.

    MODE "forward": act(d), or with GATED act(d of the first half) * d of the second, and zeros in channels up to
    STORED. "gradient": that to d, from the gradient g to the result. FLIP: the taps in reverse, for the data gradient.
    """
    RESULTS: tl.constexpr = CHANNELS // 2 if GATED else CHANNELS
    PIXELS: tl.constexpr = TILE_H // ROWS * TILE_W
    program = tl.program_id(0)
    n = (program // (tiles_x * tiles_y)).to(tl.int64)
    p = tl.arange(0, PIXELS)[:, None]
    oy = program // tiles_x % tiles_y * TILE_H + p // TILE_W * ROWS
    ox = program % tiles_x * TILE_W + p % TILE_W
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    known = channel < RESULTS
    x += image_start(n, x_batch, X_PITCH)
    out += image_start(n, out_batch, OUT_PITCH)
    if MODE == "gradient":
        g += image_start(n, g_batch, G_PITCH)
    if FLIP:
        w += (TAPS_Y - 1) * w_row + (TAPS_X - 1) * w_column
        w_row = -w_row
        w_column = -w_column
    sums = _sums(
        x, w, bias, oy, ox, channel, known, height, width, w_channel, w_row, w_column, TAPS_Y, TAPS_X, DILATION, ROWS,
        PIXELS, BLOCK, BIAS, X_PITCH, WIDE,
    )  # fmt: skip
    if GATED:
        gated = _sums(
            x, w, bias, oy, ox, channel + RESULTS, known, height, width, w_channel, w_row, w_column, TAPS_Y, TAPS_X,
            DILATION, ROWS, PIXELS, BLOCK, BIAS, X_PITCH, WIDE,
        )  # fmt: skip
    pixels = height * width
    for r in tl.static_range(0, ROWS):
        y = oy + r
        inside = (y < height) & (ox < width)
        ok = inside & (channel < STORED)
        h = sums[r]
        offsets = pixel_offsets(y, ox, width, OUT_PITCH, 1, WIDE)
        if MODE == "forward":
            value = activate(h, slope, ACTIVATION)
            if GATED:
                value *= gated[r]
        else:
            g_offsets = pixel_offsets(y, ox, width, G_PITCH, 1, WIDE)
            g_offsets = g_offsets + channel_offsets(channel, pixels, width, G_PITCH, 1, WIDE)
            given = tl.load(g + g_offsets, mask=ok, other=0.0).to(tl.float32)
            value = given * derivative(h, slope, ACTIVATION)
            if GATED:
                value *= gated[r]
                second = given * activate(h, slope, ACTIVATION)
                second_offsets = offsets + channel_offsets(channel + RESULTS, pixels, width, OUT_PITCH, 1, WIDE)
                tl.store(out + second_offsets, second.to(out.dtype.element_ty), mask=ok)
        offsets = offsets + channel_offsets(channel, pixels, width, OUT_PITCH, 1, WIDE)
        tl.store(out + offsets, value.to(out.dtype.element_ty), mask=ok)


@triton.jit
def depthwise_gradient_kernel(
    x,
    g,
    partial,  # [splits, TAPS_Y * TAPS_X, channel blocks * BLOCK] float32
    partial_bias,  # [splits, channel blocks * BLOCK]
    height, width, tiles_x, tiles_y, tiles, splits, columns, x_batch, g_batch,
    CHANNELS: tl.constexpr, TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, DILATION: tl.constexpr, TILE_H: tl.constexpr,
    TILE_W: tl.constexpr, TAP_ROWS: tl.constexpr, BLOCK: tl.constexpr, BIAS: tl.constexpr, X_PITCH: tl.constexpr,
    G_PITCH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: every `splits`-th tile of pixels, TAP_ROWS rows of taps, BLOCK channels."""
    PIXELS: tl.constexpr = TILE_H * TILE_W
    GROUPS: tl.constexpr = TAPS_Y // TAP_ROWS
    split = tl.program_id(0)
    ky0 = tl.program_id(1) % GROUPS * TAP_ROWS
    channel = tl.program_id(1) // GROUPS * BLOCK + tl.arange(0, BLOCK)[None, :]
    known = channel < CHANNELS
    p = tl.arange(0, PIXELS)[:, None]
    x_channels = channel_offsets(channel, height * width, width, X_PITCH, 1, WIDE)
    g_channels = channel_offsets(channel, height * width, width, G_PITCH, 1, WIDE)
    zeros = tl.zeros([PIXELS, BLOCK], tl.float32)
    bias = zeros
    sums = ()
    for _ in tl.static_range(0, TAP_ROWS * TAPS_X):
        sums = sums + (zeros,)
    for tile in tl.range(split, tiles, splits):
        image = (tile // (tiles_x * tiles_y)).to(tl.int64)
        oy = tile // tiles_x % tiles_y * TILE_H + p // TILE_W
        ox = tile % tiles_x * TILE_W + p % TILE_W
        ok = (oy < height) & (ox < width) & known
        offsets = pixel_offsets(oy, ox, width, G_PITCH, 1, WIDE) + g_channels
        gradient = tl.load(g + image_start(image, g_batch, G_PITCH) + offsets, mask=ok, other=0.0).to(tl.float32)
        if BIAS:
            bias += gradient
        start = x + image_start(image, x_batch, X_PITCH)
        added = ()
        for tap in tl.static_range(0, TAP_ROWS * TAPS_X):
            iy = oy + (ky0 + tap // TAPS_X - TAPS_Y // 2) * DILATION
            ix = ox + (tap % TAPS_X - TAPS_X // 2) * DILATION
            there = ok & (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width)
            offsets = pixel_offsets(iy, ix, width, X_PITCH, 1, WIDE) + x_channels
            added = added + (sums[tap] + gradient * tl.load(start + offsets, mask=there, other=0.0).to(tl.float32),)
        sums = added
    column = tl.program_id(1) // GROUPS * BLOCK + tl.arange(0, BLOCK)
    row = split * (TAPS_Y * TAPS_X) + ky0 * TAPS_X
    for tap in tl.static_range(0, TAP_ROWS * TAPS_X):
        tl.store(partial + ((row + tap) * columns + column), tl.sum(sums[tap], 0))
    if BIAS and ky0 == 0:
        tl.store(partial_bias + (split * columns + column), tl.sum(bias, 0))


def _block(channels: int, planes: bool) -> int:
    """Channels of a program: one where a row of pixels lies together, 16 where 32 would waste half of the last block.

    The interpreter takes a program's time for its number of operations, so there every program has many channels.
    """
    if planes and not interpreted():
        return 1
    return 32 if channels % 32 == 0 or channels % 32 > 16 else 16


def _choose(kernel: str, dtype: torch.dtype, taps: int, block: int, planes: bool) -> Config:
    """The configuration for a number of taps: rows of pixels want wider tiles than rows of channels."""
    name, columns = (kernel + "_planes", 16) if planes else (kernel, block)
    return choose(name, dtype, precision(dtype), padded(taps), columns)


@lru_cache(maxsize=1024)
def _kernel(
    channels: int,
    taps: tuple[int, int],
    dilation: int,
    flip: bool,
    gated: bool,
    mode: str,
    activation: str,
    dtypes: tuple[Any, ...],
    maps: tuple[int, int, int],
    stored: int,
    block: int,
    config: Config,
    is_wide: bool,
) -> Kernel:
    constants = {
        "CHANNELS": channels,
        "STORED": stored,
        "TAPS_Y": taps[0],
        "TAPS_X": taps[1],
        "DILATION": dilation,
        "FLIP": flip,
        "TILE_H": config.tile[0],
        "TILE_W": config.tile[1],
        "ROWS": min(config.tile[0], _ROWS),
        "BLOCK": block,
        "GATED": gated,
        "MODE": mode,
        "ACTIVATION": activation,
        "BIAS": dtypes[2] is not None,
        "X_PITCH": maps[0],
        "G_PITCH": maps[1],
        "OUT_PITCH": maps[2],
        "WIDE": is_wide,
    }
    return Kernel(depthwise_kernel, constants, config.warps, config.registers)


def convolve(
    x: Map,
    weight: Tensor,
    bias: Tensor | None,
    out: Map,
    *,
    dilation: int,
    activation: str = "none",
    slope: float = 0.0,
    gated: bool = False,
    flip: bool = False,
    g: Map | None = None,
) -> None:
    """Write the operator's result; `depthwise_kernel` explains `flip`.

    Args:
        weight: [C, 1, kh, kw] of any strides.
        g: the gradient to the result; then `out` is that to the convolution.
    """
    channels, _, taps_y, taps_x = weight.shape
    results = channels // 2 if gated else channels
    dtype = x.tensor.dtype
    block = _block(results, out.pitch == 0)
    config = _choose("depthwise", dtype, taps_y * taps_x, block, out.pitch == 0)
    bias = None if bias is None else dense(bias)
    given = NOTHING if g is None else g
    mode = "forward" if g is None else "gradient"
    stored = out.stored if mode == "forward" else results
    kernel = _kernel(
        channels,
        (taps_y, taps_x),
        dilation,
        flip,
        gated,
        mode,
        activation,
        tuple(None if t is None else t.dtype for t in (x.tensor, weight, bias, given.tensor, out.tensor)),
        (x.pitch, given.pitch, out.pitch),
        stored,
        block,
        config,
        wide(x, g, out),
    )
    tiles_y, tiles_x = ceil_div(out.height, config.tile[0]), ceil_div(out.width, config.tile[1])
    w_channel, _, w_row, w_column = weight.stride()
    kernel(
        (out.tensor.shape[0] * tiles_y * tiles_x, ceil_div(stored, block)), x.tensor, weight, bias, given.tensor,
        out.tensor, x.height, x.width, tiles_x, tiles_y, slope, w_channel, w_row, w_column, x.batch, given.batch,
        out.batch,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _gradient_kernel(
    channels: int,
    taps: tuple[int, int],
    dilation: int,
    bias: bool,
    dtypes: Any,
    maps: tuple[int, int],
    block: int,
    config: Config,
    is_wide: bool,
) -> Kernel:
    constants = {
        "CHANNELS": channels,
        "TAPS_Y": taps[0],
        "TAPS_X": taps[1],
        "DILATION": dilation,
        "TILE_H": config.tile[0],
        "TILE_W": config.tile[1],
        "TAP_ROWS": taps[0] if taps[0] * taps[1] <= _SUMS else 1,
        "BLOCK": block,
        "BIAS": bias,
        "X_PITCH": maps[0],
        "G_PITCH": maps[1],
        "WIDE": is_wide,
    }
    return Kernel(depthwise_gradient_kernel, constants, config.warps, config.registers)


def weight_gradient(x: Map, g: Map, taps: tuple[int, int], dilation: int, gw: Tensor | None, gb: Tensor | None) -> None:
    """Write the gradients [C, 1, kh, kw] and [C] of a convolution of `x` whose result has the gradient `g`."""
    if gw is None and gb is None:
        return
    dtype = x.tensor.dtype
    block = _block(x.channels, x.pitch == 0)
    config = _choose("depthwise_gradient", dtype, taps[0] * taps[1], block, x.pitch == 0)
    kernel = _gradient_kernel(
        x.channels, taps, dilation, gb is not None, (dtype, g.tensor.dtype), (x.pitch, g.pitch), block, config,
        wide(x, g),
    )  # fmt: skip
    tiles_y, tiles_x = ceil_div(x.height, config.tile[0]), ceil_div(x.width, config.tile[1])
    tiles = x.tensor.shape[0] * tiles_y * tiles_x
    splits = min(_SPLITS, ceil_div(tiles, _TILES))
    columns = ceil_div(x.channels, block) * block
    count = taps[0] * taps[1]
    groups = 1 if count <= _SUMS else taps[0]
    partial = x.tensor.new_empty(splits * count * columns, dtype=torch.float32)
    partial_bias = x.tensor.new_empty(splits * columns, dtype=torch.float32)
    kernel(
        (splits, groups * columns // block), x.tensor, g.tensor, partial, partial_bias, x.height, x.width, tiles_x,
        tiles_y, tiles, splits, columns, x.batch, g.batch,
    )  # fmt: skip
    reduce_parts(partial, partial_bias, gw, gb, splits, 1, x.channels, 1, columns, taps)


@repeated
def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    activation: str,
    negative_slope: float,
    gated: bool,
) -> Tensor:
    out = feature_map(x, x.shape[1] // 2 if gated else x.shape[1])
    if out.numel():
        convolve(
            as_map(x), weight, bias, as_map(out), dilation=dilation, activation=activation, slope=negative_slope,
            gated=gated,
        )  # fmt: skip
    return out


def depthwise_conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dilation: int,
    activation: str,
    negative_slope: float,
    gated: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, weight and bias; the convolution is recomputed, not stored."""
    gx, gw = gradient(x, output_mask[0]), gradient(weight, output_mask[1])
    gb = bias_gradient(bias, weight, output_mask[2])
    if x.shape[0] == 0:
        return gx, gw.zero_(), gb.zero_()
    block, g = as_map(x), as_map(grad)
    if gated or activation != "none":
        to_d = as_map(feature_map(x, x.shape[1]))
        convolve(
            block, weight, bias, to_d, dilation=dilation, activation=activation, slope=negative_slope, gated=gated, g=g
        )
        g = to_d
    if output_mask[0]:
        convolve(g, weight, None, as_map(gx), dilation=dilation, flip=True)
    weight_gradient(block, g, (weight.shape[2], weight.shape[3]), dilation, wanted(gw), wanted(gb))
    return gx, gw, gb
