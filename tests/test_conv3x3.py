"""conv3x3 against plain PyTorch in float64."""

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

import esr_kernels
from esr_kernels.functional import conv3x3
from esr_kernels.library import ACTIVATIONS, RESIDUAL_MODES

# Channel counts of 3x3 convolutions in the published checkpoints, and 52 of the wider world.
CHANNELS = (2, 3, 4, 8, 9, 12, 16, 20, 21, 24, 26, 28, 30, 32, 36, 37, 38, 40, 44, 46, 48, 52, 60, 64, 84)
SIZES = ((1, 1), (1, 7), (5, 1), (2, 5), (17, 23), (33, 47))


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


def plain(x, weight, bias=None, *, activation="none", negative_slope=0.05, residual=None, residual_mode="post"):
    h = F.conv2d(x, weight, bias, padding=1)
    if residual is None:
        return act(h, activation, negative_slope)
    if residual_mode == "pre":
        return act(h + residual, activation, negative_slope)
    if residual_mode == "post":
        return act(h, activation, negative_slope) + residual
    return (h + residual) * (torch.sigmoid(h) - 0.5)


def check(backend, x, weight, bias, **options):
    out = conv3x3(x, weight, bias, **options)
    assert out.dtype == x.dtype
    assert out.is_contiguous(memory_format=expected_format(x))
    exact = plain(*to([x, weight, bias], torch.float64), **to(options, torch.float64))
    check_close(out, exact, lambda: plain(x, weight, bias, **options), backend)


@pytest.mark.parametrize("channels", CHANNELS)
def test_channel_counts(backend, channels):
    torch.manual_seed(channels)
    for out in (channels, CHANNELS[(CHANNELS.index(channels) + 7) % len(CHANNELS)]):
        x = lay_out(rand(2, channels, 9, 13), ("nchw", "channels_last")[out % 2])
        check(backend, x, kernel(out, channels), rand(out), activation="silu")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_and_layouts(backend, size, layout):
    torch.manual_seed(0)
    x = lay_out(rand(2, 28, *size), layout)
    residual = lay_out(rand(2, 28, *size), layout)
    check(backend, x, kernel(28, 28), rand(28), residual=residual, residual_mode="attention")
    check(backend, lay_out(rand(1, 3, *size), layout), kernel(21, 3), None, activation="leaky_relu")


EPILOGUES = [(a, m) for a in ACTIVATIONS for m in (None, *RESIDUAL_MODES) if m != "attention" or a == "none"]


@pytest.mark.parametrize(("activation", "mode"), EPILOGUES)
def test_epilogues(backend, activation, mode):
    torch.manual_seed(1)
    residual = None if mode is None else rand(2, 36, 8, 11)
    options = {"activation": activation, "negative_slope": 0.1, "residual": residual, "residual_mode": mode or "post"}
    for channels in (3, 26):
        x, weight, bias = rand(2, channels, 8, 11, scale=3), kernel(36, channels), rand(36)
        check(backend, x, weight, bias, **options)
        check(backend, x, weight, None, **options)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_half_types(backend, dtype, layout):
    torch.manual_seed(2)
    for channels, out in ((3, 28), (28, 28), (46, 48)):
        x = lay_out(rand(2, channels, 12, 15, dtype=dtype), layout)
        residual = lay_out(rand(2, out, 12, 15, dtype=dtype), layout)
        weight, bias = kernel(out, channels, dtype=dtype), rand(out, dtype=dtype)
        check(backend, x, weight, bias, activation="silu")
        check(backend, x, weight, bias, residual=residual, residual_mode="attention")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_values_as_span_feeds_them(backend, dtype):
    """+-127 into the first convolution, no overflow and no NaN."""
    torch.manual_seed(3)
    x = ((torch.rand(1, 3, 20, 20) - 0.5) * 255).to(dtype)
    check(backend, x, kernel(28, 3, dtype=dtype), rand(28, dtype=dtype), activation="silu")
    big = ((torch.rand(1, 28, 20, 20) - 0.5) * 255).to(dtype)
    weight = kernel(28, 28, dtype=dtype) * 8
    check(backend, big, weight, rand(28, dtype=dtype), residual=big, residual_mode="attention")


def test_empty_batch(backend):
    x = torch.empty(0, 28, 9, 9)
    out = conv3x3(x, kernel(20, 28), rand(20), activation="gelu")
    assert out.shape == (0, 20, 9, 9)


def test_not_a_number_stays(backend):
    """A NaN spreads to its neighbourhood, and nowhere else, as in PyTorch."""
    x, weight = torch.ones(1, 5, 9, 9), kernel(7, 5)
    x[0, 2, 4, 4] = float("nan")
    for options in ({}, {"activation": "silu"}, {"activation": "leaky_relu"}, {"activation": "gelu"}):
        out = conv3x3(x, weight, **options)
        assert torch.equal(out.isnan(), plain(x, weight, **options).isnan())


def test_batch_and_repeats_are_bit_equal(backend):
    torch.manual_seed(4)
    x, weight, bias = rand(3, 28, 19, 21), kernel(28, 28), rand(28)
    together = conv3x3(x, weight, bias, activation="silu")
    assert torch.equal(together, conv3x3(x, weight, bias, activation="silu"))
    if backend != "reference":  # PyTorch itself promises no such thing
        for i in range(3):
            assert torch.equal(together[i : i + 1], conv3x3(x[i : i + 1], weight, bias, activation="silu"))


def test_weights_are_packed_again_when_they_change(backend):
    x, weight = rand(1, 20, 8, 8), kernel(20, 20)
    weights = [weight, torch.nn.Parameter(weight.clone())]
    for w in weights:
        check(backend, x, w.detach(), None)
        before = conv3x3(x, w)
        with torch.no_grad():
            w.mul_(2)
        torch.testing.assert_close(conv3x3(x, w), before * 2)
        w.data.mul_(2)  # changes no version counter
        torch.testing.assert_close(conv3x3(x, w), before * 4)
        w.data = w.data.clone() * 2
        torch.testing.assert_close(conv3x3(x, w), before * 8)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", [None, "pre", "post"])
def test_gradcheck(activation, mode):
    torch.manual_seed(5)
    tensors = [t.requires_grad_() for t in to([rand(2, 3, 5, 4), kernel(4, 3), rand(4)], torch.float64)]
    residual = rand(2, 4, 5, 4, dtype=torch.float64).requires_grad_()
    if mode is None:
        assert torch.autograd.gradcheck(lambda *a: conv3x3(*a, activation=activation), tensors)
    else:
        f = lambda x, w, b, r: conv3x3(x, w, b, activation=activation, residual=r, residual_mode=mode)  # noqa: E731
        assert torch.autograd.gradcheck(f, [*tensors, residual])


def test_gradcheck_attention():
    torch.manual_seed(6)
    tensors = [rand(2, 3, 5, 4), kernel(4, 3), rand(4), rand(2, 4, 5, 4)]
    tensors = [t.double().requires_grad_() for t in tensors]
    f = lambda x, w, b, r: conv3x3(x, w, b, residual=r, residual_mode="attention")  # noqa: E731
    assert torch.autograd.gradcheck(f, tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(layout):
    torch.manual_seed(7)
    x, residual = lay_out(rand(2, 28, 9, 13), layout), lay_out(rand(2, 30, 9, 13), layout)

    def run(function):
        return lambda x, w, b, r: function(x, w, b, activation="silu", residual=r, residual_mode="pre")

    check_gradients(run(conv3x3), run(plain), [x, kernel(30, 28), rand(30), residual])


def test_only_wanted_gradients_are_computed():
    """A frozen weight and an image that needs no gradient."""
    x, weight, bias = rand(1, 3, 6, 6), kernel(4, 3), rand(4).requires_grad_()
    conv3x3(x, weight, bias, activation="relu").sum().backward()
    assert x.grad is None and weight.grad is None and bias.grad is not None


def test_second_derivative_is_refused():
    x, weight = rand(1, 3, 6, 6).requires_grad_(), kernel(4, 3)
    (g,) = torch.autograd.grad(conv3x3(x, weight, activation="silu").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="esr::conv3x3 has no second derivative"):
        g.sum().backward()


def test_func_grad():
    x, weight = rand(1, 3, 6, 6), kernel(4, 3)
    got = torch.func.grad(lambda t: conv3x3(t, weight, activation="silu").sum())(x)
    torch.testing.assert_close(got, torch.func.grad(lambda t: plain(t, weight, activation="silu").sum())(x))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_opcheck(backend, dtype, layout):
    x, residual = lay_out(rand(2, 5, 6, 7, dtype=dtype), layout), lay_out(rand(2, 4, 6, 7, dtype=dtype), layout)
    weight, bias = kernel(4, 5, dtype=dtype), rand(4, dtype=dtype)
    torch.library.opcheck(torch.ops.esr.conv3x3.default, (x, weight, bias, residual, "silu", 0.05, "pre"))
    torch.library.opcheck(torch.ops.esr.conv3x3.default, (x, weight, None, None, "leaky_relu", 0.1, "post"))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_opcheck_with_gradients(dtype, layout):
    x, residual = lay_out(rand(2, 5, 6, 7, dtype=dtype), layout), lay_out(rand(2, 4, 6, 7, dtype=dtype), layout)
    tensors = [t.requires_grad_() for t in (x, kernel(4, 5, dtype=dtype), rand(4, dtype=dtype), residual)]
    torch.library.opcheck(torch.ops.esr.conv3x3.default, (*tensors, "silu", 0.05, "pre"))
    torch.library.opcheck(torch.ops.esr.conv3x3.default, (*tensors[:2], None, None, "leaky_relu", 0.1, "post"))


@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("mask", [[True] * 4, [False, True, False, True], [True, False, False, False]])
def test_opcheck_backward(layout, mask):
    x, residual, grad = (lay_out(rand(2, c, 6, 7), layout) for c in (5, 4, 4))
    args = (grad, x, kernel(4, 5), rand(4), residual, "gelu", 0.05, "post", mask)
    torch.library.opcheck(torch.ops.esr.conv3x3_backward.default, args)


def test_compile():
    def network(x, weight, bias):
        h = conv3x3(x, weight, bias, activation="silu")
        return conv3x3(h, weight, bias, residual=x, residual_mode="attention") * 2

    weight, bias = kernel(6, 6), rand(6)
    check_compiled(network, [(rand(2, 6, *size), weight, bias) for size in ((7, 9), (8, 5), (13, 31))])


def test_export(backend):
    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(kernel(6, 3))

        def forward(self, x):
            return conv3x3(x, self.weight, activation="gelu")

    network, auto = Network().eval(), torch.export.Dim.AUTO
    program = torch.export.export(network, (rand(2, 3, 9, 8),), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    x = rand(1, 3, 21, 5)
    torch.testing.assert_close(program.module()(x), network(x))


@pytest.mark.parametrize("dtype", HALF)
def test_autocast(dtype):
    x, weight, bias = rand(1, 6, 9, 9), kernel(8, 6).requires_grad_(), rand(8)
    with torch.autocast("cpu", dtype):
        out = conv3x3(x, weight, bias, activation="silu")
        assert out.dtype == dtype
    out.sum().backward()
    assert weight.grad.dtype == torch.float32
    exact = plain(*to([x, weight, bias], torch.float64), activation="silu")
    check_close(
        out.detach(),
        exact.detach(),
        lambda: plain(*to([x, weight, bias], dtype), activation="silu").detach(),
        "reference",
    )


def test_flops():
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        out = conv3x3(rand(2, 5, 6, 7), kernel(4, 5).requires_grad_(), rand(4), activation="silu")
        forward = counter.get_total_flops()
        with esr_kernels.use_backend("reference"):
            out.sum().backward()
    assert forward == 2 * 2 * 9 * 5 * 4 * 42
    assert counter.get_total_flops() == 3 * forward  # recomputed once, and the weight's gradient


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "x: expected a torch.Tensor, got NoneType"),
        ({"x": torch.zeros(3, 8, 8)}, ValueError, "x: expected 4 dimensions"),
        ({"x": torch.zeros(1, 3, 8, 8, dtype=torch.int32)}, TypeError, "x: expected float32, float16"),
        ({"x": torch.zeros(1, 3, 0, 8)}, ValueError, "x: channels, height and width must be at least 1"),
        ({"weight": torch.zeros(4, 5, 3, 3)}, ValueError, r"weight: expected shape \[O, 3, 3, 3\], got \[4, 5, 3, 3\]"),
        ({"weight": torch.zeros(4, 3, 5, 5)}, ValueError, "weight: expected shape"),
        ({"weight": torch.zeros(4, 3, 3, 3).half()}, TypeError, "weight: expected the input's dtype torch.float32"),
        ({"weight": torch.zeros(4, 3, 3, 3, device="meta")}, ValueError, "weight: expected the input's device cpu"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias: expected shape \[4\] or None, got \[5\]"),
        ({"activation": "swish"}, ValueError, "activation: expected one of none, relu"),
        ({"residual_mode": "before"}, ValueError, "residual_mode: expected one of pre, post, attention"),
        ({"residual": torch.zeros(1, 3, 8, 8)}, ValueError, r"residual: expected shape \[1, 4, 8, 8\]"),
        ({"residual_mode": "attention"}, ValueError, 'residual: residual_mode "attention" needs one'),
        (
            {"residual": torch.zeros(1, 4, 8, 8), "residual_mode": "attention", "activation": "silu"},
            ValueError,
            'activation: residual_mode "attention" allows only "none"',
        ),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": torch.zeros(1, 3, 8, 8), "weight": torch.zeros(4, 3, 3, 3), "bias": torch.zeros(4)} | change
    with pytest.raises(error, match=message):
        conv3x3(**arguments)


def test_meta_tensors():
    with torch.device("meta"):
        out = conv3x3(torch.empty(2, 3, 8, 9), torch.empty(5, 3, 3, 3), torch.empty(5), activation="silu")
    assert out.shape == (2, 5, 8, 9) and out.device.type == "meta"
