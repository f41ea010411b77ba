"""What the CUDA kernels need of a GPU, without one: `esr-kernels info --kernels`.

Registers and spills were written down when nvcc compiled the kernels (csrc/nvcc_resources.py). Shared memory and blocks
are chosen at launch: in a `rehearsal` operators list their launches for a GPU that is described, and start none.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ... import native
from ...errors import BackendError
from ...plan import PlanBuilder
from . import backward, direct, operators
from .engine import encode

_REGISTERS = 65536  # of a multiprocessor
_RESERVED = 1024  # shared memory that the runtime takes of every block


@dataclass(frozen=True)
class Limits:
    """A multiprocessor of an architecture, and how many of them its largest usual GPU has.

    Attributes:
        warps, blocks: that are resident at once.
        shared_bytes: of one block, at most.
        shared_bytes_in_all: of all resident blocks.
        multiprocessors: of the GPU.
    """

    warps: int
    blocks: int
    shared_bytes: int
    shared_bytes_in_all: int
    multiprocessors: int

    def resident(self, registers: int, threads: int, shared_bytes: int) -> int:
        """How many blocks of a kernel are on a multiprocessor at once."""
        warps = -(-threads // 32)
        # Registers are given out to whole warps in units of 256, and to the four parts of a multiprocessor alike.
        by_registers = _REGISTERS // (-(-registers // 8) * 8 * 32) // 4 * 4 // warps
        by_shared = self.shared_bytes_in_all // (-(-(shared_bytes + _RESERVED) // 128) * 128)
        return min(by_registers, by_shared, self.blocks, self.warps // warps)


LIMITS = {
    "8.0": Limits(64, 32, 163 << 10, 164 << 10, 108),
    "8.6": Limits(48, 16, 99 << 10, 100 << 10, 84),
    "8.7": Limits(48, 16, 163 << 10, 164 << 10, 16),
    "8.9": Limits(48, 24, 99 << 10, 100 << 10, 128),
    "9.0": Limits(64, 32, 227 << 10, 228 << 10, 132),
    "10.0": Limits(64, 32, 227 << 10, 228 << 10, 148),
    "10.3": Limits(64, 32, 227 << 10, 228 << 10, 148),
    "12.0": Limits(48, 24, 99 << 10, 100 << 10, 170),
    "12.1": Limits(48, 24, 99 << 10, 100 << 10, 48),
}


def limits(architecture: str) -> Limits | None:
    """Of an architecture such as "9.0" or "9.0a", None where they are not known."""
    return LIMITS.get(architecture.rstrip("af"))


# --- names ------------------------------------------------------------------------------------------------------------

_VARIANTS = ("forward", "backward", "tail", "half_sums")  # csrc/cuda/convolution.h
_TYPES = {"__half": "float16", "__nv_bfloat16": "bfloat16"}
# What a kernel's first template argument is: a precision, or the type of values in memory.
_PRECISIONS = {
    "float16": ("Float16", "float16"),
    "bfloat16": ("BFloat16", "bfloat16"),
    "tf32": ("Tf32", "float"),
    "tf32x3": ("Tf32x3", "float"),
}
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "tf32x3": torch.float32}


def readable(name: str) -> str:
    """`convolution_kernel<Float16, 4, forward>` of a demangled name."""
    name = re.sub(r"\(anonymous namespace\)::|\b[a-z]\w*::", "", name)
    match = re.fullmatch(r"(?:void )?(.*)\([^()]*\)", name)
    name = match[1] if match else name
    name = re.sub(r"\(Variant\)(\d)", lambda m: dict(enumerate(_VARIANTS)).get(int(m[1]), m[0]), name)
    return re.sub("|".join(_TYPES), lambda m: _TYPES[m[0]], name)


# --- launches ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """What a rehearsal tells of one launch (csrc/cuda/launch.h)."""

    name: str
    instance: int
    threads: int
    rows: int
    blocks: int
    shared_bytes: int

    def is_of(self, kernel: str, precision: str) -> bool:
        """Whether this is a launch of the kernel with that readable name."""
        base, _, arguments = kernel.partition("<")
        name, variant = self.name, "forward"
        for other in _VARIANTS[1:]:
            if name.endswith(f"_{other}"):
                name, variant = name.removesuffix(f"_{other}"), other
        name = name.removesuffix(f"_{precision}")
        if f"{name}_kernel" != base and (name, base) not in _OTHER_NAMES:
            return False
        for argument in filter(None, arguments.removesuffix(">").split(", ")):
            if argument in ("true", "false"):
                fits = self.instance == (argument == "true")
            elif argument.isdecimal():
                fits = self.instance == int(argument)
            elif argument in _VARIANTS:
                fits = variant == argument
            else:
                fits = argument in _PRECISIONS[precision]
            if not fits:
                return False
        return True


_OTHER_NAMES = {("esa_gate", "gate_kernel"), ("esa_low", "low_kernel"), ("weight_gradient_sum", "sum_kernel")}


@contextmanager
def rehearsal(architecture: str) -> Iterator[list[Launch]]:
    """Inside, calls of the library's CUDA operators start nothing; the list is filled at the end.

    Raises:
        ValueError: nothing is known of the architecture.
        BackendError: the library cannot be loaded, or was compiled without CUDA.
    """
    gpu = limits(architecture)
    if gpu is None:
        raise ValueError(f"nothing is known of architecture {architecture!r}, only of {', '.join(LIMITS)}")
    reason = native.load()
    if reason is not None:
        raise BackendError(reason)
    library = torch.ops.esr_native_cuda
    if not hasattr(library, "begin_rehearsal"):
        raise BackendError("the library was compiled without CUDA")
    capability = int(architecture.rstrip("af").replace(".", ""))
    library.begin_rehearsal(capability, gpu.multiprocessors, gpu.shared_bytes, gpu.shared_bytes_in_all)
    launches: list[Launch] = []
    text = ""
    try:
        yield launches
    finally:
        text = library.end_rehearsal()
        for line in text.splitlines():
            name, *numbers = line.split()
            launches.append(Launch(name, *map(int, numbers)))


def _run(call: operators.Call, precision: str, network: bool = False) -> None:
    """An operator, without the caches of `cuda`: what they hold is for the GPU that is there."""
    library = torch.ops.esr_native_cuda
    program, constants = encode(call.plan)
    channels = [x.shape[1] for x in call.inputs]
    multiply = list(_PRECISIONS).index(precision)
    handle = library.compile_plan(program, constants, call.weights, channels, multiply, network)
    try:
        library.run_plan(handle, call.weights, call.inputs, call.outputs)
    finally:
        library.release_plan(handle)


@contextmanager
def _switched_on(variable: str) -> Iterator[None]:
    """A way of computing that is off by default (csrc/cuda/switches.h)."""
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _call(function: Callable[..., Any], precision: str, *args: Any) -> None:
    """An operator without a plan, or gradients."""

    def call(name: str, x: Tensor, arguments: tuple[Any, ...], results: list[Tensor]) -> None:
        getattr(torch.ops.esr_native_cuda, name)(*arguments, list(_PRECISIONS).index(precision), results)

    function(call, *args)


# --- layers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """Something to launch: `run` takes its name in `_PRECISIONS` and a function that makes a tensor of some size."""

    name: str
    run: Callable[[str, Callable[..., Tensor]], None]


def _conv3x3(channels: int, out: int, size: int = 256) -> Layer:
    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        x = tensor(1, channels, size, size)
        _run(operators.conv3x3(x, tensor(out, channels, 3, 3), tensor(out), None, "silu", 0.0, "pre"), precision)

    return Layer(f"conv3x3 {channels}→{out}", run)


def _conv3x3_backward(channels: int, out: int, size: int = 256) -> Layer:
    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        x, weight, grad = tensor(1, channels, size, size), tensor(out, channels, 3, 3), tensor(1, out, size, size)
        arguments = (grad, x, weight, tensor(out), None, "silu", 0.0, "pre", [True, True, True, False])
        _call(backward.conv3x3_backward, precision, *arguments)

    return Layer(f"gradients of conv3x3 {channels}→{out}", run)


def _tail(channels: int, out: int, size: int = 256) -> Layer:
    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        x = tensor(1, channels, size, size)
        weights = [tensor(out, channels, 3, 3), tensor(out), tensor(out, out, 1, 1), tensor(out)]
        plan = PlanBuilder()
        common = {"activation": "none", "negative_slope": 0.0}
        names = [{"weight": f"w{i}", "bias": f"b{i}"} for i in range(2)]
        y = plan.add("conv3x3", [plan.input(channels)], out, names[0], **common, residual_mode="pre")
        y = plan.add("conv1x1", [y], out, names[1], **common)
        result = tensor(1, out, size, size)
        _run(operators.Call(plan.finish([y]), weights, [x], [result], result), precision)

    return Layer(f"conv3x3 {channels}→{out}, conv1x1", run)


def _shuffle(channels: int, out: int, scale: int, size: int = 256) -> Layer:
    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        x, weight = tensor(1, channels, size, size), tensor(out, channels, 3, 3)
        _run(operators.conv3x3_pixel_shuffle(x, weight, tensor(out), None, scale), precision)

    return Layer(f"conv3x3 {channels}→{out}, shuffle", run)


def _conv1x1(channels: Sequence[int], out: int, size: int = 256) -> Layer:
    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        xs = [tensor(1, c, size, size) for c in channels]
        weight = tensor(out, sum(channels), 1, 1)
        _run(operators.conv1x1(xs, weight, tensor(out), "none", 0.0), precision)

    return Layer(f"conv1x1 {'+'.join(map(str, channels))}→{out}", run)


def _half_sums(channels: int, size: int = 256) -> Layer:
    plain = _conv3x3(channels, channels, size)

    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        with _switched_on("ESR_KERNELS_CUDA_HALF_SUMS"):
            plain.run(precision, tensor)

    return Layer(f"{plain.name}, half sums", run)


def _spab(channels: int, size: int = 256) -> Layer:
    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        x, weight, bias = tensor(1, channels, size, size), tensor(channels, channels, 3, 3), tensor(channels)
        with _switched_on("ESR_KERNELS_CUDA_SPAB"):
            _run(operators.spab(x, weight, bias, weight, bias, weight, bias, True), precision)

    return Layer(f"spab {channels} {size}x{size}, one launch", run)


def _chain(channels: int, size: int = 256) -> Layer:
    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        x, weights = tensor(1, channels, size, size), [tensor(channels, channels, 3, 3) for _ in range(2)]
        plan = PlanBuilder()
        common = {"activation": "silu", "negative_slope": 0.0, "residual_mode": "post"}
        y = plan.add("conv3x3", [plan.input(channels)], channels, {"weight": "w0"}, **common)
        y = plan.add("conv3x3", [y], channels, {"weight": "w1"}, **common)
        result = torch.empty_like(x)
        with _switched_on("ESR_KERNELS_CUDA_PERSISTENT"):
            _run(operators.Call(plan.finish([y]), weights, [x], [result], result), precision)

    return Layer(f"chain of conv3x3 {channels}→{channels}, {size}x{size}", run)


def _winograd(channels: int, out: int, size: int = 256) -> Layer:
    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        x, weight, bias = tensor(1, channels, size, size), tensor(out, channels, 3, 3), tensor(out)
        with _switched_on("ESR_KERNELS_CUDA_WINOGRAD"):
            _run(operators.conv3x3(x, weight, bias, None, "silu", 0.0, "pre"), precision, network=True)

    return Layer(f"conv3x3 {channels}→{out}, Winograd", run)


def _wgmma(plain: Layer) -> Layer:
    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        with _switched_on("ESR_KERNELS_CUDA_WGMMA"):
            plain.run(precision, tensor)

    return Layer(f"{plain.name}, wgmma", run)


def _esa_weights(channels: int, hidden: int, tensor: Callable[..., Tensor]) -> list[Tensor | None]:
    sizes = [(hidden, channels, 1, 1), (hidden, hidden, 3, 3), (hidden, hidden, 3, 3), (channels, hidden, 1, 1)]
    sizes.append((hidden, hidden, 1, 1))
    return [t for size in sizes for t in (tensor(*size), tensor(size[0]))] + [None] * 4


def _esa(channels: int, hidden: int, size: int = 256) -> Layer:
    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        weights = _esa_weights(channels, hidden, tensor)
        _run(operators.esa(tensor(1, channels, size, size), *weights), precision)

    return Layer(f"esa {channels}, {hidden}", run)


def _esa_backward(channels: int, hidden: int, size: int = 256) -> Layer:
    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        x, weights = tensor(1, channels, size, size), _esa_weights(channels, hidden, tensor)
        _call(
            backward.esa_backward, precision, torch.empty_like(x), x, *weights, [w is not None for w in [x, *weights]]
        )

    return Layer(f"gradients of esa {channels}, {hidden}", run)


def _depthwise(channels: int, side: int, gated: bool, size: int = 256) -> Layer:
    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        arguments = (tensor(1, channels, size, size), tensor(channels, 1, side, side), tensor(channels))
        _call(direct.depthwise_conv, precision, direct.as_it_is, *arguments, 1, "gelu", 0.0, gated)

    return Layer(f"depthwise_conv {channels}, {side}x{side}{', gated' if gated else ''}", run)


def _depthwise_backward(channels: int, side: int, size: int = 256) -> Layer:
    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        x, weight = tensor(1, channels, size, size), tensor(channels, 1, side, side)
        settings = (1, "none", 0.0, False, [True] * 3)
        _call(
            direct.depthwise_conv_backward,
            precision,
            direct.as_it_is,
            torch.empty_like(x),
            x,
            weight,
            tensor(channels),
            *settings,
        )

    return Layer(f"gradients of depthwise_conv {channels}, {side}x{side}", run)


def _layer_norm(channels: int, size: int = 256) -> Layer:
    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        _call(
            direct.layer_norm2d,
            precision,
            direct.as_it_is,
            tensor(1, channels, size, size),
            tensor(channels),
            tensor(channels),
            1e-6,
        )

    return Layer(f"layer_norm2d {channels}", run)


def _layer_norm_backward(channels: int, size: int = 256) -> Layer:
    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        x, weight, bias = tensor(1, channels, size, size), tensor(channels), tensor(channels)
        _call(
            direct.layer_norm2d_backward,
            precision,
            direct.as_it_is,
            torch.empty_like(x),
            x,
            weight,
            bias,
            1e-6,
            [True] * 3,
        )

    return Layer(f"gradients of layer_norm2d {channels}", run)


def _adaptive_max_pool(channels: int, pooled: int, size: int = 256) -> Layer:
    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        x = tensor(1, channels, size, size)
        _call(direct.adaptive_max_pool, precision, direct.as_it_is, x, (pooled, pooled))

    return Layer(f"adaptive_max_pool {channels}, {size}→{pooled}", run)


def _adaptive_max_pool_backward(channels: int, pooled: int, size: int = 256) -> Layer:
    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        x, grad = tensor(1, channels, size, size), tensor(1, channels, pooled, pooled)
        _call(direct.adaptive_max_pool_backward, precision, direct.as_it_is, grad, x, [True])

    return Layer(f"gradient of adaptive_max_pool {channels}, {size}→{pooled}", run)


def _modulate(channels: int, sizes: Sequence[int], mode: str, size: int = 256) -> Layer:
    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        x, *maps = (tensor(1, channels, s, s) for s in (size, *sizes))
        _call(direct.modulate, precision, direct.as_it_is, x, maps, mode, "gelu", 0.0)

    return Layer(f"modulate {channels}, {mode} {'+'.join(map(str, sizes))}→{size}", run)


def _modulate_backward(channels: int, sizes: Sequence[int], mode: str, size: int = 256) -> Layer:
    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        grad, x, *maps = (tensor(1, channels, s, s) for s in (size, size, *sizes))
        settings = (mode, "gelu", 0.0, [True] * (1 + len(sizes)))
        _call(direct.modulate_backward, precision, direct.as_it_is, grad, x, maps, *settings)

    return Layer(f"gradients of modulate {channels}, {mode} {'+'.join(map(str, sizes))}→{size}", run)


def _statistic(channels: int, kind: str, size: int = 256) -> Layer:
    """With the product that a gate is for: a plan returns no value of one pixel."""

    def run(precision: str, tensor: Callable[..., Tensor]) -> None:
        x = tensor(1, channels, size, size)
        plan = PlanBuilder()
        y = plan.input(channels)
        gate = plan.add("statistic", [y], channels, kind=kind, correction=0)
        y = plan.add("modulate", [y, gate], channels, mode="nearest", activation="none", negative_slope=0.0)
        result = torch.empty_like(x)
        _run(operators.Call(plan.finish([y]), [], [x], [result], result), precision)

    return Layer(f"statistic {channels}, {kind}", run)


# Those of the networks in python_models and of published ones like them.
TYPICAL = (
    _conv3x3(3, 28),
    _conv3x3(28, 28),
    _conv3x3(46, 46),
    _shuffle(46, 48, 4),
    _conv3x3(52, 52),
    _conv3x3(64, 64),
    _conv1x1([28] * 4, 28),
    _esa(46, 16),
    _depthwise(144, 3, True),
    _layer_norm(40),
    _adaptive_max_pool(24, 16),
    _modulate(36, (256, 64, 32, 16), "nearest"),
    _statistic(48, "mean"),
)
# A layer for every instantiation.
_EVERY = (
    *(_conv3x3(8 * n, 8 * n) for n in range(1, 9)),
    *(_tail(c, 8 * n) for n in range(1, 9) for c in (8, 8 * n)),
    *(_half_sums(8 * n) for n in range(1, 9)),
    *(_spab(8 * n, size) for n in range(3, 9) for size in (64, 256)),
    *(_chain(8 * n, size) for n in range(3, 8) for size in (64, 256)),
    *(_winograd(c, out) for out in (8, 16, 32, 48, 64) for c in (16, 32, 64)),
    *(_wgmma(layer(c, 8 * n)) for n in range(1, 9) for c in (8, 32, 8 * n) for layer in (_conv3x3, _tail)),
    *(_esa(48, hidden) for hidden in (16, 32, 48, 64)),
    *(_conv3x3_backward(8 * n, 8 * n) for n in range(1, 9)),
    _esa_backward(46, 16),
    *(_depthwise(64, 7, gated) for gated in (False, True)),
    _depthwise_backward(64, 7),
    _layer_norm_backward(40),
    _adaptive_max_pool_backward(24, 16),
    _modulate_backward(36, (256, 64, 32, 16), "bilinear"),
    *(_statistic(48, kind) for kind in ("contrast", "maximum")),
)


@lru_cache(maxsize=256)
def _rehearsed(layer: Layer, precision: str, architecture: str) -> tuple[Launch, ...]:
    """The launches of a layer at 256x256, one image."""

    def tensor(*size: int) -> Tensor:
        layout = torch.channels_last if len(size) == 4 else torch.contiguous_format
        return torch.empty(size, dtype=_DTYPES[precision], memory_format=layout)

    with rehearsal(architecture) as launches:
        layer.run(precision, tensor)
    return tuple(launches)


# --- reports ----------------------------------------------------------------------------------------------------------


def _with_occupancy(entry: dict[str, Any], threads: int | None, shared_bytes: int) -> dict[str, Any]:
    gpu = limits(entry["architecture"])
    blocks = None
    if gpu is not None and threads is not None and entry["registers"] is not None:
        blocks = gpu.resident(entry["registers"], threads, shared_bytes)
    entry["blocks_per_multiprocessor"] = blocks
    entry["occupancy"] = None if gpu is None or blocks is None else blocks * -(-(threads or 0) // 32) / gpu.warps
    return entry


def kernel_info(compiled: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The list of `native.kernel_info`, from what the module `_build_info` tells."""
    entries = []
    for architecture in _architectures(compiled):
        kernels = {readable(k["name"]): k for k in compiled if k["architecture"] == architecture}
        launches = _most_demanding(tuple(kernels), architecture)
        for name, kernel in kernels.items():
            layer, launch = launches.get(name, (None, None))
            dynamic = None if launch is None else launch.shared_bytes
            entry = {
                "kernel": name,
                "architecture": architecture,
                **{k: kernel[k] for k in ("registers", "spilled_bytes", "stack_bytes", "static_shared_bytes")},
                "dynamic_shared_bytes": dynamic,
                "layer": layer,
                "threads": kernel["threads"],
                "minimum_blocks": kernel["minimum_blocks"],
            }
            threads = kernel["threads"] if launch is None else launch.threads
            entries.append(_with_occupancy(entry, threads, kernel["static_shared_bytes"] + (dynamic or 0)))
    return sorted(entries, key=lambda e: e["kernel"])


def _architectures(compiled: Sequence[dict[str, Any]]) -> list[str]:
    return sorted({k["architecture"] for k in compiled}, key=lambda a: (float(a.rstrip("af")), a))


def _most_demanding(kernels: Sequence[str], architecture: str) -> dict[str, tuple[str, Launch]]:
    """Kernel -> the layer whose launch of it takes most shared memory, and the launch.

    Empty where the library does not load, or nothing is known of the architecture.
    """
    found: dict[str, tuple[str, Launch]] = {}
    for layer in (*TYPICAL, *_EVERY):
        for precision in _PRECISIONS:
            try:
                launches = _rehearsed(layer, precision, architecture)
            except (ValueError, BackendError):
                return {}
            for launch in launches:
                kernel = _kernel_of(launch, precision, kernels)
                if kernel is not None:
                    before = found.get(kernel)
                    if before is None or before[1].shared_bytes < launch.shared_bytes:
                        found[kernel] = f"{layer.name} {precision}", launch
    return found


def _kernel_of(launch: Launch, precision: str, kernels: Sequence[str]) -> str | None:
    return next((k for k in kernels if launch.is_of(k, precision)), None)


def layer_info(architectures: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Shared memory and occupancy of every launch of typical layers at 256x256.

    Args:
        architectures: such as "8.6"; None: those that were compiled.

    Returns:
        For every layer, precision, architecture and launch but those that pack weights: layer, precision, architecture,
        kernel (str), threads, blocks, dynamic_shared_bytes, shared_bytes_limit (int), registers and
        blocks_per_multiprocessor (int or None), occupancy (float or None).

    Raises:
        ValueError: nothing is known of an architecture.
        BackendError: the library cannot be loaded, or was compiled without CUDA.
    """
    kernels = native.compiled_kernels()
    if architectures is None:
        # "9.0a" has kernels of its own beside those of "9.0".
        known = _architectures(kernels)
        architectures = [a for a in known if a.rstrip("af") == a or a.rstrip("af") not in known]
    entries = []
    for architecture in architectures:
        registers = {readable(k["name"]): k["registers"] for k in kernels if k["architecture"] == architecture}
        for layer in TYPICAL:
            for precision in _PRECISIONS:
                for launch in _rehearsed(layer, precision, architecture):
                    if launch.name.endswith("pack"):
                        continue
                    kernel = _kernel_of(launch, precision, tuple(registers)) or launch.name
                    gpu = limits(architecture)
                    assert gpu is not None
                    entry = {
                        "layer": layer.name,
                        "precision": precision,
                        "architecture": architecture,
                        "kernel": kernel,
                        "threads": launch.threads,
                        "blocks": launch.blocks * launch.rows,
                        "dynamic_shared_bytes": launch.shared_bytes,
                        "shared_bytes_limit": gpu.shared_bytes,
                        "registers": registers.get(kernel),
                    }
                    entries.append(_with_occupancy(entry, launch.threads, launch.shared_bytes))
    return entries


def _percent(value: Any) -> str:
    return f"{value:.0%}"


def _kibibytes(value: Any) -> str:
    return f"{value / 1024:.1f}".removesuffix(".0")


# Column -> its title, and how a value is written.
_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "kernel": ("kernel", str),
    "layer": ("layer", str),
    "precision": ("precision", str),
    "registers": ("registers", str),
    "spilled_bytes": ("spilled, bytes", str),
    "threads": ("threads", str),
    "blocks": ("blocks", str),
    "dynamic_shared_bytes": ("shared, KiB", _kibibytes),
    "blocks_per_multiprocessor": ("blocks/SM", str),
    "occupancy": ("occupancy", _percent),
}


def markdown(entries: Sequence[dict[str, Any]]) -> str:
    """A table of what `kernel_info` or `layer_info` returns, a row for all architectures.

    Where they differ, a cell has a value for each in their order.
    """
    by_layer = "precision" in entries[0]
    key = ("layer", "precision", "kernel") if by_layer else ("kernel",)
    columns = [*key, *(c for c in _COLUMNS if c not in key and c in entries[0])]
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for entry in entries:
        rows.setdefault(tuple(entry[c] for c in key), []).append(entry)

    def cell(group: list[dict[str, Any]], column: str) -> str:
        texts = ["–" if e[column] is None else _COLUMNS[column][1](e[column]) for e in group]
        return texts[0] if len(set(texts)) == 1 else " / ".join(texts)

    lines = ["| " + " | ".join(_COLUMNS[c][0] for c in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(group, c) for c in columns) + " |" for group in rows.values()]
    return "\n".join(lines)
