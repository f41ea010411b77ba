"""The native CPU engine against float64 PyTorch, driven through `torch.ops.esr_native` itself."""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esr_kernels import native

_REASON = native.load()
pytestmark = pytest.mark.skipif(_REASON is not None, reason=f"native library: {_REASON}")

ACTIVATIONS = ("none", "relu", "leaky_relu", "silu", "gelu", "gelu_tanh")
MODES = ("pre", "post", "attention")
SIZES = ((1, 1), (1, 7), (2, 5), (5, 1), (17, 23), (33, 47))
CHANNELS = (1, 2, 3, 4, 8, 9, 12, 16, 20, 21, 24, 26, 28, 30, 32, 36, 37, 38, 40, 44, 46, 48, 52, 60, 64, 84)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SLOPE = 0.07
DIRECT, WINOGRAD = 1e-5, 1e-4


class Program:
    """Collects layers, weights and constants; `run` compiles, executes into NaN-filled outputs and releases."""

    def __init__(self, inputs: int = 1) -> None:
        self.inputs = inputs
        self.records: list[list[int]] = []
        self.weights: list[Tensor] = []
        self.constants: list[float] = [SLOPE]

    def weight(self, w: Tensor | None) -> int:
        if w is None:
            return -1
        self.weights.append(w)
        return len(self.weights) - 1

    def layer(self, op: int, *integers: int) -> int:
        self.records.append([op, len(integers), *integers])
        return self.inputs + len(self.records) - 1

    def normalize(self, x: int, shift: Sequence[float], scale: Sequence[float]) -> int:
        first = len(self.constants)
        self.constants += [*shift, *scale]
        return self.layer(0, x, len(shift), first)

    def conv3x3(
        self, x: int, w: Tensor, b: Tensor | None = None, activation: str = "none", residual: int = -1,
        mode: str = "post",
    ) -> int:  # fmt: skip
        indices = self.weight(w), self.weight(b)
        return self.layer(1, x, *indices, ACTIVATIONS.index(activation), 0, residual, MODES.index(mode))

    def conv1x1(
        self, xs: Sequence[int], w: Tensor, b: Tensor | None = None, activation: str = "none", residual: int = -1,
        mode: str = "post",
    ) -> int:  # fmt: skip
        epilogue = ACTIVATIONS.index(activation), 0, residual, MODES.index(mode)
        return self.layer(2, len(xs), *xs, self.weight(w), self.weight(b), *epilogue)

    def shuffle(self, x: int, w: Tensor, b: Tensor | None, factor: int, residual: int = -1) -> int:
        return self.layer(3, x, self.weight(w), self.weight(b), factor, residual)

    def esa(self, x: int, weights: Sequence[Tensor | None]) -> int:
        return self.layer(4, x, *(self.weight(w) for w in weights))

    def bsconv(
        self, x: int, w: Tensor, d: Tensor, b: Tensor | None, reflect: bool, activation: str, residual: int = -1,
        mode: str = "post",
    ) -> int:  # fmt: skip
        indices = self.weight(w), self.weight(d), self.weight(b)
        return self.layer(5, x, *indices, int(reflect), ACTIVATIONS.index(activation), 0, residual, MODES.index(mode))

    def add(self, a: int, b: int) -> int:
        return self.layer(6, a, b)

    def multiply(self, a: int, b: int) -> int:
        return self.layer(7, a, b)

    def depthwise_conv(
        self, x: int, w: Tensor, b: Tensor | None = None, dilation: int = 1, gated: bool = False,
        activation: str = "none",
    ) -> int:  # fmt: skip
        indices = self.weight(w), self.weight(b)
        return self.layer(9, x, *indices, dilation, int(gated), ACTIVATIONS.index(activation), 0)

    def layer_norm2d(self, x: int, channels: int, w: Tensor | None, b: Tensor | None, eps: float) -> int:
        self.constants.append(eps)
        return self.layer(10, x, self.weight(w), self.weight(b), channels, len(self.constants) - 1)

    def slice(self, x: int, start: int, channels: int) -> int:
        return self.layer(11, x, start, channels)

    def code(self, *outputs: int) -> list[int]:
        layers = [integer for record in self.records for integer in record]
        return [2, self.inputs, len(self.records), len(outputs), *layers, *outputs]

    def compile(self, *outputs: int) -> int:
        return torch.ops.esr_native.compile_plan(self.code(*outputs), self.constants, self.weights)

    def run(self, inputs: Sequence[Tensor], outputs: dict[int, tuple[int, ...]], **options: Any) -> list[Tensor]:
        targets = [nan(shape, **options) for shape in outputs.values()]
        handle = self.compile(*outputs)
        torch.ops.esr_native.execute_plan(handle, list(inputs), targets)
        torch.ops.esr_native.release_plan(handle)
        return targets


def nan(shape: Sequence[int], dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    """An output [N, C, H, W] full of NaN: whatever is not written shows."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(*shape, dtype=dtype, memory_format=memory_format).fill_(float("nan"))


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    before, threads = torch.ops.esr_native.get_cpu_capability(), torch.get_num_threads()
    torch.manual_seed(0)
    # Small images: threads would mostly wait for each other. The tests about threads set their number.
    torch.set_num_threads(1)
    yield
    torch.ops.esr_native.set_cpu_capability(before)
    torch.set_num_threads(threads)


def capabilities() -> list[str]:
    if _REASON is not None:
        return ["plain"]
    found = []
    before = torch.ops.esr_native.get_cpu_capability()
    for name in ("amx", "avx512", "avx2", "plain"):
        try:
            torch.ops.esr_native.set_cpu_capability(name)
        except RuntimeError:
            continue
        found.append(name)
    torch.ops.esr_native.set_cpu_capability(before)
    return found


@pytest.fixture(params=capabilities())
def capability(request: pytest.FixtureRequest) -> str:
    torch.ops.esr_native.set_cpu_capability(request.param)
    return request.param


def conv_weight(cout: int, cin: int, k: int) -> Tensor:
    return torch.randn(cout, cin, k, k) / (cin * k * k) ** 0.5


def activate(h: Tensor, activation: str) -> Tensor:
    functions = {
        "none": lambda x: x,
        "relu": F.relu,
        "leaky_relu": lambda x: F.leaky_relu(x, SLOPE),
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }
    return functions[activation](h)


def conv3x3_reference(
    x: Tensor, w: Tensor, b: Tensor | None, activation: str = "none", r: Tensor | None = None, mode: str = "post"
) -> Tensor:
    h = F.conv2d(x.double(), w.double(), None if b is None else b.double(), padding=1)
    if r is None:
        return activate(h, activation)
    if mode == "pre":
        return activate(h + r.double(), activation)
    if mode == "post":
        return activate(h, activation) + r.double()
    return (h + r.double()) * (torch.sigmoid(h) - 0.5)


def error(got: Tensor, want: Tensor) -> float:
    """Largest error relative to the largest value; NaN counts as infinite."""
    difference = (got.double() - want).abs()
    if not bool(torch.isfinite(difference).all()):
        return float("inf")
    return float(difference.max() / want.abs().max().clamp_min(1e-6))


def tolerance(cin: int, cout: int) -> float:
    return WINOGRAD if min(cin, cout) >= 16 else DIRECT


# ---------------------------------------------------------------------------------------------------- conv3x3


@pytest.mark.parametrize("winograd", ["0", "1"])
@pytest.mark.parametrize("pair", range(0, len(CHANNELS), 2))
def test_conv3x3_channels(capability: str, pair: int, winograd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESR_KERNELS_CPU_WINOGRAD", winograd)
    for i, (cin, cout) in enumerate(
        [(CHANNELS[pair], CHANNELS[pair]), (CHANNELS[pair + 1], CHANNELS[-1 - pair]), (CHANNELS[-1 - pair], 3)]
    ):
        x, w, b = torch.randn(1, cin, 9 + i, 27 - i), conv_weight(cout, cin, 3), torch.randn(cout)
        p = Program()
        (y,) = p.run([x], {p.conv3x3(0, w, b, "silu"): (1, cout, 9 + i, 27 - i)})
        limit = tolerance(cin, cout) if winograd == "1" else DIRECT
        assert error(y, conv3x3_reference(x, w, b, "silu")) < limit


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("channels", [(3, 28), (28, 28), (5, 7)])
def test_conv3x3_sizes(capability: str, size: tuple[int, int], batch: int, channels: tuple[int, int]) -> None:
    cin, cout = channels
    x, r = torch.randn(batch, cin, *size), torch.randn(batch, cout, *size)
    w = conv_weight(cout, cin, 3)
    p = Program(2)
    (y,) = p.run([x, r], {p.conv3x3(0, w, None, "leaky_relu", 1, "pre"): (batch, cout, *size)})
    if batch:
        assert error(y, conv3x3_reference(x, w, None, "leaky_relu", r, "pre")) < tolerance(cin, cout)


EVERY_SIZE = [(height, width) for height in range(1, 41) for width in range(1, 41)]
# Over the ends of a block of Winograd tiles, and of two.
WIDE = [(height, width) for height in (1, 4, 5) for width in range(41, 110)]


@pytest.mark.parametrize("sizes", [EVERY_SIZE, WIDE], ids=["up to 40 x 40", "wide"])
@pytest.mark.parametrize("channels", [(16, 17), (5, 7)], ids=["winograd", "direct"])
def test_conv3x3_every_size(capability: str, channels: tuple[int, int], sizes: list[tuple[int, int]]) -> None:
    cin, cout = channels
    w, b = conv_weight(cout, cin, 3), torch.randn(cout)
    p = Program(2)
    handle = p.compile(p.conv3x3(0, w, b, residual=1, mode="attention"))
    for i, (height, width) in enumerate(sizes):
        x, r = torch.randn(1, cin, height, width), torch.randn(1, cout, height, width)
        y = nan((1, cout, height, width), channels_last=bool(i % 2))
        torch.ops.esr_native.execute_plan(handle, [x, r], [y])
        want = conv3x3_reference(x, w, b, r=r, mode="attention")
        assert error(y, want) < tolerance(cin, cout), (height, width)
    torch.ops.esr_native.release_plan(handle)


@pytest.mark.parametrize("channels", [(4, 20), (28, 28), (48, 46)])
def test_conv3x3_epilogues(capability: str, channels: tuple[int, int]) -> None:
    cin, cout = channels
    x, r = 2 * torch.randn(2, cin, 11, 13), torch.randn(2, cout, 11, 13)
    w, b = 2 * conv_weight(cout, cin, 3), torch.randn(cout)
    for activation in ACTIVATIONS:
        for mode in (None, "pre", "post", "attention"):
            if mode == "attention" and activation != "none":
                continue
            p = Program(2)
            out = p.conv3x3(0, w, b, activation, -1 if mode is None else 1, mode or "post")
            (y,) = p.run([x, r], {out: (2, cout, 11, 13)})
            want = conv3x3_reference(x, w, b, activation, None if mode is None else r, mode or "post")
            assert error(y, want) < tolerance(cin, cout), (activation, mode)


def test_attention_of_its_own_input(capability: str) -> None:
    x, w, b = torch.randn(1, 28, 19, 22), conv_weight(28, 28, 3), torch.randn(28)
    p = Program()
    (y,) = p.run([x], {p.conv3x3(0, w, b, residual=0, mode="attention"): (1, 28, 19, 22)})
    assert error(y, conv3x3_reference(x, w, b, r=x, mode="attention")) < WINOGRAD


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_the_whole_range(capability: str, activation: str) -> None:
    values = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([-1e30, -1e4, -127.0, -90, -88, 88, 90, 127, 1e4])])
    values = torch.cat([values, torch.logspace(-30, 0, 200), -torch.logspace(-30, 0, 200)])
    x = values.view(1, 1, 1, -1)
    p = Program()
    (y,) = p.run([x], {p.conv1x1([0], torch.ones(1, 1, 1, 1), None, activation): tuple(x.shape)})
    want = activate(x.double(), activation)
    assert bool(torch.isfinite(y).all())
    # The exact GELU is good to 1e-7 of x, also where it is almost 0; the others relative to themselves.
    scale = want.abs() + (x.abs().clamp(max=8) * 0.1 + 1e-30 if activation == "gelu" else 1e-3)
    assert float(((y.double() - want).abs() / scale).max()) < 2e-6


def test_attention_saturates(capability: str) -> None:
    x = torch.tensor([-1e30, -1e5, -100.0, 0, 100, 1e5, 1e30]).view(1, 1, 1, 7)
    r = torch.ones(1, 1, 1, 7)
    w = torch.zeros(1, 1, 3, 3)
    w[0, 0, 1, 1] = 1
    p = Program(2)
    (y,) = p.run([x, r], {p.conv3x3(0, w, None, residual=1, mode="attention"): (1, 1, 1, 7)})
    torch.testing.assert_close(y.double(), conv3x3_reference(x, w, None, r=r, mode="attention"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_where_it_is(capability: str, activation: str) -> None:
    x = torch.randn(1, 3, 9, 40)
    x[0, 1, 4, 20] = float("nan")
    w = conv_weight(5, 3, 3)
    p = Program()
    first = p.conv3x3(0, w, None, activation)
    (y,) = p.run([x], {p.conv1x1([first], conv_weight(6, 5, 1), None): (1, 6, 9, 40)})
    reached = torch.zeros(9, 40, dtype=torch.bool)
    reached[3:6, 19:22] = True
    assert torch.equal(torch.isnan(y[0]), reached.expand(6, 9, 40))


def test_range_of_span(capability: str) -> None:
    x, w, b = (torch.rand(1, 28, 30, 41) * 2 - 1) * 127, torch.randn(28, 28, 3, 3), torch.randn(28)
    for dtype in DTYPES:
        p = Program()
        (y,) = p.run([x.to(dtype)], {p.conv3x3(0, w, b): (1, 28, 30, 41)})
        assert error(y, conv3x3_reference(x.to(dtype), w, b)) < WINOGRAD


# ------------------------------------------------------------------------------------- strides, dtypes, boundaries


def layouts(shape: tuple[int, int, int, int]) -> dict[str, Tensor]:
    n, c, h, w = shape
    return {
        "contiguous": torch.randn(shape),
        "channels_last": torch.randn(shape).to(memory_format=torch.channels_last),
        "permuted": torch.randn(h, n, w, c).permute(1, 3, 0, 2),
        "transposed": torch.randn(n, c, w, h).transpose(2, 3),
        "sliced": torch.randn(n, c + 3, 2 * h, 3 * w)[:, 2 : 2 + c, ::2, 1::3],
        "sliced_channels_last": torch.randn(n, h, w, c + 5).permute(0, 3, 1, 2)[:, 1 : 1 + c],
        "expanded": torch.randn(n, c, 1, 1).expand(shape),
        "expanded_channels": torch.randn(n, 1, h, w).expand(shape),
    }


@pytest.mark.parametrize("channels", [3, 8, 28])
@pytest.mark.parametrize("dtype", DTYPES)
def test_input_strides(capability: str, channels: int, dtype: torch.dtype) -> None:
    shape = (2, channels, 11, 21)
    w = conv_weight(6, channels, 1)
    for name, tensor in layouts(shape).items():
        x = tensor.to(dtype)
        assert x.stride() == tensor.stride() or "expanded" in name or "sliced" in name or "permuted" in name
        strided = torch.empty_strided(shape, tensor.stride(), dtype=dtype) if "sliced" in name else x
        strided.copy_(x) if "sliced" in name else None
        p = Program()
        (y,) = p.run([strided], {p.conv1x1([0], w): (2, 6, 11, 21)})
        assert error(y, F.conv2d(strided.double(), w.double())) < DIRECT, name


@pytest.mark.parametrize("channels", [3, 8, 28])
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_strides(capability: str, channels: int, dtype: torch.dtype) -> None:
    """Every layout gets the bits that the float32 result rounds to, and nothing beside them is touched."""
    shape = (2, channels, 11, 21)
    x, w = torch.randn(2, 4, 11, 21), conv_weight(channels, 4, 3)
    p = Program()
    out = p.conv3x3(0, w)
    (want,) = p.run([x], {out: shape})
    handle = p.compile(out)
    base = torch.full((2, channels + 2, 24, 66), float("nan"), dtype=dtype)
    targets = {
        "contiguous": nan(shape, dtype),
        "channels_last": nan(shape, dtype, channels_last=True),
        "permuted": nan((11, 2, 21, channels), dtype).permute(1, 3, 0, 2),
        "transposed": nan((2, channels, 21, 11), dtype).transpose(2, 3),
        "sliced": base[:, 1 : 1 + channels, 1:23:2, ::3][..., :21],
    }
    for name, target in targets.items():
        torch.ops.esr_native.execute_plan(handle, [x], [target])
        assert torch.equal(target, want.to(dtype)), name
    torch.ops.esr_native.release_plan(handle)
    assert int(torch.isfinite(base).sum()) == want.numel()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_are_exact(capability: str, dtype: torch.dtype) -> None:
    """All 65536 patterns in; all of them, their neighbours and their midpoints out."""
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    x = patterns.view(1, 1, 256, 256)
    p = Program()
    (y,) = p.run([x], {p.add(0, p.conv1x1([0], torch.zeros(1, 1, 1, 1))): (1, 1, 256, 256)})
    finite = torch.isfinite(x)
    assert torch.equal(y[finite], x[finite].float())
    exact = patterns[torch.isfinite(patterns)].float().sort().values.unique()
    middle = (exact[1:] + exact[:-1]) / 2
    values = torch.cat([exact, middle, torch.nextafter(middle, exact[1:]), torch.nextafter(middle, exact[:-1])])
    values = torch.cat([values, torch.tensor([65519.0, 65520.0, 1e10, -1e10, 3.4e38, float("inf"), -float("inf")])])
    values = values[: values.numel() // 8 * 8].view(1, 1, 8, -1)
    p = Program()
    (z,) = p.run([values], {p.conv1x1([0], torch.ones(1, 1, 1, 1)): tuple(values.shape)}, dtype=dtype)
    assert torch.equal(z, values.to(dtype))


def test_values_and_inputs_as_outputs(capability: str) -> None:
    x, w1, w2 = torch.randn(2, 5, 9, 14), conv_weight(7, 5, 3), conv_weight(4, 7, 3)
    p = Program()
    a = p.conv3x3(0, w1, None, "relu")
    b = p.conv3x3(a, w2)
    ya, yb, yx = p.run([x], {a: (2, 7, 9, 14), b: (2, 4, 9, 14), 0: (2, 5, 9, 14)})
    want = conv3x3_reference(x, w1, None, "relu")
    assert error(ya, want) < DIRECT
    assert error(yb, conv3x3_reference(want, w2, None)) < DIRECT
    assert torch.equal(yx, x)


def test_normalize_is_what_gets_padded(capability: str) -> None:
    x, w = torch.rand(1, 3, 12, 19), conv_weight(9, 3, 3)
    shift, scale = [0.4488, 0.4371, 0.4040], [255.0, 254.0, 253.0]
    p = Program()
    n = p.normalize(0, shift, scale)
    y, z = p.run([x], {p.conv3x3(n, w): (1, 9, 12, 19), p.add(n, 0): (1, 3, 12, 19)})
    normalized = (x.double() - torch.tensor(shift).view(1, 3, 1, 1)) * torch.tensor(scale).view(1, 3, 1, 1)
    assert error(y, conv3x3_reference(normalized, w, None)) < DIRECT
    assert error(z, normalized + x) < DIRECT


def test_normalize_of_a_layer(capability: str) -> None:
    x, w = torch.rand(1, 3, 6, 7), conv_weight(17, 3, 1)
    shift, scale = torch.randn(17), torch.randn(17)
    p = Program()
    (y,) = p.run([x], {p.normalize(p.conv1x1([0], w), shift.tolist(), scale.tolist()): (1, 17, 6, 7)})
    want = (F.conv2d(x.double(), w.double()) - shift.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)
    assert error(y, want) < DIRECT


# --------------------------------------------------------------------------------------------- the other operators


@pytest.mark.parametrize("split", [(3,), (28, 28, 28, 28), (1, 2, 3), (5, 16, 9, 33), (36,) * 6, (1,) * 64])
def test_conv1x1(capability: str, split: tuple[int, ...]) -> None:
    for size, cout, activation in (((1, 1), 3, "none"), ((9, 14), 28, "gelu"), ((7, 23), 37, "leaky_relu")):
        xs = [torch.randn(2, c, *size) for c in split]
        w, b = conv_weight(cout, sum(split), 1), torch.randn(cout)
        p = Program(len(xs))
        out = p.conv1x1(list(range(len(xs))), w, b, activation)
        (y,) = p.run(xs, {out: (2, cout, *size)})
        want = activate(F.conv2d(torch.cat(xs, 1).double(), w.double(), b.double()), activation)
        assert error(y, want) < DIRECT


@pytest.mark.parametrize(
    ("size", "cout", "activation"), [((1, 1), 3, "none"), ((8, 8), 28, "gelu"), ((7, 23), 37, "relu")]
)
@pytest.mark.parametrize("mode", ["", "pre", "post"])
@pytest.mark.parametrize("split", [(1,), (28,), (9, 16, 3), (256,), (255, 2)])
def test_conv1x1_of_planes_has_the_bits_of_the_internal_layout(
    capability: str, split: tuple[int, ...], mode: str, size: tuple[int, int], cout: int, activation: str
) -> None:
    """Images in planes are computed where they are; up to 256 channels, and anything else in the internal layout."""
    xs = [torch.randn(2, c + 2, *size)[:, 1:-1] for c in split]  # planes, but not images, lie together
    residual = torch.randn(2, cout, *size)
    w, b = conv_weight(cout, sum(split), 1), torch.randn(cout)

    def result(layout: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
        p = Program(len(xs) + 1)
        epilogue = (len(xs), mode) if mode else ()
        out = p.conv1x1(list(range(len(xs))), w, b, activation, *epilogue)
        return p.run([layout(t) for t in (*xs, residual)], {out: (2, cout, *size)}, **options)[0]

    planes = result(lambda t: t)
    inner = result(lambda t: t.contiguous(memory_format=torch.channels_last), channels_last=True)
    assert torch.equal(planes, inner)
    # Rows that do not follow one another are no planes.
    assert torch.equal(planes, result(lambda t: F.pad(t, (1, 2))[..., 1:-2]))
    want = F.conv2d(torch.cat(xs, 1).double(), w.double(), b.double())
    want = activate(want + residual if mode == "pre" else want, activation)
    assert error(planes, want + residual if mode == "post" else want) < DIRECT


def test_conv1x1_of_planes_in_any_number_of_threads(capability: str) -> None:
    x, w = torch.randn(1, 24, 97, 131), conv_weight(31, 24, 1)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        p = Program()
        results += p.run([x], {p.conv1x1([0], w): (1, 31, 97, 131)})
    assert all(torch.equal(r, results[0]) for r in results)
    assert error(results[0], F.conv2d(x.double(), w.double())) < DIRECT


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("cin", [3, 28])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pixel_shuffle(capability: str, factor: int, cin: int, dtype: torch.dtype) -> None:
    for n, (h, w_) in ((1, (1, 1)), (2, (9, 14)), (1, (13, 37))):
        x, w, b = torch.randn(n, cin, h, w_), conv_weight(3 * factor**2, cin, 3), torch.randn(3 * factor**2)
        r = torch.randn(n, 3, h * factor, w_ * factor)
        shape = (n, 3, h * factor, w_ * factor)
        plain = F.pixel_shuffle(conv3x3_reference(x, w, b), factor)
        for channels_last in (False, True):
            p = Program(2)
            (y,) = p.run(
                [x, r.to(dtype)], {p.shuffle(0, w, b, factor, 1): shape}, dtype=dtype, channels_last=channels_last
            )
            assert error(y, plain + r.to(dtype).double()) < tolerance(cin, 3 * factor**2) + torch.finfo(dtype).eps
        p = Program()
        (y,) = p.run([x], {p.shuffle(0, w, b, factor): shape})
        assert error(y, plain) < tolerance(cin, 3 * factor**2)


def test_pixel_shuffle_residual_from_a_layer(capability: str) -> None:
    x, w = torch.randn(1, 8, 6, 7), conv_weight(12, 8, 3)
    large, w1 = torch.randn(1, 5, 12, 14), conv_weight(3, 5, 1)
    p = Program(2)
    (y,) = p.run([x, large], {p.shuffle(0, w, None, 2, p.conv1x1([1], w1)): (1, 3, 12, 14)})
    want = F.pixel_shuffle(conv3x3_reference(x, w, None), 2) + F.conv2d(large.double(), w1.double())
    assert error(y, want) < DIRECT


def esa_weights(n: int, f: int, form: str) -> list[Tensor | None]:
    def pair(cout: int, cin: int, k: int) -> list[Tensor | None]:
        return [2 * conv_weight(cout, cin, k), 0.3 * torch.randn(cout)]

    none: list[Tensor | None] = [None, None]
    weights = pair(f, n, 1) + pair(f, f, 3) + pair(f, f, 3) + pair(n, f, 1)
    weights += none if form == "skip" else pair(f, f, 1)
    return weights + (pair(f, f, 3) + pair(f, f, 3) if form == "rfdn" else none + none)


def esa_reference(x: Tensor, weights: Sequence[Tensor | None], form: str) -> Tensor:
    w: list[Any] = [None if t is None else t.double() for t in weights]
    x = x.double()
    c1 = F.conv2d(x, w[0], w[1])
    y = F.max_pool2d(F.conv2d(c1, w[2], w[3], stride=2), 7, 3)
    if form == "rfdn":
        y = F.relu(F.conv2d(y, w[10], w[11], padding=1))
        y = F.relu(F.conv2d(y, w[4], w[5], padding=1))
        y = F.conv2d(y, w[12], w[13], padding=1)
    else:
        y = F.conv2d(y, w[4], w[5], padding=1)
    y = F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)
    y = y + (c1 if w[8] is None else F.conv2d(c1, w[8], w[9]))
    return x * torch.sigmoid(F.conv2d(y, w[6], w[7]))


@pytest.mark.parametrize("form", ["full", "skip", "rfdn"])
def test_esa(capability: str, form: str) -> None:
    for n, f, size in ((46, 16, (33, 47)), (50, 12, (15, 15)), (84, 21, (16, 61)), (5, 3, (40, 17))):
        x, weights = torch.randn(2, n, *size), esa_weights(n, f, form)
        p = Program()
        (y,) = p.run([x], {p.esa(0, weights): (2, n, *size)})
        assert error(y, esa_reference(x, weights, form)) < DIRECT, (n, f, size)


def test_esa_of_a_small_image(capability: str) -> None:
    for size in ((14, 20), (20, 14), (1, 1)):
        p = Program()
        out = p.esa(0, esa_weights(6, 4, "full"))
        with pytest.raises(RuntimeError, match="ESA needs 15 pixels a side"):
            p.run([torch.randn(1, 6, *size)], {out: (1, 6, *size)})


@pytest.mark.parametrize("reflect", [False, True])
def test_bsconv(capability: str, reflect: bool) -> None:
    for cin, cout, size in ((3, 5, (2, 2)), (36, 36, (17, 23)), (28, 48, (5, 2)), (16, 9, (33, 47)), (4, 4, (1, 6))):
        if reflect and min(size) < 2:
            continue
        x, w, d, b = (
            torch.randn(2, cin, *size),
            conv_weight(cout, cin, 1),
            torch.randn(cout, 1, 3, 3),
            torch.randn(cout),
        )
        h = F.conv2d(x.double(), w.double())
        h = F.pad(h, (1, 1, 1, 1), mode="reflect" if reflect else "constant")
        for bias, activation in ((None, "none"), (b, "gelu"), (b, "leaky_relu")):
            p = Program()
            (y,) = p.run([x], {p.bsconv(0, w, d, bias, reflect, activation): (2, cout, *size)})
            want = F.conv2d(h, d.double(), None if bias is None else bias.double(), groups=cout)
            assert error(y, activate(want, activation)) < DIRECT


def test_bsconv_cannot_reflect_one_pixel(capability: str) -> None:
    p = Program()
    out = p.bsconv(0, conv_weight(4, 4, 1), torch.randn(4, 1, 3, 3), None, True, "none")
    with pytest.raises(RuntimeError, match="reflect padding needs 2 pixels"):
        p.run([torch.randn(1, 4, 1, 6)], {out: (1, 4, 1, 6)})


def depthwise_reference(x: Tensor, w: Tensor, b: Tensor | None, dilation: int, gated: bool, activation: str) -> Tensor:
    padding = [dilation * (k // 2) for k in w.shape[2:]]
    bias = None if b is None else b.double()
    h = F.conv2d(x, w.double(), bias, padding=padding, dilation=dilation, groups=w.shape[0])
    if not gated:
        return activate(h, activation)
    first, second = h.chunk(2, 1)
    return activate(first, activation) * second


def norm_reference(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
    parameters = (None if t is None else t.double() for t in (w, b))
    return F.layer_norm(x.permute(0, 2, 3, 1), [x.shape[1]], *parameters, eps=eps).permute(0, 3, 1, 2)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sides", [(1, 1), (3, 3), (5, 3), (1, 7), (7, 7)])
def test_depthwise_conv(capability: str, sides: tuple[int, int], gated: bool) -> None:
    """Every channel count of a last vector, taps beyond the image on every side, every activation."""
    for i, (cout, size) in enumerate(itertools.product((1, 4, 9, 16, 21, 40), SIZES)):
        cin, dilation, activation = cout * (1 + gated), 1 + i % 3, ACTIVATIONS[i % len(ACTIVATIONS)]
        x, w = torch.randn(2, cin, *size), torch.randn(cin, 1, *sides) / 3
        b = torch.randn(cin) if i % 2 else None
        p = Program()
        (y,) = p.run([x], {p.depthwise_conv(0, w, b, dilation, gated, activation): (2, cout, *size)})
        assert error(y, depthwise_reference(x.double(), w, b, dilation, gated, activation)) < DIRECT, (cout, size)


@pytest.mark.parametrize("channels", [2, 7, 16, 24, 37])
def test_layer_norm2d(capability: str, channels: int) -> None:
    for size in SIZES:
        x, w, b = torch.randn(2, channels, *size), torch.randn(channels), torch.randn(channels)
        p = Program()
        n = p.layer_norm2d(0, channels, w, b, 0.1)
        # In place, of a map that a layer has made.
        values = [n, p.layer_norm2d(p.add(n, n), channels, None, b, 1e-2)]
        once, twice = p.run([x], dict.fromkeys(values, (2, channels, *size)))
        exact = norm_reference(x.double(), w, b, 0.1)
        assert error(once, exact) < DIRECT
        assert error(twice, norm_reference(2 * exact, None, b, 1e-2)) < DIRECT


@pytest.mark.parametrize("layout", ["planes", "channels_last", "map"])
def test_rows_of_a_1x1_convolution_for_a_depthwise_one(capability: str, layout: str) -> None:
    """Computed as they are needed, they have the bits of a map, in any number of threads."""

    def run(x: Tensor, weights: Sequence[Tensor], dilation: int, gated: bool, whole: bool) -> Tensor:
        w, b, d, c = weights
        p = Program()
        h = p.conv1x1([p.add(0, 0) if layout == "map" else 0], w, b, "silu")
        y = p.depthwise_conv(h, d, c, dilation, gated, "gelu")
        shapes = {y: (2, 21 if gated else 42, *x.shape[2:]), h: (2, 42, *x.shape[2:])}
        return p.run([x], shapes if whole else {y: shapes[y]})[0]

    cases = ((5, 3), 1, True, (97, 65)), ((3, 3), 4, False, (70, 33)), ((7, 7), 1, True, (2, 19))
    for sides, dilation, gated, size in cases:
        x, w, b = torch.randn(2, 20, *size), conv_weight(42, 20, 1), torch.randn(42)
        x = x.to(memory_format=torch.channels_last) if layout == "channels_last" else x
        d, c = torch.randn(42, 1, *sides) / 3, torch.randn(42)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [run(x, (w, b, d, c), dilation, gated, whole) for whole in (False, True)]
        source = (2 if layout == "map" else 1) * x.double()
        h = activate(F.conv2d(source, w.double(), b.double()), "silu")
        assert error(results[0], depthwise_reference(h, d, c, dilation, gated, "gelu")) < DIRECT
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("channels", [1, 3, 16, 37])
def test_add(capability: str, channels: int) -> None:
    a, b = torch.randn(3, channels, 5, 9), torch.randn(3, channels, 5, 9).to(memory_format=torch.channels_last)
    p = Program(2)
    y, twice = p.run([a, b], {p.add(0, 1): tuple(a.shape), p.add(0, 0): tuple(a.shape)})
    assert torch.equal(y, a + b)
    assert torch.equal(twice, a + a)


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("channels", [1, 3, 16, 37])
def test_statistics(capability: str, kind: int, channels: int) -> None:
    """Added to every pixel: rows of several blocks, the same bits for any number of threads and images."""
    x, a = torch.randn(2, channels, 37, 301) + 3, torch.randn(2, channels, 37, 301)
    variance = x.double().var((2, 3), correction=1, keepdim=True)
    mean = x.double().mean((2, 3), keepdim=True)
    exact = (mean, variance, variance.sqrt(), variance.sqrt() + mean, x.double().amax((2, 3), keepdim=True))[kind]
    p = Program(2)
    out = p.add(0, p.layer(15, 1, kind, 1))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results += p.run([a, x], {out: tuple(a.shape)})
    assert error(results[0], exact + a) < 3e-7
    assert all(torch.equal(results[0], other) for other in results[1:])
    for n in range(2):
        (single,) = p.run([a[n : n + 1], x[n : n + 1]], {out: (1, *a.shape[1:])})
        assert torch.equal(single, results[0][n : n + 1])


@pytest.mark.parametrize("channels", [3, 16, 37])
def test_one_pixel_of_one_channel_is_added_to_all(capability: str, channels: int) -> None:
    x, w, y = torch.randn(2, channels, 9, 11), conv_weight(1, channels, 1), conv_weight(5, channels, 3)
    p = Program()
    total = p.add(0, p.conv1x1([p.layer(15, 0, 0, 0)], w))
    got, read = p.run([x], {total: tuple(x.shape), p.conv3x3(total, y): (2, 5, 9, 11)})
    exact = x.double() + F.conv2d(x.double().mean((2, 3), keepdim=True), w.double())
    assert error(got, exact) < 3e-7
    # The channels that fill up a vector are zeros still.
    assert error(read, F.conv2d(exact, y.double(), padding=1)) < DIRECT


@pytest.mark.parametrize("seed", range(16))
def test_maps_are_used_again_only_when_nobody_reads_them(capability: str, seed: int) -> None:
    """Layers that read any values before them, of which some are returned: results may lie where inputs did, and runs
    of layers go over the image strip by strip, most of their maps being no more than a strip."""
    choose = random.Random(seed)
    size = [(17, 22), (83, 41)][seed % 2]
    torch.set_num_threads(1 + seed % 3)
    inputs = [torch.randn(2, 16, *size) for _ in range(2)]
    p = Program(2)
    want = [x.double() for x in inputs]
    numbers = [0, 1]  # of the values
    kinds = ["add", "multiply", "esa", "conv1x1", "conv3x3", "conv3x3", "depthwise", "norm", "parts", "depthwise part"]
    for _ in range(12):
        a, b = (choose.randrange(len(want)) for _ in range(2))
        kind = choose.choice(kinds)
        if kind == "add":
            p.add(numbers[a], numbers[b])
            result = want[a] + want[b]
        elif kind == "multiply":
            p.multiply(numbers[a], numbers[b])
            result = want[a] * want[b]
        elif kind == "esa":
            weights = esa_weights(16, 4, "full")
            p.esa(numbers[a], weights)
            result = esa_reference(want[a], weights, "full")
        elif kind == "conv1x1":
            w = conv_weight(16, 32, 1)
            p.conv1x1([numbers[a], numbers[b]], w)
            result = F.conv2d(torch.cat([want[a], want[b]], 1), w.double())
        elif kind == "depthwise":
            # Of a 1x1 convolution that nobody else reads, and that is none of the values.
            w, d = conv_weight(16, 16, 1), torch.randn(16, 1, 3, 3) / 3
            p.depthwise_conv(p.conv1x1([numbers[a]], w, None, "none", numbers[b]), d)
            result = F.conv2d(F.conv2d(want[a], w.double()) + want[b], d.double(), padding=1, groups=16)
        elif kind == "parts":
            w, first = conv_weight(16, 12, 1), choose.randrange(12)
            p.conv1x1([p.slice(numbers[a], first, 5), p.slice(numbers[b], 9, 7)], w, None, "gelu")
            result = F.gelu(F.conv2d(torch.cat([want[a][:, first : first + 5], want[b][:, 9:]], 1), w.double()))
        elif kind == "depthwise part":
            w, d, first = conv_weight(16, 27, 1), torch.randn(11, 1, 5, 5) / 5, choose.randrange(6)
            part = p.depthwise_conv(p.slice(numbers[a], first, 11), d, None, 1 + first % 3)
            p.conv1x1([part, numbers[b]], w)
            part = depthwise_reference(want[a][:, first : first + 11], d, None, 1 + first % 3, False, "none")
            result = F.conv2d(torch.cat([part, want[b]], 1), w.double())
        elif kind == "norm":
            p.layer_norm2d(numbers[a], 16, None, None, 1e-2)
            result = norm_reference(want[a], None, None, 1e-2)
        else:
            w = conv_weight(16, 16, 3)
            p.conv3x3(numbers[a], w, None, "leaky_relu", numbers[b])
            result = conv3x3_reference(want[a], w, None, "leaky_relu", want[b])
        want.append(result)
        numbers.append(p.inputs + len(p.records) - 1)
    returned = sorted({len(want) - 1, *(choose.randrange(len(want)) for _ in range(2))})
    got = p.run(inputs, dict.fromkeys([numbers[v] for v in returned], (2, 16, *size)))
    for value, y in zip(returned, got, strict=True):
        assert error(y, want[value]) < WINOGRAD, value


@pytest.mark.parametrize("threads", [1, 3])
def test_a_map_that_is_read_beyond_the_strip_is_not_written_over(capability: str, threads: int) -> None:
    torch.set_num_threads(threads)
    x, w, d = torch.randn(1, 16, 83, 41), conv_weight(16, 16, 3), torch.randn(16, 1, 5, 5) / 5
    p = Program()
    h = p.conv3x3(0, w)
    total = p.add(p.depthwise_conv(h, d), h)
    (y,) = p.run([x], {p.conv3x3(total, w): tuple(x.shape)})
    exact = F.conv2d(x.double(), w.double(), padding=1)
    exact = exact + depthwise_reference(exact, d, None, 1, False, "none")
    assert error(y, F.conv2d(exact, w.double(), padding=1)) < WINOGRAD


@pytest.mark.parametrize("threads", [1, 3])
def test_an_input_that_a_late_layer_of_a_strip_reads(capability: str, threads: int) -> None:
    """Its strip is there from the start, where values that end before that layer may not lie."""
    torch.set_num_threads(threads)
    x, late = torch.randn(2, 1, 16, 83, 41).unbind()
    p = Program(2)
    value = p.add(0, 0)
    for _ in range(3):
        value = p.layer_norm2d(value, 16, None, None, 1.0)
    (y,) = p.run([x, late], {p.add(value, 1): tuple(x.shape)})
    exact = 2 * x.double()
    for _ in range(3):
        exact = norm_reference(exact, None, None, 1.0)
    assert error(y, exact + late) < DIRECT


# -------------------------------------------------------------------------------------------------------- networks


def span_like(channels: int = 28, blocks: int = 2) -> tuple[Program, int]:
    """SPAN with fewer blocks: one input [N, 3, H, W], one output [N, 3, 4 H, 4 W]."""
    p = Program()

    def conv(x: int, cin: int, cout: int, *rest: Any) -> int:
        return p.conv3x3(x, 1.5 * conv_weight(cout, cin, 3), 0.1 * torch.randn(cout), *rest)

    first = x = conv(p.normalize(0, [0.45, 0.44, 0.4], [255.0] * 3), 3, channels)
    for _ in range(blocks):
        mid = conv(x, channels, channels, "silu")
        x = conv(conv(mid, channels, channels, "silu"), channels, channels, "none", x, "attention")
    last = conv(x, channels, channels)
    joined = p.conv1x1([first, last, x, mid], conv_weight(channels, 4 * channels, 1), torch.randn(channels))
    return p, p.shuffle(joined, conv_weight(48, channels, 3), torch.randn(48), 4)


def span_reference(p: Program, x: Tensor, blocks: int = 2) -> Tensor:
    weights = iter([w.double() for w in p.weights])

    def conv(t: Tensor) -> Tensor:
        w, b = next(weights), next(weights)
        return F.conv2d(t, w, b, padding=w.shape[-1] // 2)

    first = x = conv((x.double() - torch.tensor([0.45, 0.44, 0.4], dtype=torch.float64).view(1, 3, 1, 1)) * 255)
    for _ in range(blocks):
        mid = F.silu(conv(x))
        h = conv(F.silu(conv(mid)))
        x = (h + x) * (torch.sigmoid(h) - 0.5)
    last = conv(x)
    return F.pixel_shuffle(conv(conv(torch.cat([first, last, x, mid], 1))), 4)


@pytest.mark.parametrize("channels", [26, 28, 46])
def test_network(capability: str, channels: int) -> None:
    p, out = span_like(channels)
    handle = p.compile(out)
    for n, h, w in ((1, 29, 38), (3, 8, 100), (1, 1, 1), (2, 64, 3)):
        x, y = torch.rand(n, 3, h, w), nan((n, 3, 4 * h, 4 * w))
        torch.ops.esr_native.execute_plan(handle, [x], [y])
        assert error(y, span_reference(p, x)) < WINOGRAD
    torch.ops.esr_native.release_plan(handle)


@pytest.mark.parametrize("winograd", ["0", "1"])
def test_threads_and_batches_do_not_change_bits(
    capability: str, winograd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESR_KERNELS_CPU_WINOGRAD", winograd)
    p, out = span_like()
    x = torch.rand(3, 3, 61, 77)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results += p.run([x], {out: (3, 3, 244, 308)})
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    for n in range(3):
        (single,) = p.run([x[n : n + 1]], {out: (1, 3, 244, 308)})
        assert torch.equal(single, results[0][n : n + 1])


@pytest.mark.parametrize("winograd", ["0", "1"])
def test_tiles_have_the_bits_of_the_whole(capability: str, winograd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Direct: the receptive field is enough. Winograd: cut at multiples of 4, with 4 pixels for each convolution."""
    monkeypatch.setenv("ESR_KERNELS_CPU_WINOGRAD", winograd)
    p, out = span_like(blocks=1)
    convolutions = 6
    halo, unit = (convolutions, 1) if winograd == "0" else (4 * convolutions, 4)
    h, w = 75, 98
    x = torch.rand(1, 3, h, w)
    (whole,) = p.run([x], {out: (1, 3, 4 * h, 4 * w)})
    for y0, x0, size in ((0, 0, 20), (28, 36, 24), (40, 60, 40), (60, 0, 16)):
        y0, x0 = y0 // unit * unit, x0 // unit * unit
        y1, x1 = min(y0 + size, h), min(x0 + size, w)
        top, left = max(0, y0 - halo), max(0, x0 - halo)
        tile = x[:, :, top : min(h, y1 + halo), left : min(w, x1 + halo)]
        (part,) = p.run([tile], {out: (1, 3, 4 * tile.shape[2], 4 * tile.shape[3])})
        kept = part[:, :, 4 * (y0 - top) : 4 * (y1 - top), 4 * (x0 - left) : 4 * (x1 - left)]
        assert torch.equal(kept, whole[:, :, 4 * y0 : 4 * y1, 4 * x0 : 4 * x1])


def test_workspaces_are_reused_and_released() -> None:
    p, out = span_like()
    handle = p.compile(out)
    x, y = torch.rand(1, 3, 40, 40), nan((1, 3, 160, 160))
    torch.ops.esr_native.release_workspaces()
    assert torch.ops.esr_native.workspace_bytes() == 0
    torch.set_num_threads(1)
    torch.ops.esr_native.execute_plan(handle, [x], [y])
    held = torch.ops.esr_native.workspace_bytes()
    assert held > 0
    for _ in range(3):
        torch.ops.esr_native.execute_plan(handle, [x], [y])
    assert torch.ops.esr_native.workspace_bytes() == held
    torch.ops.esr_native.release_workspaces()
    assert torch.ops.esr_native.workspace_bytes() == 0
    torch.ops.esr_native.release_plan(handle)


def _with_a_map_returned() -> tuple[Program, list[int]]:
    """Two inputs, the first of which is read by the first layer alone; a map and an image are returned."""
    p = Program(2)
    w = [conv_weight(16, 16, 3) for _ in range(6)]
    a = p.conv3x3(0, w[0])
    b = p.conv3x3(a, w[1], None, "silu")
    c = p.conv3x3(b, w[2], None, "none", 1)
    d = p.conv3x3(c, w[3], None, "relu", a)
    e = p.conv3x3(d, w[4], None, "none", a)
    return p, [d, p.shuffle(e, conv_weight(48, 16, 3), None, 4)]


@pytest.mark.parametrize("batch", [1, 2])
def test_maps_lie_in_outputs_and_in_spent_inputs(batch: int, capability: str) -> None:
    p, outputs = _with_a_map_returned()
    handle = p.compile(*outputs)
    assert torch.ops.esr_native.plan_spans(handle) == [0, 2, 3, 5, *[1] * 4]
    shapes = [(batch, 16, 262, 251), (batch, 3, 1048, 1004)]  # less is not worth looking at
    x = [torch.randn(shapes[0]) for _ in range(2)]
    kept = [t.clone() for t in x]

    def workspace(inputs: list[Tensor], results: list[Tensor], *memory: Any) -> int:
        torch.ops.esr_native.release_workspaces()
        if memory:
            torch.ops.esr_native.execute_plan_over(handle, inputs, results, *memory)
        else:
            torch.ops.esr_native.execute_plan(handle, inputs, results)
        return int(torch.ops.esr_native.workspace_bytes())

    # Memory with gaps, which may be somebody's, holds no maps.
    wanted = [nan((*shape[:3], shape[3] + 1))[..., :-1] for shape in shapes]
    most = workspace(x, wanted)
    got = [nan(shape) for shape in shapes]
    in_outputs = workspace(x, got)
    assert in_outputs < most
    assert all(map(torch.equal, got, wanted)) and all(map(torch.equal, x, kept))
    # What lies behind a tensor is somebody's.
    behind = [nan((t.numel() + (1 << 16),)) for t in wanted]
    got = [t[: w.numel()].view(w.shape) for t, w in zip(behind, wanted, strict=True)]
    assert workspace(x, got) == in_outputs
    assert all(map(torch.equal, got, wanted))
    assert all(t[w.numel() :].isnan().all() for t, w in zip(behind, wanted, strict=True))
    for spent, over in (([], None), ([1], None), ([0, 1], None), ([0, 1], 0), ([1], 1)):
        inputs = [t.clone() for t in kept]
        got = [nan(shapes[0]) if over is None else inputs[over], nan(shapes[1])]
        lent = [] if over is None else [nan((batch, 64, 140, 120))]
        assert workspace(inputs, got, spent, lent) <= in_outputs
        assert all(map(torch.equal, got, wanted))
        assert all(torch.equal(inputs[i], kept[i]) for i in range(2) if i not in spent)
    # What overlaps is nobody's to lend.
    shared = nan((2, *shapes[1]))
    inputs = [t.clone() for t in kept]
    twice = [inputs[0], inputs[0].clone()]
    both = [nan(shapes[0]), shared[0]]
    workspace(twice, both)
    again = [nan(shapes[0]), shared[1]]
    workspace([twice[0], twice[0]], again, [0, 1], [])
    assert all(map(torch.equal, both, again))

    def refuse(match: str, results: list[Tensor], spent: list[int]) -> None:
        with pytest.raises(RuntimeError, match=match):
            workspace(x, results, spent, [])

    refuse("there is no input 2", [nan(shapes[0]), got[1]], [2])
    torch.ops.esr_native.release_plan(handle)
    p = Program()
    handle = p.compile(p.conv3x3(0, conv_weight(16, 16, 3)))
    with pytest.raises(RuntimeError, match="output 0 is input 0, which is read after"):
        torch.ops.esr_native.execute_plan_over(handle, x[:1], x[:1], [0], [])
    torch.ops.esr_native.release_plan(handle)


@pytest.mark.parametrize("threads", [1, 3])
def test_results_that_take_the_place_of_inputs(threads: int, capability: str) -> None:
    """Of rows that are read before they are written, but of no others."""
    torch.set_num_threads(threads)
    x, other = torch.randn(2, 1, 16, 83, 41).unbind()
    w, d = conv_weight(16, 16, 1), torch.randn(16, 1, 3, 3) / 3

    def takes(p: Program, *outputs: int) -> list[int]:
        handle = p.compile(*outputs)
        found = list(torch.ops.esr_native.plan_spans(handle)[p.inputs + len(outputs) :])
        torch.ops.esr_native.release_plan(handle)
        return found

    def sum_of_convolved(p: Program) -> int:
        return p.add(p.conv1x1([p.add(0, 1)], w), 1)

    def sum_with_filtered(p: Program) -> int:
        return p.add(p.depthwise_conv(0, d), 1)

    for build in (sum_of_convolved, sum_with_filtered):
        p = Program(2)
        out = build(p)
        assert takes(p, out) == [1, 1]
        (wanted,) = p.run([x, other], {out: tuple(x.shape)})
        for spent in (0, 1):
            inputs = [x.clone(), other.clone()]
            handle = p.compile(out)
            torch.ops.esr_native.execute_plan_over(handle, inputs, [inputs[spent]], [spent], [])
            torch.ops.esr_native.release_plan(handle)
            assert torch.equal(inputs[spent], wanted)
            assert torch.equal(inputs[1 - spent], (x, other)[1 - spent])

    p = Program(2)
    first = p.add(0, 0)
    # A 1x1 convolution reads the tensor, after the first result may have been written over it; a sum reads its map.
    second = p.add(p.conv1x1([1], w), p.add(first, 0))
    assert takes(p, first, second) == [1, 0, 1, 1]


@pytest.mark.parametrize("multiplies", [False, True])
def test_pairs_of_inputs(multiplies: bool, capability: str) -> None:
    for shape, other in (((2, 21, 9, 7), 21), ((1, 16, 5, 30), 1 if multiplies else 16)):
        a, b = torch.randn(shape), torch.randn(shape[0], other, *shape[2:])
        p = Program(2)
        pair = p.multiply if multiplies else p.add
        out = pair(0, 1)
        (got,) = p.run([a, b], {out: shape})
        assert torch.equal(got, a * b if multiplies else a + b)
        (got,) = p.run([a.to(memory_format=torch.channels_last), b], {out: shape}, channels_last=True)
        assert torch.equal(got, a * b if multiplies else a + b)


def test_concurrent_executions_and_release() -> None:
    p, out = span_like()
    handle = p.compile(out)
    images = [torch.rand(1, 3, 20 + 4 * i, 31) for i in range(4)]
    wanted = []
    for x in images:
        wanted.append(nan((1, 3, 4 * x.shape[2], 124)))
        torch.ops.esr_native.execute_plan(handle, [x], [wanted[-1]])
    failures: list[int] = []
    started = threading.Barrier(5)

    def work(i: int) -> None:
        y = torch.empty_like(wanted[i])
        for k in range(8):
            y.fill_(float("nan"))
            torch.ops.esr_native.execute_plan(handle, [images[i]], [y])
            if not torch.equal(y, wanted[i]):
                failures.append(i)
            if k == 0:
                started.wait()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    started.wait()
    torch.ops.esr_native.release_workspaces()
    for t in threads:
        t.join()
    assert failures == []
    torch.ops.esr_native.release_plan(handle)
    with pytest.raises(RuntimeError, match="no plan with handle"):
        torch.ops.esr_native.execute_plan(handle, [images[0]], [wanted[0]])


def test_weights_of_any_dtype_and_strides(capability: str) -> None:
    x = torch.randn(1, 20, 9, 9)
    w = conv_weight(18, 20, 3).bfloat16().float()
    b = torch.randn(18).half().float()
    results = []
    for weight in (w, w.to(memory_format=torch.channels_last), w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        for dtype in (torch.float32, torch.bfloat16):
            p = Program()
            results += p.run([x], {p.conv3x3(0, weight.to(dtype), b.half()): (1, 18, 9, 9)})
    assert error(results[0], conv3x3_reference(x, w, b)) < WINOGRAD
    for other in results[1:]:
        assert torch.equal(results[0], other)


# ------------------------------------------------------------------------------------------------------ capability


def test_capability_names() -> None:
    names = capabilities()
    assert "plain" in names
    for name in names:
        torch.ops.esr_native.set_cpu_capability(name)
        assert torch.ops.esr_native.get_cpu_capability() == name
    with pytest.raises(RuntimeError, match="amx, avx512, avx2, plain"):
        torch.ops.esr_native.set_cpu_capability("sse9")


def test_capabilities_agree() -> None:
    p, out = span_like()
    x = torch.rand(1, 3, 33, 50)
    want = span_reference(p, x)
    for name in capabilities():
        torch.ops.esr_native.set_cpu_capability(name)
        (y,) = p.run([x], {out: (1, 3, 132, 200)})
        assert error(y, want) < WINOGRAD, name


# ----------------------------------------------------------------------------------------------------- bad programs


def good() -> tuple[list[int], list[float], list[Tensor]]:
    p = Program()
    x = p.normalize(0, [0.1] * 4, [2.0] * 4)
    y = p.conv3x3(x, conv_weight(4, 4, 3), torch.randn(4), "leaky_relu", x, "post")
    y = p.conv1x1([x, y], conv_weight(4, 8, 1), torch.randn(4))
    y = p.bsconv(y, conv_weight(4, 4, 1), torch.randn(4, 1, 3, 3), None, True, "none")
    y = p.esa(p.add(y, x), esa_weights(4, 4, "full"))
    return p.code(p.shuffle(y, conv_weight(4, 4, 3), None, 2)), p.constants, p.weights


def test_truncated_and_extended_programs() -> None:
    code, constants, weights = good()
    torch.ops.esr_native.release_plan(torch.ops.esr_native.compile_plan(code, constants, weights))
    for length in range(len(code)):
        with pytest.raises(RuntimeError, match="plan"):
            torch.ops.esr_native.compile_plan(code[:length], constants, weights)
    with pytest.raises(RuntimeError, match="follow the last output"):
        torch.ops.esr_native.compile_plan([*code, 0], constants, weights)


def test_programs_with_one_wrong_integer() -> None:
    """Each integer in turn replaced by hostile ones: a clear error or a plan, never a crash."""
    code, constants, weights = good()
    x = torch.randn(1, 4, 18, 20)
    refused = 0
    for position in range(len(code)):
        for value in (-(2**62), -2, -1, 0, 1, 5, 1000, 2**31, 2**62):
            changed = list(code)
            changed[position] = value
            messages: list[str] = []
            handle = 0
            try:
                handle = torch.ops.esr_native.compile_plan(changed, constants, weights)
                torch.ops.esr_native.execute_plan(handle, [x] * changed[1], [nan((1, 1, 36, 40))])
            except RuntimeError as e:
                messages.append(str(e))
            assert all("plan" in m or "layer" in m or "output" in m for m in messages), messages
            if handle:
                torch.ops.esr_native.release_plan(handle)
            else:
                refused += 1
    assert refused > 5 * len(code)


def test_program_errors() -> None:
    w, b = conv_weight(4, 4, 3), torch.randn(4)

    def refuse(
        match: str,
        record: list[int],
        weights: Sequence[Tensor] = (w, b),
        outputs: Sequence[int] = (1,),
        layout: int = 2,
    ) -> None:
        code = [layout, 1, 1, len(outputs), record[0], len(record) - 1, *record[1:], *outputs]
        with pytest.raises(RuntimeError, match=match):
            torch.ops.esr_native.compile_plan(code, [0.1], list(weights))

    refuse("operator is 16", [16, 0, 0])
    refuse("x is 1, defined so far", [1, 1, 0, 1, 0, 0, -1, 1])
    refuse("residual of layer 0", [1, 0, 0, 1, 0, 0, 1, 1])
    refuse("activation is 6", [1, 0, 0, 1, 6, 0, -1, 1])
    refuse("residual_mode is 3", [1, 0, 0, 1, 0, 0, 0, 3])
    refuse("no residual", [1, 0, 0, 1, 0, 0, -1, 2])
    refuse("allows no activation", [1, 0, 0, 1, 3, 0, 0, 2])
    refuse("weight index weight", [1, 0, -1, 1, 0, 0, -1, 1])
    refuse("weight index bias", [1, 0, 0, 2, 0, 0, -1, 1])
    refuse("constant index", [1, 0, 0, 1, 2, 1, -1, 1])
    refuse("integers too many", [1, 0, 0, 1, 0, 0, -1, 1, 0])
    refuse("the program ends", [1, 0, 0, 1, 0, 0, -1])
    refuse("output value is 2", [1, 0, 0, 1, 0, 0, -1, 1], outputs=(2,))
    refuse("weight has shape", [2, 1, 0, 0, 1, 0, 0, -1, 1])
    refuse("residual of layer 0", [2, 1, 0, 0, 1, 0, 0, 1, 1])
    refuse("residual_mode is 2", [2, 1, 0, 0, 1, 0, 0, 0, 2])
    refuse("bias has shape", [1, 0, 0, 1, 0, 0, -1, 1], (w, torch.randn(5)))
    refuse("weight has shape", [1, 0, 0, 1, 0, 0, -1, 1], (torch.randn(0, 4, 3, 3), b))
    refuse("does not divide", [3, 0, 0, -1, 3, -1])
    refuse("upscale_factor", [3, 0, 0, -1, 0, -1])
    refuse("two numbers for each of 3 channels", [0, 0, 3, 0])
    refuse("padding_mode is 2", [5, 0, 0, 1, -1, 2, 0, 0, -1, 1])
    refuse("format 1 is not supported", [6, 0, 0], layout=1)
    refuse("unsupported dtype", [1, 0, 0, 1, 0, 0, -1, 1], (w.double(), b))
    refuse("not a CPU tensor", [1, 0, 0, 1, 0, 0, -1, 1], (w.to("meta"), b))


def test_shuffled_values_cannot_be_read() -> None:
    p = Program()
    y = p.shuffle(0, conv_weight(4, 4, 3), None, 1)
    with pytest.raises(RuntimeError, match="can only be an output"):
        p.compile(p.conv3x3(y, conv_weight(4, 4, 3)))


def test_channel_mismatch_between_layers() -> None:
    p = Program()
    y = p.conv3x3(0, conv_weight(4, 3, 3))
    with pytest.raises(RuntimeError, match="has 4 channels, must have 5"):
        p.compile(p.conv3x3(y, conv_weight(4, 5, 3)))
    p = Program()
    y = p.conv3x3(0, conv_weight(4, 3, 3))
    with pytest.raises(RuntimeError, match="8 channels together, the weight takes 9"):
        p.compile(p.conv1x1([y, y], conv_weight(4, 9, 1)))


def test_tensor_errors() -> None:
    p = Program(2)
    out = p.conv3x3(0, conv_weight(4, 3, 3), None, "none", 1, "post")
    handle = p.compile(out)
    x, r, y = torch.randn(2, 3, 8, 9), torch.randn(2, 4, 8, 9), torch.empty(2, 4, 8, 9)

    def refuse(match: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        with pytest.raises(RuntimeError, match=match):
            torch.ops.esr_native.execute_plan(handle, inputs, outputs)

    refuse("1 inputs given", [x], [y])
    refuse("2 outputs given", [x, r], [y, y])
    refuse("must have 4: ", [x[0], r], [y])
    refuse("x has 2 channels, must have 3", [x[:, :2], r], [y])
    refuse("residual has 3 channels", [x, r[:, :3]], [y])
    refuse("residual is 8x8, must be 8x9", [x, r[..., :8]], [y])
    refuse("input 1 has 1 images", [x, r[:1]], [y])
    refuse("output 0 is", [x, r], [y[:, :3]])
    refuse("output 0 is", [x, r], [y[:1]])
    refuse("unsupported dtype", [x.double(), r], [y])
    refuse("unsupported dtype", [x, r], [y.int()])
    refuse("not a CPU tensor", [x.to("meta"), r], [y])
    refuse("not a strided tensor", [x.to_sparse(), r], [y])
    torch.ops.esr_native.execute_plan(handle, [x, r], [y])
    torch.ops.esr_native.release_plan(handle)
    with pytest.raises(RuntimeError, match="no plan with handle"):
        torch.ops.esr_native.release_plan(handle)


def test_empty_images() -> None:
    p, out = span_like()
    for shape in ((0, 3, 4, 5), (1, 3, 0, 5), (1, 3, 4, 0)):
        (y,) = p.run([torch.empty(shape)], {out: (shape[0], 3, 4 * shape[2], 4 * shape[3])})
        assert y.numel() == 0


def test_winograd_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The direct form is closer to float64 than Winograd, which shows that the switch does something."""
    x, w = 127 * torch.randn(1, 48, 32, 32), conv_weight(48, 48, 3)
    want = conv3x3_reference(x, w, None)
    errors = {}
    for setting in ("0", "1"):
        monkeypatch.setitem(os.environ, "ESR_KERNELS_CPU_WINOGRAD", setting)
        p = Program()
        (y,) = p.run([x], {p.conv3x3(0, w): (1, 48, 32, 32)})
        errors[setting] = error(y, want)
    assert errors["0"] < errors["1"] < WINOGRAD
