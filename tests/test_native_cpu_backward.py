"""Gradients on the native CPU backend against float64: every instruction set, layout, dtype and form of training."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from gradients import EPILOGUES, backward, check, check_half_type
from helpers import HALF, LAYOUTS, check_gradients, kernel, largest_error, lay_out, rand, to
from test_native_cpu import _restore, capability, pytestmark  # noqa: F401
from test_triton import CASE_NAMES, esa_weights, gradient_cases
from torch.nn import functional as F

import esr_kernels
import python_models
from esr_kernels import functional
from esr_kernels.backends import reference
from esr_kernels.modules import SPAB

# Direct sums 1e-5; Winograd 1e-4, of which a weight's gradient needs a tenth.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def native_cpu():
    with esr_kernels.use_backend("native-cpu"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASE_NAMES)
def test_backward(capability, case, layout, dtype):  # noqa: F811
    check(case, gradient_cases(dtype, layout)[case], TOLERANCE[dtype])


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
    inputs = [r.randint(1, 50) for _ in range(r.randint(1, 5))]
    mask = [r.random() < 0.6 for _ in inputs] + [True, True]
    arguments = (feature(cout), [feature(c) for c in inputs], kernel(cout, sum(inputs), 1), None, "gelu", 0.0, mask)
    check("conv1x1", arguments, tolerance)
    mask = [*mask, r.random() < 0.6]
    check("conv1x1", (*arguments[:4], "silu", 0.0, mask, feature(cout)), tolerance)
    padding = "reflect" if h > 1 and w > 1 and r.random() < 0.7 else "zeros"
    weights = (kernel(cout, cin, 1), kernel(cout, 1), rand(cout))
    arguments = (
        feature(cout),
        feature(cin),
        *weights,
        padding,
        "leaky_relu",
        0.2,
        [True] * 4,
    )
    check("bsconv", arguments, tolerance)


@pytest.mark.parametrize("size", [(2, 2), (2, 5), (5, 2), (3, 3)])
def test_reflection_folds_back_into_few_pixels(capability, size):  # noqa: F811
    weights = (kernel(20, 9, 1), kernel(20, 1), rand(20))
    check("bsconv", (rand(2, 20, *size), rand(2, 9, *size), *weights, "reflect", "silu", 0.0, [True] * 4), 1e-5)


@pytest.mark.parametrize("size", [(15, 15), (17, 40), (34, 21), (48, 48)])
@pytest.mark.parametrize("form", ["rlfn", "without skip", "rfdn"])
def test_esa(capability, form, size):  # noqa: F811
    parameters = esa_weights(20, 16 if size[0] > 20 else 7, form == "rfdn")
    if form == "without skip":
        parameters[8] = parameters[9] = None
    mask = [True, *(p is not None for p in parameters)]
    check("esa", (rand(2, 20, *size), rand(2, 20, *size), *parameters, mask), 2e-5)


def test_equal_values_in_a_pool(capability):  # noqa: F811
    """Of equal values PyTorch gives the gradient to the first."""
    parameters = [torch.zeros_like(p) if p is not None else None for p in esa_weights(8, 4)]
    parameters[6] = kernel(8, 4, 1)  # w4
    parameters[2][:, :, 1, 1] = torch.eye(4)
    parameters[0][:, :4, 0, 0] = torch.eye(4)
    parameters[4] = kernel(4, 4)
    x = torch.randint(0, 2, (1, 8, 24, 30)).float()
    check("esa", (rand(1, 8, 24, 30), x, *parameters, [True] * 11 + [False] * 4), 1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_half_types_against_pytorch(dtype):
    check_half_type(dtype)


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


def esa_counts(rfdn, wanted):
    """In the order of ESA: conv1, conv2, the low ones, conv4; the way back goes as far as something is wanted there."""
    x = wanted[0]
    w1, w2, w3, w4, wf, w_max, w3_ = (wanted[i] or wanted[i + 1] for i in range(1, 15, 2))
    low = [w_max, w3, w3_] if rfdn else [w3]
    to_c1 = x or w1
    to_c2 = to_c1 or w2
    to_low = to_c2 or any(low)
    to_sum = to_low or wf
    data = to_sum + sum(to_c2 or any(low[:k]) for k in range(len(low))) + 2 * to_c1 + x
    return [(3 + len(low)) * (to_sum or w4), data, sum(wanted[1::2])]


COUNTS = {
    "conv3x3 silu": lambda x, w, b, r: conv_counts(x, w, b, r, again=1),
    "conv3x3 pre": lambda x, w, b, r: conv_counts(x, w, b, r, again=1, by_residual=1),
    "conv3x3 post": lambda x, w, b, r: conv_counts(x, w, b, r, again=1),
    "conv3x3 attention": lambda x, w, b, r: conv_counts(x, w, b, r, again=1, by_residual=1),
    "conv3x3_pixel_shuffle": lambda x, w, b, r: conv_counts(x, w, b, r, again=0),
    "conv1x1": lambda x1, x2, w, b: [int(x1 or x2 or w or b), x1 + x2, 2 * w],
    "conv1x1 residual": lambda x, w, b, r: [int(x or w or b or r), x, w],
    # The inner map again, and the convolution of it for its activation; through both to x.
    "bsconv zeros": lambda x, p, d, b: [2 * (x or p or d or b), (x or p) + x, p + d],
    "bsconv reflect": lambda x, p, d, b: [int(d), (x or p) + x, p + d],
    "bsconv residual": lambda x, p, d, b, r: [2 * (x or p or d or b or r), (x or p) + x, p + d],
    "esa": lambda *wanted: esa_counts(False, wanted),
    "esa rfdn": lambda *wanted: esa_counts(True, wanted),
    # A gradient is passed on as far as somebody wants one.
    "spab": lambda x, w1, b1, w2, b2, w3, b3: [
        3 * (x or w1 or b1 or w2 or b2 or w3 or b3),
        (x or w1 or b1 or w2 or b2) + (x or w1 or b1) + x,
        w1 + w2 + w3,
    ],
}


@pytest.mark.parametrize("case", COUNTS)
def test_only_what_is_wanted_is_computed(case):
    arguments = gradient_cases(torch.float32, "channels_last")[case]
    (place,) = (i for i, a in enumerate(arguments) if isinstance(a, list) and isinstance(a[0], bool))
    mask, count = arguments[place], len(arguments[place])

    def wanting(wanted):
        return (*arguments[:place], wanted, *arguments[place + 1 :])

    # What there is no tensor for cannot be wanted.
    masks = [[k == i for k in range(count)] for i in range(count) if mask[i]]
    masks += [[m and k != i for k, m in enumerate(mask)] for i in range(count)] + [mask, [False] * count]
    everything = check(case, arguments, 2e-5)
    for wanted in masks:
        got, counts = computed(case, wanting(wanted))
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
@pytest.mark.parametrize("case", ["conv3x3", "spab", "conv3x3_pixel_shuffle", "conv1x1", "esa", "bsconv"])
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
            "conv1x1": (g, [x, g], kernel(20, 40, 1), weights[1], "silu", 0.0, [True] * 5, x),
            "esa": (g, x, *esa_weights(20, 16), [True] * 11 + [False] * 4),
            "bsconv": (g, x, kernel(20, 20, 1), kernel(20, 1), None, "reflect", "silu", 0.0, [True] * 4),
        }[case]
        torch.set_num_threads(1)
        expected = backward(case, arguments)
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            for a, b in zip(backward(case, arguments), expected, strict=True):
                assert torch.equal(a, b), (n, threads)


# --- inputs of every kind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strides", ["every other element", "expanded", "channels_last"])
@pytest.mark.parametrize("case", [c for c in CASE_NAMES if c not in ("conv3x3 silu", "conv3x3 post")])
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


@pytest.mark.parametrize("case", [c for c in CASE_NAMES if c != "bsconv reflect"])
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


@pytest.fixture
def small_span():
    """SPAN of one block in training form, a batch of images in its range, and the pictures to learn."""
    net = python_models.create("span", feature_channels=18, num_blocks=1, upscale=2, deploy=False).train()
    return net, torch.rand(2, 3, 13, 10), torch.rand(2, 3, 26, 20)


def gradients_of(net, x, y, dtype=None, scale=1.0):
    net.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        loss = F.l1_loss(net(x).float(), y)
    (loss * scale).backward()
    return [p.grad / scale for p in net.parameters()]


def exact_gradients(net, x, y):
    with esr_kernels.use_backend("reference"):
        return gradients_of(copy.deepcopy(net).double(), x.double(), y.double())


def check_all(got, exact, tolerance):
    for g, e in zip(got, exact, strict=True):
        assert largest_error(g, e) <= tolerance * float(e.abs().max())


def test_network(small_span):
    check_all(gradients_of(*small_span), exact_gradients(*small_span), 1e-4)


@pytest.mark.parametrize("dtype", HALF)
def test_autocast(small_span, dtype):
    """Gradients as near to float64 as those of the reference under autocast; a bias of few elements may be luckier."""
    net, x, y = small_span
    exact = exact_gradients(*small_span)
    got = gradients_of(net, x, y, dtype, 1024.0)
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    with esr_kernels.use_backend("reference"):
        plain = gradients_of(net, x, y, dtype, 1024.0)
    errors, own = ([torch.linalg.vector_norm(g - e) for g, e in zip(some, exact, strict=True)] for some in (got, plain))
    assert torch.stack(errors).norm() <= 1.5 * torch.stack(own).norm()
    for error, plain_error, e in zip(errors, own, exact, strict=True):
        assert error <= 3 * plain_error + 1e-6 * e.norm()
