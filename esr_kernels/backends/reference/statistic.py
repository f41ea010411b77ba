"""Statistics of all pixels of a channel."""

from __future__ import annotations

from torch import Tensor

from ._common import upcast


def statistic(x: Tensor, kind: str, correction: int) -> Tensor:
    """[N, C, H, W] -> [N, C, 1, 1], one of `esr_kernels.plan.STATISTICS`.

    Squares are divided by the number of pixels less the correction, 0 or 1; 0 / 0 is NaN.
    """
    wide = upcast(x)
    if kind == "maximum":
        return wide.amax((2, 3), keepdim=True).to(x.dtype)
    mean = wide.mean((2, 3), keepdim=True)
    if kind == "mean":
        return mean.to(x.dtype)
    variance = (wide - mean).square().sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - correction)
    if kind == "variance":
        return variance.to(x.dtype)
    deviation = variance.sqrt()
    return (deviation if kind == "std" else deviation + mean).to(x.dtype)
