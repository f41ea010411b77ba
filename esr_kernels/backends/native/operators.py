"""The operators on the compiled engines, each a plan of one to three layers.

The functions take an operator's arguments and return what an engine needs to run it, and what the caller gets.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from ...library import feature_map, image
from ...plan import ESA_WEIGHTS, Plan, PlanBuilder


class Call(NamedTuple):
    """A plan with the tensors of one call; `result` is what the operator returns."""

    plan: Plan
    weights: list[Tensor]
    inputs: list[Tensor]
    outputs: list[Tensor]
    result: Any


def _present(*weights: Tensor | None) -> list[Tensor]:
    return [w for w in weights if w is not None]


def _names(**weights: Any) -> dict[str, Any]:
    """Weight name -> its own name where the weight is present."""
    return {name: name for name, present in weights.items() if present}


@lru_cache(maxsize=1024)
def _conv3x3_plan(
    channels: int, out: int, bias: bool, residual: bool, activation: str, negative_slope: float, residual_mode: str
) -> Plan:
    b = PlanBuilder()
    inputs = [b.input(channels)] + ([b.input(out)] if residual else [])
    y = b.add(
        "conv3x3",
        inputs,
        out,
        _names(weight=True, bias=bias),
        activation=activation,
        negative_slope=negative_slope,
        residual_mode=residual_mode,
    )
    return b.finish([y])


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    residual_mode: str,
) -> Call:
    channels, out_channels = weight.shape[1], weight.shape[0]
    plan = _conv3x3_plan(
        channels, out_channels, bias is not None, residual is not None, activation, negative_slope, residual_mode
    )
    out = feature_map(x, out_channels)
    return Call(plan, _present(weight, bias), _present(x, residual), [out], out)


@lru_cache(maxsize=256)
def _spab_plan(channels: tuple[int, int, int], biases: tuple[bool, bool, bool], return_mid: bool) -> Plan:
    b = PlanBuilder()
    x = b.input(channels[2])
    linear = {"negative_slope": 0.0, "activation": "none"}
    silu = {"negative_slope": 0.0, "activation": "silu", "residual_mode": "post"}
    mid = b.add("conv3x3", [x], channels[0], _names(weight=True, bias=biases[0]), **silu)
    y = b.add("conv3x3", [mid], channels[1], _names(weight=True, bias=biases[1]), **silu)
    weights = _names(weight=True, bias=biases[2])
    y = b.add("conv3x3", [y, x], channels[2], weights, residual_mode="attention", **linear)
    return b.finish([y, mid] if return_mid else [y])


def spab(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    return_mid: bool,
) -> Call:
    channels = (w1.shape[0], w2.shape[0], w3.shape[0])
    plan = _spab_plan(channels, (b1 is not None, b2 is not None, b3 is not None), return_mid)
    out = feature_map(x, channels[2])
    mid = feature_map(x, channels[0]) if return_mid else x.new_empty(0)
    outputs = [out, mid] if return_mid else [out]
    return Call(plan, _present(w1, b1, w2, b2, w3, b3), [x], outputs, (out, mid))


@lru_cache(maxsize=256)
def _tail_plan(channels: int, out: int, bias: bool, residual: bool, r: int) -> Plan:
    b = PlanBuilder()
    inputs = [b.input(channels)] + ([b.input(out, r)] if residual else [])
    y = b.add("conv3x3_pixel_shuffle", inputs, out, _names(weight=True, bias=bias), upscale_factor=r)
    return b.finish([y])


def conv3x3_pixel_shuffle(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, upscale_factor: int
) -> Call:
    colours = weight.shape[0] // upscale_factor**2
    plan = _tail_plan(weight.shape[1], colours, bias is not None, residual is not None, upscale_factor)
    out = image(x, colours, upscale_factor)
    return Call(plan, _present(weight, bias), _present(x, residual), [out], out)


@lru_cache(maxsize=256)
def _conv1x1_plan(
    channels: tuple[int, ...], out: int, bias: bool, activation: str, negative_slope: float, residual_mode: str | None
) -> Plan:
    b = PlanBuilder()
    inputs = [b.input(c) for c in channels]
    attributes: dict[str, Any] = {"activation": activation, "negative_slope": negative_slope}
    if residual_mode is not None:
        inputs.append(b.input(out))
        attributes["residual_mode"] = residual_mode
    y = b.add("conv1x1", inputs, out, _names(weight=True, bias=bias), **attributes)
    return b.finish([y])


def conv1x1(
    xs: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    negative_slope: float,
    residual: Tensor | None = None,
    residual_mode: str = "post",
) -> Call:
    channels = tuple(x.shape[1] for x in xs)
    mode = None if residual is None else residual_mode
    plan = _conv1x1_plan(channels, weight.shape[0], bias is not None, activation, negative_slope, mode)
    out = feature_map(xs[0], weight.shape[0])
    return Call(plan, _present(weight, bias), _present(*xs, residual), [out], out)


@lru_cache(maxsize=256)
def _esa_plan(channels: int, hidden: int, present: tuple[str, ...]) -> Plan:
    b = PlanBuilder()
    y = b.add(
        "esa",
        [b.input(channels)],
        channels,
        {name: name for name in present},
        hidden=hidden,
        has_conv_f="wf" in present,
        has_conv_max="w_max" in present,
    )
    return b.finish([y])


def esa(x: Tensor, *weights: Tensor | None) -> Call:
    present = tuple(name for name, w in zip(ESA_WEIGHTS, weights, strict=True) if w is not None)
    first = weights[0]
    assert first is not None
    out = feature_map(x, x.shape[1])
    return Call(_esa_plan(x.shape[1], first.shape[0], present), _present(*weights), [x], [out], out)


@lru_cache(maxsize=256)
def _bsconv_plan(
    channels: int,
    out: int,
    bias: bool,
    padding_mode: str,
    activation: str,
    negative_slope: float,
    residual_mode: str | None,
    adds_input: bool,
) -> Plan:
    b = PlanBuilder()
    inputs = [b.input(channels)]
    attributes = {"padding_mode": padding_mode, "activation": activation, "negative_slope": negative_slope}
    if residual_mode is not None:
        inputs.append(inputs[0] if adds_input else b.input(out))
        attributes["residual_mode"] = residual_mode
    y = b.add("bsconv", inputs, out, _names(pointwise=True, depthwise=True, bias=bias), **attributes)
    return b.finish([y])


def bsconv(
    x: Tensor,
    pointwise: Tensor,
    depthwise: Tensor,
    bias: Tensor | None,
    padding_mode: str,
    activation: str,
    negative_slope: float,
    residual: Tensor | None = None,
    residual_mode: str = "post",
) -> Call:
    channels, out_channels = pointwise.shape[1], pointwise.shape[0]
    mode, adds_input = None if residual is None else residual_mode, residual is x
    settings = (padding_mode, activation, negative_slope, mode, adds_input)
    plan = _bsconv_plan(channels, out_channels, bias is not None, *settings)
    out = feature_map(x, out_channels)
    inputs = [x] if adds_input else _present(x, residual)
    return Call(plan, _present(pointwise, depthwise, bias), inputs, [out], out)


FORWARD = (conv3x3, spab, conv3x3_pixel_shuffle, conv1x1, esa, bsconv)
