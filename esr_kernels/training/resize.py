"""Bicubic resizing with MATLAB's meaning: how the challenge's low-resolution pictures are made (report section 2.1).

The kernel is the cubic convolution with a = -0.5. When a picture shrinks, the kernel is widened by the factor, which is
the antialiasing. Beyond the border a picture goes on as its mirror image. Computed in float64, one direction after the
other without rounding in between; by a factor that is a power of two the weights are dyadic fractions and every sum of
8-bit values is exact, so the resize of a part of a picture is bit for bit the part of the resized picture.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_SUPPORT = 2  # source pixels a side, at the larger of the two scales


def _cubic(x: Array) -> Array:
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def taps(length: int, resized: int, begin: int = 0, end: int | None = None) -> tuple[Array, Array]:
    """Which source pixels make the resized ones, and how much of each.

    Args:
        length: source pixels in this direction, at least 1.
        resized: pixels of the whole result, at least 1.
        begin, end: the part of the result that is wanted; all by default.

    Returns:
        indices [end - begin, P] in 0..length-1 and weights [end - begin, P] float64; every row of weights sums to 1.

    Raises:
        ValueError: a length below 1, or a part outside the result.
    """
    end = resized if end is None else end
    if length < 1 or resized < 1:
        raise ValueError(f"length, resized: expected at least 1 pixel, got {length} and {resized}")
    if not 0 <= begin < end <= resized:
        raise ValueError(f"begin, end: expected 0 <= begin < end <= {resized}, got {begin} and {end}")
    scale = resized / length
    shrink = min(scale, 1.0)
    radius = _SUPPORT / shrink
    centre = (np.arange(begin, end) + 0.5) / scale - 0.5
    indices = np.floor(centre - radius).astype(np.int64)[:, None] + np.arange(int(np.ceil(2 * radius)) + 2)
    weights = shrink * _cubic(shrink * (centre[:, None] - indices))
    weights /= weights.sum(1, keepdims=True)
    used = (weights != 0).any(0)
    indices, weights = indices[:, used] % (2 * length), weights[:, used]
    return np.where(indices < length, indices, 2 * length - 1 - indices), weights


def _along(values: Array, indices: Array, weights: Array) -> Array:
    """[L, ...] -> [len(indices), ...], float64."""
    shape = (-1,) + (1,) * (values.ndim - 1)
    result = values[indices[:, 0]] * weights[:, 0].reshape(shape)
    for tap in range(1, indices.shape[1]):
        result += values[indices[:, tap]] * weights[:, tap].reshape(shape)
    return result


def resize(
    pixels: Array, height: int, width: int, rows: slice = slice(None), columns: slice = slice(None)
) -> NDArray[np.float64]:
    """The picture at another size, or a part of that.

    Args:
        pixels: [H, W] or [H, W, C], any real dtype and range.
        height, width: of the whole result.
        rows, columns: the part of the result that is wanted, without steps. Only the pixels it depends on are read.

    Returns:
        The part, float64, in the range of `pixels` and, by the kernel's negative lobes, a little beyond.

    Raises:
        ValueError: another number of dimensions, an empty picture or an empty part.
    """
    if pixels.ndim not in (2, 3):
        raise ValueError(f"pixels: expected [H, W] or [H, W, C], got shape {list(pixels.shape)}")
    indices, weights = taps(pixels.shape[1], width, *columns.indices(width)[:2])
    first, last = int(indices.min()), int(indices.max()) + 1
    half = _along(pixels[:, first:last], *taps(pixels.shape[0], height, *rows.indices(height)[:2]))
    # Rows are contiguous in memory, so the second direction works on a transposed copy.
    turned = np.ascontiguousarray(np.swapaxes(half, 0, 1))
    return np.ascontiguousarray(np.swapaxes(_along(turned, indices - first, weights), 0, 1))


def to_8_bits(values: Array) -> NDArray[np.uint8]:
    """Rounded, halves upwards as MATLAB does, and clamped to 0..255."""
    return np.clip(np.floor(values + 0.5), 0, 255).astype(np.uint8)


def crop_to_multiple(pixels: Array, scale: int) -> Array:
    """The picture without the last rows and columns beyond a multiple of the scale (a view)."""
    return pixels[: pixels.shape[0] // scale * scale, : pixels.shape[1] // scale * scale]


def downscale(pixels: Array, scale: int, rows: slice = slice(None), columns: slice = slice(None)) -> NDArray[np.uint8]:
    """The low-resolution picture [H / scale, W / scale, C] of an 8-bit one, or a part of it.

    Args:
        pixels: [H, W, C] uint8, H and W multiples of the scale.
        scale: at least 1.
        rows, columns: the wanted part of the low-resolution picture.

    Raises:
        TypeError: another dtype.
        ValueError: H or W is no multiple, or as `resize`.
    """
    if pixels.dtype != np.uint8:
        raise TypeError(f"pixels: expected uint8, got {pixels.dtype}")
    if pixels.shape[0] % scale or pixels.shape[1] % scale:
        raise ValueError(f"pixels: expected height and width in multiples of {scale}, got {list(pixels.shape[:2])}")
    return to_8_bits(resize(pixels, pixels.shape[0] // scale, pixels.shape[1] // scale, rows, columns))


def bicubic(pixels: Array, scale: int) -> NDArray[np.uint8]:
    """An 8-bit picture [h, w, C] enlarged, [h * scale, w * scale, C]: what a network has to beat."""
    return to_8_bits(resize(pixels, pixels.shape[0] * scale, pixels.shape[1] * scale))
