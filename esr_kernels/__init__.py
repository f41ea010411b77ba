"""Fused kernels for efficient super-resolution networks.

`esr_kernels.functional` has the operators, the modules below are drop-ins for the blocks of published networks, and
`optimize(model)` turns a whole network into one operator. Works without a compiled library, Triton or a GPU.
"""

from __future__ import annotations

from . import functional
from .dispatch import BackendStatus, list_backends, use_backend
from .errors import BackendError, OptimizeError
from .modules import ESA, RLFB, SPAB, Conv3XC, PixelShuffleUpsampler
from .optimize import OptimizedModel, optimize
from .plan import Plan

__version__ = "0.1.0"

__all__ = [
    "ESA",
    "RLFB",
    "SPAB",
    "BackendError",
    "BackendStatus",
    "Conv3XC",
    "OptimizeError",
    "OptimizedModel",
    "PixelShuffleUpsampler",
    "Plan",
    "__version__",
    "functional",
    "list_backends",
    "optimize",
    "use_backend",
]
