"""What only a GPU can tell, of every backend that runs on one: `pytest -m gpu`.

Nearly all the time goes into compiling Triton kernels, one after the other; `-n 8` (pytest-xdist) compiles side by
side. With ESR_KERNELS_GPU_TESTS_ON_CPU=1 and no GPU the tests that need no CUDA run on the CPU with small sizes,
Triton's kernels in its interpreter: that proves the tests, not the kernels.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    LAYOUTS,
    OPERATOR_CASES,
    PUBLISHED,
    check_close,
    conv,
    expected_format,
    kernel,
    largest_error,
    lay_out,
    published,
)
from test_conv3x3 import CHANNELS
from test_plan import statistic_network, statistic_of, statistic_plan
from torch import Tensor, nn

import esr_kernels
import python_models
from esr_kernels import cases
from esr_kernels import functional as E
from esr_kernels.cases import OperatorCase
from esr_kernels.modules import RLFB, SPAB, Conv1x1, Conv3x3, PixelShuffleUpsampler
from esr_kernels.plan import STATISTICS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*deterministic"),
    pytest.mark.filterwarnings("ignore:.*no Triton configurations were measured"),
]

CUDA = torch.cuda.is_available()
SMALL = not CUDA
ALLOWED_ON_CPU = os.environ.get("ESR_KERNELS_GPU_TESTS_ON_CPU") == "1"
BACKENDS = [b.name for b in esr_kernels.list_backends() if b.available and b.name != "native-cpu"]
FUSED = [name for name in BACKENDS if name != "reference"]

PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HALVES = ("float16", "bfloat16")

# What runs in PyTorch on CUDA is left out.
_IN_PYTORCH = ("selective_scan", "window_attention")
CASES = [case for case in cases.CASES if case.operator not in _IN_PYTORCH]
SMALL_CASES = [case for case in OPERATOR_CASES if case.operator not in _IN_PYTORCH]


def named(name: str) -> OperatorCase:
    return next(case for case in CASES if case.name == name)


ONE_EACH = [
    named("conv3x3 span 28>28 attention"),
    named("spab span 28"),
    named("conv3x3_pixel_shuffle light_rlfn 36 x4 residual"),
    named("conv1x1 span 4x28>28"),
    named("esa rlfn 46 16"),
    named("bsconv ifadnet 36>36 reflect gelu"),
    named("depthwise_conv egfmn 144 gated"),
    named("layer_norm2d rcn 40"),
    named("adaptive_max_pool smfan 24 to 16x16"),
    named("modulate egfmn 36"),
]
# What kernels do apart from the published cases: other epilogues, several blocks of channels, a list of more maps than
# one launch reads, other scales.
FURTHER = [
    OperatorCase(
        "conv3x3",
        "pre gelu_tanh",
        {"x": 12, "residual": 20},
        conv(12, 20),
        {"activation": "gelu_tanh", "residual_mode": "pre"},
    ),
    OperatorCase("conv3x3", "30>100 relu", {"x": 30}, conv(30, 100), {"activation": "relu"}),
    OperatorCase("conv3x3_pixel_shuffle", "5 x1", {"x": 5}, conv(5, 7), {"upscale_factor": 1}),
    OperatorCase(
        "conv3x3_pixel_shuffle", "20 x3 residual", {"x": 20, "residual": 3}, conv(20, 27), {"upscale_factor": 3}
    ),
    OperatorCase(
        "conv1x1", "10 maps silu", {"xs": (3, 16, 5, 8, 4, 7, 2, 9, 16, 1)}, conv(71, 120, 1), {"activation": "silu"}
    ),
    OperatorCase(
        "esa",
        "84 21",
        {"x": 84},
        {
            "w1": (21, 84, 1, 1),
            "w2": (21, 21, 3, 3),
            "b2": (21,),
            "w3": (21, 21, 3, 3),
            "w4": (84, 21, 1, 1),
            "b4": (84,),
        }
        | {"b1": (21,), "b3": (21,), "wf": (21, 21, 1, 1)},
    ),
    OperatorCase(
        "bsconv",
        "40>52 gelu_tanh",
        {"x": 40},
        {"pointwise": (52, 40, 1, 1), "depthwise": (52, 1, 3, 3)},
        {"activation": "gelu_tanh"},
    ),
    OperatorCase(
        "depthwise_conv",
        "44 7x5 dilated by 2, gelu_tanh, gated",
        {"x": 44},
        {"weight": (44, 1, 7, 5), "bias": (44,)},
        {"dilation": 2, "activation": "gelu_tanh", "gated": True},
    ),
    OperatorCase("layer_norm2d", "300", {"x": 300}, {"weight": (300,), "bias": (300,)}),
    OperatorCase("adaptive_max_pool", "130 to 3x5", {"x": 130}, {}, {"output_size": (3, 5)}),
    OperatorCase(
        "modulate",
        "20 bilinear",
        {"x": 20, "maps": (20,) * 3},
        {},
        {"mode": "bilinear", "activation": "gelu_tanh"},
        (1, 3, 7),
    ),
    OperatorCase(
        "modulate",
        "5 8 maps bilinear gelu_tanh",
        {"x": 5, "maps": (5,) * 8},
        {},
        {"mode": "bilinear", "activation": "gelu_tanh"},
        (1, 2, 3, 4, 1, 7, 8, 16),
    ),
]


# --- fixtures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def device() -> str:
    if CUDA:
        return "cuda"
    if not ALLOWED_ON_CPU:
        pytest.skip("no CUDA device, and ESR_KERNELS_GPU_TESTS_ON_CPU=1 is not set")
    return "cpu"


@pytest.fixture
def cuda() -> None:
    if not CUDA:
        pytest.skip("no CUDA device")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend in turn. The environment, because on a GPU gradients are computed in threads of their own, which
    `use_backend` does not reach."""
    monkeypatch.setenv("ESR_KERNELS_BACKEND", request.param)
    return request.param


fused_only = pytest.mark.parametrize(
    "backend", FUSED or [pytest.param("triton", marks=pytest.mark.skip)], indirect=True
)


@pytest.fixture(autouse=True)
def arithmetic(poisoned_memory: None) -> Iterator[None]:
    """No TF32 unless a test asks for it; memory stays poisoned, but plain PyTorch, which has no deterministic form of
    some gradients on a GPU, may run."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


# --- inputs and comparisons -----------------------------------------------------------------------------------------


def use(precision: str) -> torch.dtype:
    """Chooses the arithmetic for the rest of the test."""
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return PRECISIONS[precision]


def each(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return function(value) if isinstance(value, Tensor) else [function(t) for t in value]


def make(
    case: OperatorCase,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
    layout: str = "nchw",
    seed: int = 0,
) -> dict[str, Any]:
    """The case's arguments with feature maps in a layout of `helpers.lay_out`."""
    arguments = case.arguments(*shape, dtype=dtype, device=device, seed=seed)
    return {k: each(v, lambda t: lay_out(t, layout)) if k in case.features else v for k, v in arguments.items()}


def tensors(arguments: dict[str, Any]) -> list[Tensor]:
    return [t for value in arguments.values() for t in ([value] if isinstance(value, Tensor) else value)]


def first_map(case: OperatorCase, arguments: dict[str, Any]) -> Tensor:
    return tensors({"": arguments[next(iter(case.features))]})[0]


@lru_cache(maxsize=8)
def exact(case: OperatorCase, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """The result in float64 on the CPU for arguments rounded to `dtype`."""
    return case.plain(cases.double(case.arguments(*shape, dtype=dtype)))


def check(actual: Tensor, expected: Tensor, plain: Callable[[], Tensor], precision: str, backend: str) -> None:
    """The numeric contract; TF32 is judged as a half type, beside PyTorch's own."""
    assert actual.dtype == PRECISIONS[precision]
    actual = actual.detach().cpu()
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    if precision == "tf32":
        allowed = max(2 * largest_error(plain().cpu(), expected), 2**-11 * largest)
        assert largest_error(actual, expected) <= allowed, f"allowed {allowed:.3e}"
    elif precision == "float32" and backend == "reference":
        # cuDNN is free to choose Winograd's algorithm.
        assert largest_error(actual, expected) <= cases.WINOGRAD_TOLERANCE * largest
    else:
        check_close(actual, expected, lambda: plain().cpu(), backend)


def check_call(case: OperatorCase, arguments: dict[str, Any], precision: str, backend: str) -> Tensor:
    """One call against plain PyTorch in float64."""
    out = case.fused(arguments)
    check(out, case.plain(cases.double(arguments)), lambda: case.plain(arguments), precision, backend)
    return out


def differentiate(
    call: Callable[[dict[str, Any]], Tensor],
    arguments: dict[str, Any],
    seed: Tensor | None = None,
    layout: str = "nchw",
) -> list[Tensor]:
    """The result and the gradients to every tensor; the seed is rounded to the result's dtype."""
    arguments = {k: each(v, lambda t: t.detach().requires_grad_()) for k, v in arguments.items()}
    out = call(arguments)
    if seed is None:
        seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    seed = lay_out(seed.to(out.device, out.dtype), layout)
    return [out.detach(), *torch.autograd.grad(out, tensors(arguments), seed)]


def distance(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to the norm; infinite when a value is not finite."""
    assert actual.shape == expected.shape
    error = float((cases.double(actual) - expected).norm() / expected.norm())
    return error if error == error else float("inf")


def assert_same(actual: list[Tensor], expected: list[Tensor], backend: str) -> None:
    """Bit for bit, except that PyTorch itself promises no such thing."""
    for a, e in zip(actual, expected, strict=True):
        if backend == "reference":
            assert cases.relative_error(a, cases.double(e)) <= 4 * torch.finfo(e.dtype).eps
        else:
            assert torch.equal(a, e)


def usual(case: OperatorCase) -> tuple[int, int, int]:
    """A shape that ends inside a tile."""
    if SMALL:
        return (2, 16, 18) if case.operator == "esa" else (2, 5, 18)
    return (2, 33, 47)


# --- the result -----------------------------------------------------------------------------------------------------

SHAPES = ((2, 1, 1), (2, 2, 5), (2, 33, 47), (1, 64, 96), (1, 127, 255))
SMALL_SHAPES = ((2, 1, 1), (2, 2, 5), (1, 9, 18))


def shapes(case: OperatorCase, layout: str) -> list[tuple[int, int, int]]:
    found = [(2, 15, 15), (1, 21, 26)] if SMALL else [(2, 15, 15), *SHAPES]
    if case.operator == "esa":
        return [shape for shape in found if min(shape[1:]) >= E.ESA_MINIMUM]
    smallest = 2 if case.settings.get("padding_mode") == "reflect" else 1
    if layout == "channels_last":
        smallest = 2  # a single pixel lies in both formats and runs the kernels of the other one
    return [shape for shape in (SMALL_SHAPES if SMALL else SHAPES) if min(shape[1:]) >= smallest]


# Each case in each precision and each layout, each precision with each layout; TF32, whose kernels take seconds to
# compile, for one case of every operator.
COMBINATIONS = [
    (case, precision, LAYOUTS[(i + j) % len(LAYOUTS)])
    for i, case in enumerate(CASES)
    for j, precision in enumerate(PRECISIONS)
    if precision != "tf32" or case in ONE_EACH
]
COMBINATIONS += [(case, p, layout) for case in FURTHER for p, layout in zip(HALVES, LAYOUTS, strict=False)]


def identify(value: Any) -> str | None:
    return value.name.replace(" ", "-") if isinstance(value, OperatorCase) else None


@pytest.mark.parametrize(("case", "precision", "layout"), COMBINATIONS, ids=identify)
def test_forward(case: OperatorCase, precision: str, layout: str, backend: str, device: str) -> None:
    dtype = use(precision)
    wrong = []
    for shape in shapes(case, layout):
        arguments = make(case, shape, dtype, device, layout)
        out = case.fused(arguments)
        nchw = case.operator == "conv3x3_pixel_shuffle"
        like = torch.contiguous_format if nchw else expected_format(first_map(case, arguments))
        assert out.is_contiguous(memory_format=like)
        try:
            check(out, exact(case, shape, dtype), lambda: case.plain(arguments), precision, backend)  # noqa: B023
        except AssertionError as error:
            wrong.append(f"{shape}: {error}")
        # The same call for tensors elsewhere: a backend may keep what it did the first time.
        other = case.fused(make(case, shape, dtype, device, layout))
        if backend != "reference" and not torch.equal(other, out):
            wrong.append(f"{shape}: the second call gave other bits")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("channels", CHANNELS)
def test_channel_counts(channels: int, backend: str, device: str) -> None:
    case = OperatorCase("conv3x3", str(channels), {"x": channels}, conv(channels, channels), {"activation": "silu"})
    layout = LAYOUTS[CHANNELS.index(channels) % 2]
    check_call(case, make(case, usual(case), torch.float16, device, layout), "float16", backend)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("case", [named("conv3x3 span first 3>28"), named("spab span 28")], ids=identify)
def test_values_as_span_feeds_them(case: OperatorCase, precision: str, backend: str, device: str) -> None:
    """+-127: neither an overflow nor a NaN."""
    arguments = make(case, usual(case), use(precision), device)
    arguments["x"] = (arguments["x"].sign() * 127).contiguous()
    check_call(case, arguments, precision, backend)


# --- gradients ------------------------------------------------------------------------------------------------------

# float32 for one form of each operator and for RFDN's attention, half types for the others too.
DIFFERENTIATED = [*ONE_EACH, named("esa rfdn 50 12 with conv_max")]
GRADIENTS = [
    (case, precision, LAYOUTS[(i + j) % len(LAYOUTS)])
    for i, case in enumerate(DIFFERENTIATED)
    for j, precision in enumerate(("float32", "float16", "bfloat16"))
]
GRADIENTS += [
    (case, HALVES[i % 2], LAYOUTS[i % len(LAYOUTS)])
    for i, case in enumerate(
        [
            named("conv3x3 span first 3>28"),
            named("conv3x3 rlfn 48>46 leaky_relu post"),
            named("conv3x3 rden 37>37 gelu"),
            named("esa slim_rlfn 30 16 without conv_f"),
            named("bsconv lkfn 12>28"),
            *FURTHER,
        ]
    )
]


@pytest.mark.parametrize(("case", "precision", "layout"), GRADIENTS, ids=identify)
def test_gradients(case: OperatorCase, precision: str, layout: str, backend: str, device: str) -> None:
    """To every feature map and parameter."""
    dtype = use(precision)
    arguments = make(case, usual(case), dtype, device, layout)
    out = case.plain(arguments)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = differentiate(case.plain, cases.double(arguments), seed)
    got = differentiate(case.fused, arguments, seed, layout)
    eager = differentiate(case.plain, arguments, seed, layout)
    assert all(g.dtype == dtype for g in got)
    # For half types the norm counts: a tie in a max pool may fall the other way, in PyTorch and here, and that changes
    # few values by much.
    measure, floor = (cases.relative_error, cases.NETWORK_TOLERANCE) if precision == "float32" else (distance, 1e-2)
    allowed = max(floor, 2 * max(map(measure, eager, expected)))
    errors = [measure(g, e) for g, e in zip(got, expected, strict=True)]
    names = ["result", *(f"{k} {list(t.shape)}" for k, v in arguments.items() for t in tensors({k: v}))]
    wrong = [f"{name}: error {e:.2e}, allowed {allowed:.2e}" for name, e in zip(names, errors, strict=True)]
    assert not any(e > allowed for e in errors), "\n".join(wrong)


@pytest.mark.parametrize("case", ONE_EACH, ids=identify)
def test_only_wanted_gradients(case: OperatorCase, backend: str, device: str) -> None:
    arguments = make(case, usual(case), torch.float16, device)
    everything = differentiate(case.fused, arguments)[1:]
    last = len(everything) - 1
    for wanted in sorted({0, min(len(case.features), last), last}):
        for i, t in enumerate(tensors(arguments)):
            t.requires_grad_(i == wanted).grad = None
        out = case.fused(arguments)
        seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        out.backward(seed.to(out.device, out.dtype))
        gradients = [t.grad for t in tensors(arguments)]
        assert [i for i, g in enumerate(gradients) if g is not None] == [wanted]
        assert_same([gradients[wanted]], [everything[wanted]], backend)


@pytest.mark.parametrize("case", ONE_EACH, ids=identify)
def test_gradient_without_a_stride(case: OperatorCase, backend: str, device: str) -> None:
    """What `sum().backward()` hands in."""
    arguments = make(case, usual(case), torch.float16, device)
    expected = differentiate(case.fused, arguments, torch.ones_like(case.plain(arguments)))[1:]
    leaves = [t.requires_grad_() for t in tensors(arguments)]
    assert_same(list(torch.autograd.grad(case.fused(arguments).sum(), leaves)), expected, backend)


# --- the same bits --------------------------------------------------------------------------------------------------


@fused_only
@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("case", ONE_EACH, ids=identify)
def test_repeats_are_bit_equal(case: OperatorCase, precision: str, backend: str, device: str) -> None:
    """Forward and every gradient."""
    shape = usual(case) if SMALL else (4, 96, 128)
    arguments = make(case, shape, use(precision), device, "channels_last")
    first = differentiate(case.fused, arguments)
    different = torch.zeros(len(first), dtype=torch.int64, device=device)
    for _ in range(2 if SMALL else 200):
        again = differentiate(case.fused, arguments)
        different += torch.stack([(a != b).any() for a, b in zip(again, first, strict=True)])
    assert not different.any(), f"repeats that differ, of the result and each gradient: {different.tolist()}"


@fused_only
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("case", ONE_EACH, ids=identify)
def test_batches_are_bit_equal(case: OperatorCase, layout: str, backend: str, device: str) -> None:
    """An image's result and the gradient to it do not depend on the images beside it."""
    shape = (3, *usual(case)[1:])
    arguments = make(case, shape, torch.float16, device, layout)
    together = differentiate(case.fused, arguments)
    seed = torch.randn(together[0].shape, generator=torch.Generator().manual_seed(1))
    maps = len(tensors({k: v for k, v in arguments.items() if k in case.features}))
    for i in range(3):
        one = {k: each(v, lambda t: t[i : i + 1]) if k in case.features else v for k, v in arguments.items()}  # noqa: B023
        alone = differentiate(case.fused, one, seed[i : i + 1])
        assert_same(alone[: 1 + maps], [t[i : i + 1] for t in together[: 1 + maps]], backend)


# --- whole networks -------------------------------------------------------------------------------------------------

WEIGHTS = Path(__file__).resolve().parent.parent.parent / "shared" / "models" / "weights"


def network_pair(name: str) -> tuple[nn.Module, nn.Module]:
    """With the published weights where they are at hand, else random ones."""
    path = WEIGHTS / PUBLISHED[name][1]
    return cases.model_pair(name, str(path) if path.is_file() else None)


@pytest.mark.parametrize("golden", ["B"] if SMALL else ["A", "B"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_outputs(name: str, golden: str, backend: str, device: str, shared_models: Path) -> None:
    model, x, expected = published(name, shared_models, golden)
    model, x, expected = model.to(device), x.to(device), expected.to(device)
    fast = esr_kernels.optimize(model)
    assert fast.plan is not None
    with torch.no_grad():
        for call in (fast,) if SMALL else (model, fast):
            assert float((call(x) - expected).abs().max()) <= 1e-4 * model.data_range


@pytest.mark.parametrize("precision", ["float32", *HALVES])
@pytest.mark.parametrize("name", PUBLISHED)
def test_networks(name: str, precision: str, backend: str, device: str) -> None:
    """As a plan and as modules, from an image of noise and one of the largest contrast."""
    dtype = use(precision)
    fused, plain = network_pair(name)
    fused, exact_twin = fused.to(device), copy.deepcopy(plain).double()
    plain = plain.to(device, dtype)
    fast = esr_kernels.optimize(fused, dtype=dtype)
    modules = copy.deepcopy(fused).to(dtype)
    assert fast.plan is not None
    noise = cases.random_image(fused, 1, *((16, 19) if SMALL else (127, 181))).to(device, dtype)
    contrast = (noise > fused.data_range / 2).to(dtype) * fused.data_range
    for x in (noise, contrast.contiguous(memory_format=torch.channels_last)):
        with torch.no_grad():
            expected = exact_twin(cases.double(x))
            allowed = cases.network_tolerance(dtype, cases.relative_error(plain(x), expected))
            got = cases.compare(fast(x), expected, allowed, dtype)
            assert got.ok, f"plan: {got}"
            if not SMALL or x is noise:
                got = cases.compare(modules(x), expected, allowed, dtype)
                assert got.ok, f"modules: {got}"


@fused_only
def test_network_with_cuda_graphs(backend: str, cuda: None) -> None:
    """The captured network gives the bits of the launched one."""
    fused, _ = network_pair("span")
    graphed, launched = (
        esr_kernels.optimize(fused.cuda(), dtype=torch.float16, cuda_graphs=mode) for mode in (True, False)
    )
    for i in range(3):
        x = cases.random_image(fused, 1, 64, 80, seed=i).cuda()
        assert torch.equal(graphed(x), launched(x))


@pytest.mark.parametrize("name", ["span", "rlfn"])
def test_a_persistent_network(name: str, cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of layers in one launch, also from a graph that is replayed, have the bits of one launch per layer."""
    if "native-cuda" not in BACKENDS:
        pytest.skip("native-cuda is not available here")
    fused, _ = network_pair(name)
    with esr_kernels.use_backend("native-cuda"):
        graphed, launched = (
            esr_kernels.optimize(fused.cuda(), dtype=torch.float16, cuda_graphs=mode) for mode in (True, False)
        )
        for size in ((64, 80), (128, 128), (256, 256), (640, 640)):  # the last one is too large
            for i in range(3):
                x = cases.random_image(fused, 1, *size, seed=i).cuda()
                monkeypatch.delenv("ESR_KERNELS_CUDA_PERSISTENT", raising=False)
                expected = launched(x)
                monkeypatch.setenv("ESR_KERNELS_CUDA_PERSISTENT", "1")
                assert torch.equal(launched(x), expected)
                assert torch.equal(graphed(x), expected)


# --- torch.compile, autocast, opcheck -------------------------------------------------------------------------------


class Small(nn.Module):
    """A network of this package's modules with plain PyTorch between them."""

    minimum = 15

    def __init__(self) -> None:
        super().__init__()
        self.first = Conv3x3(3, 12, activation="gelu")
        self.span = SPAB(12, deploy=True)
        self.local = RLFB(12, esa_channels=8)
        self.join = Conv1x1(24, 12, activation="silu")
        self.last = PixelShuffleUpsampler(12, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x - 0.5)
        return self.last(self.join([self.local(self.span(h) * 0.5 + h), h]))


def test_compile(backend: str, device: str) -> None:
    """Whole, once for two sizes, forward and backward."""
    model = Small().to(device, torch.float16)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="inductor")
    results: list[list[Tensor]] = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((17, 19), (20, 16)) if SMALL else ((33, 47), (64, 96)):
            x = torch.rand(2, 3, *size).to(device, torch.float16).requires_grad_()
            for call in (compiled, model):
                out = call(x)
                results.append([out.detach(), *torch.autograd.grad(out.sum() / 100, [x, *model.parameters()])])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
    for got, expected in zip(results[::2], results[1::2], strict=True):
        # Inductor keeps in float32 what eager rounds in between.
        assert max(cases.relative_error(g, cases.double(e)) for g, e in zip(got, expected, strict=True)) <= 1e-2


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("case", ONE_EACH, ids=identify)
def test_autocast(case: OperatorCase, precision: str, backend: str, device: str) -> None:
    dtype = PRECISIONS[precision]
    arguments = make(case, usual(case), torch.float32, device, "channels_last")
    leaves = [t.requires_grad_() for t in tensors(arguments)]
    with torch.autocast(device, dtype):
        out = case.fused(arguments)
    rounded = cases.convert(arguments, dtype)
    expected = case.plain(cases.double(arguments))
    check(out, expected, lambda: case.plain(rounded), precision, backend)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("precision", HALVES)
def test_gradient_scaler_step(precision: str, backend: str, device: str) -> None:
    model, target = Small().to(device), torch.rand(2, 3, 34, 38, device=device)
    x = torch.rand(2, 3, 17, 19, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast(device, PRECISIONS[precision]):
            loss = (model(x) - target).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert scaler.get_scale() == 1024.0, "a gradient was not finite"
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert losses[-1] < losses[0]


DEFAULTS = {
    "activation": "none",
    "negative_slope": 0.05,
    "residual_mode": "post",
    "padding_mode": "zeros",
    "dilation": 1,
    "mode": "nearest",
}


def positional(operator: Any, given: dict[str, Any]) -> list[Any]:
    """Arguments of a registered operator in its schema's order."""
    return [given.get(argument.name) for argument in operator._schema.arguments]


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name.strip())
def test_opcheck(case: OperatorCase, backend: str, device: str) -> None:
    """The operator with gradients, then its backward operator by itself."""
    shape = (2, 16, 17) if case.operator == "esa" else (2, 6, 7)
    arguments = make(case, shape, torch.float16, device, "channels_last")
    given = {**DEFAULTS, "return_mid": True, **case.settings, **arguments}
    grad = case.plain(arguments)
    for t in tensors(arguments):
        t.requires_grad_()
    forward = getattr(torch.ops.esr, case.operator).default
    torch.library.opcheck(forward, positional(forward, given))
    backward = getattr(torch.ops.esr, f"{case.operator}_backward").default
    detached = {k: each(v, Tensor.detach) if isinstance(v, Tensor | list) else v for k, v in given.items()}
    # The pixel shuffle's residual has a gradient but is no argument of the backward operator; ESA's mask has an entry
    # for each parameter that it may have.
    count = {"conv3x3_pixel_shuffle": 4, "esa": 15}.get(case.operator, len(tensors(arguments)))
    mask = [True] * count
    torch.library.opcheck(backward, positional(backward, {**detached, "grad": grad, "output_mask": mask}))


@fused_only
def test_opcheck_of_a_plan(backend: str, device: str) -> None:
    fast = esr_kernels.optimize(Small().requires_grad_(False), dtype=torch.float16).to(device)
    assert fast.plan is not None, fast.report()
    weights = [t for _, t in sorted(fast.named_parameters(), key=lambda item: int(item[0].rpartition("_")[2]))]
    x = torch.rand(2, 3, 16, 17).to(device, torch.float16)
    torch.library.opcheck(torch.ops.esr.run_plan.default, ([x], weights, fast.plan.to_json()))


# --- statistics, which only plans have -------------------------------------------------------------------------------


def statistics(kind: str, x: Tensor) -> Tensor:
    """Of every image and channel, [N, C, 1, 1] in the dtype of x."""
    zeros = torch.zeros_like(x)
    return torch.ops.esr.run_plan([zeros, x], [], statistic_plan(x.shape[1], kind, 1))[0][:, :, :1, :1]


@fused_only
@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_statistics(kind: str, layout: str, backend: str, device: str) -> None:
    """Against float64, and with the same bits in every run, alone and in a batch."""
    sizes = [(9, 13)] if SMALL else [(1, 7), (9, 13), (256, 256), (1023, 1025)]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for channels, size in ((c, s) for c in (3, 28, 48, 130) for s in sizes):
            x = lay_out(torch.randn(2, channels, *size) + 1, layout).to(device, dtype)
            got, exact = statistics(kind, x), statistic_of(x.double(), kind, 1)
            check_close(got, exact, lambda e=exact, d=dtype: e.to(d), backend)
            assert torch.equal(statistics(kind, x), got)
            assert torch.equal(statistics(kind, x[1:]), got[1:])


@fused_only
@pytest.mark.parametrize("precision", ["float32", *HALVES])
def test_gates_of_statistics(precision: str, backend: str, device: str) -> None:
    """A plan in which values of one pixel pass layers of all kinds."""
    dtype = use(precision)
    for kind in STATISTICS:
        plan, weights, oracle = statistic_network(36, kind, 0, dtype)
        x = torch.randn(2, 5, *((17, 19) if SMALL else (256, 256))).to(device, dtype)
        results = torch.ops.esr.run_plan([x], [w.to(device) for w in weights], plan.to_json())
        exact, plain = oracle(x.cpu().double()), oracle(x.cpu(), dtype)
        for got, e, p in zip(results, exact, plain, strict=True):
            check_close(got.cpu(), e, lambda p=p: p, backend)


@fused_only
def test_graph_capture_of_statistics(backend: str, cuda: None) -> None:
    """A replay computes with what the image holds by then."""
    plan, weights, _ = statistic_network(36, "contrast", 1, torch.float16)
    weights, text = [w.cuda() for w in weights], plan.to_json()
    static, changed = (torch.randn(1, 5, 256, 256, device="cuda", dtype=torch.float16) for _ in range(2))
    expected = torch.ops.esr.run_plan([changed], weights, text)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            torch.ops.esr.run_plan([static], weights, text)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = torch.ops.esr.run_plan([static], weights, text)
    static.copy_(changed)
    for _ in range(2):
        graph.replay()
    assert_same(got, expected, backend)


# --- addresses ------------------------------------------------------------------------------------------------------


def moved(t: Tensor) -> Tensor:
    """The same values and strides, one element further from an aligned address."""
    view = t.new_empty(t.numel() + 1).as_strided(t.shape, t.stride(), 1)
    return view.copy_(t)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("case", [named("conv3x3 rden 37>37 gelu"), *ONE_EACH], ids=identify)
def test_unaligned_pointers(case: OperatorCase, layout: str, backend: str, device: str) -> None:
    arguments = make(case, usual(case), torch.float16, device, layout)
    odd = {k: each(v, moved) for k, v in arguments.items()}
    assert all(t.data_ptr() % 16 == 2 for t in tensors(odd))
    check_call(case, odd, "float16", backend)
    # The kernels of the aligned call afterwards, in case the first choice had stuck.
    check_call(case, arguments, "float16", backend)


@pytest.mark.parametrize("case", ONE_EACH, ids=identify)
def test_empty_batch(case: OperatorCase, backend: str, device: str) -> None:
    arguments = make(case, (0, 20, 20), torch.float16, device)
    got = differentiate(case.fused, arguments)
    expected = [case.plain(arguments), *tensors(arguments)]
    assert [t.shape for t in got] == [t.shape for t in expected]
    assert not any(bool(t.any()) for t in got)


@pytest.mark.parametrize("how", ["batch", "channels", "pixels", "everything"])
@pytest.mark.parametrize("case", ONE_EACH, ids=identify)
def test_expanded_maps(case: OperatorCase, how: str, backend: str, device: str) -> None:
    """Feature maps whose elements share memory: strides of 0."""

    def shrink(t: Tensor) -> Tensor:
        index = {"batch": t[:1], "channels": t[:, :1], "pixels": t[:, :, :1, :1], "everything": t[:1, :1, :1, :1]}
        return index[how].expand(t.shape)

    arguments = make(case, usual(case), torch.float16, device)
    arguments = {k: each(v, shrink) if k in case.features else v for k, v in arguments.items()}
    check_call(case, arguments, "float16", backend)


@pytest.mark.parametrize("how", ["every other element", "expanded", "channels_last"])
@pytest.mark.parametrize("case", [*ONE_EACH, named("esa rfdn 50 12 with conv_max")], ids=identify)
def test_parameters_of_any_strides(case: OperatorCase, how: str, backend: str, device: str) -> None:
    """Forward and backward, and once more with other values, for which a backend may repeat what it did."""

    def restride(t: Tensor) -> Tensor:
        if how == "expanded":
            return t[:1].expand(t.shape)
        if how == "channels_last":
            return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        apart = torch.stack([t, t + 1], -1)
        return apart[..., 0]

    for seed in (0, 1):
        arguments = make(case, usual(case), torch.float16, device, seed=seed)
        strided = {k: restride(v) if k in case.parameters else v for k, v in arguments.items()}
        check_call(case, strided, "float16", backend)
    dense = {k: v.contiguous() if k in case.parameters else v for k, v in strided.items()}
    assert_same(differentiate(case.fused, strided), differentiate(case.fused, dense), backend)


@fused_only
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("case", ONE_EACH, ids=identify)
def test_wide_offsets_on_a_small_image(
    case: OperatorCase, layout: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code for images beyond 2^31 elements, forward and backward."""
    if backend != "triton":
        pytest.skip("only Triton's kernels come in two versions")
    maps = pytest.importorskip("esr_kernels.backends.triton.maps")
    arguments = make(case, usual(case), torch.float16, device, layout)
    narrow = differentiate(case.fused, arguments)
    monkeypatch.setattr(maps, "LARGEST_OFFSET", 0)
    # Other addresses, so that no launch of the first call is repeated.
    arguments = {k: each(v, moved) for k, v in arguments.items()}
    for w, n in zip(differentiate(case.fused, arguments), narrow, strict=True):
        assert cases.relative_error(w, cases.double(n)) <= 2 * torch.finfo(torch.float16).eps


@fused_only
@pytest.mark.parametrize("name", PUBLISHED)
def test_wide_offsets_in_a_plan(name: str, backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "triton":
        pytest.skip("only Triton's kernels come in two versions")
    maps = pytest.importorskip("esr_kernels.backends.triton.maps")
    options = {"feature_channels": 20, "num_blocks": 2, "upscale": 2}
    options |= {"mid_channels": 12, "esa_channels": 8} if name == "rlfn" else {}
    model = python_models.create(name, **options).to(device)
    fast = esr_kernels.optimize(model, dtype=torch.float16, cuda_graphs=False)
    x = cases.random_image(model, 1, 16, 19).to(device)
    narrow = fast(x)
    monkeypatch.setattr(maps, "LARGEST_OFFSET", 0)
    # A copy, for which no launch was prepared yet.
    assert cases.relative_error(copy.deepcopy(fast)(x), cases.double(narrow)) <= 2 * torch.finfo(torch.float16).eps


@fused_only
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_more_than_two_to_the_31_elements(layout: str, backend: str, cuda: None) -> None:
    shape = (1, 32, 8192, 8256)
    size = 2 * 32 * shape[2] * shape[3]
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 2.5 * size:
        pytest.skip(f"needs {2.5 * size / 2**30:.0f} GiB of free GPU memory")
    last = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=last).normal_()
    weight, bias = kernel(32, 32, dtype=torch.float16).cuda(), torch.randn(32).cuda().half()
    assert x.numel() > 2**31
    out = E.conv3x3(x, weight, bias, activation="silu")
    for y in (0, 4096, shape[2] - 64):
        for left in (0, 4000, shape[3] - 64):
            crop = E.conv3x3(x[:, :, y : y + 64, left : left + 64].contiguous(), weight, bias, activation="silu")
            # Away from the crop's border, unless that is the image's too.
            rows = slice(0 if y == 0 else 1, 64 if y + 64 == shape[2] else 63)
            columns = slice(0 if left == 0 else 1, 64 if left + 64 == shape[3] else 63)
            whole = out[:, :, y : y + 64, left : left + 64]
            torch.testing.assert_close(whole[..., rows, columns], crop[..., rows, columns], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("case", [named("conv3x3_pixel_shuffle span 28 x4"), FURTHER[2], *ONE_EACH], ids=identify)
def test_results_are_new_tensors(case: OperatorCase, backend: str, device: str) -> None:
    """No result shares memory with an argument, and arguments stay as they were."""
    arguments = make(case, usual(case), torch.float16, device)
    before = [t.clone() for t in tensors(arguments)]
    memory = {t.untyped_storage().data_ptr() for t in tensors(arguments)}
    results = differentiate(case.fused, arguments)
    assert not memory & {t.untyped_storage().data_ptr() for t in results}
    assert len({t.untyped_storage().data_ptr() for t in results}) == len(results)
    assert all(map(torch.equal, tensors(arguments), before))


# --- values that are no numbers -------------------------------------------------------------------------------------

SPREADING = [(case, "float16") for case in ONE_EACH]
SPREADING += [(named("conv3x3 span 28>28 silu"), "float32"), (named("conv1x1 rlfn 46>46"), "float32")]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize(("case", "precision"), SPREADING, ids=identify)
def test_not_finite(case: OperatorCase, precision: str, value: float, backend: str, device: str) -> None:
    """NaN and infinity come out where they do in plain PyTorch, and nowhere else."""
    if case.operator == "esa" and value == value:
        pytest.skip("infinity in two convolutions after each other is another value in one, and folding is allowed")
    if backend == "reference" and CUDA:
        pytest.skip("cuDNN's algorithms spread them over tiles")
    shape = (1, 37, 41) if case.operator == "esa" else (1, 9, 20)
    arguments = make(case, shape, use(precision), device)
    first_map(case, arguments)[0, 2, 5, 7] = value
    out, expected = case.fused(arguments).cpu(), case.plain(cases.double(arguments))
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.isposinf(), expected.isposinf())
    assert torch.equal(out.isneginf(), expected.isneginf())
    hidden = case.operator == "adaptive_max_pool" and value < 0  # by the maxima
    assert bool(expected.isfinite().all()) == hidden


# --- streams, graphs, devices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ONE_EACH, ids=identify)
def test_graph_capture(case: OperatorCase, backend: str, cuda: None) -> None:
    """A replay computes with what its inputs hold by then, forward and backward."""

    def run(arguments: dict[str, Any], seed: Tensor) -> list[Tensor]:
        if backend == "reference":
            return [case.fused(arguments)]
        leaves = [t.requires_grad_() for t in tensors(arguments)]
        out = case.fused(arguments)
        return [out, *torch.autograd.grad(out, leaves, seed)]

    static = make(case, usual(case), torch.float16, "cuda", "channels_last")
    changed = make(case, usual(case), torch.float16, "cuda", "channels_last", seed=1)
    changed |= {k: static[k].clone() for k in case.parameters}
    seed = torch.randn_like(case.plain(static))
    expected = run(changed, seed)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(static, seed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(static, seed)
    with torch.no_grad():
        for a, b in zip(tensors(static), tensors(changed), strict=True):
            a.copy_(b)
    for _ in range(2):
        graph.replay()
    assert_same([t.detach() for t in got], [t.detach() for t in expected], backend)


@pytest.mark.parametrize("case", ONE_EACH, ids=identify)
def test_order_of_a_stream(case: OperatorCase, backend: str, cuda: None) -> None:
    """Forward and backward follow what is under way on the current stream, which is not the default one."""
    arguments = make(case, usual(case), torch.float16, "cuda")
    expected = differentiate(case.fused, arguments)
    late = {k: each(v, torch.zeros_like) for k, v in arguments.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about 0.1 s
        for a, b in zip(tensors(late), tensors(arguments), strict=True):
            a.copy_(b)
        got = differentiate(case.fused, late)
        busy = not stream.query()
    stream.synchronize()
    assert busy, "the calls waited for the GPU"
    assert_same(got, expected, backend)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("case", ONE_EACH, ids=identify)
def test_other_than_the_current_device(case: OperatorCase, backend: str, cuda: None) -> None:
    arguments = make(case, usual(case), torch.float16, "cuda:1")
    assert torch.cuda.current_device() == 0
    check_call(case, arguments, "float16", backend)
    got = differentiate(case.fused, arguments)
    assert all(t.device == torch.device("cuda:1") for t in got)
    assert torch.cuda.current_device() == 0
    there = differentiate(case.fused, {k: each(v, lambda t: t.to("cuda:0")) for k, v in arguments.items()})
    assert_same([t.cpu() for t in got], [t.cpu() for t in there], backend)
