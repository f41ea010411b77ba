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
from esr_kernels.library import ACTIVATIONS, SUM_MODES


def plain(xs, weight, bias=None, *, activation="none", negative_slope=0.05, residual=None, residual_mode="post"):
    h = F.conv2d(torch.cat(xs, 1), weight, bias)
    h = act(h if residual is None or residual_mode == "post" else h + residual, activation, negative_slope)
    return h if residual is None or residual_mode == "pre" else h + residual


def act(h, name, slope):
    functions = {
        "none": lambda t: t,
        "relu": F.relu,
        "leaky_relu": lambda t: F.leaky_relu(t, slope),
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    }
    return functions[name](h)


def check(backend, xs, weight, bias, **options):
    out = conv1x1(xs, weight, bias, **options)
    assert out.dtype == xs[0].dtype and out.is_contiguous(memory_format=expected_format(xs[0]))
    exact = plain(*to([list(xs), weight, bias], torch.float64), **to(options, torch.float64))
    check_close(out, exact, lambda: plain(xs, weight, bias, **options), backend)


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


@pytest.mark.parametrize("mode", [None, *SUM_MODES])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(backend, activation, mode):
    torch.manual_seed(0)
    residual = None if mode is None else rand(1, 12, 8, 9)
    options = {"activation": activation, "negative_slope": 0.1, "residual": residual, "residual_mode": mode or "post"}
    xs, weight = [rand(1, 5, 8, 9), rand(1, 6, 8, 9)], kernel(12, 11, 1) * 3
    check(backend, xs, weight, rand(12), **options)
    check(backend, xs, weight, None, **options)


@pytest.mark.parametrize("mode", SUM_MODES)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (9, 11), (33, 47)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_residuals_of_every_layout(backend, layout, size, mode):
    torch.manual_seed(1)
    for channels, out in (((28,), 28), ((46,), 16), ((5, 4, 3), 21), ((7,) * 10, 37)):
        xs = [lay_out(rand(2, c, *size), layout) for c in channels]
        for residual_layout in {layout, "nchw", "channels_last"}:
            residual = lay_out(rand(2, out, *size), residual_layout)
            options = {"activation": "silu", "residual": residual, "residual_mode": mode}
            check(backend, xs, kernel(out, sum(channels), 1), rand(out), **options)


def test_a_residual_that_is_an_input(backend):
    x = rand(2, 36, 9, 11)
    check(backend, [x], kernel(36, 36, 1), None, residual=x)


@pytest.mark.parametrize("dtype", HALF)
def test_half_types(backend, dtype):
    torch.manual_seed(1)
    xs = [rand(2, 28, 9, 11, dtype=dtype, scale=20) for _ in range(4)]
    check(backend, xs, kernel(28, 112, 1, dtype=dtype), rand(28, dtype=dtype))
    for mode in SUM_MODES:
        options = {"residual": rand(2, 28, 9, 11, dtype=dtype), "residual_mode": mode, "activation": "gelu"}
        check(backend, xs[:1], kernel(28, 28, 1, dtype=dtype), rand(28, dtype=dtype), **options)


def test_single_tensor_is_a_list_of_one(backend):
    x, weight = rand(1, 7, 5, 5), kernel(3, 7, 1)
    assert torch.equal(conv1x1(x, weight), conv1x1([x], weight))


def test_empty_batch(backend):
    xs = [torch.empty(0, 3, 5, 6, requires_grad=True), torch.empty(0, 2, 5, 6)]
    residual, weight = torch.empty(0, 4, 5, 6, requires_grad=True), kernel(4, 5, 1).requires_grad_()
    assert conv1x1(xs, weight).shape == (0, 4, 5, 6)
    for mode in SUM_MODES:
        out = conv1x1(xs, weight, activation="relu", residual=residual, residual_mode=mode)
        to_x, to_weight, to_residual = torch.autograd.grad(out.sum(), (xs[0], weight, residual))
        assert to_x.shape == xs[0].shape and to_residual.shape == residual.shape
        assert to_weight.shape == weight.shape and not to_weight.any()


@pytest.mark.parametrize("mode", [None, *SUM_MODES])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gradcheck(activation, mode):
    tensors = [rand(2, 3, 4, 5), rand(2, 2, 4, 5), kernel(4, 5, 1), rand(4)]
    tensors += [] if mode is None else [rand(2, 4, 4, 5)]
    tensors = [t.double().requires_grad_() for t in tensors]
    options = {} if mode is None else {"residual_mode": mode}
    fused = lambda x, y, w, b, r=None: conv1x1([x, y], w, b, activation=activation, residual=r, **options)  # noqa: E731
    assert torch.autograd.gradcheck(fused, tensors)


@pytest.mark.parametrize("mode", [None, *SUM_MODES])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_gradients(backend, activation, mode):
    tensors = [lay_out(rand(2, 28, 7, 6), "channels_last"), rand(2, 20, 7, 6), kernel(16, 48, 1), rand(16)]
    tensors += [] if mode is None else [rand(2, 16, 7, 6)]
    options = {"activation": activation, "residual_mode": mode or "post"}
    fused = lambda x, y, w, b, r=None: conv1x1([x, y], w, b, residual=r, **options)  # noqa: E731
    check_gradients(fused, lambda x, y, w, b, r=None: plain([x, y], w, b, residual=r, **options), tensors)


@pytest.mark.parametrize("mode", SUM_MODES)
def test_gradient_to_the_residual_alone(backend, mode):
    x, weight, residual = rand(1, 3, 5, 5), kernel(4, 3, 1), rand(1, 4, 5, 5).requires_grad_()
    conv1x1(x, weight, activation="silu", residual=residual, residual_mode=mode).sum().backward()
    exact = residual.detach().double().requires_grad_()
    plain([x.double()], weight.double(), activation="silu", residual=exact, residual_mode=mode).sum().backward()
    torch.testing.assert_close(residual.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_a_residual_is_kept_only_where_the_derivative_needs_it():
    """What is added after the activation, or where there is none, costs a training step no memory."""
    x, weight, residual = rand(1, 3, 5, 5), kernel(4, 3, 1).requires_grad_(), rand(1, 4, 5, 5)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t)
    for activation, mode, keeps in (("silu", "post", False), ("none", "pre", False), ("silu", "pre", True)):
        kept.clear()
        with hooks:
            conv1x1(x, weight, activation=activation, residual=residual, residual_mode=mode)
        assert (residual.data_ptr() in kept) == keeps


def test_only_wanted_gradients_are_computed():
    x, y, weight = rand(1, 3, 5, 5), rand(1, 2, 5, 5).requires_grad_(), kernel(4, 5, 1)
    conv1x1([x, y], weight).sum().backward()
    assert x.grad is None and weight.grad is None and y.grad.shape == y.shape


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_opcheck(backend, layout):
    xs = [lay_out(rand(2, c, 6, 7), layout) for c in (5, 3)]
    torch.library.opcheck(torch.ops.esr.conv1x1.default, (xs, kernel(4, 8, 1), rand(4), "silu", 0.05))
    epilogue = ("silu", 0.05, rand(2, 4, 6, 7), "pre")
    torch.library.opcheck(torch.ops.esr.conv1x1.default, (xs, kernel(4, 8, 1), rand(4), *epilogue))


def test_opcheck_with_gradients():
    xs = [rand(2, c, 6, 7).requires_grad_() for c in (5, 3)]
    weight, bias = kernel(4, 8, 1).requires_grad_(), rand(4).requires_grad_()
    torch.library.opcheck(torch.ops.esr.conv1x1.default, (xs, weight, bias, "silu", 0.05))
    residual = rand(2, 4, 6, 7).requires_grad_()
    for mode in SUM_MODES:
        torch.library.opcheck(torch.ops.esr.conv1x1.default, (xs, weight, bias, "silu", 0.05, residual, mode))
    args = (rand(2, 4, 6, 7), [x.detach() for x in xs], weight.detach(), None, "gelu", 0.05, [True, False, True, True])
    torch.library.opcheck(torch.ops.esr.conv1x1_backward.default, args)
    for wanted in (True, False):
        mask = [True, False, True, True, wanted]
        torch.library.opcheck(torch.ops.esr.conv1x1_backward.default, (*args[:-1], mask, residual.detach()))


def test_compile():
    weight, bias = kernel(4, 12, 1), rand(4)
    f = lambda x, w, b: conv1x1([x, x * 2], w, b, activation="relu")  # noqa: E731
    check_compiled(f, [(rand(1, 6, *size), weight, bias) for size in ((7, 9), (8, 5), (13, 31))])
    for mode in SUM_MODES:
        f = lambda x, w, b, r: conv1x1([x, x * 2], w, b, activation="silu", residual=r, residual_mode=mode)  # noqa: B023, E731
        sizes = ((7, 9), (8, 5), (13, 31))
        check_compiled(f, [(rand(1, 6, *size), weight, bias, rand(1, 4, *size)) for size in sizes])


def test_second_derivative_is_refused():
    weight = kernel(4, 4, 1).requires_grad_()
    (g,) = torch.autograd.grad(conv1x1(rand(1, 4, 6, 6), weight).square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="esr::conv1x1 has no second derivative"):
        g.sum().backward()


def test_flops():
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        conv1x1([rand(2, 28, 6, 7)] * 4, kernel(28, 112, 1), residual=rand(2, 28, 6, 7))
    assert counter.get_total_flops() == 2 * 2 * 42 * 112 * 28
    forward = 2 * 2 * 42 * 112 * 28
    xs, weight = [rand(2, 28, 6, 7).requires_grad_() for _ in range(4)], kernel(28, 112, 1).requires_grad_()
    residual = rand(2, 28, 6, 7).requires_grad_()
    out = conv1x1(xs, weight, activation="silu", residual=residual, residual_mode="pre")
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 3 * forward


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"residual": torch.zeros(1, 2, 4, 4)}, ValueError, r"residual: expected shape \[1, 4, 4, 4\]"),
        ({"residual": torch.zeros(1, 4, 4, 4).half()}, TypeError, "residual: expected the input's dtype torch.float32"),
        ({"residual": 3}, TypeError, "residual: expected a torch.Tensor, got int"),
        ({"residual_mode": "attention"}, ValueError, "residual_mode: expected one of pre, post, got 'attention'"),
    ],
)
def test_errors_of_residuals(options, error, message):
    with pytest.raises(error, match=message):
        conv1x1(torch.zeros(1, 2, 4, 4), torch.zeros(4, 2, 1, 1), **options)
