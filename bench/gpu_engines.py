"""Ways to compute the same result, checked and then timed side by side, also from CUDA graphs."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import esr_kernels
from bench import common, jobs
from esr_kernels import cases
from esr_kernels.graphs import CudaRecorder
from esr_kernels.timing import Timing, alternate

# float32 is exact float32; tf32 is float32 tensors with the matrix units' short products allowed.
PRECISIONS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}


@dataclass(frozen=True)
class Options:
    """The command line's choices that a part needs."""

    device: str = "cuda"
    dtypes: Sequence[str] = tuple(PRECISIONS)
    models: Sequence[str] = ("span", "rlfn")
    sizes: Sequence[Sequence[int]] = ((256, 256), (339, 510))
    quick: bool = False

    @property
    def graphs(self) -> bool:
        return self.device == "cuda"

    @property
    def timing(self) -> dict[str, Any]:
        """Arguments of `alternate`."""
        return {"rounds": 5, "budget": 1.0} if self.quick else {"rounds": 15, "budget": 4.0, "sample_time": 0.002}


@contextmanager
def switched_on(variable: str) -> Iterator[None]:
    """An environment variable is 1."""
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


@dataclass(frozen=True)
class Engine:
    """One way to compute the result of each of `inputs`; `backend` is chosen once for a pass over all of them.

    `graph`: whether a CUDA graph can be captured of it. `switch`: an environment variable that is 1 meanwhile.
    """

    call: Callable[[Any], Any]
    inputs: Sequence[Any]
    backend: str | None = None
    graph: bool = True
    switch: str | None = None

    def every(self) -> list[Any]:
        chosen = nullcontext() if self.backend is None else esr_kernels.use_backend(self.backend)
        with chosen, nullcontext() if self.switch is None else switched_on(self.switch):
            return [self.call(x) for x in self.inputs]

    def first(self) -> Any:
        return replace(self, inputs=self.inputs[:1]).every()[0]


@dataclass(frozen=True)
class Subject:
    """Something to measure.

    Attributes:
        make: engine name -> how to make it; plain PyTorch first.
        exact: the results for the first input, float64 on the CPU.
        tolerance: engine name, eager's relative error -> the relative error allowed.
        dtype: of the results.
        inference: whether gradients are off.
    """

    make: dict[str, Callable[[], Engine]]
    exact: Sequence[Tensor]
    tolerance: Callable[[str, float], float]
    dtype: torch.dtype
    inference: bool = True


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def require_device(device: str) -> None:
    """Raises LostError where an error has made the GPU unusable for this process."""
    try:
        synchronize(device)
    except Exception as error:
        raise jobs.LostError(f"the GPU is lost to this process: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def captured(engine: Engine) -> Callable[[], list[Any]]:
    """A CUDA graph of one pass of the engine: replays it and returns its results."""
    recorder = CudaRecorder(torch.device("cuda", torch.cuda.current_device()))
    recorder.warm_up(engine.every)
    # Its clean-up after a failed capture is what the engines that follow depend on.
    graph, results = recorder.capture(engine.every)  # type: ignore[arg-type]

    def replay() -> list[Any]:
        graph()
        return list(results)

    return replay


@contextmanager
def precision(name: str) -> Iterator[None]:
    """TF32 allowed or not, and cuDNN trying its algorithms."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = matmul.allow_tf32 = name == "tf32"
    cudnn.benchmark = True
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


def _worst(results: Any, subject: Subject, tolerance: float) -> cases.Check:
    """The check of a result, or of the gradient that is furthest off."""
    found = [results] if isinstance(results, Tensor) else results
    checks = [cases.compare(r, e, tolerance, subject.dtype) for r, e in zip(found, subject.exact, strict=True)]
    return max(checks, key=lambda check: (not check.ok, check.relative))


def _memory(engine: Engine, before: int, device: str) -> int | None:
    """Bytes that an engine which has run holds beyond `before` and takes for one call, its inputs not counted."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    engine.first()
    return torch.cuda.max_memory_allocated() - before


def _allocated(device: str) -> int:
    if device != "cuda":
        return 0
    gc.collect()
    return torch.cuda.memory_allocated()


def microseconds(timing: Timing, calls: int = 1) -> dict[str, Any]:
    """A timing of `calls` calls, for one call."""
    return {
        "median_us": timing.median * 1e6 / calls,
        "minimum_us": timing.minimum * 1e6 / calls,
        "iqr_us": timing.iqr * 1e6 / calls,
        "rounds": len(timing.samples),
        "calls": timing.calls * calls,
    }


def measure(subject: Subject, options: Options) -> dict[str, Any]:
    """Check every engine and its CUDA graph, then time those that are right, taking turns.

    Returns:
        engines: name -> check, memory_bytes and times, or why it failed; noise: by how much the two medians of an
        engine that was entered twice differ.
    """
    report: dict[str, dict[str, Any]] = {}
    passes: dict[str, Callable[[], list[Any]]] = {}
    eager_error = math.inf
    inputs = 1
    mode = torch.inference_mode if subject.inference else nullcontext

    def admit(name: str, result: Any) -> bool:
        nonlocal eager_error
        if name == common.EAGER:
            eager_error = _worst(result, subject, math.inf).relative
        check = _worst(result, subject, subject.tolerance(name.removesuffix(" graph"), eager_error))
        report[name] = {"check": check.to_json()} | ({} if check.ok else {"failed": f"wrong result: {check}"})
        return check.ok

    for name, make in subject.make.items():
        graph = f"{name} graph"
        before = _allocated(options.device)
        try:
            engine = make()
            inputs = len(engine.inputs)
            with mode():
                if admit(name, engine.first()):
                    report[name]["memory_bytes"] = _memory(engine, before, options.device)
                    passes[name] = engine.every
                    if options.graphs and engine.graph:
                        replay = captured(engine)
                        if admit(graph, replay()[0]):
                            passes[graph] = replay
        except Exception as error:
            report[graph if name in passes else name] = {"failed": _reason(error)}
            require_device(options.device)
    if not passes:
        return {"engines": report, "noise": None}
    last = next(reversed(passes))
    with mode():
        timings = alternate({**passes, "again": passes[last]}, warmup=2, **options.timing)
    again = timings.pop("again")
    for name, timing in timings.items():
        report[name] |= microseconds(timing, inputs)
    return {"engines": report, "noise": abs(again.median / timings[last].median - 1)}
