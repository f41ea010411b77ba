"""What `verify`, `bench` and the benchmarks run, the plain PyTorch beside it, and how a result is judged."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import dispatch, functional, native
from .backends import triton
from .errors import BackendError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Largest difference from float64, relative to the largest value of the result.
DIRECT_TOLERANCE = 1e-5
WINOGRAD_TOLERANCE = 1e-4
NETWORK_TOLERANCE = 1e-4
# Operators that a backend may compute with Winograd's algorithm.
_MAY_USE_WINOGRAD = frozenset({"conv3x3", "spab", "conv3x3_pixel_shuffle"})
# What plain PyTorch itself may be off before a ratio to it means nothing; TF32 is inside.
PEER_TOLERANCE = 1e-2
# Roundings granted to a half type where plain PyTorch overflows and gives no measure.
_ROUNDINGS_WITHOUT_MEASURE = 16

BACKEND_DEVICES = {
    "reference": ("cpu", "cuda"),
    "native-cpu": ("cpu",),
    "native-cuda": ("cpu",) if native.emulated() else ("cuda",),
    "triton": ("cpu",) if triton.interpreted() else ("cuda",),
}
# The order in which a call of its own accord tries the backends.
_BACKEND_ORDER = ("native-cpu", "native-cuda", "triton", "reference")


# --- plain PyTorch, as the published networks write it; signatures as in esr_kernels.functional --------------------


def _activate(h: Tensor, activation: str, negative_slope: float, *, inplace: bool = True) -> Tensor:
    if activation == "relu":
        return F.relu(h, inplace=inplace)
    if activation == "leaky_relu":
        return F.leaky_relu(h, negative_slope, inplace=inplace)
    if activation == "silu":
        return F.silu(h, inplace=inplace)
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")
    return h


def _finish(h: Tensor, activation: str, negative_slope: float, residual: Tensor | None, residual_mode: str) -> Tensor:
    if residual is not None and residual_mode == "pre":
        h = h + residual
    h = _activate(h, activation, negative_slope)
    return h + residual if residual is not None and residual_mode == "post" else h


def _plain_conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    negative_slope: float = 0.05,
    residual: Tensor | None = None,
    residual_mode: str = "post",
) -> Tensor:
    h = F.conv2d(x, weight, bias, padding=1)
    if residual is not None and residual_mode == "attention":
        return (h + residual) * (torch.sigmoid(h) - 0.5)
    return _finish(h, activation, negative_slope, residual, residual_mode)


def _plain_spab(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
) -> Tensor:
    mid = F.silu(F.conv2d(x, w1, b1, padding=1), inplace=True)
    h = F.conv2d(F.silu(F.conv2d(mid, w2, b2, padding=1), inplace=True), w3, b3, padding=1)
    return (h + x) * (torch.sigmoid(h) - 0.5)


def _plain_conv3x3_pixel_shuffle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    upscale_factor: int,
    residual: Tensor | None = None,
) -> Tensor:
    y = F.pixel_shuffle(F.conv2d(x, weight, bias, padding=1), upscale_factor)
    return y if residual is None else y + residual


def _plain_conv1x1(
    xs: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    negative_slope: float = 0.05,
    residual: Tensor | None = None,
    residual_mode: str = "post",
) -> Tensor:
    x = xs if isinstance(xs, Tensor) else torch.cat(list(xs), 1)
    return _finish(F.conv2d(x, weight, bias), activation, negative_slope, residual, residual_mode)


def _plain_esa(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    w3: Tensor,
    b3: Tensor,
    w4: Tensor,
    b4: Tensor,
    wf: Tensor | None = None,
    bf: Tensor | None = None,
    *,
    w_max: Tensor | None = None,
    b_max: Tensor | None = None,
    w3_: Tensor | None = None,
    b3_: Tensor | None = None,
) -> Tensor:
    c1 = F.conv2d(x, w1, b1)
    low = F.max_pool2d(F.conv2d(c1, w2, b2, stride=2), kernel_size=7, stride=3)
    if w_max is not None and w3_ is not None:
        low = F.relu(F.conv2d(low, w_max, b_max, padding=1), inplace=True)
        low = F.relu(F.conv2d(low, w3, b3, padding=1), inplace=True)
        low = F.conv2d(low, w3_, b3_, padding=1)
    else:
        low = F.conv2d(low, w3, b3, padding=1)
    low = F.interpolate(low, x.shape[2:], mode="bilinear", align_corners=False)
    skip = c1 if wf is None else F.conv2d(c1, wf, bf)
    return x * torch.sigmoid(F.conv2d(low + skip, w4, b4))


def _plain_bsconv(
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
    h = F.conv2d(x, pointwise)
    groups = depthwise.shape[0]
    if padding_mode == "reflect":
        h = F.conv2d(F.pad(h, (1, 1, 1, 1), mode="reflect"), depthwise, bias, groups=groups)
    else:
        h = F.conv2d(h, depthwise, bias, padding=1, groups=groups)
    return _finish(h, activation, negative_slope, residual, residual_mode)


def _plain_depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    activation: str = "none",
    negative_slope: float = 0.05,
    gated: bool = False,
) -> Tensor:
    padding = [dilation * (side // 2) for side in weight.shape[2:]]
    h = F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0])
    if not gated:
        return _activate(h, activation, negative_slope)
    a, b = h.chunk(2, 1)  # views, which autograd forbids to write to
    return _activate(a, activation, negative_slope, inplace=False) * b


def _plain_layer_norm2d(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    y = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + eps)
    if weight is not None:
        y = weight[:, None, None] * y
    return y if bias is None else y + bias[:, None, None]


def _plain_modulate(
    x: Tensor,
    maps: Tensor | Sequence[Tensor],
    *,
    mode: str = "nearest",
    activation: str = "none",
    negative_slope: float = 0.05,
) -> Tensor:
    corners = False if mode == "bilinear" else None
    size = x.shape[2:]
    total, *rest = (
        t if t.shape[2:] == size else F.interpolate(t, size=size, mode=mode, align_corners=corners)
        for t in ([maps] if isinstance(maps, Tensor) else maps)
    )
    for t in rest:
        total = total + t
    return x * _activate(total, activation, negative_slope, inplace=False)


def _plain_selective_scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, *, z: Tensor, delta_bias: Tensor, **_: bool
) -> Tensor:
    """With delta_softplus; the states are float32 at least, as those of the published function."""
    from python_models.plain_blocks import plain_scan

    given = (u, F.softplus(delta + delta_bias), a, b, c, d)
    y = plain_scan(*(t if t.dtype == torch.float64 else t.float() for t in given))
    return y.to(u.dtype) * F.silu(z)


def _plain_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: tuple[int, int],
    heads: int,
    *,
    bias: Tensor | None = None,
    shift: tuple[int, int] = (0, 0),
) -> Tensor:
    from python_models.windows import from_windows, to_windows

    down, right = shift
    rolls = bool(down or right)

    def tokens(x: Tensor) -> Tensor:
        return to_windows(x.roll((-down, -right), (2, 3)) if rolls else x, *window, heads)

    y = F.scaled_dot_product_attention(tokens(q), tokens(k), tokens(v), bias)
    y = from_windows(y, *window, q.shape[2], q.shape[3])
    return y.roll((down, right), (2, 3)) if rolls else y


_PLAIN: dict[str, Callable[..., Tensor]] = {
    "conv3x3": _plain_conv3x3,
    "spab": _plain_spab,
    "conv3x3_pixel_shuffle": _plain_conv3x3_pixel_shuffle,
    "conv1x1": _plain_conv1x1,
    "esa": _plain_esa,
    "bsconv": _plain_bsconv,
    "depthwise_conv": _plain_depthwise_conv,
    "layer_norm2d": _plain_layer_norm2d,
    "adaptive_max_pool": lambda x, output_size: F.adaptive_max_pool2d(x, output_size),
    "modulate": _plain_modulate,
    "selective_scan": _plain_selective_scan,
    "window_attention": _plain_window_attention,
}
OPERATORS = tuple(_PLAIN)


# --- operator cases ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class OperatorCase:
    """An operator as a published model uses it.

    Attributes:
        operator: its name, one of `OPERATORS`.
        label: the model and what is particular, unique among the operator's cases.
        features: argument -> channels of a feature map, or of each map of a list.
        parameters: argument -> shape of a weight or bias.
        settings: the other arguments.
        divisors: how many times smaller than the others each map of a list is; none: they are of one size.
    """

    operator: str
    label: str
    features: dict[str, int | tuple[int, ...]]
    parameters: dict[str, tuple[int, ...]]
    settings: dict[str, Any] = field(default_factory=dict)
    divisors: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.operator} {self.label}"

    def arguments(
        self,
        batch: int,
        height: int,
        width: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        memory_format: torch.memory_format = torch.contiguous_format,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Random tensors: normal feature maps [batch, C, height, width] in `memory_format` (an upscaled residual where
        there is one; whole windows where there are such), weights whose results have about unit variance."""
        generator = torch.Generator().manual_seed(seed)

        def feature(name: str, channels: int, divisor: int = 1) -> Tensor:
            scale = self.settings.get("upscale_factor", 1) if name == "residual" else 1
            sides = (max(1, side * scale // divisor) for side in (height, width))
            window = self.settings.get("window", (1, 1))
            sides = (-(-side // multiple) * multiple for side, multiple in zip(sides, window, strict=True))
            t = torch.randn(batch, channels, *sides, generator=generator)
            return t.to(device, dtype).contiguous(memory_format=memory_format)

        arguments: dict[str, Any] = {}
        for name, channels in self.features.items():
            if isinstance(channels, int):
                arguments[name] = feature(name, channels)
                continue
            divisors = self.divisors or (1,) * len(channels)
            arguments[name] = [feature(name, c, d) for c, d in zip(channels, divisors, strict=True)]
        for name, shape in self.parameters.items():
            t = torch.randn(shape, generator=generator)
            arguments[name] = (t / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1 * t).to(device, dtype)
        return arguments

    def fused(self, arguments: dict[str, Any]) -> Tensor:
        return getattr(functional, self.operator)(**self._given(arguments), **self.settings)

    def plain(self, arguments: dict[str, Any]) -> Tensor:
        return _PLAIN[self.operator](**self._given(arguments), **self.settings)

    def _given(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the operator takes: a scan the maps' pixels in raster order as tokens, and rates below zero."""
        if self.operator != "selective_scan":
            return arguments
        tokens = {name: arguments[name].flatten(2).transpose(1, 2) for name in self.features}
        return arguments | tokens | {"a": -arguments["a"].abs()}


def _scan(channels: int, states: int) -> tuple[dict[str, int | tuple[int, ...]], dict[str, tuple[int, ...]]]:
    features: dict[str, int | tuple[int, ...]] = {"u": channels, "delta": channels, "z": channels}
    parameters: dict[str, tuple[int, ...]] = {"a": (channels, states), "d": (channels,), "delta_bias": (channels,)}
    return features | {"b": states, "c": states}, parameters


def _conv(cin: int, cout: int, kernel: int = 3) -> dict[str, tuple[int, ...]]:
    return {"weight": (cout, cin, kernel, kernel), "bias": (cout,)}


def _esa(channels: int, hidden: int, *, conv_f: bool = True, conv_max: bool = False) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "w1": (hidden, channels, 1, 1),
        "w2": (hidden, hidden, 3, 3),
        "w3": (hidden, hidden, 3, 3),
        "w4": (channels, hidden, 1, 1),
    }
    if conv_f:
        shapes["wf"] = (hidden, hidden, 1, 1)
    if conv_max:
        shapes["w_max"] = shapes["w3_"] = (hidden, hidden, 3, 3)
    return shapes | {"b" + name[1:]: (shape[0],) for name, shape in shapes.items()}


def _spab(channels: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"w{n}": (channels, channels, 3, 3) for n in (1, 2, 3)}
    return shapes | {f"b{n}": (channels,) for n in (1, 2, 3)}


def _bsconv(cin: int, cout: int) -> dict[str, tuple[int, ...]]:
    return {"pointwise": (cout, cin, 1, 1), "depthwise": (cout, 1, 3, 3), "bias": (cout,)}


def _depthwise(channels: int, side: int = 3, *, bias: bool = True) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"weight": (channels, 1, side, side)}
    return shapes | {"bias": (channels,)} if bias else shapes


def _norm(channels: int) -> dict[str, tuple[int, ...]]:
    return {"weight": (channels,), "bias": (channels,)}


# Channel counts and settings as in the challenge's models; "span 52" is the width used beyond it.
CASES: tuple[OperatorCase, ...] = (
    OperatorCase("conv3x3", "span first 3>28", {"x": 3}, _conv(3, 28)),
    OperatorCase("conv3x3", "span 28>28 silu", {"x": 28}, _conv(28, 28), {"activation": "silu"}),
    OperatorCase(
        "conv3x3", "span 28>28 attention", {"x": 28, "residual": 28}, _conv(28, 28), {"residual_mode": "attention"}
    ),
    OperatorCase(
        "conv3x3",
        "rlfn 48>46 leaky_relu post",
        {"x": 48, "residual": 46},
        _conv(48, 46),
        {"activation": "leaky_relu", "residual_mode": "post"},
    ),
    OperatorCase("conv3x3", "rden 37>37 gelu", {"x": 37}, {"weight": (37, 37, 3, 3)}, {"activation": "gelu"}),
    OperatorCase("spab", "span_tiny 26", {"x": 26}, _spab(26)),
    OperatorCase("spab", "span 28", {"x": 28}, _spab(28)),
    OperatorCase("spab", "span 52", {"x": 52}, _spab(52)),
    OperatorCase("conv3x3_pixel_shuffle", "span 28 x4", {"x": 28}, _conv(28, 48), {"upscale_factor": 4}),
    OperatorCase("conv3x3_pixel_shuffle", "rlfn 46 x4", {"x": 46}, _conv(46, 48), {"upscale_factor": 4}),
    OperatorCase(
        "conv3x3_pixel_shuffle",
        "light_rlfn 36 x4 residual",
        {"x": 36, "residual": 3},
        _conv(36, 48),
        {"upscale_factor": 4},
    ),
    OperatorCase("conv1x1", "span 4x28>28", {"xs": (28,) * 4}, _conv(112, 28, 1)),
    OperatorCase("conv1x1", "rlfn 46>46", {"xs": 46}, _conv(46, 46, 1)),
    OperatorCase("conv1x1", "ifadnet 6x36>36 gelu", {"xs": (36,) * 6}, _conv(216, 36, 1), {"activation": "gelu"}),
    OperatorCase("conv1x1", "egfmn 72>36 post", {"xs": 72, "residual": 36}, {"weight": (36, 72, 1, 1)}),
    OperatorCase(
        "conv1x1",
        "emaxgman 64>64 leaky_relu pre",
        {"xs": 64, "residual": 64},
        _conv(64, 64, 1),
        {"activation": "leaky_relu", "residual_mode": "pre"},
    ),
    OperatorCase("esa", "rlfn 46 16", {"x": 46}, _esa(46, 16)),
    OperatorCase("esa", "slim_rlfn 30 16 without conv_f", {"x": 30}, _esa(30, 16, conv_f=False)),
    OperatorCase("esa", "rfdn 50 12 with conv_max", {"x": 50}, _esa(50, 12, conv_max=True)),
    OperatorCase("bsconv", "smrn 48>48 gelu", {"x": 48}, _bsconv(48, 48), {"activation": "gelu"}),
    OperatorCase(
        "bsconv",
        "ifadnet 36>36 reflect gelu",
        {"x": 36},
        _bsconv(36, 36),
        {"padding_mode": "reflect", "activation": "gelu"},
    ),
    OperatorCase("bsconv", "lkfn 12>28", {"x": 12}, _bsconv(12, 28)),
    OperatorCase("bsconv", "smrn 48>48 post", {"x": 48, "residual": 48}, _bsconv(48, 48)),
    OperatorCase(
        "bsconv",
        "agdn 24>24 reflect gelu pre",
        {"x": 24, "residual": 24},
        _bsconv(24, 24),
        {"padding_mode": "reflect", "activation": "gelu", "residual_mode": "pre"},
    ),
    OperatorCase("depthwise_conv", "agdn 24 gelu", {"x": 24}, _depthwise(24), {"activation": "gelu"}),
    OperatorCase("depthwise_conv", "agdn 72", {"x": 72}, _depthwise(72, bias=False)),
    OperatorCase("depthwise_conv", "lkfn 14 5x5 dilated by 3", {"x": 14}, _depthwise(14, 5), {"dilation": 3}),
    OperatorCase("depthwise_conv", "egfmn 144 gated", {"x": 144}, _depthwise(144, bias=False), {"gated": True}),
    OperatorCase(
        "depthwise_conv",
        "rlff 254 gelu gated",
        {"x": 254},
        _depthwise(254, bias=False),
        {"activation": "gelu", "gated": True},
    ),
    OperatorCase("layer_norm2d", "egfmn 36", {"x": 36}, _norm(36)),
    OperatorCase("layer_norm2d", "rcn 40", {"x": 40}, _norm(40)),
    OperatorCase("layer_norm2d", "agdn 24", {"x": 24}, _norm(24), {"eps": 1e-5}),
    OperatorCase("adaptive_max_pool", "egfmn 9 to 32x32", {"x": 9}, {}, {"output_size": (32, 32)}),
    OperatorCase("adaptive_max_pool", "smfan 24 to 16x16", {"x": 24}, {}, {"output_size": (16, 16)}),
    OperatorCase("modulate", "egfmn 36", {"x": 36, "maps": (36,) * 4}, {}, {"activation": "gelu"}, (1, 4, 8, 16)),
    OperatorCase("modulate", "smfan 24", {"x": 24, "maps": (24,)}, {}, {}, (8,)),
    OperatorCase(
        "modulate", "safmn_pp 12", {"x": 12, "maps": (12,)}, {}, {"mode": "bilinear", "activation": "gelu"}, (8,)
    ),
    OperatorCase("selective_scan", "dvmsr 120", *_scan(120, 16), {"delta_softplus": True}),
    OperatorCase(
        "window_attention",
        "craft 24 of 3 heads 16x4",
        {"q": 24, "k": 24, "v": 24},
        {},
        {"window": (16, 4), "heads": 3, "shift": (8, 2)},
    ),
)


def operator_cases(operator: str) -> list[OperatorCase]:
    """The cases of one operator.

    Raises:
        ValueError: there is no such operator; names the nearest.
    """
    return [case for case in CASES if case.operator == known("operator", operator, OPERATORS)]


def known(kind: str, name: str, names: Sequence[str]) -> str:
    """`name`, if it is one of `names`.

    Raises:
        ValueError: it is not; names the nearest and what is known.
    """
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f", did you mean {near[0]!r}?" if near else ","
    raise ValueError(f"unknown {kind} {name!r}{hint} known: {', '.join(names)}")


def convert(value: Any, dtype: torch.dtype, device: str | torch.device | None = None) -> Any:
    """Tensors in another dtype and on another device, lists and dicts of them too."""
    if isinstance(value, Tensor):
        return value.detach().to(device=device, dtype=dtype)
    if isinstance(value, dict):
        return {name: convert(v, dtype, device) for name, v in value.items()}
    return [convert(v, dtype, device) for v in value]


def double(value: Any) -> Any:
    """Tensors in float64 on the CPU, lists and dicts of them too."""
    return convert(value, torch.float64, "cpu")


# --- models -----------------------------------------------------------------------------------------------------


def model_names() -> list[str]:
    import python_models

    return python_models.list_models()


def model_pair(name: str, weights: str | None = None) -> tuple[nn.Module, nn.Module]:
    """A model built from fused operators, and the same network in plain PyTorch with the same weights.

    Args:
        name: one of `python_models.list_models()`.
        weights: path of a checkpoint; None for random weights, the same at every call.

    Raises:
        ValueError: unknown name, or not a checkpoint of this model.
    """
    import python_models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fused = python_models.create(name, weights)
        plain = python_models.plain(name, **fused.options)
    plain.load_state_dict(fused.state_dict())
    return fused.eval().requires_grad_(False), plain.eval().requires_grad_(False)


def check_size(model: nn.Module, height: int, width: int) -> None:
    """Raises ValueError where an image is smaller than the model can take."""
    smallest = int(model.minimum_size)  # type: ignore[arg-type]
    if min(height, width) < smallest:
        raise ValueError(f"size: the model needs at least {smallest}x{smallest} pixels, got {height}x{width}")


def sample_image(batch: int, channels: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """[batch, channels, height, width] in [0, 1], float32: random shades of 8 pixels a side with some noise.

    Uniform noise is nothing that a network was trained on: published ones can return a million for it, and lose the
    digits that a comparison needs.
    """
    shades = torch.rand(batch, channels, -(-height // 8) + 1, -(-width // 8) + 1, generator=generator)
    smooth = F.interpolate(shades, (height, width), mode="bilinear", align_corners=True)
    return 0.9 * smooth + 0.1 * torch.rand(batch, channels, height, width, generator=generator)


def random_image(model: nn.Module, batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    """A `sample_image` [batch, 3, height, width] in the model's data range."""
    generator = torch.Generator().manual_seed(seed)
    return sample_image(batch, 3, height, width, generator) * float(model.data_range)  # type: ignore[arg-type]


# --- backends ---------------------------------------------------------------------------------------------------


def resolve_backend(operator: str, device: str, dtype: torch.dtype, chosen: str | None = None) -> str:
    """Name of the backend that runs `operator` there.

    Raises:
        BackendError: none can, or the chosen one cannot.
    """
    if chosen is None:
        chosen = dispatch.chosen_backend()
    implementation = dispatch.select(operator, device, dtype, chosen)
    for name in _BACKEND_ORDER:
        try:
            if dispatch.select(operator, device, dtype, name) is implementation:
                return name
        except BackendError:
            continue
    return chosen or "unknown"


# --- judging a result -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """How far a result is from float64.

    Attributes:
        max_abs: largest difference; infinite when a value is not finite or the shape or dtype is wrong.
        relative: the same divided by the reference's largest value.
        tolerance: what `relative` may be.
        ok: whether it is inside.
        problem: what is wrong besides the size of the difference, or None.
    """

    max_abs: float
    relative: float
    tolerance: float
    problem: str | None = None

    @property
    def ok(self) -> bool:
        return self.problem is None and self.relative <= self.tolerance

    def __str__(self) -> str:
        if self.problem is not None:
            return self.problem
        return f"largest difference {self.relative:.2e} of the largest value, allowed {self.tolerance:.2e}"

    def to_json(self) -> dict[str, Any]:
        def number(x: float) -> float | None:
            return x if math.isfinite(x) else None

        return {
            "max_abs": number(self.max_abs),
            "relative": number(self.relative),
            "tolerance": number(self.tolerance),
            "ok": self.ok,
            "problem": self.problem,
        }


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Largest difference relative to the reference's largest value; infinite when a value is not finite."""
    return compare(result, reference, math.inf).relative


def compare(result: Tensor, reference: Tensor, tolerance: float, dtype: torch.dtype | None = None) -> Check:
    """Judge `result` against a float64 reference on the CPU, and its dtype where one is given."""
    if result.shape != reference.shape:
        problem = f"the shape is {tuple(result.shape)} instead of {tuple(reference.shape)}"
        return Check(math.inf, math.inf, tolerance, problem)
    if dtype is not None and result.dtype != dtype:
        return Check(math.inf, math.inf, tolerance, f"the dtype is {result.dtype} instead of {dtype}")
    result = double(result)
    if not bool(torch.isfinite(result).all()):
        bad = int((~torch.isfinite(result)).sum())
        return Check(math.inf, math.inf, tolerance, f"{bad} of {result.numel()} values are not finite")
    if result.numel() == 0:
        return Check(0.0, 0.0, tolerance)
    difference = float((result - reference).abs().max())
    largest = float(reference.abs().max())
    relative = 0.0 if difference == 0 else difference / largest if largest > 0 else math.inf
    return Check(difference, relative, tolerance)


def half_tolerance(plain_error: float, dtype: torch.dtype) -> float:
    """What a half type may be off: twice the relative error of plain PyTorch in that type.

    At least one rounding of the largest value; a fixed number of roundings where plain PyTorch overflows.
    """
    eps = torch.finfo(dtype).eps
    if not math.isfinite(plain_error):
        return _ROUNDINGS_WITHOUT_MEASURE * eps
    return max(2 * plain_error, eps / 2)


def operator_tolerance(operator: str, backend: str, dtype: torch.dtype, plain_error: float) -> float:
    """Allowed relative error of one operator call; `plain_error` counts for half types only."""
    if dtype in (torch.float16, torch.bfloat16):
        return half_tolerance(plain_error, dtype)
    return WINOGRAD_TOLERANCE if backend != "reference" and operator in _MAY_USE_WINOGRAD else DIRECT_TOLERANCE


def network_tolerance(dtype: torch.dtype, plain_error: float) -> float:
    """Allowed relative error of a network; `plain_error` counts for half types only."""
    return half_tolerance(plain_error, dtype) if dtype in (torch.float16, torch.bfloat16) else NETWORK_TOLERANCE


def peer_tolerance(dtype: torch.dtype, eager_error: float) -> float:
    """What a plain PyTorch engine may be off and still be worth a ratio."""
    return max(PEER_TOLERANCE, 2 * eager_error) if math.isfinite(eager_error) else math.inf
