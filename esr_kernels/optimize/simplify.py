"""Exact algebra on linear layers: what amounts to one convolution becomes one.

All of it holds on the border of the image too: a shift in front of a zero-padded convolution, for one, stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.nn import functional as F

from .workspace import (
    _CASTS,
    Workspace,
    aten,
    concatenated,
    dims,
    getitem,
    is_map,
    is_pointwise,
    is_random,
    slice_of,
    with_channels,
)

_SAME = {
    *_CASTS,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.expand.default,
    aten.dropout.default,
    aten.feature_dropout.default,
}
_RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.flatten.using_ints}
# What only moves and repeats elements.
_MOVES = {
    *_RESHAPES,
    aten.permute.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.unflatten.int,
    aten.clone.default,
    aten.contiguous.default,
    aten.expand.default,
    aten.repeat_interleave.self_int,
}


_ALL = 2**63 - 1  # the end of a slice without one


@dataclass(frozen=True)
class Conv:
    """A 2-D convolution with known weights (float64)."""

    node: fx.Node
    x: fx.Node
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def kernel(self) -> tuple[int, int]:
        return int(self.weight.shape[2]), int(self.weight.shape[3])

    @property
    def cost(self) -> int:
        """Multiply-adds per output pixel."""
        return self.weight.numel()

    @property
    def plain(self) -> bool:
        """Stride, dilation and groups of one."""
        return self.stride == self.dilation == (1, 1) and self.groups == 1

    @property
    def pointwise(self) -> bool:
        """1x1, of every pixel."""
        return self.plain and self.kernel == (1, 1) and self.padding == (0, 0)

    @property
    def depthwise(self) -> bool:
        """One filter for each of several channels."""
        return self.groups > 1 and self.weight.shape[:2] == (self.groups, 1)

    def scaled(self, scale: Tensor, shift: Tensor) -> Conv:
        """Followed by `y * scale + shift`, one number each per channel."""
        bias = shift if self.bias is None else self.bias * scale + shift
        return replace(self, weight=self.weight * scale.view(-1, 1, 1, 1), bias=bias if bool(bias.any()) else None)

    def dense(self) -> Tensor:
        """The weight with its groups written out."""
        if self.groups == 1:
            return self.weight
        o, i, kh, kw = self.weight.shape
        full = self.weight.new_zeros(self.groups, o // self.groups, self.groups, i, kh, kw)
        index = torch.arange(self.groups)
        full[index, :, index] = self.weight.view(self.groups, o // self.groups, i, kh, kw)
        return full.view(o, i * self.groups, kh, kw)


def conv_of(ws: Workspace, node: Any) -> Conv | None:
    """A node as a convolution with known weights, if it is one."""
    if not isinstance(node, fx.Node) or node.target is not aten.convolution.default or node in ws.values:
        return None
    x, w, b, stride, padding, dilation, transposed, _output_padding, groups = node.args
    weight, bias = ws.known(w), ws.known(b) if b is not None else None
    if transposed or not isinstance(weight, Tensor) or (b is not None and bias is None) or not is_map(x):
        return None
    if not all(isinstance(v, int) for v in (*stride, *padding, *dilation)):  # type: ignore[misc]
        return None

    def pair(v: Any) -> tuple[int, int]:
        return (int(v[0]), int(v[-1]))

    return Conv(node, x, weight, bias, pair(stride), pair(padding), pair(dilation), int(groups))  # type: ignore[arg-type]


def write_conv(ws: Workspace, conv: Conv, at: fx.Node) -> fx.Node:
    """The convolution as a new node in front of `at`, which it is about to replace."""
    dtype = ws.dtype(conv.node)
    weight = ws.constant(conv.weight, dtype)
    bias = None if conv.bias is None else ws.constant(conv.bias, dtype)
    settings = (list(conv.stride), list(conv.padding), list(conv.dilation), False, [0, 0], conv.groups)
    node = ws.call(at, aten.convolution.default, (conv.x, weight, bias, *settings), at)
    if "stack_trace" in conv.node.meta or "nn_module_stack" in conv.node.meta:
        node.meta |= {k: conv.node.meta[k] for k in ("stack_trace", "nn_module_stack") if k in conv.node.meta}
    return node


def affine_of(ws: Workspace, node: fx.Node) -> tuple[fx.Node, Tensor, Tensor] | None:
    """`x * scale + shift` with one float64 number each per channel of the map x, if a node is that."""
    t: Any = node.target
    kwargs: dict[str, Any] = dict(node.kwargs)
    a: Any
    b: Any
    if t is aten.neg.default:
        a, b, op = node.args[0], -1.0, "mul"
    elif t in (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor):
        a, b = node.args[:2]
        alpha = float(node.args[2] if len(node.args) > 2 else kwargs.pop("alpha", 1))  # type: ignore[arg-type]
        op = {"add": "add", "sub": "sub", "rsub": "rsub"}[t._schema.name.split("::")[1]]  # type: ignore[union-attr]
    elif t in (aten.mul.Tensor, aten.mul.Scalar):
        a, b, op = *node.args[:2], "mul"
    elif t in (aten.div.Tensor, aten.div.Scalar):
        a, b, op = *node.args[:2], "div"
    else:
        return None
    if kwargs or node in ws.values or not is_map(node):
        return None
    swapped = ws.known(a) is not None
    x, c = (b, a) if swapped else (a, b)
    if not is_map(x) or x in ws.values or dims(x) != dims(node) or not isinstance(dims(x)[1], int):  # type: ignore[arg-type]
        return None
    channels = dims(x)[1]  # type: ignore[arg-type]
    k = ws.per_channel(c, channels)
    if k is None:
        return None
    one, zero = torch.ones_like(k), torch.zeros_like(k)
    if op == "mul":
        return x, k, zero  # type: ignore[return-value]
    if op == "div":
        return None if swapped else (x, 1 / k, zero)  # type: ignore[return-value]
    if op == "rsub":  # b - alpha a
        swapped = not swapped
        op = "sub"
    if op == "add":
        return (x, alpha * one, k) if swapped else (x, one, alpha * k)  # type: ignore[return-value]
    return (x, -alpha * one, k) if swapped else (x, one, -alpha * k)  # type: ignore[return-value]


_FUNCTIONS = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.sigmoid.default: "sigmoid",
    aten.hardswish.default: "hardswish",
    aten.mish.default: "mish",
}
_CLAMPS = {
    aten.clamp.default: (None, None),
    aten.hardtanh.default: (-1.0, 1.0),
    aten.relu6.default: (0.0, 6.0),
    aten.clamp_min.default: (None, None),
    aten.clamp_max.default: (None, None),
}


def function_of(ws: Workspace, node: fx.Node) -> tuple[fx.Node, str, Tensor, Tensor] | None:
    """A map, the name of a function of its every element, and its `low` and `high` per channel, if a node is that.

    The functions are those of a plan's `activate`, each in the one form in which `match` leaves it.
    """
    x: Any = node.args[0] if node.args else None
    if node.op != "call_function" or node in ws.values or not is_map(node) or not is_map(x) or x in ws.values:
        return None
    if dims(x) != dims(node) or not isinstance(dims(node)[1], int):
        return None
    t: Any = node.target
    numbers = [ws.known(a) for a in node.args[1:]]
    name, low, high = _FUNCTIONS.get(t), 0.0, 0.0
    if t is aten.gelu.default:
        name = "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    elif node.kwargs:
        return None
    elif name == "sigmoid":
        high = 1.0
    elif t in (torch.ops.esr.inverse_root.default, aten.rsqrt.default):
        name, low, high = "rsqrt", float((*node.args, 0.0)[1]), 1.0  # type: ignore[arg-type]
    elif t is aten.leaky_relu.default:
        name, low = "leaky_relu", float(numbers[0] if numbers else 0.01)  # type: ignore[arg-type]
    elif t is aten.prelu.default and isinstance(numbers[0], Tensor):
        slopes = numbers[0].expand(dims(node)[1]).clone()
        return x, "leaky_relu", slopes, torch.zeros_like(slopes)
    elif t in _CLAMPS:
        bounds = [*node.args[1:]] or [*_CLAMPS[t]]
        if t is aten.clamp_max.default:
            bounds.insert(0, None)
        given = [None if b is None else ws.known(b) for b in (*bounds, None)[:2]]
        if any(isinstance(b, Tensor) for b in given) or [b is None for b in (*bounds, None)[:2]] != [
            g is None for g in given
        ]:
            return None
        name = "clamp"
        low, high = (f if g is None else float(g) for g, f in zip(given, (-math.inf, math.inf), strict=True))  # type: ignore[arg-type]
    if name is None:
        return None
    full = torch.ones(dims(node)[1], dtype=torch.float64)
    return x, name, full * low, full * high


# --- one form for what can be written in many


def canonicalize(ws: Workspace) -> None:
    """Convolutions, normalisations and shuffles in one form each; what does nothing goes."""
    for node in list(ws.graph.nodes):
        if node.op != "call_function" or node in ws.values or node._erased:
            continue
        for rule in _CANONICAL:
            if rule(ws, node):
                break
    ws.fold()
    _share(ws)
    ws.clean()


def _share(ws: Workspace) -> None:
    """Compute once what is computed twice."""
    seen: dict[Any, fx.Node] = {}
    for node in list(ws.graph.nodes):
        if node.op != "call_function" or node in ws.values or is_random(node) or node is ws.returned():
            continue
        try:
            key = (node.target, _frozen(node.args), _frozen(node.kwargs))
            first = seen.setdefault(key, node)
        except TypeError:
            continue
        if first is not node:
            node.replace_all_uses_with(first)
            ws.graph.erase_node(node)


def _frozen(argument: Any) -> Any:
    """An argument as something that can be looked up; 1, 1.0 and True are three."""
    if isinstance(argument, (list, tuple)):
        return tuple(_frozen(a) for a in argument)
    if isinstance(argument, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(argument.items()))
    return argument if isinstance(argument, fx.Node) else (type(argument), argument)


_FILLS = {aten.zeros_like.default: 0.0, aten.ones_like.default: 1.0, aten.full_like.default: None}


def _filled(ws: Workspace, node: fx.Node) -> bool:
    """A map of one number, which others broadcast as well."""
    if node.target not in _FILLS or not is_map(node):
        return False
    number = _FILLS[node.target] if _FILLS[node.target] is not None else ws.known(node.args[1])
    if not isinstance(number, (int, float)):
        return False
    for user in node.users:
        others = [n for n in user.all_input_nodes if n is not node]
        if not is_pointwise(user) or not any(is_map(n) and dims(n) == dims(user) for n in others):
            return False
    ws.replace(node, ws.constant(torch.full((1, 1, 1, 1), float(number)), node.meta["val"].dtype))
    return True


def _is_whole(node: fx.Node) -> bool:
    """Whether a slice is all there is, as `x[:, :4]` first takes all of the batch."""
    if node.target is not aten.slice.Tensor or node.kwargs:
        return False
    bounds: list[Any] = [*node.args[2:], *(None, None, 1)[len(node.args) - 2 :]]
    return bounds[0] in (None, 0) and bounds[1] in (None, _ALL) and bounds[2] == 1


def _identity(ws: Workspace, node: fx.Node) -> bool:
    if node.target in _RESHAPES and node.target is not aten.flatten.using_ints:
        # A view of a tensor whose copies are gone may have to copy.
        node.target = aten.reshape.default
    if node.target in _SAME:
        source: Any = node.args[0]
        if node.target in (aten.dropout.default, aten.feature_dropout.default) and node.args[2]:
            return False
    elif node.target in _RESHAPES or _is_whole(node):
        source = node.args[0]
    elif (affine := affine_of(ws, node)) is not None and bool((affine[1] == 1).all() and (affine[2] == 0).all()):
        source = affine[0]
    else:
        return False
    if not isinstance(source, fx.Node) or (source.op == "placeholder" and ws.returned() is node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if (
        not isinstance(before, Tensor)
        or not isinstance(after, Tensor)
        or before.dtype != after.dtype
        or dims(source) != dims(node)
    ):
        return False
    ws.replace(node, source)
    return True


def _scattered(ws: Workspace, node: fx.Node) -> bool:
    """What in-place writes to a part of a tensor become: all of it, or a concatenation of channels."""
    if node.target is aten.copy.default and not node.kwargs and len(node.args) == 2:
        into, source = node.args
    elif node.target is aten.slice_scatter.default and not node.kwargs:
        where: list[Any]
        into, source, *where = node.args
        defaults: list[Any] = [0, None, None, 1]
        axis, start, end, step = where + defaults[len(where) :]
        if step != 1 or not is_map(node) or not is_map(source):
            return False
        channels = dims(node)[1]
        if start not in (None, 0) or end not in (None, _ALL):
            start, end = start or 0, channels if end in (None, _ALL) else end
            if axis not in (1, -3) or not all(isinstance(v, int) and v >= 0 for v in (start, end, channels)):
                return False
            parts = [(into, 0, start), (source, None, None), (into, end, channels)]
            pieces = []
            for part, first, last in parts:
                if first is None:
                    pieces.append(part)
                elif first < last:
                    piece = ws.call(node, aten.slice.Tensor, (part, 1, first, last), node)
                    shape = [*node.meta["val"].shape]
                    shape[1] = last - first
                    piece.meta["val"] = node.meta["val"].new_empty(shape)
                    pieces.append(piece)
            ws.replace(node, ws.call(node, aten.cat.default, (pieces, 1), node))
            return True
    else:
        return False
    same = isinstance(source, fx.Node) and isinstance(source.meta.get("val"), Tensor)
    if not same or dims(source) != dims(node) or source.meta["val"].dtype != node.meta["val"].dtype:  # type: ignore[arg-type,union-attr]
        return False
    ws.replace(node, source)  # type: ignore[arg-type]
    return True


def _unshuffle(ws: Workspace, node: fx.Node) -> bool:
    """PyTorch's own operator in the place of the one that was traced."""
    if node.target is not torch.ops.esr.pixel_unshuffle.default:
        return False
    ws.replace(node, ws.call(node, aten.pixel_unshuffle.default, node.args, node))
    return True


def _narrow(ws: Workspace, node: fx.Node) -> bool:
    if node.target is not aten.narrow.default:
        return False
    x, axis, start, length = node.args
    if not isinstance(start, int) or not isinstance(length, int) or start < 0:
        return False
    ws.replace(node, ws.call(node, aten.slice.Tensor, (x, axis, start, start + length), node))
    return True


def _lerp(ws: Workspace, node: fx.Node) -> bool:
    a: Any
    b: Any
    if node.target is not aten.lerp.Scalar:
        return False
    a, b, weight = node.args
    if not isinstance(weight, (int, float)) or not all(is_map(t) and dims(t) == dims(node) for t in (a, b)):
        return False
    parts = [ws.call(node, aten.mul.Tensor, pair, node) for pair in ((a, 1.0 - weight), (b, float(weight)))]
    ws.replace(node, ws.call(node, aten.add.Tensor, tuple(parts), node))
    return True


def _addcmul(ws: Workspace, node: fx.Node) -> bool:
    value = node.kwargs.get("value", 1)
    if node.target is not aten.addcmul.default or not isinstance(value, (int, float)):
        return False
    total, *factors = node.args
    if not is_map(node) or not any(is_map(f) and dims(f) == dims(node) for f in factors):  # type: ignore[arg-type]
        return False
    product = ws.call(node, aten.mul.Tensor, tuple(factors), node)
    if value != 1:
        product = ws.call(node, aten.mul.Tensor, (product, float(value)), node)
    ws.replace(node, ws.call(node, aten.add.Tensor, (total, product), node))
    return True


def _hard_sigmoid(ws: Workspace, node: fx.Node) -> bool:
    if node.target is not aten.hardsigmoid.default:
        return False
    new = ws.call(node, aten.mul.Tensor, (node.args[0], 1 / 6), node)
    new = ws.call(node, aten.add.Tensor, (new, 0.5), node)
    ws.replace(node, ws.call(node, aten.clamp.default, (new, 0.0, 1.0), node))
    return True


def _convolution(ws: Workspace, node: fx.Node) -> bool:
    if node.target not in (aten.conv2d.default, aten.conv2d.padding):
        return False
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults = {"bias": None, "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1}
    a: dict[str, Any] = defaults | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    weight = a["weight"].meta["val"].shape
    stride, dilation, padding = ([*v] * 2 if len(v) == 1 else [*v] for v in (a["stride"], a["dilation"], [0, 0]))
    if a["padding"] == "same":
        total = [d * (int(k) - 1) for d, k in zip(dilation, weight[2:], strict=True)]
        if any(t % 2 for t in total):
            return False
        padding = [t // 2 for t in total]
    elif a["padding"] != "valid":
        padding = [*a["padding"]] * 2 if len(a["padding"]) == 1 else [*a["padding"]]
    if node.args[0].meta["val"].dim() != 4:  # type: ignore[union-attr]
        return False
    args = (a["input"], a["weight"], a["bias"], stride, padding, dilation, False, [0, 0], a["groups"])
    ws.replace(node, ws.call(node, aten.convolution.default, args, node))
    return True


def _batch_norm(ws: Workspace, node: fx.Node) -> bool:
    """With running statistics: a factor and a term per channel."""
    t = node.target
    if t is aten._native_batch_norm_legit_no_training.default:
        x, weight, bias, mean, var, _momentum, eps = node.args
        results = getitem(node)
    elif t in (aten.batch_norm.default, aten.native_batch_norm.default) and node.args[5] is False:
        x, weight, bias, mean, var, _training, _momentum, eps = node.args[:8]
        results = getitem(node) if t is aten.native_batch_norm.default else {0: node}
    else:
        return False
    if not is_map(x) or 0 not in results or any(results[i].users for i in results if i):
        return False
    defaults = ((weight, 1.0), (bias, 0.0), (mean, None), (var, None))
    w, b, m, v = (ws.known(default if a is None else a) for a, default in defaults)
    if w is None or b is None or not isinstance(m, Tensor) or not isinstance(v, Tensor):
        return False
    scale: Tensor = w * torch.rsqrt(v + float(eps))  # type: ignore[arg-type,operator]
    write_affine(ws, results[0], x, scale, b - m * scale)
    return True


def write_affine(ws: Workspace, target: fx.Node, x: Any, scale: Tensor, shift: Tensor) -> None:
    """Replace `target` by x * scale + shift."""
    dtype = target.meta["val"].dtype
    new = ws.call(target, aten.mul.Tensor, (x, ws.constant(scale.view(1, -1, 1, 1), dtype)), target)
    if bool(shift.any()):
        new = ws.call(target, aten.add.Tensor, (new, ws.constant(shift.view(1, -1, 1, 1), dtype)), target)
    ws.replace(target, new)


def _zero_pad(ws: Workspace, node: fx.Node) -> bool:
    if node.target is not aten.pad.default:
        return False
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value", 0.0)
    if mode == "constant":
        new = ws.call(node, aten.constant_pad_nd.default, (node.args[0], node.args[1], value or 0.0), node)
    elif mode == "reflect" and len(node.args[1]) == 4:  # type: ignore[arg-type]
        new = ws.call(node, aten.reflection_pad2d.default, (node.args[0], node.args[1]), node)
    else:
        return False
    ws.replace(node, new)
    return True


_CANONICAL: tuple[Callable[[Workspace, fx.Node], bool], ...] = (
    _identity,
    _scattered,
    _convolution,
    _batch_norm,
    _zero_pad,
    _filled,
    _narrow,
    _lerp,
    _addcmul,
    _hard_sigmoid,
    _unshuffle,
)


# --- lengths of pixels


def unit_lengths(ws: Workspace) -> None:
    """Maps over the roots of the sums of their squares over channels, as `F.normalize` computes them: a product.

    The sum is a 1x1 convolution, so that all of it can be part of a plan. float16 has no room for the squares.
    """
    for node in list(ws.graph.nodes):
        if node.target is not aten.div.Tensor or node.kwargs or node in ws.values or not is_map(node):
            continue
        x, length = node.args
        found = _length_of(ws, length)
        if found is None or found[0] is not x or dims(x) != dims(node) or ws.dtype(node) == torch.float16:
            continue
        channels = dims(x)[1]
        if not isinstance(channels, int):
            continue
        squares = ws.call(node, aten.mul.Tensor, (x, x), node)
        ones = ws.constant(torch.ones(1, channels, 1, 1, dtype=torch.float64), ws.dtype(node))
        settings = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
        total = with_channels(ws.call(node, aten.convolution.default, (squares, ones, None, *settings), node), node, 1)
        inverse = ws.call(node, torch.ops.esr.inverse_root.default, (total, found[1]), total)
        ws.replace(node, ws.call(node, aten.mul.Tensor, (x, inverse), node))
    ws.clean()


def _length_of(ws: Workspace, node: Any) -> tuple[fx.Node, float] | None:
    """A map of which a node is every pixel's length, and how long it is at least."""
    least = 0.0
    while isinstance(node, fx.Node) and not node.kwargs:
        if node.target is aten.clamp_min.default:
            bound = ws.known(node.args[1])
            if not isinstance(bound, (int, float)):
                return None
            least = max(least, float(bound))
        elif node.target is aten.linalg_vector_norm.default:
            defaults: list[Any] = [None, 2, None, False]
            x, order, axes, keeps = [*node.args, *defaults[len(node.args) :]][:4]
            whole = order == 2 and axes in ([1], [-3]) and keeps
            return (x, least) if whole and is_map(x) and x not in ws.values else None
        elif node.target not in (aten.expand_as.default, aten.expand.default):
            return None
        node = node.args[0]
    return None


# --- linear layers that amount to fewer


def merge_linear(ws: Workspace, scale_limit: float | None = None) -> None:
    """Fold factors, terms, paddings, 1x1 convolutions and parallel branches into the convolutions next to them.

    Args:
        scale_limit: factors larger than it, or smaller than its inverse, stay out of weights that will be float16.
    """
    rules: tuple[Callable[[Workspace, fx.Node], bool], ...] = (
        partial(_scale_after, limit=scale_limit),
        _scale_before,
        partial(_scale_shuffled, limit=scale_limit),
        _padding,
        _pointwise_pair,
        _pointwise_parts,
        _parallel,
    )
    changed = True
    while changed:
        changed = False
        for node in list(ws.graph.nodes):
            if node._erased or node.op != "call_function" or node in ws.values:
                continue
            for rule in rules:
                if rule(ws, node):
                    changed = True
                    break
    ws.clean()


def within(scale: Tensor, limit: float | None) -> bool:
    """Whether factors may go into weights."""
    if not bool(torch.isfinite(scale).all()):
        return False
    return limit is None or bool(((scale.abs() <= limit) & (scale.abs() >= 1 / limit)).all())


def _scale_after(ws: Workspace, node: fx.Node, limit: float | None) -> bool:
    found = affine_of(ws, node)
    conv = conv_of(ws, found[0]) if found else None
    if found is None or conv is None or len(conv.node.users) != 1 or not within(found[1], limit):
        return False
    ws.replace(node, write_conv(ws, conv.scaled(found[1], found[2]), node), [conv.node])
    return True


def _scale_before(ws: Workspace, node: fx.Node) -> bool:
    """conv(x * scale): zero padding stays zero. A term goes in only where there is no padding."""
    conv = conv_of(ws, node)
    found = affine_of(ws, conv.x) if conv else None
    if conv is None or found is None or len(conv.x.users) != 1:
        return False
    x, scale, shift = found
    if bool(shift.any()) and conv.padding != (0, 0):
        return False
    o = conv.weight.shape[0]

    def by_weight(v: Tensor) -> Tensor:
        """[C] -> what multiplies each weight, [O, C / groups, 1, 1]."""
        return v.view(conv.groups, 1, -1).expand(-1, o // conv.groups, -1).reshape(o, -1, 1, 1)

    bias = (conv.weight * by_weight(shift)).sum((1, 2, 3))
    if conv.bias is not None:
        bias = bias + conv.bias
    merged = replace(conv, x=x, weight=conv.weight * by_weight(scale), bias=bias if bool(bias.any()) else None)
    ws.replace(node, write_conv(ws, merged, node), [conv.x])
    return True


def _scale_shuffled(ws: Workspace, node: fx.Node, limit: float | None) -> bool:
    """A factor and a term behind the pixel shuffle of a convolution go into the convolution."""
    found = affine_of(ws, node)
    if found is None or found[0].target is not aten.pixel_shuffle.default or len(found[0].users) != 1:
        return False
    shuffle, factor = found[0], int(found[0].args[1])  # type: ignore[arg-type]
    conv = conv_of(ws, shuffle.args[0])
    if conv is None or len(conv.node.users) != 1 or not within(found[1], limit):
        return False
    scale, shift = (v.repeat_interleave(factor**2) for v in found[1:])
    scaled = write_conv(ws, conv.scaled(scale, shift), shuffle)
    scaled.meta["val"] = conv.node.meta["val"]
    ws.replace(node, ws.call(node, aten.pixel_shuffle.default, (scaled, factor), node), [conv.node, shuffle])
    return True


def _padding(ws: Workspace, node: fx.Node) -> bool:
    """Explicit zero padding becomes the convolution's own."""
    conv = conv_of(ws, node)
    if conv is None or conv.x.target is not aten.constant_pad_nd.default or conv.kernel == (1, 1):
        return False
    pad: Any
    source: Any
    source, pad, *value = conv.x.args
    if (value and value[0] != 0) or len(pad) != 4 or not all(isinstance(p, int) and p >= 0 for p in pad):
        return False
    left, right, top, bottom = pad
    if left != right or top != bottom:
        return False
    padding = (conv.padding[0] + top, conv.padding[1] + left)
    ws.replace(node, write_conv(ws, replace(conv, x=source, padding=padding), node), [conv.x])
    return True


def _pointwise_pair(ws: Workspace, node: fx.Node) -> bool:
    """A 1x1 convolution before or after another one, where one is cheaper than both."""
    second = conv_of(ws, node)
    first = conv_of(ws, second.x) if second else None
    if second is None or first is None or len(first.node.users) != 1 or second.groups != 1 or first.groups != 1:
        return False
    both = first.cost + second.cost
    a, b = first.weight, second.weight
    if second.kernel == (1, 1) and second.stride == (1, 1) and second.padding == (0, 0):
        weight = torch.einsum("om,mikl->oikl", b[:, :, 0, 0], a)
        merged = replace(first, weight=weight)
    elif first.kernel == (1, 1) and first.stride == (1, 1) and first.padding == (0, 0):
        if second.padding != (0, 0) and first.bias is not None and bool(first.bias.any()):
            return False
        weight = torch.einsum("omkl,mi->oikl", b, a[:, :, 0, 0])
        merged = replace(second, x=first.x, weight=weight)
    else:
        return False
    if merged.cost > both:
        return False
    bias = second.bias
    if first.bias is not None:
        constant = b.sum((2, 3)) @ first.bias
        bias = constant if bias is None else bias + constant
    ws.replace(node, write_conv(ws, replace(merged, node=second.node, bias=bias), node), [first.node])
    return True


def _pointwise_parts(ws: Workspace, node: fx.Node) -> bool:
    """A 1x1 convolution of a concatenation: 1x1 convolutions among its parts go into it, where that is cheaper."""
    conv = conv_of(ws, node)
    if conv is None or not conv.pointwise:
        return False
    cat, parts = conv.x, concatenated(conv.x)
    if parts is None or len(cat.users) != 1 or not all(isinstance(dims(p)[1], int) for p in parts):
        return False
    bias, changed = conv.bias, False
    xs, weights = list(parts), list(conv.weight.split([dims(p)[1] for p in parts], 1))
    for i, (part, columns) in enumerate(zip(parts, weights, strict=True)):
        inner = conv_of(ws, part)
        if inner is None or not inner.pointwise or len(part.users) != 1 or parts.count(part) > 1:
            continue
        merged = columns[:, :, 0, 0] @ inner.weight[:, :, 0, 0]
        if merged.numel() > columns.numel() + inner.cost:
            continue
        if inner.bias is not None:
            constant = columns[:, :, 0, 0] @ inner.bias
            bias = constant if bias is None else bias + constant
        xs[i], weights[i], changed = inner.x, merged[:, :, None, None], True
    if not changed:
        return False
    both = with_channels(ws.call(cat, aten.cat.default, (xs, 1), cat), cat, sum(w.shape[1] for w in weights))
    ws.replace(node, write_conv(ws, replace(conv, x=both, weight=torch.cat(weights, 1), bias=bias), node), [cat])
    return True


def _centred(conv: Conv) -> bool:
    """Odd kernel with as much padding as keeps the size, so that its middle tap is at the pixel itself."""
    same = all(k % 2 == 1 and p == k // 2 for k, p in zip(conv.kernel, conv.padding, strict=True))
    return same and conv.stride == conv.dilation == (1, 1)


def _parallel(ws: Workspace, node: fx.Node) -> bool:
    """conv(x) + conv(x), and conv(x) + x * scale + shift: one convolution."""
    if node.target not in (aten.add.Tensor, aten.sub.Tensor) or node.kwargs or len(node.args) != 2:
        return False
    a, b = node.args
    sign = -1.0 if node.target is aten.sub.Tensor else 1.0
    first, second = conv_of(ws, a), conv_of(ws, b)
    if (first is None and second is None) or a is b:
        return False
    for conv in (first, second):
        if conv is not None and (len(conv.node.users) != 1 or not _centred(conv)):
            return False
    if first is None or second is None:
        conv, other = (second, a) if first is None else (first, b)
        found = _affine_from(ws, other, conv.x) if conv is not None else None
        # A plain identity stays a residual: one added to float16 weights would cost their last bits.
        if conv is None or found is None or conv.groups != 1:
            return False
        channels = int(found[0].shape[0])
        if conv.weight.shape[0] != channels or conv.weight.shape[1] != channels:
            return False
        identity = Conv(other, conv.x, torch.diag(found[0]).view(channels, channels, 1, 1), found[1])  # type: ignore[arg-type]
        first, second = (identity, conv) if first is None else (conv, identity)
    if first.x is not second.x or first.weight.shape[0] != second.weight.shape[0]:
        return False
    if first.groups != second.groups and 1 not in (first.groups, second.groups):
        return False
    groups = first.groups if first.groups == second.groups else 1
    weights = [c.weight if c.groups == groups else c.dense() for c in (first, second)]
    kernel = [max(first.kernel[i], second.kernel[i]) for i in (0, 1)]
    grown = [_grown(w, kernel) for w in weights]
    zero = torch.zeros_like(grown[0][:, 0, 0, 0])
    bias = (zero if first.bias is None else first.bias) + sign * (zero if second.bias is None else second.bias)
    merged = Conv(
        node if conv_of(ws, first.node) is None else first.node,
        first.x,
        grown[0] + sign * grown[1],
        bias if bool(bias.any()) else None,
        padding=(kernel[0] // 2, kernel[1] // 2),
        groups=groups,
    )
    if merged.cost > first.cost + second.cost:
        return False
    ws.replace(node, write_conv(ws, merged, node), [first.node, second.node])
    return True


def _affine_from(ws: Workspace, node: Any, x: fx.Node) -> tuple[Tensor, Tensor] | None:
    """Scale and shift of a node that is x * scale + shift, one number each per channel, and nobody else's."""
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return None
    found = affine_of(ws, node)
    if found is None or found[0] is x:
        return None if found is None else found[1:]
    inner = _affine_from(ws, found[0], x)
    return None if inner is None else (inner[0] * found[1], inner[1] * found[1] + found[2])


def _grown(weight: Tensor, kernel: list[int]) -> Tensor:
    """The kernel with zeros around it."""
    y, x = ((kernel[i] - weight.shape[2 + i]) // 2 for i in (0, 1))
    return F.pad(weight, (x, x, y, y))


# --- channels moved last

_LAST, _BACK = [0, 2, 3, 1], [0, 3, 1, 2]
# What reduces the channels of every pixel; their second argument are the axes.
_REDUCTIONS = {
    aten.mean.dim: 2,
    aten.sum.dim_IntList: 2,
    aten.amax.default: 2,
    aten.var.dim: 3,
    aten.var.correction: None,
}  # operator -> the place of `keepdim` among its arguments


def channels_first(ws: Workspace) -> None:
    """Layers on maps whose channels were moved last, [N, H, W, C] or [N, H W, C]: the same on the maps themselves.

    Linear layers become 1x1 convolutions and layer normalisations operators; the move goes behind them, until it meets
    the one that undoes it.
    """
    for node in list(ws.graph.nodes):
        if node._erased or node.op != "call_function" or node in ws.values:
            continue
        source = _moved_back(node)
        if source is not None:
            ws.replace(node, source)
            continue
        if not (is_map(node) or is_map(node, 3)) or not isinstance(dims(node)[-1], int):
            continue
        first = _with_channels_first(ws, node)
        if first is not None:
            ws.replace(node, _move(ws, first, node))
    ws.clean()


def _move(ws: Workspace, first: fx.Node, node: fx.Node) -> fx.Node:
    """A map with its channels last, in the form of the node whose place it takes."""
    if is_map(node):
        return ws.call(node, aten.permute.default, (first, _LAST), node)
    flat = ws.call(node, aten.flatten.using_ints, (first, 2, 3), node)
    n, pixels, channels = node.meta["val"].shape
    flat.meta["val"] = node.meta["val"].new_empty((n, channels, pixels))
    return ws.call(node, aten.transpose.int, (flat, 1, 2), node)


def _is_turned(node: Any) -> bool:
    """Whether a node swaps the last two axes of three."""
    if not isinstance(node, fx.Node) or not is_map(node, 3):
        return False
    if node.target is aten.transpose.int:
        return {int(a) % 3 for a in node.args[1:]} == {1, 2}  # type: ignore[call-overload,arg-type]
    return node.target is aten.permute.default and [a % 3 for a in node.args[1]] == [0, 2, 1]  # type: ignore[union-attr,operator]


def _moved(node: Any) -> fx.Node | None:
    """The map of which a node is the one with its channels last, its pixels in rows or one after the other."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or not (is_map(node) or is_map(node, 3)):
        return None
    source: Any = None
    if node.target is aten.permute.default and list(node.args[1]) == _LAST:  # type: ignore[arg-type]
        return node.args[0] if is_map(node.args[0]) else None  # type: ignore[return-value]
    if node.target in _RESHAPES:
        source = _moved(node.args[0])
    elif _is_turned(node):
        source = _flattened(node.args[0])
    if source is None:
        return None
    n, c, h, w = dims(source)
    return source if dims(node) in ((n, h, w, c), (n, h * w, c)) else None  # type: ignore[no-any-return]


def _flattened(node: Any) -> fx.Node | None:
    """The map [N, C, H, W] of which a node is [N, C, H W]."""
    if not isinstance(node, fx.Node) or node.target not in _RESHAPES or not is_map(node.args[0]):
        return None
    source: Any = node.args[0]
    n, c, h, w = dims(source)
    return source if dims(node) == (n, c, h * w) else None


def _moved_back(node: fx.Node) -> fx.Node | None:
    """The map that a node is, if it moves the channels of one with them last to where they were."""
    if not is_map(node):
        return None
    source: Any = None
    if node.target is aten.permute.default and list(node.args[1]) == _BACK:  # type: ignore[arg-type]
        source = _moved(node.args[0])
    elif node.target in _RESHAPES and _is_turned(node.args[0]):
        source = _moved(node.args[0].args[0])  # type: ignore[union-attr]
    return source if source is not None and dims(source) == dims(node) else None


def _with_channels_first(ws: Workspace, node: fx.Node) -> fx.Node | None:
    """What makes a node's result with its channels first, from maps that have them so."""
    rank = len(dims(node))

    def call(target: Any, args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        n, _, h, w = like.meta["val"].shape
        new = ws.call(node, target, args, node)
        new.meta["val"] = node.meta["val"].new_empty((n, dims(node)[-1], h, w))
        return new

    if node.target in (aten.linear.default, aten.layer_norm.default):
        source = _moved(node.args[0])
        rest: list[Any] = [*node.args[1:]]
        if source is None or node.kwargs:
            return None
        if node.target is aten.linear.default:
            weight, bias = (*rest, None)[:2]
            w, b = ws.known(weight), None if bias is None else ws.known(bias)
            if not isinstance(w, Tensor) or (bias is not None and not isinstance(b, Tensor)):
                return None
            settings = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
            kernel = ws.constant(w[:, :, None, None], ws.dtype(node))
            return call(aten.convolution.default, (source, kernel, bias, *settings), source)
        defaults: list[Any] = [None, None, None, 1e-5]
        shape, weight, bias, eps = (rest + defaults[len(rest) :])[:4]
        if list(shape) != [dims(node)[-1]] or any(p is not None and p not in ws.values for p in (weight, bias)):
            return None
        return call(torch.ops.esr.layer_norm2d.default, (source, weight, bias, float(eps)), source)
    if node.target in _REDUCTIONS:
        source, place = _moved(node.args[0]), _REDUCTIONS[node.target]
        axes = node.args[1] if len(node.args) > 1 else None
        given = place is not None and len(node.args) > place
        keeps = node.args[place] if given else node.kwargs.get("keepdim", False)  # type: ignore[index]
        if source is None or not keeps or not isinstance(axes, (list, tuple)) or [a % rank for a in axes] != [rank - 1]:  # type: ignore[operator]
            return None
        new = call(node.target, (source, [1], *node.args[2:]), source)
        new.kwargs = node.kwargs
        return new
    if node.target is aten.cat.default:
        parts, *axis = node.args
        maps = [_moved(p) for p in parts]  # type: ignore[union-attr]
        if not axis or axis[0] not in (-1, rank - 1) or any(m is None for m in maps):
            return None
        return call(aten.cat.default, (maps, 1), maps[0])  # type: ignore[arg-type]
    found = slice_of(node, rank - 1)
    if found is not None:
        source = _moved(found[0])
        return None if source is None else call(aten.slice.Tensor, (source, 1, *found[1:]), source)
    if not is_pointwise(node):
        return None
    maps, channels = [], dims(node)[-1]

    def first(argument: Any) -> Any:
        if not isinstance(argument, fx.Node):
            return argument
        source = _moved(argument)
        if source is not None and dims(argument)[:-1] == dims(node)[:-1] and dims(argument)[-1] in (channels, 1):
            maps.append(source)
            return source
        value = ws.values.get(argument)
        if isinstance(value, Tensor) and value.numel() == 1:
            return argument
        if isinstance(value, Tensor) and value.numel() == channels == value.shape[-1]:
            return ws.constant(value.reshape(-1, 1, 1), ws.dtype(argument))
        raise LookupError

    try:
        args, kwargs = map_arg(node.args, first), map_arg(node.kwargs, first)
    except LookupError:
        return None
    if not maps or node.target is aten.prelu.default:
        return None
    new = call(node.target, args, maps[0])  # type: ignore[arg-type]
    new.kwargs = kwargs
    return new


# --- moved elements


def recognize_shuffles(ws: Workspace, image: fx.Node, example: Tensor) -> None:
    """Chains of views and transpositions that amount to a pixel shuffle, its inverse, repeated pixels or nothing.

    They are told by what they do to the numbers of the elements, not by how they are written.

    Args:
        image: the image's placeholder, and an image for it.
    """
    run = ws.evaluator(image, example)
    for node in list(ws.graph.nodes):
        if node._erased or node.target not in _MOVES or node in ws.values or not is_map(node):
            continue
        if all(user.target in _MOVES for user in node.users):
            continue  # the end of the chain decides
        chain, source = [node], node.args[0]
        while isinstance(source, fx.Node) and source.target in _MOVES and len(source.users) == 1:
            chain.append(source)
            source = source.args[0]
        if not is_map(source) or len(chain) < 2:
            continue
        assert isinstance(source, fx.Node)
        shuffle = _shuffle(ws, source, chain[::-1], run)
        if shuffle is None:
            continue
        target, factor = shuffle
        settings = (None, [float(factor)] * 2) if target is aten.upsample_nearest2d.vec else (factor,)
        new = source if factor == 1 else ws.call(node, target, (source, *settings), node)
        ws.replace(node, new, chain[:0:-1])
    ws.clean()


def _shuffle(ws: Workspace, source: fx.Node, chain: list[fx.Node], run: Callable[[fx.Node], Any]) -> Any:
    example = run(source)
    if not isinstance(example, Tensor) or example.dim() != 4:
        return None
    numbers = torch.arange(example.numel(), dtype=torch.float64).view(example.shape)
    moved = numbers
    for step in chain:
        args = (moved, *map_arg(step.args[1:], run))
        moved = step.target(*args, **step.kwargs)  # type: ignore[operator]
    if moved.shape == numbers.shape:
        return (None, 1) if torch.equal(moved, numbers) and dims(chain[-1]) == dims(source) else None
    for target, up in ((aten.pixel_shuffle.default, True), (aten.pixel_unshuffle.default, False)):
        a, b = (example, moved) if up else (moved, example)
        factor, rest = divmod(b.shape[2], a.shape[2])
        if rest or factor < 2 or a.shape[2] * factor != b.shape[2] or a.shape[3] * factor != b.shape[3]:
            continue
        if up and a.shape[:2] == b.shape[:2]:
            rows = numbers.repeat_interleave(factor, 2)
            return (
                (aten.upsample_nearest2d.vec, factor) if torch.equal(rows.repeat_interleave(factor, 3), moved) else None
            )
        if a.shape[1] == b.shape[1] * factor**2 and torch.equal(target(numbers, factor), moved):
            return target, factor
    return None
