"""Files that are written completely or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def temporary_name(path: Path) -> Path:
    """A new name in the same folder; short, as the file's own may have the longest allowed."""
    return path.with_name(f".esr-{os.getpid()}-{secrets.token_hex(4)}.part")


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under another name, then give it its own: readers see the old file or the whole new one.

    Raises:
        OSError: of the file.
    """
    temporary = temporary_name(path)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
