"""What nvcc tells of the kernels it compiles, as JSON beside their object and as one constant for `_build_info`.

    nvcc_resources.py compile OBJECT NVCC ARGUMENTS...    runs nvcc, which makes OBJECT, and writes OBJECT.json
    nvcc_resources.py table SOURCE [--same=8.9=8.6] OBJECT...
        writes C++ with the kernels of all objects; those of 8.6 are those of 8.9 as well

setup.py has it run. Registers, stack and spills are what `ptxas -v` says, the bounds of a launch stand in the PTX:
that needs no tool beside nvcc, and no GPU.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_ENTRY = re.compile(r"ptxas info\s*: Compiling entry function '(\w+)' for 'sm_(\d+)(\d)([af]?)'")
_STACK = re.compile(r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"ptxas info\s*: Used (\d+) registers")
_SHARED = re.compile(r"\b(\d+) bytes smem")
# C7519: where wgmma's sums are written by other instructions ptxas adds the fence that they need.
_OTHER = re.compile(r"ptxas info\s*: (\d+ bytes gmem|Function properties for |Compile time =|Overriding |\(C7519\))")
_BOUNDS = re.compile(r"\.entry\s+(\w+)\s*\([^)]*\)([^{]*)\{")


def split_log(log: str) -> tuple[list[dict[str, Any]], str]:
    """The kernels that `ptxas -v` tells of, and what else nvcc has said."""
    kernels: list[dict[str, Any]] = []
    rest = []
    for line in log.splitlines():
        if match := _ENTRY.match(line):
            kernels.append(
                {
                    "symbol": match[1],
                    "architecture": f"{match[2]}.{match[3]}{match[4]}",
                    "registers": 0,
                    "stack_bytes": 0,
                    "spilled_bytes": 0,
                    "static_shared_bytes": 0,
                }
            )
        elif kernels and (match := _STACK.match(line)):
            # A kernel's own line comes first, then those of functions that it calls.
            kernels[-1]["stack_bytes"] += int(match[1])
            kernels[-1]["spilled_bytes"] += int(match[2])
        elif kernels and (match := _USED.match(line)):
            kernels[-1]["registers"] = int(match[1])
            shared = _SHARED.search(line)
            kernels[-1]["static_shared_bytes"] = int(shared[1]) if shared else 0
        elif not _OTHER.match(line) and not _STACK.match(line):
            rest.append(line + "\n")
    return kernels, "".join(rest)


def launch_bounds(ptx: str) -> tuple[int, dict[str, tuple[int | None, int]]]:
    """The PTX's architecture, such as 86, and kernel -> the most threads of a block and the blocks that are to fit.

    The threads are None where nothing is said.
    """
    target = re.search(r"^\.target sm_(\d+)", ptx, re.MULTILINE)
    found = {}
    for name, directives in _BOUNDS.findall(re.sub(r"//[^\n]*", "", ptx)):
        threads = re.search(r"\.(?:max|req)ntid\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", directives)
        blocks = re.search(r"\.minnctapersm\s+(\d+)", directives)
        count = 1
        for size in threads.groups() if threads else ():
            count *= int(size or 1)
        found[name] = (count if threads else None, int(blocks[1]) if blocks else 1)
    return int(target[1]) if target else 0, found


def compile_object(output: str, command: list[str]) -> int:
    """Runs nvcc; returns its status."""
    # A relative path: nvcc does not quote this one.
    kept = Path(f"{output}.kept")
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    try:
        done = subprocess.run(
            [*command, "-Xptxas=-v", "--keep", f"--keep-dir={kept}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        kernels, rest = split_log(done.stdout)
        sys.stderr.write(rest)
        files = kept.glob("*.ptx")
        bounds = sorted((launch_bounds(f.read_text(encoding="utf-8")) for f in files), key=lambda b: b[0])
    finally:
        shutil.rmtree(kept, ignore_errors=True)
    if done.returncode == 0:
        for kernel in kernels:
            kernel["threads"], kernel["minimum_blocks"] = None, 1
            # Machine code comes from the PTX of its own architecture or of an earlier one.
            architecture = int(re.sub(r"\D", "", kernel["architecture"]))
            for target, found in bounds:
                if target <= architecture and kernel["symbol"] in found:
                    kernel["threads"], kernel["minimum_blocks"] = found[kernel["symbol"]]
        Path(f"{output}.json").write_text(json.dumps(kernels), encoding="utf-8")
    return done.returncode


def table_source(objects: Iterable[str], same: Mapping[str, str]) -> str:
    """C++ that defines the kernels of these objects, in order and each once, as a constant with JSON.

    An architecture in `same` has the machine code of another one, and is listed like it.
    """
    found: dict[tuple[str, str], Any] = {}
    files = [Path(f"{name}.json") for name in objects]
    for file in filter(Path.is_file, files):
        for kernel in json.loads(file.read_text(encoding="utf-8")):
            serves = [name for name, other in same.items() if other == kernel["architecture"]]
            for architecture in (kernel["architecture"], *serves):
                found.setdefault((kernel["symbol"], architecture), {**kernel, "architecture": architecture})
    lines = [json.dumps(json.dumps(kernel)) for kernel in found.values()]
    text = '\n    "," '.join(lines)
    return (
        "// Written by nvcc_resources.py.\n"
        'extern "C" const char esr_kernels_cuda_kernels[];\n'
        f'const char esr_kernels_cuda_kernels[] =\n    "[" {text}\n    "]";\n'
    )


def main(arguments: list[str]) -> int:
    mode, output, *rest = arguments
    if mode == "compile":
        return compile_object(output, rest)
    same = dict(word.removeprefix("--same=").split("=") for word in rest if word.startswith("--same="))
    text, path = table_source([word for word in rest if not word.startswith("--same=")], same), Path(output)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
