"""`torch.compile(model, backend="esr")`: the same pass for what Dynamo captures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import OptimizeError
from .model import OptimizedModel, optimize

log = logging.getLogger("esr_kernels")


def esr(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Backend of `torch.compile` for inference, found by PyTorch under the name "esr".

    Graphs from one [N, C, H, W] tensor to one tensor are optimised when they first run, and again when weights have
    changed. Others, and every call that needs gradients, run as they are. What was done is logged under "esr_kernels"
    at level INFO.
    """
    return _Compiled(graph)


class _Bound(nn.Module):
    """A captured graph as a function of its image: weights are parameters, sizes are read off the image."""

    def __init__(self, graph: fx.GraphModule, weights: dict[int, Tensor], image: int, sizes: dict[int, int]) -> None:
        super().__init__()
        self.graph_module = graph
        self._image, self._sizes, self._names = image, sizes, {i: f"weight_{i}" for i in weights}
        for i, w in weights.items():
            self.register_buffer(self._names[i], w.detach())

    def forward(self, x: Tensor) -> Tensor:
        args: dict[int, Any] = {self._image: x}
        args |= {i: x.shape[axis] for i, axis in self._sizes.items()}
        args |= {i: getattr(self, name) for i, name in self._names.items()}
        (result,) = self.graph_module(*(args[i] for i in range(len(args))))
        return result


class _Compiled:
    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        self._signature: tuple[Any, ...] | None = None
        self._fast: OptimizedModel | None = None
        placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
        values = [n.meta.get("example_value") for n in placeholders]
        static = "_dynamo_static_input_type"
        self._weights = [
            i
            for i, (n, v) in enumerate(zip(placeholders, values, strict=True))
            if isinstance(v, nn.Parameter) or static in (n.meta.get("tensor_dict") or {})
        ]
        others = [i for i in range(len(values)) if i not in self._weights]
        images = [i for i in others if isinstance(values[i], Tensor)]
        self._image = images[0] if len(images) == 1 and values[images[0]].dim() == 4 else None
        self._sizes: dict[int, int] = {}
        outputs: Any = graph.graph.output_node().args[0]
        if len(outputs) != 1:
            self._image = None
        for i in others:
            if self._image is None or i == self._image:
                continue
            # Dynamo passes the sizes of the image beside it.
            shape = [d.node.expr if isinstance(d, torch.SymInt) else d for d in values[self._image].shape]
            size = values[i].node.expr if isinstance(values[i], torch.SymInt) else None
            if size in shape:
                self._sizes[i] = shape.index(size)
            else:
                self._image = None

    def __call__(self, *args: Any) -> Any:
        trains = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if self._image is None or trains:
            return self.graph(*args)
        weights = {i: args[i] for i in self._weights}
        signature = tuple((w.data_ptr(), 0 if w.is_inference() else w._version) for w in weights.values())
        if signature != self._signature:
            self._signature = signature
            try:
                bound = _Bound(self.graph, weights, self._image, self._sizes)
                self._fast = optimize(bound, example=args[self._image].detach().clone())
                log.info("torch.compile: %s", self._fast.report())
            except OptimizeError as error:
                self._fast = None
                log.info("torch.compile: runs as it is: %s", error)
        return self.graph(*args) if self._fast is None else (self._fast(args[self._image]),)
