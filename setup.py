"""Compiles the C++ and CUDA parts of esr_kernels. What the project is stands in pyproject.toml.

Two things are made, both optional: the operator library `esr_kernels/_esr_native.so`, which knows no Python and serves
every Python and every torch since 2.11, and the small pybind11 module `esr_kernels._build_info`.

Environment:
    ESR_KERNELS_NATIVE    auto (default): compile when a C++20 compiler is found, else install pure Python with a
                          warning. 1: no compiler is an error. 0: pure Python.
    ESR_KERNELS_CUDA      auto (default): with CUDA when nvcc is found (CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda)
                          and there are CUDA sources. 1: no nvcc is an error. 0: without CUDA.
    ESR_KERNELS_EMULATOR  1: in-place builds also compile the CUDA kernels for the CPU emulator, as
                          `esr_kernels/_esr_emulator.so`, with which the tests run them. Default 0.
    TORCH_CUDA_ARCH_LIST  default 8.0;8.6;8.9;9.0+PTX; entries below 8.0 are left out. Beside 8.6, 8.9 needs no machine
                          code of its own. A source named `*_sm90a.cu` is compiled for that architecture alone
    CXX, CXXFLAGS, LDFLAGS, NVCC_FLAGS, MAX_JOBS
"""

from __future__ import annotations

import ast
import fcntl
import filecmp
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError

ROOT = Path(__file__).resolve().parent
KERNEL_REPORT = ROOT / "csrc" / "nvcc_resources.py"
PACKAGE = "esr_kernels"
LIBRARY = f"{PACKAGE}._esr_native"
EMULATOR = f"{PACKAGE}._esr_emulator"
MODULE = f"{PACKAGE}._build_info"

TORCH_MINIMUM = (2, 11)
TORCH_TARGET = "0x020b000000000000"  # the same version as the stable ABI writes it
COMPILE_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-Wall",
    "-Wno-psabi",
    "-ffp-contract=off",  # which products are fused is written out, so that results do not depend on the compiler
)
NVCC_FLAGS = (
    "-std=c++20",
    "-O3",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
    "--expt-relaxed-constexpr",
    "-Xfatbin=-compress-all",  # to a fifth; the driver unpacks a kernel when it is first used
)
CUDA_MINIMUM = (12, 0)  # the first nvcc with C++20
DEFAULT_ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"
# Whose machine code another architecture has: from the same PTX ptxas makes the same instructions for both, and devices
# of the later one run them.
SAME_CODE = {"8.9": "8.6"}
ARCHITECTURE_NAMES = {
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;12.0+PTX",
}


class BuildError(BaseError):
    """Something asked for cannot be built; the message says what to do."""


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit: `root` holds include/, `architectures` are as in TORCH_CUDA_ARCH_LIST."""

    nvcc: str
    root: Path
    version: str
    architectures: tuple[str, ...]


@dataclass(frozen=True)
class Toolchain:
    """What to compile with; `cuda` is None for a build without CUDA."""

    cxx: tuple[str, ...]
    cxxflags: tuple[str, ...]
    ldflags: tuple[str, ...]
    nvcc_flags: tuple[str, ...]
    cuda: Cuda | None


@dataclass(frozen=True)
class Torch:
    """The torch whose headers are compiled against."""

    version: str
    include: Path
    lib: Path


# ---------------------------------------------------------------------------------------------------------------------
# Choices


def switch(environ: Mapping[str, str], name: str) -> str:
    """The value of a variable that takes 0, 1 or auto.

    Raises:
        BuildError: any other value.
    """
    value = environ.get(name, "").strip().lower() or "auto"
    if value not in ("0", "1", "auto"):
        raise BuildError(f"{name}={environ[name]!r} is not allowed: it takes 0, 1 or auto")
    return value


def job_count(environ: Mapping[str, str]) -> int:
    """How many compilers run at once: MAX_JOBS, else the number of usable cores."""
    text = environ.get("MAX_JOBS", "").strip()
    if not text:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isdecimal() or int(text) < 1:
        raise BuildError(f"MAX_JOBS={text!r} is not allowed: it takes a whole number of at least 1")
    return int(text)


def cuda_architectures(text: str) -> tuple[str, ...]:
    """The entries of a TORCH_CUDA_ARCH_LIST ("8.0;9.0a 10.0+PTX"), sorted; those below 8.0 are left out.

    Raises:
        BuildError: an entry is malformed, or none is 8.0 or later.
    """
    for name, value in ARCHITECTURE_NAMES.items():
        text = re.sub(rf"\b{name}\b", value, text, flags=re.IGNORECASE)
    found: dict[str, tuple[int, int, str]] = {}
    for entry in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            names = ", ".join(ARCHITECTURE_NAMES)
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: {entry!r} is not allowed: entries look like 8.6, 9.0a or 9.0+PTX, or are one "
                f"of {names}"
            )
        key = (int(match[1]), int(match[2]), match[3])
        if key >= (8, 0):
            found[entry] = key
    if not found:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST={text!r} has no architecture of 8.0 or later")
    # "9.0+PTX" holds all that "9.0" does.
    return tuple(e for e in sorted(found, key=lambda e: (found[e], e)) if f"{e}+PTX" not in found)


def shared_code(architectures: Iterable[str]) -> dict[str, str]:
    """Those of SAME_CODE for which no machine code is made, as that of the other one is."""
    names = {entry.removesuffix("+PTX") for entry in architectures}
    return {name: other for name, other in SAME_CODE.items() if name in names and other in names}


def gencode_flags(architectures: Iterable[str]) -> list[str]:
    """nvcc's choice of architectures.

    Machine code comes from the PTX of the generation's first architecture: the front end runs once for all of them, and
    no kernel makes a difference between them. What another architecture's code serves as well is not made twice.
    """
    architectures = tuple(architectures)
    shared = shared_code(architectures)
    flags = []
    first: dict[str, str] = {}
    for entry in architectures:
        number = entry.removesuffix("+PTX").replace(".", "")
        virtual = number if not number.isdecimal() else first.setdefault(number[:-1], number)
        if entry.removesuffix("+PTX") not in shared:
            flags.append(f"-gencode=arch=compute_{virtual},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


# ---------------------------------------------------------------------------------------------------------------------
# What is on this machine


def run(command: Iterable[str], **options: object) -> subprocess.CompletedProcess[str]:
    """The command's outcome with its output as text; one that cannot be started counts as status 127."""
    command = list(command)
    try:
        return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def find_compiler(environ: Mapping[str, str]) -> tuple[tuple[str, ...] | None, str]:
    """A command that compiles and links C++20 (CXX, else c++, g++ or clang++), or None and why there is none."""
    if sys.platform != "linux":
        return None, f"compiled kernels are built on Linux only, not on {sys.platform}"
    asked = shlex.split(environ.get("CXX", ""))
    candidates = [asked] if asked else [[name] for name in ("c++", "g++", "clang++") if shutil.which(name)]
    reason = "c++, g++ and clang++ are not on PATH"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <algorithm>\n#include <concepts>\nint f(int x) { return std::max(x, 1); }\n")
        for command in candidates:
            if shutil.which(command[0]) is None:
                reason = f"{command[0]} is not there or cannot be run"
                continue
            flags = ["-std=c++20", "-fPIC", "-shared", str(source), "-o", str(Path(folder, "probe.so"))]
            outcome = run([*command, *flags])
            if outcome.returncode == 0:
                return tuple(command), ""
            lines = [line for line in outcome.stderr.splitlines() if line.strip()] or ["it failed"]
            first = next((line for line in lines if "error" in line.lower()), lines[0])
            reason = f"{shlex.join(command)} does not compile C++20: {first.strip()}"
    return None, reason


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """The nvcc of CUDA_HOME or CUDA_PATH, else the one on PATH, else the one in the usual place."""
    homes = [environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    folders = [*(os.path.join(home, "bin") for home in homes), environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return next(filter(None, (shutil.which("nvcc", path=folder) for folder in folders)), None)


def cuda_toolkit(nvcc: str) -> tuple[Path, str]:
    """The folder above include/cuda_runtime.h, and the toolkit's version such as "13.0".

    Raises:
        BuildError: nvcc does not run, is too old, or its headers are not found.
    """
    outcome = run([nvcc, "--version"])
    match = re.search(r"release (\d+)\.(\d+)", outcome.stdout)
    if match is None:
        raise BuildError(f"{nvcc} --version does not tell a version: {(outcome.stderr or outcome.stdout).strip()}")
    version = f"{match[1]}.{match[2]}"
    if (int(match[1]), int(match[2])) < CUDA_MINIMUM:
        raise BuildError(f"{nvcc} is CUDA {version}; CUDA {'.'.join(map(str, CUDA_MINIMUM))} or later is needed")
    # nvcc may be a wrapper script somewhere else, so it is asked first.
    dry_run = run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull])
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    roots = [Path(top[1].strip())] if top else []
    roots.append(Path(nvcc).resolve().parent.parent)
    for root in roots:
        for folder in (root, *root.glob("targets/*-linux")):
            if (folder / "include" / "cuda_runtime.h").is_file():
                return folder.resolve(), version
    raise BuildError(f"no include/cuda_runtime.h belongs to {nvcc} (looked in {', '.join(map(str, roots))})")


def find_cuda(environ: Mapping[str, str], sources: Iterable[Path]) -> Cuda | None:
    """The CUDA toolkit to build with, or None for a build without CUDA.

    Raises:
        BuildError: ESR_KERNELS_CUDA=1 cannot be had, or what was found cannot be used.
    """
    wanted = switch(environ, "ESR_KERNELS_CUDA")
    if wanted == "0":
        return None
    if not any(source.suffix == ".cu" for source in sources):
        if wanted == "1":
            raise BuildError("ESR_KERNELS_CUDA=1, but there are no CUDA sources: csrc/cuda has no .cu file")
        return None
    nvcc = find_nvcc(environ)
    if nvcc is None:
        if wanted == "1":
            raise BuildError(
                "ESR_KERNELS_CUDA=1, but there is no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
            )
        return None
    architectures = cuda_architectures(environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or DEFAULT_ARCHITECTURES)
    root, version = cuda_toolkit(nvcc)
    return Cuda(nvcc, root, version, architectures)


def find_toolchain(environ: Mapping[str, str], sources: Iterable[Path]) -> tuple[Toolchain | None, str]:
    """What to compile with, or None and why nothing is compiled ("": because it was asked for).

    Raises:
        BuildError: a variable has a wrong value, or what it asks for is not there.
    """
    native = switch(environ, "ESR_KERNELS_NATIVE")
    if native == "0":
        return None, ""
    cxx, reason = find_compiler(environ)
    if cxx is None:
        if native == "1" or switch(environ, "ESR_KERNELS_CUDA") == "1":
            name = "ESR_KERNELS_NATIVE" if native == "1" else "ESR_KERNELS_CUDA"
            raise BuildError(f"{name}=1, but {reason}")
        return None, reason
    cxxflags, ldflags, nvcc_flags = (
        tuple(shlex.split(environ.get(name, ""))) for name in ("CXXFLAGS", "LDFLAGS", "NVCC_FLAGS")
    )
    return Toolchain(cxx, cxxflags, ldflags, nvcc_flags, find_cuda(environ, sources)), ""


def find_torch() -> Torch:
    """The installed torch, without importing it.

    Raises:
        BuildError: there is none, or it is too old.
    """
    spec = importlib.util.find_spec("torch")
    hint = f"compiling needs torch >= {'.'.join(map(str, TORCH_MINIMUM))} (ESR_KERNELS_NATIVE=0 installs pure Python)"
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(f"torch is not installed for {sys.executable}: {hint}; with pip, add --no-build-isolation")
    folder = Path(spec.submodule_search_locations[0])
    version = str(assigned(folder / "version.py", "__version__"))
    if tuple(map(int, version.split(".")[:2])) < TORCH_MINIMUM:
        raise BuildError(f"torch {version} is installed: {hint}")
    return Torch(version, folder / "include", folder / "lib")


def pybind11_include() -> Path | None:
    """The folder above pybind11/pybind11.h: the package's, else the copy that torch carries."""
    spec = importlib.util.find_spec("pybind11")
    torch = importlib.util.find_spec("torch")
    folders = [
        Path(folder, "include")
        for found in (spec, torch)
        if found is not None
        for folder in found.submodule_search_locations or ()
    ]
    return next((folder for folder in folders if (folder / "pybind11" / "pybind11.h").is_file()), None)


def find_ninja() -> str:
    """
    Raises:
        BuildError: ninja is not installed.
    """
    spec = importlib.util.find_spec("ninja")
    folders = [sysconfig.get_path("scripts"), os.environ.get("PATH", "")]
    if spec is not None and spec.origin:
        import ninja

        folders.insert(0, ninja.BIN_DIR)
    found = next(filter(None, (shutil.which("ninja", path=folder) for folder in folders)), None)
    if found is None:
        raise BuildError("compiling needs ninja: pip install ninja (ESR_KERNELS_NATIVE=0 installs pure Python)")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Build information


def assigned(path: Path, name: str) -> object:
    """The literal assigned to `name` at the top level of a Python file, which is not run."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.literal_eval(node.value)  # type: ignore[attr-defined]
    raise BuildError(f"{path} assigns no {name}")


def git_commit() -> str | None:
    """The commit that is checked out, with "-dirty" when the compiled sources differ from it."""
    if not (ROOT / ".git").exists():  # an unpacked archive inside another repository
        return None
    head = run(["git", "-C", str(ROOT), "rev-parse", "--verify", "HEAD"])
    changes = run(["git", "-C", str(ROOT), "status", "--porcelain", "--", "csrc", "setup.py"])
    if head.returncode != 0 or changes.returncode != 0:
        return None
    return head.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")


def build_information(tools: Toolchain, torch: Torch) -> dict[str, object]:
    """What `esr_kernels.native.build_info()` will tell of this build."""
    version = run([*tools.cxx, "--version"])
    machine = platform.machine()
    cuda = tools.cuda
    return {
        "version": assigned(ROOT / PACKAGE / "__init__.py", "__version__"),
        "interface": assigned(ROOT / PACKAGE / "native.py", "INTERFACE"),
        "compiler": next(iter(version.stdout.splitlines()), shlex.join(tools.cxx)),
        "flags": [*COMPILE_FLAGS, *tools.cxxflags],
        "torch": torch.version,
        "cuda": cuda.version if cuda else None,
        "cuda_architectures": list(cuda.architectures) if cuda else [],
        "git_commit": git_commit(),
        "simd": ["amx", "avx512", "avx2", "plain"] if machine in ("x86_64", "AMD64") else ["plain"],
        "platform": f"{sys.platform}-{machine}",
        "features": {"cuda": cuda is not None},
    }


def stamp_source(information: Mapping[str, object]) -> str:
    """C++ that defines the build information as one constant, which can be read from the file without loading it."""
    text = f"esr_kernels build information: {json.dumps(information)}"
    return (
        '// Written by setup.py.\nextern "C" {\n'
        '__attribute__((visibility("default"))) extern const char esr_kernels_build_information[];\n'
        f"const char esr_kernels_build_information[] = {json.dumps(text)};\n}}\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Compiling


def library_sources(root: Path) -> list[Path]:
    """The sources of the operator library, those for CUDA included."""
    files = [root / "csrc" / "library.cpp"]
    for folder, suffixes in (("cpu", (".cpp",)), ("cuda", (".cpp", ".cu"))):
        files += sorted(f for f in (root / "csrc" / folder).rglob("*") if f.suffix in suffixes)
    return files


def has_kernels(source: Path, seen: set[Path] | None = None) -> bool:
    """Whether a source or a header of ours that it includes defines a CUDA kernel, so that nvcc is to compile it.

    Other .cu files are host code. nvcc would read them again for every architecture.
    """
    seen = set() if seen is None else seen
    source = source.resolve()
    if source in seen or not source.is_file():
        return False
    seen.add(source)
    text = source.read_text(encoding="utf-8")
    if re.search(r"^(?!\s*(?:#|//)).*(?:\b__global__\b|\bESR_KERNEL\()", text, re.MULTILINE):
        return True
    return any(has_kernels(source.parent / name, seen) for name in re.findall(r'^#include "(.*)"', text, re.MULTILINE))


def architectures_of(source: Path, architectures: tuple[str, ...]) -> tuple[str, ...]:
    """What a CUDA source is compiled for: all architectures, or the one its name ends with, as in `name_sm90a.cu`.

    Such a source uses instructions that no other architecture has. It is compiled whatever was asked for, and launched
    on a device of that architecture only.
    """
    match = re.search(r"_sm(\d+)(\d[af]?)$", source.stem)
    return (f"{match[1]}.{match[2]}",) if match else architectures


def emulator_sources(root: Path) -> list[Path]:
    return sorted((root / "csrc" / "cuda").rglob("*.cu"))


class NinjaFile:
    """The text of a build.ninja: objects from sources, shared objects from objects."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = [
            "ninja_required_version = 1.5",
            f"python = {self._command([sys.executable])}",
            "rule compile",
            "  command = $tool -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule kernels",
            f"  command = $python {self._command([str(KERNEL_REPORT)])} table $out $same $in",
            "  restat = 1",
            "  description = list the kernels",
            "rule link",
            "  command = $tool $in -o $out $libraries",
            "  description = link $out",
        ]

    @staticmethod
    def _path(path: str) -> str:
        return re.sub(r"([$: ])", r"$\1", path)

    @staticmethod
    def _command(words: Iterable[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    def compile(self, source: Path, output: str, command: Iterable[str]) -> str:
        self.lines += [
            f"build {self._path(output)}: compile {self._path(str(source))}",
            f"  tool = {self._command(command)}",
        ]
        return output

    def list_kernels(self, objects: Iterable[str], output: str, same: Mapping[str, str]) -> None:
        """Writes C++ with the kernels that the objects' compilations told of; `same` is as in `shared_code`."""
        inputs = " ".join(map(self._path, objects))
        self.lines += [
            f"build {self._path(output)}: kernels {inputs} | {self._path(str(KERNEL_REPORT))}",
            f"  same = {self._command(f'--same={name}={other}' for name, other in same.items())}",
        ]

    def link(self, objects: Iterable[str], output: str, command: Iterable[str], libraries: Iterable[str]) -> None:
        self.lines += [
            f"build {self._path(output)}: link {' '.join(map(self._path, objects))}",
            f"  tool = {self._command(command)}",
            f"  libraries = {self._command(libraries)}",
        ]

    def write(self) -> None:
        write_if_changed(self.folder / "build.ninja", "\n".join(self.lines) + "\n")


def write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def replace_file(source: Path, target: Path) -> None:
    """Copies by renaming: a process that has the old file mapped keeps it whole."""
    if target.is_file() and filecmp.cmp(source, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copy(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def plan_build(folder: Path, names: Iterable[str], tools: Toolchain, torch: Torch) -> dict[str, Path]:
    """Writes build.ninja for the named extensions and returns the file that each becomes."""
    folder.mkdir(parents=True, exist_ok=True)
    ninja = NinjaFile(folder)
    cuda = tools.cuda
    isystem = ["-isystem", str(torch.include)]
    macros = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    if cuda:
        macros += ["-DUSE_CUDA", "-DESR_KERNELS_WITH_CUDA"]
    # Error messages name csrc/cpu/engine.cpp, not where it was compiled.
    cxx = [*tools.cxx, *COMPILE_FLAGS, f"-fmacro-prefix-map={ROOT}/=", f"-I{ROOT / 'csrc'}"]
    shared = [*tools.cxx, "-shared", "-Wl,-z,defs", "-Wl,--exclude-libs,ALL"]

    stamp = folder / "build_information.cpp"
    write_if_changed(stamp, stamp_source(build_information(tools, torch)))
    stamp_object = ninja.compile(stamp, "build_information.o", [*tools.cxx, *COMPILE_FLAGS, *tools.cxxflags])

    outputs = {}
    kernels: list[str] = []  # objects with CUDA kernels
    if LIBRARY in names:
        objects = [stamp_object]
        for source in library_sources(ROOT):
            relative = source.relative_to(ROOT / "csrc")
            if relative.parts[0] == "cuda" and cuda is None:
                continue
            output = f"library/{relative}.o"
            if cuda and source.suffix == ".cu" and has_kernels(source):
                flags = gencode_flags(architectures_of(source, cuda.architectures))
                command = [cuda.nvcc, *NVCC_FLAGS, *nvcc_host_compiler(tools.cxx), *flags]
                command += [f"-I{ROOT / 'csrc'}", *isystem, *macros, *tools.nvcc_flags]
                command = [sys.executable, str(KERNEL_REPORT), "compile", output, *command]
                kernels.append(output)
            else:
                headers = ["-isystem", str(cuda.root / "include")] if cuda else []
                command = [*cxx, *isystem, *headers, *macros, *tools.cxxflags]
                command += ["-x", "c++"] * (source.suffix == ".cu")
            objects.append(ninja.compile(source, output, command))
        # --no-as-needed: libtorch.so has no symbol of its own, but where torch has CUDA it brings libtorch_cuda.so.
        libraries = [f"-L{torch.lib}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]
        if cuda:
            libraries += [*cudart_folder(cuda), "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        outputs[LIBRARY] = folder / "_esr_native.so"
        ninja.link(objects, outputs[LIBRARY].name, shared, [*libraries, *tools.ldflags])
    if EMULATOR in names:
        # Kernels are run, not benchmarked, and a build with symbols tells where a failed check was.
        command = [
            *cxx,
            "-O2",
            "-x",
            "c++",
            *isystem,
            "-Wno-unknown-pragmas",
            "-DESR_EMULATOR",
            *macros[:1],
            *tools.cxxflags,
        ]
        objects = [ninja.compile(source, f"emulator/{source.name}.o", command) for source in emulator_sources(ROOT)]
        outputs[EMULATOR] = folder / "_esr_emulator.so"
        libraries = [f"-L{torch.lib}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
        ninja.link(objects, outputs[EMULATOR].name, shared, [*libraries, *tools.ldflags])
    if MODULE in names:
        python = ["-isystem", sysconfig.get_path("include"), "-isystem", str(pybind11_include())]
        command = [*cxx, *python, *isystem, *tools.cxxflags]
        compiled = ninja.compile(ROOT / "csrc" / "python_module.cpp", "python_module.o", command)
        outputs[MODULE] = folder / "_build_info.so"
        ninja.list_kernels(kernels, "cuda_kernels.cpp", shared_code(cuda.architectures if cuda else ()))
        table = ninja.compile(Path("cuda_kernels.cpp"), "cuda_kernels.o", [*tools.cxx, *COMPILE_FLAGS])
        # A module's Python symbols come from the interpreter that loads it.
        link = [word for word in shared if word != "-Wl,-z,defs"]
        ninja.link([compiled, stamp_object, table], outputs[MODULE].name, link, tools.ldflags)
    ninja.write()
    return outputs


def nvcc_host_compiler(cxx: tuple[str, ...]) -> list[str]:
    """nvcc takes one program as its host compiler, without a launcher such as ccache before it."""
    program = next((word for word in cxx if Path(word).name not in ("ccache", "sccache", "distcc")), cxx[-1])
    return ["-ccbin", shutil.which(program) or program]


def cudart_folder(cuda: Cuda) -> list[str]:
    folders = [cuda.root / name for name in ("lib64", "lib")] + sorted(cuda.root.glob("targets/*-linux/lib"))
    found = next((folder for folder in folders if (folder / "libcudart_static.a").is_file()), None)
    return [f"-L{found}"] if found else []


class BuildExt(build_ext):
    """Compiles all extensions in one run of ninja."""

    tools: Toolchain | None = None
    reason = ""

    def finalize_options(self) -> None:
        super().finalize_options()
        if not self.inplace:  # it is for the tests, and no part of a wheel
            self.extensions = [e for e in self.extensions or [] if e.name != EMULATOR]

    def run(self) -> None:
        warn_pure_python(self.tools, self.reason)
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2] in (LIBRARY.rpartition(".")[2], EMULATOR.rpartition(".")[2]):
            return os.path.join(*fullname.split(".")) + ".so"  # no Python's tag: it serves all of them
        return str(super().get_ext_filename(fullname))

    def build_extensions(self) -> None:
        assert self.tools is not None
        torch = find_torch()
        folder = Path(self.build_temp).resolve() / f"torch-{torch.version}"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            outputs = plan_build(folder, [e.name for e in self.extensions], self.tools, torch)
            sys.stdout.flush()
            command = [find_ninja(), "-C", str(folder), "-j", str(job_count(os.environ))]
            if self.force:
                subprocess.run([*command, "-t", "clean"], check=False)
            if subprocess.run(command, check=False).returncode != 0:
                raise BuildError(
                    "compiling failed, see above (ESR_KERNELS_NATIVE=0 installs pure Python"
                    + (", ESR_KERNELS_CUDA=0 leaves CUDA out)" if self.tools.cuda else ")")
                )
            for name, output in outputs.items():
                replace_file(output, Path(self.build_lib, self.get_ext_filename(name)))

    def copy_extensions_to_source(self) -> None:
        folder = Path(self.get_finalized_command("build_py").get_package_dir(PACKAGE))
        for extension in self.extensions:
            file = self.get_ext_filename(extension.name)
            replace_file(Path(self.build_lib, file), folder / Path(file).name)


class BuildPy(build_py):
    """Says what is missing from a pure-Python install, for which BuildExt is not run."""

    tools: Toolchain | None = None
    reason = ""

    def run(self) -> None:
        warn_pure_python(self.tools, self.reason)
        super().run()


_warned: list[str] = []


def warn_pure_python(tools: Toolchain | None, reason: str) -> None:
    if tools is None and reason and reason not in _warned:
        _warned.append(reason)
        print(f"warning: esr_kernels is installed without its compiled kernels: {reason}", file=sys.stderr)


def extensions(tools: Toolchain | None) -> list[Extension]:
    """The extensions that can be built here; their sources are named for `sdist` only."""
    if tools is None:
        return []
    found = [Extension(LIBRARY, [str(f.relative_to(ROOT)) for f in library_sources(ROOT)])]
    missing = [
        name
        for name, there in (
            ("Python.h", Path(sysconfig.get_path("include"), "Python.h").is_file()),
            ("pybind11", pybind11_include() is not None),
        )
        if not there
    ]
    if missing:
        print(f"note: the module {MODULE} is left out: no {' and no '.join(missing)}", file=sys.stderr)
    else:
        found.append(Extension(MODULE, ["csrc/python_module.cpp"]))
    if switch(os.environ, "ESR_KERNELS_EMULATOR") == "1":
        found.append(Extension(EMULATOR, [str(f.relative_to(ROOT)) for f in emulator_sources(ROOT)]))
    return found


def main() -> None:
    try:
        tools, reason = find_toolchain(os.environ, library_sources(ROOT))
        found = extensions(tools)
    except BuildError as error:
        sys.exit(f"error: {error}")
    BuildExt.tools = BuildPy.tools = tools
    BuildExt.reason = BuildPy.reason = reason
    setup(ext_modules=found, cmdclass={"build_ext": BuildExt, "build_py": BuildPy})


if __name__ == "__main__":
    main()
