"""Statistics of all pixels of a channel, told by their values, and what layers make of them.

A value of one pixel is a map [N, C, 1, 1] here: linear layers and functions on [N, C] become those of such maps.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from ..backends.reference.statistic import statistic
from ..plan import CORRECTED, STATISTICS
from .patterns import _fused_of, _insert
from .simplify import _MOVES, Conv, _share, affine_of, conv_of, within, write_conv
from .workspace import Workspace, aten, dims, is_map, is_pixel, is_pointwise, with_channels

ops = torch.ops.esr

_LONGEST = 32  # operations between a map and its statistic, those of others that are made of it included
_EXACT = 1e-9  # of float64 evaluations that should be equal
_REDUCTIONS = {
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_max_pool2d.default,
    aten.avg_pool2d.default,
    aten.max_pool2d.default,
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.var.correction,
    aten.var.dim,
    aten.std.correction,
    aten.std.dim,
    aten.var_mean.correction,
    aten.var_mean.dim,
    aten.std_mean.correction,
    aten.std_mean.dim,
    aten.amax.default,
    aten.max.dim,
}
_FLAT_MOVES = _MOVES | {aten.squeeze.default, aten.squeeze.dims}
_LINEAR = {
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.matmul.default,
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.convolution.default,
}


def local_variances(ws: Workspace) -> None:
    """Variances of windows that were unfolded, rows first, as `esr::local_variance`."""
    for node in list(ws.graph.nodes):
        if node.target not in (aten.var.dim, aten.var.correction) or node in ws.values or not is_map(node):
            continue
        columns, axes, *rest = (*node.args, None)[:4]
        options: dict[str, Any] = dict(node.kwargs)
        if node.target is aten.var.dim:
            options |= dict(zip(("unbiased", "keepdim"), rest, strict=False))
            correction = 1 if options.get("unbiased", True) in (True, None) else 0
        else:
            correction = 1 if options.get("correction") is None else options["correction"]
        rows = columns.args[0] if isinstance(columns, fx.Node) and columns.target is aten.unfold.default else None
        if not isinstance(rows, fx.Node) or rows.target is not aten.unfold.default or options.get("keepdim"):
            continue
        x, *along_rows = rows.args
        sizes = [along_rows, list(columns.args[1:])]  # type: ignore[union-attr]
        if not is_map(x) or x in ws.values or not isinstance(axes, (list, tuple)):
            continue
        if sorted(a % 6 for a in axes) != [4, 5] or [sizes[0][0] % 4, sizes[1][0] % 5] != [2, 3]:  # type: ignore[operator]
            continue
        size, stride = ([side[i] for side in sizes] for i in (1, 2))
        if all(isinstance(v, int) for v in (*size, *stride, correction)):
            ws.replace(node, ws.call(node, ops.local_variance.default, (x, size, stride, correction), node))
    ws.clean()


def recognize_statistics(ws: Workspace, limit: float | None = None) -> None:
    """Statistics as `esr::statistic`, and what follows them as layers of maps of one pixel.

    Args:
        limit: as of `merge_linear`.
    """
    for x in list(ws.graph.nodes):
        if not x._erased and x not in ws.values and is_map(x) and any(_reduces(user) for user in x.users):
            _find(ws, x)
    ws.clean()
    _share(ws)
    for node in list(ws.graph.nodes):
        if not node._erased and node.op == "call_function" and node not in ws.values:
            _lift(ws, node)
    ws.clean()
    for node in list(ws.graph.nodes):
        if not node._erased and node.op == "call_function" and node not in ws.values:
            _deviation(ws, node, limit) or _sum_into_pointwise(ws, node, limit)
    ws.clean()


# --- statistics


def _reduces(node: fx.Node) -> bool:
    return node.target in _REDUCTIONS or (node.target in _FLAT_MOVES and any(_reduces(user) for user in node.users))


def _find(ws: Workspace, x: fx.Node) -> None:
    """Replace every statistic of x."""
    batch, channels, *_ = dims(x)
    if not isinstance(channels, int) or is_pixel(x):
        return
    order = {n: i for i, n in enumerate(ws.graph.nodes)}
    runs = [_Run(ws, x, probe) for probe in _probes(x)]
    pending, tried = set(x.users), 0
    found: list[tuple[fx.Node, str, int]] = []
    while pending and tried < _LONGEST:
        node = min(pending, key=order.__getitem__)
        pending.discard(node)
        tried += 1
        if node.op == "output" or not all(run.compute(node) for run in runs):
            continue
        if _numbers(node, batch) == channels:
            match = _match(runs, node, channels)
            found += [(node, *match)] if match is not None else []
        pending |= set(node.users)
    for node, kind, correction in found:
        new = ws.call(node, ops.statistic.default, (x, kind, correction), x)
        new.meta["val"] = _pixel_like(x, channels)
        ws.replace(node, _shaped(ws, new, node))


def _numbers(node: fx.Node, batch: Any) -> int:
    """How many numbers an image has in a tensor of which one dimension besides the batch has more than one; else 0."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() < 2 or not value.is_floating_point():
        return 0
    first, *rest = dims(node)
    wide = [d for d in rest if d != 1]
    if first != batch or len(wide) > 1 or not all(isinstance(d, int) for d in wide):
        return 0
    return wide[0] if wide else 1


def _shaped(ws: Workspace, pixel: fx.Node, like: fx.Node) -> fx.Node:
    """A map of one pixel in the shape of another node, in front of it."""
    if dims(pixel) == dims(like):
        return pixel
    first, *rest = dims(like)
    shape = [first if isinstance(first, int) else -1, *rest]
    return ws.call(like, aten.reshape.default, (pixel, shape), like)


def _probes(x: fx.Node) -> Iterator[Tensor]:
    """Maps of two sizes with the mean's sign, deviation and magnitude different for every channel and image."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, height, width = dims(x)
    small: dict[Any, int] = {batch: 5, height: 5, width: 7}
    large: dict[Any, int] = {batch: 6, height: 8, width: 6}
    for scale, size in ((1e-4, small), (1.0, large), (1e3, small)):
        shape = [d if isinstance(d, int) else size[d] for d in (batch, channels, height, width)]
        spread, mean = (torch.randn(*shape[:2], 1, 1, generator=generator, dtype=torch.float64) for _ in range(2))
        yield scale * (spread * torch.randn(shape, generator=generator, dtype=torch.float64) + 2 * mean)


class _Run:
    """What nodes make of a value of a map and of its sizes, in float64."""

    def __init__(self, ws: Workspace, x: fx.Node, value: Tensor) -> None:
        self._ws = ws
        self._sizes = dict(zip(dims(x), value.shape, strict=True))
        self._known: dict[fx.Node, Any] = {x: value}
        self.x = value

    def compute(self, node: fx.Node) -> bool:
        """Whether a node has a value: made of the map, sizes and numbers alone."""
        known = node.target in _REDUCTIONS or node.target in _FLAT_MOVES or is_pointwise(node) or node.target is getitem
        if not known:
            return False
        try:
            args, kwargs = map_arg(node.args, self._value), map_arg(node.kwargs, self._value)
            self._known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        except (LookupError, RuntimeError, TypeError):
            return False
        return True

    def __getitem__(self, node: fx.Node) -> Tensor:
        value = self._known[node]
        assert isinstance(value, Tensor)
        return value

    def _value(self, node: fx.Node) -> Any:
        if node in self._known:
            return self._known[node]
        if node in self._ws.values:
            value = self._ws.values[node]
            if isinstance(value, Tensor) and value.numel() == 1:
                return value
            raise LookupError
        size = node.meta.get("val")
        if isinstance(size, int):
            return size
        if not isinstance(size, torch.SymInt):
            raise LookupError
        if size.node.expr in self._sizes:
            return self._sizes[size.node.expr]
        return node.target(*map_arg(node.args, self._value))  # type: ignore[operator]


def _match(runs: list[_Run], node: fx.Node, channels: int) -> tuple[str, int] | None:
    """Kind and correction of the statistic that a node is."""
    for kind, correction in itertools.product(STATISTICS, (0, 1)):
        if correction and kind not in CORRECTED:
            continue
        wanted = (statistic(run.x, kind, correction).flatten(1) for run in runs)
        got = (run[node].reshape(len(run.x), channels) for run in runs)
        if all(bool(((a - b).abs() <= _EXACT * b.abs()).all()) for a, b in zip(got, wanted, strict=True)):
            return kind, correction
    return None


# --- values of one pixel, whatever their shape


def _pixel(node: Any) -> fx.Node | None:
    """The map of one pixel whose numbers a node has, in order."""
    while isinstance(node, fx.Node) and isinstance(node.meta.get("val"), Tensor):
        if is_pixel(node):
            return node
        if node.target not in _FLAT_MOVES or not _numbers(node, dims(node)[0]):
            return None
        source = node.args[0]
        if not isinstance(source, fx.Node) or _numbers(source, dims(node)[0]) != _numbers(node, dims(node)[0]):
            return None
        node = source
    return None


def _lift(ws: Workspace, node: fx.Node) -> None:
    """Compute a value of one pixel as a map of one pixel."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() < 2:
        return
    if node.target in (aten.expand.default, aten.expand_as.default):
        source = _pixel(node.args[0])
        if source is not None and _broadcasts(source, node):
            ws.replace(node, source)
        return
    numbers = _numbers(node, dims(node)[0])
    if not numbers:
        return
    if node.target in _FLAT_MOVES:
        source = _pixel(node.args[0])
        if source is not None and source is not node and dims(source) == dims(node):
            ws.replace(node, source)
    elif node.target in _LINEAR:
        conv = conv_of(ws, node)
        if conv is None or not is_pixel(conv.x) or not conv.pointwise:
            _linear(ws, node, numbers)
    elif is_pointwise(node) and not is_pixel(node):
        _function(ws, node, numbers)


def _broadcasts(pixel: fx.Node, node: fx.Node) -> bool:
    """Whether every reader of an expanded pixel would expand it as well."""
    batch, channels, *_ = dims(node)
    if len(dims(node)) != 4 or dims(pixel)[:2] != (batch, channels):
        return False
    return all(
        is_pointwise(user)
        and any(n is not node and is_map(n) and dims(n) == dims(user) == dims(node) for n in user.all_input_nodes)
        for user in node.users
    )


def _function(ws: Workspace, node: fx.Node, numbers: int) -> None:
    """A function of numbers [N, C] as one of [N, C, 1, 1]."""

    def lifted(argument: fx.Node) -> fx.Node:
        value = ws.values.get(argument)
        if isinstance(value, Tensor):
            if value.numel() == 1:
                return argument
            if value.numel() == numbers and _wide_axis(value.shape) == _wide_axis(dims(node)):
                return ws.constant(value.reshape(1, -1, 1, 1), ws.dtype(argument))
        source = _pixel(argument)
        if source is None or dims(source)[1] not in (numbers, 1):
            raise LookupError
        return source

    try:
        args, kwargs = map_arg(node.args, lifted), map_arg(node.kwargs, lifted)
    except LookupError:
        return
    reads = [n for n in (*args, *kwargs.values()) if isinstance(n, fx.Node) and n not in ws.values]
    if not reads or all(dims(n)[1] != numbers for n in reads) or node.target is aten.prelu.default:
        return
    new = ws.call(node, node.target, args, reads[0])  # type: ignore[arg-type]
    new.kwargs = kwargs
    new.meta["val"] = _pixel_like(node, numbers)
    ws.replace(node, _shaped(ws, new, node))


def _wide_axis(shape: Any) -> int | None:
    """The axis with more than one element, counted from the end."""
    return next((i - len(shape) for i, d in enumerate(shape) if i and d != 1), -1 if len(shape) == 1 else None)


def _pixel_like(node: fx.Node, numbers: int) -> Tensor:
    value: Tensor = node.meta["val"]
    return value.new_empty((value.shape[0], numbers, 1, 1))


def _linear(ws: Workspace, node: fx.Node, numbers: int) -> None:
    """A linear layer on numbers, of any kind, as a 1x1 convolution; told by what it makes of each number."""
    sources = [n for n in node.all_input_nodes if n not in ws.values]
    pixel = _pixel(sources[0]) if len(sources) == 1 else None
    if pixel is None:
        return
    source, channels = sources[0], dims(pixel)[1]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, channels, generator=generator, dtype=torch.float64)
    unit = torch.eye(channels, dtype=torch.float64)
    values = torch.cat([torch.zeros(1, channels, dtype=torch.float64), unit, drawn])

    def known(n: fx.Node) -> Any:
        return values.reshape(-1, *dims(source)[1:]) if n is source else ws.values[n]

    try:
        result = node.target(*map_arg(node.args, known), **map_arg(node.kwargs, known))  # type: ignore[operator]
    except RuntimeError:
        return
    if result.shape[0] != len(values) or result[0].numel() != numbers:
        return
    result = result.reshape(len(values), numbers)
    bias = result[0]
    weight = result[1 : channels + 1] - bias
    if not torch.allclose(drawn @ weight + bias, result[channels + 1 :], rtol=1e-9, atol=1e-9):
        return
    conv = Conv(node, pixel, weight.T.reshape(numbers, channels, 1, 1), bias if bool(bias.any()) else None)
    new = write_conv(ws, conv, node)
    new.meta["val"] = _pixel_like(node, numbers)
    ws.replace(node, _shaped(ws, new, node))


# --- sums of maps, some of which have one pixel or one channel


@dataclass
class _Sum:
    """A sum of maps with one factor for every channel, and a constant."""

    factors: dict[fx.Node, Tensor]
    constant: Tensor
    steps: int = 0  # operations that it is written in

    def leaves(self, root: fx.Node) -> tuple[list[fx.Node], list[fx.Node], list[fx.Node]]:
        """Those of the root's shape, those of one channel, those of one pixel."""
        batch, _, *size = dims(root)
        kinds: tuple[list[fx.Node], list[fx.Node], list[fx.Node]] = ([], [], [])
        for leaf in self.factors:
            shape = dims(leaf)
            kinds[0 if shape == dims(root) else 1 if shape == (batch, 1, *size) else 2].append(leaf)
        return kinds


def _sum_of(ws: Workspace, node: fx.Node, root: bool = True) -> _Sum:
    """A node as a sum, taken apart as far as nobody else reads the parts."""
    channels = dims(node)[1]
    one = torch.ones(channels, dtype=torch.float64)
    leaf = _Sum({node: one}, torch.zeros_like(one))
    if not root and len(node.users) != 1:
        return leaf
    found = affine_of(ws, node)
    if found is not None:
        x, scale, shift = found
        inner = _sum_of(ws, x, False)
        factors = {k: f * scale for k, f in inner.factors.items()}
        return _Sum(factors, inner.constant * scale + shift, inner.steps + 1)
    if node.target not in (aten.add.Tensor, aten.sub.Tensor) or node in ws.values:
        return leaf
    a, b, *rest = node.args
    alpha = rest[0] if rest else node.kwargs.get("alpha", 1)
    if not all(isinstance(t, fx.Node) and t not in ws.values and _adds_to(t, node) for t in (a, b)):
        return leaf
    total = _Sum({}, torch.zeros_like(one), 1)
    for term, sign in ((a, 1.0), (b, float(alpha) if node.target is aten.add.Tensor else -float(alpha))):  # type: ignore[arg-type]
        assert isinstance(term, fx.Node)
        part = _sum_of(ws, term, False) if dims(term) == dims(node) else _Sum({term: one}, torch.zeros_like(one))
        for k, f in part.factors.items():
            total.factors[k] = total.factors.get(k, 0) + sign * f
        total.constant = total.constant + sign * part.constant
        total.steps += part.steps
    return total


def _adds_to(term: fx.Node, node: fx.Node) -> bool:
    batch, channels, *size = dims(node)
    return is_map(term) and dims(term) in ((batch, channels, *size), (batch, 1, *size), (batch, channels, 1, 1))


def _is_part(ws: Workspace, node: fx.Node) -> bool:
    """Whether a sum ends further down."""
    users = list(node.users)
    if len(users) != 1 or not is_map(users[0]) or dims(users[0]) != dims(node):
        return False
    return affine_of(ws, users[0]) is not None or len(_sum_of(ws, users[0]).factors) > 1


def _deviation(ws: Workspace, node: fx.Node, limit: float | None) -> bool:
    """t + s (t - m) with a value m of one pixel: (1 + s) t, which a convolution takes in, plus the pixel -s m.

    Where m is the mean of t and t a 1x1 convolution, m is that convolution of a mean.
    """
    if node.target not in (aten.add.Tensor, aten.sub.Tensor) or not is_map(node) or is_pixel(node):
        return False
    if not isinstance(dims(node)[1], int) or _is_part(ws, node):
        return False
    total = _sum_of(ws, node)
    whole, thin, pixels = total.leaves(node)
    if len(whole) != 1 or thin or not pixels or total.steps < 2:
        return False
    (t,) = whole
    dtype = ws.dtype(node)
    conv = _pointwise_of(ws, t)

    def times(x: fx.Node, factor: Tensor) -> fx.Node:
        if bool((factor == 1).all()):
            return x
        return ws.call(node, aten.mul.Tensor, (x, ws.constant(factor.view(1, -1, 1, 1), dtype)), x)

    shift: fx.Node | None = None
    for m in pixels:
        factor = total.factors[m]
        scaled = Conv(m, m, torch.diag(factor)[:, :, None, None], None)
        if m.target is ops.statistic.default and m.args[:2] == (t, "mean") and conv is not None:
            scaled = conv.scaled(factor, torch.zeros_like(factor))
            mean = ws.call(node, ops.statistic.default, (conv.x, "mean", 0), m)
            mean.meta["val"] = _pixel_like(conv.x, dims(conv.x)[1])
            scaled = replace(scaled, x=mean)
        term = m
        if scaled.x is not m or not bool((factor == 1).all()):
            term = write_conv(ws, scaled, node)
            term.meta["val"] = m.meta["val"]
        shift = term if shift is None else ws.call(node, aten.add.Tensor, (shift, term), m)
    assert shift is not None
    if bool(total.constant.any()):
        shift = ws.call(node, aten.add.Tensor, (shift, ws.constant(total.constant.view(1, -1, 1, 1), dtype)), shift)
    ws.replace(node, ws.call(node, aten.add.Tensor, (times(t, total.factors[t]), shift), node))
    ws.clean()
    return True


def _pointwise_of(ws: Workspace, node: fx.Node, alone: bool = True) -> Conv | None:
    """A 1x1 convolution of one map, an `esr` one too; alone: without activation and residual."""
    conv = conv_of(ws, node)
    if conv is not None:
        return conv if conv.pointwise else None
    fused = _fused_of(ws, node)
    if fused is None or fused.op != "conv1x1" or len(fused.xs) != 1:
        return None
    if alone and (fused.activation != "none" or fused.residual is not None):
        return None
    return Conv(node, fused.xs[0], fused.weight, fused.bias)


def _sum_into_pointwise(ws: Workspace, node: fx.Node, limit: float | None) -> bool:
    """A 1x1 convolution of p + s (p - g), where g has one channel: one of p and g."""
    conv = _pointwise_of(ws, node, alone=False)
    if conv is None or len(conv.x.users) != 1 or is_pixel(conv.x):
        return False
    total = _sum_of(ws, conv.x)
    whole, thin, pixels = total.leaves(conv.x)
    if len(whole) != 1 or not thin or pixels or not within(total.factors[whole[0]], limit):
        return False
    columns = conv.weight[:, :, 0, 0]
    weights = [columns * total.factors[whole[0]], *((columns @ total.factors[g])[:, None] for g in thin)]
    bias = columns @ total.constant
    bias = bias if conv.bias is None else bias + conv.bias
    weight = torch.cat(weights, 1)[:, :, None, None]
    total_bias = bias if bool(bias.any()) else None
    fused = _fused_of(ws, node)
    if fused is not None:
        new = _insert(ws, replace(fused, xs=[*whole, *thin], weight=weight, bias=total_bias), node)
    else:
        both = ws.call(node, aten.cat.default, ([*whole, *thin], 1), conv.x)
        new = write_conv(ws, Conv(node, with_channels(both, conv.x, weight.shape[1]), weight, total_bias), node)
    ws.replace(node, new)
    ws.clean()
    return True
