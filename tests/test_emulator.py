"""The emulator of the CUDA primitives tests itself: csrc/emulator/self_test.cpp."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "csrc" / "emulator" / "self_test.cpp"
CASES = re.findall(r"^CASE\((\w+)\)", SOURCE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The test program for each way of switching stacks that this machine has."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    compiler = next((words for words in map(shlex.split, names) if shutil.which(words[0])), None)
    if compiler is None:
        pytest.skip(f"no C++ compiler: {', '.join(names)}")
    flags = ["-std=c++20", "-Wall", "-Wextra", "-pthread", "-DESR_EMULATOR"]
    variants = {"ucontext": ["-O0", "-DESR_EMULATOR_UCONTEXT"]}
    if platform.machine() in ("x86_64", "AMD64"):
        variants["assembly"] = ["-O2"]
    folder = tmp_path_factory.mktemp("emulator")
    compilers = {
        name: subprocess.Popen(
            [*compiler, *flags, *extra, str(SOURCE), "-o", str(folder / name)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, extra in variants.items()
    }
    for process in compilers.values():
        output, _ = process.communicate()
        assert process.returncode == 0, output
    return {name: folder / name for name in variants}


def run(program: Path, *words: str) -> str:
    outcome = subprocess.run([program, *words], capture_output=True, text=True, timeout=300)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


@pytest.mark.parametrize("case", CASES)
def test_case(programs: dict[str, Path], case: str) -> None:
    for program in programs.values():
        run(program, case)


def test_every_case_is_listed(programs: dict[str, Path]) -> None:
    for program in programs.values():
        assert run(program, "--list").split() == CASES
