"""The operators' gradients on the compiled engines (csrc/cpu/backward.h, csrc/cuda/backward.cu)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ...library import bias_gradient, bsconv_gradients, conv1x1_gradients, esa_gradients, feature_map, gradient
from .engine import ACTIVATION_CODES, PADDING_CODES, RESIDUAL_CODES

# Calls an engine's function: its name, an input of the operator, its arguments, and the tensors to write to.
Call = Callable[[str, Tensor, tuple[Any, ...], list[Tensor]], None]


def is_empty(x: Tensor, gradients: list[Tensor]) -> bool:
    """Whether there is nothing to sum up; the gradients are zeros then."""
    if x.shape[0] > 0:
        return False
    for g in gradients:
        g.zero_()
    return True


def conv3x3_backward(
    call: Call,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    residual_mode: str,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients to x, weight, bias and residual; the convolution's result is recomputed, not stored."""
    gradients = [
        gradient(x, output_mask[0]),
        gradient(weight, output_mask[1]),
        bias_gradient(bias, weight, output_mask[2]),
        feature_map(x, weight.shape[0]) if output_mask[3] else x.new_empty(0),
    ]
    if not is_empty(x, gradients):
        epilogue = (ACTIVATION_CODES[activation], negative_slope, RESIDUAL_CODES[residual_mode])
        call("conv3x3_backward", x, (grad, x, weight, bias, residual, *epilogue), gradients)
    return tuple(gradients)


def spab_backward(
    call: Call,
    grad: Tensor,
    grad_mid: Tensor | None,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients to x, w1, b1, w2, b2, w3, b3; the intermediate maps are recomputed, not stored."""
    weights, biases = [w1, w2, w3], [b1, b2, b3]
    gradients = [gradient(x, output_mask[0])]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        gradients.append(gradient(weight, output_mask[2 * i + 1]))
        gradients.append(bias_gradient(bias, weight, output_mask[2 * i + 2]))
    if not is_empty(x, gradients):
        given = [x.new_empty(0) if b is None else b for b in biases]
        call("spab_backward", x, (grad, grad_mid, x, weights, given), gradients)
    return tuple(gradients)


def conv3x3_pixel_shuffle_backward(
    call: Call,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    upscale_factor: int,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients to x, weight, bias and residual."""
    gradients = [
        gradient(x, output_mask[0]),
        gradient(weight, output_mask[1]),
        bias_gradient(bias, weight, output_mask[2]),
        x.new_empty(grad.shape if output_mask[3] else 0),
    ]
    if not is_empty(x, gradients):
        call("conv3x3_pixel_shuffle_backward", x, (grad, x, weight, upscale_factor), gradients)
    return tuple(gradients)


def conv1x1_backward(
    call: Call,
    grad: Tensor,
    xs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    negative_slope: float,
    output_mask: list[bool],
    residual: Tensor | None = None,
) -> list[Tensor]:
    """Gradients to each of xs, to weight and bias, and to a residual before the activation; `output_mask` likewise."""
    gradients = conv1x1_gradients(xs, weight, bias, output_mask, residual)
    if not is_empty(xs[0], gradients):
        epilogue = (residual, ACTIVATION_CODES[activation], negative_slope)
        call("conv1x1_backward", xs[0], (grad, list(xs), weight, bias, *epilogue), gradients)
    return gradients


def bsconv_backward(
    call: Call,
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
    gradients = bsconv_gradients(x, pointwise, depthwise, bias, output_mask, residual)
    if not is_empty(x, gradients):
        settings = (PADDING_CODES[padding_mode] == 1, ACTIVATION_CODES[activation], negative_slope)
        call("bsconv_backward", x, (grad, x, pointwise, depthwise, bias, residual, *settings), gradients)
    return gradients


def esa_backward(call: Call, grad: Tensor, x: Tensor, *args: Any) -> list[Tensor]:
    """Gradients to x and to the fourteen weights and biases in order, empty where there is no tensor."""
    *weights, output_mask = args
    gradients = esa_gradients([x, *weights], output_mask)
    if not is_empty(x, gradients):
        given = [x.new_empty(0) if w is None else w for w in weights]
        call("esa_backward", x, (grad, x, given), gradients)
    return gradients


_OPERATORS = (
    conv3x3_backward,
    spab_backward,
    conv3x3_pixel_shuffle_backward,
    conv1x1_backward,
    bsconv_backward,
    esa_backward,
)


def operators(call: Call) -> dict[str, Callable[..., Any]]:
    """Every operator's gradients, computed by `call`."""
    return {f.__name__: partial(f, call) for f in _OPERATORS}
