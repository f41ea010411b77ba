"""What the protocol measures of one network, as fused by `optimize` and in plain PyTorch."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import python_models
from python_models.base import Network

from .. import memory
from ..imaging import ImageError, Picture, quantize, to_tensor
from ..optimize import optimize
from ..timing import EventClock
from ..training.data import Pixels
from ..training.evaluate import psnr
from .data import Pair

PLAIN, FUSED = "plain", "fused"
ENGINES = (PLAIN, FUSED)
COUNTED = 256  # pixels a side of the image that FLOPs and activations are counted for
# fvcore runs what it counts: beyond this many multiply-adds the card's count, which a test holds, stands for it.
_RUNS = 200_000_000_000

Record = dict[str, Any]


@dataclass(frozen=True)
class Complexity:
    """Of the deployed network and an image of 3x256x256.

    Attributes:
        parameters: number of values.
        flops: multiply-adds as fvcore counts them, which is how Table 1 does.
        activations: values that the calls of convolution modules return.
        convolutions: number of these calls.
    """

    parameters: int
    flops: int
    activations: int
    convolutions: int


def complexity(name: str, *, flops: bool = True) -> Complexity:
    """Of a network by its name.

    Args:
        name: in `python_models`.
        flops: count them; otherwise the card's.
    """
    card = python_models.card(name)
    activations = convolutions = 0

    def count(module: nn.Module, _inputs: tuple[Tensor, ...], result: Tensor) -> None:
        nonlocal activations, convolutions
        # A gate returns the product of the convolution's halves.
        activations += result.numel() * (2 if getattr(module, "gated", False) else 1)
        convolutions += 1

    # On the meta device nothing is computed.
    with torch.device("meta"):
        twin, x = python_models.plain(name), torch.rand(1, 3, COUNTED, COUNTED)
    for module in twin.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(count)
    with torch.inference_mode():
        twin(x)
    counted = _fvcore_flops(name) if flops and card.flops < _RUNS else card.flops
    return Complexity(sum(p.numel() for p in twin.parameters()), counted, activations, convolutions)


def _fvcore_flops(name: str) -> int:
    from fvcore.nn import FlopCountAnalysis

    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    model = python_models.plain(name).requires_grad_(False)
    analysis = FlopCountAnalysis(model, torch.rand(1, 3, COUNTED, COUNTED))
    return int(analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total())


class Contestant:
    """One network under measurement.

    Args:
        name: in `python_models`.
        weights: a checkpoint; None for random weights, the same at every call.
        device: "cpu" or "cuda".
        engines: of `ENGINES`.
        entry: of the checkpoint.

    Raises:
        CheckpointError: of the weights.
    """

    def __init__(
        self,
        name: str,
        weights: Any,
        device: torch.device,
        engines: Sequence[str] = ENGINES,
        *,
        entry: str | None = None,
    ) -> None:
        self.name, self.device = name, device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = python_models.create(name, weights, entry=entry)
        self.data_range, self.minimum_size = float(model.data_range), int(model.minimum_size)
        self.refused: list[str] = []
        self.left: list[str] = []
        make = {PLAIN: self._plain, FUSED: self._fused}
        self.engines: dict[str, Callable[[Tensor], Tensor]] = {engine: make[engine](model) for engine in engines}
        self._clock = EventClock() if device.type == "cuda" else time.perf_counter

    def _plain(self, model: Network) -> nn.Module:
        twin = python_models.plain(self.name, **model.options)
        twin.load_state_dict(model.state_dict())
        return twin.to(self.device).requires_grad_(False)

    def _fused(self, model: Network) -> nn.Module:
        fast = optimize(model.to(self.device))
        self.refused, self.left = fast.report().wrong, fast.report().left
        return fast

    def _image(self, low: Pixels) -> Tensor:
        return to_tensor(Picture(low), self.data_range).to(self.device)

    @torch.inference_mode()
    def run(self, pair: Pair, *, backwards: bool = False, warmup: int = 0) -> list[Record]:
        """Time every engine on one picture and judge what it returns.

        Args:
            pair: the picture.
            backwards: the order of the engines.
            warmup: calls of each before its time is taken.

        Returns:
            For each engine its name, `ms`, `psnr` [dB] (None without a high-resolution picture) and, with both engines,
            `difference`: the largest, relative to the data range.

        Raises:
            ImageError: the picture cannot be used.
        """
        low, high = pair.load()
        if min(low.shape[:2]) < self.minimum_size:
            raise ImageError(
                f"{pair.name}: {low.shape[1]} x {low.shape[0]} pixels, {self.name} needs {self.minimum_size} a side"
            )
        x = self._image(low)
        records: list[Record] = []
        results: dict[str, Tensor] = {}
        for engine in sorted(self.engines, reverse=backwards):
            call = self.engines[engine]
            for _ in range(warmup):
                call(x)
            begin = self._clock()
            result = call(x)
            seconds = self._clock() - begin
            results[engine] = result
            quality = None if high is None else psnr(quantize(result, self.data_range, 8, False), high)
            records.append({"engine": engine, "ms": seconds * 1e3, "psnr": quality})
        if len(results) == len(ENGINES):
            largest = max(float(results[PLAIN].abs().max()), self.data_range)
            difference = float((results[FUSED] - results[PLAIN]).abs().max()) / largest
            for record in records:
                record["difference"] = difference
        return records

    @torch.inference_mode()
    def peaks(self, low: Pixels) -> dict[str, int | None]:
        """Bytes that each engine needs for a picture beyond weights and picture, its result included.

        Call it after `run`: what is compiled and allocated once is there.
        """
        x = self._image(low)
        found = {}
        for engine, call in self.engines.items():
            call(x)
            found[engine] = memory.peak(lambda call=call: call(x), self.device.type)  # type: ignore[misc]
        return found


# --- what the records say ---------------------------------------------------------------------------------------------


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def summary(records: Sequence[Record], sets: Sequence[str], engine: str) -> Record | None:
    """Of one network and engine.

    Args:
        records: of its pictures.
        sets: in their order.
        engine: of `ENGINES`.

    Returns:
        runtime_ms, the mean of the sets' means as in Table 1; warm_ms, the same without the first picture of a process,
        which is what a cold start costs; first_ms; sets: name -> images, runtime_ms, psnr (None where it is not known).
        None where no picture was measured.
    """
    own = [r for r in records if r["engine"] == engine]
    parts: dict[str, Record] = {}
    warm: list[float] = []
    for name in sets:
        of_set = [r for r in own if r["set"] == name]
        if not of_set:
            continue
        known: list[float] = [r["psnr"] for r in of_set if r["psnr"] is not None]
        parts[name] = {
            "images": len(of_set),
            "runtime_ms": mean([r["ms"] for r in of_set]),
            "psnr": mean(known) if len(known) == len(of_set) else None,
        }
        later = [r["ms"] for r in of_set if not r["first"]]
        if later:
            warm.append(mean(later))
    if not parts:
        return None
    first = [r["ms"] for r in own if r["first"]]
    return {
        "runtime_ms": mean([p["runtime_ms"] for p in parts.values()]),
        "warm_ms": mean(warm) if warm else None,
        "first_ms": mean(first) if first else None,
        "sets": parts,
    }
