"""The compiled parts: where the operator library is, whether it loads, and what it was built with.

Nothing here raises because of a missing, stale or broken library: the reason comes back as text. A stale or broken one
is warned of as well, once per process.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
import warnings
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

# What the Python side and the library agree on: operator schemas and the plan encoding. Raised with either of them.
INTERFACE = 9

_LIBRARY = "_esr_native.so"
_EMULATOR = "_esr_emulator.so"
_STAMP = b"esr_kernels build information: "
_REBUILD = "run `make build`, or install esr_kernels again"


def library_path() -> Path | None:
    """The compiled operator library beside this file, or None when nothing was compiled."""
    path = Path(__file__).with_name(_LIBRARY)
    return path if path.is_file() else None


def read_stamp(path: Path) -> dict[str, Any] | None:
    """What `setup.py` wrote into a library, read without loading it; None when the file carries no stamp.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        try:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file
            return None
        with view:
            start = view.find(_STAMP)
            end = view.find(b"\0", start)
            if start < 0 or end < 0:
                return None
            try:
                stamp = json.loads(view[start + len(_STAMP) : end])
            except ValueError:
                return None
    return stamp if isinstance(stamp, dict) else None


def why_stale(stamp: dict[str, Any] | None, version: str) -> str | None:
    """Why a library with this stamp does not belong to `version` of the package, or None when it does."""
    if stamp is None:
        return f"the compiled library carries no build information: {_REBUILD}"
    if stamp.get("version") != version:
        return f"the compiled library was built for version {stamp.get('version')}, this is {version}: {_REBUILD}"
    if stamp.get("interface") != INTERFACE:
        return (
            f"the compiled library was built for interface {stamp.get('interface')}, "
            f"this version needs {INTERFACE}: {_REBUILD}"
        )
    return None


@lru_cache(maxsize=1)
def load() -> str | None:
    """Loads the operator library into PyTorch, once per process.

    Returns:
        None when `torch.ops.esr_native` can be used, else the reason it cannot.

    Warns:
        RuntimeWarning: there is a library that cannot be used.
    """
    path = library_path()
    if path is None:
        return f"the native library is not compiled: {_REBUILD} where a C++ compiler is"
    reason = _load(path)
    if reason is not None:
        warnings.warn(f"esr_kernels runs without its compiled kernels: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def _load(path: Path) -> str | None:
    """Loads the library `path` into PyTorch; the reason when it cannot be used."""
    from . import __version__

    try:
        reason = why_stale(read_stamp(path), __version__)
        if reason is not None:
            return reason
        import torch

        torch.ops.load_library(str(path))
    except (OSError, RuntimeError, ImportError) as error:
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        return f"the compiled library does not load: {first_line}"
    return None


def emulated() -> bool:
    """Whether the CUDA kernels run in the emulator, on CPU tensors (ESR_KERNELS_CUDA_EMULATOR=1)."""
    return os.environ.get("ESR_KERNELS_CUDA_EMULATOR", "") == "1"


@lru_cache(maxsize=1)
def load_emulator() -> str | None:
    """Loads the CUDA kernels compiled for the emulator, once per process.

    Returns:
        None when `torch.ops.esr_emulator` can be used, else the reason it cannot.
    """
    path = Path(__file__).with_name(_EMULATOR)
    if not path.is_file():
        return "the emulator is not compiled: run `make build ESR_KERNELS_EMULATOR=1`"
    import torch

    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"the emulator does not load: {next(iter(str(error).splitlines()), type(error).__name__)}"
    return None


def _stamp() -> dict[str, Any] | None:
    """The stamp of the library that is here, None without one."""
    path = library_path()
    try:
        return None if path is None else read_stamp(path)
    except OSError:
        return None


def _build_module(stamp: dict[str, Any]) -> ModuleType | None:
    """The module `_build_info`, None unless it was compiled for this Python by the build with this stamp."""
    try:
        module = importlib.import_module("._build_info", __package__)
    except ImportError:
        return None
    return module if json.loads(module.stamp().removeprefix(_STAMP.decode())) == stamp else None


@lru_cache(maxsize=1)
def build_info() -> dict[str, Any]:
    """What the compiled library was built with; empty when nothing is compiled.

    Returns:
        version (str), interface (int), compiler (str), flags (list[str]), torch (str: the version compiled against),
        cuda (str | None: toolkit version), cuda_architectures (list[str], such as "8.0", "9.0+PTX"), git_commit
        (str | None; "-dirty" when the sources differed from it), simd (list[str]), platform (str), features
        (dict[str, bool]). With the module `_build_info` compiled for this Python also cxx_standard (int),
        compiler_macro, python, pybind11 and torch_headers (str), which the compiler itself tells.
    """
    stamp = _stamp()
    if stamp is None:
        return {}
    module = _build_module(stamp)
    return stamp if module is None else {**stamp, **module.facts()}


def compiled_kernels() -> list[dict[str, Any]]:
    """The CUDA kernels of the library with what nvcc told of them; empty without CUDA or the module `_build_info`."""
    stamp = _stamp()
    module = None if stamp is None else _build_module(stamp)
    return module.kernels() if module is not None and hasattr(module, "kernels") else []


def kernel_info() -> list[dict[str, Any]]:
    """What every CUDA kernel needs on every architecture that was compiled, without a GPU.

    Returns:
        A dict for each kernel and architecture; empty without CUDA or the module `_build_info`. kernel (str, such as
        `convolution_kernel<Float16, 4, forward>`), architecture (str, such as "8.6"), registers, spilled_bytes,
        stack_bytes, static_shared_bytes, minimum_blocks (int), threads (int | None: the bound of a launch),
        dynamic_shared_bytes (int | None) of the launch in the layer named by `layer` (str | None: no typical layer
        launches it, or the library does not load), blocks_per_multiprocessor (int | None) and occupancy (float | None:
        the resident warps by those that there could be).
    """
    kernels = compiled_kernels()
    if not kernels:
        return []
    from .backends.native import resources

    return resources.kernel_info(kernels)
