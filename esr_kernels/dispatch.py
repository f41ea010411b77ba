"""Which backend runs a call, and why the others did not."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .errors import BackendError

FLOATS = frozenset({torch.float32, torch.float16, torch.bfloat16})
FLOATS_AND_DOUBLE = FLOATS | {torch.float64}


@dataclass(frozen=True)
class Implementation:
    """One operator of one backend, and which calls it can run.

    `accepts` takes the operator's arguments and returns None, or why this call cannot run; it is asked on
    every call, so most implementations leave it out and declare devices and dtypes, which are asked once.
    `compiles`: its kernels are compiled when they are first called with a memory layout or alignment.
    `reserve`: for plans of a graph, which use each other's memory: makes what `reserve` below returns; `function` takes
    what `run` below calls `memory` behind its arguments.
    """

    function: Callable[..., Any]
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype] = FLOATS
    accepts: Callable[..., str | None] | None = None
    compiles: bool = False
    reserve: Callable[..., Any] | None = None

    def why_not(self, device: str, dtype: torch.dtype) -> str | None:
        if device not in self.devices:
            return f"runs on {' and '.join(sorted(self.devices))}, not on {device}"
        if dtype not in self.dtypes:
            names = ", ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
            return f"takes {names}, not {str(dtype).removeprefix('torch.')}"
        return None


@dataclass
class Backend:
    """A named set of implementations; `probe` tells once why it cannot run on this machine (None: it can)."""

    name: str
    probe: Callable[[], str | None]
    implementations: dict[str, Implementation] = field(default_factory=dict)

    @property
    def reason(self) -> str | None:
        if not hasattr(self, "_reason"):
            self._reason = self.probe()
        return self._reason

    def why_not(self, operator: str, device: str, dtype: torch.dtype) -> str | None:
        if self.reason is not None:
            return self.reason
        implementation = self.implementations.get(operator)
        if implementation is None:
            return f"has no {operator}"
        return implementation.why_not(device, dtype)


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run on this machine.

    Attributes:
        name: "reference", "native-cpu", "native-cuda" or "triton".
        available: whether it can run here.
        reason: why not, or None.
        operators: names of the operators it implements here.
    """

    name: str
    available: bool
    reason: str | None
    operators: tuple[str, ...]


@lru_cache(maxsize=1)
def _backends() -> dict[str, Backend]:
    from .backends import native, reference, triton

    every = frozenset({"cpu", "cuda", "mps", "xpu", "meta"})
    plain = {
        name: Implementation(function, devices=every, dtypes=FLOATS_AND_DOUBLE)
        for name, function in reference.OPERATORS.items()
    }
    found = [
        Backend("reference", lambda: None, plain),
        Backend("native-cpu", native.probe_cpu, native.cpu_implementations()),
        Backend("native-cuda", native.probe_cuda, native.cuda_implementations()),
        Backend("triton", triton.probe, triton.implementations()),
    ]
    return {backend.name: backend for backend in found}


# The order in which a device's calls try the backends.
_ORDER = {"cpu": ("native-cpu", "reference"), "cuda": ("native-cuda", "triton", "reference")}
_NAMES = ("reference", "native-cpu", "native-cuda", "triton")
_ALIASES = {"native": {"cpu": "native-cpu", "cuda": "native-cuda"}}

_chosen: ContextVar[str | None] = ContextVar("esr_kernels_backend", default=None)
_decisions: dict[tuple[str, str, torch.dtype, str | None], Implementation] = {}


def _check_name(name: str, source: str) -> str:
    if name in _NAMES or name in _ALIASES:
        return name
    near = difflib.get_close_matches(name, [*_NAMES, *_ALIASES], n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{source}: unknown backend {name!r}, expected one of {', '.join(_NAMES)} or native{hint}")


def chosen_backend() -> str | None:
    """The backend asked for by `use_backend` or ESR_KERNELS_BACKEND, or None for the automatic choice."""
    name = _chosen.get()
    if name is None:
        name = os.environ.get("ESR_KERNELS_BACKEND") or None
        if name is not None:
            _check_name(name, "ESR_KERNELS_BACKEND")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operator called inside on the backend `name`.

    Args:
        name: "reference", "native-cpu", "native-cuda", "triton", or "native" for the native one of the
            input's device.

    Raises:
        ValueError: no backend has that name.
        BackendError: it cannot run on this machine. A call inside that it cannot run raises it too; nothing
            falls back in silence.

    The choice belongs to the current thread or task. It is made when an operator runs, also inside a
    compiled graph.
    """
    _check_name(name, "name")
    if name not in _ALIASES:
        reason = _backends()[name].reason
        if reason is not None:
            raise BackendError(f"backend {name} cannot run here: {reason}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def list_backends() -> list[BackendStatus]:
    """Every backend, whether it can run on this machine, and if not why."""
    return [
        BackendStatus(b.name, b.reason is None, b.reason, tuple(b.implementations) if b.reason is None else ())
        for b in _backends().values()
    ]


def tf32_allowed() -> bool:
    """Whether PyTorch's setting lets convolutions multiply float32 as tf32."""
    try:
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
    except AttributeError:
        return torch.backends.cudnn.allow_tf32


def select(operator: str, device: str, dtype: torch.dtype, chosen: str | None) -> Implementation:
    """The implementation that runs `operator` on tensors of `dtype` on `device`.

    Raises:
        BackendError: none can, or the chosen one cannot; with each backend's reason.
    """
    backends = _backends()
    if chosen is not None:
        name = _ALIASES.get(chosen, {}).get(device, chosen)
        if name not in backends:
            raise BackendError(f"backend {chosen} cannot run {operator}: there is no native backend for {device}")
        reason = backends[name].why_not(operator, device, dtype)
        if reason is not None:
            raise BackendError(f"backend {name} cannot run {operator}: {reason}")
        return backends[name].implementations[operator]
    reasons = []
    for name in _ORDER.get(device, ("reference",)):
        reason = backends[name].why_not(operator, device, dtype)
        if reason is None:
            return backends[name].implementations[operator]
        reasons.append(f"{name}: {reason}")
    raise BackendError(f"no backend can run {operator}: {'; '.join(reasons)}")


def compiles(operator: str, device: str, dtype: torch.dtype) -> bool:
    """Whether what runs `operator` here compiles kernels for each layout of its tensors."""
    try:
        return select(operator, device, dtype, chosen_backend()).compiles
    except BackendError:
        return False


def _first_choice(operator: str, first: Tensor, chosen: str | None) -> Implementation:
    """What is to run a call of which this is the first tensor, unless it does not accept the call."""
    key = (operator, first.device.type, first.dtype, chosen)
    implementation = _decisions.get(key)
    if implementation is None:
        implementation = _decisions[key] = select(*key)
    return implementation


def reserve(x: Tensor, plan: str, k: int) -> Any:
    """Memory for result k of a plan with images of the size of x, for those who run the plans before it; or None."""
    function = _first_choice("run_plan", x, chosen_backend()).reserve
    return None if function is None else function(x, plan, k)


def run(operator: str, args: tuple[Any, ...], memory: tuple[Any, ...] = ()) -> Any:
    """Run a registered operator.

    Args:
        args: the first is a tensor or a list of tensors.
        memory: of a plan in a graph: indices of inputs that nothing reads afterwards, indices of results that only
            the graph gets, what `reserve` returned and for which of the plan's results, if any.
    """
    first: Tensor = args[0] if isinstance(args[0], Tensor) else args[0][0]
    chosen = chosen_backend()
    implementation = _first_choice(operator, first, chosen)
    if implementation.accepts is not None:
        reason = implementation.accepts(*args)
        if reason is not None:
            if chosen is not None:
                raise BackendError(f"backend {chosen} cannot run {operator}: {reason}")
            return _run_next(operator, args, first, implementation, reason)
    return implementation.function(*args, *memory) if implementation.reserve else implementation.function(*args)


def _run_next(operator: str, args: tuple[Any, ...], first: Tensor, refused: Implementation, reason: str) -> Any:
    """The backends after the one whose `accepts` refused this call."""
    backends = _backends()
    device, dtype = first.device.type, first.dtype
    reasons = []
    for name in _ORDER.get(device, ("reference",)):
        why = backends[name].why_not(operator, device, dtype)
        if why is None:
            implementation = backends[name].implementations[operator]
            if implementation is refused:
                why = reason
            elif implementation.accepts is not None:
                why = implementation.accepts(*args)
            if why is None:
                return implementation.function(*args)
        reasons.append(f"{name}: {why}")
    raise BackendError(f"no backend can run {operator}: {'; '.join(reasons)}")
