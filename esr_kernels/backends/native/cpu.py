"""The operators on the compiled CPU engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ...library import feature_map, run_plan_outputs
from ...plan import Plan
from .. import reference
from . import backward, direct
from .engine import compiled_plan
from .operators import FORWARD, Call


def _on_cpu(operator: Callable[..., Call]) -> Callable[..., Any]:
    @wraps(operator)
    def run(*args: Any) -> Any:
        call = operator(*args)
        compiled_plan(call.plan, call.weights, compare=True).execute(call.inputs, call.outputs)
        return call.result

    return run


Reserved = tuple[Tensor, Tensor]  # a tensor, and the same with memory behind it

# Elements of the least tensor that the engine keeps maps in.
_LEAST = 1 << 20


def run_plan(
    inputs: list[Tensor],
    weights: list[Tensor],
    plan: str,
    spent: Sequence[int] = (),
    passed: Sequence[int] = (),
    reserved: Reserved | None = None,
    returned: int | None = None,
) -> list[Tensor]:
    """`esr::run_plan`, which in a graph keeps maps in memory that is free.

    Args:
        spent: indices of inputs that nothing reads afterwards.
        passed: indices of results that only other operations of the graph get: they take the memory of spent inputs, or
            have more than they need.
        reserved: memory for what the graph returns.
        returned: the index of that result, if it is one of this plan.
    """
    p = Plan.from_json(plan)
    compiled = compiled_plan(p, weights, compare=False)
    outputs = run_plan_outputs(inputs, weights, plan)
    results = list(outputs)
    left = sorted(spent, key=compiled.read_last.__getitem__, reverse=True)
    for k in sorted(range(len(outputs)), key=compiled.written_first.__getitem__):
        if k == returned and reserved is not None and _layout(reserved[0]) == _layout(outputs[k]):
            results[k], outputs[k] = reserved
            continue
        if k not in passed:
            results[k], outputs[k] = _with_a_ring(outputs[k], int(p.scales[p.outputs[k]]))
            continue
        layout = _layout(outputs[k])
        free = [i for i in left if i in compiled.takes[k] and _layout(inputs[i]) == layout]
        if free:
            left.remove(free[0])
        results[k] = outputs[k] = inputs[free[0]] if free else _enlarged(outputs[k], outputs[k].numel() * 5 // 4)
    lent = [reserved[1]] if reserved is not None and returned is None else []
    compiled.execute_over(inputs, outputs, spent, lent)
    return results


def reserve(x: Tensor, plan: str, k: int) -> Reserved:
    """Memory for result k of a plan, from an image of the size of its inputs."""
    p = Plan.from_json(plan)
    return _with_a_ring(run_plan_outputs([x], [], plan)[k], int(p.scales[p.outputs[k]]))


def _layout(t: Tensor) -> tuple[Any, ...]:
    return t.dtype, t.shape, t.stride()


def _enlarged(y: Tensor, elements: int) -> Tensor:
    """Uninitialised like `y`, with memory behind it; where no map lies in that, it is address space only."""
    return y if y.numel() < _LEAST else y.new_empty(elements).as_strided(y.shape, y.stride())


def _with_a_ring(y: Tensor, scale: int) -> Reserved:
    """Uninitialised like `y`, and the same with memory behind it for a ring of pixels, which maps have.

    Where that is little: it stays with the first, though it is not part of its storage.
    """
    n, c, h, w = y.shape
    elements = c * (h + 2 * scale) * (w + 2 * scale) + 64
    if n != 1 or y.numel() < _LEAST or not elements <= 1.05 * y.numel():
        return y, y
    enlarged = _enlarged(y, elements)
    return y.new_empty(0).set_(enlarged.untyped_storage()[: y.nbytes], 0, y.shape, y.stride()), enlarged


def selective_scan(
    u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, z: Tensor | None, *settings: Any
) -> Tensor:
    out = u.new_empty(u.shape)
    u, delta, b, c, to = map(_row, (u, delta, b, c, out))
    _run("selective_scan", u, (u, delta, a, b, c, d, None if z is None else _row(z), *settings), [to])
    return out


def _row(tokens: Tensor) -> Tensor:
    """[N, L, C] as [N, C, 1, L] with adjacent channels; tokens with gaps between them will do."""
    if tokens.stride(2) != 1:
        tokens = tokens.contiguous()
    return tokens.transpose(1, 2).unsqueeze(2)


def _run(name: str, x: Tensor, arguments: tuple[Any, ...], results: list[Tensor]) -> None:
    getattr(torch.ops.esr_native, name)(*arguments, results)


def window_attention(q: Tensor, *arguments: Any) -> Tensor:
    """csrc/cpu/direct.h; reads any strides."""
    out = feature_map(q, q.shape[1])
    if q.shape[0] > 0:
        _run("window_attention", q, (q, *arguments), [out])
    return out


# Gradients in PyTorch: this engine has none for them.
_IN_PYTORCH = ("selective_scan_backward", "window_attention_backward")

OPERATORS: dict[str, Callable[..., Any]] = (
    {f.__name__: _on_cpu(f) for f in FORWARD}
    | {"run_plan": run_plan, "selective_scan": selective_scan, "window_attention": window_attention}
    | {name: reference.OPERATORS[name] for name in _IN_PYTORCH}
    | backward.operators(_run)
    | direct.operators(_run, direct.dense_rows)
)
