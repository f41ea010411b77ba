"""`esr-kernels demo`, what `make run` does: a photograph super-resolved, verified and timed against plain PyTorch."""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import imaging
from ..cases import resolve_backend
from ..imaging import Picture
from ..optimize import optimize
from ..timing import alternate, machine, machine_line, table, thread_count
from ..training import photographs
from ..training.evaluate import psnr
from ._arguments import backend_name, positive, weights_file
from ._weights import published
from .upscale import OWN, PUBLISHED, chosen, make_folder, one_model, upscale_picture

# Photographs inside scikit-image's wheel.
PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "coffee": "coffee.png",
    "chelsea": "chelsea.png",
    "rocket": "rocket.jpg",
    "motorcycle": "motorcycle_left.png",
}
TOLERANCE = 1e-4  # of the largest value
SIZE_LIMIT = 512  # plain PyTorch takes seconds and gigabytes for a photograph of today's cameras


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        help="super-resolve a photograph, verified and timed",
        description="Super-resolve a photograph: verify the fused network against plain PyTorch, time both in turns, "
        "write the picture.",
    )
    add = parser.add_argument
    add(
        "--photo",
        default="astronaut",
        choices=sorted(PHOTOGRAPHS),
        help="one of scikit-image's, downscaled first (default: astronaut)",
    )
    add("--image", type=Path, metavar="FILE", help="a picture of yours, used as it is")
    add("--model", type=one_model, default="span", metavar="NAME", help="default: span")
    add("--weights", type=weights_file, metavar="FILE", help="a checkpoint of the model")
    add("--backend", type=backend_name, metavar="NAME", help="default: the fastest that can run")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: PyTorch's)")
    add("--rounds", type=positive, default=7, metavar="N", help="of the timing (default: 7)")
    add("--output", type=Path, metavar="FILE", help="default: outputs/NAME_x4.png")
    add(
        "--size-limit",
        type=positive,
        default=SIZE_LIMIT,
        metavar="PIXELS",
        help="larger pictures are verified and timed on a part of this many pixels a side, and upscaled as a whole "
        f"(default: {SIZE_LIMIT})",
    )
    return parser


def _photograph(name: str, scale: int) -> tuple[Picture, Picture]:
    """The photograph cut to a multiple of the scale, and the same downscaled bicubically."""
    original = imaging.read_image(photographs.folder() / PHOTOGRAPHS[name])
    height, width = original.height // scale * scale, original.width // scale * scale
    pixels = np.ascontiguousarray(original.pixels[:height, :width])
    small = Image.fromarray(pixels).resize((width // scale, height // scale), Image.Resampling.BICUBIC)
    return Picture(pixels), Picture(np.asarray(small))


def run(args: argparse.Namespace) -> int:
    """Do it all; 1 when the fused network differs from plain PyTorch."""
    import python_models

    card = python_models.card(args.model)
    weights = args.weights or published(args.model) or python_models.bundled(args.model)
    torch.manual_seed(0)
    model = python_models.create(args.model, weights=weights)
    scale, data_range = int(model.scale), float(model.data_range)  # type: ignore[arg-type]
    original: Picture | None = None
    if args.image is not None:
        picture, name = imaging.read_image(args.image), args.image.stem
    else:
        original, picture = _photograph(args.photo, scale)
        name = args.photo
    target = args.output or Path("outputs") / f"{name}_x{scale}.png"
    make_folder(target)
    imaging.check_output(target, picture.height * scale, picture.width * scale, transparent=picture.transparent)

    with thread_count(args.threads), chosen(args.backend):
        fast = optimize(model)
        device_backend = resolve_backend("run_plan", "cpu", torch.float32)
        print(machine_line(machine()))
        where = f"report section {card.section}" if card.section else f"team {card.team}"
        print(f"network   {card.title} x{scale} ({where}), {_millions(model)} parameters")
        if weights is None:
            print(f"weights   RANDOM: the picture will be noise. Published weights: {PUBLISHED}; --weights FILE")
        elif weights == python_models.bundled(args.model):
            print(f"weights   {OWN}")
        else:
            print(f"weights   {weights.name}")
        how = f"downscaled x{scale} bicubically" if original is not None else "as it is"
        print(f"picture   {name}, {picture.width} x {picture.height}, {how}")
        print(f"backend   {device_backend}, {torch.get_num_threads()} threads")

        rows, columns = (imaging.middle(length, args.size_limit) for length in (picture.height, picture.width))
        x = imaging.to_tensor(picture, data_range, rows, columns)
        if x.shape[2:] != (picture.height, picture.width):
            print(f"part      {x.shape[3]} x {x.shape[2]} from its middle for verification and timing (--size-limit)")
        twin = python_models.plain(args.model, **model.options)  # type: ignore[arg-type]
        twin.load_state_dict(model.state_dict())
        twin.requires_grad_(False)
        with torch.inference_mode():
            expected = twin(x)
            difference = float((fast(x) - expected).abs().max())
        # Random weights leave the data range far behind.
        largest = max(float(expected.abs().max()), data_range)
        print(
            f"verified  largest difference from plain PyTorch {difference:.2e}: {difference / data_range:.1e} of the "
            f"data range, {difference / largest:.1e} of the largest value (allowed {TOLERANCE:.0e})"
        )
        # What `optimize` refused runs as it was, which would hide it.
        if fast.report().wrong or not difference <= TOLERANCE * largest:
            print("error: the fused network differs from plain PyTorch", file=sys.stderr)
            return 1
        _time(fast, twin, x, args.rounds)
        result = upscale_picture(fast, picture)
    if original is not None:
        bicubic = Image.fromarray(picture.pixels).resize((original.width, original.height), Image.Resampling.BICUBIC)
        print(
            f"PSNR      {psnr(result.pixels, original.pixels):.2f} dB, bicubic interpolation "
            f"{psnr(np.asarray(bicubic), original.pixels):.2f} dB"
        )
    imaging.write_image(target, result)
    print(f"written   {target} ({result.width} x {result.height})")
    return 0


def _millions(model: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.3f} million"


def _time(fast: torch.nn.Module, twin: torch.nn.Module, x: Tensor, rounds: int) -> None:
    last = copy.deepcopy(twin).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x_last = x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        timings = alternate(
            {
                "PyTorch eager": lambda: twin(x),
                "PyTorch eager, channels_last": lambda: last(x_last),
                "esr_kernels": lambda: fast(x),
            },
            rounds=rounds,
            progress=True,
            budget=40,
        )
    ours = timings["esr_kernels"].median
    rows = [
        [name, f"{t.median * 1e3:.1f}", f"{t.minimum * 1e3:.1f}", f"{t.median / ours:.2f}x"]
        for name, t in timings.items()
    ]
    print(table(["timed in turns", "median ms", "best ms", "of esr_kernels"], rows))
