"""Feature maps as windows of tokens, and back."""

from __future__ import annotations

from torch import Tensor


def to_windows(x: Tensor, height: int, width: int, heads: int) -> Tensor:
    """[N, C, H, W], both sides multiples of the window's -> [N windows, heads, height width, C / heads]."""
    n, c, h, w = x.shape
    x = x.reshape(n, heads, c // heads, h // height, height, w // width, width)
    return x.permute(0, 3, 5, 1, 4, 6, 2).reshape(-1, heads, height * width, c // heads)


def from_windows(windows: Tensor, height: int, width: int, h: int, w: int) -> Tensor:
    """What `to_windows` made of [N, C, h, w]."""
    count, heads, _, d = windows.shape
    rows, columns = h // height, w // width
    x = windows.reshape(count // (rows * columns), rows, columns, heads, height, width, d)
    return x.permute(0, 3, 6, 1, 4, 2, 5).reshape(-1, heads * d, h, w)
