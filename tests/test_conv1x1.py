"""conv1x1 over a list of tensors against plain PyTorch in float64."""

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

from esr_kernels.functional import conv1x1
from esr_kernels.library import ACTIVATIONS


def plain(xs, weight, bias=None, activation=None):
    h = F.conv2d(torch.cat(xs, 1), weight, bias)
    return h if activation is None else activation(h)


def check(backend, xs, weight, bias):
    out = conv1x1(xs, weight, bias)
    assert out.dtype == xs[0].dtype and out.is_contiguous(memory_format=expected_format(xs[0]))
    exact = plain(*to([list(xs), weight, bias], torch.float64))
    check_close(out, exact, lambda: plain(xs, weight, bias), backend)


@pytest.mark.parametrize("channels", [(28, 28, 28, 28), (46,), (3, 20, 7), (1, 1), (36,) * 6, (50, 50, 50, 50), (9,)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_channel_counts_and_layouts(backend, channels, layout):
    torch.manual_seed(len(channels))
    xs = [lay_out(rand(2, c, 9, 11), layout) for c in channels]
    for out in (1, 16, 28, 46):
        check(backend, xs, kernel(out, sum(channels), 1), rand(out) if out % 2 == 0 else None)


def test_mixed_layouts(backend):
    xs = [lay_out(rand(2, 5, 9, 11), layout) for layout in LAYOUTS]
    check(backend, xs, kernel(6, 20, 1), rand(6))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (33, 47)])
def test_sizes(backend, size):
    check(backend, [rand(3, 28, *size), rand(3, 4, *size)], kernel(28, 32, 1), rand(28))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend, activation):
    torch.manual_seed(0)
    xs, weight, bias = [rand(1, 5, 8, 9), rand(1, 6, 8, 9)], kernel(12, 11, 1) * 3, rand(12)
    functions = {
        "none": lambda t: t,
        "relu": F.relu,
        "leaky_relu": lambda t: F.leaky_relu(t, 0.1),
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    }
    out = conv1x1(xs, weight, bias, activation=activation, negative_slope=0.1)
    exact = plain(*to([xs, weight, bias], torch.float64), functions[activation])
    check_close(out, exact, lambda: plain(xs, weight, bias, functions[activation]), backend)


@pytest.mark.parametrize("dtype", HALF)
def test_half_types(backend, dtype):
    torch.manual_seed(1)
    xs = [rand(2, 28, 9, 11, dtype=dtype, scale=20) for _ in range(4)]
    check(backend, xs, kernel(28, 112, 1, dtype=dtype), rand(28, dtype=dtype))


def test_single_tensor_is_a_list_of_one(backend):
    x, weight = rand(1, 7, 5, 5), kernel(3, 7, 1)
    assert torch.equal(conv1x1(x, weight), conv1x1([x], weight))


def test_empty_batch(backend):
    assert conv1x1([torch.empty(0, 3, 5, 6), torch.empty(0, 2, 5, 6)], kernel(4, 5, 1)).shape == (0, 4, 5, 6)


def test_gradcheck():
    tensors = [t.double().requires_grad_() for t in (rand(2, 3, 4, 5), rand(2, 2, 4, 5), kernel(4, 5, 1), rand(4))]
    assert torch.autograd.gradcheck(lambda x, y, w, b: conv1x1([x, y], w, b, activation="gelu"), tensors)


def test_gradients():
    tensors = [lay_out(rand(2, 28, 7, 6), "channels_last"), rand(2, 20, 7, 6), kernel(16, 48, 1), rand(16)]
    fused = lambda x, y, w, b: conv1x1([x, y], w, b, activation="silu")  # noqa: E731
    check_gradients(fused, lambda x, y, w, b: plain([x, y], w, b, F.silu), tensors)


def test_only_wanted_gradients_are_computed():
    x, y, weight = rand(1, 3, 5, 5), rand(1, 2, 5, 5).requires_grad_(), kernel(4, 5, 1)
    conv1x1([x, y], weight).sum().backward()
    assert x.grad is None and weight.grad is None and y.grad.shape == y.shape


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_opcheck(backend, layout):
    xs = [lay_out(rand(2, c, 6, 7), layout) for c in (5, 3)]
    torch.library.opcheck(torch.ops.esr.conv1x1.default, (xs, kernel(4, 8, 1), rand(4), "silu", 0.05))


def test_opcheck_with_gradients():
    xs = [rand(2, c, 6, 7).requires_grad_() for c in (5, 3)]
    weight, bias = kernel(4, 8, 1).requires_grad_(), rand(4).requires_grad_()
    torch.library.opcheck(torch.ops.esr.conv1x1.default, (xs, weight, bias, "silu", 0.05))
    args = (rand(2, 4, 6, 7), [x.detach() for x in xs], weight.detach(), None, "gelu", 0.05, [True, False, True, True])
    torch.library.opcheck(torch.ops.esr.conv1x1_backward.default, args)


def test_compile():
    weight, bias = kernel(4, 12, 1), rand(4)
    f = lambda x, w, b: conv1x1([x, x * 2], w, b, activation="relu")  # noqa: E731
    check_compiled(f, [(rand(1, 6, *size), weight, bias) for size in ((7, 9), (8, 5), (13, 31))])


def test_second_derivative_is_refused():
    weight = kernel(4, 4, 1).requires_grad_()
    (g,) = torch.autograd.grad(conv1x1(rand(1, 4, 6, 6), weight).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="esr::conv1x1 has no second derivative"):
        g.sum().backward()


def test_flops():
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        conv1x1([rand(2, 28, 6, 7)] * 4, kernel(28, 112, 1))
    assert counter.get_total_flops() == 2 * 2 * 42 * 112 * 28


@pytest.mark.parametrize(
    ("xs", "error", "message"),
    [
        ([], ValueError, "xs: expected at least one tensor, got none"),
        ([torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 5)], ValueError, r"xs\[1\]: expected shape \[1, 2, 4, 4\]"),
        ([torch.zeros(1, 2, 4, 4), 3], TypeError, r"xs\[1\]: expected a torch.Tensor, got int"),
        ([torch.zeros(1, 2, 4, 4)], ValueError, r"weight: expected shape \[O, 2, 1, 1\], got \[4, 4, 1, 1\]"),
    ],
)
def test_errors(xs, error, message):
    with pytest.raises(error, match=message):
        conv1x1(xs, torch.zeros(4, 4, 1, 1))
