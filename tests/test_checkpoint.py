"""Checkpoint files: every usual form is read, and everything else gives one clear error and executes nothing."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from esr_kernels.checkpoint import CheckpointError, load_state_dict

STATE = {"conv.weight": torch.arange(12.0).view(3, 4), "conv.bias": torch.tensor([1.0, 2.0, 3.0])}
OTHER = {k: v + 100 for k, v in STATE.items()}


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(got) == list(expected) and all(torch.equal(got[k], expected[k]) for k in expected)


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + k: v for k, v in STATE.items()}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".pkl", ".bin", ""])
def test_bare_state_dict(tmp_path: Path, suffix: str) -> None:
    assert same(load_state_dict(saved(tmp_path / f"w{suffix}", STATE)), STATE)
    assert same(load_state_dict(str(saved(tmp_path / f"w{suffix}", STATE))), STATE)


def test_older_format(tmp_path: Path) -> None:
    assert same(load_state_dict(saved(tmp_path / "w.pth", STATE, _use_new_zipfile_serialization=False)), STATE)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_safetensors_told_by_content(tmp_path: Path, name: str) -> None:
    save_file(STATE, tmp_path / name)
    got = load_state_dict(tmp_path / name)
    assert all(torch.equal(got[k], v) for k, v in STATE.items())
    assert got.keys() == STATE.keys()


@pytest.mark.parametrize(
    "content",
    [
        {"params": STATE, "params_ema": OTHER},
        {"params_ema": OTHER},
        {"state_dict": {"params_ema": OTHER}, "epoch": 3},
        {"model": OTHER, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "lr": 0.1}, "step": 5},
        {"net": OTHER, "iteration": torch.tensor(7)},
        {"anything": OTHER, "epoch": 3, "arguments": {"lr": 0.1}},
        {"state_dict": {f"module.{k}": v for k, v in OTHER.items()}},
    ],
    ids=["preferred", "ema", "nested", "optimizer", "stray-tensor", "unknown-name", "data-parallel"],
)
def test_wrappers(tmp_path: Path, content: dict[str, Any]) -> None:
    assert same(load_state_dict(saved(tmp_path / "w.pth", content)), OTHER)


def test_entry_chooses(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"state_dict": {"params": STATE, "params_ema": OTHER, "best": OTHER}})
    assert same(load_state_dict(path), OTHER)
    assert same(load_state_dict(path, entry="params"), STATE)
    assert same(load_state_dict(path, entry="best"), OTHER)
    fails(path, "has no entry 'parms'; entries: state_dict, params, params_ema, best", entry="parms")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "net_g.module."])
def test_prefixes(tmp_path: Path, prefix: str) -> None:
    assert same(load_state_dict(saved(tmp_path / "w.pth", prefixed(prefix))), STATE)


def test_a_prefix_that_not_all_names_have_stays(tmp_path: Path) -> None:
    state = {"module.a": torch.zeros(1), "b": torch.zeros(1)}
    assert same(load_state_dict(saved(tmp_path / "w.pth", state)), state)


def test_parameters_become_tensors(tmp_path: Path) -> None:
    got = load_state_dict(saved(tmp_path / "w.pth", {"w": nn.Parameter(torch.ones(2))}))
    assert type(got["w"]) is Tensor
    assert not got["w"].requires_grad


# --- errors -------------------------------------------------------------------------------------------------------


def fails(path: Path, match: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        load_state_dict(path, **options)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert len(text.splitlines()) == 1
    assert "weights_only" not in text, "PyTorch's advice to switch the protection off"


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint file: .*absent\.pth"):
        load_state_dict(tmp_path / "absent.pth")
    fails(tmp_path, "is a folder")


class Hostile:
    """Unpickling creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [lambda h: h, lambda h: {"params": STATE, "x": h}, lambda h: {**STATE, "x": [h]}])
def test_hostile_pickle_is_refused(tmp_path: Path, zipped: bool, wrap: Any) -> None:
    target = tmp_path / "executed"
    path = saved(tmp_path / "w.pth", wrap(Hostile(target)), _use_new_zipfile_serialization=zipped)
    fails(path, r"refused: besides tensors the file holds (posix|nt)\.mkdir")
    assert not target.exists()


def test_hostile_raw_pickle_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps(Hostile(target)))
    fails(path, "refused|not a checkpoint")
    assert not target.exists()


def test_whole_module_is_refused(tmp_path: Path) -> None:
    fails(saved(tmp_path / "w.pth", nn.Conv2d(1, 1, 1)), r"refused: .*torch\.nn\.modules\.conv\.Conv2d")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript(tmp_path: Path) -> None:
    program = torch.jit.trace(nn.Conv2d(1, 1, 1), torch.ones(1, 1, 2, 2))
    torch.jit.save(program, tmp_path / "w.pt")
    fails(tmp_path / "w.pt", "TorchScript program")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [1, 9, 100, 0.5, 0.98])
def test_truncated(tmp_path: Path, zipped: bool, keep: float) -> None:
    path = saved(tmp_path / "w.pth", {"w": torch.randn(1000)}, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 else keep * len(content))])
    fails(path, "not a checkpoint")


@pytest.mark.parametrize("keep", [0, 4, 40, 0.5, 0.99])
def test_truncated_safetensors(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.randn(1000)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep if keep >= 1 or keep == 0 else keep * len(content))])
    fails(path, "not a valid safetensors file|empty")


@pytest.mark.parametrize("header", [b"{" + b"x" * 49, b"[]" + b" " * 48, b'{"w": {"dtype": "F99"}}' + b" " * 27])
def test_bad_safetensors_header(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "w.safetensors"
    for length in (len(header), 0, 2**40, 2**63):
        path.write_bytes(length.to_bytes(8, "little") + header)
        fails(path, "not a valid safetensors file")


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n" + bytes(100), b"<html>404</html>", b"hello world\n" * 9, bytes(64)]
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    fails(path, "not a checkpoint|empty")


def test_other_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    fails(tmp_path / "w.pth", "not a checkpoint")


def test_what_is_no_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    fails(saved(path, [torch.ones(1)]), "holds a list, expected a state dict")
    fails(saved(path, torch.ones(1)), "holds a single tensor")
    fails(saved(path, {}), "holds no tensors: it is empty")
    fails(saved(path, {"epoch": 3, "lr": 0.1}), "holds no tensors .only epoch, lr")
    fails(saved(path, {"params": {}}), "holds no tensors")
    fails(saved(path, {**STATE, "epoch": 3}), "entry 'epoch' is a int, expected a tensor")
    fails(saved(path, {"params": {"w": [torch.ones(1)], "v": torch.ones(1)}}), "entry 'w' is a list")
    fails(saved(path, {3: torch.ones(1)}), "entry 3 has a int for a name")
    fails(saved(path, {"a": STATE, "b": STATE}), "several sets of tensors, choose one with entry=: a, b")
    fails(saved(path, STATE), "has no entry 'params'; entries: none, it is a bare state dict", entry="params")
    deep: Any = STATE
    for _ in range(9):
        deep = {"params": deep}
    fails(saved(path, deep), "wrapped more than")


def test_tensors_that_are_not_dense(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    fails(saved(path, {"w": torch.eye(3).to_sparse()}), "entry 'w' is not a dense tensor")
    fails(saved(path, {"w": torch.ones(1, device="meta")}), "entry 'w' is not a dense tensor")
    fails(saved(path, {"w": torch.zeros(1).expand(1 << 40)}), "entry 'w' is not a dense tensor")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads every file")
def test_unreadable(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", STATE)
    path.chmod(0)
    fails(path, "cannot be read")
