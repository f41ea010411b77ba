"""The compiled parts: where the operator library is, whether it loads, and what it was built with.

Nothing here raises because of a missing, stale or broken library: the reason comes back as text.
"""

from __future__ import annotations

import importlib
import json
import mmap
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

# What the Python side and the library agree on: operator schemas and the plan encoding. Raised with either of them.
INTERFACE = 1

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
    """
    path = library_path()
    if path is None:
        return f"the native library is not compiled: {_REBUILD} where a C++ compiler is"
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
    path = library_path()
    if path is None:
        return {}
    try:
        stamp = read_stamp(path)
    except OSError:
        return {}
    if stamp is None:
        return {}
    try:
        module = importlib.import_module("._build_info", __package__)
    except ImportError:
        return stamp
    # One compiled for this Python by another build says nothing about the library that is here now.
    if json.loads(module.stamp().removeprefix(_STAMP.decode())) != stamp:
        return stamp
    return {**stamp, **module.facts()}
