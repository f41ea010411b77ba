"""A plan, layer by layer: how the executors of the other backends are checked."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...library import memory_format
from ._common import apply, upcast
from .adaptive_max_pool import adaptive_max_pool
from .bsconv import bsconv
from .conv1x1 import conv1x1
from .conv3x3 import conv3x3
from .conv3x3_pixel_shuffle import conv3x3_pixel_shuffle
from .depthwise_conv import depthwise_conv
from .esa import esa
from .layer_norm2d import layer_norm2d
from .modulate import modulate
from .statistic import statistic


@lru_cache(maxsize=64)
def _parse(plan: str) -> dict[str, Any]:
    return json.loads(plan)


@lru_cache(maxsize=64)
def _per_channel(
    first: tuple[float, ...], second: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Made once: a CUDA graph cannot capture a copy from the host."""
    table = torch.tensor([first, second], dtype=dtype, device=device).view(2, 1, -1, 1, 1)
    return table[0], table[1]


def _activate(x: Tensor, function: str, low: tuple[float, ...], high: tuple[float, ...]) -> Tensor:
    """A function of every element; one node where all channels have the same bounds, which exporters know better."""
    if len(set(low)) == len(set(high)) == 1:
        if function == "clamp":
            return x.clamp(None if low[0] == -math.inf else low[0], None if high[0] == math.inf else high[0])
        if function == "sigmoid" and high[0] == 1:
            return torch.sigmoid(x)
        if function == "leaky_relu":
            return F.leaky_relu(x, low[0])
    return apply(x, function, *_per_channel(low, high, x.dtype, x.device))


def run_plan(inputs: list[Tensor], weights: list[Tensor], plan: str) -> list[Tensor]:
    """Run a serialised plan (`esr_kernels.plan.Plan.to_json`).

    Half types are carried in float32 between the layers and rounded at the end.
    """
    description = _parse(plan)
    values = [upcast(x) for x in inputs]
    dtype = values[0].dtype
    tensors = [w.to(dtype) for w in weights]

    for layer in description["layers"]:
        x = [values[i] for i in layer["inputs"]]
        w = {name: tensors[i] for name, i in layer["weights"].items()}
        a = layer["attributes"]
        op = layer["op"]
        if op == "normalize":
            shift, scale = _per_channel(tuple(a["shift"]), tuple(a["scale"]), dtype, x[0].device)
            values.append((x[0] - shift) * scale)
        elif op == "conv3x3":
            residual = x[1] if len(x) > 1 else None
            values.append(
                conv3x3(
                    x[0], w["weight"], w.get("bias"), residual, a["activation"], a["negative_slope"], a["residual_mode"]
                )
            )
        elif op == "conv1x1":
            mode = a.get("residual_mode")  # absent without a residual, which is the last input
            xs, residual = (x, None) if mode is None else (x[:-1], x[-1])
            epilogue = (a["activation"], a["negative_slope"], residual, mode or "post")
            values.append(conv1x1(xs, w["weight"], w.get("bias"), *epilogue))
        elif op == "conv3x3_pixel_shuffle":
            residual = x[1] if len(x) > 1 else None
            values.append(conv3x3_pixel_shuffle(x[0], w["weight"], w.get("bias"), residual, a["upscale_factor"]))
        elif op == "esa":
            names = ("w1", "b1", "w2", "b2", "w3", "b3", "w4", "b4", "wf", "bf", "w_max", "b_max", "w3_", "b3_")
            values.append(esa(x[0], *(w.get(name) for name in names)))  # type: ignore[arg-type]
        elif op == "bsconv":
            residual = x[1] if len(x) > 1 else None
            epilogue = (a["activation"], a["negative_slope"], residual, a.get("residual_mode", "post"))
            values.append(bsconv(x[0], w["pointwise"], w["depthwise"], w.get("bias"), a["padding_mode"], *epilogue))
        elif op == "depthwise_conv":
            activation = (a["activation"], a["negative_slope"])
            values.append(depthwise_conv(x[0], w["weight"], w.get("bias"), a["dilation"], *activation, a["gated"]))
        elif op == "layer_norm2d":
            values.append(layer_norm2d(x[0], w.get("weight"), w.get("bias"), a["eps"]))
        elif op == "slice":
            values.append(x[0][:, a["start"] : a["start"] + layer["channels"]])
        elif op == "resize":
            corners = None if a["mode"] == "nearest" else False
            factor = float(a["upscale_factor"])
            values.append(F.interpolate(x[0], scale_factor=factor, mode=a["mode"], align_corners=corners))
        elif op == "adaptive_max_pool":
            values.append(adaptive_max_pool(x[0], [s // a["divisor"] for s in x[0].shape[2:]]))
        elif op == "statistic":
            values.append(statistic(x[0], a["kind"], a["correction"]))
        elif op == "modulate":
            values.append(modulate(x[0], x[1:], a["mode"], a["activation"], a["negative_slope"]))
        elif op == "add":
            values.append(x[0] + x[1])
        elif op == "multiply":
            values.append(x[0] * x[1])
        elif op == "activate":
            values.append(_activate(x[0], a["function"], tuple(a["low"]), tuple(a["high"])))
        else:
            raise ValueError(f"plan: unknown layer {op!r}")

    scales = description["scales"]
    results = []
    for i in description["outputs"]:
        # Images (scale > 1) are NCHW, feature maps follow the input.
        wanted = memory_format(inputs[0]) if scales[i] == 1 else torch.contiguous_format
        out = values[i].to(inputs[0].dtype)
        results.append(out if out.is_contiguous(memory_format=wanted) else out.contiguous(memory_format=wanted))
    return results
