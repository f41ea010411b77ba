"""Statistics of every channel over an image in two launches: of parts of it, then of all parts in a fixed order.

How an image is cut depends on its size and the configuration: neither on the GPU's size, nor on a batch's other images.
Squares are of what is left of values after the image's origin: a mean rounded to float32 would be too far off where
values differ less than it does.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ._epilogue import channel_offsets, image_start, pixel_offsets
from ._windows import largest
from .configs import Config, choose
from .launch import Kernel, ceil_div, next_power_of_two
from .maps import Map, padded, precision, wide
from .recording import empty

# What is gathered of pixels for each kind: sums, maxima, or means and sums of squared differences from them.
_GATHERED = {"mean": "sums", "maximum": "maxima"}
# So many reads of a lane are under way at once.
_AHEAD = 4
_MOST_PARTS = 1024


@triton.jit
def _origin(x, known, height, width, X_PITCH: tl.constexpr, WIDE: tl.constexpr):
    """A value like those of an image whose channels begin at `x`: the median of three pixels, so that none that stands
    out alone is taken."""
    first = tl.load(x, mask=known, other=0.0).to(tl.float32)
    at = pixel_offsets(height // 2, width // 2, width, X_PITCH, 1, WIDE)
    middle = tl.load(x + at, mask=known, other=0.0).to(tl.float32)
    at = pixel_offsets(height - 1, width - 1, width, X_PITCH, 1, WIDE)
    last = tl.load(x + at, mask=known, other=0.0).to(tl.float32)
    return tl.maximum(tl.minimum(first, middle), tl.minimum(tl.maximum(first, middle), last))


@triton.jit
def statistic_parts_kernel(
    x,
    partial,  # [n, parts, 1 or 2, CHANNELS] float32, what was gathered of each
    height, width, steps, parts, groups, x_batch, partial_batch,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, AHEAD: tl.constexpr, MODE: tl.constexpr,
    X_PITCH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK channels of a part; MODE is what it gathers. "moments" by Welford's recurrence in each lane,
    then by that of Chan, Golub and LeVeque for sets of numbers.
    """
    AXIS: tl.constexpr = 1 if X_PITCH == 0 else 0  # of the lanes; neighbours in memory are neighbours
    SETS: tl.constexpr = 2 if MODE == "moments" else 1
    pixels = height * width
    program = tl.program_id(0)
    n = (program // groups // parts).to(tl.int64)
    part = program // groups % parts
    channels = program % groups * BLOCK + tl.arange(0, BLOCK)
    channel = tl.expand_dims(channels, AXIS)
    known = channel < CHANNELS
    lane = tl.expand_dims(tl.arange(0, LANES), 1 - AXIS)
    x += image_start(n, x_batch, X_PITCH)
    at = channel_offsets(channel, pixels, pixels, X_PITCH, 1, WIDE)
    first = part
    if WIDE:
        first = part.to(tl.int64)
    first = first * (steps * AHEAD * LANES)
    none = 0.0
    if MODE == "maxima":
        none = float("-inf")
    kept = tl.full((channel + lane).shape, none, tl.float32)
    if MODE == "moments":
        origin = _origin(x + at, known, height, width, X_PITCH, WIDE)
        squares = tl.zeros((channel + lane).shape, tl.float32)
        count = tl.zeros(lane.shape, tl.float32)
    for i in range(0, steps):
        for j in tl.static_range(AHEAD):
            pixel = first + (i * AHEAD + j) * LANES + lane
            inside = pixel < pixels
            offsets = pixel_offsets(0, pixel, pixels, X_PITCH, 1, WIDE) + at
            value = tl.load(x + offsets, mask=inside & known, other=none).to(tl.float32)
            if MODE == "sums":
                kept += value
            elif MODE == "maxima":
                kept = tl.maximum(kept, value, propagate_nan=tl.PropagateNan.ALL)
            else:
                count += inside.to(tl.float32)
                value -= origin
                apart = tl.where(inside, value - kept, 0.0)
                kept += apart * (1.0 / tl.maximum(count, 1.0))
                squares += apart * (value - kept)
    ok = channels < CHANNELS
    partial += n * partial_batch + part * (SETS * CHANNELS) + channels
    if MODE == "sums":
        tl.store(partial, tl.sum(kept, AXIS), mask=ok)
    elif MODE == "maxima":
        tl.store(partial, largest(kept, AXIS), mask=ok)
    else:
        here = tl.minimum(pixels - first, steps * AHEAD * LANES).to(tl.float32)
        mean = tl.div_rn(tl.sum(count * kept, AXIS), here)
        apart = kept - tl.expand_dims(mean, AXIS)
        tl.store(partial, mean, mask=ok)
        tl.store(partial + CHANNELS, tl.sum(squares + count * apart * apart, AXIS), mask=ok)


@triton.jit
def statistic_kernel(
    x, partial, out, height, width, part_pixels, parts, groups, divisor, x_batch, partial_batch, out_batch,
    CHANNELS: tl.constexpr, STORED: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, MODE: tl.constexpr,
    X_PITCH: tl.constexpr, OUT_PITCH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The statistic MODE of BLOCK channels of an image from what was gathered of its parts, zeros in channels up to
    STORED. Squares are divided by `divisor`.
    """
    SETS: tl.constexpr = 1 if MODE == "mean" or MODE == "maximum" else 2
    pixels = height * width
    n = (tl.program_id(0) // groups).to(tl.int64)
    channels = tl.program_id(0) % groups * BLOCK + tl.arange(0, BLOCK)
    channel = channels[None, :]
    known = channel < CHANNELS
    lane = tl.arange(0, LANES)[:, None]
    partial += n * partial_batch
    none = 0.0
    if MODE == "maximum":
        none = float("-inf")
    kept = tl.full((channel + lane).shape, none, tl.float32)
    for i in range(0, parts, LANES):
        part = i + lane
        ok = (part < parts) & known
        value = tl.load(partial + (part * (SETS * CHANNELS) + channel), mask=ok, other=none)
        if MODE == "maximum":
            kept = tl.maximum(kept, value, propagate_nan=tl.PropagateNan.ALL)
        elif MODE == "mean":
            kept += value
        else:
            here = tl.minimum(pixels - part * part_pixels, part_pixels).to(tl.float32)
            kept += tl.where(ok, here * value, 0.0)
    if MODE == "maximum":
        result = largest(kept, 0)
    else:
        mean = tl.div_rn(tl.sum(kept, 0), pixels.to(tl.float32))
        result = mean
        if SETS == 2:
            squares = tl.zeros((channel + lane).shape, tl.float32)
            for i in range(0, parts, LANES):
                part = i + lane
                ok = (part < parts) & known
                at = partial + (part * (SETS * CHANNELS) + channel)
                apart = tl.load(at, mask=ok, other=0.0) - mean[None, :]
                here = tl.minimum(pixels - part * part_pixels, part_pixels).to(tl.float32)
                value = tl.load(at + CHANNELS, mask=ok, other=0.0)
                squares += tl.where(ok, value + here * apart * apart, 0.0)
            result = tl.div_rn(tl.sum(squares, 0), divisor.to(tl.float32))
            if MODE != "variance":
                result = tl.sqrt_rn(result)
            if MODE == "contrast":
                x += image_start(n, x_batch, X_PITCH)
                x += channel_offsets(channels, pixels, pixels, X_PITCH, 1, WIDE)
                result += _origin(x, channels < CHANNELS, height, width, X_PITCH, WIDE) + mean
    if STORED > CHANNELS:
        result = tl.where(channels < CHANNELS, result, 0.0)
    out += image_start(n, out_batch, OUT_PITCH) + channels
    tl.store(out, result.to(out.dtype.element_ty), mask=channels < STORED)


@lru_cache(maxsize=256)
def _parts_kernel(
    channels: int, block: int, lanes: int, gathered: str, pitch: int, dtype: torch.dtype, config: Config, is_wide: bool
) -> Kernel:
    constants = {
        "CHANNELS": channels,
        "BLOCK": block,
        "LANES": lanes,
        "AHEAD": _AHEAD,
        "MODE": gathered,
        "X_PITCH": pitch,
        "WIDE": is_wide,
    }
    return Kernel(statistic_parts_kernel, constants, config.warps, config.registers)


@lru_cache(maxsize=256)
def _kernel(
    channels: int,
    stored: int,
    block: int,
    lanes: int,
    kind: str,
    pitches: tuple[int, int],
    dtype: torch.dtype,
    config: Config,
    is_wide: bool,
) -> Kernel:
    constants = {
        "CHANNELS": channels,
        "STORED": stored,
        "BLOCK": block,
        "LANES": lanes,
        "MODE": kind,
        "X_PITCH": pitches[0],
        "OUT_PITCH": pitches[1],
        "WIDE": is_wide,
    }
    return Kernel(statistic_kernel, constants, config.warps, config.registers)


def compute(x: Map, out: Map, kind: str, correction: int) -> None:
    """Write a statistic of `plan.STATISTICS` of x, which has pixels, to a map of one; `correction` as a plan has it."""
    n, pixels, dtype = x.tensor.shape[0], x.height * x.width, x.tensor.dtype
    config = choose("statistic", dtype, precision(dtype), 16, padded(x.channels))
    # Of one program; few channels leave more lanes for each.
    block = min(next_power_of_two(x.channels), config.tile[1])
    lanes = config.pixels // block
    steps = ceil_div(pixels, _MOST_PARTS * _AHEAD * lanes)
    part_pixels = steps * _AHEAD * lanes
    parts = ceil_div(pixels, part_pixels)
    gathered = _GATHERED.get(kind, "moments")
    size = parts * (2 if gathered == "moments" else 1) * x.channels
    partial = empty(x.tensor, (n, size), torch.float32)
    is_wide = wide(x, largest=parts * part_pixels)
    groups = ceil_div(x.channels, block)
    _parts_kernel(x.channels, block, lanes, gathered, x.pitch, dtype, config, is_wide)(
        (n * parts * groups, 1), x.tensor, partial, x.height, x.width, steps, parts, groups, x.batch, size
    )
    groups = ceil_div(out.stored, block)
    _kernel(x.channels, out.stored, block, lanes, kind, (x.pitch, out.pitch), dtype, config, is_wide)(
        (n * groups, 1), x.tensor, partial, out.tensor, x.height, x.width, part_pixels, parts, groups,
        pixels - correction, x.batch, size, out.batch,
    )  # fmt: skip
