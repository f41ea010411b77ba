"""The build: what setup.py decides, what it compiles, what a wheel holds, and what the library tells of itself."""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import esr_kernels
import python_models
from esr_kernels import native

ROOT = Path(__file__).resolve().parent.parent
SETUP_VARIABLES = re.findall(
    r"\b(?:ESR_KERNELS_\w+|TORCH_CUDA_ARCH_LIST|CXX|CXXFLAGS|LDFLAGS|NVCC_FLAGS|MAX_JOBS)\b",
    ast.get_docstring(ast.parse((ROOT / "setup.py").read_text())) or "",
)

# Libraries of a few lines, so that a build takes seconds. The first one has no operators.
PLAIN_LIBRARY = """
#include "common/answer.h"

extern const char esr_answer[] = "the answer is " ANSWER;
"""
OPERATOR_LIBRARY = """
#include <torch/csrc/stable/library.h>

#include "common/answer.h"

int64_t answer() { return sizeof(ANSWER); }
STABLE_TORCH_LIBRARY(esr_native, m) { m.def("answer() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(esr_native, CompositeExplicitAutograd, m) { m.impl("answer", TORCH_BOX(&answer)); }
"""
CUDA_SOURCE = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#if !defined(USE_CUDA) || !defined(ESR_KERNELS_WITH_CUDA)
#error "built without the CUDA macros"
#endif

__global__ void negate(float* x, int64_t n) {
    int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
    if (i < n) x[i] = -x[i];
}

int64_t launch(torch::stable::Tensor x) {
    negate<<<(x.numel() + 255) / 256, 256>>>(static_cast<float*>(x.data_ptr()), x.numel());
    return cudaGetLastError();
}

STABLE_TORCH_LIBRARY_FRAGMENT(esr_native, m) { m.def("negate(Tensor(a!) x) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(esr_native, CUDA, m) { m.impl("negate", TORCH_BOX(&launch)); }
"""
EMULATED_SOURCE = """
#ifndef ESR_EMULATOR
#error "not for the emulator"
#endif

extern const char esr_kind[] __attribute__((visibility("default"))) = "emulated";
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """setup.py, imported without being run."""
    spec = importlib.util.spec_from_file_location("esr_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def clean_environment(**changes: str) -> dict[str, str]:
    return {
        k: v for k, v in os.environ.items() if k not in {*SETUP_VARIABLES, "ESR_KERNELS_BACKEND", "PYTHONPATH"}
    } | changes


def python(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=clean_environment(**environment),
        capture_output=True,
        text=True,
        timeout=300,
    )


def report(folder: Path, expression: str) -> Any:
    """The value of an expression in a new Python that imports the package from `folder`."""
    code = f"import json, torch, esr_kernels; from esr_kernels import native; print(json.dumps({expression}))"
    done = python(folder, "-c", code, PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project without its C++ sources, in a folder whose name has a space."""
    root = tmp_path / "a copy"
    root.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, root)
    for name in ("esr_kernels", "python_models"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return root


@pytest.fixture
def small_sources(project: Path) -> Path:
    sources = project / "csrc"
    (sources / "common").mkdir(parents=True)
    (sources / "library.cpp").write_text(PLAIN_LIBRARY)
    (sources / "common" / "answer.h").write_text('#define ANSWER "41"\n')
    for name in ("python_module.cpp", "nvcc_resources.py"):
        shutil.copy(ROOT / "csrc" / name, sources)
    return project


def build(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return python(project, "setup.py", "build_ext", "--inplace", **environment)


# ---------------------------------------------------------------------------------------------------------------------
# What setup.py decides


@pytest.mark.parametrize(
    ("text", "value"), [("", "auto"), ("0", "0"), ("1", "1"), ("auto", "auto"), (" AUTO ", "auto")]
)
def test_a_switch_takes_its_three_values(script: ModuleType, text: str, value: str) -> None:
    assert script.switch({"ESR_KERNELS_CUDA": text}, "ESR_KERNELS_CUDA") == value
    assert script.switch({}, "ESR_KERNELS_CUDA") == "auto"


@pytest.mark.parametrize("text", ["2", "yes", "-1", "01"])
@pytest.mark.parametrize("name", ["ESR_KERNELS_NATIVE", "ESR_KERNELS_CUDA"])
def test_a_wrong_switch_is_named(script: ModuleType, name: str, text: str) -> None:
    with pytest.raises(script.BuildError, match=f"{name}='{text}'.*0, 1 or auto"):
        script.switch({name: text}, name)


def test_job_count(script: ModuleType) -> None:
    assert script.job_count({"MAX_JOBS": "3"}) == 3
    assert script.job_count({}) == len(os.sched_getaffinity(0))
    for text in ("0", "-2", "many", "1.5"):
        with pytest.raises(script.BuildError, match="MAX_JOBS"):
            script.job_count({"MAX_JOBS": text})


@pytest.mark.parametrize(
    ("text", "architectures"),
    [
        ("8.0;8.6;8.9;9.0+PTX", ("8.0", "8.6", "8.9", "9.0+PTX")),
        ("9.0a, 8.0", ("8.0", "9.0a")),
        ("10.0+PTX 8.0 9.0 10.0", ("8.0", "9.0", "10.0+PTX")),
        ("7.5 8.6", ("8.6",)),
        ("ampere;Hopper", ("8.0", "8.6+PTX", "9.0+PTX")),
    ],
)
def test_architecture_list(script: ModuleType, text: str, architectures: tuple[str, ...]) -> None:
    assert script.cuda_architectures(text) == architectures


@pytest.mark.parametrize("text", ["sm_80", "8", "8.0+SASS", "native", "8.0;;x"])
def test_a_wrong_architecture_is_named(script: ModuleType, text: str) -> None:
    with pytest.raises(script.BuildError, match="TORCH_CUDA_ARCH_LIST"):
        script.cuda_architectures(text)


def test_a_source_may_have_an_architecture_of_its_own(script: ModuleType) -> None:
    usual = ("8.6", "9.0+PTX")
    assert script.architectures_of(Path("cuda", "product_sm90a.cu"), usual) == ("9.0a",)
    assert script.architectures_of(Path("cuda", "product_sm120.cu"), usual) == ("12.0",)
    assert script.architectures_of(Path("cuda_sm90a", "product.cu"), usual) == usual


def test_only_old_architectures_are_refused(script: ModuleType) -> None:
    with pytest.raises(script.BuildError, match=r"no architecture of 8\.0 or later"):
        script.cuda_architectures("6.1;7.5+PTX")


def test_machine_code_and_ptx_are_asked_for_separately(script: ModuleType) -> None:
    assert script.gencode_flags(["8.6", "9.0a", "9.0+PTX"]) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_one_front_end_serves_a_generation(script: ModuleType) -> None:
    assert script.gencode_flags(["8.0", "8.6+PTX", "10.0", "12.0", "12.1a"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=sm_86",
        "-gencode=arch=compute_86,code=compute_86",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_121a,code=sm_121a",
    ]


def test_no_code_is_made_where_another_architecture_has_the_same(script: ModuleType) -> None:
    assert script.gencode_flags(["8.0", "8.6", "8.9+PTX"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=sm_86",
        "-gencode=arch=compute_89,code=compute_89",
    ]
    assert script.gencode_flags(["8.0", "8.9"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=sm_89",
    ]
    assert script.shared_code(["8.6+PTX", "8.9+PTX"]) == {"8.9": "8.6"}
    assert script.shared_code(["8.0", "8.9"]) == {}


def test_nvcc_is_for_files_with_kernels(script: ModuleType, tmp_path: Path) -> None:
    for name, text in {
        "device.h": "#define ESR_KERNEL(threads) __global__ void\n// ESR_KERNEL(128) is a __global__ function\n",
        "kernel.h": '#include "device.h"\ntemplate <int n>\nESR_KERNEL(128) kernel() {}\n',
        "plain.cu": "__global__ void kernel() {}\n",
        "far.cu": '#include <vector>\n\n#include "near.h"\n',
        "near.h": '#include "near.h"\n#include "kernel.h"\n',
        "host.cu": '#include "device.h"\n#include "missing.h"\nint f() { return 1; }\n',
    }.items():
        (tmp_path / name).write_text(text)
    assert [f.name for f in sorted(tmp_path.glob("*.cu")) if script.has_kernels(f)] == ["far.cu", "plain.cu"]


def test_cuda_is_off_without_nvcc_and_asking_for_it_is_an_error(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "find_nvcc", lambda environ: None)
    sources = [Path("csrc/cuda/a.cu")]
    assert script.find_cuda({}, sources) is None
    assert script.find_cuda({"ESR_KERNELS_CUDA": "0"}, sources) is None
    with pytest.raises(script.BuildError, match=r"ESR_KERNELS_CUDA=1, but there is no nvcc"):
        script.find_cuda({"ESR_KERNELS_CUDA": "1"}, sources)


def test_cuda_is_off_without_cuda_sources_and_asking_for_it_is_an_error(script: ModuleType) -> None:
    assert script.find_cuda({}, [Path("csrc/library.cpp")]) is None
    with pytest.raises(script.BuildError, match=r"ESR_KERNELS_CUDA=1, but there are no CUDA sources"):
        script.find_cuda({"ESR_KERNELS_CUDA": "1"}, [Path("csrc/library.cpp")])


def fake_nvcc(folder: Path, release: str, top: Path) -> str:
    file = folder / "nvcc"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "release {release}, V{release}.1";; *) echo "#\\$ TOP={top}" >&2;; esac\n'
    )
    file.chmod(0o755)
    return str(file)


def test_the_toolkit_is_found_behind_a_wrapper_script(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "toolkit" / "include").mkdir(parents=True)
    (tmp_path / "toolkit" / "include" / "cuda_runtime.h").touch()
    (tmp_path / "toolkit" / "bin").mkdir()
    nvcc = fake_nvcc(tmp_path / "elsewhere", "13.0", tmp_path / "toolkit" / "bin" / "..")
    assert script.cuda_toolkit(nvcc) == (tmp_path / "toolkit", "13.0")
    environ = {"PATH": str(tmp_path / "elsewhere"), "TORCH_CUDA_ARCH_LIST": "8.6"}
    cuda = script.find_cuda(environ, [Path("csrc/cuda/a.cu")])
    assert cuda == script.Cuda(nvcc, tmp_path / "toolkit", "13.0", ("8.6",))
    cuda = script.find_cuda({"PATH": environ["PATH"]}, [Path("csrc/cuda/a.cu")])
    assert cuda.architectures == ("8.0", "8.6", "8.9", "9.0+PTX")


def test_cuda_home_goes_before_path(script: ModuleType, tmp_path: Path) -> None:
    first = fake_nvcc(tmp_path / "home" / "bin", "13.0", tmp_path)
    second = fake_nvcc(tmp_path / "path", "13.0", tmp_path)
    assert script.find_nvcc({"CUDA_HOME": str(tmp_path / "home"), "PATH": str(tmp_path / "path")}) == first
    assert script.find_nvcc({"CUDA_HOME": str(tmp_path / "gone"), "PATH": str(tmp_path / "path")}) == second


def test_an_old_toolkit_and_one_without_headers_are_refused(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(script.BuildError, match=r"is CUDA 11\.8; CUDA 12\.0 or later is needed"):
        script.cuda_toolkit(fake_nvcc(tmp_path / "old", "11.8", tmp_path))
    with pytest.raises(script.BuildError, match=r"no include/cuda_runtime\.h"):
        script.cuda_toolkit(fake_nvcc(tmp_path / "bare" / "bin", "13.0", tmp_path))


def test_a_missing_or_failing_compiler_means_pure_python(script: ModuleType, tmp_path: Path) -> None:
    missing = str(tmp_path / "no-such-compiler")
    tools, reason = script.find_toolchain({"CXX": missing}, [])
    assert tools is None
    assert missing in reason
    tools, reason = script.find_toolchain({"CXX": "false"}, [])
    assert tools is None
    assert "false does not compile C++20" in reason
    for name in ("ESR_KERNELS_NATIVE", "ESR_KERNELS_CUDA"):
        with pytest.raises(script.BuildError, match=f"{name}=1, but .*no-such-compiler"):
            script.find_toolchain({"CXX": missing, name: "1"}, [])
    assert script.find_toolchain({"ESR_KERNELS_NATIVE": "0"}, []) == (None, "")


def test_an_old_torch_is_refused(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    monkeypatch.setattr(
        script.importlib.util,
        "find_spec",
        lambda name: importlib.machinery.PathFinder.find_spec(name, [str(tmp_path)]),
    )
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.9.1+cpu'\n")
    with pytest.raises(script.BuildError, match=r"torch 2\.9\.1\+cpu is installed: compiling needs torch >= 2\.11"):
        script.find_torch()
    shutil.rmtree(tmp_path / "torch")
    with pytest.raises(script.BuildError, match="torch is not installed"):
        script.find_torch()


def test_the_headers_of_pybind11_that_torch_carries_serve_as_well(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        script.importlib.util, "find_spec", lambda name: None if name == "pybind11" else find_spec(name)
    )
    assert script.pybind11_include() == Path(torch.__file__).parent / "include"
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    assert script.pybind11_include() is None
    tools = script.Toolchain(("c++",), (), (), (), None)
    monkeypatch.delenv("ESR_KERNELS_EMULATOR", raising=False)
    assert [extension.name for extension in script.extensions(tools)] == ["esr_kernels._esr_native"]
    assert script.extensions(None) == []


def test_the_commit_is_told_with_its_changes(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("git") is None:
        pytest.skip("git is not installed")

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost")
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(script, "ROOT", tmp_path)
    assert script.git_commit() is None
    git("init")
    assert script.git_commit() is None
    git("commit", "--allow-empty", "-m", "first")
    commit = script.git_commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "notes.txt").touch()
    assert script.git_commit() == commit
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "library.cpp").touch()
    assert script.git_commit() == f"{commit}-dirty"


def test_a_launcher_is_not_the_host_compiler_of_nvcc(script: ModuleType) -> None:
    assert Path(script.nvcc_host_compiler(("ccache", "sh"))[1]).name == "sh"


def test_the_library_counts_neither_the_module_nor_headers_as_its_sources(script: ModuleType) -> None:
    names = {str(path.relative_to(ROOT / "csrc")) for path in script.library_sources(ROOT)}
    assert "library.cpp" in names
    assert "python_module.cpp" not in names
    assert all(name.endswith((".cpp", ".cu")) for name in names)


def test_every_pinned_requirement_is_a_declared_or_indirect_one(script: ModuleType) -> None:
    """The pins are exact, torch is pinned without a build's suffix, and what pyproject.toml names is pinned."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert re.fullmatch(r"\d+\.\d+\.\d+", pins["torch"])
    assert not any(name.startswith("nvidia") for name in pins)
    text = (ROOT / "pyproject.toml").read_text()
    named = set()
    for array in re.findall(r"^(?:dependencies|triton|test|bench|lint|demo|requires) = (\[.*\])$", text, re.MULTILINE):
        named |= {re.split(r"[<>=; ]", entry)[0] for entry in json.loads(array)}
    assert {"torch", "numpy", "pytest", "ruff", "ninja"} <= named
    assert named <= {name.lower() for name in pins}


# ---------------------------------------------------------------------------------------------------------------------
# Builds of a throw-away copy


@pytest.fixture(scope="module")
def compiler(script: ModuleType) -> None:
    tools, reason = script.find_compiler(os.environ)
    if tools is None:
        pytest.skip(reason)


@pytest.mark.usefixtures("compiler")
def test_build_rebuild_and_failure(small_sources: Path) -> None:
    project, library = small_sources, small_sources / "esr_kernels" / "_esr_native.so"
    first = build(project, ESR_KERNELS_CUDA="0", MAX_JOBS="2", CXXFLAGS="-O0")
    assert first.returncode == 0, first.stdout + first.stderr
    assert b"the answer is 41\0" in library.read_bytes()
    info = report(project, "native.build_info()")
    assert isinstance(info, dict)
    assert (info["version"], info["interface"]) == (esr_kernels.__version__, native.INTERFACE)
    assert info["flags"][-1] == "-O0"
    assert (info["torch"], info["cuda"], info["git_commit"]) == (torch.__version__, None, None)
    assert info["cxx_standard"] >= 202002
    assert report(project, "native.kernel_info()") == []
    assert torch.__version__.startswith(info["torch_headers"])

    # Only what a changed header reaches is compiled again.
    (project / "csrc" / "common" / "answer.h").write_text('#define ANSWER "42"\n')
    second = build(project, ESR_KERNELS_CUDA="0", MAX_JOBS="2", CXXFLAGS="-O0")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "library.cpp" in second.stdout
    assert "python_module.cpp" not in second.stdout
    assert b"the answer is 42\0" in library.read_bytes()
    assert "no work to do" in build(project, ESR_KERNELS_CUDA="0", CXXFLAGS="-O0").stdout

    # A source that does not compile is an error, whatever ESR_KERNELS_NATIVE says, and leaves the old library.
    (project / "csrc" / "common" / "answer.h").write_text("#error no answer\n")
    failed = build(project, ESR_KERNELS_CUDA="0", CXXFLAGS="-O0")
    assert failed.returncode != 0
    assert "no answer" in failed.stdout + failed.stderr
    assert "compiling failed" in failed.stderr
    assert b"the answer is 42\0" in library.read_bytes()


@pytest.mark.usefixtures("compiler")
def test_cuda_sources_compile_against_any_torch(script: ModuleType, small_sources: Path) -> None:
    nvcc = script.find_nvcc(os.environ)
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    sources = small_sources / "csrc"
    (sources / "library.cpp").write_text(OPERATOR_LIBRARY)
    (sources / "python_module.cpp").write_text("// a module that cannot be imported\n")
    (sources / "cuda").mkdir()
    (sources / "cuda" / "negate.cu").write_text(CUDA_SOURCE)
    done = build(
        small_sources, ESR_KERNELS_CUDA="1", TORCH_CUDA_ARCH_LIST="8.6", MAX_JOBS="2", CXXFLAGS="-O0", NVCC_FLAGS="-O0"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # It loads where there is no GPU and no CUDA build of torch as well: the CUDA runtime is inside it.
    loaded, answer, info = report(small_sources, "[native.load(), torch.ops.esr_native.answer(), native.build_info()]")
    assert (loaded, answer) == (None, 3)
    assert info["cuda"] == script.cuda_toolkit(nvcc)[1]
    assert info["cuda_architectures"] == ["8.6"]
    assert info["features"]["cuda"] is True
    assert "python" not in info
    (table,) = small_sources.glob("build/**/cuda_kernels.cpp")
    assert re.search(r'"\{\\"symbol\\": \\"\w*negate\w*\\", \\"architecture\\": \\"8.6\\"', table.read_text())
    assert not list(small_sources.glob("build/**/*.kept")), "what nvcc was asked to keep is not kept any longer"
    library = (small_sources / "esr_kernels" / "_esr_native.so").read_bytes()
    assert b".nv_fatbin" in library
    assert b"libcudart.so" not in library


@pytest.mark.usefixtures("compiler")
def test_the_emulator_is_compiled_where_it_is_asked_for(small_sources: Path) -> None:
    """In place only: it is for the tests."""
    library = small_sources / "esr_kernels" / "_esr_emulator.so"
    (small_sources / "csrc" / "python_module.cpp").write_text("// a module that cannot be imported\n")
    (small_sources / "csrc" / "cuda").mkdir()
    (small_sources / "csrc" / "cuda" / "kernel.cu").write_text(EMULATED_SOURCE)
    options = {"ESR_KERNELS_CUDA": "0", "CXXFLAGS": "-O0", "MAX_JOBS": "2"}
    for switch in ("0", ""):
        done = build(small_sources, ESR_KERNELS_EMULATOR=switch, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not library.exists()
    done = python(small_sources, "setup.py", "build_ext", "--build-lib", "built", ESR_KERNELS_EMULATOR="1", **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [p.name.partition(".")[0] for p in sorted((small_sources / "built").rglob("*.so"))] == [
        "_build_info",
        "_esr_native",
    ]
    done = build(small_sources, ESR_KERNELS_EMULATOR="1", **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert b"emulated\0" in library.read_bytes()
    assert "no work to do" in build(small_sources, ESR_KERNELS_EMULATOR="1", **options).stdout
    done = build(small_sources, ESR_KERNELS_EMULATOR="maybe", **options)
    assert done.returncode != 0
    assert "ESR_KERNELS_EMULATOR='maybe' is not allowed" in done.stderr


def test_without_a_compiler_one_line_warns(small_sources: Path) -> None:
    done = build(small_sources, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "esr_kernels is installed without" in line]
    assert len(warnings) == 1
    assert "no-such-compiler" in warnings[0]
    assert not list((small_sources / "esr_kernels").glob("*.so"))

    done = build(small_sources, CXX="no-such-compiler", ESR_KERNELS_NATIVE="1")
    assert done.returncode != 0
    assert done.stderr.strip().startswith("error: ESR_KERNELS_NATIVE=1, but")


@pytest.fixture
def own_weights(project: Path) -> Path:
    """Weights with their card, where those of the package lie: a network of two channels."""
    folder = project / "python_models" / "weights"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model = python_models.create("span", feature_channels=2, num_blocks=1)
    save_file(model.state_dict(), folder / "span_x4.safetensors")
    (folder / "span_x4.json").write_text("{}")
    (folder / "span_x4.md").write_text("# span x4")
    return folder


WEIGHTS = {f"python_models/weights/span_x4.{suffix}" for suffix in ("safetensors", "json", "md")}


@pytest.mark.usefixtures("own_weights")
def test_pure_python_wheel(project: Path, tmp_path: Path) -> None:
    for name in ("_esr_native.so", "_esr_emulator.so"):
        (project / "esr_kernels" / name).write_bytes(b"left over from an earlier build")
    arguments = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(tmp_path), "."]
    done = python(project, *arguments, ESR_KERNELS_NATIVE="0")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"esr_kernels-{esr_kernels.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    packages = [project / "esr_kernels", project / "python_models"]
    kept = (".py", ".json", ".toml")
    sources = {str(p.relative_to(project)) for q in packages for p in q.rglob("*") if p.suffix in kept}
    assert sources
    assert sources | WEIGHTS <= set(names)
    assert "esr_kernels/functional.py" in names
    assert not [n for n in names if n.endswith((".so", ".cpp", ".cu"))]
    assert not [n for n in names if n.split("/")[0] in ("tests", "bench", "csrc", "build")]
    assert "esr-kernels = esr_kernels.cli:main" in entry_points
    # The installed package finds its weights, from anywhere.
    installed = tmp_path / "installed"
    shutil.unpack_archive(wheel, installed, "zip")
    told = "import python_models as m; print(m.bundled('span')); print(m.create('span', weights='bundled').num_blocks)"
    done = python(tmp_path, "-c", told, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(installed / "python_models/weights/span_x4.safetensors"), "1"]


@pytest.mark.usefixtures("compiler", "own_weights")
def test_an_sdist_holds_what_a_build_needs(small_sources: Path) -> None:
    (small_sources / "tests").mkdir()
    (small_sources / "tests" / "test_nothing.py").touch()
    for name in ("cuda/kernel.cu", "cuda/kernel.h", "emulator/device.h"):
        (small_sources / "csrc" / name).parent.mkdir(exist_ok=True)
        (small_sources / "csrc" / name).touch()
    done = python(small_sources, "setup.py", "-q", "sdist", ESR_KERNELS_CUDA="0")
    assert done.returncode == 0, done.stderr
    (archive,) = (small_sources / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, small_sources / "unpacked")
    (unpacked,) = (small_sources / "unpacked").iterdir()
    names = {str(p.relative_to(unpacked)) for p in unpacked.rglob("*") if p.is_file()}
    needed = "setup.py pyproject.toml LICENSE csrc/library.cpp csrc/python_module.cpp csrc/common/answer.h"
    needed += " csrc/nvcc_resources.py csrc/cuda/kernel.cu csrc/cuda/kernel.h csrc/emulator/device.h"
    assert set(needed.split()) | {"esr_kernels/native.py", "tests/test_nothing.py"} | WEIGHTS <= names


# ---------------------------------------------------------------------------------------------------------------------
# The library and its stamp


def test_everything_imports_with_nothing_compiled(project: Path) -> None:
    call = "esr_kernels.functional.conv3x3(torch.ones(1, 3, 4, 4), torch.ones(2, 3, 3, 3)).sum().item()"
    status = "{b.name: [b.available, b.reason] for b in esr_kernels.list_backends()}"
    path, info, reason, total, backends = report(
        project, f"[native.library_path(), native.build_info(), native.load(), {call}, {status}]"
    )
    assert (path, info) == (None, {})
    assert "not compiled" in reason
    assert total == 2 * 3 * (3 * 4 - 2) ** 2  # a row of 4 sees 3 + 3 + 2 + 2 neighbours
    assert backends["reference"] == [True, None]
    assert backends["native-cpu"] == [False, reason]


@pytest.fixture
def as_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], None]]:
    """Makes a file of the given bytes the package's library."""

    def place(content: bytes) -> None:
        file = tmp_path / "_esr_native.so"
        file.write_bytes(content)
        monkeypatch.setattr(native, "library_path", lambda: file)

    caches = (native.load, native.build_info)
    for cache in caches:
        cache.cache_clear()
    yield place
    for cache in caches:
        cache.cache_clear()


def stamped(**stamp: object) -> bytes:
    return b"\x7fELF\0" + native._STAMP + json.dumps(stamp).encode() + b"\0\0"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "carries no build information"),
        (b"not a library", "carries no build information"),
        (native._STAMP + b"{broken\0", "carries no build information"),
        (native._STAMP + b"[1]\0", "carries no build information"),
        (stamped(version="0.0.1", interface=native.INTERFACE), r"built for version 0\.0\.1, this is"),
        (stamped(version=esr_kernels.__version__, interface=-1), "built for interface -1, this version needs"),
        (stamped(version=esr_kernels.__version__, interface=native.INTERFACE), "does not load"),
    ],
)
def test_a_library_that_cannot_serve_gives_its_reason(
    as_library: Callable[[bytes], None], content: bytes, reason: str
) -> None:
    as_library(content)
    with pytest.warns(RuntimeWarning, match="runs without its compiled kernels: .*" + reason):
        found = native.load()
    assert found is not None
    assert re.search(reason, found)
    assert "\n" not in found


def test_the_stamp_is_read_without_loading(as_library: Callable[[bytes], None]) -> None:
    as_library(stamped(version="0.0.1", torch="2.11.0"))
    assert native.build_info() == {"version": "0.0.1", "torch": "2.11.0"}


def test_an_unreadable_library_gives_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library_path", lambda: tmp_path)  # a folder
    native.load.cache_clear()
    native.build_info.cache_clear()
    with pytest.warns(RuntimeWarning, match="does not load"):
        reason = native.load()
    info = native.build_info()
    native.load.cache_clear()
    native.build_info.cache_clear()
    assert reason is not None
    assert "does not load" in reason
    assert info == {}


@pytest.fixture
def built() -> dict[str, object]:
    if native.library_path() is None:
        pytest.skip(f"{native.load()}")
    return native.build_info()


def test_the_library_of_this_checkout_is_current(built: dict[str, object]) -> None:
    assert native.load() is None
    assert built["version"] == esr_kernels.__version__
    assert built["interface"] == native.INTERFACE


def test_build_information_is_true(built: dict[str, object]) -> None:
    assert built["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", str(built["git_commit"]))
    assert (built["cuda"] is None) == (built["cuda_architectures"] == [])
    assert built["features"] == {"cuda": built["cuda"] is not None}
    assert "-std=c++20" in built["flags"]
    assert not any(str(flag).startswith("-m") for flag in built["flags"]), "SIMD is chosen at run time"
    if "python" in built:  # the module was compiled for this Python
        assert built["python"] == ".".join(map(str, sys.version_info[:3]))
        number = re.search(r"\d+\.\d+\.\d+", str(built["compiler_macro"]))
        assert number is not None
        assert number[0] in str(built["compiler"])
        assert str(built["torch"]).startswith(str(built["torch_headers"]))


def test_every_simd_path_that_is_told_is_in_the_library(built: dict[str, object]) -> None:
    assert native.load() is None
    refusals: dict[str, str] = {}
    paths = built["simd"]
    assert isinstance(paths, list)
    before = torch.ops.esr_native.get_cpu_capability()
    assert before in paths
    try:
        for path in paths:
            try:
                torch.ops.esr_native.set_cpu_capability(path)
            except RuntimeError as error:
                refusals[path] = str(error)
            else:
                assert torch.ops.esr_native.get_cpu_capability() == path
        with pytest.raises(RuntimeError) as unknown:
            torch.ops.esr_native.set_cpu_capability("abacus")
    finally:
        torch.ops.esr_native.set_cpu_capability(before)
    # A path that this processor lacks is refused in other words than one nobody knows.
    assert "plain" not in refusals
    for path, message in refusals.items():
        assert message.splitlines()[0] != str(unknown.value).splitlines()[0].replace("abacus", path)
