"""Peak memory of the fused networks beside plain PyTorch.

    python -m bench.memory [--model NAME [NAME ...]] [--size N] [--json FILE]

Counted is what a call needs beyond weights and picture, its result included: resident memory, once everything that is
made at first calls is there. Random weights; one thread. The least of three calls, of fewer where they take more than a
minute. FILE keeps what it has of other networks and sizes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import esr_kernels
import python_models
from esr_kernels import cases, files, memory
from esr_kernels.timing import table


def engines(name: str) -> dict[str, nn.Module]:
    fused, plain = cases.model_pair(name)
    return {"fused": esr_kernels.optimize(fused), "eager": plain}


# Of an image with which everything that is made at first calls is made.
_FIRST = 64
_ENOUGH_SECONDS = 60


@torch.inference_mode()
def measure(name: str, size: int) -> dict[str, Any]:
    """Bytes at the peak of each engine; None where the system does not tell."""
    row: dict[str, Any] = {"model": name, "size": size}
    for engine, model in engines(name).items():
        model(cases.random_image(model, 1, _FIRST, _FIRST))
        x = cases.random_image(model, 1, size, size)
        begin, found = time.monotonic(), []
        while len(found) < 3 and time.monotonic() - begin < _ENOUGH_SECONDS:
            found.append(memory.peak(partial(model, x)))
        row[engine] = min((f for f in found if f is not None), default=None)
    return row


def saved(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of a file of this command, by network and size."""
    rows = json.loads(path.read_text()) if path.exists() else []
    return {(row["model"], row["size"]): row for row in rows}


def line(row: dict[str, Any]) -> list[str]:
    fused, eager = row["fused"], row["eager"]
    if fused is None or eager is None:
        return [row["model"], str(row["size"]), "-", "-", "-"]
    return [row["model"], str(row["size"]), f"{fused / 1e6:.1f}", f"{eager / 1e6:.1f}", f"{fused / eager:.2f}"]


def main() -> int:
    names = python_models.list_models()
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", nargs="+", choices=names, default=names, metavar="NAME", dest="models", help="default: all"
    )
    parser.add_argument("--size", type=int, default=256, metavar="N", help="pixels a side (default: 256)")
    parser.add_argument("--json", metavar="FILE", help="also as JSON; -: instead of the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    memory.return_freed_blocks()
    path = Path(args.json) if args.json not in (None, "-") else None
    rows = []
    for name in tqdm(args.models, disable=None):
        rows.append(measure(name, args.size))
        if path is not None:  # after each: all of them take long
            text = json.dumps(list((saved(path) | {(name, args.size): rows[-1]}).values()), indent=1) + "\n"
            files.atomically(path, lambda temporary, text=text: temporary.write_text(text))
    if args.json == "-":
        print(json.dumps(rows))
    else:
        print(table(["network", "size", "fused, MB", "eager, MB", "fused / eager"], [line(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
