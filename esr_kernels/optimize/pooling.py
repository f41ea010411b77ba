"""Pooling and strided convolution of feature maps between plans."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from ..functional import decomposes, unobserved


def whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, of a tensor or several, as one node of graphs, which are traced again when they are unpickled."""

    @functools.wraps(function)
    def call(x: Any, *args: Any) -> Any:
        first = x[0] if isinstance(x, list) else x
        if isinstance(first, fx.Proxy):
            return first.tracer.create_proxy("call_function", call, (x, *args), {})
        return function(x, *args)

    return call


@whole
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
    (ky, kx), (sy, sx), (py, px) = (_pair(v) for v in (kernel_size, stride or kernel_size, padding))
    plain = x.device.type != "cpu" or torch.compiler.is_compiling() or decomposes()
    if not plain:
        # What is none, and windows larger than the image, are PyTorch's to do or to refuse; that of one pixel would be
        # a view.
        inside = min(x.shape[-2] + 2 * py - ky, x.shape[-1] + 2 * px - kx)
        least = min(inside, ky - 2 * py, kx - 2 * px, x.numel() - 1, max(ky, kx) - 2)
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


@whole
def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], *options: Any) -> Tensor:
    """`aten.convolution`; on the CPU few taps, strided and channel by channel, are added one by one.

    The library that PyTorch calls brings such planes into blocks of 8 or 16 channels and back, which takes most of its
    time and memory where the channels fill none.
    """
    padding, dilation, transposed, _, groups = options
    taps = weight.shape[2:].numel()
    if (
        not (1 < taps <= 3 and len(stride) == 2 and math.prod(stride) >= 4 and groups == x.shape[1] == weight.shape[0])
        or not (x.device.type == "cpu" and x.is_contiguous() and x.dtype in (torch.float32, torch.float64))
        or transposed
        or any(p != 0 for p in padding)
        or any(d != 1 for d in dilation)
        or decomposes()
        or not unobserved((x, weight))
    ):
        return torch.ops.aten.convolution.default(x, weight, bias, stride, *options)  # type: ignore[no-any-return]
    (ky, kx), (sy, sx) = weight.shape[2:], stride
    height, width = ((x.shape[d - 2] - k) // s + 1 for d, k, s in ((0, ky, sy), (1, kx, sx)))
    y = None
    for i, j in itertools.product(range(ky), range(kx)):
        part = x[..., i : i + sy * (height - 1) + 1 : sy, j : j + sx * (width - 1) + 1 : sx]
        tap = weight[:, 0, i, j].view(-1, 1, 1)
        if y is not None:
            y = y.addcmul_(part, tap)
        else:
            y = part * tap if bias is None else torch.addcmul(bias.view(-1, 1, 1), part, tap)
    assert y is not None
    return y


torch.library.define("esr::local_variance", "(Tensor x, int[] size, int[] stride, int correction) -> Tensor")


@whole
def local_variance(x: Tensor, size: Sequence[int], stride: Sequence[int], correction: int) -> Tensor:
    """Of the windows along the last two axes; on the CPU of copies of them, which PyTorch's kernel reads one by one."""
    windows = x.unfold(-2, size[0], stride[0]).unfold(-2, size[1], stride[1])
    if x.device.type != "cpu" or torch.compiler.is_compiling() or decomposes():
        return windows.var((-2, -1), correction=correction)
    windows = windows.flatten(-2)
    differences = windows - windows.mean(-1, keepdim=True)
    return differences.square_().sum(-1) / max(size[0] * size[1] - correction, 0)


torch.library.impl("esr::local_variance", "CompositeExplicitAutograd", local_variance)


@torch.library.register_fake("esr::local_variance")
def _(x: Tensor, size: Sequence[int], stride: Sequence[int], correction: int) -> Tensor:
    sides = [(x.shape[i - 2] - size[i]) // stride[i] + 1 for i in (0, 1)]
    return x.new_empty(*x.shape[:-2], *sides)
