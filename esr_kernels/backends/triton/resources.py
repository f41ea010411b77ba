"""What the kernels need of a GPU, without one: every launch of an operator compiled ahead of time.

    python -m esr_kernels.backends.triton.resources --arch 90 --json resources.json

`collect` runs operators without launching anything and keeps what they would have launched; `inspect` compiles one such
launch and reads registers and spills out of the binary, instructions out of its PTX: disassembling takes as long as
compiling.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from ... import dispatch
from ...cases import CASES, OperatorCase, model_pair
from ...library import ACTIVATIONS
from ...optimize import optimize
from ...plan import STATISTICS
from ...timing import write_json
from . import _MODULES, _pointwise, _resize, adaptive_max_pool, call, configs, launch, maps, modulate, statistic

FUSED_CASES = tuple(case for case in CASES if case.operator in _MODULES)
ARCHITECTURES = (80, 86, 89, 90)
# Shared memory that one program can have, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
SHARED_TOTAL = {80: 164 * 1024, 86: 100 * 1024, 89: 100 * 1024, 90: 228 * 1024}  # of a multiprocessor
MAXIMUM_WARPS = {80: 64, 86: 48, 89: 48, 90: 64}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
Choice = Callable[[str], configs.Config | None]
_TENSOR_CORE = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async)\b")
_ASYNC_COPY = re.compile(r"\bcp\.async\.c[ag]\b")


@dataclass(frozen=True)
class Launch:
    """One kernel that an operator would launch.

    Attributes:
        operator: what asked for it.
        kernel: the kernel with its compile-time arguments.
        args: its runtime arguments; tensors on the meta device.
        config: key of its configuration, None where it has no choice.
    """

    operator: str
    kernel: launch.Kernel
    args: tuple[Any, ...]
    config: str | None

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for launches that compile to the same binary."""
        types = tuple(a.dtype if isinstance(a, Tensor) else type(a) for a in self.args)
        kernel = self.kernel
        return kernel.function.__name__, kernel.constants, kernel.num_warps, kernel.registers, types


@dataclass(frozen=True)
class Resources:
    """A compiled kernel.

    Attributes:
        operator, kernel, config: what was compiled.
        warps: of one program.
        arch: such as 90.
        registers: per thread.
        spilled: bytes of local memory per thread.
        shared: bytes per program.
        tensor_core: matrix instructions.
        async_copies: asynchronous copies to shared memory.
        dots: whether the kernel has matrix products.
        seconds: of CPU time that compiling took; next to nothing where Triton's cache had it.
    """

    operator: str
    kernel: str
    config: str
    warps: int
    arch: int
    registers: int
    spilled: int
    shared: int
    tensor_core: int
    async_copies: int
    dots: bool
    seconds: float

    @property
    def resident_warps(self) -> int:
        """Warps that one multiprocessor holds at once, as far as registers and shared memory decide."""
        programs = min(
            65536 // (-(-self.registers // 8) * 8 * 32 * self.warps),
            SHARED_TOTAL[self.arch] // (self.shared + 1024),
            MAXIMUM_WARPS[self.arch] // self.warps,
        )
        return programs * self.warps

    @property
    def problem(self) -> str | None:
        if self.spilled:
            return f"spills {self.spilled} bytes"
        if self.shared > SHARED_LIMIT[self.arch]:
            return f"needs {self.shared} bytes of shared memory, the limit is {SHARED_LIMIT[self.arch]}"
        if self.dots and not self.tensor_core:
            return "has no tensor-core instruction"
        return None


@contextmanager
def collect(operator: str, arch: int, config: Choice | None = None) -> Iterator[list[Launch]]:
    """Inside, operators run on this backend on CPU tensors, and their launches are listed instead of being executed.

    Args:
        operator: their name in the list.
        arch: of the GPU whose configurations they take.
        config: maps a configuration's key to the one to take, None to the usual choice.
    """
    found: list[Launch] = []
    last: str | None = None

    def choose(key: str) -> configs.Config | None:
        nonlocal last
        last = key
        return None if config is None else config(key)

    def keep(self: launch.Kernel, grid: tuple[int, int], *args: Any) -> None:
        nonlocal last
        meta = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
        found.append(Launch(operator, self, meta, last))
        last = None

    with (
        _replaced(launch.Kernel, "__call__", keep),
        _replaced(launch, "interpreted", lambda: True),  # no recording of launches that do not happen
        _replaced(configs, "_device", lambda: (f"sm_{arch}", divmod(arch, 10))),
        _replaced(dispatch, "run", lambda name, args: call(name)(*args)),
        configs.chosen_by(choose),
    ):
        yield found


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def inspect(item: Launch, arch: int) -> Resources:
    """Compile a launch for an architecture and read the binary."""
    before = os.times()
    compiled = item.kernel.compile(GPUTarget("cuda", arch, 32), item.args)
    seconds = sum(os.times()[:4]) - sum(before[:4])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [_tool("cuobjdump"), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert counts is not None, usage
    constants = _constants(item)
    shape = f"{constants['TILE_H']}x{constants['TILE_W']}" if "TILE_H" in constants else ""
    if "RESULTS" in constants:
        shape = f"{constants['RESULTS']} of {constants['ROWS']}x{constants['COLUMNS']}"
    if "LANES" in constants:
        shape = f"{constants['BLOCK']} of {constants['LANES']}"
    shape = shape or str(constants.get("PIXELS", constants.get("BLOCK", "")))
    stages = constants.get("PIPELINE", 1)
    config = f"{shape}, {item.kernel.num_warps} warps" + (f", {stages} stages" if stages > 1 else "")
    config += f", {item.kernel.registers} registers at most" if item.kernel.registers else ""
    return Resources(
        item.operator,
        item.kernel.function.__name__,
        config,
        item.kernel.num_warps,
        arch,
        int(counts[1]),
        int(counts[2]) + int(counts[3]),
        compiled.metadata.shared,
        len(_TENSOR_CORE.findall(compiled.asm["ptx"])),
        len(_ASYNC_COPY.findall(compiled.asm["ptx"])),
        "tt.dot" in compiled.asm["ttir"],
        seconds,
    )


# --- what is compiled -------------------------------------------------------------------------------------------------


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def layouts(case: OperatorCase) -> tuple[torch.memory_format, ...]:
    """The memory formats in which an operator has kernels of its own; others differ in the strides only."""
    planes = case.operator in ("depthwise_conv", "adaptive_max_pool", "modulate")
    return (torch.channels_last, torch.contiguous_format) if planes else (torch.channels_last,)


def case_launches(
    case: OperatorCase,
    arch: int,
    name: str,
    *,
    backward: bool,
    layout: torch.memory_format = torch.channels_last,
    config: Choice | None = None,
) -> list[Launch]:
    """The launches of an operator case in one dtype of `DTYPES`; with `backward` those of its gradients too."""
    # Windows are as large as in the networks' images; other kernels are the same for any size.
    side = 256 if case.operator == "adaptive_max_pool" else 16
    arguments = case.arguments(1, side, side, dtype=DTYPES[name], memory_format=layout)
    with tf32(name == "tf32"), collect(f"{case.name} {name}", arch, config) as launches:
        if backward:
            out = case.fused({k: _leaf(v) for k, v in arguments.items()})
            out.backward(torch.empty_like(out))
        else:
            case.fused(arguments)
    return launches


def operator_launches(arch: int, name: str, *, config: Choice | None = None) -> list[Launch]:
    """The launches of every operator case and its gradients, each once."""
    return unique(
        [
            item
            for case in FUSED_CASES
            for layout in layouts(case)
            for item in case_launches(case, arch, name, backward=True, layout=layout, config=config)
        ]
    )


def _leaf(value: Tensor | list[Tensor]) -> Any:
    return value.requires_grad_() if isinstance(value, Tensor) else [t.requires_grad_() for t in value]


def unique(launches: list[Launch]) -> list[Launch]:
    """One launch for each binary."""
    return list({item.key: item for item in reversed(launches)}.values())[::-1]


def model_launches(
    arch: int, name: str, models: Sequence[str] = ("span", "rlfn"), *, config: Choice | None = None
) -> list[Launch]:
    """The launches of whole networks as plans, in one dtype of `DTYPES`, each once."""
    dtype = DTYPES[name]
    found: list[Launch] = []
    with tf32(name == "tf32"), torch.no_grad():
        for model in models:
            fused = optimize(model_pair(model)[0], dtype=dtype)
            with collect(f"{model} {name}", arch, config) as launches:
                fused(torch.zeros(1, 3, 32, 32, dtype=dtype))
            found += launches
    return unique(found)


# What a plan computes of every element.
_OPERATIONS = (
    *("add", "multiply", "normalize", "clamp", "sigmoid", "hardswish", "mish", "rsqrt"),
    *(activation for activation in ACTIVATIONS if activation != "none"),
)

# Channels and pitches of a plan's maps: buffers with padding and without, and images.
_PLAN_MAPS = ((36, 48), (48, 48), (3, 0))


def plan_launches(arch: int, name: str, *, config: Choice | None = None) -> list[Launch]:
    """The launches of what only plans compute, sums, products, functions, enlargements and statistics, and of pooling
    and modulation with results in their buffers."""
    dtype = DTYPES[name]

    def buffer(channels: int, pitch: int, side: int) -> maps.Map:
        return maps.Map(torch.zeros(1, side * side * (pitch or channels), dtype=dtype), pitch, 0, channels, side, side)

    with collect(f"plan {name}", arch, config) as launches:
        for channels, pitch in _PLAN_MAPS:
            x = buffer(channels, pitch, 16)
            for mode in ("nearest", "bilinear", "bicubic"):
                table = _resize.tap_table(mode, 2, torch.device("cpu"))
                _resize.enlarge(x, table, buffer(channels, pitch, 32))
            for operation in _OPERATIONS:
                if operation in ("add", "multiply"):
                    one = buffer(1, pitch and 16, 16)
                    _pointwise.combine(x, x, operation, x)
                    _pointwise.combine(x, one, operation, x)
                else:
                    _pointwise.apply(x, operation, torch.zeros(2, channels), x)
            # What has one pixel, or is pooled, lies in a buffer.
            padded = maps.padded(channels)
            pixel, small = (buffer(channels, padded, side) for side in (1, 4))
            _pointwise.combine(x, pixel, "add", x, one_pixel=True)
            _pointwise.combine(x, buffer(1, 16, 1), "add", x, one_pixel=True)
            for kind in STATISTICS:
                statistic.compute(x, pixel, kind, 0)
            for count in (1, 4):
                for mode, activation in (("nearest", "none"), ("nearest", "gelu"), ("bilinear", "gelu")):
                    gates = [x, small, small, small][-count:]
                    modulate.apply(x, gates, x, bilinear=mode == "bilinear", activation=activation, slope=0.0)
            # Windows of networks' images.
            image = buffer(channels, pitch, 128)
            for divisor in (4, 8, 16):
                adaptive_max_pool.pool(image, buffer(channels, padded, 128 // divisor))
    return unique(launches)


def networks(arch: int) -> list[Launch]:
    """The launches of whole networks in every dtype, with their shipped configurations."""
    return [item for name in DTYPES for item in model_launches(arch, name)]


def shipped(arch: int, *, quick: bool = False) -> list[Launch]:
    """Networks, operators, their gradients and plans' functions in every dtype, with their shipped configurations.

    With `quick` networks in float16, and of operators and gradients in float16 and float32 each kernel with each of its
    tiles once per mode, on most channels. Where the instructions are those of another architecture, SPAN in float16 and
    each kernel once per mode.
    """
    if not quick:
        alone = [item for name in DTYPES for item in operator_launches(arch, name) + plan_launches(arch, name)]
        return unique(networks(arch) + alone)
    alone = operator_launches(arch, "float16") + plan_launches(arch, "float16")
    if arch in _LIKE:
        return unique(model_launches(arch, "float16", ("span",)) + _demanding(alone))
    groups: dict[Any, list[Launch]] = {}
    for item in alone + operator_launches(arch, "float32"):
        kind = item.config and (item.config.rpartition("/")[0], item.kernel.num_warps, *_tile(item))
        groups.setdefault(kind, []).append(item)
    found = model_launches(arch, "float16")
    return unique(found + [item for group in groups.values() for item in _demanding(group)])


def _constants(item: Launch) -> dict[str, Any]:
    names = item.kernel.function.arg_names[len(item.kernel.runtime) :]
    return dict(zip(names, item.kernel.constants, strict=True))


def _tile(item: Launch) -> tuple[Any, ...]:
    names = ("TILE_H", "TILE_W", "PIXELS", "PIPELINE", "RESULTS", "ROWS", "COLUMNS", "LANES")
    return tuple(_constants(item).get(name) for name in names)


# --- configurations from resources ------------------------------------------------------------------------------------

# In the order of preference; the first with enough resident warps to hide latency wins.
_CANDIDATES: dict[str, tuple[configs.Config, ...]] = {
    # Pipelined first: unrolled, float32 takes the compiler ten times as long. No 8 warps before a GPU has tested them.
    "convolution": (
        configs.Config((8, 16), 4, 2),
        configs.Config((4, 16), 4, 2),
        configs.Config((4, 16), 4, 3),
        configs.Config((4, 16), 4, 2, 255),
        configs.Config((2, 16), 4, 2),
        configs.Config((2, 16), 4, 2, 255),
        configs.Config((2, 16), 4, 1),
    ),
    "weight_gradient": tuple(
        configs.Config(tile, 4, pipeline) for pipeline in (2, 1) for tile in ((4, 16), (2, 16), (1, 16))
    ),
    "conv1x1": tuple(configs.Config((1, pixels), 4, pipeline) for pipeline in (1, 2) for pixels in (128, 64, 32)),
    "esa_reduce": (configs.Config((4, 8), 4, 1), configs.Config((4, 4), 4, 1), configs.Config((4, 4), 4, 2)),
    "esa_gate": tuple(configs.Config((1, pixels), 4, 1) for pixels in (64, 32, 16)),
    "depthwise": (
        configs.Config((4, 16), 4, 1),
        configs.Config((4, 16), 4, 1, 255),
        configs.Config((2, 16), 4, 1),
        configs.Config((2, 16), 4, 1, 255),
    ),
    "depthwise_planes": tuple(
        configs.Config(tile, 4, 1, registers) for tile in ((8, 64), (4, 64)) for registers in (0, 255)
    ),
    "depthwise_gradient": tuple(
        configs.Config(tile, 4, 1, registers) for tile in ((2, 16), (1, 16)) for registers in (0, 255)
    ),
    "depthwise_gradient_planes": tuple(
        configs.Config(tile, 4, 1, registers) for tile in ((4, 64), (2, 64)) for registers in (0, 255)
    ),
    "layer_norm": tuple(configs.Config((1, pixels), 4, 1) for pixels in (32, 16)),
    "layer_norm_gradient": tuple(configs.Config((1, pixels), 4, 1) for pixels in (32, 16)),
    "adaptive_max_pool": tuple(configs.Config((64, results), 4, 1) for results in (16, 8)),
    "adaptive_max_pool_gradient": tuple(configs.Config((4, elements), 4, 1) for elements in (128, 64)),
    "modulate": tuple(configs.Config((4, elements), 4, 1) for elements in (128, 64)),
    "modulate_gradient": tuple(configs.Config((4, elements), 4, 1) for elements in (128, 64)),
    "resize_gradient": tuple(configs.Config((lanes, 8), 4, 1) for lanes in (64, 16)),
    "statistic": tuple(configs.Config((lanes, 16), 4, 1) for lanes in (64, 32)),
}
_ENOUGH_WARPS = 8


def _demanding(launches: Sequence[Launch]) -> list[Launch]:
    """Those that stand for the others: one of each mode, with a residual and a second result where there is one, and
    of these the one with most channels."""

    def demand(item: Launch) -> tuple[Any, ...]:
        c = _constants(item)
        channels = c.get("CHANNELS", 0) * c.get("OUT_CHANNELS", 1)
        return c.get("RESIDUAL", "none") != "none", bool(c.get("SECOND")), channels if type(channels) is int else 0

    found: dict[Any, Launch] = {}
    for item in sorted(launches, key=demand):
        function = item.kernel.function  # two modules have a `reduce_kernel`
        constants = _constants(item)
        mode = constants.get("MODE", constants.get("OPERATION"))
        found[function.__module__, function.__name__, mode] = item
    return list(found.values())


def _resident_warps(launches: Sequence[Launch], arch: int) -> int | None:
    """The fewest that any of the launches leaves, `_ENOUGH_WARPS` at most; None: one of them has a problem."""
    warps = _ENOUGH_WARPS
    demanding = _demanding(launches)
    first = {item.key for item in demanding}
    for item in demanding + [item for item in launches if item.key not in first]:
        found = inspect(item, arch)
        if found.problem:
            return None
        warps = min(warps, found.resident_warps)
    return warps


def select(
    arch: int, name: str, log: Callable[[str], None] = print, kernels: Sequence[str] = ()
) -> dict[str, configs.Config]:
    """For every configuration key of a dtype the most preferred candidate without a problem in any of its kernels.

    `kernels` are those that the keys begin with, in single operators and plans' layers; none: all, in networks too.
    """
    found: dict[str, configs.Config] = {}
    by_candidate: list[dict[str, list[Launch]]] = []
    for i in range(max(len(options) for kernel, options in _CANDIDATES.items() if not kernels or kernel in kernels)):

        def candidate(key: str, i: int = i) -> configs.Config:
            options = _CANDIDATES[key.partition("/")[0]]
            return options[min(i, len(options) - 1)]

        launches: dict[str, list[Launch]] = {}
        items = operator_launches(arch, name, config=candidate) + plan_launches(arch, name, config=candidate)
        if not kernels:
            items = model_launches(arch, name, config=candidate) + items
        for item in unique(items):
            if item.config is not None and (not kernels or item.config.partition("/")[0] in kernels):
                launches.setdefault(item.config, []).append(item)
        by_candidate.append(launches)
    for key in sorted(set().union(*by_candidate)):
        options = _CANDIDATES[key.partition("/")[0]]
        best: tuple[int, configs.Config] | None = None
        for option, launches in zip(options, by_candidate, strict=False):
            warps = _resident_warps(launches[key], arch)
            if warps is None:
                continue
            if best is None or warps > best[0]:
                best = warps, option
            if best[0] == _ENOUGH_WARPS:
                break
        if best is None:
            log(f"sm_{arch} {key}: every candidate has a problem")
            continue
        found[key] = best[1]
        log(f"sm_{arch} {key}: {best[1]}, {best[0]} resident warps at least")
    return found


# Architectures with the instructions of another and at least its shared memory.
_LIKE = {80: 86, 89: 86}


def write(arch: int, folder: Path, log: Callable[[str], None] = print, kernels: Sequence[str] = ()) -> None:
    """Write `sm_<arch>.json`, the configurations of GPUs that nobody has measured yet, and those of its like.

    With `kernels` only theirs are chosen; the others stay what the file says. Where an architecture has a configuration
    of its own in place of one that is chosen again, it keeps it.
    """
    paths = {a: folder / f"sm_{a}.json" for a in (arch, *(a for a, like in _LIKE.items() if like == arch))}
    before = {a: configs.read(path)["configurations"] if path.is_file() else {} for a, path in paths.items()}
    table: dict[str, Any] = dict(before[arch]) if kernels else {}
    for name in DTYPES:
        for key, config in select(arch, name, log, kernels).items():
            table[key] = configs.entry(config)
    for same, path in paths.items():
        chosen = before[arch]
        own = {k: c for k, c in before[same].items() if c != chosen.get(k) and k in table and table[k] == chosen.get(k)}
        data = {
            "device": f"sm_{same}",
            "capability": list(divmod(same, 10)),
            "measured": False,
            "triton": triton.__version__,
            "configurations": dict(sorted((table | own).items())),
        }
        write_json(path, data)


def markdown(results: Sequence[Resources]) -> str:
    """The resource table of `docs/gpu.md`: the largest of every operator, kernel and configuration."""
    largest: dict[Any, Resources] = {}
    for r in sorted(results, key=lambda r: (r.spilled, r.registers, r.shared)):
        largest[r.operator, r.kernel, r.config, r.arch] = r
    lines = [
        "| operator | kernel | tile, warps | sm | registers | spilled, bytes | shared, KiB | warps/SM |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in dict.fromkeys(largest[r.operator, r.kernel, r.config, r.arch] for r in results):
        lines.append(
            f"| {r.operator} | {r.kernel.removesuffix('_kernel')} | {r.config} | {r.arch} | {r.registers} | "
            f"{r.spilled} | {r.shared / 1024:.0f} | {r.resident_warps} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m esr_kernels.backends.triton.resources", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--select", type=Path, metavar="FOLDER", help="choose configurations and write them there")
    parser.add_argument(
        "--kernels", nargs="+", choices=list(_CANDIDATES), default=[], help="with --select: only these; default: all"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/gpu.md")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="fewer: each kernel with each of its tiles once per mode")
    which.add_argument("--networks", action="store_true", help="networks only, without single operators")
    options = parser.parse_args(argv)
    if options.select is not None:
        for arch in set(options.arch) - set(_LIKE):
            write(arch, options.select, kernels=options.kernels)
        return 0
    results = []
    for arch in options.arch:
        for item in networks(arch) if options.networks else shipped(arch, quick=options.quick):
            r = inspect(item, arch)
            results.append(r)
            if not options.markdown:
                print(
                    f"sm_{arch} {r.operator}: {r.kernel} {r.config}: {r.registers} registers, {r.shared} bytes shared, "
                    f"compiled in {r.seconds:.1f} s{', ' + r.problem if r.problem else ''}",
                    flush=True,
                )
    spilling = sum(r.spilled > 0 for r in results)
    print(
        f"{len(results)} kernels compiled in {sum(r.seconds for r in results):.0f} s, {spilling} spill", file=sys.stderr
    )
    if options.markdown:
        print(markdown(results))
    if options.json is not None:
        write_json(options.json, [asdict(r) | {"problem": r.problem} for r in results])
    return 1 if any(r.problem for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
