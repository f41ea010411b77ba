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


def run(*command: str) -> subprocess.CompletedProcess[str]:
    # What was in front stays there: another version of Triton, for example.
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What `resources --quick` found, by architecture."""
    folder = tmp_path_factory.mktemp("resources")

    def one(arch: int) -> list[dict[str, Any]]:
        file = folder / f"{arch}.json"
        done = run("-m", "esr_kernels.backends.triton.resources", "--arch", str(arch), "--json", str(file), "--quick")
        assert file.is_file(), done.stdout[-2000:] + done.stderr[-4000:]
        return json.loads(file.read_text())

    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 4)) as pool:
        return dict(zip(ARCHITECTURES, pool.map(one, ARCHITECTURES), strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_spills_or_asks_for_too_much(compiled: dict[int, list[dict[str, Any]]], arch: int) -> None:
    assert len(compiled[arch]) > (20 if arch in (80, 89) else 45)
    assert not [r for r in compiled[arch] if r["problem"]]
    found = {r["operator"].split()[0] for r in compiled[arch]}
    assert found >= {"span", "spab", "esa", "bsconv", "adaptive_max_pool", "modulate"}
    of_plans = {r["kernel"] for r in compiled[arch] if r["operator"].startswith("plan ")}
    assert of_plans >= {"enlarge_kernel", "statistic_parts_kernel", "statistic_kernel", "adaptive_max_pool_kernel"}
    assert of_plans >= {"modulate_kernel", "pointwise_kernel"}


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
import torch
from esr_kernels.backends.triton.configs import Config
from esr_kernels.backends.triton.tuning import Task, problem
case = "conv3x3 rlfn 48>46 leaky_relu post"
for label, config, arch in (
    ("float16", Config((16, 16), 4, 2), 86),
    ("float16", Config((16, 16), 8, 3), 86),
    ("float16", Config((8, 16), 4, 2), 90),
):
    print(problem(Task(label, case, torch.channels_last, False, "convolution/float16/48x48", config), arch))
"""
    done = run("-c", code)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr[-2000:]
    assert lines[0].startswith("spills ")
    assert lines[1].startswith("needs ") and lines[1].endswith("the limit is 101376")
    assert lines[2] == "None"


def test_host_time_is_measured_without_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "host.json"
    done = run("-m", "bench.triton_host", "--models", "--dtype", "--seconds", "0.2", "--json", str(file))
    assert done.returncode == 0, done.stderr[-2000:]
    host = json.loads(file.read_text())["host"]["conv3x3"]
    assert 0 < max(host["recorded"], host["each anew"]) < host["by Triton"]
    assert "conv3x3" in done.stdout


def test_tuning_refuses_a_machine_without_a_gpu(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = run("-m", "esr_kernels.backends.triton.tuning", str(tmp_path / "x.json"))
    assert done.returncode == 2 and done.stderr.strip() == "tuning: no CUDA device; this command measures a GPU"
    assert not (tmp_path / "x.json").exists()


_STAND_IN = """
import json, sys, torch
import esr_kernels
from esr_kernels import cases
from esr_kernels.backends.triton import configs, launch
from esr_kernels.backends.triton.run_plan import PreparedPlan
from esr_kernels.library import run_plan_outputs
from esr_kernels.plan import PlanBuilder

calls = []
def load(self, device, args, aligned):
    name = self.function.__name__
    return (lambda *a: calls.append((name, a))), "function", "metadata"
launch.Kernel._load = load
configs._device = lambda: ("sm_90", (9, 0))
torch.cuda.current_device = lambda: 0
torch._C._cuda_getCurrentRawStream = lambda device: 5
"""


def test_a_repeated_plan_launches_what_its_first_run_did() -> None:
    """The recorded launches, repeated on other tensors, against the way through the kernels' Python functions."""
    code = (
        _STAND_IN
        + """
def network(name):
    if name == "gate":
        b = PlanBuilder()
        f = b.add("slice", [b.input(3)], 3, start=0)
        s = b.add("statistic", [f], 3, kind="contrast", correction=0)
        m = b.add("modulate", [f, s], 3, mode="nearest", activation="silu", negative_slope=0.0)
        return b.finish([b.add("add", [m, s], 3)]), []
    fast = esr_kernels.optimize(cases.model_pair(name)[0], dtype=torch.float16)
    return fast.plan, [getattr(fast, n) for n in fast._weight_names]

for name, size in (("span", (9, 13)), ("rlfn", (20, 17)), ("rcn", (20, 17)), ("gate", (70, 81))):
    network_plan, weights = network(name)
    text = network_plan.to_json()
    plan = PreparedPlan(network_plan, weights, torch.float16, torch.device("cpu"))

    def run(execute):
        inputs = [torch.rand(2, 3, *size).half()]
        outputs = run_plan_outputs(inputs, weights, text)
        calls.clear()
        execute(inputs, outputs)
        known = {t.data_ptr(): f"tensor {i}" for i, t in enumerate([*inputs, *outputs])}
        # Scratch memory lies elsewhere every time; all else is the same number.
        fixed = {t.data_ptr() for t in plan._constants}
        def plain(v):
            if isinstance(v, int) and v > 2**32:
                return known.get(v, v if v in fixed else "scratch")
            return v
        return [(kernel, [plain(v) for v in args]) for kernel, args in calls], inputs, outputs

    first, *keep = run(plan.execute)
    assert len(plan._programs) == 1
    direct, *_ = run(plan._run)
    again, *_ = run(plan.execute)
    assert first == direct == again, name
    assert sum(v == "scratch" for _, args in first for v in args) > len(first)
    assert any("tensor 0" in args for _, args in first) and any("tensor 1" in args for _, args in first)
    assert len(plan._programs) == 1
    before = len(first)
    inputs = [torch.rand(2, 3, *size).half()[..., ::2]]  # a copy is made of it
    plan.execute(inputs, run_plan_outputs(inputs, weights, text))
    assert len(plan._programs) == 1
print("same")
"""
    )
    done = run("-c", code)
    assert done.stdout.strip() == "same", done.stderr[-3000:]


def test_repeated_operators_launch_what_their_first_calls_did() -> None:
    """Lists of numbers and of maps are arguments too."""
    code = (
        _STAND_IN
        + """
from esr_kernels.backends.triton.adaptive_max_pool import adaptive_max_pool
from esr_kernels.backends.triton.modulate import modulate
programs = []
make = launch.Program.__init__
def noted(self, recording, tensors, constants):
    make(self, recording, tensors, constants)
    programs.append(tensors)
launch.Program.__init__ = noted
last = torch.channels_last
def maps():
    return [torch.rand(2, 12, *size).to(memory_format=last) for size in ((20, 24), (20, 24), (5, 6))]
for call in (
    lambda x: adaptive_max_pool(x[0], [5, 6]),
    lambda x: adaptive_max_pool(x[0], [10, 12]),
    lambda x: modulate(x[0], x[1:], "nearest", "gelu", 0.0),
    lambda x: modulate(x[0], x[1:], "bilinear", "gelu", 0.0),
):
    launches = []
    before = len(programs)
    for _ in range(2):
        x = maps()
        calls.clear()
        out = call(x)
        assert out.is_contiguous(memory_format=last)
        known = {t.data_ptr(): name for t, name in zip([*x, out], ("x", "same", "small", "out"), strict=True)}
        launches.append([(kernel, [known.get(v, v) for v in args]) for kernel, args in calls])
    assert len(programs) == before + 1
    assert launches[0] == launches[1] and len(launches[0]) == 1
    assert {"x", "out"} <= {v for v in launches[0][0][1] if isinstance(v, str)}
print("same")
"""
    )
    done = run("-c", code)
    assert done.stdout.strip() == "same", done.stderr[-3000:]


def test_warmup_compiles_whatever_a_call_can_need() -> None:
    """After it, images of other sizes, batches, layouts and addresses find their kernels compiled."""
    code = (
        _STAND_IN
        + """
from dataclasses import replace
from esr_kernels import dispatch
triton = dispatch._backends()["triton"]
triton._reason = None
triton.implementations = {
    name: replace(i, devices=frozenset({"cpu"})) for name, i in triton.implementations.items()
}
loads = []
load = launch.Kernel._load
def noted(self, device, args, aligned):
    loads.append((self.function.__name__, aligned))
    return load(self, device, args, aligned)
launch.Kernel._load = noted
with esr_kernels.use_backend("triton"):
    for name, smallest in (("span", 8), ("rlfn", 15)):
        fast = esr_kernels.optimize(cases.model_pair(name)[0], dtype=torch.float16)
        loads.clear()
        fast.warmup([(20, 24)])
        assert {aligned for _, aligned in loads} == {True, False}
        loads.clear()
        with torch.no_grad():
            for dtype in (torch.float16, torch.float32):
                for n, h, w in ((1, 20, 24), (3, smallest, 31)):
                    x = torch.zeros(n + 1, 3, h, w, dtype=dtype)
                    odd = torch.zeros(n * 3 * h * w + 1, dtype=dtype)[1:].view(n, 3, h, w)
                    for y in (x[:n], x[1:], odd, x.contiguous(memory_format=torch.channels_last)[:n],
                              odd.view(n, h, w, 3).permute(0, 3, 1, 2)):
                        fast(y)
        assert not loads, (name, loads)
print("all compiled")
"""
    )
    done = run("-c", code)
    assert done.stdout.strip() == "all compiled", done.stderr[-3000:]


def test_programs_refuse_what_may_move() -> None:
    code = (
        _STAND_IN
        + """
from esr_kernels.backends.triton.packing import pack_kernel
from esr_kernels.backends.triton.recording import dense, empty, record
kernel = launch.Kernel(pack_kernel, {"BLOCK": 1024}, 4)
x, y, other = torch.empty(64), torch.empty(64), torch.empty(64)
ints = tuple(range(12))
with record() as recording:
    scratch = empty(x, (100,), torch.float16)
    kernel((1, 1), x[4:], scratch, *ints)
    kernel((2, 1), scratch, y, *ints)
program = launch.Program(recording, [x, y], [])
assert program.size == 256
new_x, new_y = torch.empty(64), torch.empty(64)
calls.clear()
program.run([new_x, new_y])
(_, a), (_, b) = calls
assert a[:3] == (1, 1, 1) and b[:3] == (2, 1, 1) and a[3:9] == (5, "function", "metadata", None, None, None)
assert a[9] == new_x.data_ptr() + 16 and b[10] == new_y.data_ptr() and a[10] == b[9]
for tensors, constants in (([x], []), ([y], []), ([x, y, x], [])):
    try:
        launch.Program(recording, tensors, constants)
    except ValueError as error:
        assert "may lie elsewhere" in str(error)
    else:
        raise AssertionError("accepted")
launch.Program(recording, [x], [y])
with record() as recording:
    kernel((1, 1), dense(other[::2]), y, *ints)  # a copy, whose address nothing allocated later may take
    scratch = empty(x, (32,))
    kernel((1, 1), scratch, y, *ints)
assert scratch.data_ptr() != recording.copies[0].data_ptr()
try:
    launch.Program(recording, [x, y], [])
except ValueError:
    print("refused")
"""
    )
    done = run("-c", code)
    assert done.stdout.strip() == "refused", done.stderr[-3000:]
