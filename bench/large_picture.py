"""A large picture upscaled by the command line, in bounded memory.

    python -m bench.large_picture [--size N] [--model NAME | --small] [--threads N] [--folder FOLDER] [--json FILE]

A picture of N x N pixels is written, `esr-kernels upscale` makes its result, and parts of that are compared with the
same parts upscaled alone: they must have the same bits. Reported is the peak of the command's resident memory.
Of 20,000 x 20,000 pixels the result has 19 GB, and the files need about as much room on the disk. Pixels are mostly
the network's work: `--small` takes a SPAN of 4 channels and one block with random weights instead.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import python_models
from esr_kernels import imaging
from esr_kernels.commands._arguments import model_name, positive
from esr_kernels.commands.upscale import load_network
from esr_kernels.imaging import Array, Picture, PngWriter
from esr_kernels.streaming import open_rows
from esr_kernels.tiling import ALIGNMENT, exact_overlap
from esr_kernels.timing import machine, write_json

ROOT = Path(__file__).resolve().parent.parent
BAND = 64  # rows
PART = 96  # pixels a side of what is compared
MAX_PIXELS = 2**62


def bands(size: int) -> Iterator[Array]:
    """Smooth shades with edges and some noise, from top to bottom: [h, size, 3] of 8 bits."""
    generator = np.random.default_rng(0)
    x = np.arange(size)
    for top in range(0, size, BAND):
        y = np.arange(top, min(top + BAND, size))[:, None]
        shades = np.stack([(y + 2 * x) // 9, (3 * y - x) // 11, (y // 50 + x // 70) * 40], -1) % 240
        yield (shades + generator.integers(0, 9, shades.shape)).astype(np.uint8)


def parts(size: int) -> list[tuple[int, int]]:
    """Top and left of what is compared: the corners, and some between them."""
    last = (size - PART) // ALIGNMENT * ALIGNMENT
    between = np.random.default_rng(1).integers(0, last // ALIGNMENT + 1, (12, 2)) * ALIGNMENT
    return sorted({(0, 0), (0, last), (last, 0), (last, last), *((int(y), int(x)) for y, x in between)})


@torch.inference_mode()
def compare(picture: Path, result: Path, name: str, weights: Path, size: int) -> int:
    """How many parts of the result have been compared with the same parts of the picture upscaled alone.

    Raises:
        ValueError: the result has another size, or a part has other bits than alone.
    """
    model, chosen = load_network(name, weights), parts(size)
    scale, data_range, overlap = int(model.scale), float(model.data_range), exact_overlap(model)
    with open_rows(picture, max_pixels=MAX_PIXELS) as before, open_rows(result, max_pixels=MAX_PIXELS) as after:
        if (after.height, after.width) != (size * scale, size * scale):
            raise ValueError(f"{result}: {after.width} x {after.height} pixels")
        for top, left in chosen:
            y, x = max(top - overlap, 0), max(left - overlap, 0)
            window = before.read(y, min(top + PART + overlap, size)).pixels[:, x : left + PART + overlap]
            alone = model(imaging.to_tensor(Picture(window), data_range))
            alone = alone[:, :, (top - y) * scale :, (left - x) * scale :][:, :, : PART * scale, : PART * scale]
            got = after.read(top * scale, (top + PART) * scale).pixels[:, left * scale : (left + PART) * scale]
            if not np.array_equal(got, imaging.quantize(alone, data_range, 8, False)):
                raise ValueError(f"{result}: other bits than alone at row {top}, column {left} of the picture")
    return len(chosen)


def small_weights(folder: Path) -> Path:
    torch.manual_seed(0)
    weights = folder / "small.safetensors"
    save_file(python_models.create("span", feature_channels=4, num_blocks=1).state_dict(), weights)
    return weights


def run(folder: Path, size: int, name: str, weights: Path | None, threads: int) -> dict[str, Any]:
    """Make the picture and its result in a folder; what that took. Without weights: `small_weights`.

    Raises:
        subprocess.CalledProcessError: the command failed.
        ValueError: as `compare`.
    """
    picture, result, small = folder / "picture.png", folder / "result.png", weights is None
    weights = weights or small_weights(folder)
    with picture.open("xb") as file:
        writer = PngWriter(file, size, size, 3, 8)
        for band in bands(size):
            writer.write(band)
        writer.close()
    command = [sys.executable, "-m", "esr_kernels", "upscale", str(picture), "-o", str(result), "--model", name]
    command += ["--weights", str(weights), "--threads", str(threads), "--max-pixels", str(size * size / 1e6 + 1)]
    begin = time.perf_counter()
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - begin
    return {
        "machine": machine(),
        "model": name,
        "small": small,
        "threads": threads,
        "size": size,
        "seconds": seconds,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "file_bytes": result.stat().st_size,
        "compared": compare(picture, result, name, weights, size),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.large_picture", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=positive, default=20_000, metavar="N", help="pixels a side (default: 20000)")
    network = parser.add_mutually_exclusive_group()
    network.add_argument("--model", type=model_name, default="span", metavar="NAME", help="default: span")
    network.add_argument("--small", action="store_true", help="a small SPAN with random weights")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="default: 1")
    parser.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="where the files are, for a while (default: /tmp)"
    )
    parser.add_argument("--json", metavar="FILE", help="also as JSON")
    args = parser.parse_args()
    if args.size < PART:
        parser.error(f"--size: expected {PART} or more, got {args.size}")
    weights = python_models.bundled(args.model)
    if weights is None:
        parser.error(f"--model: this package has no weights for {args.model}")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = run(Path(folder), args.size, args.model, None if args.small else weights, args.threads)
    if args.json:
        write_json(args.json, found)
    named = "a small span" if args.small else args.model
    result = 3 * (args.size * python_models.card(args.model).scale) ** 2
    print(f"{named}: {args.size} x {args.size} pixels in {found['seconds']:.0f} s with {args.threads} threads")
    print(f"result: {result / 1e6:,.0f} MB, {found['file_bytes'] / 1e6:,.0f} MB as a file")
    print(f"resident memory at the peak: {found['peak_resident_bytes'] / 1e6:,.0f} MB")
    print(f"{found['compared']} parts of {PART} x {PART} pixels have the bits of that part alone")
    return 0


if __name__ == "__main__":
    sys.exit(main())
