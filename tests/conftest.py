"""Fixtures of the whole suite."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

# Products in Triton's interpreter are too small for NumPy's threads, which wait for each other busily.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Workers and the processes that tests start share the cores: who waits for a thread leaves its core to the others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
import triton_interpreter

# Without a GPU Triton's kernels run in its interpreter, which has to be chosen before they are defined, and those of
# CUDA in the emulator.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("ESR_KERNELS_CUDA_EMULATOR", "1")
    # On images this small a second thread costs more than it does; tests of threads choose their number.
    torch.set_num_threads(int(os.environ.get("ESR_KERNELS_TEST_THREADS", "1")))
triton_interpreter.install()
# A shell's background jobs begin with SIGINT ignored, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

import esr_kernels  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, then those with many tests: workers that get whole files in this order
    (--dist loadfile --no-loadscope-reorder) end at about the same time."""
    count = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -count[item.path]))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with checkpoints, golden outputs and other facts, beside the repository."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("../shared (published checkpoints and golden outputs) is not here")
    return folder


@pytest.fixture(scope="session")
def shared_models(shared_dir: Path) -> Path:
    return shared_dir / "models"


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised tensors hold NaN, so that an element nobody writes shows; algorithms are deterministic."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def exact_float32():
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(params=[b.name for b in esr_kernels.list_backends() if b.available])
def backend(request: pytest.FixtureRequest):
    """Every backend that can run here, chosen for the duration of the test."""
    with esr_kernels.use_backend(request.param):
        yield request.param
