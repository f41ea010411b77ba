"""Argument types that `verify` and `bench` share: what they refuse, they refuse before anything runs."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

from .. import cases
from ..dispatch import list_backends

ALL = "all"


def _known(kind: str, name: str, names: Sequence[str]) -> str:
    try:
        return cases.known(kind, name, names)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def model_name(text: str) -> str:
    return _known("model", text, [*cases.model_names(), ALL])


def operator_name(text: str) -> str:
    return _known("operator", text, [*cases.OPERATORS, ALL])


def backend_name(text: str) -> str:
    return _known("backend", text, [backend.name for backend in list_backends()])


def dtype_name(text: str) -> str:
    return _known("dtype", text, list(cases.DTYPES))


def expand(names: Sequence[str], every: Sequence[str]) -> list[str]:
    """The names without repetition, "all" replaced by every one."""
    return list(dict.fromkeys(n for name in names for n in (every if name == ALL else [name])))


def size(text: str) -> tuple[int, int]:
    """ "HxW" -> (H, W)."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH in pixels such as 256x256, got {text!r}")
    return int(match[1]), int(match[2])


def positive(text: str) -> int:
    if re.fullmatch(r"[1-9]\d*", text) is None:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds above 0, got {text!r}")
    return value


def json_file(text: str) -> Path:
    """A file that can be written later: better to hear now that it cannot."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file, {text!r} is a folder")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"folder {str(path.parent)!r} is not writable")
    return path


def weights_file(text: str) -> Path:
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return path
