"""Exceptions of the package."""

from __future__ import annotations


class BackendError(RuntimeError):
    """No backend, or not the chosen one, can run a call; the message gives each backend's reason."""


class OptimizeError(RuntimeError):
    """A model could not be optimised; the message says where and why."""


class TrainingError(RuntimeError):
    """A training run cannot start or had to stop; the message says why and what is left of it."""
