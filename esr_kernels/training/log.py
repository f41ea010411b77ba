"""What a run tells while it goes on: a CSV file, and TensorBoard's files."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..errors import TrainingError
from ..files import atomically
from .data import Pictures
from .evaluate import upscaled
from .resize import bicubic, downscale

if TYPE_CHECKING:
    from typing_extensions import Self

COLUMNS = ("iteration", "stage", "seconds", "loss", "rate", "psnr")
_SHOWN = 256  # pixels a side of a sample picture


class Log:
    """Rows of `COLUMNS` in a CSV file; what does not apply is left empty.

    Args:
        path: the file.
        iteration: rows beyond it, of a part of the run that was lost, are removed.
        active: False: write nothing.
    """

    def __init__(self, path: Path, iteration: int, active: bool = True) -> None:
        self._file = None
        if not active:
            return
        kept = [r for r in read(path) if int(r["iteration"]) <= iteration] if path.exists() else []
        atomically(path, lambda part: _write(part, kept))
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS, restval="")

    def write(self, iteration: int, stage: str, seconds: float, **values: float) -> None:
        """Append a row, at once visible to readers."""
        if self._file is None:
            return
        row = {k: f"{v:.6g}" for k, v in values.items()}
        self._writer.writerow({"iteration": iteration, "stage": stage, "seconds": f"{seconds:.1f}", **row})
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a log."""
    with path.open(newline="", encoding="utf-8") as file:
        # A line that was cut off while it was written has no number.
        return [row for row in csv.DictReader(file) if (row["iteration"] or "").isdecimal()]


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


class Scalars:
    """TensorBoard's files.

    Args:
        folder: for them.
        iteration: what was written beyond it is hidden.
        active: False: write nothing.

    Raises:
        TrainingError: active, and the package is not installed.
    """

    def __init__(self, folder: Path, iteration: int, active: bool = True) -> None:
        self._writer: Any = None
        if not active:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrainingError(
                f"run.tensorboard: needs the package tensorboard (pip install esr-kernels[train]): {error}"
            ) from None
        self._writer = SummaryWriter(os.fspath(folder), purge_step=iteration + 1 if iteration else None)

    def write(self, iteration: int, **values: float) -> None:
        """One point of each curve."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, iteration)

    def pictures(
        self, iteration: int, model: nn.Module, pictures: Pictures, scale: int, device: torch.device, count: int
    ) -> None:
        """The middle of the first `count` pictures: bicubic, the network's and the original side by side."""
        if self._writer is None:
            return
        for index in range(min(count, len(pictures))):
            high = pictures.pixels(index)
            side = min(_SHOWN, *high.shape[:2]) // scale * scale
            top, left = ((length - side) // 2 // scale * scale for length in high.shape[:2])
            part = high[top : top + side, left : left + side]
            low = downscale(part, scale)
            row = np.concatenate([bicubic(low, scale), upscaled(model, low, device), part], 1)
            self._writer.add_image(pictures.name(index), row, iteration, dataformats="HWC")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
