"""Which operators a call runs, and where its time goes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

_NAMED = 0.01  # of the time: what takes less is not named


@dataclass(frozen=True)
class Shares:
    """Where the time of a call goes.

    Attributes:
        calls: operator of the namespace `esr` -> how often the call runs it.
        fused: share of the time inside these operators, 0..1; None where nothing was timed.
        plain: PyTorch's operators beside them that take a hundredth or more, (name, share), the largest first.
    """

    calls: dict[str, int]
    fused: float | None
    plain: list[tuple[str, float]]

    def __str__(self) -> str:
        inside = "" if self.fused is None else f", {self.fused:.0%} of the time"
        calls = ", ".join(f"{name} {count}x" for name, count in self.calls.items()) or "none"
        plain = ", ".join(f"{name} {share:.0%}" for name, share in self.plain)
        return f"{calls}{inside}" + (f"; plain PyTorch: {plain}" if plain else "")


def shares(call: Callable[[], object], *, device: str = "cpu", rounds: int = 3) -> Shares:
    """Profile a call that has run before.

    Args:
        call: what to look at; gradients are not recorded.
        device: "cpu" or "cuda", whose time counts.
        rounds: calls that the figures are the mean of.
    """
    on_gpu = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it writes to the terminal
    with torch.inference_mode(), profile(activities=activities) as profiler:
        for _ in range(rounds):
            call()
    calls: Counter[str] = Counter()
    inside, rest = 0.0, Counter[str]()
    for event in profiler.events():
        fused = event.name.startswith("esr::")
        time = event.device_time_total if on_gpu else event.cpu_time_total
        if fused:
            calls[event.name.removeprefix("esr::")] += 1
            inside += time
        # Of PyTorch's operators the outermost: what they call is theirs.
        elif event.cpu_parent is None and event.name.startswith("aten::"):
            rest[event.name.removeprefix("aten::")] += time
    total = inside + sum(rest.values())
    return Shares(
        {name: count // rounds for name, count in calls.items()},
        inside / total if total else None,
        [(name, time / total) for name, time in rest.most_common() if time >= _NAMED * total and time > 0],
    )
