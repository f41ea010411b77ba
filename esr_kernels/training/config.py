"""The configuration of a training run: TOML, checked whole before anything runs."""

from __future__ import annotations

import copy
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import tomllib

from .losses import WeightedLoss
from .schedules import Schedule

RECIPES = Path(__file__).with_name("recipes")


class ConfigError(ValueError):
    """A configuration is wrong; the message names the key and what is allowed."""


@dataclass(frozen=True)
class Model:
    """The network.

    Attributes:
        name: as in `python_models.list_models()`.
        weights: a checkpoint to start from; "": random weights.
        initialization: of random weights: "pytorch"; "he": the signal keeps its size through all layers (see
            `initialize.he`); "linear": the network begins as the best linear upscaler (see `initialize.linear`).
        deploy: train the folded form; slim checkpoints can only be trained so.
        options: the network's own.
    """

    name: str = "span"
    weights: str = ""
    initialization: str = "pytorch"
    deploy: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """The high-resolution pictures; low-resolution ones are made from them.

    Attributes:
        train: folders (with their subfolders) and files.
        validation: the same, held out.
        photographs: add the photographs inside scikit-image to both.
        convert: take grey, 16-bit and palette pictures too, as 8-bit RGB. Otherwise one that is not 8-bit RGB is an
            error.
        scales: every picture is used at these sizes, in (0, 1]; 1 is the picture itself.
        augment: flip and rotate patches by quarter turns at random.
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    photographs: bool = False
    convert: bool = False
    scales: tuple[float, ...] = (1.0,)
    augment: bool = True


@dataclass(frozen=True)
class Loading:
    """How pictures come into memory; has no effect on the result.

    Attributes:
        workers: processes that make patches; -1: as many as the machine has to spare, 0: none.
        cache_mib: memory for decoded pictures; those beyond it are decoded whenever they are needed.
    """

    workers: int = -1
    cache_mib: int = 4096


@dataclass(frozen=True)
class Optimizer:
    """One optimizer, made anew for every stage.

    Attributes:
        name: "adam" or "adamw".
        betas, epsilon, weight_decay: its own.
        clip: largest norm of the whole gradient; 0: no clipping.
        ema: decay of the average of the weights, in (0, 1); 0: none. The average is what is validated and kept.
        autocast: "none", "bf16" or "fp16" (with a gradient scaler).
    """

    name: str = "adam"
    betas: tuple[float, ...] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 0.0
    ema: float = 0.0
    autocast: str = "none"


@dataclass(frozen=True)
class Run:
    """What happens around training; has no effect on the result.

    Attributes:
        device: "auto", "cpu" or "cuda".
        log_every, validate_every, save_every: iterations; 0: only at the end of a stage.
        tensorboard: write scalars and sample pictures for TensorBoard.
        samples: validation pictures shown there.
    """

    device: str = "auto"
    log_every: int = 100
    validate_every: int = 1000
    save_every: int = 1000
    tensorboard: bool = False
    samples: int = 4


@dataclass(frozen=True)
class Stage:
    """A part of the run with its own settings.

    Attributes:
        name: for `start`, `average` and file names; "": its number.
        patch: pixels a side of high-resolution patches, a multiple of the network's scale.
        batch: patches per iteration, of all processes together.
        iterations: of each repetition.
        repeat: run it that often, each time from the weights of the last with a new optimizer.
        rate: the learning rate.
        loss: name in `losses.LOSSES`, or several with factors.
        schedule: of the learning rate.
        start: an earlier stage whose result it begins with; "": the one before.
        average: earlier stages; the result is the mean of theirs and nothing is trained.
    """

    name: str = ""
    patch: int = 256
    batch: int = 64
    iterations: int = 0
    repeat: int = 1
    rate: float = 5e-4
    loss: str | dict[str, float] = "l1"
    schedule: Schedule = field(default_factory=Schedule)
    start: str = ""
    average: tuple[str, ...] = ()

    @property
    def losses(self) -> dict[str, float]:
        return {self.loss: 1.0} if isinstance(self.loss, str) else self.loss


@dataclass(frozen=True)
class Config:
    """A whole run. `seed` decides on initial weights, patches and augmentation; `output` is the folder of the run."""

    seed: int = 0
    output: str = ""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    loading: Loading = field(default_factory=Loading)
    optimizer: Optimizer = field(default_factory=Optimizer)
    run: Run = field(default_factory=Run)
    stage: tuple[Stage, ...] = ()

    def decisive(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it goes on with, ready for JSON."""
        return _plain(
            {
                "seed": self.seed,
                "model": {k: v for k, v in asdict(self.model).items() if k != "weights"},
                "data": {k: v for k, v in asdict(self.data).items() if k not in ("train", "validation")},
                "optimizer": asdict(self.optimizer),
                "stage": [asdict(s) for s in self.stage],
            }
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """ "key: value in a, value in b" for what differs between two results of `Config.decisive`."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = list(dict.fromkeys([*a, *b]))
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{where}.{k}" if where else k)]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and a and isinstance(a[0], dict):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True), 1) for d in differences(x, y, f"{where}.{i}")]
    return [] if a == b else [f"{where}: {a!r} there, {b!r} here"]


def find(name: str) -> Path:
    """The file of a configuration: a path, or the name of one in `recipes`.

    Raises:
        FileNotFoundError: neither.
    """
    for path in (Path(name), RECIPES / f"{name}.toml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
    raise FileNotFoundError(f"{name}: no such configuration file; recipes by name: {known}")


def load(path: Path | None, changes: Sequence[tuple[str, Any]] = ()) -> Config:
    """Read and check a configuration.

    Args:
        path: TOML; None: defaults only.
        changes: (key, value) that replace what the file says: "model.name", "stage.1.rate" (by number or name).

    Raises:
        ConfigError: no TOML, an unknown key (the nearest is named), or a value out of range.
        OSError: the file cannot be read.
    """
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not a TOML file: {error}") from None
    for key, value in changes:
        _change(table, key, copy.deepcopy(value))
    config: Config = _build(Config, table, "")
    return check(config)


def parse_value(text: str) -> Any:
    """A TOML value; what is none is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _change(table: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    here: Any = table
    for i, parent in enumerate(parents):
        if isinstance(here, list):
            here = here[_stage_index(here, parent, key)]
        elif parents[: i + 1] == ["stage"]:
            here = here.setdefault("stage", [])
        else:
            here = here.setdefault(parent, {})
        if not isinstance(here, (dict, list)):
            raise ConfigError(f"{key}: {parent} is a value and has no keys")
    if isinstance(here, list):
        raise ConfigError(f"{key}: name a key of a stage, as in stage.1.{last}")
    here[last] = value


def _stage_index(stages: list[Any], name: str, key: str) -> int:
    for i, stage in enumerate(stages):
        if name == str(i + 1) or (isinstance(stage, dict) and stage.get("name") == name):
            return i
    raise ConfigError(f"{key}: there is no stage {name!r}, the configuration has {len(stages)}")


def _build(cls: type[Any], table: Any, where: str) -> Any:
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: expected a table, got {table!r}")
    known = {f.name: f for f in fields(cls)}
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f", did you mean {_join(where, near[0])!r}?" if near else f", known: {', '.join(known)}"
            raise ConfigError(f"unknown key {_join(where, key)!r}{hint}")
    types_of = typing.get_type_hints(cls)
    values = {k: _value(types_of[k], v, _join(where, k)) for k, v in table.items()}
    try:
        return cls(**values)
    except ValueError as error:
        # A schedule checks itself and says "schedule.every: ...".
        parent = where.rpartition(".")[0]
        raise ConfigError(f"{parent}.{error}" if parent else str(error)) from None


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _value(kind: Any, value: Any, where: str) -> Any:
    """The value as the annotation wants it."""
    if is_dataclass(kind):
        if kind is Schedule and isinstance(value, str):
            value = {"name": value}
        return _build(typing.cast("type[Any]", kind), value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if isinstance(value, str) and arguments[0] is str:
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        names = [f"{where}.{i}" for i in range(1, len(value) + 1)]
        return tuple(_value(arguments[0], v, n) for v, n in zip(value, names, strict=True))
    if origin is types.UnionType:
        kind = next((a for a in arguments if isinstance(value, typing.get_origin(a) or a)), arguments[0])
        return _value(kind, value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a table, got {value!r}")
        return dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    names_of = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {names_of[kind]}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{where}: expected a finite number, got {value!r}")
    return value


def check(config: Config) -> Config:
    """The configuration with its stages named.

    Raises:
        ConfigError: a value is out of range, or stages refer to none.
    """

    def require(condition: bool, key: str, allowed: str, value: object) -> None:
        if not condition:
            raise ConfigError(f"{key}: expected {allowed}, got {value!r}")

    data, optimizer, run = config.data, config.optimizer, config.run
    known = ("pytorch", "he", "linear")
    require(config.model.initialization in known, "model.initialization", ", ".join(known), config.model.initialization)
    require(0 <= config.seed < 2**63, "seed", "0..2^63-1", config.seed)
    require(all(0 < s <= 1 for s in data.scales), "data.scales", "numbers above 0 and up to 1", list(data.scales))
    require(len(data.scales) > 0, "data.scales", "at least one number", list(data.scales))
    require(config.loading.workers >= -1, "loading.workers", "-1 (automatic), 0 or more", config.loading.workers)
    require(config.loading.cache_mib >= 0, "loading.cache_mib", "0 or more", config.loading.cache_mib)
    require(optimizer.name in ("adam", "adamw"), "optimizer.name", "adam or adamw", optimizer.name)
    betas = optimizer.betas
    require(len(betas) == 2 and all(0 <= b < 1 for b in betas), "optimizer.betas", "two numbers in [0, 1)", list(betas))
    require(optimizer.epsilon > 0, "optimizer.epsilon", "a number above 0", optimizer.epsilon)
    require(optimizer.weight_decay >= 0, "optimizer.weight_decay", "0 or more", optimizer.weight_decay)
    require(optimizer.clip >= 0, "optimizer.clip", "0 (no clipping) or more", optimizer.clip)
    require(0 <= optimizer.ema < 1, "optimizer.ema", "0 (none) or more and below 1", optimizer.ema)
    choices = ("none", "bf16", "fp16")
    require(optimizer.autocast in choices, "optimizer.autocast", " or ".join(choices), optimizer.autocast)
    for key in ("log_every", "validate_every", "save_every", "samples"):
        require(getattr(run, key) >= 0, f"run.{key}", "0 or more", getattr(run, key))
    if not config.stage:
        raise ConfigError("stage: the configuration has none; it needs at least one [[stage]] with iterations")

    named: list[Stage] = []
    for number, stage in enumerate(config.stage, 1):
        name, where = stage.name or str(number), f"stage.{stage.name or number}"
        require(
            all(c.isalnum() or c in "-_" for c in name) and len(name) <= 64,
            f"{where}.name",
            "letters, digits, - and _",
            name,
        )
        require(name not in [s.name for s in named], f"{where}.name", "a name no other stage has", name)
        for other in (*stage.average, *([stage.start] if stage.start else [])):
            require(other in [s.name for s in named], where, "the name of an earlier stage", other)
        require(stage.repeat >= 1, f"{where}.repeat", "at least 1", stage.repeat)
        if stage.average:
            require(stage.iterations == 0, f"{where}.iterations", "none in a stage that averages", stage.iterations)
        else:
            require(stage.iterations >= 1, f"{where}.iterations", "at least 1", stage.iterations)
            require(stage.patch >= 1, f"{where}.patch", "at least 1", stage.patch)
            require(stage.batch >= 1, f"{where}.batch", "at least 1", stage.batch)
            require(stage.rate > 0, f"{where}.rate", "a number above 0", stage.rate)
        try:
            WeightedLoss(stage.losses)
        except ValueError as error:
            raise ConfigError(f"{where}.{error}") from None
        named.append(replace(stage, name=name))
    return replace(config, stage=tuple(named))


def expanded(config: Config) -> list[Stage]:
    """The stages one after the other, repetitions as stages of their own: "base.1", "base.2", ... and "base".

    The last repetition carries the stage's name, which is the one others start from.
    """
    result = []
    for stage in config.stage:
        for i in range(1, stage.repeat):
            result.append(replace(stage, name=f"{stage.name}.{i}", repeat=1, start=stage.start if i == 1 else ""))
        result.append(replace(stage, repeat=1, start=stage.start if stage.repeat == 1 else ""))
    return result
