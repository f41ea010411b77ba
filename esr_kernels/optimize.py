"""`optimize`: a finished network becomes one operator that runs a plan."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .backends import reference
from .dispatch import use_backend
from .errors import OptimizeError
from .graphs import GraphCache
from .plan import ESA_WEIGHTS, Plan, PlanBuilder
from .reparam import deploy

ops = torch.ops.esr
aten = torch.ops.aten

_COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Height and width of the example that is traced: odd, unequal and large enough for enhanced spatial attention.
_EXAMPLE_SIZE = (35, 41)


@dataclass
class Report:
    """What `optimize` did.

    Attributes:
        fused: one line per layer of the plan.
        left: one line per operation that stayed plain PyTorch, with the reason; empty when the whole network fused.
        graphs: one line per CUDA graph captured so far, and one per reason why a call that should have one has none.
    """

    fused: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    graphs: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.left:
            lines = ["not fused, the model runs as it is:", *(f"  {line}" for line in self.left)]
        else:
            lines = [f"fused into {len(self.fused)} layers, run as one operator:"]
            lines += [f"  {line}" for line in self.fused]
        if self.graphs:
            lines += ["CUDA graphs:", *(f"  {line}" for line in self.graphs)]
        return "\n".join(lines)


class OptimizedModel(nn.Module):
    """A network that runs as one registered operator, `esr::run_plan`.

    Takes [N, C, H, W] of any size the network takes, in float32, float16 or bfloat16, and returns the input's dtype.
    For inference: gradients are refused with an error.

    On a CUDA device the operator's work is replayed from a CUDA graph, as `optimize(cuda_graphs=...)` says. The result
    is always a new tensor, and any stream and any number of threads may call the model: the GPU runs their replays
    one after the other. Nothing is replayed, and the operator itself runs, on other devices, for empty batches, when
    something traces, compiles or counts the operators, and while the caller captures a graph of its own, which then
    takes in the operator's work. Moving, replacing or writing weights drops the graphs; copies and pickles have none.
    (A write through `.data` leaves no trace: with or without a graph, packed weights stay as they were.)

    Attributes:
        plan: the layers, or None when the network could not be fused and runs as it was.
        scale, data_range: the model's, where it has them.
    """

    def __init__(
        self,
        plan: Plan | None,
        weights: Sequence[Tensor],
        fallback: nn.Module | None,
        report: Report,
        *,
        dtype: torch.dtype | None,
        memory_format: torch.memory_format | None,
        cuda_graphs: str | bool,
        attributes: dict[str, Any],
    ) -> None:
        super().__init__()
        self.plan = plan
        self.fallback = fallback
        self._report = report
        self._plan_json = plan.to_json() if plan is not None else ""
        self._weight_names = [f"weight_{i}" for i in range(len(weights))]
        self._dtype = dtype
        self._memory_format = memory_format
        self._graphs: GraphCache | None = None
        if plan is not None and cuda_graphs is not False:
            self._graphs = GraphCache(required=cuda_graphs is True)
        with torch.inference_mode(False):
            for weight_name, w in zip(self._weight_names, weights, strict=True):
                # A tensor of inference mode does not count its changes, which a graph has to notice.
                self.register_buffer(weight_name, w.clone() if w.is_inference() else w)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)

    def _run(self, x: Tensor, *, at_once: bool = False) -> Tensor:
        if self.plan is None:
            assert self.fallback is not None
            y = self.fallback(x if self._dtype is None else x.to(self._dtype)).to(x.dtype)
        else:
            self._check(x)
            if not torch.compiler.is_compiling() and not torch.jit.is_tracing() and self._graphs is not None:
                replayed = self._replay(self._graphs, x, at_once)
                if replayed is not None:
                    return replayed
            inputs = [x if self._dtype is None else x.to(self._dtype)]
            weights = [getattr(self, name) for name in self._weight_names]
            run = reference.run_plan if torch.jit.is_tracing() else ops.run_plan
            y = run(inputs, weights, self._plan_json)[0].to(x.dtype)
        return y if self._memory_format is None else y.contiguous(memory_format=self._memory_format)

    def _replay(self, graphs: GraphCache, x: Tensor, at_once: bool) -> Tensor | None:
        buffers: dict[str, Any] = self._buffers  # attribute look-up in a module takes several times as long
        weights = [buffers[name] for name in self._weight_names]
        return graphs.run(
            lambda image: ops.run_plan([image], weights, self._plan_json)[0],
            x,
            weights,
            dtype=self._dtype,
            memory_format=self._memory_format,
            at_once=at_once,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizedModel:
        self.clear_graphs()
        with torch.inference_mode(False):
            return super()._apply(fn, recurse)

    def _check(self, x: Any) -> None:
        assert self.plan is not None
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
        channels = self.plan.inputs[0][0]
        if x.dim() != 4 or x.shape[1] != channels or x.shape[2] < 1 or x.shape[3] < 1:
            raise ValueError(f"x: expected shape [N, {channels}, H, W] with H, W >= 1, got {list(x.shape)}")
        if x.dtype not in (*_COMPUTE_DTYPES, torch.float64):
            raise TypeError(f"x: expected float32, float16, bfloat16 or float64, got {x.dtype}")
        smallest = getattr(self, "minimum_size", 1)
        if x.shape[2] < smallest or x.shape[3] < smallest:
            raise ValueError(
                f"x: the network needs images of at least {smallest} x {smallest} pixels, "
                f"got {x.shape[2]} x {x.shape[3]}"
            )

    def report(self) -> Report:
        """What was fused, what was not and why, and which CUDA graphs there are now."""
        return self._report if self._graphs is None else replace(self._report, graphs=self._graphs.report())

    def clear_graphs(self) -> None:
        """Drop the captured CUDA graphs and their memory, and forget failed captures."""
        if self._graphs is not None:
            self._graphs.clear()

    def warmup(self, sizes: Sequence[tuple[int, int]]) -> OptimizedModel:
        """Do all packing, compiling and buffer planning for images of these (height, width) now, outside timed code.

        On a CUDA device one CUDA graph per size is captured too, for single NCHW images and whatever their size
        (unless `cuda_graphs` is False); as many are kept from then on.
        """
        channels = 3 if self.plan is None else self.plan.inputs[0][0]
        tensors = [*self.buffers(), *self.parameters()]
        device = tensors[0].device if tensors else torch.device("cpu")
        dtype = self._dtype or (tensors[0].dtype if tensors else torch.float32)
        if self._graphs is not None:
            self._graphs.reserve(len(sizes))
        with torch.inference_mode():
            # The largest first: the graphs of the others then fit in the memory that it needs between its layers.
            for height, width in sorted(sizes, key=lambda size: -size[0] * size[1]):
                self._run(torch.zeros(1, channels, height, width, dtype=dtype, device=device), at_once=True)
        return self

    def extra_repr(self) -> str:
        return "plan=None" if self.plan is None else f"{len(self.plan.layers)} layers, x{self.plan.scale}"


def optimize(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    cuda_graphs: str | bool = "auto",
    sizes: Sequence[tuple[int, int]] = (),
) -> OptimizedModel:
    """A module that computes the same function as `model`, faster.

    The model is copied, re-parameterised layers are folded, and it is traced once with dynamic batch, height and
    width. When every operation is one that the plan knows, the network runs as a single operator on the fastest
    backend of the input's device; otherwise the copy runs as it is and `report()` says what stood in the way.

    Args:
        model: any module that takes one [N, C, H, W] tensor and returns one; it is not changed.
        dtype: float32, float16 or bfloat16 to hold weights and feature maps in (an executor may hold them in
            float32), or None for the model's own.
        memory_format: of the returned tensor; None: NCHW for images.
        cuda_graphs: whether a fused network on a CUDA device is replayed from CUDA graphs, one per size, layout and
            dtype of the input. "auto": captured by `warmup`, and when the second input of its kind comes, unless it
            has more than a million pixels; what cannot be captured runs without, and `report()` says why. True:
            captured at the first input of its kind, or an `OptimizeError` says why not. False: never. The 8 most
            recently used graphs are kept. No effect on other devices.
        sizes: (height, width) pairs to prepare for now, as `OptimizedModel.warmup`.

    Raises:
        TypeError, ValueError: an argument is not one of those named above.
        OptimizeError: the model cannot be run on an example input, or not be captured with `cuda_graphs=True`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if dtype is not None and dtype not in _COMPUTE_DTYPES:
        raise ValueError(f"dtype: expected float32, float16, bfloat16 or None, got {dtype}")
    if memory_format not in (None, torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format: expected contiguous_format, channels_last or None, got {memory_format}")
    if cuda_graphs not in ("auto", True, False):
        raise ValueError(f'cuda_graphs: expected "auto", True or False, got {cuda_graphs!r}')
    network = deploy(model).eval().requires_grad_(False)
    attributes = {
        name: getattr(model, name)
        for name in ("name", "scale", "data_range", "minimum_size", "receptive_radius")
        if hasattr(model, name)
    }
    report = Report()
    plan: Plan | None = None
    weights: list[Tensor] = []
    try:
        plan, weights = _trace(network)
        report.fused = str(plan).splitlines()[1 + len(plan.inputs) :]
    except _NotPlannableError as reason:
        report.left = [str(reason)]
    if plan is None and cuda_graphs is True:
        report.graphs = ["none: only a fused network is captured"]
    if dtype is not None:
        weights = [w.to(dtype) for w in weights]
        network = network.to(dtype)
    optimized = OptimizedModel(
        plan,
        weights,
        None if plan is not None else network,
        report,
        dtype=dtype,
        memory_format=memory_format,
        cuda_graphs=cuda_graphs if cuda_graphs == "auto" else bool(cuda_graphs),
        attributes=attributes,
    ).eval()
    return optimized.warmup(sizes)


class _NotPlannableError(Exception):
    """The traced graph has something that the plan cannot express."""


def _example(network: nn.Module) -> Tensor:
    """An input that the network takes: three channels, or as many as one of its convolutions does."""
    tensors = [*network.parameters(), *network.buffers()]
    like = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    candidates = dict.fromkeys([3, *(int(t.shape[1]) for t in tensors if t.dim() == 4), 1])
    failure: Exception | None = None
    for channels in candidates:
        example = torch.zeros(2, channels, *_EXAMPLE_SIZE, dtype=like.dtype, device=like.device)
        try:
            # The kernels of separate operators are not those of a plan: nothing is compiled for them.
            with torch.no_grad(), use_backend("reference"):
                network(example)
        except Exception as error:
            failure = failure or error
        else:
            return example
    raise OptimizeError(
        f"model: running it on an example [2, C, {_EXAMPLE_SIZE[0]}, {_EXAMPLE_SIZE[1]}] with C one of "
        f"{list(candidates)} failed: {type(failure).__name__}: {failure}"
    ) from failure


def _trace(network: nn.Module) -> tuple[Plan, list[Tensor]]:
    example = _example(network)
    auto = torch.export.Dim.AUTO
    try:
        with torch.no_grad():
            program = torch.export.export(network, (example,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    except Exception as error:
        text = str(error).strip().splitlines()
        raise _NotPlannableError(f"torch.export failed: {text[0] if text else type(error).__name__}") from error
    return _Converter(program).convert()


class _Converter:
    """Turns an exported graph into a plan, node by node."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.program = program
        self.builder = PlanBuilder()
        self.constants: dict[torch.fx.Node, Any] = {}
        self.values: dict[torch.fx.Node, int | tuple[int, ...]] = {}
        self.handlers: dict[Any, Callable[[torch.fx.Node], None]] = {
            ops.conv3x3.default: self._conv3x3,
            ops.spab.default: self._spab,
            ops.conv3x3_pixel_shuffle.default: self._tail,
            ops.conv1x1.default: self._conv1x1,
            ops.esa.default: self._esa,
            ops.bsconv.default: self._bsconv,
            operator.getitem: self._getitem,
            aten.add.Tensor: self._add,
            aten.sub.Tensor: self._sub,
            aten.mul.Tensor: self._mul,
            aten.div.Tensor: self._div,
        }
        for same in (aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default):
            self.handlers[same] = self._same
        for cast in (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten._to_copy.default, aten.type_as.default):
            self.handlers[cast] = self._cast

    def convert(self) -> tuple[Plan, list[Tensor]]:
        signature, state = self.program.graph_signature, self.program.state_dict
        lifted: dict[str, Tensor] = {}
        for name, target in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items():
            lifted[name] = state[target] if target in state else self.program.constants[target]
        for name, target in signature.inputs_to_lifted_tensor_constants.items():
            lifted[name] = self.program.constants[target]

        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in lifted:
                    self.constants[node] = lifted[node.name]
                elif self.builder.inputs:
                    raise _NotPlannableError(f"the model has a second input, {node.name}")
                else:
                    self.values[node] = self.builder.input(int(node.meta["val"].shape[1]))
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                return self._finish(node)
        raise _NotPlannableError("the traced graph has no output")

    def _call(self, node: torch.fx.Node) -> None:
        if not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            return  # sizes and assertions: the plan is for every size
        if all(n in self.constants for n in node.all_input_nodes):
            self.constants[node] = node.target(*self._resolve(node.args), **self._resolve(node.kwargs))  # type: ignore[operator]
            return
        handler = self.handlers.get(node.target)
        if handler is None:
            where = str(node.meta.get("stack_trace") or "").strip().splitlines()
            raise _NotPlannableError(
                f"{node.target} has no fused form yet" + (f" ({where[-1].strip()})" if where else "")
            )
        handler(node)

    def _finish(self, node: torch.fx.Node) -> tuple[Plan, list[Tensor]]:
        outputs = node.args[0]
        if not isinstance(outputs, (tuple, list)) or len(outputs) != 1 or outputs[0] not in self.values:
            raise _NotPlannableError("the model must return one tensor that depends on its input")
        value = self._value(outputs[0])
        if value < len(self.builder.inputs):
            raise _NotPlannableError("the model returns its input")
        weights = [w.detach() for w in self.builder.weights]
        return self.builder.finish([value]), weights

    def _resolve(self, argument: Any) -> Any:
        return torch.fx.node.map_arg(argument, lambda n: self.constants[n])

    def _value(self, node: Any) -> int:
        value = self.values.get(node)
        if not isinstance(value, int):
            raise _NotPlannableError(f"{node} is a constant where a feature map is expected")
        return value

    def _constant(self, node: Any) -> Any:
        if isinstance(node, torch.fx.Node):
            if node not in self.constants:
                raise _NotPlannableError(f"{node} is computed from the image where a weight is expected")
            return self.constants[node]
        return node

    def _add_layer(self, op: str, inputs: list[int], channels: int, weights: dict[str, Any], **attributes: Any) -> int:
        return self.builder.add(op, inputs, channels, {k: self._constant(w) for k, w in weights.items()}, **attributes)

    def _conv3x3(self, node: torch.fx.Node) -> None:
        x, weight, bias, residual, activation, slope, mode = node.args
        inputs = [self._value(x)] + ([] if residual is None else [self._value(residual)])
        self.values[node] = self._add_layer(
            "conv3x3",
            inputs,
            self._constant(weight).shape[0],
            {"weight": weight, "bias": bias},
            activation=activation,
            negative_slope=slope,
            residual_mode=mode,
        )

    def _spab(self, node: torch.fx.Node) -> None:
        x, w1, b1, w2, b2, w3, b3, _return_mid = node.args
        first = self._value(x)
        silu = {"activation": "silu", "negative_slope": 0.0, "residual_mode": "post"}
        head = {"activation": "none", "negative_slope": 0.0, "residual_mode": "attention"}
        c1, c2, c3 = (self._constant(w).shape[0] for w in (w1, w2, w3))
        mid = self._add_layer("conv3x3", [first], c1, {"weight": w1, "bias": b1}, **silu)
        y = self._add_layer("conv3x3", [mid], c2, {"weight": w2, "bias": b2}, **silu)
        y = self._add_layer("conv3x3", [y, first], c3, {"weight": w3, "bias": b3}, **head)
        self.values[node] = (y, mid)

    def _tail(self, node: torch.fx.Node) -> None:
        x, weight, bias, residual, r = node.args
        inputs = [self._value(x)] + ([] if residual is None else [self._value(residual)])
        channels = self._constant(weight).shape[0] // int(r) ** 2  # type: ignore[arg-type]
        weights = {"weight": weight, "bias": bias}
        self.values[node] = self._add_layer("conv3x3_pixel_shuffle", inputs, channels, weights, upscale_factor=r)

    def _conv1x1(self, node: torch.fx.Node) -> None:
        xs, weight, bias, activation, slope = node.args
        self.values[node] = self._add_layer(
            "conv1x1",
            [self._value(x) for x in xs],  # type: ignore[union-attr]
            self._constant(weight).shape[0],
            {"weight": weight, "bias": bias},
            activation=activation,
            negative_slope=slope,
        )

    def _esa(self, node: torch.fx.Node) -> None:
        x, *weights = node.args
        value = self._value(x)
        named = dict(zip(ESA_WEIGHTS, weights, strict=True))
        self.values[node] = self._add_layer(
            "esa",
            [value],
            self._channels(value),
            named,
            hidden=self._constant(named["w1"]).shape[0],
            has_conv_f=named["wf"] is not None,
            has_conv_max=named["w_max"] is not None,
        )

    def _bsconv(self, node: torch.fx.Node) -> None:
        x, pointwise, depthwise, bias, padding_mode, activation, slope = node.args
        self.values[node] = self._add_layer(
            "bsconv",
            [self._value(x)],
            self._constant(depthwise).shape[0],
            {"pointwise": pointwise, "depthwise": depthwise, "bias": bias},
            padding_mode=padding_mode,
            activation=activation,
            negative_slope=slope,
        )

    def _getitem(self, node: torch.fx.Node) -> None:
        source, index = node.args
        values = self.values[source]  # type: ignore[index]
        assert isinstance(values, tuple) and isinstance(index, int)
        self.values[node] = values[index]

    def _same(self, node: torch.fx.Node) -> None:
        self.values[node] = self._value(node.args[0])

    def _cast(self, node: torch.fx.Node) -> None:
        source = node.args[0]
        if node.meta["val"].dtype != source.meta["val"].dtype:  # type: ignore[union-attr]
            raise _NotPlannableError(f"{node.target} changes the dtype inside the network")
        self.values[node] = self._value(source)

    def _add(self, node: torch.fx.Node) -> None:
        a, b = node.args
        if node.kwargs.get("alpha", 1) != 1:
            raise _NotPlannableError("aten.add with alpha has no fused form yet")
        if a in self.values and b in self.values:
            if a.meta["val"].shape != b.meta["val"].shape:  # type: ignore[union-attr]
                raise _NotPlannableError("aten.add broadcasts feature maps")
            first, second = self._value(a), self._value(b)
            self.values[node] = self.builder.add("add", [first, second], self._channels(first))
        else:
            x, c = (a, b) if a in self.values else (b, a)
            self._normalize(node, x, shift=self._constant(c), sign=-1.0)

    def _sub(self, node: torch.fx.Node) -> None:
        a, b = node.args
        if a not in self.values or b in self.values or node.kwargs.get("alpha", 1) != 1:
            raise _NotPlannableError("aten.sub of feature maps has no fused form yet")
        self._normalize(node, a, shift=self._constant(b))

    def _mul(self, node: torch.fx.Node) -> None:
        a, b = node.args
        if a in self.values and b in self.values:
            raise _NotPlannableError("aten.mul of feature maps has no fused form yet")
        x, c = (a, b) if a in self.values else (b, a)
        self._normalize(node, x, scale=self._constant(c))

    def _div(self, node: torch.fx.Node) -> None:
        a, b = node.args
        if a not in self.values or b in self.values:
            raise _NotPlannableError("aten.div of feature maps has no fused form yet")
        divisor = self._constant(b)
        self._normalize(node, a, scale=1.0 / divisor)

    def _channels(self, value: int) -> int:
        inputs = self.builder.inputs
        return inputs[value][0] if value < len(inputs) else self.builder.layers[value - len(inputs)].channels

    def _normalize(self, node: torch.fx.Node, x: Any, shift: Any = 0.0, scale: Any = 1.0, sign: float = 1.0) -> None:
        """A layer (x - shift) * scale with one number per channel, merged into one that comes just before it."""
        value = self._value(x)
        channels = self._channels(value)
        shifts = [sign * s for s in self._per_channel(shift, channels)]
        scales = self._per_channel(scale, channels)
        layers = self.builder.layers
        k = value - len(self.builder.inputs)
        if k >= 0 and k == len(layers) - 1 and layers[k].op == "normalize" and len(x.users) == 1:
            before = layers[k]
            s1, k1 = before.attributes["shift"], before.attributes["scale"]
            if all(k1):  # ((x - s1) k1 - s2) k2 = (x - (s1 + s2 / k1)) k1 k2
                layers.pop()
                value = before.inputs[0]
                shifts = [a + b / c for a, b, c in zip(s1, shifts, k1, strict=True)]
                scales = [a * b for a, b in zip(k1, scales, strict=True)]
        self.values[node] = self.builder.add("normalize", [value], channels, shift=shifts, scale=scales)

    @staticmethod
    def _per_channel(constant: Any, channels: int) -> list[float]:
        if not isinstance(constant, Tensor):
            return [float(constant)] * channels
        if constant.numel() == 1:
            return [float(constant)] * channels
        if constant.numel() != channels or constant.dim() < 3 or constant.shape[-3] != channels:
            raise _NotPlannableError(f"a constant of shape {list(constant.shape)} is not one number per channel")
        return [float(v) for v in constant.flatten()]
