"""modulate against PyTorch's interpolate in float64."""

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
from esr_kernels.functional import modulate
from esr_kernels.library import ACTIVATIONS, RESIZE_MODES


@pytest.fixture(params=backends_with("modulate"))
def backend(request):
    with esr_kernels.use_backend(request.param):
        yield request.param


def plain(x, maps, mode="nearest", activation="none", negative_slope=0.05):
    corners = False if mode == "bilinear" else None
    total = sum(F.interpolate(t, size=x.shape[2:], mode=mode, align_corners=corners) for t in maps)
    return x * activate(total, activation, negative_slope)


def check(backend, x, maps, **settings):
    out = modulate(x, maps, **settings)
    assert out.dtype == x.dtype and out.is_contiguous(memory_format=expected_format(x))
    exact = plain(x.double(), to(maps, torch.float64), **settings)
    check_close(out, exact, lambda: plain(x, maps, **settings), backend)
    if x.dtype == torch.float32:
        assert largest_error(out, exact) <= 1e-5 * float(exact.abs().max())


def features(channels, size, sizes, layout="nchw", dtype=torch.float32):
    return [lay_out(rand(2, channels, *s, dtype=dtype), layout) for s in (size, *sizes)]


# Multiples, none, as it is, one row or pixel, larger than x.
SIZES = [
    ((16, 24), [(16, 24), (4, 6), (2, 3), (1, 1)]),
    ((17, 35), [(4, 8), (2, 4)]),
    ((7, 1), [(3, 1), (7, 1)]),
    ((5, 6), [(9, 4), (1, 6)]),
    ((1, 1), [(1, 1), (3, 2)]),
]


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "sizes"), SIZES)
def test_sizes_and_layouts(backend, size, sizes, layout, mode):
    torch.manual_seed(0)
    for channels in (1, 9, 36) if size != (1, 1) else (36,):  # of few values all may be differences of larger ones
        x, *maps = features(channels, size, sizes, layout)
        check(backend, x, maps, mode=mode, activation="gelu")
    check(backend, x, maps[:1], mode=mode)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_activations(backend, mode, activation):
    torch.manual_seed(1)
    x, *maps = features(12, (9, 14), [(9, 14), (3, 5)], "channels_last")
    check(backend, x, maps, mode=mode, activation=activation, negative_slope=0.2)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("mode", RESIZE_MODES)
def test_half_types(backend, dtype, mode):
    torch.manual_seed(2)
    for layout in LAYOUTS:
        x, *maps = features(20, (13, 21), [(3, 5)], layout, dtype)
        check(backend, x, maps, mode=mode, activation="gelu")


def test_rows_longer_than_a_tile(backend):
    """Of 2048 values a line of the native backend is cut."""
    torch.manual_seed(3)
    for layout, size, small in (("nchw", (3, 2500), (2, 7)), ("channels_last", (3, 130), (2, 17))):
        x, *maps = features(20 if layout != "nchw" else 1, size, [small, size], layout)
        for mode in RESIZE_MODES:
            check(backend, x, maps, mode=mode, activation="silu")
            tensors = [x, *maps]
            check_gradients(
                lambda x, *m, mode=mode: modulate(x, m, mode=mode), lambda x, *m, mode=mode: plain(x, m, mode), tensors
            )


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_infinities_and_nan(backend, layout, mode):
    """Where PyTorch has them: zero times an infinity is NaN, also where a map has no row below; of powers of two, whose
    weights every dtype has."""
    for size in ((1, 4), (4, 1), (2, 2), (4, 2)):
        x, small = rand(1, 9, 8, 8), rand(1, 9, *size)
        small[0, 0, 0, 0], small[0, 1, -1, -1], small[0, 8, 0, -1] = torch.inf, -torch.inf, torch.nan
        got = modulate(lay_out(x, layout), lay_out(small, layout), mode=mode)
        exact = plain(x.double(), [small.double()], mode)
        assert torch.equal(got.isnan(), exact.isnan())
        assert torch.equal(got.isinf(), exact.isinf())


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_part_of_the_channels(backend, layout):
    """Read where it is, maps of other memory formats too; the result has the memory format of the whole."""
    x = lay_out(rand(2, 20, 12, 11), layout)
    small = rand(2, 10, 3, 2)
    for part in x.chunk(2, 1):
        for maps in ([small], [lay_out(small, "channels_last")], [x[:, :10], small]):
            out = modulate(part, maps, activation="relu")
            torch.testing.assert_close(out, plain(part, maps, activation="relu"))
            assert out.is_contiguous(memory_format=expected_format(x))


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "sizes"), SIZES)
def test_gradients(backend, size, sizes, layout, mode):
    torch.manual_seed(4)
    for channels in (1, 18):
        check_gradients(
            lambda x, *maps: modulate(x, maps, mode=mode, activation="silu"),
            lambda x, *maps: plain(x, maps, mode, "silu"),
            features(channels, size, sizes, layout),
        )


def test_only_wanted_gradients(backend):
    x, *maps = features(6, (8, 9), [(2, 3), (8, 9), (4, 4)])
    grad = torch.randn_like(x)
    arguments = (grad, x, maps, "bilinear", "gelu", 0.0)
    every = torch.ops.esr.modulate_backward(*arguments, [True] * 4)
    for k in range(4):
        got = torch.ops.esr.modulate_backward(*arguments, [i == k for i in range(4)])
        assert torch.equal(got[k], every[k]) and sum(g.numel() for g in got) == every[k].numel()


def test_empty_batch(backend):
    tensors = [torch.empty(0, 4, *size, requires_grad=True) for size in ((6, 7), (2, 3), (6, 7))]
    for mode in RESIZE_MODES:
        out = modulate(tensors[0], tensors[1:], mode=mode)
        assert out.shape == (0, 4, 6, 7)
        out.sum().backward()
    assert all(t.grad.shape == t.shape for t in tensors)


def test_one_map_needs_no_list():
    x, small = features(4, (8, 9), [(2, 3)])
    assert torch.equal(modulate(x, small), modulate(x, [small]))


def test_gradcheck():
    torch.manual_seed(5)
    tensors = [t.double().requires_grad_() for t in features(2, (4, 5), [(2, 2), (4, 5)])]
    for mode in RESIZE_MODES:
        assert torch.autograd.gradcheck(lambda x, *m, mode=mode: modulate(x, m, mode=mode, activation="gelu"), tensors)


@pytest.mark.parametrize("mode", RESIZE_MODES)
@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_opcheck(backend, layout, mode):
    x, *maps = features(6, (6, 7), [(2, 3), (6, 7)], layout)
    torch.library.opcheck(torch.ops.esr.modulate.default, (x, maps, mode, "gelu", 0.0))
    for mask in ([True] * 3, [False, True, False]):
        arguments = (torch.randn_like(x), x, maps, mode, "gelu", 0.0, mask)
        torch.library.opcheck(torch.ops.esr.modulate_backward.default, arguments)


def test_opcheck_with_gradients():
    x, *maps = (t.requires_grad_() for t in features(6, (6, 7), [(2, 3)]))
    torch.library.opcheck(torch.ops.esr.modulate.default, (x, maps, "nearest", "silu", 0.0))


def test_compile():
    for mode in RESIZE_MODES:
        check_compiled(
            lambda x, small, mode=mode: modulate(x, [x, small], mode=mode, activation="gelu"),
            [(rand(1, 6, 4 * h, 3 * w), rand(1, 6, h, w)) for h, w in ((5, 7), (6, 5), (9, 8))],
        )


def test_second_derivative_is_refused():
    x, small = (t.requires_grad_() for t in features(4, (6, 6), [(2, 2)]))
    (g,) = torch.autograd.grad(modulate(x, small).square().sum(), small, create_graph=True)
    with pytest.raises(RuntimeError, match="esr::modulate has no second derivative"):
        g.sum().backward()


def test_flops():
    """A bilinear resize is counted as ESA's is; products with x are not."""
    x, *maps = features(20, (6, 7), [(2, 3), (6, 7), (3, 3)])
    for mode, resized in (("nearest", 0), ("bilinear", 2)):
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            modulate(x, maps, mode=mode)
        assert counter.get_total_flops() == 8 * resized * x.numel()


def test_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert modulate(rand(1, 4, 6, 6), rand(1, 4, 2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"maps": []}, ValueError, "maps: expected 1 to 8 tensors, got 0"),
        ({"maps": [torch.zeros(1, 4, 2, 2)] * 9}, ValueError, "maps: expected 1 to 8 tensors, got 9"),
        ({"maps": torch.zeros(1, 3, 2, 2)}, ValueError, r"maps: expected shape \[1, 4, H, W\], got \[1, 3, 2, 2\]"),
        ({"maps": [torch.zeros(1, 4, 2, 2).half()]}, TypeError, r"maps\[0\]: expected the input's dtype torch.float32"),
        ({"mode": "bicubic"}, ValueError, "mode: expected one of nearest, bilinear, got 'bicubic'"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of"),
        ({"x": torch.zeros(4, 8, 8)}, ValueError, r"x: expected 4 dimensions \[N, C, H, W\], got 3"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        modulate(**{"x": torch.zeros(1, 4, 8, 8), "maps": torch.zeros(1, 4, 2, 2)} | change)
