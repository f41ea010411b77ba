"""Which fused operators the networks call, and where the rest of their time goes, as Markdown for docs/models.md.

python -m bench.census --size 128x128
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from esr_kernels import cases
from esr_kernels.commands._arguments import expand, model_name, positive, size
from esr_kernels.profiling import Shares, shares

OPERATORS = ("conv3x3", "spab", "conv3x3_pixel_shuffle", "conv1x1", "esa", "bsconv", "depthwise_conv", "layer_norm2d")
OPERATORS += ("adaptive_max_pool", "modulate", "selective_scan", "window_attention")


def census(name: str, height: int, width: int) -> Shares:
    """One network as fused modules with random weights on the CPU."""
    model, _ = cases.model_pair(name)
    x = cases.random_image(model, 1, height, width)
    with torch.inference_mode():
        model(x)
    return shares(lambda: model(x))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.census", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", type=model_name, default=["all"], metavar="NAME")
    parser.add_argument("--size", type=size, default=(128, 128), metavar="HxW")
    parser.add_argument("--threads", type=positive, default=1, metavar="N")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    print("| model |", " | ".join(OPERATORS), "| time in them | and in PyTorch's |")
    print("|---" + "|--:" * (len(OPERATORS) + 1) + "|---|")
    for name in expand(args.models, cases.model_names()):
        found = census(name, *args.size)
        rest = ", ".join(f"{operator} {share:.0%}" for operator, share in found.plain)
        calls = " | ".join(str(found.calls.get(operator, "")) for operator in OPERATORS)
        inside = "" if found.fused is None else f"{found.fused:.0%}"
        print(f"| `{name}` | {calls} | {inside} | {rest} |", flush=True)


if __name__ == "__main__":
    main()
