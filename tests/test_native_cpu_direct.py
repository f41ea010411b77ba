"""Operators that the native CPU backend computes on tensors where they are: every instruction set, layout and dtype."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from gradients import check
from helpers import HALF, LAYOUTS, expected_format, largest_error, lay_out, rand, to
from test_native_cpu import _restore, capability, pytestmark  # noqa: F401
from test_properties import LAYOUTS as MORE_LAYOUTS
from test_properties import lay_out_more
from test_selective_scan import operands

import esr_kernels
from esr_kernels.backends import reference
from esr_kernels.functional import window_attention
from esr_kernels.library import ACTIVATIONS, memory_format

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
GRADIENT_TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Groups of channels in channels_last are 16 wide, and at most eight of them are on their way at once.
CHANNELS = (1, 2, 7, 8, 9, 16, 17, 36, 130)


@pytest.fixture(autouse=True)
def native_cpu():
    with esr_kernels.use_backend("native-cpu"):
        yield


def compare(operator, arguments, dtype):
    out = getattr(torch.ops.esr, operator)(*arguments)
    exact = reference.OPERATORS[operator](*to(arguments, torch.float64))
    assert out.shape == exact.shape and out.is_contiguous(memory_format=expected_format(arguments[0]))
    assert largest_error(out, exact) <= TOLERANCE[dtype] * float(exact.abs().max())


def depthwise(channels, size, sides, dtype, layout, *, gated, batch=2):
    x = lay_out(rand(batch, channels, *size, dtype=dtype), layout)
    weight = rand(channels, 1, *sides, dtype=dtype, scale=(sides[0] * sides[1]) ** -0.5)
    grad = lay_out(rand(batch, channels // 2 if gated else channels, *size, dtype=dtype), layout)
    return grad, x, weight, rand(channels, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_channels(capability, channels, layout, dtype):  # noqa: F811
    torch.manual_seed(channels)
    for gated in (False, True) if channels % 2 == 0 else (False,):
        grad, *tensors = depthwise(channels, (5, 19), (3, 3), dtype, layout, gated=gated)
        settings = (1, "silu", 0.0, gated)
        compare("depthwise_conv", (*tensors, *settings), dtype)
        check("depthwise_conv", (grad, *tensors, *settings, [True] * 3), GRADIENT_TOLERANCE[dtype])
    x, grad, same = (lay_out(rand(2, channels, 5, 19, dtype=dtype), layout) for _ in range(3))
    small = lay_out(rand(2, channels, 2, 3, dtype=dtype), layout)
    compare("adaptive_max_pool", (x, [2, 3]), dtype)
    check("adaptive_max_pool", (small, x, [True]), GRADIENT_TOLERANCE[dtype])
    for mode in ("nearest", "bilinear"):
        compare("modulate", (x, [same, small], mode, "silu", 0.0), dtype)
        check("modulate", (grad, x, [same, small], mode, "silu", 0.0, [True] * 3), GRADIENT_TOLERANCE[dtype])
    if channels == 1:
        return  # of one channel nothing is left
    x, grad = (lay_out(rand(2, channels, 5, 19, dtype=dtype), layout) for _ in range(2))
    weight, bias = rand(channels, dtype=dtype), rand(channels, dtype=dtype)
    compare("layer_norm2d", (x, weight, bias, 1e-5), dtype)
    check("layer_norm2d", (grad, x, weight, bias, 1e-2, [True] * 3), GRADIENT_TOLERANCE[dtype])


@pytest.mark.parametrize("seed", range(12))
def test_sizes_and_filters_at_random(capability, seed):  # noqa: F811
    torch.manual_seed(seed)
    r = random.Random(seed)
    for layout in LAYOUTS[:2]:
        gated = r.random() < 0.5
        channels, size = 2 * r.randint(1, 20), (r.randint(1, 40), r.randint(1, 150))
        sides = (r.choice((1, 3, 5, 7)), r.choice((1, 3, 5, 7)))
        grad, *tensors = depthwise(channels, size, sides, torch.float32, layout, gated=gated)
        settings = (r.randint(1, 4), r.choice(ACTIVATIONS), 0.1, gated)
        compare("depthwise_conv", (*tensors, *settings), torch.float32)
        mask = [r.random() < 0.7 for _ in range(3)]
        got = check("depthwise_conv", (grad, *tensors, *settings, mask), 2e-5)
        assert [g.numel() > 0 for g in got] == mask
        x, grad = (lay_out(rand(2, channels, *size), layout) for _ in range(2))
        pooled = (r.randint(1, 12), r.randint(1, 40))
        compare("adaptive_max_pool", (x, pooled), torch.float32)
        small = lay_out(rand(2, channels, *pooled), layout)
        check("adaptive_max_pool", (small, x, [True]), 2e-5)
        settings = ([small], r.choice(("nearest", "bilinear")), "relu", 0.0)
        compare("modulate", (x, *settings), torch.float32)
        check("modulate", (grad, x, *settings, [True, r.random() < 0.5]), 2e-5)
        compare("layer_norm2d", (x, None, rand(channels), 1e-2), torch.float32)
        check("layer_norm2d", (grad, x, rand(channels), None, 1e-2, [True, r.random() < 0.5, True]), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_selective_scan(capability, dtype):  # noqa: F811
    """Channels that fill no vector, states that fill no group of those advanced together."""
    torch.manual_seed(0)
    for channels, states in ((1, 1), (7, 3), (16, 8), (40, 16), (37, 19)):
        tensors = operands(70, channels, states, dtype=dtype).values()
        out = torch.ops.esr.selective_scan(*tensors, True)
        exact = reference.OPERATORS["selective_scan"](*to(tuple(tensors), torch.float64), True)
        assert largest_error(out, exact) <= TOLERANCE[dtype] * float(exact.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("operator", ["depthwise_conv", "layer_norm2d", "adaptive_max_pool", "modulate"])
def test_threads_do_not_change_bits(operator, layout):
    torch.manual_seed(0)
    if operator == "depthwise_conv":
        grad, *tensors = depthwise(34, (97, 65), (5, 3), torch.float32, layout, gated=True, batch=3)
        arguments = (*tensors, 2, "gelu", 0.0, True)
    else:
        grad, x = (lay_out(rand(3, 34, 97, 65), layout) for _ in range(2))
        arguments = (x, rand(34), rand(34), 1e-6)
    if operator == "modulate":
        arguments = (x, [lay_out(rand(3, 34, *size), layout) for size in ((24, 16), (12, 8))], "bilinear", "gelu", 0.0)

    def run():
        if operator == "adaptive_max_pool":
            out = torch.ops.esr.adaptive_max_pool(x, (24, 16))
            return [out, *torch.ops.esr.adaptive_max_pool_backward(out, x, [True])]
        out = getattr(torch.ops.esr, operator)(*arguments)
        return [out, *getattr(torch.ops.esr, operator + "_backward")(grad, *arguments, [True] * 3)]

    expected = run()
    for threads in (2, 3, 4):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, run(), expected))


def test_a_gradient_without_strides():
    """`sum().backward()` hands out one number for all."""
    for layout in LAYOUTS[:2]:
        grad, *tensors = depthwise(6, (7, 9), (3, 3), torch.float32, layout, gated=False)
        ones = torch.ones(()).expand_as(grad)
        check("depthwise_conv", (ones, *tensors, 1, "relu", 0.0, False, [True] * 3), 2e-5)
        check("layer_norm2d", (ones, tensors[0], rand(6), rand(6), 1e-2, [True] * 3), 2e-5)


def test_a_part_of_a_tensor_is_read_where_it_is():
    x = rand(2, 12, 9, 11)
    for part in x.chunk(2, 1):
        compare("depthwise_conv", (part, rand(6, 1, 3, 3), None, 1, "none", 0.0, False), torch.float32)
        compare("layer_norm2d", (part, None, None, 1e-6), torch.float32)


# Of a size of 1 the stride is anything, so that many a tensor has two memory formats.
ONES = [(c, h, w) for c in (1, 2, 17) for h, w in ((1, 1), (1, 3), (3, 1), (3, 2))]


def strided(x, stride):
    """x with `stride` wherever there is one only."""
    strides = [s if size > 1 else stride for size, s in zip(x.shape, x.stride(), strict=True)]
    return x.as_strided(x.shape, strides, x.storage_offset())


def of_ones(channels, height, width):
    """(x, a function that lays out others) for batches of 1 and 2, in every layout, with every stride."""
    for batch, layout, stride in itertools.product((1, 2), range(len(MORE_LAYOUTS)), (0, 1, channels, 1000)):
        # The other tensors are laid out in other ways, each combination once.
        other = MORE_LAYOUTS[(layout + (batch + stride) % len(MORE_LAYOUTS)) % len(MORE_LAYOUTS)]
        x = lay_out_more(rand(batch, channels, height, width), MORE_LAYOUTS[layout])
        yield (
            strided(x, stride),
            lambda *size, n=batch, at=other, s=stride: strided(lay_out_more(rand(n, *size), at), s),
        )


def compare_of_ones(operator, x, settings, image=None):
    """A result, and that the same image alone has its bits and its memory format; `image(n)` are its settings."""
    run = getattr(torch.ops.esr, operator)
    out, exact = run(x, *settings), reference.OPERATORS[operator](*to((x, *settings), torch.float64))
    assert out.is_contiguous(memory_format=expected_format(x if isinstance(x, torch.Tensor) else x[0]))
    close_to_ones(out, exact)
    for n in range(len(out)):
        of_image = x[n : n + 1] if isinstance(x, torch.Tensor) else [t[n : n + 1] for t in x]
        alone = run(of_image, *(settings if image is None else image(n)))
        assert torch.equal(alone[0], out[n]) and memory_format(alone) == memory_format(out)


def check_of_ones(operator, arguments):
    got = getattr(torch.ops.esr, operator + "_backward")(*arguments)
    exact = reference.OPERATORS[operator + "_backward"](*to(arguments, torch.float64))
    for g, e in zip(got, exact, strict=True):
        close_to_ones(g, e)


def close_to_ones(got, exact):
    """The values that go in are about 1, and what is left of them may be little."""
    assert got.shape == exact.shape
    assert largest_error(got, exact) <= 2e-5 * max(float(exact.abs().max()) if exact.numel() else 0.0, 1.0)


@pytest.mark.parametrize("size", ONES, ids=str)
def test_depthwise_conv_of_sizes_of_1(size):
    torch.manual_seed(0)
    c = size[0]
    for x, other in of_ones(*size):
        for gated in (False, True) if c % 2 == 0 else (False,):
            settings = (rand(c, 1, 3, 3), rand(c), 1, "silu", 0.0, gated)
            compare_of_ones("depthwise_conv", x, settings)
            grad = other(c // 2 if gated else c, *size[1:])
            check_of_ones("depthwise_conv", (grad, x, *settings, [True] * 3))


@pytest.mark.parametrize("size", ONES, ids=str)
def test_layer_norm2d_of_sizes_of_1(size):
    torch.manual_seed(0)
    for x, other in of_ones(*size):
        weight, bias = rand(size[0]), rand(size[0])
        compare_of_ones("layer_norm2d", x, (weight, bias, 1e-2))
        check_of_ones("layer_norm2d", (other(*size), x, weight, bias, 1e-2, [True] * 3))


@pytest.mark.parametrize("size", ONES, ids=str)
def test_adaptive_max_pool_of_sizes_of_1(size):
    torch.manual_seed(0)
    for x, other in of_ones(*size):
        for pooled in ([1, 1], [1, 2], [2, 1], [3, 2]):
            compare_of_ones("adaptive_max_pool", x, (pooled,))
            check_of_ones("adaptive_max_pool", (other(size[0], *pooled), x, [True]))


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("size", ONES, ids=str)
def test_modulate_of_sizes_of_1(size, mode):
    torch.manual_seed(0)
    c = size[0]
    for x, other in of_ones(*size):
        maps, settings = [other(*size), other(c, 1, 2), other(c, 2, 1), other(c, 1, 1)], (mode, "silu", 0.0)
        one = lambda n, m=maps, s=settings: ([t[n : n + 1] for t in m], *s)  # noqa: E731
        compare_of_ones("modulate", x, (maps, *settings), one)
        check_of_ones("modulate", (other(*size), x, maps, *settings, [True] * 5))


@pytest.mark.parametrize("size", ONES, ids=str)
def test_convolutions_of_sizes_of_1(size):
    """A 1x1 convolution takes planes where they are; the others show how all import and export."""
    torch.manual_seed(0)
    c = size[0]
    for x, other in of_ones(*size):
        for out in (1, 5):
            grad, same = other(out, *size[1:]), [x, other(*size)]
            settings = (rand(out, 2 * c, 1, 1), rand(out), "silu", 0.0)
            compare_of_ones("conv1x1", same, settings)
            check_of_ones("conv1x1", (grad, same, *settings, [True] * 4))
            settings = (rand(out, c, 3, 3, scale=0.3), rand(out), None, "silu", 0.0, "post")
            compare_of_ones("conv3x3", x, settings)
            check_of_ones("conv3x3", (grad, x, *settings, [True, True, True, False]))


@pytest.mark.parametrize("size", ONES, ids=str)
def test_window_attention_of_sizes_of_1(size):
    torch.manual_seed(0)
    for q, other in of_ones(*size):
        tensors = {"q": q, "k": other(*size), "v": other(*size)}
        settings = {"window": size[1:], "heads": 1}
        out = window_attention(**tensors, **settings)
        with esr_kernels.use_backend("reference"):
            exact = window_attention(**to(tensors, torch.float64), **settings)
        assert out.is_contiguous(memory_format=expected_format(q))
        close_to_ones(out, exact)
        for n in range(len(q)):
            alone = window_attention(**{name: t[n : n + 1] for name, t in tensors.items()}, **settings)
            assert torch.equal(alone[0], out[n]) and memory_format(alone) == memory_format(out)


@pytest.mark.parametrize("channels", [1, 2, 17])
@pytest.mark.parametrize("length", [1, 3])
def test_selective_scan_of_sizes_of_1(length, channels):
    torch.manual_seed(0)
    for states, batch, stride, base in itertools.product((1, 3), (1, 2), (0, 1, channels, 1000), (0, 1)):
        given = operands(length, channels, states, batch=batch)
        for name, t in given.items():
            if t.dim() == 3:
                t = t.transpose(1, 2).contiguous().transpose(1, 2) if base else t
                given[name] = strided(t, stride)
        out = torch.ops.esr.selective_scan(*given.values(), True)
        exact = reference.OPERATORS["selective_scan"](*to(tuple(given.values()), torch.float64), True)
        close_to_ones(out, exact)


def test_a_nan_reaches_the_taps_that_see_it_only():
    """In the last column the first tap of a row never sees it, though its products with the zeros outside would."""
    for layout in LAYOUTS[:2]:
        x = rand(1, 3, 6, 21)
        x[0, 1, 2, 20] = float("nan")
        grad = lay_out(rand(1, 3, 6, 21), layout)
        arguments = (grad, lay_out(x, layout), rand(3, 1, 3, 3), None, 1, "none", 0.0, False, [False, True, True])
        got = torch.ops.esr.depthwise_conv_backward(*arguments)
        exact = reference.OPERATORS["depthwise_conv_backward"](*to(arguments, torch.float64))
        assert torch.equal(got[1].isnan(), exact[1].isnan()) and exact[1].isnan().sum() == 6
        assert not got[2].isnan().any()


def test_wrong_arguments_are_refused():
    x, weight = rand(1, 4, 5, 6), rand(4, 1, 3, 3)
    native = torch.ops.esr_native
    for change, message in (
        ({"weight": rand(4, 1, 4, 3)}, "weight is 4x3, allowed are sides of 1, 3, 5 and 7"),
        ({"weight": rand(3, 1, 3, 3)}, "weight is"),
        ({"dilation": 0}, "dilation is 0, must be at least 1"),
        ({"outputs": [rand(1, 4, 5, 7)]}, "the result is"),
        ({"outputs": []}, "0 results given, must be 1"),
        ({"activation": 9}, "activation is 9"),
    ):
        settings = {"bias": None, "dilation": 1, "activation": 0, "slope": 0.0, "gated": False}
        arguments = {"x": x, "weight": weight, **settings, "outputs": [torch.empty_like(x)]} | change
        with pytest.raises(RuntimeError, match=message):
            native.depthwise_conv(**arguments)
    last = torch.empty_like(x, memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="the result has another memory format than x"):
        native.depthwise_conv(x, weight, None, 1, 0, 0.0, False, [last])
    with pytest.raises(RuntimeError, match="the result has another memory format than x"):
        native.adaptive_max_pool(x, [last])
    with pytest.raises(RuntimeError, match="map 0 has 3 channels"):
        native.modulate(x, [rand(1, 3, 2, 2)], False, 0, 0.0, [torch.empty_like(x)])
    with pytest.raises(RuntimeError, match="map 0 has another memory format than x"):
        native.modulate(x, [last], False, 0, 0.0, [torch.empty_like(x)])
    with pytest.raises(RuntimeError, match="0 maps given, must be 1 to 8"):
        native.modulate(x, [], False, 0, 0.0, [torch.empty_like(x)])
    with pytest.raises(RuntimeError, match="one memory format"):
        native.layer_norm2d(x, None, None, 1e-6, [last])
    with pytest.raises(RuntimeError, match="weight is"):
        native.layer_norm2d(x, rand(5), None, 1e-6, [torch.empty_like(x)])
