"""How the operators' tests make inputs, compare results and run the same checks for every operator."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import esr_kernels
import python_models
from esr_kernels.backends.native import cuda
from esr_kernels.cases import OperatorCase

_ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = ("nchw", "channels_last", "permuted", "sliced")
HALF = (torch.float16, torch.bfloat16)
# name: number of the golden file, checkpoint
PUBLISHED = {"span": ("38", "team38_span_ch28_slim.pth"), "rlfn": ("00", "team00_rlfn.pth")}


def backends_with(operator: str) -> list[str]:
    """The backends that can run here and have the operator."""
    return [b.name for b in esr_kernels.list_backends() if operator in b.operators]


def published(name: str, folder: Path, golden: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model with its published weights, and a golden input and output, "A" or "B"."""
    number, file = PUBLISHED[name]
    data = np.load(folder / "golden" / f"team{number}.npz")
    model = python_models.create(name, folder / "weights" / file)
    return model, torch.from_numpy(data[f"input{golden}"]), torch.from_numpy(data[f"output{golden}"])


def _put(queue: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    queue.put(function(*arguments))


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a module's function returns in a process whose heap has no holes from other tests."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_put, args=(queue, function, arguments))
    process.start()
    process.join()
    assert process.exitcode == 0
    return queue.get()


def emulate(capability: int = 86, multiprocessors: int = 3, block: int = 99, whole: int = 100) -> None:
    """What GPU the emulator pretends to be, its own by default; KiB of shared memory of a block and in all."""
    cuda.library().set_properties([capability, multiprocessors, block * 1024, whole * 1024])


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "permuted":
        return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    if layout == "sliced":
        n, c, h, w = x.shape
        big = x.new_full((n + 1, c + 2, h + 3, 2 * w + 1), float("nan"))
        view = big[1:, 1 : 1 + c, 2 : 2 + h, 1 : 1 + 2 * w : 2]
        view.copy_(x)
        return view
    return x.contiguous()


def expected_format(x: Tensor) -> torch.memory_format:
    """channels_last for channels_last tensors and for parts of their channels; an image's own in any batch."""
    image = x[:1]
    if image.is_contiguous() or image.shape[1] == 1 or image.stride(1) != 1:
        return torch.contiguous_format
    to_next_pixel = image.stride(3 if image.shape[3] > 1 else 2)
    return torch.channels_last if to_next_pixel >= image.shape[1] else torch.contiguous_format


def rand(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)


def kernel(out: int, channels: int, size: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight whose convolution keeps the scale of its input."""
    return rand(out, channels, size, size, dtype=dtype, scale=(channels * size * size) ** -0.5)


def to(values: Any, dtype: torch.dtype) -> Any:
    """Tensors, also inside lists and dicts, in another dtype."""
    if isinstance(values, Tensor):
        return values.to(dtype)
    if isinstance(values, dict):
        return {k: to(v, dtype) for k, v in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(to(v, dtype) for v in values)
    return values


def largest_error(actual: Tensor, exact: Tensor) -> float:
    if exact.numel() == 0:
        return 0.0
    error = (actual.double() - exact).abs()
    return float("inf") if not bool(torch.isfinite(error).all()) else float(error.max())


def float32_tolerance(backend: str) -> float:
    """Relative to the largest value: direct kernels 1e-5; the native CPU backend uses Winograd, 1e-4."""
    return 1e-4 if backend == "native-cpu" else 1e-5


def check_close(actual: Tensor, exact: Tensor, plain: Callable[[], Tensor], backend: str) -> None:
    """The numeric contract: `exact` is the float64 result, `plain()` PyTorch's own in the dtype of `actual`."""
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    largest = float(exact.abs().max())
    error = largest_error(actual, exact)
    if actual.dtype == torch.float64:
        assert error <= 1e-12 * largest
    elif actual.dtype == torch.float32:
        assert error <= float32_tolerance(backend) * largest, f"relative error {error / largest:.2e}"
    else:
        # Rounding the largest value alone costs half a unit in its last place.
        unavoidable = torch.finfo(actual.dtype).eps / 2 * largest
        allowed = max(2 * largest_error(plain(), exact), unavoidable)
        assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}"


def check_gradients(
    fused: Callable[..., Any], plain: Callable[..., Any], tensors: Sequence[Tensor], tolerance: float = 1e-4
) -> None:
    """float32 gradients of `fused` against autograd through `plain` in float64, for every tensor."""
    ours = [t.detach().clone().requires_grad_() for t in tensors]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    out, reference = fused(*ours), plain(*exact)
    outs = out if isinstance(out, tuple) else (out,)
    references = reference if isinstance(reference, tuple) else (reference,)
    seeds = [torch.randn_like(r) for r in references]
    got = torch.autograd.grad(outs, ours, [s.float() for s in seeds])
    expected = torch.autograd.grad(references, exact, seeds)
    for g, e, t in zip(got, expected, tensors, strict=True):
        assert g.shape == t.shape and g.dtype == t.dtype
        assert largest_error(g, e) <= tolerance * max(float(e.abs().max()), 1e-6)


def check_compiled(function: Callable[..., Any], inputs: Sequence[tuple[Tensor, ...]]) -> None:
    """Compiles whole and once for all the inputs' sizes, forward and backward, with eager's result."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for tensors in inputs:
        a = [t.detach().clone().requires_grad_() for t in tensors]
        b = [t.detach().clone().requires_grad_() for t in tensors]
        got, expected = compiled(*a), function(*b)
        torch.testing.assert_close(got, expected)
        got.sum().backward()
        expected.sum().backward()
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x.grad, y.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def conv(channels: int, out: int, size: int = 3) -> dict[str, tuple[int, ...]]:
    """Shapes of a convolution's weight and bias."""
    return {"weight": (out, channels, size, size), "bias": (out,)}


# Every operator, small, for checks that cost the same at any size.
OPERATOR_CASES = [
    OperatorCase("conv3x3", "", {"x": 5, "residual": 4}, conv(5, 4), {"activation": "silu", "residual_mode": "pre"}),
    OperatorCase("conv3x3", "attention", {"x": 5, "residual": 5}, conv(5, 5), {"residual_mode": "attention"}),
    OperatorCase("spab", "", {"x": 5}, {k: v for n in "123" for k, v in ((f"w{n}", (5, 5, 3, 3)), (f"b{n}", (5,)))}),
    OperatorCase("conv3x3_pixel_shuffle", "", {"x": 5, "residual": 2}, conv(5, 8), {"upscale_factor": 2}),
    OperatorCase("conv1x1", "", {"xs": (5, 3)}, conv(8, 4, 1), {"activation": "gelu"}),
    OperatorCase(
        "conv1x1",
        "residual",
        {"xs": (5, 3), "residual": 4},
        conv(8, 4, 1),
        {"activation": "silu", "residual_mode": "pre"},
    ),
    OperatorCase(
        "esa",
        "",
        {"x": 5},
        {"w1": (3, 5, 1, 1), "b1": (3,), "w2": (3, 3, 3, 3), "b2": (3,), "w3": (3, 3, 3, 3), "b3": (3,)}
        | {"w4": (5, 3, 1, 1), "b4": (5,), "wf": (3, 3, 1, 1), "bf": (3,)},
    ),
    OperatorCase(
        "bsconv",
        "",
        {"x": 5},
        {"pointwise": (4, 5, 1, 1), "depthwise": (4, 1, 3, 3), "bias": (4,)},
        {"padding_mode": "reflect", "activation": "leaky_relu", "negative_slope": 0.1},
    ),
    OperatorCase(
        "bsconv",
        "relu",
        {"x": 5},
        {"pointwise": (4, 5, 1, 1), "depthwise": (4, 1, 3, 3), "bias": (4,)},
        {"padding_mode": "reflect", "activation": "relu"},
    ),
    OperatorCase(
        "depthwise_conv",
        "gated",
        {"x": 6},
        {"weight": (6, 1, 3, 3), "bias": (6,)},
        {"activation": "gelu", "gated": True},
    ),
    OperatorCase(
        "depthwise_conv",
        "dilated",
        {"x": 4},
        {"weight": (4, 1, 3, 5), "bias": (4,)},
        {"dilation": 2, "activation": "silu", "gated": True},
    ),
    OperatorCase("layer_norm2d", "", {"x": 5}, {"weight": (5,), "bias": (5,)}, {"eps": 1e-6}),
    OperatorCase("adaptive_max_pool", "", {"x": 5}, {}, {"output_size": (2, 3)}),
    OperatorCase("modulate", "", {"x": 5, "maps": (5, 5)}, {}, {"activation": "gelu"}, (1, 2)),
    OperatorCase("modulate", "bilinear", {"x": 5, "maps": (5,)}, {}, {"mode": "bilinear"}, (3,)),
    OperatorCase(
        "selective_scan",
        "",
        {"u": 5, "delta": 5, "b": 3, "c": 3, "z": 5},
        {"a": (5, 3), "d": (5,), "delta_bias": (5,)},
        {"delta_softplus": True},
    ),
    OperatorCase(
        "window_attention",
        "",
        {"q": 6, "k": 6, "v": 6},
        {"bias": (2, 12, 12)},
        {"window": (3, 4), "heads": 2, "shift": (1, 2)},
    ),
]


def environment(threads: int = 1) -> dict[str, str]:
    """Of a process that is alone, uses this checkout and so many threads."""
    found = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return {**found, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(_ROOT)}


def torchrun(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start two processes of one run; their output is one."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )
