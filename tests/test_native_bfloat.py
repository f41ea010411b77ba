"""bfloat16 convolutions with AMX: maps in bfloat16 between layers, float32 sums, against float64."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from test_native_cpu import (  # noqa: F401
    _REASON,
    CHANNELS,
    MODES,
    SIZES,
    Program,
    _restore,
    activate,
    capabilities,
    conv3x3_reference,
    conv_weight,
    nan,
)
from torch import Tensor

pytestmark = pytest.mark.skipif(
    "amx" not in capabilities(),
    reason=f"native library: {_REASON}"
    if _REASON
    else "AMX is not to be had here, and the library does not emulate it",
)

BFLOAT = torch.bfloat16
ROUNDING = 2.0**-8  # the largest relative error of a rounding, twice


@pytest.fixture(autouse=True)
def _amx(_restore: None) -> None:  # noqa: F811
    torch.ops.esr_native.set_cpu_capability("amx")


def image(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(BFLOAT)


def filters(cout: int, cin: int, k: int = 3) -> Tensor:
    return conv_weight(cout, cin, k).to(BFLOAT)


def vector(channels: int) -> Tensor:
    return torch.randn(channels).to(BFLOAT)


def run(program: Program, inputs: Sequence[Tensor], outputs: dict[int, tuple[int, ...]]) -> list[Tensor]:
    return program.run(inputs, outputs, dtype=BFLOAT)


def check(got: Tensor, exact: Tensor, plain: Tensor | None = None) -> None:
    """The contract: at most twice PyTorch's own error in bfloat16, or a few roundings where that is not known."""
    assert got.dtype == BFLOAT and bool(torch.isfinite(got).all())
    largest = exact.abs().max().clamp_min(1e-6)
    error = float((got.double() - exact).abs().max() / largest)
    own = ROUNDING if plain is None else float((plain.double() - exact).abs().max() / largest)
    assert error <= 2 * own + 1e-6, (error, own)


@pytest.mark.parametrize("cin", [c for c in CHANNELS if c >= 8])
def test_channels(cin: int) -> None:
    for cout in (1, 3, 15, 16, 17, 31, 32, 33, cin, 64, 84):
        x, w, b = image(1, cin, 6, 19), filters(cout, cin), vector(cout)
        p = Program()
        [y] = run(p, [x], {p.conv3x3(0, w, b): (1, cout, 6, 19)})
        check(y, conv3x3_reference(x, w, b), F.conv2d(x, w, b, padding=1))


@pytest.mark.parametrize("activation", ["none", "relu", "leaky_relu", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("channels", [20, 36])
def test_epilogues(activation: str, channels: int) -> None:
    """The residual as a tensor, a bfloat16 map and, beside a layer that has none, a float32 map."""
    x, r = image(2, channels, 9, 37, scale=3.0), image(2, channels, 9, 37)
    w, first, b = filters(channels, channels), filters(channels, channels), vector(channels)
    for mode, source in itertools.product(MODES, ("none", "tensor", "bfloat16", "float32")):
        if mode == "attention" and (activation != "none" or source == "none"):
            continue
        p = Program(2)
        residual, exact, plain = -1, None, None
        if source == "tensor":
            residual, exact = 1, r.double()
            plain = r
        elif source != "none":
            residual = p.conv3x3(1, first)
            exact = conv3x3_reference(r, first, None)
            plain = F.conv2d(r, first, padding=1)
            if source == "float32":
                residual = p.multiply(residual, residual)
                exact, plain = exact * exact, plain * plain
        out = p.conv3x3(0, w, b, activation, residual, mode)
        [y] = run(p, [x, r], {out: tuple(x.shape)})
        h = F.conv2d(x, w, b, padding=1)
        if plain is None:
            own = activate(h, activation)
        elif mode == "pre":
            own = activate(h + plain, activation)
        elif mode == "post":
            own = activate(h, activation) + plain
        else:
            own = (h + plain) * (torch.sigmoid(h) - 0.5)
        check(y, conv3x3_reference(x, w, b, activation, exact, mode), own)


@pytest.mark.parametrize("height", [*range(1, 41, 3), 40])
def test_every_width(height: int) -> None:
    w = filters(24, 16)
    for width in range(1, 41):
        x = image(1, 16, height, width)
        p = Program()
        [y] = run(p, [x], {p.conv3x3(0, w): (1, 24, height, width)})
        check(y, conv3x3_reference(x, w, None))


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("size", [*SIZES, (3, 70), (21, 16)])
def test_maps_between_layers(size: tuple[int, int], adds: bool) -> None:
    """A chain of bfloat16 maps, some in float32 where a sum reads them; run twice: memory is dirty the second time."""
    x = image(2, 3, *size, scale=2.0)
    first, second, third = filters(28, 3), filters(44, 28), filters(28, 44)
    one, last = filters(28, 28 + 44 + 28, 1), filters(12, 28)
    b = [vector(c) for c in (28, 44, 28, 28, 12)]

    p = Program()
    a = p.conv3x3(0, first, b[0], "silu")  # few channels: in float32, to a bfloat16 map
    c = p.conv3x3(a, second, b[1], "gelu")
    d = p.conv3x3(c, third, b[2], "none", a, "attention")
    e = p.add(d, a) if adds else d
    f = p.conv1x1([e, c, a], one, b[3], "relu", d, "post")
    g = p.shuffle(f, last, b[4], 2)
    shape = (2, 3, 2 * size[0], 2 * size[1])

    def network(x: Tensor, convert: torch.dtype) -> Tensor:
        def conv(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return F.conv2d(x, w.to(convert), b.to(convert), padding=w.shape[-1] // 2)

        x = x.to(convert)
        a = F.silu(conv(x, first, b[0]))
        c = F.gelu(conv(a, second, b[1]))
        h = conv(c, third, b[2])
        d = (h + a) * (torch.sigmoid(h) - 0.5)
        f = F.relu(conv(torch.cat([d + a if adds else d, c, a], 1), one, b[3])) + d
        return F.pixel_shuffle(conv(f, last, b[4]), 2)

    exact, plain = network(x, torch.float64), network(x, BFLOAT)
    handle = p.compile(g)
    results = []
    for poison in (False, True):
        if poison:
            bad = torch.full_like(x, float("nan"))
            torch.ops.esr_native.execute_plan(handle, [bad], [nan(shape, dtype=BFLOAT)])
        y = nan(shape, dtype=BFLOAT)
        torch.ops.esr_native.execute_plan(handle, [x], [y])
        check(y, exact, plain)
        results.append(y)
    torch.ops.esr_native.release_plan(handle)
    assert torch.equal(*results)


def test_returned_values_have_layers_behind_them() -> None:
    x, w, v = image(1, 16, 10, 21), filters(20, 16), filters(16, 20)
    p = Program()
    middle = p.conv3x3(0, w, None, "relu")
    end = p.conv3x3(middle, v)
    a, b = run(p, [x], {middle: (1, 20, 10, 21), end: (1, 16, 10, 21)})
    exact = conv3x3_reference(x, w, None, "relu")
    check(a, exact)
    check(b, conv3x3_reference(exact, v, None), F.conv2d(F.relu(F.conv2d(x, w, padding=1)), v, padding=1))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_pixel_shuffle(factor: int, residual: bool) -> None:
    x, w, b = image(2, 28, 7, 35), filters(3 * factor**2, 28), vector(3 * factor**2)
    r = image(2, 3, 7 * factor, 35 * factor)
    p = Program(2)
    [y] = run(p, [x, r], {p.shuffle(0, w, b, factor, 1 if residual else -1): tuple(r.shape)})
    exact = F.pixel_shuffle(conv3x3_reference(x, w, b), factor) + (r.double() if residual else 0)
    check(y, exact)


@pytest.mark.parametrize("split", [(8,), (64,), (16, 16), (28, 28, 28, 28), (3, 40, 5)])
def test_conv1x1(split: tuple[int, ...]) -> None:
    xs = [image(2, c, 5, 45) for c in split]
    w, b = filters(20, sum(split), 1), vector(20)
    p = Program(len(xs))
    [y] = run(p, xs, {p.conv1x1(range(len(xs)), w, b, "silu"): (2, 20, 5, 45)})
    joined = torch.cat(xs, 1)
    check(y, F.silu(F.conv2d(joined.double(), w.double(), b.double())), F.silu(F.conv2d(joined, w, b)))


def layouts(x: Tensor) -> dict[str, Tensor]:
    n, c, h, w = x.shape
    wide = torch.full((n, c + 3, h + 1, w + 2), float("nan"), dtype=x.dtype)
    wide[:, 2 : 2 + c, 1:, 1:-1] = x
    return {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "permuted": x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        "sliced": wide[:, 2 : 2 + c, 1:, 1:-1],
    }


def test_layouts() -> None:
    x, w = image(2, 20, 11, 34), filters(28, 20)
    p = Program()
    out = p.conv3x3(0, w, None, "silu")
    [want] = run(p, [x], {out: (2, 28, 11, 34)})
    for name, same in layouts(x).items():
        [got] = run(p, [same], {out: (2, 28, 11, 34)})
        assert torch.equal(got, want), name
        [got] = p.run([same], {out: (2, 28, 11, 34)}, dtype=BFLOAT, channels_last=True)
        assert torch.equal(got, want), name


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_where_it_is(value: float) -> None:
    x, w, v = image(1, 28, 12, 50), filters(28, 28).abs(), filters(28, 28).abs()
    x[0, 5, 4, 20] = value
    p = Program()
    out = p.conv3x3(p.conv3x3(0, w), v)
    [y] = run(p, [x], {out: (1, 28, 12, 50)})
    reached = torch.zeros(1, 28, 12, 50, dtype=torch.bool)
    reached[:, :, 2:7, 18:23] = True
    assert torch.equal(~torch.isfinite(y), reached)
    if value == value:
        assert bool((y[reached] == value).all())


def test_range_of_span() -> None:
    x, w = image(1, 28, 20, 33, scale=127.0), filters(28, 28)
    p = Program()
    [y] = run(p, [x], {p.conv3x3(p.conv3x3(0, w, None, "silu"), w, None, "silu"): (1, 28, 20, 33)})
    exact = conv3x3_reference(conv3x3_reference(x, w, None, "silu"), w, None, "silu")
    check(y, exact, F.silu(F.conv2d(F.silu(F.conv2d(x, w, padding=1)), w, padding=1)))


def test_activations_far_out() -> None:
    h = torch.tensor([-float("inf"), -3e38, -1e4, -100.0, -88.0, -1.0, -0.0, 0.0, 1.0, 88.0, 1e4, 3e38, float("inf")])
    x = torch.zeros(1, 8, 1, 2 * len(h), dtype=BFLOAT)
    x[0, 0, 0, ::2] = h
    w = torch.zeros(8, 8, 3, 3, dtype=BFLOAT)
    w[0, 0, 1, 1] = 1.0
    for activation in ("silu", "gelu", "gelu_tanh", "relu"):
        p = Program()
        [y] = run(p, [x], {p.conv3x3(0, w, None, activation): tuple(x.shape)})
        got, want = y[0, 0, 0, ::2].double(), activate(x[0, 0, 0, ::2].double(), activation)
        finite = torch.isfinite(want)
        assert bool(torch.isfinite(got[finite]).all())
        torch.testing.assert_close(got[finite], want[finite], rtol=ROUNDING, atol=1e-30)


def test_threads_batches_and_tiles_do_not_change_bits() -> None:
    x, w, v = image(3, 28, 40, 72), filters(44, 28), filters(28, 44)
    p = Program()
    out = p.conv3x3(p.conv3x3(0, w, None, "silu"), v)
    [want] = run(p, [x], {out: (3, 28, 40, 72)})
    for threads in (2, 3):
        torch.set_num_threads(threads)
        [got] = run(p, [x], {out: (3, 28, 40, 72)})
        assert torch.equal(got, want)
    [alone] = run(p, [x[1:2]], {out: (1, 28, 40, 72)})
    assert torch.equal(alone, want[1:2])
    [tile] = run(p, [x[:, :, 5:25, 7:50]], {out: (3, 28, 20, 43)})
    assert torch.equal(tile[:, :, 2:-2, 2:-2], want[:, :, 7:23, 9:48])


def test_float32_plans_have_the_bits_of_avx512() -> None:
    x, w = torch.randn(1, 28, 20, 30), conv_weight(28, 28, 3)
    results = []
    for capability in ("amx", "avx512"):
        torch.ops.esr_native.set_cpu_capability(capability)
        p = Program()
        results += p.run([x], {p.conv3x3(0, w, None, "silu"): (1, 28, 20, 30)})
    assert torch.equal(*results)


def test_beside_another_user_of_the_tiles() -> None:
    """oneDNN's bfloat16 convolutions, where it uses AMX, on the same thread."""
    x, w = image(1, 32, 40, 40), filters(32, 32)
    p = Program()
    out = p.conv3x3(0, w)
    [ours] = run(p, [x], {out: (1, 32, 40, 40)})
    plain = F.conv2d(x, w, padding=1)
    for _ in range(3):
        [again] = run(p, [x], {out: (1, 32, 40, 40)})
        assert torch.equal(again, ours)
        assert torch.equal(F.conv2d(x, w, padding=1), plain)
