"""Peak memory of the fused networks beside plain PyTorch.

    python -m bench.memory [--model NAME] [--size N] [--json FILE]

Counted is what a call needs beyond weights and picture, its result included: resident memory, once everything that is
made at first calls is there. Random weights; one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import esr_kernels
import python_models
from esr_kernels import cases, memory
from esr_kernels.timing import table


def engines(name: str) -> dict[str, nn.Module]:
    fused, plain = cases.model_pair(name)
    return {"fused": esr_kernels.optimize(fused), "eager": plain}


@torch.inference_mode()
def measure(name: str, size: int) -> dict[str, Any]:
    """Bytes at the peak of each engine, the lowest of three; None where the system does not tell."""
    row: dict[str, Any] = {"model": name, "size": size}
    for engine, model in engines(name).items():
        x = cases.random_image(model, 1, size, size)
        model(x)
        found = [memory.peak(partial(model, x)) for _ in range(3)]
        row[engine] = min((f for f in found if f is not None), default=None)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="all", metavar="NAME", help="default: all")
    parser.add_argument("--size", type=int, default=256, metavar="N", help="pixels a side (default: 256)")
    parser.add_argument("--json", metavar="FILE", help="also as JSON; -: instead of the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    memory.return_freed_blocks()
    rows = []
    for name in python_models.list_models() if args.model == "all" else [args.model]:
        rows.append(measure(name, args.size))
        if sys.stderr.isatty():
            print(name, file=sys.stderr)
        if args.json not in (None, "-"):  # after each: all of them take a quarter of an hour
            Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    if args.json == "-":
        print(json.dumps(rows))
        return 0

    def line(row: dict[str, Any]) -> list[str]:
        values = row["fused"], row["eager"]
        if None in values:
            return [row["model"], "-", "-", "-"]
        fused, eager = values
        return [row["model"], f"{fused / 1e6:.1f}", f"{eager / 1e6:.1f}", f"{fused / eager:.2f}"]

    print(table(["network", "fused, MB", "eager, MB", "fused / eager"], [line(r) for r in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
