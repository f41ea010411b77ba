"""What a plan has between fused layers: the sum of two maps, and (x - shift) * scale per channel."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._epilogue import channel_offsets, image_start, pixel_offsets
from .launch import Kernel, ceil_div
from .maps import NOTHING, Map, padded, wide

_BLOCK = 1024


@triton.jit
def pointwise_kernel(
    x, y, normalization, out, pixels, size, tiles, x_batch, y_batch, out_batch,
    CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr,
    X_PITCH: tl.constexpr, Y_PITCH: tl.constexpr, OUT_PITCH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out = (x - normalization[0]) * normalization[1], or x + y; zeros in channels up to COLUMNS."""
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
    offsets = offsets + channel_offsets(channel, pixels, pixels, X_PITCH, 1, WIDE)
    value = tl.load(x + offsets, mask=known, other=0.0).to(tl.float32)
    if NORMALIZE:
        shift = tl.load(normalization + channel, mask=known, other=0.0)
        value = (value - shift) * tl.load(normalization + CHANNELS + channel, mask=known, other=0.0)
    else:
        y += image_start(n, y_batch, Y_PITCH)
        offsets = pixel_offsets(0, pixel, pixels, Y_PITCH, 1, WIDE)
        offsets = offsets + channel_offsets(channel, pixels, pixels, Y_PITCH, 1, WIDE)
        value += tl.load(y + offsets, mask=known, other=0.0).to(tl.float32)
    out += image_start(n, out_batch, OUT_PITCH)
    offsets = pixel_offsets(0, pixel, pixels, OUT_PITCH, 1, WIDE)
    offsets = offsets + channel_offsets(channel, pixels, pixels, OUT_PITCH, 1, WIDE)
    tl.store(out + offsets, value.to(out.dtype.element_ty), mask=ok)


@lru_cache(maxsize=256)
def _kernel(
    channels: int, normalize: bool, pitches: tuple[int, int, int], is_wide: bool, dtypes: tuple[torch.dtype, ...]
) -> Kernel:
    columns = padded(channels)
    constants = {
        "CHANNELS": channels,
        "COLUMNS": columns if pitches[2] >= columns else channels,
        "BLOCK": _BLOCK,
        "NORMALIZE": normalize,
        "X_PITCH": pitches[0],
        "Y_PITCH": pitches[1],
        "OUT_PITCH": pitches[2],
        "WIDE": is_wide,
    }
    return Kernel(pointwise_kernel, constants, 4)


def _launch(x: Map, y: Map | None, normalization: Tensor | None, out: Map) -> None:
    second = y if y is not None else NOTHING
    dtypes = tuple(t.dtype for t in (x.tensor, second.tensor, out.tensor) if t is not None)
    kernel = _kernel(x.channels, normalization is not None, (x.pitch, second.pitch, out.pitch), wide(x, y, out), dtypes)
    columns = padded(x.channels)
    pixels = out.height * out.width
    size = pixels * (columns if out.pitch >= columns else x.channels)
    tiles = ceil_div(size, _BLOCK)
    kernel(
        (out.tensor.shape[0] * tiles, 1), x.tensor, second.tensor, normalization, out.tensor, pixels, size, tiles,
        x.batch, second.batch, out.batch,
    )  # fmt: skip


def add(x: Map, y: Map, out: Map) -> None:
    """out = x + y."""
    _launch(x, y, None, out)


def normalize(x: Map, normalization: Tensor, out: Map) -> None:
    """out = (x - normalization[0]) * normalization[1], float32 [2, channels]."""
    _launch(x, None, normalization, out)
