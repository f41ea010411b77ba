"""The plan: validation, derived facts, serialisation, and its execution on every backend."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import LAYOUTS, check_close, expected_format, kernel, largest_error, lay_out, rand
from torch.nn import functional as F

import esr_kernels
from esr_kernels import plan as plan_module
from esr_kernels.backends.native import engine
from esr_kernels.plan import Layer, Plan, PlanBuilder

LINEAR = {"activation": "none", "negative_slope": 0.05}
SILU = {"activation": "silu", "negative_slope": 0.05}


def small_network(dtype=torch.float32):
    """Every layer but ESA, two outputs, one of them an intermediate; its weights and its float64 oracle."""
    torch.manual_seed(0)
    weights = [kernel(20, 3), rand(20), kernel(20, 20), kernel(24, 40, 1), rand(24)]
    weights += [kernel(20, 24, 1), kernel(20, 1), rand(20), kernel(12, 20), rand(12)]
    weights = [w.to(dtype) for w in weights]
    b = PlanBuilder()
    x = b.input(3)
    image = b.input(3, 2)
    n = b.add("normalize", [x], 3, shift=[0.4, 0.5, 0.6], scale=[2.0, 3.0, 4.0])
    f = b.add("conv3x3", [n], 20, {"weight": 0, "bias": 1}, **SILU, residual_mode="post")
    g = b.add("conv3x3", [f, f], 20, {"weight": 2}, **LINEAR, residual_mode="attention")
    c = b.add("conv1x1", [f, g], 24, {"weight": 3, "bias": 4}, **SILU)
    d = b.add("bsconv", [c], 20, {"pointwise": 5, "depthwise": 6, "bias": 7}, **LINEAR, padding_mode="reflect")
    e = b.add("add", [d, f], 20)
    y = b.add("conv3x3_pixel_shuffle", [e, image], 3, {"weight": 8, "bias": 9}, upscale_factor=2)
    plan = b.finish([y, g])

    def oracle(x, image, dtype=torch.float64):
        w = [t.to(dtype) for t in weights]
        n = (x - x.new_tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)) * x.new_tensor([2.0, 3.0, 4.0]).view(1, 3, 1, 1)
        f = F.silu(F.conv2d(n, w[0], w[1], padding=1))
        h = F.conv2d(f, w[2], padding=1)
        g = (h + f) * (torch.sigmoid(h) - 0.5)
        c = F.silu(F.conv2d(torch.cat([f, g], 1), w[3], w[4]))
        d = F.conv2d(F.pad(F.conv2d(c, w[5]), (1, 1, 1, 1), mode="reflect"), w[6], w[7], groups=20)
        return F.pixel_shuffle(F.conv2d(d + f, w[8], w[9], padding=1), 2) + image, g

    return plan, weights, oracle


@pytest.mark.parametrize("size", [(2, 2), (7, 9), (33, 18)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_execution(backend, size, layout, dtype):
    plan, weights, oracle = small_network(dtype)
    x = lay_out(rand(2, 3, *size, dtype=dtype), layout)
    image = lay_out(rand(2, 3, 2 * size[0], 2 * size[1], dtype=dtype), layout)
    y, g = torch.ops.esr.run_plan([x, image], weights, plan.to_json())
    assert y.is_contiguous() and g.is_contiguous(memory_format=expected_format(x))
    for i, got in enumerate((y, g)):
        exact = oracle(x.double(), image.double())[i]
        check_close(got, exact, lambda i=i: oracle(x, image, dtype)[i], backend)


@pytest.mark.parametrize("read_again", [False, True])
def test_layers_come_when_they_are_needed(read_again):
    """If what they read is there as long anyway; else the plan stays as it is."""
    b = PlanBuilder()
    x = b.input(4)
    a = b.add("conv3x3", [x], 4, {"weight": 0}, **LINEAR)
    early = b.add("conv1x1", [a], 4, {"weight": 1}, **LINEAR)
    c = b.add("conv3x3", [a], 4, {"weight": 2}, **LINEAR)
    d = b.add("conv3x3", [c], 4, {"weight": 3}, **LINEAR)
    y = b.add("conv1x1", [early, d, a] if read_again else [early, d], 4, {"weight": 4}, **LINEAR)
    plan = b.finish([d, y])
    ordered = engine.in_order_of_need(plan)
    if not read_again:
        assert ordered is plan
        return
    assert [layer.weights["weight"] for layer in ordered.layers] == [0, 2, 3, 1, 4]
    assert [layer.inputs for layer in ordered.layers] == [(0,), (1,), (2,), (1,), (4, 3, 1)]
    assert ordered.outputs == (3, 5)


FUNCTIONS = {
    "relu": F.relu,
    "leaky_relu": lambda x: F.prelu(x, SLOPES.to(x)),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "clamp": lambda x: x.clamp(0.5, 2.0),
    "hardswish": F.hardswish,
    "mish": F.mish,
}
SLOPES = torch.tensor([0.1, -0.5, 2.0, 0.0, 1.0])


def elementwise_network():
    """Every function of five channels, and a product; what is read of them by a convolution, on the border too."""
    bounds = {"leaky_relu": (SLOPES.tolist(), [0.0] * 5), "sigmoid": ([0.0] * 5, [1.0] * 5)}
    bounds["clamp"] = [0.5] * 5, [2.0] * 5
    weights = [kernel(7, 5)]
    b = PlanBuilder()
    x = b.input(5)
    values = {}
    for name in FUNCTIONS:
        low, high = bounds.get(name, ([0.0] * 5, [0.0] * 5))
        values[name] = b.add("activate", [x], 5, function=name, low=low, high=high)
    product = b.add("multiply", [values["clamp"], values["sigmoid"]], 5)
    y = b.add("conv3x3", [product], 7, {"weight": 0}, **LINEAR, residual_mode="post")
    plan = b.finish([*values.values(), y])

    def oracle(x, weight=weights[0], dtype=torch.float64):
        gated = x.clamp(0.5, 2.0) * torch.sigmoid(x)
        return [*(f(x) for f in FUNCTIONS.values()), F.conv2d(gated, weight.to(dtype), padding=1)]

    return plan, weights, oracle


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unit_lengths(backend, layout):
    """x over the length of each pixel, which is at least 0.5 and 0 for some, and the inverse root itself."""
    torch.manual_seed(0)
    b = PlanBuilder()
    x = b.input(5)
    total = b.add("conv1x1", [b.add("multiply", [x, x], 5)], 1, {"weight": 0}, **LINEAR)
    inverse = b.add("activate", [total], 1, function="rsqrt", low=[0.5], high=[2.0])
    plan = b.finish([inverse, b.add("multiply", [x, inverse], 5)])
    image = lay_out(torch.randn(2, 5, 6, 9), layout)
    image[0, :, :2] = 0.0
    image[1, :, :, 3] *= 1e-3

    def oracle(x):
        inverse = 2 / x.square().sum(1, keepdim=True).sqrt().clamp_min(0.5)
        return inverse, x * inverse

    results = torch.ops.esr.run_plan([image], [torch.ones(1, 5, 1, 1)], plan.to_json())
    for i, (got, exact) in enumerate(zip(results, oracle(image.double()), strict=True)):
        check_close(got, exact, lambda i=i: oracle(image)[i], backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_elementwise_layers(backend, layout):
    torch.manual_seed(0)
    plan, weights, oracle = elementwise_network()
    x = lay_out(5 * torch.randn(2, 5, 6, 9), layout)
    results = torch.ops.esr.run_plan([x], weights, plan.to_json())
    for i, (got, exact) in enumerate(zip(results, oracle(x.double()), strict=True)):
        check_close(got, exact, lambda i=i: oracle(x, dtype=torch.float32)[i], backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_elementwise_layers_in_half_types(backend, dtype):
    torch.manual_seed(0)
    plan, weights, oracle = elementwise_network()
    weights = [w.to(dtype) for w in weights]
    x = (5 * torch.randn(1, 5, 7, 8)).to(dtype)
    results = torch.ops.esr.run_plan([x], weights, plan.to_json())
    for i, (got, exact) in enumerate(zip(results, oracle(x.double(), weights[0]), strict=True)):
        check_close(got, exact, lambda i=i: oracle(x, weights[0], dtype)[i], backend)


def test_functions_keep_what_is_not_a_number(backend):
    plan, weights, _ = elementwise_network()
    results = torch.ops.esr.run_plan([torch.full((1, 5, 3, 4), torch.nan)], weights, plan.to_json())
    assert all(bool(result.isnan().all()) for result in results)


def gated_network(channels):
    """A map times one channel, which is a layer's or the plan's, plus one; whole vectors and not."""
    weights = [kernel(channels, 4), kernel(1, 4), kernel(5, channels)]
    b = PlanBuilder()
    x, outside = b.input(4), b.input(1)
    y = b.add("conv3x3", [x], channels, {"weight": 0}, **LINEAR, residual_mode="post")
    one = b.add("conv3x3", [x], 1, {"weight": 1}, **LINEAR, residual_mode="post")
    gated = b.add("multiply", [y, one], channels)
    added = b.add("add", [gated, outside], channels)
    z = b.add("conv3x3", [added], 5, {"weight": 2}, **LINEAR, residual_mode="post")
    plan = b.finish([gated, z])

    def oracle(x, outside, dtype=torch.float64):
        w = [t.to(dtype) for t in weights]
        gated = F.conv2d(x, w[0], padding=1) * F.conv2d(x, w[1], padding=1)
        return [gated, F.conv2d(gated + outside, w[2], padding=1)]

    return plan, weights, oracle


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 20, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sums_and_products_with_one_channel(backend, layout, channels, dtype):
    torch.manual_seed(0)
    plan, weights, oracle = gated_network(channels)
    weights[:] = [w.to(dtype) for w in weights]
    inputs = [lay_out(rand(2, c, 6, 9), layout).to(dtype) for c in (4, 1)]
    results = torch.ops.esr.run_plan(inputs, weights, plan.to_json())
    for i, (got, exact) in enumerate(zip(results, oracle(*(x.double() for x in inputs)), strict=True)):
        check_close(got, exact, lambda i=i: oracle(*inputs, dtype)[i], backend)


# Channels, size, kernel, dilation, gated, activation: of published networks, with taps far beyond the image, and odd.
CHANNELWISE = [
    (40, (7, 9), (3, 3), 1, False, "none"),
    (36, (6, 21), (5, 5), 1, True, "gelu"),
    (21, (9, 17), (3, 7), 1, True, "silu"),
    (12, (19, 23), (7, 7), 1, False, "leaky_relu"),
    (16, (11, 40), (5, 3), 3, False, "relu"),
    (7, (5, 4), (7, 7), 3, True, "none"),
    (44, (1, 1), (5, 5), 1, False, "gelu_tanh"),
    (8, (3, 12), (1, 5), 2, False, "silu"),
    (72, (8, 33), (3, 3), 1, True, "none"),
]


def channelwise_network(channels, kernel_size, dilation, gated, activation):
    """Normalised, widened, convolved channel by channel, added, normalised without weights; the convolution's result
    is an output too."""
    wide = 2 * channels if gated else channels
    taps = kernel_size[0] * kernel_size[1]
    weights = [1 + 0.2 * rand(channels), rand(channels), kernel(wide, channels, 1)]
    weights += [rand(wide, 1, *kernel_size, scale=taps**-0.5), rand(wide)]
    b = PlanBuilder()
    x = b.input(channels)
    has = {"has_weight": True, "has_bias": True}
    n = b.add("layer_norm2d", [x], channels, {"weight": 0, "bias": 1}, eps=1e-5, **has)
    e = b.add("conv1x1", [n], wide, {"weight": 2}, **LINEAR)
    options = {"dilation": dilation, "gated": gated, "activation": activation, "negative_slope": 0.1}
    d = b.add("depthwise_conv", [e], channels, {"weight": 3, "bias": 4}, kernel_size=list(kernel_size), **options)
    s = b.add("add", [d, x], channels)
    m = b.add("layer_norm2d", [s], channels, eps=1e-6, has_weight=False, has_bias=False)
    plan = b.finish([m, d])

    def normalise(x, eps, *w):
        return F.layer_norm(x.permute(0, 2, 3, 1), [channels], *w, eps=eps).permute(0, 3, 1, 2)

    def oracle(x, w):
        e = F.conv2d(normalise(x, 1e-5, w[0], w[1]), w[2])
        padding = [dilation * (k // 2) for k in kernel_size]
        h = F.conv2d(e, w[3], w[4], padding=padding, dilation=dilation, groups=wide)
        first, second = h.chunk(2, 1) if gated else (h, None)
        functions = {"none": lambda t: t, "relu": F.relu, "silu": F.silu, "gelu": F.gelu}
        functions["leaky_relu"] = lambda t: F.leaky_relu(t, 0.1)
        functions["gelu_tanh"] = lambda t: F.gelu(t, approximate="tanh")
        d = functions[activation](first)
        d = d * second if gated else d
        return normalise(d + x, 1e-6), d

    return plan, weights, oracle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "size", "kernel_size", "dilation", "gated", "activation"),
    CHANNELWISE,
    ids=["-".join(map(str, (c, *k, d, *["gated"] * g, a))) for c, _, k, d, g, a in CHANNELWISE],
)
def test_layers_channel_by_channel(backend, channels, size, kernel_size, dilation, gated, activation, dtype):
    torch.manual_seed(channels)
    plan, weights, oracle = channelwise_network(channels, kernel_size, dilation, gated, activation)
    weights = [w.to(dtype) for w in weights]
    layout = LAYOUTS[channels % len(LAYOUTS)]
    x = lay_out(rand(2, channels, *size, dtype=dtype), layout)
    # What an earlier run left in the backend's memory is no number, and must not come through.
    torch.ops.esr.run_plan([torch.full_like(x, torch.nan)], weights, plan.to_json())
    results = torch.ops.esr.run_plan([x], weights, plan.to_json())
    exact = oracle(x.double(), [w.double() for w in weights])
    for i, got in enumerate(results):
        assert got.is_contiguous(memory_format=expected_format(x))
        check_close(got, exact[i], lambda i=i: oracle(x, weights)[i], backend)
        if dtype == torch.float32:
            assert largest_error(got, exact[i]) <= 1e-5 * float(exact[i].abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["depthwise_conv", "gated", "layer_norm2d"])
def test_one_layer_channel_by_channel(backend, op, layout):
    """Between an input and an output in memory of any layout."""
    torch.manual_seed(3)
    b = PlanBuilder()
    x = b.input(22)
    options = {"dilation": 1, "gated": op == "gated", "activation": "relu", "negative_slope": 0.0}
    if op == "layer_norm2d":
        weights, single = [rand(22), rand(22)], torch.ops.esr.layer_norm2d
        y = b.add(op, [x], 22, {"weight": 0, "bias": 1}, eps=1e-6, has_weight=True, has_bias=True)
        arguments = (1e-6,)
    else:
        weights, single = [rand(22, 1, 5, 3)], torch.ops.esr.depthwise_conv
        y = b.add("depthwise_conv", [x], 11 if op == "gated" else 22, {"weight": 0}, kernel_size=[5, 3], **options)
        arguments = (None, 1, "relu", 0.0, op == "gated")
    image = lay_out(rand(2, 22, 9, 14), layout)
    (got,) = torch.ops.esr.run_plan([image], weights, b.finish([y]).to_json())
    assert got.is_contiguous(memory_format=expected_format(image))
    with esr_kernels.use_backend("reference"):
        exact = single(image.double(), *(w.double() for w in weights), *arguments)
    check_close(got, exact, lambda: got, backend)


def test_facts_of_layers_channel_by_channel():
    plan, weights, _ = channelwise_network(8, (3, 7), 2, True, "silu")
    assert [layer.halo for layer in plan.layers] == [0, 0, 6, 0, 0] and plan.receptive_radius == 6
    assert Plan.from_json(plan.to_json()) == plan
    pixels = 2 * 9 * 11
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        torch.ops.esr.run_plan([rand(2, 8, 9, 11)], weights, plan.to_json())
    assert counter.get_total_flops() == pixels * (7 * 8 + 2 * 8 * 16 + 2 * 21 * 16 + 5 * 8)
    lines = str(plan).splitlines()
    described = lines[4].split()
    assert described[1:6] == ["depthwise_conv", "%2", "8", "1", "6"]
    assert described[6:] == ["3x7,", "dilation", "2,", "gated,", "silu", "returned"]


def test_an_empty_batch_of_layers_channel_by_channel(backend):
    plan, weights, _ = channelwise_network(12, (5, 5), 1, True, "gelu")
    results = torch.ops.esr.run_plan([torch.empty(0, 12, 8, 9)], weights, plan.to_json())
    assert all(result.shape == (0, 12, 8, 9) for result in results)


def test_opcheck_of_layers_channel_by_channel(backend):
    plan, weights, _ = channelwise_network(6, (3, 3), 1, False, "relu")
    torch.library.opcheck(torch.ops.esr.run_plan.default, ([rand(2, 6, 7, 9)], weights, plan.to_json()))


@pytest.mark.parametrize(
    ("shape", "gated", "message"),
    [
        ((6, 1, 3, 3), False, r"layer 0 \(depthwise_conv\): (x|weight) has "),
        ((5, 1, 2, 3), False, r"layer 0 \(depthwise_conv\): weight .*2.* allowed are|must be odd"),
        ((5, 1, 9, 3), False, r"layer 0 \(depthwise_conv\): weight .*9.* allowed are|must be odd"),
        ((5, 1, 3, 3), True, r"layer 0 \(depthwise_conv\): .* even number"),
    ],
)
def test_wrong_weights_of_a_depthwise_layer(backend, shape, gated, message):
    if backend not in ("native-cpu", "native-cuda"):
        pytest.skip("the engines check weights")
    b = PlanBuilder()
    options = {"kernel_size": list(shape[2:]), "dilation": 1, "activation": "none", "negative_slope": 0.0}
    plan = b.finish([b.add("depthwise_conv", [b.input(5)], 5, {"weight": 0}, gated=gated, **options)])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.esr.run_plan([rand(1, 5, 7, 8)], [rand(*shape)], plan.to_json())


# --- several resolutions: resizing, pooling, modulation, some of the channels

RESIZES = {
    mode: (lambda x, r, mode=mode: F.interpolate(x, scale_factor=r, mode=mode))
    for mode in ("nearest", "bilinear", "bicubic")
}


def resizing_network(mode, factor, dtype=torch.float32):
    """An image enlarged for the sum with a pixel shuffle's, and a map of 20 channels enlarged for a convolution and to
    be returned."""
    torch.manual_seed(factor)
    tail = kernel(3 * factor**2, 20)
    weights = [kernel(20, 3), rand(20), tail, tail, kernel(6, 20)]
    weights = [w.to(dtype) for w in weights]
    b = PlanBuilder()
    x = b.input(3)
    n = b.add("normalize", [x], 3, shift=[0.4, 0.5, 0.6], scale=[2.0, 3.0, 4.0])
    f = b.add("conv3x3", [n], 20, {"weight": 0, "bias": 1}, **SILU, residual_mode="post")
    options = {"mode": mode, "upscale_factor": factor}
    image = b.add("resize", [x], 3, **options)
    y = b.add("conv3x3_pixel_shuffle", [f, image], 3, {"weight": 2}, upscale_factor=factor)
    normalized = b.add("resize", [n], 3, **options)
    z = b.add("conv3x3_pixel_shuffle", [f, normalized], 3, {"weight": 3}, upscale_factor=factor)
    large = b.add("resize", [f], 20, **options)
    g = b.add("conv3x3", [large], 6, {"weight": 4}, **LINEAR, residual_mode="post")
    plan = b.finish([y, z, g, large])

    def oracle(x, dtype=torch.float64):
        w = [t.to(dtype) for t in weights]
        n = (x - x.new_tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)) * x.new_tensor([2.0, 3.0, 4.0]).view(1, 3, 1, 1)
        f = F.silu(F.conv2d(n, w[0], w[1], padding=1))
        tail = F.pixel_shuffle(F.conv2d(f, w[2], padding=1), factor)
        large = RESIZES[mode](f, factor)
        return tail + RESIZES[mode](x, factor), tail + RESIZES[mode](n, factor), F.conv2d(large, w[4], padding=1), large

    return plan, weights, oracle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("factor", "size"), [(4, (7, 9)), (3, (1, 1)), (2, (19, 33)), (5, (2, 3))])
@pytest.mark.parametrize("mode", RESIZES)
def test_resizing_layers(backend, mode, factor, size, dtype):
    plan, weights, oracle = resizing_network(mode, factor, dtype)
    assert plan.scales == (1, 1, 1, *[factor] * 6) and plan.scale == factor
    layout = LAYOUTS[(factor + len(mode)) % len(LAYOUTS)]
    x = lay_out(torch.rand(2, 3, *size).to(dtype), layout)
    # What an earlier run left in the backend's memory is no number, and must not come through.
    torch.ops.esr.run_plan([torch.full_like(x, torch.nan)], weights, plan.to_json())
    results = torch.ops.esr.run_plan([x], weights, plan.to_json())
    exact = oracle(x.double())
    for i, got in enumerate(results):
        check_close(got, exact[i], lambda i=i: oracle(x, dtype)[i], backend)
        if dtype == torch.float32 and i < 2:
            assert largest_error(got, exact[i]) <= 1e-5 * max(float(exact[i].abs().max()), 1.0)


# Channels, size, divisors, mode, activation; one pixel pooled from all of a side, windows that overlap.
MODULATIONS = [
    (36, (37, 43), (4, 8, 16), "nearest", "gelu"),
    (12, (16, 33), (8,), "bilinear", "gelu"),
    (24, (17, 24), (8,), "nearest", "none"),
    (8, (5, 7), (5, 2, 3), "bilinear", "silu"),
    (44, (3, 2), (1, 2), "nearest", "leaky_relu"),
]


def modulating_network(channels, divisors, mode, activation, dtype=torch.float32):
    """SAFMN's attention with normalisation before it and a residual around it: parts of the channels pooled, convolved
    and modulating all."""
    torch.manual_seed(channels)
    part = channels // (len(divisors) + 1)
    weights = [kernel(channels, 5), rand(channels)]
    for _ in range(len(divisors) + 1):
        weights += [rand(part, 1, 3, 3), kernel(channels, part, 1)]
    weights += [kernel(7, channels)]
    weights = [w.to(dtype) for w in weights]
    b = PlanBuilder()
    x = b.input(5)
    f = b.add("conv3x3", [x], channels, {"weight": 0, "bias": 1}, **SILU, residual_mode="post")
    depthwise = {"kernel_size": [3, 3], "dilation": 1, "gated": False, **LINEAR}
    maps = []
    for k, divisor in enumerate((None, *divisors)):
        y = b.add("slice", [f], part, start=k * part)
        y = y if divisor is None else b.add("adaptive_max_pool", [y], part, divisor=divisor)
        y = b.add("depthwise_conv", [y], part, {"weight": 2 + 2 * k}, **depthwise)
        maps.append(b.add("conv1x1", [y], channels, {"weight": 3 + 2 * k}, **LINEAR))
    m = b.add("modulate", [f, *maps], channels, mode=mode, activation=activation, negative_slope=0.1)
    s = b.add("add", [m, f], channels)
    y = b.add("conv3x3", [s], 7, {"weight": len(weights) - 1}, **LINEAR, residual_mode="post")
    plan = b.finish([y, m])

    def oracle(x, dtype=torch.float64):
        w = [t.to(dtype) for t in weights]
        f = F.silu(F.conv2d(x, w[0], w[1], padding=1))
        total = 0
        for k, divisor in enumerate((None, *divisors)):
            y = f[:, k * part : (k + 1) * part]
            if divisor is not None:
                # PyTorch has no half types here, and a maximum needs no more than they have.
                wide = y if dtype == torch.float64 else y.float()
                y = F.adaptive_max_pool2d(wide, [n // divisor for n in x.shape[2:]]).to(y)
            y = F.conv2d(F.conv2d(y, w[2 + 2 * k], padding=1, groups=part), w[3 + 2 * k])
            corners = None if mode == "nearest" else False
            total = total + F.interpolate(y, size=x.shape[2:], mode=mode, align_corners=corners)
        functions = {"none": lambda t: t, "silu": F.silu, "gelu": F.gelu, "leaky_relu": lambda t: F.leaky_relu(t, 0.1)}
        m = functions[activation](total) * f
        return F.conv2d(m + f, w[-1], padding=1), m

    return plan, weights, oracle


def check_network(plan, weights, oracle, x, backend):
    """Run a plan and compare its results, which are returned, with those of an oracle in float64."""
    # What an earlier run left in the backend's memory is no number, and must not come through.
    torch.ops.esr.run_plan([torch.full_like(x, torch.nan)], weights, plan.to_json())
    results = torch.ops.esr.run_plan([x], weights, plan.to_json())
    exact = oracle(x.double())
    for i, got in enumerate(results):
        assert got.is_contiguous(memory_format=expected_format(x))
        check_close(got, exact[i], lambda i=i: oracle(x, x.dtype)[i], backend)
        if x.dtype == torch.float32:
            assert largest_error(got, exact[i]) <= 1e-5 * max(float(exact[i].abs().max()), 1.0)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "size", "divisors", "mode", "activation"),
    MODULATIONS,
    ids=["-".join(map(str, (c, *d, m, a))) for c, _, d, m, a in MODULATIONS],
)
def test_pooling_and_modulating_layers(backend, channels, size, divisors, mode, activation, dtype):
    plan, weights, oracle = modulating_network(channels, divisors, mode, activation, dtype)
    x = lay_out(rand(2, 5, *size, dtype=dtype), LAYOUTS[channels % len(LAYOUTS)])
    check_network(plan, weights, oracle, x, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [3, 16, 21])
def test_some_channels_of_an_input(backend, layout, channels):
    """Returned as they are, and modulated by one of another size that comes from outside."""
    b = PlanBuilder()
    small, x = b.input(channels), b.input(40, 3)
    part = b.add("slice", [x], channels, start=7)
    m = b.add("modulate", [part, small], channels, mode="nearest", activation="none", negative_slope=0.0)
    plan = b.finish([part, m])
    inputs = [lay_out(rand(2, channels, 4, 5), layout), lay_out(rand(2, 40, 12, 15), layout)]
    got = torch.ops.esr.run_plan(inputs, [], plan.to_json())
    exact = inputs[1].double()[:, 7 : 7 + channels]
    check_close(got[0], exact, lambda: got[0], backend)
    check_close(got[1], exact * F.interpolate(inputs[0].double(), scale_factor=3), lambda: got[1], backend)


@pytest.mark.parametrize("shape", [(0, 5, 16, 18), (2, 5, 0, 18)])
def test_no_images_or_pixels_in_several_resolutions(backend, shape):
    plan, weights, _ = modulating_network(36, (4, 8, 16), "nearest", "gelu")
    if shape[0] and backend == "reference":
        pytest.skip("PyTorch's resize wants pixels")
    results = torch.ops.esr.run_plan([torch.empty(shape)], weights, plan.to_json())
    assert [r.shape for r in results] == [(shape[0], c, *shape[2:]) for c in (7, 36)]
    if not shape[0]:
        plan, weights, _ = resizing_network("bilinear", 2)
        results = torch.ops.esr.run_plan([torch.empty(0, 3, 4, 5)], weights, plan.to_json())
        assert [r.shape for r in results] == [(0, c, 8, 10) for c in (3, 3, 6, 20)]


def test_an_image_too_small_to_be_pooled(backend):
    plan, weights, _ = modulating_network(36, (4, 8, 16), "nearest", "gelu")
    with pytest.raises(
        (RuntimeError, ValueError), match=r"16 pixels a side|expected output_size|non-empty|greater than"
    ):
        torch.ops.esr.run_plan([rand(1, 5, 15, 40)], weights, plan.to_json())


def test_facts_of_layers_in_several_resolutions():
    plan, weights, _ = modulating_network(12, (8,), "bilinear", "gelu")
    assert plan.receptive_radius is None and Plan.from_json(plan.to_json()) == plan
    assert plan.sizes(37, 43)[5:9] == [(37, 43), (4, 5), (4, 5), (4, 5)]
    assert json.loads(plan.to_json())["scales"][6] == "1/8"
    lines = [line.split() for line in str(plan).splitlines()[1:]]
    assert lines[5][1:6] == ["slice", "%1", "6", "1", "0"] and lines[5][7:] == ["from", "channel", "6"]
    assert lines[6][1:6] == ["adaptive_max_pool", "%5", "6", "1/8", "all"] and lines[6][7:] == ["x1/8"]
    assert lines[9][1:6] == ["modulate", "%1", "%4", "%8", "12"] and lines[9][-1] == "returned"
    large, small = 2 * 37 * 43, 2 * 4 * 5
    convolutions = large * 2 * 9 * 5 * 12 + (large + small) * (2 * 9 * 6 + 2 * 6 * 12) + large * 2 * 9 * 12 * 7
    assert plan.flops(2, 37, 43) == convolutions + large * 8 * 12
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        torch.ops.esr.run_plan([rand(2, 5, 37, 43)], weights, plan.to_json())
    assert counter.get_total_flops() == plan.flops(2, 37, 43)

    plan, _, _ = resizing_network("bicubic", 4)
    assert [layer.halo for layer in plan.layers] == [0, 1, 2, 1, 2, 1, 2, 1]
    pixels = 7 * 9
    expected = 2 * 9 * 20 * (3 + 2 * 48) * pixels + 16 * pixels * (2 * 9 * 20 * 6 + 32 * (3 + 3 + 20))
    assert plan.flops(1, 7, 9) == expected


def test_opcheck_of_layers_in_several_resolutions(backend):
    plan, weights, _ = modulating_network(12, (4,), "bilinear", "gelu")
    torch.library.opcheck(torch.ops.esr.run_plan.default, ([rand(2, 5, 9, 11)], weights, plan.to_json()))


def test_pooled_values_stay_inside():
    b = PlanBuilder()
    pooled = b.add("adaptive_max_pool", [b.input(5)], 5, divisor=8)
    with pytest.raises(ValueError, match=r"outputs \[1\] are pooled"):
        b.finish([pooled])
    large = b.add("resize", [pooled], 5, mode="nearest", upscale_factor=8)
    with pytest.raises(ValueError, match=r"layer 1 \(resize\) reads %1, which is pooled"):
        b.finish([large])


@pytest.mark.parametrize(
    ("op", "integers", "message"),
    [
        ("slice", [0, 3, 3], r"layer 0 \(slice\): x has 5 channels, 6 are needed"),
        ("slice", [0, -1, 3], r"layer 0 \(slice\) takes 3 channels from -1 on"),
        ("resize", [0, 3, 2], r"mode is 3, must be 0..2"),
        ("resize", [0, 1, 65], r"upscale_factor of layer 0 \(resize\) is 65, must be 1..64"),
        ("adaptive_max_pool", [0, 0], r"divisor of layer 0 \(adaptive_max_pool\) is 0"),
        ("modulate", [9, *[0] * 10, 0, 0, -1], r"layer 0 \(modulate\) has 9 maps, allowed are 1..8"),
        ("modulate", [1, 0, 0, 2, 0, -1], r"mode is 2, must be 0..1"),
    ],
)
def test_wrong_programs_in_several_resolutions(op, integers, message):
    program = [engine.PROGRAM_FORMAT, 1, 1, 1, engine.OP_CODES[op], len(integers), *integers, 1]

    def run():
        handle = torch.ops.esr_native.compile_plan(program, [], [])
        torch.ops.esr_native.execute_plan(handle, [rand(1, 5, 8, 8)], [rand(1, 3, 8, 8)])

    with pytest.raises(RuntimeError, match=message):
        run()


# --- statistics: values of one pixel


def statistic_of(x, kind, correction):
    mean = x.mean((2, 3), keepdim=True)
    variance = (x - mean).square().sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - correction)
    values = {"mean": mean, "variance": variance, "std": variance.sqrt(), "contrast": variance.sqrt() + mean}
    return x.amax((2, 3), keepdim=True) if kind == "maximum" else values[kind]


def statistic_network(channels, kind, correction, dtype=torch.float32):
    """Squeeze and excitation of a convolved image: the statistic passes layers of all kinds, multiplies the map and is
    added to it, as one of its channels is too."""
    torch.manual_seed(channels)
    hidden = channels // 4 + 1
    weights = [kernel(channels, 5), rand(channels), kernel(hidden, channels, 1), rand(hidden)]
    weights += [kernel(channels, 2 * hidden, 1), rand(channels), 1 + 0.1 * rand(channels), kernel(1, channels, 1)]
    weights += [kernel(7, channels)]
    weights = [w.to(dtype) for w in weights]
    b = PlanBuilder()
    x = b.input(5)
    f = b.add("conv3x3", [x], channels, {"weight": 0, "bias": 1}, **SILU, residual_mode="post")
    s = b.add("statistic", [f], channels, kind=kind, correction=correction)
    h = b.add("conv1x1", [s], hidden, {"weight": 2, "bias": 3}, **SILU)
    g = b.add("conv1x1", [h, h], channels, {"weight": 4, "bias": 5}, **LINEAR)
    g = b.add("add", [g, s], channels)
    options = {"low": [0.0] * channels, "high": [1.0] * channels}
    gate = b.add("activate", [g], channels, function="sigmoid", **options)
    squared = b.add("multiply", [gate, gate], channels)
    n = b.add("layer_norm2d", [squared], channels, {"weight": 6}, eps=1.0, has_weight=True, has_bias=False)
    m = b.add("modulate", [f, gate], channels, mode="nearest", activation="none", negative_slope=0.0)
    p = b.add("modulate", [m, n, gate], channels, mode="bilinear", activation="silu", negative_slope=0.0)
    one = b.add("conv1x1", [n], 1, {"weight": 7}, **LINEAR)
    a = b.add("add", [p, s], channels)
    c = b.add("add", [a, one], channels)
    y = b.add("conv3x3", [c], 7, {"weight": 8}, **LINEAR, residual_mode="post")
    plan = b.finish([y, m, c])

    def oracle(x, dtype=torch.float64):
        w = [t.to(dtype) for t in weights]
        f = F.silu(F.conv2d(x, w[0], w[1], padding=1))
        s = statistic_of(f, kind, correction)
        h = F.silu(F.conv2d(s, w[2], w[3]))
        gate = torch.sigmoid(F.conv2d(torch.cat([h, h], 1), w[4], w[5]) + s)
        n = F.layer_norm((gate * gate).permute(0, 2, 3, 1), [channels], w[6], eps=1.0).permute(0, 3, 1, 2)
        m = f * gate
        c = m * F.silu(n + gate) + s + F.conv2d(n, w[7])
        return F.conv2d(c, w[8], padding=1), m, c

    return plan, weights, oracle


# Channels, size, statistic, correction: whole vectors and not, one pixel and one row, rows of several blocks.
STATISTICS = [
    (3, (37, 43), "mean", 0),
    (8, (1, 1), "mean", 0),
    (20, (9, 300), "variance", 0),
    (24, (33, 34), "variance", 1),
    (16, (1, 7), "std", 1),
    (72, (8, 33), "std", 0),
    (36, (1, 1), "contrast", 0),
    (40, (21, 18), "contrast", 1),
    (21, (5, 2), "maximum", 0),
    (48, (7, 513), "maximum", 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "size", "kind", "correction"),
    STATISTICS,
    ids=["-".join(map(str, (c, *s, k))) for c, s, k, _ in STATISTICS],
)
def test_statistics(backend, channels, size, kind, correction, dtype):
    plan, weights, oracle = statistic_network(channels, kind, correction, dtype)
    x = lay_out(rand(2, 5, *size, dtype=dtype), LAYOUTS[channels % len(LAYOUTS)])
    results = check_network(plan, weights, oracle, x, backend)
    if backend != "reference":  # an image's result does not depend on the others
        alone = torch.ops.esr.run_plan([x[1:]], weights, plan.to_json())
        assert all(torch.equal(got[1:], one) for got, one in zip(results, alone, strict=True))


def statistic_plan(channels, kind, correction):
    """Zeros plus a statistic of the image, without weights."""
    b = PlanBuilder()
    zeros, x = b.input(channels), b.input(channels)
    s = b.add("statistic", [x], channels, kind=kind, correction=correction)
    return b.finish([b.add("add", [zeros, s], channels)]).to_json()


@pytest.mark.parametrize("kind", plan_module.STATISTICS)
def test_statistics_of_many_pixels(backend, kind):
    """Deviations much smaller than the mean, far values, shades: float32 sums that go wrong do so here."""
    torch.manual_seed(0)
    # CUDA and Triton are emulated on a CPU, which takes long.
    x = torch.randn(1, 6, *((90, 210) if backend in ("native-cuda", "triton") else (300, 700)))
    x[:, 1] += 100
    x[:, 2] = x[:, 2].abs() * 1e-4 + 1
    x[:, 3, 0, 0] = 1e4
    x[:, 4] += torch.linspace(0, 1000, x.shape[2])[:, None]
    x[:, 5] = 3.0
    (got,) = torch.ops.esr.run_plan([torch.zeros_like(x), x], [], statistic_plan(6, kind, 1))
    exact = statistic_of(x.double(), kind, 1)
    assert torch.equal(got, got[:, :, :1, :1].expand_as(got))
    relative = ((got[:, :, :1, :1].double() - exact).abs() / exact.abs().clamp(min=1e-9)).flatten()
    # A mean of numbers around zero is small beside them.
    bound = torch.full([6], 2e-6) if kind != "mean" else torch.tensor([1e-4, *[2e-6] * 2, 1e-3, *[2e-6] * 2])
    assert bool((relative <= bound).all()), relative


@pytest.mark.parametrize("kind", plan_module.STATISTICS)
@pytest.mark.parametrize("size", [(1, 1), (9, 24), (3, 301)])
def test_statistics_of_infinities_and_nan(backend, kind, size):
    x = rand(1, 18, *size)
    x[0, 1] = -torch.inf
    x[0, 2, -1, -1], x[0, 4, 0, 0] = torch.inf, -torch.inf
    x[0, 3, 0, -1] = x[0, 17, -1, 0] = torch.nan
    x[0, 5, 0, 0], x[0, 5, -1, -1] = torch.inf, -torch.inf
    for correction in (0, 1):
        (got,) = torch.ops.esr.run_plan([torch.zeros_like(x), x], [], statistic_plan(18, kind, correction))
        exact = statistic_of(x, kind, correction).expand_as(x)
        torch.testing.assert_close(got, exact, equal_nan=True)


def test_statistics_without_images_or_degrees_of_freedom(backend):
    plan, weights, _ = statistic_network(12, "contrast", 1)
    results = torch.ops.esr.run_plan([torch.empty(0, 5, 8, 9)], weights, plan.to_json())
    assert [r.shape for r in results] == [(0, c, 8, 9) for c in (7, 12, 12)]
    for kind in plan_module.CORRECTED:
        (got,) = torch.ops.esr.run_plan([torch.zeros(1, 3, 1, 1), rand(1, 3, 1, 1)], [], statistic_plan(3, kind, 1))
        assert bool(got.isnan().all())


def test_facts_of_statistics():
    plan, weights, _ = statistic_network(12, "contrast", 1)
    assert plan.receptive_radius is None and Plan.from_json(plan.to_json()) == plan
    assert plan.scales[2:8] == (0,) * 6 and plan.sizes(7, 9)[1:9] == [(7, 9), *[(1, 1)] * 7]
    lines = [line.split() for line in str(plan).splitlines()[1:]]
    assert lines[2][1:6] == ["statistic", "%1", "12", "pixel", "all"]
    assert lines[2][-3:] == ["contrast,", "correction", "1"]
    small = 2 * (12 * 4 + 8 * 12 + 12) + 6 * 12
    large = 7 * 9 * (2 * 9 * 5 * 12 + 4 * 12 + 8 * 2 * 12 + 2 * 9 * 12 * 7)
    assert plan.flops(2, 7, 9) == 2 * (small + large)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        torch.ops.esr.run_plan([rand(2, 5, 7, 9)], weights, plan.to_json())
    assert counter.get_total_flops() == plan.flops(2, 7, 9)


def test_opcheck_of_statistics(backend):
    plan, weights, _ = statistic_network(6, "std", 0)
    torch.library.opcheck(torch.ops.esr.run_plan.default, ([rand(2, 5, 6, 7)], weights, plan.to_json()))


def test_values_of_one_pixel_stay_inside():
    def layers(op, *inputs, **attributes):
        b = PlanBuilder()
        x = b.input(5)
        s = b.add("statistic", [x], 5, kind="mean", correction=0)
        y = b.add(op, [(x, s)[i] for i in inputs], 5, **attributes)
        return b.finish([y])

    layers("add", 0, 1)
    with pytest.raises(ValueError, match=r"outputs \[2\] are pooled"):
        layers("add", 1, 1)
    with pytest.raises(ValueError, match=r"layer 1 \(resize\) reads %1, which is pooled"):
        layers("resize", 1, mode="nearest", upscale_factor=8)
    for op, *inputs in (("add", 1, 0), ("multiply", 0, 1), ("conv1x1", 0, 1), ("conv3x3", 1, 0), ("modulate", 1, 0)):
        with pytest.raises(ValueError, match=rf"layer 1 \({op}\) reads %\d and %\d, one of which is one pixel"):
            layers(op, *inputs)
    with pytest.raises(ValueError, match=r"inputs \[1\] have a scale below 1"):
        Plan(((3, 1), (3, 0)), (Layer("add", (0, 1), {}, {}, 3),), (2,))


@pytest.mark.parametrize(
    ("layers", "outputs", "message"),
    [
        ([[15, 3, 0, 5, 0]], [1], r"kind is 5, must be 0..4"),
        ([[15, 3, 0, 1, 2]], [1], r"correction is 2, must be 0..1"),
        ([[15, 3, 0, 0, 0]], [1], "output 1 is one pixel, which can only be read by layers"),
        ([[15, 3, 0, 0, 0], [12, 3, 1, 0, 2]], [2], r"layer 1 \(resize\) enlarges value 1, which is one pixel"),
        ([[15, 3, 0, 0, 0], [7, 2, 0, 1]], [2], r"layer 1 \(multiply\) reads values 0 and 1, one of which is one"),
        ([[15, 3, 0, 0, 0], [6, 2, 1, 0]], [2], r"layer 1 \(add\) reads values 1 and 0, one of which is one"),
    ],
)
def test_wrong_programs_with_statistics(layers, outputs, message):
    program = [engine.PROGRAM_FORMAT, 1, len(layers), len(outputs), *(i for layer in layers for i in layer), *outputs]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.esr_native.compile_plan(program, [], [])


def test_empty_batch(backend):
    plan, weights, _ = small_network()
    y, g = torch.ops.esr.run_plan([torch.empty(0, 3, 8, 9), torch.empty(0, 3, 16, 18)], weights, plan.to_json())
    assert y.shape == (0, 3, 16, 18) and g.shape == (0, 20, 8, 9)


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_opcheck(backend, layout):
    plan, weights, _ = small_network()
    inputs = [lay_out(rand(2, 3, 7, 9), layout), lay_out(rand(2, 3, 14, 18), layout)]
    torch.library.opcheck(torch.ops.esr.run_plan.default, (inputs, weights, plan.to_json()))


def test_weights_are_packed_again_when_they_change(backend):
    plan, weights, oracle = small_network()
    inputs = [rand(1, 3, 7, 9), rand(1, 3, 14, 18)]
    torch.ops.esr.run_plan(inputs, weights, plan.to_json())
    weights[8].mul_(3)
    y, _ = torch.ops.esr.run_plan(inputs, weights, plan.to_json())
    check_close(y, oracle(*(x.double() for x in inputs))[0], lambda: y, backend)


def test_a_plan_without_weights_is_compiled_once():
    if esr_kernels.native.load() is not None:
        pytest.skip("no compiled library")
    b = PlanBuilder()
    x = b.input(6)
    n = b.add("layer_norm2d", [x], 6, eps=1e-6, has_weight=False, has_bias=False)
    plan = b.finish([b.add("add", [n, x], 6)])
    assert engine.compiled_plan(plan, [], compare=False) is engine.compiled_plan(plan, [], compare=False)
    image = rand(2, 6, 5, 7)
    with esr_kernels.use_backend("native-cpu"):
        (y,) = torch.ops.esr.run_plan([image], [], plan.to_json())
    exact = F.layer_norm(image.double().movedim(1, -1), [6], eps=1e-6).movedim(-1, 1) + image.double()
    assert float((y.double() - exact).abs().max()) < 1e-5


def test_gradients_are_refused():
    plan, weights, _ = small_network()
    inputs = [rand(1, 3, 7, 9).requires_grad_(), rand(1, 3, 14, 18)]
    y, _ = torch.ops.esr.run_plan(inputs, weights, plan.to_json())
    with pytest.raises(RuntimeError, match="esr::run_plan is for inference"):
        y.sum().backward()


def test_flops():
    plan, weights, _ = small_network()
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        torch.ops.esr.run_plan([rand(2, 3, 7, 9), rand(2, 3, 14, 18)], weights, plan.to_json())
    macs = 63 * (9 * 3 * 20 + 9 * 20 * 20 + 40 * 24 + 24 * 20 + 9 * 20 + 9 * 20 * 12)
    assert counter.get_total_flops() == 2 * 2 * macs == plan.flops(2, 7, 9)


def test_serialisation_round_trip():
    plan, _, _ = small_network()
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.to_json() == plan.to_json()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a serialised plan"),
        ("[]", "not a serialised plan"),
        ("{}", "not a serialised plan"),
        (json.dumps({"format": 99}), "format 99 is not supported, this version reads format 1"),
    ],
)
def test_broken_text(text, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text)


def test_facts():
    plan, _, _ = small_network()
    assert plan.channels == (3, 3, 3, 20, 20, 24, 20, 20, 3)
    assert plan.scales == (1, 2, 1, 1, 1, 1, 1, 1, 2)
    assert plan.scale == 2
    assert plan.receptive_radius == 4  # two convolutions, the depthwise one and the tail


def test_buffers_are_reused_but_never_while_still_read():
    plan, _, _ = small_network()
    last_read = {}
    for k, layer in enumerate(plan.layers):
        for i in layer.inputs:
            last_read[i] = len(plan.inputs) + k
    taken = [(i, b) for i, b in enumerate(plan.buffers) if b is not None]
    assert len({b for _, b in taken}) < len(taken)
    for i, b in taken:
        for j, other in taken:
            assert not (i < j and b == other and last_read[i] >= j)
    assert all(plan.buffers[i] is None for i in (0, 1, *plan.outputs))


def test_an_attention_over_the_whole_image_has_no_radius():
    b = PlanBuilder()
    weights = {name: i for i, name in enumerate(("w1", "w2", "w3", "w4"))}
    y = b.add("esa", [b.input(8)], 8, weights, hidden=4, has_conv_f=False, has_conv_max=False)
    assert b.finish([y]).receptive_radius is None


def test_table():
    plan, _, _ = small_network()
    lines = str(plan).splitlines()
    assert len(lines) == 1 + 2 + 7
    assert lines[3].split() == [
        "%2",
        "normalize",
        "%0",
        "3",
        "1",
        "0",
        "0",
        "shift",
        "0.4",
        "0.5",
        "0.6,",
        "scale",
        "2",
        "3",
        "4",
    ]
    assert lines[5].split() == ["%4", "conv3x3", "%3", "%3", "20", "1", "1", "residual", "attention", "returned"]


@pytest.mark.parametrize(
    ("layers", "outputs", "message"),
    [
        ((Layer("conv5x5", (0,), {}, {}, 3),), (1,), "layer 0 has the unknown operator 'conv5x5'"),
        ((Layer("add", (0, 1), {}, {}, 3),), (1,), r"layer 0 \(add\) reads \(0, 1\), defined so far are 0..0"),
        ((Layer("add", (0, 0), {"weight": 0}, {}, 3),), (1,), "has unknown weights \\['weight'\\]"),
        ((Layer("add", (0, 0), {}, {}, 3),), (0,), "outputs .* must be results of layers"),
        ((Layer("add", (0, 0), {}, {}, 3),), (1, 1), "outputs must be distinct"),
        ((Layer("add", (0, 0), {}, {}, 3),), (), "outputs must be distinct and at least one"),
    ],
)
def test_invalid_plans(layers, outputs, message):
    with pytest.raises(ValueError, match=message):
        Plan(((3, 1),), layers, outputs)
