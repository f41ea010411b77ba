"""`esr-kernels upscale`: pictures and folders of pictures."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .. import imaging
from ..cli import check_interruption
from ..dispatch import use_backend
from ..imaging import EXTENSIONS, Array, ImageError, Picture
from ..memory import out_of_memory
from ..optimize import OptimizedModel, optimize
from ..streaming import KEPT_ABOVE, Rows, WholePicture, open_rows, write_png
from ..tiling import ALIGNMENT, AUTO_PIXELS, Tile, exact_overlap, plan_tiles, tile_size, upscale_windows
from ..timing import thread_count
from ._arguments import ALL, backend_name, dtype_name, model_name, positive, weights_file

# Pixels that are made integers at once, and the bytes that each of them needs on the way.
QUANTIZED = 2**18
QUANTIZED_BYTES = 64

PUBLISHED = "the challenge's repository, github.com/Amazingren/NTIRE2024_ESR, has them in its folder model_zoo"

OWN = f"this package's, trained on a few photographs; the published ones are better: {PUBLISHED}; --weights FILE"


def _tile(text: str) -> int | str | None:
    if text in ("auto", "none"):
        return None if text == "none" else text
    if text.isdecimal() and int(text) >= ALIGNMENT and int(text) % ALIGNMENT == 0:
        return int(text)
    raise argparse.ArgumentTypeError(f'expected "auto", "none" or a multiple of {ALIGNMENT} pixels, got {text!r}')


def one_model(text: str) -> str:
    if text == ALL:
        raise argparse.ArgumentTypeError("expected one model, got 'all'")
    return model_name(text)


def _overlap(text: str) -> int:
    if text.isdecimal() and int(text) % ALIGNMENT == 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a multiple of {ALIGNMENT} pixels, got {text!r}")


def _megapixels(text: str) -> int:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"expected millions of pixels above 0, got {text!r}")
    return int(value * 1e6)


def _quality(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= 100:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected 1..100, got {text!r}")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "upscale",
        help="super-resolve pictures",
        description="Super-resolve PNG, JPEG and WebP pictures. Depth (8 or 16 bits), grey, transparency and colour "
        "profile are kept, EXIF orientation is applied. Large pictures are done in tiles, in bounded memory.",
    )
    add = parser.add_argument
    add("inputs", nargs="+", type=Path, metavar="IMAGE|FOLDER", help="pictures, or folders of pictures")
    add("-o", "--output", type=Path, required=True, metavar="OUT", help="a file for one picture, else a folder")
    add("--model", type=one_model, default="span", metavar="NAME", help="default: span")
    add("--weights", type=weights_file, metavar="FILE", help="a checkpoint of the model (default: this package's)")
    add("--random-weights", action="store_true", help="run without a checkpoint; the result is noise")
    add("--backend", type=backend_name, metavar="NAME", help="default: the fastest that can run")
    add("--dtype", type=dtype_name, default="float32", metavar="NAME", help="default: float32")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: PyTorch's)")
    add("--tile", type=_tile, default="auto", metavar="N|auto|none", help="tiles of N pixels a side (default: auto)")
    add("--overlap", type=_overlap, metavar="N", help="of tiles; default: enough for the same result as without tiles")
    add("--max-pixels", type=_megapixels, default=imaging.MAX_PIXELS, metavar="MILLIONS", help="default: 100")
    add("--quality", type=_quality, default=95, metavar="1..100", help="of JPEG and WebP (default: 95)")
    add("--format", choices=["png", "jpg", "webp"], help="of the results in a folder (default: as the picture's)")
    add("--recursive", action="store_true", help="folders with their subfolders")
    add("--overwrite", action="store_true", help="replace results that exist")
    add("--progress", action="store_true", help="show progress even when the output is not a terminal")
    return parser


def _jobs(args: argparse.Namespace, scale: int) -> list[tuple[Path, Path]]:
    """(picture, result) pairs, checked against one another before any work."""
    sources: list[tuple[Path, Path]] = []  # picture, its path below the output folder
    for given in args.inputs:
        if given.is_dir():
            found = sorted(p for p in (given.rglob("*") if args.recursive else given.glob("*")) if p.is_file())
            # Results of an earlier run inside the folder are not pictures to upscale again.
            results = args.output.resolve()
            own = [] if results == given.resolve() else [p for p in found if results in p.resolve().parents]
            pictures = [p for p in found if p.suffix.lower() in EXTENSIONS and p not in own]
            if not pictures:
                raise ImageError(f"{given}: no pictures ({', '.join(EXTENSIONS)}) in this folder")
            sources += [(p, p.relative_to(given)) for p in pictures]
        elif given.exists():
            sources.append((given, Path(given.name)))
        else:
            raise FileNotFoundError(f"{given}: no such file or folder")
    out: Path = args.output
    single = len(sources) == 1 and not args.inputs[0].is_dir() and not out.is_dir() and out.suffix != ""
    if single:
        imaging.format_of(out)
        jobs = [(sources[0][0], out)]
    else:
        if out.exists() and not out.is_dir():
            raise ImageError(f"{out}: exists and is not a folder; several pictures need one")
        jobs = []
        for source, below in sources:
            suffix = f".{args.format}" if args.format else source.suffix.lower()
            suffix = suffix if suffix in EXTENSIONS else ".png"
            jobs.append((source, out / below.with_name(f"{below.stem}_x{scale}{suffix}")))
    taken: dict[Path, Path] = {}
    for source, target in jobs:
        if target in taken:
            raise ImageError(f"{source} and {taken[target]} would both be written to {target}")
        taken[target] = source
        if target.resolve() == source.resolve():
            raise ImageError(f"{source}: the result would replace the picture itself")
    return jobs


def load_network(
    name: str, weights: Path | None, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> OptimizedModel:
    """The named network, optimised, with the checkpoint's weights (None: random).

    Raises:
        ImageError: the device is not there.
    """
    import python_models

    model = python_models.create(name, weights=weights)
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ImageError(f"device: {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    fast = optimize(model, dtype=None if dtype == torch.float32 else dtype)
    if fast.report().left:
        print(f"note: {fast.report()}", file=sys.stderr)
    return fast


def upscale_rows(
    model: OptimizedModel,
    picture: Rows,
    *,
    device: str = "cpu",
    tile: int | str | None = "auto",
    overlap: int | None = None,
    progress: Any = None,
    scarce: Any = None,
) -> Iterator[Array]:
    """Rows of the picture super-resolved, from top to bottom, as many at a time as a tile has: [h, W, C], alpha last.

    Raises:
        ValueError: it is smaller than the network can take, or as `esr_kernels.tiling.upscale_windows`.
        ImageError: its file is damaged.
    """
    scale, data_range = int(model.scale), float(model.data_range)  # type: ignore[arg-type]
    width = picture.width * scale
    band: Array = np.empty((0, 0, 0))  # the rows of the tiles that are being done
    reached = 0  # the first row that later windows may need

    def window(t: Tile) -> Tensor:
        nonlocal reached
        reached = t.window_top
        part = picture.read(t.window_top, t.window_bottom)
        columns = slice(t.window_left, t.window_right)
        return imaging.to_tensor(part, data_range, slice(None), columns).to(device)

    def alpha(top: int, bottom: int) -> Array:
        above, below = max(top - KEPT_ABOVE, 0), min(bottom + KEPT_ABOVE, picture.height)
        first = min(above, reached)
        part = picture.read(first, below).alpha
        assert part is not None
        resized = imaging.resize_alpha(part[above - first :], (below - above) * scale, width)
        return resized[(top - above) * scale : (bottom - above) * scale]

    colours = 1 if picture.grey else 3
    pixel = (colours + picture.has_alpha) * picture.depth // 8  # bytes

    def room(rows: int, columns: int) -> int:
        return rows * width * pixel + max(QUANTIZED, columns) * QUANTIZED_BYTES

    parts = upscale_windows(
        model,
        picture.height,
        picture.width,
        window,
        tile=tile,
        overlap=overlap,
        progress=progress,
        scarce=scarce,
        room=room,
    )
    for top, left, part in parts:
        check_interruption()
        rows, columns = int(part.shape[2]), int(part.shape[3])
        if left == 0:
            band = np.empty((rows, width, colours + picture.has_alpha), f"u{picture.depth // 8}")
        # A few rows at a time: each step on the way to integers is a copy.
        step = max(QUANTIZED // columns, 1)
        for y in range(0, rows, step):
            done = imaging.quantize(part[:, :, y : y + step], data_range, picture.depth, picture.grey)
            band[y : y + step, left : left + columns, :colours] = done
        del part  # before the next one is made
        if left + columns == width:
            if picture.has_alpha:
                band[..., -1] = alpha(top // scale, top // scale + len(band) // scale)
            yield band


def upscale_picture(model: OptimizedModel, picture: Picture, **options: Any) -> Picture:
    """The picture super-resolved; depth, grey, transparency and profile stay.

    Args:
        options: of `upscale_rows`.

    Raises:
        ValueError: as `upscale_rows`.
    """
    scale = int(model.scale)  # type: ignore[arg-type]
    height, width = picture.height * scale, picture.width * scale
    pixels = np.empty((height, width, picture.pixels.shape[2]), picture.pixels.dtype)
    alpha = None if picture.alpha is None else np.empty((height, width), picture.pixels.dtype)
    top = 0
    for band in upscale_rows(model, WholePicture(picture), **options):
        pixels[top : top + len(band)] = band[..., : pixels.shape[2]]
        if alpha is not None:
            alpha[top : top + len(band)] = band[..., -1]
        top += len(band)
    return Picture(pixels, alpha, picture.icc_profile, picture.exif)


def make_folder(target: Path) -> None:
    """The folder a result is to be written to.

    Raises:
        ImageError: it cannot be made.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"{target}: folder {target.parent} cannot be made: {error.strerror}") from None


def _shown(path: Path) -> str:
    """A path for the terminal; file names may be bytes that are no text."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _reason(error: BaseException) -> str:
    if out_of_memory(error):
        return "not enough memory; smaller tiles need less (--tile)"
    return str(error) or type(error).__name__


@contextlib.contextmanager
def chosen(backend: str | None) -> Iterator[None]:
    with use_backend(backend) if backend else contextlib.nullcontext():
        yield


def _one(args: argparse.Namespace, model: OptimizedModel, source: Path, target: Path, bar: tqdm[Any]) -> None:
    if target.exists() and not args.overwrite:
        raise ImageError(f"{target}: exists; replace it with --overwrite")
    scale = int(model.scale)  # type: ignore[arg-type]
    png = imaging.format_of(target) == "PNG"
    overlap = exact_overlap(model) if args.overlap is None else args.overlap

    said = False

    def scarce(height: int, width: int) -> None:
        nonlocal said
        if not said:
            text = f"not enough memory for {width} x {height} pixels at once; going on in smaller tiles"
            tqdm.write(f"note: {source}: {text}", file=sys.stderr)
        said = True

    # Other formats need the whole result at once, and whether any of it is transparent.
    with open_rows(source, max_pixels=args.max_pixels, above=AUTO_PIXELS if png else args.max_pixels) as picture:
        height, width = picture.height * scale, picture.width * scale
        make_folder(target)
        imaging.check_output(target, height, width, transparent=picture.transparent)
        size = tile_size(picture.height, picture.width, args.tile, overlap)
        tiles = plan_tiles(picture.height, picture.width, size, overlap)
        bar.set_postfix_str(source.name)
        step = 1 / len(tiles)
        options = {
            "device": args.device,
            "tile": args.tile,
            "overlap": args.overlap,
            "progress": lambda done, total: bar.update(step),
            "scarce": scarce,
        }
        if isinstance(picture, WholePicture) and (not png or size[0] >= picture.height):
            result = upscale_picture(model, picture.picture, **options)
            check_interruption()
            imaging.write_image(target, result, quality=args.quality)
        else:
            write_png(target, picture, height, width, upscale_rows(model, picture, **options))


def run(args: argparse.Namespace) -> int:
    """Upscale; a picture that fails is reported and the others go on."""
    import python_models

    weights = args.weights
    if weights is None and not args.random_weights:
        weights = python_models.bundled(args.model)
        if weights is None:
            print(
                f"error: --weights: {args.model} needs a checkpoint; this package has none for it, {PUBLISHED}. "
                "--random-weights runs without one, for a test",
                file=sys.stderr,
            )
            return 2
        print(f"weights: {OWN}", file=sys.stderr)
    from ..cases import DTYPES

    scale = python_models.card(args.model).scale
    jobs = _jobs(args, scale)
    failed = 0
    with thread_count(args.threads), chosen(args.backend), warnings.catch_warnings():
        model = load_network(args.model, weights, DTYPES[args.dtype], args.device)
        if int(model.scale) != scale:  # type: ignore[arg-type]
            jobs = _jobs(args, int(model.scale))  # type: ignore[arg-type]
        shown = args.progress or sys.stderr.isatty()
        layout = "{l_bar}{bar}| {n:.1f}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
        # Pillow warns of what it finds odd in a file; what matters is an error here.
        warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
        with tqdm(total=len(jobs), unit="picture", disable=not shown, file=sys.stderr, bar_format=layout) as bar:
            for number, (source, target) in enumerate(jobs, 1):
                try:
                    _one(args, model, source, target, bar)
                except (ValueError, OSError, MemoryError, RuntimeError) as error:
                    # Anything else of PyTorch's is a bug, or fails for every picture alike.
                    if isinstance(error, RuntimeError) and not out_of_memory(error):
                        raise
                    check_interruption()
                    failed += 1
                    reason = _reason(error)
                    where = "" if str(source) in reason or str(target) in reason else f"{source}: "
                    tqdm.write(f"error: {where}{reason}", file=sys.stderr)
                else:
                    tqdm.write(_shown(target), file=sys.stdout)
                bar.n = number
                bar.refresh()
    if len(jobs) > 1:
        print(f"{len(jobs) - failed} of {len(jobs)} pictures upscaled", file=sys.stderr)
    return 1 if failed else 0
