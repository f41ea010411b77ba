"""Convolutions as values: composed, added, with nothing run.

A kernel is a pair of weight [O, I, k, k] with k odd and bias [O] or None. It stands for the convolution with stride 1
that keeps the image's size. Everything here is differentiable, keeps the dtype it is given and ignores autocast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

Kernel = tuple[Tensor, Tensor | None]
_Function = TypeVar("_Function", bound=Callable[..., Any])


def without_autocast(function: _Function) -> _Function:
    """The function, computing in the dtype of its inputs: autocast would round the products to a half type."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        first = args[0][0] if isinstance(args[0], tuple) else args[0]
        device = first.device.type
        enabled = device != "meta" and torch.is_autocast_enabled(device)
        with torch.autocast(device, enabled=False) if enabled else nullcontext():
            return function(*args, **kwargs)

    return call  # type: ignore[return-value]


@without_autocast
def compose(first: Kernel, second: Kernel) -> Kernel:
    """The convolution equal to `first` and then `second`, one of which is 1x1.

    With ``W1 [M, I, 1, 1]`` and ``W2 [O, M, k, k]``: ``W[o, i] = sum_m W2[o, m] W1[m, i]`` at every tap, and
    ``b = b2 + (sum over taps of W2) b1``. The latter holds on the border too if what surrounds the image between the
    two is `b1`, as it is when x is zero-padded before the 1x1, or when the 1x1 has no bias. With the 1x1 second no tap
    meets a padding in between: ``W[o, i] = sum_m W2[o, m] W1[m, i]``, ``b = b2 + W2 b1``.

    Raises:
        ValueError: both are larger than 1x1, or `second` does not take as many channels as `first` gives.
    """
    (w1, b1), (w2, b2) = first, second
    _check_kernel("first", w1, b1)
    _check_kernel("second", w2, b2)
    if w1.shape[0] != w2.shape[1]:
        raise ValueError(f"second: expected weight [*, {w1.shape[0]}, *, *], got {list(w2.shape)}")
    outputs, inputs = w2.shape[0], w1.shape[1]
    if w1.shape[2] == 1:
        taps = w2.flatten(2).transpose(1, 2)  # [O, k * k, M]
        weight = (taps @ w1.flatten(1)).transpose(1, 2).reshape(outputs, inputs, *w2.shape[2:])
        constant = None if b1 is None else taps.sum(1) @ b1
    elif w2.shape[2] == 1:
        weight = (w2.flatten(1) @ w1.flatten(1)).view(outputs, inputs, *w1.shape[2:])
        constant = None if b1 is None else w2.flatten(1) @ b1
    else:
        raise ValueError(f"second: one of the two must be 1x1, got {list(w1.shape)} and {list(w2.shape)}")
    return weight, _sum([constant, b2])


@without_autocast
def compose_depthwise(first: Kernel, depthwise: Kernel) -> Kernel:
    """The convolution equal to the 1x1 `first` and then a depthwise one, weight [O, 1, k, k].

    ``W[o, i] = D[o] W1[o, i]``, ``b = bd + (sum over taps of D) b1``: on the border under `compose`'s condition.

    Raises:
        ValueError: `first` is not 1x1, or the channels differ.
    """
    (w1, b1), (d, bd) = first, depthwise
    _check_kernel("first", w1, b1)
    _check_kernel("depthwise", d, bd)
    if w1.shape[2] != 1 or d.shape[:2] != (w1.shape[0], 1):
        raise ValueError(
            f"depthwise: expected weights [O, I, 1, 1] and [O, 1, k, k], got {list(w1.shape)} and {list(d.shape)}"
        )
    constant = None if b1 is None else d.sum((1, 2, 3)) * b1
    return d * w1, _sum([constant, bd])


def branch(parameters: Mapping[str, Tensor], name: str) -> Kernel:
    """Weight and bias, if it has one, of the convolution of that name."""
    return parameters[f"{name}.weight"], parameters.get(f"{name}.bias")


def merge(*kernels: Kernel) -> Kernel:
    """The convolution equal to the sum of several of the same input; smaller ones are centred in the largest.

    Raises:
        ValueError: the channels differ.
    """
    for w, b in kernels:
        _check_kernel("kernels", w, b)
        if w.shape[:2] != kernels[0][0].shape[:2]:
            raise ValueError(f"kernels: the channels differ: {', '.join(str(list(w.shape)) for w, _ in kernels)}")
    size = max(w.shape[2] for w, _ in kernels)
    weight = _sum([F.pad(w, ((size - w.shape[2]) // 2,) * 4) for w, _ in kernels])
    assert weight is not None
    return weight, _sum([b for _, b in kernels])


def add_identity(kernel: Kernel, identity: bool = True) -> Kernel:
    """The convolution plus its input, if that is wanted and has as many channels."""
    weight = kernel[0]
    if not identity or weight.shape[0] != weight.shape[1]:
        return kernel
    eye = torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)
    return merge(kernel, (eye[:, :, None, None], None))


def fold_batch_norm(
    kernel: Kernel, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Kernel:
    """The convolution followed by batch normalisation with running statistics (report section 4.17).

    With ``s = weight / sqrt(variance + eps)``: ``W' = s W``, ``b' = s (b - mean) + bias``.

    Args:
        kernel: weight [O, ...], of any convolution, and bias.
        mean, variance: [O], the running statistics.
        weight, bias: [O], the normalisation's own, or None.
        eps: the normalisation's.
    """
    w, b = kernel
    scale = (variance + eps).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean if b is None else b - mean
    return w * scale.view(-1, *[1] * (w.ndim - 1)), _sum([shift * scale, bias])


def fold_conv3xc(
    w_expand: Tensor,
    b_expand: Tensor | None,
    w_spatial: Tensor,
    b_spatial: Tensor | None,
    w_project: Tensor,
    b_project: Tensor | None,
    w_skip: Tensor,
    b_skip: Tensor | None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Kernel:
    """One 3x3 convolution equal to SPAN's Conv3XC (report section 4.1, Fig. 1).

    The training form zero-pads x by one pixel, applies 1x1 "expand", 3x3 without padding "spatial" and 1x1 "project",
    and adds the 1x1 "skip" of the unpadded x. The padding precedes the biased 1x1 convolution, so the ring around the
    image holds that bias and not zero, and the constant that reaches an output is the same in the middle and on the
    border: the folded convolution with zero padding 1 is equal everywhere.

    Args:
        w_expand, w_spatial, w_project, w_skip: [M, I, 1, 1], [K, M, 3, 3], [O, K, 1, 1], [O, I, 1, 1]; the published
            keys are conv.0, conv.1, conv.2 and sk.
        b_expand, b_spatial, b_project, b_skip: [M], [K], [O], [O], each may be None.
        dtype: what the products are computed in.

    Returns:
        weight [O, I, 3, 3] and bias [O] (None when no branch has one), in the dtype of `w_skip`. Differentiable.

    Raises:
        ValueError: the shapes do not fit together.
    """
    inner, middle, outputs, inputs = w_expand.shape[0], w_spatial.shape[0], w_skip.shape[0], w_skip.shape[1]
    for name, w, expected in (
        ("w_expand", w_expand, (inner, inputs, 1, 1)),
        ("w_spatial", w_spatial, (middle, inner, 3, 3)),
        ("w_project", w_project, (outputs, middle, 1, 1)),
        ("w_skip", w_skip, (outputs, inputs, 1, 1)),
    ):
        if tuple(w.shape) != expected:
            raise ValueError(f"{name}: expected shape {list(expected)}, got {list(w.shape)}")
    for name, b, size in (
        ("b_expand", b_expand, inner),
        ("b_spatial", b_spatial, middle),
        ("b_project", b_project, outputs),
        ("b_skip", b_skip, outputs),
    ):
        if b is not None and tuple(b.shape) != (size,):
            raise ValueError(f"{name}: expected shape [{size}] or None, got {list(b.shape)}")
    pairs = ((w_expand, b_expand), (w_spatial, b_spatial), (w_project, b_project), (w_skip, b_skip))
    expand, spatial, project, skip = ((w.to(dtype), None if b is None else b.to(dtype)) for w, b in pairs)
    weight, bias = merge(compose(expand, compose(spatial, project)), skip)
    return weight.to(w_skip.dtype), None if bias is None else bias.to(w_skip.dtype)


def _check_kernel(name: str, weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        raise ValueError(f"{name}: expected weight [O, I, k, k] with k odd, got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: expected bias [{weight.shape[0]}] or None, got {list(bias.shape)}")


def _sum(terms: list[Tensor | None]) -> Tensor | None:
    there = [t for t in terms if t is not None]
    return functools.reduce(torch.add, there) if there else None
