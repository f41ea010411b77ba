"""Reading checkpoint files: only tensors come in, whatever the file is wrapped in, and nothing in it is executed."""

from __future__ import annotations

import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["CheckpointError", "load_state_dict"]

# Names under which training frameworks keep the network, the preferred first.
_ENTRIES = (
    "params_ema",
    "params",
    "state_dict",
    "model_state_dict",
    "model",
    "net_g_ema",
    "net_g",
    "generator",
    "network",
    "net",
    "module",
    "weights",
)
# What wrappers put before every name: DataParallel, torch.compile, Lightning modules, GAN trainers.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net_g.", "generator.", "network.", "net.")
_DEEPEST = 4
_SAFETENSORS_LARGEST_HEADER = 100 << 20
# What an archive may inflate to: so many times its size, and what no machine minds.
_MOST_INFLATED, _SMALL = 4, 32 << 20


class CheckpointError(ValueError):
    """A file is not a checkpoint, or not one of the model it was given to; the message says what is wrong."""


def load_state_dict(path: str | os.PathLike[str], *, entry: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name.

    Reads PyTorch files (.pth, .pt, .ckpt, .pkl; zip and older) and safetensors, told apart by content. PyTorch files
    are read with `weights_only=True`: one whose pickle calls anything is refused. Bare state dicts and wrapped ones are
    taken, nested ones too: `params_ema`, `params`, `state_dict`, `model` and the like, in this order when there are
    several. `module.` and similar prefixes are removed where all names have them.

    Args:
        path: the file.
        entry: name of the wrapper's entry to take instead of the preferred one.

    Returns:
        Dense tensors on the CPU in the file's dtypes.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is damaged, no checkpoint, refused, or has no such entry.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such checkpoint file: {path}")
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, expected a checkpoint file")
    content = _read_safetensors(path) if _is_safetensors(path) else _read_torch(path)
    state = _tensors(path, _unwrap(path, content, entry))
    while (prefix := next((p for p in _PREFIXES if all(k.startswith(p) and k != p for k in state)), None)) is not None:
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _is_safetensors(path: Path) -> bool:
    if path.suffix.lower() == ".safetensors":
        return True
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    # Eight bytes with the header's length, then JSON.
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= _SAFETENSORS_LARGEST_HEADER


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(f"{path}: reading safetensors needs the package safetensors ({error})") from error
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a valid safetensors file: {_first_line(error)}") from error


def _read_torch(path: Path) -> Any:
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    _check_inflated_size(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:
        # A damaged file can make the reader raise nearly anything; none of it is the caller's mistake.
        raise CheckpointError(f"{path}: {_explain(error)}") from error


def _check_inflated_size(path: Path) -> None:
    """Refuse a zip archive whose entries inflate to far more than the file: `torch.save` compresses nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            inflated = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError, struct.error):
        return  # an older format, or damaged
    if inflated > _MOST_INFLATED * path.stat().st_size + _SMALL:
        raise CheckpointError(
            f"{path}: refused: a compressed archive that inflates from {path.stat().st_size / 2**20:.1f} MiB to "
            f"{inflated / 2**20:.0f} MiB"
        )


def _explain(error: Exception) -> str:
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        # PyTorch's own text advises to switch the protection off.
        found = re.search(r"GLOBAL ([\w.]+)", text)
        if found or "WeightsUnpickler error: Trying to" in text or "allowlist" in text:
            what = found.group(1) if found else "objects of other types"
            return (
                f"refused: besides tensors the file holds {what}, and reading that would execute code; only tensors, "
                "numbers, strings, lists and dicts are read"
            )
        return "not a checkpoint: its content is not what torch.save writes for a state dict"
    if "TorchScript" in text:
        return "is a TorchScript program, not a checkpoint; save its state_dict()"
    return f"not a checkpoint, or damaged or truncated: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    """The first sentence of an error's text."""
    line = next(iter(str(error).strip().splitlines()), "unexpected end of file").split(". ")[0]
    return line if len(line) <= 200 else line[:197] + "..."


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def _unwrap(path: Path, content: Any, entry: str | None) -> Mapping[Any, Any]:
    seen: list[str] = []
    for _ in range(_DEEPEST):
        if not isinstance(content, Mapping):
            what = "a single tensor" if isinstance(content, Tensor) else f"a {type(content).__name__}"
            raise CheckpointError(f"{path}: holds {what}, expected a state dict (names and tensors)")
        inner = {k: v for k, v in content.items() if isinstance(v, Mapping)}
        chosen: Any = next((k for k in _ENTRIES if k in inner), None)
        if entry is not None and entry in inner:
            chosen, entry = entry, None
        elif entry is not None and chosen is None:
            there = ", ".join([*seen, *map(str, inner)]) or "none, it is a bare state dict"
            raise CheckpointError(f"{path}: has no entry {entry!r}; entries: {there}")
        elif chosen is None and _holds_tensors(content):
            return content
        elif chosen is None:
            full = [k for k, v in inner.items() if _holds_tensors(v)]
            if len(full) > 1:
                raise CheckpointError(
                    f"{path}: holds several sets of tensors, choose one with entry=: {', '.join(map(str, full))}"
                )
            if not full:
                names = ", ".join(map(str, list(content)[:5]))
                raise CheckpointError(f"{path}: holds no tensors" + (f" (only {names})" if names else ": it is empty"))
            chosen = full[0]
        seen += map(str, inner)
        content = inner[chosen]
    raise CheckpointError(f"{path}: the state dict is wrapped more than {_DEEPEST - 1} times")


def _tensors(path: Path, state: Mapping[Any, Any]) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{path}: entry {name!r} has a {type(name).__name__} for a name, expected a string")
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: entry {name!r} is a {type(value).__name__}, expected a tensor")
        dense = value.layout == torch.strided and not value.is_meta and not value.is_quantized
        # Fewer stored values than shown: an expanded tensor, by which a small file could ask for any amount of memory.
        if not dense or value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise CheckpointError(f"{path}: entry {name!r} is not a dense tensor")
        result[name] = value.detach()
    return result
