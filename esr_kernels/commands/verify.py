"""`esr-kernels verify`: models on every capable backend against plain PyTorch in float64."""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import esr_kernels

from .. import cases
from ..dispatch import BackendStatus, list_backends, use_backend
from ..errors import BackendError, OptimizeError
from ..optimize import OptimizedModel
from ..timing import machine, machine_line, table, write_json
from ._arguments import backend_name, dtype_name, expand, json_file, model_name, size, weights_file

# The second is odd on purpose.
DEFAULT_SIZES = ((48, 64), (37, 53))
PHOTOGRAPH = 64  # pixels a side
EXTREME = 24  # pixels a side of the images without content


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "verify",
        help="compare models on every backend with plain PyTorch in float64",
        description="Run models, as modules and optimised, on every backend that can, and compare with the same "
        "network in plain PyTorch in float64: noise, a photograph (with scikit-image), extreme images, both layouts.",
    )
    parser.add_argument(
        "--model", nargs="+", type=model_name, default=["span"], metavar="NAME", help="models, or all (default: span)"
    )
    parser.add_argument(
        "--weights", type=weights_file, metavar="FILE", help="checkpoint of the model (default: random)"
    )
    parser.add_argument(
        "--size", nargs="+", type=size, default=list(DEFAULT_SIZES), metavar="HxW", help="default: 48x64 37x53"
    )
    parser.add_argument(
        "--dtype",
        nargs="+",
        type=dtype_name,
        default=["float32", "bfloat16"],
        metavar="NAME",
        help="default: float32 bfloat16",
    )
    parser.add_argument("--backend", nargs="+", type=backend_name, metavar="NAME", help="default: every one")
    parser.add_argument("--verbose", action="store_true", help="a line for every input instead of the worst one")
    parser.add_argument("--json", type=json_file, metavar="FILE", help="also write every comparison to FILE")
    return parser


def _photograph(side: int) -> Tensor | None:
    """A crop [1, 3, side, side] of a photograph in 0..1, or None without scikit-image."""
    try:
        from skimage import data
    except ImportError:
        return None
    top, left = 100, 180
    picture = torch.from_numpy(data.astronaut()[top : top + side, left : left + side].copy())
    return picture.permute(2, 0, 1).unsqueeze(0).float() / 255


def inputs(model: nn.Module, sizes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Description -> image [N, 3, H, W], float32 in the model's data range."""
    smallest = int(model.minimum_size)  # type: ignore[arg-type]
    peak = float(model.data_range)  # type: ignore[arg-type]
    found: dict[str, Tensor] = {}
    for seed, (height, width) in enumerate(sizes):
        cases.check_size(model, height, width)
        found[f"noise {height}x{width}"] = cases.random_image(model, 1, height, width, seed)
    height, width = sizes[-1]
    batch = cases.random_image(model, 2, height, width, len(sizes))
    found[f"noise 2x{height}x{width} channels_last"] = batch.contiguous(memory_format=torch.channels_last)
    photograph = _photograph(max(PHOTOGRAPH, smallest))
    if photograph is not None:
        found["photograph"] = photograph * peak
    # Edges of full height everywhere, then no content at all: the largest and the smallest values inside a network.
    side = max(EXTREME, smallest)
    checkers = (torch.arange(side).view(-1, 1) + torch.arange(side)) % 2
    found["checkerboard"] = checkers.float().expand(1, 3, side, side) * peak
    found["black"] = torch.zeros(1, 3, side, side)
    found["white"] = torch.full((1, 3, side, side), peak)
    return found


@contextmanager
def _full_precision() -> Iterator[None]:
    """Without TF32, whose 10 bits would pass for errors."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


class _Model:
    """A model under test with its references, computed once."""

    def __init__(self, name: str, weights: str | None, sizes: Sequence[tuple[int, int]]) -> None:
        self.name = name
        self.fused, self.plain = cases.model_pair(name, weights)
        self.inputs = inputs(self.fused, sizes)
        self.double = copy.deepcopy(self.plain).double()
        self._references: dict[tuple[str, torch.dtype], Tensor] = {}
        self._plain_errors: dict[tuple[str, torch.dtype, str], float] = {}
        self._optimized: dict[tuple[str, torch.dtype], nn.Module] = {}

    @torch.inference_mode()
    def reference(self, image: str, dtype: torch.dtype) -> Tensor:
        """The float64 result for the image as it is in `dtype`."""
        key = (image, dtype)
        if key not in self._references:
            self._references[key] = self.double(cases.double(self.inputs[image].to(dtype)))
        return self._references[key]

    @torch.inference_mode()
    def tolerance(self, image: str, dtype: torch.dtype, device: str) -> float:
        if dtype == torch.float32:
            return cases.network_tolerance(dtype, 0.0)
        key = (image, dtype, device)
        if key not in self._plain_errors:
            # channels_last: PyTorch's own half-type convolutions on a CPU are ten times slower without it.
            twin = copy.deepcopy(self.plain).to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            result = twin(self.inputs[image].to(device, dtype, memory_format=torch.channels_last))
            self._plain_errors[key] = cases.relative_error(result, self.reference(image, dtype))
        return cases.network_tolerance(dtype, self._plain_errors[key])

    def form(self, name: str, device: str, dtype: torch.dtype) -> nn.Module:
        """The model as its fused modules ("modules") or as a whole ("optimized")."""
        if name == "modules":
            return copy.deepcopy(self.fused).to(device, dtype)
        # A plan is the same for every backend, and tracing takes longer than running.
        key = (device, dtype)
        if key not in self._optimized:
            self._optimized[key] = esr_kernels.optimize(copy.deepcopy(self.fused).to(device), dtype=dtype)
        return self._optimized[key]


def _verify(
    model: _Model, form: str, backend: str, device: str, dtype: torch.dtype
) -> tuple[list[dict[str, Any]], str | None]:
    """One comparison per input, and why the backend could not run it (None: it did)."""
    common = {
        "model": model.name,
        "form": form,
        "backend": backend,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
    }

    def failure(problem: str) -> list[dict[str, Any]]:
        check = cases.Check(float("inf"), float("inf"), 0.0, problem)
        return [{**common, "input": "-", "not_fused": [], **check.to_json()}]

    records = []
    try:
        with use_backend(backend):
            function = model.form(form, device, dtype)
            report = function.report() if isinstance(function, OptimizedModel) else None
            if report is not None and report.wrong:
                # What runs in its place is right, and would hide it.
                return failure("; ".join(report.wrong)), None
            left = [] if report is None else report.left
            for image, picture in model.inputs.items():
                with torch.inference_mode():
                    result = function(picture.to(device, dtype))
                reference = model.reference(image, dtype)
                check = cases.compare(result, reference, model.tolerance(image, dtype, device), dtype)
                records.append({**common, "input": image, "not_fused": left, **check.to_json()})
    except BackendError as error:
        return [], str(error)
    except OptimizeError as error:
        # Not a matter of the backend: the model should have become a plan.
        return failure(str(error)), None
    return records, None


def _badness(record: dict[str, Any]) -> float:
    if record["relative"] is None:
        return float("inf")
    return record["relative"] / record["tolerance"] if record["tolerance"] else float(record["relative"] > 0)


def _worst(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every group of comparisons that differ in the input alone, the worst."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in records:
        key = tuple(record[name] for name in ("model", "form", "backend", "device", "dtype"))
        groups.setdefault(key, []).append(record)
    return [max(group, key=lambda r: (not r["ok"], _badness(r))) for group in groups.values()]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _table(records: Sequence[dict[str, Any]], verbose: bool) -> str:
    headers = ["model", "form", "backend", "device", "dtype", "max |diff|", "relative", "tolerance"]
    headers += ["input" if verbose else "worst input", "result"]
    rows = [
        [
            *(r[name] for name in ("model", "form", "backend", "device", "dtype")),
            *(_number(r[name]) for name in ("max_abs", "relative", "tolerance")),
            r["input"],
            "ok" if r["ok"] else f"FAILED{': ' + r['problem'] if r['problem'] else ''}",
        ]
        for r in (records if verbose else _worst(records))
    ]
    return table(headers, rows, "lllllrrrll")


def _devices(backend: BackendStatus) -> list[str]:
    present = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return [device for device in cases.BACKEND_DEVICES.get(backend.name, present) if device in present]


def run(args: argparse.Namespace) -> int:
    """Print the table; 0 when everything that ran was right, 1 when a result was wrong or nothing ran.

    A backend that was asked for by name and could not run counts as a failure.

    Raises:
        ValueError: arguments that do not fit together, or a checkpoint of another model.
    """
    names = expand(args.model, cases.model_names())
    if args.weights is not None and len(names) != 1:
        raise ValueError(f"--weights: a checkpoint belongs to one model, got {len(names)}: {', '.join(names)}")
    weights = None if args.weights is None else str(args.weights)
    asked = set(args.backend or ())
    records: list[dict[str, Any]] = []
    refused: dict[str, dict[str, None]] = {}  # backend -> its reasons, in order
    capable = []
    for backend in list_backends():
        if asked and backend.name not in asked:
            continue
        if not backend.available:
            refused[backend.name] = {backend.reason or "unknown": None}
        elif not _devices(backend):
            refused[backend.name] = {"PyTorch finds no device for it here": None}
        else:
            capable.append(backend)

    with _full_precision():
        for name in names:
            model = _Model(name, weights, args.size)
            for backend in capable:
                for device in _devices(backend):
                    for dtype_text in dict.fromkeys(args.dtype):
                        for form in ("modules", "optimized"):
                            if sys.stderr.isatty():
                                print(f"\r\x1b[K{name} {form} {backend.name} {dtype_text}", end="", file=sys.stderr)
                            found, reason = _verify(model, form, backend.name, device, cases.DTYPES[dtype_text])
                            records += found
                            if reason is not None:
                                refused.setdefault(backend.name, {})[f"{name} ({form}, {dtype_text}): {reason}"] = None
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)

    info = machine()
    print(machine_line(info))
    print(f"weights: {'random' if args.weights is None else args.weights.name}; reference: plain PyTorch in float64")
    if records:
        print(_table(records, args.verbose))
    for line in dict.fromkeys(f"{r['model']}: {reason}" for r in records for reason in r["not_fused"]):
        print(f"optimized, but not fused: {line}")
    if refused:
        print("could not run:")
        for backend_text, reasons in refused.items():
            for reason in reasons:
                print(f"  {backend_text}: {reason}")
    if args.json is not None:
        not_run = {name: list(reasons) for name, reasons in refused.items()}
        write_json(args.json, {"machine": info, "comparisons": records, "could_not_run": not_run})
        print(f"written to {args.json}")

    failures = [r for r in records if not r["ok"]]
    if failures:
        print(f"{len(failures)} of {len(records)} comparisons FAILED", file=sys.stderr)
        return 1
    if not records:
        print("nothing could be compared", file=sys.stderr)
        return 1
    missing = sorted(asked - {r["backend"] for r in records})
    if missing:
        print(f"asked for, but could not run: {', '.join(missing)}", file=sys.stderr)
        return 1
    print(f"all {len(records)} comparisons are within their tolerance")
    return 0
