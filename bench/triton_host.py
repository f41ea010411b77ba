"""What can be measured without a GPU of the Triton backend's first call and of its work per call.

    python -m bench.triton_host --arch 90

Everything but the GPU's part is real: kernels are compiled for the architecture, but loading them and the C function
that launches them are replaced by functions that do nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench import jobs
from esr_kernels import cases, optimize
from esr_kernels.library import run_plan_outputs
from esr_kernels.timing import alternate, table, write_json

MODELS = ("span", "rlfn")
DTYPES = ("float16", "bfloat16", "tf32", "float32")
ARCHITECTURES = (80, 86, 89, 90)
CASE = "conv3x3 rlfn 48>46 leaky_relu post"


def compile_network(model: str, name: str, arch: int, limit: float, most: int | None = None) -> None:
    """Print, as the last line, what compiling a network in this process took.

    Args:
        limit: seconds after which no further kernel is begun.
        most: kernels to compile at most; None: all.
    """
    from triton.backends.compiler import GPUTarget

    from esr_kernels.backends.triton import resources

    launches = resources.model_launches(arch, name, (model,))
    start, before = time.perf_counter(), os.times()
    compiled = 0
    for item in launches[:most]:
        if time.perf_counter() - start > limit:
            break
        item.kernel.compile(GPUTarget("cuda", arch, 32), item.args)
        compiled += 1
    seconds, cpu = time.perf_counter() - start, sum(os.times()[:4]) - sum(before[:4])
    print(json.dumps({"kernels": len(launches), "compiled": compiled, "seconds": seconds, "cpu_seconds": cpu}))


def compile_times(models: Sequence[str], names: Sequence[str], arch: int, limit: float) -> dict[str, dict[str, Any]]:
    """Compiling in a new process, with Triton's cache empty and filled, by network and dtype.

    Nothing is begun after `limit` seconds of a network; with the cache filled the same kernels are compiled.
    """
    found: dict[str, dict[str, Any]] = {}
    for model in models:
        for name in names:
            record = found[f"{model} {name}"] = {}
            most = None
            with tempfile.TemporaryDirectory() as folder:
                for cache in ("empty", "filled"):
                    arguments = f"{model!r}, {name!r}, {arch}, {limit}, {most}"
                    code = f"from bench.triton_host import compile_network; compile_network({arguments})"
                    finished = jobs.run_command(
                        [sys.executable, "-c", code], 600 + limit, environment={"TRITON_CACHE_DIR": folder}
                    )
                    if finished.returncode != 0:
                        raise RuntimeError("\n".join([f"status {finished.returncode}", *finished.tail[-10:]]))
                    record[cache] = json.loads(finished.tail[-1])
                    most = record[cache]["compiled"]
    return found


def nothing(*args: object) -> None:
    """Instead of a launch."""


class StandIn:
    """Triton's driver of a GPU that is not here: loads nothing and launches nothing."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)
        self.utils = SimpleNamespace(
            load_binary=lambda *args: (None, 0, 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        )

    def launcher_cls(self, *args: object) -> Callable[..., None]:
        return nothing

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def stand_in(arch: int) -> None:
    """From here on in this process Triton and this backend take CPU tensors for those of a GPU."""
    from triton.runtime import driver

    from esr_kernels.backends.triton import configs

    capability = divmod(arch, 10)
    driver.set_active(StandIn(arch))
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: capability
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    configs._device = lambda: (f"sm_{arch}", capability)


def by_triton(call: Callable[[], object]) -> Callable[[], None]:
    """The call, with every kernel launched as `function[grid](...)` instead of by `launch.Kernel`."""
    from esr_kernels.backends.triton import launch

    def start(self: Any, grid: tuple[int, int], *args: Any) -> None:
        options = {"maxnreg": self.registers} if self.registers else {}
        self.function[grid[0], grid[1], 1](*args, *self.constants, num_warps=self.num_warps, **options)

    def run() -> None:
        ours = launch.Kernel.__call__
        launch.Kernel.__call__ = start  # type: ignore[method-assign]
        try:
            call()
        finally:
            launch.Kernel.__call__ = ours  # type: ignore[method-assign]

    return run


def host_times(models: Sequence[str], arch: int, seconds: float) -> dict[str, dict[str, float]]:
    """Seconds of host time per call, by what is called and how its kernels are launched; changes this process."""
    from esr_kernels.backends import triton as backend
    from esr_kernels.backends.triton.conv3x3 import conv3x3
    from esr_kernels.backends.triton.run_plan import PreparedPlan

    stand_in(arch)
    dtype = torch.float16
    called: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {}  # recorded, each launch anew
    for model in models:
        fast = optimize(cases.model_pair(model)[0], dtype=dtype)
        weights, text = [getattr(fast, name) for name in fast._weight_names], fast.plan.to_json()
        plan = PreparedPlan(fast.plan, weights, dtype, torch.device("cpu"))
        inputs = [torch.zeros(1, 3, 64, 64, dtype=dtype)]
        outputs = run_plan_outputs(inputs, weights, text)
        called[f"{model}'s plan"] = (
            lambda plan=plan, i=inputs, o=outputs: plan.execute(i, o),
            lambda plan=plan, i=inputs, o=outputs: plan._run(i, o),
        )
    case = next(case for case in cases.CASES if case.name == CASE)
    arguments = case.arguments(1, 64, 64, dtype=dtype, memory_format=torch.channels_last)
    x, weight, bias, residual = (arguments[name] for name in ("x", "weight", "bias", "residual"))
    values = (x, weight, bias, residual, "leaky_relu", 0.05, "post")
    short = backend.call("conv3x3")
    called["conv3x3"] = (lambda: short(*values), lambda: conv3x3.__wrapped__(*values))
    found = {}
    with torch.inference_mode():
        for name, (recorded, anew) in called.items():
            ways = {"recorded": recorded, "each anew": anew, "by Triton": by_triton(anew)}
            timings = alternate(ways, rounds=200, warmup=3, budget=seconds, sample_time=0.01)
            found[name] = {way: timing.median for way, timing in timings.items()}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.triton_host", description=__doc__)
    parser.add_argument("--arch", type=int, choices=ARCHITECTURES, default=90, help="default: 90")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, default=list(DTYPES), help="to compile; default: all")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds for compiling a network (default: 30)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for the times of each call (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    options = parser.parse_args(argv)
    from esr_kernels.backends.triton import interpreted

    if interpreted():
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    compiled = compile_times(options.models, options.dtype, options.arch, options.limit)
    rows = []
    for name, r in compiled.items():
        done, kernels = r["empty"]["compiled"], r["empty"]["kernels"]
        times = (f"{r[c][k]:.2f}" for c in r for k in ("seconds", "cpu_seconds"))
        rows.append([name, str(kernels) if done == kernels else f"{done} of {kernels}", *times])
    if rows:
        headers = ["network", "kernels", "cache empty, s", "CPU s", "filled, s", "CPU s"]
        print(table(headers, rows), end="\n\n")
    host = host_times(options.models, options.arch, options.seconds)
    ways = list(next(iter(host.values())))
    print(
        table(
            ["host time per call, us", *ways], [[n, *(f"{t * 1e6:.0f}" for t in h.values())] for n, h in host.items()]
        )
    )
    if options.json is not None:
        write_json(options.json, {"arch": options.arch, "compile": compiled, "host": host})
    return 0


if __name__ == "__main__":
    sys.exit(main())
