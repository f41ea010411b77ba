"""CUDA graphs of one model: which are kept, when one is captured, and the CUDA calls that takes.

A graph holds the addresses it was captured with. Inputs and outputs are its own buffers; weights and what a backend
keeps per weight (packed copies, compiled kernels) must stay where they are while the weights are unchanged. What a
backend allocates anew in every call comes from PyTorch's allocator during capture, and so belongs to the graph.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import dispatch
from .errors import OptimizeError

T = TypeVar("T")
Key = tuple[Any, ...]

# Graphs kept per device. Each has its own input and output; what lies between is shared memory.
LIMIT = 8
# Keys remembered as seen once.
_SEEN = 256
# Pixels of the largest batch that is captured unasked: a larger one keeps the GPU busy without a graph, and the memory
# between the layers, which a graph holds on to, is better left to everybody.
AUTO_PIXELS = 1 << 20
# The first run compiles and packs; the second one is like all later ones.
_WARM_UPS = 2


class Recorder(Protocol):
    """The calls to one device that `GraphCache` needs."""

    def __init__(self, device: torch.device) -> None: ...

    @staticmethod
    def takes(x: Tensor) -> bool:
        """Whether `x` is on such a device and its work is not being captured already."""

    def warm_up(self, function: Callable[[], T]) -> T:
        """Run it where captures run: on a stream of its own, after the caller's work so far and before what follows."""

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        """What replays the work of `function()`, and the tensor it returned, which every replay fills again."""

    def turn(self) -> AbstractContextManager[None]:
        """Around filling an input, the replay and copying the output: the work inside follows that of earlier turns."""


class CudaRecorder:
    """`Recorder` for a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()
            self._done = torch.cuda.Event()
        self._pool: Any = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()  # in that pool

    @staticmethod
    def takes(x: Tensor) -> bool:
        return x.is_cuda and not torch.cuda.is_current_stream_capturing()

    def warm_up(self, function: Callable[[], T]) -> T:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    return function()
            finally:
                current.wait_stream(self._stream)

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        first: BaseException | None = None
        alive = list(self._graphs)
        # The outer stream context restores the caller's stream where torch.cuda.graph fails before it does.
        with _one_capture(), torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            if not alive or self._pool is None:  # the allocator refuses a pool again whose graphs are all gone
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    try:
                        result = function()
                    except BaseException as error:
                        first = error
                        raise
            except BaseException as error:
                self._abandon(graph)
                raise first or error from None
            self._graphs.add(graph)
        return graph.replay, result

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Undo a failed capture. One that CUDA declared invalid leaves the allocator and the generator capturing."""
        try:
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        except Exception:
            return  # the capture did end, and the graph takes its memory with it
        _abandoned.append(graph)  # other captures may follow a pointer to it
        pool, self._pool, self._graphs = self._pool, None, weakref.WeakSet()
        with suppress(Exception):
            torch._C._cuda_releasePool(self._device.index, pool)
        # Until a capture succeeds, PyTorch 2.11 refuses random numbers on this device.
        with suppress(Exception):
            empty = torch.cuda.CUDAGraph()
            with torch.cuda.graph(empty, stream=self._stream, capture_error_mode="thread_local"):
                torch.zeros(1, device=self._device)

    @contextmanager
    def turn(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            # Graphs share memory, and calls of one graph its input and output. The previous turn may have been on
            # another stream of another thread, its replay still running or its output not yet copied out.
            current.wait_event(self._done)
            try:
                yield
            finally:
                self._done.record(current)
                # The graphs' memory was allocated for this stream, so it is reused in this stream's order.
                self._stream.wait_event(self._done)


_capture_lock = threading.Lock()
_abandoned: list[torch.cuda.CUDAGraph] = []


@contextmanager
def _one_capture() -> Iterator[None]:
    """PyTorch allows one capture at a time; garbage must not be collected in it, for destroying a graph breaks it."""
    with _capture_lock:
        collecting = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collecting:
                gc.enable()


@dataclass
class _Graph:
    replay: Callable[[], object]
    input: Tensor
    output: Tensor
    weights: Sequence[Tensor]  # kept, so that no other weight can get one's address and pass for it
    name: str


@dataclass
class _Device:
    recorder: Recorder
    lock: threading.Lock = field(default_factory=threading.Lock)
    signature: tuple[int, ...] = ()
    graphs: OrderedDict[Key, _Graph] = field(default_factory=OrderedDict)
    seen: OrderedDict[Key, None] = field(default_factory=OrderedDict)
    failed: dict[Key, str] = field(default_factory=dict)


class GraphCache:
    """The graphs of one function of an image and weights, the most recently used ones of each device.

    Copies and pickles of a cache are empty.

    Args:
        required: capture at the first call of a kind and raise `OptimizeError` where that fails; otherwise at the
            second call, and what fails runs without a graph.
        limit: graphs to keep per device.
    """

    def __init__(
        self,
        required: bool = False,
        limit: int = LIMIT,
        recorder: type[Recorder] = CudaRecorder,
    ) -> None:
        self.required = required
        self.limit = limit
        self._recorder = recorder
        self._lock = threading.Lock()
        self._devices: dict[torch.device, _Device] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphCache, (self.required, self.limit, self._recorder)

    def __len__(self) -> int:
        return sum(len(device.graphs) for device in list(self._devices.values()))

    def run(
        self,
        function: Callable[[Tensor], Tensor],
        x: Tensor,
        weights: Sequence[Tensor],
        *,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
        at_once: bool = False,
    ) -> Tensor | None:
        """`function(x)` from a graph in memory of its own, or None where the caller must run it.

        Args:
            function: of `x` in `dtype`, of these weights and of nothing else; always the same one.
            x: [N, C, H, W].
            weights: tensors that `function` reads. A graph is dropped when one is replaced or changed in place.
            dtype: that `x` is cast to before; the result has the dtype of `x`.
            memory_format: of the result; None: as `function` returns it.
            at_once: capture at the first call and at any size, as where graphs are required.
        """
        if not self._recorder.takes(x) or x.numel() == 0 or _is_watched(x, weights):
            return None
        device = self._device(x.device)
        backend = dispatch.chosen_backend()
        # Of the strides only what decides the layout of the result: the graph's input has them dense.
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        key = (backend, x.shape, channels_last, dtype or x.dtype, *_numerics())
        with device.lock:
            signature = _signature(weights)
            if signature is None:
                reason = "a weight was made in torch.inference_mode, so its changes cannot be seen"
                self._refuse(device, reason, ("inference",))
                return None
            if signature != device.signature:
                device.graphs.clear()
                device.seen.clear()
                device.signature = signature
            graph = device.graphs.get(key)
            if graph is None:
                if not self.required and not self._is_due(device, key, at_once):
                    return None
                graph = self._capture(device, key, function, x, weights, channels_last)
                if graph is None:
                    return None
            device.graphs.move_to_end(key)
            with device.recorder.turn():
                graph.input.copy_(x)
                graph.replay()
                return graph.output.to(x.dtype, copy=True, memory_format=memory_format or torch.preserve_format)

    def reserve(self, count: int) -> None:
        """Keep at least so many graphs per device."""
        self.limit = max(self.limit, count)

    def clear(self) -> None:
        """Drop all graphs, what was seen and what failed."""
        for device in list(self._devices.values()):
            with device.lock:
                device.graphs.clear()
                device.seen.clear()
                device.failed.clear()

    def report(self) -> list[str]:
        """One line per graph, then one per reason why there is none."""
        lines, reasons = [], []
        for device in list(self._devices.values()):
            with device.lock:
                lines += [graph.name for graph in device.graphs.values()]
                reasons += list(device.failed.values())
        return lines + list(dict.fromkeys(reasons))

    def _device(self, device: torch.device) -> _Device:
        found = self._devices.get(device)
        if found is None:
            with self._lock:
                found = self._devices.get(device)
                if found is None:
                    found = self._devices[device] = _Device(self._recorder(device))
        return found

    def _is_due(self, device: _Device, key: Key, at_once: bool) -> bool:
        if key in device.failed or key[:1] in device.failed:
            return False
        if at_once:
            return True
        shape = key[1]
        if shape[0] * shape[2] * shape[3] > AUTO_PIXELS:
            return False
        if key in device.seen:
            del device.seen[key]
            return True
        device.seen[key] = None
        if len(device.seen) > _SEEN:
            device.seen.popitem(last=False)
        return False

    def _capture(
        self,
        device: _Device,
        key: Key,
        function: Callable[[Tensor], Tensor],
        x: Tensor,
        weights: Sequence[Tensor],
        channels_last: bool,
    ) -> _Graph | None:
        dtype: torch.dtype = key[3]
        name = f"{x.device}: {list(x.shape)} {str(dtype).removeprefix('torch.')}"
        while len(device.graphs) >= self.limit:
            device.graphs.popitem(last=False)

        def prepare() -> Tensor:
            layout = torch.channels_last if channels_last else torch.contiguous_format
            static = torch.empty(x.shape, dtype=dtype, device=x.device, memory_format=layout).copy_(x)
            for _ in range(_WARM_UPS):
                function(static)
            return static

        # Buffers made in inference mode could not be written outside it.
        with torch.inference_mode(False), torch.no_grad():
            static: Tensor | None = None
            try:
                static = device.recorder.warm_up(prepare)
                replay, output = device.recorder.capture(lambda: function(static))
            except Exception as error:
                if static is None and not isinstance(error, torch.OutOfMemoryError):
                    raise  # the function's own error, as a call without a graph would raise it
                text = str(error).strip().splitlines()
                reason = f"{name} not captured: {text[0] if text else type(error).__name__}"
                # Lack of memory concerns one size; anything else would most likely stop every size.
                scope = key if isinstance(error, torch.OutOfMemoryError) else key[:1]
                self._refuse(device, reason, scope, error)
                return None
        graph = device.graphs[key] = _Graph(replay, static, output, list(weights), name)
        return graph

    def _refuse(self, device: _Device, reason: str, scope: Key, cause: Exception | None = None) -> None:
        if self.required:
            raise OptimizeError(f"cuda_graphs=True: {reason}") from cause
        device.failed[scope] = reason


# A call asks every weight: without a loop in Python that takes half the time.
_version, _requires_grad = attrgetter("_version"), attrgetter("requires_grad")


def _is_watched(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether something sees or transforms the operators of this call, which a replay would hide from it."""
    return (
        type(x) is not Tensor
        or (torch.is_grad_enabled() and (x.requires_grad or any(map(_requires_grad, weights))))
        or _get_current_dispatch_mode() is not None
        or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
        or _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def _numerics() -> Key:
    """The global settings that a captured kernel keeps."""
    return (
        torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
    )


def _signature(weights: Sequence[Tensor]) -> tuple[int, ...] | None:
    """Where the weights are and how often each was changed; None for inference tensors, which do not count."""
    try:
        return (*map(Tensor.data_ptr, weights), *map(_version, weights))
    except RuntimeError:
        if any(w.is_inference() for w in weights):
            return None
        raise
