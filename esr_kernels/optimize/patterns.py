"""Patterns: from a simplified ATen graph to `esr` operators.

What surrounds a convolution element by element is told by its values, not by how it is written: the operations up to
the next single result are evaluated in float64 on numbers of every size and compared with what an operator can do.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ..backends.reference._common import activate, apply, attention
from ..functional import DEPTHWISE_SIDES
from ..plan import MOST_MODULATE_MAPS
from .simplify import Conv, conv_of, function_of, within, write_conv
from .workspace import (
    _CASTS,
    SPLITS,
    UPSAMPLES,
    Workspace,
    aten,
    concatenated,
    dims,
    getitem,
    is_map,
    is_pixel,
    is_pointwise,
    resized,
    slice_of,
    with_channels,
)

ops = torch.ops.esr

_ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")
# Functions of every element that are operators without another argument.
_BARE_FUNCTIONS = {
    "relu": aten.relu.default,
    "silu": aten.silu.default,
    "gelu": aten.gelu.default,
    "sigmoid": aten.sigmoid.default,
    "hardswish": aten.hardswish.default,
    "mish": aten.mish.default,
}
_LONGEST = 12  # operations between a convolution and the end of its epilogue
_EXACT = 1e-9  # of float64 evaluations that should be equal; the approximations of GELU differ by 1e-4


def match(ws: Workspace, scale_limit: float | None = None) -> None:
    """Rewrite the graph with `esr` operators where they compute the same.

    Args:
        scale_limit: as of `merge_linear`.
    """
    _enlarged_sizes(ws)
    _convolutions(ws)
    _strips(ws)
    _separable(ws)
    _depthwise(ws)
    _normalizations(ws)
    _epilogues(ws, scale_limit)
    _sums(ws)
    if _split(ws):
        _epilogues(ws, scale_limit)
    _gates(ws)
    _spatial_attention(ws)
    _functions(ws)
    _modulations(ws)
    _differences(ws)
    _separate(ws)
    ws.clean()


def _enlarged_sizes(ws: Workspace) -> None:
    """Sizes of maps enlarged by a whole factor as products, where they were computed by way of floating point."""
    for node in ws.graph.nodes:
        if node.target not in UPSAMPLES or node in ws.values or len(node.args) < 3 or not is_map(node.args[0]):
            continue
        factors = node.args[-1]
        if isinstance(factors, (list, tuple)) and all(isinstance(f, float) and f == int(f) >= 1 for f in factors):
            value = node.args[0].meta["val"]
            sides = [s * int(f) for s, f in zip(value.shape[2:], factors, strict=True)]  # type: ignore[arg-type]
            node.meta["val"] = value.new_empty((*value.shape[:2], *sides))


# --- convolutions


def _convolutions(ws: Workspace) -> None:
    for node in list(ws.graph.nodes):
        conv = conv_of(ws, node)
        if conv is None or not conv.plain:
            continue
        xs = _parts(ws, conv.x)
        if conv.kernel == (3, 3) and conv.padding == (1, 1):
            _write(ws, _Fused("conv3x3", node, xs if len(xs) == 1 else [conv.x], conv.weight, conv.bias), node)
        elif conv.pointwise:
            xs, weight = _whole(ws, xs, conv.weight)
            _write(ws, _Fused("conv1x1", node, xs, weight, conv.bias), node)
    ws.clean()


def _parts(ws: Workspace, x: fx.Node) -> list[fx.Node]:
    """What a map is a concatenation of, or itself."""
    return (concatenated(x) if x not in ws.values else None) or [x]


def _sums(ws: Workspace) -> None:
    """3x3 convolutions of concatenations as sums of convolutions."""
    for node in list(ws.graph.nodes):
        fused = None if node._erased else _fused_of(ws, node)
        if fused is None or fused.op != "conv3x3" or fused.mode == "attention" or _is_shuffled(node):
            continue
        xs = _parts(ws, fused.xs[0])
        if len(xs) > 1 and all(isinstance(dims(x)[1], int) for x in xs):
            _sum_over(ws, fused, xs)
    ws.clean()


def _is_shuffled(node: fx.Node) -> bool:
    return any(user.target is aten.pixel_shuffle.default for user in node.users)


def _sum_over(ws: Workspace, fused: _Fused, xs: list[fx.Node]) -> None:
    """The convolution of a concatenation: the sum of those of its parts, each the residual of the next."""
    parts: dict[fx.Node, Tensor] = {}  # a map that is there twice is read once
    first = 0
    for x in xs:
        part = fused.weight[:, first : first + dims(x)[1]]
        first += dims(x)[1]
        parts[x] = parts[x] + part if x in parts else part
    at, bias = fused.node, fused.bias
    behind = fused.residual if fused.mode == "post" and fused.activation != "none" else None
    total = fused.residual if behind is None else None
    *before, last = parts.items()
    for x, weight in before:
        total, bias = _insert(ws, _Fused("conv3x3", at, [x], weight, bias, total), at), None
    result = _insert(ws, replace(fused, xs=[last[0]], weight=last[1], bias=bias, residual=total, mode="pre"), at)
    ws.replace(at, result if behind is None else ws.call(at, aten.add.Tensor, (result, behind), at))


def _whole(ws: Workspace, xs: list[fx.Node], weight: Tensor) -> tuple[list[fx.Node], Tensor]:
    """Inputs of a 1x1 convolution with slices of channels replaced by what they are slices of, where that is cheap."""
    sources: dict[fx.Node, Tensor] = {}
    first = 0
    for x in xs:
        if not isinstance(dims(x)[1], int):
            return xs, weight
        columns = weight[:, first : first + dims(x)[1]]
        first += dims(x)[1]
        source, start = x, 0
        found = slice_of(x)
        if found is not None and _slices(found[0]) is None:
            source, start, _end = found
        if source not in sources:
            sources[source] = weight.new_zeros(weight.shape[0], dims(source)[1], 1, 1)
        sources[source][:, start : start + dims(x)[1]] += columns
    whole = torch.cat(list(sources.values()), 1)
    # Reading more costs less than copying what is to be read.
    return (list(sources), whole) if whole.shape[1] <= 1.5 * weight.shape[1] else (xs, weight)


def _slices(node: fx.Node) -> list[tuple[fx.Node, int, int]] | None:
    """Who reads a map and which channels, where all do so by slices that do not overlap."""
    readers = [u for n in node.users for u in (n.users if n.target in SPLITS else [n])]
    found = [(r, *s[1:]) for r in readers if (s := slice_of(r)) is not None and s[0] is node]
    ranges = sorted((start, end) for _, start, end in found)
    if not found or len(found) != len(readers) or any(a[1] > b[0] for a, b in itertools.pairwise(ranges)):
        return None
    return found


def _split(ws: Workspace) -> bool:
    """A convolution of which only slices of channels are read: one for each slice; whether there was any."""
    changed = False
    for node in list(ws.graph.nodes):
        fused = None if node._erased else _fused_of(ws, node)
        if fused is None or fused.op not in ("conv3x3", "conv1x1") or fused.residual is not None:
            continue
        for reader, start, end in _slices(node) or ():
            bias = None if fused.bias is None else fused.bias[start:end]
            _write(ws, replace(fused, weight=fused.weight[start:end], bias=bias), reader)
            changed = True
    ws.clean()
    return changed


@dataclass
class _Fused:
    """An `esr` convolution that may take in more of what follows it."""

    op: str
    node: fx.Node
    xs: list[fx.Node]
    weight: Tensor
    bias: Tensor | None
    residual: fx.Node | None = None
    activation: str = "none"
    slope: float = 0.05
    mode: str = "post"
    factor: int = 1
    depthwise: Tensor | None = None
    padding_mode: str = "zeros"
    dilation: int = 1
    gated: bool = False

    def scaled(self, scale: Tensor, shift: Tensor) -> _Fused:
        """Followed by y * scale + shift, before activation and residual; one number each per channel of the result."""
        repeat = self.factor**2
        scale, shift = scale.repeat_interleave(repeat), shift.repeat_interleave(repeat)
        weight = self.weight if self.depthwise is None else self.depthwise
        conv = Conv(self.node, self.xs[0], weight, self.bias).scaled(scale, shift)
        if self.depthwise is not None:
            return replace(self, depthwise=conv.weight, bias=conv.bias)
        return replace(self, weight=conv.weight, bias=conv.bias)


def _fused_of(ws: Workspace, node: fx.Node) -> _Fused | None:
    """A convolution among the `esr` operators with known weights; also one that the network called itself."""

    def known(*arguments: Any) -> bool:
        return all(a is None or isinstance(ws.known(a), Tensor) for a in arguments)

    def bias(b: Any) -> Any:
        return None if b is None else ws.known(b)

    a: Any = node.args
    if node in ws.values:
        return None
    if node.target is ops.conv3x3.default and known(a[1], a[2]):
        return _Fused("conv3x3", node, [a[0]], ws.known(a[1]), bias(a[2]), a[3], a[4], a[5], a[6])  # type: ignore[arg-type]
    if node.target is ops.conv1x1.default and known(a[1], a[2]):
        residual, mode = a[5] if len(a) > 5 else None, a[6] if len(a) > 6 else "post"
        return _Fused("conv1x1", node, a[0], ws.known(a[1]), bias(a[2]), residual, a[3], a[4], mode)  # type: ignore[arg-type]
    if node.target is ops.conv3x3_pixel_shuffle.default and known(a[1], a[2]):
        return _Fused("conv3x3_pixel_shuffle", node, [a[0]], ws.known(a[1]), bias(a[2]), a[3], factor=a[4])  # type: ignore[arg-type]
    if node.target is ops.bsconv.default and known(a[1], a[2], a[3]):
        residual, mode = a[7] if len(a) > 7 else None, a[8] if len(a) > 8 else "post"
        found = _Fused("bsconv", node, [a[0]], ws.known(a[1]), bias(a[3]), residual, a[5], a[6], mode)  # type: ignore[arg-type]
        return replace(found, depthwise=ws.known(a[2]), padding_mode=a[4])  # type: ignore[arg-type]
    if node.target is ops.depthwise_conv.default and known(a[1], a[2]) and not a[6]:
        found = _Fused("depthwise_conv", node, [a[0]], ws.known(a[1]), bias(a[2]), None, a[4], a[5])  # type: ignore[arg-type]
        return replace(found, dilation=a[3])
    return None


def _write(ws: Workspace, fused: _Fused, at: fx.Node, gone: list[fx.Node] | None = None) -> fx.Node:
    """Put the operator in the place of `at`."""
    node = _insert(ws, fused, at)
    ws.replace(at, node, gone or [])
    return node


def _insert(ws: Workspace, fused: _Fused, at: fx.Node) -> fx.Node:
    """The operator in front of `at`, with a result of its shape."""
    dtype = ws.dtype(fused.node)
    weight = ws.constant(fused.weight, dtype)
    bias = None if fused.bias is None else ws.constant(fused.bias, dtype)
    x = fused.xs[0]
    act = (fused.activation, float(fused.slope))
    args: tuple[Any, ...]
    if fused.op == "conv3x3":
        args = (x, weight, bias, fused.residual, *act, fused.mode)
    elif fused.op == "conv1x1":
        args = (fused.xs, weight, bias, *act, fused.residual, fused.mode)
    elif fused.op == "conv3x3_pixel_shuffle":
        args = (x, weight, bias, fused.residual, fused.factor)
    elif fused.op == "depthwise_conv":
        args = (x, weight, bias, fused.dilation, *act, fused.gated)
    else:
        assert fused.depthwise is not None
        dw = ws.constant(fused.depthwise, dtype)
        args = (x, weight, dw, bias, fused.padding_mode, *act, fused.residual, fused.mode)
    node = ws.call(at, getattr(ops, fused.op).default, args, at)
    node.meta |= {k: fused.node.meta[k] for k in ("stack_trace", "nn_module_stack") if k in fused.node.meta}
    return node


def _bias_after(before: Tensor, depth: Conv) -> Tensor:
    """The bias of a depthwise convolution of a reflected map with that of the map taken in."""
    through = before * depth.weight.sum((1, 2, 3))
    return through if depth.bias is None else depth.bias + through


# --- depthwise convolutions of one row and one column


@dataclass
class _Strip:
    conv: Conv
    x: fx.Node  # without the padding
    padding_mode: str


def _strips(ws: Workspace) -> None:
    """Depthwise 3x1 and 1x3, in either order, as one depthwise 3x3 with the product of their weights."""
    for node in list(ws.graph.nodes):
        second = None if node._erased else _strip_of(ws, node)
        first = None if second is None else _strip_of(ws, second.x)
        if second is None or first is None or len(second.x.users) != 1 or first.padding_mode != second.padding_mode:
            continue
        if first.conv.kernel == second.conv.kernel:
            continue
        bias = second.conv.bias
        if first.conv.bias is not None and bool(first.conv.bias.any()):
            if second.padding_mode == "zeros":
                continue  # beside the image the second reads zeros, not the first's bias
            bias = _bias_after(first.conv.bias, second.conv)
        x, padding = first.x, (1, 1)
        if second.padding_mode == "reflect":
            x, padding = ws.call(node, aten.reflection_pad2d.default, (x, [1, 1, 1, 1]), node), (0, 0)
            value = node.meta["val"]
            x.meta["val"] = value.new_empty((*value.shape[:2], value.shape[2] + 2, value.shape[3] + 2))
        weight = first.conv.weight * second.conv.weight
        both = write_conv(ws, Conv(node, x, weight, bias, padding=padding, groups=second.conv.groups), node)
        ws.replace(node, both)
        ws.clean()


def _strip_of(ws: Workspace, node: fx.Node) -> _Strip | None:
    """A node as a depthwise convolution of 3x1 or 1x3 that keeps the size, if it is one."""
    conv = conv_of(ws, node)
    if conv is None or conv.kernel not in ((3, 1), (1, 3)) or conv.stride != (1, 1) or conv.dilation != (1, 1):
        return None
    if not conv.depthwise:
        return None
    up, left = (k // 2 for k in conv.kernel)
    if conv.padding == (up, left):
        return _Strip(conv, conv.x, "zeros")
    pad: Any = conv.x
    if conv.padding != (0, 0) or pad.target is not aten.reflection_pad2d.default or len(pad.users) != 1:
        return None
    return _Strip(conv, pad.args[0], "reflect") if list(pad.args[1]) == [left, left, up, up] else None


# --- depthwise separable pairs


def _separable(ws: Workspace) -> None:
    """1x1 without an activation, then depthwise 3x3 of its zero- or reflection-padded result."""
    for node in list(ws.graph.nodes):
        depth = conv_of(ws, node)
        if depth is None or depth.stride != (1, 1) or depth.dilation != (1, 1) or depth.kernel != (3, 3):
            continue
        if not depth.depthwise:
            continue
        mode, x, between = "zeros", depth.x, []
        if depth.padding == (0, 0) and _reflects(x) and len(x.users) == 1:
            between, x, mode = [x], x.args[0], "reflect"  # type: ignore[assignment]
        elif depth.padding != (1, 1):
            continue
        point = _fused_of(ws, x)
        if point is None or point.op != "conv1x1" or point.activation != "none" or len(point.xs) != 1:
            continue
        if point.residual is not None:
            continue
        if len(x.users) != 1 or _halves(ws, node) is not None:
            continue  # the halves of a gate are multiplied where they are made
        source = point.xs[0]
        bias = depth.bias
        if point.bias is not None and bool(point.bias.any()):
            if mode == "zeros":
                continue  # the border ring has it, zero padding has not
            bias = _bias_after(point.bias, depth)
        fused = _Fused("bsconv", node, [source], point.weight, bias, depthwise=depth.weight, padding_mode=mode)
        _write(ws, fused, node, [x, *between])
    ws.clean()


def _reflects(node: fx.Node) -> bool:
    return node.target is aten.reflection_pad2d.default and list(node.args[1]) == [1, 1, 1, 1]  # type: ignore[arg-type]


# --- depthwise convolutions, their halves multiplied


def _depthwise(ws: Workspace) -> None:
    """Depthwise convolutions that keep the size and are not part of a separable pair."""
    for node in list(ws.graph.nodes):
        conv = conv_of(ws, node)
        if conv is None or conv.stride != (1, 1) or not conv.depthwise or conv.dilation[0] != conv.dilation[1]:
            continue
        if any(k not in DEPTHWISE_SIDES for k in conv.kernel):
            continue
        if conv.padding != tuple(conv.dilation[0] * (k // 2) for k in conv.kernel):
            continue
        fused = _Fused("depthwise_conv", node, [conv.x], conv.weight, conv.bias, dilation=conv.dilation[0])
        _write(ws, fused, node)
    ws.clean()


def _halves(ws: Workspace, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two halves of a map's channels, where nobody reads anything else of it."""
    channels = dims(node)[1]
    if not isinstance(channels, int) or channels % 2:
        return None
    half = channels // 2
    users = list(node.users)
    if len(users) == 1 and users[0].target in SPLITS:
        parts = getitem(users[0])
        if sorted(parts) != [0, 1] or len(users[0].users) != 2:
            return None
        first, second = parts[0], parts[1]
    elif len(users) == 2 and all(u.target is aten.slice.Tensor and u.args[1] in (1, -3) for u in users):
        starts = {u.args[2]: u for u in users}
        if set(starts) != {0, half}:
            return None
        first, second = starts[0], starts[half]
    else:
        return None
    if all(is_map(p) and dims(p)[1] == half for p in (first, second)):
        return first, second
    return None


def _gates(ws: Workspace) -> None:
    """Depthwise convolution, one half of its channels times the other, as gated feed-forward networks have it."""
    for node in list(ws.graph.nodes):
        fused = None if node._erased else _fused_of(ws, node)
        if fused is None or fused.op != "depthwise_conv" or fused.activation != "none":
            continue
        found = _halves(ws, node)
        if found is None:
            continue
        first, second = found
        for region, end in _regions(ws, first):
            call = _evaluation(ws, first, region, end)
            if call is None or call.others != [second] or not set(second.users) <= set(region):
                continue
            x = _probes(ws, region, dims(first)[1])
            r = x[:, :, torch.randperm(x.shape[2], generator=torch.Generator().manual_seed(1))]
            got, size = call(x, r), torch.maximum(x.abs(), r.abs()) * r.abs().clamp_min(1)
            known = ("none", *_ACTIVATIONS)
            activation = next(
                (a for a in known if got is not None and _equal(got, activate(x, a, 0.0) * r, size)), None
            )
            if activation is not None:
                gone = [node, *(a for a in (first.args[0],) if a is not node), first, second, *region[:-1]]
                _write(ws, replace(fused, activation=activation, gated=True), end, gone)  # type: ignore[arg-type]
                break
    ws.clean()


# --- normalisation over channels


def _normalizations(ws: Workspace) -> None:
    """Layer normalisation over the channels of every pixel, told by its values like what follows a convolution."""
    for node in list(ws.graph.nodes):
        if node._erased or not is_map(node) or node in ws.values or not isinstance(dims(node)[1], int):
            continue
        if any(_over_channels(u) for u in node.users):
            _normalization(ws, node)
    ws.clean()


def _write_norm(ws: Workspace, x: fx.Node, end: fx.Node, weight: Any, bias: Any, eps: float) -> None:
    dtype = ws.dtype(x)
    parameters = (None if p is None else ws.constant(p, dtype) for p in (weight, bias))
    node = ws.call(end, ops.layer_norm2d.default, (x, *parameters, eps), end)
    ws.replace(end, node)


def _over_channels(node: fx.Node) -> bool:
    """Whether a node reduces a map to one channel."""
    place = {aten.mean.dim: 2, aten.sum.dim_IntList: 2, aten.var.dim: 3, aten.var.correction: None}
    if node.target not in place:
        return False
    axes, at = node.args[1] if len(node.args) > 1 else None, place[node.target]  # type: ignore[index]
    keeps = node.args[at] if at is not None and len(node.args) > at else node.kwargs.get("keepdim", False)
    return isinstance(axes, (list, tuple)) and list(axes) in ([1], [-3]) and bool(keeps)


def _normalization(ws: Workspace, x: fx.Node) -> None:
    order = {n: i for i, n in enumerate(ws.graph.nodes)}
    inside: list[fx.Node] = []
    pending = {u for u in x.users if _over_channels(u) or is_pointwise(u)}
    outside = set(x.users) - pending
    found: tuple[fx.Node, tuple[Tensor, Tensor, float]] | None = None
    while pending and len(inside) < _LONGEST:
        node = min(pending, key=order.__getitem__)
        pending.discard(node)
        reads = [a for a in node.all_input_nodes if a not in ws.values]
        if not (_over_channels(node) or is_pointwise(node)) or not all(a is x or a in inside for a in reads):
            outside.add(node)  # reads the map for a purpose of its own
            continue
        inside.append(node)
        pending |= set(node.users) - outside
        # Others may read the mean, which then stays.
        whole = [n for n in inside[:-1] if not is_map(n) or dims(n) == dims(x)]
        closed = all(user in inside for member in whole for user in member.users)
        if closed and is_map(node) and dims(node) == dims(x) and (norm := _norm_of(ws, x, inside, node)) is not None:
            found = node, norm
    if found is not None:
        end, (weight, bias, eps) = found
        plain = bool((weight == 1).all()) and not bool(bias.any())
        _write_norm(ws, x, end, None if plain else weight, None if plain else bias, eps)


def _norm_of(ws: Workspace, x: fx.Node, region: list[fx.Node], end: fx.Node) -> tuple[Tensor, Tensor, float] | None:
    """Weight, bias and epsilon with which a region is a layer normalisation over channels."""
    call = _evaluation(ws, x, region, end)
    if call is None or call.others:
        return None
    channels = dims(x)[1]
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, channels, 48, 1, generator=generator, dtype=torch.float64)
    values = values * torch.logspace(-4, 3, 48, dtype=torch.float64).view(1, 1, -1, 1) + 0.3
    got = call(values)
    if got is None or channels < 2:
        return None
    numbers = [ws.known(a) for n in region for a in (*n.args, *n.kwargs.values())]
    candidates = {float(v) for v in numbers if v is not None and (not isinstance(v, Tensor) or v.numel() == 1)}
    centred = values - values.mean(1, keepdim=True)
    variance = centred.square().mean(1, keepdim=True)
    for eps in sorted(e for e in candidates if 0 < e < 1):
        normal = centred / torch.sqrt(variance + eps)
        n, y = (t - t.mean(2, keepdim=True) for t in (normal, got))
        weight = (n * y).sum((0, 2, 3)) / n.square().sum((0, 2, 3))
        bias = (got - _column(weight) * normal).mean((0, 2, 3))
        if _equal(got, _column(weight) * normal + _column(bias), normal):
            weight = torch.where((weight - weight.round()).abs() < _EXACT, weight.round(), weight)
            bias = torch.where(bias.abs() < _EXACT, 0.0, bias)
            return weight, bias, eps
    return None


# --- what follows a convolution


def _epilogues(ws: Workspace, limit: float | None) -> None:
    for start in list(ws.graph.nodes):
        node: fx.Node | None = None if start._erased else start
        while node is not None:
            fused = _fused_of(ws, node)
            node = None if fused is None else _absorb(ws, fused, limit)
    ws.clean()


def _absorb(ws: Workspace, fused: _Fused, limit: float | None) -> fx.Node | None:
    """Take in the next operation or operations; the new node, or None where nothing fits."""
    users = list(fused.node.users)
    if len(users) == 1 and users[0].target is aten.pixel_shuffle.default:
        return _shuffle(ws, fused, users[0])
    for region, end in _regions(ws, fused.node):
        found = _recognize(ws, fused, region, end, limit)
        if found is None:
            continue
        new, extra = found
        node = _write(ws, replace(new, node=fused.node), end, [fused.node, *region[:-1]])
        if extra is not None:  # the operator's result times a number
            scaled = ws.call(node.next, aten.mul.Tensor, (node, extra), node)
            node.replace_all_uses_with(scaled, delete_user_cb=scaled.__ne__)
        return node
    return None


def _shuffle(ws: Workspace, fused: _Fused, node: fx.Node) -> fx.Node | None:
    if fused.op != "conv3x3" or (
        fused.residual is not None and (fused.mode == "attention" or fused.activation != "none")
    ):
        return None
    factor = int(node.args[1])  # type: ignore[arg-type]
    residual = None
    if fused.residual is not None:  # shuffled by itself: the shuffle of a sum is the sum of the shuffles
        residual = ws.call(node, aten.pixel_shuffle.default, (fused.residual, factor), node)
    tail = replace(fused, op="conv3x3_pixel_shuffle", residual=residual, factor=factor, activation="none")
    if fused.activation == "none":
        return _write(ws, tail, node, [fused.node])
    # An activation of what is shuffled, as one behind it.
    shuffled = _insert(ws, tail, node)
    if fused.activation == "leaky_relu":
        end = ws.call(node, aten.leaky_relu.default, (shuffled, float(fused.slope)), node)
    elif fused.activation == "gelu_tanh":
        end = ws.call(node, aten.gelu.default, (shuffled,), node)
        end.kwargs = {"approximate": "tanh"}
    else:
        end = ws.call(node, _BARE_FUNCTIONS[fused.activation], (shuffled,), node)
    ws.replace(node, end, [fused.node])
    return None


def _regions(ws: Workspace, h: fx.Node) -> list[tuple[list[fx.Node], fx.Node]]:
    """Element-by-element operations after `h` that end in one result and are used by nobody else, shortest first."""
    order = {n: i for i, n in enumerate(ws.graph.nodes)}
    inside: list[fx.Node] = []
    found = []
    pending = set(h.users)
    while pending and len(inside) < _LONGEST:
        node = min(pending, key=order.__getitem__)
        pending.discard(node)
        if not is_pointwise(node):
            break
        inside.append(node)
        pending |= set(node.users)
        members = {h, *inside[:-1]}
        closed = all(user in inside for member in members for user in member.users)
        if closed and is_map(node) and dims(node) == dims(h):
            found.append((list(inside), node))
        if ws.returned() is node:
            break
    return found


def _probes(ws: Workspace, region: list[fx.Node], channels: int) -> Tensor:
    """Numbers [1, channels, P, 1] on both sides of every constant in the region, and of every size."""
    generator = torch.Generator().manual_seed(0)
    edges: list[float] = []
    for node in region:
        for a in (*node.args, *node.kwargs.values()):
            value = ws.known(a)
            if isinstance(value, Tensor):
                edges += [float(v) for v in value.flatten()[:64]]
            elif value is not None:
                edges.append(float(value))
    around = [e * s + d for e in dict.fromkeys(edges) for s in (1, -1) for d in (-1e-3, 0, 1e-3, -1.0, 1.0)]
    fixed = torch.tensor([0.0, 1.0, -1.0, 2.0, -2.0, *around], dtype=torch.float64)
    sizes = torch.tensor([1e-3, 0.1, 1.0, 4.0, 30.0, 1e3, 1e6], dtype=torch.float64)
    drawn = torch.randn(len(sizes), 24, generator=generator, dtype=torch.float64) * sizes.view(-1, 1)
    values = torch.cat([fixed, drawn.flatten()])
    return values.view(1, 1, -1, 1).expand(1, channels, -1, 1).contiguous()


def _recognize(
    ws: Workspace, fused: _Fused, region: list[fx.Node], end: fx.Node, limit: float | None
) -> tuple[_Fused, float | None] | None:
    """The operator that computes `end`, and a number that its result is still to be multiplied by."""
    h = fused.node
    call = _evaluation(ws, h, region, end)
    if call is None:
        return None
    others = call.others
    if others and (not is_map(others[0]) or dims(others[0]) != dims(h)):
        return None  # a residual that is broadcast
    x = _probes(ws, call.region, dims(h)[1])

    def run(hv: Tensor, rv: Tensor | None = None) -> Tensor:
        result = call(hv, rv)
        if result is None:
            raise _NotInFloat64
        return result

    try:
        if not others:
            return _one_argument(fused, run, x, limit)
        return _two_arguments(fused, run, x, others[0], limit)
    except _NotInFloat64:
        return None


class _NotInFloat64(Exception):
    """An operation does not take float64."""


@dataclass
class _Evaluation:
    """A region as a function in float64.

    Attributes:
        h: its first argument.
        others: what it reads besides and besides constants: none or one.
    """

    ws: Workspace
    h: fx.Node
    region: list[fx.Node]
    end: fx.Node
    others: list[fx.Node]

    def __call__(self, hv: Tensor, rv: Tensor | None = None) -> Tensor | None:
        env: dict[fx.Node, Any] = {self.h: hv}
        if self.others:
            env[self.others[0]] = rv

        def resolve(n: fx.Node) -> Any:
            return env[n] if n in env else self.ws.values[n]

        try:
            for node in self.region:
                if node.target in _CASTS:
                    env[node] = env[node.args[0]]  # type: ignore[index]
                    continue
                env[node] = node.target(*map_arg(node.args, resolve), **map_arg(node.kwargs, resolve))  # type: ignore[operator]
            result: Tensor = env[self.end]
            return result.expand(hv.shape)
        except RuntimeError:
            return None  # an operation that does not take float64, or not another width


def _evaluation(ws: Workspace, h: fx.Node, region: list[fx.Node], end: fx.Node) -> _Evaluation | None:
    """A region that works pixel by pixel as a function of `h` and at most one other map."""
    others = _inputs(ws, region, h)
    # What is made of another input alone is no input: x * 0.5 beside x.
    made = [n for n in others if is_pointwise(n) and is_map(n) and set(_inputs(ws, [n], h)) < set(others)]
    others = [n for n in others if n not in made]
    region = [*made, *region]
    if len(others) > 1 or not isinstance(dims(h)[1], int):
        return None
    for node in region:
        for a in node.all_input_nodes:
            value = ws.values.get(a)
            if isinstance(value, Tensor) and value.dim() >= 2 and (value.shape[-1] > 1 or value.shape[-2] > 1):
                return None
            if a in ws.values and not isinstance(value, Tensor):
                return None
        if not is_map(node) and node.meta["val"].dtype != torch.bool:
            return None
    return _Evaluation(ws, h, region, end, others)


def _inputs(ws: Workspace, region: list[fx.Node], h: fx.Node) -> list[fx.Node]:
    """What a region reads besides `h` and constants."""
    found = dict.fromkeys(a for n in region for a in n.all_input_nodes)
    return [a for a in found if a is not h and a not in region and a not in ws.values]


def _equal(a: Tensor, b: Tensor, x: Tensor) -> bool:
    """Whether two evaluations agree; `x` is what they were made of, and sets the size of roundings."""
    allowed = _EXACT * torch.maximum(a.abs(), x.abs().clamp_min(1e-3))
    return bool(torch.isfinite(a).all()) and bool(((a - b).abs() <= allowed).all())


def _slopes(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f(0), f(1) - f(0) and f(-1) - f(0) per channel."""
    zero, plus, minus = (f(torch.full_like(x[:, :, :1], v)).flatten() for v in (0.0, 1.0, -1.0))
    return zero, plus - zero, minus - zero


def _column(v: Tensor) -> Tensor:
    return v.view(1, -1, 1, 1)


def _one_argument(
    fused: _Fused, f: Callable[..., Tensor], x: Tensor, limit: float | None
) -> tuple[_Fused, float | None] | None:
    """An affine function, or an activation, of the convolution."""
    y = f(x)
    zero, plus, minus = _slopes(f, x)
    free = fused.activation == "none" and (fused.residual is None)
    if _equal(y, x * _column(plus) + _column(zero), x):
        if not within(plus, limit):
            return None
        if free:
            return fused.scaled(plus, zero), None
        # c act(h) = act(c h) for c >= 0
        homogeneous = fused.activation in ("relu", "leaky_relu") and fused.residual is None
        if homogeneous and not bool(zero.any()) and bool((plus >= 0).all()):
            return fused.scaled(plus, zero), None
        return None
    if fused.op == "conv3x3_pixel_shuffle" or fused.activation != "none":
        return None
    if fused.residual is not None and fused.mode != "post":
        return None
    mode = "post" if fused.residual is None else "pre"
    for activation in _ACTIVATIONS:
        if _equal(y, activate(x, activation, 0.0), x):
            return replace(fused, activation=activation, mode=mode), None
    # c times leaky ReLU with the same slope everywhere
    if bool(zero.any()) or not bool((plus > 0).all()):
        return None
    slopes = -minus / plus
    slope = float(slopes[0])
    if bool((slopes - slope).abs().max() > _EXACT) or not within(plus, limit):
        return None
    if not _equal(y, _column(plus) * activate(x, "leaky_relu", slope), x):
        return None
    name = "relu" if slope == 0 else "leaky_relu"
    if bool((plus == 1).all()):
        return replace(fused, activation=name, slope=slope, mode=mode), None
    if fused.residual is not None:
        return None
    return replace(fused.scaled(plus, zero), activation=name, slope=slope), None


def _two_arguments(
    fused: _Fused, f: Callable[..., Tensor], x: Tensor, residual: fx.Node, limit: float | None
) -> tuple[_Fused, float | None] | None:
    """A residual after or before the activation, or SPAN's attention."""
    if fused.residual is not None or fused.op == "depthwise_conv":
        return None
    permuted = torch.randperm(x.shape[2], generator=torch.Generator().manual_seed(1))
    r = x[:, :, permuted]
    size = torch.maximum(x.abs(), r.abs())
    y = f(x, r)

    def alone(v: Tensor) -> Tensor:
        return f(v, torch.zeros_like(v))

    if _equal(y - r, alone(x), size):
        found = _one_argument(fused, alone, x, limit)
        if found is None:
            # The convolution as it is, without or after its activation.
            found = (fused, None) if _equal(alone(x), x, x) else None
        return None if found is None else (replace(found[0], residual=residual, mode="post"), None)
    if fused.op == "conv3x3_pixel_shuffle" or fused.activation != "none":
        return None
    before = _one_argument(fused, alone, x, limit)
    if before is not None and before[0].activation != "none":
        a = before[0]
        if a.weight is fused.weight and _equal(y, activate(x + r, a.activation, a.slope), size):
            return replace(a, residual=residual, mode="pre"), None
    if fused.op != "conv3x3":
        return None
    gate = attention(x, r)
    factor = float((y * gate).sum() / (gate * gate).sum())
    if factor and _equal(y / factor, gate, size):
        exact = abs(factor - 1) < _EXACT
        return replace(fused, residual=residual, mode="attention"), None if exact else factor
    return None


# --- what is left between the operators


def _functions(ws: Workspace) -> None:
    """Functions of every element of a map, however written, in the form that `function_of` knows."""
    order = {n: i for i, n in enumerate(ws.graph.nodes)}
    for end in reversed(list(ws.graph.nodes)):
        if end._erased or not is_map(end) or end in ws.values or not is_pointwise(end):
            continue
        region, best = [end], None
        while len(region) < _LONGEST:
            reads = [a for a in dict.fromkeys(n for m in region for n in m.all_input_nodes) if a not in region]
            leaves = [a for a in reads if a not in ws.values]
            if len(leaves) == 1 and is_map(leaves[0]) and dims(leaves[0]) == dims(end):
                inside = all(user in region for n in region[:-1] for user in n.users)
                found = _function(ws, leaves[0], region, end) if inside else None
                if found is not None and (len(region) > 1 or function_of(ws, end) is None):
                    best = (found[0], (leaves[0], *found[1]), list(region))
            pointwise = [a for a in leaves if is_pointwise(a)]
            if not pointwise:
                break
            region.insert(0, max(pointwise, key=order.__getitem__))
            region.sort(key=order.__getitem__)
        if best is not None:
            ws.replace(end, ws.call(end, best[0], best[1], end), best[2][:-1])
    ws.clean()


def _function(ws: Workspace, x: fx.Node, region: list[fx.Node], end: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """The operator that a region is, and its arguments besides `x`."""
    call = _evaluation(ws, x, region, end)
    if call is None or call.others:
        return None
    v = _probes(ws, call.region, dims(x)[1])
    y = call(v)
    if y is None:
        return None
    one = torch.ones(1, dtype=torch.float64)
    for name, target in _BARE_FUNCTIONS.items():
        if _equal(y, apply(v, name, one, one), v):
            return target, ()

    def run(t: Tensor) -> Tensor:
        result = call(t)
        assert result is not None
        return result

    zero, plus, minus = _slopes(run, v)
    bent = not bool(zero.any()) and bool((plus == 1).all()) and not bool((minus == -1).all())
    if bent and _equal(y, torch.where(v < 0, v * _column(-minus), v), v):
        return aten.prelu.default, (ws.constant(-minus, ws.dtype(end)),)
    low, high = (float(run(torch.full_like(v[:, :, :1], s)).flatten()[0]) for s in (-1e30, 1e30))
    bounded = low != -1e30 or high != 1e30
    if bounded and low < high and _equal(y, v.clamp(low, high), v):
        return aten.clamp.default, (None if low == -1e30 else low, None if high == 1e30 else high)
    return None


def _modulations(ws: Workspace) -> None:
    """x times an activation of resized maps, or of a 1x1 convolution of such, which is computed in their resolutions.

    A resize and a 1x1 convolution commute: both are sums with weights, and those of a resize add up to one.
    """
    for node in list(ws.graph.nodes):
        if node._erased or node.target is not aten.mul.Tensor or len(node.args) != 2 or not is_map(node):
            continue
        a, b = node.args
        if a is b or not all(is_map(t) and t not in ws.values for t in (a, b)):
            continue
        for x, gate in ((a, b), (b, a)):
            if is_pixel(gate) and not is_pixel(x) and dims(x) == dims(node) and dims(gate)[:2] == dims(x)[:2]:  # type: ignore[arg-type]
                ws.replace(node, ws.call(node, ops.modulate.default, (x, [gate], "nearest", "none", 0.0), node))
                break
        if node._erased or not all(dims(t) == dims(node) for t in (a, b)):  # type: ignore[arg-type]
            continue
        for x, gate in ((a, b), (b, a)):
            found = _modulation(ws, x, gate, node)  # type: ignore[arg-type]
            if found is not None:
                ws.replace(node, ws.call(node, ops.modulate.default, (x, *found), node))
                ws.clean()
                break


def _modulation(ws: Workspace, x: fx.Node, gate: fx.Node, end: fx.Node) -> tuple[list[fx.Node], str, str, float] | None:
    """The maps, the mode, the activation and its slope of a modulation that ends in `end` = x * gate."""
    activation, slope = "none", 0.0
    function = function_of(ws, gate)
    if function is not None and len(gate.users) == 1:
        inner, name, low, _high = function
        if name in (*_ACTIVATIONS, "leaky_relu") and bool((low == low[0]).all()):
            gate, activation, slope = inner, name, float(low[0])
    if len(gate.users) != 1:
        return None
    found = resized(ws, gate)
    if found is not None:
        return None if found[1] == "bicubic" else ([found[0]], found[1], activation, slope)
    conv = _fused_of(ws, gate)
    if conv is None or conv.op != "conv1x1" or conv.residual is not None:
        return None
    if conv.activation != "none":
        if activation != "none":
            return None
        activation, slope = conv.activation, float(conv.slope)
    parts = [resized(ws, t) if len(t.users) == 1 else None for t in conv.xs]
    modes = {p[1] for p in parts if p is not None}
    widths = [dims(t)[1] for t in conv.xs]
    if len(modes) != 1 or modes & {"bicubic"} or not all(isinstance(w, int) for w in widths):
        return None
    columns = conv.weight.split(widths, 1)
    whole = [k for k, p in enumerate(parts) if p is None]
    products: list[tuple[list[fx.Node], Tensor]] = []
    if whole:
        products.append(([conv.xs[k] for k in whole], torch.cat([columns[k] for k in whole], 1)))
    products += [([p[0]], w) for p, w in zip(parts, columns, strict=True) if p is not None]
    if len(products) > MOST_MODULATE_MAPS:
        return None
    maps = []
    for k, (xs, weight) in enumerate(products):
        part = _insert(ws, _Fused("conv1x1", conv.node, xs, weight, conv.bias if k == 0 else None), end)
        maps.append(with_channels(part, xs[0], weight.shape[0]))
    return maps, modes.pop(), activation, slope


def _separate(ws: Workspace) -> None:
    """Channels of a map as nodes of their own, instead of results of one node."""
    for node in list(ws.graph.nodes):
        found = slice_of(node) if node.target is operator.getitem and node not in ws.values else None
        if found is not None:
            source, start, end = found
            ws.replace(node, ws.call(node, aten.slice.Tensor, (source, 1, start, end), node))


def _differences(ws: Workspace) -> None:
    """a - s b as the sum of a and -s b, and a + s b as that of a and s b: a plan has sums."""
    for node in list(ws.graph.nodes):
        if node.target not in (aten.sub.Tensor, aten.add.Tensor) or node in ws.values or not is_map(node):
            continue
        a, b, *rest = node.args
        factor = rest[0] if rest else node.kwargs.get("alpha", 1)
        if not all(is_map(t) and t not in ws.values for t in (a, b)):
            continue
        if dims(a) != dims(node) or (dims(b) != dims(node) and not is_pixel(b)):  # type: ignore[arg-type]
            continue
        factor = -factor if node.target is aten.sub.Tensor else factor  # type: ignore[operator]
        if factor != 1:
            scaled = ws.call(node, aten.mul.Tensor, (b, float(factor)), b)  # type: ignore[arg-type]
            ws.replace(node, ws.call(node, aten.add.Tensor, (a, scaled), node))


# --- enhanced spatial attention


def _spatial_attention(ws: Workspace) -> None:
    for node in list(ws.graph.nodes):
        if node._erased or node.target is not aten.mul.Tensor or len(node.args) != 2 or not is_map(node):
            continue
        for x, gate in (node.args, node.args[::-1]):
            found = _esa_of(ws, x, gate)
            if found is not None:
                args = tuple(w if w is None else ws.constant(w, ws.dtype(node)) for w in found)
                ws.replace(node, ws.call(node, ops.esa.default, (x, *args), node))
                ws.clean()
                break


def _single(ws: Workspace, node: Any, op: str) -> _Fused | None:
    """An `esr` convolution of one tensor without a residual, if the node is that."""
    found = _fused_of(ws, node) if isinstance(node, fx.Node) else None
    if found is None or found.op != op or len(found.xs) != 1 or found.residual is not None:
        return None
    return found


def _esa_of(ws: Workspace, x: Any, gate: Any) -> list[Tensor | None] | None:
    """The fourteen weights of x * gate, if that is enhanced spatial attention in one of its three forms."""

    def used_once(n: fx.Node) -> bool:
        return len(n.users) == 1

    if not is_map(x) or not isinstance(gate, fx.Node) or gate.target is not aten.sigmoid.default or not used_once(gate):
        return None
    conv4 = _single(ws, gate.args[0], "conv1x1")
    if conv4 is None or conv4.activation != "none" or not used_once(conv4.node):
        return None
    total = conv4.xs[0]
    if not used_once(total):
        return None
    for up, skip in _summands(ws, total):
        if not isinstance(up, fx.Node) or up.target is not aten.upsample_bilinear2d.vec or not used_once(up):
            continue
        if up.args[2] or dims(up)[2:] != dims(x)[2:] or up.args[1] is None:
            continue
        third = _single(ws, up.args[0], "conv3x3")
        if third is None or third.activation != "none" or not used_once(third.node):
            continue
        chain = [third]
        while len(chain) < 3 and (before := _single(ws, chain[-1].xs[0], "conv3x3")) is not None:
            if before.activation != "relu" or not used_once(before.node):
                return None
            chain.append(before)
        pool = chain[-1].xs[0]
        if len(chain) == 2 or pool.target is not aten.max_pool2d.default or not used_once(pool) or not _pools(pool):
            continue
        second = conv_of(ws, pool.args[0])
        if second is None or second.kernel != (3, 3) or second.stride != (2, 2) or second.padding != (0, 0):
            continue
        if second.groups != 1 or second.dilation != (1, 1) or not used_once(second.node):
            continue
        first = _single(ws, second.x, "conv1x1")
        if first is None or first.activation != "none" or first.xs[0] is not x:
            continue
        skip_conv: _Fused | None = None
        if skip is not first.node:
            skip_conv = skip if isinstance(skip, _Fused) else _single(ws, skip, "conv1x1")
            if skip_conv is None or skip_conv.activation != "none" or skip_conv.xs[0] is not first.node:
                continue
            if not used_once(skip_conv.node):
                continue
        if set(first.node.users) != {second.node, total if skip_conv is None else skip_conv.node}:
            continue
        hidden = first.weight.shape[0]
        square: tuple[Any, ...] = (*chain, second)
        if any(c.weight.shape[:2] != (hidden, hidden) for c in square):
            continue
        if skip_conv is not None and skip_conv.weight.shape[:2] != (hidden, hidden):
            continue
        inner = chain[::-1]  # conv_max, conv3, conv3_
        w_max, conv3, last = inner if len(inner) == 3 else (None, inner[0], None)
        weights: list[Tensor | None] = []
        convs: tuple[Any, ...] = (first, second, conv3, conv4, skip_conv, w_max, last)
        for conv in convs:
            weights += [None, None] if conv is None else [conv.weight, conv.bias]
        return weights
    return None


def _summands(ws: Workspace, total: fx.Node) -> list[tuple[Any, Any]]:
    """The two summands of a node in either order; the second a 1x1 convolution where that does the addition."""
    if total.target is aten.add.Tensor and not total.kwargs and len(total.args) == 2:
        return [total.args, total.args[::-1]]  # type: ignore[list-item]
    conv = _fused_of(ws, total)
    if conv is None or conv.op != "conv1x1" or conv.residual is None or len(conv.xs) != 1:
        return []
    return [(conv.residual, conv)]


def _pools(node: fx.Node) -> bool:
    """7x7 max pooling with stride 3 and nothing else."""
    kernel, stride, padding, dilation, ceil = (*node.args[1:], *(None,) * 5)[:5]
    wanted: Any = ((7, kernel), (3, stride), (0, padding or [0]), (1, dilation or [1]))
    return not ceil and all(a and {v} == set(a) for v, a in wanted)
