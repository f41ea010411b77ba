"""`esr-kernels optimize`: what `optimize` makes of a network in a Python file, and how much faster it is."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import cases
from ..checkpoint import load_state_dict
from ..errors import OptimizeError
from ..optimize import optimize
from ..timing import alternate, machine, machine_line, table, thread_count, write_json
from ._arguments import dtype_name, json_file, positive, seconds, weights_file

SAMPLE_TIME = 0.05


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "optimize",
        help="fuse a network from a Python file: report, difference, times",
        description="Load a network from a Python file (which runs it), optimise it, print what was fused and what was "
        "not, and time it in turns with the original.",
    )
    parser.add_argument("model", type=_target, metavar="FILE.py:NAME", help="a class or function that makes the model")
    parser.add_argument(
        "--input", type=_shape, default=(1, 3, 256, 256), metavar="N,C,H,W", help="default: 1,3,256,256"
    )
    parser.add_argument("--weights", type=weights_file, metavar="FILE", help="checkpoint (default: as it is made)")
    parser.add_argument("--dtype", type=dtype_name, default="float32", metavar="NAME", help="default: float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--threads", type=positive, metavar="N", help="default: PyTorch's own choice")
    parser.add_argument("--rounds", type=positive, default=10, metavar="N", help="default: 10")
    parser.add_argument("--budget", type=seconds, default=60.0, metavar="SECONDS", help="for timing; default: 60")
    parser.add_argument("--strict", action="store_true", help="fail when a hot operation stayed plain PyTorch")
    parser.add_argument("--json", type=json_file, metavar="FILE", help="also write everything to FILE")
    return parser


def _target(text: str) -> tuple[Path, str]:
    file, _, name = text.rpartition(":")
    if not file or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected FILE.py:NAME such as model.py:Network, got {text!r}")
    path = Path(file)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {file!r}")
    return path, name


def _shape(text: str) -> tuple[int, ...]:
    if re.fullmatch(r"[1-9]\d*(,[1-9]\d*){3}", text) is None:
        raise argparse.ArgumentTypeError(f"expected N,C,H,W such as 1,3,256,256, got {text!r}")
    return tuple(int(n) for n in text.split(","))


def load(path: Path, name: str) -> nn.Module:
    """The model that `name` of a Python file makes without arguments.

    Raises:
        ValueError: there is nothing of that name, or it makes no module.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"model: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # for pickles of its classes
    sys.path.insert(0, str(path.resolve().parent))  # for what lies beside it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    if not hasattr(module, name):
        known = [k for k, v in vars(module).items() if isinstance(v, type) and issubclass(v, nn.Module)]
        raise ValueError(f"model: {path} has no {name!r}; modules in it: {', '.join(known) or 'none'}")
    found = getattr(module, name)
    made = found if isinstance(found, nn.Module) else found()
    if not isinstance(made, nn.Module):
        raise ValueError(f"model: {name}() returned {type(made).__name__}, not a torch.nn.Module")
    return made


def run(args: argparse.Namespace) -> int:
    """Print report, difference and times; 0 when the result is right, 1 when it is not or, with --strict, not fused.

    Raises:
        ValueError: arguments that do not fit together, or a checkpoint of another model.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: PyTorch finds no CUDA device here")
    dtype = cases.DTYPES[args.dtype]
    model = load(*args.model).eval().requires_grad_(False)
    if args.weights is not None:
        state = load_state_dict(args.weights)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"--weights: {args.weights} is not a checkpoint of {args.model[1]}: {error}") from error
    n, c, h, w = args.input
    peak = float(getattr(model, "data_range", 1.0))
    x = cases.sample_image(n, c, h, w, torch.Generator().manual_seed(0)) * peak
    model, x = model.to(args.device), x.to(args.device)
    # The smallest part of the picture that shows the same: comparing it in float64 takes a while.
    example = x.expand(max(n, 2), -1, -1, -1)[:2, :, : min(h, 64), : min(w, 64)].contiguous()
    try:
        with torch.no_grad():
            model(example)
    except Exception:
        example = x
    fast = optimize(
        model, dtype=None if dtype == torch.float32 else dtype, example=example, strict=args.strict, sizes=[(h, w)]
    )
    report = fast.report()
    print(report)

    x = x.to(dtype)
    plain = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
    with torch.inference_mode(), thread_count(args.threads):
        reference = copy.deepcopy(model).cpu().double()(cases.double(x))
        plain_error = cases.relative_error(plain(x), reference)
        check = cases.compare(fast(x), reference, cases.network_tolerance(dtype, plain_error), dtype)
        timings = alternate(
            {"original": lambda: plain(x), "optimized": lambda: fast(x)},
            rounds=args.rounds,
            progress=True,
            budget=args.budget,
            sample_time=SAMPLE_TIME,
        )
    print()
    print(machine_line(machine()))
    ratio = timings["original"].median / timings["optimized"].median
    rows = [
        ["original", f"{timings['original'].median * 1e3:.3f}", "1.00x", f"{plain_error:.1e}"],
        ["optimized", f"{timings['optimized'].median * 1e3:.3f}", f"{ratio:.2f}x", f"{check.relative:.1e}"],
    ]
    print(f"{'x'.join(map(str, x.shape))} {args.dtype}, medians of rounds in turns; error against float64")
    print(table(["network", "ms", "speed", "error"], rows, "lrrr"))
    if args.json is not None:
        results = {name: timing.to_json() for name, timing in timings.items()}
        write_json(
            args.json,
            {
                "machine": machine(),
                "model": f"{args.model[0].name}:{args.model[1]}",
                "input": list(args.input),
                "dtype": args.dtype,
                "report": report.to_dict(),
                "check": check.to_json(),
                "timings": results,
                "speedup": ratio,
            },
        )
        print(f"written to {args.json}")
    if not check.ok:
        raise OptimizeError(f"the optimised network is wrong on this input: {check}")
    return 0
