"""Hostile input: pictures, checkpoints and plans that somebody changed end in a result or in one line of text.

ESR_KERNELS_EXAMPLES=N tries N mutations of each instead of 200 (`make fuzz` does); seeds are fixed, counts printed.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

import esr_kernels
import python_models
from esr_kernels import memory, native
from esr_kernels.backends.native.engine import encode
from esr_kernels.checkpoint import CheckpointError, load_state_dict
from esr_kernels.imaging import ImageError, read_image
from esr_kernels.plan import Plan
from esr_kernels.streaming import open_rows

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = int(os.environ.get("ESR_KERNELS_EXAMPLES", "200"))
# What one small file may make a reader allocate.
MOST = 64 * 2**20


def mutated(data: bytes, generator: random.Random) -> bytes:
    """The data with a few bytes set, numbers replaced, parts cut out, repeated or moved."""
    out = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 4, 8))):
        at = generator.randrange(len(out) + 1)
        size = generator.choice((1, 2, 4, 4, 8, 30))
        match generator.randrange(7):
            case 0:
                out[at : at + 1] = bytes([generator.randrange(256)])
            case 1 | 2:
                number = generator.choice((0, 1, 255, 2**15, 2**16 - 1, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 1))
                out[at : at + 4] = number.to_bytes(4, generator.choice(("big", "little")))
            case 3:
                del out[at : at + size]
            case 4:
                out[at:at] = out[at : at + size]
            case 5:
                out[at:at] = generator.randbytes(size)
            case 6:
                other = generator.randrange(len(out) + 1)
                out[at : at + size] = out[other : other + size]
        out = out or bytearray(b"\0")
    return bytes(out)


def survey(
    kind: str, originals: dict[str, bytes], tmp_path: Path, read: Callable[[Path], Any], refused: type[Exception]
) -> Counter[str]:
    """Reads EXAMPLES mutations of each original; each must be read, or refused in one line that names the file."""
    counts: Counter[str] = Counter()
    for name, data in originals.items():
        generator = random.Random(f"{kind} {name}")
        file = tmp_path / f"mutated.{name}"
        for _ in range(EXAMPLES):
            file.write_bytes(mutated(data, generator))
            counts["inputs"] += 1
            try:
                read(file)
                counts["read"] += 1
            except refused as error:
                text = str(error)
                assert "\n" not in text and str(file) in text, text
                assert len(text) < len(str(file)) + 400
                counts["refused"] += 1
    print(f"\n{kind}: {dict(counts)}")
    return counts


# --- pictures -------------------------------------------------------------------------------------------------------


def pictures() -> dict[str, bytes]:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (24, 31, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    found = {}
    for name, options in {
        "png": {"exif": exif, "icc_profile": bytes(200)},
        "jpg": {"exif": exif, "icc_profile": bytes(200), "progressive": True},
        "webp": {"exif": exif, "icc_profile": bytes(200)},
        "lossless.webp": {"lossless": True},
    }.items():
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, {"jpg": "JPEG", "png": "PNG"}.get(name, "WEBP"), **options)
        found[name] = buffer.getvalue()
    for name, image in {
        "palette.png": Image.fromarray(pixels).convert("P"),
        "grey16.png": Image.fromarray(pixels[..., 0].astype(np.uint16) * 257),
        "alpha.png": Image.fromarray(np.dstack([pixels, pixels[..., :1]])),
    }.items():
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        found[name] = buffer.getvalue()
    return found


def with_right_sums(data: bytes) -> bytes:
    """A PNG whose chunks have the checksums of what they hold now, as far as it has chunks."""
    out, at = data[:8], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + length]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return out + data[at:]


def read_by_rows(file: Path) -> None:
    with open_rows(file, max_pixels=10**6) as rows:
        for top in range(0, rows.height, 7):
            rows.read(top, min(top + 7, rows.height))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("read", [lambda f: read_image(f, max_pixels=10**6), read_by_rows], ids=["whole", "rows"])
@pytest.mark.parametrize("sums", ["as they are", "right"])
def test_mutated_pictures(tmp_path: Path, read: Callable[[Path], Any], sums: str) -> None:
    def mended(file: Path) -> Any:
        file.write_bytes(with_right_sums(file.read_bytes()))
        return read(file)

    originals = pictures()
    if sums == "right":
        # Otherwise a PNG ends at its first changed chunk.
        originals = {name: data for name, data in originals.items() if name.endswith("png")}
    counts: Counter[str] = Counter()

    def measured() -> None:
        counts.update(survey("pictures", originals, tmp_path, mended if sums == "right" else read, ImageError))

    used = memory.peak(measured)
    assert counts["inputs"] == EXAMPLES * len(originals) and counts["refused"] > 0 and counts["read"] > 0
    assert used is None or used < MOST


# --- checkpoints ----------------------------------------------------------------------------------------------------


STATE = {"conv_1.weight": torch.arange(54.0).view(2, 3, 3, 3), "conv_1.bias": torch.ones(2, dtype=torch.float16)}


def checkpoints() -> dict[str, bytes]:
    found = {"safetensors": save(STATE)}
    for name, options in {"pth": {}, "old.pth": {"_use_new_zipfile_serialization": False}}.items():
        buffer = io.BytesIO()
        torch.save({"params": STATE, "epoch": 3}, buffer, **options)
        found[name] = buffer.getvalue()
    return found


def test_mutated_checkpoints(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()

    def measured() -> None:
        counts.update(survey("checkpoints", checkpoints(), tmp_path, load_state_dict, CheckpointError))

    used = memory.peak(measured)
    assert counts["inputs"] == 3 * EXAMPLES and counts["refused"] > 0
    assert used is None or used < MOST
    assert {p.name for p in tmp_path.iterdir()} <= {f"mutated.{name}" for name in checkpoints()}, "nothing was executed"


def safetensors(entries: dict[str, Any], data: bytes = bytes(64), length: int | None = None) -> bytes:
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@pytest.mark.parametrize(
    "data",
    [
        safetensors({n: {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]} for n in "ab"}),
        safetensors(
            {
                "a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]},
                "b": {"dtype": "F32", "shape": [8], "data_offsets": [16, 48]},
            }
        ),
        safetensors({"a": {"dtype": "F32", "shape": [16], "data_offsets": [32, 96]}}),
        safetensors({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        safetensors({"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 64]}}),
        safetensors({"a": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}}),
        safetensors({"a": {"dtype": "F32", "shape": [-16], "data_offsets": [0, 64]}}),
        safetensors({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 2**64 - 1]}}),
        safetensors({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}, length=2**33),
        safetensors({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}, length=3),
        safetensors({f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(9)} | {"x": 3}),
    ],
    ids=[
        "same",
        "overlap",
        "beyond",
        "huge",
        "overflow",
        "backwards",
        "negative",
        "far",
        "long-header",
        "short-header",
        "no-tensor",
    ],
)
def test_hostile_offsets(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(data)

    def load() -> None:
        with pytest.raises(CheckpointError, match="not a valid safetensors file") as caught:
            load_state_dict(file)
        assert "\n" not in str(caught.value)

    used = memory.peak(load)
    assert used is None or used < MOST


class Calls:
    """Unpickling calls something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (os.system, ("touch {}",)),
        (eval, ("open('{}', 'w')",)),
        (exec, ("open('{}', 'w')",)),
        (subprocess.check_output, (["touch", "{}"],)),
        (open, ("{}", "w")),
        (getattr, ("", "upper")),
        (torch.load, ("{}",)),
        (torch.hub.load, ("{}", "x")),
        (bytearray, (2**40,)),
        (torch.zeros, (2**40,)),
    ],
    ids=lambda value: getattr(value, "__name__", "") if callable(value) else "",
)
def test_pickles_that_call_something(tmp_path: Path, function: Any, arguments: tuple[Any, ...]) -> None:
    target = tmp_path / "executed"

    def fill(value: Any) -> Any:
        if isinstance(value, list):
            return [fill(v) for v in value]
        return value.format(target) if isinstance(value, str) else value

    hostile = (
        Calls(function, *(fill(a) for a in arguments)) if function is not getattr else Calls(getattr, "x", "upper")
    )
    for content in (hostile, {"params": {**STATE, "x": hostile}}):
        for zipped in (True, False):
            torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
            with pytest.raises(CheckpointError, match=r"refused|not a checkpoint") as caught:
                load_state_dict(tmp_path / "w.pth")
            assert "\n" not in str(caught.value) and not target.exists()
        (tmp_path / "w.pkl").write_bytes(pickle.dumps(hostile))
        with pytest.raises(CheckpointError, match=r"refused|not a checkpoint"):
            load_state_dict(tmp_path / "w.pkl")
        assert not target.exists()


def test_a_zip_that_grows_without_bound(tmp_path: Path) -> None:
    """Entries that inflate to a gigabyte, and one that claims more than there is."""
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    with zipfile.ZipFile(buffer) as before:
        entries = {info.filename: before.read(info) for info in before.infolist()}
    data = next(name for name in entries if name.endswith("data/0"))
    bomb = tmp_path / "w.pth"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, bytes(2**30) if name == data else content)
    assert bomb.stat().st_size < 2 * 2**20

    def load() -> None:
        with pytest.raises(CheckpointError) as caught:
            load_state_dict(bomb)
        assert "\n" not in str(caught.value)

    used = memory.peak(load)
    assert used is None or used < MOST


# --- plans ----------------------------------------------------------------------------------------------------------


def test_mutated_plans() -> None:
    """The text of a plan is read, or refused with a ValueError."""
    text = esr_kernels.optimize(python_models.create("span", feature_channels=4)).plan.to_json()
    generator, counts = random.Random("plans"), Counter()
    for _ in range(EXAMPLES):
        changed = mutated(text.encode(), generator).decode("utf-8", "replace")
        if generator.random() < 0.7:
            # Still JSON, with other values.
            values = list(re.finditer(r'-?\d+(\.\d+)?|"\w+"|null|true', text))
            one = generator.choice(values)
            new = generator.choice(("-1", "0", "1e99", "99999999999999999999", '"x"', "null", "[]", "{}", "true", "3"))
            changed = text[: one.start()] + new + text[one.end() :]
        counts["inputs"] += 1
        try:
            Plan.from_json(changed)
            counts["read"] += 1
        except ValueError as error:
            counts["refused"] += 1
            lines = str(error).splitlines()
            assert len(lines) == 1
    print(f"\nplans: {dict(counts)}")
    assert counts["read"] and counts["refused"]


@pytest.mark.skipif(native.load() is not None, reason="the native library is not compiled")
def test_mutated_programs() -> None:
    """A program with other numbers, or weights of other shapes, is refused, or runs, or is refused then."""
    model = esr_kernels.optimize(python_models.create("span", feature_channels=4))
    program, constants = encode(model.plan)
    weights = list(model.parameters())
    generator, counts = random.Random("programs"), Counter()
    x = torch.randn(1, 3, 9, 11)
    for _ in range(EXAMPLES):
        numbers, tensors = list(program), list(weights)
        for _ in range(generator.randrange(1, 4)):
            at = generator.randrange(len(numbers))
            numbers[at] = generator.choice((-1, 0, 1, 2, 3, numbers[at] + 1, generator.choice(numbers), 2**31, 2**62))
        if generator.random() < 0.3:
            at = generator.randrange(len(tensors))
            tensors[at] = torch.randn(generator.choice(([], [0], [4, 4, 3, 3], [3, 4, 1, 1], [1] * 9, [0, 4, 3, 3])))
        counts["inputs"] += 1
        try:
            handle = torch.ops.esr_native.compile_plan(numbers, constants, tensors)
        except RuntimeError:
            counts["refused"] += 1
            continue
        try:
            outputs = [torch.empty(1, 3, 36, 44)]
            torch.ops.esr_native.execute_plan(handle, [x], outputs)
            counts["run"] += 1
        except RuntimeError:
            counts["refused when run"] += 1
        finally:
            torch.ops.esr_native.release_plan(handle)
    print(f"\nprograms: {dict(counts)}")
    assert counts["run"] and counts["refused"]


# --- native entry points ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fuzzer() -> Path:
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("there is no C++ compiler")
    spec = importlib.util.spec_from_file_location("esr_fuzz", ROOT / "tests" / "fuzz" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return module.build()
    except subprocess.CalledProcessError:
        probe = "int main() { return 0; }"
        command = [
            *os.environ.get("CXX", "c++").split(),
            "-fsanitize=address,undefined",
            "-x",
            "c++",
            "-",
            "-o",
            os.devnull,
        ]
        if subprocess.run(command, input=probe, text=True, check=False, capture_output=True).returncode != 0:
            pytest.skip("the compiler has no sanitizers")
        raise


def fuzz(program: Path, runs: int, length: int = 512, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), f"-runs={runs}", "-seed=1", f"-max_len={length}"]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )


def test_native_entry_points(fuzzer: Path) -> None:
    """Plan parser, placement of maps, weight packing: promises hold, and no sanitizer finds anything."""
    done = fuzz(fuzzer, 25 * EXAMPLES)
    print(f"\nnative: {(done.stdout or done.stderr).strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_fuzzer_finds_a_planted_bug(fuzzer: Path) -> None:
    """A read beyond a block, behind four bytes of the input."""
    done = fuzz(fuzzer, 2 * 10**6, 8, ESR_FUZZ_PLANTED="1")
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr and "planted" in done.stderr
