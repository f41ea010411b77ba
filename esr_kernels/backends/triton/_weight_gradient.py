"""Gradients of a convolution to its weight and bias: partial sums of disjoint tiles, then their sum in fixed order."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._convolution import reflect
from ._epilogue import channel_offsets, image_start, pixel_offsets
from .configs import Config, choose
from .launch import Kernel, ceil_div, next_power_of_two
from .maps import Map, precision, wide

# Programs along the pixels, and tiles for each at least. Both depend on nothing but the shape, so that results do not
# depend on the GPU's size.
_SPLITS = 128
_TILES = 4
_REDUCE = 128


@triton.jit
def weight_gradient_kernel(
    x,
    g,
    partial,  # [splits, TAPS * TAPS, K blocks * BLOCK_K, N blocks * BLOCK_N] float32
    partial_bias,  # [splits, N blocks * BLOCK_N] float32
    in_height,
    in_width,
    height,
    width,
    tiles_x,
    tiles_y,
    tiles,
    splits,
    x_batch,
    g_batch,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD: tl.constexpr,
    BORDER: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIPELINE: tl.constexpr,
    BIAS: tl.constexpr,
    X_PITCH: tl.constexpr,
    G_PITCH: tl.constexpr,
    G_SHUFFLE: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: every `splits`-th tile of pixels, one row of taps, BLOCK_K input and BLOCK_N output channels."""
    K_BLOCKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    N_BLOCKS: tl.constexpr = (OUT_CHANNELS + BLOCK_N - 1) // BLOCK_N
    split = tl.program_id(0)
    ky = tl.program_id(1) % TAPS
    block = tl.program_id(1) // TAPS
    k0 = block % K_BLOCKS * BLOCK_K
    n0 = block // K_BLOCKS * BLOCK_N
    p = tl.arange(0, TILE_H * TILE_W)
    k = k0 + tl.arange(0, BLOCK_K)[:, None]
    n = n0 + tl.arange(0, BLOCK_N)[None, :]
    pixels = height * width
    in_pixels = in_height * in_width
    x_channels = channel_offsets(k, in_pixels, in_width, X_PITCH, 1, WIDE)
    g_channels = channel_offsets(n, pixels, width, G_PITCH, G_SHUFFLE, WIDE)

    acc0 = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    acc1 = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    acc2 = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    bias = tl.zeros([BLOCK_N], tl.float32)
    for tile in tl.range(split, tiles, splits, num_stages=PIPELINE):
        image = (tile // (tiles_x * tiles_y)).to(tl.int64)
        oy = tile // tiles_x % tiles_y * TILE_H + p // TILE_W
        ox = tile % tiles_x * TILE_W + p % TILE_W
        inside = (oy < height) & (ox < width)
        g_pixels = pixel_offsets(oy, ox, width, G_PITCH, G_SHUFFLE, WIDE)[:, None]
        gradient = tl.load(
            g + image_start(image, g_batch, G_PITCH) + (g_pixels + g_channels),
            mask=inside[:, None] & (n < OUT_CHANNELS),
            other=0.0,
        )  # [P, BLOCK_N]
        if BIAS:
            bias += tl.sum(gradient.to(tl.float32), 0)
        gradient = gradient.to(x.dtype.element_ty)
        start = x + image_start(image, x_batch, X_PITCH)
        for kx in tl.static_range(0, TAPS):
            iy = oy * STRIDE - PAD + ky
            ix = ox * STRIDE - PAD + kx
            if BORDER == "reflect":
                iy = reflect(iy, in_height)
                ix = reflect(ix, in_width)
                ok = inside
            else:
                ok = inside & (iy >= 0) & (iy < in_height) & (ix >= 0) & (ix < in_width)
            x_pixels = pixel_offsets(iy, ix, in_width, X_PITCH, 1, WIDE)[None, :]
            a = tl.load(start + (x_pixels + x_channels), mask=ok[None, :] & (k < CHANNELS), other=0.0)  # [BLOCK_K, P]
            if kx == 0:
                acc0 = tl.dot(a, gradient, acc0, input_precision=PRECISION)
            elif kx == 1:
                acc1 = tl.dot(a, gradient, acc1, input_precision=PRECISION)
            else:
                acc2 = tl.dot(a, gradient, acc2, input_precision=PRECISION)

    row: tl.constexpr = N_BLOCKS * BLOCK_N
    size: tl.constexpr = K_BLOCKS * BLOCK_K * row
    out = partial + (split.to(tl.int64) * TAPS + ky) * (TAPS * size) + (k * row + n)
    tl.store(out, acc0)
    if TAPS > 1:
        tl.store(out + size, acc1)
        tl.store(out + 2 * size, acc2)
    if BIAS and ((ky == 0) & (k0 == 0)):
        tl.store(partial_bias + split * row + n0 + tl.arange(0, BLOCK_N), bias)


@triton.jit
def reduce_kernel(
    partial,
    partial_bias,
    gw,
    gb,
    splits,
    channels,
    out_channels,
    rows,
    columns,
    taps_x,
    size,
    weight_programs,
    stride_k,
    stride_n,
    stride_y,
    stride_x,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """gw[n, k, tap] = sum over splits; programs from `weight_programs` on sum the bias' gradient."""
    program = tl.program_id(0)
    s = tl.arange(0, SPLITS)[:, None]
    total = tl.zeros([BLOCK], tl.float32)
    if program < weight_programs:
        if WEIGHT:
            e = program * BLOCK + tl.arange(0, BLOCK)
            for first in range(0, splits, SPLITS):
                at = (first + s).to(tl.int64) * size + e[None, :]
                value = tl.load(partial + at, mask=(first + s < splits) & (e[None, :] < size), other=0.0)
                total += tl.sum(value, 0)
            n = e % columns
            k = e // columns % rows
            tap = e // (columns * rows)
            ok = (n < out_channels) & (k < channels) & (e < size)
            out = gw + k * stride_k + n * stride_n + tap // taps_x * stride_y + tap % taps_x * stride_x
            tl.store(out, total.to(gw.dtype.element_ty), mask=ok)
    else:
        if BIAS:
            n = (program - weight_programs) * BLOCK + tl.arange(0, BLOCK)
            for first in range(0, splits, SPLITS):
                at = (first + s) * columns + n[None, :]
                value = tl.load(partial_bias + at, mask=(first + s < splits) & (n[None, :] < columns), other=0.0)
                total += tl.sum(value, 0)
            tl.store(gb + n, total.to(gb.dtype.element_ty), mask=n < out_channels)


def _blocks(channels: int, out_channels: int, dtype: torch.dtype, exact: str) -> tuple[int, int]:
    """Input and output channels of a program; three products for each of float32 leave registers for half as many."""

    def block(channels: int, largest: int) -> int:
        return min(largest, max(16, next_power_of_two(channels)))

    return block(channels, 64), block(out_channels, 32 if dtype == torch.float32 and exact != "tf32" else 64)


@lru_cache(maxsize=1024)
def _kernel(
    channels: int,
    out_channels: int,
    taps: int,
    stride: int,
    pad: int,
    border: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    bias: bool,
    maps: tuple[int, ...],
    config: Config,
    is_wide: bool,
    exact: str,
) -> Kernel:
    block_k, block_n = _blocks(channels, out_channels, dtypes[0], exact)
    sums = {
        "CHANNELS": channels,
        "OUT_CHANNELS": out_channels,
        "TAPS": taps,
        "STRIDE": stride,
        "PAD": pad,
        "BORDER": border,
        "TILE_H": config.tile[0],
        "TILE_W": config.tile[1],
        "BLOCK_K": block_k,
        "BLOCK_N": block_n,
        "PIPELINE": config.pipeline,
        "BIAS": bias,
        "X_PITCH": maps[0],
        "G_PITCH": maps[1],
        "G_SHUFFLE": maps[2],
        "WIDE": is_wide,
        "PRECISION": exact,
    }
    return Kernel(weight_gradient_kernel, sums, config.warps, config.registers)


@lru_cache(maxsize=64)
def _reduction(weight: torch.dtype | None, bias: torch.dtype | None) -> Kernel:
    constants = {"WEIGHT": weight is not None, "BIAS": bias is not None, "BLOCK": _REDUCE, "SPLITS": 16}
    return Kernel(reduce_kernel, constants, 4)


def weight_gradient(
    x: Map,
    g: Map,
    gw: Tensor | None,
    gb: Tensor | None,
    *,
    taps: int = 3,
    stride: int = 1,
    pad: int = 1,
    border: str = "zeros",
) -> None:
    """Write the gradients of a convolution of `x` whose result has the gradient `g`.

    Args:
        gw: [O, C, taps, taps], any strides, or None.
        gb: [O], or None.
    """
    if gw is None and gb is None:
        return
    channels, out_channels = x.channels, g.channels
    dtype, exact = x.tensor.dtype, precision(x.tensor.dtype)
    block_k, block_n = _blocks(channels, out_channels, dtype, exact)
    config = choose("weight_gradient", dtype, exact, block_k, block_n)
    sums = _kernel(
        channels,
        out_channels,
        taps,
        stride,
        pad,
        border,
        (x.tensor.dtype, g.tensor.dtype),
        gb is not None,
        (x.pitch, g.pitch, g.shuffle),
        config,
        wide(x, g),
        exact,
    )
    tiles_y, tiles_x = ceil_div(g.height, config.tile[0]), ceil_div(g.width, config.tile[1])
    tiles = g.tensor.shape[0] * tiles_y * tiles_x
    splits = min(_SPLITS, ceil_div(tiles, _TILES))
    k_blocks, n_blocks = ceil_div(channels, block_k), ceil_div(out_channels, block_n)
    rows, columns = k_blocks * block_k, n_blocks * block_n
    size = taps * taps * rows * columns
    partial = x.tensor.new_empty(splits * size, dtype=torch.float32)
    partial_bias = x.tensor.new_empty(splits * columns, dtype=torch.float32)
    programs = taps * k_blocks * n_blocks
    sums(
        (splits, programs), x.tensor, g.tensor, partial, partial_bias,
        x.height, x.width, g.height, g.width, tiles_x, tiles_y, tiles, splits, x.batch, g.batch,
    )  # fmt: skip
    reduce_parts(partial, partial_bias, gw, gb, splits, channels, out_channels, rows, columns, (taps, taps))


def reduce_parts(
    partial: Tensor,
    partial_bias: Tensor,
    gw: Tensor | None,
    gb: Tensor | None,
    splits: int,
    channels: int,
    out_channels: int,
    rows: int,
    columns: int,
    taps: tuple[int, int],
) -> None:
    """Write the sums of partial[splits, taps, rows, columns] and partial_bias[splits, columns], in fixed order.

    Args:
        gw: [out_channels, channels, *taps], any strides, or None.
        gb: [out_channels], or None.
    """
    strides = (0, 0, 0, 0)
    if gw is not None:
        stride_n, stride_k, stride_y, stride_x = gw.stride()
        strides = (stride_k, stride_n, stride_y, stride_x)
    size = taps[0] * taps[1] * rows * columns
    weight_programs = 0 if gw is None else ceil_div(size, _REDUCE)
    bias_programs = 0 if gb is None else ceil_div(columns, _REDUCE)
    reduction = _reduction(None if gw is None else gw.dtype, None if gb is None else gb.dtype)
    reduction(
        (weight_programs + bias_programs, 1), partial, partial_bias, gw, gb, splits, channels, out_channels, rows,
        columns, taps[1], size, weight_programs, *strides,
    )  # fmt: skip
