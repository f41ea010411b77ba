"""Layer normalisation over the channels of every pixel, read and written once.

A program holds all channels of its pixels in registers: mean and variance are sums of what is already there.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...library import feature_map, norm_gradients
from ._epilogue import channel_offsets, image_start, pixel_offsets
from ._weight_gradient import reduce_parts
from .configs import Config, choose
from .conv3x3 import wanted
from .launch import Kernel, ceil_div, next_power_of_two, repeated
from .maps import Map, as_map, padded, precision, wide
from .recording import dense

# Values of a program at most, so that many channels leave room for fewer pixels.
_VALUES = {"layer_norm": 4096, "layer_norm_gradient": 2048}
# Parts of the gradients to weight and bias; the number depends on nothing but the shape.
_SPLITS = 512


@triton.jit
def _normalized(x, known, eps, CHANNELS: tl.constexpr):
    """x [P, C] without mean and with unit variance, and the reciprocal deviation [P, 1]; unknown channels are zeros."""
    centred = tl.where(known, x - (tl.sum(x, 1) / CHANNELS)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / CHANNELS + eps)[:, None]
    return centred * scale, scale


@triton.jit
def layer_norm_kernel(
    x, weight, bias, out, pixels, tiles, eps, x_batch, out_batch,
    CHANNELS: tl.constexpr, STORED: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr, WEIGHT: tl.constexpr,
    BIAS: tl.constexpr, X_PITCH: tl.constexpr, OUT_PITCH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: PIXELS pixels with all their channels; zeros go to channels up to STORED."""
    n = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = tl.program_id(0) % tiles * PIXELS + tl.arange(0, PIXELS)[:, None]
    channel = tl.arange(0, BLOCK)[None, :]
    known = channel < CHANNELS
    inside = pixel < pixels
    offsets = pixel_offsets(0, pixel, pixels, X_PITCH, 1, WIDE)
    offsets = offsets + channel_offsets(channel, pixels, pixels, X_PITCH, 1, WIDE)
    x += image_start(n, x_batch, X_PITCH)
    value = tl.load(x + offsets, mask=inside & known, other=0.0).to(tl.float32)
    value, _ = _normalized(value, known, eps, CHANNELS)
    if WEIGHT:
        value *= tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)
    out += image_start(n, out_batch, OUT_PITCH)
    offsets = pixel_offsets(0, pixel, pixels, OUT_PITCH, 1, WIDE)
    offsets = offsets + channel_offsets(channel, pixels, pixels, OUT_PITCH, 1, WIDE)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=inside & (channel < STORED))


@triton.jit
def layer_norm_gradient_kernel(
    x,
    g,
    weight,
    gx,
    partial,  # [splits, BLOCK] float32
    partial_bias,  # [splits, BLOCK]
    pixels, tiles_in_image, tiles, splits, eps, x_batch, g_batch, gx_batch,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr, WEIGHT: tl.constexpr, TO_X: tl.constexpr,
    TO_WEIGHT: tl.constexpr, TO_BIAS: tl.constexpr, X_PITCH: tl.constexpr, G_PITCH: tl.constexpr,
    GX_PITCH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: every `splits`-th tile of pixels, normalised again instead of being stored."""
    split = tl.program_id(0)
    channel = tl.arange(0, BLOCK)[None, :]
    known = channel < CHANNELS
    if WEIGHT:
        factor = tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    to_weight = tl.zeros([PIXELS, BLOCK], tl.float32)
    to_bias = tl.zeros([PIXELS, BLOCK], tl.float32)
    for tile in tl.range(split, tiles, splits):
        n = (tile // tiles_in_image).to(tl.int64)
        pixel = tile % tiles_in_image * PIXELS + tl.arange(0, PIXELS)[:, None]
        ok = (pixel < pixels) & known
        offsets = pixel_offsets(0, pixel, pixels, G_PITCH, 1, WIDE)
        offsets = offsets + channel_offsets(channel, pixels, pixels, G_PITCH, 1, WIDE)
        given = tl.load(g + image_start(n, g_batch, G_PITCH) + offsets, mask=ok, other=0.0).to(tl.float32)
        offsets = pixel_offsets(0, pixel, pixels, X_PITCH, 1, WIDE)
        offsets = offsets + channel_offsets(channel, pixels, pixels, X_PITCH, 1, WIDE)
        value = tl.load(x + image_start(n, x_batch, X_PITCH) + offsets, mask=ok, other=0.0).to(tl.float32)
        value, scale = _normalized(value, known, eps, CHANNELS)
        if TO_WEIGHT:
            to_weight += tl.where(ok, given * value, 0.0)  # without eps, nothing there is a NaN
        if TO_BIAS:
            to_bias += given
        if TO_X:
            if WEIGHT:
                given *= factor
            mean = (tl.sum(given, 1) / CHANNELS)[:, None]
            along = (tl.sum(given * value, 1) / CHANNELS)[:, None]
            to_x = scale * (given - mean - value * along)
            offsets = pixel_offsets(0, pixel, pixels, GX_PITCH, 1, WIDE)
            offsets = offsets + channel_offsets(channel, pixels, pixels, GX_PITCH, 1, WIDE)
            tl.store(gx + image_start(n, gx_batch, GX_PITCH) + offsets, to_x.to(gx.dtype.element_ty), mask=ok)
    column = tl.arange(0, BLOCK)
    if TO_WEIGHT:
        tl.store(partial + (split * BLOCK + column), tl.sum(to_weight, 0))
    if TO_BIAS:
        tl.store(partial_bias + (split * BLOCK + column), tl.sum(to_bias, 0))


def _choose(kernel: str, dtype: torch.dtype, block: int) -> Config:
    config = choose(kernel, dtype, precision(dtype), 16, padded(block))
    return config._replace(tile=(1, min(config.pixels, max(1, _VALUES[kernel] // block))))


@lru_cache(maxsize=256)
def _kernel(
    channels: int, stored: int, dtypes: tuple[Any, ...], pitches: tuple[int, int], config: Config, is_wide: bool
) -> Kernel:
    constants = {
        "CHANNELS": channels,
        "STORED": stored,
        "BLOCK": next_power_of_two(stored),
        "PIXELS": config.pixels,
        "WEIGHT": dtypes[1] is not None,
        "BIAS": dtypes[2] is not None,
        "X_PITCH": pitches[0],
        "OUT_PITCH": pitches[1],
        "WIDE": is_wide,
    }
    return Kernel(layer_norm_kernel, constants, config.warps, config.registers)


def normalize(x: Map, weight: Tensor | None, bias: Tensor | None, out: Map, eps: float) -> None:
    """Write the operator's result."""
    channels, dtype = x.channels, x.tensor.dtype
    stored = out.stored
    config = _choose("layer_norm", dtype, next_power_of_two(stored))
    weight, bias = (None if t is None else dense(t) for t in (weight, bias))
    dtypes = tuple(None if t is None else t.dtype for t in (x.tensor, weight, bias, out.tensor))
    kernel = _kernel(channels, stored, dtypes, (x.pitch, out.pitch), config, wide(x, out))
    pixels = x.height * x.width
    tiles = ceil_div(pixels, config.pixels)
    kernel((x.tensor.shape[0] * tiles, 1), x.tensor, weight, bias, out.tensor, pixels, tiles, eps, x.batch, out.batch)


@lru_cache(maxsize=256)
def _gradient_kernel(
    channels: int, dtypes: tuple[Any, ...], pitches: tuple[int, int, int], config: Config, is_wide: bool
) -> Kernel:
    constants = {
        "CHANNELS": channels,
        "BLOCK": next_power_of_two(channels),
        "PIXELS": config.pixels,
        "WEIGHT": dtypes[2] is not None,
        "TO_X": dtypes[3] is not None,
        "TO_WEIGHT": dtypes[4] is not None,
        "TO_BIAS": dtypes[5] is not None,
        "X_PITCH": pitches[0],
        "G_PITCH": pitches[1],
        "GX_PITCH": pitches[2],
        "WIDE": is_wide,
    }
    return Kernel(layer_norm_gradient_kernel, constants, config.warps, config.registers)


@repeated
def layer_norm2d(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    out = feature_map(x, x.shape[1])
    if out.numel():
        normalize(as_map(x), weight, bias, as_map(out), eps)
    return out


def layer_norm2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, weight and bias; mean and variance are computed again."""
    gx, gw, gb = norm_gradients(x, weight, bias, output_mask)
    if x.shape[0] == 0:
        return gx, gw.zero_(), gb.zero_()
    to_x, to_weight, to_bias = wanted(gx), wanted(gw), wanted(gb)
    if to_x is None and to_weight is None and to_bias is None:
        return gx, gw, gb
    channels, dtype = x.shape[1], x.dtype
    block = next_power_of_two(channels)
    config = _choose("layer_norm_gradient", dtype, block)
    maps = [as_map(x), as_map(grad), as_map(x if to_x is None else to_x)]
    weight = None if weight is None else dense(weight)
    kernel = _gradient_kernel(
        channels,
        tuple(None if t is None else t.dtype for t in (x, grad, weight, to_x, to_weight, to_bias)),
        (maps[0].pitch, maps[1].pitch, maps[2].pitch),
        config,
        wide(*maps),
    )
    pixels = x.shape[2] * x.shape[3]
    tiles_in_image = ceil_div(pixels, config.pixels)
    tiles = x.shape[0] * tiles_in_image
    splits = tiles if to_weight is None and to_bias is None else min(_SPLITS, tiles)
    partial, partial_bias = (x.new_empty(splits * block, dtype=torch.float32) for _ in range(2))
    kernel(
        (splits, 1), maps[0].tensor, maps[1].tensor, weight, to_x, partial, partial_bias, pixels, tiles_in_image,
        tiles, splits, eps, *(m.batch for m in maps),
    )  # fmt: skip
    if to_weight is not None or to_bias is not None:
        to_weight = None if to_weight is None else to_weight.view(channels, 1, 1, 1)
        reduce_parts(partial, partial_bias, to_weight, to_bias, splits, 1, channels, 1, block, (1, 1))
    return gx, gw, gb
