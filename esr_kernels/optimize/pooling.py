"""Pooling of feature maps between plans."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..functional import decomposes


def max_pool2d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Tensor:
    """`aten::max_pool2d`; on the CPU in two passes, the rows of a window and then its columns, NaN included.

    PyTorch's kernel visits every pixel of every window, and writes where the maximum was.
    """
    if isinstance(x, fx.Proxy):  # a graph that is being unpickled
        arguments = (x, kernel_size, stride, padding, dilation, ceil_mode)
        return x.tracer.create_proxy("call_function", max_pool2d, arguments, {})  # type: ignore[return-value]
    (ky, kx), (sy, sx), (py, px) = (_pair(v) for v in (kernel_size, stride or kernel_size, padding))
    plain = x.device.type != "cpu" or torch.compiler.is_compiling() or decomposes()
    if not plain:  # what is none, and windows larger than the image, are PyTorch's to do or to refuse
        least = min(x.shape[-2] + 2 * py - ky, x.shape[-1] + 2 * px - kx, ky - 2 * py, kx - 2 * px, x.numel() - 1)
        plain = ceil_mode or _pair(dilation) != (1, 1) or least < 0
    if plain:
        return torch.ops.aten.max_pool2d.default(x, kernel_size, stride, padding, dilation, ceil_mode)  # type: ignore[no-any-return]
    if py or px:
        x = F.pad(x, (px, px, py, py), value=-torch.inf)
    return _maxima(_maxima(x, -2, ky, sy), -1, kx, sx)


def _pair(v: Sequence[int]) -> tuple[int, int]:
    return v[0], v[-1]


def _maxima(x: Tensor, axis: int, size: int, stride: int) -> Tensor:
    """Of the windows along one axis: the largest of as many strided views as a window has elements."""
    span = (x.shape[axis] - size) // stride * stride + 1

    def view(start: int) -> Tensor:
        part = x.narrow(axis, start, span)
        return part[..., ::stride, :] if axis == -2 else part[..., ::stride]

    y = view(0)
    for start in range(1, size):
        y = torch.maximum(y, view(start)) if start == 1 else torch.maximum(y, view(start), out=y)
    return y
