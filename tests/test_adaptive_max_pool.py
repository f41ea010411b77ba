"""adaptive_max_pool against PyTorch's in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import HALF, LAYOUTS, backends_with, check_compiled, check_gradients, expected_format, lay_out, rand
from torch.nn import functional as F

import esr_kernels
from esr_kernels.functional import adaptive_max_pool


@pytest.fixture(params=backends_with("adaptive_max_pool"))
def backend(request):
    with esr_kernels.use_backend(request.param):
        yield request.param


def check(x, size):
    """A maximum is exact in every dtype."""
    out = adaptive_max_pool(x, size)
    assert out.dtype == x.dtype and out.is_contiguous(memory_format=expected_format(x))
    assert torch.equal(out.double(), F.adaptive_max_pool2d(x.double(), size))


SIZES = [
    ((16, 24), (4, 3)),
    ((17, 35), (4, 8)),
    ((9, 7), (9, 7)),
    ((5, 6), (7, 13)),
    ((13, 1), (2, 1)),
    ((1, 1), (1, 1)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "pooled"), SIZES)
def test_sizes_and_layouts(backend, size, pooled, layout):
    torch.manual_seed(0)
    for channels in (1, 3, 9, 36):
        check(lay_out(rand(2, channels, *size), layout), pooled)


@pytest.mark.parametrize("dtype", HALF)
def test_half_types(backend, dtype):
    torch.manual_seed(1)
    for layout in LAYOUTS:
        check(lay_out(rand(2, 20, 13, 21, dtype=dtype), layout), (3, 5))


def test_every_number_of_windows(backend):
    """Windows of every width, among them those that are a power of two and those beside it."""
    torch.manual_seed(2)
    x = rand(1, 2, 3, 41)
    for layout in LAYOUTS[:2]:
        for windows in (1, 2, 3, 5, 9, 10, 11, 13, 14, 20, 21, 40, 41, 42, 90):
            check(lay_out(x, layout), (1, windows))


def test_infinities_and_nan(backend):
    x = rand(1, 18, 9, 24)
    x[0, 1] = -torch.inf
    x[0, 2, 4, 5] = torch.inf
    x[0, 3, 8, 23] = x[0, 17, 0, 0] = torch.nan
    for layout in LAYOUTS[:2]:
        got, exact = adaptive_max_pool(lay_out(x, layout), (3, 4)), F.adaptive_max_pool2d(x, (3, 4))
        assert torch.equal(got.nan_to_num(1e9), exact.nan_to_num(1e9)) and got.isnan().sum() == 2


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_part_of_the_channels(backend, layout):
    """Read where it is; the result has the memory format of the whole."""
    x = lay_out(rand(2, 20, 12, 11), layout)
    for part in x.chunk(2, 1):
        out = adaptive_max_pool(part, (3, 5))
        assert torch.equal(out, F.adaptive_max_pool2d(part, (3, 5)))
        assert out.is_contiguous(memory_format=expected_format(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("size", "pooled"), SIZES)
def test_gradients(backend, size, pooled, layout):
    """Overlapping windows too; among equal values the first has it, and the last NaN."""
    torch.manual_seed(3)
    x = lay_out(rand(2, 18, *size), layout)
    check_gradients(lambda x: adaptive_max_pool(x, pooled), lambda x: F.adaptive_max_pool2d(x, pooled), [x])
    equal = lay_out(x.round(), layout)
    check_gradients(lambda x: adaptive_max_pool(x, pooled), lambda x: F.adaptive_max_pool2d(x, pooled), [equal])


def test_where_the_gradient_of_a_nan_goes(backend):
    for layout in LAYOUTS[:2]:
        x = rand(1, 9, 6, 8)
        x[0, 2, 1, 1] = x[0, 2, 2, 0] = torch.nan
        ours, exact = lay_out(x, layout).clone().requires_grad_(), x.clone().requires_grad_()
        adaptive_max_pool(ours, (2, 2)).sum().backward()
        F.adaptive_max_pool2d(exact, (2, 2)).sum().backward()
        assert torch.equal(ours.grad, exact.grad) and ours.grad[0, 2, 2, 0] == 1


def test_empty_batch(backend):
    x = torch.empty(0, 4, 5, 6, requires_grad=True)
    out = adaptive_max_pool(x, (2, 3))
    assert out.shape == (0, 4, 2, 3)
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_gradcheck():
    torch.manual_seed(4)
    assert torch.autograd.gradcheck(
        lambda x: adaptive_max_pool(x, (2, 3)), [rand(1, 2, 5, 7).double().requires_grad_()]
    )


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_opcheck(backend, layout):
    x = lay_out(rand(2, 6, 6, 7), layout)
    torch.library.opcheck(torch.ops.esr.adaptive_max_pool.default, (x, [2, 3]))
    torch.library.opcheck(torch.ops.esr.adaptive_max_pool.default, (x.clone().requires_grad_(), [2, 3]))
    for wanted in (True, False):
        grad = rand(2, 6, 2, 3)
        torch.library.opcheck(torch.ops.esr.adaptive_max_pool_backward.default, (grad, x, [wanted]))


def test_compile():
    def quarter(x):
        return adaptive_max_pool(x, (x.shape[2] // 4, x.shape[3] // 4))

    check_compiled(quarter, [(rand(1, 6, *size),) for size in ((17, 19), (18, 25), (33, 41))])


def test_second_derivative_is_refused():
    x = rand(1, 4, 6, 6).requires_grad_()
    (g,) = torch.autograd.grad(adaptive_max_pool(x, (2, 2)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="esr::adaptive_max_pool has no second derivative"):
        g.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"output_size": 3}, TypeError, "output_size: expected two ints, got 3"),
        ({"output_size": (3, 2.0)}, TypeError, r"output_size: expected two ints, got \(3, 2.0\)"),
        ({"output_size": (0, 2)}, ValueError, r"output_size: height and width must be at least 1, got \(0, 2\)"),
        ({"x": torch.zeros(4, 8, 8)}, ValueError, r"x: expected 4 dimensions \[N, C, H, W\], got 3"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        adaptive_max_pool(**{"x": torch.zeros(1, 4, 8, 8), "output_size": (2, 2)} | change)
