"""`esr-kernels train`: a network from pictures."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from ..timing import thread_count
from ..training import config as configuration
from ._arguments import positive


def _change(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise argparse.ArgumentTypeError(f"expected KEY=VALUE such as stage.1.rate=1e-3, got {text!r}")
    return key.strip(), configuration.parse_value(value.strip())


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    recipes = ", ".join(sorted(p.stem for p in configuration.RECIPES.glob("*.toml")))
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "train",
        help="train a network on pictures",
        description="Train a network on high-resolution pictures, through the fused operators. Low-resolution ones are "
        "made from them by MATLAB-like bicubic interpolation. Several processes: torchrun --nproc-per-node N -m "
        "esr_kernels train ...",
        epilog=f"Recipes: {recipes}. docs/training.md has all keys of a configuration.",
    )
    add = parser.add_argument
    add("config", nargs="?", metavar="CONFIG", help="a TOML file, or the name of a recipe")
    add("-o", "--output", metavar="FOLDER", help="of the run: state, log, weights (key output)")
    add("--resume", action="store_true", help="go on with the run in the folder")
    add("--train", nargs="+", metavar="PATH", help="folders and files to train on (key data.train)")
    add("--validation", nargs="+", metavar="PATH", help="held-out folders and files (key data.validation)")
    add("--demo-data", action="store_true", help="add scikit-image's photographs (key data.photographs)")
    add("--model", metavar="NAME", help="key model.name")
    add("--weights", metavar="FILE", help="start from a checkpoint (key model.weights)")
    add("--seed", type=int, metavar="N", help="key seed")
    add("--device", metavar="NAME", help="auto, cpu or cuda (key run.device)")
    add("--autocast", choices=["none", "bf16", "fp16"], help="key optimizer.autocast")
    add("--workers", type=int, metavar="N", help="processes that make patches (key loading.workers)")
    add("--tensorboard", action="store_true", default=None, help="write TensorBoard's files (key run.tensorboard)")
    add("--set", type=_change, action="append", default=[], metavar="KEY=VALUE", help="any key: stage.1.rate=1e-3")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: PyTorch's)")
    add("--progress", action="store_true", help="show progress even when the output is not a terminal")
    return parser


_FLAGS = {
    "output": "output",
    "train": "data.train",
    "validation": "data.validation",
    "model": "model.name",
    "weights": "model.weights",
    "seed": "seed",
    "device": "run.device",
    "autocast": "optimizer.autocast",
    "workers": "loading.workers",
    "tensorboard": "run.tensorboard",
}


def run(args: argparse.Namespace) -> int:
    """Train; 0 when the run is complete."""
    path = configuration.find(args.config) if args.config else None
    flags = [(key, value) for name, key in _FLAGS.items() if (value := getattr(args, name)) is not None]
    if args.demo_data:
        flags.append(("data.photographs", True))
    config = configuration.load(path, [*flags, *args.set])
    if not config.output:
        print("error: --output: name the folder of the run", file=sys.stderr)
        return 2

    from ..training.distributed import joined
    from ..training.trainer import Trainer

    # A log is read while the run goes on.
    print_line = partial(print, flush=True)
    with joined(config.run.device) as process, thread_count(args.threads):
        shown = args.progress or sys.stderr.isatty()
        trainer = Trainer(config, process, resume=args.resume, progress=shown, say=print_line)
        card = trainer.run()
    for name, value in card.get("psnr", {}).items():
        gain = value["network"] - value["bicubic"]
        print(f"PSNR      {name}: {value['network']:.2f} dB, bicubic {value['bicubic']:.2f} dB, {gain:+.2f} dB")
    if card:
        weights = Path(config.output) / "model.safetensors"
        print(f"use       esr-kernels upscale photo.jpg -o big.png --model {config.model.name} --weights {weights}")
    return 0
