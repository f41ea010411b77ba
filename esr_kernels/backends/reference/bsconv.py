"""Blueprint separable convolution: 1x1, then depthwise 3x3 over its zero- or reflection-padded result."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ._common import activate, activation_backward, aten, conv, conv_backward, finish, masked, upcast


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
) -> Tensor:
    _, padded, padding = _depthwise_input(x, pointwise, padding_mode)
    h = conv(padded, depthwise, bias, padding=padding, groups=depthwise.shape[0])
    return finish(activate(h, activation, negative_slope), x)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, pointwise, depthwise and bias."""
    grad = upcast(grad)
    groups = depthwise.shape[0]
    t, padded, padding = _depthwise_input(x, pointwise, padding_mode)
    if activation != "none":
        h = conv(padded, depthwise, bias, padding=padding, groups=groups)
        grad = activation_backward(grad, h, activation, negative_slope)
    mask = [output_mask[0] or output_mask[1], output_mask[2], output_mask[3]]
    gt, gd, gb = conv_backward(grad, padded, depthwise, mask, padding=padding, groups=groups)
    gx = gp = None
    if gt is not None:
        if padding == 0:
            gt = aten.reflection_pad2d_backward(gt, t, [1, 1, 1, 1])
        gx, gp, _ = conv_backward(gt, x, pointwise, [output_mask[0], output_mask[1], False], padding=0)
    return masked(gx, x), masked(gp, pointwise), masked(gd, depthwise), masked(gb, depthwise if bias is None else bias)
