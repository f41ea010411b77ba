"""The plan: a network as a short list of fused layers, which the backends execute as one operator.

Values are numbered: the inputs first, then the result of each layer in order. A plan names no tensor; layers refer to
a list of weights by index. It is immutable, prints as a table and serialises to JSON.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

FORMAT = 1
ESA_WEIGHTS = ("w1", "b1", "w2", "b2", "w3", "b3", "w4", "b4", "wf", "bf", "w_max", "b_max", "w3_", "b3_")
# Names of a layer's weights, in the order in which an executor expects them.
WEIGHTS = {
    "normalize": (),
    "conv3x3": ("weight", "bias"),
    "conv1x1": ("weight", "bias"),
    "conv3x3_pixel_shuffle": ("weight", "bias"),
    "esa": ESA_WEIGHTS,
    "bsconv": ("pointwise", "depthwise", "bias"),
    "depthwise_conv": ("weight", "bias"),
    "layer_norm2d": ("weight", "bias"),
    "add": (),
    "multiply": (),
    "activate": (),
    "slice": (),
    "resize": (),
    "adaptive_max_pool": (),
    "modulate": (),
    "statistic": (),
}
# Pixels a side that a layer's result depends on; None: the whole image. A depthwise_conv has its filter's, a resize its
# filter's too; the windows of a pooling depend on the image's size.
_HALO: dict[str, int | None] = {
    "normalize": 0,
    "conv3x3": 1,
    "conv1x1": 0,
    "conv3x3_pixel_shuffle": 1,
    "esa": None,
    "bsconv": 1,
    "layer_norm2d": 0,
    "add": 0,
    "multiply": 0,
    "activate": 0,
    "slice": 0,
    "adaptive_max_pool": None,
    "modulate": 1,
    "statistic": None,
}
RESIZE_REACH = {"nearest": 0, "bilinear": 1, "bicubic": 2}
MOST_MODULATE_MAPS = 8
# What a statistic is of a channel's pixels; a contrast is the standard deviation plus the mean.
STATISTICS = ("mean", "variance", "std", "contrast", "maximum")
CORRECTED = ("variance", "std", "contrast")  # those with squares, which have a correction


def _whole(scale: int | Fraction) -> int | Fraction:
    """An int where it is one."""
    return scale if isinstance(scale, int) or scale.denominator > 1 else int(scale)


@dataclass(frozen=True)
class Layer:
    """One fused operator call of a plan.

    Attributes:
        op: name of the operator, a key of `WEIGHTS`.
        inputs: the values it reads; a residual comes last.
        weights: weight name -> index into the plan's weights; a missing bias has no entry.
        attributes: the operator's other arguments (activation, residual_mode, upscale_factor, ...); a conv1x1 and a
            bsconv have `residual_mode` where they have a residual, a depthwise_conv its weight's `kernel_size`, a
            slice the first of its channels (`start`), a resize its `mode` (nearest, bilinear or bicubic, corners not
            aligned) and `upscale_factor`, an adaptive_max_pool its `divisor`: the result has as many pixels a side as
            that goes into the input's. A statistic of every channel's pixels has its `kind`, one of `STATISTICS`, and
            its `correction`: 0 or 1, squares are divided by the pixels less that, which has a meaning for variance,
            std and contrast; of one pixel corrected by 1 they are NaN.
        channels: channels of its result.
    """

    op: str
    inputs: tuple[int, ...]
    weights: dict[str, int]
    attributes: dict[str, Any]
    channels: int

    @property
    def halo(self) -> int | None:
        if self.op == "depthwise_conv":
            return int(self.attributes["dilation"]) * (max(self.attributes["kernel_size"]) // 2)
        if self.op == "resize":
            return RESIZE_REACH[self.attributes["mode"]]
        return _HALO[self.op]

    @property
    def residual(self) -> int | None:
        """The value that is added, or None."""
        added = "residual_mode" in self.attributes if self.op == "conv1x1" else len(self.inputs) > 1
        return self.inputs[-1] if added and self.op not in ("add", "multiply", "modulate") else None

    @property
    def operands(self) -> tuple[int, ...]:
        """The inputs without the residual."""
        return self.inputs if self.residual is None else self.inputs[:-1]

    @property
    def scale(self) -> int | Fraction:
        """Height and width of the result as a multiple of the first input's, rounded down where it is a part.

        0: one pixel, whatever the image's size.
        """
        if self.op == "statistic":
            return 0
        if self.op == "adaptive_max_pool":
            return _whole(Fraction(1, int(self.attributes["divisor"])))
        return int(self.attributes.get("upscale_factor", 1))


@dataclass(frozen=True)
class Plan:
    """A network as fused layers.

    Attributes:
        inputs: (channels, scale) of each input; the scale is its height and width as a multiple of the first one's.
        layers: the layers in the order of execution.
        outputs: the values that are returned: distinct results of layers, none of which is pooled or a statistic.

    A statistic is one pixel, and so is what layers make of such values alone. A map takes in a value of one pixel as
    the second input of an add, which adds it to every pixel, or as a map of a modulate; nothing else takes both.

    Raises:
        ValueError: a layer is unknown or reads a value that does not exist yet, an input's scale is below 1, an output
            is not a layer's result, a pooled value, whose size is rounded, or one of one pixel is enlarged by a factor
            or returned, or a layer takes a map and a value of one pixel that cannot.
    """

    inputs: tuple[tuple[int, int], ...]
    layers: tuple[Layer, ...]
    outputs: tuple[int, ...]

    def __post_init__(self) -> None:
        for k, layer in enumerate(self.layers):
            value = len(self.inputs) + k
            if layer.op not in WEIGHTS:
                raise ValueError(f"plan: layer {k} has the unknown operator {layer.op!r}")
            if not layer.inputs or not all(0 <= i < value for i in layer.inputs):
                raise ValueError(
                    f"plan: layer {k} ({layer.op}) reads {layer.inputs}, defined so far are 0..{value - 1}"
                )
            if unknown := set(layer.weights) - set(WEIGHTS[layer.op]):
                raise ValueError(f"plan: layer {k} ({layer.op}) has unknown weights {sorted(unknown)}")
        if small := [i for i, (_, scale) in enumerate(self.inputs) if scale < 1]:
            raise ValueError(f"plan: inputs {small} have a scale below 1")
        total = len(self.inputs) + len(self.layers)
        if not self.outputs or len(set(self.outputs)) != len(self.outputs):
            raise ValueError(f"plan: outputs must be distinct and at least one, got {self.outputs}")
        if not all(len(self.inputs) <= i < total for i in self.outputs):
            raise ValueError(f"plan: outputs {self.outputs} must be results of layers, {len(self.inputs)}..{total - 1}")
        for k, layer in enumerate(self.layers):
            if layer.op == "resize" and self._is_pooled(layer.inputs[0]):
                raise ValueError(f"plan: layer {k} (resize) reads %{layer.inputs[0]}, which is pooled")
            for i in layer.inputs[1:]:
                first, other = (self.scales[v] == 0 for v in (layer.inputs[0], i))
                if first != other and not (other and layer.op in ("add", "modulate")):
                    raise ValueError(
                        f"plan: layer {k} ({layer.op}) reads %{layer.inputs[0]} and %{i}, one of which is one pixel"
                    )
        if pooled := [i for i in self.outputs if self._is_pooled(i)]:
            raise ValueError(f"plan: outputs {pooled} are pooled, which can only be read by layers")

    def _is_pooled(self, value: int) -> bool:
        scale = self.scales[value]
        return scale == 0 or not isinstance(scale, int)

    @cached_property
    def channels(self) -> tuple[int, ...]:
        """Channels of every value."""
        return (*(c for c, _ in self.inputs), *(layer.channels for layer in self.layers))

    @cached_property
    def scales(self) -> tuple[int | Fraction, ...]:
        """Height and width of every value as a multiple of the first input's, rounded down where it is a part.

        0: one pixel.
        """
        scales: list[int | Fraction] = [s for _, s in self.inputs]
        for layer in self.layers:
            scales.append(_whole(scales[layer.inputs[0]] * layer.scale))
        return tuple(scales)

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width of every value for a first input of this size."""
        return [(int(height * s), int(width * s)) if s else (1, 1) for s in self.scales]

    @property
    def scale(self) -> int:
        """The scale of the first output: 4 for a x4 network."""
        return int(self.scales[self.outputs[0]])

    @cached_property
    def receptive_radius(self) -> int | None:
        """Input pixels a side that an output pixel depends on; None when it is the whole image (ESA, statistics)."""
        radius: list[int | None] = [0] * len(self.inputs)
        for layer in self.layers:
            before = [radius[i] for i in layer.inputs]
            if layer.halo is None or any(r is None for r in before):
                radius.append(None)
            else:
                # A residual is read at the pixel itself, without the halo.
                main, rest = before[: len(layer.operands)], before[len(layer.operands) :]
                radius.append(max([r + layer.halo for r in main if r is not None] + [r for r in rest if r is not None]))
        reach = [radius[i] for i in self.outputs]
        return None if any(r is None for r in reach) else max(r for r in reach if r is not None)

    @cached_property
    def buffers(self) -> tuple[int | None, ...]:
        """The buffer of every value; None for inputs and outputs, which are the caller's tensors.

        Two values share a buffer when the first is read for the last time before the second is written.
        """
        last_read = [0] * len(self.channels)
        for k, layer in enumerate(self.layers):
            for i in layer.inputs:
                last_read[i] = len(self.inputs) + k
        assigned: list[int | None] = [None] * len(self.inputs)
        busy_until: list[int] = []
        for value in range(len(self.inputs), len(self.channels)):
            if value in self.outputs:
                assigned.append(None)
                continue
            buffer = next((b for b, end in enumerate(busy_until) if end < value), len(busy_until))
            if buffer == len(busy_until):
                busy_until.append(0)
            busy_until[buffer] = last_read[value]
            assigned.append(buffer)
        return tuple(assigned)

    def flops(self, batch: int, height: int, width: int) -> int:
        """Floating-point operations of a run, a multiply-add as two, activations and residuals not counted."""
        total = 0
        sizes = self.sizes(height, width)
        for k, layer in enumerate(self.layers):
            cin = [self.channels[i] for i in layer.operands]
            if layer.op == "modulate":
                resized = sum(sizes[i] != sizes[layer.inputs[0]] for i in layer.inputs[1:])
                cin = [layer.channels] * resized  # of the maps that are resized
            h, w = sizes[len(self.inputs) + k if layer.op == "resize" else layer.inputs[0]]
            total += batch * layer_flops(layer.op, cin, layer.channels, layer.attributes, h, w)
        return total

    def to_json(self) -> str:
        """The plan as compact JSON; equal plans give equal text."""
        return self._json

    @cached_property
    def _json(self) -> str:
        layers = [
            {"op": x.op, "inputs": x.inputs, "weights": x.weights, "attributes": x.attributes, "channels": x.channels}
            for x in self.layers
        ]
        description = {
            "format": FORMAT,
            "inputs": self.inputs,
            "layers": layers,
            "outputs": self.outputs,
            "scales": [s if isinstance(s, int) else str(s) for s in self.scales],
        }
        return json.dumps(description, separators=(",", ":"), sort_keys=True)

    @staticmethod
    @lru_cache(maxsize=256)
    def from_json(text: str) -> Plan:
        """The plan that `to_json` described.

        Raises:
            ValueError: the text is not a plan of this format.
        """
        try:
            d = json.loads(text)
            if d["format"] != FORMAT:
                raise ValueError(f"plan: format {d['format']} is not supported, this version reads format {FORMAT}")
            layers = tuple(
                Layer(x["op"], tuple(x["inputs"]), x["weights"], x["attributes"], int(x["channels"]))
                for x in d["layers"]
            )
            return Plan(tuple((int(c), int(s)) for c, s in d["inputs"]), layers, tuple(d["outputs"]))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"plan: not a serialised plan ({error})") from None

    def __str__(self) -> str:
        rows = [("value", "layer", "reads", "channels", "scale", "halo", "buffer", "")]
        for value, (channels, scale) in enumerate(zip(self.channels, self.scales, strict=True)):
            k = value - len(self.inputs)
            layer = self.layers[k] if k >= 0 else None
            buffer = self.buffers[value]
            rows.append(
                (
                    f"%{value}",
                    "input" if layer is None else layer.op,
                    "" if layer is None else " ".join(f"%{i}" for i in layer.inputs),
                    str(channels),
                    str(scale) if scale else "pixel",
                    "" if layer is None else "all" if layer.halo is None else str(layer.halo),
                    "" if buffer is None else str(buffer),
                    ("" if layer is None else _describe(layer)) + ("returned" if value in self.outputs else ""),
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _describe(layer: Layer) -> str:
    """The attributes that matter to a reader."""
    a = layer.attributes
    words = []
    if layer.op == "normalize":
        words += [f"{name} {' '.join(f'{v:g}' for v in a[name])}" for name in ("shift", "scale")]
    if layer.op == "activate":
        bounds = {"leaky_relu": ("low",), "clamp": ("low", "high"), "rsqrt": ("low",)}.get(a["function"], ())
        words.append(a["function"])
        words += [f"{name} {' '.join(f'{v:g}' for v in dict.fromkeys(a[name]))}" for name in bounds]
    if layer.op == "depthwise_conv":
        words.append("x".join(map(str, a["kernel_size"])))
        words += [f"dilation {a['dilation']}"] if a["dilation"] > 1 else []
        words += ["gated"] if a["gated"] else []
    if a.get("activation", "none") != "none":
        words.append(a["activation"] + (f"({a['negative_slope']:g})" if a["activation"] == "leaky_relu" else ""))
    if layer.op in ("conv3x3", "conv1x1", "bsconv") and layer.residual is not None:
        words.append(f"residual {a['residual_mode']}")
    if layer.op == "bsconv":
        words.append(f"padding {a['padding_mode']}")
    if layer.op == "slice":
        words.append(f"from channel {a['start']}")
    if layer.op in ("resize", "modulate"):
        words.append(a["mode"])
    if layer.op == "statistic":
        words += [a["kind"]] + ["correction 1"] * (a["correction"] and a["kind"] in CORRECTED)
    elif layer.scale != 1:
        words.append(f"x{layer.scale}")
    return ", ".join(words) + ("  " if words else "")


def layer_flops(op: str, cin: list[int], cout: int, attributes: dict[str, Any], height: int, width: int) -> int:
    """FLOPs of one layer on one image, a multiply-add as two.

    A bilinear resize counts as four multiply-adds per output value, as fvcore counts it, a bicubic one as sixteen. The
    size is that of the first input, of a resize that of the result; `cin` of a modulate are its maps of another size.
    """
    pixels = height * width
    if op == "conv3x3":
        return 2 * 9 * cin[0] * cout * pixels
    if op == "conv3x3_pixel_shuffle":
        return 2 * 9 * cin[0] * cout * attributes["upscale_factor"] ** 2 * pixels
    if op == "conv1x1":
        return 2 * sum(cin) * cout * pixels
    if op == "bsconv":
        return 2 * (cin[0] + 9) * cout * pixels
    if op == "depthwise_conv":
        return 2 * math.prod(attributes["kernel_size"]) * cin[0] * pixels
    if op == "layer_norm2d":
        # A sum, a difference, a square and its sum, a quotient; then weight and bias.
        return (5 + attributes["has_weight"] + attributes["has_bias"]) * cout * pixels
    if op == "resize":
        return 2 * {"nearest": 0, "bilinear": 4, "bicubic": 16}[attributes["mode"]] * cout * pixels
    if op == "statistic":
        # A sum; of squares a difference, a square and its sum too.
        return {"mean": 1, "maximum": 0}.get(attributes["kind"], 4) * cout * pixels
    if op == "modulate":
        return 2 * (4 if attributes["mode"] == "bilinear" else 0) * sum(cin) * pixels
    if op == "esa":
        f, n = attributes["hidden"], cin[0]
        h2, w2 = (height - 3) // 2 + 1, (width - 3) // 2 + 1
        h3, w3 = (h2 - 7) // 3 + 1, (w2 - 7) // 3 + 1
        skip = f * f if attributes["has_conv_f"] else 0
        convs_low = 3 if attributes["has_conv_max"] else 1
        full = (2 * n * f + skip + 4 * f) * pixels
        return 2 * (full + 9 * f * f * (h2 * w2 + convs_low * h3 * w3))
    return 0


@dataclass
class PlanBuilder:
    """Builds a plan layer by layer; every method returns the number of the value it defines.

    `weights` collects the tensors' keys in order: any hashable the caller likes (a tensor's name, an index).
    """

    inputs: list[tuple[int, int]] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)

    def input(self, channels: int, scale: int = 1) -> int:
        assert not self.layers, "inputs come before layers"
        self.inputs.append((channels, scale))
        return len(self.inputs) - 1

    def add(
        self, op: str, inputs: list[int], channels: int, weights: dict[str, Any] | None = None, **attributes: Any
    ) -> int:
        indices = {}
        for name, key in (weights or {}).items():
            if key is not None:
                self.weights.append(key)
                indices[name] = len(self.weights) - 1
        self.layers.append(Layer(op, tuple(inputs), indices, attributes, channels))
        return len(self.inputs) + len(self.layers) - 1

    def finish(self, outputs: list[int]) -> Plan:
        return Plan(tuple(self.inputs), tuple(self.layers), tuple(outputs))
