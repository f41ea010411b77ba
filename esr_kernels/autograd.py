"""One `torch.autograd.Function` per operator, between the functional API and the registered operators.

`forward` and `backward` call registered operators and nothing else, so they compile, export and run under
`torch.func`. The same functions are registered as the operators' own derivatives, so that calling `torch.ops.esr.*`
directly differentiates too. Backward operators are not differentiable again and say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch, library

ops = torch.ops.esr


def _keep(gradient: Tensor, wanted: bool) -> Tensor | None:
    return gradient if wanted else None


class _Once(torch.autograd.Function):
    """A backward operator inside a graph that is differentiated again: works, but refuses that second derivative."""

    @staticmethod
    def forward(operator: str, call: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
        return tuple(call(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.operator = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(_no_second_derivative(ctx.operator))


def _inner_residual(activation: str, residual: Tensor | None, mode: str) -> Tensor | None:
    """The residual where the activation's derivative depends on it; another one's gradient is the result's own."""
    return residual if mode == "pre" and activation != "none" else None


def _remember_backend(ctx: Any, x: Tensor) -> None:
    """A CUDA gradient runs on a thread of its own, which does not see the forward's `use_backend`."""
    ctx.backend = dispatch.chosen_backend() if x.is_cuda and not torch.compiler.is_compiling() else None


def _once(ctx: Any, operator: str, call: Callable[..., Any], *args: Any) -> Sequence[Tensor]:
    """The gradients `call(*args)`; with create_graph or torch.func the graph through them is cut with an error."""
    if ctx.backend is not None:
        with dispatch.use_backend(ctx.backend):
            return _gradients(operator, call, *args)
    return _gradients(operator, call, *args)


def _gradients(operator: str, call: Callable[..., Any], *args: Any) -> Sequence[Tensor]:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Once.apply(operator, call, *args)
    return call(*args)


def _no_second_derivative(operator: str) -> str:
    return (
        f"esr::{operator} has no second derivative; for double backward call the functions of "
        "esr_kernels.backends.reference, which are plain PyTorch"
    )


class Conv3x3(torch.autograd.Function):
    """`esr_kernels.functional.conv3x3`; arguments in the order of the operator's schema."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        activation: str,
        negative_slope: float,
        residual_mode: str,
    ) -> Tensor:
        return ops.conv3x3(x, weight, bias, residual, activation, negative_slope, residual_mode)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _remember_backend(ctx, inputs[0])
        ctx.save_for_backward(*inputs[:4])
        ctx.settings = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        mask = list(ctx.needs_input_grad[:4])
        gradients = _once(ctx, "conv3x3", ops.conv3x3_backward, grad, *ctx.saved_tensors, *ctx.settings, mask)
        return (*map(_keep, gradients, mask), None, None, None)


class SPAB(torch.autograd.Function):
    """`esr_kernels.functional.spab`; returns the block's result and the activated first convolution (or empty)."""

    @staticmethod
    def forward(
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        w3: Tensor,
        b3: Tensor | None,
        return_mid: bool,
    ) -> tuple[Tensor, Tensor]:
        return ops.spab(x, w1, b1, w2, b2, w3, b3, return_mid)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _remember_backend(ctx, inputs[0])
        ctx.save_for_backward(*inputs[:7])
        ctx.return_mid = inputs[7]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_mid: Tensor | None) -> Any:
        saved = ctx.saved_tensors  # once: activation checkpointing hands them out a single time
        x, w3 = saved[0], saved[5]
        if not ctx.return_mid:  # then it is an empty tensor, whose gradient a compiled graph may materialise
            grad_mid = None
        if grad is None:
            if grad_mid is None:
                return (None,) * 8
            grad = grad_mid.new_zeros((x.shape[0], w3.shape[0], x.shape[2], x.shape[3]))
        mask = list(ctx.needs_input_grad[:7])
        gradients = _once(ctx, "spab", ops.spab_backward, grad, grad_mid, *saved, mask)
        return (*map(_keep, gradients, mask), None)


class Conv3x3PixelShuffle(torch.autograd.Function):
    """`esr_kernels.functional.conv3x3_pixel_shuffle`."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, upscale_factor: int) -> Tensor:
        return ops.conv3x3_pixel_shuffle(x, weight, bias, residual, upscale_factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _remember_backend(ctx, inputs[0])
        ctx.save_for_backward(*inputs[:3])
        ctx.upscale_factor = inputs[4]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        mask = list(ctx.needs_input_grad[:4])
        call = ops.conv3x3_pixel_shuffle_backward
        gradients = _once(ctx, "conv3x3_pixel_shuffle", call, grad, *ctx.saved_tensors, ctx.upscale_factor, mask)
        return (*map(_keep, gradients, mask), None)


class Conv1x1(torch.autograd.Function):
    """`esr_kernels.functional.conv1x1`; the tensors to concatenate come last, as autograd wants them one by one."""

    @staticmethod
    def forward(
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        negative_slope: float,
        residual: Tensor | None,
        residual_mode: str,
        *xs: Tensor,
    ) -> Tensor:
        return ops.conv1x1(list(xs), weight, bias, activation, negative_slope, residual, residual_mode)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        weight, bias, activation, slope, residual, mode, *xs = inputs
        _remember_backend(ctx, weight)
        ctx.settings = (activation, slope)
        ctx.save_for_backward(weight, bias, _inner_residual(activation, residual, mode), *xs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, bias, residual, *xs = ctx.saved_tensors
        to_weight, to_bias, _, _, to_residual, _, *to_xs = ctx.needs_input_grad
        mask = [*to_xs, to_weight, to_bias] + ([] if residual is None else [to_residual])
        settings = ctx.settings

        def call(grad: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *xs: Tensor) -> Any:
            return ops.conv1x1_backward(grad, list(xs), weight, bias, *settings, mask, residual)

        gradients: list[Tensor | None] = [None] * len(mask)
        if any(mask):
            gradients = list(map(_keep, _once(ctx, "conv1x1", call, grad, weight, bias, residual, *xs), mask))
        *gxs, gw, gb = gradients[: len(xs) + 2]
        gr = gradients[-1] if residual is not None else _keep(grad, to_residual)
        return (gw, gb, None, None, gr, None, *gxs)


class ESA(torch.autograd.Function):
    """`esr_kernels.functional.esa`."""

    @staticmethod
    def forward(x: Tensor, *weights: Tensor | None) -> Tensor:
        return ops.esa(x, *weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _remember_backend(ctx, inputs[0])
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        mask = list(ctx.needs_input_grad)
        return tuple(map(_keep, _once(ctx, "esa", ops.esa_backward, grad, *ctx.saved_tensors, mask), mask))


class BSConv(torch.autograd.Function):
    """`esr_kernels.functional.bsconv`."""

    @staticmethod
    def forward(
        x: Tensor,
        pointwise: Tensor,
        depthwise: Tensor,
        bias: Tensor | None,
        padding_mode: str,
        activation: str,
        negative_slope: float,
        residual: Tensor | None,
        residual_mode: str,
    ) -> Tensor:
        return ops.bsconv(
            x, pointwise, depthwise, bias, padding_mode, activation, negative_slope, residual, residual_mode
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, padding_mode, activation, slope, residual, mode = inputs
        _remember_backend(ctx, tensors[0])
        ctx.settings = (padding_mode, activation, slope)
        ctx.save_for_backward(*tensors, _inner_residual(activation, residual, mode))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *tensors, residual = ctx.saved_tensors
        needs = ctx.needs_input_grad  # of the operator itself without the arguments that were left to their defaults
        to_residual = len(needs) > 7 and needs[7]
        mask = [*needs[:4]] + ([] if residual is None else [to_residual])
        gradients: list[Tensor | None] = [None] * len(mask)
        if any(mask):
            args = (grad, *tensors, *ctx.settings, mask, residual)
            gradients = list(map(_keep, _once(ctx, "bsconv", ops.bsconv_backward, *args), mask))
        gr = gradients[4] if residual is not None else _keep(grad, to_residual)
        return (*gradients[:4], None, None, None, gr, None)[: len(needs)]


class DepthwiseConv(torch.autograd.Function):
    """`esr_kernels.functional.depthwise_conv`."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dilation: int,
        activation: str,
        negative_slope: float,
        gated: bool,
    ) -> Tensor:
        return ops.depthwise_conv(x, weight, bias, dilation, activation, negative_slope, gated)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _remember_backend(ctx, inputs[0])
        ctx.save_for_backward(*inputs[:3])
        ctx.settings = inputs[3:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        mask = list(ctx.needs_input_grad[:3])
        call = ops.depthwise_conv_backward
        gradients = _once(ctx, "depthwise_conv", call, grad, *ctx.saved_tensors, *ctx.settings, mask)
        return (*map(_keep, gradients, mask), None, None, None, None)


class LayerNorm2d(torch.autograd.Function):
    """`esr_kernels.functional.layer_norm2d`."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        return ops.layer_norm2d(x, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _remember_backend(ctx, inputs[0])
        ctx.save_for_backward(*inputs[:3])
        ctx.eps = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        mask = list(ctx.needs_input_grad[:3])
        gradients = _once(ctx, "layer_norm2d", ops.layer_norm2d_backward, grad, *ctx.saved_tensors, ctx.eps, mask)
        return (*map(_keep, gradients, mask), None)


class AdaptiveMaxPool(torch.autograd.Function):
    """`esr_kernels.functional.adaptive_max_pool`."""

    @staticmethod
    def forward(x: Tensor, output_size: Sequence[int]) -> Tensor:
        return ops.adaptive_max_pool(x, output_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _remember_backend(ctx, inputs[0])
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        call = ops.adaptive_max_pool_backward
        (gx,) = _once(ctx, "adaptive_max_pool", call, grad, *ctx.saved_tensors, [True])
        return gx, None


class Modulate(torch.autograd.Function):
    """`esr_kernels.functional.modulate`; the maps come last, as autograd wants them one by one."""

    @staticmethod
    def forward(x: Tensor, mode: str, activation: str, negative_slope: float, *maps: Tensor) -> Tensor:
        return ops.modulate(x, list(maps), mode, activation, negative_slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, *ctx.settings = inputs[:4]
        _remember_backend(ctx, x)
        ctx.save_for_backward(x, *inputs[4:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        mask = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
        settings = ctx.settings

        def call(grad: Tensor, x: Tensor, *maps: Tensor) -> list[Tensor]:
            return ops.modulate_backward(grad, x, list(maps), *settings, mask)

        gx, *gmaps = map(_keep, _once(ctx, "modulate", call, grad, *ctx.saved_tensors), mask)
        return (gx, None, None, None, *gmaps)


class SelectiveScan(torch.autograd.Function):
    """`esr_kernels.functional.selective_scan`."""

    @staticmethod
    def forward(
        u: Tensor,
        delta: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
    ) -> Tensor:
        return ops.selective_scan(u, delta, a, b, c, d, z, delta_bias, delta_softplus)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _remember_backend(ctx, inputs[0])
        ctx.save_for_backward(*inputs[:8])
        ctx.delta_softplus = inputs[8]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        mask = list(ctx.needs_input_grad[:8])
        call = ops.selective_scan_backward
        gradients = _once(ctx, "selective_scan", call, grad, *ctx.saved_tensors, ctx.delta_softplus, mask)
        return (*map(_keep, gradients, mask), None)


class WindowAttention(torch.autograd.Function):
    """`esr_kernels.functional.window_attention`; arguments in the order of the operator's schema."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        scales: Tensor | None,
        residual: Tensor | None,
        window: list[int],
        heads: int,
        scale: float,
        cosine: bool,
        shift: list[int],
        shift_mask: float,
    ) -> Tensor:
        settings = (window, heads, scale, cosine, shift, shift_mask)
        return ops.window_attention(q, k, v, bias, scales, residual, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _remember_backend(ctx, inputs[0])
        ctx.save_for_backward(*inputs[:5])
        ctx.settings = inputs[6:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        mask = list(ctx.needs_input_grad[:5])
        call = ops.window_attention_backward
        gradients = _once(ctx, "window_attention", call, grad, *ctx.saved_tensors, *ctx.settings, mask)
        to_residual = _keep(grad, ctx.needs_input_grad[5])
        return (*map(_keep, gradients, mask), to_residual, *(None,) * 6)


# --- the operators' own derivatives, for direct calls of torch.ops.esr.* ------------------------------------------


def _conv1x1_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    xs, weight, bias, activation, slope, residual, mode = inputs
    ctx.settings = (activation, slope)
    ctx.save_for_backward(weight, bias, _inner_residual(activation, residual, mode), *xs)


def _conv1x1_backward(ctx: Any, grad: Tensor) -> Any:
    weight, bias, residual, *xs = ctx.saved_tensors
    needs = ctx.needs_input_grad  # without the arguments that were left to their defaults
    to_residual = len(needs) > 5 and needs[5]
    mask = [*needs[0], *needs[1:3]] + ([] if residual is None else [to_residual])
    gradients = list(map(_keep, ops.conv1x1_backward(grad, xs, weight, bias, *ctx.settings, mask, residual), mask))
    *gxs, gw, gb = gradients[: len(xs) + 2]
    gr = gradients[-1] if residual is not None else _keep(grad, to_residual)
    return (gxs, gw, gb, None, None, gr, None)[: len(needs)]


def _modulate_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, maps, *ctx.settings = inputs
    ctx.save_for_backward(x, *maps)


def _modulate_backward(ctx: Any, grad: Tensor) -> Any:
    x, *maps = ctx.saved_tensors
    mask = [t.requires_grad for t in (x, *maps)]
    gx, *gmaps = map(_keep, ops.modulate_backward(grad, x, maps, *ctx.settings, mask), mask)
    return gx, gmaps, None, None, None


def _not_differentiable_twice(operator: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(_no_second_derivative(operator))

    return backward


def _no_plan_gradient(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("esr::run_plan is for inference and has no derivative; train the model, then optimize it")


for _name, _function in (
    ("conv3x3", Conv3x3),
    ("spab", SPAB),
    ("conv3x3_pixel_shuffle", Conv3x3PixelShuffle),
    ("esa", ESA),
    ("bsconv", BSConv),
    ("depthwise_conv", DepthwiseConv),
    ("layer_norm2d", LayerNorm2d),
    ("adaptive_max_pool", AdaptiveMaxPool),
    ("selective_scan", SelectiveScan),
    ("window_attention", WindowAttention),
):
    torch.library.register_autograd(
        f"esr::{_name}", _function.backward, setup_context=_function.setup_context, lib=library._library
    )
torch.library.register_autograd("esr::conv1x1", _conv1x1_backward, setup_context=_conv1x1_setup, lib=library._library)
torch.library.register_autograd(
    "esr::modulate", _modulate_backward, setup_context=_modulate_setup, lib=library._library
)
for _name in library.SCHEMAS:
    if _name.endswith("_backward"):
        torch.library.register_autograd(
            f"esr::{_name}", _not_differentiable_twice(_name.removesuffix("_backward")), lib=library._library
        )
torch.library.register_autograd("esr::run_plan", _no_plan_gradient, lib=library._library)
