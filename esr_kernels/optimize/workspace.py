"""A graph under work: constants with their values, shapes by name, and what all rewrites share."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

aten = torch.ops.aten

Dims = tuple[Any, ...]
SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)

_CASTS = (aten._to_copy.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default)
# Element by element, though not tagged so; leaky_relu is not in PyTorch 2.11.
_POINTWISE = (
    aten.prelu.default,
    aten.leaky_relu.default,
    aten.hardswish.default,
    aten.square.default,
    aten.relu6.default,
    aten.rsub.Tensor,
)


def dims(node: fx.Node) -> Dims:
    """The shape of a node's tensor, comparable: numbers, and symbolic expressions where a size is dynamic."""
    return tuple(d if isinstance(d, int) else d.node.expr for d in node.meta["val"].shape)


def is_map(node: Any, rank: int = 4) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.dim() == rank and value.is_floating_point()


def is_pixel(node: Any) -> bool:
    """Whether a node is a map of one pixel, whatever the size of the image."""
    return is_map(node) and dims(node)[2:] == (1, 1) and isinstance(dims(node)[1], int)


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of its result depends on the same element of its (broadcast) arguments."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in node.target.tags or node.target in _POINTWISE or node.target in _CASTS


def is_random(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


class Workspace:
    """A functional graph, the values of its constants and the place of every node in the network.

    Attributes:
        graph: being rewritten; its output node returns one tensor.
        values: node -> value of every node that does not depend on the image. Floating-point values are float64.
    """

    def __init__(self, graph: fx.Graph, values: dict[fx.Node, Tensor]) -> None:
        self.graph = graph
        self.values: dict[fx.Node, Any] = {}
        for node, value in values.items():
            self.values[node] = value.double() if value.is_floating_point() else value
        self._dtypes: dict[fx.Node, torch.dtype] = {node: v.dtype for node, v in values.items()}
        self.fold()

    # --- constants

    def fold(self) -> None:
        """Compute every node that depends on constants alone, in float64."""
        for node in self.graph.nodes:
            if node.op != "call_function" or node in self.values or is_random(node):
                continue
            if not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
                continue
            if all(n in self.values for n in node.all_input_nodes):
                self.values[node] = self._compute(node)

    def _compute(self, node: fx.Node) -> Any:
        def natural(n: fx.Node) -> Any:
            value = self.values[n]
            return value.to(self.dtype(n)) if isinstance(value, Tensor) and value.dtype == torch.float64 else value

        flat = [*node.args, *node.kwargs.values()]
        exact = not any(isinstance(a, torch.dtype) for a in flat) and node.target not in _CASTS
        for resolve in ([self.values.__getitem__] if exact else []) + [natural]:
            try:
                args, kwargs = map_arg(node.args, resolve), map_arg(node.kwargs, resolve)
                result = node.target(*args, **kwargs)  # type: ignore[operator]
                break
            except RuntimeError:
                if resolve is natural:
                    raise

        def widened(t: Any) -> Any:
            return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t

        return [widened(t) for t in result] if isinstance(result, (tuple, list)) else widened(result)

    def dtype(self, node: fx.Node) -> torch.dtype:
        if node not in self._dtypes:
            self._dtypes[node] = node.meta["val"].dtype
        return self._dtypes[node]

    def constant(self, value: Tensor, dtype: torch.dtype) -> fx.Node:
        """A new constant; `dtype` is what the network computes in."""
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(f"constant_{len(self.values)}")
        node.meta["val"] = torch.empty(value.shape, dtype=dtype, device="meta")
        self.values[node] = value.double()
        self._dtypes[node] = dtype
        return node

    def known(self, argument: Any) -> Tensor | float | None:
        """The value of a number or constant tensor; None for what depends on the image."""
        if isinstance(argument, fx.Node):
            value = self.values.get(argument)
            return value if isinstance(value, Tensor) else None
        return argument if isinstance(argument, (int, float)) and not isinstance(argument, bool) else None

    def per_channel(self, argument: Any, channels: int) -> Tensor | None:
        """A number, or a constant with one number per channel of a map, as float64 [channels]; else None."""
        value = self.known(argument)
        if value is None:
            return None
        if not isinstance(value, Tensor):
            return torch.full((channels,), float(value), dtype=torch.float64)
        if value.is_complex():
            return None
        if value.numel() == 1:
            return value.double().reshape(1).expand(channels).clone()
        if value.dim() < 3 or value.shape[-3] != channels or value.numel() != channels:
            return None
        return value.double().flatten()

    # --- rewriting

    def call(self, before: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        """A new node in front of `before` whose tensor has the shape and dtype of that of `like`."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args)
        node.meta = {k: like.meta[k] for k in ("val", "stack_trace", "nn_module_stack") if k in like.meta}
        return node

    def replace(self, old: fx.Node, new: fx.Node, gone: Sequence[fx.Node] = ()) -> None:
        """Let `new` take the place of `old`, and drop it and `gone` (in order of computation)."""
        old.replace_all_uses_with(new)
        for node in (old, *reversed(gone)):
            if not node.users and not node._erased:
                self.graph.erase_node(node)

    def evaluate(self, image: fx.Node, example: Tensor) -> dict[fx.Node, Any]:
        """The value of every node for an image."""
        env: dict[fx.Node, Any] = {image: example}
        for node, value in self.values.items():
            natural = isinstance(value, Tensor) and value.dtype == torch.float64
            env[node] = value.to(self.dtype(node)) if natural else value
        for node in self.graph.nodes:
            if node.op == "call_function" and node not in env:
                args, kwargs = map_arg(node.args, env.__getitem__), map_arg(node.kwargs, env.__getitem__)
                env[node] = node.target(*args, **kwargs)
        return env

    def evaluator(self, image: fx.Node, example: Tensor) -> Callable[[fx.Node], Any]:
        """Gives the values of nodes for an image, which are computed at its first call."""
        known: dict[fx.Node, Any] = {}

        def run(node: fx.Node) -> Any:
            if not known:
                known.update(self.evaluate(image, example))
            return known[node]

        return run

    def clean(self) -> None:
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))

    def returned(self) -> fx.Node:
        return self.graph.output_node().args[0][0]  # type: ignore[index,return-value]


UPSAMPLES = {
    aten.upsample_nearest2d.vec: "nearest",
    aten.upsample_bilinear2d.vec: "bilinear",
    aten.upsample_bicubic2d.vec: "bicubic",
}


def resized(ws: Workspace, node: Any) -> tuple[fx.Node, str] | None:
    """A map and the mode in which a node resizes it, corners not aligned, by the quotient of the sizes."""
    if not isinstance(node, fx.Node) or node.target not in UPSAMPLES or node in ws.values or node.kwargs:
        return None
    x, _size, *rest = node.args
    mode = UPSAMPLES[node.target]
    factors = rest.pop() if rest else None
    if not is_map(x) or x in ws.values or (rest and rest[0]):
        return None
    # Given factors are what positions are computed with, whatever the size was rounded to.
    if factors is not None:
        sizes = zip(dims(node)[2:], dims(x)[2:], factors, strict=True)  # type: ignore[arg-type]
        if any(ratio(a, b) != f for a, b, f in sizes):
            return None
    return x, mode  # type: ignore[return-value]


def ratio(a: Any, b: Any) -> int | None:
    """a / b where that is a whole number whatever the size of the image."""
    quotient = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    return int(quotient) if quotient.is_Integer and quotient >= 1 else None


def with_channels(node: fx.Node, like: fx.Node, channels: int) -> fx.Node:
    """A new node, said to have the shape of another but for its channels."""
    value = like.meta["val"]
    node.meta["val"] = value.new_empty((value.shape[0], channels, *value.shape[2:]))
    return node


def concatenated(node: fx.Node) -> list[fx.Node] | None:
    """The maps whose channels a node concatenates; None where it does not."""
    if node.target is not aten.cat.default or node.args[1:] not in ((1,), (-3,)):
        return None
    parts: Any = node.args[0]
    return list(parts) if all(is_map(part) for part in parts) else None


def slice_of(node: fx.Node, channels: int = 1) -> tuple[fx.Node, int, int] | None:
    """A map and the range of its channels that a node is; their axis is 1, or the last of three or four."""
    rank = 4 if channels == 1 else channels + 1
    if not is_map(node, rank) or not isinstance(dims(node)[channels], int):
        return None
    here = (channels, channels - rank)
    if node.target is aten.slice.Tensor and not node.kwargs:
        defaults: list[Any] = [0, None, None, 1]
        source, axis, start, _end, step = list(node.args) + defaults[len(node.args) - 1 :]
        start = start or 0
        if axis not in here or step != 1 or not isinstance(start, int) or start < 0:
            return None
    elif node.target is operator.getitem:
        split: Any
        split, index = node.args
        if split.target not in SPLITS:
            return None
        assert isinstance(index, int)
        source, _sizes, *rest = split.args
        axis = rest[0] if rest else split.kwargs.get("dim", 0)
        parts = split.meta.get("val")
        if axis not in here or not isinstance(parts, (list, tuple)):
            return None
        widths = [p.shape[channels] for p in parts]
        if not all(isinstance(w, int) for w in widths):
            return None
        start = sum(widths[:index])
    else:
        return None
    if not is_map(source, rank) or not isinstance(dims(source)[channels], int):  # type: ignore[arg-type]
        return None
    return source, start, start + dims(node)[channels]  # type: ignore[return-value]


def location(node: fx.Node) -> str:
    """Where in the network a node comes from: the path of its module, or its line."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    path = path.removeprefix("L['self'].").removeprefix("network").removeprefix(".")
    if path:
        return path
    lines = str(node.meta.get("stack_trace") or "").strip().splitlines()
    return lines[-1].strip() if lines else ""


def getitem(source: fx.Node) -> dict[int, fx.Node]:
    """The users of a node with several results, by result."""
    return {user.args[1]: user for user in source.users if user.target is operator.getitem}  # type: ignore[misc]
