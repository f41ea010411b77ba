"""Pairs of patches from high-resolution pictures.

Which picture, crop, flip and rotation the n-th sample of a run has follows from the seed and n alone. So the samples do
not depend on the number of processes or workers, and a resumed run needs no replay.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from .. import imaging
from ..imaging import EXTENSIONS, ImageError
from .config import ConfigError
from .resize import crop_to_multiple, downscale, resize, to_8_bits

Pixels = NDArray[np.uint8]

_SHOWN = 3  # pictures named in a message


def find_pictures(paths: Sequence[str | Path], key: str) -> list[Path]:
    """The pictures in folders, with their subfolders, and single files, sorted within a folder, each once.

    Args:
        paths: folders and files.
        key: of the configuration, for messages.

    Raises:
        ConfigError: a folder has no pictures.
        FileNotFoundError: there is no such folder or file.
    """
    result: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
            if not found:
                raise ConfigError(f"{key}: no pictures ({', '.join(EXTENSIONS)}) in folder {path}")
            result.update(dict.fromkeys(found))
        elif path.is_file():
            result[path] = None
        else:
            raise FileNotFoundError(f"{key}: {path}: no such file or folder")
    return list(result)


@dataclass(frozen=True)
class _Source:
    path: Path
    height: int  # pixels of high resolution that are used: multiples of the network's scale
    width: int
    size: float  # of `Data.scales`


class Pictures:
    """8-bit RGB pictures, decoded once as far as memory is allowed.

    Args:
        paths: the files.
        scale: of the network; height and width are cut to a multiple of it.
        smallest: pixels that a picture must have a side.
        convert: take pictures of other kinds than 8-bit RGB.
        sizes: every picture is there once for each, in (0, 1]; reduced ones below `smallest` are left out.
        cache_bytes: memory for decoded pictures.

    Raises:
        ConfigError: a picture is smaller than `smallest`, or the kinds are mixed or not RGB without `convert`.
        ImageError: a file is no picture.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        scale: int,
        smallest: int,
        convert: bool = False,
        sizes: Sequence[float] = (1.0,),
        cache_bytes: int = 0,
    ) -> None:
        kinds: dict[str, list[Path]] = {}
        small: list[str] = []
        self._sources: list[_Source] = []
        self._scale, self._cache, self.limit = scale, {}, cache_bytes  # type: ignore[var-annotated]
        for path in paths:
            height, width, kind = imaging.image_kind(path)
            kinds.setdefault(kind, []).append(path)
            if min(height, width) // scale * scale < smallest:
                small.append(f"{path} ({width} x {height})")
            for size in sizes:
                h, w = (int(length * size) // scale * scale for length in (height, width))
                if size == 1 or min(h, w) >= smallest:
                    self._sources.append(_Source(path, h, w, size))
        if small:
            raise ConfigError(
                f"{len(small)} of {len(paths)} pictures are smaller than {smallest} x {smallest}, which a patch needs: "
                f"{', '.join(small[:_SHOWN])}{', ...' if len(small) > _SHOWN else ''}"
            )
        if not convert and set(kinds) - {"RGB"}:
            what = "mixed kinds of pictures" if len(kinds) > 1 else "the pictures are not 8-bit RGB"
            counts = ", ".join(f"{len(v)} {k} ({v[0].name}{', ...' if len(v) > 1 else ''})" for k, v in kinds.items())
            raise ConfigError(f"{what}: {counts}; data.convert = true takes all as 8-bit RGB")

    def __len__(self) -> int:
        return len(self._sources)

    def name(self, index: int) -> str:
        """File name without its extension."""
        return self._sources[index].path.stem

    def shape(self, index: int) -> tuple[int, int]:
        """Height and width."""
        source = self._sources[index]
        return source.height, source.width

    def fingerprint(self) -> str:
        """Differs between sets of pictures with other names, sizes or order."""
        facts = [(s.path.name, s.height, s.width) for s in self._sources]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def load(self, *, progress: bool = False) -> int:
        """Decode as many pictures as the cache holds; returns their number."""
        chosen, total = [], 0
        for index, source in enumerate(self._sources):
            total += source.height * source.width * 3
            if total > self.limit:
                break
            chosen.append(index)
        # Decoders release Python's lock.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            decoded = pool.map(self._decode, chosen)
            shown = tqdm(decoded, "reading pictures", len(chosen), leave=False, disable=not progress)
            self._cache = dict(zip(chosen, shown, strict=True))
        return len(chosen)

    def pixels(self, index: int) -> Pixels:
        """[H, W, 3] uint8."""
        kept = self._cache.get(index)
        return self._decode(index) if kept is None else kept

    def _decode(self, index: int) -> Pixels:
        source = self._sources[index]
        picture = imaging.read_image(source.path)
        if picture.transparent:
            raise ImageError(f"{source.path}: has transparent pixels, which no network here can learn from")
        pixels = picture.pixels
        if picture.depth == 16:
            pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
        if source.size != 1:
            pixels = to_8_bits(resize(pixels, source.height, source.width))
        if picture.grey:
            pixels = np.repeat(pixels, 3, 2)
        return np.ascontiguousarray(crop_to_multiple(pixels, self._scale))


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Sample n -> low-resolution [3, P / scale, P / scale] and high-resolution [3, P, P], uint8.

    The high-resolution patch is cut out on the grid of low-resolution pixels, and the low-resolution one made from it
    and the margin that the bicubic kernel needs: it equals that part of the whole low-resolution picture.

    Args:
        pictures: to draw from; all are drawn once before any is drawn again.
        patch: P, a multiple of the scale.
        scale: of the network.
        seed: of the run.
        augment: flip and rotate at random.
    """

    def __init__(self, pictures: Pictures, *, patch: int, scale: int, seed: int, augment: bool = True) -> None:
        self.pictures, self.scale, self.seed, self.augment = pictures, scale, seed, augment
        self.side = patch // scale
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        epoch, position = divmod(n, len(self.pictures))
        if epoch != self._epoch:
            self._order = _generator(self.seed, 1, epoch).permutation(len(self.pictures))
            self._epoch = epoch
        pixels = self.pictures.pixels(int(self._order[position]))
        random, r, side = _generator(self.seed, 0, n), self.scale, self.side
        top = int(random.integers(pixels.shape[0] // r - side + 1))
        left = int(random.integers(pixels.shape[1] // r - side + 1))
        rows, columns = slice(top, top + side), slice(left, left + side)
        low = downscale(pixels, r, rows, columns)
        high = pixels[top * r : (top + side) * r, left * r : (left + side) * r]
        if self.augment:
            # Eight cases; the kernel is symmetric, so both turn alike.
            mirrored, quarters = bool(random.integers(2)), int(random.integers(4))
            low, high = (np.rot90(a[:, ::-1] if mirrored else a, quarters) for a in (low, high))
        return _planes(low), _planes(high)


def _generator(seed: int, purpose: int, n: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, purpose, n]))


def _planes(pixels: NDArray[Any]) -> Tensor:
    """[H, W, C] -> [C, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels, 2, 0)))


class _Numbers(Sampler[list[int]]):
    """Of the batches from `begin` on, each `batch` samples, the share of one process."""

    def __init__(self, begin: int, batch: int, count: int, rank: int, world: int) -> None:
        self.begin, self.batch, self.count, self.rank, self.share = begin, batch, count, rank, batch // world

    def __iter__(self) -> Iterator[list[int]]:
        for i in range(self.count):
            first = self.begin + i * self.batch + self.rank * self.share
            yield list(range(first, first + self.share))

    def __len__(self) -> int:
        return self.count


def worker_count(wanted: int, device: str, world: int) -> int:
    """Processes that make patches.

    Args:
        wanted: that many, or -1 for what the cores of this process allow. On a CPU the network needs them itself, and
            making patches costs a fraction of a step; a GPU leaves them idle.
        device: "cpu" or "cuda".
        world: processes of the run that share this machine's cores.
    """
    if wanted >= 0:
        return wanted
    cores = len(os.sched_getaffinity(0)) // world
    return min(8, max(cores - 1, 1)) if device == "cuda" else 0


def batches(
    crops: Crops,
    *,
    begin: int,
    batch: int,
    count: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin: bool = False,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """`count` batches from sample `begin` on: this process' share of each, [batch / world, 3, ...] uint8 twice.

    Workers compute with one thread each and share the decoded pictures' memory.
    """
    return DataLoader(
        crops,
        batch_sampler=_Numbers(begin, batch, count, rank, world),
        num_workers=workers,
        # Of a fork the workers have the pictures without a copy.
        multiprocessing_context="fork" if workers else None,
        # Otherwise starting them would draw from the generator of the run.
        generator=torch.Generator(),
        pin_memory=pin,
    )
