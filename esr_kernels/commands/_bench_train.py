"""`esr-kernels bench --train`: steps of training against plain PyTorch, their time and peak memory."""

from __future__ import annotations

import argparse
import inspect
import multiprocessing
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import cases, memory
from ..dispatch import use_backend
from ..timing import alternate, table, thread_count

OURS, OURS_CHANNELS_LAST, TRAINING_FORM = "esr_kernels", "esr_kernels channels_last", "training form"
OWN = (OURS, OURS_CHANNELS_LAST, TRAINING_FORM)
# Gradients are sums over all pixels of all images, and those of a network pass all its layers.
TOLERANCE = {"operator": cases.NETWORK_TOLERANCE, "model": 1e-3}

Shape = tuple[int, int, int]  # batch, height, width


@dataclass(frozen=True)
class Training:
    """What is trained: a model by L1 loss and Adam, or an operator, whose step is forward and backward.

    Attributes:
        kind: "model" or "operator".
        name: the model, or the operator's case.
        shape: batch, height, width.
        dtype: of the operator's tensors; a model keeps float32 weights and runs under autocast.
        device: "cpu" or "cuda".
        backend: of ours, or None for the automatic choice.
    """

    kind: str
    name: str
    shape: Shape
    dtype: torch.dtype
    device: str
    backend: str | None

    def engines(self, against: Sequence[str]) -> list[str]:
        own = [OURS, TRAINING_FORM] if self.kind == "model" else [OURS, OURS_CHANNELS_LAST]
        if self.kind == "model" and not self._training_form():
            own = [OURS]
        return [*own, *against]

    def _training_form(self) -> bool:
        import python_models

        return "deploy" in inspect.signature(type(python_models.create(self.name))).parameters

    def make(self, engine: str) -> tuple[Callable[[], Any], Callable[[], list[Tensor]]]:
        """A step, and the gradients of its parameters (a model) or of all tensors (an operator)."""
        make = self._model if self.kind == "model" else self._operator
        step, gradients = make(engine)
        backend = self.backend if engine in OWN else None

        def chosen(call: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                with nullcontext() if backend is None else use_backend(backend):
                    return call()

            return run

        return chosen(step), chosen(gradients)

    def exact(self) -> list[Tensor]:
        """The gradients in float64."""
        make = self._model if self.kind == "model" else self._operator
        return make("float64")[1]()

    def _model(self, engine: str) -> tuple[Callable[[], Any], Callable[[], list[Tensor]]]:
        import python_models

        fused, plain = cases.model_pair(self.name)
        cases.check_size(fused, *self.shape[1:])
        double = engine == "float64"
        device, dtype = ("cpu", torch.float64) if double else (self.device, torch.float32)
        image = cases.random_image(fused, *self.shape).to(device, dtype)
        model: Any = fused if engine in OWN else plain
        if engine == TRAINING_FORM:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = python_models.create(self.name, deploy=False)
        model = model.to(device, dtype).train().requires_grad_()
        if engine == "channels_last":
            model = model.to(memory_format=torch.channels_last)
            image = image.contiguous(memory_format=torch.channels_last)
        scale = int(model.scale)
        parameters = list(model.parameters())
        optimizer = torch.optim.Adam(parameters, 1e-6)  # the weights stay what they were
        generator = torch.Generator().manual_seed(1)
        shape = (self.shape[0], 3, self.shape[1] * scale, self.shape[2] * scale)
        wanted = (torch.rand(shape, generator=generator) * float(model.data_range)).to(device, dtype)
        network = torch.compile(model) if engine == "inductor" else model
        half = not double and self.dtype != torch.float32

        def backward() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, self.dtype if half else torch.bfloat16, enabled=half):
                result = network(image)
            F.l1_loss(result.to(dtype), wanted).backward()

        def step() -> Tensor:
            backward()
            optimizer.step()
            return parameters[0]

        def gradients() -> list[Tensor]:
            backward()
            return [p.grad.detach().clone() for p in parameters if p.grad is not None]

        return step, gradients

    def _operator(self, engine: str) -> tuple[Callable[[], Any], Callable[[], list[Tensor]]]:
        case = next(case for case in cases.CASES if case.name == self.name)
        layout = torch.channels_last if engine.endswith("channels_last") else torch.contiguous_format
        arguments = case.arguments(*self.shape, dtype=self.dtype, device=self.device, memory_format=layout)
        call = case.fused if engine in OWN else case.plain
        if engine == "float64":
            arguments = cases.double(arguments)
        if engine == "inductor":
            torch._dynamo.reset()
            call = torch.compile(call)
        found = [t for value in arguments.values() for t in ([value] if isinstance(value, Tensor) else value or [])]
        leaves = [t.requires_grad_() for t in found if isinstance(t, Tensor)]
        with torch.no_grad():
            shape = case.plain(arguments).shape
        seed = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(leaves[0].device, leaves[0].dtype)
        seed = seed.contiguous(memory_format=layout)

        def gradients() -> list[Tensor]:
            return list(torch.autograd.grad(call(arguments), leaves, seed))

        return gradients, gradients


# --- memory -----------------------------------------------------------------------------------------------------------


def _peak_here(training: Training, engine: str, threads: int, queue: Any) -> None:
    """In a process of its own: the bytes a step needs beyond what there was before it."""
    memory.return_freed_blocks()
    with thread_count(threads):
        step, _ = training.make(engine)
        for _ in range(2):
            step()
        queue.put(memory.peak(step, training.device))


def peak_memory(training: Training, engine: str, threads: int) -> int | None:
    """Bytes that a step needs on top of the model, its gradients' optimiser and the images; None where Linux does not
    tell."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_peak_here, args=(training, engine, threads, queue))
    process.start()
    process.join()
    return None if process.exitcode != 0 or queue.empty() else queue.get()


# --- the comparison ---------------------------------------------------------------------------------------------------


def _error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest error of any gradient, relative to that gradient's largest value."""
    if len(got) != len(exact):
        return float("inf")
    return max(cases.relative_error(g, e) for g, e in zip(got, exact, strict=True))


def measure(training: Training, args: argparse.Namespace, threads: int) -> dict[str, Any]:
    """Check every engine's gradients, then time those that are right; the record for the JSON."""
    report: dict[str, dict[str, Any]] = {}
    record: dict[str, Any] = {
        "kind": training.kind,
        "name": training.name,
        "shape": list(training.shape),
        "dtype": str(training.dtype).removeprefix("torch."),
        "device": training.device,
        "threads": threads,
        "not_fused": [],
        "ok": False,
        "problem": None,
        "engines": report,
        "speedup": {},
    }
    exact = training.exact()
    steps: dict[str, Callable[[], Any]] = {}
    for engine in training.engines(args.against):
        report[engine] = {}
        step, gradients = training.make(engine)
        if engine != TRAINING_FORM:  # its parameters are others; tests prove that its gradients are right
            error = report[engine]["error"] = _error(gradients(), exact)
            allowed = TOLERANCE[training.kind] if training.dtype == torch.float32 else cases.PEER_TOLERANCE * 10
            if not error <= allowed:
                report[engine]["skipped"] = f"wrong gradients: relative error {error:.1e}, allowed {allowed:.0e}"
                if engine in OWN:
                    record["problem"] = report[engine]["skipped"]
                    return record
                continue
        steps[engine] = step
    timings = alternate(steps, rounds=args.rounds, warmup=2, progress=True, budget=args.budget)
    for engine, timing in timings.items():
        report[engine] |= timing.to_json() | {"peak_bytes": peak_memory(training, engine, threads)}
    record["speedup"] = {
        own: {peer: t.median / timings[own].median for peer, t in timings.items() if peer not in OWN}
        for own in timings
        if own in OWN
    }
    record["ok"] = True
    return record


def rows(records: Sequence[dict[str, Any]]) -> str:
    """The records as a table: an engine a line."""
    headers = ["step of", "batch", "dtype", "threads", "engine", "ms", "ratio", "peak MB", "error"]
    lines = []
    for record in records:
        shape = "x".join(map(str, record["shape"]))
        for engine, entry in record["engines"].items():
            line = [record["name"], shape, record["dtype"], str(record["threads"]), engine]
            if "median" not in entry:
                lines.append([*line, "FAILED" if engine in OWN else "-", "-", "-", "-"])
                continue
            ours = record["engines"][OURS]
            peak, error = entry["peak_bytes"], entry.get("error")
            line += [f"{entry['median'] * 1e3:.1f}", f"{entry['median'] / ours['median']:.2f}x"]
            line += ["-" if peak is None else f"{peak / 1e6:.1f}", "-" if error is None else f"{error:.1e}"]
            lines.append(line)
    return table(headers, lines, "lllrlrrrr")
