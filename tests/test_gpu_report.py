"""`python -m bench.gpu_report`: its arithmetic, its budget, what it does about failures, and its parts on a CPU."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import esr_kernels
from esr_kernels import cases, dispatch
from esr_kernels.graphs import CudaRecorder
from esr_kernels.plan import PlanBuilder
from esr_kernels.timing import Timing

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # bench is no installed package

from bench import gpu_engines, gpu_parts, gpu_report, jobs, roofline  # noqa: E402
from bench.gpu_engines import Engine, Options  # noqa: E402
from bench.jobs import Item, LostError  # noqa: E402
from bench.roofline import Ceilings  # noqa: E402

TINY = Options(device="cpu", dtypes=("float32",), models=("span",), sizes=((16, 16),), quick=True)
# 1 TB/s, 100 TFLOP/s in float16.
CEILINGS = {"copy": {"value": 1000.0, "unit": "GB/s"}, "matmul float16": {"value": 100.0, "unit": "TFLOP/s"}}


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch):
    """What is timed matters here, not how often: in the interpreter and the emulator a call takes a second."""
    monkeypatch.setattr(Options, "timing", property(lambda self: {"rounds": 2, "budget": 0.1}))


# --- arithmetic -------------------------------------------------------------------------------------------------


def test_floor_by_hand():
    ceilings = Ceilings.of({**CEILINGS, "matmul tf32": {"error": ["broken"]}})
    assert ceilings == Ceilings(1e12, {"float16": 1e14})
    # A convolution of 28 channels on 256x256 pixels: 0.925 GFLOP take 9.25 us, 7.34 MB read and written 7.35 us.
    flop, size = 2 * 28 * 28 * 9 * 256 * 256, 2 * 28 * 256 * 256 * 2 + (28 * 28 * 9 + 28) * 2
    limit = roofline.floor(flop, size, "float16", ceilings)
    assert limit == roofline.Floor(pytest.approx(9.2484, rel=1e-4), "compute")
    assert roofline.floor(flop / 10, size, "float16", ceilings) == roofline.Floor(pytest.approx(7.354, 1e-3), "memory")
    assert roofline.floor(flop, size, "float32", ceilings) is None
    assert roofline.floor(flop, size, "float16", Ceilings.of({})) is None


def test_bytes_by_hand():
    case = next(case for case in cases.CASES if case.name == "conv1x1 span 4x28>28")
    arguments = case.arguments(1, 8, 8, dtype=torch.float16)
    assert roofline.total_bytes(arguments) == 2 * (4 * 28 * 64 + 112 * 28 + 28)

    builder = PlanBuilder()
    x = builder.input(3)
    y = builder.add("conv3x3", [x], 8, {"weight": torch.zeros(8, 3, 3, 3)})
    z = builder.add("conv3x3", [y, y], 8, {"weight": torch.zeros(8, 8, 3, 3)}, residual_mode="post")
    out = builder.add("conv3x3_pixel_shuffle", [z], 3, {"weight": torch.zeros(12, 8, 3, 3)}, upscale_factor=2)
    plan = builder.finish([out])
    channels = (3 + 8) + (8 + 8 + 8) + (8 + 3 * 4)
    assert roofline.layer_bytes(plan, 2, 5, 7, 4) == channels * 2 * 5 * 7 * 4


def test_rotation_covers_the_cache_twice_within_bounds():
    assert roofline.rotation(10, 0) == 1
    assert roofline.rotation(1000, 100) == 1
    assert roofline.rotation(30, 100) == 7
    assert roofline.rotation(1, 100) == roofline.MAXIMUM_ROTATION
    assert roofline.rotation(0, 100) == roofline.MAXIMUM_ROTATION


def record(**engines: float | None) -> dict[str, Any]:
    """A measured operator whose floor is 10 us by `CEILINGS`; None: the engine failed."""
    entries = {
        name.replace("_", " "): {"failed": "wrong result: no"} if us is None else {"median_us": us, "minimum_us": us}
        for name, us in engines.items()
    }
    return {
        "name": "conv3x3 a|b",
        "precision": "float16",
        "shape": [1, 4, 4],
        "flop": 1e9,
        "bytes": 5e6,
        "engines": entries,
        "noise": 0.01,
    }


def test_share_and_speedup_are_against_the_floor_and_the_fastest_pytorch():
    judged = roofline.judge(record(eager=60.0, inductor_graph=30.0, triton=20.0, reference=25.0), Ceilings.of(CEILINGS))
    assert (judged["floor_us"], judged["bound"]) == (pytest.approx(10.0), "compute")
    assert (judged["fastest"], judged["fastest_pytorch"]) == ("triton", "inductor graph")
    assert judged["engines"]["triton"]["share"] == pytest.approx(0.5)
    assert judged["engines"]["triton"]["speedup"] == pytest.approx(1.5)
    assert judged["engines"]["eager"]["speedup"] == pytest.approx(0.5)
    assert roofline.judge(judged, Ceilings.of(CEILINGS)) == judged, "judging twice changes nothing"


def test_what_is_wrong_or_has_no_ceiling_gets_no_ratio():
    judged = roofline.judge(record(eager=None, triton=20.0), Ceilings.of({}))
    assert judged["fastest_pytorch"] is None and "floor_us" not in judged
    assert judged["engines"]["triton"] == {"median_us": 20.0, "minimum_us": 20.0}
    assert roofline.judge({"error": ["broken"]}, Ceilings.of(CEILINGS)) == {"error": ["broken"]}


# --- budget, failures -------------------------------------------------------------------------------------------


def test_time_is_shared_by_weight_and_unspent_time_moves_on():
    weights = {"a": 1.0, "b": 2.0, "c": 1.0}
    assert jobs.share("a", ["a", "b", "c"], 100.0, weights) == 25.0
    assert jobs.share("b", ["b", "c"], 99.0, weights) == 66.0
    assert jobs.share("c", ["c"], 40.0, weights) == 40.0
    assert jobs.share("c", ["c"], -1.0, weights) == 0.0


def failing(error: Exception) -> Callable[[], dict[str, Any]]:
    def run() -> dict[str, Any]:
        raise error

    return run


def test_an_item_that_raises_is_recorded_and_the_next_runs():
    saved: list[dict[str, Any]] = []
    state = jobs.new_state({"old": {"value": 1}})
    items = {
        "old": Item(failing(AssertionError("has a result already"))),
        "bad": Item(failing(ValueError("broken"))),
        "long": Item(failing(AssertionError("there is no time")), seconds=1e6),
        "good": Item(lambda: {"value": 2}),
    }
    jobs.run_items(items, state, 60.0, lambda s: saved.append(json.loads(json.dumps(s))))
    assert state["results"]["old"] == {"value": 1}
    assert state["results"]["bad"]["error"][-1] == "ValueError: broken"
    assert state["results"]["good"]["value"] == 2
    assert list(state["not_run"]) == ["long"] and "needs 1000000 s" in state["not_run"]["long"]
    assert [s["running"] for s in saved] == ["bad", None, "good", None, None]
    assert list(saved[0]["not_run"]) == ["long", "good"], "a process that dies now leaves the reason"


def test_a_lost_device_ends_the_process_after_the_item_was_recorded():
    state = jobs.new_state()
    items = {"bad": Item(failing(LostError("illegal access"))), "next": Item(lambda: {})}
    with pytest.raises(LostError):
        jobs.run_items(items, state, 60.0, lambda s: None)
    assert state["results"]["bad"]["error"][-1].endswith("LostError: illegal access")
    assert list(state["not_run"]) == ["next"]


WORKER = """
import json, os, sys, time
path = sys.argv[1]
state = json.load(open(path))
for key in {keys}:
    if key not in state["results"]:
        state["running"] = key
        json.dump(state, open(path, "w"))
        if key == "dies":
            print("last words")
            os._exit(7)
        if key == "hangs":
            time.sleep(60)
        state["results"][key] = {{"pid": os.getpid()}}
        state["running"] = None
json.dump(state, open(path, "w"))
"""


def worker(*keys: str) -> Callable[[Path, float], list[str]]:
    return lambda file, left: [sys.executable, "-c", WORKER.format(keys=keys), str(file)]


def test_a_process_that_dies_is_replaced_without_the_item_it_died_of(tmp_path: Path):
    file = tmp_path / "state.json"
    state = jobs.run_in_processes(worker("old", "a", "dies", "b"), {"old": {"pid": 0}}, 60.0, file)
    assert list(state["results"]) == ["old", "a", "dies", "b"]
    assert state["results"]["dies"]["error"] == ["last words", "the process ended with status 7"]
    assert state["results"]["a"]["pid"] != state["results"]["b"]["pid"]
    assert state["error"] is None and not file.exists()


def test_a_process_that_hangs_is_stopped_and_what_it_had_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "GRACE", 0.0)
    state = jobs.run_in_processes(worker("a", "hangs", "b"), {}, 3.0, tmp_path / "state.json")
    assert list(state["results"]) == ["a"]
    assert state["not_run"] == {"hangs": "stopped at the part's time limit"}


def test_a_process_that_never_begins_is_the_parts_error(tmp_path: Path):
    state = jobs.run_in_processes(lambda file, left: [sys.executable, "-c", "1 / 0"], {}, 60.0, tmp_path / "state.json")
    assert state["results"] == {}
    assert "ZeroDivisionError" in state["error"][-2]


def test_a_command_is_stopped_with_its_children():
    begun = time.monotonic()
    finished = jobs.run_command(["sh", "-c", "echo one; sleep 60 & sleep 60; echo two"], 0.5)
    assert finished.returncode is None and finished.tail == ["one"]
    assert time.monotonic() - begun < 30
    finished = jobs.run_command(["sh", "-c", "pwd; echo $WORD; exit 3"], 10, environment={"WORD": "word"})
    assert (finished.returncode, finished.tail) == (3, [str(ROOT), "word"])


def run_parts(run: Callable[..., dict[str, Any]], *parts: str, budget: float = 100.0) -> tuple[dict[str, Any], int]:
    """The report, and how often it was saved."""
    report: dict[str, Any] = {"not_run": {}}
    saved: list[str] = []
    gpu_report.run_parts(parts, report, budget, run, lambda r: saved.append(json.dumps(r)))
    return report, len(saved)


def test_a_part_that_raises_is_recorded_and_the_next_runs():
    def run(part: str, limit: float, done: dict[str, Any]) -> dict[str, Any]:
        if part == "operators":
            raise RuntimeError("no worker")
        if part == "ceilings":
            return jobs.new_state(CEILINGS)
        return jobs.new_state({"span": record(eager=30.0, triton=20.0)}) | {"not_run": {"rlfn": "no time"}}

    report, saved = run_parts(run, "ceilings", "operators", "models")
    assert saved == 3
    assert report["operators"]["error"][-1] == "RuntimeError: no worker"
    assert report["models"]["results"]["span"]["floor_us"] == pytest.approx(10.0)
    assert report["not_run"] == {"models": {"rlfn": "no time"}}
    assert gpu_report.problems("operators", report) == ["operators: RuntimeError: no worker"]
    assert gpu_report.problems("models", report) == []


def test_a_part_without_time_is_listed():
    report, _ = run_parts(lambda *_: pytest.fail("must not run"), "training", budget=0.0)
    assert report["not_run"] == {"training": {"everything": "no time was left"}}


def test_resuming_keeps_what_was_measured_here():
    old = {
        "commit": "abc",
        "device": "GPU",
        "commands": ["first"],
        "not_run": {"models": {"rlfn": "no time"}},
        "build": {"results": {"build": {"returncode": 0}}, "error": None},
        "models": {"results": {"span": {"flop": 1}, "rlfn": {"error": ["broken"]}}, "error": None},
    }
    kept = gpu_report.resumed(old, {"commit": "abc", "device": "GPU"})
    assert kept["models"]["results"] == {"span": {"flop": 1}}, "what failed is tried again"
    assert kept["build"]["results"] == {}, "the machine may be another one"
    assert kept["commands"] == ["first"] and kept["not_run"] == old["not_run"]
    with pytest.raises(ValueError, match="device is 'GPU', here it is 'other'"):
        gpu_report.resumed(old, {"commit": "abc", "device": "other"})
    with pytest.raises(ValueError, match="commit is 'abc', here it is 'def'"):
        gpu_report.resumed(old, {"commit": "def", "device": "GPU"})


# --- tables -----------------------------------------------------------------------------------------------------


def switched(**engines: float | None) -> dict[str, Any]:
    found = record(**engines)
    entries = {name.replace("native cuda", "native-cuda"): entry for name, entry in found["engines"].items()}
    for entry in entries.values():
        entry |= {"check": {"relative": 2e-3 if "median_us" in entry else 1.0}}
    return found | {"engines": entries}


def synthetic_report() -> dict[str, Any]:
    engines = record(eager=60.0, inductor=None, triton_graph=20.0)
    for entry in engines["engines"].values():
        entry |= {"check": {"relative": 1e-3}, "memory_bytes": 3_000_000}
    state: dict[str, dict[str, Any]] = {
        "build": {"build": {"command": "python setup.py", "returncode": 1, "seconds": 3.0, "tail": ["error: no"]}},
        "tests": {"tests": {"command": "pytest", "returncode": 0, "seconds": 9.0, "closing": "9 passed", "failed": []}},
        "ceilings": CEILINGS,
        "tune": {"triton": {"configs": {"configurations": {"a": {}, "b": {}}}}},
        "operators": {"conv3x3 | float16": engines, "spab | float16": {"error": ["ValueError: broken"]}},
        "switches": {
            "SWITCH | conv3x3 | float16": switched(native_cuda=30.0, native_cuda_with_SWITCH=20.0),
            "SWITCH | spab | float16": switched(native_cuda=30.0, native_cuda_with_SWITCH=None),
        },
        "training": {},
        "models": {"span": engines | {"layer_bytes": 2e7, "not_fused": []}},
        "overhead": {
            "conv3x3": {"engines": {"eager": {"median_us": 4.0}}},
            "first": {"first_call_seconds": {"empty": {"first": 1.5}}},
        },
    }
    report: dict[str, Any] = {part: {"results": results, "error": None} for part, results in state.items()}
    report["not_run"] = {"training": {"conv3x3": "no time", "spab": "no time"}}
    gpu_report.add_floors(report)
    return report


def test_tables_of_every_part():
    report = synthetic_report()
    found = {section.title: section for section in gpu_report.sections(report, list(gpu_report.WEIGHTS))}
    assert list(found) == [*list(gpu_report.WEIGHTS)[:-1], "models, all engines", "overhead"]
    texts = {title: section.text() for title, section in found.items()}
    assert "python setup.py ended with status 1" in texts["build"]
    assert "9 passed" in texts["tests"]
    assert "1000.00" in texts["ceilings"] and "2 configurations" in texts["tune"]
    row = texts["operators"].splitlines()[3].split("  ")
    assert [cell.strip() for cell in row if cell] == [
        *("conv3x3 a|b with Inductor", "1x4x4", "float16", "compute", "10.0", "20.0", "triton graph"),
        *("50 %", "60.0", "eager", "3.00x", "1 %"),
    ]
    assert "conv3x3 | float16: inductor: wrong result: no" in texts["operators"]
    assert "spab | float16: ValueError: broken" in texts["operators"]
    assert "not run: conv3x3 (no time), and 1 more" in texts["training"]
    assert "by layer" in texts["models"] and "  20.0  " in texts["models"], "2e7 bytes at 1 TB/s"
    assert "  3.0  1.0e-03" in texts["models, all engines"]
    assert texts["switches"].count("SWITCH  ") == 1
    assert "native-cuda    30.0   20.0  1.50x    1 %    2.0e-03   2.0e-03" in texts["switches"]
    assert "SWITCH | spab | float16: native-cuda with SWITCH: wrong result: no" in texts["switches"]
    rows = [line.split() for line in texts["overhead"].splitlines()]
    assert ["conv3x3", "eager", "4.0", "us", "a", "call"] in rows and ["first", "empty:", "first", "1.500", "s"] in rows


def test_markdown_has_as_many_cells_in_every_row():
    section = next(s for s in gpu_report.sections(synthetic_report(), ["operators"]))
    lines = [line for line in section.markdown().splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert {line.replace("\\|", "").count("|") for line in lines} == {len(section.headers) + 1}
    assert "conv3x3 a\\|b with Inductor" in lines[2]


def test_pytest_output_is_summed_up():
    lines = [
        "..F.                                                                     [100%]",
        "FAILED tests/test_spab.py::test_forward[triton-28] - AssertionError: no",
        "ERROR tests/test_esa.py - ImportError",
        "====== 2 failed, 3 passed, 90 deselected, 1 error in 12.34s ======",
    ]
    assert gpu_report.pytest_summary(lines) == {
        "closing": "2 failed, 3 passed, 90 deselected, 1 error in 12.34s",
        "failed": ["tests/test_spab.py::test_forward[triton-28]", "tests/test_esa.py"],
    }
    assert gpu_report.pytest_summary(["stopped"]) == {"closing": None, "failed": []}


# --- the parts, on a CPU ----------------------------------------------------------------------------------------


def test_chosen_cases_exist():
    names = [case.name for case in cases.CASES]
    assert set(gpu_parts.ONE_CASE_EACH) | set(gpu_parts.INDUCTOR_CASES) <= set(names)
    chosen = {gpu_parts._case(name).operator for name in gpu_parts.ONE_CASE_EACH}
    assert chosen == set(cases.OPERATORS) - {"selective_scan", "window_attention"}  # plain PyTorch on a GPU
    for labels, precisions, networks in gpu_parts.SWITCHES.values():
        assert set(labels) <= set(names) and set(precisions) <= set(gpu_parts.PRECISIONS)
        assert set(networks) <= set(cases.model_names())


def test_a_job_survives_its_command_line():
    job = gpu_parts.Job("models", TINY, "state.json", 9.5)
    again = gpu_parts.Job.from_json(job.to_json())
    assert again == gpu_parts.Job("models", again.options, "state.json", 9.5)
    assert list(map(tuple, again.options.sizes)) == [(16, 16)]


@pytest.mark.parametrize("name", gpu_parts.ONE_CASE_EACH)
def test_operators_are_checked_and_timed(name: str):
    found = gpu_parts.operators(TINY)[f"{name} | float32"].run()
    case = gpu_parts._case(name)
    assert found["shape"] == [1, 16, 16]
    # What compares and multiplies elements only has no multiply-adds.
    assert (found["flop"] > 0) == (case.operator not in ("adaptive_max_pool", "modulate"))
    result = case.plain(case.arguments(1, 16, 16))
    assert found["bytes"] == roofline.total_bytes(case.arguments(1, 16, 16)) + result.nbytes
    assert {"eager", "eager channels_last", "reference"} <= set(found["engines"])
    for entry in found["engines"].values():
        assert entry["check"]["ok"] and entry["median_us"] > 0 and "failed" not in entry
    json.dumps(found, allow_nan=False)


def test_a_wrong_engine_gets_no_time(monkeypatch: pytest.MonkeyPatch):
    run = dispatch.run
    monkeypatch.setattr(dispatch, "run", lambda name, args: run(name, args) * 1.01)
    found = gpu_parts.operators(TINY)["conv3x3 span 28>28 silu | float32"].run()["engines"]
    assert "median_us" in found["eager"]
    assert found["reference"]["failed"].startswith("wrong result: largest difference")
    assert "median_us" not in found["reference"]


def test_an_engine_that_cannot_run_is_recorded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "run", failing_run)
    found = gpu_parts.operators(TINY)["esa rlfn 46 16 | float32"].run()["engines"]
    assert found["reference"] == {"failed": "RuntimeError: no kernel"}
    assert found["eager"]["median_us"] > 0


def failing_run(name: str, args: tuple[Any, ...]) -> Tensor:
    raise RuntimeError("no kernel\nand more")


def test_only_the_first_precision_has_inductor_and_it_comes_last():
    options = Options(device="cpu", dtypes=("bfloat16", "float32"), models=("span",), sizes=((16, 16),))
    keys = list(gpu_parts.operators(options))
    assert keys[-3:] == [f"{name} | bfloat16 | with Inductor" for name in gpu_parts.INDUCTOR_CASES]
    assert list(gpu_parts.models(options)) == [
        f"span 16x16 | {name}{inductor}" for inductor in ("", " | with Inductor") for name in ("bfloat16", "float32")
    ]
    assert not [key for key in gpu_parts.models(TINY) if "Inductor" in key]


def test_switches_are_those_of_the_kernels():
    text = (ROOT / "csrc" / "cuda" / "switches.h").read_text(encoding="utf-8")
    assert set(re.findall(r'"(ESR_KERNELS_CUDA_\w+)"', text)) == set(gpu_parts.SWITCHES)


@pytest.mark.skipif(not esr_kernels.native.emulated(), reason="the emulator is not in use")
@pytest.mark.parametrize(
    "item", ["SPAB | spab span 28", "SPAB | span 16x16", "PERSISTENT | span 16x16", "WINOGRAD | span 16x16"]
)
def test_switches_are_checked_and_timed(monkeypatch: pytest.MonkeyPatch, item: str):
    """Off and on on the emulator; what is on reaches the engine."""
    monkeypatch.setattr(gpu_engines, "alternate", lambda passes, **_: {n: once(p) for n, p in passes.items()})
    options = Options(device="cpu", dtypes=("float16",), models=("span",), sizes=((16, 16),), quick=True)
    seen: list[str | None] = []
    every = Engine.every

    def spied(self: Engine) -> list[Any]:
        seen.append(self.switch)
        return every(self)

    monkeypatch.setattr(Engine, "every", spied)
    found = gpu_parts.switches(options)[f"ESR_KERNELS_CUDA_{item} | float16"].run()
    switch = f"ESR_KERNELS_CUDA_{item.partition(' | ')[0]}"
    own = "native-cuda channels_last" if "spab" in item else "native-cuda"
    assert list(found["engines"]) == ["eager", own, f"{own} with {switch}"]
    assert all(entry["check"]["ok"] and entry["median_us"] > 0 for entry in found["engines"].values())
    assert {None, switch} <= set(seen) and switch not in os.environ


def once(call: Callable[[], object]) -> Timing:
    begun = time.perf_counter()
    call()
    return Timing((time.perf_counter() - begun,), 1)


def test_training_compares_gradients():
    items = gpu_parts.training(TINY)
    assert list(items) == [f"{name} | float32" for name in gpu_parts.ONE_CASE_EACH]
    found = items["conv1x1 span 4x28>28 | float32"].run()
    assert list(found["engines"]) == ["eager", "eager channels_last", "fused"]
    assert all(entry["median_us"] > 0 for entry in found["engines"].values())


def test_models_are_checked_and_timed():
    found = gpu_parts.models(TINY)["span 16x16 | float32"].run()
    assert {"eager", "eager channels_last", "modules", "reference"} <= set(found["engines"])
    assert all(entry["median_us"] > 0 for entry in found["engines"].values())
    fused, _ = cases.model_pair("span")
    optimized = esr_kernels.optimize(fused)
    weights = roofline.total_bytes([*optimized.parameters(), *optimized.buffers()])
    assert optimized.plan is not None and found["flop"] == optimized.plan.flops(1, 16, 16)
    assert found["bytes"] == 4 * (3 * 16 * 16 + 3 * 64 * 64) + weights
    assert found["layer_bytes"] > found["bytes"]
    assert found["not_fused"] == []


def test_overhead_of_a_call():
    found = gpu_parts.overhead(TINY)["spab span 28"].run()["engines"]
    assert list(found) == ["esr_kernels", "eager", "one F.conv2d"]
    assert all(entry["median_us"] > 0 for entry in found.values())


def test_tuning_gets_its_time_and_its_result_is_kept(monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def tune(**arguments: Any) -> dict[str, Any]:
        asked.update(arguments)
        return {"configurations": {}}

    monkeypatch.setitem(sys.modules, gpu_parts.TUNING, SimpleNamespace(tune=tune))
    assert gpu_parts.tune(10.0)["triton"].run() == {"configs": {"configurations": {}}}
    assert asked == {"seconds": 8.0, "log": print}


def test_tuned_configurations_go_where_the_kernels_look_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    from esr_kernels.backends.triton import configs

    assert configs.VARIABLE == gpu_report.CONFIGS_VARIABLE
    seen: dict[str, dict[str, str]] = {}

    def run(part: str, limit: float, options: Options, results: Any, file: Path, environment: dict[str, str]) -> Any:
        seen[part] = environment
        tuned = {"triton": {"configs": {"configurations": {"a": 1}}}}
        return jobs.new_state(tuned if part == "tune" else {})

    monkeypatch.setattr(gpu_report, "run_worker_part", run)
    target = tmp_path / "gpu.json"
    assert gpu_report.main(["--device", "cpu", "--parts", "tune", "operators", "--json", str(target)]) == 0
    written = tmp_path / "gpu.configs.json"
    assert seen == {"tune": {}, "operators": {configs.VARIABLE: str(written)}}
    assert json.loads(written.read_text()) == {"configurations": {"a": 1}}


class Recorder:
    """Stands in for `CudaRecorder`: a replay runs the function again into the same results."""

    refuses = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def warm_up(self, function: Callable[[], Any]) -> Any:
        return function()

    def capture(self, function: Callable[[], list[Tensor]]) -> tuple[Callable[[], object], list[Tensor]]:
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")
        results = function()

        def replay() -> None:
            for result, again in zip(results, function(), strict=True):
                result.copy_(again)

        return replay, results


@pytest.mark.parametrize("refuses", [False, True])
def test_every_engine_is_timed_from_a_graph_too(monkeypatch: pytest.MonkeyPatch, refuses: bool):
    for method in ("__init__", "warm_up", "capture"):
        ours, theirs = (inspect.signature(getattr(c, method)) for c in (Recorder, CudaRecorder))
        assert list(ours.parameters) == list(theirs.parameters)
    monkeypatch.setattr(gpu_engines, "CudaRecorder", Recorder)
    monkeypatch.setattr(Recorder, "refuses", refuses)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(Options, "graphs", True)
    found = gpu_parts.operators(TINY)["conv3x3 span 28>28 silu | float32"].run()["engines"]
    graphs = {name: entry for name, entry in found.items() if name.endswith(" graph")}
    assert len(graphs) == len(found) - len(graphs)
    for entry in graphs.values():
        assert ("median_us" in entry) is not refuses
        assert refuses is ("not permitted" in entry.get("failed", ""))


def test_an_engine_runs_its_inputs_on_its_backend():
    seen = []
    engine = Engine(lambda x: seen.append((x, dispatch.chosen_backend())), [1, 2], "reference")
    engine.every()
    engine.first()
    assert seen == [(1, "reference"), (2, "reference"), (1, "reference")]


def test_tf32_is_allowed_only_where_it_is_asked_for():
    flags = torch.backends.cudnn
    before = flags.allow_tf32, torch.backends.cuda.matmul.allow_tf32, flags.benchmark
    with gpu_engines.precision("float32"):
        assert not flags.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
    with gpu_engines.precision("tf32"):
        assert flags.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
    assert (flags.allow_tf32, torch.backends.cuda.matmul.allow_tf32, flags.benchmark) == before


# --- the command ------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_report.main([]) == 2
    assert capsys.readouterr().err == "gpu_report: no CUDA device; this command measures a GPU\n"


@pytest.mark.parametrize("arguments", [["--parts", "peers"], ["--dtype", "float64"], ["--sizes", "256"]])
def test_wrong_arguments_are_refused(arguments: list[str]):
    with pytest.raises(SystemExit) as stop:
        gpu_report.main(arguments)
    assert stop.value.code == 2


@pytest.mark.slow
def test_the_whole_command_and_its_continuation(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    target, pages = tmp_path / "report.json", tmp_path / "report.md"
    tiny = ["--device", "cpu", "--quick", "--sizes", "16x16", "--commit", "abc"]
    common = [*tiny, "--json", str(target), "--markdown", str(pages)]
    assert gpu_report.main([*common, "--parts", "ceilings"]) == 0
    assert "matmul float32" in capfd.readouterr().out
    report = json.loads(target.read_text())
    assert (report["commit"], report["device"]) == ("abc", "cpu")
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert len(report["commands"]) == 1 and "--quick" in report["commands"][0]
    copied = report["ceilings"]["results"]["copy"]
    assert copied["value"] > 0

    more = ["--parts", "training", "ceilings", "--dtype", "float32", "--resume", str(target)]
    assert gpu_report.main([*common, *more]) == 0
    report = json.loads(target.read_text())
    assert report["ceilings"]["results"]["copy"] == copied, "what is there is not measured again"
    assert len(report["training"]["results"]) == len(gpu_parts.ONE_CASE_EACH)
    assert all(r["floor_us"] > 0 for r in report["training"]["results"].values())
    assert len(report["commands"]) == 2
    assert "## training" in pages.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.json", "report.md"]

    assert gpu_report.main([*tiny[:-1], "other", "--resume", str(target)]) == 2
    assert "--resume: the report's commit is 'abc'" in capfd.readouterr().err
