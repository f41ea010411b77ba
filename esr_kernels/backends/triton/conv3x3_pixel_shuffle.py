"""3x3 convolution that stores the pixel-shuffled NCHW image."""

from __future__ import annotations

from torch import Tensor

from ...library import bias_gradient, gradient, image
from ._convolution import convolve
from .conv3x3 import convolution_gradients, wanted
from .launch import repeated
from .maps import as_map, shuffled
from .packing import pack


@repeated
def conv3x3_pixel_shuffle(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, upscale_factor: int
) -> Tensor:
    r = upscale_factor
    out = image(x, weight.shape[0] // r**2, r)
    if out.numel() == 0:
        return out
    convolve(
        as_map(x),
        pack(weight, x.dtype),
        bias,
        shuffled(out, r),
        residual=None if residual is None else shuffled(residual, r),
        residual_mode="post",
    )
    return out


def conv3x3_pixel_shuffle_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, upscale_factor: int, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, weight, bias and residual; the image's gradient is read as the map it was shuffled from."""
    gx, gw = gradient(x, output_mask[0]), gradient(weight, output_mask[1])
    gb = bias_gradient(bias, weight, output_mask[2])
    gr = x.new_empty(grad.shape if output_mask[3] else 0)
    if x.shape[0] == 0:
        return gx, gw.zero_(), gb.zero_(), gr
    if output_mask[3]:
        gr.copy_(grad)
    g = shuffled(grad, upscale_factor)
    convolution_gradients(g, as_map(x), weight, wanted(gx), wanted(gw), wanted(gb))
    return gx, gw, gb, gr
