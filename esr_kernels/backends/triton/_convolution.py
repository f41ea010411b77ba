"""The convolution kernel: an implicit matrix product over the taps, with everything pointwise in its epilogue."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._epilogue import channel_offsets, finish, image_start, pixel_offsets
from .configs import Config, choose
from .launch import Kernel, ceil_div
from .maps import NOTHING, Map, precision, wide
from .packing import Packed
from .recording import dense


@triton.jit
def reflect(i, size):
    """The row or column that lies at `i` when the image is continued by its mirror image."""
    return (size - 1) - tl.abs(size - 1 - tl.abs(i))


@triton.jit
def _add_tap(
    acc0,
    acc1,
    x,
    w,
    normalization,
    offsets,  # [P, 1] of the tap's pixels
    ok,  # [P, 1] whether they exist
    tap,
    start,  # the first of the tap's channels to add
    pixels,
    width,
    first,
    CHANNELS: tl.constexpr,
    PADDED_IN: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_0: tl.constexpr,
    BLOCK_1: tl.constexpr,
    WEIGHT_COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PITCH: tl.constexpr,
    SHUFFLE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one tap's [P, DEPTH] x [DEPTH, N] product to the sums: all of its channels, or one block of them."""
    for k in tl.static_range(0, DEPTH, BLOCK_K):
        channel = start + k + tl.arange(0, BLOCK_K)[None, :]
        pointers = x + (offsets + channel_offsets(channel, pixels, width, PITCH, SHUFFLE, WIDE))
        # A map whose pitch covers the padded channels holds zeros there.
        if PADDED_IN <= PITCH or CHANNELS == PADDED_IN or (DEPTH == PADDED_IN and k + BLOCK_K <= CHANNELS):
            if MASKED:
                a = tl.load(pointers, mask=ok, other=0.0)
            else:
                a = tl.load(pointers)
        else:
            if MASKED:
                a = tl.load(pointers, mask=ok & (channel < CHANNELS), other=0.0)
            else:
                a = tl.load(pointers, mask=channel < CHANNELS, other=0.0)
        if NORMALIZE:
            shift = tl.load(normalization + channel, mask=channel < CHANNELS, other=0.0)
            scale = tl.load(normalization + CHANNELS + channel, mask=channel < CHANNELS, other=0.0)
            a = (a.to(tl.float32) - shift) * scale
            if MASKED:
                a = tl.where(ok, a, 0.0)
        a = a.to(w.dtype.element_ty)
        row = (tap * PADDED_IN + start + k + tl.arange(0, BLOCK_K))[:, None] * WEIGHT_COLUMNS + first
        b0 = tl.load(w + row + tl.arange(0, BLOCK_0)[None, :])
        acc0 = tl.dot(a, b0, acc0, input_precision=PRECISION)
        if BLOCK_1 > 0:
            b1 = tl.load(w + row + BLOCK_0 + tl.arange(0, BLOCK_1)[None, :])
            acc1 = tl.dot(a, b1, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def _at_tap(
    acc0,
    acc1,
    x,
    w,
    normalization,
    iy,
    ix,
    inside,
    ky,
    kx,
    start,
    pixels,
    height,
    width,
    first,
    CHANNELS: tl.constexpr,
    PADDED_IN: tl.constexpr,
    DEPTH: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_0: tl.constexpr,
    BLOCK_1: tl.constexpr,
    WEIGHT_COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    BORDER: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PITCH: tl.constexpr,
    SHUFFLE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`_add_tap` of the tap (ky, kx), with its addresses and its mask."""
    ok = inside
    if BORDER == "stuffed":
        iy += ky
        ix += kx
        ok = (iy >= 0) & (iy % 2 == 0) & (iy // 2 < height) & (ix >= 0) & (ix % 2 == 0) & (ix // 2 < width)
        offsets = pixel_offsets(iy // 2, ix // 2, width, PITCH, SHUFFLE, WIDE)
    elif BORDER == "reflect":
        offsets = pixel_offsets(reflect(iy + ky, height), reflect(ix + kx, width), width, PITCH, SHUFFLE, WIDE)
    else:
        offsets = pixel_offsets(iy, ix, width, PITCH, SHUFFLE, WIDE) + pixel_offsets(
            ky, kx, width, PITCH, SHUFFLE, False
        )
        if MASKED:
            ok = (iy + ky >= 0) & (iy + ky < height) & (ix + kx >= 0) & (ix + kx < width)
    return _add_tap(
        acc0, acc1, x, w, normalization, offsets, ok, ky * TAPS + kx, start, pixels, width, first, CHANNELS, PADDED_IN,
        DEPTH, BLOCK_K, BLOCK_0, BLOCK_1, WEIGHT_COLUMNS, MASKED, NORMALIZE, PITCH, SHUFFLE, WIDE, PRECISION,
    )  # fmt: skip


@triton.jit
def _add_flat(
    acc0,
    acc1,
    x,
    w,
    normalization,
    iy,
    ix,
    inside,
    pixels,
    height,
    width,
    first,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_0: tl.constexpr,
    BLOCK_1: tl.constexpr,
    WEIGHT_COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    BORDER: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PITCH: tl.constexpr,
    SHUFFLE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All taps of an input of few channels in one product of depth TAPS * TAPS * CHANNELS."""
    k = tl.arange(0, DEPTH)[None, :]
    channel = k % CHANNELS
    iy += k // (CHANNELS * TAPS)
    ix += k // CHANNELS % TAPS
    known = k < CHANNELS * TAPS * TAPS
    if BORDER == "reflect":
        iy = reflect(iy, height)
        ix = reflect(ix, width)
        ok = inside & known
    elif MASKED:
        ok = (iy >= 0) & (iy < height) & (ix >= 0) & (ix < width) & known
    else:
        ok = known & inside  # inside everywhere
    offsets = pixel_offsets(iy, ix, width, PITCH, SHUFFLE, WIDE)
    offsets = offsets + channel_offsets(channel, pixels, width, PITCH, SHUFFLE, WIDE)
    a = tl.load(x + offsets, mask=ok, other=0.0)
    if NORMALIZE:
        shift = tl.load(normalization + channel)
        scale = tl.load(normalization + CHANNELS + channel)
        a = tl.where(ok, (a.to(tl.float32) - shift) * scale, 0.0)
    a = a.to(w.dtype.element_ty)
    row = tl.arange(0, DEPTH)[:, None] * WEIGHT_COLUMNS + first
    acc0 = tl.dot(a, tl.load(w + row + tl.arange(0, BLOCK_0)[None, :]), acc0, input_precision=PRECISION)
    if BLOCK_1 > 0:
        b1 = tl.load(w + row + BLOCK_0 + tl.arange(0, BLOCK_1)[None, :])
        acc1 = tl.dot(a, b1, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def _accumulate(
    x,
    w,
    normalization,
    iy,
    ix,
    inside,
    pixels,
    height,
    width,
    first,
    CHANNELS: tl.constexpr,
    PADDED_IN: tl.constexpr,
    TAPS: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_0: tl.constexpr,
    BLOCK_1: tl.constexpr,
    WEIGHT_COLUMNS: tl.constexpr,
    FLAT: tl.constexpr,
    PIPELINE: tl.constexpr,
    MASKED: tl.constexpr,
    BORDER: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PITCH: tl.constexpr,
    SHUFFLE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The [PIXELS, BLOCK_0] and [PIXELS, BLOCK_1] sums of a tile."""
    acc0 = tl.zeros([PIXELS, BLOCK_0], tl.float32)
    acc1 = acc0
    if BLOCK_1 > 0:
        acc1 = tl.zeros([PIXELS, BLOCK_1], tl.float32)
    if FLAT:
        acc0, acc1 = _add_flat(
            acc0, acc1, x, w, normalization, iy, ix, inside, pixels, height, width, first, CHANNELS, TAPS, PADDED_IN,
            BLOCK_0, BLOCK_1, WEIGHT_COLUMNS, MASKED, BORDER, NORMALIZE, PITCH, SHUFFLE, WIDE, PRECISION,
        )  # fmt: skip
    elif PIPELINE > 1 and w.dtype.element_ty == tl.float32:
        # One block of channels at a time: three products for each of float32, unrolled, are too many for registers and
        # compiler.
        DEPTH: tl.constexpr = BLOCK_K if PRECISION == "tf32x3" else PADDED_IN
        BLOCKS: tl.constexpr = PADDED_IN // DEPTH
        for ky in tl.range(0, TAPS, num_stages=1):
            for step in tl.range(0, TAPS * BLOCKS, num_stages=PIPELINE):
                acc0, acc1 = _at_tap(
                    acc0, acc1, x, w, normalization, iy, ix, inside, ky, step // BLOCKS, step % BLOCKS * DEPTH,
                    pixels, height, width, first, CHANNELS, PADDED_IN, DEPTH, TAPS, BLOCK_K, BLOCK_0, BLOCK_1,
                    WEIGHT_COLUMNS, MASKED, BORDER, NORMALIZE, PITCH, SHUFFLE, WIDE, PRECISION,
                )  # fmt: skip
    elif PIPELINE > 1:
        # Rows of taps in a loop, which the compiler pipelines through asynchronous copies; all nine taps in one loop
        # are miscompiled at 8 warps (pytorch/pytorch#173068).
        for ky in tl.range(0, TAPS, num_stages=PIPELINE):
            for kx in tl.static_range(0, TAPS):
                acc0, acc1 = _at_tap(
                    acc0, acc1, x, w, normalization, iy, ix, inside, ky, kx, 0, pixels, height, width, first, CHANNELS,
                    PADDED_IN, PADDED_IN, TAPS, BLOCK_K, BLOCK_0, BLOCK_1, WEIGHT_COLUMNS, MASKED, BORDER, NORMALIZE,
                    PITCH, SHUFFLE, WIDE, PRECISION,
                )  # fmt: skip
    else:
        for tap in tl.static_range(0, TAPS * TAPS):
            acc0, acc1 = _at_tap(
                acc0, acc1, x, w, normalization, iy, ix, inside, tap // TAPS, tap % TAPS, 0, pixels, height, width,
                first, CHANNELS, PADDED_IN, PADDED_IN, TAPS, BLOCK_K, BLOCK_0, BLOCK_1, WEIGHT_COLUMNS, MASKED, BORDER,
                NORMALIZE, PITCH, SHUFFLE, WIDE, PRECISION,
            )  # fmt: skip
    return acc0, acc1


@triton.jit
def convolution_kernel(
    x,
    w,  # [TAPS * TAPS * PADDED_IN, WEIGHT_COLUMNS], zeros where there is no channel
    bias,
    normalization,  # [2, CHANNELS]: shift, scale
    r,
    g,
    out,
    out2,
    in_height,
    in_width,
    height,
    width,
    tiles_x,
    tiles_y,
    slope,
    x_batch,  # from image to image, see `image_start`
    r_batch,
    g_batch,
    out_batch,
    CHANNELS: tl.constexpr,
    PADDED_IN: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_0: tl.constexpr,
    BLOCK_1: tl.constexpr,
    WEIGHT_COLUMNS: tl.constexpr,
    FLAT: tl.constexpr,
    PIPELINE: tl.constexpr,
    BORDER: tl.constexpr,
    NORMALIZE: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_SHUFFLE: tl.constexpr,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    SECOND: tl.constexpr,
    R_PITCH: tl.constexpr,
    G_PITCH: tl.constexpr,
    G_SHUFFLE: tl.constexpr,
    OUT_PITCH: tl.constexpr,
    OUT_SHUFFLE: tl.constexpr,
    PADDED_OUT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: TILE_H x TILE_W output pixels times BLOCK_0 + BLOCK_1 output channels of one image.

    BORDER: what lies PAD pixels around the image: "zeros", its mirror image ("reflect"), or zeros there and between any
    two rows and columns ("stuffed": the transposed convolution of stride 2).
    """
    program = tl.program_id(0)
    first = tl.program_id(1) * (BLOCK_0 + BLOCK_1)
    n = (program // (tiles_x * tiles_y)).to(tl.int64)
    y0 = program // tiles_x % tiles_y * TILE_H
    x0 = program % tiles_x * TILE_W
    x += image_start(n, x_batch, X_PITCH)
    if RESIDUAL != "none":
        r += image_start(n, r_batch, R_PITCH)
    if MODE != "forward":
        g += image_start(n, g_batch, G_PITCH)
    out += image_start(n, out_batch, OUT_PITCH)
    if SECOND:
        out2 += image_start(n, out_batch, OUT_PITCH)

    p = tl.arange(0, TILE_H * TILE_W)[:, None]
    oy = y0 + p // TILE_W
    ox = x0 + p % TILE_W
    inside = (oy < height) & (ox < width)
    iy = oy * STRIDE - PAD
    ix = ox * STRIDE - PAD
    pixels = in_height * in_width
    # Unrolled taps come in a masked version for the border and an unmasked one for tiles whose first and last input
    # rows and columns exist. A pipelined loop has its masks in the copies, where they are free, and would hold its
    # buffers twice.
    interior = False
    if PIPELINE == 1 and BORDER != "stuffed":
        interior = (
            (y0 * STRIDE >= PAD)
            & (x0 * STRIDE >= PAD)
            & ((y0 + TILE_H - 1) * STRIDE - PAD + TAPS <= in_height)
            & ((x0 + TILE_W - 1) * STRIDE - PAD + TAPS <= in_width)
        )
    if interior:
        acc0, acc1 = _accumulate(
            x, w, normalization, iy, ix, inside, pixels, in_height, in_width, first, CHANNELS, PADDED_IN, TAPS,
            TILE_H * TILE_W, BLOCK_K, BLOCK_0, BLOCK_1, WEIGHT_COLUMNS, FLAT, PIPELINE, False, "zeros", NORMALIZE,
            X_PITCH, X_SHUFFLE, WIDE, PRECISION,
        )  # fmt: skip
    else:
        acc0, acc1 = _accumulate(
            x, w, normalization, iy, ix, inside, pixels, in_height, in_width, first, CHANNELS, PADDED_IN, TAPS,
            TILE_H * TILE_W, BLOCK_K, BLOCK_0, BLOCK_1, WEIGHT_COLUMNS, FLAT, PIPELINE, True, BORDER, NORMALIZE,
            X_PITCH, X_SHUFFLE, WIDE, PRECISION,
        )  # fmt: skip

    finish(
        acc0, bias, r, g, out, out2, oy, ox, inside, first, height * width, width, slope, BLOCK_0, OUT_CHANNELS,
        MODE, ACTIVATION, RESIDUAL, BIAS, SECOND, R_PITCH, G_PITCH, G_SHUFFLE, OUT_PITCH, OUT_SHUFFLE, PADDED_OUT, WIDE,
    )  # fmt: skip
    if BLOCK_1 > 0:
        finish(
            acc1, bias, r, g, out, out2, oy, ox, inside, first + BLOCK_0, height * width, width, slope, BLOCK_1,
            OUT_CHANNELS, MODE, ACTIVATION, RESIDUAL, BIAS, SECOND, R_PITCH, G_PITCH, G_SHUFFLE, OUT_PITCH,
            OUT_SHUFFLE, PADDED_OUT, WIDE,
        )  # fmt: skip


@lru_cache(maxsize=4096)
def _kernel(
    packed: tuple[int, int, int, int, int, int, int, bool],
    dtype: torch.dtype,
    dtypes: tuple[Any, ...],
    config: Config,
    stride: int,
    pad: int,
    border: str,
    normalize: bool,
    maps: tuple[int, ...],
    mode: str,
    activation: str,
    residual: str,
    second: bool,
    is_wide: bool,
    precision: str,
) -> Kernel:
    channels, out_channels, taps, rows, block_0, block_1, columns, flat = packed
    x_pitch, x_shuffle, r_pitch, g_pitch, g_shuffle, out_pitch, out_shuffle = maps
    constants = {
        "CHANNELS": channels,
        "PADDED_IN": rows,
        "OUT_CHANNELS": out_channels,
        "TAPS": taps,
        "STRIDE": stride,
        "PAD": pad,
        "TILE_H": config.tile[0],
        "TILE_W": config.tile[1],
        "BLOCK_K": next(b for b in ((32, 16) if dtype == torch.float32 else (64, 32, 16)) if rows % b == 0),
        "BLOCK_0": block_0,
        "BLOCK_1": block_1,
        "WEIGHT_COLUMNS": columns,
        "FLAT": flat,
        "PIPELINE": config.pipeline,
        "BORDER": border,
        "NORMALIZE": normalize,
        "X_PITCH": x_pitch,
        "X_SHUFFLE": x_shuffle,
        "MODE": mode,
        "ACTIVATION": activation,
        "RESIDUAL": residual,
        "BIAS": dtypes[1] is not None,
        "SECOND": second,
        "R_PITCH": r_pitch,
        "G_PITCH": g_pitch,
        "G_SHUFFLE": g_shuffle,
        "OUT_PITCH": out_pitch,
        "OUT_SHUFFLE": out_shuffle,
        "PADDED_OUT": out_pitch >= columns,
        "WIDE": is_wide,
        "PRECISION": precision,
    }
    return Kernel(convolution_kernel, constants, config.warps, config.registers)


def convolve(
    x: Map,
    packed: Packed,
    bias: Tensor | None,
    out: Map,
    *,
    stride: int = 1,
    pad: int = 1,
    border: str = "zeros",
    normalization: Tensor | None = None,
    mode: str = "forward",
    activation: str = "none",
    slope: float = 0.0,
    residual: Map | None = None,
    residual_mode: str = "none",
    g: Map | None = None,
    second: Tensor | None = None,
) -> None:
    """Convolve `x` into `out`; see `_epilogue.finish` for the modes.

    Args:
        bias: [out channels], added to the sums.
        pad, border: rows and columns around the image and what they hold, see `convolution_kernel`.
        normalization: [2, channels] float32: the image is (x - row 0) * row 1 before it is padded.
        residual, residual_mode: the map r and what happens to it.
        g: the gradient (mode "gradient") or the stored pre-activation (mode "chain").
        second: memory laid out like `out` for the second result.
    """
    n = x.tensor.shape[0]
    dtype = packed.weight.dtype
    exact = precision(dtype)
    config = choose("convolution", dtype, exact, packed.rows, packed.block_0 + packed.block_1)
    bias = None if bias is None else dense(bias)
    r = residual if residual is not None else NOTHING
    given = g if g is not None else NOTHING
    kernel = _kernel(
        packed[1:],
        dtype,
        tuple(None if t is None else t.dtype for t in (x.tensor, bias, r.tensor, given.tensor, out.tensor, second)),
        config,
        stride,
        pad,
        border,
        normalization is not None,
        (x.pitch, x.shuffle, r.pitch, given.pitch, given.shuffle, out.pitch, out.shuffle),
        mode,
        activation,
        "none" if residual is None else residual_mode,
        second is not None,
        wide(x, out, residual, g),
        exact,
    )
    tiles_y, tiles_x = ceil_div(out.height, config.tile[0]), ceil_div(out.width, config.tile[1])
    kernel(
        (n * tiles_y * tiles_x, packed.columns // (packed.block_0 + packed.block_1)),
        x.tensor, packed.weight, bias, normalization, r.tensor, given.tensor, out.tensor, second,
        x.height, x.width, out.height, out.width, tiles_x, tiles_y, slope, x.batch, r.batch, given.batch, out.batch,
    )  # fmt: skip
