"""3x3 convolution, pixel shuffle and the upscaled residual: the tail of most networks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._common import conv, conv_backward, masked, upcast


def conv3x3_pixel_shuffle(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, upscale_factor: int
) -> Tensor:
    out = F.pixel_shuffle(conv(x, weight, bias, padding=1), upscale_factor)
    if residual is not None:
        out = out + upcast(residual)
    # Always NCHW: the result is an image.
    return out.to(x.dtype).contiguous()


def conv3x3_pixel_shuffle_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, upscale_factor: int, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, weight, bias and residual."""
    gh = F.pixel_unshuffle(upcast(grad), upscale_factor)
    gx, gw, gb = conv_backward(gh, x, weight, output_mask[:3], padding=1)
    return (
        masked(gx, x),
        masked(gw, weight),
        masked(gb, weight if bias is None else bias),
        grad.to(x.dtype).clone(memory_format=torch.contiguous_format) if output_mask[3] else x.new_empty(0),
    )
