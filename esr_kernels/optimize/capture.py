"""Capture: a module as a functional ATen graph, with the values of its weights and the sizes it is good for."""

from __future__ import annotations

import functools
import itertools
import math
import re
import time
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from ..dispatch import use_backend
from ..errors import OptimizeError

# Height and width of the example that is traced: odd, unequal and large enough for enhanced spatial attention.
EXAMPLE_SIZE = (35, 41)

# Seconds of computing that a trace may take.
PATIENCE = 90.0


class CaptureError(Exception):
    """A module that cannot become a graph; the message says where it stops."""


@dataclass(frozen=True)
class Guard:
    """The images a graph is good for: branches on sizes were decided when it was traced.

    Attributes:
        shape: [N, C, H, W] with None where any size will do.
        conditions: Python expressions of batch, height and width.
        single: whether the batch must be one (True), more than one (False) or anything (None).
    """

    shape: tuple[int | None, ...]
    conditions: tuple[str, ...] = ()
    single: bool | None = None

    def __call__(self, x: Tensor) -> bool:
        if len(x.shape) != len(self.shape):
            return False
        if any(want is not None and got != want for got, want in zip(x.shape, self.shape, strict=True)):
            return False
        if self.single is not None and (x.shape[0] == 1) != self.single:
            return False
        sizes = dict(zip(_NAMES, x.shape, strict=True))
        return all(eval(_code(text), dict(SYMPY_INTERP), sizes) for text in self.conditions)

    @property
    def trivial(self) -> bool:
        """Whether it lets every image of the right number of channels through."""
        return not self.conditions and self.single is None and all(d is None for d in (self.shape[0], *self.shape[2:]))

    def without_minimum(self, network: nn.Module, example: Tensor) -> tuple[Guard, int]:
        """Without lower bounds on height and width below which the network itself fails, and the largest of them."""
        kept, minimum = [], 1
        for text in self.conditions:
            bound = _BOUND.fullmatch(text)
            if bound is not None:
                axis, least = _NAMES.index(bound[1]), int(bound[2]) + (bound[0].count("=") == 0)
                size = list(example.shape)
                size[axis] = least - 1
                try:
                    with use_backend("reference"):
                        network(example.new_zeros(size))
                except Exception:
                    minimum = max(minimum, least)
                    continue
            kept.append(text)
        return replace(self, conditions=tuple(kept)), minimum

    def __str__(self) -> str:
        words = [f"{name} {want}" for name, want in zip(_NAMES, self.shape, strict=True) if want and name != "channels"]
        if self.single is not None:
            words.append("one image at a time" if self.single else "more than one image at a time")
        return " and ".join([*words, *self.conditions]) or "any size"


_NAMES = ("batch", "channels", "height", "width")
_BOUND = re.compile(r"(height|width) >=? (\d+)")


@functools.lru_cache(maxsize=1024)
def _code(text: str) -> Any:
    return compile(text, "<guard>", "eval")


@dataclass
class Captured:
    """A functional graph: its weights are placeholders with known values.

    Attributes:
        graph: ATen and `esr` operators; the one tensor it returns is the argument of its output node.
        values: placeholder -> its value.
        image: the placeholder of the image.
        guard: the images it is good for.
    """

    graph: fx.Graph
    values: dict[fx.Node, Tensor]
    image: fx.Node
    guard: Guard
    written: dict[fx.Node, fx.Node] = field(default_factory=dict)  # placeholder -> what the forward pass writes to it


# PyTorch's own takes no symbolic size, which would fix the graph to images of one size.
torch.library.define("esr::adaptive_max_pool2d", "(Tensor x, SymInt height, SymInt width) -> Tensor")


def adaptive_max_pool2d(x: Tensor, height: int, width: int) -> Tensor:
    """What stands for the operator in a finished graph."""
    return F.adaptive_max_pool2d(x, (height, width))


torch.library.impl("esr::adaptive_max_pool2d", "CompositeExplicitAutograd", adaptive_max_pool2d)


@torch.library.register_fake("esr::adaptive_max_pool2d")
def _(x: Tensor, height: int, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-2], height, width)


torch.library.define("esr::statistic", "(Tensor x, str kind, int correction) -> Tensor")


def statistic(x: Tensor, kind: str, correction: int) -> Tensor:
    """What stands for a statistic outside of plans in a finished graph."""
    if kind == "maximum":
        return x.amax((2, 3), keepdim=True)
    if kind == "mean":
        return x.mean((2, 3), keepdim=True)
    if kind == "contrast":
        deviation, mean = torch.std_mean(x, (2, 3), correction=correction, keepdim=True)
        return deviation + mean
    variance = x.var((2, 3), correction=correction, keepdim=True)
    return variance if kind == "variance" else variance.sqrt()


torch.library.impl("esr::statistic", "CompositeExplicitAutograd", statistic)


@torch.library.register_fake("esr::statistic")
def _(x: Tensor, kind: str, correction: int) -> Tensor:
    return x.new_empty(*x.shape[:2], 1, 1)


torch.library.define("esr::inverse_root", "(Tensor x, float least) -> Tensor")


def inverse_root(x: Tensor, least: float) -> Tensor:
    """What stands outside of plans for one over the root, which is at least `least`."""
    return x.sqrt().clamp_min(least).reciprocal()


torch.library.impl("esr::inverse_root", "CompositeExplicitAutograd", inverse_root)


@torch.library.register_fake("esr::inverse_root")
def _(x: Tensor, least: float) -> Tensor:
    return torch.empty_like(x)


# PyTorch's own computes the number of channels from the sizes, which then is no number.
torch.library.define("esr::pixel_unshuffle", "(Tensor x, int factor) -> Tensor")
torch.library.impl("esr::pixel_unshuffle", "CompositeExplicitAutograd", F.pixel_unshuffle)


@torch.library.register_fake("esr::pixel_unshuffle")
def _(x: Tensor, factor: int) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty(n, c * factor**2, h // factor, w // factor)


class _TraceMode(TorchFunctionMode):
    """Follows `parameter.data = tensor`, by which published networks fold their branches in `forward`.

    torch.export does not see it. Within this mode a written tensor stands for the parameter from then on. Adaptive
    pooling to a size that depends on the image's stays so, and pixel unshuffling keeps its number of channels.

    Args:
        deadline: by `time.process_time()`, after which it gives up.
    """

    _GET, _SET = torch.Tensor.data.__get__, torch.Tensor.data.__set__  # type: ignore[attr-defined]

    def __init__(self, deadline: float) -> None:
        super().__init__()
        self._deadline = deadline
        self._written: dict[int, tuple[Tensor, Tensor]] = {}

    def _now(self, t: Tensor) -> Tensor:
        return self._written[id(t)][1] if id(t) in self._written else t

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.process_time() > self._deadline:
            raise TimeoutError("tracing takes too long: sizes are computed from sizes too often")
        if func == self._SET:
            # The parameter too: it must outlive its id.
            self._written[id(args[0])] = (args[0], self._now(args[1]))
            return None
        if func == self._GET:
            return self._now(args[0]).detach()
        if self._written:
            args, kwargs = pytree.tree_map_only(Tensor, self._now, (args, kwargs or {}))
        kwargs = kwargs or {}
        if "adaptive_max_pool2d" in getattr(func, "__name__", "") and not any(args[2:]) and len(args) > 1:
            size = args[1]
            if isinstance(size, (tuple, list)) and any(isinstance(s, torch.SymInt) for s in size):
                height, width = (args[0].shape[i - 2] if s is None else s for i, s in enumerate(size))
                return torch.ops.esr.adaptive_max_pool2d(args[0], height, width)
        name = getattr(func, "__name__", "")
        if name in _WINDOWS and (whole := _over_the_image(name, *args, **kwargs)) is not None:
            return whole
        if name == "pixel_unshuffle" and not kwargs and args[0].dim() == 4:
            return torch.ops.esr.pixel_unshuffle(*args)
        return func(*args, **kwargs)


# Pooling by windows, whose sizes PyTorch takes as numbers, and what it is of a window of the image's size.
_WINDOWS = {"avg_pool2d": "mean", "max_pool2d": "maximum"}


def _over_the_image(
    name: str,
    x: Tensor,
    kernel_size: Any = None,
    stride: Any = None,
    padding: Any = 0,
    *rest: Any,
    divisor_override: Any = None,
    **others: Any,
) -> Tensor | None:
    """A pooling, called like PyTorch's, over a window of the image's size as what it is; None where it is another."""
    if not isinstance(kernel_size, (tuple, list)) or not all(isinstance(s, torch.SymInt) for s in kernel_size):
        return None
    if [s.node.expr for s in kernel_size] != [s.node.expr if isinstance(s, torch.SymInt) else s for s in x.shape[2:]]:
        return None
    divisor = rest[2] if name == "avg_pool2d" and len(rest) > 2 else divisor_override
    if divisor is not None or padding not in (0, (0, 0), [0, 0]):
        return None
    return statistic(x, _WINDOWS[name], 0)


class _Traced(nn.Module):
    def __init__(self, network: nn.Module, deadline: float) -> None:
        super().__init__()
        self.network, self.deadline = network, deadline

    def forward(self, x: Tensor) -> Any:
        with _TraceMode(self.deadline):
            return self.network(x)


def reason(error: BaseException) -> str:
    """The first line of an error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def find_example(network: nn.Module) -> Tensor:
    """An image that the network takes: three channels, or as many as one of its convolutions does.

    Raises:
        OptimizeError: it takes none of those tried.
    """
    tensors = [*network.parameters(), *network.buffers()]
    like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    candidates = dict.fromkeys([3, *(int(t.shape[1]) for t in tensors if t.dim() == 4), 1])
    smallest = int(getattr(network, "minimum_size", 1))
    # A multiple of 64 too, for networks that cut the image into windows or halve it and do not pad.
    sizes = [(max(EXAMPLE_SIZE[0], smallest), max(EXAMPLE_SIZE[1], smallest)), (64, 128)]
    failure: Exception | None = None
    # One image last, for networks that take no more at a time.
    for batch, size, channels in itertools.product((2, 1), sizes, candidates):
        example = torch.zeros(batch, channels, *size, dtype=like.dtype, device=like.device)
        try:
            # The kernels of separate operators are not those of a plan: nothing is compiled for them.
            with torch.no_grad(), use_backend("reference"):
                network(example)
        except Exception as error:
            failure = failure or error
        else:
            return example
    raise OptimizeError(
        f"model: running it on an example [2, C, {EXAMPLE_SIZE[0]}, {EXAMPLE_SIZE[1]}] with C one of "
        f"{list(candidates)} failed: {type(failure).__name__}: {failure}; pass an example that it takes"
    ) from failure


def capture(network: nn.Module, example: Tensor, deadline: float | None = None) -> Captured:
    """Trace a network of one image with dynamic batch, height and width.

    Args:
        network: in eval mode, any module from one tensor [N, C, H, W] to one tensor.
        example: an image that it takes; a batch of one specialises the graph to single images.
        deadline: by `time.process_time()`; None: `PATIENCE` from now. Where a network derives sizes from sizes in every
            layer, their expressions grow, and with them the time that torch.export takes.

    Raises:
        CaptureError: torch.export cannot, or not in time, or the network does more than compute a tensor from a tensor.
    """
    if deadline is None:
        deadline = time.process_time() + PATIENCE
    auto = torch.export.Dim.AUTO
    dynamic = {i: auto for i in (0, 2, 3) if i < example.dim() and example.shape[i] > 1}
    try:
        with torch.no_grad():
            program = torch.export.export(
                _Traced(network, deadline), (example,), dynamic_shapes=(dynamic,), strict=False
            )
            conditions = _conditions(program)
            if not _purify(program.graph):
                # An empty table: in-place operations become pure ones, and nothing else is taken apart.
                program = program.run_decompositions({})
    except Exception as error:
        raise CaptureError(f"torch.export failed: {type(error).__name__}: {reason(error)}") from error

    nodes = {node.name: node for node in program.graph.nodes}
    values: dict[fx.Node, Tensor] = {}
    placeholder: dict[str, fx.Node] = {}
    image: fx.Node | None = None
    for spec in program.graph_signature.input_specs:
        node = nodes[spec.arg.name]  # type: ignore[union-attr]
        if spec.kind == InputKind.USER_INPUT:
            image = node
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            assert spec.target is not None
            placeholder[spec.target] = node
            state = program.state_dict
            values[node] = (state[spec.target] if spec.target in state else program.constants[spec.target]).detach()
        else:
            raise CaptureError(f"the graph has an input of kind {spec.kind.name}, {node.name}")
    assert image is not None

    output = program.graph.output_node()
    returned: list[fx.Node] = []
    written: dict[fx.Node, fx.Node] = {}
    for spec, node in zip(program.graph_signature.output_specs, output.args[0], strict=True):  # type: ignore[arg-type]
        if spec.kind == OutputKind.USER_OUTPUT:
            returned.append(node)
        elif spec.target in placeholder:
            written[placeholder[spec.target]] = node
        else:
            raise CaptureError(f"the forward pass has a side effect, {spec.kind.name}")
    call_spec = program.call_spec.out_spec
    one = call_spec is None or call_spec == pytree.tree_structure(0)
    if len(returned) != 1 or not one or not isinstance(returned[0], fx.Node):
        raise CaptureError("the model must return one tensor that depends on its input")
    output.args = ((returned[0], *written.values()),)
    shape = tuple(int(d) if isinstance(d, int) else None for d in image.meta["val"].shape)
    return Captured(program.graph, values, image, Guard(shape, conditions), written)


# Conditions that come from here are an operator's own, which it checks whenever it runs.
_OPERATORS_OWN = ("_meta_registrations.py", "/_subclasses/", "/_prims_common/", "/_refs/", "/_library/")


def _conditions(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """What the trace took for granted about the sizes, where Python code asked."""
    (image,) = (
        n.meta["val"]
        for n in program.graph.nodes
        if n.op == "placeholder" and n.name in program.graph_signature.user_inputs
    )
    symbols = {}
    for name, size in zip(_NAMES, image.shape, strict=False):
        if isinstance(size, torch.SymInt):
            symbols[size.node.expr] = sympy.Symbol(name, integer=True, positive=True)
            env = size.node.shape_env
    if not symbols:
        return ()
    code = tuple(str(g) for g in getattr(program, "_guards_code", None) or ())
    found: dict[str, None] = {}
    for guard in env.guards:
        if guard.expr.free_symbols - symbols.keys() or not all(s.is_Symbol for s in symbols):
            # A size that is a multiple of another symbol: torch.export's own text.
            for i, name in enumerate(_NAMES):
                code = tuple(text.replace(f"L['x'].size()[{i}]", name) for text in code)
            return code
        place = str(getattr(guard.sloc, "framework_loc", ""))
        if not any(part in place for part in _OPERATORS_OWN):
            found[PythonPrinter().doprint(guard.expr.xreplace(symbols))] = None
    return tuple(found)


_aten = torch.ops.aten
# Operators whose result has memory of its own and which leave that of their arguments alone.
_FRESH = {
    op
    for packet in (_aten.conv2d, _aten.convolution, _aten.batch_norm, _aten.cat, _aten.max_pool2d, _aten.avg_pool2d)
    for op in (getattr(packet, name) for name in packet.overloads())
} | {
    _aten.upsample_bilinear2d.vec,
    _aten.upsample_nearest2d.vec,
    _aten.prelu.default,
    _aten.adaptive_avg_pool2d.default,
}


def _purify(graph: fx.Graph) -> bool:
    """Make in-place operations pure where it is plain that nothing shares their memory; whether all are pure now.

    Does in a moment for the usual `ReLU(inplace=True)` what `run_decompositions` does by tracing again.
    """

    def fresh(node: fx.Node) -> bool:
        op = node.target
        if node.op != "call_function" or not isinstance(op, torch._ops.OpOverload):
            return node.op == "output"
        return op in _FRESH or torch.Tag.pointwise in op.tags or op.namespace == "esr"

    mutable = [
        n
        for n in graph.nodes
        if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable
    ]
    changes = []
    for node in mutable:
        op, changed = node.target, node.args[0] if node.args else None
        assert isinstance(op, torch._ops.OpOverload)
        name = op._schema.name.split("::")[1]
        packet = getattr(_aten, name.removesuffix("_"), None) if name.endswith("_") else None
        pure = getattr(packet, op._overloadname, None) if packet is not None else None
        if pure is None or torch.Tag.pointwise not in pure.tags or not isinstance(changed, fx.Node):
            return False
        if not fresh(changed) or not all(fresh(user) for user in (*changed.users, *node.users)):
            return False
        dtypes = {n.meta["val"].dtype for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)}
        if len(dtypes) != 1 or any(n.meta["val"].dim() > changed.meta["val"].dim() for n in node.all_input_nodes):
            return False
        changes.append((node, changed, pure))
    for node, changed, pure in changes:
        node.target = pure
        later, n = set(), node.next
        while n.op != "root":
            later.add(n)
            n = n.next
        changed.replace_all_uses_with(node, delete_user_cb=later.__contains__)
    return True


def sample_sizes(example: Tensor, smallest: int = 1) -> list[tuple[int, int, int]]:
    """(batch, height, width) of images to compare on: odd and even, wide and high, one and several, the smallest."""
    n, _, h, w = example.shape
    step = 64 if h % 64 == 0 and w % 64 == 0 else 1  # a network of windows
    sizes = [(n, h, w), (1, h, w), (2, h + 13 * step, w), (1, math.ceil(h * 0.8), w + step), (1, w + step, h)]
    sizes += [(3, smallest, smallest)]
    return list(dict.fromkeys(s for s in sizes if s[1] >= smallest and s[2] >= smallest))
