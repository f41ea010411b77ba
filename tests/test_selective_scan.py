"""selective_scan against one token after the other in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import HALF, backends_with, check_close, check_compiled, check_gradients, largest_error, rand, to
from torch.nn import functional as F

import esr_kernels
from esr_kernels.functional import selective_scan
from esr_kernels.timing import thread_count

NAMES = ("u", "delta", "a", "b", "c", "d", "z", "delta_bias")


@pytest.fixture(params=backends_with("selective_scan"))
def backend(request):
    with esr_kernels.use_backend(request.param):
        yield request.param


def plain(u, delta, a, b, c, d=None, *, z=None, delta_bias=None, delta_softplus=False):
    """The definition: a loop over tokens."""
    step = delta if delta_bias is None else delta + delta_bias
    step = F.softplus(step) if delta_softplus else step
    state, rows = u.new_zeros(u.shape[0], u.shape[2], a.shape[1]), []
    for t in range(u.shape[1]):
        added = (step[:, t] * u[:, t]).unsqueeze(-1) * b[:, t].unsqueeze(-2)
        state = torch.exp(step[:, t].unsqueeze(-1) * a) * state + added
        rows.append((state * c[:, t].unsqueeze(-2)).sum(-1))
    y = torch.stack(rows, 1) if rows else torch.zeros_like(u)
    y = y if d is None else y + d * u
    return y if z is None else y * F.silu(z)


def operands(length, channels, states, batch=2, dtype=torch.float32):
    """By name; rates of decay between -1 and -states, as a network starts with, and steps around 0.05."""
    rates = -torch.rand(channels, states) * states
    tokens = {name: rand(batch, length, channels, dtype=dtype) for name in ("u", "delta", "z")}
    tokens |= {name: rand(batch, length, states, dtype=dtype) for name in ("b", "c")}
    per_channel = {
        "a": rates.to(dtype),
        "d": rand(channels, dtype=dtype),
        "delta_bias": rand(channels, dtype=dtype) - 3,
    }
    return {name: (tokens | per_channel)[name] for name in NAMES}


def check(backend, given, **settings):
    given = given | settings
    out = selective_scan(**given)
    assert out.dtype == given["u"].dtype and out.is_contiguous()
    exact = plain(**to(given, torch.float64))
    check_close(out, exact, lambda: plain(**given), backend)
    if out.dtype == torch.float32 and out.numel() > 0:
        assert largest_error(out, exact) <= 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize("length", [0, 1, 2, 3, 63, 64, 65, 200])
def test_lengths(backend, length):
    torch.manual_seed(length)
    check(backend, operands(length, 20, 16), delta_softplus=True)


@pytest.mark.parametrize("states", [1, 2, 3, 4, 7, 8, 9, 16, 17])
@pytest.mark.parametrize("channels", [1, 7, 8, 16, 37, 120])
def test_channels_and_states(backend, channels, states):
    torch.manual_seed(channels)
    check(backend, operands(33, channels, states), delta_softplus=True)


@pytest.mark.parametrize("without", [(), ("d",), ("z",), ("delta_bias",), ("d", "z", "delta_bias")])
def test_what_may_be_missing(backend, without):
    torch.manual_seed(1)
    given = {k: v for k, v in operands(70, 19, 5).items() if k not in without}
    check(backend, given, delta_softplus=True)
    check(backend, given | {"delta": given["delta"].abs() * 0.1, "delta_bias": torch.zeros(19)})


@pytest.mark.parametrize("dtype", HALF)
def test_half_types(backend, dtype):
    """Also beside float32 parameters; states are float32."""
    torch.manual_seed(2)
    given = operands(150, 37, 16, dtype=dtype)
    check(backend, given, delta_softplus=True)
    check(backend, given | {k: given[k].float() for k in ("a", "d", "delta_bias")}, delta_softplus=True)


def test_a_long_memory(backend):
    """Sums over 4,000 tokens that hardly decay; in half precision they would stop growing."""
    torch.manual_seed(3)
    given = operands(4000, 9, 2, batch=1, dtype=torch.bfloat16)
    given["a"] = given["a"].float() * 1e-4
    given["u"], given["b"], given["c"] = (given[k].abs() for k in ("u", "b", "c"))
    check(backend, given, delta_softplus=True)


def test_slices_of_projections(backend):
    """u and z, b and c are read where they are; strides of other kinds are copied."""
    torch.manual_seed(4)
    given = operands(40, 24, 6)
    exact = plain(**to(given, torch.float64), delta_softplus=True)
    both = torch.cat([given["u"], given["z"]], -1)
    parts = torch.cat([rand(2, 40, 3), given["b"], given["c"]], -1)
    sliced = given | dict(zip(("u", "z"), both.chunk(2, -1), strict=True))
    sliced |= dict(zip(("b", "c"), parts[..., 3:].split([6, 6], -1), strict=True))
    turned = {k: v.mT.contiguous().mT if v.dim() == 3 else v for k, v in given.items()}
    reordered = {k: v.transpose(0, 1).contiguous().transpose(0, 1) if v.dim() == 3 else v for k, v in given.items()}
    for case in (sliced, turned, reordered):
        out = selective_scan(**case, delta_softplus=True)
        assert out.is_contiguous() and largest_error(out, exact) <= 1e-5 * float(exact.abs().max())
    one = given | {k: given[k][:1].expand(2, -1, -1) for k in ("b", "c")} | {"d": given["d"][:1].expand(24)}
    check(backend, one, delta_softplus=True)


def test_offsets_beyond_32_bits(backend):
    """Tokens, and images, more than 2^31 elements apart, over memory that is reserved, not used."""
    torch.manual_seed(5)
    given, far = operands(3, 9, 2, dtype=torch.float16), 2**31 + 8
    exact = selective_scan(**given)
    for strides in ((far, 9, 1), (9, far, 1)):
        size = sum(step * (side - 1) for step, side in zip(strides, (2, 3, 9), strict=True)) + 1
        memory = torch.from_numpy(np.empty(size, np.float16))
        u = memory.as_strided((2, 3, 9), strides).copy_(given["u"])
        assert torch.equal(selective_scan(**given | {"u": u}), exact)


@pytest.mark.parametrize("value", [-1000.0, -90.0, -30.0, 0.0, 15.0, 25.0, 1000.0])
def test_softplus_of_every_size(backend, value):
    """As accurate where it is tiny as where it is not: exp(-30) and exp(-90) count."""
    torch.manual_seed(6)
    given = operands(5, 18, 3)
    given["delta"] = torch.full_like(given["delta"], value)
    given |= {"a": given["a"] * 0.01, "d": None, "z": None, "delta_bias": None}
    out, exact = selective_scan(**given, delta_softplus=True), plain(**to(given, torch.float64), delta_softplus=True)
    scale = float(exact.abs().max())
    # Below 1e-38 are no normal numbers.
    assert largest_error(out, exact) <= (1e-5 * scale if scale > 1e-37 else 1e-37)


def test_a_nan_reaches_its_channel_from_its_token_on(backend):
    given = operands(20, 18, 3, batch=1) | {"delta_softplus": True}
    given["u"][0, 7, 4] = float("nan")
    nan = selective_scan(**given).isnan()
    assert nan.sum() == 13 and nan[0, 7:, 4].all()


def test_empty_batch(backend):
    assert selective_scan(**operands(5, 4, 3, batch=0)).shape == (0, 5, 4)


@pytest.mark.skipif("native-cpu" not in backends_with("selective_scan"), reason="the native library is not compiled")
def test_threads_and_batches_change_no_bit():
    torch.manual_seed(8)
    given = operands(400, 120, 16, batch=3) | {"delta_softplus": True}
    with esr_kernels.use_backend("native-cpu"):
        want = selective_scan(**given)
        for threads in (1, 2, 5):
            with thread_count(threads):
                assert torch.equal(selective_scan(**given), want)
        for n in range(3):
            one = {k: v[n : n + 1] if k in ("u", "delta", "z", "b", "c") else v for k, v in given.items()}
            assert torch.equal(selective_scan(**one)[0], want[n])


def with_settings(function, *names, **settings):
    return lambda *tensors: function(**dict(zip(names, tensors, strict=True)), **settings)


@pytest.mark.parametrize("names", [NAMES, NAMES[:5], (*NAMES[:5], "z"), (*NAMES[:6], "delta_bias")])
@pytest.mark.parametrize("length", [1, 7, 50])
def test_gradients(length, names):
    torch.manual_seed(9)
    given = operands(length, 11, 5)
    steps = {"delta": 0.1 * given["delta"].abs(), "delta_bias": 0.1 * given["delta_bias"].abs()}
    for softplus, tensors in ((True, given), (False, given | steps)):
        functions = [with_settings(f, *names, delta_softplus=softplus) for f in (selective_scan, plain)]
        check_gradients(*functions, [tensors[name] for name in names])


def test_gradients_of_nothing():
    for given in (operands(0, 4, 3), operands(5, 4, 3, batch=0)):
        tensors = [t.requires_grad_() for t in given.values()]
        selective_scan(**given).sum().backward()
        assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in tensors)


def test_gradcheck():
    torch.manual_seed(10)
    tensors = [t.double().requires_grad_() for t in operands(7, 3, 2).values()]
    assert torch.autograd.gradcheck(with_settings(selective_scan, *NAMES, delta_softplus=True), tensors)


def test_opcheck(backend):
    torch.manual_seed(11)
    given = list(operands(10, 6, 3).values())
    for tensors in (given, [*given[:5], None, None, None]):
        torch.library.opcheck(torch.ops.esr.selective_scan.default, (*tensors, True))


def test_opcheck_with_gradients():
    torch.manual_seed(12)
    tensors = [t.requires_grad_() for t in operands(10, 6, 3).values()]
    torch.library.opcheck(torch.ops.esr.selective_scan.default, (*tensors, True))
    grad = rand(2, 10, 6)
    for given, mask in ((tensors, [True] * 8), ([*tensors[:5], None, None, None], [True, False] * 4)):
        given = [None if t is None else t.detach() for t in given]
        torch.library.opcheck(torch.ops.esr.selective_scan_backward.default, (grad, *given, True, mask))


def test_compile():
    torch.manual_seed(13)
    function = with_settings(selective_scan, *NAMES, delta_softplus=True)
    check_compiled(function, [tuple(operands(length, 6, 3).values()) for length in (17, 20, 33)])


def test_autocast_leaves_rates_of_decay_in_float32(backend):
    torch.manual_seed(14)
    given = operands(30, 12, 4) | {"delta_softplus": True}
    tokens = {k: given[k].bfloat16() for k in ("u", "delta", "b", "c", "z")}
    with torch.autocast("cpu", torch.bfloat16):
        out = selective_scan(**given)
    assert out.dtype == torch.bfloat16 and torch.equal(out, selective_scan(**given | tokens))


def test_trace_is_plain_pytorch():
    given = operands(12, 5, 3)
    function = with_settings(selective_scan, *NAMES, delta_softplus=True)
    traced = torch.jit.trace(function, tuple(given.values()))
    assert "esr::" not in str(traced.graph)
    torch.testing.assert_close(traced(*given.values()), function(*given.values()))


def test_second_derivative_is_refused():
    given = operands(6, 4, 2)
    u = given["u"].requires_grad_()
    (g,) = torch.autograd.grad(selective_scan(**given).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="esr::selective_scan has no second derivative"):
        g.sum().backward()


def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    given = operands(10, 6, 3)
    with FlopCounterMode(display=False) as counter:
        selective_scan(**given)
    assert counter.get_total_flops() == 2 * 10 * 6 * (6 * 3 + 4)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": 3}, TypeError, "u: expected a torch.Tensor, got int"),
        ({"u": zeros(9, 6)}, ValueError, r"u: expected 3 dimensions \[N, L, D\], got 2 with shape \(9, 6\)"),
        ({"u": zeros(2, 9, 6, dtype=torch.int32)}, TypeError, "u: expected float32, float16, bfloat16 or float64"),
        ({"u": zeros(2, 9, 0)}, ValueError, r"u: channels must be at least 1, got shape \(2, 9, 0\)"),
        ({"delta": zeros(2, 9, 5)}, ValueError, r"delta: expected shape \[2, 9, 6\], got \[2, 9, 5\]"),
        ({"delta": zeros(2, 9, 6, 1)}, ValueError, r"delta: expected shape \[2, 9, 6\], got \[2, 9, 6, 1\]"),
        ({"delta": zeros(2, 9, 6).half()}, TypeError, "delta: expected the input's dtype torch.float32, got"),
        ({"a": zeros(5, 3)}, ValueError, r"a: expected shape \[6, S\] with at least one state, got \[5, 3\]"),
        ({"a": zeros(6, 0)}, ValueError, r"a: expected shape \[6, S\] with at least one state, got \[6, 0\]"),
        ({"a": zeros(6, 3).half()}, TypeError, "a: expected the input's dtype torch.float32, got torch.float16"),
        ({"a": zeros(6, 3).double()}, TypeError, "a: expected the input's dtype torch.float32, got torch.float64"),
        ({"b": zeros(2, 9, 4)}, ValueError, r"b: expected shape \[2, 9, 3\], got \[2, 9, 4\]"),
        ({"c": zeros(2, 8, 3)}, ValueError, r"c: expected shape \[2, 9, 3\], got \[2, 8, 3\]"),
        ({"c": None}, TypeError, "c: expected a torch.Tensor, got NoneType"),
        ({"d": zeros(5)}, ValueError, r"d: expected shape \[6\] or None, got \[5\]"),
        ({"z": zeros(1, 9, 6)}, ValueError, r"z: expected shape \[2, 9, 6\], got \[1, 9, 6\]"),
        ({"delta_bias": zeros(6, 1)}, ValueError, r"delta_bias: expected shape \[6\] or None, got \[6, 1\]"),
        ({"d": torch.zeros(6, device="meta")}, ValueError, "d: expected the input's device cpu, got meta"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        selective_scan(**operands(9, 6, 3) | change)


def test_half_parameters_of_another_device_are_refused():
    given = to(operands(9, 6, 3), torch.float16) | {"a": torch.zeros(6, 3, device="meta")}
    with pytest.raises(ValueError, match="a: expected the input's device cpu, got meta"):
        selective_scan(**given)
