"""depthwise_conv against plain PyTorch in float64."""

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
from esr_kernels.backends.reference._common import activate
from esr_kernels.functional import depthwise_conv
from esr_kernels.library import ACTIVATIONS


@pytest.fixture(params=backends_with("depthwise_conv"))
def backend(request):
    with esr_kernels.use_backend(request.param):
        yield request.param


def plain(x, weight, bias=None, dilation=1, activation="none", negative_slope=0.05, gated=False):
    padding = [dilation * (side // 2) for side in weight.shape[2:]]
    h = F.conv2d(x, weight, bias, padding=padding, dilation=dilation, groups=weight.shape[0])
    a, b = h.chunk(2, 1) if gated else (h, None)
    a = activate(a, activation, negative_slope)
    return a if b is None else a * b


def weights(channels, sides=(3, 3), dtype=torch.float32):
    return rand(channels, 1, *sides, dtype=dtype, scale=(sides[0] * sides[1]) ** -0.5), rand(channels, dtype=dtype)


def check(backend, x, parameters, **settings):
    out = depthwise_conv(x, *parameters, **settings)
    assert out.dtype == x.dtype and out.is_contiguous(memory_format=expected_format(x))
    exact = plain(x.double(), *to(parameters, torch.float64), **settings)
    check_close(out, exact, lambda: plain(x, *parameters, **settings), backend)
    if x.dtype == torch.float32:  # no Winograd here
        assert largest_error(out, exact) <= 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("channels", [2, 14, 36, 72, 144, 254])
def test_channel_counts(backend, channels, gated, layout):
    torch.manual_seed(channels)
    x = lay_out(rand(2, channels, 9, 19), layout)
    check(backend, x, weights(channels), activation="gelu", gated=gated)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("sides", [(1, 1), (3, 3), (5, 5), (7, 7), (5, 3), (3, 5), (3, 1), (1, 3), (7, 1)])
def test_kernels_and_layouts(backend, sides, dilation, layout):
    torch.manual_seed(1)
    check(backend, lay_out(rand(1, 20, 11, 21), layout), weights(20, sides), dilation=dilation, activation="silu")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (2, 2), (5, 35), (33, 18)])
def test_sizes(backend, size, layout):
    torch.manual_seed(2)
    x = lay_out(rand(2, 6, *size), layout)
    check(backend, x, weights(6), activation="relu")
    check(backend, x, weights(6, (5, 7)), dilation=4, gated=True)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend, activation, gated, layout):
    torch.manual_seed(3)
    x = lay_out(rand(1, 10, 6, 13), layout)
    weight, bias = weights(10)
    check(backend, x, (weight, bias), activation=activation, negative_slope=0.2, gated=gated)
    check(backend, x, (weight, None), activation=activation, gated=gated)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_types(backend, dtype, layout):
    torch.manual_seed(4)
    for gated in (False, True):
        x = lay_out(rand(2, 28, 9, 20, dtype=dtype), layout)
        check(backend, x, weights(28, dtype=dtype), activation="gelu", gated=gated)


def test_empty_batch(backend):
    for gated, channels in ((False, 4), (True, 2)):
        assert depthwise_conv(torch.empty(0, 4, 5, 6), *weights(4), gated=gated).shape == (0, channels, 5, 6)


def test_a_nan_stays_where_it_is(backend):
    for layout in LAYOUTS[:2]:
        x = rand(1, 20, 9, 40)
        x[0, 7, 4, 17] = float("nan")
        nan = depthwise_conv(lay_out(x, layout), *weights(20)).isnan()
        assert nan.sum() == 9 and nan[0, 7, 3:6, 16:19].all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(activation, gated):
    torch.manual_seed(5)
    f = lambda *a: depthwise_conv(*a, activation=activation, gated=gated)  # noqa: E731
    tensors = [rand(2, 4, 4, 5), *weights(4)]
    assert torch.autograd.gradcheck(f, [t.double().requires_grad_() for t in tensors])
    for layout in LAYOUTS[:2]:
        tensors = [lay_out(rand(2, 24, 9, 17), layout), *weights(24)]
        check_gradients(f, lambda *a: plain(*a, 1, activation, gated=gated), tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("sides", [(1, 1), (5, 5), (7, 7), (5, 3), (1, 3)])
def test_gradients_of_kernels(backend, sides, dilation, layout):
    torch.manual_seed(6)
    tensors = [lay_out(rand(2, 10, 7, 18), layout), *weights(10, sides)]
    check_gradients(
        lambda *a: depthwise_conv(*a, dilation=dilation, activation="gelu", gated=True),
        lambda *a: plain(*a, dilation, "gelu", gated=True),
        tensors,
    )


@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(backend, layout, gated):
    args = (lay_out(rand(2, 6, 6, 7), layout), *weights(6), 2, "relu", 0.05, gated)
    torch.library.opcheck(torch.ops.esr.depthwise_conv.default, args)


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck_with_gradients(gated):
    tensors = [t.requires_grad_() for t in (rand(2, 6, 6, 7), *weights(6))]
    torch.library.opcheck(torch.ops.esr.depthwise_conv.default, (*tensors, 1, "silu", 0.05, gated))
    for mask in ([True] * 3, [False, True, False], [False, False, True], [True, False, False]):
        grad = rand(2, 3 if gated else 6, 6, 7)
        args = (grad, rand(2, 6, 6, 7), *weights(6), 1, "silu", 0.05, gated, mask)
        torch.library.opcheck(torch.ops.esr.depthwise_conv_backward.default, args)


def test_compile():
    parameters = weights(6)
    f = lambda *a: depthwise_conv(*a, activation="gelu", gated=True)  # noqa: E731
    check_compiled(f, [(rand(1, 6, *size), *parameters) for size in ((7, 9), (8, 5), (13, 31))])


def test_second_derivative_is_refused():
    w, b = (t.requires_grad_() for t in weights(4))
    (g,) = torch.autograd.grad(depthwise_conv(rand(1, 4, 6, 6), w, b).square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="esr::depthwise_conv has no second derivative"):
        g.sum().backward()


def test_flops():
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        depthwise_conv(rand(2, 20, 6, 7), *weights(20, (5, 3)), gated=True)
    assert counter.get_total_flops() == 2 * 2 * 42 * 20 * 15


def test_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert depthwise_conv(rand(1, 4, 5, 6), *weights(4)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"weight": torch.zeros(4, 4, 3, 3)},
            ValueError,
            r"weight: expected shape \[4, 1, KH, KW\] with sides of 1, 3",
        ),
        ({"weight": torch.zeros(5, 1, 3, 3)}, ValueError, r"weight: .* got \[5, 1, 3, 3\]"),
        ({"weight": torch.zeros(4, 1, 3, 4)}, ValueError, r"weight: .* got \[4, 1, 3, 4\]"),
        ({"weight": torch.zeros(4, 1, 9, 3)}, ValueError, r"weight: .* got \[4, 1, 9, 3\]"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias: expected shape \[4\] or None, got \[3\]"),
        ({"dilation": 0}, ValueError, "dilation: must be at least 1, got 0"),
        ({"dilation": 1.0}, TypeError, "dilation: expected an int, got float"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of none, relu"),
        (
            {"x": torch.zeros(1, 3, 8, 8), "weight": torch.zeros(3, 1, 3, 3), "gated": True},
            ValueError,
            "x: a gate needs an even number of channels, got 3",
        ),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": torch.zeros(1, 4, 8, 8), "weight": torch.zeros(4, 1, 3, 3)} | change
    with pytest.raises(error, match=message):
        depthwise_conv(**arguments)
