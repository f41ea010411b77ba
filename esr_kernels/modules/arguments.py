"""Checks that constructors of modules and networks share."""

from __future__ import annotations


def positive(**values: object) -> None:
    """Raise TypeError or ValueError, naming the argument, unless every value is an int of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
