"""Plans handed to the compiled engine: encoding, weight packing kept per parameter version, execution."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...plan import STATISTICS, WEIGHTS, Layer, Plan

PROGRAM_FORMAT = 2
OP_CODES = {
    "normalize": 0,
    "conv3x3": 1,
    "conv1x1": 2,
    "conv3x3_pixel_shuffle": 3,
    "esa": 4,
    "bsconv": 5,
    "add": 6,
    "multiply": 7,
    "activate": 8,
    "depthwise_conv": 9,
    "layer_norm2d": 10,
    "slice": 11,
    "resize": 12,
    "adaptive_max_pool": 13,
    "modulate": 14,
    "statistic": 15,
}
ACTIVATION_CODES = {"none": 0, "relu": 1, "leaky_relu": 2, "silu": 3, "gelu": 4, "gelu_tanh": 5}
FUNCTION_CODES = ACTIVATION_CODES | {"sigmoid": 6, "clamp": 7, "hardswish": 8, "mish": 9, "rsqrt": 10}
RESIDUAL_CODES = {"pre": 0, "post": 1, "attention": 2}
PADDING_CODES = {"zeros": 0, "reflect": 1}
RESIZE_CODES = {"nearest": 0, "bilinear": 1, "bicubic": 2}
STATISTIC_CODES = {kind: code for code, kind in enumerate(STATISTICS)}


def encode(plan: Plan) -> tuple[list[int], list[float]]:
    """The plan as the integers and constants of `esr_native::compile_plan` (csrc/common/plan.h)."""
    program = [PROGRAM_FORMAT, len(plan.inputs), len(plan.layers), len(plan.outputs)]
    constants: list[float] = []

    def constant(*values: float) -> int:
        constants.extend(values)
        return len(constants) - len(values)

    def record(layer: Layer) -> list[int]:
        x, a = list(layer.inputs), layer.attributes
        weights = [layer.weights.get(name, -1) for name in WEIGHTS[layer.op]]
        residual = -1 if layer.residual is None else layer.residual
        if layer.op == "normalize":
            return [x[0], layer.channels, constant(*a["shift"], *a["scale"])]
        if layer.op == "conv3x3":
            activation, slope = ACTIVATION_CODES[a["activation"]], constant(a["negative_slope"])
            return [x[0], *weights, activation, slope, residual, RESIDUAL_CODES[a["residual_mode"]]]
        if layer.op == "conv1x1":
            activation, slope = ACTIVATION_CODES[a["activation"]], constant(a["negative_slope"])
            mode = RESIDUAL_CODES[a.get("residual_mode", "post")]
            return [len(layer.operands), *layer.operands, *weights, activation, slope, residual, mode]
        if layer.op == "conv3x3_pixel_shuffle":
            return [x[0], *weights, a["upscale_factor"], residual]
        if layer.op == "esa":
            return [x[0], *weights]
        if layer.op == "bsconv":
            activation, slope = ACTIVATION_CODES[a["activation"]], constant(a["negative_slope"])
            mode = RESIDUAL_CODES[a.get("residual_mode", "post")]
            return [x[0], *weights, PADDING_CODES[a["padding_mode"]], activation, slope, residual, mode]
        if layer.op == "depthwise_conv":
            activation, slope = ACTIVATION_CODES[a["activation"]], constant(a["negative_slope"])
            return [x[0], *weights, a["dilation"], int(a["gated"]), activation, slope]
        if layer.op == "layer_norm2d":
            return [x[0], *weights, layer.channels, constant(a["eps"])]
        if layer.op == "slice":
            return [x[0], a["start"], layer.channels]
        if layer.op == "resize":
            return [x[0], RESIZE_CODES[a["mode"]], a["upscale_factor"]]
        if layer.op == "adaptive_max_pool":
            return [x[0], a["divisor"]]
        if layer.op == "statistic":
            return [x[0], STATISTIC_CODES[a["kind"]], a["correction"]]
        if layer.op == "modulate":
            activation, slope = ACTIVATION_CODES[a["activation"]], constant(a["negative_slope"])
            return [len(x) - 1, *x, RESIZE_CODES[a["mode"]], activation, slope]
        if layer.op == "activate":
            return [x[0], FUNCTION_CODES[a["function"]], layer.channels, constant(*a["low"], *a["high"])]
        return x  # add, multiply

    for layer in plan.layers:
        ints = record(layer)
        program += [OP_CODES[layer.op], len(ints), *ints]
    return program + list(plan.outputs), constants


def in_order_of_need(plan: Plan) -> Plan:
    """The same plan with layers right before their first reader if all they read is read there or later anyway: their
    results exist for a shorter time, and nothing does for a longer one.
    """
    first = len(plan.inputs)
    order = list(range(len(plan.layers)))
    readers: dict[int, list[int]] = {}  # value -> layers
    for k, layer in enumerate(plan.layers):
        for value in set(layer.inputs):
            readers.setdefault(value, []).append(k)
    place = {k: i for i, k in enumerate(order)}
    for k in reversed(range(len(plan.layers))):
        if first + k in plan.outputs or first + k not in readers:
            continue
        needed = min(place[reader] for reader in readers[first + k])
        if needed <= place[k] + 1:
            continue
        if all(any(place[r] >= needed for r in readers[value] if r != k) for value in plan.layers[k].inputs):
            order.remove(k)
            order.insert(needed - 1, k)
            place = {layer: i for i, layer in enumerate(order)}
    if order == sorted(order):
        return plan
    values = [*range(first), *(first + place[k] for k in range(len(order)))]
    layers = [replace(plan.layers[k], inputs=tuple(values[v] for v in plan.layers[k].inputs)) for k in order]
    return Plan(plan.inputs, tuple(layers), tuple(values[v] for v in plan.outputs))


# Handles whose plan is gone. Garbage may be collected in the middle of a trace, which would record a call of the
# operator that releases them; so they wait for the next plan to be compiled, which never happens inside one, or for
# `esr_kernels.memory.release_unused`.
_unreferenced: deque[int] = deque()


def release_unreferenced() -> None:
    """Free the plans inside the library that nothing refers to."""
    while _unreferenced:
        torch.ops.esr_native.release_plan(_unreferenced.popleft())


class CompiledPlan:
    """A plan with its weights packed inside the library; released after the last reference."""

    def __init__(self, plan: Plan, weights: list[Tensor]) -> None:
        release_unreferenced()
        program, constants = encode(in_order_of_need(plan))
        self.handle: int = torch.ops.esr_native.compile_plan(program, constants, weights)
        # The last layer that reads each input, the first that writes each output, and which inputs each may be.
        spans, inputs, ends = torch.ops.esr_native.plan_spans(self.handle), len(plan.inputs), len(plan.outputs)
        self.read_last, self.written_first = spans[:inputs], spans[inputs : inputs + ends]
        takes = spans[inputs + ends :]
        self.takes = [[v for v in range(inputs) if takes[i * inputs + v]] for i in range(ends)]
        weakref.finalize(self, _unreferenced.append, self.handle).atexit = False

    def execute(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        torch.ops.esr_native.execute_plan(self.handle, inputs, outputs)

    def execute_over(
        self, inputs: list[Tensor], outputs: list[Tensor], spent: Sequence[int], lent: Sequence[Tensor]
    ) -> None:
        """The same where nothing else is in the storages of outputs, of spent inputs and of what is lent.

        Args:
            spent: indices of inputs that nothing reads afterwards: what is in them is lost. An output may be one of
                those that it `takes`.
            lent: more memory for maps, as [N, C, H, W].
        """
        torch.ops.esr_native.execute_plan_over(self.handle, inputs, outputs, spent, lent)


@dataclass
class _Packed:
    signature: tuple[object, ...]
    # Writes through `.data` change a tensor without changing its version, so the values are compared as well.
    copies: list[Tensor]
    compiled: CompiledPlan


_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@lru_cache(maxsize=64)
def _without_weights(plan: str, capability: str) -> CompiledPlan:
    """Compiled once for each capability, which is the library's."""
    return CompiledPlan(Plan.from_json(plan), [])


def compiled_plan(plan: Plan, weights: list[Tensor], *, compare: bool) -> CompiledPlan:
    """The plan compiled with these weights, kept until one of them changes.

    Args:
        compare: compare the values too, for parameters that a user may write through `.data`.
    """
    if any(w.is_inference() for w in weights):  # they carry no version
        return CompiledPlan(plan, weights)
    capability = torch.ops.esr_native.get_cpu_capability()
    if not weights:
        return _without_weights(plan.to_json(), capability)
    per_plan = _packed.get(weights[0])
    if per_plan is None:
        per_plan = _packed[weights[0]] = {}
    signature = tuple((w.data_ptr(), w._version) for w in weights)
    key = (plan.to_json(), capability)
    packed = per_plan.get(key)
    unchanged = packed is not None and packed.signature == signature
    if unchanged and (not compare or all(map(torch.equal, packed.copies, weights))):
        return packed.compiled
    copies = [w.detach().clone() for w in weights] if compare else []
    per_plan[key] = _Packed(signature, copies, CompiledPlan(plan, weights))
    return per_plan[key].compiled
