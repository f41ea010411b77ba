"""Validation as the challenge measures: 8-bit RGB, PSNR without a border (report section 2.3)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from ..imaging import Picture, quantize, to_tensor
from .data import Pictures, Pixels
from .distributed import Process
from .resize import bicubic, downscale

BORDER = 4  # pixels a side that the PSNR leaves out


def psnr(a: Pixels, b: Pixels) -> float:
    """dB between two 8-bit pictures [H, W, C] over all channels, without a border of 4 pixels.

    Raises:
        ValueError: the shapes differ, or nothing is left inside the border.
    """
    if a.shape != b.shape:
        raise ValueError(f"a, b: expected pictures of one shape, got {list(a.shape)} and {list(b.shape)}")
    inner = (slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    if a[inner].size == 0:
        raise ValueError(f"a, b: nothing is left of {list(a.shape[:2])} pixels without a border of {BORDER}")
    error = float(np.mean((a[inner].astype(np.float64) - b[inner].astype(np.float64)) ** 2))
    return math.inf if error == 0 else 20 * math.log10(255 / math.sqrt(error))


def upscaled(model: nn.Module, low: Pixels, device: torch.device) -> Pixels:
    """The network's 8-bit result [H r, W r, 3] for a low-resolution picture [H, W, 3]."""
    data_range = float(model.data_range)  # type: ignore[arg-type]
    with torch.inference_mode():
        result: Tensor = model(to_tensor(Picture(low), data_range).to(device))
    return quantize(result, data_range, 8, False)


def validate(model: nn.Module, pictures: Pictures, scale: int, process: Process) -> list[float]:
    """PSNR [dB] of each picture; the processes share the work."""
    result = torch.zeros(len(pictures), dtype=torch.float64)
    for index in range(process.rank, len(pictures), process.world):
        high = pictures.pixels(index)
        result[index] = psnr(upscaled(model, downscale(high, scale), process.device), high)
    return process.sum(result.to(process.device)).tolist()


def bicubic_psnr(pictures: Pictures, scale: int) -> list[float]:
    """PSNR [dB] of bicubic interpolation for each picture."""
    return [psnr(bicubic(downscale(high, scale), scale), high) for high in map(pictures.pixels, range(len(pictures)))]
