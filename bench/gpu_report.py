"""Everything there is to measure on a machine with a GPU, in one command of less than ten minutes.

    python -m bench.gpu_report --json bench/results/gpu.json --markdown bench/results/gpu.md

Each part runs in a process of its own with its share of the time; the report is written again after every part.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import gpu_parts, jobs, roofline
from bench.gpu_parts import Job, Options
from esr_kernels import cases
from esr_kernels.commands._arguments import expand, json_file, model_name, seconds, size
from esr_kernels.timing import machine_line, table, write_json

# Part -> its weight when the time is shared out; they run in this order.
WEIGHTS = {
    "build": 60.0,
    "tests": 90.0,
    "ceilings": 15.0,
    "tune": 90.0,
    "operators": 120.0,
    "switches": 40.0,
    "training": 30.0,
    "models": 130.0,
    "overhead": 40.0,
}
COMMANDS = {
    "build": [sys.executable, "setup.py", "build_ext", "--inplace"],
    "tests": [sys.executable, "-m", "pytest", "tests", "-q", "-m", "gpu"],
}
# Names the file of Triton configurations that goes before the package's own.
CONFIGS_VARIABLE = "ESR_KERNELS_TRITON_CONFIGS"


# --- the parts --------------------------------------------------------------------------------------------------


def pytest_summary(lines: Sequence[str]) -> dict[str, Any]:
    """The closing line of a pytest run, and the tests that failed or could not run."""
    failed = [m[1] for line in lines if (m := re.match(r"(?:FAILED|ERROR) (\S+::\S+|\S+\.py)", line))]
    closing = [line.strip("= ") for line in lines if re.search(r"\d+ \w+.* in [\d.]+s", line)]
    return {"closing": closing[-1] if closing else None, "failed": list(dict.fromkeys(failed))}


def run_command_part(part: str, limit: float) -> dict[str, Any]:
    finished = jobs.run_command(COMMANDS[part], limit, echo=True, lines=2000)
    record = {"command": shlex.join(COMMANDS[part]), **finished.to_json()}
    if part == "tests":
        record |= pytest_summary(finished.tail)
    record["tail"] = finished.tail[-jobs.TAIL_LINES :]
    state = jobs.new_state({part: record})
    if finished.returncode is None:
        state["error"] = [f"stopped after {limit:.0f} s"]
    return state


def run_worker_part(
    part: str, limit: float, options: Options, results: dict[str, Any], file: Path, environment: dict[str, str]
) -> dict[str, Any]:
    def command(state: Path, left: float) -> list[str]:
        return [sys.executable, "-u", "-m", "bench.gpu_parts", Job(part, options, str(state), left).to_json()]

    return jobs.run_in_processes(command, results, limit, file, environment)


def run_parts(
    parts: Sequence[str],
    report: dict[str, Any],
    budget: float,
    run: Callable[[str, float, dict[str, Any]], dict[str, Any]],
    save: Callable[[dict[str, Any]], object],
) -> None:
    """Run parts into `report`, saving it after each; one that raises is recorded and the next one runs.

    Args:
        run: part, seconds, the results it has already -> its state.
    """
    start = time.monotonic()
    for i, part in enumerate(parts):
        limit = jobs.share(part, parts[i:], budget - (time.monotonic() - start), WEIGHTS)
        begun = time.monotonic()
        print(f"{part}: {limit:.0f} s", flush=True)
        done = report.get(part, {}).get("results", {})
        if limit <= 0:
            state = jobs.new_state(done) | {"not_run": {"everything": "no time was left"}}
        else:
            try:
                state = run(part, limit, done)
            except Exception as error:
                state = jobs.new_state(done) | {"error": jobs.last_lines(error)}
        not_run = state.pop("not_run")
        state.pop("running")
        report[part] = state | {"limit": limit, "seconds": time.monotonic() - begun}
        report["not_run"].pop(part, None)
        if not_run:
            report["not_run"][part] = not_run
        add_floors(report)
        save(report)


def add_floors(report: dict[str, Any]) -> None:
    """Floors, shares and speed-ups of all records, by the report's own ceilings."""
    ceilings = roofline.Ceilings.of(report.get("ceilings", {}).get("results", {}))
    for part in ("operators", "training", "models"):
        if part in report:
            results = report[part]["results"]
            report[part]["results"] = {key: roofline.judge(record, ceilings) for key, record in results.items()}


def resumed(old: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    """What an existing report holds that need not be measured again: failed items and commands are.

    Raises:
        ValueError: it is of another commit or device.
    """
    for name, value in identity.items():
        if old.get(name) != value:
            raise ValueError(f"--resume: the report's {name} is {old.get(name)!r}, here it is {value!r}")
    kept: dict[str, Any] = {"not_run": old["not_run"], "commands": old["commands"]}
    for part in WEIGHTS:
        if part in old:
            results = old[part]["results"] if part not in COMMANDS else {}
            good = {key: record for key, record in results.items() if "error" not in record}
            kept[part] = old[part] | {"results": good}
    return kept


def _tuned(report: dict[str, Any]) -> dict[str, Any] | None:
    """The Triton configurations that the report's tuning found."""
    return report.get("tune", {}).get("results", {}).get("triton", {}).get("configs")


# --- tables -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """A table of the report; `left`: how many columns are text; `notes`: lines below it."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    notes: Sequence[str] = field(default=())

    @property
    def align(self) -> str:
        return "l" * self.left + "r" * (len(self.headers) - self.left)

    def text(self) -> str:
        body = [table(self.headers, self.rows, self.align)] if self.rows else []
        return "\n".join([self.title, *body, *(f"  {note}" for note in self.notes)])

    def markdown(self) -> str:
        lines = [f"## {self.title}", ""]
        if self.rows:
            marks = ["---" if a == "l" else "---:" for a in self.align]
            cells = [self.headers, marks, *([c.replace("|", "\\|") for c in row] for row in self.rows)]
            lines += [*("| " + " | ".join(row) + " |" for row in cells), ""]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)]).rstrip() + "\n"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def problems(part: str, report: dict[str, Any]) -> list[str]:
    """What went wrong in a part: one line each, of the part, its items and their engines."""
    found = [f"{part}: {report[part]['error'][-1]}"] if report[part]["error"] else []
    for key, record in report[part]["results"].items():
        if "error" in record:
            found.append(f"{key}: {record['error'][-1]}")
        for engine, entry in record.get("engines", {}).items():
            if "failed" in entry:
                found.append(f"{key}: {engine}: {entry['failed']}")
        found += [f"{key}: not fused: {line}" for line in record.get("not_fused", [])]
        if record.get("returncode"):
            found.append(f"{record['command']} ended with status {record['returncode']}")
    return found


def _notes(part: str, report: dict[str, Any]) -> list[str]:
    """What went wrong, and how much was not run; the report has every item's reason."""
    not_run = list(report["not_run"].get(part, {}).items())
    if not not_run:
        return problems(part, report)
    key, reason = not_run[0]
    more = f", and {len(not_run) - 1} more" if len(not_run) > 1 else ""
    return [*problems(part, report), f"not run: {key} ({reason}){more}"]


def _compared(part: str, report: dict[str, Any]) -> Section:
    """One row per record: the floor (a network's also with one kernel per layer), the fastest engine of each side."""
    limits = {"floor us": "floor_us"} | ({"by layer": "layer_floor_us"} if part == "models" else {})
    headers = [part, "input", "dtype", "bound", *limits, "ours us", "engine", "share"]
    headers += ["PyTorch us", "engine", "speed-up", "noise"]
    rows = []
    for record in report[part]["results"].values():
        if "fastest" not in record:
            continue
        own, peer = (record["engines"].get(record[side], {}) for side in ("fastest", "fastest_pytorch"))
        against = " with Inductor" if any(e.startswith(gpu_parts.INDUCTOR) for e in record["engines"]) else ""
        row = [record["name"] + against, "x".join(map(str, record["shape"])), record["precision"]]
        row.append(record.get("bound", "-"))
        row += [_number(record.get(limit)) for limit in limits.values()]
        row += [_number(own.get("median_us")), record["fastest"] or "-"]
        row += [_percent(own.get("share")), _number(peer.get("median_us")), record["fastest_pytorch"] or "-"]
        rows.append([*row, "-" if "speedup" not in own else f"{own['speedup']:.2f}x", _percent(record["noise"])])
    return Section(part, headers, rows, 4, _notes(part, report))


def _engines(report: dict[str, Any]) -> Section:
    """One row per engine of every network."""
    headers = ["models", "input", "dtype", "engine", "us", "minimum", "share", "speed-up", "memory MB", "error"]
    rows = []
    for record in report["models"]["results"].values():
        for engine, entry in record.get("engines", {}).items():
            if "median_us" not in entry:
                continue
            memory = entry.get("memory_bytes")
            row = [record["name"], "x".join(map(str, record["shape"])), record["precision"], engine]
            row += [_number(entry["median_us"]), _number(entry["minimum_us"]), _percent(entry.get("share"))]
            row += [_number(entry.get("speedup"), 2), _number(None if memory is None else memory / 1e6)]
            rows.append([*row, f"{entry['check']['relative']:.1e}"])
    return Section("models, all engines", headers, rows, 4)


def _switches(report: dict[str, Any]) -> Section:
    """One row per record and way of launching: with a switch off and on."""
    headers = ["switch", "of", "input", "dtype", "engine", "off us", "on us", "gain", "noise", "error off", "error on"]
    rows = []
    for key, record in report["switches"]["results"].items():
        engines = record.get("engines", {})
        switch = key.partition(" | ")[0]
        for name, on in engines.items():
            off = engines.get(name.replace(f" with {switch}", ""), {})
            if switch not in name or "median_us" not in on or "median_us" not in off:
                continue
            row = [switch, record["name"], "x".join(map(str, record["shape"])), record["precision"]]
            row += [name.replace(f" with {switch}", ""), _number(off["median_us"]), _number(on["median_us"])]
            row += [f"{off['median_us'] / on['median_us']:.2f}x", _percent(record["noise"])]
            rows.append([*row, *(f"{e['check']['relative']:.1e}" for e in (off, on))])
    return Section("switches", headers, rows, 5, _notes("switches", report))


def _overhead(report: dict[str, Any]) -> Section:
    rows = []
    for key, record in report["overhead"]["results"].items():
        rows += [[key, name, _number(e["median_us"]), "us a call"] for name, e in record.get("engines", {}).items()]
        for cache, found in record.get("first_call_seconds", {}).items():
            rows += [[key, f"{cache}: {step}", _number(value, 3), "s"] for step, value in found.items()]
    return Section("overhead", ["overhead", "of", "host time", "unit"], rows, 2, _notes("overhead", report))


def _tests(record: dict[str, Any]) -> list[str]:
    return [record["closing"] or "no closing line", *(f"failed: {name}" for name in record["failed"])]


def sections(report: dict[str, Any], parts: Sequence[str]) -> Iterator[Section]:
    """The tables of those parts that the report has."""
    for part in parts:
        if part not in report:
            continue
        results, notes = report[part]["results"], _notes(part, report)
        if part in COMMANDS:
            done = [f"{r['command']}: {r['seconds']:.0f} s" for r in results.values()]
            closing = [line for r in results.values() for line in _tests(r)] if part == "tests" else []
            yield Section(part, [], [], 0, [*done, *closing, *notes])
        elif part == "ceilings":
            rows = [[key, _number(r["value"], 2), r["unit"]] for key, r in results.items() if "value" in r]
            yield Section(part, ["ceiling", "value", "unit"], rows, 1, notes)
        elif part == "tune":
            tuned = _tuned(report)
            found = [] if tuned is None else [f"{len(tuned.get('configurations', {}))} configurations"]
            yield Section(part, [], [], 0, [*found, *notes])
        elif part == "switches":
            yield _switches(report)
        elif part == "overhead":
            yield _overhead(report)
        else:
            yield _compared(part, report)
            if part == "models":
                yield _engines(report)


# --- the command ------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m bench.gpu_report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=tuple(WEIGHTS), default=list(WEIGHTS), help="default: all")
    parser.add_argument("--json", type=json_file, metavar="FILE", help="write the report to FILE")
    parser.add_argument("--markdown", type=json_file, metavar="FILE", help="write the tables to FILE as Markdown")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on with a report of this commit and device")
    parser.add_argument("--budget", type=seconds, default=540.0, metavar="SECONDS", help="default: 540")
    parser.add_argument("--dtype", nargs="+", choices=tuple(gpu_parts.PRECISIONS), default=list(gpu_parts.PRECISIONS))
    parser.add_argument("--models", nargs="+", type=model_name, default=["span", "rlfn"], metavar="NAME")
    sizes = [(256, 256), (339, 510)]
    parser.add_argument(
        "--sizes", nargs="+", type=size, default=sizes, metavar="HxW", help="of images; operators take the first"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no Inductor")
    parser.add_argument("--commit", metavar="NAME", help="of the sources, where they are no checkout")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the command out; its times mean nothing"
    )
    return parser


def _machine() -> dict[str, Any]:
    """What `machine` finds in a new process, after a build too."""
    code = "import json; from esr_kernels.timing import machine; print(json.dumps(machine()))"
    finished = jobs.run_command([sys.executable, "-c", code], 120)
    if finished.returncode != 0:
        raise RuntimeError("\n".join(["the package cannot be imported:", *finished.tail]))
    return json.loads(finished.tail[-1])


def _identity(args: argparse.Namespace, info: dict[str, Any]) -> dict[str, Any]:
    """What two runs must share for their numbers to stand in one report."""
    commit = args.commit or (info["git"] or {}).get("commit")
    return {"commit": commit, "device": info["gpus"][0]["name"] if args.device == "cuda" else args.device}


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every part ran, 1 when one did not or found something wrong, 2 when nothing could be measured."""
    args = _parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_report: no CUDA device; this command measures a GPU", file=sys.stderr)
        return 2
    options = Options(args.device, args.dtype, expand(args.models, cases.model_names()), args.sizes, args.quick)
    target: Path | None = args.json or args.resume
    info = _machine()
    report: dict[str, Any] = {"not_run": {}, "commands": []}
    try:
        if args.resume is not None:
            report = resumed(json.loads(args.resume.read_text(encoding="utf-8")), _identity(args, info))
    except (OSError, ValueError, KeyError) as error:
        print(f"gpu_report: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "-m", "bench.gpu_report", *(sys.argv[1:] if argv is None else argv)])
    report |= {**_identity(args, info), "machine": info, "commands": [*report["commands"], command]}
    parts = [part for part in WEIGHTS if part in args.parts]

    with tempfile.TemporaryDirectory() as temporary:
        # Beside the report, so that an interrupted part leaves what it had.
        folder, name = (Path(temporary), "report") if target is None else (target.resolve().parent, target.stem)
        configs = folder / f"{name}.configs.json"

        def save(report: dict[str, Any]) -> None:
            if target is not None:
                write_json(target, report)
            if tuned := _tuned(report):
                write_json(configs, tuned)

        def run(part: str, limit: float, done: dict[str, Any]) -> dict[str, Any]:
            if part in COMMANDS:
                state = run_command_part(part, limit)
                if part == "build":
                    report["machine"] = _machine()  # what was built is part of it
                return state
            environment = {CONFIGS_VARIABLE: str(configs)} if _tuned(report) else {}
            return run_worker_part(part, limit, options, done, folder / f"{name}.{part}.partial.json", environment)

        save(report)
        run_parts(parts, report, args.budget, run, save)

    print("\n" + machine_line(report["machine"]))
    print("\n\n".join(section.text() for section in sections(report, parts)))
    if args.markdown is not None:
        top = f"# {report['device']}\n\n{machine_line(report['machine'])}\n"
        args.markdown.write_text("\n".join([top, *(s.markdown() for s in sections(report, list(WEIGHTS)))]), "utf-8")
    return 1 if any(problems(part, report) for part in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
