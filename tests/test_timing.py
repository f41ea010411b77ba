"""Taking turns, statistics, the machine's description, and files that are never half-written."""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from esr_kernels import timing
from esr_kernels.timing import Timing, alternate, machine, machine_line, table, thread_count, write_json


class FakeTime:
    """A clock that stands still unless a function under test moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def taking(self, seconds: float, log: list[str] | None = None, name: str = ""):
        def function() -> None:
            self.now += seconds
            if log is not None:
                log.append(name)

        return function


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(timing, "time", fake)
    return fake


def test_every_round_calls_each_function_once(clock: FakeTime):
    log: list[str] = []
    functions = {name: clock.taking(1.0, log, name) for name in "abc"}
    alternate(functions, rounds=12, warmup=2)
    assert log[:6] == ["a", "a", "b", "b", "c", "c"]
    turns = [tuple(log[i : i + 3]) for i in range(6, len(log), 3)]
    assert len(turns) == 12
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) > 1, "no function always runs after the same one"


def test_order_depends_on_the_seed_alone(clock: FakeTime):
    def order(seed: int) -> list[str]:
        log: list[str] = []
        alternate({name: clock.taking(1.0, log, name) for name in "abcd"}, rounds=6, warmup=0, seed=seed)
        return log

    assert order(0) == order(0)
    assert order(0) != order(1)


def test_samples_are_the_functions_own_times(clock: FakeTime):
    result = alternate({"slow": clock.taking(3.0), "fast": clock.taking(0.5)}, rounds=4)
    assert list(result) == ["slow", "fast"]
    assert result["slow"].samples == pytest.approx((3.0,) * 4)
    assert result["fast"].samples == pytest.approx((0.5,) * 4)
    assert result["slow"].median / result["fast"].median == pytest.approx(6.0)


def test_budget_stops_after_a_whole_round(clock: FakeTime):
    result = alternate({"a": clock.taking(1.0), "b": clock.taking(1.0)}, rounds=100, budget=9.0)
    assert len(result["a"].samples) == len(result["b"].samples) == 5


def test_budget_leaves_enough_rounds_for_a_median(clock: FakeTime):
    result = alternate({"a": clock.taking(50.0)}, rounds=100, budget=1.0)
    assert len(result["a"].samples) == 3
    assert len(alternate({"a": clock.taking(50.0)}, rounds=2, budget=1.0)["a"].samples) == 2


def test_short_functions_are_repeated(clock: FakeTime):
    result = alternate({"short": clock.taking(0.001), "long": clock.taking(0.5)}, rounds=3, sample_time=0.01)
    assert result["short"].calls == 10
    assert result["short"].median == pytest.approx(0.001)
    assert result["long"].calls == 1


def test_synchronize_is_inside_the_measured_time(clock: FakeTime):
    pending = [0.0]

    def launch() -> None:
        pending[0] += 2.0

    def wait() -> None:
        clock.now += pending[0]
        pending[0] = 0.0

    assert alternate({"asynchronous": launch}, rounds=3, synchronize=wait)["asynchronous"].median == pytest.approx(2.0)


def test_a_failing_function_leaves_the_collector_as_it_was():
    calls = []

    def fails_later() -> None:
        calls.append(gc.isenabled())
        if len(calls) == 3:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        alternate({"f": fails_later}, rounds=5)
    assert calls == [True, False, False]
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"functions": {}, "rounds": 1}, "functions: expected at least one"),
        ({"functions": {"f": int}, "rounds": 0}, "rounds: expected at least 1, got 0"),
        ({"functions": {"f": int}, "rounds": 1, "warmup": -1}, "warmup: expected at least 0, got -1"),
        ({"functions": {"f": int}, "rounds": 1, "budget": 0.0}, "budget: expected seconds above 0"),
    ],
)
def test_alternate_refuses(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        alternate(**arguments)


def test_statistics():
    t = Timing((4.0, 1.0, 2.0, 3.0, 100.0), calls=2)
    assert (t.median, t.minimum) == (3.0, 1.0)
    low, _, high = statistics.quantiles(t.samples, n=4, method="inclusive")
    assert t.iqr == high - low == 2.0
    assert t.to_json() == {
        "median": 3.0,
        "minimum": 1.0,
        "iqr": 2.0,
        "rounds": 5,
        "calls": 2,
        "samples": [4.0, 1.0, 2.0, 3.0, 100.0],
    }
    assert Timing((2.0,)).iqr == 0.0
    with pytest.raises(ValueError, match="samples"):
        Timing(())


def test_thread_count_is_restored():
    before = torch.get_num_threads()
    seen = []

    def fails() -> None:
        with thread_count(1):
            seen.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert seen == [1]
    assert torch.get_num_threads() == before
    with thread_count(None):
        assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads: expected at least 1, got 0"), thread_count(0):
        pass


def test_machine_is_complete_and_json():
    info = json.loads(json.dumps(machine()))
    assert set(info) == {"time", "cpu", "memory_bytes", "gpus", "os", "versions", "native", "git"}
    assert info["cpu"]["model"]
    assert info["cpu"]["cores"] >= 1
    assert info["cpu"]["threads"] == torch.get_num_threads()
    assert info["versions"]["torch"] == torch.__version__
    assert set(info["versions"]) == {"python", "torch", "triton", "numpy", "esr_kernels"}
    assert len(info["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    line = machine_line(info)
    assert "\n" not in line
    assert info["cpu"]["model"] in line
    assert torch.__version__ in line


def _repository(folder: Path) -> Path:
    """A repository with this package's place in it and one commit."""
    (folder / "esr_kernels").mkdir(parents=True)
    (folder / "esr_kernels" / "timing.py").write_text("one\n")
    (folder / "bench" / "results").mkdir(parents=True)
    (folder / "bench" / "results" / "a.json").write_text("{}\n")
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org", "-C", str(folder)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    return folder


def test_commit_and_changes_are_those_of_the_packages_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = _repository(tmp_path / "checkout")
    monkeypatch.setattr(timing, "__file__", str(root / "esr_kernels" / "timing.py"))
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert timing._git() == {"commit": head.stdout.strip(), "dirty": False}
    (root / "bench" / "results" / "a.json").write_text('{"new": 1}\n')
    assert timing._git() == {"commit": head.stdout.strip(), "dirty": False}, "a new result is no change of the code"
    (root / "esr_kernels" / "timing.py").write_text("two\n")
    assert timing._git() == {"commit": head.stdout.strip(), "dirty": True}

    inside = root / "environment" / "esr_kernels"
    inside.mkdir(parents=True)
    monkeypatch.setattr(timing, "__file__", str(inside / "timing.py"))
    assert timing._git() is None, "an installed package is not the checkout around it"


def test_json_replaces_the_whole_file_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "result.json"
    assert write_json(target, {"a": [1, 2.5]}) == target
    assert json.loads(target.read_text()) == {"a": [1, 2.5]}
    with pytest.raises(TypeError):
        write_json(target, {"a": object()})
    with pytest.raises(ValueError, match="JSON"):
        write_json(target, {"a": float("nan")})

    def no_space(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_space)
        with pytest.raises(OSError, match="no space left"):
            write_json(target, {"a": 3})
    assert json.loads(target.read_text()) == {"a": [1, 2.5]}
    assert os.listdir(tmp_path) == ["result.json"]


def test_json_is_written_under_another_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    moves = []
    monkeypatch.setattr(os, "replace", lambda a, b: moves.append((Path(a), Path(b), Path(a).read_text())))
    write_json(tmp_path / "result.json", [1])
    ((temporary, target, text),) = moves
    assert temporary.parent == target.parent == tmp_path
    assert temporary != target
    assert json.loads(text) == [1]


def test_json_refuses_places_it_cannot_write(tmp_path: Path):
    with pytest.raises(ValueError, match="there is no folder"):
        write_json(tmp_path / "missing" / "result.json", {})
    with pytest.raises(ValueError, match="is a folder"):
        write_json(tmp_path, {})


def test_table_aligns_columns():
    text = table(["name", "ms"], [["a", "1.5"], ["long name", "10.25"]])
    assert text.splitlines() == ["name          ms", "---------  -----", "a            1.5", "long name  10.25"]
    assert table(["a", "b"], [["1", "x"]], "rl").splitlines()[2] == "1  x"
    with pytest.raises(ValueError, match="expected 2 cells, got 1"):
        table(["a", "b"], [["1"]])
    with pytest.raises(ValueError, match="align"):
        table(["a", "b"], [], "lx")


def test_a_cuda_result_is_timed_by_events(monkeypatch: pytest.MonkeyPatch):
    class CountingClock:
        def __init__(self) -> None:
            self.reads = 0

        def __call__(self) -> float:
            self.reads += 1
            return 7.0 * self.reads

    with FakeTensorMode(allow_non_fake_inputs=True):
        there = torch.empty(1, device="cuda")
    monkeypatch.setattr(timing, "EventClock", CountingClock)
    functions = {"tensor": lambda: there, "nested": lambda: {"a": [1, (there,)]}, "cpu": lambda: [torch.ones(1), {}]}
    result = alternate(functions, rounds=3)
    assert result["tensor"].samples == result["nested"].samples == (7.0, 7.0, 7.0)
    assert 7.0 not in result["cpu"].samples
