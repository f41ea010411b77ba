"""Blueprint separable convolution: 1x1, then depthwise 3x3 over its zero- or reflection-padded result."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ._common import (
    activation_backward,
    aten,
    conv,
    conv_backward,
    epilogue,
    finish,
    masked,
    upcast,
    upcast_optional,
)


def _depthwise_input(x: Tensor, pointwise: Tensor, padding_mode: str) -> tuple[Tensor, Tensor, int]:
    """The pointwise result, what the depthwise convolution reads, and the padding left to it."""
    t = conv(x, pointwise, None, padding=0)
    if padding_mode == "reflect" and t.numel():
        return t, F.pad(t, (1, 1, 1, 1), mode="reflect"), 0
    return t, t, 1


def bsconv(
    x: Tensor,
    pointwise: Tensor,
    depthwise: Tensor,
    bias: Tensor | None,
    padding_mode: str,
    activation: str,
    negative_slope: float,
    residual: Tensor | None = None,
    residual_mode: str = "post",
) -> Tensor:
    _, padded, padding = _depthwise_input(x, pointwise, padding_mode)
    h = conv(padded, depthwise, bias, padding=padding, groups=depthwise.shape[0])
    return finish(epilogue(h, upcast_optional(residual), activation, negative_slope, residual_mode), x)


def bsconv_backward(
    grad: Tensor,
    x: Tensor,
    pointwise: Tensor,
    depthwise: Tensor,
    bias: Tensor | None,
    padding_mode: str,
    activation: str,
    negative_slope: float,
    output_mask: list[bool],
    residual: Tensor | None = None,
) -> list[Tensor]:
    """Gradients to x, pointwise, depthwise, bias and a residual before the activation; `output_mask` likewise."""
    grad = upcast(grad)
    groups = depthwise.shape[0]
    t, padded, padding = _depthwise_input(x, pointwise, padding_mode)
    if activation != "none":
        h = conv(padded, depthwise, bias, padding=padding, groups=groups)
        grad = activation_backward(grad, h if residual is None else h + upcast(residual), activation, negative_slope)
    mask = [output_mask[0] or output_mask[1], output_mask[2], output_mask[3]]
    gt, gd, gb = conv_backward(grad, padded, depthwise, mask, padding=padding, groups=groups)
    gx = gp = None
    if gt is not None:
        if padding == 0:
            gt = aten.reflection_pad2d_backward(gt, t, [1, 1, 1, 1])
        gx, gp, _ = conv_backward(gt, x, pointwise, [output_mask[0], output_mask[1], False], padding=0)
    gradients = [masked(gx, x), masked(gp, pointwise), masked(gd, depthwise)]
    gradients.append(masked(gb, depthwise if bias is None else bias))
    return gradients + [masked(grad.clone() if wanted else None, x) for wanted in output_mask[4:]]
