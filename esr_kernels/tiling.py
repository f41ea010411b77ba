"""Upscaling large pictures tile by tile in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .memory import out_of_memory, release_unused, reserved

# Tiles begin at multiples of this, as kernels may treat a pixel by its position modulo 4 (Winograd).
ALIGNMENT = 8
# Input pixels that the automatic choice computes at once. A x4 network of 32 channels needs about 1 KiB for each.
AUTO_PIXELS = 2**20
# Input pixels that a row of automatic tiles keeps at most: who writes a picture row by row holds one row of tiles.
BAND_PIXELS = 2**23
# Where memory runs out, windows are divided until they have fewer pixels than this.
SMALLEST_WINDOW = 2**12
# Overlap for networks that look at the whole image (enhanced spatial attention): their tiles differ slightly.
UNBOUNDED_OVERLAP = 64


@dataclass(frozen=True)
class Tile:
    """A part of the input, in pixels: what is kept, and the larger window that is computed for it.

    Attributes:
        top, bottom, left, right: what is kept.
        window_top, window_bottom, window_left, window_right: what is computed.
    """

    top: int
    bottom: int
    left: int
    right: int
    window_top: int
    window_bottom: int
    window_left: int
    window_right: int


def exact_overlap(model: nn.Module) -> int:
    """Pixels that tiles must overlap a side for a result equal to that of the whole image.

    An output pixel depends on `receptive_radius` pixels a side; with Winograd its rounding depends on the 4x4 tile it
    is computed in, in every layer, so four times that many are taken. Networks without a bound get
    `UNBOUNDED_OVERLAP`, which hides the seams but is not exact.
    """
    radius = getattr(model, "receptive_radius", None)
    if radius is None:
        return UNBOUNDED_OVERLAP
    return -(-4 * int(radius) // ALIGNMENT) * ALIGNMENT


def _spans(length: int, tile: int, overlap: int) -> list[tuple[int, int, int, int]]:
    """(begin, end, window begin, window end) along one axis."""
    return [
        (begin, min(begin + tile, length), max(begin - overlap, 0), min(begin + tile + overlap, length))
        for begin in range(0, length, tile)
    ]


def tile_size(height: int, width: int, tile: int | str | None, overlap: int) -> tuple[int, int]:
    """Height and width of the kept part of a tile.

    Args:
        height, width: of the picture.
        tile: pixels a side, "auto" or None for the whole picture at once.
        overlap: as `exact_overlap`.

    Raises:
        TypeError, ValueError: tile is something else.
    """
    if tile is None:
        return height, width
    if tile == "auto":
        if height * width <= AUTO_PIXELS:
            return height, width
        # Strips over the full width overlap at two sides only, as long as they are not all overlap.
        rows = AUTO_PIXELS // (width + 2 * overlap) - 2 * overlap
        if rows >= 2 * overlap + ALIGNMENT:
            return rows // ALIGNMENT * ALIGNMENT, width
        side = max(int(AUTO_PIXELS**0.5) - 2 * overlap, ALIGNMENT) // ALIGNMENT * ALIGNMENT
        if side * width <= BAND_PIXELS:
            return side, side
        # Lower and wider tiles.
        rows = max(min(side, BAND_PIXELS // width) // ALIGNMENT, 1) * ALIGNMENT
        columns = max(AUTO_PIXELS // (rows + 2 * overlap) - 2 * overlap, side)
        return rows, columns // ALIGNMENT * ALIGNMENT
    if isinstance(tile, bool) or not isinstance(tile, int):
        raise TypeError(f'tile: expected a number of pixels, "auto" or None, got {tile!r}')
    if tile < ALIGNMENT or tile % ALIGNMENT:
        raise ValueError(f"tile: expected a multiple of {ALIGNMENT} pixels, got {tile}")
    return tile, tile


def plan_tiles(height: int, width: int, tile: tuple[int, int], overlap: int) -> list[Tile]:
    """The tiles of a picture, row by row; windows end at the picture's border, where the network pads as always."""
    return [
        Tile(top, bottom, left, right, window_top, window_bottom, window_left, window_right)
        for top, bottom, window_top, window_bottom in _spans(height, tile[0], overlap)
        for left, right, window_left, window_right in _spans(width, tile[1], overlap)
    ]


def _halves(t: Tile, overlap: int, height: int, width: int) -> tuple[Tile, Tile] | None:
    """A tile in two; None where its window is small enough, or it cannot be divided.

    It is divided across its longer side. Rows of the whole picture stay that as long as more of them are kept than
    overlap.
    """
    if (t.window_bottom - t.window_top) * (t.window_right - t.window_left) < SMALLEST_WINDOW:
        return None
    rows, columns = t.bottom - t.top, t.right - t.left
    tall = rows >= (min(columns, max(overlap, 2 * ALIGNMENT)) if columns == width else columns)
    begin, end = (t.top, t.bottom) if tall else (t.left, t.right)
    middle = begin + (end - begin) // 2 // ALIGNMENT * ALIGNMENT
    if middle == begin:
        return None
    limit = height if tall else width
    before, after = min(middle + overlap, limit), max(middle - overlap, 0)
    if tall:
        return replace(t, bottom=middle, window_bottom=before), replace(t, top=middle, window_top=after)
    return replace(t, right=middle, window_right=before), replace(t, left=middle, window_left=after)


def upscale_windows(
    model: nn.Module,
    height: int,
    width: int,
    window: Callable[[Tile], Tensor],
    *,
    tile: int | str | None = "auto",
    overlap: int | None = None,
    progress: Callable[[int, int], Any] | None = None,
    scarce: Callable[[int, int], Any] | None = None,
    room: Callable[[int, int], int] | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """Upscale a picture tile by tile, of which no more than a tile need exist at a time.

    Where memory runs out and `tile` leaves the choice, the tile is computed in halves, and so are all that follow;
    halves that are as wide as the picture are yielded one by one.

    Args:
        model: with the attributes `scale`, `minimum_size` and `receptive_radius`.
        height, width: of the picture.
        window: gives the pixels [N, C, h, w] of a tile's window.
        tile: pixels a side (a multiple of 8), "auto" or None for the whole picture at once.
        overlap: pixels a side (a multiple of 8); None: enough for a result that does not depend on the tiling.
        progress: called with the tiles done and all tiles.
        scarce: called with the height and width of a window for which memory was not enough.
        room: gives the bytes that taking a part needs, by its height and width; they count as needed for its tile.

    Yields:
        top and left of a part of the result, and that part [N, C, h, w]; row by row, left to right.

    Raises:
        TypeError, ValueError: tile or overlap is not one of those, or the picture or a tile is smaller than the network
            can take.
        MemoryError, RuntimeError: PyTorch's, where memory is not enough for a tile of the given or the smallest size.
    """
    smallest = int(getattr(model, "minimum_size", 1))
    if min(height, width) < smallest:
        raise ValueError(
            f"the network needs pictures of at least {smallest} x {smallest} pixels, got {height} x {width}"
        )
    if overlap is None:
        overlap = exact_overlap(model)
    elif isinstance(overlap, bool) or not isinstance(overlap, int) or overlap < 0 or overlap % ALIGNMENT:
        raise ValueError(f"overlap: expected a multiple of {ALIGNMENT} pixels, got {overlap!r}")
    scale = int(model.scale)  # type: ignore[arg-type]
    tiles = plan_tiles(height, width, tile_size(height, width, tile, overlap), overlap)
    for t in tiles:
        if min(t.window_bottom - t.window_top, t.window_right - t.window_left) < smallest:
            raise ValueError(f"tile: tiles and their overlap must reach {smallest} pixels, which the network needs")
    most = height * width  # pixels of a window that memory may be enough for

    def attempt(t: Tile, may_fail: bool) -> Tensor | None:
        """The kept part of a tile; None where memory is not enough."""
        try:
            rows, columns = (t.bottom - t.top) * scale, (t.right - t.left) * scale
            with torch.inference_mode(), reserved(0 if room is None else room(rows, columns)):
                y = model(window(t))
            if most < height * width:
                release_unused()  # who takes the result needs memory too
            top, left = (t.top - t.window_top) * scale, (t.left - t.window_left) * scale
            return y[:, :, top : top + rows, left : left + columns]
        except (MemoryError, RuntimeError) as error:
            if not may_fail or not out_of_memory(error):
                raise
        # Outside of the handler, whose exception holds what the network had made so far.
        return None

    def compute(t: Tile) -> Iterator[tuple[Tile, Tensor]]:
        """A tile with its kept part, or tiles as wide as the picture that it consists of.

        Nothing here refers to a part once the next one is asked for: the memory of two would be needed.
        """
        nonlocal most
        h, w = t.window_bottom - t.window_top, t.window_right - t.window_left
        halves = None if tile not in ("auto", None) else _halves(t, overlap, height, width)
        if halves is not None and min(min(x.bottom - x.top, x.right - x.left) + overlap for x in halves) < smallest:
            halves = None
        out: Tensor | None = None
        if halves is None or h * w <= most:
            out = attempt(t, halves is not None)
            if out is not None:
                yield t, out
                return
            most = h * w - 1
            release_unused()
            if scarce is not None:
                scarce(h, w)
        assert halves is not None
        if t.right - t.left == width and halves[0].bottom < t.bottom:
            for half in halves:
                yield from compute(half)
            return
        for half in halves:
            for piece, part in compute(half):
                if out is None:
                    out = part.new_empty((*part.shape[:2], (t.bottom - t.top) * scale, (t.right - t.left) * scale))
                y, x = (piece.top - t.top) * scale, (piece.left - t.left) * scale
                out[:, :, y : y + part.shape[2], x : x + part.shape[3]] = part
                del part
        assert out is not None
        yield t, out

    for done, t in enumerate(tiles, 1):
        for piece, part in compute(t):
            if progress is not None and piece.bottom == t.bottom:
                progress(done, len(tiles))
            yield piece.top * scale, piece.left * scale, part
            del part


def upscale_tiles(
    model: nn.Module,
    x: Tensor,
    *,
    tile: int | str | None = "auto",
    overlap: int | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """`upscale_windows` of a picture x [N, C, H, W] that is there as a whole.

    Raises:
        TypeError, ValueError: x has another number of dimensions, or as `upscale_windows`.
    """
    if x.dim() != 4:
        raise ValueError(f"x: expected 4 dimensions [N, C, H, W], got shape {list(x.shape)}")
    height, width = int(x.shape[2]), int(x.shape[3])

    def window(t: Tile) -> Tensor:
        return x[:, :, t.window_top : t.window_bottom, t.window_left : t.window_right]

    yield from upscale_windows(model, height, width, window, tile=tile, overlap=overlap, progress=progress)


def upscale_tensor(
    model: nn.Module,
    x: Tensor,
    *,
    tile: int | str | None = "auto",
    overlap: int | None = None,
    progress: Callable[[int, int], Any] | None = None,
) -> Tensor:
    """The whole result of `upscale_tiles`: [N, C, H, W] -> [N, C, H r, W r].

    Raises:
        TypeError, ValueError: as `upscale_tiles`.
    """
    out: Tensor | None = None
    scale = int(model.scale)  # type: ignore[arg-type]
    for top, left, part in upscale_tiles(model, x, tile=tile, overlap=overlap, progress=progress):
        if part.shape[2:] == (x.shape[2] * scale, x.shape[3] * scale):
            return part
        if out is None:
            out = part.new_empty((*part.shape[:2], x.shape[2] * scale, x.shape[3] * scale))
        out[:, :, top : top + part.shape[2], left : left + part.shape[3]] = part
        del part  # before the next one is made
    assert out is not None
    return out
