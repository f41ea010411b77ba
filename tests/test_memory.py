"""What `esr_kernels.memory` measures."""

import multiprocessing
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from esr_kernels import memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
MIB = 2**20


def _result_of(function: Callable[[Any], None]) -> Any:
    """What a function puts into a queue in a new process, whose heap has no holes from other tests."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=function, args=(queue,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return queue.get()


def _peak_of_a_call(queue: Any) -> None:
    def call() -> torch.Tensor:
        torch.ones(64 * MIB, dtype=torch.uint8)  # freed before the next one
        return torch.ones(32 * MIB, dtype=torch.uint8)

    queue.put(memory.peak(call))


def test_peak_of_a_call() -> None:
    found = _result_of(_peak_of_a_call)
    assert found is not None
    assert 60 * MIB < found < 90 * MIB


def _freed_between_others(queue: Any) -> None:
    memory.return_freed_blocks()
    for _ in range(2):  # glibc's threshold would rise with the first round's blocks
        blocks = [torch.ones(MIB, dtype=torch.uint8) for _ in range(64)]
        before = memory._status("VmRSS")
        del blocks[::2]
        found = before - memory._status("VmRSS")
        del blocks
    queue.put(found)


def test_freed_blocks_are_returned_from_between_others() -> None:
    assert _result_of(_freed_between_others) > 28 * MIB
