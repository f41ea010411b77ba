"""`esr-kernels bench`: models and operators against plain PyTorch, taking turns, checked before they are timed."""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import esr_kernels

from .. import cases
from ..dispatch import use_backend
from ..errors import BackendError, OptimizeError
from ..optimize import OptimizedModel
from ..profiling import Shares, shares
from ..timing import Timing, alternate, machine, machine_line, table, thread_count, write_json
from . import _bench_train
from ._arguments import (
    backend_name,
    dtype_name,
    expand,
    json_file,
    model_name,
    operator_name,
    positive,
    seconds,
    size,
    weights_file,
)

OURS = "esr_kernels"
OURS_CHANNELS_LAST = "esr_kernels channels_last"
EAGER = "eager"
MODULES = "modules"
PEERS = (EAGER, "channels_last", "inductor", MODULES)
# Timed beside half types on a CPU, where float32 is often what a user would rather run.
FLOAT32 = "channels_last_float32"
# Short functions are repeated until a sample lasts this many seconds.
SAMPLE_TIME = 0.002
MAXIMUM_ROTATION = 16

Shape = tuple[int, int, int]  # batch, height, width


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="time models and operators against plain PyTorch",
        description="Time models (optimised) or operators against the same written in plain PyTorch. Every result is "
        "checked against float64 first; engines take turns round by round; ratios are of medians.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", nargs="+", type=model_name, metavar="NAME", help="models, or all (default: span)")
    what.add_argument("--op", nargs="+", type=operator_name, metavar="NAME", help="operators, or all")
    parser.add_argument(
        "--weights", type=weights_file, metavar="FILE", help="checkpoint of the model (default: random)"
    )
    parser.add_argument(
        "--size", nargs="+", type=size, default=[(256, 256)], metavar="HxW", help="input sizes (default: 256x256)"
    )
    parser.add_argument(
        "--train",
        action="store_true",
        help="time steps of training and their peak memory instead: a model's modules with L1 loss and Adam, an "
        "operator's forward and backward",
    )
    parser.add_argument("--batch", type=positive, default=1, metavar="N", help="images per call (default: 1)")
    parser.add_argument(
        "--threads", nargs="+", type=positive, metavar="N", help="PyTorch threads (default: on a CPU 1 and all cores)"
    )
    parser.add_argument(
        "--dtype", nargs="+", type=dtype_name, default=["float32"], metavar="NAME", help="default: float32"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--backend", nargs="+", type=backend_name, metavar="NAME", help="backends (default: the automatic choice)"
    )
    parser.add_argument("--rounds", type=positive, default=15, metavar="N", help="samples of each (default: 15)")
    parser.add_argument(
        "--budget", type=seconds, default=60.0, metavar="SECONDS", help="no new round after it (default: 60)"
    )
    parser.add_argument(
        "--against",
        type=_peers,
        default=[EAGER, "channels_last"],
        metavar="LIST",
        help=f"comma-separated, of {','.join(PEERS)} (default: eager,channels_last; eager is always there); inductor "
        "is torch.compile, modules a model's fused modules before optimize",
    )
    parser.add_argument("--json", type=json_file, metavar="FILE", help="also write everything measured to FILE")
    return parser


def _peers(text: str) -> list[str]:
    try:
        chosen = [cases.known("engine", name.strip(), PEERS) for name in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return list(dict.fromkeys([EAGER, *chosen]))


@dataclass(frozen=True)
class Engine:
    """One way to compute the result: `call` on any of `inputs`."""

    call: Callable[[Any], Tensor]
    inputs: Sequence[Any]

    def first(self) -> Tensor:
        return self.call(self.inputs[0])

    def rotating(self) -> Callable[[], Tensor]:
        if len(self.inputs) == 1:
            return self.first
        following = itertools.cycle(self.inputs)
        return lambda: self.call(next(following))


@dataclass(frozen=True)
class Subject:
    """Something to time.

    Attributes:
        kind: "model" or "operator".
        name: the model, or the operator and its case.
        operator: the registered operator that runs.
        reference: the result for the first input, float64 on the CPU.
        make: engine name -> how to make it; ours first.
    """

    kind: str
    name: str
    operator: str
    reference: Tensor
    make: dict[str, Callable[[], Engine]]

    def tolerance(self, backend: str, dtype: torch.dtype, eager_error: float) -> float:
        if self.kind == "model":
            return cases.network_tolerance(dtype, eager_error)
        return cases.operator_tolerance(self.operator, backend, dtype, eager_error)


def _is_ours(engine: str) -> bool:
    """Whether the engine is what is compared with the others."""
    return engine in (OURS, OURS_CHANNELS_LAST)


def _is_own_code(engine: str) -> bool:
    """Whether the engine has to keep the project's own tolerances."""
    return _is_ours(engine) or engine == MODULES


def _peers_for(args: argparse.Namespace, dtype: torch.dtype) -> list[str]:
    return [*args.against, FLOAT32] if args.device == "cpu" and dtype != torch.float32 else args.against


def _rotation(device: str, first: dict[str, Any] | Tensor) -> int:
    """How many inputs must take turns so that on a GPU they do not stay in its cache."""
    if device != "cuda":
        return 1
    tensors = [first] if isinstance(first, Tensor) else [t for t in first.values() if isinstance(t, Tensor)]
    bytes_each = max(sum(t.nbytes for t in tensors), 1)
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(1, min(math.ceil(2 * cache / bytes_each), MAXIMUM_ROTATION))


def _compiled(call: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    torch._dynamo.reset()
    return torch.compile(call)


def _model_subject(name: str, args: argparse.Namespace, dtype: torch.dtype, shape: Shape) -> Subject:
    fused, plain = cases.model_pair(name, None if args.weights is None else str(args.weights))
    batch, height, width = shape
    cases.check_size(fused, height, width)
    device = args.device

    def image(seed: int) -> Tensor:
        return cases.random_image(fused, batch, height, width, seed).to(device, dtype)

    first = image(0)
    images = [first, *(image(seed) for seed in range(1, _rotation(device, first)))]

    def ours() -> Engine:
        model = copy.deepcopy(fused).to(device)
        return Engine(esr_kernels.optimize(model, dtype=dtype, sizes=[(height, width)]), images)

    def eager() -> Engine:
        return Engine(copy.deepcopy(plain).to(device, dtype), images)

    def channels_last(dtype: torch.dtype = dtype) -> Engine:
        twin = copy.deepcopy(plain).to(device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Engine(twin, [x.to(dtype, memory_format=torch.channels_last) for x in images])

    def inductor() -> Engine:
        return Engine(_compiled(copy.deepcopy(plain).to(device, dtype)), images)

    def modules() -> Engine:
        return Engine(copy.deepcopy(fused).to(device, dtype), images)

    peers = {EAGER: eager, "channels_last": channels_last, "inductor": inductor, MODULES: modules}
    peers[FLOAT32] = functools.partial(channels_last, torch.float32)
    with torch.inference_mode():
        reference = copy.deepcopy(plain).double()(cases.double(first))
    make = {OURS: ours} | {peer: peers[peer] for peer in _peers_for(args, dtype)}
    return Subject("model", name, "run_plan", reference, make)


def _operator_subject(case: cases.OperatorCase, args: argparse.Namespace, dtype: torch.dtype, shape: Shape) -> Subject:
    def arguments(seed: int, memory_format: torch.memory_format) -> dict[str, Any]:
        return case.arguments(*shape, dtype=dtype, device=args.device, memory_format=memory_format, seed=seed)

    first = arguments(0, torch.contiguous_format)
    rotation = range(_rotation(args.device, first))
    nchw = [arguments(seed, torch.contiguous_format) for seed in rotation]
    nhwc = [arguments(seed, torch.channels_last) for seed in rotation]
    engines: dict[str, Callable[[], Engine]] = {
        OURS: lambda: Engine(case.fused, nchw),
        OURS_CHANNELS_LAST: lambda: Engine(case.fused, nhwc),
        EAGER: lambda: Engine(case.plain, nchw),
        "channels_last": lambda: Engine(case.plain, nhwc),
        "inductor": lambda: Engine(_compiled(case.plain), nchw),
        FLOAT32: lambda: Engine(case.plain, [cases.convert(arguments, torch.float32) for arguments in nhwc]),
    }
    peers = _peers_for(args, dtype)
    make = {name: engine for name, engine in engines.items() if _is_ours(name) or name in peers}
    return Subject("operator", case.name, case.operator, case.plain(cases.double(first)), make)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _flops(engine: Engine) -> int:
    with FlopCounterMode(display=False) as counter:
        engine.first()
    return counter.get_total_flops()


@torch.inference_mode()
def _run_first(engines: dict[str, Engine], report: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """Each engine's result for the first input; a peer that cannot run is taken out and the reason noted."""
    results = {}
    for name, engine in list(engines.items()):
        try:
            results[name] = engine.first()
        except Exception as error:
            if _is_own_code(name) or name == EAGER:
                raise
            del engines[name]
            report[name] = {"skipped": _reason(error)}
    return results


def _check(subject: Subject, backend: str, dtype: torch.dtype, results: dict[str, Tensor]) -> dict[str, cases.Check]:
    eager_error = cases.relative_error(results[EAGER], subject.reference)
    checks = {}
    for name, result in results.items():
        own = _is_own_code(name)
        tolerance = subject.tolerance(backend, dtype, eager_error) if own else cases.peer_tolerance(dtype, eager_error)
        expected = torch.float32 if name == FLOAT32 else dtype
        checks[name] = cases.compare(result, subject.reference, tolerance, expected)
    return checks


def _measure(subject: Subject, args: argparse.Namespace, dtype: torch.dtype, shape: Shape) -> dict[str, Any]:
    """Check every engine, then time those that are right. The record that goes into the JSON."""
    report: dict[str, dict[str, Any]] = {}
    record: dict[str, Any] = {
        "kind": subject.kind,
        "name": subject.name,
        "shape": list(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "device": args.device,
        "backend": None,
        "threads": torch.get_num_threads(),
        "gflop": None,
        "not_fused": [],
        "operators": None,
        "ok": False,
        "problem": None,
        "engines": report,
        "speedup": {},
    }
    try:
        backend = record["backend"] = cases.resolve_backend(subject.operator, args.device, dtype)
        engines = {name: make() for name, make in subject.make.items()}
        results = _run_first(engines, report)
    except (BackendError, OptimizeError) as error:
        record["problem"] = _reason(error)
        return record

    ours = engines[OURS].call
    if isinstance(ours, OptimizedModel):
        record["not_fused"] = ours.report().left
        record["operators"] = asdict(shares(engines[OURS].first, device=args.device))
    checks = _check(subject, backend, dtype, results)
    del results
    report |= {name: {"check": check.to_json()} for name, check in checks.items()}
    wrong = [f"{name}: {check}" for name, check in checks.items() if _is_own_code(name) and not check.ok]
    if wrong:
        record["problem"] = "wrong result, not timed: " + "; ".join(wrong)
        return record
    for name, check in checks.items():
        if not check.ok:
            report[name]["skipped"] = f"wrong result: {check}"
            del engines[name]

    with torch.inference_mode():
        flops = _flops(engines[OURS])
        timings = alternate(
            {name: engine.rotating() for name, engine in engines.items()},
            rounds=args.rounds,
            progress=True,
            budget=args.budget,
            sample_time=SAMPLE_TIME,
        )
    if flops == 0:
        record["problem"] = "the FLOP count is 0: an operator has no formula"
        return record
    record["gflop"] = flops / 1e9
    for name, timing in timings.items():
        report[name] |= timing.to_json() | {"gflops": flops / 1e9 / timing.median}
    record["speedup"] = _speedups(timings)
    record["ok"] = True
    return record


def _speedups(timings: dict[str, Timing]) -> dict[str, dict[str, float]]:
    """Ours -> peer -> the peer's median over ours."""
    return {
        ours: {name: t.median / timing.median for name, t in timings.items() if not _is_ours(name)}
        for ours, timing in timings.items()
        if _is_ours(ours)
    }


def _rows(records: Sequence[dict[str, Any]]) -> str:
    against = list(dict.fromkeys(peer for r in records for peer in r["engines"] if not _is_ours(peer)))
    headers = [records[0]["kind"], "input", "dtype", "threads", "backend", "layout", "ms", "GFLOP/s", "error"]
    for peer in against:
        headers += [f"{peer} ms", "ratio"]
    rows = []
    for record in records:
        shape = "x".join(map(str, record["shape"]))
        common = [record["name"], shape, record["dtype"], str(record["threads"])]
        common.append((record["backend"] or "-") + (", in part" if record["not_fused"] else ""))
        engines = record["engines"]
        if not record["ok"]:
            rows.append([*common, "-", "FAILED", *["-"] * (len(headers) - 7)])
            continue
        for ours, ratios in record["speedup"].items():
            own = engines[ours]
            row = [*common, "NCHW" if ours == OURS else "NHWC", f"{own['median'] * 1e3:.3f}", f"{own['gflops']:.1f}"]
            row.append(f"{own['check']['relative']:.1e}")
            for peer in against:
                if peer in ratios:
                    row += [f"{engines[peer]['median'] * 1e3:.3f}", f"{ratios[peer]:.2f}x"]
                else:
                    row += ["-", "-"]
            rows.append(row)
    return table(headers, rows, "lllrll" + "r" * (len(headers) - 6))


def _operators(records: Sequence[dict[str, Any]]) -> list[str]:
    """For each model what it runs and where the time goes, at the first size and number of threads."""
    lines: dict[str, str] = {}
    for record in records:
        if record.get("operators"):
            lines.setdefault(
                record["name"], f"{record['name']} on {record['backend']}: {Shares(**record['operators'])}"
            )
    return list(lines.values())


def _subjects(args: argparse.Namespace, dtype: torch.dtype, shape: Shape) -> list[tuple[str, Callable[[], Subject]]]:
    if args.op is not None:
        found = [case for op in expand(args.op, cases.OPERATORS) for case in cases.operator_cases(op)]
        return [(case.name, functools.partial(_operator_subject, case, args, dtype, shape)) for case in found]
    names = expand(args.model or ["span"], cases.model_names())
    if args.weights is not None and len(names) != 1:
        raise ValueError(f"--weights: a checkpoint belongs to one model, got {len(names)}: {', '.join(names)}")
    return [(name, functools.partial(_model_subject, name, args, dtype, shape)) for name in names]


def run(args: argparse.Namespace) -> int:
    """Print the table, write the JSON; 0 when everything was right, 1 when a result was wrong or could not be had.

    Raises:
        ValueError: arguments that do not fit together, or a checkpoint of another model.
    """
    if args.op is not None and args.weights is not None:
        raise ValueError("--weights: operators have none, use it with --model")
    if args.op is not None and MODULES in args.against:
        raise ValueError("--against: modules stands for a model's modules, use it with --model")
    if args.train and (args.weights is not None or MODULES in args.against):
        raise ValueError("--train: takes neither --weights nor --against modules; it trains a model's modules")
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: PyTorch finds no CUDA device here")
    info = machine()
    cores = info["cpu"]["cores"] or 1
    default_threads = [1, cores] if args.device == "cpu" else [torch.get_num_threads()]
    thread_counts = list(dict.fromkeys(args.threads or default_threads))

    records = []
    for chosen, dtype_text, (height, width) in itertools.product(args.backend or [None], args.dtype, args.size):
        dtype, shape = cases.DTYPES[dtype_text], (args.batch, height, width)
        for name, make in _subjects(args, dtype, shape):
            subject = None if args.train else make()
            for threads in thread_counts:
                print(f"{name} {'x'.join(map(str, shape))} {dtype_text}, {threads} thread(s)", file=sys.stderr)
                try:
                    with thread_count(threads), use_backend(chosen) if chosen else nullcontext():
                        if subject is None:
                            kind = "operator" if args.op is not None else "model"
                            step = _bench_train.Training(kind, name, shape, dtype, args.device, chosen)
                            record = _bench_train.measure(step, args, threads)
                        else:
                            record = _measure(subject, args, dtype, shape)
                except BackendError as error:
                    raise ValueError(f"--backend: {error}") from None
                if record["problem"]:
                    print(f"  FAILED: {record['problem']}", file=sys.stderr)
                for line in record["not_fused"]:
                    print(f"  not fused, runs as it is: {line}", file=sys.stderr)
                for engine, entry in record["engines"].items():
                    if "skipped" in entry:
                        print(f"  {engine} left out: {entry['skipped']}", file=sys.stderr)
                records.append(record)

    print(machine_line(info))
    print(f"medians of up to {args.rounds} rounds taking turns; ratio: the peer's time over ours;")
    if args.train:
        print("peak: memory a step needs on top of weights, optimiser and images; error: of the gradients")
        print(_bench_train.rows(records))
    else:
        print("GFLOP/s: the work of direct convolutions, a multiply-add as two, over the time")
        print(_rows(records))
        for line in _operators(records):
            print(line)
    if args.json is not None:
        settings = {"rounds": args.rounds, "budget": args.budget, "weights": _name_of(args.weights)}
        write_json(args.json, {"command": _command_line(), "machine": info, "settings": settings, "results": records})
        print(f"written to {args.json}")
    failed = [record for record in records if not record["ok"]]
    if failed:
        print(f"{len(failed)} of {len(records)} comparisons failed, see above", file=sys.stderr)
    return 1 if failed else 0


def _name_of(path: os.PathLike[str] | None) -> str | None:
    return None if path is None else os.path.basename(path)


def _command_line() -> list[str]:
    return ["esr-kernels", *sys.argv[1:]]
