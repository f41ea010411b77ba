"""Learning rates as closed formulas of the iteration: nothing to save, nothing to replay."""

from __future__ import annotations

import math
from dataclasses import dataclass

NAMES = ("constant", "step", "multistep", "cosine")


@dataclass(frozen=True)
class Schedule:
    """The learning rate over one stage.

    Attributes:
        name: one of `NAMES`.
        warmup: iterations in which the rate rises linearly from rate / warmup to the rate.
        every: of step: iterations after which the rate is multiplied by `factor`, again and again.
        milestones: of multistep: iterations from which it is multiplied by `factor` once more.
        factor: above 0.
        minimum: of cosine: the rate at the end.
        period: of cosine: iterations of one half wave, after which it starts anew; 0: the stage's.

    Iterations count from the start of the stage, its warm-up included.

    Raises:
        ValueError: unknown name, or a value out of range.
    """

    name: str = "constant"
    warmup: int = 0
    every: int = 0
    milestones: tuple[int, ...] = ()
    factor: float = 0.5
    minimum: float = 0.0
    period: int = 0

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"schedule.name: unknown {self.name!r}, expected one of {', '.join(NAMES)}")
        if self.warmup < 0 or self.period < 0:
            raise ValueError("schedule: warmup and period must be at least 0")
        if self.name == "step" and self.every < 1:
            raise ValueError(f"schedule.every: step needs a number of iterations of at least 1, got {self.every}")
        if self.name == "multistep":
            increasing = list(self.milestones) == sorted(set(self.milestones))
            if not self.milestones or self.milestones[0] < 1 or not increasing:
                raise ValueError(
                    f"schedule.milestones: expected increasing iterations of at least 1, got {list(self.milestones)}"
                )
        if not 0 < self.factor < math.inf:
            raise ValueError(f"schedule.factor: expected a number above 0, got {self.factor}")
        if not 0 <= self.minimum < math.inf:
            raise ValueError(f"schedule.minimum: expected a number of at least 0, got {self.minimum}")

    def rate(self, iteration: int, rate: float, iterations: int) -> float:
        """The learning rate of an iteration 0..iterations-1 in a stage that begins with `rate`."""
        if iteration < self.warmup:
            return rate * (iteration + 1) / self.warmup
        if self.name == "step":
            return rate * self.factor ** (iteration // self.every)
        if self.name == "multistep":
            return rate * self.factor ** sum(iteration >= m for m in self.milestones)
        if self.name == "cosine":
            period = self.period or max(iterations - self.warmup, 1)
            done = (iteration - self.warmup) % period / period
            return self.minimum + (rate - self.minimum) * 0.5 * (1 + math.cos(math.pi * done))
        return rate
