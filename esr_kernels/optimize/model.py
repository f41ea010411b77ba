"""`optimize`: any network, faster, or as it was."""

from __future__ import annotations

import copy
import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from .. import cases
from ..backends import reference
from ..dispatch import chosen_backend, compiles, use_backend
from ..errors import BackendError, OptimizeError
from ..functional import ESA_MINIMUM, decomposes
from ..graphs import GraphCache
from ..plan import Plan
from ..reparam import deploy
from .capture import PATIENCE, CaptureError, Guard, capture, find_example, reason, sample_sizes
from .channels import canonicalize_channels
from .lower import Lowered, lower
from .patterns import match
from .report import Report
from .simplify import canonicalize, channels_first, merge_linear, recognize_shuffles, unit_lengths
from .statistics import local_variances, recognize_statistics
from .workspace import Workspace

ops = torch.ops.esr
aten = torch.ops.aten

_COMPUTE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of a graph in float64 with its weights rounded to float32, relative to the largest value.
_ALGEBRA_TOLERANCE = 1e-5
# Factors that a float16 weight takes in without leaving its normal range.
_FLOAT16_FACTOR = 16.0
# Image sizes to remember the guard's answer for.
_SIZES = 256
# Relative error from which on plain PyTorch in a half type is no measure.
_BROKEN = 0.1
# Operations of at least this part of the arithmetic are hot.
_HOT_SHARE = 0.01
# A module of a network that is taken module by module stays plain below this: the conversions would cost more.
_LEAST_SHARE = 0.1


class Program(nn.Module):
    """A network as a graph of plans and plain operations, with the network itself for sizes it is not good for."""

    def __init__(self, body: fx.GraphModule, guard: Guard, original: nn.Module | None) -> None:
        super().__init__()
        self.body, self.guard = body, guard
        self.original = None if guard.trivial else original
        self._takes: dict[tuple[int, ...], bool] = {}

    def _is_taken(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.guard(x)
        key = tuple(x.shape)
        if key not in self._takes:
            if len(self._takes) > _SIZES:
                self._takes.clear()
            self._takes[key] = self.guard(x)
        return self._takes[key]

    def forward(self, x: Tensor) -> Tensor:
        if self.original is not None and not self._is_taken(x):
            return self.original(x)
        if decomposes():
            return _Decomposing(self.body).run(x)
        return self.body(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Program:
        super()._apply(fn, recurse)
        tensor = next(iter([*self.body.parameters(), *self.body.buffers()]), None)
        if tensor is not None:  # tensors made on the way, such as coordinates
            for node in self.body.graph.nodes:
                if "device" in node.kwargs and node.kwargs["device"] is not None:
                    node.kwargs = {**node.kwargs, "device": tensor.device}
            self.body.recompile()
        return self


class _Decomposing(fx.Interpreter):
    """Runs a graph with every `esr` operator taken apart into plain PyTorch."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "namespace", None) == "esr":
            target = reference.OPERATORS[target._schema.name.split("::")[1]]
        return super().call_function(target, args, kwargs)


class OptimizedModel(nn.Module):
    """A network that runs as one registered operator, `esr::run_plan`, or as several with plain PyTorch between them.

    Takes [N, C, H, W] of any size the network takes, in float32, float16 or bfloat16, and returns the input's dtype.
    For inference: gradients are refused with an error.

    On a CUDA device the operator's work is replayed from a CUDA graph, as `optimize(cuda_graphs=...)` says. The result
    is always a new tensor, and any stream and any number of threads may call the model: the GPU runs their replays
    one after the other. Nothing is replayed, and the operator itself runs, on other devices, for empty batches, when
    something traces, compiles or counts the operators, and while the caller captures a graph of its own, which then
    takes in the operator's work. Moving, replacing or writing weights drops the graphs; copies and pickles have none.
    (A write through `.data` leaves no trace: with or without a graph, packed weights stay as they were.)

    Attributes:
        plan: the layers, or None when the network is not one plan.
        shuffle, clip: by how much the plan's result is shuffled at the end, and the bounds to which it is clamped then;
            None where the plan returns the image as it is to be.
        fallback: what runs when it is not: a `Program`, or the network as it was, or with some of its modules replaced.
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
        shuffle: int | None = None,
        clip: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self.plan, self.shuffle, self.clip = plan, shuffle, clip
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
                weight = nn.Parameter(w.clone() if w.is_inference() else w, requires_grad=False)
                self.register_parameter(weight_name, weight)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)

    def _run(self, x: Tensor, *, at_once: bool = False, replay: bool = True) -> Tensor:
        if self.plan is None:
            assert self.fallback is not None
            y = self.fallback(x if self._dtype is None else x.to(self._dtype)).to(x.dtype)
        else:
            self._check(x)
            replay = replay and not torch.compiler.is_compiling() and not torch.jit.is_tracing()
            if replay and self._graphs is not None:
                replayed = self._replay(self._graphs, x, at_once)
                if replayed is not None:
                    return replayed
            inputs = [x if self._dtype is None else x.to(self._dtype)]
            weights = [getattr(self, name) for name in self._weight_names]
            run = reference.run_plan if decomposes() else ops.run_plan
            y = self._finished(run(inputs, weights, self._plan_json)[0]).to(x.dtype)
        return y if self._memory_format is None else y.contiguous(memory_format=self._memory_format)

    def _finished(self, y: Tensor) -> Tensor:
        """The image, from what the plan returns."""
        if self.shuffle is not None:
            y = F.pixel_shuffle(y, self.shuffle)
        return y if self.clip is None else y.clamp_(*self.clip)

    def _replay(self, graphs: GraphCache, x: Tensor, at_once: bool) -> Tensor | None:
        parameters: dict[str, Any] = self._parameters  # attribute look-up in a module takes several times as long
        weights = [parameters[name] for name in self._weight_names]
        return graphs.run(
            lambda image: self._finished(ops.run_plan([image], weights, self._plan_json)[0]),
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
        (unless `cuda_graphs` is False); as many are kept from then on. Where kernels are compiled for the layout of
        their tensors, those for NCHW and channels_last images are, at addresses aligned to 16 bytes and at others.
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
                shape = (1, channels, height, width)
                self._run(torch.zeros(shape, dtype=dtype, device=device), at_once=True)
                if compiles("run_plan", device.type, dtype):
                    for image in _other_layouts(shape, dtype, device):
                        self._run(image, replay=False)
        return self

    def extra_repr(self) -> str:
        return "plan=None" if self.plan is None else f"{len(self.plan.layers)} layers, x{self.plan.scale}"


def _other_layouts(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Zeros in the layouts that kernels are compiled for, apart from NCHW at an aligned address."""
    n, c, h, w = shape
    for strides in ((c * h * w, h * w, w, 1), (h * w * c, 1, w * c, c)):
        for offset in (0, 1):
            if offset or strides[1] == 1:
                memory = torch.zeros(n * c * h * w + offset, dtype=dtype, device=device)
                yield memory.as_strided(shape, strides, offset)


def optimize(
    model: nn.Module,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    cuda_graphs: str | bool = "auto",
    sizes: Sequence[tuple[int, int]] = (),
    *,
    example: Tensor | None = None,
    strict: bool = False,
) -> OptimizedModel:
    """A module that computes the same function as `model`, faster.

    The model is copied, re-parameterised layers are folded, and it is traced once with dynamic batch, height and
    width. What amounts to a fused operator becomes one, however it is written, and runs on the fastest backend of the
    input's device; what does not stays as it is, and `report()` says what and why. A network that cannot be traced as a
    whole is taken module by module. The result is compared with the model on sample images of several sizes before it
    is returned; where it differs, the copy runs as it is.

    Args:
        model: any module that takes one [N, C, H, W] tensor and returns one; it is not changed.
        dtype: float32, float16 or bfloat16 to hold weights and feature maps in (an executor may hold them in
            float32), or None for the model's own. A network that this takes outside the numerical contract keeps
            parts, or all, in float32; `report()` says so.
        memory_format: of the returned tensor; None: NCHW for images.
        cuda_graphs: whether a fused network on a CUDA device is replayed from CUDA graphs, one per size, layout and
            dtype of the input. "auto": captured by `warmup`, and when the second input of its kind comes, unless it
            has more than a million pixels; what cannot be captured runs without, and `report()` says why. True:
            captured at the first input of its kind, or an `OptimizeError` says why not. False: never. The 8 most
            recently used graphs are kept. No effect on other devices.
        sizes: (height, width) pairs to prepare for now, as `OptimizedModel.warmup`.
        example: an image [N, C, H, W] that the model takes, for networks that do not take [2, 3, 35, 41] or
            [2, 3, 64, 128]; values in its range make the comparison meaningful. A batch of 2 or more is best.
        strict: whether to raise where an operation with at least 1% of the arithmetic stayed plain PyTorch.

    Raises:
        TypeError, ValueError: an argument is not one of those named above.
        OptimizeError: the model cannot be run on an example input, or not be captured with `cuda_graphs=True`, or not
            be fused with `strict=True`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if dtype is not None and dtype not in _COMPUTE_DTYPES:
        raise ValueError(f"dtype: expected float32, float16, bfloat16 or None, got {dtype}")
    if memory_format not in (None, torch.contiguous_format, torch.channels_last):
        raise ValueError(f"memory_format: expected contiguous_format, channels_last or None, got {memory_format}")
    if cuda_graphs not in ("auto", True, False):
        raise ValueError(f'cuda_graphs: expected "auto", True or False, got {cuda_graphs!r}')
    if example is not None and not isinstance(example, Tensor):
        raise TypeError(f"example: expected a torch.Tensor or None, got {type(example).__name__}")
    if example is not None and (example.dim() != 4 or 0 in example.shape or not example.is_floating_point()):
        raise ValueError(
            f"example: expected a floating-point image [N, C, H, W], got {example.dtype} {list(example.shape)}"
        )
    network = deploy(model).requires_grad_(False)
    # Some networks fold their branches whenever `eval` is called: not again, as the caller's does not either.
    if any(module.training for module in network.modules()):
        network.eval()
    attributes = {
        name: getattr(model, name)
        for name in ("name", "scale", "data_range", "minimum_size", "receptive_radius")
        if hasattr(model, name)
    }
    with torch.inference_mode(False), torch.no_grad():
        found = _Optimizer(network, find_example(network) if example is None else example, dtype).run()
    report = found.report
    if strict and found.plain:
        raise OptimizeError(f"strict=True: operations stayed plain PyTorch: {'; '.join(found.plain)}\n{report}")
    if found.plan is None and cuda_graphs is True:
        report.graphs = ["none: only a fused network is captured"]
    if found.plan is not None:
        attention = any(layer.op == "esa" for layer in found.plan.layers)
        pooled = max(s.denominator for s in found.plan.scales)
        smallest = max(found.minimum, ESA_MINIMUM if attention else 1, pooled)
        if smallest > 1:
            attributes.setdefault("minimum_size", smallest)
    optimized = OptimizedModel(
        found.plan,
        found.weights,
        found.module,
        report,
        dtype=found.dtype,
        memory_format=memory_format,
        cuda_graphs=cuda_graphs if cuda_graphs == "auto" else bool(cuda_graphs),
        attributes=attributes,
        shuffle=found.shuffle,
        clip=found.clip,
    ).eval()
    return optimized.warmup(sizes)


def build(
    network: nn.Module, example: Tensor, scale_limit: float | None = None, deadline: float | None = None
) -> tuple[Lowered, Guard, int]:
    """Capture, simplify, match and lower a network; also the smallest height and width that it takes.

    Args: as of `capture`, and `scale_limit` of `match`.

    Raises:
        CaptureError: it cannot be captured, or its graph not be rewritten.
    """
    captured = capture(network, example, deadline)
    ws = Workspace(captured.graph, captured.values)
    for target, value in captured.written.items():
        if value not in ws.values or _reads(value, target):
            raise CaptureError(f"the forward pass changes {target.name}, which later passes read")
    try:
        rewrite(ws, captured.image, example, scale_limit)
        lowered = lower(ws, captured.image)
    except Exception as error:  # a network of a kind that no rewrite foresaw still runs as it was
        raise CaptureError(f"its graph cannot be rewritten ({type(error).__name__}: {reason(error)})") from error
    return lowered, *captured.guard.without_minimum(network, example)


def _reads(node: fx.Node, source: fx.Node) -> bool:
    """Whether a value is computed from a placeholder."""
    seen, pending = set(), [node]
    while pending:
        n = pending.pop()
        if n is source:
            return True
        if n not in seen:
            seen.add(n)
            pending += n.all_input_nodes
    return False


def rewrite(ws: Workspace, image: fx.Node, example: Tensor, scale_limit: float | None) -> None:
    """All rewrites of a captured graph, in order."""
    output = ws.graph.output_node()
    output.args = ((output.args[0][0],),)  # type: ignore[index]
    canonicalize(ws)
    channels_first(ws)
    recognize_shuffles(ws, image, example)
    local_variances(ws)
    recognize_statistics(ws, scale_limit)
    canonicalize_channels(ws, image, example)
    if scale_limit is None:
        unit_lengths(ws)
    merge_linear(ws, scale_limit)
    match(ws, scale_limit)


class _Optimizer:
    """The steps of `optimize` for one network, and their result."""

    def __init__(self, network: nn.Module, example: Tensor, dtype: torch.dtype | None) -> None:
        self.network, self.example = network, example
        self.dtype: torch.dtype | None = dtype
        self.report = Report()
        self.plan: Plan | None = None
        self.weights: list[Tensor] = []
        self.shuffle: int | None = None
        self.clip: tuple[float, float] | None = None
        self.module: nn.Module | None = None
        self.minimum = 1
        self.plain: list[str] = []  # what is hot and not fused
        self._scale_limit = _FLOAT16_FACTOR if dtype == torch.float16 else None
        self._samples = self._images()

    def run(self) -> _Optimizer:
        candidate: nn.Module | None = None
        lowered: Lowered | None = None
        example = self.example
        for example in (self.example, self.example[:1]):
            try:
                lowered, guard, self.minimum = build(self.network, example, self._scale_limit)
            except CaptureError as error:
                self.report.left.append(f"the whole network: {error}")
                break
            if not lowered.fused:
                self.report.left = lowered.left
                return self._as_it_was([])
            candidate = Program(lowered.module, guard, self.network)
            wrong = self._compare(candidate)
            if not wrong:
                break
            # A branch on the size of the batch: the graph for several images is not that for one.
            if example.shape[0] == 1 or any(n > 1 for n, _ in wrong):
                return self._as_it_was(self._refuse("differs from the original: " + "; ".join(t for _, t in wrong)))
        if candidate is None or lowered is None:
            candidate = self._by_module()
            if candidate is None:
                return self._as_it_was([])
        else:
            self.report.fused, self.report.left = lowered.fused, lowered.left
            if not guard.trivial:
                note = f"fused for {guard}; other images run through the network as it was"
                self.report.notes.append(note)
            if lowered.plan is not None and guard.trivial:
                self.plan, self.weights = lowered.plan, lowered.weights
                self.shuffle, self.clip = lowered.shuffle, lowered.clip
                self.report.whole = True
                if self.shuffle is not None:
                    self.report.notes.append(f"pixel shuffle by {self.shuffle} behind the plan")
                if self.clip is not None:
                    self.report.notes.append(f"clamped in place behind the plan: {self.clip[0]:g} to {self.clip[1]:g}")
        self.module = candidate
        self._count(candidate)
        self._convert()
        if self.plan is not None:
            self.module = None
        return self

    def _as_it_was(self, left: list[str]) -> _Optimizer:
        self.report.fused = []
        self.report.left += left
        self.report.share = 0.0
        self.plain = self.report.left
        self.module = self.network if self.dtype is None else self.network.to(self.dtype)
        return self

    # --- comparison

    def _refuse(self, difference: str) -> list[str]:
        """Note that what was fused is wrong; returns why it is left as it was."""
        self.report.wrong.append(difference)
        return [difference]

    def _images(self) -> list[Tensor]:
        """Sample images in the range of the model's data; the first is of the size of the example."""
        peak = float(getattr(self.network, "data_range", 1.0))
        given = bool(self.example.any())
        generator = torch.Generator().manual_seed(0)
        images = []
        smallest = int(getattr(self.network, "minimum_size", 1))
        for n, h, w in sample_sizes(self.example, smallest):
            x = cases.sample_image(n, self.example.shape[1], h, w, generator) * peak
            images.append(x.to(self.example))
        return [self.example, *images] if given else images

    def _compare(self, candidate: nn.Module) -> list[tuple[int, str]]:
        """Batch size and description of every sample on which the candidate differs from the network."""
        exact = _in(self.network, torch.float64)
        ours = _in(candidate, torch.float64)
        wrong = []
        self.report.samples = []
        largest = 0.0
        for x in self._samples:
            name = "x".join(map(str, x.shape))
            try:
                with use_backend("reference"):
                    plain = self.network(x)
            except Exception:
                continue  # a size that the network does not take
            with use_backend("reference"):
                try:
                    wanted, got = exact(x.double()), ours(x.double())
                    noise = cases.relative_error(plain, cases.double(wanted))
                except Exception:
                    # A network that fixes its dtype.
                    wanted, noise = plain, _ALGEBRA_TOLERANCE
                    try:
                        got = candidate(x)
                    except Exception as error:
                        wrong.append((int(x.shape[0]), f"[{name}] fails: {reason(error)}"))
                        continue
            if not bool(torch.isfinite(wanted).all()):
                continue
            tolerance = max(_ALGEBRA_TOLERANCE, 4 * noise if math.isfinite(noise) else 0.0)
            check = cases.compare(got, cases.double(wanted), tolerance)
            self.report.samples.append((int(x.shape[0]), int(x.shape[2]), int(x.shape[3])))
            largest = max(largest, check.relative)
            if not check.ok:
                wrong.append((int(x.shape[0]), f"[{name}] {check}"))
        self.report.exact_difference = largest
        return wrong

    def _count(self, candidate: nn.Module) -> None:
        """The fused part of the arithmetic, and what of the rest is hot."""
        plain = _plain_shares(candidate, self.example)
        if plain is None:
            return
        self.report.share = 1 - sum(plain.values())
        hot = [f"{op} {share:.1%}" for op, share in plain.items() if share >= _HOT_SHARE]
        self.plain = [*hot, *self.report.left] if hot else []

    # --- module by module

    def _by_module(self) -> nn.Module | None:
        """A copy of the network with the modules replaced that can be captured by themselves."""
        network = copy.deepcopy(self.network)
        calls = _record(network, self.example)
        done: dict[nn.Module, nn.Module] = {}
        names: list[str] = []
        left: dict[str, list[str]] = {}  # what stayed plain, and in which modules
        little = f"less than {_LEAST_SHARE:.0%} of its arithmetic has a fused form"
        not_worth: set[tuple[Any, ...]] = set()  # kinds of modules for which that holds: tracing them takes long
        deadline = time.process_time() + PATIENCE

        def visit(parent: nn.Module, path: str) -> None:
            for name, child in list(parent.named_children()):
                full = f"{path}.{name}" if path else name
                if child in done:
                    parent.register_module(name, done[child])
                    continue
                x = calls.get(child)
                kind = (type(child), *((key, p.shape) for key, p in child.named_parameters()))
                if x is not None and kind in not_worth:
                    left[little].append(full)
                    continue
                if x is not None:
                    try:
                        lowered, guard, _minimum = build(child, x, self._scale_limit, deadline)
                    except CaptureError as error:
                        self.report.left.append(f"{full}: {error}")
                    else:
                        lines = lowered.left
                        if lowered.fused:
                            program = Program(lowered.module, guard, child)
                            plain = _plain_shares(program, x) or {}
                            if sum(plain.values()) <= 1 - _LEAST_SHARE:
                                done[child] = program
                                parent.register_module(name, program)
                                names.append(full)
                                self.report.fused += [f"{full}: {line}" for line in lowered.fused]
                            else:
                                not_worth.add(kind)
                                lines = [little]
                        for line in lines:
                            left.setdefault(line, []).append(full)
                        continue
                visit(child, full)

        visit(network, "")
        for line, where in left.items():
            self.report.left.append(f"{where[0]}{f' and {len(where) - 1} more' if where[1:] else ''}: {line}")
        if not names:
            return None
        self.report.notes.append(f"captured module by module: {', '.join(names)}")
        wrong = self._compare(network)
        if wrong:
            self.report.fused = []
            self.report.left += self._refuse("module by module it differs: " + "; ".join(text for _, text in wrong))
            return None
        return network

    # --- dtype

    def _convert(self) -> None:
        """Take the result to `dtype`, with float32 where that would break the contract, and check what will run."""
        assert self.module is not None
        x = next((s for s in self._samples[:1]), self.example)
        dtype = self.dtype or x.dtype
        if self.dtype is None or self.dtype == torch.float32:
            self.weights = [w.to(dtype) for w in self.weights]
            self.module = self.module.to(dtype)
            if dtype == torch.float32 and not self._is_close(self.module, x, dtype):
                self._as_it_was(
                    self._refuse(f"on the sample image {list(x.shape)} the kernels differ from the original")
                )
                self.plan, self.shuffle, self.clip, self.weights, self.report.whole = None, None, None, [], False
            return
        half = _in(self.module, dtype)
        if self._is_close(half, x, dtype):
            self.module = half
            self.weights = [w.to(dtype) for w in self.weights]
            return
        name = str(dtype).removeprefix("torch.")
        if self.plan is None:
            islands = _with_islands(self.module, dtype)
            if islands is not None and self._is_close(islands[0], x, dtype):
                self.module = islands[0]
                self.report.notes.append(f"float32 inside {name}: {', '.join(islands[1])}")
                return
        self.dtype = torch.float32
        self.module = self.module.float()
        self.report.notes.append(f"in float32 throughout: {name} is outside the numerical contract on a sample image")

    def _is_close(self, module: nn.Module, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether a module keeps the contract of networks on one image, on the backend that will run it."""
        x = x.to(dtype)
        try:
            with use_backend("reference"):
                exact = cases.double(_in(self.network, torch.float64)(x.double()))
                error = 0.0
                if dtype != torch.float32:
                    twin = _in(self.network, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
                    error = cases.relative_error(twin(x.contiguous(memory_format=torch.channels_last)), exact)
                    if error > _BROKEN:
                        error = math.inf  # no measure
        except Exception:
            return True  # no measure
        # A chosen backend may be an interpreter or an emulator, which take minutes.
        backend = "reference" if chosen_backend() is not None else None
        try:
            if backend is None:
                result = module(x)
            else:
                with use_backend(backend):
                    result = module(x)
        except BackendError:
            return True
        except Exception as failure:
            self.report.notes.append(f"{str(dtype).removeprefix('torch.')} fails: {reason(failure)}")
            return False
        check = cases.compare(result, exact, cases.network_tolerance(dtype, error))
        self.report.difference, self.report.tolerance = check.relative, check.tolerance
        return check.ok


def _plain_shares(module: nn.Module, x: Tensor) -> dict[str, float] | None:
    """Plain operator -> its part of the arithmetic of a call; None where nothing is counted."""
    with FlopCounterMode(display=False) as counter, use_backend("reference"):
        module(x)
    counts = {str(op): flops for op, flops in counter.get_flop_counts().get("Global", {}).items()}
    total = sum(counts.values())
    return {op: flops / total for op, flops in counts.items() if not op.startswith("esr")} if total else None


def _in(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a module in another dtype."""
    return copy.deepcopy(module).to(dtype)


def _record(network: nn.Module, example: Tensor) -> dict[nn.Module, Tensor]:
    """Module -> the image it was called with, for modules from one tensor of four dimensions to another."""
    calls: dict[nn.Module, Tensor] = {}
    excluded: set[nn.Module] = set()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        x = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(x, Tensor) and x.dim() == 4 and isinstance(output, Tensor) and x.is_floating_point():
            calls.setdefault(module, x.detach().clone())
        else:
            excluded.add(module)

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in network.modules() if m is not network]
    try:
        with use_backend("reference"):
            network(example)
    finally:
        for handle in handles:
            handle.remove()
    return {m: x for m, x in calls.items() if m not in excluded}


# Sums and exponentials of many values, which half types round or overflow first.
_SENSITIVE = ("norm", "softmax", "mean", "sum", "var", "std", "exp", "pow", "rsqrt", "sqrt", "matmul", "bmm", "linalg")


def _with_islands(module: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, list[str]] | None:
    """A copy in a half type whose sensitive operations run in float32, and their names."""
    result = copy.deepcopy(module)
    names: dict[str, None] = {}
    for program in [m for m in result.modules() if isinstance(m, Program)]:
        graph = program.body.graph
        sensitive = [
            n
            for n in graph.nodes
            if n.op == "call_function"
            and getattr(n.target, "namespace", "") == "aten"
            and any(word in n.target._schema.name for word in _SENSITIVE)  # type: ignore[union-attr]
        ]
        for node in sensitive:
            names[str(node.target)] = None
            with graph.inserting_before(node):
                wide = {n: _cast(graph, n, torch.float32) for n in node.all_input_nodes}
            node.args = fx.node.map_arg(node.args, wide.__getitem__)
            node.kwargs = fx.node.map_arg(node.kwargs, wide.__getitem__)
            parts = [n for n in node.users if n.target is operator.getitem]
            for part in parts or [node]:
                with graph.inserting_after(part):
                    narrow = graph.call_function(aten._to_copy.default, (part,), {"dtype": dtype})
                part.replace_all_uses_with(narrow, delete_user_cb=narrow.__ne__)
        program.body.recompile()
    return (result.to(dtype), list(names)) if names else None


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The node in another dtype, if it is a floating-point tensor."""
    if node.op == "call_function" and not node.meta.get("floating", False):
        return node
    return graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
