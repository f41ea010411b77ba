"""The 1x1 convolution of a list of maps, which are never concatenated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._epilogue import channel_offsets, finish, image_start
from ._pointwise import combine
from .configs import Config, choose
from .launch import Kernel, ceil_div
from .maps import NOTHING, Map, padded, precision, wide
from .packing import PackedParts
from .recording import dense, empty

# Maps that one launch reads; a longer list is summed up in float32 from launch to launch.
PARTS = 8


@triton.jit
def _add_rows(
    acc0, acc1, pointers, w, k, inside, pixels, row0, first, MASKED: tl.constexpr, CHANNELS: tl.constexpr,
    PITCH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr, COLUMNS: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the product of BLOCK_K channels from channel `k` on."""
    channel = k + tl.arange(0, BLOCK_K)[None, :]
    at = pointers + channel_offsets(channel, pixels, pixels, PITCH, 1, WIDE)
    if MASKED:
        a = tl.load(at, mask=inside & (channel < CHANNELS), other=0.0)
    else:
        a = tl.load(at, mask=inside, other=0.0)
    a = a.to(w.dtype.element_ty)
    row = (row0 + k + tl.arange(0, BLOCK_K))[:, None] * COLUMNS + first
    acc0 = tl.dot(a, tl.load(w + row + tl.arange(0, BLOCK_0)[None, :]), acc0, input_precision=PRECISION)
    if BLOCK_1 > 0:
        b1 = tl.load(w + row + BLOCK_0 + tl.arange(0, BLOCK_1)[None, :])
        acc1 = tl.dot(a, b1, acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def _add_part(
    acc0, acc1, x, w, n, batch, pixel, inside, pixels, row0, first, CHANNELS: tl.constexpr, PITCH: tl.constexpr,
    BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr, COLUMNS: tl.constexpr, PIPELINE: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one map's product to the sums; `row0` is its first row of the packed weight."""
    ROWS: tl.constexpr = (CHANNELS + 15) // 16 * 16
    BLOCK_K: tl.constexpr = 64 if ROWS % 64 == 0 else 32 if ROWS % 32 == 0 else 16
    x += image_start(n, batch, PITCH)
    if PITCH > 0:
        pointers = x + pixel * PITCH
    else:
        pointers = x + pixel
    if PIPELINE > 1:
        # Unrolled, the loads of a long list in float32 are all moved to the front, and spill.
        for k in tl.range(0, ROWS, BLOCK_K, num_stages=PIPELINE):
            acc0, acc1 = _add_rows(
                acc0, acc1, pointers, w, k, inside, pixels, row0, first, ROWS > PITCH and ROWS > CHANNELS, CHANNELS,
                PITCH, BLOCK_K, BLOCK_0, BLOCK_1, COLUMNS, WIDE, PRECISION,
            )  # fmt: skip
    else:
        for k in tl.static_range(0, ROWS, BLOCK_K):
            acc0, acc1 = _add_rows(
                acc0, acc1, pointers, w, k, inside, pixels, row0, first, ROWS > PITCH and k + BLOCK_K > CHANNELS,
                CHANNELS, PITCH, BLOCK_K, BLOCK_0, BLOCK_1, COLUMNS, WIDE, PRECISION,
            )  # fmt: skip
    return acc0, acc1


@triton.jit
def conv1x1_kernel(
    x0, x1, x2, x3, x4, x5, x6, x7, w, bias, r, g, out, pixels, tiles, slope,
    x0_batch, x1_batch, x2_batch, x3_batch, x4_batch, x5_batch, x6_batch, x7_batch, r_batch, g_batch, out_batch,
    C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr,
    C4: tl.constexpr, C5: tl.constexpr, C6: tl.constexpr, C7: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,
    P4: tl.constexpr, P5: tl.constexpr, P6: tl.constexpr, P7: tl.constexpr,
    OUT_CHANNELS: tl.constexpr, PIXELS: tl.constexpr, BLOCK_0: tl.constexpr, BLOCK_1: tl.constexpr,
    COLUMNS: tl.constexpr, PIPELINE: tl.constexpr, MODE: tl.constexpr, ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr, BIAS: tl.constexpr,
    R_PITCH: tl.constexpr, G_PITCH: tl.constexpr, OUT_PITCH: tl.constexpr, PADDED_OUT: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: PIXELS pixels of one image times BLOCK_0 + BLOCK_1 output channels; C = 0: no such map."""
    program = tl.program_id(0)
    first = tl.program_id(1) * (BLOCK_0 + BLOCK_1)
    n = (program // tiles).to(tl.int64)
    pixel = (program % tiles) * PIXELS + tl.arange(0, PIXELS)[:, None]
    inside = pixel < pixels
    at = pixel
    if WIDE:
        at = pixel.to(tl.int64)
    acc0 = tl.zeros([PIXELS, BLOCK_0], tl.float32)
    acc1 = acc0
    if BLOCK_1 > 0:
        acc1 = tl.zeros([PIXELS, BLOCK_1], tl.float32)

    R1: tl.constexpr = (C0 + 15) // 16 * 16
    R2: tl.constexpr = R1 + (C1 + 15) // 16 * 16
    R3: tl.constexpr = R2 + (C2 + 15) // 16 * 16
    R4: tl.constexpr = R3 + (C3 + 15) // 16 * 16
    R5: tl.constexpr = R4 + (C4 + 15) // 16 * 16
    R6: tl.constexpr = R5 + (C5 + 15) // 16 * 16
    R7: tl.constexpr = R6 + (C6 + 15) // 16 * 16
    acc0, acc1 = _add_part(acc0, acc1, x0, w, n, x0_batch, at, inside, pixels, 0, first, C0, P0, BLOCK_0, BLOCK_1, COLUMNS, PIPELINE, WIDE, PRECISION)  # fmt: skip  # noqa: E501
    if C1 > 0:
        acc0, acc1 = _add_part(acc0, acc1, x1, w, n, x1_batch, at, inside, pixels, R1, first, C1, P1, BLOCK_0, BLOCK_1, COLUMNS, PIPELINE, WIDE, PRECISION)  # fmt: skip  # noqa: E501
    if C2 > 0:
        acc0, acc1 = _add_part(acc0, acc1, x2, w, n, x2_batch, at, inside, pixels, R2, first, C2, P2, BLOCK_0, BLOCK_1, COLUMNS, PIPELINE, WIDE, PRECISION)  # fmt: skip  # noqa: E501
    if C3 > 0:
        acc0, acc1 = _add_part(acc0, acc1, x3, w, n, x3_batch, at, inside, pixels, R3, first, C3, P3, BLOCK_0, BLOCK_1, COLUMNS, PIPELINE, WIDE, PRECISION)  # fmt: skip  # noqa: E501
    if C4 > 0:
        acc0, acc1 = _add_part(acc0, acc1, x4, w, n, x4_batch, at, inside, pixels, R4, first, C4, P4, BLOCK_0, BLOCK_1, COLUMNS, PIPELINE, WIDE, PRECISION)  # fmt: skip  # noqa: E501
    if C5 > 0:
        acc0, acc1 = _add_part(acc0, acc1, x5, w, n, x5_batch, at, inside, pixels, R5, first, C5, P5, BLOCK_0, BLOCK_1, COLUMNS, PIPELINE, WIDE, PRECISION)  # fmt: skip  # noqa: E501
    if C6 > 0:
        acc0, acc1 = _add_part(acc0, acc1, x6, w, n, x6_batch, at, inside, pixels, R6, first, C6, P6, BLOCK_0, BLOCK_1, COLUMNS, PIPELINE, WIDE, PRECISION)  # fmt: skip  # noqa: E501
    if C7 > 0:
        acc0, acc1 = _add_part(acc0, acc1, x7, w, n, x7_batch, at, inside, pixels, R7, first, C7, P7, BLOCK_0, BLOCK_1, COLUMNS, PIPELINE, WIDE, PRECISION)  # fmt: skip  # noqa: E501

    if RESIDUAL != "none":
        r += image_start(n, r_batch, R_PITCH)
    if MODE != "forward":
        g += image_start(n, g_batch, G_PITCH)
    out += image_start(n, out_batch, OUT_PITCH)
    finish(
        acc0, bias, r, g, out, out, 0 * pixel, pixel, inside, first, pixels, pixels, slope, BLOCK_0, OUT_CHANNELS, MODE,
        ACTIVATION, RESIDUAL, BIAS, False, R_PITCH, G_PITCH, 1, OUT_PITCH, 1, PADDED_OUT, WIDE,
    )  # fmt: skip
    if BLOCK_1 > 0:
        finish(
            acc1, bias, r, g, out, out, 0 * pixel, pixel, inside, first + BLOCK_0, pixels, pixels, slope, BLOCK_1,
            OUT_CHANNELS, MODE, ACTIVATION, RESIDUAL, BIAS, False, R_PITCH, G_PITCH, 1, OUT_PITCH, 1, PADDED_OUT, WIDE,
        )  # fmt: skip


@lru_cache(maxsize=2048)
def _kernel(
    channels: tuple[int, ...],
    pitches: tuple[int, ...],
    out_channels: int,
    block_0: int,
    block_1: int,
    columns: int,
    dtype: torch.dtype,
    dtypes: tuple[Any, ...],
    config: Config,
    mode: str,
    activation: str,
    residual: str,
    maps: tuple[int, int, int],
    is_wide: bool,
    exact: str,
) -> Kernel:
    constants: dict[str, Any] = {f"C{i}": c for i, c in enumerate(channels)}
    constants |= {f"P{i}": p for i, p in enumerate(pitches)}
    constants |= {
        "OUT_CHANNELS": out_channels,
        "PIXELS": config.pixels,
        "BLOCK_0": block_0,
        "BLOCK_1": block_1,
        "COLUMNS": columns,
        "PIPELINE": config.pipeline,
        "MODE": mode,
        "ACTIVATION": activation,
        "RESIDUAL": residual,
        "BIAS": dtypes[0] is not None,
        "R_PITCH": maps[0],
        "G_PITCH": maps[1],
        "OUT_PITCH": maps[2],
        "PADDED_OUT": maps[2] >= columns,
        "WIDE": is_wide,
        "PRECISION": exact,
    }
    return Kernel(conv1x1_kernel, constants, config.warps, config.registers)


def multiply(
    xs: Sequence[Map],
    packed: PackedParts,
    bias: Tensor | None,
    out: Map,
    *,
    mode: str = "forward",
    activation: str = "none",
    slope: float = 0.0,
    residual: Map | None = None,
    residual_mode: str = "post",
    g: Map | None = None,
) -> None:
    """1x1 convolution of the list of maps into `out`; see `_epilogue.finish` for the modes."""
    dtype = packed.weight.dtype
    n = out.tensor.shape[0]
    if len(xs) > PARTS:
        # The first maps' sums, with what is to be added to them, go to float32 and come back as a residual of the rest.
        rows = sum(map(padded, packed.channels[:PARTS]))
        head, rest = packed.channels[:PARTS], packed.channels[PARTS:]
        last = None
        if residual is not None and residual_mode == "post" and activation != "none":
            residual, last = None, residual
        pitch = packed.columns
        sums = Map(
            empty(out.tensor, (n, out.height, out.width, pitch), torch.float32),
            pitch,
            out.height * out.width,
            out.channels,
            out.height,
            out.width,
        )
        head_packed = packed._replace(weight=packed.weight[:rows], channels=head)
        multiply(xs[:PARTS], head_packed, None, sums, residual=residual, residual_mode="pre")
        rest_packed = packed._replace(weight=packed.weight[rows:], channels=rest)
        more = {"mode": mode, "activation": activation, "slope": slope, "g": g}
        multiply(xs[PARTS:], rest_packed, bias, out, residual=sums, residual_mode="pre", **more)  # type: ignore[arg-type]
        if last is not None:
            combine(out, last, "add", out)
        return
    exact = precision(dtype)
    config = choose("conv1x1", dtype, exact, packed.weight.shape[0], packed.block_0 + packed.block_1)
    bias = None if bias is None else dense(bias)
    r = residual if residual is not None else NOTHING
    given = g if g is not None else NOTHING
    missing = PARTS - len(xs)
    kernel = _kernel(
        (*packed.channels, *(0,) * missing),
        (*(x.pitch for x in xs), *(0,) * missing),
        packed.out_channels,
        packed.block_0,
        packed.block_1,
        packed.columns,
        dtype,
        tuple(
            None if t is None else t.dtype for t in (bias, *(x.tensor for x in xs), r.tensor, given.tensor, out.tensor)
        ),
        config,
        mode,
        activation,
        "none" if residual is None else residual_mode,
        (r.pitch, given.pitch, out.pitch),
        wide(*xs, out, residual, g),
        exact,
    )
    pixels = out.height * out.width
    tiles = ceil_div(pixels, config.pixels)
    kernel(
        (n * tiles, packed.columns // (packed.block_0 + packed.block_1)),
        *(x.tensor for x in xs), *(None,) * missing, packed.weight, bias, r.tensor, given.tensor, out.tensor,
        pixels, tiles, slope, *(x.batch for x in xs), *(0,) * missing, r.batch, given.batch, out.batch,
    )  # fmt: skip
