"""What the reference operators share: activations, their derivatives, precision and memory format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...library import memory_format

aten = torch.ops.aten


def upcast(tensor: Tensor) -> Tensor:
    """Half types are computed in float32; float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def upcast_optional(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else upcast(tensor)


def finish(out: Tensor, like: Tensor) -> Tensor:
    """Round `out` to the dtype of `like` and lay it out as the operators promise."""
    return out.to(like.dtype).contiguous(memory_format=memory_format(like))


def masked(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A gradient finished like its tensor, or an empty tensor where none was asked for."""
    return like.new_empty(0) if gradient is None else finish(gradient, like)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int | tuple[int, int],
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
) -> Tensor:
    return F.conv2d(upcast(x), upcast(weight), upcast_optional(bias), stride, padding, dilation, groups)


def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Sequence[bool],
    padding: int | tuple[int, int],
    stride: int = 1,
    groups: int = 1,
    dilation: int = 1,
) -> tuple[Any, Any, Any]:
    """Gradients of `conv` to its input, weight and bias: tensors where `mask` asks for them, None elsewhere."""
    if not any(mask):
        return None, None, None
    x, weight = upcast(x), upcast(weight)
    if x.numel() == 0:
        return (
            torch.zeros_like(x) if mask[0] else None,
            torch.zeros_like(weight) if mask[1] else None,
            weight.new_zeros(weight.shape[0]) if mask[2] else None,
        )
    pads = [padding, padding] if isinstance(padding, int) else list(padding)
    strides, dilations = [stride, stride], [dilation, dilation]
    gradients = aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], strides, pads, dilations, False, [0, 0], groups, list(mask)
    )
    # Some of PyTorch's kernels return the weight's gradient although only the bias' was wanted.
    gx, gw, gb = (g if wanted else None for g, wanted in zip(gradients, mask, strict=True))
    return gx, gw, gb


def activate(h: Tensor, activation: str, negative_slope: float) -> Tensor:
    if activation == "none":
        return h
    if activation == "relu":
        return F.relu(h)
    if activation == "leaky_relu":
        return F.leaky_relu(h, negative_slope)
    if activation == "silu":
        return F.silu(h)
    return F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")


def apply(x: Tensor, function: str, low: Tensor, high: Tensor) -> Tensor:
    """A function of every element of a map, as plans have them; `low` and `high` broadcast over it.

    sigmoid: times `high`. leaky_relu: `low` is the factor of negative values. clamp: the bounds. rsqrt: `high` over the
    root, which is at least `low` and 1e-30. Other functions read neither.
    """
    if function == "sigmoid":
        return torch.sigmoid(x) * high
    if function == "clamp":
        return torch.minimum(torch.maximum(x, low), high)
    if function == "hardswish":
        return F.hardswish(x)
    if function == "mish":
        return F.mish(x)
    if function == "rsqrt":
        return high / torch.maximum(x.sqrt(), low.clamp_min(1e-30))
    if function == "leaky_relu":
        return torch.where(x < 0, x * low, x)
    return activate(x, function, 0.0)


def activation_backward(grad: Tensor, h: Tensor, activation: str, negative_slope: float) -> Tensor:
    """`grad` times the activation's derivative at `h`."""
    if activation == "none":
        return grad
    if activation == "relu":
        return aten.threshold_backward(grad, h, 0)
    if activation == "leaky_relu":
        return aten.leaky_relu_backward(grad, h, negative_slope, False)
    if activation == "silu":
        return aten.silu_backward(grad, h)
    return aten.gelu_backward(grad, h, approximate="tanh" if activation == "gelu_tanh" else "none")


def attention(h: Tensor, residual: Tensor) -> Tensor:
    """SPAN's parameter-free attention (report section 4.1, Eq. 3)."""
    return (h + residual) * (torch.sigmoid(h) - 0.5)


def epilogue(h: Tensor, residual: Tensor | None, activation: str, negative_slope: float, residual_mode: str) -> Tensor:
    """What follows a convolution's result `h` in `functional.conv3x3`."""
    if residual is None:
        return activate(h, activation, negative_slope)
    if residual_mode == "pre":
        return activate(h + residual, activation, negative_slope)
    if residual_mode == "post":
        return activate(h, activation, negative_slope) + residual
    return attention(h, residual)


def attention_backward(grad: Tensor, h: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `attention` to `h` and `residual`."""
    gate = torch.sigmoid(h)
    to_residual = grad * (gate - 0.5)
    return to_residual + grad * (h + residual) * gate * (1 - gate), to_residual
