"""A whole network: its layers' launches one after the other, on channels-last maps padded for the tensor cores."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...library import run_plan_outputs
from ...plan import ESA_WEIGHTS, Layer, Plan
from . import (
    _pointwise,
    _resize,
    adaptive_max_pool,
    bsconv,
    configs,
    depthwise_conv,
    esa,
    interpreted,
    layer_norm2d,
    modulate,
    statistic,
)
from ._conv1x1 import multiply
from ._convolution import convolve
from .launch import Program
from .maps import Map, as_map, padded, precision, shuffled
from .packing import pack, pack_parts
from .recording import empty, record

# Writes one layer's result; gets the maps the layer reads, and the map to write.
Step = Callable[[list[Map], Map], None]


class PreparedPlan:
    """A plan whose weights are folded and packed for one dtype and device.

    Its first run on tensors of some size, layout and alignment goes through the kernels' Python functions and is
    recorded; later ones repeat the launches with other pointers.
    """

    # Sizes whose launches are kept: a few hundred bytes for each layer.
    PROGRAMS = 64

    def __init__(self, plan: Plan, weights: list[Tensor], dtype: torch.dtype, device: torch.device) -> None:
        self.plan = plan
        self.dtype = dtype
        self.device = device
        self.weights = weights
        self._absorbed: dict[int, Tensor] = {}
        self._tables: list[Tensor] = []  # made for the plan besides packed weights
        self._programs: OrderedDict[tuple[Any, ...], Program] = OrderedDict()
        with record() as recording:
            self.steps = [self._step(k, layer) for k, layer in enumerate(plan.layers)]
        self._constants = [*weights, *recording.memory, *self._tables]

    def execute(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        if interpreted():
            self._run(inputs, outputs)
            return
        tensors = [*inputs, *outputs]
        # Everything that the launches depend on besides the plan.
        key = (
            *((t.shape, t.stride(), t.data_ptr() % 16) for t in tensors), precision(self.dtype), configs.choice()
        )  # fmt: skip
        program = self._programs.get(key)
        if program is not None:
            program.run(tensors)
            return
        with record() as recording:
            self._run(inputs, outputs)
        try:
            self._programs[key] = Program(recording, tensors, self._constants)
        except ValueError:
            return  # a copy was made of something: every run makes it again
        while len(self._programs) > self.PROGRAMS:
            self._programs.popitem(last=False)

    def _run(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        plan = self.plan
        _, _, height, width = inputs[0].shape
        sizes = plan.sizes(height, width)
        buffers = self._allocate(inputs[0], sizes)
        values = [as_map(x) for x in inputs]
        for k, (layer, step) in enumerate(zip(plan.layers, self.steps, strict=True)):
            value = len(inputs) + k
            h, w = sizes[value]
            if layer.op == "adaptive_max_pool" and not (h and w):
                least = layer.attributes["divisor"]
                raise ValueError(f"plan: layer {k} (adaptive_max_pool): x must have at least {least} pixels a side")
            if value in plan.outputs:
                out = as_map(outputs[plan.outputs.index(value)])
            elif step is None:
                out = values[layer.inputs[0]]
            else:
                buffer = buffers[plan.buffers[value]]  # type: ignore[index]
                pitch, batch = self._layout(value, h * w)
                out = Map(buffer, pitch, batch, layer.channels, h, w)
            if step is not None:
                step([values[i] for i in layer.inputs], out)
            values.append(out)

    def _layout(self, value: int, pixels: int) -> tuple[int, int]:
        """Pitch and batch of a buffer's map: images are planes, as their pixel shuffle writes them."""
        channels = self.plan.channels[value]
        return (padded(channels), pixels) if self.plan.scales[value] <= 1 else (0, channels * pixels)

    def _allocate(self, like: Tensor, value_sizes: list[tuple[int, int]]) -> dict[int, Tensor]:
        """The plan's buffers, which values share in turns; [n, elements], so that `shape[0]` is the batch."""
        plan = self.plan
        sizes: dict[int, int] = {}
        for k, layer in enumerate(plan.layers):
            value = len(plan.inputs) + k
            slot = plan.buffers[value]
            if slot is None or self.steps[k] is None:
                continue
            height, width = value_sizes[value]
            pitch, _ = self._layout(value, height * width)
            sizes[slot] = max(sizes.get(slot, 0), height * width * (pitch or layer.channels))
        return {slot: empty(like, (like.shape[0], size)) for slot, size in sizes.items()}

    def _step(self, k: int, layer: Layer) -> Step | None:
        """What runs the layer; None where the layers after it do its work."""
        a = layer.attributes
        w = {name: self.weights[i] for name, i in layer.weights.items()}
        bias = w.get("bias")
        if layer.op == "normalize":
            table = torch.tensor([a["shift"], a["scale"]], dtype=torch.float32, device=self.device)
            self._tables.append(table)
            if self._absorbable(k):
                self._absorbed[len(self.plan.inputs) + k] = table
                return None
            return lambda x, out: _pointwise.normalize(x[0], table, out)
        if layer.op == "activate":
            table = torch.tensor([a["low"], a["high"]], dtype=torch.float32, device=self.device)
            self._tables.append(table)
            return lambda x, out: _pointwise.apply(x[0], a["function"], table, out)
        if layer.op in ("add", "multiply"):
            scales = [self.plan.scales[i] for i in layer.inputs]
            every = scales[1] == 0 != scales[0]
            return lambda x, out: _pointwise.combine(x[0], x[1], layer.op, out, one_pixel=every)
        if layer.op == "slice":
            return lambda x, out: _pointwise.copy_channels(x[0], a["start"], out)
        if layer.op == "resize":
            taps = _resize.tap_table(a["mode"], a["upscale_factor"], self.device)
            self._tables.append(taps)
            return lambda x, out: _resize.enlarge(x[0], taps, out)
        if layer.op == "adaptive_max_pool":
            return lambda x, out: adaptive_max_pool.pool(x[0], out)
        if layer.op == "statistic":
            return lambda x, out: statistic.compute(x[0], out, a["kind"], a["correction"])
        if layer.op == "modulate":
            gate = {"bilinear": a["mode"] == "bilinear", "activation": a["activation"], "slope": a["negative_slope"]}
            return lambda x, out: modulate.apply(x[0], x[1:], out, **gate)
        if layer.op == "conv1x1":
            channels = tuple(self.plan.channels[i] for i in layer.operands)
            parts = pack_parts(w["weight"], channels, self.dtype)
            run = partial(multiply, packed=parts, bias=bias, activation=a["activation"], slope=a["negative_slope"])
            if layer.residual is None:
                return lambda x, out: run(x, out=out)
            mode = a["residual_mode"]
            return lambda x, out: run(x[:-1], out=out, residual=x[-1], residual_mode=mode)
        if layer.op == "esa":
            weights = [None if (t := w.get(name)) is None else t.to(self.dtype) for name in ESA_WEIGHTS]
            self._tables += [t for t in weights if t is not None]
            folded = esa.fold(*weights)  # type: ignore[arg-type]
            return lambda x, out: esa.attend(x[0], folded, out)
        if layer.op == "bsconv":
            packed = pack(bsconv.fold(w["pointwise"], w["depthwise"]), self.dtype)
            settings = (a["padding_mode"], a["activation"], a["negative_slope"])
            if layer.residual is None:
                return lambda x, out: bsconv.separable(x[0], packed, bias, out, *settings)
            mode = a["residual_mode"]
            return lambda x, out: bsconv.separable(x[0], packed, bias, out, *settings, x[1], mode)
        if layer.op == "depthwise_conv":
            options = {"activation": a["activation"], "slope": a["negative_slope"], "gated": a["gated"]}
            return lambda x, out: depthwise_conv.convolve(
                x[0], w["weight"], bias, out, dilation=a["dilation"], **options
            )
        if layer.op == "layer_norm2d":
            return lambda x, out: layer_norm2d.normalize(x[0], w.get("weight"), bias, out, a["eps"])
        return self._convolution(layer, w["weight"], bias)

    def _convolution(self, layer: Layer, weight: Tensor, bias: Tensor | None) -> Step:
        a = layer.attributes
        options: dict[str, Any] = {"normalization": self._absorbed.get(layer.inputs[0])}
        if layer.op == "conv3x3":
            options |= {"activation": a["activation"], "slope": a["negative_slope"]}
        mode = a.get("residual_mode", "post")
        packed = pack(weight, self.dtype)
        r = int(layer.scale)

        def step(x: list[Map], out: Map) -> None:
            residual = x[1] if len(x) > 1 else None
            if r > 1:
                out = _as_shuffled(out, r)
                residual = None if residual is None else _as_shuffled(residual, r)
            convolve(x[0], packed, bias, out, residual=residual, residual_mode=mode, **options)

        return step

    def _absorbable(self, k: int) -> bool:
        """Whether every reader of a normalization can apply it while loading.

        Only one of an input: a buffer may be written again before its readers run.
        """
        layer, value = self.plan.layers[k], len(self.plan.inputs) + k
        if layer.inputs[0] >= len(self.plan.inputs) or value in self.plan.outputs:
            return False
        readers = [other for other in self.plan.layers if value in other.inputs]
        return all(
            other.op in ("conv3x3", "conv3x3_pixel_shuffle") and value not in other.inputs[1:] for other in readers
        )


def _as_shuffled(image: Map, r: int) -> Map:
    """An image of planes as the map that was shuffled into it."""
    if image.pitch:
        return shuffled(image.tensor, r)
    return image._replace(channels=image.channels * r * r, height=image.height // r, width=image.width // r, shuffle=r)


_prepared: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def prepared_plan(text: str, weights: list[Tensor], dtype: torch.dtype, device: torch.device) -> PreparedPlan:
    """The plan with packed weights, kept until one of them changes."""
    plan = Plan.from_json(text)
    if not weights or any(w.is_inference() for w in weights):  # they carry no version
        return PreparedPlan(plan, weights, dtype, device)
    plans = _prepared.get(weights[0])
    if plans is None:
        plans = _prepared[weights[0]] = {}
    signature = tuple((w.data_ptr(), w._version) for w in weights)
    found = plans.get((text, dtype))
    if found is None or found[0] != signature:
        # Detached: the prepared plan, found through the first weight, must not keep that weight alive.
        found = plans[(text, dtype)] = (signature, PreparedPlan(plan, [w.detach() for w in weights], dtype, device))
    return found[1]


def run_plan(inputs: list[Tensor], weights: list[Tensor], plan: str) -> list[Tensor]:
    outputs = run_plan_outputs(inputs, weights, plan)
    x = inputs[0]
    if x.numel():
        prepared_plan(plan, weights, x.dtype, x.device).execute(inputs, outputs)
    return outputs
