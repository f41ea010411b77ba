"""The registered operators of the namespace `esr`: schemas, fake kernels and FLOP formulas.

An operator's kernel for every device is `dispatch.run`, which picks the backend. Each schema has its tensors
first, and each backward operator takes the gradient first, then the forward's arguments, then which gradients
are wanted; an unwanted one comes back as an empty tensor. What an operator has learnt since its first release follows
with a default. A residual that only is added, or is added where no activation follows, has the result's gradient or
the sum's: backward operators with such a default take those alone that the activation's derivative depends on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import dispatch
from .plan import Plan, layer_flops

ACTIVATIONS = ("none", "relu", "leaky_relu", "silu", "gelu", "gelu_tanh")
SUM_MODES = ("pre", "post")
RESIDUAL_MODES = (*SUM_MODES, "attention")
PADDING_MODES = ("zeros", "reflect")
RESIZE_MODES = ("nearest", "bilinear")

_CONV3X3 = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str activation, float negative_slope, str residual_mode"
)
_SPAB = "Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor w3, Tensor? b3"
_TAIL = "Tensor x, Tensor weight, Tensor? bias"
_CONV1X1 = "Tensor[] xs, Tensor weight, Tensor? bias, str activation, float negative_slope"
_RESIDUAL = 'Tensor? residual=None, str residual_mode="post"'
_ESA = (
    "Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor w3, Tensor? b3, Tensor w4, Tensor? b4, "
    "Tensor? wf, Tensor? bf, Tensor? w_max, Tensor? b_max, Tensor? w3_, Tensor? b3_"
)
_BSCONV = (
    "Tensor x, Tensor pointwise, Tensor depthwise, Tensor? bias, str padding_mode, str activation, float negative_slope"
)
_DEPTHWISE = "Tensor x, Tensor weight, Tensor? bias, int dilation, str activation, float negative_slope, bool gated"
_NORM = "Tensor x, Tensor? weight, Tensor? bias, float eps"
_SCAN = (
    "Tensor u, Tensor delta, Tensor a, Tensor b, Tensor c, Tensor? d, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus"
)
_MODULATE = "Tensor x, Tensor[] maps, str mode, str activation, float negative_slope"
_WINDOWS = "int[] window, int heads, float scale, bool cosine, int[] shift, float shift_mask"

SCHEMAS = {
    "conv3x3": f"({_CONV3X3}) -> Tensor",
    "conv3x3_backward": f"(Tensor grad, {_CONV3X3}, bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor)",
    "spab": f"({_SPAB}, bool return_mid) -> (Tensor, Tensor)",
    "spab_backward": f"(Tensor grad, Tensor? grad_mid, {_SPAB}, bool[] output_mask) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "conv3x3_pixel_shuffle": f"({_TAIL}, Tensor? residual, int upscale_factor) -> Tensor",
    "conv3x3_pixel_shuffle_backward": f"(Tensor grad, {_TAIL}, int upscale_factor, bool[] output_mask) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    "conv1x1": f"({_CONV1X1}, {_RESIDUAL}) -> Tensor",
    "conv1x1_backward": f"(Tensor grad, {_CONV1X1}, bool[] output_mask, Tensor? residual=None) -> Tensor[]",
    "esa": f"({_ESA}) -> Tensor",
    "esa_backward": f"(Tensor grad, {_ESA}, bool[] output_mask) -> Tensor[]",
    "bsconv": f"({_BSCONV}, {_RESIDUAL}) -> Tensor",
    "bsconv_backward": f"(Tensor grad, {_BSCONV}, bool[] output_mask, Tensor? residual=None) -> Tensor[]",
    "depthwise_conv": f"({_DEPTHWISE}) -> Tensor",
    "depthwise_conv_backward": f"(Tensor grad, {_DEPTHWISE}, bool[] output_mask) -> (Tensor, Tensor, Tensor)",
    "layer_norm2d": f"({_NORM}) -> Tensor",
    "layer_norm2d_backward": f"(Tensor grad, {_NORM}, bool[] output_mask) -> (Tensor, Tensor, Tensor)",
    "adaptive_max_pool": "(Tensor x, SymInt[] output_size) -> Tensor",
    "adaptive_max_pool_backward": "(Tensor grad, Tensor x, bool[] output_mask) -> Tensor[]",
    "modulate": f"({_MODULATE}) -> Tensor",
    "modulate_backward": f"(Tensor grad, {_MODULATE}, bool[] output_mask) -> Tensor[]",
    "selective_scan": f"({_SCAN}) -> Tensor",
    "selective_scan_backward": f"(Tensor grad, {_SCAN}, bool[] output_mask) -> Tensor[]",
    "window_attention": f"(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? scales, Tensor? residual, {_WINDOWS})"
    " -> Tensor",
    "window_attention_backward": f"(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? scales, {_WINDOWS}"
    ", bool[] output_mask) -> Tensor[]",
    "run_plan": "(Tensor[] inputs, Tensor[] weights, str plan) -> Tensor[]",
}

_library = torch.library.Library("esr", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def _kernel(operator: str, *args: Any) -> Any:
    return dispatch.run(operator, args)


for _name in SCHEMAS:
    _library.impl(_name, partial(_kernel, _name), "CompositeExplicitAutograd")


# --- fake kernels: shapes and the real strides --------------------------------------------------------------------


def memory_format(x: Tensor) -> torch.memory_format:
    """What results for `x` have: channels_last for parts of the channels of a channels_last tensor too.

    Of an image alone and of the same one inside a batch it is the same: only strides between an image's pixels count.
    """
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last) or has_whole_pixels(x):
        return torch.channels_last
    return torch.contiguous_format


def has_whole_pixels(x: Tensor) -> bool:
    """Whether the channels of a pixel are adjacent, and those of others before or behind them; false of one pixel."""
    if x.dim() != 4 or x.shape[1] <= 1 or x.shape[2] * x.shape[3] <= 1:
        return False
    return x.stride(1) == 1 and x.stride(3 if x.shape[3] > 1 else 2) >= x.shape[1]


def feature_map(x: Tensor, channels: int) -> Tensor:
    """An uninitialised [N, channels, H, W] in the memory format of `x`."""
    shape = (x.shape[0], channels, x.shape[2], x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def image(x: Tensor, channels: int, scale: int) -> Tensor:
    """An uninitialised NCHW [N, channels, H scale, W scale]."""
    return x.new_empty((x.shape[0], channels, x.shape[2] * scale, x.shape[3] * scale))


def gradient(like: Tensor, wanted: bool = True) -> Tensor:
    if not wanted:
        return like.new_empty(0)
    return torch.empty(like.shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like))


def bias_gradient(bias: Tensor | None, weight: Tensor, wanted: bool) -> Tensor:
    like = weight if bias is None else bias
    return like.new_empty(weight.shape[0] if wanted else 0)


@torch.library.register_fake("esr::conv3x3", lib=_library)
def _(x, weight, bias, residual, activation, negative_slope, residual_mode):  # type: ignore[no-untyped-def]
    return feature_map(x, weight.shape[0])


@torch.library.register_fake("esr::conv3x3_backward", lib=_library)
def _(grad, x, weight, bias, residual, activation, negative_slope, residual_mode, output_mask):  # type: ignore[no-untyped-def]
    return (
        gradient(x, output_mask[0]),
        gradient(weight, output_mask[1]),
        bias_gradient(bias, weight, output_mask[2]),
        feature_map(x, weight.shape[0]) if output_mask[3] else x.new_empty(0),
    )


@torch.library.register_fake("esr::spab", lib=_library)
def _(x, w1, b1, w2, b2, w3, b3, return_mid):  # type: ignore[no-untyped-def]
    return feature_map(x, w3.shape[0]), feature_map(x, w1.shape[0]) if return_mid else x.new_empty(0)


@torch.library.register_fake("esr::spab_backward", lib=_library)
def _(grad, grad_mid, x, w1, b1, w2, b2, w3, b3, output_mask):  # type: ignore[no-untyped-def]
    gradients = [gradient(x, output_mask[0])]
    for i, (weight, bias) in enumerate(((w1, b1), (w2, b2), (w3, b3))):
        gradients.append(gradient(weight, output_mask[2 * i + 1]))
        gradients.append(bias_gradient(bias, weight, output_mask[2 * i + 2]))
    return tuple(gradients)


@torch.library.register_fake("esr::conv3x3_pixel_shuffle", lib=_library)
def _(x, weight, bias, residual, upscale_factor):  # type: ignore[no-untyped-def]
    return image(x, weight.shape[0] // upscale_factor**2, upscale_factor)


@torch.library.register_fake("esr::conv3x3_pixel_shuffle_backward", lib=_library)
def _(grad, x, weight, bias, upscale_factor, output_mask):  # type: ignore[no-untyped-def]
    return (
        gradient(x, output_mask[0]),
        gradient(weight, output_mask[1]),
        bias_gradient(bias, weight, output_mask[2]),
        x.new_empty(grad.shape if output_mask[3] else 0),
    )


@torch.library.register_fake("esr::conv1x1", lib=_library)
def _(xs, weight, bias, activation, negative_slope, residual=None, residual_mode="post"):  # type: ignore[no-untyped-def]
    return feature_map(xs[0], weight.shape[0])


@torch.library.register_fake("esr::conv1x1_backward", lib=_library)
def _(grad, xs, weight, bias, activation, negative_slope, output_mask, residual=None):  # type: ignore[no-untyped-def]
    return conv1x1_gradients(xs, weight, bias, output_mask, residual)


def conv1x1_gradients(
    xs: Sequence[Tensor], weight: Tensor, bias: Tensor | None, output_mask: Sequence[bool], residual: Tensor | None
) -> list[Tensor]:
    """Uninitialised gradients to each of xs, to weight and bias, and to the residual where there is one."""
    to_weight, to_bias, *to_residual = output_mask[len(xs) :]
    gradients = [gradient(x, wanted) for x, wanted in zip(xs, output_mask[: len(xs)], strict=True)]
    gradients += [gradient(weight, to_weight), bias_gradient(bias, weight, to_bias)]
    return gradients + _residual_gradient(xs[0], weight, to_residual, residual)


@torch.library.register_fake("esr::esa", lib=_library)
def _(x, *weights):  # type: ignore[no-untyped-def]
    return feature_map(x, x.shape[1])


def esa_gradients(tensors: Sequence[Tensor | None], output_mask: Sequence[bool]) -> list[Tensor]:
    """Uninitialised gradients to x and ESA's fourteen parameters, empty where there is none or none is wanted."""
    x = tensors[0]
    assert x is not None
    return [x.new_empty(0) if t is None else gradient(t, m) for t, m in zip(tensors, output_mask, strict=True)]


@torch.library.register_fake("esr::esa_backward", lib=_library)
def _(grad, *args):  # type: ignore[no-untyped-def]
    return esa_gradients(args[:-1], args[-1])


@torch.library.register_fake("esr::bsconv", lib=_library)
def _(  # type: ignore[no-untyped-def]
    x, pointwise, depthwise, bias, padding_mode, activation, negative_slope, residual=None, residual_mode="post"
):
    return feature_map(x, depthwise.shape[0])


@torch.library.register_fake("esr::bsconv_backward", lib=_library)
def _(  # type: ignore[no-untyped-def]
    grad, x, pointwise, depthwise, bias, padding_mode, activation, negative_slope, output_mask, residual=None
):
    return bsconv_gradients(x, pointwise, depthwise, bias, output_mask, residual)


def bsconv_gradients(
    x: Tensor,
    pointwise: Tensor,
    depthwise: Tensor,
    bias: Tensor | None,
    output_mask: Sequence[bool],
    residual: Tensor | None,
) -> list[Tensor]:
    """Uninitialised gradients to x, pointwise, depthwise and bias, and to the residual where there is one."""
    to_x, to_pointwise, to_depthwise, to_bias, *to_residual = output_mask
    gradients = [gradient(x, to_x), gradient(pointwise, to_pointwise), gradient(depthwise, to_depthwise)]
    gradients.append(bias_gradient(bias, depthwise, to_bias))
    return gradients + _residual_gradient(x, depthwise, to_residual, residual)


def _residual_gradient(x: Tensor, weight: Tensor, wanted: Sequence[bool], residual: Tensor | None) -> list[Tensor]:
    """The uninitialised gradient to a residual of the result [N, O, H, W], in a list that is empty without one."""
    if residual is None:
        return []
    (to_residual,) = wanted
    return [feature_map(x, weight.shape[0]) if to_residual else residual.new_empty(0)]


@torch.library.register_fake("esr::depthwise_conv", lib=_library)
def _(x, weight, bias, dilation, activation, negative_slope, gated):  # type: ignore[no-untyped-def]
    return feature_map(x, x.shape[1] // 2 if gated else x.shape[1])


@torch.library.register_fake("esr::depthwise_conv_backward", lib=_library)
def _(grad, x, weight, bias, dilation, activation, negative_slope, gated, output_mask):  # type: ignore[no-untyped-def]
    return (
        gradient(x, output_mask[0]),
        gradient(weight, output_mask[1]),
        bias_gradient(bias, weight, output_mask[2]),
    )


@torch.library.register_fake("esr::layer_norm2d", lib=_library)
def _(x, weight, bias, eps):  # type: ignore[no-untyped-def]
    return feature_map(x, x.shape[1])


def norm_gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised gradients of `layer_norm2d`, empty where there is no tensor or none is wanted."""
    to_weight, to_bias = (
        x.new_empty(0) if t is None else gradient(t, wanted)
        for t, wanted in zip((weight, bias), output_mask[1:], strict=True)
    )
    return gradient(x, output_mask[0]), to_weight, to_bias


@torch.library.register_fake("esr::layer_norm2d_backward", lib=_library)
def _(grad, x, weight, bias, eps, output_mask):  # type: ignore[no-untyped-def]
    return norm_gradients(x, weight, bias, output_mask)


def pooled_map(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """An uninitialised [N, C, *output_size] in the memory format of `x`."""
    shape = (x.shape[0], x.shape[1], *output_size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


@torch.library.register_fake("esr::adaptive_max_pool", lib=_library)
def _(x, output_size):  # type: ignore[no-untyped-def]
    return pooled_map(x, output_size)


@torch.library.register_fake("esr::adaptive_max_pool_backward", lib=_library)
def _(grad, x, output_mask):  # type: ignore[no-untyped-def]
    return [gradient(x, output_mask[0])]


@torch.library.register_fake("esr::modulate", lib=_library)
def _(x, maps, mode, activation, negative_slope):  # type: ignore[no-untyped-def]
    return feature_map(x, x.shape[1])


@torch.library.register_fake("esr::modulate_backward", lib=_library)
def _(grad, x, maps, mode, activation, negative_slope, output_mask):  # type: ignore[no-untyped-def]
    return [gradient(t, wanted) for t, wanted in zip((x, *maps), output_mask, strict=True)]


@torch.library.register_fake("esr::selective_scan", lib=_library)
def _(u, delta, a, b, c, d, z, delta_bias, delta_softplus):  # type: ignore[no-untyped-def]
    return u.new_empty(u.shape)


@torch.library.register_fake("esr::selective_scan_backward", lib=_library)
def _(grad, *args):  # type: ignore[no-untyped-def]
    u, output_mask = args[0], args[-1]
    given = zip(args[:8], output_mask, strict=True)
    return [u.new_empty(0) if t is None else t.new_empty(t.shape if wanted else 0) for t, wanted in given]


@torch.library.register_fake("esr::window_attention", lib=_library)
def _(q, k, v, bias, scales, residual, window, heads, scale, cosine, shift, shift_mask):  # type: ignore[no-untyped-def]
    return feature_map(q, q.shape[1])


@torch.library.register_fake("esr::window_attention_backward", lib=_library)
def _(grad, q, k, v, bias, scales, window, heads, scale, cosine, shift, shift_mask, output_mask):  # type: ignore[no-untyped-def]
    tensors = zip((q, k, v, bias, scales), output_mask, strict=True)
    return [q.new_empty(0) if t is None else gradient(t, wanted) for t, wanted in tensors]


@torch.library.register_fake("esr::run_plan", lib=_library)
def run_plan_outputs(inputs: list[Tensor], weights: list[Tensor], plan: str) -> list[Tensor]:
    """The plan's uninitialised outputs: feature maps in the first input's memory format, images in NCHW."""
    p = Plan.from_json(plan)
    x = inputs[0]
    return [
        feature_map(x, p.channels[i]) if p.scales[i] == 1 else image(x, p.channels[i], int(p.scales[i]))
        for i in p.outputs
    ]


# --- FLOPs: a multiply-add counts as two, as torch.utils.flop_counter does ------------------------------------------

Shape = Sequence[int]


def _count(op: str, x: Shape, cin: list[int], cout: int, **attributes: Any) -> int:
    return x[0] * layer_flops(op, cin, cout, attributes, x[2], x[3])


@register_flop_formula(torch.ops.esr.conv3x3)
def _(x: Shape, weight: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _count("conv3x3", x, [weight[1]], weight[0])


@register_flop_formula(torch.ops.esr.spab)
def _(x: Shape, w1: Shape, b1: Any, w2: Shape, b2: Any, w3: Shape, *args: Any, **kwargs: Any) -> int:
    return sum(_count("conv3x3", x, [w[1]], w[0]) for w in (w1, w2, w3))


@register_flop_formula(torch.ops.esr.conv3x3_pixel_shuffle)
def _(x: Shape, weight: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _count("conv3x3", x, [weight[1]], weight[0])


@register_flop_formula(torch.ops.esr.conv1x1)
def _(xs: Sequence[Shape], weight: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _count("conv1x1", xs[0], [weight[1]], weight[0])


@register_flop_formula(torch.ops.esr.bsconv)
def _(x: Shape, pointwise: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _count("bsconv", x, [pointwise[1]], pointwise[0])


@register_flop_formula(torch.ops.esr.depthwise_conv)
def _depthwise_flops(x: Shape, weight: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _count("depthwise_conv", x, [x[1]], x[1], kernel_size=weight[2:])


@register_flop_formula(torch.ops.esr.layer_norm2d)
def _norm_flops(x: Shape, weight: Any, bias: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _count("layer_norm2d", x, [x[1]], x[1], has_weight=weight is not None, has_bias=bias is not None)


@register_flop_formula(torch.ops.esr.modulate)
def _modulate_flops(
    x: Shape, maps: Sequence[Shape], mode: str, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    resized = [x[1] for t in maps if list(t[2:]) != list(x[2:])]
    return _count("modulate", x, resized, x[1], mode=mode)


@register_flop_formula(torch.ops.esr.selective_scan)
def _scan_flops(
    u: Shape,
    delta: Shape,
    a: Shape,
    b: Shape,
    c: Shape,
    d: Any,
    z: Any,
    *args: Any,
    out_shape: Any = None,
    **kwargs: Any,
) -> int:
    """Of a state the exponent, what is added, the decay and the sum to y; of an element delta u, d u and the gate."""
    each = 1 + 2 * int(d is not None) + int(z is not None)
    return math.prod(u) * (6 * a[1] + each)


def _window_product(q: Shape, window: Sequence[int]) -> int:
    """Of every query with every key of its window, or of the weights with the values."""
    return 2 * math.prod(q) * math.prod(window)


@register_flop_formula(torch.ops.esr.window_attention)
def _(q: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * _window_product(q, args[5])


@register_flop_formula(torch.ops.esr.esa)
def _esa_flops(x: Shape, w1: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    wf, w_max = args[7], args[9]
    return _count("esa", x, [x[1]], x[1], hidden=w1[0], has_conv_f=wf is not None, has_conv_max=w_max is not None)


def _convolution_gradients(forward: int, output_mask: Sequence[bool]) -> int:
    """The data gradient and the weight gradient each cost as much as the forward convolution."""
    return forward * (int(output_mask[0]) + int(output_mask[1]))


@register_flop_formula(torch.ops.esr.conv3x3_backward)
def _(grad: Shape, x: Shape, weight: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    residual, activation, mode, mask = args[1], args[2], args[4], args[5]
    forward = _count("conv3x3", x, [weight[1]], weight[0])
    recomputed = activation != "none" or (residual is not None and mode == "attention")
    return recomputed * forward + _convolution_gradients(forward, mask)


@register_flop_formula(torch.ops.esr.spab_backward)
def _(
    grad: Shape, grad_mid: Any, x: Shape, w1: Shape, b1: Any, w2: Shape, b2: Any, w3: Shape, *args: Any, **kwargs: Any
) -> int:
    mask = args[1]
    f1, f2, f3 = (_count("conv3x3", x, [w[1]], w[0]) for w in (w1, w2, w3))
    data = f3 + f2 + f1 * int(mask[0])
    return f1 + f2 + f3 + data + f1 * int(mask[1]) + f2 * int(mask[3]) + f3 * int(mask[5])


@register_flop_formula(torch.ops.esr.conv3x3_pixel_shuffle_backward)
def _(grad: Shape, x: Shape, weight: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return _convolution_gradients(_count("conv3x3", x, [weight[1]], weight[0]), args[2])


@register_flop_formula(torch.ops.esr.conv1x1_backward)
def _(grad: Shape, xs: Sequence[Shape], weight: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    activation, mask = args[1], args[3]
    forward = _count("conv1x1", xs[0], [weight[1]], weight[0])
    to_xs, to_weight = any(mask[: len(xs)]), mask[len(xs)]
    return (activation != "none") * forward + _convolution_gradients(forward, [to_xs, to_weight])


@register_flop_formula(torch.ops.esr.bsconv_backward)
def _(grad: Shape, x: Shape, pointwise: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    activation, mask = args[3], args[5]
    point = _count("conv1x1", x, [pointwise[1]], pointwise[0])
    depth = _count("bsconv", x, [pointwise[1]], pointwise[0]) - point
    total = point + depth * (activation != "none") + _convolution_gradients(point, mask)
    return total + depth * (int(mask[0] or mask[1]) + int(mask[2]))


@register_flop_formula(torch.ops.esr.depthwise_conv_backward)
def _(grad: Shape, x: Shape, weight: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    activation, gated, mask = args[2], args[4], args[5]
    forward = _depthwise_flops(x, weight)
    return (gated or activation != "none") * forward + _convolution_gradients(forward, mask)


@register_flop_formula(torch.ops.esr.layer_norm2d_backward)
def _(grad: Shape, x: Shape, weight: Any, bias: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """x normalised again; two sums and what they are of, two differences, a product and a quotient; sums of each."""
    to_x, to_weight, to_bias = args[1]
    each = 5 * int(to_x or to_weight) + (7 + int(weight is not None)) * int(to_x) + 2 * int(to_weight) + int(to_bias)
    return math.prod(x) * each


@register_flop_formula(torch.ops.esr.modulate_backward)
def _(grad: Shape, x: Shape, maps: Sequence[Shape], mode: str, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The maps resized again, and the transpose for each that wants its gradient."""
    mask = args[2]
    again = _modulate_flops(x, maps, mode) if any(mask) else 0
    return again + _modulate_flops(x, [t for t, wanted in zip(maps, mask[1:], strict=True) if wanted], mode)


@register_flop_formula(torch.ops.esr.selective_scan_backward)
def _(grad: Shape, u: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The states again, their gradients in the other direction, and what these are to the states' five operands."""
    *rest, mask = args
    return any(mask) * (_scan_flops(u, *rest) + math.prod(u) * 13 * rest[1][1])


@register_flop_formula(torch.ops.esr.window_attention_backward)
def _(grad: Shape, q: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """The scores again, the gradient to the weights where it leads further, and one product for each gradient."""
    to_q, to_k, to_v, to_bias, to_scales = args[10]
    to_weights = to_q or to_k or to_bias or to_scales
    products = any(args[10]) + bool(to_weights) + bool(to_q or to_scales) + bool(to_k) + bool(to_v)
    return products * _window_product(q, args[4])


@register_flop_formula(torch.ops.esr.esa_backward)
def _(grad: Shape, x: Shape, w1: Shape, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    *rest, mask = args
    forward = _esa_flops(x, w1, *rest)
    return any(mask) * forward + _convolution_gradients(forward, [mask[0], any(mask[1:])])


@register_flop_formula(torch.ops.esr.run_plan)
def _(inputs: Sequence[Shape], weights: Any, plan: str, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    n, _channels, h, w = inputs[0]
    return Plan.from_json(plan).flops(n, h, w)
