"""The operators on the compiled CPU engine."""

from __future__ import annotations

from collections.abc import Callable
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


def run_plan(inputs: list[Tensor], weights: list[Tensor], plan: str) -> list[Tensor]:
    outputs = run_plan_outputs(inputs, weights, plan)
    compiled_plan(Plan.from_json(plan), weights, compare=False).execute(inputs, outputs)
    return outputs


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
