"""bsconv against plain PyTorch in float64."""

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

from esr_kernels.functional import bsconv
from esr_kernels.library import PADDING_MODES, SUM_MODES


def plain(x, pointwise, depthwise, bias=None, padding_mode="zeros"):
    t = F.conv2d(x, pointwise)
    t = F.pad(t, (1, 1, 1, 1), mode="reflect" if padding_mode == "reflect" else "constant")
    return F.conv2d(t, depthwise, bias, groups=depthwise.shape[0])


def weights(channels, out, dtype=torch.float32):
    return kernel(out, channels, 1, dtype=dtype), kernel(out, 1, dtype=dtype), rand(out, dtype=dtype)


def check(backend, x, parameters, padding_mode):
    out = bsconv(x, *parameters, padding_mode=padding_mode, activation="gelu")
    assert out.dtype == x.dtype and out.is_contiguous(memory_format=expected_format(x))
    exact = F.gelu(plain(x.double(), *to(parameters, torch.float64), padding_mode))
    check_close(out, exact, lambda: F.gelu(plain(x, *parameters, padding_mode)), backend)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize(("channels", "out"), [(12, 28), (28, 28), (36, 36), (48, 48), (24, 24), (3, 5)])
def test_channel_counts(backend, padding_mode, channels, out):
    torch.manual_seed(out)
    check(backend, rand(2, channels, 9, 12), weights(channels, out), padding_mode)


@pytest.mark.parametrize("size", [(2, 2), (2, 9), (7, 3), (33, 18)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_and_layouts(backend, size, layout):
    torch.manual_seed(0)
    for padding_mode in PADDING_MODES:
        check(backend, lay_out(rand(2, 20, *size), layout), weights(20, 21), padding_mode)


def with_residual(x, pointwise, depthwise, bias, residual, padding_mode, mode):
    h = plain(x, pointwise, depthwise, bias, padding_mode)
    return F.gelu(h + residual) if mode == "pre" else F.gelu(h) + residual


@pytest.mark.parametrize("mode", SUM_MODES)
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
@pytest.mark.parametrize("size", [(2, 2), (7, 3), (33, 18)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_residuals(backend, layout, size, padding_mode, mode):
    torch.manual_seed(3)
    x, parameters = lay_out(rand(2, 20, *size), layout), weights(20, 21)
    for residual_layout in {layout, "nchw"}:
        residual = lay_out(rand(2, 21, *size), residual_layout)
        options = {"padding_mode": padding_mode, "activation": "gelu", "residual": residual, "residual_mode": mode}
        out = bsconv(x, *parameters, **options)
        assert out.is_contiguous(memory_format=expected_format(x))
        exact = with_residual(*to([x, *parameters, residual], torch.float64), padding_mode, mode)
        check_close(out, exact, lambda r=residual: with_residual(x, *parameters, r, padding_mode, mode), backend)


@pytest.mark.parametrize("mode", SUM_MODES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_residual_that_is_the_input(backend, dtype, mode):
    x, parameters = rand(2, 24, 9, 12, dtype=dtype), weights(24, 24, dtype=dtype)
    out = bsconv(x, *parameters, padding_mode="reflect", activation="gelu", residual=x, residual_mode=mode)
    exact = with_residual(*to([x, *parameters, x], torch.float64), "reflect", mode)
    check_close(out, exact, lambda: with_residual(x, *parameters, x, "reflect", mode), backend)


@pytest.mark.parametrize("mode", SUM_MODES)
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_gradients_with_a_residual(backend, padding_mode, mode):
    torch.manual_seed(4)
    tensors = [lay_out(rand(2, 24, 9, 7), "channels_last"), *weights(24, 20), rand(2, 20, 9, 7)]

    def fused(x, p, d, b, r):
        epilogue = {"activation": "gelu", "residual": r, "residual_mode": mode}
        return bsconv(x, p, d, b, padding_mode=padding_mode, **epilogue)

    check_gradients(fused, lambda *a: with_residual(*a, padding_mode, mode), tensors)


def test_single_pixel(backend):
    check(backend, rand(1, 4, 1, 1), weights(4, 4), "zeros")


@pytest.mark.parametrize("dtype", HALF)
def test_half_types(backend, dtype):
    torch.manual_seed(1)
    check(backend, rand(2, 28, 9, 12, dtype=dtype), weights(28, 28, dtype=dtype), "reflect")


def test_empty_batch(backend):
    for padding_mode in PADDING_MODES:
        out = bsconv(torch.empty(0, 4, 5, 6), *weights(4, 6), padding_mode=padding_mode)
        assert out.shape == (0, 6, 5, 6)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_gradients(padding_mode):
    torch.manual_seed(2)
    tensors = [rand(2, 3, 4, 5), *weights(3, 4)]
    f = lambda *a: bsconv(*a, padding_mode=padding_mode, activation="silu")  # noqa: E731
    assert torch.autograd.gradcheck(f, [t.double().requires_grad_() for t in tensors])
    tensors = [lay_out(rand(2, 24, 9, 7), "channels_last"), *weights(24, 24)]
    check_gradients(f, lambda *a: F.silu(plain(*a, padding_mode)), tensors)


@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_opcheck(backend, layout, padding_mode):
    args = (lay_out(rand(2, 5, 6, 7), layout), *weights(5, 4), padding_mode, "relu", 0.05)
    torch.library.opcheck(torch.ops.esr.bsconv.default, args)


@pytest.mark.parametrize("padding_mode", PADDING_MODES)
def test_opcheck_with_gradients(padding_mode):
    tensors = [t.requires_grad_() for t in (rand(2, 5, 6, 7), *weights(5, 4))]
    torch.library.opcheck(torch.ops.esr.bsconv.default, (*tensors, padding_mode, "relu", 0.05))
    for mask in ([True] * 4, [False, True, False, True]):
        args = (rand(2, 4, 6, 7), rand(2, 5, 6, 7), *weights(5, 4), padding_mode, "relu", 0.05, mask)
        torch.library.opcheck(torch.ops.esr.bsconv_backward.default, args)
        args = (*args[:-1], [*mask, True], rand(2, 4, 6, 7))
        torch.library.opcheck(torch.ops.esr.bsconv_backward.default, args)
    residual = rand(2, 4, 6, 7).requires_grad_()
    for mode in SUM_MODES:
        args = (*tensors, padding_mode, "silu", 0.05, residual, mode)
        torch.library.opcheck(torch.ops.esr.bsconv.default, args)


def test_compile():
    parameters = weights(6, 6)
    f = lambda *a: bsconv(*a, padding_mode="reflect", activation="gelu")  # noqa: E731
    check_compiled(f, [(rand(1, 6, *size), *parameters) for size in ((7, 9), (8, 5), (13, 31))])
    f = lambda *a: bsconv(*a[:-1], activation="gelu", residual=a[-1], residual_mode="pre")  # noqa: E731
    sizes = ((7, 9), (8, 5), (13, 31))
    check_compiled(f, [(rand(1, 6, *size), *parameters, rand(1, 6, *size)) for size in sizes])


def test_second_derivative_is_refused():
    p, d, b = (t.requires_grad_() for t in weights(4, 4))
    (g,) = torch.autograd.grad(bsconv(rand(1, 4, 6, 6), p, d, b).square().sum(), p, create_graph=True)
    with pytest.raises(RuntimeError, match="esr::bsconv has no second derivative"):
        g.sum().backward()


def test_flops():
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        bsconv(rand(2, 20, 6, 7), *weights(20, 28))
    assert counter.get_total_flops() == 2 * 2 * 42 * (20 * 28 + 9 * 28)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padding_mode": "circular"}, "padding_mode: expected one of zeros, reflect, got 'circular'"),
        ({"depthwise": torch.zeros(4, 4, 3, 3)}, r"depthwise: expected shape \[4, 1, 3, 3\], got \[4, 4, 3, 3\]"),
        ({"depthwise": torch.zeros(5, 1, 3, 3)}, r"depthwise: expected shape \[4, 1, 3, 3\], got \[5, 1, 3, 3\]"),
        ({"pointwise": torch.zeros(4, 3, 3, 3)}, r"pointwise: expected shape \[O, 3, 1, 1\]"),
        ({"residual": torch.zeros(1, 3, 8, 8)}, r"residual: expected shape \[1, 4, 8, 8\], got \[1, 3, 8, 8\]"),
        ({"residual_mode": "attention"}, "residual_mode: expected one of pre, post, got 'attention'"),
        (
            {"x": torch.zeros(1, 3, 1, 8), "padding_mode": "reflect"},
            'x: padding_mode "reflect" needs images of at least 2 x 2 pixels, got 1 x 8',
        ),
    ],
)
def test_errors(change, message):
    arguments = {
        "x": torch.zeros(1, 3, 8, 8),
        "pointwise": torch.zeros(4, 3, 1, 1),
        "depthwise": torch.zeros(4, 1, 3, 3),
    } | change
    with pytest.raises(ValueError, match=message):
        bsconv(**arguments)
