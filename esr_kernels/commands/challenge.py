"""`esr-kernels challenge`: the networks under the challenge's protocol (report section 2.3)."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import python_models
from python_models.registry import BUNDLED

from .. import cases
from ..challenge import report
from ..challenge.data import PHOTOGRAPHS, Pair, find_sets, largest, photographs
from ..challenge.journal import Journal, Record
from ..challenge.measure import ENGINES, FUSED, PLAIN, Contestant, complexity, summary
from ..cli import check_interruption
from ..errors import TrainingError
from ..files import atomically
from ..imaging import ImageError
from ..timing import machine, machine_line, thread_count, write_json
from ..training.distributed import Process, joined
from ._arguments import expand, model_name, positive
from ._weights import nearby, published

RESULTS, TABLE, PLOT = "results.json", "results.md", "results.svg"
RANDOM = "random"
# A fused network may differ from plain PyTorch by this much of the largest value.
TOLERANCE = cases.NETWORK_TOLERANCE * 10


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "challenge",
        help="measure networks as the challenge did",
        description="Measure networks as the NTIRE 2024 Efficient SR challenge did (report section 2.3), fused and in "
        "plain PyTorch: PSNR on 8-bit RGB without a border of 4 pixels, run time per picture, peak memory, parameters, "
        "FLOPs, activations and convolutions at 256x256, scores of Eq. 1 and 2. Like the published harness it does "
        "not warm up before the first picture. Under torchrun the processes share the pictures.",
    )
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with DIV2K_LSDIR_valid_LR, _HR, DIV2K_LSDIR_test_LR, _HR (default: a few photographs)",
    )
    add("--models", nargs="+", type=model_name, default=["all"], metavar="NAME", help="default: all")
    add("--weights", type=Path, metavar="DIR", help="folder with the published checkpoints, teamNN_*")
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="default: both")
    add("--limit", type=positive, metavar="N", help="the first N pictures of each set")
    add("--warmup", type=_count, default=0, metavar="N", help="calls before each network's first picture (default: 0)")
    add(
        "--cold-start",
        action="store_true",
        help="a process of its own for each network and engine, as the published harness has it; shows what the first "
        "picture took and the mean without it",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is one")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: PyTorch's)")
    add(
        "-o", "--output", type=Path, default=Path("outputs/challenge"), metavar="DIR", help="default: outputs/challenge"
    )
    add("--resume", action="store_true", help="go on with what --output holds")
    add("--progress", action="store_true", help="show progress even when the output is not a terminal")
    return parser


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _weights_of(name: str, folder: Path | None) -> tuple[Path | str | None, str]:
    """What `python_models.create` takes, and what to call it."""
    if (found := published(name, folder)) is not None:
        return found, found.name
    if folder is None and python_models.bundled(name) is not None:
        return BUNDLED, BUNDLED
    return None, RANDOM


def _settings(args: argparse.Namespace, device: torch.device, sets: Mapping[str, Sequence[Pair]]) -> Record:
    return {
        "data": PHOTOGRAPHS if args.data is None else str(args.data.resolve()),
        "pictures": {name: len(pairs) for name, pairs in sets.items()},
        "weights": None if args.weights is None else str(args.weights.resolve()),
        "device": device.type,
        "threads": args.threads,
        "warmup": args.warmup,
        "cold_start": args.cold_start,
    }


def _measure(
    name: str,
    engines: Sequence[str],
    sets: Mapping[str, Sequence[Pair]],
    args: argparse.Namespace,
    process: Process,
    journal: Journal,
    own: Sequence[Record],
    shown: Callable[[Sequence[Any]], Iterator[Any]] = iter,
) -> None:
    """Append to the journal what it lacks of one network: this process' share of the pictures.

    `own` are the network's records so far.
    """
    done = {(r["engine"], r["set"], r["picture"]) for r in own if r["kind"] == "picture"}
    bad = {(r["set"], r["picture"]) for r in own if r["kind"] == "bad"}
    pairs = [(s, pair) for s, of_set in sets.items() for pair in of_set][process.rank :: process.world]
    pending = [(s, p) for s, p in pairs if (s, p.name) not in bad and any((e, s, p.name) not in done for e in engines)]
    measured = {r["engine"] for r in own if r["kind"] == "memory"}
    memory_due = process.first and not measured.issuperset(engines)
    if not pending and not memory_due:
        return
    weights, _ = _weights_of(name, args.weights)
    entry = python_models.card(name).entry if isinstance(weights, Path) else None
    contestant = Contestant(name, weights, process.device, engines, entry=entry)
    if process.first and FUSED in engines:
        journal.append({"kind": "fusion", "name": name, "refused": contestant.refused, "left": contestant.left})
    first, order = True, random.Random(0)
    for set_name, pair in shown(pending):
        check_interruption()
        where = {"name": name, "set": set_name, "picture": pair.name}
        try:
            records = contestant.run(pair, backwards=order.random() < 0.5, warmup=args.warmup if first else 0)
        except (ImageError, OSError) as error:
            journal.append({"kind": "bad", **where, "reason": str(error)})
            bad.add((set_name, pair.name))
            continue
        for record in records:
            journal.append({"kind": "picture", **where, "first": first, **record})
        first = False
    if memory_due:
        usable = [p for s, of_set in sets.items() for p in of_set if (s, p.name) not in bad]
        if (widest := largest(usable)) is not None:
            for engine, value in contestant.peaks(widest.load()[0]).items():
                journal.append({"kind": "memory", "name": name, "engine": engine, "peak_bytes": value})


def _measure_alone(
    name: str, engine: str, sets: Mapping[str, Sequence[Pair]], args: argparse.Namespace, device: str, settings: Record
) -> None:
    """`_measure` in a process of its own."""
    with thread_count(args.threads):
        journal = Journal(args.output, settings, resume=True)
        own = [r for r in journal.records() if r["name"] == name]
        _measure(name, [engine], sets, args, Process(0, 1, torch.device(device)), journal, own)


def _in_own_process(name: str, engine: str, *rest: Any) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_measure_alone, args=(name, engine, *rest))
    process.start()
    try:
        process.join()
    finally:
        process.terminate()
    if process.exitcode:
        raise TrainingError(f"{name}: the process that measured it ({engine}) ended with status {process.exitcode}")


def _row(name: str, counted: Record, records: Sequence[Record], sets: Sequence[str], weights: str) -> Record:
    own = [r for r in records if r["name"] == name]
    pictures = [r for r in own if r["kind"] == "picture"]
    # Of a picture that was measured again after an interruption the first measurement counts.
    pictures = list({(r["engine"], r["set"], r["picture"]): r for r in reversed(pictures)}.values())
    peaks = {r["engine"]: r["peak_bytes"] for r in own if r["kind"] == "memory"}
    engines = {}
    for engine in ENGINES:
        found = summary(pictures, sets, engine)
        if found is not None:
            engines[engine] = {**found, "peak_bytes": peaks.get(engine)}
    card = python_models.card(name)
    fusion = next((r for r in own if r["kind"] == "fusion"), None)
    differences = [r["difference"] for r in pictures if "difference" in r]
    both = len(engines) == len(ENGINES)
    return {
        "name": name,
        "title": card.title,
        "team": card.team,
        "weights": weights,
        **counted,
        "engines": engines,
        "speedup": engines[PLAIN]["runtime_ms"] / engines[FUSED]["runtime_ms"] if both else None,
        "difference": max(differences) if differences else None,
        "refused": [] if fusion is None else fusion["refused"],
        "not_fused": [] if fusion is None else fusion["left"],
    }


def _complexity(name: str, journal: Journal, known: Mapping[str, Record]) -> Record:
    if name not in known:
        found = asdict(complexity(name))
        journal.append({"kind": "complexity", "name": name, **found})
        return found
    return {key: value for key, value in known[name].items() if key not in ("kind", "name")}


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the files; 1 when a fused network is wrong or a picture was bad.

    Raises:
        ImageError, FileNotFoundError: of the data.
        TrainingError: the output folder holds another run, or another process of this run has ended.
        CheckpointError: of the weights.
        ValueError: arguments that do not fit together.
    """
    if args.weights is not None and not args.weights.is_dir():
        raise FileNotFoundError(f"--weights: {args.weights}: no such folder")
    if args.cold_start and args.warmup:
        raise ValueError("--cold-start: shows what happens without a warm-up; leave --warmup away")
    sets = photographs(args.limit) if args.data is None else find_sets(args.data, args.limit)
    names = expand(args.models, cases.model_names())
    if report.BASELINE not in names:
        names.append(report.BASELINE)  # what the scores compare with
    engines = [engine for engine in ENGINES if engine in args.engines]
    with joined(args.device) as process, thread_count(args.threads):
        if args.cold_start and process.world > 1:
            raise ValueError("--cold-start: takes one process, not torchrun")
        settings = _settings(args, process.device, sets)
        if process.first:
            journal = Journal(args.output, settings, resume=args.resume)
        process.wait()
        if not process.first:
            journal = Journal(args.output, settings, resume=True, rank=process.rank)
        if process.first:
            print(machine_line(machine()))
            total = sum(map(len, sets.values()))
            print(f"{len(names)} networks, {total} pictures ({', '.join(sets)}), {process.device}, in {args.output}")
        known: dict[str, list[Record]] = {name: [] for name in names}
        for record in journal.records():
            known.setdefault(record["name"], []).append(record)
        visible = process.first and (args.progress or sys.stderr.isatty())
        for number, name in enumerate(names, 1):
            title = f"{name} ({number} of {len(names)})"
            if args.cold_start:
                for engine in engines:
                    if visible:
                        print(f"{title}, {engine}", file=sys.stderr)
                    _in_own_process(name, engine, sets, args, process.device.type, settings)
                continue

            def shown(pending: Sequence[Any], title: str = title) -> Iterator[Any]:
                return iter(tqdm(pending, title, leave=False, disable=not visible))

            _measure(name, engines, sets, args, process, journal, known[name], shown)
        process.wait()
        return _conclude(args, names, sets, settings, journal) if process.first else 0


def _conclude(
    args: argparse.Namespace,
    names: Sequence[str],
    sets: Mapping[str, Sequence[Pair]],
    settings: Record,
    journal: Journal,
) -> int:
    records = list(journal.records())
    known = {r["name"]: r for r in records if r["kind"] == "complexity"}
    rows = []
    for name in names:
        check_interruption()
        counted = _complexity(name, journal, known)
        rows.append(_row(name, counted, records, list(sets), _weights_of(name, args.weights)[1]))
    report.add_scores(rows)
    bad = [r for r in records if r["kind"] == "bad" and r["name"] in names]
    table = report.markdown(rows, list(sets), cold_start=args.cold_start)
    notes = _notes(args, rows, sets)
    text = "\n".join([table, "", *notes]) + "\n"
    atomically(args.output / TABLE, lambda part: part.write_text(text, encoding="utf-8"))
    command = ["esr-kernels", *sys.argv[1:]]
    write_json(
        args.output / RESULTS,
        {"command": command, "machine": machine(), "settings": settings, "networks": rows, "bad": bad, "notes": notes},
    )
    written = [RESULTS, TABLE]
    try:
        report.plot(rows, next(iter(sets)), args.output / PLOT)
        written.append(PLOT)
    except ImportError:
        print("no plot: matplotlib is not installed (pip install esr-kernels[plot])", file=sys.stderr)
    print(text, end="")
    print(f"written   {', '.join(os.fspath(args.output / file) for file in written)}")
    for picture, reason in {r["picture"]: r["reason"] for r in bad}.items():
        print(f"error: picture {picture} left out: {reason}", file=sys.stderr)
    wrong = [
        row["name"]
        for row in rows
        if row["refused"] or (row["difference"] is not None and row["difference"] > TOLERANCE)
    ]
    if wrong:
        print(f"error: fused networks that differ from plain PyTorch: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong or bad else 0


def _notes(args: argparse.Namespace, rows: Sequence[Record], sets: Mapping[str, Sequence[Pair]]) -> list[str]:
    """Lines that belong below the table."""
    notes = ["FLOPs are multiply-adds as fvcore counts them; scores are against RLFN's run time in plain PyTorch."]
    if PHOTOGRAPHS in sets:
        notes.append("PSNR is of a few photographs: it is not comparable with that of the challenge's pictures.")
    random_ones = [row["name"] for row in rows if row["weights"] == RANDOM]
    if random_ones:
        where = nearby() if args.weights is None else args.weights
        missing = "" if len(random_ones) < len(rows) else f" (no published checkpoints in {where}; --weights DIR)"
        notes.append(f"RANDOM weights, their PSNR means nothing: {', '.join(random_ones)}{missing}.")
    own = [row["name"] for row in rows if row["weights"] == BUNDLED]
    if own:
        notes.append(f"This package's weights, trained on a few photographs: {', '.join(own)}.")
    unknown = [name for name, pairs in sets.items() if any(pair.high is None for pair in pairs)]
    if unknown:
        notes.append(f"No PSNR for {', '.join(unknown)}: high-resolution pictures are missing.")
    return notes
