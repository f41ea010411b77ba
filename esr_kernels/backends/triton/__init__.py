"""Triton kernels: every operator, forward and backward, for CUDA tensors; in Triton's interpreter for CPU tensors.

Triton is imported by the first call, not with the package.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from ...dispatch import Implementation

MINIMUM_VERSION = (3, 6)
MINIMUM_CAPABILITY = (8, 0)

_MODULES = {
    "conv3x3": "conv3x3",
    "conv3x3_backward": "conv3x3",
    "spab": "spab",
    "spab_backward": "spab",
    "conv3x3_pixel_shuffle": "conv3x3_pixel_shuffle",
    "conv3x3_pixel_shuffle_backward": "conv3x3_pixel_shuffle",
    "conv1x1": "conv1x1",
    "conv1x1_backward": "conv1x1",
    "esa": "esa",
    "esa_backward": "esa",
    "bsconv": "bsconv",
    "bsconv_backward": "bsconv",
    "depthwise_conv": "depthwise_conv",
    "depthwise_conv_backward": "depthwise_conv",
    "layer_norm2d": "layer_norm2d",
    "layer_norm2d_backward": "layer_norm2d",
    "adaptive_max_pool": "adaptive_max_pool",
    "adaptive_max_pool_backward": "adaptive_max_pool",
    "modulate": "modulate",
    "modulate_backward": "modulate",
    "run_plan": "run_plan",
}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


@cache
def call(name: str) -> Callable[..., Any]:
    """The operator's implementation, loaded by its first call."""
    loaded: Callable[..., Any] | None = None

    def run(*args: Any) -> Any:
        nonlocal loaded
        if loaded is None:
            loaded = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return loaded(*args)
        return loaded(*args)

    return run


def _accepts(*args: Any) -> str | None:
    """Sizes whose pixels cannot be counted in 32 bits."""
    first = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
    pixels = first.shape[-1] * first.shape[-2]
    return None if pixels < 2**31 - 2**16 else f"takes images of up to 2^31 - 2^16 pixels, not {pixels}"


def implementations() -> dict[str, Implementation]:
    devices = frozenset({"cpu" if interpreted() else "cuda"})
    return {name: Implementation(call(name), devices=devices, accepts=_accepts, compiles=True) for name in _MODULES}


def probe() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    from importlib.metadata import version

    parts = tuple(int(p) for p in version("triton").split(".")[:2])
    if parts < MINIMUM_VERSION:
        return f"Triton {'.'.join(map(str, MINIMUM_VERSION))} or later is needed, {version('triton')} is installed"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is not None:
        return "only NVIDIA GPUs are supported"
    lowest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if lowest < MINIMUM_CAPABILITY:
        return f"a GPU of compute capability 8.0 or later is needed, this one has {lowest[0]}.{lowest[1]}"
    return None
