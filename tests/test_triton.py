"""What is particular to the Triton backend: every configuration, gradients, layouts, packing, launching, choosing.

The operators' own tests run on it as on every backend. Without a GPU all of it happens in Triton's interpreter.
"""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from gradients import ONE_OF_EACH
from helpers import (
    HALF,
    LAYOUTS,
    check_close,
    check_compiled,
    check_gradients,
    kernel,
    largest_error,
    lay_out,
    rand,
    to,
)
from test_plan import statistic_network, statistic_of, statistic_plan
from torch import nn
from torch.nn import functional as F

import esr_kernels
from esr_kernels import functional
from esr_kernels.backends import reference
from esr_kernels.dispatch import list_backends
from esr_kernels.library import RESIZE_MODES
from esr_kernels.modules.conv import Conv3x3
from esr_kernels.plan import ESA_WEIGHTS

_STATUS = next(b for b in list_backends() if b.name == "triton")
pytestmark = pytest.mark.skipif(not _STATUS.available, reason=f"triton: {_STATUS.reason}")
# Those with kernels for GPUs.
# The others run in PyTorch on CUDA.
FUSED = [name for name in functional.__all__ if name not in ("selective_scan", "window_attention")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if _STATUS.available:
    from esr_kernels.backends.triton import (
        _convolution,
        _pointwise,
        _resize,
        adaptive_max_pool,
        configs,
        depthwise_conv,
        esa,
        launch,
        maps,
        modulate,
        packing,
        statistic,
    )
    from esr_kernels.backends.triton.configs import SPACE, Config


@pytest.fixture(autouse=True)
def chosen():
    """On this backend, float32 computed exactly."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with torch.device(DEVICE), esr_kernels.use_backend("triton"):
        yield
    torch.backends.cudnn.allow_tf32 = before


def check(got, exact, plain=None):
    got = got if isinstance(got, (tuple, list)) else [got]
    exact = exact if isinstance(exact, (tuple, list)) else [exact]
    for g, e in zip(got, exact, strict=True):
        check_close(g, e, lambda: plain, "triton")


def configurations(*names):
    """Parametrises `name` and `config`. The interpreter has no warps: there, configurations that differ in nothing else
    are the same computation."""
    found = []
    for name in names if _STATUS.available else ():
        different = {(c.tile, c.warps if DEVICE == "cuda" else 0, c.pipeline): c for c in SPACE[name]}
        found += [
            pytest.param(name, c, id=f"{name}-{c.tile[0]}x{c.tile[1]}-{c.warps}warps-{c.pipeline}")
            for c in different.values()
        ]
    return pytest.mark.parametrize(("name", "config"), found)


def only(name, config):
    """A chooser that gives kernels of this name the configuration and all others their default."""
    seen = []

    def choose(key):
        if key.startswith(name + "/"):
            seen.append(key)
            return config
        return None

    return choose, seen


# --- every configuration that a kernel can have -----------------------------------------------------------------------


@configurations("convolution")
@pytest.mark.parametrize(("channels", "out", "layout"), [(20, 28, "channels_last"), (36, 46, "nchw"), (3, 20, "nchw")])
def test_convolution_configurations(name, config, channels, out, layout):
    torch.manual_seed(0)
    choose, seen = only(name, config)
    # Three by three tiles: the middle one has all its input inside the image.
    height, width = (2 * n + 1 for n in config.tile)
    x, residual = (lay_out(rand(1, c, height, width), layout) for c in (channels, out))
    arguments = (x, kernel(out, channels), rand(out), residual, "none", 0.05, "attention")
    with configs.chosen_by(choose):
        got = torch.ops.esr.conv3x3(*arguments)
    assert seen
    check(got, reference.conv3x3(*to(arguments, torch.float64)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_plans_with_pipelined_convolutions(dtype):
    """As GPUs run them: loops over taps or blocks of channels, on padded maps; the interpreter's own are unrolled."""
    torch.manual_seed(6)
    choose, seen = only("convolution", Config((8, 16), 4, 2))
    fused = nn.Sequential(Conv3x3(3, 46), Conv3x3(46, 38)).to(DEVICE)
    x = rand(1, 3, 10, 17, dtype=dtype)
    fast = esr_kernels.optimize(fused, dtype=dtype)
    with torch.no_grad(), configs.chosen_by(choose):
        got = fast(x)
    with torch.no_grad(), esr_kernels.use_backend("reference"):
        wanted, single = (fused.to(t)(x.to(t)) for t in (torch.float64, dtype))
    assert fast.plan is not None and any(key.endswith("48x48") for key in seen)
    check(got, wanted, single)


@configurations("conv1x1")
def test_conv1x1_configurations(name, config):
    torch.manual_seed(1)
    choose, seen = only(name, config)
    arguments = ([rand(2, 20, 9, 13), rand(2, 37, 9, 13)], kernel(46, 57, 1), rand(46), "silu", 0.1)
    with configs.chosen_by(choose):
        got = torch.ops.esr.conv1x1(*arguments)
    assert seen
    check(got, reference.conv1x1(*to(arguments, torch.float64)))


@configurations("weight_gradient")
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_weight_gradient_configurations(name, config, layout):
    torch.manual_seed(2)
    choose, seen = only(name, config)
    grad, x = (lay_out(rand(2, c, 2 * config.tile[0] + 1, 19), layout) for c in (21, 28))
    arguments = (grad, x, kernel(21, 28), rand(21), None, "none", 0.0, "post", [False, True, True, False])
    with configs.chosen_by(choose):
        _, gw, gb, _ = torch.ops.esr.conv3x3_backward(*arguments)
    assert seen
    check([gw, gb], reference.conv3x3_backward(*to(arguments, torch.float64))[1:3])


def esa_weights(channels, hidden, rfdn=False, dtype=torch.float32):
    shapes = {
        "1": (hidden, channels, 1),
        "2": (hidden, hidden, 3),
        "3": (hidden, hidden, 3),
        "4": (channels, hidden, 1),
    }
    shapes |= {"f": (hidden, hidden, 1)} | ({"_max": (hidden, hidden, 3), "3_": (hidden, hidden, 3)} if rfdn else {})
    named = {}
    for name, (out, c, size) in shapes.items():
        named["w" + name], named["b" + name] = kernel(out, c, size, dtype=dtype), rand(out, dtype=dtype)
    return [named.get(name) for name in ESA_WEIGHTS]


@configurations("esa_reduce", "esa_gate")
def test_esa_configurations(name, config):
    torch.manual_seed(3)
    choose, seen = only(name, config)
    arguments = (rand(1, 20, 27, 52), *esa_weights(20, 12))
    with configs.chosen_by(choose):
        got = torch.ops.esr.esa(*arguments)
    assert seen
    check(got, reference.esa(*to(arguments, torch.float64)))


def depthwise_arguments(config, planes, sides, dilation=1, gated=False):
    """Those of depthwise_conv on an image that is a little larger than a tile."""
    channels = 2 if planes else 36
    x = lay_out(rand(1, channels, config.tile[0] + 1, config.tile[1] + 3), "nchw" if planes else "channels_last")
    weight = rand(channels, 1, *sides, scale=(sides[0] * sides[1]) ** -0.5)
    return x, weight, rand(channels), dilation, "gelu" if gated else "none", 0.1, gated


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Programs with as few channels as there."""
    monkeypatch.setattr(depthwise_conv, "interpreted", lambda: False)


@configurations("depthwise", "depthwise_planes")
def test_depthwise_configurations(as_on_a_gpu, name, config):
    torch.manual_seed(21)
    choose, seen = only(name, config)
    for sides, dilation in (((3, 3), 1), ((5, 3), 2), ((3, 5), 5)):
        arguments = depthwise_arguments(config, name.endswith("planes"), sides, dilation, gated=dilation < 5)
        with configs.chosen_by(choose):
            got = torch.ops.esr.depthwise_conv(*arguments)
        check(got, reference.OPERATORS["depthwise_conv"](*to(arguments, torch.float64)))
    assert seen


@configurations("depthwise_gradient", "depthwise_gradient_planes")
def test_depthwise_gradient_configurations(as_on_a_gpu, name, config):
    torch.manual_seed(22)
    choose, seen = only(name, config)
    for sides in ((3, 3), (5, 3)):
        arguments = depthwise_arguments(config, name.endswith("planes"), sides)
        grad = torch.randn_like(arguments[0])
        with configs.chosen_by(choose):
            _, *got = torch.ops.esr.depthwise_conv_backward(grad, *arguments, [False, True, True])
        exact = reference.OPERATORS["depthwise_conv_backward"]
        check(got, exact(*to((grad, *arguments), torch.float64), [False, True, True])[1:])
    assert seen


@configurations("layer_norm", "layer_norm_gradient")
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_layer_norm_configurations(name, config, layout):
    torch.manual_seed(23)
    choose, seen = only(name, config)
    grad, x = (lay_out(rand(2, 36, 9, 17), layout) for _ in range(2))
    arguments = (x, rand(36), rand(36), 1e-6)
    with configs.chosen_by(choose):
        got = [torch.ops.esr.layer_norm2d(*arguments)]
        got += torch.ops.esr.layer_norm2d_backward(grad, *arguments, [True] * 3)
    exact = [reference.OPERATORS["layer_norm2d"](*to(arguments, torch.float64))]
    exact += reference.OPERATORS["layer_norm2d_backward"](*to((grad, *arguments), torch.float64), [True] * 3)
    assert seen
    check(got, exact)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_many_channels_are_normalized_by_programs_of_few_pixels(layout):
    torch.manual_seed(24)
    grad, x = (lay_out(rand(1, 1500, 3, 5), layout) for _ in range(2))
    arguments = (x, rand(1500), rand(1500), 1e-6)
    got = [torch.ops.esr.layer_norm2d(*arguments), *torch.ops.esr.layer_norm2d_backward(grad, *arguments, [True] * 3)]
    exact = [reference.OPERATORS["layer_norm2d"](*to(arguments, torch.float64))]
    exact += reference.OPERATORS["layer_norm2d_backward"](*to((grad, *arguments), torch.float64), [True] * 3)
    check(got, exact)


def test_without_eps_pixels_outside_of_the_image_spoil_no_gradient():
    torch.manual_seed(25)
    grad, x, weight = rand(1, 20, 3, 5), rand(1, 20, 3, 5), rand(20)
    arguments = (grad, x, weight, None, 0.0, [True, True, False])
    got = torch.ops.esr.layer_norm2d_backward(*arguments)
    check(got[:2], reference.OPERATORS["layer_norm2d_backward"](*to(arguments, torch.float64))[:2])


@configurations("adaptive_max_pool")
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_pooling_configurations(name, config, layout):
    """Windows of as many pixels as lanes, of more and of fewer, some of several sizes."""
    torch.manual_seed(26)
    choose, seen = only(name, config)
    x = lay_out(rand(2, 3, 11, 19), layout).round(decimals=1)
    for size in ([1, 1], [3, 2], [5, 9], [12, 20]):
        with configs.chosen_by(choose):
            got = [torch.ops.esr.adaptive_max_pool(x, size)]
            grad = rand(*got[0].shape)
            got += torch.ops.esr.adaptive_max_pool_backward(grad, x, [True])
        exact = reference.OPERATORS["adaptive_max_pool"](x, size)
        assert torch.equal(got[0], exact)
        check(got[1:], reference.OPERATORS["adaptive_max_pool_backward"](*to((grad, x), torch.float64), [True]))
    assert seen


@configurations("adaptive_max_pool_gradient", "modulate", "modulate_gradient")
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_row_configurations(name, config, layout):
    torch.manual_seed(27)
    choose, seen = only(name, config)
    grad, x = (lay_out(rand(1, 5, config.tile[0] + 1, config.tile[1] // 4 + 3), layout) for _ in range(2))
    small = [lay_out(rand(1, 5, 3, 7), layout), grad]
    with configs.chosen_by(choose):
        if name == "modulate":
            arguments = (x, small, "nearest", "gelu", 0.0)
        elif name == "modulate_gradient":
            arguments = (grad, x, small, "bilinear", "silu", 0.0, [True] * 3)
        else:
            arguments = (lay_out(rand(1, 5, 3, 4), layout), x, [True])
        operator = name.replace("_gradient", "_backward")
        got = getattr(torch.ops.esr, operator)(*arguments)
    assert seen
    check(got, reference.OPERATORS[operator](*to(arguments, torch.float64)))


@configurations("statistic")
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("kind", ["mean", "contrast", "maximum"])
def test_statistic_configurations(monkeypatch, name, config, kind, layout):
    """Of one part and of some, of several steps each; alone and in a batch an image has the same bits."""
    torch.manual_seed(32)
    choose, seen = only(name, config)
    monkeypatch.setattr(statistic, "_MOST_PARTS", 3)
    plan = statistic_plan(20, kind, 1)
    for size in ((3, 5), (1, 9 * config.tile[0]), (29, config.tile[0])):
        x = lay_out(rand(2, 20, *size), layout) + 1
        with configs.chosen_by(choose):
            (got,) = torch.ops.esr.run_plan([torch.zeros_like(x), x], [], plan)
            (alone,) = torch.ops.esr.run_plan([torch.zeros_like(x[1:]), x[1:]], [], plan)
        check(got, statistic_of(x.double(), kind, 1).expand_as(x))
        assert torch.equal(got[1:], alone)
    assert seen


@configurations("resize_gradient")
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_resize_gradient_configurations(name, config, layout, mode):
    torch.manual_seed(28)
    choose, seen = only(name, config)
    grad, x = (lay_out(rand(2, 3, 11, 19), layout) for _ in range(2))
    small = [lay_out(rand(2, 3, *size), layout) for size in ((1, 1), (2, 5), (11, 7), (13, 20))]
    arguments = (grad, x, small, mode, "none", 0.0, [False] + [True] * 4)
    with configs.chosen_by(choose):
        got = torch.ops.esr.modulate_backward(*arguments)
    assert len(seen) == 4
    check(got, reference.OPERATORS["modulate_backward"](*to(arguments, torch.float64)))


@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_every_pixel_of_a_map_finds_its_readers(mode):
    """For any pair of sizes: which pixels read one is computed backwards, with the quotient that PyTorch rounds."""
    torch.manual_seed(29)
    for size in (1, 2, 3, 7, 48, 97, 255, 1000):
        x = rand(1, 1, 1, size)
        low = [rand(1, 1, 1, n) for n in (1, 2, 3, 5, 11, 33, 41, 61)]
        arguments = (torch.ones_like(x), x.abs() + 0.1, low, mode, "none", 0.0, [False] + [True] * 8)
        got = torch.ops.esr.modulate_backward(*arguments)
        check(got, reference.OPERATORS["modulate_backward"](*to(arguments, torch.float64)))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_maps_of_other_memory_formats(layout):
    """Each map and each gradient in a format of its own, whatever that of x."""
    torch.manual_seed(30)
    x = lay_out(rand(2, 20, 9, 13), layout)
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    maps_of = [lay_out(rand(2, 20, *size), form) for size in ((9, 13), (3, 4)) for form in LAYOUTS]
    for mode in RESIZE_MODES:
        arguments = (lay_out(rand(2, 20, 9, 13), other), x, maps_of, mode, "silu", 0.0, [True] * 9)
        got = torch.ops.esr.modulate_backward(*arguments)
        check(got, reference.OPERATORS["modulate_backward"](*to(arguments, torch.float64)))
        check(
            torch.ops.esr.modulate(*arguments[1:-1]),
            reference.OPERATORS["modulate"](*to(arguments[1:-1], torch.float64)),
        )


def test_pooling_a_slice_whose_rows_have_gaps():
    """Its results are channels_last, its copy is not."""
    torch.manual_seed(31)
    x = lay_out(rand(2, 12, 9, 14), "channels_last")[:, 2:9, :, :11]
    got = torch.ops.esr.adaptive_max_pool(x, [3, 4])
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got, F.adaptive_max_pool2d(x, (3, 4)))
    arguments = (rand(2, 7, 3, 4), x, [True])
    exact = reference.OPERATORS["adaptive_max_pool_backward"](*to(arguments, torch.float64))
    check(torch.ops.esr.adaptive_max_pool_backward(*arguments), exact)


def test_more_maps_than_a_launch_reads_are_refused():
    x = rand(1, 4, 5, 6)
    with pytest.raises(ValueError, match="maps: expected 1 to 8 tensors, got 9"):
        torch.ops.esr.modulate(x, [x] * 9, "nearest", "none", 0.0)


# --- gradients --------------------------------------------------------------------------------------------------------


def gradient_cases(dtype, layout):
    """Operator -> arguments of its backward in the order of the schema, all gradients wanted."""

    def feature(*shape):
        return lay_out(rand(*shape, dtype=dtype), layout)

    def weight(*shape):
        return kernel(*shape, dtype=dtype)

    def bias(n):
        return rand(n, dtype=dtype)

    x = feature(2, 28, 9, 13)
    three = [t for _ in range(3) for t in (weight(28, 28), bias(28))]
    esa_mask = [True] * 11 + [False] * 4
    yes, no_residual, no_bias = [True] * 4, [True, True, True, False], [True, True, False, True]
    return {
        "conv3x3 silu": (feature(2, 21, 9, 13), x, weight(21, 28), bias(21), None, "silu", 0.0, "post", no_residual),
        "conv3x3 pre": (x, x, weight(28, 28), bias(28), feature(2, 28, 9, 13), "leaky_relu", 0.1, "pre", yes),
        "conv3x3 post": (x, x, weight(28, 28), None, feature(2, 28, 9, 13), "gelu", 0.1, "post", no_bias),
        "conv3x3 attention": (x, x, weight(28, 28), bias(28), feature(2, 28, 9, 13), "none", 0.0, "attention", yes),
        "spab": (feature(2, 28, 9, 13), feature(2, 28, 9, 13), x, *three, [True] * 7),
        "conv3x3_pixel_shuffle": (feature(2, 3, 36, 52), x, weight(48, 28), bias(48), 4, yes),
        "conv1x1": (feature(2, 20, 9, 13), [x, feature(2, 5, 9, 13)], weight(20, 33, 1), bias(20), "silu", 0.0, yes),
        "conv1x1 residual": (feature(2, 20, 9, 13), [x], weight(20, 28, 1), bias(20), "gelu", 0.0, yes,
                             feature(2, 20, 9, 13)),
        "esa": (feature(1, 20, 17, 23), feature(1, 20, 17, 23), *esa_weights(20, 8, dtype=dtype), esa_mask),
        "esa rfdn": (feature(1, 20, 22, 16), feature(1, 20, 22, 16), *esa_weights(20, 8, True, dtype), [True] * 15),
        "bsconv zeros": (feature(2, 20, 9, 13), x, weight(20, 28, 1), weight(20, 1), bias(20),
                         "zeros", "gelu", 0.0, yes),
        "bsconv reflect": (feature(2, 20, 2, 3), feature(2, 28, 2, 3), weight(20, 28, 1), weight(20, 1), bias(20),
                           "reflect", "none", 0.0, yes),
        "bsconv residual": (feature(2, 20, 9, 13), x, weight(20, 28, 1), weight(20, 1), bias(20), "reflect", "gelu",
                            0.0, [*yes, True], feature(2, 20, 9, 13)),
        "depthwise_conv gelu": (x, x, weight(28, 1, 5), bias(28), 2, "gelu", 0.0, False, yes[:3]),
        "depthwise_conv gated": (feature(2, 14, 9, 13), x, weight(28, 1), bias(28), 1, "silu", 0.0, True, yes[:3]),
        "layer_norm2d": (feature(2, 28, 9, 13), x, bias(28), bias(28), 1e-6, yes[:3]),
        "adaptive_max_pool": (feature(2, 28, 4, 3), x, yes[:1]),
        "modulate": (x, feature(2, 28, 9, 13), [x, feature(2, 28, 2, 3), feature(2, 28, 4, 1)],
                     "nearest", "gelu", 0.0, yes[:4]),
        "modulate bilinear": (x, feature(2, 28, 9, 13), [feature(2, 28, 2, 3)], "bilinear", "silu", 0.0, yes[:2]),
    }  # fmt: skip


CASE_NAMES = ["conv3x3 silu", "conv3x3 pre", "conv3x3 post", "conv3x3 attention", "spab", "conv3x3_pixel_shuffle",
              "conv1x1", "conv1x1 residual", "esa", "esa rfdn", "bsconv zeros", "bsconv reflect", "bsconv residual",
              "depthwise_conv gelu", "depthwise_conv gated", "layer_norm2d", "adaptive_max_pool", "modulate",
              "modulate bilinear"]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("case", CASE_NAMES)
def test_backward(case, layout, dtype):
    """Every gradient against float64; half types at most as far off as the reference that rounds its result only,
    times what storing intermediate gradients in that type costs."""
    torch.manual_seed(4)
    arguments = gradient_cases(dtype, layout)[case]
    name = case.split()[0] + "_backward"
    got = getattr(torch.ops.esr, name)(*arguments)
    exact = reference.OPERATORS[name](*to(arguments, torch.float64))
    for g, e in zip(got, exact, strict=True):
        assert g.shape == e.shape and g.dtype == dtype
        if e.numel():
            bound = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
            assert largest_error(g, e) <= bound * float(e.abs().max())


# The case that stands for an operator with more than one.
MAIN_CASE = {
    "conv3x3": "conv3x3 pre",
    "bsconv": "bsconv zeros",
    "depthwise_conv": "depthwise_conv gated",
}


@pytest.mark.parametrize("name", [name for name in FUSED if name != "esa"])
def test_unwanted_gradients_are_empty(name):
    torch.manual_seed(5)
    case = MAIN_CASE.get(name, name)
    *arguments, mask = gradient_cases(torch.float32, "channels_last")[case]
    for i in range(len(mask)):
        single = [k == i for k in range(len(mask))]
        got = getattr(torch.ops.esr, name + "_backward")(*arguments, single)
        exact = reference.OPERATORS[name + "_backward"](*to((*arguments,), torch.float64), single)
        assert [g.numel() for g in got] == [e.numel() for e in exact]
        check(got[i], exact[i])


@pytest.mark.parametrize("name", FUSED)
def test_backward_of_an_empty_batch(name):
    case = MAIN_CASE.get(name, name)
    arguments = gradient_cases(torch.float32, "nchw")[case]

    def empty(value, position):
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return [v[:0] for v in value]
        is_map = isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[0] in (1, 2) and position < 6
        return value[:0] if is_map and value.shape[2] > 3 else value

    for g in getattr(torch.ops.esr, name + "_backward")(*(empty(a, i) for i, a in enumerate(arguments))):
        assert torch.equal(g, torch.zeros_like(g))


def test_through_autograd():
    torch.manual_seed(6)
    x, w, b = rand(2, 20, 8, 9), kernel(30, 20), rand(30)
    plain = lambda x, w, b: F.silu(F.conv2d(x, w, b, padding=1))  # noqa: E731
    check_gradients(lambda *a: functional.conv3x3(*a, activation="silu"), plain, [x, w, b])


@pytest.mark.parametrize(
    "name", ["conv3x3", "spab", "conv3x3_pixel_shuffle", "conv1x1", "esa", "bsconv", "adaptive_max_pool", "modulate"]
)
def test_compiled_whole_for_every_size(name):
    """fullgraph, dynamic height and width, forward and backward."""
    torch.manual_seed(11)
    w = [kernel(8, 8) for _ in range(3)]
    named = [t for t in esa_weights(8, 4)[:10]]
    function, weights = {
        "conv3x3": (lambda x, w: functional.conv3x3(x, w, activation="silu", residual=x, residual_mode="pre"), w[:1]),
        "spab": (lambda x, a, b, c: functional.spab(x, a, None, b, None, c, None), w),
        "conv3x3_pixel_shuffle": (lambda x, w: functional.conv3x3_pixel_shuffle(x, w, upscale_factor=2), w[:1]),
        "conv1x1": (lambda x, w: functional.conv1x1([x, x * 2], w, activation="relu"), [kernel(8, 16, 1)]),
        "esa": (functional.esa, named),
        "bsconv": (functional.bsconv, [kernel(8, 8, 1), kernel(8, 1)]),
        "adaptive_max_pool": (lambda x: functional.adaptive_max_pool(x, (x.shape[2] // 4, x.shape[3] // 2)), []),
        "modulate": (lambda x, low: functional.modulate(x, [x, low], mode="bilinear", activation="gelu"),
                     [rand(1, 8, 3, 5)]),
    }[name]  # fmt: skip
    check_compiled(function, [(rand(1, 8, *size), *weights) for size in ((17, 19), (18, 21))])


@pytest.mark.parametrize("case", CASE_NAMES)
def test_weight_gradients_repeat_bit_for_bit(case):
    torch.manual_seed(7)
    arguments = gradient_cases(torch.float32, "channels_last")[case]
    operator = getattr(torch.ops.esr, case.split()[0] + "_backward")
    for a, b in zip(operator(*arguments), operator(*arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [n for n in _STATUS.operators if n.endswith("_backward")])
def test_opcheck_backward(name):
    operator = name.removesuffix("_backward")
    case = (MAIN_CASE | {"conv3x3": "conv3x3 attention", "bsconv": "bsconv reflect"}).get(operator, operator)
    arguments = gradient_cases(torch.float32, "channels_last")[case]
    torch.library.opcheck(getattr(torch.ops.esr, name).default, arguments)


# --- layouts and sizes ------------------------------------------------------------------------------------------------


def test_a_slice_of_channels_is_read_in_place():
    whole = rand(2, 40, 7, 9).contiguous(memory_format=torch.channels_last)
    part = whole[:, 8:28]
    m = maps.as_map(part)
    assert (m.pitch, m.batch, m.tensor.data_ptr()) == (40, 63, part.data_ptr())
    planes = rand(2, 40, 7, 9)[:, 8:28]
    assert (maps.as_map(planes).pitch, maps.as_map(planes).batch) == (0, 40 * 63)
    w = kernel(12, 20)
    for x in (part, planes):
        check(functional.conv3x3(x, w), F.conv2d(x.double(), w.double(), padding=1))


def test_other_layouts_are_copied():
    for x in (rand(2, 5, 7, 9)[:, :, ::2], rand(2, 5, 9, 7).transpose(2, 3), rand(2, 5, 7, 18)[..., ::2]):
        m = maps.as_map(x)
        assert torch.equal(m.tensor, x) and m.tensor.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("strides", ["every other element", "expanded", "channels_last"])
@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_parameters_of_any_strides(case, strides):
    """Weights and biases are views as often as maps are."""

    def change(t):
        if not isinstance(t, torch.Tensor) or (t.dim() == 4 and t.shape[2] > 3):
            return t
        if strides == "channels_last":
            return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        if strides == "expanded" and t.dim() == 1:
            return t[:1].expand(t.shape)
        return torch.stack([t, t + 1], -1)[..., 0]

    torch.manual_seed(12)
    name = case.split()[0] + "_backward"
    arguments = [change(a) for a in gradient_cases(torch.float32, "channels_last")[case]]
    got = getattr(torch.ops.esr, name)(*arguments)
    for g, e in zip(got, reference.OPERATORS[name](*to(arguments, torch.float64)), strict=True):
        if e.numel():
            assert largest_error(g, e) <= 1e-5 * float(e.abs().max())


def test_an_expanded_image_has_no_batch_stride():
    x = rand(1, 8, 5, 6).expand(3, 8, 5, 6)
    w = kernel(8, 8)
    assert maps.as_map(x).batch == 0
    check(functional.conv3x3(x, w), F.conv2d(x.double(), w.double(), padding=1))


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_64_bit_offsets(monkeypatch, layout):
    """The predicate, and the code it chooses, forced on small images."""
    assert not maps.wide(maps.Map(torch.empty(0), 32, 1, 28, 8192, 8191))
    assert maps.wide(None, maps.Map(torch.empty(0), 32, 1, 28, 8192, 8192))
    assert maps.wide(maps.Map(torch.empty(0), 0, 1, 32, 8192, 8192))
    assert not maps.wide(maps.Map(torch.empty(0), 0, 1, 31, 8192, 8192))
    monkeypatch.setattr(maps, "LARGEST_OFFSET", 0)
    torch.manual_seed(8)
    for case, arguments in gradient_cases(torch.float32, layout).items():
        name = case.split()[0] + "_backward"
        check(getattr(torch.ops.esr, name)(*arguments), reference.OPERATORS[name](*to(arguments, torch.float64)))
    x = lay_out(rand(1, 20, 17, 19), layout)
    for name, arguments in (
        ("conv3x3_pixel_shuffle", (x, kernel(12, 20), rand(12), None, 2)),
        ("conv1x1", ([x], kernel(12, 20, 1), rand(12), "relu", 0.0)),
        ("esa", (x, *esa_weights(20, 8))),
        ("adaptive_max_pool", (x, [5, 4])),
        ("modulate", (x, [x, lay_out(rand(1, 20, 5, 4), layout)], "bilinear", "relu", 0.0)),
    ):
        check(getattr(torch.ops.esr, name)(*arguments), reference.OPERATORS[name](*to(arguments, torch.float64)))
    for kind in ("mean", "contrast", "maximum"):
        plan, weights, oracle = statistic_network(12, kind, 0)
        image = lay_out(rand(2, 5, 9, 11), layout)
        check(torch.ops.esr.run_plan([image], weights, plan.to_json()), oracle(image.double()))


def test_longer_lists_than_one_launch_reads():
    torch.manual_seed(9)
    for channels in ((5,) * 9, (3, 4, 5, 6, 7, 8, 9, 10, 11, 12)):
        xs = [rand(1, c, 5, 6) for c in channels]
        w, b = kernel(20, sum(channels), 1), rand(20)
        got = functional.conv1x1(xs, w, b, activation="gelu")
        check(got, F.gelu(F.conv2d(torch.cat(xs, 1).double(), w.double(), b.double())))


@pytest.mark.parametrize("out", [97, 130])
def test_more_output_channels_than_one_program_computes(out):
    torch.manual_seed(10)
    x, w, b = rand(1, 70, 5, 6), kernel(out, 70), rand(out)
    check(
        functional.conv3x3(x, w, b, activation="silu"), F.silu(F.conv2d(x.double(), w.double(), b.double(), padding=1))
    )
    w = kernel(out, 70, 1)
    check(functional.conv1x1(x, w, b), F.conv2d(x.double(), w.double(), b.double()))
    arguments = (rand(1, out, 5, 6), x, kernel(out, 70), b, None, "none", 0.0, "post", [True, True, True, False])
    got = torch.ops.esr.conv3x3_backward(*arguments)
    check(got, reference.conv3x3_backward(*to(arguments, torch.float64)))


def test_not_a_number_passes_the_pooling():
    x = rand(1, 6, 21, 27)
    x[0, 2, 11, 13] = float("nan")
    weights = esa_weights(6, 4)
    assert torch.equal(torch.ops.esr.esa(x, *weights).isnan(), reference.esa(x, *weights).isnan())


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", [1, 16, 17, 28, 46, 60, 84, 96, 97, 200])
def test_blocks_hold_all_channels_with_little_waste(out):
    first, second, columns = packing.blocks(out)
    assert first & (first - 1) == 0 and second & (second - 1) == 0
    assert columns % (first + second) == 0 and columns >= out
    assert columns - out < (16 if out <= 96 else 64)


@pytest.mark.parametrize(("out", "channels", "taps"), [(28, 28, 3), (46, 3, 3), (9, 20, 1), (130, 37, 3)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_packed_weights(out, channels, taps, channels_last):
    w = kernel(out, channels, taps)
    if channels_last:
        w = w.contiguous(memory_format=torch.channels_last)
    for transpose in (False, True):
        packed = packing.pack(w, torch.float32, transpose)
        plain = w.transpose(0, 1).flip(2, 3) if transpose else w
        rows = plain.permute(2, 3, 1, 0).reshape(taps * taps, plain.shape[1], plain.shape[0])
        count = plain.shape[1] if packed.flat else packed.rows
        expected = torch.zeros(taps * taps, count, packed.columns)
        expected[:, : plain.shape[1], : plain.shape[0]] = rows
        expected = expected.reshape(-1, packed.columns)
        assert torch.equal(packed.weight[: expected.shape[0]], expected)
        assert not packed.weight[expected.shape[0] :].any()


def test_folded_attention_has_the_products_of_the_weights():
    weights = esa_weights(10, 5)
    folded = esa.fold(*weights)
    w1, b1, w2, b2 = to(weights[:4], torch.float64)
    skip = torch.einsum("of,fc->oc", weights[8][:, :, 0, 0].double(), w1[:, :, 0, 0])
    assert largest_error(folded.skip[0][:10, :5], skip.t()) < 1e-6
    bias = b2 + torch.einsum("ofyx,f->o", w2, b1)
    assert largest_error(folded.reduce[1], bias) < 1e-6


# --- configurations ---------------------------------------------------------------------------------------------------


def table(device, capability, measured, **entries):
    entry = {"tile": [8, 16], "warps": 4, "pipeline": 2}
    names = {k.replace("_", "/", 1).replace("_", "/"): entry | v for k, v in entries.items()}
    return {"device": device, "capability": capability, "measured": measured, "configurations": names}


def test_every_shipped_file_is_in_the_space_of_the_tuner_or_smaller():
    files = sorted(configs.FOLDER.glob("*.json"))
    assert {f.stem for f in files} >= {"sm_80", "sm_86", "sm_89", "sm_90"}
    for file in files:
        data = configs.read(file)
        for key, config in configs.parse(data).items():
            kind, dtype, shape = key.split("/")
            assert kind in SPACE and dtype in ("float16", "bfloat16", "tf32", "float32")
            assert all(int(n) % 16 == 0 for n in shape.split("x"))
            assert (
                config.warps in (1, 2, 4, 8)
                and config.pipeline in (1, 2, 3)
                and config.pixels in (16, 32, 64, 128, 256, 512, 1024)
            )


def test_selecting_keeps_what_an_architecture_has_of_its_own(monkeypatch, tmp_path):
    from esr_kernels.backends.triton import resources

    old, chosen = Config((4, 16), 4, 2), {"a": Config((4, 16), 4, 2), "b": Config((8, 16), 4, 2)}
    monkeypatch.setattr(resources, "select", lambda *args: chosen)
    for arch, own in ((86, {}), (80, {"a": Config((4, 16), 4, 2, 255), "b": Config((2, 16), 4, 2)})):
        data = table(f"sm_{arch}", list(divmod(arch, 10)), False)
        data["configurations"] = {k: configs.entry(c) for k, c in ({"a": old, "b": old, "c": old} | own).items()}
        (tmp_path / f"sm_{arch}.json").write_text(json.dumps(data))
    resources.write(86, tmp_path, kernels=["convolution"])
    found = {a: configs.parse(configs.read(tmp_path / f"sm_{a}.json")) for a in (80, 86, 89)}
    assert found[86] == found[89] == chosen | {"c": old}
    assert found[80] == found[86] | {"a": Config((4, 16), 4, 2, 255)}
    resources.write(86, tmp_path)
    assert set(configs.parse(configs.read(tmp_path / "sm_80.json"))) == {"a", "b"}


def test_the_nearest_file_is_found():
    files = [
        table("NVIDIA A100", [8, 0], True),
        table("sm_86", [8, 6], False),
        table("NVIDIA RTX A6000", [8, 6], True),
        table("sm_90", [9, 0], False),
    ]
    found = lambda name, capability: configs.find(name, capability, files)["device"]  # noqa: E731
    assert found("NVIDIA RTX A6000", (8, 6)) == "NVIDIA RTX A6000"
    assert found("sm_86", (8, 6)) == "sm_86"
    assert found("NVIDIA GeForce RTX 3090", (8, 6)) == "NVIDIA RTX A6000"
    assert found("NVIDIA H200", (9, 0)) == "sm_90"
    assert found("NVIDIA B200", (10, 0)) == "sm_90"


def test_the_nearest_channels_are_found_and_others_warned_of_once(monkeypatch, tmp_path):
    entries = {
        "convolution/float16/32x32": {"tile": [4, 16], "warps": 4, "pipeline": 1},
        "convolution/float16/96x96": {"tile": [4, 32], "warps": 8, "pipeline": 1},
    }
    data = table("NVIDIA X", [9, 0], True) | {"configurations": entries}
    (tmp_path / "x.json").write_text(json.dumps(data))
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    monkeypatch.setattr(configs, "_device", lambda: ("NVIDIA Y", (9, 0)))
    configs._table.cache_clear()
    choose = lambda r, c: configs.choose("convolution", torch.float16, "tf32", r, c)  # noqa: E731
    with pytest.warns(UserWarning, match="no Triton configurations were measured on NVIDIA Y, using those of NVIDIA X"):
        assert choose(32, 32) == Config((4, 16), 4, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose(48, 32) == Config((4, 16), 4, 1)
        assert choose(32, 48) == Config((4, 32), 8, 1)  # more columns than 32 may not fit
        assert configs.choose("conv1x1", torch.float16, "tf32", 32, 32) == configs.default("conv1x1", torch.float16, 32)
    configs._table.cache_clear()


def test_a_file_of_ones_own_goes_first(monkeypatch, tmp_path):
    file = tmp_path / "own.json"
    entries = {"conv1x1/tf32/32x32": {"tile": [1, 32], "warps": 8, "pipeline": 1}}
    file.write_text(json.dumps(table("Z", [9, 0], True) | {"configurations": entries}))
    monkeypatch.setenv(configs.VARIABLE, str(file))
    configs._table.cache_clear()
    assert configs.choose("conv1x1", torch.float32, "tf32", 32, 32) == Config((1, 32), 8, 1)
    bounded = Config((1, 64), 4, 2, 168)
    assert configs.entry(Config((1, 64), 4, 2)).get("registers") is None
    assert configs.parse({"configurations": {"k": json.loads(json.dumps(configs.entry(bounded)))}}) == {"k": bounded}
    for text in ("[]", "{}", '{"configurations": {"conv1x1/tf32/32x32": {"tile": 4}}}'):
        file.write_text(text)
        configs._table.cache_clear()
        with pytest.raises(ValueError, match="not a file of Triton configurations"):
            configs.choose("conv1x1", torch.float32, "tf32", 32, 32)
    configs._table.cache_clear()


def test_precision_follows_pytorch():
    assert maps.precision(torch.float32) == "tf32x3"
    torch.backends.cudnn.allow_tf32 = True
    assert maps.precision(torch.float32) == "tf32"


# --- launching --------------------------------------------------------------------------------------------------------


def test_another_size_compiles_nothing():
    w, b = kernel(20, 12), rand(20)
    functional.conv3x3(rand(1, 12, 8, 16), w, b)
    before = _convolution._kernel.cache_info().misses
    for size in ((1, 1), (9, 31), (16, 32)):
        functional.conv3x3(rand(2, 12, *size), w, b)
    assert _convolution._kernel.cache_info().misses == before


def test_another_size_of_an_image_with_statistics_compiles_nothing():
    def run(*size):
        torch.ops.esr.run_plan([torch.zeros(1, 6, *size), rand(1, 6, *size)], [], statistic_plan(6, "std", 0))
        kernels = (statistic._parts_kernel, statistic._kernel, _pointwise._kernel)
        return [kernel.cache_info().misses for kernel in kernels]

    assert run(8, 9) == run(1, 1) == run(70, 41)


def test_another_size_with_windows_as_large_compiles_nothing():
    def run(height, width):
        x, low = rand(1, 6, height, width).requires_grad_(), rand(1, 6, height // 8, width // 4).requires_grad_()
        pooled = functional.adaptive_max_pool(x, (height // 8, width // 4))
        functional.modulate(x, low + pooled).sum().backward()
        kernels = (adaptive_max_pool._kernel, adaptive_max_pool._gradient_kernel, modulate._kernel, _resize._kernel)
        return [kernel.cache_info().misses for kernel in kernels]

    assert run(16, 16) == run(24, 40) == run(33, 47)


def test_a_launch_passes_pointers_then_constants(monkeypatch):
    """The way to the GPU, with a stand-in for the compiled kernel."""
    calls = []
    loads = []

    def load(self, device, args, aligned):
        loads.append(aligned)
        return lambda *a: calls.append(a), "function", "metadata"

    monkeypatch.setattr(launch.Kernel, "_load", load)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    one = launch.Kernel(packing.pack_kernel, {"BLOCK": 1024}, 4)
    one.interpreted = False
    x = torch.empty(64)
    ints = tuple(range(12))
    one((5, 2), x, x, *ints)
    one((5, 2), x, x, *ints)
    one((1, 1), x[1:], x, *ints)
    assert loads == [True, False]
    grid, rest = calls[0][:3], calls[0][3:]
    assert grid == (5, 2, 1)
    assert rest == (77, "function", "metadata", None, None, None, x.data_ptr(), x.data_ptr(), *ints, 1024)
    assert calls[2][9] == x.data_ptr() + 4


def test_signatures():
    one = launch.Kernel(_convolution.convolution_kernel, _constants(), 4)
    x = torch.empty(4, dtype=torch.float16)
    args = (x, x, None, None, None, None, x, None, *range(6), 0.5, *range(4))
    source = one.source(args)
    types = dict(source.signature)
    assert types["x"] == "*fp16" and types["bias"] == "constexpr" and types["height"] == "i32"
    assert types["x_batch"] == "i64" and types["slope"] == "fp32" and types["MODE"] == "constexpr"
    assert set(source.attrs) == {(0,), (1,), (6,)}
    assert not one.source(args, aligned=False).attrs


def _constants():
    names = _convolution.convolution_kernel.arg_names
    return {name: 0 for name in names[names.index("CHANNELS") :]}


# --- tuning -----------------------------------------------------------------------------------------------------------


def test_tuning_takes_the_fastest_right_configuration(monkeypatch):
    """With a clock that knows what it wants to hear, and one configuration that computes nonsense."""
    from esr_kernels.backends.triton import tuning

    if DEVICE != "cpu":
        pytest.skip("the interpreter's part; the real clock is in test_gpu.py")
    wanted, wrong = Config((1, 64), 4, 1), Config((1, 32), 4, 1)
    key = "conv1x1/float32/48x48"
    todo = [
        tuning.Task("float32", "conv1x1 rlfn 46>46", torch.channels_last, False, key, c)
        for c in (Config((1, 128), 4, 1), wanted, wrong)
    ]
    monkeypatch.setattr(tuning, "tasks", lambda labels, arch: todo)
    monkeypatch.setattr(tuning, "problem", lambda task, arch: None)
    current = []
    choose = configs.choose

    def spied(*args):
        current.append(choose(*args))
        return current[-1]

    monkeypatch.setattr("esr_kernels.backends.triton._conv1x1.choose", spied)
    original = tuning._error
    monkeypatch.setattr(tuning, "_error", lambda *a: 1.0 if current[-1] == wrong else original(*a))
    lines = []
    result = tuning.tune(
        60.0,
        ("float32",),
        lines.append,
        device=DEVICE,
        size=(5, 7),
        measure=lambda run: {wanted: 1e-6, wrong: 1e-9}.get(current[-1], 2e-6),
        processes=1,
    )
    assert configs.parse(result) == {key: wanted}
    assert result["times"][key][str(tuple(wrong))] == "wrong by 1.0e+00"
    assert result["not_reached"] == [] and key in lines[0]


def test_tuning_stops_in_time(monkeypatch):
    from esr_kernels.backends.triton import tuning

    one = Config((1, 64), 4, 1)
    todo = [tuning.Task("float32", "conv1x1 rlfn 46>46", torch.channels_last, False, "conv1x1/float32/48x48", one)]
    monkeypatch.setattr(tuning, "tasks", lambda labels, arch: todo)
    monkeypatch.setattr(tuning, "problem", lambda task, arch: None)
    result = tuning.tune(0.0, ("float32",), lambda line: None, device=DEVICE, size=(5, 7), processes=1)
    assert result["configurations"] == {} and result["not_reached"] == ["conv1x1/float32/48x48"]
