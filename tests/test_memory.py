"""What `esr_kernels.memory` measures."""

import sys

import pytest
import torch
from helpers import in_new_process

from esr_kernels import memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
MIB = 2**20


def _peak_of_a_call() -> int | None:
    def call() -> torch.Tensor:
        torch.ones(64 * MIB, dtype=torch.uint8)  # freed before the next one
        return torch.ones(32 * MIB, dtype=torch.uint8)

    return memory.peak(call)


def test_peak_of_a_call() -> None:
    found = in_new_process(_peak_of_a_call)
    assert found is not None
    assert 60 * MIB < found < 90 * MIB


def _freed_between_others() -> int:
    memory.return_freed_blocks()
    for _ in range(2):  # glibc's threshold would rise with the first round's blocks
        blocks = [torch.ones(MIB, dtype=torch.uint8) for _ in range(64)]
        before = memory._status("VmRSS")
        del blocks[::2]
        found = before - memory._status("VmRSS")
        del blocks
    return found


def test_freed_blocks_are_returned_from_between_others() -> None:
    assert in_new_process(_freed_between_others) > 28 * MIB
