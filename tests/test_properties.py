"""Every operator on every backend, on inputs that hypothesis draws, compared with float64.

Drawn are shapes, channels, memory layouts, storage offsets, dtypes, settings, magnitudes from denormal to the edge of
float16, NaN and infinity; and the same bits are asked for again, in any number of threads and inside a batch.

The inputs are the same in every run of the same code: hypothesis also draws numbers that it finds in the code.
ESR_KERNELS_EXAMPLES=N draws N for each operator on the compiled CPU backend instead of 40 (`make fuzz` does); emulated
backends get a twentieth.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    OPERATOR_CASES,
    backends_with,
    check_close,
    expected_format,
    float32_tolerance,
    largest_error,
    lay_out,
    to,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import esr_kernels
from esr_kernels.cases import OperatorCase
from esr_kernels.functional import MODULATE_MAPS
from esr_kernels.library import ACTIVATIONS, PADDING_MODES, RESIDUAL_MODES, RESIZE_MODES, SUM_MODES
from esr_kernels.timing import thread_count

EXAMPLES = int(os.environ.get("ESR_KERNELS_EXAMPLES", "40"))
REAL = ("reference", "native-cpu")
DTYPES = (torch.float32, torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("nchw", "channels_last", "permuted", "sliced", "offset", "transposed", "expanded", "gaps")
# What features are multiplied with: usual, the edge of float16, small, and denormal in float32.
MAGNITUDES = {"usual": 1.0, "large": 16000.0, "small": 1e-3, "denormal": 1e-40}

Draw = Callable[[st.SearchStrategy[Any]], Any]


def lay_out_more(x: Tensor, layout: str) -> Tensor:
    """The values of x in one of `LAYOUTS`; "expanded" repeats the first channel."""
    if layout == "offset":
        return x.new_empty(x.numel() + 3)[3:].view(x.shape).copy_(x)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "expanded":
        return x[:, :1].contiguous().expand(x.shape)
    if layout == "gaps":
        # Pixels of all channels together, as in channels_last, with unused numbers between them.
        n, c, h, w = x.shape
        return x.new_full((n, h, w, c + 3), float("nan")).permute(0, 3, 1, 2)[:, 1 : 1 + c].copy_(x)
    return lay_out(x, layout)


# --- cases: an operator with drawn channels and settings ------------------------------------------------------------


channels = st.integers(1, 20) | st.sampled_from([28, 33, 48])


def _activation(draw: Draw) -> dict[str, Any]:
    return {"activation": draw(st.sampled_from(ACTIVATIONS)), "negative_slope": draw(st.sampled_from([0.05, 0.0, 1.5]))}


def _with_bias(draw: Draw, shapes: dict[str, tuple[int, ...]], biases: dict[str, int]) -> dict[str, tuple[int, ...]]:
    return shapes | {name: (size,) for name, size in biases.items() if draw(st.booleans())}


def _conv3x3(draw: Draw) -> OperatorCase:
    cin, cout = draw(channels), draw(channels)
    mode = draw(st.sampled_from([None, *RESIDUAL_MODES]))
    features: dict[str, Any] = {"x": cin} if mode is None else {"x": cin, "residual": cout}
    chosen = {} if mode is None else {"residual_mode": mode}
    chosen |= {} if mode == "attention" else _activation(draw)
    return OperatorCase(
        "conv3x3", "", features, _with_bias(draw, {"weight": (cout, cin, 3, 3)}, {"bias": cout}), chosen
    )


def _spab(draw: Draw) -> OperatorCase:
    c, m, k = draw(channels), draw(channels), draw(channels)
    shapes: dict[str, tuple[int, ...]] = {"w1": (m, c, 3, 3), "w2": (k, m, 3, 3), "w3": (c, k, 3, 3)}
    shapes = _with_bias(draw, shapes, {"b1": m, "b2": k, "b3": c})
    return OperatorCase("spab", "", {"x": c}, {**{f"b{n}": None for n in (1, 2, 3)}, **shapes})  # type: ignore[dict-item]


def _conv3x3_pixel_shuffle(draw: Draw) -> OperatorCase:
    cin, colours, r = draw(channels), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    features: dict[str, Any] = {"x": cin, "residual": colours} if draw(st.booleans()) else {"x": cin}
    shapes = _with_bias(draw, {"weight": (colours * r * r, cin, 3, 3)}, {"bias": colours * r * r})
    return OperatorCase("conv3x3_pixel_shuffle", "", features, shapes, {"upscale_factor": r})


def _conv1x1(draw: Draw) -> OperatorCase:
    split, cout = tuple(draw(st.lists(channels, min_size=1, max_size=4))), draw(channels)
    mode = draw(st.sampled_from([None, *SUM_MODES]))
    features: dict[str, Any] = {"xs": split} if mode is None else {"xs": split, "residual": cout}
    chosen = _activation(draw) | ({} if mode is None else {"residual_mode": mode})
    shapes = _with_bias(draw, {"weight": (cout, sum(split), 1, 1)}, {"bias": cout})
    return OperatorCase("conv1x1", "", features, shapes, chosen)


def _esa(draw: Draw) -> OperatorCase:
    c, f = draw(channels), draw(st.integers(1, 17))
    shapes: dict[str, tuple[int, ...]] = {
        "w1": (f, c, 1, 1),
        "w2": (f, f, 3, 3),
        "w3": (f, f, 3, 3),
        "w4": (c, f, 1, 1),
    }
    biases = {"b1": f, "b2": f, "b3": f, "b4": c}
    if draw(st.booleans()):
        shapes["wf"], biases["bf"] = (f, f, 1, 1), f
    if draw(st.booleans()):
        shapes["w_max"] = shapes["w3_"] = (f, f, 3, 3)
        biases |= {"b_max": f, "b3_": f}
    absent = {name: None for name in ("b1", "b2", "b3", "b4")}
    return OperatorCase("esa", "", {"x": c}, absent | _with_bias(draw, shapes, biases))  # type: ignore[operator]


def _bsconv(draw: Draw) -> OperatorCase:
    cin, cout = draw(channels), draw(channels)
    mode = draw(st.sampled_from([None, *SUM_MODES]))
    shapes: dict[str, tuple[int, ...]] = {"pointwise": (cout, cin, 1, 1), "depthwise": (cout, 1, 3, 3)}
    chosen = {"padding_mode": draw(st.sampled_from(PADDING_MODES)), **_activation(draw)}
    features: dict[str, Any] = {"x": cin} if mode is None else {"x": cin, "residual": cout}
    chosen |= {} if mode is None else {"residual_mode": mode}
    return OperatorCase("bsconv", "", features, _with_bias(draw, shapes, {"bias": cout}), chosen)


def _depthwise_conv(draw: Draw) -> OperatorCase:
    sides, gated = st.sampled_from([1, 3, 5, 7]), draw(st.booleans())
    c = draw(channels) * (2 if gated else 1)
    shapes = _with_bias(draw, {"weight": (c, 1, draw(sides), draw(sides))}, {"bias": c})
    chosen = {"dilation": draw(st.integers(1, 3)), "gated": gated, **_activation(draw)}
    return OperatorCase("depthwise_conv", "", {"x": c}, shapes, chosen)


def _layer_norm2d(draw: Draw) -> OperatorCase:
    c = draw(channels)
    shapes = _with_bias(draw, {"weight": (c,)} if draw(st.booleans()) else {}, {"bias": c})
    absent = {"weight": None, "bias": None}
    return OperatorCase("layer_norm2d", "", {"x": c}, absent | shapes, {"eps": draw(st.sampled_from([1e-6, 1e-3]))})  # type: ignore[operator]


def _adaptive_max_pool(draw: Draw) -> OperatorCase:
    sides = st.integers(1, 24)
    return OperatorCase("adaptive_max_pool", "", {"x": draw(channels)}, {}, {"output_size": (draw(sides), draw(sides))})


def _modulate(draw: Draw) -> OperatorCase:
    c, count = draw(channels), draw(st.integers(1, 3) | st.just(MODULATE_MAPS))
    chosen = {"mode": draw(st.sampled_from(RESIZE_MODES)), **_activation(draw)}
    return OperatorCase("modulate", "", {"x": c, "maps": (c,) * count}, {}, chosen)


CASES: dict[str, Callable[[Draw], OperatorCase]] = {
    "conv3x3": _conv3x3,
    "spab": _spab,
    "conv3x3_pixel_shuffle": _conv3x3_pixel_shuffle,
    "conv1x1": _conv1x1,
    "esa": _esa,
    "bsconv": _bsconv,
    "depthwise_conv": _depthwise_conv,
    "layer_norm2d": _layer_norm2d,
    "adaptive_max_pool": _adaptive_max_pool,
    "modulate": _modulate,
}


@st.composite
def calls(draw: Draw, operator: str) -> tuple[OperatorCase, dict[str, Any]]:
    """A case and its tensors."""
    case = CASES[operator](draw)
    smallest = 15 if operator == "esa" else 2 if case.settings.get("padding_mode") == "reflect" else 1
    sides = st.integers(smallest, smallest + 20)
    absent = {name: None for name, shape in case.parameters.items() if shape is None}
    present = {name: shape for name, shape in case.parameters.items() if shape is not None}
    case = OperatorCase(case.operator, "", case.features, present, case.settings)
    dtype, layout = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(LAYOUTS))
    size = draw(st.sampled_from([1, 1, 2, 3, 0])), draw(sides), draw(sides)
    arguments = absent | case.arguments(*size, dtype=torch.float32, seed=draw(st.integers(0, 2**31 - 1)))
    magnitude = MAGNITUDES[draw(st.sampled_from([*MAGNITUDES, "usual"]))]
    allowed = [0.0, -0.0]
    if operator != "esa" and case.settings.get("mode") != "bilinear":
        allowed.append(
            float("nan")
        )  # in a bilinear resize a rounding decides whether a pixel counts with a weight of 0
    if not multiplies_infinity(case):
        allowed += [float("inf"), -float("inf")]
    specials = draw(st.lists(st.sampled_from(allowed), max_size=2))

    def feature(t: Tensor, specials: list[float]) -> Tensor:
        if operator == "modulate" and draw(st.booleans()):  # its maps and x are of any sizes
            t = t[..., : draw(st.integers(1, t.shape[2])), : draw(st.integers(1, t.shape[3]))].contiguous()
        t = (t * magnitude).clamp(-65504, 65504).to(dtype)
        for value in specials if t.numel() else []:
            t.view(-1)[draw(st.integers(0, t.numel() - 1))] = value
        return lay_out_more(t, layout)

    for name, value in arguments.items():
        if name in case.features:
            # The gate of a small number is 0 in one precision and not in another, as in `multiplies_infinity`.
            gated = name == "residual" and case.settings.get("residual_mode") == "attention"
            own = [special for special in specials if not (gated and math.isinf(special))]
            arguments[name] = [feature(t, own) for t in value] if isinstance(value, list) else feature(value, own)
        elif value is not None:
            arguments[name] = value.to(dtype)
    if magnitude == MAGNITUDES["denormal"]:
        # A bias of usual size would be all that is left of the result.
        for name in arguments:
            if name.startswith("b") and arguments[name] is not None and operator != "layer_norm2d":
                arguments[name] = arguments[name] * 0
    return case, arguments


def multiplies_infinity(case: OperatorCase) -> bool:
    """Whether infinity may meet a factor that is 0 or not, depending on the precision: NaN in one, infinite in another.

    Such factors are an activation's underflow and the weights of a bilinear resize.
    """
    smooth = case.settings.get("activation") in ("silu", "gelu", "gelu_tanh")
    if case.operator == "esa":
        return True
    if case.operator == "modulate":
        return smooth or case.settings["mode"] == "bilinear"
    return smooth and bool(case.settings.get("gated"))


def features_of(case: OperatorCase, arguments: dict[str, Any]) -> list[Tensor]:
    found = [arguments[name] for name in case.features]
    return [t for value in found for t in (value if isinstance(value, list) else [value])]


# --- the properties -------------------------------------------------------------------------------------------------


def check(case: OperatorCase, arguments: dict[str, Any], backend: str) -> None:
    """The result against float64: shape, dtype, memory format, values, and what is not finite."""
    with esr_kernels.use_backend(backend):
        out = case.fused(arguments)
    x = features_of(case, arguments)[0]
    exact = case.plain(to(arguments, torch.float64))
    assert out.shape == exact.shape and out.dtype == x.dtype
    if case.operator == "conv3x3_pixel_shuffle":
        assert out.is_contiguous()
    else:
        assert out.is_contiguous(memory_format=expected_format(x))
    if out.numel() == 0:
        return
    # The largest that the dtype holds: what is beyond by less than a rounding may become infinite or not.
    largest = torch.finfo(out.dtype).max
    over = exact.abs() > largest * (1 - 1e-2)
    ordinary = torch.isfinite(exact) & ~over
    check_special(out, exact, over, gelu=backend == "reference" and case.settings.get("activation") == "gelu")
    if not bool(ordinary.any()):
        return
    got, want = torch.where(ordinary, out, 0), torch.where(ordinary, exact, 0)
    # What terms that cancel leave of a rounding; the last places of denormal numbers count for themselves.
    info = torch.finfo(out.dtype)
    rest = float32_tolerance(backend) / 10 * size_of_terms(case, arguments) + 2000 * info.smallest_normal * info.eps
    rest += size_of_gated(case, arguments) * gate_error(out.dtype, backend)
    if largest_error(got, want) > rest:
        check_close(got, want, lambda: torch.where(ordinary, case.plain(arguments), 0), backend)


def size_of_terms(case: OperatorCase, arguments: dict[str, Any]) -> float:
    """How large the numbers are that add up to a result; weights keep the size of features."""
    tensors = [t.double() for t in features_of(case, arguments)]
    if case.operator == "layer_norm2d":
        (x,) = tensors
        tensors = [x / (x.var(1, correction=0, keepdim=True) + case.settings["eps"]).sqrt()]
    largest = max(float(torch.where(torch.isfinite(t), t, 0).abs().max()) for t in tensors)
    # Gates multiply, and a sigmoid's argument is as inexact as it is large.
    multiplies = case.operator in ("spab", "esa", "modulate") or case.settings.get("residual_mode") == "attention"
    return max(largest, largest**2) if multiplies or case.settings.get("gated") else largest


def size_of_gated(case: OperatorCase, arguments: dict[str, Any]) -> float:
    """How large the numbers are that an attention's gate multiplies; biases are left where features are small."""
    if case.operator != "spab" and case.settings.get("residual_mode") != "attention":
        return 0.0
    tensors = [t for name, t in arguments.items() if name.startswith("b") and t is not None]
    tensors += features_of(case, arguments)
    return max(float(torch.where(torch.isfinite(t), t, 0).abs().max()) for t in tensors)


def gate_error(dtype: torch.dtype, backend: str) -> float:
    """What sigmoid(h) - 1/2 keeps of the rounding of sigmoid(h), however little it is.

    The bfloat16 kernels' reciprocal is off by up to 2^-14 of itself. PyTorch's bfloat16 rounds sigmoid(h) to 2^-9.
    """
    return 2**-15 if dtype == torch.bfloat16 and backend == "native-cpu" else torch.finfo(torch.float32).eps / 2


def check_special(out: Tensor, exact: Tensor, over: Tensor, *, gelu: bool = False) -> None:
    """NaN and infinity are where PyTorch has them, and nowhere else.

    `gelu`: PyTorch's own GELU, which makes infinity of infinity, but NaN where it computes with vectors.
    """
    ours, theirs = ~torch.isfinite(out), ~torch.isfinite(exact)
    assert bool((ours | ~theirs).all()), f"{int((theirs & ~ours).sum())} numbers where PyTorch has none"
    lost = ours & ~theirs & ~over
    assert not bool(lost.any()), f"{int(lost.sum())} numbers lost"
    infinite = torch.isinf(exact) & ~(torch.isnan(out) & (exact > 0) & gelu)
    assert torch.equal(out[infinite].double(), exact[infinite]), "infinities differ"
    assert bool(torch.isnan(out[torch.isnan(exact)]).all())


@pytest.mark.parametrize(
    ("operator", "backend"), [(operator, backend) for operator in CASES for backend in backends_with(operator)]
)
def test_against_float64(operator: str, backend: str) -> None:
    count = EXAMPLES if backend in REAL else max(EXAMPLES // 20, 2)

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(call=calls(operator))
    def holds(call: tuple[OperatorCase, dict[str, Any]]) -> None:
        check(*call, backend)

    holds()


def _chosen(*backends: str) -> list[tuple[str, str]]:
    return [(operator, backend) for operator in CASES for backend in backends_with(operator) if backend in backends]


@pytest.mark.parametrize(("operator", "backend"), _chosen("native-cpu", "native-cuda"))
def test_inside_a_batch_and_in_any_number_of_threads(operator: str, backend: str) -> None:
    """An image has the same bits alone, inside a batch, and with 1 to 3 threads."""
    count = max(EXAMPLES // (4 if backend in REAL else 20), 2)

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(call=calls(operator))
    def holds(call: tuple[OperatorCase, dict[str, Any]]) -> None:
        case, arguments = call
        with esr_kernels.use_backend(backend):
            for threads in (1, 2, 3):
                with thread_count(threads):
                    batch = case.fused(arguments)
                    for n in range(len(batch)):
                        one = {
                            name: image(value, n) if name in case.features else value
                            for name, value in arguments.items()
                        }
                        assert bool(same_bits(case.fused(one)[0], batch[n]).all())

    holds()


def image(value: Any, n: int) -> Any:
    return [t[n : n + 1] for t in value] if isinstance(value, list) else value[n : n + 1]


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (torch.isnan(a) & torch.isnan(b))


@pytest.mark.skipif("native-cpu" not in backends_with("conv3x3"), reason="the native library is not compiled")
@pytest.mark.parametrize("case", OPERATOR_CASES, ids=lambda case: case.name)
def test_a_thousand_repeats_have_the_same_bits(case: OperatorCase) -> None:
    """Forward, and every fourth time the gradients too."""
    arguments = case.arguments(2, 20, 19)
    tensors = [t for value in arguments.values() for t in (value if isinstance(value, list) else [value])]
    with thread_count(2):
        expected = None
        for number in range(1000):
            got = [case.fused(arguments)]
            if number % 4 == 0:
                for t in tensors:
                    t.requires_grad_()
                got += torch.autograd.grad(case.fused(arguments).square().sum(), tensors)
                for t in tensors:
                    t.requires_grad_(False)
            expected = got if expected is None else expected
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=False))


@pytest.mark.skipif("native-cpu" not in backends_with("conv3x3"), reason="the native library is not compiled")
@pytest.mark.parametrize("side", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_winograd_keeps_what_is_not_finite_to_the_pixels_it_reaches(value: float, side: int) -> None:
    """16 channels and more are transformed in tiles of 4x4 pixels, where any one would reach all others."""
    torch.manual_seed(0)
    x, w = torch.randn(1, 16, 11, 13), torch.randn(17, 16, 3, 3).abs()
    x[0, 5, side, 6] = value
    with esr_kernels.use_backend("native-cpu"):
        out = esr_kernels.functional.conv3x3(x, w * 1e-3 if value == 3e38 else w)
    exact = torch.nn.functional.conv2d(x.double(), (w * 1e-3 if value == 3e38 else w).double(), padding=1)
    check_special(out, exact, torch.zeros_like(exact, dtype=torch.bool))
    reached = torch.zeros(11, 13, dtype=torch.bool)
    reached[side - 1 : side + 2, 5:8] = True
    other, want = out[..., ~reached], exact[..., ~reached]
    assert float((other - want).abs().max()) <= 1e-4 * float(want.abs().max())


@pytest.mark.parametrize("backend", [b for b in REAL if b in backends_with("modulate")])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_an_activation_far_below_0_is_0(activation: str, backend: str) -> None:
    """So that infinity times it is NaN, as in PyTorch; the exponential used to stop at 1e-38."""
    x, far = torch.full((1, 2, 3, 17), float("inf")), torch.full((1, 2, 3, 17), -11508.0)
    with esr_kernels.use_backend(backend):
        assert bool(torch.isnan(esr_kernels.functional.modulate(x, far, activation=activation)).all())
        assert bool((esr_kernels.functional.modulate(torch.ones_like(x), far, activation=activation) == 0).all())


@pytest.mark.parametrize("backend", [b for b in REAL if b in backends_with("conv1x1")])
@pytest.mark.parametrize("pixels", [1, 2, 7, 8, 9, 16, 17, 40])
def test_gelu_of_infinity(pixels: int, backend: str) -> None:
    """Infinite; the reference has what PyTorch makes of it, whose vectors make it NaN (2.13, AVX2 and AVX-512)."""
    x = torch.full((1, 1, 1, pixels), float("inf"))
    with esr_kernels.use_backend(backend):
        out = esr_kernels.functional.conv1x1(x, torch.ones(1, 1, 1, 1), activation="gelu")
    wanted = torch.nn.functional.gelu(x) if backend == "reference" else x
    assert bool(same_bits(out, wanted).all())


@pytest.mark.parametrize("backend", [b for b in REAL if b in backends_with("conv3x3")])
def test_an_infinite_residual_of_an_attention(backend: str) -> None:
    """Infinite by the sign of the gate, NaN where that is 0; a gate below 1e-7 is 0 or not, by how it is computed."""
    h = torch.tensor([-1.0, -1e-3, 0.0, 1e-3, 1.0]).view(1, 1, 1, 5)
    middle = torch.zeros(1, 1, 3, 3)
    middle[..., 1, 1] = 1
    infinite = torch.full_like(h, float("inf"))
    with esr_kernels.use_backend(backend):
        out = esr_kernels.functional.conv3x3(h, middle, residual=infinite, residual_mode="attention")
    assert bool(same_bits(out, infinite * h).all())


@pytest.mark.parametrize("backend", [b for b in REAL if b in backends_with("spab")])
@pytest.mark.parametrize("channels", [(1, 2, 28), (28, 28, 28)])
def test_the_gate_of_a_bfloat16_attention(channels: tuple[int, int, int], backend: str) -> None:
    """Of an h so small that bfloat16's own sigmoid is 1/2, so that twice PyTorch's error is no measure."""
    c, m, k = channels
    case = OperatorCase("spab", "", {"x": c}, {"w1": (m, c, 3, 3), "w2": (k, m, 3, 3), "w3": (c, k, 3, 3)})
    for seed in range(20):
        arguments = case.arguments(1, 3, 5, dtype=torch.bfloat16, seed=seed) | {"b1": None, "b2": None, "b3": None}
        arguments["x"] = arguments["x"] * 1e-3
        exact = case.plain(to(arguments, torch.float64))
        with esr_kernels.use_backend(backend):
            error = largest_error(case.fused(arguments), exact)
        rounding = torch.finfo(torch.bfloat16).eps * float(exact.abs().max())
        assert error <= rounding + size_of_gated(case, arguments) * gate_error(torch.bfloat16, backend)


@pytest.mark.parametrize("backend", [b for b in REAL if b in backends_with("spab")])
@pytest.mark.parametrize("bias", ["b1", "b2", "b3"])
def test_an_attention_of_little_keeps_the_rounding_of_its_sigmoid(bias: str, backend: str) -> None:
    """Of one bias alone: the error is up to 3e-4 of the result, in plain PyTorch too, but at most 6e-8 of the bias."""
    torch.manual_seed(0)
    weights = {f"w{n}": torch.randn(28, 28, 3, 3) * (28 * 9) ** -0.5 for n in (1, 2, 3)}
    absent = {"b1": None, "b2": None, "b3": None}
    case = OperatorCase("spab", "", {"x": 28}, {})
    for size in (1e-1, 1e-2, 1e-3):
        arguments = {"x": torch.zeros(1, 28, 8, 8), **weights, **absent, bias: torch.randn(28) * size}
        with esr_kernels.use_backend(backend):
            error = largest_error(case.fused(arguments), case.plain(to(arguments, torch.float64)))
        assert error <= size_of_gated(case, arguments) * gate_error(torch.float32, backend)


@pytest.mark.skipif("native-cpu" not in backends_with("conv3x3"), reason="the native library is not compiled")
@pytest.mark.parametrize("dimension", ["image", "channel"])
@pytest.mark.parametrize("case", OPERATOR_CASES, ids=lambda case: case.name)
def test_offsets_beyond_32_bits(case: OperatorCase, dimension: str) -> None:
    """A view over memory that is reserved, not used: elements are more than 2^31 apart."""
    arguments = case.arguments(2, 15, 16, dtype=torch.float16)

    def far_apart(t: Tensor) -> Tensor:
        (h, w), far = t.shape[2:], 2**31 + 8
        strides = (far, w * h, w, 1) if dimension == "image" else (w * h, far, w, 1)
        size = sum((s - 1) * step for s, step in zip(t.shape, strides, strict=True)) + 1
        return torch.from_numpy(np.empty(size, np.float16)).as_strided(t.shape, strides).copy_(t)

    with esr_kernels.use_backend("native-cpu"):
        want = case.fused(arguments)
        for name in case.features:
            value = arguments[name]
            arguments[name] = [far_apart(t) for t in value] if isinstance(value, list) else far_apart(value)
        assert torch.equal(case.fused(arguments), want)
