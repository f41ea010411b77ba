"""layer_norm2d against PyTorch's layer_norm in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    HALF,
    LAYOUTS,
    backends_with,
    check_close,
    check_compiled,
    check_gradients,
    expected_format,
    largest_error,
    lay_out,
    rand,
    to,
)
from torch.nn import functional as F

import esr_kernels
from esr_kernels.functional import layer_norm2d


@pytest.fixture(params=backends_with("layer_norm2d"))
def backend(request):
    with esr_kernels.use_backend(request.param):
        yield request.param


def plain(x, weight=None, bias=None, eps=1e-6):
    return F.layer_norm(x.permute(0, 2, 3, 1), [x.shape[1]], weight, bias, eps).permute(0, 3, 1, 2)


def weights(channels, dtype=torch.float32):
    return rand(channels, dtype=dtype), rand(channels, dtype=dtype)


def check(backend, x, weight=None, bias=None, eps=1e-6):
    out = layer_norm2d(x, weight, bias, eps=eps)
    assert out.dtype == x.dtype and out.is_contiguous(memory_format=expected_format(x))
    exact = plain(x.double(), *to((weight, bias), torch.float64), eps)
    check_close(out, exact, lambda: plain(x, weight, bias, eps), backend)
    if x.dtype == torch.float32:
        assert largest_error(out, exact) <= 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("channels", [2, 7, 16, 24, 28, 36, 40, 64, 130])
def test_channel_counts(backend, channels, layout):
    torch.manual_seed(channels)
    check(backend, lay_out(rand(2, channels, 9, 19), layout), *weights(channels))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (5, 35), (33, 18)])
def test_sizes_and_layouts(backend, size, layout):
    torch.manual_seed(1)
    x = lay_out(rand(2, 20, *size), layout)
    weight, bias = weights(20)
    check(backend, x, weight, bias, 1e-5)
    check(backend, x, weight)
    check(backend, x, bias=bias)
    check(backend, x)


def test_one_channel_is_its_own_mean(backend):
    assert layer_norm2d(rand(2, 1, 5, 6)).count_nonzero() == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_types(backend, dtype, layout):
    torch.manual_seed(2)
    check(backend, lay_out(rand(2, 28, 9, 20, dtype=dtype), layout), *weights(28, dtype))


def test_large_values(backend):
    """Squares overflow float16, and a mean far from zero cancels in the mean of squares."""
    torch.manual_seed(3)
    check(backend, rand(1, 24, 5, 9, dtype=torch.float16, scale=2000))
    for layout in LAYOUTS[:2]:
        x = lay_out(1000 + rand(1, 24, 5, 9), layout)
        exact = plain(x.double())
        # The input's own rounding is 3e-5 of its deviation; the mean of squares would lose a tenth.
        assert largest_error(layer_norm2d(x), exact) <= 2e-4 * float(exact.abs().max())


def test_constant_channels(backend):
    weight, bias = weights(12)
    x = torch.arange(12.0).view(1, 1, 3, 4).expand(1, 12, 3, 4)
    torch.testing.assert_close(layer_norm2d(x, weight, bias), bias.view(-1, 1, 1).expand(1, 12, 3, 4))


def test_empty_batch(backend):
    assert layer_norm2d(torch.empty(0, 4, 5, 6), *weights(4)).shape == (0, 4, 5, 6)


def test_a_nan_stays_where_it_is(backend):
    for layout in LAYOUTS[:2]:
        x = rand(1, 20, 9, 40)
        x[0, 7, 4, 17] = float("nan")
        nan = layer_norm2d(lay_out(x, layout)).isnan()
        assert nan.sum() == 20 and nan[0, :, 4, 17].all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(backend, layout):
    torch.manual_seed(4)
    for channels in (2, 24, 37):
        tensors = [lay_out(rand(2, channels, 9, 17), layout), *weights(channels)]
        check_gradients(layer_norm2d, plain, tensors)
        check_gradients(layer_norm2d, plain, tensors[:1])
        check_gradients(lambda x, b: layer_norm2d(x, None, b), lambda x, b: plain(x, None, b), tensors[::2])


def test_gradcheck():
    torch.manual_seed(5)
    tensors = [rand(2, 4, 3, 5), *weights(4)]
    assert torch.autograd.gradcheck(layer_norm2d, [t.double().requires_grad_() for t in tensors])


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_opcheck(backend, layout):
    x = lay_out(rand(2, 6, 6, 7), layout)
    for parameters in (weights(6), (None, None)):
        torch.library.opcheck(torch.ops.esr.layer_norm2d.default, (x, *parameters, 1e-6))


def test_opcheck_with_gradients():
    tensors = [t.requires_grad_() for t in (rand(2, 6, 6, 7), *weights(6))]
    torch.library.opcheck(torch.ops.esr.layer_norm2d.default, (*tensors, 1e-6))
    torch.library.opcheck(torch.ops.esr.layer_norm2d.default, (tensors[0], None, None, 1e-6))
    for parameters in (weights(6), (None, None)):
        for mask in ([True] * 3, [False, True, False], [True, False, True]):
            args = (rand(2, 6, 6, 7), rand(2, 6, 6, 7), *parameters, 1e-6, mask)
            torch.library.opcheck(torch.ops.esr.layer_norm2d_backward.default, args)


def test_compile():
    parameters = weights(6)
    check_compiled(layer_norm2d, [(rand(1, 6, *size), *parameters) for size in ((7, 9), (8, 5), (13, 31))])


def test_second_derivative_is_refused():
    w, b = (t.requires_grad_() for t in weights(4))
    (g,) = torch.autograd.grad(layer_norm2d(rand(1, 4, 6, 6), w, b).square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="esr::layer_norm2d has no second derivative"):
        g.sum().backward()


def test_flops():
    for parameters, each in (((None, None), 5), (weights(20), 7)):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            layer_norm2d(rand(2, 20, 6, 7), *parameters)
        assert counter.get_total_flops() == each * 2 * 20 * 42


def test_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer_norm2d(rand(1, 4, 5, 6), *weights(4)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(3)}, ValueError, r"weight: expected shape \[4\] or None, got \[3\]"),
        ({"bias": torch.zeros(4, 1)}, ValueError, r"bias: expected shape \[4\] or None, got \[4, 1\]"),
        ({"weight": torch.zeros(4).half()}, TypeError, "weight: expected the input's dtype torch.float32"),
        ({"eps": -1e-6}, ValueError, "eps: must be at least 0, got -1e-06"),
        ({"x": torch.zeros(4, 8, 8)}, ValueError, r"x: expected 4 dimensions \[N, C, H, W\], got 3"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        layer_norm2d(**{"x": torch.zeros(1, 4, 8, 8)} | change)
