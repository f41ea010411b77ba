"""The Triton kernels compiled ahead of time, for GPUs that need not be here: instructions, registers, shared memory.

Compiling needs Triton without its interpreter, so everything runs in processes of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
]

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 86, 89, 90)
# The others have the instructions of 86.
THOROUGH = (86, 90)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What `resources` found, by architecture."""
    folder = tmp_path_factory.mktemp("resources")

    def one(arch: int) -> list[dict[str, Any]]:
        file = folder / f"{arch}.json"
        options = [] if arch in THOROUGH else ["--quick"]
        done = run("-m", "esr_kernels.backends.triton.resources", "--arch", str(arch), "--json", str(file), *options)
        assert file.is_file(), done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(file.read_text())

    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 4)) as pool:
        return dict(zip(ARCHITECTURES, pool.map(one, ARCHITECTURES), strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_spills_or_asks_for_too_much(compiled: dict[int, list[dict[str, Any]]], arch: int) -> None:
    assert len(compiled[arch]) > 50
    problems = [f"{r['operator']}: {r['kernel']} {r['config']}: {r['problem']}" for r in compiled[arch] if r["problem"]]
    assert not problems
    assert {r["operator"].split()[0] for r in compiled[arch]} >= {"span", "rlfn", "conv3x3", "esa", "bsconv"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_products_run_on_tensor_cores(compiled: dict[int, list[dict[str, Any]]], arch: int) -> None:
    products = [r for r in compiled[arch] if r["dots"]]
    assert {r["kernel"] for r in products} == {
        "convolution_kernel",
        "conv1x1_kernel",
        "weight_gradient_kernel",
        "reduce_kernel",
        "gate_kernel",
        "gate_backward_kernel",
    }
    assert all(r["tensor_core"] > 0 for r in products)
    pipelined = [r for r in products if "stages" in r["config"] and r["kernel"] == "convolution_kernel"]
    assert pipelined
    # First layers have all their products in one step, which has nothing to run ahead of.
    assert any(r["async_copies"] for r in pipelined)


def test_planted_problems_are_found() -> None:
    """A tile too large for its warps, and one too large for the shared memory, are found by compiling them."""
    code = """
from esr_kernels.backends.triton.configs import Config
from esr_kernels.backends.triton.tuning import Task, problem
case = "conv3x3 rlfn 48>46 leaky_relu post"
for label, config, arch in (
    ("float16", Config((16, 16), 4, 2), 86),
    ("float16", Config((16, 16), 8, 3), 86),
    ("float16", Config((8, 16), 4, 2), 90),
):
    print(problem(Task(label, case, False, "convolution/float16/48x48", config), arch))
"""
    done = run("-c", code)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr[-2000:]
    assert lines[0].startswith("spills ")
    assert lines[1].startswith("needs ") and lines[1].endswith("the limit is 101376")
    assert lines[2] == "None"


def test_tuning_refuses_a_machine_without_a_gpu(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = run("-m", "esr_kernels.backends.triton.tuning", str(tmp_path / "x.json"))
    assert done.returncode == 2 and done.stderr.strip() == "tuning: no CUDA device; this command measures a GPU"
    assert not (tmp_path / "x.json").exists()
