"""Checks that constructors of modules and networks share."""

from __future__ import annotations

from typing import Literal

from ..library import ACTIVATIONS, RESIDUAL_MODES

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


def known_residual_mode(mode: str, activation: str) -> None:
    """Raise ValueError unless it is a residual mode of `functional.conv3x3` that goes with the activation."""
    if mode not in RESIDUAL_MODES:
        raise ValueError(f"residual_mode: expected one of {', '.join(RESIDUAL_MODES)}, got {mode!r}")
    if mode == "attention" and activation != "none":
        raise ValueError(f'activation: residual_mode "attention" allows only "none", got {activation!r}')
