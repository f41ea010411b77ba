"""The models by name: cards, construction, loading of checkpoints."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esr_kernels.checkpoint import CheckpointError, load_state_dict
from esr_kernels.reparam import Reparameterized, slim_message

from .base import Network

# Weights that this project trained itself, `NAME_xSCALE.safetensors` with a card beside each.
WEIGHTS = Path(__file__).with_name("weights")
BUNDLED = "bundled"

_SHOWN = 4  # names listed in a message before the dots


@dataclass(frozen=True)
class ModelCard:
    """What the challenge's report says of a model.

    Attributes:
        name: in `create`.
        title: the authors' name for it.
        team, team_id: in the challenge; the id numbers the published checkpoint.
        section: of the report (arXiv 2404.10343), or None where it has none.
        parameters: number of trainable values in deploy form.
        flops: multiply-adds for a 1x3x256x256 input as fvcore counts them.
        table1: the model's row as printed: PSNR [dB], run times [ms], parameters [M], FLOPs [G], scores, rank (None
            for those outside the ranking).
        data_range: images are in [0, data_range].
        scale: of the published model.
        entry: of the published checkpoint, the one its results were made with, where `create` would take another.
    """

    name: str
    title: str
    team: str
    team_id: int
    section: str | None
    parameters: int
    flops: int
    table1: Mapping[str, float | int | None] | None
    data_range: float = 1.0
    scale: int = 4
    entry: str | None = None


@dataclass(frozen=True)
class _Entry:
    card: ModelCard
    network: type[Network]
    plain: type[Network]
    pinned: Mapping[str, Any]


_entries: dict[str, _Entry] = {}


def register(card: ModelCard, network: type[Network], plain: type[Network], **pinned: Any) -> None:
    """Add a model. `pinned` are the options that make it this one: a checkpoint with others is another model's."""
    if card.name in _entries:
        raise ValueError(f"name: there is already a model {card.name!r}")
    _entries[card.name] = _Entry(card, network, plain, pinned)


def list_models() -> list[str]:
    """Names of all models."""
    return list(_entries)


def card(name: str) -> ModelCard:
    """What the challenge's report says of a model.

    Raises:
        ValueError: unknown name; names the nearest.
    """
    return _entry(name).card


def bundled(name: str) -> Path | None:
    """The file of the model's weights that come with this package, trained by `esr-kernels train` on a few photographs
    (docs/training.md); None where there are none. `create(name, weights="bundled")` takes them.

    Raises:
        ValueError: unknown name; names the nearest.
    """
    found = card(name)
    file = WEIGHTS / f"{found.name}_x{found.scale}.safetensors"
    return file if file.is_file() else None


def create(
    name: str, weights: str | os.PathLike[str] | None = None, *, entry: str | None = None, **options: Any
) -> Network:
    """A network, in eval mode and on the CPU.

    Args:
        name: one of `list_models()`.
        weights: checkpoint file, read by `esr_kernels.checkpoint.load_state_dict`; "bundled": this package's own (see
            `bundled`); None: PyTorch's random initialisation. Width, scale and form are taken from the file where the
            model's options allow others.
        entry: of the checkpoint, where it holds several sets of weights.
        options: the network's own, see its class. `deploy=False` builds the training form and is taken by all; it
            changes nothing in networks that have none.

    Returns:
        A module with the attributes of `Network` (name, scale, data_range, receptive_radius, minimum_size, options).

    Raises:
        ValueError: unknown name, the message names the nearest; or "bundled" for a model without such weights.
        TypeError: unknown option.
        FileNotFoundError: there is no such file.
        CheckpointError: the file is no checkpoint, or another model's; the message says which names and shapes differ
            and which model it looks like.
    """
    found = _entry(name)
    if "deploy" not in inspect.signature(found.network).parameters:
        options.pop("deploy", None)
    return _build(found, found.network, weights, entry, options)


def plain(
    name: str, weights: str | os.PathLike[str] | None = None, *, entry: str | None = None, **options: Any
) -> Network:
    """The same network written in plain PyTorch, in eval mode: the thing to compare with and to time against.

    Its state dict has the names of the network's deploy form, so `plain(name, **model.options).load_state_dict(
    model.state_dict())` gives the twin of a deployed `model`. Arguments and errors as in `create`.
    """
    found = _entry(name)
    allowed = inspect.signature(found.network).parameters
    taken = inspect.signature(found.plain).parameters
    # Options of the training form mean nothing here.
    options = {k: v for k, v in options.items() if k != "deploy" and (k in taken or k not in allowed)}
    return _build(found, found.plain, weights, entry, options)


def _entry(name: str) -> _Entry:
    if name in _entries:
        return _entries[name]
    near = difflib.get_close_matches(str(name), _entries, n=1, cutoff=0.4)
    hint = f", did you mean {near[0]!r}?" if near else ","
    raise ValueError(f"name: unknown model {name!r}{hint} known: {', '.join(_entries)}")


def _build(
    found: _Entry,
    cls: type[Network],
    weights: str | os.PathLike[str] | None,
    entry: str | None,
    options: dict[str, Any],
) -> Network:
    allowed = list(inspect.signature(cls).parameters)
    for option in options:
        if option not in allowed:
            near = difflib.get_close_matches(option, allowed, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ","
            raise TypeError(f"{option}: {found.card.name} has no such option{hint} known: {', '.join(allowed)}")
    if weights is None:
        if entry is not None:
            raise ValueError(f"entry: chooses inside a checkpoint, but no weights are given, got {entry!r}")
        return _finish(found, cls, {**found.pinned, **options})

    if weights == BUNDLED:
        weights = bundled(found.card.name)
        if weights is None:
            having = ", ".join(name for name in _entries if bundled(name)) or "no model"
            raise ValueError(
                f"weights: this package has none for {found.card.name!r}, only for {having}; give a checkpoint file"
            )
    path = os.fspath(weights)
    state = load_state_dict(path, entry=entry)
    try:
        slim = found.network.fold(state)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    inferred = {k: v for k, v in found.network.infer_options(state, slim).items() if k in allowed}
    chosen = {**inferred, **found.pinned, **options}
    # Without storage first: the file decides on widths, and nothing is allocated for a file that does not fit.
    with torch.device("meta"):
        try:
            frame = cls(**chosen)
        except (TypeError, ValueError) as error:
            cls(**{**found.pinned, **options})  # raises where the caller's options are to blame
            raise CheckpointError(f"{path}: not a checkpoint of {found.card.name!r}: {error}") from error
    forms = [m.deployed for m in frame.modules() if isinstance(m, Reparameterized)]
    if not all(forms) and state.keys() == slim.keys() and any(k.endswith("eval_conv.weight") for k in state):
        raise CheckpointError(slim_message(path))
    _check_fits(found, path, frame, slim)

    model = _finish(found, cls, chosen)
    try:
        model.load_state_dict(slim if all(forms) else state)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {error}") from error
    broken = [k for k, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken:
        raise CheckpointError(f"{path}: {len(broken)} tensors hold values that are not finite: {_some(broken)}")
    return model


def _finish(found: _Entry, cls: type[Network], options: dict[str, Any]) -> Network:
    model = cls(**options)
    model.name = found.card.name
    model.options = {k: v for k, v in options.items() if k != "deploy"}
    return model.eval()


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in state.items()}


@cache
def _signature(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published model's state dict in deploy form."""
    found = _entries[name]
    with torch.device("meta"):
        return _shapes(found.plain(**found.pinned).state_dict())


def _check_fits(found: _Entry, path: str, model: nn.Module, slim: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless names, shapes and kinds, both sides in slim form, agree."""
    wanted = found.network.fold(model.state_dict())
    missing = [k for k in wanted if k not in slim]
    unexpected = [k for k in slim if k not in wanted]
    both = [k for k in wanted if k in slim]
    shapes = [
        f"{k} {list(slim[k].shape)} instead of {list(wanted[k].shape)}"
        for k in both
        if slim[k].shape != wanted[k].shape
    ]
    kinds = [f"{k} {slim[k].dtype}" for k in both if slim[k].is_floating_point() != wanted[k].is_floating_point()]
    differences = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("of another type", kinds),
        )
        if names
    ]
    if differences:
        name = found.card.name
        similar = _looks_like(_shapes(slim))
        hint = f"; it looks like a checkpoint of {similar!r}" if similar not in (None, name) else ""
        raise CheckpointError(f"{path}: not a checkpoint of {name!r}: {'; '.join(differences)}{hint}")


def _looks_like(given: Mapping[str, tuple[int, ...]]) -> str | None:
    """The model whose names, and then shapes, agree best; None where hardly any do."""

    def score(name: str) -> tuple[float, float]:
        known = _signature(name)
        union = len(known.keys() | given.keys())
        same = sum(given.get(k) == shape for k, shape in known.items())
        return len(known.keys() & given.keys()) / union, same / union

    best = max(_entries, key=lambda name: sum(score(name)))
    return best if score(best)[0] >= 0.6 else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
