"""Channels that are grouped, repeated, shuffled or concatenated: as layers that plans have.

What only selects channels is a 1x1 convolution with ones and zeros, which the algebra of linear layers takes into a
neighbour where that costs nothing. A concatenation goes behind what works channel by channel, to the convolution that
reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ..functional import DEPTHWISE_SIDES
from .simplify import _MOVES, Conv, conv_of, write_affine, write_conv
from .workspace import Workspace, aten, concatenated, dims, is_map, is_pointwise, slice_of, with_channels

# What selects channels by itself; views and transpositions do so together.
_SELECTS = {
    aten.repeat_interleave.self_int,
    aten.repeat.default,
    aten.expand.default,
    aten.flip.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.channel_shuffle.default,
    aten.native_channel_shuffle.default,
}
# Multiply-adds per pixel up to which a selection or a grouped convolution is written out.
_LARGEST_SELECTION, _LARGEST_DENSE, _SMALL_DENSE = 1 << 14, 9 * 64**2, 1 << 11
_MOST_GROUPS, _LEAST_CHANNELS = 8, 8
_MOST_PARTS = 8


def canonicalize_channels(ws: Workspace, image: fx.Node, example: Tensor) -> None:
    """Selections of channels, grouped convolutions and concatenations in forms that plans have.

    Args:
        image: the image's placeholder, and an image for it.
    """
    _selections(ws, image, example)
    for node in list(ws.graph.nodes):
        conv = None if node._erased else conv_of(ws, node)
        if conv is not None and not _center(ws, conv):
            _groups(ws, conv)
    _concatenations(ws)
    ws.clean()


# --- selections


def _selections(ws: Workspace, image: fx.Node, example: Tensor) -> None:
    run = ws.evaluator(image, example)
    for node in list(ws.graph.nodes):
        if node._erased or node in ws.values or not is_map(node) or not _selects(node):
            continue
        if all(_selects(user) for user in node.users):
            continue  # the end of the chain decides
        source = _source(node)
        if source is None or dims(source)[2:] != dims(node)[2:] or dims(source)[0] != dims(node)[0]:
            continue
        before, after = dims(source)[1], dims(node)[1]
        if not isinstance(before, int) or not isinstance(after, int) or before * after > _LARGEST_SELECTION:
            continue
        numbers = run(source)
        numbers = torch.arange(numbers.numel(), dtype=torch.float64).view(numbers.shape)
        moved = _replayed(node, source, numbers, run)
        index = (moved[0, :, 0, 0] / numbers[0, 0].numel()).long()
        if bool((index >= before).any()) or not torch.equal(moved, numbers[:, index]):
            continue
        first = int(index[0])
        if torch.equal(index, torch.arange(first, first + after)):
            ws.replace(node, _slice(ws, source, first, first + after, node))
        elif not _as_nearest(ws, node, source, index):
            weight = torch.eye(before, dtype=torch.float64)[index].view(after, before, 1, 1)
            ws.replace(node, write_conv(ws, Conv(source, source, weight, None), node))
    ws.clean()


def _selects(node: fx.Node) -> bool:
    if node.target is aten.stack.default:
        return _source(node) is not None
    if node.target is aten.cat.default:
        parts, *axis = node.args
        return bool(axis) and axis[0] in (1, -3) and any(_selects(p) for p in parts) and _source(node) is not node  # type: ignore[union-attr,arg-type]
    return node.target in _SELECTS or node.target in _MOVES


def _source(node: Any) -> fx.Node | None:
    """The map whose elements a node moves, repeats or leaves out."""
    if not isinstance(node, fx.Node):
        return None
    if node.target in (aten.cat.default, aten.stack.default):
        parts: Any = node.args[0]
        sources = {_source(p) for p in parts}
        if len(sources) == 1:
            return sources.pop()
    if node.target in _SELECTS or node.target in _MOVES:
        return _source(node.args[0])
    if (part := slice_of(node)) is not None:
        return _source(part[0])
    return node if is_map(node) else None


def _replayed(node: fx.Node, source: fx.Node, numbers: Tensor, run: Callable[[fx.Node], Any]) -> Tensor:
    """What a node is for numbers in the place of its source."""
    if node is source:
        return numbers
    if node.target in (aten.cat.default, aten.stack.default):
        parts: Any = node.args[0]
        return node.target([_replayed(p, source, numbers, run) for p in parts], *node.args[1:])  # type: ignore[operator,no-any-return]
    if (part := slice_of(node)) is not None:
        return _replayed(part[0], source, numbers, run)[:, part[1] : part[2]]
    inner = _replayed(node.args[0], source, numbers, run)  # type: ignore[arg-type]
    return node.target(inner, *map_arg(node.args[1:], run), **map_arg(node.kwargs, run))  # type: ignore[operator,no-any-return]


def _as_nearest(ws: Workspace, node: fx.Node, source: fx.Node, index: Tensor) -> bool:
    """Every channel repeated for the pixels that a pixel shuffle makes of it, alone or in a sum: nearest neighbours."""
    if len(node.users) != 1:
        return False
    (user,) = node.users
    total, rest = user, None
    if user.target is aten.add.Tensor and len(user.args) == 2 and not user.kwargs and len(user.users) == 1:
        rest = user.args[1] if user.args[0] is node else user.args[0]
        if rest is node or not is_map(rest) or dims(rest) != dims(node):  # type: ignore[arg-type]
            return False
        (user,) = user.users
    if user.target is not aten.pixel_shuffle.default:
        return False
    factor = int(user.args[1])  # type: ignore[arg-type]
    if not torch.equal(index, torch.arange(dims(source)[1]).repeat_interleave(factor**2)):
        return False
    large = ws.call(user, aten.upsample_nearest2d.vec, (source, None, [float(factor)] * 2), user)
    if rest is None:
        ws.replace(user, large)
    else:
        shuffled = ws.call(user, aten.pixel_shuffle.default, (rest, factor), user)
        ws.replace(user, ws.call(user, aten.add.Tensor, (shuffled, large), user), [total])
    return True


# --- convolutions


def _center(ws: Workspace, conv: Conv) -> bool:
    """A kernel with nothing but zeros around its middle is one of 1x1; one channel by channel, a factor for each."""
    node, weight = conv.node, conv.weight
    kh, kw = conv.kernel
    if conv.stride != (1, 1) or kh % 2 == 0 or kw % 2 == 0:
        return False
    if conv.padding != (conv.dilation[0] * (kh // 2), conv.dilation[1] * (kw // 2)):
        return False
    middle = weight[:, :, kh // 2 : kh // 2 + 1, kw // 2 : kw // 2 + 1]
    if (conv.kernel == (1, 1) and not conv.depthwise) or weight.count_nonzero() != middle.count_nonzero():
        return False
    if conv.depthwise:
        shift = torch.zeros_like(middle[:, 0, 0, 0]) if conv.bias is None else conv.bias
        write_affine(ws, node, conv.x, middle.flatten(), shift)
        return True
    small = replace(conv, weight=middle, padding=(0, 0), dilation=(1, 1))
    new = write_conv(ws, small, node)
    ws.replace(node, new)
    if conv.groups > 1:
        _groups(ws, replace(small, node=new))
    return True


def _is_hot(conv: Conv) -> bool:
    """Of a kernel and padding that plans have for all channels."""
    return (conv.kernel, conv.padding) in (((3, 3), (1, 1)), ((1, 1), (0, 0)))


def _groups(ws: Workspace, conv: Conv) -> None:
    """A grouped convolution as a dense one, as several of slices, or as one channel by channel of repeated channels."""
    node, groups = conv.node, conv.groups
    out, each = conv.weight.shape[:2]
    if groups == 1 or conv.depthwise:
        return
    if conv.stride != (1, 1) or conv.dilation != (1, 1):
        return
    written_out = conv.weight.numel() * groups
    hot = _is_hot(conv)
    separate = groups <= _MOST_GROUPS and min(each, out // groups) >= _LEAST_CHANNELS
    if hot and written_out <= (_LARGEST_DENSE if each > 1 else _SMALL_DENSE):
        dense = replace(conv, weight=conv.dense(), groups=1)
        ws.replace(node, write_conv(ws, dense, node))
    elif each == 1 and all(k in DEPTHWISE_SIDES for k in conv.kernel) and groups * out <= _LARGEST_SELECTION:
        index = torch.arange(groups).repeat_interleave(out // groups)
        weight = torch.eye(groups, dtype=torch.float64)[index].view(out, groups, 1, 1)
        repeated = with_channels(write_conv(ws, Conv(conv.x, conv.x, weight, None), node), conv.x, out)
        ws.replace(node, write_conv(ws, replace(conv, x=repeated, groups=out), node))
    elif hot and separate:
        parts = []
        for g, weight in enumerate(conv.weight.chunk(groups)):
            width = out // groups
            bias = None if conv.bias is None else conv.bias[g * width : (g + 1) * width]
            x = _slice(ws, conv.x, g * each, (g + 1) * each, node)
            part = write_conv(ws, Conv(node, x, weight, bias, padding=conv.padding), node)
            parts.append(with_channels(part, node, width))
        both = ws.call(node, aten.cat.default, (parts, 1), node)
        ws.replace(node, both)
        _concatenation(ws, both)


def _slice(ws: Workspace, x: fx.Node, start: int, end: int, at: fx.Node) -> fx.Node:
    """Channels of a map, of what they are channels of."""
    if (start, end) == (0, dims(x)[1]):
        return x
    first = 0
    for part in concatenated(x) or ():
        width = dims(part)[1]
        if first <= start and end <= first + width:
            return _slice(ws, part, start - first, end - first, at)
        first += width
    part_of = slice_of(x)
    if part_of is not None:
        return _slice(ws, part_of[0], part_of[1] + start, part_of[1] + end, at)
    return with_channels(ws.call(at, aten.slice.Tensor, (x, 1, start, end), at), x, end - start)


# --- concatenations


def _concatenations(ws: Workspace) -> None:
    """What works channel by channel on a concatenation, on its parts, where a convolution then reads them."""
    for node in list(ws.graph.nodes):
        if not node._erased and node not in ws.values:
            _concatenation(ws, node)


def _concatenation(ws: Workspace, node: fx.Node) -> None:
    if _parts(node) is None or not _reaches_convolution(ws, node):
        return
    cat: fx.Node | None = node
    while cat is not None and len(cat.users) == 1:
        (user,) = cat.users
        cat = _behind(ws, cat, user)


def _parts(node: fx.Node) -> list[fx.Node] | None:
    """The maps of a concatenation that its readers can be taken behind."""
    parts = concatenated(node)
    if parts is None or not 1 < len(parts) <= _MOST_PARTS:
        return None
    return parts if all(isinstance(dims(p)[1], int) for p in parts) else None


def _depthwise_of(ws: Workspace, node: fx.Node) -> Conv | None:
    conv = conv_of(ws, node)
    return conv if conv is not None and conv.depthwise and conv.stride == (1, 1) else None


def _is_channelwise(ws: Workspace, node: fx.Node, x: fx.Node) -> bool:
    """Whether each channel of a node depends on the same channel of a map, and of others of its shape, alone."""
    if not is_map(node) or dims(node) != dims(x) or node in ws.values:
        return False
    if _depthwise_of(ws, node) is not None:
        return node.args[0] is x
    if not is_pointwise(node):
        return False
    channels = dims(x)[1]
    for a in node.all_input_nodes:
        value = ws.values.get(a)
        if a in ws.values:
            if not isinstance(value, Tensor) or (value.numel() != 1 and not _is_column(value, node, channels)):
                return False
        elif not is_map(a) or dims(a) != dims(x):
            return False
    return True


def _is_column(value: Tensor, node: fx.Node, channels: int) -> bool:
    """Whether a constant has one number for every channel of the node that reads it."""
    if node.target is aten.prelu.default:
        return value.numel() == channels
    return value.numel() == channels and value.dim() >= 3 and value.shape[-3] == channels


def _reaches_convolution(ws: Workspace, node: fx.Node) -> bool:
    """Whether what reads a map ends in one convolution of plans or in groups, channel by channel until there."""
    steps = 0
    while len(node.users) == 1:
        (user,) = node.users
        conv = conv_of(ws, user)
        if conv is not None and _depthwise_of(ws, user) is None:
            return steps > 0 and _is_hot(conv) and conv.stride == conv.dilation == (1, 1)
        if not _is_channelwise(ws, user, node):
            return False
        node, steps = user, steps + 1
    return False


def _behind(ws: Workspace, cat: fx.Node, node: fx.Node) -> fx.Node | None:
    """The concatenation of what a node that reads a concatenation makes of its parts; None where the node is none."""
    if not _is_channelwise(ws, node, cat):
        return None
    parts, start, made = _parts(cat), 0, []
    assert parts is not None
    depthwise = _depthwise_of(ws, node)
    for part in parts:
        end = start + dims(part)[1]
        if depthwise is not None:
            bias = None if depthwise.bias is None else depthwise.bias[start:end]
            conv = replace(depthwise, x=part, weight=depthwise.weight[start:end], bias=bias, groups=end - start)
            new = write_conv(ws, conv, node)
        else:

            def of_part(a: fx.Node, part: fx.Node = part, start: int = start, end: int = end) -> fx.Node:
                if a is cat:
                    return part
                value = ws.values.get(a)
                if not isinstance(value, Tensor):
                    return _slice(ws, a, start, end, node)
                if value.numel() == 1:
                    return a
                column = value.flatten()[start:end]
                shape = (-1,) if node.target is aten.prelu.default else (-1, 1, 1)
                return ws.constant(column.view(shape), ws.dtype(a))

            new = ws.call(node, node.target, map_arg(node.args, of_part), node)  # type: ignore[arg-type]
            new.kwargs = map_arg(node.kwargs, of_part)
        made.append(with_channels(new, node, end - start))
        start = end
    both = ws.call(node, aten.cat.default, (made, 1), node)
    ws.replace(node, both)
    if not cat.users:
        ws.graph.erase_node(cat)
    return both
