"""The compiled backend: operators and plans handed to the library built from csrc/."""

from __future__ import annotations

from ... import native
from ...dispatch import Implementation
from . import operators

_CPU = frozenset({"cpu"})
CPU_OPERATORS = {
    f.__name__: Implementation(f, devices=_CPU)
    for f in (
        operators.conv3x3,
        operators.spab,
        operators.conv3x3_pixel_shuffle,
        operators.conv1x1,
        operators.esa,
        operators.bsconv,
        operators.run_plan,
    )
}


def probe_cpu() -> str | None:
    """Why the compiled CPU operators cannot run here, or None."""
    return native.load()


def probe_cuda() -> str | None:
    """Why the compiled CUDA operators cannot run here, or None."""
    return native.load() or "this version of esr_kernels has no CUDA kernels"
