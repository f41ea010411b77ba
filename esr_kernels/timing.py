"""Timing several functions fairly, and describing the machine that was timed.

Functions take turns round by round, so that a machine whose speed drifts treats them alike; quote ratios of medians.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import atomically

__all__ = ["EventClock", "Timing", "alternate", "machine", "machine_line", "table", "thread_count", "write_json"]

MINIMUM_ROUNDS = 3  # what a budget cannot cut: a median of fewer samples says nothing
MAXIMUM_CALLS = 10_000


@dataclass(frozen=True)
class Timing:
    """Samples of one function, in seconds per call.

    Attributes:
        samples: one per round, at least one.
        calls: calls that each sample is the mean of.
    """

    samples: tuple[float, ...]
    calls: int = 1

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("samples: expected at least one, got none")

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def minimum(self) -> float:
        return min(self.samples)

    @property
    def iqr(self) -> float:
        """Distance between the quartiles; 0 for a single sample."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return high - low

    def to_json(self) -> dict[str, Any]:
        return {
            "median": self.median,
            "minimum": self.minimum,
            "iqr": self.iqr,
            "rounds": len(self.samples),
            "calls": self.calls,
            "samples": list(self.samples),
        }


class EventClock:
    """Seconds of work on the current CUDA stream, to be called like `time.perf_counter`.

    Every call records an event and waits for it, so the difference of two calls is the time from one event to the
    next on the device. Consecutive events are added up in double precision: CUDA gives the distance of two events in
    float32 milliseconds, too coarse for a short kernel long after the clock was started.
    """

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None
        self._seconds = 0.0

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        if self._last is not None:
            self._seconds += self._last.elapsed_time(event) / 1e3
        self._last = event
        return self._seconds


def _on_cuda(result: object) -> bool:
    if isinstance(result, Tensor):
        return result.is_cuda
    if isinstance(result, dict):
        return any(_on_cuda(r) for r in result.values())
    return isinstance(result, (list, tuple)) and any(_on_cuda(r) for r in result)


def _synchronized(synchronize: Callable[[], object]) -> Callable[[], float]:
    def clock() -> float:
        synchronize()
        return time.perf_counter()

    return clock


def _sample(function: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        function()
    return (clock() - start) / calls


class _Display:
    """One line on a terminal that shows how far the rounds are; nothing elsewhere."""

    WIDTH = 24

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.active = sys.stderr.isatty()

    def __call__(self, done: int, timings: dict[str, list[float]]) -> None:
        if not self.active:
            return
        filled = self.WIDTH * done // self.rounds
        medians = "  ".join(f"{name} {statistics.median(s) * 1e3:.4g} ms" for name, s in timings.items() if s)
        bar = "#" * filled + "." * (self.WIDTH - filled)
        line = f"[{bar}] {done}/{self.rounds}  {medians}"
        sys.stderr.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
        sys.stderr.flush()

    def close(self) -> None:
        if self.active:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def alternate(
    functions: dict[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    progress: bool = False,
    synchronize: Callable[[], object] | None = None,
    budget: float | None = None,
    sample_time: float = 0.0,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time functions in turns: every round calls each of them once, in an order shuffled by `seed`.

    Args:
        functions: name -> function of no arguments, at least one.
        rounds: samples to take of each, at least 1.
        warmup: untimed calls of each before the first round. The device of what they return decides the clock: CUDA
            events for a CUDA tensor (or a list, tuple or dict with one), else the wall clock.
        progress: show a line on a terminal (stderr) while it runs.
        synchronize: waits for a device's pending work; with it the wall clock is used around every sample.
        budget: seconds after which no further round starts, once there are three.
        sample_time: seconds a sample shall last at least: shorter functions are called several times per sample.
        seed: of the order.

    Returns:
        name -> Timing, in the order of `functions`.

    Raises:
        ValueError: no function, or a number out of range.
    """
    if not functions:
        raise ValueError("functions: expected at least one, got none")
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    if warmup < 0:
        raise ValueError(f"warmup: expected at least 0, got {warmup}")
    if budget is not None and budget <= 0:
        raise ValueError(f"budget: expected seconds above 0, got {budget}")

    clocks: dict[str, Callable[[], float]] = {}
    calls: dict[str, int] = {}
    for name, function in functions.items():
        result = None
        for _ in range(warmup):
            result = function()
        if synchronize is not None:
            clocks[name] = _synchronized(synchronize)
        else:
            clocks[name] = EventClock() if _on_cuda(result) else time.perf_counter
        calls[name] = 1
        if sample_time > 0:
            once = max(_sample(function, 1, clocks[name]), 1e-9)
            calls[name] = min(max(round(sample_time / once), 1), MAXIMUM_CALLS)

    samples: dict[str, list[float]] = {name: [] for name in functions}
    order = list(functions)
    shuffler = random.Random(seed)
    display = _Display(rounds) if progress else None
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(rounds):
            if budget is not None and done >= MINIMUM_ROUNDS and time.perf_counter() - start > budget:
                break
            shuffler.shuffle(order)
            for name in order:
                samples[name].append(_sample(functions[name], calls[name], clocks[name]))
            if display is not None:
                display(done + 1, samples)
    finally:
        if collecting:
            gc.enable()
        if display is not None:
            display.close()
    return {name: Timing(tuple(s), calls[name]) for name, s in samples.items()}


@contextlib.contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """Run what is inside with `threads` PyTorch threads (None: as many as now), then restore the number.

    Raises:
        ValueError: `threads` is below 1.
    """
    before = torch.get_num_threads()
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Instruction sets that decide which kernel runs, as Linux names them.
_SIMD = (
    "sse4_2",
    "f16c",
    "fma",
    "avx",
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "bf16",
    "sve",
    "sve2",
)


def _output(*command: str, cwd: Path | None = None) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> dict[str, Any]:
    model: str | None = None
    flags: set[str] = set()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            key, _, value = line.partition(":")
            key = key.strip().lower()
            if key == "model name" and model is None:
                model = value.strip()
            elif key in ("flags", "features") and not flags:
                flags = set(value.split())
    if model is None and sys.platform == "darwin":
        model = _output("sysctl", "-n", "machdep.cpu.brand_string")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "simd": [name for name in _SIMD if name in flags],
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": cores,
        "threads": torch.get_num_threads(),
    }


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
                "driver": driver.splitlines()[0] if driver else None,
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
            }
        )
    return found


def _git() -> dict[str, Any] | None:
    """Commit of the repository this package lies in; None when it is installed elsewhere."""
    root = Path(__file__).resolve().parent.parent
    top = _output("git", "rev-parse", "--show-toplevel", cwd=root)
    # An environment inside somebody else's repository is not a checkout of this project.
    if not top or Path(top).resolve() != root:
        return None
    commit = _output("git", "rev-parse", "HEAD", cwd=root)
    changes = _output("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", cwd=root)
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What a timing depends on, ready for JSON.

    Returns:
        time (UTC, ISO 8601), cpu (model, architecture, simd, torch_capability, cores, threads), memory_bytes, gpus (one
        dict each, empty without CUDA), os, versions (python, torch, triton, numpy, esr_kernels; None: not installed),
        native (build information of the compiled library and the instruction set it uses, empty without one) and git
        (commit, dirty; None outside a checkout).
    """
    from . import __version__, native

    build = native.build_info()
    if build and native.load() is None:
        build = {**build, "active_simd": torch.ops.esr_native.get_cpu_capability()}
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "memory_bytes": _memory(),
        "gpus": _gpus(),
        "os": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "numpy": _version("numpy"),
            "esr_kernels": __version__,
        },
        "native": build,
        "git": _git(),
    }


def machine_line(info: dict[str, Any]) -> str:
    """The result of `machine` in one line."""
    cpu = info["cpu"]
    parts = [f"{cpu['model']} ({cpu['cores']} cores, {cpu['torch_capability']})"]
    for gpu in info["gpus"]:
        parts.append(f"{gpu['name']} (driver {gpu['driver']})")
    versions = info["versions"]
    parts.append(f"torch {versions['torch']}, esr_kernels {versions['esr_kernels']}")
    git = info["git"]
    if git and git["commit"]:
        parts.append(f"commit {git['commit'][:12]}{' with changes' if git['dirty'] else ''}")
    return "; ".join(parts)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` as JSON to `path`, or leave what was there untouched.

    Raises:
        ValueError: the folder does not exist, `path` is a folder, or a number is not finite.
        TypeError: something in `value` is no JSON.
        OSError: the folder cannot be written.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise ValueError(f"path: there is no folder {target.parent} to write {target.name} to")
    if target.is_dir():
        raise ValueError(f"path: expected a file, {target} is a folder")
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    atomically(target, lambda part: part.write_text(text, encoding="utf-8"))
    return target


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], align: str | None = None) -> str:
    """Text columns under headers.

    Args:
        headers: one per column.
        rows: cells, as many per row as headers.
        align: one letter per column, "l" or "r"; the default is left for the first column and right for the others.

    Raises:
        ValueError: a row or `align` has another length, or `align` another letter.
    """
    align = "l" + "r" * (len(headers) - 1) if align is None else align
    if len(align) != len(headers) or set(align) - {"l", "r"}:
        raise ValueError(f"align: expected {len(headers)} letters l or r, got {align!r}")
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"rows: expected {len(headers)} cells, got {len(row)}: {list(row)}")
    widths = [max([len(h), *(len(row[i]) for row in rows)]) for i, h in enumerate(headers)]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if a == "l" else c.rjust(w) for c, w, a in zip(cells, widths, align, strict=True)]
        return "  ".join(padded).rstrip()

    return "\n".join([line(headers), line(["-" * w for w in widths]), *(line(row) for row in rows)])
