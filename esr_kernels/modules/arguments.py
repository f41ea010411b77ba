"""Checks that constructors of modules and networks share."""

from __future__ import annotations

from typing import Literal

from ..library import ACTIVATIONS

PaddingMode = Literal["zeros", "reflect"]  # of functional.bsconv


def positive(**values: object) -> None:
    """Raise TypeError or ValueError, naming the argument, unless every value is an int of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")


def known_activation(activation: str) -> None:
    """Raise ValueError unless it is the name of an activation of the operators."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
