"""What a machine's ceilings allow: minimal bytes, floors, shares and speed-ups. Arithmetic only, nothing runs here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from esr_kernels.plan import Plan

MAXIMUM_ROTATION = 16
# First words of the engines that are plain PyTorch; all others are the package's.
_PEERS = ("eager", "inductor")


@dataclass(frozen=True)
class Ceilings:
    """What was measured on the machine: bytes per second of a copy, operations per second by precision."""

    bandwidth: float | None
    rates: Mapping[str, float]

    @staticmethod
    def of(results: Mapping[str, Any]) -> Ceilings:
        """From the results of the part `ceilings`; what is missing there stays unknown."""
        values = {name: record["value"] for name, record in results.items() if "value" in record}
        prefix = "matmul "
        rates = {name.removeprefix(prefix): v * 1e12 for name, v in values.items() if name.startswith(prefix)}
        return Ceilings(values["copy"] * 1e9 if "copy" in values else None, rates)


@dataclass(frozen=True)
class Floor:
    """The shortest time the ceilings allow, in microseconds, and what sets it: "compute" or "memory"."""

    us: float
    bound: str


def floor(flop: float, size: float, precision: str, ceilings: Ceilings) -> Floor | None:
    """The larger of operations over rate and bytes over bandwidth; None where a ceiling is not known."""
    rate = ceilings.rates.get(precision)
    if rate is None or ceilings.bandwidth is None:
        return None
    compute, memory = flop / rate * 1e6, size / ceilings.bandwidth * 1e6
    return Floor(compute, "compute") if compute > memory else Floor(memory, "memory")


def total_bytes(value: Any) -> int:
    """Bytes of a tensor, or of all tensors in a list, tuple or dict."""
    if isinstance(value, Tensor):
        return value.nbytes
    values: Iterable[Any] = value.values() if isinstance(value, Mapping) else value
    return sum(total_bytes(v) for v in values)


def layer_bytes(plan: Plan, batch: int, height: int, width: int, item: int) -> int:
    """Bytes of feature maps when every layer reads its inputs and writes its result once; `item` per element."""

    def size(value: int) -> int:
        return plan.channels[value] * batch * height * width * plan.scales[value] ** 2 * item

    first = len(plan.inputs)
    return sum(sum(map(size, layer.inputs)) + size(first + k) for k, layer in enumerate(plan.layers))


def rotation(bytes_per_call: int, cache: int) -> int:
    """How many inputs must take turns so that a call does not find its own in a cache of that many bytes."""
    return max(1, min(math.ceil(2 * cache / max(bytes_per_call, 1)), MAXIMUM_ROTATION))


def is_peer(engine: str) -> bool:
    return engine.startswith(_PEERS)


def _fastest(engines: Mapping[str, Any], peers: bool) -> str | None:
    timed = [name for name, entry in engines.items() if "median_us" in entry and is_peer(name) == peers]
    return min(timed, key=lambda name: engines[name]["median_us"], default=None)


def judge(record: dict[str, Any], ceilings: Ceilings) -> dict[str, Any]:
    """A measured record with its floor, the fastest engine of each side, and every engine's share and speed-up.

    The share is the floor over the median, the speed-up the median of the fastest plain PyTorch over the engine's.
    """
    if "engines" not in record or "flop" not in record:
        return record
    limit = floor(record["flop"], record["bytes"], record["precision"], ceilings)
    engines = record["engines"]
    own, peer = _fastest(engines, peers=False), _fastest(engines, peers=True)
    judged = {}
    for name, entry in engines.items():
        added = {}
        if "median_us" in entry and limit is not None:
            added["share"] = limit.us / entry["median_us"]
        if "median_us" in entry and peer is not None:
            added["speedup"] = engines[peer]["median_us"] / entry["median_us"]
        judged[name] = entry | added
    result = record | {"engines": judged, "fastest": own, "fastest_pytorch": peer}
    if limit is not None:
        result |= {"floor_us": limit.us, "bound": limit.bound}
    if "layer_bytes" in record:
        by_layer = floor(record["flop"], record["layer_bytes"], record["precision"], ceilings)
        result |= {} if by_layer is None else {"layer_floor_us": by_layer.us}
    return result
