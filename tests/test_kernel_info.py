"""What the CUDA kernels need of a GPU: what is written down while compiling, and the limits it has to keep to."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from esr_kernels import native
from esr_kernels.backends.native import resources
from esr_kernels.cli import main
from esr_kernels.errors import BackendError

ROOT = Path(__file__).resolve().parent.parent
MOST_BYTES = 30 << 20  # of the library
HOPPER = "9.0a"  # what csrc/cuda/*_sm90a.cu are compiled for
WGMMA = {
    f"wgmma_kernel<{precision}, {n}, {variant}>"
    for precision in ("Float16", "BFloat16")
    for n in range(1, 9)
    for variant in ("forward", "tail")
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nvcc_resources", ROOT / "csrc" / "nvcc_resources.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---------------------------------------------------------------------------------------------------------------------
# While compiling

LOG = """\
ptxas info    : 77 bytes gmem, 8 bytes cmem[4]
ptxas info    : (C7519) warpgroup.arrive is injected in around line 7 by compiler to allow use of registers in GMMA
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_86'
ptxas info    : Function properties for _Z1aPf
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 308 bytes smem, 400 bytes cmem[0]
ptxas info    : Function properties for _Z6calledf
    4 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Compile time = 1.862 ms
kernels.cu(7): warning #177-D: variable "unused" was declared but never referenced
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_100a'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
ptxas warning : Value of threads per SM for entry _Z1bPf is out of range
"""
PTX = """\
.target sm_86
.visible .entry _Z1aPf(
	.param .u64 _Z1aPf_param_0
)
.maxntid 128, 2, 1
.minnctapersm 3
{
	ret; // .entry _Z1xPf()
}
.entry _Z1bPf() { ret; }
"""


def test_the_log_of_ptxas(script: ModuleType) -> None:
    kernels, rest = script.split_log(LOG)
    names = ("symbol", "architecture", "registers", "stack_bytes", "spilled_bytes", "static_shared_bytes")
    assert [tuple(k[n] for n in names) for k in kernels] == [
        ("_Z1aPf", "8.6", 40, 20, 12, 308),
        ("_Z1bPf", "10.0a", 255, 0, 0, 0),
    ]
    # Nothing that somebody should read is lost.
    assert [line[:20] for line in rest.splitlines()] == ["kernels.cu(7): warni", "ptxas warning : Valu"]


def test_the_bounds_in_ptx(script: ModuleType) -> None:
    assert script.launch_bounds(PTX) == (86, {"_Z1aPf": (256, 3), "_Z1bPf": (None, 1)})


def test_bounds_are_those_of_the_architecture(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for nvcc writes PTX for two architectures, and machine code of three from it."""
    monkeypatch.chdir(tmp_path)
    entry = ".target sm_{}\n.entry _Z1aPf() .maxntid {}, 1, 1 .minnctapersm {} {{ ret; }}\n"
    (tmp_path / "80.ptx").write_text(entry.format(80, 256, 1))
    (tmp_path / "90.ptx").write_text(entry.format(90, 128, 4))
    log = "ptxas info : Compiling entry function '_Z1aPf' for 'sm_{}'\nptxas info : Used 40 registers\n"
    (tmp_path / "log").write_text("".join(log.format(a) for a in ("80", "86", "90a")))
    assert script.main(["compile", "a.o", "sh", "-c", "cp 80.ptx 90.ptx a.o.kept && cat log"]) == 0
    kernels = json.loads((tmp_path / "a.o.json").read_text())
    assert [(k["architecture"], k["threads"], k["minimum_blocks"]) for k in kernels] == [
        ("8.0", 256, 1),
        ("8.6", 256, 1),
        ("9.0a", 128, 4),
    ]
    assert not (tmp_path / "a.o.kept").exists()


def test_the_table_holds_each_kernel_once(script: ModuleType, tmp_path: Path) -> None:
    kernels, _ = script.split_log(LOG)
    for name, some in (("a.o", kernels[:1]), ("b.o", kernels), ("none.o", [])):
        (tmp_path / f"{name}.json").write_text(json.dumps(some))
    objects = [str(tmp_path / name) for name in ("a.o", "b.o", "none.o", "missing.o")]
    text = "".join(json.loads(line) for line in re.findall(r'"(?:[^"\\]|\\.)*"', script.table_source(objects, {}))[1:])
    assert json.loads(text) == kernels
    output = tmp_path / "table.cpp"
    assert script.main(["table", str(output), *objects]) == 0
    before = output.stat().st_mtime_ns
    assert script.main(["table", str(output), *objects]) == 0
    assert output.stat().st_mtime_ns == before, "ninja compiles what is written anew"
    assert '"[" "]"' in re.sub(r"\s+", " ", script.table_source([], {}))


def test_an_architecture_with_anothers_code_is_listed_like_it(script: ModuleType, tmp_path: Path) -> None:
    kernels, _ = script.split_log(LOG)
    (tmp_path / "a.o.json").write_text(json.dumps(kernels))
    output = tmp_path / "table.cpp"
    assert script.main(["table", str(output), "--same=8.9=8.6", str(tmp_path / "a.o")]) == 0
    lines = [json.loads(line) for line in re.findall(r'"(?:[^"\\]|\\.)*"', output.read_text())[1:]]
    first, second = kernels
    assert json.loads("".join(lines)) == [first, {**first, "architecture": "8.9"}, second]


def test_one_machine_code_serves_two_architectures(tmp_path: Path) -> None:
    """What setup.py does not make twice is the same to the bit, here for one source."""
    nvcc, tool = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin"), cuobjdump()
    if nvcc is None or tool is None:
        pytest.skip("nvcc or cuobjdump is missing")
    output = str(tmp_path / "kernels.o")
    gencode = [f"-gencode=arch=compute_80,code=sm_{number}" for number in (80, 86, 89)]
    source = str(ROOT / "csrc" / "cuda" / "convolution_float16.cu")
    subprocess.run(
        [nvcc, "-std=c++20", "-O3", "--expt-relaxed-constexpr", *gencode, "-c", source, "-o", output], check=True
    )
    code = {}
    for number in (80, 86, 89):
        done = subprocess.run([tool, "-sass", "-arch", f"sm_{number}", output], capture_output=True, text=True)
        code[number] = re.findall(r"/\* (0x[0-9a-f]{16}) \*/", done.stdout)
    if not code[86]:
        pytest.skip(f"{tool} does not read what this nvcc makes")
    assert code[86] == code[89]
    assert code[80] != code[86], "other architectures need code of their own"


def test_a_failing_compiler_leaves_its_message_and_no_list(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert script.main(["compile", "a.o", "sh", "-c", "echo ptxas fatal; exit 3"]) == 3
    assert "ptxas fatal" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Names and occupancy


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            "void esr::cuda::convolution_kernel<esr::cuda::Float16, 4, (esr::cuda::Variant)2>(esr::cuda::Args)",
            "convolution_kernel<Float16, 4, tail>",
        ),
        ("esr::cuda::(anonymous namespace)::pack_kernel(esr::cuda::PackArgs)", "pack_kernel"),
        (
            "void esr::cuda::(anonymous namespace)::low_kernel<__half, false>(esr::cuda::LowArgs)",
            "low_kernel<float16, false>",
        ),
        (
            "void esr::cuda::(anonymous namespace)::f<float, __nv_bfloat16>(esr::cuda::(anonymous namespace)::Args)",
            "f<float, bfloat16>",
        ),
        ("_Z3odd", "_Z3odd"),
    ],
)
def test_readable_names(name: str, short: str) -> None:
    assert resources.readable(name) == short


@pytest.mark.parametrize(
    ("launch", "precision", "kernel"),
    [
        (("convolution_tf32x3_tail", 3), "tf32x3", "convolution_kernel<Tf32x3, 3, tail>"),
        (("convolution_float16", 8), "float16", "convolution_kernel<Float16, 8, forward>"),
        (("esa_gate", 4), "tf32", "gate_kernel<Tf32, 4>"),
        (("esa_low", 1), "tf32x3", "low_kernel<float, true>"),
        (("weight_gradient_bfloat16", 0), "bfloat16", "weight_gradient_kernel<BFloat16>"),
        (("weight_gradient_sum", 0), "bfloat16", "sum_kernel"),
        (("pack", 0), "float16", "pack_kernel"),
        (("convolution_float16_half_sums", 4), "float16", "convolution_kernel<Float16, 4, half_sums>"),
        (("spab_float16", 4), "float16", "spab_kernel<Float16, 4>"),
        (("spab_large_bfloat16", 5), "bfloat16", "spab_large_kernel<BFloat16, 5>"),
        (("chain_float16", 4), "float16", "chain_kernel<Float16, 4>"),
        (("clear_flags", 0), "bfloat16", "clear_flags_kernel"),
        (("winograd_float16", 3), "float16", "winograd_kernel<Float16, 3>"),
        (("winograd_pack", 0), "float16", "winograd_pack_kernel"),
        (("wgmma_bfloat16", 4), "bfloat16", "wgmma_kernel<BFloat16, 4, forward>"),
        (("wgmma_float16_tail", 6), "float16", "wgmma_kernel<Float16, 6, tail>"),
        (("wgmma_pack", 0), "float16", "wgmma_pack_kernel"),
        (("depthwise", 1), "bfloat16", "depthwise_kernel<bfloat16, true>"),
        (("depthwise_gradient", 0), "tf32", "depthwise_gradient_kernel<float>"),
        (("adaptive_max_pool", 1), "float16", "adaptive_max_pool_kernel<float16, true>"),
        (("adaptive_max_pool_gradient", 0), "float16", "adaptive_max_pool_gradient_kernel<float16>"),
        (("statistic_parts", 1), "tf32", "statistic_parts_kernel<float, 1>"),
        (("statistic", 2), "bfloat16", "statistic_kernel<bfloat16, 2>"),
    ],
)
def test_the_kernel_of_a_launch(launch: tuple[str, int], precision: str, kernel: str) -> None:
    others = [
        "convolution_kernel<Float16, 8, backward>",
        "convolution_kernel<BFloat16, 8, forward>",
        "convolution_kernel<Tf32, 3, tail>",
        "convolution_kernel<Tf32x3, 4, tail>",
        "gate_kernel<Tf32, 2>",
        "low_kernel<float, false>",
        "weight_gradient_kernel<Tf32>",
        "spab_kernel<BFloat16, 5>",
        "spab_large_kernel<Float16, 4>",
        "winograd_kernel<BFloat16, 3>",
        "wgmma_kernel<BFloat16, 4, tail>",
        "wgmma_kernel<Float16, 6, forward>",
        "chain_kernel<Float16, 5>",
        "esa_pack_kernel",
        "depthwise_kernel<bfloat16, false>",
        "depthwise_gradient_kernel<float16>",
        "adaptive_max_pool_kernel<float16, false>",
        "adaptive_max_pool_gradient_kernel<bfloat16>",
        "statistic_parts_kernel<float, 0>",
        "statistic_kernel<bfloat16, 1>",
    ]
    found = resources.Launch(*launch, threads=256, rows=1, blocks=1, shared_bytes=0)
    assert [k for k in [*others, kernel] if found.is_of(k, precision)] == [kernel]


@pytest.mark.parametrize(
    ("architecture", "registers", "threads", "shared_bytes", "blocks"),
    [
        # As the occupancy calculator of the CUDA toolkit has it.
        ("8.0", 32, 256, 0, 8),
        ("8.0", 128, 256, 0, 2),
        ("8.0", 129, 256, 0, 1),
        ("8.6", 32, 256, 0, 6),
        ("8.6", 16, 32, 0, 16),
        ("8.9", 16, 32, 0, 24),
        ("8.6", 64, 128, 48 * 1024, 2),
        ("8.6", 64, 128, 49 * 1024 + 1, 1),
        ("9.0a", 168, 384, 0, 1),
        ("9.0", 64, 256, 113 * 1024, 2),
    ],
)
def test_resident_blocks(architecture: str, registers: int, threads: int, shared_bytes: int, blocks: int) -> None:
    limits = resources.limits(architecture)
    assert limits is not None
    assert limits.resident(registers, threads, shared_bytes) == blocks


def test_a_rehearsal_of_an_unknown_architecture_is_refused() -> None:
    assert resources.limits("7.5") is None
    with pytest.raises(ValueError, match=r"nothing is known of architecture '7\.5'"), resources.rehearsal("7.5"):
        pass


# ---------------------------------------------------------------------------------------------------------------------
# The library of this checkout


@pytest.fixture(scope="module")
def kernels() -> list[dict[str, Any]]:
    if native.library_path() is None:
        pytest.skip(f"{native.load()}")
    if native.build_info()["cuda"] is None:
        pytest.skip("the library was compiled without CUDA")
    if "python" not in native.build_info():
        pytest.skip("the module _build_info is not compiled for this Python")
    return native.kernel_info()


def test_without_cuda_there_is_nothing_to_tell(capsys: pytest.CaptureFixture[str]) -> None:
    if native.build_info().get("cuda") is not None:
        pytest.skip("the library was compiled with CUDA")
    assert native.kernel_info() == []
    with pytest.raises(BackendError, match="compiled"), resources.rehearsal("8.6"):
        pass
    assert main(["info", "--kernels"]) == 0
    assert capsys.readouterr().out.startswith("No CUDA kernels")


def test_every_kernel_is_there_for_every_architecture(kernels: list[dict[str, Any]]) -> None:
    architectures = [a.removesuffix("+PTX") for a in native.build_info()["cuda_architectures"]]
    names = {a: {k["kernel"] for k in kernels if k["architecture"] == a} for a in (*architectures, HOPPER)}
    assert {k["architecture"] for k in kernels} == set(names)
    assert len(kernels) == sum(map(len, names.values())), "no name stands for two kernels"
    first = names[architectures[0]] - WGMMA
    assert all(names[a] - WGMMA == first for a in architectures)
    assert [a for a in names if names[a] & WGMMA] == [HOPPER]
    assert names[HOPPER] >= WGMMA
    for precision in ("Float16", "BFloat16"):
        assert {f"spab_kernel<{precision}, {n}>" for n in range(3, 9)} <= first
        assert {f"spab_large_kernel<{precision}, {n}>" for n in range(3, 7)} <= first
        assert {f"winograd_kernel<{precision}, {n}>" for n in range(1, 5)} <= first
        assert {f"chain_kernel<{precision}, {n}>" for n in range(3, 8)} <= first
    for precision in ("Float16", "BFloat16", "Tf32", "Tf32x3"):
        assert {f"convolution_kernel<{precision}, {n}, forward>" for n in range(1, 9)} <= first


def test_nothing_is_spilled_and_registers_leave_room(kernels: list[dict[str, Any]]) -> None:
    spilling = [(k["kernel"], k["architecture"], k["spilled_bytes"]) for k in kernels if k["spilled_bytes"]]
    assert spilling == []
    for kernel in kernels:
        assert kernel["threads"] is not None, f"{kernel['kernel']} has no launch bounds"
        assert 0 < kernel["registers"] <= 65536 // (kernel["threads"] * kernel["minimum_blocks"]), kernel
        assert kernel["blocks_per_multiprocessor"] >= 1, kernel


def test_launches_keep_to_the_architecture(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        limits = resources.limits(kernel["architecture"])
        assert limits is not None
        assert kernel["static_shared_bytes"] + (kernel["dynamic_shared_bytes"] or 0) <= limits.shared_bytes, kernel
        # A whole SPAB and a chain have most tiles and channels where shared memory is large.
        launched = (
            r"convolution_kernel<.*(forward|backward|half_sums)>|spab_kernel<\w+, [345]>|winograd_kernel<\w+, [123]>|"
            r"wgmma_kernel|chain_kernel<\w+, [34]>|clear_flags_kernel"
        )
        if kernel["architecture"] == "9.0":
            launched += "|spab_|winograd|chain_"
        if re.match(launched, kernel["kernel"]):
            assert kernel["layer"] is not None, kernel
            assert kernel["occupancy"] > 0, kernel


@pytest.mark.parametrize("architecture", resources.LIMITS)
def test_typical_layers_keep_to_the_architecture(kernels: list[dict[str, Any]], architecture: str) -> None:
    """Also to those that were not compiled: PTX serves later ones."""
    layers = resources.layer_info([architecture])
    assert {entry["layer"] for entry in layers} == {layer.name for layer in resources.TYPICAL}
    bounds = {(k["kernel"], k["architecture"]): k["threads"] for k in kernels}
    for entry in layers:
        assert entry["threads"] <= bounds.get((entry["kernel"], architecture), 1024), entry
        assert entry["dynamic_shared_bytes"] <= entry["shared_bytes_limit"], entry
        assert entry["threads"] % 32 == 0
        assert entry["blocks"] >= 1
        if entry["registers"] is not None:
            assert entry["blocks_per_multiprocessor"] >= 1, entry


def test_a_rehearsal_ends_with_an_error_too(kernels: list[dict[str, Any]]) -> None:
    with pytest.raises(ZeroDivisionError), resources.rehearsal("8.6"):
        1 / 0  # noqa: B018
    with resources.rehearsal("9.0") as launches:
        pass
    assert launches == []


def test_the_tables(kernels: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--kernels"]) == 0
    text = capsys.readouterr().out
    assert "| kernel | layer | registers | spilled, bytes |" in text
    assert text.count("\n| convolution_kernel<Float16, 4, forward> |") == 1
    assert "\n| conv3x3 28→28 | float16 | convolution_kernel<Float16, 4, forward> |" in text
    assert main(["info", "--kernels", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"] == kernels
    # A cell has a value for each architecture, in the order of the heading.
    architectures = list(dict.fromkeys(k["architecture"] for k in kernels))
    assert text.startswith(f"Architectures {' / '.join(architectures)};")
    usual = [a for a in architectures if a != HOPPER or "9.0" not in architectures]
    assert list(dict.fromkeys(e["architecture"] for e in found["layers"])) == usual
    assert architectures == sorted(architectures, key=lambda a: float(a.rstrip("af")))


def test_the_library_is_small(kernels: list[dict[str, Any]]) -> None:
    path = native.library_path()
    assert path is not None
    assert path.stat().st_size < MOST_BYTES


def cuobjdump() -> str | None:
    """The toolkit's, else the one that Triton brings."""
    spec = importlib.util.find_spec("triton")
    triton = [str(Path(spec.origin).parent / "backends" / "nvidia" / "bin")] if spec and spec.origin else []
    folders = [None, "/usr/local/cuda/bin", *triton]
    return next(filter(None, (shutil.which("cuobjdump", path=folder) for folder in folders)), None)


def machine_code(architecture: str, kernels: str) -> dict[str, str]:
    """Of the compiled kernels whose readable names begin as the pattern says."""
    tool, path = cuobjdump(), native.library_path()
    if tool is None:
        pytest.skip("cuobjdump is neither installed nor part of Triton here")
    wanted = {
        k["symbol"]: resources.readable(k["name"])
        for k in native.compiled_kernels()
        if k["architecture"] == architecture and re.match(kernels, resources.readable(k["name"]))
    }
    done = subprocess.run(
        [tool, "-sass", "-arch", f"sm_{architecture.replace('.', '')}", "-fun", ",".join(wanted), str(path)],
        capture_output=True,
        text=True,
    )
    code = dict(re.findall(r"Function : (\w+)\n(.*?)(?=Function : |\Z)", done.stdout, re.DOTALL))
    if not code:
        pytest.skip(f"{tool} does not read the library: {done.stderr.strip()}")
    assert set(code) == set(wanted)
    return {wanted[symbol]: text for symbol, text in code.items()}


def test_products_are_those_of_tensor_cores(kernels: list[dict[str, Any]]) -> None:
    """Read from the machine code of one architecture, a few kernels of every kind."""
    code = machine_code(
        kernels[0]["architecture"],
        r"convolution_kernel<(\w+, 4, forward|Float16, 4, \w+)>|(spab|spab_large|winograd|chain)_kernel<\w+, 4>|"
        r"(weight_gradient|gate)_kernel<\w+16(, 2)?>",
    )
    for name, text in code.items():
        found = set(re.findall(r"\b(HMMA|LDSM|LDGSTS)\b", text))
        whole = name.startswith(("convolution_kernel", "spab", "winograd", "chain"))
        assert found >= ({"HMMA", "LDSM", "LDGSTS"} if whole else {"HMMA"}), name


def test_products_of_warpgroups_are_waited_for_once(kernels: list[dict[str, Any]]) -> None:
    """Where the compiler cannot leave them in flight, it waits for every one of them."""
    code = machine_code(HOPPER, r"wgmma_kernel<\w+, [3468], forward>")
    assert len(code) == 8
    for name, text in code.items():
        assert len(re.findall(r"\bHGMMA\.64x\d+x16\.F32", text)) >= 4, name
        assert {"UBLKCP", "LDGSTS"} <= set(re.findall(r"\b(HMMA|LDSM|UBLKCP|LDGSTS)\b", text)), name
        assert "HMMA." not in text.replace("HGMMA.", ""), name
        assert len(re.findall(r"WARPGROUP\.DEPBAR", text)) == 1, name
