"""The pictures: the challenge's folders, or a few photographs that scikit-image brings along."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..imaging import ImageError, image_kind, middle, read_image
from ..training.data import Pixels
from ..training.photographs import HELD_OUT, files
from ..training.resize import crop_to_multiple, downscale

SETS = ("valid", "test")
PHOTOGRAPHS = "photographs"
SCALE = 4
# What is taken of a photograph, high resolution: the largest networks take minutes for a whole one.
_PHOTOGRAPH_SIDE = 512


@dataclass(frozen=True)
class Pair:
    """A low-resolution picture and what it was made from.

    Attributes:
        name: in reports.
        low: the file; None for a photograph whose low-resolution picture is made from `high`.
        high: the file; None where it is not published, as of the challenge's test set.
    """

    name: str
    low: Path | None
    high: Path | None

    def load(self) -> tuple[Pixels, Pixels | None]:
        """Low resolution [h, w, 3] and high resolution [4 h, 4 w, 3], 8 bits.

        Raises:
            ImageError: a file is damaged, no picture, or of another depth or size than its partner.
        """
        if self.low is None:
            assert self.high is not None
            high = _middle(_rgb(self.high))
            return downscale(high, SCALE), high
        low = _rgb(self.low)
        if self.high is None:
            return low, None
        high = np.ascontiguousarray(crop_to_multiple(_rgb(self.high), SCALE))
        wanted = (low.shape[0] * SCALE, low.shape[1] * SCALE)
        if high.shape[:2] != wanted:
            raise ImageError(
                f"{self.high}: expected {wanted[1]} x {wanted[0]} pixels, {SCALE} times {self.low.name}, got "
                f"{high.shape[1]} x {high.shape[0]}"
            )
        return low, high


def _rgb(path: Path) -> Pixels:
    picture = read_image(path)
    if picture.depth != 8 or picture.transparent:
        raise ImageError(f"{path}: expected 8 bits per channel and no transparency, as the challenge's pictures have")
    pixels = np.repeat(picture.pixels, 3, 2) if picture.grey else picture.pixels
    return np.ascontiguousarray(pixels)


def _middle(pixels: Pixels) -> Pixels:
    rows, columns = (middle(n, min(n, _PHOTOGRAPH_SIDE) // SCALE * SCALE) for n in pixels.shape[:2])
    return np.ascontiguousarray(pixels[rows, columns])


def find_sets(folder: Path, limit: int | None = None) -> dict[str, list[Pair]]:
    """The pictures of the published layout, `DIV2K_LSDIR_{valid,test}_LR` and `_HR`, by set.

    A low-resolution picture `0801x4.png` belongs to `0801.png`. High-resolution ones may be missing.

    Args:
        folder: that holds these.
        limit: pictures of each set, the first by name; all by default.

    Raises:
        FileNotFoundError: no such folder.
        ImageError: it holds none of these sets, or one without pictures.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found: dict[str, list[Pair]] = {}
    for name in SETS:
        low, high = (folder / f"DIV2K_LSDIR_{name}_{kind}" for kind in ("LR", "HR"))
        if not low.is_dir():
            continue
        pairs = []
        for path in sorted(low.glob("*.png"))[:limit]:
            partner = high / (path.stem.removesuffix(f"x{SCALE}") + ".png")
            pairs.append(Pair(path.stem, path, partner if partner.is_file() else None))
        if not pairs:
            raise ImageError(f"{low}: no PNG pictures in this folder")
        found[name] = pairs
    if not found:
        raise ImageError(f"{folder}: expected folders DIV2K_LSDIR_valid_LR or DIV2K_LSDIR_test_LR, found neither")
    return found


def photographs(limit: int | None = None, names: Sequence[str] = HELD_OUT) -> dict[str, list[Pair]]:
    """One set: the middle of scikit-image's photographs that the networks of this package were not trained on.

    Raises:
        ImageError: scikit-image is not installed, or has none of them.
    """
    return {PHOTOGRAPHS: [Pair(path.stem, None, path) for path in files(tuple(names))][:limit]}


def largest(pairs: Sequence[Pair]) -> Pair | None:
    """The pair whose low-resolution picture has most pixels, of those that can be read."""
    found: list[tuple[int, Pair]] = []
    for pair in pairs:
        path = pair.low or pair.high
        assert path is not None
        try:
            height, width, _ = image_kind(path)
        except (ImageError, OSError):
            continue
        found.append((height * width, pair))
    return max(found, key=lambda item: item[0])[1] if found else None
