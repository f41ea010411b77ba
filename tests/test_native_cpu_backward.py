"""Gradients on the native CPU backend against float64: every instruction set, layout, dtype and form of training."""

from __future__ import annotations

import random

import pytest
import torch
from helpers import HALF, LAYOUTS, check_gradients, kernel, largest_error, lay_out, rand, to
from test_native_cpu import _restore, capability, pytestmark  # noqa: F401
from test_triton import CASE_NAMES, gradient_cases
from torch.nn import functional as F

import esr_kernels
from esr_kernels import functional
from esr_kernels.backends import reference
from esr_kernels.modules import SPAB

CASES = [c for c in CASE_NAMES if not c.startswith(("conv1x1", "esa", "bsconv"))]
# Direct sums 1e-5; Winograd 1e-4, of which a weight's gradient needs a tenth.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def native_cpu():
    with esr_kernels.use_backend("native-cpu"):
        yield


def backward(case, arguments):
    return getattr(torch.ops.esr, case.split()[0] + "_backward")(*arguments)


def check(case, arguments, tolerance):
    got = backward(case, arguments)
    exact = reference.OPERATORS[case.split()[0] + "_backward"](*to(arguments, torch.float64))
    for i, (g, e) in enumerate(zip(got, exact, strict=True)):
        assert g.shape == e.shape
        if e.numel():
            error = largest_error(g, e) / max(float(e.abs().max()), 1e-30)
            assert error <= tolerance, f"gradient {i}: relative error {error:.2e}"
    return got


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_backward(capability, case, layout, dtype):  # noqa: F811
    check(case, gradient_cases(dtype, layout)[case], TOLERANCE[dtype])


EPILOGUES = [
    (a, m)
    for a in ("none", "relu", "leaky_relu", "silu", "gelu", "gelu_tanh")
    for m in (None, "pre", "post", "attention")
    if m != "attention" or a == "none"
]


@pytest.mark.parametrize(("activation", "mode"), EPILOGUES)
@pytest.mark.parametrize("channels", [(9, 12), (20, 17)])
def test_epilogues(capability, activation, mode, channels):  # noqa: F811
    channels, out = channels
    residual = None if mode is None else rand(1, out, 6, 7)
    mask = [True, True, True, residual is not None]
    tensors = (rand(1, out, 6, 7), rand(1, channels, 6, 7, scale=3), kernel(out, channels), rand(out), residual)
    check("conv3x3", (*tensors, activation, 0.1, mode or "post", mask), TOLERANCE[torch.float32])


@pytest.mark.parametrize("mode", ["none", "relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "attention"])
def test_derivatives_over_the_whole_range(capability, mode):  # noqa: F811
    """The convolution hands its input through, from far below to far above zero."""
    h = torch.cat([torch.linspace(-12, 12, 3001), torch.tensor([-3e4, -90.0, -0.0, 0.0, 90.0, 3e4])]).view(1, 1, 1, -1)
    identity = torch.zeros(1, 1, 3, 3)
    identity[0, 0, 1, 1] = 1
    residual = rand(*h.shape) if mode == "attention" else None
    activation = "none" if mode == "attention" else mode
    arguments = (torch.ones_like(h), h, identity, None, residual, activation, 0.1, "attention", [True, *[False] * 3])
    got, exact = backward("conv3x3", arguments)[0], reference.conv3x3_backward(*to(arguments, torch.float64))[0]
    assert torch.isfinite(got).all()
    error = (got - exact).abs() / exact.abs().clamp(min=1)
    assert float(error.max()) < 2e-6


@pytest.mark.parametrize("seed", range(8))
def test_sizes_and_channels_at_random(capability, seed, monkeypatch):  # noqa: F811
    r = random.Random(seed)
    torch.manual_seed(seed)
    monkeypatch.setenv("ESR_KERNELS_CPU_WINOGRAD", str(seed % 2))
    n, h, w = r.randint(1, 3), r.randint(1, 40), r.choice([r.randint(1, 30), r.randint(90, 130)])
    cin, cout = r.randint(1, 90), r.randint(1, 90)

    def feature(channels):
        return lay_out(rand(n, channels, h, w), r.choice(LAYOUTS))

    tolerance = TOLERANCE[torch.float32]
    arguments = (feature(cout), feature(cin), kernel(cout, cin), rand(cout), None, "silu", 0.0, "post")
    check("conv3x3", (*arguments, [True, True, True, False]), tolerance)
    mid = r.randint(1, 50)
    weights = [t for o, i in ((mid, cin), (cin, mid), (cin, cin)) for t in (kernel(o, i), rand(o))]
    check("spab", (feature(cin), feature(mid), feature(cin), *weights, [True] * 7), tolerance)
    factor = r.randint(1, 5)
    grad = rand(n, 2, h * factor, w * factor)
    channels = 2 * factor**2
    arguments = (grad, feature(cin), kernel(channels, cin), None, factor, [True, True, False, True])
    check("conv3x3_pixel_shuffle", arguments, tolerance)


def twice_pytorch(call, tensors, grad, arguments, operator):
    """Half types: at most twice as far off as PyTorch's own gradients in that type."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    plain = torch.autograd.grad(call(*leaves), leaves, grad)
    got = getattr(torch.ops.esr, operator)(*arguments)
    exact = reference.OPERATORS[operator](*to(arguments, torch.float64))
    for g, p, e in zip(got, plain, exact, strict=True):
        largest = float(e.abs().max())
        assert largest_error(g, e) <= max(2 * largest_error(p, e), torch.finfo(g.dtype).eps / 2 * largest)


@pytest.mark.parametrize("dtype", HALF)
def test_half_types_against_pytorch(dtype):
    for channels, out in ((3, 28), (28, 28), (46, 48), (84, 5)):
        x, grad = (lay_out(rand(2, c, 13, 21, dtype=dtype), LAYOUTS[out % 2]) for c in (channels, out))
        tensors = (x, kernel(out, channels, dtype=dtype), rand(out, dtype=dtype), grad * 2)
        twice_pytorch(
            lambda x, w, b, r: F.silu(F.conv2d(x, w, b, padding=1) + r),
            tensors, grad, (grad, *tensors, "silu", 0.0, "pre", [True] * 4), "conv3x3_backward",
        )  # fmt: skip


# --- what is not wanted is not computed ------------------------------------------------------------------------------

AGAIN, DATA, WEIGHT = range(3)


def computed(case, arguments):
    """How many convolutions were computed: again, for data and for weights, by image."""
    before = torch.ops.esr_native.passes()
    got = backward(case, arguments)
    images = arguments[0].shape[0]
    return got, [(b - a) / images for a, b in zip(before, torch.ops.esr_native.passes(), strict=True)]


def conv_counts(x, weight, bias, residual, *, again, by_residual=0):
    return [max(again * (x or weight or bias), by_residual * residual), x, weight]


COUNTS = {
    "conv3x3 silu": lambda x, w, b, r: conv_counts(x, w, b, r, again=1),
    "conv3x3 pre": lambda x, w, b, r: conv_counts(x, w, b, r, again=1, by_residual=1),
    "conv3x3 post": lambda x, w, b, r: conv_counts(x, w, b, r, again=1),
    "conv3x3 attention": lambda x, w, b, r: conv_counts(x, w, b, r, again=1, by_residual=1),
    "conv3x3_pixel_shuffle": lambda x, w, b, r: conv_counts(x, w, b, r, again=0),
    # A gradient is passed on as far as somebody wants one.
    "spab": lambda x, w1, b1, w2, b2, w3, b3: [
        3 * (x or w1 or b1 or w2 or b2 or w3 or b3),
        (x or w1 or b1 or w2 or b2) + (x or w1 or b1) + x,
        w1 + w2 + w3,
    ],
}


@pytest.mark.parametrize("case", COUNTS)
def test_only_what_is_wanted_is_computed(case):
    *arguments, mask = gradient_cases(torch.float32, "channels_last")[case]
    mask = [m if k != 3 or case != "conv3x3 silu" else False for k, m in enumerate(mask)]
    masks = [[k == i for k in range(len(mask))] for i in range(len(mask))]
    masks += [[m and k != i for k, m in enumerate(mask)] for i in range(len(mask))] + [mask, [False] * len(mask)]
    if case == "conv3x3 silu":
        masks = [m for m in masks if not m[3]]
    everything = check(case, (*arguments, [True] * len(mask) if case != "conv3x3 silu" else mask), 2e-5)
    for wanted in masks:
        got, counts = computed(case, (*arguments, wanted))
        assert [g.numel() > 0 for g in got] == wanted
        assert counts == [int(c) for c in COUNTS[case](*wanted)], wanted
        for g, e in zip(got, everything, strict=True):
            assert g.numel() == 0 or torch.equal(g, e)


def test_frozen_parameters_and_inputs_without_gradient():
    block = SPAB(20, deploy=True)
    x = rand(2, 20, 9, 10)
    for module in (block.c1_r, block.c2_r):
        module.requires_grad_(False)
    block(x).sum().backward()
    assert block.c1_r.eval_conv.weight.grad is None and block.c3_r.eval_conv.weight.grad is not None
    before = torch.ops.esr_native.passes()
    block(x).sum().backward()
    counts = [b - a for a, b in zip(before, torch.ops.esr_native.passes(), strict=True)]
    assert counts == [6, 0, 2]  # two images: three convolutions again, and one weight's gradient


# --- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("winograd", ["0", "1"])
@pytest.mark.parametrize("case", ["conv3x3", "spab", "conv3x3_pixel_shuffle"])
def test_threads_do_not_change_bits(case, winograd, monkeypatch):
    """Images of several parts, fewer of them than threads, as many, and more."""
    monkeypatch.setenv("ESR_KERNELS_CPU_WINOGRAD", winograd)
    weights = [t for _ in range(3) for t in (kernel(20, 20), rand(20))]
    for n in (1, 3, 4):
        x, g = rand(n, 20, 70, 67), rand(n, 20, 70, 67)
        arguments = {
            "conv3x3": (g, x, weights[0], weights[1], g, "silu", 0.0, "pre", [True] * 4),
            "spab": (g, g, x, *weights, [True] * 7),
            "conv3x3_pixel_shuffle": (rand(n, 5, 140, 134), x, weights[0], None, 2, [True] * 4),
        }[case]
        torch.set_num_threads(1)
        expected = backward(case, arguments)
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            for a, b in zip(backward(case, arguments), expected, strict=True):
                assert torch.equal(a, b), (n, threads)


# --- inputs of every kind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strides", ["every other element", "expanded", "channels_last"])
@pytest.mark.parametrize("case", [c for c in CASES if c not in ("conv3x3 silu", "conv3x3 post")])
def test_parameters_of_any_strides(case, strides):
    def change(t):
        if not isinstance(t, torch.Tensor) or (t.dim() == 4 and t.shape[2] > 3):
            return t
        if strides == "channels_last":
            return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        if strides == "expanded":
            return t[:1].expand(t.shape)
        return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]

    check(case, tuple(change(t) for t in gradient_cases(torch.float32, "nchw")[case]), 2e-5)


def test_gradient_without_a_stride():
    """What `sum().backward()` hands in."""
    x, weight = rand(2, 8, 9, 10), kernel(12, 8)
    ones = torch.ones(()).expand(2, 12, 9, 10)
    for activation in ("none", "silu"):
        check("conv3x3", (ones, x, weight, None, None, activation, 0.0, "post", [True, True, True, False]), 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_empty_batch(case):
    def empty(value):
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return [v[:0] for v in value]
        is_map = isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[2] > 3
        return value[:0] if is_map else value

    for g in backward(case, [empty(a) for a in gradient_cases(torch.float32, "nchw")[case]]):
        assert torch.equal(g, torch.zeros_like(g))


def test_wrong_shapes_are_refused():
    x, weight, g = rand(1, 4, 5, 6), kernel(8, 4), rand(1, 8, 5, 6)
    call = torch.ops.esr_native.conv3x3_backward
    gradients = [torch.empty_like(x), torch.empty_like(weight), weight.new_empty(8), x.new_empty(0)]
    call(g, x, weight, None, None, 0, 0.0, 1, gradients)
    for wrong, message in (
        ((g[:, :7], x, weight), "grad is"),
        ((g, x[:, :3], weight), "weight is"),
        ((torch.cat([g, g]), x, weight), "grad has 2 images"),
        ((g, x, weight.double()), "unsupported dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*wrong, None, None, 0, 0.0, 1, gradients)
    with pytest.raises(RuntimeError, match="gradients given"):
        call(g, x, weight, None, None, 0, 0.0, 1, gradients[:3])
    with pytest.raises(RuntimeError, match="the gradient to weight has"):
        call(g, x, weight, None, None, 0, 0.0, 1, [gradients[0], gradients[1][:, :3], *gradients[2:]])
    with pytest.raises(RuntimeError, match="activation is 9"):
        call(g, x, weight, None, None, 9, 0.0, 1, gradients)


# --- training --------------------------------------------------------------------------------------------------------


def test_through_autograd():
    tensors = [rand(2, 20, 8, 9), kernel(30, 20), rand(30)]
    check_gradients(
        lambda *a: functional.conv3x3(*a, activation="silu"), lambda x, w, b: F.silu(F.conv2d(x, w, b, padding=1)),
        tensors, 2e-5,
    )  # fmt: skip
