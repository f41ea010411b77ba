"""Lowering: the `esr` operators of a graph gathered into plans, and everything else left around them."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..plan import ESA_WEIGHTS, Plan, PlanBuilder
from .capture import adaptive_max_pool2d, inverse_root, statistic
from .lend import lend_memory
from .pooling import convolution, local_variance, max_pool2d
from .simplify import affine_of, function_of
from .workspace import Workspace, aten, concatenated, dims, is_map, is_pixel, location, ratio, resized, slice_of

ops = torch.ops.esr

_CHANNELWISE = {op.default for op in (ops.depthwise_conv, ops.layer_norm2d)}
_HOT = _CHANNELWISE | {
    op.default for op in (ops.conv3x3, ops.conv1x1, ops.conv3x3_pixel_shuffle, ops.esa, ops.bsconv, ops.spab)
}
# Called by themselves where they would be a plan of one layer, or where plans do not have them.
_ALONE = _CHANNELWISE | {op.default for op in (ops.adaptive_max_pool, ops.modulate)}
_POOLS = (ops.adaptive_max_pool.default, ops.adaptive_max_pool2d.default)
_MOST_JOINED = 64  # channels of a concatenation that a plan makes
_MOST_RESIZE = 64  # upscale factor of a resize
# What runs in a finished graph for operators that only graphs have, or that PyTorch is slow at.
_PLAIN = {
    ops.adaptive_max_pool2d.default: adaptive_max_pool2d,
    ops.statistic.default: statistic,
    ops.inverse_root.default: inverse_root,
    ops.local_variance.default: local_variance,
    aten.max_pool2d.default: max_pool2d,
    aten.convolution.default: convolution,
}


class NotPlannableError(Exception):
    """A node that a plan cannot express; the second argument is the node."""


@dataclass
class Lowered:
    """A network in its final form.

    Attributes:
        module: the whole network as a graph that calls `esr::run_plan` for its fused parts.
        plan, weights: the network as one plan, or None and no weights where it is not one.
        shuffle: by how much what the plan returns is still to be shuffled, or None.
        clip: the bounds to which it is to be clamped then, or None.
        fused: one line per layer, and per operator that is called by itself.
        left: one line per kind of operation that stayed plain, and where.
    """

    module: fx.GraphModule
    plan: Plan | None = None
    weights: list[Tensor] = field(default_factory=list)
    shuffle: int | None = None
    clip: tuple[float, float] | None = None
    fused: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def lower(ws: Workspace, image: fx.Node) -> Lowered:
    """Turn a matched graph into plans and what is between them."""
    _sizes_of_image(ws, image)
    _concatenations(ws, image)
    refused: dict[fx.Node, str] = {}
    while True:
        groups = _groups(ws, refused)
        try:
            segments = {i: _Segment(ws, nodes) for i, nodes in groups.items()}
            break
        except NotPlannableError as error:
            refused[error.args[1]] = error.args[0]
    if _repeat_norms(ws, groups):
        segments = {i: _Segment(ws, nodes) for i, nodes in groups.items()}
    module = _assemble(ws, groups, segments)
    outside = [n for n in ws.graph.nodes if _computes(ws, n) and not any(n in g for g in groups.values())]
    foreign = [n for n in outside if n.target not in _ALONE]
    result = Lowered(module, left=_describe(ws, foreign, refused))
    for k, segment in enumerate(segments.values()):
        lines = str(segment.plan).splitlines()[1 + len(segment.plan.inputs) :]
        result.fused += lines if len(segments) == 1 else [f"plan {k + 1}: {line}" for line in lines]
    result.fused += [_alone(n) for n in outside if n.target in _ALONE]
    end, steps, shuffle = ws.returned(), [], None
    clip = _clip_of(ws, end) if end in outside else None
    if clip is not None:
        steps.append(end)
        end = end.args[0]  # type: ignore[assignment]
    if end.target is aten.pixel_shuffle.default and end in outside and len(end.users) == 1:
        shuffle = int(end.args[1])  # type: ignore[arg-type]
        steps.append(end)
        end = end.args[0]  # type: ignore[assignment]
    if len(segments) == 1 and set(outside) == set(steps):
        (segment,) = segments.values()
        if segment.inputs == [image] and segment.outputs == [end]:
            result.plan, result.weights, result.shuffle, result.clip = segment.plan, segment.weights, shuffle, clip
            result.left = []
    return result


def _clip_of(ws: Workspace, node: fx.Node) -> tuple[float, float] | None:
    """Between which bounds a node clamps a map, the same for all channels, if it does that."""
    found = function_of(ws, node)
    if found is None or found[1] not in ("clamp", "relu"):
        return None
    low, high = (float(bounds[0]) for bounds in found[2:])
    if bool((found[2] != low).any()) or bool((found[3] != high).any()):
        return None
    return (low, high) if found[1] == "clamp" else (0.0, math.inf)


def _sizes_of_image(ws: Workspace, image: fx.Node) -> None:
    """Ask the image for sizes that it has too, so that no map is computed for its size."""
    for node in list(ws.graph.nodes):
        if node.target is not aten.sym_size.int or node.args[0] is image:
            continue
        size = node.meta["val"]
        same = [i for i, d in enumerate(dims(image)) if isinstance(size, torch.SymInt) and d == size.node.expr]
        if same:
            ws.replace(node, ws.call(node, aten.sym_size.int, (image, same[0]), node))
    ws.clean()


def _concatenations(ws: Workspace, image: fx.Node) -> None:
    """A concatenation of what plans make for what they read: a 1x1 convolution that leaves every channel as it is."""
    for node in list(ws.graph.nodes):
        parts = concatenated(node) if node not in ws.values else None
        if parts is None:
            continue
        channels = dims(node)[1]
        if not isinstance(channels, int) or channels > _MOST_JOINED:
            continue
        if all(n is image or _is_plannable(ws, n) for n in (*parts, *node.users)):
            weight = ws.constant(torch.eye(channels, dtype=torch.float64)[:, :, None, None], ws.dtype(node))
            ws.replace(node, ws.call(node, ops.conv1x1.default, (parts, weight, None, "none", 0.0, None, "post"), node))


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def _reads(node: fx.Node) -> list[fx.Node]:
    """What a node reads besides sizes."""
    return [n for n in node.all_input_nodes if not _is_size(n)]


def _readers(node: fx.Node) -> list[fx.Node]:
    """The nodes that read a node, or sizes computed from its."""
    found = []
    for user in node.users:
        found += _readers(user) if _is_size(user) else [user]
    return found


def _alone(node: fx.Node) -> str:
    """An operator outside the plans, as a line of the report."""
    name = str(node.target).removeprefix("esr.").removesuffix(".default")
    where = location(node)
    words = [f"{dims(node)[1]} channels"]
    if node.target is ops.depthwise_conv.default:
        kernel = node.args[1].meta["val"].shape[2:]  # type: ignore[union-attr]
        activation, gated = node.args[4], node.args[6]
        words.insert(0, "x".join(map(str, kernel)))
        words += [str(activation)] if activation != "none" else []
        words += ["gated"] if gated else []
    return f"{name}: {', '.join(words)}" + (f" ({where})" if where else "")


def _computes(ws: Workspace, node: fx.Node) -> bool:
    """Whether a node computes a tensor from the image: not a size, a constant or a part of another's result."""
    if node.op != "call_function" or node in ws.values or node.target is operator.getitem:
        return False
    return isinstance(node.meta.get("val"), (Tensor, tuple, list))


def _is_plannable(ws: Workspace, node: fx.Node) -> bool:
    if node.op != "call_function" or node in ws.values:
        return False
    if node.target in _HOT:
        weights = node.args[1:]
        if node.target in (ops.conv3x3.default, ops.conv3x3_pixel_shuffle.default, ops.conv1x1.default):
            weights = weights[:2]  # what is left is a residual
        elif node.target is ops.bsconv.default:
            weights = weights[:3]
        return all(w in ws.values for w in weights if isinstance(w, fx.Node))
    if node.target in _POOLS:
        return _divisor(node) is not None
    if node.target is ops.statistic.default:
        return True
    if node.target is ops.modulate.default:
        return all(is_map(m) and m not in ws.values for m in (node.args[0], *node.args[1]))  # type: ignore[misc]
    if resized(ws, node) is not None:
        return _factor(node) is not None
    if node.target is aten.slice.Tensor and slice_of(node) is not None:
        return True
    if node.target is operator.getitem:
        return node.args[0].target is ops.spab.default and _is_plannable(ws, node.args[0])  # type: ignore[union-attr,arg-type]
    pair = node.target in (aten.add.Tensor, aten.mul.Tensor) and len(node.args) == 2 and not node.kwargs
    if pair and all(is_map(a) and a not in ws.values for a in node.args):
        whole, other = _whole_first(node.args)
        batch, channels, *size = dims(whole)
        allowed = [(batch, channels, *size), (batch, 1, *size)]
        if node.target is aten.add.Tensor:
            allowed += [(batch, channels, 1, 1), (batch, 1, 1, 1)]
        return isinstance(channels, int) and dims(whole) == dims(node) and dims(other) in allowed
    if function_of(ws, node) is not None:
        return True
    found = affine_of(ws, node)
    return found is not None and bool((found[1] != 0).all())


def _divisor(node: fx.Node) -> int | None:
    """How many pixels of a side make one of an adaptive pooling's result, rounded up, whatever the image's size."""
    x = node.args[0]
    if not is_map(x):
        return None
    candidates = set()
    for side in (2, 3):
        size, pooled = x.meta["val"].shape[side], node.meta["val"].shape[side]  # type: ignore[union-attr]
        hints = [s.node.hint if isinstance(s, torch.SymInt) else s for s in (size, pooled)]
        if isinstance(size, int) or isinstance(pooled, int) or None in hints or hints[1] < 1:
            return None
        low, high = hints[0] // (hints[1] + 1) + 1, hints[0] // hints[1]
        candidates.add(next((d for d in range(low, high + 1) if (size // d).node.expr == pooled.node.expr), None))
    return candidates.pop() if len(candidates) == 1 else None


def _factor(node: fx.Node) -> int | None:
    """By how much a node enlarges a map, where that is a whole number, the same for both sides."""
    ratios = {ratio(a, b) for a, b in zip(dims(node)[2:], dims(node.args[0])[2:], strict=True)}  # type: ignore[arg-type]
    factor = ratios.pop() if len(ratios) == 1 else None
    return factor if factor is not None and 1 < factor <= _MOST_RESIZE else None


def _whole_first(maps: Iterable[Any]) -> list[fx.Node]:
    """Two maps, the one with a single pixel or channel last."""
    return sorted(maps, key=lambda n: (is_pixel(n), dims(n)[1] == 1))


def _is_shuffled(node: fx.Node) -> bool:
    """Whether a node is an image that a plan can only return."""
    return node.target is ops.conv3x3_pixel_shuffle.default


def _groups(ws: Workspace, refused: dict[fx.Node, str]) -> dict[int, list[fx.Node]]:
    """Connected sets of nodes that can run as one: nothing outside lies on a path between two of a set.

    A node's level counts how often a path to it has left the plannable nodes; a set has one level at first, and sets
    are joined where that allows it.
    """
    dropped: set[fx.Node] = set()
    while True:
        level: dict[fx.Node, int] = {}
        planned: dict[fx.Node, int] = {}  # node -> its set
        for node in ws.graph.nodes:
            inputs = [n for n in _reads(node) if n not in ws.values]
            if node not in refused and node not in dropped and _is_plannable(ws, node):
                level[node] = max((level[n] + _is_shuffled(n) for n in inputs), default=0)
                same = [planned[n] for n in inputs if n in planned and level[n] == level[node] and not _is_shuffled(n)]
                planned[node] = mine = min(same, default=len(level))
                for other in set(same) - {mine}:
                    planned |= {n: mine for n, s in planned.items() if s == other}
            else:
                level[node] = max((level[n] + (n in planned) for n in inputs), default=0)
        _join(ws, planned)
        groups: dict[int, list[fx.Node]] = {}
        for node, i in planned.items():
            groups.setdefault(i, []).append(node)
        light = {n for nodes in groups.values() for n in _light(ws, nodes)}
        if not light:
            return dict(sorted(groups.items(), key=lambda item: level[item[1][0]]))
        dropped |= light


def _join(ws: Workspace, planned: dict[fx.Node, int]) -> None:
    """Join sets of which one reads results of the other, unless they are images or another path connects them."""
    while True:
        after: dict[Any, dict[Any, None]] = {}  # a set or a node outside -> those that read it
        candidates: dict[tuple[int, int], bool] = {}
        for node in ws.graph.nodes:
            for n in _reads(node):
                a: Any = planned.get(n, n)
                b: Any = planned.get(node, node)
                if n in ws.values or a == b:
                    continue
                after.setdefault(a, {})[b] = None
                if n in planned and node in planned:
                    candidates[a, b] = candidates.get((a, b), True) and not _is_shuffled(n)
        pair = next((p for p, allowed in candidates.items() if allowed and not _detour(after, *p)), None)
        if pair is None:
            return
        for n, i in planned.items():
            planned[n] = pair[0] if i == pair[1] else i


def _repeat_norms(ws: Workspace, groups: dict[int, list[fx.Node]]) -> bool:
    """Compute layer normalisations again in sets that read their results from another set beside what they normalise:
    that is less work than another map between the two. Returns whether there are such.
    """
    repeated = False
    for i, source in groups.items():
        for node in [n for n in source if n.target is ops.layer_norm2d.default]:
            for j, nodes in groups.items():
                readers = [n for n in nodes if node in _reads(n)]
                if i == j or not readers or not any(node.args[0] in _reads(n) for n in nodes):
                    continue
                with ws.graph.inserting_before(readers[0]):
                    again = ws.graph.node_copy(node, lambda n: n)
                for reader in readers:
                    reader.replace_input_with(node, again)
                nodes.insert(nodes.index(readers[0]), again)
                repeated = True
    return repeated


def _detour(after: dict[Any, dict[Any, None]], a: int, b: int) -> bool:
    """Whether a path from a to b leads through anything else."""
    waiting = [x for x in after[a] if x != b]
    seen = set(waiting)
    while waiting:
        for x in after.get(waiting.pop(), ()):
            if x == b:
                return True
            if x not in seen:
                seen.add(x)
                waiting.append(x)
    return False


def _light(ws: Workspace, nodes: list[fx.Node]) -> list[fx.Node]:
    """Members of a set that are better left to PyTorch."""
    hot = [n for n in nodes if n.target in _HOT and not is_pixel(n)]
    if not hot:
        return nodes
    # What has its map from outside or for outside only, and costs less there than its conversion would.
    edges = [n for n in nodes if slice_of(n) is not None and not _inside(n, nodes)]
    edges += [n for n in nodes if resized(ws, n) is not None and not any(u in nodes for u in n.users)]
    edges += [n for n in nodes if n.target in _POOLS and not all(u in nodes for u in _readers(n))]
    if edges:
        return edges
    # By themselves these run on tensors of any layout where they are.
    if len(hot) == 1 and hot[0].target is ops.conv1x1.default:
        return [n for n in nodes if n not in hot]
    return nodes if len(hot) == 1 and hot[0].target in _CHANNELWISE else []


def _inside(node: fx.Node, nodes: list[fx.Node]) -> bool:
    """Whether what a node reads and one of its readers are in a set."""
    return all(n in nodes for n in _reads(node)) and any(u in nodes for u in node.users)


class _Segment:
    """A set of nodes as a plan."""

    def __init__(self, ws: Workspace, nodes: list[fx.Node]) -> None:
        self.ws = ws
        self.builder = PlanBuilder()
        self.values: dict[fx.Node, int | tuple[int, ...]] = {}
        members = set(nodes)
        inputs = dict.fromkeys(n for node in nodes for n in _reads(node) if n not in members and n not in ws.values)
        for node in nodes:
            if node.target is ops.modulate.default:
                x, maps = node.args[:2]
                if not all(m in members or self._scale(m, x) is not None for m in maps):  # type: ignore[arg-type,union-attr]
                    raise NotPlannableError("reads a map of another size that is no part of its plan", node)
            pixels = [n for n in _reads(node) if is_pixel(n) and n not in ws.values]
            if any(n not in members for n in pixels):
                raise NotPlannableError("reads a value of one pixel that is no part of its plan", node)
        # The first input is the measure of all sizes: the smallest, of those the first.
        self.inputs = list(inputs)
        base = next((a for a in inputs if all(self._scale(b, a) for b in inputs)), None)
        if base is None:
            raise NotPlannableError("it joins maps whose sizes are no multiples of each other", self._stranger(nodes))
        self.inputs.sort(key=lambda n: n is not base)
        for node in self.inputs:
            scale = self._scale(node, base)
            assert scale is not None
            self.values[node] = self.builder.input(dims(node)[1], scale)
        handlers: dict[Any, Callable[[fx.Node], None]] = {
            ops.conv3x3.default: self._conv3x3,
            ops.spab.default: self._spab,
            ops.conv3x3_pixel_shuffle.default: self._tail,
            ops.conv1x1.default: self._conv1x1,
            ops.esa.default: self._esa,
            ops.bsconv.default: self._bsconv,
            ops.depthwise_conv.default: self._depthwise_conv,
            ops.layer_norm2d.default: self._layer_norm2d,
            ops.modulate.default: self._modulate,
            ops.statistic.default: self._statistic,
            operator.getitem: self._getitem,
        } | dict.fromkeys(_POOLS, self._pool)
        for node in nodes:
            handler = handlers.get(node.target)
            if slice_of(node) is not None or resized(ws, node) is not None:
                continue  # where it is read first
            if handler is not None:
                handler(node)
            elif (function := function_of(ws, node)) is not None:
                self._activate(node, *function)
            elif (found := affine_of(ws, node)) is not None:
                self._normalize(node, *found)
            else:
                both = [self._value(a) for a in _whole_first(node.args)]
                op = "add" if node.target is aten.add.Tensor else "multiply"
                self.values[node] = self.builder.add(op, both, dims(node)[1])
        self.outputs = [
            n for n in nodes if any(u not in members for u in _readers(n)) and n.target is not ops.spab.default
        ]
        # Two nodes can be one value; the plan returns it once.
        self.results = list(dict.fromkeys(self._value(n) for n in self.outputs))
        if any(v < len(self.inputs) for v in self.results):
            raise NotPlannableError("it returns its input", nodes[-1])
        for node in self.outputs:
            if self._scale(node, self.inputs[0]) is None:
                raise NotPlannableError("its size is a part of the image's, rounded, and it is read outside", node)
        self.plan = self.builder.finish(self.results)
        self.weights = [w.to(ws.dtype(n)).contiguous() for n, w in self.builder.weights]

    def _stranger(self, nodes: list[fx.Node]) -> fx.Node:
        """The last node whose size is no multiple of that of the input which suits most of them."""
        maps = [n for n in nodes if is_map(n)]
        base = max(self.inputs, key=lambda b: sum(self._scale(n, b) is not None for n in maps))
        return next((n for n in reversed(maps) if self._scale(n, base) is None), nodes[-1])

    def _scale(self, node: fx.Node, base: fx.Node) -> int | None:
        a, b = dims(node), dims(base)
        if len(a) != 4 or len(b) != 4 or a[0] != b[0] or not isinstance(a[1], int):
            return None
        ratios = {ratio(a[i], b[i]) for i in (2, 3)}
        return ratios.pop() if len(ratios) == 1 else None

    def _value(self, node: Any) -> int:
        if node not in self.values:
            if (part := slice_of(node)) is not None:
                source, start, end = part
                self.values[node] = self.builder.add("slice", [self._value(source)], end - start, start=start)
            elif (found := resized(self.ws, node)) is not None:
                options: dict[str, Any] = {"mode": found[1], "upscale_factor": _factor(node)}
                self.values[node] = self.builder.add("resize", [self._value(found[0])], dims(node)[1], **options)
        value = self.values[node]
        assert isinstance(value, int)
        return value

    def _add_layer(self, op: str, node: fx.Node, inputs: list[int], channels: int, weights: dict[str, Any], **a: Any):  # type: ignore[no-untyped-def]
        keys = {name: None if w is None else (w, self.ws.values[w]) for name, w in weights.items()}
        return self.builder.add(op, inputs, channels, keys, **a)

    def _conv3x3(self, node: fx.Node) -> None:
        x, weight, bias, residual, activation, slope, mode = node.args
        inputs = [self._value(x)] + ([] if residual is None else [self._value(residual)])
        self.values[node] = self._add_layer(
            "conv3x3",
            node,
            inputs,
            dims(node)[1],
            {"weight": weight, "bias": bias},
            activation=activation,
            negative_slope=slope,
            residual_mode=mode,
        )

    def _spab(self, node: fx.Node) -> None:
        x, w1, b1, w2, b2, w3, b3, _return_mid = node.args
        first = self._value(x)
        silu = {"activation": "silu", "negative_slope": 0.0, "residual_mode": "post"}
        head = {"activation": "none", "negative_slope": 0.0, "residual_mode": "attention"}
        c1, c2, c3 = (self.ws.values[w].shape[0] for w in (w1, w2, w3))  # type: ignore[index]
        mid = self._add_layer("conv3x3", node, [first], c1, {"weight": w1, "bias": b1}, **silu)
        y = self._add_layer("conv3x3", node, [mid], c2, {"weight": w2, "bias": b2}, **silu)
        y = self._add_layer("conv3x3", node, [y, first], c3, {"weight": w3, "bias": b3}, **head)
        self.values[node] = (y, mid)

    def _tail(self, node: fx.Node) -> None:
        x, weight, bias, residual, r = node.args
        inputs = [self._value(x)] + ([] if residual is None else [self._value(residual)])
        weights = {"weight": weight, "bias": bias}
        self.values[node] = self._add_layer(
            "conv3x3_pixel_shuffle", node, inputs, dims(node)[1], weights, upscale_factor=r
        )

    def _conv1x1(self, node: fx.Node) -> None:
        xs, weight, bias, activation, slope, *added = node.args
        attributes: dict[str, Any] = {"activation": activation, "negative_slope": slope}
        inputs = [*(self._value(x) for x in xs), *self._residual(added, attributes)]  # type: ignore[union-attr]
        weights = {"weight": weight, "bias": bias}
        self.values[node] = self._add_layer("conv1x1", node, inputs, dims(node)[1], weights, **attributes)

    def _esa(self, node: fx.Node) -> None:
        x, *weights = node.args
        named = dict(zip(ESA_WEIGHTS, weights, strict=True))
        self.values[node] = self._add_layer(
            "esa",
            node,
            [self._value(x)],
            dims(node)[1],
            named,
            hidden=self.ws.values[named["w1"]].shape[0],  # type: ignore[index]
            has_conv_f=named["wf"] is not None,
            has_conv_max=named["w_max"] is not None,
        )

    def _bsconv(self, node: fx.Node) -> None:
        x, pointwise, depthwise, bias, padding_mode, activation, slope, *added = node.args
        attributes: dict[str, Any] = {"padding_mode": padding_mode, "activation": activation, "negative_slope": slope}
        inputs = [self._value(x), *self._residual(added, attributes)]
        weights = {"pointwise": pointwise, "depthwise": depthwise, "bias": bias}
        self.values[node] = self._add_layer("bsconv", node, inputs, dims(node)[1], weights, **attributes)

    def _depthwise_conv(self, node: fx.Node) -> None:
        x, weight, bias, dilation, activation, slope, gated = node.args
        self.values[node] = self._add_layer(
            "depthwise_conv",
            node,
            [self._value(x)],
            dims(node)[1],
            {"weight": weight, "bias": bias},
            kernel_size=list(self.ws.values[weight].shape[2:]),  # type: ignore[index]
            dilation=dilation,
            activation=activation,
            negative_slope=slope,
            gated=gated,
        )

    def _layer_norm2d(self, node: fx.Node) -> None:
        x, weight, bias, eps = node.args
        has = {"has_weight": weight is not None, "has_bias": bias is not None}
        weights = {"weight": weight, "bias": bias}
        self.values[node] = self._add_layer(
            "layer_norm2d", node, [self._value(x)], dims(node)[1], weights, eps=eps, **has
        )

    def _pool(self, node: fx.Node) -> None:
        self.values[node] = self.builder.add(
            "adaptive_max_pool", [self._value(node.args[0])], dims(node)[1], divisor=_divisor(node)
        )

    def _statistic(self, node: fx.Node) -> None:
        x, kind, correction = node.args
        self.values[node] = self.builder.add(
            "statistic", [self._value(x)], dims(node)[1], kind=kind, correction=correction
        )

    def _modulate(self, node: fx.Node) -> None:
        maps: Any
        x, maps, mode, activation, slope = node.args
        inputs = [self._value(t) for t in (x, *maps)]
        options: dict[str, Any] = {"mode": mode, "activation": activation, "negative_slope": slope}
        self.values[node] = self.builder.add("modulate", inputs, dims(node)[1], **options)

    def _residual(self, added: list[Any], attributes: dict[str, Any]) -> list[int]:
        """The value of a residual among an operator's last arguments, whose mode goes to the attributes, or nothing."""
        if not added or added[0] is None:
            return []
        attributes["residual_mode"] = added[1] if len(added) > 1 else "post"
        return [self._value(added[0])]

    def _getitem(self, node: fx.Node) -> None:
        source, index = node.args
        values = self.values[source]  # type: ignore[index]
        assert isinstance(values, tuple) and isinstance(index, int)
        self.values[node] = values[index]

    def _activate(self, node: fx.Node, x: fx.Node, function: str, low: Tensor, high: Tensor) -> None:
        self.values[node] = self.builder.add(
            "activate", [self._value(x)], dims(node)[1], function=function, low=low.tolist(), high=high.tolist()
        )

    def _normalize(self, node: fx.Node, x: fx.Node, scale: Tensor, shift: Tensor) -> None:
        """(x - s) * k with one number per channel, merged into a layer of its kind that comes just before it."""
        value = self._value(x)
        shifts, scales = [float(v) for v in -shift / scale], [float(v) for v in scale]
        layers = self.builder.layers
        k = value - len(self.builder.inputs)
        if k >= 0 and k == len(layers) - 1 and layers[k].op == "normalize" and len(x.users) == 1:
            # ((x - s1) k1 - s2) k2 = (x - (s1 + s2 / k1)) k1 k2
            before = layers.pop()
            s1, k1 = before.attributes["shift"], before.attributes["scale"]
            value = before.inputs[0]
            shifts = [a + b / c for a, b, c in zip(s1, shifts, k1, strict=True)]
            scales = [a * b for a, b in zip(k1, scales, strict=True)]
        self.values[node] = self.builder.add("normalize", [value], dims(node)[1], shift=shifts, scale=scales)


def _assemble(ws: Workspace, groups: dict[int, list[fx.Node]], segments: dict[int, _Segment]) -> fx.GraphModule:
    """The network with a call of `esr::run_plan` for every segment, in an order that allows it."""
    member = {n: i for i, nodes in groups.items() for n in nodes}
    root, graph = nn.Module(), fx.Graph()
    new: dict[fx.Node, fx.Node] = {}

    def constant(node: fx.Node) -> fx.Node:
        value = ws.values[node]
        assert isinstance(value, Tensor)
        return _store(root, graph, value.to(ws.dtype(node)) if value.dtype == torch.float64 else value)

    def argument(node: fx.Node) -> fx.Node:
        if node not in new:
            assert node in ws.values
            new[node] = constant(node)
        return new[node]

    waiting = [n for n in ws.graph.nodes if n.op != "output" and n not in ws.values]
    # Plans need no sizes.
    waiting = [n for n in waiting if not _is_size(n) or any(u not in member for u in _readers(n))]
    done: set[Any] = set()
    while waiting:
        rest = []
        for node in waiting:
            i = member.get(node)
            if i in done:
                continue
            needs = node.all_input_nodes if i is None else segments[i].inputs
            if not all(n in new or n in ws.values for n in needs):
                rest.append(node)
                continue
            if i is None:
                new[node] = graph.node_copy(node, argument)
                new[node].target = _PLAIN.get(node.target, node.target)
                continue
            segment = segments[i]
            done.add(i)
            weights = [_store(root, graph, w) for w in segment.weights]
            call = graph.call_function(
                ops.run_plan.default, ([argument(n) for n in segment.inputs], weights, segment.plan.to_json())
            )
            results = {v: graph.call_function(operator.getitem, (call, k)) for k, v in enumerate(segment.results)}
            for n in segment.outputs:
                new[n] = results[segment._value(n)]
        assert len(rest) < len(waiting), "the plans of a graph depend on each other"
        waiting = rest
    graph.output(argument(ws.returned()))
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    lend_memory(graph, _enlargement(ws))
    for node in graph.nodes:
        # No fake tensors, which cannot be pickled.
        value = node.meta.get("val")
        node.meta = {"floating": isinstance(value, Tensor) and value.is_floating_point()}
    graph.lint()
    return fx.GraphModule(root, graph, "Optimized")


def _enlargement(ws: Workspace) -> int | None:
    """By how much the result is larger than the image, where that is the same for every size and both axes."""
    image = next(n for n in ws.graph.nodes if n.op == "placeholder" and n not in ws.values)
    if not (is_map(image) and is_map(ws.returned())):
        return None
    factors = {ratio(a, b) for a, b in zip(dims(ws.returned())[2:], dims(image)[2:], strict=True)}
    return factors.pop() if len(factors) == 1 else None


def _store(root: nn.Module, graph: fx.Graph, value: Tensor) -> fx.Node:
    name = f"constant_{len(root._buffers) + len(root._parameters)}"
    value = value if value.is_contiguous() else value.clone()
    if value.is_floating_point():  # counted as the network's own were
        root.register_parameter(name, nn.Parameter(value, requires_grad=False))
    else:
        root.register_buffer(name, value)
    return graph.get_attr(name)


def _describe(ws: Workspace, foreign: list[fx.Node], refused: dict[fx.Node, str]) -> list[str]:
    """What stayed plain: one line per kind, with the first place and how many more there are."""
    kinds: Counter[str] = Counter()
    places: dict[str, str] = {}
    for node in foreign:
        kind = f"{_kind(ws, node)} {refused.get(node, 'has no fused form yet')}"
        kinds[kind] += 1
        places.setdefault(kind, location(node))
    lines = []
    for kind, count in kinds.items():
        where = ", ".join(w for w in (places[kind], f"{count} times" if count > 1 else "") if w)
        lines.append(f"{kind} ({where})" if where else kind)
    return lines


def _kind(ws: Workspace, node: fx.Node) -> str:
    if node.target is aten.convolution.default:
        _x, weight, _b, stride, padding, dilation, transposed, _o, groups = node.args
        shape = weight.meta["val"].shape  # type: ignore[union-attr]
        words = [f"{'conv_transpose2d' if transposed else 'conv2d'} {'x'.join(str(k) for k in shape[2:])}"]
        for name, v, usual in (("stride", stride, 1), ("dilation", dilation, 1), ("padding", padding, None)):
            values = list(dict.fromkeys(v))  # type: ignore[arg-type]
            if values != [usual]:
                words.append(f"{name} {'x'.join(map(str, values))}")
        if groups != 1:
            words.append(f"{groups} groups")
        if weight not in ws.values:
            words.append("weights computed from the image")
        return ", ".join(words)
    operands = [n for n in node.all_input_nodes if is_map(n) and n not in ws.values]
    name = str(node.target).removesuffix(".default")
    if node.target in (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.div.Tensor):
        name = name.removesuffix(".Tensor")
        if len(operands) == 2:
            name += " of feature maps" if dims(operands[0]) == dims(operands[1]) else " with broadcasting"
    return name
