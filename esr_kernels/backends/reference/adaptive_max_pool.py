"""Adaptive max pooling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._common import aten, finish, masked, upcast


def adaptive_max_pool(x: Tensor, output_size: Sequence[int]) -> Tensor:
    # PyTorch refuses half types on the CPU for some layouts; a maximum needs no more than they have.
    return finish(aten.adaptive_max_pool2d(upcast(x), list(output_size))[0], x)


def adaptive_max_pool_backward(grad: Tensor, x: Tensor, output_mask: list[bool]) -> list[Tensor]:
    """The gradient to x: each window's goes to its first maximum, or to its last NaN."""
    gx = None
    if output_mask[0]:
        _, indices = aten.adaptive_max_pool2d(upcast(x), list(grad.shape[2:]))
        gx = aten.adaptive_max_pool2d_backward(upcast(grad), upcast(x), indices)
    return [masked(gx, x)]
