"""Plans in a graph that use the memory of its other tensors."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from .. import dispatch
from ..backends import reference
from ..functional import decomposes, unobserved
from ..plan import Plan
from .capture import adaptive_max_pool2d, inverse_root, statistic
from .pooling import convolution, local_variance, max_pool2d, whole
from .workspace import UPSAMPLES, aten

ops = torch.ops.esr

# Of what lies between plans, operations whose result is a new tensor: not their input, and no view of it.
_NEW = (
    adaptive_max_pool2d,
    convolution,
    inverse_root,
    local_variance,
    max_pool2d,
    statistic,
    aten.convolution.default,
    aten.reflection_pad2d.default,
    aten.sigmoid.default,
    *UPSAMPLES,
)


@whole
def run_plan(inputs: list[Tensor], weights: list[Tensor], plan: str, *memory: Any) -> list[Tensor]:
    """`esr::run_plan` in a graph; `memory` as in `dispatch.run`."""
    args = (inputs, weights, plan)
    if decomposes():
        return reference.run_plan(*args)
    return dispatch.run("run_plan", args, memory) if _is_alone(*args) else ops.run_plan(*args)


@whole
def reserve(x: Tensor, plan: str, k: int) -> Any:
    """`dispatch.reserve` where plans use each other's memory, else None."""
    return dispatch.reserve(x, plan, k) if not decomposes() and _is_alone([x]) else None


def _is_alone(inputs: list[Tensor], *args: Any) -> bool:
    """Whether no gradients are needed, and nobody sees more of the graph than its result."""
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)) and unobserved((inputs, *args))


def lend_memory(graph: fx.Graph, scale: int | None) -> None:
    """Tell plans which of their inputs nothing reads afterwards, and which of their results stay in the graph; and
    reserve the memory of what the last one returns, `scale` times as large as the image, for those before it.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    calls = [n for n in graph.nodes if n.target is ops.run_plan.default]
    if len(calls) < 2:
        return

    def ends_in(value: fx.Node, call: fx.Node) -> bool:
        readers = [user for user in value.users if user is not call]
        return _is_new(value) and all(_is_new(user) and place[user] < place[call] for user in readers)

    image = next(n for n in graph.nodes if n.op == "placeholder")
    output = graph.output_node()
    result: Any = output.args[0]
    reserved = None
    if result.target is operator.getitem and result.args[0] is calls[-1] and list(result.users) == [output]:
        plan = calls[-1].args[2]
        if _scale(plan, result.args[1]) == scale:
            with graph.inserting_before(calls[0]):
                reserved = graph.call_function(reserve, (image, plan, result.args[1]))
    for call in calls:
        inputs: Any = call.args[0]
        spent = [i for i, value in enumerate(inputs) if inputs.count(value) == 1 and ends_in(value, call)]
        # Whatever is no new tensor may be the result itself, and be returned.
        passed = [r.args[1] for r in call.users if all(map(_is_new, r.users))]
        returned = result.args[1] if call is calls[-1] and reserved is not None else None
        call.target, call.args = run_plan, (*call.args, spent, passed, reserved, returned)


def _is_new(node: fx.Node) -> bool:
    """Whether no other node's tensor shares memory with what a node computes."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        source: Any = node.args[0]
        return source.target in (run_plan, ops.run_plan.default)
    return node.target in (run_plan, *_NEW) or getattr(node.target, "namespace", "") == "esr"


def _scale(plan: str, k: int) -> Any:
    p = Plan.from_json(plan)
    return p.scales[p.outputs[k]]
