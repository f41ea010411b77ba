"""The scores of the report's Eq. 1 and 2, as its Table 1 computes them."""

from __future__ import annotations

import math
from dataclasses import dataclass

RUNTIME_WEIGHT, FLOPS_WEIGHT, PARAMETERS_WEIGHT = 0.7, 0.15, 0.15


@dataclass(frozen=True)
class Costs:
    """What a network costs.

    Attributes:
        runtime: per image, in any unit.
        flops: in any unit.
        parameters: in any unit.
    """

    runtime: float
    flops: float
    parameters: float


@dataclass(frozen=True)
class Scores:
    """Lower is better; the baseline's are e^2.

    Attributes:
        runtime, flops, parameters: of Eq. 1.
        total: of Eq. 2, by which the main track is ranked.
    """

    runtime: float
    flops: float
    parameters: float
    total: float


def score(value: float, baseline: float) -> float:
    """Eq. 1 as Table 1 means it, exp(2 value / baseline); infinite beyond the largest float.

    Raises:
        ValueError: the baseline is not above 0.
    """
    if not baseline > 0:
        raise ValueError(f"baseline: expected a value above 0, got {baseline}")
    try:
        return math.exp(2 * value / baseline)
    except OverflowError:
        return math.inf


def scores(costs: Costs, baseline: Costs) -> Scores:
    """All scores of a network whose costs are in the units of the baseline's, which the challenge takes from RLFN."""
    runtime = score(costs.runtime, baseline.runtime)
    flops = score(costs.flops, baseline.flops)
    parameters = score(costs.parameters, baseline.parameters)
    total = RUNTIME_WEIGHT * runtime + FLOPS_WEIGHT * flops + PARAMETERS_WEIGHT * parameters
    return Scores(runtime, flops, parameters, total)
