"""How programs share out the elements of maps, for kernels without products.

`locate`: a program has a tile of a few rows. `Lanes`: each of its results gathers a window of an image; a program has
RESULTS of them and, for each, ROWS x COLUMNS lanes that walk over the window together and are reduced at the end. Lanes
that read neighbours in memory are neighbours: results where channels lie together, pixels of a window in planes.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ._epilogue import channel_offsets, pixel_offsets
from .configs import Config
from .launch import ceil_div
from .maps import Map


@triton.jit
def largest(value, AXIS: tl.constexpr):
    """The maximum along an axis, NaN where there is one."""
    nan = value != value
    most = tl.max(tl.where(nan, float("-inf"), value), AXIS)
    return tl.where(tl.max(nan.to(tl.int32), AXIS) > 0, float("nan"), most)


@triton.jit
def element(e, height, width, CHANNELS: tl.constexpr, PLANAR: tl.constexpr):
    """Row, column and channel of the e-th element of an image in the order of its memory."""
    if PLANAR:
        x = e % width
        y = e // width % height
        channel = e // width // height
    else:
        channel = e % CHANNELS
        x = e // CHANNELS % width
        y = e // CHANNELS // width
    return y, x, channel


@triton.jit
def locate(
    tiles_x, tiles_y, height, width, CHANNELS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    PLANAR: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program's image, its rows [TILE_H, 1], and of its elements [1, TILE_W] of each the number, the column, the
    channel, and which exist.

    A row is one of a channel's in planes, counted through the channels, else one of all channels.
    """
    program = tl.program_id(0)
    n = (program // (tiles_x * tiles_y)).to(tl.int64)
    tile_y = program // tiles_x % tiles_y
    tile_x = program % tiles_x
    if WIDE:
        tile_y = tile_y.to(tl.int64)
        tile_x = tile_x.to(tl.int64)
    y = tile_y * TILE_H + tl.arange(0, TILE_H)[:, None]
    e = tile_x * TILE_W + tl.arange(0, TILE_W)[None, :]
    if PLANAR:
        x = e
        channel = y // height
        y = y % height
        ok = (channel < CHANNELS) & (x < width)
    else:
        x = e // CHANNELS
        channel = e % CHANNELS
        ok = (y < height) & (x < width)
    return n, y.to(tl.int32), e, x.to(tl.int32), channel, ok


@triton.jit
def tile_offsets(
    y, e, x, channel, height, width, CHANNELS: tl.constexpr, PLANAR: tl.constexpr, PITCH: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Offsets inside an image of what `locate` found."""
    if PITCH == CHANNELS and not PLANAR:
        # Written so that the compiler sees which elements are neighbours.
        row = y * width
        if WIDE:
            row = y.to(tl.int64) * width
        offsets = row * CHANNELS + e
    else:
        offsets = pixel_offsets(y, x, width, PITCH, 1, WIDE)
        offsets = offsets + channel_offsets(channel, height * width, width, PITCH, 1, WIDE)
    return offsets


def tiles(m: Map, tile: tuple[int, int], planar: bool) -> tuple[int, int]:
    """How many tiles an image has beside and below each other."""
    rows, elements = (m.channels * m.height, m.width) if planar else (m.height, m.width * m.channels)
    return ceil_div(elements, tile[1]), ceil_div(rows, tile[0])


class Lanes(NamedTuple):
    """How a program's lanes are shared out; an image of another size has the same, as long as windows have.

    Attributes:
        results: of a program.
        rows, columns: of lanes for each.
    """

    results: int
    rows: int
    columns: int

    @staticmethod
    def make(config: Config, height: int, width: int) -> Lanes:
        """For windows of about this height and width: `config.tile` has the most lanes of a window, and its results."""
        columns = min(_power_of_two(width), config.tile[0])
        rows = min(_power_of_two(height), config.tile[0] // columns)
        return Lanes(config.pixels // (rows * columns), rows, columns)


def _power_of_two(n: int) -> int:
    """The largest that is not above `n`, at least 1."""
    return 1 << (max(n, 1).bit_length() - 1)


def pixels_of(height: int, width: int) -> int:
    """The number of a window's pixels that names its configuration: a power of two from 16 to 256."""
    return min(max(_power_of_two(height) * _power_of_two(width), 16), 256)
