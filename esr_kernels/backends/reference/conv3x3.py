"""3x3 convolution with activation and residual in one step."""

from __future__ import annotations

from torch import Tensor

from ._common import (
    activation_backward,
    attention_backward,
    conv,
    conv_backward,
    epilogue,
    finish,
    masked,
    upcast,
    upcast_optional,
)


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    residual_mode: str,
) -> Tensor:
    h = conv(x, weight, bias, padding=1)
    out = epilogue(h, upcast_optional(residual), activation, negative_slope, residual_mode)
    return finish(out, x)


def conv3x3_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    residual_mode: str,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, weight, bias and residual; `h` is recomputed, not stored."""
    grad = upcast(grad)
    needs_h = activation != "none" or (residual is not None and residual_mode == "attention")
    h = conv(x, weight, bias, padding=1) if needs_h else grad
    to_residual = grad
    if residual is None:
        grad = activation_backward(grad, h, activation, negative_slope)
    elif residual_mode == "pre":
        grad = to_residual = activation_backward(grad, h + upcast(residual), activation, negative_slope)
    elif residual_mode == "post":
        grad = activation_backward(grad, h, activation, negative_slope)
    else:
        grad, to_residual = attention_backward(grad, h, upcast(residual))
    gx, gw, gb = conv_backward(grad, x, weight, output_mask[:3], padding=1)
    return (
        masked(gx, x),
        masked(gw, weight),
        masked(gb, weight if bias is None else bias),
        # A fresh tensor: an operator's result may not share memory with its input.
        masked(to_residual.clone() if output_mask[3] else None, x),
    )
