"""What `optimize` did, for people and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Report:
    """What `optimize` did.

    Attributes:
        fused: one line per layer that runs in a plan.
        left: one line per kind of operation that stayed plain PyTorch, with the reason; empty when the whole network
            fused.
        wrong: what the fused network differed in, where it was refused because it differed from the original.
        graphs: one line per CUDA graph captured so far, and one per reason why a call that should have one has none.
        whole: whether the network runs as one operator.
        share: fused part of the floating-point operations, 0..1; None where nothing is counted.
        samples: (batch, height, width) of the images on which the result was compared with the original.
        exact_difference: largest difference on them, relative to the largest value, both computed in float64.
        difference, tolerance: the same as the network will run, on the first of them, and what it may be.
        notes: what else there is to know: sizes for which the network runs as it was, layers kept in float32.
    """

    fused: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    graphs: list[str] = field(default_factory=list)
    whole: bool = False
    share: float | None = None
    difference: float | None = None
    tolerance: float | None = None
    exact_difference: float | None = None
    samples: list[tuple[int, int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.whole:
            lines = [f"fused into {len(self.fused)} layers, run as one operator:"]
        elif self.fused:
            share = "" if self.share is None else f", {self.share:.1%} of the arithmetic"
            lines = [f"partly fused, {len(self.fused)} layers{share}:"]
        else:
            lines = ["not fused, the model runs as it is:"]
        lines += [f"  {line}" for line in self.fused]
        if self.fused and self.left:
            lines.append("plain PyTorch:")
        lines += [f"  {line}" for line in self.left]
        if self.notes:
            lines += ["notes:", *(f"  {line}" for line in self.notes)]
        if self.exact_difference is not None:
            lines.append(
                f"largest difference from the original: {self.exact_difference:.1e} of the largest value in float64, "
                f"on {len(self.samples)} sample images"
            )
        if self.difference is not None and self.tolerance is not None:
            lines.append(f"as it runs: {self.difference:.1e}, allowed {self.tolerance:.1e}")
        if self.graphs:
            lines += ["CUDA graphs:", *(f"  {line}" for line in self.graphs)]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The attributes; numbers that are not finite are None."""
        values = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)
