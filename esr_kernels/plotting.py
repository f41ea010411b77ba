"""Figures in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .files import atomically


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure, .svg, .png or .pdf; two drawings of the same figures are the same file."""
    import matplotlib

    kind = path.suffix.lstrip(".")
    # Neither the time of day nor random names of the parts.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with matplotlib.rc_context({"svg.hashsalt": "esr_kernels"}):
        atomically(path, lambda part: figure.savefig(part, format=kind, metadata=metadata))
