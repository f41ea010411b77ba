"""The CPU backend's tests with the library compiled for a sanitizer: what `make sanitize` does.

    python tests/sanitize.py [--quick] [address] [thread] [-- arguments of pytest]

`--quick`, which `make test` runs: AddressSanitizer and UndefinedBehaviorSanitizer only, a few drawn calls of every
operator and its gradients in many threads, with each of the kernels.

On a CPU that has AVX2 and no AMX, or where Linux refuses a process its registers, the kernels for AVX-512 and AMX are
compiled with emulated instructions (emulated_avx512.h, emulated_amx.h), so that they are tested there too.

"address" stands for AddressSanitizer and UndefinedBehaviorSanitizer, "thread" for ThreadSanitizer. Python and PyTorch
are not compiled for them, so the sanitizers' libraries are loaded before everything else. For each sanitizer a planted
bug must be found first.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "sanitize"
TESTS = ("conv3x3", "spab", "conv3x3_pixel_shuffle", "conv1x1", "esa", "bsconv", "depthwise_conv", "layer_norm2d")
TESTS += ("adaptive_max_pool", "modulate", "window_attention")
NATIVE_TESTS = ("native_cpu", "native_cpu_direct", "native_cpu_window", "native_cpu_backward", "native_bfloat")
TESTS += (*NATIVE_TESTS, "properties", "processes")
CHOSEN = "native-cpu or native_cpu or native_bfloat or many_threads or winograd_keeps"
QUICK_TESTS = ("properties", "processes")
QUICK_CHOSEN = "native-cpu or one_operator_in_many_threads or winograd_keeps"
QUICK_EXAMPLES = 8
CAPABILITY = torch.backends.cpu.get_cpu_capability()  # of this CPU, in PyTorch's words
HAS_AVX2 = CAPABILITY in ("AVX2", "AVX512")


def has_amx() -> bool:
    """Whether this CPU has it and Linux lets a process use it, which has to ask."""
    if not {"amx_bf16", "avx512_bf16"} <= set(Path("/proc/cpuinfo").read_text().split()):
        return False
    arch_prctl, request, tile_data = 158, 0x1023, 18  # ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


EMULATES = HAS_AVX2 and not has_amx()
FOUND = 66  # exit status of a program in which something was found

OVERFLOW = """
extern "C" int planted() {
  volatile int* values = new int[4]();
  int sum = values[4];
  delete[] values;
  return sum;
}
"""
SHIFT = """
extern "C" int planted() {
  volatile int places = 40;
  return 1 << places;
}
"""
RACE = """
#include <thread>
static int count = 0;
extern "C" int planted() {
  std::thread other([] { for (int i = 0; i < 1000; ++i) ++count; });
  for (int i = 0; i < 1000; ++i) ++count;
  other.join();
  return count;
}
"""


@dataclass(frozen=True)
class Sanitizer:
    flags: str
    libraries: tuple[str, ...]
    environment: dict[str, str]
    planted: dict[str, str]  # what must be reported -> source
    launcher: tuple[str, ...] = ()


SANITIZERS = {
    "address": Sanitizer(
        "address,undefined",
        ("libasan.so", "libubsan.so"),
        {
            # Python frees little before it ends.
            "ASAN_OPTIONS": f"detect_leaks=0:exitcode={FOUND}",
            "UBSAN_OPTIONS": f"halt_on_error=1:print_stacktrace=1:exitcode={FOUND}",
        },
        {"heap-buffer-overflow": OVERFLOW, "shift exponent 40 is too large": SHIFT},
    ),
    "thread": Sanitizer(
        "thread",
        ("libtsan.so",),
        {"TSAN_OPTIONS": f"ignore_noninstrumented_modules=1:halt_on_error=1:exitcode={FOUND}"},
        {"data race": RACE},
        # Its shadow memory has fixed addresses, which a randomised layout may occupy.
        ("setarch", "-R"),
    ),
}


def environment(sanitizer: Sanitizer, folder: Path) -> dict[str, str]:
    compiler = os.environ.get("CXX", "c++").split()
    found = [
        subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        for name in sanitizer.libraries
    ]
    return {
        **os.environ,
        **sanitizer.environment,
        "LD_PRELOAD": " ".join(done.stdout.strip() for done in found),
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "2",
        "ESR_KERNELS_TEST_THREADS": "2",
    }


def build(name: str, sanitizer: Sanitizer, folder: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(folder), "build_ext"]
    command += ["--build-lib", str(folder), "--build-temp", str(FOLDER / f"{name}-objects")]
    flags = f"-fsanitize={sanitizer.flags}"
    emulation = f" -DESR_EMULATED_AVX512 -I{shlex.quote(str(ROOT / 'tests'))}" if EMULATES else ""
    subprocess.run(
        command,
        cwd=ROOT,
        check=True,
        env={
            **os.environ,
            "CXXFLAGS": f"{flags} -fno-omit-frame-pointer -g1 -O1{emulation}",
            "LDFLAGS": flags,
            "ESR_KERNELS_NATIVE": "1",
            "ESR_KERNELS_CUDA": "0",
        },
    )


def check_planted(sanitizer: Sanitizer, env: dict[str, str]) -> None:
    for report, source in sanitizer.planted.items():
        library = FOLDER / "planted.so"
        command = [*os.environ.get("CXX", "c++").split(), f"-fsanitize={sanitizer.flags}", "-g1", "-shared", "-fPIC"]
        subprocess.run([*command, "-x", "c++", "-", "-o", str(library)], input=source, text=True, check=True)
        call = f"import ctypes; ctypes.CDLL({str(library)!r}).planted()"
        done = subprocess.run(
            [*sanitizer.launcher, sys.executable, "-c", call], env=env, capture_output=True, text=True, check=False
        )
        if done.returncode != FOUND or report not in done.stderr:
            sys.exit(f"the planted bug ({report}) was not found:\n{done.stderr}")
        print(f"planted bug found: {report}")


def run(sanitizer: Sanitizer, env: dict[str, str], tests: tuple[str, ...], chosen: str, *options: str) -> int:
    """Exit status of the chosen tests."""
    files = [f for test in tests if (f := ROOT / "tests" / f"test_{test}.py").is_file()]
    # -P: the folder of the sanitized build stands before this one.
    command = [*sanitizer.launcher, sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-k", chosen, *map(str, files), *options]
    return subprocess.run(command, cwd=ROOT, env=env, check=False).returncode


def quick(*options: str) -> int:
    """Exit status of the first run that fails, else 0."""
    sanitizer, folder = SANITIZERS["address"], FOLDER / "address"
    build("address", sanitizer, folder)
    env = environment(sanitizer, folder) | {"ESR_KERNELS_EXAMPLES": str(QUICK_EXAMPLES)}
    check_planted(sanitizer, env)
    for capability in ("plain", *(["avx2", "avx512", "amx"] if HAS_AVX2 else [])):
        print(f"--- {sanitizer.flags}, {capability} kernels", flush=True)
        env["ESR_KERNELS_CPU_CAPABILITY"] = capability
        if status := run(sanitizer, env, QUICK_TESTS, QUICK_CHOSEN, *options):
            return status
    # Elsewhere they have all their tests.
    if EMULATES and (status := run(sanitizer, env, NATIVE_TESTS, "avx512 or native_bfloat", *options)):
        return status
    return 0


def main(arguments: list[str]) -> int:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    given, options = arguments[:at], arguments[at + 1 :]
    chosen = [name for name in given if name != "--quick"] or list(SANITIZERS)
    for name in chosen:
        if name not in SANITIZERS:
            sys.exit(f"{name!r} is no sanitizer, allowed are {', '.join(SANITIZERS)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    if "--quick" in given:
        return quick(*options)
    for name in chosen:
        sanitizer, folder = SANITIZERS[name], FOLDER / name
        print(f"--- {sanitizer.flags}", flush=True)
        build(name, sanitizer, folder)
        env = environment(sanitizer, folder)
        check_planted(sanitizer, env)
        if status := run(sanitizer, env, TESTS, CHOSEN, *options):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
