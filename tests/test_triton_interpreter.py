"""The patched Triton interpreter rounds, multiplies and masks like a compiled kernel."""

from __future__ import annotations

import warnings

import pytest
import torch
import triton_interpreter
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not installed")
if not triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is not set: kernels are compiled", allow_module_level=True)
tl = pytest.importorskip("triton.language")
interpreter = pytest.importorskip("triton.runtime.interpreter")

triton_interpreter.install()

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
N = 64


@triton.jit
def cast_kernel(x, out, n: tl.constexpr):
    """Casts to `out`'s type, named."""
    i = tl.arange(0, n)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def store_kernel(x, out, n: tl.constexpr):
    """Leaves the cast to the store."""
    i = tl.arange(0, n)
    tl.store(out + i, tl.load(x + i))


@triton.jit
def dot_kernel(a, b, out, M: tl.constexpr, K: tl.constexpr, accumulate: tl.constexpr):
    i = tl.arange(0, M)
    k = tl.arange(0, K)
    x = tl.load(a + i[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * M + i[None, :])
    if accumulate:
        acc = tl.dot(x, y, acc=tl.full([M, M], 1.0, tl.float32), input_precision="ieee")
    else:
        acc = tl.dot(x, y, input_precision="ieee")
    tl.store(out + i[:, None] * M + i[None, :], acc)


@triton.jit
def arithmetic_kernel(a, b, out, op: tl.constexpr, n: tl.constexpr):
    i = tl.arange(0, n)
    x = tl.load(a + i)
    y = tl.load(b + i)
    if op == "add":
        z = x + y
    elif op == "subtract":
        z = x - y
    elif op == "multiply":
        z = x * y
    elif op == "divide":
        z = x / y
    elif op == "negate":
        z = -x
    elif op == "abs":
        z = tl.abs(x)
    elif op == "constant":
        z = x * 1.3 + 1
    elif op == "full":
        z = x + tl.full([n], 1.3, tl.bfloat16)
    elif op == "zeros":
        z = x + tl.zeros([n], tl.bfloat16)
    elif op == "fma":
        z = tl.fma(x, y, x)
    elif op == "maximum":
        z = tl.maximum(x, y)
    elif op == "minimum":
        z = tl.minimum(x, 0.0)
    elif op == "clamp":
        z = tl.clamp(x, -0.5, 0.5)
    elif op == "clamp all":
        z = tl.clamp(x, -0.5, 0.5, propagate_nan=tl.PropagateNan.ALL)
    elif op == "where":
        z = tl.where(x > y, x, 0.0)
    elif op == "compare":
        z = (x >= y).to(tl.bfloat16)
    elif op == "other":
        z = tl.load(a + i, mask=i < n // 2, other=1.3)
    else:
        tl.static_assert(op == "float32")
        z = x.to(tl.float32) * y.to(tl.float32)
    tl.store(out + i, z)


@triton.jit
def reduce_kernel(x, out, op: tl.constexpr, n: tl.constexpr):
    i = tl.arange(0, n)
    v = tl.load(x + i[:, None] * n + i[None, :])
    if op == "sum":
        z = tl.sum(v, axis=1)
    elif op == "max":
        z = tl.max(v, axis=1)
    elif op == "min":
        z = tl.min(v, axis=1)
    elif op == "argmax":
        z = tl.argmax(v, axis=1)
    elif op == "max_index":
        best, z = tl.max(v, axis=1, return_indices=True)
        z = tl.where(best > 0, z, -1)
    else:
        tl.static_assert(op == "cumsum")
        z = tl.max(tl.cumsum(tl.abs(v), axis=1), axis=1)
    tl.store(out + i, z)


@triton.jit
def mask_kernel(x, out, size, other, kind: tl.constexpr, n: tl.constexpr):
    i = tl.arange(0, n)
    if kind == "block":
        mask = i < size
    elif kind == "scalar":
        mask = size > other
    elif kind == "block and scalar":
        mask = (i < size) & (size > other)
    elif kind == "scalar and block":
        mask = (tl.program_id(0) < other) & (i < size)
    elif kind == "broadcast":
        mask = tl.broadcast_to(size > other, [n])
    else:
        tl.static_assert(kind == "float")
        mask = (i < size) & (size * 0.5 > other)
    tl.store(out + i, tl.load(x + i, mask=mask, other=-1.0))
    tl.store(out + n + i, tl.load(x + i), mask=mask)


@triton.jit
def loop_kernel(x, out, size, n: tl.constexpr):
    i = tl.arange(0, n)
    acc = tl.zeros([n], tl.float32)
    for step in tl.range(0, size, num_stages=2):
        acc += tl.load(x + i) * step
    for step in range(1, size, 2):
        acc += step
    tl.store(out + i, acc)


def float32_values() -> Tensor:
    """Every upper half of a float32 with lower halves at and around the ties, and at random."""
    upper = torch.arange(1 << 16).unsqueeze(1) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xC000, 0xFFFF]).expand(len(upper), -1)
    anything = torch.randint(1 << 16, (len(upper), 1), generator=torch.Generator().manual_seed(0))
    return (upper | torch.cat([lower, anything], dim=1)).flatten().to(torch.int32).view(torch.float32)


def float16_boundaries() -> Tensor:
    """The float32 values where float16 rounds, among them the ties: those next to every float16 and between two."""
    exact = torch.arange(1 << 16).to(torch.int16).view(torch.float16).float()
    between = (exact + exact.roll(-1)) / 2
    both = torch.cat([exact, between])
    inf = torch.tensor(float("inf"))
    return torch.cat([both, both.nextafter(inf), both.nextafter(-inf), both])


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    number = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    known = ~expected.isnan()
    torch.testing.assert_close(actual[known].view(number), expected[known].view(number), rtol=0, atol=0)


def run_cast(kernel, x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.numel(), dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel[(1,)](x, out, n=x.numel())
    return out


def run_dot(a: Tensor, b: Tensor, accumulate: bool = False) -> Tensor:
    out = torch.empty(len(a), len(a))
    dot_kernel[(1,)](a, b, out, M=len(a), K=len(b), accumulate=accumulate)
    return out


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """Two bfloat16 vectors."""
    torch.manual_seed(0)
    return torch.randn(N).bfloat16(), torch.randn(N).bfloat16()


@pytest.mark.parametrize("kernel", [cast_kernel, store_kernel], ids=["cast", "store"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_rounds_to_nearest_even(kernel, dtype):
    x = float32_values() if dtype == torch.bfloat16 else float16_boundaries()
    assert_same_bits(run_cast(kernel, x, dtype), x.to(dtype))


def test_bfloat16_widens_exactly():
    x = torch.arange(1 << 16).to(torch.int16).view(torch.bfloat16)
    assert_same_bits(run_cast(cast_kernel, x, torch.float32), x.float())
    # The other way round, and through float16, whose range is narrower.
    assert_same_bits(run_cast(cast_kernel, x.float(), torch.bfloat16), x)
    assert_same_bits(run_cast(cast_kernel, x, torch.float16), x.half())
    assert_same_bits(run_cast(cast_kernel, x, torch.float64), x.double())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float16, torch.float64], ids=str)
def test_other_types_and_bfloat16(dtype):
    x = torch.arange(-8192, 8192).to(dtype)
    assert_same_bits(run_cast(cast_kernel, x, torch.bfloat16), x.bfloat16())
    half = x[::64].bfloat16() / 4
    torch.testing.assert_close(run_cast(cast_kernel, half, dtype), half.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dot_multiplies_values(dtype, accumulate):
    torch.manual_seed(0)
    a, b = torch.randn(16, 64).to(dtype), torch.randn(64, 16).to(dtype)
    exact = a.double() @ b.double() + accumulate
    bound = 64 * torch.finfo(torch.float32).eps * (a.double().abs() @ b.double().abs() + 1)
    assert ((run_dot(a, b, accumulate) - exact).abs() <= bound).all()


def test_the_original_dot_multiplies_bit_patterns(monkeypatch):
    """Once this fails, Triton has mended it and the patch of the dot can go."""
    one = torch.eye(16, dtype=torch.bfloat16)
    assert torch.equal(run_dot(one, one), torch.eye(16))
    original = triton_interpreter.ORIGINALS["InterpreterBuilder.create_dot"]
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", original)
    assert torch.equal(run_dot(one, one), torch.eye(16) * 0x3F80**2)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("add", lambda x, y: x + y),
        ("subtract", lambda x, y: x - y),
        ("multiply", lambda x, y: x * y),
        ("divide", lambda x, y: x.float() / y.float()),
        ("negate", lambda x, y: -x),
        ("abs", lambda x, y: x.abs()),
        ("constant", lambda x, y: x * torch.tensor(1.3).bfloat16() + 1),
        ("full", lambda x, y: x + torch.tensor(1.3).bfloat16()),
        ("zeros", lambda x, y: x),
        ("fma", lambda x, y: (x.double() * y.double() + x.double()).bfloat16()),
        ("maximum", torch.maximum),
        ("minimum", lambda x, y: x.clamp(max=0)),
        ("clamp", lambda x, y: x.clamp(-0.5, 0.5)),
        ("clamp all", lambda x, y: x.clamp(-0.5, 0.5)),
        ("where", lambda x, y: torch.where(x > y, x, torch.zeros_like(x))),
        ("compare", lambda x, y: (x >= y).bfloat16()),
        ("other", lambda x, y: torch.where(torch.arange(N) < N // 2, x, torch.full_like(x, 1.3))),
        ("float32", lambda x, y: x.float() * y.float()),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bfloat16_arithmetic(pair, op, expected, dtype):
    out = torch.empty(N, dtype=dtype)
    arithmetic_kernel[(1,)](*pair, out, op=op, n=N)
    torch.testing.assert_close(out, expected(*pair).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("sum", lambda x: x.sum(1)),
        ("max", lambda x: x.amax(1)),
        ("min", lambda x: x.amin(1)),
        ("argmax", lambda x: x.argmax(1)),
        ("max_index", lambda x: x.argmax(1)),
        ("cumsum", lambda x: x.abs().sum(1)),
    ],
)
def test_bfloat16_reductions(op, expected):
    # Rows without equal values, whose sums bfloat16 holds exactly.
    torch.manual_seed(0)
    x = torch.stack([torch.randperm(16) - 5.0 for _ in range(16)])
    out = torch.empty(16)
    reduce_kernel[(1,)](x.bfloat16(), out, op=op, n=16)
    assert torch.equal(out, expected(x).float())


@pytest.mark.parametrize("other", [1, 100])
@pytest.mark.parametrize("kind", ["block", "scalar", "block and scalar", "scalar and block", "broadcast", "float"])
def test_masks(kind, other):
    x, size = torch.randn(16), 5
    below = torch.arange(16) < size
    holds = torch.tensor(size > other)
    mask = {
        "block": below,
        "scalar": holds.expand(16),
        "block and scalar": below & holds,
        "scalar and block": below,
        "broadcast": holds.expand(16),
        "float": below & holds,
    }[kind]
    out = torch.zeros(2, 16)
    mask_kernel[(1,)](x, out, size, other, kind=kind, n=16)
    assert torch.equal(out, torch.stack([torch.where(mask, x, -1.0), torch.where(mask, x, 0.0)]))


@pytest.mark.parametrize("size", [0, 1, 5])
def test_loops_up_to_an_argument(size):
    x, out = torch.randn(16), torch.empty(16)
    loop_kernel[(1,)](x, out, size, n=16)
    torch.testing.assert_close(out, x * sum(range(size)) + sum(range(1, size, 2)))


def test_types_are_made_once_and_tell_what_they_told():
    block = tl.block_type(tl.float32, [2, tl.constexpr(4)])
    assert block is tl.block_type(tl.float32, tl.tuple([2, 4]))
    assert (block.shape.values, block.numel, block.element_ty) == ([2, 4], 8, tl.float32)
    for other in (tl.block_type(tl.float16, [2, 4]), tl.block_type(tl.float32, [4, 2]), tl.block_type(tl.float32, [2])):
        assert other != block and str(other) != str(block)
    for _ in range(2):
        with pytest.raises(ValueError, match="must be a power of 2"):
            tl.block_type(tl.float32, [3])
    x = tl.tensor(None, block)
    assert (x.shape[1].value, x.numel.value, x.dtype, x.type) == (4, 8, tl.float32, block)
    scalar = tl.tensor(None, tl.int32)
    assert (len(scalar.shape), scalar.numel.value, scalar.dtype) == (0, 1, tl.int32)
    assert tl.constexpr(tl.constexpr(5)).value == 5 and hash(tl.constexpr(5)) == hash(tl.constexpr(5))
    pair = tl.tuple([1, x])
    assert len(pair.type.types) == 2 and pair.type.types[1] is block


def test_installs_once(monkeypatch):
    before = interpreter.InterpreterBuilder.create_dot
    triton_interpreter.install()
    assert interpreter.InterpreterBuilder.create_dot is before
    monkeypatch.setattr(triton_interpreter, "ORIGINALS", {})
    monkeypatch.delenv("TRITON_INTERPRET")
    triton_interpreter.install()
    assert interpreter.InterpreterBuilder.create_dot is before
    assert not triton_interpreter.ORIGINALS
