"""spab, SPAN's block, against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    HALF,
    LAYOUTS,
    check_close,
    check_compiled,
    check_gradients,
    expected_format,
    kernel,
    lay_out,
    rand,
    to,
)
from torch.nn import functional as F

from esr_kernels.functional import spab


def plain(x, w1, b1, w2, b2, w3, b3):
    mid = F.silu(F.conv2d(x, w1, b1, padding=1))
    h = F.conv2d(F.silu(F.conv2d(mid, w2, b2, padding=1)), w3, b3, padding=1)
    return (h + x) * (torch.sigmoid(h) - 0.5), mid


def weights(channels, mid=None, last=None, bias=True, dtype=torch.float32):
    mid, last = mid or channels, last or channels
    shapes = ((mid, channels), (last, mid), (channels, last))
    result = []
    for out, c in shapes:
        result += [kernel(out, c, dtype=dtype), rand(out, dtype=dtype) if bias else None]
    return result


def check(backend, x, parameters):
    out, mid = spab(x, *parameters, return_mid=True)
    exact, exact_mid = plain(x.double(), *to(parameters, torch.float64))
    for got, expected, i in ((out, exact, 0), (mid, exact_mid, 1)):
        assert got.dtype == x.dtype and got.is_contiguous(memory_format=expected_format(x))
        check_close(got, expected, lambda i=i: plain(x, *parameters)[i], backend)
    assert torch.equal(spab(x, *parameters), out)


@pytest.mark.parametrize("channels", [3, 20, 26, 28, 32, 48, 52])
def test_channel_counts(backend, channels):
    torch.manual_seed(channels)
    check(backend, rand(2, channels, 11, 14), weights(channels))


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 41), (33, 18)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_and_layouts(backend, size, layout):
    """Small images: positions outside must be zero for the second and third convolution too."""
    torch.manual_seed(0)
    check(backend, lay_out(rand(2, 28, *size), layout), weights(28))
    check(backend, lay_out(rand(1, 28, *size), layout), weights(28, 20, 36, bias=False))


@pytest.mark.parametrize("dtype", HALF)
def test_half_types(backend, dtype):
    torch.manual_seed(1)
    x = ((torch.rand(2, 28, 13, 17) - 0.5) * 255).to(dtype)
    check(backend, x, weights(28, dtype=dtype))


def test_empty_batch(backend):
    out, mid = spab(torch.empty(0, 28, 5, 6), *weights(28, 20), return_mid=True)
    assert out.shape == (0, 28, 5, 6) and mid.shape == (0, 20, 5, 6)


@pytest.mark.parametrize("return_mid", [False, True])
def test_gradcheck(return_mid):
    torch.manual_seed(2)
    tensors = [t.double().requires_grad_() for t in (rand(2, 3, 4, 5), *weights(3, 4, 2))]
    assert torch.autograd.gradcheck(lambda *a: spab(*a, return_mid=return_mid), tensors)


def test_gradients():
    torch.manual_seed(3)
    tensors = [lay_out(rand(2, 28, 9, 8), "channels_last"), *weights(28)]
    check_gradients(lambda *a: spab(*a, return_mid=True), plain, tensors)
    check_gradients(spab, lambda *a: plain(*a)[0], tensors)


def test_gradient_through_mid_alone():
    tensors = [rand(1, 5, 6, 6), *weights(5)]
    x = tensors[0].requires_grad_()
    spab(*tensors, return_mid=True)[1].sum().backward()
    expected = tensors[0].detach().double().requires_grad_()
    plain(expected, *to(tensors[1:], torch.float64))[1].sum().backward()
    torch.testing.assert_close(x.grad.double(), expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("return_mid", [False, True])
def test_opcheck(backend, layout, return_mid):
    x = lay_out(rand(2, 5, 6, 7), layout)
    torch.library.opcheck(torch.ops.esr.spab.default, (x, *weights(5, 4), return_mid))


@pytest.mark.parametrize("return_mid", [False, True])
def test_opcheck_with_gradients(return_mid):
    tensors = [t.requires_grad_() for t in (rand(2, 5, 6, 7), *weights(5, 4))]
    torch.library.opcheck(torch.ops.esr.spab.default, (*tensors, return_mid))


@pytest.mark.parametrize("with_mid", [False, True])
def test_opcheck_backward(with_mid):
    grad_mid = rand(2, 4, 6, 7) if with_mid else None
    args = (rand(2, 5, 6, 7), grad_mid, rand(2, 5, 6, 7), *weights(5, 4), [True, False, True, True, True, True, False])
    torch.library.opcheck(torch.ops.esr.spab_backward.default, args)


def test_compile():
    parameters = weights(6)
    check_compiled(spab, [(rand(1, 6, *size), *parameters) for size in ((7, 9), (8, 5), (13, 31))])


def test_second_derivative_is_refused():
    x = rand(1, 4, 6, 6).requires_grad_()
    (g,) = torch.autograd.grad(spab(x, *weights(4)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="esr::spab has no second derivative"):
        g.sum().backward()


def test_flops():
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        spab(rand(2, 28, 6, 7), *weights(28, 20))
    assert counter.get_total_flops() == 2 * 2 * 9 * 42 * (28 * 20 + 20 * 28 + 28 * 28)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(1, 4, 8)}, "x: expected 4 dimensions"),
        ({3: torch.zeros(4, 9, 3, 3)}, r"w2: expected shape \[O, 4, 3, 3\]"),
        ({5: torch.zeros(9, 4, 3, 3), 6: None}, r"w3: the block returns as many channels as x has \(4\), got 9"),
        ({4: torch.zeros(1)}, r"b2: expected shape \[4\]"),
    ],
)
def test_errors(change, message):
    arguments = [torch.zeros(1, 4, 8, 8), *weights(4)]
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(ValueError, match=message):
        spab(*arguments)
