"""`esr-kernels info`: what a bug report needs."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from .. import native
from ..dispatch import chosen_backend, list_backends
from ..timing import machine


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "info",
        help="versions, devices and backends",
        description="Versions, devices, the compiled library and every backend with the reason when it cannot run.",
    )
    parser.add_argument("--kernels", action="store_true", help="what the CUDA kernels need of a GPU, as Markdown")
    parser.add_argument("--json", action="store_true", help="as JSON")
    return parser


def _collect() -> dict[str, Any]:
    build = native.build_info()
    library = native.library_path()
    return {
        **machine(),
        "threads": torch.get_num_threads(),
        "library": {
            "loaded": native.load() is None,
            "reason": native.load(),
            "file": library.name if library else None,
        },
        "build": build,
        "backends": [
            {"name": b.name, "available": b.available, "reason": b.reason, "operators": list(b.operators)}
            for b in list_backends()
        ],
        "chosen_backend": chosen_backend(),
    }


def _kernels(as_json: bool) -> int:
    from ..backends.native import resources

    kernels = native.kernel_info()
    if not kernels and not as_json:
        print("No CUDA kernels: the library was compiled without them, or the module _build_info is missing.")
        return 0
    layers = resources.layer_info()
    if as_json:
        print(json.dumps({"kernels": kernels, "layers": layers}, indent=1))
        return 0
    architectures = " / ".join(dict.fromkeys(k["architecture"] for k in kernels))
    print(f"Architectures {architectures}; layers at 256x256, one image.\n")
    print(f"{resources.markdown(kernels)}\n\n{resources.markdown(layers)}")
    return 0


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    if args.kernels:
        return _kernels(args.json)
    info = _collect()
    if args.json:
        print(json.dumps(info, indent=1))
        return 0
    versions, cpu, build = info["versions"], info["cpu"], info["build"]
    simd = info["native"].get("active_simd")
    rows = [
        ("esr_kernels", versions["esr_kernels"]),
        ("Python", f"{versions['python']} on {info['os']}"),
        ("PyTorch", f"{versions['torch']}, CUDA {torch.version.cuda or 'not built in'}"),
        ("Triton", versions["triton"] or "not installed"),
        ("CPU", f"{cpu['model']}, {cpu['cores']} cores, {info['threads']} threads"),
        ("kernels", f"{simd} of {', '.join(build['simd'])}" if simd else "none compiled"),
        ("GPUs", ", ".join(f"{g['name']} (driver {g['driver']})" for g in info["gpus"]) or "none"),
    ]
    if build:
        cuda = f"CUDA {build['cuda']}" if build["cuda"] else "no CUDA"
        architectures = ", ".join(build["cuda_architectures"]) or "none"
        rows += [
            ("library", f"{build['compiler']}, PyTorch {build['torch']}, {cuda}"),
            ("GPU architectures", architectures),
        ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:{width}}  {value}")
    print("backends:")
    for b in info["backends"]:
        state = f"{', '.join(b['operators'])}" if b["available"] else f"not available: {b['reason']}"
        print(f"  {b['name']:12}  {state}")
    if info["chosen_backend"]:
        print(f"chosen by the environment: {info['chosen_backend']}")
    return 0
