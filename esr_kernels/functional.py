"""The fused operators as functions.

Every function but `selective_scan` takes [N, C, H, W] tensors in NCHW or channels_last memory format (others too, at
the price of a copy), of dtype float32, float16 or bfloat16 (float64 on the reference backend), and returns the input's
dtype and memory format. Sums are accumulated and activations evaluated in float32 at least. Under autocast the
floating-point arguments are cast to its dtype. All are differentiable once and safe for empty batches.

While `torch.jit` traces (fvcore's FLOP count) and while `torch.onnx` exports they decompose into plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from . import autograd, dispatch
from .backends import reference
from .library import ACTIVATIONS, PADDING_MODES, RESIDUAL_MODES, RESIZE_MODES, SUM_MODES

__all__ = [
    "adaptive_max_pool",
    "bsconv",
    "conv1x1",
    "conv3x3",
    "conv3x3_pixel_shuffle",
    "depthwise_conv",
    "esa",
    "layer_norm2d",
    "modulate",
    "selective_scan",
    "spab",
    "window_attention",
]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
DEPTHWISE_SIDES = (1, 3, 5, 7)
MODULATE_MAPS = 8  # at most
ESA_MINIMUM = 15  # a valid stride-2 3x3 convolution, then a valid 7x7 max-pooling


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    negative_slope: float = 0.05,
    residual: Tensor | None = None,
    residual_mode: str = "post",
) -> Tensor:
    """3x3 convolution (stride 1, zero padding 1), activation and residual in one step.

    With h = conv2d(x, weight, bias, padding=1), equivalent to

    - ``act(h)`` without a residual,
    - ``act(h + residual)`` for residual_mode "pre",
    - ``act(h) + residual`` for "post",
    - ``(h + residual) * (sigmoid(h) - 0.5)`` for "attention": SPAN's parameter-free attention (Wan et al., "Swift
      Parameter-free Attention Network for Efficient Super-Resolution"; report section 4.1, Eq. 3).

    Args:
        x: [N, C, H, W].
        weight: [O, C, 3, 3].
        bias: [O] or None.
        activation: "none", "relu", "leaky_relu", "silu", "gelu" (exact) or "gelu_tanh".
        negative_slope: slope of "leaky_relu" below zero.
        residual: [N, O, H, W] or None.
        residual_mode: "pre", "post" or "attention"; the last needs a residual and activation "none".

    Returns:
        [N, O, H, W].

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or device, or is not one of the names above.
        BackendError: no backend can run the call.
    """
    x, weight, bias, residual = _autocast(x, weight, bias, residual)
    _check_input("x", x)
    _check_weight("weight", weight, x, x.shape[1], 3)
    _check_bias("bias", bias, weight, x)
    _check_name("activation", activation, ACTIVATIONS)
    _check_name("residual_mode", residual_mode, RESIDUAL_MODES)
    if residual is not None:
        _check_like("residual", residual, x, (x.shape[0], weight.shape[0], x.shape[2], x.shape[3]))
    if residual_mode == "attention":
        if residual is None:
            raise ValueError('residual: residual_mode "attention" needs one, got None')
        if activation != "none":
            raise ValueError(f'activation: residual_mode "attention" allows only "none", got {activation!r}')
    args = (x, weight, bias, residual, activation, float(negative_slope), residual_mode)
    return _call("conv3x3", autograd.Conv3x3, args)


@overload
def spab(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    *,
    return_mid: Literal[False] = False,
) -> Tensor: ...
@overload
def spab(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    *,
    return_mid: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def spab(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    *,
    return_mid: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """SPAN's swift parameter-free attention block.

    Equivalent to ``mid = silu(conv(x, w1, b1)); h = conv(silu(conv(mid, w2, b2)), w3, b3);
    out = (h + x) * (sigmoid(h) - 0.5)`` with 3x3 convolutions of zero padding 1 (report section 4.1, Eq. 3).

    Args:
        x: [N, C, H, W].
        w1, w2, w3: [M, C, 3, 3], [K, M, 3, 3], [C, K, 3, 3].
        b1, b2, b3: [M], [K], [C], or None.
        return_mid: also return `mid`, the activated first convolution, which SPAN concatenates at its end.

    Returns:
        out [N, C, H, W], or (out, mid [N, M, H, W]).

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or device.
        BackendError: no backend can run the call.
    """
    x, w1, b1, w2, b2, w3, b3 = _autocast(x, w1, b1, w2, b2, w3, b3)
    _check_input("x", x)
    channels = x.shape[1]
    for n, weight, bias in ((1, w1, b1), (2, w2, b2), (3, w3, b3)):
        _check_weight(f"w{n}", weight, x, channels, 3)
        _check_bias(f"b{n}", bias, weight, x)
        channels = weight.shape[0]
    if channels != x.shape[1]:
        raise ValueError(f"w3: the block returns as many channels as x has ({x.shape[1]}), got {channels}")
    args = (x, w1, b1, w2, b2, w3, b3, bool(return_mid))
    out, mid = _call("spab", autograd.SPAB, args)
    return (out, mid) if return_mid else out


def conv3x3_pixel_shuffle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    upscale_factor: int,
    residual: Tensor | None = None,
) -> Tensor:
    """3x3 convolution and pixel shuffle (Shi et al., ESPCN), written straight to an NCHW image.

    Equivalent to ``pixel_shuffle(conv2d(x, weight, bias, padding=1), upscale_factor) + residual``.

    Args:
        x: [N, C, H, W].
        weight: [O r r, C, 3, 3] with r = upscale_factor.
        bias: [O r r] or None.
        upscale_factor: r, at least 1.
        residual: [N, O, H r, W r] or None.

    Returns:
        [N, O, H r, W r], NCHW-contiguous whatever the memory format of x.

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or device.
        BackendError: no backend can run the call.
    """
    x, weight, bias, residual = _autocast(x, weight, bias, residual)
    _check_input("x", x)
    _check_weight("weight", weight, x, x.shape[1], 3)
    _check_bias("bias", bias, weight, x)
    r = upscale_factor
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"upscale_factor: expected an int, got {type(r).__name__}")
    if r < 1 or weight.shape[0] % (r * r):
        raise ValueError(
            f"upscale_factor: must be at least 1 and its square must divide weight's {weight.shape[0]} output "
            f"channels, got {r}"
        )
    if residual is not None:
        shape = (x.shape[0], weight.shape[0] // (r * r), x.shape[2] * r, x.shape[3] * r)
        _check_like("residual", residual, x, shape)
    return _call("conv3x3_pixel_shuffle", autograd.Conv3x3PixelShuffle, (x, weight, bias, residual, r))


def conv1x1(
    xs: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    negative_slope: float = 0.05,
    residual: Tensor | None = None,
    residual_mode: str = "post",
) -> Tensor:
    """1x1 convolution of the channel concatenation of several tensors, which is never materialised.

    With h = conv2d(cat(xs, 1), weight, bias), equivalent to ``act(h)`` without a residual, ``act(h + residual)`` for
    residual_mode "pre" and ``act(h) + residual`` for "post".

    Args:
        xs: one [N, C, H, W] or a sequence of [N, C_i, H, W].
        weight: [O, sum of C_i, 1, 1].
        bias: [O] or None.
        activation, negative_slope: as in `conv3x3`.
        residual: [N, O, H, W] or None.
        residual_mode: "pre" or "post".

    Returns:
        [N, O, H, W] in the memory format of the first tensor.

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or device, or xs is empty.
        BackendError: no backend can run the call.
    """
    tensors = [xs] if isinstance(xs, Tensor) else list(xs)
    if not tensors:
        raise ValueError("xs: expected at least one tensor, got none")
    weight, bias, residual, *tensors = _autocast(weight, bias, residual, *tensors, device=tensors[0])
    first = tensors[0]
    for i, x in enumerate(tensors):
        name = "xs" if len(tensors) == 1 else f"xs[{i}]"
        _check_input(name, x)
        if i:
            _check_like(name, x, first, (first.shape[0], x.shape[1], first.shape[2], first.shape[3]))
    _check_weight("weight", weight, first, sum(x.shape[1] for x in tensors), 1)
    _check_bias("bias", bias, weight, first)
    _check_name("activation", activation, ACTIVATIONS)
    _check_name("residual_mode", residual_mode, SUM_MODES)
    if residual is not None:
        _check_like("residual", residual, first, (first.shape[0], weight.shape[0], first.shape[2], first.shape[3]))
    epilogue = (activation, float(negative_slope), residual, residual_mode)
    if not decomposes() and _needs_gradient((weight, bias, residual, *tensors)):
        return autograd.Conv1x1.apply(*_distinct([weight, bias, *epilogue, *tensors]))
    return _call("conv1x1", None, (tensors, weight, bias, *epilogue))


def esa(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    w4: Tensor,
    b4: Tensor | None,
    wf: Tensor | None = None,
    bf: Tensor | None = None,
    *,
    w_max: Tensor | None = None,
    b_max: Tensor | None = None,
    w3_: Tensor | None = None,
    b3_: Tensor | None = None,
) -> Tensor:
    """Enhanced spatial attention (Liu et al., RFANet), whole, in the forms of the challenge's models.

    Equivalent to ``c1 = conv1x1(x, w1, b1); y = max_pool2d(conv2d(c1, w2, b2, stride=2), 7, 3);
    y = conv3x3(y, w3, b3); s = interpolate(y, (H, W), mode="bilinear") + skip;
    out = x * sigmoid(conv1x1(s, w4, b4))`` where skip is ``conv1x1(c1, wf, bf)`` (RLFN's form; report section 2.2) or
    c1 itself when wf is None (R2Net's; section 4.2). With w_max and w3_ (RFDN's form; section 4.22)
    ``y = conv3x3(relu(conv3x3(relu(conv3x3(y, w_max, b_max)), w3, b3)), w3_, b3_)`` instead. The 3x3 convolutions of y
    have zero padding 1. Names follow the published state-dict keys: conv1, conv2, conv3, conv4, conv_f, conv_max and
    conv3_.

    Args:
        x: [N, C, H, W], height and width at least 15.
        w1: [F, C, 1, 1]. w2, w3, w_max, w3_: [F, F, 3, 3]. w4: [C, F, 1, 1]. wf: [F, F, 1, 1].
        b1, b2, b3, bf, b_max, b3_: [F] or None. b4: [C] or None.

    Returns:
        [N, C, H, W].

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or device, only one of w_max and w3_ is
            given, or the image is smaller than 15 x 15.
        BackendError: no backend can run the call.
    """
    x, w1, b1, w2, b2, w3, b3, w4, b4, wf, bf, w_max, b_max, w3_, b3_ = _autocast(
        x, w1, b1, w2, b2, w3, b3, w4, b4, wf, bf, w_max, b_max, w3_, b3_
    )
    _check_input("x", x)
    if x.shape[2] < ESA_MINIMUM or x.shape[3] < ESA_MINIMUM:
        raise ValueError(
            f"x: enhanced spatial attention needs images of at least {ESA_MINIMUM} x {ESA_MINIMUM} pixels, "
            f"got {x.shape[2]} x {x.shape[3]}"
        )
    if (w_max is None) != (w3_ is None):
        raise ValueError("w_max, w3_: give both (RFDN's form) or neither")
    channels = x.shape[1]
    _check_weight("w1", w1, x, channels, 1)
    hidden = w1.shape[0]
    convs: tuple[tuple[str, Tensor | None, str, Tensor | None, int, int], ...] = (
        ("w1", w1, "b1", b1, 1, hidden),
        ("w2", w2, "b2", b2, 3, hidden),
        ("w3", w3, "b3", b3, 3, hidden),
        ("w4", w4, "b4", b4, 1, channels),
        ("wf", wf, "bf", bf, 1, hidden),
        ("w_max", w_max, "b_max", b_max, 3, hidden),
        ("w3_", w3_, "b3_", b3_, 3, hidden),
    )
    for weight_name, weight, bias_name, bias, kernel, out_channels in convs:
        if weight is None:
            if bias is not None:
                raise ValueError(f"{bias_name}: given without {weight_name}")
            continue
        if weight_name != "w1":
            _check_weight(weight_name, weight, x, hidden, kernel, out_channels)
        _check_bias(bias_name, bias, weight, x)
    args = (x, w1, b1, w2, b2, w3, b3, w4, b4, wf, bf, w_max, b_max, w3_, b3_)
    return _call("esa", autograd.ESA, args)


def bsconv(
    x: Tensor,
    pointwise: Tensor,
    depthwise: Tensor,
    bias: Tensor | None = None,
    *,
    padding_mode: str = "zeros",
    activation: str = "none",
    negative_slope: float = 0.05,
    residual: Tensor | None = None,
    residual_mode: str = "post",
) -> Tensor:
    """Blueprint separable convolution (Haase and Amthor, BSConv-U): 1x1, then depthwise 3x3.

    With h = conv2d(pad(conv2d(x, pointwise), 1, padding_mode), depthwise, bias, groups=O), equivalent to ``act(h)``
    without a residual, ``act(h + residual)`` for residual_mode "pre" and ``act(h) + residual`` for "post".

    Args:
        x: [N, C, H, W]; height and width at least 2 for reflection.
        pointwise: [O, C, 1, 1], without a bias.
        depthwise: [O, 1, 3, 3].
        bias: [O] or None, added after the depthwise convolution.
        padding_mode: "zeros" or "reflect"; the result of the 1x1 convolution is padded.
        activation, negative_slope: as in `conv3x3`.
        residual: [N, O, H, W] or None.
        residual_mode: "pre" or "post".

    Returns:
        [N, O, H, W].

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or device, or is not one of the names above.
        BackendError: no backend can run the call.
    """
    x, pointwise, depthwise, bias, residual = _autocast(x, pointwise, depthwise, bias, residual)
    _check_input("x", x)
    _check_weight("pointwise", pointwise, x, x.shape[1], 1)
    _check_weight("depthwise", depthwise, x, 1, 3, pointwise.shape[0])
    _check_bias("bias", bias, depthwise, x)
    _check_name("padding_mode", padding_mode, PADDING_MODES)
    _check_name("activation", activation, ACTIVATIONS)
    if padding_mode == "reflect" and (x.shape[2] < 2 or x.shape[3] < 2):
        raise ValueError(
            f'x: padding_mode "reflect" needs images of at least 2 x 2 pixels, got {x.shape[2]} x {x.shape[3]}'
        )
    _check_name("residual_mode", residual_mode, SUM_MODES)
    if residual is not None:
        _check_like("residual", residual, x, (x.shape[0], depthwise.shape[0], x.shape[2], x.shape[3]))
    epilogue = (activation, float(negative_slope), residual, residual_mode)
    return _call("bsconv", autograd.BSConv, (x, pointwise, depthwise, bias, padding_mode, *epilogue))


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    activation: str = "none",
    negative_slope: float = 0.05,
    gated: bool = False,
) -> Tensor:
    """Depthwise convolution (stride 1, zero padding that keeps the size) with an activation, or with a gate.

    With d = conv2d(x, weight, bias, padding=dilation * (k - 1) // 2, dilation=dilation, groups=C), equivalent to
    ``act(d)``, or with gated to ``act(a) * b`` where a, b are the halves of d's channels: the middle of the gated
    feed-forward network (Zamir et al., Restormer; report sections 4.5, 4.18, 4.21, 4.28).

    Args:
        x: [N, C, H, W]; C even for a gate.
        weight: [C, 1, KH, KW], KH and KW each 1, 3, 5 or 7.
        bias: [C] or None.
        dilation: distance of the taps in pixels, at least 1.
        activation, negative_slope: as in `conv3x3`.
        gated: whether the second half of the channels multiplies the activated first.

    Returns:
        [N, C, H, W], or [N, C / 2, H, W] with a gate.

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or device, or is not one of the names above.
        BackendError: no backend can run the call.
    """
    x, weight, bias = _autocast(x, weight, bias)
    _check_input("x", x)
    _check_depthwise("weight", weight, x)
    _check_bias("bias", bias, weight, x)
    if isinstance(dilation, bool) or not isinstance(dilation, int):
        raise TypeError(f"dilation: expected an int, got {type(dilation).__name__}")
    if dilation < 1:
        raise ValueError(f"dilation: must be at least 1, got {dilation}")
    _check_name("activation", activation, ACTIVATIONS)
    if gated and x.shape[1] % 2:
        raise ValueError(f"x: a gate needs an even number of channels, got {x.shape[1]}")
    args = (x, weight, bias, dilation, activation, float(negative_slope), bool(gated))
    return _call("depthwise_conv", autograd.DepthwiseConv, args)


def layer_norm2d(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """Layer normalisation (Ba et al.) over the channels of every pixel.

    Equivalent to ``layer_norm(x.permute(0, 2, 3, 1), [C], weight, bias, eps).permute(0, 3, 1, 2)``, in the memory
    format of x: ``(x - mean) / sqrt(variance + eps) * weight + bias`` with the mean and biased variance of a pixel's
    channels (report sections 4.5, 4.19, 4.21, 4.28).

    Args:
        x: [N, C, H, W].
        weight, bias: [C] or None.
        eps: added to the variance, at least 0.

    Returns:
        [N, C, H, W].

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or device, or eps is below 0.
        BackendError: no backend can run the call.
    """
    x, weight, bias = _autocast(x, weight, bias)
    _check_input("x", x)
    for name, values in (("weight", weight), ("bias", bias)):
        _check_vector(name, values, x.shape[1], x)
    eps = float(eps)
    if not eps >= 0:
        raise ValueError(f"eps: must be at least 0, got {eps}")
    return _call("layer_norm2d", autograd.LayerNorm2d, (x, weight, bias, eps))


def adaptive_max_pool(x: Tensor, output_size: tuple[int, int]) -> Tensor:
    """Adaptive max pooling: what the pooled branches of SAFMN and its kin look at (report sections 4.6, 4.8, 4.21).

    Equivalent to ``adaptive_max_pool2d(x, output_size)``: window i of n along a side of s pixels reaches from
    floor(i s / n) to ceil((i + 1) s / n); a NaN is larger than anything. A slice of channels is read where it is.

    Args:
        x: [N, C, H, W].
        output_size: height and width of the result, each at least 1.

    Returns:
        [N, C, *output_size]. Its gradient goes to the first maximum of a window.

    Raises:
        TypeError, ValueError: an argument has another type, shape or dtype.
        BackendError: no backend can run the call.
    """
    (x,) = _autocast(x)
    _check_input("x", x)
    numbers = (int, torch.SymInt, Tensor) if torch.jit.is_tracing() else (int, torch.SymInt)
    size = _check_pair("output_size", output_size, numbers)
    if size[0] < 1 or size[1] < 1:
        raise ValueError(f"output_size: height and width must be at least 1, got {size}")
    return _call("adaptive_max_pool", autograd.AdaptiveMaxPool, (x, size))


def modulate(
    x: Tensor,
    maps: Tensor | Sequence[Tensor],
    *,
    mode: str = "nearest",
    activation: str = "none",
    negative_slope: float = 0.05,
) -> Tensor:
    """x times what maps of a lower resolution say of it: the end of spatially-adaptive feature modulation (Sun et al.,
    SAFMN; report sections 4.3, 4.6, 4.8, 4.21).

    Equivalent to ``x * act(sum(interpolate(t, x.shape[2:], mode=mode) for t in maps))``, with align_corners=False for
    "bilinear". The enlarged maps are never in memory.

    Args:
        x: [N, C, H, W].
        maps: [N, C, H_i, W_i], one or a list of up to 8; those of the size of x are taken as they are.
        mode: "nearest" or "bilinear".
        activation, negative_slope: as in `conv3x3`.

    Returns:
        [N, C, H, W].

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or device, or is not one of the names above.
        BackendError: no backend can run the call.
    """
    given = [maps] if isinstance(maps, Tensor) else list(maps)
    x, *given = _autocast(x, *given)
    _check_input("x", x)
    if not 1 <= len(given) <= MODULATE_MAPS:
        raise ValueError(f"maps: expected 1 to {MODULATE_MAPS} tensors, got {len(given)}")
    for i, t in enumerate(given):
        name = "maps" if isinstance(maps, Tensor) else f"maps[{i}]"
        _check_input(name, t)
        if t.shape[0] != x.shape[0] or t.shape[1] != x.shape[1]:
            raise ValueError(f"{name}: expected shape [{x.shape[0]}, {x.shape[1]}, H, W], got {list(t.shape)}")
        _check_same(name, t, x)
    _check_name("mode", mode, RESIZE_MODES)
    _check_name("activation", activation, ACTIVATIONS)
    settings = (mode, activation, float(negative_slope))
    if not decomposes() and _needs_gradient((x, *given)):
        return autograd.Modulate.apply(*_distinct((x, *settings, *given)))
    return _call("modulate", None, (x, given, *settings))


def selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Mamba's selective scan over tokens (Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State
    Spaces"; report section 4.24): S states of every channel, which each token lets decay and adds to.

    With step = delta + delta_bias, or softplus of it with delta_softplus, and h = 0 in the beginning, equivalent to

    - ``h = exp(step * a) * h + step * u * b``,
    - ``y = (h * c).sum(states) + d * u``, times ``silu(z)`` where there is z

    for one token after the other. Slices of a projection's channels are read where they are. States are float32 at
    least. The native CPU backend computes it forward; gradients, and all of it on a GPU, are the reference's.

    Args:
        u, delta: [N, L, D]; L may be 0.
        a: [D, S], negative where states decay. It, d and delta_bias may be float32 beside half types, and are not cast
            under autocast.
        b, c: [N, L, S].
        d: [D] or None.
        z: [N, L, D] or None.
        delta_bias: [D] or None.
        delta_softplus: whether softplus is applied to delta.

    Returns:
        [N, L, D], contiguous.

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or device.
        BackendError: no backend can run the call.
    """
    u, delta, b, c, z = _autocast(u, delta, b, c, z)
    _check_tensor("u", u)
    if u.dim() != 3:
        raise ValueError(f"u: expected 3 dimensions [N, L, D], got {u.dim()} with shape {tuple(u.shape)}")
    _check_dtype("u", u)
    n, length, channels = u.shape
    if channels < 1:
        raise ValueError(f"u: channels must be at least 1, got shape {tuple(u.shape)}")
    _check_like("delta", delta, u, (n, length, channels))
    _check_tensor("a", a)
    if a.dim() != 2 or a.shape[0] != channels or a.shape[1] < 1:
        raise ValueError(f"a: expected shape [{channels}, S] with at least one state, got {list(a.shape)}")
    _check_scan_parameter("a", a, u)
    _check_like("b", b, u, (n, length, a.shape[1]))
    _check_like("c", c, u, (n, length, a.shape[1]))
    _check_vector("d", d, channels, u, _check_scan_parameter)
    _check_vector("delta_bias", delta_bias, channels, u, _check_scan_parameter)
    if z is not None:
        _check_like("z", z, u, (n, length, channels))
    return _call("selective_scan", autograd.SelectiveScan, (u, delta, a, b, c, d, z, delta_bias, bool(delta_softplus)))


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: tuple[int, int],
    heads: int,
    *,
    scale: float | Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    shift: tuple[int, int] = (0, 0),
    shift_mask: float = 0.0,
    cosine: bool = False,
) -> Tensor:
    """Attention between the pixels of a window, between feature maps (Liu et al., "Swin Transformer"; report sections
    4.4, 4.26, 4.28).

    The maps are rolled by ``-shift`` and cut into windows; the pixels of a window are its tokens, row by row, and the
    channels are those of the first head, then those of the second, and so on. With q, k and v [heads, T, D] of a window
    it computes ``softmax(scale * q @ k.transpose(-2, -1) + bias) @ v``, as `scaled_dot_product_attention` does, puts
    the windows together, rolls back and adds the residual. Parts of the channels of one map, as ``qkv.chunk(3, 1)``
    gives, are read where they are, and no windows are in memory.

    Native on the CPU (float32, float16 and bfloat16) in the forward pass; gradients, float64 and CUDA run in PyTorch.

    Args:
        q, k, v: [N, C, H, W], C a multiple of `heads`, H and W multiples of the window's sides.
        window: height and width of a window.
        heads: how many.
        scale: a number, or [heads] with one of each head's own; None: 1 / sqrt(C / heads).
        bias: [heads, T, T], T pixels of a window, queries before keys; or None.
        residual: [N, C, H, W] or None.
        shift: where the first window begins: at least 0 and less than the window's sides. Windows at the edges go on at
            the opposite ones.
        shift_mask: is added to the scores of pixels in such a window that are from opposite edges, as -100 or -inf.
        cosine: q and k are first brought to length 1, pixel by pixel and head by head (Swin v2).

    Returns:
        [N, C, H, W].

    Raises:
        TypeError, ValueError: an argument has another type, shape, dtype or device, or a value that is not allowed.
        BackendError: no backend can run the call.
    """
    scales = scale if isinstance(scale, Tensor) else None
    q, k, v, bias, scales, residual = _autocast(q, k, v, bias, scales, residual)
    _check_input("q", q)
    shape = tuple(q.shape)
    _check_like("k", k, q, shape)
    _check_like("v", v, q, shape)
    height, width = _check_pair("window", window)
    down, right = _check_pair("shift", shift)
    if not isinstance(heads, int):
        raise TypeError(f"heads: expected an int, got {heads!r}")
    if heads < 1 or shape[1] % heads:
        raise ValueError(f"heads: expected a divisor of {shape[1]} channels, got {heads}")
    if height < 1 or width < 1:
        raise ValueError(f"window: height and width must be at least 1, got {(height, width)}")
    if shape[2] % height or shape[3] % width:
        raise ValueError(f"q: {shape[2]}x{shape[3]} pixels are not whole windows of {height}x{width}")
    if not (0 <= down < height and 0 <= right < width):
        raise ValueError(f"shift: must be at least 0 and less than the window {(height, width)}, got {(down, right)}")
    if bias is not None:
        tokens = height * width
        _check_tensor("bias", bias)
        if tuple(bias.shape) != (heads, tokens, tokens):
            raise ValueError(f"bias: expected shape {[heads, tokens, tokens]} or None, got {list(bias.shape)}")
        _check_same("bias", bias, q)
    _check_vector("scale", scales, heads, q)
    if residual is not None:
        _check_like("residual", residual, q, shape)
    number = 1.0 if scales is not None else (shape[1] // heads) ** -0.5 if scale is None else float(scale)
    tensors = (q, k, v, bias, scales, residual)
    settings = ([height, width], heads, number, bool(cosine), [down, right], float(shift_mask))
    return _call("window_attention", autograd.WindowAttention, (*tensors, *settings))


def decomposes() -> bool:
    """Whether who watches knows plain PyTorch alone: `torch.jit.trace` and both ONNX exporters."""
    return torch.jit.is_tracing() or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export())


def _needs_gradient(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


# By overload, which spares its resolution on every call.
_OPERATORS = {name: getattr(torch.ops.esr, name).default for name in __all__}


def _call(operator: str, function: Any, args: tuple[Any, ...]) -> Any:
    """Plain PyTorch while tracing, `function` (an autograd.Function) for gradients, else the operator itself."""
    if decomposes():
        return reference.OPERATORS[operator](*args)
    if function is not None and _needs_gradient(args):
        return function.apply(*_distinct(args))
    if unobserved(args):
        return dispatch.run(operator, args)
    return _OPERATORS[operator](*args)


def _distinct(args: Sequence[Any]) -> list[Any]:
    """The arguments, for torch.compile without one tensor twice, which it refuses for an autograd.Function."""
    if not torch.compiler.is_compiling():
        return list(args)
    distinct: list[Any] = []
    for a in args:
        seen = isinstance(a, Tensor) and any(a is other for other in distinct)
        distinct.append(a.view_as(a) if seen else a)
    return distinct


def unobserved(args: tuple[Any, ...]) -> bool:
    """Whether the registered operator would do nothing but call `dispatch.run`, at several times its cost.

    It does more for whoever traces, compiles, transforms, profiles or counts operators, and for tensor subclasses.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
    ):
        return False
    for a in args:
        for t in a if type(a) is list else (a,):
            if isinstance(t, Tensor) and (type(t) not in _PLAIN or t.device.type not in _REAL):
                return False
    return True


_PLAIN = (Tensor, torch.nn.Parameter)
_REAL = ("cpu", "cuda")


def _autocast(*tensors: Any, device: Any = None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where it is on for their device, else as they are."""
    anchor = tensors[0] if device is None else device
    kind = anchor.device.type if isinstance(anchor, Tensor) else "meta"
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # PyTorch has no autocast for meta tensors
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def _check_input(name: str, x: Any) -> None:
    _check_tensor(name, x)
    if x.dim() != 4:
        raise ValueError(f"{name}: expected 4 dimensions [N, C, H, W], got {x.dim()} with shape {tuple(x.shape)}")
    _check_dtype(name, x)
    if x.shape[1] < 1 or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{name}: channels, height and width must be at least 1, got shape {tuple(x.shape)}")


def _check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {x.dtype}")


def _check_same(name: str, t: Tensor, x: Tensor) -> None:
    if t.dtype != x.dtype:
        raise TypeError(f"{name}: expected the input's dtype {x.dtype}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{name}: expected the input's device {x.device}, got {t.device}")


def _check_weight(name: str, weight: Any, x: Tensor, channels: int, kernel: int, out: int | None = None) -> None:
    _check_tensor(name, weight)
    shape = weight.shape
    if weight.dim() != 4 or shape[2] != kernel or shape[3] != kernel or shape[1] != channels or shape[0] < 1:
        rows = "O" if out is None else out
        raise ValueError(f"{name}: expected shape [{rows}, {channels}, {kernel}, {kernel}], got {list(shape)}")
    if out is not None and shape[0] != out:
        raise ValueError(f"{name}: expected shape [{out}, {channels}, {kernel}, {kernel}], got {list(shape)}")
    _check_same(name, weight, x)


def _check_depthwise(name: str, weight: Any, x: Tensor) -> None:
    _check_tensor(name, weight)
    shape = weight.shape
    if (
        weight.dim() != 4
        or shape[0] != x.shape[1]
        or shape[1] != 1
        or shape[2] not in DEPTHWISE_SIDES
        or shape[3] not in DEPTHWISE_SIDES
    ):
        sides = ", ".join(map(str, DEPTHWISE_SIDES))
        raise ValueError(f"{name}: expected shape [{x.shape[1]}, 1, KH, KW] with sides of {sides}, got {list(shape)}")
    _check_same(name, weight, x)


def _check_bias(name: str, bias: Any, weight: Tensor, x: Tensor) -> None:
    _check_vector(name, bias, weight.shape[0], x)


def _check_vector(
    name: str, values: Any, channels: int, x: Tensor, fits: Callable[[str, Tensor, Tensor], None] = _check_same
) -> None:
    if values is None:
        return
    _check_tensor(name, values)
    if values.dim() != 1 or values.shape[0] != channels:
        raise ValueError(f"{name}: expected shape [{channels}] or None, got {list(values.shape)}")
    fits(name, values, x)


def _check_like(name: str, t: Any, x: Tensor, shape: tuple[int, ...]) -> None:
    _check_tensor(name, t)
    if t.dim() != len(shape) or any(a != b for a, b in zip(t.shape, shape, strict=True)):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(t.shape)}")
    _check_same(name, t, x)


def _check_scan_parameter(name: str, t: Tensor, u: Tensor) -> None:
    if t.dtype != torch.float32 or u.dtype not in (torch.float16, torch.bfloat16):
        _check_same(name, t, u)
    elif t.device != u.device:
        raise ValueError(f"{name}: expected the input's device {u.device}, got {t.device}")


def _check_pair(name: str, value: Any, numbers: tuple[type, ...] = (int,)) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, Sequence) else value
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(v, numbers) for v in pair):
        raise TypeError(f"{name}: expected two ints, got {value!r}")
    return pair


def _check_name(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
