"""x times an activation of the sum of maps that are resized to it, in one launch.

A map is read at its own resolution, through the first-level cache; nothing resized is in memory. Backward has one
launch that sums the maps again, and one for each resized map, whose pixels collect what is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...library import feature_map, gradient, memory_format
from ._epilogue import activate, channel_offsets, derivative, image_start
from ._resize import resize_gradient, resized
from ._windows import locate, tile_offsets, tiles
from .configs import Config, choose
from .launch import Kernel, repeated
from .maps import NOTHING, Map, as_map, padded, precision, wide

# Maps that a launch reads, which is as many as the operator takes.
MAPS = 8


@triton.jit
def _map(
    m, n, batch, y, e, x, channel, ok, height, width, low_height, low_width,
    PITCH: tl.constexpr, RESIZED: tl.constexpr, BLEND: tl.constexpr, CHANNELS: tl.constexpr, PLANAR: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The values [TILE_H, TILE_W] of one map."""
    m += image_start(n, batch, PITCH)
    if RESIZED:
        m += channel_offsets(channel, low_height * low_width, low_width, PITCH, 1, WIDE)
        value = resized(m, y, x, ok, height, width, low_height, low_width, PITCH, BLEND, WIDE)
    else:
        offsets = tile_offsets(y, e, x, channel, height, width, CHANNELS, PLANAR, PITCH, WIDE)
        value = tl.load(m + offsets, mask=ok, other=0.0).to(tl.float32)
    return value


@triton.jit
def modulate_kernel(
    x, g, m0, m1, m2, m3, m4, m5, m6, m7, out, to_sum, height, width, tiles_x, tiles_y, slope,
    h0, h1, h2, h3, h4, h5, h6, h7, w0, w1, w2, w3, w4, w5, w6, w7,
    m0_batch, m1_batch, m2_batch, m3_batch, m4_batch, m5_batch, m6_batch, m7_batch,
    x_batch, g_batch, out_batch, to_sum_batch,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
    P4: tl.constexpr, P5: tl.constexpr, P6: tl.constexpr, P7: tl.constexpr,
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,
    R4: tl.constexpr, R5: tl.constexpr, R6: tl.constexpr, R7: tl.constexpr,
    COUNT: tl.constexpr, CHANNELS: tl.constexpr, STORED: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    MODE: tl.constexpr, TO_X: tl.constexpr, TO_SUM: tl.constexpr, ACTIVATION: tl.constexpr, BLEND: tl.constexpr,
    PLANAR: tl.constexpr, X_PITCH: tl.constexpr, G_PITCH: tl.constexpr, OUT_PITCH: tl.constexpr,
    SUM_PITCH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """MODE "forward": out = x * act(sum of COUNT maps), zeros in channels up to STORED. "gradient": from that of the
    result with TO_X the one to x in `out`, with TO_SUM the one to the sum. P are the maps' pitches, R says which have
    another size than x.
    """
    n, y, e, column, channel, ok = locate(
        tiles_x, tiles_y, height, width, STORED, TILE_H, TILE_W, PLANAR, WIDE
    )  # fmt: skip
    stored = ok
    if STORED > CHANNELS:
        ok = ok & (channel < CHANNELS)
    total = _map(m0, n, m0_batch, y, e, column, channel, ok, height, width, h0, w0, P0, R0, BLEND, STORED, PLANAR, WIDE)  # fmt: skip  # noqa: E501
    if COUNT > 1:
        total += _map(m1, n, m1_batch, y, e, column, channel, ok, height, width, h1, w1, P1, R1, BLEND, STORED, PLANAR, WIDE)  # fmt: skip  # noqa: E501
    if COUNT > 2:
        total += _map(m2, n, m2_batch, y, e, column, channel, ok, height, width, h2, w2, P2, R2, BLEND, STORED, PLANAR, WIDE)  # fmt: skip  # noqa: E501
    if COUNT > 3:
        total += _map(m3, n, m3_batch, y, e, column, channel, ok, height, width, h3, w3, P3, R3, BLEND, STORED, PLANAR, WIDE)  # fmt: skip  # noqa: E501
    if COUNT > 4:
        total += _map(m4, n, m4_batch, y, e, column, channel, ok, height, width, h4, w4, P4, R4, BLEND, STORED, PLANAR, WIDE)  # fmt: skip  # noqa: E501
    if COUNT > 5:
        total += _map(m5, n, m5_batch, y, e, column, channel, ok, height, width, h5, w5, P5, R5, BLEND, STORED, PLANAR, WIDE)  # fmt: skip  # noqa: E501
    if COUNT > 6:
        total += _map(m6, n, m6_batch, y, e, column, channel, ok, height, width, h6, w6, P6, R6, BLEND, STORED, PLANAR, WIDE)  # fmt: skip  # noqa: E501
    if COUNT > 7:
        total += _map(m7, n, m7_batch, y, e, column, channel, ok, height, width, h7, w7, P7, R7, BLEND, STORED, PLANAR, WIDE)  # fmt: skip  # noqa: E501
    if MODE == "forward" or TO_SUM:
        offsets = tile_offsets(y, e, column, channel, height, width, STORED, PLANAR, X_PITCH, WIDE)
        value = tl.load(x + image_start(n, x_batch, X_PITCH) + offsets, mask=ok, other=0.0).to(tl.float32)
    if MODE == "gradient":
        offsets = tile_offsets(y, e, column, channel, height, width, STORED, PLANAR, G_PITCH, WIDE)
        given = tl.load(g + image_start(n, g_batch, G_PITCH) + offsets, mask=ok, other=0.0).to(tl.float32)
    if TO_SUM:
        offsets = tile_offsets(y, e, column, channel, height, width, STORED, PLANAR, SUM_PITCH, WIDE)
        through = given * value * derivative(total, slope, ACTIVATION)
        to_sum += image_start(n, to_sum_batch, SUM_PITCH)
        tl.store(to_sum + offsets, through.to(to_sum.dtype.element_ty), mask=ok)
    if TO_X:
        result = activate(total, slope, ACTIVATION)
        if MODE == "forward":
            result *= value
        else:
            result *= given
        offsets = tile_offsets(y, e, column, channel, height, width, STORED, PLANAR, OUT_PITCH, WIDE)
        out += image_start(n, out_batch, OUT_PITCH)
        tl.store(out + offsets, result.to(out.dtype.element_ty), mask=stored)


@lru_cache(maxsize=1024)
def _kernel(
    channels: int,
    stored: int,
    pitches: tuple[int, ...],
    resizes: tuple[bool, ...],
    mode: str,
    activation: str,
    bilinear: bool,
    planar: bool,
    maps: tuple[int, int, int, int],
    dtypes: tuple[Any, ...],
    config: Config,
    is_wide: bool,
) -> Kernel:
    missing = MAPS - len(pitches)
    constants: dict[str, Any] = {f"P{i}": p for i, p in enumerate((*pitches, *(0,) * missing))}
    constants |= {f"R{i}": r for i, r in enumerate((*resizes, *(False,) * missing))}
    constants |= {
        "COUNT": len(pitches),
        "CHANNELS": channels,
        "STORED": stored,
        "TILE_H": config.tile[0],
        "TILE_W": config.tile[1],
        "MODE": mode,
        "TO_X": dtypes[2] is not None,
        "TO_SUM": dtypes[3] is not None,
        "ACTIVATION": activation,
        "BLEND": bilinear,
        "PLANAR": planar,
        "X_PITCH": maps[0],
        "G_PITCH": maps[1],
        "OUT_PITCH": maps[2],
        "SUM_PITCH": maps[3],
        "WIDE": is_wide,
    }
    return Kernel(modulate_kernel, constants, config.warps, config.registers)


def apply(
    x: Map,
    maps: Sequence[Map],
    out: Map | None,
    *,
    bilinear: bool,
    activation: str,
    slope: float,
    g: Map | None = None,
    to_sum: Map | None = None,
) -> None:
    """Write the operator's result, or from the gradient `g` to it what is there of the ones to x and to the sum.

    Raises:
        ValueError: there are more maps than a launch reads.
    """
    if len(maps) > MAPS:
        raise ValueError(f"maps: expected 1 to {MAPS} tensors, got {len(maps)}")
    dtype, channels = x.tensor.dtype, x.channels
    # A program's elements lie together in what it writes.
    written = out or to_sum or x
    planar = written.pitch == 0
    name = "modulate" if g is None else "modulate_gradient"
    config = choose(name, dtype, precision(dtype), 16 * len(maps), padded(channels))
    others = [NOTHING if m is None else m for m in (g, out, to_sum)]
    tensors = (x.tensor, *(m.tensor for m in others), *(m.tensor for m in maps))
    # The channels that fill up a map of a plan.
    stored = written.stored if g is None else channels
    kernel = _kernel(
        channels,
        stored,
        tuple(m.pitch for m in maps),
        tuple((m.height, m.width) != (x.height, x.width) for m in maps),
        "forward" if g is None else "gradient",
        activation,
        bilinear,
        planar,
        (x.pitch, others[0].pitch, others[1].pitch, others[2].pitch),
        tuple(None if t is None else t.dtype for t in tensors),
        config,
        wide(x, *maps, g, out, to_sum),
    )
    tiles_x, tiles_y = tiles(x._replace(channels=stored), config.tile, planar)
    missing = MAPS - len(maps)
    nothing, none = (None,) * missing, (1,) * missing
    kernel(
        (x.tensor.shape[0] * tiles_y * tiles_x, 1), x.tensor, others[0].tensor,
        *(m.tensor for m in maps), *nothing, others[1].tensor, others[2].tensor, x.height, x.width, tiles_x, tiles_y,
        slope, *(m.height for m in maps), *none, *(m.width for m in maps), *none, *(m.batch for m in maps), *none,
        x.batch, *(m.batch for m in others),
    )  # fmt: skip


@repeated
def modulate(x: Tensor, maps: list[Tensor], mode: str, activation: str, negative_slope: float) -> Tensor:
    out = feature_map(x, x.shape[1])
    if out.numel():
        apply(
            as_map(x), [as_map(t) for t in maps], as_map(out), bilinear=mode == "bilinear", activation=activation,
            slope=negative_slope,
        )  # fmt: skip
    return out


def modulate_backward(
    grad: Tensor,
    x: Tensor,
    maps: list[Tensor],
    mode: str,
    activation: str,
    negative_slope: float,
    output_mask: list[bool],
) -> list[Tensor]:
    """Gradients to x and to each map; the sum is computed again, not stored."""
    gradients = [gradient(t, wanted) for t, wanted in zip((x, *maps), output_mask, strict=True)]
    if not x.numel() or not any(output_mask):
        return gradients
    gx, *to_maps = (as_map(t) if asked else None for t, asked in zip(gradients, output_mask, strict=True))
    wanted = [m for m in to_maps if m is not None]
    same = [m for m in wanted if (m.height, m.width) == x.shape[2:]]
    small = [m for m in wanted if (m.height, m.width) != x.shape[2:]]
    to_sum = same[0] if same else None
    if small and (to_sum is None or x.dtype != torch.float32):
        # Many of its elements are added up for one of a small map.
        to_sum = as_map(torch.empty(x.shape, dtype=torch.float32, device=x.device, memory_format=memory_format(x)))
    settings: dict[str, Any] = {"bilinear": mode == "bilinear", "activation": activation, "slope": negative_slope}
    apply(as_map(x), [as_map(t) for t in maps], gx, g=as_map(grad), to_sum=to_sum, **settings)
    if to_sum is not None:
        for m in same:
            if m is not to_sum:
                m.tensor.copy_(to_sum.tensor)
        for m in small:
            resize_gradient(to_sum, m, bilinear=mode == "bilinear")
    return gradients
