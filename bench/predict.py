"""What a model's launches on the CUDA engine should take on a GPU nobody has measured yet.

    python -m bench.predict --model span --size 256x256
    python -m bench.predict --model span --persistent

Arithmetic, to hold the first measurement against: for each kind of launch the larger of its products over the rate that
`mma.sync` reaches and its bytes over the memory's rate, and once per launch the gap to the one before. `--wgmma`: with
ESR_KERNELS_CUDA_WGMMA=1.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

import esr_kernels
import python_models
from esr_kernels.plan import Layer, Plan, layer_flops


@dataclass(frozen=True)
class Gpu:
    """Assumed, not measured: float16 products with float32 sums, bytes per second of maps of a few megabytes, and the
    gap between launches of a CUDA graph (with programmatic dependent launch where there is one)."""

    tflops: float
    bandwidth: float
    gap_us: float
    multiprocessors: int


# Hopper through mma.sync: 0.63 of the tensor cores' peak; maps stay in its L2.
GPUS = {
    "h100": Gpu(620, 5.5e12, 0.5, 132),
    "h200": Gpu(620, 5.5e12, 0.5, 132),
    "a100": Gpu(280, 1.5e12, 1.3, 108),
    "a6000": Gpu(140, 0.69e12, 1.3, 84),
    "rtx3090": Gpu(64, 0.84e12, 1.3, 82),
    "rtx4090": Gpu(150, 0.91e12, 1.3, 128),
}
# A chain's tile (csrc/cuda/chain.cu), and what passing a border on takes: three ways through L2, of what is published,
# of the flag, and of what is read, each as long as a load takes there.
CHAIN_TILE = (16, 32)
EXCHANGE_US = 3 * 0.25
UNIT = 8  # channels of a unit in half types
TILE, WGMMA_TILE = (8, 32), (8, 16)
CONVOLUTIONS = ("conv3x3", "conv3x3_pixel_shuffle", "bsconv")
MOST_WGMMA_CHANNELS = 64


def padded(channels: int) -> int:
    return -(-channels // UNIT) * UNIT


def wgmma_tflops(channels: int) -> float:
    """What Hopper's products of 64 pixels by some channels reach.

    A multiprocessor multiplies 64x16 by 16xN in N / 2 cycles, and reads 2048 + 32 N bytes of shared memory for it, 128
    in a cycle. Nothing sustains more than 0.8 of the peak.
    """
    peak, cycles, read = 989, channels / 2, (2048 + 32 * channels) / 128
    return min(0.8 * peak, peak * cycles / max(cycles, read))


def columns(layer: Layer) -> int:
    """Channels of the product, before any pixel shuffle."""
    return layer.channels * (int(layer.scale) ** 2 if layer.op == "conv3x3_pixel_shuffle" else 1)


def products(layer: Layer, cin: list[int], height: int, width: int) -> float:
    """Floating-point operations with channels and steps padded as the kernel pads them."""
    cout = padded(columns(layer))
    if layer.op in CONVOLUTIONS:
        units = 9 * padded(cin[0]) // UNIT
        return 2 * (units + units % 2) * UNIT * cout * height * width
    if layer.op == "conv1x1":
        return 2 * sum(map(padded, cin)) * cout * height * width
    if layer.op == "esa":
        return 1.3 * layer_flops("esa", cin, layer.channels, layer.attributes, height, width)
    return 0


def traffic(layer: Layer, cin: list[int], pixels: list[int], tile: tuple[int, int] = TILE) -> float:
    """Bytes read and written, the halo of a tile counted as often as it is read; `pixels` of inputs and result."""
    halo = (tile[0] + 2) * (tile[1] + 2) / (tile[0] * tile[1]) if layer.halo else 1
    first = (cin[0] if cin[0] < UNIT else padded(cin[0])) * halo * pixels[0]
    rest = sum(padded(c) * n for c, n in zip(cin[1:], pixels[1:-1], strict=True))
    out = (layer.channels if layer.scale > 1 else padded(layer.channels)) * pixels[-1]
    passes = 2 if layer.op == "esa" else 1  # the stride-2 convolution and the gate both read x
    return 2 * (passes * first + rest + out)


LAUNCHES = {"normalize": 0, "esa": 3, "statistic": 2}


def chain_lengths(plan: Plan) -> dict[int, int]:
    """First layer -> the number of layers that are one launch under ESR_KERNELS_CUDA_PERSISTENT."""
    found: dict[int, int] = {}
    first = -1
    for k, layer in enumerate(plan.layers):
        cin = [plan.channels[i] for i in layer.inputs]
        fits = layer.op == "conv3x3" or (layer.op == "conv1x1" and len(cin) == 1)
        fits = fits and padded(cin[0]) == padded(layer.channels)
        follows = first >= 0 and layer.inputs[0] == len(plan.inputs) + k - 1
        first = -1 if not fits else first if follows else k
        if fits:
            found[first] = k + 1 - first
    return {k: n for k, n in found.items() if n > 1}


def chain_tiles(height: int, width: int) -> int:
    return -(-height // CHAIN_TILE[0]) * -(-width // CHAIN_TILE[1])


def chain_row(plan: Plan, gpu: Gpu, first: int, count: int, height: int, width: int) -> tuple[float, float, float]:
    """GFLOP, MB and microseconds of `count` layers in one launch: a tile for each multiprocessor, products at its share
    of the rate, and the tile's border passed on before every 3x3 convolution but the first."""
    layers = plan.layers[first : first + count]
    pixels = CHAIN_TILE[0] * CHAIN_TILE[1]
    operations = [products(layer, [plan.channels[layer.inputs[0]]], height, width) for layer in layers]
    own = sum(operations) * pixels / (height * width) / (gpu.tflops / gpu.multiprocessors) / 1e6
    exchanges = sum(layer.op == "conv3x3" for layer in layers[1:])
    border = 2 * (sum(CHAIN_TILE) - 2) * padded(layers[0].channels) * 2
    moved = chain_tiles(height, width) * (2 * border * exchanges + 2 * pixels * padded(layers[0].channels) * 2)
    # Flags are cleared by a launch of their own, and neither begins before all of the one before it is done.
    return sum(operations) / 1e9, moved / 1e6, own + exchanges * EXCHANGE_US + 2 * max(gpu.gap_us, 1.3)


def rows(
    plan: Plan, gpu: Gpu, height: int, width: int, wgmma: bool = False, persistent: bool = False
) -> list[tuple[str, int, float, float, float]]:
    """Kind, how often, GFLOP, MB and microseconds of each kind of layer."""
    found: dict[tuple[object, ...], list[float]] = {}
    fits = chain_tiles(height, width) <= gpu.multiprocessors
    chains = chain_lengths(plan) if persistent and fits else {}
    chained = {first + i: first for first, count in chains.items() for i in range(count)}
    sizes = plan.sizes(height, width)
    for k, layer in enumerate(plan.layers):
        if k in chained:
            if k in chains:
                name = f"{chains[k]} layers {plan.channels[layer.inputs[0]]} -> {layer.channels} in one launch"
                found.setdefault((name, *chain_row(plan, gpu, k, chains[k], height, width)), []).append(1)
            continue
        launches = LAUNCHES.get(layer.op, 1)
        if launches == 0:
            continue
        # A 1x1 convolution right behind a 3x3 one adds products to its launch, and no traffic.
        behind = layer.op == "conv1x1" and len(layer.inputs) == 1 and plan.layers[k - 1].op == "conv3x3"
        launches = 0 if behind else launches
        cin = [plan.channels[i] for i in layer.inputs]
        by_wgmma = wgmma and layer.op in CONVOLUTIONS and cin[0] <= MOST_WGMMA_CHANNELS
        pixels = [h * w for h, w in (sizes[i] for i in (*layer.inputs, len(plan.inputs) + k))]
        operations = products(layer, cin, *sizes[layer.inputs[0]])
        size = 0 if behind else traffic(layer, cin, pixels, WGMMA_TILE if by_wgmma else TILE)
        tflops = wgmma_tflops(padded(columns(layer))) if by_wgmma else gpu.tflops
        us = max(operations / tflops / 1e6, size / gpu.bandwidth * 1e6) + launches * gpu.gap_us
        suffix = "in the same launch, " if behind else ""
        name = f"{layer.op} {suffix}{'+'.join(map(str, cin))} -> {columns(layer)}"
        found.setdefault((name, operations / 1e9, size / 1e6, us), []).append(1)
    return [(str(k[0]), len(n), float(k[1]), float(k[2]), float(k[3])) for k, n in found.items()]  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="span", choices=python_models.list_models())
    parser.add_argument("--size", default="256x256", help="height x width of the small image (default 256x256)")
    parser.add_argument("--gpu", default="h200", choices=GPUS)
    parser.add_argument("--wgmma", action="store_true", help="3x3 convolutions by wgmma (h100, h200)")
    parser.add_argument("--persistent", action="store_true", help="with ESR_KERNELS_CUDA_PERSISTENT=1")
    arguments = parser.parse_args()
    if arguments.wgmma and arguments.gpu not in ("h100", "h200"):
        parser.error(f"{arguments.gpu} has no wgmma")
    height, width = map(int, arguments.size.split("x"))
    plan = esr_kernels.optimize(python_models.create(arguments.model), dtype=torch.float16).plan
    assert plan is not None
    table = rows(plan, GPUS[arguments.gpu], height, width, arguments.wgmma, arguments.persistent)
    way = (", wgmma" if arguments.wgmma else "") + (", persistent" if arguments.persistent else "")
    print(f"{arguments.model}, {arguments.size}, float16, {arguments.gpu}{way}: predicted, not measured\n")
    print("| launch | times | GFLOP | MB | us each |\n|---|---|---|---|---|")
    for name, count, operations, size, us in table:
        print(f"| {name} | {count} | {operations:.2f} | {size:.1f} | {us:.1f} |")
    print(f"\nIn all {sum(count * us for _, count, _, _, us in table):.0f} us.")


if __name__ == "__main__":
    main()
