"""Gradients of the CUDA engine against float64: every operator, precision and layout, sizes at random."""

from __future__ import annotations

import random

import pytest
import torch
from gradients import EPILOGUES, ONE_OF_EACH, backward, check, check_half_type
from helpers import HALF, LAYOUTS, check_gradients, emulate, kernel, lay_out, rand
from test_native_cuda import DEVICE, gpu, on_cuda, only_emulated, pytestmark  # noqa: F401
from test_triton import CASE_NAMES, MAIN_CASE, gradient_cases
from torch.nn import functional as F

from esr_kernels import functional
from esr_kernels.backends.native import cuda

PRECISIONS = {"float32": (torch.float32, 1e-5), "tf32": (torch.float32, 5e-3), "float16": (torch.float16, 4e-3),
              "bfloat16": (torch.bfloat16, 3e-2)}  # fmt: skip


@pytest.fixture(autouse=True)
def on_device():
    with torch.device(DEVICE):
        yield


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASE_NAMES)
def test_backward(case, layout, precision):
    torch.manual_seed(4)
    dtype, tolerance = PRECISIONS[precision]
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    check(case, gradient_cases(dtype, layout)[case], tolerance)


@pytest.mark.parametrize(("activation", "mode"), EPILOGUES)
def test_epilogues(activation, mode):
    torch.manual_seed(5)
    residual = None if mode is None else rand(1, 12, 6, 7)
    mask = [True, True, True, residual is not None]
    tensors = (rand(1, 12, 6, 7), rand(1, 9, 6, 7, scale=3), kernel(12, 9), rand(12), residual)
    check("conv3x3", (*tensors, activation, 0.1, mode or "post", mask), 1e-5)


@pytest.mark.parametrize("dtype", HALF)
def test_half_types_against_pytorch(dtype):
    torch.manual_seed(6)
    check_half_type(dtype)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("seed", range(6))
def test_weight_gradients_at_random(seed, precision):
    r = random.Random(f"{seed} {precision}")
    torch.manual_seed(seed)
    dtype, tolerance = PRECISIONS[precision]
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    n, h, w = r.randint(1, 4), r.randint(2, 40), r.randint(2, 70)
    cin, cout = r.randint(1, 90), r.randint(1, 90)

    def feature(channels):
        return lay_out(rand(n, channels, h, w, dtype=dtype), r.choice(LAYOUTS))

    mask = [False, True, r.random() < 0.5, False]
    weight = kernel(cout, cin, dtype=dtype)
    check("conv3x3", (feature(cout), feature(cin), weight, None, None, "none", 0.0, "post", mask), tolerance)
    channels = [r.randint(1, 70) for _ in range(r.randint(1, 6))]
    weight = kernel(cout, sum(channels), 1, dtype=dtype)
    mask = [False] * len(channels) + [True, r.random() < 0.5]
    check("conv1x1", (feature(cout), [feature(c) for c in channels], weight, None, "none", 0.0, mask), tolerance)
    weights = (kernel(cout, cin, 1, dtype=dtype), kernel(cout, 1, dtype=dtype))
    mask = [r.random() < 0.5, True, True, False]
    check("bsconv", (feature(cout), feature(cin), *weights, None, "reflect", "none", 0.0, mask), tolerance)


@only_emulated
@pytest.mark.parametrize(("channels", "out"), [(8, 16), (40, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parts_of_several_tiles(channels, out, dtype, gpu):  # noqa: F811
    """One stage or two, as shared memory allows."""
    torch.manual_seed(7)
    n = 3 if dtype == torch.float16 and channels == 40 else 6
    grad, x = (lay_out(rand(n, c, 60, 130, dtype=dtype), "channels_last") for c in (out, channels))
    arguments = (grad, x, kernel(out, channels, dtype=dtype), None, None, "none", 0.0, "post")
    check("conv3x3", (*arguments, [False, True, True, False]), 1e-5 if dtype == torch.float32 else 1e-3)


def test_more_inputs_than_one_launch_reads():
    torch.manual_seed(7)
    xs = [lay_out(rand(1, c, 5, 6), "channels_last") for c in (3, 8, 17, 4) * 5]
    weight = kernel(10, sum(x.shape[1] for x in xs), 1)
    arguments = (rand(1, 10, 5, 6), xs, weight, rand(10), "silu", 0.0)
    check("conv1x1", (*arguments, [True] * 22), 1e-5)
    check("conv1x1", (*arguments, [True] * 23, rand(1, 10, 5, 6)), 1e-5)
    check("conv1x1", (*arguments[:4], "none", 0.0, [True] * 23, rand(1, 10, 5, 6)), 1e-5)


@pytest.mark.parametrize(
    "name",
    ["conv3x3", "spab", "conv3x3_pixel_shuffle", "conv1x1", "bsconv", "depthwise_conv", "layer_norm2d", "modulate"],
)
def test_unwanted_gradients_are_empty(name):
    torch.manual_seed(8)
    cases = {
        "conv3x3": ["conv3x3 pre", "conv3x3 post", "conv3x3 attention"],
        "bsconv": ["bsconv reflect", "bsconv residual"],
    }
    cases["conv1x1"] = ["conv1x1", "conv1x1 residual"]
    cases["depthwise_conv"] = ["depthwise_conv gelu", "depthwise_conv gated"]
    cases["modulate"] = ["modulate", "modulate bilinear"]
    for case in cases.get(name, [name]):
        arguments = gradient_cases(torch.float32, "channels_last")[case]
        (place,) = (i for i, a in enumerate(arguments) if isinstance(a, list) and isinstance(a[0], bool))
        count = len(arguments[place])
        for i in range(count):
            single = [k == i for k in range(count)]
            got = check(case, (*arguments[:place], single, *arguments[place + 1 :]), 1e-5)
            assert [g.numel() > 0 for g in got] == single


@only_emulated
@pytest.mark.parametrize("precision", PRECISIONS)
def test_weight_gradients_are_the_same_on_every_gpu(precision, gpu):  # noqa: F811
    """Their parts depend on sizes only."""
    dtype, _ = PRECISIONS[precision]
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.manual_seed(9)
    arguments = (rand(2, 40, 31, 37, dtype=dtype), rand(2, 28, 31, 37, dtype=dtype), kernel(40, 28, dtype=dtype))
    arguments = (*arguments, rand(40, dtype=dtype), None, "none", 0.0, "post", [False, True, True, False])
    here = backward("conv3x3", arguments)
    emulate()
    for g, e in zip(here, backward("conv3x3", arguments), strict=True):
        assert torch.equal(g, e)


@only_emulated
@pytest.mark.parametrize(
    "case",
    [
        "spab",
        "conv3x3_pixel_shuffle",
        "conv1x1",
        "esa rfdn",
        "bsconv reflect",
        "depthwise_conv gated",
        "layer_norm2d",
        "adaptive_max_pool",
        "modulate",
        "modulate bilinear",
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_gpus(case, dtype, gpu):  # noqa: F811
    torch.manual_seed(10)
    check(case, gradient_cases(dtype, "channels_last")[case], 1e-5 if dtype == torch.float32 else 4e-3)


@only_emulated
@pytest.mark.parametrize("order", ["reverse", "random:1"])
@pytest.mark.parametrize("case", CASE_NAMES)
def test_order_of_threads(case, order, monkeypatch):
    torch.manual_seed(11)
    arguments = gradient_cases(torch.float16, "nchw")[case]
    expected = backward(case, arguments)
    monkeypatch.setenv("ESR_EMULATOR_ORDER", order)
    for g, e in zip(backward(case, arguments), expected, strict=True):
        assert torch.equal(g, e)


def test_repeats_are_bit_equal():
    torch.manual_seed(12)
    for case in CASE_NAMES:
        arguments = gradient_cases(torch.float32, "channels_last")[case]
        for a, b in zip(backward(case, arguments), backward(case, arguments), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("channels", "sides", "dilation", "gated"),
    [(44, (7, 5), 2, True), (24, (3, 3), 1, True), (70, (1, 7), 3, False), (16, (5, 1), 40, False)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_depthwise_filters(channels, sides, dilation, gated, dtype):
    """Halves that are whole units and halves that are not; slabs of channels; parts of several rows."""
    torch.manual_seed(17)
    x = lay_out(rand(3, channels, 41, 37, dtype=dtype), "channels_last")
    grad = rand(3, channels // 2 if gated else channels, 41, 37, dtype=dtype)
    weight = rand(channels, 1, *sides, dtype=dtype, scale=(sides[0] * sides[1]) ** -0.5)
    arguments = (grad, x, weight, rand(channels, dtype=dtype), dilation, "gelu_tanh", 0.0, gated, [True] * 3)
    check("depthwise_conv", arguments, 1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("channels", [1, 8, 70, 256, 300])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_normalised_channels(channels, layout):
    """Down to one unit and up to several blocks for a pixel."""
    torch.manual_seed(18)
    grad, x = (lay_out(rand(2, channels, 9, 23), layout) for _ in range(2))
    check("layer_norm2d", (grad, x, rand(channels), rand(channels), 1e-3, [True] * 3), 1e-5)
    check("layer_norm2d", (grad, x, None, rand(channels), 1e-3, [channels > 70, False, True]), 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("channels", "size", "pooled"),
    [
        (9, (16, 24), (8, 12)),
        (24, (36, 53), (3, 4)),
        (70, (29, 31), (1, 1)),
        (3, (11, 7), (13, 30)),
        (40, (9, 9), (8, 2)),
    ],
)
def test_pooled_windows(channels, size, pooled, layout):
    """One thread or a team for a window; windows that overlap, more of them than pixels; ties, infinities and NaN."""
    torch.manual_seed(19)
    for dtype in (torch.float32, torch.float16):
        grad, x = (lay_out(rand(2, channels, *s, dtype=dtype), layout) for s in (pooled, size))
        tolerance = 1e-5 if dtype == torch.float32 else 4e-3
        check("adaptive_max_pool", (grad, x, [True]), tolerance)
        tied = x.round()
        tied[0, 1] = -torch.inf
        tied[1, 0, ::2, ::3] = torch.nan
        check("adaptive_max_pool", (grad, lay_out(tied, layout), [True]), tolerance)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize(
    ("channels", "size", "sizes"),
    [
        (36, (32, 48), [(32, 48), (16, 24), (8, 12), (4, 6)]),
        (70, (33, 29), [(5, 4), (1, 1)]),
        (9, (7, 11), [(7, 30), (23, 5), (7, 11), (9, 11)]),
        (8, (1, 1), [(3, 2)]),
    ],
)
def test_resized_maps(channels, size, sizes, mode):
    """Multiples and none, smaller and larger maps, windows for one thread or a team; with and without a whole map."""
    torch.manual_seed(20)
    for dtype, layout in ((torch.float32, "nchw"), (torch.float16, "channels_last"), (torch.float32, "channels_last")):
        x, grad, *maps = (lay_out(rand(2, channels, *s, dtype=dtype), layout) for s in (size, size, *sizes))
        for mask in ([True] * (1 + len(maps)), [False] + [t.shape[2:] != x.shape[2:] for t in maps]):
            arguments = (grad, x, maps, mode, "gelu", 0.0, mask)
            check("modulate", arguments, 1e-5 if dtype == torch.float32 else 4e-3)


@only_emulated
@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_gradients_to_maps_are_the_same_on_every_gpu(mode, gpu):  # noqa: F811
    torch.manual_seed(21)
    x, grad, *maps = (rand(2, 20, *s) for s in ((40, 37), (40, 37), (3, 2), (20, 19)))
    arguments = (grad, x, maps, mode, "silu", 0.0, [True] * 3)
    here = backward("modulate", arguments)
    emulate()
    for g, e in zip(here, backward("modulate", arguments), strict=True):
        assert torch.equal(g, e)


@pytest.mark.parametrize("strides", ["every other element", "expanded", "channels_last"])
@pytest.mark.parametrize("case", ONE_OF_EACH)
def test_parameters_of_any_strides(case, strides):
    torch.manual_seed(13)

    def change(t):
        if not isinstance(t, torch.Tensor) or (t.dim() == 4 and t.shape[2] > 3):
            return t
        if strides == "channels_last":
            return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        if strides == "expanded":
            return t[:1].expand(t.shape)
        return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]

    arguments = tuple(change(t) for t in gradient_cases(torch.float32, "nchw")[case])
    check(case, arguments, 1e-5)


def test_gradient_without_a_stride():
    """What `sum().backward()` hands in."""
    torch.manual_seed(14)
    x, weight = rand(2, 8, 9, 10), kernel(12, 8)
    ones = torch.ones(()).expand(2, 12, 9, 10)
    for activation in ("none", "silu"):
        check("conv3x3", (ones, x, weight, None, None, activation, 0.0, "post", [True, True, True, False]), 1e-5)


@pytest.mark.parametrize("name", [name for name in functional.__all__ if name in cuda.OPERATORS])
def test_empty_batch(name):
    case = MAIN_CASE.get(name, name)
    arguments = gradient_cases(torch.float32, "nchw")[case]

    def empty(value):
        if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            return [v[:0] for v in value]
        is_map = isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[2] > 3
        return value[:0] if is_map else value

    for g in backward(case, [empty(a) for a in arguments]):
        assert torch.equal(g, torch.zeros_like(g))


def test_through_autograd():
    torch.manual_seed(15)
    tensors = [rand(2, 20, 8, 9), kernel(30, 20), rand(30)]
    plain = lambda x, w, b: F.silu(F.conv2d(x, w, b, padding=1))  # noqa: E731
    check_gradients(lambda *a: functional.conv3x3(*a, activation="silu"), plain, tensors, 1e-5)


def test_wrong_shapes_are_refused():
    x, weight, g = rand(1, 4, 5, 6), kernel(8, 4), rand(1, 8, 5, 6)
    call = cuda.library().conv3x3_backward
    gradients = [torch.empty_like(x), torch.empty_like(weight), weight.new_empty(8), x.new_empty(0)]
    call(g, x, weight, None, None, 0, 0.0, 1, 3, gradients)
    for wrong, message in (
        ((g[:, :7], x, weight), "grad is"),
        ((g, x[:, :3], weight), "weight is"),
        ((torch.cat([g, g]), x, weight), "grad has 2 images"),
        ((g, x, weight.double()), "unsupported dtype"),
        ((g.half(), x, weight), "dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*wrong, None, None, 0, 0.0, 1, 3, gradients)
    with pytest.raises(RuntimeError, match="gradients given"):
        call(g, x, weight, None, None, 0, 0.0, 1, 3, gradients[:3])
    with pytest.raises(RuntimeError, match="the gradient to weight is"):
        call(g, x, weight, None, None, 0, 0.0, 1, 3, [gradients[0], gradients[1][:, :3], *gradients[2:]])


def test_wrong_arguments_of_direct_operators_are_refused():
    x, weight, out = rand(1, 4, 5, 6), rand(4, 1, 3, 3), rand(1, 4, 5, 6)
    call = cuda.library().depthwise_conv
    for change, message in (
        ({"weight": rand(5, 1, 3, 3)}, "weight is"),
        ({"weight": rand(4, 1, 3, 9)}, "weight has a side of 9, must be odd and at most 7"),
        ({"weight": rand(4, 1, 2, 3)}, "weight has a side of 2"),
        ({"bias": rand(3)}, "bias is"),
        ({"dilation": 0}, "dilation is 0"),
        ({"activation": 9}, "activation is 9"),
        ({"gated": True}, "the result is"),
        ({"gated": True, "x": x[:, :3], "weight": weight[:3]}, "x has 3 channels, must be an even number for a gate"),
        ({"outputs": []}, "0 results given"),
    ):
        given = {"x": x, "weight": weight, "bias": None, "dilation": 1, "activation": 0, "slope": 0.0, "gated": False}
        given |= {"precision": 3, "outputs": [out]} | change
        with pytest.raises(RuntimeError, match=message):
            call(*given.values())
    with pytest.raises(RuntimeError, match="weight is"):
        cuda.library().layer_norm2d(x, rand(5), None, 1e-6, 3, [out])
    gradients = [torch.empty_like(x), rand(4), rand(5)]
    with pytest.raises(RuntimeError, match="the gradient to bias is"):
        cuda.library().layer_norm2d_backward(out, x, rand(4), 1e-6, 3, gradients)


def test_wrong_arguments_of_pooling_and_modulation_are_refused():
    x, small, out = rand(1, 4, 5, 6), rand(1, 4, 2, 3), rand(1, 4, 5, 6)
    library = cuda.library()
    for outputs, message in (
        ([], "0 results given"),
        ([rand(1, 5, 2, 3)], "the result has 5 channels of 2x3 pixels, must have those of x"),
        ([rand(1, 4, 0, 3)], "must have those of x and at least one pixel"),
        ([rand(2, 4, 2, 3)], "the result has 2 images"),
    ):
        with pytest.raises(RuntimeError, match=message):
            library.adaptive_max_pool(x, 3, outputs)
    with pytest.raises(RuntimeError, match="x has no pixels"):
        library.adaptive_max_pool(x[:, :, :0], 3, [small])
    with pytest.raises(RuntimeError, match="x has no pixels"):
        library.modulate(x[:, :, :0], [small], True, 0, 0.0, 3, [out[:, :, :0]])
    with pytest.raises(RuntimeError, match="the gradient to x is"):
        library.adaptive_max_pool_backward(small, x, 3, [small])
    wide = torch.zeros(1, dtype=torch.float16).expand(1, 1, 65536, 65536)
    with pytest.raises(RuntimeError, match=r"windows have 2\^31 pixels or more"):
        library.adaptive_max_pool_backward(wide[:, :, :1, :1], wide, 0, [wide])
    for change, message in (
        ({"maps": []}, "0 maps given, must be 1 to 8"),
        ({"maps": [small] * 9}, "9 maps given"),
        ({"maps": [small, rand(1, 3, 2, 2)]}, "map 1 has 3 channels of 2x2 pixels"),
        ({"maps": [small.half()]}, "dtype"),
        ({"activation": 6}, "activation is 6"),
        ({"outputs": [small]}, "the result is"),
    ):
        given = {"x": x, "maps": [small], "bilinear": True, "activation": 0, "slope": 0.0, "precision": 3}
        given |= {"outputs": [out]} | change
        with pytest.raises(RuntimeError, match=message):
            library.modulate(*given.values())
    with pytest.raises(RuntimeError, match="1 gradients given, must be 2"):
        library.modulate_backward(out, x, [small], True, 0, 0.0, 3, [out])
    with pytest.raises(RuntimeError, match="the gradient to a map is"):
        library.modulate_backward(out, x, [small], True, 0, 0.0, 3, [out, out])
