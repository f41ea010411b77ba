"""What `optimize` makes of every network in its plain form: fused share, difference, speed-up.

    python -m bench.optimize_plain --size 64x64 --threads 1 --json bench/results/optimize_plain.json

The plain form is ordinary PyTorch (`nn.Conv2d`, in-place activations), as a participant would write it.
"""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

import torch

import esr_kernels
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
        "name": name,
        "whole": report.whole,
        "share": report.share,
        "left": report.left,
        "notes": report.notes,
        "check": check.to_json(),
        "timings": {k: t.to_json() for k, t in timings.items()},
        "speedup": timings["plain"].median / timings["optimized"].median,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", type=model_name, metavar="NAME", help="default: all")
    parser.add_argument("--size", type=size, default=(64, 64), metavar="HxW", help="default: 64x64")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="default: 1")
    parser.add_argument("--rounds", type=positive, default=7, metavar="N", help="default: 7")
    parser.add_argument("--budget", type=seconds, default=5.0, metavar="SECONDS", help="per network; default: 5")
    parser.add_argument("--json", type=json_file, metavar="FILE", help="also write everything to FILE")
    args = parser.parse_args()
    records = []
    with thread_count(args.threads):
        for name in expand(args.model or ["all"], cases.model_names()):
            print(name, file=sys.stderr)
            records.append(measure(name, *args.size, args.rounds, args.budget))
    rows = [
        [
            r["name"],
            "one operator" if r["whole"] else f"{len(r['left'])} kinds plain",
            "-" if r["share"] is None else f"{r['share']:.1%}",
            f"{r['check']['max_abs']:.1e}",
            f"{r['check']['relative']:.1e}",
            *(f"{r['timings'][k]['median'] * 1e3:.1f}" for k in ("plain", "optimized")),
            f"{r['speedup']:.2f}x",
        ]
        for r in records
    ]
    print(machine_line(machine()))
    print(f"1x3x{args.size[0]}x{args.size[1]} float32, {args.threads} thread(s), medians of rounds in turns")
    headers = ["network", "form", "fused", "max |diff|", "relative", "plain ms", "optimized ms", "speed"]
    print(table(headers, rows, "llrrrrrr"))
    if args.json is not None:
        write_json(
            args.json, {"machine": machine(), "size": list(args.size), "threads": args.threads, "results": records}
        )
        print(f"written to {args.json}")
    return 0 if all(r["check"]["ok"] for r in records) else 1


if __name__ == "__main__":
    sys.exit(main())
