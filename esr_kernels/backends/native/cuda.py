"""The operators on the compiled CUDA engine, or on the CPU where its emulator is loaded."""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ... import native
from ...dispatch import tf32_allowed
from ...library import run_plan_outputs
from ...plan import Plan
from . import backward, direct
from .engine import encode
from .operators import FORWARD, Call

# csrc/cuda/view.h
_FLOAT16, _BFLOAT16, _TF32, _TF32X3 = range(4)


@cache
def library() -> Any:
    """The namespace of the engine's registered functions (csrc/cuda/library.cu)."""
    return torch.ops.esr_emulator if native.emulated() else torch.ops.esr_native_cuda


def precision(dtype: torch.dtype) -> int:
    """How a call of this dtype multiplies; float32 as PyTorch's setting for convolutions allows."""
    if dtype == torch.float16:
        return _FLOAT16
    if dtype == torch.bfloat16:
        return _BFLOAT16
    return _TF32 if tf32_allowed() else _TF32X3


# Handles whose plan is gone; they wait for the next plan to be compiled, which never happens inside a trace.
_unreferenced: deque[int] = deque()


def release_unreferenced() -> None:
    """Free the plans inside the library that nothing refers to."""
    while _unreferenced:
        library().release_plan(_unreferenced.popleft())


class _Compiled:
    """A plan compiled for weights and inputs of some shapes, without the weights' values."""

    def __init__(self, plan: Plan, weights: list[Tensor], channels: list[int], precision: int, network: bool) -> None:
        release_unreferenced()
        program, constants = encode(plan)
        self.handle: int = library().compile_plan(program, constants, weights, channels, precision, network)
        weakref.finalize(self, _unreferenced.append, self.handle).atexit = False


# Everything that a compiled plan depends on; a few kilobytes each.
_PLANS = 1024
_compiled: OrderedDict[tuple[Any, ...], _Compiled] = OrderedDict()


def _compile(plan: Plan, weights: list[Tensor], inputs: list[Tensor], network: bool = False) -> _Compiled:
    """`network`: the weights are packed once for many runs, so that transforming them costs nothing."""
    x = inputs[0]
    multiply = precision(x.dtype)
    # csrc/cuda/switches.h
    ways = (network and os.environ.get("ESR_KERNELS_CUDA_WINOGRAD"), os.environ.get("ESR_KERNELS_CUDA_WGMMA"))
    key = (plan.to_json(), multiply, ways, x.device, *(w.shape for w in weights), *(t.shape[1] for t in inputs))
    found = _compiled.get(key)
    if found is None:
        found = _compiled[key] = _Compiled(plan, weights, [t.shape[1] for t in inputs], multiply, network)
        while len(_compiled) > _PLANS:
            _compiled.popitem(last=False)
    return found


def _on_cuda(operator: Callable[..., Call]) -> Callable[..., Any]:
    """Weights are packed by every call, in a launch of their own: nothing tells when a parameter has changed."""

    @wraps(operator)
    def run(*args: Any) -> Any:
        call = operator(*args)
        plan = _compile(call.plan, call.weights, call.inputs)
        library().run_plan(plan.handle, call.weights, call.inputs, call.outputs)
        return call.result

    return run


_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _prepared(plan: _Compiled, weights: list[Tensor]) -> Tensor:
    """The weights packed for a plan, kept until one of them changes."""
    if any(w.is_inference() for w in weights):  # they carry no version
        return library().pack_plan(plan.handle, weights)
    plans = _packed.get(weights[0])
    if plans is None:
        plans = _packed[weights[0]] = weakref.WeakKeyDictionary()
    signature = tuple((w.data_ptr(), w._version) for w in weights)
    found = plans.get(plan)
    if found is None or found[0] != signature:
        found = plans[plan] = (signature, library().pack_plan(plan.handle, weights))
    return found[1]


def run_plan(inputs: list[Tensor], weights: list[Tensor], plan: str) -> list[Tensor]:
    outputs = run_plan_outputs(inputs, weights, plan)
    compiled = _compile(Plan.from_json(plan), weights, inputs, network=True)
    if weights:
        library().execute_plan(compiled.handle, _prepared(compiled, weights), inputs, outputs)
    else:
        library().run_plan(compiled.handle, weights, inputs, outputs)
    return outputs


def _run(name: str, x: Tensor, arguments: tuple[Any, ...], results: list[Tensor]) -> None:
    getattr(library(), name)(*arguments, precision(x.dtype), results)


OPERATORS: dict[str, Callable[..., Any]] = (
    {f.__name__: _on_cuda(f) for f in FORWARD}
    | {"run_plan": run_plan}
    | backward.operators(_run)
    | direct.operators(_run, direct.as_it_is)
)
