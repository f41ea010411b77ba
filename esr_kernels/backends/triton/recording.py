"""What a run of an operator launched, allocated and copied, so that it can be repeated (`launch.Program`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor


class Recording:
    """What a run did.

    Attributes:
        launches: (compiled kernel, grid, arguments, which of them are pointers) of each.
        memory: what it allocated with `empty`.
        copies: what it copied with `dense`; alive, so that no later memory has the same address.
    """

    def __init__(self) -> None:
        self.launches: list[tuple[Any, tuple[int, int], list[Any], tuple[int, ...]]] = []
        self.memory: list[Tensor] = []
        self.copies: list[Tensor] = []


_recording: ContextVar[Recording | None] = ContextVar("esr_kernels_triton_recording", default=None)


def current() -> Recording | None:
    """The recording that is being made, if any."""
    return _recording.get()


@contextmanager
def record() -> Iterator[Recording]:
    """Inside, launches and allocations are noted."""
    token = _recording.set(Recording())
    try:
        recording = _recording.get()
        assert recording is not None
        yield recording
    finally:
        _recording.reset(token)


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory that no caller sees, on the device of `like` and of its dtype unless another is given."""
    memory = like.new_empty(shape, dtype=dtype)
    recording = _recording.get()
    if recording is not None:
        recording.memory.append(memory)
    return memory


def dense(t: Tensor) -> Tensor:
    """`t` where it is contiguous, else a copy. A recording with a copy cannot be repeated."""
    result = t.contiguous()
    recording = _recording.get()
    if recording is not None and result is not t:
        recording.copies.append(result)
    return result
