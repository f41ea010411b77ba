"""What `optimize` makes of every network in its plain form: fused share, difference, speed-up.

    python -m bench.optimize_plain --json bench/results/optimize_plain.json
    python -m bench.optimize_plain --table bench/results/optimize_plain.json

The plain form is ordinary PyTorch (`nn.Conv2d`, in-place activations), as a participant would write it. Every network
has a process and a time limit of its own. FILE is written after each: a run that was interrupted goes on with what FILE
does not have from the same commit with the same options. The second form prints the table of such a file.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import esr_kernels
from bench import jobs
from esr_kernels import cases
from esr_kernels.commands._arguments import expand, json_file, model_name, positive, seconds, size
from esr_kernels.timing import alternate, machine, machine_line, table, thread_count, write_json


def measure(name: str, height: int, width: int, rounds: int, budget: float) -> dict[str, Any]:
    """One network: the report's figures, the error against float64, and both times in turns."""
    _, plain = cases.model_pair(name)
    fast = esr_kernels.optimize(plain, sizes=[(height, width)])
    report = fast.report()
    x = cases.random_image(plain, 1, height, width)
    with torch.inference_mode():
        reference = copy.deepcopy(plain).double()(cases.double(x))
        check = cases.compare(fast(x), reference, cases.network_tolerance(torch.float32, 0.0))
        timings = alternate({"plain": lambda: plain(x), "optimized": lambda: fast(x)}, rounds=rounds, budget=budget)
    return {
        "whole": report.whole,
        "share": report.share,
        "left": report.left,
        "notes": report.notes,
        "check": check.to_json(),
        "timings": {k: t.to_json() for k, t in timings.items()},
        "speedup": timings["plain"].median / timings["optimized"].median,
    }


def write_measured(path: str, name: str, options: dict[str, Any]) -> None:
    """What the process of one network does."""
    with thread_count(options["threads"]):
        write_json(path, measure(name, *options["size"], options["rounds"], options["budget"]))


def measure_apart(name: str, options: dict[str, Any], limit: float) -> dict[str, Any]:
    """`measure` in a process of its own; {"error": ...} where it fails or takes longer than `limit` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "record.json"))
        code = f"from bench.optimize_plain import write_measured; write_measured({path!r}, {name!r}, {options!r})"
        finished = jobs.run_command([sys.executable, "-c", code], limit)
        if finished.returncode is None:
            return {"error": f"not finished after {limit:.0f} s"}
        if finished.returncode:
            return {"error": (finished.tail or ["no output"])[-1]}
        record: dict[str, Any] = json.loads(Path(path).read_text())
        return record


def describe(results: dict[str, Any]) -> str:
    """The machine and the table of what a file has."""
    options, rows = results["options"], []
    for name, r in results["networks"].items():
        if "error" in r:
            rows.append([name, r["error"], *["-"] * 6])
            continue
        rows.append(
            [
                name,
                "one operator" if r["whole"] else f"{len(r['left'])} kinds plain",
                "-" if r["share"] is None else f"{r['share']:.1%}",
                f"{r['check']['max_abs']:.1e}",
                f"{r['check']['relative']:.1e}",
                *(f"{r['timings'][k]['median'] * 1e3:.1f}" for k in ("plain", "optimized")),
                f"{r['speedup']:.2f}x",
            ]
        )
    headers = ["network", "form", "fused", "max |diff|", "relative", "plain ms", "optimized ms", "speed"]
    height, width = options["size"]
    lines = [machine_line(results["machine"])]
    lines.append(f"1x3x{height}x{width} float32, {options['threads']} thread(s), medians of rounds in turns")
    return "\n".join([*lines, table(headers, rows, "llrrrrrr")])


def earlier(path: Path | None, results: dict[str, Any]) -> dict[str, Any]:
    """The networks that a file has from the same commit with the same options."""
    if path is None or not path.is_file():
        return {}
    found = json.loads(path.read_text())
    commits = [(r["machine"]["git"] or {}).get("commit") for r in (found, results)]
    same = found.get("options") == results["options"] and commits[0] == commits[1]
    return {name: r for name, r in found.get("networks", {}).items() if same and "error" not in r}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", type=model_name, metavar="NAME", help="default: all")
    parser.add_argument("--size", type=size, default=(64, 64), metavar="HxW", help="default: 64x64")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="default: 1")
    parser.add_argument("--rounds", type=positive, default=7, metavar="N", help="default: 7")
    parser.add_argument("--budget", type=seconds, default=5.0, metavar="SECONDS", help="for timing; default: 5")
    parser.add_argument("--limit", type=seconds, default=600.0, metavar="SECONDS", help="per network; default: 600")
    parser.add_argument("--json", type=json_file, metavar="FILE", help="also write everything to FILE")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of FILE and measure nothing")
    args = parser.parse_args()
    if args.table is not None:
        print(describe(json.loads(args.table.read_text())))
        return 0
    options = {"size": list(args.size), "threads": args.threads, "rounds": args.rounds, "budget": args.budget}
    results: dict[str, Any] = {"machine": machine(), "options": options, "networks": {}}
    before = earlier(args.json, results)
    for name in expand(args.model or ["all"], cases.model_names()):
        print(name, file=sys.stderr)
        results["networks"][name] = before.get(name) or measure_apart(name, options, args.limit)
        if args.json is not None:
            write_json(args.json, {**results, "networks": before | results["networks"]})
    print(describe(results))
    records = results["networks"].values()
    return 0 if all("error" not in r and r["check"]["ok"] for r in records) else 1


if __name__ == "__main__":
    sys.exit(main())
