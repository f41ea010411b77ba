"""Which fused operators the networks call, and where the rest of their time goes, as Markdown for docs/models.md.

python -m bench.census --size 128x128
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from esr_kernels import cases
from esr_kernels.commands._arguments import expand, model_name, positive, size

OPERATORS = ("conv3x3", "spab", "conv3x3_pixel_shuffle", "conv1x1", "esa", "bsconv", "depthwise_conv", "layer_norm2d")


def census(name: str, height: int, width: int, rounds: int = 3) -> dict[str, Any]:
    """One network as fused modules with random weights on the CPU.

    Returns:
        calls: operator -> how often a forward pass calls it; share: of the time inside them, 0..1; rest: what else
        takes a hundredth of the time or more, (PyTorch's operator, share), the largest first.
    """
    model, _ = cases.model_pair(name)
    x = cases.random_image(model, 1, height, width)
    with torch.inference_mode():
        model(x)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(rounds):
                model(x)
    calls: Counter[str] = Counter()
    inside, rest = 0.0, Counter[str]()
    for event in profiler.events():
        parent, fused = event.cpu_parent, event.name.startswith("esr::")
        if fused:
            calls[event.name.removeprefix("esr::")] += 1
            inside += event.cpu_time_total
        # Of PyTorch's operators the outermost: what they call is theirs.
        elif parent is None and event.name.startswith("aten::"):
            rest[event.name.removeprefix("aten::")] += event.cpu_time_total
    total = inside + sum(rest.values())
    return {
        "calls": {operator: count // rounds for operator, count in calls.items()},
        "share": inside / total,
        "rest": [(operator, us / total) for operator, us in rest.most_common() if us >= 0.01 * total],
    }


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
        rest = ", ".join(f"{operator} {share:.0%}" for operator, share in found["rest"])
        calls = " | ".join(str(found["calls"].get(operator, "")) for operator in OPERATORS)
        print(f"| `{name}` | {calls} | {found['share']:.0%} | {rest} |", flush=True)


if __name__ == "__main__":
    main()
