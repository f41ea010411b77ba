"""Checks of registered backward operators against the reference in float64, for whichever backend is chosen."""

from __future__ import annotations

import torch
from helpers import LAYOUTS, kernel, largest_error, lay_out, rand, to
from torch.nn import functional as F

from esr_kernels.backends import reference

EPILOGUES = [
    (a, m)
    for a in ("none", "relu", "leaky_relu", "silu", "gelu", "gelu_tanh")
    for m in (None, "pre", "post", "attention")
    if m != "attention" or a == "none"
]

# A case of every backward operator, by the names that tests give them.
ONE_OF_EACH = [
    "conv3x3 pre",
    "spab",
    "conv3x3_pixel_shuffle",
    "conv1x1",
    "conv1x1 residual",
    "esa",
    "bsconv zeros",
    "bsconv residual",
    "depthwise_conv gated",
    "layer_norm2d",
    "adaptive_max_pool",
    "modulate",
    "modulate bilinear",
]


def backward(case, arguments):
    return getattr(torch.ops.esr, case.split()[0] + "_backward")(*arguments)


def check(case, arguments, tolerance, exact=None):
    got = backward(case, arguments)
    if exact is None:
        exact = reference.OPERATORS[case.split()[0] + "_backward"](*to(arguments, torch.float64))
    for i, (g, e) in enumerate(zip(got, exact, strict=True)):
        assert g.shape == e.shape
        if e.numel():
            error = largest_error(g, e) / max(float(e.abs().max()), 1e-30)
            assert error <= tolerance, f"gradient {i}: relative error {error:.2e}"
    return got


def twice_pytorch(call, tensors, grad, arguments, operator):
    """Half types: at most twice as far off as PyTorch's own gradients in that type."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    plain = torch.autograd.grad(call(*leaves), leaves, grad)
    got = getattr(torch.ops.esr, operator)(*arguments)
    exact = reference.OPERATORS[operator](*to(arguments, torch.float64))
    for g, p, e in zip(got, plain, exact, strict=True):
        largest = float(e.abs().max())
        assert largest_error(g, e) <= max(2 * largest_error(p, e), torch.finfo(g.dtype).eps / 2 * largest)


def check_half_type(dtype):
    """Convolutions with activation and residual in a half type, over the channels of real networks."""
    for channels, out in ((3, 28), (28, 28), (46, 48), (84, 5)):
        x, grad = (lay_out(rand(2, c, 13, 21, dtype=dtype), LAYOUTS[out % 2]) for c in (channels, out))
        tensors = (x, kernel(out, channels, dtype=dtype), rand(out, dtype=dtype), grad * 2)
        twice_pytorch(
            lambda x, w, b, r: F.silu(F.conv2d(x, w, b, padding=1) + r),
            tensors, grad, (grad, *tensors, "silu", 0.0, "pre", [True] * 4), "conv3x3_backward",
        )  # fmt: skip
        weight = kernel(out, channels, 1, dtype=dtype)
        twice_pytorch(
            lambda x, w, b: F.gelu(F.conv2d(x, w, b)),
            (x, weight, tensors[2]), grad, (grad, [x], weight, tensors[2], "gelu", 0.0, [True] * 3), "conv1x1_backward",
        )  # fmt: skip
        twice_pytorch(
            lambda x, w, b, r: F.silu(F.conv2d(x, w, b) + r), (x, weight, *tensors[2:]), grad,
            (grad, [x], weight, tensors[2], "silu", 0.0, [True] * 4, tensors[3]), "conv1x1_backward",
        )  # fmt: skip
