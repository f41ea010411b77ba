"""esa in its three forms against plain PyTorch in float64."""

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

from esr_kernels.functional import esa

FORMS = ("rlfn", "without_skip", "rfdn")
NAMES = ("w1", "b1", "w2", "b2", "w3", "b3", "w4", "b4", "wf", "bf", "w_max", "b_max", "w3_", "b3_")


def plain(x, w1, b1, w2, b2, w3, b3, w4, b4, wf=None, bf=None, w_max=None, b_max=None, w3_=None, b3_=None):
    c1 = F.conv2d(x, w1, b1)
    y = F.max_pool2d(F.conv2d(c1, w2, b2, stride=2), kernel_size=7, stride=3)
    if w_max is not None:
        y = F.relu(F.conv2d(y, w_max, b_max, padding=1))
        y = F.conv2d(F.relu(F.conv2d(y, w3, b3, padding=1)), w3_, b3_, padding=1)
    else:
        y = F.conv2d(y, w3, b3, padding=1)
    y = F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=False)
    s = y + (c1 if wf is None else F.conv2d(c1, wf, bf))
    return x * torch.sigmoid(F.conv2d(s, w4, b4))


def weights(form, n, f, bias=True, dtype=torch.float32):
    """Name -> tensor, in the order of the operator's arguments."""
    shapes = {"1": (f, n, 1), "2": (f, f, 3), "3": (f, f, 3), "4": (n, f, 1)}
    if form != "without_skip":
        shapes["f"] = (f, f, 1)
    if form == "rfdn":
        shapes |= {"_max": (f, f, 3), "3_": (f, f, 3)}
    result = {}
    for name, (out, c, k) in shapes.items():
        result[f"w{name}"] = kernel(out, c, k, dtype=dtype)
        result[f"b{name}"] = rand(out, dtype=dtype) if bias else None
    return result


def check(backend, x, parameters):
    out = esa(x, **parameters)
    assert out.dtype == x.dtype and out.is_contiguous(memory_format=expected_format(x))
    exact = plain(x.double(), **to(parameters, torch.float64))
    check_close(out, exact, lambda: plain(x, **parameters), backend)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("n", "f"), [(46, 16), (48, 16), (30, 16), (84, 21), (50, 12), (5, 3)])
def test_forms_and_channel_counts(backend, form, n, f):
    torch.manual_seed(n)
    check(backend, rand(2, n, 21, 26), weights(form, n, f, bias=n != 48))


@pytest.mark.parametrize("size", [(15, 15), (15, 40), (29, 16), (37, 53)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_and_layouts(backend, size, layout):
    torch.manual_seed(0)
    check(backend, lay_out(rand(2, 20, *size), layout), weights("rlfn", 20, 8))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("form", FORMS)
def test_half_types(backend, dtype, form):
    torch.manual_seed(1)
    check(backend, rand(2, 46, 21, 26, dtype=dtype), weights(form, 46, 16, dtype=dtype))


def test_empty_batch(backend):
    assert esa(torch.empty(0, 46, 20, 20), **weights("rlfn", 46, 16)).shape == (0, 46, 20, 20)


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    torch.manual_seed(2)
    named = weights(form, 4, 3)
    call = lambda function: lambda x, *a: function(x, **dict(zip(named, a, strict=True)))  # noqa: E731
    tensors = [rand(1, 4, 16, 19), *named.values()]
    assert torch.autograd.gradcheck(call(esa), [t.double().requires_grad_() for t in tensors], fast_mode=True)
    check_gradients(call(esa), call(plain), tensors)


def test_gradients_without_biases():
    named = weights("rlfn", 6, 4, bias=False)
    x = rand(1, 6, 16, 19).requires_grad_()
    w = named["w2"].requires_grad_()
    esa(x, **named).sum().backward()
    assert x.grad is not None and w.grad.shape == w.shape and named["w1"].grad is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_opcheck(backend, form, layout):
    named = weights(form, 5, 3)
    args = (lay_out(rand(2, 5, 16, 17), layout), *(named.get(name) for name in NAMES))
    torch.library.opcheck(torch.ops.esr.esa.default, args)


@pytest.mark.parametrize("form", FORMS)
def test_opcheck_with_gradients(form):
    named = {k: t.requires_grad_() for k, t in weights(form, 5, 3).items()}
    args = (rand(2, 5, 16, 17).requires_grad_(), *(named.get(name) for name in NAMES))
    torch.library.opcheck(torch.ops.esr.esa.default, args)
    detached = [None if t is None else t.detach() for t in args]
    torch.library.opcheck(
        torch.ops.esr.esa_backward.default, (rand(2, 5, 16, 17), *detached, [a is not None for a in args])
    )


def test_compile():
    named = weights("rlfn", 6, 4)
    f = lambda x, *a: esa(x, **dict(zip(named, a, strict=True)))  # noqa: E731
    check_compiled(f, [(rand(1, 6, *size), *named.values()) for size in ((17, 19), (18, 25), (23, 31))])


def test_second_derivative_is_refused():
    x = rand(1, 4, 16, 16).requires_grad_()
    (g,) = torch.autograd.grad(esa(x, **weights("rlfn", 4, 3)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="esr::esa has no second derivative"):
        g.sum().backward()


def test_flops():
    """The resize counts as four multiply-adds per value, as fvcore counts it."""
    n, f, h, w, h2, w2, h3, w3 = 46, 16, 48, 64, 23, 31, 6, 9
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        esa(rand(2, n, h, w), **weights("rlfn", n, f))
    macs = (2 * n * f + f * f + 4 * f) * h * w + 9 * f * f * (h2 * w2 + h3 * w3)
    assert counter.get_total_flops() == 2 * 2 * macs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 6, 14, 20)}, "x: enhanced spatial attention needs images of at least 15 x 15 pixels"),
        ({"w2": torch.zeros(4, 5, 3, 3)}, r"w2: expected shape \[4, 4, 3, 3\], got \[4, 5, 3, 3\]"),
        ({"w4": torch.zeros(5, 4, 1, 1)}, r"w4: expected shape \[6, 4, 1, 1\], got \[5, 4, 1, 1\]"),
        ({"w_max": torch.zeros(4, 4, 3, 3)}, "w_max, w3_: give both"),
        ({"wf": None}, "bf: given without wf"),
    ],
)
def test_errors(change, message):
    arguments = {"x": torch.zeros(1, 6, 20, 20), **weights("rlfn", 6, 4)} | change
    with pytest.raises(ValueError, match=message):
        esa(**arguments)
