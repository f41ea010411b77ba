"""The compiled backends: operators and plans handed to the library built from csrc/."""

from __future__ import annotations

import torch

from ... import native
from ...dispatch import Implementation
from . import cpu, cuda

MINIMUM_CAPABILITY = (8, 0)


def cpu_implementations() -> dict[str, Implementation]:
    return {
        name: Implementation(f, devices=frozenset({"cpu"}), reserve=cpu.reserve if name == "run_plan" else None)
        for name, f in cpu.OPERATORS.items()
    }


def cuda_implementations() -> dict[str, Implementation]:
    devices = frozenset({"cpu" if native.emulated() else "cuda"})
    return {name: Implementation(f, devices=devices) for name, f in cuda.OPERATORS.items()}


def probe_cpu() -> str | None:
    """Why the compiled CPU operators cannot run here, or None."""
    return native.load()


def probe_cuda() -> str | None:
    """Why the compiled CUDA operators cannot run here, or None."""
    if native.emulated():
        return native.load_emulator()
    reason = native.load()
    if reason is not None:
        return reason
    if not native.build_info()["features"]["cuda"]:
        return "the native library was compiled without CUDA: run `make build` where nvcc is"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is not None:
        return "only NVIDIA GPUs are supported"
    lowest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if lowest < MINIMUM_CAPABILITY:
        return f"a GPU of compute capability 8.0 or later is needed, this one has {lowest[0]}.{lowest[1]}"
    return None
