"""conv3x3_pixel_shuffle, the tail of most networks, against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import HALF, LAYOUTS, check_close, check_compiled, check_gradients, kernel, lay_out, rand, to
from torch.nn import functional as F

from esr_kernels.functional import conv3x3_pixel_shuffle


def plain(x, weight, bias, residual, r):
    out = F.pixel_shuffle(F.conv2d(x, weight, bias, padding=1), r)
    return out if residual is None else out + residual


def check(backend, x, weight, bias, residual, r):
    out = conv3x3_pixel_shuffle(x, weight, bias, upscale_factor=r, residual=residual)
    assert out.dtype == x.dtype and out.is_contiguous()
    exact = plain(*to([x, weight, bias, residual], torch.float64), r)
    check_close(out, exact, lambda: plain(x, weight, bias, residual, r), backend)


@pytest.mark.parametrize("r", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [3, 26, 28, 46, 64])
def test_factors_and_channel_counts(backend, r, channels):
    torch.manual_seed(r)
    for colours in (1, 3, 4):
        out = colours * r * r
        residual = rand(2, colours, 9 * r, 10 * r) if colours == 3 else None
        check(backend, rand(2, channels, 9, 10), kernel(out, channels), rand(out), residual, r)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 2), (17, 23)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_and_layouts(backend, size, layout):
    torch.manual_seed(0)
    x = lay_out(rand(2, 28, *size), layout)
    residual = lay_out(rand(2, 3, size[0] * 4, size[1] * 4), layout)
    check(backend, x, kernel(48, 28), None, residual, 4)


@pytest.mark.parametrize("dtype", HALF)
def test_half_types(backend, dtype):
    torch.manual_seed(1)
    x = rand(2, 28, 9, 10, dtype=dtype)
    check(backend, x, kernel(48, 28, dtype=dtype), rand(48, dtype=dtype), rand(2, 3, 36, 40, dtype=dtype), 4)


def test_empty_batch(backend):
    out = conv3x3_pixel_shuffle(torch.empty(0, 28, 5, 6), kernel(48, 28), upscale_factor=4)
    assert out.shape == (0, 3, 20, 24)


def test_gradcheck():
    tensors = [rand(2, 3, 4, 5), kernel(8, 3), rand(8), rand(2, 2, 8, 10)]
    tensors = [t.double().requires_grad_() for t in tensors]
    f = lambda x, w, b, r: conv3x3_pixel_shuffle(x, w, b, residual=r, upscale_factor=2)  # noqa: E731
    assert torch.autograd.gradcheck(f, tensors)


def test_gradients():
    tensors = [lay_out(rand(2, 28, 7, 6), "channels_last"), kernel(48, 28), rand(48), rand(2, 3, 28, 24)]
    f = lambda x, w, b, r: conv3x3_pixel_shuffle(x, w, b, residual=r, upscale_factor=4)  # noqa: E731
    check_gradients(f, lambda *a: plain(*a, 4), tensors)


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_opcheck(backend, layout):
    args = (lay_out(rand(2, 5, 6, 7), layout), kernel(8, 5), rand(8), rand(2, 2, 12, 14), 2)
    torch.library.opcheck(torch.ops.esr.conv3x3_pixel_shuffle.default, args)


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_opcheck_with_gradients(layout):
    x = lay_out(rand(2, 5, 6, 7), layout)
    tensors = [t.requires_grad_() for t in (x, kernel(8, 5), rand(8), rand(2, 2, 12, 14))]
    torch.library.opcheck(torch.ops.esr.conv3x3_pixel_shuffle.default, (*tensors, 2))
    args = (rand(2, 2, 12, 14), x.detach(), kernel(8, 5), None, 2, [True, True, True, True])
    torch.library.opcheck(torch.ops.esr.conv3x3_pixel_shuffle_backward.default, args)


def test_compile():
    weight, bias = kernel(12, 6), rand(12)
    f = lambda x, w, b: conv3x3_pixel_shuffle(x, w, b, upscale_factor=2)  # noqa: E731
    check_compiled(f, [(rand(1, 6, *size), weight, bias) for size in ((7, 9), (8, 5), (13, 31))])


def test_second_derivative_is_refused():
    weight = kernel(8, 4).requires_grad_()
    out = conv3x3_pixel_shuffle(rand(1, 4, 6, 6).requires_grad_(), weight, upscale_factor=2)
    (g,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="esr::conv3x3_pixel_shuffle has no second derivative"):
        g.sum().backward()


def test_flops():
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        conv3x3_pixel_shuffle(rand(2, 28, 6, 7), kernel(48, 28), upscale_factor=4)
    assert counter.get_total_flops() == 2 * 2 * 9 * 42 * 28 * 48


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"upscale_factor": 3}, ValueError, "upscale_factor: must be at least 1 and its square must divide"),
        ({"upscale_factor": 0}, ValueError, "upscale_factor: must be at least 1"),
        ({"upscale_factor": 2.0}, TypeError, "upscale_factor: expected an int, got float"),
        ({"residual": torch.zeros(1, 2, 8, 8)}, ValueError, r"residual: expected shape \[1, 2, 16, 16\]"),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": torch.zeros(1, 3, 8, 8), "weight": torch.zeros(8, 3, 3, 3), "upscale_factor": 2} | change
    with pytest.raises(error, match=message):
        conv3x3_pixel_shuffle(**arguments)
