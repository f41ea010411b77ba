"""Builds the native entry points with a fuzzer and sanitizers, and runs them: part of `make fuzz`.

    python tests/fuzz/run.py [-runs=N] [-max_total_time=SECONDS] [-seed=N]

With clang it is libFuzzer; otherwise the driver beside this file, which mutates inputs and keeps those that reach new
code, as libFuzzer does, but compares no operands. Both run under AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = ROOT / "tests" / "fuzz"
OUTPUT = ROOT / "build" / "fuzz" / "native"
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-O1", "-g1", "-std=c++20"]
HEADERS = [f"-I{ROOT / 'csrc'}", "-isystem", str(Path(torch.__file__).parent / "include")]


def build() -> Path:
    """The program, compiled anew where a source is younger.

    Raises:
        subprocess.CalledProcessError: a source does not compile.
    """
    sources = [HERE / "native.cpp", ROOT / "csrc" / "cpu" / "packing.cpp"]
    used = [*sources, HERE / "driver.cpp", *(ROOT / "csrc" / "common").iterdir(), ROOT / "csrc" / "cpu" / "packing.h"]
    if OUTPUT.is_file() and OUTPUT.stat().st_mtime > max(f.stat().st_mtime for f in used):
        return OUTPUT
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    clang = shutil.which("clang++")
    if clang is not None:
        flags = ["-fsanitize=fuzzer", *SANITIZED, *HEADERS]
        subprocess.run([clang, *flags, *map(str, sources), "-o", str(OUTPUT)], check=True)
        return OUTPUT
    compiler = [*os.environ.get("CXX", "c++").split(), *SANITIZED, *HEADERS]
    objects = []
    for source in (*sources, HERE / "driver.cpp"):
        objects.append(str(OUTPUT.with_name(f"{source.stem}.o")))
        # What the driver itself reaches says nothing of an input.
        covered = [] if source.stem == "driver" else ["-fsanitize-coverage=trace-pc"]
        subprocess.run([*compiler, *covered, "-c", str(source), "-o", objects[-1]], check=True)
    subprocess.run([*compiler, *objects, "-o", str(OUTPUT)], check=True)
    return OUTPUT


def main(flags: list[str]) -> int:
    return subprocess.run([str(build()), *flags], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
