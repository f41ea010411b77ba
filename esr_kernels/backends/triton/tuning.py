"""Measures the configurations of the GPU at hand.

    python -m esr_kernels.backends.triton.tuning FILE [--seconds 600] [--dtype float16 ...]

Every configuration that a kernel can have is compiled first, by several processes and without the GPU; those that spill
or do not fit are left out. The others are run, compared with PyTorch and timed in a CUDA graph. The file is used by
ESR_KERNELS_TRITON_CONFIGS=FILE, and belongs into `configs/` to ship with the package.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...cases import CASES, DTYPES, OperatorCase
from ...dispatch import use_backend
from ...timing import write_json
from . import configs, resources
from .configs import SPACE, Config

LABELS = ("float16", "bfloat16", "tf32", "float32")
SIZE = (256, 256)
# How much faster a configuration has to be to replace the one found so far.
_MARGIN = 0.99
# Relative to the largest value: far above rounding, far below a wrong result.
_TOLERANCE = {"float16": 2e-2, "bfloat16": 1e-1, "tf32": 2e-2, "float32": 1e-4}


class Task(NamedTuple):
    """A configuration to try: `case` in this layout runs a kernel whose configuration has the key."""

    label: str
    case: str
    layout: torch.memory_format
    training: bool
    key: str
    config: Config


def tasks(labels: Sequence[str], arch: int) -> list[Task]:
    """Everything to try, the convolutions of half types first; each key with the first case that uses it."""
    found: list[Task] = []
    seen: set[str] = set()
    for label in labels:
        for training in (False, True):
            for case, layout in ((c, layout) for c in resources.FUSED_CASES for layout in resources.layouts(c)):
                for item in resources.case_launches(case, arch, label, backward=training, layout=layout):
                    if item.config is None or item.config in seen:
                        continue
                    seen.add(item.config)
                    space = SPACE[item.config.partition("/")[0]]
                    found += [Task(label, case.name, layout, training, item.config, config) for config in space]
    order = list(SPACE)
    return sorted(found, key=lambda t: (labels.index(t.label), t.training, order.index(t.key.partition("/")[0])))


def problem(task: Task, arch: int) -> str | None:
    """Why the task's configuration cannot be used, found by compiling it; None: it can."""
    case = _case(task.case)

    def chosen(key: str) -> Config | None:
        return task.config if key == task.key else None

    launches = resources.case_launches(
        case, arch, task.label, backward=task.training, layout=task.layout, config=chosen
    )
    try:
        found = (resources.inspect(item, arch).problem for item in launches if item.config == task.key)
        return next((p for p in found if p is not None), None)
    except Exception as error:  # the compiler gave up
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _case(name: str) -> OperatorCase:
    return next(case for case in CASES if case.name == name)


def _problems(found: Sequence[Task], arch: int, processes: int, deadline: float) -> Iterator[tuple[Task, str | None]]:
    if processes <= 1:
        for task in found:
            yield task, problem(task, arch)
        return
    # Started anew: a process forked from one that uses the GPU may not.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [(task, pool.submit(problem, task, arch)) for task in found]
        for task, future in futures:
            if time.monotonic() > deadline:
                pool.shutdown(wait=False, cancel_futures=True)
                return
            yield task, future.result()


def graph_time(function: Callable[[], object], repeats: int = 20, calls: int = 5) -> float:
    """Median seconds of a call, replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def tune(
    seconds: float = 600.0,
    labels: Sequence[str] = LABELS,
    log: Callable[[str], object] = print,
    *,
    device: str = "cuda",
    size: tuple[int, int] = SIZE,
    measure: Callable[[Callable[[], object]], float] = graph_time,
    processes: int | None = None,
) -> dict[str, Any]:
    """Find the fastest configuration for every key.

    Args:
        seconds: after which no further key is begun; those not reached keep their defaults.
        labels: of the dtypes, "float16", "bfloat16", "tf32", "float32".
        log: gets a line per key.
        device, size, measure: where, on what images and with what clock.
        processes: that compile at once; None: one per core.

    Returns:
        The content of a configuration file (`configs.read`), with every time measured under "times".
    """
    deadline = time.monotonic() + seconds
    name, capability = configs._device()
    arch = 10 * capability[0] + capability[1] if capability > (0, 0) else 90
    # Kernels are compiled for one of the architectures that are known here.
    target = max((a for a in resources.ARCHITECTURES if a <= arch), default=resources.ARCHITECTURES[0])
    todo = tasks(labels, target)
    best: dict[str, Config] = {}
    times: dict[str, dict[str, float | str]] = {}
    groups: dict[str, list[tuple[Task, str | None]]] = {}
    count = (os.cpu_count() or 1) if processes is None else processes

    def finish(key: str) -> None:
        group = groups.pop(key)
        task = group[0][0]
        usable = [t.config for t, reason in group if reason is None]
        times[key] = {str(tuple(t.config)): reason for t, reason in group if reason is not None}
        config, measured = _fastest(task, usable, best, device, size, measure)
        times[key] |= measured
        if config is not None:
            best[key] = config
            log(f"{key}: {config}, {measured[str(tuple(config))]:.3e} s ({len(usable)} tried)")

    expected = {task.key: 0 for task in todo}
    for task in todo:
        expected[task.key] += 1
    for task, reason in _problems(todo, target, count, deadline):
        groups.setdefault(task.key, []).append((task, reason))
        if len(groups[task.key]) == expected[task.key] and time.monotonic() < deadline:
            finish(task.key)
    left = sorted(set(expected) - set(times))
    if left:
        log(f"not reached: {', '.join(left)}")
    return {
        "device": name,
        "capability": list(capability),
        "measured": True,
        "triton": triton.__version__,
        "configurations": {key: configs.entry(c) for key, c in sorted(best.items())},
        "times": times,
        "not_reached": left,
    }


def _fastest(
    task: Task,
    usable: Sequence[Config],
    best: dict[str, Config],
    device: str,
    size: tuple[int, int],
    measure: Callable[[Callable[[], object]], float],
) -> tuple[Config | None, dict[str, float | str]]:
    """The fastest of the usable configurations whose results are right, and each one's time or what was wrong."""
    case = _case(task.case)
    dtype = DTYPES["float32" if task.label == "tf32" else task.label]
    arguments = case.arguments(1, *size, dtype=dtype, device=device, memory_format=task.layout)
    measured: dict[str, float | str] = {}
    found: tuple[float, Config] | None = None
    with resources.tf32(task.label == "tf32"), use_backend("triton"):
        run, exact = _runner(case, arguments, task.training)
        for config in usable:
            with configs.chosen_by({**best, task.key: config}.get):
                try:
                    error = _error(run(), exact)
                    if not error <= _TOLERANCE[task.label]:
                        measured[str(tuple(config))] = f"wrong by {error:.1e}"
                        continue
                    seconds = measure(run)
                except Exception as failure:
                    measured[str(tuple(config))] = f"{type(failure).__name__}: {failure}"
                    continue
            measured[str(tuple(config))] = seconds
            if found is None or seconds < _MARGIN * found[0]:
                found = seconds, config
    return None if found is None else found[1], measured


def _runner(
    case: OperatorCase, arguments: dict[str, Any], training: bool
) -> tuple[Callable[[], Sequence[Tensor]], Sequence[Tensor]]:
    """A call of the case and its result in plain PyTorch with float32 sums; with `training` the gradients too."""
    single = {k: v.float() if isinstance(v, Tensor) else [t.float() for t in v] for k, v in arguments.items()}
    if not training:
        with torch.no_grad(), resources.tf32(False):
            exact: Sequence[Tensor] = [case.plain(single)]

        def forward() -> Sequence[Tensor]:
            with torch.no_grad():
                return [case.fused(arguments)]

        return forward, exact

    def leaves(named: dict[str, Any]) -> list[Tensor]:
        return [t.requires_grad_() for v in named.values() for t in ([v] if isinstance(v, Tensor) else v)]

    ours, plain = leaves(arguments), leaves(single)
    with resources.tf32(False):
        out = case.plain(single)
        seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.device)
        exact = torch.autograd.grad(out, plain, seed)
    seed = seed.to(ours[0].dtype)
    return lambda: torch.autograd.grad(case.fused(arguments), ours, seed), exact


def _error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return max(
        float((r.float() - e).abs().max() / e.abs().max().clamp_min(1e-12)) for r, e in zip(results, exact, strict=True)
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m esr_kernels.backends.triton.tuning",
        description="Measure the Triton configurations of the GPU at hand.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no further kernel after it (default: 600)")
    parser.add_argument("--dtype", nargs="+", choices=LABELS, default=list(LABELS), help="default: all")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tuning: no CUDA device; this command measures a GPU", file=sys.stderr)
        return 2
    write_json(options.file, tune(options.seconds, options.dtype))
    return 0


if __name__ == "__main__":
    sys.exit(main())
