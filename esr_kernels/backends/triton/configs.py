"""Which tile, how many warps and how much pipelining a kernel gets, per GPU.

`configs/*.json` hold what was measured on a GPU (`python -m esr_kernels.backends.triton.tuning` writes such a file) or,
where none was at hand, what was chosen from compiled resources. Keys name the kernel, the dtype and the channels, not
height and width.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).parent / "configs"
# A file of configurations that goes before the package's own.
VARIABLE = "ESR_KERNELS_TRITON_CONFIGS"


class Config(NamedTuple):
    """How a kernel is launched.

    Attributes:
        tile: pixels of one program, (height, width); kernels over flat pixels take their product.
        warps: of one program.
        pipeline: 1: everything unrolled; 2, 3: a loop whose loads run ahead, with as many stages.
        registers: that a thread may have at most; 0: the assembler's choice, which now and then spills a few bytes to
            keep more programs resident.
    """

    tile: tuple[int, int]
    warps: int
    pipeline: int
    registers: int = 0

    @property
    def pixels(self) -> int:
        return self.tile[0] * self.tile[1]


# Everything the tuner tries. Tests run every tile and pipelining in the interpreter, which has no warps.
TILES = ((2, 16), (4, 16), (8, 16), (4, 32), (16, 16))
# Lanes of a window at most, and results of a program with windows that have as many.
WINDOWS = ((16, 8), (16, 32), (64, 8), (64, 16))
# Lanes of a program with so many channels.
STATISTICS = ((64, 16), (32, 32), (128, 16), (64, 32))
# Rows, and elements of each.
ROWS = ((2, 128), (4, 64), (1, 512), (4, 128), (4, 256))
SPACE: dict[str, tuple[Config, ...]] = {
    "convolution": tuple(Config(tile, warps, pipeline) for tile in TILES for warps in (4, 8) for pipeline in (1, 2, 3)),
    "conv1x1": tuple(
        Config((1, pixels), warps, pipeline) for pixels in (32, 64, 128, 256) for warps in (4, 8) for pipeline in (1, 2)
    ),
    "weight_gradient": tuple(
        Config(tile, warps, pipeline) for tile in ((1, 16), (2, 16), (4, 16)) for warps in (4, 8) for pipeline in (1, 2)
    ),
    "esa_reduce": tuple(
        Config(tile, warps, pipeline) for tile in ((4, 4), (4, 8)) for warps in (2, 4, 8) for pipeline in (1, 2)
    ),
    "esa_gate": tuple(Config((1, pixels), warps, 1) for pixels in (16, 32, 64, 128) for warps in (4, 8)),
    "depthwise": tuple(Config(tile, warps, 1) for tile in ((2, 16), (4, 16), (8, 16)) for warps in (2, 4, 8)),
    "depthwise_planes": tuple(
        Config(tile, warps, 1) for tile in ((4, 64), (8, 64), (16, 64), (4, 128)) for warps in (2, 4, 8)
    ),
    "depthwise_gradient": tuple(Config(tile, warps, 1) for tile in ((1, 16), (2, 16), (4, 16)) for warps in (2, 4, 8)),
    "depthwise_gradient_planes": tuple(
        Config(tile, warps, 1) for tile in ((2, 64), (4, 64), (8, 64)) for warps in (2, 4, 8)
    ),
    "layer_norm": tuple(Config((1, pixels), warps, 1) for pixels in (16, 32, 64, 128) for warps in (2, 4, 8)),
    "layer_norm_gradient": tuple(Config((1, pixels), warps, 1) for pixels in (16, 32, 64) for warps in (2, 4, 8)),
    "adaptive_max_pool": tuple(Config(tile, warps, 1) for tile in WINDOWS for warps in (2, 4, 8)),
    "adaptive_max_pool_gradient": tuple(Config(tile, warps, 1) for tile in ROWS for warps in (2, 4, 8)),
    "modulate": tuple(Config(tile, warps, 1) for tile in ROWS for warps in (2, 4, 8)),
    "modulate_gradient": tuple(Config(tile, warps, 1) for tile in ROWS for warps in (2, 4, 8)),
    "resize_gradient": tuple(Config(tile, warps, 1) for tile in WINDOWS for warps in (2, 4, 8)),
    "statistic": tuple(Config(tile, warps, 1) for tile in STATISTICS for warps in (2, 4, 8)),
}


# The interpreter takes a program's time for its number of operations, hardly for their size.
_INTERPRETED = {
    "convolution": Config((16, 32), 4, 1),
    "conv1x1": Config((1, 512), 4, 1),
    "weight_gradient": Config((16, 32), 4, 1),
    "esa_reduce": Config((8, 8), 4, 2),
    "esa_gate": Config((1, 512), 4, 1),
    "depthwise": Config((16, 32), 4, 1),
    "depthwise_planes": Config((16, 32), 4, 1),
    "depthwise_gradient": Config((16, 32), 4, 1),
    "depthwise_gradient_planes": Config((16, 32), 4, 1),
    "layer_norm": Config((1, 512), 4, 1),
    "layer_norm_gradient": Config((1, 512), 4, 1),
    "adaptive_max_pool": Config((64, 256), 4, 1),
    "adaptive_max_pool_gradient": Config((16, 512), 4, 1),
    "modulate": Config((16, 512), 4, 1),
    "modulate_gradient": Config((16, 512), 4, 1),
    "resize_gradient": Config((64, 256), 4, 1),
    "statistic": Config((256, 64), 4, 1),
}


def key(kernel: str, dtype: torch.dtype, precision: str, rows: int, columns: int) -> str:
    """The name of a configuration, such as "convolution/float16/32x48"."""
    name = str(dtype).removeprefix("torch.")
    if dtype == torch.float32 and precision == "tf32":
        name = "tf32"
    return f"{kernel}/{name}/{rows}x{columns}"


_chooser: ContextVar[Callable[[str], Config | None] | None] = ContextVar("esr_kernels_triton_config", default=None)


@contextmanager
def chosen_by(chooser: Callable[[str], Config | None]) -> Iterator[None]:
    """Inside, `chooser` maps keys to configurations, None to the usual choice: for tuning and tests."""
    token = _chooser.set(chooser)
    try:
        yield
    finally:
        _chooser.reset(token)


def choice() -> object:
    """What decides configurations besides the device: equal values, equal choices."""
    return _chooser.get()


def choose(kernel: str, dtype: torch.dtype, precision: str, rows: int, columns: int) -> Config:
    """The configuration for the current device: the measured one of the nearest channels, else the default."""
    wanted = key(kernel, dtype, precision, rows, columns)
    chooser = _chooser.get()
    if chooser is not None and (chosen := chooser(wanted)) is not None:
        return chosen
    device = _device()
    if device == _INTERPRETER and not os.environ.get(VARIABLE):
        return _INTERPRETED[kernel]
    table = _table(device)
    if wanted in table:
        return table[wanted]
    prefix = wanted.rpartition("/")[0] + "/"
    near = [k for k in table if k.startswith(prefix)]
    if not near:
        return default(kernel, dtype, columns)

    def distance(name: str) -> float:
        r, c = map(int, name.rpartition("/")[2].split("x"))
        # More columns than were measured may not fit into the registers.
        return abs(math.log2(r / rows)) + abs(math.log2(c / columns)) + (8.0 if c < columns else 0.0)

    return table[min(near, key=distance)]


def default(kernel: str, dtype: torch.dtype, columns: int) -> Config:
    """A small configuration, for kernels that no file knows."""
    if kernel == "convolution":
        small = columns > 64 or (dtype == torch.float32 and columns > 32)
        return Config((4, 16) if small else (8, 16), 4, 2)
    if kernel == "conv1x1":
        return Config((1, 64), 4, 1)
    if kernel == "weight_gradient":
        return Config((2, 16), 4, 1)
    if kernel == "esa_reduce":
        return Config((4, 4), 4, 2)
    if kernel in ("adaptive_max_pool", "resize_gradient"):
        return Config((64, 8), 4, 1)
    if kernel == "statistic":
        return Config((64, 16), 4, 1)
    if kernel.endswith("_planes") or kernel.startswith(("adaptive_max_pool", "modulate")):
        return Config((4, 64 if kernel.endswith("_planes") else 128), 4, 1)
    if kernel.startswith("depthwise"):
        return Config((4, 16) if kernel == "depthwise" else (2, 16), 4, 1)
    return Config((1, 32 if kernel.startswith("layer_norm") else 64), 4, 1)


def _device() -> tuple[str, tuple[int, int]]:
    """Name and compute capability of the current device; of the interpreter without one."""
    return _properties(torch.cuda.current_device()) if torch.cuda.is_available() else _INTERPRETER


_INTERPRETER = ("interpreter", (0, 0))


@lru_cache(maxsize=64)
def _properties(index: int) -> tuple[str, tuple[int, int]]:
    return torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)


def parse(data: dict[str, Any]) -> dict[str, Config]:
    """The configurations of a file's content.

    Raises:
        ValueError: it is not such a file.
    """
    try:
        return {
            k: Config(
                (int(c["tile"][0]), int(c["tile"][1])), int(c["warps"]), int(c["pipeline"]), int(c.get("registers", 0))
            )
            for k, c in data["configurations"].items()
        }
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"not a file of Triton configurations ({type(error).__name__}: {error})") from None


def entry(config: Config) -> dict[str, Any]:
    """The configuration in a file; `parse` reads it."""
    data = {"tile": list(config.tile), "warps": config.warps, "pipeline": config.pipeline}
    return data | ({"registers": config.registers} if config.registers else {})


def read(path: Path) -> dict[str, Any]:
    """A file of configurations: device, capability, measured, configurations."""
    data = json.loads(path.read_text(encoding="utf-8"))
    parse(data)
    return data


def find(name: str, capability: tuple[int, int], files: list[dict[str, Any]]) -> dict[str, Any]:
    """The file of the device, else of the nearest: same capability first, measured ones first."""

    def distance(data: dict[str, Any]) -> tuple[bool, int, bool]:
        major, minor = data["capability"]
        apart = abs(10 * major + minor - 10 * capability[0] - capability[1])
        return data["device"] != name, apart, not data["measured"]

    return min(files, key=distance)


@lru_cache(maxsize=64)
def _table(device: tuple[str, tuple[int, int]]) -> dict[str, Config]:
    name, capability = device
    own = os.environ.get(VARIABLE)
    if own:
        return parse(read(Path(own)))
    files = [read(path) for path in sorted(FOLDER.glob("*.json"))]
    if not files:
        return {}
    data = find(name, capability, files)
    if data["device"] != name:
        warnings.warn(
            f"esr_kernels: no Triton configurations were measured on {name}, using those of {data['device']}; "
            f"`python -m esr_kernels.backends.triton.tuning FILE` measures it, {VARIABLE}=FILE uses the result",
            stacklevel=2,
        )
    return parse(data)
