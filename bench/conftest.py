"""Options, the clock and the machine's description of all benchmarks."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import pytest
import torch
from common import Settings

from esr_kernels.cases import CASES, DTYPES, OperatorCase
from esr_kernels.timing import EventClock, machine


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise pytest.UsageError(f"--size: expected HEIGHTxWIDTH such as 256x256, got {text!r}")
    return int(height), int(width)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("esr_kernels")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--device", choices=("cpu", "cuda"), default=default, help="default: cuda where there is one")
    group.addoption("--dtype", choices=tuple(DTYPES), default="float32", help="default: float32")
    group.addoption("--size", default=None, metavar="HxW", help="input size (default: each file's own)")
    group.addoption("--batch", type=int, default=1, help="images per call (default: 1)")
    group.addoption("--threads", type=int, default=torch.get_num_threads(), help="PyTorch threads (default: its own)")


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    option = request.config.getoption
    text = option("size")
    size = None if text is None else _size(text)
    return Settings(option("device"), DTYPES[option("dtype")], size, option("batch"), option("threads"))


@pytest.fixture
def case(request: pytest.FixtureRequest) -> OperatorCase:
    return next(case for case in CASES if case.name == request.param)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU every benchmark is timed by CUDA events: the wall clock would time the launches."""
    if config.getoption("device") == "cuda":
        clock = EventClock()
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=clock))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["node"] = ""  # the name of a computer tells nothing about its speed
    machine_info["esr_kernels"] = machine()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Adds the command, and to every benchmark its GFLOP/s and its time relative to the eager one of its group."""
    output_json["command"] = shlex.join(["pytest", *sys.argv[1:]])
    eager = {
        entry["group"]: entry["stats"]["median"]
        for entry in output_json["benchmarks"]
        if entry["params"]["engine"] == "eager"
    }
    for entry in output_json["benchmarks"]:
        median, info = entry["stats"]["median"], entry["extra_info"]
        info["gflops"] = info["gflop"] / median
        if entry["group"] in eager:
            info["speedup_over_eager"] = eager[entry["group"]] / median
