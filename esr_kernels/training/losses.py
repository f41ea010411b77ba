"""Losses on images in [0, 1]. All are computed in float32, or float64 where the images are."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_EPSILON = 1e-3  # of charbonnier: where it turns from quadratic to linear
_LEAST_ERROR = 1e-8  # of psnr: -80 dB, where its slope ends


def l1(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference."""
    return (output - target).abs().mean()


def l2(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference."""
    return (output - target).square().mean()


def charbonnier(output: Tensor, target: Tensor) -> Tensor:
    """Mean of sqrt(d^2 + 1e-6): L1 that is smooth at 0 (report section 4.13)."""
    return ((output - target).square() + _EPSILON**2).sqrt().mean()


def fft(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute difference of the real and imaginary parts of the 2-d Fourier transforms (report section 4.18).

    The transform is orthonormal, so that the size of a patch does not change the scale.
    """
    difference = torch.fft.rfft2(output - target, norm="ortho")
    return torch.view_as_real(difference).abs().mean()


def psnr(output: Tensor, target: Tensor) -> Tensor:
    """Minus the PSNR in dB, of each image over all its channels, averaged over the batch (report section 4.16)."""
    error = (output - target).square().flatten(1).mean(1)
    return 10 * torch.log10(error + _LEAST_ERROR).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": l1,
    "l2": l2,
    "charbonnier": charbonnier,
    "fft": fft,
    "psnr": psnr,
}


class WeightedLoss:
    """A weighted sum of losses.

    Args:
        weights: name in `LOSSES` to factor, at least one.
        data_range: of the images this is called with.

    Raises:
        ValueError: unknown name (the nearest is named), or a factor that is no number above 0.
    """

    def __init__(self, weights: Mapping[str, float], data_range: float = 1.0) -> None:
        if not weights:
            raise ValueError(f"loss: expected at least one of {', '.join(LOSSES)}")
        for name, factor in weights.items():
            if name not in LOSSES:
                near = difflib.get_close_matches(name, LOSSES, n=1, cutoff=0.4)
                hint = f", did you mean {near[0]!r}?" if near else ","
                raise ValueError(f"loss: unknown {name!r}{hint} known: {', '.join(LOSSES)}")
            if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < float("inf"):
                raise ValueError(f"loss: the factor of {name!r} must be a number above 0, got {factor!r}")
        self.weights, self.data_range = dict(weights), data_range

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """[N, C, H, W] twice -> a scalar, the mean over N."""
        if output.dtype in (torch.float16, torch.bfloat16):
            output = output.float()
        output, target = output / self.data_range, target.to(output.dtype) / self.data_range
        return torch.stack([factor * LOSSES[name](output, target) for name, factor in self.weights.items()]).sum()
