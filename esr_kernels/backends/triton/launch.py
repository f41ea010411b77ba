"""Compiling and launching kernels with little work per call.

Triton's own launch inspects every argument of every call. Here a `Kernel` fixes the compile-time arguments once; its
variants differ only in the device and in whether all pointers are aligned to 16 bytes. Neither height nor width nor
any stride is specialised: an image of another size compiles nothing.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from . import configs, interpreted
from .maps import precision
from .recording import Recording, current, record

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
}


class Kernel:
    """A Triton function with its compile-time arguments.

    Args:
        function: a `triton.jit` function whose compile-time arguments come last. Integers become 32-bit arguments,
            those whose name ends in `batch` or `size` 64-bit ones, tensors pointers and None a compile-time None.
        constants: the compile-time arguments by name, in the function's order.
        num_warps: of the launch.
        registers: that a thread may have, 0: as many as the assembler chooses.
    """

    def __init__(self, function: Any, constants: dict[str, Any], num_warps: int, registers: int = 0) -> None:
        names = list(function.arg_names)
        self.function = function
        self.runtime = tuple(names[: len(names) - len(constants)])
        assert names[len(self.runtime) :] == list(constants), "compile-time arguments differ from the function's"
        self.constants = tuple(constants.values())
        self.num_warps = num_warps
        self.registers = registers
        self.interpreted = not isinstance(function, JITFunction)
        self._variants: dict[tuple[int, bool], Any] = {}

    def __call__(self, grid: tuple[int, int], *args: Any) -> None:
        """Launch on the current stream; every tensor must be on the current device."""
        if self.interpreted:
            self.function[grid[0], grid[1], 1](*args, *self.constants)
            return
        bits = 0
        values = []
        for a in args:
            if isinstance(a, Tensor):
                pointer = a.data_ptr()
                bits |= pointer
                values.append(pointer)
            else:
                values.append(a)
        device = torch.cuda.current_device()
        key = (device, bits & 15 == 0)
        variant = self._variants.get(key)
        if variant is None:
            variant = self._variants[key] = self._load(device, args, key[1])
        values += self.constants
        recording = current()
        if recording is not None:
            pointers = tuple(i for i, a in enumerate(args) if isinstance(a, Tensor))
            recording.launches.append((variant, grid, values, pointers))
        run, function, metadata = variant
        stream = torch._C._cuda_getCurrentRawStream(device)
        run(grid[0], grid[1], 1, stream, function, metadata, None, None, None, *values)

    def source(self, args: Sequence[Any], aligned: bool = True) -> ASTSource:
        """What is compiled for these runtime arguments; tensors may be on any device."""
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes = {}
        for i, (name, a) in enumerate(zip(self.runtime, args, strict=True)):
            if a is None:
                signature[name], constants[name] = "constexpr", None
            elif isinstance(a, Tensor):
                signature[name] = _TYPES[a.dtype]
                if aligned:
                    attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(a, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i64" if name.endswith(("batch", "size")) else "i32"
        for name, value in zip(self.function.arg_names[len(self.runtime) :], self.constants, strict=True):
            signature[name], constants[name] = "constexpr", value
        return ASTSource(fn=self.function, signature=signature, constexprs=constants, attrs=attributes)

    def compile(self, target: GPUTarget, args: Sequence[Any], aligned: bool = True) -> Any:
        """The kernel compiled for a GPU that need not be here."""
        options = {"num_warps": self.num_warps} | ({"maxnreg": self.registers} if self.registers else {})
        return triton.compile(self.source(args, aligned), target=target, options=options)

    def _load(self, device: int, args: Sequence[Any], aligned: bool) -> tuple[Any, Any, Any]:
        major, minor = torch.cuda.get_device_capability(device)
        compiled = self.compile(GPUTarget("cuda", 10 * major + minor, 32), args, aligned)
        run = compiled.run  # loads the binary into the current device
        return run, compiled.function, compiled.packed_metadata


class Program:
    """A recorded run, repeated with other tensors and new memory at hardly more than the cost of its launches.

    Args:
        recording: of a run that is over.
        tensors: what the caller gave to the run; later ones must have the same sizes, strides and alignment.
        constants: what stays where it is from run to run.

    Raises:
        ValueError: a launch got a pointer to something else, a copy for example, or two tensors overlap.
    """

    _ALIGNMENT = 256

    def __init__(self, recording: Recording, tensors: Sequence[Tensor], constants: Sequence[Tensor]) -> None:
        self.size = 0
        # Where memory begins and ends, the tensor that stands for it later (0: new memory), and its offset there.
        regions: list[tuple[int, int, int, int]] = []
        for memory in recording.memory:
            regions.append((*_range(memory), 0, self.size))
            self.size += ceil_div(memory.nbytes, self._ALIGNMENT) * self._ALIGNMENT
        regions += [(*_range(t), i + 1, 0) for i, t in enumerate(tensors)]
        fixed = [_range(t) for t in constants]
        self.steps = []
        for (run, function, metadata), grid, values, pointers in recording.launches:
            moving = []
            for i in pointers:
                found = [r for r in regions if r[0] <= values[i] < r[1]]
                if len(found) == 1:
                    start, _, tensor, offset = found[0]
                    moving.append((i, tensor, values[i] - start + offset))
                elif found or not any(start <= values[i] < end for start, end in fixed):
                    raise ValueError("a launch reads memory that may lie elsewhere in the next run")
            self.steps.append((run, grid, function, metadata, values, moving))

    def run(self, tensors: Sequence[Tensor]) -> None:
        """Launch everything on the current stream."""
        memory = tensors[0].new_empty(self.size, dtype=torch.uint8)
        bases = [memory.data_ptr(), *(t.data_ptr() for t in tensors)]
        stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
        for run, grid, function, metadata, template, moving in self.steps:
            values = template.copy()
            for i, tensor, offset in moving:
                values[i] = bases[tensor] + offset
            run(grid[0], grid[1], 1, stream, function, metadata, None, None, None, *values)


# Calls whose launches an operator keeps, by what they depend on.
_PROGRAMS = 256


def repeated(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Record an operator's launches, and repeat them for calls that differ in nothing but the tensors' addresses.

    The operator returns new tensors, one or a tuple, and does all its work in launches: a PyTorch kernel inside would
    be missing from the recording. (One that copies an argument is noticed, and then nothing is recorded.)
    """
    programs: OrderedDict[tuple[Any, ...], tuple[Program, list[tuple[Any, ...]], bool]] = OrderedDict()

    @functools.wraps(operator)
    def call(*args: Any) -> Any:
        if interpreted():
            return operator(*args)
        tensors: list[Tensor] = []
        key: list[Any] = [torch.cuda.current_device(), precision(torch.float32), configs.choice()]
        for a in args:
            for t in a if isinstance(a, list) else (a,):
                if isinstance(t, Tensor):
                    tensors.append(t)
                    key += (t.shape, t.stride(), t.dtype, t.data_ptr() & 15)
                else:
                    key.append(t)
        found = programs.get(tuple(key))
        if found is not None:
            program, outputs, single = found
            device, dtype = tensors[0].device, tensors[0].dtype
            results = [torch.empty_strided(*spec, dtype=dtype, device=device) for spec in outputs]
            program.run([*tensors, *results])
            return results[0] if single else tuple(results)
        with record() as recording:
            result = operator(*args)
        results = [result] if isinstance(result, Tensor) else list(result)
        with contextlib.suppress(ValueError):
            program = Program(recording, [*tensors, *results], [])
            specs = [(t.shape, t.stride()) for t in results]
            programs[tuple(key)] = program, specs, isinstance(result, Tensor)
            while len(programs) > _PROGRAMS:
                programs.popitem(last=False)
        return result

    return call


def _range(t: Tensor) -> tuple[int, int]:
    """First and one past the last byte."""
    start = t.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return start, start + (last + 1) * t.element_size() if t.numel() else start


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
