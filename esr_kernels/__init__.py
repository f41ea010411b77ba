"""Fused kernels for efficient super-resolution networks.

`esr_kernels.functional` has the operators, the modules below are drop-ins for the blocks of published networks, and
`optimize(model)` turns a whole network into one operator. Works without a compiled library, Triton or a GPU.
"""

from __future__ import annotations

from . import functional
from .dispatch import BackendStatus, list_backends, use_backend
from .errors import BackendError, OptimizeError

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BackendStatus",
    "OptimizeError",
    "__version__",
    "functional",
    "list_backends",
    "use_backend",
]
