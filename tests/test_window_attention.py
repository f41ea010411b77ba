"""window_attention against PyTorch's scaled_dot_product_attention of windows in float64."""

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
from esr_kernels.functional import window_attention


@pytest.fixture(params=backends_with("window_attention"))
def backend(request):
    with esr_kernels.use_backend(request.param):
        yield request.param


def windows(x, window, heads):
    """[N, C, H, W] -> [N windows, heads, tokens, C / heads]."""
    n, c = x.shape[:2]
    x = F.unfold(x, window, stride=window)  # [N, C tokens, windows]
    return x.view(n, heads, c // heads, window[0] * window[1], -1).permute(0, 4, 1, 3, 2).flatten(0, 1)


def roll_mask(h, w, window, shift, value):
    """As Swin transformers make it: regions of slices."""
    regions = torch.zeros(1, 1, h, w, dtype=torch.float64)
    number = 0
    for rows in (slice(0, h - window[0]), slice(h - window[0], h - shift[0]), slice(h - shift[0], h)):
        for columns in (slice(0, w - window[1]), slice(w - window[1], w - shift[1]), slice(w - shift[1], w)):
            regions[:, :, rows, columns] = number
            number += 1
    tokens = windows(regions, window, 1)[:, :, :, 0]  # [windows, 1, tokens]
    return torch.where(tokens[..., None] == tokens[..., None, :], 0.0, value)


def plain(
    q,
    k,
    v,
    window,
    heads,
    *,
    scale=None,
    bias=None,
    residual=None,
    shift=(0, 0),
    shift_mask=0.0,
    cosine=False,
):
    n, c, h, w = q.shape
    down, right = shift
    tokens = [windows(t.roll((-down, -right), (2, 3)), window, heads) for t in (q, k, v)]
    scale = (c // heads) ** -0.5 if scale is None else scale
    if cosine:
        tokens[:2] = [F.normalize(t, dim=-1) for t in tokens[:2]]
    if isinstance(scale, torch.Tensor):
        tokens[0], scale = tokens[0] * scale.view(-1, 1, 1), 1.0
    if shift_mask and any(shift):
        mask = roll_mask(h, w, window, shift, shift_mask).to(q.dtype).repeat(n, 1, 1, 1)
        bias = mask if bias is None else bias + mask
    y = F.scaled_dot_product_attention(*tokens, bias, scale=scale)
    y = y.unflatten(0, (n, -1)).permute(0, 2, 4, 3, 1).reshape(n, c * window[0] * window[1], -1)
    y = F.fold(y, (h, w), window, stride=window).roll((down, right), (2, 3))
    return y if residual is None else y + residual


def maps(channels, size, *, batch=2, dtype=torch.float32, layout="nchw", count=3):
    return [lay_out(rand(batch, channels, *size, dtype=dtype), layout) for _ in range(count)]


def check(backend, tensors, window, heads, **settings):
    out = window_attention(*tensors, window, heads, **settings)
    q = tensors[0]
    assert out.dtype == q.dtype and out.is_contiguous(memory_format=expected_format(q))
    exact = plain(*to(tensors, torch.float64), window, heads, **to(settings, torch.float64))
    check_close(out, exact, lambda: plain(*tensors, window, heads, **settings), backend)
    if q.dtype == torch.float32:
        assert largest_error(out, exact) <= 1e-5 * float(exact.abs().max())


def everything(channels, heads, window, dtype=torch.float32, layout="nchw", size=(0, 0), batch=2):
    """Settings with all there is."""
    tokens = window[0] * window[1]
    (residual,) = maps(channels, size, batch=batch, dtype=dtype, layout=layout, count=1)
    return {
        "scale": 1 + 10 * torch.rand(heads).to(dtype),
        "bias": rand(heads, tokens, tokens, dtype=dtype),
        "residual": residual,
        "shift": (window[0] // 2, window[1] // 3),
        "shift_mask": -100.0,
        "cosine": True,
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "heads"), [(1, 1), (24, 3), (20, 2), (60, 6), (64, 1), (36, 2), (130, 2)])
def test_channel_counts(backend, channels, heads, layout):
    torch.manual_seed(channels)
    size = (16, 24)
    tensors = maps(channels, size, layout=layout)
    check(backend, tensors, (8, 8), heads)
    check(backend, tensors, (8, 8), heads, **everything(channels, heads, (8, 8), layout=layout, size=size))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("window", "size"),
    [
        ((1, 1), (3, 5)),
        ((2, 2), (4, 6)),
        ((4, 4), (8, 8)),
        ((7, 7), (14, 21)),
        ((16, 4), (32, 12)),
        ((4, 16), (8, 48)),
        ((3, 33), (6, 66)),
        ((16, 16), (16, 32)),
        ((8, 32), (16, 32)),
        ((32, 32), (32, 32)),
    ],
)
def test_windows(backend, window, size, layout):
    torch.manual_seed(1)
    tensors = maps(18, size, layout=layout)
    check(backend, tensors, window, 2)
    check(backend, tensors, window, 2, scale=0.3)
    if window[0] * window[1] <= 256:
        check(backend, tensors, window, 2, **everything(18, 2, window, layout=layout, size=size))


@pytest.mark.parametrize("value", [-100.0, -torch.inf, 3.0])
@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (0, 2), (3, 7), (2, 4)])
def test_shifts_and_masks(backend, shift, value):
    torch.manual_seed(2)
    for size in ((8, 24), (4, 8), (4, 16)):
        tensors, bias = maps(12, size), rand(2, 32, 32)
        check(backend, tensors, (4, 8), 2, shift=shift)
        check(backend, tensors, (4, 8), 2, shift=shift, shift_mask=value)
        check(backend, tensors, (4, 8), 2, shift=shift, shift_mask=value, bias=bias)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", HALF)
def test_half_types(backend, dtype, layout):
    torch.manual_seed(3)
    for window in ((4, 8), (7, 3)):
        size = (2 * window[0], 3 * window[1])
        tensors = maps(20, size, dtype=dtype, layout=layout)
        check(backend, tensors, window, 2)
        check(backend, tensors, window, 2, **everything(20, 2, window, dtype, layout, size))


def test_parts_of_a_map_and_layouts_of_their_own(backend):
    torch.manual_seed(4)
    for layout in LAYOUTS[:2]:
        qkv = lay_out(rand(2, 72, 8, 16), layout)
        check(backend, qkv.chunk(3, 1), (4, 8), 3)
        check(backend, [t[:, 3:21] for t in qkv.chunk(3, 1)], (4, 8), 3, shift=(2, 4))
    tensors = [lay_out(t, layout) for t, layout in zip(maps(12, (8, 8)), LAYOUTS[1:], strict=True)]
    check(backend, tensors, (4, 4), 2, residual=rand(2, 12, 8, 8))
    x = rand(2, 12, 8, 8)
    check(backend, [x, x, x], (4, 4), 2)


def test_large_scores(backend):
    """Beyond what the exponential holds were the largest not subtracted, and one score beyond all others."""
    torch.manual_seed(5)
    q, k, v = maps(16, (8, 8))
    tensors = [8 * q, 8 * k, v]
    check(backend, tensors, (8, 8), 1)
    bias = rand(1, 64, 64)
    bias[:, :, 5] += 1e4
    check(backend, tensors, (8, 8), 1, bias=bias)
    bias[:, :, 5] = -torch.inf
    check(backend, tensors, (8, 8), 1, bias=bias)


def test_zeros_have_no_direction(backend):
    q, k, v = maps(12, (4, 4))
    q[:, :, 1, 2] = k[:, 3:9] = 0
    check(backend, [q, k, v], (4, 4), 2, cosine=True)


def test_a_nan_stays_in_its_window_and_head(backend):
    for which in range(3):
        tensors = maps(20, (8, 16), batch=1)
        tensors[which][0, 7, 2, 9] = float("nan")
        for layout in LAYOUTS[:2]:
            nan = window_attention(*(lay_out(t, layout) for t in tensors), (4, 8), 2).isnan()
            expected = torch.zeros_like(nan)
            if which == 0:
                expected[0, :10, 2, 9] = True
            else:
                expected[0, 7 if which == 2 else slice(10), :4, 8:] = True
            assert torch.equal(nan, expected)


def test_empty_batch(backend):
    tensors = [t.requires_grad_() for t in maps(4, (4, 8), batch=0)]
    out = window_attention(*tensors, (4, 4), 2)
    assert out.shape == (0, 4, 4, 8)
    out.sum().backward()
    assert all(t.grad.shape == t.shape for t in tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients(backend, layout):
    torch.manual_seed(6)
    for heads, window in ((1, (4, 4)), (3, (2, 8))):
        size = (8, 16)
        tensors = maps(12, size, layout=layout)
        check_gradients(
            lambda *t, w=window, h=heads: window_attention(*t, w, h),
            lambda *t, w=window, h=heads: plain(*t, w, h),
            tensors,
        )
        settings = everything(12, heads, window, layout=layout, size=size)
        parameters = [settings.pop(name) for name in ("scale", "bias", "residual")]

        def call(f, *t, w=window, h=heads, rest=settings):
            return f(*t[:3], w, h, scale=t[3], bias=t[4], residual=t[5], **rest)

        check_gradients(lambda *t: call(window_attention, *t), lambda *t: call(plain, *t), [*tensors, *parameters])


@pytest.mark.parametrize("cosine", [False, True])
def test_gradcheck(cosine):
    torch.manual_seed(7)
    tensors = [*maps(4, (4, 4)), 1 + torch.rand(2), rand(2, 4, 4), *maps(4, (4, 4), count=1)]

    def call(q, k, v, scale, bias, residual):
        settings = {"scale": scale, "bias": bias, "residual": residual, "shift": (1, 0), "shift_mask": -1.0}
        return window_attention(q, k, v, (2, 2), 2, cosine=cosine, **settings)

    assert torch.autograd.gradcheck(call, [t.double().requires_grad_() for t in tensors])


SETTINGS = ([2, 4], 3, 0.5, False, [1, 2], -100.0)


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_opcheck(backend, layout):
    tensors = maps(6, (6, 8), layout=layout)
    operator = torch.ops.esr.window_attention.default
    for parameters in ((None, None, None), (rand(3, 8, 8), torch.rand(3), rand(2, 6, 6, 8))):
        torch.library.opcheck(operator, (*tensors, *parameters, *SETTINGS))


def test_opcheck_with_gradients():
    tensors = [t.requires_grad_() for t in (*maps(6, (6, 8)), rand(3, 8, 8), torch.rand(3), rand(2, 6, 6, 8))]
    torch.library.opcheck(torch.ops.esr.window_attention.default, (*tensors, *SETTINGS))
    torch.library.opcheck(torch.ops.esr.window_attention.default, (*tensors[:3], None, None, None, *SETTINGS))
    *tensors, _ = [t.detach() for t in tensors]
    for parameters in (tensors[3:], (None, None)):
        for mask in ([True] * 5, [False, True, False, False, True], [False, False, True, False, False], [False] * 5):
            args = (rand(2, 6, 6, 8), *tensors[:3], *parameters, *SETTINGS, mask)
            torch.library.opcheck(torch.ops.esr.window_attention_backward.default, args)


def test_compile():
    bias = rand(2, 8, 8)

    def attend(qkv, bias):
        return window_attention(*qkv.chunk(3, 1), (2, 4), 2, bias=bias, shift=(1, 2), shift_mask=-100.0)

    check_compiled(attend, [(rand(1, 18, *size), bias) for size in ((6, 12), (8, 16), (10, 4))])


def test_second_derivative_is_refused():
    q, k, v = (t.requires_grad_() for t in maps(4, (4, 4)))
    (g,) = torch.autograd.grad(window_attention(q, k, v, (2, 2), 1).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="esr::window_attention has no second derivative"):
        g.sum().backward()


def test_flops():
    q, k, v = maps(6, (6, 8))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        window_attention(q, k, v, (3, 4), 2)
    product = 2 * 12 * q.numel()
    assert counter.get_total_flops() == 2 * product
    for leaves, products in (((q, k, v), 5), ((q,), 3), ((v,), 2)):
        for t in (q, k, v):
            t.requires_grad_(any(t is leaf for leaf in leaves))
        out = window_attention(q, k, v, (3, 4), 2)
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == products * product


def test_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = window_attention(*maps(4, (4, 4)), (2, 2), 2, bias=rand(2, 4, 4), scale=torch.rand(2))
    assert out.dtype == torch.bfloat16


def test_decomposes_while_traced():
    q, k, v = maps(4, (4, 4))
    traced = torch.jit.trace(lambda q, k, v: window_attention(q, k, v, (2, 2), 2, shift=(1, 1)), (q, k, v))
    assert "esr::" not in str(traced.graph)
    torch.testing.assert_close(traced(q, k, v), window_attention(q, k, v, (2, 2), 2, shift=(1, 1)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(4, 8, 8)}, ValueError, r"q: expected 4 dimensions \[N, C, H, W\], got 3"),
        ({"k": torch.zeros(1, 4, 8, 4)}, ValueError, r"k: expected shape \[1, 4, 8, 8\], got \[1, 4, 8, 4\]"),
        ({"v": torch.zeros(1, 4, 8, 8).half()}, TypeError, "v: expected the input's dtype torch.float32"),
        ({"v": None}, TypeError, r"v: expected a torch.Tensor, got NoneType"),
        ({"window": 4}, TypeError, "window: expected two ints, got 4"),
        ({"window": (4, 2.0)}, TypeError, r"window: expected two ints, got \(4, 2.0\)"),
        ({"window": (0, 4)}, ValueError, r"window: height and width must be at least 1, got \(0, 4\)"),
        ({"window": (3, 4)}, ValueError, "q: 8x8 pixels are not whole windows of 3x4"),
        ({"heads": 3}, ValueError, "heads: expected a divisor of 4 channels, got 3"),
        ({"heads": 0}, ValueError, "heads: expected a divisor of 4 channels, got 0"),
        ({"heads": 2.0}, TypeError, "heads: expected an int, got 2.0"),
        ({"shift": (4, 0)}, ValueError, r"shift: must be at least 0 and less than the window \(4, 4\), got \(4, 0\)"),
        ({"shift": (0, -1)}, ValueError, "shift: must be at least 0"),
        (
            {"bias": torch.zeros(2, 16, 15)},
            ValueError,
            r"bias: expected shape \[2, 16, 16\] or None, got \[2, 16, 15\]",
        ),
        ({"bias": torch.zeros(2, 16, 16).half()}, TypeError, "bias: expected the input's dtype"),
        ({"scale": torch.zeros(3)}, ValueError, r"scale: expected shape \[2\] or None, got \[3\]"),
        ({"residual": torch.zeros(1, 4, 8, 4)}, ValueError, r"residual: expected shape \[1, 4, 8, 8\]"),
    ],
)
def test_errors(change, error, message):
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(error, match=message):
        window_attention(**{"q": x, "k": x, "v": x, "window": (4, 4), "heads": 2} | change)


class _Attending(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(3, 48, 3, padding=1), torch.nn.Conv2d(16, 3, 3, padding=1)
        self.bias = torch.nn.Parameter(rand(2, 32, 32))

    def forward(self, x):
        q, k, v = self.first(x).chunk(3, 1)
        return self.last(window_attention(q, k, v, (4, 8), 2, bias=self.bias, shift=(2, 4), shift_mask=-100.0))


def test_stays_in_an_optimised_network():
    torch.manual_seed(10)
    network = _Attending().requires_grad_(False).eval()
    fast = esr_kernels.optimize(network)
    for size in ((8, 16), (16, 24), (12, 40)):
        x = torch.rand(2, 3, *size)
        with torch.profiler.profile() as profile:
            got = fast(x)
        names = {event.name for event in profile.events()}
        assert "esr::window_attention" in names and "esr::run_plan" in names
        torch.testing.assert_close(got, network(x), rtol=1e-4, atol=1e-4)
