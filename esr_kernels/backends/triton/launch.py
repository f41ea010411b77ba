"""Compiling and launching kernels with little work per call.

Triton's own launch inspects every argument of every call. Here a `Kernel` fixes the compile-time arguments once; its
variants differ only in the device and in whether all pointers are aligned to 16 bytes. Neither height nor width nor
any stride is specialised: an image of another size compiles nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

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
            those whose name ends in `batch` 64-bit ones, tensors pointers and None a compile-time None.
        constants: the compile-time arguments by name, in the function's order.
        num_warps: of the launch.
    """

    def __init__(self, function: Any, constants: dict[str, Any], num_warps: int) -> None:
        names = list(function.arg_names)
        self.function = function
        self.runtime = tuple(names[: len(names) - len(constants)])
        assert names[len(self.runtime) :] == list(constants), "compile-time arguments differ from the function's"
        self.constants = tuple(constants.values())
        self.num_warps = num_warps
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
        stream = torch._C._cuda_getCurrentRawStream(device)
        run, function, metadata = variant
        run(grid[0], grid[1], 1, stream, function, metadata, None, None, None, *values, *self.constants)

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
                signature[name] = "i64" if name.endswith("batch") else "i32"
        for name, value in zip(self.function.arg_names[len(self.runtime) :], self.constants, strict=True):
            signature[name], constants[name] = "constexpr", value
        return ASTSource(fn=self.function, signature=signature, constexprs=constants, attrs=attributes)

    def compile(self, target: GPUTarget, args: Sequence[Any], aligned: bool = True) -> Any:
        """The kernel compiled for a GPU that need not be here."""
        return triton.compile(self.source(args, aligned), target=target, options={"num_warps": self.num_warps})

    def _load(self, device: int, args: Sequence[Any], aligned: bool) -> tuple[Any, Any, Any]:
        major, minor = torch.cuda.get_device_capability(device)
        compiled = self.compile(GPUTarget("cuda", 10 * major + minor, 32), args, aligned)
        run = compiled.run  # loads the binary into the current device
        return run, compiled.function, compiled.packed_metadata


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
